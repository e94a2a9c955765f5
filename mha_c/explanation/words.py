# SPDX-License-Identifier: Apache-2.0
"""The text of an explanation: letters, axes, formulas, operations, and sentences about paths, masks and dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mha_c import _core
from mha_c.advice.arguments import listed
from mha_c.display.words import count, describe_call
from mha_c.explanation.masks import Masks
from mha_c.explanation.stages import StagedCall
from mha_c.module import Module, precisions_of
from mha_c.parameters.arrays import as_array
from mha_c.parameters.quantization import ATTENTION

__all__ = ["StageText", "Words", "called_explain", "of_another_forward", "of_products"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Steps of softmax for each score: compare for the maximum, subtract it, exponential, add up, divide.
SOFTMAX_STEPS = 5


def called_explain(function: _Function) -> _Function:
    """Let Python's errors about the arguments of a function name `mha_c.explain`, which passes them on."""
    function.__qualname__ = "explain"
    return function


def of_another_forward(layer: Any, kind: type[Any]) -> tuple[str, ...]:
    """A warning if the class of a layer computes something else than `kind`."""
    name = type(layer).__name__
    if type(layer).forward is kind.forward:
        return ()
    return (f"{name} overrides forward. This is what forward of mha_c.{kind.__name__} computes, not {name}.",)


def of_products(layer: Module, is_otherwise: bool = False) -> tuple[str, ...]:
    """A note on what a layer multiplies, if it has `matmul_precision`; perhaps otherwise than in this call."""
    if not precisions_of(layer):
        return ()
    places: dict[str, list[str]] = {}
    for at, module in layer._places():
        for name, weights in module._products(at).items():
            place = name if at == f"{name}." else f"{at}{name}"
            places.setdefault(module._parameters.products_of(weights[0]), []).append(place)
    said = (f"{numbers} in {listed(names)}" for numbers, names in places.items())
    return (f"Numbers that are multiplied{' otherwise' if is_otherwise else ''}: {'; '.join(said)}.",)


class StageText(NamedTuple):
    """The text about a stage: see `Stage`."""

    axes: tuple[str, ...]
    formula: str
    meaning: str
    operations: int


class Words:
    """The text about one call."""

    def __init__(self, call: StagedCall) -> None:
        self.call = call
        w = call.widths
        # Widths that are equal unless an argument says otherwise share a letter while they are equal.
        optional = {
            "N": (call.batch, call.is_batched),
            "L": (call.length, True),
            "S": (call.source_length, True),
            "S'": (call.source_length + call.extra_keys, call.extra_keys > 0),
            "H": (w.num_heads, True),
            "Hkv": (w.num_kv_heads, w.num_kv_heads != w.num_heads),
            "H'": (len(call.heads or ()), call.heads is not None),
            "D": (w.head_dim, True),
            "Dv": (w.v_head_dim, w.v_head_dim != w.head_dim),
            "E": (w.embed_dim, True),
            "Ek": (w.kdim, w.kdim != w.embed_dim),
            "Ev": (w.vdim, w.vdim != w.embed_dim),
            "Eo": (w.out_dim, w.out_dim != w.embed_dim),
        }
        self.letters = {letter: size for letter, (size, is_used) in optional.items() if is_used}

    def _letter(self, name: str) -> str:
        """A letter as this call writes it: "H*" counts the heads that were asked for, "Hkv*" those of their keys."""
        if name.endswith("*"):
            name = "H'" if self.call.heads is not None else name[:-1]
        equal = {"Hkv": "H", "Dv": "D", "Ek": "E", "Ev": "E", "Eo": "E", "S'": "S"}
        return name if name in self.letters else equal[name]

    def _axes(self, *axes: str) -> tuple[str, ...]:
        """These axes after that of the batch; "H*·D" is one axis of H* times D."""
        n = ("N",) if self.call.is_batched else ()
        return (*n, *("·".join(map(self._letter, axis.split("·"))) for axis in axes))

    def _size(self, *axes: str) -> int:
        """How many numbers an array with such axes has."""
        return prod(self.letters[letter] for axis in self._axes(*axes) for letter in axis.split("·"))

    def _layout(self, length: str, features: str) -> tuple[str, ...]:
        """The axes of an input or the output, in the layer's own order."""
        axes = self._axes(length, features)
        return axes if self.call.batch_first or not self.call.is_batched else (axes[1], axes[0], axes[2])

    @property
    def title(self) -> str:
        """The layer and the call, in one line."""
        call = self.call
        named = {"query": call.inputs[0], "key_padding_mask": call.masks[0], "attn_mask": call.masks[1]}
        arrays = {name: None if value is None else as_array(value) for name, value in named.items()}
        return f"{call.layer}; {describe_call({**arrays, 'is_causal': call.masks[2]})}"

    @property
    def inputs(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """The axes and the shape of each input."""
        axes = {"query": ("L", "E"), "key": ("S", "Ek"), "value": ("S", "Ev")}
        shapes = (tuple(as_array(array).shape) for array in self.call.inputs)
        return {name: (self._layout(*axes[name]), shape) for name, shape in zip(axes, shapes)}

    # ---- Stages

    def stages(self) -> dict[str, StageText]:
        """The texts of all stages, whether they were computed or not."""
        pairs = ("H*", "L", "S'")
        size, axes = self._size, self._axes
        masked = (
            ("scores + masks", "-inf where a mask hides a key") if self._is_masked else ("scores", "no mask: unchanged")
        )
        drops = self.call.dropout_p > 0
        weights = (
            ("dropout(softmax(masked_scores))", "some dropped, the others scaled up: they sum to 1 on average")
            if drops
            else ("softmax(masked_scores)", "positive; those of each query sum to 1")
        )
        softmax = SOFTMAX_STEPS * size(*pairs)
        bias = " + b_o" if "out_proj.bias" in self.call.parameters.shapes else ""
        scores = f"q_heads k_headsᵀ / √{self.letters['D']}"
        return {
            **self._projections(),
            "scores": StageText(axes(*pairs), scores, "how well a query and a key match", 2 * size(*pairs, "D")),
            "masked_scores": StageText(axes(*pairs), *masked, size(*pairs) if self._is_masked else 0),
            "weights_before_dropout": StageText(axes(*pairs), "softmax(masked_scores)", "as without dropout", softmax),
            "weights": StageText(axes(*pairs), *weights, softmax),
            "average_weights": StageText(
                axes("L", "S'"), "mean of all heads' weights", "what the layer returns", size("H", "L", "S'")
            ),
            "head_outputs": StageText(
                axes("H*", "L", "Dv"), "weights v_heads", "the values, averaged by the weights", 2 * size(*pairs, "Dv")
            ),
            "concatenated": StageText(axes("L", "H·Dv"), "head_outputs side by side", "all heads of each query", 0),
            "output": StageText(
                self._layout("L", "Eo"),
                f"concatenated W_oᵀ{bias}",
                "one more linear map, which mixes the heads",
                2 * size("L", "H·Dv", "Eo"),
            ),
        }

    def _projections(self) -> dict[str, StageText]:
        bias = self.call.parameters.input_biases is not None
        inputs = {
            "q": ("query", "L", "E", "H*", "D", "what each position looks for"),
            "k": ("key", "S", "Ek", "Hkv*", "D", "what each position can be found by"),
            "v": ("value", "S", "Ev", "Hkv*", "Dv", "what each position passes on"),
        }
        whole, split = {}, {}
        for name, (x, length, features, heads, width, meaning) in inputs.items():
            formula = f"{x} W_{name}ᵀ" + (f" + b_{name}" if bias else "")
            operations = 2 * self._size(length, features, heads, width)
            axes = self._axes(length, f"{heads}·{width}")
            whole[name] = StageText(axes, formula, f"{meaning}: a linear map of the {x}", operations)
            added = ", followed by the appended ones" if name != "q" and self.call.extra_keys else ""
            meaning = f"the same numbers, cut into heads of {self._size_of(width)} features{added}"
            axes = self._axes(heads, "L" if name == "q" else "S'", width)
            split[f"{name}_heads"] = StageText(axes, f"{name}, head by head", meaning, 0)
        return whole | split

    def _size_of(self, letter: str) -> int:
        return int(self.letters[self._letter(letter)])

    @property
    def _is_masked(self) -> bool:
        key_padding_mask, attn_mask, is_causal = self.call.masks
        return key_padding_mask is not None or attn_mask is not None or bool(is_causal)

    # ---- Sentences

    def notes(self, masks: Masks, arrays: dict[str, NDArray[Any]]) -> tuple[str, ...]:
        """Sentences: which path the layer takes, what it multiplies, what masks hide, what dropout does."""
        products = of_products(self.call.layer, any(self.call.paths) and self._is_attention_bfloat16())
        return (*self._path_notes(), *products, *self._mask_notes(masks), *self._dropout_notes(arrays))

    def _path_notes(self) -> list[str]:
        few = [n for n, is_few in enumerate(self.call.paths) if is_few]
        ordinary = [n for n, is_few in enumerate(self.call.paths) if not is_few]
        notes = []
        if ordinary:
            notes.append(
                f"{self._items(ordinary)}ordinary. q, k and v are projected. Then groups of queries go through the "
                "keys block by block; an (L, S) array never exists."
            )
        if few:
            notes.append(
                f"{self._items(few)}few queries. (W_kᵀ q)·key and W_v (Σ weight·value) take fewer operations than "
                "projecting every key; k, v and scores were computed for this explanation only."
                + (" W_k and attention itself multiply float32 then." if self._is_attention_bfloat16() else "")
            )
        config = _core.config()
        threads = count(config["threads"], "thread")
        notes.append(f"Kernels: {config['cpu_level']}. Up to {threads}; their number does not change the results.")
        return notes

    def _is_attention_bfloat16(self) -> bool:
        return self.call.parameters.products_of(ATTENTION) == "bfloat16"

    def _items(self, numbers: Sequence[int]) -> str:
        """The beginning of a sentence about the path of some batch items."""
        if len(numbers) == self.call.batch:
            return "Path: " if self.call.batch == 1 else "Path of all items: "
        listed = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return f"Path of item{'s' if len(numbers) > 1 else ''} {listed}: "

    def _mask_notes(self, masks: Masks) -> list[str]:
        if not masks.effects:
            return []
        hidden = masks.pairs - masks.visible
        notes = [sentence for effect in masks.effects for sentence in effect.says]
        notes.append(
            f"Together, the masks hide {hidden:,} of {masks.pairs:,} pairs of query and key, in all heads. Keys that "
            "key_padding_mask removes are neither projected nor scored. Blocks of keys that a whole group of queries "
            "does not see are skipped."
        )
        if self.call.extra_keys:
            notes.append(f"No mask hides the {self.call.extra_keys} appended key{'s' * (self.call.extra_keys > 1)}.")
        return notes

    def _dropout_notes(self, arrays: dict[str, NDArray[Any]]) -> list[str]:
        p = self.call.dropout_p
        if not self.call.layer.dropout > 0:
            return []
        if p == 0:
            return [f"Dropout is off: the layer is in evaluation mode (dropout={self.call.layer.dropout})."]
        note = (
            f"Dropout is active: each weight is dropped with probability {p}, and the others are multiplied by "
            f"1 / (1 - {p}). The layer's next call will drop the same weights: an explanation does not count as a call."
        )
        if {"weights", "weights_before_dropout"} <= arrays.keys():
            before, after = arrays["weights_before_dropout"], arrays["weights"]
            dropped = int(np.count_nonzero((before != 0) & (after == 0)))
            note += f" It dropped {dropped:,} of {int(np.count_nonzero(before)):,} weights."
        return [note]

    def warnings(self, masks: Masks) -> tuple[str, ...]:
        """What looks wrong."""
        warnings = [warning for effect in masks.effects for warning in effect.warnings]
        if masks.blind_count and self.call.source_length:
            n, h, query = masks.blind[0]
            where = f"query {query} of head {h}" + (f" in item {n}" if self.call.is_batched else "")
            rows = masks.pairs // self.call.source_length
            gets = "their weights are 0, and their output is the output bias."
            if self.call.extra_keys:
                gets = "they attend to the appended keys only."
            elif self.call.empty == "nan":
                gets = 'their weights and output are NaN, as in torch; with masked_rows="zero", they are finite.'
            warnings.append(f"{masks.blind_count:,} of {rows:,} queries see no key, the first being {where}: {gets}")
        return tuple(warnings)
