# SPDX-License-Identifier: Apache-2.0
"""One table, shown in a terminal, with or without rich, or in a notebook."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mha_c.display import html as markup

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Table", "show"]


@dataclass(frozen=True)
class Table:
    """A title, a header, rows of text, and lines to read below it.

    Attributes
    ----------
    title : str
        What stands above.
    header : tuple of str
        The names of the columns.
    rows : sequence of tuples of str
        The cells.
    notes : sequence of str
        What stands below.
    text : sequence of int
        The columns that are text, and begin at the left; the others are numbers.
    verdicts : sequence of bool
        For each row, whether its last cell is good news; none: no cell is either.

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

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows)]
        lines = [
            "  ".join(
                cell.ljust(width) if number in self.text else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in (self.header, *self.rows)
        ]
        return "\n".join([self.title, "", *lines, "", *(textwrap.fill(note, 120) for note in self.notes)])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        title = f"<p{markup.verdict(self.verdicts)}><b>{markup.escape(self.title)}</b></p>"
        table = markup.table(self.header, self.rows, text=self.text, verdicts=self.verdicts)
        notes = "".join(f'<p class="faint">{markup.escape(note)}</p>' for note in self.notes)
        return markup.block(title + table + notes)

    def __rich__(self) -> Group:
        """What rich shows."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0)
        for number, cell in enumerate(self.header):
            table.add_column(Text(cell), justify="left" if number in self.text else "right", no_wrap=number == 0)
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
