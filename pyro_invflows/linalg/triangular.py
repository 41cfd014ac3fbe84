r"""Triangular matrices: solving for many rows, and unconstrained parametrisations of them and of positive numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["positive", "positive_inverse", "solve_for_rows", "split_triangles"]


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


def solve_for_rows(triangle: Tensor, y: Tensor, *, upper: bool, unitriangular: bool = False) -> Tensor:
    """Return the rows x with ``T x = y``, where T is a triangle of a matrix; nothing else of the matrix is read.

    Args:
        triangle: ``(*B, n, n)``.
        y: Rows ``(*S, n)``, where S broadcasts with B.
        upper: Whether T is the upper triangle or the lower one.
        unitriangular: Whether the diagonal of T is 1, whatever the matrix holds there.
    """
    n = triangle.shape[-1]
    if triangle.dim() == 2:
        x = torch.linalg.solve_triangular(
            triangle.mT, y.reshape(-1, n), upper=not upper, left=False, unitriangular=unitriangular
        )
        return x.reshape(y.shape)
    # dimensions that only y has become columns, or the matrix would be copied for each of them
    rank = max(triangle.dim(), y.dim() + 1) - 2
    own = (1,) * (rank + 2 - triangle.dim()) + triangle.shape[:-2]
    y = y.reshape((1,) * (rank + 1 - y.dim()) + y.shape)
    shared = [axis for axis in range(rank) if own[axis] != 1]
    order = [*shared, rank, *(axis for axis in range(rank) if own[axis] == 1)]
    columns = y.permute(order)
    free = columns.shape[len(shared) + 1 :]
    x = torch.linalg.solve_triangular(
        triangle.reshape(*(own[axis] for axis in shared), n, n),
        columns.reshape(*columns.shape[: len(shared) + 1], free.numel()),
        upper=upper,
        unitriangular=unitriangular,
    )
    x = x.reshape(x.shape[:-1] + free)
    return x.permute([order.index(axis) for axis in range(rank + 1)])
