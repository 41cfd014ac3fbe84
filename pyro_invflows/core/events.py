"""Helpers for events: their constraints and axes, sums over them, and points out of reach."""

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
            f"{owner}: dim must be between -4 and -1, but got {dim}. It counts from the right and determines "
            "the event: -1 for vectors, -3 for the channels of (C, H, W)."
        )
    return dim


def sum_rightmost(value: Tensor, count: int) -> Tensor:
    """Sum the last ``count`` dimensions; torch's own helper fails on empty batches."""
    return value.sum(tuple(range(-count, 0))) if count else value


def is_constant(constraint: constraints.Constraint) -> bool:
    """Whether a constraint holds no tensors, which a layer would replace when it is moved or loaded."""
    inner = getattr(constraint, "base_constraint", None)
    return (inner is None or is_constant(inner)) and not any(isinstance(v, Tensor) for v in vars(constraint).values())


def out_of_reach(y: Tensor, codomain: constraints.Constraint) -> Tensor | None:
    """Return a mask of the elements of ``y`` outside the closed ``codomain``; None if the codomain has no bounds.

    Outside means by more than rounding, for which half of the digits are allowed: ``sqrt(eps)`` of the dtype (3e-4 in
    float32, 1e-8 in float64), times half the width of an interval or ``|bound|`` of a half-line. A layer that saturates
    puts samples on the boundary, and inverting the layers behind it brings them back with an error that grows with the
    number of layers, the size of an event (1000 eps behind four rotations of 64 elements) and the tolerance of solvers
    (``eps ** 0.75``). A NaN is not out of reach.
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
    """Return the number of event dimensions of a composition in front of each part, and behind the last.

    They are the smallest numbers with which no part has more event dimensions than the whole. Where the whole has more
    than a part, the extra dimensions are batch dimensions of the part, and its log-det is summed over them.
    """
    changes = [part.codomain.event_dim - part.domain.event_dim for part in parts]
    gained = list(accumulate(changes, initial=0))
    needed = [part.domain.event_dim - before for part, before in zip(parts, gained, strict=False)]
    first = max([0, *needed])
    return [first + before for before in gained]
