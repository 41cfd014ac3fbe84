"""When an inverse fails: provoke it, read the error, and walk up the ladder of remedies.

A Sylvester layer can be inverted at every parameter. Most public code does it by a fixed point in x, which converges
only where the layer is nearly the identity. Here that fixed point is run on purpose on a layer where it cannot work, as
``NumericalInverse(..., solver=FixedPoint())``; the error names the layer, the steps, the worst residual, the fraction
of the batch and a remedy. Then one rung after the other:

1. look at which rows failed (``error.solution``), and decide what happens to them (``on_failure``),
2. damp the fixed point,
3. accelerate it (``Anderson``),
4. use the Jacobian (``Newton``),
5. use the structure (the ``Sylvester`` layer itself), and more digits (float64).

``python tutorials/when_an_inverse_fails.py --output DIR`` draws ``when_an_inverse_fails.png``; ``--short`` takes a
smaller batch.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draw to files; needs no screen

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from pyro_invflows import ConvergenceError, ConvergenceWarning, NumericalInverse, Sylvester
from pyro_invflows.solvers import Anderson, FixedPoint, Newton, Settings


def make_layer(dim: int, hidden: int, strength: float) -> Sylvester:
    """Build a legal Sylvester layer whose T_ii reach from -0.9 to ``strength``: the fixed point needs |T| < 1."""
    layer = Sylvester(dim, hidden).double()
    t = torch.linspace(-0.9, strength, hidden, dtype=torch.float64)
    upper = [(0.3 * torch.randn(hidden, hidden, dtype=torch.float64)).triu(1) for _ in range(2)]
    layer.set_triangles(upper[0] + torch.diag(t), upper[1] + torch.eye(hidden, dtype=torch.float64))
    return layer


@dataclass
class Rung:
    """What one solver did."""

    name: str
    solved: float
    seconds: float
    residuals: list[float]


def climb(layer: Sylvester, y: Tensor, name: str, solver: Settings, steps: list[int]) -> Rung:
    """Return the fraction of rows solved, and the median residual in y over the number of steps."""
    residuals = []
    for bound in steps:
        settings = type(solver)(**{**solver.__dict__, "max_steps": bound, "on_failure": "warn"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # asked for, and counted below
            x = NumericalInverse(layer, solver=settings).inv(y)
        residuals.append((layer(x) - y).abs().amax(-1).median().item())
    start = time.perf_counter()
    final = type(solver)(**{**solver.__dict__, "on_failure": "nan"})
    x = NumericalInverse(layer, solver=final).inv(y)
    seconds = time.perf_counter() - start
    return Rung(name, (~x.isnan().any(-1)).double().mean().item(), seconds, residuals)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("tutorials/output/when_an_inverse_fails"))
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    layer = make_layer(dim=6, hidden=4, strength=3.0)
    x = torch.randn(32 if arguments.short else 256, 6, dtype=torch.float64)
    y = layer(x)

    print("The fixed point, on data:\n")
    try:
        NumericalInverse(layer, solver=FixedPoint(max_steps=100)).inv(y.clone())
    except ConvergenceError as error:
        print(f"ConvergenceError: {error}\n")
        failed = ~error.solution.converged
        print(f"Rung 1. error.solution says which rows failed: {int(failed.sum())} of {len(y)}.")
    careful = NumericalInverse(layer, solver=FixedPoint(max_steps=100, on_failure="nan")).inv(y.clone())
    print(f"        on_failure='nan' keeps the others: {int((~careful.isnan().any(-1)).sum())} rows are right.\n")

    steps = [1, 2, 3, 5, 8, 12, 20, 35, 60, 100]
    ladder = [
        ("fixed point", FixedPoint(max_steps=100)),
        ("damped fixed point", FixedPoint(max_steps=100, damping=0.3)),
        ("Anderson", Anderson(max_steps=100)),
        ("Newton", Newton(max_steps=100, polish=0)),
    ]
    rungs = [climb(layer, y, name, solver, steps) for name, solver in ladder]
    for number, rung in enumerate(rungs):
        print(f"{rung.name:>20}: {rung.solved:7.1%} of the rows solved, {1e3 * rung.seconds:7.1f} ms")
        if number == 1:
            print("                      (damping trades speed for a wider range; it is no cure)")
    start = time.perf_counter()
    back = layer.inv(y.clone())
    seconds = time.perf_counter() - start
    print(f"{'the layer itself':>20}: {1.0:7.1%} of the rows solved, {1e3 * seconds:7.1f} ms")
    print(f"\nThe layer's own inverse: worst error in x {(back - x).abs().max():.1e} in float64,")
    single = layer.float()
    error32 = (single.inv(single(x.float()).clone()) - x.float()).abs().max()
    print(f"{error32:.1e} in float32: what is left of the ill-conditioning is a matter of digits.")
    layer.double()

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for rung in rungs:
        axes[0].semilogy(steps, [max(r, 1e-17) for r in rung.residuals], marker="o", markersize=3, label=rung.name)
    own = (layer(layer.inv(y)) - y).abs().amax(-1).median().item()
    axes[0].axhline(max(own, 1e-17), color="black", linestyle="--", linewidth=1, label="the layer's own inverse")
    axes[0].set_xlabel("steps allowed")
    axes[0].set_ylabel("median residual in y")
    axes[0].set_xscale("log")
    axes[0].set_title("One layer, four solvers")
    strengths = [0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0]
    for name, solver in ladder:
        share = []
        for strength in strengths:
            torch.manual_seed(1)
            other = make_layer(6, 4, strength)
            share.append(climb(other, other(x), name, solver, []).solved)
        axes[1].plot(strengths, share, marker="o", markersize=3, label=name)
    axes[1].axhline(1.0, color="black", linestyle="--", linewidth=1, label="the layer's own inverse")
    axes[1].set_xscale("log")
    axes[1].set_xlabel(r"largest $T_{ii}$")
    axes[1].set_ylabel("fraction of rows solved")
    axes[1].set_ylim(-0.03, 1.06)
    axes[1].set_title("Where each of them stops")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    path = arguments.output / "when_an_inverse_fails.png"
    figure.savefig(path, dpi=110)
    print(f"\nPicture: {path}")


if __name__ == "__main__":
    main()
