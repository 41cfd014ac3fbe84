"""The exact log-determinant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_invflows import linalg
from pyro_invflows.logdet.base import LogDet
from pyro_invflows.support.checks import positive_int

__all__ = ["Exact"]


@dataclass(frozen=True, kw_only=True)
class Exact(LogDet):
    r"""Computes :math:`\log\det(I + J)` from the Jacobian, in as few dimensions as the network allows.

    If the network knows its Jacobian in closed form (:class:`~pyro_invflows.networks.ContractiveMLP`), the determinant
    has the size of its narrowest layer. For any other network, the Jacobian takes one vector-Jacobian product for each
    element of the event. At most O(E^3) per point. Derivatives of all orders.

    Args:
        max_event_size: Largest number of elements of an event; a larger event needs an estimator, or a larger limit.

    Raises:
        ValueError: when called, for a larger event.
    """

    max_event_size: int = 1024

    exact = True

    def __post_init__(self) -> None:
        positive_int(self.max_event_size, "max_event_size", "Exact")

    def __call__(self, linearisation: Any, event_dim: int = 1) -> Tensor:
        """Return ``log|det(I + J)|``, ``(*B,)``, as :meth:`LogDet.__call__`."""
        value = linearisation.value
        size = value.shape[value.dim() - event_dim :].numel()
        if size > self.max_event_size:
            raise ValueError(
                f"Exact: the event has {size} elements, more than max_event_size={self.max_event_size}; its Jacobian "
                "would be large and slow. Use logdet.RussianRoulette() (unbiased) or PowerSeries(), or raise the limit."
            )
        matrix = linearisation.reduced_jacobian()
        return linalg.log_abs_det(matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device))
