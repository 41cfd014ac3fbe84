"""Layers that reach only a part of the real line: a point outside has density 0, however it is scored.

The layers are found by their codomains in the registry, so that a new one is covered.
"""

from __future__ import annotations

import copy
import io
import math
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, scatter
from torch.distributions import ComposeTransform, IndependentTransform, constraints, transforms

import pyro_invflows as pf
from pyro_invflows.testing import jacobian_log_det


def is_bounded(constraint):
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return constraint is not constraints.real


CASES_BOUNDED = [case for case in CASES if is_bounded(case.build(case.dims[0]).codomain)]
BOUNDED = [pytest.param(case, id=case.name) for case in CASES_BOUNDED]
DIM = 2


def test_the_registry_has_bounded_layers():
    assert {"Sigmoid", "Tanh", "Interval", "ELU", "SELU"} <= {case.layer for case in CASES_BOUNDED}


def ends(layer):
    """Return the lower end, the upper end and the size of a layer's codomain, for each element."""
    like = torch.zeros(DIM, dtype=torch.float64)
    lower = like + getattr(layer.codomain, "lower_bound", -math.inf)
    upper = like + getattr(layer.codomain, "upper_bound", math.inf)
    width = (upper - lower) / 2
    size = torch.where(width.isfinite(), width, torch.where(lower.isfinite(), lower.abs(), upper.abs()))
    return lower, upper, size


def outside(layer, distances=(0.1, 1.0, 50.0)):
    """Return points that a layer cannot reach in their first element, their second, or both."""
    lower, upper, size = ends(layer)
    inside = torch.where(lower.isfinite(), lower, upper - size) + 0.7 * size
    points = []
    for distance in distances:
        for far in (lower - distance * size, upper + distance * size):
            if far.isfinite().all():
                points += [torch.stack([far[0], inside[1]]), torch.stack([inside[0], far[1]]), far]
    return torch.stack(points)


def flow_parts(case, dtype=torch.float64):
    """Return [diagonal, bounded layer, diagonal], far from their initial state."""
    first, last = (scatter(pf.diagonal(DIM)).to(dtype) for _ in range(2))
    return [first, case.build(DIM, dtype), last]


def mixed_data(parts, dtype=torch.float64):
    """Return x of reachable points, y of all points, and a mask of the reachable ones: every other row."""
    # in half precision a tenth of the range is within rounding
    bad = parts[-1](outside(parts[1], (0.1, 1.0, 50.0) if dtype != torch.bfloat16 else (1.0, 50.0)).to(dtype)).detach()
    x = torch.randn(len(bad), DIM, dtype=torch.float64).to(dtype)
    good = pf.Chain(parts)(x).detach()
    y = torch.stack([good, bad], 1).flatten(0, 1)
    return x, y, torch.arange(len(y)) % 2 == 0


def base(dtype=torch.float64):
    return dist.Normal(torch.zeros(DIM, dtype=dtype), torch.ones((), dtype=dtype)).to_event(1)


def _uncached(parts):
    return [part.with_cache(0) for part in parts]


def _separate(parts, y):
    """Score as torch does, but on clones, so that no memo can answer."""
    chain = pf.Chain(parts)
    x = chain.inv(y)
    return base(y.dtype).log_prob(x) - chain.log_abs_det_jacobian(x.clone(), y.clone())


def _one_pass(transform, y):
    x, ladj = pf.inv_and_ladj(transform, y)
    return base(y.dtype).log_prob(x) + ladj


PATHS = {
    "Flow": lambda parts, y: pf.Flow(base(y.dtype), parts)().log_prob(y),
    "FlowDistribution": lambda parts, y: pf.FlowDistribution(base(y.dtype), parts).log_prob(y),
    "TransformedDistribution": lambda parts, y: dist.TransformedDistribution(base(y.dtype), parts).log_prob(y),
    "without memo": lambda parts, y: dist.TransformedDistribution(base(y.dtype), _uncached(parts)).log_prob(y),
    "chain": lambda parts, y: dist.TransformedDistribution(base(y.dtype), [pf.Chain(parts)]).log_prob(y),
    "chain without memo": lambda parts, y: dist.TransformedDistribution(
        base(y.dtype), [pf.Chain(_uncached(parts), cache_size=0)]
    ).log_prob(y),
    "chain of a chain": lambda parts, y: dist.TransformedDistribution(
        base(y.dtype), [pf.Inverted(pf.Inverted(pf.Chain(parts), cache_size=0), cache_size=0)]
    ).log_prob(y),
    "recompute": lambda parts, y: pf.FlowDistribution(base(y.dtype), [pf.Chain(parts, recompute=True)]).log_prob(y),
    "recompute without memo": lambda parts, y: dist.TransformedDistribution(
        base(y.dtype), [pf.Chain(_uncached(parts), recompute=True, cache_size=0)]
    ).log_prob(y),
    "separate calls": _separate,
    "one pass": lambda parts, y: _one_pass(pf.Chain(parts), y),
    "compose": lambda parts, y: _one_pass(ComposeTransform(parts), y),
    "independent": lambda parts, y: _one_pass(pf.Chain([parts[0], IndependentTransform(parts[1], 1), parts[2]]), y),
    "inverted": lambda parts, y: _one_pass(pf.Chain([parts[0], pf.Inverted(pf.Inverted(parts[1])), parts[2]]), y),
    "inverse": lambda parts, y: _one_pass(pf.Inverted(pf.Inverted(pf.Chain(parts))).inv.inv, y),
}


EVERY_PATH = [(path, torch.float64) for path in PATHS]
EVERY_DTYPE = [(path, dtype) for path in ("Flow", "chain without memo") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("path", "dtype"), EVERY_PATH + EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("case", BOUNDED)
def test_unreachable_points_have_density_zero(case, path, dtype):
    parts = flow_parts(case, dtype)
    x, y, good = mixed_data(parts, dtype)
    parameters = [p for part in parts for p in part.parameters()]
    log_prob = PATHS[path](parts, y.clone())
    assert log_prob.dtype == dtype
    assert (log_prob[~good] == -math.inf).all()
    assert log_prob[good].isfinite().all()
    if dtype == torch.float64:
        expected = base().log_prob(x) - jacobian_log_det(lambda v: pf.Chain(_uncached(parts))(v), x, 1)
        torch.testing.assert_close(log_prob[good], expected)
    if path != "Flow":  # which has copies
        grads = torch.autograd.grad(log_prob[good].sum(), parameters, retain_graph=True)
        alone = torch.autograd.grad(PATHS[path](parts, y[good].clone()).sum(), parameters)
        for grad, expected in zip(grads, alone, strict=True):
            torch.testing.assert_close(grad, expected)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(log_prob.sum(), parameters))


@pytest.mark.parametrize("case", BOUNDED)
def test_last_layer(case):
    """With validation, such a point raises a ValueError, as for any distribution; without it, its density is 0."""
    layer = case.build(DIM)
    y = outside(layer)
    for kind in (pf.FlowDistribution, dist.TransformedDistribution):
        with pytest.raises(ValueError, match="support"):
            kind(base(), [layer]).log_prob(y)
        assert (kind(base(), [layer], validate_args=False).log_prob(y) == -math.inf).all()
    torch.distributions.Distribution.set_default_validate_args(False)  # as torch.compile does
    for parts in ([layer], [pf.Chain([layer])], [layer.with_cache(0)]):
        assert (pf.Flow(base(), parts)().log_prob(y) == -math.inf).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", BOUNDED)
def test_nan_stays_nan(case, path):
    parts = flow_parts(case)
    _, y, good = mixed_data(parts)
    y[:, 0] = math.nan  # beside elements that are out of reach, too
    assert not good.all()
    torch.distributions.Distribution.set_default_validate_args(False)
    with torch.no_grad():
        assert PATHS[path](parts, y).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BOUNDED)
def test_border_and_rounding_beside_it(case, dtype):
    layer = case.build(DIM, dtype)
    lower, upper, size = ends(layer)
    slack = torch.finfo(dtype).eps ** 0.5 * size
    for end, sign in ((lower, -1), (upper, 1)):
        if not end.isfinite().all():
            continue
        for factor in (0, 0.5):
            y = (end + sign * factor * slack).to(dtype).requires_grad_()
            x, ladj = pf.inv_and_ladj(layer, y)
            assert x.isfinite().all()
            assert ladj.isfinite().all()
            assert torch.autograd.grad(x.sum() + ladj.sum(), y)[0].isfinite().all()
        x, ladj = pf.inv_and_ladj(layer, (end + sign * 3 * slack).to(dtype))
        assert x.isfinite().all()
        assert (ladj == -math.inf).all()
        _, ladj = pf.inv_and_ladj(layer, torch.full((DIM,), sign * math.inf, dtype=dtype))
        assert (ladj == -math.inf).all()


@pytest.mark.parametrize(
    ("dtype", "scale", "depth"), [(torch.float64, 40.0, 4), (torch.float32, 20.0, 1)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("dim", [1, 8, 64])
@pytest.mark.parametrize("case", BOUNDED)
def test_saturated_samples_are_within_reach(case, dim, dtype, scale, depth):
    """A sample on the boundary comes back through the layers behind it with their rounding errors."""
    parts = [case.build(dim, dtype)]
    for _ in range(depth):
        parts += [scatter(pf.diagonal(dim)), scatter(pf.orthogonal(dim))]
    wide = dist.Normal(torch.zeros(dim, dtype=dtype), torch.tensor(scale, dtype=dtype)).to_event(1)
    flow = pf.Flow(wide, parts).to(dtype)
    x = wide.sample((500,))
    saturated = parts[0](x)[:, 0]
    assert saturated.unique().numel() < 0.9 * saturated.numel()
    y = flow.transforms(x)
    with torch.no_grad():
        assert copy.deepcopy(flow)().log_prob(y.clone()).isfinite().all()


@pytest.mark.parametrize("case", BOUNDED)
def test_several_bounded_layers(case):
    """The infinite log-dets of several layers must not cancel each other."""
    one, two, three = scatter(pf.diagonal(DIM)).double(), scatter(pf.diagonal(DIM)).double(), pf.Tanh()
    middle = scatter(pf.diagonal(DIM)).double()
    layer = case.build(DIM)
    y = two(outside(layer)).detach()
    for parts in ([one, three, middle, layer, two], [one, pf.Inverted(three), middle, layer, two]):
        x, ladj = pf.inv_and_ladj(pf.Chain(parts), y)
        assert (ladj == -math.inf).all()
        for path in PATHS.values() if len(parts) == 3 else [PATHS["Flow"], PATHS["without memo"], _separate]:
            log_prob = path(parts, y)
            assert (log_prob == -math.inf).all()
        assert x.isfinite().all()
    again = two(outside(pf.Tanh())).detach()
    for chain in (pf.Chain([one, layer, middle, three, two]), pf.Chain([one, three, pf.Tanh(), two])):
        for cache_size in (0, 1):
            d = dist.TransformedDistribution(base(), [chain.with_cache(cache_size)])
            assert (d.log_prob(again) == -math.inf).all()


@pytest.mark.parametrize("case", BOUNDED)
def test_inverse_of_a_bounded_layer(case):
    """A point outside the domain maps to the boundary's image, and its log q is +inf: the worst loss for a guide."""
    layer = case.build(DIM)
    x = outside(layer).requires_grad_()
    for inverse in (layer.inv, pf.Inverted(layer), pf.Inverted(layer, cache_size=0), pf.Chain([pf.Inverted(layer)])):
        y, ladj = pf.call_and_ladj(inverse, x)
        separate = inverse.log_abs_det_jacobian(x.clone(), y.clone())
        event_dim = ladj.dim() - 1
        for got in (ladj, separate):
            got = got.sum(-1) if event_dim else got
            assert (got == -math.inf).all()
        assert y.isfinite().all()
        assert torch.autograd.grad(y.sum() + ladj.sum(), x)[0].isfinite().all()
        inside = layer(torch.randn(3, DIM, dtype=torch.float64)).detach()
        assert pf.call_and_ladj(inverse, inside)[1].isfinite().all()
    far = dist.Delta(x.detach()).to_event(2)
    _, log_prob = pf.FlowDistribution(far, [pf.Inverted(layer)], validate_args=False).rsample_and_log_prob()
    assert log_prob == math.inf


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("case", BOUNDED)
def test_recompute_gives_unreachable_rows_no_gradient(case, inverse):
    parts = flow_parts(case)
    _, y, good = mixed_data(parts)
    if inverse:
        parts = [pf.Inverted(part) for part in reversed(parts)]
    chain = pf.Chain(parts, recompute=True)
    run = pf.call_and_ladj if inverse else pf.inv_and_ladj
    rows = torch.linspace(0.5, 1.5, len(y), dtype=torch.float64)
    leaf = y.clone().requires_grad_()
    out, ladj = run(chain, leaf)
    loss = (rows[:, None] * out**2).sum() + (rows * torch.where(ladj.isfinite(), ladj, 0)).sum()
    grads = torch.autograd.grad(loss, [leaf, *chain.parameters()])
    assert (ladj[~good] == -math.inf).all()
    assert (grads[0][~good] == 0).all()
    leaf = y[good].clone().requires_grad_()
    out, ladj = run(pf.Chain(parts), leaf)
    loss = (rows[good][:, None] * out**2).sum() + (rows[good] * ladj).sum()
    expected = torch.autograd.grad(loss, [leaf, *chain.parameters()])
    torch.testing.assert_close(grads[0][good], expected[0])
    for grad, alone in zip(grads[1:], expected[1:], strict=True):
        torch.testing.assert_close(grad, alone)


@pytest.mark.parametrize("case", BOUNDED)
def test_torch_func_and_second_derivatives(case):
    parts = flow_parts(case)
    _, y, good = mixed_data(parts)
    chain = pf.Chain(parts)
    torch.distributions.Distribution.set_default_validate_args(False)

    def log_prob(value):
        return dist.TransformedDistribution(base(), [chain]).log_prob(value)

    def reachable(value):
        each = log_prob(value)
        return torch.where(each.isfinite(), each, 0).sum()

    expected = log_prob(y)
    mapped = torch.func.vmap(log_prob)(y)
    torch.testing.assert_close(mapped, expected)
    assert (mapped[~good] == -math.inf).all()
    leaf = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reachable(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(reachable)(y), gradient)
    torch.testing.assert_close(torch.func.jacfwd(reachable)(y), gradient)
    per_row = torch.func.vmap(torch.func.grad(reachable))(y)
    torch.testing.assert_close(per_row, gradient)
    assert gradient.isfinite().all()
    hessian = torch.autograd.functional.hessian(reachable, y)
    assert hessian.isfinite().all()
    torch.testing.assert_close(torch.func.hessian(reachable)(y), hessian)
    alone = torch.autograd.functional.hessian(reachable, y[good])
    torch.testing.assert_close(hessian[good][:, :, good], alone)

    def of_parameters(values):
        return torch.func.functional_call(_Scored(chain), {f"chain.{k}": v for k, v in values.items()}, (y,))

    values = {name: p.detach() for name, p in chain.named_parameters()}
    grads = torch.func.grad(lambda v: torch.where(of_parameters(v).isfinite(), of_parameters(v), 0).sum())(values)
    assert (of_parameters(values)[~good] == -math.inf).all()
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, torch.autograd.grad(reachable(y), chain.get_parameter(name), retain_graph=True)[0]
        )


class _Scored(torch.nn.Module):
    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def forward(self, y):
        x, ladj = pf.inv_and_ladj(self.chain, y)
        return base().log_prob(x) + ladj


@pytest.mark.parametrize("case", BOUNDED)
def test_compiled(case):
    parts = flow_parts(case)
    _, y, good = mixed_data(parts)
    chain = pf.Chain(parts)
    torch.compiler.reset()

    def both_ways(value):
        return *pf.inv_and_ladj(chain, value), -chain.log_abs_det_jacobian(chain.inv(value), value)

    x, ladj, separate = torch.compile(both_ways, fullgraph=True, backend="eager")(y)
    torch.testing.assert_close((x, ladj), pf.inv_and_ladj(chain, y))
    torch.testing.assert_close(separate, ladj)
    assert (ladj[~good] == -math.inf).all()


@pytest.mark.parametrize("case", BOUNDED)
def test_particles_out_of_reach(case):
    """Particles that a Slice draws out of reach have weight 0; a row with no others must not spoil the gradient."""
    torch.distributions.Distribution.set_default_validate_args(False)
    noise = dist.Normal(torch.zeros(1, dtype=torch.float64), 3.0).to_event(1)
    first, layer = scatter(pf.diagonal(DIM)).double(), case.build(DIM)
    flow = pf.FlowDistribution(base(), [first, layer, pf.Slice(noise, input_dim=1)])
    lower, _, size = ends(layer)
    y = torch.stack([lower + 0.5 * size, lower - 0.5 * size])[:, :1]
    for count in (1, 200):
        torch.manual_seed(0)
        log_prob = flow.log_prob(y, num_particles=count)
        assert log_prob[1] == -math.inf
        assert all(g.isfinite().all() for g in torch.autograd.grad(log_prob.sum(), list(first.parameters())))
    assert log_prob[0].isfinite()
    assert flow.log_prob(math.nan * y, num_particles=2).isnan().all()


@pytest.mark.parametrize(
    ("transform", "clamps"),
    [
        (transforms.SigmoidTransform(), True),
        (transforms.TanhTransform(), False),
        (transforms.ExpTransform(), False),
        (transforms.SoftplusTransform(), False),
        (dist.transforms.ELUTransform(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_foreign_transforms(transform, clamps):
    """A transform that clamps has density 0 outside; the others return NaN, which cannot be mistaken for a density."""
    parts = [scatter(pf.diagonal(DIM)).double(), transform, scatter(pf.diagonal(DIM)).double()]
    y = parts[-1](torch.tensor([[0.5, 0.5], [-3.0, 0.5], [0.5, -1.1]], dtype=torch.float64)).detach()
    torch.distributions.Distribution.set_default_validate_args(False)
    for path in ("Flow", "FlowDistribution", "chain", "one pass", "independent", "compose"):
        log_prob = PATHS[path](parts, y)
        assert log_prob[0].isfinite()
        assert (log_prob[1:] == -math.inf).all() if clamps else log_prob[1:].isnan().all()


# ---------------------------------------------------------------------- maximum likelihood


@pytest.mark.parametrize("case", BOUNDED)
def test_no_likelihood_exceeds_what_the_data_allow(case):
    """1500 steps on data outside the layer's range, with the loss over the rows that are within reach.

    The mean over all rows may not fall below the entropy, and the mean over the rows within reach not below the entropy
    of the data cut to these: a density that is right has no more than mass 1 there.
    """
    generator = torch.Generator().manual_seed(0)
    data = 2 * torch.randn(512, 1, generator=generator, dtype=torch.float64)
    true = dist.Normal(0.0, 2.0).log_prob(data).squeeze(-1)
    chain = pf.Chain([pf.diagonal(1), case.make(1), pf.diagonal(1)]).double()
    optimiser = torch.optim.Adam(chain.parameters(), lr=0.05)
    scores = []
    for _ in range(1500):
        x, ladj = pf.inv_and_ladj(chain, data)
        score = ladj - x.squeeze(-1) ** 2 / 2 - math.log(2 * math.pi) / 2
        reached = score.isfinite()
        optimiser.zero_grad()
        (-score[reached].mean()).backward()
        optimiser.step()
        scores.append(score.detach())
    scores = torch.stack(scores)
    reached = scores.isfinite()
    assert not scores.isnan().any()
    sampling = 0.1  # 512 rows, 4 parameters
    assert (-scores.mean(1) > -true.mean() - sampling).all()
    assert not reached[0].all(), "the data are not outside the range"
    count = reached.sum(1)
    assert (count > 50).all()
    cut = torch.where(reached, true, 0).sum(1) / count - (count / len(data)).log()
    fitted = torch.where(reached, scores, 0).sum(1) / count
    assert (fitted < cut + sampling).all()
    assert (fitted[-1] > cut[-1] - 0.5).all(), "nothing was learned"


# ---------------------------------------------------------------------- factories


def test_a_float_in_first_position_is_the_number():
    for number in (0.2, np.float64(0.2), np.float32(0.2)):
        assert pf.leaky_relu(number).negative_slope == pytest.approx(0.2)
        assert pf.elu(number).alpha == pytest.approx(0.2)
        assert type(pf.elu(number).alpha) is float
    assert pf.leaky_relu(negative_slope=0.3).negative_slope == 0.3
    assert pf.elu(4, alpha=2.5).alpha == 2.5
    x = torch.tensor([-1.0, 2.0])
    torch.testing.assert_close(pf.leaky_relu(0.2)(x), torch.tensor([-0.2, 2.0]))
    torch.testing.assert_close(pf.elu(2.0)(x), torch.tensor([2 * math.expm1(-1.0), 2.0]))


@pytest.mark.parametrize("size", [8, np.int64(8), None], ids=["int", "numpy", "none"])
def test_an_int_in_first_position_is_the_size(size):
    assert pf.leaky_relu(size).negative_slope == 0.01
    assert pf.elu(size).alpha == 1.0
    for factory in (pf.sigmoid, pf.tanh, pf.selu, pf.interval):
        assert isinstance(factory(size), pf.Bijection)
    if size is not None:
        assert pf.prelu(size).shape == pf.baird(size).shape == (8,)
        assert len(pf.stack(4, pf.elu, size)) == 4
        assert len(partial(pf.stack, 4, pf.leaky_relu)(size)) == 4


@pytest.mark.parametrize("factory", [pf.sigmoid, pf.tanh, pf.selu, pf.interval, pf.prelu, pf.baird])
@pytest.mark.parametrize("number", [0.5, np.float32(0.5), True, "4", torch.tensor(0.5)], ids=repr)
def test_a_number_where_none_makes_sense_is_refused(factory, number):
    with pytest.raises(TypeError, match=rf"{factory.__name__}: input_dim must be an int, but got .*{number}"):
        factory(number)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: pf.elu(2.0, alpha=3.0), TypeError, "given twice"),
        (lambda: pf.elu(2.0, alpha=1.0), TypeError, "given twice"),
        (lambda: pf.leaky_relu(0.1, negative_slope=0.01), TypeError, "given twice"),
        (lambda: pf.elu(True), TypeError, "must be an int"),
        (lambda: pf.elu("2"), TypeError, "must be an int"),
        (lambda: pf.elu(-1.0), ValueError, "alpha must be positive"),
        (lambda: pf.leaky_relu(0.0), ValueError, "negative_slope must be positive"),
        (lambda: pf.elu(0), ValueError, "at least 1"),
        (lambda: pf.elu(alpha="2"), TypeError, "alpha must be a number"),
        (lambda: pf.ELU(torch.tensor(2.0)), TypeError, "alpha must be a number"),
        (lambda: pf.LeakyReLU(True), TypeError, "negative_slope must be a number"),
        (lambda: pf.prelu(0.2), TypeError, "negative_slope=..."),
        (lambda: pf.interval(0.2), TypeError, "low=..., high=..."),
    ],
)
def test_numbers_that_do_not_fit(make, error, match):
    with pytest.raises(error, match=match):
        make()


# ---------------------------------------------------------------------- intervals given as tensors


def tensor_interval(dtype=torch.float64):
    return pf.Interval(torch.tensor([-1.0, 0.0, 100.0], dtype=dtype), torch.tensor([1.0, 10.0, 101.0], dtype=dtype))


@pytest.mark.parametrize(
    ("low", "high", "shape"),
    [
        (torch.zeros(3), 2.0, (3,)),
        (-2, torch.ones(2, 1), (2, 1)),
        (torch.zeros(2, 1), torch.tensor([1.0, 2.0, 3.0]), (2, 3)),
        (torch.tensor(-1.0), torch.tensor(1.0), ()),
    ],
)
def test_ends_broadcast(low, high, shape):
    layer = pf.Interval(low, high)
    assert layer.shape == shape
    x = torch.randn(4, *shape)
    y, ladj = pf.call_and_ladj(layer, x)
    assert y.shape == ladj.shape == x.shape
    assert layer.codomain.check(y).all()
    torch.testing.assert_close(layer.inv(y.clone()), x, rtol=1e-4, atol=1e-4)
    flat_low, flat_high = (torch.as_tensor(end).expand(shape).reshape(-1).tolist() for end in (low, high))
    for i, (a, b) in enumerate(zip(flat_low, flat_high, strict=True)):
        one = pf.Interval(a, b)
        column = x.reshape(4, -1)[:, i]
        torch.testing.assert_close(y.reshape(4, -1)[:, i], one(column))
        torch.testing.assert_close(ladj.reshape(4, -1)[:, i], pf.call_and_ladj(one, column)[1])


def test_ends_are_persistent_buffers():
    layer = tensor_interval(torch.float32)
    assert set(layer.state_dict()) == {"low", "high"}
    assert not list(layer.parameters())
    other = pf.Interval(torch.zeros(3), torch.ones(3))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(other.codomain.upper_bound, layer.codomain.upper_bound)
    swapped = torch.func.functional_call(pf.Interval(torch.zeros(3), torch.ones(3)), layer.state_dict(), (x,))
    assert torch.equal(swapped, layer(x))
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    with torch.device("meta"):
        loaded = pf.Interval(torch.zeros(3), torch.ones(3))
    loaded = loaded.to_empty(device="cpu")
    loaded.load_state_dict(torch.load(stored))
    assert torch.equal(loaded(x), layer(x))
    for twin in (copy.deepcopy(layer), layer.with_cache(0)):
        assert torch.equal(twin(x), layer(x))


def test_the_given_tensor_may_change():
    low = torch.zeros(2)
    layer = pf.Interval(low, 1.0)
    low.fill_(0.5)
    assert torch.equal(layer.low, torch.zeros(2))


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: pf.Chain([pf.diagonal(3), t])], ids=["alone", "chain"])
def test_the_codomain_follows_the_ends(wrap):
    whole = wrap(tensor_interval(torch.float32))
    assert whole.codomain.check(torch.tensor([0.5, 0.5, 100.5])).all()
    whole = whole.double()
    layer = whole if isinstance(whole, pf.Interval) else whole[1]
    constraint = whole.codomain
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    assert constraint.lower_bound is layer.low
    assert constraint.upper_bound.dtype == torch.float64
    layer.load_state_dict({"low": torch.full((3,), 5.0), "high": torch.full((3,), 6.0)}, assign=True)
    constraint = whole.codomain
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    assert torch.equal(constraint.upper_bound, torch.full((3,), 6.0))
    inverse = pf.Chain([pf.Inverted(layer), pf.diagonal(3)])
    assert inverse.domain.check(torch.full((3,), 5.5)).all()
    assert not inverse.domain.check(torch.full((3,), 6.5)).any()
    layer.to("meta")
    assert whole.codomain.check(torch.empty(3, device="meta")).is_meta
    assert inverse.domain.check(torch.empty(3, device="meta")).is_meta


def test_stacked_ends_under_vmap():
    layers = [tensor_interval(), pf.Interval(torch.zeros(3), torch.full((3,), 7.0)).double()]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(5, 3, dtype=torch.float64)
    run = torch.func.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,)))
    torch.testing.assert_close(run(parameters, buffers), torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize(
    ("low", "high", "error", "match"),
    [
        (torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0]), ValueError, r"low=2.0, high=2.0 at \(1,\)"),
        (torch.tensor([0.0, math.nan]), 1.0, ValueError, "low < high"),
        (0.0, torch.tensor([1.0, math.inf]), ValueError, "ends must be finite"),
        (torch.zeros(2), torch.ones(3), ValueError, "broadcast"),
        (torch.zeros(2, dtype=torch.long), 1.0, TypeError, "floating point"),
        (torch.zeros(2, requires_grad=True), 1.0, ValueError, "requires grad"),
        ("0", 1.0, TypeError, "low must be a number"),
        (0.0, None, TypeError, "high must be a number"),
        ([0.0, 1.0], 2.0, TypeError, "low must be a number"),
    ],
)
def test_ends_that_are_refused(low, high, error, match):
    with pytest.raises(error, match=match):
        pf.Interval(low, high)


def test_ends_on_the_default_device():
    with torch.device("meta"):
        layer = pf.Interval(-1.0, 2.0)
    assert layer(torch.zeros(2)).tolist() == [0.5, 0.5]
