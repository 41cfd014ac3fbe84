"""The checks themselves can fail: each broken layer is caught, and the error names the promise."""

from __future__ import annotations

import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from cases import scatter

import pyro_invflows as pf
from pyro_invflows.testing import BrokenPromiseError, check_bijection, sample_domain


class WrongLogDet(pf.Diagonal):
    def _log_det(self, x, y, aux):
        return super()._log_det(x, y, aux) + 1e-3


class WrongInverse(pf.Shift):
    def _inverse_function(self, y):
        return super()._inverse_function(y) + 1e-3


class WrongShape(pf.Shift):
    def _log_det(self, x, y, aux):
        return x.new_zeros(())


class Detached(pf.Diagonal):
    def _inverse_aux(self, y):
        x, aux = super()._inverse_aux(y)
        return x.detach() + 0 * y, aux


class WrongGradient(pf.Diagonal):
    def _forward_aux(self, x):
        y, aux = super()._forward_aux(x)
        return y + (self.bias - self.bias.detach()), aux


class SecondCache(pf.Diagonal):
    kept = None

    def _forward_aux(self, x):
        if self.kept is None or self.kept[0] is not x:
            self.kept = x, super()._forward_aux(x)
        return self.kept[1]


class Neighbours(pf.Shift):
    def _function(self, x):
        return super()._function(x) + (x.mean() if x.dim() > 1 and len(x) > 1 else 0.0)

    def _inverse_function(self, y):
        out = super()._inverse_function(y)
        return out - (out.mean() / 2 if y.dim() > 1 and len(y) > 1 else 0.0)


class Counting(pf.Shift):
    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def _inverse_function(self, y):
        self.count += 1
        return super()._inverse_function(y)


class Float32(pf.Shift):
    def _function(self, x):
        return super()._function(x).float().double() if x.dim() == 0 else super()._function(x)

    def _log_det(self, x, y, aux):
        return super()._log_det(x, y, aux).float()


class Outside(pf.Shift):
    codomain = torch.distributions.constraints.independent(torch.distributions.constraints.positive, 1)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (WrongLogDet, "log-det"),
        (WrongInverse, "round trip"),
        (WrongShape, "shapes"),
        (Detached, "gradients"),
        (WrongGradient, "gradients"),
        (SecondCache, "fresh data|copies|gradients"),
        (Neighbours, "batch"),
        (Counting, "batch"),
        (Float32, "dtype and device"),
        (Outside, "codomain"),
    ],
)
def test_every_broken_promise_is_named(broken, promise):
    layer = scatter(broken(3)).double()
    with pytest.raises(BrokenPromiseError, match=f"{broken.__name__} breaks the promise '({promise})'"):
        check_bijection(layer)


@pytest.mark.parametrize(
    ("transform", "promise"),
    [
        (lambda: pyro_transforms.Planar(4), "inverse"),
        (lambda: pyro_transforms.Radial(4), "inverse"),
        (lambda: pyro_transforms.Sylvester(4), "inverse"),
        (lambda: pyro_transforms.block_autoregressive(4), "inverse"),
        (lambda: pyro_transforms.polynomial(4), "inverse"),
        (lambda: pyro_transforms.neural_autoregressive(4), "inverse"),
        (lambda: pyro_transforms.matrix_exponential(4), "shapes"),
        (lambda: pyro_transforms.affine_coupling(4), "fresh data"),
        (lambda: pyro_transforms.householder(4), "fresh data"),
    ],
)
def test_pyros_own_failures_are_found(transform, promise):
    with pytest.raises(BrokenPromiseError, match=f"promise '{promise}'"):
        check_bijection(transform(), event_shape=(4,))


@pytest.mark.parametrize(
    ("transform", "x"),
    [
        (torch.distributions.transforms.ExpTransform(), torch.randn(3, dtype=torch.float64)),
        (torch.distributions.transforms.SigmoidTransform(), torch.randn(3, dtype=torch.float64)),
        (pyro_transforms.HaarTransform(), torch.randn(3, 4, dtype=torch.float64)),
        (pf.orthogonal(4).double().inv, torch.randn(3, 4, dtype=torch.float64)),
    ],
    ids=lambda t: type(t).__name__,
)
def test_sound_foreign_transforms_pass(transform, x):
    check_bijection(transform, x)


def test_it_leaves_the_world_alone():
    layer = scatter(pf.affine_coupling(4, [8]))
    state = torch.random.get_rng_state()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    check_bijection(layer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in layer.parameters())


def test_points_where_the_transform_does_not_tell():
    with pytest.raises(ValueError, match="event_shape"):
        check_bijection(pf.PixelShuffle(2))
    check_bijection(pf.PixelShuffle(2), event_shape=(4, 2, 3))
    with pytest.raises(TypeError, match="needs a torch Transform"):
        check_bijection(torch.nn.Linear(2, 2))
    assert sample_domain(pf.Sigmoid(), (2,)).shape == (2,)
    assert (sample_domain(pf.Inverted(pf.Sigmoid()), (100,)) > 0).all()


class Square(pf.Elementwise):
    """Not one-to-one: the inverse finds a point with the same y, but not x itself."""

    def _function(self, x):
        return x * x

    def _inverse_function(self, y):
        return y.sqrt()

    def _log_slope(self, x, y):
        return (2 * x).abs().log()


def test_maps_that_are_not_one_to_one_are_found():
    with pytest.raises(BrokenPromiseError, match="round trip"):
        check_bijection(Square(), torch.randn(6, dtype=torch.float64))
    with pytest.raises(BrokenPromiseError, match="round trip"):
        check_bijection(torch.distributions.transforms.AbsTransform(), torch.randn(6, dtype=torch.float64))
    positive = torch.rand(6, dtype=torch.float64)
    with pytest.raises(BrokenPromiseError, match="promise 'log-det': it has none"):
        check_bijection(torch.distributions.transforms.AbsTransform(), positive)


def test_what_cannot_be_checked_is_said():
    x = torch.randn(3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="changes the number of elements"):
        check_bijection(torch.distributions.transforms.StickBreakingTransform(), x)
    with pytest.raises(ValueError, match="at least one point"):
        check_bijection(pf.shift(2).double(), x[:0])


def test_conditioned_layers_are_checked_one_context_at_a_time():
    conditional = pf.conditional_planar(4, 3).double()
    for context in (torch.randn(5, 3), torch.randn(3)):  # a batch; a graph
        with pytest.raises(ValueError, match=r"torch\.no_grad"):
            check_bijection(conditional.condition(context.double()))
    with torch.no_grad():
        layer = conditional.condition(torch.randn(3).double())
    check_bijection(layer, torch.randn(3, 4, dtype=torch.float64))
