# SPDX-License-Identifier: Apache-2.0
"""Calls of a layer that are refused: which argument does not fit, and what to write instead."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

from mha_c.advice.arguments import (
    Advice,
    Argument,
    advice_on_integers,
    advice_on_objects,
    advice_on_tokens,
    distinct,
    dtypes_of,
    listed,
    shape_of,
)
from mha_c.advice.masks import fits, meaning_of_mask
from mha_c.parameters.dtypes import DTYPES

__all__ = ["advice_on_call", "decoding_advice", "warn_of_decoding"]


def decoding_advice(length: int | str, source_length: int | str) -> str:
    """What is_causal=True does where there are fewer queries than keys, and what to write instead.

    Parameters
    ----------
    length, source_length : int or str
        How many queries and keys there are, as numbers or as code.

    Returns
    -------
    str
        Without a full stop.
    """
    return (
        "is_causal=True lets query l see the keys 0..l, counted from the first key, and there are fewer queries than "
        "keys. If the queries are the last positions of the keys, as in decoding, leave it out and pass "
        f"attn_mask=~np.tri({length}, {source_length}, {source_length} - {length}, dtype=bool)"
    )


def warn_of_decoding(query: Any, key: Any, batch_first: bool) -> None:
    """Warn the caller's caller where is_causal=True hides keys that a decoder's queries ought to see.

    The text does not depend on the sizes, so that a loop that decodes is warned once.
    """
    length = source_length = 0
    with suppress(Exception):  # the core has words for what has no length
        length, source_length = (_length(shape_of(value), batch_first) for value in (query, key))
    if length < source_length:
        warnings.warn(f"{decoding_advice('L', 'S')}, for L queries and S keys", UserWarning, stacklevel=3)


def advice_on_call(
    flags: Mapping[str, Any],
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any,
    attn_mask: Any,
    *,
    names: Mapping[str, str] = MappingProxyType({}),
    num_heads: int,
    features: tuple[int, int | None, int | None],
    parameters: Iterable[Any],
    extra_keys: int,
    batch_first: bool | None,
    other_dtypes: Collection[str] = (),
) -> Iterator[Advice]:
    """What does not fit in a call of an attention layer, perhaps in a layer whose arguments have other names.

    Parameters
    ----------
    flags : mapping of str to object
        The arguments that are True or False.
    query, key, value, key_padding_mask, attn_mask
        As they were passed.
    names : mapping of str to str, default {}
        What the caller knows as "query", "key", "value", "key_padding_mask", "attn_mask", and the widths.
    num_heads : int
        Heads.
    features : tuple of int
        embed_dim, kdim and vdim; None for what is not checked.
    parameters : iterable of array, tensor or None
        The parameters, for their dtype. If they have none in common, they are what was refused.
    extra_keys : int
        How many keys are appended.
    batch_first : bool or None
        The layer's. None: it is a function, which has none.
    other_dtypes : collection of str, default ()
        The dtypes to which the layer may be cast.

    Yields
    ------
    Advice

    Examples
    --------
    >>> import numpy as np
    >>> x = np.zeros((5, 3, 6), np.float32)
    >>> layer = dict(num_heads=2, features=(8, 8, 8), parameters=[x], extra_keys=0, batch_first=False)
    >>> next(advice_on_call({}, x, x, x, None, None, names={"query": "src", "embed_dim": "d_model"}, **layer)).sentence
    'src has 6 features, but d_model is 8'
    """
    inputs = {"query": query, "key": key, "value": value}
    masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}

    def named(value: Any, name: str) -> Argument:
        return Argument.of(names.get(name, name), value)

    def advice() -> Iterator[Advice]:
        yield from _advice_on_flags(flags)
        dtypes = {Argument.of("", one).dtype for one in parameters if one is not None}
        if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
            return
        dtype = dtypes.pop()
        yield from advice_on_objects(dtype, **{names.get(name, name): one for name, one in inputs.items()}, **masks)
        q, k, v = (named(one, name) for name, one in inputs.items())
        padding, mask = (None if item[1] is None else Argument.of(*item) for item in masks.items())
        widths_are_free = "kdim" not in names
        call = _Call(
            q, k, v, padding, mask, num_heads, features, widths_are_free, dtype, extra_keys, batch_first, other_dtypes
        )  # fmt: skip
        yield from call.advice()

    others = {own: other for own, other in names.items() if own not in inputs}
    pattern = r"\b(%s)(?!\w)" % "|".join(map(re.escape, others)) if others else "(?!)"
    for sentence, leads in advice():
        yield Advice(re.sub(pattern, lambda match: others[match[1]], sentence), leads)


def _advice_on_flags(flags: Mapping[str, Any]) -> Iterator[Advice]:
    for name, flag in flags.items():
        if math.prod(getattr(flag, "shape", ())) != 1:
            yield Advice(f"{name} is an array: pass a mask by its name, attn_mask= or key_padding_mask=")


def _length(shape: tuple[int, ...], batch_first: bool | None) -> int:
    """Queries or keys of an item."""
    return shape[1 if batch_first and len(shape) == 3 else 0]


class _Call(NamedTuple):
    """A refused call. Each of its checks may rely on those before it, which are in the order of torch's."""

    query: Argument
    key: Argument
    value: Argument
    key_padding_mask: Argument | None
    attn_mask: Argument | None
    num_heads: int
    features: tuple[int, int | None, int | None]
    widths_are_free: bool
    """Whether a layer can be made whose keys and values have widths of their own."""
    dtype: str
    extra_keys: int
    batch_first: bool | None
    other_dtypes: Collection[str]

    def advice(self) -> Iterator[Advice]:
        yield from self._on_tokens()
        yield from advice_on_integers(self.key_padding_mask, shows=False)
        yield from advice_on_integers(self.attn_mask, shows=False)
        yield from self._on_ranks()
        yield from self._on_ranks_of_masks()
        yield from self._on_features_of_query()
        yield from self._on_key_beside_value()
        yield from self._on_dtypes()
        yield from self._on_features()
        yield from self._on_attn_mask()
        yield from self._on_batches()
        yield from self._on_key_padding_mask()

    # ---- Sizes

    @property
    def is_function(self) -> bool:
        return self.batch_first is None

    @property
    def is_batched(self) -> bool:
        return len(self.query.shape) == 3

    def _batch(self, argument: Argument) -> int:
        return argument.shape[0 if self.batch_first else 1] if self.is_batched else 1

    def _sizes(self) -> dict[str, int]:
        length, source_length = _length(self.query.shape, self.batch_first), _length(self.key.shape, self.batch_first)
        sizes = {"N": self._batch(self.query), "H": self.num_heads, "L": length, "S": source_length}
        return {**sizes, "X": source_length + self.extra_keys} if self.extra_keys else sizes

    def _sizes_in_the_other_layout(self) -> dict[str, int] | None:
        """The sizes if the inputs had the batch on the other axis, where they agree about it then."""
        sizes = self._sizes()
        if not self.is_batched or sizes["L"] != sizes["S"]:
            return None
        return {**sizes, "N": sizes["L"], "L": self._batch(self.query), "S": self._batch(self.key)}

    def _cure_of_the_layout(self) -> str:
        axis = "second" if self.batch_first else "first"
        cure = f"set layer.batch_first = {not self.batch_first}"
        if self.is_function:
            cure = "pass query.swapaxes(0, 1), key.swapaxes(0, 1) and value.swapaxes(0, 1)"
        return f"if the batch is the {axis} axis of {listed(self._names(self.query, self.key, self.value))}, {cure}"

    @staticmethod
    def _names(*arguments: Argument) -> list[str]:
        """Their names, each once: one argument of a layer may be key and value of the attention in it."""
        return list(dict.fromkeys(one.name for one in arguments))

    # ---- What may be wrong

    def _expected_input(self, features: int | None) -> str:
        batched = f"(batch, length, {features})" if self.batch_first else f"(length, batch, {features})"
        return f"{batched}, or (length, {features}) without a batch"

    def _on_tokens(self) -> Iterator[Advice]:
        for one, features in zip((self.query, self.key, self.value), self.features):
            if one.shape[-1:] != (features,):
                yield from advice_on_tokens(one, self._expected_input(features))

    def _on_ranks(self) -> Iterator[Advice]:
        shapes = [one.shape for one in (self.query, self.key, self.value)]
        if len(self.query.shape) not in (2, 3):
            expected = self._expected_input(self.features[0])
            yield Advice(f"{self.query.name} has the shape {self.query.shape}: it must be {expected}")
        if len({len(shape) for shape in shapes}) > 1:
            others = list(dict.fromkeys(f"{one.name} {one.shape}" for one in (self.key, self.value)))
            found = f"{self.query.name} has the shape {shapes[0]}, {listed(others)}"
            yield Advice(f"{found}: give {'all three' if others[1:] else 'both'} a batch axis, or none")

    def _on_ranks_of_masks(self) -> Iterator[Advice]:
        if self.key_padding_mask is not None and len(self.key_padding_mask.shape) != len(self.query.shape) - 1:
            yield self._on_mask(self.key_padding_mask)
        if self.attn_mask is not None and len(self.attn_mask.shape) not in (2, 3):
            yield self._on_mask(self.attn_mask)

    def _on_features_of_query(self) -> Iterator[Advice]:
        if self.query.shape[-1] != self.features[0]:
            found = f"{self.query.name} has {self.query.shape[-1]} features"
            yield Advice(f"{found}, but embed_dim is {self.features[0]}")

    def _on_key_beside_value(self) -> Iterator[Advice]:
        """Where torch compares their shapes, in words that have the batch on the second axis."""
        keys, values = (_length(one.shape, self.batch_first) for one in (self.key, self.value))
        key_batch, value_batch = self._batch(self.key), self._batch(self.value)
        differences = []
        if keys != values:
            differences.append(f"key has {keys} positions and value {values}")
        if key_batch != value_batch:
            differences.append(f"key has a batch of {key_batch} and value of {value_batch}")
        passed = ""
        if self.batch_first and self.is_batched:
            passed = f" (as passed, with the batch first: key {self.key.shape}, value {self.value.shape})"
        if differences:
            yield Advice(f"{listed(differences)}: there must be one value for each key{passed}")
        if self.key.shape[-1] != self.value.shape[-1] or len(set(self.features)) > 1:
            yield from (Advice(sentence + passed) for sentence, _ in self._on_features())

    def _on_features(self) -> Iterator[Advice]:
        inputs = (("kdim", self.key, self.features[1]), ("vdim", self.value, self.features[2]))
        wrong = [(name, one, width) for name, one, width in inputs if width not in (None, one.shape[-1])]
        if not wrong:
            return
        if wrong[0][1].name == wrong[-1][1].name:  # one argument is key and value
            wrong = wrong[:1]
        found = ", and ".join(f"{one.name} has {one.shape[-1]} features, but {name} is {w}" for name, one, w in wrong)
        if self.is_function:
            found += ": use_separate_proj_weight=True allows other widths"
        elif self.widths_are_free:
            found += f": make the layer with {listed(f'{name}={one.shape[-1]}' for name, one, _ in wrong)}"
        yield Advice(found, leads=True)

    def _on_dtypes(self) -> Iterator[Advice]:
        inputs = (self.query, self.key, self.value)
        wrong = distinct(one for one in inputs if one.dtype != self.dtype)
        if not wrong:
            return
        found = f"{dtypes_of(wrong)}, but {'the weights are' if self.is_function else 'this layer is'} {self.dtype}"
        if not all(one.has_numbers for one in wrong):
            yield Advice(found, leads=True)
            return
        cure = f"pass {listed(one.cast(self.dtype) for one in wrong)}"
        dtype = self.query.dtype
        if dtype in self.other_dtypes and all(one.dtype == dtype for one in inputs):
            cure += f', or make the layer {dtype} with layer.to("{dtype}")'
        yield Advice(f"{found}: {cure}", leads=True)

    def _on_attn_mask(self) -> Iterator[Advice]:
        if self.attn_mask is not None and not fits("attn_mask", self.attn_mask.shape, self._sizes()):
            yield self._on_mask(self.attn_mask)

    def _on_batches(self) -> Iterator[Advice]:
        of_query, of_key = self._batch(self.query), self._batch(self.key)
        if of_query == of_key:
            return
        others = self._names(self.key, self.value)
        sentence = f"{self.query.name} has a batch of {of_query}, {listed(others)} of {of_key}"
        if 1 in (of_query, of_key):
            shared = [self.query] if of_query == 1 else [self.key, self.value][: len(others)]
            cure = listed(f"np.broadcast_to({one.name}, {self._with_batch(one, of_query * of_key)})" for one in shared)
            sentence += f": if all items share {listed(one.name for one in shared)}, pass {cure}"
        if self._sizes_in_the_other_layout() is not None:
            sentence += f"; {self._cure_of_the_layout()}"
        yield Advice(sentence, leads=True)

    def _with_batch(self, argument: Argument, batch: int) -> tuple[int, ...]:
        length, features = _length(argument.shape, self.batch_first), argument.shape[-1]
        return (batch, length, features) if self.batch_first else (length, batch, features)

    def _on_key_padding_mask(self) -> Iterator[Advice]:
        n, s = self._batch(self.query), self._sizes()["S"]
        if self.key_padding_mask is not None and self.key_padding_mask.shape != ((n, s) if self.is_batched else (s,)):
            yield self._on_mask(self.key_padding_mask)

    def _on_mask(self, mask: Argument) -> Advice:
        sizes, other = self._sizes(), self._sizes_in_the_other_layout()
        meanings = meaning_of_mask(mask.name, mask.shape, sizes, self.is_batched)
        sentence = f"{mask.name} has the shape {mask.shape}"
        if meanings:
            sentence += f" {'; or '.join(meanings)}"
        if other is not None and fits(mask.name, mask.shape, other):
            sentence += f"; {self._cure_of_the_layout()}"
        elif not meanings:
            sentence += f": it must be {self._expected(mask.name, sizes)}"
        return Advice(sentence)

    def _expected(self, name: str, sizes: Mapping[str, int]) -> str:
        n, h, length, s = (sizes[axis] for axis in "NHLS")
        if name == "attn_mask":
            three = f"(N * H, L, S) = {(n * h, length, s)}" if self.is_batched else f"(H, L, S) = {(h, length, s)}"
            return f"(L, S) = {(length, s)} or {three}"
        return f"(N, S) = {(n, s)}" if self.is_batched else f"(S,) = {(s,)}"
