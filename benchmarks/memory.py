# SPDX-License-Identifier: Apache-2.0
"""How much memory one call of mha_c takes, and whether many calls take more and more.

The first is the growth of the process's peak resident memory over one call, in a process of its own, with inputs and
output made and touched beforehand. Beside it stands the bound: projected queries, keys, values and the context, in rows
of an odd number of cache lines, plus half a MiB a thread for heads of up to 256 features. Needs Linux's /proc.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mha_c
from cases import Case
from peers.ours import layer
from problem import make

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
KIB = 1024
CACHE_LINE = 64
PER_THREAD = 512 * KIB
PARTS = 10  # of the long run, each of which reports
NOISE = 256 * KIB  # what an allocator may take between two readings without leaking

CASES = [
    Case("", 1, 512, 768, 12),
    Case("", 8, 128, 768, 12),
    Case("", 1, 2048, 512, 8),
    Case("", 1, 4096, 1024, 16),
    Case("", 64, 512, 64, 2),
    Case("", 64, 128, 768, 12),
    Case("", 1, 512, 256, 1),
    Case("", 1, 384, 2048, 32),
    Case("", 1, 2048, 512, 8, causal=True),
    Case("", 4, 512, 768, 12, live=(512, 390, 211, 97)),
    Case("", 2, 512, 512, 8, attn_mask="bool"),
    Case("", 1, 1, 1024, 16, S=2048),
    Case("", 8, 128, 512, 8, need_weights=True),
    Case("", 1, 512, 1024, 16, kv_heads=4),
    Case("", 4, 128, 512, 8, dtype="float64"),
]


@dataclass(frozen=True)
class Usage:
    """Bytes of one call."""

    grown: int  # by how much the peak grew
    bound: int  # what is allowed

    @property
    def kept(self) -> bool:
        return self.grown <= self.bound


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (at most, since it was last reset) of this process in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * KIB


def bound(case: Case, threads: int) -> int:
    """Projected Q, K, V and context of every position, plus half a MiB a thread; weights are an output."""
    query_row = row_bytes(case.E, case.dtype)
    key_row = row_bytes(case.kv_head_count * case.head_dim, case.dtype)
    return 2 * case.N * (case.L * query_row + case.keys * key_row) + threads * PER_THREAD


def row_bytes(features: int, dtype: str) -> int:
    """A projected row: rows of an even number of cache lines could all meet in one set of a cache."""
    lines = -(-features * np.dtype(dtype).itemsize // CACHE_LINE)
    return (lines + (lines % 2 == 0)) * CACHE_LINE


def usage(case: Case, threads: int) -> Usage:
    """Of one call, to be asked of a fresh process."""
    mha_c.set_num_threads(threads)
    problem = make(case)
    attend = layer(problem)
    x = np.zeros((1, 64, 64), dtype=np.float32)
    warm = mha_c.MultiheadAttention(64, 4, batch_first=True).eval()
    for _ in range(3):  # code pages
        warm(x, x, x)
    out = np.zeros((case.N, case.L, case.E), dtype=case.dtype) + 1
    CLEAR.write_text("5")  # the peak starts again at what is resident now
    before = resident("VmHWM")
    weights = attend(
        problem.query,
        problem.key,
        problem.value,
        problem.padding,
        case.need_weights,
        problem.attn_mask,
        is_causal=case.causal,
        out=out,
    )[1]
    grown = resident("VmHWM") - before - (0 if weights is None else weights.nbytes)
    return Usage(grown, bound(case, threads))


def growth(calls: int) -> list[int]:
    """Resident bytes after each tenth of that many calls of different kinds."""
    kinds = [
        Case("", 3, 5, 8, 4),
        Case("", 3, 5, 8, 4, need_weights=True),
        Case("", 2, 7, 16, 2, live=(7, 3)),
        Case("", 1, 9, 16, 2, attn_mask="float", causal=True),
    ]
    problems = [(problem, layer(problem)) for problem in map(make, kinds)]
    readings = []
    for _ in range(PARTS):
        for i in range(calls // PARTS):
            problem, attend = problems[i % len(problems)]
            case = problem.case
            masks = problem.padding, case.need_weights, problem.attn_mask
            attend(problem.query, problem.key, problem.value, *masks, is_causal=case.causal)
        readings.append(resident("VmRSS"))
    return readings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a hundred thousand calls instead of a million")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N")
    options = parser.parse_args()
    if not CLEAR.exists():
        sys.exit("This system has no /proc/self/clear_refs, so that a call's memory cannot be told apart.")
    kept = True
    # glibc: what is freed before the call goes back to the system, so that the call cannot take it unseen.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(16 * KIB)
    spawn = multiprocessing.get_context("spawn")
    for threads in options.threads:
        for case in CASES:
            with spawn.Pool(1) as pool:
                used = pool.apply(usage, (case, threads))
            kept &= used.kept
            print(
                f"{threads} thr  {case.name:<36} {used.grown / KIB**2:7.2f} MiB of {used.bound / KIB**2:7.2f} allowed"
                f"{'' if used.kept else ': TOO MUCH'}"
            )
    calls = 100_000 if options.quick else 1_000_000
    readings = growth(calls)
    grown = readings[-1] - readings[0]
    kept &= grown <= NOISE
    print(f"{calls} calls, resident MiB on the way: {' '.join(f'{r / KIB**2:.2f}' for r in readings)}")
    print("Memory is flat." if grown <= NOISE else f"Memory GREW by {grown} bytes.")
    if not kept:
        sys.exit(1)


if __name__ == "__main__":
    main()
