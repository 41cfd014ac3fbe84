"""Inside Pyro: modules, plates, guides, SVI; and failures of Pyro's own flows that must not occur here."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import SMALL, scatter
from pyro.distributions.transforms import iterated
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.nn import PyroModule
from test_memo import Counter

import pyro_invflows as pf
from pyro_invflows.linalg import accretive

FACTORIES = [
    pf.affine_coupling,
    pf.baird,
    pf.diagonal,
    pf.orthogonal,
    pf.permute,
    pf.prelu,
    pf.shift,
    pf.svd_linear,
]


def model():
    pyro.sample("z", dist.MultivariateNormal(torch.tensor([1.0, -2.0, 0.5]), torch.eye(3) + 0.5))


def mixing_layer(dim):
    return pf.Chain([pf.svd_linear(dim), pf.affine_coupling(dim, [8])])


@pytest.mark.parametrize("compose", [iterated, pf.stack], ids=["iterated", "stack"])
@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)
def test_every_factory_makes_a_guide(factory, compose):
    guide = AutoNormalizingFlow(model, partial(compose, 2, factory))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    if factory is pf.permute:  # nothing to learn, but it runs
        assert guide()["z"].shape == (3,)
        return
    for _ in range(3):
        assert torch.isfinite(torch.tensor(svi.step()))
    assert list(guide.parameters())
    assert pyro.infer.Predictive(model, guide=guide, num_samples=5)()["z"].shape == (5, 3)


@pytest.mark.parametrize("compose", [iterated, pf.stack], ids=["iterated", "stack"])
def test_the_guide_finds_a_gaussian_posterior(compose):
    """Independent answer: the model's own mean and covariance."""
    guide = AutoNormalizingFlow(model, partial(compose, 2, pf.svd_linear))
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.995})
    svi = SVI(model, guide, optim, Trace_ELBO(num_particles=8, vectorize_particles=True))
    for _ in range(500):
        svi.step()
    with torch.no_grad():
        z = guide.get_posterior().sample((20000,))
    torch.testing.assert_close(z.mean(0), torch.tensor([1.0, -2.0, 0.5]), rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(3) + 0.5, rtol=0, atol=0.15)


def test_one_network_evaluation_a_layer_in_an_svi_step():
    guide = AutoNormalizingFlow(model, partial(pf.stack, 3, partial(pf.affine_coupling, hidden_dims=[8])))
    guide()
    counter = Counter(guide)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step()
    assert counter.take() == 3


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_pyro_module_and_mixin(case, dim):
    layer = case.build(dim)
    x = case.points(dim)
    expected = layer(x).detach()
    pyro.module("layer", layer)
    names = {f"layer$$${name}" for name, p in layer.named_parameters()}
    assert names == set(pyro.get_param_store().keys())

    class Holder(PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, value):
            return self.layer(value)

    pyro.clear_param_store()
    torch.testing.assert_close(Holder()(x), expected)
    pyro.nn.module.to_pyro_module_(layer)
    assert isinstance(layer, PyroModule)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.inv(layer(x).detach()), x)


def test_a_bayesian_layer():
    layer = PyroModule[pf.Shift](3)
    layer.bias = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    x = torch.zeros(3)
    trace = pyro.poutine.trace(layer).get_trace(x)
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], trace.nodes["bias"]["value"])
    assert not torch.equal(layer(x), layer(x))
    y = layer(x)
    assert not torch.equal(layer.inv(y), x)  # a new bias: no stale entry
    scaled = PyroModule[pf.Diagonal](3)
    scaled.log_scale = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    y, ladj = pf.call_and_ladj(scaled, torch.ones(3))  # one evaluation sees one draw
    torch.testing.assert_close(ladj, y.log().sum())


def _conditional_flow(kind=pf.Flow):
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    return kind(base, [pf.orthogonal(3), pf.conditional_affine_coupling(3, 2, hidden_dims=[8])], trainable_base=True)


@pytest.mark.parametrize("way", ["subscript", "converted"])
def test_a_flow_is_a_pyro_module(way):
    """The abstract classes that Flow and Conditional inherited from had another metaclass than PyroModule."""
    if way == "subscript":
        flow = _conditional_flow(PyroModule[pf.Flow])
    else:
        flow = _conditional_flow()
        pyro.nn.module.to_pyro_module_(flow)
        assert isinstance(flow.transforms[1], PyroModule)
        assert isinstance(flow.transforms[1], pf.Conditional)
    assert isinstance(flow, PyroModule)
    plain = _conditional_flow()
    plain.load_state_dict(scatter(flow).state_dict())
    context, y = torch.randn(4, 2), torch.randn(4, 3)
    for own in (flow, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(own(context).log_prob(y), plain(context).log_prob(y))
    with pytest.raises(AttributeError, match=r"flow\(\)\.log_prob"):
        _ = flow.log_prob


def test_what_is_registered_with_pyro_keeps_its_interface():
    flow, layer = _conditional_flow(), pf.conditional_affine_coupling(3, 2, hidden_dims=[8])
    assert isinstance(flow, dist.ConditionalDistribution)
    assert isinstance(layer, dist.ConditionalTransform)
    assert isinstance(layer, dist.ConditionalTransformModule)
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    scatter(layer)
    d = dist.ConditionalTransformedDistribution(base, [layer.inv])
    context, y = torch.randn(4, 2), torch.randn(4, 3)
    expected = base.log_prob(layer.condition(context)(y)) + layer.condition(context).log_abs_det_jacobian(
        y, layer.condition(context)(y)
    )
    torch.testing.assert_close(d.condition(context).log_prob(y), expected)
    assert set(layer.inv.state_dict()) == {f"_transform.{name}" for name in layer.state_dict()}


def test_a_pyro_flow_inside_a_model_is_trained():
    """All parameters reach the store by their path; the solution is the Gaussian fitted to the data."""
    data = torch.randn(200, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.7]]) + 1.0

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            self.flow = PyroModule[pf.Flow](base, [pf.svd_linear(2)], trainable_base=True)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", self.flow(), obs=x)

    model = Model()
    pyro.nn.module.to_pyro_module_(model)
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step(data)
    names = {name.replace("$$$", ".") for name in pyro.get_param_store()}
    assert names == {name for name, _ in model.named_parameters()}
    best = dist.MultivariateNormal(data.mean(0), torch.cov(data.T, correction=0)).log_prob(data).mean()
    assert model.flow().log_prob(data).mean().item() > best.item() - 0.01


def test_the_base_of_a_pyro_flow_may_have_a_prior():
    flow = pf.Flow(dist.Normal(torch.zeros(2), 1.0).to_event(1), [pf.svd_linear(2)])
    pyro.nn.module.to_pyro_module_(flow)
    base = flow.base.base_distribution
    base.loc = pyro.nn.PyroSample(dist.Normal(torch.full((2,), 5.0), 1.0).to_event(1))
    trace = pyro.poutine.trace(lambda: pyro.sample("x", flow(), obs=torch.ones(2))).get_trace()
    trace.compute_log_prob()
    loc = trace.nodes["base.base_distribution.loc"]["value"]
    chain = flow.transforms
    expected = dist.TransformedDistribution(dist.Normal(loc, 1.0).to_event(1), [chain]).log_prob(torch.ones(2))
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)


@pytest.mark.parametrize("conditional", [False, True])
def test_a_bayesian_flow_is_scored_with_the_draws_in_the_trace(conditional):
    """The layers' parameters are drawn when the flow is called: the trace is scored after the model has ended."""

    def build():
        base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        if conditional:
            parts = [pf.conditional_affine_coupling(3, 2, hidden_dims=[8]), pf.conditional_diagonal(3, 2)]
        else:
            parts = [pf.orthogonal(3), pf.Inverted(pf.affine_coupling(3, [8])), pf.diagonal(3)]
        return pf.Flow(base, parts)

    flow, plain = build(), build()
    pyro.nn.module.to_pyro_module_(flow)
    for module in flow.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(torch.zeros(value.shape), 0.5).to_event(value.dim())
            setattr(module, name, pyro.nn.PyroSample(prior))
    y, context = torch.randn(3), [torch.randn(2)] if conditional else []
    trace = pyro.poutine.trace(lambda: pyro.sample("y", flow(*context), obs=y)).get_trace()
    trace.compute_log_prob()
    drawn = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    assert set(drawn) == {name for name, _ in plain.named_parameters()}
    state = plain.state_dict()
    plain.load_state_dict({**state, **drawn})
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], plain(*context).log_prob(y))
    assert not torch.equal(flow(*context).log_prob(y), flow(*context).log_prob(y))


@pytest.mark.parametrize("elbo", [Trace_ELBO, JitTrace_ELBO])
@pytest.mark.parametrize("vectorised", [False, True])
def test_a_flow_inside_plates_and_particles(elbo, vectorised, monkeypatch):
    monkeypatch.setattr(accretive, "_FEWEST_ROWS", 0)
    layers = [mixing_layer(3), pf.low_rank_residual(3, 2)]
    flow = pf.Flow(dist.Normal(torch.zeros(3), 1.0).to_event(1), layers, trainable_base=True)

    def model():
        with pyro.plate("a", 4, dim=-1), pyro.plate("b", 2, dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("a", 4, dim=-1), pyro.plate("b", 2, dim=-2):
            pyro.sample("z", flow())

    options = {"num_particles": 3, "vectorize_particles": vectorised, "max_plate_nesting": 2}
    if elbo is JitTrace_ELBO:
        options["ignore_jit_warnings"] = True
    with pytest.warns() if elbo is JitTrace_ELBO else _nothing():
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo(**options))
        losses = [svi.step() for _ in range(4)]
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_maximum_likelihood_on_data_in_a_model():
    """pyro.sample(..., obs=data) with a flow as likelihood; the solution is the Gaussian fitted to the data."""
    data = torch.randn(500, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.7]]) + 1.0
    flow = pf.Flow(dist.Normal(torch.zeros(2), 1.0).to_event(1), pf.svd_linear(2))

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow(), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(400):
        svi.step(data)
    best = dist.MultivariateNormal(data.mean(0), torch.cov(data.T, correction=0)).log_prob(data).mean()
    assert flow().log_prob(data).mean().item() > best.item() - 0.01


def test_priors_and_hmc():
    """A flow as a prior inside NUTS: the sampler differentiates log_prob with respect to the value."""
    flow = pf.Flow(dist.Normal(torch.zeros(2), 1.0).to_event(1), scatter(mixing_layer(2), 0.3))

    def model():
        pyro.sample("x", flow())

    mcmc = pyro.infer.MCMC(
        pyro.infer.NUTS(model, max_tree_depth=5), num_samples=200, warmup_steps=100, disable_progbar=True
    )
    mcmc.run()
    x = mcmc.get_samples()["x"]
    exact = flow().sample((20000,))
    assert ((x.mean(0) - exact.mean(0)).abs() < 0.6 * exact.std(0)).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
@pytest.mark.parametrize("make", [pf.planar, pf.radial, pf.sylvester, pf.generalized_sylvester])
def test_a_traced_inverse_is_right_for_other_parameters(make):
    """A trace must contain all steps, not just those that the initial parameters (the identity) took."""
    flow = pf.Flow(dist.Normal(torch.zeros(5), 1.0).to_event(1), [make(5)]).double()
    data = 3 * torch.randn(20, 5, dtype=torch.float64)

    def model():
        pyro.module("flow", flow)
        with pyro.plate("n", 20):
            pyro.sample("y", flow(), obs=data)

    jit, eager = JitTrace_ELBO(ignore_jit_warnings=True), Trace_ELBO()
    jit.loss_and_grads(model, lambda: None)
    scatter(flow, 2.0)
    results = []
    for elbo in (jit, eager):
        flow.zero_grad()
        results.append([elbo.loss_and_grads(model, lambda: None), *(p.grad.clone() for p in flow.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def _contraction():
    sizes = pf.networks.LinearContraction(3, 6), torch.nn.Softplus(), pf.networks.LinearContraction(6, 3)
    return pf.ContractiveResidual(torch.nn.Sequential(*sizes))


@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.low_rank_residual(3),
        lambda: pf.contractive_residual(3),
        _contraction,
        lambda: pf.Inverted(_contraction()),
        lambda: pf.NumericalInverse(dist.transforms.planar(3)),
    ],
    ids=["low_rank", "mlp", "sequential", "sequential_inverted", "numerical"],
)
def test_solvers_refuse_to_be_traced(make):
    """A trace would fix the number of steps that the first data took, and cannot record a vector-Jacobian product."""
    flow = pf.Flow(dist.Normal(torch.zeros(3), 1.0).to_event(1), [make()])
    data = torch.randn(5, 3)

    def model():
        pyro.module("flow", flow)
        with pyro.plate("n", 5):
            pyro.sample("y", flow(), obs=data)

    with pytest.warns(), pytest.raises(NotImplementedError, match="JitTrace_ELBO"):
        JitTrace_ELBO(ignore_jit_warnings=True).loss_and_grads(model, lambda: None)
