# SPDX-License-Identifier: Apache-2.0
"""Report measurements: a line for each case, a summary, and from the summary a page and the README's table.

    python benchmarks/report.py FILE --output DIR [--readme README.md] [--encoders]

FILE is results.json, as compare.py writes it, or a summary made from it, performance.json. With --encoders, it is
encoder_results.json, as encoders.py writes it, or encoders.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import chart
import peers
from cases import WORKLOADS

OURS = peers.OURS.name
LEVELS = {
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "neon": "NEON",
    "neon_dotprod": "NEON with dot products",
    "portable": "portable C",
}
NARROW = ("products of bfloat16", "products of int8", "bfloat16", "float16")
README_BLOCK = re.compile(r"(?<=<!-- speed -->\n).*?(?=\n<!-- end of speed -->)", re.S)


@dataclass(frozen=True)
class Row:
    """One case at one number of threads. A library's ratio is its time over ours, so above 1 we are faster."""

    threads: int
    shape: str
    seconds: float  # median of our time
    share: float | None  # of the peak of the multiply-add units
    ratios: dict[str, float]  # by library, called in the way that is its fastest here: medians over rounds
    quality: dict[str, dict[str, float]] = field(default_factory=dict)  # of our results and of those of these ways

    @property
    def others(self) -> dict[str, float]:
        """The ratios of the other libraries."""
        return {library: ratio for library, ratio in self.ratios.items() if library != peers.IN_FLOAT32}

    @property
    def fastest(self) -> str:
        """The fastest of the other libraries."""
        return min(self.others, key=self.others.__getitem__)

    @property
    def ratio(self) -> float:
        return self.ratios[self.fastest]

    @property
    def numbers(self) -> str:
        """The kind of numbers of a case of encoders.py, as its name has it."""
        kind = self.shape.rpartition(", ")[2]
        return kind if kind in NARROW else "float32"

    @property
    def words(self) -> str:
        return WORKLOADS.get(self.shape, self.shape)


@dataclass(frozen=True)
class Summary:
    """What is kept of a comparison, in performance.json or encoders.json."""

    machine: dict[str, Any]
    versions: dict[str, str]  # by library
    command: str
    rows: list[Row]

    @property
    def threads(self) -> list[int]:
        """The numbers of threads that were measured, the largest first."""
        return sorted({row.threads for row in self.rows}, reverse=True)

    @property
    def libraries(self) -> list[str]:
        """The others that took part."""
        return [name for name in self.versions if name not in (OURS, peers.IN_FLOAT32)]

    @property
    def has_torch_among_others(self) -> bool:
        return "torch" in self.libraries and len(self.libraries) > 1

    def compared(self, threads: int) -> list[Row]:
        """The cases that another library took part in."""
        return [row for row in self.rows if row.threads == threads and row.others]

    def workloads(self) -> list[Row]:
        """Those of them that have a name, with the most threads that were measured, in the order of their names."""
        found = {row.shape: row for row in self.compared(self.threads[0])}
        return [found[shape] for shape in WORKLOADS if shape in found]


def summarize(results: dict[str, Any]) -> Summary:
    """The summary of all samples; cases for which our own answer is missing are left out."""
    libraries = {name: version.split("+")[0].rpartition(" ")[::2] for name, version in results["versions"].items()}
    rows = []
    for run in results["runs"]:
        if OURS not in run["seconds"]:
            continue
        medians = {name: _rounded(statistics.median(_ratios(run, name))) for name in run["seconds"].keys() - {OURS}}
        ratios: dict[str, float] = {}
        fastest = {OURS: OURS}
        for name, ratio in sorted(medians.items(), key=lambda item: item[1]):
            library = libraries[name][0]
            ratios.setdefault(library, ratio)
            fastest.setdefault(library, name)
        seconds, share = _ours(run)
        quality = {
            library: {measure: float(f"{value:.2g}") for measure, value in run["quality"][name].items()}
            for library, name in fastest.items()
        }
        rows.append(Row(run["threads"], run["name"], _rounded(seconds), share and _rounded(share), ratios, quality))
    return Summary(results["machine"], dict(libraries.values()), results["command"], rows)


def _ours(run: dict[str, Any]) -> tuple[float, float | None]:
    """The median of our time, and the share of the peak that it is."""
    seconds = statistics.median(run["seconds"][OURS])
    return seconds, run["needed_flops"] / seconds / statistics.median(run["peak"]) if run["peak"] else None


def _ratios(run: dict[str, Any], name: str) -> list[float]:
    """A peer's time over ours in each round."""
    return [theirs / ours for theirs, ours in zip(run["seconds"][name], run["seconds"][OURS], strict=True)]


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")


def load(text: str) -> Summary:
    """A summary from the text of either file."""
    read = json.loads(text)
    return summarize(read) if "runs" in read else Summary(**{**read, "rows": [Row(**row) for row in read["rows"]]})


def dump(summary: Summary) -> str:
    """The text of such a file: a line for each row."""
    head = {key: value for key, value in asdict(summary).items() if key != "rows"}
    rows = ",\n".join(f"  {json.dumps(asdict(row))}" for row in summary.rows)
    return json.dumps(head, indent=1).removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n'


# ---------------------------------------------------------------------------------------------------------- in words


def line(run: dict[str, Any]) -> str:
    """One case in one line, for the terminal, with the quartiles of its ratio to the fastest peer, and both errors."""
    words = [f"{run['threads']} thr", f"{run['case']['group']:<20}", f"{run['name']:<36}"]
    if OURS not in run["seconds"]:
        return " ".join([*words, f"mha_c: {run['left_out'].get(OURS, 'missing')}"])
    seconds, share = _ours(run)
    words += [f"{time_text(seconds):>9}", f"{run['needed_flops'] / seconds / 1e9:6.1f} GFLOP/s", f"{percent(share):>5}"]
    others = run["seconds"].keys() - {OURS, peers.IN_FLOAT32}
    quartiles = {name: statistics.quantiles(_ratios(run, name), n=4, method="inclusive") for name in others}
    errors = [run["quality"][OURS]["error"]]
    if quartiles:
        fastest = min(quartiles, key=lambda name: quartiles[name][1])
        lower, middle, upper = quartiles[fastest]
        words += [f"{middle:6.2f}x [{lower:.2f}-{upper:.2f}] {fastest}"]
        errors += [run["quality"][fastest]["error"]]
    if peers.IN_FLOAT32 in run["seconds"]:
        words += [f"{statistics.median(_ratios(run, peers.IN_FLOAT32)):.2f}x in float32"]
    return " ".join([*words, "error", " | ".join(f"{error:.1e}" for error in errors)])


def time_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def headline(summary: Summary) -> str:
    """How fast it is, in three sentences."""
    compared = summary.compared(summary.threads[0])
    if not compared:
        return "No other library took part."
    ranked = sorted(compared, key=lambda row: row.ratio)
    most, least, slower = ranked[-1], ranked[0], sum(row.ratio < 1 for row in ranked)
    others = _fastest_of([f"{name} {summary.versions[name]}" for name in summary.libraries])
    sentences = [
        f"In the median of {len(ranked)} shapes, mha_c is {_median(ranked)} times as fast as {others} ({_conditions(summary)}).",
        f"The ratio is highest for “{most.words}” ({chart.times(most.ratio)}) and lowest for “{least.words}” "
        f"({chart.times(least.ratio)}). In {slower} of the {len(ranked)} shapes, another library is faster.",
        f"Against torch alone, the median is {_median(ranked, 'torch')}." if summary.has_torch_among_others else "",
    ]
    return "\n".join(filter(None, sentences))


def headlines(summary: Summary) -> str:
    """How fast encoders are, in a row for each kind of numbers, in each of which other libraries take part."""
    compared = summary.compared(summary.threads[0])
    if not compared:
        return "No other library took part."
    cells = []
    for numbers in dict.fromkeys(row.numbers for row in compared):
        rows = [row for row in compared if row.numbers == numbers]
        libraries = [name for name in summary.libraries if any(name in row.ratios for row in rows)]
        slower = sum(row.ratio < 1 for row in rows)
        lowest = chart.times(min(row.ratio for row in rows))
        cells.append([numbers, ", ".join(libraries), f"{_median(rows)}×", lowest, f"{slower} of {len(rows)}"])
    header = ["numbers", "other libraries", "median", "lowest", "shapes in which another library is faster"]
    return (
        "The table says how many times as long as mha_c the fastest other library takes "
        f"({_conditions(summary)}). The kinds of numbers are explained below.\n\n{_table(header, cells)}"
    )


def _conditions(summary: Summary) -> str:
    machine = summary.machine
    return ", ".join([_threads(summary.threads[0]), machine["cpu"].split(" (")[0], LEVELS[machine["level"]]])


def _median(rows: list[Row], library: str | None = None) -> str:
    ratios = [row.ratios[library] if library else row.ratio for row in rows if not library or library in row.ratios]
    return f"{statistics.median(ratios):.2f}"


def _fastest_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"the fastest of {', '.join(names[:-1])} and {names[-1]}"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


_TIMES = ["mha_c takes", "the fastest other takes", "torch takes"]


def _cells(row: Row) -> list[str]:
    fastest = f"{chart.times(row.ratio)} ({row.fastest})" if row.ratios else ""
    return [time_text(row.seconds), fastest, chart.times(row.ratios["torch"]) if "torch" in row.ratios else ""]


def readme(summary: Summary) -> str:
    """What the README says of speed."""
    cells = [[row.words, *_cells(row)] for row in summary.workloads()]
    return f"\n{headline(summary)}\n\n{_table(['one call of the layer', *_TIMES], cells)}\n"


# -------------------------------------------------------------------------------------------------------------- files


def picture(summary: Summary) -> str:
    """The chart of the workloads that have a name."""
    series = {f"as {_fastest_of(summary.libraries)}": [row.ratio for row in summary.workloads()]}
    if summary.has_torch_among_others:
        series["as torch alone"] = [row.ratios["torch"] for row in summary.workloads()]
    return chart.draw("How many times as fast is mha_c?", [row.words for row in summary.workloads()], series)


_METHOD = """## How it is measured

- A call is the whole layer: the projections of query, key and value, attention, and the output projection.
- Each library runs in a separate process, with the same weights, inputs and number of threads. While one library is measured,
  the others are stopped. Each turn begins with a warm-up. With one thread, all libraries take turns on the same CPU.
- Each round takes one sample of every library: the mean time of enough calls to fill a few milliseconds. A ratio is the median
  over the rounds of the ratio within a round, so that a slow moment of the machine affects both sides.
- Every result is compared with float64 arithmetic. A library whose result is wrong is left out.
- Each library is called in several ways, and the fastest one counts, separately for each shape. For torch, these are its
  ordinary path and its fast path; for ONNX Runtime, its operators `MultiHeadAttention` and `Attention`, ONNX's own `Attention`,
  and MatMul and Softmax; for OpenVINO, MatMul and Softmax, or `ScaledDotProductAttention`, compiled for one length or for any.
  Tensors, bound inputs and outputs, and converted masks are prepared before the measurement. OpenVINO is set to float32. mha_c
  gets NumPy arrays and makes a new output in each call.
- The peak is measured in each round, by chains of multiply-adds in registers, with the same instruction set and number of
  threads. The share of the peak counts the multiplications and additions that the result needs, in the cheaper order of the
  products. Padded keys, scores above the causal diagonal, softmax and masks do not count.

## On your machine

In a clone, with a C compiler:
"""


_NARROW_NUMBERS = """A layer of bfloat16 or float16 stores parameters, inputs and outputs in 16 bits. mha_c multiplies bfloat16 as
such, and float16 as float32. “Products of bfloat16” means a float32 layer that rounds to bfloat16 what it multiplies. “Products of
int8” means one that rounds to int8 what linear maps multiply, and to bfloat16 what attention itself multiplies. For products of
bfloat16, torch computes a bfloat16 layer, or a float32 layer after `torch.set_float32_matmul_precision("medium")`, which multiplies
float32 if torch has no fast way to multiply bfloat16. OpenVINO is set to bfloat16, and takes part if the CPU has it."""


def _narrow(rows: list[Row]) -> str:
    """The section on cases in narrower numbers than float32, if there are any."""
    narrow = [row for row in rows if peers.IN_FLOAT32 in row.ratios]
    if not narrow:
        return ""
    cells = [
        [f"`{row.shape}`", chart.times(row.ratios[peers.IN_FLOAT32]), _measure(row, OURS, "error")]
        + ([_measure(row, row.fastest, "error"), row.fastest] if row.others else ["", ""])
        for row in narrow
    ]
    header = ["shape", "mha_c in float32 takes", "error of mha_c", "error of the fastest other", "which is"]
    return f"""## Narrow numbers

{_NARROW_NUMBERS}

In int8, each output feature of the weights has a scale. mha_c finds a scale for each token. ONNX Runtime (`quantize_dynamic`, with
weights of 8 bits, as by default) and torch (`quantize_dynamic`) find one for all tokens of a call. An error is the root of the mean
square of the difference from float64, relative to that of the output.

{_table(header, cells)}
"""


def _measure(row: Row, library: str, measure: str) -> str:
    """How good the result of a library is."""
    return f"{row.quality[library][measure]:.1e}" if library in row.quality else ""


def page(summary: Summary) -> str:
    """The page, which shows the picture from a file beside it."""
    threads, *fewer = summary.threads
    bars = [f"{row.words} {chart.times(row.ratio)}" for row in summary.workloads()]
    shown = f"![How many times as fast mha_c is: {'; '.join(bars)}](performance.svg)" if bars else ""
    rows = [row for row in summary.rows if row.threads == threads]
    also = [
        f"With {_threads(count)}, the median is {_median(chosen)}"
        + (f" ({_median(chosen, 'torch')} against torch alone)" if summary.has_torch_among_others else "")
        + f", and the lowest ratio is {min(row.ratio for row in chosen):.2f}."
        for count in fewer
        if (chosen := summary.compared(count))
    ]
    cells = [
        [f"`{row.shape}`" + (f": {row.words}" if row.shape in WORKLOADS else ""), *_cells(row), percent(row.share)]
        for row in rows
    ]
    table = _table(["shape", *_TIMES, "of the peak"], cells)
    text = f"""# Performance

{headline(summary)}

{shown}

{" ".join(also)}

{facts(summary, "performance.json")}

## All shapes

A shape is `N,L,E,H`: batch, queries, features, heads. `S` is the number of keys if they are not the queries; `live` is the
number of keys in each item that are not padding. 1.06× means 1.06 times as long as mha_c. The last column is the share of the
peak of the multiply-add units.

<details>
<summary>{len(rows)} shapes, {_threads(threads)}</summary>

{table}

</details>

{_narrow(rows)}
{_METHOD}
```bash
python3 -m venv .venv && .venv/bin/pip install '.[benchmark]' && .venv/bin/python benchmarks/compare.py --quick
```

It takes 12 minutes. [benchmarks/README.md](benchmarks/README.md) has the options.
"""
    return _joined(text)


def _joined(text: str) -> str:
    """The text without the empty lines of what it lacks: a picture, a second number of threads, narrow numbers."""
    return re.sub("\n{3,}", "\n\n", text)


def facts(summary: Summary, file: str) -> str:
    """On what the figures were measured and with what, as a list; all of them are in the file beside the page."""
    machine = summary.machine
    lines = {
        "CPU": f"{machine['cpu']}, {machine['cpus']} CPUs usable",
        "Instruction set of mha_c": LEVELS[machine["level"]],
        "System": f"{machine['system']}, Python {machine['python']}, NumPy {machine['numpy']}",
        "Compiler of mha_c": machine["compiler"],
        "Versions": ", ".join(f"{name} {summary.versions[name]}" for name in (OURS, *summary.libraries)),
        "Date": machine["date"][:10],
        "Command": f"`{summary.command}`",
        "All figures": f"[{file}]({file})",
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


_ENCODER = "encoder, sequences × tokens"


def encoders_page(summary: Summary) -> str:
    """A table of every library for each number of threads, and one of how close the results are to float64."""
    names = [name for name in summary.versions if any(name in row.ratios for row in summary.rows)]
    tables = []
    for threads in summary.threads:
        rows = [row for row in summary.rows if row.threads == threads]
        cells = [
            [row.shape, time_text(row.seconds), percent(row.share)]
            + [chart.times(row.ratios[name]) if name in row.ratios else "" for name in names]
            for row in rows
        ]
        others = [f"{name} takes" for name in names]
        table = _table([_ENCODER, "mha_c takes", "of the peak", *others], cells)
        tables.append(f"With {_threads(threads)}:\n\n{table}")
    both = "\n\n".join(tables)
    rows = [row for row in summary.rows if row.threads == summary.threads[0]]
    cells = [[row.shape, *(_measure(row, name, "1 − cosine") for name in (OURS, *names))] for row in rows]
    quality = _table([_ENCODER, OURS, *names], cells)
    text = f"""# Whole encoders

{headlines(summary)}

{facts(summary, "encoders.json")}

Each library computes the same encoder from the same vectors of tokens. 1.06× means 1.06 times as long as mha_c. Each library is
used in several ways, and the fastest one counts, separately for each row. The peak is the speed of multiply-adds in registers, of
those numbers that are multiplied. A share of it counts the multiplications and additions of the products; padding does not count.
The libraries of a row are measured in turns, and rows one after another, while the speed of the machine may change: compare the
ratios in a row, not the times of two rows.

{_NARROW_NUMBERS if peers.IN_FLOAT32 in names else ""}

{both}

The vector of a sequence is the mean over its tokens. For the sequence where it is largest, 1 − the cosine between this vector and
that of the encoder in float64 is, with {_threads(summary.threads[0])}:

{quality}
"""
    return _joined(text)


def write(summary: Summary, folder: Path) -> Path:
    """Writes performance.json, performance.md and its picture, performance.svg, into the folder."""
    (folder / "performance.json").write_text(dump(summary), "utf-8")
    if summary.workloads():
        (folder / "performance.svg").write_text(picture(summary), "utf-8")
    made = folder / "performance.md"
    made.write_text(page(summary), "utf-8")
    return made


def write_encoders(summary: Summary, folder: Path) -> Path:
    """Writes encoders.json and encoders.md into the folder."""
    (folder / "encoders.json").write_text(dump(summary), "utf-8")
    made = folder / "encoders.md"
    made.write_text(encoders_page(summary), "utf-8")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the page of a comparison again, and the README's table.")
    parser.add_argument("file", type=Path, metavar="FILE", help="all samples, or a summary of them")
    parser.add_argument("--encoders", action="store_true", help="the file is of encoders.py, not of compare.py")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"), metavar="DIR")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the table into this README, too")
    options = parser.parse_args()
    summary = load(options.file.read_text("utf-8"))
    options.output.mkdir(parents=True, exist_ok=True)
    print((write_encoders if options.encoders else write)(summary, options.output))
    if options.readme:
        text = options.readme.read_text("utf-8")
        options.readme.write_text(README_BLOCK.sub(lambda _: readme(summary), text), "utf-8")


if __name__ == "__main__":
    main()
