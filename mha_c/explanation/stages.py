# SPDX-License-Identifier: Apache-2.0
"""The numbers of every stage of a call, computed by the C core."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha_c import _core
from mha_c.advice.arguments import REFUSALS, add_advice
from mha_c.advice.calls import advice_on_call
from mha_c.layer import MultiheadAttention, facts_of, next_dropout_call, parameters_of
from mha_c.parameters.arrays import as_array
from mha_c.parameters.dtypes import computed_in
from mha_c.parameters.sets import ParameterSet

__all__ = ["STAGES", "Stage", "StagedCall", "chosen_stages"]

#: The names of all stages, in the order of the computation.
STAGES = (
    "q",
    "k",
    "v",
    "q_heads",
    "k_heads",
    "v_heads",
    "scores",
    "masked_scores",
    "weights_before_dropout",
    "weights",
    "average_weights",
    "head_outputs",
    "concatenated",
    "output",
)

_ARGUMENTS = tuple(inspect.signature(_core.takes_few_queries).parameters)


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage of attention.

    Attributes
    ----------
    name : str
        The name of the stage, such as "scores".
    array : numpy.ndarray
        The numbers.
    axes : tuple of str
        The axes, in the letters of `Explanation.letters`, such as ``("N", "L", "H·D")``.
    formula : str
        How the stage follows from earlier ones.
    meaning : str
        The meaning of the stage, in words.
    operations : int
        The number of additions, multiplications and other steps in its definition; 0 for a view.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> x = np.ones((5, 3, 8), np.float32)
    >>> stage = mha_c.explain(mha_c.MultiheadAttention(8, 4), x, x, x).stages["scores"]
    >>> stage.axes, stage.shape, stage.nbytes, stage.operations
    (('N', 'H', 'L', 'S'), (3, 4, 5, 5), 1200, 1200)
    """

    name: str
    array: NDArray[Any]
    axes: tuple[str, ...]
    formula: str
    meaning: str
    operations: int

    def __repr__(self) -> str:
        return f"Stage({self.name}: {self.formula}, ({', '.join(self.axes)}) = {self.shape})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.array.shape

    @property
    def nbytes(self) -> int:
        """The size of the array in bytes. It may share them with an earlier stage."""
        return self.array.nbytes


def chosen_stages(stages: str | Iterable[str] | None, drops: bool) -> set[str]:
    """The names of the stages to keep; by default, all that differ from another stage."""
    if stages is None:
        return {name for name in STAGES if drops or name != "weights_before_dropout"}
    chosen = {stages} if isinstance(stages, str) else set(stages)
    for name in chosen.difference(STAGES):
        raise ValueError(f"there is no stage {name!r}; the stages are {', '.join(STAGES)}")
    return chosen


def _chosen_heads(heads: int | Iterable[int] | None, num_heads: int) -> list[int] | None:
    if heads is None:
        return None
    chosen = [operator.index(head) for head in (heads if isinstance(heads, Iterable) else [heads])]
    for head in chosen:
        if not -num_heads <= head < num_heads:
            raise IndexError(f"there is no head {head}: this layer has heads 0 to {num_heads - 1}")
    chosen = [head % num_heads for head in chosen]
    if len(set(chosen)) < len(chosen) or not chosen:
        raise ValueError(f"heads must name one head or more, each once, but got {heads!r}")
    return chosen


class StagedCall:
    """One call of a layer with one set of its parameters, whose stages the core computes. Arguments as in `explain`."""

    def __init__(
        self,
        layer: MultiheadAttention,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any,
        need_weights: bool,
        attn_mask: Any,
        is_causal: bool,
        heads: int | Iterable[int] | None,
    ) -> None:
        self.layer = layer
        self.dropout_seed = layer.dropout_seed
        self.parameters: ParameterSet = parameters_of(layer)
        self.widths = self.parameters.widths
        self.inputs = (query, key, value)
        self.masks = (key_padding_mask, attn_mask, is_causal)
        self.batch_first = layer.batch_first
        self.add_zero_attn = layer.add_zero_attn
        self.empty = "nan" if need_weights and layer.masked_rows == "torch" else "zero"
        self.dropout_p = layer.dropout if layer.training else 0.0
        self.dropout_call = next_dropout_call(layer)
        self.heads = _chosen_heads(heads, self.widths.num_heads)
        if self.heads is not None and self.dropout_p > 0:
            raise ValueError(
                f"this layer is in training mode and drops weights (dropout={self.dropout_p}), for all heads together: "
                "call its eval() first, or leave out heads="
            )
        # This makes the checks of a call, so the errors are those of the layer.
        try:
            self.paths = _core.takes_few_queries(*self.arguments(self.parameters.weights))
        except REFUSALS as error:
            flags = {"need_weights": need_weights, "is_causal": is_causal}
            inputs = (*self.inputs, key_padding_mask, attn_mask)
            add_advice(error, advice_on_call(flags, *inputs, **facts_of(layer)))
            raise
        shapes = [as_array(one).shape for one in (query, key)]
        self.is_batched = len(shapes[0]) == 3
        length_axis = 1 if self.is_batched and self.batch_first else 0
        self.batch = len(self.paths)
        self.length, self.source_length = (shape[length_axis] for shape in shapes)
        self.extra_keys = ("bias_k" in self.parameters.shapes) + bool(self.add_zero_attn)
        self.of_heads = self.parameters.weights if self.heads is None else self.parameters.weights_of_heads(self.heads)

    def arguments(
        self,
        weights: _core.Weights,
        *,
        need_weights: bool = False,
        average: bool = False,
        masks: tuple[Any, Any, bool] | None = None,
        dropout_p: float | None = None,
    ) -> tuple[Any, ...]:
        """The positional arguments of the core's functions."""
        query, key, value = self.inputs
        key_padding_mask, attn_mask, is_causal = self.masks if masks is None else masks
        named = {
            "weights": weights,
            "query": query,
            "key": key,
            "value": value,
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average,
            "is_causal": is_causal,
            "out": None,
            "batch_first": self.batch_first,
            "add_zero_attn": self.add_zero_attn,
            "masked_rows": self.empty,
            "dropout_p": self.dropout_p if dropout_p is None else dropout_p,
            "dropout_seed": self.dropout_seed,
            "dropout_call": self.dropout_call,
        }
        return tuple(named[name] for name in _ARGUMENTS)

    @property
    def masks_of_heads(self) -> tuple[Any, Any, bool]:
        """The masks of the chosen heads alone."""
        key_padding_mask, attn_mask, is_causal = self.masks
        if self.heads is not None and attn_mask is not None:
            mask = as_array(attn_mask)
            if mask.ndim == 3:
                by_head = mask.reshape(-1, self.widths.num_heads, *mask.shape[1:])[:, self.heads]
                attn_mask = by_head.reshape(-1, *mask.shape[1:])
        return key_padding_mask, attn_mask, is_causal

    # ---- Numbers

    def compute(self, wanted: set[str]) -> dict[str, NDArray[Any]]:
        """The wanted stages."""
        found: dict[str, NDArray[Any]] = {}
        for letter, name, value in zip("qkv", ("query", "key", "value"), self.inputs):
            if wanted & {letter, f"{letter}_heads"}:
                found[letter] = _core.project(self.of_heads, name, value, self.batch_first)
                found[f"{letter}_heads"] = self._split(letter, found[letter])
        if wanted & {"scores", "masked_scores"}:
            self._compute_scores(wanted, found)
        if "weights_before_dropout" in wanted:
            _, found["weights_before_dropout"] = self._attend(self.of_heads, need_weights=True, dropout_p=0.0)
        if wanted & {"weights", "head_outputs", "concatenated"}:
            self._compute_heads(wanted, found)
        if wanted & {"average_weights", "output"}:
            weights = self.parameters.weights
            need_weights = "average_weights" in wanted
            output, average = _core.forward(*self.arguments(weights, need_weights=need_weights, average=True))
            found["output"] = output
            if average is not None:
                found["average_weights"] = average
        return {name: found[name] for name in STAGES if name in wanted}

    def _split(self, letter: str, projected: NDArray[Any]) -> NDArray[Any]:
        """(N, S, H * D) to (N, H, S', D)."""
        width = self.widths.v_head_dim if letter == "v" else self.widths.head_dim
        heads = projected.shape[-1] // width
        split = projected.reshape(*projected.shape[:-1], heads, width).swapaxes(-3, -2)
        extra = [] if letter == "q" else self._extra_keys(letter, heads, width)
        if not extra:
            return split
        return np.concatenate([split, *(np.broadcast_to(one, (*split.shape[:-2], 1, width)) for one in extra)], axis=-2)

    def _extra_keys(self, letter: str, heads: int, width: int) -> list[NDArray[Any]]:
        """The keys or values (heads, 1, width) that the layer appends."""
        learnt = self.parameters.array(f"bias_{letter}")
        extra = []
        if learnt is not None:
            by_head = learnt.reshape(-1, 1, width)
            shared = self.widths.num_heads // self.widths.num_kv_heads
            extra.append(by_head if self.heads is None else by_head[[head // shared for head in self.heads]])
        if self.add_zero_attn:
            extra.append(np.zeros((heads, 1, width), computed_in(self.parameters.dtype)))
        return extra

    def _compute_scores(self, wanted: set[str], found: dict[str, NDArray[Any]]) -> None:
        key_padding_mask, attn_mask, is_causal = self.masks
        is_masked = key_padding_mask is not None or attn_mask is not None or bool(is_causal)
        if "scores" in wanted or not is_masked:
            unmasked = (None, None, False)
            found["scores"] = _core.scores(*self.arguments(self.of_heads, need_weights=True, masks=unmasked))
        if not is_masked:
            found["masked_scores"] = found["scores"]
        elif "masked_scores" in wanted:
            masks = self.masks_of_heads
            found["masked_scores"] = _core.scores(*self.arguments(self.of_heads, need_weights=True, masks=masks))

    def _attend(
        self, weights: _core.Weights, need_weights: bool, dropout_p: float | None = None
    ) -> tuple[NDArray[Any], Any]:
        masks = self.masks if weights is self.parameters.weights else self.masks_of_heads
        arguments = self.arguments(weights, need_weights=need_weights, masks=masks, dropout_p=dropout_p)
        return _core.attend(*(*arguments, self.paths))

    def _compute_heads(self, wanted: set[str], found: dict[str, NDArray[Any]]) -> None:
        if self.heads is None or wanted & {"weights", "head_outputs"}:
            joined, weights = self._attend(self.of_heads, need_weights="weights" in wanted)
            found["weights"] = weights
            found["concatenated"] = joined
            width = self.widths.v_head_dim
            split = joined.reshape(*joined.shape[:-1], joined.shape[-1] // width, width)
            found["head_outputs"] = split.swapaxes(-3, -2)
        if self.heads is not None and "concatenated" in wanted:
            found["concatenated"], _ = self._attend(self.parameters.weights, need_weights=False)
