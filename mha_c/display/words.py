# SPDX-License-Identifier: Apache-2.0
"""Words for people: calls and numbers of things, and text that is no wider than the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

__all__ = ["count", "describe_call", "fill", "terminal_width", "wrap"]


def terminal_width() -> int:
    """The columns of the terminal; 120 if the output is not a terminal."""
    return shutil.get_terminal_size(fallback=(120, 24)).columns


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces alone; all are indented as `text` is.

    Examples
    --------
    >>> wrap("  attn_mask: bool", 12)
    ['  attn_mask:', '  bool']
    """
    indent = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text.strip(),
        max(width, 1),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def fill(text: str) -> str:
    """The text in lines that fit the terminal."""
    return "\n".join(wrap(text, terminal_width()))


def count(number: int, thing: str) -> str:
    """A number of things.

    Examples
    --------
    >>> count(1, "thread"), count(1260, "configuration")
    ('1 thread', '1,260 configurations')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def describe_call(arguments: Mapping[str, Any]) -> str:
    """A call of a layer in one line: inputs and masks as arrays, the other arguments as the layer takes them.

    Examples
    --------
    >>> import numpy as np
    >>> describe_call({"query": np.ones((5, 3, 8)), "is_causal": True, "attn_mask": np.zeros((5, 5), bool)})
    'query (5, 3, 8), attn_mask bool (5, 5), is_causal'
    """
    said = [f"{name} {arguments[name].shape}" for name in ("query", "src", "tgt", "memory") if name in arguments]
    for name, argument in arguments.items():
        if name.endswith("mask") and argument is not None:
            said.append(f"{name} {argument.dtype.name} {argument.shape}")
    said += [name for name, argument in arguments.items() if name.endswith("is_causal") and argument]
    said += [] if arguments.get("need_weights", True) else ["need_weights=False"]
    return ", ".join(said)
