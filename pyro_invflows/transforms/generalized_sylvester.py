r"""Generalized Sylvester layers: an autoregressive network in rotated coordinates, and its inverse.

Hoogeboom et al. (2020), *The convolution exponential and generalized Sylvester flows*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_invflows import linalg
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.core.kinds import ContextLayer
from pyro_invflows.networks import masked_network
from pyro_invflows.networks.calling import call_network
from pyro_invflows.networks.dense import default_hidden_dims
from pyro_invflows.solvers import (
    Sweeps,
    finish,
    implicit_gradient,
    solve_tanh,
    tanh_root,
    tanh_slope,
)
from pyro_invflows.solvers.settings import chosen_settings
from pyro_invflows.solvers.solution import in_transform
from pyro_invflows.support.checks import positive_int
from pyro_invflows.support.constants import HoldsConstants
from pyro_invflows.support.precision import at_least_single, full_precision

__all__ = ["GeneralizedSylvester", "conditional_generalized_sylvester", "generalized_sylvester"]

#: Smooth bounds on |log a| and |log d|, as in a coupling.
_LARGEST_LOG_A, _LARGEST_LOG_D = 2.0, 3.0


class GeneralizedSylvester(HoldsConstants, ContextLayer):
    r"""Pushes points by an autoregressive network, in rotated coordinates.

    .. math:: y = x + W^T f(W x), \qquad f_i(v) = \frac{d_i - 1}{a_i} \tanh(a_i v_i + t_i) + u_i,

    where W is orthogonal, and a masked network computes :math:`a_i, d_i > 0`, :math:`t_i` and :math:`u_i` from the
    coordinates of v before i (and from a context). Smooth bounds keep :math:`|\log a_i| < 2` and
    :math:`|\log d_i| < 3`. Invertible because the Jacobian of :math:`v + f(v)` is triangular with the diagonal
    :math:`1 + (d_i - 1) \tanh' > 0`. Choose it where :class:`Sylvester` is not flexible enough.

    **Forward**: one evaluation of the network, and two rotations in compact WY form. **Inverse**: sweeps, each of which
    evaluates the network and solves for every coordinate exactly. At most D are needed, in practice far fewer; a row
    that has converged is left out of the next. First derivatives in reverse mode, by the implicit function theorem
    (second derivatives raise ``NotImplementedError``); with ``order=2``, under ``torch.func`` and while compiling, D
    differentiable sweeps instead, with derivatives of all orders. If the network has large weights, x is
    ill-conditioned: y is reproduced to the tolerance; x may not be. **Log-det**:
    :math:`\sum_i \log(\tanh^2 + d_i (1 - \tanh^2))`, O(D) more. **Identity**: exactly, at initialisation; W is drawn
    with torch's global generator.

    Args:
        input_dim: Size D of an event.
        hidden_dims: Widths of the network's hidden layers; by default two of ``min(max(64, 3 D), 256)``.
        num_reflections: Number k of Householder reflections in W; the default is that of
            :class:`~pyro_invflows.Orthogonal`.
        context_dim: Width of the context that the network also takes (see :class:`~pyro_invflows.Conditional`); while
            the layer is not conditioned, the network receives zeros instead.
        activation: Constructor of the network's activations.
        order: Highest order of derivatives of the inverse, 1 or 2; with 2, the inverse takes D differentiable sweeps.
        solver: Tolerances, the maximum number of sweeps (D by default), and what happens on failure; default
            ``solvers.Sweeps()``.
        atol: Absolute tolerance, if no ``solver`` is given; see :class:`~pyro_invflows.solvers.Settings`.
        rtol: Relative tolerance, likewise.
        max_steps: Maximum number of sweeps, likewise.
        on_failure: What happens to rows that did not converge, likewise.

    Attributes:
        vectors: Reflection vectors of W as rows, a parameter ``(k, D)``.
        hypernet: The masked network, from ``(*B, D + context_dim)`` to log a, log d, t and u before the bounds,
            ``(*B, 4 D)``; its last layer starts at zero.
        context: ``(*B, context_dim)``, a buffer, or None while not conditioned; not part of the ``state_dict``.
        triangle: Constant mask, a buffer; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``; log-det ``(*B,)``.

    Raises:
        ValueError: if an event does not have the size D, or ``order`` is neither 1 nor 2.
        ConvergenceError: in the inverse, if rounding keeps a row above the tolerance. A y that is not finite gives
            NaN.

    References:
        Hoogeboom et al. (2020), Eqs. 9-11, where :math:`\gamma s_1 s_2 = d - 1` lies in (-1, 1); here it lies in
        (-0.95, 19).

    Example:
        >>> layer = GeneralizedSylvester(3)
        >>> _ = torch.nn.init.normal_(layer.hypernet[-1].weight, std=0.1)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    input_dim: int
    triangle: Tensor

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        num_reflections: int | None = None,
        context_dim: int = 0,
        activation: Callable[[], nn.Module] = nn.Tanh,
        order: int = 1,
        solver: Sweeps | None = None,
        atol: float | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        on_failure: str | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, context_dim=context_dim, cache_size=cache_size)
        input_dim = self.input_dim
        owner = "GeneralizedSylvester"
        if order not in (1, 2):
            raise ValueError(f"{owner}: order must be 1 or 2, but got {order!r}.")
        self.order = order
        k = input_dim - input_dim % 2 if num_reflections is None else num_reflections
        self.num_reflections = positive_int(k, "num_reflections", owner, minimum=0)
        self.solver = chosen_settings(
            Sweeps(), solver, owner, atol=atol, rtol=rtol, max_steps=max_steps, on_failure=on_failure
        )
        self.vectors = nn.Parameter(torch.empty(k, input_dim))
        hidden = default_hidden_dims(max(64, 3 * input_dim)) if hidden_dims is None else hidden_dims
        self.hypernet = masked_network(
            input_dim, hidden, 4, context_dim=context_dim, activation=activation, zero_output=True
        )
        self._draw_reflections()

    def _constants(self, like: Tensor) -> dict[str, Tensor]:
        return {"triangle": linalg.triangle_mask(self.num_reflections, like)}

    def reset_parameters(self) -> None:
        """Reset the network, so that the layer is the identity; draw W."""
        super().reset_parameters()
        self._draw_reflections()

    def _draw_reflections(self) -> None:
        self.fill_constants()
        nn.init.normal_(self.vectors, std=self.input_dim**-0.5)

    def _coefficients(self, v: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log a, d, t and u at v, each (*batch, D); if v holds only some of the rows, pass their context."""
        v = torch.cat([v, *context], dim=-1) if context else self.with_context(v)
        log_a, log_d, t, u = call_network(self.hypernet, v, owner="GeneralizedSylvester").chunk(4, dim=-1)
        log_a = _LARGEST_LOG_A * torch.tanh(log_a / _LARGEST_LOG_A)
        return log_a, (_LARGEST_LOG_D * torch.tanh(log_d / _LARGEST_LOG_D)).exp(), t, u

    @staticmethod
    def _push(v: Tensor, log_a: Tensor, d: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(v), and the value of the tanh in it."""
        h = torch.tanh(log_a.exp() * v + t)
        return (d - 1) * (-log_a).exp() * h + u, h

    @staticmethod
    def _pull(q: Tensor, log_a: Tensor, t: Tensor) -> Tensor:
        return (q - t) * (-log_a).exp()

    @staticmethod
    def _target(z: Tensor, log_a: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Return the right-hand sides c of the scalar equations ``q + (d - 1) tanh q = c``, where ``q = a v + t``."""
        return log_a.exp() * (z - u) + t

    def _rotate(self, x: Tensor, transpose: bool = False) -> Tensor:
        return linalg.householder_product(self.vectors, x, mask=self.triangle, transpose=transpose)

    @at_least_single
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        v = self._rotate(x, transpose=True)
        log_a, d, t, u = self._coefficients(v)
        push, h = self._push(v, log_a, d, t, u)
        return x + self._rotate(push), (h, d)

    @full_precision
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        z = self._rotate(y, transpose=True)
        if self.context_dim:
            z = z.expand(*self.context_of(z).shape[:-1], self.input_dim)
        if in_transform(z) or (self.order == 2 and torch.is_grad_enabled()):
            v = self._sweep_with_graph(z)
        else:
            with torch.no_grad():
                v = self._solve(z.detach())

            def residual(v: Tensor) -> Tensor:
                return v + self._push(v, *self._coefficients(v))[0] - z

            def diagonal(v: Tensor) -> Tensor:
                coefficients = self._coefficients(v)
                return tanh_slope(self._push(v, *coefficients)[1], coefficients[1])

            v = implicit_gradient(
                residual, v, structure="autoregressive", diagonal=diagonal, owner="GeneralizedSylvester"
            )
        coefficients = self._coefficients(v)
        push, h = self._push(v, *coefficients)
        return y - self._rotate(push), (h, coefficients[1])

    def _solve(self, z: Tensor) -> Tensor:
        """Sweep until every row meets the tolerance, relative to the size of the terms of f."""
        arguments: tuple[Tensor, ...] = (z, self.context_of(z)) if self.context_dim else (z,)

        def relative(v: Tensor, z: Tensor, state: tuple[Tensor, ...]) -> Tensor:
            log_a, d, _, u = state
            return (v + self._push(v, *state)[0] - z) / (1 + (d - 1).abs() * (-log_a).exp() + u.abs())

        def residual(v: Tensor, z: Tensor, *context: Tensor) -> Tensor:
            return relative(v, z, self._coefficients(v, *context))

        def sweep(_: Any, v: Tensor, r: Tensor, state: Any, arguments: Any, seeking: Any) -> tuple[Tensor, Tensor, Any]:
            z, *context = arguments
            log_a, d, t, u = state
            v = self._pull(solve_tanh(self._target(z, log_a, t, u), d).value, log_a, t)
            state = self._coefficients(v, *context)  # at the new point; the next sweep uses them again
            return v, relative(v, z, state), state

        state = self._coefficients(z, *arguments[1:])
        solution = self.solver(residual, z, *arguments, sweep=sweep, state=state, scale=z)
        return finish(solution, "GeneralizedSylvester", self.solver, given=z)

    def _sweep_with_graph(self, z: Tensor) -> Tensor:
        """Take all D sweeps, which gives the exact solution with exact derivatives."""
        v = z
        for _ in range(self.input_dim):
            log_a, d, t, u = self._coefficients(v)
            v = self._pull(tanh_root(self._target(z, log_a, t, u), d, owner="GeneralizedSylvester"), log_a, t)
        return v

    @at_least_single
    def _log_det(self, x: Tensor, y: Tensor, aux: tuple[Tensor, Tensor]) -> Tensor:
        return tanh_slope(*aux).log().sum(-1)

    def extra_repr(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{self.input_dim}, num_reflections={self.num_reflections}{context}"


def generalized_sylvester(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    num_reflections: int | None = None,
    context_dim: int = 0,
    activation: Callable[[], nn.Module] = nn.Tanh,
    order: int = 1,
    solver: Sweeps | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
    on_failure: str | None = None,
) -> GeneralizedSylvester:
    """Build a :class:`GeneralizedSylvester`; the arguments are those of the class."""
    return GeneralizedSylvester(
        input_dim,
        hidden_dims,
        num_reflections=num_reflections,
        context_dim=context_dim,
        activation=activation,
        order=order,
        solver=solver,
        atol=atol,
        rtol=rtol,
        max_steps=max_steps,
        on_failure=on_failure,
    )


conditional_generalized_sylvester = conditional_factory(
    generalized_sylvester, "its network also reads a context, from which a hypernetwork sets its rotation"
)
