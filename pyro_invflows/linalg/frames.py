"""Thin orthonormal frames: the first columns of a product of Householder reflections, in compact WY form."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_invflows.linalg.householder import householder_product

__all__ = ["thin_frame"]


def thin_frame(vectors: Tensor, num_columns: int, *, mask: Tensor | None = None) -> Tensor:
    """Return the first ``num_columns`` columns of ``H_1 ... H_k``.

    Args:
        vectors: Reflection vectors as rows, ``(*B, k, n)``; with k = num_columns every frame can be reached.
        num_columns: m <= n.
        mask: ``triangle_mask`` for k reflections, if the caller has it already.

    Returns:
        ``(*B, n, m)`` with orthonormal columns, in O(k m n) and one triangular solve.
    """
    unit = torch.eye(num_columns, vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    if vectors.dim() > 2:
        vectors = vectors.unsqueeze(-3)
    return householder_product(vectors, unit, mask=mask).mT
