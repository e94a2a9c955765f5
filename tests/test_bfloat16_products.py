# SPDX-License-Identifier: Apache-2.0
"""matmul_precision="bfloat16": the linear maps by their definition, in layers and in files. tests/test_int8.py has what
both precisions share."""

import copy
import hashlib

import mha_c
import numpy as np
import pytest
from helpers import bits, layer, normal, randomize
from mha_c import _core
from test_reproducibility import WITH_FMA, assert_agrees

pytest.importorskip("ml_dtypes")

EPS = float(np.finfo("f4").eps)


def rounded(x):
    """The nearest numbers of bfloat16, as float32; 0 in place of subnormal ones."""
    halves = x.astype("bfloat16").astype("f4")
    return np.where(np.abs(halves) < np.finfo("f4").tiny, np.float32(0), halves)


def linear(depth, features, bias=True, **options):
    return randomize(mha_c.Linear(depth, features, bias, matmul_precision="bfloat16", **options))


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 63, 64, 65, 384, 2048, 2049, 5000])
def test_linear(depth):
    """Products of rounded numbers, and sums of float32. (tests/c/test_narrow.c knows their order, and so every bit.)"""
    for features, bias, rows in ((1, True, 130), (40, False, 7), (33, True, 1)):
        module, x = linear(depth, features, bias), normal((rows, depth), seed=rows)
        x[:, 7:8] = 2.0**-130
        a, b = rounded(x).astype("f8"), rounded(module.weight).astype("f8")
        want = a @ b.T + (0 if module.bias is None else module.bias)
        size = np.abs(a) @ np.abs(b).T + np.abs(want)
        # a chain rounds 64 times, and then each chain is added; random errors cancel, so this is far from reached
        assert (np.abs(module(x) - want) <= EPS * size * (64 + depth / 64)).all()
        if depth > 100:  # inputs are rounded indeed
            wide = copy.deepcopy(module)
            wide.matmul_precision = None
            assert 2.0**-14 < np.abs(module(x) - wide(x)).max() / np.sqrt(np.mean(want**2)) < 2.0**-5


def test_rows_that_are_not_finite():
    """They become NaN or infinite as in float32, and no other row does."""
    module, x = linear(70, 9), normal((11, 70))
    want = module(x)
    for wrong in (np.nan, np.inf):
        spoilt = x.copy()
        spoilt[4, 69] = wrong
        got = module(spoilt)
        assert not np.isfinite(got[4]).any()
        np.testing.assert_array_equal(np.delete(got, 4, 0), np.delete(want, 4, 0))


def test_layers_have_the_bits_of_their_parts():
    """Attention is made of linear maps, and layers of attention and maps."""
    module, x = layer(24, 4, batch_first=True, matmul_precision="bfloat16"), normal((2, 9, 24))
    explanation = mha_c.explain(module, x)
    for name, weight, bias in zip("qkv", module._parameters.input_weights, module._parameters.input_biases):
        one = mha_c.Linear(24, 24, matmul_precision="bfloat16")
        one.weight, one.bias = weight, bias
        np.testing.assert_array_equal(explanation.stages[name].array, one(x))
    np.testing.assert_array_equal(module(x, x, x)[0], explanation.output)
    options = {"batch_first": True, "activation": "gelu", "matmul_precision": {"default": "bfloat16", "linear2": "int8"}}
    for whole in (mha_c.TransformerEncoderLayer(24, 4, 48, **options), mha_c.TransformerDecoderLayer(24, 4, 48, **options)):
        randomize(whole).eval()
        steps = copy.deepcopy(whole)
        steps._is_plain = lambda *_: False
        given = (x,) if isinstance(whole, mha_c.TransformerEncoderLayer) else (x, normal((2, 5, 24), seed=1))
        np.testing.assert_array_equal(whole(*given), steps(*given))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves(dtype):
    """A layer of halves computes as the float32 layer with its numbers, and rounds what it returns."""
    one, x = linear(70, 9, dtype=dtype), normal((11, 70), dtype)
    wide = copy.deepcopy(one).float()
    np.testing.assert_array_equal(one(x), wide(x.astype("f4")).astype(dtype))


def digest():
    """One hash over results of layers of all kinds. Called in child processes too."""
    total = hashlib.sha256()
    for depth, features, rows in ((3, 5, 1), (65, 33, 7), (384, 100, 130), (2049, 17, 19)):
        total.update(linear(depth, features)(normal((rows, depth))).tobytes())
    x = normal((3, 70, 24))
    for options in ({}, {"num_kv_heads": 2, "head_dim": 7}, {"kdim": 24, "vdim": 24, "add_zero_attn": True}):
        module = layer(24, 4, batch_first=True, matmul_precision="bfloat16", **options)
        for result in module(x, x, x, key_padding_mask=np.arange(70) >= np.array([[70], [4], [65]]), is_causal=True):
            total.update(np.ascontiguousarray(result).tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("level", WITH_FMA)
def test_instruction_sets_with_fma_agree(level):
    assert_agrees(level, digest)


def test_threads_batch_and_strides():
    want, module, x = digest(), linear(96, 40), normal((5, 33, 96))
    for threads in (1, 3):
        with mha_c.num_threads(threads):
            assert digest() == want
    output = module(x)
    for i in range(5):
        np.testing.assert_array_equal(module(x[i]), output[i])
    np.testing.assert_array_equal(module(np.repeat(x, 2, axis=2)[..., ::2]), output)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_and_copies(tmp_path, suffix):
    """The wide parameters are kept and written. packed=True writes int8 weights alone."""
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    module, x = linear(20, 8), normal((3, 20))
    module.save(tmp_path / f"layer{suffix}")
    loaded = mha_c.Linear.load(tmp_path / f"layer{suffix}")
    assert loaded.matmul_precision == "bfloat16" and bits(loaded.state_dict()) == bits(module.state_dict())
    np.testing.assert_array_equal(loaded(x), module(x))
    with pytest.raises(ValueError, match="packed=True writes int8 weights, but this layer has none"):
        module.save(tmp_path / f"packed{suffix}", packed=True)
    both = mha_c.MultiheadAttention(8, 2, seed=0, matmul_precision={"in_proj": "int8", "out_proj": "bfloat16"})
    both.save(tmp_path / f"both{suffix}", packed=True)
    again = mha_c.MultiheadAttention.load(tmp_path / f"both{suffix}")
    assert again.matmul_precision == {"in_proj": "int8", "out_proj": "bfloat16"}
    np.testing.assert_array_equal(again.out_proj.weight, both.out_proj.weight)
    y = normal((3, 8))
    np.testing.assert_array_equal(again(y, y, y)[0], both(y, y, y)[0])
    both.matmul_precision = "bfloat16"
    assert both.matmul_precision == copy.deepcopy(both).matmul_precision == "bfloat16"
    again.matmul_precision = "bfloat16"  # of weights that were int8
    assert again.in_proj_weight.dtype == "f4"


def test_what_is_refused():
    with pytest.raises(ValueError, match="this one is float64"):
        mha_c.Linear(8, 2, dtype="float64", matmul_precision="bfloat16")
    weight = np.zeros((2, 8), "f4")
    for wrong in ((weight, "float16"), (weight, b"bfloat16"), (weight,), (weight, "bfloat16", 1), (None, "bfloat16")):
        with pytest.raises(TypeError, match="weight must be"):
            _core.Linear("float32", wrong, None)
    with pytest.raises(TypeError, match="weight must be of dtype float32, not numpy.float64"):
        _core.Linear("float32", (weight.astype("f8"), "bfloat16"), None)
    with pytest.raises(TypeError, match="weight must be an array of dtype float64"):
        _core.Linear("float64", (weight.astype("f8"), "bfloat16"), None)
