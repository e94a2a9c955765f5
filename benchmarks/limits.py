# SPDX-License-Identifier: Apache-2.0
"""How long the kernels of a call take by themselves, the least time that a pass made of them can take, and within it.

limits.c makes each kernel call of the pass again and again, in memory that stays near the core, on one thread. Within
the pass the same calls take longer, since their memory is farther away; beside a look at the clock those of a tiny pass
are too short to tell. What a real call takes beyond that is copies of rows, the threads, and Python.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import machine
from cases import CASES, Case, select
from compiler import NoCompiler, compile_driver
from peak import Peak

_MASKS = ["", "float", "bool"]


class Seconds(NamedTuple):
    """What all calls of a kernel take, made again and again by themselves, and in the pass."""

    alone: float
    in_pass: float


class Limits:
    """The driver for one instruction set; NoCompiler where it cannot be compiled."""

    def __init__(self, level: str, folder: Path) -> None:
        wrap = ("-Wl,--wrap=mha_cpu_kernels",)
        self._driver = compile_driver(folder / "limits", "limits", "calls", "stopwatch", flags=wrap)
        self._environment = {**os.environ, "MHA_C_CPU": level}

    def measure(self, case: Case) -> dict[str, Seconds]:
        """Each kernel in one call of the case, on one thread, the longest first."""
        widths = case.kdim or case.E, case.vdim or case.E, case.H, case.kv_head_count
        options = case.dtype == "float64", case.causal, case.need_weights, _MASKS.index(case.attn_mask)
        words = [str(int(x)) for x in (case.N, case.L, case.keys, case.E, *widths, *options, *case.live)]
        command: list[str | Path] = [self._driver, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=self._environment)
        kernels: defaultdict[str, Seconds] = defaultdict(lambda: Seconds(0, 0))
        for row in done.stdout.splitlines():
            kernel, _, calls, *nanoseconds = row.split("\t")
            alone, in_pass = (int(calls) * float(x) * 1e-9 for x in nanoseconds)
            kernels[kernel] = Seconds(kernels[kernel].alone + alone, kernels[kernel].in_pass + in_pass)
        return dict(sorted(kernels.items(), key=lambda item: -item[1].alone))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    wide = [case for case in CASES if case.dtype in ("float32", "float64") and not case.matmul_precision]
    choose = select(parser, wide)  # limits.c has no other numbers
    cases = choose(parser.parse_args())
    level = machine.describe()["level"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            limits, peak = Limits(level, Path(folder)), Peak(level, Path(folder))
        except NoCompiler as error:
            sys.exit(str(error))
        for case in cases:
            kernels = limits.measure(case)
            alone, in_pass = (sum(seconds) for seconds in zip(*kernels.values(), strict=True))
            share = case.needed_flops / alone / max(peak.measure_mixed(1, case.operations, 0.002) for _ in range(50))
            shares = {kernel: f"{seconds.alone / alone:.1%}" for kernel, seconds in kernels.items()}
            parts = ", ".join(f"{kernel} {text}" for kernel, text in shares.items() if text != "0.0%")
            times = f"{alone * 1e3:9.4f} ms alone, {in_pass * 1e3:9.4f} in the pass"
            print(f"{case.group:<11} {case.name:<36} {times}, {share:4.0%} of peak: {parts}", flush=True)


if __name__ == "__main__":
    main()
