# SPDX-License-Identifier: Apache-2.0
"""An explanation as HTML: the flow as a diagram, with the shapes of the call, and every stage to unfold."""

from __future__ import annotations

from importlib.resources import files
from string import Template
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mha_c.display.html import block, escape, matrix
from mha_c.explanation.masks import MaskEffect
from mha_c.explanation.stages import STAGES, Stage

__all__ = ["render", "render_layer"]

#: The most heads of a stage that are shown.
MAX_HEADS = 4

_DIAGRAM = Template(files(__package__).joinpath("diagram.svg").read_text("utf-8"))
_STYLE = files(__package__).joinpath("style.css").read_text("utf-8")


class Explained(Protocol):
    """The parts of an explanation that are shown."""

    title: str
    inputs: dict[str, tuple[tuple[str, ...], tuple[int, ...]]]
    stages: dict[str, Stage]
    letters: dict[str, int]
    heads: tuple[int, ...]
    masks: tuple[MaskEffect, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


class ExplainedLayer(Protocol):
    """The parts of a layer's explanation that are shown."""

    title: str
    stages: dict[str, Stage]
    attentions: dict[str, Any]
    letters: dict[str, int]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def render(explanation: Explained) -> str:
    """All of an explanation as HTML that needs no script and loads nothing."""
    stages = "".join(_stage(stage, explanation.heads) for stage in explanation.stages.values())
    return block(
        f"{_head('Attention, stage by stage', explanation)}"
        f'<div class="parts"><div class="flow">{_diagram(explanation)}</div>'
        f'<div class="stages">{stages}{_notes("Paths, masks and more", explanation)}</div></div>',
        _STYLE,
    )


def render_layer(explanation: ExplainedLayer) -> str:
    """The same for a layer of an encoder or a decoder, with the attention before what it adds."""
    parts = {name: _stage(stage) for name, stage in explanation.stages.items()}
    for name, attention in explanation.attentions.items():
        inside = f"<details><summary>{name}, stage by stage</summary>{render(attention)}</details>"
        parts[f"{name}_update"] = inside + parts[f"{name}_update"]
    return block(
        f"{_head('A layer, step by step', explanation)}"
        f"{_notes('Sizes and more', explanation)}{''.join(parts.values())}",
        _STYLE,
    )


def _head(what: str, explanation: Explained | ExplainedLayer) -> str:
    letters = ", ".join(f"{letter} = {size}" for letter, size in explanation.letters.items())
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in explanation.warnings)
    return f'<p><b>{what}</b></p><p>{escape(explanation.title)}</p><p class="faint">{escape(letters)}</p>{warnings}'


def _notes(name: str, explanation: Explained | ExplainedLayer) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in explanation.notes)
    return f'<details open=""><summary>{name}</summary><ul>{notes}</ul></details>'


def _diagram(explanation: Explained) -> str:
    inputs, stages = explanation.inputs, explanation.stages
    boxes = {name: ("absent", "not asked for", "") for name in STAGES}
    boxes |= {name: ("input", f"({', '.join(axes)})", str(shape)) for name, (axes, shape) in inputs.items()}
    boxes |= {name: ("stage", f"({', '.join(stage.axes)})", str(stage.shape)) for name, stage in stages.items()}
    words = {"masks": "+ masks" if explanation.masks else "no mask"}
    for name, box in boxes.items():
        words |= {f"{name}_{part}": escape(text) for part, text in zip(("kind", "axes", "shape"), box)}
    return _DIAGRAM.substitute(words)


def _stage(stage: Stage, heads: tuple[int, ...] = ()) -> str:
    size = f"({', '.join(stage.axes)}) {stage.shape} · {_short(stage.operations)} operations · {_bytes(stage.nbytes)}"
    return (
        f"<details><summary><b>{stage.name}</b> = <code>{escape(stage.formula)}</code> "
        f'<span class="faint">{escape(size)}</span></summary><p>{escape(_sentence(stage.meaning))}</p>'
        f"{_pictures(stage, heads)}</details>"
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


def _pictures(stage: Stage, heads: tuple[int, ...]) -> str:
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
    if len(pages) > MAX_HEADS:
        said.append(f"the first {MAX_HEADS} of {len(pages)} heads")
        pages = pages[:MAX_HEADS]
    are_weights = "weights" in stage.name
    largest = 1.0 if are_weights else float(np.abs(pages[np.isfinite(pages)]).max(initial=0.0))
    titles = [""] if array.ndim == 2 else [_head_title(number, axes[0], heads) for number in range(len(pages))]
    nouns = (_noun(axes[-2]), _noun(axes[-1]))
    shown = "".join(
        f"<div>{title}{matrix(page, *nouns, largest=largest, add_columns=are_weights)}</div>"
        for title, page in zip(titles, pages)
    )
    intro = f'<p class="faint">{escape(_sentence("; ".join(said)))}</p>' if said else ""
    return f'{intro}<div class="heads">{shown}</div>'


def _head_title(number: int, letter: str, heads: tuple[int, ...]) -> str:
    name = "key/value head" if letter == "Hkv" else "head"
    return f"<p>{name} {number if letter == 'Hkv' else heads[number]}</p>"


def _noun(letter: str) -> str:
    return {"L": "query", "S": "key", "S'": "key", "T": "token"}.get(letter, "feature")
