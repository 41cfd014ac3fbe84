"""A layer's results depend only on its parameters, buffers and settings: a layer with the same ones is the same."""

from __future__ import annotations

import copy
import sys
import warnings
from contextlib import contextmanager

import pyro.distributions as dist
import pytest
import torch
from cases import CASES, CONDITIONAL, SMALL, image_base, scatter
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.multiprocessing.spawn import spawn

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj

F64 = torch.float64
CONTEXT_DIM = 2


class Both(nn.Module):
    """A layer's two directions and log-dets as one module's output."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, y):
        return *call_and_ladj(self.layer, x), *inv_and_ladj(self.layer, y)


def two(case, dim):
    """Return two instances that differ in every parameter and constant, a point and an image under the first."""
    one, other = case.build(dim, seed=1), case.build(dim, seed=2)
    y = one(case.points(dim, seed=3)).detach().clone()
    return one, other, (case.points(dim, seed=4), y)


def tensors(module):
    """Return parameters and buffers by name, including buffers that are not saved."""
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


def same(actual, expected, tolerance=1e-12):  # rounding: without a gradient some layers take another path
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


@contextmanager
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # this fills empty tensors with NaN, which no layer survives
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------- copied tensors


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_loading_a_state_makes_it_that_layer(case, dim):
    one, other, points = two(case, dim)
    Both(other)(*points)  # so that everything that can be remembered is remembered
    other.load_state_dict(one.state_dict())
    same(Both(other)(*points), Both(one)(*points))


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_copying_every_tensor_makes_it_that_layer(case, dim):
    one, other, points = two(case, dim)
    Both(other)(*points)
    mine, theirs = tensors(one), dict((*other.named_parameters(), *other.named_buffers()))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        theirs[name].data.copy_(value)
    same(Both(other)(*points), Both(one)(*points))


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_functional_call_with_another_ones_tensors(case, dim):
    one, other, points = two(case, dim)
    before = Both(other)(*points)
    state = {f"layer.{name}": value for name, value in tensors(one).items()}
    same(functional_call(Both(other), state, points), Both(one)(*points))
    same([functional_call(other, tensors(one), points[:1])], [one(points[0])])
    same(Both(other)(*points), before)  # the calls above did not change it


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_an_ensemble_under_vmap(case, dim):
    one, other, points = two(case, dim)
    expected = [torch.stack(pair) for pair in zip(Both(one)(*points), Both(other)(*points), strict=True)]
    stacked = stack_module_state([Both(one), Both(other)])
    if not any(stacked):
        return  # no tensors, hence nothing to stack: the layer consists of its settings
    shell = copy.deepcopy(Both(other)).to("meta")  # torch's recipe: only the settings are used
    together = torch.func.vmap(lambda p, b: functional_call(shell, (p, b), points))(*stacked)
    same(together, expected, tolerance=1e-8)


def test_a_permutation_is_what_its_buffer_says():
    """This holds however the layer was built: a reversal is a permutation like any other."""
    reversal, other = pf.Permute([3, 2, 1, 0]), pf.Permute([1, 2, 3, 0])
    x = torch.arange(4.0)
    for layer, source in ((reversal, other), (other, pf.Permute([3, 2, 1, 0]))):
        layer.permutation.copy_(source.permutation)
        assert torch.equal(layer(x), x[source.permutation])
        assert torch.equal(layer.inv(x), source.inv(x))
        assert torch.equal(layer.inv(layer(x).clone()), x)


@pytest.mark.parametrize("case", CONDITIONAL)
def test_conditional_layers_too(case):
    dim = case.dims[min(1, len(case.dims) - 1)]
    pair = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pair.append(scatter(case.conditional(dim, CONTEXT_DIM).double(), 0.5))
    one, other = pair
    context, x = torch.randn(3, CONTEXT_DIM, dtype=F64), image_base(case.event(dim)).sample((3,))
    expected = Both(one.condition(context))(x, x)
    with torch.device("meta"):
        empty = case.conditional(dim, CONTEXT_DIM).double()
    with uninitialised_memory_is_nan():
        empty.to_empty(device="cpu")
    for new in (other, empty):
        new.load_state_dict(one.state_dict())
        same(Both(new.condition(context))(x, x), expected)


# ---------------------------------------------------------------------- without values at first


def emptied(make):
    """Yield the ways to obtain a module whose tensors have yet to be loaded."""
    with torch.device("meta"):
        on_meta = make()
    moved, here = copy.deepcopy(on_meta).double(), make().double()
    with uninitialised_memory_is_nan():
        yield on_meta.double().to_empty(device="cpu"), {}
        yield copy.deepcopy(here).to_empty(device="cpu"), {}
        yield here.to("meta").to_empty(device="cpu"), {}
    yield moved, {"assign": True}


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_built_without_values_and_loaded(case, dim):
    one, _, points = two(case, dim)
    expected = Both(one)(*points)
    for new, how in emptied(lambda: case.make(dim)):
        new.load_state_dict(one.state_dict(), **how)
        same(Both(new)(*points), expected)
        same(Both(copy.deepcopy(new))(*points), expected)


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_reset_parameters_refills_what_a_state_does_not_hold(case, dim):
    one, other, points = two(case, dim)
    saved = one.state_dict().keys()
    for name, buffer in other.named_buffers():
        if name not in saved:
            buffer.fill_(float("nan"))
    for module in other.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with torch.no_grad():
        for name, value in other.state_dict().items():
            value.copy_(one.state_dict()[name])
    same(Both(other)(*points), Both(one)(*points))


def noisy_flow():
    base = dist.Normal(torch.zeros(3), torch.ones(3), validate_args=False).to_event(1)
    parts = [pf.affine_coupling(3, [8]), pf.inject_noise(3, 2, name="e"), pf.permute(5), pf.affine_coupling(5, [8])]
    return pf.Flow(base, parts)


def scales():
    base = dist.Normal(torch.zeros(2), torch.ones(2), validate_args=False).to_event(1)
    return pf.Flow(base, pf.multi_scale(8, num_scales=3, layers=lambda d: pf.affine_coupling(d, [8])))


@pytest.mark.parametrize("make", [noisy_flow, scales])
def test_flows_with_injected_noise_built_without_values(make):
    flow = scatter(make().double(), 0.5)
    with torch.no_grad():
        for buffer in flow.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
    y = flow().sample((7,))
    expected = flow().log_prob(y)
    for new, how in emptied(make):
        new.load_state_dict(flow.state_dict(), **how)
        same([new().log_prob(y)], [expected])
        draws = []
        for module in (flow, new):
            torch.manual_seed(5)
            draws.append(module().rsample((4,)))
        same(draws[:1], draws[1:])


# ---------------------------------------------------------------------- several processes


class Score(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, y):
        return (self.flow().log_prob(y),)


def _score_on_every_rank(rank, path):
    """Build every layer from the rank's own seed, take the tensors of rank 0 as DDP does, and score the same points."""
    sys.path[:] = [p for p in sys.path if p]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)

    def from_first(tensor):
        tensor = tensor.detach().clone()
        torch.distributed.broadcast(tensor, 0)
        return tensor

    results = {}
    try:
        for case in CASES:
            dim = case.dims[min(1, len(case.dims) - 1)]
            torch.manual_seed(rank)  # where two elements are permuted, one rank draws the reversal
            module = Both(scatter(case.make(dim).double()))
            if any(p.requires_grad for p in module.parameters()):
                module = nn.parallel.DistributedDataParallel(module)
            else:  # DDP refuses modules without trainable parameters
                for buffer in module.buffers():
                    buffer.copy_(from_first(buffer))
            x = case.points(dim)
            with torch.no_grad():
                y = from_first(getattr(module, "module", module).layer(x))
                results[case.name] = module(x, y)
        torch.manual_seed(rank)
        y = torch.ones(3, 5, dtype=F64)
        results["noise"] = nn.parallel.DistributedDataParallel(Score(scatter(noisy_flow().double())))(y)
        torch.save({name: [t.detach() for t in value] for name, value in results.items()}, f"{path}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_with_equal_states_compute_equal_densities(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spawn(_score_on_every_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() == {*(case.name for case in CASES), "noise"}
    for name, values in first.items():
        for a, b in zip(values, second[name], strict=True):
            assert torch.equal(a, b), name
