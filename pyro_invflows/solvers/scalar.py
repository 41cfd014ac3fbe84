"""Bracketed roots of monotone scalar functions, element by element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_invflows.solvers.loop import repeat
from pyro_invflows.solvers.settings import Settings
from pyro_invflows.solvers.solution import Solution, Status, is_blind
from pyro_invflows.support.checks import is_int
from pyro_invflows.support.modes import holds_anywhere

__all__ = ["Bisection"]


@dataclass(frozen=True, kw_only=True)
class Bisection(Settings):
    r"""Finds the root of a monotone function of one variable, for each element of a tensor.

    The bracket is doubled, from the starting point, until the sign changes. Then each step is an inverse quadratic
    interpolation if that can be trusted, and a bisection otherwise (Chandrupatla's method), so that in the long run the
    bracket shrinks at least as fast as by bisection, and usually far faster. Only function values are used, no slopes,
    and there is no gradient. An element without a sign change gets the status ``NO_BRACKET``; an end of its bracket
    never counts as a root.

    Args:
        max_steps: Maximum number of steps inside the bracket; default 100.
        max_growth: Maximum number of doublings of the bracket, whose half-width is 1 at first.
        shrink: Iterate beyond the tolerance, until the residual is smaller by this factor or the bracket has shrunk to
            rounding error.

    Raises:
        ValueError: if a setting is out of range.

    References:
        Chandrupatla (1997), *A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear function
        without using derivatives*.

    Example:
        >>> from pyro_invflows.solvers import Bisection
        >>> y = torch.tensor([-3.0, 0.0, 50.0], dtype=torch.float64)
        >>> solution = Bisection()(lambda x: x**3 + x - y, torch.zeros_like(y))
        >>> torch.allclose(solution.value**3 + solution.value, y), bool(solution.converged.all())
        (True, True)
    """

    max_growth: int = 100
    shrink: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_int(self.max_growth) or self.max_growth < 0:
            raise ValueError(f"Bisection: max_growth must be an int of at least 0, but got {self.max_growth!r}.")
        if not 0 < self.shrink <= 1:
            raise ValueError(f"Bisection: shrink must be in (0, 1], but got {self.shrink!r}.")

    @torch.no_grad()
    def __call__(
        self,
        residual: Callable[[Tensor], Tensor],
        x0: Tensor,
        *,
        low: Tensor | None = None,
        high: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Solution:
        """Solve ``residual(x) = 0``, where each element of the residual depends on the same element of x.

        Args:
            residual: Monotone function that returns the shape of its argument.
            x0: Starting points, any shape.
            low: Lower ends of the brackets, if they are known.
            high: Upper ends of the brackets, if they are known.
            scale: y, whose size ``rtol`` refers to, shaped like x0; default x0.
        """
        atol, rtol = self.tolerances(x0.dtype)
        limits = torch.finfo(x0.dtype)
        tolerance = atol + rtol * (x0 if scale is None else scale).abs()
        a = x0 - 1 if low is None else low.expand_as(x0)
        b = x0 + 1 if high is None else high.expand_as(x0)
        a, b, fa, fb = self._grow(residual, x0, a, b, fixed=low is not None and high is not None)
        bracketed = (fa.sign() * fb.sign() <= 0) & fa.isfinite() & fb.isfinite()
        c, fc = a, fa
        fraction = torch.full_like(x0, 0.5)
        closer = fa.abs() < fb.abs()
        best, f_best = torch.where(closer, a, b), torch.where(closer, fa, fb)
        active = bracketed & (f_best != 0)
        steps = torch.zeros_like(x0, dtype=torch.int32)

        def narrow(
            active: Tensor,
            a: Tensor,
            b: Tensor,
            c: Tensor,
            fa: Tensor,
            fb: Tensor,
            fc: Tensor,
            best: Tensor,
            f_best: Tensor,
            fraction: Tensor,
            steps: Tensor,
        ) -> tuple[Tensor, ...]:
            x = torch.where(active, a + fraction * (b - a), best)
            f = residual(x)
            active = active & f.isfinite()
            same = f.sign() == fa.sign()
            c, fc = torch.where(active, torch.where(same, a, b), c), torch.where(active, torch.where(same, fa, fb), fc)
            b, fb = torch.where(active & ~same, a, b), torch.where(active & ~same, fa, fb)
            a, fa = torch.where(active, x, a), torch.where(active, f, fa)
            improved = active & (f.abs() < f_best.abs())
            best, f_best = torch.where(improved, x, best), torch.where(improved, f, f_best)
            steps = steps + active.to(steps.dtype)
            width = (b - a).abs()
            finest = 2 * limits.eps * best.abs() + limits.tiny
            active = active & (f_best.abs() > self.shrink * tolerance) & (width > finest)
            # inverse quadratic interpolation if the three points are close to a parabola
            xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
            trusted = (1 - (1 - xi).clamp_min(0).sqrt() < phi) & (phi < xi.clamp_min(0).sqrt())
            alpha = (c - a) / (b - a)
            quadratic = fa / (fa - fb) * fc / (fc - fb) - alpha * fa / (fc - fa) * fb / (fb - fc)
            fraction = torch.where(trusted & quadratic.isfinite(), quadratic, 0.5)
            least = (0.5 * finest / width.clamp_min(limits.tiny)).clamp_max(0.5)
            fraction = torch.minimum(torch.maximum(fraction, least), 1 - least)
            return active, a, b, c, fa, fb, fc, best, f_best, fraction, steps

        ends = repeat(narrow, active, a, b, c, fa, fb, fc, best, f_best, fraction, steps, bound=self.bound())
        best, f_best, _, steps = ends[7:]
        met = f_best.abs() <= tolerance
        status = torch.where(met, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = torch.where(met | bracketed, status, int(Status.NO_BRACKET))
        status = torch.where(x0.isfinite() & tolerance.isfinite(), status, int(Status.NONFINITE))
        return Solution(best, status.to(torch.int8), steps, f_best.abs())

    def _grow(
        self, residual: Callable[[Tensor], Tensor], x0: Tensor, a: Tensor, b: Tensor, fixed: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Move the ends outwards until the signs differ; the inner end follows, so that the bracket stays tight."""
        fa, fb = residual(a), residual(b)
        blind = is_blind(x0)

        def lie_outside(fa: Tensor, fb: Tensor) -> Tensor:
            return (fa.sign() * fb.sign() > 0) & fa.isfinite() & fb.isfinite()

        def move(outside: Tensor, a: Tensor, b: Tensor, fa: Tensor, fb: Tensor, width: Tensor) -> tuple[Tensor, ...]:
            width = torch.where(outside, 2 * width, width)
            # towards the end with the smaller residual: a monotone function has its root on that side
            downwards = outside & (fa.abs() <= fb.abs())
            upwards = outside & (fb.abs() <= fa.abs())
            new_a, new_b = torch.where(downwards, a - width, a), torch.where(upwards, b + width, b)
            # one evaluation for both ends where only one moves
            both = downwards & upwards
            moved = residual(torch.where(downwards, new_a, torch.where(upwards, new_b, x0)))
            moved_b = residual(torch.where(upwards, new_b, x0)) if blind or holds_anywhere(both) else moved
            # the old end becomes the inner one
            inner_a, inner_fa = torch.where(upwards & ~both, b, a), torch.where(upwards & ~both, fb, fa)
            inner_b, inner_fb = torch.where(downwards & ~both, a, b), torch.where(downwards & ~both, fa, fb)
            a, fa = torch.where(downwards, new_a, inner_a), torch.where(downwards, moved, inner_fa)
            b, fb = torch.where(upwards, new_b, inner_b), torch.where(upwards, moved_b, inner_fb)
            return lie_outside(fa, fb), a, b, fa, fb, width

        start = lie_outside(fa, fb), a, b, fa, fb, (b - a).abs()
        _, a, b, fa, fb, _ = repeat(move, *start, bound=0 if fixed else self.max_growth)
        return a, b, fa, fb
