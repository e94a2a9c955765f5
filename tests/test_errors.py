# SPDX-License-Identifier: Apache-2.0
"""Wrong calls: torch's exception type and torch's words, found by making the same call to torch.

A shape that torch prints as torch.Size([5, 3]) is printed as the tuple (5, 3) here. mha_c may add a sentence of its
own after torch's.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import REPOSITORY, call_torch, layer, normal, outcome, to_torch, torch_twin, torch_words

torch = pytest.importorskip("torch")
mha_c = pytest.importorskip("mha_c")

OURS = SimpleNamespace(MultiheadAttention=mha_c.MultiheadAttention, array=lambda a: a)
THEIRS = SimpleNamespace(MultiheadAttention=torch.nn.MultiheadAttention, array=to_torch)


def make(*args, **kwargs):
    """A case that only constructs a layer."""
    return lambda lib: lib.MultiheadAttention(*args, **{name: lib.array(value) for name, value in kwargs.items()})


def call(q=(3, 2, 8), k=(5, 2, 8), v=None, *, dtypes=("float32",) * 3, training=False, options=None, **arguments):
    """A case that constructs a layer and calls it with inputs of these shapes; masks are given as arrays."""
    def case(lib):
        module = lib.MultiheadAttention(8, 2, **{n: lib.array(o) for n, o in (options or {}).items()}).train(training)
        shapes = (q, k, k if v is None else v)
        given = [lib.array(normal(shape, dtype)) for shape, dtype in zip(shapes, dtypes)]
        with torch.no_grad():
            module(*given, **{name: lib.array(value) for name, value in arguments.items()})
    return case


def arguments(*args, **kwargs):
    """A case that calls a layer with literally these arguments."""
    def case(lib):
        module = lib.MultiheadAttention(8, 2)
        return module(*[lib.array(a) for a in args], **{name: lib.array(a) for name, a in kwargs.items()})
    return case


def hide(*shape, dtype=bool):
    return np.zeros(shape, dtype)


X = normal((3, 2, 8))
SEPARATE = {"kdim": 6, "vdim": 7}

CASES = {
    # the constructor
    "embed_dim of zero": make(0, 2),
    "negative embed_dim": make(-8, 2),
    "no heads": make(8, 0),
    "negative heads": make(8, -2),
    "embed_dim not divisible": make(10, 4),
    "fewer features than heads": make(4, 8),
    "embed_dim a float": make(8.0, 2),
    "embed_dim a string": make("8", 2),
    "num_heads a string": make(8, "2"),
    "num_heads infinite": make(8, float("inf")),
    "num_heads NaN": make(8, float("nan")),
    "dtype of integers": make(8, 2, dtype=np.int32),
    "dtype of bools": make(8, 2, dtype=np.bool_),
    "no arguments": make(),
    "one argument": make(8),
    "unknown argument": make(8, 2, heads=2),
    # the number of dimensions
    "query 0-D": call(q=()),
    "query 1-D": call(q=(8,)),
    "query 4-D": call(q=(1, 3, 2, 8)),
    "key 2-D beside a batched query": call(k=(5, 8)),
    "value 2-D beside a batched query": call(v=(5, 8)),
    "key 4-D beside a batched query": call(k=(1, 5, 2, 8)),
    "key 3-D beside an unbatched query": call(q=(3, 8), k=(5, 2, 8)),
    "value 1-D beside an unbatched query": call(q=(3, 8), k=(5, 8), v=(8,)),
    "key_padding_mask 1-D, batched": call(key_padding_mask=hide(5)),
    "key_padding_mask 3-D, batched": call(key_padding_mask=hide(2, 1, 5)),
    "key_padding_mask 2-D, unbatched": call(q=(3, 8), k=(5, 8), key_padding_mask=hide(1, 5)),
    "key_padding_mask 0-D, unbatched": call(q=(3, 8), k=(5, 8), key_padding_mask=hide()),
    "attn_mask 1-D, batched": call(attn_mask=hide(5)),
    "attn_mask 4-D, batched": call(attn_mask=hide(2, 2, 3, 5)),
    "attn_mask 1-D, unbatched": call(q=(3, 8), k=(5, 8), attn_mask=hide(5)),
    "attn_mask 4-D, unbatched": call(q=(3, 8), k=(5, 8), attn_mask=hide(1, 2, 3, 5)),
    "attn_mask 3-D of other heads, unbatched": call(q=(3, 8), k=(5, 8), attn_mask=hide(1, 3, 5)),
    "attn_mask 3-D of another length, unbatched": call(q=(3, 8), k=(5, 8), attn_mask=hide(2, 4, 5)),
    # masks
    **{f"{name} of {dtype}": call(**{name: hide(*shape, dtype=dtype)})
       for name, shape in (("attn_mask", (3, 5)), ("key_padding_mask", (2, 5)))
       for dtype in ("uint8", "int32", "int64", "complex64")},
    "attn_mask of another shape": call(attn_mask=hide(5, 3)),
    "attn_mask of another shape, no weights": call(attn_mask=hide(5, 3), need_weights=False),
    "attn_mask of one row": call(attn_mask=hide(1, 5)),
    "attn_mask of one column": call(attn_mask=hide(3, 1)),
    "attn_mask (S, L), unbatched": call(q=(3, 8), k=(5, 8), attn_mask=hide(5, 3)),
    "attn_mask 3-D, one per item": call(attn_mask=hide(2, 3, 5)),
    "attn_mask 3-D, one for all": call(attn_mask=hide(1, 3, 5)),
    "attn_mask 3-D of another length": call(attn_mask=hide(4, 3, 6)),
    "attn_mask with room for bias_k": call(attn_mask=hide(3, 6), options={"add_bias_kv": True}),
    "attn_mask with room for a zero key": call(attn_mask=hide(3, 6), options={"add_zero_attn": True}),
    "key_padding_mask of another batch size": call(key_padding_mask=hide(3, 5)),
    "key_padding_mask of another length": call(key_padding_mask=hide(2, 4)),
    "key_padding_mask (S, N)": call(key_padding_mask=hide(5, 2)),
    "key_padding_mask of another length, unbatched": call(q=(3, 8), k=(5, 8), key_padding_mask=hide(4)),
    "key_padding_mask of another length, extra keys": call(
        key_padding_mask=hide(2, 7), options={"add_bias_kv": True, "add_zero_attn": True}),
    # sizes of inputs
    "query of another width": call(q=(3, 2, 6)),
    "query of another width, unbatched": call(q=(3, 6), k=(5, 8)),
    "key and value of other lengths": call(v=(4, 2, 8)),
    "key and value of other batch sizes": call(v=(5, 3, 8)),
    "key and value of other widths": call(v=(5, 2, 6)),
    "key and value too narrow": call(k=(5, 2, 6)),
    "key and value too narrow, two arrays": call(k=(5, 2, 6), v=(5, 2, 6)),
    "key and value too narrow, no bias": call(k=(5, 2, 6), options={"bias": False}),
    "key and value too narrow, unbatched": call(q=(3, 8), k=(5, 6)),
    "key of another batch size than query": call(k=(5, 3, 8)),
    "key of another batch size than query, batch_first": call(q=(2, 3, 8), k=(3, 5, 8),
                                                               options={"batch_first": True}),
    "key of another batch size than query, bias_k": call(k=(5, 3, 8), options={"add_bias_kv": True}),
    "separate: key and value of other lengths": call(k=(5, 2, 6), v=(4, 2, 7), options=SEPARATE),
    "separate: key and value of other batch sizes": call(k=(5, 2, 6), v=(5, 3, 7), options=SEPARATE),
    "separate: key too narrow": call(k=(5, 2, 5), v=(5, 2, 7), options=SEPARATE),
    "separate: value too wide": call(k=(5, 2, 6), v=(5, 2, 8), options=SEPARATE),
    "separate: query of another width": call(q=(3, 2, 6), k=(5, 2, 6), v=(5, 2, 7), options=SEPARATE),
    "separate: key of another batch size than query": call(k=(5, 3, 6), v=(5, 3, 7), options=SEPARATE),
    # several mistakes: the one that torch finds first
    "attn_mask of integers, of another shape": call(attn_mask=hide(5, 3, dtype=int)),
    "attn_mask and query width": call(q=(3, 2, 6), attn_mask=hide(5, 3)),
    "attn_mask and key_padding_mask": call(attn_mask=hide(5, 3), key_padding_mask=hide(3, 5)),
    "key_padding_mask of integers, of another shape": call(key_padding_mask=hide(3, 5, dtype=int)),
    "key_padding_mask and key length": call(v=(4, 2, 8), key_padding_mask=hide(3, 5)),
    # types of inputs
    "query in float64": call(dtypes=("float64", "float32", "float32")),
    "key in float64": call(dtypes=("float32", "float64", "float32")),
    "value in float64": call(dtypes=("float32", "float32", "float64")),
    "all in float64": call(dtypes=("float64",) * 3),
    "all in float64, batch_first": call(dtypes=("float64",) * 3, q=(2, 3, 8), k=(2, 5, 8),
                                        options={"batch_first": True}),
    "float32 into a float64 layer": call(options={"dtype": np.float64}),
    "query of integers": call(dtypes=("int64", "float32", "float32")),
    "query in float16": call(dtypes=("float16", "float32", "float32")),
    "query of complex numbers": call(dtypes=("complex64", "float32", "float32")),
    # dropout
    "dropout above 1": call(training=True, options={"dropout": 2.0}),
    "dropout above 1, no weights": call(training=True, options={"dropout": 2.0}, need_weights=False),
    # the call itself
    "no inputs": arguments(),
    "no value": arguments(X, X),
    "unknown argument in a call": arguments(X, X, X, mask=None),
    "an argument twice": arguments(X, X, X, query=X),
}

# Where torch's words speak of its own machinery, a sentence of our own leads, and torch's follow.
LEADING = {
    "query in float64", "all in float64", "key and value too narrow", "key and value too narrow, two arrays",
    "key and value too narrow, no bias", "key and value too narrow, unbatched",
    "key of another batch size than query", "key of another batch size than query, batch_first",
    "key of another batch size than query, bias_k", "separate: key of another batch size than query",
}
# Where they also depend on the memory layout, or where there is a plain word for it, only the type is promised.
TYPE_ALONE = {
    "dtype of bools", "no arguments", "one argument", "unknown argument", "query of integers",
    "query in float16", "query of complex numbers", "key in float64", "value in float64",
    "all in float64, batch_first", "float32 into a float64 layer",
    "dropout above 1, no weights", "num_heads a string", "embed_dim a string", "embed_dim a float",
}


@pytest.mark.parametrize("name", CASES)
def test_torch_raises_the_same(name):
    theirs, ours = outcome(lambda: CASES[name](THEIRS)).error, outcome(lambda: CASES[name](OURS)).error
    assert theirs is not None, "torch accepts this: it is no error"
    assert type(ours) is type(theirs), f"{ours!r} instead of {theirs!r}"
    if name in LEADING:
        assert str(ours).endswith(f". torch says: {torch_words(theirs)}")
    elif name not in TYPE_ALONE:
        assert str(ours).startswith(torch_words(theirs))


def test_the_wrong_calls_of_tutorials():
    """Calls seen in the wild: torch's words first, then what to write instead."""
    with pytest.raises(AssertionError, match="^embed_dim must be divisible by num_heads") as error:
        mha_c.MultiheadAttention(10, 4)
    assert "head_dim" in str(error.value), "the reader is not told what to write instead"
    with pytest.raises(TypeError, match="unexpected keyword argument") as error:
        mha_c.MultiheadAttention(d_model=10, nhead=4, dropout=0.1)
    assert "embed_dim" in str(error.value) and "num_heads" in str(error.value)


def test_errors_come_before_any_work():
    """A wrong call is refused at once, even if the right one would take seconds, and leaves out= alone."""
    module = layer(8, 2, batch_first=True)
    out = np.full((1, 4, 8), 7.0, "float32")
    x = normal((1, 4, 8))
    with pytest.raises(RuntimeError):
        module(x, x, x, attn_mask=np.zeros((3, 4), bool), out=out)
    assert (out == 7).all()


def test_another_batch_of_no_keys():
    """There is nothing to disagree about, says torch."""
    module = OURS.MultiheadAttention(8, 2)
    query, key = normal((3, 2, 8)), normal((0, 3, 8))
    for need_weights in (False, True):
        want = call_torch(torch_twin(module.eval()), query, key, key, need_weights=need_weights)
        np.testing.assert_allclose(module(query, key, key, need_weights=need_weights)[0], want[0], rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_survives_errors(name):
    """After an error the same call, put right, gives the same bits as before."""
    module = layer(8, 2, seed=3)
    before = module(X, X, X)
    outcome(lambda: CASES[name](OURS))
    np.testing.assert_array_equal(module(X, X, X)[0], before[0])


# ------------------------------------------------------------------------------------- the README's table

# Every row of the README's table of differences, by its first cell, and the test that shows it.
DIFFERENCES = {
    "is_causal=True": "test_masks.py::test_causal_is_a_real_mask",
    "is_causal=True with bias_k or a zero key": "test_masks.py::test_causal_leaves_extra_keys_visible",
    "NaN or infinity in a hidden key": "test_hidden.py::test_layer",
    "float mask of another dtype": "test_masks.py::test_float_masks_of_any_dtype",
    "bool mask beside a float mask": "test_masks.py::test_bool_beside_float_does_not_warn",
    "masks on empty inputs": "test_torch_parity.py::test_empty_sizes",
    "lists as inputs": "test_inputs.py::test_what_is_no_array",
    "is_causal, tgt_is_causal and memory_is_causal of Transformer layers":
        "test_check_layers.py::test_masks_and_the_causal_order",
    "rows of padding in an encoder's output": "test_transformer_differential.py::test_rows_of_padding",
    "gelu of −inf": "test_transformer_layers.py::test_gelu_of_infinities",
    "RMSNorm, input and weight of different dtypes": "test_norms.py::test_a_weight_of_another_dtype",
    "LayerNorm of numbers whose squares overflow": "test_norms.py::test_squares_that_overflow",
    "bfloat16 and float16": "test_accuracy.py::test_rms_error_of_halves",
    "parameters of bfloat16 and float16 from a seed": "test_halves.py::test_torchs_seeds",
    "random numbers of dropout": "test_dropout.py::test_distribution",
}


def readme_rows():
    """The first cells of the table that follows the marker, without markup."""
    path = REPOSITORY / "README.md"
    if not path.exists() or "<!-- differences -->" not in path.read_text():
        pytest.skip("README.md has no table marked <!-- differences --> yet")
    table = path.read_text().split("<!-- differences -->")[1].lstrip().split("\n\n")[0].splitlines()
    assert re.fullmatch(r"[|\s:-]+", table[1]), "no Markdown table follows the marker"
    return [re.sub(r"[`*]", "", row.split("|")[1]).strip() for row in table[2:]]


def test_readme_lists_every_difference():
    """What differs on purpose is written down, and nothing is written down that no test shows."""
    assert sorted(readme_rows()) == sorted(DIFFERENCES)


@pytest.mark.parametrize("where", DIFFERENCES.values())
def test_differences_are_tested(where):
    file, name = where.split("::")
    assert f"def {name}(" in (REPOSITORY / "tests" / file).read_text()
