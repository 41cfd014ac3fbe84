"""A flow around a Gaussian, and its training by path gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_invflows.core.bijection import Bijection
from pyro_invflows.core.chain import Chain
from pyro_invflows.inference.gaussian import Gaussian
from pyro_invflows.inference.importance import Importance, importance
from pyro_invflows.transforms import Permute, affine_coupling, lu_linear, sinh_arcsinh

__all__ = ["binary_code_couplings", "draw", "learn_draws", "posterior_flow", "train_flow"]


def binary_code_couplings(dim: int, hidden_dims: tuple[int, ...]) -> list[Bijection]:
    """Return affine couplings by the bits of the index: every coordinate decides over every other in some coupling.

    For each bit, the coordinates where it is 1 decide over the others, and then the reverse, so that the leading ones,
    often hyperparameters, decide in the last coupling.
    """
    layers: list[Bijection] = []
    index = torch.arange(dim)
    for bit in range(max(dim - 1, 0).bit_length()):
        ones = (index >> bit) % 2 == 1
        order = torch.cat([index[ones], index[~ones]])
        size = int(ones.sum())
        layers += [
            Permute(order),
            affine_coupling(dim, hidden_dims, split_dim=size, keep="first", activation=nn.SiLU),
            affine_coupling(dim, hidden_dims, split_dim=dim - size, keep="last", activation=nn.SiLU),
            Permute(order.argsort()),
        ]
    return layers


def posterior_flow(dim: int) -> Chain:
    """Build the flow from standard normal noise to whitened coordinates, in float64; it starts as the identity."""
    hidden = (32, 32) if dim <= 8 else (64, 64)
    layers = [
        sinh_arcsinh(dim, max_skewness=1.5, max_log_tail=0.7),
        *binary_code_couplings(dim, hidden),
        sinh_arcsinh(dim, max_skewness=1.5, max_log_tail=0.7),
        lu_linear(dim),
    ]
    return Chain(layers).double()


def draw(flow: Bijection, around: Gaussian, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return n draws of the flow around a Gaussian, in the model's coordinates, and their log-density."""
    with torch.no_grad():
        e = torch.randn(n, len(around.loc), generator=generator, dtype=torch.float64)
        w, ladj = flow.call_and_ladj(e)
    log_q = -0.5 * e.square().sum(1) - 0.5 * e.shape[1] * math.log(2 * math.pi) - ladj
    return around.loc + w @ around.scale.mT, log_q - around.scale.diagonal().log().sum()


def learn_draws(
    flow: Bijection, draws: Tensor, *, generator: torch.Generator, steps: int = 600, batch_size: int = 256
) -> None:
    """Fit a flow from standard normal noise to draws ``(n, D)`` by maximum likelihood, in place."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(draws), (batch_size,), generator=generator)
        e, ladj = flow.inv_and_ladj(draws[rows])
        optimizer.zero_grad()
        (0.5 * e.square().sum(-1) - ladj).mean().backward()
        optimizer.step()
        schedule.step()


def train_flow(
    potential: Any,
    flow: Bijection,
    around: Gaussian,
    *,
    generator: torch.Generator,
    num_particles: int = 64,
    max_steps: int = 3500,
    tol: float = 0.01,
    lr: float = 1e-2,
    first_round: int = 500,
    elapsed: Callable[[], float] = lambda: 0.0,
) -> list[Importance]:
    """Maximise the ELBO by path gradients, in rounds of growing length; the best round is kept.

    Each round is warmed up and annealed. After it, 1000 draws are weighted: the training stops once the estimated
    divergence is below ``tol`` and the weights are flat.

    Args:
        potential: Has ``value_and_grad`` and ``value``, as :class:`Potential` does.
        flow: From noise to coordinates whitened by ``around``; trained in place.
        around: The Gaussian.
        generator: Source of the noise.
        num_particles: Number of draws per step, in antithetic pairs.
        max_steps: Maximum number of steps, over all rounds.
        tol: Divergence in nats that is good enough.
        lr: Learning rate of Adam.
        first_round: Steps of the first round; each further one is twice as long.
        elapsed: Share of the time that is used up; training stops at 1.

    Returns:
        The verdict of the importance weights after each round.
    """
    parameters = list(flow.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    rounds: list[Importance] = []
    best = -math.inf
    best_state: dict[str, Tensor] = {}
    norms: list[float] = []
    steps, length = 0, first_round
    while steps < max_steps and elapsed() < 1:
        length = min(length, max_steps - steps)
        begin = elapsed()
        for i in range(length):
            progress = max(i / length, (elapsed() - begin) / max(1 - begin, 1e-9))
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (i + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
            _step(potential, flow, around, optimizer, parameters, norms, num_particles, generator)
            steps += 1
        x, log_q = draw(flow, around, 1000, generator)
        result = importance(-potential.value(x) - log_q)
        rounds.append(result)
        score = result.elbo - 100 * result.lost_share  # where the model is not finite, the ELBO is minus infinity
        if score > best or not best_state:
            best, best_state = score, {name: value.clone() for name, value in flow.state_dict().items()}
        if not result.lost_share and result.kl < tol and (result.khat < 0.7 or result.kl < tol / 5):
            break
        length *= 2
    if best_state:
        flow.load_state_dict(best_state)
    return rounds


def _step(
    potential: Any,
    flow: Bijection,
    around: Gaussian,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    norms: list[float],
    num_particles: int,
    generator: torch.Generator,
) -> None:
    """Take one step; draws where anything is not finite drop out, and the gradient is clipped by its usual norm."""
    e = torch.randn((num_particles + 1) // 2, len(around.loc), generator=generator, dtype=torch.float64)
    e = torch.cat([e, -e])
    w, _, log_q_gradient = flow.path_gradient(e, -e)
    u, u_gradient = potential.value_and_grad(around.loc + w.detach() @ around.scale.mT)
    gradient = log_q_gradient + u_gradient @ around.scale
    good = torch.isfinite(u) & torch.isfinite(gradient).all(1)
    optimizer.zero_grad()
    w.backward(torch.where(good[:, None], gradient, 0.0) / good.sum().clamp_min(1))
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
    if not math.isfinite(norm):
        return
    norms[:] = [*norms[-99:], norm]
    limit = 5 * sorted(norms)[len(norms) // 2]
    if norm > limit:
        for p in parameters:
            if p.grad is not None:
                p.grad *= limit / norm
    optimizer.step()
