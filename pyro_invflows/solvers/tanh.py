r"""The scalar equation that planar and Sylvester layers reduce to, solved for any valid parameters.

With d > 0 the left side of :math:`s + (d - 1) \tanh s = c` increases in s, and is convex or concave on either side of
zero. Started at the appropriate end of the bracket ``|s - c| <= |d - 1|``, Newton's method approaches the root from one
side and needs no safeguard.

:func:`tanh_root` has an implicit gradient, with derivatives of all orders, in reverse and forward mode and under
``torch.func``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_invflows.solvers.iterative import Newton
from pyro_invflows.solvers.loop import repeat
from pyro_invflows.solvers.solution import Solution, Status, finish, is_blind
from pyro_invflows.support.derivatives import may_differentiate, steps_with_graph
from pyro_invflows.support.modes import forward_levels

__all__ = ["plain_tanh_root", "solve_tanh", "tanh_root", "tanh_slope"]

#: Scalar Newton steps before the residual is first checked, between later checks, and in all. Usually 6 suffice; |d|
#: near 1e8 takes 20.
_SCALAR_STEPS = 6
_MORE_SCALAR_STEPS = 2
_MAX_SCALAR_STEPS = 40
#: Steps before the residual is first checked, where each check costs little.
_PLAIN_STEPS = 4


def tanh_slope(h: Tensor, d: Tensor) -> Tensor:
    """Return ``1 + (d - 1) tanh'(s)`` for ``h = tanh(s)``, as a sum of positive terms: no cancellation."""
    square = h * h
    return square + d * (1 - square)


def _start(c: Tensor, d: Tensor) -> Tensor:
    """Return the end of the bracket from which Newton's method is monotone."""
    a = c.abs()
    t = d - 1
    shifted, scaled = a - t, a / d
    upper = torch.minimum(shifted, scaled)
    if is_blind(d) or bool((d < 0.5).any()):
        # tanh s <= s - s^3/5 on [0, 1], which bounds the root where the slope at 0 nearly vanishes
        cubic = ((5 * a / t.abs().clamp_min(torch.finfo(c.dtype).tiny)).log() / 3).exp()
        upper = torch.where(cubic <= 1, torch.minimum(upper, cubic), upper)
    return torch.copysign(torch.where(t >= 0, torch.maximum(shifted, scaled), upper), c)


def _status(met: Tensor, finite: Tensor) -> Tensor:
    status = torch.where(met, int(Status.CONVERGED), int(Status.MAX_STEPS))
    return torch.where(finite, status, int(Status.NONFINITE)).to(torch.int8)


def solve_tanh(c: Tensor, d: Tensor, settings: Newton | None = None) -> Solution:
    """Solve ``s + (d - 1) tanh(s) = c`` element by element; no gradient.

    Every element takes six steps, which usually suffice; elements that need more go on without the others.

    Args:
        c: Any shape.
        d: Positive, broadcasts with c.
        settings: Tolerances and ``max_steps``, of which at most 40 are taken.
    """
    return _scalar_newton(c, d, Newton() if settings is None else settings)[0]


@torch.no_grad()
def plain_tanh_root(c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return the s with ``s + (d - 1) tanh(s) = c``, and tanh(s), up to rounding, in as few operations as possible.

    All elements take steps until the last one has converged, at most 40; for few elements at a time. No gradient.

    Args:
        c: Any shape.
        d: Positive, shaped like c; far below 1 / eps, or rounding would leave nothing of the slope.
    """
    t = d - 1
    a = c.abs()
    shifted, scaled = a - t, a / d
    # the end of the bracket from which Newton's method is monotone, as in _start, where d may be very small
    s = torch.where(t >= 0, torch.maximum(shifted, scaled), torch.minimum(shifted, scaled)).copysign_(c)
    goal = (t.abs() + a).add_(1).mul_(4 * torch.finfo(c.dtype).eps)
    for step in range(_MAX_SCALAR_STEPS):
        h = torch.tanh(s)
        r = torch.addcmul(s - c, t, h)
        if step >= _PLAIN_STEPS and not bool((r.abs() > goal).any()):  # NaN is left as it is
            break
        s = torch.addcdiv(s, r, torch.addcmul(d, h.mul_(h), t, value=-1), value=-1)
    else:
        h = torch.tanh(s)
    return s, h


def _scalar_newton(c: Tensor, d: Tensor, settings: Newton) -> tuple[Solution, bool]:
    """Return the solution, and whether every element has converged to rounding error."""
    t = d - 1
    s = _start(c, d)
    size = t.abs() + 1 + c.abs()
    goal = size * (4 * torch.finfo(s.dtype).eps)
    bound = min(settings.bound(_MAX_SCALAR_STEPS), _MAX_SCALAR_STEPS)
    taken = min(_SCALAR_STEPS, bound)
    s, r = _scalar_steps(s, c, d, t, taken)
    steps = torch.full_like(s, taken, dtype=torch.int32)
    todo = ~(r <= goal)
    if is_blind(c):

        def advance(todo: Tensor, s: Tensor, r: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
            new_s, new_r = _scalar_steps(s, c, d, t, 1)
            s, r, steps = torch.where(todo, new_s, s), torch.where(todo, new_r, r), steps + todo.to(steps.dtype)
            return todo & (r > goal), s, r, steps

        _, s, r, steps = repeat(advance, todo & r.isfinite(), s, r, steps, bound=bound - taken)
    elif not todo.any():
        return Solution(s, torch.zeros_like(steps, dtype=torch.int8), steps, r), True
    elif taken < bound:
        # the remaining elements go on alone
        rows = (todo & r.isfinite()).reshape(-1).nonzero().squeeze(-1)
        flat, error, count = (a.reshape(-1) for a in (s, r, steps))
        parts = [a.expand(s.shape).reshape(-1)[rows] for a in (c, d, t, goal)]
        while taken < bound and rows.numel():
            more = min(_MORE_SCALAR_STEPS, bound - taken)
            taken += more
            some, rest = _scalar_steps(flat[rows], parts[0], parts[1], parts[2], more)
            flat[rows], error[rows], count[rows] = some, rest, taken
            left = rest > parts[3]
            rows, parts = rows[left], [a[left] for a in parts]
        s, r, steps = (a.reshape(s.shape) for a in (flat, error, count))
    atol, rtol = settings.tolerances(s.dtype)
    return Solution(s, _status(r <= atol + rtol * size, r.isfinite()), steps, r), False


def _scalar_steps(s: Tensor, c: Tensor, d: Tensor, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Take Newton steps; return the point and the size of its residual."""
    least = d.clamp_max(1)
    for _ in range(count):
        h = torch.tanh(s)
        # a cheaper form of the slope, bounded because rounding may leave nothing of it; only the step depends on it
        slope = torch.maximum(torch.addcmul(d, h * h, t, value=-1), least)
        s = torch.addcdiv(s, torch.addcmul(s - c, t, h), slope, value=-1)
    return s, torch.addcmul(s - c, t, torch.tanh(s)).abs()


class _TanhRoot(torch.autograd.Function):
    """``s(c, d)``. Its derivative is a function of its own output, so that it has derivatives of all orders."""

    @staticmethod
    def forward(c: Tensor, d: Tensor, settings: Newton, owner: str) -> Tensor:
        solution, done = _scalar_newton(c, d, settings)
        return solution.value if done else finish(solution, owner, settings, given=c.expand_as(solution.value))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        c, d, *_ = inputs
        ctx.shape = c.shape
        ctx.save_for_backward(output, d)
        ctx.save_for_forward(output, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        s, d = ctx.saved_tensors
        h = torch.tanh(s)
        v = grad / tanh_slope(h, d)
        return v.sum_to_size(ctx.shape), (-v * h).sum_to_size(d.shape), None, None

    @staticmethod
    def jvp(ctx: Any, dc: Tensor | None, dd: Tensor | None, *_: None) -> Tensor:
        s, d = ctx.saved_tensors
        h = torch.tanh(s)
        change = torch.zeros_like(s)
        if dc is not None:
            change = change + dc
        if dd is not None:
            change = change - dd * h
        return change / tanh_slope(h, d)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], c: Tensor, d: Tensor, *rest: Any) -> tuple[Tensor, int]:
        c, d = _in_front([c, d], in_dims, [0, 0])
        return _TanhRoot.apply(c, d, *rest), 0


def _in_front(tensors: list[Tensor], in_dims: tuple[int | None, ...], events: list[int]) -> list[Tensor]:
    """Move vmap's dimension to the front of the batch dimensions, which then line up from the right."""
    depth = max(
        t.dim() - (dim is not None) - event
        for t, dim, event in zip(tensors, in_dims[: len(tensors)], events, strict=True)
    )
    moved = []
    for t, dim, event in zip(tensors, in_dims[: len(tensors)], events, strict=True):
        if dim is not None:
            t = t.movedim(dim, 0)
            t = t.reshape(t.shape[0], *(1,) * (depth - (t.dim() - 1 - event)), *t.shape[1:])
        moved.append(t)
    if all(t.dim() - event < depth + 1 for t, event in zip(moved, events, strict=True)):
        return moved
    # the output must have the dimension even if c does not
    size = next(t.shape[0] for t, dim in zip(moved, in_dims, strict=False) if dim is not None)
    c = moved[0]
    if c.dim() - events[0] < depth + 1:
        c = c.reshape(*(1,) * (depth + 1 - c.dim() + events[0]), *c.shape)
        c = c.expand(size, *c.shape[1:])
    return [c, *moved[1:]]


def tanh_root(c: Tensor, d: Tensor, settings: Newton | None = None, *, owner: str = "tanh_root") -> Tensor:
    """Return the solution of ``s + (d - 1) tanh(s) = c``, element by element, differentiable in c and d.

    Args:
        c: Any shape; each element counts as a row.
        d: Positive, broadcasts with c.
        settings: Tolerances and what to do on failure.
        owner: Name used in error messages.

    Raises:
        ConvergenceError: if an element did not converge and the settings say so.

    Example:
        >>> from pyro_invflows.solvers import tanh_root
        >>> c, d = torch.randn(5, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
        >>> s = tanh_root(c, d)
        >>> torch.allclose(s - 0.9 * torch.tanh(s), c)
        True
    """
    settings = Newton() if settings is None else settings
    if torch.compiler.is_compiling():
        with torch.no_grad():
            s = finish(solve_tanh(c.detach(), d.detach(), settings), owner, settings)
    else:
        root = _TanhRoot.apply if may_differentiate(c, d) else _TanhRoot.forward
        s = root(c, d, settings, owner)
        if forward_levels() < 2:
            return s
    for _ in range(steps_with_graph()):
        h = torch.tanh(s)
        s = s - (s - c + (d - 1) * h) / tanh_slope(h, d)
    return s
