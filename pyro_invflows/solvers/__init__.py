"""Root finders and implicit gradients: functions of tensors and callables, independent of any transform."""

from pyro_invflows.solvers.bracketed import bracketed_newton
from pyro_invflows.solvers.implicit import implicit_gradient
from pyro_invflows.solvers.iterative import Anderson, FixedPoint, Newton, Sweeps, dense_jacobian
from pyro_invflows.solvers.rows import iterate
from pyro_invflows.solvers.scalar import Bisection
from pyro_invflows.solvers.settings import Settings
from pyro_invflows.solvers.solution import Solution, Status, finish
from pyro_invflows.solvers.tanh import plain_tanh_root, solve_tanh, tanh_root, tanh_slope
from pyro_invflows.solvers.triangular_tanh import solve_triangular_tanh, triangular_tanh_root

__all__ = [
    "Anderson",
    "Bisection",
    "FixedPoint",
    "Newton",
    "Settings",
    "Solution",
    "Status",
    "Sweeps",
    "bracketed_newton",
    "dense_jacobian",
    "finish",
    "implicit_gradient",
    "iterate",
    "plain_tanh_root",
    "solve_tanh",
    "solve_triangular_tanh",
    "tanh_root",
    "tanh_slope",
    "triangular_tanh_root",
]
