"""``input_dim`` is the size that a layer requires along ``dim``, or None if any size will do."""

from __future__ import annotations

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from cases import CASES
from torch.distributions import transforms as torch_transforms

import pyro_invflows as pf

F64 = torch.float64


def takes(layer, shape):
    """Whether a layer takes events of this shape."""
    try:
        layer(torch.zeros(3, *shape, dtype=F64))
    except (ValueError, RuntimeError):
        return False
    return True


#: A row with the user's own network, whose width the layer cannot know.
UNKNOWN = {"contractive_residual_order_2"}


def check(layer, event):
    """Compare with trials at the size of an event and at four times as many (which halve and shuffle as well)."""
    assert takes(layer, event)
    more = list(event)
    more[layer.dim] *= 4
    expected = None if takes(layer, more) else event[layer.dim]
    assert layer.input_dim == expected
    if expected is not None and layer.domain.event_dim:
        with pytest.raises(ValueError, match="elements"):
            layer.forward_shape(torch.Size([3, *more]))


ROWS = [pytest.param(case, dim, id=f"{case.name}-{dim}") for case in CASES for dim in case.dims]


@pytest.mark.parametrize(("case", "dim"), ROWS)
def test_every_layer_and_its_inverse(case, dim):
    layer = case.build(dim)
    event = case.event(dim)
    if case.name in UNKNOWN:
        assert layer.input_dim is None
    else:
        check(layer, event)
    # the output is the input of the inverse
    out = layer(case.points(dim)).shape[-len(event) :]
    inverted = pf.Inverted(layer)
    assert inverted.input_dim == (None if layer.input_dim is None else out[inverted.dim])
    chain = pf.Chain([layer])
    assert chain.input_dim == layer.input_dim
    assert pf.Chain([inverted]).input_dim == inverted.input_dim


def normal(n):
    return dist.Normal(torch.zeros(n, dtype=F64), torch.ones(n, dtype=F64)).to_event(1)


NOISE = {
    "concat": (lambda: pf.ConcatNoise(normal(2), input_dim=3), 3),
    "concat, any size": (lambda: pf.ConcatNoise(normal(2)), None),
    "slice": (lambda: pf.Slice(normal(2), input_dim=3), 5),
    "slice, any size": (lambda: pf.Slice(normal(2)), None),
    "slice of channels": (lambda: pf.Slice(normal(2), input_dim=3, dim=-3), 5),
    "concat inverted": (lambda: pf.Inverted(pf.ConcatNoise(normal(2), input_dim=3)), 5),
    "slice inverted": (lambda: pf.Inverted(pf.Slice(normal(2), input_dim=3)), 3),
    "chain that grows": (lambda: pf.Chain([pf.planar(3), pf.ConcatNoise(normal(2))]), 3),
    "chain that grows, known from behind": (lambda: pf.Chain([pf.ConcatNoise(normal(2)), pf.planar(5)]), 3),
    "chain that shrinks, known from behind": (lambda: pf.Chain([pf.Slice(normal(2)), pf.planar(3)]), 5),
    "several scales": (lambda: pf.multi_scale(8, num_scales=3, layers=pf.planar), 2),
    "several scales of images": (lambda: pf.multi_scale(1, layers=lambda c: pf.diagonal(c, dim=-3), dim=-3), 8),
}


@pytest.mark.parametrize(("make", "expected"), NOISE.values(), ids=NOISE)
def test_layers_that_change_the_size(make, expected):
    layer = make().double()
    assert layer.input_dim == expected
    if expected is not None:
        event = [expected] if layer.dim == -1 else [expected, 2, 2]
        assert layer(torch.zeros(3, *event, dtype=F64)).shape[0] == 3
        event[0] += 4
        with pytest.raises(ValueError, match=r"elements|events"):
            layer(torch.zeros(3, *event, dtype=F64))


STRUCTURES = {
    "empty": (lambda: pf.Chain([]), None),
    "elementwise": (lambda: pf.Chain([pf.sigmoid(), pf.baird(4)]), 4),
    "shared slopes": (lambda: pf.Chain([pf.sigmoid(), pf.PReLU()]), None),
    "one slope": (lambda: pf.PReLU((1,)), None),
    "a matrix of slopes": (lambda: pf.PReLU((2, 5)), 5),
    "a column of slopes": (lambda: pf.PReLU((5, 1)), None),
    "ends of an interval": (lambda: pf.Interval(torch.zeros(6), 1.0), 6),
    "foreign": (lambda: pf.Chain([T.planar(3)]), 3),
    "torch's, of any size": (lambda: pf.Chain([torch_transforms.ExpTransform()]), None),
    "foreign among ours": (lambda: pf.Chain([torch_transforms.ExpTransform(), T.radial(3)]), 3),
    "torch's inverse": (lambda: pf.Chain([pf.svd_linear(4).inv]), 4),
    "torch's independent": (lambda: pf.Chain([torch_transforms.IndependentTransform(pf.baird(4), 1)]), 4),
    "inverted chain": (lambda: pf.Inverted(pf.Chain([pf.permute(4), pf.PReLU()])), 4),
    "numerical inverse": (lambda: pf.NumericalInverse(T.planar(3)), 3),
    "pixels": (lambda: pf.Chain([pf.pixel_shuffle(), pf.diagonal(2, dim=-3)]), 8),
    "rows of images": (lambda: pf.Chain([pf.diagonal(3, dim=-3), pf.shift(7)]), 3),
}


@pytest.mark.parametrize(("make", "expected"), STRUCTURES.values(), ids=STRUCTURES)
def test_structures(make, expected):
    assert make().input_dim == expected


def test_elementwise_layers_that_do_not_fit_are_refused_when_built():
    with pytest.raises(ValueError, match=r"part 1 \(PReLU\) does not fit part 0 \(Baird\).* 4 elements along dim -1"):
        pf.Chain([pf.baird(4), pf.prelu(5)])
    pf.Chain([pf.PReLU((1,)), pf.baird(4), pf.PReLU((3, 4))])
