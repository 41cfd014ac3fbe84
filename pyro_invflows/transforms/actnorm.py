"""Scales and shifts that are initialised from data. With ``dim=-3`` they act on the channels of each pixel."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.core.path_gradient import linear_path_gradient
from pyro_invflows.support.checks import floating_tensor
from pyro_invflows.support.moments import double, finite_rows, has_spread, moments, refuse_overflow, rounded_copy
from pyro_invflows.transforms.diagonal import _along, _sum_log_scale

__all__ = ["ActNorm", "act_norm", "conditional_act_norm"]


class ActNorm(Bijection):
    r"""Scales each element and adds a learned vector; both are initialised from data.

    .. math:: y = s \odot x + b, \qquad s = e^{\lambda}.

    Invertible because s is learned through its logarithm. Choose it between the other layers of a deep flow, so that
    each of them starts with standardised values; :meth:`Flow.initialize <pyro_invflows.Flow.initialize>` fits all such
    layers of a flow at once.

    Only an explicit call, :meth:`fit`, initialises the layer from data; before that, it is the identity. Scoring and
    sampling never change it, and a loaded layer is used as it was saved. After :meth:`fit`, s and b are trained like
    other parameters. If ``torch.distributed`` is initialised, ``fit`` takes the rows of **all** processes, and every
    process must call it.

    **Forward**, **Inverse**: O(D), without division. **Log-det**: :math:`\sum_i \lambda_i`, times the number of pixels
    of an image. **Identity**: exactly, at initialisation (:math:`\lambda = 0, b = 0`), until :meth:`fit`.

    Args:
        input_dim: Size D of an event along ``dim``.
        dim: Axis of the D elements: -1 for vectors, -3 for the channels of images, where every pixel counts as a row.

    Attributes:
        log_scale: :math:`\lambda`, a parameter ``(D,)``.
        bias: b, a parameter ``(D,)``.
        fitted: Whether :meth:`fit` has been called since the layer was built or reset, a scalar buffer.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``, where every pixel is treated alike;
        log-det ``(*B,)``.

    Raises:
        TypeError: in ``fit``, if the data are not a floating point tensor.
        ValueError: if an event does not have the size D along ``dim``; in ``fit``, if there are fewer than two rows, or
            if rows or their squares are not finite (the layer then stays as it was).

    Differs from nflows' and normflows' ``ActNorm``: these are initialised by the first batch that they see.

    References:
        Kingma and Dhariwal (2018), *Glow: generative flow with invertible 1x1 convolutions*, section 3.1.

    Example:
        >>> data = 5.0 + 3.0 * torch.randn(1000, 4)
        >>> layer = ActNorm(4).fit(data)
        >>> white = layer.inv(data)
        >>> torch.allclose(white.mean(0), torch.zeros(4), atol=1e-5), torch.allclose(white.std(0), torch.ones(4))
        (True, True)
        >>> torch.allclose(layer(white.clone()), data, atol=1e-5)
        True
    """

    input_dim: int
    fitted: Tensor

    def __init__(self, input_dim: int, *, dim: int = -1, cache_size: int = 1) -> None:
        super().__init__(input_dim, dim=dim, cache_size=cache_size)
        input_dim = self.input_dim
        self.log_scale = nn.Parameter(torch.empty(input_dim))
        self.bias = nn.Parameter(torch.empty(input_dim))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set s = 1 and b = 0, so that the layer is the identity, and ``fitted`` to False."""
        nn.init.zeros_(self.log_scale)
        nn.init.zeros_(self.bias)
        self.fitted.zero_()

    @torch.no_grad()
    def fit(self, data: Tensor) -> ActNorm:
        """Set s and b to the standard deviations (N - 1) and means of ``data`` ``(*N, D)``.

        Then ``layer.inv(data)`` has mean 0 and variance 1. A constant column carries no information about its scale and
        gets the scale 1, with a warning.
        """
        count, mean, scatter = moments(lambda: self._rows(data), double(self.bias), "ActNorm", full=False)
        if count < 2:
            raise ValueError("ActNorm: the data must have at least two rows, but got one, which has no spread.")
        refuse_overflow(scatter, "ActNorm")
        variance = scatter / (count - 1)
        spread = has_spread(mean, variance)
        constant = int((~spread).sum())
        if constant:
            warnings.warn(
                f"ActNorm: {constant} of {self.input_dim} columns are constant in the {count:.0f} rows of data; they "
                "get the scale 1.",
                stacklevel=3,  # no_grad's wrapper is in between
            )
        rounded_copy(self.log_scale, torch.where(spread, variance, 1.0).log() / 2)
        rounded_copy(self.bias, mean)
        self.fitted.fill_(True)
        return self

    def _rows(self, data: Tensor) -> Tensor:
        floating_tensor(data, "data", "ActNorm")
        self.check_event(data.shape, inverse=True)
        return finite_rows(data, self.dim, "ActNorm")

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * _along(self.log_scale.exp(), self.dim) + _along(self.bias, self.dim), self.log_scale

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y - _along(self.bias, self.dim)) * _along((-self.log_scale).exp(), self.dim), self.log_scale

    def _aux(self, x: Tensor, y: Tensor) -> Tensor:
        return self.log_scale

    def _log_det(self, x: Tensor, y: Tensor, aux: Tensor) -> Tensor:
        return _sum_log_scale(self, aux, x)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        log_scale = self.log_scale if inverse else -self.log_scale
        return linear_path_gradient(self, value, inverse, lambda: gradient * _along(log_scale.exp(), self.dim))

    def extra_repr(self) -> str:
        return f"{self.input_dim}" + (f", dim={self.dim}" if self.dim != -1 else "")


def act_norm(input_dim: int, *, dim: int = -1) -> ActNorm:
    """Build an :class:`ActNorm`; it is initially the identity."""
    return ActNorm(input_dim, dim=dim)


conditional_act_norm = conditional_factory(act_norm)
