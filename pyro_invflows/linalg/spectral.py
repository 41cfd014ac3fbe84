r"""The largest singular value, its derivatives, and upper bounds on it.

With :math:`\sigma = u^H A v` the derivative is :math:`d\sigma = \mathrm{Re}(u^H\, dA\, v)`. If :math:`\sigma` is
simple, the derivatives of the vectors solve

.. math:: \begin{pmatrix} \sigma I & -A \\ -A^H & \sigma I \end{pmatrix} \begin{pmatrix} du \\ dv \end{pmatrix}
   = \begin{pmatrix} dA\, v \\ dA^H u \end{pmatrix}

orthogonally to the null vector (u, v), which gives second derivatives without a full decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_invflows.linalg.dense import solve
from pyro_invflows.linalg.singular import (
    both_vectors,
    certify,
    certify_largest,
    decompose,
    gram_matrix,
    largest,
    power_iteration,
    rounding_factor,
)
from pyro_invflows.support.checks import is_int
from pyro_invflows.support.derivatives import steps_with_graph
from pyro_invflows.support.devices import lacks_float64
from pyro_invflows.support.modes import forward_levels, in_forward_mode, in_functorch
from pyro_invflows.support.precision import without_autocast

__all__ = ["convolution_norm_bound", "spectral_norm", "spectral_norm_bound", "spectral_norm_bounds"]

#: Largest smaller side of a matrix that is decomposed: up to it, the alternatives cost no less.
_LARGEST_EXACT = 128
#: The same for a stack of many small matrices (the frequencies of a convolution).
_LARGEST_EXACT_STACK = 12
#: Frequencies per axis and degree of the kernel; the bound is too large by at most (1 / cos(pi / 16))^2, 4 %.
_POINTS = 16


def spectral_norm(
    matrix: Tensor, *, atol: float | None = None, rtol: float | None = None, max_steps: int = 200
) -> Tensor:
    r"""Return the largest singular value of each matrix, by power iteration, with the derivative :math:`u v^T`.

    The iteration has converged when :math:`|A^T u - \sigma v| \le \mathrm{atol} + \mathrm{rtol}\, \sigma` and a
    Cholesky factorisation of :math:`\sigma^2 I - A^T A`, with a margin for these tolerances, proves that no singular
    value is larger. A matrix that does not converge within ``max_steps`` is decomposed instead, so the result is right
    either way. The starting vector is pseudo-random but fixed: torch's generators are not used. Derivatives of every
    order in reverse and forward mode. If the largest singular value is repeated or zero, the first derivative is a
    subgradient (zero for a zero matrix) and the second does not exist (``LinAlgError``).

    Args:
        matrix: ``(*B, m, n)``, real or complex.
        atol: Absolute tolerance; default 0.
        rtol: Relative tolerance; default ``eps ** 0.75`` of the dtype.
        max_steps: Maximum number of steps; each takes two products with the matrix. Under ``torch.func`` and while
            compiling, every matrix is decomposed.

    Returns:
        ``(*B,)``, real; NaN for a matrix with an entry that is not finite.

    Raises:
        ValueError: if the argument is not a matrix, or a setting is out of range.

    Example:
        >>> from pyro_invflows.linalg import spectral_norm
        >>> a = torch.tensor([[3.0, 0.0], [0.0, -4.0]], requires_grad=True)
        >>> norm = spectral_norm(a)
        >>> expected = torch.tensor([[0.0, 0.0], [0.0, -1.0]])
        >>> round(norm.item(), 4), torch.allclose(torch.autograd.grad(norm, a)[0], expected, atol=1e-3)
        (4.0, True)
    """
    _check(matrix, "spectral_norm")
    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not value >= 0:
            raise ValueError(f"spectral_norm: {name} must be None or at least 0, but got {value!r}.")
    if not is_int(max_steps) or max_steps < 0:
        raise ValueError(f"spectral_norm: max_steps must be an int of at least 0, but got {max_steps!r}.")
    a = _double(matrix)
    with torch.no_grad(), without_autocast(a):
        rtol = torch.finfo(matrix.dtype).eps ** 0.75 if rtol is None else rtol
        constant = a.detach()
        top = decompose(constant) if _is_hidden(a) else power_iteration(constant, atol or 0.0, rtol, max_steps)
    return _attach(a, top.value, top.left, top.right).to(_result_dtype(matrix))


def spectral_norm_bound(matrix: Tensor) -> Tensor:
    r"""Return a tight upper bound on the spectral norm, which holds in spite of rounding errors.

    Matrices with a side of up to 128 are decomposed: the bound exceeds the norm by rounding only. For larger ones a
    Krylov method estimates :math:`\sigma^2`, and a Cholesky factorisation of :math:`(1 + \delta) \sigma^2 I - A^T A`
    proves the bound, with :math:`\delta` from 1e-5 to 1e-2; if no :math:`\delta` succeeds, they are decomposed too.
    O(m n min(m, n)).

    Args:
        matrix: ``(*B, m, n)``, real or complex.

    Returns:
        ``(*B,)``, real; not finite for a matrix with an entry that is not. Derivatives as in :func:`spectral_norm`.

    Raises:
        ValueError: if the argument is not a matrix.
    """
    _check(matrix, "spectral_norm_bound")
    return spectral_norm_bounds([matrix])[0]


def spectral_norm_bounds(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return :func:`spectral_norm_bound` of several matrices; those of equal smaller side are decomposed together.

    Args:
        matrices: Each ``(*B, m, n)``.
    """
    bounds: list[Tensor | None] = [None] * len(matrices)
    groups: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        if matrix.dim() == 2 and matrix.dtype == torch.float32 and not _is_hidden(matrix):
            groups.setdefault((min(matrix.shape), matrix.device), []).append(i)
    for (size, device), members in groups.items():
        if size <= _LARGEST_EXACT and not lacks_float64(device):
            together = _decompose_together([matrices[i] for i in members])
            for i, bound in zip(members, together or (), strict=bool(together)):
                bounds[i] = bound
    return [_bound_alone(m) if b is None else b for m, b in zip(matrices, bounds, strict=True)]


def _decompose_together(matrices: Sequence[Tensor]) -> list[Tensor] | None:
    """Bound float32 matrices by a batched decomposition, in float64, where squares neither overflow nor underflow."""
    with torch.no_grad(), without_autocast(matrices[0]):
        doubles = [m.detach().double() for m in matrices]
        try:
            values, vectors = torch.linalg.eigh(torch.stack([gram_matrix(a) for a in doubles]))
        except torch.linalg.LinAlgError:  # an entry is not finite
            return None
        top = torch.add(values[:, -1], values.sum(-1), alpha=max(rounding_factor(a) for a in doubles)).clamp_min(0)
        bounds = _round_up(top.sqrt(), torch.float32)
        vectors = vectors[..., -1]
    if not torch.is_grad_enabled() and not in_forward_mode():
        return list(bounds.unbind())
    return list(_StackedNorms.apply(bounds, vectors, *matrices).unbind())


def _bound_alone(matrix: Tensor) -> Tensor:
    a = _double(matrix)
    with torch.no_grad(), without_autocast(a):
        constant = a.detach()
        small = min(a.shape[-2:]) <= _LARGEST_EXACT
        top = decompose(constant) if small or _is_hidden(a) else certify(constant)
    return _round_up(_attach(a, top.bound, top.left, top.right), _result_dtype(matrix))


def convolution_norm_bound(kernel: Tensor) -> Tensor:
    r"""Return an upper bound on the operator norm of a two-dimensional convolution, for images of any size.

    On the infinite grid the norm is the largest spectral norm of the symbol :math:`\hat K(\omega) = \sum_s K_s e^{-i
    \omega \cdot s}` over all frequencies. On a finite image with zero padding it is smaller, and approaches this value
    as the image grows. The symbol is a trigonometric polynomial of degree :math:`d = (k - 1)/2` along each axis, so
    its maximum over N equally spaced frequencies falls short of its supremum by at most a factor of
    :math:`\cos(\pi d / N)` per axis (Ehlich and Zeller 1964). Stride 1, any padding of up to k - 1, no dilation.

    Args:
        kernel: ``(out_channels, in_channels, k_h, k_w)``, real, k odd.

    Returns:
        A scalar, at most 4 % above the supremum (0 % for 1 x 1 kernels). Derivatives as in :func:`spectral_norm`.

    Raises:
        ValueError: if the kernel has another shape or an even side.
    """
    if kernel.dim() != 4 or not kernel.shape[-1] % 2 or not kernel.shape[-2] % 2:
        raise ValueError(
            "convolution_norm_bound needs a kernel (out_channels, in_channels, k_h, k_w) with odd k, but got "
            f"{tuple(kernel.shape)}."
        )
    if kernel.shape[-2:] == (1, 1):
        return spectral_norm_bound(kernel[..., 0, 0])
    k = _double(kernel)
    phases, excess = _phases(k)
    with torch.no_grad(), without_autocast(k):
        symbols = torch.einsum("oip,fp->foi", k.detach().flatten(-2).to(phases.dtype), phases)
        small = min(symbols.shape[-2:]) <= _LARGEST_EXACT_STACK
        top = largest(decompose(symbols)) if small or _is_hidden(k) else certify_largest(symbols)
        phase = phases.index_select(0, top.which.reshape(1)).squeeze(0)  # type: ignore[union-attr]
    symbol = torch.einsum("oip,p->oi", k.flatten(-2).to(phase.dtype), phase)
    return _round_up(_attach(symbol, top.bound, top.left, top.right) * excess, _result_dtype(kernel))


def _phases(kernel: Tensor) -> tuple[Tensor, float]:
    """Return ``e^{-i w.s}`` for half of the frequencies (the others are conjugates), and a factor for the gaps."""
    angles, excess = [], 1.0
    for axis, size in enumerate(kernel.shape[-2:]):
        degree = size // 2
        points = _POINTS * degree if degree else 1
        excess /= math.cos(math.pi * degree / points)
        chosen = points // 2 + 1 if axis == 0 else points
        frequency = torch.arange(chosen, dtype=torch.float64, device=kernel.device) * (2 * math.pi / points)
        position = torch.arange(size, dtype=torch.float64, device=kernel.device) - degree
        angles.append(frequency.unsqueeze(-1) * position)
    total = angles[0][:, None, :, None] + angles[1][None, :, None, :]
    complex_dtype = torch.complex128 if kernel.dtype == torch.float64 else torch.complex64
    return torch.polar(torch.ones_like(total), -total).flatten(2).flatten(0, 1).to(complex_dtype), excess


# ---------------------------------------------------------------------- derivatives


def _attach(matrix: Tensor, value: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the value, the norm or a bound on it, with the derivatives of the largest singular value."""
    if torch.compiler.is_compiling():
        norm = _quotient(matrix, left, right)
        return norm + (value - norm).detach()
    if forward_levels() < 2:
        return _Norm.apply(matrix, value, left, right)
    # Newton's method for the vectors, with a graph; one step fewer, because the norm's error is the square of theirs
    for _ in range(steps_with_graph() - 1):
        to_left, to_right = _pseudo_solve(matrix, left, right, *_images(matrix, left, right))
        left, right = F.normalize(left + to_left, dim=-1), F.normalize(right + to_right, dim=-1)
    norm = _quotient(matrix, left, right)
    return norm + (value - norm).detach()


def _quotient(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``Re(u^H A v)``."""
    return torch.einsum("...m,...mn,...n->...", left.conj(), matrix, right).real


def _images(matrix: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``A v`` and ``A^H u``."""
    up = torch.einsum("...mn,...n->...m", matrix, right)
    down = torch.einsum("...mn,...m->...n", matrix.conj(), left)
    return up, down


class _Norm(torch.autograd.Function):
    """Returns the given value; its derivative is ``Re(u^H dA v)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, value: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        matrix, _, left, right = inputs
        ctx.save_for_backward(matrix, left, right)
        ctx.save_for_forward(matrix, left, right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors[1:]
        if torch.is_grad_enabled() or in_functorch():  # second derivatives may follow
            left, right = _Vectors.apply(*ctx.saved_tensors)
        return grad[..., None, None] * left.unsqueeze(-1) * right.conj().unsqueeze(-2), None, None, None

    @staticmethod
    def jvp(ctx: Any, change: Tensor, *_: None) -> Tensor:
        left, right = _Vectors.apply(*ctx.saved_tensors)
        return _quotient(change, left, right)


class _StackedNorms(torch.autograd.Function):
    """As :class:`_Norm`, for several matrices with one known vector each; faster, but not for ``torch.func``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, vectors: Tensor, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(values, vectors, *matrices)
        ctx.save_for_forward(values, vectors, *matrices)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, vectors, *matrices = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(matrices)
        # u v^T = w (w^T A) / s or (A w) w^T / s, where w is the known vector
        single = vectors.float()
        scaled = single * (grad / values.clamp_min(1e-30)).unsqueeze(-1)
        for i, matrix in enumerate(matrices):
            if not ctx.needs_input_grad[i + 2]:
                continue
            if torch.is_grad_enabled():  # second derivatives may follow
                with torch.no_grad():
                    left, right = _single_vectors(matrix, vectors[i])
                left, right = _Vectors.apply(matrix, left, right)
                grads[i] = (grad[i] * left).unsqueeze(-1) * right
            elif matrix.shape[-2] <= matrix.shape[-1]:
                grads[i] = torch.outer(scaled[i], single[i] @ matrix)
            else:
                grads[i] = torch.outer(matrix @ single[i], scaled[i])
        return None, None, *grads

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *changes: Tensor | None) -> Tensor:
        _values, vectors, *matrices = ctx.saved_tensors
        norms = []
        for matrix, vector, change in zip(matrices, vectors, changes, strict=True):
            left, right = _single_vectors(matrix.detach(), vector)
            left, right = _Vectors.apply(matrix, left, right)
            norms.append(matrix.new_zeros(()) if change is None else left @ change @ right)
        return torch.stack(norms)


def _single_vectors(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    left, right, _ = both_vectors(matrix.double(), vector)
    return left.float(), right.float()


class _Vectors(torch.autograd.Function):
    """Returns the given vectors; only second derivatives of the norm differentiate it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left.clone(), right.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, grad_left: Tensor, grad_right: Tensor) -> tuple[Tensor | None, ...]:
        matrix, left, right = ctx.saved_tensors
        to_left, to_right = _pseudo_solve(matrix, left, right, grad_left, grad_right)
        grad = to_left.unsqueeze(-1) * right.conj().unsqueeze(-2) + left.unsqueeze(-1) * to_right.conj().unsqueeze(-2)
        return grad, None, None

    @staticmethod
    def jvp(ctx: Any, change: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        matrix, left, right = ctx.saved_tensors
        return _pseudo_solve(matrix, left, right, *_images(change, left, right))


def _pseudo_solve(matrix: Tensor, left: Tensor, right: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the pseudo-inverse of ``[[s I, -A], [-A^H, s I]]``, whose null vector is (u, v)."""
    m, n = matrix.shape[-2:]
    value = _quotient(matrix, left, right)
    null = torch.cat([left, right], dim=-1) / math.sqrt(2)
    rhs = torch.cat([up, down], dim=-1)
    rhs = rhs - null * (null.conj() * rhs).sum(-1, keepdim=True)
    eye = torch.eye(m + n, dtype=matrix.dtype, device=matrix.device)
    zero = matrix.new_zeros
    batch = matrix.shape[:-2]
    blocks = torch.cat(
        [
            torch.cat([zero(*batch, m, m), matrix], dim=-1),
            torch.cat([matrix.mH, zero(*batch, n, n)], dim=-1),
        ],
        dim=-2,
    )
    system = value[..., None, None] * eye - blocks + null.unsqueeze(-1) * null.conj().unsqueeze(-2)
    # a zero right-hand side: the system, which may be singular (for a zero matrix), is not needed
    idle = (rhs == 0).all(-1)[..., None, None]
    answer = solve(torch.where(idle, eye, system), rhs.unsqueeze(-1)).squeeze(-1)
    return answer[..., :m], answer[..., m:]


# ---------------------------------------------------------------------- arguments


def _check(matrix: Tensor, owner: str) -> None:
    if matrix.dim() < 2 or not all(matrix.shape[-2:]):
        raise ValueError(f"{owner} needs non-empty matrices (*B, m, n), but got the shape {tuple(matrix.shape)}.")


def _double(value: Tensor) -> Tensor:
    """Convert to double precision if the device has it: in single, rounding errors would exceed the bound's margin."""
    if lacks_float64(value.device):
        return value.float()
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _result_dtype(value: Tensor) -> torch.dtype:
    """Return the real dtype of the norm: never half precision, in which the bound would not hold."""
    return torch.promote_types(value.real.dtype, torch.float32)


def _round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    return (value * (1 + 2 * torch.finfo(dtype).eps)).to(dtype)


def _is_hidden(value: Tensor) -> bool:
    """Whether Python code cannot inspect the values."""
    return torch.compiler.is_compiling() or value.is_meta or in_functorch()
