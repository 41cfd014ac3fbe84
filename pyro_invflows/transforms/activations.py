r"""Activations that map onto the whole real line: elementwise layers of event dimension 0.

The Baird activation :math:`y = \mathrm{asinh}(\sinh x + c)` follows Baird, Smalenberger and Ingkiriwang (2005),
*One-step neural network inversion with PDF learning and emulation*, IJCNN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.core.kinds import Elementwise
from pyro_invflows.support.checks import (
    one_number,
    positive_number,
    size_only,
)
from pyro_invflows.transforms.bounded import _doubled, _log_sigmoid_slope

__all__ = ["Baird", "LeakyReLU", "PReLU", "baird", "conditional_baird", "conditional_prelu", "leaky_relu", "prelu"]


class _Piecewise(Elementwise):
    """``y = x`` for x >= 0 and ``y = exp(log_slope) x`` below."""

    def _log_negative_slope(self, like: Tensor) -> Tensor:
        raise NotImplementedError

    def _function(self, x: Tensor) -> Tensor:
        return torch.where(x < 0, x * self._log_negative_slope(x).exp(), x)

    def _inverse_function(self, y: Tensor) -> Tensor:
        return torch.where(y < 0, y * (-self._log_negative_slope(y)).exp(), y)

    def _log_slope(self, x: Tensor, y: Tensor) -> Tensor:
        log_slope = self._log_negative_slope(x)
        return torch.where(x < 0, log_slope, torch.zeros_like(log_slope)) + torch.zeros_like(x)


class LeakyReLU(_Piecewise):
    r"""Scales the negative half-line by a fixed positive slope.

    .. math:: y = x \text{ for } x \ge 0, \qquad y = a x \text{ for } x < 0, \qquad a > 0.

    Invertible because both slopes are positive. Choose it between the linear layers of a deep flow. It is piecewise
    linear, so its log-det has no gradient with respect to x.

    **Forward**, **Inverse**: O(1) per element; exact up to one rounding. **Log-det**: ``log a`` for x < 0, else 0.
    **Identity**: exactly, if a = 1.

    Args:
        negative_slope: Slope a of the negative half-line.

    Shape:
        ``(*) -> (*)``; log-det ``(*)``. The event dimension is 0.

    Raises:
        TypeError: if the slope is not a number.
        ValueError: if the slope is not positive and finite.

    Differs from Pyro's ``LeakyReLUTransform``: the slope can be chosen, and the layer is a module.

    Example:
        >>> layer = LeakyReLU(0.1)
        >>> x = torch.randn(5)
        >>> torch.allclose(layer.inv(layer(x).clone()), x)
        True
    """

    def __init__(self, negative_slope: float = 0.01, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.negative_slope = positive_number(negative_slope, "negative_slope", "LeakyReLU")

    def _log_negative_slope(self, like: Tensor) -> Tensor:
        return like.new_full((), math.log(self.negative_slope))

    def extra_repr(self) -> str:
        return str(self.negative_slope)


class PReLU(_Piecewise):
    r"""Scales the negative half-line by a learned positive slope.

    .. math:: y = x \text{ for } x \ge 0, \qquad y = a x \text{ for } x < 0, \qquad a = e^{\lambda} > 0.

    Invertible because the logarithm of the slope is learned. Choose it over :class:`LeakyReLU` to learn the
    asymmetry. It is piecewise linear, too, so its log-det has no gradient with respect to x.

    **Forward**, **Inverse**: O(1) per element. **Log-det**: :math:`\lambda` for x < 0, else 0.
    **Identity**: exactly, at initialisation with the default slope 1.

    Args:
        shape: Shape of the learned slopes; broadcasts with the input from the right.
        negative_slope: Initial value of all slopes.

    Attributes:
        log_slope: :math:`\lambda`, a parameter of shape ``shape``.

    Shape:
        ``(*S) -> broadcast(*S, *shape)``; the log-det has the shape of y. The event dimension is 0.

    Raises:
        TypeError: if the slope is not a number.
        ValueError: if the slope is not positive and finite.

    References:
        He et al. (2015), *Delving deep into rectifiers*, Eq. 1, with a positive slope.

    Example:
        >>> layer = PReLU((3,), negative_slope=0.5)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x)
        True
    """

    def __init__(self, shape: int | Iterable[int] = (), *, negative_slope: float = 1.0, cache_size: int = 1) -> None:
        super().__init__(shape, cache_size=cache_size)
        self.negative_slope = positive_number(negative_slope, "negative_slope", "PReLU")
        self.log_slope = nn.Parameter(torch.empty(self.shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all slopes to their initial value."""
        nn.init.constant_(self.log_slope, math.log(self.negative_slope))

    def _log_negative_slope(self, like: Tensor) -> Tensor:
        return self.log_slope


class Baird(Elementwise):
    r"""Bends the real line smoothly around the origin; the slope tends to 1 on both sides.

    .. math:: y = \mathrm{asinh}(\sinh x + c), \qquad c \in \mathbb{R}.

    Invertible for every c: the inverse is the same function with -c. Choose it as a smooth activation between
    linear layers; its slope lies in ``[1/L, L]`` with ``L = exp(asinh(|c| / 2))``, so that it never saturates.

    **Forward**, **Inverse**: O(1) per element, with derivatives of all orders. In float32 the error is below
    1e-6 max(1, \|y\|) for \|c\| <= 5; the result is finite for every finite input.
    **Log-det**: ``log cosh x - log cosh y``. **Identity**: exactly, at initialisation (c = 0).

    Args:
        shape: Shape of the learned c; broadcasts with the input from the right.

    Attributes:
        c: Parameter of shape ``shape``.

    Shape:
        ``(*S) -> broadcast(*S, *shape)``; the log-det has the shape of y. The event dimension is 0.

    References:
        Baird, Smalenberger and Ingkiriwang (2005), *One-step neural network inversion with PDF learning and
        emulation*; this closed form follows from theirs.

    Example:
        >>> layer = Baird((3,))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-6)
        True
    """

    def __init__(self, shape: int | Iterable[int] = (), *, cache_size: int = 1) -> None:
        super().__init__(shape, cache_size=cache_size)
        self.c = nn.Parameter(torch.empty(self.shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all c to 0, so that the layer is the identity."""
        nn.init.zeros_(self.c)

    def _function(self, x: Tensor) -> Tensor:
        return _asinh_sinh_plus(x, self.c)

    def _inverse_function(self, y: Tensor) -> Tensor:
        return _asinh_sinh_plus(y, -self.c)

    def _log_slope(self, x: Tensor, y: Tensor) -> Tensor:
        # log cosh z = -(logsigmoid(2z) + logsigmoid(-2z)) / 2 - log 2; the constants cancel
        return (_log_sigmoid_slope(_doubled(y)) - _log_sigmoid_slope(_doubled(x))) / 2


#: Above this |x|, sinh x is not computed.
_BAIRD_FAR = 8.0


def _asinh_sinh_plus(x: Tensor, c: Tensor) -> Tensor:
    r"""Return ``asinh(sinh x + c)`` without overflow and with finite gradients everywhere.

    Near the origin, this is computed as written. Far from it, with s = sgn x, e = exp(-\|x\|) and
    t = 1 - e^2 + 2 s c e, we have ``sinh x + c = s t exp(|x|) / 2`` and hence
    ``y = s sgn(t) (|x| + log((|t| + sqrt(t^2 + 4 e^2)) / 2))``.
    """
    far = x.abs() > _BAIRD_FAR
    # Each branch receives harmless values where the other one is chosen: inf times a zero gradient would be NaN.
    near = torch.asinh(torch.sinh(torch.where(far, torch.zeros_like(x), x)) + c)
    z = torch.where(far, x, torch.full_like(x, _BAIRD_FAR))
    s = torch.sign(z)
    size = s * z
    e = torch.exp(-size)
    c = torch.where(e > 0, c, torch.zeros_like(c))  # if e underflows, c has no effect; its gradient must not overflow
    t = 1 - e * e + 2 * s * (c * e)
    side = torch.where(t < 0, -torch.ones_like(t), torch.ones_like(t))
    t = side * t
    return torch.where(far, s * side * (size + torch.log((t + torch.hypot(t, 2 * e)) / 2)), near)


def leaky_relu(input_dim: float | None = None, *, negative_slope: float | None = None) -> LeakyReLU:
    """Build a :class:`LeakyReLU`; ``leaky_relu(0.2)`` has the slope 0.2. The default slope is 0.01.

    Args:
        input_dim: A float is taken as the slope. An int is taken as the size of an event, which the layer does not
            need; it is accepted so that ``stack(4, leaky_relu, 8)`` works.
        negative_slope: The slope, as a keyword.

    Raises:
        TypeError: if the slope is given twice, or is not a number.
        ValueError: if the slope is not positive and finite.
    """
    return LeakyReLU(one_number(input_dim, negative_slope, 0.01, "negative_slope", "leaky_relu"))


def prelu(input_dim: int, *, negative_slope: float = 1.0) -> PReLU:
    """Build a :class:`PReLU` with one slope for each of ``input_dim`` elements."""
    size_only(input_dim, "prelu", " Give the slope as a keyword: prelu(input_dim, negative_slope=...).")
    return PReLU((int(input_dim),), negative_slope=negative_slope)


def baird(input_dim: int) -> Baird:
    """Build a :class:`Baird` with one c for each of ``input_dim`` elements."""
    size_only(input_dim, "baird")
    return Baird((int(input_dim),))


conditional_prelu = conditional_factory(prelu, "a hypernetwork sets its slopes from a context")
conditional_baird = conditional_factory(baird, "a hypernetwork sets its c from a context")
