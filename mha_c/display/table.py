# SPDX-License-Identifier: Apache-2.0
"""Tables that fit the terminal, with colours where rich is installed, and that notebooks show as HTML."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from mha_c.display import html as markup
from mha_c.display.words import terminal_width, wrap

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Table", "show"]

_GAP = "  "
_HARD_SPACE = "\xa0"  # where no line is broken


@dataclass(frozen=True, repr=False)
class Table:
    """A title, a header, rows of text, and sentences below them, laid out for the width of the terminal.

    Columns of text are wrapped at spaces. A table whose columns are too wide even so has a paragraph for each row.

    Attributes
    ----------
    title : str
        The line above.
    header : tuple of str
        The names of the columns.
    rows : sequence of tuples of str
        The cells.
    notes : sequence of str
        Sentences below.
    text : sequence of int
        The columns of text, which are aligned left. The others are numbers, aligned right and never broken.
    verdicts : sequence of bool
        For each row, whether it is good news; empty if that does not apply.
    summary : str
        The last line, coloured as good news if all verdicts are.

    Examples
    --------
    >>> print(Table("Sizes", ("name", "bytes"), [("weight", "256"), ("bias", "32")], ["288 in all"]))
    Sizes
    <BLANKLINE>
    name    bytes
    weight    256
    bias       32
    <BLANKLINE>
    288 in all
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str]
    text: Sequence[int] = (0,)
    verdicts: Sequence[bool] = ()
    summary: str = ""

    def __str__(self) -> str:
        return "\n".join(line for line, _ in self._lines(terminal_width()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        title = f"<p{markup.verdict(self.verdicts)}><b>{markup.escape(self.title)}</b></p>"
        table = markup.table(self.header, self.rows, text=self.text, verdicts=self.verdicts)
        below = [*self.notes, self.summary] if self.summary else self.notes
        notes = "".join(f'<p class="faint">{markup.escape(note)}</p>' for note in below)
        return markup.block(title + table + notes)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Text]:
        """What rich shows: the same lines in colours."""
        from rich.text import Text

        for line, style in self._lines(options.max_width):
            yield Text(line, style)

    def _lines(self, width: int) -> Iterator[tuple[str, str]]:
        """The lines, each with its style in rich's words."""
        widths = self._widths(width)
        yield from ((line, "bold") for line in wrap(self.title, width))
        yield "", ""
        yield from self._columns(widths) if _total(widths) <= width else self._paragraphs(width)
        if self.notes:
            yield "", ""
            yield from ((line, "") for note in self.notes for line in wrap(note, width))
        if self.summary:
            yield "", ""
            yield from ((line, "green" if all(self.verdicts) else "bold red") for line in wrap(self.summary, width))

    def _widths(self, width: int) -> list[int]:
        """The columns' widths: as wide as their cells, else with wrapped headers, else with wrapped text, too."""
        columns = list(enumerate(zip(self.header, *self.rows)))
        widths = [max(map(len, cells)) for _, cells in columns]
        least = [
            max([_longest_word(cells[0]), *map(_longest_word if number in self.text else len, cells[1:])])
            for number, cells in columns
        ]
        for shrinking in ([number for number, _ in columns if number not in self.text], self.text):
            while _total(widths) > width:
                room, widest = max(((widths[number] - least[number], number) for number in shrinking), default=(0, 0))
                if room == 0:
                    break
                widths[widest] -= 1
        return widths

    def _columns(self, widths: Sequence[int]) -> Iterator[tuple[str, str]]:
        """The header, whose lines end together, and the rows, whose lines begin together."""
        header = [wrap(name, width)[::-1] for name, width in zip(self.header, widths)]
        for line in [*zip_longest(*header, fillvalue="")][::-1]:
            yield self._line(line, widths), "bold"
        for row, style in zip(self.rows, self._row_styles()):
            for line in zip_longest(*map(wrap, row, widths), fillvalue=""):
                yield self._line(line, widths), style

    def _paragraphs(self, width: int) -> Iterator[tuple[str, str]]:
        """For each row, the first cell and those without a header; below them the others, each after its header."""
        header = ("", *self.header[1:])
        digits = [max(map(len, cells)) for cells in zip(*self.rows)]
        for row, style in zip(self.rows, self._row_styles()):
            first = _GAP.join(cell for name, cell in zip(header, row) if cell and not name)
            others = [
                f"{name} {cell}"
                if number in self.text
                else f"{name} {cell:>{digits[number]}}".replace(" ", _HARD_SPACE)
                for number, (name, cell) in enumerate(zip(header, row))
                if cell and name
            ]
            for line in (*wrap(first, width), *wrap(f"    {_GAP.join(others)}", width)):
                yield line.replace(_HARD_SPACE, " "), style

    def _row_styles(self) -> list[str]:
        return ["" if good else "red" for good in self.verdicts or [True] * len(self.rows)]

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        aligned = (
            cell.ljust(width) if number in self.text else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths))
        )
        return _GAP.join(aligned).rstrip()


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _longest_word(text: str) -> int:
    return max(map(len, wrap(text, 1)), default=0)


def show(*tables: object) -> None:
    """Print tables, one after another: in colours where rich is installed and the output is a terminal."""
    printer: Callable[[object], None] = print
    if sys.stdout.isatty() and find_spec("rich"):
        from rich.console import Console

        printer = Console(width=terminal_width()).print
    for number, table in enumerate(tables):
        if number > 0:
            print()
        printer(table)
