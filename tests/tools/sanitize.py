# SPDX-License-Identifier: Apache-2.0
"""The C tests and the pytest suite under sanitizers; the C tests under valgrind; the sources under two analysers.

    python tests/tools/sanitize.py asan|ubsan|tsan|memcheck|analyze [--quick] [pytest's arguments]

Each check builds what it needs in a folder of its own, below build/sanitize/, with the Python that runs this, whose
NumPy and pytest it uses; nothing is installed. torch is hidden, so that tests that need it skip themselves: ten million
instructions of somebody else's would take most of the time. --quick takes a part of the suite, for CI.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from xml.etree import ElementTree

import numpy
from workbench import NOT_ABOUT_C, REPOSITORY, TESTS, empty_folder  # finds test_c_core, too

from test_c_core import FLAGS, PROGRAMS, Workshop, execute  # noqa: E402,I001

QUICK = ["test_inputs.py", "test_masks.py", "test_ownership.py"]

# Unsigned numbers wrap around on purpose where hashes, random numbers and strides of empty arrays are made.
UBSAN = ["-fsanitize=undefined,implicit-conversion,unsigned-shift-base,local-bounds,nullability",
         "-fno-sanitize-recover=all"]
# gcc before 12.4 and 13.3 misaligns vectors of 64 bytes on the stack that tells uses after a return (its bug 110027).
CPUINFO = Path("/proc/cpuinfo")
HAS_AVX512 = CPUINFO.exists() and "avx512f" in CPUINFO.read_text()
FLAVOURS = {
    # With Python's own pools, reads beyond its objects would go unseen.
    "asan": ("gcc", ["-fsanitize=address", "-O1", "-g1", "-fno-omit-frame-pointer"], "libasan.so",
             {"ASAN_OPTIONS": "allocator_may_return_null=1:strict_string_checks=1:"
                              f"detect_stack_use_after_return={int(not HAS_AVX512)}",
              "PYTHONMALLOC": "malloc"}),
    "ubsan": ("clang", [*UBSAN, "-O1", "-g1"], "libclang_rt.ubsan_standalone-x86_64.so",
              {"UBSAN_OPTIONS": "print_stacktrace=1"}),
    "tsan": ("gcc", ["-fsanitize=thread", "-O1", "-g1"], "libtsan.so",
             {"TSAN_OPTIONS": "allocator_may_return_null=1:die_after_fork=0:halt_on_error=1:abort_on_error=1:"
                              "second_deadlock_stack=1",
              "OPENBLAS_NUM_THREADS": "1"}),  # whose threads' signals to each other it does not see
}

# Examples in docstrings import torch. The demo and an example find the torch that is hidden. Sanitizers keep freed memory
# from being used again, so processes grow; ASan and TSan use memory of their own, want terabytes of addresses, and want
# to come before the allocator of the tests. One test is about a race. TSan gives
# up ("dup thread with used id") in children of a process with threads that start threads at the same addresses, and
# does not see how the threads of tokenizers signal each other.
UNFIT = {"ubsan": ["test_ownership.py::test_memory", "test_doctests.py::test_examples",
                   "test_terminal.py::test_no_output[demo]", "test_sentence_similarity.py::test_the_layers_one_by_one"]}
UNFIT["asan"] = [*UNFIT["ubsan"], "test_out_of_memory.py", "test_whole_layers.py::test_workspace"]
UNFIT["tsan"] = [*UNFIT["asan"], "test_threads.py::test_numbers_written_during_calls",
                 "test_processes.py::test_shutdown_with_calls_in_flight", "test_sentence_similarity.py"]

# What the analysers say that is not so: analyser, file that was compiled, finding with its path, reason.
ANSWERED = [
    ("gcc", "portable.c", r"simd_portable\.h.*shift by count", "it takes the number of lanes for the width of a lane"),
    ("clang", "few_queries.c", r"Null pointer passed", "scratch is NULL only while a call is planned, not in a task"),
]


def give_up(missing):
    """Ends with 77, which says like a skipped test that nothing was found out."""
    print(f"{Path(sys.argv[0]).stem} {sys.argv[1]}: not checked, since {missing}")
    sys.exit(77)


def need(*tools):
    """Gives up unless these programs are installed."""
    for tool in tools:
        if shutil.which(tool) is None:
            give_up(f"{tool} is not installed")


def need_runtime(compiler, flags):
    """Gives up unless the compiler and its library for these sanitizers are installed."""
    need(compiler)
    if subprocess.run([compiler, *flags, "-xc", "-", "-o", os.devnull], input="int main(void) { return 0; }\n",
                      text=True, capture_output=True, check=False).returncode != 0:
        give_up(f"{compiler} has no library for {flags[0]}")


def run_c_tests(workshop, compiler, programs, prefix=(), variables=None):
    """Every program of tests/c, each preceded by the command `prefix`."""
    for name in programs:
        said = execute([*prefix, *workshop.program(compiler, name)], timeout=3600, variables=variables)
        print(f"C test {name}: {said.splitlines()[-1] if said else 'done'}", flush=True)


def build_package(folder, compiler, flags):
    """The package, with an extension that was compiled with these flags, as a folder to import it from."""
    variables = {"CC": compiler, "LDSHARED": f"{compiler} -shared", "CFLAGS": " ".join(flags),
                 "LDFLAGS": " ".join(flags)}
    execute([sys.executable, "setup.py", "-q", "build", "--build-base", folder / "package"], timeout=600,
            variables=variables)
    return next((folder / "package").glob("lib*"))


def hide_torch(folder):
    """A folder whose torch says that it is not there."""
    (folder / "without" / "torch").mkdir(parents=True)
    (folder / "without" / "torch" / "__init__.py").write_text('raise ModuleNotFoundError("hidden", name="torch")\n')
    return folder / "without"


def find_errors(reports):
    """What sanitizers reported, leaks only where they lead to us: Python itself leaves much behind when it ends."""
    text = "\n".join(report.read_text(errors="replace") for report in reports)
    first = "ERROR: AddressSanitizer|AddressSanitizer: CHECK failed|WARNING: ThreadSanitizer|runtime error:"
    errors = re.findall(rf"^.*(?:{first}).*(?:\n.+)*", text, re.M)
    leaks = [block for block in text.split("\n\n") if "leak of" in block and re.search(r"/csrc/|_core\.", block)]
    return errors + leaks


def count_tests(results):
    """How many tests passed and how many were skipped; none if pytest did not come to its end."""
    if not results.exists(): # a process that a sanitizer ends has the exit status 0, for the sake of Python's leaks
        return 0, 0
    suite = ElementTree.parse(results).getroot().find("testsuite")
    total, *others = (int(suite.get(name)) for name in ("tests", "skipped", "failures", "errors"))
    return total - sum(others), others[0]


def sanitize(name, quick, arguments):
    """The C tests and the pytest suite with everything compiled for a sanitizer."""
    compiler, flags, library, variables = FLAVOURS[name]
    need_runtime(compiler, flags)
    folder = empty_folder(f"sanitize/{name}")
    run_c_tests(Workshop(folder, flags), compiler, [*PROGRAMS, "threads"], variables=variables)

    package = build_package(folder, compiler, [*flags, *(["-shared-libsan"] if compiler == "clang" else [])])
    # The sanitizer's library must find the C++ library, or exceptions of other packages end the process.
    preload = [execute([compiler, f"-print-file-name={name}"]).strip() for name in (library, "libstdc++.so.6")]
    environment = os.environ | variables | {
        "LD_PRELOAD": " ".join(preload), "PYTHONPATH": os.pathsep.join(map(str, (package, hide_torch(folder)))),
        "LSAN_OPTIONS": f"exitcode=0:log_path={folder}/report"}
    for options in ("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS"): # children's reports must not get lost
        environment[options] = f"{environment.get(options, '')}:log_path={folder}/report"
    probe = [sys.executable, "-c", "import mha_c._core; print(mha_c._core.__file__)"]
    where = subprocess.run(probe, capture_output=True, text=True, check=True, env=environment, cwd=folder).stdout
    assert where.startswith(str(package)), f"tests would import {where}, not what was built here"
    files = QUICK if quick else sorted(file.name for file in TESTS.glob("test_*.py") if file.name not in NOT_ABOUT_C)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider",
               f"--junit-xml={folder}/results.xml", *(f"--deselect=tests/{test}" for test in UNFIT[name]),
               *(arguments or files)]
    status = subprocess.run(command, env=environment, cwd=TESTS, check=False).returncode
    errors = find_errors(folder.glob("report.*"))
    print("\n\n".join(errors))
    passed, not_run = count_tests(folder / "results.xml")
    print(f"{name}: {passed} tests passed, {not_run} skipped, exit status {status}, {len(errors)} errors reported")
    return status != 0 or passed == 0 or len(errors) > 0


def memcheck(quick, arguments):
    """The C tests under valgrind: reads of numbers that nobody wrote, which no sanitizer here sees."""
    need("valgrind", "gcc")
    valgrind = ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full", "--show-leak-kinds=definite,possible",
                "--errors-for-leak-kinds=definite"]
    run_c_tests(Workshop(empty_folder("sanitize/memcheck"), ["-g", "-O1"]), "gcc",
                arguments or [name for name in [*PROGRAMS, "threads"] if not quick or name != "kernels"], valgrind)
    return False


def analyze(quick, arguments):
    """clang's and gcc's analysers over all of csrc; findings that ANSWERED explains are counted, others are errors."""
    need("clang", "gcc")
    sources = [Path(name) for name in arguments] or sorted(
        source for source in (REPOSITORY / "csrc").rglob("*.c")
        if source.parent.name != "kernels" or source.stem == "portable") # the same kernels in other vectors
    flags = [*FLAGS, "-w", f"-I{numpy.get_include()}", f"-I{sysconfig.get_path('include')}",
             '-DMHA_C_NUMPY_VERSION="2"']
    checkers = "core,unix,deadcode,nullability,optin.portability,valist,security.FloatLoopCounter"
    commands = {"clang": ["clang", "--analyze", "-Xclang", "-analyzer-output=text", "-Xclang",
                          f"-analyzer-checker={checkers}", *(flag for flag in flags if flag != "-w"),
                          "-Wno-everything"],
                "gcc": ["gcc", "-fanalyzer", "-O1", *(flag for flag in flags if flag not in ("-w", "-O2"))]}
    folder, unanswered, answered = empty_folder("sanitize/analyze"), [], 0
    for tool, command in commands.items():
        for source in sources:
            done = subprocess.run([*command, "-c", source, "-o", folder / "out"], capture_output=True, text=True,
                                  check=False, cwd=REPOSITORY)
            if done.returncode != 0:
                sys.exit(done.stderr)
            for finding in set(re.findall(r"^.*: warning: .*(?:\n(?!.*: warning: ).*)*", done.stderr, re.M)):
                if any((tool, source.name) == (by, where) and re.search(text, finding, re.S)
                       for by, where, text, _ in ANSWERED):
                    answered += 1
                else:
                    unanswered.append(f"{tool}, {source.name}: {finding}")
    print("\n".join(unanswered))
    print(f"{len(sources)} files: {len(unanswered)} findings, and {answered} that have an answer")
    return len(unanswered) > 0


CHECKS = {**{name: None for name in FLAVOURS}, "memcheck": memcheck, "analyze": analyze}


def main():
    """Runs one check; the exit status says what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=list(CHECKS))
    parser.add_argument("--quick", action="store_true", help="only a part of the suite")
    options, arguments = parser.parse_known_args()
    if options.check in FLAVOURS:
        return sanitize(options.check, options.quick, arguments)
    return CHECKS[options.check](options.quick, arguments)


if __name__ == "__main__":
    sys.exit(main())
