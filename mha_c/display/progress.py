# SPDX-License-Identifier: Apache-2.0
"""Progress bars, if tqdm is installed and the output is a terminal or a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TypeVar

__all__ = ["progress", "say"]

_Item = TypeVar("_Item")


def progress(items: Sequence[_Item], unit: str, description: str | None = None) -> Iterable[_Item]:
    """Iterate over items, each a `unit`, under a bar that vanishes at the end."""
    in_notebook = "ipykernel" in sys.modules and find_spec("ipywidgets") is not None
    if find_spec("tqdm") is None or not (in_notebook or sys.stderr.isatty()):
        return items
    from tqdm.auto import tqdm

    # Without an estimate of the time that is left: it would follow the first item, which is often the slowest.
    shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}]"
    shown: Iterable[_Item] = tqdm(items, unit=unit, desc=description, leave=False, bar_format=shape)
    return shown


def say(text: str) -> None:
    """Print a line, above the bar if there is one."""
    if sys.modules.get("tqdm"):
        from tqdm.auto import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    else:
        print(text, flush=True)
