"""General linear solves and log-determinants that are right at every batch and size.

torch's batched LU is wrong on the CPU with more than one thread from about 150 x 150 (pytorch#142815: relative
errors of some per cent, sometimes a hang), and everything that stands on it: ``solve``, ``slogdet``, ``inv``.
The batched QR factorisation is right, so large batched CPU matrices go through it.

The forward-mode derivatives of ``solve`` and ``slogdet`` are wrong under ``vmap`` (``vmap(jacfwd(...))`` in torch 2.13:
errors of many times the size), those of ``inv`` are right: under ``torch.func`` everything stands on that one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_invflows.support.modes import in_functorch
from pyro_invflows.support.precision import HALF

__all__ = ["log_abs_det", "solve"]

#: Largest batched matrix that is left to LU on the CPU; 144 was seen right, 160 wrong.
_LARGEST_BATCHED_LU = 128


def _lu_is_right(matrix: Tensor) -> bool:
    # Under vmap one logical matrix may be a physical batch, so only the size decides there.
    alone = matrix.dim() == 2 and not in_functorch()
    return alone or matrix.device.type != "cpu" or matrix.shape[-1] <= _LARGEST_BATCHED_LU


def _check_square(matrix: Tensor, owner: str) -> None:
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{owner} needs square matrices (*B, n, n), but got the shape {tuple(matrix.shape)}.")


def solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solve ``matrix @ z = rhs`` for general square matrices.

    Args:
        matrix: ``(*B, n, n)``, invertible.
        rhs: ``(*B, n, m)``; batch dimensions broadcast.

    Returns:
        ``z`` with the shape of the broadcast ``(*B, n, m)``. Differentiable to any order.

    Raises:
        ValueError: if the matrices are not square.
        torch.linalg.LinAlgError: if LU meets an exactly singular matrix.
    """
    _check_square(matrix, "solve")
    if matrix.dtype in HALF:  # LAPACK has none
        return solve(matrix.float(), rhs.float()).to(rhs.dtype)
    if _lu_is_right(matrix):
        if in_functorch():
            return torch.linalg.inv(matrix) @ rhs
        return torch.linalg.solve(matrix, rhs)
    q, r = torch.linalg.qr(matrix)
    return torch.linalg.solve_triangular(r, q.mT @ rhs, upper=True)


def log_abs_det(matrix: Tensor) -> Tensor:
    """Return ``log|det matrix|`` of general square matrices.

    Args:
        matrix: ``(*B, n, n)``.

    Returns:
        ``(*B,)``; ``-inf`` for a singular matrix. Differentiable to any order where it is finite.

    Raises:
        ValueError: if the matrices are not square.
    """
    _check_square(matrix, "log_abs_det")
    if matrix.dtype in HALF:
        return log_abs_det(matrix.float()).to(matrix.dtype)
    if _lu_is_right(matrix):
        return _LogDet.apply(matrix) if in_functorch() else torch.linalg.slogdet(matrix)[1]
    return torch.linalg.qr(matrix)[1].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


class _LogDet(torch.autograd.Function):
    """``log|det A|`` for ``torch.func``, its derivatives by the inverse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        return torch.linalg.slogdet(matrix)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        return grad[..., None, None] * torch.linalg.inv(matrix).mT

    @staticmethod
    def jvp(ctx: Any, change: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        return (torch.linalg.inv(matrix).mT * change).sum((-2, -1))
