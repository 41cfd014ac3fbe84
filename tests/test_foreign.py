"""torch's and Pyro's transforms inside this library's layers: their caches, hidden tensors and copies."""

from __future__ import annotations

import copy
import threading

import pyro.distributions.transforms as T
import pytest
import torch
from cases import scatter
from test_memo import Counter
from torch.distributions import AffineTransform, ComposeTransform, IndependentTransform

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj
from pyro_invflows.core.foreign import Foreign, as_bijection
from pyro_invflows.core.reinterpreted import Reinterpreted

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
    """It must not answer if its entry has no graph, if its parameters have changed, or in a copy."""
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
    """Both the memo and a chain that recomputes must see them."""
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


def test_the_door():
    """What a transform becomes; a layer stays itself."""
    layer, planar = pf.diagonal(3), T.planar(3)
    assert as_bijection(layer) is layer
    for transform, kind in (
        (layer.inv, pf.Inverted),
        (planar.inv, pf.Inverted),
        (IndependentTransform(layer, 1), Reinterpreted),
        (ComposeTransform([layer, planar]), pf.Chain),
        (planar, Foreign),
        (AffineTransform(0.0, 2.0), Foreign),
    ):
        assert type(as_bijection(transform)) is kind
    assert as_bijection(layer.inv).layer is layer
    assert as_bijection(planar).transform is planar
    assert as_bijection(ComposeTransform([layer, planar]))[0] is layer


def test_a_foreign_tensor_is_a_buffer():
    """It moves, is saved and loaded, and the transform that was given stays as it was."""
    loc = torch.randn(4)
    given = AffineTransform(loc, 2.0)
    chain = pf.Chain([pf.shift(4), given])
    assert chain[1].tensor_loc is loc
    other = pf.Chain([pf.shift(4), AffineTransform(torch.zeros(4), 2.0)])
    other.load_state_dict(chain.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(other(x), chain(x))
    chain.double()
    assert chain(x.double()).dtype == torch.float64
    torch.testing.assert_close(chain(x.double()), loc.double() + 2.0 * x.double())
    assert given.loc is loc
    assert loc.dtype == torch.float32
    twin = copy.deepcopy(chain)
    with torch.no_grad():
        twin[1].tensor_loc.add_(1.0)
    torch.testing.assert_close(twin(x.double()), chain(x.double()) + 1.0)


class Hidden(torch.distributions.Transform):
    """Keeps what it depends on in a closure."""

    domain = codomain = torch.distributions.constraints.real
    bijective = True

    def __init__(self, scale):
        super().__init__()
        self.function = lambda: scale

    def _call(self, x):
        return x * self.function()

    def _inverse(self, y):
        return y / self.function()

    def log_abs_det_jacobian(self, x, y):
        return self.function().abs().log().expand_as(x)


def test_nothing_is_remembered_of_what_hides_its_tensors():
    scale = torch.tensor(2.0, requires_grad=True)
    x = torch.randn(5, 4)
    chain = pf.Chain([pf.shift(4), Hidden(scale)], recompute=True)
    assert "opaque" in repr(chain)
    assert "opaque" not in repr(pf.Chain([AffineTransform(0.0, 2.0), T.planar(4), T.permute(4)]))
    for layer in (chain, pf.Inverted(chain), pf.NumericalInverse(Hidden(scale)), pf.Chain([pf.Inverted(chain)])):
        assert layer.opaque
        y = layer(x)
        assert layer._memo is None
        with torch.no_grad():
            scale.mul_(3.0)
        torch.testing.assert_close(layer.inv(y), layer.inv(y.clone()))
        assert not torch.allclose(layer.inv(y), x)
        (grad,) = torch.autograd.grad(sum(t.sum() for t in call_and_ladj(layer, x)), scale)  # nor recomputed
        assert grad != 0


def test_the_inverse_view_uses_the_memo_of_its_layer():
    layer = scatter(pf.affine_coupling(4, [8]))
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(4), torch.ones(4)), 1)
    d = pf.FlowDistribution(base, [layer.inv])
    counter = Counter(layer)
    d.log_prob(d.rsample((3,)))
    assert counter.take() == 1
    d.rsample_and_log_prob((3,))
    assert counter.take() == 1


def test_reconstruction_is_judged_by_the_size_of_each_event():
    """Large entries in a few events do not loosen the tolerance of others; small beside large ones are accepted."""
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
