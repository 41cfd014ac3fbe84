"""Tables of figures: what was measured, what is required, and whether it is met."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import Timing

__all__ = ["Figure", "run_parts", "shown", "write"]


@dataclass
class Figure:
    """One row of the table; a row without a requirement is there for comparison."""

    name: str
    measured: str
    wanted: str
    met: bool | None


def shown(timing: Timing, name: str, reference: str, digits: int = 1) -> str:
    """Return the ratio of two times, its quartiles over the rounds, and the times of all contestants."""
    low, high = timing.ratio_quartiles(name, reference)
    times = ", ".join(f"{n} {1e3 * timing.median(n):.2f} ms" for n in timing.seconds)
    return f"{timing.ratio(name, reference):.{digits}f} ({low:.{digits}f} to {high:.{digits}f}); {times}"


def write(figures: Sequence[Figure], path: Path | None, rounds: int = 0, about: str | None = None) -> None:
    """Write the table as markdown, and print it; ``about`` says how it was measured, if not in rounds."""
    verdict = {True: "yes", False: "**no**", None: ""}
    in_rounds = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratios are medians over {rounds} rounds of one "
        "run, taken in turns, with quartiles; times are medians."
    )
    lines = [
        in_rounds if about is None else about,
        "",
        "| figure | measured | must reach | reached |",
        "|---|---|---|---|",
        *(f"| {f.name} | {f.measured} | {f.wanted} | {verdict[f.met]} |" for f in figures),
    ]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def run_parts(about: str, parts: Mapping[str, Callable[[int], list[Figure]]], path: Path, rounds: int) -> None:
    """Measure on one thread what the command line asks for, and write the report.

    Args:
        about: What the script is for.
        parts: From a number of rounds to figures, by name.
        path: The report, unless the command line names another one.
        rounds: Number of rounds, unless the command line asks for few.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--output", type=Path, default=path)
    parser.add_argument("--short", action="store_true", help="few rounds")
    parser.add_argument("--part", choices=list(parts), help="measure this part alone, and write no file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = 3 if arguments.short else rounds
    chosen = [arguments.part] if arguments.part else list(parts)
    figures = [figure for part in chosen for figure in parts[part](rounds)]
    write(figures, None if arguments.part else arguments.output, rounds)
