"""Measure Sylvester, planar and low-rank layers side by side with Picard iteration, Pyro and dense algebra.

``python benchmarks/bench_sylvester.py --output FILE`` writes a markdown table of ratios: medians and quartiles over the
rounds of one run, in which the contestants take turns (see ``timing.py``), with two threads. It takes a few minutes;
``--short`` runs few rounds. The divergences of ``energy_potentials.py``, which are not timings, are read from the file
that it wrote to the same folder; ``--potentials`` fits again, which takes ten minutes more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from report import Figure, shown, write
from timing import Contestant, race
from torch import Tensor

from pyro_invflows import Flow, LowRankLinear, Planar, Sylvester, call_and_ladj, inv_and_ladj
from pyro_invflows.solvers import FixedPoint


def spread(layer: Sylvester, low: float, high: float, off: float, seed: int = 0) -> Sylvester:
    """Set T_ii to a spread over [low, high] and the off-diagonals of R1 and R2 to ``off / sqrt(m)``."""
    m, g = layer.hidden_dim, torch.Generator().manual_seed(seed)
    dtype = layer.weight.dtype
    t = torch.linspace(low, high, m, dtype=dtype)[torch.randperm(m, generator=g)]
    upper = [(torch.randn(m, m, dtype=dtype, generator=g) * off / m**0.5).triu(1) for _ in range(2)]
    layer.set_triangles(upper[0] + torch.diag(t), upper[1] + torch.eye(m, dtype=dtype))
    with torch.no_grad():
        layer.bias.normal_(generator=g)
    return layer


@torch.no_grad()
def against_picard(rounds: int) -> list[Figure]:
    """Invert where Picard iteration in x converges, and where it does not."""
    layer = spread(Sylvester(64, 16, cache_size=0).double(), -0.8, 0.8, 0.15)
    x = torch.randn(1024, 64, dtype=torch.float64)
    y = layer(x)

    def picard(layer: Sylvester, y: Tensor, steps: int) -> Tensor:
        out, into, *_ = layer._matrices()  # once, not at every step, in favour of the iteration
        x = y
        for _ in range(steps):
            x = y - torch.tanh(torch.addmm(layer.bias, x, into)) @ out.mT
        return x

    ours = (layer(layer.inv(y)) - y).abs().max().item()
    steps = 1
    while steps < 2000 and (layer(picard(layer, y, steps)) - y).abs().max() > max(4 * ours, 1e-13):
        steps = steps + 1 + steps // 20
    residual = (layer(picard(layer, y, steps)) - y).abs().max().item()
    timing = race(
        {
            "ours": Contestant(lambda _: layer.inv(y)),
            "Picard": Contestant(lambda _: picard(layer, y, steps)),
        },
        rounds=rounds,
        repeats=3,
    )
    ratio = timing.ratio("ours", "Picard")
    hard = spread(Sylvester(64, 16, cache_size=0).double(), -0.95, 3.0, 0.5)
    y_hard = hard(x)
    lost = (picard(hard, y_hard, 1000) - x).abs().max().item()
    solved = FixedPoint(max_steps=1000, on_failure="nan")(lambda x, y: hard(x) - y, y_hard, y_hard).converged
    kept = (hard.inv(y_hard) - x).abs().max().item()
    return [
        Figure(
            f"Sylvester inverse, D 64, m 16, batch 1024, float64: time over that of Picard in x ({steps} steps, "
            f"residual {residual:.0e}; ours {ours:.0e})",
            shown(timing, "ours", "Picard", 3),
            "<= 0.2",
            ratio <= 0.2,
        ),
        Figure(
            "the same, T_ii over (-0.95, 3): error in x, after 1000 steps of Picard and ours",
            f"Picard {lost:.1e} ({(~solved).double().mean():.0%} of the rows not converged), ours {kept:.1e}",
            "converges",
            kept <= 1e-11,
        ),
    ]


def against_pyro(rounds: int) -> list[Figure]:
    """Time forward, log-det and backward side by side with Pyro's layer."""
    ours, theirs = spread(Sylvester(256, 32), -0.9, 3.0, 0.5), pyro_transforms.sylvester(256, 32)

    def prepare(layer: torch.nn.Module) -> Tensor:
        layer.zero_grad()
        return torch.randn(256, 256)

    def step_ours(x: Tensor) -> None:
        y, ladj = call_and_ladj(ours, x)
        (y.sum() + ladj.sum()).backward()

    def step_theirs(x: Tensor) -> None:
        y = theirs(x)
        (y.sum() + theirs.log_abs_det_jacobian(x, y).sum()).backward()

    timing = race(
        {
            "Pyro": Contestant(step_theirs, lambda: prepare(theirs)),
            "ours": Contestant(step_ours, lambda: prepare(ours)),
        },
        rounds=rounds,
        repeats=3,
    )
    ratio = timing.ratio("Pyro", "ours")
    return [
        Figure(
            "Sylvester forward + log-det + backward, D 256, m 32, batch 256: times as fast as Pyro's "
            "`sylvester(256, 32)`",
            shown(timing, "Pyro", "ours"),
            ">= 10",
            ratio >= 10,
        )
    ]


@torch.no_grad()
def inverse_over_forward(rounds: int) -> list[Figure]:
    """Compare the two directions."""
    layer = spread(Sylvester(256, 32, cache_size=0), -0.95, 3.0, 0.5)
    x = torch.randn(256, 256)
    y = layer(x)
    timing = race(
        {"inverse": Contestant(lambda _: layer.inv(y)), "forward": Contestant(lambda _: layer(x))},
        rounds=rounds,
        repeats=7,
    )
    ratio = timing.ratio("inverse", "forward")
    error = (layer.inv(y) - x).abs().max().item()
    return [
        Figure(
            f"Sylvester inverse over forward, D 256, m 32, batch 256, float32 (round trip {error:.0e})",
            shown(timing, "inverse", "forward"),
            "<= 8",
            ratio <= 8,
        )
    ]


@torch.no_grad()
def low_rank(rounds: int) -> list[Figure]:
    """Time the inverse and the log-det side by side with a dense solve and slogdet."""
    layer = LowRankLinear(1024, 16, cache_size=0)
    torch.nn.init.normal_(layer.left, std=0.05)
    torch.nn.init.normal_(layer.right, std=0.05)
    y, matrix = torch.randn(256, 1024), layer.matrix

    def dense(_: object) -> tuple[Tensor, Tensor]:
        return torch.linalg.solve(matrix, (y - layer.bias).mT).mT, torch.linalg.slogdet(matrix)[1]

    error = (dense(None)[0] - layer.inv(y)).abs().max().item()
    timing = race(
        {"dense": Contestant(dense), "ours": Contestant(lambda _: inv_and_ladj(layer, y))}, rounds=rounds, repeats=3
    )
    ratio = timing.ratio("dense", "ours")
    return [
        Figure(
            f"LowRankLinear D 1024, r 16, batch 256, inverse + log-det: times as fast as a dense solve + slogdet "
            f"(difference {error:.0e})",
            shown(timing, "dense", "ours"),
            ">= 20",
            ratio >= 20,
        )
    ]


@torch.no_grad()
def planar(rounds: int) -> list[Figure]:
    """Time scoring data under 32 planar layers side by side with sampling."""
    layers = [Planar(32, cache_size=0) for _ in range(32)]
    for layer in layers:
        torch.nn.init.normal_(layer.u, std=0.5)
    flow = Flow(dist.Normal(torch.zeros(32), torch.ones(32)).to_event(1), layers)()
    figures = []
    for batch in (256, 1024):
        y = flow.sample((batch,)).clone()
        finite = bool(flow.log_prob(y).isfinite().all())
        timing = race(
            {
                "log_prob": Contestant(lambda _, y=y: flow.log_prob(y)),
                "sample": Contestant(lambda _, batch=batch: flow.sample((batch,))),
            },
            rounds=rounds,
            repeats=5,
        )
        ratio = timing.ratio("log_prob", "sample")
        figures.append(
            Figure(
                f"Planar, 32 layers, D 32, batch {batch}: log_prob of data over sampling",
                shown(timing, "log_prob", "sample"),
                "<= 8",
                finite and ratio <= 8,
            )
        )
    return figures


def potentials(folder: Path, anew: bool) -> list[Figure]:
    """Read the divergences of the four energy potentials from the table in the output folder, or fit them."""
    from energy_potentials import LAYERS, TARGET_KL, fit, picture

    source = folder / "energy_potentials.md"
    if anew:
        fits = [fit(number) for number in (1, 2, 3, 4)]
        picture(fits, folder / "energy_potentials.png")
        found = {f"U{f.number}": f.kl_grid for f in fits}
    elif source.exists():
        rows = [line.strip("| ").split(" | ") for line in source.read_text().splitlines() if line.startswith("| U")]
        found = {row[0]: float(row[1]) for row in rows}
    else:
        found = {}
    return [
        Figure(
            f"energy potential {name}, {LAYERS} Sylvester layers, SVI: KL to the integrated target, nats",
            f"{found[name]:.4f}" if name in found else "not measured: run energy_potentials.py",
            f"<= {TARGET_KL}",
            found.get(name, torch.inf) <= TARGET_KL,
        )
        for name in ("U1", "U2", "U3", "U4")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sylvester.md"))
    parser.add_argument("--short", action="store_true", help="few rounds")
    parser.add_argument("--potentials", action="store_true", help="fit the energy potentials again")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rounds = 3 if arguments.short else 25
    figures = []
    for measure in (against_picard, against_pyro, inverse_over_forward, low_rank, planar):
        figures += measure(rounds)
    figures += potentials(arguments.output.parent, arguments.potentials)
    write(figures, arguments.output, rounds)


if __name__ == "__main__":
    main()
