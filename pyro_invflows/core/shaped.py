"""The shapes of a layer: the size of its events, the shapes that it returns, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from pyro.distributions import TransformModule
from torch import Tensor
from torch.distributions import constraints

from pyro_invflows.core.events import event_constraint, negative_axis
from pyro_invflows.support.checks import positive_int
from pyro_invflows.support.modes import is_any_autocast

__all__ = ["Shaped"]


class Shaped(TransformModule):
    """A transform and module that knows the shapes of its events; the lower half of :class:`Bijection`.

    Args:
        input_dim: Size of an event along ``dim``; ``None`` accepts any size.
        dim: The (negative) axis that the layer acts along; it determines the number of event dimensions.
        cache_size: As in ``Transform``.
    """

    #: Size that an event must have along ``dim``; None if any size will do.
    input_dim: int | None = None
    dim: int = -1

    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector

    def __init__(self, input_dim: int | None = None, *, dim: int = -1, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        owner = type(self).__name__
        if input_dim is not None:
            self.input_dim = positive_int(input_dim, "input_dim", owner)
        self.dim = negative_axis(dim, owner)
        if self.dim != -1:
            self.domain = self.codomain = event_constraint(-self.dim)
        self._batch_shape = torch.Size()

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        """Follow known event sizes ``{negative axis: size}`` through the layer.

        Raises:
            ValueError: if a known size differs from the one that the layer needs.
        """
        sizes = dict(sizes)
        if self.input_dim is not None:
            known = sizes.setdefault(self.dim, self.input_dim)
            if known != self.input_dim:
                raise ValueError(
                    f"{type(self).__name__} works on events with {self.input_dim} elements along dim {self.dim}, "
                    f"but got {known}."
                )
        return sizes

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape of the layer's own parameters: ``()``, or that of the context it was conditioned on."""
        return self._batch_shape

    def check_event(self, shape: torch.Size, inverse: bool) -> tuple[int, ...]:
        """Check the event part of an input's ``shape`` and return the event shape of the output.

        Raises:
            ValueError: if there are too few dimensions, or if a size differs from the one that the layer needs.
        """
        event_dim = (self.codomain if inverse else self.domain).event_dim
        if len(shape) < event_dim:
            raise ValueError(
                f"{type(self).__name__} works on events with {event_dim} dimension(s), but got the shape "
                f"{tuple(shape)}."
            )
        if not event_dim:
            return ()
        other = (self.domain if inverse else self.codomain).event_dim
        plain = type(self).trace_event is Shaped.trace_event and other == event_dim
        if plain and self.input_dim in (None, shape[self.dim]):  # most layers; a Flow asks in every call
            return tuple(shape[-event_dim:])
        sizes = self.trace_event({i - event_dim: n for i, n in enumerate(shape[-event_dim:])}, inverse)
        return tuple(sizes[i] for i in range(-other, 0))

    def _shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        event = self.check_event(shape, inverse)
        event_dim = (self.codomain if inverse else self.domain).event_dim
        batch, own = shape[: len(shape) - event_dim], self.batch_shape
        return torch.Size((torch.broadcast_shapes(batch, own) if own else batch) + event)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of ``self(x)`` for x of ``shape``; raises ``ValueError`` on a wrong event size."""
        return self._shape(shape, inverse=False)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of ``self.inv(y)`` for y of ``shape``; raises ``ValueError`` on a wrong event size."""
        return self._shape(shape, inverse=True)

    def log_det_shape(self, x: Tensor) -> torch.Size:
        """Return the broadcast of the batch shapes of the input and of the parameters."""
        batch = x.shape[: x.dim() - self.domain.event_dim]
        return torch.broadcast_shapes(batch, self.batch_shape) if self.batch_shape else batch

    # ------------------------------------------------------------------ checks

    @property
    def label(self) -> str:
        """The layer's name in error messages."""
        return type(self).__name__

    def _check(self, value: Tensor, inverse: bool) -> None:
        """Raise an error, at almost no cost, if a value cannot be an event of this layer."""
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            self._refuse_kind(value)
        for own in (self._parameters, self._buffers):
            for name, tensor in own.items():
                if tensor is not None and tensor.dtype != value.dtype and tensor.is_floating_point():
                    self._refuse_dtype(value, name, tensor)
        event_dim = (self.codomain if inverse else self.domain).event_dim
        if event_dim and (
            value.dim() < event_dim or (self.input_dim is not None and value.shape[self.dim] != self.input_dim)
        ):
            self.check_event(value.shape, inverse)

    def _refuse_kind(self, value: Any) -> NoReturn:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        if isinstance(value, int):  # Pyro's guides call an init_transform_fn with an int
            raise TypeError(
                f"{type(self).__name__} needs a floating point tensor, but got the int {value}. If an argument is "
                "meant to be a function that builds a layer from its size, pass the function and not a layer, for "
                "example partial(stack, 4, affine_coupling)."
            )
        raise TypeError(
            f"{type(self).__name__} needs a floating point tensor, but got {kind}. Convert it first, for example with "
            "x.float() or torch.as_tensor."
        )

    def _refuse_dtype(self, value: Tensor, name: str, tensor: Tensor) -> None:
        if is_any_autocast():
            return
        raise TypeError(
            f"{type(self).__name__}: input and parameters must have the same dtype, but the input is "
            f"{value.dtype} and '{name}' is {tensor.dtype}. Convert the layer with .to({value.dtype}) or the input "
            f"with .to({tensor.dtype})."
        )

    def extra_repr(self) -> str:
        parts = [] if self.input_dim is None else [str(self.input_dim)]
        if self.dim != -1:
            parts.append(f"dim={self.dim}")
        return ", ".join(parts)
