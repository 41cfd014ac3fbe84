"""kl_divergence of two flows: the closed form for Gaussians, and cases that raise an error."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from cases import scatter
from torch.distributions import TransformedDistribution, kl_divergence
from torch.distributions.transforms import AbsTransform, AffineTransform

import pyro_invflows as pf


def gaussian(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    return dist.Normal(3 * draw[0], draw[1].exp()).to_event(1)


def pushed(base, layers, noise_dim):
    """Return the distribution of an affine image of a Gaussian and standard normal noise, from the map alone."""
    dim = base.event_shape[0]
    names = {"e": torch.zeros(noise_dim, dtype=torch.float64)}

    def run(v):
        return layers.from_latents({"base": v[:dim], **({"e": names["e"] + v[dim:]} if noise_dim else {})})

    zero = torch.zeros(dim + noise_dim, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(run, zero)
    mean = torch.cat([base.mean, torch.zeros(noise_dim, dtype=torch.float64)])
    covariance = torch.diag(torch.cat([base.variance, torch.ones(noise_dim, dtype=torch.float64)]))
    return dist.MultivariateNormal((run(zero) + matrix @ mean).detach(), matrix @ covariance @ matrix.T)


def standard(dim):
    return dist.Normal(torch.zeros(dim, dtype=torch.float64), torch.ones((), dtype=torch.float64)).to_event(1)


def bijections():
    return pf.Chain([pf.svd_linear(3), pf.orthogonal(3), pf.diagonal(3)])


def injection():
    return pf.Chain([pf.diagonal(3), pf.ConcatNoise(standard(2), name="e"), pf.svd_linear(5)])


@pytest.mark.parametrize(("make", "noise_dim"), [(bijections, 0), (injection, 2)], ids=["bijections", "injection"])
def test_it_is_that_of_the_bases_where_the_layers_are_the_same(make, noise_dim):
    layers = scatter(make().double())
    bases = gaussian(3, 1), gaussian(3, 2)
    expected = kl_divergence(*(pushed(base, layers, noise_dim) for base in bases))
    p, q = (pf.Flow(base, layers)() for base in bases)
    torch.testing.assert_close(kl_divergence(p, q), expected)
    torch.testing.assert_close(kl_divergence(p, TransformedDistribution(bases[1], [layers])), expected)
    torch.testing.assert_close(kl_divergence(TransformedDistribution(bases[0], [layers]), q), expected)
    q = pf.Flow(bases[1], list(layers))()  # the same layers in another chain
    torch.testing.assert_close(kl_divergence(p, q), expected)
    torch.testing.assert_close(kl_divergence(p.expand((4,)), q.expand((4,))), expected.expand(4))
    torch.testing.assert_close(kl_divergence(p.expand((4,)).to_event(1), q.expand((4,)).to_event(1)), 4 * expected)


def test_noise_that_depends_on_its_input_adds_nothing():
    """e | x ~ N(W x + c, S): jointly Gaussian with x."""
    shift = pf.Conditional(pf.diagonal(2), 3, hidden_dims=())
    noise = scatter(pf.Flow(standard(2), [shift]).double())
    with torch.no_grad():  # the mean depends on x, the scale does not
        shift.hypernet[0].weight[:2] = 0
    names = [name for name, _ in shift.template.named_parameters()]
    assert names == ["log_scale", "bias"]
    layers = pf.Chain([pf.ConcatNoise(noise, name="e"), scatter(pf.svd_linear(5).double())])
    bases = gaussian(3, 1), gaussian(3, 2)
    zero = torch.zeros(3, dtype=torch.float64)

    def mean(x):
        return noise(x).transforms[0](torch.zeros(2, dtype=torch.float64))

    weights = torch.autograd.functional.jacobian(mean, zero)
    scale = torch.autograd.functional.jacobian(noise(zero).transforms[0], torch.zeros(2, dtype=torch.float64))
    joints = []
    for base in bases:
        top = torch.cat([torch.diag(base.stddev), torch.zeros(3, 2).double()], 1)
        bottom = torch.cat([weights @ torch.diag(base.stddev), scale], 1)
        root = torch.cat([top, bottom])
        joints.append(dist.MultivariateNormal(torch.cat([base.mean, mean(base.mean)]).detach(), root @ root.T))
    torch.testing.assert_close(kl_divergence(*(pf.Flow(base, layers)() for base in bases)), kl_divergence(*joints))


@pytest.mark.parametrize("score", ["data", "sample"])
def test_a_slice_is_refused(score):
    """The bases differ only in what is dropped, so the divergence is 0; that of the bases is 4.5."""
    layers = pf.Chain([pf.Slice(standard(1), score=score)])
    p, q = (
        pf.Flow(dist.Normal(torch.tensor([0.0, mean]).double(), torch.ones(2).double()).to_event(1), layers)()
        for mean in (0.0, 3.0)
    )
    assert kl_divergence(p.base_dist, q.base_dist).item() == pytest.approx(4.5)
    for pair in ((p, q), (p, TransformedDistribution(q.base_dist, [layers])), (p.to_event(0), q)):
        with pytest.raises(NotImplementedError, match=r"Slice.*upper bound.*p\.sample"):
            kl_divergence(*pair)
    if score == "data":  # the remedy
        x = p.sample((10,))
        assert (p.log_prob(x) - q.log_prob(x)).isfinite().all()


def test_other_layers_and_other_events_are_refused():
    base = gaussian(3, 1)
    p = pf.FlowDistribution(base, [AbsTransform()])
    with pytest.raises(NotImplementedError, match=r"AbsTransform, which is not one-to-one"):
        kl_divergence(p, pf.FlowDistribution(gaussian(3, 2), [p.transforms[0]]))
    one, other = pf.diagonal(3).double(), pf.diagonal(3).double()
    with pytest.raises(NotImplementedError, match=r"the same layers.*p\.sample"):
        kl_divergence(pf.Flow(base, [one])(), pf.Flow(base, [other])())
    same = [pf.FlowDistribution(b, [AffineTransform(1.0, 2.0)]) for b in (base, gaussian(3, 2))]
    torch.testing.assert_close(kl_divergence(*same), kl_divergence(base, gaussian(3, 2)))
