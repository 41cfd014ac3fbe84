"""bfloat16 and half: both directions work, as precisely as the dtype allows, and return the dtype of the input."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CONDITIONAL, SMALL, scatter
from torch import Tensor

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj

HALF = [pytest.param(torch.bfloat16, id="bfloat16"), pytest.param(torch.float16, id="float16")]

#: Computed in float32 internally: only the result is rounded.
ROUNDED_ONCE = {
    "AffineAutoregressive",
    "Autoregressive",
    "ContractiveResidual",
    "GeneralizedSylvester",
    "LULinear",
    "LowRankLinear",
    "LowRankResidual",
    "Monotone",
    "Orthogonal",
    "Planar",
    "Radial",
    "SVDLinear",
    "SinhArcsinh",
    "Spline",
    "SplineAutoregressive",
    "Sylvester",
}


def assert_close(actual: Tensor, expected: Tensor, units: float, scale: Tensor) -> None:
    """Compare, in units of the spacing of the input's dtype at ``scale``."""
    assert actual.shape == expected.shape
    assert (error := (actual.double() - expected).abs() / scale).max() <= units * torch.finfo(actual.dtype).eps, error


def check(layer, name: str, x: Tensor) -> None:
    """Compare both directions with the float64 layer of the same parameters."""
    half, once = x.dtype, name in ROUNDED_ONCE
    units = 1 if once else 32 if name == "Chain" else 8
    reference = copy.deepcopy(layer).double()
    axes = tuple(range(1, x.dim()))

    def scale(value: Tensor) -> Tensor:
        """Return the largest entry: that of the event if only the result is rounded."""
        return value.abs().amax(axes, keepdim=True) if once else value.abs().max()

    with torch.no_grad():
        y, ladj = call_and_ladj(layer, x)
        exact, exact_ladj = call_and_ladj(reference, x.double())
        assert y.dtype == ladj.dtype == half
        assert_close(y, exact, units, scale(exact))
        assert_close(ladj, exact_ladj, units, 1 + exact_ladj.abs())

        y = exact.to(half)
        back, inverse = inv_and_ladj(layer, y)
        exact, exact_ladj = inv_and_ladj(reference, y.double())
        assert back.dtype == inverse.dtype == half
        if once:
            assert_close(back, exact, units, scale(exact))
        else:  # x may be ill-conditioned: then it must map to y
            assert_close(y, reference(back.double()), units, scale(y.double()))
        if name == "ContractiveResidual" or not once:  # at the rounded x
            exact_ladj = -call_and_ladj(reference, back.double())[1]
        assert_close(inverse, exact_ladj, units, 1 + exact_ladj.abs())

        y = layer(x)
        separate = layer.log_abs_det_jacobian(x, y)
        assert separate.dtype == half
        assert_close(separate, ladj.double(), units, 1 + ladj.double().abs())


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_both_directions(case, dim, half):
    check(case.build(dim, torch.float32).to(half), case.layer, case.points(dim, (20,), torch.float32).to(half))


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("case", CONDITIONAL)
def test_conditioned(case, half):
    dim = case.dims[min(1, len(case.dims) - 1)]
    conditional = scatter(case.conditional(dim, 2), 0.1).to(half)
    with torch.no_grad():
        layer = conditional.condition(torch.randn(20, 2).to(half))
    check(layer, case.layer, case.points(dim, (20,), torch.float32).to(half))


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_it_can_be_trained(case, dim, half):
    layer = case.build(dim, torch.float32).to(half)
    y = layer(case.points(dim, (20,), torch.float32).to(half)).detach()
    for leaf in (y.requires_grad_(), *layer.parameters()):
        leaf.grad = None
    x, ladj = inv_and_ladj(layer, y)
    weight = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).reshape(x.shape)
    ((weight * x).sum() - ladj.sum()).backward()
    reference = copy.deepcopy(layer).double()
    exact_y = y.detach().double().requires_grad_()
    x, ladj = inv_and_ladj(reference, exact_y)
    ((weight * x).sum() - ladj.sum()).backward()
    for own, exact in [(y, exact_y), *zip(layer.parameters(), reference.parameters(), strict=True)]:
        if exact.grad is not None:
            assert own.grad.dtype == half
            assert own.grad.isfinite().all()
            if case.layer in ROUNDED_ONCE:
                assert_close(own.grad, exact.grad, 4, exact.grad.abs().max() + 1e-6)


def test_ill_conditioned_layers_are_rounded_once():
    """Rounding intermediate results to half precision would be amplified by the condition number."""
    torch.manual_seed(0)
    for layer in (
        scatter(pf.svd_linear(5), 4.0),
        scatter(pf.low_rank_linear(5, 2), 4.0),
        scatter(pf.sylvester(5), 4.0),
        scatter(pf.planar(5), 4.0),
        scatter(pf.radial(33)),
        scatter(pf.low_rank_residual(5, 3, form="sandwich"), 4.0),
        scatter(pf.contractive_residual(5, [8]), 4.0),
        scatter(pf.contractive_residual(33, [8]), 4.0),
        scatter(pf.generalized_sylvester(5, [8]), 0.5),
    ):
        for half in (torch.bfloat16, torch.float16):
            check(copy.deepcopy(layer).to(half), type(layer).__name__, torch.randn(50, layer.input_dim).to(half))


@pytest.mark.parametrize("half", HALF)
def test_matrices(half):
    for layer in (pf.orthogonal(4), pf.svd_linear(4), pf.low_rank_linear(4, 2), pf.whitening(4, trainable=True)):
        layer = scatter(layer).to(half)
        assert layer.matrix.dtype == half
        expected = copy.deepcopy(layer).double().matrix
        torch.testing.assert_close(layer.matrix.double(), expected, rtol=0, atol=2 * torch.finfo(half).eps * 4)
    orthogonal = pf.Orthogonal.from_matrix(torch.eye(3).flip(0).to(half))
    torch.testing.assert_close(orthogonal.matrix, torch.eye(3).flip(0).to(half), rtol=0, atol=1e-2)


@pytest.mark.parametrize("run", [call_and_ladj, inv_and_ladj], ids=["forward", "inverse"])
@pytest.mark.parametrize("make", [pf.orthogonal, pf.svd_linear, pf.sylvester, pf.low_rank_linear])
def test_compiled(make, run):
    layer, x = scatter(make(4)).bfloat16(), torch.randn(5, 4).bfloat16()
    torch.compiler.reset()
    compiled = torch.compile(lambda v: run(layer, v), fullgraph=True, backend="eager")
    for actual, expected in zip(compiled(x), run(layer, x.clone()), strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_under_autocast_too(case, dim, half):
    layer, x = case.build(dim, torch.float32).to(half), case.points(dim, dtype=torch.float32).to(half)
    y = layer(x).detach()
    with torch.autocast("cpu", dtype=half):
        for run, value in ((call_and_ladj, x), (inv_and_ladj, y)):
            assert all(r.isfinite().all() for r in run(layer, value.clone()))


def test_a_copy_that_is_evaluated_leaves_the_layer_alone():
    layer = scatter(pf.orthogonal(4)).bfloat16()
    vectors, version = layer.vectors, layer.vectors._version
    layer(torch.randn(5, 4).bfloat16()).sum().backward()
    assert layer.vectors is vectors
    assert vectors._version == version
    assert layer.vectors.dtype == vectors.grad.dtype == torch.bfloat16
