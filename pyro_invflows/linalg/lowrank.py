r"""Determinants and inverses of the identity plus a matrix of low rank.

The determinant lemma :math:`\det(I_n + A B) = \det(I_k + B A)` and Woodbury's identity
:math:`(I_n + A B)^{-1} = I_n - A (I_k + B A)^{-1} B` reduce both problems to k dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_invflows.linalg.dense import log_abs_det, solve

__all__ = ["low_rank_log_abs_det", "low_rank_solve", "rows_times", "symmetric_low_rank_inverse"]


def rows_times(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x @ matrix`` for rows x ``(*S, n)`` and a matrix ``(*B, n, m)``, where S broadcasts with B."""
    if matrix.dim() == 2:
        return x @ matrix
    # einsum treats the batch dimensions that only x has as rows, instead of copying the matrix for each of them
    return torch.einsum("...n,...nm->...m", x, matrix)


def _capacitance(left: Tensor, right: Tensor) -> Tensor:
    product = right @ left
    return product + torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)


def low_rank_log_abs_det(left: Tensor, right: Tensor) -> Tensor:
    """Return ``log|det(I + left @ right)|`` for ``left`` (*B, n, k) and ``right`` (*B, k, n), in O(n k^2 + k^3)."""
    return log_abs_det(_capacitance(left, right))


def low_rank_solve(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """Return ``(I + left @ right)^{-1} x`` for rows x ``(*S, n)``, in O(n k) per row after O(n k^2 + k^3) once.

    Args:
        left: ``(*B, n, k)``.
        right: ``(*B, k, n)``.
        x: ``(*S, n)``, where S broadcasts with B.
    """
    inner = solve(_capacitance(left, right), right)
    return x - rows_times(rows_times(x, inner.mT), left.mT)


def symmetric_low_rank_inverse(factor: Tensor) -> tuple[Tensor, Tensor]:
    r"""Invert :math:`I + U U^T`: return V with :math:`(I + U U^T)^{-1} = I - V V^T`, and the log-determinant.

    The thin QR factorisation of I stacked on U, :math:`(I; U) = (Q_1; Q_2) R`, gives :math:`V = Q_2` and
    :math:`\log\det(I + U U^T) = 2 \sum_i \log|R_{ii}|`. Unlike a Cholesky factorisation of :math:`I + U^T U`, it
    never squares U, so it is accurate for U of any size; every :math:`|R_{ii}| \ge 1`.

    Args:
        factor: U, ``(*B, n, r)``.

    Returns:
        V ``(*B, n, r)`` with spectral norm below 1, and ``log det(I + U U^T)`` ``(*B,)``. O(n r^2); differentiable
        to any order.
    """
    rank = factor.shape[-1]
    eye = torch.eye(rank, dtype=factor.dtype, device=factor.device).expand(*factor.shape[:-2], rank, rank)
    q, r = torch.linalg.qr(torch.cat([eye, factor], dim=-2))
    return q[..., rank:, :], 2 * r.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
