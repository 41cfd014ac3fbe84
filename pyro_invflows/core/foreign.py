"""Transforms of torch and Pyro inside the layers here: what they hold, and how to keep their caches out of the way."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import ComposeTransform, IndependentTransform, Transform
from torch.distributions.transforms import _InverseTransform

from pyro_invflows.core.bijection import Bijection

__all__ = ["alone", "hidden_tensors", "inner_modules", "may_hide_tensors", "uncached"]


def inner_modules(transform: Transform) -> list[nn.Module]:
    """Return the modules inside torch's own wrappers, which are not modules themselves."""
    if isinstance(transform, nn.Module):
        return [transform]
    if isinstance(transform, IndependentTransform):
        return inner_modules(transform.base_transform)
    if isinstance(transform, _InverseTransform):
        return inner_modules(transform.inv)
    parts = getattr(transform, "transforms", None) or getattr(transform, "parts", None) or ()
    return [module for part in parts if isinstance(part, Transform) for module in inner_modules(part)]


def uncached(part: Transform) -> Transform:
    """Return a transform that is no module without its one-value cache, which cannot be copied and never forgets."""
    try:
        return part.with_cache(0)
    except NotImplementedError:
        return part


def alone(part: Transform) -> Transform:
    """Return a foreign transform for one evaluation: a shallow copy, whose one-value cache nobody else reads.

    Such caches know neither of changed parameters nor of gradients, and threads mix them up.
    """
    if isinstance(part, Bijection) or torch.compiler.is_compiling():
        return part
    if isinstance(part, _InverseTransform):
        return alone(part.inv).inv
    own = copy.copy(part)
    own._cached_x_y = None, None
    if isinstance(own, IndependentTransform):
        own.base_transform = alone(own.base_transform)
    elif isinstance(own, ComposeTransform):
        own.parts = [alone(inner) for inner in own.parts]
    return own


def may_hide_tensors(transform: Transform) -> bool:
    """Whether :func:`hidden_tensors` may find any, now or later."""
    if isinstance(transform, Bijection):
        return type(transform)._foreign_tensors is not Bijection._foreign_tensors
    return True


def hidden_tensors(transform: Transform) -> list[Tensor | None]:
    """Return the tensors that a transform and those inside it hold outside of registered modules.

    Conditioned transforms of Pyro, for example, keep their networks in closures.
    """
    found: list[Tensor | None] = []
    _collect(transform, found, set(), listed=isinstance(transform, nn.Module))
    return found


def _collect(value: Any, found: list[Tensor | None], seen: set[int], listed: bool = False) -> None:
    """Walk what a transform holds; ``listed`` says that a module's own tensors are known to whoever asks."""
    if isinstance(value, Tensor):
        found.append(value)
        return
    if id(value) in seen or not _is_walked(value):
        return
    seen.add(id(value))
    if isinstance(value, Bijection):
        found += [] if listed else [*value.parameters(), *value.buffers()]
        found += value._foreign_tensors()
    elif isinstance(value, nn.Module):
        found += [] if listed else [*value.parameters(), *value.buffers()]
        if isinstance(value, Transform):
            for name, held in vars(value).items():
                if not name.startswith("_cached") and isinstance(held, _CALLABLES):
                    _collect(held, found, seen)
    elif isinstance(value, Transform):
        modules = inner_modules(value)  # Chain and Inverted register these
        for name, held in vars(value).items():
            if name.startswith("_cached") or (name == "_inv" and not isinstance(value, _InverseTransform)):
                continue
            _collect(held, found, seen, listed=any(held is m for m in modules))
    elif isinstance(value, functools.partial):
        for held in (value.func, *value.args, *value.keywords.values()):
            _collect(held, found, seen)
    elif isinstance(value, types.MethodType):
        _collect(value.__self__, found, seen)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                _collect(cell.cell_contents, found, seen)
            except ValueError:  # an empty cell
                continue
    else:  # the parts of a compose, which are registered, or anything else
        for held in value:
            _collect(held, found, seen, listed=isinstance(held, Transform))


_CALLABLES = (functools.partial, types.MethodType, types.FunctionType)


def _is_walked(value: Any) -> bool:
    return isinstance(value, (Transform, nn.Module, list, tuple, *_CALLABLES))
