r"""Root finders for a whole event at once: fixed point, Anderson acceleration, Newton, sweeps.

Each is a frozen object of settings, called as ``solver(residual, x0, *args)``. ``residual(x, *args)`` returns
:math:`f(x) - y` row by row. Tensors that differ from row to row are passed in ``args``, with the batch dimensions of
``x0`` in front, so that rows that are done need not be evaluated (``gather=True``). Under ``torch.func`` and while
compiling, such rows are masked instead, and the loop still ends when all are done. On the meta device and under
``torch.jit.trace``, where values cannot be inspected, all ``max_steps`` steps are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_invflows import linalg
from pyro_invflows.solvers.rows import Residual, State, Step, iterate
from pyro_invflows.solvers.settings import Settings
from pyro_invflows.solvers.solution import Solution, is_blind, where_rows
from pyro_invflows.support.checks import is_int
from pyro_invflows.support.devices import lacks_float64
from pyro_invflows.support.modes import holds_anywhere, in_functorch

__all__ = ["Anderson", "FixedPoint", "Newton", "Sweeps", "dense_jacobian"]


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Settings):
    """Repeats ``x <- x - damping * (f(x) - y)``: Picard iteration.

    If ``x - f(x)`` is a contraction, each step reduces the error by its constant; otherwise the iteration may diverge,
    and the status says so.

    Args:
        damping: Fraction of the step that is taken, in (0, 1].

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> from pyro_invflows.solvers import FixedPoint
        >>> y = torch.tensor([[0.3], [1.0]], dtype=torch.float64)
        >>> solution = FixedPoint()(lambda x, y: x + 0.5 * torch.sin(x) - y, y, y)
        >>> bool(solution.converged.all())
        True
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise ValueError(f"FixedPoint: damping must be in (0, 1], but got {self.damping!r}.")

    def __call__(
        self,
        residual: Residual,
        x0: Tensor,
        *args: Tensor,
        event_dim: int = 1,
        scale: Tensor | None = None,
        gather: bool = True,
    ) -> Solution:
        def step(
            residual: Residual, x: Tensor, r: Tensor, state: State, args: State, seeking: Tensor
        ) -> tuple[Tensor, Tensor, State]:
            x = x - self.damping * r
            return x, residual(x, *args), state

        return iterate(self, residual, x0, args, step, event_dim=event_dim, scale=scale, gather=gather)


@dataclass(frozen=True, kw_only=True)
class Anderson(Settings):
    """Accelerates the fixed point: takes the combination of the last steps with the smallest residual.

    Each row has its own history, which it discards when its residual grows a hundredfold in one step.

    Args:
        memory: Number of past steps that are kept, usually 3 to 5.

    Raises:
        ValueError: if a setting is out of range.

    References:
        Walker and Ni (2011), *Anderson acceleration for fixed-point iterations*, Eq. 2.2 (type II).

    Example:
        >>> from pyro_invflows.solvers import Anderson
        >>> y = torch.randn(4, 3, dtype=torch.float64)
        >>> solution = Anderson()(lambda x, y: x + 0.9 * torch.sin(x).roll(1, -1) - y, y, y)
        >>> bool(solution.converged.all())
        True
    """

    memory: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_int(self.memory) or self.memory < 1:
            raise ValueError(f"Anderson: memory must be an int of at least 1, but got {self.memory!r}.")

    def __call__(
        self,
        residual: Residual,
        x0: Tensor,
        *args: Tensor,
        event_dim: int = 1,
        scale: Tensor | None = None,
        gather: bool = True,
    ) -> Solution:
        batch = x0.shape[: x0.dim() - event_dim]
        size = x0.shape[len(batch) :].numel()
        # rows of differences: (*B, memory, size); the last x and r; the step count, to find the oldest slot
        state: State = (
            x0.new_zeros(*batch, self.memory, size),
            x0.new_zeros(*batch, self.memory, size),
            x0.new_zeros(batch),
        )
        slots = torch.arange(self.memory, device=x0.device)

        def step(
            residual: Residual, x: Tensor, r: Tensor, state: State, args: State, seeking: Tensor
        ) -> tuple[Tensor, Tensor, State]:
            dx, dr, count = state
            flat = r.reshape(*count.shape, 1, size)
            gram = dr @ dr.mT if lacks_float64(dr.device) else (dr @ dr.mT).double()
            # empty slots are zero rows: the ridge gives them a coefficient of zero
            ridge = gram.diagonal(dim1=-2, dim2=-1).sum(-1) * 1e-14 + torch.finfo(x.dtype).tiny
            gram = gram + torch.diag_embed(ridge.unsqueeze(-1).expand(*count.shape, self.memory))
            right = (dr @ flat.mT).to(gram.dtype)
            finite = gram.isfinite().all(-1).all(-1) & right.isfinite().all(-1).all(-1)
            eye = torch.eye(self.memory, dtype=gram.dtype, device=gram.device)
            gram = where_rows(finite, gram, eye.expand_as(gram))
            gamma = where_rows(finite, linalg.solve(gram, right), torch.zeros_like(right)).to(x.dtype)
            change = flat - gamma.mT @ (dr - dx)
            new_x = x - change.reshape(x.shape)
            new_r = residual(new_x, *args)
            grown = new_r.reshape(*count.shape, size).norm(dim=-1) > 100 * flat.squeeze(-2).norm(dim=-1)
            slot = (slots == (count % self.memory).unsqueeze(-1)).unsqueeze(-1) & ~grown[..., None, None]
            dx = torch.where(slot, (new_x - x).reshape(flat.shape), where_rows(grown, torch.zeros_like(dx), dx))
            dr = torch.where(slot, (new_r - r).reshape(flat.shape), where_rows(grown, torch.zeros_like(dr), dr))
            return new_x, new_r, (dx, dr, count + 1)

        return iterate(self, residual, x0, args, step, state, event_dim=event_dim, scale=scale, gather=gather)


@dataclass(frozen=True, kw_only=True)
class Newton(Settings):
    """Newton's method with a line search in each row.

    Args:
        max_steps: Maximum number of steps; default 50.
        max_halvings: Maximum number of halvings of a step that does not reduce the residual.
        polish: Number of further steps once the tolerance is met; each is kept only if it improves the residual. The
            first one reduces the error of most rows to rounding.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> from pyro_invflows.solvers import Newton
        >>> y = torch.randn(4, 3, dtype=torch.float64)
        >>> solution = Newton()(lambda x, y: x**3 + x - y, y, y)
        >>> bool(solution.converged.all())
        True
    """

    max_halvings: int = 10
    polish: int = 1

    default_max_steps = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_halvings", "polish"):
            value = getattr(self, name)
            if not is_int(value) or value < 0:
                raise ValueError(f"Newton: {name} must be an int of at least 0, but got {value!r}.")

    def __call__(
        self,
        residual: Residual,
        x0: Tensor,
        *args: Tensor,
        step: Callable[..., Tensor] | None = None,
        event_dim: int = 1,
        scale: Tensor | None = None,
        gather: bool = True,
    ) -> Solution:
        """Solve.

        Args:
            residual: ``residual(x, *args)``.
            x0: Start, ``(*B, *E)``.
            *args: Tensors that differ from row to row.
            step: ``step(x, r, *args)`` returns d with ``J(x) d = r``, for Jacobians with a structure; by default the
                Jacobian is built by ``E`` vector-Jacobian products, and the system solved without structure.
            event_dim: Number of dimensions of E.
            scale: y, whose size ``rtol`` refers to, shaped like x0.
            gather: As in the module's docstring.
        """

        def dense(x: Tensor, r: Tensor, *args: Tensor) -> Tensor:
            jacobian = dense_jacobian(lambda x: residual(x, *args), x, event_dim)
            # a singular or non-finite Jacobian must not stop the other rows
            bad = ~jacobian.isfinite().all(-1).all(-1)
            eye = torch.eye(jacobian.shape[-1], dtype=x.dtype, device=x.device)
            jacobian = where_rows(bad, eye.expand_as(jacobian), jacobian)
            return _solve_rows(jacobian, r.reshape(jacobian.shape[:-1])).reshape(r.shape)

        direction = dense if step is None else step
        one_step = _damped(direction, event_dim, self.max_halvings, gather)
        return iterate(
            self, residual, x0, args, one_step, event_dim=event_dim, scale=scale, gather=gather, polish=self.polish
        )


@dataclass(frozen=True, kw_only=True)
class Sweeps(Settings):
    """Solves equations whose Jacobian is triangular for some ordering of the unknowns, by sweeps over all of them.

    A sweep solves each equation for its own unknown, with the others as the last sweep left them. After k sweeps the
    first k unknowns in that ordering are solved, so there are at most as many sweeps as unknowns, and usually far
    fewer.

    Args:
        max_steps: Maximum number of sweeps; default the number of unknowns.
        polish: Number of further sweeps once the tolerance is met; each is kept only if it improves the residual.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> from pyro_invflows.solvers import Sweeps
        >>> y = torch.randn(4, 3, dtype=torch.float64)
        >>> def residual(x, y):  # x_i + 5 sin(x_(i-1)) = y_i
        ...     return x + 5 * torch.nn.functional.pad(torch.sin(x), (1, -1)) - y
        >>> def sweep(residual, x, r, state, args, seeking):
        ...     x = x - r
        ...     return x, residual(x, *args), state
        >>> solution = Sweeps()(residual, y, y, sweep=sweep)
        >>> bool(solution.converged.all()), int(solution.num_steps.max()) <= 3
        (True, True)
    """

    polish: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_int(self.polish) or self.polish < 0:
            raise ValueError(f"Sweeps: polish must be an int of at least 0, but got {self.polish!r}.")

    def __call__(
        self,
        residual: Residual,
        x0: Tensor,
        *args: Tensor,
        sweep: Step,
        state: State = (),
        event_dim: int = 1,
        scale: Tensor | None = None,
        gather: bool = True,
    ) -> Solution:
        """Solve.

        Args:
            residual: ``residual(x, *args)``.
            x0: Start, ``(*B, *E)``.
            *args: Tensors that differ from row to row.
            sweep: A single sweep, as ``step`` in :func:`~pyro_invflows.solvers.iterate`.
            state: Tensors that a sweep passes on to the next.
            event_dim: Number of dimensions of E.
            scale: y, whose size ``rtol`` refers to, shaped like x0.
            gather: As in the module's docstring.
        """
        settings = replace(self, max_steps=self.bound(x0.shape[x0.dim() - event_dim :].numel()))
        return iterate(
            settings,
            residual,
            x0,
            args,
            sweep,
            state,
            event_dim=event_dim,
            scale=scale,
            gather=gather,
            polish=self.polish,
        )


def _solve_rows(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solve for each row; if LU finds an exactly singular matrix, shift all by a minimal multiple of the identity."""
    try:
        return linalg.solve(matrix, rhs.unsqueeze(-1)).squeeze(-1)
    except torch.linalg.LinAlgError:
        shift = matrix.abs().amax((-2, -1), keepdim=True) * torch.finfo(matrix.dtype).eps ** 0.5
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return linalg.solve(matrix + shift.clamp_min(torch.finfo(matrix.dtype).tiny) * eye, rhs.unsqueeze(-1)).squeeze(
            -1
        )


def _damped(direction: Callable[..., Tensor], event_dim: int, max_halvings: int, gather: bool) -> Step:
    """Return Newton's step with backtracking on the residual's norm, in the rows that need it."""

    def norm(r: Tensor) -> Tensor:
        return r.flatten(-event_dim).norm(dim=-1) if event_dim else r.abs()

    def step(
        residual: Residual, x: Tensor, r: Tensor, state: State, args: State, seeking: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        d = direction(x, r, *args)
        new_x = x - d
        new_r = residual(new_x, *args)
        if is_blind(x):
            return new_x, new_r, state
        before = norm(r)
        fraction = 1.0
        for _ in range(max_halvings):
            # NaN fails the comparison too
            poor = seeking & ~(norm(new_r) <= (1 - 1e-4 * fraction) * before)
            if not holds_anywhere(poor):
                break
            fraction /= 2
            if gather and poor.numel() > 1 and not in_functorch():
                some = x[poor] - fraction * d[poor]
                new_x = new_x.index_put((poor,), some)
                new_r = new_r.index_put((poor,), residual(some, *(a[poor] for a in args)))
            else:
                new_x = where_rows(poor, x - fraction * d, new_x)
                new_r = where_rows(poor, residual(new_x, *args), new_r)
        return new_x, new_r, state

    return step


def dense_jacobian(function: Callable[[Tensor], Tensor], x: Tensor, event_dim: int = 1) -> Tensor:
    """Return the Jacobian of a row-wise function, event flattened: ``(*B, E, E)``, by E vector-Jacobian products.

    It is a constant: no graph is kept. Each element of the batch must depend on itself only.
    """
    batch = x.shape[: x.dim() - event_dim]
    if in_functorch() or torch.compiler.is_compiling():
        value, pullback, *_ = torch.func.vjp(function, x)
        size = value.shape[len(batch) :].numel()
        bases = _bases(value, batch, size)
        if torch.compiler.is_compiling():  # one product in the graph instead of E
            rows = torch.vmap(lambda basis: pullback(basis)[0], out_dims=len(batch))(torch.stack(bases))
        else:
            rows = torch.stack([pullback(basis)[0] for basis in bases], dim=len(batch))
        return rows.reshape(*batch, size, size)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = function(x)
        return jacobian_of(value, x, event_dim)


def jacobian_of(value: Tensor, x: Tensor, event_dim: int = 1, *, create_graph: bool = False) -> Tensor:
    """Return ``d value / d x`` ``(*B, E, E)`` from the graph of ``value``, which is retained."""
    batch = x.shape[: x.dim() - event_dim]
    size = x.shape[len(batch) :].numel()
    if not value.requires_grad:
        return x.new_zeros(*batch, size, size)
    rows = []
    for basis in _bases(value, batch, size):
        (row,) = torch.autograd.grad(value, x, basis, retain_graph=True, create_graph=create_graph, allow_unused=True)
        rows.append(torch.zeros_like(x) if row is None else row)
    return torch.stack(rows, dim=len(batch)).reshape(*batch, size, size)


def _bases(value: Tensor, batch: torch.Size, size: int) -> list[Tensor]:
    eye = torch.eye(size, dtype=value.dtype, device=value.device)
    return [e.reshape(value.shape[len(batch) :]).expand(value.shape) for e in eye]
