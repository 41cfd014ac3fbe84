"""Log-determinants of contractions: exact ones against autodiff, estimators by their mean, value and gradient."""

from __future__ import annotations

import pytest
import torch

import pyro_invflows as pf
from pyro_invflows.logdet import Exact, LogDet, PowerSeries, RussianRoulette
from pyro_invflows.networks import ContractiveMLP, LinearContraction, contractive_conv_network, linearise
from pyro_invflows.testing import jacobian_log_det

F64 = torch.float64


def scattered(module, size=1.0, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))
    return module.double()


def mlp(dim=8):
    return scattered(ContractiveMLP(dim, (16, 4), lipschitz=0.9))


@pytest.mark.parametrize("dim", [1, 2, 5, 33])
def test_exact_against_the_jacobian(dim):
    net = mlp(dim)
    x = torch.randn(6, dim, dtype=F64)
    expected = jacobian_log_det(lambda x: x + net(x), x, 1)
    for linearisation in (net.linearise(x), linearise(net, x)):
        torch.testing.assert_close(Exact()(linearisation), expected, rtol=1e-9, atol=1e-9)


def test_exact_for_images():
    net = scattered(contractive_conv_network(2, [3]))
    x = torch.randn(4, 2, 3, 4, dtype=F64)
    expected = jacobian_log_det(lambda x: x + net(x), x, 3)
    torch.testing.assert_close(Exact()(linearise(net, x, 3), 3), expected, rtol=1e-9, atol=1e-9)


def z_score(draws, expected):
    return ((draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)).abs().max().item()


@pytest.mark.parametrize("neumann", [True, False])
@pytest.mark.parametrize("settings", [{}, {"num_exact_terms": 0}, {"p": 0.2, "num_probes": 2}], ids=str)
def test_the_roulette_is_unbiased(settings, neumann):
    net, count = mlp(), 10_000
    x = torch.randn(1, 8, dtype=F64)
    expected = Exact()(net.linearise(x)).item()
    torch.manual_seed(1)
    estimator = RussianRoulette(neumann_gradient=neumann, **settings)
    with torch.no_grad():
        draws = estimator(net.linearise(x.expand(count, 8)))
    assert draws.shape == (count,)
    assert draws.std() > 1e-3  # the rows are independent draws
    assert z_score(draws, expected) < 4


@pytest.mark.parametrize("neumann", [True, False])
def test_the_gradient_of_the_roulette_is_unbiased(neumann):
    net, count = mlp(), 10_000
    x = torch.randn(1, 8, dtype=F64).requires_grad_()
    weights = [layer.weight for layer in net.layers]
    expected_x, *expected_w = torch.autograd.grad(Exact()(net.linearise(x)).sum(), [x, *weights])
    torch.manual_seed(2)
    estimator = RussianRoulette(neumann_gradient=neumann)
    rows = x.detach().expand(count, 8).clone().requires_grad_()
    (draws,) = torch.autograd.grad(estimator(net.linearise(rows)).sum(), rows)
    assert z_score(draws, expected_x) < 4
    # for every weight: 200 batches of 50 rows, each an estimate of the mean gradient
    rows = x.detach().expand(50, 8)
    batches = [torch.autograd.grad(estimator(net.linearise(rows)).mean(), weights) for _ in range(200)]
    for draws, expected in zip(zip(*batches, strict=True), expected_w, strict=True):
        assert z_score(torch.stack(draws), expected) < 4


def test_the_power_series_is_the_truncated_one():
    net = mlp(3)
    x = torch.randn(2, 3, dtype=F64)
    jacobian = net.linearise(x).jacobian()
    power, expected = torch.eye(3, dtype=F64), 0.0
    for k in range(1, 4):
        power = power @ jacobian
        expected = expected + (-1) ** (k + 1) / k * power.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.manual_seed(0)
    with torch.no_grad():
        estimate = PowerSeries(num_terms=3, num_probes=1)(net.linearise(x.repeat_interleave(4000, 0)))
    assert z_score(estimate.reshape(2, 4000).T, expected) < 4
    bias = (expected - Exact()(net.linearise(x))).abs()
    assert bias.max() > 1e-6  # biased, as it says


@pytest.mark.parametrize("estimator", [Exact(), PowerSeries(), RussianRoulette()], ids=lambda e: type(e).__name__)
def test_nothing_depends_on_training(estimator):
    layer = scattered(pf.contractive_residual(4, [8], log_det=estimator))
    x = torch.randn(5, 4, dtype=F64)
    values = []
    for mode in (True, False):
        torch.manual_seed(3)
        values.append(pf.call_and_ladj(layer.train(mode), x))
    for a, b in zip(*values, strict=True):
        assert torch.equal(a, b)
    assert layer.exact == isinstance(estimator, Exact)


def test_a_rows_estimate_does_not_hang_on_its_batch():
    """A row of zeros has the log-det of its own Jacobian only: here J = 0, whatever its neighbours draw."""

    def square(x):
        return 0.3 * x * x

    x = torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=F64)
    torch.manual_seed(0)
    for _ in range(20):
        estimate = RussianRoulette()(linearise(square, x))
        assert estimate[0] == 0
        assert estimate[1] != 0


@pytest.mark.parametrize("estimator", [Exact(), PowerSeries(num_probes=8), RussianRoulette()], ids=str)
@pytest.mark.parametrize("kind", ["mlp", "sequential", "image"])
def test_inference_mode_gives_the_same(kind, estimator):
    if kind == "image":
        layer, x = pf.contractive_residual(2, [3], dim=-3, log_det=estimator), torch.randn(4, 2, 3, 3)
    elif kind == "mlp":
        layer, x = pf.contractive_residual(3, [8], log_det=estimator), torch.randn(4, 3)
    else:
        net = torch.nn.Sequential(LinearContraction(3, 8), torch.nn.Softplus(), LinearContraction(8, 3))
        layer, x = pf.ContractiveResidual(net, log_det=estimator), torch.randn(4, 3)
    layer, x = scattered(layer), x.double()
    for run in (pf.call_and_ladj, pf.inv_and_ladj):
        torch.manual_seed(0)
        expected = run(layer, x)
        torch.manual_seed(0)
        with torch.inference_mode():
            got = run(layer, x.clone())
        assert not got[1].requires_grad
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.clone(), b.detach())


def test_frozen_layers_ask_for_no_gradient():
    layer = scattered(pf.contractive_residual(2, [3], dim=-3)).requires_grad_(False)
    assert not pf.call_and_ladj(layer, torch.randn(2, 2, 3, 3, dtype=F64))[1].requires_grad
    order_2 = pf.ContractiveResidual(layer.net, dim=-3, order=2)
    assert not order_2.inv(torch.randn(2, 2, 3, 3, dtype=F64)).requires_grad


@pytest.mark.parametrize("batch", [(0,), (2, 0), ()])
def test_estimators_of_any_batch(batch):
    for estimator in (RussianRoulette(), PowerSeries()):
        layer = pf.contractive_residual(5, log_det=estimator)
        assert pf.call_and_ladj(layer, torch.zeros(*batch, 5))[1].shape == batch


def test_estimators_refuse_torch_func():
    layer = pf.contractive_residual(5, log_det=RussianRoulette())
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda x: pf.call_and_ladj(layer, x)[1], randomness="different")(torch.zeros(3, 5))


def test_low_precision_log_dets():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layer in (pf.contractive_residual(5), pf.low_rank_residual(5)):
            assert pf.call_and_ladj(layer, torch.randn(4, 5))[1].isfinite().all()


def test_second_derivatives_of_the_neumann_gradient_are_refused():
    net = mlp(3)
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(RussianRoulette()(net.linearise(x)).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="neumann_gradient=False"):
        torch.autograd.grad(grad.sum(), x)
    torch.manual_seed(0)
    (grad,) = torch.autograd.grad(PowerSeries(neumann_gradient=False)(net.linearise(x)).sum(), x, create_graph=True)
    torch.autograd.grad(grad.sum(), x)


def test_an_estimator_in_a_flow():
    torch.manual_seed(0)
    layer = scattered(pf.contractive_residual(2, [8], dim=-3, log_det=RussianRoulette(num_probes=64)), 0.3)
    exact = pf.ContractiveResidual(layer.net, dim=-3)
    x = torch.randn(3, 2, 4, 4, dtype=F64)
    y, ladj = pf.call_and_ladj(layer, x)
    expected_y, expected = pf.call_and_ladj(exact, x)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(ladj, expected, rtol=0, atol=0.3)
    assert not pf.Chain([layer]).exact
    with pytest.raises(ValueError, match="no exact log-det"):
        pf.Chain([layer], recompute=True)


def test_particles_average_estimates():
    torch.manual_seed(0)
    layer = scattered(pf.contractive_residual(2, [8], log_det=RussianRoulette()))
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2, dtype=F64), 1.0), 1)
    exact = pf.FlowDistribution(base, [pf.ContractiveResidual(layer.net)])
    d = pf.FlowDistribution(base, [layer])
    y = torch.randn(3, 2, dtype=F64)
    torch.manual_seed(1)
    with torch.no_grad():
        draws = torch.stack([d.log_prob(y, num_particles=25) for _ in range(200)])
        single = torch.stack([d.log_prob(y) for _ in range(200)])
        assert z_score(draws, exact.log_prob(y)) < 4
    assert ((draws.std(0) < 0.4 * single.std(0)) | (single.std(0) < 1e-9)).all()
    noise = pf.whitened_noise(2).double()
    both = pf.FlowDistribution(
        torch.distributions.Independent(torch.distributions.Normal(torch.zeros(4, dtype=F64), 1.0), 1),
        [pf.Slice(noise), layer],
    )
    with pytest.raises(ValueError, match="num_particles must be 1"):
        both.log_prob(y, num_particles=2)


def test_bad_input():
    for make in (
        lambda: Exact(max_event_size=0),
        lambda: PowerSeries(num_terms=0),
        lambda: PowerSeries(num_probes=0),
        lambda: RussianRoulette(p=0.0),
        lambda: RussianRoulette(p=1.0),
        lambda: RussianRoulette(num_exact_terms=-1),
    ):
        with pytest.raises(ValueError, match="but got"):
            make()
    layer = pf.contractive_residual(5, log_det=Exact(max_event_size=4))
    y = layer(torch.zeros(2, 5))  # sampling needs no log-det
    with pytest.raises(ValueError, match="max_event_size=4"):
        layer.log_abs_det_jacobian(torch.zeros(2, 5), y)
    for bad in ("exact", Exact, lambda linearisation, event_dim: 0.0):
        with pytest.raises(TypeError, match=r"logdet.Exact\(\).*derived from logdet.LogDet"):
            pf.contractive_residual(5, log_det=bad)
    with pytest.raises(NotImplementedError, match=r"Empty must define __call__\(linearisation, event_dim\)"):
        pf.call_and_ladj(pf.contractive_residual(5, log_det=type("Empty", (LogDet,), {})()), torch.zeros(2, 5))


class TwoTerms(LogDet):
    """The first two terms of the series, without noise."""

    def __call__(self, linearisation, event_dim=1):
        jacobian = linearisation.jacobian()
        return (jacobian - jacobian @ jacobian / 2).diagonal(dim1=-2, dim2=-1).sum(-1)


class Weighted(LogDet, torch.nn.Module):
    """An estimator that learns: a module whose parameters become the layer's."""

    exact = True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def __call__(self, linearisation, event_dim=1):
        return self.weight * Exact()(linearisation, event_dim)


@pytest.mark.parametrize("dim", [-1, -3])
def test_an_estimator_of_ones_own(dim):
    layer = scattered(pf.contractive_residual(2, [3], dim=dim, log_det=TwoTerms()))
    x = torch.randn(4, *(2,) if dim == -1 else (2, 3, 3), dtype=F64)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(layer, event).reshape(2 * [event.numel()]) for event in x]
    )
    j = jacobian - torch.eye(jacobian.shape[-1], dtype=F64)
    expected = torch.einsum("bii->b", j) - torch.einsum("bij,bji->b", j, j) / 2
    y, ladj = pf.call_and_ladj(layer, x)
    torch.testing.assert_close(ladj, expected)
    torch.testing.assert_close(pf.inv_and_ladj(layer, y.detach().clone())[1], -expected)
    assert not layer.exact
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros_like(x[0]), 1.0), -dim)
    assert not pf.Flow(base, [layer]).transforms.exact
    assert torch.autograd.grad(ladj.sum(), next(layer.parameters()))[0].abs().max() > 0


def test_an_estimator_that_learns():
    layer = scattered(pf.contractive_residual(3, [8], log_det=Weighted()))
    assert layer.exact
    assert "log_det.weight" in dict(layer.named_parameters())
    x = torch.randn(4, 3, dtype=F64)
    expected = jacobian_log_det(lambda x: x + layer.net(x), x, 1)
    torch.testing.assert_close(layer.log_abs_det_jacobian(x, layer(x)), layer.log_det.weight * expected)
