"""Layers made of functions of one variable: whatever function, whatever shape, with and without a context."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch

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
from pyro_invflows.testing import check_bijection

FUNCTIONS = [
    Affine(),
    Additive(),
    RationalQuadraticSpline(4),
    CircularSpline(3),
    SinhArcsinh(),
    TanhBump(),
    MixtureCDF(3),
]


class Cubic(MonotoneFunction):
    """``a^3 x`` with ``a = 1 + raw^2``: as a user would write one, without a thought for autocast or shapes."""

    num_parameters = 1

    def forward(self, x, raw):
        a = 1 + raw.squeeze(-2).square()
        return x * a**3, 3 * a.log()

    def inverse(self, y, raw):
        a = 1 + raw.squeeze(-2).square()
        return y / a**3, 3 * a.log()


def far(layer, std=1.0, seed=0):
    """Move a layer away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return layer


@pytest.mark.parametrize("std", [1.0, 2.0])
@pytest.mark.parametrize("function", [*FUNCTIONS, Cubic()], ids=str)
def test_keeps_every_promise(function, std):
    layer = far(pf.Monotone(function, 3).double(), std)
    x = torch.rand(4, 3, dtype=torch.float64) * 5 - 2.5
    check_bijection(layer, x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("function", [Affine(), Additive(), RationalQuadraticSpline(3), Cubic()], ids=str)
def test_shapes_broadcast_like_the_parameters(function, shape):
    layer = far(pf.Monotone(function, shape).double())
    raw = layer.raw
    for size in [(2, 3), (5, 2, 3), (4, 5, 2, 3), (0, 2, 3), (3,), (1,)]:
        if len(size) == 1 and size[0] not in (1, *shape[-1:]) and shape:
            continue
        x = torch.randn(size, dtype=torch.float64)
        y, ladj = call_and_ladj(layer, x)
        whole = torch.broadcast_shapes(x.shape, shape)
        assert y.shape == ladj.shape == whole == layer.forward_shape(x.shape)
        numbers = raw.expand(raw.shape[0], *whole[len(whole) - len(shape) :]) if shape else raw
        slow = torch.empty(whole, dtype=torch.float64)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in whole)).reshape(-1, len(whole)).tolist():
            mine = numbers[(slice(None), *index[len(whole) - len(shape) :])]
            slow[tuple(index)] = function.forward(x.expand(whole)[tuple(index)].reshape(1), mine.unsqueeze(-1))[0]
        torch.testing.assert_close(y, slow)
        torch.testing.assert_close(layer.inv(y.clone()), x.expand(whole))


def test_a_context_sets_every_parameter():
    conditional = far(pf.conditional_spline(3, 2, num_bins=5).double(), 0.3)
    context = torch.randn(7, 2, dtype=torch.float64)
    layer = conditional.condition(context)
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    y, ladj = call_and_ladj(layer, x)
    assert layer.batch_shape == (7, 3)
    for i in range(7):
        alone, alone_ladj = call_and_ladj(conditional.condition(context[i]), x[:, i])
        torch.testing.assert_close(y[:, i], alone)
        torch.testing.assert_close(ladj[:, i], alone_ladj)
    torch.testing.assert_close(inv_and_ladj(layer, y.clone())[0], x)


def test_angles():
    """A flow on the torus: exact, and nothing off it."""
    base = dist.Uniform(-math.pi, math.pi, validate_args=False).expand((2,)).to_event(1)
    layer = far(pf.Monotone(CircularSpline(), 2).double(), 1.0)
    d = pf.Flow(base, [layer])()
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 * 2 * math.pi - math.pi
    one = torch.stack([grid, torch.zeros_like(grid)], -1)
    density = d.log_prob(one).exp()
    other = layer.inv_and_ladj(torch.zeros(2, dtype=torch.float64))[1][1].exp() / (2 * math.pi)
    torch.testing.assert_close(density.sum() * 2 * math.pi / 4000, other, rtol=1e-3, atol=0)
    y = torch.tensor([[4.0, 0.0], [math.pi, 0.0]], dtype=torch.float64)
    for cache_size in (0, 1):
        x, ladj = inv_and_ladj(layer.with_cache(cache_size), y)
        assert ladj.isinf().tolist() == [[True, False], [False, False]]
        again = layer.with_cache(cache_size).log_abs_det_jacobian(x, y)
        assert again.isinf().tolist() == [[True, False], [False, False]]
    with pytest.raises(ValueError, match="support"):
        pf.Flow(dist.Uniform(-math.pi, math.pi).expand((2,)).to_event(1), [layer])().log_prob(y)


def test_a_spline_learns_a_margin():
    """Two bumps, by maximum likelihood."""
    torch.manual_seed(0)
    data = torch.cat([torch.randn(400, 1) * 0.3 - 1.5, torch.randn(400, 1) * 0.3 + 1.5])
    flow = pf.Flow(dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1), [pf.spline(1)])
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    before = flow().log_prob(data).mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = -flow().log_prob(data).mean()
        loss.backward()
        optimizer.step()
    assert -loss.item() > before + 0.8
    # a mixture of the two normals, the truth
    assert -loss.item() == pytest.approx(math.log(0.5) - 0.5 - 0.5 * math.log(2 * math.pi * 0.09), abs=0.1)


def test_a_mixture_learns_a_margin():
    """Its components, which start alike, part."""
    torch.manual_seed(0)
    data = torch.cat([torch.randn(400, 1) * 0.3 - 1.5, torch.randn(400, 1) * 0.3 + 1.5])
    layer = pf.Monotone(MixtureCDF(4), 1)
    flow = pf.Flow(dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1), [pf.Inverted(layer)])
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = -flow().log_prob(data).mean()
        loss.backward()
        optimizer.step()
    assert -loss.item() == pytest.approx(math.log(0.5) - 0.5 - 0.5 * math.log(2 * math.pi * 0.09), abs=0.15)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: pf.Monotone(RationalQuadraticSpline, 3), TypeError, "RationalQuadraticSpline"),
        (lambda: pf.Monotone(torch.nn.Tanh(), 3), TypeError, "derive from MonotoneFunction, but got Tanh"),
        (lambda: pf.Monotone(3, 3), TypeError, "but got 3"),
        (lambda: pf.spline(4, num_bins=1), ValueError, "num_bins must be at least 2"),
        (lambda: pf.spline(4, bound=0.0), ValueError, "bound must be positive and finite"),
        (lambda: pf.spline(0.5), TypeError, "input_dim must be an int"),
        (lambda: pf.spline(0), ValueError, "input_dim must be at least 1"),
        (lambda: pf.sinh_arcsinh(2.5), TypeError, "input_dim must be an int"),
        (lambda: pf.sinh_arcsinh(3, max_log_tail=0), ValueError, "max_log_tail must be positive and finite"),
        (lambda: pf.spline(3)(torch.zeros(2, 4)), ValueError, "does not broadcast"),
    ],
)
def test_bad_input(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_says_what_it_is():
    assert repr(pf.Monotone(Additive())) == "Monotone(Additive())"
    assert repr(pf.spline(3)) == "Spline(RationalQuadraticSpline(num_bins=8, bound=5.0), (3,))"
