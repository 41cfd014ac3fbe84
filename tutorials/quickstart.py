"""Quickstart: a flow on real images, then the same layers as a variational guide.

Part one learns the density of the handwritten digits that come with scikit-learn (1797 images of 8 x 8 pixels with 17
grey levels) and prints how many bits per pixel it needs for images that it has never seen. Part two puts the same
layers inside Pyro's ``AutoNormalizingFlow`` and infers the posterior of the eight schools model.

Run it with::

    python tutorials/quickstart.py            # the real thing, a minute or two on two cores
    python tutorials/quickstart.py --short    # a few steps of everything, to see that it runs

Pictures go to ``tutorials/output/quickstart`` unless ``--output`` says otherwise.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from matplotlib.lines import Line2D
from pyro.distributions.transforms import iterated
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from pyro_invflows import (
    Baird,
    Chain,
    Diagonal,
    Flow,
    Interval,
    Orthogonal,
    Permute,
    affine_coupling,
    baird,
    diagonal,
    orthogonal,
)

SIDE, LEVELS = 8, 17  # images of 8 x 8 pixels with grey levels 0, ..., 16
PIXELS = SIDE * SIDE
HELD_OUT = 360
VALIDATION = 187


@dataclass(frozen=True)
class Settings:
    """Everything that can be tuned, chosen on the validation images alone."""

    # the flow on images
    margin: float = 0.004
    couplings: int = 8
    hidden_dims: tuple[int, ...] = (192, 192)
    max_log_scale: float = 1.0
    # its training
    max_steps: int = 800
    batch_size: int = 128
    learning_rate: float = 5e-3
    weight_decay: float = 0.5
    averaging: float = 0.99
    check_every: int = 20
    patience: int = 8  # checks without improvement
    noise_draws: int = 16
    # the guide
    guide_layers: int = 2
    guide_steps: int = 1000
    guide_particles: int = 64
    guide_learning_rate: float = 1e-2
    posterior_samples: int = 20_000


SHORT = replace(Settings(), max_steps=10, check_every=5, noise_draws=2, guide_steps=20, posterior_samples=2_000)


# ---------------------------------------------------------------------- data


@dataclass(frozen=True)
class Digits:
    """Grey levels 0, ..., 16 as floats, ``(N, 64)``, in three disjoint parts."""

    train: Tensor
    validation: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def load_data() -> Digits:
    """Load the digits, shuffle them with a seed of their own and split them.

    The split does not depend on ``--seed``, so that the numbers of different runs can be compared.
    """
    bunch = load_digits()
    order = torch.randperm(len(bunch.data), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(bunch.data, dtype=torch.float32)[order]
    labels = torch.tensor(bunch.target)[order]
    end = len(pixels) - HELD_OUT
    return Digits(pixels[: end - VALIDATION], pixels[end - VALIDATION : end], pixels[end:], labels[end:])


def dequantise(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Spread each grey level uniformly over its 1/17 of the unit interval.

    A density of discrete values could grow without bound by putting spikes on the 17 levels. With the noise, the
    expected log-density is a lower bound of the log-probability of the discrete image.
    """
    return (pixels + torch.rand(pixels.shape, generator=generator)) / LEVELS


def bits_per_dim(log_prob: Tensor) -> Tensor:
    """Turn log-densities on the unit cube (nats an image) into bits a pixel of the 17-level image.

    A level is 1/17 wide, so the probability of a pixel is its density over 17: this adds log2(17).
    """
    return -log_prob / (PIXELS * math.log(2)) + math.log2(LEVELS)


@torch.no_grad()
def mean_bits(log_prob: Callable[[Tensor], Tensor], pixels: Tensor, draws: int) -> float:
    """Return bits per dimension, averaged over images and over noise drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    bits = [bits_per_dim(log_prob(dequantise(pixels, generator))).mean() for _ in range(draws)]
    return torch.stack(bits).mean().item()


# ---------------------------------------------------------------------- the flow


def to_unit_cube(margin: float) -> Interval:
    """Return the last layer: the real line onto a little more than (0, 1); its inverse is the logit.

    Its log-det counts like every other. The plain logit would send pixels near 0 (half of all: the paper) far out
    into a long tail; a margin of less than a tenth of a grey level cuts that tail short.
    """
    return Interval(-margin, 1 + margin)


def moments(pixels: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Return mean (64) and covariance (64, 64) of the logits, over twenty draws of the noise."""
    logits = to_unit_cube(margin).inv(dequantise(pixels.repeat(20, 1))).double()
    return logits.mean(0), torch.cov(logits.T)


def make_flow(train: Tensor, settings: Settings) -> Flow:
    """Build the flow, so that it starts as the full-covariance Gaussian of the training images.

    Read the chain from noise to image. ``Diagonal`` and ``Orthogonal`` give noise the covariance of the data: its
    eigenvalues, then its eigenvectors. Between them ``Baird``, at first the identity, may skew each principal
    component. Couplings, at first the identity too, then bend the Gaussian; a random permutation before each lets every
    pixel be in either half. The pixels' scales and the sigmoid come last.

    There are few images. Since the flow starts with all second moments, the couplings only have to learn what is not
    Gaussian; early stopping does the rest.
    """
    mean, covariance = moments(train, settings.margin)
    scale = covariance.diagonal().sqrt()
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance / scale.outer(scale))

    variances = Diagonal.from_matrix(eigenvalues.sqrt().float().diag(), bias=False)
    principal_axes = Orthogonal.from_matrix(eigenvectors.float())
    layers = [variances, Baird((PIXELS,)), principal_axes]
    for _ in range(settings.couplings):
        order = torch.randperm(PIXELS)
        coupling = affine_coupling(
            PIXELS, settings.hidden_dims, max_log_scale=settings.max_log_scale, activation=nn.SiLU
        )
        # permute, couple, permute back: the couplings' input and output are images, not shuffled images
        layers += [Permute(order), coupling, Permute(order.argsort())]
    units = Diagonal.from_matrix(scale.float().diag())
    with torch.no_grad():
        units.bias.copy_(mean)
    return Flow(
        dist.Normal(torch.zeros(PIXELS), 1.0).to_event(1), Chain([*layers, units, to_unit_cube(settings.margin)])
    )


def gaussian_log_prob(train: Tensor, settings: Settings) -> Callable[[Tensor], Tensor]:
    """Return the log-density of the full-covariance Gaussian behind the same sigmoid: what the flow must beat."""
    mean, covariance = moments(train, settings.margin)
    base = dist.MultivariateNormal(mean, covariance)
    gaussian = dist.TransformedDistribution(base, [to_unit_cube(settings.margin)])
    return lambda x: gaussian.log_prob(x.double())


# ---------------------------------------------------------------------- training


@dataclass
class History:
    """What the training curve shows, and when the best flow was seen."""

    steps: list[int]
    train: list[float]
    validation: list[float]
    best_step: int
    best_validation: float
    seconds: float


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on the matrices of the networks only.

    The other parameters are scales, shifts and reflections; pulling those to zero would not regularise anything.
    """
    networks = [p for name, p in model.named_parameters() if "hypernet" in name and p.dim() == 2]
    chosen = {id(p) for p in networks}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": networks, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def fit(model: nn.Module, data: Digits, settings: Settings) -> tuple[nn.Module, History]:
    """Train by maximum likelihood; return the best averaged model and the history.

    ``model()`` must return a distribution. Three things prevent overfitting: fresh dequantisation noise in every
    batch, an exponential moving average of the weights (which is evaluated and returned), and early stopping on the
    validation images.
    """
    optimizer = make_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.max_steps, pct_start=0.05
    )
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.averaging))
    best: nn.Module = copy.deepcopy(model)
    start = mean_bits(model().log_prob, data.validation, 4)
    history = History([0], [float("nan")], [start], 0, start, 0.0)
    losses: list[float] = []
    began = time.perf_counter()
    bar = tqdm(range(1, settings.max_steps + 1), desc="training", unit="step", disable=None)
    for step in bar:
        batch = data.train[torch.randint(len(data.train), (settings.batch_size,))]
        # one pass through the layers: the flow scores data that it did not sample, log-det included
        loss = bits_per_dim(model().log_prob(dequantise(batch))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
        losses.append(loss.item())
        if step % settings.check_every:
            continue
        validation = mean_bits(averaged.module().log_prob, data.validation, 4)
        history.steps.append(step)
        history.train.append(sum(losses) / len(losses))
        history.validation.append(validation)
        losses.clear()
        bar.set_postfix(train=f"{history.train[-1]:.3f}", validation=f"{validation:.3f}")
        if validation < history.best_validation:
            history.best_step, history.best_validation = step, validation
            best = copy.deepcopy(averaged.module)
        elif step - history.best_step >= settings.patience * settings.check_every:
            break
    bar.close()
    history.seconds = time.perf_counter() - began
    return best, history


# ---------------------------------------------------------------------- does it invert?


@torch.no_grad()
def round_trip_errors(flow: Flow, pixels: Tensor) -> tuple[float, float]:
    """Return the worst errors of image -> noise -> image (in grey levels) and of noise -> image -> noise.

    ``.clone()`` makes the way back a real computation: for the very tensor that a layer has just returned, it may
    answer from memory.
    """
    dtype = next(flow.parameters()).dtype
    chain = flow.transforms
    x = dequantise(pixels, torch.Generator().manual_seed(2)).to(dtype)
    image_error = (chain(chain.inv(x).clone()) - x).abs().max() * LEVELS
    z = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    noise_error = (chain.inv(chain(z).clone()) - z).abs().max()
    return image_error.item(), noise_error.item()


# ---------------------------------------------------------------------- pictures of part one


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


def plot_training(history: History, gaussian: float, path: Path) -> None:
    """Draw the training curve; ``gaussian`` is the Gaussian's bits per dimension on the validation images."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axis.plot(history.steps[1:], history.train[1:], color="C0", label="training batches")
    axis.plot(history.steps, history.validation, color="C1", label="validation, averaged weights")
    axis.plot(history.best_step, history.best_validation, "o", color="C1", label=f"kept: step {history.best_step}")
    axis.axhline(gaussian, color="0.4", linestyle="--", label="full-covariance Gaussian")
    axis.set(xlabel="step", ylabel="bits per dimension", title="Learning the digits")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def plot_samples(flow: Flow, held_out: Tensor, path: Path, rows: int = 10) -> None:
    """Draw new digits from the flow beside real ones."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.7), layout="constrained", gridspec_kw={"wspace": 0.06})
    show(axes[0], tiles(grey(flow().sample((rows * rows,))), rows))
    axes[0].set_title("drawn from the flow")
    show(axes[1], tiles(held_out[: rows * rows], rows))
    axes[1].set_title("real, held out")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def plot_reconstructions(flow: Flow, held_out: Tensor, path: Path, columns: int = 12) -> None:
    """Draw held-out images, the noise that the flow makes of them, and the way back."""
    x = dequantise(held_out[:columns], torch.Generator().manual_seed(2))
    z = flow.transforms.inv(x)
    back = flow.transforms(z.clone())
    figure, axes = plt.subplots(3, 1, figsize=(10, 2.9), layout="constrained")
    show(axes[0], tiles(grey(x), 1))
    latent = show(axes[1], tiles(z, 1), cmap="RdBu_r", low=-3, high=3)
    show(axes[2], tiles(grey(back), 1))
    for axis, label in zip(axes, ("original", "latent", "back again"), strict=True):
        axis.set_ylabel(label, rotation="horizontal", ha="right", va="center")
    figure.colorbar(latent, ax=axes, label="latent value", shrink=0.8)
    figure.suptitle("Held-out digits, the noise they come from, and the way back")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def great_circle(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return points between two latents, along the sphere where Gaussian noise lives.

    Almost all of a 64-dimensional Gaussian lies near radius 8; a straight line would cut through its empty middle.
    """
    t = torch.linspace(0, 1, steps).unsqueeze(-1)
    angle = torch.arccos(torch.cosine_similarity(start, end, dim=0))
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)


@torch.no_grad()
def plot_interpolation(flow: Flow, data: Digits, path: Path, columns: int = 11) -> None:
    """Draw walks in latent space between held-out images of neighbouring digits."""
    first = [int((data.held_out_labels == digit).nonzero()[0]) for digit in range(10)]
    x = dequantise(data.held_out[first], torch.Generator().manual_seed(2))
    z = flow.transforms.inv(x)
    walks = [great_circle(z[i], z[i + 1], columns) for i in range(0, 10, 2)]
    figure, axis = plt.subplots(figsize=(8.5, 4.3), layout="constrained")
    show(axis, tiles(grey(flow.transforms(torch.cat(walks))), len(walks)))
    axis.set_xticks([3.5, (SIDE + 1) * (columns - 1) + 3.5], ["real", "real"])
    axis.tick_params(length=0)
    axis.set_title("From one held-out digit to another, in latent space")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------- part one


def learn_digits(settings: Settings, output: Path) -> None:
    """Train on the digits, print the numbers and draw the pictures."""
    data = load_data()
    sizes = len(data.train), len(data.validation), len(data.held_out)
    print("Digits: {} images to train on, {} to stop early, {} held out".format(*sizes))
    flow = make_flow(data.train, settings)
    model, history = fit(flow, data, settings)
    assert isinstance(model, Flow)
    flow = model

    print(f"  trained {history.steps[-1]} steps in {history.seconds:.1f} s, kept step {history.best_step}")
    # The Gaussian needs no validation images, so it may learn from those too.
    gaussian = gaussian_log_prob(torch.cat([data.train, data.validation]), settings)
    draws = settings.noise_draws
    ours, theirs = (mean_bits(log_prob, data.held_out, draws) for log_prob in (flow().log_prob, gaussian))
    print(f"  bits per dimension, mean of {draws} draws of the noise   flow   full-covariance Gaussian")
    print(f"    validation {history.best_validation:42.3f} {history.validation[0]:15.3f}")
    print(f"    held out   {ours:42.3f} {theirs:15.3f}")
    for name, version in (("float32", flow), ("float64", copy.deepcopy(flow).double())):
        image_error, noise_error = round_trip_errors(version, data.held_out)
        print(
            f"  worst round-trip error in {name}: {image_error:.1e} grey levels (image -> noise -> image), "
            f"{noise_error:.1e} (noise -> image -> noise)"
        )

    plot_training(history, history.validation[0], output / "training.png")
    plot_samples(flow, data.held_out, output / "samples.png")
    plot_reconstructions(flow, data.held_out, output / "reconstructions.png")
    plot_interpolation(flow, data, output / "interpolation.png")


# ---------------------------------------------------------------------- part two: a guide

SCHOOLS = 8
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
#: Mean and standard deviation of long reference runs of Hamiltonian Monte Carlo.
REFERENCE = {"mu": (4.41, 3.31), "tau": (3.60, 3.20)}


def eight_schools(effects: Tensor) -> None:
    """How much does coaching help, in each of eight schools? Rubin (1981), in the non-centred form."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", SCHOOLS):
        theta = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * theta, ERRORS), obs=effects)


def guide_layer(input_dim: int) -> Chain:
    """Return one layer of the guide: rotate the latents, bend and scale each, let the first two steer the others.

    The first two latents are mu and tau. Given them, the exact posterior of the others is Gaussian with a mean and a
    scale that depend on both: just what a coupling with ``split_dim=2`` can say.
    """
    return Chain(
        [
            orthogonal(input_dim),
            baird(input_dim),
            diagonal(input_dim),
            affine_coupling(input_dim, (32, 32), split_dim=2, activation=nn.Tanh),
        ]
    )


def fit_guide(settings: Settings) -> tuple[AutoNormalizingFlow, list[float]]:
    """Fit a flow to the posterior by stochastic variational inference; return it with the losses."""
    pyro.clear_param_store()
    guide = AutoNormalizingFlow(eight_schools, partial(iterated, settings.guide_layers, guide_layer))
    steps = settings.guide_steps
    # the learning rate falls by a factor of a hundred: large steps to get there, small ones to settle
    optimizer = pyro.optim.ClippedAdam({"lr": settings.guide_learning_rate, "lrd": 0.01 ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=settings.guide_particles, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(eight_schools, guide, optimizer, elbo)
    bar = tqdm(range(steps), desc="inference", unit="step", disable=None)
    losses = []
    for step in bar:
        losses.append(svi.step(EFFECTS))
        if step % 100 == 99:
            bar.set_postfix(loss=f"{sum(losses[-100:]) / 100:.3f}")
    return guide, losses


@torch.no_grad()
def sample_posterior(guide: AutoNormalizingFlow, num_samples: int) -> dict[str, Tensor]:
    """Return draws of mu and tau from the guide."""
    predictive = Predictive(
        eight_schools, guide=guide, num_samples=num_samples, return_sites=("mu", "tau"), parallel=True
    )
    return {name: value.squeeze() for name, value in predictive(EFFECTS).items()}


def exact_log_density(mu: Tensor, log_tau: Tensor) -> Tensor:
    """Return the exact log-density of (mu, log tau), up to a constant.

    Given both, each school's effect is Gaussian and can be integrated out: two dimensions remain, and a grid shows
    them without any approximation.
    """
    tau = log_tau.exp()
    scale = (ERRORS**2 + tau.unsqueeze(-1) ** 2).sqrt()
    likelihood = dist.Normal(mu.unsqueeze(-1), scale).log_prob(EFFECTS).sum(-1)
    prior = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau)
    return likelihood + prior + log_tau  # the last term: from tau to log tau


def plot_posterior(samples: dict[str, Tensor], path: Path) -> None:
    """Draw the guide's samples under the contours of the exact posterior, and the margin of tau."""
    mu, log_tau = torch.linspace(-9, 18, 200), torch.linspace(-4.5, 4, 200)
    grid = torch.meshgrid(mu, log_tau, indexing="ij")
    density = exact_log_density(*grid).exp()
    ordered = density.flatten().sort(descending=True).values
    mass = ordered.cumsum(0) / ordered.sum()
    levels = [float(ordered[(mass < share).sum()]) for share in (0.95, 0.8, 0.5)]

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    shown = slice(0, 4000)
    left.scatter(samples["mu"][shown], samples["tau"][shown].log(), s=3, alpha=0.35, color="C0", linewidths=0)
    left.contour(*grid, density, levels=levels, colors="C3", linewidths=1.3)
    left.set(
        xlim=(-9, 18), ylim=(-4.5, 4), xlabel=r"$\mu$", ylabel=r"$\log\,\tau$", title="Eight schools: joint posterior"
    )
    handles = [
        Line2D([], [], color="C0", marker="o", markersize=4, linestyle="", label="samples of the guide"),
        Line2D([], [], color="C3", label="exact: 50, 80 and 95 %"),
    ]
    left.legend(handles=handles, loc="lower right")

    tau = torch.linspace(0.01, 20, 400)
    marginal = exact_log_density(*torch.meshgrid(mu, tau.log(), indexing="ij")).exp().sum(0) / tau
    marginal = marginal / torch.trapezoid(marginal, tau)
    right.hist(
        samples["tau"].clamp(max=20).numpy(), bins=80, range=(0, 20), density=True, color="C0", alpha=0.6, label="guide"
    )
    right.plot(tau, marginal, color="C3", label="exact")
    right.set(xlim=(0, 19.5), xlabel=r"$\tau$", ylabel="density", title="Spread between schools")
    right.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def infer_eight_schools(settings: Settings, output: Path) -> None:
    """Fit the guide, print its posterior beside the reference and draw it."""
    began = time.perf_counter()
    guide, losses = fit_guide(settings)
    samples = sample_posterior(guide, settings.posterior_samples)
    last = losses[-100:]
    print(
        f"Eight schools: {len(losses)} steps in {time.perf_counter() - began:.1f} s, loss {sum(last) / len(last):.3f}"
    )
    print("  posterior, mean +- sd      guide           reference")
    for name, (mean, sd) in REFERENCE.items():
        draws = samples[name]
        print(f"    {name:<20} {draws.mean():6.2f} +- {draws.std():.2f}   {mean:6.2f} +- {sd:.2f}")
    plot_posterior(samples, output / "eight_schools.png")


# ---------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "quickstart", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few steps only, to see that everything runs")
    options = parser.parse_args(argv)
    settings = SHORT if options.short else Settings()
    options.output.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    if options.short:
        print("SHORT run: a few steps only, the numbers mean nothing")
    pyro.set_rng_seed(options.seed)
    learn_digits(settings, options.output)
    infer_eight_schools(settings, options.output)
    print(f"Total: {time.perf_counter() - began:.1f} s; pictures in {options.output}")


if __name__ == "__main__":
    main()
