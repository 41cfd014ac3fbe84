"""The gradient of a log-density carried through a layer equals autograd through the inverse."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from cases import ALL, CONDITIONAL, SMALL, scatter

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj

F64 = torch.float64


def log_q(x):
    """A density whose gradient is easy to write and depends on every element."""
    return -(x**4).sum() / 4


def gradient_of_log_q(x):
    return -(x.detach() ** 3)


def by_autograd(transform, y):
    """Differentiate the log-density of y, scored through the inverse, with respect to y alone."""
    y = y.detach().requires_grad_()
    x, ladj = inv_and_ladj(transform, y)
    return torch.autograd.grad(log_q(x) + ladj.sum(), y)[0]


def check(transform, x, rtol=1e-9):
    expected_y, expected_ladj = call_and_ladj(transform, x.clone())
    y, ladj, gradient = transform.path_gradient(x, gradient_of_log_q(x).expand(x.shape))
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(ladj, expected_ladj)
    assert not ladj.requires_grad
    assert not gradient.requires_grad
    expected = by_autograd(transform, expected_y)
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol * scale)
    return y


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_path_gradients_equal_autograd_through_the_inverse(case, dim):
    layer, x = case.build(dim), case.points(dim, (3, 2))
    y = check(layer, x).detach()
    check(layer.inv, y)
    check(pf.Inverted(layer), y)
    check(layer, case.points(dim, ()))
    check(layer, case.points(dim, (2, 0)))


@pytest.mark.parametrize("case", CONDITIONAL)
def test_path_gradients_of_conditioned_layers(case):
    dim = case.dims[min(1, len(case.dims) - 1)]
    conditional = scatter(case.conditional(dim, 2).double(), 0.5)
    layer = conditional.condition(torch.randn(3, 2, dtype=F64).detach())
    for batch in [(), (3,), (4, 1)]:
        x = case.points(dim, batch)
        y, _ = call_and_ladj(layer, x)
        x = x.expand(pf.inv_and_ladj(layer, y)[0].shape)  # of one x, every context makes another sample
        rtol = 1e-5 if case.layer == "Spline" else 1e-9  # bends so sharp that the rounding of the inverted x counts
        check(layer, x, rtol)
        check(layer.inv, y.detach(), rtol)


@pytest.mark.parametrize("case", ALL)
def test_the_sample_keeps_its_graph(case):
    """Gradients to input and parameters are those of an ordinary pass; without gradients there is no graph."""
    dim = case.dims[0]
    layer, x = case.build(dim), case.points(dim, (3,)).requires_grad_()
    wanted = [x, *layer.parameters()]
    y, _, gradient = layer.path_gradient(x, gradient_of_log_q(x))
    found = torch.autograd.grad(y, wanted, gradient, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(layer(x.clone()), wanted, gradient, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        bare, _, same = layer.path_gradient(x, gradient_of_log_q(x))
    assert not bare.requires_grad
    torch.testing.assert_close((bare, same), (y.detach(), gradient))


def test_a_gaussian_in_closed_form():
    """The gradient of log N(y; b, A A^T) is -(A A^T)^{-1} (y - b)."""
    matrix = torch.randn(4, 4, dtype=F64) + 2 * torch.eye(4, dtype=F64)
    for layer in (pf.SVDLinear.from_matrix(matrix), pf.LULinear.from_matrix(matrix)):
        torch.nn.init.normal_(layer.bias)
        x = torch.randn(6, 4, dtype=F64)
        y, ladj, gradient = layer.path_gradient(x, -x)
        expected = (layer.bias - y) @ torch.linalg.inv(matrix @ matrix.T)
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ladj, torch.linalg.slogdet(matrix)[1].expand(6))


def test_foreign_layers_and_mixed_chains():
    affine = torch.distributions.transforms.AffineTransform(0.5, -2.0)
    chain = pf.Chain([affine, scatter(pf.affine_coupling(4, [8])).double(), dist.transforms.ExpTransform()])
    check(chain, torch.randn(5, 4, dtype=F64))


def test_injected_noise_counts_in_the_density_and_dropped_elements_are_refused():
    noise = pf.inject_noise(3, 2).double()
    chain = pf.Chain([noise, scatter(pf.affine_coupling(5, [8])).double()])
    x = torch.randn(6, 3, dtype=F64)
    y, ladj, gradient = chain.path_gradient(x, gradient_of_log_q(x))
    torch.testing.assert_close(gradient, by_autograd(chain, y), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ladj, -inv_and_ladj(chain, y.detach())[1])
    with pytest.raises(ValueError, match="scoring it draws noise"):
        chain.inv.path_gradient(y.detach(), torch.zeros_like(y))


def test_the_shape_of_the_gradient_is_checked():
    with pytest.raises(ValueError, match=r"shape of the input, \(5, 3\), but got \(5, 4\)"):
        pf.diagonal(3).path_gradient(torch.randn(5, 3), torch.randn(5, 4))


def test_a_distribution_draws_scores_and_differentiates_in_one_pass():
    layers = [scatter(pf.affine_coupling(4, [8])), pf.Spline(), scatter(pf.svd_linear(4))]
    base = dist.Normal(torch.arange(4.0, dtype=F64), 2.0).to_event(1)
    flow = pf.Flow(base, [layer.double() for layer in layers], trainable_base=True)
    for d, shape in [(flow(), (5,)), (flow().expand((3,)), (5, 3)), (flow().to_event(0), (5,))]:
        x, log_prob, gradient = d.rsample_with_gradient((5,))
        assert x.shape == (*shape, 4)
        assert log_prob.shape == shape
        torch.testing.assert_close(log_prob, d.log_prob(x.detach()).detach())
        y = x.detach().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(d.log_prob(y).sum(), y)[0], rtol=1e-9, atol=1e-9)
        assert x.requires_grad
        assert not log_prob.requires_grad
        assert not gradient.requires_grad
    by_base = torch.autograd.grad(x.sum(), list(flow.base.parameters()))
    assert all(g.abs().sum() > 0 for g in by_base)
