# SPDX-License-Identifier: Apache-2.0
"""How long the kernels of a call take by themselves: the least time that a pass made of them can take.

limits.c makes each kernel call of the pass again and again, in memory that stays near the core, on one thread. What a
real call takes longer is memory that is farther away, copies of rows, the threads, and Python.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import machine
from cases import Case, select
from compiler import NoCompiler, compile_driver
from peak import Peak

_MASKS = ["", "float", "bool"]


class Limits:
    """The driver for one instruction set; NoCompiler where it cannot be compiled."""

    def __init__(self, level: str, folder: Path) -> None:
        wrap = ("-Wl,--wrap=mha_cpu_kernels",)
        self._driver = compile_driver(folder / "limits", "limits", "calls", "stopwatch", flags=wrap)
        self._environment = {**os.environ, "MHA_C_CPU": level}

    def measure(self, case: Case) -> dict[str, float]:
        """Seconds of each kernel in one call of the case, on one thread."""
        widths = case.kdim or case.E, case.vdim or case.E, case.H, case.kv_head_count
        options = case.dtype == "float64", case.causal, case.need_weights, _MASKS.index(case.attn_mask)
        words = [str(int(x)) for x in (case.N, case.L, case.keys, case.E, *widths, *options, *case.live)]
        command: list[str | Path] = [self._driver, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=self._environment)
        seconds: defaultdict[str, float] = defaultdict(float)
        for row in done.stdout.splitlines():
            kernel, _, calls, nanoseconds = row.split("\t")
            seconds[kernel] += int(calls) * float(nanoseconds) * 1e-9
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choose = select(parser)
    cases = choose(parser.parse_args())
    level = machine.describe()["level"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            limits, peak = Limits(level, Path(folder)), Peak(level, Path(folder))
        except NoCompiler as error:
            sys.exit(str(error))
        for case in cases:
            seconds = limits.measure(case)
            total = sum(seconds.values())
            share = case.needed_flops / total / max(peak.measure(1, case.dtype, 0.002) for _ in range(50))
            shares = {kernel: f"{time / total:.1%}" for kernel, time in seconds.items()}
            parts = ", ".join(f"{kernel} {text}" for kernel, text in shares.items() if text != "0.0%")
            print(f"{case.group:<11} {case.name:<36} {total * 1e3:9.4f} ms {share:5.0%} of peak: {parts}", flush=True)


if __name__ == "__main__":
    main()
