r"""The triangular system that Sylvester layers reduce to, solved for any valid parameters.

Back-substitution reduces the system :math:`s + T \tanh(s) = c`, with T upper triangular and :math:`T_{ii} = d_i - 1 >
-1`, to m scalar equations; cheaper iterations are tried first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_invflows.linalg import rows_times
from pyro_invflows.solvers.iterative import Newton
from pyro_invflows.solvers.loop import repeat
from pyro_invflows.solvers.solution import Solution, finish, is_blind
from pyro_invflows.solvers.tanh import _in_front, _start, _status, solve_tanh, tanh_slope
from pyro_invflows.support.derivatives import may_differentiate, steps_with_graph
from pyro_invflows.support.modes import forward_levels

__all__ = ["solve_triangular_tanh", "triangular_tanh_root"]

#: Triangular Newton steps.
_MAX_STEPS = 8
#: Diagonal Newton steps between two checks of the residual, and in all.
_CHEAP_STEPS = 3
_MAX_CHEAP_STEPS = 15
#: The remaining rows go on without the others once they are at most this fraction of all.
_GATHER_BELOW = 0.25


def _newton_matrix(h: Tensor, strict: Tensor, d: Tensor) -> Tensor:
    """Return ``I + T diag(h')``, upper triangular; its diagonal is computed without cancellation."""
    slope = 1 - h * h
    return strict * slope.unsqueeze(-2) + torch.diag_embed(tanh_slope(h, d))


def solve_triangular_tanh(
    c: Tensor,
    strict: Tensor,
    d: Tensor,
    settings: Newton | None = None,
    *,
    cheap_steps: int = _MAX_CHEAP_STEPS,
) -> Solution:
    """Solve ``s + (d - 1) tanh(s) + strict tanh(s) = c``, with ``strict`` strictly upper triangular; no gradient.

    All rows first take Newton steps with the diagonal of the Jacobian; what these neglect is nilpotent. Rows that need
    more take Newton steps with the triangular Jacobian, and the rest is solved by back-substitution, which cannot fail.
    A row has converged when each equation holds to within ``atol + rtol`` times the size of its terms.

    Args:
        c: ``(*S, m)``.
        strict: ``(*B, m, m)``; B broadcasts with S.
        d: ``(*B, m)``, positive.
        settings: Tolerances; ``max_steps`` bounds the triangular Newton steps, by default 8.
        cheap_steps: Maximum number of diagonal steps.

    Returns:
        The solution; ``num_steps`` counts diagonal and triangular steps of a row together, and is one more than
        their maximum if back-substitution solved it.
    """
    settings = Newton() if settings is None else settings
    system = _System(c, strict, d)
    if is_blind(c):
        return system.solution(*_sweeps(system, 8 * torch.finfo(c.dtype).eps), settings)
    goal = 8 * torch.finfo(c.dtype).eps
    todo = system.c.isfinite().all(-1)
    s, r, steps, todo = _diagonal_steps(system, _start(system.c, d), todo, cheap_steps, goal, share=_GATHER_BELOW)
    if todo.any():
        # the remaining rows go on alone, with the steps that they would have taken among the others
        some, taken = system.rows(todo), steps[todo]
        left = torch.ones_like(taken, dtype=torch.bool)
        rest, r_rest, more, left = _diagonal_steps(some, s[todo], left, cheap_steps - int(taken.amax()), goal)
        taken = taken + more
        if left.any():
            rest, r_rest = rest.clone(), r_rest.clone()
            rest[left], r_rest[left], more = _finish_rows(some.rows(left), rest[left], settings, goal)
            taken[left] += more
        s, r = s.clone(), r.clone()
        s[todo], r[todo], steps[todo] = rest, r_rest, taken
    return system.solution(s, r, steps, settings)


def _sweeps(system: _System, goal: float) -> tuple[Tensor, Tensor, Tensor]:
    """Solve all equations at once for what the last sweep found; exact after m sweeps, for the rest is nilpotent.

    Returns:
        The points, their residuals, and the number of sweeps of each row.
    """
    s = _start(system.c, system.d)
    h, r = system.look(s)
    todo = system.c.isfinite().all(-1)

    def sweep(todo: Tensor, s: Tensor, h: Tensor, r: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
        rhs = system.c - rows_times(h, system.strict.transpose(-2, -1))
        moved = todo.unsqueeze(-1)
        s = torch.where(moved, solve_tanh(rhs, system.d).value, s)
        h, r = system.look(s)
        return todo & ~(r.abs() <= goal * system.size).all(-1), s, h, r, steps + todo.to(steps.dtype)

    steps = torch.zeros_like(todo, dtype=torch.int32)
    _, s, _, r, steps = repeat(sweep, todo, s, h, r, steps, bound=s.shape[-1])
    return s, r, steps


def _diagonal_steps(
    system: _System, s: Tensor, todo: Tensor, bound: int, goal: float, share: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take diagonal Newton steps until at most a share of the rows still needs more.

    Returns:
        The points, their residuals, the number of steps of each row, and whether it still needs more. A row stops at
        the step at which it would stop alone.
    """
    small = goal * system.size
    h, r = system.look(s)
    steps = torch.zeros_like(todo, dtype=torch.int32)
    count, left, taken = todo.numel(), int(todo.sum()), 0
    while taken < bound and left > (share * count if taken else 0):
        new, new_h, new_r = s, h, r
        more = min(_CHEAP_STEPS, bound - taken)
        for _ in range(more):
            old, old_r = new, new_r
            new = system.diagonal_step(new, new_h, new_r)
            new_h, new_r = system.look(new)
        # the point before the last step decides: that step reduces its error to rounding
        done = todo & (old_r.abs() <= small).all(-1)
        now_left = left - int(done.sum())
        if now_left < left:
            # or increases it, if the slope nearly vanishes
            worse = (done & (new_r.abs().amax(-1) > old_r.abs().amax(-1))).unsqueeze(-1)
            new, new_r = torch.where(worse, old, new), torch.where(worse, old_r, new_r)
        if left < count:
            moved = todo.unsqueeze(-1)
            new, new_h, new_r = torch.where(moved, new, s), torch.where(moved, new_h, h), torch.where(moved, new_r, r)
        s, h, r = new, new_h, new_r
        steps = steps + more * todo.to(steps.dtype)
        taken += more
        todo, left = todo & ~done, now_left
    return s, r, steps, todo


class _System:
    """The equations of some rows: ``s + transposed^T tanh(s) = c``."""

    def __init__(self, c: Tensor, strict: Tensor, d: Tensor) -> None:
        self.strict, self.d = strict, d
        self.transposed = strict.mT + torch.diag_embed(d - 1)
        batch = torch.broadcast_shapes(c.shape[:-1], d.shape[:-1], strict.shape[:-2])
        self.c = c.expand(*batch, c.shape[-1])
        #: Size of the terms of the residual, for its rounding error
        self.size = 1 + self.transposed.abs().sum(-2) + self.c.abs()

    def rows(self, mask: Tensor) -> _System:
        """Return the system of the selected rows."""
        m = self.c.shape[-1]
        strict, d = self.strict, self.d
        if strict.dim() > 2 or d.dim() > 1:
            strict, d = strict.expand(*mask.shape, m, m)[mask], d.expand(*mask.shape, m)[mask]
        return _System(self.c[mask], strict, d)

    def look(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return tanh(s) and the residual."""
        h = torch.tanh(s)
        if s.dim() == 2 and self.transposed.dim() == 2:
            return h, torch.addmm(s - self.c, h, self.transposed)
        return h, s - self.c + rows_times(h, self.transposed)

    def residual(self, s: Tensor) -> Tensor:
        return self.look(s)[1]

    def diagonal_step(self, s: Tensor, h: Tensor, r: Tensor) -> Tensor:
        return torch.addcdiv(s, r, torch.addcmul(self.d, h * h, self.d - 1, value=-1), value=-1)

    def back_substitution(self, settings: Newton) -> Tensor:
        """Solve m scalar equations, that of the last coordinate first."""
        h: list[Tensor] = []
        s: list[Tensor] = []
        for i in reversed(range(self.c.shape[-1])):
            rhs = self.c[..., i]
            if h:
                rhs = rhs - (torch.stack(h, -1) * self.strict[..., i, i + 1 :].flip(-1)).sum(-1)
            s.append(solve_tanh(rhs, self.d[..., i], settings).value)
            h.append(torch.tanh(s[-1]))
        return torch.stack(s[::-1], dim=-1)

    def solution(self, s: Tensor, r: Tensor, steps: Tensor, settings: Newton) -> Solution:
        atol, rtol = settings.tolerances(s.dtype)
        r = r.abs()
        status = _status((r <= atol + rtol * self.size).all(-1), r.isfinite().all(-1))
        return Solution(s, status, steps, r.amax(-1))


def _triangular_step(system: _System, s: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    matrix = _newton_matrix(torch.tanh(s), system.strict, system.d)
    s = s - torch.linalg.solve_triangular(matrix, r.unsqueeze(-1), upper=True).squeeze(-1)
    return s, system.residual(s)


def _finish_rows(system: _System, s: Tensor, settings: Newton, goal: float) -> tuple[Tensor, Tensor, Tensor]:
    """Solve by triangular Newton steps, then by back-substitution; the rows are a single flat dimension."""
    s = torch.where(s.isfinite(), s, _start(system.c, system.d))  # a diagonal step may have sent a row far away
    r = system.residual(s)
    steps = torch.zeros(s.shape[0], dtype=torch.int32, device=s.device)
    active = torch.ones_like(steps, dtype=torch.bool)
    for _ in range(settings.bound(_MAX_STEPS)):
        if not active.any():
            break
        s[active], r[active] = _triangular_step(system.rows(active), s[active], r[active])
        steps += active
        active = ~(r.abs() <= goal * system.size).all(-1)
    done = ~active
    if settings.polish and done.any():  # a further step, to rounding error
        new_s, new_r = _triangular_step(system.rows(done), s[done], r[done])
        better = (new_r.abs().amax(-1) <= r[done].abs().amax(-1)).unsqueeze(-1)
        s[done], r[done] = torch.where(better, new_s, s[done]), torch.where(better, new_r, r[done])
    if active.any():
        some = system.rows(active)
        s[active] = some.back_substitution(Newton())
        r[active] = some.residual(s[active])
        steps += active
    return s, r, steps


class _TriangularRoot(torch.autograd.Function):
    """``s(c, strict, d)``, differentiated like the scalar root."""

    @staticmethod
    def forward(c: Tensor, strict: Tensor, d: Tensor, settings: Newton, owner: str) -> Tensor:
        return finish(solve_triangular_tanh(c, strict, d, settings), owner, settings, given=c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        c, strict, d, *_ = inputs
        ctx.shape = c.shape
        ctx.save_for_backward(output, strict, d)
        ctx.save_for_forward(output, strict, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        s, strict, d = ctx.saved_tensors
        h = torch.tanh(s)
        matrix = _newton_matrix(h, strict, d)
        v = torch.linalg.solve_triangular(matrix.mT, grad.unsqueeze(-1), upper=False).squeeze(-1)
        grad_strict = grad_d = None
        if ctx.needs_input_grad[1]:
            if strict.dim() == 2:
                grad_strict = -v.reshape(-1, v.shape[-1]).mT @ h.reshape(-1, h.shape[-1])
            else:
                grad_strict = (-v.unsqueeze(-1) * h.unsqueeze(-2)).sum_to_size(strict.shape)
        if ctx.needs_input_grad[2]:
            grad_d = (-v * h).sum_to_size(d.shape)
        return v.sum_to_size(ctx.shape), grad_strict, grad_d, None, None

    @staticmethod
    def jvp(ctx: Any, dc: Tensor | None, dstrict: Tensor | None, dd: Tensor | None, *_: None) -> Tensor:
        s, strict, d = ctx.saved_tensors
        h = torch.tanh(s)
        change = torch.zeros_like(s)
        if dc is not None:
            change = change + dc
        if dstrict is not None:
            change = change - rows_times(h, dstrict.mT)
        if dd is not None:
            change = change - dd * h
        return torch.linalg.solve_triangular(_newton_matrix(h, strict, d), change.unsqueeze(-1), upper=True).squeeze(-1)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], c: Tensor, strict: Tensor, d: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        c, strict, d = _in_front([c, strict, d], in_dims, [1, 2, 1])
        return _TriangularRoot.apply(c, strict, d, *rest), 0


def triangular_tanh_root(
    c: Tensor,
    strict: Tensor,
    d: Tensor,
    settings: Newton | None = None,
    *,
    owner: str = "triangular_tanh_root",
) -> Tensor:
    """Return the solution of ``s + (d - 1) tanh(s) + strict tanh(s) = c``, differentiable in c, strict and d.

    Args:
        c: ``(*S, m)``.
        strict: ``(*B, m, m)``, strictly upper triangular; B broadcasts with S.
        d: ``(*B, m)``, positive.
        settings: As in :func:`solve_triangular_tanh`, and what to do on failure.
        owner: Name used in error messages.

    Raises:
        ConvergenceError: if a row did not converge and the settings say so.
    """
    settings = Newton() if settings is None else settings
    if torch.compiler.is_compiling():
        with torch.no_grad():
            s = finish(solve_triangular_tanh(c.detach(), strict.detach(), d.detach(), settings), owner, settings)
    else:
        root = _TriangularRoot.apply if may_differentiate(c, strict, d) else _TriangularRoot.forward
        s = root(c, strict, d, settings, owner)
        if forward_levels() < 2:
            return s
    for _ in range(steps_with_graph()):
        h = torch.tanh(s)
        r = s - c + (d - 1) * h + rows_times(h, strict.mT)
        s = s - torch.linalg.solve_triangular(_newton_matrix(h, strict, d), r.unsqueeze(-1), upper=True).squeeze(-1)
    return s
