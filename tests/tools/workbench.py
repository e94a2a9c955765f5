# SPDX-License-Identifier: Apache-2.0
"""The C sources compiled once, and from the same objects the extension module and the C test programs."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent.parent
REPOSITORY = TESTS.parent
sys.path.append(str(TESTS))

from test_c_core import WRAP  # noqa: E402

# Later flags win: a caller may ask for another level of optimisation.
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-DNDEBUG", "-O1", "-ffp-contract=off", "-fPIC", "-pthread", "-w",
         f'-DMHA_C_NUMPY_VERSION="{np.__version__}"', f"-I{np.get_include()}", f"-I{sysconfig.get_path('include')}"]

# They ask compilers, documents, pictures or other builds: nothing that would run the C code in a new way.
NOT_ABOUT_C = ["test_c_core.py", "test_hot_loops.py", "test_instructions.py", "test_shipping.py", "test_typing.py",
               "test_documentation.py", "test_notebooks.py", "test_plot.py", "test_demo.py"]


def empty_folder(name):
    """build/NAME, with nothing in it."""
    folder = REPOSITORY / "build" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


class Workbench:
    """Objects, programs and a package in a folder of their own, from the sources in another."""

    def __init__(self, folder, source, flags=()):
        self.source = source
        self.flags = [*FLAGS, f"-I{source}", *flags]
        self.objects = folder / "objects"
        self.package = folder / "package"
        self.objects.mkdir(parents=True)
        unused = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(REPOSITORY / "mha_c", self.package / "mha_c", ignore=unused)
        for file in sorted(source.rglob("*.c")):
            self.compile(file)

    def object_of(self, file):
        """Where a source file's object lies."""
        return self.objects / ("_".join(file.relative_to(self.source).parts)[:-2] + ".o")

    def compile(self, file, flags=(), stderr=None):
        """Compiles one file; these flags come last."""
        subprocess.run(["gcc", *self.flags, *flags, "-c", file, "-o", self.object_of(file)], check=True, stderr=stderr)

    def link_extension(self):
        """mha_c._core, from the objects as they are now."""
        extension = self.package / "mha_c" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
        subprocess.run(["gcc", *self.flags, "-shared", *sorted(self.objects.glob("*.o")), "-o", extension, "-lm"],
                       check=True)

    def link_program(self, name):
        """A program of tests/c, from the objects as they are now; where it lies."""
        program = self.objects / f"test_{name}"
        if not program.with_suffix(".test").exists():
            source = TESTS / "c" / f"test_{name}.c"
            subprocess.run(["gcc", *self.flags, "-c", source, "-o", program.with_suffix(".test")], check=True)
        core = [made for made in sorted(self.objects.glob("*.o")) if not made.name.startswith("python_")]
        subprocess.run(["gcc", *self.flags, program.with_suffix(".test"), *core, "-o", program,
                        *(WRAP if name == "allocations" else []), "-lm"], check=True)
        return program

    def pytest(self, *arguments):
        """The command that runs pytest on the package, and its environment; the working directory is to be tests/."""
        return [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", *arguments], {
            **os.environ, "PYTHONPATH": str(self.package)}
