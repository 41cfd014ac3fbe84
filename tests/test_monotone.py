"""Increasing functions of one variable: both directions, slopes, derivatives of every kind, extreme parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from cases import DTYPES

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

FUNCTIONS = [
    Affine(),
    Affine(max_log_scale=0.5),
    Additive(),
    RationalQuadraticSpline(),
    RationalQuadraticSpline(num_bins=2, bound=3),
    RationalQuadraticSpline(num_bins=150, bound=0.5),
    CircularSpline(),
    CircularSpline(num_bins=2, bound=1.0),
    SinhArcsinh(),
    TanhBump(),
    MixtureCDF(),
    MixtureCDF(num_components=1),
]
SMALL = [Affine(), Additive(), RationalQuadraticSpline(3), CircularSpline(2), SinhArcsinh(), TanhBump(), MixtureCDF(2)]
SPLINES = [RationalQuadraticSpline(), RationalQuadraticSpline(num_bins=2), CircularSpline()]


def drawn(function: MonotoneFunction, *batch: int, std=1.0, elements=3, dtype=torch.float64, seed=0):
    """Return points of the domain, some of them beyond the bound if there is one, and raw parameters."""
    generator = torch.Generator().manual_seed(seed)
    bound = function.identity_outside or 4.0
    x = bound * (2.4 * torch.rand(*batch, elements, dtype=dtype, generator=generator) - 1.2)
    if isinstance(function, CircularSpline):
        x = function.bound * (2 * torch.rand(*batch, elements, dtype=dtype, generator=generator) - 1)
    raw = torch.randn(*batch, function.num_parameters, elements, dtype=torch.float64, generator=generator).to(dtype)
    most = torch.finfo(dtype).max
    return x, (std * raw).clamp(-most, most)


def both(function):
    return pytest.param(function.forward, id="forward"), pytest.param(function.inverse, id="inverse")


def slope(log_slope, like):
    return torch.zeros_like(like) if log_slope is None else log_slope.expand_as(like)


def around(function, difference):
    """On a circle, differences count modulo full turns."""
    if isinstance(function, CircularSpline):
        turn = 2 * function.bound
        return difference - turn * torch.round(difference / turn)
    return difference


every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=str)
every_small_function = pytest.mark.parametrize("function", SMALL, ids=str)
every_direction = pytest.mark.parametrize("direction", ["forward", "inverse"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@every_dtype
@every_function
def test_round_trip(function, dtype):
    x, raw = drawn(function, 500, std=1.5, dtype=dtype)
    y, log_slope = function.forward(x, raw)
    back, log_slope_back = function.inverse(y, raw)
    assert y.dtype == back.dtype == dtype
    assert y.shape == back.shape == x.shape
    # what rounding of y may do to x depends on the slope
    scale = 1 + slope(log_slope, x).neg().exp()
    tolerance = 1e-11 if dtype == torch.float64 else 3e-5
    assert (around(function, back - x).abs() <= tolerance * scale * (1 + x.abs() + y.abs())).all()
    again = function.forward(back, raw)[0]
    torch.testing.assert_close(around(function, again - y), torch.zeros_like(y), atol=tolerance * 10, rtol=0)
    if dtype == torch.float64 and log_slope is not None:
        torch.testing.assert_close(log_slope_back, log_slope, atol=1e-7, rtol=1e-7)


@every_dtype
@every_function
def test_zeros_are_the_identity(function, dtype):
    x, raw = drawn(function, 50, dtype=dtype)
    for run in (function.forward, function.inverse):
        y, log_slope = run(x, torch.zeros_like(raw))
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(slope(log_slope, x), torch.zeros_like(x))


@every_function
def test_log_slope_against_autograd(function):
    x, raw = drawn(function, 40, std=2.0)
    x.requires_grad_()
    y, log_slope = function.forward(x, raw)
    (expected,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope(log_slope, x), expected.log())
    y = y.detach().requires_grad_()
    back, log_slope = function.inverse(y, raw)
    (expected,) = torch.autograd.grad(back.sum(), y)
    torch.testing.assert_close(slope(log_slope, x), -expected.log(), atol=1e-6, rtol=1e-6)


@every_direction
@every_small_function
def test_derivatives(function, direction):
    x, raw = drawn(function, 2, elements=1, seed=3)
    inputs = (x.requires_grad_(), raw.requires_grad_())

    def run(x, raw):
        y, log_slope = getattr(function, direction)(x, raw)
        return [y] if log_slope is None else [y, log_slope + 0 * x]

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    for chosen in range(len(run(x, raw))):  # one output alone, by one input alone
        (by_x,) = torch.autograd.grad(run(x, raw.detach())[chosen].sum(), x, allow_unused=True, materialize_grads=True)
        (by_raw,) = torch.autograd.grad(run(x.detach(), raw)[chosen].sum(), raw)
        whole = torch.autograd.grad(run(x, raw)[chosen].sum(), (x, raw), allow_unused=True, materialize_grads=True)
        torch.testing.assert_close((by_x, by_raw), whole)


@every_direction
@every_small_function
def test_torch_func(function, direction):
    x, raw = drawn(function, 3, elements=1, seed=5)

    def run(x, raw):
        y, log_slope = getattr(function, direction)(x, raw)
        return torch.stack([y, slope(log_slope, y)])

    expected = run(x, raw)
    torch.testing.assert_close(torch.vmap(run, out_dims=1)(x, raw), expected)
    torch.testing.assert_close(torch.vmap(run, (0, None), out_dims=1)(x, raw[0]), run(x, raw[0]))
    torch.testing.assert_close(torch.vmap(run, (None, 0), out_dims=1)(x[0], raw), run(x[0], raw))
    point, parameters = x[0], raw[0]

    def total(raw):
        return run(point, raw).sin().sum()

    first = torch.autograd.functional.jacobian(total, parameters)
    second = torch.autograd.functional.hessian(total, parameters)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(outer(total)(parameters), first)
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            torch.testing.assert_close(outer(inner(total))(parameters), second)


@every_direction
@every_small_function
def test_forward_mode(function, direction):
    x, raw = drawn(function, 2, elements=1, seed=5)

    def run(x, raw):
        return [t for t in getattr(function, direction)(x, raw) if t is not None]

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), raw.requires_grad_()), check_forward_ad=True)


@every_direction
@every_small_function
def test_compiles_whole(function, direction):
    x, raw = drawn(function, 3, elements=2, seed=7)
    run = getattr(function, direction)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    raw.requires_grad_()
    for actual, expected in zip(compiled(x, raw), run(x, raw), strict=True):
        torch.testing.assert_close(actual, expected)
        if actual is not None:
            (got,) = torch.autograd.grad(actual.sum(), raw, retain_graph=True)
            torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), raw, retain_graph=True)[0])


@every_direction
@every_function
def test_batch_shapes_broadcast(function, direction):
    run = getattr(function, direction)
    x, raw = drawn(function, 2, 5, elements=3)
    y, log_slope = run(x, raw)
    for i in range(2):
        for j in range(5):
            alone, alone_slope = run(x[i, j], raw[i, j])
            torch.testing.assert_close(alone, y[i, j])
            if log_slope is not None:
                torch.testing.assert_close(alone_slope, log_slope[i, j])
    shared = run(x, raw[0, 0])[0]  # constants
    torch.testing.assert_close(shared, run(x, raw[0, 0].expand_as(raw))[0])
    torch.testing.assert_close(run(x, raw[0])[0], run(x, raw[0].expand_as(raw))[0])
    torch.testing.assert_close(run(x[0, 0], raw)[0], run(x[0, 0].expand_as(x), raw)[0])
    empty = run(x[:0], raw[:0])
    assert empty[0].shape == (0, 5, 3)
    raw.requires_grad_()
    (grad,) = torch.autograd.grad(run(x, raw[0, 0])[0].square().sum(), raw)
    (whole,) = torch.autograd.grad(run(x, raw[0, 0].expand_as(raw))[0].square().sum(), raw)
    torch.testing.assert_close(grad, whole)


@every_dtype
@every_direction
@every_function
def test_increases(function, direction, dtype):
    """Strictly on a grid that is fine, but not beyond what rounding resolves."""
    _, raw = drawn(function, 1, std=1.0, elements=8, dtype=dtype, seed=2)
    end = 0.999 * function.bound if isinstance(function, CircularSpline) else 1.5 * (function.identity_outside or 4.0)
    grid = torch.linspace(-end, end, 1501 if dtype == torch.float64 else 401, dtype=dtype)
    value, log_slope = getattr(function, direction)(grid.unsqueeze(-1).expand(-1, 8), raw)
    steps = around(function, value.diff(dim=0))
    assert (steps > 0).all()
    # and as much as the slopes say, seen from afar
    if log_slope is not None and dtype == torch.float64:
        log_slope = log_slope.expand_as(value)
        rate = log_slope.exp() if direction == "forward" else (-log_slope).exp()
        width = (grid[1] - grid[0]).item()
        least, most = torch.minimum(rate[1:], rate[:-1]), torch.maximum(rate[1:], rate[:-1])
        inside = (steps >= 0.5 * width * least) & (steps <= 2 * width * most)
        assert inside.double().mean() > 0.95


@every_dtype
@pytest.mark.parametrize("std", [0.0, 1.0, 3.0, 10.0, 50.0, 3e38])
@every_direction
@pytest.mark.parametrize("spline", [RationalQuadraticSpline(), RationalQuadraticSpline(num_bins=3)], ids=str)
def test_neighbouring_floats_never_change_places(spline, direction, std, dtype):
    x, raw = drawn(spline, 200, std=std, elements=1, dtype=dtype, seed=4)
    knots = spline._knots.positions_first(spline._knots.sizes_first(raw))[int(direction == "inverse")]
    for start in (x, *knots):
        value = start
        for _ in range(4):
            value = torch.nextafter(value, torch.full_like(value, -torch.inf))
        last = None
        for _ in range(8):
            result = getattr(spline, direction)(value, raw)[0]
            assert last is None or (result >= last).all()
            last, value = result, torch.nextafter(value, torch.full_like(value, torch.inf))


@every_dtype
@pytest.mark.parametrize(("std", "error"), [(1, 1e-5), (3, 1e-5), (10, 2e-5), (50, 2e-4), (3e38, 2e-4)])
@pytest.mark.parametrize("spline", SPLINES, ids=str)
def test_splines_are_finite_at_any_parameters(spline, std, error, dtype):
    """At, between and beside knots, both directions and their gradients; what is lost is rounding."""
    x, raw = drawn(spline, 300, std=std, elements=1, dtype=dtype, seed=6)
    if isinstance(spline, CircularSpline):
        raw[:, -1] = 0  # the angle, so that knots are knots in both directions
    knots = spline._knots.positions_first(spline._knots.sizes_first(raw))
    for direction, side in (("forward", 0), ("inverse", 1)):
        for at in (x, *knots[side]):
            for place in (at, torch.nextafter(at, at - 1), torch.nextafter(at, at + 1)):
                if isinstance(spline, CircularSpline):
                    place = place.clamp(-spline.bound, spline.bound)
                inputs = place.detach().requires_grad_(), raw.detach().requires_grad_()
                value, log_slope = getattr(spline, direction)(*inputs)
                assert value.isfinite().all()
                assert log_slope.isfinite().all()
                grads = torch.autograd.grad(value.sum() + log_slope.sum(), inputs)
                assert all(g.isfinite().all() for g in grads)
                other = spline.inverse if direction == "forward" else spline.forward
                back, again = other(value, raw)
                assert again.isfinite().all()
                # the slope may change within one float: that on either side says what rounding does
                rate = torch.minimum(log_slope, again) if direction == "forward" else torch.minimum(-log_slope, -again)
                lost = around(spline, back - place).abs()
                # a few roundings are no error, however steep the place
                close = lost <= 2 * torch.finfo(dtype).eps * spline.bound
                assert (close | (lost * rate.exp() <= error)).all()


@every_direction
@pytest.mark.parametrize("std", [1.0, 3.0, 10.0, 50.0])
@every_function
def test_finite_in_float32(function, std, direction):
    """Far points, far parameters; gradients, too."""
    x, raw = drawn(function, 200, std=std, dtype=torch.float32, seed=8)
    far = torch.tensor([0.0, 1e-40, 1e-10, 1e-3, 20.0, 1e3, 1e6], dtype=torch.float32)
    far = torch.cat([far, -far]).unsqueeze(-1).expand(-1, 3)
    for points in (x, far):
        if isinstance(function, CircularSpline):
            points = points.clamp(-function.bound, function.bound)
        inputs = points.detach().requires_grad_(), raw[: len(points)].detach().requires_grad_()
        value, log_slope = getattr(function, direction)(*inputs)
        log_slope = slope(log_slope, value)
        assert value.isfinite().all()
        assert log_slope.isfinite().all()
        total = value.clamp(-1e30, 1e30).sum() + log_slope.sum()
        assert all(g.isfinite().all() for g in torch.autograd.grad(total, inputs))


@every_direction
@every_function
def test_never_nan_at_any_float(function, direction):
    most = torch.finfo(torch.float32).max
    ends = torch.tensor([0.0, 1.0, 3e38, most], dtype=torch.float32)
    points = torch.cat([ends, -ends]).unsqueeze(-1).expand(-1, 20)
    for std in (0.0, 1.0, 3e38):
        raw = drawn(function, 1, std=std, elements=20, dtype=torch.float32)[1]
        value, log_slope = getattr(function, direction)(points, raw)
        assert not value.isnan().any()
        assert not slope(log_slope, value).isnan().any()
    x, raw = drawn(function, 3)
    x[1] = torch.nan
    value, _ = getattr(function, direction)(x, raw)
    assert value[1].isnan().all()
    assert value[[0, 2]].isfinite().all()


# ------------------------------------------------------------------ independent answers


@dataclass
class SlowSpline:
    """Durkan et al. (2019), Eqs. 4 to 8, number by number, as printed."""

    widths: list[float]
    heights: list[float]
    slopes: list[float]
    bound: float

    def bin(self, value: float, sizes: list[float]) -> tuple[int, float]:
        low, k = -self.bound, 0
        while k + 1 < len(sizes) and value >= low + sizes[k]:
            low, k = low + sizes[k], k + 1
        return k, low

    def forward(self, x: float) -> tuple[float, float]:
        k, low = self.bin(x, self.widths)
        w, h, d0, d1 = self.widths[k], self.heights[k], self.slopes[k], self.slopes[k + 1]
        s, xi = h / w, (x - low) / w
        below = -self.bound + sum(self.heights[:k])
        denominator = s + (d1 + d0 - 2 * s) * xi * (1 - xi)
        y = below + h * (s * xi**2 + d0 * xi * (1 - xi)) / denominator
        slope = s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2) / denominator**2
        return y, math.log(slope)

    def inverse(self, y: float) -> float:
        k, low = self.bin(y, self.heights)
        w, h, d0, d1 = self.widths[k], self.heights[k], self.slopes[k], self.slopes[k + 1]
        s, rest = h / w, y - low
        a = h * (s - d0) + rest * (d1 + d0 - 2 * s)
        b = h * d0 - rest * (d1 + d0 - 2 * s)
        c = -s * rest
        xi = 2 * c / (-b - math.sqrt(b**2 - 4 * a * c))
        return xi * w + -self.bound + sum(self.widths[:k])


def softmax(values: list[float]) -> list[float]:
    size = [math.exp(v - max(values)) for v in values]
    return [v / sum(size) for v in size]


@pytest.mark.parametrize("spline", SPLINES, ids=str)
def test_splines_against_the_paper(spline):
    k, bound = spline.num_bins, spline.bound
    x, raw = drawn(spline, 60, std=1.5, elements=1, seed=9)
    circular = isinstance(spline, CircularSpline)
    if circular:
        raw[:, -1] = 0.0
    y, log_slope = spline.forward(x, raw)
    y_in = x if circular else 0.9 * x
    back, _ = spline.inverse(y_in, raw)
    least = 2 * bound * 1e-3
    for i in range(60):
        numbers = raw[i, :, 0].tolist()
        sizes = [
            [least + (2 * bound - k * least) * p for p in softmax(part)] for part in (numbers[:k], numbers[k : 2 * k])
        ]
        free = numbers[2 * k : 3 * k] if circular else numbers[2 * k : 3 * k - 1]
        slopes = [math.exp(3 * math.tanh(r / 3)) for r in free]
        slopes = [*slopes, slopes[0]] if circular else [1.0, *slopes, 1.0]
        slow = SlowSpline(*sizes, slopes, bound)
        if abs(x[i, 0]) < bound:
            assert (y[i, 0].item(), log_slope[i, 0].item()) == pytest.approx(slow.forward(x[i, 0].item()), abs=1e-9)
        if abs(y_in[i, 0]) < bound:
            assert back[i, 0].item() == pytest.approx(slow.inverse(y_in[i, 0].item()), abs=1e-9)


def test_affine_and_additive_against_the_formula():
    x, raw = drawn(Affine(max_log_scale=0.5), 20)
    s = 0.5 * torch.tanh(raw[:, 0] / 0.5)
    y, log_slope = Affine(max_log_scale=0.5).forward(x, raw)
    torch.testing.assert_close(y, x * s.exp() + raw[:, 1])
    torch.testing.assert_close(log_slope, s)
    assert Additive().forward(x, raw[:, :1])[1] is None
    torch.testing.assert_close(Additive().forward(x, raw[:, :1])[0], x + raw[:, 0])


def test_sinh_arcsinh_against_jones_and_pewsey():
    """Shifted and scaled: the function is determined by two of its values."""
    x, raw = drawn(SinhArcsinh(), 30, std=1.0)
    skewness, tail = 2 * torch.tanh(raw[:, 0] / 2), torch.tanh(raw[:, 1]).exp()

    def theirs(x):
        return torch.sinh(tail * torch.asinh(x) + skewness)

    zero = torch.zeros_like(x)
    scale = tail * torch.cosh(skewness)  # their slope at 0
    torch.testing.assert_close(SinhArcsinh().forward(x, raw)[0], (theirs(x) - theirs(zero)) / scale)


def test_tanh_bump_against_the_formula():
    x, raw = drawn(TanhBump(), 30)
    log_a, log_d, t, u = raw.unbind(1)
    a, d = (2 * torch.tanh(log_a / 2)).exp(), (3 * torch.tanh(log_d / 3)).exp()
    torch.testing.assert_close(TanhBump().forward(x, raw)[0], x + (d - 1) / a * torch.tanh(a * x + t) + u)


def test_mixture_against_the_formula():
    k = 5
    x, raw = drawn(MixtureCDF(k), 30)
    gain = torch.linspace(0.5, 1, k, dtype=x.dtype).unsqueeze(-1)
    weights = torch.softmax(raw[:, :k], 1)
    scale = (3 * torch.tanh(raw[:, 2 * k : 3 * k] * gain.flip(0) / 3)).exp()
    z = (x.unsqueeze(1) - raw[:, k : 2 * k] * gain) / scale
    below, above = (weights * torch.sigmoid(z)).sum(1), (weights * torch.sigmoid(-z)).sum(1)
    expected = (3 * torch.tanh(raw[:, -2] / 3)).exp() * (below / above).log() + raw[:, -1]
    torch.testing.assert_close(MixtureCDF(k).forward(x, raw)[0], expected)


def test_mixture_with_a_gap():
    """Between two distant components the function is flat: y is met, x is what it can be."""
    function = MixtureCDF(2)
    raw = torch.zeros(8, 1, dtype=torch.float64)
    raw[2:4, 0] = torch.tensor([-80.0, 40.0])
    y = torch.linspace(-3, 3, 101, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    x, log_slope = function.inverse(y, raw)
    torch.testing.assert_close(function.forward(x, raw)[0], y, atol=1e-10, rtol=1e-10)
    assert log_slope.min() < -15
    (grad,) = torch.autograd.grad(x.sum(), y)
    assert grad.isfinite().all()


def test_components_that_start_alike_do_not_stay_alike():
    raw = torch.zeros(26, 1, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-3, 3, 11, dtype=torch.float64).unsqueeze(-1)
    (grad,) = torch.autograd.grad(MixtureCDF().forward(x, raw)[0].pow(3).sum(), raw)
    assert len(set(grad[8:16, 0].tolist())) == len(set(grad[16:24, 0].tolist())) == 8


# ------------------------------------------------------------------ tails, circles, settings


def test_the_line_outside_a_spline():
    spline = RationalQuadraticSpline(bound=2.0)
    _, raw = drawn(spline, 1, std=3.0, elements=1)
    x = torch.tensor([-1e300, -7.0, -2.0, 2.0, 2.1, 1e308], dtype=torch.float64).unsqueeze(-1)
    for run in (spline.forward, spline.inverse):
        y, log_slope = run(x, raw)
        assert torch.equal(y, x)
        assert torch.equal(log_slope, torch.zeros_like(x))
    # continuous, with slope 1 at both ends
    near = torch.tensor([[-2 + 1e-9], [2 - 1e-9]], dtype=torch.float64)
    y, log_slope = spline.forward(near, raw)
    torch.testing.assert_close(y, near, atol=1e-8, rtol=0)
    torch.testing.assert_close(log_slope, torch.zeros_like(near), atol=1e-6, rtol=0)


def test_a_circle_is_closed():
    circle = CircularSpline()
    _, raw = drawn(circle, 1, std=2.0, elements=4)
    ends = torch.tensor([[-math.pi], [math.pi]], dtype=torch.float64).expand(-1, 4)
    y, log_slope = circle.forward(ends, raw)
    torch.testing.assert_close(around(circle, y[0] - y[1]), torch.zeros_like(y[0]), atol=1e-12, rtol=0)
    torch.testing.assert_close(log_slope[0], log_slope[1])
    x = (math.pi * torch.linspace(-1, 1, 1001, dtype=torch.float64)).unsqueeze(-1).expand(-1, 4)
    y = circle.forward(x, raw)[0]
    assert y.abs().max() <= math.pi
    torch.testing.assert_close(around(circle, y.diff(dim=0)).sum(0), torch.full((4,), 2 * math.pi, dtype=torch.float64))


def test_off_the_circle_the_density_is_zero():
    circle = CircularSpline(bound=1.0)
    _, raw = drawn(circle, 1, elements=1)
    y = torch.tensor([-1.5, -1.0, 1.0 + 1e-12, 1.1], dtype=torch.float64).unsqueeze(-1)
    x, log_slope = circle.inverse(y, raw)
    assert (x.abs() <= 1).all()
    assert log_slope.isinf().squeeze(-1).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: RationalQuadraticSpline(num_bins=1), ValueError, "num_bins must be at least 2"),
        (lambda: RationalQuadraticSpline(num_bins=2.5), TypeError, "num_bins"),
        (lambda: RationalQuadraticSpline(bound=0.0), ValueError, "bound must be positive and finite"),
        (lambda: RationalQuadraticSpline(bound=-1), ValueError, "bound must be positive and finite"),
        (lambda: RationalQuadraticSpline(bound=math.inf), ValueError, "bound must be positive and finite"),
        (lambda: RationalQuadraticSpline(bound="5"), TypeError, "bound must be a number"),
        (lambda: CircularSpline(num_bins=1), ValueError, "CircularSpline: num_bins must be at least 2"),
        (lambda: CircularSpline(bound=0), ValueError, "bound must be positive and finite"),
        (lambda: Affine(max_log_scale=0.0), ValueError, "max_log_scale must be positive and finite"),
        (lambda: SinhArcsinh(max_skewness=-1.0), ValueError, "max_skewness must be positive and finite"),
        (lambda: SinhArcsinh(max_log_tail=math.nan), ValueError, "max_log_tail must be positive and finite"),
        (lambda: TanhBump(max_log_slope=5.0), ValueError, "max_log_slope must be at most 4"),
        (lambda: TanhBump(max_log_steepness=0), ValueError, "max_log_steepness must be positive and finite"),
        (lambda: MixtureCDF(num_components=0), ValueError, "num_components must be at least 1"),
        (lambda: MixtureCDF(max_log_scale=0), ValueError, "max_log_scale must be positive and finite"),
    ],
)
def test_bad_settings(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_functions_are_values():
    assert RationalQuadraticSpline(8) == RationalQuadraticSpline(bound=5)
    assert repr(MixtureCDF(3)) == "MixtureCDF(num_components=3, max_log_scale=3.0)"
    with pytest.raises(AttributeError):
        Affine().max_log_scale = 1.0
    with pytest.raises(NotImplementedError, match=r"must define forward\(x, raw\)"):
        MonotoneFunction().forward(torch.zeros(1), torch.zeros(1, 1))
    with pytest.raises(NotImplementedError, match=r"must define inverse\(y, raw\)"):
        MonotoneFunction().inverse(torch.zeros(1), torch.zeros(1, 1))


@pytest.mark.parametrize("spline", SPLINES, ids=str)
def test_inference_mode_and_checkpointing(spline):
    x, raw = drawn(spline, 4)
    with torch.inference_mode():
        expected = spline.forward(x.clone(), raw.clone())[0]
    x.requires_grad_()
    y, log_slope = torch.utils.checkpoint.checkpoint(spline.forward, x, raw, use_reentrant=False)
    torch.testing.assert_close(y, expected.clone())
    (grad,) = torch.autograd.grad(y.sum() + log_slope.sum(), x)
    direct = spline.forward(x, raw)
    torch.testing.assert_close(grad, torch.autograd.grad(direct[0].sum() + direct[1].sum(), x)[0])
