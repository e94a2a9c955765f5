# SPDX-License-Identifier: Apache-2.0
"""An explanation as HTML: the flow as a diagram, with the shapes of the call, and every stage to unfold."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mha_c.display.html import block, escape, matrix
from mha_c.explanation.masks import MaskEffect
from mha_c.explanation.stages import Stage

__all__ = ["render"]

#: Of each stage, at most so many heads are shown.
MOST_HEADS = 4

_WIDTH, _COLUMN, _GAP, _HEIGHT, _ARROW = 366, 114, 12, 46, 22

# Rows of the diagram, top to bottom: stages, the first column of each, and how many columns it takes.
_ROWS: tuple[tuple[tuple[str, int, int], ...], ...] = (
    (("query", 0, 1), ("key", 1, 1), ("value", 2, 1)),
    (("q", 0, 1), ("k", 1, 1), ("v", 2, 1)),
    (("q_heads", 0, 1), ("k_heads", 1, 1), ("v_heads", 2, 1)),
    (("scores", 0, 2),),
    (("masked_scores", 0, 2),),
    (("weights", 0, 2),),
    (("head_outputs", 0, 3),),
    (("concatenated", 0, 3),),
    (("output", 0, 3),),
)

_STYLE = """
.mha-c .parts { display: flex; flex-wrap: wrap; gap: 1em 2em; align-items: flex-start; }
.mha-c .flow { flex: 0 1 23rem; min-width: 0; }
.mha-c .stages { flex: 1 1 22rem; min-width: 0; }
.mha-c svg { width: 100%; max-width: 23rem; height: auto; display: block; }
.mha-c svg text { fill: currentColor; text-anchor: middle; font-size: 11px; }
.mha-c svg .name { font-weight: 600; font-size: 12px; }
.mha-c svg .step { opacity: .75; text-anchor: start; }
.mha-c svg rect { fill: rgba(36, 122, 182, .13); stroke: rgb(36, 122, 182); }
.mha-c svg .input { fill: rgba(128, 128, 128, .1); stroke: rgba(128, 128, 128, .8); }
.mha-c svg .absent { fill: none; stroke: rgba(128, 128, 128, .8); stroke-dasharray: 4 3; }
.mha-c svg path { stroke: currentColor; stroke-opacity: .6; fill: none; }
.mha-c svg .head { fill: currentColor; fill-opacity: .6; stroke: none; }
.mha-c summary .faint { font-size: 12px; white-space: nowrap; }
"""


class Explained(Protocol):
    """What is shown of an explanation."""

    title: str
    inputs: dict[str, tuple[tuple[str, ...], tuple[int, ...]]]
    stages: dict[str, Stage]
    letters: dict[str, int]
    heads: tuple[int, ...]
    masks: tuple[MaskEffect, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def render(explanation: Explained) -> str:
    """The whole of it.

    Parameters
    ----------
    explanation : Explanation

    Returns
    -------
    str
        HTML in itself: no script, nothing to load.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> x = np.ones((5, 3, 8), np.float32)
    >>> html = render(mha_c.explain(mha_c.MultiheadAttention(8, 4), x, x, x))
    >>> html.count("<details>"), "(3, 4, 5, 5)" in html
    (13, True)
    """
    letters = ", ".join(f"{letter} = {size}" for letter, size in explanation.letters.items())
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in explanation.warnings)
    notes = "".join(f"<li>{escape(note)}</li>" for note in explanation.notes)
    stages = "".join(_stage(stage, explanation) for stage in explanation.stages.values())
    return block(
        f"<p><b>Attention, stage by stage</b></p><p>{escape(explanation.title)}</p>"
        f'<p class="faint">{escape(letters)}</p>{warnings}<div class="parts"><div class="flow">'
        f'{_diagram(explanation)}</div><div class="stages">{stages}'
        f'<details open=""><summary>Path, masks and more</summary>'
        f"<ul>{notes}</ul></details></div></div>",
        _STYLE,
    )


# ---- The diagram


def _diagram(explanation: Explained) -> str:
    masks = "+ masks" if explanation.masks else "no mask"
    steps = ("project", "cut into heads", "q kᵀ / √D", masks, "softmax", "× v", "side by side", "project")
    parts: list[str] = []
    top = 1
    for number, row in enumerate(_ROWS):
        for name, column, columns in row:
            x, width = column * (_COLUMN + _GAP) + 1, columns * (_COLUMN + _GAP) - _GAP
            parts.append(_box(name, x, top, width, explanation))
        bottom = top + _HEIGHT
        if number + 1 < len(_ROWS):
            parts += _arrows(number, bottom, steps[number])
            top = bottom + _ARROW
    value = 2 * (_COLUMN + _GAP) + 1 + _COLUMN / 2  # v_heads passes the scores by
    start, end = 1 + 3 * _HEIGHT + 2 * _ARROW, 1 + 6 * (_HEIGHT + _ARROW)
    parts.append(_arrow(value, start, end))
    height = top + _HEIGHT + 1
    return (
        f'<svg viewBox="0 0 {_WIDTH + 2} {height}" role="img" '
        f'aria-label="The flow of attention, from the inputs to the output, with shapes">{"".join(parts)}</svg>'
    )


def _box(name: str, x: float, y: float, width: float, explanation: Explained) -> str:
    style = ""
    lines: tuple[str, str] = ("not asked for", "")
    style = ' class="absent"'
    if name in explanation.inputs:
        axes, shape = explanation.inputs[name]
        lines, style = (f"({', '.join(axes)})", str(shape)), ' class="input"'
    elif name in explanation.stages:
        stage = explanation.stages[name]
        lines, style = (f"({', '.join(stage.axes)})", str(stage.shape)), ""
    middle = x + width / 2
    text = "".join(f'<text x="{middle}" y="{y + at}">{escape(line)}</text>' for at, line in zip((27, 40), lines))
    name = f'<text class="name" x="{middle}" y="{y + 14}">{name}</text>'
    return f'<rect{style} x="{x}" y="{y}" width="{width}" height="{_HEIGHT}" rx="5"/>{name}{text}'


def _arrow(x: float, start: float, end: float) -> str:
    return (
        f'<path d="M{x} {start}V{end - 5}"/>'
        f'<path class="head" d="M{x - 4} {end - 7}L{x + 4} {end - 7}L{x} {end - 1}Z"/>'
    )


def _arrows(number: int, y: float, step: str) -> list[str]:
    """Arrows from the bottom of a row to the next one, and what happens on the way."""
    into = {name: (column, columns) for name, column, columns in _ROWS[number + 1]}
    starts = [column for _, column, columns in _ROWS[number] if columns == 1]
    if len(into) == 1:
        (_, columns), *_ = into.values()
        starts = [column for column in starts if column < columns]
    centres = [column * (_COLUMN + _GAP) + 1 + _COLUMN / 2 for column in starts]
    if not centres:
        _, _, columns = _ROWS[number][0]
        centres = [(columns * (_COLUMN + _GAP) - _GAP) / 2 + 1]
    arrows = [_arrow(x, y, y + _ARROW) for x in centres]
    return [*arrows, f'<text class="step" x="{centres[0] + 8}" y="{y + _ARROW / 2 + 3}">{escape(step)}</text>']


# ---- The stages


def _stage(stage: Stage, explanation: Explained) -> str:
    size = f"({', '.join(stage.axes)}) {stage.shape} · {_short(stage.operations)} operations · {_bytes(stage.nbytes)}"
    return (
        f"<details><summary><b>{stage.name}</b> = <code>{escape(stage.formula)}</code> "
        f'<span class="faint">{escape(size)}</span></summary><p>{escape(_sentence(stage.meaning))}</p>'
        f"{_pictures(stage, explanation)}</details>"
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _short(number: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{number:,}"


def _bytes(number: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 1 << power:
            return f"{number / (1 << power):.3g} {unit}"
    return f"{number} bytes"


def _pictures(stage: Stage, explanation: Explained) -> str:
    """The first batch item, and of it the first few heads."""
    array, axes = stage.array, stage.axes
    said = []
    if "N" in axes:
        axis = axes.index("N")
        if array.shape[axis] == 0:
            return "<p>It is empty.</p>"
        said += [f"batch item 0 of {array.shape[axis]}"] if array.shape[axis] > 1 else []
        array, axes = array.take(0, axis=axis), tuple(letter for letter in axes if letter != "N")
    if not array.size:
        return "<p>It is empty.</p>"
    pages = array if array.ndim == 3 else array[None]
    if len(pages) > MOST_HEADS:
        said.append(f"the first {MOST_HEADS} of {len(pages)} heads")
        pages = pages[:MOST_HEADS]
    largest = _largest(pages, stage.name)
    titles = [""] if array.ndim == 2 else [_head_title(number, axes[0], explanation) for number in range(len(pages))]
    shown = "".join(
        f"<div>{title}{matrix(page, _noun(axes[-2]), _noun(axes[-1]), largest)}</div>"
        for title, page in zip(titles, pages)
    )
    intro = f'<p class="faint">{escape(_sentence("; ".join(said)))}</p>' if said else ""
    return f'{intro}<div class="heads">{shown}</div>'


def _largest(pages: NDArray[Any], name: str) -> float:
    if "weights" in name:
        return 1.0
    return float(np.abs(pages, where=np.isfinite(pages), out=np.zeros_like(pages)).max(initial=0.0))


def _head_title(number: int, letter: str, explanation: Explained) -> str:
    name = "key/value head" if letter == "Hkv" else "head"
    return f"<p>{name} {number if letter == 'Hkv' else explanation.heads[number]}</p>"


def _noun(letter: str) -> str:
    return {"L": "query", "S": "key", "S'": "key"}.get(letter, "feature")
