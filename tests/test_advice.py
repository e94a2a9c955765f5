# SPDX-License-Identifier: Apache-2.0
"""What messages say besides torch's words: what was given, and what to write, which is done here, and works."""

import copy
import gc
import inspect
import itertools
import pickle
import re
import warnings
import weakref

import numpy as np
import pytest
from helpers import layer, normal, outcome, run_child

mha_c = pytest.importorskip("mha_c")
from mha_c import _core  # noqa: E402
from mha_c.functional import multi_head_attention_forward, scaled_dot_product_attention  # noqa: E402

M = mha_c.MultiheadAttention


def refusal(call):
    """What a call says that must not succeed."""
    error = outcome(call).error
    assert error is not None, "this was accepted"
    return str(error)


def evaluated(code, arguments):
    return eval(code, {"np": np, **arguments})  # noqa: S307 - the point is to run what the message says


# ------------------------------------------------------------------------------------------- dtypes

X = normal((5, 3, 8))
DTYPES = {
    "all float64": ("ddd", "float32", ["query"]),
    "all float32": ("fff", "float64", ["query"]),
    "query": ("dff", "float32", ["query"]),
    "key": ("fdf", "float32", ["key"]),
    "value": ("ffd", "float32", ["value"]),
    "key and value, one array": ("fdd", "float32", ["key"]),
    "two dtypes": ("fde", "float32", ["key", "value"]),
    "all float16": ("eee", "float32", ["query"]),
    "float32 for float16": ("fff", "float16", ["query"]),
    **{f"all {code}": (code * 3, "float32", ["query"]) for code in "?bBhiqFDgO"},
}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name):
    """Each argument of another dtype is named, with its dtype and the cast that mends it."""
    codes, dtype, wrong = DTYPES[name]
    arrays = {code: X.astype(code) for code in set(codes)}
    given = {name: arrays[code] for name, code in zip(("query", "key", "value"), codes)}
    module = layer(8, 2, dtype=dtype)
    words = refusal(lambda: module(**given))
    for argument in wrong:
        one = given[argument]
        code = f"{argument}{'.real' if one.dtype.kind == 'c' else ''}.astype(np.{dtype})"
        assert re.search(rf"\b{argument}\b.* (is|are) {one.dtype}\b", words) and code in words
        cast = evaluated(code, given)
        given.update({other: cast for other in given if given[other] is one})
    assert words.startswith(f"{wrong[0]} is ") and f", but this layer is {dtype}: pass " in words
    module(**given)
    offers = 'layer.to("' in words
    assert offers == (name in ("all float64", "all float32", "all float16", "float32 for float16"))
    if offers:
        exec(re.search(r"layer\.to\(.*?\)", words)[0], {"layer": module})  # noqa: S102
        module(*[arrays[codes[0]]] * 3)


def test_dtypes_of_other_libraries():
    """bfloat16 of ml_dtypes, torch's half tensors, a memoryview, a data frame's like, and arrays of no numbers."""
    ml_dtypes, torch = pytest.importorskip("ml_dtypes"), pytest.importorskip("torch")
    module = layer(8, 2)

    class Frame:
        def __array__(self, dtype=None, copy=None):
            return X[:, 0].astype(dtype or "float64")

    for given, dtype, code in (
        (X.astype(ml_dtypes.bfloat16), "bfloat16", "query.astype(np.float32)"),
        (torch.tensor(X).bfloat16(), "bfloat16", "query.float()"),
        (torch.tensor(X).half(), "float16", "query.float()"),
        (torch.tensor(X).double(), "float64", "query.float()"),
        (torch.ones(5, 3, 8, dtype=torch.int64), "int64", "query.float()"),
        (memoryview(X.astype("d")), "float64", "np.asarray(query, np.float32)"),
        (Frame(), "float64", "np.asarray(query, np.float32)"),
    ):
        words = refusal(lambda: module(given, given, given))
        assert words.startswith(f"query is {dtype}, but this layer is float32: pass {code}"), words
        cast = evaluated(code, {"query": given})
        module(cast, cast, cast)
    for nothing in (np.full((5, 3, 8), "a"), np.zeros((5, 3, 8), "M8[s]"), np.zeros((5, 3, 8), "f4,f4")):
        assert re.match(r"query is \S+, but this layer is float32\. torch says: ", refusal(
            lambda: module(nothing, nothing, nothing)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_beside_other_dtypes(dtype):
    """Arrays, tensors and lists of float32 and float64 for layers of halves: both cures run."""
    pytest.importorskip("ml_dtypes")
    torch = pytest.importorskip("torch")
    cast_array = {"bfloat16": 'astype("bfloat16")', "float16": "astype(np.float16)"}[dtype]
    cast_tensor = {"bfloat16": "bfloat16()", "float16": "half()"}[dtype]
    layers = {
        "query": lambda: M(8, 2, dtype=dtype), "src": lambda: mha_c.TransformerEncoderLayer(8, 2, 8, dtype=dtype),
        "input": lambda: mha_c.Linear(8, 8, dtype=dtype),
    }
    kinds = [(X, "float32", cast_array), (X.astype("d"), "float64", cast_array),
             (torch.tensor(X), "float32", cast_tensor)]
    for (name, make), (given, other, cast) in itertools.product(layers.items(), kinds):
        module = make().eval()

        def call(x):
            result = module(x, x, x) if name == "query" else module(x)
            return result[0] if name == "query" else result

        words = refusal(lambda: call(given))
        cure = f'pass {name}.{cast}, or make the layer {other} with layer.to("{other}")'
        assert words.startswith(f"{name} is {other}, but this layer is {dtype}: {cure}. torch says: ")
        assert call(evaluated(f"{name}.{cast}", {name: given})).dtype == dtype
        exec(f'layer.to("{other}")', {"layer": module})  # noqa: S102
        assert call(given).dtype == other
    words = refusal(lambda: M(8, 2, dtype=dtype)(X.tolist(), X, X))
    code = f"np.asarray(query, {cast_array.partition('(')[2]}"
    assert f"Pass {code}" in words and evaluated(code, {"query": X.tolist()}).dtype == dtype
    halves = X.astype(dtype)
    for module, given in ((layer(8, 2), [halves] * 3), (mha_c.Linear(8, 8), [halves])):
        cure = f'.astype(np.float32), or make the layer {dtype} with layer.to("{dtype}")'
        assert cure in refusal(lambda: module(*given))


def test_the_type_of_the_exception_is_torchs():
    """The words are ours, the type is not."""
    for wrong in (X.astype("d"), X.astype(int)):
        with pytest.raises(RuntimeError, match=r"torch says: mat1 and mat2 must have the same dtype"):
            layer(8, 2)(wrong, wrong, wrong)


@pytest.mark.parametrize("codes, words", [
    ("lll", "query, key and value are int64, but attention takes float32, float64, bfloat16 or float16: pass "
            "query.astype(np.float32), key.astype(np.float32) and value.astype(np.float32). torch says: expected"),
    ("FFF", "query, key and value are complex64, but attention takes float32, float64, bfloat16 or float16: pass "
            "query.real."),
    ("fdf", "key is float64, but query and value are float32: pass key.astype(np.float32)."),
    ("dff", "key and value are float32, but query is float64: pass key.astype(np.float64) and value.astype(np.float64)"),
    ("efd", "key is float32 and value is float64, but query is float16: pass key.astype(np.float16) and "),
    ("lef", "query is int64 and value is float32, but key is float16: pass query.astype(np.float16) and "),
])
def test_dtypes_of_scaled_dot_product_attention(codes, words):
    given = dict(zip(("query", "key", "value"), (normal((3, 4), code) for code in codes)))
    said = refusal(lambda: scaled_dot_product_attention(**given))
    assert words in said
    for name, code in re.findall(r"\b((?:query|key|value))((?:\.real)?\.astype\([\w.]+\))", said):
        given[name] = evaluated(name + code, given)
    scaled_dot_product_attention(**given)


def test_one_array_is_named_once():
    i = np.eye(2, dtype=np.int64)
    assert refusal(lambda: scaled_dot_product_attention(i, i, i)).startswith("query is int64, but attention takes ")


def test_lists():
    """They are not converted; how to do it is said, in the layer's dtype."""
    module = layer(8, 2, dtype="float64")
    given = {"query": X.astype("d"), "key": X.astype("d"), "value": X.astype("d"),
             "key_padding_mask": np.zeros((3, 5), bool), "attn_mask": np.zeros((5, 5), bool)}
    for name, value in given.items():
        wrong = {**given, name: value.tolist()}
        code = f"np.asarray({name}, {'bool' if 'mask' in name else 'np.float64'})"
        assert f". Pass {code}." in refusal(lambda: module(**wrong))
        module(**{**wrong, name: evaluated(code, wrong)})


# ------------------------------------------------------------------------------------------- masks of integers


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "object"])
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_masks_of_integers(name, dtype, as_tensors):
    """Both polarities are named, with what to write for each; and each hides what it says."""
    module, x = layer(8, 2, batch_first=True), normal((2, 5, 8))
    hidden = np.zeros((5, 5) if name == "attn_mask" else (2, 5), bool)
    hidden[:, 3:] = True
    want = module(x, x, x, **{name: hidden})[0]
    for marks, condition in ((hidden, "to hide"), (~hidden, r"to attend to, as in Hugging Face's attention_mask")):
        mask = marks.astype(dtype)
        if as_tensors:
            torch = pytest.importorskip("torch")
            mask = torch.tensor(marks.astype("int64"))
        words = refusal(lambda: module(x, x, x, **{name: mask}))
        assert f"{name} is {'int64' if as_tensors else dtype}, and True hides a key here" in words
        code = re.search(rf"if 1 marks the keys {condition}, pass (.+?)[.;]($| )", words)[1]
        np.testing.assert_array_equal(module(x, x, x, **{name: evaluated(code, {name: mask})})[0], want)


def test_masks_of_integers_for_scaled_dot_product_attention():
    """Where True shows."""
    x, shown = normal((4, 8)), np.tri(4, dtype=bool)
    want = scaled_dot_product_attention(x, x, x, shown)
    for marks, condition in ((~shown, "to hide"), (shown, "to attend to, as in Hugging Face's attention_mask")):
        mask = marks.astype(int)
        words = refusal(lambda: scaled_dot_product_attention(x, x, x, mask))
        assert "attn_mask is int64, and True shows a key here" in words
        code = re.search(rf"if 1 marks the keys {condition}, pass (.+?)[.;]($| )", words)[1]
        np.testing.assert_array_equal(scaled_dot_product_attention(x, x, x, evaluated(code, {"attn_mask": mask})), want)


@pytest.mark.parametrize("dtype", ["complex64", "U1", "M8[s]"])
def test_masks_of_no_numbers(dtype):
    words = refusal(lambda: layer(8, 2)(X, X, X, attn_mask=np.zeros((5, 5), dtype)))
    assert "it must be bool, where True hides a key, or floats to add to the scores" in words


# ------------------------------------------------------------------------------------------- masks of other shapes

N, H, L, S = 3, 4, 5, 6
READINGS = {  # the axes of a mask -> how it broadcasts to (N, H, L, S), the argument it belongs to, the code
    "N H L S": (np.s_[:], "attn_mask", "{}.reshape(12, 5, 6)"),
    "N L S": (np.s_[:, None], "attn_mask", "np.repeat({}, 4, axis=0)"),
    "H L S": (np.s_[None], "attn_mask", "np.tile({}, (3, 1, 1))"),
    "N 1 L S": (np.s_[:], "attn_mask", "np.repeat({}[:, 0], 4, axis=0)"),
    "1 H L S": (np.s_[:], "attn_mask", "np.tile({}[0], (3, 1, 1))"),
    "1 1 L S": (np.s_[:], "attn_mask", "{}[0, 0]"),
    "1 L S": (np.s_[None], "attn_mask", "{}[0]"),
    "L S": (np.s_[None, None], "attn_mask", "{}"),
    "NH L S": (..., "attn_mask", "{}"),
    "N S": (np.s_[:, None, None], "key_padding_mask", "{}"),
    "N 1 S": (np.s_[:, None], "key_padding_mask", "{}[:, 0]"),
    "N 1 1 S": (np.s_[:], "key_padding_mask", "{}[:, 0, 0]"),
    "S": (np.s_[None, None, None], "key_padding_mask", "np.broadcast_to({}, (3, 6))"),
    "1 S": (np.s_[None, None], "key_padding_mask", "np.broadcast_to({}, (3, 6))"),
}
OWN = {
    ("attn_mask", "S L"): (lambda m: m.T[None, None], "attn_mask.T"),
    ("attn_mask", "NH S L"): (lambda m: m.swapaxes(1, 2).reshape(N, H, L, S), "attn_mask.swapaxes(1, 2)"),
    ("attn_mask", "L 1"): (lambda m: m[None, None], "np.broadcast_to(attn_mask, (5, 6))"),
    ("attn_mask", "S S"): (lambda m: m[None, None, -L:], "attn_mask[-5:]"),
    ("key_padding_mask", "S N"): (lambda m: m.T[:, None, None], "key_padding_mask.T"),
}


def random_mask(axes, sizes, kind):
    shape = [sizes[axis] for axis in axes.split()]
    hidden = np.random.default_rng(len(axes)).random(shape) < 0.4
    return hidden if kind == "bool" else np.where(hidden, -np.inf, 0.5).astype("float32")


def passed(words):
    """What a message says to pass: the argument (None: the one that it is about), and the code."""
    return [(name[:-1] or None, code) for name, code in re.findall(
        r"pass ((?:attn_mask=|key_padding_mask=)?)(.+?)(?=; or |; if |\.$)", words)]


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # torch's, of np.repeat
@pytest.mark.parametrize("kind", ["bool", "float", "tensor"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("axes", [*READINGS, "S L", "NH S L", "L 1", "S S", "S N"])
def test_masks_of_another_shape(axes, given, batch_first, kind):
    """What was meant is told by the shape; the line that the message gives hides what was to be hidden."""
    sizes = {"1": 1, "N": N, "H": H, "L": L, "S": S, "NH": N * H}
    mask = random_mask(axes, sizes, kind)
    if axes in READINGS:
        index, target, code = READINGS[axes]
        if given == target and code == "{}":
            return  # that is the right shape
        spread, code = mask.reshape(N, H, L, S) if index is ... else mask[index], code.format(given)
    elif (given, axes) in OWN:
        spread, code = OWN[given, axes][0](mask), OWN[given, axes][1]
        target = given
    else:
        return
    module = layer(8, H, batch_first=batch_first)
    query, key = (normal((N, length, 8) if batch_first else (length, N, 8)) for length in (L, S))
    want = module(query, key, key, attn_mask=np.broadcast_to(spread, (N, H, L, S)).reshape(N * H, L, S))
    if kind == "tensor":
        mask = pytest.importorskip("torch").tensor(mask)
    words = refusal(lambda: module(query, key, key, **{given: mask}))
    assert passed(words) == [(None if target == given else target, code)], words
    got = module(query, key, key, **{target: evaluated(code, {given: mask})})
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)


def test_columns_for_appended_keys():
    module = layer(8, 2, add_bias_kv=True, add_zero_attn=True)
    query, key = normal((3, 2, 8)), normal((5, 2, 8))
    for name, shape, code in (("attn_mask", (3, 7), "attn_mask[:, :5]"),
                              ("attn_mask", (4, 3, 7), "attn_mask[:, :, :5]"),
                              ("key_padding_mask", (2, 7), "key_padding_mask[:, :5]")):
        mask = np.zeros(shape, bool)
        words = refusal(lambda: module(query, key, key, **{name: mask}))
        assert "keys that the layer appends" in words and passed(words) == [(None, code)]
        module(query, key, key, **{name: evaluated(code, {name: mask})})
    assert not passed(refusal(lambda: layer(8, 2)(query, key, key, attn_mask=np.zeros((3, 7), bool))))


def test_a_padding_mask_of_the_queries():
    module, query, key = layer(16, 4, batch_first=True), normal((2, 4, 16)), normal((2, 7, 16))
    words = refusal(lambda: module(query, key, key, key_padding_mask=np.zeros((2, 4), bool)))
    assert words == (
        "Expected key_padded_mask.shape[1] to be 7, but got 4. key_padding_mask has the shape (2, 4) of one number for "
        "each of the 4 queries of an item; it needs one for each of the 7 keys.")


def test_ambiguous_masks():
    """Where a shape has two meanings, both are named."""
    x = normal((4, 5, 8))
    mask = np.zeros((4, 5, 5), bool)
    words = refusal(lambda: layer(8, 4, batch_first=True)(x, x, x, attn_mask=mask))
    assert passed(words) == [(None, "np.repeat(attn_mask, 4, axis=0)"), (None, "np.tile(attn_mask, (4, 1, 1))")]
    assert "of one mask for each item: " in words and "; or of one mask for each head: " in words
    # as many items as keys, and fewer queries: a square is a row for each item, or all positions by all positions
    query, key = x[:, :2], normal((4, 4, 8))
    words = refusal(lambda: layer(8, 4, batch_first=True)(query, key, key, attn_mask=np.zeros((4, 4))))
    assert passed(words) == [("key_padding_mask", "attn_mask"), (None, "attn_mask[-2:]")]


def test_what_no_shape_tells():
    """Then what is expected is said, and nothing else."""
    x = normal((3, 16, 8))
    module = layer(8, 4, batch_first=True)
    for mask in (np.zeros((7, 16), bool), np.zeros((2, 16, 16), bool)):
        words = refusal(lambda: module(x, x, x, attn_mask=mask))
        expected = "(L, S) = (16, 16) or (N * H, L, S) = (12, 16, 16)"
        assert words.endswith(f"attn_mask has the shape {mask.shape}: it must be {expected}.")
    words = refusal(lambda: module(x, x, x, key_padding_mask=np.zeros((5, 9), bool)))
    assert words.endswith("key_padding_mask has the shape (5, 9): it must be (N, S) = (3, 16).")
    x = x[0]
    assert refusal(lambda: layer(8, 4)(x, x, x, attn_mask=np.zeros((3, 4, 4)))).endswith(
        "it must be (L, S) = (16, 16) or (H, L, S) = (4, 16, 16).")
    assert refusal(lambda: layer(8, 4)(x, x, x, key_padding_mask=np.zeros(4))).endswith("it must be (S,) = (16,).")


SIZES = [(3, 4, 5, 6), (4, 4, 5, 6), (3, 4, 5, 5), (3, 4, 1, 6), (1, 4, 5, 6), (5, 4, 3, 5), (3, 1, 3, 4), (1, 1, 1, 1),
         (None, 4, 5, 6), (None, 4, 1, 4)]


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_line_that_a_message_gives_works(sizes, extra):
    """Whatever the shape of a mask: what the message says to write is then accepted."""
    n, h, length, s = sizes
    module = layer(8, h, batch_first=True, add_zero_attn=extra)
    query, key = (normal((steps, 8) if n is None else (n, steps, 8)) for steps in (length, s))
    axes = sorted({1, n or 1, h, (n or 1) * h, length, s, s + extra})
    followed = 0
    for name, rank in itertools.product(("attn_mask", "key_padding_mask"), range(1, 5)):
        for shape in itertools.product(axes, repeat=rank):
            mask = np.zeros(shape, bool)
            words = str(outcome(lambda: module(query, key, key, **{name: mask})).error or "")
            for target, code in passed(words):
                module(query, key, key, **{target or name: evaluated(code, {name: mask})})
                followed += 1
    assert followed >= 5 or sizes == (1, 1, 1, 1)


@pytest.mark.parametrize("shape, code", [
    ((6,), "attn_mask[None]"), ((3, 6), "attn_mask[:, None, None]"), ((3, 5, 6), "attn_mask[:, None]"),
    ((12, 5, 6), "attn_mask.reshape(3, 4, 5, 6)"), ((6, 5), "attn_mask.T"), ((5, 7), None), ((2, 1, 6), None),
])
def test_masks_of_scaled_dot_product_attention(shape, code):
    query, key = normal((3, 4, 5, 8)), normal((3, 4, 6, 8))
    mask = np.ones(shape, bool)
    words = refusal(lambda: scaled_dot_product_attention(query, key, key, mask))
    assert f"attn_mask has the shape {shape}" in words
    if code is None:
        assert words.endswith("does not broadcast to the scores, (3, 4, 5, 6).")
    else:
        assert words.endswith(f": pass {code}.")
        scaled_dot_product_attention(query, key, key, evaluated(code, {"attn_mask": mask}))


# ------------------------------------------------------------------------------------------- batches and features


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_batch_on_the_other_axis(batch_first):
    """Seen by a mask, or by query and key: the layer is told which axis it is, and computes what was meant."""
    right = layer(16, 2, batch_first=not batch_first)
    query, key = (normal((12, steps, 16) if right.batch_first else (steps, 12, 16)) for steps in (5, 7))
    axis = "first" if right.batch_first else "second"
    cure = f"if the batch is the {axis} axis of query, key and value, set layer.batch_first = {right.batch_first}"
    for call in ({}, {"attn_mask": np.tri(5, 7, dtype=bool)}, {"attn_mask": np.zeros((24, 5, 7), bool)},
                 {"key_padding_mask": np.zeros((12, 7), bool)}):
        wrong = layer(16, 2, batch_first=batch_first)
        words = refusal(lambda: wrong(query, key, key, **call))
        assert cure in words
        exec(cure.partition(", set ")[2], {"layer": wrong})  # noqa: S102
        np.testing.assert_array_equal(wrong(query, key, key, **call)[0], right(query, key, key, **call)[0])
    x = normal((12, 7, 16))  # of one length: only a mask tells
    assert "batch_first" in refusal(lambda: layer(16, 2)(x, x, x, attn_mask=np.zeros((7, 7), bool)))
    assert "batch_first" not in refusal(lambda: layer(16, 2)(x, x, x, attn_mask=np.zeros((6, 6), bool)))
    x, y = normal((2, 5, 16)), normal((3, 7, 16))  # the batches differ on both axes
    assert "batch_first" not in refusal(lambda: layer(16, 2)(x, y, y))


@pytest.mark.parametrize("batch_first", [False, True])
def test_batches_that_differ(batch_first):
    def x(batch, steps):
        return normal((batch, steps, 16) if batch_first else (steps, batch, 16))

    module = layer(16, 4, batch_first=batch_first)
    words = refusal(lambda: module(x(10, 3), x(7, 4), x(7, 4)))
    assert words.startswith("query has a batch of 10, key and value of 7. torch says: ")
    words = refusal(lambda: module(x(3, 2), x(3, 4), x(2, 4)))
    assert "key has a batch of 3 and value of 2: there must be one value for each key" in words
    # One query for all items, and one set of keys for all.
    given = {"query": x(1, 2), "key": x(4, 3), "value": x(4, 3)}
    words = refusal(lambda: module(**given))
    assert words.startswith("query has a batch of 1, key and value of 4: if all items share query, pass np.broadcast_")
    module(**{**given, "query": evaluated(re.search(r"pass (.+\)\))", words)[1], given)})
    given = {"query": x(4, 2), "key": x(1, 3), "value": x(1, 3)}
    words = refusal(lambda: module(**given))
    key, value = re.search(r"share key and value, pass (.+\)\)) and (.+\)\))", words).groups()
    module(given["query"], evaluated(key, given), evaluated(value, given))


def test_features():
    query, narrow = normal((3, 2, 16)), normal((3, 2, 12))
    words = refusal(lambda: layer(16, 4)(query, narrow, narrow))
    assert words.startswith("key has 12 features, but kdim is 16, and value has 12 features, but vdim is 16: "
                            "make the layer with kdim=12 and vdim=12. torch says: mat1 and mat2 shapes")
    M(16, 4, kdim=12, vdim=12)(query, narrow, narrow)
    words = refusal(lambda: layer(16, 4, batch_first=True)(query, narrow, query))
    assert words.endswith("key has 12 features, but kdim is 16: make the layer with kdim=12 "
                          "(as passed, with the batch first: key (3, 2, 12), value (3, 2, 16)).")
    words = refusal(lambda: layer(16, 4, kdim=12)(query, query, query))
    assert words.endswith("key has 16 features, but kdim is 12: make the layer with kdim=16.")
    words = refusal(lambda: mha_c.TransformerDecoderLayer(16, 4, 8)(query, narrow))  # no d_model would fit both
    assert words.startswith("memory has 12 features, but d_model is 16. torch says: ")
    words = refusal(lambda: layer(16, 4)(narrow, narrow, narrow))
    assert words == "was expecting embedding dimension of 16, but got 12. query has 12 features, but embed_dim is 16."
    words = refusal(lambda: layer(16, 4)(query, query, query[:2]))
    assert words.endswith("key has 3 positions and value 2: there must be one value for each key.")


def test_ranks():
    x = normal((3, 2, 8))
    assert refusal(lambda: layer(8, 2)(x[0, 0], x, x)).endswith(
        "query has the shape (8,): it must be (length, batch, 8), or (length, 8) without a batch.")
    assert "(batch, length, 8)" in refusal(lambda: layer(8, 2, batch_first=True)(x[None], x, x))
    for module in (layer(8, 2), layer(8, 2, batch_first=True)):
        for key in (x[0], x[0, 0]):
            shapes = f"query has the shape (3, 2, 8), key {key.shape} and value (3, 2, 8)"
            assert refusal(lambda: module(x, key, x)).endswith(f"{shapes}: give all three a batch axis, or none.")


def test_shapes_of_scaled_dot_product_attention():
    query, key = normal((2, 8, 3, 4)), normal((2, 2, 5, 4))
    assert refusal(lambda: scaled_dot_product_attention(query, key, key)).endswith(
        "query has 8 heads and key 2: for groups of heads that share a key head, pass enable_gqa=True.")
    scaled_dot_product_attention(query, key, key, enable_gqa=True)
    for q, k, v, options, end in (
        ((8, 3, 4), (3, 5, 4), (3, 5, 4), {}, "query has 8 heads and key 3."),
        ((2, 8, 3, 4), (2, 3, 5, 4), (2, 2, 5, 4), {"enable_gqa": True},
         "query has 8 heads, which the 3 heads of key do not divide."),
        ((2, 1, 3, 4), (3, 1, 5, 4), (3, 1, 5, 4), {},
         "The axes before the last two must broadcast: query has (2, 1), key (3, 1)."),
        ((3, 4), (5, 6), (5, 6), {}, "query has 4 features and key 6: they must have the same number."),
        ((3, 4), (5, 4), (6, 4), {}, "key has 5 positions and value 6: there must be one value for each key."),
        ((2, 2, 3, 4), (2, 2, 5, 4), (2, 4, 5, 4), {}, "query has 2 heads and value 4."),
        ((3, 4), (5, 4), (5, 4), {"enable_gqa": True},
         "With enable_gqa=True, query, key and value have an axis of heads before the last two."),
    ):
        assert refusal(lambda: scaled_dot_product_attention(normal(q), normal(k), normal(v), **options)).endswith(end)


def test_the_function_has_no_layer():
    """multi_head_attention_forward says what to do to its arguments."""
    module = layer(8, 2)

    def call(query, key, value, **options):
        weights = module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0
        return multi_head_attention_forward(query, key, value, 8, 2, *weights, module.out_proj.weight,
                                            module.out_proj.bias, **options)

    x = normal((6, 3, 8))
    wide = x.astype("d")
    assert refusal(lambda: call(wide, wide, wide)).startswith(
        "query is float64, but the weights are float32: pass query.astype(np.float32). torch says: ")
    words = refusal(lambda: call(x, x, x, attn_mask=np.zeros((3, 3), bool)))
    cure = "if the batch is the first axis of query, key and value, pass query.swapaxes(0, 1), key.swapaxes(0, 1) and"
    assert cure in words and "batch_first" not in words
    call(*[x.swapaxes(0, 1)] * 3, attn_mask=np.zeros((3, 3), bool))
    assert "np.repeat(attn_mask, 2, axis=0)" in refusal(lambda: call(x, x, x, attn_mask=np.zeros((3, 6, 6), bool)))
    narrow = normal((6, 3, 5))
    assert "use_separate_proj_weight=True allows other widths" in refusal(lambda: call(x, narrow, narrow))
    assert "query has 5 features, but embed_dim is 8" in refusal(lambda: call(narrow, x, x))
    words = refusal(lambda: multi_head_attention_forward(
        x, x, x, 8, 2, module.in_proj_weight, None, None, None, False, 0.0, np.zeros((8, 8)), None))
    assert words == ("out_proj_weight is float64, but in_proj_weight is float32: pass parameters of one dtype. "
                     "torch says: mat1 and mat2 must have the same dtype, but got Float and Double")
    # Static keys have lengths of their own, of which there is no advice.
    static = normal((6, 4, 4))
    words = refusal(lambda: call(x, x, x, static_k=static, static_v=static, key_padding_mask=np.zeros((3, 6), bool)))
    assert words == "Expected key_padded_mask.shape[1] to be 4, but got 6"


def test_explain_gives_the_same_advice():
    x = X.astype("d")
    assert refusal(lambda: mha_c.explain(layer(8, 2), x, x, x)).startswith("query is float64, but this layer is ")


# ------------------------------------------------------------------------------------------- is_causal while decoding


def test_decoding_with_is_causal():
    """A UserWarning at the user's line, with the mask that gives the last queries their keys."""
    module, x = layer(16, 4, batch_first=True), normal((2, 10, 16))
    query = x[:, -3:]
    with pytest.warns(UserWarning, match=r"is_causal=True lets query l see the keys 0\.\.l") as caught:
        module(query, x, x, is_causal=True)
        module.forward(query, x, x, is_causal=True)
    here = inspect.currentframe().f_lineno
    assert [(w.filename, here - w.lineno) for w in caught] == [(__file__, 2), (__file__, 1)]
    code = re.search(r"pass attn_mask=(.+?), for L queries", str(caught[0].message))[1]
    mask = evaluated(code, {"L": 3, "S": 10})
    want = module(x, x, x, is_causal=True)[0][:, -3:]
    np.testing.assert_allclose(module(query, x, x, attn_mask=mask)[0], want, rtol=1e-5, atol=1e-6)


def test_decoding_is_warned_of_once():
    """Though the number of keys grows."""
    module, x = layer(16, 4, batch_first=True), normal((1, 10, 16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for s in range(2, 11):
            module(x[:, s - 1:s], x[:, :s], x[:, :s], is_causal=True)
    assert len(caught) == 1


def test_attention_of_a_layer_warns_of_decoding():
    """Except the one that attends to a memory, which may be longer than what is decoded."""
    decoder, x = mha_c.TransformerDecoderLayer(16, 4, 8, batch_first=True).eval(), normal((2, 5, 16))
    for module in (decoder, mha_c.TransformerEncoderLayer(16, 4, 8, batch_first=True).eval()):
        with pytest.warns(UserWarning, match="is_causal=True lets query l see"):
            module.self_attn(x[:, -1:], x, x, is_causal=True)
    for over_memory in (decoder.multihead_attn, layer(16, 4, batch_first=True)):
        decoder.multihead_attn = over_memory
        for training in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                decoder.train(training)(x[:, :3], x, memory_is_causal=True)
                decoder.multihead_attn(x[:, :3], x, x, is_causal=True)


def test_what_is_not_warned_of():
    """As many queries as keys, or more; a mask beside is_causal; the functions; torch's hint in a replaced layer; a
    comparison."""
    module, x = layer(16, 4), normal((10, 2, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x, x, x, is_causal=True)
        module(x, x[:5], x[:5], is_causal=True)
        module(x[:5], x, x)
        module(x[:5], x, x, attn_mask=np.zeros((5, 10), bool), is_causal=True)
        module(x[:2, 0], x[:2, 0], x[:2, 0], is_causal=True)
        scaled_dot_product_attention(x[0, :1], x[0], x[0], is_causal=True)
        with pytest.raises(TypeError, match="query must be an array"):
            module([1.0], x, x, is_causal=True)
        torch = pytest.importorskip("torch")
        replaced = mha_c.torch.replace_attention(torch.nn.MultiheadAttention(16, 4)).eval()
        x = torch.tensor(x)
        with torch.no_grad():
            replaced(x[:5], x, x, attn_mask=torch.zeros(5, 10, dtype=torch.bool), need_weights=False, is_causal=True)
        assert mha_c.check.against_torch(module, x[:5], x, is_causal=True).agrees


# ------------------------------------------------------------------------------------------- tensors and token ids


def calls_with(x, y):
    """Calls that take x, and y where they take a second input; by what they call x."""
    encoder = mha_c.TransformerEncoderLayer(8, 2, 16)
    decoder = mha_c.TransformerDecoderLayer(8, 2, 16)
    return [
        ("query", lambda x: layer(8, 2)(x, y, y)), ("value", lambda x: layer(8, 2)(y, y, x)),
        ("query", lambda x: mha_c.explain(layer(8, 2), x, y, y)),
        ("key", lambda x: scaled_dot_product_attention(y, x, y)),
        ("src", encoder), ("src", encoder.eval()), ("src", mha_c.TransformerEncoder(encoder, 2)),
        ("memory", lambda x: decoder(y, x)), ("tgt", lambda x: mha_c.TransformerDecoder(decoder, 2)(x, y)),
        ("src", lambda x: mha_c.Transformer(8, 2, 1, 1, 16)(x, y)), ("input", mha_c.Linear(8, 2)),
        ("input", mha_c.LayerNorm(8)), ("x", mha_c.RMSNorm(8)),
        ("input", lambda x: mha_c.functional.layer_norm(x, (8,))),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_that_require_gradients(dtype):
    torch = pytest.importorskip("torch")
    x = torch.tensor(X).to(getattr(torch, dtype)).requires_grad_()
    for name, call in calls_with(x, torch.tensor(X)):
        words = refusal(lambda: call(x))
        assert words.startswith(f"{name} requires a gradient, which mha_c does not compute: pass {name}.detach(). "
                                "torch says: Can't call numpy() on Tensor that requires grad.")
        assert outcome(lambda: call(x)).error.__class__ is RuntimeError
        if dtype == "float32":
            call(evaluated(f"{name}.detach()", {name: x}))
    words = refusal(lambda: layer(8, 2)(x, x.clone(), X))
    assert words.startswith("query and key require gradients, which mha_c does not compute: pass query.detach() and "
                            "key.detach(). torch says: ")
    mask = torch.zeros(5, 5).requires_grad_()
    encoder = mha_c.TransformerEncoderLayer(8, 2, 16)
    assert refusal(lambda: encoder(X, mask)).startswith(
        "src_mask requires a gradient, which mha_c does not compute: pass src_mask.detach(). torch says: ")


def test_tensors_on_other_devices():
    """meta has no numbers to copy. Of a device with numbers, only the words are tested: it need not be there."""
    torch = pytest.importorskip("torch")

    class OnDevice:
        def __init__(self, tensor):
            self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype
            self.device, self.requires_grad = torch.device("cuda:0"), False

        def detach(self):
            return self

        def cpu(self):
            return self.tensor

        def __array__(self, *arguments, **keywords):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    x = torch.tensor(X)
    for name, call in calls_with(x, x):
        assert refusal(lambda: call(x.to("meta"))).startswith(
            f"{name} is on the device meta, where tensors have no numbers. torch says: ")
        elsewhere, cure = OnDevice(x), f"{name}.cpu()"
        assert refusal(lambda: call(elsewhere)).startswith(
            f"{name} is on the device cuda:0, but mha_c computes on the CPU: pass {cure}. torch says: can't convert ")
        call(evaluated(cure, {name: elsewhere}))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrong", [None, 3, "src", object()])
def test_what_is_no_array(wrong, training):
    """Whole layers name their own argument."""
    for name, call in calls_with(X, X):
        if hasattr(call, "train"):
            call.train(training)
        assert refusal(lambda: call(wrong)).startswith(f"{name} must be an array"), (name, call)
    encoder, decoder = mha_c.TransformerEncoderLayer(8, 2, 16), mha_c.TransformerDecoderLayer(8, 2, 16)
    for name in ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask"):
        if wrong is not None:
            assert refusal(lambda: decoder.train(training)(X, X, **{name: wrong})).startswith(f"{name} must be an arr")
    assert refusal(lambda: encoder(np.ma.array(X))).startswith("src is a masked array, whose mask would be ignored: "
                                                               "pass src.filled(0)")


def test_parameters_that_are_no_arrays():
    attention = layer(8, 2)

    def assign(module, name):
        return lambda: setattr(module, name, [0.0] * 8)

    def function(name):
        given = {"in_proj_weight": attention.in_proj_weight, "out_proj_weight": attention.out_proj.weight,
                 **dict.fromkeys(("in_proj_bias", "bias_k", "bias_v", "out_proj_bias")), name: [0.0]}
        return lambda: mha_c.functional.multi_head_attention_forward(
            X, X, X, 8, 2, **given, add_zero_attn=False, dropout_p=0.0)

    calls = {"input": lambda: mha_c.Dropout()([1.0]), "in_proj_bias": assign(attention, "in_proj_bias"),
             "out_proj.bias": assign(attention.out_proj, "bias")}
    for name, call in calls.items():
        assert refusal(call).startswith(f"{name} must be an array (NumPy, buffer protocol or DLPack), not list"), name
    for name in ("in_proj_weight", "in_proj_bias", "bias_k", "out_proj_weight", "out_proj_bias"):
        assert refusal(function(name)).startswith(f"{name} must be an array"), name


def test_token_ids():
    """Integers of another width: whatever torch's words are, the shape that is expected is that of their embeddings."""
    ids = np.zeros((2, 3), np.int64)
    encoder = mha_c.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    decoder = mha_c.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    whole = mha_c.Transformer(8, 2, 1, 1, 16, batch_first=True)
    cases = [("src", encoder, AssertionError), ("src", mha_c.TransformerEncoder(encoder, 2), AssertionError),
             ("src", lambda ids: encoder(ids[0]), AssertionError),
             ("tgt", lambda ids: decoder(ids, ids), AssertionError),
             ("memory", lambda ids: decoder(np.zeros((2, 3, 8), "f"), ids), AssertionError),
             ("src", lambda ids: whole(ids, ids), RuntimeError),
             ("tgt", lambda ids: whole(np.zeros((2, 3, 8), "f"), ids), RuntimeError),
             ("query", lambda ids: layer(8, 2, batch_first=True)(ids, ids, ids), AssertionError)]  # fmt: skip
    for name, call, kind in cases:
        for dtype in ("int64", "uint8"):
            error = outcome(lambda: call(ids.astype(dtype))).error
            assert type(error) is kind
            assert re.match(rf"{name} is {dtype}, but it must hold vectors, \(batch, length, 8\)(, or \(length, 8\) "
                            r"without a batch)?: if it holds token ids, pass their embeddings\. torch says: ", str(error))
    assert "(length, batch, 8)" in refusal(lambda: layer(8, 2)(ids, ids, ids))
    assert "token" not in refusal(lambda: encoder(np.zeros((2, 3, 8), np.int64)))  # of the right width
    assert "token" not in refusal(lambda: encoder(np.zeros((2, 3, 6), "f")))


# ------------------------------------------------------------------------------------------- dtypes of layers


@pytest.mark.parametrize("dtype", ["int8", np.int8, np.dtype("int8")])
def test_int8_is_a_precision_of_products(dtype):
    """What integers are refused with in torch, then what to write, which works."""
    for call in (lambda: M(8, 2, dtype=dtype), lambda: M(8, 2).to(dtype), lambda: mha_c.Linear(8, 2, dtype=dtype)):
        words = refusal(call)
        assert words.startswith("Only Tensors of floating point and complex dtype can require gradients: dtype must ")
        code = re.search(r"\. For products of int8, use matmul_precision=(.+)$", words)[1]
        assert M(8, 2, matmul_precision=evaluated(code, {})).matmul_precision == "int8"
    assert "matmul_precision" not in refusal(lambda: M(8, 2, dtype="int32"))
    assert "in which mha_c computes, but got ','" in refusal(lambda: M(8, 2, dtype=","))


@pytest.mark.parametrize("given, write", [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"),
                                          ("fp64", "float64")])
def test_short_names_of_dtypes(given, write):
    words = refusal(lambda: M(8, 2, dtype=given))
    assert words.endswith(f", in which mha_c computes, but got {given!r}: write \"{write}\"")
    assert M(8, 2, dtype=write).out_proj.weight.dtype.name == write
    assert refusal(lambda: M(8, 2, dtype="f16")).endswith("but got 'f16'")


@pytest.mark.parametrize("given, cure", [
    ("bf16", 'write "bfloat16"'), ("float16", 'dtype="float16" makes a layer of float16'),
    ("half", 'dtype="float16" makes a layer of float16'), ("fp16", 'dtype="float16" makes a layer of float16'),
    ("fp32", 'write "float32"'), ("int4", ""),
])
def test_other_precisions_of_products(given, cure):
    got = f"but got {given!r}{': ' if cure else ''}{cure}"
    assert refusal(lambda: M(8, 2, matmul_precision=given)) == (
        f'matmul_precision must be None, "float32", "bfloat16", "int8", or a mapping of names to these, {got}')
    for name in ("in_proj", "default"):
        assert refusal(lambda: M(8, 2, matmul_precision={name: given})) == (
            f'matmul_precision["{name}"] must be None, "float32", "bfloat16" or "int8", {got}')


def test_precisions_of_torch():
    torch = pytest.importorskip("torch")
    assert refusal(lambda: M(8, 2, matmul_precision=torch.bfloat16)).endswith('got torch.bfloat16: write "bfloat16"')
    assert "makes a layer of float16" in refusal(lambda: M(8, 2, matmul_precision=torch.float16))


# ------------------------------------------------------------------------------------------- keywords


@pytest.mark.parametrize("keyword, write", [
    ("d_model", "embed_dim"), ("hidden_size", "embed_dim"), ("nhead", "num_heads"), ("nheads", "num_heads"),
    ("heads", "num_heads"), ("num_attention_heads", "num_heads"), ("num_key_value_heads", "num_kv_heads"),
    ("n_kv_heads", "num_kv_heads"), ("batchfirst", "batch_first"), ("dropout_p", "dropout"),
    ("add_bias_k", "add_bias_kv"), ("key_dim", "head_dim"), ("maskedrows", "masked_rows"), ("use_bias", "bias"),
])
def test_keywords_of_the_constructor(keyword, write):
    words = refusal(lambda: M(8, 2, **{keyword: 1}))
    assert words == (f"MultiheadAttention.__init__() got an unexpected keyword argument '{keyword}'. "
                     f"Write {write}=1 instead of {keyword}=1.")
    assert write in inspect.signature(M).parameters


CALL_KEYWORDS = {
    "mask": "Write key_padding_mask= or attn_mask= instead of mask= (True hides a key here).",
    "causal": "Write is_causal= instead of causal=.",
    "attn_masks": "Write attn_mask= instead of attn_masks= (True hides a key here).",
    "src_mask": "Write attn_mask= instead of src_mask= (True hides a key here).",
    "return_weights": "Write need_weights= instead of return_weights=.",
    "output_attentions": "Write need_weights= instead of output_attentions=.",
    "attention_mask": "Write key_padding_mask=attention_mask == 0 instead of attention_mask=attention_mask (if 1 marks",
    "padding_mask": "Write key_padding_mask= instead of padding_mask= (",
    "src_key_padding_mask": "Write key_padding_mask= instead of src_key_padding_mask= (",
    "average_weights": "Write average_attn_weights= instead of average_weights=.",
}


@pytest.mark.parametrize("keyword", CALL_KEYWORDS)
def test_keywords_of_a_call(keyword):
    module = layer(8, 2)
    for call in (module, module.forward):
        words = refusal(lambda: call(X, X, X, **{keyword: None}))
        assert words.startswith(f"MultiheadAttention.forward() got an unexpected keyword argument '{keyword}'. ")
        assert CALL_KEYWORDS[keyword] in words


def test_several_keywords():
    words = refusal(lambda: layer(8, 2)(q=X, k=X, v=X))
    assert words.endswith(" Write query= instead of q=, key= instead of k=, value= instead of v=.")
    words = refusal(lambda: M(d_model=10, nhead=4, dropout=0.1, foo=3))
    assert words.endswith("'d_model'. Write embed_dim=10 instead of d_model=10, num_heads=4 instead of nhead=4.")
    words = refusal(lambda: mha_c.TransformerEncoderLayer(8, 2, hidden_act="gelu", hidden_dropout_prob=0.1,
                                                          attention_probs_dropout_prob=0.2, torch_dtype="float64",
                                                          quantize="int8"))
    assert words.endswith("Write activation='gelu' instead of hidden_act='gelu', dropout=0.1 instead of "
                          "hidden_dropout_prob=0.1, dtype='float64' instead of torch_dtype='float64', "
                          "matmul_precision='int8' instead of quantize='int8'.")


@pytest.mark.parametrize("keyword, write", [
    ("mask", "attn_mask= instead of mask= (True shows a key here)."),
    ("src_mask", "attn_mask= instead of src_mask= (True shows a key here)."),
    ("causal", "is_causal= instead of causal=."),
    ("attention_mask", "attn_mask=attention_mask[:, None, None] != 0 instead"),
    ("dropout", "dropout_p= instead of dropout=."), ("softmax_scale", "scale= instead of softmax_scale=."),
])
def test_keywords_of_scaled_dot_product_attention(keyword, write):
    assert f"Write {write}" in refusal(lambda: scaled_dot_product_attention(X, X, X, **{keyword: None}))


def test_attention_masks_of_hugging_face():
    """What the messages say to write hides what 0 marks."""
    tokens, x = np.array([[1, 1, 1, 0], [1, 1, 0, 0]]), normal((2, 4, 8))
    want = layer(8, 2, batch_first=True)(x, x, x, key_padding_mask=tokens == 0)[0]
    code = re.search(r"key_padding_mask=(.+?) instead", refusal(lambda: layer(8, 2)(x, x, x, attention_mask=tokens)))[1]
    got = layer(8, 2, batch_first=True)(x, x, x, key_padding_mask=evaluated(code, {"attention_mask": tokens}))[0]
    np.testing.assert_array_equal(got, want)
    q = normal((2, 3, 4, 8))
    code = re.search(r"attn_mask=(.+?) instead", refusal(lambda: scaled_dot_product_attention(
        q, q, q, attention_mask=tokens)))[1]
    mask = evaluated(code, {"attention_mask": tokens})
    np.testing.assert_array_equal(scaled_dot_product_attention(q, q, q, mask)[1],
                                  scaled_dot_product_attention(q[1], q[1], q[1], tokens[1] == 1))
    code = re.search(r"attn_mask=(.+?) instead", refusal(lambda: scaled_dot_product_attention(
        q, q, q, key_padding_mask=tokens == 0)))[1]
    np.testing.assert_array_equal(evaluated(code, {"key_padding_mask": tokens == 0}), mask)


def test_masks_of_hugging_face_in_transformers():
    """The same for whole layers and stacks; in a decoder, for the masks of both sequences."""
    tokens, others = np.array([[1, 1, 1, 0], [1, 1, 0, 0]]), np.array([[1, 0], [1, 1]])
    x, y = normal((2, 4, 8)), normal((2, 2, 8))
    encoder = mha_c.TransformerEncoderLayer(8, 2, 16, batch_first=True, seed=0).eval()
    decoder = mha_c.TransformerDecoderLayer(8, 2, 16, batch_first=True, seed=0).eval()
    whole = mha_c.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    cases = [
        (encoder, (x,), {"attention_mask": tokens}, ["src"]),
        (mha_c.TransformerEncoder(encoder, 2).eval(), (x,), {"attention_mask": tokens}, ["src"]),
        (decoder, (x, y), {"attention_mask": tokens, "encoder_attention_mask": others}, ["tgt", "memory"]),
        (mha_c.TransformerDecoder(decoder, 2).eval(), (x, y), {"encoder_attention_mask": others}, ["memory"]),
        (whole, (y, x), {"attention_mask": others, "decoder_attention_mask": tokens}, ["src", "memory", "tgt"]),
    ]
    for module, inputs, masks, meant in cases:
        words = refusal(lambda: module(*inputs, **masks))
        found = dict(re.findall(r"(\w+_key_padding_mask)=(\w+ == 0)", words))
        assert sorted(found) == sorted(f"{name}_key_padding_mask" for name in meant)
        written = {name: evaluated(code, masks) for name, code in found.items()}
        of = {"src": others if module is whole else tokens, "tgt": tokens, "memory": others}
        wanted = {f"{name}_key_padding_mask": of[name] == 0 for name in meant}
        np.testing.assert_array_equal(module(*inputs, **written), module(*inputs, **wanted))
        assert not np.array_equal(module(*inputs, **written), module(*inputs))


def test_keywords_of_a_cache():
    words = refusal(lambda: layer(8, 2)(X, X, X, past_key_values=None, use_cache=True, mask=None))
    assert words.endswith(
        "'past_key_values'. Write key_padding_mask= or attn_mask= instead of mask= (True hides a key here). mha_c has "
        "no cache of keys and values: leave out past_key_values and use_cache, and pass all tokens each time.")
    encoder = mha_c.TransformerEncoderLayer(8, 2, 16)
    assert refusal(lambda: encoder(X, past_key_value=None)).endswith(
        "'past_key_value'. mha_c has no cache of keys and values: leave out past_key_value, and pass all tokens each "
        "time.")


def test_keywords_of_other_functions():
    assert "Write num_heads=3 instead of n_heads=3." in refusal(lambda: M.from_state_dict({}, n_heads=3))
    assert "Write query= instead of q=" in refusal(lambda: multi_head_attention_forward(q=X))


@pytest.mark.parametrize("name", ["from_torch", "load"])
def test_a_dtype_where_it_is_kept(name):
    for cls in (M, mha_c.LayerNorm, mha_c.Linear, mha_c.Dropout, mha_c.ModuleList, mha_c.TransformerEncoderLayer,
                mha_c.TransformerEncoder, mha_c.TransformerDecoderLayer, mha_c.TransformerDecoder, mha_c.Transformer):
        words = refusal(lambda: getattr(cls, name)("model", dtype="float16"))
        assert words.endswith(f"'dtype'. The dtype is kept: write {name}(...).to('float16').")
    words = refusal(lambda: mha_c.TransformerEncoder.load("encoder.npz", matmul_precision="int8"))
    assert words.endswith("'matmul_precision'. The file records matmul_precision: assign it to the layer that is loaded.")
    assert refusal(lambda: getattr(M, name)("model", dtype=np.float16)).endswith(f"write {name}(...).to(dtype).")


def test_keywords_that_mean_nothing():
    """No guess where there is none to make, and none about what is not a keyword."""
    for call in (lambda: M(8, 2, foo=1), lambda: layer(8, 2)(X, X, X, foo=1), lambda: M(8, 2, num_layers=2)):
        assert re.fullmatch(r"MultiheadAttention\.\w+\(\) got an unexpected keyword argument '\w+'", refusal(call))
    assert refusal(lambda: layer(8, 2)(X, X)) == (
        "MultiheadAttention.forward() missing 1 required positional argument: 'value'")
    assert "multiple values for argument 'query'" in refusal(lambda: layer(8, 2)(X, X, X, query=X))


def test_advised_functions_are_like_others():
    """Signature, docstring, name, repr; bound to instances; pickled, copied and weakly referred to."""
    for function in (M.forward, M.__init__, scaled_dot_product_attention,
                     multi_head_attention_forward):
        assert inspect.isroutine(function) and repr(function) == repr(function.__wrapped__)
        assert function.__doc__ == function.__wrapped__.__doc__
        assert function.__name__ == function.__wrapped__.__name__ == function.__qualname__.split(".")[-1]
        assert copy.deepcopy(function) is function
        assert weakref.ref(function)() is function
        assert inspect.signature(function) == inspect.signature(function.__wrapped__)
    assert M.__call__ is M.forward
    assert pickle.loads(pickle.dumps(scaled_dot_product_attention)) is scaled_dot_product_attention
    module = layer(8, 2)
    assert repr(module.forward).startswith("<bound method MultiheadAttention.forward of MultiheadAttention(")
    again = pickle.loads(pickle.dumps(module.forward))
    np.testing.assert_array_equal(again(X, X, X)[0], module(X, X, X)[0])


def test_advice_is_asked_for_type_errors_with_keywords_alone():
    asked = []

    def function(a, *, b=None):
        if b is not None:
            raise b
        return a

    advised = _core.AdvisedFunction(function, lambda error, keywords: asked.append((error, keywords)))
    assert advised(1) == advised(a=1) == 1 and not asked
    for wrong in (ValueError(), KeyboardInterrupt()):
        with pytest.raises(type(wrong)) as caught:
            advised(1, b=wrong)
        assert caught.value is wrong
    with pytest.raises(TypeError):
        advised()
    assert not asked
    with pytest.raises(TypeError) as caught:
        advised(1, c=2, b=3)
    assert asked == [(caught.value, {"c": 2, "b": 3})]


def test_advice_that_fails_is_dropped():
    def advise(error, keywords):
        raise ZeroDivisionError

    advised = _core.AdvisedFunction(lambda: None, advise)
    with pytest.raises(TypeError, match="unexpected keyword argument 'a'") as caught:
        advised(a=1)
    assert caught.value.__context__ is None
    for wrong in ((), (1,), (1, 2, 3)):
        with pytest.raises(TypeError):
            _core.AdvisedFunction(*wrong)
    with pytest.raises(TypeError):
        _core.AdvisedFunction(function=1, advise=2)


def test_advised_functions_are_freed():
    """Alone, after errors, and in a circle."""
    def make():
        advised = _core.AdvisedFunction(lambda: None, lambda error, keywords: None)
        outcome(lambda: advised(a=1))
        return advised

    gc.collect()
    advised = make()
    alive = weakref.ref(advised)
    del advised
    assert alive() is None
    advised = make()
    advised.itself = advised
    alive = weakref.ref(advised)
    del advised
    gc.collect()
    assert alive() is None


# ------------------------------------------------------------------------------------------- values


def test_arguments_of_wrong_types_are_refused_when_they_are_given():
    for options, words in (
        ({"dropout": "0.1"}, "dropout must be a number, but got '0.1'"),
        ({"dropout": None}, "dropout must be a number, but got None"),
        ({"dropout_seed": "a"}, "dropout_seed must be an int"),
        ({"dropout_seed": 1.5}, "dropout_seed must be an int"),
        *(({name: "no"}, f"{name} must be True or False, but got 'no'")
          for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")),
    ):
        with pytest.raises(TypeError, match=re.escape(words)):
            M(8, 2, **options)
    with pytest.raises(ValueError, match="'a': seed must be an int"):  # what torch.manual_seed raises
        M(8, 2, seed="a")
    module = M(8, 2, dropout=0.5, dropout_seed=3)
    for name, value, error in (("dropout", "x", TypeError), ("training", "no", TypeError),
                               ("batch_first", "no", TypeError), ("add_zero_attn", "", TypeError),
                               ("dropout_seed", "a", TypeError),
                               ("masked_rows", "one", ValueError)):
        before = getattr(module, name)
        with pytest.raises(error, match=name):
            setattr(module, name, value)
        assert getattr(module, name) == before
    for name in ("need_weights", "average_attn_weights", "is_causal"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, but got 'no'"):
            module(X, X, X, **{name: "no"})
    for arguments, name in (((64.0, 8), "embed_dim"), (("64", 8), "embed_dim"), ((None, 8), "embed_dim"),
                            ((8, "2"), "num_heads")):
        wrong = arguments[0 if name == "embed_dim" else 1]
        with pytest.raises(TypeError, match=f"^{name} must be an int, but got {wrong!r}$"):
            M(*arguments)


def test_what_torch_takes_is_taken():
    """Numbers of any kind, flags of NumPy and of C."""
    for p in (2, -1, np.float32(0.5), True, np.float64("nan")):
        M(8, 2, dropout=p)
    module = M(8, 2, dropout_seed=np.int64(3), seed=np.uint8(4))
    assert (module.dropout_seed, module.dropout) == (3, 0.0)
    module.dropout_seed = 2**64 + 5
    assert module.dropout_seed == 5
    for true, false in ((True, False), (1, 0), (np.True_, np.False_), (np.array([True]), None)):
        module.batch_first = true
        want = module(X, X, X, need_weights=True, is_causal=False)
        got = module(X, X, X, need_weights=true, is_causal=false)
        np.testing.assert_array_equal(got[1], want[1])


def test_a_mask_in_the_place_of_a_flag():
    """The fifth positional argument is need_weights."""
    words = refusal(lambda: layer(8, 2)(X, X, X, None, np.zeros((5, 5), bool)))
    assert words.endswith("need_weights is an array: pass a mask by its name, attn_mask= or key_padding_mask=.")
    words = refusal(lambda: layer(8, 2)(X, X, X, is_causal=np.zeros((5, 5), bool)))
    assert words.endswith("is_causal is an array: pass a mask by its name, attn_mask= or key_padding_mask=.")


def test_layers_beyond_all_memory():
    with pytest.raises(MemoryError, match="would take 16,000,000,016,000,000,000 bytes, with embed_dim=1,000"):
        M(10**9, 4)


def test_to_as_torch_takes_it():
    torch = pytest.importorskip("torch")
    for arguments, options, dtype in (
        (("cpu",), {}, "float32"), ((torch.device("cpu"),), {}, "float32"), (("cpu:0",), {}, "float32"),
        ((), {}, "float32"), ((None,), {}, "float32"), (("cpu", "float64"), {}, "float64"),
        (("cpu", torch.float64, True), {}, "float64"),
        ((), {"dtype": "float64"}, "float64"), ((), {"device": "cpu", "dtype": np.float64}, "float64"),
        ((torch.float64,), {}, "float64"), ((np.dtype("f8"),), {"non_blocking": True}, "float64"),
        ((None, "f8"), {}, "float64"),
    ):
        module = M(8, 2)
        assert module.to(*arguments, **options) is module and module.out_proj.weight.dtype == dtype
    module = M(8, 2)
    assert module.double() is module and module.out_proj.weight.dtype == np.float64
    assert module.float() is module and module.out_proj.weight.dtype == np.float32
    assert module.cpu() is module and module.requires_grad_(False) is module
    for device in ("cuda", torch.device("meta"), "mps:0", 0):
        for call in (lambda: module.to(device), lambda: module.to(device, "float64"), lambda: module.to(device=device)):
            with pytest.raises(RuntimeError, match="mha_c computes on the CPU"):
                call()
    for dtype in ("longdouble", torch.float8_e4m3fn, "nonsense"):
        for call in (lambda: module.to(dtype), lambda: module.to("cpu", dtype), lambda: module.to(dtype=dtype)):
            with pytest.raises(TypeError, match="dtype must be float32, float64, bfloat16 or float16, in which mha_c"):
                call()
    for call in (module.cuda, lambda: module.cuda(1)):
        with pytest.raises(RuntimeError, match="mha_c computes on the CPU"):
            call()
    with pytest.raises(RuntimeError, match="mha_c has no backward pass"):
        module.requires_grad_()
    assert module.out_proj.weight.dtype == np.float32


# ------------------------------------------------------------------------------------------- masked arrays


def test_masked_arrays_are_refused():
    """Their masks would be ignored: by every input, of the layer, the functions, explain and the parameters."""
    module = layer(8, 2)
    given = {"query": X, "key": X.copy(), "value": X.copy(), "key_padding_mask": np.zeros((3, 5), bool),
             "attn_mask": np.zeros((5, 5), bool)}
    for name, value in given.items():
        for masked in (np.ma.array(value), np.ma.masked_where(value > 1, value)):
            for call in (module, lambda **arguments: mha_c.explain(module, **arguments)):
                words = rf"{name}\.filled\(0\) to put zeros where it masks, or {name}\.data to ignore the mask"
                with pytest.raises(TypeError, match=rf"{name} is a masked array, .* pass {words}"):
                    call(**{**given, name: masked})
            if name != "key_padding_mask":
                arguments = {**{n: a for n, a in given.items() if n != "key_padding_mask"}, name: masked}
                with pytest.raises(TypeError, match=f"{name} is a masked array"):
                    scaled_dot_product_attention(**arguments)
            module(**{**given, name: masked.filled(0)})
            module(**{**given, name: masked.data})
    with pytest.raises(TypeError, match="out is a masked array, whose mask would hide results: pass out.data"):
        module(X, X, X, out=np.ma.masked_where(X > 1, X))
    with pytest.raises(TypeError, match="masked array"):
        module.out_proj.bias = np.ma.zeros(8)
    with pytest.raises(RuntimeError, match="MaskedArray"):
        module.load_state_dict({**module.state_dict(), "out_proj.bias": np.ma.zeros(8)})

    class Maker:
        def __array__(self, dtype=None, copy=None):
            return np.ma.array(X)

    with pytest.raises(TypeError, match="query is a masked array"):
        module(Maker(), X, X)


# ------------------------------------------------------------------------------------------- files and strange objects


def test_save_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "nowhere" / "layer.npz"
    with pytest.raises(FileNotFoundError) as error:
        M(8, 2).save(path)
    assert error.value.filename == str(path) and ".tmp" not in str(error.value)


def test_advice_does_not_stumble():
    """Objects that raise when they are looked at, change, or lie: what the call itself raised comes through."""
    class Strange:
        @property
        def shape(self):
            raise ZeroDivisionError

        @property
        def __array_interface__(self):
            return X.astype("d").__array_interface__

    class Angry(np.ndarray):
        @property
        def dtype(self):
            raise ZeroDivisionError

    class Own(TypeError):
        pass

    class Raises:
        @property
        def __array_interface__(self):
            raise Own("mine", 3)

    module = layer(8, 2)
    for strange in (Strange(), X.astype("d").view(Angry)):
        assert refusal(lambda: module(strange, X, X)) == (
            "mat1 and mat2 must have the same dtype, but got Double and Float")
        assert refusal(lambda: scaled_dot_product_attention(strange, X, X)) == (
            "Expected query, key, and value to have the same dtype, but got query.dtype: double key.dtype: float and "
            "value.dtype: float instead.")
    with pytest.raises(Own) as caught:
        module(Raises(), X.astype("d"), X)
    assert caught.value.args == ("mine", 3)


def test_importing_needs_nothing_of_this():
    """What only messages need waits until there is one."""
    run_child("""
        import sys
        import mha_c
        mha_c.functional
        assert not {"difflib", "numpy.ma"} & set(sys.modules)
    """)
