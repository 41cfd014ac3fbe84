r"""Spline autoregressive layers: a masked network bends each coordinate.

Durkan et al. (2019), *Neural spline flows*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.monotone import RationalQuadraticSpline
from pyro_invflows.transforms.autoregressive import Autoregressive, autoregressive_network

__all__ = ["SplineAutoregressive", "conditional_spline_autoregressive", "spline_autoregressive"]


class SplineAutoregressive(Autoregressive):
    r"""Bends each coordinate by a spline whose parameters a masked network computes from the coordinates before it.

    .. math:: y_i = f(x_i; \theta_i(x_{<i})), \qquad y_i = x_i \text{ for } |x_i| \ge B,

    where f is a monotone rational-quadratic spline of K bins on [-B, B]: the :class:`Autoregressive` layer of
    :class:`~pyro_invflows.monotone.RationalQuadraticSpline`. Invertible because the Jacobian is triangular and each
    spline is increasing. Choose it for densities with sharp edges or several modes, if the data have about unit scale.

    **Forward**, **Inverse**, **Log-det**, **Identity**: as in :class:`Autoregressive`.

    Args:
        hypernet: Masked network to ``(3 K - 1) D`` elements: the logits of the widths, then of the heights, then the
            log-slopes at the inner knots; see :class:`Autoregressive`.
        context_dim: As in :class:`Autoregressive`.
        num_bins: Number K of bins, at least 2.
        bound: End B of the interval.
        **settings: ``input_dim``, ``solver``, ``atol``, ``rtol``, ``max_steps``, ``on_failure`` and ``cache_size``, as
            in :class:`Autoregressive`.

    Attributes:
        hypernet: The network, with its parameters.
        context: ``(*B, context_dim)``, a buffer, or None while not conditioned; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``, log-det ``(*B,)``.

    Raises:
        ValueError: if ``num_bins`` is below 2 or ``bound`` is not positive; and as in :class:`Autoregressive`.

    References:
        Durkan et al. (2019), *Neural spline flows*, Eqs. 4-8.

    Example:
        >>> from pyro_invflows.networks import masked_network
        >>> layer = SplineAutoregressive(masked_network(3, [16], 11), num_bins=4)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    def __init__(
        self, hypernet: nn.Module, *, context_dim: int = 0, num_bins: int = 8, bound: float = 5.0, **settings: Any
    ):
        super().__init__(RationalQuadraticSpline(num_bins, bound), hypernet, context_dim=context_dim, **settings)


def spline_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    num_bins: int = 8,
    bound: float = 5.0,
    ordering: Sequence[int] | None = None,
    context_dim: int = 0,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> SplineAutoregressive:
    """Build a :class:`SplineAutoregressive` and its network; it is initially the identity.

    Args:
        input_dim: Size D of an event.
        hidden_dims: Widths of the network's hidden layers; default two of ``min(10 * input_dim, 256)``.
        num_bins: As in the class.
        bound: As in the class.
        ordering: As in :func:`affine_autoregressive`.
        context_dim: As in :class:`Autoregressive`.
        activation: Constructor of the network's activations.

    Raises:
        ValueError: if ``num_bins`` is below 2, ``bound`` is not positive, or ``ordering`` is not a permutation of the
            coordinates.
    """
    count = RationalQuadraticSpline(num_bins, bound).num_parameters
    hypernet = autoregressive_network(
        input_dim, hidden_dims, count, ordering, context_dim, activation, "spline_autoregressive"
    )
    return SplineAutoregressive(hypernet, context_dim=context_dim, num_bins=num_bins, bound=bound)


conditional_spline_autoregressive = conditional_factory(
    spline_autoregressive, "its network also reads a context", hypernet=False
)
