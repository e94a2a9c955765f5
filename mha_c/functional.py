# SPDX-License-Identifier: Apache-2.0
"""Attention and norms as functions: torch.nn.functional's scaled_dot_product_attention, multi_head_attention_forward,
layer_norm and rms_norm.

They have torch's signatures, shapes, exceptions and words, on NumPy arrays. There are two additions: masks can be
combined with `is_causal`, and `dropout_seed` makes dropout repeatable.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias, overload

import numpy as np

from mha_c import _core
from mha_c.advice.arguments import REFUSALS, add_advice, shape_of
from mha_c.advice.calls import advice_on_call
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.advice.norms import advise_on_norm
from mha_c.advice.products import advise_on_product
from mha_c.dropout import as_seed
from mha_c.parameters.arrays import AnyArray, Array, as_array
from mha_c.parameters.sets import SEPARATE_WEIGHTS

__all__ = ["layer_norm", "multi_head_attention_forward", "rms_norm", "scaled_dot_product_attention"]


def __dir__() -> list[str]:
    return sorted(__all__)


_Shape: TypeAlias = tuple[int, ...]

_TORCH_NAMES = {"bfloat16": "BFloat16", "float16": "Half", "float32": "Float", "float64": "Double"}


def _dropout_seed(dropout_p: Any, seed: int | None) -> int:
    """The seed of this call; a random one is drawn only if weights are dropped, since that takes time."""
    return 0 if seed is None and not dropout_p else as_seed("dropout_seed", seed)


@knows_foreign_keywords
def scaled_dot_product_attention(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    attn_mask: AnyArray | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_seed: int | None = None,
) -> Array:
    """Compute ``softmax(scale * query @ keyᵀ + attn_mask) @ value``: the attention of every query to all keys.

    The formula is from "Attention Is All You Need" (Vaswani et al., 2017, section 3.2.1). No array of size L × S exists
    at any time: the softmax is computed along blocks of keys ("Online normalizer calculation for softmax", Milakov and
    Gimelshein, 2018).

    The leading axes (...) of all arrays broadcast as in NumPy. All arrays are of one dtype: float32, float64, bfloat16
    or float16. float16 is computed as float32. bfloat16 is multiplied as such: exponentials are rounded to it,
    subnormal numbers become 0, and sums are float32. The result of both is rounded once. For products of float32, pass
    arrays of float32.

    Arrays are NumPy arrays, or other objects on the CPU with the array interface, the buffer protocol or DLPack. They
    are not modified. Query, key and value are copied only if their features are not adjacent, if they are misaligned or
    byte-swapped, or if the rows of the query descend. Masks of 16 bits are copied.

    Parameters
    ----------
    query : array, (..., L, E)
        (..., H, L, E) with heads.
    key : array, (..., S, E)
        (..., Hk, S, E) with heads.
    value : array, (..., S, Ev)
        (..., Hv, S, Ev) with heads.
    attn_mask : array, optional
        An array that broadcasts to (..., L, S). Booleans: True means that this query sees this key, which is the
        opposite of the masks of `multi_head_attention_forward`. Floats of any width: added to the scores.
    dropout_p : float, default 0.0
        Probability of dropping an attention weight. The other weights are divided by ``1 - dropout_p``.
    is_causal : bool, default False
        Whether query l sees only the keys 0..l, in addition to `attn_mask`.
    scale : float, optional
        The factor of the scores; ``1 / sqrt(E)`` unless given.
    enable_gqa : bool, default False
        Whether Hk and Hv may be divisors of H (grouped-query attention: "GQA", Ainslie et al., 2023). Query head h then
        reads key head ``h // (H // Hk)`` and value head ``h // (H // Hv)``. Keys and values are not copied for it.
    dropout_seed : int, optional
        The same seed drops the same weights. None: a random seed in each call. torch does not have this argument: it
        draws from a generator of the whole process.

    Returns
    -------
    numpy.ndarray, (..., L, Ev)
        C-contiguous, of the dtype of the inputs. A query from which every key is hidden gets zeros.

    Raises
    ------
    RuntimeError, IndexError, TypeError, NotImplementedError
        If ranks, shapes, dtypes or types do not fit, as in torch. The message has torch's words and says what to write
        instead. mha_c computes two things that torch refuses: `attn_mask` together with `is_causal`, and a float mask
        of another width. It refuses two that torch overlooks: sizes of empty arrays that do not fit, and with 4 axes, a
        key and a value of different S.

    Examples
    --------
    >>> import numpy as np
    >>> from mha_c.functional import scaled_dot_product_attention
    >>> query, key = np.zeros((2, 8, 3, 4)), np.zeros((2, 2, 5, 4))  # 8 query heads share 2 key heads
    >>> value = np.arange(5.0)[:, None]  # one value for all items and heads
    >>> scaled_dot_product_attention(query, key, np.broadcast_to(value, (2, 2, 5, 1)), enable_gqa=True).shape
    (2, 8, 3, 1)
    >>> scaled_dot_product_attention(query[0, 0], key[0, 0], value, is_causal=True).T
    array([[0. , 0.5, 1. ]])
    """
    seed = _dropout_seed(dropout_p, dropout_seed)
    try:
        return _core.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, seed, None
        )
    except REFUSALS as error:
        advise_on_product(error, query, key, value, attn_mask, enable_gqa)
        raise


@overload
def multi_head_attention_forward(
    query: AnyArray, key: AnyArray, value: AnyArray, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: AnyArray | None, in_proj_bias: AnyArray | None, bias_k: AnyArray | None, bias_v: AnyArray | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: AnyArray, out_proj_bias: AnyArray | None,
    training: bool = True, key_padding_mask: AnyArray | None = None, need_weights: Literal[True] = True,
    attn_mask: AnyArray | None = None, use_separate_proj_weight: bool = False, q_proj_weight: AnyArray | None = None,
    k_proj_weight: AnyArray | None = None, v_proj_weight: AnyArray | None = None, static_k: AnyArray | None = None,
    static_v: AnyArray | None = None, average_attn_weights: bool = True, is_causal: bool = False, *,
    dropout_seed: int | None = None,
) -> tuple[Array, Array]: ...
@overload
def multi_head_attention_forward(
    query: AnyArray, key: AnyArray, value: AnyArray, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: AnyArray | None, in_proj_bias: AnyArray | None, bias_k: AnyArray | None, bias_v: AnyArray | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: AnyArray, out_proj_bias: AnyArray | None, training: bool,
    key_padding_mask: AnyArray | None, need_weights: Literal[False], attn_mask: AnyArray | None = None,
    use_separate_proj_weight: bool = False, q_proj_weight: AnyArray | None = None,
    k_proj_weight: AnyArray | None = None, v_proj_weight: AnyArray | None = None, static_k: AnyArray | None = None,
    static_v: AnyArray | None = None, average_attn_weights: bool = True, is_causal: bool = False, *,
    dropout_seed: int | None = None,
) -> tuple[Array, None]: ...
@overload
def multi_head_attention_forward(
    query: AnyArray, key: AnyArray, value: AnyArray, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: AnyArray | None, in_proj_bias: AnyArray | None, bias_k: AnyArray | None, bias_v: AnyArray | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: AnyArray, out_proj_bias: AnyArray | None,
    training: bool = True, key_padding_mask: AnyArray | None = None, *, need_weights: Literal[False],
    attn_mask: AnyArray | None = None, use_separate_proj_weight: bool = False, q_proj_weight: AnyArray | None = None,
    k_proj_weight: AnyArray | None = None, v_proj_weight: AnyArray | None = None, static_k: AnyArray | None = None,
    static_v: AnyArray | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    dropout_seed: int | None = None,
) -> tuple[Array, None]: ...
@overload
def multi_head_attention_forward(
    query: AnyArray, key: AnyArray, value: AnyArray, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: AnyArray | None, in_proj_bias: AnyArray | None, bias_k: AnyArray | None, bias_v: AnyArray | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: AnyArray, out_proj_bias: AnyArray | None,
    training: bool = True, key_padding_mask: AnyArray | None = None, need_weights: bool = True,
    attn_mask: AnyArray | None = None, use_separate_proj_weight: bool = False, q_proj_weight: AnyArray | None = None,
    k_proj_weight: AnyArray | None = None, v_proj_weight: AnyArray | None = None, static_k: AnyArray | None = None,
    static_v: AnyArray | None = None, average_attn_weights: bool = True, is_causal: bool = False, *,
    dropout_seed: int | None = None,
) -> tuple[Array, Array | None]: ...
@knows_foreign_keywords
def multi_head_attention_forward(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: AnyArray | None,
    in_proj_bias: AnyArray | None,
    bias_k: AnyArray | None,
    bias_v: AnyArray | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: AnyArray,
    out_proj_bias: AnyArray | None,
    training: bool = True,
    key_padding_mask: AnyArray | None = None,
    need_weights: bool = True,
    attn_mask: AnyArray | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: AnyArray | None = None,
    k_proj_weight: AnyArray | None = None,
    v_proj_weight: AnyArray | None = None,
    static_k: AnyArray | None = None,
    static_v: AnyArray | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    dropout_seed: int | None = None,
) -> tuple[Array, Array | None]:
    """Compute what `mha_c.MultiheadAttention` computes, with the parameters as arguments.

    N is the batch size, L the number of queries, S the number of keys, E the features of the query, H the number of
    heads. S' is S, or the number of keys in `static_k`, plus one for `bias_k` and one for `add_zero_attn`. The batch is
    always the second axis; without a batch there is no such axis. Parameters are packed in each call, so a layer is
    faster if they stay the same.

    Parameters
    ----------
    query : array, (L, N, E)
        Or (L, E) without a batch.
    key : array, (S, N, kdim)
        Or (S, kdim); kdim is E unless `use_separate_proj_weight`.
    value : array, (S, N, vdim)
        Or (S, vdim); vdim is E unless `use_separate_proj_weight`.
    embed_dim_to_check : int
        The value that E must have.
    num_heads : int
        Number of heads, a divisor of E.
    in_proj_weight : array, (3 * E, E), or None
        The projections of query, key and value, stacked; unused with `use_separate_proj_weight`.
    in_proj_bias : array, (3 * E,), or None
        Their biases, stacked.
    bias_k, bias_v : array, (1, 1, E), or None
        A key and a value to append, without projecting them.
    add_zero_attn : bool
        Whether to append a key and a value of zeros.
    dropout_p : float
        Probability of dropping an attention weight, unless `training` is False.
    out_proj_weight : array, (out_dim, E)
        The output projection. Any out_dim is possible.
    out_proj_bias : array, (out_dim,), or None
        Its bias.
    training : bool, default True
        Whether weights are dropped.
    key_padding_mask : array, (N, S) or (S,), optional
        Booleans: True hides this key. Floats: added to the scores of this key. With `static_k`, S is its number of
        keys.
    need_weights : bool, default True
        Whether to return the attention weights too.
    attn_mask : array, (L, S) or (N * H, L, S) or (H, L, S), optional
        Booleans: True hides this key from this query. Floats: added to the scores.
    use_separate_proj_weight : bool, default False
        Whether the next three arguments are used instead of `in_proj_weight`.
    q_proj_weight, k_proj_weight, v_proj_weight : array, (E, E), (E, kdim), (E, vdim), optional
        The separate projections.
    static_k, static_v : array, (N * H, S', E // H), optional
        Keys and values to use instead of the projected ones. `key` and `value` are then checked but not read.
    average_attn_weights : bool, default True
        Whether the returned weights are averaged over the heads.
    is_causal : bool, default False
        Whether query l sees only the keys 0..l, in addition to the masks.
    dropout_seed : int, optional
        The same seed drops the same weights. None: a random seed in each call. torch does not have this argument.

    Returns
    -------
    attn_output : numpy.ndarray, (L, N, out_dim)
        Or (L, out_dim).
    attn_output_weights : numpy.ndarray or None
        None without `need_weights`; else (N, L, S'), or (N, H, L, S') if not averaged. Without a batch, there is no N.

    Raises
    ------
    AssertionError, RuntimeError, IndexError, TypeError, ValueError
        If ranks, shapes, dtypes or types do not fit, as in torch and in its words. Biases are not broadcast. Unlike in
        torch, `is_causal` does not need an `attn_mask`.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> from mha_c.functional import multi_head_attention_forward
    >>> layer = mha_c.MultiheadAttention(8, 2, seed=0)
    >>> x = np.random.default_rng(0).standard_normal((5, 3, 8), dtype=np.float32)  # (L, N, E)
    >>> output, weights = multi_head_attention_forward(
    ...     x, x, x, 8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
    ...     layer.out_proj.weight, layer.out_proj.bias)
    >>> bool((output == layer(x, x, x)[0]).all())
    True
    """
    try:
        q_shape, k_shape, v_shape = shape_of(query), shape_of(key), shape_of(value)
        if len(q_shape) in (2, 3) and len(k_shape) == len(v_shape) == len(q_shape):  # the core has words for others
            _check_widths(q_shape, k_shape, v_shape, embed_dim_to_check, num_heads, use_separate_proj_weight)
        rows = math.prod(q_shape[:-1])
        width = embed_dim_to_check
        if use_separate_proj_weight:
            features = (width, k_shape[-1], v_shape[-1])
            projections = _separate_projections(features, q_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias)
        else:
            products = 1 if query is key is value else 3  # torch multiplies once where the inputs are the same
            projections = _stacked_projections(width, rows, products, in_proj_weight, in_proj_bias)
        extra = [_extra_key(name, bias, width) for name, bias in (("bias_k", bias_k), ("bias_v", bias_v))]
        output = _output_projection(width, rows, out_proj_weight, out_proj_bias)
        head_dim = width // num_heads
        parameters = _of_one_dtype(use_separate_proj_weight, *projections, *extra, *output)
        return _core.forward(
            _core.Weights(num_heads, num_heads, head_dim, head_dim, parameters[0].dtype, *parameters),
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            None,
            False,
            add_zero_attn,
            "torch",
            dropout_p if training else 0.0,
            _dropout_seed(dropout_p if training else 0.0, dropout_seed),
            0,
            static_k,
            static_v,
        )
    except REFUSALS as error:
        if static_k is None and static_v is None:  # whose lengths and batches are others
            flags = {"need_weights": need_weights, "average_attn_weights": average_attn_weights, "is_causal": is_causal}
            advice = advice_on_call(
                flags,
                query,
                key,
                value,
                key_padding_mask,
                attn_mask,
                num_heads=num_heads,
                features=(embed_dim_to_check, None, None) if use_separate_proj_weight else (embed_dim_to_check,) * 3,
                parameters=(
                    *((q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else (in_proj_weight,)),
                    *(in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias),
                ),
                extra_keys=(bias_k is not None) + bool(add_zero_attn),
                batch_first=None,
            )
            add_advice(error, advice)
        raise


def _check_widths(query: _Shape, key: _Shape, value: _Shape, embed_dim: int, num_heads: int, separate: bool) -> None:
    """torch's checks of the inputs' shapes beside each other, in its order and words."""
    if query[-1] != embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {embed_dim}, but got {query[-1]}")
    if embed_dim // num_heads * num_heads != embed_dim:
        raise AssertionError(f"embed_dim {embed_dim} not divisible by num_heads {num_heads}")
    if len(query) == 2:  # torch gives such inputs a batch axis, and names it
        key, value = (key[0], 1, key[1]), (value[0], 1, value[1])
    if separate and key[:2] != value[:2]:
        raise AssertionError(f"key's sequence and batch dims {key[:2]} do not match value's {value[:2]}")
    if not separate and key != value:
        raise AssertionError(f"key shape {key} does not match value shape {value}")


def _parameter(value: Any, name: str) -> Array:
    """The array of a parameter as the core reads it: C-contiguous, aligned, native byte order."""
    array = as_array(value, name=name)
    return np.require(array, array.dtype.newbyteorder("="), ["C", "A", "E"])


def _separate_projections(
    features: tuple[int, int, int], q_weight: Any, k_weight: Any, v_weight: Any, in_bias: Any
) -> Iterator[Array | None]:
    """The three projections and their stacked bias, from separate weights."""
    given = dict(zip("qkv", (q_weight, k_weight, v_weight), strict=True))
    for letter, weight in given.items():
        if weight is None:
            raise AssertionError(f"use_separate_proj_weight is True but {letter}_proj_weight is None")
    weights = [_parameter(weight, f"{letter}_proj_weight") for letter, weight in given.items()]
    names = ("query", "key", "value")
    for name, weight, depth in zip(names, weights, features, strict=True):
        if weight.shape != (features[0], depth):
            raise AssertionError(f"expecting {name} weights shape of {(features[0], depth)}, but got {weight.shape}")
    yield from weights
    bias = None if in_bias is None else _parameter(in_bias, "in_proj_bias")
    if bias is not None:
        third = max(-(-len(bias) // 3), 1)  # as torch's chunk() cuts what three does not divide
        b_q, b_k, b_v = (bias[start : start + third] for start in range(0, len(bias), third))
        for name, part in zip(names, (b_q, b_k, b_v), strict=True):
            if part.shape != (features[0],):
                raise AssertionError(f"expecting {name} bias shape of {(features[0],)}, but got {part.shape}")
    yield bias


def _check_matrix(weight: Array, rows: int, depth: int, products: int = 1) -> None:
    """What torch says when (rows, depth) cannot be multiplied with a weight, transposed."""
    if weight.ndim != 2:
        raise RuntimeError(f"mat2 must be a matrix, got {weight.ndim}-D tensor")
    features, width = weight.shape
    if width != depth:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({rows}x{depth} and {width}x{features // products})"
        )


def _stacked_projections(
    width: int, rows: int, products: int, in_weight: Any, in_bias: Any
) -> Iterator[Array | None]:
    """The three projections and their stacked bias, from stacked weights."""
    if in_weight is None:
        raise AssertionError("use_separate_proj_weight is False but in_proj_weight is None")
    weight = _parameter(in_weight, "in_proj_weight")
    _check_matrix(weight, rows, width, products)
    if len(weight) != 3 * width:
        raise RuntimeError(f"in_proj_weight must have the shape {(3 * width, width)}, but got {weight.shape}")
    bias = None if in_bias is None else _parameter(in_bias, "in_proj_bias")
    if bias is not None and bias.shape != (3 * width,):
        raise RuntimeError(f"in_proj_bias must have the shape {(3 * width,)}, but got {bias.shape}")
    yield from (weight[:width], weight[width : 2 * width], weight[2 * width :])
    yield bias


def _extra_key(name: str, bias: Any, width: int) -> Array | None:
    """bias_k or bias_v; Weights has torch's words for one without the other."""
    if bias is None:
        return None
    array = _parameter(bias, name)
    if array.size != width or array.shape[-1:] != (width,):
        raise RuntimeError(
            f"Sizes of tensors must match except in dimension 0. Expected size {width} but got size "
            f"{array.shape[-1] if array.ndim else 1} for tensor number 1 in the list."
        )
    return array.reshape(1, 1, width)


def _output_projection(width: int, rows: int, out_weight: Any, out_bias: Any) -> Iterator[Array | None]:
    if out_weight is None:
        raise TypeError("linear(): argument 'weight' (position 2) must be Tensor, not NoneType")
    weight = _parameter(out_weight, "out_proj_weight")
    _check_matrix(weight, rows, width)
    bias = None if out_bias is None else _parameter(out_bias, "out_proj_bias")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"out_proj_bias must have the shape {weight.shape[:1]}, but got {bias.shape}")
    yield weight
    yield bias


def _of_one_dtype(is_separate: bool, *parameters: Array | None) -> tuple[Any, ...]:
    """The parameters, if they are all of the dtype of the first one."""
    inputs = SEPARATE_WEIGHTS if is_separate else ("in_proj_weight",) * 3
    names = (*inputs, "in_proj_bias", "bias_k", "bias_v", "out_proj_weight", "out_proj_bias")
    given = [(name, array.dtype) for name, array in zip(names, parameters, strict=True) if array is not None]
    first_name, first = given[0]
    for name, dtype in given:
        if dtype != first:
            a, b = (_TORCH_NAMES.get(d.name, d.name) for d in (first, dtype))
            raise RuntimeError(
                f"{name} is {dtype}, but {first_name} is {first}: pass parameters of one dtype. "
                f"torch says: mat1 and mat2 must have the same dtype, but got {a} and {b}"
            )
    return parameters


@knows_foreign_keywords
def layer_norm(
    input: AnyArray,
    normalized_shape: Sequence[int],
    weight: AnyArray | None = None,
    bias: AnyArray | None = None,
    eps: float = 1e-5,
) -> Array:
    """Compute what `mha_c.LayerNorm` computes, with the parameters as arguments.

    Parameters
    ----------
    input : array, (..., normalized_shape)
        float32, float64, bfloat16 or float16. The last two are computed as float32, and the result is rounded once.
    normalized_shape : tuple or list of int
        The sizes of the last axes, over which the input is normalized.
    weight : array, of the shape `normalized_shape`, optional
        The factors of the features, of the input's dtype. If that has 16 bits, float32 will do, too, as in torch.
    bias : array, of the shape `normalized_shape`, optional
        What is added to the features. Its dtype is as for `weight`.
    eps : float, default 1e-05
        Added to the variance.

    Returns
    -------
    numpy.ndarray
        C-contiguous, of the input's shape and dtype.

    Raises
    ------
    RuntimeError, TypeError, NotImplementedError
        If shapes, dtypes or types do not fit, as in torch. The message has torch's words and says what to write
        instead.

    Examples
    --------
    >>> import numpy as np
    >>> from mha_c.functional import layer_norm
    >>> layer_norm(np.array([[1.0, 3.0], [5.0, 5.0]]), (2,), eps=0.0625).round(4)
    array([[-0.9701,  0.9701],
           [ 0.    ,  0.    ]])
    """
    try:
        return _core.normalize(input, normalized_shape, weight, bias, eps, False)
    except REFUSALS as error:
        advise_on_norm(error, input, normalized_shape, weight, bias)
        raise


@knows_foreign_keywords
def rms_norm(
    input: AnyArray, normalized_shape: Sequence[int], weight: AnyArray | None = None, eps: float | None = None
) -> Array:
    """Compute what `mha_c.RMSNorm` computes, with the weight as an argument.

    Parameters
    ----------
    input : array, (..., normalized_shape)
        float32, float64, bfloat16 or float16. The last two are computed as float32, and the result is rounded once.
    normalized_shape : tuple or list of int
        The sizes of the last axes, over which the input is normalized.
    weight : array, of the shape `normalized_shape`, optional
        The factors of the features, of the input's dtype. If that has 16 bits, float32 will do, too, as in torch.
    eps : float, optional
        Added to the mean of the squares. None: the machine's epsilon, in float64 for an input of float64, and otherwise
        in float32.

    Returns
    -------
    numpy.ndarray
        C-contiguous, of the input's shape and dtype.

    Raises
    ------
    RuntimeError, ValueError, TypeError, NotImplementedError
        If shapes, dtypes or types do not fit, as in torch. Unlike in torch, the weight must have the input's
        dtype, except that it may be float32 if that has 16 bits.

    Examples
    --------
    >>> import numpy as np
    >>> from mha_c.functional import rms_norm
    >>> rms_norm(np.array([3.0, 4.0, 0.0, 0.0]), (4,), np.array([1.0, 1.0, 1.0, 2.0])).round(4)
    array([1.2, 1.6, 0. , 0. ])
    """
    try:
        return _core.normalize(input, normalized_shape, weight, None, eps, True)
    except REFUSALS as error:
        advise_on_norm(error, input, normalized_shape, weight, None)
        raise
