"""Whole flows as one graph: ``flow().log_prob(x)`` and ``flow(context).log_prob(x)``, layers inverted too."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.exc
from cases import CONDITIONAL, SMALL, image_base, scatter
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributions import Distribution

import pyro_invflows as pf


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
    refused = "eager inverse" in case.tags and not inverted
    with pytest.raises(torch._dynamo.exc.Unsupported) if refused else nullcontext():
        compiled_once(lambda v: flow().log_prob(v), [point], list(flow.parameters()))


@pytest.mark.parametrize("case", CONDITIONAL)
def test_conditional_flows(case):
    dim = case.dims[min(1, len(case.dims) - 1)]
    conditional = scatter(case.conditional(dim, 2).double(), 0.2)
    context = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    x = case.points(dim, (3,))
    flow = flow_of(conditional, x)
    y = flow(context).rsample().detach().requires_grad_()
    with pytest.raises(torch._dynamo.exc.Unsupported) if "eager inverse" in case.tags else nullcontext():
        compiled_once(lambda c, v: flow(c).log_prob(v), [context, y], list(flow.parameters()))
