"""The precision that a layer computes in: outside autocast, and in float32 where half precision is not enough."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyro_invflows.support.computed import compute_tensors
from pyro_invflows.support.modes import is_any_autocast

__all__ = [
    "HALF",
    "at_least_single",
    "full_precision",
    "in_single_precision",
    "is_autocast",
    "outside_autocast",
    "without_autocast",
]

HALF = torch.float16, torch.bfloat16

_Module = TypeVar("_Module", bound=nn.Module)


def is_autocast(value: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    if not is_any_autocast() or value.is_meta:
        return False
    return torch.is_autocast_enabled(value.device.type)


def without_autocast(value: Tensor) -> Any:
    """Return a context that switches autocast off, which would round products to half precision."""
    return torch.autocast(value.device.type, enabled=False) if is_autocast(value) else nullcontext()


def at_least_single(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a hook in float32 if the layer is in half precision, on a copy of the layer; round only the result.

    For equations, decompositions and determinants: torch has no triangular solve or factorisation in half precision,
    and rounding errors on the way would be amplified by a condition number. The result has the dtype of the first
    argument, or of the layer's tensors if there is none. If the hook returns two results, the second one (the aux) is
    not rounded.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any) -> Any:
        value = args[0] if args else next(itertools.chain(self.parameters(), self.buffers()))
        # under autocast an input may be in half precision although the layer is not
        if value.dtype not in HALF or not _is_half(self):
            return method(self, *args)
        with without_autocast(value):
            layer = in_single_precision(self)
            compute_tensors(layer)  # of pruned tensors the copy has only the originals
            result = method(layer, *_in_single(args))
            if isinstance(result, Tensor):
                return result.to(value.dtype)
            return result[0].to(value.dtype), result[1]

    return run


def outside_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a layer's hook outside autocast, in the precision of its parameters.

    For solvers, whose tolerance could not be reached under autocast, and for determinants.
    """

    @functools.wraps(method)
    def run(self: Any, value: Tensor, *args: Any) -> Any:
        if not is_autocast(value) or _is_half(self):
            return method(self, value, *args)
        with without_autocast(value):
            return method(self, *_in_single((value, *args)))

    return run


def full_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Apply both :func:`outside_autocast` and :func:`at_least_single` to a layer's hook."""
    return at_least_single(outside_autocast(method))


def in_single_precision(module: _Module) -> _Module:
    """Return a shallow copy of a module and its children, with half-precision tensors converted to float32.

    Gradients flow back to the original tensors. The module itself stays unchanged: other threads may be using it.
    """
    new = object.__new__(type(module))  # copy.copy would ask parametrised modules for their state, which they refuse
    new.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers"):
        own = module.__dict__[registry]
        new.__dict__[registry] = {name: None if t is None else _single(t) for name, t in own.items()}
    new.__dict__["_modules"] = {
        name: None if child is None else in_single_precision(child) for name, child in module._modules.items()
    }
    return new


def _is_half(module: nn.Module) -> bool:
    """Whether a tensor of the module, or of one of its children, is in half precision."""
    own = (*module._parameters.values(), *module._buffers.values())  # parameters() cannot be compiled
    if any(t is not None and t.dtype in HALF for t in own):
        return True
    return any(_is_half(child) for child in module._modules.values() if child is not None)


def _single(value: Tensor) -> Tensor:
    return value.float() if value.dtype in HALF else value


def _in_single(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_single(a) if isinstance(a, Tensor) else a for a in args)
