# SPDX-License-Identifier: Apache-2.0
"""Calls of a Transformer that are refused: torch's words, what does not fit, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, Final, NamedTuple

from mha_c.advice.arguments import Advice, Argument, add_advice, advice_on_tokens, rename_mask, shape_of
from mha_c.advice.calls import advice_on_call
from mha_c.parameters.arrays import as_array

__all__ = ["AttentionCall", "advise_on_steps", "check_transformer_call"]

_WIDTHS: Final = {
    **dict.fromkeys(("embed_dim", "kdim", "vdim"), "d_model"),
    "set layer.batch_first =": "make the layers with batch_first =",
}


class AttentionCall(NamedTuple):
    """A call of attention in a layer: its arguments, by the names that the caller of the layer knows, and its facts."""

    query_name: str
    query: Any
    key_name: str
    key: Any
    mask_name: str
    mask: Any
    padding_name: str
    padding: Any
    flag_name: str
    is_causal: Any
    facts: Callable[[], Mapping[str, Any]]


def advise_on_steps(error: Exception, *calls: AttentionCall) -> None:
    """Add to the words with which a layer was refused what does not fit, in the names of the layer's own arguments.

    Parameters
    ----------
    error : Exception
        What the call raised.
    *calls : tuple
        The calls of attention in the layer, in their order.

    Examples
    --------
    >>> import numpy as np
    >>> facts = dict(num_heads=2, features=(8, 8, 8), parameters=[np.zeros(1, "f")], extra_keys=0, batch_first=False)
    >>> error = AssertionError("was expecting embedding dimension of 8, but got 6")
    >>> src = np.zeros((5, 3, 6), "f")
    >>> masks = ("src_mask", None, "src_key_padding_mask", None, "is_causal", False)
    >>> call = AttentionCall("src", src, "src", src, *masks, lambda: facts)
    >>> advise_on_steps(error, call)
    >>> str(error)
    'was expecting embedding dimension of 8, but got 6. src has 6 features, but d_model is 8.'
    """
    _name_what_is_no_array(error, calls)
    if len(calls) == 1:
        rename_mask(error, attn_mask=calls[0].mask_name, key_padding_mask=calls[0].padding_name)

    def advice() -> Iterator[Advice]:
        for one in calls:
            names = {"query": one.query_name, "key": one.key_name, "value": one.key_name}
            names |= {"attn_mask": one.mask_name, "key_padding_mask": one.padding_name, **_WIDTHS}
            flags = {one.flag_name: one.is_causal}
            inputs = (one.query, one.key, one.key, one.padding, one.mask)
            yield from advice_on_call(flags, *inputs, names=names, **one.facts())

    add_advice(error, advice())


def _name_what_is_no_array(error: Exception, calls: tuple[AttentionCall, ...]) -> None:
    """Put the name of the layer's argument into the words for what is not an array."""
    if type(error) is not TypeError:
        return
    for one in calls:
        inputs = [(one.query_name, one.query), (one.key_name, one.key)]
        masks = [(one.mask_name, one.mask), (one.padding_name, one.padding)]
        for name, value in inputs + [mask for mask in masks if mask[1] is not None]:
            if hasattr(value, "shape") and not hasattr(value, "filled"):
                continue
            try:
                as_array(value, name=name)
            except TypeError as better:
                vars(error)["_words"] = str(better)
                error.args = better.args
                return


def check_transformer_call(src: Any, tgt: Any, d_model: int, batch_first: bool) -> None:
    """Refuse what torch's Transformer refuses before its encoder is called.

    Parameters
    ----------
    src, tgt : array
        As they were passed.
    d_model : int
        The features of both.
    batch_first : bool
        Whether the first axis of a batch is the batch.

    Raises
    ------
    RuntimeError
        In torch's words, with the shapes.

    Examples
    --------
    >>> import numpy as np
    >>> check_transformer_call(np.zeros((5, 2, 8)), np.zeros((5, 3, 8)), 8, False)
    Traceback (most recent call last):
    RuntimeError: the batch number of src and tgt must be equal. src has a batch of 2, and tgt of 3, on axis 1. \
batch_first=True in the constructor makes it axis 0.
    """
    shapes = {"src": shape_of(src, "src"), "tgt": shape_of(tgt, "tgt")}
    axis = 0 if batch_first else 1
    if len(shapes["src"]) == 3 and len(shapes["tgt"]) > axis:
        of_src, of_tgt = (shape[axis] for shape in shapes.values())
        if of_src != of_tgt:
            raise RuntimeError(
                f"the batch number of src and tgt must be equal. src has a batch of {of_src}, and tgt of {of_tgt}, on "
                f"axis {axis}. batch_first={not batch_first} in the constructor makes it axis {1 - axis}."
            )
    for (name, shape), value in zip(shapes.items(), (src, tgt)):
        if shape[-1:] != (d_model,):
            found = f"{shape[-1]} features" if shape else "no axes"
            error = RuntimeError("the feature number of src and tgt must be equal to d_model")
            expected = f"(batch, length, {d_model})" if batch_first else f"(length, batch, {d_model})"
            tokens = advice_on_tokens(Argument.of(name, value), expected)
            add_advice(error, chain(tokens, [Advice(f"{name} has {found}, but d_model is {d_model}")]))
            raise error
