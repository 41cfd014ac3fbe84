r"""Activations that map onto an interval or a half-line: elementwise layers of event dimension 0.

These are the textbook functions with their true codomains. Both directions are finite for every finite input. A point
outside the codomain has density 0: its log-det is +inf (see :class:`~pyro_invflows.Elementwise`), but its inverse is
that of the nearest point of the codomain, so that the gradients of the other rows stay finite.

If such a layer stands in the middle of a flow, some data may be out of reach; their log-prob is -inf. Take the loss
over the other rows, ``log_prob[log_prob.isfinite()].mean()``, and initialise the layers after it wide enough for the
data. The flow models all data only once every row is within reach.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyro_invflows.core.kinds import Elementwise
from pyro_invflows.support.checks import (
    floating_tensor,
    one_number,
    positive_number,
    real_number,
    size_only,
)
from pyro_invflows.support.floats import above, below

__all__ = ["ELU", "SELU", "Interval", "Sigmoid", "Tanh", "elu", "interval", "selu", "sigmoid", "tanh"]

_LOG2 = math.log(2.0)
_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805


def _log_sigmoid_slope(x: Tensor) -> Tensor:
    """Return ``log(sigmoid(x) sigmoid(-x))``, finite for every finite x."""
    return F.logsigmoid(x) + F.logsigmoid(-x)


def _doubled(x: Tensor) -> Tensor:
    """Return 2x, clamped so that a log-slope computed from it does not overflow."""
    limit = torch.finfo(x.dtype).max / 4
    return 2 * x.clamp(-limit, limit)


class Interval(Elementwise):
    r"""Squashes the real line onto an open interval, by a scaled and shifted sigmoid.

    .. math:: y = l + (h - l)\,\sigma(x), \qquad l < h.

    Invertible because the sigmoid is increasing. Choose it to map a flow onto bounded data, and its ``.inv`` to
    map bounded data onto the real line.

    **Forward**: O(1) per element, with derivatives of all orders; y is kept strictly inside (l, h).
    **Inverse**: ``log(y - l) - log(h - y)``; a y at or beyond an end is replaced by the closest float inside, so that
    x is finite.
    **Log-det**: ``log(h - l) + logsigmoid(x) + logsigmoid(-x)``; +inf, hence density 0, if y is outside [l, h] by more
    than rounding error.
    **Identity**: never.

    Args:
        low: Lower end l, a number or a tensor.
        high: Upper end h, a number or a tensor. Tensors give each element its own ends and become buffers.

    Attributes:
        low: l, as a number, or as a buffer if either end is a tensor. It is not learned.
        high: h, likewise.

    Shape:
        ``(*S) -> broadcast(*S, *low.shape, *high.shape)``; the log-det has the shape of y. The event dimension is 0.

    Raises:
        TypeError: if an end is neither a number nor a floating point tensor.
        ValueError: if the ends are not finite with ``low < high``; if their shapes do not broadcast; if a tensor
            requires grad, because the ends are not learned.

    Example:
        >>> layer = Interval(-1.0, 3.0)
        >>> x = torch.randn(5)
        >>> y = layer(x)
        >>> bool(((y > -1) & (y < 3)).all()), torch.allclose(layer.inv(y.clone()), x, atol=1e-5)
        (True, True)
        >>> Interval(torch.zeros(3), torch.tensor([1.0, 10.0, 100.0])).codomain.upper_bound
        tensor([  1.,  10., 100.])
    """

    low: float | Tensor
    high: float | Tensor

    def __init__(self, low: float | Tensor = 0.0, high: float | Tensor = 1.0, *, cache_size: int = 1) -> None:
        low, high = _end(low, "low"), _end(high, "high")
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            low, high = _as_tensors(low, high)
            super().__init__(torch.broadcast_shapes(low.shape, high.shape), cache_size=cache_size)
            self.register_buffer("low", low)
            self.register_buffer("high", high)
            self._range = None  # a constraint that held the buffers would not move with them to another device
            return
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"Interval: the ends must be finite with low < high, but got low={low!r}, high={high!r}.")
        super().__init__(cache_size=cache_size)
        self.low, self.high = low, high
        # torch's interval is closed, but the forward map never reaches its ends
        self._range = constraints.interval(low, high)

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.interval(self.low, self.high) if self._range is None else self._range

    def _inside(self, y: Tensor) -> Tensor:
        low, high = self.low, self.high
        if isinstance(low, Tensor):
            return y.clamp(torch.nextafter(low, high), torch.nextafter(high, low))  # type: ignore[arg-type]
        return y.clamp(above(low, y.dtype), below(high, y.dtype))  # type: ignore[arg-type]

    def _function(self, x: Tensor) -> Tensor:
        return self._inside(self.low + (self.high - self.low) * torch.sigmoid(x))

    def _inverse_function(self, y: Tensor) -> Tensor:
        y = self._inside(y)
        return (y - self.low).log() - (self.high - y).log()

    def _log_slope(self, x: Tensor, y: Tensor) -> Tensor:
        width = self.high - self.low
        return (width.log() if isinstance(width, Tensor) else math.log(width)) + _log_sigmoid_slope(x)

    def extra_repr(self) -> str:
        return super().extra_repr() if self._range is None else f"{self.low}, {self.high}"


def _end(value: float | Tensor, name: str) -> float | Tensor:
    """Check one end of an interval; a tensor is copied."""
    if not isinstance(value, Tensor):
        return real_number(value, name, "Interval")
    if value.requires_grad:
        raise ValueError(
            f"Interval: the ends are not learned, but {name} requires grad. Pass {name}.detach(), or learn the range "
            "by a Diagonal after Interval(0.0, 1.0)."
        )
    return floating_tensor(value, name, "Interval").clone()


def _as_tensors(low: float | Tensor, high: float | Tensor) -> tuple[Tensor, Tensor]:
    """Check the ends of several intervals, and return both as tensors of the same dtype and device."""
    like = low if isinstance(low, Tensor) else torch.as_tensor(high)
    low, high = (torch.as_tensor(end, dtype=like.dtype, device=like.device) for end in (low, high))
    try:
        good = low.isfinite() & high.isfinite() & (low < high)
    except RuntimeError:
        raise ValueError(
            "Interval: the shapes of the ends must broadcast, but low has the shape "
            f"{tuple(low.shape)} and high {tuple(high.shape)}."
        ) from None
    if not good.is_meta and not good.all():
        index = tuple((~good).nonzero()[0].tolist())
        low, high = (end.expand(good.shape)[index].item() for end in (low, high))
        raise ValueError(
            f"Interval: the ends must be finite with low < high, but got low={low}, high={high} at {index}."
        )
    return low, high


class Sigmoid(Interval):
    r"""Squashes the real line onto (0, 1).

    .. math:: y = 1 / (1 + e^{-x}).

    Invertible because it is increasing. Choose it for probabilities and for data scaled to [0, 1].

    **Forward**: O(1) per element; y is kept strictly inside (0, 1).
    **Inverse**: the logit; a y at or beyond an end is replaced by the closest float inside, so that x is finite.
    **Log-det**: ``logsigmoid(x) + logsigmoid(-x)``; +inf, hence density 0, if y is outside [0, 1] by more than
    rounding error.
    **Identity**: never.

    Shape:
        ``(*) -> (*)``; log-det ``(*)``. The event dimension is 0.

    Differs from ``torch.distributions.SigmoidTransform``: it is a module, and computes y and the log-det in one pass.

    Example:
        >>> layer = Sigmoid()
        >>> x = torch.randn(5)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
    """

    codomain = constraints.unit_interval

    def __init__(self, *, cache_size: int = 1) -> None:
        super().__init__(0.0, 1.0, cache_size=cache_size)

    def _inside(self, y: Tensor) -> Tensor:
        # down to the smallest normal number, because there are far more floats near 0 than near 1
        return y.clamp(torch.finfo(y.dtype).tiny, below(1.0, y.dtype))

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

    **Forward**: O(1) per element; y is kept strictly inside (-1, 1).
    **Inverse**: ``atanh``; a y at or beyond an end is replaced by the closest float inside, so that x is finite.
    **Log-det**: ``log 4 + logsigmoid(2x) + logsigmoid(-2x)``; +inf, hence density 0, if y is outside [-1, 1] by more
    than rounding error.
    **Identity**: only to first order at x = 0.

    Shape:
        ``(*) -> (*)``; log-det ``(*)``. The event dimension is 0.

    Differs from ``torch.distributions.TanhTransform``: it is a module, its inverse is finite at y = +-1, and it
    computes y and the log-det in one pass.

    Example:
        >>> layer = Tanh()
        >>> x = torch.randn(5)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
    """

    codomain: constraints.Constraint = constraints.interval(-1.0, 1.0)

    def _inside(self, y: Tensor) -> Tensor:
        edge = below(1.0, y.dtype)
        return y.clamp(-edge, edge)

    def _function(self, x: Tensor) -> Tensor:
        return self._inside(torch.tanh(x))

    def _inverse_function(self, y: Tensor) -> Tensor:
        return torch.atanh(self._inside(y))

    def _log_slope(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * _LOG2 + _log_sigmoid_slope(_doubled(x))


class ELU(Elementwise):
    r"""Bends the negative half-line exponentially towards :math:`-\alpha`.

    .. math:: y = x \text{ for } x \ge 0, \qquad y = \alpha (e^x - 1) \text{ for } x < 0, \qquad \alpha > 0.

    Invertible because it is increasing; its codomain is :math:`(-\alpha, \infty)`. Choose it where one tail must
    be bounded.

    **Forward**: O(1) per element, by ``expm1``; y is kept strictly above :math:`-\alpha`.
    **Inverse**: ``log1p``; a y at or below :math:`-\alpha` is replaced by the closest float above, so that x is finite.
    **Log-det**: :math:`x + \log\alpha` for x < 0, else 0; +inf, hence density 0, if y is below :math:`-\alpha` by more
    than rounding error.
    **Identity**: on x >= 0.

    Args:
        alpha: Minus the lower bound, :math:`\alpha`.

    Shape:
        ``(*) -> (*)``; log-det ``(*)``. The event dimension is 0.

    Raises:
        TypeError: if alpha is not a number.
        ValueError: if alpha is not positive and finite.

    Differs from Pyro's ``ELUTransform``: it declares its true codomain, takes any alpha, and its inverse needs no
    epsilon.

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
        self.alpha = positive_number(alpha, "alpha", type(self).__name__)
        self.codomain = constraints.greater_than(-self._scale * self.alpha)

    def _function(self, x: Tensor) -> Tensor:
        floor = above(-self._scale * self.alpha, x.dtype)
        # without the clamp, exp would overflow for x > 0 and turn the gradient into NaN
        negative = (self._scale * self.alpha * torch.expm1(x.clamp(max=0))).clamp(min=floor)
        return torch.where(x < 0, negative, self._scale * x)

    def _inverse_function(self, y: Tensor) -> Tensor:
        ratio = y.clamp(max=0) / (self._scale * self.alpha)
        negative = torch.log1p(ratio.clamp(min=-below(1.0, y.dtype)))
        return torch.where(y < 0, negative, y / self._scale)

    def _log_slope(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(x < 0, x + math.log(self.alpha), torch.zeros_like(x)) + math.log(self._scale)

    def extra_repr(self) -> str:
        return str(self.alpha)


class SELU(ELU):
    r"""Bends the negative half-line as the self-normalising ELU does.

    .. math:: y = \lambda x \text{ for } x \ge 0, \qquad y = \lambda \alpha (e^x - 1) \text{ for } x < 0,

    with :math:`\lambda = 1.0507` and :math:`\alpha = 1.6733`. Invertible because it is increasing; its codomain is
    :math:`(-\lambda\alpha, \infty)`. Choose it in deep stacks that should preserve unit variance.

    **Forward**, **Inverse**: as in :class:`ELU`.
    **Log-det**: :math:`\log\lambda`, plus :math:`x + \log\alpha` for x < 0; +inf, hence density 0, if y is
    below :math:`-\lambda\alpha` by more than rounding error.
    **Identity**: within 5.1 % on x >= 0.

    Shape:
        ``(*) -> (*)``; log-det ``(*)``. The event dimension is 0.

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


def sigmoid(input_dim: int | None = None) -> Sigmoid:
    """Build a :class:`Sigmoid`; it has no parameters, so ``input_dim`` is not needed."""
    size_only(input_dim, "sigmoid", " For another range use Interval(low, high).")
    return Sigmoid()


def tanh(input_dim: int | None = None) -> Tanh:
    """Build a :class:`Tanh`; it has no parameters, so ``input_dim`` is not needed."""
    size_only(input_dim, "tanh", " For another range use Interval(low, high).")
    return Tanh()


def elu(input_dim: float | None = None, *, alpha: float | None = None) -> ELU:
    """Build an :class:`ELU`; ``elu(2.0)`` has the alpha 2. The default alpha is 1.

    Args:
        input_dim: A float is taken as alpha. An int is taken as the size of an event, which the layer does not need;
            it is accepted so that ``stack(4, elu, 8)`` works.
        alpha: Alpha, as a keyword.

    Raises:
        TypeError: if alpha is given twice, or is not a number.
        ValueError: if alpha is not positive and finite.
    """
    return ELU(one_number(input_dim, alpha, 1.0, "alpha", "elu"))


def selu(input_dim: int | None = None) -> SELU:
    """Build a :class:`SELU`; it has no parameters, so ``input_dim`` is not needed."""
    size_only(input_dim, "selu", " For another alpha use ELU(alpha).")
    return SELU()


def interval(input_dim: int | None = None, *, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Interval:
    """Build an :class:`Interval`; it has no parameters, so ``input_dim`` is not needed."""
    size_only(input_dim, "interval", " Give the ends as keywords: interval(low=..., high=...).")
    return Interval(low, high)
