# SPDX-License-Identifier: Apache-2.0
"""Compares the working tree with an older commit: the bits of results, machine code, instruction counts, time.

    python tests/tools/gates.py COMMIT [--gates bits code instructions speed] [--quick]

For changes that may not change results or cost time. Both sides are built in build/gates/, by the Python that runs
this.

bits          The hashes that the C tests print and shipping/result_bits.py, on every level of this CPU; the hashes also
              for NEON, under an emulator. All have to be equal.
code          The functions of each object file. Those of the kernels have to be the same instructions, whatever they
              are called and wherever they stand. Functions that differ in other files are only named.
instructions  benchmarks/instructions.py. No call may take more than 1 % more.
speed         The first shape of each class of benchmarks/cases.py, with 1 and with 2 threads, both sides in turns,
              three times over. The median of old time / new time must be 0.99 or more, and no shape may be below 0.97
              all three times. Needs a machine that does nothing else. --quick measures briefly and once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy
from workbench import REPOSITORY, empty_folder  # finds test_c_core and the like, too

from test_hot_loops import compile_flags  # noqa: E402,I001

sys.path.append(str(REPOSITORY / "benchmarks"))

from cases import CASES, Case  # noqa: E402
from peers import OURS  # noqa: E402
from workers import Worker, one_cpu  # noqa: E402

MOST_MORE_INSTRUCTIONS = 0.01
LEAST_MEDIAN, LEAST_OF_A_SHAPE = 0.99, 0.97
REPETITIONS, ROUNDS, SAMPLE_SECONDS = 3, 21, 0.015
QUICK = 1, 3, 0.003  # the same three

# Each side counts with its own programs: names in the core may differ.
HASHES = """
import json, shutil, sys
from pathlib import Path
from test_c_core import CROSS, EMULATOR, ONE_LEVEL, Workshop, first_compiler
workshop, compiler, found = Workshop(Path(sys.argv[1])), first_compiler(), {}
for name in (*ONE_LEVEL, "softmax", "exp"):
    for level in workshop.levels(compiler) if name in ONE_LEVEL else [None]:
        found[f"{name}, {level or 'all levels'}"] = workshop.hashes(compiler, name, level=level)
    if shutil.which(CROSS) and shutil.which(EMULATOR):
        found[f"{name}, neon"] = workshop.hashes(CROSS, name)
print(json.dumps(found))
"""
COUNTS = "import instructions, json; print(json.dumps(instructions.count()))"
LEVELS = "import json; from mha_c import _core; print(json.dumps(_core.config()['cpu_levels']))"


class Side:
    """One of the two: its sources, and a folder for what is made from them."""

    def __init__(self, name: str, sources: Path, folder: Path) -> None:
        self.name, self.sources, self.folder = name, sources, folder
        folder.mkdir(exist_ok=True)
        self._packages: Path | None = None

    def run(self, *command: str | Path, folder: str = ".", **variables: str) -> str:
        """What a command prints that runs in a folder of the sources."""
        done = subprocess.run(list(map(str, command)), cwd=self.sources / folder, env={**os.environ, **variables},
                              capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{self.name}: {' '.join(map(str, command))[:200]} failed\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def python(self, code: str, *arguments: str | Path, folder: str = ".", **variables: str) -> str:
        """What a Python program prints."""
        return self.run(sys.executable, "-c", code, *arguments, folder=folder, **variables)

    @property
    def packages(self) -> Path:
        """A folder to import this side's package from; it is built when it is first asked for."""
        if self._packages is None:
            base = self.folder / "package"
            self.run(sys.executable, "setup.py", "-q", "build", "--build-base", base)
            self._packages = next(base.glob("lib*"))
        return self._packages


# ---- bits ----


def compare_bits(old: Side, new: Side) -> list[str]:
    """Where the two sides give different results."""
    hashes = [json.loads(side.python(HASHES, empty_folder(f"gates/{side.name}/c"), folder="tests"))
              for side in (old, new)]
    program = REPOSITORY / "shipping" / "result_bits.py"
    for level in json.loads(new.python(LEVELS, PYTHONPATH=str(new.packages))):
        for side, found in zip((old, new), hashes, strict=True):
            found[f"result_bits.py, {level}"] = side.run(
                sys.executable, program, PYTHONPATH=str(side.packages), MHA_C_CPU=level)
    wrong = sorted(name for name in hashes[0].keys() | hashes[1].keys() if hashes[0].get(name) != hashes[1].get(name))
    print(f"bits: {len(hashes[1])} sets of results, {len(wrong)} differ")
    return [f"other bits: {name}" for name in wrong]


# ---- code ----

LABEL = re.compile(r"^[0-9a-f]+ <(.+)>:$")
LINE = re.compile(r"^\s*[0-9a-f]+:\s+(.+)$")


def functions_of(made: Path, objdump: str) -> dict[str, str]:
    """The instructions of each function, without addresses; places in other functions and constants by name alone."""
    text = subprocess.run([objdump, "-dr", "--no-show-raw-insn", made], check=True, capture_output=True,
                          text=True).stdout
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    name = ""
    for line in text.splitlines():
        if found := LABEL.match(line):
            name = found[1]
            lines = functions.setdefault(name, [])
        elif (found := LINE.match(line)) and not re.match(r"(?:data16 |cs |\.\w+ )*nop|xchg\s+%ax,%ax", found[1]):
            plain = re.sub(rf"[0-9a-f]+ <{re.escape(name)}(\+0x[0-9a-f]+)?>", r"<here\1>", found[1])
            plain = re.sub(r"[0-9a-f]+ <([^>+]+)(?:\+0x[0-9a-f]+)?>", r"<there>", plain)
            lines.append(re.sub(r"(R_\w+)\s+(\.[\w.]+)?.*", r"\1 \2", plain))
    return {name: "\n".join(lines) for name, lines in functions.items()}


def constants_of(made: Path, objdump: str) -> Counter[str]:
    """The words of an object's constants, in no order."""
    text = subprocess.run([objdump, "-s", made], check=True, capture_output=True, text=True).stdout
    words: Counter[str] = Counter()
    for section in re.split(r"^Contents of section ", text, flags=re.M)[1:]:
        if section.startswith(".rodata"):
            words.update(re.findall(r"\b[0-9a-f]{8}\b", re.sub(r"^ [0-9a-f]+|  .{1,16}$", "", section, flags=re.M)))
    return words


def compile_all(side: Side) -> dict[str, tuple[Path, str]]:
    """Every object of a side: source -> (object, the disassembler for it)."""
    made = {}
    folder = empty_folder(f"gates/{side.name}/objects")
    flags = [*compile_flags(), "-D_GNU_SOURCE", f"-I{numpy.get_include()}", f"-I{sysconfig.get_path('include')}",
             f'-DMHA_C_NUMPY_VERSION="{numpy.__version__}"', "-w"]
    for source in sorted((side.sources / "csrc").rglob("*.c")):
        name = str(source.relative_to(side.sources / "csrc"))
        cross = "aarch64-linux-gnu-" if name == "kernels/neon.c" else ""
        if shutil.which(f"{cross}gcc"):
            path = folder / name.replace("/", "_").replace(".c", ".o")
            side.run(f"{cross}gcc", *flags, "-c", source, "-o", path)
            made[name] = path, f"{cross}objdump"
    return made


def compare_code(old: Side, new: Side) -> list[str]:
    """The kernels whose code differs; prints the other functions that do."""
    wrong = []
    sides = [compile_all(side) for side in (old, new)]
    for kernels in (True, False):
        codes, constants = [], []
        for made in sides:
            chosen = {name: made[name] for name in made if name.startswith("kernels/") == kernels}
            codes.append({f"{name} {function}": code for name, (path, objdump) in chosen.items()
                          for function, code in functions_of(path, objdump).items()})
            constants.append(sum((constants_of(*made) for made in chosen.values()), Counter()))
        counts = [Counter(code.values()) for code in codes]
        gone, come = ([name for name, code in codes[i].items() if counts[i][code] > counts[1 - i][code]]
                      for i in (0, 1))
        what = "kernels" if kernels else "other functions"
        print(f"code: {len(codes[1])} {what}; of the old ones {len(gone)} are no longer there, {len(come)} are new")
        if kernels:
            wrong += [f"old code: {name}" for name in gone] + [f"new code: {name}" for name in come]
            wrong += ["other constants in the kernels"] if constants[0] != constants[1] else []
        else:
            print(*(f"    {name}" for name in sorted({*gone, *come})), sep="\n")
    return wrong


# ---- instructions ----


def compare_instructions(old: Side, new: Side) -> list[str]:
    """The calls that take more instructions than before."""
    before, now = (json.loads(side.python(COUNTS, folder="benchmarks")) for side in (old, new))
    wrong = []
    for name in now:
        change = now[name] / before[name] - 1 if name in before else 0.0
        print(f"instructions: {name:<24}{before.get(name, 0):>13,} -> {now[name]:>13,} {change:+8.2%}")
        wrong += [f"more instructions: {name} {change:+.2%}"] if change > MOST_MORE_INSTRUCTIONS else []
    return wrong


# ---- speed ----


def ratio_of(case: Case, workers: list[Worker], rounds: int, sample: float) -> float:
    """The median of old time / new time, over rounds in which both had a turn."""
    seconds = [worker.prepare(case)[2] for worker in workers]
    ratios = []
    for number in range(rounds):
        times = [0.0, 0.0]
        for side in (0, 1) if number % 2 else (1, 0):
            times[side] = workers[side].measure(max(1, round(sample / seconds[side])), seconds[side])
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def compare_speed(old: Side, new: Side, repetitions: int, rounds: int, sample: float) -> list[str]:
    """The shapes that have become slower."""
    cases = list({case.group: case for case in reversed(CASES)}.values())[::-1]  # the first of each class
    ratios: dict[str, list[float]] = {}
    for _ in range(repetitions):
        for threads in (1, 2):
            with contextlib.ExitStack() as stack:
                if threads == 1:
                    stack.enter_context(one_cpu())
                workers = [stack.enter_context(Worker(OURS, threads, side.packages)) for side in (old, new)]
                for case in cases:
                    ratio = ratio_of(case, workers, rounds, sample)
                    ratios.setdefault(f"{case.name}, {threads} threads", []).append(ratio)
    for name, found in ratios.items():
        print(f"speed: {name:<45}{' '.join(f'{ratio:6.3f}' for ratio in found)}")
    median = statistics.median(statistics.median(found) for found in ratios.values())
    print(f"speed: median of old time / new time {median:.3f}")
    wrong = [f"slower: {name}" for name, found in ratios.items() if max(found) < LEAST_OF_A_SHAPE]
    return wrong + ([f"slower: median {median:.3f}"] if median < LEAST_MEDIAN else [])


def main() -> int:
    """Builds both sides and compares them; exit status 1 if they differ where they may not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("bits", "code", "instructions", "speed")
    parser.add_argument("commit", help="the older side, as git names it")
    parser.add_argument("--gates", nargs="+", choices=names, default=names, metavar="GATE", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="measure times briefly and once")
    options = parser.parse_args()
    folder = empty_folder("gates")
    sources = folder / "sources"
    sources.mkdir()
    archive = subprocess.run(["git", "archive", options.commit], cwd=REPOSITORY, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", sources], input=archive.stdout, check=True)
    old, new = Side("old", sources, folder / "old"), Side("new", REPOSITORY, folder / "new")
    wrong = []
    if "bits" in options.gates:
        wrong += compare_bits(old, new)
    if "code" in options.gates:
        wrong += compare_code(old, new)
    if "instructions" in options.gates:
        wrong += compare_instructions(old, new)
    if "speed" in options.gates:
        wrong += compare_speed(old, new, *(QUICK if options.quick else (REPETITIONS, ROUNDS, SAMPLE_SECONDS)))
    print("\n".join(wrong) if wrong else "all gates passed")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
