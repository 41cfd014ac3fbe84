"""Every example in a docstring, a README or a page of the docs runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import sys
import types
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch

import pyro_invflows
from pyro_invflows import testing

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
MODULES = [m.name for m in pkgutil.walk_packages(pyro_invflows.__path__, "pyro_invflows.")]
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def names():
    return {"torch": torch, "dist": dist, "check_bijection": testing.check_bijection} | {
        name: getattr(pyro_invflows, name) for name in pyro_invflows.__all__
    }


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), extraglobs=names(), optionflags=FLAGS)
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages(page, monkeypatch):
    torch.manual_seed(0)
    module = types.ModuleType("page")  # a real module, so that classes defined on the page can be pickled
    monkeypatch.setitem(sys.modules, "page", module)
    test = doctest.DocTestParser().get_doctest(page.read_text(), {}, page.name, str(page), 0)
    test.globs = vars(module)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, clear_globs=False)
    assert test.examples or page.parent.name == "docs"
    assert runner.failures == 0
