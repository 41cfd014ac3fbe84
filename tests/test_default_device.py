"""A default device other than that of the data has no effect: results are on the device of layer and data.

The meta device stands in for a GPU: whatever ends up there by mistake cannot be computed with.
"""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from cases import CONDITIONAL, SMALL, fitted, image_base, scatter

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj, linalg


def both_ways(layer, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Every entry, with and without gradients."""
    results = []
    for run, value in ((call_and_ladj, x), (inv_and_ladj, y)):
        value = value.clone().requires_grad_()
        out, ladj = run(layer, value)
        leaves = [value, *(p for p in layer.parameters() if p.requires_grad)]
        results += [out, ladj, *torch.autograd.grad(out.sum() + ladj.sum(), leaves, allow_unused=True)]
        with torch.no_grad():
            results += run(layer, value)
    results += [layer.with_cache(0)(x), layer.with_cache(0).inv(y), layer.with_cache(0).log_abs_det_jacobian(x, y)]
    return [r.detach() for r in results if r is not None]


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_every_layer(case, dim):
    layer, x = case.build(dim), case.points(dim)
    y = layer(x).detach()
    expected = both_ways(layer, x, y)
    with torch.device("meta"):
        got = both_ways(layer, x, y)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", CONDITIONAL)
def test_conditioned(case):
    dim = case.dims[min(1, len(case.dims) - 1)]
    conditional, x = case.conditional(dim, 2).double(), case.points(dim)
    context = torch.randn(3, 2, dtype=torch.float64)
    expected = call_and_ladj(conditional.condition(context), x)
    with torch.device("meta"):
        layer = conditional.condition(context)
        torch.testing.assert_close(call_and_ladj(layer, x), expected)
        torch.testing.assert_close(layer.inv(expected[0].detach()), x)


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_in_a_flow(case, dim):
    flow = pf.Flow(image_base(case.event(dim)), [case.build(dim)])
    torch.manual_seed(0)
    expected = flow().rsample_and_log_prob((4,))
    with torch.device("meta"):
        torch.manual_seed(0)
        torch.testing.assert_close(flow().rsample_and_log_prob((4,)), expected)
        torch.testing.assert_close(flow().log_prob(expected[0].detach()), expected[1])


@pytest.mark.parametrize("shape", [(3, 5), (140, 150), (150, 140), (2, 140, 130)], ids=str)
def test_norms(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    kernel = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    expected = [linalg.spectral_norm(matrix), linalg.spectral_norm_bound(matrix), linalg.convolution_norm_bound(kernel)]
    with torch.device("meta"):
        got = [linalg.spectral_norm(matrix), linalg.spectral_norm_bound(matrix), linalg.convolution_norm_bound(kernel)]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_wide_contractions():
    layer = scatter(pf.contractive_residual(140, [150, 160]).double(), 0.1)
    x = torch.randn(3, 140, dtype=torch.float64)
    with torch.device("meta"):
        torch.testing.assert_close(layer.inv(layer(x).detach()), x)


def test_estimators():
    for estimator in (pf.logdet.PowerSeries(), pf.logdet.RussianRoulette(), pf.logdet.Exact()):
        layer = scatter(pf.contractive_residual(4, [5], log_det=estimator))
        with torch.device("meta"):
            assert call_and_ladj(layer, torch.zeros(3, 4, device="cpu"))[1].device.type == "cpu"


def test_statistics():
    data = torch.randn(20, 3, dtype=torch.float64)
    for method in ("zca", "pca", "cholesky", "zca-cor", "pca-cor"):
        expected, layer = pf.whitening(3, method=method).double().fit(data), pf.whitening(3, method=method).double()
        with torch.device("meta"):
            layer.observe(data).adapt()
        torch.testing.assert_close(layer.matrix, expected.matrix)
        with torch.device("meta"):
            layer.reset_parameters()
        torch.testing.assert_close(layer.matrix, torch.eye(3, dtype=torch.float64))


def test_noise():
    noise = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    for layer, size in ((pf.inject_noise(3, 2), 3), (pf.Slice(noise), 5), (pf.ConcatNoise(noise), 3)):
        x = torch.randn(4, size)
        with torch.device("meta"):
            y, ladj = call_and_ladj(layer, x)
            inv_and_ladj(layer, y.detach())
        assert y.device.type == ladj.device.type == "cpu"


def test_matrices():
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    layers = [pf.orthogonal(4), pf.svd_linear(4), pf.low_rank_linear(4, 2), fitted(pf.whitening(4, trainable=True))]
    expected = [layer.matrix for layer in layers]
    with torch.device("meta"):
        torch.testing.assert_close([layer.matrix for layer in layers], expected)
        vectors = linalg.householder_vectors(q)
    torch.testing.assert_close(linalg.householder_product(vectors, torch.eye(4, dtype=q.dtype)).mT, q)


def test_the_conformance_checks():
    layer = pf.orthogonal(3)
    with torch.device("meta"):
        pf.testing.check_bijection(layer)
        pf.testing.check_bijection(layer.double())
