r"""Affine couplings: a network that reads one part of the input scales and shifts the other.

Dinh et al. (2015), *NICE*, for the additive form, and Dinh et al. (2017), *Density estimation using Real NVP*, Eqs. 7
and 8, for the affine one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.monotone import Additive, Affine
from pyro_invflows.support.checks import positive_number
from pyro_invflows.transforms.coupling import Coupling, coupling_network

__all__ = ["AffineCoupling", "affine_coupling", "conditional_affine_coupling"]


class AffineCoupling(Coupling):
    r"""Scales and shifts part of the input by the output of a network that reads the other part.

    .. math:: y_1 = x_1, \qquad y_2 = x_2 \odot e^{s(x_1)} + t(x_1),

    where the network returns :math:`(\tilde s, t)`, and the log-scale is :math:`s = m \tanh(\tilde s / m)`. Invertible
    for any network, because x_1 is passed on unchanged. Choose it as the main layer of a flow, with a
    :class:`~pyro_invflows.Permute` or :class:`~pyro_invflows.Orthogonal` layer between two couplings.

    **Forward**, **Inverse**: one evaluation of the network; derivatives of all orders that the network has.
    **Log-det**: :math:`\sum s`, from the same evaluation. **Identity**: if the network's output is zero, as in a layer
    newly built by :func:`affine_coupling`.

    Args:
        split_dim: Number of elements (channels) of x_1; 0 is allowed.
        hypernet: Network from x_1 (followed by the context) to ``2 (D - split_dim)`` elements, the raw log-scales
            first, or to ``D - split_dim`` elements if ``scale=None``. It receives vectors ``(*B, split_dim)`` or, for
            another ``dim``, one flat batch ``(N, split_dim, *spatial)``. With ``None``, constants are learned instead;
            this needs ``split_dim=0`` and ``input_dim``. The network must not write to its input; one that begins with
            a module with ``inplace=True`` receives a copy.
        dim: Axis that is split: -1 for vectors, -3 for the channels of images.
        keep: ``"first"`` if x_1 holds the leading elements, ``"last"`` if it holds the trailing ones. If you alternate
            the two, no permutation is needed between couplings.
        scale: ``"tanh"`` bounds the log-scale smoothly on both sides; with ``None`` the layer only shifts, and
            preserves volume.
        context_dim: Width of the context that the network also takes (see :class:`~pyro_invflows.Conditional`); while
            the layer is not conditioned, the network receives zeros instead.
        max_log_scale: Bound m on the log-scale.
        input_dim: Size D of an event along ``dim``, if it is to be checked; needed for constants.

    Attributes:
        hypernet: The network, with its parameters; None if constants are learned.
        constants: The raw log-scales, then the shifts, a parameter ``(2 D,)``, or ``(D,)`` if ``scale=None``; only
            without a network.
        context: ``(*B, context_dim)``, a buffer, or None while not conditioned; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``, where the network may mix pixels;
        log-det ``(*B,)``.

    Raises:
        TypeError: if the network is not a module.
        ValueError: if ``split_dim`` leaves nothing to transform; if the network's output has the wrong shape, or the
            network writes to its input; if another argument is out of range.

    Differs from Pyro's ``AffineCoupling``: the bound on the log-scale is smooth, images reach the network as images,
    and a one-dimensional event is allowed.

    References:
        Dinh et al. (2017), *Density estimation using Real NVP*, Eqs. 7-8; the bound after Ardizzone et al. (2019),
        *Analyzing inverse problems with invertible neural networks*.

    Example:
        >>> layer = AffineCoupling(1, torch.nn.Linear(1, 4))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        split_dim: int,
        hypernet: nn.Module | None,
        *,
        dim: int = -1,
        keep: str = "first",
        scale: str | None = "tanh",
        context_dim: int = 0,
        max_log_scale: float = 2.0,
        input_dim: int | None = None,
        cache_size: int = 1,
    ) -> None:
        if scale not in ("tanh", None):
            raise ValueError(f"AffineCoupling: scale must be 'tanh' or None, but got {scale!r}.")
        max_log_scale = positive_number(max_log_scale, "max_log_scale", "AffineCoupling")
        super().__init__(
            Additive() if scale is None else Affine(max_log_scale),
            split_dim,
            hypernet,
            dim=dim,
            keep=keep,
            context_dim=context_dim,
            input_dim=input_dim,
            cache_size=cache_size,
        )
        self.scale = scale
        self.max_log_scale = max_log_scale

    def extra_repr(self) -> str:
        return ", ".join([*self._settings(), *(["scale=None"] if self.scale is None else [])])


def affine_coupling(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    split_dim: int | None = None,
    dim: int = -1,
    keep: str = "first",
    scale: str | None = "tanh",
    context_dim: int = 0,
    max_log_scale: float = 2.0,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> AffineCoupling:
    """Build an :class:`AffineCoupling` and its network; it is initially the identity.

    Args:
        input_dim: Size D of an event along ``dim``.
        hidden_dims: Widths (channels) of the network's hidden layers; by default two of ``min(10 * input_dim, 256)``.
        split_dim: As in the class; default ``input_dim // 2``.
        dim: -1 builds a dense network; -2, -3 and -4 a convolutional one with 1, 2 or 3 spatial dimensions.
        keep: As in the class.
        scale: As in the class.
        context_dim: As in the class.
        max_log_scale: As in the class.
        activation: Constructor of the network's activations.

    Raises:
        ValueError: if ``split_dim`` leaves nothing to transform.
    """
    split_dim, hypernet = coupling_network(
        1 if scale is None else 2, input_dim, hidden_dims, split_dim, dim, context_dim, activation, "affine_coupling"
    )
    return AffineCoupling(
        split_dim,
        hypernet,
        dim=dim,
        keep=keep,
        scale=scale,
        context_dim=context_dim,
        max_log_scale=max_log_scale,
        input_dim=input_dim,
    )


conditional_affine_coupling = conditional_factory(affine_coupling, "its network also reads a context", hypernet=False)
