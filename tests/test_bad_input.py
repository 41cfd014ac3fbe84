"""Bad input: a ValueError or TypeError that says what must hold, what was given and what to do; nothing corrupted."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, SMALL
from pyro.infer.autoguide import AutoNormalizingFlow

import pyro_invflows as pf
from pyro_invflows import call_and_ladj, inv_and_ladj
from pyro_invflows.solvers import Newton, Settings, implicit_gradient

VALUE = [
    (lambda: pf.Permute([0, 0, 1]), "each of 0, ..., 2 exactly once"),
    (lambda: pf.Permute([1, 2, 3]), "exactly once"),
    (lambda: pf.Permute([]), "non-empty"),
    (lambda: pf.Permute([0.0, 1.0]), "sequence of ints"),
    (lambda: pf.Permute("abcd"), "sequence of ints, but got 'abcd'"),
    (lambda: pf.Permute(None), "sequence of ints, but got None"),
    (lambda: pf.permute(4, permutation="abcd"), "sequence of ints, but got 'abcd'"),
    (lambda: pf.permute(4, permutation=4), "sequence of ints, but got 4"),
    (lambda: pf.permute(4, permutation=[0, 1]), "4 elements"),
    (lambda: pf.PixelShuffle(0), "at least 1"),
    (lambda: pf.pixel_shuffle(6), "r^2"),
    (lambda: pf.PixelShuffle(2)(torch.zeros(3, 2, 2)), "channels must be divisible"),
    (lambda: pf.PixelShuffle(2).inv(torch.zeros(1, 3, 2)), "height and width must be divisible"),
    (lambda: pf.PixelShuffle(2).forward_shape(torch.Size((3, 2, 2))), "must be divisible"),
    (lambda: pf.AffineCoupling(-1, torch.nn.Linear(1, 1)), "at least 0"),
    (lambda: pf.affine_coupling(4, split_dim=4), "split_dim must be below input_dim"),
    (lambda: pf.AffineCoupling(3, torch.nn.Linear(3, 2))(torch.zeros(2, 3)), "more than that many"),
    (lambda: pf.AffineCoupling(1, torch.nn.Linear(1, 3))(torch.zeros(2, 3)), "must return the shape"),
    (lambda: pf.AffineCoupling(1, None, input_dim=3), "learns constants"),
    (lambda: pf.affine_coupling(4, scale="exp"), "'tanh' or None"),
    (lambda: pf.affine_coupling(4, max_log_scale=0.0), "max_log_scale"),
    (lambda: pf.affine_coupling(0), "input_dim must be at least 1"),
    (lambda: pf.shift(3, dim=0), "between -4 and -1"),
    (lambda: pf.affine_coupling(3, dim=1), "affine_coupling: dim must be between -4 and -1, but got 1. It counts from"),
    (lambda: pf.conditional_affine_coupling(3, 2, dim=1), "dim must be between -4 and -1, but got 1"),
    (lambda: pf.orthogonal(3, num_reflections=-1), "at least 0"),
    (lambda: pf.Orthogonal.from_matrix(torch.ones(3, 3)), "must be orthogonal"),
    (lambda: pf.Orthogonal.from_matrix(torch.full((3, 3), float("nan"))), "must be orthogonal"),
    (lambda: pf.Orthogonal.from_matrix(torch.zeros(3, 2)), "(n, n)"),
    (lambda: pf.SVDLinear.from_matrix(torch.ones(3, 3)), "invertible"),
    (lambda: pf.SVDLinear.from_matrix(torch.zeros(3, 2)), "(D, D)"),
    (lambda: pf.SVDLinear.from_matrix(torch.full((2, 2), float("inf"))), "finite"),
    (lambda: pf.LULinear.from_matrix(torch.ones(3, 3)), "LULinear.from_matrix: the matrix must be invertible"),
    (lambda: pf.LULinear.from_matrix(torch.zeros(3, 2)), "(D, D)"),
    (lambda: pf.LULinear.from_matrix(torch.full((2, 2), float("inf"))), "finite"),
    (lambda: pf.Diagonal.from_matrix(torch.ones(2, 2)), "diagonal matrix"),
    (lambda: pf.Diagonal.from_matrix(torch.zeros(2, 2)), "without zeros"),
    (lambda: pf.Diagonal.from_matrix(torch.zeros(2)), "(D, D)"),
    (lambda: pf.LeakyReLU(0.0), "positive and finite"),
    (lambda: pf.PReLU((2,), negative_slope=-1.0), "positive and finite"),
    (lambda: pf.ELU(float("inf")), "positive and finite"),
    (lambda: pf.Interval(1.0, 1.0), "low < high"),
    (lambda: pf.Interval(0.0, float("nan")), "low < high"),
    (lambda: pf.Baird((-1,)), "non-negative"),
    (lambda: pf.Baird((3,))(torch.zeros(4)), "does not broadcast"),
    (lambda: pf.Baird((3,)).forward_shape(torch.Size((4,))), "does not broadcast"),
]


@pytest.mark.parametrize("index", range(len(VALUE)))
def test_value_errors(index):
    make, message = VALUE[index]
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pf.shift(2.0), "must be an int"),
        (lambda: pf.shift(True), "must be an int"),
        (lambda: pf.shift(2, dim=1.5), "dim must be an int"),
        (lambda: pf.Baird("abc"), "shape|int"),
        (lambda: pf.PixelShuffle(2.0), "must be an int"),
        (lambda: pf.AffineCoupling(1, lambda v: v), "must be a module"),
        (lambda: pf.shift(3)([1.0, 2.0, 3.0]), "floating point"),
        (lambda: pf.affine_coupling(4, 8), r"sequence of ints, such as \(64, 64\), but got 8"),
        (lambda: pf.conditional_planar(4, 2, context_hidden_dims=8), "sequence of ints"),
        (lambda: pf.generalized_sylvester(4, 8), "sequence of ints"),
        (lambda: pf.contractive_residual(4, 8), "sequence of ints"),
        (lambda: pf.affine_coupling(4, [8.0]), "each of hidden_dims must be an int"),
        (lambda: pf.Chain(3), "expected a list of transforms, got 3"),
        (lambda: pf.Diagonal.from_matrix([[1.0]]), "matrix must be a floating point tensor, but got list"),
        (lambda: pf.SVDLinear.from_matrix(torch.eye(2, dtype=torch.long)), "but got torch.int64"),
        (lambda: pf.LULinear.from_matrix(torch.eye(2, dtype=torch.long)), "but got torch.int64"),
        (lambda: pf.Orthogonal.from_matrix([[1.0]]), "floating point tensor"),
        (lambda: call_and_ladj(torch.nn.Linear(2, 2), torch.zeros(2)), "expected a transform, got Linear"),
        (lambda: inv_and_ladj(torch.nn.Linear(2, 2), torch.zeros(2)), "expected a transform, got Linear"),
    ],
)
def test_type_errors(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def normal(*shape):
    return dist.Normal(torch.zeros(shape), 1.0)


def vectors(*shape):
    return normal(*shape).to_event(1)


def coupling():
    return pf.affine_coupling(4, [8])


CALLED = r"expected a transform, got a function; did you mean affine_coupling\(\.\.\.\)\?"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pf.Flow(coupling(), vectors(4)), r"the base distribution comes first.*Flow\(base, layers\)"),
        (lambda: pf.Flow([coupling()], vectors(4)), r"the base distribution comes first.*Flow\(base, layers\)"),
        (lambda: pf.Flow(torch.zeros(4), [coupling()]), "expected a distribution as the base, got Tensor"),
        (lambda: pf.Flow(vectors(4), pf.affine_coupling), f"Flow: {CALLED}"),
        (lambda: pf.Flow(vectors(4), [coupling(), pf.affine_coupling]), f"Flow: {CALLED}"),
        (lambda: pf.Flow(vectors(4), [pf.conditional_shift(4, 2), pf.affine_coupling]), f"Flow: {CALLED}"),
        (lambda: pf.Flow(vectors(4), [pf.Flow(vectors(4), [])]), "expected a transform, got Flow.$"),
        (lambda: pf.Flow(vectors(4), [[coupling()]]), "expected a transform, got list"),
        (lambda: pf.Flow(vectors(4), None), "expected a transform, got NoneType"),
        (lambda: pf.Chain([pf.affine_coupling]), f"Chain: {CALLED}"),
        (lambda: pf.Chain([partial(pf.affine_coupling, keep="last")]), f"Chain: {CALLED}"),
        (lambda: pf.Chain(pf.affine_coupling), r"a list of transforms, got a function; did you mean affine_coupling"),
        (lambda: pf.Chain([pf.Diagonal]), r"got the class Diagonal; did you mean Diagonal\(\.\.\.\)\?"),
        (lambda: pf.Chain([lambda x: x]), "expected a transform, got a function.$"),
        (lambda: pf.Chain([pf.conditional_shift(4, 2)]), r"got Conditional\. Condition it first, with \.condition"),
        (lambda: pf.Inverted(pf.affine_coupling), f"Inverted: {CALLED}"),
        (lambda: pf.Inverted(pf.Conditional), "got the class Conditional; did you mean"),
        (
            lambda: pf.Conditional(pf.orthogonal, 3),
            r"as the template, got a function; did you mean orthogonal\(\.\.\.\)",
        ),
        (lambda: pf.Conditional(dist.transforms.planar(3), 3), "got Planar. A foreign transform has no parameters"),
        (lambda: pf.NumericalInverse(dist.transforms.planar), "NumericalInverse: .* did you mean planar"),
        (lambda: call_and_ladj(pf.affine_coupling, torch.zeros(4)), f"call_and_ladj: {CALLED}"),
        (lambda: inv_and_ladj(pf.Sigmoid, torch.zeros(4)), "inv_and_ladj: .*the class Sigmoid; did you mean Sigmoid"),
        (lambda: pf.stack(4, coupling()), r"builds a new layer at each call.*stack\(4, affine_coupling, .*got AffineC"),
        (lambda: pf.stack(4, pf.conditional_shift(4, 2)), "builds a new layer at each call.*got Conditional"),
        (lambda: pf.stack(4, [coupling()]), "builds a new layer at each call.*got list"),
        (lambda: pf.stack(4, pf.shift, 2, between=pf.permute(2)), "between must be a function that .*between=permute"),
        (lambda: vectors_flow().sample(3), r"sample: sample_shape must be a tuple, such as \(3,\), but got 3"),
        (lambda: vectors_flow().rsample(3), r"rsample: sample_shape must be a tuple, such as \(3,\)"),
        (lambda: vectors_flow().rsample_and_log_prob(3), r"rsample_and_log_prob: sample_shape must be a tuple"),
        (lambda: vectors_flow().sample(np.int64(3)), r"sample_shape must be a tuple, such as \(3,\)"),
        (
            lambda: foreign_inverse(Settings()),
            r"dense .* solver must be solvers\.Newton\(\.\.\.\), .* but got Settings\(",
        ),
        (lambda: foreign_inverse(Newton), r"solver must be solvers\.Newton\(\.\.\.\), .*, but got the class Newton"),
        (lambda: pf.contractive_residual(3, solver=Settings()), "solver must be solvers.Newton"),
        (lambda: implicit_gradient(lambda x: x, torch.zeros(3), solver=Settings()), "must be solvers.Anderson"),
    ],
)
def test_the_mistake_and_the_remedy_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def vectors_flow():
    return pf.Flow(vectors(4), [coupling()])()


def foreign_inverse(solver):
    return pf.NumericalInverse(dist.transforms.planar(3), solver=solver)


@pytest.mark.parametrize("layer", [coupling, lambda: pf.Chain([coupling()]), lambda: pf.Inverted(coupling())])
def test_a_guide_that_is_given_a_layer_for_a_function(layer):
    def model():
        pyro.sample("z", vectors(4))

    guide = AutoNormalizingFlow(model, layer())
    with pytest.raises(TypeError, match=r"got the int 4\. .* partial\(stack, 4, affine_coupling\)"):
        guide()
    AutoNormalizingFlow(model, partial(pf.stack, 2, pf.affine_coupling))()


@pytest.mark.parametrize("conditional", [False, True])
def test_a_base_without_the_shape_of_an_event(conditional):
    part = pf.conditional_affine_coupling(4, 2, hidden_dims=[8]) if conditional else coupling()
    context = [torch.zeros(2)] if conditional else []
    with pytest.raises(
        ValueError, match=r"Normal, has the shape \(\)\..*Normal\(torch\.zeros\(4\), 1\.0\)\.to_event\(1\)"
    ):
        pf.Flow(normal(), [part])(*context)
    image = pf.Chain([pf.affine_coupling(2, [4], dim=-3), pf.Baird()])
    with pytest.raises(
        ValueError, match=r"3 dimension\(s\).*Laplace, has the shape \(5,\).*zeros\(2, n, n\), .*to_event\(3\)"
    ):
        pf.Flow(dist.Laplace(torch.zeros(5), 1.0).to_event(1), [image])
    assert pf.Flow(normal(4), [part])(*context).event_shape == (4,)  # torch made it from a batch dimension


@pytest.mark.parametrize(
    "base",
    [
        dist.Bernoulli(torch.full((4,), 0.5)).to_event(1),
        dist.Poisson(torch.ones(4)).to_event(1),
        dist.Multinomial(3, torch.ones(4)),
        dist.OneHotCategorical(torch.ones(4)),
        dist.Categorical(torch.ones(4)),
    ],
    ids=lambda d: type(getattr(d, "base_dist", d)).__name__,
)
def test_a_discrete_base(base):
    name = type(getattr(base, "base_dist", base)).__name__
    with pytest.raises(ValueError, match=f"base must be continuous.*{name} is discrete.*such as Normal"):
        pf.Flow(base, [pf.Baird()])


def test_batches_of_base_and_context_that_clash():
    parts = [coupling(), pf.conditional_affine_coupling(4, 3, hidden_dims=[8])]
    for base in (vectors(2, 4), normal(2, 4)):
        flow = pf.Flow(base, parts)
        with pytest.raises(
            ValueError, match=r"base, \(2,\), and of the context, \(5,\), must broadcast. Give a context"
        ):
            flow(torch.zeros(5, 3))
        assert flow(torch.zeros(2, 3)).batch_shape == (2,)
        assert flow(torch.zeros(5, 1, 3)).batch_shape == (5, 2)


def test_a_network_whose_output_would_broadcast_is_refused():
    pooled = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match="must return the shape"):
        pf.AffineCoupling(1, pooled, dim=-3)(torch.randn(2, 2, 3, 3))


@pytest.mark.parametrize(("case", "dim"), SMALL)
def test_wrong_event_sizes(case, dim):
    layer = case.build(dim)
    if not layer.domain.event_dim or layer.trace_event({}) == {}:
        pytest.skip("takes any event")
    x = case.points(dim)
    axis = next(iter(layer.trace_event({})))
    wide = torch.cat([x, x], dim=axis)
    message = r"event|elements|divisible|broadcast"
    for bad in (wide, x.new_zeros(()), x.narrow(axis, 0, 0)):
        for call in (layer, layer.inv, lambda v: call_and_ladj(layer, v), lambda v: inv_and_ladj(layer, v)):
            with pytest.raises(ValueError, match=message):
                call(bad)
        if layer.event_dim:
            with pytest.raises(ValueError, match=message):
                layer.log_abs_det_jacobian(bad, bad)
        with pytest.raises(ValueError, match=message):
            layer.forward_shape(bad.shape)
    base = dist.Normal(torch.zeros(wide.shape[1:], dtype=torch.float64), 1.0).to_event(wide.dim() - 1)
    with pytest.raises(ValueError, match=message):
        dist.TransformedDistribution(base, [layer])
    torch.testing.assert_close(layer.inv(layer(x).detach()), x)  # nothing was corrupted


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_wrong_dtypes(case):
    dim = case.dims[-1]
    layer, x = case.build(dim, torch.float32), case.points(dim, dtype=torch.float32)
    for call in (layer, layer.inv, lambda v: call_and_ladj(layer, v)):
        if case.name != "chain_empty":
            with pytest.raises(TypeError, match="floating point"):
                call(torch.ones_like(x, dtype=torch.long))
        if list(layer.parameters()):
            with pytest.raises(TypeError, match="same dtype"):
                call(x.double())
    assert layer(x).dtype == torch.float32


def test_autocast_may_mix_dtypes():
    layer = pf.Chain([pf.affine_coupling(4, [8]), pf.orthogonal(4)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 4)).isfinite().all()


@pytest.mark.parametrize("rows", [2, 3])
def test_hooks_that_forget_the_aux_say_so(rows):
    class Forgetful(pf.Bijection):
        def _forward_aux(self, x):
            return 2 * x

        def _inverse_aux(self, y):
            return y / 2

    for call, match in ((Forgetful(3), "_forward_aux must"), (Forgetful(3).inv, "_inverse_aux must")):
        with pytest.raises(TypeError, match=match):
            call(torch.randn(rows, 3))


@pytest.mark.parametrize("activation", [torch.nn.ReLU(), torch.tanh, "relu"], ids=["module", "function", "name"])
@pytest.mark.parametrize(
    "make",
    [
        lambda a: pf.affine_coupling(4, activation=a),
        lambda a: pf.affine_coupling(4, [8], dim=-3, activation=a),
        lambda a: pf.generalized_sylvester(4, activation=a),
        lambda a: pf.Conditional(pf.baird(3), 2, activation=a),
        lambda a: pf.low_rank_residual(4, activation=a),
        lambda a: pf.contractive_residual(4, activation=a),
    ],
)
def test_activations_are_given_by_their_constructors(make, activation):
    with pytest.raises(TypeError, match="activation must be a constructor"):
        make(activation)


def test_what_is_conditional_and_how():
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
    with pytest.raises(ValueError, match=r"Conditional\(layer, context_dim\)"):
        pf.Flow(base, [pf.affine_coupling(2, context_dim=3)])(torch.zeros(3))
    with pytest.raises(TypeError, match=r"Conditional\(Inverted\(layer\)"):
        pf.Inverted(pf.conditional_sylvester(2, 3))
    with pytest.raises(ValueError, match="foreign transforms"):
        pf.Conditional(pf.NumericalInverse(torch.distributions.AffineTransform(0.0, 2.0)), 3)


def test_hooks_that_are_missing_say_so():
    class Empty(pf.Bijection):
        pass

    layer = Empty(3)
    for call, name in (
        (lambda: layer(torch.zeros(3)), "_forward_aux"),
        (lambda: layer.inv(torch.zeros(3)), "_inverse_aux"),
    ):
        with pytest.raises(NotImplementedError, match=f"Empty must define {name}"):
            call()
