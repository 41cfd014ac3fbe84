"""Imports run downwards only; nothing happens at import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_invflows

ROOT = Path(pyro_invflows.__file__).parent
#: The folders by floors, the lowest first; folders on the same floor do not import each other. Files beside the folders
#: may use every floor.
FLOORS = [
    {"support"},
    {"linalg"},
    {"logdet", "networks", "solvers"},
    {"monotone"},
    {"core"},
    {"transforms"},
    {"inference"},
]


def parts(module: str) -> list[str]:
    return module.split(".")[1:]


def floor(module: str) -> int:
    """Return the floor of a module: that of its folder; one more for a file beside them, two more for the package."""
    folder, *_ = parts(module) or [""]
    for i, folders in enumerate(FLOORS):
        if folder in folders:
            return i
    assert not (ROOT / folder).is_dir() or not folder, f"{folder}/ has no floor"
    return len(FLOORS) + (not folder)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "pyro_invflows":
                found |= {f"pyro_invflows.{a.name}" for a in node.names}
            elif node.module:
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name for name in found if name.startswith("pyro_invflows")}


def name_of(path: Path) -> str:
    return ".".join(("pyro_invflows", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    for other in imports(MODULES[module]):
        same_folder = parts(module)[:1] == parts(other)[:1]
        assert same_folder or floor(other) < floor(module), f"{module} imports {other}"


def test_no_circle():
    """Modules can also be ordered within a folder: no module imports, even indirectly, one that imports it."""
    graph = {
        module: {other for other in imports(path) if other in MODULES and not module.startswith(other)}
        for module, path in MODULES.items()
    }
    # a folder's own __init__ comes after its modules
    while graph:
        ready = {module for module, others in graph.items() if not others & graph.keys()}
        assert ready, f"a circle among {sorted(graph)}"
        graph = {module: others for module, others in graph.items() if module not in ready}


def test_torch_private_state_is_read_in_one_place():
    strays = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in MODULES.values()
        if path.relative_to(ROOT) != Path("support/modes.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"torch\._C|torch\._functorch|torch\._dynamo|forward_ad\._", line)
    ]
    assert not strays


def test_import_is_inert():
    """Importing the package patches nothing, changes no global default, draws no random number and loads no pyplot."""
    code = """
import torch, pyro, pyro.distributions as dist
def state():
    return (
        torch.get_default_dtype(), torch.distributions.Distribution._validate_args, dist.Normal(0., 1.)._validate_args,
        torch.random.get_rng_state().sum().item(), torch.is_grad_enabled(), torch.get_num_threads(),
        {n: id(v) for m in (torch, torch.nn.Module, torch.Tensor, torch.distributions.Transform, dist, dist.transforms,
                            torch.distributions.TransformedDistribution) for n, v in vars(m).items()},
    )
before = state()
import pyro_invflows, pyro_invflows.testing
assert state() == before
import sys
assert not {"matplotlib", "sklearn", "mpmath", "zuko", "nflows", "normflows"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
