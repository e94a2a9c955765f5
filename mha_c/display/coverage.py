# SPDX-License-Identifier: Apache-2.0
"""Which attention of a model of torch runs here, which is left to torch, and why."""

from __future__ import annotations

import threading
from collections import Counter
from typing import NamedTuple

from mha_c.display.table import Table

__all__ = ["Coverage", "CoverageRow"]


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
    """Calls of attention, counted by module; printing it, or showing it in a notebook, gives a table.

    It is counted while calls are made, by any number of threads.

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

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here: dict[tuple[str, str], int] = {}
        self._reasons: dict[tuple[str, str], Counter[str]] = {}

    def add(self, module: str, class_name: str, reason: str = "", calls: int = 1) -> None:
        """Count calls of a module: computed here, unless there is a reason why they are left to torch.

        Parameters
        ----------
        module, class_name : str
            As in `CoverageRow`.
        reason : str, default ""
            Why torch computes them.
        calls : int, default 1
            How many they are. 0 lists the module without a call; the reason then says why there is none.

        Examples
        --------
        >>> coverage = Coverage()
        >>> coverage.add("decoder.attn", "MultiheadAttention", "never called", calls=0)
        >>> coverage.rows[0].reason
        'never called'
        """
        with self._lock:
            self._here.setdefault((module, class_name), 0)
            if reason:
                self._reasons.setdefault((module, class_name), Counter())[reason] += calls
            else:
                self._here[module, class_name] += calls

    @property
    def rows(self) -> tuple[CoverageRow, ...]:
        """One row for every module, in the order of their first calls."""
        with self._lock:
            return tuple(
                CoverageRow(*key, here, self._reasons.get(key, Counter()).total(), _in_words(self._reasons.get(key)))
                for key, here in self._here.items()
            )

    @property
    def here(self) -> int:
        """Calls that mha_c computed."""
        return sum(row.here for row in self.rows)

    @property
    def left(self) -> int:
        """Calls that were left to torch."""
        return sum(row.left for row in self.rows)

    def table(self) -> Table:
        """The rows as a table.

        Returns
        -------
        Table
            Text for a terminal when printed, HTML in a notebook.

        Examples
        --------
        >>> Coverage().table().title
        'Calls of attention: 0 computed by mha_c, 0 left to torch'
        """
        rows = [(row.module, row.class_name, f"{row.here:,}", f"{row.left:,}", row.reason) for row in self.rows]
        title = f"Calls of attention: {self.here:,} computed by mha_c, {self.left:,} left to torch"
        return Table(title, ("module", "class", "here", "left", "reason"), rows, (), text=(0, 1, 4))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def __rich__(self) -> Table:
        return self.table()


def _in_words(reasons: Counter[str] | None) -> str:
    """The reasons, the most frequent first, with their numbers where there are several."""
    if not reasons:
        return ""
    if len(reasons) == 1:
        return next(iter(reasons))
    return ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
