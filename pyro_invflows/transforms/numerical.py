r"""A true inverse for transforms that only have a forward direction, such as several of Pyro's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro.distributions.transforms as pyro_transforms
import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.foreign import as_bijection
from pyro_invflows.core.structure import Structure
from pyro_invflows.solvers import (
    Anderson,
    Bisection,
    FixedPoint,
    Newton,
    Settings,
    Solution,
    Status,
    finish,
    implicit_gradient,
)
from pyro_invflows.solvers.implicit import refuse_trace
from pyro_invflows.solvers.settings import chosen_settings
from pyro_invflows.solvers.solution import in_transform, where_rows
from pyro_invflows.support.checks import described
from pyro_invflows.support.derivatives import outside_inference_mode
from pyro_invflows.support.precision import outside_autocast

__all__ = ["NumericalInverse", "numerical_inverse"]

STRUCTURES = ("elementwise", "triangular", "dense")


class NumericalInverse(Structure):
    r"""Inverts a transform t that only has a forward direction, by solving :math:`t(x) = y`.

    .. math:: y = t(x), \qquad \text{one-to-one from } \mathbb{R}^n \text{ onto its range}.

    Invertible if t is one-to-one, which its author must guarantee; a y that is not in the range of t raises an error.
    Choose it to score data under transforms that can only be sampled: Pyro's ``planar``, ``radial``,
    ``block_autoregressive``, ``neural_autoregressive`` and ``polynomial``. If this library has such a layer of its own,
    that layer is faster.

    **Forward**: that of t. **Inverse**: depends on the structure. ``"elementwise"``: a bracketed root for each element.
    ``"dense"``: Newton's method with a line search; each step computes the Jacobian by D vector-Jacobian products.
    ``"triangular"``: the same; rows that it does not solve are solved coordinate by coordinate, each by a bracketed
    root, which always succeeds if t is monotone in each coordinate. Every step evaluates all rows (a foreign transform
    may have batched parameters), but the result of a row does not depend on the others. Implicit gradients with respect
    to y and all parameters of t, by one more evaluation of t and an exact linear solve: first derivatives in reverse
    and forward mode, second derivatives only with ``order=2`` (else ``NotImplementedError``). Raises
    ``ConvergenceError`` if a row fails; a y that is not finite gives NaN. ``torch.compile`` must be able to trace t as
    a whole, within a loop. **Log-det**: that of t. **Identity**: where t is.

    Args:
        transform: The transform t. Its domain must be all of R^n, with as many event dimensions as its codomain. If it
            is a module, its parameters become parameters of this layer.
        structure: What is known about t: ``"elementwise"``, ``"triangular"`` (``y_i`` depends only on ``x_i`` and on
            the x that come before it in some order) or ``"dense"``. By default, elementwise for event dimension 0,
            triangular if t has a true attribute ``autoregressive``, and dense otherwise.
        solver: ``solvers.Newton``, ``Anderson`` or ``FixedPoint`` for the dense and triangular structures,
            ``solvers.Bisection`` for the elementwise one. It sets the tolerances, the maximum number of steps, and what
            happens on failure. The defaults are ``Newton()`` and ``Bisection()``.
        atol: Absolute tolerance, if no ``solver`` is given; see :class:`~pyro_invflows.solvers.Settings`.
        rtol: Relative tolerance, likewise.
        max_steps: Maximum number of steps, likewise.
        on_failure: What happens to rows that did not converge, likewise.
        order: Highest order of derivatives of the inverse, 1 or 2.
        ordering: For the triangular structure, the coordinates in the order in which they depend on each other. The
            default is the order of t's autoregressive network, or 0, 1, 2, ...

    Attributes:
        transform: t as a layer of this library, with its parameters.

    Shape:
        Input, output and log-det have the shapes that they have in t.

    Raises:
        TypeError: if ``transform`` is not a transform, or the solver does not fit the structure.
        ValueError: if t is not one-to-one; if its domain or event dimension does not fit; if the structure is unknown;
            if t is Pyro's ``Sylvester``, whose log-det is wrong (use :class:`~pyro_invflows.Sylvester`).
        ConvergenceError: in the inverse, if a row fails.

    Example:
        >>> import pyro.distributions.transforms as T
        >>> layer = NumericalInverse(T.Planar(3))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inv(layer(x).clone()), x, atol=1e-4)
        True
    """

    def __init__(
        self,
        transform: Transform,
        *,
        structure: str | None = None,
        solver: Newton | Anderson | FixedPoint | Bisection | None = None,
        atol: float | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        on_failure: str | None = None,
        order: int = 1,
        ordering: Sequence[int] | None = None,
        cache_size: int = 1,
    ) -> None:
        _check_transform(transform)
        super().__init__(cache_size=cache_size)
        inner = as_bijection(transform)
        self.domain, self.codomain = inner.domain, inner.codomain
        event_dim = transform.domain.event_dim
        if structure is None:
            autoregressive = getattr(transform, "autoregressive", False)
            structure = "triangular" if autoregressive else "dense" if event_dim else "elementwise"
        if structure not in STRUCTURES:
            raise ValueError(f"NumericalInverse: structure must be one of {STRUCTURES}, but got {structure!r}.")
        if (structure == "triangular" and event_dim != 1) or (structure == "dense" and not event_dim):
            raise ValueError(
                f"NumericalInverse: the {structure} structure does not fit a transform with event dimension "
                f"{event_dim}; elementwise fits any, triangular fits 1, dense fits 1 and more."
            )
        if order not in (1, 2):
            raise ValueError(f"NumericalInverse: order must be 1 or 2, but got {order!r}.")
        self.structure, self.order = structure, order
        elementwise = structure == "elementwise"
        self.solver: Settings = chosen_settings(
            Bisection() if elementwise else Newton(),
            solver,
            f"NumericalInverse with the {structure} structure",
            kinds=(Bisection,) if elementwise else (Newton, Anderson, FixedPoint),
            atol=atol,
            rtol=rtol,
            max_steps=max_steps,
            on_failure=on_failure,
        )
        self.ordering = None if ordering is None else [int(i) for i in ordering]
        if self.ordering is not None and sorted(self.ordering) != list(range(len(self.ordering))):
            raise ValueError(f"NumericalInverse: ordering must be a permutation of 0, 1, ..., but got {self.ordering}.")
        self.transform = inner
        self.settle()

    def named_parts(self) -> Iterator[tuple[str, Bijection, int]]:
        yield "transform", self.transform, 0

    def leaves(self, inverse: bool = False) -> Iterator[tuple[Bijection, bool]]:
        yield self, inverse

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.transform.exact

    @property
    def input_dim(self) -> int | None:  # type: ignore[override]
        """Size that t requires of an event of its input; None if any size will do."""
        return self.transform.input_dim

    @property
    def sign(self) -> Any:
        return self.transform.sign

    def trace_event(self, sizes: Mapping[int, int], inverse: bool = False) -> dict[int, int]:
        return self.transform.trace_event(sizes, inverse)

    # ------------------------------------------------------------------ one evaluation of t

    def _both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return t(x) and its log-det; no memo is read or filled."""
        y, aux = self.transform.evaluate(x)
        return y, self.transform._log_det(x, y, aux)

    def _value(self, x: Tensor) -> Tensor:
        return self.transform.evaluate(x)[0]

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.check_event(x.shape, inverse=False)
        return self._both(x)

    @outside_autocast
    @outside_inference_mode
    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self.check_event(y.shape, inverse=True)
        owner = f"NumericalInverse({self.transform.label})"
        refuse_trace(owner)
        y = y.expand(self.inverse_shape(y.shape))
        event_dim = self.domain.event_dim
        with torch.no_grad():
            solution = self._solve(y.detach())
            x = finish(solution, owner, self.solver, given=y)
        x = implicit_gradient(
            lambda x: self._value(x) - y,
            x,
            structure="elementwise" if self.structure == "elementwise" else "dense",
            event_dim=event_dim,
            order=self.order,
            owner=owner,
        )
        return x, self._both(x)[1]

    def _log_det(self, x: Tensor, y: Tensor, aux: Tensor) -> Tensor:
        return aux

    def _aux(self, x: Tensor, y: Tensor) -> Tensor:
        return self._both(x)[1]

    # ------------------------------------------------------------------ the root

    def _solve(self, y: Tensor) -> Solution:
        event_dim = self.domain.event_dim

        def residual(x: Tensor) -> Tensor:
            return self._value(x) - y

        # starting at y is good if t is near the identity; it is possible only if t maps onto all of R^n
        start = torch.where(y.isfinite(), y, torch.zeros_like(y)) if _is_real(self.codomain) else torch.zeros_like(y)
        if isinstance(self.solver, Bisection):
            return _by_rows(self.solver(residual, start, scale=y), event_dim)
        solution = self.solver(residual, start, event_dim=event_dim, scale=y, gather=False)  # type: ignore[operator]
        if self.structure != "triangular" or in_transform(y):
            return solution
        given = y.isfinite().all(-1)
        todo = (solution.status != int(Status.CONVERGED)) & given
        if not todo.any():
            return solution
        return self._coordinatewise(residual, y, solution, todo)

    def _coordinatewise(self, residual: Any, y: Tensor, solution: Solution, todo: Tensor) -> Solution:
        """Solve one coordinate after the other; then refine the rows to rounding error by Newton's method."""
        x = where_rows(todo, torch.zeros_like(y), solution.value)
        bisection = Bisection(atol=self.solver.atol, rtol=self.solver.rtol)
        status, steps = solution.status.clone(), solution.num_steps.clone()
        left = todo
        for i in self._order(y.shape[-1]):

            def one(value: Tensor, x: Tensor = x, i: int = i) -> Tensor:
                return residual(torch.cat([x[..., :i], value.unsqueeze(-1), x[..., i + 1 :]], dim=-1))[..., i]

            root = bisection(one, x[..., i], scale=y.abs().amax(-1))
            found = torch.where(left, root.value, x[..., i])
            x = torch.cat([x[..., :i], found.unsqueeze(-1), x[..., i + 1 :]], dim=-1)
            steps = torch.where(left, torch.maximum(steps, root.num_steps), steps)
            # a coordinate without a root ends its row, which keeps that status
            status = torch.where(left, root.status, status)
            left = left & root.converged
        polish = (
            self.solver if isinstance(self.solver, Newton) else Newton(atol=self.solver.atol, rtol=self.solver.rtol)
        )
        polished = polish(residual, x, event_dim=1, scale=y, gather=False)
        return Solution(
            where_rows(left, polished.value, x),
            torch.where(left, polished.status, status),
            steps,
            torch.where(left | ~todo, polished.residual, residual(x).abs().amax(-1)),
        )

    def _order(self, size: int) -> list[int]:
        if self.ordering is not None:
            return self.ordering
        network = getattr(getattr(self.transform, "transform", None), "arn", None)
        permutation = getattr(network, "permutation", None)
        return list(range(size)) if permutation is None else [int(i) for i in permutation]

    def extra_repr(self) -> str:
        return f"structure={self.structure!r}"


def _is_real(constraint: constraints.Constraint) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint in (constraints.real, constraints.real_vector)


def _check_transform(transform: Any) -> None:
    name = type(transform).__name__
    if not isinstance(transform, Transform):
        raise TypeError(f"NumericalInverse: expected a transform, got {described(transform)}")
    if isinstance(transform, pyro_transforms.Sylvester):
        raise ValueError(
            "NumericalInverse does not take Pyro's Sylvester: its log-det multiplies the diagonals of a product that "
            "is not triangular, and is wrong. Use pyro_invflows.Sylvester, which has an inverse of its own."
        )
    if not transform.bijective:
        raise ValueError(
            f"NumericalInverse needs a one-to-one transform, but {name} has bijective=False: several x may share a y."
        )
    if transform.domain.event_dim != transform.codomain.event_dim:
        raise ValueError(
            "NumericalInverse needs a transform with as many event dimensions in its output as in its input, but "
            f"{name} has {transform.codomain.event_dim} and {transform.domain.event_dim}."
        )
    if not _is_real(transform.domain):
        raise ValueError(
            f"NumericalInverse needs a transform whose domain is all of R^n, but that of {name} is {transform.domain}. "
            "Put a transform onto that domain in front of it, and invert the composition."
        )


def _by_rows(solution: Solution, event_dim: int) -> Solution:
    """Combine the elements of each event into a row, which has converged if all of its elements have."""
    if not event_dim:
        return solution
    rows = [t.flatten(-event_dim).amax(-1) for t in (solution.status, solution.num_steps, solution.residual)]
    return Solution(solution.value, *rows)


def numerical_inverse(
    transform: Transform,
    *,
    structure: str | None = None,
    solver: Newton | Anderson | FixedPoint | Bisection | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
    on_failure: str | None = None,
    order: int = 1,
    ordering: Sequence[int] | None = None,
) -> NumericalInverse:
    """Build a :class:`NumericalInverse`."""
    return NumericalInverse(
        transform,
        structure=structure,
        solver=solver,
        atol=atol,
        rtol=rtol,
        max_steps=max_steps,
        on_failure=on_failure,
        order=order,
        ordering=ordering,
    )
