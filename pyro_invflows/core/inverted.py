"""The inverse of a layer, as a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.distributions import ConditionalTransform
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.foreign import as_bijection, stands_for
from pyro_invflows.core.path_gradient import push_gradient
from pyro_invflows.core.structure import Structure, evaluate_part

__all__ = ["Inverted"]


class Inverted(Structure):
    """The inverse of a layer, as a layer: a module with the same parameters.

    torch's ``layer.inv`` is not a module, so optimisers and ``.to()`` miss its parameters. Use this class inside a
    :class:`Chain`, a module or a guide.

    **Forward**: the layer's inverse pass. **Inverse**: its forward pass. **Log-det**: minus that of the layer.
    **Identity**: if the layer is.

    Args:
        layer: Any transform; a layer of this library keeps its one-pass evaluation.

    Shape:
        That of the layer, with input and output exchanged; the log-det has the batch shape.

    Raises:
        TypeError: if ``layer`` is not a transform.

    Example:
        >>> layer = Diagonal(3)
        >>> inverted = Inverted(layer)
        >>> x = torch.randn(5, 3)
        >>> torch.equal(inverted(x), layer.inv(x)), inverted.layer is layer
        (True, True)
    """

    layer: Bijection

    def __init__(self, layer: Transform, *, cache_size: int = 1) -> None:
        if isinstance(layer, ConditionalTransform):
            raise TypeError(
                f"Inverted: expected a transform, got {type(layer).__name__}. Invert the layer that it conditions: "
                "Conditional(Inverted(layer), ...)."
            )
        inner = as_bijection(layer, owner="Inverted")
        super().__init__(cache_size=cache_size)
        self.layer = inner
        self.dim = inner.dim
        self.settle()

    def named_parts(self) -> Iterator[tuple[str, Bijection, int]]:
        yield "layer", self.layer, 0

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.layer.codomain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.layer.domain

    @property
    def input_dim(self) -> int | None:  # type: ignore[override]
        """Size that an event must have along ``dim``; None if any size will do."""
        return self.layer.trace_event({}).get(self.dim)

    @property
    def sign(self) -> Any:
        return self.layer.sign

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        return self.layer.trace_event(sizes, not inverse)

    def leaves(self, inverse: bool = False) -> Iterator[tuple[Bijection, bool]]:
        return self.layer.leaves(not inverse)

    def _shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        return self.layer._shape(shape, not inverse)

    def _check(self, value: Tensor, inverse: bool) -> None:
        self.layer._check(value, not inverse)

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.layer.evaluate_inverse(x)

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Any]:
        return evaluate_part(self.layer, y)

    def _aux(self, x: Tensor, y: Tensor) -> Any:
        return self.layer._aux(y, x)

    def _log_det(self, x: Tensor, y: Tensor, aux: Any) -> Tensor:
        return -self.layer._log_det(y, x, aux)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        return push_gradient(self.layer, value, gradient, not inverse)


stands_for(_InverseTransform, lambda transform: Inverted(transform.inv))
