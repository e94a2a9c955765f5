# SPDX-License-Identifier: Apache-2.0
"""mha_c.explain: every stage against torch in float64, output and weights against the layer bit for bit, paths, masks,
dropout, memory, errors, and how it is shown."""

import base64
import io
import pickle
import re
import sys
import tracemalloc
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import call_torch, causal_mask, in_float32, inputs, layer, normal, run_child, torch_twin

mha_c = pytest.importorskip("mha_c")
torch = pytest.importorskip("torch")

from mha_c import _core  # noqa: E402
from mha_c.explanation import stages  # noqa: E402
from mha_c.check import Comparison, Error  # noqa: E402

N, L, S = 3, 5, 7

LAYERS = {
    "plain": dict(embed_dim=8, num_heads=4),
    "no bias": dict(embed_dim=8, num_heads=2, bias=False),
    "appended keys": dict(embed_dim=8, num_heads=4, add_bias_kv=True, add_zero_attn=True),
    "zero key": dict(embed_dim=8, num_heads=2, add_zero_attn=True),
    "kdim vdim": dict(embed_dim=8, num_heads=4, kdim=5, vdim=3),
    "batch first": dict(embed_dim=6, num_heads=3, batch_first=True),
    "float64": dict(embed_dim=8, num_heads=4, dtype="float64"),
    "one head": dict(embed_dim=5, num_heads=1),
    "free widths": dict(embed_dim=10, num_heads=4, head_dim=3, v_head_dim=5, out_dim=7),
    "grouped": dict(embed_dim=12, num_heads=6, num_kv_heads=2, v_head_dim=3),
    "grouped, appended": dict(embed_dim=12, num_heads=6, num_kv_heads=3, add_bias_kv=True, add_zero_attn=True, vdim=4),
    "wide": dict(embed_dim=160, num_heads=2, batch_first=True),
}

MASKS = ("none", "bool 2-D", "bool 3-D", "float 2-D", "float 3-D", "padding", "float padding", "causal", "all")


def question(name, kind, n=N, length=L, s=S):
    """A layer, the inputs of a call, and its masks."""
    options = dict(LAYERS[name])
    module = layer(options.pop("embed_dim"), options.pop("num_heads"), **options)
    dtype = module.out_proj.weight.dtype.name
    x = inputs(n, length, s, module.embed_dim, kdim=module.kdim, vdim=module.vdim, batch_first=module.batch_first,
               dtype=dtype)
    return module, x, masks(kind, n or 1, module.num_heads, length, s, dtype, batched=n is not None)


def masks(kind, n, h, length, s, dtype, batched=True):
    """The masks of a call. Some keys of every row stay visible: what becomes of others is tested apart."""
    random = np.random.default_rng(5)
    hides = random.random((n * h, length, s)) < 0.3
    hides[..., :1] = False
    padding = random.random((n, s)) < 0.3
    padding[:, :1] = False
    padding = padding if batched else padding[0]
    scores = random.standard_normal((n * h, length, s)).astype(dtype)
    scores[hides] = -np.inf
    return {
        "none": {},
        "bool 2-D": {"attn_mask": hides[0]},
        "bool 3-D": {"attn_mask": hides},
        "float 2-D": {"attn_mask": scores[0]},
        "float 3-D": {"attn_mask": scores},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": np.where(padding, -np.inf, 0.5).astype(dtype)},
        "causal": {"is_causal": True},
        "all": {"attn_mask": scores, "key_padding_mask": padding, "is_causal": True},
    }[kind]


def torch_stages(module, query, key, value, dtype, key_padding_mask=None, attn_mask=None, is_causal=False):
    """Every stage by torch's own operations, step by step as torch.nn.functional.multi_head_attention_forward, in a
    dtype of choice; N first, without a batch axis for inputs that have none."""
    state = {name: torch.tensor(np.array(array)).to(dtype) for name, array in module.state_dict().items()}
    batched = query.ndim == 3

    def read(array):
        tensor = torch.tensor(array).to(dtype)
        return tensor if batched and module.batch_first else tensor.transpose(0, 1) if batched else tensor[None]

    h, hkv, d, dv = module.num_heads, module.num_kv_heads, module.head_dim, module.v_head_dim
    rows = (h * d, hkv * d, hkv * dv)
    if "in_proj_weight" in state:
        projections = state["in_proj_weight"].split(rows)
    else:
        projections = [state[f"{letter}_proj_weight"] for letter in "qkv"]
    biases = state["in_proj_bias"].split(rows) if "in_proj_bias" in state else [None] * 3
    found = {}
    for letter, array, weight, bias, count, width in zip(
            "qkv", (query, key, value), projections, biases, (h, hkv, hkv), (d, d, dv)):
        x = torch.nn.functional.linear(read(array), weight, bias)
        found[letter] = x
        n = len(x)
        if f"bias_{letter}" in state:
            x = torch.cat([x, state[f"bias_{letter}"].expand(n, 1, -1)], dim=1)
        if letter != "q" and module.add_zero_attn:
            x = torch.cat([x, torch.zeros(n, 1, x.shape[-1], dtype=dtype)], dim=1)
        found[f"{letter}_heads"] = x.view(n, -1, count, width).transpose(1, 2)
    k, v = (found[name].repeat_interleave(h // hkv, dim=1) for name in ("k_heads", "v_heads"))
    found["scores"] = found["q_heads"] @ k.transpose(-1, -2) / d**0.5
    mask = torch.zeros(found["scores"].shape, dtype=dtype)
    length, s = query.shape[-2] if not batched or module.batch_first else query.shape[0], found["k"].shape[1]
    for given, shape in ((attn_mask, (-1, h, length, s)), (key_padding_mask, (len(found["q"]), 1, 1, s)),
                         (causal_mask(length, s) if is_causal else None, (1, 1, length, s))):
        if given is not None:
            given = torch.tensor(given)
            added = torch.zeros(given.shape, dtype=dtype).masked_fill_(given, -torch.inf) if given.dtype == torch.bool \
                else given.to(dtype)
            mask[..., :s] += added.view(shape if added.numel() != length * s else (1, 1, length, s))
    found["masked_scores"] = found["scores"] + mask
    found["weights"] = torch.softmax(found["masked_scores"], dim=-1)
    found["average_weights"] = found["weights"].mean(dim=1)
    found["head_outputs"] = found["weights"] @ v
    found["concatenated"] = found["head_outputs"].transpose(1, 2).flatten(2)
    output = torch.nn.functional.linear(found["concatenated"], state["out_proj.weight"], state.get("out_proj.bias"))
    if not batched:
        return {**{name: array[0].numpy() for name, array in found.items()}, "output": output[0].numpy()}
    output = output if module.batch_first else output.transpose(0, 1)
    return {**{name: array.numpy() for name, array in found.items()}, "output": output.numpy()}


def assert_stages(explanation, module, x, call):
    """Every stage as close to torch's in float64 as torch's own in float32 is, by the criterion of mha_c.check. In
    float64 torch itself is the reference, and may be off by a unit in the last place."""
    exact = torch_stages(module, *x, torch.float64, **call)
    is_double = x[0].dtype == np.float64
    theirs = exact if is_double else torch_stages(module, *x, torch.float32, **call)
    assert [*explanation.stages] == [name for name in stages.STAGES if name in exact]
    for name, stage in explanation.stages.items():
        one_ulp = float(np.spacing(np.abs(exact[name][np.isfinite(exact[name])]).max(initial=1.0)))
        compared = Comparison.measure(name, stage.array, theirs[name], exact[name],
                                      Error(one_ulp, one_ulp) if is_double else None)
        assert compared.agrees, (name, compared.disagreements)
        assert stage.array is getattr(explanation, name)
        assert len(stage.axes) == stage.array.ndim
        sizes = [np.prod([explanation.letters[letter] for letter in axis.split("·")]) for axis in stage.axes]
        assert tuple(sizes) == stage.shape, (name, stage.axes)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_stage_against_torch(name, kind):
    module, x, call = question(name, kind)
    explanation = mha_c.explain(module, *x, **call)
    assert_stages(explanation, module, x, call)
    output, weights = module(*x, average_attn_weights=False, **call)
    average = module(*x, **call)[1]
    for ours, its in ((explanation.output, output), (explanation.weights, weights),
                      (explanation.average_weights, average)):
        np.testing.assert_array_equal(ours, its)
    assert set(explanation.paths) == {"ordinary"}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ["plain", "grouped", "appended keys", "free widths"])
def test_without_a_batch(name, kind):
    module, x, call = question(name, kind, n=None)
    explanation = mha_c.explain(module, *x, **call)
    assert_stages(explanation, module, x, call)
    output, weights = module(*x, average_attn_weights=False, **call)
    np.testing.assert_array_equal(explanation.output, output)
    np.testing.assert_array_equal(explanation.weights, weights)
    assert "N" not in explanation.letters


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["plain", "appended keys", "grouped", "wide"])
def test_halves(name, dtype):
    """Every stage is one of a float32 layer with the same parameters and products, bit for bit."""
    module, x, call = question(name, "all")
    module, x = module.to(dtype), [array.astype(dtype) for array in x]
    explanation = mha_c.explain(module, *x, **call)
    output, average = module(*x, **call)
    weights = module(*x, average_attn_weights=False, **call)[1]
    html, text = explanation._repr_html_(), repr(explanation)
    wide = mha_c.explain(in_float32(module), *(array.astype(np.float32) for array in x), **call)
    for stage, one in wide.stages.items():
        expected = {"output": output, "average_weights": average}.get(stage, one.array)
        np.testing.assert_array_equal(explanation.stages[stage].array, expected, err_msg=stage, strict=True)
    np.testing.assert_array_equal(explanation.weights.astype(dtype), weights, strict=True)
    assert output.dtype == dtype and f"dtype={dtype}" in text
    assert html.count("<td") == wide._repr_html_().count("<td")
    assert "Numbers that are multiplied" not in text
    assert explanation.warnings == wide.warnings and explanation.masks == wide.masks


@pytest.mark.parametrize("name", ["plain", "kdim vdim", "batch first", "appended keys"])
def test_that_the_judge_is_torch(name):
    """The steps above are torch's: their end is what torch's layer returns."""
    module, x, call = question(name, "all")
    exact = torch_stages(module, *x, torch.float64, **call)
    output, weights = call_torch(torch_twin(module).double(), *(array.astype(np.float64) for array in x), **call,
                                 average_attn_weights=False)
    np.testing.assert_allclose(exact["output"], output, rtol=0, atol=1e-13)
    np.testing.assert_allclose(exact["weights"], weights, rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}])
def test_larger_than_a_block(options):
    """Several panels of queries, several blocks and chunks of keys, long chains of features."""
    module = layer(96, 4, **options)
    x = inputs(2, 130, 600, 96, batch_first=False)
    call = {"key_padding_mask": np.arange(600) >= np.array([[600], [70]]), "attn_mask": normal((130, 600), seed=3)}
    explanation = mha_c.explain(module, *x, **call)
    assert_stages(explanation, module, x, call)
    output, weights = module(*x, average_attn_weights=False, **call)
    np.testing.assert_array_equal(explanation.output, output)
    np.testing.assert_array_equal(explanation.weights, weights)


def test_output_is_the_projection_of_concatenated():
    """The heads' results are those that the output was made of, to the last bit."""
    module, x, call = question("wide", "all", length=70, s=200)
    explanation = mha_c.explain(module, *x, **call)
    weight, bias = module.out_proj.weight, module.out_proj.bias
    features, depth = weight.shape
    small = np.zeros((1, 1), np.float32)
    projection = _core.Weights(1, 1, features, 1, "float32", weight, np.zeros((features, 1), np.float32), small, np.concatenate(
        [bias, np.zeros(features + 1, np.float32)]), None, None, small, None)
    assert depth == explanation.concatenated.shape[-1]
    np.testing.assert_array_equal(_core.project(projection, "query", explanation.concatenated, True),
                                  explanation.output)


@pytest.mark.parametrize("kind", ["float 2-D", "float 3-D", "bool 3-D", "causal", "padding"])
def test_masked_scores_are_scores_plus_masks(kind):
    module, x, call = question("wide", kind, length=70, s=200)
    explanation = mha_c.explain(module, *x, **call)
    mask = torch_stages(module, *(np.zeros_like(array) for array in x), torch.float32, **call)
    for_zero = mha_c.explain(layer_without_numbers(module), *x, **call, stages="masked_scores").masked_scores
    np.testing.assert_array_equal(explanation.masked_scores, explanation.scores + for_zero)
    assert mask["weights"].shape == for_zero.shape


def layer_without_numbers(module):
    """The same layer with all parameters 0: its scores are 0, so its masked scores are the masks."""
    other = mha_c.MultiheadAttention(module.embed_dim, module.num_heads, batch_first=module.batch_first).eval()
    other.load_state_dict({name: np.zeros_like(array) for name, array in module.state_dict().items()})
    return other


def test_weights_are_the_softmax_of_masked_scores():
    module, x, call = question("wide", "all", length=70, s=200)
    explanation = mha_c.explain(module, *x, **call)
    exact = torch.softmax(torch.tensor(explanation.masked_scores).double(), dim=-1).numpy()
    np.testing.assert_allclose(explanation.weights, exact, rtol=8 * np.finfo(np.float32).eps, atol=1e-37)


@pytest.mark.parametrize("strided", [False, True])
def test_inputs_of_any_kind(strided):
    module, x, _ = question("plain", "none")
    if strided:
        other = tuple(np.asfortranarray(array)[::1] for array in x)
    else:
        other = tuple(torch.tensor(array) for array in x)
    ours, its = mha_c.explain(module, *other), mha_c.explain(module, *x)
    for name, stage in its.stages.items():
        np.testing.assert_array_equal(ours.stages[name].array, stage.array)


def test_inputs_that_are_not_given():
    module, x, _ = question("plain", "none")
    query, key, _ = x
    for given, meant in (((query,), (query,) * 3), ((query, key), (query, key, key))):
        np.testing.assert_array_equal(mha_c.explain(module, *given).output, module(*meant)[0])
    np.testing.assert_array_equal(mha_c.explain(module, query, value=2 * query).output, module(query, query, 2 * query)[0])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_layer_of_torch(dtype):
    """Dropout of a layer in training mode is left out: torch's random numbers are its own."""
    theirs = torch.nn.MultiheadAttention(8, 2, dropout=0.5, dtype=getattr(torch, dtype))
    x = torch.tensor(normal((5, 3, 8))).to(theirs.out_proj.weight.dtype).requires_grad_()
    explanation = mha_c.explain(theirs, x, is_causal=True)
    assert theirs.training and "weights_before_dropout" not in explanation.stages
    expected, _ = theirs.eval()(x, x, x, attn_mask=torch.tensor(causal_mask(5, 5)), is_causal=True)
    tolerance = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(explanation.output, expected.detach().double().numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
@pytest.mark.parametrize("name", ["plain", "appended keys"])
def test_nothing_to_attend(name, shape):
    n, length, s = shape
    module, x, _ = question(name, "none", n, length, s)
    explanation = mha_c.explain(module, *x)
    np.testing.assert_array_equal(explanation.output, module(*x)[0])
    assert explanation.weights.shape == module(*x, average_attn_weights=False)[1].shape
    parse(explanation._repr_html_())
    assert repr(explanation)


# ------------------------------------------------------------------------------------------------ a part of it


@pytest.mark.parametrize("kind", ["none", "all", "bool 3-D"])
@pytest.mark.parametrize("name", ["plain", "grouped", "grouped, appended", "free widths", "kdim vdim", "no bias"])
@pytest.mark.parametrize("n", [N, None])
def test_some_heads(name, kind, n):
    module, x, call = question(name, kind, n)
    heads = [module.num_heads - 1, 0]
    whole, some = mha_c.explain(module, *x, **call), mha_c.explain(module, *x, **call, heads=heads)
    assert some.heads == tuple(heads) and some.letters["H'"] == 2
    shared = module.num_heads // module.num_kv_heads
    axis = 0 if n is None else 1
    for stage in ("q_heads", "scores", "masked_scores", "weights", "head_outputs"):
        np.testing.assert_array_equal(some.stages[stage].array, whole.stages[stage].array.take(heads, axis))
    for stage in ("k_heads", "v_heads"):
        kv_heads = [head // shared for head in heads]
        np.testing.assert_array_equal(some.stages[stage].array, whole.stages[stage].array.take(kv_heads, axis))
    for stage in ("average_weights", "concatenated", "output"):
        np.testing.assert_array_equal(some.stages[stage].array, whole.stages[stage].array)


@pytest.mark.parametrize("stage", stages.STAGES)
def test_one_stage(stage):
    module, x, call = question("grouped", "all")
    whole, one = mha_c.explain(module, *x, **call), mha_c.explain(module, *x, **call, stages=stage)
    assert list(one.stages) == [stage]
    expected = whole.weights if stage == "weights_before_dropout" else whole.stages[stage].array
    np.testing.assert_array_equal(one.stages[stage].array, expected)
    other = "q" if stage != "q" else "k"
    with pytest.raises(AttributeError, match=rf"{other} was not asked for: explain\(..., stages="):
        getattr(one, other)
    assert stage in dir(one) and other not in one.stages


def peak_memory(call):
    tracemalloc.start()
    kept = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak


def test_memory_of_a_part():
    """NumPy reports its arrays to tracemalloc: the others of 16 heads are never made, nor the other stages."""
    module = layer(64, 16, batch_first=True)
    x = normal((1, 512, 64))
    one_head = 512 * 512 * 4
    call = {"attn_mask": normal((512, 512), seed=1)}
    everything = peak_memory(lambda: mha_c.explain(module, x, x, x, **call))
    weights = peak_memory(lambda: mha_c.explain(module, x, x, x, **call, stages="weights"))
    part = peak_memory(lambda: mha_c.explain(module, x, x, x, **call, heads=3, stages="weights"))
    output = peak_memory(lambda: mha_c.explain(module, x, x, x, **call, stages="output"))
    assert everything > 3 * 16 * one_head
    assert 16 * one_head < weights < 19 * one_head  # with what looking at the mask takes
    assert one_head < part < 4 * one_head
    assert output < 3 * one_head


def test_resident_memory_of_a_part():
    """The same for all memory of the process, the core's included."""
    def grown(arguments):
        code = f"""
            import numpy as np
            import mha_c
            from helpers import most_memory
            module = mha_c.MultiheadAttention(64, 16, seed=0, batch_first=True)
            x = np.ones((1, 2048, 64), np.float32)
            module(x[:, :8], x[:, :8], x[:, :8])
            before = most_memory()
            mha_c.explain(module, x, x, x, {arguments})
            print(most_memory() - before)
        """
        return int(run_child(code, env={"MHA_C_NUM_THREADS": "1"}).stdout)

    one_head = 2048 * 2048 * 4
    assert grown('stages="weights"') > 16 * one_head
    assert grown('stages="weights", heads=[5]') < 3 * one_head


# ------------------------------------------------------------------------------------------------ paths


def test_paths_are_the_core_s_own_choice():
    """One query, many keys: not one of them is projected, unless padding leaves few enough of them."""
    module = layer(64, 4, batch_first=True)
    query, key = normal((3, 1, 64)), normal((3, 400, 64), seed=1)
    live = np.array([400, 1, 300])
    padding = np.arange(400) >= live[:, None]
    explanation = mha_c.explain(module, query, key, key, padding)
    assert explanation.paths == ("few queries", "ordinary", "few queries")
    output, weights = module(query, key, key, padding, average_attn_weights=False)
    np.testing.assert_array_equal(explanation.output, output)
    np.testing.assert_array_equal(explanation.weights, weights)
    assert_stages(explanation, module, (query, key, key), {"key_padding_mask": padding})
    text = str(explanation)
    assert "Path of item 1: ordinary." in text and "Path of items 0, 2: few queries." in text


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_a_head_takes_the_path_of_its_layer(kv_heads):
    """Alone it would be computed another way, since it shares no keys; bits show which way was gone."""
    module = layer(64, 8, num_kv_heads=kv_heads, batch_first=True)
    for length in (1, 2, 3, 4, 6, 9):
        query, key = normal((1, length, 64)), normal((1, 500, 64), seed=1)
        weights = module(query, key, key, average_attn_weights=False)[1]
        part = mha_c.explain(module, query, key, key, heads=[6], stages=["weights", "head_outputs"])
        whole = mha_c.explain(module, query, key, key)
        np.testing.assert_array_equal(part.weights[:, 0], weights[:, 6])
        np.testing.assert_array_equal(part.head_outputs[:, 0], whole.head_outputs[:, 6])
    paths = [mha_c.explain(module, normal((1, n, 64)), key, key, stages=[]).paths[0] for n in (1, 60)]
    assert paths == ["ordinary" if kv_heads == 1 else "few queries", "ordinary"]


def test_paths_are_two_orders_of_additions():
    """So their bits differ, and the core really takes the one that it is told to take."""
    module = layer(64, 4)
    query, key = normal((2, 1, 64)), normal((600, 1, 64), seed=1)
    arguments = (module._parameters.weights, query, key, key, None, False, None, True, False, None, False, False, "zero", 0.0,
                 0, 0)
    few, ordinary = (_core.attend(*arguments, np.array([is_few]))[0] for is_few in (True, False))
    assert (few != ordinary).any()
    np.testing.assert_allclose(few, ordinary, atol=1e-6)


def test_paths_that_cannot_be():
    """The core keeps to what it can do, whatever it is told: a narrow input has no vector to fill."""
    module = layer(8, 2)
    x = normal((5, 1, 8))
    arguments = (module._parameters.weights, x, x, x, None, False, None, True, False, None, False, False, "zero", 0.0, 0, 0)
    told = _core.attend(*arguments, np.array([True]))[0]
    np.testing.assert_array_equal(told, _core.attend(*arguments, np.array([False]))[0])
    for wrong in (np.array([True, True]), np.array([1]), None, np.array([[True]])):
        with pytest.raises(ValueError, match="one bool for each batch item"):
            _core.attend(*arguments, wrong)
    with pytest.raises(TypeError, match="expected 16 arguments"):
        _core.scores(*arguments[:-1])
    with pytest.raises(ValueError, match="of each head"):
        _core.scores(*arguments)
    for wrong in ((arguments[0], "query", normal((5, 1, 7)), False), (arguments[0], "query", normal((8,)), False),
                  (arguments[0], "key", x.astype(np.float64), False), (arguments[0], "output", x, False)):
        with pytest.raises(ValueError):
            _core.project(*wrong)
    for wrong in ((None, "query", x, False), (arguments[0], "query", x), (arguments[0], "query", [1.0], False)):
        with pytest.raises(TypeError):
            _core.project(*wrong)


# ------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("kind", MASKS)
def test_what_masks_hide_is_counted(kind):
    module, x, call = question("plain", kind)
    explanation = mha_c.explain(module, *x, **call)
    hidden = int(np.isneginf(explanation.masked_scores).sum())
    if kind == "none":
        assert explanation.masks == () and explanation.masked_scores is explanation.scores
    else:
        assert f"hide {hidden:,} of {N * 4 * L * S:,} pairs" in str(explanation).replace("\n", " ")
    is_causal = kind in ("causal", "all")  # with more keys than queries, the last of which no mask hides
    assert [warning[:9] for warning in explanation.warnings] == ["is_causal"] * is_causal


def warnings_of(module, x, **call):
    return mha_c.explain(module, x, x, x, **call, stages="output").warnings


def test_warnings():
    module, x = layer(8, 2, batch_first=True), normal((2, 6, 8))
    shows = np.tri(6, dtype=bool)  # the other way round: torch's scaled_dot_product_attention shows where it is True
    tokens = np.arange(6) < np.array([[6], [3]])

    assert re.search("attn_mask looks inverted: it hides 58.3%.*~mask", warnings_of(module, x, attn_mask=shows)[0])
    said = warnings_of(module, x, key_padding_mask=tokens)
    assert re.search("key_padding_mask looks inverted: it hides 75%.*all of item 0.*~mask", said[0])
    assert re.search("12 of 24 queries see no key, the first being query 0 of head 0 in item 0: .* NaN", said[1])
    alone = np.zeros((2, 6), bool)
    alone[1] = True
    assert warnings_of(module, x, key_padding_mask=alone)[0] == (
        "key_padding_mask hides every key of item 1.")
    assert "output bias" in warnings_of(module, x, key_padding_mask=alone, need_weights=False)[-1]
    assert "-1000 or less" in warnings_of(module, x, key_padding_mask=np.full((2, 6), -1e9))[0]
    assert "NaN or infinity" in warnings_of(module, x, attn_mask=np.full((6, 6), np.nan))[0]
    with_zero = layer(8, 2, batch_first=True, add_zero_attn=True)
    assert "appended keys only" in warnings_of(with_zero, x, key_padding_mask=alone)[-1]
    blind = np.zeros((4, 6, 6), bool)
    blind[3, 2] = True
    assert warnings_of(module, x, attn_mask=blind) == (
        "1 of 24 queries see no key, the first being query 2 of head 1 in item 1: their weights and output are NaN, as in "
        'torch; with masked_rows="zero", they are finite.',)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_masks_of_zeros_and_ones(dtype):
    """They hide nothing; what the warning advises for masks of the tokens hides the padding."""
    module, x = layer(8, 2, batch_first=True), normal((2, 6, 8))
    tokens = np.arange(6) < np.array([[6], [3]])
    (said,) = warnings_of(module, x, key_padding_mask=tokens.astype(dtype))
    assert "If 1 marks the tokens, pass mask == 0; if 1 marks what to hide, pass mask == 1." in said
    assert mha_c.explain(module, x, key_padding_mask=tokens.astype(dtype) == 0).masks[0].hidden == 3
    (said,) = warnings_of(module, x, attn_mask=np.tri(6, dtype=dtype))
    assert "If 1 marks what a query may see, pass mask == 0" in said
    assert warnings_of(module, x, attn_mask=np.tri(6, dtype=dtype) == 0) == ()


@pytest.mark.parametrize("hides", [lambda tokens: tokens, lambda tokens: np.where(tokens, -np.inf, 0),
                                   lambda tokens: np.where(tokens, np.finfo(np.float32).min, 0)])
@pytest.mark.parametrize("lengths", [[3, 4], [1], [4, 4, 4]])
def test_inverted_padding_of_a_fixed_length(lengths, hides):
    """Padding on the left looks the same, so this is a question. The cure hides the padding."""
    module, x = layer(8, 2, batch_first=True), normal((len(lengths), 5, 8))
    tokens = np.arange(5) < np.array(lengths)[:, None]
    (said,) = warnings_of(module, x, key_padding_mask=hides(tokens))
    assert "Is this batch padded on the left? If it is padded on the right, the mask is inverted." in said
    mask = hides(tokens)
    cure = re.search(r"is passed as (.*)\.$", said).group(1)
    assert (eval(cure, {"mask": mask}) == ~tokens).all()
    assert warnings_of(module, x, key_padding_mask=~tokens) == ()


def test_inverted_padding_with_a_full_item():
    """Few keys are hidden, but all of one item, and the first ones of the others."""
    module, x = layer(8, 2, batch_first=True), normal((4, 5, 8))
    tokens = np.arange(5) < np.array([[5], [1], [1], [1]])
    for low in -np.inf, -1e9:
        said = " ".join(warnings_of(module, x, key_padding_mask=np.where(tokens, low, 0)))
        assert "inverted" in said and "passed as mask == 0." in said
    assert "looks inverted: it hides 40% of the keys, and all of item 0" in warnings_of(module, x, key_padding_mask=tokens)[0]


def test_causality_with_more_keys_than_queries():
    """A query at the end of a sequence sees the first key alone; the cure lets it see the keys up to its own."""
    module, x = layer(16, 4, batch_first=True), normal((2, 10, 16))
    for length in (1, 3):
        (said,) = mha_c.explain(module, x[:, -length:], x, is_causal=True).warnings
        assert "is_causal=True lets query l see the keys 0..l" in said
        mask = eval(re.search("attn_mask=(.*)\\.$", said).group(1), {"np": np})
        np.testing.assert_allclose(
            module(x[:, -length:], x, x, attn_mask=mask)[0], module(x, x, x, is_causal=True)[0][:, -length:], atol=1e-6)
    # The first queries of a longer buffer, whose end is not written yet.
    assert mha_c.explain(module, x[:, :3], x, key_padding_mask=np.tile(np.arange(10) >= 3, (2, 1)), is_causal=True
                         ).warnings == ()
    assert mha_c.explain(module, x, x[:, :3], is_causal=True).warnings == ()


@pytest.mark.parametrize("call", [
    {"is_causal": True},
    {"attn_mask": causal_mask(6, 6)},
    {"attn_mask": np.where(causal_mask(6, 6), -np.inf, 0)},
    {"attn_mask": np.where(causal_mask(6, 6), np.finfo(np.float32).min, 0)},
    {"attn_mask": np.abs(np.subtract.outer(np.arange(6), np.arange(6))) > 0},  # only oneself
    {"attn_mask": np.eye(6, dtype=bool)},  # all but oneself
    {"key_padding_mask": np.arange(6) >= np.array([[1], [6]])},
    {"key_padding_mask": np.arange(6) < np.array([[5], [0]])},  # padded on the left
    {"key_padding_mask": (np.arange(6) < 2) | (np.arange(6) > np.array([[3], [4]]))},  # on both sides
    {"key_padding_mask": np.zeros((2, 6), bool)},
    {"attn_mask": np.zeros((6, 6))},
], ids=str)
def test_no_warnings(call):
    assert warnings_of(layer(8, 2, batch_first=True), normal((2, 6, 8)), **call) == ()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked_rows", ["torch", "zero"])
def test_rows_that_see_nothing(need_weights, masked_rows):
    module, x = layer(8, 2, masked_rows=masked_rows), normal((6, 2, 8))
    padding = np.array([[False] * 6, [True] * 6])
    explanation = mha_c.explain(module, x, x, x, padding, need_weights)
    np.testing.assert_array_equal(explanation.output, module(x, x, x, padding, need_weights)[0])
    if need_weights:
        weights = module(x, x, x, padding, average_attn_weights=False)[1]
        np.testing.assert_array_equal(explanation.weights, weights)
    expected = np.nan if need_weights and masked_rows == "torch" else 0.0
    for stage in ("weights", "average_weights", "head_outputs", "concatenated"):
        np.testing.assert_array_equal(explanation.stages[stage].array[1], expected)


# ------------------------------------------------------------------------------------------------ dropout


def test_dropout():
    module = layer(8, 4, dropout=0.5, training=True, dropout_seed=3)
    x = normal((5, 3, 8))
    for _ in range(3):
        first, again = mha_c.explain(module, x, x, x), mha_c.explain(module, x, x, x)
        output, weights = module(x, x, x, average_attn_weights=False)  # counts as a call, looking does not
        for explanation in (first, again):
            np.testing.assert_array_equal(explanation.output, output)
            np.testing.assert_array_equal(explanation.weights, weights)
        before = first.weights_before_dropout
        np.testing.assert_array_equal(before, module_without_dropout(module)(x, x, x, average_attn_weights=False)[1])
        np.testing.assert_array_equal(first.weights[first.weights != 0], 2 * before[first.weights != 0])
        dropped = int(((before != 0) & (first.weights == 0)).sum())
        assert f"It dropped {dropped} of {before.size} weights" in str(first).replace("\n", " ")
    with pytest.raises(ValueError, match=r"drops weights \(dropout=0.5\).*eval\(\)"):
        mha_c.explain(module, x, x, x, heads=1)
    quiet = mha_c.explain(module.eval(), x, x, x, heads=1)
    assert "Dropout is off" in str(quiet) and "weights_before_dropout" not in quiet.stages


def module_without_dropout(module):
    import copy

    return copy.copy(module).eval()


# ------------------------------------------------------------------------------------------------ errors


def test_errors():
    module, x, _ = question("plain", "none")
    says = ("explain takes a MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder or "
            "TransformerDecoder of mha_c or torch.nn, but got torch.nn")
    with pytest.raises(TypeError, match=f"{says}.*Linear$"):
        mha_c.explain(torch.nn.Linear(8, 2), *x)
    with pytest.raises(TypeError, match=f"{says}.*Sequential. It holds 0: pass that layer$"):
        mha_c.explain(torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2)), *x)
    for name, right in (("head", "heads"), ("stage", "stages"), ("attn_masks", "attn_mask")):
        with pytest.raises(TypeError, match=f"argument '{name}'. Write {right}=0 instead of {name}=0."):
            mha_c.explain(module, *x, **{name: 0})
    with pytest.raises(TypeError, match="unexpected keyword argument 'xyz'$"):
        mha_c.explain(module, *x, xyz=0)
    with pytest.raises(ValueError, match="there is no stage 'weight'; the stages are q, k"):
        mha_c.explain(module, *x, stages=["weight"])
    for heads in (4, -5, [0, 9]):
        with pytest.raises(IndexError, match="there is no head"):
            mha_c.explain(module, *x, heads=heads)
    for heads in ([1, 1], [1, -3], []):
        with pytest.raises(ValueError, match="heads must name one head or more, each once"):
            mha_c.explain(module, *x, heads=heads)
    with pytest.raises(TypeError):
        mha_c.explain(module, *x, heads="0")
    with pytest.raises(AttributeError, match="no attribute 'weigths'"):
        mha_c.explain(module, *x).weigths


@pytest.mark.parametrize("change", [
    {"query": normal((5, 3, 9))}, {"key": normal((7, 2, 8))}, {"query": [1.0]}, {"attn_mask": np.zeros((5, 6), bool)},
    {"attn_mask": np.zeros((5, 7), int)}, {"key_padding_mask": np.zeros((3, 6), bool)},
    {"value": normal((7, 3, 8), "float64")},
], ids=lambda change: next(iter(change)))
@pytest.mark.parametrize("heads", [None, 0])
def test_errors_of_the_layer(change, heads):
    module, x, _ = question("plain", "none")
    call = dict(zip(("query", "key", "value"), x)) | change
    with pytest.raises(Exception) as its:  # noqa: PT011 - the point is to compare
        module(**call)
    with pytest.raises(its.type, match=re.escape(str(its.value))):
        mha_c.explain(module, **call, heads=heads)


# ------------------------------------------------------------------------------------------------ how it is shown


def parse(html):
    """As XML, which is stricter than HTML; nothing may be loaded or run."""
    tree = ElementTree.fromstring(html)
    assert not re.search(r"<script|https?:|url\(|@import|\son\w+=", html)
    return tree


@pytest.mark.parametrize("name", LAYERS)
def test_html(name):
    module, x, call = question(name, "all")
    explanation = mha_c.explain(module, *x, **call)
    tree = parse(explanation._repr_html_())
    assert len(tree.findall(".//details")) == len(explanation.stages) + 1
    texts = ["".join(node.itertext()) for node in tree.findall(".//svg//text")]
    for stage in explanation.stages.values():
        assert stage.name == "average_weights" or str(stage.shape) in texts
    assert [str(x[0].shape), str(x[1].shape), str(x[2].shape)] == [texts[2], texts[5], texts[8]]


def test_html_says_what_is_wrong_and_what_is_missing():
    module, x = layer(8, 2, batch_first=True), normal((2, 6, 8))
    explanation = mha_c.explain(module, x, x, x, attn_mask=np.tri(6, dtype=bool), stages=["weights"], heads=1)
    html = explanation._repr_html_()
    parse(html)
    assert html.count('<p class="warning">') == len(explanation.warnings) == 2
    assert html.count("not asked for") == 11
    assert "NaN" in html and "head 1" in html


def test_html_of_large_inputs_is_small():
    module, x = layer(64, 16, batch_first=True), normal((2, 700, 64))
    html = mha_c.explain(module, x, x, x, is_causal=True)._repr_html_()
    parse(html)
    assert len(html) < 400_000 and "700 × 700 in bins of 11 × 11, columns added, rows averaged" in html


def test_html_without_matplotlib(monkeypatch):
    """Large matrices are tables of bins; rows of weights still add up to 1."""
    module, x = layer(64, 4, batch_first=True), normal((1, 100, 64))
    explanation = mha_c.explain(module, x, stages="weights")
    assert "<img" in explanation._repr_html_()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.image", None)
    tree = parse(explanation._repr_html_())
    tables = tree.findall(".//table[@class='cells']")
    assert len(tables) == 4 and "100 × 100 in bins of 9 × 9, columns added, rows averaged" in explanation._repr_html_()
    for row in tables[0].findall("tbody/tr"):
        assert len(row.findall("td")) == 12
        assert sum(float(cell.text) for cell in row.findall("td")) == pytest.approx(1, abs=12 * 0.005)


def test_pictures_have_the_colours_of_their_numbers():
    """Blue above 0, orange below, stronger the further; grey is hidden, and NaN has a colour of its own."""
    image = pytest.importorskip("matplotlib.image")
    from mha_c.display.html import matrix

    values = np.tile(np.linspace(-1, 1, 20), (20, 1))
    values[0], values[1] = -np.inf, np.nan
    source = re.search('base64,([^"]+)"', matrix(values, "query", "key")).group(1)
    pixels = np.rint(255 * image.imread(io.BytesIO(base64.b64decode(source)), format="png"))
    assert pixels.shape == (20, 20, 4)
    orange, blue = pixels[2, 0], pixels[2, -1]
    assert orange[0] > orange[1] > orange[2] and blue[0] < blue[1] < blue[2]
    assert (np.diff(pixels[2, :10, 3]) < 0).all() and (np.diff(pixels[2, 10:, 3]) >= 0).all()
    assert len(set(pixels[0, 0, :3])) == 1 and (pixels[1, 0] == pixels[1, 5]).all() and pixels[1, 0, 3] == 255


def test_bins():
    """Means of what is finite; rows of weights add up to the same as before."""
    from mha_c.display.cells import bins

    values = np.arange(35.0).reshape(5, 7)
    values[0, 0], values[1, 1], values[4] = np.nan, np.inf, -np.inf
    binned = bins(values, (2, 3))
    assert binned.shape == (3, 3)
    assert binned[0, 0] == np.mean([1, 2, 7, 9]) and binned[0, 2] == np.mean([6, 13]) and (binned[2] == -np.inf).all()
    np.testing.assert_array_equal(bins(np.full((3, 2), np.nan), (2, 2)), np.full((2, 1), np.nan))
    weights = np.random.default_rng(0).dirichlet(np.ones(7), 5)
    added = bins(weights, (2, 3), add_columns=True)
    np.testing.assert_allclose(added.sum(axis=1), 1)
    assert added[0, 2] == pytest.approx(weights[:2, 6].mean())


def test_text():
    module, x, call = question("grouped", "all")
    explanation = mha_c.explain(module, *x, **call)
    text = repr(explanation)
    assert text == str(explanation) and max(map(len, text.splitlines()[1:])) <= 120
    for stage in explanation.stages.values():
        assert re.search(rf"^{stage.name} .*{re.escape(str(stage.shape))}.* {stage.nbytes:,} ", text, re.MULTILINE)
    assert "N = 3, L = 5, S = 7, H = 6, Hkv = 2, D = 2, Dv = 3, E = 12" in text
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=200, record=True, file=sys.stderr)
    console.print(explanation)
    assert "masked_scores" in console.export_text()


@pytest.mark.parametrize("precision, multiplied", [
    ("int8", "int8 in in_proj and out_proj; bfloat16 in attention"),
    ("float32", "float32 in in_proj, attention and out_proj"),
    ("bfloat16", "bfloat16 in in_proj, attention and out_proj"),
    ({"default": "int8", "attention": None, "out_proj": "bfloat16"},
     "int8 in in_proj; float32 in attention; bfloat16 in out_proj"),
])  # fmt: skip
def test_narrow_products(precision, multiplied):
    module, x = mha_c.MultiheadAttention(8, 2).eval(), np.ones((3, 1, 8), np.float32)
    assert "Numbers that are multiplied" not in str(mha_c.explain(module, x))
    module.matmul_precision = precision
    explanation = mha_c.explain(module, x)
    assert explanation.notes[-1] == f"Numbers that are multiplied: {multiplied}."
    assert explanation.notes[-1] in str(explanation) and explanation.notes[-1] in explanation._repr_html_()


def test_operations():
    """2 for each term of a product; those of scores are there for each pair of query and key."""
    module, x, call = question("plain", "causal")
    counts = {name: stage.operations for name, stage in mha_c.explain(module, *x, **call).stages.items()}
    pairs = N * 4 * L * S
    assert counts["q"] == 2 * N * L * 8 * 8 and counts["k"] == counts["v"] == 2 * N * S * 8 * 8
    assert counts["scores"] == counts["head_outputs"] == 2 * pairs * 2
    assert counts["masked_scores"] == pairs and counts["weights"] == 5 * pairs
    assert counts["output"] == 2 * N * L * 8 * 8 and counts["q_heads"] == counts["concatenated"] == 0


def test_it_can_be_pickled():
    module, x, _ = question("plain", "none")
    explanation = mha_c.explain(module, *x)
    again = pickle.loads(pickle.dumps(explanation))
    assert str(again) == str(explanation)
    np.testing.assert_array_equal(again.weights, explanation.weights)


def test_import_stays_light():
    run_child("""
        import sys
        import mha_c
        assert "explain" in dir(mha_c) and "explain" in mha_c.__all__
        assert not {"mha_c.explanation", "mha_c.check", "mha_c.display.html"} & set(sys.modules)
        assert callable(mha_c.explain)
    """)
