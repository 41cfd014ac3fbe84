"""A layer with some of its batch dimensions treated as event dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import IndependentTransform, Transform, constraints

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.events import sum_rightmost
from pyro_invflows.core.foreign import as_bijection, stands_for
from pyro_invflows.core.path_gradient import push_gradient
from pyro_invflows.core.structure import Structure, evaluate_part
from pyro_invflows.support.checks import positive_int

__all__ = ["Reinterpreted"]


class Reinterpreted(Structure):
    """A layer with some of its batch dimensions treated as event dimensions.

    It takes the place of torch's ``IndependentTransform``. **Forward**, **Inverse**: those of the layer. **Log-det**:
    that of the layer, summed over these dimensions. **Identity**: if the layer is.

    Args:
        layer: Any transform.
        num_dims: Number of its rightmost batch dimensions to treat as event dimensions.
        cache_size: As in :class:`~pyro_invflows.Bijection`.

    Shape:
        ``(*S, *B, *E)``, where B has ``num_dims`` dimensions and E is an event of the layer; the log-det is ``(*S,)``.
    """

    layer: Bijection

    def __init__(self, layer: Transform, num_dims: int, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.layer = as_bijection(layer)
        self.dim = self.layer.dim
        self.num_dims = positive_int(num_dims, "num_dims", "Reinterpreted", minimum=0)
        self.settle()

    def named_parts(self) -> Iterator[tuple[str, Bijection, int]]:
        yield "layer", self.layer, self.num_dims

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(self.layer.domain, self.num_dims)

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(self.layer.codomain, self.num_dims)

    @property
    def input_dim(self) -> int | None:  # type: ignore[override]
        """Size that an event must have along ``dim``; None if any size will do."""
        return self.layer.input_dim

    @property
    def sign(self) -> Any:
        return self.layer.sign

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        return self.layer.trace_event(sizes, inverse)

    def _shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        return self.layer._shape(shape, inverse)

    def _check(self, value: Tensor, inverse: bool) -> None:
        event_dim = (self.codomain if inverse else self.domain).event_dim
        if value.dim() < event_dim:
            self.check_event(value.shape, inverse)
        self.layer._check(value, inverse)

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Any]:
        return evaluate_part(self.layer, x)

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Any]:
        return self.layer.evaluate_inverse(y)

    def _aux(self, x: Tensor, y: Tensor) -> Any:
        return self.layer._aux(x, y)

    def _log_det(self, x: Tensor, y: Tensor, aux: Any) -> Tensor:
        return sum_rightmost(self.layer._log_det(x, y, aux), self.num_dims)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        value, ladj, gradient = push_gradient(self.layer, value, gradient, inverse)
        return value, sum_rightmost(ladj, self.num_dims), gradient


stands_for(
    IndependentTransform,
    lambda transform: Reinterpreted(transform.base_transform, transform.reinterpreted_batch_ndims),
)
