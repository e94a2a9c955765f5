# SPDX-License-Identifier: Apache-2.0
"""mha_c and torch.nn.MultiheadAttention, given the same parameters and the same call, are the same function.

Each case runs both and holds both to the reference (helpers.assert_matches): torch within half of what mha_c may be
off. So an error in the reference, in the tolerance or in mha_c shows, and which of them it is.
"""

import itertools

import numpy as np
import pytest
from helpers import ROUNDINGS, assert_matches, call_torch, causal_mask, inputs, layer, normal, torch_twin

pytest.importorskip("torch")

WEIGHTS = ({"need_weights": False}, {}, {"average_attn_weights": False})


def attn_masks(n, h, length, s, dtype):
    """One mask of every kind; a fifth of the entries hidden, or random numbers with a few -inf."""
    rng = np.random.default_rng(length * 1000 + s)
    for shape in ((length, s), (n * h, length, s)):
        hidden = rng.random(shape) < 0.2
        yield hidden
        yield np.where(hidden, -np.inf, rng.standard_normal(shape)).astype(dtype)
    yield causal_mask(length, s)
    yield None


def padding_masks(n, s, dtype):
    """None, a bool and a float mask; every item keeps its first key and loses another number of the last ones."""
    kept = 1 + (np.arange(n)[:, None] * 5 + s - 1) % max(s, 1)
    hidden = np.arange(s) >= kept
    yield None
    yield hidden
    yield np.where(hidden, -np.inf, normal((n, s), dtype)).astype(dtype)


def assert_both_match(module, twin, given, **call):
    """One call to both; `what` names the case in a failure."""
    what = ", ".join(f"{k}={getattr(v, 'dtype', v)}{list(v.shape) if hasattr(v, 'shape') else ''}"
                     for k, v in call.items())
    theirs = call_torch(twin, *given, **call)
    assert_matches(module, theirs, *given, **call, roundings=ROUNDINGS / 2, what=f"torch: {what}:")
    ours = module(*given, **call)
    assert_matches(module, ours, *given, **call, what=f"mha_c: {what}:")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 9}, {"vdim": 3}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True], ids=["seq_first", "batch_first"])
@pytest.mark.parametrize("bias, add_bias_kv, add_zero_attn", list(itertools.product([True, False], repeat=3)))
def test_every_option(bias, add_bias_kv, add_zero_attn, batch_first, widths, dtype):
    """The product of the constructor's options; in each, the product of the masks and of the weights."""
    n, length, s, e, h = 3, 4, 6, 12, 3
    module = layer(e, h, bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first,
                   dtype=dtype, **widths)
    twin = torch_twin(module)
    given = inputs(n, length, s, e, batch_first=batch_first, dtype=dtype, **widths)
    for attn_mask, key_padding_mask in itertools.product(attn_masks(n, h, length, s, dtype),
                                                         padding_masks(n, s, dtype)):
        for weights in WEIGHTS:
            assert_both_match(module, twin, given, attn_mask=attn_mask, key_padding_mask=key_padding_mask, **weights)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 7, "vdim": 5}], ids=str)
def test_unbatched(options, dtype):
    """(L, E) inputs, with the masks that go with them; batch_first changes nothing."""
    length, s, e, h = 4, 6, 8, 2
    widths = {name: options[name] for name in ("kdim", "vdim") if name in options}
    for batch_first in (False, True):
        module = layer(e, h, batch_first=batch_first, dtype=dtype, **options)
        twin = torch_twin(module)
        given = inputs(None, length, s, e, dtype=dtype, **widths)
        for attn_mask, key_padding_mask in itertools.product(attn_masks(1, h, length, s, dtype),
                                                             padding_masks(1, s, dtype)):
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[0]
            for weights in WEIGHTS:
                assert_both_match(module, twin, given, attn_mask=attn_mask, key_padding_mask=key_padding_mask,
                                  **weights)


@pytest.mark.parametrize("batch_first", [False, True], ids=["seq_first", "batch_first"])
def test_shared_inputs(batch_first):
    """The same array passed twice or three times is projected in one pass: q is k is v, k is v, q is k, q is v, views
    that are equal but not identical, and views that only begin at the same address."""
    module = layer(16, 4, batch_first=batch_first)
    twin = torch_twin(module)
    x, y, _ = inputs(3, 5, 5, 16, batch_first=batch_first)
    equal = x[:, :, :]
    reversed_rows = x[::-1] if batch_first else x[:, ::-1]
    cases = [(x, x, x), (y, x, x), (x, x, y), (x, y, x), (equal, x, x), (x, x[...], equal), (x, reversed_rows, x),
             (x[:, :, ::-1], x, x[:, :, ::-1])]
    for given in cases:
        for weights in WEIGHTS:
            assert_both_match(module, twin, given, **weights)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_empty_sizes(dtype):
    """L, N and S of zero, alone and together: no keys means attention 0 and an output of nothing but the bias.

    torch fails with some masks on these ("cannot reshape tensor of 0 elements"), for no reason; mha_c answers.
    """
    for n, length, s in itertools.product([0, 2], [0, 3], [0, 4]):
        for options in ({}, {"add_zero_attn": True}, {"add_bias_kv": True}):
            module = layer(8, 2, dtype=dtype, **options)
            twin = torch_twin(module)
            given = inputs(n, length, s, 8, batch_first=False, dtype=dtype)
            for attn_mask, key_padding_mask in ((None, None), (np.zeros((length, s), bool), np.zeros((n, s), bool))):
                for weights in WEIGHTS:
                    call = dict(weights, attn_mask=attn_mask, key_padding_mask=key_padding_mask)
                    if attn_mask is None or weights.get("need_weights", True) or n * s:
                        assert_both_match(module, twin, given, **call)
                    else:
                        assert_matches(module, module(*given, **call), *given, **call)


@pytest.mark.parametrize("kdim", [0, 1])
def test_narrow_keys(kdim):
    """Keys without a single feature are all the same key; torch allows it."""
    module = layer(8, 2, kdim=kdim, vdim=3)
    assert_both_match(module, torch_twin(module), inputs(2, 3, 4, 8, kdim=kdim, vdim=3, batch_first=False))


# Keys and queries around the blocks of 64 keys and the panels of 4 to 96 queries; features around vectors and chains.
EDGES = (1, 2, 7, 8, 9, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 130, 193)


@pytest.mark.parametrize("s", EDGES)
def test_edges_of_key_blocks(s):
    """Every number of keys at which a block begins or ends, under masks that empty, cut and spare blocks."""
    n, length, e, h = 2, 5, 16, 2
    module = layer(e, h, batch_first=True)
    twin = torch_twin(module)
    given = inputs(n, length, s, e)
    masks = attn_masks(n, h, length, s, "float32") if s > 4 else [None]
    for attn_mask in masks:
        for key_padding_mask in padding_masks(n, s, "float32"):
            for weights in WEIGHTS[:2]:
                assert_both_match(module, twin, given, attn_mask=attn_mask, key_padding_mask=key_padding_mask,
                                  **weights)


@pytest.mark.parametrize("length", (*EDGES, 257, 385))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_edges_of_query_panels(length, dtype):
    """Every number of queries at which a panel, or a group of panels, begins or ends; causal, where blocks of keys
    fall away one by one, and not."""
    module = layer(16, 2, dtype=dtype, batch_first=True)
    twin = torch_twin(module)
    given = inputs(2, length, length, 16, dtype=dtype, same=True)
    for attn_mask in (None, causal_mask(length, length)):
        for weights in ({"need_weights": False}, {}):
            assert_both_match(module, twin, given, attn_mask=attn_mask, **weights)


@pytest.mark.parametrize("e, h", [(1, 1), (3, 1), (3, 3), (7, 7), (10, 2), (63, 3), (65, 5), (64, 1), (126, 2),
                                  (127, 1), (128, 2), (129, 3), (130, 1), (192, 8), (257, 1), (264, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_edges_of_features(e, h, dtype):
    """Widths around the vectors, the panels and the chains of 64 features, and heads of 1 to 264 features."""
    module = layer(e, h, dtype=dtype)
    twin = torch_twin(module)
    given = inputs(2, 5, 9, e, batch_first=False, dtype=dtype)
    for weights in WEIGHTS[:2]:
        assert_both_match(module, twin, given, **weights)


@pytest.mark.parametrize("n, length, s, e, h, kdim", [
    (1, 1, 600, 64, 2, 48),    # one query: keys need not be projected, and fall into chunks of 512
    (3, 2, 1100, 32, 2, 20),   # more than two chunks
    (2, 700, 3, 32, 4, 20),    # few keys
    (9, 33, 33, 24, 3, None),  # more items than threads
])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "extra_keys"])
def test_unbalanced_shapes(n, length, s, e, h, kdim, options):
    """Shapes whose best order of computation is another one, with and without padding, masks and weights."""
    module = layer(e, h, batch_first=True, kdim=kdim, vdim=kdim, **options)
    twin = torch_twin(module)
    given = inputs(n, length, s, e, kdim=kdim, vdim=kdim)
    cases = [{}, {"attn_mask": normal((length, s))}] + [{"key_padding_mask": m} for m in padding_masks(n, s, "float32")]
    for masks in cases:
        for weights in WEIGHTS[:2]:
            assert_both_match(module, twin, given, **masks, **weights)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 30.0])
def test_sizes_of_numbers(scale):
    """Tiny inputs (nothing may become a denormal too early) and scores so large that softmax picks single keys."""
    module = layer(32, 2, batch_first=True)
    given = tuple((scale * x).astype("float32") for x in inputs(2, 6, 70, 32))
    for weights in WEIGHTS[:2]:
        assert_both_match(module, torch_twin(module), given, **weights)


def test_nan_and_infinity_spread_as_in_torch():
    """A NaN or an infinity in an input reaches exactly the numbers that it reaches in torch."""
    module = layer(8, 2, batch_first=True)
    twin = torch_twin(module)
    for where, bad, need_weights in itertools.product(range(3), (np.nan, np.inf, -np.inf), (True, False)):
        given = list(inputs(2, 3, 70, 8))
        given[where][1, 2, 3] = bad
        ours = module(*given, need_weights=need_weights)
        theirs = call_torch(twin, *given, need_weights=need_weights)
        for got, want in zip(ours, theirs):
            if want is not None:
                np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5, err_msg=f"{bad} in input {where}")
                assert np.isfinite(want[0]).all() and not np.isfinite(ours[0][1]).all()


def test_free_widths_against_the_reference():
    """Widths that torch ties together: head_dim, v_head_dim, out_dim and fewer key/value heads than heads."""
    for h, hkv, d, dv, eo, kdim in ((4, 2, 3, 5, 7, None), (4, 1, 8, 8, 8, 5), (6, 3, 16, 1, 130, None),
                                    (1, 1, 40, 64, 1, 9)):
        module = layer(12, h, num_kv_heads=hkv, head_dim=d, v_head_dim=dv, out_dim=eo, kdim=kdim, vdim=kdim,
                       batch_first=True)
        given = inputs(2, 5, 66, 12, kdim=kdim, vdim=kdim)
        for weights in WEIGHTS:
            for masks in ({}, {"attn_mask": causal_mask(5, 66)}, {"attn_mask": normal((2 * h, 5, 66))}):
                assert_matches(module, module(*given, **masks, **weights), *given, **masks, **weights)


def test_layout_of_results():
    """Outputs are new, writable, native arrays; weights are C-contiguous and batch-first whatever batch_first says."""
    for batch_first in (False, True):
        module = layer(8, 2, batch_first=batch_first)
        given = inputs(3, 4, 5, 8, batch_first=batch_first)
        output, weights = module(*given, average_attn_weights=False)
        assert output.shape == given[0].shape and weights.shape == (3, 2, 4, 5)
        for array in (output, weights):
            assert type(array) is np.ndarray and array.flags.writeable and array.flags.aligned
            assert array.dtype == np.dtype("float32") and array.dtype.isnative
        assert weights.flags.c_contiguous
        assert not any(np.shares_memory(output, x) for x in given)
