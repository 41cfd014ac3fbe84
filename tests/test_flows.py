"""Ready-made flows: right densities in both directions, a sensible start, contexts, bases, copies."""

from __future__ import annotations

import copy
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from cases import scatter

import pyro_invflows as pf
from pyro_invflows import flows

CONTEXT = 2
VECTORS = {
    "real_nvp": flows.real_nvp,
    "masked_autoregressive_flow": flows.masked_autoregressive_flow,
    "neural_spline_flow": flows.neural_spline_flow,
    "neural_spline_flow couplings": lambda *args, **kw: flows.neural_spline_flow(*args, autoregressive=False, **kw),
    "sylvester_flow": flows.sylvester_flow,
    "residual_flow": flows.residual_flow,
    "gaussian": flows.gaussian,
}


def build(name, *sizes, base=None, seed=0):
    """Build a small flow in float64, away from where it starts."""
    torch.manual_seed(seed)
    small = {"context_hidden_dims": [4]} if name == "gaussian" else {"hidden_dims": [8], "num_layers": 2}
    flow = VECTORS[name](*sizes, **small, base=base).double()
    return scatter(flow, 0.5)


def rows(count, dim):
    return torch.randn(count, dim, dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_density_is_that_of_the_samples_and_has_the_jacobian_of_autodiff(name, dim):
    context = torch.randn(CONTEXT, dtype=torch.float64)
    for distribution in (build(name, dim)(), build(name, dim, CONTEXT)(context)):
        inverse = distribution.transforms[0].inv
        for x in rows(2, dim):
            jacobian = torch.autograd.functional.jacobian(inverse, x)
            normal = -0.5 * inverse(x).square().sum() - 0.5 * dim * math.log(2 * math.pi)
            torch.testing.assert_close(distribution.log_prob(x), normal + jacobian.slogdet()[1])
        y, log_prob = distribution.rsample_and_log_prob((4,))
        torch.testing.assert_close(distribution.log_prob(y.clone()), log_prob, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", VECTORS)
def test_one_dimension_integrates_to_one(name):
    grid = torch.linspace(-60, 60, 40_001, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        density = build(name, 1)().log_prob(grid).exp()
    assert torch.trapezoid(density, grid.squeeze(-1)).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", VECTORS)
def test_it_starts_as_the_gaussian_of_the_data(name):
    data = rows(400, 3) @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.3]], dtype=torch.float64)
    expected = dist.MultivariateNormal(data.mean(0), torch.cov(data.T)).log_prob(data)
    context = torch.randn(400, CONTEXT, dtype=torch.float64)
    plain, conditional = VECTORS[name](3).double(), VECTORS[name](3, CONTEXT).double()
    for log_prob in (
        plain.initialize(data)().log_prob(data),
        conditional.initialize(data, context)(context).log_prob(data),
    ):
        # the shrinkage of the correlations is all that differs
        torch.testing.assert_close(log_prob, expected, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("name", VECTORS)
def test_the_context_matters_and_every_parameter_learns(name):
    flow = build(name, 3, CONTEXT)
    x, context = rows(6, 3), torch.randn(6, CONTEXT, dtype=torch.float64)
    log_prob = flow(context).log_prob(x)
    assert (flow(context + 1).log_prob(x) - log_prob).abs().min() > 1e-6
    log_prob.sum().backward()
    silent = [key for key, p in flow.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("name", VECTORS)
def test_copies_pickles_and_states_score_alike(name):
    flow, x = build(name, 3).initialize(rows(50, 3)), rows(5, 3)
    expected = flow().log_prob(x)
    loaded = build(name, 3, seed=1)
    loaded.load_state_dict(flow.state_dict())
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), loaded):
        assert torch.equal(other().log_prob(x), expected)


@pytest.mark.parametrize("name", ["neural_spline_flow couplings", "real_nvp"])
def test_it_compiles_as_one_graph(name):
    torch.compiler.reset()
    torch.distributions.Distribution.set_default_validate_args(False)  # as torch.compile does by itself, a call later
    flow, x = build(name, 3), rows(5, 3)
    compiled = torch.compile(lambda x: flow().log_prob(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flow().log_prob(x))


def test_a_base_of_ones_own():
    base = dist.StudentT(torch.tensor(3.0, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)).to_event(1)
    flow, x = build("real_nvp", 2, base=base), rows(1, 2)[0]
    jacobian = torch.autograd.functional.jacobian(flow.transforms.inv, x)
    expected = base.log_prob(flow.transforms.inv(x)) + jacobian.slogdet()[1]
    torch.testing.assert_close(flow().log_prob(x), expected)
    with pytest.raises(ValueError, match=r"one event of shape \(3,\), but has the shape \(2,\)"):
        flows.real_nvp(3, base=base)


def test_layers_alternate_and_are_as_many_as_asked_for():
    flow = flows.neural_spline_flow(4, num_layers=3)
    kinds = [type(getattr(part, "layer", part)).__name__ for part in flow.transforms]
    assert kinds == ["SplineAutoregressive", "LULinear"] * 3 + ["Spline", "Whitening"]


@pytest.mark.parametrize("scales", [1, 2])
def test_glow_has_the_density_of_all_its_noise(scales):
    flow = scatter(flows.glow((1, 4, 4), num_scales=scales, num_layers=2, hidden_dims=[4]).double(), 0.3)
    image = torch.randn(1, 4, 4, dtype=torch.float64)

    def noise(image):
        return torch.cat([e.flatten() for e in flow.transforms.latents(image).values()])

    z, jacobian = noise(image), torch.autograd.functional.jacobian(noise, image).reshape(16, 16)
    expected = -0.5 * z.square().sum() - 8 * math.log(2 * math.pi) + jacobian.slogdet()[1]
    torch.testing.assert_close(flow().log_prob(image), expected)
    assert flow().sample((3,)).shape == (3, 1, 4, 4)


def test_glow_is_initialised_from_images():
    data = 100 + 7 * torch.randn(50, 2, 4, 4)
    flow = flows.glow((2, 4, 4), num_scales=1, num_layers=2, hidden_dims=[4])
    z = flow.initialize(data).transforms.inv(data)
    assert z.mean().abs() < 0.05
    assert abs(z.std() - 1) < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flows.neural_spline_flow(0), "neural_spline_flow: input_dim must be at least 1"),
        (lambda: flows.real_nvp(2, -1), "real_nvp: context_dim must be at least 0"),
        (lambda: flows.residual_flow(2, num_layers=0), "residual_flow: num_layers must be at least 1"),
        (lambda: flows.neural_spline_flow(2, num_bins=1), "num_bins"),
        (lambda: flows.neural_spline_flow(2, bound=0.0), "bound"),
        (lambda: flows.residual_flow(2, lipschitz=1.0), "lipschitz"),
        (lambda: flows.glow((3, 6, 8)), "divisible by 4, but the image"),
        (lambda: flows.glow((8, 8)), r"\(channels, height, width\)"),
        (lambda: flows.real_nvp(2)(torch.zeros(2)), "takes no context"),
        (lambda: flows.real_nvp(2, 2)(), "context"),
    ],
)
def test_bad_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_they_are_a_module_of_the_package():
    assert pf.flows is flows
    assert all(callable(getattr(flows, name)) for name in flows.__all__)
