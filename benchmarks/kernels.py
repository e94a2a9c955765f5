# SPDX-License-Identifier: Apache-2.0
"""Times our own kernels one by one, on one thread, beside the peak of their instruction set."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from compiler import NoCompiler, compile_driver
from peak import Peak


def measure(folder: Path) -> list[dict[str, Any]]:
    """A record of each kernel; `flops` is 0 for those that do not multiply and add."""
    driver = compile_driver(folder / "kernels", "kernels", "calls", "stopwatch")
    records: list[dict[str, Any]] = []
    peaks: dict[tuple[str, str], list[float]] = {}
    printed = subprocess.run([driver], stdout=subprocess.PIPE, text=True, check=True).stdout
    for row in printed.splitlines():
        level, multiplied, kernel, what, nanoseconds, flops, numbers = row.split("\t")
        records.append(
            {
                "level": level,
                "multiplied": multiplied,
                "kernel": kernel,
                "what": what,
                "nanoseconds": float(nanoseconds),
                "flops": float(flops),
                "numbers": float(numbers),
            }
        )
    for level, multiplied in dict.fromkeys((record["level"], record["multiplied"]) for record in records):
        peak = Peak(level, folder)
        peaks[level, multiplied] = [peak.measure(1, multiplied, 0.002) for _ in range(100)]
    for record in records:
        record["peak"] = max(peaks[record["level"], record["multiplied"]])  # a kernel's time is its best, too
    return records


def line(record: dict[str, Any]) -> str:
    name = f"{record['level']:<12}{record['multiplied']:<9}{record['kernel']:<13}{record['what']:<46}"
    if record["flops"]:
        rate = record["flops"] / record["nanoseconds"]
        return f"{name}{record['nanoseconds']:>9.0f} ns {rate:7.1f} GFLOP/s {rate * 1e9 / record['peak']:5.0%} of peak"
    return f"{name}{record['nanoseconds']:>9.0f} ns {record['nanoseconds'] / record['numbers']:7.3f} ns a number"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures to this JSON file, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            records = measure(Path(folder))
        except NoCompiler as error:
            sys.exit(str(error))
    print(*map(line, records), sep="\n")
    for (level, multiplied), peak in {(r["level"], r["multiplied"]): r["peak"] for r in records}.items():
        print(f"Peak of {level}, {multiplied}: {peak / 1e9:.1f} GFLOP/s")
    if options.output:
        options.output.write_text(json.dumps({"machine": machine.describe(), "kernels": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
