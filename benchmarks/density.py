"""Ready-made flows on tables of real data, beside those of zuko and normflows: equal seconds, data and stopping rule.

Every flow is trained on the same 80 % of a standardised table with AdamW, batches of 512 rows, a cosine schedule over
its budget, clipped gradients and averaged weights. The weights with the best validation score (10 %) are kept, and the
remaining 10 % give the figure: the mean negative log-likelihood in nats. The budget is CPU time of one thread, spent on
training steps alone, so that other programs do not matter. Learning rate and weight decay were chosen on validation
data by short runs; zuko's spline flows are trained with two settings, and the better one on validation data counts.

``python benchmarks/density.py --data FOLDER`` runs everything and can be interrupted: results are added to a JSON file,
one table and one flow at a time, and what is there is not repeated. ``--tables`` and ``--flows`` select some.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import normflows
import numpy as np
import torch
import zuko
from report import Figure, write
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyro_invflows as pf
from pyro_invflows.support.optimisers import decaying_adam, default_decay

TABLES = ("magic_gamma", "protein", "kin40k", "pumadyn32nm")
#: Columns of whole numbers, which would have an infinite density: uniform noise of one unit is added.
INTEGER_COLUMNS = {"protein": [7]}
BATCH, CLIP, AVERAGING, CHECKS = 512, 5.0, 0.995, 40


@dataclass
class Table:
    """A standardised table in three parts."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load(folder: Path, name: str) -> Table:
    """Read a table, without repeated rows; dequantise, shuffle, split 80 : 10 : 10 and standardise it."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        rows = torch.from_numpy(np.unique(file["x"].astype(np.float64), axis=0))
    generator = torch.Generator().manual_seed(0)
    for column in INTEGER_COLUMNS.get(name, []):
        noise = torch.rand(len(rows), dtype=rows.dtype, generator=generator)
        rows[:, column] = rows[:, column].floor() + noise
    rows = rows[torch.randperm(len(rows), generator=generator)]
    first, second = int(0.8 * len(rows)), int(0.9 * len(rows))
    train = rows[:first]
    rows = ((rows - train.mean(0)) / train.std(0)).float()
    return Table(rows[:first], rows[first:second], rows[second:])


# ---------------------------------------------------------------------- the flows


def _normflows(dim: int) -> nn.Module:
    """Build normflows' autoregressive spline flow as its examples do: four layers, LU linear maps between them."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers.append(normflows.flows.AutoregressiveRationalQuadraticSpline(dim, 2, 64))
        layers.append(normflows.flows.LULinearPermute(dim))
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(dim, trainable=False), layers)


#: Learning rate, and whether weights decay (by the rule of ``pf.fit``).
PLAIN, DECAYED = (5e-3, False), (5e-3, True)
#: Builders, and the settings to train each with; of several, that with the best validation score counts.
FLOWS: dict[str, tuple[Callable[[int], nn.Module], tuple[tuple[float, bool], ...]]] = {
    "neural_spline_flow": (pf.flows.neural_spline_flow, (DECAYED,)),
    "neural_spline_flow (128-128)": (lambda d: pf.flows.neural_spline_flow(d, hidden_dims=(128, 128)), (DECAYED,)),
    "zuko NSF": (zuko.flows.NSF, (PLAIN, DECAYED)),
    "zuko NSF (couplings)": (lambda d: zuko.flows.NSF(d, passes=2), (PLAIN, DECAYED)),
    "neural_spline_flow (couplings)": (lambda d: pf.flows.neural_spline_flow(d, autoregressive=False), (DECAYED,)),
    "zuko MAF": (zuko.flows.MAF, (DECAYED,)),
    "masked_autoregressive_flow": (pf.flows.masked_autoregressive_flow, (DECAYED,)),
    "normflows NSF": (_normflows, (DECAYED,)),
    "zuko NICE": (zuko.flows.NICE, (DECAYED,)),
    "gaussian": (pf.flows.gaussian, (DECAYED,)),
    "real_nvp": (pf.flows.real_nvp, (DECAYED,)),
    "sylvester_flow": (pf.flows.sylvester_flow, (DECAYED,)),
    "residual_flow": (pf.flows.residual_flow, (DECAYED,)),
}
MAIN = [name for name in FLOWS if name not in ("real_nvp", "sylvester_flow", "residual_flow")]
OURS = [name for name in FLOWS if hasattr(pf.flows, name.split()[0])]
ZUKO = [name for name in FLOWS if name.startswith("zuko")]


def score(flow: nn.Module, rows: Tensor) -> Tensor:
    """Return the negative log-likelihood of each row."""
    return -(flow.log_prob(rows) if isinstance(flow, normflows.NormalizingFlow) else flow().log_prob(rows))


# ---------------------------------------------------------------------- training


def batches(rows: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        for index in torch.randperm(len(rows), generator=generator).split(BATCH):
            if len(index) == min(BATCH, len(rows)):
                yield rows[index]


@torch.no_grad()
def mean_score(flow: nn.Module, rows: Tensor) -> float:
    return sum(float(score(flow, part).double().sum()) for part in rows.split(4096)) / len(rows)


def train(
    build: Callable[[int], nn.Module], table: Table, seconds: float, rate: float, decay: float = 0.0, seed: int = 0
) -> dict:
    """Train a new flow for so many seconds of this thread's CPU time; return its figures."""
    torch.manual_seed(seed)
    flow = build(table.train.shape[-1])
    if isinstance(flow, pf.Flow):
        flow.initialize(table.train)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in parameters), "rate": rate, "decay": decay}
    if not parameters:
        result |= {"steps": 0, "best_step": 0, "validation": mean_score(flow, table.validation)}
        return result | {"train": mean_score(flow, table.train), "test": mean_score(flow, table.test)}
    optimiser = decaying_adam(flow, rate, decay)
    average = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))
    average.eval()
    best, spent, steps, skipped, checks = (math.inf, 0, {}), 0.0, 0, 0, 0
    source = batches(table.train, torch.Generator().manual_seed(seed))
    while spent < seconds:
        start = time.thread_time()
        for group in optimiser.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * min(spent / seconds, 1)))
        optimiser.zero_grad()
        score(flow, next(source)).mean().backward()
        if torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True).isfinite():
            optimiser.step()
            average.update_parameters(flow)
        else:
            skipped += 1
        steps += 1
        spent += time.thread_time() - start
        if spent >= checks * seconds / CHECKS or spent >= seconds:
            checks += 1
            value = mean_score(average.module, table.validation)
            if value < best[0]:
                best = value, steps, copy.deepcopy(average.module.state_dict())
    flow.load_state_dict(best[2])
    flow.eval()
    result |= {"steps": steps, "best_step": best[1], "skipped": skipped, "validation": best[0]}
    return result | {"train": mean_score(flow, table.train), "test": mean_score(flow, table.test)}


def fit(build: Callable[[int], nn.Module], table: Table, seed: int = 0) -> dict:
    """Train a new flow by ``pf.fit`` with its defaults; return its figures."""
    torch.manual_seed(seed)
    flow = build(table.train.shape[-1])
    start = time.thread_time()
    history = pf.fit(flow, table.train, validation=table.validation, progress=False)
    spent = time.thread_time() - start
    return {
        "seconds": spent,
        "steps": len(history.losses),
        "epochs": len(history.validation),
        "reason": history.reason,
        "validation": mean_score(flow, table.validation),
        "test": mean_score(flow, table.test),
    }


# ---------------------------------------------------------------------- the report


def figures(results: dict[str, dict], seconds: float) -> list[Figure]:
    """Return a row for each flow and table, and the comparisons that are required."""
    found: dict[tuple[str, str], dict] = {}
    for key, r in results.items():
        table, flow, *_, budget = key.split("|")
        if (
            budget == f"{seconds:g}"
            and r["validation"] < found.get((table, flow), {"validation": math.inf})["validation"]
        ):
            found[table, flow] = r
    test = {key: r["test"] for key, r in found.items()}
    rows, wins = [], []
    for table in TABLES:
        ours = {flow: test[table, flow] for flow in OURS if (table, flow) in test}
        zukos = {flow: test[table, flow] for flow in ZUKO if (table, flow) in test}
        if ours and len(zukos) == len(ZUKO):  # zuko's best is not known before
            first, second = min(ours, key=ours.__getitem__), min(zukos, key=zukos.__getitem__)
            gain = zukos[second] - ours[first]
            wins.append(gain)
            said = f"{ours[first]:.3f} ({first}), {zukos[second]:.3f} ({second})"
            rows.append(Figure(f"{table}: our best, zuko's best", said, "ours lower", gain > 0))
            if "neural_spline_flow" in ours:
                default = ours["neural_spline_flow"]
                said = f"{default:.3f}, {zukos[second]:.3f}"
                rows.append(
                    Figure(f"{table}: neural_spline_flow, zuko's best", said, "not higher", default <= zukos[second])
                )
    if len(wins) == len(TABLES):
        said = ", ".join(f"{gain:.2f}" for gain in wins)
        rows.append(Figure("gain in nats, by table", said, ">= 0.3 on three", sum(gain >= 0.3 for gain in wins) >= 3))
    for table in TABLES:
        loops = [test[table, flow] for flow in OURS if (table, flow) in test]
        key = f"{table}|neural_spline_flow|fit"
        if key in results and loops:
            said = f"{results[key]['test']:.3f}, {min(loops):.3f}; {results[key]['seconds']:.0f} s"
            met = results[key]["test"] <= min(loops) + 0.05
            rows.append(Figure(f"{table}: fit with its defaults, best loop here", said, "at most 0.05 higher", met))
    for table in TABLES:
        for flow in FLOWS:
            if (table, flow) in test:
                r = found[table, flow]
                said = f"{r['test']:.3f}; {r['steps']} steps, best {r['best_step']}, {r['parameters']} parameters"
                rows.append(Figure(f"{table}: {flow}", said, "", None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the tables, NAME.npz")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--flows", nargs="+", choices=list(FLOWS), default=MAIN)
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU time of training, for each flow")
    parser.add_argument(
        "--fit", action="store_true", help="train neural_spline_flow by pf.fit with its defaults instead"
    )
    parser.add_argument("--report", action="store_true", help="train nothing, only write the report")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.output / "density.json"
    arguments.output.mkdir(parents=True, exist_ok=True)
    flows = ["neural_spline_flow"] if arguments.fit else arguments.flows
    for name in [] if arguments.report else arguments.tables:
        table = load(arguments.data, name)
        for flow in flows:
            build, settings = FLOWS[flow]
            for rate, decays in settings[:1] if arguments.fit else settings:
                kind = "fit" if arguments.fit else f"{rate:g}{', decay' if decays else ''}|{arguments.seconds:g}"
                key = f"{name}|{flow}|{kind}"
                results = json.loads(path.read_text()) if path.exists() else {}
                if key in results:
                    continue
                decay = default_decay(len(table.train)) if decays else 0.0
                r = fit(build, table) if arguments.fit else train(build, table, arguments.seconds, rate, decay)
                results = json.loads(path.read_text()) if path.exists() else {}
                path.write_text(json.dumps(results | {key: r}, indent=1) + "\n")
                print(f"{key}: validation {r['validation']:.3f}, test {r['test']:.3f}, {r['steps']} steps", flush=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    rows = figures(results, arguments.seconds)
    if rows:
        about = (
            f"torch {torch.__version__}, zuko {zuko.__version__}. Mean negative log-likelihood of test rows in nats, "
            f"after {arguments.seconds:g} s of CPU time on one thread; lower is better. Flows without a row were not "
            "measured."
        )
        write(rows, arguments.output / "density.md", about=about)


if __name__ == "__main__":
    main()
