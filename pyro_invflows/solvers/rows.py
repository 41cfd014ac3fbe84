"""The loop of every solver: each row iterates independently and leaves when it is done."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_invflows.solvers.loop import repeat
from pyro_invflows.solvers.settings import Settings
from pyro_invflows.solvers.solution import Solution, Status, in_transform, row_max, where_rows

__all__ = ["iterate"]

#: Rows are gathered once at most this fraction of them is still active; otherwise gathering would cost more.
_GATHER_BELOW = 0.75

Residual = Callable[..., Tensor]
State = tuple[Tensor, ...]
#: ``step(residual, x, r, state, args, seeking)``; ``seeking`` marks rows that have not met their tolerance yet.
Step = Callable[[Residual, Tensor, Tensor, State, tuple[Tensor, ...], Tensor], tuple[Tensor, Tensor, State]]


@torch.no_grad()
def iterate(
    settings: Settings,
    residual: Residual,
    x0: Tensor,
    args: tuple[Tensor, ...],
    step: Step,
    state: State = (),
    *,
    event_dim: int,
    scale: Tensor | None,
    gather: bool,
    polish: int = 0,
) -> Solution:
    """Run ``step`` until every row has converged, failed or run out of steps.

    Args:
        settings: Tolerances and ``max_steps``.
        residual: ``residual(x, *args) -> f(x) - y``, row by row.
        x0: Starting point ``(*B, *E)``.
        args: Tensors whose leading dimensions are B (they may be expanded views).
        step: ``step(residual, x, r, state, args, seeking) -> x, r, state``. Rows that are not seeking keep their point
            if a step does not improve it, so the step need not take special care of them.
        state: Tensors with the leading dimensions B that a step passes on to the next.
        event_dim: Number of dimensions of E.
        scale: y, whose size ``rtol`` refers to, shaped like x0; default x0.
        gather: Drop rows that are done from the evaluation, not only from the result.
        polish: Number of further steps after a row has converged; the better point is kept.
    """
    batch = x0.shape[: x0.dim() - event_dim]
    atol, rtol = settings.tolerances(x0.dtype)
    x, r = x0, residual(x0, *args)

    tolerance = atol + rtol * row_max(x0 if scale is None else scale, event_dim)
    error = row_max(r, event_dim)
    met = (error <= tolerance) & error.isfinite()  # an infinite y makes the tolerance infinite
    left = torch.where(met, polish, polish + 1)
    active = error.isfinite() & (left > 0)
    steps = torch.zeros_like(error, dtype=torch.int32)
    max_steps = settings.bound()

    def advance(
        tolerance: Tensor,
        args: State,
        active: Tensor,
        x: Tensor,
        r: Tensor,
        error: Tensor,
        met: Tensor,
        left: Tensor,
        steps: Tensor,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        # a row that has not met its tolerance within max_steps is not polished
        active = active & ((steps < max_steps) | met)
        new_x, new_r, state = step(residual, x, r, state, args, active & ~met)
        new_error = row_max(new_r, event_dim)
        new_met = (new_error <= tolerance) & new_error.isfinite()
        # while polishing, only improvements are taken
        take = active & (~met | (new_error < error))
        x, r = where_rows(take, new_x, x), where_rows(take, new_r, r)
        error = torch.where(take, new_error, error)
        steps = steps + active.to(steps.dtype)
        left = torch.where(met | new_met, left - 1, left)
        met = met | (active & new_met)
        return active & error.isfinite() & (left > 0), x, r, error, met, left, steps, *state

    now: tuple[Tensor, ...] = (active, x, r, error, met, left, steps, *state)
    if in_transform(x0) or not gather:
        _, x, _, error, met, _, steps, *_ = repeat(
            lambda *now: advance(tolerance, args, *now), *now, bound=max_steps + polish
        )
        return _solution(x, error, met, steps)
    # the whole batch, written to when rows leave
    whole: list[Tensor] = []
    rows: Tensor | None = None
    for _ in range(max_steps + polish):
        active = now[0]
        if not active.any():
            break
        if active.numel() > 1 and active.sum() <= _GATHER_BELOW * active.numel():
            done = [now[i] for i in _RESULTS]
            if rows is None:
                whole = [t.reshape(batch.numel(), *t.shape[len(batch) :]).clone() for t in done]
                rows = active.reshape(-1).nonzero().squeeze(-1)
            else:
                for all_rows, some in zip(whole, done, strict=True):
                    all_rows[rows] = some
                rows = rows[active]
            now, args, tolerance = tuple(t[active] for t in now), tuple(t[active] for t in args), tolerance[active]
        now = advance(tolerance, args, *now)
    results = [now[i] for i in _RESULTS]
    if rows is not None:
        for all_rows, some in zip(whole, results, strict=True):
            all_rows[rows] = some
        results = [whole[0].reshape(x0.shape), *(t.reshape(batch) for t in whole[1:])]
    return _solution(*results)


#: Positions of x, error, met and steps among the tensors that a round passes on.
_RESULTS = 1, 3, 4, 6


def _solution(x: Tensor, error: Tensor, met: Tensor, steps: Tensor) -> Solution:
    status = torch.where(met, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(met | error.isfinite(), status, int(Status.NONFINITE))
    return Solution(x, status.to(torch.int8), steps, error)
