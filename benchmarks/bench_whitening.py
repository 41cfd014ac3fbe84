"""Measure what whitening and injected noise cost, side by side with the plain operation that each is built on.

``python benchmarks/bench_whitening.py --output FILE`` writes a table in Markdown. Every figure is a ratio of times
measured in turns (see ``timing.py``): the median over rounds, followed by the quartiles.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import pyro.distributions as dist
import torch
from timing import Contestant, Timing, race
from torch import Tensor, nn

from pyro_invflows import Chain, Flow, Permute, affine_coupling, inject_noise, whitening

PIXELS, ROWS, BATCH = 784, 10_000, 512
DIM, INJECTED, COUPLINGS, HIDDEN = 128, 64, 8, (128, 128)


def correlated(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draw correlated rows with a mean."""
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5
    return torch.randn(rows, dim, generator=generator) @ (mix + torch.eye(dim)) + 0.5


def race_inverse(rounds: int) -> Timing:
    generator = torch.Generator().manual_seed(0)
    data = correlated(ROWS, PIXELS, generator)
    layer = whitening(PIXELS).fit(data)
    matrix = torch.randn(PIXELS, PIXELS, generator=generator)
    return race(
        {
            "Whitening.inv": Contestant(layer.inv, lambda: data),
            "one product": Contestant(lambda x: x @ matrix, lambda: data),
        },
        rounds=rounds,
        repeats=3,
    )


def race_observe(rounds: int, dtype: torch.dtype) -> Timing:
    generator = torch.Generator().manual_seed(0)
    batch = correlated(BATCH, PIXELS, generator).to(dtype)
    layer = whitening(PIXELS).to(dtype)
    return race(
        {
            "observe": Contestant(layer.observe, lambda: batch),
            "covariance": Contestant(lambda x: torch.cov(x.mT), lambda: batch),
        },
        rounds=rounds,
        repeats=5,
    )


def race_flows(rounds: int, batch: int) -> Timing:
    flows = {"64 injected": _flow(injected=True), "base of 128": _flow(injected=False)}
    generator = torch.Generator().manual_seed(0)
    y = correlated(batch, DIM, generator)

    def contestant(flow: Flow) -> Contestant:
        parameters = list(flow.parameters())

        def prepare() -> Tensor:
            for p in parameters:
                p.grad = None
            return y

        return Contestant(lambda data: (-flow().log_prob(data).mean()).backward(), prepare)

    return race({name: contestant(flow) for name, flow in flows.items()}, rounds=rounds, repeats=5)


def _flow(injected: bool) -> Flow:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    size = DIM
    if injected:
        size = DIM - INJECTED
        noise = inject_noise(size, INJECTED)
        generator = torch.Generator().manual_seed(1)
        noise.noise.transforms[0].fit(correlated(1000, INJECTED, generator))
        layers.append(noise)
    for _ in range(COUPLINGS):
        layers += [affine_coupling(DIM, HIDDEN), Permute(torch.arange(DIM - 1, -1, -1))]
    return Flow(dist.Normal(torch.zeros(size), torch.ones(size)).to_event(1), Chain(layers))


def row(what: str, timing: Timing, name: str, reference: str, limit: float) -> str:
    """Return one line of the table."""
    ratio, (low, high) = timing.ratio(name, reference), timing.ratio_quartiles(name, reference)
    times = " / ".join(f"{1e3 * timing.median(n):.2f}" for n in (name, reference))
    verdict = "yes" if ratio <= limit else "**no**"
    return f"| {what} | {times} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {limit:g} | {verdict} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Run all races and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown file; it is printed in any case")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    races: list[tuple[str, Callable[[], Timing], str, str, float]] = [
        (
            f"`Whitening({PIXELS})`, inverse of {ROWS} rows, over one product of that size",
            lambda: race_inverse(options.rounds),
            "Whitening.inv",
            "one product",
            1.5,
        )
    ]
    for dtype in (torch.float32, torch.float64):
        races.append(
            (
                f"`observe`, D {PIXELS}, batch {BATCH}, {dtype}, over the batch's covariance",
                lambda dtype=dtype: race_observe(options.rounds, dtype),  # type: ignore[misc]
                "observe",
                "covariance",
                3.0,
            )
        )
    for batch in (128, 512):
        races.append(
            (
                f"{COUPLINGS} couplings on {DIM}, {INJECTED} of them injected whitened noise: `log_prob` and backward "
                f"of {batch} rows, over a base of {DIM}",
                lambda batch=batch: race_flows(options.rounds, batch),  # type: ignore[misc]
                "64 injected",
                "base of 128",
                1.2,
            )
        )
    lines = [
        "# Whitening and injected noise",
        "",
        f"torch {torch.__version__}, {options.threads} thread(s), {platform.machine()}, {options.rounds} rounds; "
        "float32 unless it says otherwise.",
        "",
        "| what, over what | ms / ms | ratio (quartiles) | must be at most | reached |",
        "|---|---|---|---|---|",
    ]
    for what, run, name, reference, limit in races:
        lines.append(row(what, run(), name, reference, limit))
        print(lines[-1], flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
