# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring runs, and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

mha_c = pytest.importorskip("mha_c")

def names_of_modules(package, path):
    """A package, its modules and its sub-packages, by name: those of torch cannot be imported everywhere."""
    yield package
    for module in pkgutil.iter_modules([path]):
        name = f"{package}.{module.name}"
        if module.ispkg:
            yield from names_of_modules(name, f"{path}/{module.name}")
        elif not module.name.startswith("_"):
            yield name


MODULES = list(names_of_modules("mha_c", mha_c.__path__[0]))
NEED_TORCH = (
    "mha_c.layer", "mha_c.norms", "mha_c.linear", "mha_c.dropout", "mha_c.container", "mha_c.transformer", "mha_c.check",
    "mha_c.heads", "mha_c.torch",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    if name.startswith(NEED_TORCH):
        pytest.importorskip("torch")
    if name == "mha_c.torch.transformers":
        pytest.importorskip("transformers")
        importlib.import_module("torchvision_operators")
    if name == "mha_c.plot":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)  # some of them write files
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_that_there_are_examples():
    modules = [importlib.import_module(name) for name in ("mha_c", "mha_c.layer", "mha_c.functional")]
    examples = [test.examples for module in modules for test in doctest.DocTestFinder().find(module)]
    assert sum(map(len, examples)) > 20
