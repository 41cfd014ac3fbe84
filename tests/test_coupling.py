"""Couplings: every function with every kind of event, against the function applied element by element."""

from __future__ import annotations

import math

import pytest
import torch
from test_monotone_layers import FUNCTIONS, Cubic, far

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj
from pyro_invflows.monotone import Affine, CircularSpline, MixtureCDF, RationalQuadraticSpline
from pyro_invflows.networks import conv_network, dense_network
from pyro_invflows.testing import check_bijection

every_function = pytest.mark.parametrize("function", [*FUNCTIONS, Cubic()], ids=str)
#: dim, the event for C channels
EVENTS = [
    pytest.param(-1, (), id="vectors"),
    pytest.param(-2, (3,), id="sequences"),
    pytest.param(-3, (2, 3), id="images"),
]


def network(given, wanted, dim):
    if dim == -1:
        return dense_network(given, [6], wanted, activation=torch.nn.Tanh)
    return conv_network(given, [6], wanted, spatial_dims=-dim - 1, activation=torch.nn.Tanh)


def points(*shape, seed=0):
    return 4 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 2


@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize(("dim", "spatial"), EVENTS)
@every_function
def test_applies_the_function_to_each_element(function, dim, spatial, keep):
    parameters = function.num_parameters
    layer = far(pf.Coupling(function, 2, network(2, parameters * 3, dim), dim=dim, keep=keep).double(), 0.5)
    x = points(4, 5, *spatial)
    y, ladj = call_and_ladj(layer, x)
    first, second = (x[:, :2], x[:, 2:]) if keep == "first" else (x[:, 3:], x[:, :3])
    kept, changed = (y[:, :2], y[:, 2:]) if keep == "first" else (y[:, 3:], y[:, :3])
    assert torch.equal(kept, first)
    raw = layer.hypernet(first)
    total = torch.zeros(4, dtype=x.dtype)
    for channel in range(3):
        mine = torch.stack([raw[:, p * 3 + channel].reshape(4, -1) for p in range(parameters)], 1)  # (4, P, pixels)
        value, log_slope = function.forward(second[:, channel].reshape(4, -1), mine)
        torch.testing.assert_close(changed[:, channel].reshape(4, -1), value)
        total = total + (0 if log_slope is None else log_slope.sum(-1))
    torch.testing.assert_close(ladj, total)
    back, inverse = inv_and_ladj(layer, y.detach())
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -ladj)


@pytest.mark.parametrize(("dim", "spatial"), EVENTS)
@every_function
def test_constants(function, dim, spatial):
    """Without a network, a coupling of everything: the same parameters at each pixel."""
    layer = pf.Coupling(function, 0, None, dim=dim, input_dim=3).double()
    torch.testing.assert_close(layer(points(2, 3, *spatial)), points(2, 3, *spatial))  # the start
    far(layer)
    x = points(2, 3, *spatial)
    y, ladj = call_and_ladj(layer, x)
    assert ladj.shape == (2,)
    raw = layer.constants.reshape(function.num_parameters, 3)
    elementwise = pf.Monotone(function, 3).double()
    with torch.no_grad():
        elementwise.raw.copy_(raw)
    moved = x.movedim(1, -1)
    expected, slopes = call_and_ladj(elementwise, moved)
    torch.testing.assert_close(y, expected.movedim(-1, 1))
    torch.testing.assert_close(ladj, slopes.flatten(1).sum(-1))
    torch.testing.assert_close(inv_and_ladj(layer, y.detach())[0], x)


@pytest.mark.parametrize(("dim", "spatial"), EVENTS)
@every_function
def test_keeps_every_promise(function, dim, spatial):
    layer = pf.Coupling(function, 1, network(1, function.num_parameters * 2, dim), dim=dim, input_dim=3)
    check_bijection(far(layer.double(), 0.3), points(2, 3, *spatial), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("dim", [1, 2, 5, 33])
def test_spline_couplings_far_from_the_start(dim, size, dtype):
    layer = far(pf.spline_coupling(dim, [16]), 0.3 * size, seed=dim).to(dtype)
    x = 8 * torch.rand(64, dim, dtype=dtype, generator=torch.Generator().manual_seed(1)) - 4
    y, ladj = call_and_ladj(layer, x)
    back, inverse = inv_and_ladj(layer, y.detach().clone())
    assert ladj.isfinite().all()
    assert inverse.isfinite().all()
    again = layer(back.detach().clone())
    torch.testing.assert_close(again, y, atol=1e-4 if dtype == torch.float32 else 1e-11, rtol=0)
    (ladj.sum() + inverse.sum()).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(("dim", "spatial"), EVENTS)
def test_a_context(dim, spatial):
    conditional = far(pf.conditional_spline_coupling(4, 2, hidden_dims=[6], num_bins=3, dim=dim).double(), 0.3)
    context = torch.randn(7, 2, dtype=torch.float64)
    layer = conditional.condition(context)
    for x in (points(5, 7, 4, *spatial), points(4, *spatial)):
        y, ladj = call_and_ladj(layer, x)
        whole = x.expand(*y.shape)
        for i in range(7):
            alone, alone_ladj = call_and_ladj(conditional.condition(context[i]), whole.movedim(dim - 1, 0)[i])
            torch.testing.assert_close(y.movedim(dim - 1, 0)[i], alone)
            torch.testing.assert_close(ladj[..., i], alone_ladj)
        torch.testing.assert_close(inv_and_ladj(layer, y.detach())[0], whole)


def test_what_lies_outside_stays():
    layer = far(pf.spline_coupling(4, [8], bound=1.0).double())
    x = 1.0 + points(5, 4).abs()
    y, ladj = call_and_ladj(layer, x)
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros(5, dtype=x.dtype))


def test_angles_off_the_circle_have_density_zero():
    layer = far(pf.Coupling(CircularSpline(4), 1, torch.nn.Linear(1, 13)).double())
    y = torch.tensor([[0.5, 1.0], [0.5, math.pi], [0.5, 4.0], [9.0, 1.0]], dtype=torch.float64)
    for cache_size in (0, 1):
        cold = layer.with_cache(cache_size)
        x, ladj = inv_and_ladj(cold, y)
        assert ladj.isinf().tolist() == [False, False, True, False]
        assert cold.log_abs_det_jacobian(x, y).isinf().tolist() == [False, False, True, False]


def test_the_affine_coupling_is_a_case():
    torch.manual_seed(0)
    affine = far(pf.affine_coupling(5, [8], max_log_scale=1.5))
    general = pf.Coupling(Affine(1.5), 2, affine.hypernet)
    x = torch.randn(7, 5)
    for run in (call_and_ladj, inv_and_ladj):
        for a, b in zip(run(affine, x), run(general, x), strict=True):
            assert torch.equal(a, b)
    raw_scale, shift = affine.hypernet(x[:, :2]).chunk(2, -1)
    s = 1.5 * torch.tanh(raw_scale / 1.5)
    torch.testing.assert_close(affine(x)[:, 2:], x[:, 2:] * s.exp() + shift)
    assert isinstance(affine, pf.Coupling)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: pf.Coupling(Affine, 1, torch.nn.Linear(1, 2)), TypeError, "the class Affine; did you mean Affine"),
        (lambda: pf.Coupling(1, 1, torch.nn.Linear(1, 2)), TypeError, "derive from MonotoneFunction, but got 1"),
        (lambda: pf.Coupling(Affine(), 1, lambda x: x), TypeError, "Coupling: hypernet must be a module"),
        (
            lambda: pf.Coupling(Affine(), 1, None, input_dim=3),
            ValueError,
            "Coupling without a network learns constants",
        ),
        (lambda: pf.Coupling(Affine(), 1, torch.nn.Linear(1, 2), keep="both"), ValueError, "'first' or 'last'"),
        (lambda: pf.spline_coupling(4, num_bins=1), ValueError, "num_bins must be at least 2"),
        (lambda: pf.spline_coupling(4, bound=-1.0), ValueError, "bound must be positive and finite"),
        (lambda: pf.spline_coupling(4, split_dim=4), ValueError, "split_dim must be below input_dim"),
        (lambda: pf.spline_coupling(4, dim=1), ValueError, "dim must be between -4 and -1"),
        (
            lambda: pf.SplineCoupling(1, torch.nn.Linear(1, 4))(torch.zeros(2, 3)),
            ValueError,
            r"shape \(2, 46\), but it returned \(2, 4\).*takes 23 for each of 2 elements: logits of the widths",
        ),
        (
            lambda: pf.Coupling(MixtureCDF(2), 1, torch.nn.Linear(1, 4))(torch.zeros(2, 3)),
            ValueError,
            r"shape \(2, 16\).*MixtureCDF\(num_components=2.*takes 8 for each of 2 elements",
        ),
    ],
)
def test_bad_input(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_says_what_it_is():
    assert pf.Coupling(RationalQuadraticSpline(), 1, torch.nn.Linear(1, 46), keep="last").extra_repr() == (
        "RationalQuadraticSpline(num_bins=8, bound=5.0), split_dim=1, keep='last'"
    )
    assert pf.affine_coupling(4, scale=None).extra_repr() == "4, split_dim=2, scale=None"
