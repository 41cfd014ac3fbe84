"""Densities made by hand, as Pyro models with exact draws: modes, funnels, tails, hierarchies, many dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from posterior_models import F64, Posterior, flat, group, last, one, zeros
from torch import Tensor
from torch.distributions import constraints

__all__ = ["TARGETS"]

DRAWS = 10000
REAL_VECTOR = constraints.independent(constraints.real, 1)


def by_density(name: str, log_p: Callable[[Tensor], Tensor], draws: Tensor) -> Posterior:
    """Return a posterior over one vector x."""

    def model() -> None:
        pyro.factor("density", log_p(pyro.sample("x", flat(REAL_VECTOR, (draws.shape[1],)))))

    names = [f"x[{i + 1}]" for i in range(draws.shape[1])]
    return Posterior(name, model, names, draws, lambda sites: sites["x"], lambda values: {"x": values})


def normal(mean: Tensor | float, sd: Tensor | float, x: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / sd) ** 2 - torch.as_tensor(sd).log()


def two_modes(seed: torch.Generator) -> Posterior:
    centre = torch.tensor([4.0, 0.0, 0.0, 0.0], dtype=F64)

    def log_p(x: Tensor) -> Tensor:
        return torch.logaddexp(normal(centre, 1.0, x).sum(-1), normal(-centre, 1.0, x).sum(-1))

    signs = 2.0 * torch.randint(2, (DRAWS, 1), generator=seed) - 1
    return by_density("two modes", log_p, signs * centre + torch.randn(DRAWS, 4, generator=seed, dtype=F64))


def curved_modes(seed: torch.Generator) -> Posterior:
    """Two modes at +2 and -2 of the first coordinate, each bent: the second is near the square of the first."""

    def log_p(x: Tensor) -> Tensor:
        a, b = x.unbind(-1)
        return torch.logaddexp(normal(2.0, 0.6, a), normal(-2.0, 0.6, a)) + normal(0.5 * a**2, 0.5, b)

    a = 2 * (2.0 * torch.randint(2, (DRAWS,), generator=seed) - 1)
    a = a + 0.6 * torch.randn(DRAWS, generator=seed, dtype=F64)
    return by_density(
        "curved modes", log_p, torch.stack([a, 0.5 * a**2 + 0.5 * torch.randn(DRAWS, generator=seed, dtype=F64)], -1)
    )


def funnel(seed: torch.Generator) -> Posterior:
    """Neal (2003), section 8: nine normals whose log-variance is N(0, 9)."""

    def log_p(x: Tensor) -> Tensor:
        v, rest = x[..., 0], x[..., 1:]
        return normal(0.0, 3.0, v) + normal(0.0, last((v / 2).exp()), rest).sum(-1)

    v = 3 * torch.randn(DRAWS, 1, generator=seed, dtype=F64)
    rest = (v / 2).exp() * torch.randn(DRAWS, 9, generator=seed, dtype=F64)
    return by_density("funnel", log_p, torch.cat([v, rest], -1))


def banana(seed: torch.Generator) -> Posterior:
    """Haario et al. (1999): a normal with sd 10 and 1, bent by b = 0.03."""

    def log_p(x: Tensor) -> Tensor:
        a, b = x.unbind(-1)
        return normal(0.0, 10.0, a) + normal(0.0, 1.0, b + 0.03 * a**2 - 3)

    a, b = torch.randn(2, DRAWS, generator=seed, dtype=F64).unbind(0)
    return by_density("banana", log_p, torch.stack([10 * a, b - 3 * a**2 + 3], -1))


def student(size: int) -> Callable[[torch.Generator], Posterior]:
    """A multivariate Student t with 5 degrees of freedom."""

    def build(seed: torch.Generator) -> Posterior:
        chi = torch.randn(DRAWS, 5, generator=seed, dtype=F64).square().mean(-1, keepdim=True)
        draws = torch.randn(DRAWS, size, generator=seed, dtype=F64) / chi.sqrt()
        return by_density(f"Student t, {size}", lambda x: -(5 + size) / 2 * torch.log1p(x.square().sum(-1) / 5), draws)

    return build


def hierarchy(groups: int) -> Callable[[torch.Generator], Posterior]:
    """Group means with unequal noise, centred: the draws are exact, by a grid over log tau."""

    def build(seed: torch.Generator) -> Posterior:
        sd = 0.2 * 10 ** torch.rand(groups, generator=seed, dtype=F64)  # from 0.2 to 2
        y = (
            1
            + 0.5 * torch.randn(groups, generator=seed, dtype=F64)
            + sd * torch.randn(groups, generator=seed, dtype=F64)
        )

        def model() -> None:
            mu = pyro.sample("mu", dist.Normal(zeros(), 5.0))
            tau = pyro.sample("tau", dist.HalfCauchy(one()))
            theta = pyro.sample("theta", group(last(mu), last(tau), groups))
            pyro.sample("y", dist.Normal(theta, sd).to_event(1), obs=y)

        grid = torch.linspace(-9, 4, 20001, dtype=F64)  # of log tau
        variance = sd**2 + last((2 * grid).exp())
        precision = 1 / 25 + (1 / variance).sum(-1)
        mean = (y / variance).sum(-1) / precision
        log_p = (-0.5 * variance.log() - 0.5 * y**2 / variance).sum(-1) - 0.5 * precision.log()
        log_p = log_p + 0.5 * precision * mean**2 - torch.log1p((2 * grid).exp()) + grid
        i = torch.multinomial((log_p - log_p.max()).exp(), DRAWS, replacement=True, generator=seed)
        log_tau = grid[i] + (torch.rand(DRAWS, generator=seed, dtype=F64) - 0.5) * (grid[1] - grid[0])
        mu = mean[i] + torch.randn(DRAWS, generator=seed, dtype=F64) / precision[i].sqrt()
        weight = 1 / sd**2 + last((-2 * log_tau).exp())
        centre = (y / sd**2 + last(mu * (-2 * log_tau).exp())) / weight
        theta = centre + torch.randn(DRAWS, groups, generator=seed, dtype=F64) / weight.sqrt()
        names = [*(f"theta[{j + 1}]" for j in range(groups)), "mu", "log_tau"]
        return Posterior(
            f"hierarchy, {groups + 2}",
            model,
            names,
            torch.cat([theta, last(mu), last(log_tau)], -1),
            lambda s: torch.cat([s["theta"], last(s["mu"]), last(s["tau"].log())], -1),
            lambda x: {"theta": x[..., :-2], "mu": x[..., -2], "tau": x[..., -1].exp()},
        )

    return build


def gaussian(size: int, condition: float, offset: float) -> Callable[[torch.Generator], Posterior]:
    def build(seed: torch.Generator) -> Posterior:
        turn = torch.linalg.qr(torch.randn(size, size, generator=seed, dtype=F64))[0]
        sd = torch.logspace(0, math.log10(condition) / 2, size, dtype=F64)
        factor, mean = turn * sd, offset * torch.randn(size, generator=seed, dtype=F64)
        draws = mean + torch.randn(DRAWS if size < 500 else 2000, size, generator=seed, dtype=F64) @ factor.mT
        return by_density(f"Gaussian, {size}", lambda x: -0.5 * ((x - mean) @ (turn / sd)).square().sum(-1), draws)

    return build


def logistic(seed: torch.Generator) -> Posterior:
    """500 coefficients, 2000 rows; the draws by Hamiltonian Monte Carlo in coordinates whitened at the mode."""
    x = torch.randn(2000, 500, generator=seed, dtype=F64) / 500**0.5
    truth = 2 * torch.randn(500, generator=seed, dtype=F64)
    y = (torch.rand(2000, generator=seed, dtype=F64) < torch.sigmoid(x @ truth)).double()

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(zeros(500), 2.0).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=beta @ x.mT).to_event(1), obs=y)

    def gradient(beta: Tensor) -> Tensor:
        return (y - torch.sigmoid(beta @ x.mT)) @ x - beta / 4

    mode = zeros(500)
    for _ in range(30):
        p = torch.sigmoid(x @ mode)
        mode = mode + torch.linalg.solve((x.mT * (p * (1 - p))) @ x + torch.eye(500, dtype=F64) / 4, gradient(mode))
    p = torch.sigmoid(x @ mode)
    factor = torch.linalg.cholesky((x.mT * (p * (1 - p))) @ x + torch.eye(500, dtype=F64) / 4)
    root = torch.linalg.inv(factor)  # beta = mode + root^T w

    def energy(w: Tensor) -> Tensor:
        beta = mode + w @ root
        fit = beta @ x.mT
        return (torch.nn.functional.softplus(fit) - y * fit).sum(-1) + beta.square().sum(-1) / 8

    def force(w: Tensor) -> Tensor:
        return gradient(mode + w @ root) @ root.mT

    w, kept, accepted = torch.randn(100, 500, generator=seed, dtype=F64), [], []
    for i in range(45):  # 100 chains; whitened, so that five steps of 0.3 decorrelate a draw
        start, v = w, torch.randn(100, 500, generator=seed, dtype=F64)
        new, momentum = w, v + 0.15 * force(w)
        for j in range(5):
            new = new + 0.3 * momentum
            momentum = momentum + (0.3 if j < 4 else 0.15) * force(new)
        change = energy(start) + v.square().sum(-1) / 2 - energy(new) - momentum.square().sum(-1) / 2
        accept = torch.rand(100, generator=seed, dtype=F64).log() < change
        w = torch.where(last(accept), new, start)
        accepted.append(accept.double().mean())
        if i >= 5:
            kept.append(w)
    rate = torch.stack(accepted).mean()
    if rate < 0.4:
        raise RuntimeError(f"the reference draws of the logistic regression were accepted at a rate of {rate:.2f} only")
    names = [f"beta[{i + 1}]" for i in range(500)]
    draws = mode + torch.cat(kept) @ root
    return Posterior("logistic, 500", model, names, draws, lambda s: s["beta"], lambda v: {"beta": v})


#: Built when asked for, each from a generator with a seed of its own.
TARGETS: dict[str, Callable[[torch.Generator], Posterior]] = {
    "two modes": two_modes,
    "curved modes": curved_modes,
    "funnel": funnel,
    "banana": banana,
    "Student t, 5": student(5),
    "Student t, 10": student(10),
    **{f"hierarchy, {j + 2}": hierarchy(j) for j in (20, 88, 100, 148, 198)},
    "Gaussian, 100": gaussian(100, 1e4, 100.0),
    "Gaussian, 1000": gaussian(1000, 100.0, 1.0),
    "logistic, 500": logistic,
}
