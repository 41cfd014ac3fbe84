r"""Multi-scale flows: a sequence of noise injections.

Dinh, Sohl-Dickstein and Bengio (2017), *Density estimation using Real NVP*, section 3.6, read from noise to data.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.distributions import Distribution, Transform

from pyro_invflows.core.chain import Chain
from pyro_invflows.core.flow import Flow
from pyro_invflows.support.checks import positive_int
from pyro_invflows.transforms.noise import ConcatNoise, whitened_noise
from pyro_invflows.transforms.shape import PixelShuffle

__all__ = ["multi_scale"]


def multi_scale(
    input_dim: int,
    *,
    layers: Callable[[int], Transform],
    num_scales: int = 2,
    dim: int = -1,
    noise: Callable[[int], Flow | Distribution] = whitened_noise,
) -> Chain:
    """Build a multi-scale flow: at each scale but the last, half of the elements are factored out.

    From noise to data, and so from coarse to fine, each scale doubles the event by injected noise and applies its
    layers to the whole event. For images, each scale also doubles height and width, so that the number of channels
    halves from scale to scale. The noise of the finer scales has the names ``"scale1"``, ``"scale2"``, ... in
    ``chain.latents(y)``. The coarsest scale is the base, whose event shape is ``chain.inverse_shape(event_shape)``.

    Args:
        input_dim: Size D of an event of the data; with ``dim=-3``, its channels C.
        layers: Function from the number of elements (or channels) to the layers of one scale, as a single transform
            that preserves the shape.
        num_scales: Number S of scales.
        dim: -1 for vectors, -3 for images.
        noise: Function from the number of elements (or channels) to the noise, as in :class:`ConcatNoise`. If the noise
            is conditional, its context has as many elements.

    Shape:
        ``(*B, D / 2^(S - 1)) -> (*B, D)``; with ``dim=-3``, ``(*B, 2^(S + 1) C, H / 2^S, W / 2^S) -> (*B, C, H, W)``;
        log-det ``(*B,)``.

    Raises:
        TypeError: if ``layers`` is not a function, or returns something that is not a transform.
        ValueError: if D is not divisible by ``2^(S - 1)`` (vectors only); if ``dim`` is neither -1 nor -3.

    Example:
        >>> chain = multi_scale(8, num_scales=3, layers=affine_coupling)
        >>> base_shape = chain.inverse_shape(torch.Size([8]))
        >>> flow = Flow(dist.Normal(torch.zeros(base_shape), 1.0).to_event(1), chain)
        >>> flow().sample((5,)).shape, sorted(chain.latents(torch.randn(5, 8)))
        (torch.Size([5, 8]), ['base', 'scale1', 'scale2'])
    """
    input_dim = positive_int(input_dim, "input_dim", "multi_scale")
    num_scales = positive_int(num_scales, "num_scales", "multi_scale")
    if dim not in (-1, -3):
        raise ValueError(f"multi_scale: dim must be -1, for vectors, or -3, for images, but got {dim!r}.")
    if dim == -1 and input_dim % 2 ** (num_scales - 1):
        raise ValueError(
            f"multi_scale halves vectors {num_scales - 1} times, so input_dim must be divisible by "
            f"{2 ** (num_scales - 1)}, but got {input_dim}."
        )
    if isinstance(layers, Transform) or not callable(layers):
        raise TypeError(
            "multi_scale: layers must be a function from the number of elements to the layers of one scale, such as "
            f"affine_coupling, but got {type(layers).__name__}."
        )
    parts: list[Transform] = []
    for i in range(num_scales):
        finer = 2 ** (num_scales - 1 - i)
        width = input_dim // finer if dim == -1 else 4 * input_dim * finer
        if i:
            parts.append(ConcatNoise(noise(width // 2), dim=dim, name=f"scale{i}", input_dim=width // 2))
        parts.append(layers(width))
        if dim == -3:
            parts.append(PixelShuffle(2))
    return Chain(parts)
