"""What is exported is complete: a row, a docstring, a factory, a line in the README."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pyro
import pytest
import torch
from cases import CASES, CHANGES_DIMENSION

import pyro_invflows as pf
from pyro_invflows import transforms

ROOT = Path(__file__).parent.parent
LAYERS = sorted(
    name
    for name in pf.__all__
    if inspect.isclass(getattr(pf, name))
    and issubclass(getattr(pf, name), pf.Bijection)
    and name not in ("Bijection", "ContextLayer", "Elementwise", "VolumePreserving")
)
STRUCTURE = {"Chain", "Inverted"}


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


#: Layers made from a transform, not from a size; its parameters are not theirs to amortise.
WRAPS = {"NumericalInverse": pyro.distributions.transforms.planar(4)}
#: Classes whose snake_case is not what a user would type.
FACTORY = {"PReLU": "prelu", "LeakyReLU": "leaky_relu"}


def test_exports_exist_once():
    for module in (pf, transforms):
        assert len(module.__all__) == len(set(module.__all__))
        assert all(hasattr(module, name) for name in module.__all__)
    assert set(transforms.__all__) <= set(pf.__all__)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_complete(name):
    layer = getattr(pf, name)
    assert name in {case.layer for case in CASES} | set(CHANGES_DIMENSION), "no row in the registry"
    doc = inspect.getdoc(layer)
    for part in ("**Forward**", "**Inverse**", "**Log-det**", "**Identity**", "Example:"):
        assert part in doc, f"the docstring lacks {part}"
    if name not in STRUCTURE:
        for part in (".. math::", "Shape:", "Choose it"):
            assert part in doc, f"the docstring lacks {part}"
    if name in CHANGES_DIMENSION:
        assert f"**{CHANGES_DIMENSION[name]}**" in doc, "the docstring lacks the word exact or bound"
    elif name not in STRUCTURE:
        factory = FACTORY.get(name, snake(name))
        assert factory in pf.__all__, "no factory"
        made = getattr(pf, factory)(WRAPS.get(name, 4))
        assert type(made) is layer
        own = bool(list(made.parameters())) and made.conditionable and name not in WRAPS
        assert (f"conditional_{factory}" in pf.__all__) == own, "a conditional factory exactly where it has parameters"
        if own:
            assert isinstance(getattr(pf, f"conditional_{factory}")(4, 2), pf.Conditional)
    assert re.search(rf"`{name}\b", (ROOT / "README.md").read_text()), "no line in the README"


@pytest.mark.parametrize("name", pf.__all__)
def test_public_docstrings_and_annotations(name):
    thing = getattr(pf, name)
    assert inspect.getdoc(thing), name
    target = thing.__init__ if inspect.isclass(thing) else thing
    if not inspect.isclass(thing) or "__init__" in vars(thing):
        for parameter in inspect.signature(target).parameters.values():
            if parameter.name != "self":
                assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter.name}"


STRUCTURAL = {"transform", "input_dim", "noise_dim", "hidden_dim", "rank", "context_dim", "split_dim", "hidden_dims"}


@pytest.mark.parametrize("name", [n for n in transforms.__all__ if n.islower()])
def test_factories_take_only_sizes_by_position(name):
    for parameter in inspect.signature(getattr(pf, name)).parameters.values():
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert parameter.name in STRUCTURAL, parameter.name


@pytest.mark.parametrize("name", LAYERS)
def test_layers_own_no_stray_tensors(name):
    """A layer's tensors are parameters and buffers: what else it kept would miss .to() and the memo."""
    for case in CASES:
        if case.layer == name:
            for module in case.build(case.dims[-1]).modules():
                assert not [k for k, v in vars(module).items() if isinstance(v, torch.Tensor)]
