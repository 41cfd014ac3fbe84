"""Determinants of ``I + A diag(s) B diag(t)`` by elimination for all points at once, against torch's LU."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_invflows import LowRankResidual, call_and_ladj, linalg
from pyro_invflows.linalg import accretive


def factors(k: int, n: int, points: int, norm: float, dtype: torch.dtype, outer: bool = True) -> list:
    """Draw factors whose product has at most the given norm."""
    torch.manual_seed(0)
    left, right = torch.randn(k, n, dtype=torch.float64), torch.randn(n, k, dtype=torch.float64)
    left, right = left / torch.linalg.matrix_norm(left, 2), norm * right / torch.linalg.matrix_norm(right, 2)
    slopes = [2 * torch.rand(points, m, dtype=torch.float64) - 1 for m in (n, k)]
    drawn = [left, slopes[0], right, *slopes[1 : 1 + outer]]
    return [t.to(dtype).requires_grad_() for t in drawn]


def reference(left, slope, right, outer=None):
    product = left @ torch.diag_embed(slope) @ right
    if outer is not None:
        product = product @ torch.diag_embed(outer)
    return torch.linalg.slogdet(torch.eye(len(left), dtype=left.dtype) + product)[1]


def is_eliminated(value: torch.Tensor) -> bool:
    """Whether the value came from elimination, not from torch's operations."""
    node = value.grad_fn
    while node is not None and "ContractionLogDet" not in type(node).__name__:
        node = node.next_functions[0][0] if node.next_functions else None
    return node is not None


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize(("k", "n", "points"), [(1, 3, 2000), (2, 2, 1000), (7, 40, 300), (28, 28, 500), (32, 5, 70)])
def test_value_and_gradients(k, n, points, outer):
    # 500 matrices of side 28 are processed in two parts
    given = factors(k, n, points, 0.999, torch.float64, outer)
    value, expected = linalg.contraction_log_det(*given), reference(*given)
    assert is_eliminated(value)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn(points, dtype=torch.float64)
    got = torch.autograd.grad(value, given, weight)
    torch.testing.assert_close(got, torch.autograd.grad(expected, given, weight), rtol=1e-8, atol=1e-9)


def _near_the_bound(kind: str, k: int = 6) -> torch.Tensor:
    """Matrices of norm 0.999 with small pivots, large ones, or the worst condition."""
    q = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    if kind == "reflection":
        return -0.999 * torch.eye(k, dtype=torch.float64)
    if kind == "orthogonal":
        return 0.999 * q
    low, high = (3.0, 3.14159) if kind == "half turns" else (math.acos(-0.999), math.acos(-0.999) + 1e-3)
    turns = [
        torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]]) for a in torch.linspace(low, high, k // 2).double()
    ]
    return 0.999 * q @ torch.block_diag(*turns) @ q.mT


@pytest.mark.parametrize("kind", ["half turns", "arc", "orthogonal", "reflection"])
def test_without_pivots_near_the_bound(kind):
    k, points = 6, 400
    left = _near_the_bound(kind).requires_grad_()
    one, eye = torch.ones(points, k, dtype=torch.float64), torch.eye(k, dtype=torch.float64)
    exact = reference(left, one, eye).detach()
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-3)):  # float32 holds I + M only to eps / 1e-3
        value = linalg.contraction_log_det(*(t.to(dtype) for t in (left, one, eye, one)))
        assert is_eliminated(value)
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=tolerance)


def test_second_derivatives(monkeypatch):
    monkeypatch.setattr(accretive, "_FEWEST_ROWS", 0)
    for outer in (True, False):
        given = factors(3, 4, 2, 0.9, torch.float64, outer)
        assert is_eliminated(linalg.contraction_log_det(*given))
        assert torch.autograd.gradcheck(linalg.contraction_log_det, given)
        assert torch.autograd.gradgradcheck(linalg.contraction_log_det, given)


def test_shared_factors_in_second_derivatives(monkeypatch):
    """Slopes that depend on a factor: each path counts once."""
    monkeypatch.setattr(accretive, "_FEWEST_ROWS", 0)
    left, slope, right, outer = factors(3, 4, 2, 0.9, torch.float64)

    def function(left):
        return linalg.contraction_log_det(left, (slope * left.sum()).tanh(), right, outer * left.mean())

    value = function(left)
    assert is_eliminated(value)
    (plain,) = torch.autograd.grad(value.sum(), left, retain_graph=True)
    (with_graph,) = torch.autograd.grad(value.sum(), left, create_graph=True)
    torch.testing.assert_close(with_graph, plain)  # which gradgradcheck would not notice
    assert torch.autograd.gradgradcheck(function, left)


def test_batches_broadcast_and_keep_their_shape():
    left, slope, right, outer = factors(4, 5, 600, 0.9, torch.float64)
    with torch.no_grad():
        expected = reference(left, slope.reshape(3, 200, 5), right, outer[:1])
    value = linalg.contraction_log_det(left, slope.reshape(3, 200, 5), right, outer[:1])
    assert is_eliminated(value)
    torch.testing.assert_close(value, expected)


def test_a_bad_point_stays_alone():
    left, slope, right, outer = factors(4, 5, 600, 0.9, torch.float32)
    with torch.no_grad():
        slope[7] = torch.nan
        expected = reference(left, slope, right, outer)
    value = linalg.contraction_log_det(left, slope, right, outer)
    assert is_eliminated(value)
    torch.testing.assert_close(value, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert value.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("form", ["bottleneck", "sandwich"])
def test_layer_gives_the_same_either_way(form, monkeypatch):
    """Values and gradients of both directions, by elimination and by torch's operations."""
    torch.manual_seed(0)
    layer = LowRankResidual(20, form=form).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x = torch.randn(700, 20, dtype=torch.float64)
    results = []
    for fewest in (0, 10**9):
        monkeypatch.setattr(accretive, "_FEWEST_ROWS", fewest)
        for function in (layer, layer.inv):
            y, ladj = call_and_ladj(function, x.clone())
            assert is_eliminated(ladj if function is layer else -ladj) == (fewest == 0)
            grads = torch.autograd.grad((y * x).sum() + ladj.sum(), list(layer.parameters()))
            results.append((y, ladj, *grads))
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_other_modes_give_the_same(monkeypatch):
    """No graph, frozen inputs, vmap, forward mode, autocast: torch's operations."""
    monkeypatch.setattr(accretive, "_FEWEST_ROWS", 0)
    given = factors(4, 5, 60, 0.9, torch.float64)
    value = linalg.contraction_log_det(*given)
    _, slope, right, outer = frozen = [t.detach() for t in given]
    with torch.no_grad():
        torch.testing.assert_close(linalg.contraction_log_det(*given), value)
    assert not is_eliminated(linalg.contraction_log_det(*frozen))
    mapped = torch.vmap(lambda s, t: linalg.contraction_log_det(given[0], s, right, t))(slope, outer)
    torch.testing.assert_close(mapped, value)
    tangent = torch.randn_like(slope)
    (gradient,) = torch.autograd.grad(value.sum(), given[1], retain_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = linalg.contraction_log_det(given[0], torch.autograd.forward_ad.make_dual(slope, tangent), right, outer)
        directional = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(directional, (gradient * tangent).sum(-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = [t.float().detach().requires_grad_() for t in given]
        assert not is_eliminated(linalg.contraction_log_det(*single))


def test_batched_gradients():
    given = factors(4, 5, 500, 0.9, torch.float64)
    value = linalg.contraction_log_det(*given)
    assert is_eliminated(value)
    weights = torch.randn(3, 500, dtype=torch.float64)
    batched = torch.autograd.grad(value, given, weights, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(value, given, w, retain_graph=True) for w in weights]
    for got, expected in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(expected))
