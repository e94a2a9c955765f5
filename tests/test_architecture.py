# SPDX-License-Identifier: Apache-2.0
"""The map of ARCHITECTURE.md is true: what uses what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

mha_c = pytest.importorskip("mha_c")

PACKAGE = Path(mha_c.__file__).parent


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
