"""Measure spline couplings beside Pyro, nflows, normflows and zuko, and the bare networks.

``python benchmarks/splines.py --output FILE`` writes a markdown table of ratios, medians and quartiles over the rounds
of one run, taken in turns (see ``timing.py``), with one thread; a few minutes. ``--short``: few rounds.
``--part NAME``: one part of the table, printed only.

Every library has four couplings with rational-quadratic splines of 8 bins on [-5, 5], over 64 elements, half of which
decide, with dense ReLU networks of hidden widths 128 and 128, over a standard normal base. Pyro's ``linear`` order is
the rational-linear spline of Dolatabadi et al. (2020). Its couplings, unlike the others, also bend the half that
decides, by learned constants; ``identity=True`` leaves that out. zuko has couplings of two kinds: ``NSF(passes=2)``,
whose masked networks read and write all elements and are run once a pass, and its ``GeneralCouplingTransform``.

Further parts: whole flows compiled, over the same run eagerly; ``LULinear`` beside ``SVDLinear``; and
``LowRankResidual`` with more hidden dimensions than elements, beside the same layer that takes its determinant in the
hidden dimensions, and beside a spline coupling with a network of the same widths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
import zuko
from contestants import FlowContestant, _NflowsNet, set_weights
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
from pyro.nn import DenseNN
from report import Figure, run_parts, shown
from timing import Contestant, race
from torch import Tensor, nn

from pyro_invflows import (
    Flow,
    LowRankResidual,
    affine_coupling,
    call_and_ladj,
    inv_and_ladj,
    lu_linear,
    spline_coupling,
    svd_linear,
)
from pyro_invflows.monotone import RationalQuadraticSpline
from pyro_invflows.networks import dense_network

DIM, HIDDEN, BINS, BOUND, COUPLINGS, BATCH = 64, (128, 128), 8, 5.0, 4, 256
HALF = DIM // 2


def _standard_normal() -> dist.Distribution:
    return dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1)


def _masks() -> list[Tensor]:
    """Return which elements each coupling transforms: the second half, then the first, and so on."""
    second = torch.arange(DIM) >= HALF
    return [second if i % 2 == 0 else ~second for i in range(COUPLINGS)]


def invflows_flow() -> FlowContestant:
    """This library through ``Flow``; the distribution is made anew at each call, as in training."""
    layers = [
        spline_coupling(DIM, HIDDEN, num_bins=BINS, bound=BOUND, keep="last" if i % 2 else "first")
        for i in range(COUPLINGS)
    ]
    flow = Flow(_standard_normal(), layers)
    return FlowContestant(set_weights(flow), lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), True)


def pyro_flow(order: str) -> FlowContestant:
    """Pyro's couplings and permutations in its ``TransformedDistribution``."""
    sizes = [HALF * BINS, HALF * BINS, HALF * (BINS - 1)] + ([HALF * BINS] if order == "linear" else [])
    couplings = [
        pyro_transforms.SplineCoupling(
            DIM, HALF, DenseNN(HALF, list(HIDDEN), sizes), BINS, BOUND, order=order, identity=True
        )
        for _ in range(COUPLINGS)
    ]
    parts: list = []
    for coupling in couplings:
        parts += [coupling, pyro_transforms.Permute(torch.arange(DIM - 1, -1, -1))]
    d = dist.TransformedDistribution(_standard_normal(), parts[:-1])

    def sample(n: int) -> Tensor:
        d.clear_cache()
        return d.sample((n,))

    return FlowContestant(set_weights(*couplings), d.log_prob, sample, True)


def zuko_nsf() -> FlowContestant:
    """The ``NSF`` of zuko with two passes, which makes its transforms couplings."""
    flow = zuko.flows.NSF(DIM, bins=BINS, transforms=COUPLINGS, hidden_features=HIDDEN, passes=2)
    return FlowContestant(set_weights(flow), lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), False)


def zuko_couplings() -> FlowContestant:
    """Couplings of zuko with the spline of its ``NSF``."""
    transforms = [
        zuko.flows.GeneralCouplingTransform(
            features=DIM,
            mask=~mask,
            univariate=partial(zuko.transforms.MonotonicRQSTransform, bound=BOUND),
            shapes=[(BINS,), (BINS,), (BINS - 1,)],
            hidden_features=HIDDEN,
        )
        for mask in _masks()
    ]
    base = zuko.flows.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(DIM), torch.ones(DIM), buffer=True
    )
    flow = zuko.flows.Flow(transforms, base)
    return FlowContestant(set_weights(flow), lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), False)


def nflows_flow() -> FlowContestant:
    """Spline couplings of nflows with its MLP."""
    layers = [
        nflows.transforms.PiecewiseRationalQuadraticCouplingTransform(
            mask.long(),
            lambda n, m: _NflowsNet((n,), (m,), list(HIDDEN), activation=nn.functional.relu),
            num_bins=BINS,
            tails="linear",
            tail_bound=BOUND,
        )
        for mask in _masks()
    ]
    base = nflows.distributions.StandardNormal([DIM])
    flow = nflows.flows.Flow(nflows.transforms.CompositeTransform(layers), base)
    return FlowContestant(set_weights(flow), flow.log_prob, flow.sample, False)


class _NormflowsNet(normflows.nets.MLP):
    """normflows hands a context to its networks; its own MLP takes none."""

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return super().forward(x)


class _NormflowsBlock(normflows.flows.Flow):
    """The coupling of normflows' ``CoupledRationalQuadraticSpline``, with a network of the others' size."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.coupling = PiecewiseRationalQuadraticCoupling(
            mask.long(),
            lambda n, m: _NormflowsNet([n, *HIDDEN, m]),
            num_bins=BINS,
            tails="linear",
            tail_bound=BOUND,
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.coupling.inverse(z, None)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.coupling(z, None)


def normflows_flow() -> FlowContestant:
    """Spline couplings of normflows; sampling by the bare passes, without the log-density that its ``sample`` adds."""
    base = normflows.distributions.DiagGaussian(DIM, trainable=False)
    model = normflows.NormalizingFlow(base, [_NormflowsBlock(mask) for mask in _masks()])
    return FlowContestant(set_weights(model), model.log_prob, lambda n: model(base.sample(n)), False)


def bare_networks() -> FlowContestant:
    """The networks alone, each fed by the one before it, with the cheapest use of all of its output."""
    parameters = 3 * BINS - 1
    nets = [dense_network(HALF, HIDDEN, parameters * HALF) for _ in range(COUPLINGS)]

    def run(x: Tensor) -> Tensor:
        half = x[:, :HALF]
        for net in nets:
            half = net(half).view(-1, parameters, HALF).sum(1)
        return half.sum(-1)

    return FlowContestant(set_weights(*nets), run, lambda n: run(torch.randn(n, DIM)), True)


CONTESTANTS: dict[str, Callable[[], FlowContestant]] = {
    "ours": invflows_flow,
    "Pyro, linear": partial(pyro_flow, "linear"),
    "Pyro, quadratic": partial(pyro_flow, "quadratic"),
    "nflows": nflows_flow,
    "normflows": normflows_flow,
    "zuko, NSF(passes=2)": zuko_nsf,
    "zuko, couplings": zuko_couplings,
    "networks": bare_networks,
}


def _step(contestant: FlowContestant) -> Contestant:
    def prepare() -> Tensor:
        for parameter in contestant.parameters:
            parameter.grad = None
        return torch.randn(BATCH, DIM)

    return Contestant(lambda x: contestant.log_prob(x).sum().backward(), prepare)


def _sampling(contestant: FlowContestant) -> Contestant:
    @torch.no_grad()
    def run(_: object) -> Tensor:
        return contestant.sample(BATCH)

    return Contestant(run)


def speed(rounds: int) -> list[Figure]:
    """Compare a training step, and sampling."""
    check()
    flows = {name: make() for name, make in CONTESTANTS.items()}
    figures = []
    for what, contestants, least, least_zuko in (
        ("log_prob + backward", {n: _step(f) for n, f in flows.items()}, 2.2, 3.8),
        ("sampling", {n: _sampling(f) for n, f in flows.items()}, 2.6, 9.0),
    ):
        timing = race(contestants, rounds=rounds, repeats=5)
        required: dict[str, float | None] = dict.fromkeys(CONTESTANTS, least)
        required |= {"zuko, NSF(passes=2)": least_zuko, "zuko, couplings": None}
        for name, wanted in required.items():
            if name in ("ours", "networks"):
                continue
            met = None if wanted is None else timing.ratio(name, "ours") >= wanted
            goal = "" if wanted is None else f">= {wanted}"
            figures.append(Figure(f"{what}: times as fast as {name}", shown(timing, name, "ours"), goal, met))
        ratio, bounded = timing.ratio("ours", "networks"), what != "sampling"
        figures.append(
            Figure(
                f"{what}: time over that of the bare networks",
                shown(timing, "ours", "networks"),
                "<= 2.2" if bounded else "",
                ratio <= 2.2 if bounded else None,
            )
        )
    return figures


def _layer_step(layer: nn.Module, dim: int) -> Contestant:
    """One pass with the log-det, and backward."""

    def prepare() -> Tensor:
        layer.zero_grad()
        return torch.randn(BATCH, dim)

    def step(x: Tensor) -> None:
        y, ladj = call_and_ladj(layer, x)
        (0.5 * y.square().sum(-1) - ladj).mean().backward()

    return Contestant(step, prepare)


def compiled(rounds: int) -> list[Figure]:
    """Compare a training step of whole flows, compiled and eager."""
    figures = []
    for name, make, count, least in (
        ("affine", affine_coupling, 8, 1.3),
        ("spline", partial(spline_coupling, num_bins=BINS, bound=BOUND), 2, 1.4),
    ):
        layers = [make(DIM, HIDDEN, keep="last" if i % 2 else "first") for i in range(count)]
        flow = Flow(_standard_normal(), layers)
        parameters = set_weights(flow)

        def log_prob(x: Tensor, flow: Flow = flow) -> Tensor:
            return flow().log_prob(x)

        eager = FlowContestant(parameters, log_prob, lambda n: torch.empty(n), True)
        fast = FlowContestant(parameters, torch.compile(log_prob, fullgraph=True), lambda n: torch.empty(n), True)
        timing = race({"eager": _step(eager), "compiled": _step(fast)}, rounds=rounds, repeats=5)
        ratio = timing.ratio("eager", "compiled")
        what = f"{count} {name} couplings, log_prob + backward: eager over compiled"
        figures.append(Figure(what, shown(timing, "eager", "compiled", 2), f">= {least}", ratio >= least))
    return figures


def linear(rounds: int) -> list[Figure]:
    """Compare the two dense linear layers."""
    figures = []
    for dim in (64, 256):
        layers = {"LU": lu_linear(dim), "SVD": svd_linear(dim)}
        with torch.no_grad():
            for parameter in (p for layer in layers.values() for p in layer.parameters()):
                parameter.add_(0.1 / dim**0.5 * torch.randn_like(parameter))
        timing = race({n: _layer_step(layer, dim) for n, layer in layers.items()}, rounds=rounds, repeats=5)
        ratio = timing.ratio("SVD", "LU")
        what = f"D {dim}, forward + log-det + backward: SVDLinear over LULinear"
        figures.append(Figure(what, shown(timing, "SVD", "LU"), ">= 1.8", ratio >= 1.8))
    return figures


class _InHiddenDimensions(LowRankResidual):
    """The determinant and the inverse in the hidden dimensions, even where they are more than the elements."""

    _in_event = False  # type: ignore[assignment]


def low_rank(rounds: int) -> list[Figure]:
    """Compare a training step where the event is smaller than the hidden layers."""
    figures = []
    hidden = HIDDEN[0]
    for dim in (9, 32):
        layers: dict[str, nn.Module] = {
            "ours": LowRankResidual(dim, hidden, form="sandwich"),
            "in hidden_dim dimensions": _InHiddenDimensions(dim, hidden, form="sandwich"),
            "spline coupling": spline_coupling(dim, HIDDEN),
        }
        with torch.no_grad():
            for parameter in (p for layer in layers.values() for p in layer.parameters()):
                parameter.add_(0.1 * torch.randn_like(parameter))
        timing = race(
            {n: _layer_step(layer, dim) for n, layer in layers.items()}, rounds=max(3, rounds // 4), repeats=2
        )
        what = f"LowRankResidual({dim}, {hidden}, form='sandwich'), training step"
        ratio = timing.ratio("in hidden_dim dimensions", "ours")
        figures += [
            Figure(
                f"{what}: the determinant in {hidden} dimensions over the one in {dim}",
                shown(timing, "in hidden_dim dimensions", "ours"),
                ">= 4",
                ratio >= 4,
            ),
            Figure(f"{what}: over a spline coupling", shown(timing, "ours", "spline coupling"), "", None),
        ]
    return figures


@torch.no_grad()
def robustness(_: int) -> list[Figure]:
    """Invert splines in float32 at raw parameters of any size."""
    figures = []
    spline = RationalQuadraticSpline(BINS, BOUND)
    for std, most in ((1.0, 1e-5), (3.0, 1e-5), (10.0, 2e-5), (50.0, 2e-4), (3e38, None)):
        torch.manual_seed(0)
        raw = (std * torch.randn(20000, spline.num_parameters, 1)).clamp(-3e38, 3e38)
        x = 12 * torch.rand(20000, 1) - 6
        y, log_slope = spline.forward(x, raw)
        back, other = spline.inverse(y, raw)
        finite = all(bool(t.isfinite().all()) for t in (y, log_slope, back, other))
        error = ((back - x).abs() * torch.minimum(log_slope, other).exp()).max().item()
        figures.append(
            Figure(
                f"float32, raw parameters of std {std:g}: slope times error, 20000 elements",
                f"{error:.1e}, {'all finite' if finite else 'NOT finite'}",
                f"<= {most:g}, finite" if most else "finite",
                finite and (most is None or error <= most),
            )
        )
    return figures


def check() -> None:
    """The flow's two directions agree, so that what is timed is right."""
    torch.manual_seed(0)
    layer = spline_coupling(DIM, HIDDEN)
    set_weights(layer)
    x = torch.randn(BATCH, DIM)
    y, ladj = call_and_ladj(layer, x)
    back, inverse = inv_and_ladj(layer, y.detach().clone())
    torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(inverse, -ladj, atol=1e-3, rtol=1e-3)


PARTS: dict[str, Callable[[int], list[Figure]]] = {
    "speed": speed,
    "compiled": compiled,
    "linear": linear,
    "low_rank": low_rank,
    "robustness": robustness,
}


if __name__ == "__main__":
    run_parts(__doc__.split("\n")[0], PARTS, Path("benchmarks/results/splines.md"), rounds=25)
