"""Knots of a spline: how raw parameters become positions and slopes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LARGEST_LOG_SLOPE", "Knots"]

#: Bound on |log slope| at a knot: float32 resolves both the steepest and the flattest place.
LARGEST_LOG_SLOPE = 3.0
#: No bin is narrower than this share of the whole, nor, of many bins, than this share of an equal part.
_LEAST_SHARE, _LEAST_OF_EQUAL = 1e-3, 0.1
#: e^x = 2^(x / log 2)
_PER_OCTAVE = 1 / math.log(2)


@dataclass(frozen=True)
class Knots:
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

    def sizes_first(self, raw: Tensor) -> Tensor:
        """Return the widths and heights of the bins, ``(2, K, N, E)``; without a graph.

        With the bins in front, so that every operation runs over whole rows of memory, and in one piece of memory.
        """
        rows, _, elements = raw.shape
        k = self.num_bins
        logits = raw[:, : 2 * k].unflatten(1, (2, k))
        sizes = raw.new_empty(2, k, rows, elements)
        torch.sub(logits.permute(1, 2, 0, 3), logits.amax(2).transpose(0, 1).unsqueeze(1), out=sizes)
        sizes.mul_(_PER_OCTAVE).exp2_()  # several times as fast as exp_
        return sizes.div_(sizes.sum(1, keepdim=True).div_(self.shared)).add_(self.least)

    def positions_first(self, sizes: Tensor) -> Tensor:
        """Return the knots in x and in y, ``(2, K + 1, N, E)``, increasing in floating point, too; without a graph."""
        k = self.num_bins
        positions = sizes.new_empty(2, k + 1, *sizes.shape[2:])
        knots = positions.unbind(1)
        knots[0].fill_(-self.bound)
        for i, size in enumerate(sizes.unbind(1)[:-1]):
            torch.add(knots[i], size, out=knots[i + 1])
        knots[k].fill_(self.bound)
        return positions

    def slopes_first(self, raw: Tensor) -> Tensor:
        """Return the raw log-slopes at all knots, ``(K + 1, N, E)``; without a graph."""
        rows, _, elements = raw.shape
        k = self.num_bins
        slopes = raw.new_empty(k + 1, rows, elements)
        given = raw[:, 2 * k :].transpose(0, 1)
        if self.circular:
            slopes[:k], slopes[k] = given, given[0]
        else:
            slopes[0], slopes[1:k], slopes[k] = 0, given, 0
        return slopes

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
def _constants(knots: Knots, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the matrix that sums the bins below each knot, (K + 1, K), and where the knots start, (K + 1, 1)."""
    k = knots.num_bins
    with torch.inference_mode(False):
        sums = torch.ones(k + 1, k, dtype=dtype, device=device).tril(-1)
        starts = torch.arange(k + 1, dtype=dtype, device=device) * knots.least - knots.bound
    return sums, starts.unsqueeze(-1)
