"""Measure guides and NUTS on posteriors with reference draws, at equal thread time.

``python benchmarks/posteriors.py --data FOLDER`` fits every method to every posterior of the folder (see
``posterior_models.py``) and to the densities of ``posterior_targets.py``, one thread each. Results are added to
``--output``, a JSON file; what it already holds is not run again, so that a run can be stopped and continued.
``--table`` writes the markdown table and the picture from that file, and runs nothing. ``--check`` checks every model
against its reference draws, and runs nothing else.

Figures of a fit, from as many draws as the reference has, in units of the reference's standard deviations: the mean and
the worst Wasserstein-1 distance of the margins, the worst error of a mean and the worst log-ratio of standard
deviations. From weights: the ELBO, the evidence by importance sampling, k-hat, and the KL divergence, which is the
evidence of the method with the lowest k-hat less the ELBO. Last, the share of reference draws at which log p / q
exceeds its median by more than 5 nats: mass that the guide misses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import pyro
import torch
from posterior_models import MODELS, Posterior, load, log_density, unconstrained
from posterior_targets import TARGETS
from pyro.distributions.transforms import block_autoregressive, iterated, spline_coupling
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.infer.importance import vectorized_importance_weights
from pyro.ops.stats import fit_generalized_pareto
from report import Figure, write
from torch import Tensor

import pyro_invflows as pf

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Result = dict[str, Any]
Fit = Callable[[Posterior, float, int], tuple[Callable[[int], Any] | None, Result]]
OURS = "AutoInvertibleFlow"
clock = time.thread_time


# ---------------------------------------------------------------------- methods


def train(guide: Any, model: Any, seconds: float, lr: float = 1e-2, particles: int = 16) -> Result:
    """Adam on the ELBO, its rate annealed to 0 over the time given."""
    losses: list[float] = []
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)(model, guide)
    elbo()  # makes the parameters
    optimizer = torch.optim.Adam(guide.parameters(), lr=lr)  # the first one imports much, so the clock starts after it
    start = clock()
    while (share := (clock() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        loss = elbo()
        loss.backward()
        if all(p.grad is None or p.grad.isfinite().all() for p in guide.parameters()):
            optimizer.step()
        losses.append(float(loss.detach()))
    return {"steps": len(losses)}


def by_svi(build: Callable[[Any], Any]) -> Fit:
    def fit(posterior: Posterior, seconds: float, seed: int) -> tuple[Any, Result]:
        guide = build(posterior.model)
        return guide, train(guide, posterior.model, seconds)

    return fit


def laplace(posterior: Posterior, seconds: float, seed: int) -> tuple[Any, Result]:
    guide = AutoLaplaceApproximation(posterior.model)
    about = train(guide, posterior.model, seconds, particles=1)
    return guide.laplace_approximation(), about


def invertible_flow(posterior: Posterior, seconds: float, seed: int) -> tuple[Any, Result]:
    guide = pf.AutoInvertibleFlow(posterior.model)
    guide.fit(seconds=seconds, seed=seed, progress=False)
    found = guide.diagnostics
    return guide, {"missed": found.missed, "kl_reported": found.weights.kl, "rounds": len(found.rounds)}


class _TimeIsUp(Exception):
    pass


def nuts(posterior: Posterior, seconds: float, seed: int) -> tuple[Any, Result]:
    """Pyro's NUTS with its defaults, one chain, 500 steps of warm-up; the curve holds W1 after so many seconds."""
    start, draws, times = clock(), [], []

    def hook(kernel: Any, values: dict[str, Tensor], stage: str, i: int) -> None:
        if stage.startswith("Sample"):
            draws.append({name: value.detach().clone() for name, value in values.items()})
            times.append(clock() - start)
        if clock() - start > seconds:
            raise _TimeIsUp

    kernel = NUTS(posterior.model)
    mcmc = MCMC(kernel, num_samples=20000, warmup_steps=500, disable_progbar=True, hook_fn=hook)
    with contextlib.suppress(_TimeIsUp):
        mcmc.run()
    if len(draws) < 20:
        return None, {"error": f"{len(draws)} draws after the warm-up in {seconds:g} s"}
    sites = {name: kernel.transforms[name].inv(torch.stack([d[name] for d in draws])) for name in draws[0]}
    values = posterior.to_reference(sites)
    counts = [int(len(values) * 2.0**-k) for k in range(8, -1, -1)]
    curve = [(times[n - 1], margins(values[:n], posterior.draws)["w1"]) for n in counts if n >= 20]
    return None, {"draws": len(draws), "curve": curve, **margins(values, posterior.draws)}


METHODS: dict[str, Fit] = {
    OURS: invertible_flow,
    "AutoNormal": by_svi(AutoNormal),
    "AutoMultivariateNormal": by_svi(AutoMultivariateNormal),
    "AutoLowRankMultivariateNormal": by_svi(AutoLowRankMultivariateNormal),
    "AutoLaplaceApproximation": laplace,
    "AutoIAFNormal": by_svi(partial(AutoIAFNormal, num_transforms=2)),
    "block autoregressive": by_svi(lambda m: AutoNormalizingFlow(m, partial(iterated, 1, block_autoregressive))),
    "spline couplings": by_svi(lambda m: AutoNormalizingFlow(m, partial(iterated, 4, spline_coupling))),
    "NUTS": nuts,
}


# ---------------------------------------------------------------------- figures


def margins(values: Tensor, reference: Tensor) -> Result:
    """Compare the margins of two sets of draws, in the reference's standard deviations."""
    sd = reference.std(0)
    count = min(len(values), len(reference))
    ranks = (torch.arange(count) + 0.5) / count

    def quantiles(draws: Tensor) -> Tensor:
        if len(draws) == count:
            return draws.sort(0).values
        return draws.sort(0).values[(ranks * len(draws)).long()]

    w1 = (quantiles(values) - quantiles(reference)).abs().mean(0) / sd
    return {
        "w1": float(w1.mean()),
        "w1_worst": float(w1.max()),
        "mean_error": float(((values.mean(0) - reference.mean(0)) / sd).abs().max()),
        "log_sd_ratio": float((values.std(0) / sd).log().abs().max()),
    }


def khat(log_weights: Tensor) -> float:
    """Return the shape of the largest weights' tail (Vehtari et al. 2024)."""
    n = len(log_weights)
    tail = min(n // 5, math.ceil(3 * n**0.5))
    top = (log_weights - log_weights.max()).exp().sort().values[-tail - 1 :]
    if not top[1] > 0:  # one weight has it all
        return math.inf
    return float(fit_generalized_pareto(top[1:] - top[0])[0])


@torch.no_grad()
def assess(posterior: Posterior, guide: Any) -> Result:
    """Return all figures of a guide."""
    n = len(posterior.draws)
    log_weights, _, trace = vectorized_importance_weights(
        posterior.model, guide, num_samples=n, max_plate_nesting=0, normalized=False
    )
    sites = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    result = margins(posterior.to_reference(sites), posterior.draws)
    finite = log_weights[log_weights.isfinite()]
    result["lost_share"] = 1 - len(finite) / n
    result["elbo"] = float(finite.mean())
    result["log_evidence"] = float(finite.logsumexp(0)) - math.log(n)
    result["khat"] = khat(finite)
    result["far_share"] = far_share(posterior, guide)
    return result


def far_share(posterior: Posterior, guide: Any) -> float | None:
    """Return the share of reference draws where log p / q is more than 5 above its median; None without an inverse."""
    if not hasattr(guide, "get_posterior"):
        return None
    x = unconstrained(posterior, posterior.from_reference(posterior.draws[:: max(1, len(posterior.draws) // 2000)]))
    try:
        log_q = guide.get_posterior().log_prob(x)
    except (NotImplementedError, KeyError):
        return None
    ratio = torch.vmap(log_density(posterior.model))(x) - log_q
    return float(((ratio > ratio.median() + 5) | ~ratio.isfinite()).double().mean())


def check(posterior: Posterior) -> tuple[float, float]:
    """Compare a model with its reference draws: the largest errors, in standard errors, of two identities.

    At draws x of a density p the gradient of log p has mean 0, and its product with x - m has mean -1 for each
    coordinate (Stein). Both hold only if model, coordinates and draws belong together.
    """
    values = posterior.draws[:: max(1, len(posterior.draws) // 4000)]
    sites = posterior.from_reference(values)
    torch.testing.assert_close(posterior.to_reference(sites), values)
    x = unconstrained(posterior, sites).requires_grad_()
    (gradient,) = torch.autograd.grad(torch.vmap(log_density(posterior.model))(x).sum(), x)
    product = (x - x.mean(0)).detach() * gradient + 1
    scores = [(v.mean(0) / v.std(0) * len(v) ** 0.5).abs().max() for v in (gradient, product)]
    return float(scores[0]), float(scores[1])


# ---------------------------------------------------------------------- runs


def posterior_named(name: str, data: Path | None) -> Posterior:
    if name in TARGETS:
        return TARGETS[name](torch.Generator().manual_seed(1))
    if data is None:
        raise SystemExit(f"{name} needs --data FOLDER")
    return load(data, name)


def run(posterior: Posterior, method: str, seconds: float, seed: int) -> Result:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = clock()
    result: Result = {"posterior": posterior.name, "method": method, "budget": seconds, "seed": seed}
    try:
        guide, about = METHODS[method](posterior, seconds, seed)
        result |= {**about, "dim": len(posterior.names), "seconds": clock() - start}
        if guide is not None:
            result |= assess(posterior, guide)
    except Exception as error:  # a failure is a result
        result |= {"error": f"{type(error).__name__}: {error}"[:300], "seconds": clock() - start}
    return result


def key(result: Result) -> tuple[Any, ...]:
    return tuple(result[k] for k in ("posterior", "method", "budget", "seed"))


# ---------------------------------------------------------------------- report


def evidence(results: list[Result], posterior: str) -> float:
    """Return the log-evidence by the importance weights with the lowest k-hat."""
    found = [r for r in results if r["posterior"] == posterior and math.isfinite(r.get("khat", math.inf))]
    return min(found, key=lambda r: r["khat"])["log_evidence"] if found else math.nan


def short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1e}"


def shown(r: Result, log_evidence: float) -> str:
    if "w1" not in r:
        return f"failed: {r.get('error', '')[:80]}"
    parts = [
        f"W1 {short(r['w1'])} (worst {short(r['w1_worst'])})",
        f"mean {short(r['mean_error'])}",
        f"log sd {short(r['log_sd_ratio'])}",
    ]
    if "elbo" in r:
        parts += [f"KL {short(log_evidence - r['elbo'])}", f"k-hat {r['khat']:.2f}"]
    if r.get("far_share") is not None:
        parts.append(f"far {100 * r['far_share']:.2f} %")
    return ", ".join([*parts, f"{r['seconds']:.1f} s"])


def table(results: list[Result], path: Path) -> None:
    figures = []
    for r in sorted(results, key=lambda r: (*key(r)[:1], r["method"] != OURS, *key(r)[1:])):
        name = f"{r['posterior']}: {r['method']}, {r['budget']:g} s, seed {r['seed']}"
        ours = r["method"] == OURS
        met = r.get("w1", math.inf) <= 0.05 and r["mean_error"] <= 0.15 if ours else None
        log_evidence = evidence(results, r["posterior"])
        figures.append(Figure(name, shown(r, log_evidence), "W1 0.05, mean 0.15" if ours else "", met))
    about = "Thread time, one thread; W1 is the mean over the margins, in reference standard deviations."
    write(figures, path, about=f"torch {torch.__version__}, Pyro {pyro.__version__}. {about}")


def picture(results: list[Result], path: Path) -> None:
    """Draw W1 against seconds, a panel for each posterior and a line for each method."""
    names = sorted({r["posterior"] for r in results})
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.9 * rows), squeeze=False, sharex=True, sharey=True
    )
    colours = dict(zip(METHODS, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        for method, colour in colours.items():
            mine = [r for r in results if r["posterior"] == name and r["method"] == method and "w1" in r]
            points = sorted(p for r in mine for p in (r.get("curve") or [(r["seconds"], r["w1"])]))
            if points:
                ours = method == OURS
                axis.plot(
                    *zip(*points, strict=True),
                    "o-",
                    color=colour,
                    label=method,
                    ms=5 if ours else 3,
                    lw=2 if ours else 1,
                )
        axis.axhline(0.05, color="grey", lw=0.7, ls="--")
        axis.set(xscale="log", yscale="log", title=name.partition("-")[2] or name, xlabel="seconds of one thread")
    for row in axes:
        row[0].set_ylabel("W1, reference sds")
    left, right = axes[0, 0].get_xlim()
    axes[0, 0].set_xlim(min(left, right / 30), right * 1.5)  # at least a decade, for the labels
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=9)
    figure.tight_layout(rect=(0, 0.06 if rows > 1 else 0.16, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with NAME.json and NAME.npz")
    parser.add_argument(
        "--posterior", action="append", choices=[*MODELS, *TARGETS], help="default: all; may be repeated"
    )
    parser.add_argument("--method", action="append", choices=list(METHODS), help="default: all; may be repeated")
    parser.add_argument(
        "--seconds", type=float, action="append", help="thread time of a fit, default 60; may be repeated"
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/posteriors.json"))
    parser.add_argument("--table", action="store_true", help="write the table and the picture only")
    parser.add_argument("--check", action="store_true", help="check the models against their reference draws only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    names = options.posterior or [*(MODELS if options.data else ()), *TARGETS]
    results = json.loads(options.output.read_text()) if options.output.exists() else []
    for name in () if options.table else names:
        posterior = posterior_named(name, options.data)
        scores = check(posterior)
        limit = 3 + (2 * math.log(len(posterior.names))) ** 0.5  # the largest of many standard errors
        print(f"{name}: {scores[0]:.1f} and {scores[1]:.1f} standard errors of at most {limit:.1f}", flush=True)
        if max(scores) > limit:
            raise SystemExit(f"{name}: the model does not belong to its reference draws")
        if options.check:
            continue
        wanted = [
            (m, s, i)
            for m in options.method or METHODS
            for s in options.seconds or [60.0]
            for i in range(options.seeds)
        ]
        for method, seconds, seed in wanted:
            if (name, method, seconds, seed) in map(key, results):
                continue
            if method == OURS and not hasattr(pf, OURS):
                print(f"  {OURS} is not in this version of the library", flush=True)
                continue
            results.append(run(posterior, method, seconds, seed))
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n")
            print(f"  {method}, {seconds:g} s, seed {seed}: {shown(results[-1], evidence(results, name))}", flush=True)
    if results and not options.check:
        table(results, options.output.with_suffix(".md"))
        picture(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
