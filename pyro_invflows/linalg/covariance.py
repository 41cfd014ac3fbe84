"""Roots of a covariance matrix, and how far to shrink one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["covariance_roots", "oas_weight", "triangular_root"]


# ---------------------------------------------------------------------- roots of a covariance


def oas_weight(count: float, d: int, trace: Tensor, square: Tensor) -> Tensor:
    """Return the weight of Chen et al. (2010), Eq. 23, from tr(S) and tr(S^2)."""
    above = (1 - 2 / d) * square + trace**2
    below = (count + 1 - 2 / d) * (square - trace**2 / d)
    # 0 / 0 for a multiple of the identity, which no weight changes
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 1.0).clamp(max=1.0)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square roots of the eigenvalues, largest first, and eigenvectors with a positive diagonal."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(-1), vectors.flip(-1)
    signs = torch.where(vectors.diagonal() < 0, -1.0, 1.0)
    # shrinkage has made them positive; rounding may not take that back
    floor = values[0] * torch.finfo(values.dtype).tiny
    return values.clamp_min(floor).sqrt(), vectors * signs


def covariance_roots(covariance: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Return A with ``A A^T = covariance``, and its inverse."""
    if method == "cholesky":
        factor = torch.linalg.cholesky(covariance)
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        return factor, torch.linalg.solve_triangular(factor, eye, upper=False)
    scale = covariance.diagonal().sqrt() if method.endswith("-cor") else None
    root, vectors = _eigen(covariance if scale is None else covariance / scale.outer(scale))
    colouring, whitening = vectors * root, (vectors / root).mT
    if method.startswith("zca"):
        colouring, whitening = colouring @ vectors.mT, vectors @ whitening
    if scale is not None:
        colouring, whitening = scale.unsqueeze(-1) * colouring, whitening / scale
    return colouring, whitening


def triangular_root(colouring: Tensor) -> Tensor:
    """Return the lower triangular L with positive diagonal and ``L L^T = A A^T``, without squaring A."""
    factor = torch.linalg.qr(colouring.mT)[1].mT
    return factor * torch.where(factor.diagonal() < 0, -1.0, 1.0)
