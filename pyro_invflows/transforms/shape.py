"""Layers that only rearrange elements: permutations and pixel shuffles. Both preserve volume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_invflows.core.events import event_constraint
from pyro_invflows.core.kinds import VolumePreserving
from pyro_invflows.core.path_gradient import linear_path_gradient
from pyro_invflows.support.checks import positive_int

__all__ = ["Permute", "PixelShuffle", "permute", "pixel_shuffle"]


class Permute(VolumePreserving):
    r"""Reorders the elements along one axis.

    .. math:: y_i = x_{\pi(i)}.

    Invertible because a permutation is. Choose it between couplings, so that every element is transformed in turn.

    **Forward**: one gather, O(D), without rounding. **Inverse**: the same, after sorting D integers. **Log-det**: 0.
    **Identity**: only for the identity permutation.

    Args:
        permutation: :math:`\pi`, with each of 0, ..., D - 1 exactly once.
        dim: Axis that is permuted: -1 for vectors, -3 for the channels of images.

    Attributes:
        permutation: :math:`\pi`, a buffer ``(D,)`` of integers. It alone determines the layer.

    Shape:
        ``(*B, D) -> (*B, D)``; with ``dim=-3``, ``(*B, D, H, W) -> (*B, D, H, W)``; log-det ``(*B,)``.

    Raises:
        ValueError: if it is not a permutation, or an event does not have the size D along ``dim``.

    Differs from Pyro's ``Permute``: it is a module, so that the permutation moves with ``.to()`` and is saved in the
    ``state_dict``.

    Example:
        >>> layer = Permute([2, 0, 1])
        >>> x = torch.randn(5, 3)
        >>> torch.equal(layer.inv(layer(x).clone()), x)
        True
    """

    permutation: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor, *, dim: int = -1, cache_size: int = 1) -> None:
        try:
            index = torch.as_tensor(permutation)
        except (TypeError, ValueError, RuntimeError):  # any of these, if they are not numbers
            index = torch.empty(())
        if index.dim() != 1 or index.is_floating_point() or index.is_complex() or not index.numel():
            raise ValueError(
                f"Permute: the permutation must be a non-empty one-dimensional sequence of ints, but got "
                f"{permutation!r}."
            )
        index = index.detach().to(torch.long).clone()
        # on the meta device there are no values to check yet: they are loaded later
        if not index.is_meta and not torch.equal(index.sort().values, torch.arange(len(index), device=index.device)):
            raise ValueError(
                f"Permute: the permutation must hold each of 0, ..., {len(index) - 1} exactly once, but got "
                f"{index.tolist()}. torch.randperm(n) draws one."
            )
        super().__init__(len(index), dim=dim, cache_size=cache_size)
        self.register_buffer("permutation", index)

    def _function(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.permutation)

    def _inverse_function(self, y: Tensor) -> Tensor:
        # sorted in each call: a second buffer could contradict the first, and a sort is faster than a gather
        return y.index_select(self.dim, self.permutation.argsort())

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        move = self._inverse_function if inverse else self._function
        return linear_path_gradient(self, value, inverse, lambda: move(gradient))


class PixelShuffle(VolumePreserving):
    r"""Trades channels for resolution.

    .. math:: y_{c,\,rh+i,\,rw+j} = x_{cr^2 + ir + j,\,h,\,w}, \qquad 0 \le i, j < r.

    Invertible because it only rearranges elements. Choose it (or its ``.inv``, which squeezes pixels into channels) to
    change the resolution in image flows.

    **Forward**, **Inverse**: one copy, O(C r^2 H W), without rounding. **Log-det**: 0. **Identity**: if r = 1.

    Args:
        upscale_factor: Factor r by which height and width grow.

    Shape:
        ``(*B, C r^2, H, W) -> (*B, C, r H, r W)``; log-det ``(*B,)``. The event dimension is 3.

    Raises:
        ValueError: if the channels are not divisible by r^2; in the inverse, if height or width is not divisible by r.

    References:
        Shi et al. (2016), *Real-time single image and video super-resolution using an efficient sub-pixel
        convolutional neural network*, Eq. 4.

    Example:
        >>> layer = PixelShuffle(2)
        >>> x = torch.randn(5, 8, 3, 3)
        >>> layer(x).shape, torch.equal(layer.inv(layer(x).clone()), x)
        (torch.Size([5, 2, 6, 6]), True)
    """

    domain = codomain = event_constraint(3)

    def __init__(self, upscale_factor: int, *, cache_size: int = 1) -> None:
        super().__init__(dim=-3, cache_size=cache_size)
        self.upscale_factor = positive_int(upscale_factor, "upscale_factor", "PixelShuffle")

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        r = self.upscale_factor
        sizes = dict(sizes)
        divisors = {-2: r, -1: r} if inverse else {-3: r * r}
        factors = {-3: r * r} if inverse else {-2: r, -1: r}
        for axis, divisor in divisors.items():
            if axis in sizes:
                if sizes[axis] % divisor:
                    what = "height and width" if inverse else "the channels"
                    power = "r" if inverse else "r^2"
                    raise ValueError(
                        f"PixelShuffle({r}): {what} must be divisible by {power} = {divisor}, but got {sizes[axis]} "
                        f"elements along dim {axis}."
                    )
                sizes[axis] //= divisor
        for axis, factor in factors.items():
            if axis in sizes:
                sizes[axis] *= factor
        return sizes

    def _check(self, value: Tensor, inverse: bool) -> None:
        super()._check(value, inverse)
        self.check_event(value.shape, inverse)

    # Written out, because torch's pixel_unshuffle returns an empty batch in the shape of its input.
    def _function(self, x: Tensor) -> Tensor:
        r = self.upscale_factor
        *batch, c, h, w = x.shape
        blocks = x.reshape(*batch, c // (r * r), r, r, h, w)  # (*B, C, i, j, H, W)
        return blocks.movedim((-4, -3), (-3, -1)).reshape(*batch, c // (r * r), r * h, r * w)

    def _inverse_function(self, y: Tensor) -> Tensor:
        r = self.upscale_factor
        *batch, c, h, w = y.shape
        blocks = y.reshape(*batch, c, h // r, r, w // r, r)  # (*B, C, H, i, W, j)
        return blocks.movedim((-3, -1), (-4, -3)).reshape(*batch, c * r * r, h // r, w // r)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        move = self._inverse_function if inverse else self._function
        return linear_path_gradient(self, value, inverse, lambda: move(gradient))

    def extra_repr(self) -> str:
        return str(self.upscale_factor)


def permute(
    input_dim: int,
    *,
    permutation: Sequence[int] | Tensor | None = None,
    dim: int = -1,
    generator: torch.Generator | None = None,
) -> Permute:
    """Build a :class:`Permute`, at random unless a permutation is given.

    Args:
        input_dim: Size of the permuted axis.
        permutation: The permutation; by default it is drawn uniformly.
        dim: Axis that is permuted.
        generator: Generator of the draw; default torch's global one.

    Raises:
        ValueError: if the permutation has another size.
    """
    input_dim = positive_int(input_dim, "input_dim", "permute")
    if permutation is None:
        permutation = torch.randperm(input_dim, generator=generator)
    layer = Permute(permutation, dim=dim)
    if layer.input_dim != input_dim:
        raise ValueError(f"permute: the permutation must have {input_dim} elements, but got {layer.input_dim}.")
    return layer


def pixel_shuffle(input_dim: int | None = None, *, upscale_factor: int = 2) -> PixelShuffle:
    """Build a :class:`PixelShuffle`.

    Args:
        input_dim: Number of channels, if it is to be checked.
        upscale_factor: As in :class:`PixelShuffle`.

    Raises:
        ValueError: if ``input_dim`` is not divisible by ``upscale_factor**2``.
    """
    layer = PixelShuffle(upscale_factor)
    if input_dim is not None:
        layer.trace_event({-3: positive_int(input_dim, "input_dim", "pixel_shuffle")})
    return layer
