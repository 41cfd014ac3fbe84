r"""Autoregressive layers: each coordinate is transformed by a function whose parameters depend on those before it.

Kingma et al. (2016), *Improving variational inference with inverse autoregressive flow*; Papamakarios et al. (2017),
*Masked autoregressive flow for density estimation*; Durkan et al. (2019), *Neural spline flows*, for splines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_invflows.core.kinds import ContextLayer
from pyro_invflows.core.path_gradient import derivative, tracked
from pyro_invflows.monotone import MonotoneFunction, evaluate
from pyro_invflows.networks import masked_network
from pyro_invflows.networks.calling import call_network
from pyro_invflows.networks.coordinatewise import (
    MaskedLayers,
    masked_layers,
    solve_by_coordinates,
    transposed_solver,
)
from pyro_invflows.networks.dense import default_hidden_dims
from pyro_invflows.solvers import Sweeps, finish, implicit_gradient
from pyro_invflows.solvers.settings import chosen_settings
from pyro_invflows.solvers.solution import in_transform, row_max
from pyro_invflows.support.checks import described, positive_int
from pyro_invflows.support.precision import at_least_single, full_precision

__all__ = ["Autoregressive", "autoregressive_network"]


class Autoregressive(ContextLayer):
    r"""Transforms each coordinate by an increasing function whose parameters depend on the coordinates before it.

    .. math:: y_i = f(x_i; \theta_i(x_{<i})),

    where f is a function of :mod:`pyro_invflows.monotone` and :math:`\theta` a masked network, which may also read a
    context. Invertible for any network, because the Jacobian is triangular, with the positive slopes of f on its
    diagonal. Choose it if couplings are not flexible enough: every coordinate depends on all the preceding ones, and
    both directions remain cheap.

    **Forward**: one evaluation of the network; derivatives of all orders that the network and f have. **Inverse**:
    exact, one coordinate at a time; each hidden unit of a :func:`~pyro_invflows.networks.masked_network` is computed
    only once, so all products together cost as much as one evaluation. The residual in y is checked; rows whose
    rounding error exceeds the tolerance are refined by sweeps. First derivatives in reverse mode by one triangular
    solve, from the last coordinate to the first; second ones raise ``NotImplementedError``. Under ``torch.func`` and
    while compiling, D sweeps with a graph, with derivatives of all orders. Other networks are inverted by at most D
    sweeps. **Log-det**: the sum of the log-slopes, from the same evaluation. **Identity**: if the network's output is
    zero, as in layers newly built by :func:`affine_autoregressive` and :func:`spline_autoregressive`.

    Args:
        function: f, such as ``pyro_invflows.monotone.MixtureCDF()``.
        hypernet: Network from x (followed by the context) to the P parameters of each of the D coordinates,
            ``(*B, P * D)``: the first parameter of all coordinates first. Those of a coordinate must depend only on the
            coordinates before it, in some order; :func:`~pyro_invflows.networks.masked_network` builds such networks,
            with ``num_outputs=function.num_parameters``. The layer cannot check this for other networks. It must not
            write to its input; one that begins with a module with ``inplace=True`` receives a copy.
        context_dim: Width of the context that the network also takes (see :class:`~pyro_invflows.Conditional`); while
            the layer is not conditioned, the network receives zeros instead.
        input_dim: Size D of an event, if it is to be checked; not needed for networks from ``masked_network``.
        solver: Tolerances, maximum number of sweeps, and what happens on failure; default ``solvers.Sweeps()``.
        atol: Absolute tolerance, if no ``solver`` is given; see :class:`~pyro_invflows.solvers.Settings`.
        rtol: Relative tolerance, likewise.
        max_steps: Maximum number of sweeps, likewise; by default D.
        on_failure: What happens to rows that did not converge, likewise.

    Attributes:
        hypernet: The network, with its parameters.
        context: ``(*B, context_dim)``, a buffer, or None while not conditioned; not part of the ``state_dict``.

    Shape:
        ``(*B, D) -> (*B, D)``, log-det ``(*B,)``.

    Raises:
        TypeError: if ``function`` is not a :class:`~pyro_invflows.monotone.MonotoneFunction`, or ``hypernet`` is not a
            module.
        ValueError: if the network was built for another number of parameters, coordinates or context elements.
        ConvergenceError: in the inverse, if rounding error keeps a row above the tolerance, or if the network is not
            autoregressive. A y that is not finite gives NaN.

    Differs from Pyro's ``AffineAutoregressive`` and ``SplineAutoregressive``: both directions work on any data, and the
    inverse costs a few evaluations of the network instead of D.

    References:
        Kingma et al. (2016), Eqs. 9-10; Papamakarios et al. (2017), Eqs. 3-5; Germain et al. (2015), *MADE*.

    Example:
        >>> from pyro_invflows.monotone import MixtureCDF
        >>> from pyro_invflows.networks import masked_network
        >>> function = MixtureCDF(num_components=3)
        >>> layer = Autoregressive(function, masked_network(4, [16], function.num_parameters))
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-3)
        True
    """

    def __init__(
        self,
        function: MonotoneFunction,
        hypernet: nn.Module,
        *,
        context_dim: int = 0,
        input_dim: int | None = None,
        solver: Sweeps | None = None,
        atol: float | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        on_failure: str | None = None,
        cache_size: int = 1,
    ) -> None:
        owner = type(self).__name__
        if not isinstance(function, MonotoneFunction):
            raise TypeError(
                f"{owner}: function must be one of pyro_invflows.monotone, such as Affine(), or derive from "
                f"MonotoneFunction, but got {described(function)}"
            )
        if function.domain is not constraints.real:
            raise ValueError(
                f"{owner}: function must act on all real numbers, but {function!r} acts on {function.domain}. Use a "
                "RationalQuadraticSpline, or the function with learned constants."
            )
        if not isinstance(hypernet, nn.Module):
            raise TypeError(
                f"{owner}: hypernet must be a module, so that its parameters are the layer's, but got "
                f"{described(hypernet)}"
            )
        masked = masked_layers(hypernet)
        if masked is not None and input_dim is None:
            input_dim = masked.layout.input_dim
        super().__init__(input_dim, context_dim=context_dim, cache_size=cache_size)
        self.function = function
        self.hypernet = hypernet
        self.solver = chosen_settings(
            Sweeps(), solver, owner, atol=atol, rtol=rtol, max_steps=max_steps, on_failure=on_failure
        )
        if masked is not None:
            self._check_network(masked)

    def _check_network(self, masked: MaskedLayers) -> None:
        """Check a masked network, whose sizes are known."""
        given = masked.layout.input_dim, masked.layout.num_outputs, masked.linear[0].in_features
        wanted = self.input_dim, self.function.num_parameters, masked.layout.input_dim + self.context_dim
        if given != wanted:
            raise ValueError(
                f"{type(self).__name__}: {self.function!r} has {wanted[1]} parameters, so the network must be "
                f"masked_network({self.input_dim}, hidden_dims, {wanted[1]}, context_dim={self.context_dim}), but got "
                f"one for {given[0]} coordinates, {given[1]} outputs for each, and a context of {given[2] - given[0]}."
            )

    def _raw(self, x: Tensor, *context: Tensor) -> Tensor:
        """Return theta at x, ``(*batch, P, D)``; the context of some rows may be given."""
        joined = torch.cat([x, *context], dim=-1) if context else self.with_context(x)
        raw = call_network(self.hypernet, joined, owner=type(self).__name__)
        count, size = self.function.num_parameters, x.shape[-1]
        if raw.shape != (*joined.shape[:-1], count * size):  # one that broadcasts would make the log-det wrong
            raise ValueError(
                f"{type(self).__name__}: {self.function!r} has {count} parameters ({self.function.raw_names}), so for "
                f"an input of shape {tuple(joined.shape)} the network must return the shape "
                f"{(*joined.shape[:-1], count * size)}, but it returned {tuple(raw.shape)}."
            )
        return raw.unflatten(-1, (count, size))

    def _push(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and the log-slopes at x."""
        raw = self._raw(x, *context)
        y, log_slope = evaluate(self.function, x.expand(*raw.shape[:-2], -1), raw, inverse=False)
        return y, torch.zeros_like(y) if log_slope is None else log_slope

    @at_least_single
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._push(x)

    @full_precision
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.context_dim:
            y = y.expand(*self.context_of(y).shape[:-1], -1)
        if in_transform(y):
            x = self._sweep_with_graph(y)
            return x, self._push(x)[1]
        with torch.no_grad():
            x, log_slope = self._solve(y.detach())
        if not torch.is_grad_enabled():
            return x, log_slope
        masked = masked_layers(self.hypernet)
        x = implicit_gradient(
            lambda x: self._push(x)[0] - y,
            x,
            structure="autoregressive",
            diagonal=lambda x: self._push(x)[1].exp(),
            transposed=None if masked is None else lambda x: self._transposed_solver(masked, x),
            owner=type(self).__name__,
        )
        return x, self._push(x)[1]

    def _solve(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the log-slopes there, without a graph."""
        masked = masked_layers(self.hypernet)
        x = y
        if masked is not None and y.numel():
            flat, context = self._rows(y)
            x = solve_by_coordinates(masked, flat, context, self.function.root).reshape(y.shape)
        image, log_slope = self._push(x)
        atol, rtol = self.solver.tolerances(y.dtype)
        tolerance = atol + rtol * row_max(y, 1)
        residual = image - y
        if (row_max(residual, 1) <= tolerance).all() or (
            row_max(_relative(residual, x, log_slope), 1) <= tolerance
        ).all():
            return x, log_slope
        x = self._sweep(x, y)
        return x, self._push(x)[1]

    def _sweep(self, x: Tensor, y: Tensor) -> Tensor:
        """Sweep from x until every row meets its tolerance."""
        arguments: tuple[Tensor, ...] = (y, self.context_of(y)) if self.context_dim else (y,)

        def residual(x: Tensor, y: Tensor, *context: Tensor) -> Tensor:
            image, log_slope = self._push(x, *context)
            return _relative(image - y, x, log_slope)

        def sweep(_: Any, x: Tensor, r: Tensor, state: Any, arguments: Any, seeking: Any) -> tuple[Tensor, Tensor, Any]:
            y, *context = arguments
            (raw,) = state
            x = self.function.inverse(y, raw)[0]
            raw = self._raw(x, *context)  # at the new point: the next sweep needs no other evaluation
            image, log_slope = self.function.forward(x, raw)
            return x, _relative(image - y, x, log_slope), (raw,)

        solution = self.solver(residual, x, *arguments, sweep=sweep, state=(self._raw(x, *arguments[1:]),), scale=y)
        return finish(solution, type(self).__name__, self.solver, given=y)

    def _sweep_with_graph(self, y: Tensor) -> Tensor:
        """Take all D sweeps, which are exact and have exact derivatives."""
        x = y
        for _ in range(y.shape[-1]):
            x = self.function.inverse(y, self._raw(x))[0]
        return x

    def _transposed_solver(self, masked: MaskedLayers, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function from g to v with ``J^T v = g`` at x."""
        flat, context = self._rows(x)
        raw = self._raw(x).detach().reshape(len(flat), self.function.num_parameters, flat.shape[-1])
        with torch.enable_grad():
            raw.requires_grad_()
            y, log_slope = self.function.forward(flat, raw)
            (by_raw,) = torch.autograd.grad(y.sum(), raw)
        slope = torch.ones_like(y) if log_slope is None else log_slope.detach().exp()
        solve = transposed_solver(masked, flat, context, slope, by_raw)
        return lambda grad: solve(grad.reshape(flat.shape)).reshape(grad.shape)

    def _rows(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a value and the context for it, each with one batch dimension."""
        flat = value.reshape(-1, value.shape[-1])
        if not self.context_dim:
            return flat, None
        return flat, self.context_of(value).reshape(-1, self.context_dim).to(value.dtype)  # it may be in half precision

    @at_least_single
    def _log_det(self, x: Tensor, y: Tensor, aux: Tensor) -> Tensor:
        return aux.sum(-1)

    def _path_gradient(self, value: Tensor, gradient: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Solve the transposed triangular system at x, without inverting the layer."""
        masked = masked_layers(self.hypernet)
        if inverse or masked is None or not value.numel():
            return super()._path_gradient(value, gradient, inverse)
        x = tracked(value)
        y, log_slope = self.evaluate(x)
        change = derivative(log_slope, x)
        gradient = gradient if change is None else gradient - change
        with torch.no_grad():
            gradient = self._transposed_solver(masked, x.detach())(gradient)
        return y, log_slope.sum(-1), gradient

    def extra_repr(self) -> str:
        parts = [] if self.input_dim is None else [str(self.input_dim)]
        parts.append(repr(self.function))
        if self.context_dim:
            parts.append(f"context_dim={self.context_dim}")
        return ", ".join(parts)


def _relative(residual: Tensor, x: Tensor, log_slope: Tensor | None) -> Tensor:
    """Return a residual in y, relative to the change of y that corresponds to the rounding error of x."""
    scale = 1 + x.abs()
    return residual / (1 + scale if log_slope is None else 1 + scale * log_slope.exp())


def autoregressive_network(
    input_dim: int,
    hidden_dims: Sequence[int] | None,
    num_outputs: int,
    ordering: Sequence[int] | None,
    context_dim: int,
    activation: Callable[[], nn.Module],
    owner: str,
) -> nn.Module:
    """Build a masked network whose output is initially zero."""
    input_dim = positive_int(input_dim, "input_dim", owner)
    hidden = default_hidden_dims(10 * input_dim) if hidden_dims is None else hidden_dims
    return masked_network(
        input_dim,
        hidden,
        num_outputs,
        context_dim=context_dim,
        ordering=ordering,
        activation=activation,
        zero_output=True,
    )
