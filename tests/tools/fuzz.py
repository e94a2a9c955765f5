# SPDX-License-Identifier: Apache-2.0
"""Feeds invented bytes to the C core (libFuzzer) or to the Python side (Atheris), from the corpus in tests/fuzz/corpus.

    python tests/tools/fuzz.py core|arguments|state_dicts|files [--seconds N]

What is found on the way to new code is kept in build/fuzz/TARGET; an input that fails in build/fuzz/TARGET-failed-*.
`core` needs clang with its libclang-rt; the others need Atheris, and torch for files that torch wrote.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
    if shutil.which("clang") is None:
        sys.exit("not fuzzed: clang is not installed")
    program = SCRATCH / "fuzz_core"
    sources = [*(REPOSITORY / "csrc").glob("*.c"), *(REPOSITORY / "csrc" / "kernels").glob("*.c")]
    objects = []
    for source in sources:
        objects.append(SCRATCH / f"{source.parent.name}_{source.stem}.o")
        subprocess.run(["clang", *FLAGS, "-fsanitize=fuzzer-no-link", "-c", source, "-o", objects[-1]], check=True)
    subprocess.run(["clang", *FLAGS, "-fsanitize=fuzzer", f"-I{REPOSITORY / 'csrc'}", f"-I{TESTS / 'c'}",
                    TESTS / "fuzz" / "fuzz_core.c", *objects, "-o", program, "-lm"], check=True)
    return [program]


def main():
    """Builds and runs one fuzzer; its exit status is libFuzzer's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    options = parser.parse_args()
    found = SCRATCH / options.target
    found.mkdir(parents=True, exist_ok=True)
    command = build_core() if options.target == "core" else [
        sys.executable, TESTS / "fuzz" / "fuzz_python.py", options.target]
    corpus = [found, *(folder for folder in [TESTS / "fuzz" / "corpus" / options.target] if folder.is_dir())]
    limits = [f"-max_total_time={options.seconds}", f"-timeout={MOST_SECONDS}", f"-rss_limit_mb={MOST_MEGABYTES}",
              f"-artifact_prefix={SCRATCH / options.target}-failed-", "-print_final_stats=1", *LENGTHS.get(options.target, ())]
    return subprocess.run([*command, *limits, *corpus], check=False, cwd=SCRATCH,
                          env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
