# SPDX-License-Identifier: Apache-2.0
"""Calls in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["describe_call"]


def describe_call(arguments: Mapping[str, Any]) -> str:
    """A call of a layer in one line: `query` and masks as arrays, the other arguments as the layer takes them.

    Examples
    --------
    >>> import numpy as np
    >>> describe_call({"query": np.ones((5, 3, 8)), "is_causal": True, "attn_mask": np.zeros((5, 5), bool)})
    'query (5, 3, 8), attn_mask bool (5, 5), is_causal'
    """
    said = [f"query {arguments['query'].shape}"]
    for name, argument in arguments.items():
        if name in ("key_padding_mask", "attn_mask") and argument is not None:
            said.append(f"{name} {argument.dtype.name} {argument.shape}")
    said += ["is_causal"] if arguments.get("is_causal") else []
    said += [] if arguments.get("need_weights", True) else ["need_weights=False"]
    return ", ".join(said)
