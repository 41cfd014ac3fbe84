"""Networks used inside layers: dense, convolutional, masked autoregressive, and contractive."""

from pyro_invflows.networks.activations import LipSwish, Sine, value_and_slope
from pyro_invflows.networks.bounds import lipschitz_bound
from pyro_invflows.networks.contraction import (
    ContractiveMLP,
    Conv2dContraction,
    LinearContraction,
    contractive_conv_network,
    held_weights,
)
from pyro_invflows.networks.dense import conv_network, dense_network
from pyro_invflows.networks.linearisation import Linearisation, linearise
from pyro_invflows.networks.masked import MaskedLinear, masked_network

__all__ = [
    "ContractiveMLP",
    "Conv2dContraction",
    "LinearContraction",
    "Linearisation",
    "LipSwish",
    "MaskedLinear",
    "Sine",
    "contractive_conv_network",
    "conv_network",
    "dense_network",
    "held_weights",
    "linearise",
    "lipschitz_bound",
    "masked_network",
    "value_and_slope",
]
