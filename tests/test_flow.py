"""Flow and FlowDistribution."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import scatter

import pyro_invflows as pf


def layers(dim):
    return scatter(pf.Chain([pf.orthogonal(dim), pf.affine_coupling(dim, [8]), pf.baird(dim)]))


def eye(n):
    return torch.eye(n)


BASES = {
    "normal": lambda: dist.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).to_event(1),
    "expanded": lambda: dist.Normal(0.5, 2.0).expand([3]).to_event(1),
    "torch's": lambda: torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), torch.ones(3)), 1),
    "batched": lambda: dist.Normal(torch.zeros(4, 3), 1.0).to_event(1),
    "student": lambda: dist.StudentT(4.0, torch.zeros(3), 1.0).to_event(1),
    "laplace": lambda: dist.Laplace(torch.zeros(3), 2.0).to_event(1),
    "tril": lambda: dist.MultivariateNormal(torch.zeros(3), scale_tril=2 * eye(3)),
    "covariance": lambda: dist.MultivariateNormal(torch.zeros(3), eye(3) + 0.5),
    "low rank": lambda: dist.LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3)),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.tensor([0.1, 0.9])), dist.Normal(torch.randn(2, 3), 1.0).to_event(1)
    ),
}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_the_base_is_rebuilt(name, trainable):
    base, chain = BASES[name](), layers(3)
    flow = pf.Flow(base, chain, trainable_base=trainable)
    y = torch.randn(5, *base.batch_shape, 3)
    expected = dist.TransformedDistribution(base, [chain]).log_prob(y)
    torch.testing.assert_close(flow().log_prob(y), expected)
    assert bool(list(flow.base.parameters())) == trainable
    if trainable:
        flow().log_prob(y).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    other = pf.Flow(BASES[name](), layers(3), trainable_base=trainable)
    other.load_state_dict(flow.state_dict())
    torch.testing.assert_close(other().log_prob(y), expected)
    torch.testing.assert_close(copy.deepcopy(flow)().log_prob(y), expected)
    assert flow.double()().log_prob(y.double()).dtype == torch.float64
    if name != "student":  # torch's StudentT builds a Chi2 that always validates, which meta tensors cannot
        assert flow.to("meta")().sample().is_meta


def test_the_base_is_cloned():
    scale = torch.ones(3)
    flow = pf.Flow(dist.Normal(torch.zeros(3), scale).to_event(1), layers(3))
    scale.fill_(100.0)
    torch.testing.assert_close(flow().base_dist.base_dist.scale, torch.ones(3))


def test_a_base_whose_tensors_require_gradients_is_refused():
    """A silent copy would leave the caller's parameter at its initial value."""
    loc = torch.nn.Parameter(torch.zeros(3))
    mixture = dist.Categorical(logits=torch.zeros(2, requires_grad=True))
    parts = dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
    bases = {
        "parameter": dist.Normal(loc, 1.0).to_event(1),
        "computed": dist.MultivariateNormal(2 * loc, eye(3)),
        "expanded": dist.Normal(torch.zeros((), requires_grad=True), 1.0).expand([3]).to_event(1),
        "mixture": dist.MixtureSameFamily(mixture, parts),
        "pyro.param": dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1),
    }
    for base in bases.values():
        with pytest.raises(TypeError, match=r"require gradients.*trainable_base=True.*TransformedDistribution"):
            pf.Flow(base, layers(3))
        copied = pf.Flow(base, layers(3), trainable_base=True)
        assert list(copied.base.parameters())
    pf.Flow(dist.Normal(loc.detach(), 1.0).to_event(1), layers(3))


def test_both_remedies_train_the_location_of_the_base():
    """Maximum likelihood, whose closed form is the mean of the inverted data."""
    chain = scatter(pf.Chain([pf.orthogonal(2), pf.diagonal(2)])).requires_grad_(False)
    data = chain(torch.randn(50, 2) + torch.tensor([3.0, -2.0])).clone()
    loc = torch.zeros(2, requires_grad=True)
    base = dist.Normal(loc, 1.0).to_event(1)
    flow = pf.Flow(base, chain, trainable_base=True)
    for score, trained in ((flow, flow.base.base_distribution.loc), (None, loc)):
        optimiser = torch.optim.SGD([trained], lr=1.0)  # the Hessian is the unit matrix
        for _ in range(2):
            optimiser.zero_grad()
            d = dist.TransformedDistribution(base, [chain]) if score is None else score()
            (-d.log_prob(data).mean()).backward()
            optimiser.step()
        torch.testing.assert_close(trained.detach(), chain.inv(data).mean(0), rtol=1e-4, atol=1e-4)


def test_it_refuses_what_it_cannot_rebuild():
    class Odd(dist.Normal):
        def __init__(self, hidden):
            super().__init__(torch.zeros(hidden * 1), 1.0)
            self.event_hint = None

    for base in (Odd(3).to_event(1), dist.Normal(torch.zeros(3), 1.0).mask(False).to_event(1)):
        with pytest.raises(TypeError, match="cannot rebuild"):
            pf.Flow(base, layers(3))
    with pytest.raises(TypeError, match="expected a distribution"):
        pf.Flow(torch.zeros(3), layers(3))
    with pytest.raises(ValueError, match="4"):
        pf.Flow(dist.Normal(torch.zeros(4), 1.0).to_event(1), layers(3))
    with pytest.raises(TypeError, match="Linear"):
        pf.Flow(dist.Normal(torch.zeros(3), 1.0).to_event(1), [torch.nn.Linear(3, 3)])


def test_contexts_are_asked_for():
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    with pytest.raises(ValueError, match="no conditional part"):
        pf.Flow(base, layers(3))(torch.zeros(2))
    flow = pf.Flow(base, [layers(3), pf.conditional_shift(3, 2)])
    assert isinstance(flow, dist.ConditionalDistribution)
    with pytest.raises(ValueError, match="with a context"):
        flow()
    d = flow.condition(torch.randn(5, 2))
    assert isinstance(d, pf.FlowDistribution)
    assert d.batch_shape == (5,)
    assert len(list(flow.parameters())) == len(list(layers(3).parameters())) + 7


def test_pyros_conditional_layers_fit_too():
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    flow = pf.Flow(base, [pf.orthogonal(3), dist.transforms.conditional_affine_coupling(3, 2), pf.baird(3)])
    y = flow(torch.randn(2)).rsample((4,))
    assert flow(torch.randn(2)).log_prob(y).shape == (4,)


def test_flow_distribution_survives_expand_plates_and_to_event():
    flow = pf.Flow(dist.Normal(torch.zeros(3), 1.0).to_event(1), layers(3))
    d = flow()
    expanded = d.expand((4, 2))
    assert type(expanded) is pf.FlowDistribution
    assert expanded.batch_shape == (4, 2)
    y = expanded.sample((5,))
    assert y.shape == (5, 4, 2, 3)
    torch.testing.assert_close(expanded.log_prob(y), d.log_prob(y))
    torch.testing.assert_close(expanded.to_event(1).log_prob(y), d.log_prob(y).sum(-1))
    x, log_prob = expanded.rsample_and_log_prob((5,))
    assert x.shape == y.shape
    torch.testing.assert_close(log_prob, d.log_prob(x.clone()), rtol=1e-4, atol=1e-4)

    def model():
        with pyro.plate("a", 4):
            return pyro.sample("y", d)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["y"]["log_prob"].shape == (4,)


def test_rsample_and_log_prob_counts_elementwise_and_reshaping_layers():
    base = dist.Normal(torch.zeros(6), 1.0).to_event(1)
    reshape = torch.distributions.transforms.ReshapeTransform((6,), (2, 3))
    for transforms in ([pf.Sigmoid()], [reshape, pf.Baird()], [pf.Baird(), reshape, pf.orthogonal(3)], []):
        d = pf.FlowDistribution(base, transforms)
        y, log_prob = d.rsample_and_log_prob((4,))
        torch.testing.assert_close(log_prob, dist.TransformedDistribution(base, transforms).log_prob(y.clone()))
        torch.testing.assert_close(d.log_prob(y.clone()), log_prob)
    scalar = pf.FlowDistribution(dist.Normal(torch.zeros(3), 1.0), [pf.Sigmoid()])
    y, log_prob = scalar.rsample_and_log_prob((4,))
    assert log_prob.shape == (4, 3)


def test_validation_refuses_nan_and_wrong_shapes():
    d = pf.Flow(dist.Normal(torch.zeros(3), 1.0).to_event(1), layers(3))()
    before = d.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match=r"nan|support"):
        d.log_prob(torch.tensor([0.0, float("nan"), 1.0]))
    with pytest.raises(ValueError, match=r"event|size"):
        d.log_prob(torch.zeros(4))
    torch.testing.assert_close(d.log_prob(torch.zeros(3)), before)


def test_an_empty_batch_is_scored_with_validation_on():
    flow = pf.Flow(BASES["normal"](), layers(3))
    y = torch.zeros(2, 0, 3, requires_grad=True)
    value = flow().log_prob(y)
    assert value.shape == (2, 0)
    value.sum().backward()
    assert y.grad.shape == y.shape


def test_values_are_validated_as_by_the_given_base():
    flow = pf.Flow(dist.Exponential(torch.ones(2)).to_event(1), [pf.diagonal(2)])
    with pytest.raises(ValueError, match="support"):
        flow().log_prob(torch.tensor([-5.0, 0.5]))
    unchecked = dist.Exponential(torch.ones(2), validate_args=False).to_event(1)
    assert pf.Flow(unchecked, [pf.diagonal(2)])().log_prob(torch.tensor([-5.0, 0.5])).isfinite()


def test_a_flow_says_how_to_reach_its_distribution():
    flow = pf.Flow(dist.Normal(torch.zeros(3), 1.0).to_event(1), layers(3))
    for name in ("log_prob", "sample"):
        with pytest.raises(AttributeError, match=rf"flow\(\)\.{name}"):
            getattr(flow, name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = flow.nothing


@pytest.mark.parametrize("base_shape", [(), (3,), (4, 3)], ids=str)
def test_every_call_gives_the_distribution_that_torch_builds(base_shape):
    """Elementwise layers on a scalar base are reinterpreted or expanded by torch's constructor."""
    for base in (
        dist.Normal(torch.zeros(base_shape), 1.0),
        dist.Normal(torch.zeros((*base_shape, 3)), 1.0).to_event(1),
    ):
        chain = pf.Chain([pf.Baird(), pf.Sigmoid()]) if not base.event_shape else layers(3)
        flow, expected = pf.Flow(base, chain), dist.TransformedDistribution(base, [chain])
        d = flow()
        assert (d.batch_shape, d.event_shape) == (expected.batch_shape, expected.event_shape)
        assert d._validate_args == expected._validate_args
        y = d.sample((2,))
        torch.testing.assert_close(d.log_prob(y), expected.log_prob(y.clone()))
    needs_event = pf.Flow(dist.Normal(torch.zeros(3), 1.0), layers(3))  # torch makes the batch an event
    assert needs_event().event_shape == (3,)


def test_rsample_and_log_prob_through_a_change_of_event_dimension():
    base = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
    transforms = [torch.distributions.transforms.CorrCholeskyTransform()]  # vectors to matrices
    y, log_prob = pf.FlowDistribution(base, transforms).rsample_and_log_prob((4,))
    assert log_prob.shape == (4,)
    torch.testing.assert_close(log_prob, dist.TransformedDistribution(base, transforms).log_prob(y))


def test_a_distribution_tells_its_parameters_and_modules():
    """Methods that code optimising a bare distribution calls, such as sbi's variational posterior."""
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    inner, shared = pf.Flow(base, [pf.orthogonal(3)]), pf.affine_coupling(3, [8])
    foreign = dist.transforms.planar(3)
    wrapped = torch.distributions.ComposeTransform([foreign.inv, torch.distributions.AffineTransform(0.0, 2.0)])
    d = pf.FlowDistribution(inner(), [shared, wrapped, shared.inv])
    holder = torch.nn.ModuleList([inner.transforms, shared, foreign])
    assert {id(p) for p in d.parameters()} == {id(p) for p in holder.parameters()}
    assert len(list(d.parameters())) == len(list(holder.parameters()))
    assert all(isinstance(p, torch.nn.Parameter) for p in d.parameters())
    assert {id(m) for m in d.modules()} == {id(m) for m in holder.modules() if m is not holder}
    flow = pf.Flow(base, layers(3))
    assert [id(p) for p in flow().parameters()] == [id(p) for p in flow.transforms.parameters()]
    assert list(pf.FlowDistribution(base, []).parameters()) == []
    assert isinstance(d.expand((2,)), pf.FlowDistribution)
    assert len(list(d.expand((2,)).parameters())) == len(list(d.parameters()))
