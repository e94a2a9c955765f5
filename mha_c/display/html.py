# SPDX-License-Identifier: Apache-2.0
"""HTML for notebooks: a style that suits light pages and dark ones, and matrices as coloured tables or pictures.

Nothing is loaded and nothing runs: no script, no font, no address. Text has the colour of the page around it; those of
cells are mixed into the page's own background, and they are of medium lightness (luminance 0.18), on which black and
white are read equally well, at a contrast of 4.5 to 1. Blue and orange are told apart by everybody.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

__all__ = ["block", "escape", "matrix", "table", "verdict"]

_POSITIVE, _NEGATIVE, _NOT_A_NUMBER, _HIDDEN = (36, 122, 182), (190, 90, 20), (184, 71, 168), (125, 125, 125)

#: What is written out in full; larger matrices become pictures.
MOST_ROWS, MOST_COLUMNS = 12, 12
#: Cells of a picture along an axis; a larger matrix is averaged.
MOST_CELLS = 64

_LEVELS = 60  # of each colour, in a picture

_STYLE = """
.mha-c { font: 13px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; text-align: left; max-width: 76rem; }
.mha-c * { box-sizing: border-box; }
.mha-c p { margin: .3em 0; }
.mha-c .wide { overflow-x: auto; max-width: 100%; }
.mha-c table { border-collapse: collapse; margin: .3em 0; border: 0; table-layout: auto; font-size: 12px;
  font-variant-numeric: tabular-nums; }
.mha-c thead { border: 0; }
.mha-c tr, .mha-c tbody tr:nth-child(odd), .mha-c tbody tr:hover { background: none; }
.mha-c th, .mha-c td { padding: .15em .6em; text-align: right; white-space: nowrap; border: 0; background: none;
  vertical-align: baseline; color: inherit; }
.mha-c th { font-weight: 600; }
.mha-c .text { text-align: left; }
.mha-c .lines tbody tr { border-top: 1px solid rgba(128, 128, 128, .3); }
.mha-c .good::before { content: "\\2713  "; color: rgb(36, 122, 182); font-weight: 700; }
.mha-c .bad::before { content: "\\2717  "; color: rgb(190, 90, 20); font-weight: 700; }
.mha-c .warning { border-left: 4px solid rgb(190, 90, 20); padding: .2em .6em; background: rgba(190, 90, 20, .12); }
.mha-c .faint { opacity: .75; }
.mha-c code { font: 12px/1.4 ui-monospace, Menlo, Consolas, monospace; background: none; color: inherit; padding: 0; }
.mha-c details { border-top: 1px solid rgba(128, 128, 128, .3); padding: .25em 0; }
.mha-c summary { cursor: pointer; }
.mha-c .heads { display: flex; flex-wrap: wrap; gap: .4em 1.4em; }
.mha-c figure { margin: .3em 0; max-width: 100%; }
.mha-c figcaption { font-size: 12px; max-width: 20em; }
.mha-c .cells td { padding: .1em .4em; min-width: 2.2em; border: 1px solid rgba(128, 128, 128, .25); }
.mha-c .cells th { font-weight: 400; opacity: .75; padding: .1em .4em; }
.mha-c .cells .hidden { background: repeating-linear-gradient(45deg, rgba(125, 125, 125, .45) 0 2px,
  rgba(125, 125, 125, .12) 2px 6px); }
.mha-c img { display: block; image-rendering: pixelated; border: 1px solid rgba(128, 128, 128, .4); margin: 0;
  background: none; max-width: 100%; }
"""


def block(body: str, style: str = "") -> str:
    """What a notebook shows: `body`, and the style for it, `style` included.

    Examples
    --------
    >>> block("<p>text</p>").startswith('<div class="mha-c"><style>')
    True
    """
    # The class thrice: Jupyter's own rules, for tables and code, are more specific than one class and a name.
    rules = (_STYLE + style).replace(".mha-c", ".mha-c.mha-c.mha-c")
    return f'<div class="mha-c"><style>{rules}</style>{body}</div>'


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Sequence[int] = (0,),
    verdicts: Sequence[bool] = (),
) -> str:
    """A table of text.

    Parameters
    ----------
    header : sequence of str
        The first row.
    rows : sequence of sequences of str
        The others.
    text : sequence of int
        The columns that are text, and begin at the left.
    verdicts : sequence of bool
        For each row, whether its last cell is good news; none: no cell is either.

    Examples
    --------
    >>> '<td class="text">weight</td><td>256</td>' in table(["name", "bytes"], [["weight", "256"]])
    True
    """

    def line(cells: Sequence[str], tag: str, last: str = "") -> str:
        made = []
        for number, cell in enumerate(cells):
            attribute = ' class="text"' if number in text else last if number == len(cells) - 1 else ""
            made.append(f"<{tag}{attribute}>{escape(cell)}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line(row, "td", verdict(verdicts[number : number + 1])) for number, row in enumerate(rows))
    head = f"<thead>{line(header, 'th')}</thead>"
    return f'<div class="wide"><table class="lines">{head}<tbody>{body}</tbody></table></div>'


def verdict(verdicts: Sequence[bool]) -> str:
    """The attribute that marks good news, or bad, unless there are none.

    Examples
    --------
    >>> verdict([True, False])
    ' class="bad"'
    """
    return (' class="good"' if all(verdicts) else ' class="bad"') if verdicts else ""


def matrix(values: NDArray[np.floating], rows: str, columns: str, largest: float | None = None) -> str:
    """A matrix, its numbers in cells of their colour; a picture of it where there are too many to read.

    Blue is positive and orange negative, stronger the further from 0. Grey is -inf, a hidden key; NaN says so.

    Parameters
    ----------
    values : numpy.ndarray, (R, C)
        The numbers.
    rows, columns : str
        What a row and a column is, such as "query".
    largest : float, optional
        What has the strongest colour in cells; the largest number in size unless given. A picture has its own scale,
        which the few largest numbers do not stretch.

    Examples
    --------
    >>> html = matrix(np.array([[0.25, -np.inf]]), "query", "key")
    >>> "0.25" in html, html.count("<td")
    (True, 2)
    """
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max(initial=0.0)) if largest is None else largest
    if values.shape[0] <= MOST_ROWS and values.shape[1] <= MOST_COLUMNS:
        return _cells(values, rows, columns, largest)
    return _picture(values, rows, columns)


def _cells(values: NDArray[np.floating], rows: str, columns: str, largest: float) -> str:
    digits = 2 if 0.05 <= largest < 1000 else None
    head = "".join(f"<th>{number}</th>" for number in range(values.shape[1]))
    lines = []
    for number, row in enumerate(values):
        cells = "".join(f"<td{_cell_style(value, largest)}>{_number(value, digits)}</td>" for value in row)
        lines.append(f"<tr><th>{number}</th>{cells}</tr>")
    corner = f"<th>{escape(rows)} ↓ {escape(columns)} →</th>"
    return (
        f'<div class="wide"><table class="cells"><thead><tr>{corner}{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _number(value: float, digits: int | None) -> str:
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.2g}" if digits is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no -0.00
    return text.replace("-", "−")


def _cell_style(value: float, largest: float) -> str:
    if np.isneginf(value):
        return ' class="hidden"'
    colour = _NOT_A_NUMBER if np.isnan(value) else _POSITIVE if value > 0 else _NEGATIVE
    strength = 1.0 if not np.isfinite(value) else abs(value) / largest if largest else 0.0
    if strength < 0.01:
        return ""
    return f' style="background:rgba({colour[0]},{colour[1]},{colour[2]},{min(strength, 1.0):.2f})"'


def _picture(values: NDArray[np.floating], rows: str, columns: str) -> str:
    averaged, said = _averaged(values)
    sizes = np.abs(averaged[np.isfinite(averaged) & (averaged != 0)])
    largest = float(np.quantile(sizes, 0.99)) if sizes.size else 0.0
    height, width = averaged.shape
    scale = max(1, round(256 / max(height, width)))
    size = f"{values.shape[0]} × {values.shape[1]}{said}"
    text = f"{rows} ↓ {columns} →, {size}; strongest colour: from {_number(largest, None)}"
    source = base64.b64encode(_png(_levels(averaged, largest))).decode()
    return (
        f'<figure><img src="data:image/png;base64,{source}" width="{width * scale}" height="{height * scale}" '
        f'alt="{escape(text)}"/><figcaption class="faint">{escape(text)}</figcaption></figure>'
    )


def _averaged(values: NDArray[np.floating]) -> tuple[NDArray[np.floating], str]:
    """At most MOST_CELLS along each axis, each the mean of what is finite in it, and words that say so."""
    size = tuple(min(length, MOST_CELLS) for length in values.shape)
    if size == values.shape:
        return values, ""
    edges = [np.arange(cells) * length // cells for cells, length in zip(size, values.shape)]

    def total(array: NDArray[np.floating]) -> NDArray[np.floating]:
        by_row = np.add.reduceat(array, edges[0], axis=0, dtype=np.float64)
        return np.add.reduceat(by_row, edges[1], axis=1)

    finite = np.isfinite(values)
    count = total(finite.astype(np.float32))
    with np.errstate(invalid="ignore"):
        means = total(np.where(finite, values, 0)) / count
    means[(count == 0) & (total(np.isneginf(values).astype(np.float32)) > 0)] = -np.inf
    return means, f", averaged to {size[0]} × {size[1]}"


def _levels(values: NDArray[np.floating], largest: float) -> NDArray[np.uint8]:
    """Entries of the palette: 0..LEVELS positive, then LEVELS negative ones, hidden, and NaN."""
    with np.errstate(invalid="ignore"):
        steps = np.round(np.abs(values) / (largest or 1.0) * _LEVELS)
    steps = np.clip(np.nan_to_num(steps, posinf=_LEVELS), 0, _LEVELS)
    entries = np.where((values < 0) & (steps > 0), _LEVELS + steps, steps)
    entries[np.isneginf(values)] = 2 * _LEVELS + 1
    entries[np.isnan(values)] = 2 * _LEVELS + 2
    return np.asarray(entries, np.uint8)


def _png(entries: NDArray[np.uint8]) -> bytes:
    """A picture of one pixel a cell, by a palette of two colours from transparent to opaque."""
    height, width = entries.shape
    opacity = [round(255 * level / _LEVELS) for level in range(_LEVELS + 1)]
    colours = [_POSITIVE] * (_LEVELS + 1) + [_NEGATIVE] * _LEVELS + [_HIDDEN, _NOT_A_NUMBER]
    alphas = opacity + opacity[1:] + [100, 255]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = np.zeros((height, width + 1), np.uint8)  # a line begins with the number of its filter, none
    lines[:, 1:] = entries
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", bytes(part for colour in colours for part in colour)),
            chunk(b"tRNS", bytes(alphas)),
            chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            chunk(b"IEND", b""),
        ]
    )
