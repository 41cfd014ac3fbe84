"""Measure what this library promises, side by side with its peers, and write a table.

``python benchmarks/run.py --output benchmarks/results/`` writes ``foundation.md`` and ``foundation.json``. Speed is
given as ratios of times measured in turns (see ``timing.py``), with two threads. Run it on an otherwise idle machine:
torch's threads wait for each other, and other programs slow the contestants down unevenly.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from contestants import COUPLINGS, DIM, HIDDEN, FlowContestant, bare_networks, coupling_flows, our_layers, set_weights
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from timing import Contestant, Timing, race
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_invflows import Baird, Chain, Flow, Orthogonal, affine_coupling, stack

BATCH = 256
PEERS = ("pyro", "zuko", "nflows", "normflows")
THREADS = 2


@dataclass
class Row:
    """One line of the table; ``met`` is None where nothing was promised."""

    what: str
    measured: str
    target: str = ""
    met: bool | None = None


@dataclass
class Result:
    """Rows, and everything behind them."""

    rows: list[Row]
    details: dict[str, Any]


def _spread(timing: Timing, name: str, reference: str) -> str:
    low, high = timing.ratio_quartiles(name, reference)
    return f"{timing.ratio(name, reference):.2f} ({low:.2f} to {high:.2f})"


# ---------------------------------------------------------------------- orthogonal layers


def _pass_through(module: nn.Module, dim: int, weights: Tensor) -> Contestant:
    """Forward and backward, with gradients to the input and to the parameters."""
    parameters = list(module.parameters())

    def prepare() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        return torch.randn(BATCH, dim, requires_grad=True)

    return Contestant(lambda x: module(x).backward(weights), prepare)


def orthogonal(dim: int, faster_than_pyro: float, slower_than_linear: float | None, rounds: int) -> Result:
    """Time ``Orthogonal`` with ``dim`` reflections against Pyro's ``Householder`` and a plain linear layer."""
    ours = Orthogonal(dim, num_reflections=dim)
    nn.init.normal_(ours.vectors)
    modules = {"invflows": ours, "pyro": pyro_transforms.Householder(dim, dim), "linear": nn.Linear(dim, dim)}
    weights = torch.randn(BATCH, dim)
    timing = race(
        {name: _pass_through(module, dim, weights) for name, module in modules.items()},
        rounds=rounds,
        repeats=3,
        warmup=2,
    )
    speedup, cost = timing.ratio("pyro", "invflows"), timing.ratio("invflows", "linear")
    title = f"`Orthogonal({dim})`, {dim} reflections, batch {BATCH}, forward + backward"
    rows = [
        Row(
            f"{title}: times as fast as Pyro's `Householder`",
            _spread(timing, "pyro", "invflows"),
            f">= {faster_than_pyro:g}",
            speedup >= faster_than_pyro,
        ),
        Row(
            f"{title}: times a plain `nn.Linear`",
            _spread(timing, "invflows", "linear"),
            f"<= {slower_than_linear:g}" if slower_than_linear else "",
            cost <= slower_than_linear if slower_than_linear else None,
        ),
    ]
    return Result(rows, timing.summary())


# ---------------------------------------------------------------------- couplings


def _scoring(flow: FlowContestant) -> Contestant:
    def prepare() -> Tensor:
        Distribution.set_default_validate_args(flow.validates)
        for parameter in flow.parameters:
            parameter.grad = None
        return torch.randn(BATCH, DIM)  # a new tensor: Pyro's caches would return the last graph

    return Contestant(lambda x: flow.log_prob(x).mean().backward(), prepare)


@torch.no_grad()
def _draw(flow: FlowContestant, _: object) -> Tensor:
    return flow.sample(BATCH)


def _sampling(flow: FlowContestant) -> Contestant:
    return Contestant(partial(_draw, flow), lambda: Distribution.set_default_validate_args(flow.validates))


def _coupling_race(kind: Callable[[FlowContestant], Contestant], rounds: int) -> Timing:
    flows = {"bare networks": bare_networks(), **coupling_flows()}
    try:
        return race({name: kind(flow) for name, flow in flows.items()}, rounds=rounds, repeats=5)
    finally:
        Distribution.set_default_validate_args(__debug__)


def _best_peer(timing: Timing) -> str:
    return min(PEERS, key=lambda name: timing.ratio(name, "bare networks"))


def coupling_scores(rounds: int) -> Result:
    """Time ``log_prob`` and backward of eight couplings against the bare networks and the peers."""
    timing = _coupling_race(_scoring, rounds)
    best = _best_peer(timing)
    rows = []
    for name in timing.seconds:
        cost = timing.ratio(name, "bare networks")
        behind = timing.ratio(name, best)
        target, met = "", None
        if name == "invflows Flow":
            target, met = "<= 1.6, faster than each peer", cost <= 1.6 and behind < 1
        elif name.startswith("invflows"):
            target, met = "<= 1.75, at most 5 % behind any peer", cost <= 1.75 and behind <= 1.05
        rows.append(
            Row(
                f"{COUPLINGS} couplings, D {DIM}, hidden {HIDDEN[0]}-{HIDDEN[1]}, batch {BATCH}, `log_prob` + "
                f"backward, {name}: times the bare networks; times {best}, the best peer",
                f"{_spread(timing, name, 'bare networks')}; {_spread(timing, name, best)}",
                target,
                met,
            )
        )
    return Result(rows, timing.summary())


def coupling_samples(rounds: int) -> Result:
    """Time sampling from the same flows."""
    timing = _coupling_race(_sampling, rounds)
    best = _best_peer(timing)
    rows = []
    for name in timing.seconds:
        ours = name.startswith("invflows")
        rows.append(
            Row(
                f"The same, {BATCH} samples, {name}: times {best}, the best peer",
                _spread(timing, name, best),
                "< 1" if ours else "",
                timing.ratio(name, best) < 1 if ours else None,
            )
        )
    return Result(rows, timing.summary())


# ---------------------------------------------------------------------- evaluations of the networks


class _Counter:
    """Counts the calls of the coupling networks of a module."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.calls = 0
        self.networks = [m.hypernet for module in modules for m in module.modules() if hasattr(m, "hypernet")]
        for network in self.networks:
            network.register_forward_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.calls += 1

    def calls_a_network(self, call: Callable[[], object]) -> float:
        self.calls = 0
        call()
        return self.calls / len(self.networks)


def _score_and_step(layers: list[nn.Module], build: Callable[[], Distribution]) -> tuple[float, float]:
    """Return the evaluations per network in ``log_prob`` of data, and in a step of SVI with this guide."""
    counter = _Counter(layers)
    data = torch.randn(BATCH, DIM)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(DIM), 2.0).to_event(1))

    def guide() -> None:
        pyro.module("layers", nn.ModuleList(layers))
        pyro.sample("z", build())

    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step()
    return counter.calls_a_network(lambda: build().log_prob(data)), counter.calls_a_network(svi.step)


def _auto_guide() -> float:
    """Return the evaluations per network in a step of SVI with Pyro's automatic guide."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(DIM), 2.0).to_event(1))

    pyro.clear_param_store()
    guide = AutoNormalizingFlow(model, partial(stack, COUPLINGS, affine_coupling))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step()  # the guide builds its layers in the first step
    return _Counter([guide.transform]).calls_a_network(svi.step)


def network_evaluations() -> Result:
    """Count how often each coupling network runs."""
    counts = {}
    layers = our_layers()
    base = dist.Normal(torch.zeros(DIM), 1.0).to_event(1)
    counts["a list"] = _score_and_step(layers, lambda: dist.TransformedDistribution(base, layers))
    chain = Chain(our_layers())
    counts["`Chain`"] = _score_and_step([chain], lambda: dist.TransformedDistribution(base, [chain]))
    flow = Flow(base, our_layers())
    counts["`Flow`"] = _score_and_step([flow], flow)
    rows = [
        Row(f"Network evaluations a layer, through {name}: `log_prob`, SVI step", f"{a:g}, {b:g}", "1, 1", a == b == 1)
        for name, (a, b) in counts.items()
    ]
    auto = _auto_guide()
    rows.append(
        Row("The same, `AutoNormalizingFlow(model, partial(stack, n, layer))`: SVI step", f"{auto:g}", "1", auto == 1)
    )
    return Result(rows, {**counts, "AutoNormalizingFlow": auto})


# ---------------------------------------------------------------------- memory


def kept_bytes(call: Callable[[], Tensor], parameters: list[nn.Parameter]) -> tuple[int, Tensor]:
    """Return the bytes, without parameters, that autograd keeps for the backward pass of ``call``, and its result."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return sum(storage.nbytes() for storage in storages.values()), result


def _deep_chain(layers: int, recompute: bool) -> Chain:
    torch.manual_seed(0)
    parts = [part for _ in range(math.ceil(layers / COUPLINGS)) for part in our_layers()]
    couplings = 0
    kept = []
    for part in parts:
        couplings += hasattr(part, "hypernet")
        kept.append(part)
        if couplings == layers:
            break
    chain = Chain(kept, recompute=recompute).double()
    set_weights(chain)
    return chain


def recomputation() -> Result:
    """Compare the bytes kept at 64 and 4 couplings, and the gradients with those of the plain chain."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, DIM, dtype=torch.float64)
    weights, ladj_weights = torch.randn(BATCH, DIM, dtype=torch.float64), torch.randn(BATCH, dtype=torch.float64)
    sizes: dict[str, int] = {}
    gradients: dict[bool, list[Tensor]] = {}
    for recompute in (False, True):
        for layers in (4, 64):
            chain = _deep_chain(layers, recompute)
            parameters = list(chain.parameters())
            start = x.clone().requires_grad_()

            def loss(chain: Chain = chain, start: Tensor = start) -> Tensor:
                y = chain(start)
                # weighted sums would keep y and the weights: count what the chain keeps
                ladj = chain.log_abs_det_jacobian(start, y)
                return torch.cat([y.flatten(), ladj.flatten()])

            size, out = kept_bytes(loss, parameters)
            sizes[f"{'recompute' if recompute else 'plain'}, {layers}"] = size
            if layers == 64:
                out.backward(torch.cat([weights.flatten(), ladj_weights]) / BATCH)
                gradients[recompute] = [start.grad, *(p.grad for p in parameters if p.grad is not None)]
    growth = {kind: sizes[f"{kind}, 64"] / sizes[f"{kind}, 4"] for kind in ("plain", "recompute")}
    error = max(
        ((a - b).norm() / a.norm()).item() for a, b in zip(gradients[False], gradients[True], strict=True) if a.any()
    )
    rows = [
        Row(
            "`Chain(recompute=True)`: growth of the bytes kept from 4 to 64 couplings",
            f"{growth['recompute']:.3f} (plain: {growth['plain']:.1f})",
            "< 1.1",
            growth["recompute"] < 1.1,
        ),
        Row(
            "The same: worst relative difference of a gradient from the plain one, float64, 64 couplings",
            f"{error:.1e}",
            "<= 1e-8",
            error <= 1e-8,
        ),
    ]
    return Result(rows, {"bytes": sizes, "gradient_error": error})


# ---------------------------------------------------------------------- the Baird activation


def baird_accuracy() -> Result:
    """Compare ``Baird`` in float32 with ``asinh(sinh x + c)`` in extended precision."""
    exact = np.longdouble
    points = torch.cat([torch.linspace(-80, 80, 4001), torch.linspace(-10, 10, 8001), torch.linspace(-1, 1, 2001)])
    worst, finite = 0.0, True
    for c in torch.linspace(-5, 5, 201):
        layer = Baird()
        with torch.no_grad():
            layer.c.copy_(c)
            y, x = layer(points), layer.inv(points.clone())
            extremes = torch.tensor([0.0, 1e-45, 1e4, 1e30, torch.finfo().max])
            extremes = torch.cat([extremes, -extremes])
            everything = torch.cat([y, x, layer(extremes), layer.inv(extremes.clone())])
            everything = torch.cat([everything, layer.log_abs_det_jacobian(points, y)])
        finite &= bool(everything.isfinite().all())
        for got, shift in ((y, c.item()), (x, -c.item())):
            want = _asinh(np.sinh(points.numpy().astype(exact)) + exact(shift))
            error = np.abs(got.numpy().astype(exact) - want) / np.maximum(1, np.abs(want))
            worst = max(worst, float(error.max()))
    rows = [
        Row("`Baird` float32, abs(c) <= 5, x in [-80, 80]: worst error over max(1, abs(y))", f"{worst:.1e}", "<= 1e-6"),
        Row("The same and at extreme floats: always finite", "yes" if finite else "no", "yes", finite),
    ]
    rows[0].met = worst <= 1e-6
    return Result(rows, {"worst": worst, "finite": finite})


def _asinh(z: np.ndarray) -> np.ndarray:
    # numpy's own cancels for large negative arguments
    size = np.abs(z)
    return np.sign(z) * np.log1p(size + size * (size / (1 + np.sqrt(1 + size * size))))


# ---------------------------------------------------------------------- the table


def environment() -> dict[str, Any]:
    """Describe the environment that the figures depend on."""
    names = ("torch", "pyro-ppl", "zuko", "nflows", "normflows", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }


def table(rows: list[Row], about: dict[str, Any], rounds: int) -> str:
    """Return the markdown page."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        "# Foundation: side by side with the peers",
        "",
        f"{about['threads']} threads on {about['cores']} cores ({about['capability']}); {versions}. Times were taken "
        f"in turns; ratios are medians over {rounds} rounds, quartiles in brackets.",
        "",
        "| what | measured | must reach | |",
        "|---|---|---|---|",
    ]
    marks = {True: "yes", False: "**no**", None: ""}
    lines += [f"| {row.what} | {row.measured} | {row.target} | {marks[row.met]} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each race")
    parser.add_argument("--only", nargs="*", help="names of the measurements to run; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    Distribution.set_default_validate_args(__debug__)  # zuko's import switched it off
    rounds = arguments.rounds
    measurements: dict[str, Callable[[], Result]] = {
        "orthogonal_512": lambda: orthogonal(512, 15, 4.5, rounds),
        "orthogonal_64": lambda: orthogonal(64, 8, None, rounds),
        "coupling_scores": lambda: coupling_scores(rounds),
        "coupling_samples": lambda: coupling_samples(rounds),
        "network_evaluations": network_evaluations,
        "recomputation": recomputation,
        "baird": baird_accuracy,
    }
    results = {}
    for name, measure in measurements.items():
        if arguments.only and name not in arguments.only:
            continue
        torch.manual_seed(0)
        results[name] = measure()
        for row in results[name].rows:
            print(f"{row.what}: {row.measured}  [{row.target}] {'' if row.met is None else row.met}", flush=True)
    if arguments.only:
        return
    about = environment()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = [row for result in results.values() for row in result.rows]
    (arguments.output / "foundation.md").write_text(table(rows, about, rounds))
    data = {
        "environment": about,
        "rounds": rounds,
        "rows": [asdict(row) for row in rows],
        "details": {name: result.details for name, result in results.items()},
    }
    (arguments.output / "foundation.json").write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
