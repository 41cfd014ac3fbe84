"""Layers that a user changes with torch.nn.utils.parametrize: copied, scored, trained; conditioning refuses them."""

from __future__ import annotations

import copy

import pyro.distributions as dist
import pytest
import torch
from cases import CONDITIONAL, SMALL, scatter
from torch import nn
from torch.nn.utils import parametrize

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj


class Halved(nn.Module):
    def forward(self, x):
        return 0.5 * x

    def right_inverse(self, y):
        return 2.0 * y


class Bounded(nn.Module):
    def forward(self, x):
        return x.tanh()


def parametrised(layer, make=Halved):
    """Parametrise every own parameter of a layer and of the layers that it is made of."""
    changed = []
    for module in [m for m in layer.modules() if isinstance(m, pf.Bijection)]:
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                parametrize.register_parametrization(module, name, make())
                changed.append(name)
    return changed


def used(layer, x):
    """Fill every memo with an entry that has a graph."""
    y = layer(x)
    layer.inv(y)
    layer(x)
    return y


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_a_used_layer_is_copied(case, dim):
    plain, layer, x = case.build(dim), case.build(dim), case.points(dim)
    if not parametrised(layer):
        pytest.skip("no parameters of its own")
    y, ladj = call_and_ladj(plain, x)
    used(layer, x)
    for twin in (copy.deepcopy(layer), copy.copy(layer), layer.with_cache(0)):
        got_y, got_ladj = call_and_ladj(twin, x)
        torch.testing.assert_close(got_y, y)
        torch.testing.assert_close(got_ladj, ladj)
        torch.testing.assert_close(inv_and_ladj(twin, y.detach()), inv_and_ladj(plain, y.detach()))
        assert twin.inv.inv is twin
    other = copy.deepcopy(layer)
    scatter(other)
    torch.testing.assert_close(call_and_ladj(layer, x)[0], y)  # nothing is shared


def test_a_copy_trains_its_own_originals():
    layer = scatter(pf.orthogonal(3))
    parametrised(layer, Bounded)
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    flow = pf.Flow(base, [layer, pf.svd_linear(3)])
    flow().rsample_and_log_prob((5,))[1].sum().backward()
    flow().rsample((5,))
    twin = copy.deepcopy(flow)
    twin.zero_grad()
    twin().log_prob(torch.randn(5, 3)).sum().backward()
    originals = twin.transforms[0].parametrizations.vectors.original
    assert originals.grad.abs().max() > 0
    assert originals is not layer.parametrizations.vectors.original


@pytest.mark.parametrize("case", CONDITIONAL)
def test_conditioning_refuses_by_name(case):
    conditional = case.conditional(case.dims[-1], 2)
    own = [m for m in conditional.template.modules() if isinstance(m, pf.Bijection) and m._parameters]
    if not own:
        pytest.skip("its network alone takes the context")
    layer = own[-1]
    name = next(n for n in layer._parameters if layer.amortised is None or n in layer.amortised)
    kind = type(layer).__name__
    parametrize.register_parametrization(layer, name, Halved())
    for call in (lambda: conditional.condition(torch.zeros(2)), lambda: pf.Conditional(conditional.template, 2)):
        with pytest.raises(ValueError, match=f"'{name}' of {kind} is computed by .*remove_parametrizations"):
            call()
    parametrize.remove_parametrizations(layer, name)
    pf.Conditional(conditional.template, 2)
    conditional.condition(torch.zeros(2, dtype=next(conditional.parameters()).dtype))


def test_what_a_context_does_not_set_may_be_parametrised():
    layer = pf.affine_coupling(4, [8], context_dim=2)
    nn.utils.parametrizations.weight_norm(layer.hypernet[0])
    conditional = pf.Conditional(layer, 2)
    scatter(conditional.double())
    x, context = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    used(layer, x)
    conditioned = copy.deepcopy(conditional).condition(context)
    torch.testing.assert_close(conditioned(x), conditional.condition(context)(x))
    # next to a conditioned layer, in a chain that recomputes and therefore makes shallow copies
    plain = scatter(pf.svd_linear(4).double())
    parametrised(plain)
    chain = pf.Chain([plain, conditional.condition(context)], recompute=True)
    expected = pf.Chain([plain, conditional.condition(context)])
    for own in (chain, expected):
        conditional.zero_grad()
        plain.zero_grad()
        own(x).square().sum().backward()
        own.found = [p.grad.clone() for p in (*plain.parameters(), *conditional.parameters())]
    torch.testing.assert_close(chain.found, expected.found)
