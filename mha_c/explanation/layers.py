# SPDX-License-Identifier: Apache-2.0
"""One call of a layer of an encoder or a decoder, step by step: its stages are those of the layer's own parts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha_c.activations import activate, is_gated
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.container import Container, ModuleList
from mha_c.display.words import count, describe_call
from mha_c.dropout import Dropout
from mha_c.explanation.attention import explain as explain_attention
from mha_c.explanation.layer_result import LayerExplanation, rows_of, size_of_rows, tokens_with_largest_norm
from mha_c.explanation.result import Explanation
from mha_c.explanation.stages import Stage
from mha_c.explanation.words import called_explain, of_another_forward, of_products
from mha_c.module import Module
from mha_c.norms import RMSNorm
from mha_c.parameters.arrays import as_array
from mha_c.parameters.dtypes import computed_in, is_half
from mha_c.transformer.decoder import TransformerDecoderLayer
from mha_c.transformer.encoder import TransformerEncoderLayer
from mha_c.transformer.layer import TransformerLayer, is_padding, zero_padded_rows

__all__ = ["describe", "explain_decoder_layer", "explain_encoder_layer", "seen_tokens", "uncounted"]

#: Steps of a norm for each number: the mean, the subtraction, the square, its mean, the quotient, the weight, the bias.
NORM_STEPS = 7
#: The same without a mean, its subtraction and a bias.
RMS_NORM_STEPS = 4

#: A hidden feature of an activation other than relu is active if it is further from 0 than this.
ACTIVE = 0.01


@knows_foreign_keywords
@called_explain
def explain_encoder_layer(
    layer: TransformerEncoderLayer,
    src: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> LayerExplanation:
    """Show what a layer of an encoder computes: see `mha_c.explain`."""
    arguments = {
        "src": src, "src_mask": src_mask, "src_key_padding_mask": src_key_padding_mask, "is_causal": is_causal,
    }  # fmt: skip
    TransformerEncoderLayer.forward(uncounted(layer), **arguments)  # refuses what the layer refuses, in its words
    steps = _Steps(layer, "src", src, src_key_padding_mask)
    with steps.computed_together("self_attn", 1, 2):
        steps.attend("self_attn", attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        steps.feed_forward()
    return steps.finish(TransformerEncoderLayer, arguments)


@knows_foreign_keywords
@called_explain
def explain_decoder_layer(
    layer: TransformerDecoderLayer,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> LayerExplanation:
    """Show what a layer of a decoder computes: see `mha_c.explain`."""
    arguments = {
        "tgt": tgt, "memory": memory, "tgt_mask": tgt_mask, "memory_mask": memory_mask,
        "tgt_key_padding_mask": tgt_key_padding_mask, "memory_key_padding_mask": memory_key_padding_mask,
        "tgt_is_causal": tgt_is_causal, "memory_is_causal": memory_is_causal,
    }  # fmt: skip
    TransformerDecoderLayer.forward(uncounted(layer), **arguments)  # refuses what the layer refuses, in its words
    steps = _Steps(layer, "tgt", tgt, tgt_key_padding_mask)
    with steps.computed_together("self_attn", 1):
        steps.attend("self_attn", attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal)
    with steps.computed_together("multihead_attn", 2, 3):
        steps.attend(
            "multihead_attn", memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask,
            is_causal=memory_is_causal,
        )  # fmt: skip
        steps.feed_forward()
    return steps.finish(TransformerDecoderLayer, arguments)


def uncounted(layer: Any, copies: dict[int, Any] | None = None) -> Any:
    """A layer with the same parameters and next random numbers, whose calls do not count as those of `layer`."""
    copies = {} if copies is None else copies
    if id(layer) not in copies:
        copied = copies[id(layer)] = copy.copy(layer)
        if isinstance(layer, ModuleList):
            copied._layers = [uncounted(child, copies) for child in layer]
        elif isinstance(layer, Container):
            copied._children = {name: child and uncounted(child, copies) for name, child in layer._children.items()}
    return copies[id(layer)]


def _in_float32(layer: Any) -> Any:
    """An uncounted copy that keeps float32 numbers, and multiplies what the layer multiplies."""
    copied = uncounted(layer)
    for at, module in copied._places():
        own = module._parameters
        names = [name for weights in module._products(at).values() for name in weights]
        precisions = {name: own.products_of(name) for name in names}
        module._parameters = own.with_changes(dtype=np.dtype(np.float32), precisions=precisions)
    return copied


def describe(layer: Module, options: dict[str, Any], arguments: dict[str, Any]) -> str:
    """A layer and a call of it, in one line."""
    said = ", ".join(f"{name}={value!r}" for name, value in options.items())
    arrays = {
        name: value if value is None or name.endswith("is_causal") else as_array(value)
        for name, value in arguments.items()
    }
    return f"{type(layer).__name__}({said}); {describe_call(arrays)}"


def seen_tokens(x: Any, key_padding_mask: Any, batch_first: bool) -> NDArray[np.bool_]:
    """(N, T) or (T,): the tokens that are not padding."""
    shape = rows_of(as_array(x), batch_first).shape[:-1]
    return np.ones(shape, bool) if key_padding_mask is None else ~is_padding(key_padding_mask)


class _Steps:
    """The steps of a layer, as `TransformerLayer` takes them, with their results and their text."""

    def __init__(self, layer: TransformerLayer, name: str, x: Any, key_padding_mask: Any) -> None:
        self.layer: Any = uncounted(layer)
        self.original = layer
        self.batch_first = layer.self_attn.batch_first  # type: ignore[attr-defined]
        self.key_padding_mask = key_padding_mask
        array = np.array(as_array(x))  # a copy: the caller may change theirs
        self.dtype = self.computed_in = array.dtype
        self.seen = seen_tokens(array, key_padding_mask, self.batch_first)
        self.axes: tuple[str, ...] = ("T",) if array.ndim == 2 else ("N", "T") if self.batch_first else ("T", "N")
        sizes: dict[str, int] = dict(zip(self.axes, array.shape))
        self.letters: dict[str, int] = {letter: sizes[letter] for letter in ("N", "T") if letter in sizes}
        self.letters["E"] = array.shape[-1]
        self.stages: dict[str, Stage] = {}
        self.attentions: dict[str, Explanation] = {}
        self.added: list[tuple[str, str]] = []  # the names of what is added, and of what it is added to
        self.stream = [self._add("input", array, name, "what the layer gets", 0)]

    @contextmanager
    def computed_together(self, attention: str, *numbers: int) -> Iterator[None]:
        """Steps that the layer takes together. If they are one call of the core, halves are float32 between them."""
        own = self.layer
        norms, dropouts = (tuple(getattr(own, f"{kind}{i}") for i in numbers) for kind in ("norm", "dropout"))
        if is_half(self.dtype) and own._is_plain(getattr(own, attention), norms, dropouts):
            self.computed_in = computed_in(self.dtype)
            self.layer = _in_float32(own)
        yield
        name = self.stream[-1]
        with np.errstate(all="ignore"):
            result = self._array(name).astype(self.dtype, copy=False)
        self.stages[name] = dataclasses.replace(self.stages[name], array=result)
        self.layer, self.computed_in = own, self.dtype

    def _read(self, x: Any) -> NDArray[Any]:
        """What a step reads, in the dtype in which it computes."""
        return as_array(x).astype(self.computed_in, copy=False)

    def _add(
        self, name: str, array: NDArray[Any], formula: str, meaning: str, operations: int, features: str = "E"
    ) -> str:
        self.stages[name] = Stage(name, array, (*self.axes, features), formula, meaning, operations)
        return name

    def _array(self, name: str) -> NDArray[Any]:
        return self.stages[name].array

    def _norm(self, source: str) -> str:
        norm = f"norm{len(self.stream)}"
        module, x = getattr(self.layer, norm), self._read(self._array(source))
        steps = RMS_NORM_STEPS if isinstance(module, RMSNorm) else NORM_STEPS
        return self._add(norm, module(x), f"{norm}({source})", "the row of each token, normalized", steps * x.size)

    def _drop(self, dropout: str, array: NDArray[Any], formula: str) -> tuple[NDArray[Any], str]:
        """What a dropout of the layer leaves of an array, with the formula."""
        module = getattr(self.layer, dropout)
        return module(array), f"{dropout}({formula})" if getattr(module, "is_active", True) else formula

    def attend(self, name: str, memory: Any = None, **masks: Any) -> None:
        """One step: x + attention(norm(x)), or norm(x + attention(x))."""
        source = self._before()
        query = self._read(self._array(source))
        key = query if memory is None else self._read(memory)
        explanation = explain_attention(getattr(self.layer, name), query, key, key, need_weights=False, **masks)
        self.attentions[name] = explanation
        formula = f"{name}({source})" if memory is None else f"{name}({source}, memory)"
        update, formula = self._drop(f"dropout{len(self.stream)}", explanation.output, formula)
        operations = sum(each.operations for each in explanation.stages.values() if each.name != "average_weights")
        self._add_up(f"{name}_update", update, formula, "what the attention adds to each token", operations)

    def feed_forward(self) -> None:
        """The last step: x + feed(norm(x)), or norm(x + feed(x))."""
        source = self._before()
        layer, activation = self.layer, self.layer.activation
        hidden = layer.linear1(self._read(self._array(source)))
        gated = is_gated(activation)
        features, width = hidden.shape[-1] // (1 + gated), hidden.size * self.letters["E"]
        self.letters["F"] = features
        meaning = "the gates, then the hidden features" if gated else "the hidden features before the activation"
        self._add("hidden", hidden, f"linear1({source})", meaning, 2 * width, "2·F" if gated else "F")
        active = activate(hidden, activation)
        formula = f"{self.activation_name}(hidden)"
        active, formula = self._drop("dropout", active, formula)
        self._add("activated", active, formula, "the hidden features after the activation", active.size, "F")
        update, formula = self._drop(f"dropout{len(self.stream)}", layer.linear2(active), "linear2(activated)")
        operations = 2 * active.size * self.letters["E"]
        meaning = "what the feed-forward network adds to each token"
        self._add_up("feed_forward_update", update, formula, meaning, operations)

    def _before(self) -> str:
        """The name of what a step reads: the residual stream, or its norm."""
        return self._norm(self.stream[-1]) if self.layer.norm_first else self.stream[-1]

    def _add_up(self, name: str, update: NDArray[Any], formula: str, meaning: str, operations: int) -> None:
        """Add to the residual stream."""
        self._add(name, update, formula, meaning, operations)
        stream = self.stream[-1]
        self.added.append((name, stream))
        total = self._read(self._array(stream)) + update
        residual = f"residual{len(self.stream)}"
        self._add(residual, total, f"{stream} + {name}", "the residual stream after this step", total.size)
        self.stream.append(residual if self.layer.norm_first else self._norm(residual))

    @property
    def activation_name(self) -> str:
        activation = self.layer.activation
        return activation if isinstance(activation, str) else getattr(activation, "__name__", type(activation).__name__)

    def finish(self, kind: type[TransformerLayer], arguments: dict[str, Any]) -> LayerExplanation:
        """Call the last stage "output"."""
        last = self.stages.pop(self.stream.pop())
        array, formula = last.array, last.formula
        if self.layer.padded == "zero" and self.key_padding_mask is not None:
            array = zero_padded_rows(array, self.key_padding_mask, self.batch_first)
            formula += ", 0 in padded rows"
        meaning = "what the layer returns"
        self.stages["output"] = dataclasses.replace(last, name="output", array=array, formula=formula, meaning=meaning)
        self.stream.append("output")
        attention = self.layer.self_attn
        options = {
            "d_model": self.letters["E"], "nhead": attention.num_heads, "dim_feedforward": self.letters["F"],
            "activation": self.activation_name, "norm_first": self.layer.norm_first,
        }  # fmt: skip
        warnings = [*of_another_forward(self.original, kind), *self._not_finite()]
        warnings += [f"{name}: {each}" for name, one in self.attentions.items() for each in one.warnings]
        return LayerExplanation(
            title=describe(self.original, options, arguments),
            stages=self.stages,
            attentions=self.attentions,
            residual_stream={name: self._array(name) for name in self.stream},
            letters=self.letters,
            batch_first=self.batch_first,
            seen=self.seen,
            warnings=tuple(warnings),
            notes=tuple(self._notes()),
        )

    # ---- Sentences

    def _seen_rows(self, name: str) -> NDArray[Any]:
        """(tokens, features): the rows of the tokens that are not padding."""
        rows: NDArray[Any] = rows_of(self._array(name), self.batch_first)[self.seen]
        return rows

    def _not_finite(self) -> list[str]:
        for name in self.stages:
            rows = self._seen_rows(name)
            wrong = int(np.count_nonzero(~np.isfinite(rows).all(axis=-1)))
            if wrong:
                where = f"{wrong:,} of {count(len(rows), 'token')}"
                return [f"{name} is the first stage that holds NaN or infinity: in {where}."]
        return []

    def _notes(self) -> list[str]:
        notes = []
        if self.seen.any() and not self._not_finite():
            notes = [*self._sizes(), *self._active(), self._largest()]
        operations = sum(stage.operations for stage in self.stages.values())
        if operations:
            of_attention = sum(self.stages[f"{name}_update"].operations for name in self.attentions) / operations
            linear = sum(self.stages[name].operations for name in ("hidden", "feed_forward_update")) / operations
            notes.append(
                f"Attention takes {of_attention:.0%} of the operations, and the two linear maps of the feed-forward "
                f"network take {linear:.0%}."
            )
        notes += of_products(self.original)
        if any(isinstance(module, Dropout) and module.is_active for module in self.layer.modules()):
            notes.append(
                "Dropout is active. The layer's next call will drop the same numbers: an explanation does not count as "
                "a call."
            )
        return notes

    def _sizes(self) -> list[str]:
        """How large what is added is beside the residual stream."""
        notes = []
        for update, stream in self.added:
            large, small = (float(size_of_rows(self._seen_rows(name)).mean()) for name in (stream, update))
            if large:
                notes.append(
                    f"{update} is {small / large:.2g} times as large as {stream}, to which it is added: the mean norms "
                    f"of their rows are {small:.3g} and {large:.3g}."
                )
        return notes

    def _active(self) -> list[str]:
        """How many hidden features are active."""
        active = self._seen_rows("activated")
        is_relu = self.layer.activation == "relu"
        active = active > 0 if is_relu else np.abs(active) > ACTIVE
        if not active.size:
            return []
        how = "above 0" if is_relu else f"further from 0 than {ACTIVE}"
        never = int(np.count_nonzero(~active.any(axis=0)))
        says = (
            f"{active.mean():.0%} of the hidden features are active, on average over the tokens: {how} after "
            f"{self.activation_name}."
        )
        return [says + (f" {never:,} of {active.shape[1]:,} are not active for any token." if never else "")]

    def _largest(self) -> str:
        """The tokens with the largest norm in the last sum."""
        name = "output" if self.layer.norm_first else f"residual{len(self.added)}"
        return tokens_with_largest_norm(name, size_of_rows(rows_of(self._array(name), self.batch_first)), self.seen)
