r"""Monotone rational-quadratic splines, on an interval of the line and on the circle.

Durkan et al. (2019), *Neural spline flows*, Eqs. 4 to 8, and Rezende et al. (2020), *Normalizing flows on tori and
spheres*, section 2.1.1, in forms without cancellation. In a bin of width w and height h, with the mean slope
:math:`s = h / w`, the slopes :math:`d_0, d_1` at its ends and :math:`\xi, \zeta = 1 - \xi` the position inside,

.. math::
    \eta = \frac{\xi u}{D}, \quad \frac{dy}{dx} = \frac{s^2 N}{D^2}, \qquad
    u = s \xi + d_0 \zeta, \quad v = s \zeta + d_1 \xi, \quad D = \xi u + \zeta v, \quad N = \xi v + \zeta u :

sums of positive terms only. Unless torch itself records the derivatives, :math:`\eta` and the inverse are composed of
operations that are monotone in floating point as well, so that the order of two floats is never reversed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_invflows.monotone.base import MonotoneFunction
from pyro_invflows.monotone.spline_knots import Knots
from pyro_invflows.monotone.spline_with_graph import evaluate_with_graph
from pyro_invflows.monotone.spline_without_graph import SplineFunction, root_without_graph
from pyro_invflows.support.checks import positive_int, positive_number
from pyro_invflows.support.derivatives import in_plain_eager_mode

__all__ = ["CircularSpline", "RationalQuadraticSpline"]


def _spline(value: Tensor, raw: Tensor, knots: Knots, inverse: bool) -> tuple[Tensor, Tensor]:
    """Evaluate a spline for any batch shapes."""
    value, raw, shape = _flat(value, raw)
    evaluate = SplineFunction.apply if in_plain_eager_mode() else evaluate_with_graph
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
    r"""Bends an interval by rational-quadratic pieces; the identity outside.

    .. math:: y_k + h_k \frac{\xi (s \xi + d_k \zeta)}{\xi (s \xi + d_k \zeta) + \zeta (s \zeta + d_{k+1} \xi)}
              \quad\text{in bin } k, \qquad y = x \text{ for } |x| \ge B,

    with :math:`\xi` the position in the bin, :math:`\zeta = 1 - \xi` and :math:`s = h_k / w_k`. The first derivative is
    continuous. 3K - 1 raw parameters per element: K logits of the widths, K of the heights, and K - 1 logarithms of
    the slopes at the inner knots. No bin is narrower than a thousandth of the interval (for K above 100, than a tenth
    of an equal share); slopes at the knots lie between :math:`e^{-3}` and :math:`e^3`.

    Both directions cost the same, are finite for all finite values and parameters, and never reverse the order of two
    floats. Memory for the backward pass: a dozen numbers per element, in addition to the parameters.

    Args:
        num_bins: K, at least 2.
        bound: B.

    References:
        Durkan et al. (2019), *Neural spline flows*, Eqs. 4-8; the inverse is another form of the same root.
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
    def _knots(self) -> Knots:
        return Knots(self.num_bins, self.bound, circular=False)

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return _spline(x, raw, self._knots, inverse=False)

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return _spline(y, raw, self._knots, inverse=True)

    @torch.no_grad()
    def root(self, y: Tensor, raw: Tensor) -> Tensor:
        y, raw, shape = _flat(y, raw)
        return root_without_graph(y, raw, self._knots).view(shape)


@dataclass(frozen=True)
class CircularSpline(MonotoneFunction):
    r"""Bends and rotates a circle: angles between -B and B, where both ends are the same point.

    A rational-quadratic spline with the same slope at both ends, then a rotation by a learned angle. 3K + 1 raw
    parameters per element: K logits of the widths, K of the heights, K logarithms of the slopes, and the angle.
    Increasing modulo full turns: an angle that passes one end continues at the other.

    A y outside the circle, by more than rounding error, has density 0: its log-slope is +inf. An x outside is clamped
    to the nearest end.

    Args:
        num_bins: K, at least 2.
        bound: B, half the circumference.

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
    def _knots(self) -> Knots:
        return Knots(self.num_bins, self.bound, circular=True)

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
