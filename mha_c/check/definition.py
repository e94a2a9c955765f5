# SPDX-License-Identifier: Apache-2.0
"""Layers by their definition, in plain NumPy and a wider type: what results are measured against. Nothing is fast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mha_c.dropout import Dropout
from mha_c.layer import MultiheadAttention, parameters_of
from mha_c.linear import Linear
from mha_c.norms import LayerNorm, RMSNorm
from mha_c.parameters.dtypes import computed_in
from mha_c.transformer.decoder import TransformerDecoder, TransformerDecoderLayer
from mha_c.transformer.encoder import TransformerEncoder, TransformerEncoderLayer
from mha_c.transformer.layer import TransformerLayer
from mha_c.transformer.transformer import Transformer

__all__ = ["attend", "attend_in_own_dtype", "causal_mask", "transform", "wider"]

_Conversion: TypeAlias = Callable[[NDArray[Any]], NDArray[Any]]


def wider(array: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in float64, or in np.longdouble if they are float64: sums of them lose nothing that counts.

    Examples
    --------
    >>> wider(np.zeros(2, np.float32)).dtype
    dtype('float64')
    """
    return array.astype(np.longdouble if array.dtype == np.float64 else np.float64)


def hidden_by_causality(length: int, source_length: int) -> NDArray[np.bool_]:
    """(L, S): True where key s comes after query l.

    Examples
    --------
    >>> hidden_by_causality(2, 3)
    array([[False,  True,  True],
           [False, False,  True]])
    """
    return np.arange(source_length) > np.arange(length)[:, None]


def to_float_mask(mask: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """What to add to the scores: -inf where a boolean mask is True; a float mask as it is.

    Examples
    --------
    >>> to_float_mask(np.array([True, False]), np.float32)
    array([-inf,   0.], dtype=float32)
    """
    return np.where(mask, -np.inf, 0.0).astype(dtype) if mask.dtype == bool else mask.astype(dtype)


def causal_mask(mask: NDArray[Any] | None, length: int, source_length: int) -> NDArray[Any]:
    """A mask that hides what `mask` hides, and every key that comes after its query: (L, S), or as `mask`.

    Examples
    --------
    >>> causal_mask(np.ones((2, 2)), 2, 2)
    array([[  1., -inf],
           [  1.,   1.]])
    """
    hidden = hidden_by_causality(length, source_length)
    if mask is None:
        return hidden
    return mask | hidden if mask.dtype == bool else mask + to_float_mask(hidden, mask.dtype)


def attend(
    layer: MultiheadAttention,
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    key_padding_mask: NDArray[Any] | None = None,
    need_weights: bool = True,
    attn_mask: NDArray[Any] | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What a layer should answer to a call, apart from dropout.

    Parameters
    ----------
    layer : MultiheadAttention
        The layer.
    query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        As for the layer itself, as arrays.

    Returns
    -------
    tuple of numpy.ndarray
        The output and, whether `need_weights` or not, the attention weights, in a wider type.

    Notes
    -----
    "Attention Is All You Need" (Vaswani et al., 2017), section 3.2.

    Examples
    --------
    >>> import mha_c
    >>> output, weights = attend(mha_c.MultiheadAttention(8, 4), *[np.ones((5, 3, 8), np.float32)] * 3)
    >>> output.shape, weights.shape
    ((5, 3, 8), (3, 5, 5))
    """
    masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
    return _attend(layer, wider, query, key, value, *masks)


def attend_in_own_dtype(layer: MultiheadAttention, **arguments: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """The same in the dtype of the layer, with the roundings that come with it.

    Examples
    --------
    >>> import mha_c
    >>> x = np.ones((5, 3, 8), np.float32)
    >>> masks = dict(key_padding_mask=None, attn_mask=None, is_causal=False)
    >>> layer, weights = mha_c.MultiheadAttention(8, 4), dict(need_weights=True, average_attn_weights=True)
    >>> attend_in_own_dtype(layer, query=x, key=x, value=x, **masks, **weights)[0].dtype
    dtype('float32')
    """
    output, weights = _attend(layer, np.asarray, **arguments)
    dtype = layer.out_proj.weight.dtype
    return output.astype(dtype, copy=False), weights.astype(dtype, copy=False)  # NumPy makes float32 of some bfloat16


def _attend(
    layer: MultiheadAttention,
    convert: _Conversion,
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    key_padding_mask: NDArray[Any] | None,
    need_weights: bool,
    attn_mask: NDArray[Any] | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[NDArray[Any], NDArray[Any]]:
    batched = query.ndim == 3
    swapped = batched and not layer.batch_first
    q_nle, k_nse, v_nse = (convert(x if batched else x[None]) for x in (query, key, value))
    if swapped:
        q_nle, k_nse, v_nse = (x.swapaxes(0, 1) for x in (q_nle, k_nse, v_nse))

    (w_q, w_k, w_v), (b_q, b_k, b_v) = _input_projections(layer, convert)
    groups = layer.num_heads // layer.num_kv_heads
    q = _heads(q_nle @ w_q.T + b_q, layer.num_heads)
    keys = _with_extra_keys(layer, k_nse @ w_k.T + b_k, layer.bias_k, convert)
    values = _with_extra_keys(layer, v_nse @ w_v.T + b_v, layer.bias_v, convert)
    k = _heads(keys, layer.num_kv_heads).repeat(groups, axis=1)
    v = _heads(values, layer.num_kv_heads).repeat(groups, axis=1)

    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.dtype.type(layer.head_dim))  # (N, H, L, S')
    n, h, length, _ = scores.shape
    s = k_nse.shape[1]
    # Masks are added up as the layer does: in float32, -1e38 and -3e38 are together -inf. The extra keys have none.
    own = computed_in(layer.out_proj.weight.dtype)
    masks = [np.zeros((n, h, length, s), own)]
    if attn_mask is not None:
        added = to_float_mask(attn_mask, own)
        masks.append(added if added.ndim == 2 else added.reshape(n, h, length, s))
    if key_padding_mask is not None:
        masks.append(to_float_mask(key_padding_mask, own).reshape(n, 1, 1, s))
    if is_causal:
        masks.append(to_float_mask(hidden_by_causality(length, s), own))
    with np.errstate(over="ignore", invalid="ignore"):
        mask = functools.reduce(np.add, masks)
        hides = functools.reduce(np.logical_or, map(np.isneginf, [*masks, mask]))  # -inf hides, also beside NaN
        scores[..., :s] = np.where(hides, -np.inf, scores[..., :s] + mask)

    weights = _softmax(scores, np.nan if need_weights and layer.masked_rows == "torch" else 0.0)
    context = _weighted_sums(weights, v, np.isneginf(scores))
    concatenation = context.transpose(0, 2, 1, 3).reshape(n, length, h * layer.v_head_dim)
    bias = layer.out_proj.bias
    output = concatenation @ convert(layer.out_proj.weight).T + (0.0 if bias is None else convert(bias))
    if average_attn_weights:
        weights = weights.mean(axis=1)
    if not batched:
        return output[0], weights[0]
    return output.swapaxes(0, 1) if swapped else output, weights


def _input_projections(
    layer: MultiheadAttention, convert: _Conversion
) -> tuple[list[NDArray[Any]], list[Any]]:
    """The weights and the biases of query, key and value."""
    parameters = parameters_of(layer)
    biases = parameters.input_biases
    return (
        [convert(weight) for weight in parameters.input_weights],
        [0.0] * 3 if biases is None else [convert(bias) for bias in biases],
    )


def _heads(x_nse: NDArray[Any], count: int) -> NDArray[Any]:
    """(N, S, H * D) to (N, H, S, D)."""
    n, s, features = x_nse.shape
    return x_nse.reshape(n, s, count, features // count).transpose(0, 2, 1, 3)


def _with_extra_keys(
    layer: MultiheadAttention,
    x_nse: NDArray[Any],
    learnt: NDArray[Any] | None,
    convert: _Conversion,
) -> NDArray[Any]:
    """The projected keys, or values, then what `add_bias_kv` and `add_zero_attn` append."""
    n, _, features = x_nse.shape
    extra = [] if learnt is None else [np.broadcast_to(convert(learnt), (n, 1, features))]
    extra += [np.zeros((n, 1, features), x_nse.dtype)] if layer.add_zero_attn else []
    return np.concatenate([x_nse, *extra], axis=1)


def _weighted_sums(weights: NDArray[Any], values: NDArray[Any], is_hidden: NDArray[np.bool_]) -> NDArray[Any]:
    """weights @ values, to which hidden values add nothing, NaN and infinity included."""
    is_finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        sums: NDArray[Any] = weights @ np.where(is_finite, values, 0)
        for key in np.flatnonzero(~is_finite.all(axis=(0, 1, 3))):
            others = np.where(is_finite[:, :, None, key], 0, values[:, :, None, key])
            sums += np.where(is_hidden[..., key, None], 0, weights[..., key, None] * others)
    return sums


def _softmax(scores: NDArray[Any], empty: float) -> NDArray[Any]:
    """Over the last axis; a row without any visible key becomes `empty`."""
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        powers = np.exp(scores - top)
        return np.where(np.isneginf(top), empty, powers / powers.sum(axis=-1, keepdims=True))


def transform(layer: Any, *call: Any) -> NDArray[Any]:
    """What a layer of a Transformer, or a stack of them, should answer to a call in evaluation mode.

    Parameters
    ----------
    layer : Module
        The layer, of parts that torch has, too. It computes padded rows.
    *call
        All arguments of its call, as arrays.

    Returns
    -------
    numpy.ndarray
        The output, in a wider type.

    Notes
    -----
    "Attention Is All You Need" (Vaswani et al., 2017), section 3; "Layer Normalization" (Ba, Kiros and Hinton, 2016);
    "Root Mean Square Layer Normalization" (Zhang and Sennrich, 2019); "Gaussian Error Linear Units" (Hendrycks and
    Gimpel, 2016).

    Examples
    --------
    >>> import mha_c
    >>> transform(mha_c.TransformerEncoderLayer(8, 2, 16), np.ones((5, 3, 8), np.float32), None, None, False).dtype
    dtype('float64')
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return _Definitions(next(layer.parameters()).dtype).of(layer, *call)


class _Definitions:
    """What layers in one dtype answer, in a wider type."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.convert: _Conversion = functools.partial(np.asarray, dtype=wider(np.empty(0, dtype)).dtype)

    def of(self, layer: Any, *call: Any) -> NDArray[Any]:
        """The answer of any layer."""
        answer: NDArray[Any] = _DEFINITIONS[type(layer)](self, layer, *call)
        return answer

    def linear(self, layer: Linear, x: NDArray[Any]) -> NDArray[Any]:
        assert layer.weight is not None
        product = self.convert(x) @ self.convert(layer.weight).T
        return product if layer.bias is None else product + self.convert(layer.bias)

    def norm(self, layer: LayerNorm | RMSNorm, x: NDArray[Any]) -> NDArray[Any]:
        axes = tuple(range(-len(layer.normalized_shape), 0))
        x = self.convert(x)
        if isinstance(layer, LayerNorm):
            x = x - x.mean(axes, keepdims=True)
        eps = np.finfo(computed_in(self.dtype)).eps if layer.eps is None else layer.eps
        x = x / np.sqrt((x * x).mean(axes, keepdims=True) + eps)
        x = x if layer.weight is None else x * self.convert(layer.weight)
        bias = getattr(layer, "bias", None)
        return x if bias is None else x + self.convert(bias)

    def encoder_layer(
        self, layer: TransformerEncoderLayer, src: Any, src_mask: Any, src_key_padding_mask: Any, is_causal: Any
    ) -> NDArray[Any]:
        def attention(x: NDArray[Any]) -> NDArray[Any]:
            return self._attention(layer.self_attn, x, x, src_mask, src_key_padding_mask, is_causal)

        x = self._add(layer, layer.norm1, attention, src)
        return self._add(layer, layer.norm2, functools.partial(self._feed_forward, layer), x)

    def decoder_layer(
        self, layer: TransformerDecoderLayer, tgt: Any, memory: Any, tgt_mask: Any, memory_mask: Any,
        tgt_key_padding_mask: Any, memory_key_padding_mask: Any, tgt_is_causal: Any, memory_is_causal: Any,
    ) -> NDArray[Any]:  # fmt: skip
        def to_itself(x: NDArray[Any]) -> NDArray[Any]:
            return self._attention(layer.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def to_memory(x: NDArray[Any]) -> NDArray[Any]:
            masks = (memory_mask, memory_key_padding_mask, memory_is_causal)
            return self._attention(layer.multihead_attn, x, memory, *masks)

        x = self._add(layer, layer.norm1, to_itself, tgt)
        x = self._add(layer, layer.norm2, to_memory, x)
        return self._add(layer, layer.norm3, functools.partial(self._feed_forward, layer), x)

    def stack(self, stack: TransformerEncoder | TransformerDecoder, x: Any, *call: Any) -> NDArray[Any]:
        for layer in stack.layers:
            x = self.of(layer, x, *call)
        return self.convert(x) if stack.norm is None else self.of(stack.norm, x)

    def transformer(
        self, layer: Transformer, src: Any, tgt: Any, src_mask: Any, tgt_mask: Any, memory_mask: Any,
        src_key_padding_mask: Any, tgt_key_padding_mask: Any, memory_key_padding_mask: Any, src_is_causal: Any,
        *causal: Any,
    ) -> NDArray[Any]:  # fmt: skip
        memory = self.of(layer.encoder, src, src_mask, src_key_padding_mask, src_is_causal)
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        return self.of(layer.decoder, tgt, memory, *masks, *causal)

    def _add(
        self, layer: TransformerLayer, norm: Any, step: Callable[[NDArray[Any]], NDArray[Any]], x: Any
    ) -> NDArray[Any]:
        """x + step(norm(x)), or norm(x + step(x))."""
        x = self.convert(x)
        if layer.norm_first:
            added: NDArray[Any] = x + step(self.of(norm, x))
            return added
        return self.of(norm, x + step(x))

    def _attention(
        self, layer: MultiheadAttention, x: Any, key: Any, attn_mask: Any, key_padding_mask: Any, is_causal: Any
    ) -> NDArray[Any]:
        return _attend(layer, self.convert, x, key, key, key_padding_mask, False, attn_mask, True, bool(is_causal))[0]

    def _feed_forward(self, layer: TransformerLayer, x: NDArray[Any]) -> NDArray[Any]:
        assert isinstance(layer.activation, str)
        return self.of(layer.linear2, _ACTIVATIONS[layer.activation](self.of(layer.linear1, x)))


_DEFINITIONS: Final[dict[type[Any], Callable[..., NDArray[Any]]]] = {
    Dropout: lambda definitions, layer, x: definitions.convert(x),
    Linear: _Definitions.linear,
    LayerNorm: _Definitions.norm,
    RMSNorm: _Definitions.norm,
    TransformerEncoderLayer: _Definitions.encoder_layer,
    TransformerEncoder: _Definitions.stack,
    TransformerDecoderLayer: _Definitions.decoder_layer,
    TransformerDecoder: _Definitions.stack,
    Transformer: _Definitions.transformer,
}


def _pi(x: NDArray[Any]) -> Any:
    """Pi in the dtype of an array."""
    return 4 * np.arctan(x.dtype.type(1))


def _erf(x: NDArray[Any]) -> NDArray[Any]:
    """The error function, by its series of positive terms (Abramowitz and Stegun, 1964, 7.1.6)."""
    x = np.clip(x, -7, 7)  # beyond, it differs from -1 or 1 by less than 1e-22
    term = sums = x
    for n in range(1, 200):
        term = term * (2 * x * x / (2 * n + 1))
        sums = sums + term
    product: NDArray[Any] = 2 / np.sqrt(_pi(x)) * np.exp(-x * x) * sums
    return product


def _gelu_tanh(x: NDArray[Any]) -> NDArray[Any]:
    inner = np.sqrt(2 / _pi(x)) * (x + x.dtype.type("0.044715") * x**3)
    product: NDArray[Any] = x * (1 + np.tanh(inner)) / 2
    return product


_ACTIVATIONS: Final[dict[str, _Conversion]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + _erf(x / np.sqrt(x.dtype.type(2)))) / 2,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
}
