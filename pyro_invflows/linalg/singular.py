"""Largest singular values and vectors, without a graph: by decomposition, power iteration or a proved bound."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "TopPair",
    "both_vectors",
    "certify",
    "certify_largest",
    "decompose",
    "gram_matrix",
    "largest",
    "power_iteration",
    "rounding_factor",
]

_KRYLOV_STEPS = 20
_KRYLOV_RESTARTS = 6
#: Power steps that decide which matrix of a stack to examine, and how many are examined before the slack grows.
_POWER_STEPS, _SEARCHES = 4, 4
#: Relative excess of a large matrix's bound over the estimate (of the squared norm); tried in turn.
_SLACKS = (1e-5, 1e-3, 1e-2)


class TopPair(NamedTuple):
    """The largest singular value and its vectors, without a graph."""

    value: Tensor  # (*B,)
    bound: Tensor  # (*B,), never below the true norm
    left: Tensor  # (*B, m)
    right: Tensor  # (*B, n)
    which: Tensor | None = None  # (*B,), index of the matrix chosen from a stack


def decompose(matrix: Tensor) -> TopPair:
    """Compute the pair from an eigendecomposition of the smaller Gram matrix."""
    a, scale = _scaled(matrix)
    values, vectors = torch.linalg.eigh(gram_matrix(a))
    left, right, norm = both_vectors(a, vectors[..., -1])
    bound = torch.add(values[..., -1], values.sum(-1), alpha=rounding_factor(a)).clamp_min(0).sqrt()
    return TopPair(scale * norm, scale * torch.maximum(bound, norm), left, right)


def power_iteration(matrix: Tensor, atol: float, rtol: float, max_steps: int) -> TopPair:
    """Take up to ``max_steps`` power steps; decompose the matrices that have not converged by then."""
    a, scale = _scaled(matrix)
    v = _start(a).expand(*a.shape[:-2], a.shape[-1])
    value = scale.new_zeros(scale.shape)
    u = torch.zeros_like(a[..., 0])
    done = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(max_steps):
        u_new, value_new = _unit(torch.einsum("...mn,...n->...m", a, v))
        back = torch.einsum("...mn,...m->...n", a.conj(), u_new)
        error = torch.linalg.vector_norm(back - value_new.unsqueeze(-1) * v, dim=-1)
        u = torch.where(done.unsqueeze(-1), u, u_new)
        value = torch.where(done, value, value_new)
        finished = error * scale <= atol + rtol * scale * value_new
        v = torch.where((done | finished).unsqueeze(-1), v, _unit(back)[0])
        done = done | finished | ~scale.isfinite()
        if done.all():
            break
    # the iteration also converges to a smaller singular value, if the start is orthogonal to the largest one's vector
    gram = gram_matrix(a)
    limit = (value * (1 + 2 * rtol) + 2 * atol / scale.clamp_min(torch.finfo(scale.dtype).tiny)) ** 2
    done = done & (_exceeds(limit + 4 * _trace(gram) * rounding_factor(a), gram) | ~scale.isfinite() | (scale == 0))
    if not done.all():
        exact = decompose(matrix[~done])
        value, u, v = value.clone(), u.clone(), v.clone()
        value[~done], u[~done], v[~done] = exact.value / scale[~done], exact.left, exact.right
    return TopPair(scale * value, scale * value, u, v)


def certify(matrix: Tensor) -> TopPair:
    """Bound the norms of large matrices ``(*B, m, n)``; decompose only those whose bound cannot be proved."""
    a, scale = _scaled(matrix)
    gram = gram_matrix(a)
    values, vectors = _krylov(gram)
    left, right, norm = both_vectors(a, vectors)
    estimate, rounding = torch.maximum(values, norm.square()), _trace(gram) * rounding_factor(a)
    bound, todo = estimate, torch.ones_like(estimate, dtype=torch.bool)
    for slack in _SLACKS:
        trial = estimate * (1 + slack) + rounding
        proved = _exceeds(trial, gram)
        bound = torch.where(todo & proved, trial, bound)
        todo = todo & ~proved
        if not todo.any():
            return TopPair(scale * norm, scale * bound.sqrt(), left, right)
    exact = decompose(matrix[todo])
    top = TopPair(scale * norm, scale * bound.sqrt(), left.clone(), right.clone())
    top.value[todo], top.bound[todo], top.left[todo], top.right[todo] = exact[:4]
    return top


def certify_largest(stack: Tensor) -> TopPair:
    """Bound the largest norm of a stack ``(F, m, n)``: search among a few matrices, then prove the bound for all."""
    _, scales = _scaled(stack)
    scale = scales.amax()
    if not (scale.isfinite() and scale > 0):
        return largest(decompose(stack))
    a = stack / scale
    gram = gram_matrix(a)
    v = _start(gram).expand(gram.shape[:-1])
    for _ in range(_POWER_STEPS):
        v, estimates = _unit((gram @ v.unsqueeze(-1)).squeeze(-1))
    which, best, found = estimates.argmax(), estimates.new_zeros(()), None
    rounding = _trace(gram).amax() * rounding_factor(a)
    for slack in (_SLACKS[0],) * _SEARCHES + _SLACKS[1:]:
        value, vector = _krylov(gram[which])
        left, right, norm = both_vectors(a[which], vector)
        value = torch.maximum(value, norm.square())
        if found is None or value > best:
            best, found = value, (norm, left, right, which)
        bound = best * (1 + slack) + rounding
        beyond = ~_exceeds(bound, gram)
        if not beyond.any():
            norm, left, right, which = found
            return TopPair(scale * norm, scale * bound.sqrt(), left, right, which)
        which = torch.where(beyond, estimates, -1).argmax()
        estimates = estimates.index_fill(0, which.reshape(1), 0)
    return largest(decompose(stack))


def _exceeds(bound: Tensor, gram: Tensor) -> Tensor:
    """Whether ``bound I - gram`` is positive definite, by its Cholesky factorisation."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky_ex(bound[..., None, None] * eye - gram)[1] == 0


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)


def largest(stack: TopPair) -> TopPair:
    """Choose the matrix with the largest norm from a stack."""
    which = stack.bound.argmax().reshape(1)
    value, bound, left, right = (t.index_select(0, which).squeeze(0) for t in stack[:4])
    return TopPair(value, bound, left, right, which.squeeze(0))


def _krylov(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the largest eigenvalue and its vector from Krylov spaces, restarted from the best vector so far."""
    x = _start(gram).expand(gram.shape[:-1])
    value = torch.zeros(gram.shape[:-2], dtype=gram.real.dtype, device=gram.device)
    steps = min(_KRYLOV_STEPS, gram.shape[-1])
    limit = torch.finfo(gram.dtype).eps ** 0.75
    for _ in range(_KRYLOV_RESTARTS):
        basis = [_unit(x)[0].unsqueeze(-1)]
        images = []
        for _ in range(steps):
            images.append(gram @ basis[-1])
            known = torch.cat(basis, dim=-1)
            w = images[-1]
            for _ in range(2):  # orthogonalising twice is enough
                w = w - known @ (known.mH @ w)
            # once the space is invariant, only rounding is left: append a zero column, which has no effect
            w, image = w.squeeze(-1), torch.linalg.vector_norm(images[-1], dim=(-2, -1))
            direction, norm = _unit(w)
            live = (norm > image * (100 * torch.finfo(gram.dtype).eps)).unsqueeze(-1)
            basis.append((direction * live).unsqueeze(-1))
        q, gq = torch.cat(basis[:-1], dim=-1), torch.cat(images, dim=-1)
        small = q.mH @ gq
        values, vectors = torch.linalg.eigh((small + small.mH) / 2)
        value, y = values[..., -1], vectors[..., -1:]
        x = (q @ y).squeeze(-1)
        error = torch.linalg.vector_norm((gq @ y).squeeze(-1) - value.unsqueeze(-1) * x, dim=-1)
        if not (error > limit * value).any():
            break
    return value, x


def _scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Divide by the largest entry, so that squares neither overflow nor underflow; 0 if that entry is not finite."""
    scale = matrix.abs().amax((-2, -1))
    usable = (scale.isfinite() & (scale > 0))[..., None, None]
    safe = torch.where(usable, scale[..., None, None], 1)
    return torch.where(usable, matrix, 0) / safe, scale


def gram_matrix(a: Tensor) -> Tensor:
    """Return the smaller one of ``A A^H`` and ``A^H A``."""
    return a @ a.mH if a.shape[-2] <= a.shape[-1] else a.mH @ a


def rounding_factor(a: Tensor) -> float:
    """Bound the rounding errors of the Gram matrix and of its eigenvalues, relative to its trace."""
    return torch.finfo(a.dtype).eps * (max(a.shape[-2:]) + 8 * min(a.shape[-2:]))


def both_vectors(a: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the left and right unit vectors and the norm, given the eigenvector of the Gram matrix."""
    if a.shape[-2] <= a.shape[-1]:
        other, norm = _unit((a.mH @ vector.unsqueeze(-1)).squeeze(-1))
        return vector, other, norm
    other, norm = _unit((a @ vector.unsqueeze(-1)).squeeze(-1))
    return other, vector, norm


def _unit(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit vector and the length; a zero vector stays zero, which makes the subgradient zero."""
    norm = torch.linalg.vector_norm(vector, dim=-1)
    return vector / norm.unsqueeze(-1).clamp_min(torch.finfo(norm.dtype).tiny), norm


def _start(a: Tensor) -> Tensor:
    """Return a fixed pseudo-random vector."""
    generator = torch.Generator().manual_seed(20)
    vector = torch.randn(a.shape[-1], generator=generator, dtype=torch.float64, device="cpu")  # the generator's device
    return (vector / vector.norm()).to(dtype=a.dtype, device=a.device)
