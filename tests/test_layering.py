"""Imports run downwards only; nothing happens at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_invflows

ROOT = Path(pyro_invflows.__file__).parent
#: Lower stands lower; on the transforms floor the families stand in this order.
FLOORS = [
    ["errors", "autograd", "checks"],
    ["linalg"],
    ["solvers", "nn", "logdet"],
    ["base"],
    ["foreign"],
    ["latents"],
    ["recompute"],
    ["compose"],
    ["conditional"],
    ["flow"],
    *[
        [f"transforms.{family}"]
        for family in (
            "activations",
            "shape",
            "linear",
            "lowrank",
            "coupling",
            "planar",
            "sylvester",
            "residual",
            "whitening",
            "noise",
            "numerical",
        )
    ],
    ["transforms"],
    ["guides", "testing"],
    [""],
]


def floor(module: str) -> int:
    name = module.removeprefix("pyro_invflows").lstrip(".")
    while True:
        for i, names in enumerate(FLOORS):
            if name in names:
                return i
        if "." not in name:
            raise AssertionError(f"{module} has no floor")
        name = name.rpartition(".")[0]


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


MODULES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    module = ".".join(("pyro_invflows", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    package = module.rpartition(".")[0]
    for other in imports(path):
        own = other.startswith(f"{module}.")  # a package gathers its modules
        sibling = package != "pyro_invflows" and other.rpartition(".")[0] == package != "pyro_invflows.transforms"
        assert own or sibling or floor(other) < floor(module), f"{module} imports {other}"


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
