r"""Spline couplings: a network that reads one part of the input bends the other.

Durkan et al. (2019), *Neural spline flows*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.monotone import RationalQuadraticSpline
from pyro_invflows.transforms.coupling import Coupling, coupling_network

__all__ = ["SplineCoupling", "conditional_spline_coupling", "spline_coupling"]


class SplineCoupling(Coupling):
    r"""Bends part of the input by monotone splines, whose knots a network computes from the other part.

    .. math:: y_1 = x_1, \qquad y_{2, i} = f(x_{2, i}; \theta_i(x_1)), \qquad f(x) = x \text{ for } |x| \ge B,

    with f of :class:`~pyro_invflows.monotone.RationalQuadraticSpline`. Invertible for any network, because x_1 is
    passed on unchanged and a spline with positive widths, heights and slopes is increasing. Choose it where affine
    couplings are too stiff, for densities with several modes or sharp edges: it bends each element freely. Data should
    lie in the interval; a :class:`~pyro_invflows.Whitening` next to them brings them there.

    **Forward**, **Inverse**: one evaluation of the network, and O(K) operations per element, closed forms, finite for
    all floats and all outputs of the network; derivatives of all orders that the network has. **Log-det**: the sum of
    the log-slopes, from the same evaluation. **Identity**: if the network's output is zero, as in a layer newly built
    by :func:`spline_coupling`; always outside the interval.

    Args:
        split_dim: As in :class:`Coupling`.
        hypernet: Network to ``(3 K - 1) (D - split_dim)`` elements: logits of the widths, logits of the heights, raw
            log-slopes at the inner knots. Otherwise as in :class:`Coupling`.
        num_bins: Number K of bins, at least 2.
        bound: End B of the interval.
        dim: As in :class:`Coupling`.
        keep: As in :class:`Coupling`.
        context_dim: As in :class:`Coupling`.
        input_dim: As in :class:`Coupling`.

    Attributes:
        hypernet: The network, with its parameters; None if constants are learned.
        constants: The parameters of the splines, ``((3 K - 1) D,)``; only without a network.
        context: ``(*B, context_dim)``, a buffer, or None while not conditioned; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``, where the network may mix pixels;
        log-det ``(*B,)``.

    Raises:
        TypeError: if the network is not a module.
        ValueError: as :class:`Coupling`, and if ``num_bins`` is below 2 or ``bound`` is not positive.

    Differs from Pyro's ``SplineCoupling``: sequences and images, a context, a start at the identity; both directions
    are finite for all finite values.

    References:
        Durkan et al. (2019), *Neural spline flows*, Eqs. 4-8 and section 3.

    Example:
        >>> layer = SplineCoupling(1, torch.nn.Linear(1, 2 * 23))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    def __init__(
        self,
        split_dim: int,
        hypernet: nn.Module | None,
        *,
        num_bins: int = 8,
        bound: float = 5.0,
        dim: int = -1,
        keep: str = "first",
        context_dim: int = 0,
        input_dim: int | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(
            RationalQuadraticSpline(num_bins, bound),
            split_dim,
            hypernet,
            dim=dim,
            keep=keep,
            context_dim=context_dim,
            input_dim=input_dim,
            cache_size=cache_size,
        )


def spline_coupling(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    num_bins: int = 8,
    bound: float = 5.0,
    split_dim: int | None = None,
    dim: int = -1,
    keep: str = "first",
    context_dim: int = 0,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> SplineCoupling:
    """Build a :class:`SplineCoupling` and its network; it is initially the identity.

    Args:
        input_dim: Size D of an event along ``dim``.
        hidden_dims: Widths (channels) of the network's hidden layers; by default two of ``min(10 * input_dim, 256)``.
        num_bins: As in the class.
        bound: As in the class.
        split_dim: As in the class; default ``input_dim // 2``.
        dim: -1 builds a dense network; -2, -3 and -4 a convolutional one with 1, 2 or 3 spatial dimensions.
        keep: As in the class.
        context_dim: As in the class.
        activation: Constructor of the network's activations.

    Raises:
        ValueError: if ``split_dim`` leaves nothing to transform, ``num_bins`` is below 2 or ``bound`` is not positive.
    """
    function = RationalQuadraticSpline(num_bins, bound)
    split_dim, hypernet = coupling_network(
        function.num_parameters, input_dim, hidden_dims, split_dim, dim, context_dim, activation, "spline_coupling"
    )
    return SplineCoupling(
        split_dim,
        hypernet,
        num_bins=num_bins,
        bound=bound,
        dim=dim,
        keep=keep,
        context_dim=context_dim,
        input_dim=input_dim,
    )


conditional_spline_coupling = conditional_factory(spline_coupling, "its network also reads a context", hypernet=False)
