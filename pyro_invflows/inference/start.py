"""Where a guide starts: paths of descent, exact curvature at their ends, and a choice by the ELBO."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_invflows.inference.gaussian import Gaussian, ValueAndGrad

__all__ = ["Candidate", "bfgs_paths", "choose", "inverse_root", "newton", "starting_points"]


@dataclass(frozen=True)
class Candidate:
    """A Gaussian that competes for the start, and the path that it was found on."""

    gaussian: Gaussian
    path: int


@dataclass
class Paths:
    """Ends of descents: ``x (P, D)``, potential ``u (P,)`` and gradient ``g (P, D)`` there; Gaussians on the way."""

    x: Tensor
    u: Tensor
    g: Tensor
    candidates: list[Candidate] = field(default_factory=list)


def starting_points(num_paths: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Return the origin, and points uniform in (-2, 2), ``(num_paths, dim)``."""
    rest = 4 * torch.rand(num_paths - 1, dim, generator=generator, dtype=torch.float64) - 2
    return torch.cat([rest.new_zeros(1, dim), rest])


class _WeakWolfe:
    """A bracket for the step of each path: it shrinks where the potential rose, grows where the slope is steep."""

    def __init__(self, n: int, noise: float) -> None:
        self.noise = noise
        self.low = torch.zeros(n, dtype=torch.float64)
        self.high = torch.full_like(self.low, math.inf)
        self.step = torch.ones_like(self.low)
        self.tries = torch.zeros(n, dtype=torch.long)

    def judge(self, u: Tensor, slope: Tensor, new_u: Tensor, new_slope: Tensor) -> tuple[Tensor, Tensor]:
        """Return which steps meet both conditions, and which descend; set the next steps."""
        descends = new_u <= u + 1e-4 * self.step * slope + self.noise * u.abs()
        flat = new_slope >= 0.9 * slope
        self.high = torch.where(descends, self.high, self.step)
        self.low = torch.where(descends & ~flat, self.step, self.low)
        self.step = torch.where(self.high < math.inf, (self.low + self.high) / 2, 2 * self.step)
        self.tries += 1
        return descends & flat, descends

    def restart(self, rows: Tensor) -> None:
        self.low[rows], self.high[rows], self.step[rows], self.tries[rows] = 0.0, math.inf, 1.0, 0


def bfgs_paths(
    value_and_grad: ValueAndGrad,
    x: Tensor,
    *,
    max_calls: int = 300,
    tol: float = 1e-6,
    noise: float = 0.0,
    expired: Callable[[], bool] = lambda: False,
) -> Paths:
    """Descend from all points at once by dense BFGS; every iterate gives a Gaussian, as in Pathfinder.

    Args:
        value_and_grad: From points ``(n, D)`` to U and its gradient.
        x: Starts ``(P, D)``. One that is not finite moves towards the origin.
        max_calls: Most evaluations, of at most P points each.
        tol: A path ends where the squared Newton decrement, by the estimated Hessian and in nats, is below it. It does
            not depend on units, but ends early where the estimate is poor; :func:`newton` goes on from there.
        noise: Relative rounding error of U.
        expired: Whether to stop now.

    References:
        Lewis and Overton (2013), *Nonsmooth optimization via quasi-Newton methods*, Algorithm 2.6; Zhang et al. (2022),
        *Pathfinder*.
    """
    x = x.clone()
    u, g = _finite_start(value_and_grad, x)
    num_paths, dim = x.shape
    eye = torch.eye(dim, dtype=x.dtype)
    inverse = eye.repeat(num_paths, 1, 1)  # the estimates of the inverse Hessians
    fresh = torch.ones(num_paths, dtype=torch.bool)
    done = ~torch.isfinite(u)
    direction = _steepest(g)
    search = _WeakWolfe(num_paths, noise)
    paths = Paths(x, u, g)
    for _ in range(max_calls):
        active = (~done).nonzero()[:, 0]
        if not len(active) or expired():
            break
        new_x, new_u, new_g = x.clone(), u.clone(), g.clone()
        new_x[active] = x[active] + search.step[active, None] * direction[active]
        new_u[active], new_g[active] = value_and_grad(new_x[active])
        good, descends = search.judge(u, (g * direction).sum(1), new_u, (new_g * direction).sum(1))
        stuck = (search.tries > 40) & ~good
        good = (good | (stuck & descends)) & ~done
        done = done | (stuck & ~descends)
        if not good.any():
            continue
        _update_inverse(inverse, fresh, good, new_x - x, new_g - g, eye)
        x, u = torch.where(good[:, None], new_x, x), torch.where(good, new_u, u)
        g = torch.where(good[:, None], new_g, g)
        step = -(inverse @ g[..., None])[..., 0]
        wrong = good & ~((step * g).sum(1) < 0)
        inverse[wrong], fresh = eye, fresh | wrong
        step = torch.where(wrong[:, None], _steepest(g), step)
        direction = torch.where(good[:, None], step, direction)
        done = done | (good & (-(direction * g).sum(1) < tol) & ~fresh)
        search.restart(good)
        _record(paths.candidates, (good & ~fresh).nonzero()[:, 0].tolist(), x, g, inverse)
    paths.x, paths.u, paths.g = x, u, g
    return paths


def _finite_start(value_and_grad: ValueAndGrad, x: Tensor) -> tuple[Tensor, Tensor]:
    u, g = value_and_grad(x)
    for _ in range(12):
        bad = ~torch.isfinite(u)
        if not bad.any():
            break
        x[bad] *= 0.5
        u[bad], g[bad] = value_and_grad(x[bad])
    return u, g


def _steepest(g: Tensor) -> Tensor:
    return -g / g.norm(dim=1, keepdim=True).clamp_min(1.0)


def _update_inverse(inverse: Tensor, fresh: Tensor, good: Tensor, s: Tensor, y: Tensor, eye: Tensor) -> None:
    """Apply the BFGS update in place, where the curvature along the step is positive; scale the first one."""
    sy = (s * y).sum(1)
    rows = good & (sy > 1e-12 * s.norm(dim=1) * y.norm(dim=1))
    first = rows & fresh
    inverse[first] = (sy / y.square().sum(1))[first, None, None] * eye
    fresh &= ~first
    s, y, r = s[rows], y[rows], (1 / sy[rows])[:, None, None]
    v = eye - r * s[:, :, None] * y[:, None, :]
    inverse[rows] = v @ inverse[rows] @ v.mT + r * s[:, :, None] * s[:, None, :]


def _record(candidates: list[Candidate], rows: list[int], x: Tensor, g: Tensor, inverse: Tensor) -> None:
    for i in rows:
        factor, info = torch.linalg.cholesky_ex((inverse[i] + inverse[i].mT) / 2)
        if not info and torch.isfinite(factor).all():
            candidates.append(Candidate(Gaussian(x[i] - inverse[i] @ g[i], factor), i))


def inverse_root(a: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return R with :math:`R R^T = |A|^{-1}`, and whether A is positive definite, for symmetric ``(*B, D, D)``.

    A is scaled by its diagonal first, because the units of the coordinates may differ by many orders of magnitude.
    """
    scale = a.diagonal(dim1=-2, dim2=-1).abs().clamp_min(1e-300).rsqrt()
    values, vectors = torch.linalg.eigh(scale[..., :, None] * a * scale[..., None, :])
    size = values.abs()
    size = torch.maximum(size, 1e-12 * size.amax(-1, keepdim=True)).clamp_min(1e-300)
    return scale[..., :, None] * vectors * size.rsqrt()[..., None, :], (values > 0).all(-1)


def newton(
    potential: Any,
    x: Tensor,
    *,
    max_steps: int = 20,
    tol: float = 1e-6,
    expired: Callable[[], bool] = lambda: False,
) -> Paths:
    """Go on from all points by saddle-free Newton with exact Hessians: each iterate gives a Laplace approximation.

    Args:
        potential: Has ``value_and_grad``, ``hessian`` and ``noise``, as :class:`Potential` does.
        x: Starts ``(P, D)``.
        max_steps: Maximum number of steps.
        tol: A path ends at a minimum where the squared Newton decrement is below it.
        expired: Whether to stop now.

    References:
        Dauphin et al. (2014), *Identifying and attacking the saddle point problem*.
    """
    x = x.clone()
    u, g = potential.value_and_grad(x)
    paths = Paths(x, u, g)
    active = torch.isfinite(u).nonzero()[:, 0]
    sizes = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.03, 0.01, 0.001], dtype=x.dtype)
    for _ in range(max_steps):
        if not len(active) or expired():
            break
        hessian = potential.hessian(x[active])
        finite = torch.isfinite(hessian).flatten(1).all(1)
        active, hessian = active[finite], hessian[finite]
        if not len(active):
            break
        root, positive = inverse_root((hessian + hessian.mT) / 2)
        q = (root.mT @ g[active][..., None])[..., 0]
        step, decrement = -(root @ q[..., None])[..., 0], q.square().sum(1)
        for j, i in enumerate(active.tolist()):
            centre = x[i] + step[j] if positive[j] else x[i].clone()
            paths.candidates.append(Candidate(Gaussian(centre, _triangular(root[j])), i))
        trial = x[active, None] + sizes[:, None] * step[:, None]
        new_u, new_g = potential.value_and_grad(trial.reshape(-1, x.shape[1]))
        new_u, new_g = new_u.reshape(len(active), -1), new_g.reshape(trial.shape)
        bound = u[active, None] - 1e-4 * sizes * decrement[:, None] + potential.noise * u[active, None].abs()
        new_u = torch.where(new_u <= bound, new_u, math.inf)
        best = new_u.argmin(1)
        moved = torch.isfinite(new_u).any(1)
        pick = (moved.nonzero()[:, 0], best[moved])
        rows = active[moved]
        x[rows], u[rows], g[rows] = trial[pick], new_u[pick], new_g[pick]
        active = active[moved & ~((decrement < tol) & positive)]
    return paths


def _triangular(root: Tensor) -> Tensor:
    """Return the lower triangular L with ``L L^T = R R^T`` and a positive diagonal."""
    r = torch.linalg.qr(root.mT).R
    return (r * r.diagonal().sign()[:, None]).mT


def choose(
    value: Callable[[Tensor], Tensor],
    candidates: list[Candidate],
    *,
    generator: torch.Generator | None = None,
    num_finalists: int = 12,
    margin: float = 12.0,
) -> tuple[Gaussian, list[Gaussian]]:
    """Return the Gaussian with the highest ELBO, and the witnesses: the best of each path that comes close.

    Args:
        value: From points ``(n, D)`` to U.
        candidates: The competitors: each is judged by 8 draws, the finalists again by 64.
        generator: Source of the draws.
        num_finalists: Size of the final.
        margin: How many nats a witness may lie below the best.
    """
    first = _elbos(value, [c.gaussian for c in candidates], 8, generator)
    finalists = first.topk(min(num_finalists, len(candidates))).indices.tolist()
    second = _elbos(value, [candidates[i].gaussian for i in finalists], 64, generator)
    best = finalists[int(second.argmax())]
    of_path: dict[int, int] = {}
    for i, candidate in enumerate(candidates):
        if candidate.path not in of_path or first[i] > first[of_path[candidate.path]]:
            of_path[candidate.path] = i
    near = {i for i in of_path.values() if first[i] > second.max() - margin}
    return candidates[best].gaussian, [candidates[i].gaussian for i in sorted(near | {best})]


def _elbos(value: Callable[[Tensor], Tensor], gaussians: list[Gaussian], n: int, generator: Any) -> Tensor:
    """Return their ELBOs; one that leaves the model's domain ranks below all others, by the share that it leaves."""
    x = torch.cat([gaussian.sample(n, generator) for gaussian in gaussians])
    u = value(x).reshape(len(gaussians), n)
    dim = x.shape[1]
    entropy = torch.stack([q.scale.diagonal().log().sum() for q in gaussians]) + 0.5 * dim * (1 + math.log(2 * math.pi))
    elbo = entropy - u.mean(1)
    return torch.where(torch.isfinite(elbo), elbo, -1e300 + 1e299 * torch.isfinite(u).double().mean(1))
