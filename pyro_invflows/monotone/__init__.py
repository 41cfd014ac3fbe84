"""Increasing functions of one variable, their parameters given as tensors.

Tensors only: nothing here knows a layer. :class:`~pyro_invflows.Monotone` makes one of such a function and learned
constants.
"""

from pyro_invflows.monotone.affine import Additive, Affine
from pyro_invflows.monotone.base import MonotoneFunction, evaluate
from pyro_invflows.monotone.mixture import MixtureCDF
from pyro_invflows.monotone.sinh_arcsinh import SinhArcsinh
from pyro_invflows.monotone.spline import CircularSpline, RationalQuadraticSpline
from pyro_invflows.monotone.tanh_bump import TanhBump

__all__ = [
    "Additive",
    "Affine",
    "CircularSpline",
    "MixtureCDF",
    "MonotoneFunction",
    "RationalQuadraticSpline",
    "SinhArcsinh",
    "TanhBump",
    "evaluate",
]
