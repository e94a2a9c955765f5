# SPDX-License-Identifier: Apache-2.0
"""What masks mean: torch's rules, and what mha_c decides where torch is inconsistent."""

import warnings

import numpy as np
import pytest
from helpers import assert_matches, causal_mask, inputs, layer, normal

WEIGHTS = ({"need_weights": False}, {}, {"average_attn_weights": False})
INF = np.inf


def zeroed(array, hidden):
    """`array` (N, S, E) with 0 wherever `hidden` (N, S) says so."""
    return np.where(hidden[:, :, None], 0, array).astype(array.dtype)


# ------------------------------------------------------------------------------------------- causal


@pytest.mark.parametrize("length, s", [(1, 1), (1, 5), (5, 1), (6, 6), (4, 9), (9, 4), (70, 200), (200, 70),
                                       (130, 130)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_causal_is_a_real_mask(length, s, dtype):
    """is_causal=True hides the keys after the query, counted from the first, with or without weights, an attn_mask or
    padding, whatever L and S are: the same bits as the causal mask written out."""
    module = layer(16, 2, batch_first=True, dtype=dtype)
    given = inputs(2, length, s, 16, dtype=dtype)
    causal = causal_mask(length, s)
    padding = np.arange(s) >= np.array([[s], [max(s - 3, 1)]])
    hidden = np.random.default_rng(2).random((length, s)) < 0.2
    hidden[:, 0] = False
    bias = normal((4, length, s), dtype)
    for extra in ({}, {"key_padding_mask": padding}):
        for weights in WEIGHTS:
            for mask, spelt_out in ((None, causal), (hidden, hidden | causal), (bias, np.where(causal, -INF, bias))):
                got = module(*given, attn_mask=mask, is_causal=True, **extra, **weights)
                assert_matches(module, got, *given, attn_mask=mask, is_causal=True, **extra, **weights)
                want = module(*given, attn_mask=spelt_out.astype(causal.dtype if mask is None else mask.dtype), **extra,
                              **weights)
                np.testing.assert_array_equal(got[0], want[0])
                np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"add_bias_kv": True},
                                     {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_causal_leaves_extra_keys_visible(options):
    """bias_k and the zero key come after the input's keys, yet every query sees them."""
    module = layer(8, 2, batch_first=True, **options)
    given = inputs(2, 5, 5, 8)
    for weights in WEIGHTS:
        assert_matches(module, module(*given, is_causal=True, **weights), *given, is_causal=True, **weights)
    shares = module(*given, is_causal=True)[1]
    assert (shares[:, :, 5:] > 0).all()


def test_causal_unbatched():
    module = layer(8, 2)
    given = inputs(None, 5, 7, 8)
    for weights in WEIGHTS:
        assert_matches(module, module(*given, is_causal=True, **weights), *given, is_causal=True, **weights)


# ------------------------------------------------------------------------------------------- rows without keys


@pytest.mark.parametrize("masked_rows", ["torch", "zero"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("s", [3, 64, 150])
def test_rows_without_keys(masked_rows, dtype, s):
    """A query that sees no key: NaN with weights and attention 0 without (torch), or 0 in both ("zero"); by an
    attn_mask, by padding, by both together, by bools or -inf. Other rows are not affected."""
    module = layer(8, 2, batch_first=True, dtype=dtype, masked_rows=masked_rows)
    assert module.masked_rows == masked_rows
    given = inputs(2, 5, s, 8, dtype=dtype)
    row = np.zeros((5, s), bool)
    row[2] = True
    one_head = np.zeros((4, 5, s), bool)
    one_head[1, 3] = True
    item = np.zeros((2, s), bool)
    item[1] = True
    half = np.zeros((2, s), bool)
    half[:, s // 2:] = True
    for call in ({"attn_mask": row}, {"attn_mask": one_head}, {"key_padding_mask": item},
                 {"attn_mask": ~half[:1] | row, "key_padding_mask": half},
                 {"attn_mask": np.ones((5, s), bool)}, {"key_padding_mask": np.ones((2, s), bool)}):
        for as_float in (False, True):
            masks = {name: np.where(m, -INF, 0).astype(dtype) if as_float else m for name, m in call.items()}
            for weights in WEIGHTS:
                assert_matches(module, module(*given, **masks, **weights), *given, **masks, **weights)


def test_masked_rows_is_an_attribute():
    """It may be changed after construction; nothing but "torch" and "zero" is accepted."""
    import mha_c
    module = layer(8, 2)
    module.masked_rows = "zero"
    given = inputs(1, 2, 3, 8, batch_first=False)
    assert np.isfinite(module(*given, attn_mask=np.ones((2, 3), bool))[0]).all()
    with pytest.raises(ValueError):
        mha_c.MultiheadAttention(8, 2, masked_rows="one")


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"add_bias_kv": True}], ids=str)
def test_extra_keys_save_rows(options):
    """With bias_k or a zero key there is always a key left, so no row is empty."""
    module = layer(8, 2, batch_first=True, **options)
    given = inputs(2, 3, 70, 8)
    for masks in ({"attn_mask": np.ones((3, 70), bool)}, {"key_padding_mask": np.ones((2, 70), bool)}):
        for weights in WEIGHTS:
            got = module(*given, **masks, **weights)
            assert np.isfinite(got[0]).all()
            assert_matches(module, got, *given, **masks, **weights)


# ------------------------------------------------------------------------------------------- removed keys


@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
@pytest.mark.parametrize("s", [6, 64, 130])
def test_removed_keys_do_not_leak(bad, s):
    """What stands in keys and values that key_padding_mask removes is never read: the bits are those of zeros there.
    (In torch 0 * NaN leaks.) By bool and by -inf, at the end of an item and in its middle."""
    module = layer(16, 2, batch_first=True)
    query, key, value = inputs(3, 5, s, 16)
    hidden = np.zeros((3, s), bool)
    hidden[1, s - 2:] = True
    hidden[2, 1::2] = True
    dirty = [np.where(hidden[:, :, None], np.float32(bad), x) for x in (key, value)]
    clean = [zeroed(x, hidden) for x in (key, value)]
    for mask in (hidden, np.where(hidden, -INF, 0).astype("float32"), np.where(hidden, -INF, normal((3, s)))):
        for weights in WEIGHTS:
            got = module(query, *dirty, key_padding_mask=mask, **weights)
            want = module(query, *clean, key_padding_mask=mask, **weights)
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])
            assert np.isfinite(got[0]).all()
            assert_matches(module, got, query, *clean, key_padding_mask=mask.astype(
                bool if mask.dtype == bool else "float32"), **weights)


def test_removed_keys_of_a_self_attention():
    """The same array is query, key and value: rows of removed tokens are NaN (they ask with NaN), the others not."""
    module = layer(16, 2, batch_first=True)
    x = inputs(2, 70, 70, 16, same=True)[0]
    x[1, 50:] = np.nan
    output, weights = module(x, x, x, key_padding_mask=np.isnan(x[:, :, 0]))
    assert np.isfinite(output[0]).all() and np.isfinite(output[1, :50]).all() and np.isnan(output[1, 50:]).all()
    assert np.isfinite(weights[1, :50]).all() and (weights[1, :50, 50:] == 0).all()


# ------------------------------------------------------------------------------------------- numbers in masks


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_most_negative_number_is_not_minus_infinity(dtype):
    """A mask of finfo.min everywhere leaves all keys alike, so attention is uniform: not NaN, not 0. In part of the
    row it hides as -inf does."""
    module = layer(8, 2, batch_first=True, dtype=dtype)
    given = inputs(2, 3, 70, 8, dtype=dtype)
    lowest = np.finfo(dtype).min
    mask = np.full((3, 70), lowest, dtype)
    mask[2, :4] = 0
    for masks in ({"attn_mask": mask}, {"key_padding_mask": np.full((2, 70), lowest, dtype)}):
        for weights in WEIGHTS:
            assert_matches(module, module(*given, **masks, **weights), *given, **masks, **weights)
    uniform = module(*given, attn_mask=mask)[1]
    np.testing.assert_allclose(uniform[:, :2], 1 / 70, rtol=1e-6)
    assert (uniform[:, 2, 4:] == 0).all()


def test_huge_finite_masks():
    """-1e9 is what many programs write for "never"; scores vanish beside it, in float32, as in torch."""
    module = layer(8, 2, batch_first=True)
    given = inputs(1, 3, 9, 8)
    mask = np.full((3, 9), -1e9, "float32")
    mask[0, 2] = 0
    for weights in WEIGHTS:
        assert_matches(module, module(*given, attn_mask=mask, **weights), *given, attn_mask=mask, **weights)
    np.testing.assert_allclose(module(*given, attn_mask=mask)[1][0, 1:], 1 / 9, rtol=1e-6)


def test_masks_are_added_to_each_other_first():
    """-1e38 + -3e38 is -inf in float32: the row is empty, though each mask alone would leave it uniform."""
    module = layer(8, 2, batch_first=True)
    given = inputs(2, 3, 5, 8)
    masks = {"attn_mask": np.full((3, 5), -1e38, "float32"), "key_padding_mask": np.full((2, 5), -3e38, "float32")}
    assert np.isnan(module(*given, **masks)[0]).all()
    output = module(*given, **masks, need_weights=False)[0]
    np.testing.assert_array_equal(output, np.broadcast_to(module.out_proj.bias, output.shape))
    for name, mask in masks.items():
        np.testing.assert_allclose(module(*given, **{name: mask})[1], 1 / 5, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, INF])
def test_nan_and_infinity_in_masks(bad):
    """As in torch a NaN or +inf in a mask makes its row NaN, and only that."""
    module = layer(8, 2, batch_first=True)
    given = inputs(2, 3, 70, 8)
    mask = np.zeros((3, 70), "float32")
    mask[1, 66] = bad
    for weights in WEIGHTS[:2]:
        output = module(*given, attn_mask=mask, **weights)[0]
        assert np.isnan(output[:, 1]).all() and np.isfinite(output[:, [0, 2]]).all()


@pytest.mark.parametrize("layer_dtype", ["float32", "float64"])
@pytest.mark.parametrize("mask_dtype", ["float16", "float32", "float64", ">f4", ">f8"])
def test_float_masks_of_any_dtype(layer_dtype, mask_dtype):
    """A float mask need not have the layer's dtype (torch insists): it is cast."""
    module = layer(8, 2, batch_first=True, dtype=layer_dtype)
    given = inputs(2, 3, 70, 8, dtype=layer_dtype)
    attn_mask = np.where(causal_mask(3, 70) & (np.arange(70) > 9), -INF, normal((3, 70))).astype(mask_dtype)
    padding = np.where(np.arange(70) > np.array([[60], [66]]), -INF, normal((2, 70))).astype(mask_dtype)
    for masks in ({"attn_mask": attn_mask}, {"key_padding_mask": padding},
                  {"attn_mask": attn_mask, "key_padding_mask": padding}):
        cast = {name: mask.astype(layer_dtype) for name, mask in masks.items()}
        for weights in WEIGHTS:
            got = module(*given, **masks, **weights)
            want = module(*given, **cast, **weights)
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])
            assert_matches(module, got, *given, **cast, **weights)


def test_bool_beside_float_does_not_warn():
    """torch warns that a bool mask beside a float one is deprecated; here both kinds mix in silence."""
    module = layer(8, 2, batch_first=True)
    given = inputs(2, 3, 5, 8)
    masks = {"attn_mask": normal((3, 5)), "key_padding_mask": np.array([[False] * 5, [False] * 3 + [True] * 2])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = module(*given, **masks)
    assert_matches(module, got, *given, **masks)


# ------------------------------------------------------------------------------------------- masks in memory


def layouts(mask):
    """The same mask in other memory: transposed, reversed, spread out, misaligned, read-only, broadcast."""
    yield np.asfortranarray(mask)
    yield np.ascontiguousarray(mask[..., ::-1])[..., ::-1]
    yield np.ascontiguousarray(mask[::-1])[::-1]
    spread = np.zeros((*mask.shape[:-1], mask.shape[-1] * 3 + 1), mask.dtype)
    spread[..., 1::3] = mask
    yield spread[..., 1::3]
    raw = np.zeros(mask.nbytes + 1, np.uint8)[1:]
    raw[:] = np.frombuffer(mask.tobytes(), np.uint8)
    yield raw.view(mask.dtype).reshape(mask.shape)
    frozen = mask.copy()
    frozen.setflags(write=False)
    yield frozen
    yield mask.astype(mask.dtype.newbyteorder())


@pytest.mark.parametrize("kind", ["bool", "float32", "float64"])
def test_layout_of_masks_does_not_matter(kind):
    """Bits depend on a mask's numbers, not on where they stand."""
    module = layer(8, 2, batch_first=True)
    given = inputs(2, 5, 70, 8)
    rng = np.random.default_rng(3)

    def mask(*shape):
        hidden = rng.random(shape) < 0.3
        return hidden if kind == "bool" else np.where(hidden, -INF, rng.standard_normal(shape)).astype(kind)

    for name, plain in (("attn_mask", mask(5, 70)), ("attn_mask", mask(4, 5, 70)), ("key_padding_mask", mask(2, 70))):
        want = module(*given, **{name: plain})
        for other in layouts(plain):
            got = module(*given, **{name: other})
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_broadcast_masks(kind):
    """Masks whose strides are zero stand for their full shape, without being written out."""
    module = layer(8, 2, batch_first=True)
    given = inputs(2, 5, 70, 8)
    row = np.arange(70) % 3 == 1
    column = np.arange(5)[:, None] == 9
    for small in (row, column, row[None] | column, np.array(False)):
        small = small if kind == "bool" else np.where(small, -INF, 0.5).astype(kind)
        for shape in ((5, 70), (4, 5, 70)):
            full = np.broadcast_to(small, shape)
            got, want = (module(*given, attn_mask=m) for m in (full, np.array(full)))
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])
    padding = np.broadcast_to(row, (2, 70))
    np.testing.assert_array_equal(module(*given, key_padding_mask=padding)[0],
                                  module(*given, key_padding_mask=np.array(padding))[0])


def test_any_byte_but_zero_is_true():
    """A bool array made from other bytes may hold 2 or 255; both hide."""
    module = layer(8, 2, batch_first=True)
    given = inputs(2, 3, 70, 8)
    rng = np.random.default_rng(4)
    for name, shape in (("attn_mask", (3, 70)), ("key_padding_mask", (2, 70))):
        numbers = rng.choice(np.array([0, 0, 1, 2, 128, 255], np.uint8), shape)
        np.testing.assert_array_equal(module(*given, **{name: numbers.view(bool)})[0],
                                      module(*given, **{name: numbers != 0})[0])
