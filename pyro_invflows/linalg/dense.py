"""General linear solves and log-determinants that are right at every batch and size.

On the CPU with more than one thread, torch's batched LU is wrong for matrices from about 150 x 150 (pytorch#142815:
relative errors of several per cent, sometimes a hang), and so are ``solve``, ``slogdet`` and ``inv``, which use it. The
batched QR factorisation is right, so large batched CPU matrices go through it.

The forward-mode derivatives of ``solve`` and ``slogdet`` are wrong under ``vmap`` (``vmap(jacfwd(...))`` in torch 2.13:
errors many times the size of the result), and second derivatives always lack a term. Those of ``inv`` and ``qr`` are
right, so they are used in forward mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_invflows.support.modes import forward_levels, in_functorch
from pyro_invflows.support.precision import HALF

__all__ = ["log_abs_det", "solve"]

#: Largest batched matrix that is left to LU on the CPU; in tests 144 was right, 160 wrong.
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
        torch.linalg.LinAlgError: if LU finds a matrix that is exactly singular.
    """
    _check_square(matrix, "solve")
    if matrix.dtype in HALF:  # not supported by LAPACK
        return solve(matrix.float(), rhs.float()).to(rhs.dtype)
    if _lu_is_right(matrix):
        if forward_levels():
            return torch.linalg.inv(matrix) @ rhs
        if torch.compiler.is_compiling():  # an error cannot be raised from within a compiled loop
            return torch.linalg.solve_ex(matrix, rhs)[0]
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
    if _lu_is_right(matrix) and not forward_levels():
        return torch.linalg.slogdet(matrix)[1]
    return torch.linalg.qr(matrix)[1].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
