"""Layers that shift and scale each element. With ``dim=-3`` they act on the channels of each pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.core.kinds import VolumePreserving
from pyro_invflows.core.path_gradient import linear_path_gradient
from pyro_invflows.support.checks import floating_tensor

__all__ = ["Diagonal", "Shift", "conditional_diagonal", "conditional_shift", "diagonal", "shift"]


def _along(parameter: Tensor, dim: int) -> Tensor:
    """Align a parameter ``(*B, D)`` with axis ``dim`` of an input: ``(*B, D, 1, 1)`` for -3."""
    return parameter if dim == -1 else parameter.reshape(parameter.shape + (1,) * (-dim - 1))


def _sum_log_scale(layer: Bijection, log_scale: Tensor, x: Tensor) -> Tensor:
    """Return the log-det of scaling each pixel by ``exp(log_scale)`` (*B, D)."""
    pixels = x.shape[x.dim() + layer.dim + 1 :].numel()
    return (log_scale.sum(-1) * pixels).expand(layer.log_det_shape(x))


class Shift(VolumePreserving):
    r"""Adds a learned vector.

    .. math:: y = x + b.

    Invertible for every b. Choose it as the bias of layers that have none.

    **Forward**, **Inverse**: O(D). **Log-det**: 0. **Identity**: exactly, at initialisation (b = 0).

    Args:
        input_dim: Size D of an event along ``dim``.
        dim: Axis of the D elements: -1 for vectors, -3 for the channels of images.

    Attributes:
        bias: b, a parameter ``(D,)``.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``, where every pixel is shifted by the
        same vector; log-det ``(*B,)``.

    Raises:
        ValueError: if an event does not have the size D along ``dim``.

    Example:
        >>> layer = Shift(3)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x)
        True
    """

    input_dim: int

    def __init__(self, input_dim: int, *, dim: int = -1, cache_size: int = 1) -> None:
        super().__init__(input_dim, dim=dim, cache_size=cache_size)
        input_dim = self.input_dim
        self.bias = nn.Parameter(torch.empty(input_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set b = 0, so that the layer is the identity."""
        nn.init.zeros_(self.bias)

    def _function(self, x: Tensor) -> Tensor:
        return x + _along(self.bias, self.dim)

    def _inverse_function(self, y: Tensor) -> Tensor:
        return y - _along(self.bias, self.dim)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        return linear_path_gradient(self, value, inverse, lambda: gradient)


class Diagonal(Bijection):
    r"""Scales each element and adds a learned vector.

    .. math:: y = s \odot x + b, \qquad s = \pm e^{\lambda}.

    Invertible because the logarithm of \|s\| is learned, and its signs are fixed. Choose it to set location and
    scale, for example as the first or last layer of a flow.

    **Forward**, **Inverse**: O(D), without a division. **Log-det**: :math:`\sum_i \lambda_i`, times the number of
    pixels of an image. **Identity**: exactly, at initialisation (:math:`\lambda = 0, b = 0`).

    Args:
        input_dim: Size D of an event along ``dim``.
        bias: Whether to learn b.
        dim: Axis of the D elements: -1 for vectors, -3 for the channels of images.

    Attributes:
        log_scale: :math:`\lambda`, a parameter ``(D,)``.
        bias: b, a parameter ``(D,)``; None without a bias.
        sign_of_scale: The signs of s, a buffer ``(D,)`` of 1 and -1; not learned.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``, where every pixel is treated alike;
        log-det ``(*B,)``.

    Raises:
        ValueError: if an event does not have the size D along ``dim``.

    Example:
        >>> layer = Diagonal(3)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x)
        True
    """

    input_dim: int
    sign_of_scale: Tensor

    def __init__(self, input_dim: int, *, bias: bool = True, dim: int = -1, cache_size: int = 1) -> None:
        super().__init__(input_dim, dim=dim, cache_size=cache_size)
        input_dim = self.input_dim
        self.log_scale = nn.Parameter(torch.empty(input_dim))
        self.bias = nn.Parameter(torch.empty(input_dim)) if bias else None
        self.register_buffer("sign_of_scale", torch.ones(input_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set s = 1 and b = 0, so that the layer is the identity."""
        nn.init.zeros_(self.log_scale)
        nn.init.ones_(self.sign_of_scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_matrix(cls, matrix: Tensor, *, bias: bool = True, dim: int = -1) -> Diagonal:
        """Build the layer whose scale is the diagonal of ``matrix`` (D, D), negative entries included.

        Raises:
            TypeError: if the matrix is not a floating point tensor.
            ValueError: if the matrix is not diagonal, not finite, or has a zero on its diagonal.
        """
        floating_tensor(matrix, "matrix", "Diagonal.from_matrix")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(
                f"Diagonal.from_matrix: the matrix must have the shape (D, D), but got {tuple(matrix.shape)}."
            )
        scale = matrix.detach().diagonal()
        if not torch.equal(torch.diag(scale), matrix.detach()) or not scale.isfinite().all() or (scale == 0).any():
            raise ValueError(
                "Diagonal.from_matrix: expected a finite diagonal matrix without zeros on its diagonal. For any other "
                "invertible matrix use SVDLinear.from_matrix."
            )
        layer = cls(len(scale), bias=bias, dim=dim).to(matrix)
        with torch.no_grad():
            layer.log_scale.copy_(scale.abs().log())
            layer.sign_of_scale.copy_(scale.sign())
        return layer

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * _along(self.sign_of_scale * self.log_scale.exp(), self.dim)
        return (y if self.bias is None else y + _along(self.bias, self.dim)), self.log_scale

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Tensor]:
        centred = y if self.bias is None else y - _along(self.bias, self.dim)
        return centred * _along(self.sign_of_scale * (-self.log_scale).exp(), self.dim), self.log_scale

    def _aux(self, x: Tensor, y: Tensor) -> Tensor:
        return self.log_scale

    def _log_det(self, x: Tensor, y: Tensor, aux: Tensor) -> Tensor:
        return _sum_log_scale(self, aux, x)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        log_scale = self.log_scale if inverse else -self.log_scale
        scale = self.sign_of_scale * log_scale.exp()
        return linear_path_gradient(self, value, inverse, lambda: gradient * _along(scale, self.dim))


def shift(input_dim: int, *, dim: int = -1) -> Shift:
    """Build a :class:`Shift`."""
    return Shift(input_dim, dim=dim)


def diagonal(input_dim: int, *, bias: bool = True, dim: int = -1) -> Diagonal:
    """Build a :class:`Diagonal`."""
    return Diagonal(input_dim, bias=bias, dim=dim)


conditional_shift = conditional_factory(shift)
conditional_diagonal = conditional_factory(diagonal)
