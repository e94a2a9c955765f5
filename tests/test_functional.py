# SPDX-License-Identifier: Apache-2.0
"""mha_c.functional against torch.nn.functional: values, shapes, dtypes, exceptions; and what no result may depend on.

Values are held against the definition in a wider type, as in helpers.py, by what rounding can explain; torch, on the
same inputs, by half of that.
"""

import itertools
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from helpers import ROUNDINGS, assert_matches, causal_mask, normal, outcome, run_child, to_torch, torch_words
from reference import wider

mha_c = pytest.importorskip("mha_c")
from mha_c.functional import multi_head_attention_forward, scaled_dot_product_attention  # noqa: E402

EVERY_DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64", "float16", pytest.param(
    "bfloat16", marks=pytest.mark.skipif(find_spec("ml_dtypes") is None, reason="ml_dtypes is not installed"))])

# ---------------------------------------------------------------------------------------------- the definition


def grouped(x, heads):
    """Heads repeated until there are so many."""
    return x if x.shape[-3] in (0, heads) else x.repeat(heads // x.shape[-3], axis=-3)


def added(attn_mask, dtype):
    """A mask of either kind as numbers to add."""
    attn_mask = np.asarray(attn_mask)
    return np.where(attn_mask, 0.0, -np.inf).astype(dtype) if attn_mask.dtype == bool else attn_mask.astype(dtype)


def definition(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """softmax(scale q k^T + mask) v in the wider type, and what one rounding error can do to each of its numbers."""
    q, k, v = map(wider, (query, key, value))
    if enable_gqa:
        k, v = grouped(k, q.shape[-3]), grouped(v, q.shape[-3])
    scale = (1 / np.sqrt(q.dtype.type(q.shape[-1])) if q.shape[-1] else 1) if scale is None else scale
    scores = q @ k.swapaxes(-1, -2) * scale
    size = np.abs(q) @ np.abs(k).swapaxes(-1, -2) * abs(scale)
    if attn_mask is not None or is_causal:
        mask = np.zeros((), query.dtype) if attn_mask is None else added(attn_mask, query.dtype)
        if is_causal:
            mask = mask + np.where(causal_mask(*scores.shape[-2:]), -np.inf, 0).astype(query.dtype)
        scores = (scores + mask).astype(query.dtype)
        size = size + np.where(np.isfinite(mask), np.abs(mask), 0)
    weights = reference.softmax(wider(scores) if scores.dtype == query.dtype else scores, 0.0)
    worst = 1 + 2 * size.max(axis=-1, keepdims=True, initial=0.0)
    return weights @ v, (weights * worst) @ np.abs(v)


def assert_close(got, want, size, dtype, roundings=ROUNDINGS):
    """Shape, dtype, and no number further off than so many rounding errors."""
    assert got.shape == want.shape and got.dtype == dtype
    off = np.abs(got - want)
    excess = off - (roundings * np.finfo(dtype).eps * size + np.finfo(dtype).tiny)
    assert not (excess > 0).any() and np.isfinite(got).all(), f"off by {off.max():.3g}"


# ---------------------------------------------------------------------------------------------- torch


def torch_sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """torch's answer; what it does not compute (a mask with is_causal, one of another dtype) spelt out for it."""
    import torch
    if attn_mask is not None and attn_mask.dtype != bool:
        attn_mask = attn_mask.astype(query.dtype)
    if attn_mask is not None and is_causal:
        hidden = causal_mask(query.shape[-2], key.shape[-2])
        attn_mask = attn_mask & ~hidden if attn_mask.dtype == bool else np.where(
            hidden, np.array(-np.inf, query.dtype), attn_mask)
        is_causal = False
    tensors = [to_torch(a) for a in (query, key, value, attn_mask)]
    return torch.nn.functional.scaled_dot_product_attention(*tensors, dropout_p, is_causal, **options).numpy()


def check_sdpa(query, key, value, **options):
    """One configuration: ours and torch's against the definition."""
    want, size = definition(query, key, value, **options)
    dtype = query.dtype.newbyteorder("=")
    got = scaled_dot_product_attention(query, key, value, **options)
    assert got.flags.c_contiguous
    assert_close(got, want, size, dtype)
    theirs = torch_sdpa(query, key, value, **options)
    if key.shape[-2] == 0 and theirs.shape != got.shape:
        return got  # without keys, torch forgets to broadcast
    assert theirs.shape == got.shape and theirs.dtype == got.dtype
    assert_close(theirs, want, size, dtype, ROUNDINGS / 2)
    return got


def qkv(q_shape, k_shape=None, v_shape=None, dtype="float32", seed=0):
    k_shape = q_shape if k_shape is None else k_shape
    v_shape = k_shape if v_shape is None else v_shape
    return [normal(shape, dtype, seed * 3 + i) for i, shape in enumerate((q_shape, k_shape, v_shape))]


SHAPES = {
    "one of each": ((1, 1),),
    "matrices": ((7, 16), (70, 16), (70, 5)),
    "items": ((3, 7, 16), (3, 70, 16)),
    "heads": ((2, 3, 65, 24), (2, 3, 130, 24), (2, 3, 130, 40)),
    "five axes": ((2, 2, 2, 5, 8), (2, 2, 2, 6, 8)),
    "keys for all": ((2, 3, 5, 8), (6, 8)),
    "one head of keys": ((2, 4, 50, 8), (2, 1, 65, 8)),
    "one query item": ((1, 4, 3, 8), (2, 1, 5, 8), (2, 4, 5, 3)),
    "value alone has items": ((3, 4), (5, 4), (2, 2, 5, 4)),
    "mixed ranks": ((4, 3, 16), (2, 1, 70, 16), (3, 1, 1, 70, 8)),
    "long": ((1, 200, 32), (1, 700, 32)),
    "wide": ((2, 9, 300), (2, 40, 300), (2, 40, 131)),
    "no features": ((2, 3, 0), (2, 5, 0), (2, 5, 4)),
    "no value features": ((2, 3, 4), (2, 5, 4), (2, 5, 0)),
    "no keys": ((2, 2, 3, 4), (2, 2, 0, 4)),
    "no queries": ((2, 0, 4), (2, 5, 4)),
    "no items": ((0, 2, 3, 4), (1, 2, 5, 4)),
    "no heads": ((2, 0, 3, 4), (2, 0, 5, 4)),
}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -1.5},
    "scale 0": {"scale": 0, "is_causal": True},
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(shapes, options, dtype):
    pytest.importorskip("torch")
    check_sdpa(*qkv(*shapes, dtype=dtype), **options)


MASK_SHAPES = [(7, 70), (1, 70), (7, 1), (1, 1), (3, 7, 70), (3, 1, 70), (2, 1, 1, 70), (2, 3, 7, 70), (1, 3, 7, 1)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float32", "float64", "float16"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks(shape, kind, is_causal):
    pytest.importorskip("torch")
    numbers = normal(shape, "float64", 5)
    mask = numbers > -0.5 if kind == "bool" else np.where(numbers > -1, numbers, -np.inf).astype(kind)
    for dtype in ("float32", "float64"):
        check_sdpa(*qkv((2, 3, 7, 16), (2, 3, 70, 16), dtype=dtype), attn_mask=mask, is_causal=is_causal)


def test_masks_of_fewer_axes():
    """torch broadcasts them too, unless all inputs have four axes."""
    pytest.importorskip("torch")
    for mask in (np.array(True), np.arange(5) > 1, np.array(0.5, "f4"), normal((5,))):
        for shapes in (((2, 3, 4), (2, 5, 4)), ((2, 2, 3, 4), (2, 5, 4)), ((2, 2, 3, 4), (2, 2, 5, 4), (2, 5, 4)),
                       ((2, 2, 3, 4), (1, 2, 5, 4)), ((2, 2, 3, 4), (2, 2, 5, 4), (1, 2, 5, 4)),
                       ((2, 2, 0, 4), (2, 2, 5, 4)), ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 0))):
            check_sdpa(*qkv(*shapes), attn_mask=mask)


def test_flags_of_numpy():
    """A comparison of NumPy numbers is a flag like any other."""
    arrays = qkv((2, 3, 7, 8), (2, 3, 7, 8))
    for flag in (False, True):
        want = scaled_dot_product_attention(*arrays, is_causal=flag)
        assert np.array_equal(scaled_dot_product_attention(*arrays, is_causal=np.bool_(flag)), want)


@pytest.mark.parametrize("mask", [np.zeros((3, 5), bool), np.full((3, 5), -np.inf, "f4")], ids=["bool", "float"])
def test_a_query_that_sees_nothing_gets_zero(mask):
    pytest.importorskip("torch")
    mask[1, 2] = True if mask.dtype == bool else 0
    got = check_sdpa(*qkv((2, 2, 3, 4), (2, 2, 5, 4)), attn_mask=mask)
    assert not got[:, :, [0, 2]].any() and got[:, :, 1].any()


def test_a_block_of_hidden_keys_is_not_read():
    """Single hidden keys that are not finite leak, as in torch; but blocks that nobody sees are skipped."""
    query, key, value = qkv((2, 70, 8), (2, 200, 8))
    want = scaled_dot_product_attention(query, key[:, :128], value[:, :128])
    key[:, 128:], value[:, 128:] = np.nan, np.inf
    assert np.array_equal(scaled_dot_product_attention(query, key, value, np.arange(200) < 128), want)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("heads", [(8, 2, 2), (8, 2, 4), (8, 4, 1), (6, 2, 3), (12, 4, 6), (4, 4, 4), (3, 1, 1)],
                         ids=str)
def test_grouped_heads(heads, dtype):
    pytest.importorskip("torch")
    h, hk, hv = heads
    mask = normal((h, 7, 70), dtype, 9)
    arrays = qkv((2, h, 7, 16), (2, hk, 70, 16), (2, hv, 70, 9), dtype=dtype)
    check_sdpa(*arrays, enable_gqa=True)
    check_sdpa(*arrays, enable_gqa=True, attn_mask=mask, is_causal=True)
    check_sdpa(*qkv((2, 1, h, 7, 16), (3, hk, 70, 16), (1, 1, hv, 70, 9), dtype=dtype), enable_gqa=True)


@pytest.mark.parametrize("shapes", [((2, 4, 3, 8), (2, 0, 5, 8)), ((2, 0, 3, 8), (2, 2, 5, 8))],
                         ids=["keys", "queries"])
def test_grouped_heads_may_be_none(shapes):
    pytest.importorskip("torch")
    arrays = qkv(*shapes)
    got = scaled_dot_product_attention(*arrays, enable_gqa=True)
    assert np.array_equal(got, torch_sdpa(*arrays, enable_gqa=True))


# ---------------------------------------------------------------------------------------------- random configurations


def laid_out(draw, x):
    """The same numbers in another layout, byte order or alignment."""
    from hypothesis import strategies as st
    how = draw(st.sampled_from(["as is", "transposed", "descending", "spread", "features last", "swapped", "odd"]))
    if how == "transposed":
        order = draw(st.permutations(range(x.ndim)))
        return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    if how == "features last":
        order = [*draw(st.permutations(range(x.ndim - 1))), x.ndim - 1]
        return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    if how == "descending":
        axis = draw(st.integers(0, x.ndim - 1))
        return np.flip(np.flip(x, axis).copy(), axis)
    if how == "spread":
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1] + 3), np.nan, x.dtype)
        step = draw(st.sampled_from([1, 2]))
        view = wide[..., 1:1 + step * x.shape[-1]:step]
        view[...] = x
        return view
    if how == "swapped":
        return x.astype(x.dtype.newbyteorder())
    if how == "odd" and x.size:
        raw = np.zeros(x.nbytes + 1, np.uint8)
        view = raw[1:].view(x.dtype).reshape(x.shape)
        view[...] = x
        return view
    return x


def sdpa_calls(*dtypes):
    """Arguments of any call of these dtypes that is in order."""
    from hypothesis import strategies as st

    @st.composite
    def calls(draw):
        def some(lead):  # broadcast it: ones, and axes left out
            kept = lead[draw(st.integers(0, len(lead))):]
            return tuple(n if draw(st.booleans()) else 1 for n in kept)

        lead = tuple(draw(st.lists(st.sampled_from([1, 2, 3]), max_size=3)))
        length, s = draw(st.sampled_from([1, 2, 3, 5, 25, 66])), draw(st.sampled_from([0, 1, 2, 5, 64, 65, 130]))
        e, ev = draw(st.sampled_from([1, 2, 3, 8, 17, 40])), draw(st.sampled_from([1, 3, 8, 33]))
        dtype = draw(st.sampled_from(dtypes))
        options = {"is_causal": draw(st.booleans()), "scale": draw(st.sampled_from([None, None, 0.0, -0.7, 1.3]))}
        q_lead, k_lead, v_lead = some(lead), some(lead), some(lead)
        if draw(st.booleans()):
            h = draw(st.sampled_from([1, 2, 4, 6]))
            options["enable_gqa"] = True
            hk, hv = (draw(st.sampled_from([d for d in range(1, h + 1) if h % d == 0])) for _ in range(2))
            q_lead, k_lead, v_lead = (*q_lead, h), (*k_lead, hk), (*v_lead, hv)
            scores = np.broadcast_shapes(q_lead, (*k_lead[:-1], h))
        else:
            scores = np.broadcast_shapes(q_lead, k_lead)
        seed = draw(st.integers(0, 99))
        arrays = qkv((*q_lead, length, e), (*k_lead, s, e), (*v_lead, s, ev), dtype, seed)
        kind = draw(st.sampled_from([None, "bool", "float32", "float64", "hidden"]))
        if kind is not None:
            shape = (*some(scores), *(n if draw(st.booleans()) else 1 for n in (length, s)))
            numbers = normal(shape, "float64", seed)
            mask = numbers > -0.8
            if kind in ("float32", "float64"):
                mask = np.where(numbers > -1.5, numbers, -np.inf).astype(kind)
            options["attn_mask"] = np.zeros_like(mask) if kind == "hidden" else mask
            options["attn_mask"] = laid_out(draw, options["attn_mask"]) if kind != "bool" else mask
        return [laid_out(draw, x) for x in arrays], options

    return calls()


def call_in_any_layout(compute, arrays, options):
    """What a call gives, and C-contiguous copies of its arrays, which stay as they are. The copies give the same to the
    last bit, on one thread, too.
    """
    before = [np.array(a) for a in arrays]
    got = compute(*arrays, **options)
    for array, copy in zip(arrays, before):
        assert np.array_equal(array, copy)
    plain = [np.array(a, a.dtype.newbyteorder("="), order="C") for a in arrays]
    with mha_c.num_threads(1):
        assert scaled_dot_product_attention(*plain, **options).tobytes() == got.tobytes()
    return got, plain


def test_random_calls():
    """Equal to torch, in any layout."""
    pytest.importorskip("torch")
    hypothesis = pytest.importorskip("hypothesis")

    @hypothesis.given(sdpa_calls("float32", "float64"))
    def check(call):
        call_in_any_layout(check_sdpa, *call)

    check()


def test_random_calls_of_halves():
    """float16 is what float32 gives, rounded once. bfloat16 is off by what rounding exponentials and the result can
    explain.
    """
    pytest.importorskip("ml_dtypes")
    hypothesis = pytest.importorskip("hypothesis")

    @hypothesis.given(sdpa_calls("float16", "bfloat16"))
    def check(call):
        options = call[1]
        got, plain = call_in_any_layout(scaled_dot_product_attention, *call)
        wide = [a.astype("f4") for a in plain]
        want, size = definition(*wide, **options)
        if plain[0].dtype == "float16":
            want = scaled_dot_product_attention(*wide, **options).astype("f2")
            assert got.tobytes() == want.tobytes()
        assert got.flags.c_contiguous and got.shape == want.shape and got.dtype == plain[0].dtype
        assert (np.abs(got.astype("f8") - want) <= 2 * 2.0**-8 * size + 1e-30).all()

    check()


@EVERY_DTYPE
@pytest.mark.parametrize("overlapped", range(4))
def test_a_result_over_an_input(overlapped, dtype):
    """The core's `out`, which mha_c.torch uses, may be one of the arrays that the call reads."""
    arrays = [normal((80, 80), dtype, seed) for seed in range(4)]
    query, key, value, mask = arrays
    want = scaled_dot_product_attention(query, key, value, mask)
    out = arrays[overlapped]
    got = mha_c._core.scaled_dot_product_attention(query, key, value, mask, 0.0, False, None, False, 0, out)
    assert got is out
    np.testing.assert_array_equal(out, want)


# ---------------------------------------------------------------------------------------------- dropout


def test_dropout_keeps_a_share_of_the_weights_and_scales_it():
    s = 4000
    query, key, value = qkv((2, 2, 3, 8), (2, 2, s, 8), (2, 2, s, s))
    weights = scaled_dot_product_attention(query, key, np.broadcast_to(np.eye(s, dtype="f4"), value.shape))
    dropped = scaled_dot_product_attention(query, key, np.broadcast_to(np.eye(s, dtype="f4"), value.shape),
                                           dropout_p=0.25, dropout_seed=1)
    kept = dropped != 0
    assert abs(kept.mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / kept.size)
    np.testing.assert_allclose(dropped[kept], weights[kept] / 0.75, rtol=1e-5)
    rows = kept.reshape(-1, s)
    assert len({row.tobytes() for row in rows}) == len(rows)  # every row of every head draws its own


def test_dropout_follows_the_seed_alone():
    arrays = qkv((3, 4, 50, 8), (3, 4, 130, 8))
    one = scaled_dot_product_attention(*arrays, dropout_p=0.5, dropout_seed=7)
    assert np.array_equal(one, scaled_dot_product_attention(*arrays, dropout_p=0.5, dropout_seed=7 + 2**64))
    assert not np.array_equal(one, scaled_dot_product_attention(*arrays, dropout_p=0.5, dropout_seed=8))
    assert not np.array_equal(scaled_dot_product_attention(*arrays, dropout_p=0.5),
                              scaled_dot_product_attention(*arrays, dropout_p=0.5))
    other_layout = [np.asfortranarray(x) for x in arrays]
    assert np.array_equal(one, scaled_dot_product_attention(*other_layout, dropout_p=0.5, dropout_seed=7))
    with mha_c.num_threads(4):
        assert np.array_equal(one, scaled_dot_product_attention(*arrays, dropout_p=0.5, dropout_seed=7))


@pytest.mark.parametrize("p", [0.0, -0.5, 1.0])
def test_dropout_of_nothing_and_of_everything(p):
    arrays = qkv((2, 3, 4), (2, 5, 4))
    assert np.array_equal(scaled_dot_product_attention(*arrays, dropout_p=p),
                          scaled_dot_product_attention(*arrays) * (p != 1))


# ---------------------------------------------------------------------------------------------- exceptions

BOOL, FLOAT = np.ones((3, 5), bool), np.zeros((3, 5), "f4")
FOUR = ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4))
TWO = ((3, 4), (5, 4), (5, 4))
GROUPED = {"enable_gqa": True}
WRONG = {  # shapes of query, key, value; options
    "rank 1": (((4,), (4,), (4,)), {}),
    "rank of key": (((3, 4), (4,), (3, 4)), {}),
    "rank 0": (((), (), ()), {}),
    "features, matrices": (((3, 4), (5, 6), (5, 4)), {}),
    "features, items": (((2, 3, 4), (2, 5, 6), (2, 5, 4)), {}),
    "features, heads": (((2, 2, 3, 4), (2, 2, 5, 6), (2, 2, 5, 4)), {}),
    "keys, matrices": (((3, 4), (5, 4), (6, 4)), {}),
    "keys, items": (((2, 3, 4), (2, 5, 4), (2, 6, 4)), {}),
    "keys, five axes": (((1, 2, 2, 3, 4), (1, 2, 2, 5, 4), (1, 2, 2, 6, 4)), {}),
    "batch": (((2, 3, 4), (3, 5, 4), (3, 5, 4)), {}),
    "batch of value": (((2, 3, 4), (2, 5, 4), (3, 5, 4)), {}),
    "batch of 0": (((0, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)), {}),
    "batch with heads": (((2, 4, 3, 4), (3, 4, 5, 4), (3, 4, 5, 4)), {}),
    "heads of key": (((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)), {}),
    "heads of value": (((2, 4, 3, 4), (2, 4, 5, 4), (2, 2, 5, 4)), {}),
    "groups of key": (((2, 8, 3, 4), (2, 3, 5, 4), (2, 4, 5, 4)), GROUPED),
    "groups of value": (((2, 8, 3, 4), (2, 2, 5, 4), (2, 3, 5, 4)), GROUPED),
    "more groups than heads": (((2, 2, 3, 4), (2, 8, 5, 4), (2, 8, 5, 4)), GROUPED),
    "no axis of heads": (TWO, GROUPED),
    "no axis of heads in key": (((2, 8, 3, 4), (5, 4), (5, 4)), GROUPED),
    "no axis of heads in query": (((3, 4), (1, 1, 5, 4), (1, 1, 5, 4)), GROUPED),
    "batch of groups": (((2, 8, 3, 4), (3, 2, 5, 4), (3, 2, 5, 4)), GROUPED),
    "features of groups": (((8, 3, 4), (2, 5, 6), (4, 5, 4)), GROUPED),
    "dropout": (TWO, {"dropout_p": 1.5}),
    "dropout 2": (FOUR, {"dropout_p": 2}),
    "dropout, text": (TWO, {"dropout_p": "a"}),
    "dropout, None": (TWO, {"dropout_p": None}),
    "scale, text": (TWO, {"scale": "x"}),
    "causal, int": (TWO, {"is_causal": 1}),
    "causal, None": (TWO, {"is_causal": None}),
    "groups, int": (TWO, {"enable_gqa": 1}),
    **{f"mask {mask.shape}{mask.dtype} of {len(shapes[0])}": (shapes, {"attn_mask": mask})
       for shapes in (FOUR, ((2, 3, 4), (2, 5, 4), (2, 5, 4)), TWO)
       for shape in ((5, 3), (3, 4), (0, 5), (3, 3, 5), (2, 3, 3, 5), (2, 2, 0, 5), (1, 1, 1, 3, 5), (3, 1, 1, 3, 5))
       for mask in (np.ones(shape, bool), np.zeros(shape, "f4"))},
    "mask without axes": (FOUR, {"attn_mask": np.array(True)}),
    "mask of one axis": (FOUR, {"attn_mask": np.zeros(5, "f4")}),
    "mask of one axis, groups": (((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)),
                                 {"attn_mask": np.zeros(5, "f4"), **GROUPED}),
    **{f"mask, {dtype}": (TWO, {"attn_mask": FLOAT.astype(dtype)})
       for dtype in ("int64", "int32", "int16", "int8", "uint8", "complex64", "complex128")},
}


def assert_torchs(ours, theirs):
    """torch's type; and torch's words, to which advice may be added."""
    assert theirs is not None and type(ours) is type(theirs)
    words = torch_words(theirs)
    assert str(ours).startswith(words) or str(ours).endswith(f". torch says: {words}")


@pytest.mark.parametrize("name", WRONG)
def test_exceptions(name):
    """Their types and words."""
    torch = pytest.importorskip("torch")
    shapes, options = WRONG[name]
    arrays = qkv(*shapes)
    ours = outcome(lambda: scaled_dot_product_attention(*arrays, **options)).error
    tensors = {k: to_torch(v) for k, v in options.items()}
    theirs = outcome(lambda: torch.nn.functional.scaled_dot_product_attention(
        *map(to_torch, arrays), **tensors)).error
    assert_torchs(ours, theirs)


@pytest.mark.parametrize("dtypes", ["fdf", "ddf", "lll", "iii", "???", "BBB", "FFF", "DDD"])
def test_exceptions_of_dtypes(dtypes):
    torch = pytest.importorskip("torch")
    arrays = [x.astype(dtype) for x, dtype in zip(qkv(*TWO), dtypes)]
    ours = outcome(lambda: scaled_dot_product_attention(*arrays)).error
    theirs = outcome(lambda: torch.nn.functional.scaled_dot_product_attention(*map(to_torch, arrays))).error
    assert_torchs(ours, theirs)


def test_exceptions_that_torch_does_not_have():
    query, key, value = qkv(*TWO)
    with pytest.raises(TypeError, match="query must be an array"):
        scaled_dot_product_attention(query.tolist(), key, value)
    with pytest.raises(TypeError):
        scaled_dot_product_attention(query, key, value, None, 0.0, False, 1.0)
    with pytest.raises(RuntimeError, match=r"\[4, 5\] but got: \[4, 6\]"):  # torch reads what is not there
        scaled_dot_product_attention(*qkv((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 6, 4)))
    with pytest.raises(TypeError, match="dropout_seed must be an int, but got 1.5"):
        scaled_dot_product_attention(query, key, value, dropout_seed=1.5)


def test_tensors():
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x) for x in qkv(*FOUR)]
    got = scaled_dot_product_attention(*tensors)
    assert isinstance(got, np.ndarray) and np.array_equal(got, scaled_dot_product_attention(*qkv(*FOUR)))
    with pytest.raises(RuntimeError, match="requires grad"):
        scaled_dot_product_attention(tensors[0].requires_grad_(), *tensors[1:])


# -------------------------------------------------------------------------------------------- bits, references, memory


@EVERY_DTYPE
def test_bits_do_not_depend_on_threads_or_place(dtype):
    query, key, value = qkv((5, 4, 130, 24), (5, 2, 200, 24), (5, 4, 200, 24), dtype=dtype)
    mask = normal((5, 4, 130, 200), dtype, 3)
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask > -1}):
        results = []
        for threads in (1, 2, 3, 8):
            with mha_c.num_threads(threads):
                results.append(scaled_dot_product_attention(query, key, value, enable_gqa=True, **options))
        assert all(np.array_equal(results[0], other) for other in results[1:])
        for n, h in itertools.product(range(5), range(4)):
            alone = {k: v[n, h] if k == "attn_mask" else v for k, v in options.items()}
            one = scaled_dot_product_attention(query[n, h], key[n, h // 2], value[n, h], **alone)
            assert np.array_equal(one, results[0][n, h])


@pytest.mark.parametrize("options", [
    {}, {"attn_mask": BOOL}, {"attn_mask": FLOAT.astype("f2")}, {"attn_mask": FLOAT.astype(int)},
    {"attn_mask": BOOL[:2]}, {"attn_mask": BOOL[None]}, {"dropout_p": 2}, {"is_causal": 1}, {"scale": "x"}, GROUPED,
], ids=str)
def test_references_are_given_back(options):
    arrays = qkv(*TWO)
    swapped = arrays[0].astype(">f4")
    held = [*arrays, swapped, *(v for v in options.values() if isinstance(v, np.ndarray))]
    before = [sys.getrefcount(x) for x in held]
    for query in (arrays[0], arrays[0][::-1], arrays[0].T.copy().T, swapped, arrays[0][:, :2]):
        for _ in range(50):
            outcome(lambda: scaled_dot_product_attention(query, arrays[1], arrays[2], **options))
    del query
    assert [sys.getrefcount(x) for x in held] == before


def test_nothing_of_size_l_by_s_exists():
    """Scores of this call would fill 1 GiB; a mask for all queries is read where it is."""
    done = run_child("""
        import numpy as np
        from helpers import most_memory
        from mha_c.functional import scaled_dot_product_attention
        x = np.random.default_rng(0).standard_normal((1, 2, 8192, 8), dtype=np.float32)
        scaled_dot_product_attention(x[:, :, :64], x, x)
        before = most_memory()
        scaled_dot_product_attention(np.repeat(x, 2, axis=-2), x, x, np.ones((1, 8192), bool), is_causal=True)
        print(most_memory() - before)
    """)
    assert int(done.stdout) < 32 * 2**20


# ---------------------------------------------------------------------------------------------- the layer as a function

E, H, L, S, N = 8, 2, 3, 5, 2


def mha_arguments(*, e=E, h=H, length=L, s=S, n=N, kdim=None, vdim=None, out_dim=None, bias=True, bias_kv=False,
                  dtype="float32", seed=0, **changes):
    """All arguments of a call, by name; kdim, vdim separate the weights."""
    def array(*shape):
        array.count += 1
        return normal(shape, dtype, seed + 100 + array.count) / np.sqrt(max(shape[-1], 1)).astype(dtype)
    array.count = 0
    separate = kdim is not None or vdim is not None
    batch = () if n is None else (n,)
    arguments = {
        "query": array(length, *batch, e), "key": array(s, *batch, kdim or e), "value": array(s, *batch, vdim or e),
        "embed_dim_to_check": e, "num_heads": h, "in_proj_weight": None if separate else array(3 * e, e),
        "in_proj_bias": array(3 * e) if bias else None, "bias_k": array(1, 1, e) if bias_kv else None,
        "bias_v": array(1, 1, e) if bias_kv else None, "add_zero_attn": False, "dropout_p": 0.0,
        "out_proj_weight": array(out_dim or e, e), "out_proj_bias": array(out_dim or e) if bias else None}
    if separate:
        arguments.update(use_separate_proj_weight=True, q_proj_weight=array(e, e), k_proj_weight=array(e, kdim or e),
                         v_proj_weight=array(e, vdim or e))
    return {**arguments, **changes}


def torch_mha(arguments):
    """What torch returns, as arrays."""
    import torch
    tensors = {id(v): to_torch(v) for v in arguments.values()}  # the same array stays the same tensor
    output, weights = torch.nn.functional.multi_head_attention_forward(
        **{name: tensors[id(v)] for name, v in arguments.items()})
    return output.numpy(), None if weights is None else weights.numpy()


def as_module(arguments):
    """The arguments as helpers.assert_matches() wants a layer."""
    names = {"out_proj_weight": "out_proj.weight", "out_proj_bias": "out_proj.bias"}
    used = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if arguments.get("use_separate_proj_weight") else [
        "in_proj_weight"]
    used += ["in_proj_bias", "bias_k", "bias_v", *names]
    state = {names.get(name, name): arguments[name] for name in used if arguments[name] is not None}
    return SimpleNamespace(state_dict=lambda: state, num_heads=arguments["num_heads"], batch_first=False,
                           add_zero_attn=arguments["add_zero_attn"])


def check_mha(arguments):
    """One configuration without static keys: ours and torch's against the definition."""
    inputs = [arguments[name] for name in ("query", "key", "value")]
    call = {name: arguments[name] for name in ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
            if name in arguments}
    got = multi_head_attention_forward(**arguments)
    assert_matches(as_module(arguments), got, *inputs, what="ours", **call)
    assert_matches(as_module(arguments), torch_mha(arguments), *inputs, what="torch", roundings=ROUNDINGS / 2, **call)
    return got


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [N, None, 0, 1])
@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"bias_kv": True, "add_zero_attn": True}, {"kdim": 6, "vdim": 11}, {"kdim": 8, "vdim": 8},
    {"out_dim": 5}, {"out_dim": 21, "kdim": 3, "bias": False, "bias_kv": True}, {"length": 0}, {"s": 0},
    {"e": 48, "h": 3, "length": 70, "s": 130}, {"e": 40, "h": 40}, {"e": 32, "h": 2, "length": 1, "s": 700},
], ids=str)
def test_mha_shapes(options, n, dtype):
    pytest.importorskip("torch")
    for need_weights, average in ((True, True), (True, False), (False, True)):
        check_mha(mha_arguments(n=n, dtype=dtype, need_weights=need_weights, average_attn_weights=average, **options))


@pytest.mark.parametrize("add_zero_attn", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", list(itertools.product(
    (None, (L, S), (N * H, L, S)), (None, (N, S)), ("bool", "float32"))), ids=str)
def test_mha_masks(masks, need_weights, add_zero_attn):
    pytest.importorskip("torch")

    def mask(shape, seed):
        numbers = None if shape is None else normal(shape, "float32", seed)
        if numbers is None or masks[2] == "float32":
            return numbers
        numbers = numbers > 0.7
        numbers[..., 0] = False
        return numbers
    check_mha(mha_arguments(attn_mask=mask(masks[0], 1), key_padding_mask=mask(masks[1], 2), need_weights=need_weights,
                            add_zero_attn=add_zero_attn))


def test_mha_without_output_features():
    """An out_proj_weight of no rows: torch returns no features, and so do we."""
    pytest.importorskip("torch")
    arguments = mha_arguments(out_proj_weight=np.zeros((0, E), "float32"), out_proj_bias=np.zeros(0, "float32"))
    got, want = multi_head_attention_forward(**arguments), torch_mha(arguments)
    assert got[0].shape == want[0].shape == (L, N, 0)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


def test_mha_equals_the_layer():
    """To the last bit, dropout included; the same inputs are found out here too."""
    for options in ({}, {"kdim": 6, "vdim": 11}, {"add_bias_kv": True, "add_zero_attn": True}, {"bias": False}):
        layer = mha_c.MultiheadAttention(E, H, dropout=0.3, dropout_seed=11, **options)
        x = normal((L, N, E))
        separate = layer.in_proj_weight is None
        key, value = (normal((S, N, 6)), normal((S, N, 11))) if separate else (x, x)
        got = multi_head_attention_forward(
            x, key, value, E, H, layer.in_proj_weight, layer.in_proj_bias, layer.bias_k, layer.bias_v,
            layer.add_zero_attn, 0.3, layer.out_proj.weight, layer.out_proj.bias, use_separate_proj_weight=separate,
            q_proj_weight=layer.q_proj_weight, k_proj_weight=layer.k_proj_weight, v_proj_weight=layer.v_proj_weight,
            dropout_seed=11)
        for ours, its in zip(got, layer(x, key, value)):
            assert np.array_equal(ours, its)
        arguments = mha_arguments(dropout_p=0.5)
        assert not np.array_equal(multi_head_attention_forward(**arguments)[0],
                                  multi_head_attention_forward(**arguments)[0])
        evaluating = [multi_head_attention_forward(**{**arguments, "training": False, "dropout_p": p})[0]
                      for p in (0.0, 0.5, 2.0)]
        assert all(np.array_equal(evaluating[0], other) for other in evaluating)


def test_mha_is_causal_without_a_mask():
    arguments = mha_arguments()
    hidden = causal_mask(L, S)
    got = multi_head_attention_forward(**arguments, is_causal=True)
    want = multi_head_attention_forward(**arguments, attn_mask=hidden)
    assert all(np.array_equal(a, b) for a, b in zip(got, want))


def static_definition(a, masks=0.0):
    """Output and weights per head with static keys and values, and what one rounding error can do to them."""
    e, h = a["embed_dim_to_check"], a["num_heads"]
    query, static_k, static_v = (wider(a[name]) for name in ("query", "static_k", "static_v"))
    weight, bias = wider(a["in_proj_weight"])[:e], wider(a["in_proj_bias"])[:e]
    out_weight, out_bias = wider(a["out_proj_weight"]), wider(a["out_proj_bias"])
    length, n, _ = query.shape
    k, v = (x.reshape(n, h, x.shape[1], e // h) for x in (static_k, static_v))
    if a["add_zero_attn"]:
        k, v = (np.concatenate([x, np.zeros((n, h, 1, e // h))], axis=2) for x in (k, v))

    def scores(x, w, b, keys):
        q = (x @ w.T + b).reshape(length, n, h, e // h).transpose(1, 2, 0, 3)
        return q @ keys.swapaxes(-1, -2) / np.sqrt(q.dtype.type(e // h))

    def output(p, values, w, b):
        return (p @ values).transpose(2, 0, 1, 3).reshape(length, n, e) @ w.T + b

    weights = reference.softmax(scores(query, weight, bias, k) + masks, 0.0)
    size = scores(*map(np.abs, (query, weight, bias, k)))
    weights_size = weights * (1 + 2 * size.max(axis=-1, keepdims=True, initial=0.0))
    return (output(weights, v, out_weight, out_bias), weights,
            output(weights_size, *map(np.abs, (v, out_weight, out_bias))), weights_size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("add_zero_attn", [False, True])
@pytest.mark.parametrize("e, h, n, length, s", [
    (8, 2, 2, 3, 7), (48, 3, 2, 70, 130), (32, 4, 1, 1, 600), (192, 3, 2, 5, 66), (8, 2, 2, 3, 0)])
def test_static_keys_and_values(e, h, n, length, s, add_zero_attn, dtype):
    pytest.importorskip("torch")
    a = mha_arguments(e=e, h=h, n=n, length=length, dtype=dtype, add_zero_attn=add_zero_attn,
                      static_k=normal((n * h, s, e // h), dtype, 1), static_v=normal((n * h, s, e // h), dtype, 2))
    padding = normal((n, s), "float64", 3) > 0.5
    padding[:, :1] = False
    for key_padding_mask, average in itertools.product((None, padding), (True, False)):
        masks = np.zeros((n, 1, 1, s + add_zero_attn))
        if key_padding_mask is not None:
            masks[:, 0, 0, :s] = np.where(padding, -np.inf, 0)
        want, want_weights, size, weights_size = static_definition(a, masks)
        if average:
            want_weights, weights_size = want_weights.mean(axis=1), weights_size.mean(axis=1)
        call = {**a, "key_padding_mask": key_padding_mask, "average_attn_weights": average}
        for run, roundings in ((lambda c: multi_head_attention_forward(**c), ROUNDINGS), (torch_mha, ROUNDINGS / 2)):
            output, weights = run(call)
            assert_close(output, want, size, np.dtype(dtype), roundings)
            assert_close(weights, want_weights, weights_size, np.dtype(dtype), roundings)
            if s:  # torch stumbles over a mask of no keys at all
                assert_close(run({**call, "need_weights": False})[0], want, size, np.dtype(dtype), roundings)


def test_one_of_static_k_and_static_v():
    """The other one is projected: with what it is projected to, each stands for the projection to the last bit."""
    a = mha_arguments()
    want = multi_head_attention_forward(**a)
    eye = np.eye(E, dtype="f4")
    parts = []
    for letter, i in (("key", 1), ("value", 2)):
        weight, bias = a["in_proj_weight"][i * E:(i + 1) * E], a["in_proj_bias"][i * E:(i + 1) * E]
        # Attention to a single key is its value, so that the function itself projects.
        x = a[letter].reshape(1, S * N, E)
        single = mha_arguments(query=x, key=x, value=x, in_proj_weight=np.concatenate([weight] * 3),
                               in_proj_bias=np.concatenate([bias] * 3), out_proj_weight=eye, out_proj_bias=None)
        projected = multi_head_attention_forward(**single)[0].reshape(S, N, H, E // H)
        parts.append(np.ascontiguousarray(projected.transpose(1, 2, 0, 3)).reshape(N * H, S, E // H))
    for static in ({"static_k": parts[0]}, {"static_v": parts[1]}, {"static_k": parts[0], "static_v": parts[1]},
                   {"static_k": np.asfortranarray(parts[0]), "static_v": parts[1].astype(">f4")}):
        got = multi_head_attention_forward(**a, **static)
        assert all(np.array_equal(x, y) for x, y in zip(got, want))


def test_mha_random_calls():
    pytest.importorskip("torch")
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.given(st.data())
    def check(data):
        draw = data.draw
        h = draw(st.sampled_from([1, 2, 3, 4]))
        e = h * draw(st.sampled_from([1, 2, 5, 16]))
        n, length, s = draw(st.sampled_from([None, 1, 3])), draw(st.sampled_from([1, 4, 40])), draw(
            st.sampled_from([1, 3, 66]))
        a = mha_arguments(
            e=e, h=h, n=n, length=length, s=s, kdim=draw(st.sampled_from([None, e, 7])), bias=draw(st.booleans()),
            out_dim=draw(st.sampled_from([None, 3])), bias_kv=draw(st.booleans()),
            dtype=draw(st.sampled_from(["f4", "f8"])), seed=draw(st.integers(0, 9)),
            add_zero_attn=draw(st.booleans()), need_weights=draw(st.booleans()),
            average_attn_weights=draw(st.booleans()), training=draw(st.booleans()))
        if draw(st.booleans()):
            a["attn_mask"] = normal(((n or 1) * h, length, s), a["query"].dtype, 4)
        if draw(st.booleans()):
            a["key_padding_mask"] = normal((s,) if n is None else (n, s), a["query"].dtype, 5)
        for name in draw(st.lists(st.sampled_from([k for k, v in a.items() if isinstance(v, np.ndarray)]), max_size=3)):
            a[name] = laid_out(draw, a[name])
        before = {name: np.array(v) for name, v in a.items() if isinstance(v, np.ndarray)}
        check_mha(a)
        assert all(np.array_equal(a[name], v) for name, v in before.items())

    check()


STATIC = normal((N * H, 7, E // H))
SEPARATE = {"use_separate_proj_weight": True,
            **{f"{letter}_proj_weight": normal((E, E), "float32", i) for i, letter in enumerate("qkv")}}
KV = normal((1, 1, E))
SAME = normal((L, N, E))
MHA_WRONG = {
    "embed_dim": dict(embed_dim_to_check=6),
    "heads": dict(num_heads=3),
    "no heads": dict(num_heads=0),
    "query of 4 axes": dict(query=normal((1, L, N, E))),
    "key without batch": dict(key=normal((S, E))),
    "keys": dict(key=normal((4, N, E))),
    "keys, no batch": dict(query=normal((L, E)), key=normal((4, E)), value=normal((S, E))),
    "keys, separate": dict(key=normal((4, N, E)), **SEPARATE),
    "batch, separate": dict(key=normal((S, 3, E)), **SEPARATE),
    "batch": dict(key=normal((S, 3, E)), value=normal((S, 3, E))),
    "no in_proj_weight": dict(in_proj_weight=None),
    **{f"no {letter}": {**SEPARATE, f"{letter}_proj_weight": None} for letter in "qkv"},
    **{f"{letter} {shape}": {**SEPARATE, f"{letter}_proj_weight": normal(shape)}
       for letter in "qkv" for shape in ((E, 6), (6, E), (E,))},
    **{f"in_proj_bias {shape}, separate": dict(in_proj_bias=normal(shape), **SEPARATE)
       for shape in ((21,), (25,), (30,), (24, 1), (2,))},
    "in_proj_weight of 1 axis": dict(in_proj_weight=normal((3 * E,))),
    "in_proj_weight too narrow": dict(in_proj_weight=normal((3 * E, 6))),
    "in_proj_weight too narrow, same": dict(query=SAME, key=SAME, value=SAME, in_proj_weight=normal((3 * E, 6))),
    "no out_proj_weight": dict(out_proj_weight=None),
    "out_proj_weight too narrow": dict(out_proj_weight=normal((E, 6))),
    "out_proj_weight of 1 axis": dict(out_proj_weight=normal((E,))),
    "bias_k alone": dict(bias_k=KV),
    "bias_v alone": dict(bias_v=KV),
    "bias_k too narrow": dict(bias_k=normal((1, 1, 6)), bias_v=KV),
    "bias_v too narrow": dict(bias_k=KV, bias_v=normal((1, 1, 6))),
    "static key with bias": dict(bias_k=KV, bias_v=KV, static_k=STATIC, static_v=STATIC),
    "static value with bias": dict(bias_k=KV, bias_v=KV, static_v=STATIC),
    **{f"static_{letter} {shape}": {"static_k": STATIC, "static_v": STATIC, f"static_{letter}": normal(shape)}
       for letter in "kv" for shape in ((3, 7, 4), (4, 7, 3), (4, 7), (4,))},
    "static_k of another length": dict(static_k=STATIC),
    "static_v of another length": dict(static_v=STATIC),
    "static ones of two lengths": dict(static_k=STATIC, static_v=normal((4, 6, 4))),
    "static ones, attn_mask": dict(static_k=STATIC, static_v=STATIC, attn_mask=np.zeros((L, S), "f4")),
    "static ones, attn_mask of theirs": dict(static_k=STATIC, static_v=STATIC, attn_mask=np.zeros((L, 7), "f4")),
    "static ones, both masks": dict(static_k=STATIC, static_v=STATIC, attn_mask=np.zeros((L, S), "f4"),
                                    key_padding_mask=np.zeros((N, 7), "f4")),
    "static ones, padding": dict(static_k=STATIC, static_v=STATIC, key_padding_mask=np.zeros((N, S), "f4")),
    "static ones, padding, zero": dict(static_k=STATIC, static_v=STATIC, add_zero_attn=True,
                                       key_padding_mask=np.zeros((N, S), "f4")),
    "static_k alone, batch": dict(key=normal((S, 3, E)), value=normal((S, 3, E)), static_k=STATIC),
    "attn_mask": dict(attn_mask=np.zeros((S, L), "f4")),
    "attn_mask of int": dict(attn_mask=np.zeros((L, S), int)),
    "dropout": dict(dropout_p=1.5),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", MHA_WRONG)
def test_mha_exceptions(name, need_weights):
    """Their types and words."""
    pytest.importorskip("torch")
    arguments = mha_arguments(need_weights=need_weights, **MHA_WRONG[name])
    ours = outcome(lambda: multi_head_attention_forward(**arguments)).error
    theirs = outcome(lambda: torch_mha(arguments)).error
    assert_torchs(ours, theirs)


@pytest.mark.parametrize("changes", [
    {"in_proj_weight": normal((21, E))}, {"in_proj_bias": normal((21,))}, {"out_proj_bias": normal((5,))},
    {"in_proj_weight": normal((3 * E, E), "float64")}, {"in_proj_bias": normal((3 * E,), "float64")},
    {"out_proj_weight": normal((E, E), "float64")}, {"out_proj_bias": normal((E,), "float64")},
    {"query": normal((L, N, E), "float64")}, {"bias_k": KV.astype("f8"), "bias_v": KV},
    {"static_k": STATIC.astype("f8"), "static_v": STATIC}, {"static_k": STATIC, "static_v": STATIC[..., None]},
], ids=lambda changes: f"{list(changes)} {[v.shape for v in changes.values()]}")
def test_mha_exceptions_in_words_of_our_own(changes):
    """What torch finds out somewhere inside has its type."""
    pytest.importorskip("torch")
    arguments = mha_arguments(**changes)
    ours, theirs = (outcome(lambda: run(arguments)).error for run in (
        lambda a: multi_head_attention_forward(**a), torch_mha))
    assert type(ours) is type(theirs) is RuntimeError and str(ours)


def test_mha_static_keys_of_another_dtype():
    """float32 ones in a call in float64."""
    arguments = mha_arguments(dtype="float64", static_k=STATIC, static_v=STATIC)
    with pytest.raises(RuntimeError, match="expected scalar type Double but found Float"):
        multi_head_attention_forward(**arguments)


@pytest.mark.parametrize("need_weights", [True, False])
def test_mha_dropout_that_is_no_number(need_weights):
    """torch drops nothing, or says that it cannot drop, depending on the way it goes; here it is always an error."""
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1, but got nan"):
        multi_head_attention_forward(**mha_arguments(dropout_p=np.nan, need_weights=need_weights))


def test_mha_takes_tensors_and_gives_back_references():
    torch = pytest.importorskip("torch")
    arguments = mha_arguments(bias_kv=True)
    want = multi_head_attention_forward(**arguments)
    tensors = {k: torch.nn.Parameter(to_torch(v)) if "proj" in k or "bias" in k else to_torch(v)
               for k, v in arguments.items()}
    got = multi_head_attention_forward(**tensors)
    assert all(np.array_equal(x, y) for x, y in zip(got, want))
    for changes in ({}, MHA_WRONG["static_k of another length"], MHA_WRONG["static key with bias"]):
        arguments = mha_arguments(**changes)
        held = [v for v in arguments.values() if isinstance(v, np.ndarray)]
        before = [sys.getrefcount(x) for x in held]
        for _ in range(50):
            outcome(lambda: multi_head_attention_forward(**arguments))
        assert [sys.getrefcount(x) for x in held] == before
