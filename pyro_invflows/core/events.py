"""Event dimensions: the constraint they stand for, the axis a layer acts along, sums over them."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import constraints

__all__ = ["event_constraint", "negative_axis", "sum_rightmost"]

_REAL_EVENTS: dict[int, constraints.Constraint] = {n: constraints.independent(constraints.real, n) for n in range(1, 5)}
_REAL_EVENTS[0] = constraints.real
_REAL_EVENTS[1] = constraints.real_vector


def event_constraint(event_dim: int) -> constraints.Constraint:
    """Return the constraint "all of R^n" for events with ``event_dim`` dimensions."""
    return _REAL_EVENTS[event_dim]


def negative_axis(dim: int, owner: str) -> int:
    """Check a layer's ``dim``, which must count from the right."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{owner}: dim must be an int, but got {dim!r}.")
    if not -4 <= dim <= -1:
        raise ValueError(
            f"{owner}: dim must be between -4 and -1, but got {dim}. It counts from the right and sets the "
            "event: -1 for vectors, -3 for the channels of (C, H, W)."
        )
    return dim


def sum_rightmost(value: Tensor, count: int) -> Tensor:
    """Sum the last ``count`` dimensions; torch's own helper fails on empty batches."""
    return value.sum(tuple(range(-count, 0))) if count else value
