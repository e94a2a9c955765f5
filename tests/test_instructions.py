# SPDX-License-Identifier: Apache-2.0
"""The forward pass takes no more instructions than it did; benchmarks/instructions.py counts them."""

import json
import sys

import pytest
from helpers import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture
def instructions(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import instructions
    yield instructions
    for name in ("instructions", "compiler"):  # general names, which other tests may not inherit
        sys.modules.pop(name, None)


def test_no_call_takes_more_instructions(instructions):
    if reason := instructions.why_not():
        pytest.skip(reason)
    expected = json.loads(instructions.EXPECTED.read_text())
    try:
        compiler = instructions.compiler_version()
        if compiler != expected["compiler"]:
            pytest.skip(f"the counts were made with {expected['compiler']}, this is {compiler}")
        counts = instructions.count()
    except (FileNotFoundError, instructions.NoCompiler) as error:
        pytest.skip(str(error))
    _, worse = instructions.compare(counts, expected)
    assert not worse, "\n".join(["python benchmarks/instructions.py --update, if this is meant:", *worse])


def test_a_regression_is_named(instructions):
    expected = {"instructions": {"a": 1000, "b": 1000, "c": 1000}}
    _, worse = instructions.compare({"a": 1019, "b": 1021, "d": 1}, expected)
    assert [line.split()[0].rstrip(":") for line in worse] == ["b", "d", "c"]
