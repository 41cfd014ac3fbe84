r"""A linear layer, the identity plus a low-rank matrix, whose inverse costs as much as the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_invflows import linalg
from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.core.path_gradient import linear_path_gradient
from pyro_invflows.support.checks import positive_int
from pyro_invflows.support.computed import compute_tensors
from pyro_invflows.support.precision import at_least_single

__all__ = ["LowRankLinear", "conditional_low_rank_linear", "low_rank_linear"]


class LowRankLinear(Bijection):
    r"""Stretches and shrinks within two learned subspaces of low dimension.

    .. math:: y = (I + U U^T)(I + W W^T)^{-1} x + b.

    Invertible because both factors are positive definite for all U and W. Choose it in many dimensions, where
    :class:`~pyro_invflows.SVDLinear` is too expensive. (The matrices :math:`(I + W W^T)^{-1}` are those of the form
    :math:`I - V V^T` with :math:`|V| < 1`, but W needs no constraint.)

    **Forward**, **Inverse**: O(D r) per point after O(D r^2) once, for a thin QR factorisation that never forms
    :math:`U^T U`; derivatives of all orders. x is as ill-conditioned as the matrix, whose condition number is at most
    :math:`(1 + |U|^2)(1 + |W|^2)`. **Log-det**: :math:`\log\det(I + U U^T) - \log\det(I + W W^T)`, from the same
    factorisations. **Identity**: up to rounding error, at initialisation: U = W, drawn with torch's global generator
    (if they were zero, so would be their gradients).

    Args:
        input_dim: Size D of an event.
        rank: Number r of columns of U and of W, between 1 and D; default ``min(D, 16)``.
        bias: Whether to learn b.

    Attributes:
        left: U, a parameter ``(D, r)``.
        right: W, a parameter ``(D, r)``.
        bias: b, a parameter ``(D,)``; None without a bias.

    Shape:
        ``(*B, D) -> (*B, D)``; log-det ``(*B,)``.

    Raises:
        ValueError: if ``rank`` is not between 1 and D, or an event does not have the size D.

    References:
        Woodbury (1950), *Inverting modified matrices*, for the inverse of the identity plus low rank.

    Example:
        >>> layer = LowRankLinear(5, 2)
        >>> _ = torch.nn.init.normal_(layer.left)
        >>> x = torch.randn(7, 5)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    input_dim: int

    def __init__(self, input_dim: int, rank: int | None = None, *, bias: bool = True, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        input_dim = self.input_dim
        rank = min(input_dim, 16) if rank is None else positive_int(rank, "rank", "LowRankLinear")
        if rank > input_dim:
            raise ValueError(
                f"LowRankLinear: rank must be between 1 and input_dim, but got rank={rank} and input_dim={input_dim}; "
                "use SVDLinear for a full matrix."
            )
        self.rank = rank
        self.left = nn.Parameter(torch.empty(input_dim, rank))
        self.right = nn.Parameter(torch.empty(input_dim, rank))
        self.bias = nn.Parameter(torch.empty(input_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw U = W, so that the factors cancel; set b = 0."""
        nn.init.normal_(self.left, std=0.5 * self.input_dim**-0.5)
        with torch.no_grad():
            self.right.copy_(self.left)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    @at_least_single
    def matrix(self) -> Tensor:
        """The matrix ``(I + U U^T)(I + W W^T)^{-1}``, ``(*B, D, D)``."""
        compute_tensors(self)
        eye = torch.eye(self.input_dim, dtype=self.left.dtype, device=self.left.device)
        inner, _ = linalg.symmetric_low_rank_inverse(self.right)
        return (eye + self.left @ self.left.mT) @ (eye - inner @ inner.mT)

    @staticmethod
    def _apply_factors(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        """Return ``(I + A A^T)(I - V V^T) x`` for A = outer and V = inner, in two passes over x."""
        both = torch.cat([inner, outer], dim=-1)  # (*B, D, 2 r)
        first, second = linalg.rows_times(x, both).chunk(2, dim=-1)  # V^T x and A^T x
        second = second - linalg.rows_times(first, inner.mT @ outer)  # A^T (x - V V^T x)
        change = torch.cat([-first, second], dim=-1)
        if x.dim() == 2 and both.dim() == 2:
            return torch.addmm(x, change, both.mT)
        return x + linalg.rows_times(change, both.mT)

    @at_least_single
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        inverse, log_det = linalg.symmetric_low_rank_inverse(self.right)
        y = self._apply_factors(x, inverse, self.left)
        return (y if self.bias is None else y + self.bias), (None, log_det)

    @at_least_single
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        inverse, log_det = linalg.symmetric_low_rank_inverse(self.left)
        centred = y if self.bias is None else y - self.bias
        return self._apply_factors(centred, inverse, self.right), (log_det, None)

    def _aux(self, x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    @at_least_single
    def _log_det(self, x: Tensor, y: Tensor, aux: tuple[Tensor | None, Tensor | None]) -> Tensor:
        left, right = aux  # each direction has factorised one of them already
        if left is None:
            left = linalg.symmetric_low_rank_inverse(self.left)[1]
        if right is None:
            right = linalg.symmetric_low_rank_inverse(self.right)[1]
        return (left - right).expand(self.log_det_shape(x))

    @at_least_single
    def _adjoint(self, gradient: Tensor, inverse: bool) -> Tensor:
        """Return ``J^{-T} g``, that is ``(I + U U^T)^{-1} (I + W W^T) g``; ``J^T g`` in the inverse direction."""
        outer, other = (self.left, self.right) if inverse else (self.right, self.left)
        inner, _ = linalg.symmetric_low_rank_inverse(other)
        rows = gradient + linalg.rows_times(linalg.rows_times(gradient, outer), outer.mT)
        return rows - linalg.rows_times(linalg.rows_times(rows, inner), inner.mT)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        return linear_path_gradient(self, value, inverse, lambda: self._adjoint(gradient, inverse))

    def extra_repr(self) -> str:
        return f"{self.input_dim}, rank={self.rank}"


def low_rank_linear(input_dim: int, rank: int | None = None, *, bias: bool = True) -> LowRankLinear:
    """Build a :class:`LowRankLinear`."""
    return LowRankLinear(input_dim, rank, bias=bias)


conditional_low_rank_linear = conditional_factory(low_rank_linear)
