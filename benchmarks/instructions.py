# SPDX-License-Identifier: Apache-2.0
"""Counts the instructions of a dozen forward passes and compares them with instructions.json.

Counts do not depend on what else the machine does, so that a small regression shows that no clock would. They depend
on the compiler: with another one than the file's they are printed, but not judged. valgrind does the counting. It
knows no AVX-512, and so the passes run with AVX2, on one thread; what is counted is mha_forward() alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compiler import HERE, NoCompiler, compile_driver, compiler_version

EXPECTED = HERE / "instructions.json"
TOLERANCE = 0.02


def why_not() -> str | None:
    """Why instructions cannot be counted here; None where they can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the counts are those of AVX2"
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or not re.search(r"^flags\b.*\bavx2\b", cpuinfo.read_text(), re.MULTILINE):
        return "this CPU has no AVX2"
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    return None


def count() -> dict[str, int]:
    """Instructions of each call of instructions.c; NoCompiler where it cannot be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        driver = compile_driver(Path(folder) / "driver", "instructions", "calls")
        names = subprocess.run([driver], capture_output=True, text=True, check=True).stdout.splitlines()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            counts = list(pool.map(lambda name: _count_one(driver, name), names))
    return dict(zip(names, counts, strict=True))


def _count_one(driver: Path, name: str) -> int:
    profile = driver.parent / f"{name}.callgrind"
    command = ["valgrind", "--tool=callgrind", "--toggle-collect=mha_forward", f"--callgrind-out-file={profile}"]
    # The pass is the first of its process: functions that it calls are to be found before it, not within it.
    environment = {**os.environ, "MHA_C_CPU": "avx2", "LD_BIND_NOW": "1"}
    done = subprocess.run([*command, str(driver), name], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"valgrind failed on {name!r}:\n{done.stderr}")
    summary = re.search(r"^(?:summary|totals): (\d+)$", profile.read_text(), re.MULTILINE)
    if summary is None or summary[1] == "0":
        raise RuntimeError(f"callgrind saw no mha_forward in {name!r}")
    return int(summary[1])


def compare(counts: dict[str, int], expected: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(a line for each call, the regressions among them). A call that got quicker is no regression, but is pointed
    out; so is one that only one side knows."""
    lines, worse = [], []
    known = expected["instructions"]
    for name, now in counts.items():
        if name not in known:
            worse.append(f"{name}: not in {EXPECTED.name}")
            continue
        change = now / known[name] - 1
        text = f"{name:<24}{known[name]:>13,} -> {now:>13,} {change:+8.2%}"
        lines.append(text + (", so update the file" if change < -TOLERANCE else ""))
        if change > TOLERANCE:
            worse.append(text)
    worse += [f"{name}: no longer measured" for name in known if name not in counts]
    return lines, worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write the counts to {EXPECTED.name}")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(f"Instructions cannot be counted: {reason}.")
    try:
        counts, compiler = count(), compiler_version()
    except NoCompiler as error:
        sys.exit(str(error))
    if options.update:
        EXPECTED.write_text(json.dumps({"compiler": compiler, "instructions": counts}, indent=2) + "\n")
    expected = json.loads(EXPECTED.read_text())
    lines, worse = compare(counts, expected)
    print(*lines, sep="\n")
    if worse:
        print(f"\nMore than {TOLERANCE:.0%} worse, or unknown:", *worse, sep="\n")
    if compiler != expected["compiler"]:
        print(f"\nNot judged: the file was made with {expected['compiler']}, this is {compiler}.")
    elif worse:
        sys.exit(1)


if __name__ == "__main__":
    main()
