"""Chains, inverses as modules, stacks, recomputation."""

from __future__ import annotations

import copy

import pyro.distributions as dist
import pytest
import torch
from cases import scatter
from pyro.distributions.transforms import iterated
from pyro.distributions.transforms import planar as pyro_planar
from test_memo import Counter
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    ReshapeTransform,
)

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj


def couplings(depth, dim=6, size=0.3, **kwargs):
    parts = []
    for _ in range(depth):
        parts += [pf.affine_coupling(dim, [8], activation=torch.nn.Tanh), pf.permute(dim)]
    return scatter(pf.Chain(parts, **kwargs), size)


def test_it_is_a_module_list_and_flattens():
    inner = pf.orthogonal(4)
    chain = pf.Chain(
        [
            ComposeTransform([inner, ComposeTransform([ExpTransform()])]),
            pf.Chain([pf.shift(4)]),
            iterated(2, pf.diagonal, 4),
            pf.svd_linear(4).inv,
            IndependentTransform(pf.baird(4), 1),
        ]
    )
    assert isinstance(chain, torch.nn.ModuleList)
    assert [p.label for p in chain] == [
        "Orthogonal",
        "ExpTransform",
        "Shift",
        "Diagonal",
        "Diagonal",
        "Inverted",
        "Reinterpreted",
    ]
    assert len(chain) == 7
    assert chain[0] is inner
    assert inner in chain
    assert isinstance(chain[1:3], pf.Chain)
    assert len(list(chain.parameters())) == 1 + 1 + 4 + 4 + 1  # every layer's, also inside torch's wrappers
    with pytest.raises(TypeError, match="build a new one"):
        chain.append(inner)
    with pytest.raises(TypeError, match="build a new one"):
        chain[0] = inner


def test_event_dims_add_up():
    chain = pf.Chain([ReshapeTransform((6,), (2, 3)), pf.Baird(), pf.permute(2, dim=-2), pf.shift(3)])
    scatter(chain)
    assert chain.domain.event_dim == 1
    assert chain.codomain.event_dim == 2
    x = torch.randn(5, 6)
    y, ladj = call_and_ladj(chain, x)
    assert y.shape == (5, 2, 3) == chain.forward_shape(x.shape)
    assert ladj.shape == (5,)
    back, inverse = inv_and_ladj(chain, y.clone())
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -ladj)
    assert chain.inverse_shape(y.shape) == x.shape
    base = dist.Normal(torch.zeros(6), 1.0).to_event(1)
    d = dist.TransformedDistribution(base, [chain])
    assert d.event_shape == (2, 3)
    torch.testing.assert_close(d.log_prob(y), base.log_prob(x) - ladj)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            lambda: [pf.orthogonal(4), pf.shift(5)],
            r"part 1 \(Shift\) does not fit part 0 \(Orthogonal\).*5 elements.*4",
        ),
        (lambda: [pf.orthogonal(4), pf.Sigmoid(), pf.permute(3)], "part 2"),
        (lambda: [pf.baird(3), pf.orthogonal(4)], "part 1"),
        (lambda: [pf.orthogonal(4), pf.baird(3)], "part 1"),
        (lambda: [pf.shift(6, dim=-3), pf.PixelShuffle(2)], "channels must be divisible"),
        (lambda: [pf.shift(8, dim=-3), pf.PixelShuffle(2), pf.shift(8, dim=-3)], "part 2"),
        (lambda: [ReshapeTransform((6,), (2, 3)), pf.shift(4)], "part 1"),
    ],
)
def test_mismatched_parts_name_the_pair(parts, message):
    with pytest.raises(ValueError, match=message):
        pf.Chain(parts())


def test_wrong_parts():
    with pytest.raises(TypeError, match="Linear"):
        pf.Chain([torch.nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="Condition it first"):
        pf.Chain([pf.conditional_shift(2, 1)])
    with pytest.raises(TypeError, match="list of transforms"):
        pf.Chain(pf.shift(2))
    with pytest.raises(TypeError, match="expected a transform"):
        pf.Inverted(torch.nn.Linear(2, 2))


def test_foreign_one_way_transforms_score_their_own_sample():
    chain = pf.Chain([pf.orthogonal(3), pyro_planar(3), pf.baird(3)])
    x = torch.randn(4, 3)
    y = chain(x)
    assert chain.inv(y) is x
    ladj = chain.log_abs_det_jacobian(x, y)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: chain._call(v)))(x)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian)[1])


def test_parameters_buffers_and_state_are_those_of_the_parts():
    chain = couplings(2)
    chain.double()
    x = torch.randn(3, 6, dtype=torch.float64)
    assert chain(x).dtype == torch.float64
    other = couplings(2).double()
    other.load_state_dict(chain.state_dict())
    torch.testing.assert_close(other(x), chain(x))
    twin = copy.deepcopy(chain)
    assert twin[0] is not chain[0]
    assert twin[0] is twin.parts[0]


def test_inverted_holds_parameters_where_inv_does_not():
    layer = scatter(pf.svd_linear(3))
    inverted = pf.Inverted(layer)
    assert len(list(inverted.parameters())) == 4
    assert not isinstance(layer.inv, torch.nn.Module)
    x = torch.randn(5, 3)
    torch.testing.assert_close(inverted(x), layer.inv(x))
    torch.testing.assert_close(inverted.inv(x), layer(x))
    assert pf.Inverted(pf.Sigmoid()).domain is torch.distributions.constraints.unit_interval
    foreign = pf.Inverted(AffineTransform(1.0, 2.0))
    torch.testing.assert_close(foreign(x), (x - 1) / 2)
    torch.testing.assert_close(call_and_ladj(foreign, x)[1], torch.full_like(x, 0.5).log())


def test_one_evaluation_a_layer():
    """log_prob and an ELBO-like step, through a list, a chain and a flow; torch's compose re-runs its parts."""
    base = dist.Normal(torch.zeros(6), 1.0).to_event(1)
    chain = couplings(4)
    counter = Counter(chain)
    y = torch.randn(5, 6)
    flow = pf.Flow(base, chain)
    for d in (
        dist.TransformedDistribution(base, list(chain)),
        dist.TransformedDistribution(base, [chain]),
        pf.FlowDistribution(base, list(chain)),
        flow(),
    ):
        d.log_prob(y)
        assert counter.take() == 4
        d.log_prob(d.rsample((5,)))
        assert counter.take() == 4
    flow().rsample_and_log_prob((5,))
    assert counter.take() == 4
    d = dist.TransformedDistribution(base, [ComposeTransform(list(chain))])
    d.log_prob(d.rsample((5,)))
    assert counter.take() > 4


def test_sampling_alone_never_pays_for_a_log_det(monkeypatch):
    chain = couplings(2)

    def refuse(self, x, y, aux):
        raise AssertionError("log-det computed")

    monkeypatch.setattr(pf.AffineCoupling, "_log_det", refuse)
    chain(torch.randn(3, 6))
    chain.inv(torch.randn(3, 6))


def test_stack():
    from functools import partial

    chain = partial(pf.stack, 3, pf.affine_coupling)(4)
    assert len(chain) == 3
    assert chain[0] is not chain[1]
    with pytest.raises(ValueError, match="at least 1"):
        pf.stack(0, pf.shift, 2)
    with pytest.raises(TypeError, match="repeats"):
        pf.stack(pf.shift, 2)


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_stack_with_a_layer_between_two(repeats):
    chain = pf.stack(repeats, pf.affine_coupling, 5, between=pf.permute, hidden_dims=[8], keep="last")
    assert [type(part) for part in chain] == [pf.AffineCoupling, *[pf.Permute, pf.AffineCoupling] * (repeats - 1)]
    assert len({id(part) for part in chain}) == 2 * repeats - 1  # each is built anew
    assert all(part.keep == "last" for part in chain[::2])  # keywords are the factory's alone


# ---------------------------------------------------------------------- one-pass functions on foreign transforms


@pytest.mark.parametrize(
    "transform",
    [
        AffineTransform(1.0, -2.0),
        ComposeTransform([AffineTransform(1.0, -2.0), ExpTransform()]),
        IndependentTransform(AffineTransform(1.0, -2.0), 1),
        ComposeTransform([IndependentTransform(AffineTransform(1.0, 2.0), 1), ExpTransform()]),
        AffineTransform(1.0, -2.0).inv,
        ComposeTransform([pf.Orthogonal(3), AffineTransform(0.0, 3.0)]).inv,
        ComposeTransform([]),
        torch.distributions.transforms.StickBreakingTransform(),
        ComposeTransform([AffineTransform(0.0, 2.0), torch.distributions.transforms.StickBreakingTransform()]),
    ],
    ids=lambda t: type(t).__name__,
)
def test_one_pass_on_any_transform(transform):
    x = torch.randn(4, 3, dtype=torch.float64)
    transform = copy.deepcopy(transform)
    for part in [*getattr(transform, "parts", [])]:
        if isinstance(getattr(part, "inv", None), pf.Orthogonal):
            part.inv.double()
    y, ladj = call_and_ladj(transform, x)
    torch.testing.assert_close(y, transform(x))
    torch.testing.assert_close(ladj, transform.log_abs_det_jacobian(x, y))
    back, inverse = inv_and_ladj(transform, y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -ladj)


# ---------------------------------------------------------------------- recomputation


def kept_bytes(chain, run, x):
    """Bytes of distinct storages that autograd keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in chain.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, ladj = run(chain, x)
    loss = out.sum() + ladj.sum()
    return sum(kept.values()), loss


@pytest.mark.parametrize("run", [call_and_ladj, inv_and_ladj], ids=["forward", "inverse"])
def test_recompute_keeps_no_activations(run):
    x = torch.randn(256, 6)
    short, long = couplings(4, recompute=True), couplings(64, recompute=True)
    assert kept_bytes(long, run, x)[0] <= 1.1 * kept_bytes(short, run, x)[0]
    assert kept_bytes(pf.Chain(long), run, x)[0] > 10 * kept_bytes(pf.Chain(short), run, x)[0]


@pytest.mark.parametrize("run", [call_and_ladj, inv_and_ladj], ids=["forward", "inverse"])
def test_recompute_gradients_equal_the_plain_ones(run):
    plain = couplings(16).double()
    twin = pf.Chain(plain, recompute=True)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for chain in (plain, twin):
        out, ladj = run(chain, x)
        loss = (out * torch.linspace(0, 1, 6, dtype=torch.float64)).sum() + ladj.square().sum()
        results.append(torch.autograd.grad(loss, [x, *chain.parameters()]))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-8 * a.norm()


def test_recompute_passes_gradients_to_a_context_and_to_trainable_noise():
    parts = [pf.affine_coupling(4, [8], context_dim=2), pf.orthogonal(4), pf.affine_coupling(4, [8], context_dim=2)]
    noise = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        conditional = scatter(pf.Conditional(pf.Chain(copy.deepcopy(parts), recompute=recompute), 2), 0.3).double()
        context = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
        layer = conditional.condition(context)
        base = dist.Normal(torch.zeros(4, dtype=torch.float64), noise.exp()).to_event(1)
        loss = pf.FlowDistribution(base, [layer]).log_prob(torch.randn(7, 4, dtype=torch.float64)).sum()
        sample = pf.FlowDistribution(base, [conditional.condition(context)]).rsample()
        loss = loss + sample.square().sum()
        results.append(torch.autograd.grad(loss, [context, noise, *conditional.parameters()]))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-8 * a.norm().clamp_min(1e-12)
    assert results[0][0].abs().min() > 0


def test_recompute_refuses_what_inversion_lost():
    chain = pf.Chain(scatter(pf.Chain([pf.diagonal(3) for _ in range(3)]), 0.0), recompute=True)
    with torch.no_grad():
        chain[0].log_scale.fill_(-60.0)  # float32 cannot carry x through the shift that follows
        chain[1].bias.fill_(1.0)
    x = torch.randn(4, 3, requires_grad=True)
    out, ladj = call_and_ladj(chain, x)
    with pytest.raises(pf.ReconstructionError, match="rebuilt its input"):
        (out.sum() + ladj.sum()).backward()


def test_recompute_in_svi_and_without_gradients():
    chain = couplings(4, recompute=True)
    base = dist.Normal(torch.zeros(6), 1.0).to_event(1)
    d = dist.TransformedDistribution(base, [chain])
    counter = Counter(chain)
    y = d.rsample((5,))
    log_prob = d.log_prob(y)
    assert counter.take() == 4
    (log_prob.sum() + y.sum()).backward()
    assert all(p.grad is not None for p in chain.parameters())
    with torch.no_grad():
        torch.testing.assert_close(d.log_prob(y.clone()), log_prob)


def test_recompute_refuses_parts_it_cannot_invert():
    class Bound(pf.Shift):
        exact = False

    with pytest.raises(ValueError, match="Bound"):
        pf.Chain([Bound(3)], recompute=True)
    with pytest.raises(ValueError, match="does not allow"):
        pf.Chain([torch.distributions.transforms.AbsTransform()], recompute=True)


def test_recompute_with_a_computed_context_shared_by_several_couplings():
    """An encoder's output: one non-leaf tensor under several names."""
    parts = [pf.affine_coupling(4, [8], context_dim=2), pf.permute(4), pf.affine_coupling(4, [8], context_dim=2)]
    x, start = torch.randn(7, 4).double(), torch.randn(7, 3).double()
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        conditional = scatter(pf.Conditional(pf.Chain(copy.deepcopy(parts), recompute=recompute), 2), 0.5).double()
        weight = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2).requires_grad_()
        for run in (call_and_ladj, inv_and_ladj):
            out, ladj = run(conditional.condition(torch.tanh(start @ weight)), x)
            results.append(torch.autograd.grad(out.square().sum() + ladj.sum(), [weight, *conditional.parameters()]))
    for plain, rebuilt in ((results[0], results[2]), (results[1], results[3])):
        for a, b in zip(plain, rebuilt, strict=True):
            assert (a - b).norm() <= 1e-8 * a.norm()


def test_recompute_takes_the_plain_path_around_tensors_that_it_cannot_exchange():
    """Trainable tensors of foreign parts, and computed tensors inside torch's wrappers or set by functional_call."""
    scale = torch.tensor(2.0, requires_grad=True)
    context = torch.randn(2, 2, requires_grad=True)
    conditional = scatter(pf.conditional_baird(3, 2))
    x = torch.randn(2, 3)

    def foreign(recompute):
        return call_and_ladj(pf.Chain([AffineTransform(0.0, scale), pf.shift(3)], recompute=recompute), x)

    def wrapped(recompute):
        part = IndependentTransform(conditional.condition(torch.tanh(context)), 1)
        return call_and_ladj(pf.Chain([part, pf.shift(3)], recompute=recompute), x)

    for run, leaf in ((foreign, scale), (wrapped, context)):
        grads = [torch.autograd.grad(sum(t.square().sum() for t in run(r)), leaf)[0] for r in (False, True)]
        torch.testing.assert_close(*grads)


def test_recompute_leaves_no_activation_behind():
    chain = couplings(8, recompute=True)
    out, ladj = call_and_ladj(chain, torch.randn(5, 6, requires_grad=True))
    (out.sum() + ladj.sum()).backward()
    assert all(part._memo is None for part in chain)


def test_recompute_under_autocast_takes_the_plain_path():
    chain = couplings(4, recompute=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, ladj = call_and_ladj(chain, torch.randn(5, 6))
    (out.sum() + ladj.sum()).backward()
    assert all(p.grad is not None for p in chain.parameters())


def test_foreign_caches_do_not_follow_a_chain():
    chain = pf.Chain([pf.shift(3), torch.distributions.transforms.TanhTransform(cache_size=1)])
    x = torch.randn(1000, 3)
    chain.inv(chain(x))
    assert chain[1]._held._cached_x_y == (None, None)
    copy.deepcopy(chain)


def test_clear_cache_and_exactness_reach_the_parts():
    layer = pf.affine_coupling(4, [8])
    chain = pf.Chain([layer])
    layer(torch.randn(2, 4))
    chain.clear_cache()
    assert layer._memo is None
    assert chain.exact

    class Bound(pf.Shift):
        exact = False

    assert not pf.Chain([Bound(3)]).exact
    assert not pf.Inverted(Bound(3)).exact
