r"""Determinants of :math:`I + M` with |M| < 1, for many small matrices at once.

The symmetric part of such a matrix is positive definite, and so is that of each of its Schur complements: elimination
needs no pivoting (Mathias 1992, *Matrices with positive definite Hermitian part*). Without pivoting, each step of the
elimination can be taken for all matrices at once, whereas LAPACK processes them one by one. For this, the batch
dimension comes last in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_invflows.linalg.cyclic import cyclic_product
from pyro_invflows.linalg.dense import log_abs_det
from pyro_invflows.support.derivatives import gradients_with_graph, in_reverse_mode_only

__all__ = ["contraction_log_det", "contraction_matrix"]

#: On the CPU, elimination is faster than LAPACK for matrices of up to this size with at least this many rows in all.
_LARGEST, _FEWEST_ROWS = 32, 2000
#: Number of entries processed at a time; they should fit into the CPU's cache.
_CHUNK = 2**18


def contraction_matrix(left: Tensor, slope: Tensor, right: Tensor, outer: Tensor | None = None) -> Tensor:
    r"""Return :math:`I + A\, \mathrm{diag}(s)\, B\, \mathrm{diag}(t)` for each point, ``(*B, k, k)``.

    Arguments as in :func:`contraction_log_det`.
    """
    if outer is None:
        product = cyclic_product([right, left], [slope, None])
    else:
        product = cyclic_product([left.transpose(-2, -1), right.transpose(-2, -1)], [slope, outer]).transpose(-2, -1)
    return product + torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)


def contraction_log_det(left: Tensor, slope: Tensor, right: Tensor, outer: Tensor | None = None) -> Tensor:
    r"""Return :math:`\log\det(I + A\, \mathrm{diag}(s)\, B\, \mathrm{diag}(t))`, where the product is a contraction.

    Args:
        left: A, ``(k, n)``.
        slope: s, ``(*B, n)``.
        right: B, ``(n, k)``.
        outer: t, ``(*B, k)``; None for ones.

    Returns:
        ``(*B,)``, in O(n k^2 + k^3) per point. Differentiable to any order. If the product has a norm of 1 or more,
        the result may be NaN or inaccurate.
    """
    if outer is not None and outer.shape[:-1] != slope.shape[:-1]:
        batch = torch.broadcast_shapes(outer.shape[:-1], slope.shape[:-1])
        slope, outer = slope.expand(*batch, -1), outer.expand(*batch, -1)
    if not _pays(left, slope, right, outer):
        return _plain(left, slope, right, outer)
    batch = slope.shape[:-1]
    flat = (slope.reshape(-1, slope.shape[-1]), None if outer is None else outer.reshape(-1, outer.shape[-1]))
    return _ContractionLogDet.apply(left, flat[0], right, flat[1]).reshape(batch)


def _plain(left: Tensor, slope: Tensor, right: Tensor, outer: Tensor | None) -> Tensor:
    """Return the same, by torch operations."""
    return log_abs_det(contraction_matrix(left, slope, right, outer))


def _pays(left: Tensor, slope: Tensor, right: Tensor, outer: Tensor | None) -> bool:
    if left.shape[0] > _LARGEST or left.shape[0] * slope.shape[:-1].numel() < _FEWEST_ROWS:
        return False
    given = [t for t in (left, slope, right, outer) if t is not None]
    suited = slope.device.type == "cpu" and left.dtype in (torch.float32, torch.float64)
    alike = all(t.dtype == left.dtype for t in given)
    return suited and alike and any(t.requires_grad for t in given) and in_reverse_mode_only()


class _ContractionLogDet(torch.autograd.Function):
    r"""For slopes ``(B, n)`` and ``(B, k)``, in reverse mode, by :math:`d \log\det A = \mathrm{tr}(A^{-1} dA)`."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, slope: Tensor, right: Tensor, outer: Tensor | None) -> Tensor:
        size = left.shape[0]
        pairs = (left.unsqueeze(1) * right.mT.unsqueeze(0)).flatten(0, 1)  # (k k, n)
        product = (pairs @ slope.mT).unflatten(0, (size, size))  # (k, k, B)
        inverse = product if outer is None else product * outer.mT.contiguous()
        inverse.diagonal().add_(1)
        value = _invert(inverse)
        ctx.save_for_backward(left, slope, right, outer, pairs, None if outer is None else product, inverse)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, slope, right, outer, pairs, product, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives may follow
            return gradients_with_graph(_plain, (left, slope, right, outer), (grad,))
        change = inverse.transpose(0, 1) * grad  # gradient with respect to the matrix
        to_outer = None
        if outer is not None:
            to_outer = (change * product).sum(0).mT
            change *= outer.mT.contiguous()
        change = change.reshape(pairs.shape[0], -1)  # flatten() does not support batched gradients
        to_pairs = (change @ slope).reshape(*inverse.shape[:2], -1)  # (k, k, n)
        to_left = (to_pairs * right.mT).sum(1)
        to_right = (to_pairs * left.unsqueeze(1)).sum(0).mT
        return to_left, (pairs.mT @ change).mT, to_right, to_outer


def _invert(matrix: Tensor) -> Tensor:
    """Invert matrices ``(n, n, B)`` in place; return the logarithms of their determinants ``(B,)``."""
    size, count = matrix.shape[-2:]
    pivots = matrix.new_empty(size, count)
    width = max(1, _CHUNK // size**2)
    for part, diagonal in zip(matrix.split(width, -1), pivots.split(width, -1), strict=True):
        # views and buffers are made once: at these sizes the overhead of every call counts
        column, row = torch.empty_like(part[:, :1]), torch.empty_like(part[:1])
        into_column, into_row, inverse = column.squeeze(1), row.squeeze(0), torch.empty_like(part[0, 0])
        views = (part.unbind(1), part.unbind(0), into_column.unbind(0), into_row.unbind(0), diagonal.unbind(0))
        for columns, rows, corner, scaled, pivot in zip(*views, strict=True):
            # a single rank-one update per pivot: (a_i - e_i)(a^i + e_i)^T / a_ii
            into_column.copy_(columns)
            pivot.copy_(corner)
            torch.div(rows, pivot, out=into_row)
            scaled.add_(torch.reciprocal(pivot, out=inverse))
            corner.sub_(1)
            part.addcmul_(column, row, value=-1)
    return pivots.log().sum(0)
