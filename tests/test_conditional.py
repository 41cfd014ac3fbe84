"""Amortised layers: every layer with parameters, every shape of context and sample."""

from __future__ import annotations

import copy
import itertools
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import ALL, CONDITIONAL, image_base, scatter

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj

CONTEXT_DIM = 2
CONTEXTS = [(), (3,), (7, 1), (7, 3)]
SAMPLES = [(), (5,), (5, 3)]


def build(case, dim=None, seed=0):
    dim = case.dims[min(1, len(case.dims) - 1)] if dim is None else dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conditional = case.conditional(dim, CONTEXT_DIM).double()
        scatter(conditional, 0.5)
    return conditional, image_base(case.event(dim))


@pytest.mark.parametrize("case", CONDITIONAL)
def test_shapes_and_values_equal_a_loop_over_contexts(case):
    conditional, base = build(case)
    event = base.event_shape
    for batch, sample in itertools.product(CONTEXTS, SAMPLES):
        context = torch.randn(*batch, CONTEXT_DIM, dtype=torch.float64)
        d = dist.ConditionalTransformedDistribution(base, [conditional]).condition(context)
        assert d.batch_shape == batch
        assert d.event_shape == event
        y = d.rsample(sample)
        assert y.shape == sample + batch + event
        log_prob = d.log_prob(y.detach().clone())
        assert log_prob.shape == sample + batch
        flow = pf.Flow(base, [conditional])(context)
        torch.testing.assert_close(flow.log_prob(y), log_prob)
        assert flow.rsample(sample).shape == y.shape
        for index in itertools.product(*map(range, batch)):
            alone = dist.TransformedDistribution(base, [conditional.condition(context[index])])
            here = (..., *index, *[slice(None)] * len(event))
            torch.testing.assert_close(log_prob[(..., *index)], alone.log_prob(y[here].detach()))


@pytest.mark.parametrize("case", CONDITIONAL)
def test_one_context_scores_any_data(case):
    """Data with more, fewer and other batch dimensions than the context."""
    conditional, base = build(case)
    layer = conditional.condition(torch.randn(3, CONTEXT_DIM, dtype=torch.float64))
    for batch in [(), (1,), (3,), (4, 3), (4, 1), (2, 0, 3)]:
        x = base.sample(batch)
        full = torch.broadcast_shapes(batch, (3,))
        y, ladj = call_and_ladj(layer, x)
        assert y.shape == full + base.event_shape == layer.forward_shape(x.shape)
        back, inverse = inv_and_ladj(layer, x)
        assert back.shape == full + base.event_shape == layer.inverse_shape(x.shape)
        event_dim = len(base.event_shape) - layer.domain.event_dim
        for term in (ladj, inverse, layer.log_abs_det_jacobian(x, y)):
            assert term.shape[: term.dim() - event_dim] == full
        again, again_ladj = call_and_ladj(layer, back)
        torch.testing.assert_close(again, x.expand_as(again))
        torch.testing.assert_close(again_ladj, -inverse)


@pytest.mark.parametrize("case", CONDITIONAL)
@pytest.mark.parametrize("batch", [(70,), (2, 40)], ids=str)
def test_many_contexts(case, batch):
    """Batches larger than any number of rows that a layer inspects first."""
    conditional, base = build(case)
    context = torch.randn(*batch, CONTEXT_DIM, dtype=torch.float64)
    layer, x = conditional.condition(context), base.sample(batch)
    y = layer(x).detach().clone()
    torch.testing.assert_close(layer.inv(y).detach(), x, rtol=1e-7, atol=1e-7)
    some = (0,) * (len(batch) - 1) + (slice(60, 70) if batch[-1] == 70 else slice(30, 40),)
    torch.testing.assert_close(conditional.condition(context[some]).inv(y[some]), layer.inv(y.clone())[some])


@pytest.mark.parametrize("case", CONDITIONAL)
def test_equal_contexts_get_independent_noise(case):
    conditional, base = build(case)
    context = torch.ones(4, CONTEXT_DIM, dtype=torch.float64)
    for d in (
        dist.ConditionalTransformedDistribution(base, [conditional]).condition(context),
        pf.Flow(base, [conditional])(context),
    ):
        y = d.sample()
        for i, j in itertools.combinations(range(4), 2):
            assert not torch.allclose(y[i], y[j])


@pytest.mark.parametrize("case", CONDITIONAL)
def test_equals_the_template_at_the_start(case):
    dim = case.dims[-1]
    conditional = case.conditional(dim, CONTEXT_DIM).double()
    with torch.no_grad():
        for name, parameter in conditional.template.named_parameters():
            if "hypernet" not in name:  # a coupling's network starts at zero for every context
                parameter.add_(torch.rand_like(parameter))
    x = image_base(case.event(dim)).sample((3,))
    layer = conditional.condition(torch.randn(3, CONTEXT_DIM, dtype=torch.float64))
    for actual, expected in zip(call_and_ladj(layer, x), call_and_ladj(conditional.template, x), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("case", CONDITIONAL)
def test_gradcheck_to_the_context(case):
    conditional, base = build(case)
    context = torch.randn(3, CONTEXT_DIM, dtype=torch.float64, requires_grad=True)
    x = base.sample((3,)).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, v: call_and_ladj(conditional.condition(c), v), (context, x))
    assert torch.autograd.gradcheck(lambda c, v: inv_and_ladj(conditional.condition(c), v), (context, x))


@pytest.mark.parametrize("case", CONDITIONAL)
def test_gradients_reach_hypernetwork_and_template(case):
    conditional, base = build(case)
    d = pf.Flow(base, [conditional])(torch.randn(3, CONTEXT_DIM, dtype=torch.float64))
    y = d.rsample((4,))
    ((y**2).sum() + d.log_prob(torch.randn_like(y)).sum()).backward()
    for name, parameter in conditional.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_one_hypernetwork_evaluation_a_step():
    from test_memo import Counter

    layer = pf.Conditional(pf.Chain([pf.orthogonal(4), pf.affine_coupling(4, [8], context_dim=2)]), 2)
    counter = Counter(layer)
    base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    d = pf.Flow(base, [layer])(torch.randn(5, 2))
    assert counter.take() == 1  # the hypernetwork, eagerly
    d.log_prob(d.rsample())
    assert counter.take() == 1  # the coupling's network, once for both


@pytest.mark.parametrize("case", ALL)
def test_layers_without_parameters_refuse(case):
    if case.conditional is None and not list(case.make(case.dims[-1]).parameters()):
        with pytest.raises(ValueError, match="cannot be conditioned"):
            pf.Conditional(case.make(case.dims[-1]), CONTEXT_DIM)


def test_bad_contexts():
    layer = pf.conditional_orthogonal(4, 3)
    for context, error, message in (
        (torch.randn(5, 4), ValueError, r"shape \(\*B, 3\)"),
        (torch.tensor(1.0), ValueError, r"shape \(\*B, 3\)"),
        (torch.zeros(5, 3, dtype=torch.long), TypeError, "floating point"),
        ([1.0, 2.0, 3.0], TypeError, "list"),
        (torch.randn(5, 3, dtype=torch.float64), TypeError, "same dtype"),
    ):
        with pytest.raises(error, match=message):
            layer.condition(context)
    with pytest.raises(TypeError, match="template"):
        pf.Conditional(dist.transforms.Planar(3), 2)
    with pytest.raises(ValueError, match="context_dim=3"):
        pf.Conditional(pf.affine_coupling(4, context_dim=3), 2)
    with pytest.raises(ValueError, match="context_dim must be at least 1"):
        pf.Conditional(pf.shift(4), 0)
    with pytest.raises(ValueError, match=r"conditioned|cannot be"):
        pf.Conditional(pf.affine_coupling(4), 2)  # its network takes no context


def test_the_template_is_left_alone_also_by_threads():
    conditional = scatter(pf.conditional_svd_linear(4, 2), 0.5)
    contexts = torch.randn(4, 2)
    x = torch.randn(6, 4)
    with torch.no_grad():
        expected = [conditional.condition(c)(x) for c in contexts]
    before = copy.deepcopy(conditional.state_dict())
    errors = []

    def work(i):
        with torch.no_grad():
            for _ in range(100):
                if not torch.equal(conditional.condition(contexts[i])(x), expected[i]):
                    errors.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(v, conditional.state_dict()[k]) for k, v in before.items())
    assert len(list(conditional.template.parameters())) == 4


def test_a_conditioned_layer_is_an_ordinary_one():
    conditional = scatter(pf.conditional_svd_linear(4, 2), 0.5)
    layer = conditional.condition(torch.randn(3, 2))
    assert not list(layer.parameters())
    assert not layer.state_dict().keys() - {"sign_of_scale"}
    assert layer.batch_shape == (3,)
    assert layer.with_cache(0).batch_shape == (3,)
    assert conditional.template.batch_shape == ()
    matrix = layer.matrix
    assert matrix.shape == (3, 4, 4)
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), (matrix @ x.unsqueeze(-1)).squeeze(-1) + layer.bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pf.Inverted(layer)(layer(x).clone()), x, rtol=1e-3, atol=1e-3)
    assert pf.Inverted(layer).batch_shape == (3,)
    assert conditional.inv.condition(torch.randn(3, 2))(x).shape == x.shape


@pytest.mark.parametrize("vectorised", [False, True])
def test_amortised_guide_inside_plates(vectorised):
    """An encoder conditions a flow posterior: data plate, subsampling, vectorised particles."""
    data = torch.randn(20, 3)
    flow = pf.Flow(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), [pf.conditional_affine_coupling(2, 4, hidden_dims=[8])]
    )
    encoder = torch.nn.Linear(3, 4)

    def model(x):
        with pyro.plate("data", 20, subsample_size=5, dim=-1) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 1.0).to_event(1), obs=x[i])

    def guide(x):
        pyro.module("flow", flow)
        pyro.module("encoder", encoder)
        with pyro.plate("data", 20, subsample_size=5, dim=-1) as i:
            pyro.sample("z", flow(encoder(x[i])))

    elbo = pyro.infer.Trace_ELBO(num_particles=3, vectorize_particles=vectorised, max_plate_nesting=1)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    for _ in range(3):
        assert torch.isfinite(torch.tensor(svi.step(data)))
    trace = pyro.poutine.trace(guide).get_trace(data)
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (5, 2)
    assert trace.nodes["z"]["log_prob"].shape == (5,)


def _elementwise_among_vectors(dim):
    return pf.Chain([pf.orthogonal(4), pf.Baird(), pf.PReLU((4,))])


def _rows_among_images(dim):
    return pf.Chain([pf.orthogonal(2, dim=-3), pf.shift(3, dim=-1), pf.diagonal(5, dim=-2), pf.Baird((3,))])


def _nested(dim):
    coupling = pf.affine_coupling(4, [8], context_dim=CONTEXT_DIM)
    return pf.Chain(
        [pf.Inverted(pf.Chain([pf.Baird(), pf.svd_linear(4)])), coupling, pf.Chain([pf.PReLU()], recompute=True)]
    )


@pytest.mark.parametrize(
    ("make", "event"),
    [(_elementwise_among_vectors, (4,)), (_rows_among_images, (2, 5, 3)), (_nested, (4,))],
    ids=["elementwise among vectors", "rows among images", "nested"],
)
def test_chains_of_mixed_event_dimensions_equal_a_loop_over_contexts(make, event):
    conditional = scatter(pf.Conditional(make(0), CONTEXT_DIM), 0.5).double()
    base = image_base(event)
    for batch in ((), (event[-1],), (3, 1)):  # sizes that coincide must not be mistaken for one another
        context = torch.randn(*batch, CONTEXT_DIM, dtype=torch.float64)
        d = pf.Flow(base, [conditional])(context)
        assert d.batch_shape == batch
        y = d.sample((2,))
        assert y.shape == (2, *batch, *event)
        log_prob = d.log_prob(y)
        for index in itertools.product(*map(range, batch)):
            alone = dist.TransformedDistribution(base, [conditional.condition(context[index])])
            here = (..., *index, *[slice(None)] * len(event))
            torch.testing.assert_close(log_prob[(..., *index)], alone.log_prob(y[here]))


def test_a_layer_for_events_larger_than_its_own():
    base = image_base((2, 5, 3))
    context = torch.randn(3, CONTEXT_DIM, dtype=torch.float64)
    parts = [pf.orthogonal(2, dim=-3), pf.Conditional(pf.Baird(), CONTEXT_DIM, event_dim=3)]
    flow = scatter(pf.Flow(base, parts), 0.5).double()
    d = flow(context)
    assert d.batch_shape == (3,)
    y = d.sample()
    for i in range(3):
        torch.testing.assert_close(d.log_prob(y)[i], flow(context[i]).log_prob(y[i]))
    with pytest.raises(ValueError, match="event_dim=3"):
        pf.Flow(base, [parts[0], pf.Conditional(pf.Baird(), CONTEXT_DIM)]).double()(context)
    with pytest.raises(ValueError, match="at least that"):
        pf.Conditional(pf.shift(3), 2, event_dim=0)


def test_layers_inside_torchs_wrappers_are_conditioned():
    transforms = torch.distributions.transforms
    layers = [pf.diagonal(3), pf.baird(3), pf.orthogonal(3)]
    wrapped = transforms.ComposeTransform([layers[0], transforms.IndependentTransform(layers[1], 1), layers[2].inv])
    plain = pf.Chain([layers[0], layers[1], pf.Inverted(layers[2])])
    context, x = torch.randn(4, 2), torch.randn(4, 3)
    results = []
    for template in (pf.Chain(wrapped), plain):
        torch.manual_seed(0)
        layer = scatter(pf.Conditional(template, 2), 0.0)
        with torch.no_grad():
            layer.hypernet[-1].weight.normal_()
        results.append(pf.call_and_ladj(layer.condition(context), x))
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0][0], plain(x))


# ---------------------------------------------------------------------- a hypernetwork of one's own


class Own(torch.nn.Module):
    """A random network, not a Sequential, whose state changes when it is called in training mode."""

    def __init__(self, out, context_dim=CONTEXT_DIM):
        super().__init__()
        self.inner = torch.nn.Linear(context_dim, 5)
        self.norm = torch.nn.BatchNorm1d(5)
        self.out = torch.nn.Linear(5, out)

    def forward(self, context):
        flat = self.norm(self.inner(context.reshape(-1, context.shape[-1])))
        return self.out(torch.nn.functional.dropout(flat, training=self.training)).reshape(*context.shape[:-1], -1)


def own_parameters(case):
    """Return the number of elements that a context sets in a row's template, from the library's own network."""
    conditional, _ = build(case)
    return 0 if conditional.hypernet is None else conditional.hypernet[-1].out_features


@pytest.mark.parametrize("case", [p for p in CONDITIONAL if own_parameters(p.values[0])])
def test_any_module_is_a_hypernetwork(case):
    """It sets the same parameters that the library's own network would set with the same output."""
    reference, base = build(case)
    size = own_parameters(case)
    net = Own(size).double().eval()
    conditional = pf.Conditional(copy.deepcopy(reference.template), CONTEXT_DIM, hypernet=net)
    assert conditional.hypernet is net
    context = torch.randn(7, CONTEXT_DIM, dtype=torch.float64)
    reference.hypernet = torch.nn.Linear(CONTEXT_DIM, size).double()  # a stand-in that returns the output of net
    reference.hypernet.forward = net.forward
    for batch in (context, context[0], context.reshape(7, 1, CONTEXT_DIM)):
        x = base.sample((7,))
        expected = call_and_ladj(reference.condition(batch), x)
        y, ladj = call_and_ladj(conditional.condition(batch), x)
        torch.testing.assert_close((y, ladj), expected)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.out.parameters())
    assert {"hypernet.inner.weight"} <= conditional.state_dict().keys()


def test_where_its_output_goes():
    """Against the definition: the parameters in the order of named_parameters(), each shifted by its part."""
    net = torch.nn.Linear(2, 6 + 3)
    template = scatter(pf.Chain([pf.diagonal(3), pf.shift(3)]))
    context = torch.randn(4, 2)
    layer = pf.Conditional(template, 2, hypernet=net).condition(context)
    shifts = net(context)
    x = torch.randn(4, 3)
    log_scale, bias, last = (p + s for p, s in zip(template.parameters(), shifts.split(3, -1), strict=True))
    torch.testing.assert_close(layer(x), x * log_scale.exp() + bias + last)
    # an initial output of its own: the conditioned layer equals the template only if the network returns zeros
    assert not torch.allclose(layer(x), template(x))
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    torch.testing.assert_close(pf.Conditional(template, 2, hypernet=net).condition(context)(x), template(x))


class Shy(torch.nn.Module):
    """Fails on the trial's zeros."""

    def forward(self, context):
        assert context.any()
        return context


def test_a_hypernetwork_of_another_size():
    message = r"parameters of Diagonal .* 8 elements in all, .* \(1, 2\) it must return the shape \(1, 8\), .* \(1, 7\)"
    with pytest.raises(ValueError, match=message):
        pf.Conditional(pf.diagonal(4), 2, hypernet=torch.nn.Linear(2, 7))
    with pytest.raises(ValueError, match=r"must return the shape \(1, 8\), but it returned tuple"):
        pf.Conditional(pf.diagonal(4), 2, hypernet=torch.nn.LSTM(2, 8))
    conditional = pf.Conditional(pf.diagonal(4), 2, hypernet=Shy())  # no trial is possible
    with pytest.raises(ValueError, match=r"\(5, 2\) it must return the shape \(5, 8\), but it returned \(5, 2\)"):
        conditional.condition(torch.ones(5, 2))
    conditional = pf.Conditional(pf.diagonal(1), 2, hypernet=Shy())
    assert conditional.condition(torch.ones(5, 2)).batch_shape == (5,)


def test_what_is_no_hypernetwork():
    for bad in (torch.tanh, torch.nn.Linear, [8, 8]):
        with pytest.raises(TypeError, match="hypernet must be a module"):
            pf.Conditional(pf.diagonal(4), 2, hypernet=bad)
    with pytest.raises(ValueError, match=r"its network reads the context itself\. Leave out hypernet"):
        pf.Conditional(pf.affine_coupling(4, context_dim=2), 2, hypernet=torch.nn.Linear(2, 8))


def test_the_trial_leaves_no_trace():
    net = Own(8)
    state, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    lazy = torch.nn.LazyLinear(8)
    for own in (net, lazy):
        pf.Conditional(pf.diagonal(4), 2, hypernet=own)
    assert torch.equal(torch.get_rng_state(), generator)
    assert net.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    assert isinstance(lazy.weight, torch.nn.UninitializedParameter)
