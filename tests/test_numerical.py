"""One-way transforms, Pyro's included, with a true inverse."""

from __future__ import annotations

import copy
import pickle
import re

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from cases import scatter
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import transforms as torch_transforms

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj
from pyro_invflows.solvers import Anderson, Bisection, FixedPoint, Newton
from pyro_invflows.support.errors import ConvergenceError

# small networks, so that every parameter can be checked
ONE_WAY = {
    "planar": lambda: pyro_transforms.planar(3),
    "radial": lambda: pyro_transforms.radial(3),
    "block_autoregressive": lambda: pyro_transforms.block_autoregressive(3, hidden_factors=[2, 2]),
    "block_autoregressive_residual": lambda: pyro_transforms.block_autoregressive(3, residual="normal"),
    "neural_autoregressive": lambda: pyro_transforms.neural_autoregressive(3, hidden_dims=[4], width=3),
    "polynomial": lambda: pyro_transforms.polynomial(3, hidden_dims=[4]),
}


@pytest.fixture(params=ONE_WAY)
def layer(request):
    inner = scatter(ONE_WAY[request.param]().double(), 0.2)
    if hasattr(inner, "powers"):  # Pyro builds these in the default dtype
        inner.c.data = inner.c.data.double()
    return pf.NumericalInverse(inner)


def base():
    return dist.Normal(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)).to_event(1)


def test_pyro_scores_fresh_data_with_gradients(layer):
    x = torch.randn(7, 3, dtype=torch.float64)
    y, ladj = call_and_ladj(layer, x)
    fresh = y.detach().clone()
    back, inverse = inv_and_ladj(layer, fresh)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse, -ladj, rtol=1e-9, atol=1e-9)
    for cache_size in (0, 1):
        d = dist.TransformedDistribution(base(), [layer.with_cache(cache_size)])
        expected = base().log_prob(x) - ladj
        for data in (fresh, fresh.clone(), fresh[:3]):
            torch.testing.assert_close(d.log_prob(data), expected[: len(data)], rtol=1e-8, atol=1e-8)
    d.log_prob(fresh).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert any(p.grad.abs().max() > 0 for p in layer.parameters())


def test_gradcheck_to_data_and_parameters(layer):
    d = dist.TransformedDistribution(base(), [layer.with_cache(0)])
    y = layer(torch.randn(2, 3, dtype=torch.float64)).detach().requires_grad_()
    parameters = tuple(layer.parameters())
    assert gradcheck(lambda v, *_: layer.with_cache(0).inv(v), (y, *parameters), fast_mode=True, atol=1e-4)
    assert gradcheck(lambda v, *_: d.log_prob(v), (y, *parameters), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ONE_WAY)
def test_right_or_refused_at_every_scale(name, dtype, scale):
    inner = scatter(ONE_WAY[name]().to(dtype), 0.2)
    if hasattr(inner, "powers"):
        inner.c.data = inner.c.data.to(dtype)
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.mul_(scale)
    layer = pf.NumericalInverse(inner, cache_size=0)
    y = layer(torch.randn(40, 3, dtype=dtype)).detach()
    back = pf.NumericalInverse(inner, solver=Newton(on_failure="nan"), cache_size=0).inv(y)
    solved = ~back.isnan().any(-1)
    if solved.all():
        assert torch.equal(layer.inv(y), back)
    else:
        said = rf"NumericalInverse\(\w+\): .* in {int((~solved).sum())} of 40 rows .* steps; worst residual .* [A-Z]"
        with pytest.raises(ConvergenceError, match=said):
            layer.inv(y)
    if dtype == torch.float64:
        assert solved.all()
    # a wrong x is never returned: every returned row meets the tolerance in y
    tolerance = torch.finfo(dtype).eps ** 0.75 * (1 + y.abs().amax(-1))
    assert ((layer(back) - y).abs().amax(-1) <= tolerance)[solved].all()


def test_copies_after_use(layer):
    size = len(pickle.dumps(layer))
    d = dist.TransformedDistribution(base(), [layer])
    y = d.rsample((5,))
    d.log_prob(y.detach().clone()).sum().backward()
    layer.zero_grad(set_to_none=True)
    other = copy.deepcopy(layer)
    assert len(pickle.dumps(layer)) <= size + 200
    torch.testing.assert_close(other.inv(y.detach()), layer.inv(y.detach()))


def test_no_foreign_cache_answers():
    inner = pyro_transforms.planar(3).double()
    layer = pf.NumericalInverse(inner)
    x = torch.randn(4, 3, dtype=torch.float64)
    first = layer(x)
    with torch.no_grad():
        inner.u.add_(1.0)
    assert not torch.allclose(layer(x), first)
    assert layer(x).requires_grad


def test_leading_dimensions_and_empty_batches(layer):
    for batch in ((), (2, 3), (0,)):
        if batch == (0,) and isinstance(
            layer.transform.transform, (pyro_transforms.Polynomial, pyro_transforms.BlockAutoregressive)
        ):
            continue  # their own view(..., -1) does not take empty batches
        x = torch.randn(*batch, 3, dtype=torch.float64)
        y, ladj = call_and_ladj(layer, x)
        back, _ = inv_and_ladj(layer, y.detach())
        assert ladj.shape == batch
        torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)


def test_bad_rows_leave_the_others_alone():
    layer = pf.NumericalInverse(scatter(pyro_transforms.planar(3).double()), solver=Newton(on_failure="nan"))
    y = torch.randn(6, 3, dtype=torch.float64)
    expected = layer.inv(y)
    y = y.clone()
    y[1], y[4] = torch.nan, 1e12
    good = [0, 2, 3, 5]
    torch.testing.assert_close(layer.inv(y)[good], expected[good])
    assert layer.inv(y)[1].isnan().all()


@pytest.mark.parametrize("name", ["polynomial", "block_autoregressive_residual", "elementwise"])
def test_bad_rows_leave_the_others_alone_in_every_structure(name):
    inner = torch_transforms.SigmoidTransform() if name == "elementwise" else scatter(ONE_WAY[name]().double(), 0.2)
    if hasattr(inner, "powers"):
        inner.c.data = inner.c.data.double()
    solver = (Bisection if name == "elementwise" else Newton)(on_failure="nan")
    layer = pf.NumericalInverse(inner, solver=solver, cache_size=0)
    y = layer(torch.randn(6, 3, dtype=torch.float64)).detach()
    expected, alone = layer.inv(y), layer._solve(y)
    bad = torch.cat([y[:1], torch.full((1, 3), torch.nan).double(), y[1:4], torch.full((1, 3), 1e12).double(), y[4:]])
    good = [0, 2, 3, 4, 6, 7]
    among = layer._solve(bad)
    torch.testing.assert_close(layer.inv(bad)[good], expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(among.num_steps[good], alone.num_steps)
    assert layer.inv(bad)[1].isnan().all()


def test_triangular_falls_back_on_coordinates():
    inner = scatter(pyro_transforms.polynomial(3, hidden_dims=[4]).double(), 0.5)
    layer = pf.NumericalInverse(inner, solver=Newton(max_steps=2))
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ConvergenceError):
        pf.NumericalInverse(inner, structure="dense", solver=Newton(max_steps=2)).inv(layer(x).detach())
    layer = pf.NumericalInverse(inner, solver=Newton(max_steps=6, max_halvings=0))
    y = layer(x).detach()
    torch.testing.assert_close(layer(layer.inv(y.clone())), y, rtol=1e-9, atol=1e-9)


def test_a_y_outside_the_range_raises():
    layer = pf.NumericalInverse(torch_transforms.TanhTransform())
    with pytest.raises(ConvergenceError, match=re.compile("NumericalInverse.*outside the range", re.DOTALL)):
        layer.inv(torch.tensor([0.5, 2.0], dtype=torch.float64))
    inner = pyro_transforms.block_autoregressive(2).double()  # bounded without a residual
    with pytest.raises(ConvergenceError, match="rows"):
        pf.NumericalInverse(inner).inv(torch.full((3, 2), 1e3, dtype=torch.float64))


def test_elementwise_and_composed():
    x = torch.randn(5, 3, dtype=torch.float64)
    for inner, structure in (
        (torch_transforms.SigmoidTransform(), None),
        (torch_transforms.AffineTransform(1.0, -2.0), None),
        (pf.Baird((3,)).double(), None),
        (torch_transforms.IndependentTransform(torch_transforms.TanhTransform(), 1), "elementwise"),
        (
            torch_transforms.ComposeTransform([pyro_transforms.planar(3).double(), torch_transforms.ExpTransform()]),
            None,
        ),
    ):
        layer = pf.NumericalInverse(inner, structure=structure)
        y, ladj = call_and_ladj(layer, x)
        back, inverse = inv_and_ladj(layer, y.detach().clone())
        torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(inverse, -ladj, rtol=1e-8, atol=1e-8)


def test_parameters_of_wrapped_foreign_modules_are_found():
    compose = torch_transforms.ComposeTransform([pyro_transforms.planar(3), torch_transforms.ExpTransform()])
    layer = pf.NumericalInverse(compose).double()
    assert len(list(layer.parameters())) == 3
    assert layer(torch.randn(3, dtype=torch.float64)).dtype == torch.float64


def test_second_order():
    inner = scatter(pyro_transforms.planar(2).double())
    y = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    right = pf.NumericalInverse(inner, order=2).with_cache(0)
    assert gradgradcheck(lambda v, *_: inv_and_ladj(right, v), (y, *inner.parameters()))
    refused = pf.NumericalInverse(inner)
    (grad,) = torch.autograd.grad(refused.inv(y).sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), y)


@pytest.mark.parametrize("solver", [Newton(), Anderson(), FixedPoint()], ids=lambda s: type(s).__name__)
def test_solvers(solver):
    inner = pyro_transforms.radial(3).double()
    with torch.no_grad():
        inner.beta_prime.zero_()
    x = torch.randn(5, 3, dtype=torch.float64)
    layer = pf.NumericalInverse(inner, solver=solver)
    torch.testing.assert_close(layer.inv(layer(x).detach().clone()), x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.NumericalInverse(pf.Sylvester(3)),
        lambda: pf.NumericalInverse(pf.Baird(), solver=Bisection()),
        lambda: pf.NumericalInverse(pyro_transforms.block_autoregressive(3)),
        lambda: pf.NumericalInverse(pyro_transforms.polynomial(3)),
    ],
)
def test_the_inverse_compiles_as_one_graph(make):
    torch.manual_seed(0)
    layer = make().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    y = layer(x).detach().requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(lambda y: layer.inv(y), backend="eager", fullgraph=True)
    parameters = [y, *layer.parameters()]
    results = []
    for back in (compiled(y), layer.inv(y)):
        torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
        results.append(torch.autograd.grad(back.sin().sum(), parameters, materialize_grads=True))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: pf.NumericalInverse(lambda x: x), TypeError, "expected a transform"),
        (lambda: pf.NumericalInverse(pyro_transforms.conditional_planar(3, 2)), TypeError, "Condition it first"),
        (lambda: pf.NumericalInverse(torch_transforms.AbsTransform()), ValueError, "one-to-one"),
        (lambda: pf.NumericalInverse(torch_transforms.SoftmaxTransform()), ValueError, "one-to-one"),
        (lambda: pf.NumericalInverse(pyro_transforms.Sylvester(3)), ValueError, "log-det"),
        (lambda: pf.NumericalInverse(pyro_transforms.planar(3), structure="banded"), ValueError, "structure"),
        (lambda: pf.NumericalInverse(torch_transforms.TanhTransform(), structure="dense"), ValueError, "dense"),
        (lambda: pf.NumericalInverse(torch_transforms.CorrCholeskyTransform()), ValueError, "dimensions"),
        (lambda: pf.NumericalInverse(torch_transforms.ExpTransform().inv), ValueError, "domain"),
        (lambda: pf.NumericalInverse(pyro_transforms.planar(3), order=3), ValueError, "order"),
        (lambda: pf.NumericalInverse(pyro_transforms.planar(3), ordering=[0, 2]), ValueError, "permutation"),
        (lambda: pf.NumericalInverse(pyro_transforms.planar(3), solver=Bisection()), TypeError, "dense"),
        (lambda: pf.NumericalInverse(torch_transforms.TanhTransform(), solver=Newton()), TypeError, "Bisection"),
        (lambda: pf.NumericalInverse(pyro_transforms.planar(3))(torch.randn(2, 4)), ValueError, "3"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()
