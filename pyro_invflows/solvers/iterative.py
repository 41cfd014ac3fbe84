r"""Root finders for a whole event at once: fixed point, Anderson acceleration, Newton, sweeps.

Each is a frozen object of settings, called as ``solver(residual, x0, *args)``. ``residual(x, *args)`` returns
:math:`f(x) - y` row by row; tensors that differ from row to row go through ``args``, with the batch dimensions of
``x0`` in front, so that rows that are done can leave the evaluation (``gather=True``). Under ``torch.func`` and
while compiling no value can be looked at: then every row takes all ``max_steps`` steps, masked, and nothing is
gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_invflows import linalg
from pyro_invflows.solvers.rows import Residual, State, Step, iterate
from pyro_invflows.solvers.settings import Settings
from pyro_invflows.solvers.solution import Solution, in_transform, where_rows
from pyro_invflows.support.checks import is_int
from pyro_invflows.support.devices import lacks_float64
from pyro_invflows.support.modes import in_functorch

__all__ = ["Anderson", "FixedPoint", "Newton", "Sweeps", "dense_jacobian"]


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Settings):
    """Repeats ``x <- x - damping * (f(x) - y)``: Picard iteration.

    Converges where ``x - f(x)`` is a contraction, by its constant at each step; elsewhere it diverges, and says so.

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
    """Accelerates the fixed point by the combination of the last steps with the smallest residual.

    Each row has its own memory, and forgets it when its residual grows a hundredfold in one step.

    Args:
        memory: Steps remembered, 3 to 5 as a rule.

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
        max_steps: Bound on the steps; default 50.
        max_halvings: Halvings of a step that does not reduce the residual.
        polish: Further steps once the tolerance is met; each is kept only where it improves the residual. The first
            brings most rows to rounding.

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
            step: ``step(x, r, *args)`` returns d with ``J(x) d = r``, where the Jacobian has a structure; the default
                builds it by ``E`` vector-Jacobian products and solves in general.
            event_dim: Number of dimensions of E.
            scale: ``|y|`` in the tolerance, shaped like x0.
            gather: As in the module's docstring.
        """

        def dense(x: Tensor, r: Tensor, *args: Tensor) -> Tensor:
            jacobian = dense_jacobian(lambda x: residual(x, *args), x, event_dim)
            # a singular or non-finite Jacobian is no reason to stop the other rows
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
    """Solves equations whose Jacobian is triangular in some order of the unknowns, all at once, again and again.

    A sweep solves each equation for its own unknown, the others being what the last sweep made them. After k sweeps the
    first k unknowns in that order are exact, so that no more sweeps are needed than there are unknowns; as a rule far
    fewer are.

    Args:
        max_steps: Bound on the sweeps; default the number of unknowns.
        polish: Further sweeps once the tolerance is met; each is kept only where it improves the residual.

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
            sweep: One sweep, as ``step`` in :func:`~pyro_invflows.solvers.iterate`.
            state: What a sweep hands on to the next.
            event_dim: Number of dimensions of E.
            scale: ``|y|`` in the tolerance, shaped like x0.
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
    """Solve for each row; exactly singular matrices, which LU refuses, get a minimal shift."""
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
        if in_transform(x):
            return new_x, new_r, state
        before = norm(r)
        fraction = 1.0
        for _ in range(max_halvings):
            # NaN fails the comparison too
            poor = seeking & ~(norm(new_r) <= (1 - 1e-4 * fraction) * before)
            if not poor.any():
                break
            fraction /= 2
            if gather and poor.numel() > 1:
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

    A constant: no graph is kept. Row by row means that no element of the batch depends on another.
    """
    batch = x.shape[: x.dim() - event_dim]
    if in_functorch():
        value, pullback, *_ = torch.func.vjp(function, x)
        size = value.shape[len(batch) :].numel()
        rows = [pullback(basis)[0] for basis in _bases(value, batch, size)]
        return torch.stack(rows, dim=len(batch)).reshape(*batch, size, size)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = function(x)
        return jacobian_of(value, x, event_dim)


def jacobian_of(value: Tensor, x: Tensor, event_dim: int = 1, *, create_graph: bool = False) -> Tensor:
    """Return ``d value / d x`` ``(*B, E, E)`` from the graph that made ``value``, which is kept."""
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
