# SPDX-License-Identifier: Apache-2.0
"""torch's functions of attention inside ``with mha_c.torch.attention()``: torch outside of it is the judge."""

import copy
import gc
import math
import random
import threading
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
from helpers import outcome

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from mha_c import _core  # noqa: E402
from mha_c.torch import attention, replace_attention  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.bias import causal_lower_right, causal_upper_left  # noqa: E402

sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    random.seed(0)


def heads(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def beside(*shape):
    """Heads beside each other in memory, as a projection leaves them: (N, H, L, D) from (N, L, H, D)."""
    n, h, length, d = shape
    return torch.randn(n, length, h, d).transpose(1, 2)


def inside(function, *args, **kwargs):
    """The result within the block, which must have computed it."""
    with attention() as coverage:
        result = function(*args, **kwargs)
    assert (coverage.here, coverage.left) == (1, 0), coverage
    return result


def assert_close(got, want, exact):
    """Errors of the size of torch's: where that happens to make none, of the roundings of some dozen additions."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    if exact.numel():
        def error(x):
            return (x - exact).abs().nan_to_num().max()
        assert error(got) <= 4 * error(want) + 64 * torch.finfo(want.dtype).eps * exact.abs().nan_to_num().max()


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


# ---------------------------------------------------------------------------------- scaled_dot_product_attention


def random_call():
    """Arguments as torch takes them: 2 to 5 axes, broadcast or grouped heads, masks of any kind, any memory."""
    axes = random.choice([2, 3, 4, 4, 4, 5])
    length, s, e = random.choice([2, 3, 8, 33]), random.choice([1, 2, 7, 65]), random.choice([1, 4, 8, 20])
    ev = random.choice([e, e, 3])
    lead = [random.choice([1, 2, 4]) for _ in range(axes - 2)]
    key_lead, options = list(lead), {}
    if axes > 2 and random.random() < 0.3:
        options["enable_gqa"] = True
        key_lead[-1] = random.choice([h for h in (1, 2, 4) if lead[-1] % h == 0])
    elif axes > 2 and random.random() < 0.3:
        key_lead[random.randrange(axes - 2)] = 1
    dtype = random.choice([torch.float32, torch.float32, torch.float64])
    query, key, value = heads(*lead, length, e), heads(*key_lead, s, e), heads(*key_lead, s, ev)
    if axes > 2 and random.random() < 0.5:
        query, key, value = (x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in (query, key, value))
    if random.random() < 0.2:
        key, value = heads(*key_lead, e, s).mT, heads(*key_lead, 2 * s, ev)[..., ::2, :]
    if random.random() < 0.1:
        key = heads(*key_lead, 1, e).expand(*key_lead, s, e)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if random.random() < 0.3:
        options["scale"] = random.choice([1, 0.3, 2.5])
    kind = random.choice(["none", "causal", "bool", "float"])
    if kind == "causal":
        options["is_causal"] = True
    elif kind != "none":
        mask_lead = random.choice([[], [1] * (axes - 2), lead])
        shape = (*mask_lead, random.choice([1, length]), random.choice([1, s]))
        options["attn_mask"] = torch.rand(shape) > 0.3 if kind == "bool" else torch.randn(shape, dtype=dtype)
    return (query, key, value), options


def test_random_calls():
    ratios = []
    for _ in range(300):
        tensors, options = random_call()
        given = [x.clone() for x in tensors]
        want = sdpa(*tensors, **options)
        exact = sdpa(*map(double, tensors), **{name: double(option) for name, option in options.items()})
        got = inside(sdpa, *tensors, **options)
        assert_close(got, want, exact)
        assert got.stride() == want.stride()
        assert all(torch.equal(x, y) for x, y in zip(tensors, given, strict=True))
        if want.dtype == torch.float32:
            ours, theirs = ((x - exact).square().mean() for x in (got, want))
            ratios.append(float(ours / theirs))
    assert np.nanmedian(ratios) <= 1.1


def test_a_result_is_memory_of_its_own():
    q = beside(2, 4, 5, 8)
    results = [inside(sdpa, q, q, q) for _ in range(2)]
    assert len({x.data_ptr() for x in (q, *results)}) == 3
    results[0].fill_(7.0)
    assert torch.equal(results[1], inside(sdpa, q, q, q))


@pytest.mark.parametrize("merge", [
    lambda y: y.transpose(1, 2).view(2, 5, 32), lambda y: y.transpose(1, 2).contiguous().view(2, 5, 32),
    lambda y: y.transpose(1, 2).reshape(2, 5, -1), lambda y: y.permute(0, 2, 1, 3).flatten(2),
    lambda y: y.view(2, 4, 5, 2, 4), lambda y: torch.channels_last and y.view(8, 5, 8), lambda y: y.mT.contiguous()])
@pytest.mark.parametrize("make", [heads, beside])
def test_what_models_do_with_the_result(make, merge):
    """view() works here where it works on torch's result."""
    q = make(2, 4, 5, 8)
    want = outcome(lambda: [merge(sdpa(q, q, q)).numpy()])
    got = outcome(lambda: [merge(inside(sdpa, q, q, q)).numpy()])
    assert type(got.error) is type(want.error)
    if want.error is None:
        np.testing.assert_allclose(got.result[0], want.result[0], atol=1e-6)


def test_torchs_kernel_decides_about_the_layout():
    q = beside(2, 4, 5, 8)
    with sdpa_kernel(SDPBackend.MATH):
        assert inside(sdpa, q, q, q).is_contiguous() and sdpa(q, q, q).is_contiguous()
    assert not inside(sdpa, q, q, q).is_contiguous() and not sdpa(q, q, q).is_contiguous()


@pytest.mark.parametrize("bias", [causal_upper_left(5, 7), causal_lower_right(5, 7), causal_lower_right(7, 7)])
def test_causal_biases(bias):
    q, k = heads(2, 4, bias.seq_len_q, 8), heads(2, 4, 7, 8)
    exact = sdpa(q.double(), k.double(), k.double(), bias)
    assert_close(inside(sdpa, q, k, k, bias), sdpa(q, k, k, bias), exact)
    assert_close(inside(sdpa, q, k, k, attn_mask=bias), sdpa(q, k, k, bias), exact)


def test_hidden_rows_are_zero():
    q, mask = heads(2, 4, 5, 8), torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    for given in mask, torch.zeros(5, 5).masked_fill(~mask, -math.inf):
        assert torch.equal(inside(sdpa, q, q, q, given)[..., 2, :], torch.zeros(2, 4, 8))


q, k = heads(2, 4, 5, 8), heads(2, 4, 7, 8)
LEFT = {  # the arguments, and the reason
    "dropout": ((q, k, k), {"dropout_p": 1.0}),
    "one query": ((q[:, :, :1], k, k), {}),
    "attn_mask with is_causal": ((q, k, k), {"attn_mask": torch.ones(5, 7), "is_causal": True}),
    "unusual scale": ((q, k, k), {"scale": 0.0}),
    "mask in float32": ((q.double(), k.double(), k.double()), {"attn_mask": torch.randn(5, 7)}),
    "gradients": ((q.clone().requires_grad_(), k, k), {}),
    "tensors on meta": ((q.to("meta"), k.to("meta"), k.to("meta")), {}),
    "tensors that NumPy cannot read": ((q._neg_view(), k, k), {}),
    "arguments that do not fit": ((q, k, k[:, :, :3]), {}),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_to_torch(reason):
    tensors, options = LEFT[reason]
    want = sdpa(*tensors, **options)
    with attention() as coverage:
        got = sdpa(*tensors, **options)
    assert got.is_meta or torch.equal(got, want)
    assert coverage.rows[0] == ("", "scaled_dot_product_attention", 0, 1, reason)


def nested():
    return torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(("reason", "make"), [
    ("NestedTensor", lambda: nested().unflatten(-1, [2, 4]).transpose(1, 2)),
    ("Subclass", lambda: q.as_subclass(Subclass))])
def test_subclasses_are_left_to_torch(reason, make):
    x = make()
    with attention() as coverage:
        assert type(sdpa(x, x, x)) is type(x)
    assert coverage.rows[0].reason == reason


WRONG = [
    {"query": "query"}, {"key": None}, {"value": k.numpy()}, {"attn_mask": "mask"}, {"attn_mask": k.numpy()},
    {"attn_mask": torch.ones(5, 7, dtype=torch.int64)}, {"attn_mask": torch.ones(3, 5, 7)}, {"attn_mask": torch.ones(7)},
    {"attn_mask": torch.ones(())}, {"dropout_p": "0"}, {"dropout_p": 1.5}, {"is_causal": 1}, {"is_causal": "yes"},
    {"scale": "1"}, {"scale": [1.0]}, {"enable_gqa": None}, {"enable_gqa": True, "key": heads(2, 3, 7, 8)},
    {"key": heads(2, 3, 7, 8)}, {"key": heads(2, 4, 7, 9)}, {"value": heads(3, 4, 7, 8)}, {"key": heads(8)},
    {"key": k.double()}, {"key": k.int()}, {"query": q.int(), "key": k.int(), "value": k.int()}, {"no_such": 1}]


@pytest.mark.parametrize("wrong", WRONG, ids=", ".join)
def test_errors_are_torchs(wrong):
    arguments = {"query": q, "key": k, "value": k, **wrong}
    want = outcome(lambda: sdpa(**arguments)).error
    with attention():
        got = outcome(lambda: sdpa(**arguments)).error
    assert want is not None and type(got) is type(want) and str(got) == str(want)


GARBAGE = [
    None, True, -1, 2**63, 0.5, math.nan, "torch", [], {}, object(), torch.zeros(()), torch.zeros(0), torch.zeros(7),
    torch.zeros(5, 3, 8), torch.zeros(5, 7, dtype=torch.float64), torch.ones(5, 7, dtype=torch.bool), torch.ones(5, 5),
    torch.ones(5, 7, dtype=torch.int64), heads(2, 4, 7, 8).to_sparse(), heads(2, 2, 7, 8), heads(2, 4, 6, 8), heads(7, 8),
    heads(3, 2, 4, 7, 8), heads(2, 4, 0, 8), torch.zeros(24, 8), torch.zeros(8, 8), np.zeros((8, 8)), q.half(),
    torch.zeros(2, 4, 7, 8, dtype=torch.complex64), torch.zeros(3, 5, dtype=torch.bool), torch.zeros(1, 1, 8)]
WHOLE = {  # calls with every argument
    sdpa: {"query": q, "key": k, "value": k, "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None,
           "enable_gqa": False},
    F.multi_head_attention_forward: {
        **dict.fromkeys(("query", "key", "value"), torch.zeros(5, 3, 8)), "embed_dim_to_check": 8, "num_heads": 2,
        "in_proj_weight": torch.ones(24, 8), "in_proj_bias": torch.ones(24), "bias_k": None, "bias_v": None,
        "add_zero_attn": False, "dropout_p": 0.0, "out_proj_weight": torch.ones(8, 8), "out_proj_bias": torch.ones(8),
        "training": False, "key_padding_mask": None, "need_weights": True, "attn_mask": None,
        "use_separate_proj_weight": False, **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight")),
        "static_k": None, "static_v": None, "average_attn_weights": True, "is_causal": False}}
VARIANTS = {
    sdpa: [{}, {"is_causal": True}, {"enable_gqa": True}, {"attn_mask": torch.ones(5, 7)}],
    F.multi_head_attention_forward: [{}, {"need_weights": False}, {"use_separate_proj_weight": True, **dict.fromkeys(
        ("q_proj_weight", "k_proj_weight", "v_proj_weight"), torch.ones(8, 8))}]}


@pytest.mark.parametrize("function", WHOLE, ids=lambda function: function.__name__)
@pytest.mark.filterwarnings("ignore")
def test_garbage_for_each_argument(function):
    """The same results as torch's, or the same errors."""
    def ask(arguments):
        made = outcome(lambda: function(**arguments))
        return made.error, made.result[:1] if isinstance(made.result, tuple) else [made.result]

    for variant in VARIANTS[function]:
        for name in WHOLE[function]:
            for garbage in GARBAGE:
                arguments = {**WHOLE[function], **variant, name: garbage}
                if name == "dropout_p" and isinstance(garbage, float):
                    continue  # a random result
                want_error, want = ask(arguments)
                with attention():
                    error, got = ask(arguments)
                assert type(error) is type(want_error) and str(error) == str(want_error), (name, garbage)
                for ours, theirs in zip(got, want, strict=True):
                    assert error or torch.allclose(ours, theirs, atol=1e-5, equal_nan=True), (name, garbage)


def test_too_many_positional_arguments():
    want = outcome(lambda: sdpa(q, k, k, None, 0.0, False, 1.0)).error
    with attention():
        got = outcome(lambda: sdpa(q, k, k, None, 0.0, False, 1.0)).error
    assert isinstance(got, TypeError) and str(got) == str(want)


@pytest.mark.parametrize("function", ["scaled_dot_product_attention", "forward"])
def test_errors_after_the_checks_are_not_hidden(function, monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault in the kernels")

    monkeypatch.setattr(_core, function, fail)
    layer, x = nn.MultiheadAttention(8, 2).eval(), torch.zeros(5, 3, 8)
    call = (lambda: sdpa(q, k, k)) if function.startswith("scaled") else lambda: layer(x, x, x)
    with torch.no_grad(), attention(), pytest.raises(RuntimeError, match="a fault in the kernels"):
        call()


@pytest.mark.parametrize("shapes", [
    ((2, 4, 0, 8), (2, 4, 7, 8)), ((2, 4, 5, 8), (2, 4, 0, 8)), ((0, 4, 5, 8), (0, 4, 7, 8)), ((2, 0, 5, 8), (2, 0, 7, 8)),
    ((2, 4, 5, 0), (2, 4, 7, 0)), ((0, 8), (0, 8)), ((3, 0, 8), (3, 2, 8)), ((1, 0, 8), (2, 7, 8)),
    ((1, 5, 8), (2, 0, 8))])
def test_nothing(shapes):
    """torch computes it: it does not broadcast the leading axes."""
    query, key = heads(*shapes[0]), heads(*shapes[1])
    want = sdpa(query, key, key)
    with attention() as coverage:
        got = sdpa(query, key, key)
    assert got.shape == want.shape and torch.equal(got, want)
    assert coverage.left == 1


def test_large_strides_and_repeated_keys():
    far = torch.randn(2, 4, 6, 3000)[..., 5:5 + 8]
    one = torch.randn(1, 1, 6, 8).expand(2, 4, 6, 8)
    same = torch.randn(8).expand(2, 4, 6, 8)
    for key in far, one, same, far.flip(2), torch.randn(2, 4, 8, 6).mT:
        want = sdpa(far, key, key)
        assert_close(inside(sdpa, far, key, key), want, sdpa(far.double(), key.double(), key.double()))


# ---------------------------------------------------------------------------------- multi_head_attention_forward


def attention_layer(**options):
    layer = nn.MultiheadAttention(options.pop("embed_dim", 16), 4, **options).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


LAYERS = {
    "plain": {}, "without bias": {"bias": False}, "widths": {"kdim": 6, "vdim": 10}, "batch first": {"batch_first": True},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True}, "float64": {"dtype": torch.float64}}
CALLS = {
    "weights": {}, "no weights": {"need_weights": False}, "each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.arange(6) > torch.tensor([[5], [3], [4]])},
    "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(6), "is_causal": True, "need_weights": False},
    "hidden": {"attn_mask": torch.rand(12, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.8}}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_torchs_layer_inside(kind, call):
    """It calls the function, which is computed here."""
    layer, arguments = attention_layer(**LAYERS[kind]), dict(CALLS[call])
    if LAYERS[kind].get("dtype") and call == "causal":
        arguments["attn_mask"] = arguments["attn_mask"].double()
    n, length = (3, 6) if layer.batch_first else (6, 3)
    tensors = [torch.randn(n, length, width, dtype=layer.out_proj.weight.dtype)
               for width in (layer.embed_dim, layer.kdim, layer.vdim)]
    want = layer(*tensors, **arguments)
    exact = copy.deepcopy(layer).double()(*map(double, tensors), **{
        name: double(argument) for name, argument in arguments.items()})
    with attention() as coverage:
        got = layer(*tensors, **arguments)
    if kind == "extra keys" and call == "causal":  # which hides them in torch
        assert coverage.rows[0].reason == "is_causal with added keys"
        return
    assert coverage.rows == (("", "multi_head_attention_forward", 1, 0, ""),)
    for ours, theirs, right in zip(got, want, exact, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs, right)
            assert ours.stride() == theirs.stride()


def separate(width=16, kdim=None, out=None):
    """Parameters of their own for each projection, as CLIP's pooling and WavLM have them."""
    kdim = kdim or width
    weights = {f"{name}_proj_weight": torch.randn(width, depth) / 4
               for name, depth in (("q", width), ("k", kdim), ("v", kdim))}
    return {"use_separate_proj_weight": True, **weights, "biases": torch.randn(3, width).unbind(),
            "out": torch.randn(out or width, width) / 4}


def call_separate(parameters, query, key, **options):
    """The bias is put together in each call."""
    given = {name: parameter for name, parameter in parameters.items() if name not in ("biases", "out")}
    given |= {"add_zero_attn": False, "dropout_p": 0.0, "training": False, **options}
    return F.multi_head_attention_forward(
        query, key, key, query.shape[-1], 4, torch.empty(0), torch.cat(parameters["biases"]), None, None,
        out_proj_weight=parameters["out"], out_proj_bias=None, **given)


@pytest.mark.parametrize("widths", [{}, {"kdim": 6}, {"out": 5}], ids=str)
def test_separate_projections(widths):
    parameters = separate(**widths)
    query, key = torch.randn(7, 3, 16), torch.randn(9, 3, widths.get("kdim", 16))
    with torch.no_grad():
        want, got = call_separate(parameters, query, key)[0], inside(call_separate, parameters, query, key)[0]
    assert torch.allclose(got, want, atol=1e-5) and got.shape[-1] == widths.get("out", 16)


MHA_LEFT = {  # what the call is given, and the reason
    "static keys or values": {"static_k": torch.randn(12, 9, 4), "static_v": torch.randn(12, 9, 4)},
    "dropout": {"training": True, "dropout_p": 1.0},
    "mask in float64": {"key_padding_mask": torch.zeros(3, 9, dtype=torch.float64), "attn_mask": torch.zeros(7, 9)},
    "is_causal with added keys": {
        "is_causal": True, "attn_mask": torch.zeros(7, 9), "need_weights": False, "add_zero_attn": True},
}


@pytest.mark.parametrize("reason", MHA_LEFT)
def test_what_the_layers_function_leaves_to_torch(reason):
    parameters, query, key, options = separate(), torch.randn(7, 3, 16), torch.randn(9, 3, 16), MHA_LEFT[reason]
    with torch.no_grad():
        want = outcome(lambda: [call_separate(parameters, query, key, **options)[0].numpy()])
        with attention() as coverage:
            got = outcome(lambda: [call_separate(parameters, query, key, **options)[0].numpy()])
    assert str(got.error) == str(want.error) and (got.error or np.array_equal(got.result[0], want.result[0]))
    assert coverage.rows[0] == ("", "multi_head_attention_forward", 0, 1, reason)


@pytest.fixture
def packings(monkeypatch):
    """How many times parameters were packed so far."""
    made = []
    original = _core.Weights
    monkeypatch.setattr("mha_c.parameters.sets._core.Weights", lambda *args: made.append(1) or original(*args))
    return made


def test_parameters_are_packed_once_in_a_block(packings):
    parameters, x, layers = separate(), torch.randn(7, 3, 16), [attention_layer() for _ in range(3)]
    with torch.no_grad(), attention() as coverage:
        for _ in range(4):
            call_separate(parameters, x, x)
            for layer in layers:
                layer(x, x, x)
    assert len(packings) == 4 and (coverage.here, coverage.left) == (16, 0)


def test_weights_that_are_new_in_each_call_are_not_kept():
    """weight_norm makes another out_proj.weight for each call; the other parameters stay."""
    module = nn.MultiheadAttention(8, 2).eval()
    nn.utils.parametrizations.weight_norm(module.out_proj, "weight")
    x = torch.randn(5, 1, 8)
    with torch.no_grad(), attention() as coverage:
        for _ in range(20):
            module(x, x, x)
            gc.collect()
        alive = [one for one in gc.get_objects() if type(one).__name__ == "PackedParameters" and one._kept is not None]
    assert len(alive) <= 3 and len(coverage.rows) == 1


def test_nested_tensors_and_masks_of_one_axis():
    """Both have fewer axes than others, and torch has answers."""
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)])
    query, key, mask = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 0, 8), torch.zeros(1)
    want = [sdpa(nested, nested, nested), sdpa(query, key, key, mask)]
    with attention() as coverage:
        got = [sdpa(nested, nested, nested), sdpa(query, key, key, mask)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got[0].unbind(), want[0].unbind()))
    assert torch.equal(got[1], want[1])
    assert coverage.rows[0].reason == "nested tensors (1), arguments that do not fit (1)"


def test_what_was_packed_goes_with_the_block():
    with torch.no_grad(), attention():
        layer, x = attention_layer(), torch.randn(7, 3, 16)
        layer(x, x, x)
    gone = weakref.ref(layer.in_proj_weight)
    del layer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("change", [
    lambda layer: layer.out_proj.weight.data.mul_(2), lambda layer: layer.in_proj_weight.add_(1),
    lambda layer: setattr(layer, "in_proj_weight", nn.Parameter(layer.in_proj_weight + 1)),
    lambda layer: layer.load_state_dict({name: tensor + 1 for name, tensor in layer.state_dict().items()}),
    lambda layer: layer.in_proj_bias.data.numpy().__setitem__(slice(None), 3.0)])
def test_changed_parameters_are_noticed(change):
    layer, x = attention_layer(), torch.randn(7, 3, 16)
    with torch.no_grad(), attention() as coverage:
        before = layer(x, x, x)[0]
        change(layer)
        after = layer(x, x, x)[0]
    assert coverage.here == 2
    with torch.no_grad():
        want = layer(x, x, x)[0]
    assert torch.allclose(after, want, atol=1e-4) and not torch.allclose(before, want, atol=1e-2)


def test_fused_optimisers_are_noticed():
    layer, x = attention_layer(), torch.randn(7, 3, 16)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, fused=True)
    with attention() as coverage:
        for _ in range(3):
            layer.train()
            optimizer.zero_grad()
            layer(x, x, x)[0].square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                got = layer.eval()(x, x, x)[0]
    with torch.no_grad():
        assert torch.allclose(got, layer(x, x, x)[0], atol=1e-5)
    assert coverage.rows == (("", "multi_head_attention_forward", 3, 3, "gradients"),)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_call_for_training_makes_the_next_one_pack_anew(dropout):
    """After it anything may change the parameters, single numbers of them too, without telling torch."""
    layer, x = attention_layer(dropout=dropout), torch.randn(7, 3, 16)
    with attention() as coverage:
        for training in False, True, False:
            with torch.set_grad_enabled(training):
                got = layer.train(training)(x, x, x)[0]
            if training:
                layer.in_proj_weight.data[5, 3] += 9
    assert coverage.rows[0][2:] == (2, 1, "dropout" if dropout else "gradients")
    with torch.no_grad():
        assert torch.allclose(got, layer(x, x, x)[0], atol=1e-4)


MHA_WRONG = [
    {"embed_dim_to_check": 6}, {"num_heads": 3}, {"key": torch.zeros(5, 3, 7)}, {"key": None}, {"query": "x"},
    {"attn_mask": torch.zeros(2, 5)}, {"attn_mask": "mask"}, {"key_padding_mask": torch.zeros(5, 3)}, {"is_causal": True},
    {"is_causal": None, "need_weights": False}, {"in_proj_weight": None}, {"in_proj_weight": torch.zeros(24, 7)},
    {"out_proj_weight": None}, {"out_proj_weight": torch.zeros(8, 7)}, {"use_separate_proj_weight": True},
    {"bias_k": torch.zeros(1, 1, 8)}, {"static_k": torch.zeros(1, 5, 4)}, {"dropout_p": 1.5, "training": True},
    {"query": torch.zeros(8)}, {"query": torch.zeros(5, 3, 8, dtype=torch.float64)}]


@pytest.mark.parametrize("wrong", MHA_WRONG, ids=str)
def test_errors_of_the_layers_function_are_torchs(wrong):
    x = torch.zeros(5, 3, 8)
    arguments = {
        "query": x, "key": x, "value": x, "embed_dim_to_check": 8, "num_heads": 2, "in_proj_weight": torch.zeros(24, 8),
        "in_proj_bias": None, "bias_k": None, "bias_v": None, "add_zero_attn": False, "dropout_p": 0.0,
        "out_proj_weight": torch.zeros(8, 8), "out_proj_bias": None, "training": False, **wrong}
    want = outcome(lambda: F.multi_head_attention_forward(**arguments)).error
    with attention():
        got = outcome(lambda: F.multi_head_attention_forward(**arguments)).error
    assert want is not None and type(got) is type(want) and str(got) == str(want)


@pytest.mark.parametrize("nested_path", [False, True])
@torch.no_grad()
def test_encoders_take_their_ordinary_path(nested_path):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested_path).eval()
    x, padding = torch.randn(3, 7, 16), torch.arange(7) > torch.tensor([[6], [3], [4]])
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        want = model(x, src_key_padding_mask=padding)
        with attention() as coverage:
            got = model(x, src_key_padding_mask=padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
    assert torch.allclose(got[~padding], want[~padding], atol=1e-5)
    assert (coverage.here, coverage.left) == (2, 0)


# ---------------------------------------------------------------------------------- the block


@torch.no_grad()
def test_replaced_layers_compute_themselves():
    layer, x = attention_layer(), torch.randn(7, 3, 16)
    replaced = replace_attention(copy.deepcopy(layer))
    with attention() as coverage:
        got = replaced(x, x, x)[0]
    assert not coverage.rows and torch.equal(got, replaced(x, x, x)[0])
    from mha_c.torch import coverage as coverage_of
    assert (coverage_of(replaced).here, coverage_of(replaced).left) == (2, 0)


def test_the_innermost_block_counts():
    with attention() as outer:
        sdpa(q, k, k)
        with attention() as inner:
            sdpa(q, k, k)
            sdpa(q, k, k, dropout_p=0.5)
        sdpa(q, k, k)
    assert [(coverage.here, coverage.left) for coverage in (outer, inner)] == [(2, 1), (1, 1)]


def test_a_block_ends_with_an_exception():
    with pytest.raises(KeyError), attention() as coverage:
        sdpa(q, k, k)
        raise KeyError
    sdpa(q, k, k)
    assert coverage.here == 1 and not torch.overrides._get_current_function_mode_stack()


def test_one_block_in_a_generator():
    def results():
        with attention() as coverage:
            yield coverage
            yield sdpa(q, k, k)

    running = results()
    coverage = next(running)
    next(running)
    running.close()
    sdpa(q, k, k)
    assert coverage.here == 1 and not torch.overrides._get_current_function_mode_stack()


def test_a_block_is_of_its_thread():
    results = []
    with attention() as coverage:
        thread = threading.Thread(target=lambda: results.append(sdpa(q, k, k)))
        thread.start()
        thread.join()
    assert not coverage.rows and torch.equal(results[0], sdpa(q, k, k))


def test_many_threads_with_blocks_of_their_own():
    layer, x, found = attention_layer(), torch.randn(7, 3, 16), []

    def run():
        with torch.no_grad(), attention() as coverage:
            results = [layer(x, x, x)[0] for _ in range(20)]
        found.append((coverage.here, coverage.left, results))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(here, left) for here, left, _ in found] == [(20, 0)] * 8
    assert all(torch.equal(result, found[0][2][0]) for _, _, results in found for result in results)


def test_inference_mode():
    with torch.inference_mode(), attention() as coverage:
        result = sdpa(q, k, k)
    assert result.is_inference() and coverage.here == 1


def test_gradients_flow_through_torch():
    x = q.clone().requires_grad_()
    with attention() as coverage:
        (gradient,) = torch.autograd.grad(sdpa(x, k, k).sum(), x)
    (want,) = torch.autograd.grad(sdpa(x, k, k).sum(), x)
    assert torch.equal(gradient, want) and coverage.rows[0].reason == "gradients"


def test_frozen_parameters_need_no_gradients():
    layer, x = attention_layer().requires_grad_(False), torch.randn(7, 3, 16)
    assert torch.is_grad_enabled() and inside(layer, x, x, x)[0].grad_fn is None


class Watching(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("context", "reason"), [
    (lambda: torch.autocast("cpu"), "autocast"), (Watching, "function mode"), (Dispatching, "dispatch mode"),
    (torch.autograd.forward_ad.dual_level, "forward-mode gradients")])
def test_what_watches_torch_sees_its_operations(context, reason):
    with context():
        want = sdpa(q, k, k)
        with attention() as coverage:
            got = sdpa(q, k, k)
    assert torch.equal(got, want) and coverage.rows[0].reason == reason


def test_torch_func():
    with attention() as coverage:
        mapped = torch.func.vmap(sdpa)(q, k, k)
        gradient = torch.func.grad(lambda x: sdpa(x, k, k).sum())(q)
    assert torch.equal(mapped, torch.func.vmap(sdpa)(q, k, k))
    assert torch.equal(gradient, torch.func.grad(lambda x: sdpa(x, k, k).sum())(q))
    assert coverage.here == 0 and coverage.left == 2


def test_a_default_device_changes_nothing():
    torch.set_default_device("cpu")
    try:
        inside(sdpa, q, k, k)
    finally:
        torch.set_default_device(None)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = attention_layer(batch_first=True)

    def forward(self, x):
        x = self.layer(x, x, x)[0].unflatten(-1, [4, 4]).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)


GRAPHS = {  # how they are made, and how many calls of attention are computed here when they run inside a block
    "jit.trace": (torch.jit.trace, 0),
    "jit.script": (lambda model, x: torch.jit.script(model), 0),
    "compile": (lambda model, x: torch.compile(model, backend="aot_eager"), 0),
    "export": (lambda model, x: torch.export.export(model, (x,)).module(), 0),
    "fx": (lambda model, x: torch.fx.symbolic_trace(model), 2),  # which calls the functions
}


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("made_inside", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_graphs_hold_torchs_attention(kind, made_inside):
    """Wherever they are made, their results are right outside and inside of a block."""
    (make, here), model, x = GRAPHS[kind], Model().eval(), torch.randn(2, 6, 16)
    want = model(x)
    with attention() if made_inside else nullcontext():
        graph = make(model, x)
        first = graph(x)
    second = graph(x)
    with attention() as coverage:
        third = graph(x)
    assert all(torch.allclose(result, want, atol=1e-5) for result in (first, second, third))
    assert coverage.here == here and coverage.left == 0


@torch.no_grad()
def test_copies_of_a_model_made_inside():
    layer, x = attention_layer(), torch.randn(7, 3, 16)
    with attention() as coverage:
        want = layer(x, x, x)[0]
        assert torch.equal(copy.deepcopy(layer)(x, x, x)[0], want)
    assert coverage.here == 2 and type(layer) is nn.MultiheadAttention
