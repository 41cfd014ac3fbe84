"""Rational-quadratic splines in few operations, without a graph, and their derivative written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_invflows.monotone.base import bounded
from pyro_invflows.monotone.spline_knots import LARGEST_LOG_SLOPE, Knots
from pyro_invflows.monotone.spline_with_graph import evaluate_with_graph, smooth_inverse, weights
from pyro_invflows.support.derivatives import gradients_with_graph

__all__ = ["SplineFunction", "root_without_graph"]

_Evaluation = tuple[Tensor, Tensor, tuple[Tensor, ...]]


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


def evaluate_without_graph(value: Tensor, raw: Tensor, knots: Knots, inverse: bool) -> _Evaluation:
    """Return the result, the log-slope of the forward function, and what the backward pass needs.

    ``value`` (N, E), ``raw`` (N, P, E) or (1, P, E). Inside, what belongs to an element stands last.
    """
    k = knots.num_bins
    sizes = knots.sizes_first(raw)
    positions = knots.positions_first(sizes)
    below = positions[int(inverse), 1:k] <= value  # (K - 1, N, E)
    bins = _count(below)
    places = _places(bins, raw.shape[0])
    low, high = _ends(places, value.shape, *positions.unbind(0))  # x and y
    size = high - low
    width, height = size.unbind(0)
    log_d = bounded(torch.cat(_ends(places, value.shape, knots.slopes_first(raw))), LARGEST_LOG_SLOPE)
    d = log_d.exp()
    d0, d1 = d.unbind(0)
    s = height / width
    if inverse:
        eta = (value - low[1]).div_(height).clamp_(0, 1)
        xi, zeta = _increasing_inverse(eta, s, d0, d1)
        result = torch.addcmul(low[0], width, xi)
    else:
        xi = (value - low[0]).div_(width).clamp_(0, 1)
        zeta = 1 - xi
        eta = _increasing_forward(xi, zeta, s, d0, d1)
        result = torch.addcmul(low[1], height, eta)
    result = torch.minimum(result, high[1 - int(inverse)])
    u, v, total, top = weights(xi, zeta, s, d0, d1)
    inner_slope = (s / total).mul_(top).div_(total)  # d eta / d xi
    log_slope = (inner_slope * s).log_()
    pieces = [sizes, below, bins, low, size, d, log_d, s, xi, zeta, eta, u, v, total, top, inner_slope]
    if not knots.circular:
        outside = value.abs() >= knots.bound
        result = torch.where(outside, value, result)
        log_slope = torch.where(outside, 0.0, log_slope)
        pieces.append(outside)
    return result, log_slope, tuple(pieces)


def _places(bins: Tensor, rows: int) -> Tensor:
    """Return where each element's bin stands in a table ``(K, rows, E)``, flattened; ``rows`` is N or 1."""
    columns = rows * bins.shape[1]
    within = torch.arange(columns, device=bins.device).view(rows, bins.shape[1])
    return torch.add(within, bins, alpha=columns).flatten()


def _count(mask: Tensor) -> Tensor:
    """Return how many entries along the first dimension are true."""
    if mask.shape[0] > 255:
        return mask.sum(0)
    return mask.view(torch.uint8).sum(0, dtype=torch.uint8).long()  # several times as fast


def _ends(places: Tensor, shape: torch.Size, *tables: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries of T tables ``(K + 1, N or 1, E)`` at both ends of each bin, twice ``(T, N, E)``."""
    low, high = (tables[0].new_empty(len(tables), len(places)) for _ in range(2))
    for table, *target in zip(tables, low, high, strict=True):
        # one-dimensional selections, which are faster than gather
        torch.index_select(table[:-1].flatten(), 0, places, out=target[0])
        torch.index_select(table[1:].flatten(), 0, places, out=target[1])
    return low.view(len(tables), *shape), high.view(len(tables), *shape)


def root_without_graph(value: Tensor, raw: Tensor, knots: Knots) -> Tensor:
    """Return the inverse alone, of a spline on an interval, in as few operations as possible.

    The arguments are those of :func:`evaluate_without_graph`.
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
    d0, d1 = bounded(ends[:, 2], LARGEST_LOG_SLOPE).exp_().unbind(1)
    start, base = low.unbind(1)
    eta = (value - base).div_(height).clamp_(0, 1)
    xi, _ = smooth_inverse(eta, height / width, d0, d1)
    return torch.where(value.abs() >= knots.bound, value, torch.addcmul(start, width, xi))


class SplineFunction(torch.autograd.Function):
    """:func:`evaluate_without_graph` with its derivative; second derivatives through :func:`evaluate_with_graph`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, raw: Tensor, knots: Knots, inverse: bool) -> tuple[Tensor, Tensor]:
        result, log_slope, pieces = evaluate_without_graph(value, raw, knots, inverse)
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
                lambda value, raw: evaluate_with_graph(value, raw, knots, inverse), (value, raw), (grad, grad_slope)
            )
            return *found, None, None
        grad_value, finish = _gradients(grad, grad_slope, pieces, knots, inverse)
        return grad_value, finish(raw) if ctx.needs_input_grad[1] else None, None, None


def _gradients(
    grad: Tensor, grad_slope: Tensor, pieces: list[Tensor], knots: Knots, inverse: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the gradient of the given value, and what computes that of raw."""
    sizes, below, bins, low, size, d, log_d, s, xi, zeta, eta, u, v, total, top, inner_slope = pieces[:16]
    outside = None if knots.circular else pieces[16]
    width, height = size.unbind(0)
    d0, d1 = d.unbind(0)
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
            (torch.addcmul(mixed * lower, part, zeta * zeta), torch.addcmul(-mixed * upper, part, xi * xi))
        ).mul_(d)
        by_log_s = grad_slope - by_log_d.sum(0)
        # by the lower knots, and by the sizes of the bin
        by_low = torch.stack((-grad_x, grad_y))
        by_size = torch.stack(
            (torch.addcmul(by_log_s, grad_xi, xi).div_(width).neg_(), torch.addcdiv(grad_y * eta, by_log_s, height))
        )
        # The lower knot is the sum of the shares below it, the size is one share. Softmax takes from each the mean,
        # weighted by the shares: the lower knot and the size themselves, less what no share can change.
        mean = torch.add(low, bins, alpha=-knots.least).add_(knots.bound).mul_(by_low)
        mean = mean.addcmul_(by_size, size - knots.least).div_(-knots.shared)
        by_share = mean.new_empty(2, k, rows, elements)
        torch.addcmul(
            mean.unsqueeze(1), below.to(mean.dtype).unsqueeze(0), by_low.unsqueeze(1), out=by_share[:, : k - 1]
        )
        by_share[:, k - 1] = mean
        places = _places(bins, rows)
        by_share.flatten(1).scatter_add_(1, places.expand(2, -1), by_size.flatten(1))
        ratio = log_d / LARGEST_LOG_SLOPE
        lower, upper = by_log_d.addcmul_(by_log_d * ratio, ratio, value=-1).flatten(1).unbind(0)
        by_slope = mean.new_zeros(k + 1, rows, elements)
        by_slope[:-1].flatten().scatter_(0, places, lower)
        by_slope[1:].flatten().scatter_add_(0, places, upper)
        by_raw = raw.new_empty(rows, raw.shape[1], elements)
        logits, slopes = by_raw[:, : 2 * k].unflatten(1, (2, k)).permute(1, 2, 0, 3), by_raw[:, 2 * k :].transpose(0, 1)
        torch.mul(by_share, sizes - knots.least, out=logits)
        if knots.circular:
            by_slope[0] += by_slope[k]
            slopes.copy_(by_slope[:k])
        else:
            slopes.copy_(by_slope[1:k])
        return by_raw if raw.shape[0] == rows else by_raw.sum(0, keepdim=True)

    return grad_value, of_raw
