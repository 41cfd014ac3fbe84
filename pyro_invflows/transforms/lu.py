r"""A dense linear layer given by its triangular factors. With ``dim=-3`` it acts on the channels of each pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyro_invflows import linalg
from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.core.path_gradient import linear_path_gradient
from pyro_invflows.support.checks import invertible_matrix
from pyro_invflows.support.computed import compute_tensors
from pyro_invflows.support.precision import at_least_single, full_precision
from pyro_invflows.transforms.diagonal import _along, _sum_log_scale

__all__ = ["LULinear", "conditional_lu_linear", "lu_linear"]


class LULinear(Bijection):
    r"""Applies a general invertible matrix through its triangular factors.

    .. math:: y = P L (\mathrm{diag}(d) + U) x + b, \qquad d = \pm e^{\lambda},

    where P is a permutation, L unit lower triangular and U strictly upper triangular. Invertible because no entry of d
    is zero: the logarithms of \|d\| are learned, and the signs of d and P are fixed. Choose it to mix all elements
    between other layers: it is the cheapest full matrix. Every invertible matrix has this form for some P and signs
    (see :meth:`from_matrix`). With those of a new layer, P = I and d > 0, it can become any matrix whose leading
    principal minors are all positive.

    **Forward**: two triangular products, O(D^2) per point. **Inverse**: two triangular solves, O(D^2) per point. y is
    reproduced to rounding error; the error of x grows with the condition numbers of the factors. Derivatives of all
    orders in both directions. **Log-det**: :math:`\sum_i \lambda_i`, times the number of pixels of an image.
    **Identity**: exactly, at initialisation.

    Args:
        input_dim: Size D of an event along ``dim``.
        bias: Whether to learn b.
        dim: Axis of the D elements: -1 for vectors, -3 for an invertible 1 x 1 convolution.

    Attributes:
        triangles: Parameter ``(D, D)``, with L below the diagonal, U above it, and :math:`\lambda` on it.
        bias: b, a parameter ``(D,)``; None without a bias.
        permutation: Buffer ``(D,)`` of integers; P moves element ``permutation[i]`` to place i.
        sign_of_scale: The signs of d, a buffer ``(D,)`` of 1 and -1.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``, where every pixel is treated alike;
        log-det ``(*B,)``.

    Raises:
        ValueError: if an event does not have the size D along ``dim``.

    Differs from Pyro's ``GeneralizedChannelPermute``: it takes vectors as well as images and any batch of parameters,
    and its inverse solves triangular systems instead of forming an inverse matrix.

    References:
        Kingma and Dhariwal (2018), *Glow: generative flow with invertible 1x1 convolutions*, Eq. 10; Oliva et al.
        (2018), *Transformation autoregressive networks*, section 3.2.

    Example:
        >>> layer = LULinear.from_matrix(torch.tensor([[0.0, 2.0], [-1.0, 1.0]]))
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
        >>> layer.permutation.tolist()
        [1, 0]
    """

    input_dim: int
    permutation: Tensor
    sign_of_scale: Tensor

    def __init__(self, input_dim: int, *, bias: bool = True, dim: int = -1, cache_size: int = 1) -> None:
        super().__init__(input_dim, dim=dim, cache_size=cache_size)
        input_dim = self.input_dim
        self.triangles = nn.Parameter(torch.empty(input_dim, input_dim))
        self.bias = nn.Parameter(torch.empty(input_dim)) if bias else None
        self.register_buffer("permutation", torch.arange(input_dim))
        self.register_buffer("sign_of_scale", torch.ones(input_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set P = L = I, U = 0, d = 1 and b = 0, so that the layer is the identity."""
        nn.init.zeros_(self.triangles)
        self.permutation.copy_(torch.arange(self.input_dim))
        nn.init.ones_(self.sign_of_scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_matrix(cls, matrix: Tensor, *, bias: bool = True, dim: int = -1) -> LULinear:
        """Build the layer with ``layer.matrix == matrix`` for any invertible (D, D) matrix.

        The permutation is that of partial pivoting, so that no entry of L exceeds 1 in absolute value.

        Raises:
            ValueError: if the matrix is not square, not finite or singular.
        """
        p, lower, upper = torch.linalg.lu(invertible_matrix(matrix, "LULinear.from_matrix"))
        diagonal = upper.diagonal()
        layer = cls(len(p), bias=bias, dim=dim).to(matrix)
        with torch.no_grad():
            layer.triangles.copy_(lower.tril(-1) + upper.triu(1) + diagonal.abs().log().diag())
            layer.sign_of_scale.copy_(diagonal.sign())
            layer.permutation.copy_(p.argmax(-1))
        return layer

    @property
    @at_least_single
    def matrix(self) -> Tensor:
        """The matrix ``P L (diag(d) + U)``, ``(*B, D, D)``."""
        compute_tensors(self)
        return self._permuted_lower() @ self._upper().triu()

    def _permuted_lower(self) -> Tensor:
        """Return P L."""
        ones = torch.ones_like(self.triangles.diagonal(dim1=-2, dim2=-1))
        lower = torch.diagonal_scatter(self.triangles, ones, dim1=-2, dim2=-1).tril()
        # permute the rows of the factor instead of the values, which are many more for images
        return lower.index_select(-2, self.permutation)

    def _upper(self) -> Tensor:
        """Return diag(d) + U; the entries below the diagonal are arbitrary."""
        diagonal = self.sign_of_scale * self._log_scale().exp()
        return torch.diagonal_scatter(self.triangles, diagonal, dim1=-2, dim2=-1)

    def _log_scale(self) -> Tensor:
        return self.triangles.diagonal(dim1=-2, dim2=-1)

    def _aligned(self, parameter: Tensor, event_dims: int) -> Tensor:
        """Align a parameter ``(*B, *E)`` with rows, by inserting the pixels between the batch and the channels."""
        if parameter.dim() > event_dims:
            for _ in range(-self.dim - 1):
                parameter = parameter.unsqueeze(-event_dims - 1)
        return parameter

    @at_least_single
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x if self.dim == -1 else x.movedim(self.dim, -1)
        lower, upper = self._permuted_lower(), self._upper().triu()
        if self.triangles.dim() == 2 and (self.bias is None or self.bias.dim() == 1):
            y = linear(linear(rows, upper), lower, self.bias)
        else:
            lower, upper = self._aligned(lower, 2), self._aligned(upper, 2)
            y = linalg.rows_times(linalg.rows_times(rows, upper.mT), lower.mT)
            y = y if self.bias is None else y + self._aligned(self.bias, 1)
        return (y if self.dim == -1 else y.movedim(-1, self.dim)), self._log_scale()

    @full_precision
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Tensor]:
        centred = y if self.bias is None else y - _along(self.bias, self.dim)
        rows = centred if self.dim == -1 else centred.movedim(self.dim, -1)
        # sorted in each call, because a second buffer could contradict the first
        rows = rows.index_select(-1, self.permutation.argsort())
        rows = linalg.solve_for_rows(self._aligned(self.triangles, 2), rows, upper=False, unitriangular=True)
        x = linalg.solve_for_rows(self._aligned(self._upper(), 2), rows, upper=True)
        return (x if self.dim == -1 else x.movedim(-1, self.dim)), self._log_scale()

    @at_least_single
    def _aux(self, x: Tensor, y: Tensor) -> Tensor:
        return self._log_scale()

    @at_least_single
    def _log_det(self, x: Tensor, y: Tensor, aux: Tensor) -> Tensor:
        return _sum_log_scale(self, aux, x)

    @full_precision
    def _adjoint(self, gradient: Tensor, inverse: bool) -> Tensor:
        """Return ``J^{-T} g``, by two transposed solves; ``J^T g`` in the inverse direction."""
        rows = gradient if self.dim == -1 else gradient.movedim(self.dim, -1)
        if inverse:
            rows = linalg.rows_times(rows, self._aligned(self._permuted_lower(), 2))
            rows = linalg.rows_times(rows, self._aligned(self._upper().triu(), 2))
        else:
            rows = linalg.solve_for_rows(self._aligned(self._upper(), 2).mT, rows, upper=False)
            rows = linalg.solve_for_rows(self._aligned(self.triangles, 2).mT, rows, upper=True, unitriangular=True)
            rows = rows.index_select(-1, self.permutation)
        return rows if self.dim == -1 else rows.movedim(-1, self.dim)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        return linear_path_gradient(self, value, inverse, lambda: self._adjoint(gradient, inverse))

    def extra_repr(self) -> str:
        return f"{self.input_dim}" + (f", dim={self.dim}" if self.dim != -1 else "")


def lu_linear(input_dim: int, *, bias: bool = True, dim: int = -1) -> LULinear:
    """Build an :class:`LULinear`; it is initially the identity."""
    return LULinear(input_dim, bias=bias, dim=dim)


conditional_lu_linear = conditional_factory(lu_linear)
