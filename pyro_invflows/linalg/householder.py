r"""Products of Householder reflections in compact WY form.

With the rows :math:`u_i` of U (k x n) and the upper triangular :math:`S = \mathrm{striu}(U U^T) +
\mathrm{diag}(U U^T)/2`,

.. math:: H_1 H_2 \cdots H_k = I - U^T S^{-1} U, \qquad H_i = I - 2 u_i u_i^T / |u_i|^2,

so that k reflections cost one triangular solve and three matrix products. No row needs to be normalised, and a
zero row means the identity (Bischof and Van Loan 1987; Joffrain et al. 2006 for the form with the inverse).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK_SIZE", "householder_product", "householder_vectors", "identity_reflections", "triangle_mask"]

#: Number of reflections merged into one triangular factor.
BLOCK_SIZE = 128


def triangle_mask(num_reflections: int, like: Tensor) -> Tensor:
    """Return the mask that turns ``U U^T`` into S: ones above the diagonal, halves on it, zeros below."""
    size = min(num_reflections, BLOCK_SIZE)
    ones = torch.ones(size, size, dtype=like.dtype, device=like.device)
    return ones.triu() - 0.5 * torch.eye(size, dtype=like.dtype, device=like.device)


def _factor(vectors: Tensor, mask: Tensor) -> Tensor:
    """Return S of one block, with a 1 on the diagonal for a zero row (or one so small that its square underflows)."""
    k = vectors.shape[-2]
    gram = vectors @ vectors.mT
    limits = torch.finfo(gram.dtype)
    dead = gram.diagonal(dim1=-2, dim2=-1) <= limits.tiny / limits.eps
    return gram * mask[:k, :k] + torch.diag_embed(dead.to(gram.dtype))


def householder_product(vectors: Tensor, x: Tensor, *, mask: Tensor | None = None, transpose: bool = False) -> Tensor:
    """Apply ``Q = H_1 ... H_k`` (or its transpose, the inverse) to vectors along the last dimension.

    Args:
        vectors: Reflection vectors as rows, ``(*B, k, n)``; a zero row is the identity.
        x: ``(*S, n)``, where S broadcasts with B.
        mask: :func:`triangle_mask` for k reflections, if the caller has it already.
        transpose: Apply ``Q^T`` instead.

    Returns:
        ``Q x`` of the broadcast shape, in O(k n) per vector after O(k n min(k, 128)) once.
    """
    if mask is None:
        mask = triangle_mask(vectors.shape[-2], vectors)
    blocks = vectors.split(BLOCK_SIZE, dim=-2)
    if not transpose:
        blocks = blocks[::-1]
    if vectors.dim() > 2:
        return _batched_product(blocks, x, mask, transpose)
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    for u in blocks:
        s = _factor(u, mask)
        if not transpose:
            s = s.mT
        projected = rows @ u.mT
        if rows.shape[0] <= u.shape[1]:  # solve for the smaller side
            z = torch.linalg.solve_triangular(s, projected, upper=transpose, left=False)
            rows = torch.addmm(rows, z, u, alpha=-1)
        else:
            rows = torch.addmm(rows, projected, torch.linalg.solve_triangular(s, u, upper=transpose), alpha=-1)
    return rows.reshape(x.shape) if x.dim() != 2 else rows


def _batched_product(blocks: tuple[Tensor, ...], x: Tensor, mask: Tensor, transpose: bool) -> Tensor:
    for u in blocks:
        s = _factor(u, mask)
        if not transpose:
            s = s.mT
        w = torch.linalg.solve_triangular(s, u, upper=transpose)
        # einsum treats the batch dimensions that only x has as rows, instead of copying u for each of them
        x = x - torch.einsum("...k,...kn->...n", torch.einsum("...n,...kn->...k", x, u), w)
    return x


def identity_reflections(vectors: Tensor) -> Tensor:
    """Fill ``vectors`` (k, n) in place with random unit rows in equal pairs, so that their product is the identity.

    If k is odd, the last row is zero. Draws from torch's global generator.
    """
    k, n = vectors.shape
    with torch.no_grad():
        pairs = torch.randn(k // 2, n, dtype=vectors.dtype, device=vectors.device)
        pairs = pairs / torch.linalg.vector_norm(pairs, dim=-1, keepdim=True).clamp_min(1e-6)
        vectors.zero_()
        vectors[: 2 * (k // 2)] = pairs.repeat_interleave(2, dim=0)
    return vectors


def householder_vectors(matrix: Tensor, *, atol: float = 1e-4) -> Tensor:
    """Factor any orthogonal matrix into n reflections, some of them the identity (zero rows).

    Args:
        matrix: ``(n, n)``, orthogonal to within ``atol``.
        atol: Largest accepted entry of ``|Q^T Q - I|``.

    Returns:
        Unit or zero rows U with ``householder_product(U, x) == matrix @ x``, in the matrix's dtype; computed in
        float64 in O(n^3), not differentiable.

    Raises:
        ValueError: if the matrix is not square, not finite or not orthogonal.
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"An orthogonal matrix must have the shape (n, n), but got {tuple(matrix.shape)}.")
    rest = matrix.detach().double().clone()
    n = rest.shape[0]
    defect = (rest.mT @ rest - torch.eye(n, dtype=rest.dtype, device=rest.device)).abs().max().item() if n else 0.0
    if not defect <= atol:
        raise ValueError(
            f"The matrix must be orthogonal, but the largest entry of |Q^T Q - I| is {defect:.2g}; "
            "orthogonalise it first, for example with torch.linalg.qr, or use SVDLinear.from_matrix."
        )
    vectors = torch.zeros_like(rest)
    for i in range(n):
        # Reflect column i of the remaining matrix onto +e_i; the first component of v is computed without cancellation.
        column = rest[i:, i]
        head, tail = column[0], column[1:]
        square = tail @ tail
        norm = (head * head + square).sqrt()
        if head > 0 and square.sqrt() <= n * torch.finfo(rest.dtype).eps:
            continue
        v = column.clone()
        v[0] = -square / (head + norm) if head > 0 else head - norm
        v /= torch.linalg.vector_norm(v)
        vectors[i, i:] = v
        rest[i:, i:] -= 2 * torch.outer(v, v @ rest[i:, i:])
    return vectors.to(matrix.dtype)
