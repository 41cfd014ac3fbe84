"""Plain networks for couplings and hypernetworks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from pyro_invflows.networks.network import Network
from pyro_invflows.support.checks import activation_constructor, is_int, positive_int, widths

__all__ = ["conv_network", "default_hidden_dims", "dense_network"]

#: Largest width that is chosen by default: two such layers have 65 000 weights between them.
_LARGEST_DEFAULT_WIDTH = 256


def default_hidden_dims(width: int) -> list[int]:
    """Return the widths of two hidden layers: ``width``, but at most 256."""
    return [min(width, _LARGEST_DEFAULT_WIDTH)] * 2


def dense_network(
    in_features: int,
    hidden_dims: Sequence[int],
    out_features: int,
    *,
    activation: Callable[[], nn.Module] = nn.ReLU,
    zero_output: bool = False,
) -> nn.Sequential:
    """Build a multi-layer perceptron.

    Args:
        in_features: Width of the input; 0 is allowed and makes the network a constant.
        hidden_dims: Widths of the hidden layers.
        out_features: Width of the output.
        activation: Constructor of the activation between the layers.
        zero_output: Initialise the last layer with zeros, so that the output is zero for every input.

    Returns:
        ``nn.Sequential`` of linear layers and activations, ``(*B, in_features) -> (*B, out_features)``.
    """
    activation_constructor(activation, "dense_network")
    in_features = positive_int(in_features, "in_features", "dense_network", minimum=0)
    out_features = positive_int(out_features, "out_features", "dense_network", minimum=0)
    sizes = [in_features, *widths(hidden_dims, "dense_network"), out_features]
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(pairwise(sizes)):
        if i:
            layers.append(activation())
        if n:
            layers.append(nn.Linear(n, m))
        else:
            layers.append(_Constant(m))
    return Network(*layers, zero_output=zero_output)


def conv_network(
    in_channels: int,
    hidden_channels: Sequence[int],
    out_channels: int,
    *,
    spatial_dims: int = 2,
    activation: Callable[[], nn.Module] = nn.ReLU,
    zero_output: bool = False,
) -> nn.Sequential:
    """Build a small convolutional network that keeps the resolution, with kernels of width 3, 1, ..., 1, 3.

    Args:
        in_channels: Channels of the input.
        hidden_channels: Channels of the hidden layers.
        out_channels: Channels of the output.
        spatial_dims: Number of spatial dimensions: 1, 2 or 3.
        activation: Constructor of the activation between the layers.
        zero_output: Initialise the last layer with zeros, so that the output is zero for every input.

    Returns:
        ``nn.Sequential``, ``(N, in_channels, *spatial) -> (N, out_channels, *spatial)``.

    Raises:
        ValueError: if there is no convolution for ``spatial_dims``.
    """
    convolutions: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    if not is_int(spatial_dims) or int(spatial_dims) not in convolutions:
        raise ValueError(f"conv_network: spatial_dims must be 1, 2 or 3, but got {spatial_dims!r}.")
    activation_constructor(activation, "conv_network")
    in_channels = positive_int(in_channels, "in_channels", "conv_network")
    out_channels = positive_int(out_channels, "out_channels", "conv_network")
    sizes = [in_channels, *widths(hidden_channels, "conv_network", "hidden_channels"), out_channels]
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(pairwise(sizes)):
        if i:
            layers.append(activation())
        width = 3 if i in (0, len(sizes) - 2) else 1
        layers.append(convolutions[int(spatial_dims)](n, m, width, padding=width // 2))
    return Network(*layers, zero_output=zero_output)


class _Constant(nn.Linear):
    """A linear layer whose input has no elements."""

    def __init__(self, out_features: int) -> None:
        super().__init__(0, out_features)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.bias, -1, 1)  # nn.Linear's would warn, and has no fan-in to scale by
