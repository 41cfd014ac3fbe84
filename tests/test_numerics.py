"""Accuracy at the edges of floating point, and densities that integrate to one."""

from __future__ import annotations

import math

import mpmath
import pyro.distributions as dist
import pytest
import torch
from cases import scatter

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, linalg

EXTREMES = [0.0, 1e-45, 1e-30, 1e-8, 0.5, 1.0, 8.0, 8.0001, 20.0, 50.0, 88.0, 89.0, 120.0, 1e4, 1e18, 3e38]


# ---------------------------------------------------------------------- activations


def asinh_sinh_plus(x: float, c: float) -> float:
    with mpmath.workdps(80):
        return float(mpmath.asinh(mpmath.sinh(mpmath.mpf(x)) + mpmath.mpf(c)))


@pytest.mark.parametrize("c", [-5.0, -1.0, -1e-3, 0.0, 0.3, 2.0, 5.0])
def test_baird_float32_is_accurate_and_finite(c):
    layer = pf.Baird()
    with torch.no_grad():
        layer.c.fill_(c)
    c = layer.c.item()
    center = math.asinh(-c)
    x = torch.cat(
        [torch.linspace(-80, 80, 401), torch.linspace(-9, 9, 301), torch.linspace(center - 0.1, center + 0.1, 51)]
    )
    y = layer(x)
    expected = torch.tensor([asinh_sinh_plus(v, c) for v in x.tolist()], dtype=torch.float64)
    assert y.isfinite().all()
    assert ((y - expected).abs() <= 1e-6 * expected.abs().clamp_min(1)).all()
    back = layer.inv(y.detach().clone())
    assert ((back - x).abs() <= 4e-6 * x.abs().clamp_min(1) * math.exp(math.asinh(abs(c) / 2))).all()
    slope = torch.autograd.functional.jacobian(lambda v: layer(v).sum(), x)
    bound = math.exp(math.asinh(abs(c) / 2)) * (1 + 1e-4)
    assert ((slope <= bound) & (slope >= 1 / bound)).all()
    torch.testing.assert_close(call_and_ladj(layer, x)[1], slope.log(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_baird_is_finite_for_every_float(dtype):
    values = torch.tensor(EXTREMES, dtype=dtype)
    values = torch.cat([-values, values])
    layer = pf.Baird((len(values), 1)).to(dtype)
    for largest in (3e38, 1e36):  # beyond |c| = 1e36 a slope's factors may overflow in float32, its value does not
        with torch.no_grad():
            layer.c.copy_(values[:, None].clamp(-largest, largest))
        x = values.clone().requires_grad_()
        for run in (pf.call_and_ladj, pf.inv_and_ladj):
            y, ladj = run(layer, x)
            assert y.isfinite().all()
            assert ladj.isfinite().all()
            if largest == 1e36:
                grads = torch.autograd.grad(y.sum() + ladj.sum(), [x, layer.c])
                assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "layer", [pf.Sigmoid(), pf.Tanh(), pf.ELU(0.7), pf.SELU(), pf.Interval(-3.0, 0.1)], ids=lambda t: type(t).__name__
)
def test_bounded_activations_are_finite_at_every_float(layer, dtype):
    values = torch.tensor(EXTREMES, dtype=dtype)
    x = torch.cat([-values, values]).requires_grad_()
    y, ladj = call_and_ladj(layer, x)
    for out in (y, ladj):
        assert out.isfinite().all()
        assert torch.autograd.grad(out.sum(), x, retain_graph=True)[0].isfinite().all()
    assert layer.codomain.check(y).all()
    lower = getattr(layer.codomain, "lower_bound", None)
    upper = getattr(layer.codomain, "upper_bound", math.inf)
    assert ((y > lower) & (y < upper)).all()  # the open interval
    edges = torch.tensor([lower, min(upper, 1e30)], dtype=dtype, requires_grad=True)
    back = layer.inv(edges)
    assert back.isfinite().all()
    assert torch.autograd.grad(back.sum(), edges)[0].isfinite().all()


def test_sigmoid_agrees_with_torch():
    x = torch.linspace(-30, 30, 61, dtype=torch.float64)
    ours, theirs = pf.Sigmoid(), torch.distributions.transforms.SigmoidTransform()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.log_abs_det_jacobian(x, ours(x)), theirs.log_abs_det_jacobian(x, theirs(x)))


# ---------------------------------------------------------------------- linear algebra


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("n", [1, 8, 129, 160, 200])
def test_general_solves_are_right_at_every_size_on_two_threads(n, batch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        matrix = (torch.randn(*batch, n, n, dtype=torch.float64) + 2 * n**0.5 * torch.eye(n)).requires_grad_()
        rhs = torch.randn(*batch, n, 2, dtype=torch.float64)
        z = linalg.solve(matrix, rhs)
        torch.testing.assert_close(matrix @ z, rhs)
        ladj = linalg.log_abs_det(matrix)
        one_by_one = [torch.linalg.slogdet(m)[1] for m in matrix.detach().reshape(-1, n, n)]
        torch.testing.assert_close(ladj, torch.stack(one_by_one).reshape(batch))
        (grad,) = torch.autograd.grad(ladj.sum(), matrix)
        eye = torch.eye(n, dtype=torch.float64).expand(*batch, n, n)
        torch.testing.assert_close(grad.mT @ matrix.detach(), eye, rtol=1e-8, atol=1e-8)
    finally:
        torch.set_num_threads(threads)


def test_general_solves_under_vmap():
    matrix = torch.randn(3, 150, 150, dtype=torch.float64) + 30 * torch.eye(150)
    mapped = torch.vmap(linalg.log_abs_det)(matrix)
    torch.testing.assert_close(mapped, torch.stack([torch.linalg.slogdet(m)[1] for m in matrix]))
    with pytest.raises(ValueError, match="square"):
        linalg.solve(torch.zeros(2, 3), torch.zeros(2, 1))


@pytest.mark.parametrize("mode", ["jacfwd", "jacrev", "hessian"])
def test_derivatives_of_general_solves_under_vmap(mode):
    """torch's own derivatives are wrong there in forward mode."""
    transform = getattr(torch.func, mode)
    matrix = torch.eye(4, dtype=torch.float64) + 0.3 * torch.randn(5, 4, 4, dtype=torch.float64)
    rhs = torch.randn(4, 1, dtype=torch.float64)
    for function, exact in (
        (linalg.log_abs_det, lambda a: torch.linalg.slogdet(a)[1]),
        (lambda a: linalg.solve(a, rhs).sum(), lambda a: (torch.linalg.inv(a) @ rhs).sum()),
    ):
        got = torch.func.vmap(transform(function))(matrix)
        expected = torch.func.jacrev(torch.func.jacrev(exact) if mode == "hessian" else exact)
        torch.testing.assert_close(got, torch.stack([expected(a) for a in matrix]))


@pytest.mark.parametrize("make", [pf.low_rank_residual, pf.sylvester, pf.svd_linear, pf.low_rank_linear, pf.planar])
def test_layers_under_vmap_of_forward_mode(make):
    layer = scatter(make(3)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    for function in (layer._call, layer._inverse, lambda v: call_and_ladj(layer, v)[1]):
        forward = torch.func.vmap(torch.func.jacfwd(function))(x)
        torch.testing.assert_close(forward, torch.func.vmap(torch.func.jacrev(function))(x))
        torch.testing.assert_close(forward, torch.stack([torch.func.jacrev(function)(row) for row in x]))


@pytest.mark.parametrize("k", [0, 1, 2, 5, 127, 128, 129, 300])
def test_compact_wy_equals_the_loop_of_reflections(k):
    n = 40
    vectors = torch.randn(k, n, dtype=torch.float64) * torch.logspace(-6, 6, max(k, 1), dtype=torch.float64)[:k, None]
    if k > 2:
        vectors[1] = 0
    x = torch.randn(7, n, dtype=torch.float64)
    expected = x
    for u in reversed(vectors):
        if u.any():
            expected = expected - 2 * torch.outer(expected @ u, u) / (u @ u)
    y = linalg.householder_product(vectors, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(linalg.householder_product(vectors, y, transpose=True), x, rtol=1e-9, atol=1e-9)
    tall = torch.randn(200, n, dtype=torch.float64)  # more rows than columns: the solve takes its other branch
    torch.testing.assert_close(
        linalg.householder_product(vectors, tall)[3], linalg.householder_product(vectors, tall[3]), rtol=1e-9, atol=1e-9
    )
    batched = linalg.householder_product(vectors.expand(2, k, n), x[:, None])
    torch.testing.assert_close(batched, expected[:, None].expand(7, 2, n), rtol=1e-9, atol=1e-9)


def test_orthogonal_stays_orthogonal_at_any_scale():
    for scale in (1e-30, 1e-12, 1.0, 1e12):
        layer = pf.Orthogonal(6)
        with torch.no_grad():
            layer.vectors.normal_().mul_(scale)
            layer.vectors[2] = 0
        torch.testing.assert_close(layer.matrix @ layer.matrix.mT, torch.eye(6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_from_matrix_takes_any_orthogonal_matrix(n, sign):
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    q[0] *= sign * torch.linalg.det(q).sign()
    for target in (q, q.float(), sign * torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64).flip(0)):
        layer = pf.Orthogonal.from_matrix(target)
        torch.testing.assert_close(layer.matrix, target)
        x = torch.randn(4, n, dtype=target.dtype)
        torch.testing.assert_close(layer(x), x @ target.mT)
        assert layer.vectors.dtype == target.dtype


def test_from_matrix_of_almost_the_identity():
    skew = torch.randn(5, 5, dtype=torch.float64)
    for size in (1e-6, 1e-9, 1e-14, 1e-17):
        q = torch.linalg.matrix_exp(size * (skew - skew.mT))
        torch.testing.assert_close(pf.Orthogonal.from_matrix(q).matrix, q, rtol=0, atol=1e-14)
        torch.testing.assert_close(pf.Orthogonal.from_matrix(q.float()).matrix, q.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 33])
def test_svd_from_any_invertible_matrix(n):
    w = torch.randn(n, n, dtype=torch.float64)
    layer = pf.SVDLinear.from_matrix(w)
    torch.testing.assert_close(layer.matrix, w)
    x = torch.randn(4, n, dtype=torch.float64)
    y, ladj = call_and_ladj(layer, x)
    torch.testing.assert_close(y, x @ w.mT)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(w)[1].expand(4))


def test_determinant_sign_is_that_of_the_number_of_reflections():
    for k in range(6):
        layer = scatter(pf.Orthogonal(5, num_reflections=k)).double()
        torch.testing.assert_close(torch.linalg.det(layer.matrix), torch.tensor((-1.0) ** k, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_linear_layers_start_at_the_identity(n):
    x = torch.randn(4, n, dtype=torch.float64)
    for layer in (
        pf.orthogonal(n),
        pf.svd_linear(n),
        pf.diagonal(n),
        pf.shift(n),
        pf.affine_coupling(n),
        pf.baird(n),
        pf.prelu(n),
    ):
        torch.testing.assert_close(layer.double()(x), x)


def test_coupling_scale_is_bounded_smoothly():
    layer = pf.AffineCoupling(1, torch.nn.Linear(1, 2, bias=False), max_log_scale=1.5).double()
    with torch.no_grad():
        layer.hypernet.weight[0] = 100.0
        layer.hypernet.weight[1] = 0.0
    x = torch.tensor([[-5.0, 1.0], [0.0, 1.0], [5.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(call_and_ladj(layer, x)[1], torch.tensor([-1.5, 0.0, 1.5], dtype=torch.float64))


# ---------------------------------------------------------------------- densities


def layers_1d():
    return {
        "sigmoid": [pf.baird(1), pf.Sigmoid()],
        "interval": [pf.diagonal(1), pf.Interval(-2.0, 1.0)],
        "elu": [pf.ELU(2.0)],
        "leaky": [pf.LeakyReLU(0.3), pf.prelu(1)],
        "mixed": [pf.affine_coupling(1), pf.svd_linear(1), pf.baird(1), pf.orthogonal(1, num_reflections=1)],
        "inverse": [pf.Inverted(pf.baird(1)), pf.Inverted(pf.diagonal(1))],
    }


@pytest.mark.parametrize("name", layers_1d())
def test_densities_in_one_dimension_integrate_to_one(name):
    chain = scatter(pf.Chain(layers_1d()[name])).double()
    d = pf.FlowDistribution(dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1), [chain])
    # substitute the flow's own image of a grid, so that no tail is cut off
    edges = chain(torch.linspace(-7, 7, 40001, dtype=torch.float64)[:, None]).detach().squeeze(-1)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges.diff().abs()
    assert abs((d.log_prob(middle[:, None]).exp() * width).sum().item() - 1) < 1e-4


def test_densities_in_two_dimensions_integrate_to_one():
    for seed in range(3):
        torch.manual_seed(seed)
        chain = pf.Chain(
            [pf.svd_linear(2), pf.baird(2), pf.affine_coupling(2, [8], activation=torch.nn.Tanh), pf.orthogonal(2)]
        )
        chain = scatter(chain, 0.5).double()
        base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
        for transform in (chain, pf.Inverted(chain)):
            d = pf.FlowDistribution(base, [transform])
            with torch.no_grad():
                sample = d.sample((20000,))
                low, high = sample.amin(0) - 3, sample.amax(0) + 3
                n = 1000
                axes = [torch.linspace(low[i], high[i], n, dtype=torch.float64) for i in range(2)]
                grid = torch.cartesian_prod(*axes)
                cell = ((high - low) / (n - 1)).prod()
                total = sum((d.log_prob(part).exp().sum() * cell).item() for part in grid.split(250000))
            assert abs(total - 1) < 1e-4


# ---------------------------------------------------------------------- laws, against an independent formula


def test_baird_has_second_derivatives_far_out():
    for dtype, far in ((torch.float32, [45.0, 50.0, 80.0]), (torch.float64, [50.0, 80.0, 700.0])):
        layer = pf.Baird().to(dtype)
        with torch.no_grad():
            layer.c.fill_(1.5)
        x = torch.tensor([0.3, *far, *(-v for v in far)], dtype=dtype, requires_grad=True)
        for run in (pf.call_and_ladj, pf.inv_and_ladj):
            y, ladj = run(layer, x)
            for out in (y, ladj):
                (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
                second = torch.autograd.grad(grad.sum(), [x, layer.c], retain_graph=True)
                assert all(g.isfinite().all() for g in second)


def test_permute_follows_its_law():
    permutation = [2, 0, 3, 1]  # not its own inverse
    x = torch.randn(5, 4)
    torch.testing.assert_close(pf.Permute(permutation)(x), torch.stack([x[:, i] for i in permutation], -1))
    image_like = torch.randn(4, 2, 3)
    torch.testing.assert_close(pf.Permute(permutation, dim=-3)(image_like), image_like[permutation])


@pytest.mark.parametrize("r", [1, 2, 3])
def test_pixel_shuffle_equals_torchs(r):
    x = torch.randn(2, 2 * r * r, 3, 4)
    y = pf.PixelShuffle(r)(x)
    torch.testing.assert_close(y, torch.nn.functional.pixel_shuffle(x, r))
    torch.testing.assert_close(pf.PixelShuffle(r).inv(y.clone()), torch.nn.functional.pixel_unshuffle(y, r))


def test_diagonal_keeps_the_signs_of_a_matrix():
    matrix = torch.diag(torch.tensor([2.0, -0.5, -3.0]))
    x = torch.randn(4, 3)
    torch.testing.assert_close(pf.Diagonal.from_matrix(matrix)(x), x @ matrix.T)


def test_elementwise_layers_are_increasing():
    """The sign decides the direction of cdf; compare it with the empirical one."""
    d = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [scatter(pf.Baird()), pf.Interval(-1.0, 2.0)])
    sample = d.sample((20000,))
    for q in (-0.5, 0.5, 1.5):
        assert abs(d.cdf(torch.tensor(q)).item() - (sample <= q).double().mean().item()) < 0.02
