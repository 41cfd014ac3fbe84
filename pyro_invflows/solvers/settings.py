"""The settings of solvers, chosen by a layer or by its user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from pyro_invflows.support.checks import is_int

__all__ = ["Settings", "check_solver", "chosen_settings"]

_ON_FAILURE = ("raise", "warn", "nan")

_Settings = TypeVar("_Settings", bound="Settings")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that all solvers share; not a solver itself.

    A row has converged when ``|f(x) - y| <= atol + rtol * |y|`` in the maximum norm.

    Args:
        atol: Absolute tolerance; the default is ``eps ** 0.75`` of the dtype (2e-12 in float64, 6e-6 in float32).
        rtol: Relative tolerance; the default likewise.
        max_steps: Maximum number of steps. By default the layer that solves decides, or else the class attribute
            ``default_max_steps``.
        on_failure: What happens to rows that did not converge: ``"raise"`` a :class:`ConvergenceError`, ``"warn"``
            and return them as they are, or set them to ``"nan"``.

    Raises:
        ValueError: if a setting is out of range.
    """

    atol: float | None = None
    rtol: float | None = None
    max_steps: int | None = None
    on_failure: str = "raise"

    default_max_steps = 100  # without an annotation, hence not a setting

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("atol", "rtol"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{owner}: {name} must be None or at least 0, but got {value!r}.")
        if self.max_steps is not None and (not is_int(self.max_steps) or self.max_steps < 0):
            raise ValueError(f"{owner}: max_steps must be None or an int of at least 0, but got {self.max_steps!r}.")
        if self.on_failure not in _ON_FAILURE:
            raise ValueError(f"{owner}: on_failure must be one of {_ON_FAILURE}, but got {self.on_failure!r}.")

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """Return ``(atol, rtol)``, with defaults that depend on the dtype."""
        default = torch.finfo(dtype).eps ** 0.75
        return default if self.atol is None else self.atol, default if self.rtol is None else self.rtol

    def bound(self, own: int | None = None) -> int:
        """Return the maximum number of steps: as set, else the caller's ``own``, else the solver's default."""
        if self.max_steps is not None:
            return self.max_steps
        return self.default_max_steps if own is None else own


def check_solver(solver: Any, kinds: Sequence[type[Settings]], owner: str) -> None:
    """Check that a solver is an instance of one of ``kinds``.

    Raises:
        TypeError: if it is a class, plain :class:`Settings`, another solver, or anything else.
    """
    if not isinstance(solver, tuple(kinds)):
        *others, last = [f"solvers.{kind.__name__}(...)" for kind in kinds]
        wanted = f"{', '.join(others)} or {last}" if others else last
        given = f"the class {solver.__name__}" if isinstance(solver, type) else repr(solver)
        raise TypeError(f"{owner}: solver must be {wanted}, but got {given}.")


def chosen_settings(
    default: _Settings,
    solver: _Settings | None,
    owner: str,
    *,
    kinds: Sequence[type[Settings]] | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
    on_failure: str | None = None,
) -> _Settings:
    """Return the settings that the arguments of a layer's constructor specify.

    Args:
        default: The layer's solver if nothing is given.
        solver: The solver that was given, if any.
        owner: Name used in error messages.
        kinds: The classes that are accepted; by default that of ``default``.
        atol: As in :class:`Settings`; if left out, that of ``default``. The same holds for the next three.
        rtol: As in :class:`Settings`.
        max_steps: As in :class:`Settings`.
        on_failure: As in :class:`Settings`.

    Raises:
        TypeError: if the solver is of another class.
        ValueError: if both a solver and settings were given, or a setting is out of range.
    """
    single = {"atol": atol, "rtol": rtol, "max_steps": max_steps, "on_failure": on_failure}
    single = {name: value for name, value in single.items() if value is not None}
    if solver is None:
        return replace(default, **single) if single else default  # type: ignore[arg-type]
    check_solver(solver, kinds or [type(default)], owner)
    if single:
        together = ", ".join(f"{name}={value!r}" for name, value in single.items())
        raise ValueError(
            f"{owner}: a solver has its own settings, so give either solver=... or settings, but got both: "
            f"{together}. Write solver={type(solver).__name__}({together})."
        )
    return solver
