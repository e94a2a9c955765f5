# SPDX-License-Identifier: Apache-2.0
"""matmul_precision="bfloat16": linear maps and attention by their definition, in layers and in files.
tests/test_int8.py has what both precisions share."""

import copy
import hashlib
import pickle

import mha_c
import numpy as np
import pytest
from helpers import bits, causal_mask, layer, normal, randomize
from mha_c import _core
from mha_c.functional import scaled_dot_product_attention
from test_reproducibility import WITH_FMA, assert_agrees

pytest.importorskip("ml_dtypes")

EPS, LARGEST = float(np.finfo("f4").eps), np.finfo("f4").max
BLOCK = 64  # keys whose exponentials have one maximum
INT8_MAPS = {"in_proj": "int8", "attention": "float32", "out_proj": "int8"}


def rounded(x):
    """The nearest numbers of bfloat16, as float32; 0 in place of subnormal ones."""
    return np.where(np.abs(x) < np.finfo("f4").tiny, np.float32(0), x.astype("bfloat16").astype("f4"))


def linear(depth, features, bias=True, **options):
    return randomize(mha_c.Linear(depth, features, bias, matmul_precision="bfloat16", **options))


# ---------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 63, 64, 65, 384, 2048, 4096, 4097, 5000])
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


def attend(q, k, v, bias=0.0, extra=0, factor=1.0, scale=None):
    """Attention whose two products read numbers rounded to bfloat16: context and weights, each with how far rounding in
    float32 may move it. q is (H, L, D), k and v are (Hkv, S, ...); the last keys are `extra` ones, in a block of their
    own. `factor` is what dropout makes of weights. With a `scale`, queries are bfloat16, and scores are scaled;
    otherwise queries are scaled before they are rounded.
    """
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))
    s, depth = k.shape[1:]
    a, b, c = (rounded(x).astype("f8") for x in (q * np.float32(depth**-0.5) if scale is None else q, k, v))
    a = a if scale is None else a * scale
    scores = a @ b.swapaxes(1, 2) + bias
    size = np.abs(a) @ np.abs(b).swapaxes(1, 2) * depth + np.where(np.isfinite(scores), np.abs(scores), 0)
    off = EPS * (size + size.max(axis=2, keepdims=True))  # of a score, and of the largest one
    maximum, total, context, slack = np.full((*scores.shape[:2], 1), -np.inf), 0.0, 0.0, 0.0
    ends = [*range(BLOCK, s - extra, BLOCK), s - extra]
    for keys in (block for block in np.split(np.arange(s), ends) if block.size):
        largest = np.maximum(maximum, scores[..., keys].max(axis=2, keepdims=True))
        reference = np.where(np.isfinite(largest), largest, 0)
        shrink, maximum = np.exp(maximum - reference), largest
        exps = np.exp(scores[..., keys] - reference)
        moved = exps * (off[..., keys] + 4 * EPS)
        kept = np.broadcast_to(factor, scores.shape)[..., keys]
        least, found, most = (rounded((x * kept).astype("f4")).astype("f8") for x in (exps - moved, exps, exps + moved))
        size = found @ np.abs(c[:, keys])
        slack = slack * shrink + (most - least) @ np.abs(c[:, keys]) + 16 * EPS * size
        context = context * shrink + found @ c[:, keys]
        total = total * shrink + exps.sum(axis=2, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(maximum), maximum, 0)) / total * factor
    moved = off.max(axis=2, keepdims=True) + 16 * EPS
    return (context / total, slack / total + moved * np.abs(context / total)), (weights, weights * moved)


def bare_layer(heads, kv_heads, depth, precision="bfloat16", **options):
    """Attention whose projections copy numbers, and multiply them in float32."""
    module = layer(heads * depth, heads, num_kv_heads=kv_heads, bias=False, batch_first=True,
                   matmul_precision={"attention": precision}, **options)
    kept = np.eye(kv_heads * depth, heads * depth)
    module.in_proj_weight = np.concatenate([np.eye(heads * depth), kept, kept])
    module.out_proj.weight = np.eye(heads * depth)
    return module


def split(x, heads):
    """(length, heads * width) by heads."""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def assert_close(got, wanted, what):
    want, off = wanted
    assert got.shape == want.shape
    assert (np.abs(got - want) <= off).all(), f"{what}: {(np.abs(got - want) / np.maximum(off, 1e-30)).max():.3g}"


def assert_attends(module, x, bias=0.0, live=slice(None), factor=None, **call):
    """Holds one call on (query, key, value) of one item against the definition. `factor` takes the weights."""
    query, key, value = x
    out, weights = module(*(one[None] for one in x), average_attn_weights=False, **call)
    kv_heads, depth = module.num_kv_heads, module.head_dim
    k, v = (split(one[live, : kv_heads * depth], kv_heads) for one in (key, value))
    extra = [split(one[0], kv_heads) for one in (module.bias_k, module.bias_v) if one is not None]
    extra = [(one,) for one in extra] if extra else [(), ()]
    if module.add_zero_attn:
        extra = [(*one, np.zeros((kv_heads, 1, depth), "f4")) for one in extra]
    k, v = (np.concatenate([one, *more], axis=1) for one, more in zip((k, v), extra))
    count = len(extra[0])
    bias = np.zeros((1, len(query), len(key))) + bias
    bias = np.concatenate([bias[..., live], np.zeros((*bias.shape[:2], count))], axis=2)
    shown = np.concatenate([weights[0][..., : len(key)][..., live], weights[0][..., len(key) :]], axis=2)
    kept = 1.0 if factor is None else factor(shown)
    wanted, wanted_weights = attend(split(query, module.num_heads), k, v, bias, count, kept)
    assert_close(split(out[0], module.num_heads), wanted, "context")
    assert_close(shown, wanted_weights, "weights")
    if factor is None:
        bare, _ = module(*(one[None] for one in x), need_weights=False, **call)
        np.testing.assert_array_equal(bare, out)


def given_to(module, length, keys, seed=0):
    """Query, key and value of one item, such that weights differ a lot."""
    return [normal((rows, module.embed_dim), seed=seed + i) * 2 for i, rows in enumerate((length, keys, keys))]


@pytest.mark.parametrize("heads, kv_heads, depth", [(2, 2, 16), (4, 2, 7), (1, 1, 65), (3, 1, 1)])
@pytest.mark.parametrize("keys", [1, 2, 3, 63, 64, 65, 127, 128, 129, 130])
def test_attention(heads, kv_heads, depth, keys):
    """Products of rounded numbers, and sums of float32. (tests/c/test_narrow.c knows their order, and so every bit.) Few
    queries multiply float32; tests/c/test_forward.c holds them against the definition.
    """
    module = bare_layer(heads, kv_heads, depth)
    calls = [given_to(module, length, keys) for length in (1, 5, 70)]
    ordinary = [x for x in calls if mha_c.explain(module, *x).paths == ("ordinary",)]
    assert ordinary
    for x in ordinary:
        assert_attends(module, x)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True},
                                     {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_attention_with_masks(options):
    module = bare_layer(4, 2, 8, **options)
    for length, keys in ((1, 7), (66, 131), (90, 90)):
        x = given_to(module, length, keys)
        hidden = normal((length, keys)) > 0.5
        hidden[:, 1] = False
        assert_attends(module, x, np.where(hidden, -np.inf, 0), attn_mask=hidden)
        by_head = np.where(normal((4, length, keys), seed=1) > 0.5, -np.inf, normal((4, length, keys), seed=2))
        by_head[:, :, 1] = 0.5
        assert_attends(module, x, by_head, attn_mask=by_head.astype("f4"))
        assert_attends(module, x, np.where(causal_mask(length, keys), -np.inf, 0), is_causal=True)
        removed = np.arange(keys) % 3 == 2
        assert_attends(module, x, live=~removed, key_padding_mask=removed[None])
        masks = {"attn_mask": hidden, "key_padding_mask": removed[None]}
        assert_attends(module, x, np.where(hidden, -np.inf, 0), ~removed, **masks)


@pytest.mark.parametrize("heads, kv_heads, depth", [(2, 2, 16), (4, 2, 7), (1, 1, 65), (3, 1, 1)])
@pytest.mark.parametrize("scale", [None, 0.25, 0.3, -0.5, -1.7, 0.0])
def test_scaled_dot_product_attention(heads, kv_heads, depth, scale):
    """The same of a function of bfloat16, which does not round queries again. Its result is rounded, too."""
    for length, keys in ((1, 1), (1, 70), (5, 7), (70, 64), (70, 131)):
        q, k, v = (normal(shape, "bfloat16", seed) * 2 for seed, shape in enumerate(
            ((heads, length, depth), (kv_heads, keys, depth), (kv_heads, keys, depth))))
        bias = normal((heads, length, keys), seed=3)
        bias[:, :, 1:][bias[:, :, 1:] > 0.5] = -np.inf
        masks = [({}, 0.0), ({"attn_mask": bias}, bias), ({"attn_mask": bias > 0}, np.where(bias > 0, 0, -np.inf)),
                 ({"is_causal": True}, np.where(causal_mask(length, keys), -np.inf, 0))]
        for call, added in masks:
            got = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, **call)
            with np.errstate(invalid="ignore"):  # a query that sees no key, whose result is 0
                context, off = attend(*(one.astype("f4") for one in (q, k, v)), added,
                                      scale=depth**-0.5 if scale is None else scale)[0]
            low, high = (np.nan_to_num(one).astype("f4").astype("bfloat16") for one in (context - off, context + off))
            assert got.dtype == "bfloat16" and ((low <= got) & (got <= high)).all()


def test_scale_0_of_large_scores():
    """They are 0, even where they are infinite without it."""
    q, k, v = (np.array(x, "bfloat16") for x in ([[1e30]], [[1e30], [1]], [[1], [2]]))
    assert scaled_dot_product_attention(q, k, v, scale=0.0) == [[1.5]]


def test_attention_with_dropout():
    """What is kept is divided by 1 - p before it is rounded, and the sum is that of all exponentials."""
    module = bare_layer(4, 2, 8, dropout=0.3, dropout_seed=5, training=True)
    assert_attends(module, given_to(module, 66, 131), factor=lambda weights: (weights != 0) / 0.7)


def test_attention_is_more_accurate_than_autocast():
    """torch rounds to bfloat16 between the steps, too."""
    torch = pytest.importorskip("torch")
    module, x = layer(64, 4, batch_first=True), normal((2, 100, 64))
    exact = copy.deepcopy(module).double()(*[x.astype("f8")] * 3)[0]
    module.matmul_precision = "bfloat16"
    twin = mha_c.torch.to_torch(module).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs = twin(*[torch.from_numpy(x)] * 3, need_weights=False)[0].float().numpy()
    ours, theirs = (np.sqrt(np.mean(np.square(one - exact))) for one in (module(x, x, x)[0], theirs))
    assert 0.1 * theirs < ours < theirs


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
        np.testing.assert_array_equal(mha_c.explain(whole, *given).output, whole(*given))


def test_explain():
    """Scores, weights and contexts are those of the narrow products, also of some heads."""
    module, x = layer(24, 4, batch_first=True, matmul_precision="bfloat16", num_kv_heads=2), normal((2, 67, 24))
    explanation = mha_c.explain(module, x, is_causal=True)
    heads = [explanation.stages[f"{name}_heads"].array for name in "qkv"]
    q, k = rounded(heads[0] * np.float32(6**-0.5)), np.repeat(rounded(heads[1]), 2, axis=1)
    np.testing.assert_allclose(explanation.scores, q @ k.swapaxes(2, 3), rtol=1e-6, atol=1e-6)
    for i, one in enumerate(zip(*heads)):
        context, weights = attend(*one, np.where(causal_mask(67, 67), -np.inf, 0))
        assert_close(explanation.head_outputs[i], context, "context")
        assert_close(explanation.weights[i], weights, "weights")
    output, weights = module(x, x, x, is_causal=True, average_attn_weights=False)
    np.testing.assert_array_equal(explanation.output, output)
    np.testing.assert_array_equal(explanation.weights, weights)
    some = mha_c.explain(module, x, is_causal=True, heads=[3, 0])
    for name in ("scores", "weights", "head_outputs"):
        np.testing.assert_array_equal(getattr(some, name), getattr(explanation, name)[:, [3, 0]])
    few = mha_c.explain(module, x[:1, :1], normal((1, 3000, 24)))
    assert few.paths == ("few queries",) and "W_k and attention itself multiply float32 then." in few.notes[0]
    assert few.notes[-1].startswith("Numbers that are multiplied otherwise: bfloat16 in ")


def test_plot():
    """Pictures show the weights that the layer returns."""
    pytest.importorskip("matplotlib")
    module, x = layer(24, 4, matmul_precision="bfloat16"), normal((9, 24))
    image = mha_c.plot.weights(mha_c.explain(module, x), head=1).images[0]
    np.testing.assert_array_equal(image.get_array(), module(x, x, x, average_attn_weights=False)[1][1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves(dtype):
    """A layer of halves computes as the float32 layer with its numbers, and rounds what it returns."""
    one, x = linear(70, 9, dtype=dtype), normal((11, 70), dtype)
    wide = copy.deepcopy(one).float()
    np.testing.assert_array_equal(one(x), wide(x.astype("f4")).astype(dtype))
    one, x = layer(24, 4, num_kv_heads=2, dtype=dtype, matmul_precision="bfloat16"), normal((67, 24), dtype)
    wide = copy.deepcopy(one).float()
    assert wide.matmul_precision == "bfloat16"
    for got, want in zip(one(x, x, x), wide(*[x.astype("f4")] * 3)):
        np.testing.assert_array_equal(got, want.astype(dtype))


# ---------------------------------------------------------------------------------------------- equal bits


def digest():
    """One hash over results of layers of all kinds. Called in child processes too."""
    total = hashlib.sha256()
    for depth, features, rows in ((3, 5, 1), (65, 33, 7), (384, 100, 130), (4097, 17, 19)):
        total.update(linear(depth, features)(normal((rows, depth))).tobytes())
    for module, calls in attentions():
        for x, call in calls:
            for result in module(*x, **call):
                total.update(np.ascontiguousarray(result).tobytes())
    return total.hexdigest()


def attentions():
    """Layers of attention, each with (query, key, value) and the options of calls."""
    x, padding = normal((3, 70, 24)), np.arange(70) >= np.array([[70], [4], [65]])
    mask = np.where(normal((12, 70, 70)) > 1, -np.inf, normal((12, 70, 70), seed=1)).astype("f4")
    mask[:, :, 0] = 0
    long = normal((3, 1, 24)), normal((3, 601, 24)), normal((3, 601, 24), seed=1)
    for options in ({}, {"num_kv_heads": 2, "head_dim": 7}, {"kdim": 24, "vdim": 24, "add_zero_attn": True},
                    {"head_dim": 65, "add_bias_kv": True}, {"dropout": 0.3, "dropout_seed": 1, "training": True}):
        module = layer(24, 4, batch_first=True, matmul_precision="bfloat16", **options)
        masked = [{"key_padding_mask": padding, "is_causal": True}, {"attn_mask": mask, "average_attn_weights": False}]
        yield module, [*(((x, x, x), call) for call in masked), (long, {})]


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


def test_attention_of_items():
    """An item has the same bits alone, without its padding, with strides, and without weights."""
    for module, calls in attentions():
        if module.training:  # an item draws by its number
            continue
        for x, call in calls:
            want = module(*x, **call)[0]
            bare = module(*x, **call, need_weights=False)[0]
            np.testing.assert_array_equal(bare, want)
            np.testing.assert_array_equal(module(*(np.repeat(one, 2, axis=2)[..., ::2] for one in x), **call)[0], want)
            for i, one in enumerate(zip(*x)):
                rows = {"key_padding_mask": slice(i, i + 1), "attn_mask": slice(4 * i, 4 * i + 4)}
                alone = {name: value[rows[name]] if name in rows else value for name, value in call.items()}
                np.testing.assert_array_equal(module(*(array[None] for array in one), **alone)[0][0], want[i])
    module, (query, key, value) = layer(24, 4, batch_first=True, matmul_precision="bfloat16"), calls[-1][0]
    many = np.repeat(query, 100, axis=1)  # few queries of many keys take another path, which rounds less
    few, others = module(query, key, value)[0][:, 0], module(many, key, value)[0][:, 50]
    assert 0 < np.abs(few - others).max() < 0.02 * np.abs(others).max()
    padded = [np.concatenate([one, np.full((3, 40, 24), np.nan, "f4")], axis=1) for one in (key, value)]
    padding = np.tile(np.arange(641) >= 601, (3, 1))
    np.testing.assert_array_equal(module(query, *padded, key_padding_mask=padding)[0], module(query, key, value)[0])


@pytest.mark.parametrize("filler", [[LARGEST], [LARGEST, -LARGEST], [np.nan, np.inf]], ids=str)
def test_hidden_numbers_that_become_infinite(filler):
    """The largest number of float32 is infinite in bfloat16. Where it is hidden, a query has the bits that it has with
    zeros there.
    """
    module = bare_layer(2, 1, 9)
    query, key, value = given_to(module, 70, 70)
    late = np.arange(70) >= 66
    hidden, by_flag = np.tile(late, (70, 1)), {"is_causal": True}
    zeros = [np.where(late[:, None], 0, one).astype("f4")[None] for one in (key, value)]
    spoilt = [np.where(late[:, None], np.resize(filler, one.shape), one).astype("f4")[None] for one in (key, value)]
    for call, unseen in ((by_flag, 66), ({"attn_mask": causal_mask(70, 70)}, 66), ({"attn_mask": hidden}, 70),
                         ({"attn_mask": np.where(hidden, -np.inf, 0.5).astype("f4")}, 70),
                         ({"key_padding_mask": late[None]}, 70),
                         ({"key_padding_mask": np.where(late[None], -np.inf, 0.5).astype("f4")}, 70)):
        for need_weights in (True, False):
            output, weights = module(query[None], *zeros, need_weights=need_weights, **call)
            for given in (spoilt, (zeros[0], spoilt[1]), (spoilt[0], zeros[1])):
                got, got_weights = module(query[None], *given, need_weights=need_weights, **call)
                np.testing.assert_array_equal(got[:, :unseen], output[:, :unseen])
                if need_weights:
                    np.testing.assert_array_equal(got_weights[:, :unseen], weights[:, :unseen])
    seen = module(query[None], zeros[0], spoilt[1], **by_flag)[0]
    assert not np.isfinite(seen[:, 66:]).any()


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
    y = normal((3, 8))
    for value in ({"in_proj": "int8", "attention": None, "out_proj": "bfloat16"}, INT8_MAPS):
        both = layer(8, 2, matmul_precision=value)
        both.save(tmp_path / f"both{suffix}", packed=True)
        again = mha_c.MultiheadAttention.load(tmp_path / f"both{suffix}")
        for one in (again, pickle.loads(pickle.dumps(both)), copy.copy(both), copy.deepcopy(both)):
            assert one.matmul_precision == value
            assert [result.tobytes() for result in one(y, y, y)] == [result.tobytes() for result in both(y, y, y)]
        again.matmul_precision = "bfloat16"  # of weights that were int8
        assert again.in_proj_weight.dtype == "f4"
    assert again.matmul_precision == copy.deepcopy(again).matmul_precision == "bfloat16"


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
