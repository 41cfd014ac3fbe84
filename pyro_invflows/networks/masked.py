"""Masked autoregressive networks: the outputs for a coordinate see only the coordinates before it.

Germain et al. (2015), *MADE: Masked autoencoder for distribution estimation*, Eqs. 8 to 13. The hidden units are sorted
by degree, so that the units that a coordinate needs are the first ones of every layer, a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invflows.networks.network import Network
from pyro_invflows.support.checks import activation_constructor, positive_int, widths
from pyro_invflows.support.constants import HoldsConstants

__all__ = ["MaskedLinear", "masked_network"]


class MaskedLinear(HoldsConstants, nn.Linear):
    """A linear layer with masked weights: each output depends only on the inputs of at most its own degree.

    Args:
        sources: Degree of each of the m inputs.
        targets: Degree of each of the n outputs.

    Attributes:
        weight: ``(n, m)``; entry ``[i, j]`` counts only if ``sources[j] <= targets[i]``.
        bias: ``(n,)``.
        mask: ``(n, m)``, ones and zeros; a constant, not part of the ``state_dict``.

    Shape:
        ``(*B, m) -> (*B, n)``.
    """

    mask: Tensor

    def __init__(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        # as numbers, because a tensor could be lost, as the mask can; first, because nn.Linear() resets parameters
        self.sources, self.targets = tuple(sources), tuple(targets)
        super().__init__(len(self.sources), len(self.targets))

    def _constants(self, like: Tensor) -> dict[str, Tensor]:
        sources, targets = (torch.tensor(degrees, device=like.device) for degrees in (self.sources, self.targets))
        return {"mask": (targets.unsqueeze(-1) >= sources).to(like.dtype)}

    def reset_parameters(self) -> None:
        """Draw the weights as ``nn.Linear`` does."""
        super().reset_parameters()
        self.fill_constants()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def masked_network(
    input_dim: int,
    hidden_dims: Sequence[int],
    num_outputs: int,
    *,
    context_dim: int = 0,
    ordering: Sequence[int] | None = None,
    activation: Callable[[], nn.Module] = nn.Tanh,
    zero_output: bool = False,
) -> nn.Sequential:
    """Build an autoregressive network: its outputs for a coordinate depend on those before it and on the context.

    Args:
        input_dim: Number D of coordinates; if it is 1, the outputs depend on the context only.
        hidden_dims: Widths of the hidden layers; a layer of width 0 passes nothing on, and the outputs are constant.
        num_outputs: Number of outputs for each coordinate.
        context_dim: Width of a context that is appended to the inputs; every output may depend on it.
        ordering: The coordinates (0 to D - 1) in the order of dependence; the first one depends on no other. By
            default their own order.
        activation: Constructor of the activation between the layers.
        zero_output: Initialise the last layer with zeros, so that the output is zero for every input.

    Returns:
        ``nn.Sequential``, ``(*B, D + context_dim) -> (*B, num_outputs * D)``; the first D outputs belong to the D
        coordinates, in their own order, the next D again, and so on: a view of ``(*B, num_outputs, D)``.

    Raises:
        ValueError: if ``ordering`` is not a permutation of the coordinates.
    """
    input_dim = positive_int(input_dim, "input_dim", "masked_network")
    num_outputs = positive_int(num_outputs, "num_outputs", "masked_network")
    context_dim = positive_int(context_dim, "context_dim", "masked_network", minimum=0)
    places = _places(ordering, input_dim)
    degrees = [[*(place + 1 for place in places), *[0] * context_dim]]
    activation_constructor(activation, "masked_network")
    # A unit of degree k sees the inputs up to k; a unit of degree 0 sees the context only.
    lowest = 0 if context_dim or input_dim == 1 else 1
    for width in widths(hidden_dims, "masked_network"):
        count = max(input_dim - lowest, 1)  # number of degrees; a layer with fewer units skips some, evenly
        spread = [k % count if width >= count else k * count // width for k in range(width)]
        spread = [min(k + lowest, input_dim - 1) for k in spread]
        degrees.append(
            sorted(spread) or [-1]
        )  # for a width of 0, one unit that sees nothing: torch has no empty layers
    degrees.append(places * num_outputs)
    layers: list[nn.Module] = []
    for i, (sources, targets) in enumerate(pairwise(degrees)):
        if i:
            layers.append(activation())
        layers.append(MaskedLinear(sources, targets))
    return Network(*layers, zero_output=zero_output)


def _places(ordering: Sequence[int] | None, input_dim: int) -> list[int]:
    """Return the place of each coordinate in an ordering."""
    order = list(range(input_dim)) if ordering is None else [int(i) for i in ordering]
    if sorted(order) != list(range(input_dim)):
        raise ValueError(
            f"masked_network: ordering must hold each of the coordinates 0 to {input_dim - 1} once, but got {order}."
        )
    places = [0] * input_dim
    for place, coordinate in enumerate(order):
        places[coordinate] = place
    return places
