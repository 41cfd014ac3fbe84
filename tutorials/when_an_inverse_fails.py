"""When an inverse fails: provoke a failure, read the error, and climb the ladder of remedies.

A Sylvester layer is invertible at any parameters. Most public code inverts it by a fixed-point iteration in x, which
converges only if the layer is nearly the identity, and which returns its last iterate when the steps are used up. Here
that iteration is run on purpose on a layer where it cannot work, as ``NumericalInverse(layer, solver=FixedPoint())``.
Instead of a wrong x there is an error, which names the layer, the steps, the worst residual, the fraction of the batch
and a remedy. Then one rung after the other (see also ``docs/solvers.md``):

1. look at which rows failed and by how much (``error.solution``),
2. allow more steps: right if the residual is still falling, useless if it is not,
3. damp the fixed-point iteration, then accelerate it (``Anderson``),
4. use the Jacobian (``Newton``),
5. use the structure: the layer's own inverse,
6. decide what the failed rows mean (``on_failure``).

The last part shows what no solver can cure: where a layer is nearly flat, y says little about x. The inverse then
reproduces y, and only more digits help to recover x.

Run it with::

    python tutorials/when_an_inverse_fails.py            # under a minute
    python tutorials/when_an_inverse_fails.py --short    # a small batch, a few seconds

The picture goes to ``tutorials/output/when_an_inverse_fails`` unless ``--output`` says otherwise.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

# Threads that spin while they wait cost more than they gain if other programs share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")  # draw to files; needs no screen

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import TanhTransform

from pyro_invflows import ConvergenceError, ConvergenceWarning, NumericalInverse, Sylvester
from pyro_invflows.solvers import Anderson, FixedPoint, Newton, Settings, Status

DIM, HIDDEN = 6, 4
LADDER: dict[str, Settings] = {
    "fixed point": FixedPoint(max_steps=100),
    "damped fixed point": FixedPoint(max_steps=100, damping=0.3),
    "Anderson": Anderson(max_steps=100),
    "Newton": Newton(max_steps=100),
}
COLOURS = dict(zip(LADDER, ("tab:red", "tab:orange", "tab:blue", "tab:green"), strict=True))


def make_layer(low: float = -0.9, high: float = 3.0, seed: int = 0) -> Sylvester:
    """Build a Sylvester layer with T_ii from ``low`` to ``high``; the fixed-point iteration needs about |T| < 1.

    It has no memo. With one, a layer that has just computed x from y would answer ``layer(x)`` with that very y, and
    every residual below would be zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = Sylvester(DIM, HIDDEN, cache_size=0).double()
    upper = [0.3 * torch.randn(HIDDEN, HIDDEN, dtype=torch.float64, generator=generator).triu(1) for _ in range(2)]
    t = torch.linspace(low, high, HIDDEN, dtype=torch.float64)
    layer.set_triangles(upper[0] + torch.diag(t), upper[1] + torch.eye(HIDDEN, dtype=torch.float64))
    return layer


def invert(layer: Sylvester, y: Tensor, solver: Settings, on_failure: str) -> Tensor:
    """Invert with a solver that knows nothing about the layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # asked for, and counted here
        return NumericalInverse(layer, solver=replace(solver, on_failure=on_failure), cache_size=0).inv(y)


def residual(layer: Sylvester, x: Tensor, y: Tensor) -> Tensor:
    """Return ``|f(x) - y|`` row by row: the criterion of convergence."""
    return (layer(x) - y).abs().amax(-1)


@dataclass
class Rung:
    """What one solver did."""

    name: str
    solved: float
    milliseconds: float
    worst: float

    def __str__(self) -> str:
        return (
            f"    {self.name:>20}: {self.solved:6.1%} of the rows, {self.milliseconds:8.1f} ms, worst residual of all "
            f"{self.worst:.0e}"
        )


def climb(layer: Sylvester, y: Tensor, name: str, solver: Settings | None) -> Rung:
    """Invert with a solver, or with the layer's own inverse."""
    last = layer.inv(y) if solver is None else invert(layer, y, solver, "warn")
    start = time.perf_counter()
    x = layer.inv(y) if solver is None else invert(layer, y, solver, "nan")
    seconds = time.perf_counter() - start
    solved = (~x.isnan().any(-1)).double().mean().item()
    return Rung(name, solved, 1e3 * seconds, residual(layer, last, y).max().item())


@torch.no_grad()
def ladder(layer: Sylvester, x: Tensor) -> None:
    """Provoke a failure and mend it, and print each step."""
    y = layer(x)
    print("An invertible layer, data that it made itself, and the fixed-point iteration that most code uses:\n")
    try:
        NumericalInverse(layer, solver=LADDER["fixed point"]).inv(y)
    except ConvergenceError as error:
        print(f"ConvergenceError: {error}\n")
        solution = error.solution
    else:
        raise RuntimeError("the fixed point should have failed here")

    base = dist.Normal(torch.zeros(DIM, dtype=torch.float64), 1.0).to_event(1)
    wrong = invert(layer, y, LADDER["fixed point"], "warn")
    gap = (base.log_prob(wrong) - layer.log_abs_det_jacobian(wrong, y)) - (
        base.log_prob(x) - layer.log_abs_det_jacobian(x, y)
    )
    print("Had the last iterate been returned, the log-density of a point would have been wrong by")
    print(f"{gap.abs().median():.1f} nats in the median, {gap.abs().max():.1f} at worst, without an error.\n")

    print("Rung 1, look. error.solution has a status, the steps and the residual of every row:")
    for status in Status:
        rows = solution.status == status
        if rows.any():
            largest = solution.residual[rows].max()
            print(f"    {status.name:>10}: {int(rows.sum())} rows, largest residual {largest:.1e}")

    print("Rung 2, more steps: the median residual after")
    for steps in (10, 100, 1000):
        last = invert(layer, y, FixedPoint(max_steps=steps), "warn")
        print(f"    {steps:>10} steps: {residual(layer, last, y).median():.1e}")
    print("    It does not fall: the iteration is not slow here, it does not converge.")

    print("Rung 3, damping and acceleration:")
    print(climb(layer, y, "fixed point", LADDER["fixed point"]))
    print(climb(layer, y, "damped fixed point", LADDER["damped fixed point"]))
    print(climb(layer, y, "Anderson", LADDER["Anderson"]))
    print("    Damping solves more rows and is slow; Anderson needs neither tuning nor a derivative.")
    print("Rung 4, the Jacobian:")
    print(climb(layer, y, "Newton", LADDER["Newton"]))
    print("Rung 5, the structure. The layer has to solve only a triangular system of 4 equations:")
    print(climb(layer, y, "the layer itself", None))

    print("Rung 6, rows that no solver can invert. A y that no x maps to:")
    try:
        NumericalInverse(TanhTransform()).inv(torch.tensor([0.5, 2.0], dtype=torch.float64))
    except ConvergenceError as error:
        print(f"    ConvergenceError: {error}")
    print("or a NaN:")
    spoilt = y.clone()
    spoilt[1] = torch.nan
    kept = invert(layer, spoilt, LADDER["Newton"], "nan").isnan().any(-1)
    print(f"    on_failure='nan' marks {int(kept.sum())} row and returns the other {int((~kept).sum())};")
    print("    'warn' returns the last iterates with a ConvergenceWarning; 'raise', the default, stops.\n")


@torch.no_grad()
def flatness(dtype: torch.dtype, gaps: list[float], rows: int) -> tuple[list[float], list[float]]:
    """Return the worst residual in y and the worst error in x, for layers whose least slope, at 0, is each gap."""
    in_y, in_x = [], []
    x = torch.randn(rows, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x * torch.logspace(-8, 0, rows, dtype=torch.float64).unsqueeze(-1)  # points at every distance from 0
    for gap in gaps:
        layer = make_layer(low=-1 + gap).to(dtype)
        y = layer(x.to(dtype))
        back = layer.inv(y)
        in_y.append(max(residual(layer, back, y).max().item(), torch.finfo(dtype).tiny))
        in_x.append((back - x.to(dtype)).abs().max().item())
    return in_y, in_x


@torch.no_grad()
def picture(layer: Sylvester, x: Tensor, path: Path) -> None:
    """Draw how fast each solver is, where it fails, and which errors remain where the layer is nearly flat."""
    y = layer(x)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")

    steps = [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 35, 60, 100]
    for name, solver in LADDER.items():
        bounded = [replace(solver, max_steps=bound) for bound in steps]
        medians = [residual(layer, invert(layer, y, s, "warn"), y).median().item() for s in bounded]
        axes[0].loglog(steps, medians, marker="o", markersize=3, color=COLOURS[name])
    own = residual(layer, layer.inv(y), y).median().item()
    axes[0].axhline(own, color="black", linestyle="--", linewidth=1)
    axes[0].set_xlabel("steps allowed")
    axes[0].set_ylabel("median residual in y")
    axes[0].set_title("One layer: how fast each solver is")

    strengths = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0]
    layers = [make_layer(-0.9 * min(1.0, strength), strength, seed=1) for strength in strengths]
    for name, solver in LADDER.items():
        solved = [climb(other, other(x), name, solver).solved for other in layers]
        axes[1].semilogx(strengths, solved, marker="o", markersize=3, color=COLOURS[name], label=name)
    solved = [climb(other, other(x), "", None).solved for other in layers]
    axes[1].semilogx(strengths, solved, color="black", linestyle="--", linewidth=1, label="the layer itself")
    axes[1].set_xlabel(r"largest $T_{ii}$: how far the layer is from the identity")
    axes[1].set_ylabel("rows solved in 100 steps")
    axes[1].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes[1].set_title("Many layers: where each solver fails")

    gaps = [10.0**-k for k in range(13)]
    for dtype, colour in ((torch.float32, "tab:purple"), (torch.float64, "tab:cyan")):
        in_y, in_x = flatness(dtype, gaps, len(x))
        name = str(dtype).removeprefix("torch.")
        axes[2].loglog(gaps, in_x, marker="o", markersize=3, color=colour, label=f"x, {name}")
        axes[2].loglog(gaps, in_y, linestyle=":", color=colour, label=f"y, {name}")
    axes[2].invert_xaxis()
    axes[2].set_xlabel(r"least slope of the layer, $1 + \min T_{ii}$")
    axes[2].set_ylabel("worst error")
    axes[2].set_title("Nearly flat: y is reproduced, x is not")
    axes[2].legend(fontsize=8)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("tutorials/output/when_an_inverse_fails"))
    parser.add_argument("--short", action="store_true", help="a small batch")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    layer = make_layer()
    x = torch.randn(32 if arguments.short else 256, DIM, dtype=torch.float64)
    ladder(layer, x)

    gaps = [1e-1, 1e-6, 1e-12]
    print("What no solver can cure. The least slope of a layer, and the worst error of its own inverse in y and in x:")
    for dtype in (torch.float32, torch.float64):
        for gap, in_y, in_x in zip(gaps, *flatness(dtype, gaps, len(x)), strict=True):
            print(f"    {str(dtype).removeprefix('torch.'):>10}, slope {gap:.0e}: y {in_y:.0e}, x {in_x:.0e}")
    print("    y is always reproduced to rounding error; x only as well as y determines it. Only more digits help.")

    path = arguments.output / "when_an_inverse_fails.png"
    picture(layer, x, path)
    print(f"\nPicture: {path}")


if __name__ == "__main__":
    main()
