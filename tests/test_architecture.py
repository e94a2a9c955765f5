# SPDX-License-Identifier: Apache-2.0
"""The map of ARCHITECTURE.md is true: what uses what."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

import pytest
from helpers import REPOSITORY

mha_c = pytest.importorskip("mha_c")

PACKAGE = Path(mha_c.__file__).parent
CORE = REPOSITORY / "csrc"


def test_python_modules_use_what_is_below_them():
    """import-linter reads the contracts in pyproject.toml; lazy imports and those for type checkers count, too."""
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()",
               "--config", REPOSITORY / "pyproject.toml", "--no-cache"]
    result = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_nothing_uses_the_package_itself():
    """Which the contracts cannot see: for them, the C extension is the package."""
    modules = {path.stem for path in PACKAGE.iterdir()} | {"_core"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "mha_c" and path != PACKAGE / "__init__.py":
                assert {alias.name for alias in node.names} <= modules, path
            if isinstance(node, ast.Import) and path != PACKAGE / "__init__.py":
                assert all(alias.name.split(".")[0] != "mha_c" for alias in node.names), path


def test_lines_have_at_most_120_columns():
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]:
        long = [number for number, line in enumerate(path.read_text("utf-8").splitlines(), 1) if len(line) > 120]
        assert not long, path


def test_the_core_gets_each_argument_in_its_place():
    """Where a call of _core passes a name of its signature, perhaps as a private attribute, it does so in its place."""
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
            given = [call.func, *call.args]
            for i, function in enumerate(given[:2]):  # called by another function that takes it first, too
                if not isinstance(function, ast.Attribute) or ast.unparse(function) != f"_core.{function.attr}":
                    continue
                names = list(inspect.signature(getattr(mha_c._core, function.attr)).parameters)
                plain = [argument for argument in given[i + 1:] if not isinstance(argument, ast.Starred)]
                passed = [ast.unparse(argument).split(".")[-1].lstrip("_") for argument in plain]
                if len(plain) == len(given[i + 1:]):
                    for name in set(passed) & set(names):
                        assert passed[names.index(name)] == name, f"{path.name}, line {call.lineno}: {name}"
                        checked += 1
    assert checked > 20


# ------------------------------------------------------------------------------------------- C files


def read_map():
    """The line of the map on which each C file stands, by its path below csrc/. A header without a line of its own stands
    where the source of its name does."""
    lines = [line.split()[0].removeprefix("csrc/") for line in (REPOSITORY / "ARCHITECTURE.md").read_text().splitlines()
             if line.startswith("csrc/")]
    found = {}
    for number, line in enumerate(lines):
        before, _, rest = line.partition("{")
        names, _, after = rest.partition("}")
        for name in names.split(","):
            for file in CORE.glob(before + name + after):
                assert found.setdefault(str(file.relative_to(CORE)), number) == number, f"{file} stands twice in the map"
    for file in [file for file in found if file.endswith(".c")]:
        found.setdefault(f"{file[:-2]}.h", found[file])
    return found


@pytest.fixture(scope="module")
def levels():
    """read_map(), in which no file is missing."""
    found = read_map()
    missing = {str(file.relative_to(CORE)) for file in CORE.rglob("*.[ch]")} - found.keys()
    assert not missing, f"not in the map of ARCHITECTURE.md: {missing}"
    return found


def upward(uses, levels):
    """The uses that lead from a file to one that stands above it in the map, in words."""
    return sorted({f"{user} uses {used}" for user, used in uses if levels[user] > levels[used]})


def test_c_files_include_what_is_below_them(levels):
    uses = []
    for file in CORE.rglob("*.[ch]"):
        for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
            used = (file.parent / name).resolve()
            uses.append((str(file.relative_to(CORE)), str(used.relative_to(CORE))))
    assert not upward(uses, levels)


def test_c_files_call_what_is_below_them(levels, tmp_path):
    """What the object of each file leaves undefined is defined by a file below it."""
    compiler = next(filter(shutil.which, ["gcc", "clang", "cc"]), None)
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("no C compiler, or no nm")
    defined, undefined = {}, {}
    for file in CORE.rglob("*.c"):
        name, made = str(file.relative_to(CORE)), tmp_path / f"{file.parent.name}_{file.stem}.o"
        subprocess.run([compiler, "-std=c11", "-D_GNU_SOURCE", "-O0", "-w", '-DMHA_C_NUMPY_VERSION="2"',
                        f"-I{np.get_include()}", f"-I{sysconfig.get_path('include')}", "-c", file, "-o", made], check=True)
        symbols = subprocess.run(["nm", "-P", made], check=True, capture_output=True, text=True).stdout
        for symbol, kind, *_ in map(str.split, symbols.splitlines()):
            if kind == "U":
                undefined.setdefault(name, set()).add(symbol)
            elif kind.isupper():
                defined[symbol] = name
    uses = [(user, defined[symbol]) for user, wanted in undefined.items() for symbol in wanted if symbol in defined]
    assert not upward(uses, levels)
