"""Networks that layers are made of."""

from pyro_invflows.nn.dense import conv_network, dense_network

__all__ = ["conv_network", "dense_network"]
