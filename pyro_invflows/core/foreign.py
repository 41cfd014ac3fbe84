"""Conversion of any torch or Pyro transform to a layer, once, where it enters the library.

torch's own wrappers are replaced by structures of this library around the same contents; each structure registers the
wrapper that it replaces (:func:`stands_for`). Any other transform becomes a :class:`Foreign` layer. Code behind this
door handles layers only, and never asks again what kind of transform it has.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from numbers import Number
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.transforms import ReshapeTransform

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.events import out_of_reach
from pyro_invflows.support.checks import described, is_int

__all__ = ["Foreign", "as_bijection", "stands_for"]


def as_bijection(transform: Any, owner: str = "as_bijection") -> Bijection:
    """Return a transform as a layer: itself if it is one, else a structure or a :class:`Foreign` layer around it.

    Args:
        transform: Any torch ``Transform``.
        owner: Name used in the error message.

    Raises:
        TypeError: if it is not a transform.

    Example:
        >>> from torch.distributions import ComposeTransform, ExpTransform
        >>> from pyro_invflows.core.foreign import as_bijection
        >>> as_bijection(ComposeTransform([diagonal(3), ExpTransform()]))
        Chain(
          (0): Diagonal(3)
          (1): Foreign(ExpTransform())
        )
    """
    if isinstance(transform, Bijection):
        return transform
    if not isinstance(transform, Transform):
        raise TypeError(f"{owner}: expected a transform, got {described(transform)}")
    for wrapper, build in _STRUCTURES.items():
        if isinstance(transform, wrapper):
            return build(transform)
    return Foreign(transform)


#: torch's wrappers, each with the function that builds the structure in its place.
_STRUCTURES: dict[type[Transform], Callable[[Any], Bijection]] = {}


def stands_for(wrapper: type[Transform], build: Callable[[Any], Bijection]) -> None:
    """Register the function that builds the structure in place of one of torch's wrappers."""
    _STRUCTURES[wrapper] = build


class Foreign(Bijection):
    """A torch or Pyro transform, as a layer.

    Its modules are registered, and its tensors become buffers. Each evaluation uses a shallow copy, so that the
    transform's own one-value cache, which knows nothing of changed parameters or of gradient modes, is neither read nor
    filled.

    Contents other than modules, tensors, numbers and constraints (a closure, say) cannot be inspected. In that case
    neither this layer nor a structure that holds it remembers anything, and :class:`~pyro_invflows.Chain` does not
    recompute; the ``repr`` says so.

    **Forward**, **Inverse**, **Log-det**: those of the transform; if it has no inverse, its own error is raised. If
    the codomain is an interval or a half-line, a y outside it has the log-det +inf: torch's SigmoidTransform clamps it.

    Args:
        transform: The transform. A module is shared; any other transform is copied.
        cache_size: As in :class:`~pyro_invflows.Bijection`.

    Shape:
        That of the transform; the log-det has the shape that the transform gives it.
    """

    def __init__(self, transform: Transform, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self._held: Any = None  # a transform that is not a module
        self._tensors: dict[str, str] = {}  # attribute of the transform -> name of the buffer
        if isinstance(transform, nn.Module):
            self.transform = transform
        else:
            self._held = _without_cache(transform)
        for name, value in _contents(transform):
            if isinstance(value, Tensor):
                self._tensors[name] = f"tensor_{name}"
                self.register_buffer(f"tensor_{name}", value)
            elif isinstance(value, nn.Module):
                self.add_module(f"module_{name}", value)
            elif not _is_plain(value, transform):
                self.opaque = True
                for i, module in enumerate(_modules_in(value)):
                    self.add_module(f"module_{name}_{i}", module)

    @property
    def _inner(self) -> Any:
        return self.transform if self._held is None else self._held

    def _copy(self) -> Any:
        """Return the transform for one evaluation."""
        own = _without_cache(self._inner)
        for name, buffer in self._tensors.items():
            own.__dict__[name] = self._buffers[buffer]
        return own

    def _apply(self, fn: Any, recurse: bool = True) -> Bijection:
        super()._apply(fn, recurse)
        if self._held is not None:
            for name, buffer in self._tensors.items():
                self._held.__dict__[name] = self._buffers[buffer]
        return self

    @property
    def label(self) -> str:
        return type(self._inner).__name__

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self._inner.domain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self._inner.codomain

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        return self._inner.bijective

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return getattr(self._inner, "exact", True)

    @property
    def sign(self) -> Any:
        return self._inner.sign

    @property
    def batch_shape(self) -> torch.Size:
        return getattr(self._inner, "batch_shape", torch.Size())

    @property
    def input_dim(self) -> int | None:  # type: ignore[override]
        """Event size that a Pyro layer requires; None if it is not known."""
        size: Any = getattr(self._inner, "input_dim", None)
        return operator.index(size) if is_int(size) else None

    def _check(self, value: Tensor, inverse: bool) -> None:
        if not isinstance(value, Tensor):  # the dtype is left to the transform
            self._refuse_kind(value)
        event_dim = (self.codomain if inverse else self.domain).event_dim
        if value.dim() < event_dim or (event_dim == 1 and self.input_dim not in (None, value.shape[-1])):
            self.check_event(value.shape, inverse)

    def _shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        return torch.Size((self._inner.inverse_shape if inverse else self._inner.forward_shape)(shape))

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        """Follow known event sizes through the transform; sizes that it may change are dropped."""
        inner = self._inner
        if isinstance(inner, ReshapeTransform):
            here, there = (inner.out_shape, inner.in_shape) if inverse else (inner.in_shape, inner.out_shape)
            for axis, n in sizes.items():
                if -len(here) <= axis and here[axis] != n:
                    raise ValueError(f"ReshapeTransform expects {here[axis]} elements along dim {axis}, but got {n}.")
            return {i - len(there): n for i, n in enumerate(there)}
        source = (inner.codomain if inverse else inner.domain).event_dim
        sizes = dict(sizes)
        size = self.input_dim
        if source == 1 and size is not None and sizes.setdefault(-1, size) != size:
            raise ValueError(
                f"{type(inner).__name__} works on events with {size} elements along dim -1, but got {sizes[-1]}."
            )
        method = inner.inverse_shape if inverse else inner.forward_shape
        if source and all(axis in sizes for axis in range(-source, 0)):
            shape = method(torch.Size(sizes[axis] for axis in range(-source, 0)))
            return {i - len(shape): n for i, n in enumerate(shape)}
        keeps = Transform.inverse_shape if inverse else Transform.forward_shape
        return sizes if getattr(method, "__func__", None) is keeps else {}

    # The aux is the copy that was evaluated, on which Pyro's layers store what their log-det needs.

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Any]:
        own = self._copy()
        return own(x), own

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Any]:
        own = self._copy()
        return own._inv_call(y), own  # not own.inv(y), whose inverse transform would be kept

    def _aux(self, x: Tensor, y: Tensor) -> Any:
        return self._copy()

    def _log_det(self, x: Tensor, y: Tensor, aux: Any) -> Tensor:
        ladj = aux.log_abs_det_jacobian(x, y)
        outside = out_of_reach(y, self.codomain)
        return ladj if outside is None else ladj.masked_fill(outside, math.inf)

    def _copied_state(self) -> dict[str, Any]:
        held = None if self._held is None else _without_cache(self._held)
        return super()._copied_state() | {"_held": held}

    def __repr__(self) -> str:
        note = ", opaque: nothing is remembered" if self.opaque else ""
        return f"Foreign({self._inner!r}{note})"


def _without_cache(transform: Any) -> Any:
    """Return a shallow copy with an empty cache, also of the transforms in its lists."""
    if isinstance(transform, Bijection):
        return transform
    own = object.__new__(type(transform))  # copy.copy does the same, but cannot be compiled
    own.__dict__.update(transform.__dict__, _inv=None, _cached_x_y=(None, None))
    for name, value in transform.__dict__.items():
        if isinstance(value, (list, tuple)) and any(isinstance(item, Transform) for item in value):
            own.__dict__[name] = [_without_cache(t) if isinstance(t, Transform) else t for t in value]
    return own


#: Attributes that any module or transform has besides its contents.
_OWN_ATTRIBUTES = {*vars(nn.Module()), "_cache_size", "_inv"}


def _contents(transform: Transform) -> Iterator[tuple[str, Any]]:
    """Yield the contents of a transform other than registered modules, by attribute."""
    for name, value in vars(transform).items():
        if name not in _OWN_ATTRIBUTES and not name.startswith("_cached"):
            yield name, value


def _is_plain(value: Any, owner: Transform) -> bool:
    """Whether a value holds nothing that could change unnoticed by its owner."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item, owner) for item in value)
    if isinstance(value, MethodType):
        return value.__self__ is owner
    if isinstance(value, Transform) and not isinstance(value, nn.Module):
        return all(_is_plain(inner, value) for _, inner in _contents(value))
    constants = (type(None), Number, str, torch.dtype, torch.device, constraints.Constraint)
    return isinstance(value, constants) or inspect.isclass(value)


def _modules_in(value: Any) -> Iterator[nn.Module]:
    """Yield the modules in a list of transforms, such as torch's CatTransform and StackTransform hold."""
    for item in value if isinstance(value, list | tuple) else ():
        if isinstance(item, nn.Module):
            yield item
        elif isinstance(item, Transform):
            for _, inner in _contents(item):
                yield from _modules_in([inner] if isinstance(inner, nn.Module) else inner)
