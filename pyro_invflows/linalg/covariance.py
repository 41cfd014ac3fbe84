"""Square roots of a covariance matrix, and the weight with which to shrink one.

A covariance is given by the standard deviations of its columns and their correlations, ``S = V^(1/2) P V^(1/2)``.
Rounding errors then depend on the condition number of P only, however different the units of the columns are.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["correlations", "covariance_roots", "oas_weight", "triangular_root"]


def correlations(covariance: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviations ``(D,)`` and the correlations ``(D, D)`` of a covariance.

    Args:
        covariance: ``(D, D)``.
        spread: ``(D,)``, False for constant columns: they get the standard deviation 1 and no correlation.
    """
    scale = torch.where(spread, covariance.diagonal(), 1.0).sqrt()
    matrix = torch.where(spread.outer(spread), covariance, 0.0) / scale / scale.unsqueeze(-1)
    matrix.diagonal().fill_(1.0)
    return scale, matrix


def oas_weight(count: float, d: int, square: Tensor) -> Tensor:
    """Return the shrinkage weight of Chen et al. (2010), Eq. 23.

    Args:
        count: Number of rows of data.
        d: Number of columns.
        square: ``tr P^2`` of their correlations P, a scalar.
    """
    above = (1 - 2 / d) * square + d**2
    below = (count + 1 - 2 / d) * (square - d)
    # 0 / 0 for the identity, which is the same for every weight
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 1.0).clamp(max=1.0)


def covariance_roots(scale: Tensor, correlation: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Return A with ``A A^T`` the covariance, and its inverse.

    Args:
        scale: Standard deviations of the columns, ``(D,)``, positive.
        correlation: Their correlations, ``(D, D)``, positive definite.
        method: As in ``Whitening``; ``"diagonal"`` takes the identity as the correlations.
    """
    if method == "diagonal":
        return scale.diag(), scale.reciprocal().diag()
    if method == "cholesky":
        factor = torch.linalg.cholesky(correlation)
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        return scale.unsqueeze(-1) * factor, inverse / scale
    values, vectors = torch.linalg.eigh(correlation)
    values, vectors = values.flip(-1), vectors.flip(-1)  # the largest first
    root = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()  # positive, up to rounding
    rotation = torch.diag(_signs(vectors)) if method == "pca-cor" else vectors.mT
    colouring, whitening = scale.unsqueeze(-1) * (vectors * root) @ rotation, rotation.mT @ (vectors / root).mT / scale
    if method.endswith("-cor"):
        return colouring, whitening
    # Every other root is this one times an orthogonal matrix; an error in that matrix does not change A A^T.
    u, _, vh = torch.linalg.svd(colouring)
    rotation = vh.mT @ u.mT if method == "zca" else vh.mT * _signs(u)
    return colouring @ rotation, rotation.mT @ whitening


def _signs(vectors: Tensor) -> Tensor:
    """Return the signs that make the diagonal positive."""
    return torch.where(vectors.diagonal() < 0, -1.0, 1.0).to(vectors.dtype)


def triangular_root(colouring: Tensor) -> Tensor:
    """Return the lower triangular L with positive diagonal and ``L L^T = A A^T``, without squaring A."""
    factor = torch.linalg.qr(colouring.mT)[1].mT
    return factor * torch.where(factor.diagonal() < 0, -1.0, 1.0)
