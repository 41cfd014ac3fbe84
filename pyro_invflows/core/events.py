"""Events: the constraint they stand for, the axis a layer acts along, sums over them, points out of reach."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_invflows.support.checks import integer

__all__ = ["event_constraint", "event_dims", "is_constant", "negative_axis", "out_of_reach", "sum_rightmost"]

_REAL_EVENTS: dict[int, constraints.Constraint] = {n: constraints.independent(constraints.real, n) for n in range(1, 5)}
_REAL_EVENTS[0] = constraints.real
_REAL_EVENTS[1] = constraints.real_vector


def event_constraint(event_dim: int) -> constraints.Constraint:
    """Return the constraint "all of R^n" for events with ``event_dim`` dimensions."""
    return _REAL_EVENTS[event_dim]


def negative_axis(dim: int, owner: str) -> int:
    """Check a layer's ``dim``, which must count from the right."""
    dim = integer(dim, "dim", owner)
    if not -4 <= dim <= -1:
        raise ValueError(
            f"{owner}: dim must be between -4 and -1, but got {dim}. It counts from the right and sets the "
            "event: -1 for vectors, -3 for the channels of (C, H, W)."
        )
    return dim


def sum_rightmost(value: Tensor, count: int) -> Tensor:
    """Sum the last ``count`` dimensions; torch's own helper fails on empty batches."""
    return value.sum(tuple(range(-count, 0))) if count else value


def is_constant(constraint: constraints.Constraint) -> bool:
    """Whether a constraint holds no tensors, which a layer would exchange when it is moved or loaded."""
    inner = getattr(constraint, "base_constraint", None)
    return (inner is None or is_constant(inner)) and not any(isinstance(v, Tensor) for v in vars(constraint).values())


def out_of_reach(y: Tensor, codomain: constraints.Constraint) -> Tensor | None:
    """Return where ``y`` lies outside the closed ``codomain`` by more than rounding; None if that has no bounds.

    Half of the digits count as rounding: ``sqrt(eps)`` of the dtype (3e-4 in float32, 1e-8 in float64), times half the
    width of an interval or times ``|bound|`` of a half-line. A layer that saturates puts its samples on the border, and
    the layers behind it return them with an error that grows with their number, the size of an event (1000 eps behind
    four rotations of 64 elements) and the tolerance of solvers (``eps ** 0.75``). A NaN is not out of reach.
    """
    lower: Any = getattr(codomain, "lower_bound", None)
    upper: Any = getattr(codomain, "upper_bound", None)
    if lower is None and upper is None:
        return None
    slack = torch.finfo(y.dtype).eps ** 0.5
    if lower is None:
        return y > upper + slack * abs(upper)
    if upper is None:
        return y < lower - slack * abs(lower)
    slack = slack * (upper - lower) / 2
    return (y < lower - slack) | (y > upper + slack)


def event_dims(parts: Sequence[Transform]) -> list[int]:
    """Count the event dimensions of a whole in front of each of its parts, and behind the last.

    The fewest with which no part has more than the whole. The difference to a part's own is what counts as batch
    dimensions to the part and as event dimensions to the whole: over these its log-det is summed.
    """
    changes = [part.codomain.event_dim - part.domain.event_dim for part in parts]
    gained = list(accumulate(changes, initial=0))
    needed = [part.domain.event_dim - before for part, before in zip(parts, gained, strict=False)]
    first = max([0, *needed])
    return [first + before for before in gained]
