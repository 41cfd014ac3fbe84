"""A Gaussian with a full covariance, fitted to a potential on fixed draws: a deterministic problem for L-BFGS."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gaussian", "fit_gaussian", "fixed_normals", "minimize"]

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution: ``loc`` ``(D,)`` and lower triangular ``scale`` ``(D, D)``."""

    loc: Tensor
    scale: Tensor

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        e = torch.randn(n, len(self.loc), generator=generator, dtype=self.loc.dtype)
        return self.loc + e @ self.scale.mT

    def log_prob(self, x: Tensor) -> Tensor:
        e = torch.linalg.solve_triangular(self.scale, (x - self.loc).mT, upper=False)
        log_det = self.scale.diagonal().log().sum()
        return -0.5 * e.square().sum(0) - log_det - 0.5 * len(self.loc) * math.log(2 * math.pi)


def fixed_normals(n: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Return n antithetic, quasi-random normal draws ``(n, dim)`` with mean 0 and covariance I, up to rounding.

    Antithetic pairs span at most n / 2 directions, so n must be at least ``2 * dim``, and even.
    """
    if n % 2 or n < 2 * dim:
        raise ValueError(f"fixed_normals: n must be even and at least 2 * dim = {2 * dim}, but got {n}.")
    seed = int(torch.randint(2**31, (), generator=generator))
    points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(n // 2, dtype=torch.float64)
    e = torch.special.ndtri(points.clamp(1e-6, 1 - 1e-6))
    e = torch.cat([e, -e])
    factor = torch.linalg.cholesky(e.mT @ e / n)
    return torch.linalg.solve_triangular(factor, e.mT, upper=False).mT.contiguous()


def fit_gaussian(
    value_and_grad: ValueAndGrad,
    start: Gaussian,
    draws: Tensor,
    *,
    max_calls: int = 150,
    noise: float = 0.0,
    expired: Callable[[], bool] = lambda: False,
) -> Gaussian:
    """Maximise the ELBO of a Gaussian on fixed draws; exact if the target is Gaussian and the draws are whitened.

    Args:
        value_and_grad: From points ``(n, D)`` to U and its gradient.
        start: It also sets the units: the search runs in the coordinates that it whitens.
        draws: ``(n, D)``, as from :func:`fixed_normals`.
        max_calls: Most evaluations of the potential, of n points each.
        noise: Relative rounding error of U.
        expired: Whether to stop now.

    References:
        Giordano et al. (2024), *Black box variational inference with a deterministic objective*.
    """
    n, dim = draws.shape
    rows, columns = torch.tril_indices(dim, dim, -1)

    def unpack(theta: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.diag(theta[dim : 2 * dim].exp())
        factor[rows, columns] = theta[2 * dim :]
        return theta[:dim], factor

    def objective(theta: Tensor) -> tuple[Tensor, Tensor]:
        shift, factor = unpack(theta)
        u, g = value_and_grad(start.loc + (shift + draws @ factor.mT) @ start.scale.mT)
        if not torch.isfinite(u).all():
            return theta.new_tensor(math.inf), torch.zeros_like(theta)
        g = g @ start.scale
        slope = g.mT @ draws / n
        value = u.mean() - theta[dim : 2 * dim].sum()
        return value, torch.cat([g.mean(0), slope.diagonal() * factor.diagonal() - 1, slope[rows, columns]])

    theta = draws.new_zeros(2 * dim + len(rows))
    for _ in range(20):  # draws that leave the region where the model is finite are pulled in
        if torch.isfinite(objective(theta)[0]):
            break
        theta[dim : 2 * dim] -= 0.35
    else:
        return start
    theta = minimize(objective, theta, max_calls=max_calls, noise=noise, expired=expired)
    shift, factor = unpack(theta)
    return Gaussian(start.loc + start.scale @ shift, start.scale @ factor)


def minimize(
    objective: ValueAndGrad,
    x: Tensor,
    *,
    max_calls: int,
    history: int = 20,
    tol: float = 1e-4,
    noise: float = 0.0,
    expired: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Minimise by L-BFGS with a weak Wolfe search; stop when three steps in a row gain less than ``tol``.

    References:
        Nocedal and Wright (2006), *Numerical optimization*, Algorithm 7.4; Lewis and Overton (2013), *Nonsmooth
        optimization via quasi-Newton methods*, for the search.
    """
    value, gradient = objective(x)
    pairs: list[tuple[Tensor, Tensor]] = []
    calls, small = 1, 0
    while calls < max_calls and small < 3 and not expired():
        direction = -_two_loops(gradient, pairs)
        if not direction @ gradient < 0:
            pairs.clear()
            direction = -_two_loops(gradient, pairs)
        found, used = _wolfe(objective, x, value, gradient, direction, noise)
        calls += used
        if found is None:
            break
        new_x, new_value, new_gradient = found
        s, y = new_x - x, new_gradient - gradient
        if s @ y > 1e-12 * s.norm() * y.norm():
            pairs = [*pairs[-history + 1 :], (s, y)]
        small = small + 1 if value - new_value < tol else 0
        x, value, gradient = new_x, new_value, new_gradient
    return x


def _two_loops(gradient: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the inverse Hessian's estimate times the gradient."""
    if not pairs:
        return gradient / gradient.norm().clamp_min(1.0)
    q, weights = gradient, []
    for s, y in reversed(pairs):
        weights.append((s @ q) / (s @ y))
        q = q - weights[-1] * y
    s, y = pairs[-1]
    q = q * (s @ y) / (y @ y)
    for (s, y), weight in zip(pairs, reversed(weights), strict=True):
        q = q + s * (weight - (y @ q) / (s @ y))
    return q


def _wolfe(
    objective: ValueAndGrad, x: Tensor, value: Tensor, gradient: Tensor, direction: Tensor, noise: float
) -> tuple[tuple[Tensor, Tensor, Tensor] | None, int]:
    """Bracket a step; return the point, value and gradient there, or None, and the number of calls."""
    low, high, step = 0.0, math.inf, 1.0
    slope = float(gradient @ direction)
    for calls in range(1, 26):
        trial = x + step * direction
        new_value, new_gradient = objective(trial)
        if not new_value <= value + 1e-4 * step * slope + noise * abs(value):
            high = step
        elif new_gradient @ direction < 0.9 * slope:
            low = step
        else:
            return (trial, new_value, new_gradient), calls
        step = (low + high) / 2 if high < math.inf else 2 * step
    return ((trial, new_value, new_gradient) if new_value <= value else None), calls
