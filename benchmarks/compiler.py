# SPDX-License-Identifier: Apache-2.0
"""The C compiler, for the parts of the benchmarks that Python would disturb."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CORE = HERE.parent / "csrc"

CODE_FLAGS = ("-std=c11", "-O2", "-ffp-contract=off", "-fno-tree-slp-vectorize", "-pthread")  # as setup.py has them
CORE_FLAGS = (*CODE_FLAGS, "-D_GNU_SOURCE", f"-I{CORE}")


class NoCompiler(Exception):
    """There is none, or it refused; the text says which."""


def compile_c(output: Path, *arguments: str | Path) -> Path:
    """Runs $CC, or cc, and returns `output`."""
    command = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(command[0]) is None:
        raise NoCompiler(f"no C compiler: {command[0]} is not installed")
    done = subprocess.run([*command, *map(str, arguments), "-o", str(output)], capture_output=True, text=True)
    if done.returncode != 0:
        raise NoCompiler(f"{command[0]} failed:\n{done.stderr}")
    return output


def compile_driver(output: Path, *names: str, flags: tuple[str, ...] = ()) -> Path:
    """A program of the C core and of some sources of this folder, by their names."""
    sources = [*(HERE / f"{name}.c" for name in names), *core_sources()]
    return compile_c(output, *CORE_FLAGS, *flags, *sources, "-lm")


def core_sources() -> list[Path]:
    """The C core without its Python binding."""
    return sorted(path for path in CORE.rglob("*.c") if path.parent.name != "python")


def compiler_version() -> str:
    """The first line of what the compiler says about itself."""
    command = shlex.split(os.environ.get("CC", "cc"))
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
