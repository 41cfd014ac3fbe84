"""Transforms of torch and Pyro inside the layers here: their caches, their hidden tensors, their copies."""

from __future__ import annotations

import copy
import threading

import pyro.distributions.transforms as T
import pytest
import torch
from cases import scatter
from torch.distributions import AffineTransform, IndependentTransform

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj

MODULES = {
    "spline": lambda: T.spline(4),
    "affine_coupling": lambda: T.affine_coupling(4, [8]),
    "affine_autoregressive": lambda: T.affine_autoregressive(4, [8]),
    "independent": lambda: IndependentTransform(T.spline(4), 0, cache_size=1),
}


def around(part):
    return pf.Chain([pf.svd_linear(4), part]), pf.Inverted(part)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_no_cache_of_a_foreign_module_answers(make):
    """Neither where its entry has no graph, nor after its parameters have changed, nor in a copy."""
    for layer in around(make()):
        with torch.no_grad():
            y = layer(torch.randn(5, 4))
        sum(t.sum() for t in inv_and_ladj(layer, y)).backward()
        assert all(p.grad is not None for p in layer.parameters())
        x = torch.randn(5, 4)
        y = layer(x)
        scatter(layer, 0.1)
        torch.testing.assert_close(inv_and_ladj(layer, y), inv_and_ladj(layer, y.clone()))
        layer(x).sum().backward()
        twin = copy.deepcopy(layer)
        torch.testing.assert_close(call_and_ladj(twin, x), call_and_ladj(layer, x))


def test_threads_share_a_foreign_part():
    layers = [pf.Chain([T.affine_coupling(4, [8])]), pf.NumericalInverse(T.affine_autoregressive(4, [8]))]
    inputs = [torch.randn(3, 4) for _ in range(4)]
    wrong = []

    def work(x):
        for layer in layers:
            expected = references[layer, id(x)]
            for _ in range(50):
                got = call_and_ladj(layer, x.clone())
                if not all(map(torch.allclose, got, expected)):
                    wrong.append(layer)

    with torch.no_grad():
        references = {(layer, id(x)): call_and_ladj(layer, x.clone()) for layer in layers for x in inputs}
    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


LOC = {
    "bare": lambda part: part,
    "inverted": pf.Inverted,
    "chain": lambda part: pf.Chain([part], recompute=True),
    "inverted chain": lambda part: pf.Inverted(pf.Chain([part])),
    "independent": lambda part: IndependentTransform(pf.Inverted(part), 1),
    "numerical": pf.NumericalInverse,
}


@pytest.mark.parametrize("wrap", LOC.values(), ids=LOC)
def test_tensors_of_foreign_parts_are_seen_at_any_depth(wrap):
    """By the memo, and by a chain that recomputes."""
    loc = torch.zeros(4, requires_grad=True)
    x = torch.randn(5, 4)
    chain = pf.Chain([pf.svd_linear(4), wrap(AffineTransform(loc, 2.0))])
    y = chain(x)
    with torch.no_grad():
        loc.add_(1)
    torch.testing.assert_close(chain.inv(y), chain.inv(y.clone()))
    grads = []
    for recompute in (False, True):
        layer = pf.Chain([pf.shift(4), *chain], recompute=recompute)
        (grad,) = torch.autograd.grad(sum(t.sum() for t in call_and_ladj(layer, x)), loc)
        grads.append(grad)
    torch.testing.assert_close(*grads)


CONDITIONED = {
    "affine_coupling": lambda: T.conditional_affine_coupling(4, 2, [8]),
    "spline": lambda: T.conditional_spline(4, 2, [8]),
    "householder": lambda: T.conditional_householder(4, 2, [8]),
}


@pytest.mark.parametrize("make", CONDITIONED.values(), ids=CONDITIONED)
def test_networks_in_closures_are_seen(make):
    """Conditioned transforms of Pyro keep theirs out of any module."""
    conditional, context, x = make(), torch.randn(5, 2), torch.randn(5, 4)
    part = conditional.condition(context)
    chain = pf.Chain([part, pf.shift(4)])
    y = chain(x)
    scatter(conditional, 0.3)
    torch.testing.assert_close(chain.inv(y), chain.inv(y.clone()))
    grads = []
    for recompute in (False, True):
        layer = pf.Chain([conditional.condition(context), pf.shift(4)], recompute=recompute)
        conditional.zero_grad()
        sum(t.sum() for t in call_and_ladj(layer, x)).backward()
        grads.append([p.grad.clone() for p in conditional.parameters()])
    torch.testing.assert_close(*grads)


def test_reconstruction_is_judged_by_the_size_of_each_event():
    """Large entries in few events excuse nothing elsewhere, nor are small entries beside large ones refused."""
    far = pf.Chain([scatter(pf.orthogonal(2))], recompute=True)
    x = torch.tensor([[1e4, 0.1], [0.3, -0.2], [0.0, 0.0]], requires_grad=True)
    sum(t.sum() for t in call_and_ladj(far, x)).backward()
    assert x.grad.isfinite().all()

    shrunk = pf.Diagonal(1)
    with torch.no_grad():
        shrunk.log_scale.fill_(-16.0)
        shrunk.bias.fill_(1.0)
    lossy = pf.Chain([shrunk, pf.Diagonal(1)], recompute=True)  # 1e-4 e^-16 beside 1 is lost in float32
    x = 1e-4 * torch.randn(20, 1, requires_grad=True)
    out = lossy(x)
    with pytest.raises(pf.ReconstructionError):
        out.sum().backward()
