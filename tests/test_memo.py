"""The memo: its rules, and its one known gap."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.utils.checkpoint
from cases import SMALL, scatter

import pyro_invflows as pf
from pyro_invflows import inv_and_ladj


class Counter:
    """Counts evaluations of every network in a module."""

    def __init__(self, module):
        self.count = 0
        for child in module.modules():
            if isinstance(child, torch.nn.Sequential):
                child.register_forward_hook(self._hook)

    def _hook(self, *_):
        self.count += 1

    def take(self):
        count, self.count = self.count, 0
        return count


@pytest.fixture
def layer():
    return scatter(pf.affine_coupling(4, [8]))


@pytest.fixture
def x():
    return torch.randn(5, 4)


def test_log_det_after_either_direction_is_free(layer, x):
    counter = Counter(layer)
    y = layer(x)
    layer.log_abs_det_jacobian(x, y)
    assert counter.take() == 1
    back = layer.inv(y.detach())
    layer.inv.log_abs_det_jacobian(y, back)  # another tensor object: evaluated again
    assert counter.take() == 2


def test_opposite_direction_only(layer, x):
    counter = Counter(layer)
    y = layer(x)
    assert layer.inv(y) is x
    assert counter.take() == 1
    assert layer(x) is not y  # the same direction always recomputes
    assert counter.take() == 1
    y = y.detach()
    x = layer.inv(y)
    assert layer(x) is y
    assert counter.take() == 1
    assert layer.inv(y) is not x
    assert counter.take() == 1


def test_single_use(layer, x):
    counter = Counter(layer)
    y = layer(x)
    layer.log_abs_det_jacobian(x, y)
    assert layer._memo is None  # no graph outlives its step
    layer.log_abs_det_jacobian(x, y)
    assert counter.take() == 2


def test_one_pass_functions_use_the_sample(layer, x):
    counter = Counter(layer)
    y = layer(x)
    back, ladj = pf.inv_and_ladj(layer, y)
    assert back is x
    assert counter.take() == 1
    expected = pf.inv_and_ladj(layer, y.clone())[1]
    torch.testing.assert_close(ladj, expected)
    y = y.detach()
    x = layer.inv(y)
    counter.take()
    out, _ = pf.call_and_ladj(layer, x)
    assert out is y
    assert counter.take() == 0


def _edit_in_place(layer):
    with torch.no_grad():
        layer.hypernet[-1].bias.add_(1.0)


def _swap_parameter(layer):
    layer.hypernet[-1].bias = torch.nn.Parameter(layer.hypernet[-1].bias.detach() + 1.0)


def _swap_module(layer):
    layer.hypernet[-1] = torch.nn.Linear(8, 4)


def _swap_network(layer):
    layer.hypernet = torch.nn.Linear(2, 4)


def _step(layer):
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 4)).sum().backward()
    optimiser.step()


def _load(layer):
    layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})


@pytest.mark.parametrize(
    "change", [_edit_in_place, _swap_parameter, _swap_module, _swap_network, _step, _load], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("swapped_before", [False, True])
def test_changed_parameters_make_it_miss(layer, x, change, swapped_before):
    if swapped_before:  # the kept list of modules must have followed
        layer.inv(layer(x))
        _swap_module(layer)
    y = layer(x).detach().clone()
    y = layer(x)
    change(layer)
    fresh = copy.deepcopy(layer)
    torch.testing.assert_close(layer.inv(y), fresh.inv(y.detach().clone()), rtol=0, atol=0)
    torch.testing.assert_close(
        layer.log_abs_det_jacobian(x, y), fresh.log_abs_det_jacobian(x.clone(), y.detach().clone()), rtol=0, atol=0
    )
    y = layer(x)
    with torch.no_grad():
        list(layer.parameters())[-1].add_(1.0)
    torch.testing.assert_close(layer.inv(y), copy.deepcopy(layer).inv(y.detach().clone()), rtol=0, atol=0)


OPTIMISERS = {
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.5, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.5, fused=True),
    "clipped adam": lambda p: pyro.optim.clipped_adam.ClippedAdam(p, lr=0.5),
    "adagrad rmsprop": lambda p: pyro.optim.adagrad_rmsprop.AdagradRMSProp(p, eta=0.5),
}


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_optimisers_that_bump_no_version_make_it_miss(layer, x, make):
    optimiser = make(layer.parameters())
    y = layer(x)
    y.square().sum().backward()
    y = layer(x)
    optimiser.step()
    fresh = inv_and_ladj(layer, y.detach().clone())
    torch.testing.assert_close(inv_and_ladj(layer, y), fresh)
    assert not torch.allclose(fresh[0], x)


def test_changed_buffers_make_it_miss(x):
    layer = pf.Permute([1, 0, 2, 3])
    y = layer(x)
    layer.load_state_dict(pf.Permute([3, 2, 1, 0]).state_dict())
    torch.testing.assert_close(layer.inv(y), x[:, [3, 2, 0, 1]])


def test_changed_mode_makes_it_miss(x):
    layer = pf.AffineCoupling(2, torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5)))
    counter = Counter(layer)
    y = layer(x)
    layer.eval()
    layer.inv(y)
    assert counter.take() == 2


def test_grad_mode(layer, x):
    with torch.no_grad():
        y = layer(x)
    back = layer.inv(y)
    assert back is not x
    assert back.requires_grad
    y = layer(x)
    with torch.no_grad():
        assert not layer.inv(y).requires_grad
    assert layer(x).requires_grad


def test_tensor_edited_in_place(layer, x):
    with torch.no_grad():
        y = layer(x)
        y += 1.0
        torch.testing.assert_close(layer(layer.inv(y)), y)
        y = layer(x)
        x += 1.0
        torch.testing.assert_close(layer.inv(y), x - 1.0, rtol=1e-4, atol=1e-4)


def test_sample_then_score_has_a_gradient(layer):
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0).to_event(1), [layer])
    d.log_prob(d.sample((3,))).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_training_twice_on_the_same_tensor(layer, x):
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0).to_event(1), [layer])
    for _ in range(3):
        d.log_prob(x).sum().backward()
        d.rsample().sum().backward()


def test_gradients_of_a_scored_sample_equal_those_without_memo(layer):
    """rsample then log_prob, as in an ELBO: the memo changes no gradient."""
    grads = []
    for cache_size in (0, 1):
        t = layer.with_cache(cache_size)
        d = dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0).to_event(1), [t])
        torch.manual_seed(0)
        y = d.rsample((6,))
        loss = (d.log_prob(y) + y.square().sum(-1)).mean()
        grads.append(torch.autograd.grad(loss, list(layer.parameters())))
    for cold, warm in zip(*grads, strict=True):
        torch.testing.assert_close(cold, warm, rtol=1e-4, atol=1e-5)


def test_inference_mode_does_not_poison_training(layer, x):
    with torch.inference_mode():
        y = layer(x)
        layer.inv(y)
        layer.log_abs_det_jacobian(x, y)
    layer(x).sum().backward()
    with torch.inference_mode():
        z = layer(torch.randn(2, 4))
    layer.inv(z.clone()).sum().backward()
    with torch.inference_mode():
        made_there = pf.affine_coupling(4, [8])
    with torch.no_grad():
        torch.testing.assert_close(made_there.inv(made_there(x)), x)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_hold_no_entry(layer, x, way):
    def size():
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        return buffer.getbuffer().nbytes

    before = size()
    y = layer(torch.randn(1000, 4))
    layer.inv(y)
    assert size() == before
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert twin._memo is None
    assert twin._inv is None
    torch.testing.assert_close(twin(x), layer(x))


def test_to_and_clear_cache_drop_the_entry(layer, x):
    layer(x)
    layer.double()
    assert layer._memo is None
    y = layer(x.double())
    layer.clear_cache()
    assert layer._memo is None
    chain = pf.Chain([layer])
    chain(x.double())
    chain.double()
    assert chain._memo is None
    assert layer.inv(y).dtype == torch.float64


def test_with_cache_shares_parameters(layer, x):
    off = layer.with_cache(0)
    assert off is not layer
    assert layer.with_cache(1) is layer
    y = off(x)
    assert off._memo is None
    assert off.inv(y) is not x
    assert all(a is b for a, b in zip(off.parameters(), layer.parameters(), strict=True))
    layer.double()
    assert next(off.parameters()).dtype == torch.float64
    with pytest.raises(ValueError, match="cache_size"):
        layer.with_cache(2)


def test_functorch_leaves_no_entry(layer, x):
    torch.vmap(layer)(x)
    torch.func.jacrev(layer)(x[0])
    assert layer._memo is None


def test_threads_see_a_whole_entry_or_none(layer):
    """Two threads share a layer: every result is right, whichever thread filled the memo."""
    errors = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(200):
                x = torch.randn(3, 4, generator=generator)
                y = layer(x)
                ladj = layer.log_abs_det_jacobian(x, y)
                good = reference.log_abs_det_jacobian(x, y)
                if not (torch.allclose(layer.inv(y), x, atol=1e-4) and torch.allclose(ladj, good, atol=1e-5)):
                    errors.append(seed)

    reference = layer.with_cache(0)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_known_hole_an_edit_of_data_between_sampling_and_scoring(layer, x):
    """Pinned, not promised: ``.data`` does not bump versions, so scoring the same tensor object uses the old entry."""
    y = layer(x)
    for p in layer.parameters():
        p.data += 1.0
    assert layer.inv(y) is x
    layer.clear_cache()  # the remedy
    assert layer.inv(y) is not x


def test_known_limit_the_graph_of_a_remembered_inverse_does_not_pass_through_y(layer, x):
    """As with torch's own cache: autograd raises an error, but not with cache_size=0 or a detached y."""
    y = layer(x)
    with pytest.raises(RuntimeError, match=r"not have been used|does not require grad"):
        torch.autograd.grad(layer.inv(y).sum(), y)
    for t, point in ((layer.with_cache(0), layer(x)), (layer, y.detach().requires_grad_())):
        assert torch.autograd.grad(t.inv(point).sum(), point)[0].isfinite().all()


def test_forward_hooks_fire(x):
    seen = []
    layer = pf.orthogonal(4)
    layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    layer(x)
    assert seen == [x.shape]
    chain = pf.Chain([layer, pf.baird(4)])
    y, ladj = pf.call_and_ladj(chain, x)
    assert seen == [x.shape] * 2
    torch.testing.assert_close(chain.inv(y.clone()), x)
    assert ladj.shape == (5,)


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_hooks_fire_inside_a_chain(x, recompute):
    layer = scatter(pf.svd_linear(4))
    seen = []
    layer.register_full_backward_hook(lambda module, to_input, to_output: seen.append(to_output[0].clone()))
    chain = pf.Chain([pf.shift(4), layer, pf.baird(4)], recompute=recompute)
    y, ladj = pf.call_and_ladj(chain, x.requires_grad_())
    grads = torch.autograd.grad((y.square() + ladj.unsqueeze(-1)).sum(), [x, *layer.parameters()])
    (to_output,) = seen
    middle = layer(chain[0](x)).detach().requires_grad_()
    out, term = pf.call_and_ladj(chain[2], middle)
    (expected,) = torch.autograd.grad(out.square().sum() + 4 * term.sum(), middle)
    torch.testing.assert_close(to_output, expected)
    layer._backward_hooks.clear()
    y, ladj = pf.call_and_ladj(chain, x)
    plain = torch.autograd.grad((y.square() + ladj.unsqueeze(-1)).sum(), [x, *layer.parameters()])
    for a, b in zip(grads, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_requires_grad_is_part_of_the_stamp():
    """Staged training: parameters that were frozen while sampling must get gradients afterwards."""
    chain = scatter(pf.Chain([pf.diagonal(3), pf.svd_linear(3)]), 0.3)
    results = []
    for cache_size in (0, 1):
        t = chain.with_cache(cache_size)
        d = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [t])
        torch.manual_seed(0)
        chain[1].requires_grad_(False)
        y = d.rsample((5,))
        chain[1].requires_grad_(True)
        loss = d.log_prob(y).sum() - y.square().sum()
        results.append(torch.autograd.grad(loss, list(chain.parameters()), allow_unused=True))
    for cold, warm in zip(*results, strict=True):
        torch.testing.assert_close(warm, cold, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_score_with_respect_to_its_own_sample():
    """The gradient of y, by retain_grad or of a leaf: the remembered x would lack the path through y."""
    layer = scatter(pf.svd_linear(3), 0.3)
    for trainable in (True, False):
        layer.requires_grad_(trainable)
        grads = []
        for cache_size in (0, 1):
            d = dist.TransformedDistribution(
                dist.Normal(torch.zeros(3), 1.0).to_event(1), [layer.with_cache(cache_size)]
            )
            torch.manual_seed(0)
            y = d.rsample((2,))
            if trainable:
                y.retain_grad()
            else:
                y.requires_grad_()
            (d.log_prob(y) - 0.5 * y.square().sum(-1)).sum().backward()
            grads.append(y.grad)
        torch.testing.assert_close(*grads)


def test_modes_of_sub_modules_and_autocast_are_part_of_the_stamp(x):
    layer = pf.AffineCoupling(2, torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5)))
    y = layer(x)
    layer.hypernet.eval()
    assert layer.inv(y) is not x
    chain = pf.Chain([layer])
    chain.train()
    y = chain(x)
    layer.eval()
    assert chain.inv(y) is not x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert layer.inv(y) is not x
    with torch.autocast("cpu", dtype=torch.float16):
        y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.inv(y) is not x


def test_swapped_data_and_foreign_tensors_are_part_of_the_stamp(layer, x):
    y = layer(x)
    layer.hypernet.half().float()
    assert layer.inv(y) is not x
    y = layer(x)
    flat = torch.nn.utils.parameters_to_vector(layer.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat + 1, layer.parameters())
    assert layer.inv(y) is not x
    loc = torch.zeros(4)
    chain = pf.Chain([torch.distributions.transforms.AffineTransform(loc, 2.0), pf.shift(4)])
    y = chain(x)
    loc += 5.0
    torch.testing.assert_close(chain.inv(y), x - 2.5)


def test_one_pass_functions_use_the_entry_up(layer, x):
    y = layer(x)
    pf.inv_and_ladj(layer, y)
    assert layer._memo is None
    counter = Counter(layer)
    pf.inv_and_ladj(layer, y)
    assert counter.take() == 1


def test_a_used_layer_is_no_reference_cycle():
    """Otherwise every step's conditioned layer, with its graph, would live until the garbage collector runs."""
    conditional = pf.conditional_svd_linear(4, 2)
    gc.collect()
    gc.disable()
    try:
        layer = conditional.condition(torch.randn(10, 2))
        y = layer(torch.randn(10, 4))
        inverse = layer.inv
        assert layer.inv == inverse
        assert inverse.inv is layer
        (y + inverse(y.detach())).sum().backward()
        alive = [weakref.ref(layer), weakref.ref(y)]
        del layer, y, inverse
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


# ---------------------------------------------------------------------- for every layer


def _optimisers(parameters):
    yield from (make(parameters) for make in OPTIMISERS.values())
    yield torch.optim.Adam(parameters, lr=0.01)
    yield torch.optim.SGD(parameters, lr=0.01, momentum=0.9, foreach=True)
    yield torch.optim.RMSprop(parameters, lr=0.01)


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_training_with_and_without_it_is_the_same(case, dim):
    """Sample, score, step, score the same tensor again: under seven optimisers."""
    template = case.build(dim)
    if not list(template.parameters()):
        pytest.skip("nothing to train")
    noise = case.points(dim, (5,))
    trained = []
    for cache_size in (0, 1):
        results = []
        for i in range(len(OPTIMISERS) + 3):
            layer = copy.deepcopy(template).with_cache(cache_size)
            optimiser = list(_optimisers([p for p in layer.parameters() if p.requires_grad]))[i]
            for _ in range(2):
                y = layer(noise)
                x = layer.inv(y)
                loss = layer.log_abs_det_jacobian(x, y).mean() + y.square().mean() - inv_and_ladj(layer, y)[1].mean()
                optimiser.zero_grad()
                loss.backward()
                for p in layer.parameters():
                    if p.grad is not None:
                        p.grad.clamp_(-1.0, 1.0)
                y = layer(noise)
                optimiser.step()
                results.append(torch.cat([t.detach().reshape(-1) for t in inv_and_ladj(layer, y)]))
            results.append(torch.nn.utils.parameters_to_vector(layer.parameters()).detach())
        trained.append(torch.cat(results))
    cold, warm = trained
    assert cold.isfinite().all()
    assert ((cold - warm).abs() <= 1e-8 * (1 + cold.abs())).all()


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_eight_threads_share_a_layer(case, dim):
    """Each samples and scores points of its own; the answers are those that it gets alone."""
    layer = case.build(dim)
    points = [case.points(dim, (3,), seed=i) for i in range(8)]

    def score(x):
        y = layer(x)
        return layer.inv(y), layer.log_abs_det_jacobian(x, y), inv_and_ladj(layer, y)[1]

    with torch.no_grad():
        alone = [score(x) for x in points]
    wrong = []

    def work(x, expected):
        with torch.no_grad():
            for _ in range(5):
                if not all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in zip(score(x), expected, strict=True)):
                    wrong.append(x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(points, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_checkpointing_a_score_of_a_fresh_sample(case, dim):
    """The second run of a checkpointed region must do what the first one did, though a sample is remembered."""
    layer = case.build(dim)
    trained = [p for p in layer.parameters() if p.requires_grad and p.numel()]
    if not trained:
        pytest.skip("nothing to train")

    def score(y):
        x, ladj = inv_and_ladj(layer, y)
        again = layer.inv(y)
        return (ladj - x.square().flatten(ladj.dim()).sum(-1) if x.dim() > ladj.dim() else ladj).sum() + (
            layer.log_abs_det_jacobian(again, y).sum()
        )

    points = case.points(dim, (3,))
    y = layer(points)
    (checkpointed,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(score, y, use_reentrant=False), trained[:1])
    # the same without a memo, and without checkpointing
    y = layer.with_cache(0)(points)
    (plain,) = torch.autograd.grad(score(y.clone()), trained[:1])
    torch.testing.assert_close(checkpointed, plain, rtol=1e-7, atol=1e-9)
