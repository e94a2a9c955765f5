# SPDX-License-Identifier: Apache-2.0
"""The core's own tests, in C: compiled and run here, by every compiler that is found and on every level of this CPU;
NEON under an emulator where there is one, and AVX-512 over AVX2 where SIMDe is installed.

Each program of tests/c says at its top what it tests. Nothing of Python or of the installed package takes part.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PROGRAMS = ["kernels", "narrow", "softmax", "exp", "norm", "forward", "block", "sdpa", "allocations"]  # and "threads"
ONE_LEVEL = ["narrow", "forward", "block", "sdpa"]  # the others try all levels by themselves
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wconversion", "-Wshadow",
         "-pthread", f"-I{REPOSITORY / 'csrc'}"]
WRAP = ["-Wl," + ",".join(f"--wrap={name}" for name in ("malloc", "calloc", "aligned_alloc", "free"))]
NATIVE = ["gcc", "clang", "musl-gcc"]
CROSS = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"

# AVX-512 without AVX-512: immintrin.h is another one, and this is what changes in the sources on their way to the
# compiler. Levels have other names, because a CPU may also have the real ones.
OVER_AVX2 = ["-isystem", str(REPOSITORY / "tests" / "c" / "emulated"), "-mavx2", "-mfma", "-mf16c", "-Wno-psabi"]
EMULATED = ", emulated"
CHANGES = [
    (r"^#pragma (?:GCC|clang) (?:.*\\\n)*.*", ""),  # the instruction set of the functions that follow
    (r'"(avx512\w*)"', rf'"\1{EMULATED}"'),
    (r"= detect\(\)", "= ~0u"),  # what the CPU has
]


def need(*tools):
    """Skips the test that asks, unless all of these programs are installed."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def first_compiler():
    """Some compiler for this machine."""
    for tool in [*NATIVE, "cc"]:
        if shutil.which(tool):
            return tool
    return pytest.skip("no C compiler is installed")


def execute(command, *, level=None, timeout=1800, variables=None):
    """Runs a command to its end, with more environment variables, and returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "MHA_C_CPU"} | (variables or {})
    if level:
        environment["MHA_C_CPU"] = level
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout,
                          env=environment, check=False)
    assert done.returncode == 0, f"{command}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Workshop:
    """Compiles each thing once, with more flags if wanted, and remembers what each program printed."""

    def __init__(self, folder, flags=()):
        self.folder = folder
        self.flags = [*FLAGS, *flags]
        self.cores = {}
        self.outputs = {}

    def compile(self, compiler, sources):
        """An object file for each source."""
        objects = [self.folder / compiler / f"core_{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda pair: execute([compiler, *self.flags, "-c", pair[0], "-o", pair[1]]),
                          zip(sources, objects)))
        return objects

    def core(self, compiler):
        """The object files of everything in csrc that does not need Python."""
        if compiler not in self.cores:
            (self.folder / compiler).mkdir()
            sources = sorted([*(REPOSITORY / "csrc").glob("*.c"), *(REPOSITORY / "csrc" / "kernels").glob("*.c")])
            self.cores[compiler] = self.compile(compiler, sources)
        return self.cores[compiler]

    def program(self, compiler, name):
        """A program of tests/c, as the command that runs it."""
        path = self.folder / compiler / f"test_{name}"
        objects = [made for made in self.core(compiler) if name != "threads" or made.stem in ("core_threads", "core_processors")]
        if not path.exists():
            options = [*(WRAP if name == "allocations" else []), *(["-static"] if compiler == CROSS else [])]
            execute([compiler, *self.flags, REPOSITORY / "tests" / "c" / f"test_{name}.c", *objects, "-o", path, *options,
                     "-lm"])
        return [EMULATOR, path] if compiler == CROSS else [path]

    def output(self, compiler, name, *, level=None):
        """What a program prints, by the level named or the best one."""
        key = compiler, name, level
        if key not in self.outputs:
            self.outputs[key] = execute(self.program(compiler, name), level=level)
        return self.outputs[key]

    def levels(self, compiler):
        """The levels this CPU, or the emulator, can run."""
        return execute([*self.program(compiler, "forward"), "levels"]).splitlines()

    def hashes(self, compiler, name, *, level=None):
        """Lines such as "hash forward float32 963ec3cfbdfca0ba", for each kind of numbers."""
        lines = [line for line in self.output(compiler, name, level=level).splitlines() if line.startswith("hash ")]
        assert len(lines) >= 2
        return lines


class Emulation(Workshop):
    """A core that runs its AVX-512 kernels on a CPU without AVX-512. The rest comes from another workshop."""

    def __init__(self, folder, workshop):
        super().__init__(folder, [f"-I{REPOSITORY / 'csrc' / 'kernels'}", *OVER_AVX2])
        self.workshop = workshop

    def core(self, compiler):
        """The other workshop's object files, except those of the levels and of AVX-512."""
        if compiler not in self.cores:
            folder = self.folder / compiler
            folder.mkdir()
            sources = [REPOSITORY / "csrc" / "cpu.c", *(REPOSITORY / "csrc" / "kernels").glob("avx512*.c")]
            for source in sources:
                text = source.read_text()
                for pattern, new in CHANGES:
                    text = re.sub(pattern, new, text, flags=re.M)
                (folder / source.name).write_text(f'#line 1 "{source}"\n{text}')
            emulated = self.compile(compiler, [folder / source.name for source in sources])
            replaced = {made.name for made in emulated}
            native = [made for made in self.workshop.core(compiler) if made.name not in replaced]
            self.cores[compiler] = [*native, *emulated]
        return self.cores[compiler]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """One for all tests of this file."""
    return Workshop(tmp_path_factory.mktemp("c"))


@pytest.fixture(scope="module")
def emulation(workshop, tmp_path_factory):
    """One for all tests of this file. clang's programs are ten times as fast as gcc's."""
    need("clang")
    if "avx2" not in workshop.levels("clang"):
        pytest.skip(f"this CPU ({platform.machine()}) lacks avx2, over which AVX-512 is emulated")
    simde = subprocess.run(["clang", "-xc", "-E", "-"], input="#include <simde/x86/avx512.h>", text=True,
                           capture_output=True, check=False)
    if simde.returncode != 0:
        pytest.skip("SIMDe is not installed")
    return Emulation(tmp_path_factory.mktemp("emulated"), workshop)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("compiler", NATIVE)
def test_on_this_cpu(workshop, compiler, name):
    """Every program, by the best level or, those about kernels, by all."""
    need(compiler)
    if name == "allocations" and sys.platform != "linux":
        pytest.skip("this platform's linker cannot wrap functions")
    assert " 0 failures" in workshop.output(compiler, name)


@pytest.mark.parametrize("level", ["avx512_bf16", "avx512_vnni", "avx512", "avx2", "neon_dotprod", "neon", "portable"])
@pytest.mark.parametrize("name", ONE_LEVEL)
def test_on_every_level(workshop, name, level):
    """Whole passes on a level that is perhaps not the best."""
    compiler = first_compiler()
    if level not in workshop.levels(compiler):
        pytest.skip(f"this CPU ({platform.machine()}) lacks {level}")
    assert " 0 failures" in workshop.output(compiler, name, level=level)


def test_unknown_level(workshop):
    """A level that does not exist is refused in words that name those that do."""
    done = subprocess.run(workshop.program(first_compiler(), "forward"), capture_output=True, text=True,
                          env={**os.environ, "MHA_C_CPU": "mmx"}, check=False)
    assert done.returncode == 2
    assert "mmx" in done.stderr and "'portable'" in done.stderr


def test_exp_of_every_float(workshop):
    """1.1e9 of them, which takes some seconds."""
    program = workshop.program(first_compiler(), "exp")
    assert " 0 failures" in execute([*program, "every"])


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "allocations"])
def test_on_aarch64(workshop, name):
    """With NEON, under the emulator. (A static program's allocations are not the core's alone.)"""
    need(CROSS, EMULATOR)
    assert " 0 failures" in workshop.output(CROSS, name)


@pytest.mark.parametrize("name", [*ONE_LEVEL, "softmax", "exp", "norm"])
def test_equal_bits_everywhere(workshop, name):
    """AVX2, AVX-512 and NEON, gcc and clang: one set of results. (The last three compare the levels of a CPU.)"""
    found = {}
    for compiler in [c for c in NATIVE if shutil.which(c)]:
        levels = [level for level in workshop.levels(compiler) if level != "portable"] if name in ONE_LEVEL else [None]
        for level in levels:
            found[compiler, level] = workshop.hashes(compiler, name, level=level)
    if shutil.which(CROSS) and shutil.which(EMULATOR):
        found[CROSS, "neon"] = workshop.hashes(CROSS, name)
    if len(found) < 2:
        pytest.skip(f"nothing to compare: only {list(found)}")
    assert len(set(map(tuple, found.values()))) == 1, found


@pytest.mark.parametrize("name", ["emulated", *(name for name in PROGRAMS if name not in [*ONE_LEVEL, "allocations"])])
def test_emulated_avx512(emulation, name):
    """The emulated instructions, and the kernels that are made of them."""
    assert " 0 failures" in emulation.output("clang", name)


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_emulated_avx512_has_equal_bits(workshop, emulation, name):
    """Whole passes by AVX-512 and by AVX2. (The other programs compare the levels by themselves.) The levels of AVX-512
    differ in narrow products alone."""
    levels = [level for level in emulation.levels("clang") if level.endswith(EMULATED)]
    assert len(levels) == 3
    for level in levels if name == "narrow" else levels[-1:]:
        assert " 0 failures" in emulation.output("clang", name, level=level)
        assert emulation.hashes("clang", name, level=level) == workshop.hashes("clang", name, level="avx2")


@pytest.mark.parametrize("compiler", NATIVE)
def test_threads(workshop, compiler):
    """The pool stands alone: but for the CPUs, its test needs nothing else of the core."""
    need(compiler)
    execute(workshop.program(compiler, "threads"))
