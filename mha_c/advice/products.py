# SPDX-License-Identifier: Apache-2.0
"""Calls of scaled_dot_product_attention that are refused: which argument does not fit, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mha_c.advice.arguments import (
    Advice,
    Argument,
    add_advice,
    advice_on_integers,
    advice_on_objects,
    distinct,
    dtypes_of,
    listed,
)
from mha_c.parameters.dtypes import DTYPES, DTYPE_NAMES

__all__ = ["advise_on_product"]


def advise_on_product(error: Exception, query: Any, key: Any, value: Any, attn_mask: Any, enable_gqa: bool) -> None:
    """Add to the words with which a call was refused what does not fit, in NumPy's words, and what to write.

    Parameters
    ----------
    error : Exception
        What the call raised.
    query, key, value, attn_mask, enable_gqa
        As they were passed.

    Examples
    --------
    >>> error = RuntimeError("The size of tensor a (8) must match the size of tensor b (2)")
    >>> query, key = np.zeros((1, 8, 3, 4), np.float32), np.zeros((1, 2, 5, 4), np.float32)
    >>> advise_on_product(error, query, key, key, None, False)
    >>> str(error).partition(". ")[2]
    'query has 8 heads and key 2: for groups of heads that share a key head, pass enable_gqa=True.'
    """

    def advice() -> Iterator[Advice]:
        yield from advice_on_objects(DTYPES[0], query=query, key=key, value=value, attn_mask=attn_mask)
        inputs = q, k, v = Argument.of("query", query), Argument.of("key", key), Argument.of("value", value)
        mask = None if attn_mask is None else Argument.of("attn_mask", attn_mask)
        if len({one.dtype for one in inputs}) > 1:
            yield from _advice_on_dtypes(inputs, leads=False)
        if any(len(one.shape) < 2 for one in inputs):
            return
        yield from advice_on_integers(mask, shows=True)
        yield from _advice_on_dtypes(inputs, leads=True)
        yield from _advice_on_shapes(q, k, v, mask, enable_gqa)

    add_advice(error, advice())


def _advice_on_dtypes(inputs: Sequence[Argument], leads: bool) -> Iterator[Advice]:
    """Inputs that are not all of one dtype of layers. The first one that is says what the others are to be."""
    dtype = next((one.dtype for one in inputs if one.dtype in DTYPES), "float32")
    wrong = distinct(one for one in inputs if one.dtype != dtype)
    if wrong:
        right = distinct(one for one in inputs if one.dtype == dtype)
        reason = dtypes_of(right) if right else f"attention takes {DTYPE_NAMES}"
        cure = f": pass {listed(one.cast(dtype) for one in wrong)}" if all(one.has_numbers for one in wrong) else ""
        yield Advice(f"{dtypes_of(wrong)}, but {reason}{cure}", leads)


def _advice_on_shapes(
    query: Argument, key: Argument, value: Argument, mask: Argument | None, enable_gqa: bool
) -> Iterator[Advice]:
    """Shapes that do not fit, in the order in which torch meets them."""
    lead = query.shape[:-2]
    if enable_gqa:
        if any(len(one.shape) < 3 for one in (query, key, value)):
            yield Advice("With enable_gqa=True, query, key and value have an axis of heads before the last two")
            return
        for one in (key, value):
            if one.shape[-3] and lead[-1] % one.shape[-3]:
                yield Advice(f"query has {lead[-1]} heads, which the {one.shape[-3]} heads of {one.name} do not divide")
    scores = _broadcast(lead, _lead(key, lead, enable_gqa))
    if scores is None:
        yield from _advice_on_leads(query, key)
        return
    if query.shape[-1] != key.shape[-1]:
        yield Advice(f"query has {query.shape[-1]} features and key {key.shape[-1]}: they must have the same number")
    yield from _advice_on_mask(mask, (*scores, query.shape[-2], key.shape[-2]))
    if _broadcast(scores, _lead(value, lead, enable_gqa)) is None:
        yield from _advice_on_leads(query, value)
    elif key.shape[-2] != value.shape[-2]:
        found = f"key has {key.shape[-2]} positions and value {value.shape[-2]}"
        yield Advice(f"{found}: there must be one value for each key")


def _lead(argument: Argument, of_query: tuple[int, ...], enable_gqa: bool) -> tuple[int, ...]:
    """The axes before the last two, with as many heads as the query has where they are grouped."""
    return (*argument.shape[:-3], of_query[-1]) if enable_gqa else argument.shape[:-2]


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        return None


def _advice_on_leads(query: Argument, other: Argument) -> Iterator[Advice]:
    lead, other_lead = query.shape[:-2], other.shape[:-2]
    if lead and other_lead and _broadcast(lead[:-1], other_lead[:-1]) is not None:
        advice = f"query has {lead[-1]} heads and {other.name} {other_lead[-1]}"
        if other_lead[-1] and lead[-1] % other_lead[-1] == 0:
            advice += ": for groups of heads that share a key head, pass enable_gqa=True"
    else:
        advice = f"The axes before the last two must broadcast: query has {lead}, {other.name} {other_lead}"
    yield Advice(advice)


def _advice_on_mask(mask: Argument | None, scores: tuple[int, ...]) -> Iterator[Advice]:
    """What the shape of a mask that does not broadcast to the scores, (..., L, S), may mean."""
    if mask is None or len(mask.shape) > 1 and _broadcast(mask.shape, scores) == scores:
        return
    *lead, length, s = scores
    meanings: dict[tuple[int, ...], tuple[str, str]] = {
        (s, length): (": it has keys by queries, the wrong way round", "attn_mask.T"),
    }
    if len(lead) == 2:
        n, h = lead
        meanings |= {
            (s,): (" of one row of keys for all items", "attn_mask[None]"),
            (n, s): (" of one row of keys for each item", "attn_mask[:, None, None]"),
            (n, length, s): (" of one mask for each item", "attn_mask[:, None]"),
            (n * h, length, s): (" of one mask for each item and head", f"attn_mask.reshape({n}, {h}, {length}, {s})"),
        }
    if mask.shape in meanings:
        meaning, code = meanings[mask.shape]
        yield Advice(f"attn_mask has the shape {mask.shape}{meaning}: pass {code}")
    elif _broadcast(mask.shape, scores) != scores:
        yield Advice(f"attn_mask has the shape {mask.shape}, which does not broadcast to the scores, {scores}")
