# SPDX-License-Identifier: Apache-2.0
"""What a query may not see does not reach it: with NaN and infinity in hidden keys, a call has the bits that it has with
zeros there. torch lets them through, so torch is not the judge here."""

import itertools

import helpers
import mha_c
import numpy as np
import pytest
from helpers import normal, run_child
from mha_c import check
from mha_c.functional import scaled_dot_product_attention
from test_reproducibility import LEVELS, skip_unless_supported

DTYPES = ("float32", "float64")
NUMBERS = (*((dtype, None) for dtype in DTYPES), ("float32", "bfloat16"))  # and what is multiplied
# N, L, S, E, H, Hkv: one panel and several, one block of keys and several, so many keys that scores are
# computed twice for the weights; the last three are calls with few queries.
SHAPES = ((2, 64, 64, 64, 4, 4), (2, 70, 130, 48, 4, 2), (1, 90, 300, 130, 1, 1), (3, 5, 5, 8, 4, 4),
          (1, 30, 1500, 16, 2, 2), (2, 2, 900, 64, 4, 4), (1, 1, 600, 64, 4, 4), (2, 3, 1500, 32, 2, 2))
KINDS = ("bool", "float", "heads", "causal", "causal and bool", "padding and bool")
BAD = (np.nan, np.inf, -np.inf)


def make_masks(kind, shape, dtype):
    """The masks of a kind that hide the second half of the keys, each seventh and some others; and what they leave,
    (N, H, L, S)."""
    n, length, s, _, h, _ = shape
    rng = np.random.default_rng(length)
    hidden = rng.random((n * h, length, s)) < 0.3
    hidden[:, :, 0], hidden[:, :, 3::7], hidden[:, :, (s + 1) // 2:] = False, True, True
    if kind != "heads":
        hidden = hidden[0]
    is_visible = ~np.broadcast_to(hidden if hidden.ndim == 2 else hidden.reshape(n, h, length, s), (n, h, length, s))
    masks = {"attn_mask": hidden}
    if kind == "float":
        masks["attn_mask"] = np.where(hidden, -np.inf, rng.standard_normal(hidden.shape)).astype(dtype)
    if kind == "causal":
        masks, is_visible = {}, np.ones((n, h, length, s), bool)
    if kind.startswith("causal"):
        masks["is_causal"] = True
        is_visible = is_visible & ~helpers.causal_mask(length, s)
    if kind == "padding and bool":
        padding = rng.standard_normal((n, s)).astype(dtype)
        padding[:, 1::5] = -np.inf
        masks["key_padding_mask"] = padding
        is_visible = is_visible & ~np.isneginf(padding)[:, None, None]
    return masks, is_visible


def spoil(array, rows):
    """The array with NaN and infinities in some of its rows."""
    array = array.copy()
    array[rows] = np.resize(BAD, array[rows].shape)
    return array


def hold_apart(shape, dtype, kind, precision=None):
    """Each query that sees none of the spoilt keys gets the bits that it gets with zeros there."""
    n, length, s, e, h, hkv = shape
    module = helpers.layer(e, h, num_kv_heads=hkv, batch_first=True, dtype=dtype, matmul_precision=precision)
    query, key, value = (normal((n, rows, e), dtype, seed) for seed, rows in enumerate((length, s, s)))
    masks, is_visible = make_masks(kind, shape, dtype)
    unseen = ~is_visible.any(axis=(1, 2))
    late = np.broadcast_to(np.arange(s) >= (s + 1) // 2, (n, s))
    unseen_by_first = ~is_visible[:, :, 0].any(axis=1)  # others may see these, and then have NaN
    cases = [unseen] if unseen.any() else []  # the causal order hides no key from every query of a square
    for rows in [*cases, late, unseen_by_first]:
        zeros = ~rows[..., None] * key, ~rows[..., None] * value
        spoilt = spoil(zeros[0], rows), spoil(zeros[1], rows)
        sees_none = ~(is_visible & rows[:, None, None]).any(axis=(1, 3))
        assert sees_none.any()
        for need_weights, average, threads in itertools.product((False, True), (False, True), (1, 2)):
            call = {"need_weights": need_weights, "average_attn_weights": average, **masks}
            with mha_c.num_threads(threads):
                want, want_weights = module(query, *zeros, **call)
                for given in (spoilt, (spoilt[0], zeros[1]), (zeros[0], spoilt[1])):
                    output, weights = module(query, *given, **call)
                    np.testing.assert_array_equal(output[sees_none], want[sees_none])
                    if need_weights:
                        by_query = (weights, want_weights) if average else (w.swapaxes(1, 2) for w in (weights, want_weights))
                        np.testing.assert_array_equal(*(w[sees_none] for w in by_query))


pytestmark = pytest.mark.filterwarnings("ignore:is_causal:UserWarning")  # there are fewer queries than keys


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, precision", NUMBERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer(shape, dtype, precision, kind):
    """Every mask, every path, any number of threads, with and without weights."""
    hold_apart(shape, dtype, kind, precision)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    """The same on each level that this CPU has."""
    skip_unless_supported(level)
    run_child("""
        import test_hidden as t
        for kind in t.KINDS:
            for shape in t.SHAPES:
                t.hold_apart(shape, "float32", kind)
            t.hold_apart(t.SHAPES[1], "float32", kind, "bfloat16")
        """ + f"assert t.mha_c._core.config()['cpu_level'] == {level!r}", env={"MHA_C_CPU": level})


@pytest.mark.parametrize("dtype", [*DTYPES, "float16", "bfloat16"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_functions(kind, is_causal, dtype):
    """Attention without projections, its masks the other way round; values alone, too, and one feature of them."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    query, key, value = (normal((2, 3, rows, 16), dtype, seed) for seed, rows in enumerate((70, 150, 150)))
    shows = np.random.default_rng(1).random((70, 150)) < 0.7
    hidden = (np.arange(150) == 50) | (np.arange(150) >= 100)
    shows[:, hidden], shows[:, 0] = False, True
    mask = shows if kind == "bool" else np.where(shows, 0.5, -np.inf).astype(dtype)
    rows = np.broadcast_to(hidden, (2, 3, 150))
    zeros = [np.where(rows[..., None], 0, x).astype(dtype) for x in (key, value)]
    spoilt = [spoil(x, rows) for x in zeros]
    last = zeros[1].copy()
    last[..., 50, -1] = np.nan
    want = scaled_dot_product_attention(query, *zeros, mask, is_causal=is_causal)
    for given in (spoilt, (zeros[0], spoilt[1]), (zeros[0], last)):
        np.testing.assert_array_equal(scaled_dot_product_attention(query, *given, mask, is_causal=is_causal), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_room_for_later_tokens(dtype):
    """Half of a buffer is not written yet. The tokens that are written do not notice it."""
    module = helpers.layer(64, 4, batch_first=True, dtype=dtype)
    x = np.full((2, 64, 64), np.nan, dtype)
    x[:, :30] = normal((2, 30, 64), dtype)
    want = module(x[:, :30], x[:, :30], x[:, :30], is_causal=True)
    for threads, need_weights in itertools.product((1, 2), (False, True)):
        with mha_c.num_threads(threads):
            output, weights = module(x, x, x, is_causal=True, need_weights=need_weights)
        np.testing.assert_array_equal(output[:, :30], want[0])
        assert np.isnan(output[:, 30:]).all()
        if need_weights:
            np.testing.assert_array_equal(weights[:, :30, :30], want[1])
            np.testing.assert_array_equal(weights[:, :30, 30:], 0)


@pytest.mark.parametrize("bad", BAD)
def test_visible_numbers_still_spread(bad):
    """One number in a visible key reaches every query that sees the key, as in torch, and no other."""
    pytest.importorskip("torch")
    module = helpers.layer(64, 4, batch_first=True)
    x = normal((1, 100, 64))
    for which in (1, 2):
        given = [x, x.copy(), x.copy()]
        given[which][0, 40, 3] = bad
        with np.errstate(all="ignore"):
            report = check.against_torch(module, *given, is_causal=True)
        report.assert_close()
        output, weights = module(*given, is_causal=True)
        assert np.isfinite(output[0, :40]).all() and np.isnan(output[0, 40:]).all(axis=-1).any()
        assert any("In torch, these also reach queries" in note for note in report.notes)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_mask_hides_what_another_one_spoils(dtype, bad, need_weights):
    """-inf in one mask, or the causal order, hides a key also where another mask has NaN or infinity, unlike in torch."""
    module = helpers.layer(64, 4, batch_first=True, dtype=dtype)
    x = normal((2, 70, 64), dtype)
    late = helpers.causal_mask(70, 70)
    spoilt = {"attn_mask": np.where(late, bad, 0.5).astype(dtype), "is_causal": True}
    calls = [(spoilt, {"attn_mask": np.full((70, 70), 0.5, dtype), "is_causal": True})]
    mask, padding = normal((70, 70), dtype), normal((2, 70), dtype, 1)
    mask[:, 30:40], padding[:, 30:40] = -np.inf, bad
    calls.append(({"attn_mask": mask, "key_padding_mask": padding},
                  {"attn_mask": mask, "key_padding_mask": np.where(np.isfinite(padding), padding, 0)}))
    for given, plain in calls:
        output, weights = module(x, x, x, need_weights=need_weights, **given)
        want = module(x, x, x, need_weights=need_weights, **plain)
        np.testing.assert_array_equal(output, want[0])
        if need_weights:
            np.testing.assert_array_equal(weights, want[1])
        masks = {"key_padding_mask": None, "attn_mask": None, "is_causal": False, **given}
        defined = check.definition.attend(module, x, x, x, need_weights=need_weights, average_attn_weights=True, **masks)
        np.testing.assert_allclose(output, defined[0], atol=1e-5)


def test_explained_scores():
    """The scores of hidden keys are -inf, whatever is stored there."""
    module = helpers.layer(8, 2, batch_first=True)
    x = normal((1, 6, 8))
    x[0, 3:] = np.nan
    scores = mha_c.explain(module, x, x, x, is_causal=True).masked_scores
    np.testing.assert_array_equal(np.isneginf(scores), np.broadcast_to(helpers.causal_mask(6, 6), scores.shape))
