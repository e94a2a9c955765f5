# SPDX-License-Identifier: Apache-2.0
"""matmul_precision="int8": the linear maps by their definition, in layers, in files, and what is refused."""

import copy
import hashlib
import itertools
import json
import pickle

import mha_c
import numpy as np
import pytest
from helpers import bits, layer, normal, outcome, randomize, run_child
from mha_c import _core
from mha_c.functional import scaled_dot_product_attention
from mha_c.parameters import quantization
from test_reproducibility import WITH_FMA, assert_agrees

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")

SUFFIXES = [".npz", ".safetensors"]
DEPTHS = [0, 1, 2, 3, 5, 64, 65, 384, 8192, 8193, 20000]
SLICE = 8192  # features whose products are summed exactly
OWN = {"in_proj": "int8", "attention": None, "out_proj": None}  # a mapping in the form in which a layer shows it
BOTH = {"default": "int8", "attention": "float32"}


def quantize(rows):
    """int8 numbers, as int64, and scales of some rows, as the documentation defines them."""
    rows = np.asarray(rows).astype("f4")
    numbers, scales = np.zeros(rows.shape, int), np.zeros(len(rows), "f4")
    for i, row in enumerate(rows):
        largest = np.abs(row).max(initial=np.float32(0))
        if not np.isfinite(largest):
            scales[i] = np.nan
        elif largest >= np.float32(2.0**-120):
            numbers[i] = np.rint(row * (np.float32(127) / largest))
            scales[i] = largest / np.float32(127)
    return numbers, scales


def defined(x, weight, bias):
    """The map of some rows, rounded once for each slice of the depth, and how far rounding twice may move it."""
    (rows, row_scales), (numbers, scales) = quantize(x), quantize(weight)
    scale = np.multiply.outer(row_scales, scales).astype("f8")
    y = np.broadcast_to(np.float32(0) if bias is None else bias, scale.shape).astype("f4")
    off = np.zeros(y.shape)
    for start in range(0, max(rows.shape[1], 1), SLICE):
        part = slice(start, start + SLICE)
        products = (rows[:, part] @ numbers[:, part].T).astype("f4").astype("f8") * scale
        y = (y + products).astype("f4")
        off += np.spacing(np.abs(y))
        if _core.config()["cpu_level"] == "portable":  # which has no FMA
            off += np.spacing(np.abs(products.astype("f4")))
    return y, off


def assert_defined(got, x, weight, bias=None):
    want, off = defined(x, weight, bias)
    assert got.shape == want.shape and got.dtype == "f4"
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    seen = ~np.isnan(want)
    assert (np.abs(got.astype("f8") - want)[seen] <= off[seen]).all()


def linear(depth, features, bias=True, **options):
    return randomize(mha_c.Linear(depth, features, bias, matmul_precision="int8", **options))


def encoder_layer(**options):
    options = {"dim_feedforward": 48, "batch_first": True, "matmul_precision": "int8", **options}
    return randomize(mha_c.TransformerEncoderLayer(24, 4, **options)).eval()


# ---------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("depth", DEPTHS)
def test_linear(depth):
    """Exact sums of at most 8192 products of int8 numbers, added in order to the bias."""
    for features, bias, rows in itertools.product([1, 40], [True, False], [0, 1, 7, 130]):
        module = linear(depth, features, bias)
        x = normal((rows, depth), seed=rows)
        assert_defined(module(x), x, module.weight, module.bias)


def test_largest_sums():
    """All numbers are 127 or -127, so that the sums are the largest that there are."""
    for depth, sign in itertools.product([64, 8192, 9000], [1, -1]):
        module = linear(depth, 20)
        module.weight = np.full((20, depth), 0.5 * sign)
        x = np.ones((5, depth), "f4")
        assert_defined(module(x), x, module.weight, module.bias)


def test_ties_and_signs():
    """Numbers half way between two int8 numbers go to the even one, whatever their sign."""
    row = np.arange(-254, 255, dtype="f4") / 2  # the scale is 1
    np.testing.assert_array_equal(quantization.quantize(row[None]).numbers[0], quantize(row[None])[0][0])
    module = mha_c.Linear(len(row), len(row), False, matmul_precision="int8")
    module.weight = np.eye(len(row))
    np.testing.assert_allclose(module(row[None])[0], np.rint(row), rtol=1e-6)
    assert_defined(module(row[None]), row[None], module.weight)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite(wrong):
    """They become NaN, and no other row does."""
    module, x = linear(70, 9), normal((11, 70))
    x[[2, 7], [0, 69]] = wrong
    y = module(x)
    assert np.isnan(y[[2, 7]]).all() and np.isfinite(np.delete(y, [2, 7], 0)).all()
    assert_defined(y, x, module.weight, module.bias)
    weight = module.weight.copy()
    weight[4, 3] = wrong
    module.weight = weight
    y = module(normal((11, 70)))
    assert np.isnan(y[:, 4]).all() and np.isfinite(np.delete(y, 4, 1)).all()


def test_rows_of_zeros_and_tiny_rows():
    """Zeros, and rows below 2^-120, give the bias; what is above is quantized."""
    module = linear(70, 9)
    x = np.zeros((5, 70), "f4")
    x[1:, 5] = 1e-45, 2.0**-120, np.nextafter(np.float32(2.0**-120), np.float32(0)), -(2.0**-119)
    y = module(x)
    np.testing.assert_array_equal(y, np.tile(module.bias, (5, 1)))
    module.bias = np.zeros(9)
    y = module(x)
    assert not y[[0, 1, 3]].any() and y[[2, 4]].any()
    module.weight = np.full((9, 70), 1e-40)
    assert not module(normal((5, 70))).any()


@pytest.mark.parametrize("value", ["int8", {"in_proj": "int8"}, {"default": "int8", "in_proj": None}], ids=str)
@pytest.mark.parametrize("options", [{}, {"kdim": 20, "vdim": 70}, {"num_kv_heads": 2, "add_bias_kv": True}], ids=str)
def test_attention_is_made_of_linear_maps(options, value):
    """Each projection has the bits of a Linear, and what is between them is attention in bfloat16, or in float32 if a
    mapping says so.
    """
    module = layer(24, 4, batch_first=True, matmul_precision=value, **options)
    told = {"default": value} if isinstance(value, str) else value
    precision = {name: told.get(name, told.get("default")) for name in ("in_proj", "out_proj")}
    given = [normal((2, 9, width), seed=i) for i, width in enumerate((24, module.kdim, module.vdim))]
    module.matmul_precision = {**told, "attention": "float32"}
    explanation = mha_c.explain(module, *given)

    def mapped(x, weight, bias, precision):
        one = mha_c.Linear(weight.shape[1], len(weight), matmul_precision=precision)
        one.weight, one.bias = weight, bias
        return one(x)

    parameters = module._parameters
    for name, x, weight, bias in zip("qkv", given, parameters.input_weights, parameters.input_biases):
        np.testing.assert_array_equal(explanation.stages[name].array, mapped(x, weight, bias, precision["in_proj"]))
    heads = [explanation.stages[f"{name}_heads"].array for name in "qkv"]
    attended = scaled_dot_product_attention(*heads, enable_gqa=True)
    np.testing.assert_allclose(explanation.head_outputs, attended, rtol=1e-5, atol=1e-5)
    module.matmul_precision = {**told, "attention": "bfloat16"}
    narrow = mha_c.explain(module, *given)
    np.testing.assert_array_equal(narrow.stages["v_heads"].array, heads[2])
    assert 1e-4 < np.abs(narrow.head_outputs - attended).max() < 0.1
    module.matmul_precision = value
    expected = narrow if told.get("default") == "int8" else explanation
    np.testing.assert_array_equal(mha_c.explain(module, *given).head_outputs, expected.head_outputs)
    explanation = mha_c.explain(module, *given)
    output = mapped(explanation.concatenated, module.out_proj.weight, module.out_proj.bias, precision["out_proj"])
    np.testing.assert_array_equal(output, explanation.output)
    np.testing.assert_array_equal(module(*given)[0], explanation.output)


def test_few_queries():
    """Keys are projected also where there are far more of them than queries."""
    module = layer(24, 4, batch_first=True, matmul_precision="int8")
    query, key = normal((2, 1, 24)), normal((2, 3000, 24), seed=1)
    assert mha_c.explain(module, query, key).paths == ("ordinary", "ordinary")
    many = np.repeat(query, 200, axis=1)
    np.testing.assert_array_equal(module(query, key, key)[0][:, 0], module(many, key, key)[0][:, 50])


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "swiglu", "norm": "rms"},
                                     {"matmul_precision": {"linear1": "int8", "in_proj": "int8"}}], ids=str)
def test_layers_of_an_encoder(options):
    """A layer has the bits of its parts, called one by one."""
    module, x = encoder_layer(**options), normal((3, 7, 24))
    padding = np.arange(7) >= np.array([[7], [4], [1]])
    y = module(x, src_key_padding_mask=padding)
    steps = copy.deepcopy(module)
    steps._is_plain = lambda *_: False
    np.testing.assert_array_equal(y, steps(x, src_key_padding_mask=padding))
    wide = copy.deepcopy(module)
    wide.matmul_precision = None
    off = np.abs(y - wide(x, src_key_padding_mask=padding))
    assert 0 < off.max() < 0.1 * np.abs(y).max()


def test_layers_of_a_decoder():
    module = randomize(mha_c.TransformerDecoderLayer(24, 4, 48, matmul_precision="int8")).eval()
    x, memory = normal((7, 3, 24)), normal((9, 3, 24), seed=1)
    y = module(x, memory, tgt_is_causal=True)
    steps = copy.deepcopy(module)
    steps._is_plain = lambda *_: False
    np.testing.assert_array_equal(y, steps(x, memory, tgt_is_causal=True))


def test_error_is_that_of_rounding():
    """The error of an int8 number is uniform in a scale, of the variance scale^2 / 12: so that of a sum is known. An
    outlier makes a row's scale larger, and of its own row alone; numbers that become zero have less than this error.
    """
    depth = 384
    weight = normal((96, depth), seed=1) / np.sqrt(np.float32(depth))
    module = mha_c.Linear(depth, 96, False, matmul_precision="int8")
    module.weight = weight
    for tokens, channels in (([], []), ([5], []), ([], [7]), ([3, 50], [0, 200])):
        x = normal((130, depth))
        x[tokens] *= 100
        x[:, channels] *= 30
        error = module(x) - x.astype("f8") @ weight.astype("f8").T
        row_scales, scales = quantize(x)[1].astype("f8"), quantize(weight)[1].astype("f8")
        expected = np.add.outer((x.astype("f8") ** 2).sum(1), np.zeros(96)) * scales**2
        expected += np.multiply.outer(row_scales**2, (weight.astype("f8") ** 2).sum(1))
        ratio = np.sqrt(np.mean(error**2 / (expected / 12)))
        assert 0.5 < ratio < 1.05, (tokens, channels)
        assert ratio > 0.95 or channels


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves(dtype):
    """A half layer has the bits of the float32 layer with the same numbers, rounded."""
    module = encoder_layer(dtype=dtype)
    x = normal((3, 7, 24), dtype)
    y = module(x)
    assert y.dtype == dtype and module.matmul_precision == "int8"
    wide = copy.deepcopy(module).float()
    assert wide.matmul_precision == "int8"
    np.testing.assert_array_equal(y, wide(x.astype("f4")).astype(dtype))
    one = linear(70, 9, dtype=dtype)
    x = normal((11, 70), dtype)
    wide = copy.deepcopy(one).float()
    np.testing.assert_array_equal(one(x), wide(x.astype("f4")).astype(dtype))
    assert_defined(wide(x.astype("f4")), x, one.weight, wide.bias)


# ---------------------------------------------------------------------------------------------- equal bits


def digest():
    """One hash over results of layers of all kinds. Called in child processes too."""
    total = hashlib.sha256()
    for depth, features, rows in ((3, 5, 1), (65, 33, 7), (384, 100, 130), (8193, 17, 19)):
        total.update(linear(depth, features)(normal((rows, depth))).tobytes())
    x = normal((3, 70, 24))
    padding = np.arange(70) >= np.array([[70], [4], [65]])
    for options in ({}, {"num_kv_heads": 2, "head_dim": 7}, {"kdim": 24, "vdim": 24, "add_zero_attn": True}):
        module = layer(24, 4, batch_first=True, matmul_precision="int8", **options)
        for result in module(x, x, x, key_padding_mask=padding, is_causal=True):
            total.update(np.ascontiguousarray(result).tobytes())
    total.update(encoder_layer(activation="gelu")(x, src_key_padding_mask=padding).tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("level", WITH_FMA)
def test_instruction_sets_with_fma_agree(level):
    assert_agrees(level, digest)


def test_threads():
    want = digest()
    for threads in (1, 2, 3):
        with mha_c.num_threads(threads):
            assert digest() == want


def test_batch_and_padding():
    """A sequence has the same bits alone, in a batch, and padded, whatever is stored in the padding."""
    module, x = encoder_layer(), normal((5, 33, 24))
    want = module(x)
    for i in range(5):
        np.testing.assert_array_equal(module(x[i : i + 1])[0], want[i])
    for filler in (0.0, 1e6, np.nan):
        padded = np.concatenate([x, np.full((5, 40, 24), filler, "f4")], axis=1)
        got = module(padded, src_key_padding_mask=np.tile(np.arange(73) >= 33, (5, 1)))
        np.testing.assert_array_equal(got[:, :33], want)


def test_hidden_keys():
    """NaN in keys that a mask or the causal order hides does not reach a query."""
    module, x = layer(24, 4, batch_first=True, matmul_precision="int8"), normal((2, 9, 24))
    spoilt = x.copy()
    spoilt[:, 5:] = np.nan
    mask = np.arange(9) >= np.full((9, 1), 5)
    for call in ({"attn_mask": mask}, {"is_causal": True}):
        want, got = (module(x, key, key, **call)[0] for key in (x, spoilt))
        np.testing.assert_array_equal(got[:, :5], want[:, :5])


def test_strides_and_out():
    module, x = layer(24, 4, batch_first=True, matmul_precision="int8"), normal((2, 9, 24))
    want = module(x, x, x)[0]
    strided = np.zeros((2, 18, 48), "f4")[:, ::2, ::2]
    strided[...] = x
    out = np.empty_like(x)
    assert module(strided, x, strided, out=out)[0] is out
    np.testing.assert_array_equal(out, want)


# ---------------------------------------------------------------------------------------------- the option


def test_forms():
    """A layer shows the shortest form; names that are not given have the default's value."""
    narrow = {"default": "bfloat16", "attention": None}
    maps = {"in_proj": "int8", "attention": None, "out_proj": "int8"}
    wide = dict(maps, attention="float32")
    for value, shown in ((None, None), ("int8", "int8"), ({}, None), ({"default": "int8"}, "int8"), (OWN, OWN),
                         ({"in_proj": "int8"}, OWN),
                         ({"default": "int8", "out_proj": None}, {**OWN, "attention": "bfloat16"}),
                         ({"in_proj": "int8", "out_proj": "int8"}, maps), ({**BOTH, "attention": None}, maps),
                         (BOTH, wide), (wide, wide), ({**BOTH, "attention": "bfloat16"}, "int8"),
                         ("float32", "float32"), (dict.fromkeys(OWN, "float32"), "float32"),
                         ({"default": "bfloat16"}, "bfloat16"),
                         (dict.fromkeys(OWN, "bfloat16"), "bfloat16"), (dict.fromkeys(OWN), None),
                         (narrow, {"in_proj": "bfloat16", "attention": None, "out_proj": "bfloat16"}),
                         ({"attention": "bfloat16"}, {**dict.fromkeys(OWN), "attention": "bfloat16"})):
        module = mha_c.MultiheadAttention(8, 2, matmul_precision=value)
        assert module.matmul_precision == shown
        module = mha_c.MultiheadAttention(8, 2)
        module.matmul_precision = value
        assert module.matmul_precision == shown
    assert mha_c.Linear(8, 2, matmul_precision={"default": "int8"}).matmul_precision == "int8"


@pytest.mark.parametrize("value, words", [
    ("int4", r'must be None, "float32", "bfloat16", "int8", or a mapping of names to these, but got \'int4\'$'),
    ("float16", "but got 'float16'"),
    (8, "but got 8"), (True, "but got True"), (["int8"], "but got"), (np.zeros(3), "but got"),
    ({"linear1": "int8"}, "has 'linear1', but this layer knows the names in_proj, attention, out_proj, default"),
    ({"attention": "int8"}, 'has "int8" for attention, which has no weights: its products of queries and keys, and of '
                            'probabilities and values, can be None, "float32" or "bfloat16"'),
    ({"default": "bfloat16", "attention": "int4"}, "but got 'int4'"),
    ({"in_proj": "int4"}, "but got 'int4'"), ({None: "int8"}, "has None"), ({"in_proj": {}}, "but got {}"),
], ids=str)
def test_values_that_are_not_known(value, words):
    with pytest.raises(ValueError, match=f"matmul_precision.*{words}"):
        mha_c.MultiheadAttention(8, 2, matmul_precision=value)
    module = mha_c.MultiheadAttention(8, 2, matmul_precision=OWN)
    with pytest.raises(ValueError, match=words):
        module.matmul_precision = value
    assert module.matmul_precision == OWN


def test_names_of_other_layers():
    for name in ("in_proj", "attention"):
        with pytest.raises(ValueError, match=f"has '{name}', but this layer knows the names default"):
            mha_c.Linear(8, 2, matmul_precision={name: "bfloat16"})
    with pytest.raises(ValueError, match='has "int8" for attention'):
        mha_c.TransformerDecoderLayer(8, 2, matmul_precision={"attention": "int8"})
    words = "'linear3', but this layer knows the names in_proj, attention, out_proj, linear1, linear2, default"
    for kind in (mha_c.TransformerEncoderLayer, mha_c.TransformerDecoderLayer):
        with pytest.raises(ValueError, match=words):
            kind(8, 2, matmul_precision={"linear3": None})
        module = kind(8, 2)
        for one in (module, mha_c.ModuleList([module])):
            with pytest.raises(ValueError, match=words):
                one.matmul_precision = {"linear3": None}
    with pytest.raises(TypeError, match="Write matmul_precision='int8' instead of matmul_precison='int8'"):
        mha_c.MultiheadAttention(8, 2, matmul_precison="int8")


def test_layers_hand_it_to_the_layers_in_them():
    value = {"default": "int8", "out_proj": None, "attention": "bfloat16"}
    shown = {"in_proj": "int8", "attention": "bfloat16", "out_proj": None, "linear1": "int8", "linear2": "int8"}
    of_attention = {name: shown[name] for name in OWN}
    module = mha_c.TransformerEncoderLayer(8, 2, 16, matmul_precision=value)
    assert module.matmul_precision == shown and module.self_attn.matmul_precision == of_attention
    assert module.linear1.matmul_precision == module.linear2.matmul_precision == "int8"
    encoder = mha_c.TransformerEncoder(module, 2, mha_c.LayerNorm(8))
    model = mha_c.Transformer(8, 2, 1, 1, 16, matmul_precision=value)
    assert encoder.matmul_precision == model.matmul_precision == shown
    decoder_layer = model.decoder.layers[0]
    assert decoder_layer.self_attn.matmul_precision == decoder_layer.multihead_attn.matmul_precision == of_attention
    for one in (encoder, model, model.encoder, model.decoder, decoder_layer, model.decoder.layers):
        one.matmul_precision = value
        assert one.matmul_precision == shown
        one.matmul_precision = None
        assert one.matmul_precision is None
        for name in ("linear2", "attention"):
            one.matmul_precision = {name: "bfloat16"}
            assert one.matmul_precision == {**dict.fromkeys(shown), name: "bfloat16"}
        with pytest.raises(ValueError, match='has "int8" for attention'):
            one.matmul_precision = {"default": "bfloat16", "attention": "int8"}
        assert one.matmul_precision == {**dict.fromkeys(shown), "attention": "bfloat16"}
    assert {layer.multihead_attn.matmul_precision["attention"] for layer in model.decoder.layers} == {"bfloat16"}
    assert encoder.layers[1].linear2.matmul_precision is None
    layers = mha_c.ModuleList([mha_c.Linear(8, 8), mha_c.LayerNorm(8)])
    layers.matmul_precision = "int8"
    assert layers[0].matmul_precision == layers.matmul_precision == "int8"
    layers.append(mha_c.Linear(8, 8))
    with pytest.raises(AttributeError, match="layers in this one differ in the matmul_precision of default: ask each of them"):
        layers.matmul_precision
    assert mha_c.ModuleList([mha_c.LayerNorm(8)]).matmul_precision is None


def test_repr():
    """It shows the option only if it is not None."""
    assert repr(mha_c.Linear(8, 2, matmul_precision="int8")) == (
        "Linear(in_features=8, out_features=2, bias=True, matmul_precision='int8')")
    assert "matmul_precision='int8', dtype=float32" in repr(mha_c.MultiheadAttention(8, 2, matmul_precision="int8"))
    assert f"matmul_precision={OWN}" in repr(mha_c.MultiheadAttention(8, 2, matmul_precision=OWN))
    for module in (mha_c.Linear(8, 2), mha_c.MultiheadAttention(8, 2), mha_c.TransformerEncoderLayer(8, 2)):
        assert "matmul_precision" not in repr(module)
    assert "int8" in mha_c.MultiheadAttention(8, 2, matmul_precision="int8")._repr_html_()


@pytest.mark.parametrize("make", [
    lambda dtype: mha_c.Linear(8, 2, dtype=dtype, matmul_precision="int8"),
    lambda dtype: mha_c.MultiheadAttention(8, 2, dtype=dtype, matmul_precision="int8"),
    lambda dtype: mha_c.MultiheadAttention(8, 2, dtype=dtype, matmul_precision={"attention": "bfloat16"}),
    lambda dtype: mha_c.TransformerEncoderLayer(8, 2, dtype=dtype, matmul_precision={"linear2": "int8"}),
])
def test_float64_is_refused(make):
    words = 'matmul_precision is for layers of float32, bfloat16 and float16, but this one is float64'
    with pytest.raises(ValueError, match=words):
        make("float64")
    module = make("float32")
    before = bits(module.state_dict())
    for cast in (module.double, lambda: module.to("float64"), lambda: module.to(dtype=np.float64)):
        with pytest.raises(ValueError, match=words):
            cast()
    assert bits(module.state_dict()) == before
    assert {array.dtype.name for array in module.half().parameters()} == {"float16"}
    module.matmul_precision = None
    with pytest.raises(ValueError, match=words):
        module.double().matmul_precision = "int8"


def test_parameters_stay_those_of_the_wide_layer():
    """Quantizing in memory changes no parameter, and every change of a parameter quantizes again."""
    wide = randomize(mha_c.TransformerEncoderLayer(24, 4, 48)).eval()
    module, x = copy.deepcopy(wide), normal((7, 24))
    module.matmul_precision = "int8"
    assert bits(module.state_dict()) == bits(wide.state_dict())
    y = module(x)
    assert y.tobytes() != wide(x).tobytes()
    module.linear1.weight = module.linear1.weight * 2
    assert module(x).tobytes() != y.tobytes()
    module.load_state_dict(wide.state_dict())
    assert module(x).tobytes() == y.tobytes() and module.matmul_precision == "int8"
    module.matmul_precision = None
    assert module(x).tobytes() == wide(x).tobytes()


def test_copies_and_pickles():
    for module, x in ((encoder_layer(), normal((2, 7, 24))), (encoder_layer(matmul_precision=BOTH), normal((2, 7, 24))),
                      (linear(24, 9), normal((7, 24)))):
        for copied in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert copied.matmul_precision == module.matmul_precision
            assert copied(x).tobytes() == module(x).tobytes()
            assert bits(copied.state_dict()) == bits(module.state_dict())


def test_pickles_that_lie(tmp_path):
    """int8 numbers that do not fit are refused when a pickle is read, as in a file."""
    layer(8, 2, matmul_precision="int8").save(tmp_path / "layer.npz", packed=True)
    parameters = mha_c.MultiheadAttention.load(tmp_path / "layer.npz")._parameters
    make, (widths, stored, dtype, precisions) = parameters.__reduce__()
    numbers, scales = stored["out_proj.weight"]
    for wrong in ((numbers.astype("i2"), scales), (numbers, scales.astype("f8")), (numbers, scales[:3]), (numbers, -scales),
                  (numbers[:4], scales[:4]), (numbers.ravel(), np.ones(64, "f4")), (numbers, scales[:, None])):
        with pytest.raises((TypeError, ValueError)):
            make(widths, {**stored, "out_proj.weight": quantization.Quantized(*wrong)}, dtype, precisions)
    for wrong in ({"bias_k": "int8"}, {"in_proj_bias": "int8"}, {"in_proj_weight": 3}, 3):
        outcome(lambda wrong=wrong: make(widths, stored, dtype, wrong))  # an error, or a layer
    assert make(widths, stored, dtype, precisions).stored["out_proj.weight"].scales.tobytes() == scales.tobytes()


def test_pickles_in_another_process(tmp_path):
    module, x = encoder_layer(matmul_precision={"default": "int8", "in_proj": None}), normal((2, 7, 24))
    module.save(tmp_path / "layer.npz", packed=True)
    for name, one in (("wide", module), ("packed", mha_c.TransformerEncoderLayer.load(tmp_path / "layer.npz"))):
        (tmp_path / name).write_bytes(pickle.dumps((one, x, module(x))))
    run_child(f"""
        import pathlib, pickle
        for name in ("wide", "packed"):
            module, x, y = pickle.loads((pathlib.Path({str(tmp_path)!r}) / name).read_bytes())
            assert module(x).tobytes() == y.tobytes()
            assert module.matmul_precision["linear1"] == "int8" and module.matmul_precision["in_proj"] is None
        """, env={"MHA_C_CPU": _core.config()["cpu_level"]})


# ---------------------------------------------------------------------------------------------- loading, files


def test_loaders():
    """Every way to make a layer from trained parameters takes the option."""
    trained = randomize(mha_c.TransformerEncoder(mha_c.TransformerEncoderLayer(24, 4, 48), 2))
    told = {"num_heads": 4, "activation": "relu", "layer_norm_eps": 1e-5, "norm_first": False}
    x = normal((7, 24))
    want = copy.deepcopy(trained).eval()
    for value in (BOTH, "int8"):
        want.matmul_precision = value
        got = mha_c.TransformerEncoder.from_state_dict(trained.state_dict(), **told, matmul_precision=value).eval()
        assert got.matmul_precision == want.matmul_precision and got(x).tobytes() == want(x).tobytes()
    got = mha_c.TransformerEncoderLayer.from_state_dict(
        trained.state_dict(), "layers.1.", **told, matmul_precision="int8").eval()
    assert got(x).tobytes() == want.layers[1](x).tobytes()
    for value in (OWN, dict(OWN, attention="bfloat16")):
        got = mha_c.MultiheadAttention.from_state_dict(
            trained.state_dict(), "layers.0.self_attn.", num_heads=4, matmul_precision=value)
        assert got.matmul_precision == value
    with pytest.raises(ValueError, match="is float64"):
        mha_c.MultiheadAttention.from_state_dict(
            trained.state_dict(), "layers.0.self_attn.", num_heads=4, dtype="float64", matmul_precision=OWN)


def test_from_torch():
    torch = pytest.importorskip("torch")
    nn = torch.nn
    for module in (nn.Linear(8, 2), nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16),
                   nn.TransformerDecoderLayer(8, 2, 16), nn.Transformer(8, 2, 1, 1, 16), nn.ModuleList([nn.Linear(8, 2)]),
                   nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
                   nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2)):
        made = getattr(mha_c, type(module).__name__).from_torch(module, matmul_precision="int8")
        assert made.matmul_precision == "int8"
        assert type(made).from_torch(module).matmul_precision is None
        if "default" not in made._products("") and not isinstance(made, mha_c.ModuleList):
            assert type(made).from_torch(module, matmul_precision=BOTH).matmul_precision["attention"] == "float32"
        with pytest.raises(ValueError, match="is float64"):
            type(made).from_torch(module.double(), matmul_precision="int8")
    back = mha_c.torch.to_torch(made)
    assert bits({name: tensor.numpy() for name, tensor in back.state_dict().items()}) == bits(made.float().state_dict())


@pytest.fixture
def rows_quantized(monkeypatch):
    """The numbers of rows of the weights that are quantized from now on, in order."""
    rows, whole = [], quantization.quantize
    monkeypatch.setattr(quantization, "quantize", lambda weight: (rows.append(len(weight)), whole(weight))[1])
    return rows


def test_weights_are_quantized_once(rows_quantized):
    """However a layer is made: query, key and value, the output, and the two maps of the feed-forward network."""
    trained = mha_c.TransformerEncoder(mha_c.TransformerEncoderLayer(24, 4, 48), 3).state_dict()
    told = {"num_heads": 4, "activation": "relu", "layer_norm_eps": 1e-5, "norm_first": False,
            "matmul_precision": "int8"}
    attention, network = [24] * 4, [48, 24]
    encoder_layer, decoder_layer = attention + network, 2 * attention + network

    def check(make, *rows):
        rows_quantized.clear()
        made = make()
        assert made.matmul_precision == "int8" and sorted(rows_quantized) == sorted(sum(rows, []))

    check(lambda: mha_c.TransformerEncoder.from_state_dict(trained, **told), *3 * [encoder_layer])
    check(lambda: mha_c.TransformerEncoderLayer.from_state_dict(trained, "layers.1.", **told), encoder_layer)
    check(lambda: mha_c.MultiheadAttention.from_state_dict(
        trained, "layers.0.self_attn.", num_heads=4, matmul_precision="int8"), attention)
    for kind, rows in ((mha_c.TransformerEncoderLayer, encoder_layer), (mha_c.TransformerDecoderLayer, decoder_layer)):
        check(lambda: kind(24, 4, 48, matmul_precision="int8"), rows)
    check(lambda: mha_c.Transformer(24, 4, 2, 3, 48, matmul_precision="int8"), *2 * [encoder_layer],
          *3 * [decoder_layer])


def test_from_torch_quantizes_once(rows_quantized):
    nn = pytest.importorskip("torch").nn
    for module, count in ((nn.Linear(8, 2), 1), (nn.MultiheadAttention(8, 2), 4), (nn.ModuleList([nn.Linear(8, 2)]), 1),
                          (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2), 12),
                          (nn.TransformerDecoderLayer(8, 2, 16), 10), (nn.Transformer(8, 2, 1, 2, 16), 26)):
        rows_quantized.clear()
        getattr(mha_c, type(module).__name__).from_torch(module, matmul_precision="int8")
        assert len(rows_quantized) == count


def test_layers_of_a_transformer_that_are_given_keep_their_precision():
    """The option is for those that it makes, also if one of its parts has no layers."""
    own = mha_c.TransformerEncoder(mha_c.TransformerEncoderLayer(8, 2, 16, matmul_precision="bfloat16"), 1)
    model = mha_c.Transformer(8, 2, 1, 1, 16, custom_encoder=own, matmul_precision={"in_proj": "int8"})
    assert own.matmul_precision == "bfloat16" and model.decoder.layers[0].self_attn.matmul_precision == OWN
    model = mha_c.Transformer(8, 2, 0, 1, 16, matmul_precision={"in_proj": "int8"})
    assert model.decoder.layers[0].self_attn.matmul_precision == OWN
    mha_c.Transformer(8, 2, custom_encoder=own, custom_decoder=model.decoder, matmul_precision={"in_proj": "bfloat16"})
    assert own.matmul_precision == "bfloat16" and model.decoder.layers[0].self_attn.matmul_precision == OWN


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", ["int8", {"default": "int8", "linear2": None}, BOTH], ids=str)
def test_files(tmp_path, suffix, dtype, value):
    """Wide or packed, a file gives the bits of the layer that was saved; a packed one gives the same file again."""
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    module, x = encoder_layer(dtype=dtype, matmul_precision=value, norm_first=True), normal((2, 7, 24), dtype)
    y = module(x)
    wide, packed, again = (tmp_path / f"{name}{suffix}" for name in ("wide", "packed", "again"))
    module.save(wide)
    loaded = mha_c.TransformerEncoderLayer.load(wide)
    assert loaded.matmul_precision == module.matmul_precision and not loaded.training
    assert bits(loaded.state_dict()) == bits(module.state_dict())
    assert loaded(x).tobytes() == y.tobytes()

    module.save(packed, packed=True)
    loaded = mha_c.TransformerEncoderLayer.load(packed)
    assert loaded.matmul_precision == module.matmul_precision and not loaded.training
    assert loaded(x).tobytes() == y.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        loaded.linear1.weight[0, 0] = 1
    state = loaded.state_dict()
    for name, array in module.state_dict().items():
        assert state[name].dtype == dtype and state[name].shape == array.shape
        if name.endswith("bias") or "norm" in name or name == "linear2.weight" and "linear2" in value:
            assert state[name].tobytes() == array.tobytes()
        else:
            numbers, scales = quantize(array)
            assert state[name].tobytes() == (numbers.astype("f4") * scales[:, None]).astype(dtype).tobytes()
    for options in ({"packed": True}, {}):  # which has nothing else to write
        loaded.save(again, **options)
        assert contents(again) == contents(packed)


def contents(path):
    """The arrays of a file and what it says of the layer."""
    with mha_c.parameters.files.open_checkpoint(path) as checkpoint:
        return {name: (array.bits()[1], array.bits()[0].tobytes()) for name, array in checkpoint.content.items()
                }, checkpoint.config


def test_names_in_packed_files(tmp_path):
    """int8 numbers are not called what a reader takes for the weight."""
    linear(8, 2).save(tmp_path / "linear.npz", packed=True)
    layer(8, 2, matmul_precision=OWN).save(tmp_path / "layer.npz", packed=True)
    with np.load(tmp_path / "linear.npz") as archive:
        assert {name: archive[name].dtype.name for name in archive.files if name != "__config__"} == {
            "weight_int8": "int8", "weight_scale": "float32", "bias": "float32"}
        assert archive["weight_int8"].shape == (2, 8) and archive["weight_scale"].shape == (2,)
    with np.load(tmp_path / "layer.npz") as archive:
        assert archive.files == ["__config__", "in_proj_weight_int8", "in_proj_weight_scale", "in_proj_bias",
                                 "out_proj.weight", "out_proj.bias"]
        assert json.loads(str(archive["__config__"]))["matmul_precision"] == OWN
        with pytest.raises(RuntimeError, match="Missing key"):
            mha_c.MultiheadAttention.from_state_dict(archive, num_heads=2, strict=False)


def test_packed_files_are_no_state_dicts(tmp_path):
    """from_state_dict says how to read them."""
    layer(8, 2, matmul_precision="int8").save(tmp_path / "attention.npz", packed=True)
    encoder_layer().save(tmp_path / "layer.npz", packed=True)
    for kind, name in ((mha_c.MultiheadAttention, "attention"), (mha_c.TransformerEncoderLayer, "layer")):
        with pytest.raises(ValueError, match="was written by save, .* read it with the load of the layer's class"):
            kind.from_state_dict(tmp_path / f"{name}.npz", num_heads=2)
        with np.load(tmp_path / f"{name}.npz") as arrays, pytest.raises(
                RuntimeError, match=rf"packed=True\) wrote: read it with {kind.__name__}.load"):
            kind.from_state_dict(arrays, num_heads=2)
    with np.load(tmp_path / "attention.npz") as arrays, pytest.raises(RuntimeError) as caught:
        layer(8, 2).load_state_dict(arrays)
    assert str(caught.value).endswith("packed=True) wrote: read it with MultiheadAttention.load.")


def test_files_of_layers_without_the_option_say_nothing_of_it(tmp_path):
    """So that older versions read them; and files of older versions, which say nothing, are read."""
    mha_c.TransformerEncoderLayer(8, 2, 16).save(tmp_path / "layer.npz")
    with np.load(tmp_path / "layer.npz") as archive:
        assert "precision" not in str(archive["__config__"])
    assert mha_c.TransformerEncoderLayer.load(tmp_path / "layer.npz").matmul_precision is None


def test_layers_that_cannot_be_packed(tmp_path):
    path = tmp_path / "layer.npz"
    for module in (mha_c.Linear(8, 2), mha_c.LayerNorm(8), mha_c.TransformerEncoderLayer(8, 2)):
        with pytest.raises(ValueError, match='packed=True writes int8 weights, but this layer has none: set matmul_pre'):
            module.save(path, packed=True)
    module = encoder_layer()
    weight = module.linear1.weight.copy()
    weight[3, 1] = np.inf
    module.linear1.weight = weight
    with pytest.raises(ValueError, match="linear1.weight holds NaN or infinity, which int8 numbers cannot hold: leave"):
        module.save(path, packed=True)
    assert not path.exists()
    module.save(path)
    assert bits(mha_c.TransformerEncoderLayer.load(path).state_dict()) == bits(module.state_dict())


def test_a_packed_layer_can_be_changed(tmp_path):
    """Its parameters may be replaced, one or all, and it may be made wide, or of another dtype."""
    module, x = layer(24, 4, matmul_precision="int8"), normal((7, 24))
    module.save(tmp_path / "layer.npz", packed=True)
    loaded = mha_c.MultiheadAttention.load(tmp_path / "layer.npz")
    half = copy.deepcopy(loaded).half()
    want = copy.deepcopy(module)
    for name in ("in_proj_bias", "out_proj.bias"):
        want.load_state_dict({name: module.state_dict()[name].astype("f2")}, strict=False)
    given = x.astype("f2")
    np.testing.assert_array_equal(half(given, given, given)[0],
                                  want(*[given.astype("f4")] * 3)[0].astype("f2"))

    wide = copy.deepcopy(loaded)
    wide.matmul_precision = None
    assert bits(wide.state_dict()) == bits(loaded.state_dict())
    plain = mha_c.MultiheadAttention(24, 4)
    plain.load_state_dict(loaded.state_dict())
    assert wide(x, x, x)[0].tobytes() == plain(x, x, x)[0].tobytes()
    assert wide.double().out_proj.weight.dtype == "f8"

    loaded.out_proj.weight = module.out_proj.weight * 2
    changed = copy.deepcopy(module)
    changed.out_proj.weight = module.out_proj.weight * 2
    assert loaded(x, x, x)[0].tobytes() == changed(x, x, x)[0].tobytes()
    assert loaded.out_proj.weight.tobytes() == changed.out_proj.weight.tobytes()  # as it was given
    loaded.load_state_dict(module.state_dict())
    assert bits(loaded.state_dict()) == bits(module.state_dict())
    assert loaded(x, x, x)[0].tobytes() == module(x, x, x)[0].tobytes()


def test_memory(tmp_path):
    """A quantized layer holds its wide weights and int8 numbers; one from a packed file, int8 numbers twice."""
    size = 4 * 256 * 256
    wide, module = layer(256, 4, bias=False), layer(256, 4, bias=False, matmul_precision="int8")
    module.save(tmp_path / "layer.npz", packed=True)
    loaded = mha_c.MultiheadAttention.load(tmp_path / "layer.npz")

    def held(one):
        return sum(array.nbytes for array in one._parameters.stored.values()), one._parameters.weights.nbytes

    scales = 4 * 4 * 256
    assert held(wide) == (4 * size, 4 * size)
    assert held(module)[0] == 4 * size and size <= held(module)[1] <= size + 4 * scales
    assert held(loaded)[0] == size + scales and held(loaded)[1] == held(module)[1]
    assert size < len(pickle.dumps(loaded)) < size + scales + 2000 and size < (tmp_path / "layer.npz").stat().st_size
    assert (tmp_path / "layer.npz").stat().st_size < size + scales + 5000


def change(arrays, name, make):
    return {**arrays, name: make(arrays[name])}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("spoil, words", [
    (lambda a: change(a, "weight_int8", lambda one: one.astype("i2")), "weight should be int8 numbers with scales of"),
    (lambda a: change(a, "weight_int8", lambda one: one.view("u1")), "weight should be int8 numbers with scales of"),
    (lambda a: change(a, "weight_int8", lambda one: one.astype("f4")), "weight should be int8 numbers with scales of"),
    (lambda a: change(a, "weight_scale", lambda one: one.astype("f8")), "weight should be int8 numbers with scales of"),
    (lambda a: change(a, "weight_scale", lambda one: one.view("i4")), "weight should be int8 numbers with scales of"),
    (lambda a: change(a, "weight_int8", lambda one: one[:, :5]), "size mismatch for weight_int8"),
    (lambda a: change(a, "weight_int8", lambda one: one.ravel()), "size mismatch for weight_int8"),
    (lambda a: change(a, "weight_scale", lambda one: one[:-1]), "size mismatch for weight_scale"),
    (lambda a: change(a, "weight_scale", lambda one: one[:, None]), "size mismatch for weight_scale"),
    (lambda a: change(a, "weight_scale", lambda one: one * np.float32("nan")), "a scale of weight is negative, infinite or"),
    (lambda a: change(a, "weight_scale", lambda one: one * np.float32("inf")), "a scale of weight is negative, infinite or"),
    (lambda a: change(a, "weight_scale", lambda one: -one), "a scale of weight is negative, infinite or NaN"),
    (lambda a: change(a, "weight_int8", lambda one: np.full_like(one, -128)), "holds -128, but int8 numbers of a weight"),
    (lambda a: {name: one for name, one in a.items() if name != "weight_scale"}, 'Missing.* "weight_scale"'),
    (lambda a: {name: one for name, one in a.items() if name != "weight_int8"}, 'Missing.* "weight"'),
    (lambda a: {**a, "weight": np.ones((3, 8), "f4")}, 'Unexpected.* "weight"'),
    (lambda a: {"bias": a["bias"], "weight": a["weight_int8"]}, "its parameters should be of float32"),
])
def test_packed_files_that_lie(tmp_path, suffix, spoil, words):
    path = tmp_path / f"layer{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    module = linear(8, 3)
    module.save(path, packed=True)
    with mha_c.parameters.files.open_checkpoint(path) as checkpoint:
        arrays, config = {name: np.asarray(one) for name, one in checkpoint.content.items()}, checkpoint.config
    mha_c.parameters.files.write_checkpoint(path, arrays, config)
    assert mha_c.Linear.load(path)(np.ones((2, 8), "f4")).tobytes() == module(np.ones((2, 8), "f4")).tobytes()
    mha_c.parameters.files.write_checkpoint(
        path, {name: np.ascontiguousarray(one) for name, one in spoil(arrays).items()}, config)
    with pytest.raises(ValueError, match=f"(?s)holds no layer: .*{words}"):
        mha_c.Linear.load(path)


@pytest.mark.parametrize("value", ["int4", "float16", 8, [], {"in_proj": "int8"}, {"default": 8}, None], ids=str)
def test_descriptions_that_lie(tmp_path, value):
    path = tmp_path / "layer.npz"
    module = linear(8, 3)
    module.save(path, packed=True)
    with mha_c.parameters.files.open_checkpoint(path) as checkpoint:
        arrays = {name: np.asarray(one) for name, one in checkpoint.content.items()}
        config = {**json.loads(checkpoint.config), "matmul_precision": value}
    mha_c.parameters.files.write_checkpoint(path, arrays, json.dumps(config))
    with pytest.raises(ValueError, match="(?s)holds no layer: .*" + ("Missing key" if value is None else "matmul_precision")):
        mha_c.Linear.load(path)


# ---------------------------------------------------------------------------------------------- around the layers


@pytest.mark.parametrize("value", ["int8", BOTH], ids=str)
def test_explain(tmp_path, value):
    """Explanations have the bits of the calls, also of some heads, of whole layers and of stacks."""
    module, x = layer(24, 4, batch_first=True, matmul_precision=value, num_kv_heads=2), normal((2, 9, 24))
    module.save(tmp_path / "layer.npz", packed=True)
    for one in (module, mha_c.MultiheadAttention.load(tmp_path / "layer.npz")):
        explanation = mha_c.explain(one, x, is_causal=True)
        np.testing.assert_array_equal(explanation.output, module(x, x, x, is_causal=True)[0])
        some = mha_c.explain(one, x, is_causal=True, heads=[3, 0])
        np.testing.assert_array_equal(some.weights, explanation.weights[:, [3, 0]])
        np.testing.assert_array_equal(some.head_outputs, explanation.head_outputs[:, [3, 0]])
        assert str(explanation) and explanation._repr_html_() and mha_c.heads.entropy(explanation.weights).size
    for dtype in ("float32", "float16"):
        whole, given = encoder_layer(dtype=dtype, matmul_precision=value), x.astype(dtype)
        np.testing.assert_array_equal(mha_c.explain(whole, given).output, whole(given))
        encoder = mha_c.TransformerEncoder(whole, 2).eval()
        np.testing.assert_array_equal(mha_c.explain(encoder, given).residual_stream["layer 1"], encoder(given))


def test_plot():
    pytest.importorskip("matplotlib")
    module, x = layer(24, 4, matmul_precision="int8"), normal((9, 24))
    assert mha_c.plot.weights(mha_c.explain(module, x), head=1) is not None


def test_check_refuses_it(tmp_path):
    """The comparison with torch judges roundings of floats; a copy with wide numbers can be compared."""
    pytest.importorskip("torch")
    encoder, x = encoder_layer(), normal((2, 7, 24))
    narrow = [layer(24, 4, matmul_precision=value) for value in ("int8", {"attention": "bfloat16"})]
    for module in (*narrow, encoder):
        with pytest.raises(ValueError, match="would hide them: check a copy of the layer with matmul_precision=N"):
            mha_c.check.against_torch(module, x)
    encoder.save(tmp_path / "layer.npz", packed=True)
    loaded = mha_c.TransformerEncoderLayer.load(tmp_path / "layer.npz")
    loaded.matmul_precision = None
    assert mha_c.check.against_torch(loaded, x).agrees


def test_errors_of_calls(tmp_path):
    """A packed layer refuses what any layer refuses, in the same words."""
    module = layer(24, 4, matmul_precision="int8")
    module.save(tmp_path / "layer.npz", packed=True)
    loaded, wide = mha_c.MultiheadAttention.load(tmp_path / "layer.npz"), layer(24, 4)
    for x in (normal((5, 3, 20)), normal((24,)), [[1.0]]):
        said = {repr(outcome(lambda one=one, x=x: one(x, x, x)).error) for one in (module, loaded, wide)}
        assert len(said) == 1 and said != {"None"}
    one = linear(24, 3)
    one.save(tmp_path / "linear.npz", packed=True)
    for x in (normal((5, 20)), np.float32(3)):
        made = (one, mha_c.Linear.load(tmp_path / "linear.npz"), mha_c.Linear(24, 3))
        said = {repr(outcome(lambda one=one, x=x: one(x)).error) for one in made}
        assert len(said) == 1 and said != {"None"}


def test_float64_inputs():
    """No message offers to make such a layer float64, which would be refused."""
    pytest.importorskip("ml_dtypes")
    wide = mha_c.Linear(24, 3)
    narrow = [(linear(24, 3), 1), (layer(24, 4, matmul_precision={"attention": "bfloat16"}), 3),
              (encoder_layer(matmul_precision={"linear1": "int8"}), 1),
              (mha_c.TransformerDecoderLayer(24, 4, 48, matmul_precision={"linear2": "bfloat16"}).eval(), 2)]
    for module, inputs in narrow:
        words = str(outcome(lambda: module(*[normal((5, 3, 24), "float64")] * inputs)).error)
        assert "astype(np.float32)" in words and "layer.to" not in words
        words = str(outcome(lambda: module(*[normal((5, 3, 24), "float16")] * inputs)).error)
        assert 'layer.to("float16")' in words
    assert 'layer.to("float64")' in str(outcome(lambda: wide(normal((5, 24), "float64"))).error)


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    module, x = encoder_layer(), normal((2, 7, 24))
    np.testing.assert_array_equal(module(torch.from_numpy(x)), module(x))
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)).eval()
        mha_c.torch.replace_layers(model)
        made = mha_c.TransformerEncoderLayer.from_torch(model[0], matmul_precision="int8")
        assert np.abs(made(x) - model(torch.from_numpy(x)).numpy()).max() < 0.1


# ---------------------------------------------------------------------------------------------- the numbers themselves


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantize(dtype):
    """Against its definition, row by row; and what it gives stands for numbers half a scale away at most."""
    weight = normal((40, 65), dtype) * np.asarray(np.logspace(-3, 3, 40)[:, None], dtype)
    weight[3], weight[5, 7], weight[6, 0], weight[7] = 0, np.nan, -np.inf, 0
    weight[7, 3] = 2.0**-120 if dtype != "float16" else 6e-8
    found = quantization.quantize(weight)
    numbers, scales = quantize(weight)
    assert found.numbers.dtype == np.int8 and found.scales.dtype == np.float32
    np.testing.assert_array_equal(found.numbers, numbers)
    np.testing.assert_array_equal(found.scales, scales)
    assert np.abs(found.numbers[np.isfinite(scales) & (scales > 0)]).max(axis=1).min() == 127
    wide = quantization.dequantize(found, np.dtype("f4"))
    finite = np.isfinite(scales)
    off = np.abs(wide - weight.astype("f4"))[finite] / np.maximum(scales[finite], np.float32(1e-45))[:, None]
    assert off.max() <= 0.5 + 1e-4 and np.isnan(wide[~finite]).all()


def test_wide_numbers_at_the_ends_of_float32():
    """Rows of the largest numbers neither overflow nor lose their scale."""
    weight = np.full((2, 3), np.finfo("f4").max)
    weight[1] = 2.0**-120
    found = quantization.quantize(weight.astype("f4"))
    assert (found.numbers == 127).all() and (found.scales > 0).all() and np.isfinite(found.scales).all()
    module = mha_c.Linear(3, 2, False, matmul_precision="int8")
    module.weight = weight
    assert_defined(module(np.full((1, 3), 1e-3, "f4")), np.full((1, 3), 1e-3, "f4"), module.weight)


def test_the_core_takes_what_it_needs():
    """Numbers and scales of other kinds are refused before they are read."""
    numbers, scales = np.zeros((4, 8), "i1"), np.ones(4, "f4")
    assert _core.linear(_core.Linear("float32", (numbers, scales), None), np.ones((3, 8), "f4")).shape == (3, 4)
    wrong = [(numbers, None), (numbers, scales[:3]), (numbers.astype("i2"), scales), (numbers, scales.astype("f8")),
             (numbers[0], scales), (numbers,), (numbers, scales, scales), (None, None), (numbers.T, scales), (scales, numbers),
             (numbers, np.ones((4, 1), "f4")), (numbers.tolist(), scales), (numbers, np.ones(8, "f4")[::2])]
    for weight in wrong:
        assert isinstance(outcome(lambda weight=weight: _core.Linear("float32", weight, None)).error, (TypeError, ValueError))
    for dtype in ("float64", "int8", "", None):
        assert outcome(lambda dtype=dtype: _core.Linear(dtype, (numbers, scales), None)).error is not None
