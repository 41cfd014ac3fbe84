"""What a solver returns, and what happens to the rows that it could not solve."""

from __future__ import annotations

import warnings
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_invflows.solvers.settings import Settings
from pyro_invflows.support.errors import ConvergenceError, ConvergenceWarning
from pyro_invflows.support.modes import in_functorch, is_tracing

__all__ = ["Solution", "Status", "finish", "in_transform", "is_blind", "row_max", "where_rows"]


class Status(IntEnum):
    """How the iteration ended for a row."""

    CONVERGED = 0
    MAX_STEPS = 1
    NONFINITE = 2
    NO_BRACKET = 3


#: What each status means and what to do about it, for the error message.
REMEDIES = {
    Status.MAX_STEPS: "Allow more steps (max_steps), use a stronger solver (Newton rather than Anderson or "
    "FixedPoint), use float64, loosen atol and rtol, or shrink the parameters.",
    Status.NONFINITE: "The iterates overflowed: use float64 or a damped Newton, shrink the parameters, or keep y "
    "within the range of the training data.",
    Status.NO_BRACKET: "No sign change was found: y lies outside the range of the transform, or the transform is not "
    "monotone.",
}


class Solution(NamedTuple):
    """The result of an iteration, row by row (a row is one element of the batch).

    Attributes:
        value: The last iterate, in the shape of the starting point.
        status: A :class:`Status` for each row.
        num_steps: Steps that each row took.
        residual: Largest absolute entry of each row's residual.
    """

    value: Tensor
    status: Tensor
    num_steps: Tensor
    residual: Tensor

    @property
    def converged(self) -> Tensor:
        """Whether each row converged."""
        return self.status == int(Status.CONVERGED)  # dynamo cannot compare with an enum


def is_blind(value: Tensor) -> bool:
    """Whether the value cannot be inspected: torch is compiling or tracing, or it is on the meta device."""
    return torch.compiler.is_compiling() or value.is_meta or is_tracing()


def in_transform(value: Tensor) -> bool:
    """Whether the value cannot be inspected, or ``torch.func`` may hide it."""
    return is_blind(value) or in_functorch()


def row_max(value: Tensor, event_dim: int) -> Tensor:
    """Return the largest absolute entry of each row; NaN for a row with a NaN."""
    value = value.abs()
    return value if not event_dim else value.flatten(-event_dim).amax(-1)


def where_rows(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Select row by row: ``mask`` has the leading dimensions of ``a`` and ``b``."""
    return torch.where(mask.reshape(mask.shape + (1,) * (a.dim() - mask.dim())), a, b)


def finish(solution: Solution, owner: str, settings: Settings, *, given: Tensor | None = None) -> Tensor:
    """Return the solution's value, and treat rows that failed as ``settings.on_failure`` says.

    Rows whose ``given`` data are not finite are not failures of the solver: they become NaN, as in any torch function.
    While compiling and under ``torch.func`` no error can be raised: rows that failed become NaN.

    Args:
        solution: What the solver returned.
        owner: Name used in error messages.
        settings: The solver's settings.
        given: The data y, in the shape of the value.

    Raises:
        ConvergenceError: if rows failed and ``on_failure="raise"``.
    """
    failed = ~solution.converged
    hidden = in_transform(solution.value)
    if not hidden and not failed.any():
        return solution.value
    value = where_rows(failed, torch.full_like(solution.value, torch.nan), solution.value)
    if hidden or settings.on_failure == "nan":
        return value
    if given is not None:  # for data that are not finite the solver's value means nothing, whatever the settings say
        event_dim = solution.value.dim() - failed.dim()
        failed = failed & row_max(given, event_dim).isfinite()
    if not failed.any():
        return value
    message = _message(solution, failed, owner, settings)
    if settings.on_failure == "warn":
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return where_rows(failed, solution.value, value)
    error = ConvergenceError(message)
    error.solution = solution
    raise error


def _message(solution: Solution, failed: Tensor, owner: str, settings: Settings) -> str:
    count = int(failed.sum().item())
    residual = solution.residual[failed]
    finite = residual[residual.isfinite()]
    worst = f"{finite.max().item():.2g}" if finite.numel() else "not finite"
    steps = int(solution.num_steps[failed].max().item())
    atol, rtol = settings.tolerances(solution.value.dtype)
    kinds = solution.status[failed].unique().tolist()
    return (
        f"{owner}: the inverse did not converge in {count} of {failed.numel()} rows ({count / failed.numel():.3g} of "
        f"the batch) after {steps} steps; worst residual in y: {worst}, accepted: {atol:.2g} + {rtol:.2g} |y|. "
        + " ".join(REMEDIES[Status(kind)] for kind in kinds)
    )
