# SPDX-License-Identifier: Apache-2.0
"""Times the thread pool: waking, idling, sharing with other threads, and with other libraries whose threads are awake.

Every figure is a median, beside the same call under the best circumstances, and taken in turns with it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import mha_c
import peers
from cases import Case
from peers.ours import layer
from problem import make

MIDDLE = Case("", 1, 64, 256, 8)  # worth a second thread, and short enough for waking to show
LARGE = Case("", 4, 128, 512, 8)
PAUSE = 0.005  # s, long after which every thread sleeps


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def calling(case: Case, threads: int) -> Callable[[], Any]:
    """A call of the layer with so many threads, without anything before or after it."""
    problem = make(case)
    module = layer(problem)

    def call() -> None:
        with mha_c.num_threads(threads):
            module(problem.query, problem.key, problem.value, need_weights=False)

    for _ in range(20):
        call()
    return call


def in_turns(samples: int, **calls: Callable[[], float]) -> dict[str, float]:
    """Medians of what the calls return, in microseconds."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            taken[name].append(call())
    return {name: statistics.median(values) * 1e6 for name, values in taken.items()}


def waking(samples: int) -> dict[str, float]:
    """A call right after another one, and one after a pause in which the workers fell asleep."""
    call, alone = calling(MIDDLE, 2), calling(MIDDLE, 1)

    def warm() -> float:
        call()
        return seconds(call)

    def after_pause(measured: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            time.sleep(PAUSE)
            return seconds(measured)

        return run

    return in_turns(samples, warm=warm, after_a_pause=after_pause(call), one_thread_after_a_pause=after_pause(alone))


def idling() -> dict[str, float]:
    """Processor time of the whole process in a second after a call; in microseconds."""
    call = calling(LARGE, 2)
    call()
    start = time.process_time()
    time.sleep(1)
    return {"cpu_time_in_an_idle_second": (time.process_time() - start) * 1e6}


def callers(samples: int, count: int) -> dict[str, float]:
    """Time for each call: one Python thread, and `count` of them at once, on two threads of the pool."""
    call = calling(LARGE, 2)

    def at_once() -> float:
        threads = [threading.Thread(target=call) for _ in range(count)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (time.perf_counter() - start) / count

    return in_turns(samples, alone=lambda: seconds(call), **{f"{count}_at_once": at_once})


def too_many(samples: int) -> dict[str, float]:
    """As many threads as usable CPUs, and eight times as many."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    few, many = calling(LARGE, cpus), calling(LARGE, 8 * cpus)
    return in_turns(samples, as_many_as_cpus=lambda: seconds(few), eight_times_as_many=lambda: seconds(many))


def beside(samples: int, candidate: peers.Candidate) -> dict[str, float]:
    """A call of ours right after one of another library, whose threads then still watch for work."""
    call = calling(LARGE, 2)
    peer = candidate.create(2)
    other = peer.prepare(LARGE)

    def after_other() -> float:
        other.call()
        return seconds(call)

    def after_pause() -> float:
        time.sleep(PAUSE * 10)
        call()
        return seconds(call)

    return in_turns(samples, alone=after_pause, right_after_the_other=after_other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures to this JSON file, too")
    options = parser.parse_args()
    measured: dict[str, dict[str, float]] = {
        "waking": waking(options.samples),
        "idling": idling(),
        "2 callers": callers(options.samples, 2),
        "4 callers": callers(options.samples, 4),
        "too many threads": too_many(options.samples),
    }
    for candidate in peers.LAYERS:
        if candidate.name in ("torch", "ORT MultiHeadAttention", "OpenVINO SDPA"):
            try:
                measured[f"beside {candidate.name}"] = beside(options.samples, candidate)
            except ImportError as error:
                print(f"{candidate.name} is left out: {error}")
    for what, figures in measured.items():
        print(f"{what:<32}", ", ".join(f"{name.replace('_', ' ')} {value:.0f} us" for name, value in figures.items()))
    if options.output:
        options.output.write_text(json.dumps({"machine": machine.describe(), "pool": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
