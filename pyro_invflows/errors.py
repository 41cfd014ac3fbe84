"""Errors and warnings raised by this library, beyond ``ValueError`` and ``TypeError`` for bad input."""

__all__ = ["ConvergenceError", "ConvergenceWarning", "ReconstructionError"]


class ConvergenceError(RuntimeError):
    """An iterative inverse did not reach its tolerance, so no value is returned."""


class ConvergenceWarning(RuntimeWarning):
    """An iterative inverse did not reach its tolerance and the caller asked to be warned, not stopped."""


class ReconstructionError(RuntimeError):
    """A chain with ``recompute=True`` could not rebuild its input from its output."""
