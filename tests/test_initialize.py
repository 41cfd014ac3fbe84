"""Flow.initialize: every layer that has a fit is fitted to the values that reach its output."""

from __future__ import annotations

import copy
import warnings

import pyro.distributions as dist
import pytest
import torch
from cases import scatter
from pyro.nn import PyroModule

import pyro_invflows as pf

F64 = torch.float64


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def normal(*shape):
    return dist.Normal(torch.zeros(shape, dtype=F64), torch.ones((), dtype=F64)).to_event(len(shape))


def rows(n=200, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, dtype=F64, generator=generator)
    return torch.randn(n, d, dtype=F64, generator=generator) @ mix * torch.linspace(0.1, 5.0, d, dtype=F64) + 3.0


def standard(values, dim=-1):
    """Check that every column has mean 0 and variance 1."""
    columns = values.detach().movedim(dim, -1).reshape(-1, values.shape[dim])
    close(columns.mean(0), torch.zeros(columns.shape[1], dtype=F64))
    close(columns.var(0), torch.ones(columns.shape[1], dtype=F64))


def test_act_norms_between_rotations_standardise_all_marginals():
    rotation = scatter(pf.orthogonal(4)).double()
    flow = pf.Flow(normal(4), [pf.act_norm(4), rotation, pf.act_norm(4)]).double()
    data = rows()
    assert flow.initialize(data) is flow
    first, _, last = flow.transforms
    standard(last.inv(data))
    standard(flow.transforms.inv(data))
    # the closed form of both layers
    close(last.bias, data.mean(0))
    close(last.log_scale, data.std(0).log())
    turned = (data - data.mean(0)) / data.std(0) @ rotation.matrix.detach()
    close(first.bias, turned.mean(0))
    close(first.log_scale, turned.std(0).log())
    assert first.fitted
    assert last.fitted
    assert all(p.requires_grad and p.is_leaf for p in flow.transforms.parameters())


@pytest.mark.parametrize("method", ["zca", "cholesky", "diagonal"])
def test_whitening_starts_at_the_mean_and_covariance(method):
    data = rows()
    whitening = pf.whitening(4, method=method, shrinkage=0.0)
    flow = pf.Flow(normal(4), [pf.affine_coupling(4), pf.lu_linear(4), whitening]).double().initialize(data)
    covariance = torch.cov(data.T)
    if method == "diagonal":
        covariance = covariance.diagonal().diag()
    gaussian = dist.MultivariateNormal(data.mean(0), covariance)
    close(flow().log_prob(data), gaussian.log_prob(data), 1e-8)  # the other layers start at the identity


def test_the_layers_are_fitted_one_after_the_other():
    """The same as fitting each layer by hand, in nested and recomputing chains and next to foreign transforms."""

    def build():
        torch.manual_seed(3)
        parts = [
            pf.Chain([pf.act_norm(4), scatter(pf.affine_coupling(4))], recompute=True),
            dist.transforms.AffineTransform(0.5, 2.0),
            pf.Chain([scatter(pf.svd_linear(4)), pf.whitening(4, trainable=True), pf.Inverted(scatter(pf.baird(4)))]),
            pf.act_norm(4),
        ]
        return pf.Flow(normal(4), parts).double()

    flow, by_hand, value = build().initialize(rows()), build(), rows()
    with torch.no_grad():
        for layer, inverse in list(by_hand.transforms.leaves(inverse=True)):
            if hasattr(layer, "fit"):
                layer.fit(value)
            value = layer.inv(value) if inverse else layer(value)
    for name, expected in by_hand.state_dict().items():
        torch.testing.assert_close(flow.state_dict()[name], expected, rtol=1e-12, atol=1e-12)
    standard(flow.transforms.inv(rows()))


@pytest.mark.parametrize("shape", [(7, 3, 4, 6), (2, 5, 3, 4, 6)])
def test_images(shape):
    data = torch.randn(shape, dtype=F64) * 4 + 1
    parts = [pf.act_norm(12, dim=-3), scatter(pf.orthogonal(12, dim=-3)), pf.pixel_shuffle(12), pf.act_norm(3, dim=-3)]
    flow = pf.Flow(normal(12, 2, 3), parts).double().initialize(data)
    standard(flow.transforms[-1].inv(data), dim=-3)
    standard(flow.transforms.inv(data), dim=-3)


@pytest.mark.parametrize("make", [pf.conditional_affine_coupling, dist.transforms.conditional_affine_coupling])
def test_a_context_reaches_the_conditional_layers(make):
    torch.manual_seed(5)
    coupling = scatter(make(4, 2), 0.3)  # one of this library and one of Pyro's
    parts = [pf.act_norm(4), coupling, scatter(pf.orthogonal(4)), pf.act_norm(4)]
    flow = pf.Flow(normal(4), parts).double()
    data, context = rows(), torch.randn(200, 2, dtype=F64)
    flow.initialize(data, context)
    layers = pf.Chain(p.condition(context) if hasattr(p, "condition") else p for p in flow.transforms)
    standard(layers.inv(data))
    other = copy.deepcopy(flow).initialize(data, context.roll(1, 0))
    assert not torch.allclose(other.transforms[0][0].bias, flow.transforms[0][0].bias)


def test_the_template_of_a_conditional_layer_is_fitted():
    inner = pf.Chain([pf.act_norm(4), scatter(pf.lu_linear(4), 0.3), pf.whitening(4, shrinkage=0.0)])
    flow = pf.Flow(normal(4), [pf.act_norm(4), pf.Conditional(inner, 2)]).double()
    data, context = rows(), torch.randn(200, 2, dtype=F64)
    flow.initialize(data, context)
    template = flow.transforms[1].template
    close(template[2].matrix @ template[2].matrix.T, torch.cov(data.T))
    standard(template.inv(data))
    standard(flow(context).transforms[0].inv(data))  # at the start the context has no influence
    # later the template is fitted all the same, and the values pass through the conditioned layer
    scatter(flow.transforms[1].hypernet, 0.2)
    flow.initialize(2 * data, context)
    close(template[2].mean, 2 * data.mean(0))
    standard(flow(context).transforms[0].inv(2 * data))
    assert not torch.allclose(template.inv(2 * data).std(0), flow.transforms[1](context).inv(2 * data).std(0))


def test_noise_is_dropped_on_the_way():
    noise = normal(2)
    parts = [pf.act_norm(2), pf.ConcatNoise(noise, name="e"), scatter(pf.orthogonal(4)), pf.act_norm(4)]
    flow = pf.Flow(normal(2), parts).double().initialize(rows())
    standard(flow.transforms.latents(rows())["base"])
    torch.manual_seed(0)
    shrinking = pf.Flow(normal(6), [pf.act_norm(6), pf.Slice(noise), pf.act_norm(4)]).double().initialize(rows())
    standard(shrinking.transforms[2].inv(rows()))
    assert shrinking.transforms[0].fitted


def test_what_is_inverted_is_left_as_it_is_and_it_says_so():
    data = rows()
    flow = pf.Flow(normal(4), [pf.Inverted(pf.act_norm(4)), pf.act_norm(4)]).double()
    with pytest.warns(UserWarning, match=r"Inverted\(ActNorm\) stays as it is") as caught:
        flow.initialize(data)
    assert [w.filename for w in caught] == [__file__]
    assert not flow.transforms[0].layer.fitted
    assert flow.transforms[1].fitted
    twice = pf.Flow(normal(4), [pf.Inverted(pf.Inverted(pf.act_norm(4)))]).double().initialize(data)
    standard(twice.transforms.inv(data))


def test_no_layer_to_fit_changes_nothing():
    flow = pf.Flow(normal(4), [scatter(pf.lu_linear(4)), scatter(pf.affine_coupling(4))]).double()
    before = copy.deepcopy(flow.state_dict())
    flow.initialize(rows())
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_a_layer_of_ones_own_is_fitted():
    class Centre(pf.Shift):
        def fit(self, data):
            with torch.no_grad():
                self.bias.copy_(data.reshape(-1, self.input_dim).median(0).values)
            return self

    flow = pf.Flow(normal(4), [pf.act_norm(4), Centre(4)]).double().initialize(rows())
    close(flow.transforms[1].bias, rows().median(0).values)
    standard(flow.transforms.inv(rows()))


def test_as_a_pyro_module():
    flow = PyroModule[pf.Flow](normal(4), [pf.act_norm(4), pf.orthogonal(4), pf.act_norm(4)]).double()
    standard(flow.initialize(rows()).transforms.inv(rows()))


def test_the_memo_does_not_remember_what_was_before():
    data = rows()
    flow = pf.Flow(normal(4), [pf.act_norm(4)]).double()
    d = flow()
    before = d.log_prob(data)
    flow.initialize(data)
    assert not torch.allclose(d.log_prob(data), before)
    close(d.log_prob(data), pf.Flow(normal(4), [pf.act_norm(4).double().fit(data)])().log_prob(data))


@pytest.mark.parametrize(
    ("parts", "args", "kind", "message"),
    [
        (pf.act_norm, (rows(d=3),), ValueError, "4 elements along dim -1"),
        (pf.act_norm, (rows()[0],), ValueError, "at least two rows"),
        (pf.act_norm, (torch.full((5, 4), float("nan"), dtype=F64),), ValueError, "5 of 5 hold NaN"),
        (pf.act_norm, (rows().long(),), TypeError, "Flow.initialize: data must be a floating point tensor"),
        (pf.act_norm, (rows(), rows()), ValueError, "no conditional part"),
        (pf.act_norm, (rows().float(),), TypeError, "dtype"),
        (lambda d: pf.conditional_act_norm(d, 2), (rows(),), ValueError, "needs a context"),
        (lambda d: pf.conditional_act_norm(d, 2), (rows(), rows()), ValueError, "context of shape"),
    ],
)
def test_bad_input(parts, args, kind, message):
    flow = pf.Flow(normal(4), [parts(4)]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(kind, match=message):
            flow.initialize(*args)
