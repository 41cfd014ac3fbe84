"""Measure what the base class costs: microseconds per layer, beyond the hooks themselves.

The layer's hooks do nothing. Its sub-network is as large as that of a coupling, so that the memo has as many tensors to
check. It is measured alone, and as one of eight in a chain. Medians over rounds, one thread.

    python benchmarks/base_cost.py
"""

from __future__ import annotations

import statistics
import timeit

import torch
from torch import Tensor, nn

import pyro_invflows as pf

LAYERS, CALLS, ROUNDS = 8, 200, 25


class Nothing(pf.Bijection):
    """y = x, with the parameters of a coupling."""

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.hypernet = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.zeros = torch.zeros(16)

    def _forward_aux(self, x: Tensor) -> tuple[Tensor, None]:
        return x.view_as(x), None

    def _inverse_aux(self, y: Tensor) -> tuple[Tensor, None]:
        return y.view_as(y), None

    def _log_det(self, x: Tensor, y: Tensor, aux: None) -> Tensor:
        return self.zeros


def hooks_alone(x: Tensor, layer: Nothing) -> None:
    y, aux = layer._forward_aux(x)
    layer._log_det(x, y, aux)


def svi_step(layer: pf.Bijection, x: Tensor) -> None:
    """Sample and score, as ``TransformedDistribution`` does."""
    y = layer(x)
    back = layer.inv(y)
    layer.log_abs_det_jacobian(back, y)


def main() -> None:
    torch.set_num_threads(1)
    x = torch.zeros(16, 8)
    layer, chain = Nothing(8), pf.Chain([Nothing(8) for _ in range(LAYERS)])
    rows = {
        "sampling, alone": (lambda: layer(x), 1),
        "scoring, alone": (lambda: pf.inv_and_ladj(layer, x), 1),
        "sample and score, alone": (lambda: svi_step(layer, x), 1),
        "sampling, in a chain": (lambda: chain(x), LAYERS),
        "scoring, in a chain": (lambda: pf.inv_and_ladj(chain, x), LAYERS),
        "sample and score, in a chain": (lambda: svi_step(chain, x), LAYERS),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    bare: list[float] = []
    for _ in range(ROUNDS):
        bare.append(timeit.timeit(lambda: hooks_alone(x, layer), number=CALLS) / CALLS * 1e6)
        for name, (run, layers) in rows.items():
            times[name].append(timeit.timeit(run, number=CALLS) / CALLS / layers * 1e6)
    hooks = statistics.median(bare)
    print(f"the hooks alone: {hooks:.1f} us")
    for name, values in times.items():
        quarter, median, three = statistics.quantiles(values, n=4)
        print(f"{name}: {median - hooks:.1f} us beyond the hooks ({quarter - hooks:.1f} to {three - hooks:.1f})")


if __name__ == "__main__":
    main()
