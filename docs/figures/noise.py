"""Draws ``noise.svg``, the picture of ``noise.md``, with the library itself: ``python docs/figures/noise.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyro_invflows import ConcatNoise, Flow, FlowDistribution, Orthogonal, Slice, SVDLinear

COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.5]])
GUESS = 0.9


def normal(size: int, scale: float = 1.0) -> dist.Distribution:
    """Return independent normals."""
    return dist.Normal(torch.zeros(size), scale * torch.ones(size)).to_event(1)


def gaussian() -> SVDLinear:
    """Return the layer that gives normal noise its covariance."""
    return SVDLinear.from_matrix(torch.linalg.cholesky(COVARIANCE), bias=False)


def contours(axis: Axes, density: dist.Distribution) -> None:
    """Draw the contours of a density of the plane."""
    line = torch.linspace(-3.4, 3.4, 120)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    axis.contour(line, line, density.log_prob(grid).exp(), levels=6, colors="0.6", linewidths=0.8)
    axis.set(xticks=[], yticks=[], xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), aspect="equal")


@torch.no_grad()
def injection(axis: Axes) -> None:
    """Draw a line that grows into a plane."""
    turn = Orthogonal.from_matrix(torch.tensor([[0.8, -0.6], [0.6, 0.8]]))
    flow = Flow(normal(1), [ConcatNoise(normal(1, 0.5)), turn])
    contours(axis, flow())
    x = torch.tensor([[-1.6], [0.2], [1.6]])
    e = torch.tensor([[0.5], [-0.7], [0.35]])
    start, end = turn(torch.cat([x, 0 * e], -1)), turn(torch.cat([x, e], -1))
    ends = turn(torch.tensor([[-3.2, 0.0], [3.2, 0.0]]))
    axis.plot(*ends.T, color="C0", linewidth=2)
    for a, b in zip(start, end, strict=True):
        axis.annotate("", xy=b.tolist(), xytext=a.tolist(), arrowprops={"arrowstyle": "->", "color": "C3", "lw": 1.6})
    axis.plot(*start.T, "o", color="C0")
    axis.plot(*end.T, "o", color="k")
    axis.text(-3.1, 2.65, "ConcatNoise: exact", fontsize=12, weight="bold")
    axis.text(1.05, 2.02, "x", color="C0", fontsize=12)
    axis.text(*(end[1] + torch.tensor([0.25, -0.12])).tolist(), "y = [x, e]", fontsize=11)
    axis.text(*((start[1] + end[1]) / 2 + torch.tensor([-0.45, -0.25])).tolist(), "e", color="C3", fontsize=12)
    axis.set_xlabel("a point y determines its x and its e:\n" r"$\log p(y) = \log p(x) + \log p(e)$", fontsize=10)


@torch.no_grad()
def dropping(axis: Axes) -> None:
    """Draw a plane that is reduced to a line."""
    joint = FlowDistribution(normal(2), [gaussian()])
    contours(axis, joint)
    y = 1.2
    axis.axvline(y, color="C0", linewidth=1.2)
    e = torch.linspace(-3.2, 3.2, 200)
    mean, variance = 0.8 * y, 1.5 - 0.64
    truth, guess = dist.Normal(mean, variance**0.5), dist.Normal(0.0, GUESS)
    axis.plot(y + 2.2 * truth.log_prob(e).exp(), e, color="k", label="p(e | y), unknown")
    axis.plot(y + 2.2 * guess.log_prob(e).exp(), e, color="C3", label="r(e | y), the guess")
    axis.plot([y], [-3.4], "o", color="C0", clip_on=False, zorder=5)
    axis.text(y - 0.35, -3.2, "y", color="C0", fontsize=12)
    axis.text(-3.1, 2.65, "Slice: a bound", fontsize=12, weight="bold")
    axis.legend(loc="lower left", fontsize=8, bbox_to_anchor=(0.0, 0.06), framealpha=0.9)
    axis.set_xlabel("every point above y is mapped to y:\n" r"$\log p(y) \approx \log p(y, e) - \log r(e \mid y)$")


@torch.no_grad()
def bounds(axis: Axes) -> None:
    """Draw the averages of both scores, beside the exact log-density."""
    layer = gaussian()
    d = FlowDistribution(normal(2), [layer, Slice(normal(1, GUESS))])
    joint = FlowDistribution(normal(2), [layer])
    y = torch.linspace(-2.5, 2.5, 41).unsqueeze(-1)
    exact = dist.Normal(0.0, 1.0).log_prob(y[:, 0])

    def truly_dropped(draws: int) -> Tensor:
        e = 0.8 * y + (1.5 - 0.64) ** 0.5 * torch.randn(draws, *y.shape)
        pairs = torch.cat([y.expand_as(e), e], -1)
        return (joint.log_prob(pairs) - normal(1, GUESS).log_prob(e)).mean(0)

    axis.plot(y, truly_dropped(20_000), color="C1", label='score="sample", on average')
    axis.plot(y, exact, color="k", linewidth=2, label="exact")
    for k, shade in ((100, 0.55), (10, 0.75), (1, 1.0)):
        mean = d.log_prob(y.expand(2_000, *y.shape), num_particles=k).mean(0)
        label = 'score="data", on average' if k == 1 else f"    num_particles={k}"
        axis.plot(y, mean, color="C3", alpha=shade, linestyle="-" if k == 1 else "--", linewidth=1.3, label=label)
    axis.legend(fontsize=8, loc="lower center")
    axis.set(xlabel="y", ylabel="log-density", ylim=(-6.6, 1.2), title="below or above, as chosen")


def main() -> None:
    """Draw the picture."""
    torch.manual_seed(0)
    plt.rcParams["svg.hashsalt"] = "noise"
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.3), layout="constrained")
    injection(axes[0])
    dropping(axes[1])
    bounds(axes[2])
    here = Path(__file__).parent
    figure.savefig(here / "noise.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
