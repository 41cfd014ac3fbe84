"""Layers compute with pruned tensors, and with weights normalised by torch's older functions, in both directions."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import image_base, scatter
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj
from pyro_invflows.networks import Conv2dContraction, LinearContraction

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


def _contraction() -> nn.Sequential:
    return nn.Sequential(LinearContraction(4, 6), nn.ELU(), LinearContraction(6, 4))


def _images() -> nn.Sequential:
    return nn.Sequential(Conv2dContraction(2, 3), nn.ELU(), Conv2dContraction(3, 2, 1))


#: Layers, and the paths of the tensors that are pruned.
LAYERS = {
    "diagonal": (lambda: pf.diagonal(4), ["log_scale"]),
    "shift": (lambda: pf.shift(4), ["bias"]),
    "orthogonal": (lambda: pf.orthogonal(4, bias=True), ["vectors", "bias"]),
    "svd_linear": (lambda: pf.svd_linear(4), ["log_scale", "left_vectors"]),
    "lu_linear": (lambda: pf.lu_linear(4), ["triangles"]),
    "prelu": (lambda: pf.prelu(4), ["log_slope"]),
    "planar": (lambda: pf.planar(4), ["u"]),
    "sylvester": (lambda: pf.sylvester(4), ["weight"]),
    "low_rank_linear": (lambda: pf.low_rank_linear(4, 2), ["left"]),
    "low_rank_residual": (lambda: pf.low_rank_residual(4, 3), ["weight_in", "bias_out"]),
    "low_rank_residual, sandwich": (lambda: pf.low_rank_residual(4, 3, form="sandwich"), ["weight_mid"]),
    "coupling": (lambda: pf.affine_coupling(4, [5]), ["hypernet.0.weight", "hypernet.2.weight"]),
    "generalized_sylvester": (lambda: pf.generalized_sylvester(4, [5]), ["hypernet.0.weight", "hypernet.2.bias"]),
    "contractive_residual": (
        lambda: pf.contractive_residual(4, [6, 5]),
        ["net.layers.0.weight", "net.layers.1.bias", "net.layers.2.weight"],
    ),
    "contraction": (lambda: pf.ContractiveResidual(_contraction()), ["net.0.weight", "net.2.bias"]),
    "contraction of images": (lambda: pf.ContractiveResidual(_images(), dim=-3), ["net.0.weight", "net.2.weight"]),
    "chain": (lambda: pf.Chain([pf.diagonal(4), pf.orthogonal(4)]), ["0.log_scale", "1.vectors"]),
    "recomputing chain": (
        lambda: pf.Chain([pf.diagonal(4), pf.affine_coupling(4, [5])], recompute=True),
        ["0.log_scale", "1.hypernet.0.weight"],
    ),
    "inverted": (lambda: pf.Inverted(pf.diagonal(4)), ["layer.log_scale"]),
}


def _owner(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    module, _, name = path.rpartition(".")
    return layer.get_submodule(module), name


def _event(name: str) -> tuple[int, ...]:
    return (2, 3, 3) if "images" in name else (4,)


def pair(name: str) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Return a pruned layer, an unpruned one with zeros in place of the pruned entries, and the masks."""
    make, paths = LAYERS[name]
    torch.manual_seed(1)
    pruned = scatter(make().double())
    plain = copy.deepcopy(pruned)
    masks = {}
    for path in paths:
        module, tensor = _owner(pruned, path)
        prune.l1_unstructured(module, tensor, amount=0.4)
        masks[path] = getattr(module, f"{tensor}_mask")
        with torch.no_grad():
            plain.get_parameter(path).mul_(masks[path])
    return pruned, plain, masks


def _same_gradients(pruned: nn.Module, plain: nn.Module, masks: dict[str, Tensor]) -> None:
    for path, parameter in plain.named_parameters():
        if path in masks:
            expected = None if parameter.grad is None else parameter.grad * masks[path]
            torch.testing.assert_close(pruned.get_parameter(f"{path}_orig").grad, expected, rtol=1e-6, atol=1e-8)
        else:
            torch.testing.assert_close(pruned.get_parameter(path).grad, parameter.grad, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def _descend(layer: nn.Module, masks: dict[str, Tensor]) -> None:
    for path, parameter in layer.named_parameters():
        if parameter.grad is not None:
            parameter -= 0.05 * parameter.grad.clamp(-1, 1) * masks.get(path, 1.0)
            parameter.grad = None


@pytest.mark.parametrize("how", ["log_prob", "one pass", "sample"])
@pytest.mark.parametrize("name", LAYERS)
def test_trained_like_a_layer_with_zeros(name, how):
    pruned, plain, masks = pair(name)
    base = image_base(_event(name))
    y = torch.randn(5, *_event(name), dtype=torch.float64)
    for _ in range(3):
        losses = []
        for layer in (pruned, plain):
            if how == "one pass":
                x, ladj = inv_and_ladj(layer, y)
                loss = -(base.log_prob(x) + ladj.reshape(5, -1).sum(-1)).mean()
            elif how == "log_prob":
                loss = -torch.distributions.TransformedDistribution(base, [layer]).log_prob(y).mean()
            else:
                out, ladj = call_and_ladj(layer, y)
                loss = out.square().mean() - ladj.mean()
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-8, atol=1e-8)
        _same_gradients(pruned, plain, masks)
        _descend(pruned, {})
        _descend(plain, masks)


@pytest.mark.parametrize("name", LAYERS)
def test_every_entry_sees_the_zeros(name):
    pruned, plain, _ = pair(name)
    x = torch.randn(5, *_event(name), dtype=torch.float64)
    y = plain(x).detach()
    # parameters change without a call in between, as in load_state_dict
    state = {k: 1.1 * v for k, v in plain.state_dict().items() if v.is_floating_point() and "mask" not in k}
    plain.load_state_dict(state, strict=False)
    own = pruned.state_dict()
    pruned.load_state_dict(
        {k: 1.1 * v if v.is_floating_point() and "mask" not in k else v for k, v in own.items()}, strict=False
    )
    with torch.no_grad():
        torch.testing.assert_close(pruned.inv(y), plain.inv(y), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(pruned.log_abs_det_jacobian(x, y), plain.log_abs_det_jacobian(x, y))
        torch.testing.assert_close(pruned(x), plain(x))


@pytest.mark.parametrize("name", ["contractive_residual", "contraction", "low_rank_residual", "generalized_sylvester"])
def test_the_older_weight_norm_is_the_newer_one(name):
    make, paths = LAYERS[name]
    older = scatter(make().double())
    newer = copy.deepcopy(older)
    for path in paths:
        if path.endswith("bias") or path.endswith("bias_out"):
            continue
        nn.utils.weight_norm(*_owner(older, path))
        parametrizations.weight_norm(*_owner(newer, path))
        module, tensor = _owner(older, path)
        with torch.no_grad():
            getattr(module, f"{tensor}_g").mul_(0.7)
            _owner(newer, path)[0].parametrizations[tensor].original0.mul_(0.7)
    y = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(2):
        for run in (inv_and_ladj, call_and_ladj):
            results = [run(layer, y.clone()) for layer in (older, newer)]
            torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-8)
            for value, ladj in results:
                (value.square().sum() + ladj.sum()).backward()
            for path in paths:
                module, tensor = _owner(older, path)
                if hasattr(module, f"{tensor}_g"):
                    originals = _owner(newer, path)[0].parametrizations[tensor]
                    torch.testing.assert_close(getattr(module, f"{tensor}_g").grad, originals.original0.grad)
                    torch.testing.assert_close(getattr(module, f"{tensor}_v").grad, originals.original1.grad)


@pytest.mark.parametrize(
    ("name", "path"),
    [("contractive_residual", "net.layers.0.weight"), ("contraction", "net.0.weight"), ("sylvester", "weight")],
)
def test_the_older_spectral_norm_is_refused(name, path):
    layer = scatter(LAYERS[name][0]())
    nn.utils.spectral_norm(*_owner(layer, path))
    for run in (layer, layer.inv):
        with pytest.raises(ValueError, match="remove_spectral_norm"):
            run(torch.randn(5, 4))


def test_the_bound_is_that_of_the_pruned_weight():
    layer = scatter(pf.ContractiveResidual(_contraction()), 5.0)
    for module in (layer.net[0], layer.net[2]):
        prune.random_unstructured(module, "weight", amount=0.5)
        nn.init.normal_(module.weight_orig, std=100.0)  # and no call in between
        weight = module.contracted()
        assert torch.equal(weight == 0, module.weight_mask == 0)
        assert torch.linalg.matrix_norm(weight, 2) <= 0.97
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer.inv(layer(x).clone()), x, rtol=1e-3, atol=1e-3)


def test_half_precision_too():
    layer = scatter(pf.orthogonal(4))
    prune.l1_unstructured(layer, "vectors", amount=0.4)
    layer = layer.bfloat16()
    expected = pf.orthogonal(4).bfloat16()
    with torch.no_grad():
        expected.vectors.copy_(layer.vectors_orig * layer.vectors_mask)
    x = torch.randn(5, 4).bfloat16()
    torch.testing.assert_close(layer(x), expected(x))
    torch.testing.assert_close(layer.inv(x.clone()), expected.inv(x.clone()))


def test_a_context_cannot_set_what_is_pruned():
    layer = pf.diagonal(4)
    prune.l1_unstructured(layer, "log_scale", amount=0.5)
    with pytest.raises(ValueError, match=r"'log_scale' of Diagonal is computed by .*prune\.remove"):
        pf.Conditional(layer, 2)
    conditional = pf.conditional_low_rank_residual(4, 2)
    prune.l1_unstructured(conditional.template, "weight_in", amount=0.5)  # a tensor that the context does not set
    conditional.condition(torch.randn(3, 2))
    prune.l1_unstructured(conditional.template, "bias_out", amount=0.5)
    with pytest.raises(ValueError, match=r"prune\.remove"):
        conditional.condition(torch.randn(3, 2))


def test_pruning_is_undone():
    pruned, plain, masks = pair("orthogonal")
    x = torch.randn(5, 4, dtype=torch.float64)
    pruned(x).sum().backward()
    for path in masks:
        prune.remove(pruned, path)
    torch.testing.assert_close(pruned.inv(x), plain.inv(x))


@pytest.mark.parametrize("name", ["orthogonal", "svd_linear", "lu_linear", "low_rank_linear"])
def test_the_matrix_too(name):
    pruned, plain, masks = pair(name)
    for layer, suffix in ((pruned, "_orig"), (plain, "")):
        for path in masks:
            layer.get_parameter(path + suffix).data.mul_(2)
    torch.testing.assert_close(pruned.matrix, plain.matrix)


def test_hooks_of_other_kinds_are_left_to_the_call():
    layer, calls = pf.diagonal(4), []
    layer.register_forward_pre_hook(lambda module, args: calls.append(args))
    x = torch.randn(5, 4)
    layer.inv(x)
    assert not calls
    layer(x)
    assert len(calls) == 1


def test_compiled():
    pruned, plain, _ = pair("orthogonal")
    x = torch.randn(5, 4, dtype=torch.float64)
    compiled = torch.compile(lambda v: inv_and_ladj(pruned, v), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), inv_and_ladj(plain, x))
