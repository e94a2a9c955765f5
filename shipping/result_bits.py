# SPDX-License-Identifier: Apache-2.0
"""Print one hash per dtype over the results of many calls: equal wherever an FMA instruction set computes them.

    python shipping/result_bits.py

Wheels from different compilers, C libraries and processors can thus be compared. MHA_C_CPU chooses the instruction set.
"""

import hashlib
import itertools

import numpy as np

import mha_c

# (N, L, S, E, H): less than a panel, more than a block of keys, odd widths, far more keys than queries.
SHAPES = [(3, 5, 5, 8, 4), (2, 70, 130, 96, 4), (1, 33, 129, 60, 5), (2, 1, 300, 64, 2), (1, 200, 200, 128, 2)]


def results(dtype):
    """Outputs and weights of all shapes under all masks."""
    for (n, length, source_length, width, heads), causal, extra in itertools.product(SHAPES, (0, 1), (False, True)):
        rng = np.random.default_rng(width)
        query, key = (rng.standard_normal((n, count, width)).astype(dtype) for count in (length, source_length))
        layer = mha_c.MultiheadAttention(
            width, heads, add_bias_kv=extra, add_zero_attn=extra, batch_first=True, dtype=dtype, seed=0
        ).eval()
        padding = np.arange(source_length) >= rng.integers(1, source_length + 1, n)[:, None]
        bias = rng.standard_normal((length, source_length)).astype(dtype)
        for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": bias}):
            yield from layer(query, key, key, is_causal=bool(causal), average_attn_weights=False, **masks)


for dtype in ("float32", "float64"):
    digest = hashlib.sha256()
    for array in results(dtype):
        digest.update(array.tobytes())
    print(dtype, digest.hexdigest()[:32])
