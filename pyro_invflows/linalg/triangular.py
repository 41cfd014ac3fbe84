r"""Unconstrained parametrisations of positive numbers and of triangular matrices."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["positive", "positive_inverse", "split_triangles"]


def positive(raw: Tensor) -> Tensor:
    r"""Map any real number onto the positive ones: :math:`e^{\mathrm{asinh}\,a} = a + \sqrt{a^2 + 1}`.

    It is 1 at 0, with slope 1, and ``positive(-a) == 1 / positive(a)``. It grows linearly, and falls to zero like
    ``1 / (2 |a|)``, so that large parameters do not overflow.
    """
    return torch.asinh(raw).exp()


def positive_inverse(value: Tensor) -> Tensor:
    """Return ``raw`` with ``positive(raw) == value``."""
    return torch.sinh(value.log())


def split_triangles(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a square matrix into two strictly upper triangular matrices and a diagonal, which use all its entries.

    Args:
        matrix: ``(*B, n, n)``.

    Returns:
        Its strict upper triangle, the transpose of its strict lower triangle, and its diagonal ``(*B, n)``.
    """
    return matrix.triu(1), matrix.tril(-1).mT, matrix.diagonal(dim1=-2, dim2=-1)
