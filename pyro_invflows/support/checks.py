"""Argument checks shared by many constructors. Each error says what must hold and what was given."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from pyro.distributions import ConditionalTransform
from torch import Tensor, nn

__all__ = [
    "activation_constructor",
    "derivative_order",
    "described",
    "floating_tensor",
    "integer",
    "invertible_matrix",
    "is_int",
    "is_size",
    "one_number",
    "positive_int",
    "positive_number",
    "real_number",
    "size_only",
    "widths",
]


def is_int(value: Any) -> bool:
    """Whether a value is an integer (of Python, numpy or torch) and not a bool."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def integer(value: Any, name: str, owner: str) -> int:
    """Check that a value is an integer, and return it as a Python int."""
    if not is_int(value):
        raise TypeError(f"{owner}: {name} must be an int, but got {value!r}.")
    return operator.index(value)


def positive_int(value: Any, name: str, owner: str, minimum: int = 1) -> int:
    """Check that a size is an integer of at least ``minimum``, and return it as a Python int."""
    value = integer(value, name, owner)
    if value < minimum:
        raise ValueError(f"{owner}: {name} must be at least {minimum}, but got {value}.")
    return value


def widths(values: Any, owner: str, name: str = "hidden_dims", minimum: int = 0) -> list[int]:
    """Check the widths of a network's hidden layers. If ``minimum`` is 0, a layer may have no units."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{owner}: {name} must be a sequence of ints, such as (64, 64), but got {values!r}.")
    return [positive_int(value, f"each of {name}", owner, minimum) for value in values]


def activation_constructor(value: Any, owner: str) -> Any:
    """Check the constructor of a network's activations."""
    if isinstance(value, nn.Module) or not callable(value):
        raise TypeError(f"{owner}: activation must be a constructor, such as nn.Tanh, but got {value!r}.")
    if value in (torch.tanh, torch.sin, torch.relu, torch.sigmoid):
        raise TypeError(f"{owner}: activation must be a constructor of modules, such as nn.Tanh, not a function.")
    return value


def floating_tensor(value: Any, name: str, owner: str) -> Tensor:
    """Check that a value is a floating point tensor, and return it."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{owner}: {name} must be a floating point tensor, but got {kind}. Convert it with torch.as_tensor."
        )
    return value


def invertible_matrix(value: Any, owner: str) -> Tensor:
    """Check that a value is an invertible matrix (D, D), and return it in float64 without its graph."""
    floating_tensor(value, "matrix", owner)
    if value.dim() != 2 or value.shape[0] != value.shape[1]:
        raise ValueError(f"{owner}: the matrix must have the shape (D, D), but got {tuple(value.shape)}.")
    if not value.isfinite().all():
        raise ValueError(f"{owner}: the matrix must be finite, but it holds NaN or infinity.")
    matrix = value.detach().double()
    s = torch.linalg.svdvals(matrix)
    if s.min() <= s.max() * len(s) * torch.finfo(value.dtype).eps:
        raise ValueError(
            f"{owner}: the matrix must be invertible, but its singular values range from {s.min():.3g} to "
            f"{s.max():.3g}."
        )
    return matrix


def derivative_order(order: int, owner: str) -> int:
    """Check the derivative order that an inverse is asked to support."""
    if order not in (1, 2):
        raise ValueError(f"{owner}: order must be 1 or 2, but got {order!r}.")
    return order


def described(value: Any) -> str:
    """Describe, in an error message, what was given in place of a transform; hint at a class or factory not called."""
    call = value.func if isinstance(value, partial) else value
    if isinstance(call, type):
        return f"the class {call.__name__}; did you mean {call.__name__}(...)?"
    if callable(call) and not isinstance(call, nn.Module) and hasattr(call, "__name__"):
        return "a function." if call.__name__ == "<lambda>" else f"a function; did you mean {call.__name__}(...)?"
    if isinstance(value, ConditionalTransform):
        return f"{type(value).__name__}. Condition it first, with .condition(context), or give it to Flow."
    if isinstance(value, (int, float, str)):
        return f"{value!r}."
    return f"{type(value).__name__}."


def real_number(value: float, name: str, owner: str) -> float:
    """Check that a value is a real number, and return it as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}: {name} must be a number, but got {value!r}.")
    return float(value)


def positive_number(value: float, name: str, owner: str) -> float:
    """Check that a value is a positive, finite number, and return it as a float."""
    number = real_number(value, name, owner)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{owner}: {name} must be positive and finite, but got {value!r}.")
    return number


def is_size(value: float | None, owner: str) -> bool:
    """Whether a factory's first argument is ``input_dim`` or was left out; if not, it is another number."""
    if value is None or (isinstance(value, numbers.Integral) and not isinstance(value, bool)):
        positive_int(1 if value is None else int(value), "input_dim", owner)
        return True
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}: input_dim must be an int, but got {value!r}.")
    return False


def size_only(value: float | None, owner: str, hint: str = "") -> None:
    """Check that a factory's first argument is ``input_dim`` or was left out."""
    if not is_size(value, owner):
        raise TypeError(f"{owner}: input_dim must be an int, but got the number {value!r}.{hint}")


def one_number(value: float | None, keyword: float | None, default: float, name: str, owner: str) -> float:
    """Return the only number that a layer takes, given by keyword or as a float in place of ``input_dim``."""
    if is_size(value, owner):
        return default if keyword is None else keyword
    if keyword is not None:
        raise TypeError(f"{owner}: {name} was given twice, as {value!r} and as {name}={keyword!r}.")
    return value  # type: ignore[return-value]
