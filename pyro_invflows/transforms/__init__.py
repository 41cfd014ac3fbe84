"""The layers, one family per file."""

from pyro_invflows.transforms.activations import (
    Baird,
    LeakyReLU,
    PReLU,
    baird,
    conditional_baird,
    conditional_prelu,
    leaky_relu,
    prelu,
)
from pyro_invflows.transforms.actnorm import ActNorm, act_norm, conditional_act_norm
from pyro_invflows.transforms.affine_autoregressive import (
    AffineAutoregressive,
    affine_autoregressive,
    conditional_affine_autoregressive,
)
from pyro_invflows.transforms.affine_coupling import AffineCoupling, affine_coupling, conditional_affine_coupling
from pyro_invflows.transforms.autoregressive import Autoregressive
from pyro_invflows.transforms.bounded import ELU, SELU, Interval, Sigmoid, Tanh, elu, interval, selu, sigmoid, tanh
from pyro_invflows.transforms.contractive_residual import (
    ContractiveResidual,
    conditional_contractive_residual,
    contractive_residual,
)
from pyro_invflows.transforms.coupling import Coupling
from pyro_invflows.transforms.diagonal import Diagonal, Shift, conditional_diagonal, conditional_shift, diagonal, shift
from pyro_invflows.transforms.generalized_sylvester import (
    GeneralizedSylvester,
    conditional_generalized_sylvester,
    generalized_sylvester,
)
from pyro_invflows.transforms.linear import (
    Orthogonal,
    SVDLinear,
    conditional_orthogonal,
    conditional_svd_linear,
    orthogonal,
    svd_linear,
)
from pyro_invflows.transforms.low_rank_residual import (
    LowRankResidual,
    conditional_low_rank_residual,
    iresnet,
    low_rank_residual,
)
from pyro_invflows.transforms.lowrank import LowRankLinear, conditional_low_rank_linear, low_rank_linear
from pyro_invflows.transforms.lu import LULinear, conditional_lu_linear, lu_linear
from pyro_invflows.transforms.monotone import (
    Monotone,
    SinhArcsinh,
    Spline,
    conditional_sinh_arcsinh,
    conditional_spline,
    sinh_arcsinh,
    spline,
)
from pyro_invflows.transforms.multi_scale import multi_scale
from pyro_invflows.transforms.noise import ConcatNoise, Slice, inject_noise, whitened_noise
from pyro_invflows.transforms.numerical import NumericalInverse, numerical_inverse
from pyro_invflows.transforms.planar import Planar, Radial, conditional_planar, conditional_radial, planar, radial
from pyro_invflows.transforms.shape import (
    Permute,
    PixelShuffle,
    permute,
    pixel_shuffle,
)
from pyro_invflows.transforms.spline_autoregressive import (
    SplineAutoregressive,
    conditional_spline_autoregressive,
    spline_autoregressive,
)
from pyro_invflows.transforms.spline_coupling import SplineCoupling, conditional_spline_coupling, spline_coupling
from pyro_invflows.transforms.sylvester import Sylvester, conditional_sylvester, sylvester
from pyro_invflows.transforms.whitening import Whitening, whitening

__all__ = [
    "ELU",
    "SELU",
    "ActNorm",
    "AffineAutoregressive",
    "AffineCoupling",
    "Autoregressive",
    "Baird",
    "ConcatNoise",
    "ContractiveResidual",
    "Coupling",
    "Diagonal",
    "GeneralizedSylvester",
    "Interval",
    "LULinear",
    "LeakyReLU",
    "LowRankLinear",
    "LowRankResidual",
    "Monotone",
    "NumericalInverse",
    "Orthogonal",
    "PReLU",
    "Permute",
    "PixelShuffle",
    "Planar",
    "Radial",
    "SVDLinear",
    "Shift",
    "Sigmoid",
    "SinhArcsinh",
    "Slice",
    "Spline",
    "SplineAutoregressive",
    "SplineCoupling",
    "Sylvester",
    "Tanh",
    "Whitening",
    "act_norm",
    "affine_autoregressive",
    "affine_coupling",
    "baird",
    "conditional_act_norm",
    "conditional_affine_autoregressive",
    "conditional_affine_coupling",
    "conditional_baird",
    "conditional_contractive_residual",
    "conditional_diagonal",
    "conditional_generalized_sylvester",
    "conditional_low_rank_linear",
    "conditional_low_rank_residual",
    "conditional_lu_linear",
    "conditional_orthogonal",
    "conditional_planar",
    "conditional_prelu",
    "conditional_radial",
    "conditional_shift",
    "conditional_sinh_arcsinh",
    "conditional_spline",
    "conditional_spline_autoregressive",
    "conditional_spline_coupling",
    "conditional_svd_linear",
    "conditional_sylvester",
    "contractive_residual",
    "diagonal",
    "elu",
    "generalized_sylvester",
    "inject_noise",
    "interval",
    "iresnet",
    "leaky_relu",
    "low_rank_linear",
    "low_rank_residual",
    "lu_linear",
    "multi_scale",
    "numerical_inverse",
    "orthogonal",
    "permute",
    "pixel_shuffle",
    "planar",
    "prelu",
    "radial",
    "selu",
    "shift",
    "sigmoid",
    "sinh_arcsinh",
    "spline",
    "spline_autoregressive",
    "spline_coupling",
    "svd_linear",
    "sylvester",
    "tanh",
    "whitened_noise",
    "whitening",
]
