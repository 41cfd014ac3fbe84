"""Masked autoregressive networks: output i sees only the inputs before i.

Germain et al. (2015), *MADE: Masked autoencoder for distribution estimation*, Eqs. 8 to 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invflows.support.checks import activation_constructor, widths

__all__ = ["MaskedLinear", "masked_network"]


class MaskedLinear(nn.Linear):
    """A linear layer some of whose weights are fixed at zero.

    Args:
        mask: ``(out_features, in_features)``, True where a weight may differ from zero.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def masked_network(
    input_dim: int,
    hidden_dims: Sequence[int],
    num_outputs: int,
    *,
    context_dim: int = 0,
    activation: Callable[[], nn.Module] = nn.Tanh,
    zero_output: bool = False,
) -> nn.Sequential:
    """Build an autoregressive network: its outputs for coordinate i depend on the inputs before i, and the context.

    Args:
        input_dim: D; for 1 the outputs depend on the context only.
        hidden_dims: Widths of the hidden layers; 0 is no unit at all, and leaves constants.
        num_outputs: Outputs for each coordinate.
        context_dim: Width of a context that stands behind the inputs and that every output may see.
        activation: Constructor of the activation between the layers.
        zero_output: Start with an output that is exactly zero for every input.

    Returns:
        ``nn.Sequential``, ``(*B, D + context_dim) -> (*B, num_outputs * D)``; the first D outputs belong to the
        coordinates 1 to D, the next D again, and so on.
    """
    inputs = torch.cat([torch.arange(1, input_dim + 1), torch.zeros(context_dim, dtype=torch.long)])
    degrees = [inputs]
    activation_constructor(activation, "masked_network")
    # A unit of degree k sees the inputs up to k; those of degree 0 see the context only.
    lowest = 0 if context_dim or input_dim == 1 else 1
    for width in widths(hidden_dims, "masked_network"):
        spread = torch.arange(width) % max(input_dim - lowest, 1) + lowest
        # a width of zero becomes one unit that sees nothing: torch has no use for empty layers
        degrees.append(spread.clamp_max(input_dim - 1) if width else torch.tensor([-1]))
    outputs = torch.arange(1, input_dim + 1).repeat(num_outputs) - 1
    layers: list[nn.Module] = []
    for i, (source, target) in enumerate(pairwise([*degrees, outputs])):
        if i:
            layers.append(activation())
        mask = target.unsqueeze(-1) >= source
        layers.append(MaskedLinear(mask))
    if zero_output:
        with torch.no_grad():
            for parameter in layers[-1].parameters():
                parameter.zero_()
    return nn.Sequential(*layers)
