# SPDX-License-Identifier: Apache-2.0
"""What masks hide, and what looks wrong about them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha_c.advice.calls import decoding_advice
from mha_c.parameters.arrays import as_array

__all__ = ["MaskEffect", "Masks", "look_at_masks"]

#: A finite number this low hides a key as -inf does, beside a key without it: no score makes up for it.
HIDING = -1000.0


@dataclass(frozen=True)
class MaskEffect:
    """What one mask of a call hides.

    Attributes
    ----------
    name : str
        "key_padding_mask", "attn_mask" or "is_causal".
    description : str
        The dtype and the shape of the mask.
    hidden : int
        The number of elements that surely hide a key: True, or -inf.
    size : int
        The number of all elements.
    says : tuple of str
        What the mask does, in sentences.
    warnings : tuple of str
        What looks wrong about the mask.

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

    def __repr__(self) -> str:
        return f"MaskEffect({self.description}: hides {self.hidden:,} of {self.size:,})"


@dataclass(frozen=True)
class Masks:
    """What the masks of a call do together."""

    effects: tuple[MaskEffect, ...]
    visible: int  # pairs of a query and a key, of all items and heads, that no mask hides for certain
    pairs: int  # all of them
    blind: tuple[tuple[int, int, int], ...]  # the first few queries that see no key: item, head and query
    blind_count: int  # how many there are


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
    """What the masks of a call hide, found in little memory: one (L, S) at a time.

    The masks are as `MultiheadAttention.forward` accepts them; `dtype` is the layer's, in which masks are added.

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
        alive = ~_hides(_as_numbers(values, dtype))
        effects.append(_padding_effect(values, alive, _Content.of([values], dtype)))
    causal = np.tri(length, source_length, dtype=bool) if is_causal else None
    attn = None if attn_mask is None else as_array(attn_mask)
    if attn is not None:
        content = _Content.of(attn[None] if attn.ndim == 2 else attn, dtype)
        effects.append(_attn_effect(attn, content))
    if causal is not None:
        seen = int(np.count_nonzero(causal))
        says = (f"is_causal: query l sees the keys 0..l, {_percent(seen, causal.size)} of all pairs.",)
        is_cut = length and alive[:, length:].any()
        warnings = (f"{decoding_advice(length, source_length)}.",) if is_cut else ()
        effects.append(MaskEffect("is_causal", str(causal.shape), causal.size - seen, causal.size, says, warnings))
    visible, blind, blind_count = _count_visible(alive, attn, causal, heads, length, dtype)
    pairs = batch * heads * length * source_length
    return Masks(tuple(effects), visible, pairs, blind, blind_count)


def _count_visible(
    alive: NDArray[np.bool_],
    attn_mask: NDArray[Any] | None,
    causal: NDArray[np.bool_] | None,
    heads: int,
    length: int,
    dtype: np.dtype[Any],
) -> tuple[int, tuple[tuple[int, int, int], ...], int]:
    """The pairs that are visible, the first few queries that see nothing, and how many there are."""
    per_head = attn_mask is not None and attn_mask.ndim == 3
    visible = blind_count = 0
    blind: list[tuple[int, int, int]] = []
    repeats = 1 if per_head else heads  # what holds for one head then holds for all
    page: NDArray[np.bool_] | None = None
    for n, live in enumerate(alive):
        for h in range(heads // repeats):
            if page is None or per_head:
                page = np.ones((length, 1), bool) if causal is None else causal
                if attn_mask is not None:
                    page = page & ~_hides(_as_numbers(attn_mask[n * heads + h] if per_head else attn_mask, dtype))
            counts = np.count_nonzero(page & live, axis=-1)
            visible += repeats * int(counts.sum())
            empty = np.flatnonzero(counts == 0)
            blind_count += repeats * empty.size
            blind += [(n, h, int(query)) for query in empty[: 3 - len(blind)]]
    return visible, tuple(blind), blind_count


def _as_numbers(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A mask as the layer reads it: booleans as they are, numbers in the dtype in which it computes."""
    with np.errstate(all="ignore"):
        return values.astype(values.dtype if values.dtype == bool else dtype, copy=False)


def _hides(numbers: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a mask hides for certain."""
    return numbers if numbers.dtype == bool else np.isneginf(numbers)


@dataclass
class _Content:
    """What is in a mask, found page by page."""

    hidden: int = 0
    hides_diagonal: bool = True  # all of it
    lowest: float = np.inf
    highest: float = -np.inf
    is_not_finite: bool = False  # somewhere, but for -inf
    is_zeros_and_ones: bool = True
    has_low_row: bool = False  # of numbers that are meant to hide, and none that does

    @classmethod
    def of(cls, pages: Iterable[NDArray[Any]], dtype: np.dtype[Any]) -> _Content:
        content = cls()
        for page in pages:
            numbers = _as_numbers(page, dtype)
            hides = _hides(numbers)
            content.hidden += int(np.count_nonzero(hides))
            content.hides_diagonal &= bool(hides.diagonal().all())
            if numbers.dtype != bool and numbers.size:
                content._add(numbers)
        return content

    def _add(self, numbers: NDArray[Any]) -> None:
        finite = np.isfinite(numbers)
        self.lowest = min(self.lowest, float(numbers.min(where=finite, initial=np.inf)))
        self.highest = max(self.highest, float(numbers.max(where=finite, initial=-np.inf)))
        self.is_not_finite |= bool(np.isnan(numbers).any() or np.isposinf(numbers).any())
        self.is_zeros_and_ones &= bool(((numbers == 0) | (numbers == 1)).all())
        highest = numbers.max(axis=-1)
        self.has_low_row |= bool((np.isfinite(highest) & (highest <= HIDING) & finite.all(axis=-1)).any())

    def says(self, name: str) -> list[str]:
        """What it adds to scores."""
        if self.lowest > self.highest or self.lowest == self.highest == 0:
            return []
        return [f"{name} adds {self.lowest:.4g} to {self.highest:.4g} to the scores of the others."]

    def warnings(self, name: str) -> list[str]:
        """What goes wrong with masks of numbers alone."""
        warnings = []
        if self.is_not_finite:
            warnings.append(f"{name} holds NaN or infinity: every row that it is added to becomes NaN.")
        if self.is_zeros_and_ones and self.highest == 1:
            visible = "the tokens" if name == "key_padding_mask" else "what a query may see"
            warnings.append(
                f"{name} holds only the numbers 0 and 1, which are added to the scores and hide nothing. If 1 marks "
                f"{visible}, pass mask == 0; if 1 marks what to hide, pass mask == 1."
            )
        if self.has_low_row:
            warnings.append(
                f"{name} adds {HIDING:.0f} or less to every key of some row. A finite number that is added to all keys "
                "hides none of them. -inf hides them."
            )
        return warnings


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    if 99.9 < share < 100:
        return "almost 100%"
    return f"{share:.3g}%" if share >= 1 else f"{share:.2g}%"


def _effect(name: str, values: NDArray[Any], content: _Content, says: str, warnings: list[str]) -> MaskEffect:
    description = f"{name}, {values.dtype.name} {values.shape}"
    return MaskEffect(
        name=name,
        description=description,
        hidden=content.hidden,
        size=values.size,
        says=(f"{description}: {says}", *content.says(name)),
        warnings=(*warnings, *content.warnings(name)),
    )


def _padding_effect(values: NDArray[Any], alive: NDArray[np.bool_], content: _Content) -> MaskEffect:
    live = alive.sum(axis=1)
    kept = f"{live.min()} to {live.max()}" if live.size and live.min() < live.max() else f"{live[:1].sum()}"
    gone = np.flatnonzero(live == 0) if values.shape[1] else np.empty(0, int)
    says = f"hides {content.hidden} of {values.size} keys; the items keep {kept} of {values.shape[1]}."
    return _effect("key_padding_mask", values, content, says, _padding_warnings(values, gone, content.hidden))


def _padding_warnings(values: NDArray[Any], gone: NDArray[np.intp], hidden: int) -> list[str]:
    """What looks wrong about a padding mask that hides `hidden` keys, and every key of the items `gone`."""
    hides = values if values.dtype == bool else values <= HIDING
    # Every item hides its first keys and only those, as padding on the left does, and inverted padding on the right.
    hides_beginnings = bool(hides.size) and bool(hides[:, 0].all()) and not (hides[:, 1:] > hides[:, :-1]).any()
    cure = "A low number hides a key; a mask whose low numbers mark the tokens is passed as mask == 0."
    if values.dtype == bool:
        cure = "True hides a key; a mask whose True marks the tokens, as in Hugging Face's models, is passed as ~mask."
    if gone.size and (hides_beginnings or 2 * hidden > values.size):
        share = _percent(hidden, values.size)
        return [f"key_padding_mask looks inverted: it hides {share} of the keys, and all of item {gone[0]}. {cure}"]
    if gone.size:
        items = f"{gone.size} items, the first being item {gone[0]}" if gone.size > 1 else f"item {gone[0]}"
        return [f"key_padding_mask hides every key of {items}."]
    if hides_beginnings and not hides[:, -1].all():
        return [
            "key_padding_mask hides the first keys of every item and shows all others. Is this batch padded on the "
            f"left? If it is padded on the right, the mask is inverted. {cure}"
        ]
    return []


def _attn_effect(values: NDArray[Any], content: _Content) -> MaskEffect:
    name = "attn_mask"
    length, source_length = values.shape[-2:]
    share = _percent(content.hidden, values.size)
    warnings = []
    if length == source_length > 1 and content.hides_diagonal and 2 * content.hidden > values.size:
        warnings.append(
            f"{name} looks inverted: it hides {share} of the pairs, including every query's own position. True hides a "
            "key here and shows one in scaled_dot_product_attention, whose masks are passed as ~mask."
        )
    says = f"hides {share if content.hidden else 'none'} of its pairs of query and key."
    return _effect(name, values, content, says, warnings)
