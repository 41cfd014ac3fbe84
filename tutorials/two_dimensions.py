"""Densities in the plane: one line builds a spline flow, one line trains it.

Three distributions that no Gaussian fits are learned from samples: a checkerboard, two moons and a spiral. The picture
shows the data, the density that the flow has learned, and samples from the flow.

Run it with::

    python tutorials/two_dimensions.py            # about a minute on two cores
    python tutorials/two_dimensions.py --short    # a few steps of everything, to see that it runs

The picture goes to ``tutorials/output/two_dimensions`` unless ``--output`` says otherwise.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

# Threads that spin while they wait cost more than they gain if other programs share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")  # draw to files; needs no screen

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import pyro_invflows as pf

ROWS, SECONDS, SIDE = 20_000, 15.0, 4.5


def checkerboard(count: int) -> Tensor:
    """Draw points of every other square of side 2 in [-4, 4]^2."""
    x = 8 * torch.rand(count) - 4
    row = torch.randint(2, (count,))
    y = 2 * torch.rand(count) - 4 + 4 * row + 2 * (torch.floor(x / 2) % 2)
    return torch.stack([x, y], dim=-1)


def moons(count: int) -> Tensor:
    """Draw points of two half circles that hook into each other."""
    angle, upper = math.pi * torch.rand(count), torch.rand(count) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return 2.4 * torch.stack([x, y], dim=-1) + 0.15 * torch.randn(count, 2)


def spiral(count: int) -> Tensor:
    """Draw points of two arms that wind around the origin."""
    turn = 2 * math.pi * torch.rand(count).sqrt()
    arm = torch.where(torch.rand(count) < 0.5, 1.0, -1.0)
    points = (0.6 * arm * turn).unsqueeze(-1) * torch.stack([turn.cos(), turn.sin()], dim=-1)
    return points + 0.1 * torch.randn(count, 2)


SHAPES: dict[str, Callable[[int], Tensor]] = {"checkerboard": checkerboard, "moons": moons, "spiral": spiral}


def learn(data: Tensor, short: bool) -> tuple[pf.Flow, pf.History]:
    """Build and train a flow."""
    flow = pf.flows.neural_spline_flow(2)
    return flow, pf.fit(flow, data, seconds=SECONDS, max_epochs=1 if short else 100)


@torch.no_grad()
def draw(row: Sequence[plt.Axes], data: Tensor, flow: pf.Flow) -> None:
    """Draw data, density and samples side by side."""
    axis = torch.linspace(-SIDE, SIDE, 301)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    window = [[-SIDE, SIDE], [-SIDE, SIDE]]
    for ax, points in ((row[0], data), (row[2], flow().sample((len(data),)))):
        ax.hist2d(*points.T.numpy(), bins=120, range=window, cmap="magma")
    row[1].imshow(flow().log_prob(grid).exp(), extent=(-SIDE, SIDE, -SIDE, SIDE), origin="lower", cmap="magma")
    for ax in row:
        ax.set(xticks=[], yticks=[], aspect="equal")


def main(argv: Sequence[str] | None = None) -> None:
    """Learn all three shapes and draw them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "two_dimensions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few steps only, to see that everything runs")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    rows = 2000 if options.short else ROWS
    figure, axes = plt.subplots(len(SHAPES), 3, figsize=(7.5, 7.8), layout="constrained")
    for row, (name, shape) in zip(axes, SHAPES.items(), strict=True):
        data, new = shape(rows), shape(rows)
        flow, history = learn(data, options.short)
        with torch.no_grad():
            gaussian = pf.flows.gaussian(2).initialize(data)
            ours, plain = (-f().log_prob(new).mean().item() for f in (flow, gaussian))
        print(
            f"{name}: {ours:.3f} nats on new points (Gaussian {plain:.3f}); {history.seconds:.0f} s, {history.reason}"
        )
        draw(row, data, flow)
        row[0].set_ylabel(name)
    for ax, title in zip(axes[0], ("data", "density of the flow", "samples of the flow"), strict=True):
        ax.set_title(title)
    figure.savefig(options.output / "two_dimensions.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
