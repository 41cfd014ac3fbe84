r"""Affine autoregressive layers: a masked network scales and shifts each coordinate.

Kingma et al. (2016), *Improving variational inference with inverse autoregressive flow*; Papamakarios et al. (2017),
*Masked autoregressive flow for density estimation*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.monotone import Affine
from pyro_invflows.transforms.autoregressive import Autoregressive, autoregressive_network

__all__ = ["AffineAutoregressive", "affine_autoregressive", "conditional_affine_autoregressive"]


class AffineAutoregressive(Autoregressive):
    r"""Scales and shifts each coordinate by what a masked network computes from the coordinates before it.

    .. math:: y_i = x_i\, e^{s_i(x_{<i})} + t_i(x_{<i}),

    where the log-scale :math:`s = m \tanh(\tilde s / m)` is bounded and :math:`(\tilde s, t)` is the network's
    output: the :class:`Autoregressive` layer of :class:`~pyro_invflows.monotone.Affine`. Invertible because the
    Jacobian is triangular with :math:`e^{s_i}` on its diagonal. Choose it as the fastest autoregressive layer; for
    density estimation, wrap it in ``Inverted``, so that scoring takes one pass (a masked autoregressive flow).

    **Forward**, **Inverse**, **Log-det**, **Identity**: as in :class:`Autoregressive`.

    Args:
        hypernet: Masked network to ``2 D`` elements, the raw log-scales first; see :class:`Autoregressive`.
        context_dim: As in :class:`Autoregressive`.
        max_log_scale: Bound m on the log-scale.
        **settings: ``input_dim``, ``solver``, ``atol``, ``rtol``, ``max_steps``, ``on_failure`` and ``cache_size``, as
            in :class:`Autoregressive`.

    Attributes:
        hypernet: The network, with its parameters.
        context: ``(*B, context_dim)``, a buffer, or None while not conditioned; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``, log-det ``(*B,)``.

    Raises:
        ValueError: if ``max_log_scale`` is not positive; and as in :class:`Autoregressive`.

    References:
        Papamakarios et al. (2017), Eqs. 3-5; the bound follows Ardizzone et al. (2019), *Analyzing inverse problems
        with invertible neural networks*.

    Example:
        >>> from pyro_invflows.networks import masked_network
        >>> layer = AffineAutoregressive(masked_network(3, [16], 2))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    def __init__(self, hypernet: nn.Module, *, context_dim: int = 0, max_log_scale: float = 2.0, **settings: Any):
        super().__init__(Affine(max_log_scale), hypernet, context_dim=context_dim, **settings)


def affine_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    ordering: Sequence[int] | None = None,
    context_dim: int = 0,
    max_log_scale: float = 2.0,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> AffineAutoregressive:
    """Build an :class:`AffineAutoregressive` and its network; it is initially the identity.

    Args:
        input_dim: Size D of an event.
        hidden_dims: Widths of the network's hidden layers; default two of ``min(10 * input_dim, 256)``.
        ordering: The coordinates (0 to D - 1) in the order of dependence; the first one depends on no other. By
            default their own order. With ``range(D)[::-1]`` in every other layer, each coordinate depends on all.
        context_dim: As in :class:`Autoregressive`.
        max_log_scale: As in the class.
        activation: Constructor of the network's activations.

    Raises:
        ValueError: if ``ordering`` is not a permutation of the coordinates.
    """
    hypernet = autoregressive_network(
        input_dim, hidden_dims, 2, ordering, context_dim, activation, "affine_autoregressive"
    )
    return AffineAutoregressive(hypernet, context_dim=context_dim, max_log_scale=max_log_scale)


conditional_affine_autoregressive = conditional_factory(
    affine_autoregressive, "its network also reads a context", hypernet=False
)
