# SPDX-License-Identifier: Apache-2.0
"""Which lines and branches of csrc/ the tests run, by gcov; needs gcc and gcovr (`pip install gcovr`).

    python tests/tools/measure_coverage.py [pytest's arguments]

The C tests run on every level of this CPU, then the pytest files that reach the extension. gcovr's two tables, of
lines and of branches, name those that nothing ran. The exit status is 1 below 95 % of either, or if a test fails.

Everything is compiled without optimisation, so that every branch of the source is there to be taken, but the kernels:
their functions are copied for constant numbers of rows and vectors, and only -O1 removes what a constant decides.
"""

import subprocess
import sys

from workbench import NOT_ABOUT_C, REPOSITORY, TESTS, Workbench, empty_folder  # finds test_c_core, too

from test_c_core import ONE_LEVEL, PROGRAMS, execute  # noqa: E402,I001

LEAST = 95  # per cent
FLAGS = ["--coverage", "-fprofile-update=atomic", "-O0"]  # without "atomic", counts of several threads get lost

# CPython's macros bring branches of their own: "is it NULL?", "did the visitor fail?".
MACROS = r"\s*(Py_VISIT|Py_CLEAR)\("


def levels(bench):
    """The levels that this CPU can run."""
    return execute([bench.link_program("forward"), "levels"]).split()


def run_c_tests(bench):
    """Every program, and the whole forward pass on every level."""
    for name in [*PROGRAMS, "threads"]:
        program = bench.link_program(name)
        for level in levels(bench) if name in ONE_LEVEL else [None]:
            execute([program], level=level, timeout=900)
            print(f"C test {name}, level {level or 'as it likes'}: done", flush=True)


def report(folder, absent):
    """gcovr's tables; whether enough was run."""
    for name in absent:
        for file in (folder / "objects").glob(f"kernels_{name}.gc*"):
            file.unlink()
    command = [sys.executable, "-m", "gcovr", "--root", REPOSITORY, "--filter", "csrc/", "--merge-lines",
               "--merge-mode-functions=separate", "--exclude-branches-by-pattern", MACROS, "--txt-metric", "line",
               "--txt-metric", "branch", "--txt", "-", "--fail-under-line", LEAST, "--fail-under-branch", LEAST,
               "--json", folder / "coverage.json", "--json-pretty", "--object-directory", folder, folder]
    return subprocess.run([str(part) for part in command], check=False, cwd=REPOSITORY).returncode == 0


def main():
    """Builds, runs, reports."""
    folder = empty_folder("coverage")
    bench = Workbench(folder, REPOSITORY / "csrc", FLAGS)
    for file in sorted((bench.source / "kernels").glob("*.c")):
        bench.compile(file, ["-O1"])
    run_c_tests(bench)
    bench.link_extension()
    files = sys.argv[1:] or sorted(file.name for file in TESTS.glob("test_*.py") if file.name not in NOT_ABOUT_C)
    command, environment = bench.pytest("-q", *files)
    passed = subprocess.run(command, cwd=TESTS, env=environment, check=False).returncode == 0
    enough = report(folder, {"avx512", "avx2", "neon"} - set(levels(bench)))
    return not (passed and enough)


if __name__ == "__main__":
    sys.exit(main())
