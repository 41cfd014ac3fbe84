"""The rooms under the guide: potential, start, Gaussian, importance weights, missing modes."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to

from pyro_invflows.inference.gaussian import Gaussian, fit_gaussian, fixed_normals
from pyro_invflows.inference.importance import importance, smoothed
from pyro_invflows.inference.missing import missed_evidence, mixture_weights
from pyro_invflows.inference.potential import ModelStructureError, Potential
from pyro_invflows.inference.start import bfgs_paths, choose, inverse_root, newton, starting_points

F64 = torch.float64
DATA = torch.tensor([1.0, 2.0, 4.0], dtype=F64)


def constrained_model():
    zero, one = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)
    scale = pyro.sample("scale", dist.Gamma(2 * one, 3 * one))
    share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=F64)))
    below = pyro.sample("below", dist.Uniform(zero, scale))  # a support that depends on another site
    with pyro.plate("data", 3):
        effect = pyro.sample("effect", dist.Normal(zero, scale))
        pyro.sample("y", dist.Normal(effect + below + share[0], one), obs=DATA)


def test_the_potential_is_the_log_joint_with_the_jacobians():
    """Independent answer: the densities written out, and torch's own maps to the supports."""
    potential = Potential(constrained_model)
    assert (potential.dim, potential.mode, potential.dtype) == (7, "vmap", F64)
    x = torch.randn(4, 7, dtype=F64)
    got = potential.value(x)
    for row, u in zip(x, got, strict=True):
        positive, simplex = biject_to(dist.constraints.positive), biject_to(dist.constraints.simplex)
        scale, share = positive(row[0]), simplex(row[1:3])
        interval = biject_to(dist.constraints.interval(torch.zeros((), dtype=F64), scale))
        below, effect = interval(row[3]), row[4:7]
        log_p = dist.Gamma(2.0, 3.0).log_prob(scale) + positive.log_abs_det_jacobian(row[0], scale)
        log_p = log_p + dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=F64)).log_prob(share)
        log_p = log_p + simplex.log_abs_det_jacobian(row[1:3], share)
        log_p = log_p - scale.log() + interval.log_abs_det_jacobian(row[3], below)
        log_p = log_p + dist.Normal(0.0, scale).log_prob(effect).sum()
        log_p = log_p + dist.Normal(effect + below + share[0], 1.0).log_prob(DATA).sum()
        torch.testing.assert_close(u, -log_p)
    values = potential.constrain(x)
    torch.testing.assert_close(values["scale"], x[:, 0].exp())
    assert values["share"].shape == (4, 3)
    assert (values["below"] < values["scale"]).all()


def test_gradient_and_hessian_agree_with_finite_differences():
    potential = Potential(constrained_model)
    x, h = torch.randn(2, 7, dtype=F64), 1e-5
    _, g = potential.value_and_grad(x)
    hessian = potential.hessian(x)
    for i in range(7):
        step = h * torch.eye(7, dtype=F64)[i]
        (up, g_up), (down, g_down) = potential.value_and_grad(x + step), potential.value_and_grad(x - step)
        torch.testing.assert_close(g[:, i], (up - down) / (2 * h), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(hessian[:, i], (g_up - g_down) / (2 * h), rtol=1e-5, atol=1e-6)


def test_a_model_that_vmap_cannot_run_is_run_by_a_loop():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        float(z.sum())  # not possible under vmap

    potential = Potential(model)
    x = torch.randn(3, 2, dtype=F64)
    assert potential.mode == "loop"
    torch.testing.assert_close(potential.value(x), -dist.Normal(0.0, 1.0).log_prob(x).sum(1))


def test_rows_that_fail_are_lost_alone():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        matrix = torch.stack([torch.stack([z + 1, 0 * z]), torch.stack([0 * z, 1 + 0 * z])])
        pyro.factor("det", torch.linalg.cholesky(matrix).diagonal().log().sum())

    potential = Potential(model)
    u, g = potential.value_and_grad(torch.tensor([[0.5], [-2.0], [1.0]], dtype=F64))
    assert torch.isfinite(u).tolist() == [True, False, True]
    assert g[1] == 0
    assert u[1] == math.inf
    z = torch.tensor([0.5, 1.0], dtype=F64)
    torch.testing.assert_close(u[[0, 2]], -dist.Normal(0.0, 1.0).log_prob(z) - 0.5 * (1 + z).log())
    assert (potential.rows, potential.lost) >= (3, 1)


def test_models_that_cannot_be_fitted_are_refused():
    with pytest.raises(ValueError, match="none"):
        Potential(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(())))
    with pytest.raises(ValueError, match="'k' is discrete"):
        Potential(lambda: pyro.sample("k", dist.Bernoulli(0.5)))

    def changing():
        changing.runs += 1
        pyro.sample(f"z{changing.runs > 1}", dist.Normal(0.0, 1.0))

    changing.runs = 0
    with pytest.raises(ModelStructureError, match="same latent sites"):
        Potential(changing)


class Quadratic:
    """A Gaussian with standard deviations that differ by 1e6, far from the origin."""

    noise = 1e-14

    def __init__(self, dim=5):
        generator = torch.Generator().manual_seed(1)
        factor = torch.randn(dim, dim, generator=generator, dtype=F64) + 2 * torch.eye(dim, dtype=F64)
        factor = torch.logspace(-3, 3, dim, dtype=F64)[:, None] * factor
        self.loc, self.cov = 100 * torch.logspace(-3, 3, dim, dtype=F64), factor @ factor.mT
        self.precision = torch.linalg.inv(self.cov)

    def value_and_grad(self, x):
        g = (x - self.loc) @ self.precision
        return 0.5 * (g * (x - self.loc)).sum(1), g

    def value(self, x):
        return self.value_and_grad(x)[0]

    def hessian(self, x):
        return self.precision.expand(len(x), -1, -1)


def relative_error(got, expected):
    scale = expected.diagonal().rsqrt()
    return (scale[:, None] * (got - expected) * scale).abs().max()


def test_newton_solves_a_gaussian_in_one_step_whatever_the_units():
    target = Quadratic()
    paths = newton(target, starting_points(4, 5))
    assert len(paths.candidates) <= 8
    for candidate in paths.candidates[:4]:
        q = candidate.gaussian
        assert ((q.loc - target.loc) / target.cov.diagonal().sqrt()).abs().max() < 1e-6
        assert relative_error(q.scale @ q.scale.mT, target.cov) < 1e-6
    root, positive = inverse_root(torch.diag(torch.tensor([4.0, -9.0], dtype=F64)))
    assert not positive
    torch.testing.assert_close(root @ root.mT, torch.diag(torch.tensor([1 / 4, 1 / 9], dtype=F64)))


def test_bfgs_descends_a_curved_valley_from_every_start():
    def rosenbrock(x):
        a, b = x.unbind(1)
        r = b - a**2
        g = torch.stack([-40 * a * r - 2 * (1 - a), 20 * r], 1)
        return 10 * r**2 + (1 - a) ** 2, g

    paths = bfgs_paths(rosenbrock, starting_points(8, 2, torch.Generator().manual_seed(0)))
    assert (paths.u < 1e-3).all()  # in nats: how far x is off depends on the curvature
    best, witnesses = choose(lambda x: rosenbrock(x)[0], paths.candidates, generator=torch.Generator().manual_seed(0))
    assert (best.loc - 1).norm() < 1.5
    assert 1 <= len(witnesses) <= 8


def test_a_start_outside_the_domain_moves_in():
    def inside(x):
        u, g = 0.5 * x.square().sum(1), x
        good = u < 0.5
        return torch.where(good, u, math.inf), torch.where(good[:, None], g, 0.0)

    paths = bfgs_paths(inside, torch.full((1, 2), 10.0, dtype=F64))
    assert paths.u < 1e-6


def test_fixed_normals_are_white_and_the_gaussian_is_exact():
    draws = fixed_normals(64, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(0), torch.zeros(5, dtype=F64))
    torch.testing.assert_close(draws.mT @ draws / 64, torch.eye(5, dtype=F64))
    with pytest.raises(ValueError, match="at least 2"):
        fixed_normals(8, 5)
    target = Quadratic()
    start = Gaussian(target.loc + target.cov.diagonal().sqrt(), torch.diag(0.5 * target.cov.diagonal().sqrt()))
    q = fit_gaussian(target.value_and_grad, start, draws, max_calls=500)
    assert ((q.loc - target.loc) / target.cov.diagonal().sqrt()).abs().max() < 1e-2
    assert relative_error(q.scale @ q.scale.mT, target.cov) < 2e-2


def test_khat_of_pareto_weights_is_their_shape():
    generator = torch.Generator().manual_seed(0)
    for shape in (0.3, 0.9):
        uniform = torch.rand(20000, generator=generator, dtype=F64)
        result = importance(-shape * uniform.log())  # weights U^-k: a Pareto law with shape k
        assert abs(result.khat - shape) < 0.12
    w, _ = smoothed(-0.3 * uniform.log())
    assert (w.max() <= (-0.3 * uniform.log()).max()).item()
    assert importance(torch.full((100,), -math.inf)).lost_share == 1


def test_khat_agrees_with_arviz():
    az = pytest.importorskip("arviz")
    log_weights = 1.5 * torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=F64)
    w, khat = smoothed(log_weights)
    reference, reference_khat = az.psislw(log_weights.numpy())
    assert abs(khat - float(reference_khat)) < 0.02
    torch.testing.assert_close(w - w.logsumexp(0), torch.as_tensor(reference.copy()), rtol=0, atol=0.05)


def test_evidence_of_a_gaussian():
    """p = Z N(0, 1) with Z = e^2, q = N(0.2, 1.1): both the evidence and the divergence are known."""
    x = 0.2 + 1.1 * torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=F64)
    result = importance(2 + dist.Normal(0.0, 1.0).log_prob(x) - dist.Normal(0.2, 1.1).log_prob(x))
    kl = -math.log(1.1) + (1.1**2 + 0.2**2 - 1) / 2
    assert abs(result.log_evidence - 2) < 5 * result.log_evidence_se
    assert abs(result.kl - kl) < 5 * (result.elbo_se + result.log_evidence_se)
    assert result.log_evidence_se < 0.01


def test_half_the_mass_missing_is_log_two():
    one = torch.eye(1, dtype=F64)
    left, right = Gaussian(torch.tensor([-8.0], dtype=F64), one), Gaussian(torch.tensor([8.0], dtype=F64), one)

    def value(x):
        return -torch.logaddexp(left.log_prob(x), right.log_prob(x)) + math.log(2)

    generator = torch.Generator().manual_seed(0)
    draws = left.sample(1000, generator)
    for witnesses, expected in [([left, right], math.log(2)), ([left], 0.0)]:
        _, mixed = mixture_weights(value, draws, left.log_prob, witnesses, generator)
        assert abs(missed_evidence(mixed, -value(draws) - left.log_prob(draws)) - expected) < 0.1
