"""AutoInvertibleFlow: right on posteriors that are known, inside Pyro's machinery, and clear about what it refuses."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam

from pyro_invflows.guides import AutoInvertibleFlow

Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
S = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


def gamma_model(data):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("y", dist.Poisson(rate), obs=data)


def schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, S), obs=Y)


def test_a_conjugate_posterior_is_found():
    """The posterior is Gamma(2 + 6, 1 + 3), and the evidence is known in closed form."""
    data = torch.tensor([1.0, 3.0, 2.0])
    guide = AutoInvertibleFlow(gamma_model).fit(data, seed=0, progress=False)
    exact = dist.Gamma(8.0, 4.0)
    evidence = 2 * 0.0 - torch.lgamma(torch.tensor(2.0)) + torch.lgamma(torch.tensor(8.0)) - 8 * torch.tensor(4.0).log()
    evidence = evidence - torch.lgamma(data + 1).sum()
    weights = guide.diagnostics.weights
    assert abs(weights.log_evidence - evidence) < 0.01
    assert weights.kl < 0.01
    assert abs(guide.diagnostics.missed) < 0.02
    samples = exact.sample((100000,)).sort().values
    for q, got in zip((0.1, 0.5, 0.9), guide.quantiles([0.1, 0.5, 0.9])["rate"], strict=True):
        assert abs(got - samples[int(q * 100000)]) < 0.1
    assert guide.median()["rate"].shape == ()


@pytest.fixture(scope="module")
def fitted():
    return AutoInvertibleFlow(schools).fit(seed=0, max_steps=200, progress=False)


def test_the_guide_works_inside_pyro(fitted):
    guide = fitted
    assert guide.diagnostics.weights.lost_share == 0
    report = str(guide.diagnostics)
    assert "k-hat" in report
    plain = -Trace_ELBO(num_particles=200).loss(schools, guide)
    many = -Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1).loss(schools, guide)
    assert abs(plain - guide.diagnostics.weights.elbo) < 0.3
    assert abs(many - guide.diagnostics.weights.elbo) < 0.3
    draws = Predictive(schools, guide=guide, num_samples=10)()
    assert draws["theta"].shape == (10, 8)
    assert draws["theta"].dtype == torch.float32
    assert guide.median()["theta"].shape == (8,)
    neutra = NeuTraReparam(guide)
    reparametrised = neutra.reparam(schools)
    trace = pyro.poutine.trace(reparametrised).get_trace()
    assert torch.isfinite(trace.log_prob_sum())
    z = torch.randn(5, 10, dtype=torch.float64)
    assert neutra.transform_sample(z)["theta"].shape == (5, 8)


def test_a_copy_leaves_the_original_alone_and_draws_the_same(fitted):
    twin = copy.deepcopy(fitted)
    assert fitted.model is not None
    e = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(twin.flow(e), fitted.flow(e))
    with pytest.raises(ValueError, match="hold the model"):
        twin.fit()


def test_svi_trains_a_guide_that_was_not_fitted():
    pyro.clear_param_store()
    guide = AutoInvertibleFlow(schools)
    elbo = Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_what_cannot_be_fitted_is_refused():
    def dependent():
        top = pyro.sample("top", dist.Uniform(0.0, 1.0))
        pyro.sample("below", dist.Uniform(torch.zeros(()), top))

    def never_finite():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.tensor(float("nan")))

    def subsampled():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 8, subsample_size=2) as i:
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y[i])

    for model, message in [
        (dependent, "'below' depends"),
        (never_finite, "not finite at any start"),
        (subsampled, "subsamples"),
        (lambda: pyro.sample("k", dist.Bernoulli(0.5)), "discrete"),
    ]:
        with pytest.raises(ValueError, match=message):
            AutoInvertibleFlow(model).fit(progress=False)


def two_modes():
    x = pyro.sample("x", dist.Normal(torch.zeros(4), 6.0).to_event(1))
    near = dist.Normal(x, 1.0).to_event(1)
    pyro.factor("y", torch.logaddexp(near.log_prob(torch.tensor(-4.0)), near.log_prob(torch.tensor(4.0)) + 1.0))


def test_a_missing_mode_is_found():
    guide = AutoInvertibleFlow(two_modes).fit(seed=0, max_steps=500, progress=False)
    torch.manual_seed(0)
    draws = guide.get_posterior().sample((4000,))
    share = torch.sigmoid(torch.tensor(1.0))  # both sides have the same prior
    assert abs((draws.sum(-1) > 0).double().mean() - share) < 0.1
    assert abs(guide.diagnostics.missed) < 0.1
