# SPDX-License-Identifier: Apache-2.0
"""Attention by its definition, in a wider type: what every result of mha_c and of torch is compared with.

Letters as everywhere in the project: N items, L queries, S keys, H heads, D features of a head. Sizes are small and
nothing here is fast. `parameters` is a state dict under torch's names, of NumPy arrays or torch tensors.
"""

import numpy as np


def wider(array):
    """float64 for float32, np.longdouble for float64: results in it are exact as far as the narrower type can tell."""
    array = np.asarray(array)
    return array.astype(np.longdouble if array.dtype == np.float64 else np.float64)


def computed_in(dtype):
    """The dtype in which a layer computes: halves are only stored."""
    return np.dtype("float32") if dtype.itemsize == 2 else dtype


def split_parameters(parameters, num_heads, num_kv_heads):
    """Weights and biases of q, k and v, from either of torch's two ways to store them; then those of the output."""
    p = {name: wider(array) for name, array in parameters.items()}
    value_width = p["out_proj.weight"].shape[1] // num_heads
    if "in_proj_weight" in p:
        width = (len(p["in_proj_weight"]) - num_kv_heads * value_width) // (num_heads + num_kv_heads)
        weights = np.split(p["in_proj_weight"], np.cumsum([num_heads * width, num_kv_heads * width]))
    else:
        weights = [p["q_proj_weight"], p["k_proj_weight"], p["v_proj_weight"]]
    biases = [0.0] * 3
    if "in_proj_bias" in p:
        biases = np.split(p["in_proj_bias"], np.cumsum([len(weights[0]), len(weights[1])]))
    return list(zip(weights, biases)), (p["out_proj.weight"], p.get("out_proj.bias", 0.0)), p


def heads(x_nse, count, repeat=1):
    """(N, S, H*D) to (N, H, S, D); each head `repeat` times, which is what grouped-query attention means."""
    n, s, features = x_nse.shape
    return x_nse.reshape(n, s, count, features // count).transpose(0, 2, 1, 3).repeat(repeat, axis=1)


def appended(x_nse, bias, add_zero_attn):
    """The keys (or values) that a layer adds to those of the input: bias_k, then zero; neither is projected."""
    n, _, features = x_nse.shape
    extra = [] if bias is None else [np.broadcast_to(bias, (n, 1, features))]
    extra += [np.zeros((n, 1, features))] if add_zero_attn else []
    return np.concatenate([x_nse, *extra], axis=1)


def attention_scores(parameters, num_heads, query, key, num_kv_heads=None, add_zero_attn=False):
    """(N, H, L, S'): the scalar product of every query with every key, over the square root of D."""
    num_kv_heads = num_kv_heads or num_heads
    ((wq, bq), (wk, bk), _), _, p = split_parameters(parameters, num_heads, num_kv_heads)
    q = heads(wider(query) @ wq.T + bq, num_heads)
    k = appended(wider(key) @ wk.T + bk, p.get("bias_k"), add_zero_attn)
    k = heads(k, num_kv_heads, num_heads // num_kv_heads)
    return q @ k.swapaxes(-1, -2) / np.sqrt(q.dtype.type(q.shape[-1]))


def attention_output(parameters, num_heads, weights, value, num_kv_heads=None, add_zero_attn=False):
    """(N, L, E): the values averaged with given weights (N, H, L, S'), and the heads joined by the last projection."""
    num_kv_heads = num_kv_heads or num_heads
    (_, _, (wv, bv)), (wo, bo), p = split_parameters(parameters, num_heads, num_kv_heads)
    v = appended(wider(value) @ wv.T + bv, p.get("bias_v"), add_zero_attn)
    context = weights @ heads(v, num_kv_heads, num_heads // num_kv_heads)
    n, h, length, width = context.shape
    return context.transpose(0, 2, 1, 3).reshape(n, length, h * width) @ wo.T + bo


def combined_mask(shape, dtype, attn_mask=None, key_padding_mask=None, is_causal=False):
    """All masks as one array of `shape` (N, H, L, S) to add to the scores, summed in the dtype in which the layer
    computes: in float32, -1e38 and -3e38 are together -inf."""
    def as_float(mask):
        mask = np.asarray(mask)
        return np.where(mask, -np.inf, 0.0).astype(dtype) if mask.dtype == bool else mask.astype(dtype)

    n, h, length, s = shape
    total = np.zeros(shape, dtype)
    with np.errstate(over="ignore"):
        if attn_mask is not None:
            mask = as_float(attn_mask)
            total = total + (mask if mask.ndim == 2 else mask.reshape(shape))
        if key_padding_mask is not None:
            total = total + as_float(key_padding_mask).reshape(n, 1, 1, s)
        if is_causal:
            total = total + as_float(np.arange(s) > np.arange(length)[:, None])
    return total


def softmax(scores, empty):
    """Over the last axis; a row whose every score is -inf, or that has none, becomes `empty`."""
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    exponentials = np.exp(scores - np.where(np.isneginf(top), 0, top))
    return np.where(np.isneginf(top), empty, exponentials / np.maximum(exponentials.sum(-1, keepdims=True), 1e-300))


def multi_head_attention(parameters, num_heads, query, key, value, key_padding_mask=None, need_weights=True,
                         attn_mask=None, average_attn_weights=True, is_causal=False, *, batch_first=False,
                         num_kv_heads=None, add_zero_attn=False, masked_rows="torch"):
    """The whole forward: (output, weights or None), in torch's layout, in the wider type."""
    if query.ndim == 2:
        inputs = (x[None] for x in (query, key, value))
    else:
        inputs = (x if batch_first else x.swapaxes(0, 1) for x in (query, key, value))
    query_nle, key_nse, value_nse = inputs
    scores = attention_scores(parameters, num_heads, query_nle, key_nse, num_kv_heads, add_zero_attn)
    if attn_mask is not None or key_padding_mask is not None or is_causal:
        n, h, length, _ = scores.shape
        s = key_nse.shape[1]  # the columns after these are visible to everybody
        own = computed_in(query.dtype)
        mask = combined_mask((n, h, length, s), own, attn_mask, key_padding_mask, is_causal)
        # The sum is rounded as in the layer: next to -1e9 a score vanishes, here as there.
        scores[..., :s] = (scores[..., :s] + mask).astype(own)
    weights = softmax(scores, np.nan if masked_rows == "torch" and need_weights else 0.0)
    output = attention_output(parameters, num_heads, weights, value_nse, num_kv_heads, add_zero_attn)
    if average_attn_weights:
        weights = weights.mean(axis=1)
    if query.ndim == 2:
        output, weights = output[0], weights[0]
    elif not batch_first:
        output = output.swapaxes(0, 1)
    return output, weights if need_weights else None
