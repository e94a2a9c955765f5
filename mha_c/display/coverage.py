# SPDX-License-Identifier: Apache-2.0
"""Which attention of a model of torch runs here, which is left to torch, and why."""

from __future__ import annotations

from typing import NamedTuple

from mha_c._lock import lock
from mha_c.display.table import Table

__all__ = ["Calls", "Coverage", "CoverageRow"]


class Calls:
    """The calls of one module or function, counted by the reason why torch computed them, which is "" for mha_c.

    Examples
    --------
    >>> calls = Calls()
    >>> calls.add()
    >>> calls.add("float16")
    >>> calls.by_reason
    {'': 1, 'float16': 1}
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, reason: str = "", calls: int = 1) -> None:
        """Count calls; see `Coverage.add`.

        Examples
        --------
        >>> Calls().add("gradients")
        """
        with lock:
            self._counts[reason] = self._counts.get(reason, 0) + calls

    @property
    def by_reason(self) -> dict[str, int]:
        """A copy of the counts."""
        with lock:
            return dict(self._counts)


class CoverageRow(NamedTuple):
    """One module of a model, or one function of torch.

    Attributes
    ----------
    module : str
        The name of the module in its model; "" where it is not known.
    class_name : str
        The name of its class, or of the function.
    here : int
        Calls that mha_c computed.
    left : int
        Calls that were left to torch.
    reason : str
        Why they were left to torch, or why there were no calls.

    Examples
    --------
    >>> CoverageRow("layers.0.self_attn", "MultiheadAttention", here=2, left=0, reason="").here
    2
    """

    module: str
    class_name: str
    here: int
    left: int
    reason: str


class Coverage:
    """Calls of attention or of layers, counted by module. Printing it gives a table, and so does a notebook.

    Calls are counted as they are made, by any number of threads.

    Parameters
    ----------
    what : str, default "attention"
        What is called, for the title of the table.
    note : str, default ""
        What to say below the table.

    Examples
    --------
    >>> coverage = Coverage()
    >>> coverage.add("layers.0.self_attn", "MultiheadAttention")
    >>> coverage.add("layers.0.self_attn", "MultiheadAttention", "float16")
    >>> coverage.rows
    (CoverageRow(module='layers.0.self_attn', class_name='MultiheadAttention', here=1, left=1, reason='float16'),)
    >>> coverage.here, coverage.left
    (1, 1)
    """

    def __init__(self, what: str = "attention", note: str = "") -> None:
        self._what = what
        self._note = note
        self._calls: dict[tuple[str, str], Calls] = {}

    def add(self, module: str, class_name: str, reason: str = "", calls: int = 1) -> None:
        """Count calls of a module: computed by mha_c, or with a reason, left to torch.

        Parameters
        ----------
        module, class_name : str
            As in `CoverageRow`.
        reason : str, default ""
            Why torch computes them; "" if mha_c does.
        calls : int, default 1
            The number of calls. 0 lists the module without a call; the reason then says why there is none.

        Examples
        --------
        >>> coverage = Coverage()
        >>> coverage.add("decoder.attn", "MultiheadAttention", "never called", calls=0)
        >>> coverage.rows[0].reason
        'never called'
        """
        self._calls.setdefault((module, class_name), Calls()).add(reason, calls)

    @property
    def rows(self) -> tuple[CoverageRow, ...]:
        """The rows, one for every module, in the order of their first calls."""
        rows = []
        for key, calls in list(self._calls.items()):
            left = calls.by_reason
            here = left.pop("", 0)
            rows.append(CoverageRow(*key, here, sum(left.values()), _in_words(left)))
        return tuple(rows)

    @property
    def here(self) -> int:
        """Calls that mha_c computed."""
        return sum(row.here for row in self.rows)

    @property
    def left(self) -> int:
        """Calls that were left to torch."""
        return sum(row.left for row in self.rows)

    def table(self) -> Table:
        """Return the rows as a table.

        Returns
        -------
        Table
            Text for a terminal when printed, HTML in a notebook.

        Examples
        --------
        >>> Coverage().table().title
        'Calls of attention: 0 computed by mha_c, 0 left to torch'
        """
        rows = [(row.module or "-", row.class_name, f"{row.here:,}", f"{row.left:,}", row.reason) for row in self.rows]
        notes = [self._note] if self._note else []
        title = f"Calls of {self._what}: {self.here:,} computed by mha_c, {self.left:,} left to torch"
        return Table(title, ("module", "class", "mha_c", "torch", "reason"), rows, notes, text=(0, 1, 4))

    def __repr__(self) -> str:
        return str(self.table()).rstrip("\n")

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def __rich__(self) -> Table:
        return self.table()


def _in_words(reasons: dict[str, int]) -> str:
    """The reasons, the most frequent first, with their numbers where there are several."""
    if len(reasons) < 2:
        return "".join(reasons)
    ordered = sorted(reasons.items(), key=lambda item: -item[1])
    return ", ".join(f"{reason} ({count:,})" if count else reason for reason, count in ordered)
