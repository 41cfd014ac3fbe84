"""Base classes that leave an author less to write: elementwise, volume-preserving, and with a context."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.events import out_of_reach
from pyro_invflows.core.path_gradient import elementwise_path_gradient
from pyro_invflows.support.checks import is_int, positive_int

__all__ = ["ContextLayer", "Elementwise", "VolumePreserving"]


class Elementwise(Bijection):
    """A layer that acts on each element separately: event dimension 0.

    A subclass defines the function, its inverse and the log of its slope. Its parameters have the ``shape`` given to
    the constructor, which broadcasts with the input from the right.

    If the function does not map onto the real line, ``codomain`` is an interval or a half-line. A y outside it cannot
    be reached and has density 0: its log-det is +inf, whatever ``_log_slope`` returns (see
    :func:`~pyro_invflows.core.events.out_of_reach` for what counts as outside). ``_inverse_function`` must still return
    a finite x with a finite gradient, by clamping y to the codomain first.

    Args:
        shape: Shape of the parameters.
        cache_size: As in :class:`Bijection`.

    Shape:
        Any shape that broadcasts with ``shape``, for input, output and log-det alike.
    """

    domain: constraints.Constraint = constraints.real
    codomain: constraints.Constraint = constraints.real
    sign = +1  # unless a subclass says otherwise

    def __init__(self, shape: int | Iterable[int] = (), *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        try:
            self.shape = torch.Size(map(operator.index, (shape,) if is_int(shape) else tuple(shape)))  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{type(self).__name__}: shape must be a tuple of ints, but got {shape!r}.") from None
        if any(n < 0 for n in self.shape):
            raise ValueError(f"{type(self).__name__}: shape must be non-negative, but got {tuple(self.shape)}.")
        if self.shape and self.shape[-1] != 1:
            self.input_dim = self.shape[-1]

    def _function(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _function(x) -> y.")

    def _inverse_function(self, y: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _inverse_function(y) -> x.")

    def _log_slope(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _log_slope(x, y) -> log|dy/dx|.")

    # The aux is whether y was given; a y that the function returned need not be checked.

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, bool]:
        return self._function(x), False

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, bool]:
        return self._inverse_function(y), True

    def _aux(self, x: Tensor, y: Tensor) -> bool:
        return True

    def _log_det(self, x: Tensor, y: Tensor, aux: bool) -> Tensor:
        slope = self._log_slope(x, y)
        if not aux or self.codomain is constraints.real:
            return slope
        outside = out_of_reach(y, self.codomain)
        return slope if outside is None else slope.masked_fill(outside, math.inf)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        return elementwise_path_gradient(self, value, gradient, inverse)

    @property
    def batch_shape(self) -> torch.Size:
        # With no event dimension, the parameters' own shape is a batch shape too.
        return self._batch_shape + self.shape

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        sizes = dict(sizes)
        for axis in range(-len(self.shape), 0):
            size = self.shape[axis]
            if size == 1:
                continue
            known = sizes.setdefault(axis, size)
            if known != size:
                raise ValueError(
                    f"{type(self).__name__} has parameters of shape {tuple(self.shape)}, which does not broadcast "
                    f"with {known} elements along dim {axis}."
                )
        return sizes

    def _check(self, value: Tensor, inverse: bool) -> None:
        super()._check(value, inverse)
        if self.shape and value.shape[-len(self.shape) :] != self.shape:
            self._shape(value.shape, inverse)

    def _shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        try:
            return torch.Size(torch.broadcast_shapes(shape, self.batch_shape))
        except RuntimeError:
            raise ValueError(
                f"{type(self).__name__} has parameters of shape {tuple(self.batch_shape)}, which does not broadcast "
                f"with an input of shape {tuple(shape)}."
            ) from None

    def extra_repr(self) -> str:
        return str(tuple(self.shape)) if self.shape else ""


class VolumePreserving(Bijection):
    """A layer with ``|det dy/dx| = 1``. A subclass defines only ``_function`` and ``_inverse_function``."""

    def _function(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _function(x) -> y.")

    def _inverse_function(self, y: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _inverse_function(y) -> x.")

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, None]:
        return self._function(x), None

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, None]:
        return self._inverse_function(y), None

    def _aux(self, x: Tensor, y: Tensor) -> None:
        return None

    def _log_det(self, x: Tensor, y: Tensor, aux: None) -> Tensor:
        return x.new_zeros(self.log_det_shape(x))


class ContextLayer(Bijection):
    """A layer whose sub-network takes the context as additional inputs.

    A sub-network has too many parameters for a hypernetwork to set, so it reads the context itself.
    :class:`~pyro_invflows.Conditional` stores the context in the buffer ``context``. While the layer is not
    conditioned, the network receives zeros instead.

    A subclass builds the sub-network with ``context_dim`` additional inputs and calls it on ``with_context(value)``. A
    network that takes the context as an argument of its own receives ``context_of(value)``.

    Args:
        input_dim: As in :class:`Bijection`.
        context_dim: Width of the context; 0 for none.
        dim: As in :class:`Bijection`.
        cache_size: As in :class:`Bijection`.

    Attributes:
        context: ``(*B, context_dim)``, or None while not conditioned. Not part of the ``state_dict``.
    """

    context: Tensor | None

    def __init__(
        self, input_dim: int | None = None, *, context_dim: int = 0, dim: int = -1, cache_size: int = 1
    ) -> None:
        super().__init__(input_dim, dim=dim, cache_size=cache_size)
        self.context_dim = positive_int(context_dim, "context_dim", type(self).__name__, minimum=0)
        self.register_buffer("context", None, persistent=False)

    def context_of(self, value: Tensor) -> Tensor:
        """Return the context for a value ``(*S, n, *spatial)``, as ``(*batch, context_dim)``.

        The batch is the broadcast of S and of the context's own batch shape.
        """
        context = value.new_zeros(self.context_dim) if self.context is None else self.context
        batch = torch.broadcast_shapes(value.shape[: self.dim], context.shape[:-1])
        return context.expand(*batch, self.context_dim)

    def with_context(self, value: Tensor) -> Tensor:
        """Append the context to a value ``(*S, n, *spatial)``, as ``(*batch, n + context_dim, *spatial)``."""
        if not self.context_dim:
            return value
        context = self.context_of(value)
        batch, spatial = context.shape[:-1], value.shape[value.dim() + self.dim + 1 :]
        context = context.reshape(context.shape + (1,) * len(spatial)).expand(*context.shape, *spatial)
        return torch.cat([value.expand(*batch, *value.shape[self.dim :]), context], dim=self.dim)
