# SPDX-License-Identifier: Apache-2.0
"""What the measurements say: one line a case, and a page with tables and plots.

    python benchmarks/report.py results.json --output DIR

makes the page again from the file that compare.py wrote.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import OURS

LEAST_WINS = 8  # how many shapes to name on which we win least


@dataclass(frozen=True)
class Summary:
    """One case at one number of threads. A ratio is a peer's time over ours, so above 1 we are faster."""

    group: str
    name: str
    threads: int
    seconds: dict[str, float]  # medians
    fastest: str | None  # of the peers; None if none of them took part
    ratio: tuple[float, float, float] | None  # lower quartile, median, upper quartile
    rate: float  # operations that are needed, a second
    share: float | None  # of the peak
    nominal_share: float | None
    bound: float | None  # the ratio that our kernels alone would give
    goal: dict[str, float | None]

    @property
    def ours(self) -> float:
        return self.seconds[OURS]

    def meets_goal(self) -> bool | None:
        """Whether every part of the goal that could be measured is met; None without one."""
        met = []
        if self.goal["ratio"] and self.ratio:
            met.append(self.ratio[1] >= self.goal["ratio"])
        if self.goal["share"] and self.share:
            met.append(self.share >= self.goal["share"])
        if self.goal["microseconds"]:
            met.append(self.ours * 1e6 < self.goal["microseconds"])
        return all(met) if met else None

    def goal_text(self) -> str:
        parts = [f"≥ {self.goal['ratio']:g}"] if self.goal["ratio"] else []
        parts += [f"≥ {self.goal['share']:.0%}"] if self.goal["share"] else []
        parts += [f"< {self.goal['microseconds']:g} µs"] if self.goal["microseconds"] else []
        return ", ".join(parts)


def summarize(run: dict[str, Any]) -> Summary | None:
    """The summary of one measured case; None where our own answer was missing or wrong."""
    times = run["seconds"]
    if OURS not in times:
        return None
    seconds = {name: statistics.median(samples) for name, samples in times.items()}
    fastest = min((name for name in seconds if name != OURS), key=seconds.__getitem__, default=None)
    ratio = None
    if fastest is not None:
        ratios = [theirs / ours for theirs, ours in zip(times[fastest], times[OURS], strict=True)]
        lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        ratio = lower, middle, upper
    peak = statistics.median(run["peak"]) if run["peak"] else None
    # Alone they were measured at their best, so slowed down as much as the peak was in the median round.
    alone = run["alone"] / run["threads"] * max(run["peak"]) / peak if peak and run.get("alone") else None
    rate = run["needed_flops"] / seconds[OURS]
    goal = dict(run["case"]["goal"])
    if run["level"] != "avx2":  # the goals for shares are those of AVX2; elsewhere shares are reported
        goal["share"] = None
    return Summary(
        run["case"]["group"],
        run["name"],
        run["threads"],
        seconds,
        fastest,
        ratio,
        rate,
        rate / peak if peak else None,
        run["nominal_flops"] / seconds[OURS] / peak if peak else None,
        seconds[fastest] / alone if alone and fastest is not None else None,
        goal,
    )


def line(run: dict[str, Any]) -> str:
    """One case in one line, for the terminal."""
    summary = summarize(run)
    words = [f"{run['threads']} thr", f"{run['case']['group']:<11}", f"{run['name']:<36}"]
    if summary is None:
        return " ".join([*words, f"mha_c: {run['left_out'].get(OURS, 'missing')}"])
    words += [f"{time_text(summary.ours):>9}", f"{summary.rate / 1e9:6.1f} GFLOP/s", percent(summary.share).rjust(5)]
    if summary.ratio is not None:
        lower, middle, upper = summary.ratio
        words += [f"{middle:6.2f}x [{lower:.2f}-{upper:.2f}] {summary.fastest}"]
    if summary.goal_text():
        words += [f"(goal {summary.goal_text()}{'' if summary.meets_goal() else ': MISSED'})"]
    return " ".join(words)


def time_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def write(results: dict[str, Any], output: Path) -> Path:
    """Writes performance.md into `output`, and plots into its folder performance."""
    import plots  # here, because every process of a peer imports this module, too

    summaries = [summary for run in results["runs"] if (summary := summarize(run))]
    pictures = plots.draw(summaries, output / "performance")
    sections = [_introduction(results)]
    for threads in dict.fromkeys(summary.threads for summary in summaries):
        chosen = [summary for summary in summaries if summary.threads == threads]
        sections += [f"## {_threads(threads)}", *_pictures(pictures, threads), _table(chosen), _least(chosen)]
    sections += ["## Every implementation", _all_times(summaries), _left_out(results), _method()]
    page = output / "performance.md"
    page.write_text("\n\n".join(section for section in sections if section) + "\n")
    return page


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _introduction(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    lines = {
        "CPU": f"{machine['cpu']}, {machine['cpus']} of them usable",
        "Instruction set that mha_c used": machine["level"],
        "System": f"{machine['system']}, Python {machine['python']}, NumPy {machine['numpy']}",
        "Compiler of mha_c": machine["compiler"],
        "Versions": ", ".join(dict.fromkeys(versions.values())),
        "Date": machine["date"],
    }
    return "\n".join(
        [
            "# Performance",
            "",
            "How long one call of the whole layer takes, input and output projections included, beside the fastest",
            "other implementation on the same CPU with the same number of threads.",
            "",
            *(f"- {name}: {value}" for name, value in lines.items()),
            "",
            "To measure it again, with a C compiler on the path:",
            "",
            "```",
            'pip install ".[benchmark]"',
            results["command"],
            "```",
        ]
    )


def _pictures(pictures: dict[tuple[str, int], str], threads: int) -> list[str]:
    titles = {
        "ratio": "The fastest peer's time over ours; the mark is the goal",
        "share": "Share of the peak of the multiply-add units",
        "lengths": "Time of a call against L",
    }
    return [
        f"![{title}, {_threads(threads)}](performance/{pictures[kind, threads]})"
        for kind, title in titles.items()
        if (kind, threads) in pictures
    ]


def _rows(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _table(summaries: list[Summary]) -> str:
    rows = []
    for s in summaries:
        ratio = "" if s.ratio is None else f"**{s.ratio[1]:.2f}** ({s.ratio[0]:.2f}–{s.ratio[2]:.2f})"
        share = percent(s.share)
        if s.share and s.nominal_share and s.nominal_share > 1.001 * s.share:
            share += f" (nominal {percent(s.nominal_share)})"
        verdict = {True: "✓", False: "✗", None: ""}[s.meets_goal()]
        goal = f"{s.goal_text()} {verdict}".strip()
        bound = "" if s.bound is None else f"{s.bound:.2f}"
        rows.append([s.group, s.name, time_text(s.ours), ratio, s.fastest or "", goal, f"{s.rate / 1e9:.0f}", share, bound])
    header = ["class", "N,L,E,H", "mha_c", "ratio (quartiles)", "fastest peer", "goal", "GFLOP/s", "of peak", "at most"]
    return _rows(header, rows)


def _least(summaries: list[Summary]) -> str:
    ranked = sorted((s for s in summaries if s.ratio), key=lambda s: s.ratio[1] if s.ratio else 0)[:LEAST_WINS]
    items = [f"- {s.group} {s.name}: {s.ratio[1]:.2f}, against {s.fastest}" for s in ranked if s.ratio]
    return "\n".join(["Where we win least:", "", *items]) if items else ""


def _all_times(summaries: list[Summary]) -> str:
    names = list(dict.fromkeys(name for summary in summaries for name in summary.seconds))
    rows = []
    for s in summaries:
        cells = [time_text(s.seconds[name]) if name in s.seconds else "" for name in names]
        rows.append([str(s.threads), f"{s.group} {s.name}", *cells])
    return _rows(["threads", "case", *names], rows)


def _left_out(results: dict[str, Any]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for run in results["runs"]:
        for name, reason in run["left_out"].items():
            cases = reasons.setdefault((name, reason.splitlines()[0]), [])
            cases += [] if run["name"] in cases else [run["name"]]
    items = [f"- {name}: {reason} ({'; '.join(cases)})" for (name, reason), cases in reasons.items()]
    items += [f"- {name}: {reason}" for name, reason in results["missing"].items()]
    return "\n".join(["An empty cell, and why:", "", *items]) if items else ""


def _method() -> str:
    return """## How it is measured

- Each implementation runs in a process of its own, with the same weights, inputs and number of threads. While one is
  measured the others are stopped, so that threads that spin between calls do not disturb it; each turn starts with a
  warm-up. With one thread all take their turns on the same CPU, since neighbours may slow down one and not the next.
- A round takes one sample of each, and a sample is the mean of as many calls as fill some milliseconds. The ratio is
  the median over rounds of the ratio within a round; in parentheses are the quartiles.
- Every answer is compared with float64 arithmetic; an implementation whose answer is wrong is left out.
- Each library is called in its fastest way: tensors made beforehand; ONNX Runtime and OpenVINO with inputs and outputs
  bound beforehand and masks already converted; OpenVINO told to keep float32. mha_c gets NumPy arrays and makes its
  output anew in each call, as its users see it. *ORT* is ONNX Runtime: with `MultiHeadAttention` and `Attention` of
  com.microsoft, with ONNX's own `Attention`, and with MatMul and Softmax. OpenVINO gets MatMul and Softmax, or its own
  ScaledDotProductAttention compiled for one length or for any.
- The peak is measured in each round, with chains of multiply-adds in registers, for the instruction set that mha_c
  uses and the same number of threads. GFLOP/s and shares count the operations that are needed: projections of queries
  and live keys, scores and values of live keys on or below a causal diagonal, the output projection. *Nominal* counts
  what is written down: all keys, all scores. For boolean masks and few queries the two are the same; a share above
  100 % says that a call did less than is written down. Scores that are computed twice because the weights are wanted
  count once, softmax and masks not at all.
- *At most* is the ratio that a call would reach which did nothing but call its kernels, one after the other, with all
  that they need in the nearest cache, and shared out evenly among the threads: `benchmarks/limits.py` writes down what
  a pass asks of each kernel and times these calls alone. Against medians it counts as slowed down as the peak was in
  the median round beside its best one. A goal above it is out of reach for these kernels (`benchmarks/kernels.py` says
  how near to the peak they are); what a real call loses beyond that, it loses to weights, inputs and outputs in farther
  caches, to copies of rows, to its threads, and in tiny calls to Python.

[benchmarks/README.md](benchmarks/README.md) says how to measure another machine."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the page of a results.json again.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"), metavar="DIR")
    options = parser.parse_args()
    (options.output / "performance").mkdir(parents=True, exist_ok=True)
    print(write(json.loads(options.results.read_text()), options.output))


if __name__ == "__main__":
    main()
