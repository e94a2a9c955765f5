# SPDX-License-Identifier: Apache-2.0
"""The plots of a comparison, as SVG: ratio per shape, share of the peak per shape, time against L."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib import pyplot

from peers import OURS

if TYPE_CHECKING:
    from report import Summary

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small files, and words that can be searched for
        "svg.hashsalt": "mha_c",  # the same data gives the same file
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)

OURS_COLOR, GOAL_COLOR, MISSED_COLOR = "#1f5fa8", "#c8781e", "#b5482f"


def draw(summaries: list[Summary], folder: Path) -> dict[tuple[str, int], str]:
    """Writes the plots; their file names by kind ("ratio", "share", "lengths") and number of threads."""
    files: dict[tuple[str, int], str] = {}
    for threads in dict.fromkeys(summary.threads for summary in summaries):
        chosen = [summary for summary in summaries if summary.threads == threads]
        shapes = [summary for summary in chosen if summary.group != "lengths"]
        lengths = [summary for summary in chosen if summary.group == "lengths"]
        compared = [summary for summary in shapes if summary.ratio]
        measured = [summary for summary in shapes if summary.share]
        for kind, wanted, plot in (
            ("ratio", compared, _ratios),
            ("share", measured, _shares),
            ("lengths", lengths, _lengths),
        ):
            if wanted:
                files[kind, threads] = f"{kind}_{threads}.svg"
                figure = plot(wanted)
                figure.savefig(folder / files[kind, threads], bbox_inches="tight", metadata={"Date": None})
                pyplot.close(figure)
    return files


def _bars(summaries: list[Summary]) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(figsize=(7.5, 0.6 + 0.22 * len(summaries)))
    axes.set_yticks(range(len(summaries)), [f"{s.group}  {s.name}" for s in summaries])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(y=0.01)
    return figure, axes


def _color(summary: Summary) -> str:
    return MISSED_COLOR if summary.meets_goal() is False else OURS_COLOR


def _ratios(summaries: list[Summary]) -> Any:
    figure, axes = _bars(summaries)
    for y, s in enumerate(summaries):
        assert s.ratio is not None
        lower, middle, upper = s.ratio
        axes.barh(y, middle - 1, left=1, height=0.7, color=_color(s))
        axes.plot([lower, upper], [y, y], color="black", linewidth=0.8)
        if s.goal["ratio"]:
            axes.plot(s.goal["ratio"], y, "|", color=GOAL_COLOR, markersize=11, markeredgewidth=2)
    axes.set_xscale("log")
    most = max(max(s.ratio[2], s.goal["ratio"] or 0) for s in summaries if s.ratio)
    ticks = [tick for tick in (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50) if tick < 1.1 * most]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(0.9, *(0.95 * s.ratio[0] for s in summaries if s.ratio)), 1.1 * most)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("fastest peer's time ÷ ours (line: quartiles; mark: goal)")
    return figure


def _shares(summaries: list[Summary]) -> Any:
    figure, axes = _bars(summaries)
    for y, s in enumerate(summaries):
        axes.barh(y, 100 * (s.share or 0), height=0.7, color=_color(s))
        if s.goal["share"]:
            axes.plot(100 * s.goal["share"], y, "|", color=GOAL_COLOR, markersize=11, markeredgewidth=2)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("share of the peak in % (mark: goal)")
    return figure


def _lengths(summaries: list[Summary]) -> Any:
    """Microseconds a query: a flat line where only the projections count."""
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
    names = list(dict.fromkeys(name for s in summaries for name in s.seconds if name != OURS))
    for name in [*names, OURS]:
        points = [(_length(s), 1e6 * s.seconds[name] / _length(s)) for s in summaries if name in s.seconds]
        style = {"color": OURS_COLOR, "linewidth": 2.5} if name == OURS else {"linewidth": 1}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([_length(s) for s in summaries], [str(_length(s)) for s in summaries])
    N, _, E, H = summaries[0].name.split(",")
    axes.set_xlabel(f"L, with N = {N}, E = {E}, H = {H}")
    axes.set_ylabel("µs per query")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _length(summary: Summary) -> int:
    return int(summary.name.split(",")[1])
