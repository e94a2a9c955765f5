# SPDX-License-Identifier: Apache-2.0
"""How far long work has come, where tqdm is installed and somebody is looking."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TypeVar

__all__ = ["progress", "say"]

_Item = TypeVar("_Item")


def progress(items: Sequence[_Item], unit: str, description: str | None = None) -> Iterable[_Item]:
    """Go through items, showing how many are done: in a terminal, or in a notebook that has ipywidgets.

    The bar vanishes at the end. Without tqdm, and where the output goes to a file, nothing is shown.

    Parameters
    ----------
    items : sequence
        What to go through.
    unit : str
        What one of them is.
    description : str, optional
        What stands before the bar.

    Returns
    -------
    iterable
        The items.

    Examples
    --------
    >>> sum(progress([1, 2, 3], "number"))
    6
    """
    if find_spec("tqdm") is None:
        return items
    in_notebook = "ipykernel" in sys.modules and find_spec("ipywidgets") is not None
    bar = import_module("tqdm.notebook" if in_notebook else "tqdm").tqdm
    is_hidden = False if in_notebook else None  # None: unless the output is a terminal
    shown: Iterable[_Item] = bar(items, unit=unit, desc=description, disable=is_hidden, leave=False)
    return shown


def say(text: str) -> None:
    """Print a line above the bar, if there is one.

    Examples
    --------
    >>> say("done")
    done
    """
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    else:
        print(text, flush=True)
