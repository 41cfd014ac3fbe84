"""Newton's method for increasing functions of one variable, inside a bracket that is known to hold the root."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_invflows.solvers.solution import Solution, Status, in_transform

__all__ = ["bracketed_newton"]

#: Number of steps if the values cannot be inspected.
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
        max_steps: Maximum number of steps; usually far fewer are needed. While compiling, on the meta device and under
            ``torch.func``, where values cannot be inspected, 40 are taken.
    """
    eps = torch.finfo(y.dtype).eps
    goal = 4 * eps * (1 + y.abs())
    blind = in_transform(y)
    x = start
    last = torch.full_like(y, torch.inf)
    steps = torch.zeros_like(y, dtype=torch.int32)
    done = torch.zeros_like(y, dtype=torch.bool)
    size = last
    for _ in range(_BLIND_STEPS if blind else max_steps):
        value, log_slope = function(x)
        residual = value - y
        size = residual.abs()
        low, high = torch.where(residual < 0, x, low), torch.where(residual > 0, x, high)
        met = (size <= goal) | (high - low <= 2 * eps * x.abs())
        done = done | met | ~residual.isfinite()
        if not blind and done.all():
            break
        steps = steps + (~done).to(steps.dtype)
        new = x - residual * (-log_slope).exp()
        trusted = (size <= 0.5 * last) & (new > low) & (new < high)
        new = torch.where(trusted, new, 0.5 * low + 0.5 * high)
        x, last = torch.where(done, x, new), size
    status = torch.where(done, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(size.isfinite(), status, int(Status.NONFINITE))
    return Solution(x, status.to(torch.int8), steps, size)
