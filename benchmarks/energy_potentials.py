"""Fit the four energy potentials of Rezende and Mohamed (2015), table 1, with eight Sylvester layers by SVI.

The potentials U2 to U4 do not grow along z1: as in the paper, the target is restricted to |z1| <= 4, here by a smooth
wall, and normalised by numerical integration on a grid. ``python benchmarks/energy_potentials.py --output DIR`` writes
``energy_potentials.png`` and ``energy_potentials.md``, with the KL divergence from the fit to the target, once from
samples and once by integrating the fitted density, which takes the layers' inverse.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")  # draw to files; needs no screen

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
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
    minutes: float = 0.0


def build() -> Flow:
    """Build eight Sylvester layers between two affine ones, not at the identity, so that modes can separate."""
    layers: list = [Diagonal(2)]
    with torch.no_grad():
        layers[0].log_scale.copy_(torch.tensor([0.7, 0.0]))
        for _ in range(LAYERS):
            layer = Sylvester(2, 2)
            layer.weight.add_(0.5 * torch.randn(2, 2))
            layer.bias.normal_(std=1.5)  # spread over the data
            layers.append(layer)
    layers.append(Diagonal(2))
    return Flow(dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1), layers)


def infer(number: int, flow: Flow, *, steps: int, particles: int, lr: float, coldest: float = 1.0) -> None:
    """Run stochastic variational inference on a potential, starting from a tempered energy.

    The inverse temperature rises geometrically from ``coldest`` to 1 within 70 % of the steps; then the learning rate
    falls to a fiftieth. Without tempering it falls from the start. Pyro's ELBO is used with a single optimiser
    of torch's: Pyro's own keep one for each parameter, which costs more than the flow.
    """
    pyro.clear_param_store()
    temper = torch.tensor(1.0)

    def model() -> None:
        with pyro.plate("particles", particles):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
            pyro.factor("energy", -temper * potential(number, z))

    def guide() -> None:
        pyro.module("flow", flow)
        with pyro.plate("particles", particles):
            pyro.sample("z", flow())

    elbo = Trace_ELBO()
    parameters = list(flow.parameters())
    optimiser = torch.optim.Adam(parameters, lr=lr, foreach=True)
    tempered = 0.7 if coldest < 1 else 0.0
    for step in range(steps):
        done = step / steps
        temper.fill_(coldest ** max(0.0, 1 - done / tempered) if tempered else 1.0)
        rate = lr * 0.02 ** (max(0.0, done - tempered) / (1 - tempered))
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        loss = elbo.differentiable_loss(model, guide) / particles
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0, foreach=True)
        optimiser.step()


def fit(
    number: int,
    *,
    steps: int = 7000,
    restarts: int = 3,
    short_steps: int = 2000,
    particles: int = 256,
    lr: float = 2e-2,
    seed: int = 0,
) -> Fit:
    """Fit a potential by SVI: several tempered runs, then a longer one from the best of them.

    Reverse KL has local optima (a missing branch). The ELBO of the first runs, which does not need the normalised
    target, tells which of them is best.

    Args:
        number: 1 to 4.
        steps: Steps of the last run, with twice the particles.
        restarts: Number of tempered runs.
        short_steps: Steps of each.
        particles: Samples per step.
        lr: Learning rate.
        seed: Seed of the first run; the others count up from it.
    """
    start = time.perf_counter()
    best: tuple[float, Flow] | None = None
    for restart in range(restarts):
        pyro.set_rng_seed(seed + restart)
        flow = build()
        infer(number, flow, steps=short_steps, particles=particles, lr=lr, coldest=0.05)
        loss = measure(number, flow, 50_000).kl_samples
        if best is None or loss < best[0]:
            best = loss, flow
    if best is None:
        raise ValueError(f"fit needs at least one restart, but got {restarts}.")
    infer(number, best[1], steps=steps, particles=2 * particles, lr=lr)
    result = measure(number, best[1])
    result.minutes = (time.perf_counter() - start) / 60
    return result


@torch.no_grad()
def measure(number: int, flow: Flow, samples: int = 400_000) -> Fit:
    """Return the KL divergence from the flow to the normalised target, by samples and by integration."""
    mesh, log_cell = grid()
    mesh = mesh.to(next(flow.parameters()).dtype)
    energy = potential(number, mesh.double())
    log_z = torch.logsumexp(-energy.flatten(), 0) + log_cell
    z, log_q = flow().rsample_and_log_prob((samples,))
    kl_samples = (log_q + potential(number, z)).double().mean() + log_z
    log_density = flow().log_prob(mesh).double()
    density = log_density.exp() * math.exp(log_cell)
    kl_grid = (density * (log_density + energy + log_z)).sum()
    return Fit(number, flow, kl_samples.item(), kl_grid.item(), density.sum().item())


@torch.no_grad()
def picture(fits: list[Fit], path: Path) -> None:
    """Draw target above fit, for each potential."""
    mesh, _ = grid(5.0, 301)
    wide, log_cell = grid()
    figure, axes = plt.subplots(2, len(fits), figsize=(3 * len(fits), 6.4), squeeze=False)
    for column, result in enumerate(fits):
        log_z = torch.logsumexp(-potential(result.number, wide).flatten(), 0) + log_cell
        target = (-potential(result.number, mesh) - log_z).exp()
        images = target, result.flow().log_prob(mesh).exp()
        for row, image in enumerate(images):
            ax = axes[row, column]
            ax.imshow(
                image, extent=(-5, 5, -5, 5), origin="lower", cmap="magma", vmin=0.0, vmax=1.1 * target.max().item()
            )
            ax.set_xticks([-4, 0, 4])
            ax.set_yticks([-4, 0, 4])
        axes[0, column].set_title(f"$U_{result.number}$")
        axes[1, column].set_title(f"KL = {result.kl_grid:.3f} nats")
    axes[0, 0].set_ylabel("target")
    axes[1, 0].set_ylabel(f"{LAYERS} Sylvester layers")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def table(fits: list[Fit]) -> str:
    """Return the results as markdown."""
    lines = [
        "| potential | KL, integrated | at most | KL, samples | mass of the fitted density |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| U{f.number} | {f.kl_grid:.4f} | {TARGET_KL} | {f.kl_samples:.4f} | {f.mass:.5f} |" for f in fits]
    return "\n".join(lines) + "\n"


def report(fits: list[Fit], settings: dict[str, int]) -> str:
    """Return the table and what is needed to repeat it."""
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    minutes = sum(f.minutes for f in fits)
    return (
        f"KL divergence in nats from a flow of {LAYERS} Sylvester layers (two units each, between two diagonal affine "
        f"layers), fitted by SVI, to the targets of Rezende and Mohamed (2015), table 1, normalised by integration on "
        f"a grid. Integrated: over the density that the layers' inverses give on that grid.\n\n{table(fits)}\n"
        f"`python benchmarks/energy_potentials.py`, torch {torch.__version__}, {torch.get_num_threads()} thread, "
        f"{said}; {minutes:.0f} minutes in all.\n\n![Targets above, fits below](energy_potentials.png)\n"
    )


def kept(number: int, settings: dict[str, int], folder: Path | None) -> Fit:
    """Return the fit for these settings from the folder, or fit and store it there."""
    if folder is None:
        return fit(number, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"u{number}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["settings"] == settings:
            flow = build()
            flow.load_state_dict(saved["state"])
            result = measure(number, flow)
            result.minutes = saved["minutes"]
            return result
    result = fit(number, **settings)
    torch.save({"settings": settings, "state": result.flow.state_dict(), "minutes": result.minutes}, path)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--short-steps", type=int, default=2000)
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoints", type=Path, help="keep fits in this folder, and take those that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    names = ("steps", "restarts", "short_steps", "particles", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    fits = []
    for number in arguments.only:
        f = kept(number, settings, arguments.checkpoints)
        fits.append(f)
        print(
            f"U{number}: KL {f.kl_grid:.4f} (integrated), {f.kl_samples:.4f} (samples), {f.minutes:.1f} min", flush=True
        )
    picture(fits, arguments.output / "energy_potentials.png")
    (arguments.output / "energy_potentials.md").write_text(report(fits, settings))
    print(table(fits))


if __name__ == "__main__":
    main()
