"""Residual layers beyond the conformance suite: sizes, ill-conditioned bounds, bad rows, solvers, factories."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from cases import scatter
from torch import nn

import pyro_invflows as pf
from pyro_invflows.networks import LinearContraction, LipSwish, Sine
from pyro_invflows.solvers import Anderson, FixedPoint, Newton
from pyro_invflows.transforms.contractive_residual import _MEMORY

residual = sys.modules[pf.LowRankResidual.__module__]  # the factory of the same name hides the module

F64 = torch.float64
FORMS = ["bottleneck", "sandwich"]


def low_rank(dim, form="bottleneck", size=1.0, dtype=F64, **settings):
    torch.manual_seed(dim)
    return scatter(pf.low_rank_residual(dim, form=form, **settings), size).to(dtype)


def binding_linear(dim, lipschitz=0.97):
    """A near-linear g whose slopes fill [-c, c]: the fixed point has the worst rate that the bound allows."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(dim, dim, dtype=F64))[0]
    layer = LinearContraction(dim, dim, lipschitz).double()
    with torch.no_grad():
        layer.weight.copy_(q @ torch.diag(torch.linspace(-1, 1, dim, dtype=F64)) @ q.T)
    return layer


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [1, 2, 5, 33, 784])
def test_round_trip_at_every_size(dim, form, dtype):
    """Errors at the level of rounding: at most 1e-12 and 2e-6."""
    layer = low_rank(dim, form, dtype=dtype)
    x = torch.randn(16, dim, dtype=dtype)
    y = layer(x).detach().clone()
    fresh = copy.deepcopy(layer)
    assert (fresh.inv(y) - x).abs().max() <= (1e-12 if dtype == F64 else 2e-6)  # before any forward call
    with torch.no_grad():
        again = layer.inv(y.clone())
    assert not again.requires_grad
    torch.testing.assert_close(again, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [5.0, 20.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", [LipSwish, Sine, nn.Tanh])
def test_parameters_far_out(activation, form, scale):
    layer = low_rank(9, form, scale, activation=activation)
    x = 3 * torch.randn(200, 9, dtype=F64)
    y, ladj = pf.call_and_ladj(layer, x)
    back, inverse = pf.inv_and_ladj(layer, y.detach())
    torch.testing.assert_close(layer(back.detach()), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse, -ladj, rtol=0, atol=1e-9)
    slopes = torch.linalg.matrix_norm(torch.func.vmap(torch.func.jacrev(lambda x: layer._call(x) - x))(x), 2)
    assert slopes.max() <= 0.97


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lipschitz", [0.01, 0.97, 0.9999])
def test_the_bound_decides_how_much_the_inverse_stretches(lipschitz, form):
    layer = low_rank(5, form, 5.0, lipschitz=lipschitz)
    a, b = torch.randn(2, 300, 5, dtype=F64)
    stretch = (layer.inv(a) - layer.inv(b)).norm(dim=-1) / (a - b).norm(dim=-1)
    assert stretch.max() <= 1 / (1 - lipschitz)
    assert stretch.min() >= 1 / (1 + lipschitz)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_every_parameter_while_the_bound_binds(form):
    layer = low_rank(3, form, 3.0, hidden_dim=2, activation=Sine)
    y = torch.randn(3, 3, dtype=F64, requires_grad=True)
    parameters = list(layer.parameters())
    with torch.no_grad():
        product = 1.0
        for name in ("weight_in", "weight_mid", "weight_out"):
            if hasattr(layer, name):
                product *= torch.linalg.matrix_norm(getattr(layer, name), 2)
    assert product > 1, "the bound does not bind"

    def inverse(y, *values):
        return pf.inv_and_ladj(layer, y)

    assert torch.autograd.gradcheck(inverse, (y, *parameters))
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3, dtype=F64), 1.0), 1)
    d = torch.distributions.TransformedDistribution(base, [layer])
    assert torch.autograd.gradcheck(lambda y, *values: d.log_prob(y), (y, *parameters))


def test_forward_mode_of_the_inverse():
    layer = low_rank(4)
    y = torch.randn(4, dtype=F64)
    reverse = torch.func.jacrev(layer._inverse)(y)
    torch.testing.assert_close(torch.func.jacfwd(layer._inverse)(y), reverse)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(y, torch.ones_like(y))
        tangent = torch.autograd.forward_ad.unpack_dual(layer._inverse(dual)).tangent
    torch.testing.assert_close(tangent, reverse.sum(-1))


LAYERS = {
    "bottleneck": lambda: low_rank(6),
    "sandwich": lambda: low_rank(6, "sandwich"),
    "mlp": lambda: scatter(pf.contractive_residual(6, [8])).double(),
    "mlp, large event": lambda: scatter(pf.contractive_residual(40, [8])).double(),
    "image": lambda: scatter(pf.contractive_residual(2, [3], dim=-3)).double(),
}
EVENTS = {"mlp, large event": (40,), "image": (2, 3, 3)}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e300])
@pytest.mark.parametrize("name", LAYERS)
def test_one_bad_row_leaves_the_others_alone(name, bad):
    layer = LAYERS[name]()
    torch.manual_seed(0)
    y = torch.randn(20, *EVENTS.get(name, (6,)), dtype=F64)
    expected = layer.inv(y.clone())
    spoilt = y.clone()
    spoilt[7] = bad
    x = layer.inv(spoilt)
    rest = torch.arange(20) != 7
    torch.testing.assert_close(x[rest], expected[rest], rtol=0, atol=1e-11)
    if bad == 1e300:
        torch.testing.assert_close(layer(x[7].detach()), spoilt[7], rtol=1e-9, atol=0)
    else:
        assert x[7].isnan().any()


@pytest.mark.parametrize("form", FORMS)
def test_newton_and_the_fixed_point_stand_behind_the_cheap_steps(form, monkeypatch):
    """Each stage alone reaches the same point."""
    layer = low_rank(7, form, 5.0)
    y = torch.randn(50, 7, dtype=F64)
    expected = layer.inv(y)

    def nothing(equation, s, c, unit, gather, limit):
        return s.clone(), torch.zeros(s.shape[:-1], dtype=torch.bool), None

    monkeypatch.setattr(residual, "chord_steps", nothing)
    torch.testing.assert_close(layer.inv(y.clone()), expected, rtol=0, atol=1e-12)
    # without a Newton step, only the fixed point
    monkeypatch.setattr(Newton, "default_max_steps", 0)
    torch.testing.assert_close(layer.inv(y.clone()), expected, rtol=0, atol=1e-9)


def test_batches_of_any_shape_take_the_same_path():
    layer = low_rank(6, "sandwich", 3.0)
    y = torch.randn(4, 5, 6, dtype=F64)
    together = layer.inv(y.clone())
    flat = layer.inv(y.reshape(20, 6)).reshape(4, 5, 6)
    torch.testing.assert_close(together, flat, rtol=0, atol=1e-13)
    assert layer.inv(y[0, 0].clone()).shape == (6,)
    assert layer.inv(y[:0]).shape == (0, 5, 6)


# ---------------------------------------------------------------------- any contraction


@pytest.mark.parametrize("dim", [1, 2, 5, 33, 784])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_contractive_residual_at_every_size(dim, dtype):
    torch.manual_seed(0)
    layer = scatter(pf.contractive_residual(dim, [16])).to(dtype)
    x = torch.randn(5, dim, dtype=dtype)
    y = layer(x).detach().clone()
    error = (copy.deepcopy(layer).inv(y) - x).abs().max()
    assert error <= (1e-9 if dtype == F64 else 1e-3)  # the residual in y is 2e-12 and 6e-6, times 1 / (1 - c)
    assert (layer(layer.inv(y).detach()) - y).abs().max() <= (1e-11 if dtype == F64 else 1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 5), (3, 8, 8)])
def test_images(shape):
    torch.manual_seed(0)
    layer = scatter(pf.contractive_residual(shape[0], [6], dim=-3)).double()
    x = torch.randn(2, 3, *shape, dtype=F64)
    y = layer(x).detach().clone()
    assert y.shape == x.shape
    assert (layer.inv(y) - x).abs().max() <= 1e-9


@pytest.mark.parametrize("dim", [4, 64])
def test_near_linear_contractions_take_few_evaluations(dim, monkeypatch):
    """If the bound is attained, the fixed point takes hundreds of evaluations; the default solver at most a fifth."""
    g = binding_linear(dim)
    layer = pf.ContractiveResidual(g)
    y = torch.randn(20, dim, dtype=F64)
    expected = torch.linalg.solve(torch.eye(dim) + g.contracted(), (y - g.bias).T).T
    counts = {}
    for name, solver in [
        ("default", Anderson(memory=_MEMORY, atol=1e-6, rtol=0.0)),
        ("picard", FixedPoint(atol=1e-6, rtol=0.0, max_steps=1000)),
    ]:
        calls = []
        handle = g.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            x = pf.ContractiveResidual(g, solver=solver).inv(y.clone())
        handle.remove()
        counts[name] = len(calls)
        assert (x - expected).abs().max() <= 3 * 1e-6 / 0.03  # the largest norm against the Euclidean one
    assert counts["picard"] >= 5 * counts["default"], counts
    torch.testing.assert_close(layer.inv(y), expected, rtol=0, atol=1e-9)


def test_a_solver_of_ones_own_may_fail_and_says_so():
    layer = pf.ContractiveResidual(binding_linear(50), solver=FixedPoint(max_steps=3))
    with pytest.raises(pf.ConvergenceError, match="ContractiveResidual"):
        layer.inv(torch.randn(3, 50, dtype=F64))
    layer = low_rank(5, solver=Newton(max_steps=0))
    with pytest.raises(pf.ConvergenceError, match="LowRankResidual"):
        layer.inv(torch.randn(3, 5, dtype=F64))


def test_gradients_of_the_iterative_inverse():
    """Beyond 32 elements the backward pass solves iteratively; against the dense gradient."""
    torch.manual_seed(0)
    layer = scatter(pf.contractive_residual(40, [8])).double()
    y = torch.randn(3, 40, dtype=F64, requires_grad=True)
    inputs = [y, *layer.parameters()]
    weights = torch.randn(3, 40, dtype=F64)
    got = torch.autograd.grad((layer.inv(y) * weights).sum(), inputs)
    x = layer.inv(y).detach()
    jacobian = torch.func.vmap(torch.func.jacrev(layer._call))(x)
    v = torch.linalg.solve(jacobian.mT, weights.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got[0], v)
    expected = torch.autograd.grad((layer(x) * -v.detach()).sum(), inputs[1:])
    for a, b in zip(got[1:], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_one_bad_row_in_the_backward_pass():
    torch.manual_seed(0)
    layer = scatter(pf.contractive_residual(40, [8])).double()
    y = torch.randn(6, 40, dtype=F64)
    y[2] = torch.nan
    y.requires_grad_()
    rest = torch.arange(6) != 2
    (got,) = torch.autograd.grad(layer.inv(y)[rest].sum(), y)
    alone = y[rest].detach().requires_grad_()
    (expected,) = torch.autograd.grad(layer.inv(alone).sum(), alone)
    torch.testing.assert_close(got[rest], expected)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("size", [1e4, 1e8])
def test_the_inverse_where_x_is_far_from_y(size, dtype):
    """A large bias makes g and its rounding error large: this must cause neither failures nor thousands of steps."""
    for form in FORMS:
        layer = low_rank(9, form, dtype=dtype, lipschitz=0.999)
        with torch.no_grad():
            layer.bias_out.normal_().mul_(size)
        y = torch.randn(20, 9, dtype=dtype)
        residual = layer(layer.inv(y).detach()) - y
        assert residual.abs().max() <= 1e3 * size * torch.finfo(dtype).eps
    for dim in (9, 40):
        general = scatter(pf.contractive_residual(dim, [16])).to(dtype)
        with torch.no_grad():
            general.net.layers[-1].bias.normal_().mul_(size)
        y = torch.randn(20, dim, dtype=dtype)
        residual = general(general.inv(y).detach()) - y
        assert residual.abs().max() <= 1e4 * size * torch.finfo(dtype).eps ** 0.75


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_fixed_point_behind_them_meets_the_tolerance_of_y(scale, form, monkeypatch):
    layer = low_rank(7, form, 3.0)
    with torch.no_grad():
        layer.weight_in.mul_(scale)
    y = torch.randn(20, 7, dtype=F64)
    monkeypatch.setattr(
        residual, "chord_steps", lambda e, s, c, u, gather, limit: (s.clone(), torch.zeros(20, dtype=torch.bool), None)
    )
    monkeypatch.setattr(Newton, "default_max_steps", 0)
    assert (layer(layer.inv(y).detach()) - y).abs().max() <= 1e-11


def test_one_set_of_norms_for_a_whole_inverse(monkeypatch):
    """The solver's loop must not decompose the weights at every step."""
    layer = scatter(pf.contractive_residual(40, [8])).double()
    calls = []
    original = type(layer.net).contracted
    monkeypatch.setattr(type(layer.net), "contracted", lambda self: calls.append(1) or original(self))
    y = torch.randn(3, 40, dtype=F64)
    x, ladj = pf.inv_and_ladj(layer, y)
    (x.sum() + ladj.sum()).backward()
    assert len(calls) == 1


def test_an_estimator_free_chain_and_its_inverse_cost_the_same_layers():
    torch.manual_seed(0)
    flow = pf.iresnet(6, num_blocks=3)
    assert [type(part).__name__ for part in flow] == ["LowRankResidual", "Diagonal"] * 2 + ["LowRankResidual"]
    assert isinstance(pf.iresnet(6, recompute=True), pf.Chain)
    x = torch.randn(4, 6)
    assert torch.equal(flow(x), x)  # starts at the identity, exactly
    # an implicit flow: residual and inverted residual layers alternate
    implicit = pf.Chain([low_rank(6), pf.Inverted(low_rank(6, "sandwich"))])
    x = x.double()
    torch.testing.assert_close(implicit.inv(implicit(x).detach().clone()), x)


def test_recomputed_blocks_give_the_plain_gradients():
    def gradients(recompute):
        torch.manual_seed(4)
        chain = scatter(pf.iresnet(5, num_blocks=4, recompute=recompute)).double()
        x = torch.randn(7, 5, dtype=F64)
        y, ladj = pf.call_and_ladj(chain, x)
        (y.square().sum() - ladj.sum()).backward()
        return [p.grad for p in chain.parameters()]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_one_certificate_serves_every_context(form):
    torch.manual_seed(0)
    conditional = scatter(pf.conditional_low_rank_residual(4, 3, hidden_dim=3, form=form)).double()
    layer = conditional.condition(100 * torch.randn(6, 3, dtype=F64))
    for name, tensor in layer.named_buffers():
        assert (tensor.dim() > 1) == name.startswith("bias"), name  # only biases are batched
    x = torch.randn(6, 4, dtype=F64)
    slopes = torch.stack([torch.func.jacrev(lambda v, i=i: (layer._call(v) - v)[i])(x[i]) for i in range(6)])
    assert torch.linalg.matrix_norm(slopes, 2).max() <= 0.97


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def test_bad_input():
    with pytest.raises(ValueError, match="form must be one of"):
        pf.low_rank_residual(3, form="wide")
    with pytest.raises(ValueError, match="hidden_dim"):
        pf.low_rank_residual(3, 0)
    with pytest.raises(TypeError, match=r"solvers\.Newton"):
        pf.low_rank_residual(3, solver=Anderson())
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        pf.low_rank_residual(3, order=3)
    with pytest.raises(ValueError, match=r"'1' \(Doubling\) is not a known contraction"):
        pf.ContractiveResidual(nn.Sequential(LinearContraction(2, 2), Doubling()))
    with pytest.raises(ValueError, match=r"'0' \(Linear\) is not a known contraction"):
        pf.ContractiveResidual(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="must be below 1, but it is 1"):
        pf.ContractiveResidual(nn.Sequential(nn.Tanh()))
    with pytest.raises(TypeError, match="net must be a module"):
        pf.ContractiveResidual(torch.tanh)
    with pytest.raises(TypeError, match=r"solvers\.Newton"):
        pf.contractive_residual(2, solver="newton")
    with pytest.raises(ValueError, match="dim must be -1"):
        pf.contractive_residual(2, dim=-2)
    with pytest.raises(ValueError, match="without a context"):
        pf.contractive_residual(2, dim=-3, context_dim=1)
    with pytest.raises(ValueError, match="num_blocks"):
        pf.iresnet(2, num_blocks=0)
    with pytest.raises(ValueError, match="order=2 is for events"):
        pf.contractive_residual(40, order=2)
    with pytest.raises(ValueError, match="order=2 is for events"):
        pf.ContractiveResidual(pf.networks.ContractiveMLP(40), order=2).inv(torch.zeros(1, 40))
    with pytest.raises(ValueError, match="must return the shape of its input"):
        pf.ContractiveResidual(LinearContraction(3, 1))(torch.zeros(4, 3))
    for make in (
        lambda: pf.contractive_residual(3, [0]),
        lambda: pf.networks.ContractiveMLP(0),
        lambda: LinearContraction(0, 3),
        lambda: pf.networks.Conv2dContraction(3, 0),
    ):
        with pytest.raises(ValueError, match="at least 1"):
            make()

    class WithContext(Doubling):
        lipschitz, context_dim = 0.5, 2

    with pytest.raises(ValueError, match="is for vectors"):
        pf.ContractiveResidual(WithContext(), dim=-3)


@pytest.mark.parametrize("dim", [-1, -3])
def test_a_backward_pass_inside_autocast(dim):
    """Its iterative solve must meet its tolerance, too."""
    layer = pf.contractive_residual(*((40,) if dim == -1 else (2, [4])), dim=dim)
    scatter(layer, 0.3)
    y = torch.randn(4, *((40,) if dim == -1 else (2, 4, 5)))
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            x = layer.inv(y.clone())
            grads.append(torch.autograd.grad(x.square().sum(), list(layer.parameters())))
    # autocast may round the part of the graph that leads to the parameters
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("make", [pf.planar, pf.low_rank_residual, pf.contractive_residual])
def test_half_precision_layers_may_be_under_autocast(make):
    """Their own parameters are in half precision, which autocast does not change."""
    layer = make(4).bfloat16()
    y = torch.randn(3, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.inv(y).isfinite().all()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dim", "hidden_dim"), [(1, 3), (3, 7), (4, 5), (5, 5), (5, 4), (9, 40)])
def test_more_hidden_dimensions_than_elements_or_fewer(dim, hidden_dim, form, order):
    """The determinant and the root are taken in the smaller number of dimensions: both against autodiff."""
    layer = low_rank(dim, form, 2.0, hidden_dim=hidden_dim, order=order)
    x = torch.randn(6, dim, dtype=F64)
    y, ladj = pf.call_and_ladj(layer, x)
    jacobians = torch.stack([torch.autograd.functional.jacobian(layer._call, row) for row in x])
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobians)[1], rtol=0, atol=1e-12)
    y = y.detach().requires_grad_()
    back, inverse = pf.inv_and_ladj(layer, y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse, -ladj, rtol=0, atol=1e-11)
    weight = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(back, y, weight)
    expected = torch.linalg.solve(jacobians.mT, weight.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(pf.inv_and_ladj(layer, y.detach().clone()), (back, inverse), rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dim", "hidden_dim"), [(2, 4), (3, 2)])
def test_second_order_where_the_hidden_dimensions_are_more_or_fewer(dim, hidden_dim, form):
    layer = low_rank(dim, form, hidden_dim=hidden_dim, order=2)
    y = torch.randn(2, dim, dtype=F64, requires_grad=True)
    for direction in (pf.call_and_ladj, pf.inv_and_ladj):

        def run(y, *_, direction=direction):
            return direction(layer, y)

        parameters = [layer.weight_in, layer.weight_out]
        assert torch.autograd.gradcheck(run, (y, *parameters))
        assert torch.autograd.gradgradcheck(run, (y, *parameters))
