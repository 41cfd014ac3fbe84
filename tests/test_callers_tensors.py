"""The caller's tensors are never written to, not even by a network that works in place."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from cases import CONDITIONAL, SMALL, scatter
from torch import Tensor, nn

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj


class _Watched:
    """A tensor of the caller, with its original value."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.copy, self.version = value, value.detach().clone(), value._version

    def assert_untouched(self) -> None:
        assert self.value._version == self.version
        assert torch.equal(self.value, self.copy)


def use(layer, x: Tensor, y: Tensor, context: Tensor | None = None) -> list[Tensor]:
    """Call every entry point with and without gradients; no argument may change."""
    results: list[Tensor] = []
    for grad in (False, True):
        x, y = x.detach().clone().requires_grad_(grad), y.detach().clone().requires_grad_(grad)
        given = [_Watched(x), _Watched(y)] + ([] if context is None else [_Watched(context)])
        with torch.set_grad_enabled(grad):
            found = [
                *call_and_ladj(layer, x),
                *inv_and_ladj(layer, y),
                layer.with_cache(0)(x),
                layer.with_cache(0).inv(y),
                layer.with_cache(0).log_abs_det_jacobian(x, y),
            ]
        if grad:
            inputs = [x, y, *layer.parameters()]
            found += torch.autograd.grad(sum(t.sum() for t in found), inputs, allow_unused=True)
        for watched in given:
            watched.assert_untouched()
        results += [t.detach() for t in found if t is not None]
    return results


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_what_a_layer_is_given_stays_as_it_is(case, dim):
    layer, x = case.build(dim), case.points(dim)
    use(layer, x, layer(x))


@pytest.mark.parametrize("case", CONDITIONAL)
def test_so_does_a_context(case):
    dim = case.dims[min(1, len(case.dims) - 1)]
    conditional, x = scatter(case.conditional(dim, 2).double(), 0.2), case.points(dim)
    context = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    watched = _Watched(context)
    layer = conditional.condition(context)
    use(layer, x, layer(x), context)
    watched.assert_untouched()


def _relu(inplace: bool) -> nn.Module:
    return nn.ReLU(inplace=inplace)


def _elu(inplace: bool) -> nn.Module:
    return nn.ELU(inplace=inplace)


def _contraction(inplace: bool) -> nn.Sequential:
    return nn.Sequential(
        _elu(inplace), pf.networks.LinearContraction(4, 6), _relu(inplace), pf.networks.LinearContraction(6, 4)
    )


#: Layers whose networks start, or continue, with an in-place module; event (4,) or (4, 2, 3).
IN_PLACE = {
    "coupling": lambda i: pf.AffineCoupling(2, nn.Sequential(_relu(i), nn.Linear(2, 4))),
    "coupling, nested": lambda i: pf.AffineCoupling(
        2, nn.Sequential(nn.Identity(), nn.Sequential(_elu(i), nn.Linear(2, 4))), keep="last"
    ),
    "coupling, inside": lambda i: pf.affine_coupling(4, [5], activation=partial(_relu, i)),
    "coupling with a context": lambda i: pf.AffineCoupling(2, nn.Sequential(_relu(i), nn.Linear(3, 4)), context_dim=1),
    "coupling of images": lambda i: pf.AffineCoupling(2, nn.Sequential(_elu(i), nn.Conv2d(2, 4, 1)), dim=-3),
    "generalized sylvester": lambda i: pf.generalized_sylvester(4, [5], activation=partial(_elu, i)),
    "low rank": lambda i: pf.low_rank_residual(4, 2, activation=partial(_relu, i)),
    "low rank, sandwich": lambda i: pf.low_rank_residual(4, 2, form="sandwich", activation=partial(_relu, i)),
    "low rank, order 2": lambda i: pf.low_rank_residual(4, 2, form="sandwich", activation=partial(_elu, i), order=2),
    "contractive": lambda i: pf.contractive_residual(4, [5], activation=partial(_elu, i)),
    "contractive of images": lambda i: pf.contractive_residual(4, [5], dim=-3, activation=partial(_elu, i)),
    "contraction": lambda i: pf.ContractiveResidual(_contraction(i)),
}


def _points(name: str) -> Tensor:
    event = (4, 2, 3) if "images" in name else (4,)
    return torch.randn(1, *event, dtype=torch.float64)  # a batch of one image is flattened without a copy


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_network_that_works_in_place_computes_the_same(name):
    torch.manual_seed(3)
    layer = scatter(IN_PLACE[name](True).double())
    plain = IN_PLACE[name](False).double()
    plain.load_state_dict(layer.state_dict())
    x = _points(name)
    y = plain(x).detach()
    for got, expected in zip(use(layer, x, y), use(plain, x, y), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.inv(y.clone()), x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", IN_PLACE)
def test_it_does_so_under_functorch_and_in_inference_mode(name):
    layer, plain = IN_PLACE[name](True).double(), IN_PLACE[name](False).double()
    plain.load_state_dict(scatter(layer).state_dict())
    x = torch.cat([_points(name), _points(name)])
    y = plain(x).detach()
    for run, value in ((call_and_ladj, x), (inv_and_ladj, y)):
        expected = run(plain, value.clone())
        watched = _Watched(value)
        torch.testing.assert_close(torch.vmap(lambda v, r=run: r(layer, v))(value), expected)
        with torch.inference_mode():
            torch.testing.assert_close(run(layer, value), tuple(t.detach() for t in expected))
        watched.assert_untouched()


def test_modules_may_be_exchanged_for_ones_that_work_in_place():
    layer = scatter(pf.low_rank_residual(4, 2, form="sandwich", activation=nn.ReLU).double())
    x = _points("")
    y = layer(x).detach()
    layer.activation = nn.ReLU(inplace=True)
    torch.testing.assert_close(layer.inv(y.clone()), x, rtol=1e-8, atol=1e-8)


class _WritesFirst(nn.Module):
    """Works in place without an attribute that shows it."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.lipschitz = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x.relu_())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        pf.AffineCoupling(2, _WritesFirst(nn.Linear(2, 4))),
        pf.AffineCoupling(2, _WritesFirst(nn.Conv2d(2, 4, 1)), dim=-3),
        pf.ContractiveResidual(_WritesFirst(pf.networks.LinearContraction(4, 4))),
    ],
    ids=["coupling", "images", "contraction"],
)
def test_one_that_does_not_say_so_is_caught(layer, grad):
    x = torch.randn(1, *((4, 2, 3) if layer.dim == -3 else (4,)))
    with (
        torch.set_grad_enabled(grad),
        pytest.raises((ValueError, RuntimeError), match=r"must not write to its input|in-place operation"),
    ):
        call_and_ladj(layer, x)


class _Keeps(nn.Module):
    """Returns a tensor that it keeps."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.kept.expand(*x.shape[:-1], -1)


@pytest.mark.parametrize("max_log_scale", [2.0, 1.3])
@pytest.mark.parametrize("scale", ["tanh", None])
def test_what_a_network_keeps_stays_as_it_is(scale, max_log_scale):
    network = _Keeps(4 if scale else 2).double()
    layer = pf.AffineCoupling(2, network, scale=scale, max_log_scale=max_log_scale)
    kept = _Watched(network.kept)
    x = _points("")
    use(layer, x, layer(x))
    kept.assert_untouched()


def test_a_copy_of_a_layer_keeps_the_promise():
    layer = copy.deepcopy(IN_PLACE["coupling"](True).double())
    x = -_points("").abs()
    watched = _Watched(x)
    layer(x)
    watched.assert_untouched()


class _InPlace(pf.Elementwise):
    """Doubles its input in place."""

    def _function(self, x: Tensor) -> Tensor:
        return x.mul_(2)

    def _inverse_function(self, y: Tensor) -> Tensor:
        return y / 2


def test_the_conformance_checks_find_a_layer_that_breaks_it():
    with pytest.raises(pf.testing.BrokenPromiseError, match="writes to the x"):
        pf.testing.check_batch(_InPlace(), torch.ones(3, 2))


@pytest.mark.parametrize("name", ["coupling", "low rank, sandwich"])
def test_it_is_kept_in_compiled_code(name):
    layer = scatter(IN_PLACE[name](True).double())
    y = _points(name)
    watched = _Watched(y)
    compiled = torch.compile(lambda v: call_and_ladj(layer, v), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(y), call_and_ladj(layer, y.clone()))
    watched.assert_untouched()
