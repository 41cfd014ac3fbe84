"""Contractions keep their bound under adversarial training, in train and eval mode, right after loading."""

from __future__ import annotations

import threading

import pytest
import torch
from test_spectral import as_matrix, svd_norm
from torch import nn

import pyro_invflows as pf
from pyro_invflows.networks import (
    ContractiveMLP,
    Conv2dContraction,
    LinearContraction,
    LipSwish,
    Sine,
    contractive_conv_network,
    held_weights,
    linearise,
    lipschitz_bound,
    value_and_slope,
)

F64 = torch.float64


def acting_norm(module):
    """Return the true norm of the matrices that are applied, by an SVD in double precision."""
    if isinstance(module, (ContractiveMLP, pf.LowRankResidual)):  # what is bounded is the product
        weights = module.contracted() if isinstance(module, ContractiveMLP) else module._network().weights
        return torch.stack([svd_norm(w.detach().double()) for w in weights]).prod()
    if isinstance(module, nn.Sequential):
        return torch.stack([acting_norm(layer) for layer in module if hasattr(layer, "contracted")]).prod()
    weight = module.contracted().detach().double()
    if isinstance(module, Conv2dContraction):
        return svd_norm(as_matrix(weight, 6, 7))
    return svd_norm(weight)


CONTRACTIONS = {
    "wide": (lambda: LinearContraction(9, 5, 0.9), (9,)),
    "tall": (lambda: LinearContraction(4, 12, 0.97), (4,)),
    "one": (lambda: LinearContraction(1, 1, 0.5), (1,)),
    "large": (lambda: LinearContraction(140, 150, 0.97), (140,)),
    "convolution": (lambda: Conv2dContraction(2, 3, 3, 0.9), (2, 6, 7)),
    "convolution 1x1": (lambda: Conv2dContraction(3, 3, 1, 0.9), (3, 6, 7)),
    "convolutional network": (lambda: contractive_conv_network(2, [3], lipschitz=0.9), (2, 6, 7)),
    "mlp": (lambda: ContractiveMLP(4, (16, 8), lipschitz=0.97), (4,)),
    "low rank": (lambda: pf.low_rank_residual(6, 3), (6,)),
    "low rank, sandwich": (lambda: pf.low_rank_residual(6, 3, form="sandwich"), (6,)),
}


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("name", CONTRACTIONS)
def test_hostile_training(name, optimiser):
    torch.manual_seed(0)
    make, event = CONTRACTIONS[name]
    module = make()
    assert acting_norm(module) <= lipschitz_bound(module)  # before any call
    step = (
        torch.optim.Adam(module.parameters(), lr=1e-2)
        if optimiser == "adam"
        else torch.optim.SGD(module.parameters(), lr=1.0)
    )
    # large targets: the loss falls as the map becomes as steep as it can
    x, target = torch.randn(8, *event), 10 * torch.randn(8, *module(torch.zeros(8, *event)).shape[1:])
    worst = 0.0
    for i in range(200):
        module.train(i % 2 == 0)
        step.zero_grad()
        (module(x) - target).square().mean().backward()
        step.step()
        for mode in (True, False):
            worst = max(worst, acting_norm(module.train(mode)).item())
    assert worst <= lipschitz_bound(module)
    assert worst > 0.5 * lipschitz_bound(module), "the bound was never reached: the test was not hostile"


@pytest.mark.parametrize("name", CONTRACTIONS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4, 1e30])
def test_random_weights_right_after_loading(name, size):
    torch.manual_seed(1)
    module = CONTRACTIONS[name][0]()
    module.load_state_dict({k: size * torch.randn_like(v) for k, v in module.state_dict().items()})
    for mode in (True, False):
        assert acting_norm(module.train(mode)) <= lipschitz_bound(module)


def test_small_weights_act_as_they_are():
    module = LinearContraction(3, 3, 0.9).double()
    with torch.no_grad():
        module.weight.copy_(0.1 * torch.eye(3))
    assert torch.equal(module.contracted(), module.weight)


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_measured_slopes_stay_below_the_bound(name):
    torch.manual_seed(2)
    make, event = CONTRACTIONS[name]
    module = make().double()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(30).add_(torch.randn_like(p))
    x = torch.randn(200, *event, dtype=F64)
    near = x + 1e-3 * torch.randn_like(x)
    g = (lambda v: module(v) - v) if isinstance(module, pf.LowRankResidual) else module
    ratio = (g(x) - g(near)).flatten(1).norm(dim=1) / (x - near).flatten(1).norm(dim=1)
    assert ratio.max() <= lipschitz_bound(module) * (1 + 1e-9)  # the differences round


ACTIVATIONS = [LipSwish, Sine, nn.Tanh, nn.Softplus, nn.ELU, nn.CELU, nn.Sigmoid, nn.Softsign, nn.LogSigmoid, nn.ReLU]


@pytest.mark.parametrize("make", ACTIVATIONS)
def test_activations(make):
    x = torch.linspace(-20, 20, 200_001, dtype=F64, requires_grad=True)
    for beta in (0.5, -3.0, 4.0):
        activation = make().double()
        for p in activation.parameters():
            nn.init.constant_(p, beta)
        (slope,) = torch.autograd.grad(activation(x).sum(), x)
        assert slope.abs().max() <= lipschitz_bound(activation) <= 1
        value, closed = value_and_slope(activation, x)
        torch.testing.assert_close(value, activation(x))
        torch.testing.assert_close(closed, slope)


@pytest.mark.parametrize("make", [LipSwish, Sine, nn.Tanh])
def test_derivatives_of_slopes(make):
    """First and second derivatives with respect to the point and to the activation's parameters."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make().double()

        def forward(self, x):
            return value_and_slope(self.inner, x)

    module = Both()
    names = [name for name, _ in module.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.tensor([-30.0, -2.0, -0.3, 0.0, 1e-9, 0.7, 3.0, 40.0], dtype=F64, requires_grad=True)
    inputs = (x, *module.parameters())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("make", "true"), [(nn.SiLU, 1.0998), (nn.GELU, 1.1289), (nn.Mish, 1.0884), (nn.SELU, 1.758)])
def test_steep_activations_are_refused(make, true):
    x = torch.linspace(-5, 5, 100_001, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(make()(x).sum(), x)
    assert slope.abs().max().item() == pytest.approx(true, abs=1e-3)
    with pytest.raises(ValueError, match=make.__name__):
        ContractiveMLP(3, activation=make)
    with pytest.raises(ValueError, match=make.__name__):
        contractive_conv_network(3, activation=make)
    with pytest.raises(ValueError, match=make.__name__):
        pf.LowRankResidual(3, activation=make)


@pytest.mark.parametrize(
    "module",
    [nn.ELU(-3.0), nn.CELU(-1.0), nn.Softplus(threshold=0), nn.LeakyReLU(-2.0)],
    ids=lambda m: f"{type(m).__name__}",
)
def test_settings_that_make_an_activation_steep(module):
    with pytest.raises(ValueError, match="must be at most 1, but may be"):
        lipschitz_bound(module)


def test_activations_that_are_none():
    for make in (nn.Tanh(), torch.tanh, "tanh"):
        with pytest.raises(TypeError, match="must be a constructor"):
            ContractiveMLP(3, activation=make)
        with pytest.raises(TypeError, match="must be a constructor"):
            pf.low_rank_residual(3, activation=make)
    with pytest.raises(ValueError, match="LinearContraction is not a known elementwise"):
        pf.low_rank_residual(4, 3, activation=lambda: LinearContraction(3, 3))

    class Steeper(nn.Sequential):
        def forward(self, x):
            return 5 * super().forward(x)

    with pytest.raises(ValueError, match="Steeper is not a known contraction"):
        lipschitz_bound(Steeper(nn.Tanh()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_of_what_acts_is_within_the_bound(dtype):
    worst = 0.0
    for seed in range(30):
        torch.manual_seed(seed)
        module = LinearContraction(6, 6, 0.999)
        nn.init.normal_(module.weight, std=3.0)
        worst = max(worst, acting_norm(module.to(dtype)).item())
    assert worst <= 0.999


def test_the_mlp_linearised_in_closed_form_equals_autograd():
    torch.manual_seed(3)
    net = ContractiveMLP(5, (8, 3, 6), context_dim=2).double()
    for p in net.parameters():
        nn.init.normal_(p)
    x, context = torch.randn(4, 5, dtype=F64), torch.randn(4, 2, dtype=F64)
    closed, traced = net.linearise(x, context), linearise(lambda x: net(x, context), x)
    torch.testing.assert_close(closed.value, traced.value)
    torch.testing.assert_close(closed.jacobian(), traced.jacobian())
    v = torch.randn_like(x)
    torch.testing.assert_close(closed.vjp(v), traced.vjp(v))
    reduced = closed.reduced_jacobian()
    assert reduced.shape == (4, 3, 3)  # the narrowest layer
    expected = torch.linalg.slogdet(torch.eye(5) + closed.jacobian())[1]
    torch.testing.assert_close(torch.linalg.slogdet(torch.eye(3) + reduced)[1], expected)


def test_linearising_leaves_no_trace_where_nothing_is_asked_for():
    net = contractive_conv_network(1, [2])
    x = torch.randn(2, 1, 3, 3)
    with torch.no_grad():
        assert not linearise(net, x, 3).value.requires_grad
    assert linearise(net, x, 3).value.requires_grad  # the parameters
    for p in net.parameters():
        p.requires_grad_(False)
    assert not linearise(net, x, 3).value.requires_grad
    assert x.grad is None


def test_held_weights_are_computed_once_and_keep_their_gradient(monkeypatch):
    module = LinearContraction(3, 3)
    calls = []
    original = LinearContraction.contracted
    monkeypatch.setattr(LinearContraction, "contracted", lambda self: calls.append(1) or original(self))
    x = torch.randn(2, 3)
    with held_weights():
        with torch.no_grad():
            module(x), module(x)
        out = module(x) + module(x)
        with torch.no_grad():
            module(x)
    assert len(calls) == 2  # without a graph, then with one, which serves both
    out.sum().backward()
    assert module.weight.grad is not None
    module(x)
    assert len(calls) == 3
    seen = []
    with held_weights():
        module(x)
        thread = threading.Thread(target=lambda: (module(x), seen.append(len(calls))))
        thread.start()
        thread.join()
    assert seen == [5]  # another thread holds no weights


def test_bounds_of_networks():
    assert lipschitz_bound(nn.Sequential(LinearContraction(2, 3, 0.9), nn.Tanh(), LinearContraction(3, 2, 0.5))) == 0.45
    assert lipschitz_bound(contractive_conv_network(2, lipschitz=0.8)) == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"'1.0' \(Linear\) is not a known contraction"):
        lipschitz_bound(nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match=r"LeakyReLU.* must be at most 1, but may be 3"):
        lipschitz_bound(nn.LeakyReLU(3.0))


@pytest.mark.parametrize("lipschitz", [0.0, 1.0, 1.5, -0.5, float("nan"), float("inf")])
def test_bad_lipschitz_constants(lipschitz):
    for make in (
        lambda: LinearContraction(2, 2, lipschitz),
        lambda: Conv2dContraction(2, 2, 3, lipschitz),
        lambda: ContractiveMLP(2, lipschitz=lipschitz),
        lambda: contractive_conv_network(2, lipschitz=lipschitz),
        lambda: pf.low_rank_residual(2, lipschitz=lipschitz),
        lambda: pf.contractive_residual(2, lipschitz=lipschitz),
        lambda: pf.iresnet(2, lipschitz=lipschitz),
    ):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            make()
    with pytest.raises(TypeError, match="must be a number"):
        LinearContraction(2, 2, "0.5")
    with pytest.raises(ValueError, match="odd"):
        Conv2dContraction(2, 2, 2)
