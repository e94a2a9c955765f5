# SPDX-License-Identifier: Apache-2.0
"""The documentation: examples in its pages run, figures are those measured, docstrings say what numpydoc asks for."""

import doctest
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest
from helpers import REPOSITORY

mha_c = pytest.importorskip("mha_c")

DOCS = REPOSITORY / "docs"


@pytest.mark.parametrize("page", ["getting_started.md", "guide.md", "loading.md", "models.md"])
def test_pages(page, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    if page == "models.md":
        pytest.importorskip("transformers")
        importlib.import_module("torchvision_operators")
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    blocks = re.findall(r"^```pycon\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S)
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page, page, 0)
    assert len(examples.examples) >= 10
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_the_figures_are_those_of_the_summary(tmp_path):
    """benchmarks/report.py makes the page, its chart and the README's table again, from what was measured."""
    readme = shutil.copy(REPOSITORY / "README.md", tmp_path)
    command = ["benchmarks/report.py", "docs/performance.json", "--output", tmp_path, "--readme", readme]
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True)
    for made in ("README.md", "performance.json", "performance.md", "performance.svg"):
        committed = (REPOSITORY if made == "README.md" else DOCS) / made
        assert (tmp_path / made).read_text("utf-8") == committed.read_text("utf-8")
    assert re.search(r"<!-- speed -->\n\nIn the median of \d+ shapes", (tmp_path / "README.md").read_text("utf-8"))


def test_the_figures_of_encoders_are_those_of_the_summary(tmp_path):
    command = ["benchmarks/report.py", "docs/encoders.json", "--encoders", "--output", tmp_path]
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True)
    for made in ("encoders.json", "encoders.md"):
        assert (tmp_path / made).read_text("utf-8") == (DOCS / made).read_text("utf-8")


# What numpydoc asks for and does not get: summaries may be noun phrases ("The parameters by name"), short ones need no
# longer text below them, and a reference to each relative of a function tells nobody much.
ACCEPTED = {"ES01", "GL01", "GL02", "GL03", "PR08", "PR09", "RT03", "RT04", "RT05", "SA01", "SA03", "SS05", "SS06"}

MODULES = ("check", "functional", "heads", "plot", "threads", "torch")
CLASSES = (
    "container.Container",
    "container.ModuleList",
    "dropout.Dropout",
    "dropout.RandomModule",
    "layer.OutputProjection",
    "linear.Linear",
    "transformer.decoder.TransformerDecoder",
    "transformer.decoder.TransformerDecoderLayer",
    "transformer.encoder.TransformerEncoder",
    "transformer.encoder.TransformerEncoderLayer",
    "transformer.transformer.Transformer",
    "module.Module",
    "norms.LayerNorm",
    "norms.RMSNorm",
    "norms._Norm",
    "explanation.Explanation",
    "explanation.LayerExplanation",
    "explanation.Stage",
    "explanation.StackExplanation",
    "explanation.MaskEffect",
    "display.coverage.Coverage",
    "display.coverage.CoverageRow",
)


def names_of(item):
    """The dotted names of a function; or of a class, its methods and its properties."""
    path = f"{item.__module__}.{item.__qualname__}"
    members = vars(item).items() if inspect.isclass(item) else ()
    return [path, *(f"{path}.{name}" for name, member in members if name[0] != "_" and describes_itself(member))]


def describes_itself(member):
    return inspect.isroutine(member) or isinstance(member, (classmethod, property))


def public_names():
    """What the pages of the API show."""
    found = names_of(mha_c.MultiheadAttention) + names_of(mha_c.explain)
    for path in CLASSES:
        module, name = path.rsplit(".", 1)
        found += names_of(getattr(importlib.import_module(f"mha_c.{module}"), name))
    for module in MODULES:
        try:
            public = importlib.import_module(f"mha_c.{module}")
        except ImportError:  # torch or matplotlib is missing
            continue
        for item in (getattr(public, name) for name in public.__all__):
            found += names_of(item) if inspect.isroutine(item) or inspect.isclass(item) else []
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("name", public_names())
def test_docstring(name):
    validate = pytest.importorskip("numpydoc.validate").validate
    docscrape = pytest.importorskip("numpydoc.docscrape")
    item = pkgutil.resolve_name(name)
    errors = {f"{code} {message}" for code, message in validate(name)["errors"] if code not in ACCEPTED}
    sections = docscrape.NumpyDocString(inspect.cleandoc(item.__doc__))

    if isinstance(item, property):  # one line about a value
        errors = {error for error in errors if error[:4] not in ("EX01", "SS02")}
    # A class that is made from its attributes need not describe them twice; torch describes its own.
    attributes = {name for field in sections["Attributes"] for name in field.name.split(", ")}
    made_from_attributes = inspect.isclass(item) and set(inspect.signature(item).parameters) <= attributes
    if made_from_attributes or inspect.isclass(item) and "__init__" not in vars(item):
        errors = {error for error in errors if error[:4] != "PR01"}
    # "query, key, value: As for the layer itself."
    told_elsewhere = [field.name for field in sections["Parameters"] if "".join(field.desc[:1]).startswith("As ")]
    elsewhere = {name for names in told_elsewhere for name in names.split(", ")}
    errors = {error for error in errors if not (error[:4] == "PR04" and re.findall('"(.*)"', error)[0] in elsewhere)}
    assert not errors


def test_every_public_name_is_validated():
    assert len(public_names()) > 60
