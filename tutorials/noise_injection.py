"""Noise injection: a flow that grows from 16 dimensions to 64 pixels, with noise whitened in the inverse pass.

A flow keeps the dimension, so its base must have as many dimensions as its data. ``ConcatNoise`` lifts this
restriction: forward, it adds elements drawn from a noise distribution; in the inverse pass it removes them, and the
density stays exact. Nothing is lost: ``chain.latents(image)`` recovers the base point **and** the noise that made an
image.

The recovered noise need not have the distribution that was injected. So every few steps a ``Whitening`` observes the
noise recovered from the training images and takes over its mean and covariance: the noise is then *coloured* in the
forward pass and *whitened* in the inverse pass. The same model with plain noise, which never adapts, is trained for
comparison. The data are the handwritten digits that come with scikit-learn (8 x 8 pixels, 17 grey levels).

What to expect: bits per dimension that whitening saves on held-out images, mean and range over seeds 0 to 6::

    couplings behind the injection    1                2                4                8
    bits saved                        0.09             0.03             0.00             0.00
    least and most over seeds         0.07 to 0.10     0.02 to 0.06     -0.00 to 0.01    -0.01 to 0.02

The reason is what a coupling can do. It moves each element of one half separately, depending on the other half. So a
single coupling removes no correlation within the half that it leaves unchanged, and little within the other. Noise with
the right covariance removes all correlation between its elements, at any depth. Several couplings in a row can learn a
covariance too: with four or eight of them, after a few hundred steps, what whitening saves is within the variation
between seeds. Whitening is most useful if a flow must be shallow. It starts a fifth of a bit ahead at any depth, but
with eight couplings that lead is gone after a hundred steps.

Run it with::

    python tutorials/noise_injection.py            # the real thing, three seeds: a few minutes on two cores
    python tutorials/noise_injection.py --short    # a few steps of everything, to see that it runs

Pictures go to ``tutorials/output/noise_injection`` unless ``--output`` says otherwise.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Threads that spin while they wait cost more than they gain if other programs share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")  # draw to files; needs no screen

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.image import AxesImage
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from pyro_invflows import Chain, Diagonal, Flow, Interval, Permute, Whitening, affine_coupling, inject_noise

SIDE, LEVELS = 8, 17  # images of 8 x 8 pixels with grey levels 0, ..., 16
PIXELS = SIDE * SIDE
LATENT = 16
HELD_OUT, VALIDATION = 360, 187


@dataclass(frozen=True)
class Settings:
    """Everything that can be tuned; the same for both models."""

    margin: float = 0.004
    small_couplings: int = 2
    couplings: int = 8  # behind the injection; the experiment goes through depths
    hidden_dims: tuple[int, ...] = (64, 64)
    max_steps: int = 800
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1.0
    check_every: int = 20  # steps between looks at the validation images, and between adaptations
    patience: int = 10  # checks without improvement
    noise_draws: int = 16
    depths: tuple[int, ...] = (1, 2, 4, 8)
    seeds: int = 3


SHORT = replace(Settings(), max_steps=12, check_every=4, noise_draws=2, depths=(1, 4), seeds=1)


# ---------------------------------------------------------------------- data


@dataclass(frozen=True)
class Digits:
    """Grey levels 0, ..., 16 as floats, ``(N, 64)``, in three disjoint parts."""

    train: Tensor
    validation: Tensor
    held_out: Tensor


def load_data() -> Digits:
    """Load the digits and split them, always in the same way, independent of ``--seed``."""
    data = load_digits().data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(data, dtype=torch.float32)[order]
    end = len(pixels) - HELD_OUT
    return Digits(pixels[: end - VALIDATION], pixels[end - VALIDATION : end], pixels[end:])


def dequantise(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Spread each grey level uniformly over its 1/17 of the unit interval, so that a density makes sense."""
    return (pixels + torch.rand(pixels.shape, generator=generator)) / LEVELS


@torch.no_grad()
def mean_bits(flow: Flow, pixels: Tensor, draws: int) -> float:
    """Return bits per pixel of the 17-level images, averaged over dequantisation noise drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    d = flow()
    log_prob = torch.stack([d.log_prob(dequantise(pixels, generator)).mean() for _ in range(draws)]).mean()
    return (-log_prob / (PIXELS * math.log(2)) + math.log2(LEVELS)).item()


# ---------------------------------------------------------------------- the flow that grows


def couplings(size: int, count: int, settings: Settings) -> list[nn.Module]:
    """Return couplings, each between a random permutation and its inverse; at first the identity."""
    layers: list[nn.Module] = []
    for _ in range(count):
        order = torch.randperm(size)
        layers += [Permute(order), affine_coupling(size, settings.hidden_dims, activation=nn.SiLU)]
        layers += [Permute(order.argsort())]
    return layers


def make_flow(train: Tensor, settings: Settings) -> Flow:
    """Build the flow. Read the chain from noise to image.

    The base has 16 dimensions. ``inject_noise`` adds 48 elements of noise, which a ``Whitening`` colours (at first it
    is the identity). Couplings turn the 64 dimensions into digits; the last two layers only set each pixel's mean and
    scale, and the range of the grey levels.
    """
    to_unit_cube = Interval(-settings.margin, 1 + settings.margin)
    logits = to_unit_cube.inv(dequantise(train.repeat(20, 1)))
    units = Diagonal.from_matrix(logits.std(0).diag())
    with torch.no_grad():
        units.bias.copy_(logits.mean(0))
    units.requires_grad_(False)
    layers = [
        *couplings(LATENT, settings.small_couplings, settings),
        inject_noise(LATENT, PIXELS - LATENT, name="noise"),
        Permute(torch.randperm(PIXELS)),  # spreads the noise over the image
        *couplings(PIXELS, settings.couplings, settings),
        units,
        to_unit_cube,
    ]
    return Flow(dist.Normal(torch.zeros(LATENT), torch.ones(LATENT)).to_event(1), Chain(layers))


def whitening_of(flow: Flow) -> Whitening:
    """Return the layer that colours the injected noise."""
    (injection,) = (layer for layer in flow.transforms if getattr(layer, "name", None) == "noise")
    return injection.noise.transforms[0]


@torch.no_grad()
def adapt_noise(flow: Flow, pixels: Tensor) -> None:
    """Give the injected noise the mean and covariance that the restored noise has now.

    Whatever the other layers do, no other Gaussian gives the noise of these images a higher likelihood (apart from a
    little shrinkage), so the step raises the likelihood of the images. It needs neither a gradient nor a learning rate.
    The statistics are reset each time, because the noise drifts while the other layers learn.
    """
    whitening = whitening_of(flow)
    whitening.reset_statistics()
    for batch in dequantise(pixels).split(512):  # a stream would do: batches are merged exactly
        whitening.observe(flow.transforms.latents(batch)["noise"])
    whitening.adapt()


# ---------------------------------------------------------------------- training


@dataclass
class History:
    """What the training curve shows."""

    steps: list[int]
    validation: list[float]
    best_step: int = 0


@dataclass(frozen=True)
class Run:
    """A trained flow, and what it reached."""

    flow: Flow
    history: History
    held_out: float


#: Runs from all seeds, by the number of couplings and the model's name.
Runs = dict[tuple[int, str], list[Run]]
MODELS = ("plain", "whitened")


def fit(flow: Flow, data: Digits, settings: Settings, whiten: bool) -> tuple[Flow, History]:
    """Train by maximum likelihood; return the flow that was best on the validation images."""
    networks = [p for name, p in flow.named_parameters() if "hypernet" in name and p.dim() == 2]
    chosen = {id(p) for p in networks}
    others = [p for p in flow.parameters() if id(p) not in chosen and p.requires_grad]
    groups = [{"params": networks, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.max_steps, pct_start=0.1
    )
    history = History([], [])
    best = copy.deepcopy(flow)
    bar = tqdm(range(settings.max_steps + 1), desc="whitened" if whiten else "plain", unit="step", disable=None)
    for step in bar:
        if step % settings.check_every == 0:
            if whiten:
                adapt_noise(flow, data.train)
            history.steps.append(step)
            history.validation.append(mean_bits(flow, data.validation, 4))
            bar.set_postfix(validation=f"{history.validation[-1]:.3f}")
            if history.validation[-1] == min(history.validation):
                history.best_step, best = step, copy.deepcopy(flow)
            elif step - history.best_step >= settings.patience * settings.check_every:
                break
        if step == settings.max_steps:
            break
        batch = data.train[torch.randint(len(data.train), (settings.batch_size,))]
        loss = -flow().log_prob(dequantise(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 50.0)
        optimizer.step()
        schedule.step()
    bar.close()
    return best, history


# ---------------------------------------------------------------------- what the noise looks like


def correlation(noise: Tensor) -> Tensor:
    """Return the correlation matrix of restored noise."""
    return torch.corrcoef(noise.T)


def off_diagonal(matrix: Tensor) -> float:
    """Return the root mean square of the off-diagonal entries."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)].square().mean().sqrt().item()


@torch.no_grad()
def restored_noise(flow: Flow, pixels: Tensor, draws: int = 10) -> tuple[Tensor, Tensor]:
    """Return the noise that made some images, as injected and after whitening."""
    images = dequantise(pixels.repeat(draws, 1), torch.Generator().manual_seed(2))
    noise = flow.transforms.latents(images)["noise"]
    return noise, whitening_of(flow).inv(noise.clone())


# ---------------------------------------------------------------------- pictures


def grey(x: Tensor) -> Tensor:
    """Undo the dequantisation: the grey levels of points of the unit cube."""
    return (x * LEVELS).floor().clamp(0, LEVELS - 1)


def tiles(images: Tensor, rows: int, gap: int = 1) -> Tensor:
    """Lay ``(rows * columns, 64)`` out as one picture, ``rows`` high, with NaN between the images."""
    padded = nn.functional.pad(images.reshape(rows, -1, SIDE, SIDE), (0, gap, 0, gap), value=float("nan"))
    return padded.transpose(1, 2).reshape(rows * (SIDE + gap), -1)[:-gap, :-gap]


def show(axis: plt.Axes, picture: Tensor, cmap: str = "gray_r", low: float = 0, high: float = LEVELS - 1) -> AxesImage:
    """Draw a picture without ticks or frame."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    if cmap == "gray_r":
        axis.set_facecolor("lightsteelblue")  # shows between the images, where the picture is NaN
    return axis.imshow(picture, cmap=cmap, vmin=low, vmax=high)


def plot_training(runs: Runs, depths: Sequence[int], path: Path) -> None:
    """Draw the validation curves of both models, with the fewest and the most couplings."""
    figure, axes = plt.subplots(1, len(depths), figsize=(5 * len(depths), 4), sharey=True, layout="constrained")
    for axis, depth in zip(axes, depths, strict=True):
        for name, colour in zip(MODELS, ("C0", "C1"), strict=True):
            history = runs[depth, name][0].history
            axis.plot(history.steps, history.validation, color=colour, label=f"{name} noise")
            axis.plot(history.best_step, min(history.validation), "o", color=colour)
        axis.set(xlabel="step (the dot: kept)", title=f"{depth} coupling{'s' * (depth > 1)}")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("bits per dimension, validation")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_gains(runs: Runs, depths: Sequence[int], path: Path) -> None:
    """Draw what whitening gains at each depth, with a dot for each seed."""
    figure, axis = plt.subplots(figsize=(5.6, 4), layout="constrained")
    for i, depth in enumerate(depths):
        gains = [-change for change in changes(runs, depth)]
        axis.plot([i] * len(gains), gains, "o", color="C1", alpha=0.6)
        axis.plot([i - 0.2, i + 0.2], [sum(gains) / len(gains)] * 2, color="k")
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axis.set(xlabel="couplings behind the injection", ylabel="bits per dimension saved, held out")
    axis.set_title("What whitening the noise gains: each seed, and the mean")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def plot_samples(runs: Runs, depths: Sequence[int], held_out: Tensor, path: Path, rows: int = 6) -> None:
    """Draw new digits from both models, with the fewest and the most couplings, beside real ones."""
    panels = {
        f"{depth} coupling{'s' * (depth > 1)}, {name} noise": grey(runs[depth, name][0].flow().sample((rows * rows,)))
        for depth in depths
        for name in MODELS
    } | {"real, held out": held_out[: rows * rows]}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.7 * len(panels), 4), layout="constrained")
    for axis, (title, images) in zip(axes, panels.items(), strict=True):
        show(axis, tiles(images, rows))
        axis.set_title(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_correlations(panels: dict[int, dict[str, Tensor]], path: Path) -> None:
    """Draw correlation matrices of restored noise, a row for each depth."""
    columns = len(next(iter(panels.values())))
    figure, axes = plt.subplots(
        len(panels), columns, figsize=(4 * columns, 4.3 * len(panels)), layout="constrained", squeeze=False
    )
    for row, (depth, matrices) in zip(axes, panels.items(), strict=True):
        for axis, (title, matrix) in zip(row, matrices.items(), strict=True):
            image = show(axis, matrix, cmap="RdBu_r", low=-1, high=1)
            axis.set_title(f"{depth} coupling{'s' * (depth > 1)}: {title}", fontsize=10)
            axis.set_xlabel(f"off the diagonal: {off_diagonal(matrix):.3f} rms")
    figure.colorbar(image, ax=axes, label="correlation", shrink=0.75)
    figure.suptitle(f"The {PIXELS - LATENT} elements of noise, restored from held-out digits")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def plot_side_inputs(flow: Flow, held_out: Tensor, path: Path, columns: int = 10, rows: int = 4) -> None:
    """Draw held-out digits with their own noise, and with the noise drawn anew around the same base point.

    Latents that are not given are drawn: without the noise, ``from_latents`` injects other noise.
    """
    chain = flow.transforms
    latents = chain.latents(dequantise(held_out[:columns], torch.Generator().manual_seed(2)))
    same = chain.from_latents(latents)
    redrawn = [chain.from_latents({"base": latents["base"]}) for _ in range(rows)]
    other = [chain.from_latents({"base": torch.randn(columns, LATENT), "noise": latents["noise"]}) for _ in range(rows)]
    figure, axes = plt.subplots(3, 1, figsize=(8, 8.4), layout="constrained", height_ratios=[1, rows, rows])
    titles = (
        "held out, from its own base point and noise",
        "its base point (16), other noise (48)",
        "its noise (48), other base points (16)",
    )
    pictures = [(same, 1), (torch.cat(redrawn), rows), (torch.cat(other), rows)]
    for axis, title, (images, count) in zip(axes, titles, pictures, strict=True):
        show(axis, tiles(grey(images), count))
        axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------- the experiment


def train_all(data: Digits, settings: Settings, seed: int) -> Runs:
    """Train both models at every depth, from several seeds."""
    runs: Runs = {}
    for depth in settings.depths:
        for name in MODELS:
            runs[depth, name] = []
            for i in range(settings.seeds):
                pyro.set_rng_seed(seed + i)  # for both models the same weights and the same batches
                flow = make_flow(data.train, replace(settings, couplings=depth))
                flow, history = fit(flow, data, settings, name == "whitened")
                held_out = mean_bits(flow, data.held_out, settings.noise_draws)
                runs[depth, name].append(Run(flow, history, held_out))
    return runs


def changes(runs: Runs, depth: int) -> list[float]:
    """Return by how much whitening changes the held-out bits per dimension, for each seed."""
    return [b.held_out - a.held_out for a, b in zip(*(runs[depth, name] for name in MODELS), strict=True)]


def print_table(runs: Runs, settings: Settings) -> None:
    """Print held-out bits per dimension."""
    print(f"  Held-out bits per dimension, means over {settings.seeds} seed(s); the mean change and its range")
    print("    couplings   plain noise   whitened noise   change")
    for depth in settings.depths:
        plain, whitened = (sum(run.held_out for run in runs[depth, name]) / settings.seeds for name in MODELS)
        change = changes(runs, depth)
        spread = f"{sum(change) / len(change):+.3f} ({min(change):+.3f} to {max(change):+.3f})"
        print(f"    {depth:9d} {plain:13.3f} {whitened:16.3f}   {spread}")


def correlations(runs: Runs, depth: int, held_out: Tensor) -> dict[str, Tensor]:
    """Return the correlations of the noise restored from held-out images, for the first seed."""
    plain, _ = restored_noise(runs[depth, "plain"][0].flow, held_out)
    coloured, white = restored_noise(runs[depth, "whitened"][0].flow, held_out)
    return {
        "plain noise": correlation(plain),
        "before whitening": correlation(coloured),
        "after whitening": correlation(white),
    }


def grow_digits(settings: Settings, output: Path, seed: int) -> None:
    """Train all models, print the numbers and draw the pictures."""
    data = load_data()
    sizes = len(data.train), len(data.validation), len(data.held_out)
    print("Digits: {} images to train on, {} to stop early, {} held out".format(*sizes))
    runs = train_all(data, settings, seed)
    print_table(runs, settings)

    ends = settings.depths[0], settings.depths[-1]
    panels = {depth: correlations(runs, depth, data.held_out) for depth in ends}
    print("  Correlations of the restored noise, root mean square off the diagonal")
    print(f"    (with only {len(data.held_out)} images, expect about {len(data.held_out) ** -0.5:.2f} by chance)")
    for depth, matrices in panels.items():
        numbers = ", ".join(f"{title} {off_diagonal(matrix):.3f}" for title, matrix in matrices.items())
        print(f"    {depth} coupling(s): {numbers}")
    deep = runs[ends[1], "whitened"][0].flow
    chain = copy.deepcopy(deep).double().transforms
    images = dequantise(data.held_out, torch.Generator().manual_seed(2)).double()
    error = (chain.from_latents(chain.latents(images)) - images).abs().max()
    print(f"  Worst error of image -> base point and noise -> image, in float64: {error:.1e}")

    plot_gains(runs, settings.depths, output / "gains.png")
    plot_training(runs, ends, output / "training.png")
    plot_samples(runs, ends, data.held_out, output / "samples.png")
    plot_correlations(panels, output / "correlations.png")
    plot_side_inputs(deep, data.held_out, output / "side_inputs.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(__file__).parent / "output" / "noise_injection"
    parser.add_argument("--output", type=Path, default=default, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few steps only, to see that everything runs")
    options = parser.parse_args(argv)
    settings = SHORT if options.short else Settings()
    options.output.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    if options.short:
        print("SHORT run: a few steps only, the numbers mean nothing")
    grow_digits(settings, options.output, options.seed)
    print(f"Total: {time.perf_counter() - began:.1f} s; pictures in {options.output}")


if __name__ == "__main__":
    main()
