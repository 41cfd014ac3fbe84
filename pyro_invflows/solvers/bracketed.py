"""Newton's method for increasing functions of one variable, inside a bracket that is known to hold the root."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_invflows.solvers.loop import repeat
from pyro_invflows.solvers.solution import Solution, Status, is_blind

__all__ = ["bracketed_newton"]

#: Number of steps on the meta device and under ``torch.jit.trace``, where a loop cannot end early.
_BLIND_STEPS = 40


@torch.no_grad()
def bracketed_newton(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    y: Tensor,
    low: Tensor,
    high: Tensor,
    start: Tensor,
    *,
    max_steps: int = 400,
) -> Solution:
    """Solve ``f(x) = y``, element by element; no gradient.

    A Newton step is taken if it stays inside the bracket and the last step at least halved the residual; otherwise the
    bracket is halved. An element is done when its residual or its bracket has shrunk to rounding error: then f is so
    flat, or so steep, that no float reproduces y any better.

    Args:
        function: ``x -> f(x), log f'(x)``, with f increasing.
        y: Any shape.
        low: Lower ends of the brackets, ``f(low) <= y``, shaped like y.
        high: Upper ends of the brackets, ``f(high) >= y``, shaped like y.
        start: Starting points inside the brackets.
        max_steps: Maximum number of steps; usually far fewer are needed. On the meta device and under
            ``torch.jit.trace``, where values cannot be inspected, 40 are taken.
    """
    eps = torch.finfo(y.dtype).eps
    goal = 4 * eps * (1 + y.abs())

    def advance(todo: Tensor, x: Tensor, low: Tensor, high: Tensor, last: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
        value, log_slope = function(x)
        residual = value - y
        size = residual.abs()
        low, high = torch.where(residual < 0, x, low), torch.where(residual > 0, x, high)
        met = (size <= goal) | (high - low <= 2 * eps * x.abs())
        todo = todo & ~met & residual.isfinite()
        steps = steps + todo.to(steps.dtype)
        new = x - residual * (-log_slope).exp()
        trusted = (size <= 0.5 * last) & (new > low) & (new < high)
        new = torch.where(trusted, new, 0.5 * low + 0.5 * high)
        return todo, torch.where(todo, new, x), low, high, size, steps

    todo, steps = torch.ones_like(y, dtype=torch.bool), torch.zeros_like(y, dtype=torch.int32)
    bound = _BLIND_STEPS if is_blind(y) and not torch.compiler.is_compiling() else max_steps
    last = torch.full_like(y, torch.inf)
    todo, x, _, _, size, steps = repeat(advance, todo, start, low, high, last, steps, bound=bound)
    status = torch.where(todo, int(Status.MAX_STEPS), int(Status.CONVERGED))
    status = torch.where(size.isfinite(), status, int(Status.NONFINITE))
    return Solution(x, status.to(torch.int8), steps, size)
