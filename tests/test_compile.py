"""Whole flows as one graph: ``flow().log_prob(x)`` and ``flow(context).log_prob(x)``, layers inverted too."""

from __future__ import annotations

import pytest
import torch
from cases import CONDITIONAL, SMALL, image_base, scatter
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributions import Distribution

import pyro_invflows as pf
from pyro_invflows import inv_and_ladj


@pytest.fixture(autouse=True)
def _whole():
    """torch.compile switches validation off for the process; a flow built before is compiled, too."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_once(run, inputs, parameters):
    """Compile without a graph break, compare values and gradients with those of eager mode; a second call is free."""
    Distribution.set_default_validate_args(False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    results, counts = [], []
    for function in (run, compiled, compiled):
        value = function(*inputs)
        wanted = [t for t in (*inputs, *parameters) if t.requires_grad]
        grads = torch.autograd.grad(value.sum(), wanted, allow_unused=True) if value.requires_grad else []
        results.append((value, *(g for g in grads if g is not None)))
        counts.append(counter.frame_count)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-7)
    assert 0 == counts[0] < counts[1] == counts[2]


def flow_of(layer, x):
    return pf.Flow(image_base(tuple(x.shape[1:])), [layer])


@pytest.mark.parametrize("inverted", [False, True], ids=["plain", "inverted"])
@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_flows(case, dim, inverted):
    layer = case.build(dim)
    x = case.points(dim, (3,))
    y = layer(x).detach()
    flow = flow_of(pf.Inverted(layer) if inverted else layer, y if inverted else x)
    point = (x if inverted else y).clone().requires_grad_()
    compiled_once(lambda v: flow().log_prob(v), [point], list(flow.parameters()))


@pytest.mark.parametrize("case", CONDITIONAL)
def test_conditional_flows(case):
    dim = case.dims[min(1, len(case.dims) - 1)]
    conditional = scatter(case.conditional(dim, 2).double(), 0.2)
    context = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    x = case.points(dim, (3,))
    flow = flow_of(conditional, x)
    y = flow(context).rsample().detach().requires_grad_()
    compiled_once(lambda c, v: flow(c).log_prob(v), [context, y], list(flow.parameters()))


def test_events_whose_inverse_iterates_in_eager_mode():
    """Above 32 elements a contractive residual layer solves for its gradient iteratively, but not in a graph."""
    torch.manual_seed(0)
    layer = scatter(pf.contractive_residual(33, [4]).double(), 0.3)
    flow = flow_of(layer, torch.zeros(1, 33))
    y = torch.randn(3, 33, dtype=torch.float64, requires_grad=True)
    compiled_once(lambda v: flow().log_prob(v), [y], list(flow.parameters()))


#: Layers with a loop in their inverse, at parameters that take it many rounds.
HARD = {
    "planar": lambda: pf.planar(4),
    "sylvester": lambda: pf.sylvester(12, 8),
    "generalized_sylvester": lambda: pf.generalized_sylvester(3, [8]),
    "low_rank_residual": lambda: pf.low_rank_residual(6, 3, lipschitz=0.999),
}


@pytest.mark.parametrize("name", HARD)
def test_loops_end_where_those_of_eager_mode_do(name):
    torch.manual_seed(0)
    layer = HARD[name]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(3 * torch.randn_like(parameter))
        if name == "sylvester":  # d over twenty powers of ten
            layer.weight.diagonal().copy_(10.0 ** torch.linspace(-4, 8, 8).double() * torch.tensor([1, -1] * 4))
    y = layer(2 * torch.randn(50, layer.input_dim, dtype=torch.float64)).detach()
    y[0] = torch.nan
    counts = []

    def counting(graph, _):
        counts.append(len(graph.graph.nodes))
        return graph.forward

    found = torch.compile(lambda y: inv_and_ladj(layer, y), fullgraph=True, backend=counting, dynamic=False)(y)
    expected = inv_and_ladj(layer, y.clone())
    torch.testing.assert_close(layer(found[0]), y, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(layer(expected[0]), y, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert len(counts) == 1
    assert counts[0] < 800  # the loop is one node, however many rounds it may take
