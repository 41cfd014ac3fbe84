r"""The gradient of a root, from the residual alone.

Where :math:`F(x, \theta) = 0` defines :math:`x(\theta)`, the implicit function theorem gives :math:`dx = -J^{-1}
\partial_\theta F\, d\theta` with :math:`J = \partial_x F`. The root is found without a graph; one more evaluation of
the residual there connects it to y and to every parameter involved, so that these need not be listed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_invflows import linalg
from pyro_invflows.solvers.iterative import Anderson, FixedPoint, Newton, dense_jacobian, jacobian_of
from pyro_invflows.solvers.settings import check_solver
from pyro_invflows.solvers.solution import finish, row_max, where_rows
from pyro_invflows.support.derivatives import depends_on_more, first_order_only, steps_with_graph
from pyro_invflows.support.modes import in_forward_mode, in_functorch, is_tracing
from pyro_invflows.support.precision import without_autocast

__all__ = ["implicit_gradient", "refuse_trace"]

_FIRST_ORDER = (
    ": this inverse has first derivatives only; second ones would be wrong. Build the layer with order=2 if it "
    "offers that, or use a layer whose inverse has derivatives of all orders."
)
STRUCTURES = ("dense", "elementwise", "autoregressive", "iterative")


def implicit_gradient(
    residual: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    structure: str = "dense",
    event_dim: int = 1,
    order: int = 1,
    diagonal: Callable[[Tensor], Tensor] | None = None,
    jacobian: Callable[[Tensor], Tensor] | None = None,
    transposed: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None,
    solver: Anderson | FixedPoint | Newton | None = None,
    owner: str = "implicit_gradient",
) -> Tensor:
    """Return x with the graph of the equation ``residual(x) = 0`` attached.

    The backward pass solves its linear system directly for ``"dense"`` (E vector-Jacobian products and a general solve,
    where E is the event size) and ``"elementwise"`` (one product); by at most E sweeps for ``"autoregressive"`` (they
    terminate because the Jacobian is triangular for some ordering of the coordinates); and by a solver for
    ``"iterative"``.

    Reverse mode is supported, and forward mode if the structure is dense or elementwise. Under ``torch.func`` these two
    structures take Newton steps with a graph instead, whose derivatives are right up to the third at least.

    Args:
        residual: ``x -> f(x) - y``, row by row, a closure over y and the parameters.
        x: A root ``(*B, *E)``, treated as a constant.
        structure: Structure of the Jacobian, one of the four above.
        event_dim: Number of dimensions of E.
        order: Order of derivatives that is needed. 1 keeps the graph of one evaluation, and second derivatives raise an
            error; 2 (dense and elementwise) takes two Newton steps with a graph, which are more expensive and right for
            derivatives up to the third.
        diagonal: ``x -> diag(J)``, without a graph; required for ``"autoregressive"``, unless ``transposed`` is given.
        jacobian: ``x -> J`` ``(*B, E, E)`` for the dense structure, if it is known in closed form; with a graph if
            autograd is recording.
        transposed: ``x -> (g -> v)`` with ``J^T v = g``, without a graph, for the autoregressive structure, if there is
            a direct way; else by sweeps. What it returns is called in the backward pass, and must hold all that it
            needs: by then, the parameters may be others.
        solver: For ``"iterative"``: the solver of the linear system, with its own tolerance.
        owner: Name used in error messages.

    Raises:
        TypeError: if the solver is not one of these.
        ValueError: if the structure or the order is unknown, or they cannot be combined.
        NotImplementedError: in a second derivative, if the order is 1; at once under ``torch.jit.trace``.
        ConvergenceError: in the backward pass, if the iterative solve fails.

    Example:
        >>> from pyro_invflows.solvers import Newton, implicit_gradient
        >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> y = torch.tensor([[1.0]], dtype=torch.float64)
        >>> with torch.no_grad():
        ...     x = Newton()(lambda x, y: a * x - y, y, y).value
        >>> x = implicit_gradient(lambda x: a * x - y, x)
        >>> torch.autograd.grad(x.sum(), a)[0]  # -y / a^2
        tensor(-0.2500, dtype=torch.float64)
    """
    if structure not in STRUCTURES:
        raise ValueError(f"{owner}: structure must be one of {STRUCTURES}, but got {structure!r}.")
    exact = structure in ("dense", "elementwise")
    if order not in (1, 2) or (order == 2 and not exact):
        raise ValueError(f"{owner}: order must be 1, or 2 if the structure is dense or elementwise, but got {order!r}.")
    if solver is not None:
        check_solver(solver, (Anderson, FixedPoint, Newton), owner)
    if structure == "autoregressive" and diagonal is None and transposed is None:
        raise ValueError(f"{owner}: the autoregressive structure needs diagonal=..., the Jacobian's diagonal.")
    refuse_trace(owner)
    x = x.detach()
    functorch = in_functorch()
    if not functorch and not torch.is_grad_enabled() and not in_forward_mode():
        return x
    if functorch or torch.compiler.is_compiling() or (order == 2 and torch.is_grad_enabled()):
        if not exact:
            raise NotImplementedError(
                f"{owner}: the {structure} implicit gradient does not work under torch.func and torch.compile; use "
                "torch.autograd, or a dense structure if the event is small."
            )
        if not functorch and not in_forward_mode() and not residual(x).requires_grad:
            return x  # nothing to differentiate: the leaf that a step makes must not make it look differentiable
        for _ in range(steps_with_graph()):
            x = _newton_step(residual, x, structure, event_dim, jacobian)
        return x
    # Whatever the backward pass needs is evaluated now: by then, the parameters may be others (functional_call).
    if exact or transposed is not None:
        value = residual(x)
        if not value.requires_grad and not _is_dual(value):
            return x
        inverse: _InverseJacobian
        if transposed is not None:
            with torch.no_grad():
                inverse = _Direct(transposed(x))
        else:
            inverse = _exact_inverse(residual, x, structure, event_dim, jacobian)
        return _Attach.apply(value, x, inverse, owner)
    value, leaf = _traced(residual, x)
    if not _is_dual(value) and not depends_on_more(value, leaf):
        return x
    if structure == "autoregressive" and diagonal is not None:
        with torch.no_grad():
            slope = diagonal(x)
        return _Attach.apply(value, x, _Sweeps(value, leaf, event_dim, slope), owner)
    return _Attach.apply(value, x, _Iterative(value, leaf, event_dim, solver or Anderson(), owner), owner)


def refuse_trace(owner: str) -> None:
    """Raise an error under ``torch.jit.trace``, which cannot record a loop or a derivative."""
    if not torch.compiler.is_compiling() and is_tracing():
        raise NotImplementedError(
            f"{owner}: torch.jit.trace (JitTrace_ELBO) would fix the number of steps that these data take, for all "
            "later data. Use Trace_ELBO, or torch.compile."
        )


def _is_dual(value: Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(value).tangent is not None


def _diagonal(residual: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Return ``F(x)`` and the diagonal of an elementwise residual's Jacobian."""
    if in_functorch() or torch.compiler.is_compiling():
        value, pullback, *_ = torch.func.vjp(residual, x)
        return value, pullback(torch.ones_like(value))[0]
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = residual(x)
        (slope,) = torch.autograd.grad(value, x, torch.ones_like(value), create_graph=create_graph)
    return value, slope


def _newton_step(
    residual: Callable[[Tensor], Tensor],
    x: Tensor,
    structure: str,
    event_dim: int,
    closed: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Take a Newton step with its graph: it moves a root only by rounding errors, but has its derivatives."""
    if structure == "elementwise":
        value, slope = _diagonal(residual, x, create_graph=True)
        return x - value / slope
    if closed is not None:
        value, jacobian = residual(x), closed(x)
    elif in_functorch() or torch.compiler.is_compiling():
        value, jacobian = residual(x), dense_jacobian(residual, x, event_dim)
    else:
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = residual(x)
        jacobian = jacobian_of(value, x, event_dim, create_graph=True)
    step = linalg.solve(jacobian, value.reshape(*jacobian.shape[:-1], 1))
    return x - step.reshape(x.shape)


class _Attach(torch.autograd.Function):
    """Returns x; its derivative is ``-J^{-1}`` times that of the residual."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, inverse: _InverseJacobian, owner: str) -> Tensor:
        ctx.inverse, ctx.owner = inverse, owner
        ctx.save_for_backward(value)
        ctx.save_for_forward(value)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad(), without_autocast(grad):
            v = ctx.inverse.transposed(grad.detach())
        (result,) = first_order_only([-v], (grad, *ctx.saved_tensors), ctx.owner + _FIRST_ORDER)
        return result, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor | None:
        change = -ctx.inverse.times(tangent, ctx.owner)
        return first_order_only([change], (tangent, *ctx.saved_tensors), ctx.owner + _FIRST_ORDER)[0]


# ---------------------------------------------------------------------- the inverse of the Jacobian


class _InverseJacobian:
    """``J^{-1}`` at the root, a constant."""

    def transposed(self, grad: Tensor) -> Tensor:
        """Return v with ``J^T v = grad``."""
        raise NotImplementedError

    def times(self, tangent: Tensor, owner: str) -> Tensor:
        """Return v with ``J v = tangent``."""
        raise NotImplementedError(
            f"{owner}: forward-mode derivatives need the dense or the elementwise structure, not one that is solved "
            "iteratively; use reverse mode."
        )


class _Diagonal(_InverseJacobian):
    def __init__(self, slope: Tensor) -> None:
        self.slope = slope

    def transposed(self, grad: Tensor) -> Tensor:
        return grad / self.slope

    def times(self, tangent: Tensor, owner: str) -> Tensor:
        return tangent / self.slope


class _Direct(_InverseJacobian):
    def __init__(self, solve: Callable[[Tensor], Tensor]) -> None:
        self.solve = solve

    def transposed(self, grad: Tensor) -> Tensor:
        return self.solve(grad)


class _Dense(_InverseJacobian):
    def __init__(self, jacobian: Tensor) -> None:
        self.jacobian = jacobian

    def transposed(self, grad: Tensor) -> Tensor:
        return linalg.solve(self.jacobian.mT, grad.reshape(*self.jacobian.shape[:-1], 1)).reshape(grad.shape)

    def times(self, tangent: Tensor, owner: str) -> Tensor:
        return linalg.solve(self.jacobian, tangent.reshape(*self.jacobian.shape[:-1], 1)).reshape(tangent.shape)


def _exact_inverse(
    residual: Callable[[Tensor], Tensor],
    x: Tensor,
    structure: str,
    event_dim: int,
    jacobian: Callable[[Tensor], Tensor] | None,
) -> _InverseJacobian:
    if structure == "elementwise":
        return _Diagonal(_diagonal(residual, x, create_graph=False)[1].detach())
    with torch.no_grad():
        return _Dense((dense_jacobian(residual, x, event_dim) if jacobian is None else jacobian(x)).detach())


def _traced(residual: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``F(x)`` and the leaf that stands for x in its graph."""
    # Hooks are for what is unpacked once: checkpointing would run its segment again for every product with the graph.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        leaf = x.detach().requires_grad_()
        return residual(leaf), leaf


class _Traced(_InverseJacobian):
    """What takes products with the Jacobian from the graph of the residual."""

    def __init__(self, value: Tensor, leaf: Tensor, event_dim: int) -> None:
        self.value, self.leaf, self.event_dim = value, leaf, event_dim

    def vjp(self, v: Tensor) -> Tensor:
        return torch.autograd.grad(self.value, self.leaf, v, retain_graph=True)[0]


class _Sweeps(_Traced):
    """For a Jacobian that is triangular for some ordering of the coordinates."""

    def __init__(self, value: Tensor, leaf: Tensor, event_dim: int, slope: Tensor) -> None:
        super().__init__(value, leaf, event_dim)
        self.slope = slope

    def transposed(self, grad: Tensor) -> Tensor:
        v = grad / self.slope
        limit = torch.finfo(grad.dtype).eps * 4
        for _ in range(self.leaf.shape[-self.event_dim :].numel()):
            # what the diagonal neglects is nilpotent: at most E sweeps, usually far fewer
            error = grad - self.vjp(v)
            # row by row: one that is not finite must not stop the others
            size = row_max(grad, self.event_dim) + row_max(v, self.event_dim)
            if not (row_max(error, self.event_dim) > limit * size).any():
                break
            v = v + error / self.slope
        return v


class _Iterative(_Traced):
    def __init__(
        self, value: Tensor, leaf: Tensor, event_dim: int, solver: Anderson | FixedPoint | Newton, owner: str
    ) -> None:
        super().__init__(value, leaf, event_dim)
        self.solver, self.owner = solver, owner

    def transposed(self, grad: Tensor) -> Tensor:
        solution = self.solver(lambda v: self.vjp(v) - grad, grad, event_dim=self.event_dim, scale=grad, gather=False)
        # a row whose root is not finite has no gradient, which is not a failure of this solver
        known = row_max(self.leaf.detach(), self.event_dim).isfinite()
        given = where_rows(known, grad, torch.full_like(grad, torch.nan))
        return finish(solution, f"{self.owner} (backward pass)", self.solver, given=given)
