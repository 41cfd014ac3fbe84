"""Elementwise layers: an increasing function of one variable whose parameters are learned constants."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_invflows import monotone
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.core.kinds import Elementwise
from pyro_invflows.monotone import MonotoneFunction, RationalQuadraticSpline, evaluate
from pyro_invflows.support.checks import described, positive_int

__all__ = [
    "Monotone",
    "SinhArcsinh",
    "Spline",
    "conditional_sinh_arcsinh",
    "conditional_spline",
    "sinh_arcsinh",
    "spline",
]


class Monotone(Elementwise):
    r"""Applies an increasing function of one variable to each element; every element has its own parameters.

    .. math:: y_i = f(x_i; \theta_i).

    Invertible because f is increasing for any parameters. Choose it for marginal distributions: next to
    the data, where it learns their shapes most easily, or next to the base. It takes any function of
    :mod:`pyro_invflows.monotone`, or one of your own; :class:`Spline` and :class:`SinhArcsinh` are names
    for two of them.

    **Forward**, **Inverse**, **Log-det**: those of the function, O(P) per element; derivatives of all orders that it
    has. **Identity**: at initialisation, up to rounding error (:math:`\theta = 0`).

    Args:
        function: f, such as ``pyro_invflows.monotone.MixtureCDF()``.
        shape: Shape of the elements, each with its own parameters; broadcasts against the input from the right.

    Attributes:
        raw: :math:`\theta`, ``(P, *shape)``.

    Shape:
        ``(*S) -> broadcast(*S, *shape)``, log-det likewise; event dimension 0.

    Raises:
        TypeError: if ``function`` is not a :class:`~pyro_invflows.monotone.MonotoneFunction`.
        ValueError: if the input does not broadcast with the parameters.

    Example:
        >>> from pyro_invflows.monotone import MixtureCDF
        >>> layer = Monotone(MixtureCDF(num_components=3), 4)
        >>> _ = torch.nn.init.normal_(layer.raw)
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    def __init__(self, function: MonotoneFunction, shape: int | Iterable[int] = (), *, cache_size: int = 1) -> None:
        super().__init__(shape, cache_size=cache_size)
        if not isinstance(function, MonotoneFunction):
            raise TypeError(
                f"{type(self).__name__}: function must be one of pyro_invflows.monotone, such as Affine(), or derive "
                f"from MonotoneFunction, but got {described(function)}"
            )
        self.function = function
        self.domain = self.codomain = function.domain
        self.raw = nn.Parameter(torch.empty(function.num_parameters, *self.shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all parameters to 0, so that the layer is the identity."""
        nn.init.zeros_(self.raw)

    def _evaluate_function(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        own = len(self.shape)
        whole = torch.broadcast_shapes(value.shape, self.batch_shape)
        batch, elements = whole[: len(whole) - own], whole[len(whole) - own :]
        in_front = self.raw.shape[: self.raw.dim() - own]  # (*B, P)
        raw = self.raw.expand(*in_front, *elements).reshape(*in_front, elements.numel())
        result, log_slope = evaluate(self.function, value.expand(whole).reshape(*batch, elements.numel()), raw, inverse)
        log_slope = torch.zeros_like(result) if log_slope is None else log_slope.expand_as(result)
        return result.reshape(whole), log_slope.reshape(whole)

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self._evaluate_function(x, inverse=False)

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self._evaluate_function(y, inverse=True)

    def _aux(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        if self.codomain is constraints.real:
            return self.evaluate(x)[1]
        return self.evaluate_inverse(y)[1]  # only y shows that it is out of reach

    def _log_det(self, x: Tensor, y: Tensor, aux: Tensor) -> Tensor:  # type: ignore[override]
        return aux.to(x.dtype)

    def extra_repr(self) -> str:
        shape = super().extra_repr()
        return f"{self.function!r}, {shape}" if shape else repr(self.function)


class Spline(Monotone):
    r"""Bends each element, inside an interval, by its own monotone rational-quadratic spline.

    .. math:: y_i = f(x_i; \theta_i), \qquad y_i = x_i \text{ for } |x_i| \ge B,

    where f is a :class:`~pyro_invflows.monotone.RationalQuadraticSpline`. Invertible because a spline with positive
    widths, heights and slopes is increasing. Choose it next to the data, with about 16 bins, between the other layers
    and a :class:`~pyro_invflows.Whitening` that brings the data into the interval: it learns the marginal
    distributions.

    **Forward**, **Inverse**: O(K) per element, closed forms, finite for all finite values and parameters; derivatives
    of all orders. **Log-det**: from the same evaluation. **Identity**: at initialisation, up to rounding error.

    Args:
        shape: Shape of the elements, each with its own spline; broadcasts against the input from the right.
        num_bins: Number K of bins, at least 2.
        bound: End B of the interval.

    Attributes:
        raw: Logits of the widths and heights and log-slopes at the inner knots, ``(3 K - 1, *shape)``.

    Shape:
        ``(*S) -> broadcast(*S, *shape)``, log-det likewise; event dimension 0.

    Raises:
        ValueError: if ``num_bins`` is below 2 or ``bound`` is not positive.

    Differs from Pyro's ``Spline``: it is initially the identity, and both directions are finite for all finite
    values.

    References:
        Durkan et al. (2019), *Neural spline flows*, Eqs. 4-8.

    Example:
        >>> layer = Spline(4, num_bins=16)
        >>> _ = torch.nn.init.normal_(layer.raw)
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    def __init__(
        self, shape: int | Iterable[int] = (), *, num_bins: int = 8, bound: float = 5.0, cache_size: int = 1
    ) -> None:
        super().__init__(RationalQuadraticSpline(num_bins, bound), shape, cache_size=cache_size)


class SinhArcsinh(Monotone):
    r"""Changes the skewness and the tail weight of each element.

    .. math::
        y_i = \frac{1}{p_i} \left( \sinh v + \tanh(\kappa_i) (\cosh v - 1) \right), \qquad
        v = p_i \operatorname{asinh} x_i.

    Invertible because its slope is positive, 1 at the origin. Choose it for marginal distributions that are skewed, or
    whose tails are heavier (p > 1) or lighter (p < 1) than those of the base; splines, with their linear tails, cannot
    change these. Two parameters per element.

    **Forward**, **Inverse**: O(1) per element, closed forms; derivatives of all orders. **Log-det**: from the same
    evaluation. **Identity**: at initialisation, up to rounding error (p = 1, :math:`\kappa = 0`).

    Args:
        shape: Shape of the elements, each with its own parameters; broadcasts against the input from the right.
        max_skewness: Smooth bound on :math:`|\kappa|`.
        max_log_tail: Smooth bound on :math:`|\log p|`.

    Attributes:
        raw: :math:`\kappa` and log p before the bounds, ``(2, *shape)``.

    Shape:
        ``(*S) -> broadcast(*S, *shape)``, log-det likewise; event dimension 0.

    Raises:
        ValueError: if a bound is not positive.

    References:
        Jones and Pewsey (2009), *Sinh-arcsinh distributions*, Eq. 1, shifted and scaled.

    Example:
        >>> layer = SinhArcsinh(4)
        >>> _ = torch.nn.init.normal_(layer.raw)
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        shape: int | Iterable[int] = (),
        *,
        max_skewness: float = 2.0,
        max_log_tail: float = 1.0,
        cache_size: int = 1,
    ) -> None:
        super().__init__(monotone.SinhArcsinh(max_skewness, max_log_tail), shape, cache_size=cache_size)


def spline(input_dim: int, *, num_bins: int = 8, bound: float = 5.0) -> Spline:
    """Build a :class:`Spline` for each of ``input_dim`` elements."""
    return Spline(positive_int(input_dim, "input_dim", "spline"), num_bins=num_bins, bound=bound)


def sinh_arcsinh(input_dim: int, *, max_skewness: float = 2.0, max_log_tail: float = 1.0) -> SinhArcsinh:
    """Build a :class:`SinhArcsinh` for each of ``input_dim`` elements."""
    input_dim = positive_int(input_dim, "input_dim", "sinh_arcsinh")
    return SinhArcsinh(input_dim, max_skewness=max_skewness, max_log_tail=max_log_tail)


conditional_spline = conditional_factory(spline)
conditional_sinh_arcsinh = conditional_factory(sinh_arcsinh)
