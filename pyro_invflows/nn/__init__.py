"""Networks that layers are made of."""

from pyro_invflows.nn.dense import conv_network, dense_network
from pyro_invflows.nn.masked import MaskedLinear, masked_network

__all__ = ["MaskedLinear", "conv_network", "dense_network", "masked_network"]
