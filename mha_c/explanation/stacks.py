# SPDX-License-Identifier: Apache-2.0
"""One call of a whole encoder or decoder: the residual stream after each layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.explanation.layer_result import LayerExplanation, StackExplanation
from mha_c.explanation.layers import describe, explain_decoder_layer, explain_encoder_layer, seen_tokens, uncounted
from mha_c.explanation.words import called_explain, of_another_forward
from mha_c.module import Module
from mha_c.parameters.arrays import as_array
from mha_c.transformer.decoder import TransformerDecoder, TransformerDecoderLayer
from mha_c.transformer.encoder import TransformerEncoder, TransformerEncoderLayer
from mha_c.transformer.layer import TransformerLayer

__all__ = ["explain_decoder", "explain_encoder"]


@knows_foreign_keywords
@called_explain
def explain_encoder(
    layer: TransformerEncoder,
    src: Any,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> StackExplanation:
    """Show the residual stream of an encoder: see `mha_c.explain`."""
    arguments = {
        "src": src, "mask": mask, "src_key_padding_mask": src_key_padding_mask, "is_causal": is_causal,
    }  # fmt: skip
    output = TransformerEncoder.forward(uncounted(layer), **arguments)
    zeroes = src_key_padding_mask is not None and layer._gives_zeros(src, mask, src_key_padding_mask)
    zeroing = range(len(layer.layers)) if zeroes else ()
    call = (mask, src_key_padding_mask, bool(is_causal))
    return _explain(layer, TransformerEncoder, arguments, src, call, src_key_padding_mask, zeroing, output)


@knows_foreign_keywords
@called_explain
def explain_decoder(
    layer: TransformerDecoder,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> StackExplanation:
    """Show the residual stream of a decoder: see `mha_c.explain`."""
    arguments = {
        "tgt": tgt, "memory": memory, "tgt_mask": tgt_mask, "memory_mask": memory_mask,
        "tgt_key_padding_mask": tgt_key_padding_mask, "memory_key_padding_mask": memory_key_padding_mask,
        "tgt_is_causal": tgt_is_causal, "memory_is_causal": memory_is_causal,
    }  # fmt: skip
    output = TransformerDecoder.forward(uncounted(layer), **arguments)
    masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
    call = (memory, *masks, bool(tgt_is_causal), bool(memory_is_causal))
    zeroing = (len(layer.layers) - 1,) if layer.padded == "zero" else ()
    return _explain(layer, TransformerDecoder, arguments, tgt, call, tgt_key_padding_mask, zeroing, output)


def _explain(
    stack: TransformerEncoder | TransformerDecoder,
    kind: type[Module],
    arguments: dict[str, Any],
    x: Any,
    call: tuple[Any, ...],
    key_padding_mask: Any,
    zeroing: Sequence[int],
    output: NDArray[Any],
) -> StackExplanation:
    """Call the layers one after the other. Those in `zeroing` give zeros in padded rows, as the stack makes them do."""
    call = tuple(argument if isinstance(argument, bool) else _copied(argument) for argument in call)
    stream = {"input": _copied(x)}
    layers = list(uncounted(stack).layers)
    explain_layers = []
    for number, layer in enumerate(layers):
        if number in zeroing and isinstance(layer, TransformerLayer):
            layer.padded = "zero"
        before = list(stream.values())[-1]
        explain_layers.append(partial(_explain_layer, uncounted(layer), before, *call))
        stream[f"layer {number}"] = layer(before, *call)
    stream[list(stream)[-1] if stack.norm is None and layers else "norm"] = output
    attention = getattr(layers[0], "self_attn", None) if layers else None
    batch_first = getattr(attention, "batch_first", False)
    warnings = of_another_forward(stack, kind)
    if layers and isinstance(layers[0], TransformerLayer):
        warnings += tuple(f"layer 0: {each}" for each in explain_layers[0]().warnings)
    return StackExplanation(
        title=describe(stack, {"num_layers": len(layers)}, arguments),
        residual_stream=stream,
        explain_layers=explain_layers,
        batch_first=batch_first,
        seen=seen_tokens(x, key_padding_mask, batch_first),
        warnings=warnings,
    )


def _copied(array: Any) -> Any:
    """A copy for later: the caller may change their array."""
    return None if array is None else np.array(as_array(array))


def _explain_layer(layer: Any, *call: Any) -> LayerExplanation:
    explain: dict[type[Any], Any] = {
        TransformerEncoderLayer: explain_encoder_layer, TransformerDecoderLayer: explain_decoder_layer,
    }  # fmt: skip
    for kind, function in explain.items():
        if isinstance(layer, kind):
            explanation: LayerExplanation = function(layer, *call)
            return explanation
    raise TypeError(f"explain shows layers of mha_c.TransformerEncoder and TransformerDecoder, but got {layer!r}")
