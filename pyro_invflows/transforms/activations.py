r"""Invertible activations: elementwise layers of event dimension 0.

Sigmoid, Tanh, ELU and SELU are the textbook functions with their true codomains, kept finite in both directions
at every float. The Baird activation :math:`y = \mathrm{asinh}(\sinh x + c)` follows Baird, Smalenberger and
Ingkiriwang (2005), *One-step neural network inversion with PDF learning and emulation*, IJCNN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_invflows.core.conditional import Conditional
from pyro_invflows.core.kinds import Elementwise

__all__ = [
    "ELU",
    "SELU",
    "Baird",
    "Interval",
    "LeakyReLU",
    "PReLU",
    "Sigmoid",
    "Tanh",
    "baird",
    "conditional_baird",
    "conditional_prelu",
    "elu",
    "interval",
    "leaky_relu",
    "prelu",
    "selu",
    "sigmoid",
    "tanh",
]

_LOG2 = math.log(2.0)
_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805


def _next_below(value: float, dtype: torch.dtype) -> float:
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)).item()


_next_below_once = functools.lru_cache(maxsize=256)(_next_below)  # which the compiler does not look into


def _below(value: float, dtype: torch.dtype) -> float:
    """Return the largest float of ``dtype`` below ``value``."""
    return _next_below(value, dtype) if torch.compiler.is_compiling() else _next_below_once(value, dtype)


def _above(value: float, dtype: torch.dtype) -> float:
    """Return the smallest float of ``dtype`` above ``value``."""
    return -_below(-value, dtype)


def _log_sigmoid_slope(x: Tensor) -> Tensor:
    """Return ``log(sigmoid(x) sigmoid(-x))``, finite at every float."""
    return F.logsigmoid(x) + F.logsigmoid(-x)


def _doubled(x: Tensor) -> Tensor:
    """Return 2x, short of where a log-slope made of it would overflow."""
    limit = torch.finfo(x.dtype).max / 4
    return 2 * x.clamp(-limit, limit)


class Interval(Elementwise):
    r"""Squashes the real line onto an open interval, by a scaled and shifted sigmoid.

    .. math:: y = l + (h - l)\,\sigma(x), \qquad l < h.

    Invertible because the sigmoid is increasing. Choose it to map a flow onto bounded data, and its ``.inv`` to
    bring bounded data to the real line.

    **Forward**: O(1) an element, derivatives of every order; kept strictly inside (l, h).
    **Inverse**: ``log(y - l) - log(h - y)``; a y on the border counts as its neighbour inside, so it stays finite.
    **Log-det**: ``log(h - l) + logsigmoid(x) + logsigmoid(-x)``.
    **Identity**: never near it.

    Args:
        low: Lower end l.
        high: Upper end h.

    Shape:
        ``(*) -> (*)``, event dimension 0.

    Raises:
        ValueError: unless ``low < high``, both finite.

    Example:
        >>> layer = Interval(-1.0, 3.0)
        >>> x = torch.randn(5)
        >>> y = layer(x)
        >>> bool(((y > -1) & (y < 3)).all()), torch.allclose(layer.inv(y.clone()), x, atol=1e-5)
        (True, True)
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.low, self.high = float(low), float(high)
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"Interval needs finite ends with low < high, but got low={low!r}, high={high!r}.")
        # torch's interval is the closed one; the forward map never touches its ends.
        self.codomain = constraints.interval(self.low, self.high)

    def _inside(self, y: Tensor) -> Tensor:
        return y.clamp(_above(self.low, y.dtype), _below(self.high, y.dtype))

    def _function(self, x: Tensor) -> Tensor:
        return self._inside(self.low + (self.high - self.low) * torch.sigmoid(x))

    def _inverse_function(self, y: Tensor) -> Tensor:
        y = self._inside(y)
        return (y - self.low).log() - (self.high - y).log()

    def _log_slope(self, x: Tensor, y: Tensor) -> Tensor:
        return math.log(self.high - self.low) + _log_sigmoid_slope(x)

    def extra_repr(self) -> str:
        return f"{self.low}, {self.high}"


class Sigmoid(Interval):
    r"""Squashes the real line onto (0, 1).

    .. math:: y = 1 / (1 + e^{-x}).

    Invertible because it is increasing. Choose it for probabilities and for data scaled to [0, 1].

    **Forward**: O(1) an element; kept strictly inside (0, 1). **Inverse**: the logit, finite on the closed interval.
    **Log-det**: ``logsigmoid(x) + logsigmoid(-x)``. **Identity**: never near it.

    Shape:
        ``(*) -> (*)``, event dimension 0.

    Differs from ``torch.distributions.SigmoidTransform``: a module, and it gives y and log-det in one pass.

    Example:
        >>> layer = Sigmoid()
        >>> x = torch.randn(5)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
    """

    codomain: constraints.Constraint = constraints.unit_interval

    def __init__(self, *, cache_size: int = 1) -> None:
        super().__init__(0.0, 1.0, cache_size=cache_size)
        self.codomain = constraints.unit_interval

    def _inside(self, y: Tensor) -> Tensor:
        # Down to the smallest normal number: the tail towards 0 has far more floats than the one towards 1.
        return y.clamp(torch.finfo(y.dtype).tiny, _below(1.0, y.dtype))

    def _function(self, x: Tensor) -> Tensor:
        return self._inside(torch.sigmoid(x))

    def _inverse_function(self, y: Tensor) -> Tensor:
        y = self._inside(y)
        return y.log() - (-y).log1p()

    def _log_slope(self, x: Tensor, y: Tensor) -> Tensor:
        return _log_sigmoid_slope(x)

    def extra_repr(self) -> str:
        return ""


class Tanh(Elementwise):
    r"""Squashes the real line onto (-1, 1).

    .. math:: y = \tanh x.

    Invertible because it is increasing. Choose it for data scaled to [-1, 1].

    **Forward**: O(1) an element; kept strictly inside (-1, 1). **Inverse**: ``atanh``, finite on the closed
    interval. **Log-det**: ``log 4 + logsigmoid(2x) + logsigmoid(-2x)``. **Identity**: slope 1 at 0 only.

    Shape:
        ``(*) -> (*)``, event dimension 0.

    Differs from ``torch.distributions.TanhTransform``: a module, finite at y = +-1, one pass for y and log-det.

    Example:
        >>> layer = Tanh()
        >>> x = torch.randn(5)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
    """

    codomain: constraints.Constraint = constraints.interval(-1.0, 1.0)

    def _inside(self, y: Tensor) -> Tensor:
        edge = _below(1.0, y.dtype)
        return y.clamp(-edge, edge)

    def _function(self, x: Tensor) -> Tensor:
        return self._inside(torch.tanh(x))

    def _inverse_function(self, y: Tensor) -> Tensor:
        return torch.atanh(self._inside(y))

    def _log_slope(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * _LOG2 + _log_sigmoid_slope(_doubled(x))


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

    Invertible because both slopes are positive. Choose it inside deep linear flows; note that it is piecewise
    linear, so its log-det has no gradient with respect to x.

    **Forward**, **Inverse**: O(1) an element, exact up to one rounding. **Log-det**: ``log a`` for x < 0, else 0.
    **Identity**: exactly at a = 1.

    Args:
        negative_slope: a.

    Shape:
        ``(*) -> (*)``, event dimension 0.

    Raises:
        ValueError: unless the slope is positive and finite.

    Differs from Pyro's ``LeakyReLUTransform``: any slope, and a module.

    Example:
        >>> layer = LeakyReLU(0.1)
        >>> x = torch.randn(5)
        >>> torch.allclose(layer.inv(layer(x).clone()), x)
        True
    """

    def __init__(self, negative_slope: float = 0.01, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.negative_slope = _positive(negative_slope, "negative_slope", "LeakyReLU")

    def _log_negative_slope(self, like: Tensor) -> Tensor:
        return like.new_full((), math.log(self.negative_slope))

    def extra_repr(self) -> str:
        return str(self.negative_slope)


class PReLU(_Piecewise):
    r"""Scales the negative half-line by a learned positive slope.

    .. math:: y = x \text{ for } x \ge 0, \qquad y = a x \text{ for } x < 0, \qquad a = e^{\lambda} > 0.

    Invertible because the slope is learned through its logarithm. Choose it over :class:`LeakyReLU` when the
    asymmetry is to be learned; it is piecewise linear too, so its log-det has no gradient with respect to x.

    **Forward**, **Inverse**: O(1) an element. **Log-det**: :math:`\lambda` for x < 0, else 0.
    **Identity**: the start, exactly, at the default slope 1.

    Args:
        shape: Shape of the learned slopes; broadcasts against the input from the right.
        negative_slope: Their common start.

    Shape:
        ``(*S) -> broadcast(*S, *shape)``, event dimension 0.

    Raises:
        ValueError: unless the slope is positive and finite.

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
        self.negative_slope = _positive(negative_slope, "negative_slope", "PReLU")
        self.log_slope = nn.Parameter(torch.empty(self.shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every slope to its start."""
        nn.init.constant_(self.log_slope, math.log(self.negative_slope))

    def _log_negative_slope(self, like: Tensor) -> Tensor:
        return self.log_slope


class ELU(Elementwise):
    r"""Bends the negative half-line exponentially towards :math:`-\alpha`.

    .. math:: y = x \text{ for } x \ge 0, \qquad y = \alpha (e^x - 1) \text{ for } x < 0, \qquad \alpha > 0.

    Invertible because it is increasing; its codomain is :math:`(-\alpha, \infty)`. Choose it where one tail must
    be bounded.

    **Forward**: O(1) an element, by ``expm1``; kept strictly above :math:`-\alpha`. **Inverse**: ``log1p``, finite
    at the border too. **Log-det**: :math:`x + \log\alpha` for x < 0, else 0. **Identity**: on x >= 0.

    Args:
        alpha: :math:`\alpha`.

    Shape:
        ``(*) -> (*)``, event dimension 0.

    Raises:
        ValueError: unless alpha is positive and finite.

    Differs from Pyro's ``ELUTransform``: the codomain is the true one, any alpha, no epsilon in the inverse.

    References:
        Clevert et al. (2016), *Fast and accurate deep network learning by exponential linear units*, Eq. 15.

    Example:
        >>> layer = ELU(1.5)
        >>> x = torch.randn(5)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-6)
        True
    """

    _scale = 1.0

    def __init__(self, alpha: float = 1.0, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.alpha = _positive(alpha, "alpha", type(self).__name__)
        self.codomain = constraints.greater_than(-self._scale * self.alpha)

    def _function(self, x: Tensor) -> Tensor:
        floor = _above(-self._scale * self.alpha, x.dtype)
        # exp of the positive branch would overflow and poison the gradient of the other one
        negative = (self._scale * self.alpha * torch.expm1(x.clamp(max=0))).clamp(min=floor)
        return torch.where(x < 0, negative, self._scale * x)

    def _inverse_function(self, y: Tensor) -> Tensor:
        ratio = y.clamp(max=0) / (self._scale * self.alpha)
        negative = torch.log1p(ratio.clamp(min=-_below(1.0, y.dtype)))
        return torch.where(y < 0, negative, y / self._scale)

    def _log_slope(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(x < 0, x + math.log(self.alpha), torch.zeros_like(x)) + math.log(self._scale)

    def extra_repr(self) -> str:
        return str(self.alpha)


class SELU(ELU):
    r"""The self-normalising ELU: scale 1.0507, alpha 1.6733.

    .. math:: y = \lambda x \text{ for } x \ge 0, \qquad y = \lambda \alpha (e^x - 1) \text{ for } x < 0.

    Invertible because it is increasing; its codomain is :math:`(-\lambda\alpha, \infty)`. Choose it in deep stacks
    that should keep unit variance.

    **Forward**, **Inverse**: as :class:`ELU`. **Log-det**: :math:`\log\lambda`, plus :math:`x + \log\alpha` for x < 0.
    **Identity**: within 5 % on x >= 0.

    Shape:
        ``(*) -> (*)``, event dimension 0.

    References:
        Klambauer et al. (2017), *Self-normalizing neural networks*, Eq. 2.

    Example:
        >>> layer = SELU()
        >>> x = torch.randn(5)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-6)
        True
    """

    _scale = _SELU_SCALE

    def __init__(self, *, cache_size: int = 1) -> None:
        super().__init__(_SELU_ALPHA, cache_size=cache_size)

    def extra_repr(self) -> str:
        return ""


class Baird(Elementwise):
    r"""Bends the line smoothly around the origin, with slope 1 at both ends.

    .. math:: y = \mathrm{asinh}(\sinh x + c), \qquad c \in \mathbb{R}.

    Invertible for every c: the inverse is the same function with -c. Choose it as the smooth activation between
    linear layers; its slope lies in ``[1/L, L]`` with ``L = exp(asinh(|c| / 2))``, so that nothing saturates.

    **Forward**, **Inverse**: O(1) an element, derivatives of every order; error below 1e-6 max(1, \|y\|) in
    float32 for \|c\| <= 5, and finite for every float. **Log-det**: ``log cosh x - log cosh y``.
    **Identity**: the start, exactly (c = 0).

    Args:
        shape: Shape of the learned c; broadcasts against the input from the right.

    Shape:
        ``(*S) -> broadcast(*S, *shape)``, event dimension 0.

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
        """Set every c to 0: the identity."""
        nn.init.zeros_(self.c)

    def _function(self, x: Tensor) -> Tensor:
        return _asinh_sinh_plus(x, self.c)

    def _inverse_function(self, y: Tensor) -> Tensor:
        return _asinh_sinh_plus(y, -self.c)

    def _log_slope(self, x: Tensor, y: Tensor) -> Tensor:
        # log cosh z = -(logsigmoid(2z) + logsigmoid(-2z)) / 2 - log 2, and the constants cancel
        return (_log_sigmoid_slope(_doubled(y)) - _log_sigmoid_slope(_doubled(x))) / 2


#: |x| from which sinh x is no longer formed.
_BAIRD_FAR = 8.0


def _asinh_sinh_plus(x: Tensor, c: Tensor) -> Tensor:
    r"""Return ``asinh(sinh x + c)`` without overflow, with gradients that are finite everywhere.

    Near the origin as written. Far out, with s = sgn x, e = exp(-\|x\|) and t = 1 - e^2 + 2 s c e,
    ``sinh x + c = s t exp(|x|) / 2`` and hence
    ``y = s sgn(t) (|x| + log((|t| + sqrt(t^2 + 4 e^2)) / 2))``.
    """
    far = x.abs() > _BAIRD_FAR
    # Each branch sees harmless values where the other one is chosen, so that no inf meets a zero gradient.
    near = torch.asinh(torch.sinh(torch.where(far, torch.zeros_like(x), x)) + c)
    z = torch.where(far, x, torch.full_like(x, _BAIRD_FAR))
    s = torch.sign(z)
    size = s * z
    e = torch.exp(-size)
    c = torch.where(e > 0, c, torch.zeros_like(c))  # no c survives an underflow, and its gradient must not overflow
    t = 1 - e * e + 2 * s * (c * e)
    side = torch.where(t < 0, -torch.ones_like(t), torch.ones_like(t))
    t = side * t
    return torch.where(far, s * side * (size + torch.log((t + torch.hypot(t, 2 * e)) / 2)), near)


def _positive(value: float, name: str, owner: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{owner}: {name} must be positive and finite, but got {value!r}.")
    return float(value)


def sigmoid(input_dim: int | None = None) -> Sigmoid:
    """Build a :class:`Sigmoid`; it has no parameters, so ``input_dim`` is not needed."""
    return Sigmoid()


def tanh(input_dim: int | None = None) -> Tanh:
    """Build a :class:`Tanh`; it has no parameters, so ``input_dim`` is not needed."""
    return Tanh()


def leaky_relu(input_dim: int | None = None, *, negative_slope: float = 0.01) -> LeakyReLU:
    """Build a :class:`LeakyReLU`; it has no parameters, so ``input_dim`` is not needed."""
    return LeakyReLU(negative_slope)


def elu(input_dim: int | None = None, *, alpha: float = 1.0) -> ELU:
    """Build an :class:`ELU`; it has no parameters, so ``input_dim`` is not needed."""
    return ELU(alpha)


def selu(input_dim: int | None = None) -> SELU:
    """Build a :class:`SELU`; it has no parameters, so ``input_dim`` is not needed."""
    return SELU()


def interval(input_dim: int | None = None, *, low: float = 0.0, high: float = 1.0) -> Interval:
    """Build an :class:`Interval`; it has no parameters, so ``input_dim`` is not needed."""
    return Interval(low, high)


def prelu(input_dim: int, *, negative_slope: float = 1.0) -> PReLU:
    """Build a :class:`PReLU` with one slope for each of ``input_dim`` elements."""
    return PReLU((input_dim,), negative_slope=negative_slope)


def baird(input_dim: int) -> Baird:
    """Build a :class:`Baird` with one c for each of ``input_dim`` elements."""
    return Baird((input_dim,))


def conditional_prelu(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] = (64, 64), *, negative_slope: float = 1.0
) -> Conditional:
    """Build a :func:`prelu` whose slopes a hypernetwork sets from a context."""
    return Conditional(prelu(input_dim, negative_slope=negative_slope), context_dim, hidden_dims=hidden_dims)


def conditional_baird(input_dim: int, context_dim: int, hidden_dims: Sequence[int] = (64, 64)) -> Conditional:
    """Build a :func:`baird` whose c a hypernetwork sets from a context."""
    return Conditional(baird(input_dim), context_dim, hidden_dims=hidden_dims)
