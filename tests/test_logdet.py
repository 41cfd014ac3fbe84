"""Log-determinants of contractions: exact ones against autodiff, estimators by their mean, value and gradient."""

from __future__ import annotations

import pytest
import torch

import pyro_invflows as pf
from pyro_invflows.logdet import Exact, PowerSeries, RussianRoulette
from pyro_invflows.nn import ContractiveMLP, contractive_conv_network, linearise
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
    weight = net.layers[1].weight
    expected_x, expected_w = torch.autograd.grad(Exact()(net.linearise(x)).sum(), [x, weight])
    torch.manual_seed(2)
    estimator = RussianRoulette(neumann_gradient=neumann)
    rows = x.detach().expand(count, 8).clone().requires_grad_()
    (draws,) = torch.autograd.grad(estimator(net.linearise(rows)).sum(), rows)
    assert z_score(draws, expected_x) < 4
    # the parameters: 100 batches of 100 rows, each a draw of the mean gradient
    batches = [
        torch.autograd.grad(estimator(net.linearise(x.detach().expand(100, 8))).mean(), weight)[0] for _ in range(100)
    ]
    assert z_score(torch.stack(batches), expected_w) < 5  # the largest of 64 entries


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
    with pytest.raises(TypeError, match=r"logdet.Exact\(\)"):
        pf.contractive_residual(5, log_det="exact")
