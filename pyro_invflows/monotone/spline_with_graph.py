"""Rational-quadratic splines by operations that torch differentiates to any order and compiles."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_invflows.monotone.base import bounded
from pyro_invflows.monotone.spline_knots import LARGEST_LOG_SLOPE, Knots

__all__ = ["evaluate_with_graph", "smooth_inverse", "weights"]


def weights(xi: Tensor, zeta: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return u, v, D and N of the module's formulas."""
    u = torch.addcmul(s * xi, d0, zeta)
    v = torch.addcmul(s * zeta, d1, xi)
    return u, v, torch.addcmul(xi * u, zeta, v), torch.addcmul(xi * v, zeta, u)


def smooth_inverse(eta: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
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


def evaluate_with_graph(value: Tensor, raw: Tensor, knots: Knots, inverse: bool) -> tuple[Tensor, Tensor]:
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
    d0, d1 = bounded(raw_slope, LARGEST_LOG_SLOPE).exp().unbind(1)
    s = height / width
    outside = None if knots.circular else value.abs() >= knots.bound
    # where the result is not used, neither value nor gradient may be anything but harmless
    given = value if outside is None else value.masked_fill(outside, 0.0)
    if inverse:
        eta = ((given - low[:, 1]) / height).clamp(0, 1)
        xi, zeta = smooth_inverse(eta, s, d0, d1)
        result = low[:, 0] + width * xi
        _, _, total, top = weights(xi, zeta, s, d0, d1)
    else:
        xi = ((given - low[:, 0]) / width).clamp(0, 1)
        u, _, total, top = weights(xi, 1 - xi, s, d0, d1)
        result = low[:, 1] + height * (xi * u / total)
    log_slope = (s * s * top / (total * total)).log()
    if outside is not None:
        result = torch.where(outside, value, result)
        log_slope = log_slope.masked_fill(outside, 0.0)
    return result, log_slope
