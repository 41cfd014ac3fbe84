"""What is exported is complete: a row, a docstring, a factory, a line in the README."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import re
import typing
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


#: Layers made from a transform, not from a size; Conditional does not amortise its parameters.
WRAPS = {"NumericalInverse": pyro.distributions.transforms.planar(4)}
#: Layers made from a function of one variable; its own layers have factories.
FROM_FUNCTION = {"Autoregressive", "Coupling", "Monotone"}
#: Factories whose name is not the snake_case of the class.
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
    elif name not in STRUCTURE | FROM_FUNCTION:
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


#: Positional arguments that factories need.
NEEDED = {
    "input_dim": 4,
    "context_dim": 2,
    "noise_dim": 3,
    "transform": pyro.distributions.transforms.planar(4),
    "layers": pf.affine_coupling,
}
FACTORIES = [n for n in transforms.__all__ if n.islower()]


def seeded(factory, *args, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return factory(*args, **kwargs)


def whole_state(module):
    """Return a module's tensors, and the settings of its parts."""
    plain = (bool, int, float, str, tuple, list, type(None))
    settings = [{k: v for k, v in vars(m).items() if isinstance(v, plain)} for m in module.modules()]
    return {name: t.tolist() for name, t in module.state_dict().items()}, settings, repr(module)


@pytest.mark.parametrize("name", FACTORIES)
def test_signatures_of_factories_are_true(name):
    """Every parameter is in the signature with its default, which has no effect if passed; no other is accepted."""
    factory = getattr(pf, name)
    parameters = inspect.signature(factory).parameters.values()
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters), "*args or **kwargs"
    needed = {p.name: NEEDED[p.name] for p in parameters if p.default is p.empty}
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    plain = seeded(factory, **needed)
    assert whole_state(seeded(factory, **needed, **given)) == whole_state(plain)
    for keyword, default in given.items():
        assert whole_state(seeded(factory, **needed, **{keyword: default})) == whole_state(plain), keyword
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'nonsense'"):
        factory(**needed, nonsense=1)


CONDITIONAL_FACTORIES = [n for n in FACTORIES if n.startswith("conditional_")]


@pytest.mark.parametrize("name", CONDITIONAL_FACTORIES)
def test_conditional_factories_are_functions_like_others(name):
    """They have the arguments of the layer's factory and of the context, as if each were written by hand."""
    factory, plain = getattr(pf, name), getattr(pf, name.removeprefix("conditional_"))
    assert pickle.loads(pickle.dumps(factory)) is factory
    assert (factory.__name__, factory.__qualname__, factory.__module__) == (name, name, plain.__module__)
    parameters, own = inspect.signature(factory).parameters, inspect.signature(plain, eval_str=True).parameters
    first, second, *others = parameters.values()
    assert (first.name, second.name) == ("input_dim", "context_dim")
    assert all(p.kind is p.KEYWORD_ONLY for p in others)
    assert parameters.keys() - own.keys() <= {"context_dim", "context_hidden_dims"}
    assert own.keys() <= parameters.keys()
    for other in others:
        expected = own.get(other.name)
        if expected is None:
            assert (other.name, other.default) == ("context_hidden_dims", (64, 64))
        else:
            assert (other.default, other.annotation) == (expected.default, expected.annotation)
    hints = typing.get_type_hints(factory)
    assert hints.pop("return") is pf.Conditional
    assert hints == {p.name: p.annotation for p in parameters.values()}
    text = pydoc.render_doc(factory, renderer=pydoc.plaintext)
    assert all(f"    {keyword}: " in text for keyword in parameters)
    with pytest.raises(TypeError, match=rf"{name}\(\) missing .* 'context_dim'"):
        factory(4)


@pytest.mark.parametrize("name", CONDITIONAL_FACTORIES)
def test_one_name_for_the_network_that_reads_the_context(name):
    """hidden_dims is for the layer's own network, context_hidden_dims for the one that reads the context, if any."""
    factory = getattr(pf, name)
    keywords = inspect.signature(factory).parameters

    def widths_of(module):
        return {m.out_features for m in module.modules() if isinstance(m, torch.nn.Linear)}

    if "context_hidden_dims" in keywords:
        chosen = factory(4, 2, context_hidden_dims=[13])
        context_network = chosen.hypernet or chosen.template.net.hypernet
        assert context_network[0].in_features == 2
        assert 13 in widths_of(context_network)
        assert 13 not in widths_of(chosen) - widths_of(context_network)
    else:
        chosen = factory(4, 2)
        assert chosen.hypernet is None  # nothing but the layer's own network reads the context
        with pytest.raises(TypeError, match="unexpected keyword argument 'context_hidden_dims'"):
            factory(4, 2, context_hidden_dims=[13])
    if "hidden_dims" in keywords:
        conditional = factory(4, 2, hidden_dims=[13])
        own = getattr(conditional.template, "net", None) or conditional.template.hypernet
        assert 13 in widths_of(own)
        assert conditional.hypernet is None or 13 not in widths_of(conditional.hypernet)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_own_no_stray_tensors(name):
    """A layer's tensors are parameters and buffers: .to() and the memo would miss any other."""
    for case in CASES:
        if case.layer == name:
            for module in case.build(case.dims[-1]).modules():
                assert not [k for k, v in vars(module).items() if isinstance(v, torch.Tensor)]


def section(doc, title):
    """Return the text of a section of a docstring, empty if there is none."""
    match = re.search(rf"^{title}:\n((?:    .*\n|\n)*)", doc + "\n", re.MULTILINE)
    return match[1] if match else ""


@pytest.mark.parametrize("name", LAYERS)
def test_learned_tensors_and_log_det_shapes_are_documented(name):
    """Users freeze, regularise and load a layer's tensors by name."""
    layer = getattr(pf, name)
    doc = inspect.getdoc(layer)
    assert "log-det" in section(doc, "Shape"), "the Shape section does not give the log-det's shape"
    made = [case.build(case.dims[-1]) for case in CASES if case.layer == name]
    made = [module for each in made for module in each.modules() if type(module) is layer]
    own = {key for module in made for key in (*module._parameters, *module._buffers) if not key.startswith("_")}
    attributes = section(doc, "Attributes")
    missing = {key for key in own if not re.search(rf"^    {key}: ", attributes, re.MULTILINE)}
    assert not missing, f"the Attributes section lacks {sorted(missing)}"
