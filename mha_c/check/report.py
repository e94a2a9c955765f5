# SPDX-License-Identifier: Apache-2.0
"""The results of a check, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mha_c.check.compare import CRITERION, Comparison
from mha_c.display.coverage import Coverage
from mha_c.display.table import Table

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """The results of a check. Printing it gives a table, and so does a notebook.

    Attributes
    ----------
    title : str
        What was compared.
    comparisons : tuple of Comparison
        One comparison for every output.
    notes : tuple of str
        Further remarks.
    coverage : Coverage or None
        For a model, the calls of its attention that mha_c computes. It is shown with the report if some are left to
        torch.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((2, 2), np.float32)
    >>> report = Report("ones and twos", (Comparison.measure("output", x + 1, x, x.astype(np.float64)),))
    >>> report.agrees
    False
    >>> report.assert_close()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: ones and twos
    ...
    """

    title: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()
    coverage: Coverage | None = None

    @property
    def agrees(self) -> bool:
        """Whether every output agrees."""
        return all(comparison.agrees for comparison in self.comparisons)

    def assert_close(self) -> None:
        """Raise an error unless every output agrees.

        Raises
        ------
        AssertionError
            With the report as its message.

        Examples
        --------
        >>> import numpy as np
        >>> x = np.ones((2, 2), np.float32)
        >>> Report("ones", (Comparison.measure("output", x, x, x.astype(np.float64)),)).assert_close()
        """
        if not self.agrees:
            raise AssertionError(str(self))

    def table(self) -> Table:
        """Return the report as a table: differences from torch, then errors in units in the last place.

        Returns
        -------
        Table
            Text for a terminal when printed, HTML in a notebook.

        Examples
        --------
        >>> Report("nothing", ()).table().title
        'nothing'
        """
        other = self.comparisons[0].other if self.comparisons else "torch"
        header = ("", "shape", "max diff", "rms diff", "in ulp", "mha_c error", f"{other} error", "")
        rows = [
            (
                one.name,
                str(one.shape),
                f"{one.difference.largest:.1e}",
                f"{one.difference.rms:.1e}",
                f"{one.difference.largest / one.ulp:.1f}",
                f"{one.error.largest / one.ulp:.1f}",
                f"{one.torch_error.largest / one.ulp:.1f}",
                "agrees" if one.agrees else "DIFFERS",
            )
            for one in self.comparisons
        ]
        wrong = [f"{one.name}: {what}" for one in self.comparisons for what in one.disagreements]
        units = "Errors are in ulp, units in the last place of the largest number of an output. " + CRITERION
        verdicts = [one.agrees for one in self.comparisons]
        return Table(self.title, header, rows, [*wrong, *self.notes, units], verdicts=verdicts)

    def _tables(self) -> list[Table]:
        shown = [self.table()]
        if self.coverage is not None and any(row.reason for row in self.coverage.rows):
            shown.append(self.coverage.table())
        return shown

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._tables()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self._tables())

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        for number, table in enumerate(self._tables()):
            if number > 0:
                yield ""
            yield table
