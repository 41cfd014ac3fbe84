"""Roots of ``x + g(x) = y`` for a contraction g: cheap steps, then a fixed-point iteration that cannot fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_invflows.solvers.iterative import FixedPoint
from pyro_invflows.solvers.settings import Settings
from pyro_invflows.solvers.solution import Solution, is_blind, where_rows
from pyro_invflows.support.modes import holds_anywhere

__all__ = ["FoldedEquation", "chord_steps", "finish_by_fixed_point", "fixed_point_steps"]

#: Steps without a check of the residual, then the maximum number of steps with one.
_BLIND_STEPS, _CHORD_STEPS = 4, 12
#: Maximum number of fixed-point steps for any contraction; the constant 0.99 needs 4300 in float64.
_FIXED_POINT_STEPS = 20_000
#: Number of rows whose slopes are averaged for these steps.
_SLOPE_ROWS = 32


class FoldedEquation(NamedTuple):
    """The equation ``s + fold h(s) = c``, row by row; its Jacobian is a function of the activations' slopes at s."""

    hidden: Callable[[Tensor], Tensor]
    fold: Tensor
    slopes: Callable[[Tensor], tuple[Tensor, ...]]
    jacobian: Callable[[tuple[Tensor, ...]], Tensor]

    def residual(self, s: Tensor, c: Tensor, h: Tensor | None = None) -> Tensor:
        return s + F.linear(self.hidden(s) if h is None else h, self.fold) - c


def chord_steps(
    equation: FoldedEquation,
    s: Tensor,
    c: Tensor,
    unit: Tensor,
    gather: bool = True,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take Newton steps with the same matrix for all rows, that of their mean slopes: at most two products each.

    Args:
        equation: The equation.
        s: Starting point.
        c: Right-hand side.
        unit: Change of s that corresponds to a change of 1 in y.
        gather: Whether the equation may be evaluated at some of the rows only.
        limit: Largest residual that is accepted, if this may be below rounding error.

    Returns:
        The points; which of them solve the equation to rounding error (and to the limit); and h there, if all do.
    """
    some = (s[:_SLOPE_ROWS] if gather and s.dim() == 2 else s).nan_to_num(0)  # a non-finite row must not spoil the mean
    mean = tuple(slope.reshape(-1, slope.shape[-1]).mean(0) for slope in equation.slopes(some))
    inverse = torch.linalg.inv_ex(equation.jacobian(mean))[0].mT
    keep, pull = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device) - inverse, -equation.fold.mT @ inverse
    aim = c @ inverse
    for _ in range(_BLIND_STEPS):
        if s.dim() == 2:
            s = torch.addmm(torch.addmm(aim, s, keep), equation.hidden(s), pull)
        else:
            s = aim + s @ keep + equation.hidden(s) @ pull
    # the rounding error is relative to the terms
    goal = torch.maximum(c.abs().amax(-1), s.abs().amax(-1)).add_(unit).mul_(8 * torch.finfo(c.dtype).eps)
    if limit is not None:
        goal = torch.minimum(goal, limit)
    r = equation.residual(s, c)
    error = r.abs().amax(-1)
    todo = error > goal
    for _ in range(_CHORD_STEPS):
        if not todo.any():
            break
        new = s - r @ inverse
        h = equation.hidden(new)
        new_r = equation.residual(new, c, h)
        new_error = new_r.abs().amax(-1)
        if (new_error <= goal).all():
            return new, torch.ones_like(todo), h
        better = todo & (new_error < error)
        s, r, error = where_rows(better, new, s), where_rows(better, new_r, r), torch.where(better, new_error, error)
        todo = better & (error > goal)
    return s, error <= goal, None


def fixed_point_steps(lipschitz: float, dtype: torch.dtype) -> int:
    """Return the number of fixed-point steps that reduce any error to rounding; at most 20 000."""
    steps = math.ceil(math.log(1e-3 * torch.finfo(dtype).eps) / math.log(lipschitz))
    return min(steps, _FIXED_POINT_STEPS)


def finish_by_fixed_point(
    first: Solution,
    settings: Settings,
    residual: Callable[..., Tensor],
    start: Tensor,
    args: tuple[Tensor, ...],
    lipschitz: float,
    unit: Tensor | float = 1.0,
    **how: Any,
) -> Solution:
    """Solve the rows that an accelerated method left unsolved by fixed-point iteration, which always converges.

    Args:
        first: The solution so far.
        settings: Settings whose tolerances are used.
        residual: The residual, in units of ``unit``.
        start: Starting point of the iteration.
        args: Passed to the residual.
        lipschitz: The contraction's constant, which determines the number of steps.
        unit: What the residual was divided by.
        **how: Passed to the solver.
    """
    # while compiling, the values are unknown: if all rows have converged, the loop below ends before its first round
    if not torch.compiler.is_compiling() and (is_blind(start) or not holds_anywhere(~first.converged)):
        return first
    again = where_rows(first.converged, first.value, start) / unit
    steps = fixed_point_steps(lipschitz, start.dtype)
    solver = FixedPoint(atol=settings.atol, rtol=settings.rtol, max_steps=steps)
    second = solver(lambda x, *args: residual(x * unit, *args), again, *args, **how)
    value = where_rows(first.converged, first.value, second.value * unit)
    return second._replace(value=value, num_steps=first.num_steps + second.num_steps)
