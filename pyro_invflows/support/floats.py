"""The neighbours of a number among the floats of a dtype."""

from __future__ import annotations

import functools
import math

import torch

__all__ = ["above", "below"]


def _spacing(value: float, info: torch.finfo) -> float:
    """Return the spacing of the floats of a dtype around ``value``."""
    smallest = info.tiny * info.eps
    return max(info.eps * 2.0 ** (math.frexp(value)[1] - 1), smallest) if value else smallest


def _next_below(value: float, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    spacing = _spacing(value, info)
    nearest = round(value / spacing) * spacing
    spacing = _spacing(nearest, info)
    return nearest - (
        spacing / 2 if math.frexp(nearest)[0] == 0.5 else spacing
    )  # they are twice as dense below a power of 2


_next_below_once = functools.lru_cache(maxsize=256)(_next_below)  # the compiler cannot trace it


def below(value: float, dtype: torch.dtype) -> float:
    """Return the largest float of ``dtype`` below ``value``."""
    return _next_below(value, dtype) if torch.compiler.is_compiling() else _next_below_once(value, dtype)


def above(value: float, dtype: torch.dtype) -> float:
    """Return the smallest float of ``dtype`` above ``value``."""
    return -below(-value, dtype)
