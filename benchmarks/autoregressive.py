"""Measure autoregressive layers: their inverse over their forward pass, beside zuko's.

``python benchmarks/autoregressive.py --output FILE`` writes a markdown table of ratios, medians and quartiles over the
rounds of one run, taken in turns (see ``timing.py``), with one thread; a few minutes. ``--short``: few rounds.
``--part NAME``: one part of the table, printed only.

One layer, affine or a rational-quadratic spline of 8 bins on [-5, 5], over 8, 64 and 256 elements with masked ReLU
networks of two hidden layers of 128, 128 and 512 units, at a batch of 256. zuko's ``MaskedAutoregressiveTransform`` of
the same sizes inverts by one evaluation of its network for each element. Both directions give the log-det as well.
Then whole flows of such layers, drawing 1000 points beside zuko's ``NSF``; and ``GeneralizedSylvester``, which is a
rotation around an autoregressive layer, with small and large parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import zuko
from report import Figure, run_parts, shown
from timing import Contestant, race
from torch import Tensor, nn

from pyro_invflows import (
    affine_autoregressive,
    call_and_ladj,
    generalized_sylvester,
    inv_and_ladj,
    spline_autoregressive,
)
from pyro_invflows.flows import neural_spline_flow

BATCH, BINS, BOUND = 256, 8, 5.0
SIZES = {8: 128, 64: 128, 256: 512}
FUNCTIONS: dict[str, Callable] = {
    "affine": affine_autoregressive,
    "spline": partial(spline_autoregressive, num_bins=BINS, bound=BOUND),
}
#: What must be reached: zuko's time over ours, by function and size.
OVER_ZUKO = {("affine", 64): 8.0, ("affine", 256): 60.0, ("spline", 64): 30.0, ("spline", 256): 120.0}


def _with_weights(module: nn.Module) -> nn.Module:
    """Set the weights of every linear layer away from zero, by the same rule for all libraries."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.5 / layer.in_features**0.5)
            nn.init.normal_(layer.bias, std=0.1)
    return module


def _ours(name: str, dim: int) -> nn.Module:
    return _with_weights(FUNCTIONS[name](dim, [SIZES[dim]] * 2)).with_cache(0)  # type: ignore[operator]


def _zuko(name: str, dim: int) -> nn.Module:
    keywords = {"features": dim, "hidden_features": [SIZES[dim]] * 2}
    if name == "spline":
        keywords |= {
            "univariate": partial(zuko.transforms.MonotonicRQSTransform, bound=BOUND),
            "shapes": [(BINS,), (BINS,), (BINS - 1,)],
        }
    return _with_weights(zuko.flows.MaskedAutoregressiveTransform(**keywords))


def _without_gradient(run: Callable[[Tensor], object], data: Tensor) -> Contestant:
    return Contestant(torch.no_grad()(run), data.clone)


def _step(layer: nn.Module, run: Callable[[Tensor], tuple[Tensor, Tensor]], data: Tensor) -> Contestant:
    def prepare() -> Tensor:
        layer.zero_grad()
        return data.clone().requires_grad_()

    def step(value: Tensor) -> None:
        result, ladj = run(value)
        (result.sum() + ladj.sum()).backward()

    return Contestant(step, prepare)


def _figures(name: str, dim: int, batch: int, rounds: int) -> list[Figure]:
    torch.manual_seed(0)
    ours, theirs = _ours(name, dim), _zuko(name, dim)
    x = torch.randn(batch, dim)
    y, zuko_y = ours(x).detach(), theirs()(x).detach()
    forward, inverse = partial(call_and_ladj, ours), partial(inv_and_ladj, ours)
    torch.testing.assert_close(inverse(y)[0], x, rtol=1e-3, atol=1e-3)  # what is timed is right
    timing = race(
        {
            "forward": _without_gradient(forward, x),
            "inverse": _without_gradient(inverse, y),
            "zuko, forward": _without_gradient(lambda x: theirs().call_and_ladj(x), x),
            "forward, backward": _step(ours, forward, x),
            "inverse, backward": _step(ours, inverse, y),
        },
        rounds=rounds,
        repeats=3,
    )
    what = f"{name}, D {dim}, batch {batch}"
    most = 4.0 if dim == 256 or batch == 1024 else 7.0
    least = 1.5 if name == "spline" else 1.0

    def at_most(text: str, above: str, below: str, bound: float) -> Figure:
        ratio = timing.ratio(above, below)
        return Figure(f"{what}: {text}", shown(timing, above, below), f"<= {bound:g}", ratio <= bound)

    def at_least(text: str, above: str, below: str, bound: float | None) -> Figure:
        met = None if bound is None else timing.ratio(above, below) >= bound
        return Figure(f"{what}: {text}", shown(timing, above, below), "" if bound is None else f">= {bound:g}", met)

    figures = [
        at_most("inverse + log-det over forward + log-det", "inverse", "forward", most),
        at_most("the same with backward", "inverse, backward", "forward, backward", 8.0),
        at_least("zuko's forward + log-det over ours", "zuko, forward", "forward", least),
    ]
    # zuko's inverse may take seconds: few calls
    timing = race(
        {
            "inverse": Contestant(torch.no_grad()(inverse), lambda: inverse(y) and y.clone()),  # not cold after zuko
            "zuko, inverse": _without_gradient(lambda y: theirs().inv.call_and_ladj(y), zuko_y),
        },
        rounds=max(2, rounds // 5),
        repeats=1,
        warmup=1,
    )
    required = OVER_ZUKO.get((name, dim)) if batch == BATCH else None
    return [*figures, at_least("zuko's inverse + log-det over ours", "zuko, inverse", "inverse", required)]


def _layers(name: str, rounds: int) -> list[Figure]:
    figures = []
    for dim, batch in ((8, BATCH), (64, BATCH), (64, 1024), (256, BATCH)):
        figures += _figures(name, dim, batch, rounds)
    return figures


def sampling(rounds: int) -> list[Figure]:
    """Draw points from a ready-made flow, and from zuko's of the same size."""
    torch.manual_seed(0)
    dim, hidden, layers, points = 64, (64, 64), 4, 1000
    ours = _with_weights(neural_spline_flow(dim, num_layers=layers, hidden_dims=hidden, num_bins=BINS))
    theirs = _with_weights(zuko.flows.NSF(dim, bins=BINS, transforms=layers, hidden_features=hidden))
    # zuko takes seconds: few rounds
    timing = race(
        {
            "ours": Contestant(torch.no_grad()(lambda _: ours().sample((points,)))),
            "zuko": Contestant(torch.no_grad()(lambda _: theirs().sample((points,)))),
        },
        rounds=max(2, rounds // 5),
        repeats=1,
        warmup=1,
    )
    ratio = timing.ratio("zuko", "ours")
    what = f"{points} points from neural_spline_flow({dim}), {layers} layers: zuko's NSF over ours"
    return [Figure(what, shown(timing, "zuko", "ours"), ">= 20", ratio >= 20)]


def sylvester(rounds: int) -> list[Figure]:
    """Compare the directions of ``GeneralizedSylvester``."""
    figures = []
    for dim, hidden in SIZES.items():
        for strength, size in (("small", 0.05), ("large", 0.5)):
            torch.manual_seed(0)
            layer = generalized_sylvester(dim, [hidden] * 2).with_cache(0)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.add_(size * torch.randn_like(parameter))
                x = torch.randn(BATCH, dim)
                y = layer(x)
                error = (layer(layer.inv(y.clone())) - y).abs().max().item()
            forward, inverse = partial(call_and_ladj, layer), partial(inv_and_ladj, layer)
            timing = race(
                {"forward": _without_gradient(forward, x), "inverse": _without_gradient(inverse, y)},
                rounds=rounds,
                repeats=3,
            )
            figures.append(
                Figure(
                    f"GeneralizedSylvester, D {dim}, batch {BATCH}, {strength} parameters (std {size}): "
                    "inverse + log-det over forward + log-det",
                    f"{shown(timing, 'inverse', 'forward')}; error in y {error:.0e}",
                    "<= 8",
                    timing.ratio("inverse", "forward") <= 8,
                )
            )
    return figures


PARTS: dict[str, Callable[[int], list[Figure]]] = {
    "affine": partial(_layers, "affine"),
    "spline": partial(_layers, "spline"),
    "sampling": sampling,
    "sylvester": sylvester,
}


if __name__ == "__main__":
    run_parts(__doc__.split("\n")[0], PARTS, Path("benchmarks/results/autoregressive.md"), rounds=15)
