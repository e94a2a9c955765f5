# SPDX-License-Identifier: Apache-2.0
"""Layers stage by stage: what a layer computes between its inputs and its output, as named arrays and pictures."""

import sys
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol, overload

from mha_c.explanation.attention import explain as _explain_attention
from mha_c.explanation.layer_result import LayerExplanation, StackExplanation
from mha_c.explanation.layers import explain_decoder_layer, explain_encoder_layer
from mha_c.explanation.masks import MaskEffect
from mha_c.explanation.result import Explanation
from mha_c.explanation.stacks import explain_decoder, explain_encoder
from mha_c.explanation.stages import Stage
from mha_c.layer import MultiheadAttention
from mha_c.module import in_words_of
from mha_c.parameters.arrays import as_array
from mha_c.transformer.decoder import TransformerDecoder, TransformerDecoderLayer
from mha_c.transformer.encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = ["Explanation", "LayerExplanation", "MaskEffect", "StackExplanation", "Stage", "explain"]

_EXPLAIN: Final[dict[type[Any], Callable[..., Any]]] = {
    MultiheadAttention: _explain_attention,
    TransformerEncoderLayer: explain_encoder_layer,
    TransformerDecoderLayer: explain_decoder_layer,
    TransformerEncoder: explain_encoder,
    TransformerDecoder: explain_decoder,
}


class _TorchModule(Protocol):
    """A layer of torch, for type checkers."""

    def register_forward_hook(self, hook: Any) -> Any: ...


@overload
def explain(
    layer: MultiheadAttention,
    query: Any,
    key: Any = None,
    value: Any = None,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    heads: int | Iterable[int] | None = None,
    stages: str | Iterable[str] | None = None,
) -> Explanation: ...
@overload
def explain(
    layer: TransformerEncoderLayer,
    src: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> LayerExplanation: ...
@overload
def explain(
    layer: TransformerDecoderLayer,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> LayerExplanation: ...
@overload
def explain(
    layer: TransformerEncoder,
    src: Any,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> StackExplanation: ...
@overload
def explain(
    layer: TransformerDecoder,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> StackExplanation: ...
@overload
def explain(layer: _TorchModule, *arguments: Any, **keywords: Any) -> Any: ...
def explain(layer: Any, *arguments: Any, **keywords: Any) -> Any:
    """Show what a layer computes between its inputs and its output.

    Every number comes from the C core that the layer itself uses. `output`, and `weights`, `average_weights` and
    `head_outputs` of an attention layer, are bit-for-bit those of the layer's own call. A layer of bfloat16 or float16
    rounds what it returns: `output` and `average_weights` are in its dtype, the other stages in float32.

    Parameters
    ----------
    layer : MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder, \
TransformerDecoder, or torch's layer of that name
        The layer. A layer of torch is copied into mha_c first, in evaluation mode.
    *arguments
        The arguments of a call of the layer, which is explained: arrays, or tensors for a layer of torch. For
        attention, `key` is `query` unless given, and `value` is `key` unless given. `average_attn_weights` is ignored:
        both kinds of weights are included. `need_weights` matters only for queries that see no key.
    **keywords
        The same by name, and for attention two more. `heads`, an int or several, are the numbers of the heads to look
        at; all heads unless given. Stages with one part for each head are computed for these heads only;
        `average_weights`, `concatenated` and `output` always come from all heads. `stages`, a str or several, are the
        names of the stages to keep; all stages unless given. Other stages are computed only if these need them.

    Returns
    -------
    Explanation or LayerExplanation or StackExplanation
        `Explanation` for attention, and `LayerExplanation` for a layer of an encoder or a decoder: the stages, as
        attributes and in `stages`. `StackExplanation` for an encoder or a decoder: the residual stream after each
        layer, and the `LayerExplanation` of each layer on demand. Printing it gives a table; a notebook shows more.

    Raises
    ------
    TypeError
        If `layer` is none of these layers.
    ValueError
        If a stage is unknown; if a head is named twice; or if `heads` are chosen while dropout is active, because
        dropout draws for all heads together. ``layer.eval()`` switches dropout off.
    IndexError
        If a head does not exist.
    AssertionError, RuntimeError, TypeError, ValueError
        As for the layer itself.

    Notes
    -----
    An explanation does not count as a call: if dropout is active, it shows what the next call of the layer will drop.

    Attention itself never computes all scores at once, and does not project every key: not those that a mask removes,
    and none if there are few queries. `explain` computes these keys and the scores in addition, in the same way. With
    products of bfloat16, they are made of rounded numbers, and the weights of few queries are not.

    "Attention Is All You Need" (Vaswani et al., 2017), section 3.2.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> attention = mha_c.MultiheadAttention(8, 4, seed=0)
    >>> x = np.random.default_rng(0).standard_normal((5, 3, 8), dtype=np.float32)
    >>> explanation = mha_c.explain(attention, x)
    >>> explanation.scores.shape, explanation.weights.shape, explanation.output.shape
    ((3, 4, 5, 5), (3, 4, 5, 5), (5, 3, 8))
    >>> np.array_equal(explanation.output, attention(x, x, x)[0])
    True

    One head only, which saves the memory for the others:

    >>> mha_c.explain(attention, x, heads=2, stages="weights").weights.shape
    (3, 1, 5, 5)

    A layer of an encoder, with its attention in it:

    >>> layer = mha_c.TransformerEncoderLayer(8, 4, 16, seed=0).eval()
    >>> explanation = mha_c.explain(layer, x, is_causal=True)
    >>> explanation.activated.shape, explanation.self_attn.weights.shape
    ((5, 3, 16), (3, 4, 5, 5))
    >>> np.array_equal(explanation.output, layer(x, is_causal=True))
    True
    """
    if not isinstance(layer, tuple(_EXPLAIN)):
        layer = _copy_of_torchs(layer)
        arguments = tuple(map(_without_torch, arguments))
        keywords = {name: _without_torch(value) for name, value in keywords.items()}
    function = next(function for kind, function in _EXPLAIN.items() if isinstance(layer, kind))
    return function(layer, *arguments, **keywords)


def _without_torch(value: Any) -> Any:
    return as_array(value) if hasattr(value, "detach") else value


def _copy_of_torchs(layer: Any) -> Any:
    nn = getattr(sys.modules.get("torch"), "nn", None)
    kind = next((kind for kind in _EXPLAIN if isinstance(layer, getattr(nn, kind.__name__, ()))), MultiheadAttention)
    try:
        return kind.from_torch(layer).eval()
    except TypeError as error:
        *names, last = (each.__name__ for each in _EXPLAIN)
        takes = f"explain takes a {', '.join(names)} or {last} of mha_c or torch.nn"
        raise TypeError(in_words_of(error, f"from_torch takes a torch.nn.{kind.__name__}", takes)) from None
