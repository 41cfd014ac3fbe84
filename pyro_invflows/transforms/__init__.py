"""The layers, one family a file."""

from pyro_invflows.transforms.activations import (
    ELU,
    SELU,
    Baird,
    Interval,
    LeakyReLU,
    PReLU,
    Sigmoid,
    Tanh,
    baird,
    elu,
    interval,
    leaky_relu,
    prelu,
    selu,
    sigmoid,
    tanh,
)
from pyro_invflows.transforms.coupling import AffineCoupling, affine_coupling
from pyro_invflows.transforms.linear import (
    Diagonal,
    Orthogonal,
    Shift,
    SVDLinear,
    diagonal,
    orthogonal,
    shift,
    svd_linear,
)
from pyro_invflows.transforms.shape import Permute, PixelShuffle, permute, pixel_shuffle
