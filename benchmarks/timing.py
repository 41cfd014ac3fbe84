"""Side by side timing: every contestant runs in every round, and a figure is a median over rounds of one run.

A single number means little on a busy machine. So what is compared is always measured together, in turns, and ratios
are taken within each round, before the median over the rounds.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Contestant", "Timing", "race"]


@dataclass
class Contestant:
    """Something to time.

    Args:
        run: The timed call; it gets what ``prepare`` returned.
        prepare: Called before each timed call, not timed: fresh inputs, cleared gradients.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass
class Timing:
    """The times of all contestants: ``seconds[name][r]`` is the median of round ``r``."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Return the median over the rounds, in seconds."""
        return statistics.median(self.seconds[name])

    def quartiles(self, name: str) -> tuple[float, float]:
        """Return the lower and the upper quartile over the rounds, in seconds."""
        return _quartiles(self.seconds[name])

    def ratios(self, name: str, reference: str) -> list[float]:
        """Return time over reference time, round by round."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[reference], strict=True)]

    def ratio(self, name: str, reference: str) -> float:
        """Return the median over the rounds of time over reference time."""
        return statistics.median(self.ratios(name, reference))

    def ratio_quartiles(self, name: str, reference: str) -> tuple[float, float]:
        """Return the quartiles over the rounds of time over reference time."""
        return _quartiles(self.ratios(name, reference))

    def summary(self) -> dict[str, dict[str, float]]:
        """Return medians and quartiles in milliseconds, ready for JSON."""
        out = {}
        for name in self.seconds:
            low, high = self.quartiles(name)
            out[name] = {"median_ms": 1e3 * self.median(name), "low_ms": 1e3 * low, "high_ms": 1e3 * high}
        return out


def race(
    contestants: Mapping[str, Contestant],
    *,
    rounds: int = 30,
    repeats: int = 5,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time the contestants in turns.

    Args:
        contestants: By name.
        rounds: Number of rounds; the order within a round is drawn at random each time.
        repeats: Calls of a contestant in a round, of which the median counts.
        warmup: Untimed calls of each before the first round.
        clock: Returns seconds; with one thread, ``time.process_time`` is not affected by other programs.
    """
    for contestant in contestants.values():
        for _ in range(warmup):
            contestant.run(contestant.prepare())
    order = random.Random(0)
    timing = Timing({name: [] for name in contestants})
    names = list(contestants)
    was_enabled = gc.isenabled()
    try:
        for _ in range(rounds):
            order.shuffle(names)
            gc.collect()
            gc.disable()
            for name in names:
                timing.seconds[name].append(_median_call(contestants[name], repeats, clock))
    finally:
        if was_enabled:
            gc.enable()
    return timing


def _median_call(contestant: Contestant, repeats: int, clock: Callable[[], float]) -> float:
    times = []
    for _ in range(repeats):
        argument = contestant.prepare()
        start = clock()
        result = contestant.run(argument)
        times.append(clock() - start)
        del result
    return statistics.median(times)


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high
