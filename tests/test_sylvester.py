"""Planar, radial and Sylvester layers: inverses at every scale, and densities that integrate to one."""

from __future__ import annotations

import itertools
import math
import pickle
import sys
from fractions import Fraction

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import scatter
from pyro.infer import SVI, Trace_ELBO
from torch.autograd import gradcheck, gradgradcheck

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj
from pyro_invflows.core.rebind import rebind
from pyro_invflows.networks import masked_network
from pyro_invflows.solvers import Newton, Settings, Sweeps, solve_triangular_tanh
from pyro_invflows.support.errors import ConvergenceError
from pyro_invflows.testing import (
    check_batch,
    check_bijection,
    check_copies,
    check_fresh_data,
    check_log_det,
    check_round_trip,
    check_shapes,
    jacobian_log_det,
)

autoregressive_module = sys.modules[pf.Autoregressive.__module__]

MAKERS = {
    "planar": pf.planar,
    "radial": pf.radial,
    "sylvester": pf.sylvester,
    "sylvester_one": lambda d: pf.sylvester(d, 1),
    "sylvester_many_reflections": lambda d: pf.sylvester(d, (d + 1) // 2, num_reflections=d + 3),
    "generalized_sylvester": lambda d: pf.generalized_sylvester(d, [8]),
}
ALL = [pytest.param(make, id=name) for name, make in MAKERS.items()]


def scaled(layer, scale, dtype=torch.float64):
    """Add U(-1, 1) to the initial parameters, then multiply all by ``scale``."""
    layer = scatter(layer.to(dtype))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(scale)
    return layer.with_cache(0)


def spread(layer, off=0.5, seed=0):
    """T_ii over (-0.95, 3), off-diagonals of R1 and R2 at off / sqrt(m)."""
    m, g = layer.hidden_dim, torch.Generator().manual_seed(seed)
    d = torch.linspace(0.05, 4, m, dtype=torch.float64)[torch.randperm(m, generator=g)]
    second = 0.5 + torch.rand(m, dtype=torch.float64, generator=g)
    upper = [(torch.randn(m, m, dtype=torch.float64, generator=g) * off / m**0.5).triu(1) for _ in range(2)]
    layer.set_triangles(upper[0] + torch.diag((d - 1) / second), upper[1] + torch.diag(second))
    torch.nn.init.normal_(layer.bias)
    return layer


def reachable(layer, y):
    """Residual in y, row by row, that the rounding of an exact x to the dtype already makes: x is ill-conditioned."""
    out, into, *_ = layer._matrices()
    out, into = (torch.linalg.matrix_norm(matrix, 2).unsqueeze(-1) for matrix in (out, into))
    rounding = torch.finfo(y.dtype).eps * (
        1 + y.norm(dim=-1, keepdim=True) + out * out.new_tensor(layer.hidden_dim).sqrt()
    )
    return 4 * rounding * (1 + out * into)


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("dim", [1, 2, 5, 16])
@pytest.mark.parametrize("make", ALL)
def test_inverse_and_log_det_at_every_scale(make, dim, scale):
    layer = scaled(make(dim), scale)
    x = torch.randn(32, dim, dtype=torch.float64)
    y, ladj = call_and_ladj(layer, x)
    back, inverse = inv_and_ladj(layer, y.detach().clone())
    # At 5x and 20x x is ill-conditioned: what must hold there is the equation, in y.
    torch.testing.assert_close(layer(back), y, rtol=1e-8, atol=1e-9 * (1 + x.abs().max().item()))
    if scale == 1:
        torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(inverse, -ladj, rtol=1e-8, atol=1e-8)
    if dim < 16:
        expected = jacobian_log_det(layer._call, x[:3], 1)
        conditioning = 1e-9 if scale == 1 or not isinstance(layer, pf.GeneralizedSylvester) else 1e-2
        torch.testing.assert_close(ladj[:3], expected, rtol=conditioning, atol=conditioning)


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("make", ALL)
def test_conformance_at_every_scale(make, dim, scale):
    layer, x = scaled(make(dim), scale), torch.randn(4, dim, dtype=torch.float64)
    if scale == 20 and dim == 5 and isinstance(layer, pf.Sylvester):
        # Steps of 1e-6 are not small here, so finite differences are inaccurate; the next test needs none.
        for check in (check_shapes, check_round_trip, check_log_det, check_copies, check_fresh_data, check_batch):
            check(layer, x)
    else:
        check_bijection(layer, x)


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("make", ALL)
def test_the_jacobian_of_the_inverse_is_the_inverse_jacobian(make, scale):
    layer = scaled(make(4), scale)
    for x in torch.randn(5, 4, dtype=torch.float64):
        y = layer(x).detach()
        back = layer.inv(y).detach()
        forward = torch.autograd.functional.jacobian(layer, back)
        inverse = torch.autograd.functional.jacobian(layer.inv, y)
        rounding = 1e-12 * forward.norm() * inverse.norm()
        torch.testing.assert_close(forward @ inverse, torch.eye(4, dtype=torch.float64), rtol=0, atol=rounding.item())


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("make", ALL)
def test_float32_at_every_scale(make, scale):
    layer = scaled(make(5), scale, torch.float32)
    x = torch.randn(64, 5)
    y, ladj = call_and_ladj(layer, x)
    back, inverse = inv_and_ladj(layer, y.detach().clone())
    assert back.isfinite().all()
    assert ladj.isfinite().all()
    assert inverse.isfinite().all()
    # the residual in y, relative to what the rounding of x and of the hidden units can do to y
    size = 1 + x.abs().amax() + y.abs().amax() + sum(p.abs().sum() for p in layer.parameters()) ** 2
    assert ((layer(back) - y).abs() <= 1e-4 * size).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_sylvester_with_spread_diagonal(dtype, tolerance):
    layer = spread(pf.Sylvester(64, 16, cache_size=0).to(dtype))
    x = torch.randn(1024, 64, dtype=dtype)
    assert (layer.inv(layer(x).detach()) - x).abs().max() <= tolerance


@pytest.mark.parametrize("off", [0.5, 2.0, 10.0])
@pytest.mark.parametrize(("dim", "hidden"), [(64, 16), (64, 1), (16, 16)])
def test_sylvester_every_row_converges_in_y(dim, hidden, off):
    layer = spread(pf.Sylvester(dim, hidden, cache_size=0).double(), off)
    x = torch.randn(256, dim, dtype=torch.float64)
    y = layer(x).detach()
    torch.testing.assert_close(layer(layer.inv(y)), y, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("off", [2.0, 20 * 0.5])
def test_sylvester_at_the_stated_sizes_converges_in_y(off, dtype):
    layer = spread(pf.Sylvester(64, 16, cache_size=0).to(dtype), off)
    if off == 10:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(20)
    y = layer(torch.randn(1024, 64, dtype=dtype)).detach()
    back, ladj = inv_and_ladj(layer, y)  # no row raises
    assert ((layer(back) - y).abs() <= reachable(layer, y)).all()
    assert ladj.isfinite().all()


def test_sylvester_newton_counts():
    layer = spread(pf.Sylvester(64, 16).double())
    y = layer(torch.randn(1024, 64, dtype=torch.float64)).detach()
    _, into, first, second, d = layer._matrices()
    c, strict = (y @ into + layer.bias).detach(), (second @ first).triu(1).detach()
    solution = solve_triangular_tanh(c, strict, d.detach(), cheap_steps=0)
    assert (solution.num_steps <= 8).double().mean() >= 0.95
    assert solution.converged.all()


@pytest.mark.parametrize("hidden", [1, 3, 6])
def test_sylvester_amortised_by_row(hidden):
    conditional = pf.conditional_sylvester(6, 2, context_hidden_dims=[8], hidden_dim=hidden).double()
    scatter(conditional, 0.5)
    context = torch.randn(20, 2, dtype=torch.float64)
    layer = conditional.condition(context).with_cache(0)
    x = torch.randn(3, 20, 6, dtype=torch.float64)
    y, ladj = call_and_ladj(layer, x)
    back, inverse = inv_and_ladj(layer, y.detach())
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse, -ladj, rtol=1e-9, atol=1e-9)
    for i in (0, 7):
        alone = conditional.condition(context[i])
        torch.testing.assert_close(y[:, i], alone(x[:, i]))
        torch.testing.assert_close(back[:, i], alone.inv(y[:, i].detach()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [5.0, 20.0])
@pytest.mark.parametrize("hidden", [1, 3, 6])
def test_sylvester_amortised_by_row_at_every_scale(hidden, scale):
    conditional = pf.conditional_sylvester(6, 2, context_hidden_dims=[8], hidden_dim=hidden).double()
    scatter(conditional, scale)
    layer = conditional.condition(torch.randn(20, 2, dtype=torch.float64)).with_cache(0)
    assert layer.weight.shape == (20, hidden, hidden)
    y = layer(torch.randn(3, 20, 6, dtype=torch.float64)).detach()
    back, inverse = inv_and_ladj(layer, y)
    assert ((layer(back) - y).abs() <= reachable(layer, y)).all()
    assert inverse.isfinite().all()


def test_set_triangles():
    layer = pf.Sylvester(6, 3).double()
    upper1 = torch.randn(3, 3, dtype=torch.float64).triu(1) + torch.diag(torch.tensor([2.0, -0.5, 0.3]).double())
    upper2 = torch.randn(3, 3, dtype=torch.float64).triu(1) + torch.diag(torch.tensor([1.0, 1.5, -2.0]).double())
    torch.nn.init.normal_(layer.bias)
    bias = layer.bias.detach().clone()
    layer.set_triangles(upper1, upper2)
    frame = pf.linalg.thin_frame(layer.vectors, 3)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = x + torch.tanh(x @ frame @ upper2.mT + bias) @ upper1.mT @ frame.mT
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.inv(expected.detach()), x)


@pytest.mark.parametrize(
    ("upper1", "upper2"),
    [
        (torch.ones(2, 2), torch.eye(2)),
        (torch.eye(2), torch.zeros(2, 2)),
        (-torch.eye(2), torch.eye(2)),
        (torch.eye(3), torch.eye(2)),
        (torch.eye(2) * torch.nan, torch.eye(2)),
    ],
)
def test_set_triangles_refuses(upper1, upper2):
    with pytest.raises(ValueError, match="set_triangles"):
        pf.Sylvester(4, 2).set_triangles(upper1, upper2)


@pytest.mark.parametrize("make", ALL)
def test_bad_rows_leave_the_others_alone(make):
    layer = scaled(make(4), 1.0)
    y = torch.randn(9, 4, dtype=torch.float64)
    expected, ladj = inv_and_ladj(layer, y)
    bad = y.clone()
    bad[2], bad[5] = torch.nan, 1e10
    good = [0, 1, 3, 4, 6, 7, 8]
    actual, actual_ladj = inv_and_ladj(layer, bad)
    torch.testing.assert_close(actual[good], expected[good], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(actual_ladj[good], ladj[good], rtol=1e-10, atol=1e-10)
    assert actual[2].isnan().any()
    assert actual[5].isfinite().all()


def test_bad_rows_cost_the_others_no_sweeps(monkeypatch):
    layer = scaled(pf.generalized_sylvester(8, [16]), 0.5)
    layer.hypernet.register_forward_hook(lambda *_: None)  # a network that cannot be evaluated in parts
    solutions = []
    finish = autoregressive_module.finish

    def recorded(solution, *args, **kwargs):
        solutions.append(solution)
        return finish(solution, *args, **kwargs)

    monkeypatch.setattr(autoregressive_module, "finish", recorded)
    y = torch.randn(12, 8, dtype=torch.float64)
    bad = torch.cat([y[:4], torch.full((1, 8), torch.nan).double(), y[4:9], torch.full((1, 8), 1e8).double(), y[9:]])
    good = [i for i in range(14) if i not in (4, 10)]
    layer.inv(y)
    layer.inv(bad)
    alone, among = solutions
    assert alone.num_steps.max() > alone.num_steps.min()  # rows go their own ways
    assert (among.num_steps[good] - alone.num_steps).abs().max() <= 1  # gathered products round differently
    assert among.num_steps[4] == 0


@pytest.mark.parametrize("make", ALL)
def test_gradients_to_data_and_parameters(make):
    layer = scaled(make(3), 1.0)
    if isinstance(layer, pf.GeneralizedSylvester):
        layer = scaled(pf.generalized_sylvester(3, [4]), 1.0)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    base = dist.Normal(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)).to_event(1)
    d = dist.TransformedDistribution(base, [layer])
    parameters = tuple(layer.parameters())
    assert gradcheck(lambda v, *_: layer.inv(v), (y, *parameters))
    assert gradcheck(lambda v, *_: d.log_prob(v), (y, *parameters))
    if not isinstance(layer, pf.GeneralizedSylvester):
        assert gradcheck(lambda v: d.log_prob(v), (y,), check_forward_ad=True)
        assert gradgradcheck(lambda v, *_: d.log_prob(v), (y, *parameters))


def test_generalized_second_order_is_right_or_refused():
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    refused = scaled(pf.generalized_sylvester(3, [4]), 1.0)
    (grad,) = torch.autograd.grad(refused.inv(y).sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), y)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        gradcheck(refused.inv, (y,), check_forward_ad=True)
    right = scaled(pf.generalized_sylvester(3, [4], order=2), 1.0)
    assert gradcheck(right.inv, (y,), check_forward_ad=True)
    assert gradgradcheck(lambda v, *_: inv_and_ladj(right, v), (y, *right.parameters()))


def test_generalized_sweeps_are_few():
    """A network with a hook cannot be evaluated in parts: the layer sweeps."""
    layer = scatter(pf.generalized_sylvester(32, [64]).double(), 0.1).with_cache(0)
    calls = []
    layer.hypernet.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        y = layer(torch.randn(16, 32, dtype=torch.float64))
        calls.clear()
        layer.inv(y)
    assert len(calls) <= 20  # 32 sweeps bound it


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("dim", [1, 9, 40])
def test_generalized_inverse_without_a_sweep(dim, size):
    """Coordinate by coordinate it is exact, at strong weights too: no sweep is allowed here."""
    layer = scatter(pf.generalized_sylvester(dim, [24, 24], solver=Sweeps(max_steps=0)).double(), size).with_cache(0)
    y = 3 * torch.randn(16, dim, dtype=torch.float64)
    with torch.no_grad():
        x, ladj = inv_and_ladj(layer, y)
        image, forward = call_and_ladj(layer, x)
    torch.testing.assert_close(image, y, rtol=1e-10, atol=1e-10 * size)
    torch.testing.assert_close(ladj, -forward, rtol=1e-6, atol=1e-6)
    if dim < 40:
        expected = jacobian_log_det(layer._call, x[:3], 1)
        torch.testing.assert_close(forward[:3], expected, rtol=1e-6, atol=1e-6)


def test_generalized_gradient_against_all_sweeps_with_a_graph():
    layer = scatter(pf.generalized_sylvester(20, [12, 12]).double(), 0.4).with_cache(0)
    exact = pf.generalized_sylvester(20, [12, 12], order=2).double().with_cache(0)
    exact.load_state_dict(layer.state_dict())
    y, weights = torch.randn(2, 3, 20, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((weights * x).sum() + ladj.sin().sum(), list(which.parameters()))
        for which in (layer, exact)
        for x, ladj in [inv_and_ladj(which, y)]
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_generalized_context():
    conditional = scatter(pf.conditional_generalized_sylvester(3, 2, hidden_dims=[6]).double(), 0.5)
    context = torch.randn(5, 2, dtype=torch.float64)
    layer = conditional.condition(context).with_cache(0)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    y = layer(x).detach()
    torch.testing.assert_close(layer.inv(y), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y[:, 2], conditional.condition(context[2])(x[:, 2]))
    assert not torch.allclose(y[:, 2], conditional.condition(context[3])(x[:, 2]))


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("hidden", [[], [0], [3], [7, 9]], ids=str)
def test_masked_networks_are_autoregressive(dim, context_dim, hidden):
    network = scatter(masked_network(dim, hidden, 3, context_dim=context_dim).double())
    x = torch.randn(dim + context_dim, dtype=torch.float64)
    jacobian = torch.func.jacrev(network)(x).reshape(3, dim, dim + context_dim)
    assert (jacobian[..., :dim].triu() == 0).all()
    if hidden != [0]:
        assert (jacobian[..., dim:] != 0).all()
    if hidden == [7, 9] and dim > 1:  # and use everything that they may
        assert (jacobian[..., :dim].tril(-1) != 0).sum() == 3 * dim * (dim - 1) / 2


@pytest.mark.parametrize("context_dim", [0, 2])
def test_narrow_masked_networks_reach_every_coordinate(context_dim):
    """With fewer units than coordinates, the last outputs must still depend on the last inputs."""
    dim, width = 40, 10
    network = scatter(masked_network(dim, [width, width], 1, context_dim=context_dim).double())
    jacobian = torch.func.jacrev(network)(torch.randn(dim + context_dim, dtype=torch.float64))
    seen = jacobian[:, :dim] != 0
    assert not seen.triu().any()
    for i in range(1, dim):
        latest = max(seen[i].nonzero().flatten().tolist(), default=-1)
        assert i - 1 - latest < dim / width
    assert (jacobian[:, dim:] != 0).all()


@pytest.mark.parametrize(("make", "most"), [(pf.affine_coupling, 400_000), (pf.generalized_sylvester, 1_700_000)])
def test_default_networks_stay_moderate_in_many_dimensions(make, most):
    """The default network must not grow with the square of the dimension; W alone has 784^2 entries."""
    assert sum(p.numel() for p in make(784).parameters()) < most
    hidden = [m.out_features for m in make(20).hypernet if hasattr(m, "out_features")]
    assert hidden[:2] == ([200, 200] if make is pf.affine_coupling else [64, 64])


@pytest.mark.parametrize("make", ALL)
def test_starts_at_the_identity_and_moves(make):
    layer = make(4)
    x = torch.randn(6, 4)
    y, ladj = call_and_ladj(layer, x)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(ladj, torch.zeros(6), rtol=0, atol=1e-6)
    y, ladj = call_and_ladj(layer, x)
    ((y - 1).square().sum() + ladj.sum()).backward()
    assert max(p.grad.abs().max() for p in layer.parameters()) > 1e-3


def test_degenerate_planar_parameters():
    layer = pf.planar(3).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.w.zero_()
        layer.u.normal_()
    y, ladj = call_and_ladj(layer, x)
    torch.testing.assert_close(layer.inv(y.detach().clone()), x)
    (y.sum() + ladj.sum()).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, (1.0, 1e3, 1e5)), (torch.float64, (1.0, 1e3, 1e12))])
def test_the_log_det_of_planar_is_that_of_its_map(dtype, sizes, conditioned):
    """At s = 0 the determinant is 1 + u-hat . w, of which nearly everything cancels: in exact arithmetic."""
    generator = torch.Generator().manual_seed(0)
    batch = (2,) if conditioned else ()
    for dim, size, length in itertools.product((1, 3, 10), (0.0, *sizes, *(-s for s in sizes)), (1e-3, 1.0, 1e2)):
        w, across = torch.randn(2, *batch, dim, generator=generator, dtype=dtype)
        w = length * w / w.norm(dim=-1, keepdim=True)
        across = across - (across * w).sum(-1, keepdim=True) / length**2 * w
        layer = pf.planar(dim).to(dtype)
        if conditioned:
            layer = rebind(layer, {"u": across + size / length**2 * w, "w": w})
        else:
            layer.load_state_dict({"u": across + size / length**2 * w, "w": w, "bias": torch.zeros(1)})
        zero = torch.zeros(*batch, dim, dtype=dtype)
        determinant = layer.log_abs_det_jacobian(zero, layer(zero)).detach().exp()
        with torch.no_grad():
            layer.bias.fill_(50.0)  # where tanh is 1
        direction = layer(zero.clone()).detach()
        rows = zip(direction.reshape(-1, dim).tolist(), w.reshape(-1, dim).tolist(), strict=True)
        for (u_hat, w_row), d in zip(rows, determinant.reshape(-1).tolist(), strict=True):
            terms = [Fraction(a) * Fraction(b) for a, b in zip(u_hat, w_row, strict=True)]
            rounding = torch.finfo(dtype).eps * float(1 + d + sum(abs(t) for t in terms)) * (1 + abs(math.log(d)))
            assert abs(float(1 + sum(terms)) - d) <= 4 * rounding, (dim, size, length)


def test_radial_at_its_centre_and_far_out():
    layer = scaled(pf.radial(3), 1.0)
    x = torch.stack([layer.centre.detach(), torch.full((3,), 1e200, dtype=torch.float64)]).requires_grad_()
    y, ladj = call_and_ladj(layer, x)
    back, inverse = inv_and_ladj(layer, y.detach().requires_grad_())
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -ladj)
    (ladj.sum() + inverse.sum() + y[0].sum() + back[0].sum()).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def grid(low, high, points):
    axis = torch.linspace(low, high, points, dtype=torch.float64)
    cell = (axis[1] - axis[0]) ** 2
    return torch.cartesian_prod(axis, axis), cell


def ring(x):
    """A ring with a dent, unnormalised."""
    r = x.norm(dim=-1)
    return -0.5 * ((r - 2) / 0.5) ** 2 - 0.3 * x[..., 0]


@pytest.mark.parametrize("name", ["planar", "sylvester"])
def test_trained_densities_integrate_to_one(name):
    pyro.set_rng_seed(1)
    layers = [pf.planar(2) for _ in range(6)] if name == "planar" else [pf.sylvester(2) for _ in range(4)]
    flow = pf.Flow(dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1), layers).double()

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("points", 128):
            pyro.sample("x", flow())

    def model():
        with pyro.plate("points", 128):
            x = pyro.sample("x", dist.Normal(torch.zeros(2).double(), 100.0).to_event(1).mask(False))
            pyro.factor("energy", ring(x))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 2e-2}), Trace_ELBO())
    first = svi.step()
    for _ in range(150):
        last = svi.step()
    assert last < first
    points, cell = grid(-9, 9, 721)
    with torch.no_grad():
        forward = flow().log_prob(points).exp().sum() * cell
        assert abs(forward - 1) <= 1e-4
        inverted = dist.TransformedDistribution(
            dist.Normal(torch.zeros(2).double(), torch.ones(2).double()).to_event(1), [flow.transforms.inv]
        )
        backward = inverted.log_prob(points).exp().sum() * cell
    assert abs(backward - 1) <= 1e-4


def test_pickle_keeps_the_solver():
    layer = pf.sylvester(4, 2, solver=Newton(max_steps=3, on_failure="nan"))
    assert pickle.loads(pickle.dumps(layer)).solver == layer.solver


def test_failure_names_the_layer():
    layer = scaled(pf.generalized_sylvester(6, [16], solver=Sweeps(max_steps=1, atol=0.0, rtol=0.0)), 2.0)
    with pytest.raises(ConvergenceError, match=r"GeneralizedSylvester: .* of 8 rows .* after 1 steps"):
        layer.inv(torch.randn(8, 6, dtype=torch.float64))
    with pytest.raises(ConvergenceError, match="Planar"):
        scaled(pf.planar(3, solver=Newton(max_steps=0)), 2.0).inv(torch.randn(8, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: pf.Sylvester(4, 0), ValueError, "hidden_dim"),
        (lambda: pf.Sylvester(4, 5), ValueError, "between 1 and input_dim"),
        (lambda: pf.Sylvester(4, 2, num_reflections=-1), ValueError, "num_reflections"),
        (lambda: pf.Sylvester(4, 2, solver=Settings()), TypeError, "solver"),
        (lambda: pf.Planar(4, solver="newton"), TypeError, "solver"),
        (lambda: pf.Planar(0), ValueError, "input_dim"),
        (lambda: pf.GeneralizedSylvester(4, order=3), ValueError, "order"),
        (lambda: pf.GeneralizedSylvester(4, solver=3), TypeError, "solver"),
        (lambda: pf.Sylvester(4)(torch.randn(3)), ValueError, "4 elements"),
        (lambda: pf.Planar(4).inv(torch.randn(2, 3)), ValueError, "4 elements"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_bad_row_leaves_the_gradients_of_the_others_alone(bad):
    """Gradients, too, which come from a transposed system solved for all rows together."""
    torch.manual_seed(0)
    layer = scatter(pf.generalized_sylvester(8, [16]), 1.0).double().requires_grad_(False)
    y = torch.randn(4, 8, dtype=torch.float64)
    y[0, 0] = bad
    whole, alone = y.clone().requires_grad_(), y[1:].clone().requires_grad_()
    (got,) = torch.autograd.grad(layer.inv(whole)[1:].square().sum(), whole)
    (expected,) = torch.autograd.grad(layer.inv(alone).square().sum(), alone)
    torch.testing.assert_close(got[1:], expected)


def test_an_empty_batch_has_gradients():
    y = torch.zeros(0, 3, requires_grad=True)
    layer = pf.generalized_sylvester(3, [8])
    layer.inv(y).sum().backward()
    assert y.grad.shape == (0, 3)
