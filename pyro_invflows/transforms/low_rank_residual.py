r"""Residual layers ``x + g(x)`` with a narrow contraction g, whose log-determinant and inverse are exact.

Behrmann et al. (2019), *Invertible residual networks*. There the Lipschitz bound is an estimate, the log-determinant is
a random estimate, and the inverse stops early. Here the bound is guaranteed in every call, and both the log-determinant
and the inverse are computed in the few hidden dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invflows import linalg
from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.chain import Chain
from pyro_invflows.core.conditional import conditional_factory
from pyro_invflows.networks import LipSwish, value_and_slope
from pyro_invflows.networks.bounds import check_lipschitz, make_activations
from pyro_invflows.networks.calling import out_of_place
from pyro_invflows.networks.contraction import affine, contract_product
from pyro_invflows.solvers import Newton, finish, implicit_gradient
from pyro_invflows.solvers.contractive import FoldedEquation, chord_steps, finish_by_fixed_point
from pyro_invflows.solvers.settings import chosen_settings
from pyro_invflows.solvers.solution import in_transform, where_rows
from pyro_invflows.support.checks import derivative_order, positive_int
from pyro_invflows.support.modes import in_forward_mode
from pyro_invflows.support.precision import at_least_single, full_precision
from pyro_invflows.transforms.diagonal import Diagonal

__all__ = ["LowRankResidual", "conditional_low_rank_residual", "iresnet", "low_rank_residual"]

FORMS = ("bottleneck", "sandwich")


# ---------------------------------------------------------------------- low rank


class _Network(NamedTuple):
    """The contraction of a :class:`LowRankResidual`, scaled to meet its bound."""

    weights: list[Tensor]  # into the hidden dimensions, within them (sandwich only), and out of them
    biases: Sequence[Tensor | None]
    norm: Tensor  # spectral norm of the first matrix


#: A, s, B and t of :func:`~pyro_invflows.linalg.contraction_log_det`.
_Factors = tuple[Tensor, Tensor, Tensor, Tensor | None]


class LowRankResidual(Bijection):
    r"""Moves points by the output of a narrow network that is a contraction.

    .. math:: y = x + \phi(W_1 W_2 x + b) \quad \text{(bottleneck)}, \qquad
       y = x + W_3\, \phi(W_2\, \phi(W_1 x + b_1) + b_2) + b_3 \quad \text{(sandwich)},

    with k hidden dimensions. The last matrix is scaled by :math:`\min(1, c / \prod_i |W_i|)`, so that the residual
    :math:`g(x) = y - x` has a Lipschitz constant of at most c < 1 for all parameters. Invertible because x is the fixed
    point of the contraction :math:`x \mapsto y - g(x)`. Choose it as a general-purpose layer if no coordinate is
    special: it needs no permutation and no split.

    **Forward**: O(D k) per point after O(k^2 D + k^3) once, for the norms. **Inverse**: a root in k dimensions,
    :math:`s + W g(s) = W y` for :math:`s = W x`, where W is the first matrix, by Newton's method with k x k matrices;
    where D < k, a root in D dimensions, :math:`x + g(x) = y`. Rows that it does not solve are finished by a fixed-point
    iteration, which converges because of the bound. Implicit gradients, first order in reverse and forward mode (second
    derivatives raise ``NotImplementedError``); use ``order=2`` for higher orders. **Log-det**: exact,
    :math:`\log\det(I_k + M)` by the determinant lemma, O(D k^2) per point (bottleneck) or O(k^3) (sandwich); where
    D < k, from the D x D Jacobian, O(D k^2 + D^3). **Identity**: exactly, at initialisation (the last matrix is zero);
    the other matrices are drawn with torch's global generator.

    Args:
        input_dim: Size D of an event.
        hidden_dim: Number k of hidden dimensions; default ``floor(sqrt(D))``.
        form: ``"bottleneck"`` or ``"sandwich"``; the latter is cheaper in many dimensions.
        lipschitz: Bound c, strictly between 0 and 1. The inverse stretches distances by at most 1 / (1 - c).
        activation: Constructor of :math:`\phi`, elementwise with slopes of at most 1.
        order: Highest order of derivatives of the inverse, 1 or 2.
        solver: Tolerances, and what happens on failure; default ``solvers.Newton()``. If ``max_steps`` is given,
            Newton's method is used alone, without cheaper steps before it or a fixed-point iteration after it.
        atol: Absolute tolerance, if no ``solver`` is given; see :class:`~pyro_invflows.solvers.Settings`.
        rtol: Relative tolerance, likewise.
        max_steps: Maximum number of Newton steps, likewise.
        on_failure: What happens to rows that did not converge, likewise.

    Attributes:
        weight_in: First matrix, a parameter ``(k, D)``, unconstrained: :math:`W_2` (bottleneck) or :math:`W_1`
            (sandwich).
        weight_mid: :math:`W_2`, a parameter ``(k, k)``, unconstrained; sandwich only.
        weight_out: Last matrix, a parameter ``(D, k)``, before it is scaled: :math:`W_1` (bottleneck) or :math:`W_3`
            (sandwich).
        bias_in: :math:`b_1`, a parameter ``(k,)``; sandwich only.
        bias_mid: :math:`b_2`, a parameter ``(k,)``; sandwich only.
        bias_out: b (bottleneck) or :math:`b_3` (sandwich), a parameter ``(D,)``.
        activation: :math:`\phi`, with its parameters if it has any.

    Shape:
        ``(*B, D) -> (*B, D)``; log-det ``(*B,)``. A context shifts only the biases, so that the bound holds for every
        context.

    Raises:
        ValueError: if ``lipschitz`` is not strictly between 0 and 1, the form is unknown, the activation is steeper
            than 1, or an event does not have the size D.
        ConvergenceError: in the inverse, if ``max_steps`` is given, or tolerances below rounding error. A y that is not
            finite gives NaN.

    References:
        Behrmann et al. (2019), Eqs. 1-3 and algorithm 1, for the principle.

    Example:
        >>> layer = LowRankResidual(9)
        >>> _ = torch.nn.init.normal_(layer.weight_out)
        >>> x = torch.randn(5, 9)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    input_dim: int
    amortised = ("bias_in", "bias_mid", "bias_out")

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int | None = None,
        *,
        form: str = "bottleneck",
        lipschitz: float = 0.97,
        activation: Callable[[], nn.Module] = LipSwish,
        order: int = 1,
        solver: Newton | None = None,
        atol: float | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        on_failure: str | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        input_dim = self.input_dim
        owner = "LowRankResidual"
        if form not in FORMS:
            raise ValueError(f"{owner}: form must be one of {FORMS}, but got {form!r}.")
        k = math.isqrt(input_dim) if hidden_dim is None else positive_int(hidden_dim, "hidden_dim", owner)
        self.hidden_dim, self.form = k, form
        self.lipschitz = check_lipschitz(lipschitz, owner)
        self.order = derivative_order(order, owner)
        self.solver = chosen_settings(
            Newton(), solver, owner, atol=atol, rtol=rtol, max_steps=max_steps, on_failure=on_failure
        )
        (self.activation,) = make_activations(activation, 1, owner)
        self.weight_in = nn.Parameter(torch.empty(k, input_dim))
        self.weight_out = nn.Parameter(torch.empty(input_dim, k))
        self.bias_out = nn.Parameter(torch.empty(input_dim))
        if form == "sandwich":
            self.weight_mid = nn.Parameter(torch.empty(k, k))
            self.bias_in = nn.Parameter(torch.empty(k))
            self.bias_mid = nn.Parameter(torch.empty(k))
        self._draw()

    def reset_parameters(self) -> None:
        """Set the last matrix and bias to zero, so that the layer is the identity; reset all else."""
        super().reset_parameters()
        self._draw()

    def _draw(self) -> None:
        nn.init.normal_(self.weight_in, std=self.input_dim**-0.5)
        nn.init.zeros_(self.weight_out)
        nn.init.zeros_(self.bias_out)
        if self.form == "sandwich":
            nn.init.normal_(self.weight_mid, std=self.hidden_dim**-0.5)
            nn.init.normal_(self.bias_in)
            nn.init.normal_(self.bias_mid)

    # ------------------------------------------------------------------ the contraction

    def _network(self) -> _Network:
        if self.form == "bottleneck":
            raw, biases = [self.weight_in, self.weight_out], [None, self.bias_out]
        else:
            raw = [self.weight_in, self.weight_mid, self.weight_out]
            biases = [self.bias_in, self.bias_mid, self.bias_out]
        weights, norms = contract_product(raw, self.lipschitz)
        return _Network(weights, biases, norms[0])

    @property
    def _in_event(self) -> bool:
        """Whether the root and the determinant are taken in the D dimensions of the event, which are fewer than k."""
        return self.input_dim < self.hidden_dim

    def _enter(self, network: _Network, x: Tensor) -> Tensor:
        """Return the output of the first matrix."""
        return affine(x, network.weights[0], network.biases[0])

    def _hidden(self, network: _Network, s: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output of the last activation for s, the output of the first matrix, and all slopes on the way."""
        if self.form == "bottleneck":
            h, slope = value_and_slope(self.activation, affine(s, network.weights[1], network.biases[1]))
            return h, (slope,)
        h, first = value_and_slope(self.activation, s)
        h, second = value_and_slope(self.activation, affine(h, network.weights[1], network.biases[1]))
        return h, (first, second)

    def _hidden_value(self, network: _Network, s: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the same value without the slopes, which are more expensive than the value."""
        h = s if self.form == "bottleneck" else activation(s)
        return activation(affine(h, network.weights[1], network.biases[1]))

    def _out(self, network: _Network, h: Tensor) -> Tensor:
        return h if self.form == "bottleneck" else affine(h, network.weights[2], network.biases[2])

    def _fold(self, network: _Network) -> Tensor:
        """Return the matrix, with k rows, by which the output of the last activation changes s."""
        return network.weights[0] if self.form == "bottleneck" else network.weights[0] @ network.weights[2]

    def _factors(self, network: _Network, fold: Tensor, slopes: tuple[Tensor, ...]) -> _Factors:
        """Return A, s, B, t; the Jacobian I + A s B t of ``s + fold h(s)`` has the same determinant as dy/dx."""
        first, *second = slopes
        return (fold, second[0], network.weights[1], first) if second else (fold, first, network.weights[1], None)

    def _jacobian(self, network: _Network, slopes: tuple[Tensor, ...]) -> Tensor:
        """Return dy/dx, ``(*B, D, D)``."""
        behind: list[Tensor | None] = [None, *slopes] if self.form == "bottleneck" else [*slopes, None]
        product = linalg.cyclic_product(network.weights, behind)
        return product + torch.eye(self.input_dim, dtype=product.dtype, device=product.device)

    def _equation(self, network: _Network) -> FoldedEquation:
        """Return the equation of the inverse: in s, the output of the first matrix, or in x."""
        hidden = self._hidden_at(network, out_of_place(self.activation))
        if not self._in_event:
            fold = self._fold(network)
            return FoldedEquation(
                hidden,
                fold,
                lambda s: self._hidden(network, s)[1],
                lambda slopes: linalg.contraction_matrix(*self._factors(network, fold, slopes)),
            )
        weight = network.weights[-1]
        if self.form == "bottleneck":
            weight = torch.eye(self.input_dim, dtype=weight.dtype, device=weight.device)
        return FoldedEquation(
            hidden,
            weight,
            lambda x: self._hidden(network, self._enter(network, x))[1],
            lambda slopes: self._jacobian(network, slopes),
        )

    def _hidden_at(self, network: _Network, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the output of the last activation as a function of the equation's unknown."""
        if self._in_event:
            return lambda x: self._hidden_value(network, self._enter(network, x), activation)
        return lambda s: self._hidden_value(network, s, activation)

    # ------------------------------------------------------------------ hooks

    @at_least_single
    def _forward_aux(self, x: Tensor) -> tuple[Tensor, tuple[_Network, tuple[Tensor, ...]]]:
        network = self._network()
        h, slopes = self._hidden(network, self._enter(network, x))
        return x + self._out(network, h), (network, slopes)

    @full_precision
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, tuple[_Network, Any]]:
        network = self._network()
        equation, plain = self._equation(network), out_of_place(self.activation)
        if self._in_event:
            c, unit = y if self.form == "bottleneck" else y - self.bias_out, torch.ones_like(network.norm)
        else:
            c, unit = self._enter(network, y), network.norm
            if self.form == "sandwich":
                c = c - affine(self.bias_out, network.weights[0], None)
        if self.batch_shape:
            c = c.expand(*torch.broadcast_shapes(c.shape[:-1], self.batch_shape), -1)

        frozen = None if in_transform(c) else getattr(self.activation, "frozen", None)
        activation = plain if frozen is None else frozen()
        with torch.no_grad():
            looped = equation._replace(hidden=self._hidden_at(network, activation))
            s, h = self._solve(looped, c, y, unit)
        if not torch.is_grad_enabled() and not in_forward_mode() and not in_transform(c):
            return y - self._out(network, looped.hidden(s) if h is None else h), (network, s)
        s = implicit_gradient(
            lambda s: equation.residual(s, c),
            s,
            jacobian=lambda s: equation.jacobian(equation.slopes(s)),
            order=self.order,
            owner="LowRankResidual",
        )
        h, slopes = self._hidden(network, self._enter(network, s) if self._in_event else s)
        return y - self._out(network, h), (network, slopes)

    def _solve(self, equation: FoldedEquation, c: Tensor, y: Tensor, norm: Tensor) -> tuple[Tensor, Tensor | None]:
        """Solve the equation; return its solution, and h if it is known.

        The tolerance refers to y, so residuals in the hidden dimensions are divided by the norm of the first matrix.
        """
        unit = norm.clamp_min(torch.finfo(c.dtype).tiny).to(c.dtype)
        settings = self.solver
        if settings.max_steps is not None or in_transform(c):
            return self._newton(equation, c, y, unit), None
        limit = None
        if settings.atol is not None or settings.rtol is not None:  # they may be below rounding error
            atol, rtol = settings.tolerances(c.dtype)
            limit = (atol + rtol * y.abs().amax(-1)) * unit
        s, done, h = chord_steps(equation, c, c, unit, gather=not self.batch_shape, limit=limit)
        if h is not None or done.all():
            return s, h
        if self.batch_shape:  # each row has biases of its own, so rows cannot be selected
            return where_rows(done, s, self._newton(equation, c, y, unit)), None
        rows = ~done
        s[rows] = self._newton(equation, c[rows], y[rows], unit)
        return s, None

    def _newton(self, equation: FoldedEquation, c: Tensor, y: Tensor, unit: Tensor) -> Tensor:
        def scaled(s: Tensor, c: Tensor) -> Tensor:
            return equation.residual(s, c) / unit

        def step(s: Tensor, r: Tensor, c: Tensor) -> Tensor:
            return linalg.solve(equation.jacobian(equation.slopes(s)), (r * unit).unsqueeze(-1)).squeeze(-1)

        start = torch.where(c.isfinite(), c, 0)
        push = F.linear(equation.hidden(start), equation.fold) / unit  # rounding errors scale with the terms
        how: dict[str, Any] = {
            "scale": (y.abs().amax(-1, keepdim=True) + push.abs().amax(-1, keepdim=True)).expand(c.shape),
            "gather": not self.batch_shape,
        }
        solution = self.solver(scaled, start, c, step=step, **how)
        if self.solver.max_steps is None:
            solution = finish_by_fixed_point(
                solution, self.solver, scaled, start, (c,), self.lipschitz, unit=unit, **how
            )
        return finish(solution, "LowRankResidual", self.solver, given=y.expand(*c.shape[:-1], -1))

    @full_precision
    def _log_det(self, x: Tensor, y: Tensor, aux: tuple[_Network, Any]) -> Tensor:
        network, slopes = aux
        if isinstance(slopes, Tensor):  # the equation's solution, from an inverse without gradients
            slopes = self._equation(network).slopes(slopes)
        if self._in_event:
            return linalg.log_abs_det(self._jacobian(network, slopes))
        return linalg.contraction_log_det(*self._factors(network, self._fold(network), slopes))

    def extra_repr(self) -> str:
        return f"{self.input_dim}, hidden_dim={self.hidden_dim}, form={self.form!r}, lipschitz={self.lipschitz}"


# ---------------------------------------------------------------------- factories


def low_rank_residual(
    input_dim: int,
    hidden_dim: int | None = None,
    *,
    form: str = "bottleneck",
    lipschitz: float = 0.97,
    activation: Callable[[], nn.Module] = LipSwish,
    order: int = 1,
    solver: Newton | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
    on_failure: str | None = None,
) -> LowRankResidual:
    """Build a :class:`LowRankResidual`."""
    return LowRankResidual(
        input_dim,
        hidden_dim,
        form=form,
        lipschitz=lipschitz,
        activation=activation,
        order=order,
        solver=solver,
        atol=atol,
        rtol=rtol,
        max_steps=max_steps,
        on_failure=on_failure,
    )


def iresnet(
    input_dim: int,
    hidden_dim: int | None = None,
    *,
    num_blocks: int = 4,
    form: str = "bottleneck",
    lipschitz: float = 0.97,
    activation: Callable[[], nn.Module] = LipSwish,
    order: int = 1,
    solver: Newton | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
    on_failure: str | None = None,
    recompute: bool = False,
) -> Chain:
    """Build an invertible residual network: :class:`LowRankResidual` blocks with learned scales between them.

    The scales (:class:`~pyro_invflows.Diagonal`) let the chain stretch space by more than the bounds of its blocks.

    Args:
        input_dim: Size D of an event.
        hidden_dim: Number of hidden dimensions of each block; default ``floor(sqrt(D))``.
        num_blocks: Number of blocks.
        form: As in :class:`LowRankResidual`.
        lipschitz: As in :class:`LowRankResidual`.
        activation: As in :class:`LowRankResidual`.
        order: As in :class:`LowRankResidual`.
        solver: As in :class:`LowRankResidual`.
        atol: As in :class:`LowRankResidual`.
        rtol: As in :class:`LowRankResidual`.
        max_steps: As in :class:`LowRankResidual`.
        on_failure: As in :class:`LowRankResidual`.
        recompute: As in :class:`~pyro_invflows.Chain`: keep no activations.

    Raises:
        ValueError: if ``num_blocks`` is below 1, or as in :class:`LowRankResidual`.

    Example:
        >>> chain = iresnet(6, num_blocks=3)
        >>> len(chain)
        5
    """
    num_blocks = positive_int(num_blocks, "num_blocks", "iresnet")
    parts: list[Bijection] = []
    for i in range(num_blocks):
        if i:
            parts.append(Diagonal(input_dim))
        layer = low_rank_residual(
            input_dim,
            hidden_dim,
            form=form,
            lipschitz=lipschitz,
            activation=activation,
            order=order,
            solver=solver,
            atol=atol,
            rtol=rtol,
            max_steps=max_steps,
            on_failure=on_failure,
        )
        parts.append(layer)
    return Chain(parts, recompute=recompute)


conditional_low_rank_residual = conditional_factory(low_rank_residual, "a hypernetwork sets its biases from a context")
