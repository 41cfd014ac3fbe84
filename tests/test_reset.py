"""reset_parameters restores the initial state of every layer: with the same seed, the exact values of a new one."""

from __future__ import annotations

import warnings

import pyro.distributions as dist
import pytest
import torch
from cases import CONDITIONAL, SMALL, image_base, scatter
from torch import nn

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj, networks

CONTEXT_DIM = 2
#: Rows that are set from data or from a matrix, which a reset forgets; they are the identity afterwards.
GIVEN = {"act_norm_image", "whitening", "diagonal_negative", "lu_linear_pivoted"}


def built(make, seed=3):
    torch.manual_seed(seed)
    return make()


def restored(make):
    """Return a new instance and one that was scattered and reset, from the same state of torch's generator."""
    fresh, other = built(make), scatter(built(make, seed=4))
    before = dict(other.named_parameters())
    torch.manual_seed(3)
    other.reset_parameters()
    assert {name: id(p) for name, p in other.named_parameters()} == {name: id(p) for name, p in before.items()}
    return fresh, other


def same_state(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_every_layer(case, dim):
    fresh, other = restored(lambda: case.make(dim))
    x = case.points(dim, dtype=torch.float32)
    if case.name.split("_")[0] in GIVEN or case.name in GIVEN:
        expected = x, torch.zeros(x.shape[: x.dim() - fresh.domain.event_dim])
        for run in (call_and_ladj, inv_and_ladj):
            for a, b in zip(run(other, x), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        return
    permuted = any(isinstance(leaf, pf.Permute) for leaf, _ in fresh.leaves())
    if permuted:  # a permutation is drawn but is not a parameter: it stays, and the layers behind it draw other numbers
        for (mine, _), (theirs, _) in zip(fresh.leaves(), other.leaves(), strict=True):
            if isinstance(mine, pf.Permute):
                theirs.permutation.copy_(mine.permutation)
    else:
        same_state(fresh, other)
    y = fresh(x).detach()
    for run, value in ((call_and_ladj, x), (inv_and_ladj, y)):
        for a, b in zip(run(other, value.clone()), run(fresh, value.clone()), strict=True):
            torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 1e-5} if permuted else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("case", CONDITIONAL)
def test_every_conditional_layer(case):
    dim = case.dims[-1]
    fresh, other = restored(lambda: case.conditional(dim, CONTEXT_DIM))
    if case.layer != "Chain":
        same_state(fresh, other)
    x, context = image_base(case.event(dim), torch.float32).sample((3,)), torch.randn(3, CONTEXT_DIM)
    layer = other.condition(context)
    for a, b in zip(call_and_ladj(layer, x), call_and_ladj(other.template, x), strict=True):
        torch.testing.assert_close(a, b)


def normal(n):
    return dist.Normal(torch.zeros(n), torch.ones(n)).to_event(1)


STRUCTURES = {
    "flow": lambda: pf.Flow(normal(3), [pf.planar(3), pf.affine_coupling(3, [8])]),
    "conditional flow": lambda: pf.Flow(
        normal(3), [pf.sylvester(3), pf.conditional_affine_coupling(3, 2), pf.conditional_planar(3, 2)]
    ),
    "noise": lambda: pf.ConcatNoise(pf.Flow(normal(2), [pf.planar(2), pf.conditional_diagonal(2, 3)])),
    "slice": lambda: pf.Slice(pf.Flow(normal(2), [pf.planar(2)])),
    "iresnet": lambda: pf.iresnet(4, form="sandwich"),
    "foreign": lambda: pf.Chain([dist.transforms.planar(3), dist.transforms.affine_coupling(3, [8])]),
    "foreign inverse": lambda: pf.NumericalInverse(dist.transforms.radial(2)),
    "inside torch's": lambda: pf.Chain([pf.planar(3).inv, torch.distributions.IndependentTransform(pf.baird(3), 1)]),
    "a dense network": lambda: networks.dense_network(3, [4, 5], 2),
    "that starts at zero": lambda: networks.dense_network(3, [4, 5], 2, activation=nn.PReLU, zero_output=True),
    "without an input": lambda: networks.dense_network(0, [4], 2),
    "a convolution": lambda: networks.conv_network(2, [3], 4, spatial_dims=1, zero_output=True),
    "masked": lambda: networks.masked_network(3, [7, 7], 2, zero_output=True),
    "contractions": lambda: networks.contractive_conv_network(2, [4]),
    "contractive with a context": lambda: networks.ContractiveMLP(3, [4, 4], context_dim=2),
    "one contraction": lambda: networks.LinearContraction(3, 4),
    "one convolution": lambda: networks.Conv2dContraction(3, 4, bias=False),
    "lipswish": networks.LipSwish,
}


@pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)
def test_structures_and_networks(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_state(*restored(make))


def test_a_part_of_a_network_no_longer_ends_in_zeros():
    network = networks.dense_network(3, [4], 2, zero_output=True)
    part = network[:1]
    part.reset_parameters()
    assert (part[-1].weight != 0).all()


class Doubled(nn.Module):
    """A user's network: layers, and a parameter that only the network itself could reset."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.inner = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))})

    def forward(self, x):
        return self.gain * self.inner["net"](x)


class InCharge(Doubled):
    def reset_parameters(self):
        nn.init.constant_(self.gain, 2.0)
        for layer in self.inner["net"]:
            layer.reset_parameters()


@pytest.mark.parametrize("kind", [Doubled, InCharge])
def test_a_network_of_ones_own_as_far_as_its_modules_know_how(kind):
    fresh = built(lambda: pf.AffineCoupling(2, kind(), input_dim=4))
    other = scatter(built(lambda: pf.AffineCoupling(2, kind(), input_dim=4), seed=4))
    gain = other.hypernet.gain.item()
    torch.manual_seed(3)
    pf.Chain([pf.Inverted(other)]).reset_parameters()
    assert other.hypernet.gain.item() == (2.0 if kind is InCharge else gain)
    other.hypernet.gain.data.fill_(2.0)
    same_state(fresh, other)


def test_a_trainable_base_keeps_what_it_was_given():
    flow = scatter(pf.Flow(normal(3), [pf.planar(3)], trainable_base=True))
    before = {name: p.clone() for name, p in flow.base.named_parameters()}
    flow.reset_parameters()
    assert all(torch.equal(p, before[name]) for name, p in flow.base.named_parameters())
    assert not flow.transforms[0].u.any()


def test_nothing_is_remembered_of_what_was():
    layer = scatter(pf.affine_coupling(4, [8]))
    x = torch.randn(5, 4)
    y = layer(x)
    layer.reset_parameters()
    torch.testing.assert_close(layer.inv(y), y)


def test_a_layer_that_cannot_says_so():
    class Stubborn(pf.Bijection):
        def __init__(self):
            super().__init__(3)
            self.bias = nn.Parameter(torch.zeros(3))

    class Willing(Stubborn):
        def __init__(self):
            super().__init__()
            self.net = networks.dense_network(1, [2], 1, zero_output=True)

        def reset_parameters(self):
            super().reset_parameters()
            nn.init.zeros_(self.bias)

    same_state(*restored(Willing))
    for module in (Stubborn(), pf.Chain([Stubborn()]), pf.Inverted(Stubborn())):
        with pytest.raises(NotImplementedError, match=r"Stubborn has parameters .* must define reset_parameters"):
            module.reset_parameters()
    pf.sigmoid().reset_parameters()  # none of its own
