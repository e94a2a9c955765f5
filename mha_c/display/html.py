# SPDX-License-Identifier: Apache-2.0
"""HTML for notebooks: a style that suits light pages and dark ones, tables, and matrices as coloured cells or pictures.

Nothing is loaded and nothing runs: no script, no font, no address. Text has the colour of the page around it. Colours
are mixed into the page's own background.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from mha_c.display.cells import NEGATIVE, POSITIVE, bins

__all__ = ["block", "escape", "matrix", "table", "verdict"]

_NOT_A_NUMBER, _HIDDEN = (184, 71, 168), (125, 125, 125)

#: The largest matrix whose numbers are written out, and the most cells of a picture, along each axis.
MAX_NUMBERS, MAX_CELLS = 12, 64

_STYLE = files(__package__).joinpath("style.css").read_text("utf-8")


def block(body: str, style: str = "") -> str:
    """What a notebook shows: `body`, and the style for it, `style` included."""
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
    """A table; the columns `text` begin at the left, and `verdicts` say whether a row's last cell is good news.

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
    """The attribute that marks good news or bad; none without verdicts."""
    return (' class="good"' if all(verdicts) else ' class="bad"') if verdicts else ""


def matrix(
    values: NDArray[np.floating], rows: str, columns: str, *, largest: float | None = None, add_columns: bool = False
) -> str:
    """A matrix as a table of coloured numbers, or if it is large as a picture.

    Without matplotlib, which makes the pictures, a large matrix is a table of bins. Blue is above 0 and orange is
    below 0, stronger the further from 0. Hatched or grey is -inf, a hidden key.

    Parameters
    ----------
    values : numpy.ndarray, (R, C)
        The numbers.
    rows, columns : str
        What a row and a column is, such as "query".
    largest : float, optional
        What has the strongest colour in a table; the largest number in size unless given. A picture has its own scale,
        which the few largest numbers do not stretch.
    add_columns : bool, default False
        Whether the columns of a bin are added, as weights are, or averaged.

    Examples
    --------
    >>> html = matrix(np.array([[0.25, -np.inf]]), "query", "key")
    >>> "0.25" in html, html.count("<td")
    (True, 2)
    """
    values = np.asarray(values, np.float64)  # Python's and matplotlib's functions do not know bfloat16
    if max(values.shape) <= MAX_NUMBERS:
        return _cells(values, rows, columns, _largest(values) if largest is None else largest)
    try:
        from matplotlib.image import imsave
    except ModuleNotFoundError:
        binned, note = _binned(values, MAX_NUMBERS, add_columns)
        caption = f'<p class="faint">{escape(note)}</p>'
        return f"<div>{_cells(binned, rows, columns, _largest(binned))}{caption}</div>"
    binned, note = _binned(values, MAX_CELLS, add_columns)
    sizes = np.abs(binned[np.isfinite(binned) & (binned != 0)])
    strongest = float(np.quantile(sizes, 0.99)) if sizes.size else 0.0
    file = io.BytesIO()
    imsave(file, _colors(binned, strongest), format="png")
    height, width = (round(256 / max(binned.shape)) * count for count in binned.shape)
    text = escape(f"{rows} ↓ {columns} →, {note}; strongest colour: {_number(strongest, None)} or more")
    return (
        f'<figure><img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" width="{width}" '
        f'height="{height}" alt="{text}"/><figcaption class="faint">{text}</figcaption></figure>'
    )


def _largest(values: NDArray[np.floating]) -> float:
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _binned(values: NDArray[np.floating], most: int, add_columns: bool) -> tuple[NDArray[np.floating], str]:
    """At most `most` rows and columns, and words that say how many there were."""
    size = (-(-values.shape[0] // most), -(-values.shape[1] // most))
    note = f"{values.shape[0]} × {values.shape[1]}"
    if size == (1, 1):
        return values, note
    how = "columns added, rows averaged" if add_columns else "averaged"
    return bins(values, size, add_columns=add_columns), f"{note} in bins of {size[0]} × {size[1]}, {how}"


def _cells(values: NDArray[np.floating], rows: str, columns: str, largest: float) -> str:
    digits = 2 if 0.05 <= largest < 1000 else None
    head = "".join(f"<th>{number}</th>" for number in range(values.shape[1]))
    lines = []
    for number, (row, colors) in enumerate(zip(values, _colors(values, largest))):
        cells = "".join(
            f"<td{_attribute(value, color)}>{_number(value, digits)}</td>" for value, color in zip(row, colors)
        )
        lines.append(f"<tr><th>{number}</th>{cells}</tr>")
    corner = f"<th>{escape(rows)} ↓ {escape(columns)} →</th>"
    return (
        f'<div class="wide"><table class="cells"><thead><tr>{corner}{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _attribute(value: float, color: NDArray[np.uint8]) -> str:
    if np.isneginf(value):
        return ' class="hidden"'
    red, green, blue, alpha = (int(part) for part in color)
    return f' style="background:rgba({red},{green},{blue},{alpha / 255:.2f})"' if alpha > 2 else ""


def _number(value: float, digits: int | None) -> str:
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.2g}" if digits is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no -0.00
    return text.replace("-", "−")


def _colors(values: NDArray[np.floating], largest: float) -> NDArray[np.uint8]:
    """Red, green, blue and opacity of each number, 0 to 255: the further from 0, the more opaque."""
    colors = np.empty((*values.shape, 4), np.uint8)
    colors[..., :3] = np.where(values[..., None] < 0, NEGATIVE, POSITIVE)
    with np.errstate(invalid="ignore"):
        strength = np.abs(values) / (largest or 1.0)
    colors[..., 3] = np.rint(255 * np.clip(np.nan_to_num(strength, posinf=1.0), 0, 1))
    colors[np.isneginf(values)] = (*_HIDDEN, 100)
    colors[np.isnan(values)] = (*_NOT_A_NUMBER, 255)
    return colors
