"""Failures seen in torch, Pyro and other flow libraries, asserted absent for every row of the registry.

What each suite file already covers row by row (log-dets against Jacobians, copies, empty batches, one-dimensional
events, conditioned shapes) is not repeated here.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import ALL, SMALL, image_base
from torch.distributions.transforms import ComposeTransform, TanhTransform

import pyro_invflows as pf


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_any_view_of_a_sample_can_be_scored(case, dim, cache_size):
    """Cloned, sliced, detached, gathered: Pyro's one-way layers raise KeyError on each of them."""
    d = dist.TransformedDistribution(image_base(case.event(dim)), [case.build(dim).with_cache(cache_size)])
    y = d.rsample((4,))
    expected = d.log_prob(y.detach().clone())
    for view, index in (
        (y, slice(None)),
        (y.clone(), slice(None)),
        (y.detach(), slice(None)),
        (y[0], 0),
        (y[1:3], slice(1, 3)),
        (y[[2, 0]], [2, 0]),
        (torch.stack(list(y)), slice(None)),
    ):
        torch.testing.assert_close(d.log_prob(view), expected[index])


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_composes_with_an_uncached_transform(case, dim):
    layer = case.build(dim)
    base = image_base(case.event(dim))
    middle = layer(case.points(dim)).detach()
    middle = middle / middle.abs().max()  # where tanh does not saturate, and still in every codomain
    tanh = TanhTransform()
    d = dist.TransformedDistribution(base, [ComposeTransform([layer, tanh])])
    correction = tanh.log_abs_det_jacobian(middle, torch.tanh(middle)).flatten(1).sum(-1)
    expected = dist.TransformedDistribution(base, [layer]).log_prob(middle) - correction
    torch.testing.assert_close(d.log_prob(torch.tanh(middle)), expected)


OPTIMISERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-4),
    "Pyro's ClippedAdam": lambda p: pyro.optim.clipped_adam.ClippedAdam(p, lr=0.1),
    "an edit of .data": lambda p: _Edit(p),
}


class _Edit:
    def __init__(self, parameters):
        self.parameters = list(parameters)

    def step(self):
        for p in self.parameters:
            p.data.add_(0.1)


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("case", ALL)
def test_data_is_scored_afresh_after_any_optimiser(case, name):
    """Some optimisers do not bump versions: the same direction must recompute, even for the very same tensor."""
    dim = case.dims[-1]
    layer = case.build(dim)
    parameters = [p for p in layer.parameters() if p.numel()]
    if not parameters:
        pytest.skip("nothing to learn")
    d = dist.TransformedDistribution(image_base(case.event(dim)), [layer])
    y = layer(case.points(dim)).detach()
    optimiser = OPTIMISERS[name](parameters)
    for _ in range(2):
        (-d.log_prob(y).mean()).backward()
        optimiser.step()
    twin = case.build(dim)
    twin.load_state_dict(layer.state_dict())
    fresh = dist.TransformedDistribution(image_base(case.event(dim)), [twin])
    torch.testing.assert_close(d.log_prob(y), fresh.log_prob(y.clone()), rtol=0, atol=0)
    torch.manual_seed(0)
    sample = d.sample()
    torch.manual_seed(0)
    torch.testing.assert_close(sample, fresh.sample(), rtol=0, atol=0)


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_scoring_changes_no_state_in_train_or_eval(case, dim):
    layer = case.build(dim)
    d = dist.TransformedDistribution(image_base(case.event(dim)), [layer])
    y = d.sample((64,))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.train()
    whole = d.log_prob(y)
    in_parts = torch.cat([d.log_prob(part) for part in y.split(8)])
    layer.eval()
    torch.testing.assert_close(whole, in_parts)
    torch.testing.assert_close(whole, d.log_prob(y))
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in state.items())


def test_true_codomains_are_not_claimed_real():
    assert pf.ELU(0.5).codomain.check(torch.tensor([-0.4, -0.6])).tolist() == [True, False]
    assert pf.SELU().codomain.check(torch.tensor([-1.75, -1.76])).tolist() == [True, False]
    d = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [pf.ELU()])
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.tensor(-1.5))


def test_scalar_flows_have_a_cdf():
    d = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [pf.Baird(), pf.Interval(-1.0, 2.0)])
    y = d.sample((100,))
    torch.testing.assert_close(d.icdf(d.cdf(y)), y, rtol=1e-3, atol=1e-3)
