# SPDX-License-Identifier: Apache-2.0
"""The extension module. All else about the package is in pyproject.toml.

No flag names an instruction set: each file under csrc/kernels opens a target region of its own, and the module chooses
among them when it is imported. Contraction is off, so that every compiler gives the same bits. SLP vectorisation is
off: otherwise gcc copies small structs with vector loads right after writing them member by member, and such loads
cannot be forwarded from the store buffer.
"""

import os
import sys
from glob import glob

import numpy
from setuptools import Extension, setup

if sys.platform == "win32":
    raise SystemExit("mha_c runs on Linux and macOS, not on Windows: install it in the Windows Subsystem for Linux (WSL)")

# The flags that Python was built with ask for debug information, nine tenths of a wheel; CFLAGS=-g brings it back.
debug_flags = [] if "-g" in os.environ.get("CFLAGS", "").split() else ["-g0"]

core = Extension(
    "mha_c._core",
    sources=sorted(glob("csrc/**/*.c", recursive=True)),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    include_dirs=[numpy.get_include()],
    define_macros=[("MHA_C_NUMPY_VERSION", f'"{numpy.__version__}"')]
    + ([("_GNU_SOURCE", None)] if sys.platform == "linux" else []),
    extra_compile_args=[
        "-std=c11",
        "-O2",
        "-ffp-contract=off",
        "-fno-tree-slp-vectorize",
        "-fvisibility=hidden",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Wconversion",
        "-Wshadow",
        *debug_flags,
    ],
    extra_link_args=["-pthread"],
)

setup(ext_modules=[core])
