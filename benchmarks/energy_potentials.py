"""Fit the four energy potentials of Rezende and Mohamed (2015), table 1, with eight Sylvester layers by SVI.

The potentials U2 to U4 do not grow along z1: as in the paper, the target is cut to |z1| <= 4, here by a smooth wall,
and normalised by numerical integration on a grid. ``python benchmarks/energy_potentials.py --output DIR`` writes
``energy_potentials.png`` and ``energy_potentials.md``, with the KL divergence from the fit to the target, once from
samples and once by integrating the fitted density, which takes the layers' inverse.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")  # draw to files; needs no screen

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_invflows import Diagonal, Flow, Sylvester

LAYERS = 8
TARGET_KL = 0.05


def _bump(x: Tensor, width: float) -> Tensor:
    return -0.5 * (x / width) ** 2


def potential(number: int, z: Tensor) -> Tensor:
    """Return U(z) of ``(*B, 2)``, with a wall beyond |z1| = 4 for U2 to U4."""
    x, y = z.unbind(-1)
    if number == 1:
        two = torch.logaddexp(_bump(x - 2, 0.6), _bump(x + 2, 0.6))
        return -_bump(z.norm(dim=-1) - 2, 0.4) - two
    wall = 0.5 * ((x.abs() - 4).clamp_min(0) / 0.3) ** 2
    wave = torch.sin(math.pi * x / 2)
    if number == 2:
        return wall - _bump(y - wave, 0.4)
    if number == 3:
        dent = 3 * torch.exp(_bump(x - 1, 0.6))
        return wall - torch.logaddexp(_bump(y - wave, 0.35), _bump(y - wave + dent, 0.35))
    step = 3 * torch.sigmoid((x - 1) / 0.3)
    return wall - torch.logaddexp(_bump(y - wave, 0.4), _bump(y - wave + step, 0.35))


def grid(half_width: float = 8.0, points: int = 801) -> tuple[Tensor, float]:
    """Return grid points and the logarithm of a cell's area."""
    axis = torch.linspace(-half_width, half_width, points)
    mesh = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    return mesh, 2 * math.log(2 * half_width / (points - 1))


@dataclass
class Fit:
    """One fitted potential."""

    number: int
    flow: Flow
    kl_samples: float
    kl_grid: float
    mass: float


def build() -> Flow:
    """Build eight Sylvester layers between two affine ones, off the identity so that modes can part."""
    layers: list = [Diagonal(2)]
    with torch.no_grad():
        layers[0].log_scale.copy_(torch.tensor([0.7, 0.0]))
        for _ in range(LAYERS):
            layer = Sylvester(2, 2)
            layer.weight.add_(0.3 * torch.randn(2, 2))
            layer.bias.normal_()
            layers.append(layer)
    layers.append(Diagonal(2))
    return Flow(dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1), layers)


def infer(number: int, flow: Flow, steps: int, particles: int, lr: float, heat: bool) -> None:
    """Run SVI on a potential, where asked for with an energy that starts tempered."""
    pyro.clear_param_store()
    temperature = torch.tensor(1.0)

    def model() -> None:
        with pyro.plate("particles", particles):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
            pyro.factor("energy", -temperature * potential(number, z))

    def guide() -> None:
        pyro.module("flow", flow)
        with pyro.plate("particles", particles):
            pyro.sample("z", flow())

    optimiser = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "gamma": 0.02 ** (1 / max(steps, 1))},
        {"clip_norm": 10.0},
    )
    svi = SVI(model, guide, optimiser, Trace_ELBO())
    for step in range(steps):
        if heat:
            temperature.fill_(min(1.0, 0.05 + 1.5 * step / steps))
        svi.step()
        optimiser.step()


def fit(
    number: int,
    *,
    steps: int = 5000,
    restarts: int = 8,
    short_steps: int = 400,
    particles: int = 512,
    lr: float = 2e-2,
    seed: int = 0,
) -> Fit:
    """Fit a potential by SVI: several short tempered runs, then a long one from the best of them.

    Reverse KL has local optima (a branch left out). The ELBO of the short runs tells the better ones; it needs no
    knowledge of the normalised target.
    """
    best: tuple[float, Flow] | None = None
    for restart in range(restarts):
        pyro.set_rng_seed(seed + restart)
        flow = build()
        infer(number, flow, short_steps, particles // 2, lr, heat=True)
        loss = measure(number, flow, 20_000).kl_samples
        if best is None or loss < best[0]:
            best = loss, flow
    if best is None:
        raise ValueError(f"fit needs at least one restart, but got {restarts}.")
    infer(number, best[1], steps, particles, lr, heat=False)
    return measure(number, best[1])


@torch.no_grad()
def measure(number: int, flow: Flow, samples: int = 400_000) -> Fit:
    """Return the KL divergence from the flow to the normalised target, by samples and by integration."""
    mesh, log_cell = grid()
    mesh = mesh.to(next(flow.parameters()).dtype)
    energy = potential(number, mesh.double())
    log_z = torch.logsumexp(-energy.flatten(), 0) + log_cell
    z, log_q = flow().rsample_with_log_prob((samples,))
    kl_samples = (log_q + potential(number, z)).double().mean() + log_z
    log_density = flow().log_prob(mesh).double()
    density = log_density.exp() * math.exp(log_cell)
    kl_grid = (density * (log_density + energy + log_z)).sum()
    return Fit(number, flow, kl_samples.item(), kl_grid.item(), density.sum().item())


@torch.no_grad()
def picture(fits: list[Fit], path: Path) -> None:
    """Draw target above fit, for each potential."""
    mesh, _ = grid(5.0, 301)
    figure, axes = plt.subplots(2, len(fits), figsize=(3 * len(fits), 6.4), squeeze=False)
    for column, result in enumerate(fits):
        images = (-potential(result.number, mesh)).exp(), result.flow().log_prob(mesh).exp()
        for row, image in enumerate(images):
            ax = axes[row, column]
            ax.imshow(image, extent=(-5, 5, -5, 5), origin="lower", cmap="magma")
            ax.set_xticks([-4, 0, 4])
            ax.set_yticks([-4, 0, 4])
        axes[0, column].set_title(f"$U_{result.number}$")
        axes[1, column].set_title(f"KL = {result.kl_grid:.3f} nats")
    axes[0, 0].set_ylabel("target")
    axes[1, 0].set_ylabel(f"{LAYERS} Sylvester layers")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(fits: list[Fit]) -> str:
    """Return the results as markdown."""
    lines = [
        "| potential | KL, samples | KL, integrated | mass of the fitted density | at most |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| U{f.number} | {f.kl_samples:.4f} | {f.kl_grid:.4f} | {f.mass:.5f} | {TARGET_KL} |" for f in fits]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--restarts", type=int, default=8)
    parser.add_argument("--particles", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    fits = []
    for number in arguments.only:
        fits.append(
            fit(
                number,
                steps=arguments.steps,
                restarts=arguments.restarts,
                particles=arguments.particles,
                seed=arguments.seed,
            )
        )
        print(f"U{number}: KL {fits[-1].kl_samples:.4f} (samples), {fits[-1].kl_grid:.4f} (integrated)", flush=True)
    picture(fits, arguments.output / "energy_potentials.png")
    (arguments.output / "energy_potentials.md").write_text(table(fits))
    print(table(fits))


if __name__ == "__main__":
    main()
