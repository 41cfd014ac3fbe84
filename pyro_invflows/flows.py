r"""Ready-made flows: functions that return a :class:`~pyro_invflows.Flow` that is ready to train.

All flows on vectors have one recipe, here from the data to the base:

1. a :class:`~pyro_invflows.Whitening`, which ``Flow.initialize(data)`` (or :func:`~pyro_invflows.fit`) fits to the
   data;
2. with splines, an elementwise :class:`~pyro_invflows.Spline` without conditions, which learns the margins;
3. ``num_layers`` times a trained linear map (:class:`~pyro_invflows.LULinear`) and a layer of the flow's own kind.

Every flow starts as the Gaussian with the mean and covariance of the data. Its layers stand so that scoring data takes
one evaluation of each network; sampling costs a few times as much in autoregressive flows, and about the same in
couplings. ``docs/which_flow.md`` says which one to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import Distribution, Transform

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.chain import Chain, stack
from pyro_invflows.core.conditional import Conditional
from pyro_invflows.core.flow import Flow
from pyro_invflows.core.inverted import Inverted
from pyro_invflows.support.checks import integer, positive_int
from pyro_invflows.transforms import (
    act_norm,
    affine_autoregressive,
    affine_coupling,
    conditional_lu_linear,
    contractive_residual,
    generalized_sylvester,
    lu_linear,
    multi_scale,
    spline,
    spline_autoregressive,
    spline_coupling,
    whitening,
)

__all__ = [
    "gaussian",
    "glow",
    "masked_autoregressive_flow",
    "neural_spline_flow",
    "real_nvp",
    "residual_flow",
    "sylvester_flow",
]

#: Number of bins of the splines next to the data.
_MARGIN_BINS = 16


def neural_spline_flow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    autoregressive: bool = True,
    num_bins: int = 8,
    bound: float = 5.0,
    activation: Callable[[], nn.Module] = nn.ReLU,
    base: Distribution | None = None,
) -> Flow:
    """Build a flow of monotone rational-quadratic splines: the one to try first.

    Splines bend each coordinate freely within ``bound`` standard deviations of the data, so it learns sharp edges,
    several modes and narrow ridges. The default widths suit some 10 000 rows: from there on,
    ``hidden_dims=(128, 128)`` is often better, and well below it ``(32, 32)``.

    Args:
        input_dim: Size D of an event.
        context_dim: Width of the context; 0 for a flow without one. Standardise contexts as you would inputs of any
            network.
        num_layers: Number of layers of splines.
        hidden_dims: Widths of the hidden layers of each network.
        autoregressive: Whether each coordinate depends on all before it (a masked network), or half of the coordinates
            on the other half (couplings: sampling is as fast as scoring).
        num_bins: Number of bins of each spline.
        bound: End of the interval in which the splines bend; the whitened data should lie within it.
        activation: Constructor of the networks' activation.
        base: Distribution of an event ``(input_dim,)``; default the standard normal.

    Raises:
        ValueError: if a size is out of range, or the base does not fit.

    References:
        Durkan et al. (2019), *Neural spline flows*; Papamakarios et al. (2017) for the autoregressive form.

    Example:
        >>> flow = neural_spline_flow(3)
        >>> data = torch.randn(200, 3).exp()
        >>> flow.initialize(data)().log_prob(data).shape, flow().sample((5,)).shape
        (torch.Size([200]), torch.Size([5, 3]))
        >>> neural_spline_flow(3, 2)(torch.randn(7, 2)).sample().shape
        torch.Size([7, 3])
    """

    def layer(i: int) -> Bijection:
        if autoregressive:
            return Inverted(
                spline_autoregressive(
                    input_dim,
                    hidden_dims,
                    num_bins=num_bins,
                    bound=bound,
                    ordering=_order(input_dim, i),
                    context_dim=context_dim,
                    activation=activation,
                )
            )
        return spline_coupling(
            input_dim,
            hidden_dims,
            num_bins=num_bins,
            bound=bound,
            keep=_kept(i),
            context_dim=context_dim,
            activation=activation,
        )

    input_dim, context_dim = _sizes("neural_spline_flow", input_dim, context_dim)
    margins = spline(input_dim, num_bins=_MARGIN_BINS, bound=bound)
    return _vector_flow("neural_spline_flow", input_dim, context_dim, num_layers, layer, base, margins)


def masked_autoregressive_flow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 5,
    hidden_dims: Sequence[int] = (64, 64),
    activation: Callable[[], nn.Module] = nn.ReLU,
    base: Distribution | None = None,
) -> Flow:
    """Build a masked autoregressive flow: each coordinate is scaled and shifted, given those before it.

    Args:
        input_dim: As in :func:`neural_spline_flow`.
        context_dim: As in :func:`neural_spline_flow`.
        num_layers: Number of autoregressive layers; every other one has the opposite order.
        hidden_dims: As in :func:`neural_spline_flow`.
        activation: As in :func:`neural_spline_flow`.
        base: As in :func:`neural_spline_flow`.

    Raises:
        ValueError: as in :func:`neural_spline_flow`.

    References:
        Papamakarios et al. (2017), *Masked autoregressive flow for density estimation*.

    Example:
        >>> masked_autoregressive_flow(3)().sample((5,)).shape
        torch.Size([5, 3])
    """

    def layer(i: int) -> Bijection:
        order = _order(input_dim, i)
        return Inverted(
            affine_autoregressive(
                input_dim, hidden_dims, ordering=order, context_dim=context_dim, activation=activation
            )
        )

    return _vector_flow("masked_autoregressive_flow", input_dim, context_dim, num_layers, layer, base)


def real_nvp(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    activation: Callable[[], nn.Module] = nn.ReLU,
    base: Distribution | None = None,
) -> Flow:
    """Build a flow of affine couplings: the fastest in both directions, and the least flexible.

    Args:
        input_dim: As in :func:`neural_spline_flow`.
        context_dim: As in :func:`neural_spline_flow`.
        num_layers: Number of couplings; they keep the first and the last half of the coordinates in turn.
        hidden_dims: As in :func:`neural_spline_flow`.
        activation: As in :func:`neural_spline_flow`.
        base: As in :func:`neural_spline_flow`.

    Raises:
        ValueError: as in :func:`neural_spline_flow`.

    References:
        Dinh et al. (2017), *Density estimation using Real NVP*.

    Example:
        >>> real_nvp(3)().sample((5,)).shape
        torch.Size([5, 3])
    """

    def layer(i: int) -> Bijection:
        return affine_coupling(input_dim, hidden_dims, keep=_kept(i), context_dim=context_dim, activation=activation)

    return _vector_flow("real_nvp", input_dim, context_dim, num_layers, layer, base)


def sylvester_flow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    activation: Callable[[], nn.Module] = nn.Tanh,
    base: Distribution | None = None,
) -> Flow:
    """Build a flow of generalised Sylvester layers: autoregressive pushes in learned, rotated coordinates.

    Args:
        input_dim: As in :func:`neural_spline_flow`.
        context_dim: As in :func:`neural_spline_flow`.
        num_layers: Number of :class:`~pyro_invflows.GeneralizedSylvester` layers.
        hidden_dims: As in :func:`neural_spline_flow`.
        activation: As in :func:`neural_spline_flow`.
        base: As in :func:`neural_spline_flow`.

    Raises:
        ValueError: as in :func:`neural_spline_flow`.

    References:
        van den Berg et al. (2018), *Sylvester normalizing flows for variational inference*; Hoogeboom et al. (2020),
        *The convolution exponential and generalized Sylvester flows*.

    Example:
        >>> sylvester_flow(3)().sample((5,)).shape
        torch.Size([5, 3])
    """

    def layer(i: int) -> Bijection:
        return Inverted(generalized_sylvester(input_dim, hidden_dims, context_dim=context_dim, activation=activation))

    return _vector_flow("sylvester_flow", input_dim, context_dim, num_layers, layer, base)


def residual_flow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    lipschitz: float = 0.97,
    base: Distribution | None = None,
) -> Flow:
    """Build a flow of residual networks: smooth densities, no order and no split of the coordinates.

    Its log-determinants are exact, so it is for few dimensions, up to about 32.

    Args:
        input_dim: As in :func:`neural_spline_flow`.
        context_dim: As in :func:`neural_spline_flow`.
        num_layers: Number of residual networks.
        hidden_dims: As in :func:`neural_spline_flow`.
        lipschitz: Bound on the Lipschitz constant of each residual, strictly between 0 and 1.
        base: As in :func:`neural_spline_flow`.

    Raises:
        ValueError: as in :func:`neural_spline_flow`; or if ``lipschitz`` is out of range.

    References:
        Behrmann et al. (2019), *Invertible residual networks*; Chen et al. (2019), *Residual flows for invertible
        generative modeling*.

    Example:
        >>> residual_flow(3)().sample((5,)).shape
        torch.Size([5, 3])
    """

    def layer(i: int) -> Bijection:
        return Inverted(contractive_residual(input_dim, hidden_dims, lipschitz=lipschitz, context_dim=context_dim))

    return _vector_flow("residual_flow", input_dim, context_dim, num_layers, layer, base)


def gaussian(
    input_dim: int,
    context_dim: int = 0,
    *,
    context_hidden_dims: Sequence[int] = (64, 64),
    base: Distribution | None = None,
) -> Flow:
    """Build a Gaussian with the mean and covariance of the data: what every other flow must beat.

    Args:
        input_dim: As in :func:`neural_spline_flow`.
        context_dim: Width of the context. With one, a network sets the mean and the covariance from it.
        context_hidden_dims: Widths of the hidden layers of that network.
        base: As in :func:`neural_spline_flow`; with another one, the flow is an affine map of that distribution.

    Raises:
        ValueError: as in :func:`neural_spline_flow`.

    Example:
        >>> data = 5.0 + 3.0 * torch.randn(1000, 2)
        >>> flow = gaussian(2).initialize(data)
        >>> torch.allclose(flow.transforms(torch.zeros(2)), data.mean(0), atol=1e-4)
        True
    """
    input_dim, context_dim = _sizes("gaussian", input_dim, context_dim)
    parts: list[Transform | Conditional] = [whitening(input_dim)]
    if context_dim:
        parts.insert(0, conditional_lu_linear(input_dim, context_dim, context_hidden_dims=context_hidden_dims))
    return Flow(_base((input_dim,), base), parts)


def glow(
    image_shape: Sequence[int],
    *,
    num_scales: int = 2,
    num_layers: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    activation: Callable[[], nn.Module] = nn.ReLU,
    base: Distribution | None = None,
) -> Flow:
    """Build a multi-scale flow on images: act-norms, 1 x 1 convolutions and convolutional couplings.

    Args:
        image_shape: Channels, height and width of an image; height and width must be divisible by ``2 ** num_scales``.
        num_scales: Number of scales; see :func:`~pyro_invflows.multi_scale`.
        num_layers: Number of couplings at each scale.
        hidden_dims: Channels of the hidden layers of each network.
        activation: Constructor of the networks' activation.
        base: Distribution of the coarsest scale, ``(2 ** (S + 1) * C, H / 2 ** S, W / 2 ** S)`` with S scales; default
            the standard normal.

    Raises:
        ValueError: if the image cannot be halved so often, another size is out of range, or the base does not fit.

    References:
        Kingma and Dhariwal (2018), *Glow: generative flow with invertible 1x1 convolutions*.

    Example:
        >>> glow((1, 8, 8), num_layers=2)().sample((5,)).shape
        torch.Size([5, 1, 8, 8])
    """
    try:
        channels, height, width = (positive_int(n, "each of image_shape", "glow") for n in image_shape)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"glow: image_shape must be (channels, height, width), such as (3, 32, 32), but got {image_shape!r}."
        ) from error
    num_scales = positive_int(num_scales, "num_scales", "glow")
    if height % 2**num_scales or width % 2**num_scales:
        raise ValueError(
            f"glow: {num_scales} scales halve height and width as often, so both must be divisible by "
            f"{2**num_scales}, but the image has the shape {(channels, height, width)}. Use fewer scales, or pad."
        )

    def step(channels: int) -> Chain:
        coupling = affine_coupling(channels, hidden_dims, dim=-3, activation=activation)
        return Chain([coupling, Inverted(lu_linear(channels, dim=-3)), act_norm(channels, dim=-3)])

    chain = multi_scale(channels, layers=lambda n: stack(num_layers, step, n), num_scales=num_scales, dim=-3)
    return Flow(_base(tuple(chain.inverse_shape(torch.Size((channels, height, width)))), base), chain)


# ---------------------------------------------------------------------- what they share


def _vector_flow(
    owner: str,
    input_dim: int,
    context_dim: int,
    num_layers: int,
    layer: Callable[[int], Bijection],
    base: Distribution | None,
    margins: Transform | None = None,
) -> Flow:
    """Build a flow on vectors by the recipe of this module.

    Args:
        owner: Name used in error messages.
        input_dim: Size D of an event.
        context_dim: Width of the context, or 0.
        num_layers: Number of layers.
        layer: Builds layer i, which reads the context itself; counted from the data.
        base: The base distribution, or None.
        margins: What comes between the whitening and the first layer.
    """
    input_dim, context_dim = _sizes(owner, input_dim, context_dim)
    inward: list[Transform | Conditional] = [whitening(input_dim)]
    if margins is not None:
        inward.append(margins)
    for i in range(positive_int(num_layers, "num_layers", owner)):
        own = layer(i)
        # in the direction of scoring the linear map is a product, not a triangular solve
        inward += [Inverted(lu_linear(input_dim)), Conditional(own, context_dim) if context_dim else own]
    return Flow(_base((input_dim,), base), inward[::-1])


def _sizes(owner: str, input_dim: int, context_dim: int) -> tuple[int, int]:
    return positive_int(input_dim, "input_dim", owner), positive_int(context_dim, "context_dim", owner, minimum=0)


def _base(event_shape: tuple[int, ...], base: Distribution | None) -> Distribution:
    """Return the given base, or a standard normal."""
    if base is None:
        return dist.Normal(torch.zeros(event_shape), torch.ones(event_shape)).to_event(len(event_shape))
    shape = tuple(base.batch_shape + base.event_shape) if isinstance(base, Distribution) else event_shape
    if shape != event_shape:
        raise ValueError(
            f"The base must be the distribution of one event of shape {event_shape}, but has the shape {shape}; for "
            f"example Normal(torch.zeros({event_shape}), 1.0).to_event({len(event_shape)})."
        )
    return base


def _order(input_dim: int, i: int) -> Sequence[int] | None:
    """Return the order of the coordinates in layer i: as they stand and reversed in turn."""
    return range(integer(input_dim, "input_dim", "ordering"))[::-1] if i % 2 else None


def _kept(i: int) -> str:
    """Return which half the coupling i keeps."""
    return "last" if i % 2 else "first"
