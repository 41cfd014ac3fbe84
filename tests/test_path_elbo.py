"""PathELBO: the gradient of Trace_ELBO without the score of the guide."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import scatter
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from torch.distributions import constraints

import pyro_invflows as pf

F64 = torch.float64
Y = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
SIGMA = 0.7


def zeros(*shape):
    return torch.zeros(shape, dtype=F64)


def ones(*shape):
    return torch.ones(shape, dtype=F64)


def normal_model():
    """The posterior is normal with mean Y / (1 + SIGMA^2) and variance SIGMA^2 / (1 + SIGMA^2)."""
    z = pyro.sample("z", dist.Normal(zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, SIGMA).to_event(1), obs=Y)


POSTERIOR_MEAN, POSTERIOR_SD = Y / (1 + SIGMA**2), SIGMA / (1 + SIGMA**2) ** 0.5


def normal_guide(loc=None, scale=None):
    loc = pyro.param("loc", zeros(3) + 0.3 if loc is None else loc)
    scale = pyro.param("scale", 0.5 * ones(3) if scale is None else scale, constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def flow_guide(flow):
    pyro.module("flow", flow)
    pyro.sample("z", flow())


def a_flow(dim=3):
    layers = [scatter(pf.affine_coupling(dim, [8])), scatter(pf.svd_linear(dim), 0.3), pf.sinh_arcsinh(dim)]
    return pf.Flow(dist.Normal(zeros(dim), 1.0).to_event(1), [layer.double() for layer in layers])


def plated_model():
    mu = pyro.sample("mu", dist.Normal(zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 12, subsample_size=4, dim=-1), poutine.scale(scale=0.5):
        z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        with poutine.mask(mask=torch.tensor([True, False, True, True])):
            pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=torch.ones(4, 2, dtype=F64))


def plated_guide(flow):
    """Local latents that depend on the global one, by a flow and by parameters."""
    pyro.module("flow", flow)
    mu = pyro.sample("mu", flow())
    shift = pyro.param("shift", 0.1 * ones(2))
    with pyro.plate("data", 12, subsample_size=4, dim=-1), poutine.scale(scale=0.5):
        pyro.sample("z", dist.Normal(mu * shift.exp() + mu**2, 0.3).to_event(1))


def local_model():
    with pyro.plate("data", 12, subsample_size=4, dim=-1), poutine.scale(scale=0.5):
        z = pyro.sample("z", dist.Normal(zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=ones(4))


def local_guide(flow):
    pyro.module("flow", flow)
    mask = poutine.mask(mask=torch.tensor([True, False, True, True]))
    with pyro.plate("data", 12, subsample_size=4, dim=-1), poutine.scale(scale=0.5), mask:
        pyro.sample("z", flow())


def constrained_model():
    tau = pyro.sample("tau", dist.HalfCauchy(ones()))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(zeros(), tau))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=Y)


def auto_flow(model):
    return AutoNormalizingFlow(model, partial(pf.stack, 2, pf.affine_coupling, hidden_dims=[8], between=pf.permute))


CASES = {
    "parameters": lambda: (normal_model, normal_guide),
    "flow": lambda: (normal_model, partial(flow_guide, a_flow())),
    "sites that depend on each other": lambda: (plated_model, partial(plated_guide, a_flow(2))),
    "flow in a plate, scaled and masked": lambda: (local_model, partial(local_guide, a_flow())),
    "AutoNormalizingFlow": lambda: (constrained_model, auto_flow(constrained_model)),
    "AutoMultivariateNormal": lambda: (constrained_model, AutoMultivariateNormal(constrained_model)),
    "AutoNormal": lambda: (constrained_model, AutoNormal(constrained_model)),
}


@pytest.fixture
def doubles():
    """AutoGuides make their parameters in the default dtype."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def parameters():
    return dict(pyro.get_param_store().named_parameters())


def gradients(elbo, model, guide, seed):
    pyro.set_rng_seed(seed)
    for p in parameters().values():
        p.grad = None
    loss = elbo.loss_and_grads(model, guide)
    return loss, {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters().items()}


@pytest.mark.parametrize("name", CASES)
def test_the_difference_to_trace_elbo_is_the_score(name, doubles):
    model, guide = CASES[name]()
    guide()
    for p in parameters().values():
        p.data += 0.2 * torch.randn_like(p)
    loss, path = gradients(pf.PathELBO(), model, guide, 1)
    expected_loss, plain = gradients(Trace_ELBO(), model, guide, 1)
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    # the density of the same draws as a function of the parameters alone
    pyro.set_rng_seed(1)
    drawn = poutine.trace(guide).get_trace()
    for site in list(drawn.nodes.values()):
        if site["type"] == "sample":
            if isinstance(site["fn"], dist.Delta):
                drawn.remove_node(site["name"])  # follows from the others
            else:
                site["value"] = site["value"].detach()
    for p in parameters().values():
        p.grad = None
    poutine.trace(poutine.replay(guide, trace=drawn)).get_trace().log_prob_sum().backward()
    for key, p in parameters().items():
        score = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(plain[key] - path[key], score, rtol=1e-7, atol=1e-7)
    assert any((plain[key] - path[key]).abs().max() > 1e-2 for key in plain)


@pytest.mark.parametrize("name", ["parameters", "flow"])
def test_zero_variance_at_the_optimum(name):
    if name == "flow":
        flow = pf.Flow(dist.Normal(zeros(3), 1.0).to_event(1), [pf.diagonal(3).double()])
        with torch.no_grad():
            flow.transforms[0].log_scale.fill_(POSTERIOR_SD).log_()
            flow.transforms[0].bias.copy_(POSTERIOR_MEAN)
        guide = partial(flow_guide, flow)
    else:
        guide = partial(normal_guide, POSTERIOR_MEAN.clone(), POSTERIOR_SD * ones(3))
    guide()
    for seed in range(3):
        _, path = gradients(pf.PathELBO(), normal_model, guide, seed)
        assert max(g.abs().max() for g in path.values()) < 1e-12
        _, plain = gradients(Trace_ELBO(), normal_model, guide, seed)
        assert max(g.abs().max() for g in plain.values()) > 0.1


@pytest.mark.parametrize("elbo", [pf.PathELBO, Trace_ELBO])
@pytest.mark.parametrize("vectorize", [True, False])
def test_the_expected_gradient_in_closed_form(elbo, vectorize):
    normal_guide()
    n = 20000 if vectorize else 200
    elbo = elbo(num_particles=n, vectorize_particles=vectorize, max_plate_nesting=0)
    loss, found = gradients(elbo, normal_model, normal_guide, 0)
    loc, scale = 0.3, 0.5
    precision = 1 / POSTERIOR_SD**2
    by_loc = precision * (loc - POSTERIOR_MEAN)
    by_log_scale = (precision * scale**2 - 1) * ones(3)
    error = 6 * precision / n**0.5
    torch.testing.assert_close(found["loc"], by_loc, rtol=0, atol=error)
    torch.testing.assert_close(found["scale"], by_log_scale, rtol=0, atol=error)
    evidence = dist.Normal(zeros(3), (1 + SIGMA**2) ** 0.5).log_prob(Y).sum()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(loc * ones(3), scale), torch.distributions.Normal(POSTERIOR_MEAN, POSTERIOR_SD)
    )
    assert abs(-float(loss) - float(evidence - kl.sum())) < 6 * error


def test_flows_have_the_same_expected_gradient_as_with_trace_elbo():
    """Means over many draws agree within their errors, and the path gradient has the smaller variance."""
    flow = pf.Flow(
        dist.Normal(zeros(3), 1.0).to_event(1), [pf.diagonal(3).double(), pf.affine_coupling(3, [4]).double()]
    )
    with torch.no_grad():  # close to the posterior
        flow.transforms[0].log_scale.fill_(POSTERIOR_SD + 0.05).log_()
        flow.transforms[0].bias.copy_(POSTERIOR_MEAN + 0.05)
    guide = partial(flow_guide, flow)
    guide()
    means, variances = [], []
    for elbo in (pf.PathELBO, Trace_ELBO):
        run = elbo(num_particles=100, vectorize_particles=True, max_plate_nesting=0)
        draws = torch.stack(
            [
                torch.cat([g.reshape(-1) for g in gradients(run, normal_model, guide, seed)[1].values()])
                for seed in range(40)
            ]
        )
        means.append(draws.mean(0))
        variances.append(draws.var(0))
    error = ((variances[0] + variances[1]) / 40).sqrt()
    assert ((means[0] - means[1]).abs() <= 5 * error + 1e-12).all()
    assert variances[0].sum() < 0.2 * variances[1].sum()


def test_vectorised_plates_scale_as_in_trace_elbo():
    """The loss is the same, and so is the mean gradient, within errors."""
    flow = a_flow()
    guide = partial(local_guide, flow)
    guide()
    run = partial(pf.PathELBO, num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    loss, found = gradients(run(), local_model, guide, 3)
    expected, plain = gradients(Trace_ELBO(64, vectorize_particles=True, max_plate_nesting=1), local_model, guide, 3)
    assert loss == pytest.approx(expected, rel=1e-9)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in plain.items()}
    total = {key: torch.stack([gradients(run(), local_model, guide, s)[1][key] for s in range(10)]) for key in found}
    other = Trace_ELBO(64, vectorize_particles=True, max_plate_nesting=1)
    rest = {key: torch.stack([gradients(other, local_model, guide, s)[1][key] for s in range(10)]) for key in found}
    for key in found:
        error = ((total[key].var(0) + rest[key].var(0)) / 10).sqrt()
        assert ((total[key].mean(0) - rest[key].mean(0)).abs() <= 6 * error + 1e-9).all(), key


def test_svi_reaches_the_posterior():
    flow = pf.Flow(dist.Normal(zeros(3), 1.0).to_event(1), [pf.svd_linear(3).double()])
    guide = partial(flow_guide, flow)
    svi = SVI(normal_model, guide, pyro.optim.Adam({"lr": 0.05}), pf.PathELBO())
    for _ in range(600):
        svi.step()
    layer = flow.transforms[0]
    torch.testing.assert_close(layer.bias.detach(), POSTERIOR_MEAN, rtol=0, atol=1e-3)
    covariance = (layer.matrix @ layer.matrix.mT).detach()
    torch.testing.assert_close(covariance, POSTERIOR_SD**2 * torch.eye(3, dtype=F64), rtol=0, atol=1e-3)


def test_the_value_alone_costs_no_gradient():
    elbo = pf.PathELBO()
    with torch.no_grad():
        pyro.set_rng_seed(0)
        loss = elbo.loss(normal_model, normal_guide)
        pyro.set_rng_seed(0)
        assert loss == Trace_ELBO().loss(normal_model, normal_guide)


def test_sites_without_a_reparametrised_sample_are_refused():
    def model():
        pyro.sample("k", dist.Poisson(ones()))

    def guide():
        pyro.sample("k", dist.Poisson(pyro.param("rate", ones())))

    with pytest.raises(ValueError, match="'k' is drawn from Poisson"):
        pf.PathELBO().loss_and_grads(model, guide)
