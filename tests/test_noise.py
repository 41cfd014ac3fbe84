"""Layers that change the dimension: exact densities, scores that are bounds, noise that can be recovered."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CHANGES_DIMENSION, scatter
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from torch.distributions import Gamma, LogNormal, constraints
from torch.distributions.transforms import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    IndependentTransform,
    ReshapeTransform,
    identity_transform,
)

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj

F64 = torch.float64


def normal(*shape, dtype=F64, loc=0.0, scale=1.0):
    """Independent normals, all of the shape in one event."""
    loc, scale = (torch.full(shape, v, dtype=dtype) for v in (loc, scale))
    return dist.Normal(loc, scale).to_event(len(shape))


def coupling(dim, **kwargs):
    return pf.affine_coupling(dim, [8], activation=torch.nn.Tanh, **kwargs)


def colour(noise, seed=0):
    """Return whitened noise with a random mean and covariance."""
    whitening = noise.transforms[0]
    generator = torch.Generator().manual_seed(seed)
    k = whitening.input_dim
    rows = torch.randn(50, k, generator=generator, dtype=F64)
    rows = rows @ (torch.eye(k, dtype=F64) + 0.5 * torch.randn(k, k, generator=generator, dtype=F64))
    whitening.fit((rows + 0.3).to(whitening.mean.dtype))
    return noise


NOISES = {
    "distribution": lambda n, k: normal(k, loc=0.2, scale=0.7),
    "flow": lambda n, k: colour(pf.whitened_noise(k)).double(),
    "conditional": lambda n, k: scatter(
        pf.Flow(normal(k), [pf.conditional_diagonal(k, n, context_hidden_dims=[8])]), 0.25
    ).double(),
}


def growing(n, kind="distribution", seed=0, k=1):
    """A flow from n to n + k dimensions."""
    torch.manual_seed(seed)
    parts = [scatter(pf.svd_linear(n), 0.2)]
    parts += [pf.ConcatNoise(NOISES[kind](n, k), name="e")]
    parts += [scatter(coupling(n + k), 0.4), pf.permute(n + k), scatter(coupling(n + k), 0.4)]
    return pf.Flow(normal(n), pf.Chain(parts)).double()


# ---------------------------------------------------------------------- exactness


def mass_of_bins(density, dim, bins, nodes, width):
    """Integrate a density over each of ``bins**dim`` equal boxes of a cube, by Gauss and Legendre's rule in each."""
    at, weights = (torch.from_numpy(v) for v in numpy.polynomial.legendre.leggauss(nodes))
    step = 2 * width / bins
    axis = (-width + step * (torch.arange(bins, dtype=F64).unsqueeze(-1) + (at + 1) / 2)).flatten()
    values = torch.cat([density(torch.cartesian_prod(s, *[axis] * (dim - 1))) for s in axis.split(nodes)])
    values = values.reshape([bins, nodes] * dim)
    for _ in range(dim):
        values = torch.tensordot(values, weights * step / 2, ([1], [0])).movedim(0, -1)
    return values


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("n", [1, 2])
def test_the_density_integrates_to_one_and_matches_a_histogram(n, kind):
    stats = pytest.importorskip("scipy.stats")
    width, nodes, bins = 8.0, (12, 7)[n - 1], (32, 16)[n - 1]
    d = growing(n, kind)()
    with torch.no_grad():
        mass = mass_of_bins(lambda y: d.log_prob(y).exp(), n + 1, bins, nodes, width)
        samples = d.sample((1_000_000,))
    assert abs(mass.sum().item() - 1) <= 1e-4
    index = ((samples + width) / (2 * width) * bins).floor().long()
    inside = ((index >= 0) & (index < bins)).all(-1)
    assert (~inside).sum() <= 20
    flat = (index[inside] * bins ** torch.arange(n, -1, -1)).sum(-1)
    counts = torch.bincount(flat, minlength=bins ** (n + 1)).double()
    expected = mass.flatten() * 1_000_000
    large = expected >= 10
    seen = torch.cat([counts[large], (1_000_000 - counts[large].sum()).reshape(1)])
    wanted = torch.cat([expected[large], (1_000_000 - expected[large].sum()).reshape(1)])
    assert large.sum() > 40
    chi2 = ((seen - wanted) ** 2 / wanted).sum().item()
    assert stats.chi2.sf(chi2, len(seen) - 1) > 1e-3


@pytest.mark.parametrize("kind", NOISES)
def test_log_prob_equals_the_one_computed_by_hand(kind):
    flow = growing(3, kind, k=2)
    chain = flow.transforms
    head, injection, tail = chain[0], chain[1], pf.Chain(chain[2:])
    y = torch.randn(6, 5, dtype=F64)
    inner, ladj_tail = inv_and_ladj(tail, y)
    x, e = inner[:, :3], inner[:, 3:]
    noise = NOISES[kind](3, 2) if kind == "distribution" else injection.noise
    if kind == "conditional":
        density = noise.condition(x).log_prob(e)
    else:
        density = (noise if kind == "distribution" else noise()).log_prob(e)
    z, ladj_head = inv_and_ladj(head, x)
    expected = normal(3).log_prob(z) + ladj_head + density + ladj_tail
    for d in (
        flow(),
        dist.TransformedDistribution(normal(3), [chain]),
        dist.TransformedDistribution(normal(3), list(chain)),
        pf.FlowDistribution(normal(3), list(chain)),
        torch.distributions.TransformedDistribution(normal(3), [head, IndependentTransform(injection, 0), tail]),
        pf.FlowDistribution(normal(3), [ComposeTransform(list(chain))]),  # walked once
        dist.TransformedDistribution(normal(3), [pf.Chain([head, pf.Inverted(pf.Inverted(injection)), tail])]),
        flow().expand([2]),
    ):
        torch.testing.assert_close(d.log_prob(y.unsqueeze(1) if d.batch_shape else y).reshape(6, -1)[:, 0], expected)
        assert d.event_shape == (5,)
    sample, log_prob = flow().rsample_and_log_prob((4,))
    torch.testing.assert_close(log_prob, flow().log_prob(sample.detach().clone()))
    torch.testing.assert_close(flow().log_prob(sample), log_prob)
    torch.testing.assert_close(flow().log_prob(y, num_particles=7), expected)  # exact: nothing to tighten


@pytest.mark.parametrize("kind", NOISES)
def test_the_log_det_on_a_miss_is_rebuilt_from_y(kind):
    flow = growing(3, kind, k=2)
    chain = flow.transforms
    y = chain(torch.randn(6, 3, dtype=F64)).detach()
    x, ladj = inv_and_ladj(chain, y)
    for a, b in ((x, y), (x.clone(), y), (x.clone(), y.clone())):
        torch.testing.assert_close(chain.log_abs_det_jacobian(a, b), -ladj)
    cold = chain.with_cache(0)
    torch.testing.assert_close(cold.log_abs_det_jacobian(x, y), -ladj)


def test_noise_conditional_on_x_is_drawn_anew_for_each_row():
    torch.manual_seed(0)
    noise = scatter(
        pf.Flow(normal(2), [pf.conditional_diagonal(2, 3, context_hidden_dims=[8]), pf.permute(2)]), 1.0
    ).double()
    layer = pf.ConcatNoise(noise)
    assert layer.input_dim == 3  # known from the context
    x = torch.randn(3, dtype=F64).expand(20_000, 3)
    e = layer(x)[:, 3:]
    d = noise.condition(x[0])
    assert len(e.unique(dim=0)) == 20_000
    reference = d.sample((200_000,))
    torch.testing.assert_close(e.mean(0), reference.mean(0), atol=0.1, rtol=0.05)
    torch.testing.assert_close(e.std(0), reference.std(0), atol=0.0, rtol=0.05)
    # a foreign conditional layer would give the same noise to all rows of a batch, so it is refused
    foreign = pf.Flow(normal(2), [dist.transforms.conditional_affine_coupling(2, 3)]).double()
    with pytest.raises(ValueError, match="batch shape"):
        pf.ConcatNoise(foreign, input_dim=3)(x[:50])
    with pytest.raises(ValueError, match="give input_dim"):
        pf.ConcatNoise(foreign)


@pytest.mark.parametrize("pixelwise", [True, False])
@pytest.mark.parametrize("dim", [-1, -2, -3])
def test_any_dim(dim, pixelwise):
    """Noise for each pixel, or one event over all of them."""
    shape = (3, 4, 2)[dim + 3 :]
    event = (2, *shape[1:])
    noise = colour(pf.whitened_noise(2)).double() if pixelwise else normal(*event, loc=0.1, scale=1.3)
    layer = pf.ConcatNoise(noise, dim=dim, name="e")
    x = torch.randn(5, 6, *shape, dtype=F64)
    y, ladj = call_and_ladj(layer, x)
    assert y.shape == (5, 6, shape[0] + 2, *shape[1:]) == layer.forward_shape(x.shape)
    assert layer.inverse_shape(y.shape) == x.shape
    assert torch.equal(layer.inv(y.clone()), x)
    e = y.narrow(dim, shape[0], 2)
    expected = noise().log_prob(e.movedim(dim, -1)).reshape(5, 6, -1).sum(-1) if pixelwise else noise.log_prob(e)
    torch.testing.assert_close(ladj, -expected)
    base = normal(*shape)
    d = dist.TransformedDistribution(base, [layer])
    assert d.event_shape == y.shape[2:]
    torch.testing.assert_close(d.log_prob(y.clone()), base.log_prob(x) + expected)
    torch.testing.assert_close(pf.Chain([layer]).latents(y)["e"], e)
    context = scatter(pf.Flow(normal(2), [pf.conditional_shift(2, shape[0], context_hidden_dims=[4])])).double()
    layer = pf.ConcatNoise(context, dim=dim)
    y, ladj = call_and_ladj(layer, x)
    pixel = context.condition(x.movedim(dim, -1)).log_prob(y.narrow(dim, shape[0], 2).movedim(dim, -1))
    torch.testing.assert_close(ladj, -pixel.reshape(5, 6, -1).sum(-1))


@pytest.mark.parametrize("batch", [(), (5,), (2, 0, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", NOISES)
def test_any_batch(kind, batch):
    layer = pf.ConcatNoise(NOISES[kind](3, 2))
    x = torch.randn(*batch, 3, dtype=F64)
    y, ladj = call_and_ladj(layer, x)
    assert y.shape == (*batch, 5) == layer.forward_shape(x.shape)
    back, inverse = inv_and_ladj(layer, y.clone())
    assert torch.equal(back, x)
    assert ladj.shape == inverse.shape == batch
    torch.testing.assert_close(inverse, -ladj)


# ---------------------------------------------------------------------- drawing, and the memo


def test_each_pass_draws_and_nothing_answers_from_memory():
    layer = pf.ConcatNoise(normal(2))
    x = torch.randn(5, 3, dtype=F64)
    assert not torch.equal(layer(x), layer(x))
    y = layer(x).detach()
    back = layer.inv(y)
    assert layer(back) is not y  # a density must not depend on whether it was warm
    assert not torch.equal(layer(back), y)
    assert not torch.equal(call_and_ladj(layer, layer.inv(y))[0], y)
    for structure in (pf.Chain([pf.shift(3).double(), layer]), pf.Inverted(pf.Inverted(layer))):
        y = structure(x).detach()
        assert not torch.equal(structure(structure.inv(y)), y)
    # the inverse only drops noise, so the memo and a new evaluation agree
    y = layer(x)
    assert layer.inv(y) is x
    torch.testing.assert_close(layer.log_abs_det_jacobian(x, y), -normal(2).log_prob(y[:, 3:]))


def test_gradients_reach_noise_parameters_both_ways():
    torch.manual_seed(0)
    noise = pf.Flow(normal(2), [pf.svd_linear(2)], trainable_base=True).double()
    layer = pf.ConcatNoise(noise)
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    (layer(x) ** 2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    y = torch.randn(2, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, *_: inv_and_ladj(layer, v), (y, *layer.parameters()))


def test_it_is_a_module_that_copies():
    layer = pf.Chain([pf.inject_noise(3, 2, name="e")])
    colour(layer[0].noise)
    names = set(layer.state_dict())
    assert "0.noise.base.base_distribution.loc" in names
    assert "0.noise.transforms.0.colouring" in names
    y = layer(torch.randn(4, 3))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(inv_and_ladj(twin, y.clone())[1], inv_and_ladj(layer, y.clone())[1])
    other = pf.Chain([pf.inject_noise(3, 2)])
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(inv_and_ladj(other, y.clone())[1], inv_and_ladj(layer, y.clone())[1])
    assert layer.double()(torch.randn(4, 3, dtype=F64)).dtype == F64
    assert layer.to("meta")(torch.empty(4, 3, dtype=F64, device="meta")).shape == (4, 5)


def test_torch_func_and_compile():
    layer = pf.Chain([pf.ConcatNoise(colour(pf.whitened_noise(2)).double()), coupling(5).double()])
    y = torch.randn(4, 5, dtype=F64)
    expected = inv_and_ladj(layer, y.clone())
    for actual in (
        torch.vmap(lambda v: inv_and_ladj(layer, v))(y),
        torch.compile(lambda v: inv_and_ladj(layer, v), fullgraph=True, backend="eager")(y),
    ):
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------- in Pyro


def test_in_plates_and_conditional_distributions():
    chain = growing(2, k=2).transforms
    base = normal(2)

    def model():
        with pyro.plate("rows", 5):
            return pyro.sample("y", dist.TransformedDistribution(base, [chain]))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    y = trace.nodes["y"]["value"]
    assert y.shape == (5, 4)
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], pf.FlowDistribution(base, [chain]).log_prob(y.clone()))

    parts = [
        scatter(pf.conditional_diagonal(2, 3, context_hidden_dims=[8]), 0.3).double(),
        pf.ConcatNoise(normal(2)),
        coupling(4).double(),
    ]
    context = torch.randn(7, 3, dtype=F64)
    for d in (
        dist.ConditionalTransformedDistribution(base, parts).condition(context),
        pf.Flow(base, parts)(context),
    ):
        assert d.batch_shape == (7,)
        y = d.rsample((5,))
        assert y.shape == (5, 7, 4)
        assert len(y.reshape(-1, 4)[:, 2:].unique(dim=0)) == 35
        log_prob = d.log_prob(y.detach().clone())
        for i in range(7):
            alone = dist.TransformedDistribution(base, [parts[0].condition(context[i]), *parts[1:]])
            torch.testing.assert_close(alone.log_prob(y[:, i].detach()), log_prob[:, i])


def test_as_a_guide():
    """A guide that grows from one dimension to two finds a posterior known in closed form."""
    mean = torch.tensor([1.0, -2.0])
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]])

    def model():
        pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    chain = pf.Chain([pf.inject_noise(1, 1), pf.svd_linear(2)])

    def guide():
        pyro.module("guide", chain)
        pyro.sample("z", dist.TransformedDistribution(normal(1, dtype=torch.float32), [chain]))

    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    first = svi.evaluate_loss()
    for _ in range(400):
        svi.step()
    last = sum(svi.evaluate_loss() for _ in range(20)) / 20
    assert first > 1
    assert abs(last) < 0.02  # the divergence from a normalised model


# ---------------------------------------------------------------------- Slice: two bounds of a known Gaussian

COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.5]], dtype=F64)
MARGINAL = dist.Normal(torch.zeros(1, dtype=F64), COVARIANCE[0, 0].sqrt()).to_event(1)
#: e given y is normal with mean 0.8 y and this variance
RESIDUAL = (COVARIANCE[1, 1] - COVARIANCE[0, 1] ** 2 / COVARIANCE[0, 0]).item()
GUESS = 0.9  # scale of the noise that stands in for it, with mean zero


def gaussian():
    """The layer that gives standard normal noise the covariance."""
    return pf.SVDLinear.from_matrix(torch.linalg.cholesky(COVARIANCE), bias=False)


def expected_gaps():
    """Minus KL(guess | posterior) and plus KL(posterior | guess), averaged over y."""
    shift = COVARIANCE[0, 1].item() ** 2 / COVARIANCE[0, 0].item()  # mean square of the posterior's mean
    ratio = GUESS**2 / RESIDUAL
    below = 0.5 * (ratio + shift / RESIDUAL - 1 - torch.tensor(ratio).log().item())
    above = 0.5 * (1 / ratio + shift / GUESS**2 - 1 + torch.tensor(ratio).log().item())
    return -below, above


def dropping(score, wrap):
    guess = normal(1, scale=GUESS)
    base = normal(2)
    slicing = pf.Slice(guess, score=score)
    if wrap == "list":
        return dist.TransformedDistribution(base, [gaussian(), slicing])
    if wrap == "chain":
        return pf.FlowDistribution(base, [pf.Chain([gaussian(), slicing])])
    if wrap == "flow":
        return pf.Flow(base, [gaussian(), slicing])()
    if wrap == "no cache":
        return pf.FlowDistribution(base, [pf.Chain([gaussian(), slicing.with_cache(0)]).with_cache(0)])
    if wrap == "behind":
        parts = [gaussian(), slicing, AffineTransform(0.0, 1.0), pf.shift(1).double()]
        return pf.FlowDistribution(base, [pf.Chain(parts)])
    if wrap == "compose":
        return torch.distributions.TransformedDistribution(base, [ComposeTransform([gaussian(), slicing])])
    if wrap == "inv":
        return dist.TransformedDistribution(base, [gaussian(), pf.ConcatNoise(guess).inv])
    assert wrap == "inverted"
    return dist.TransformedDistribution(base, [pf.Chain([gaussian(), pf.Inverted(pf.ConcatNoise(guess))])])


def gap(log_prob, y):
    """Mean of log_prob minus the exact value, and its standard error."""
    difference = (log_prob - MARGINAL.log_prob(y)).detach()
    return difference.mean().item(), (difference.std() / len(difference) ** 0.5).item()


@pytest.mark.parametrize("wrap", ["list", "chain", "flow", "no cache", "behind", "compose", "inv", "inverted"])
def test_data_score_is_below_whatever_was_sampled_before(wrap):
    d = dropping("data", wrap)
    below, _ = expected_gaps()
    assert below < -0.3
    y = d.rsample((20_000,))
    assert y.shape == (20_000, 1)
    scores = {"own sample": d.log_prob(y), "again": d.log_prob(y), "clone": d.log_prob(y.clone())}
    with torch.no_grad():
        scores["other mode"] = d.log_prob(y)
    scores["deep copy"] = copy.deepcopy(d).log_prob(y.detach())
    if isinstance(d, pf.FlowDistribution):
        y2, scores["fused"] = d.rsample_and_log_prob((20_000,))
    for name, log_prob in scores.items():
        mean, error = gap(log_prob, y2 if name == "fused" else y)
        assert mean < -3 * error, name
        assert abs(mean - below) < 4 * error, name
    assert not torch.equal(scores["own sample"], scores["again"])  # a fresh draw each time


@pytest.mark.parametrize("wrap", ["list", "chain", "flow", "no cache"])
def test_sample_score_is_above(wrap):
    d = dropping("sample", wrap)
    _, above = expected_gaps()
    assert above > 0.2
    y = d.rsample((20_000,))
    log_prob = d.log_prob(y)
    mean, error = gap(log_prob, y)
    assert mean > 3 * error
    assert abs(mean - above) < 4 * error
    if isinstance(d, pf.FlowDistribution):
        y, log_prob = d.rsample_and_log_prob((20_000,))
        mean, error = gap(log_prob, y)
        assert abs(mean - above) < 4 * error


@pytest.mark.parametrize("wrap", ["list", "chain", "flow", "no cache", "behind"])
def test_sample_score_raises_on_anything_but_its_own_sample(wrap):
    d = dropping("sample", wrap)
    y = d.rsample((5,))
    log_prob = d.log_prob(y)
    for other in (y.clone(), y.detach(), y[:3], torch.zeros(5, 1, dtype=F64), y + 0):
        with pytest.raises(ValueError, match="only the last point"):
            d.log_prob(other)
    if wrap != "list":
        torch.testing.assert_close(d.log_prob(y), log_prob)  # its own sample can be scored again
        with pytest.raises(ValueError, match="only the last point"), torch.no_grad():
            d.log_prob(y)
    y = d.rsample((5,))
    d.rsample((5,))
    with pytest.raises(ValueError, match="only the last point"):
        d.log_prob(y)  # no longer the last one
    y = d.rsample((5,))
    with pytest.raises(ValueError, match="only the last point"):
        copy.deepcopy(d).log_prob(y)
    if isinstance(d, pf.FlowDistribution):
        with pytest.raises(ValueError, match="num_particles must be 1"):
            d.log_prob(d.rsample((5,)), num_particles=3)


def test_known_limit_a_sample_score_does_not_see_the_base_or_the_neighbours_in_a_list_change():
    """Pinned, not promised: a transform only knows its own parameters. A Chain knows those of all its parts."""
    guess = normal(1, scale=GUESS)
    for chained in (False, True):
        parts = [gaussian(), pf.Slice(guess, score="sample")]
        d = pf.FlowDistribution(normal(2), [pf.Chain(parts)] if chained else parts)
        y = d.rsample((2_000,))
        moved = pf.FlowDistribution(normal(2, loc=1.0), d.transforms)
        mean, error = gap(moved.log_prob(y), y)  # y is not a sample of this one: no bound, and no error either
        assert mean < -3 * error
        y = d.rsample((5,))
        with torch.no_grad():
            parts[0].log_scale.add_(0.1)
        if chained:
            with pytest.raises(ValueError, match="only the last point"):
                d.log_prob(y)
        else:
            d.log_prob(y)


def test_particles_tighten_the_bound():
    d = dropping("data", "flow")
    y = MARGINAL.sample((10_000,))
    gaps = [gap(d.log_prob(y, num_particles=k), y) for k in (1, 10, 100)]
    assert abs(gaps[0][0] - expected_gaps()[0]) < 4 * gaps[0][1]
    for (low, low_error), (high, high_error) in itertools.pairwise(gaps):
        assert low + 3 * (low_error + high_error) < high
    assert all(mean < 3 * error for mean, error in gaps)
    assert gaps[2][0] > -0.02
    # compare with the log-mean-exp of single draws
    torch.manual_seed(3)
    together = d.log_prob(y[:4], num_particles=500_00)
    alone = torch.stack([d.log_prob(y[:4].expand(50_000, 4, 1))]).squeeze(0).logsumexp(0) - torch.tensor(50_000.0).log()
    torch.testing.assert_close(together, alone, atol=0.05, rtol=0)
    for bad in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            d.log_prob(y, num_particles=bad)
    with pytest.raises(TypeError, match="must be an int"):
        d.log_prob(y, num_particles=2.0)


def test_particles_and_batch_dimensions_do_not_mix():
    flow = pf.Flow(normal(3), [pf.conditional_diagonal(3, 2), pf.Slice(normal(2))]).double()
    d = flow(torch.randn(4, 2, dtype=F64))
    assert d.log_prob(torch.randn(1, dtype=F64), num_particles=5).shape == (4,)
    assert d.log_prob(torch.randn(6, 4, 1, dtype=F64), num_particles=5).shape == (6, 4)


def test_the_posterior_as_noise_makes_both_scores_exact():
    """If r(e | y) is the true conditional, a single draw has no gap, in either direction."""
    slope = COVARIANCE[0, 1] / COVARIANCE[0, 0]
    for score in ("data", "sample"):
        conditional = pf.conditional_shift(1, 1, context_hidden_dims=()).double()
        with torch.no_grad():
            conditional.hypernet[-1].weight.fill_(slope)
        posterior = pf.Flow(normal(1, scale=RESIDUAL**0.5), [conditional])
        d = pf.FlowDistribution(normal(2), [gaussian(), pf.Slice(posterior, score=score)])
        y = d.rsample((50,))
        torch.testing.assert_close(d.log_prob(y), MARGINAL.log_prob(y))


def test_a_guide_scored_by_its_samples_stays_below_log_z():
    """An augmented guide: inject noise, transform, drop. Its ELBO must not exceed log Z, whatever r(e | y) is."""
    x = torch.tensor([0.7, -0.4], dtype=F64)

    def model():
        z = pyro.sample("z", normal(2))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    log_z = dist.Normal(torch.zeros(2, dtype=F64), 1.25**0.5).to_event(1).log_prob(x).item()
    exceeded = {}
    for score in ("sample", "data"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        guess = normal(1, scale=0.2)  # far too narrow
        parts = [pf.ConcatNoise(normal(1)), pf.svd_linear(3), coupling(3), pf.Slice(guess, score=score)]
        chain = scatter(pf.Chain(parts).double(), 0.3)

        def guide(chain=chain):
            pyro.module("guide", chain)
            pyro.sample("z", dist.TransformedDistribution(normal(2), [chain]))

        def elbo(particles, guide=guide):
            estimates = []
            for _ in range(10):
                loss = Trace_ELBO(particles, vectorize_particles=True, max_plate_nesting=0)
                estimates.append(-loss.loss(model, guide))
            estimates = torch.tensor(estimates)
            return estimates.mean().item(), (estimates.std() / 10**0.5).item()

        results = [elbo(500)]
        elbo_loss = Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=0)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo_loss)
        for _ in range(2):
            for _ in range(100):
                svi.step()
            results.append(elbo(500))
        exceeded[score] = [mean > log_z + 3 * error for mean, error in results]
        if score == "sample":
            assert results[-1][0] > results[0][0] + 0.1  # it learns
            assert results[-1][0] > log_z - 0.2
    assert not any(exceeded["sample"])
    assert any(exceeded["data"])  # with the wrong bound, a guide would have looked better than perfect


def test_an_augmented_flow_inside_pyros_own_guide():
    """Noise in, noise out: the dimension is the model's again, so ``AutoNormalizingFlow`` takes it."""

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.ones(2), torch.tensor([[1.0, 0.6], [0.6, 0.8]])))

    def augmented(dim):
        guess = pf.Flow(normal(1, dtype=torch.float32), [pf.conditional_shift(1, dim, context_hidden_dims=[8])])
        return pf.Chain([pf.inject_noise(dim, 1), pf.svd_linear(dim + 1), pf.Slice(guess, score="sample")])

    guide = AutoNormalizingFlow(model, augmented)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(16, vectorize_particles=True))
    losses = [svi.step() for _ in range(150)]
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
    assert sum(losses[-50:]) / 50 > -0.05  # a bound: not below the truth, which is 0
    assert guide().keys() == {"z"}


def test_the_log_det_of_a_slice_is_that_of_what_was_dropped():
    layer = pf.Slice(normal(2, scale=0.5), input_dim=3)
    x = torch.randn(4, 5, dtype=F64)
    y, ladj = call_and_ladj(layer, x)
    assert torch.equal(y, x[:, :3])
    expected = normal(2, scale=0.5).log_prob(x[:, 3:])
    for term in (ladj, layer.log_abs_det_jacobian(x, y), layer.log_abs_det_jacobian(x.clone(), y.clone())):
        torch.testing.assert_close(term, expected)
    back, inverse = inv_and_ladj(layer, y)
    assert torch.equal(back[:, :3], y)
    assert not torch.equal(back[:, 3:], x[:, 3:])
    torch.testing.assert_close(inverse, -normal(2, scale=0.5).log_prob(back[:, 3:]))
    chain = pf.Chain([coupling(5).double(), layer])
    torch.testing.assert_close(  # on a miss: rebuilt from x
        chain.log_abs_det_jacobian(x.clone(), chain(x).clone()), call_and_ladj(chain, x)[1]
    )


class Estimated(pf.Shift):
    """A stand-in for a layer whose log-det is an estimate."""

    exact = False


def test_what_is_exact_says_so():
    assert CHANGES_DIMENSION == {"ConcatNoise": "exact", "Slice": "bound"}
    inject, drop = pf.ConcatNoise(normal(1)), pf.Slice(normal(1))
    assert inject.exact
    assert not drop.exact
    assert not inject.bijective
    assert not drop.bijective
    assert not pf.Inverted(inject).exact
    assert pf.Inverted(drop).exact
    assert pf.Chain([inject, pf.shift(4)]).exact
    assert not pf.Chain([inject, drop]).exact
    assert pf.Chain([pf.Inverted(drop)]).exact
    assert not pf.Chain([inject.inv]).exact
    estimated = pf.ConcatNoise(pf.Flow(normal(1), [Estimated(1)]))
    assert not estimated.exact
    assert not pf.Chain([estimated]).exact
    for layer in (inject, drop, pf.Inverted(drop)):
        assert layer.domain == layer.codomain == constraints.real_vector
        with pytest.raises(ValueError, match="changes the dimension"):
            pf.Chain([layer], recompute=True)
    assert "Slice" in type(inject).__doc__


# ---------------------------------------------------------------------- limits and bad input


def test_known_limit_torchs_compose_draws_new_noise_for_the_log_det():
    """Pinned, not promised: torch re-runs the parts, so its log-det is of other noise. A list or a Chain is right."""
    flow = growing(2, k=2)
    chain = flow.transforms
    y = flow().sample((200,))
    right = flow().log_prob(y)
    for transforms in ([chain], list(chain), chain):
        transforms = [transforms] if isinstance(transforms, pf.Chain) else transforms
        torch.testing.assert_close(dist.TransformedDistribution(normal(2), transforms).log_prob(y), right)
    wrong = dist.TransformedDistribution(normal(2), [ComposeTransform(list(chain))]).log_prob(y)
    assert (wrong - right).abs().mean() > 0.3


def test_noise_that_cannot_be_injected_is_refused():
    value = [
        (_lognormal, "real vectors"),
        (lambda: pf.ConcatNoise(torch.distributions.Independent(Gamma(torch.ones(2), 1.0), 1)), "real vectors"),
        (lambda: pf.ConcatNoise(pf.Flow(normal(2), [pf.Sigmoid()])), "real vectors"),
        (lambda: pf.ConcatNoise(dist.Uniform(torch.zeros(2), 1.0).to_event(1)), "real vectors"),
        (
            lambda: pf.ConcatNoise(
                torch.distributions.MixtureSameFamily(
                    torch.distributions.Categorical(torch.ones(2)),
                    torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2, 2), 1.0), 1),
                )
            ),
            "rsample",
        ),
        (lambda: pf.ConcatNoise(dist.Normal(torch.zeros(2), 1.0)), "to_event"),
        (lambda: pf.ConcatNoise(dist.Normal(0.0, 1.0)), "event dimension"),
        (lambda: pf.ConcatNoise(normal(3, 2)), "1 event dimension"),
        (lambda: pf.ConcatNoise(normal(2, 2), dim=-3), "1 or 3 event dimension"),
        (lambda: pf.ConcatNoise(normal(2), name="base"), "name must be"),
        (lambda: pf.ConcatNoise(normal(2), name=""), "name must be"),
        (lambda: pf.ConcatNoise(normal(2), input_dim=0), "input_dim"),
        (lambda: pf.Slice(normal(2), score="both"), "score must be"),
        (lambda: pf.whitened_noise(0), "noise_dim"),
        (lambda: pf.inject_noise(2, 0), "noise_dim"),
        (lambda: pf.ConcatNoise(pf.Flow(normal(2), [pf.Slice(normal(1))])), "holds a Slice"),
        (lambda: pf.Slice(pf.Flow(normal(2), [pf.ConcatNoise(normal(1)).inv])), "holds a Slice"),
        (lambda: pf.Chain([pf.Slice(normal(1)), pf.Slice(normal(1), score="sample")]), "bound nothing"),
        (lambda: pf.Conditional(pf.ConcatNoise(normal(1)), 2), "no parameters of its own"),
    ]
    for make, message in value:
        with pytest.raises(ValueError, match=message):
            make()
    mean = torch.zeros(2, requires_grad=True)
    for noise, message in [
        (torch.zeros(2), "Flow or a distribution"),
        (pf.conditional_shift(2, 3), "Flow or a distribution"),
        (dist.Normal(mean, 1.0).to_event(1), "trainable_base"),
        (dist.TransformedDistribution(dist.Normal(mean, 1.0).to_event(1), []), "trainable_base"),
        (normal(2).mask(False), "cannot rebuild"),
    ]:
        with pytest.raises(TypeError, match=message):
            pf.ConcatNoise(noise)


def _lognormal():
    return pf.ConcatNoise(torch.distributions.Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1))


def test_wrong_sizes_and_dtypes_are_named():
    layer = pf.ConcatNoise(normal(2), input_dim=3)
    for call in (layer, lambda x: layer.forward_shape(x.shape), lambda x: call_and_ladj(layer, x)):
        with pytest.raises(ValueError, match="3 elements along dim -1, but got 4"):
            call(torch.zeros(5, 4, dtype=F64))
    for call in (layer.inv, lambda y: layer.inverse_shape(y.shape), lambda y: inv_and_ladj(layer, y)):
        with pytest.raises(ValueError, match="3 elements along dim -1, but got 4 and 2 of noise"):
            call(torch.zeros(5, 6, dtype=F64))
    for call in (pf.ConcatNoise(normal(2)).inv, pf.Slice(normal(2))):
        with pytest.raises(ValueError, match=r"input of a Slice.* must have more than that, but got 2"):
            call(torch.zeros(5, 2, dtype=F64))
    with pytest.raises(ValueError, match=r"base|elements"):
        dist.TransformedDistribution(normal(4), [layer])
    with pytest.raises(ValueError, match="elements"):
        pf.Flow(normal(4), [layer])
    with pytest.raises(ValueError, match=r"part 1 \(Shift\) does not fit part 0 \(ConcatNoise\).*4 elements.*5"):
        pf.Chain([layer, pf.shift(4)])
    for call in (layer, layer.inv):
        for dtype in (torch.float32, torch.long):
            with pytest.raises(TypeError, match=r"same dtype|floating point"):
                call(torch.zeros(5, 3 if call is layer else 5, dtype=dtype))
        with pytest.raises(TypeError, match="floating point tensor, but got list"):
            call([0.0] * 5)
    with pytest.raises(ValueError, match="noise's event has 4 elements along dim -2"):
        pf.ConcatNoise(normal(2, 4, 4), dim=-3)(torch.zeros(1, 3, 4, dtype=F64))
    chain = pf.Chain([layer, pf.Slice(normal(1))])
    x = torch.zeros(3, dtype=F64)
    y = chain(x)
    with pytest.raises(ValueError, match="both injects and drops"):
        chain.log_abs_det_jacobian(x, y.clone())


# ---------------------------------------------------------------------- latents


def deep():
    """Noise in nested chains, inverted slices, torch's wrappers and beside foreign transforms."""
    torch.manual_seed(0)
    chain = pf.Chain(
        [
            pf.svd_linear(2),
            pf.ConcatNoise(normal(2), name="a"),
            AffineTransform(0.3, 2.0),
            pf.Chain([coupling(4), pf.Inverted(pf.Slice(normal(1), name="b")), pf.Chain([pf.baird(5)])]),
            ComposeTransform([pf.permute(5), pf.Slice(colour(pf.whitened_noise(3)), name="c").inv]),
            IndependentTransform(pf.baird(8), 1),
            pf.Inverted(pf.Chain([pf.shift(10), pf.Slice(normal(2), name="d"), pf.diagonal(8)])),
            ReshapeTransform((10,), (5, 2)),
            IndependentTransform(pf.ConcatNoise(normal(1), name="e"), 1),
        ]
    ).double()
    return scatter(chain, 0.3)


def test_latents_round_trip():
    chain = deep()
    y = torch.randn(7, 5, 3, dtype=F64)
    latents = chain.latents(y)
    assert list(latents) == ["base", "a", "b", "c", "d", "e"]
    assert {k: tuple(v.shape[1:]) for k, v in latents.items()} == {
        "base": (2,), "a": (2,), "b": (1,), "c": (3,), "d": (2,), "e": (5, 1)
    }  # fmt: skip
    assert sum(v.numel() for v in latents.values()) == y.numel()
    assert (chain.from_latents(latents) - y).abs().max() <= 1e-10
    given = {name: torch.randn_like(value) for name, value in latents.items()}
    back = chain.latents(chain.from_latents(given))
    for name, value in given.items():
        assert (back[name] - value).abs().max() <= 1e-10
    # the latents determine the density: those of base and noise, and the volume
    torch.testing.assert_close(latents["base"], chain.inv(y))


def test_latents_do_not_depend_on_calls_between():
    chain = deep()
    y = chain(torch.randn(7, 2, dtype=F64))
    first = chain.latents(y)
    chain(torch.randn(3, 2, dtype=F64))
    inv_and_ladj(chain, y)
    chain.inv(y.clone())
    with torch.no_grad():
        chain(torch.randn(7, 2, dtype=F64))
    second = chain.latents(y)
    for name, value in first.items():
        assert torch.equal(value, second[name])
    assert torch.equal(chain.from_latents(first), chain.from_latents(second))


def test_latents_are_the_noise_as_injected():
    chain = pf.Chain([pf.inject_noise(2, 3, name="e"), coupling(5)]).double()
    scatter(chain, 0.5)
    colour(chain[0].noise)
    d = pf.FlowDistribution(normal(2), [chain])
    with torch.no_grad():
        e = chain.latents(d.sample((50_000,)))["e"]
        white = chain[0].noise.transforms.inv(e)
    covariance = chain[0].noise.transforms[0].matrix @ chain[0].noise.transforms[0].matrix.T
    assert (covariance - torch.eye(3)).abs().max() > 0.2
    torch.testing.assert_close(torch.cov(e.T), covariance, atol=0.05, rtol=0.05)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(3, dtype=F64), atol=0.03, rtol=0)


def test_side_inputs():
    """Any part may be supplied: the rest is drawn, and batch dimensions broadcast."""
    chain = pf.Chain([pf.ConcatNoise(normal(2), name="a"), coupling(4), pf.ConcatNoise(normal(1), name="b")]).double()
    scatter(chain, 0.3)
    base, a = torch.randn(9, 2, dtype=F64), torch.tensor([0.5, -1.0], dtype=F64)
    y = chain.from_latents({"base": base, "a": a})
    latents = chain.latents(y)
    torch.testing.assert_close(latents["a"], a.expand(9, 2))
    torch.testing.assert_close(latents["base"], base)
    assert len(latents["b"].unique()) == 9
    assert not torch.equal(chain.from_latents({"base": base, "a": a}), y)
    many = chain.from_latents({"base": base[0], "a": a, "b": torch.randn(4, 1, dtype=F64)})
    assert many.shape == (4, 5)
    assert (many[:, 0] == many[0, 0]).all()


def test_latents_refuse_what_they_cannot_restore():
    named = pf.ConcatNoise(normal(2), name="a")
    y = torch.zeros(4, 9, dtype=F64)
    for chain, message in [
        (pf.Chain([pf.ConcatNoise(normal(1))]), "needs a name"),
        (pf.Chain([named, pf.ConcatNoise(normal(1), name="a")]), "'a' appears twice"),
        (pf.Chain([named, pf.Slice(normal(1), name="b")]), "holds a Slice"),
        (pf.Chain([named, pf.ConcatNoise(normal(1), name="b").inv]), "holds a Slice"),
    ]:
        with pytest.raises(ValueError, match=message):
            chain.latents(y)
        with pytest.raises(ValueError, match=message):
            chain.from_latents({"base": y})
    chain = pf.Chain([named])
    for latents, message in [
        ({"a": torch.zeros(2, dtype=F64)}, r"latents\['base'\]"),
        ({"base": y, "b": y}, "keys .*, but got b"),
        ({"base": y, "a": torch.zeros(3, dtype=F64)}, r"must have the shape \(2,\), but got a tensor of shape \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            chain.from_latents(latents)
    for e, error, message in [
        (torch.zeros(3, 2, dtype=F64), ValueError, r"noise and x must broadcast, but got \(3,\) and \(4,\)"),
        (torch.zeros(4, 2), TypeError, "tensor of torch.float64, as x is, but got torch.float32"),
        ([0.0, 0.0], TypeError, "but got list"),
    ]:
        with pytest.raises(error, match=message):
            chain.from_latents({"base": y, "a": e})
    with pytest.raises(TypeError, match="floating point tensor, but got NoneType"):
        chain.from_latents({"base": None})
    assert list(pf.Chain([pf.shift(9).double()]).latents(y)) == ["base"]


# ---------------------------------------------------------------------- multi-scale flows


def vector_layers(dim):
    return pf.Chain([pf.svd_linear(dim), coupling(dim)])


def image_layers(dim):
    return pf.Chain([pf.orthogonal(dim, dim=-3), pf.affine_coupling(dim, [4], dim=-3)])


def multi_scale_vectors():
    """8 = 1 + 1 + 2 + 4: each scale doubles the dimension by noise."""
    return pf.multi_scale(8, num_scales=4, layers=vector_layers)


def multi_scale_images():
    """(8, 1, 1) to (1, 4, 4): half of the channels are factored out."""
    return pf.multi_scale(1, num_scales=2, layers=image_layers, dim=-3)


def multi_scale_by_hand():
    """2 x 1 x 1 to 1 x 4 x 4, with noise of two kinds; read from noise to image."""
    parts = [pf.orthogonal(2, dim=-3)]
    for i, size in enumerate((2, 2)):
        parts += [pf.inject_noise(size, size, dim=-3, name=f"scale{i}")]
        parts += [pf.affine_coupling(2 * size, [4], dim=-3), pf.orthogonal(2 * size, dim=-3)]
        parts += [pf.PixelShuffle(2)]
        if i == 0:
            parts += [pf.ConcatNoise(normal(1, 2, 2, dtype=torch.float32), dim=-3, name="grow")]
    return pf.Chain(parts)


@pytest.mark.parametrize(
    ("make", "base", "event"),
    [
        (multi_scale_vectors, (1,), (8,)),
        (multi_scale_images, (8, 1, 1), (1, 4, 4)),
        (multi_scale_by_hand, (2, 1, 1), (1, 4, 4)),
    ],
    ids=["vectors", "images", "by hand"],
)
def test_multi_scale(make, base, event):
    torch.manual_seed(0)
    chain = make().double()
    scatter(chain, 0.3)
    for layer in chain:
        if isinstance(layer, pf.ConcatNoise) and len(layer.noise.transforms):
            colour(layer.noise)
    d = pf.FlowDistribution(normal(*base), [chain])
    assert d.event_shape == event
    y = torch.randn(6, *event, dtype=F64)
    latents = chain.latents(y)
    assert sum(v[0].numel() for v in latents.values()) == y[0].numel()
    assert (chain.from_latents(latents) - y).abs().max() <= 1e-10
    # the map from all latents to y is a bijection: its Jacobian and the latents' densities give the density of y
    sizes = [v[0].numel() for v in latents.values()]
    shapes = [v.shape[1:] for v in latents.values()]

    def from_flat(flat):
        parts = [p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        return chain.from_latents(dict(zip(latents, parts, strict=True))).reshape(-1)

    layers = {layer.name: layer for layer in chain if isinstance(layer, pf.ConcatNoise)}
    for i in range(2):
        flat = torch.cat([v[i].reshape(-1) for v in latents.values()])
        expected = normal(*base).log_prob(latents["base"][i])
        expected = expected - torch.linalg.slogdet(torch.func.jacrev(from_flat)(flat))[1]
        for name, layer in layers.items():
            e = latents[name][i]
            expected = expected + layer.noise().log_prob(e.movedim(0, -1) if layer.pixelwise else e).sum()
        torch.testing.assert_close(d.log_prob(y)[i], expected)
    loss = -d.log_prob(y).mean()
    loss.backward()
    assert all(p.grad is not None for p in chain.parameters())


def first_elements(layer, size, of):
    """Let a layer act on the first elements of a vector only, by torch's own means."""
    if size == of:
        return layer
    rest = IndependentTransform(identity_transform, 1)
    return CatTransform([layer, rest], dim=-1, lengths=[size, of - size])


def test_multi_scale_vectors_equal_a_flow_of_fixed_dimension():
    """With standard normal noise, factoring out is the same as layers that leave the other elements alone."""
    chain = scatter(pf.multi_scale(12, num_scales=3, layers=vector_layers).double(), 0.3)
    assert chain.inverse_shape(torch.Size([12])) == (3,)
    assert [layer.name for layer in chain if isinstance(layer, pf.ConcatNoise)] == ["scale1", "scale2"]
    stages = [pf.Chain(list(chain)[i : i + 2]) for i in (0, 3, 6)]
    fixed = [first_elements(stage, size, 12) for stage, size in zip(stages, (3, 6, 12), strict=True)]
    reference = torch.distributions.TransformedDistribution(normal(12), fixed)
    y = torch.randn(20, 12, dtype=F64)
    for d in (pf.Flow(normal(3), chain).double()(), dist.TransformedDistribution(normal(3), [chain])):
        torch.testing.assert_close(d.log_prob(y), reference.log_prob(y))
    latents = chain.latents(y)
    z = y
    for transform in reversed(fixed):
        z = transform.inv(z)
    torch.testing.assert_close(torch.cat([latents[k] for k in ("base", "scale1", "scale2")], -1), z)


def test_multi_scale_images_equal_a_flow_of_fixed_dimension():
    """The same for images, written out from image to noise: squeeze, undo the layers, put half the channels aside."""
    chain = scatter(pf.multi_scale(2, num_scales=3, layers=image_layers, dim=-3).double(), 0.3)
    assert chain.inverse_shape(torch.Size((2, 16, 8))) == (32, 2, 1)
    layers = [part for part in chain if not isinstance(part, (pf.ConcatNoise, pf.PixelShuffle))]
    y = torch.randn(3, 2, 16, 8, dtype=F64)
    x, expected = y, torch.zeros(3, dtype=F64)
    for width in (8, 16, 32):
        x = torch.nn.functional.pixel_unshuffle(x, 2)
        coupled, mixed = layers.pop(), layers.pop()
        for layer in (coupled, mixed):
            x, ladj = inv_and_ladj(layer, x)
            expected = expected + ladj
        assert x.shape[1] == width
        if width < 32:
            x, e = x.chunk(2, 1)
            expected = expected + dist.Normal(0.0, 1.0).log_prob(e).sum((1, 2, 3))
    expected = expected + dist.Normal(0.0, 1.0).log_prob(x).sum((1, 2, 3))
    d = pf.FlowDistribution(normal(32, 2, 1), [chain])
    torch.testing.assert_close(d.log_prob(y), expected)
    assert d.sample((5,)).shape == (5, 2, 16, 8)


@pytest.mark.parametrize("kind", NOISES)
def test_multi_scale_integrates_to_one(kind):
    torch.manual_seed(0)
    chain = pf.multi_scale(2, layers=vector_layers, noise=lambda k: NOISES[kind](k, k)).double()
    d = pf.FlowDistribution(normal(1), [scatter(chain, 0.3)])
    with torch.no_grad():
        mass = mass_of_bins(lambda y: d.log_prob(y).exp(), 2, 32, 12, 8.0)
        samples = d.sample((200_000,))
    assert abs(mass.sum().item() - 1) <= 1e-4
    inside = (samples.abs() < 1).all(-1).double().mean().item()  # 4 x 4 of the 32 x 32 bins on [-8, 8]
    expected = mass[14:18, 14:18].sum().item()
    assert abs(inside - expected) < 4 * math.sqrt(expected / 200_000)


def test_multi_scale_trains_and_refuses_bad_sizes():
    chain = pf.multi_scale(8, num_scales=3, layers=lambda k: pf.svd_linear(k))
    flow = pf.Flow(normal(2, dtype=torch.float32), chain)
    (-flow().log_prob(torch.randn(16, 8)).mean()).backward()
    assert all(p.grad is not None for p in flow.parameters())
    assert len(pf.multi_scale(5, num_scales=1, layers=pf.svd_linear)) == 1
    for make, message in [
        (lambda: pf.multi_scale(6, num_scales=3, layers=coupling), "divisible by 4, but got 6"),
        (lambda: pf.multi_scale(8, layers=coupling, dim=-2), "dim must be -1, for vectors, or -3"),
        (lambda: pf.multi_scale(8, layers=coupling, num_scales=0), "num_scales must be at least 1"),
        (lambda: pf.multi_scale(8, layers=lambda k: pf.svd_linear(8)), "part 1 .* does not fit part 0"),
        (
            lambda: pf.multi_scale(1, layers=image_layers, dim=-3).latents(torch.zeros(1, 6, 4)),
            "height and width must be divisible",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    for layers, message in [
        (coupling(8), "layers must be a function .* AffineCoupling"),
        ([coupling], "layers must be a function .* list"),
        (lambda k: [coupling(k)], "Chain: expected a transform, got list"),
    ]:
        with pytest.raises(TypeError, match=message):
            pf.multi_scale(8, layers=layers)
