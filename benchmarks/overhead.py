# SPDX-License-Identifier: Apache-2.0
"""Times tiny calls of mha_c, where what matters is everything but the arithmetic: minimum and median, in ns."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import machine
import mha_c

SHAPES = ((5, 3, 8, 4), (16, 1, 64, 4))  # L, N, E, H
CALLS = 200  # a sample; the clock is read before and after it


def sample(call: Callable[[], Any]) -> float:
    """Nanoseconds a call."""
    start = time.perf_counter_ns()
    for _ in itertools.repeat(None, CALLS):
        call()
    return (time.perf_counter_ns() - start) / CALLS


def calls(shape: tuple[int, int, int, int], need_weights: bool) -> dict[str, Callable[[], Any]]:
    """The layer as users call it; the same into an array that exists; and the smallest thing Python could call."""
    length, batch, features, heads = shape
    layer = mha_c.MultiheadAttention(features, heads, seed=0).eval()
    x = np.random.default_rng(0).standard_normal((length, batch, features), dtype=np.float32)
    out = np.empty_like(x)
    return {
        "call": lambda: layer(x, x, x, need_weights=need_weights),
        "call with out=": lambda: layer(x, x, x, need_weights=need_weights, out=out),
        "empty Python call": lambda: None,
    }


def measure(samples: int) -> list[dict[str, Any]]:
    records = []
    for shape, need_weights in itertools.product(SHAPES, (False, True)):
        for what, call in calls(shape, need_weights).items():
            sample(call)
            times = [sample(call) for _ in range(samples)]
            records.append(
                {
                    "shape": shape,
                    "need_weights": need_weights,
                    "what": what,
                    "minimum": min(times),
                    "median": statistics.median(times),
                }
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures to this JSON file, too")
    options = parser.parse_args()
    records = measure(100 if options.quick else 2000)
    for r in records:
        name = f"L,N,E,H = {','.join(map(str, r['shape'])):<11} need_weights={r['need_weights']!s:<6} {r['what']:<18}"
        print(f"{name}{r['minimum']:>8.0f} ns at least, {r['median']:>8.0f} ns median")
    if options.output:
        options.output.write_text(json.dumps({"machine": machine.describe(), "calls": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
