# SPDX-License-Identifier: Apache-2.0
"""What masks hide, and what about them looks wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha_c.parameters import as_array

__all__ = ["MaskEffect", "Masks", "look_at_masks"]

#: A finite number this low hides a key as -inf does, next to one that it is not added to: no score makes up for it.
HIDING = -1000.0


@dataclass(frozen=True)
class MaskEffect:
    """What one mask does.

    Attributes
    ----------
    name : str
        "key_padding_mask", "attn_mask" or "is_causal".
    description : str
        Its dtype and shape.
    hidden : int
        The elements that hide a key for certain: True, or -inf.
    size : int
        All of its elements.
    says : tuple of str
        What it does, in sentences.
    warnings : tuple of str
        What looks wrong about it.

    Examples
    --------
    >>> masks = look_at_masks(None, np.tri(4, dtype=bool), False, 1, 1, 4, 4, np.dtype("float32"))
    >>> masks.effects[0].hidden, masks.effects[0].warnings[0][:40]
    (10, 'attn_mask looks inverted: it hides 62.5%')
    """

    name: str
    description: str
    hidden: int
    size: int
    says: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Masks:
    """What the masks of a call do together.

    Attributes
    ----------
    effects : tuple of MaskEffect
        Each of them.
    visible : int
        Pairs of a query and a key, of all items and heads, that no mask hides for certain.
    pairs : int
        All of them.
    live_keys : tuple of int
        For each item, the keys that key_padding_mask leaves.
    blind : tuple of (int, int, int)
        The first few queries that see no key: item, head and query.
    blind_count : int
        How many there are.

    Examples
    --------
    >>> masks = look_at_masks(np.array([[False, True], [True, True]]), None, True, 2, 1, 2, 2, np.dtype("float32"))
    >>> masks.visible, masks.pairs, masks.live_keys, masks.blind
    (2, 8, (1, 0), ((1, 0, 0), (1, 0, 1)))
    """

    effects: tuple[MaskEffect, ...]
    visible: int
    pairs: int
    live_keys: tuple[int, ...]
    blind: tuple[tuple[int, int, int], ...]
    blind_count: int


def look_at_masks(
    key_padding_mask: Any,
    attn_mask: Any,
    is_causal: bool,
    batch: int,
    heads: int,
    length: int,
    source_length: int,
    dtype: np.dtype[Any],
) -> Masks:
    """Find out what the masks of a call hide, in little memory: one (L, S) at a time.

    Parameters
    ----------
    key_padding_mask : array, (N, S) or (S,), or None
    attn_mask : array, (L, S) or (N * H, L, S), or None
    is_causal : bool
        As for `MultiheadAttention.forward`, which accepts them.
    batch, heads, length, source_length : int
        N, H, L and S.
    dtype : numpy.dtype
        The layer's, in which masks are added.

    Returns
    -------
    Masks

    Examples
    --------
    >>> masks = look_at_masks(None, None, True, 3, 2, 4, 4, np.dtype("float32"))
    >>> masks.effects[0].says
    ('is_causal: query l sees the keys 0..l, 62.5% of all pairs.',)
    """
    effects = []
    alive = np.ones((batch, source_length), bool)
    if key_padding_mask is not None:
        values = as_array(key_padding_mask).reshape(batch, source_length)
        alive = ~_hides(values, dtype)
        effects.append(_padding_effect(values, alive, dtype))
    causal = np.tri(length, source_length, dtype=bool) if is_causal else None
    pages = None
    if attn_mask is not None:
        values = as_array(attn_mask)
        pages = values[None] if values.ndim == 2 else values.reshape(batch, heads, length, source_length)
        effects.append(_attn_effect(values, dtype))
    if causal is not None:
        share = _percent(int(causal.sum()), causal.size)
        says = (f"is_causal: query l sees the keys 0..l, {share} of all pairs.",)
        effects.append(MaskEffect("is_causal", f"({length}, {source_length})", int((~causal).sum()), causal.size, says, ()))
    return _together(tuple(effects), alive, pages, causal, (batch, heads, length, source_length), dtype)


def _together(
    effects: tuple[MaskEffect, ...],
    alive: NDArray[np.bool_],
    pages: NDArray[Any] | None,
    causal: NDArray[np.bool_] | None,
    sizes: tuple[int, int, int, int],
    dtype: np.dtype[Any],
) -> Masks:
    """Counts the keys that each query sees; `pages` is (1, L, S), the same for all, or (N, H, L, S)."""
    batch, heads, length, source_length = sizes
    per_head = pages is not None and pages.ndim == 4
    visible = blind_count = 0
    blind: list[tuple[int, int, int]] = []
    page = np.ones((length, source_length), bool) if causal is None else causal
    if pages is not None and not per_head:
        page = page & ~_hides(pages[0], dtype)
    for n in range(batch):
        for h in range(heads if per_head else 1):
            if per_head:
                assert pages is not None
                seen = ~_hides(pages[n, h], dtype)
                page = seen if causal is None else seen & causal
            counts = np.count_nonzero(page & alive[n], axis=-1)
            repeats = 1 if per_head else heads
            visible += repeats * int(counts.sum())
            empty = np.flatnonzero(counts == 0)
            blind_count += repeats * empty.size
            blind += [(n, h, int(query)) for query in empty[: 3 - len(blind)]]
    live_keys = tuple(int(count) for count in alive.sum(axis=1))
    return Masks(effects, visible, batch * heads * length * source_length, live_keys, tuple(blind), blind_count)


def _as_numbers(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def _hides(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[np.bool_]:
    """Where a mask hides for certain."""
    return values if values.dtype == bool else np.isneginf(_as_numbers(values, dtype))


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.3g}%" if part in (0, whole) or 0.1 <= share <= 99.9 else f"{share:.2g}%" if share < 1 else "almost 100%"


def _describe(name: str, values: NDArray[Any]) -> str:
    return f"{name}, {values.dtype.name} {values.shape}"


def _padding_effect(values: NDArray[Any], alive: NDArray[np.bool_], dtype: np.dtype[Any]) -> MaskEffect:
    name = "key_padding_mask"
    hidden = int((~alive).sum())
    live = alive.sum(axis=1)
    range_ = f"{live.min()} to {live.max()}" if live.size and live.min() < live.max() else f"{live[:1].sum()}"
    says = [f"{_describe(name, values)}: hides {hidden} of {values.size} keys; the items keep {range_} of {values.shape[1]}."]
    warnings = []
    gone = np.flatnonzero(live == 0) if values.shape[1] else np.empty(0, int)
    if gone.size and 2 * hidden > values.size:
        warnings.append(
            f"{name} looks inverted: it hides {_percent(hidden, values.size)} of the keys, and all of item {gone[0]}. "
            "True hides a key; a mask in which True or 1 marks the tokens, as Hugging Face's attention_mask, is passed "
            "as ~mask."
        )
    elif gone.size:
        warnings.append(f"{name} hides every key of {gone.size} items, the first of which is item {gone[0]}.")
    return MaskEffect(name, _describe(name, values), hidden, values.size, (*says, *_float_says(name, values, dtype)),
                      (*warnings, *_float_warnings(name, values, dtype)))


def _attn_effect(values: NDArray[Any], dtype: np.dtype[Any]) -> MaskEffect:
    name = "attn_mask"
    pages = values[None] if values.ndim == 2 else values
    hidden = hidden_diagonal = 0
    for page in pages:
        hides = _hides(page, dtype)
        hidden += int(np.count_nonzero(hides))
        hidden_diagonal += int(np.count_nonzero(hides.diagonal()))
    says = [f"{_describe(name, values)}: hides {_percent(hidden, values.size)} of its pairs of query and key."]
    warnings = []
    length, source_length = values.shape[-2:]
    if length == source_length > 1 and hidden_diagonal == len(pages) * length and 2 * hidden > values.size:
        warnings.append(
            f"{name} looks inverted: it hides {_percent(hidden, values.size)} of the pairs, with every query's own "
            "position. True hides a key here; in scaled_dot_product_attention it shows one: such a mask is passed as ~mask."
        )
    return MaskEffect(name, _describe(name, values), hidden, values.size, (*says, *_float_says(name, values, dtype)),
                      (*warnings, *_float_warnings(name, values, dtype)))


def _float_says(name: str, values: NDArray[Any], dtype: np.dtype[Any]) -> list[str]:
    if values.dtype == bool or not values.size:
        return []
    numbers = _as_numbers(values, dtype)
    finite = numbers[np.isfinite(numbers)]
    if not finite.size or not finite.any():
        return []
    return [f"{name} adds {finite.min():.4g} to {finite.max():.4g} to the scores of the others."]


def _float_warnings(name: str, values: NDArray[Any], dtype: np.dtype[Any]) -> list[str]:
    """What goes wrong with float masks alone."""
    if values.dtype == bool or not values.size:
        return []
    numbers = _as_numbers(values, dtype)
    warnings = []
    if np.isnan(numbers).any() or np.isposinf(numbers).any():
        warnings.append(f"{name} has NaN or infinity in it, which makes NaN of every row that it is added to.")
    if (numbers == 1).any() and ((numbers == 0) | (numbers == 1)).all():
        warnings.append(
            f"{name} is made of the numbers 0 and 1, which are added to the scores and hide nothing: "
            "if it is to hide keys, pass mask.astype(bool), True where a key is hidden."
        )
    low = np.isfinite(numbers) & (numbers <= HIDING)
    if numbers.shape[-1] and low.all(axis=-1).any():
        warnings.append(
            f"{name} adds numbers of {HIDING:.0f} or less to every key of some row: finite as they are, they hide none, "
            "and the keys compare with each other as if they were not there. -inf hides."
        )
    return warnings
