"""Low-rank identities and the low-rank linear layer."""

from __future__ import annotations

import pytest
import torch
from cases import scatter
from torch.autograd import gradcheck, gradgradcheck

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj, linalg
from pyro_invflows.testing import check_bijection


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_thin_frames_are_orthonormal_and_the_first_columns(batch):
    vectors = torch.randn(*batch, 7, 10, dtype=torch.float64)
    frame = linalg.thin_frame(vectors, 4)
    assert frame.shape == (*batch, 10, 4)
    torch.testing.assert_close(frame.mT @ frame, torch.eye(4, dtype=torch.float64).expand(*batch, 4, 4))
    whole = linalg.householder_product(vectors.unsqueeze(-3), torch.eye(10, dtype=torch.float64)).mT
    torch.testing.assert_close(frame, whole[..., :4])
    zero = linalg.thin_frame(torch.zeros(2, 5), 3)
    torch.testing.assert_close(zero, torch.eye(5, 3))


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_identities(batch):
    left, right = torch.randn(*batch, 6, 2, dtype=torch.float64), torch.randn(*batch, 2, 6, dtype=torch.float64)
    whole = torch.eye(6, dtype=torch.float64) + left @ right
    x = torch.randn(4, *batch, 6, dtype=torch.float64)
    torch.testing.assert_close(linalg.low_rank_log_abs_det(left, right), torch.linalg.slogdet(whole)[1])
    torch.testing.assert_close(linalg.low_rank_solve(left, right, x), (torch.linalg.inv(whole) @ x[..., None])[..., 0])
    inverse, log_det = linalg.symmetric_low_rank_inverse(left)
    gram = torch.eye(6, dtype=torch.float64) + left @ left.mT
    torch.testing.assert_close(
        torch.eye(6, dtype=torch.float64) - inverse @ inverse.mT, torch.linalg.inv(gram), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(log_det, torch.linalg.slogdet(gram)[1])


def test_positive():
    raw = torch.linspace(-1e3, 1e3, 2001, dtype=torch.float64)
    value = linalg.positive(raw)
    assert (value > 0).all()
    torch.testing.assert_close(value * linalg.positive(-raw), torch.ones_like(raw))
    torch.testing.assert_close(linalg.positive_inverse(value), raw, rtol=1e-9, atol=1e-9)
    assert linalg.positive(torch.zeros(1)).item() == 1


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (5, 1), (5, 3), (5, 5), (40, 7)])
def test_against_the_dense_matrix(dim, rank, scale):
    layer = scatter(pf.LowRankLinear(dim, rank).double())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(scale)
    x = torch.randn(6, dim, dtype=torch.float64)
    y, ladj = call_and_ladj(layer, x)
    matrix = layer.matrix
    torch.testing.assert_close(y, x @ matrix.mT + layer.bias, rtol=1e-9, atol=1e-9)
    expected = torch.linalg.slogdet(matrix)[1].expand(6)
    torch.testing.assert_close(ladj, expected, rtol=1e-8, atol=1e-8)
    back, inverse = inv_and_ladj(layer, y.detach().clone())
    torch.testing.assert_close(inverse, -ladj)
    # x is as ill-conditioned as the matrix; y is reproduced to rounding error
    condition = torch.linalg.cond(matrix).item()
    torch.testing.assert_close(back, x, rtol=1e-14 * condition + 1e-12, atol=1e-14 * condition + 1e-12)
    torch.testing.assert_close(layer(back), y, rtol=1e-9, atol=1e-10 * (1 + y.abs().max().item()))


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_conformance_at_every_scale(rank, scale):
    layer = scatter(pf.LowRankLinear(5, rank).double()).with_cache(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(scale)
    check_bijection(layer, torch.randn(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("dim", "rank"), [*((6, r) for r in range(1, 7)), (8, 8), (64, 4), (64, 64)])
def test_huge_factors_stay_invertible(dim, rank, dtype):
    layer = pf.LowRankLinear(dim, rank, cache_size=0).to(dtype)
    with torch.no_grad():
        for factor in (layer.left, layer.right):
            factor.copy_(100 * torch.randn_like(factor))
    x = torch.randn(5, dim, dtype=dtype)
    y, ladj = call_and_ladj(layer, x)
    back, inverse = inv_and_ladj(layer, y)
    for value in (y, ladj, back, inverse):
        assert value.isfinite().all()
    # the residual in y: what rounding y (on the way back) and x (on the way there) costs, times the norm of I + U U^T
    size = (1 + layer.left.square().sum()) * (1 + back.norm(dim=-1, keepdim=True) + y.norm(dim=-1, keepdim=True))
    assert ((layer(back) - y).abs() <= 4 * torch.finfo(dtype).eps * size).all()
    double = layer.double()
    expected = linalg.symmetric_low_rank_inverse(double.left)[1] - linalg.symmetric_low_rank_inverse(double.right)[1]
    torch.testing.assert_close(ladj.double(), expected.expand(5), rtol=1e-4, atol=1e-3)
    if dtype == torch.float64 and (dim, rank) != (64, 64):
        torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)  # condition numbers up to 1e10


def test_gradients_to_any_order():
    layer = scatter(pf.LowRankLinear(4, 2).double()).with_cache(0)
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v, *_: inv_and_ladj(layer, v), (y, *layer.parameters()))
    assert gradcheck(lambda v: inv_and_ladj(layer, v), (y,), check_forward_ad=True)
    assert gradgradcheck(lambda v, *_: inv_and_ladj(layer, v), (y, *layer.parameters()))


def test_starts_at_the_identity_with_gradients():
    layer = pf.low_rank_linear(6)
    x = torch.randn(4, 6)
    y, ladj = call_and_ladj(layer, x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(ladj, torch.zeros(4))
    y.square().sum().backward()
    assert all(p.grad.abs().max() > 1e-3 for p in layer.parameters())


@pytest.mark.parametrize("rank", [0, 6, -1])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match="rank"):
        pf.LowRankLinear(5, rank)
