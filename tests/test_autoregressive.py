"""Autoregressive layers: the coordinate-by-coordinate inverse and its gradient, orderings, contexts, bad networks."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import scatter
from torch import nn

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj
from pyro_invflows.monotone import (
    Additive,
    Affine,
    CircularSpline,
    MixtureCDF,
    MonotoneFunction,
    RationalQuadraticSpline,
    SinhArcsinh,
    TanhBump,
)
from pyro_invflows.networks import Sine, masked_network
from pyro_invflows.networks.coordinatewise import masked_layers, solve_by_coordinates
from pyro_invflows.solvers import Sweeps

FUNCTIONS = [Affine(), Additive(), RationalQuadraticSpline(4), SinhArcsinh(), TanhBump(), MixtureCDF(2)]
FACTORIES = [pf.affine_autoregressive, pf.spline_autoregressive]
HIDDEN = [[], [8], [8, 8], [40, 20, 40], [6, 0, 6]]


def built(function, dim, hidden, size=0.5, seed=0, **keywords):
    """Return a layer with U(-size, size) added to every parameter, in float64."""
    torch.manual_seed(seed)
    network = masked_network(dim, hidden, function.num_parameters, **keywords)
    return scatter(pf.Autoregressive(function, network, context_dim=keywords.get("context_dim", 0)), size).double()


class Plain(nn.Module):
    """Hides a masked network, so that the layer has to sweep."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def hidden_from(layer):
    layer = copy.deepcopy(layer).with_cache(0)
    layer.hypernet = Plain(layer.hypernet)
    return layer


# ------------------------------------------------------------------ the network


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_outputs_depend_on_the_coordinates_before(dim, hidden, context_dim):
    torch.manual_seed(0)
    ordering = torch.randperm(dim).tolist()
    network = masked_network(dim, hidden, 3, ordering=ordering, context_dim=context_dim).double()
    x = torch.randn(dim + context_dim, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(network, x).reshape(3, dim, dim + context_dim)
    place = torch.empty(dim, dtype=torch.int64)
    place[ordering] = torch.arange(dim)
    before = place.unsqueeze(0) < place.unsqueeze(1)
    needed = jacobian[..., :dim] != 0
    assert not (needed & ~before).any()
    if 0 not in hidden and all(width >= dim for width in hidden):
        assert (needed.any(0) == before).all(), "an output does not see a coordinate that it may see"
        assert context_dim == 0 or (jacobian[..., dim:] != 0).any(0).all()


def test_hidden_units_stand_in_the_order_of_their_degrees():
    for layer in list(masked_network(5, [11, 3, 8], 2, ordering=[3, 1, 0, 2, 4]))[:-1:2]:
        assert list(layer.targets) == sorted(layer.targets)


@pytest.mark.parametrize("ordering", [[0, 1], [0, 1, 1], [1, 2, 3]], ids=str)
def test_bad_ordering(ordering):
    with pytest.raises(ValueError, match=r"each of the coordinates 0 to 2 once"):
        pf.affine_autoregressive(3, ordering=ordering)


# ------------------------------------------------------------------ the inverse


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 5, 33])
@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_the_walk_alone_is_exact(function, dim, hidden):
    """Without sweeps: with max_steps=0 the layer would raise."""
    for ordering, context_dim in ((None, 0), (torch.randperm(dim).tolist(), 2)):
        layer = built(function, dim, hidden, 0.3, ordering=ordering, context_dim=context_dim)
        layer.solver = Sweeps(max_steps=0)
        x = torch.randn(3, dim, dtype=torch.float64)
        with torch.no_grad():
            y, ladj = call_and_ladj(layer, x)
            back, inverse = inv_and_ladj(layer, y.clone())
        torch.testing.assert_close(layer(back), y, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inverse, -ladj, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.SiLU, nn.Softplus, Sine, lambda: nn.ELU(inplace=True)])
def test_any_activation(activation):
    layer = built(TanhBump(), 20, [24, 24], activation=activation).with_cache(0)
    y = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    assert masked_layers(layer.hypernet) is not None
    found, expected = layer.inv(y), layer._sweep_with_graph(y)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(y)
    found, expected = (torch.autograd.grad((x * weights).sum(), [y, *layer.parameters()]) for x in (found, expected))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", FACTORIES)
@pytest.mark.parametrize("dim", [5, 33])
def test_strong_weights(make, dim):
    """Float64 inverts to 1e-9; float32 reproduces y, relative to what the rounding of x amounts to."""
    torch.manual_seed(0)
    layer = make(dim, [32, 32])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2).add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(64, dim, dtype=torch.float64)
    precise = copy.deepcopy(layer).double()
    with torch.no_grad():
        y = precise(x)
        back, ladj = inv_and_ladj(precise, y.clone())
        torch.testing.assert_close(precise(back), y, rtol=1e-9, atol=1e-9)
        assert ladj.isfinite().all()
        y = layer(x.float())
        back = layer.inv(y.clone())
        image, slope = layer._push(back)
        error = (image - y).abs() / (1 + y.abs() + slope.exp() * (1 + back.abs()))
    assert error.max() < 1e-5


@pytest.mark.parametrize("dim", [1, 2, 19])
def test_one_row_leaves_the_parameters_alone(dim):
    layer = built(Affine(), dim, [8])
    before = copy.deepcopy(layer.state_dict())
    layer.inv(torch.randn(1, dim, dtype=torch.float64)).sum().backward()
    layer.inv(torch.randn(dim, dtype=torch.float64)).sum().backward()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_other_networks_are_inverted_by_sweeps(function):
    layer = built(function, 6, [12], ordering=[3, 0, 5, 1, 2, 4])
    swept = hidden_from(layer)
    y = torch.randn(4, 6, dtype=torch.float64)
    for a, b in zip(inv_and_ladj(layer, y), inv_and_ladj(swept, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_where_an_evaluation_in_parts_would_leave_something_out():
    layer = built(Affine(), 5, [8])
    network = layer.hypernet
    assert masked_layers(network) is not None
    assert masked_layers(Plain(network)) is None
    assert masked_layers(nn.Sequential(*network)) is not None
    assert masked_layers(masked_network(3, [8], 2, activation=lambda: nn.Softmax(-1))) is None
    handle = network[0].register_forward_hook(lambda *_: None)
    assert masked_layers(network) is None
    handle.remove()
    y = torch.randn(3, 5, dtype=torch.float64)
    nn.utils.prune.l1_unstructured(network[0], "weight", 0.5)
    torch.testing.assert_close(layer(layer.inv(y).clone()), y)
    nn.utils.parametrizations.weight_norm(network[2])
    torch.testing.assert_close(layer(layer.inv(y).clone()), y)


def test_rounding_is_polished_and_failure_is_reported(monkeypatch):
    layer = built(Affine(), 9, [16])
    module = __import__("sys").modules[pf.Autoregressive.__module__]

    def inaccurate(*args):
        return solve_by_coordinates(*args) + 1e-3

    monkeypatch.setattr(module, "solve_by_coordinates", inaccurate)
    y = torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(layer.inv(y).clone()), y, rtol=1e-9, atol=1e-9)
    layer.solver = Sweeps(max_steps=0)
    with pytest.raises(pf.ConvergenceError, match=r"Autoregressive: .* in 6 of 6 rows"):
        layer.inv(y + 1)


def test_a_network_that_is_not_autoregressive_is_noticed():
    torch.manual_seed(0)
    layer = scatter(pf.Autoregressive(Affine(), nn.Linear(4, 8)), 2.0)
    with pytest.raises(pf.ConvergenceError, match="after 4 steps"):
        layer.inv(torch.randn(9, 4))


def test_rows_that_are_not_finite():
    layer = built(Affine(), 5, [8])
    y = torch.randn(3, 5, dtype=torch.float64)
    alone = layer.inv(y.clone())
    y[1, 2] = torch.nan
    x = layer.inv(y)
    assert x[1].isnan().any()
    torch.testing.assert_close(x[[0, 2]], alone[[0, 2]])


class Scale(MonotoneFunction):
    """As a user would write it, with autograd inside."""

    num_parameters = 1

    def forward(self, x, raw):
        (log_scale,) = raw.unbind(-2)
        return x * log_scale.exp(), log_scale

    def inverse(self, y, raw):
        (log_scale,) = raw.unbind(-2)
        with torch.enable_grad():
            one = torch.ones_like(y, requires_grad=True)
            (slope,) = torch.autograd.grad((one * log_scale.exp()).sum(), one)
        return y / slope.detach(), log_scale


def test_a_function_of_ones_own_in_and_out_of_inference_mode():
    layer = built(Scale(), 5, [8])
    y = torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(layer.inv(y).clone()), y)


@pytest.mark.parametrize("make", FACTORIES)
def test_inference_mode(make):
    layer = scatter(make(4, [8]))
    with torch.inference_mode():
        y = torch.randn(3, 4)
        torch.testing.assert_close(layer(layer.inv(y).clone()), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("std", [0.1, 1.0, 10.0, 50.0])
@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_the_root_alone_is_that_of_the_inverse(function, std):
    torch.manual_seed(0)
    raw, y = std * torch.randn(5, function.num_parameters, 40).double(), 7 * torch.rand(5, 40).double() - 3.5
    y[0, :3] = torch.tensor([5.0, -5.0, 80.0])
    x, log_slope = function.inverse(y, raw)
    tolerance = 1e-12 * (1 + y.abs() + x.abs()) * (1 + (0 if log_slope is None else (-log_slope).exp()))
    assert ((function.root(y, raw) - x).abs() <= tolerance).all()
    torch.testing.assert_close(function.root(y, raw[:1]), function.inverse(y, raw[:1])[0])


# ------------------------------------------------------------------ its gradient


@pytest.mark.parametrize("dim", [1, 2, 5, 20])
@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_gradient_against_all_sweeps_with_a_graph(function, dim):
    layer = built(function, dim, [12, 12], ordering=torch.randperm(dim).tolist(), context_dim=2).with_cache(0)
    layer.context = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, dim, dtype=torch.float64, requires_grad=True)
    inputs = [y, layer.context, *layer.parameters()]
    weights = torch.randn(3, dim, dtype=torch.float64)

    def gradients(x, ladj):
        return torch.autograd.grad((weights * x).sum() + ladj.sin().sum(), inputs, materialize_grads=True)

    x = layer._sweep_with_graph(y)
    expected = gradients(x, -layer._push(x)[1].sum(-1))
    for which in (layer, hidden_from(layer)):
        if which is not layer:
            which.context = layer.context
            inputs[2:] = which.parameters()
        torch.testing.assert_close(gradients(*inv_and_ladj(which, y)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", FACTORIES)
def test_gradcheck_and_no_second_order(make):
    layer = scatter(make(3, [6], activation=nn.Tanh), 0.5).double().with_cache(0)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def run(y, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (y,))

    inverse = pf.Inverted(layer)
    names = [name for name, _ in inverse.named_parameters()]

    def inverted(y, *values):
        return torch.func.functional_call(inverse, dict(zip(names, values, strict=True)), (y,))

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(run, (y, *values))
    assert torch.autograd.gradcheck(inverted, (y, *values))
    (grad,) = torch.autograd.grad(layer.inv(y).sin().sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()


# ------------------------------------------------------------------ layers


@pytest.mark.parametrize("make", FACTORIES)
def test_starts_at_the_identity_and_is_triangular(make):
    layer = make(5, [16], ordering=[4, 2, 0, 1, 3]).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x)
    scatter(layer)
    jacobian = torch.autograd.functional.jacobian(layer, x[0])[[4, 2, 0, 1, 3]][:, [4, 2, 0, 1, 3]]
    assert torch.equal(jacobian, jacobian.tril())
    torch.testing.assert_close(call_and_ladj(layer, x[0])[1], jacobian.diagonal().log().sum())


def test_reversed_orders_let_every_coordinate_depend_on_all():
    layer = pf.Chain([pf.affine_autoregressive(4, [32], ordering=o) for o in (range(4), range(4)[::-1])]).double()
    jacobian = torch.autograd.functional.jacobian(scatter(layer), torch.randn(4, dtype=torch.float64))
    assert (jacobian != 0).all()


@pytest.mark.parametrize(
    "make", [pf.conditional_affine_autoregressive, pf.conditional_spline_autoregressive], ids=["affine", "spline"]
)
def test_contexts_one_by_one(make):
    conditional = scatter(make(5, 3, hidden_dims=[12]).double(), 0.5)
    context, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    x, ladj = inv_and_ladj(conditional.condition(context), y)
    for i, row in enumerate(context):
        torch.testing.assert_close(inv_and_ladj(conditional.condition(row), y[:, i]), (x[:, i], ladj[:, i]))
    assert not torch.allclose(x[:, 0], inv_and_ladj(conditional.condition(context[1]), y[:, 0])[0])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: pf.Autoregressive(Affine(), masked_network(4, [8], 3)), ValueError, r"masked_network\(4, .*, 2, "),
        (
            lambda: pf.Autoregressive(Affine(), masked_network(4, [8], 2), input_dim=5),
            ValueError,
            r"masked_network\(5, .* got one for 4 coordinates",
        ),
        (
            lambda: pf.Autoregressive(Affine(), masked_network(4, [8], 2, context_dim=1)),
            ValueError,
            "context_dim=0.*a context of 1",
        ),
        (
            lambda: pf.Autoregressive(Affine(), masked_network(4, [8], 2), context_dim=3),
            ValueError,
            "context_dim=3.*a context of 0",
        ),
        (
            lambda: pf.SplineAutoregressive(Plain(masked_network(4, [8], 22)))(torch.zeros(3, 4)),
            ValueError,
            r"23 parameters .*must return the shape \(3, 92\), but it returned \(3, 88\)",
        ),
        (lambda: pf.Autoregressive(Affine, masked_network(4, [8], 2)), TypeError, "function must be one of"),
        (lambda: pf.Autoregressive(Affine(), lambda x: x), TypeError, "hypernet must be a module"),
        (lambda: pf.Autoregressive(CircularSpline(), masked_network(2, [8], 25)), ValueError, "all real numbers"),
        (lambda: pf.Autoregressive(Affine(), masked_network(4, [8], 2), solver=3), TypeError, "solver must be"),
        (lambda: pf.spline_autoregressive(4, num_bins=1), ValueError, "num_bins"),
        (lambda: pf.spline_autoregressive(4, bound=0.0), ValueError, "bound"),
        (lambda: pf.affine_autoregressive(4, max_log_scale=-1.0), ValueError, "max_log_scale"),
        (lambda: pf.affine_autoregressive(4)(torch.zeros(2, 5)), ValueError, "4"),
    ],
)
def test_bad_input(make, error, text):
    with pytest.raises(error, match=text):
        make()
