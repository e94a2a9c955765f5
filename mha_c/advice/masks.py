# SPDX-License-Identifier: Apache-2.0
"""What masks of other shapes than the layer's mean, and how they are converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

__all__ = ["fits", "meaning_of_mask"]


class _Reading(NamedTuple):
    """What a shape may mean."""

    axes: str  # N items, H heads, L queries, S keys, NH = N * H; X: S and the appended keys, T: S where it exceeds L
    meaning: str
    target: str = ""  # the argument that it belongs to; the one as which it was passed unless given
    code: str = ""  # what to pass


_ONE = "of one mask for all items and heads"
_OF_ITEMS = "of one mask for each item"
_OF_HEADS = "of one mask for each head"
_OF_BOTH = "of one mask for each item and head"
_ROWS = "of one row of keys for each item"
_ROW = "of one row of keys for all items"

_BATCHED: Final = (
    _Reading("L S", _ONE, "attn_mask", "{mask}"),
    _Reading("NH L S", _OF_BOTH, "attn_mask", "{mask}"),
    _Reading("N H L S", _OF_BOTH, "attn_mask", "{mask}.reshape({NH}, {L}, {S})"),
    _Reading("N L S", _OF_ITEMS, "attn_mask", "np.repeat({mask}, {H}, axis=0)"),
    _Reading("H L S", _OF_HEADS, "attn_mask", "np.tile({mask}, ({N}, 1, 1))"),
    _Reading("N 1 L S", _OF_ITEMS, "attn_mask", "np.repeat({mask}[:, 0], {H}, axis=0)"),
    _Reading("1 H L S", _OF_HEADS, "attn_mask", "np.tile({mask}[0], ({N}, 1, 1))"),
    _Reading("1 1 L S", _ONE, "attn_mask", "{mask}[0, 0]"),
    _Reading("1 L S", _ONE, "attn_mask", "{mask}[0]"),
    _Reading("N S", _ROWS, "key_padding_mask", "{mask}"),
    _Reading("N 1 S", _ROWS, "key_padding_mask", "{mask}[:, 0]"),
    _Reading("N 1 1 S", _ROWS, "key_padding_mask", "{mask}[:, 0, 0]"),
    _Reading("S", _ROW, "key_padding_mask", "np.broadcast_to({mask}, ({N}, {S}))"),
    _Reading("1 S", _ROW, "key_padding_mask", "np.broadcast_to({mask}, ({N}, {S}))"),
)
_UNBATCHED: Final = (
    _Reading("L S", "of one mask for all heads", "attn_mask", "{mask}"),
    _Reading("H L S", _OF_HEADS, "attn_mask", "{mask}"),
    _Reading("1 H L S", _OF_HEADS, "attn_mask", "{mask}[0]"),
    _Reading("1 1 L S", "of one mask for all heads", "attn_mask", "{mask}[0, 0]"),
    _Reading("1 L S", "of one mask for all heads", "attn_mask", "{mask}[0]"),
    _Reading("S", "of one row of keys", "key_padding_mask", "{mask}"),
    _Reading("1 S", "of one row of keys", "key_padding_mask", "{mask}[0]"),
    _Reading("1 1 S", "of one row of keys", "key_padding_mask", "{mask}[0, 0]"),
)
_TURNED = "of keys by queries, the wrong way round"
_APPENDED = "with columns for the keys that the layer appends, which every query sees"
_OF_ITS_OWN: Final = {
    "attn_mask": (
        _Reading("S L", _TURNED, code="{mask}.T"),
        _Reading("NH S L", _TURNED, code="{mask}.swapaxes(1, 2)"),
        _Reading("T T", "of all {S} keys by themselves; if the queries are the last {L}", code="{mask}[-{L}:]"),
        _Reading("L 1", "of one number for each query", code="np.broadcast_to({mask}, ({L}, {S}))"),
        _Reading("L X", _APPENDED, code="{mask}[:, :{S}]"),
        _Reading("NH L X", _APPENDED, code="{mask}[:, :, :{S}]"),
    ),
    "key_padding_mask": (
        _Reading("S N", "of keys by items, the wrong way round", code="{mask}.T"),
        _Reading("N X", _APPENDED, code="{mask}[:, :{S}]"),
        _Reading("N L", "of one number for each of the {L} queries of an item; it needs one for each of the {S} keys"),
    ),
}


def fits(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> bool:
    """Whether a mask of a batched call has a shape that the layer takes."""
    n, h, length, s = (sizes[axis] for axis in "NHLS")
    return shape in ([(length, s), (n * h, length, s)] if name == "attn_mask" else [(n, s)])


def meaning_of_mask(name: str, shape: tuple[int, ...], sizes: Mapping[str, int], is_batched: bool) -> list[str]:
    """Every meaning that the shape of a mask may have, and what to pass then.

    Parameters
    ----------
    name : {"attn_mask", "key_padding_mask"}
        As which it was passed.
    shape : tuple of int
        Its shape, which does not fit.
    sizes : mapping of str to int
        N, H, L and S; and X, where keys are appended.
    is_batched : bool
        Whether the inputs have a batch axis.

    Returns
    -------
    list of str
        Phrases that go on after "has the shape (...)". An axis of 1 stands for all only where nothing else explains it.

    Examples
    --------
    >>> meaning_of_mask("attn_mask", (3, 16), {"N": 3, "H": 4, "L": 16, "S": 16}, True)
    ['of one row of keys for each item: pass key_padding_mask=attn_mask']
    """
    sizes = {"1": 1, "NH": sizes["N"] * sizes["H"], **sizes}
    if sizes["L"] < sizes["S"]:
        sizes["T"] = sizes["S"]
    own = _OF_ITS_OWN[name] if is_batched or name == "attn_mask" else ()
    found: dict[int, list[str]] = {}
    for axes, meaning, target, code in (*(_BATCHED if is_batched else _UNBATCHED), *own):
        names = axes.split()
        if shape != tuple(sizes.get(axis, -1) for axis in names):
            continue
        passed = code if target in ("", name) else f"{target}={code}"
        phrase = f"{meaning}: pass {passed}" if code else meaning
        found.setdefault(names.count("1"), []).append(phrase.format(mask=name, **sizes))
    return found[min(found)] if found else []
