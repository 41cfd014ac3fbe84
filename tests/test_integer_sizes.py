"""Sizes may be integers of numpy or torch; layers keep Python's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import CONDITIONAL, SMALL
from torch import nn

import pyro_invflows as pf
from pyro_invflows import solvers


def strangers(value: Any, path: str = "", seen: set[int] | None = None) -> Iterator[str]:
    """Search a layer for integers that are not Python's."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (np.generic, np.ndarray)):
        yield f"{path}: {value!r}"
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from strangers(entry, f"{path}.{name}", seen)
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            yield from strangers(entry, f"{path}[{i}]", seen)
    elif type(value).__module__.startswith(("pyro_invflows", "torch.nn")) and not isinstance(value, torch.Tensor):
        yield from strangers(vars(value), f"{path}({type(value).__name__})", seen)


def same(layer: nn.Module, expected: nn.Module) -> None:
    assert not list(strangers(layer))
    assert repr(layer) == repr(expected)
    shapes = {name: tensor.shape for name, tensor in expected.state_dict().items()}
    assert {name: tensor.shape for name, tensor in layer.state_dict().items()} == shapes


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_input_dim(case, dim):
    same(case.make(np.int64(dim)), case.make(dim))


@pytest.mark.parametrize("case", CONDITIONAL)
def test_context_dim(case):
    dim = case.dims[min(1, len(case.dims) - 1)]
    same(case.conditional(np.int32(dim), np.int64(2)), case.conditional(dim, 2))


#: Every other size of every constructor; each is called with the integer type to use.
SIZES = {
    "dim": lambda i: pf.Diagonal(i(3), dim=i(-3)),
    "dim of a factory": lambda i: pf.affine_coupling(i(4), dim=i(-3)),
    "dim of a residual": lambda i: pf.contractive_residual(i(2), dim=i(-3)),
    "dim of a contraction": lambda i: pf.contractive_residual(i(2), [i(4)], dim=i(-1), context_dim=i(3)),
    "dim of a whitening": lambda i: pf.whitening(i(2), dim=i(-3)),
    "dim of a permutation": lambda i: pf.permute(i(3), dim=i(-2)),
    "permutation": lambda i: pf.Permute([i(1), i(0)]),
    "shape": lambda i: pf.PReLU(i(3)),
    "shapes": lambda i: pf.Baird((i(3), i(2))),
    "split_dim": lambda i: pf.affine_coupling(i(5), [i(8), i(8)], split_dim=i(2), context_dim=i(2)),
    "default split": lambda i: pf.affine_coupling(i(5)),
    "coupling": lambda i: pf.AffineCoupling(i(2), nn.Linear(2, 6), input_dim=i(5)),
    "coupling constants": lambda i: pf.AffineCoupling(i(0), None, input_dim=i(5)),
    "num_reflections": lambda i: pf.orthogonal(i(4), num_reflections=i(3)),
    "num_reflections of svd": lambda i: pf.svd_linear(i(4), num_reflections=i(3)),
    "hidden_dim": lambda i: pf.sylvester(i(4), i(2), num_reflections=i(3)),
    "generalized": lambda i: pf.generalized_sylvester(i(4), [i(5)], num_reflections=i(2), context_dim=i(2)),
    "default widths": lambda i: pf.generalized_sylvester(i(30)),
    "autoregressive": lambda i: pf.affine_autoregressive(i(3), [i(4)], ordering=[i(2), i(0), i(1)], context_dim=i(2)),
    "bins": lambda i: pf.spline_autoregressive(i(3), [i(4)], num_bins=i(4)),
    "rank": lambda i: pf.low_rank_linear(i(4), i(2)),
    "residual": lambda i: pf.low_rank_residual(i(9), i(2)),
    "default rank": lambda i: pf.low_rank_linear(i(4)),
    "iresnet": lambda i: pf.iresnet(i(4), i(2), num_blocks=i(3)),
    "upscale_factor": lambda i: pf.PixelShuffle(i(3)),
    "stack": lambda i: pf.stack(i(2), lambda: pf.diagonal(i(2))),
    "conditional": lambda i: pf.Conditional(pf.diagonal(3), i(2), hidden_dims=[i(4)], event_dim=i(2)),
    "hidden of a context": lambda i: pf.conditional_diagonal(i(3), i(2), context_hidden_dims=(i(4),)),
    "dense": lambda i: pf.networks.dense_network(i(2), [i(3)], i(4)),
    "convolutional": lambda i: pf.networks.conv_network(i(2), [i(3)], i(4), spatial_dims=i(1)),
    "masked": lambda i: pf.networks.masked_network(i(3), [i(4)], i(2), context_dim=i(1)),
    "linear contraction": lambda i: pf.networks.LinearContraction(i(2), i(3)),
    "convolution": lambda i: pf.networks.Conv2dContraction(i(2), i(3), i(5)),
    "contractive": lambda i: pf.networks.ContractiveMLP(
        i(2), [i(3)], context_dim=i(2), context_hidden_dims=[i(4), i(5)]
    ),
    "contractive of images": lambda i: pf.networks.contractive_conv_network(i(2), [i(3)]),
    "noise": lambda i: pf.inject_noise(i(3), i(2)),
    "whitened noise": lambda i: pf.whitened_noise(i(2)),
    "scales": lambda i: pf.multi_scale(i(8), num_scales=i(2), layers=pf.diagonal),
}


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
@pytest.mark.parametrize("name", SIZES)
def test_other_sizes(name, kind):
    same(SIZES[name](lambda n: kind(n) if n >= 0 or kind is not np.uint8 else np.int8(n)), SIZES[name](int))


def test_widths_as_an_array():
    expected = pf.affine_coupling(4, [8, 6])
    for widths in (np.array([8, 6]), torch.tensor([8, 6])):
        same(pf.affine_coupling(4, widths), expected)


def test_settings():
    two = np.int64(2)
    y = torch.tensor([[0.5]])
    for solver in (solvers.Newton(max_steps=two, max_halvings=two, polish=two), solvers.Anderson(memory=two)):
        assert solver(lambda x, y: x - y, y, y).converged.all()
    assert solvers.Bisection(max_growth=two)(lambda x: x - y, y).converged.all()
    net = pf.networks.ContractiveMLP(3, [4])
    for estimator in (
        pf.logdet.PowerSeries(num_terms=two, num_probes=two),
        pf.logdet.RussianRoulette(num_exact_terms=two),
        pf.logdet.Exact(max_event_size=np.int64(9)),
    ):
        layer = pf.ContractiveResidual(net, log_det=estimator)
        assert layer.log_abs_det_jacobian(torch.zeros(2, 3), torch.zeros(2, 3)).shape == (2,)
    flow = pf.Flow(dist.Normal(torch.zeros(3), 1.0).to_event(1), [pf.diagonal(3)])
    assert flow().log_prob(torch.zeros(2, 3), num_particles=two).shape == (2,)
    assert pf.linalg.spectral_norm(torch.eye(3), max_steps=two).item() == pytest.approx(1.0)


@pytest.mark.parametrize("value", [2.0, np.float64(2.0), "2", True, np.bool_(True), torch.tensor(2.0), [2]], ids=str)
def test_what_is_not_an_integer(value):
    with pytest.raises(TypeError, match="must be an int"):
        pf.LowRankLinear(4, value)
    with pytest.raises(TypeError, match="must be an int"):
        pf.LowRankLinear(value)
    with pytest.raises(TypeError, match="must be an int"):
        pf.Diagonal(2, dim=value)
    with pytest.raises(TypeError, match="each of hidden_dims must be an int"):
        pf.affine_coupling(4, [8, value])
