# SPDX-License-Identifier: Apache-2.0
"""Feeds invented bytes to the C core (libFuzzer) or to the Python side (Atheris), from the corpus in tests/fuzz/corpus.

    python tests/tools/fuzz.py core|arguments|state_dicts|files [--seconds N]

What is found on the way to new code is kept in build/fuzz/TARGET; an input that fails in build/fuzz/TARGET-failed-*.
Seconds in which the machine did something else do not count.
`core` needs clang with its libclang-rt; the others need Atheris, and torch for files that torch wrote.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from sanitize import give_up, need_runtime

TESTS = Path(__file__).parent.parent
REPOSITORY = TESTS.parent
SCRATCH = REPOSITORY / "build" / "fuzz"
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-ffp-contract=off", "-pthread",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
TARGETS = ("core", "arguments", "state_dicts", "files")
LENGTHS = {"core": ("-max_len=256", "-len_control=0")}  # no call takes more choices
MOST_SECONDS = 600  # that one input may take, on a machine that may be busy
MOST_MEGABYTES = 2048


def build_core():
    """The C core and its fuzzer as one program."""
    need_runtime("clang", ["-fsanitize=fuzzer-no-link,address,undefined"])
    program = SCRATCH / "fuzz_core"
    sources = [*(REPOSITORY / "csrc").glob("*.c"), *(REPOSITORY / "csrc" / "kernels").glob("*.c")]
    objects = []
    for source in sources:
        objects.append(SCRATCH / f"{source.parent.name}_{source.stem}.o")
        subprocess.run(["clang", *FLAGS, "-fsanitize=fuzzer-no-link", "-c", source, "-o", objects[-1]], check=True)
    subprocess.run(["clang", *FLAGS, "-fsanitize=fuzzer", f"-I{REPOSITORY / 'csrc'}", f"-I{TESTS / 'c'}",
                    TESTS / "fuzz" / "fuzz_core.c", *objects, "-o", program, "-lm"], check=True)
    return [program]


def processor_seconds():
    """What the processes that have ended have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(command, seconds):
    """One round of a fuzzer: its exit status, how many inputs it has executed, and how long it really ran."""
    before, begin, executed = processor_seconds(), time.monotonic(), 0
    with subprocess.Popen([*command, f"-max_total_time={seconds:.0f}"], stderr=subprocess.PIPE, text=True,
                          errors="replace", cwd=SCRATCH,
                          env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}) as fuzzer:
        for line in fuzzer.stderr:
            sys.stderr.write(line)
            executed = max(executed, *map(int, re.findall(r"number_of_executed_units: (\d+)", line)), 0)
    return fuzzer.returncode, executed, min(processor_seconds() - before, time.monotonic() - begin)


def main():
    """Builds and runs one fuzzer, again until its time is used up; its exit status is libFuzzer's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    options = parser.parse_args()
    found = SCRATCH / options.target
    found.mkdir(parents=True, exist_ok=True)
    if options.target != "core" and find_spec("atheris") is None:
        give_up("Atheris is not installed")
    command = build_core() if options.target == "core" else [
        sys.executable, TESTS / "fuzz" / "fuzz_python.py", options.target]
    # libFuzzer's own exit status for what it finds is 77, which here means that a tool is missing.
    command += ["-error_exitcode=1", f"-timeout={MOST_SECONDS}", f"-rss_limit_mb={MOST_MEGABYTES}",
                f"-artifact_prefix={SCRATCH / options.target}-failed-", "-print_final_stats=1",
                *LENGTHS.get(options.target, ()), found, TESTS / "fuzz" / "corpus" / options.target]
    status, executed, spent = 0, 0, 0.0
    while status == 0 and options.seconds - spent >= 1:
        status, more, seconds = run(command, options.seconds - spent)
        executed, spent = executed + more, spent + seconds
    print(f"{options.target}: {executed} inputs in {spent:.0f} s of the processor, exit status {status}")
    return status


if __name__ == "__main__":
    sys.exit(main())
