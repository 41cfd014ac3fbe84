"""Errors and warnings raised by this library, beyond ``ValueError`` and ``TypeError`` for bad input."""

from __future__ import annotations

from typing import Any

__all__ = ["ConvergenceError", "ConvergenceWarning", "ReconstructionError"]


class ConvergenceError(RuntimeError):
    """An iterative inverse did not reach its tolerance, so no value is returned.

    The message names the layer, the steps taken, the worst residual, the fraction of the batch that failed, and a
    remedy.
    """

    #: The rejected :class:`~pyro_invflows.solvers.Solution`; its ``status`` says which rows failed.
    solution: Any = None


class ConvergenceWarning(RuntimeWarning):
    """An iterative inverse did not reach its tolerance, and the caller asked for a warning instead of an error."""


class ReconstructionError(RuntimeError):
    """A chain with ``recompute=True`` could not rebuild its input from its output."""
