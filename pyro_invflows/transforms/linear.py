r"""Dense linear layers whose inverse costs as much as the forward pass: orthogonal and SVD.

Orthogonal factors are products of Householder reflections in compact WY form
(:mod:`pyro_invflows.linalg.householder`), after Tomczak and Welling (2016) and Mhammedi et al. (2017). With
``dim=-3`` the same layers act on the channels of each pixel, as invertible 1 x 1 convolutions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_invflows import linalg
from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.core.kinds import VolumePreserving
from pyro_invflows.core.path_gradient import linear_path_gradient
from pyro_invflows.support.checks import floating_tensor, invertible_matrix, positive_int
from pyro_invflows.support.computed import compute_tensors
from pyro_invflows.support.constants import HoldsConstants
from pyro_invflows.support.precision import at_least_single
from pyro_invflows.transforms.diagonal import _along, _sum_log_scale

__all__ = ["Orthogonal", "SVDLinear", "conditional_orthogonal", "conditional_svd_linear", "orthogonal", "svd_linear"]


class _Reflecting(HoldsConstants, Bijection):
    """Base class of layers with Householder factors, each of ``num_reflections`` rows."""

    input_dim: int
    triangle: Tensor

    def __init__(self, input_dim: int, *, num_reflections: int | None, dim: int, cache_size: int) -> None:
        super().__init__(input_dim, dim=dim, cache_size=cache_size)
        input_dim = self.input_dim
        if num_reflections is None:
            num_reflections = input_dim - input_dim % 2  # enough for every rotation; even, to start at the identity
        self.num_reflections = positive_int(num_reflections, "num_reflections", type(self).__name__, minimum=0)

    def _constants(self, like: Tensor) -> dict[str, Tensor]:
        # built once, because building it in each call would cost as much as a small product
        return {"triangle": linalg.triangle_mask(self.num_reflections, like)}

    def _new_vectors(self) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.num_reflections, self.input_dim))

    def _matrix(self, images_of_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the matrix of a linear map, given as a function from rows to their images."""
        compute_tensors(self)
        return images_of_rows(torch.eye(self.input_dim, dtype=self.triangle.dtype, device=self.triangle.device)).mT

    def extra_repr(self) -> str:
        return f"{self.input_dim}, num_reflections={self.num_reflections}" + (
            f", dim={self.dim}" if self.dim != -1 else ""
        )

    def _reflect(self, vectors: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        if self.dim == -1:
            return linalg.householder_product(vectors, x, mask=self.triangle, transpose=transpose)
        if vectors.dim() > 2:  # conditioned: insert the pixels between the batch and the channels
            for _ in range(-self.dim - 1):
                vectors = vectors.unsqueeze(-3)
        x = x.movedim(self.dim, -1)
        return linalg.householder_product(vectors, x, mask=self.triangle, transpose=transpose).movedim(-1, self.dim)


class Orthogonal(_Reflecting, VolumePreserving):
    r"""Rotates (and reflects) by a learned orthogonal matrix.

    .. math:: y = H_1 H_2 \cdots H_k x + b, \qquad H_i = I - 2 u_i u_i^T / |u_i|^2.

    Invertible because a product of reflections is orthogonal for all u_i; for a zero u_i, H_i is the identity.
    Choose it to mix elements between couplings without changing volume.

    **Forward**, **Inverse**: compact WY form, O(k D) per point after O(k D min(k, 128)) once; derivatives of all
    orders unless some u_i is zero (a zero row stays zero under gradient descent). **Log-det**: 0.
    **Identity**: up to rounding error, at initialisation: random rows, drawn with torch's global generator, in pairs of
    equal ones (and, for odd k, one zero row).

    Args:
        input_dim: Size D of an event along ``dim``.
        num_reflections: Number k of reflections. The determinant is (-1)^k if no row is zero. The default, D or D - 1,
            whichever is even, is enough for every rotation.
        bias: Whether to learn b.
        dim: Axis of the D elements: -1 for vectors, -3 for an orthogonal 1 x 1 convolution.

    Attributes:
        vectors: The u_i as rows, a parameter ``(k, D)``; any values are legal.
        bias: b, a parameter ``(D,)``; None without a bias.
        triangle: Constant mask, a buffer; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``, where every pixel is treated alike;
        log-det ``(*B,)``.

    Raises:
        ValueError: if an event does not have the size D along ``dim``.

    Differs from Pyro's ``Householder``: it solves one triangular system instead of looping over the reflections, and
    takes any batch shape and images.

    References:
        Tomczak and Welling (2016), *Improving variational auto-encoders using Householder flow*, Eq. 7;
        Mhammedi et al. (2017), *Efficient orthogonal parametrisation of recurrent neural networks using Householder
        reflections*; Bischof and Van Loan (1987) for the WY form.

    Example:
        >>> layer = Orthogonal(3)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-6)
        True
    """

    def __init__(
        self,
        input_dim: int,
        *,
        num_reflections: int | None = None,
        bias: bool = False,
        dim: int = -1,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, num_reflections=num_reflections, dim=dim, cache_size=cache_size)
        input_dim = self.input_dim
        self.vectors = self._new_vectors()
        self.bias = nn.Parameter(torch.empty(input_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw reflections whose product is the identity; set b = 0."""
        self.fill_constants()
        linalg.identity_reflections(self.vectors)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_matrix(cls, matrix: Tensor, *, bias: bool = False, dim: int = -1) -> Orthogonal:
        """Build the layer with ``layer.matrix == matrix`` for any orthogonal (D, D) matrix, with determinant 1 or -1.

        Raises:
            TypeError: if the matrix is not a floating point tensor.
            ValueError: if the matrix is not orthogonal.
        """
        vectors = linalg.householder_vectors(floating_tensor(matrix, "matrix", "Orthogonal.from_matrix"))
        layer = cls(len(matrix), num_reflections=len(matrix), bias=bias, dim=dim).to(matrix)
        with torch.no_grad():
            layer.vectors.copy_(vectors)
        return layer

    @property
    @at_least_single
    def matrix(self) -> Tensor:
        """The orthogonal matrix Q, ``(*B, D, D)``."""
        return self._matrix(lambda eye: linalg.householder_product(self.vectors.unsqueeze(-3), eye))

    @at_least_single
    def _function(self, x: Tensor) -> Tensor:
        y = self._reflect(self.vectors, x)
        return y if self.bias is None else y + _along(self.bias, self.dim)

    @at_least_single
    def _inverse_function(self, y: Tensor) -> Tensor:
        centred = y if self.bias is None else y - _along(self.bias, self.dim)
        return self._reflect(self.vectors, centred, transpose=True)

    @at_least_single
    def _adjoint(self, gradient: Tensor, inverse: bool) -> Tensor:
        """Return ``J^{-T} g``: Q itself is the adjoint of its inverse."""
        return self._reflect(self.vectors, gradient, transpose=inverse)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        return linear_path_gradient(self, value, inverse, lambda: self._adjoint(gradient, inverse))


class SVDLinear(_Reflecting):
    r"""Applies a general invertible matrix through its singular value decomposition.

    .. math:: y = U \mathrm{diag}(s) V^T x + b, \qquad s = e^{\lambda},

    where U and V are products of Householder reflections. Invertible because both factors are orthogonal and s is
    positive. Choose it for a full linear layer whose singular values you want to read, regularise or freeze; both
    directions cost the same, and no matrix is factorised. If you do not need them, :class:`~pyro_invflows.LULinear` is
    two to three times as fast.

    **Forward**, **Inverse**: twice the cost of :class:`Orthogonal`. **Log-det**: :math:`\sum_i \lambda_i`, times the
    number of pixels of an image. **Identity**: up to rounding error, at initialisation.

    Args:
        input_dim: Size D of an event along ``dim``.
        num_reflections: Number k of reflections in each of U and V; the default is that of :class:`Orthogonal`.
        bias: Whether to learn b.
        dim: Axis of the D elements: -1 for vectors, -3 for an invertible 1 x 1 convolution.

    Attributes:
        left_vectors: Reflection vectors of U as rows, a parameter ``(k, D)``.
        right_vectors: Reflection vectors of V as rows, a parameter ``(k, D)``.
        log_scale: :math:`\lambda`, a parameter ``(D,)``.
        bias: b, a parameter ``(D,)``; None without a bias.
        triangle: Constant mask, a buffer; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``, where every pixel is treated alike;
        log-det ``(*B,)``.

    Raises:
        ValueError: if an event does not have the size D along ``dim``.

    Differs from Pyro's ``MatrixExponential``: it truncates no series, and the log-det has the batch shape.

    References:
        Zhang et al. (2018), *Stabilizing gradients for deep neural networks via efficient SVD parameterization*,
        Eq. 3.

    Example:
        >>> layer = SVDLinear.from_matrix(torch.tensor([[2.0, 1.0], [0.0, -1.0]]))
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        input_dim: int,
        *,
        num_reflections: int | None = None,
        bias: bool = True,
        dim: int = -1,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, num_reflections=num_reflections, dim=dim, cache_size=cache_size)
        input_dim = self.input_dim
        self.left_vectors = self._new_vectors()
        self.log_scale = nn.Parameter(torch.empty(input_dim))
        self.right_vectors = self._new_vectors()
        self.bias = nn.Parameter(torch.empty(input_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw U and V, each of which is initially the identity; set s = 1 and b = 0."""
        self.fill_constants()
        linalg.identity_reflections(self.left_vectors)
        linalg.identity_reflections(self.right_vectors)
        nn.init.zeros_(self.log_scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_matrix(cls, matrix: Tensor, *, bias: bool = True, dim: int = -1) -> SVDLinear:
        """Build the layer with ``layer.matrix == matrix`` for any invertible (D, D) matrix.

        Raises:
            TypeError: if the matrix is not a floating point tensor.
            ValueError: if the matrix is not square, not finite or singular.
        """
        u, s, vh = torch.linalg.svd(invertible_matrix(matrix, "SVDLinear.from_matrix"))
        layer = cls(len(s), num_reflections=len(s), bias=bias, dim=dim).to(matrix)
        with torch.no_grad():
            layer.left_vectors.copy_(linalg.householder_vectors(u))
            layer.right_vectors.copy_(linalg.householder_vectors(vh.mT))
            layer.log_scale.copy_(s.log())
        return layer

    @property
    @at_least_single
    def matrix(self) -> Tensor:
        """The matrix ``U diag(s) V^T``, ``(*B, D, D)``."""

        def columns(eye: Tensor) -> Tensor:
            rows = linalg.householder_product(self.right_vectors.unsqueeze(-3), eye, transpose=True)
            rows = rows * self.log_scale.exp().unsqueeze(-2)
            return linalg.householder_product(self.left_vectors.unsqueeze(-3), rows)

        return self._matrix(columns)

    @at_least_single
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self._reflect(self.right_vectors, x, transpose=True) * _along(self.log_scale.exp(), self.dim)
        y = self._reflect(self.left_vectors, z)
        return (y if self.bias is None else y + _along(self.bias, self.dim)), self.log_scale

    @at_least_single
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Tensor]:
        centred = y if self.bias is None else y - _along(self.bias, self.dim)
        z = self._reflect(self.left_vectors, centred, transpose=True) * _along((-self.log_scale).exp(), self.dim)
        return self._reflect(self.right_vectors, z), self.log_scale

    def _aux(self, x: Tensor, y: Tensor) -> Tensor:
        return self.log_scale

    @at_least_single
    def _log_det(self, x: Tensor, y: Tensor, aux: Tensor) -> Tensor:
        return _sum_log_scale(self, aux, x)

    @at_least_single
    def _adjoint(self, gradient: Tensor, inverse: bool) -> Tensor:
        """Return ``J^{-T} g``, that is ``U diag(1 / s) V^T g``; ``J^T g`` in the inverse direction."""
        first, last = self.right_vectors, self.left_vectors
        if inverse:
            first, last = last, first
        z = self._reflect(first, gradient, transpose=True)
        return self._reflect(last, z * _along((self.log_scale if inverse else -self.log_scale).exp(), self.dim))

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        return linear_path_gradient(self, value, inverse, lambda: self._adjoint(gradient, inverse))


def orthogonal(input_dim: int, *, num_reflections: int | None = None, bias: bool = False, dim: int = -1) -> Orthogonal:
    """Build an :class:`Orthogonal`."""
    return Orthogonal(input_dim, num_reflections=num_reflections, bias=bias, dim=dim)


def svd_linear(input_dim: int, *, num_reflections: int | None = None, bias: bool = True, dim: int = -1) -> SVDLinear:
    """Build an :class:`SVDLinear`."""
    return SVDLinear(input_dim, num_reflections=num_reflections, bias=bias, dim=dim)


conditional_orthogonal = conditional_factory(orthogonal)
conditional_svd_linear = conditional_factory(svd_linear)
