"""Affine coupling flows of the same size in this library and in its peers.

Each builder makes eight couplings with scale and shift over 64 elements, half of which stay unchanged, with dense
ReLU networks of hidden widths 128 and 128, over a standard normal base. Each library alternates the halves in its own
way: by a permutation here, in Pyro and in normflows, by alternating masks in zuko and nflows.

Every library runs with its own default of argument validation: on here and in Pyro, off in zuko (whose import
switches it off everywhere), absent in nflows and normflows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import nflows.distributions
import nflows.flows
import nflows.nn.nets
import nflows.transforms
import normflows
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
import torch.nn.functional as F
import zuko
from torch import Tensor, nn

from pyro_invflows import Chain, Flow, affine_coupling
from pyro_invflows.networks import dense_network

__all__ = ["DIM", "FlowContestant", "bare_networks", "coupling_flows", "set_weights"]

DIM = 64
HIDDEN = (128, 128)
COUPLINGS = 8


@dataclass
class FlowContestant:
    """A flow: how it scores ``(N, DIM)`` and how it draws N points, as its library's users write it."""

    parameters: list[nn.Parameter]
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    validates: bool


def set_weights(*modules: nn.Module) -> list[nn.Parameter]:
    """Set the weights of every dense layer away from zero, by the same rule, and return all parameters."""
    parameters = []
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.5 / layer.in_features**0.5)
                nn.init.normal_(layer.bias, std=0.1)
        parameters += list(module.parameters())
    return parameters


def _flip() -> list[int]:
    return list(range(DIM))[::-1]


def _standard_normal() -> dist.Distribution:
    return dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1)


def _alternate(couplings: list, between: Callable[[], object]) -> list:
    parts = []
    for coupling in couplings:
        parts += [between(), coupling] if parts else [coupling]
    return parts


def our_layers() -> list[nn.Module]:
    """Return couplings of this library; the halves stay unchanged in turn, as with the masks of nflows and zuko."""
    return [affine_coupling(DIM, HIDDEN, keep="last" if i % 2 else "first") for i in range(COUPLINGS)]


def invflows_flow() -> FlowContestant:
    """This library through ``Flow``; the distribution is rebuilt in each call, as in training."""
    flow = Flow(_standard_normal(), our_layers())
    return FlowContestant(set_weights(flow), lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), True)


def invflows_plain() -> FlowContestant:
    """This library's layers in a plain ``TransformedDistribution``."""
    layers = our_layers()
    d = dist.TransformedDistribution(_standard_normal(), layers)
    return FlowContestant(set_weights(*layers), d.log_prob, lambda n: d.sample((n,)), True)


def invflows_plain_chain() -> FlowContestant:
    """The same as one ``Chain``."""
    chain = Chain(our_layers())
    d = dist.TransformedDistribution(_standard_normal(), [chain])
    return FlowContestant(set_weights(chain), d.log_prob, lambda n: d.sample((n,)), True)


def pyro_flow() -> FlowContestant:
    """Pyro's couplings and permutations in its ``TransformedDistribution``."""
    couplings = [pyro_transforms.affine_coupling(DIM, list(HIDDEN)) for _ in range(COUPLINGS)]
    parts = _alternate(couplings, lambda: pyro_transforms.Permute(torch.tensor(_flip())))
    d = dist.TransformedDistribution(_standard_normal(), parts)
    return FlowContestant(set_weights(*couplings), d.log_prob, lambda n: d.sample((n,)), True)


def zuko_flow() -> FlowContestant:
    """The ``RealNVP`` of zuko; its distribution is rebuilt in each call, as in its manual."""
    flow = zuko.flows.RealNVP(DIM, transforms=COUPLINGS, hidden_features=HIDDEN)
    return FlowContestant(set_weights(flow), lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), False)


class _NflowsNet(nflows.nn.nets.MLP):
    """nflows passes a context to its networks, but its own MLP takes none."""

    def forward(self, inputs: Tensor, context: None = None) -> Tensor:
        return super().forward(inputs)


def nflows_flow() -> FlowContestant:
    """Affine couplings of nflows with its MLP, with masks of alternating halves."""
    half = torch.arange(DIM) >= DIM // 2
    layers = [
        nflows.transforms.AffineCouplingTransform(
            (half if i % 2 == 0 else ~half).long(),
            lambda n, m: _NflowsNet((n,), (m,), list(HIDDEN), activation=F.relu),
        )
        for i in range(COUPLINGS)
    ]
    base = nflows.distributions.StandardNormal([DIM])
    flow = nflows.flows.Flow(nflows.transforms.CompositeTransform(layers), base)
    return FlowContestant(set_weights(flow), flow.log_prob, flow.sample, False)


def normflows_flow(scale_map: str = "exp", forward_only: bool = False) -> FlowContestant:
    """Coupling blocks of normflows with its MLP and its swap.

    Its ``sample`` computes the log-density too; ``forward_only`` draws with the bare forward passes alone.
    """
    half = DIM // 2
    blocks = [
        normflows.flows.AffineCouplingBlock(normflows.nets.MLP([half, *HIDDEN, 2 * half]), scale_map=scale_map)
        for _ in range(COUPLINGS)
    ]
    parts = _alternate(blocks, lambda: normflows.flows.Permute(DIM, mode="swap"))
    base = normflows.distributions.DiagGaussian(DIM, trainable=False)
    model = normflows.NormalizingFlow(base, parts)

    def sample(n: int) -> Tensor:
        return model(base.sample(n)) if forward_only else model.sample(n)[0]

    return FlowContestant(set_weights(model), model.log_prob, sample, False)


def normflows_bounded_flow() -> FlowContestant:
    """The same with normflows' bounded scale, a sigmoid; the default above is an unbounded exponential."""
    return normflows_flow("sigmoid")


def coupling_flows() -> dict[str, FlowContestant]:
    """Build every contestant."""
    return {
        "invflows Flow": invflows_flow(),
        "invflows TransformedDistribution": invflows_plain(),
        "invflows TransformedDistribution(Chain)": invflows_plain_chain(),
        "pyro": pyro_flow(),
        "zuko": zuko_flow(),
        "nflows": nflows_flow(),
        "normflows": normflows_flow(),
        "normflows, bounded": normflows_bounded_flow(),
        "normflows, forward only": normflows_flow(forward_only=True),
    }


def bare_networks() -> FlowContestant:
    """The eight networks alone, each fed by the one before; their whole output is used, as cheaply as possible."""
    nets = [dense_network(DIM // 2, HIDDEN, DIM) for _ in range(COUPLINGS)]

    def run(x: Tensor) -> Tensor:
        half = x[:, : DIM // 2]
        for net in nets:
            a, b = net(half).chunk(2, dim=-1)
            half = a + b
        return half.sum(-1)

    return FlowContestant(set_weights(*nets), run, lambda n: run(torch.randn(n, DIM)), True)
