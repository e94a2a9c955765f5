# SPDX-License-Identifier: Apache-2.0
"""Which lines and branches of csrc/ the tests run, by gcov; needs gcc and gcovr (`pip install gcovr`).

    python tests/tools/measure_coverage.py [pytest's arguments]

The C tests run on every level of this CPU, then the pytest files about the extension. gcovr's table of files is
followed by each line that nothing ran and each branch that was never taken. The exit status is 1 below 95 % of lines
or of branches, or if a test fails.

Everything is compiled without optimisation, so that every branch of the source is there to be taken, but the kernels:
their functions are copied for constant numbers of rows and vectors, and only -O1 removes what a constant decides.
Left out are instruction sets that this CPU lacks.

What stays untested, and why: answers of CPUs and systems that are not at hand (cpu.c: no AVX2, registers not saved;
processors.c: quotas of cgroups; threads.c: no key or handler for the pool); a second allocation that fails right after
the first one that did (both tuples of an error's text); conditions that only C can bring about where Python asks (an
index that the interpreter has checked, numbers of threads beyond 1023).
"""

import json
import subprocess
import sys
from itertools import groupby

from workbench import REPOSITORY, TESTS, Workbench, empty_folder  # finds test_c_core, too

from test_c_core import ONE_LEVEL, PROGRAMS, execute  # noqa: E402,I001

LEAST = 95  # per cent
FLAGS = ["--coverage", "-fprofile-update=atomic", "-O0", "-Wl,--wrap=_exit"]  # without "atomic", threads lose counts

# The files that ask the extension directly; the others ask it through these functions, too, but torch at more length.
FILES = [f"test_{name}.py" for name in (
    "dropout", "errors", "explain", "extreme_numbers", "functional", "hostile_arguments", "huge_sizes", "inputs",
    "interrupt", "masks", "module", "out_of_memory", "processes", "reproducibility", "threads")]
UNFIT = "not test_source_tree_without_the_extension"  # the extension stands beside the sources here

# CPython's macros bring branches of their own: "is it NULL?", "did the visitor fail?".
MACROS = r"\s*(Py_VISIT|Py_CLEAR)\("

# A process that leaves by _exit(), as forked children do, takes its counts along.
EXIT_C = """
void __gcov_dump(void);
void __real__exit(int status);
void __wrap__exit(int status);
void __wrap__exit(int status) { __gcov_dump(); __real__exit(status); }
"""
EXIT_PYTHON = """
import os
leave = os._exit
def _exit(status):
    import ctypes, glob
    try:
        library, = glob.glob(os.path.join(os.path.dirname(__file__), "mha_c", "_core*.so"))
        ctypes.CDLL(library, mode=os.RTLD_NOW | os.RTLD_NOLOAD).__wrap__exit(status)
    except OSError:  # not loaded
        leave(status)
os._exit = _exit
"""


def build(folder):
    """Everything in csrc, the kernels optimised, and what keeps the counts of children."""
    bench = Workbench(folder, REPOSITORY / "csrc", FLAGS)
    for file in sorted((bench.source / "kernels").glob("*.c")):
        bench.compile(file, ["-O1"])
    (folder / "exit.c").write_text(EXIT_C)
    subprocess.run(["gcc", "-c", "-fPIC", folder / "exit.c", "-o", bench.objects / "exit.o"], check=True)
    (bench.package / "sitecustomize.py").write_text(EXIT_PYTHON)
    return bench


def levels(bench):
    """The levels that this CPU can run."""
    return execute([bench.link_program("forward"), "levels"]).split()


def run_c_tests(bench):
    """Every program, and the whole passes on every level."""
    for name in [*PROGRAMS, "threads"]:
        program = bench.link_program(name)
        for level in levels(bench) if name in ONE_LEVEL else [None]:
            execute([program], level=level, timeout=900)
            print(f"C test {name}, level {level or 'as it likes'}: done", flush=True)


def show_missing(report):
    """Lines that nothing ran, and those of whose branches some were never taken."""
    for file in json.loads(report.read_text())["files"]:
        source = (REPOSITORY / file["file"]).read_text().splitlines()
        print(f"\n{file['file']}")
        for number, lines in groupby(file["lines"], key=lambda line: line["line_number"]):
            copies = list(lines)  # of a function that is compiled several times
            branches = [branch["count"] for line in copies for branch in line.get("branches", [])
                        if not branch.get("gcovr/excluded")]
            if not any(line["count"] for line in copies):
                print(f"{number:5}  not run          {source[number - 1].strip()}")
            elif 0 in branches:
                print(f"{number:5}  {branches.count(0):3} of {len(branches):3} left  {source[number - 1].strip()}")


def report(folder, absent):
    """gcovr's table, and what is missing; whether enough was run."""
    for name in absent:
        for file in (folder / "objects").glob(f"kernels_{name}.gc*"):
            file.unlink()
    command = [sys.executable, "-m", "gcovr", "--root", REPOSITORY, "--filter", "csrc/", "--merge-lines",
               "--merge-mode-functions=separate", "--gcov-suspicious-hits-threshold=0",
               "--exclude-branches-by-pattern", MACROS, "--txt-metric", "line", "--txt-metric", "branch", "--txt", "-",
               "--fail-under-line", LEAST, "--fail-under-branch", LEAST,
               "--json", folder / "coverage.json", "--object-directory", folder, folder]
    enough = subprocess.run([str(part) for part in command], check=False, cwd=REPOSITORY).returncode == 0
    show_missing(folder / "coverage.json")
    return enough


def main():
    """Builds, runs, reports."""
    folder = empty_folder("coverage")
    bench = build(folder)
    run_c_tests(bench)
    bench.link_extension()
    command, environment = bench.pytest("-q", "-k", UNFIT, *(sys.argv[1:] or FILES))
    passed = subprocess.run(command, cwd=TESTS, env=environment, check=False).returncode == 0
    absent = {"avx512", "avx512_vnni", "avx512_bf16", "avx2", "neon", "neon_dotprod"} - set(levels(bench))
    return not (report(folder, absent) and passed)


if __name__ == "__main__":
    sys.exit(main())
