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
#: A folder a floor, the lowest first; folders on one floor do not know each other. Files beside them are uses, each on
#: top of all floors.
FLOORS = [{"support"}, {"linalg"}, {"logdet", "networks", "solvers"}, {"core"}, {"transforms"}]


def parts(module: str) -> list[str]:
    return module.split(".")[1:]


def floor(module: str) -> int:
    """Return the floor of a module: its folder's, one more for a use, two more for the package itself."""
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
    """Within a folder, too, there is an order: whoever reads a module meets nothing that stands on it."""
    graph = {
        module: {other for other in imports(path) if other in MODULES and not module.startswith(other)}
        for module, path in MODULES.items()
    }
    # what a folder gathers stands behind its modules
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
    """No patch, no global default, no random number, no pyplot: the package leaves no trace but itself."""
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
