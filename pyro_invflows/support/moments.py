"""Mean and spread of rows of data, of all processes together, in float64.

If ``torch.distributed`` is initialised, every process must call :func:`moments`, even one without rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_invflows.support.devices import lacks_float64

__all__ = ["Moments", "double", "finite_rows", "has_spread", "moments", "refuse_overflow", "rounded_copy"]


class Moments(NamedTuple):
    """Statistics of rows ``(N, D)``."""

    num_rows: Tensor  # N, a scalar
    mean: Tensor  # (D,)
    scatter: Tensor  # (D, D), the sum of centred outer products; (D,), its diagonal, where no more was asked for


def double(value: Tensor) -> Tensor:
    """Convert to float64, on the CPU if the device has no float64."""
    return (value.cpu() if lacks_float64(value.device) else value).double()


def rounded_copy(target: Tensor, value: Tensor) -> None:
    """Copy, possibly to another device; round first, because that device may lack the wider dtype."""
    target.copy_(value.to(target.dtype))


def finite_rows(data: Tensor, dim: int, owner: str) -> Tensor:
    """Return data ``(*N, D)``, with its D elements along ``dim``, as rows ``(N, D)`` of float64.

    Raises:
        ValueError: if a row is not finite.
    """
    rows = double(data.detach().movedim(dim, -1).reshape(-1, data.shape[dim]))
    # the sum is not finite if a row is not, and is far cheaper than checking each element
    if rows.numel() and not rows.sum().isfinite():
        bad = int((~rows.isfinite()).any(-1).sum())
        if bad:
            raise ValueError(
                f"{owner}: the rows must be finite, but {bad} of {len(rows)} hold NaN or infinity. Nothing was "
                "changed. Leave those rows out."
            )
    return rows


@torch.no_grad()
def moments(rows: Callable[[], Tensor], like: Tensor, owner: str, *, full: bool = True) -> Moments:
    """Return the statistics of rows; together with those of all other processes, if there are any.

    Args:
        rows: Returns the rows ``(N, D)``, or refuses them.
        like: ``(D,)``, float64, on the device of the rows.
        owner: Name used in error messages.
        full: Whether the whole scatter matrix is needed, or only its diagonal.

    Raises:
        ValueError: if there are no rows at all.
        TypeError, ValueError: as ``rows`` does; also if it does so in another process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return _of_all_processes(rows, like, owner, full)
    own = rows()
    if not len(own):
        raise ValueError(f"{owner}: the data must have at least one row, but got none.")
    return _of_rows(own, full)


def refuse_overflow(scatter: Tensor, owner: str) -> None:
    """Raise an error if the squares of finite rows were not finite."""
    if not scatter.sum().isfinite():
        raise ValueError(
            f"{owner}: the squares of the data must be finite, but some rows are so large that their squares are not. "
            "Nothing was changed. Rescale the data."
        )


def has_spread(mean: Tensor, variance: Tensor) -> Tensor:
    """Return, for each column, whether its values differ by more than the rounding of their mean."""
    rounding = 16 * torch.finfo(mean.dtype).eps * mean
    return variance > rounding.square()


def _of_rows(rows: Tensor, full: bool) -> Moments:
    mean = rows.mean(0)
    centred = rows - mean
    # correct the rounding of the mean by the mean of the rest, or rows that are all equal would have a spread
    rest = centred.mean(0)
    if full:
        scatter = torch.addmm(torch.outer(rest, rest), centred.mT, centred, beta=-float(len(rows)))
    else:
        scatter = (centred - rest).square().sum(0)
    return Moments(mean.new_tensor(float(len(rows))), mean + rest, scatter)


def _of_all_processes(rows: Callable[[], Tensor], like: Tensor, owner: str, full: bool) -> Moments:
    error: Exception | None = None
    d = len(like)
    count, mean, scatter = like.new_zeros(()), like.new_zeros(d), like.new_zeros((d, d) if full else (d,))
    try:
        own = rows()
        if len(own):
            count, mean, scatter = _of_rows(own, full)
    except (TypeError, ValueError) as refused:  # all must fail together, or the others would wait forever
        error = refused
    sums = torch.cat([torch.stack([count.new_tensor(float(error is not None)), count]), count * mean])
    torch.distributed.all_reduce(sums)
    if error is not None:
        raise error
    if sums[0] > 0:
        raise ValueError(
            f"{owner}: the data of all processes must be valid, but {sums[0]:.0f} other processes refused theirs (see "
            "their errors). Nothing was changed."
        )
    if sums[1] < 1:
        raise ValueError(f"{owner}: the data must have at least one row, but all processes together got none.")
    total = sums[2:] / sums[1]
    delta = mean - total
    scatter = scatter + count * (torch.outer(delta, delta) if full else delta.square())
    torch.distributed.all_reduce(scatter)
    return Moments(sums[1], total, scatter)
