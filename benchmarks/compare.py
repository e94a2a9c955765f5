# SPDX-License-Identifier: Apache-2.0
"""Measures mha_c and every other implementation that is installed, over the grid of cases.py, and reports.

Turns are taken round-robin, one sample of every peer a round, so that a drift of the machine (clock, neighbours, heat)
hits all alike; what is reported are medians over rounds of ratios within a round. The peak is one more member of the
round. Every peer's answer is compared with float64: its error is kept, and an answer that is wrong is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import peers
import report
from cases import CASES, select
from compiler import NoCompiler
from peak import Peak
from problem import judge
from workers import PeerError, Worker, one_cpu

from mha_c.display.progress import progress, say

# Relative rms error of a right answer: a few hundred times the unit in the last place. bfloat16 would be at 1e-2. In int8,
# a library may choose its scales: errors of 0.14 were seen. A wrong layer has an error of about 1.
TOLERANCE = {"float32": 3e-5, "float64": 1e-13, "bfloat16": 3e-2, "float16": 4e-3, "int8": 0.5}


@dataclass(frozen=True)
class Comparison:
    """What is measured, who takes part, and what makes a function of a result that tells how good it is: "error" is
    its relative error."""

    cases: Sequence[Any]
    candidates: Sequence[peers.Candidate]
    judge: Callable[[Any], Callable[[Any], dict[str, float]]]


@dataclass(frozen=True)
class Effort:
    """How long to measure: a sample has at least `sample` seconds, a case about `case` seconds."""

    sample: float
    case: float
    least_rounds: int
    most_rounds: int


FULL = Effort(sample=0.015, case=8.0, least_rounds=9, most_rounds=51)
QUICK = Effort(sample=0.005, case=1.0, least_rounds=5, most_rounds=11)


def measure_case(
    case: Any,
    quality_of: Callable[[Any], dict[str, float]],
    workers: list[Worker],
    threads: int,
    level: str,
    peak: Peak | None,
    effort: Effort,
) -> dict[str, Any]:
    """Everything known about one case, for the JSON file."""
    taking_part: list[tuple[Worker, float]] = []
    quality: dict[str, dict[str, float]] = {}
    tolerance = TOLERANCE[case.matmul_precision or case.dtype]
    left_out: dict[str, str] = {}
    for worker in workers:
        try:
            output, weights, seconds = worker.prepare(case)
        except PeerError as error:
            left_out[worker.name] = str(error)
            continue
        quality[worker.name] = quality_of((output, weights))
        relative_error = quality[worker.name]["error"]
        if relative_error < tolerance:
            taking_part.append((worker, seconds))
        else:
            left_out[worker.name] = f"wrong answer: relative error {relative_error:.1e}"
    times, peaks = _rounds(case, taking_part, left_out, threads, peak, effort)
    return {
        "threads": threads,
        "level": level,
        "name": case.name,
        "case": dataclasses.asdict(case),
        "needed_flops": case.needed_flops,
        "peak": peaks,
        "seconds": times,
        "quality": quality,
        "left_out": left_out,
    }


def _rounds(
    case: Any,
    taking_part: list[tuple[Worker, float]],
    left_out: dict[str, str],
    threads: int,
    peak: Peak | None,
    effort: Effort,
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds a call of each peer in each round, and the peak in each round."""
    times: dict[str, list[float]] = {worker.name: [] for worker, _ in taking_part}
    peaks: list[float] = []
    deadline = time.monotonic() + effort.case
    for number in range(effort.most_rounds):
        if number >= effort.least_rounds and time.monotonic() > deadline:
            break
        if peak is not None:
            peaks.append(peak.measure_mixed(threads, case.operations))
        first = number % max(len(taking_part), 1)  # so that nobody always takes the turn after the same neighbour
        for worker, seconds in taking_part[first:] + taking_part[:first]:
            try:
                times[worker.name].append(worker.measure(max(1, round(effort.sample / seconds)), seconds))
            except PeerError as error:
                left_out[worker.name] = str(error)
                del times[worker.name]
                taking_part = [(other, time_) for other, time_ in taking_part if other is not worker]
    return times, peaks


def run(comparison: Comparison, thread_counts: list[int], effort: Effort, file: Path) -> dict[str, Any]:
    """All measurements, also written to a JSON file, anew after each case; those before Ctrl-C, if it comes."""
    results: dict[str, Any] = {"machine": machine.describe(), "versions": {}, "missing": {}, "runs": []}
    results["command"] = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    results["interrupted"] = False
    with tempfile.TemporaryDirectory() as folder:
        level = results["machine"]["level"]
        peak = _peak(level, Path(folder))
        try:
            for threads in thread_counts:
                with ExitStack() as stack:
                    if threads == 1:
                        stack.enter_context(one_cpu())
                    workers = _start(comparison.candidates, threads, stack, results)
                    for case in progress(comparison.cases, "case", f"{threads} thread{'s' * (threads > 1)}"):
                        done = measure_case(case, comparison.judge(case), workers, threads, level, peak, effort)
                        results["runs"].append(done)
                        file.write_text(json.dumps(results, indent=1))
                        say(report.line(done))
        except KeyboardInterrupt:
            results["interrupted"] = True
    return results


def _peak(level: str, folder: Path) -> Peak | None:
    """What measures the peak; None where it cannot be compiled."""
    try:
        return Peak(level, folder)
    except NoCompiler as error:
        print(f"The page will lack shares of the peak: {error}", file=sys.stderr)
        return None


def _start(
    candidates: Sequence[peers.Candidate], threads: int, stack: ExitStack, results: dict[str, Any]
) -> list[Worker]:
    """The processes of the peers; `stack` ends them."""
    workers = []
    for candidate in candidates:
        try:
            workers.append(stack.enter_context(Worker(candidate, threads)))
            results["versions"][candidate.name] = workers[-1].version
        except PeerError as error:
            results["missing"][candidate.name] = str(error)
            print(f"{candidate.name} is left out: {error}", file=sys.stderr)
    return workers


def command(description: str, comparison: Comparison, file: str, write: Callable[[report.Summary, Path], Path]) -> int:
    """Measures what the command line asks for, keeps all samples in the file, and writes what is made of them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples; without the class 'lengths'")
    choose = select(parser, comparison.cases)
    names = [candidate.name for candidate in comparison.candidates]
    parser.add_argument("--peers", nargs="+", choices=names, metavar="PEER", help=f"of {', '.join(names)}")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--seconds", type=float, help="about how long to measure each case")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"), metavar="DIR")
    options = parser.parse_args()
    cases = choose(options)
    if options.quick and not options.classes:
        cases = [case for case in cases if case.group != "lengths"]
    wanted = [peers.OURS.name, *(options.peers or names)]
    candidates = [candidate for candidate in comparison.candidates if candidate.name in wanted]
    effort = QUICK if options.quick else FULL
    if options.seconds:
        effort = dataclasses.replace(effort, case=options.seconds)
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = dataclasses.replace(comparison, cases=cases, candidates=candidates)
    results = run(chosen, options.threads, effort, options.output / file)
    if results["runs"]:
        print(f"\n{write(report.summarize(results), options.output)} has it all.")
    if results["interrupted"]:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command(__doc__.splitlines()[0], Comparison(CASES, peers.LAYERS, judge), "results.json", report.write))
