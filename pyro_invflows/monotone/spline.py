r"""Monotone rational-quadratic splines, on an interval of the line and on the circle.

Durkan et al. (2019), *Neural spline flows*, Eqs. 4 to 8, and Rezende et al. (2020), *Normalizing flows on tori and
spheres*, section 2.1.1, in forms that rounding cannot harm. In a bin of width w and height h, with the mean slope
:math:`s = h / w`, the slopes :math:`d_0, d_1` at its ends and :math:`\xi, \zeta = 1 - \xi` the position inside,

.. math::
    \eta = \frac{\xi u}{D}, \quad \frac{dy}{dx} = \frac{s^2 N}{D^2}, \qquad
    u = s \xi + d_0 \zeta, \quad v = s \zeta + d_1 \xi, \quad D = \xi u + \zeta v, \quad N = \xi v + \zeta u :

sums of positive terms only. Where no derivative is being built by torch itself, :math:`\eta` and the inverse are
composed of operations that increase in floating point, too (see :func:`_increasing_forward`), so that neighbouring
floats never change places.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyro_invflows.monotone.base import MonotoneFunction, bounded
from pyro_invflows.support.checks import positive_int, positive_number
from pyro_invflows.support.derivatives import gradients_with_graph, in_plain_eager_mode

__all__ = ["CircularSpline", "RationalQuadraticSpline"]

#: Bound on |log slope| at a knot: float32 resolves both the steepest and the flattest place.
_LARGEST_LOG_SLOPE = 3.0
#: No bin is narrower than this share of the whole, nor, of many bins, than this share of an equal part.
_LEAST_SHARE, _LEAST_OF_EQUAL = 1e-3, 0.1

_Evaluation = tuple[Tensor, Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Knots:
    """How raw parameters become knots and slopes.

    Args:
        num_bins: K.
        bound: B; the knots lie in [-B, B].
        circular: Whether the last knot is the first one again; else the slope at both ends is 1.
    """

    num_bins: int
    bound: float
    circular: bool

    @property
    def least(self) -> float:
        """The least width and height of a bin."""
        return 2 * self.bound * min(_LEAST_SHARE, _LEAST_OF_EQUAL / self.num_bins)

    @property
    def shared(self) -> float:
        """What is shared out among the bins beyond that."""
        return 2 * self.bound - self.num_bins * self.least

    def shares(self, raw: Tensor) -> Tensor:
        """Return each bin's share, widths and heights: ``(N, 2, K, E)``."""
        return torch.softmax(raw[:, : 2 * self.num_bins].unflatten(1, (2, self.num_bins)), 2)

    def positions(self, shares: Tensor) -> Tensor:
        """Return the knots in x and in y, ``(N, 2, K + 1, E)``; without a graph."""
        rows, _, k, elements = shares.shape
        sums, starts = _constants(self, shares.dtype, shares.device)
        knots = torch.baddbmm(
            starts, sums.expand(2 * rows, -1, -1), shares.reshape(2 * rows, k, elements), alpha=self.shared
        )
        knots[:, -1] = self.bound  # whatever rounding made of the sum
        return knots.view(rows, 2, k + 1, elements)

    def shares_with_graph(self, raw: Tensor) -> Tensor:
        """Return the same; torch's own softmax cannot be differentiated by autograd over dual numbers."""
        logits = raw[:, : 2 * self.num_bins].unflatten(1, (2, self.num_bins))
        size = (logits - logits.detach().amax(2, keepdim=True)).exp()
        return size / size.sum(2, keepdim=True)

    def positions_with_graph(self, shares: Tensor) -> Tensor:
        """The same by operations that torch differentiates."""
        starts = torch.arange(1, self.num_bins, dtype=shares.dtype, device=shares.device)
        starts = (starts * self.least - self.bound).unsqueeze(-1)
        inner = torch.cumsum(shares[:, :, :-1], 2) * self.shared + starts
        end = torch.full_like(shares[:, :, :1], self.bound)
        return torch.cat([-end, inner, end], 2)

    def slope_index(self, bins: Tensor) -> Tensor:
        """Return where in raw the slopes at both ends of a bin stand, ``(N, 2, E)``."""
        k = self.num_bins
        both = torch.stack((bins, bins + 1), 1)
        return both.remainder(k) + 2 * k if self.circular else (both + (2 * k - 1)).clamp(2 * k, 3 * k - 2)

    def free_slopes(self, raw_slope: Tensor, below: Tensor) -> Tensor:
        """Return the raw slopes at both ends of a bin, with 0 for those that are fixed."""
        if self.circular:
            return raw_slope
        return torch.where(self.is_free(below), raw_slope, 0.0)

    @staticmethod
    def is_free(below: Tensor) -> Tensor:
        """Whether the slopes at both ends of a bin are not fixed at 1, ``(N, 2, E)``.

        From which inner knots lie below: that at the lower end is one, that at the upper end is one.
        """
        return torch.stack((below[:, 0], ~below[:, -1]), 1)


@functools.lru_cache(maxsize=64)
def _constants(knots: _Knots, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the matrix that sums the bins below each knot, (K + 1, K), and where the knots start, (K + 1, 1)."""
    k = knots.num_bins
    with torch.inference_mode(False):
        sums = torch.ones(k + 1, k, dtype=dtype, device=device).tril(-1)
        starts = torch.arange(k + 1, dtype=dtype, device=device) * knots.least - knots.bound
    return sums, starts.unsqueeze(-1)


def _weights(xi: Tensor, zeta: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return u, v, D and N of the module's formulas."""
    u = torch.addcmul(s * xi, d0, zeta)
    v = torch.addcmul(s * zeta, d1, xi)
    return u, v, torch.addcmul(xi * u, zeta, v), torch.addcmul(xi * v, zeta, u)


def _increasing_forward(xi: Tensor, zeta: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    r"""Return :math:`\eta`, by operations each of which increases in :math:`\xi` in floating point, too.

    The odds of :math:`\eta` follow from those of :math:`\xi`, r: they are :math:`r (s r + d_0) / (d_1 r + s)`. With
    :math:`t = r / (d_1 r + s)` and :math:`c = s - d_0 d_1 / s` this is :math:`r (d_0 / s + c t)`, and as well
    :math:`(s / d_1) (r - c t)`: the sign of c decides which of them has positive terms only.
    """
    r = xi / zeta
    c = torch.addcdiv(s, d0 * d1, s, value=-1)
    ct = c / torch.add(d1, s / r)
    odds = torch.where(c > 0, (d0 / s + ct) * r, (r - ct) * (s / d1))
    return odds.reciprocal_().add_(1).reciprocal_()


def _increasing_inverse(eta: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\xi` and :math:`\zeta` for :math:`\eta`, by operations that increase in floating point, too.

    The odds r of :math:`\xi` solve :math:`s r^2 + (d_0 - o d_1) r - o s = 0` for the odds o of :math:`\eta`; 1/r solves
    the same with 1/o and the slopes exchanged. The one with a non-negative middle term is solved, without cancellation.
    """
    odds = (eta / (1 - eta)).abs_()  # 0, not -0
    low = d0 >= odds * d1
    given = torch.where(low, odds.reciprocal(), odds)
    near, far = torch.where(low, d0, d1), torch.where(low, d1, d0)
    middle = torch.addcmul(-far, near, given).clamp_min_(0)
    root = torch.addcmul(middle * middle, s * s, given, value=4).sqrt_().add_(middle).div_(2 * s)
    # both cases meet at r = sqrt(d0 / d1), which rounding must not cross
    border = (d1 / d0).sqrt_()
    ratio = torch.where(low, torch.maximum(root, border), torch.minimum(root.reciprocal(), border))  # 1/r
    xi = (1 + ratio).reciprocal_()
    return xi, ratio.reciprocal_().add_(1).reciprocal_()


def _smooth_inverse(eta: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    r"""The same in one smooth formula, to be differentiated.

    With :math:`q = d_0 (1 - \eta) - d_1 \eta` the discriminant is :math:`q^2 + 4 s^2 \eta (1 - \eta)`.
    """
    rest, twice = 1 - eta, 2 * s
    q = torch.addcmul(d0 * rest, d1, eta, value=-1)
    of_eta, of_rest = twice * eta, twice * rest
    root = torch.addcmul(q * q, of_eta, of_rest).sqrt() + q.abs()
    low = q >= 0
    left = torch.where(low, of_eta, root)
    right = torch.where(low, root, of_rest)
    total = left + right
    return left / total, right / total


def _evaluate(value: Tensor, raw: Tensor, knots: _Knots, inverse: bool) -> _Evaluation:
    """Return the result, the log-slope of the forward function, and what the backward pass needs; without a graph.

    ``value`` (N, E), ``raw`` (N, P, E) or (1, P, E).
    """
    rows, elements = value.shape
    k = knots.num_bins
    shares = knots.shares(raw)
    positions = knots.positions(shares)
    below = positions[:, int(inverse), 1:k] <= value.unsqueeze(1)  # (N, K - 1, E)
    bins = below.sum(1)
    both = torch.stack((bins, bins + 1), 1).unsqueeze(1).expand(rows, 2, 2, elements)
    ends = positions.expand(rows, -1, -1, -1).gather(2, both)  # (N, x and y, low and high, E)
    low, high = ends.unbind(2)
    size = high - low
    width, height = size.unbind(1)
    index = knots.slope_index(bins)
    log_d = bounded(knots.free_slopes(raw.expand(rows, -1, -1).gather(1, index), below), _LARGEST_LOG_SLOPE)
    d = log_d.exp()
    d0, d1 = d.unbind(1)
    s = height / width
    if inverse:
        eta = (value - low[:, 1]).div_(height).clamp_(0, 1)
        xi, zeta = _increasing_inverse(eta, s, d0, d1)
        result = torch.addcmul(low[:, 0], width, xi)
    else:
        xi = (value - low[:, 0]).div_(width).clamp_(0, 1)
        zeta = 1 - xi
        eta = _increasing_forward(xi, zeta, s, d0, d1)
        result = torch.addcmul(low[:, 1], height, eta)
    result = torch.minimum(result, high[:, 1 - int(inverse)])
    u, v, total, top = _weights(xi, zeta, s, d0, d1)
    inner_slope = (s / total).mul_(top).div_(total)  # d eta / d xi
    log_slope = (inner_slope * s).log_()
    pieces = [shares, below, bins, low, size, index, d, log_d, s, xi, zeta, eta, u, v, total, top, inner_slope]
    if not knots.circular:
        outside = value.abs() >= knots.bound
        result = torch.where(outside, value, result)
        log_slope = torch.where(outside, 0.0, log_slope)
        pieces.append(outside)
    return result, log_slope, tuple(pieces)


def _with_graph(value: Tensor, raw: Tensor, knots: _Knots, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return the result and the log-slope by operations that torch differentiates to any order and compiles."""
    rows, elements = value.shape
    k = knots.num_bins
    positions = knots.positions_with_graph(knots.shares_with_graph(raw))
    below = positions[:, int(inverse), 1:k].detach() <= value.detach().unsqueeze(1)
    bins = below.sum(1)
    both = torch.stack((bins, bins + 1), 1).unsqueeze(1).expand(rows, 2, 2, elements)
    low, high = positions.expand(rows, -1, -1, -1).gather(2, both).unbind(2)
    width, height = (high - low).unbind(1)
    raw_slope = knots.free_slopes(raw.expand(rows, -1, -1).gather(1, knots.slope_index(bins)), below)
    d0, d1 = bounded(raw_slope, _LARGEST_LOG_SLOPE).exp().unbind(1)
    s = height / width
    outside = None if knots.circular else value.abs() >= knots.bound
    # where the result is not used, neither value nor gradient may be anything but harmless
    given = value if outside is None else value.masked_fill(outside, 0.0)
    if inverse:
        eta = ((given - low[:, 1]) / height).clamp(0, 1)
        xi, zeta = _smooth_inverse(eta, s, d0, d1)
        result = low[:, 0] + width * xi
        _, _, total, top = _weights(xi, zeta, s, d0, d1)
    else:
        xi = ((given - low[:, 0]) / width).clamp(0, 1)
        u, _, total, top = _weights(xi, 1 - xi, s, d0, d1)
        result = low[:, 1] + height * (xi * u / total)
    log_slope = (s * s * top / (total * total)).log()
    if outside is not None:
        result = torch.where(outside, value, result)
        log_slope = log_slope.masked_fill(outside, 0.0)
    return result, log_slope


def _root(value: Tensor, raw: Tensor, knots: _Knots) -> Tensor:
    """Return the inverse alone, without a graph, in as few operations as possible. Arguments as in :func:`_evaluate`.

    For splines on an interval.
    """
    k = knots.num_bins
    positions = knots.positions(knots.shares(raw))
    bins = (positions[:, 1, 1:k] <= value.unsqueeze(1)).sum(1)
    slopes = F.pad(raw[:, 2 * k :], (0, 0, 1, 1))  # raw ones; both ends have the slope 1
    table = torch.cat((positions, slopes.unsqueeze(1)), 1).expand(len(value), -1, -1, -1)
    both = torch.stack((bins, bins + 1), 1).unsqueeze(1).expand(-1, 3, -1, -1)
    ends = table.gather(2, both)  # (N, x, y and slope, low and high, E)
    low = ends[:, :2, 0]
    width, height = (ends[:, :2, 1] - low).unbind(1)
    d0, d1 = bounded(ends[:, 2], _LARGEST_LOG_SLOPE).exp_().unbind(1)
    start, base = low.unbind(1)
    eta = (value - base).div_(height).clamp_(0, 1)
    xi, _ = _smooth_inverse(eta, height / width, d0, d1)
    return torch.where(value.abs() >= knots.bound, value, torch.addcmul(start, width, xi))


class _Spline(torch.autograd.Function):
    """:func:`_evaluate` with its derivative; second derivatives through :func:`_with_graph`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, raw: Tensor, knots: _Knots, inverse: bool) -> tuple[Tensor, Tensor]:
        result, log_slope, pieces = _evaluate(value, raw, knots, inverse)
        ctx.save_for_backward(value, raw, *pieces)
        ctx.knots, ctx.inverse = knots, inverse
        ctx.set_materialize_grads(False)
        return result, log_slope

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_slope: Tensor | None) -> tuple[Tensor | None, ...]:
        knots, inverse = ctx.knots, ctx.inverse
        value, raw, *pieces = ctx.saved_tensors
        grad = torch.zeros_like(value) if grad is None else grad
        grad_slope = torch.zeros_like(value) if grad_slope is None else grad_slope
        if torch.is_grad_enabled():
            found = gradients_with_graph(
                lambda value, raw: _with_graph(value, raw, knots, inverse), (value, raw), (grad, grad_slope)
            )
            return *found, None, None
        grad_value, finish = _gradients(grad, grad_slope, pieces, knots, inverse)
        return grad_value, finish(raw) if ctx.needs_input_grad[1] else None, None, None


def _gradients(
    grad: Tensor, grad_slope: Tensor, pieces: list[Tensor], knots: _Knots, inverse: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the gradient of the given value, and what computes that of raw."""
    shares, below, bins, low, size, index, d, log_d, s, xi, zeta, eta, u, v, total, top, inner_slope = pieces[:17]
    outside = None if knots.circular else pieces[17]
    width, height = size.unbind(1)
    d0, d1 = d.unbind(1)
    grad_y = grad
    if outside is not None:
        grad_y, grad_slope = torch.where(outside, 0.0, grad), torch.where(outside, 0.0, grad_slope)
    # the derivative of the log-slope by xi: N' / N - 2 D' / D, where N' = 2 (v - u)
    bend = torch.add(d0 + d1, s, alpha=-2).mul_(zeta - xi).div_(total)
    bend = ((v - u) / top).sub_(bend)
    grad_xi = (grad_slope * bend).mul_(2)
    if inverse:
        # y is given: what changes x moves y the other way, so this is minus the gradient of y
        grad_y = torch.addcdiv(grad_y, grad_xi, width).div_(inner_slope).div_(s).neg_()
    grad_eta = grad_y * height
    grad_xi = grad_xi.addcmul_(grad_eta, inner_slope)
    grad_x = grad_xi / width
    grad_value = grad_y.neg() if inverse else grad_x
    if outside is not None:
        grad_value = torch.where(outside, grad, grad_value)

    def of_raw(raw: Tensor) -> Tensor:
        k = knots.num_bins
        rows, elements = xi.shape
        # By log d0 and log d1. The log-slope is homogeneous of degree 1 in (s, d0, d1) and eta of degree 0: the rest
        # is the derivative by log s.
        mixed = (xi * zeta).div_(total)
        part = grad_slope / top
        upper = torch.add(grad_eta * eta, grad_slope, alpha=2)
        lower = grad_eta - upper
        by_log_d = torch.stack(
            (torch.addcmul(mixed * lower, part, zeta * zeta), torch.addcmul(-mixed * upper, part, xi * xi)), 1
        ).mul_(d)
        by_log_s = grad_slope - by_log_d.sum(1)
        # by the lower knots, and by the sizes of the bin
        by_low = torch.stack((-grad_x, grad_y), 1)
        by_size = torch.stack(
            (torch.addcmul(by_log_s, grad_xi, xi).div_(width).neg_(), torch.addcdiv(grad_y * eta, by_log_s, height)), 1
        )
        # The lower knot is the sum of the shares below it, the size is one share. Softmax takes from each the mean,
        # weighted by the shares: the lower knot and the size themselves, less what no share can change.
        mean = torch.add(low, bins.unsqueeze(1), alpha=-knots.least).add_(knots.bound).mul_(by_low)
        mean = mean.addcmul_(by_size, size - knots.least).neg_()
        by_raw = raw.new_empty(rows, raw.shape[1], elements)
        by_shares = mean.new_empty(rows, 2, k, elements)
        torch.addcmul(
            mean.unsqueeze(2),
            below.to(mean.dtype).unsqueeze(1),
            by_low.mul_(knots.shared).unsqueeze(2),
            out=by_shares[:, :, : k - 1],
        )
        by_shares[:, :, k - 1] = mean
        chosen = bins.view(rows, 1, 1, elements).expand(rows, 2, 1, elements)
        by_shares.scatter_add_(2, chosen, by_size.mul_(knots.shared).unsqueeze(2))
        torch.mul(by_shares, shares, out=by_raw[:, : 2 * k].unflatten(1, (2, k)))
        by_raw[:, 2 * k :] = 0
        ratio = log_d / _LARGEST_LOG_SLOPE
        by_log_d.addcmul_(by_log_d * ratio, ratio, value=-1)
        by_raw.scatter_add_(1, index, knots.free_slopes(by_log_d, below))
        return by_raw if raw.shape[0] == rows else by_raw.sum(0, keepdim=True)

    return grad_value, of_raw


def _spline(value: Tensor, raw: Tensor, knots: _Knots, inverse: bool) -> tuple[Tensor, Tensor]:
    """Evaluate a spline for any batch shapes."""
    value, raw, shape = _flat(value, raw)
    evaluate = _Spline.apply if in_plain_eager_mode() else _with_graph
    result, log_slope = evaluate(value, raw, knots, inverse)
    return result.view(shape), log_slope.view(shape)


def _flat(value: Tensor, raw: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """Return both with one batch dimension, and the shape of the result."""
    batch = torch.broadcast_shapes(value.shape[:-1], raw.shape[:-2])
    elements = value.shape[-1]
    rows = batch.numel()
    value = value.expand(*batch, elements).reshape(rows, elements)
    if raw.shape[:-2].numel() == 1:  # learned constants: one table of knots for all rows
        raw = raw.reshape(1, *raw.shape[-2:])
    else:
        raw = raw.expand(*batch, *raw.shape[-2:]).reshape(rows, *raw.shape[-2:])
    return value, raw, torch.Size((*batch, elements))


@dataclass(frozen=True)
class RationalQuadraticSpline(MonotoneFunction):
    r"""Bends an interval by rational-quadratic pieces, and leaves what lies outside as it is.

    .. math:: y_k + h_k \frac{\xi (s \xi + d_k \zeta)}{\xi (s \xi + d_k \zeta) + \zeta (s \zeta + d_{k+1} \xi)}
              \quad\text{in bin } k, \qquad y = x \text{ for } |x| \ge B,

    with :math:`\xi` the position in the bin, :math:`\zeta = 1 - \xi` and :math:`s = h_k / w_k`. The first derivative is
    continuous. 3K - 1 raw parameters an element: K logits of the widths, K of the heights, K - 1 logarithms of the
    slopes at the inner knots. The narrowest bin is a thousandth of the interval, or a tenth of an equal part where K is
    above 100; slopes at knots lie in :math:`e^{\pm 3}`.

    Both directions cost the same and are finite at every float and every parameter; floats that are neighbours never
    change places. Memory: a dozen numbers an element for the backward pass, beyond the parameters.

    Args:
        num_bins: K, at least 2.
        bound: B.

    References:
        Durkan et al. (2019), *Neural spline flows*, Eqs. 4-8; the inverse by another form of the same root.
    """

    num_bins: int = 8
    bound: float = 5.0

    raw_names = "logits of the widths, of the heights, then log-slopes"

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "num_bins", positive_int(self.num_bins, "num_bins", name, minimum=2))
        object.__setattr__(self, "bound", positive_number(self.bound, "bound", name))

    @property
    def num_parameters(self) -> int:  # type: ignore[override]
        return 3 * self.num_bins - 1

    @property
    def identity_outside(self) -> float:  # type: ignore[override]
        return self.bound

    @property
    def _knots(self) -> _Knots:
        return _Knots(self.num_bins, self.bound, circular=False)

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return _spline(x, raw, self._knots, inverse=False)

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return _spline(y, raw, self._knots, inverse=True)

    @torch.no_grad()
    def root(self, y: Tensor, raw: Tensor) -> Tensor:
        y, raw, shape = _flat(y, raw)
        return _root(y, raw, self._knots).view(shape)


@dataclass(frozen=True)
class CircularSpline(MonotoneFunction):
    r"""Bends and turns a circle: angles between -B and B, of which both ends are the same point.

    A rational-quadratic spline with the same slope at both ends, then a rotation by a learned angle. 3K + 1 raw
    parameters an element: K logits of the widths, K of the heights, K logarithms of the slopes, the angle. Increasing
    up to full turns: an angle beyond one end comes in at the other.

    A y off the circle, by more than rounding, has density 0: its log-slope is +inf. An x off the circle counts as the
    end next to it.

    Args:
        num_bins: K, at least 2.
        bound: B, half of the circumference.

    References:
        Rezende et al. (2020), *Normalizing flows on tori and spheres*, section 2.1.1.
    """

    num_bins: int = 8
    bound: float = math.pi

    raw_names = "logits of the widths, of the heights, log-slopes, then angles"

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "num_bins", positive_int(self.num_bins, "num_bins", name, minimum=2))
        object.__setattr__(self, "bound", positive_number(self.bound, "bound", name))

    @property
    def num_parameters(self) -> int:  # type: ignore[override]
        return 3 * self.num_bins + 1

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.interval(-self.bound, self.bound)

    @property
    def _knots(self) -> _Knots:
        return _Knots(self.num_bins, self.bound, circular=True)

    def _on_circle(self, angle: Tensor) -> Tensor:
        turn = 2 * self.bound
        return (angle - turn * torch.round(angle / turn)).clamp(-self.bound, self.bound)

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        spline, angle = raw.split_with_sizes((3 * self.num_bins, 1), -2)
        y, log_slope = _spline(x, spline, self._knots, inverse=False)
        return self._on_circle(y + torch.fmod(angle.squeeze(-2), 2 * self.bound)), log_slope

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        spline, angle = raw.split_with_sizes((3 * self.num_bins, 1), -2)
        turned = self._on_circle(y.clamp(-self.bound, self.bound) - torch.fmod(angle.squeeze(-2), 2 * self.bound))
        x, log_slope = _spline(turned, spline, self._knots, inverse=True)
        off = y.abs() > self.bound * (1 + torch.finfo(y.dtype).eps ** 0.5)
        return x, log_slope.masked_fill(off, math.inf)
