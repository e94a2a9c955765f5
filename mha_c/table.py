# SPDX-License-Identifier: Apache-2.0
"""One table, shown in a terminal, with or without rich, or in a notebook."""

from __future__ import annotations

import html
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Table", "show"]


@dataclass(frozen=True)
class Table:
    """A title, a header, rows of text, and lines to read below it. The first column is text, the others are numbers.

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

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in (self.header, *self.rows)
        ]
        return "\n".join([self.title, "", *lines, "", *(textwrap.fill(note, 120) for note in self.notes)])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join(
            "<tr>{}</tr>".format("".join(f"<td>{html.escape(cell).replace(' ', '&nbsp;')}</td>" for cell in row))
            for row in self.rows
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<table><caption>{html.escape(self.title)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>{notes}"
        )

    def __rich__(self) -> Group:
        """What rich shows."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0)
        for number, cell in enumerate(self.header):
            table.add_column(Text(cell), justify="left" if number == 0 else "right", no_wrap=number == 0)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return Group(table, *map(Text, self.notes))


def show(*parts: object) -> None:
    """Print tables and text: through rich where it is installed and somebody is looking, plainly elsewhere.

    Examples
    --------
    >>> show(Table("Sizes", ("name", "bytes"), [("bias", "32")], []), "done")
    Sizes
    <BLANKLINE>
    name  bytes
    bias     32
    <BLANKLINE>
    done
    """
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            pass
        else:
            Console().print(*parts, sep="\n", markup=False, highlight=False)
            return
    print(*parts, sep="\n")
