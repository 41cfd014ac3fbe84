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
from pyro_invflows.support.derivatives import first_order_only, steps_with_graph
from pyro_invflows.support.modes import in_forward_mode, in_functorch, is_tracing
from pyro_invflows.support.precision import without_autocast

__all__ = ["implicit_gradient"]

_FIRST_ORDER = (
    ": this inverse has first derivatives only; second ones would be wrong. Build the layer with order=2 if it "
    "offers that, or use a layer whose inverse has derivatives of every order."
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
    transposed: Callable[[Tensor, Tensor], Tensor] | None = None,
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
        transposed: ``x, g -> v`` with ``J^T v = g``, without a graph, for the autoregressive structure, if there is a
            direct way; else by sweeps.
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
    if not torch.compiler.is_compiling() and is_tracing():
        raise NotImplementedError(
            f"{owner}: torch.jit.trace (JitTrace_ELBO) would fix the number of steps that these data take, for all "
            "later data. Use Trace_ELBO, or torch.compile."
        )
    x = x.detach()
    functorch = in_functorch()
    # autograd functions that a compiler cannot trace are avoided where the Jacobian is known
    if functorch or order == 2 or (jacobian is not None and torch.compiler.is_compiling()):
        if not exact:
            raise NotImplementedError(
                f"{owner}: the {structure} implicit gradient does not work under torch.func; use torch.autograd, or a "
                "dense structure if the event is small."
            )
        if not functorch and not torch.is_grad_enabled():
            return x
        if not functorch and not residual(x).requires_grad and not in_forward_mode():
            return (
                x  # nothing to differentiate with respect to: the leaf that a step makes must not look differentiable
            )
        for _ in range(steps_with_graph()):
            x = _newton_step(residual, x, structure, event_dim, jacobian)
        return x
    if not torch.is_grad_enabled() and not in_forward_mode():
        return x
    value = residual(x)
    if not value.requires_grad and not _is_dual(value):
        return x
    return _Attach.apply(
        value, x, residual, structure, event_dim, diagonal, jacobian, transposed, solver or Anderson(), owner
    )


def _is_dual(value: Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(value).tangent is not None


def _diagonal(residual: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Return ``F(x)`` and the diagonal of an elementwise residual's Jacobian."""
    if in_functorch():
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
    elif in_functorch():
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
    def forward(
        ctx: Any,
        value: Tensor,
        x: Tensor,
        residual: Callable[[Tensor], Tensor],
        structure: str,
        event_dim: int,
        diagonal: Callable[[Tensor], Tensor] | None,
        jacobian: Callable[[Tensor], Tensor] | None,
        transposed: Callable[[Tensor, Tensor], Tensor] | None,
        solver: Any,
        owner: str,
    ) -> Tensor:
        ctx.residual, ctx.structure, ctx.event_dim = residual, structure, event_dim
        ctx.diagonal, ctx.jacobian, ctx.transposed = diagonal, jacobian, transposed
        ctx.solver, ctx.owner = solver, owner
        ctx.x = x  # a constant
        ctx.save_for_backward(value)
        ctx.save_for_forward(value)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad):
            v = _solve_transposed(ctx, grad.detach())
        (result,) = first_order_only([-v], (grad, *ctx.saved_tensors), ctx.owner + _FIRST_ORDER)
        return result, *(None,) * 9

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        if ctx.structure == "elementwise":
            change = -tangent / _diagonal(ctx.residual, ctx.x, create_graph=False)[1]
        elif ctx.structure == "dense":
            with torch.no_grad():
                closed = ctx.jacobian
                jacobian = dense_jacobian(ctx.residual, ctx.x, ctx.event_dim) if closed is None else closed(ctx.x)
            change = -linalg.solve(jacobian, tangent.reshape(*jacobian.shape[:-1], 1)).reshape(tangent.shape)
        else:
            raise NotImplementedError(
                f"{ctx.owner}: forward-mode derivatives need the dense or the elementwise structure, not "
                f"{ctx.structure}; use reverse mode."
            )
        (result,) = first_order_only([change], (tangent, *ctx.saved_tensors), ctx.owner + _FIRST_ORDER)
        return result  # type: ignore[return-value]


@torch.no_grad()
def _solve_transposed(ctx: Any, grad: Tensor) -> Tensor:
    """Return v with ``J^T v = grad``."""
    if ctx.jacobian is not None:
        return _solve_dense(ctx.jacobian(ctx.x), grad)
    if ctx.transposed is not None:
        return ctx.transposed(ctx.x, grad)
    with torch.enable_grad():
        x = ctx.x.detach().requires_grad_()
        value = ctx.residual(x)

    def vjp(v: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, v, retain_graph=True)[0]

    if ctx.structure == "elementwise":
        return grad / vjp(torch.ones_like(value))
    if ctx.structure == "dense":
        return _solve_dense(jacobian_of(value, x, ctx.event_dim), grad)
    if ctx.structure == "autoregressive":
        slope = ctx.diagonal(ctx.x)
        v = grad / slope
        limit = torch.finfo(grad.dtype).eps * 4
        for _ in range(x.shape[-ctx.event_dim :].numel()):
            # what the diagonal neglects is nilpotent: at most E sweeps, usually far fewer
            error = grad - vjp(v)
            # row by row: one that is not finite must not stop the others
            size = row_max(grad, ctx.event_dim) + row_max(v, ctx.event_dim)
            if not (row_max(error, ctx.event_dim) > limit * size).any():
                break
            v = v + error / slope
        return v
    solution = ctx.solver(lambda v: vjp(v) - grad, grad, event_dim=ctx.event_dim, scale=grad, gather=False)
    # a row whose root is not finite has no gradient, which is not a failure of this solver
    known = row_max(ctx.x, ctx.event_dim).isfinite()
    given = where_rows(known, grad, torch.full_like(grad, torch.nan))
    return finish(solution, f"{ctx.owner} (backward pass)", ctx.solver, given=given)


def _solve_dense(jacobian: Tensor, grad: Tensor) -> Tensor:
    return linalg.solve(jacobian.mT, grad.reshape(*jacobian.shape[:-1], 1)).reshape(grad.shape)
