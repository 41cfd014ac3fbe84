"""Spectral norms: values and derivatives against the SVD, and bounds that are never below it."""

from __future__ import annotations

import pytest
import torch

from pyro_invflows.linalg import convolution_norm_bound, spectral_norm, spectral_norm_bound, spectral_norm_bounds

F64 = torch.float64


def svd_norm(matrix):
    return torch.linalg.svdvals(matrix)[..., 0]


def awkward(name, dtype=F64):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(6, 4, generator=generator, dtype=F64)
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    return {
        "zero": torch.zeros(3, 5, dtype=F64),
        "rank one": torch.outer(a[:, 0], a[0]),
        "repeated": u @ torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=F64)) @ vh,
        "nearly repeated": u @ torch.diag(torch.tensor([2.0, 2.0 - 1e-9, 1.0, 0.5], dtype=F64)) @ vh,
        "close": u @ torch.diag(torch.tensor([2.0, 1.999, 1.998, 0.5], dtype=F64)) @ vh,
        "identity": torch.eye(4, dtype=F64),
        "negative": -torch.eye(1, dtype=F64),
        "huge": 1e30 * a,
        "tiny": 1e-30 * a,
        "jordan": torch.diag(torch.ones(9, dtype=F64), 1),
    }[name].to(dtype)


AWKWARD = ["zero", "rank one", "repeated", "nearly repeated", "close", "identity", "negative", "huge", "tiny", "jordan"]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_matrices(name, dtype):
    a = awkward(name, dtype).requires_grad_()
    expected = svd_norm(a.detach().double())
    eps = torch.finfo(dtype).eps
    norm, bound = spectral_norm(a), spectral_norm_bound(a)
    assert norm.dtype == bound.dtype == dtype
    assert abs(norm.double() - expected) <= 2 * eps**0.75 * expected
    assert expected <= bound.double() <= expected * (1 + 1000 * eps)
    for value in (norm, bound):  # a subgradient lies in the unit ball of the dual norm
        (grad,) = torch.autograd.grad(value, a)
        assert torch.linalg.matrix_norm(grad.double(), "nuc") <= 1 + 1e-5
        assert abs((grad * a).sum().double() - expected) <= 1e-5 * expected


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex128])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (33, 33), (4, 2, 7, 6), (0, 3, 3), (130, 140), (150, 300)])
def test_random_matrices(shape, dtype):
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(*shape, dtype=dtype, generator=generator)
    expected = svd_norm(a.to(torch.complex128 if dtype.is_complex else F64))
    norm, bound = spectral_norm(a).double(), spectral_norm_bound(a).double()
    assert norm.shape == bound.shape == shape[:-2]
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    assert ((bound >= expected) & (bound <= expected * (1 + 1e-3))).all()


@pytest.mark.parametrize("kind", ["identity", "clustered", "low rank", "one direction"])
def test_large_bounds_are_proved_on_spectra_that_fool_iterations(kind):
    n = 160
    generator = torch.Generator().manual_seed(5)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0]
    spectrum = {
        "identity": torch.ones(n, dtype=F64),
        "clustered": torch.linspace(1, 0.999, n, dtype=F64),
        "low rank": (torch.arange(n) < 3).to(F64),
        "one direction": torch.cat([torch.tensor([1 + 1e-6], dtype=F64), torch.ones(n - 1, dtype=F64)]),
    }[kind]
    a = q @ torch.diag(spectrum) @ q.T.roll(1, 0)
    bound = spectral_norm_bound(a)
    assert svd_norm(a) <= bound <= spectrum.max() * 1.006


@pytest.mark.parametrize("n", [4, 140])
def test_a_start_that_misses_the_top_vector_does_not_mislead(n):
    """The starting vector is known: build a matrix whose top singular vector is orthogonal to it."""
    start = torch.randn(n, generator=torch.Generator().manual_seed(20), dtype=F64)
    q = torch.linalg.qr(torch.cat([start[:, None], torch.eye(n, dtype=F64)[:, 1:]], 1))[0]
    spectrum = torch.cat([torch.tensor([1.0, 5.0], dtype=F64), torch.linspace(0.5, 0.1, n - 2, dtype=F64)])
    a = q @ torch.diag(spectrum) @ q.T
    assert spectral_norm(a).item() == pytest.approx(5)
    assert 5 <= spectral_norm_bound(a) * (1 + 1e-12) <= 5.05


def test_small_steps_are_certified_by_a_decomposition():
    a = awkward("close")
    torch.testing.assert_close(spectral_norm(a, max_steps=1), svd_norm(a))


def test_nothing_random_is_touched():
    state = torch.random.get_rng_state()
    spectral_norm(torch.ones(3, 3)), spectral_norm_bound(torch.eye(140))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("function", [spectral_norm, spectral_norm_bound])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_derivatives(function, dtype):
    torch.manual_seed(0)
    a = torch.randn(2, 4, 3, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(function, (a,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (a,), check_fwd_over_rev=True)


@pytest.mark.parametrize("function", [spectral_norm, spectral_norm_bound])
def test_derivatives_against_the_svd(function):
    a = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=F64)
    u, _, vh = torch.linalg.svd(a)
    torch.testing.assert_close(torch.func.grad(function)(a), torch.outer(u[:, 0], vh[0]))
    hessian = torch.func.hessian(function)(a)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(svd_norm, a))
    batched = torch.stack([a, 2 * a, -a])
    torch.testing.assert_close(torch.func.vmap(function)(batched), svd_norm(batched), rtol=1e-9, atol=0)


def test_several_at_once_equal_each_alone():
    torch.manual_seed(0)
    matrices = [torch.randn(s, requires_grad=True) for s in [(4, 9), (4, 4), (9, 4), (2, 3), (2, 4, 4), (130, 131)]]
    for together, matrix in zip(spectral_norm_bounds(matrices), matrices, strict=True):
        alone = spectral_norm_bound(matrix)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
        got, expected = (torch.autograd.grad(v.sum(), matrix, retain_graph=True)[0] for v in (together, alone))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    bad = [torch.full((3, 3), torch.nan), torch.eye(3)]
    nan, one = spectral_norm_bounds(bad)
    assert nan.isnan()
    assert 1 <= one <= 1 + 1e-5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_do_not_look_small(value):
    for size in (3, 140):
        a = torch.eye(size)
        a[0, 1] = value
        assert not spectral_norm(a).isfinite()
        assert not spectral_norm_bound(a).isfinite()


def test_half_precision_and_autocast_keep_the_bound():
    a = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    expected = svd_norm(a.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert expected <= spectral_norm_bound(a) <= expected * 1.00001
    half = a.bfloat16()
    assert svd_norm(half.double()) <= spectral_norm_bound(half)
    assert spectral_norm_bound(half).dtype == torch.float32


def test_bad_input():
    with pytest.raises(ValueError, match=r"needs non-empty matrices"):
        spectral_norm(torch.ones(3))
    with pytest.raises(ValueError, match=r"needs non-empty matrices"):
        spectral_norm_bound(torch.ones(3, 0))
    with pytest.raises(ValueError, match="rtol must be"):
        spectral_norm(torch.eye(2), rtol=-1.0)
    with pytest.raises(ValueError, match="max_steps"):
        spectral_norm(torch.eye(2), max_steps=-1)
    for shape in [(2, 2, 3), (2, 2, 2, 3)]:
        with pytest.raises(ValueError, match="odd k"):
            convolution_norm_bound(torch.ones(shape))


# ---------------------------------------------------------------------- convolutions


def as_matrix(kernel, height, width):
    """The convolution with zero padding as a dense matrix, column by column."""
    channels = kernel.shape[1]
    images = torch.eye(channels * height * width, dtype=kernel.dtype).reshape(-1, channels, height, width)
    padding = kernel.shape[2] // 2, kernel.shape[3] // 2
    return torch.nn.functional.conv2d(images, kernel, padding=padding).flatten(1).T


@pytest.mark.parametrize(
    "shape", [(2, 3, 3, 3), (1, 1, 3, 3), (3, 2, 5, 1), (4, 4, 1, 1), (16, 14, 3, 3), (2, 2, 7, 7)]
)
def test_convolutions(shape):
    kernel = torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    bound = convolution_norm_bound(kernel)
    sides = (1, 2, 5, 12) if kernel[0].numel() < 60 else (1, 3, 6)
    norms = [svd_norm(as_matrix(kernel, side, side + 1)) for side in sides]
    assert max(norms) <= bound * (1 + 1e-12)
    dense = torch.fft.fft2(kernel, s=(240, 240)).permute(2, 3, 0, 1)  # the symbol, on a grid fifteen times finer
    supremum = svd_norm(dense[:121]).max()
    assert supremum <= bound * (1 + 1e-12)
    assert bound <= supremum * (1 / torch.cos(torch.tensor(torch.pi / 16, dtype=F64))) ** 2 * 1.001


def test_a_constant_kernel_has_a_known_norm():
    kernel = torch.ones(1, 1, 3, 3, dtype=F64)  # the symbol is largest at frequency zero: 9
    assert 9 <= convolution_norm_bound(kernel) <= 9 * 1.04


def test_derivatives_of_a_convolution_bound():
    kernel = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(6), dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(convolution_norm_bound, (kernel,))
    assert torch.autograd.gradgradcheck(convolution_norm_bound, (kernel,))
