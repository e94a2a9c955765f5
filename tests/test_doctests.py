# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring runs, and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

mha_c = pytest.importorskip("mha_c")

MODULES = ["mha_c", *(f"mha_c.{m.name}" for m in pkgutil.iter_modules(mha_c.__path__) if not m.name.startswith("_"))]
NEED_TORCH = {f"mha_c.{name}" for name in
              ("attention", "check", "check_command", "heads", "model_runs", "replacement", "torch")}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    if name in NEED_TORCH:
        pytest.importorskip("torch")
    if name == "mha_c.plot":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)  # some of them write files
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_that_there_are_examples():
    modules = [importlib.import_module(name) for name in ("mha_c", "mha_c.attention", "mha_c.functional")]
    examples = [test.examples for module in modules for test in doctest.DocTestFinder().find(module)]
    assert sum(map(len, examples)) > 20
