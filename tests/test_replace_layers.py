# SPDX-License-Identifier: Apache-2.0
"""Whole layers of torch and of transformers computed by mha_c: the same model without mha_c is the judge, and its own
error against float64 is the tolerance."""

import ast
import copy
import gc
import importlib
import inspect
import pickle
import re
from pathlib import Path

import mha_c
import numpy as np
import pytest
from helpers import outcome
from mha_c.check import Comparison

torch = pytest.importorskip("torch")
from mha_c.torch import (  # noqa: E402
    ReplacedAttention,
    ReplacedLayer,
    coverage,
    replace_attention,
    replace_layers,
    restore_attention,
)
from mha_c.torch.attend import LayerState  # noqa: E402
from mha_c.torch.huggingface import _KNOWN, why_unknown  # noqa: E402
from random_parameters import set_random_parameters  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
causal = nn.Transformer.generate_square_subsequent_mask
ENCODER, DECODER = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def fused_path():
    """torch as it is outside these tests: it leaves out padding and fuses layers."""
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(False)


def make(cls, *args, **options):
    """A model with random parameters, and a replaced copy of it.

    Both are copies, because torch's copy of a decoder layer has relu in place of an activation that is a module.
    """
    theirs = copy.deepcopy(set_random_parameters(cls(*args, **options)).eval())
    return theirs, replace_layers(copy.deepcopy(theirs))


def wider(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_agrees(ours, theirs, args, call, here=1):
    """Equal to torch's error, with every call of a layer computed by mha_c."""
    before = coverage(ours).here
    with torch.no_grad():
        got, expected = ours(*args, **call), theirs(*args, **call)
        exact = copy.deepcopy(theirs).double()(*map(wider, args), **{key: wider(one) for key, one in call.items()})
    assert coverage(ours).here - before == here, coverage(ours)
    assert got.is_contiguous() and got.requires_grad == expected.requires_grad
    if theirs_in_double := expected.dtype == torch.float64:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    comparison = Comparison.measure("output", got.numpy(), expected.numpy(), exact.numpy())
    assert theirs_in_double or comparison.agrees, comparison


# ------------------------------------------------------------------------------------------- layers of torch


OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "norm_first": {"norm_first": True, "batch_first": True},
    "gelu": {"activation": "gelu", "layer_norm_eps": 0.1},
    "tanh": {"activation": nn.GELU("tanh"), "norm_first": True},
    "silu": {"activation": nn.functional.silu},
    "no bias": {"bias": False, "batch_first": True},
    "float64": {"dtype": torch.float64},
}


def attention_masks(items, queries, keys, dtype, heads=4, batched=True):
    """Masks of a call, with the names that come after "src_", "tgt_" and "memory_"."""
    padding = torch.arange(keys) >= torch.tensor([[keys], [3], [1]])[:items]
    padding = padding if batched else padding[1]
    triangle = torch.triu(torch.full((queries, keys), -torch.inf, dtype=dtype), 1)
    stacked = torch.randn(heads * (items if batched else 1), queries, keys, dtype=dtype)
    return [
        {},
        {"key_padding_mask": padding},
        {"key_padding_mask": torch.randn(padding.shape, dtype=dtype), "mask": stacked},
        {"mask": triangle},
        {"mask": triangle, "is_causal": True},
        {"mask": triangle < 0, "key_padding_mask": padding},
    ]


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "one item"])
@pytest.mark.parametrize("name", OPTIONS)
def test_encoder_layers(name, batched):
    options = OPTIONS[name]
    theirs, ours = make(ENCODER, 16, 4, 24, **options)
    dtype = theirs.linear1.weight.dtype
    x = torch.randn(*((3,) if batched else ()), 5, 16, dtype=dtype)
    x = x if not batched or options.get("batch_first") else x.transpose(0, 1)
    for masks in attention_masks(3, 5, 5, dtype, batched=batched):
        call = {name if name == "is_causal" else f"src_{name}": mask for name, mask in masks.items()}
        assert_agrees(ours, theirs, (x,), call)


@pytest.mark.parametrize("name", OPTIONS)
def test_decoder_layers(name):
    theirs, ours = make(DECODER, 16, 4, 24, **OPTIONS[name])
    dtype = theirs.linear1.weight.dtype
    inputs = [torch.randn(3, length, 16, dtype=dtype) for length in (5, 7)]
    if not OPTIONS[name].get("batch_first"):
        inputs = [x.transpose(0, 1) for x in inputs]
    for own, others in zip(attention_masks(3, 5, 5, dtype), attention_masks(3, 5, 7, dtype)[::-1], strict=True):
        call = {f"tgt_{name}": mask for name, mask in own.items()}
        assert_agrees(ours, theirs, inputs, call | {f"memory_{name}": mask for name, mask in others.items()})
    assert_agrees(ours, theirs, inputs[:1] * 2, {})  # the memory is the target


class OwnAttention(nn.MultiheadAttention):
    pass


def exchanged():
    """A decoder layer whose attention, of a subclass, has extra keys, and whose memory has another width."""
    layer = DECODER(16, 4, 24)
    layer.self_attn = OwnAttention(16, 2, add_bias_kv=True, add_zero_attn=True)
    layer.multihead_attn = nn.MultiheadAttention(16, 4, kdim=6, vdim=6, bias=False)
    layer.norm2.eps = 0.1
    return layer


@pytest.mark.parametrize("copied", [False, True])
def test_activations_that_are_modules(copied):
    """torch's copy of a decoder layer has relu as an attribute, which hides the module."""
    model = set_random_parameters(DECODER(16, 4, 24, activation=nn.GELU())).eval()
    model = copy.deepcopy(model) if copied else model
    given = torch.randn(5, 3, 16), torch.randn(7, 3, 16)
    with torch.no_grad():
        expected = model(*given)
        torch.testing.assert_close(replace_layers(model)(*given), expected)
    assert coverage(model).here == 1


def test_parts_that_attributes_hide():
    theirs, ours = make(ENCODER, 16, 4, 24)
    x = torch.randn(5, 3, 16)
    for hiding, reason in ((nn.Linear(24, 16).eval(), ""), (twice_the_first_16, "linear2 twice_the_first_16")):
        vars(theirs)["linear2"] = vars(ours)["linear2"] = hiding
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))
        assert coverage(ours).rows[0].reason == reason, coverage(ours)


@pytest.mark.parametrize("replace", [replace_attention, replace_layers])
def test_an_output_projection_that_an_attribute_hides(replace):
    theirs = set_random_parameters(nn.TransformerEncoder(ENCODER(16, 4, 24), 1)).eval()
    ours = replace(copy.deepcopy(theirs))
    hiding = nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16).eval()
    for model in theirs, ours:
        vars(model.layers[0].self_attn)["out_proj"] = hiding
    with torch.no_grad():
        x = torch.randn(5, 3, 16)
        torch.testing.assert_close(ours(x), theirs(x))
    assert coverage(ours).here == 1


def twice_the_first_16(x):
    return 2 * x[..., :16]


def test_attention_that_was_exchanged():
    theirs, ours = make(exchanged)
    assert_agrees(ours, theirs, (torch.randn(5, 3, 16), torch.randn(7, 3, 6)), {"tgt_mask": causal(5)})


def encoder(norm=None, **options):
    layer = ENCODER(16, 4, 24, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, norm)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}, {"batch_first": False}], ids=str)
def test_padded_rows_are_those_of_torch(options, norm, fused_path):
    """Also where torch's encoder leaves out padding, and has zeros in its place before the last norm."""
    theirs, ours = make(encoder, nn.LayerNorm(16) if norm else None, **options)
    x = torch.randn(3, 7, 16)
    first = theirs.layers[0].self_attn.batch_first
    x = x if first else x.transpose(0, 1)
    left = torch.arange(7) >= torch.tensor([[7], [4], [2]])
    with torch.no_grad():
        zeros = (encoder_without_norm(theirs)(x, src_key_padding_mask=left) == 0).all(-1)
    assert bool(zeros.any()) == (not options or "activation" in options)
    for call in (
        {}, {"src_key_padding_mask": left}, {"src_key_padding_mask": left.flip(1)},
        {"src_key_padding_mask": torch.zeros_like(left, dtype=x.dtype).masked_fill(left, -torch.inf)},
        {"src_key_padding_mask": torch.arange(7) >= torch.tensor([[5], [4], [0]])},  # an item without tokens
        {"src_key_padding_mask": left, "mask": causal(7)}, {"mask": causal(7)}, {"mask": causal(7), "is_causal": True},
    ):  # fmt: skip
        if call.get("src_key_padding_mask") is not None and "mask" not in call and not zeros.any():
            call = {**call, "src_key_padding_mask": call["src_key_padding_mask"][[0, 1, 1]]}  # torch's NaN is its own
        assert_agrees(ours, theirs, (x,), call, here=2)


def encoder_without_norm(model):
    model = copy.deepcopy(model)
    model.norm = None
    return model


def test_nested_tensors(fused_path):
    theirs, ours = make(ENCODER, 16, 4, 24, batch_first=True)
    items = [torch.randn(length, 16) for length in (3, 5, 1)]
    with torch.no_grad():
        expected, got = (layer(torch.nested.nested_tensor(items)) for layer in (theirs, ours))
    assert got.is_nested and coverage(ours).here == 1
    for one, other in zip(got.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6)


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer(batch_first, fused_path):
    theirs, ours = make(nn.Transformer, 16, 4, 2, 2, 24, batch_first=batch_first)
    source, target = (torch.randn(3, steps, 16) for steps in (7, 5))
    source, target = (x if batch_first else x.transpose(0, 1) for x in (source, target))
    padding = torch.arange(7) >= torch.tensor([[7], [4], [2]])
    for call in ({}, {"tgt_mask": causal(5), "src_key_padding_mask": padding, "memory_key_padding_mask": padding}):
        assert_agrees(ours, theirs, (source, target), call, here=4)


def test_hidden_nan_does_not_spread():
    _, ours = make(ENCODER, 16, 4, 24, batch_first=True)
    x = torch.randn(2, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[3], [5]])
    with torch.no_grad():
        expected = ours(x, src_key_padding_mask=padding)
        x[0, 4] = torch.nan
        assert torch.equal(ours(x, src_key_padding_mask=padding)[~padding], expected[~padding])


WRONG = {
    "width": ((5, 3, 6), {}),
    "rank": ((2, 5, 3, 16), {}),
    "the hint alone": ((5, 3, 16), {"is_causal": True}),
    "mask shape": ((5, 3, 16), {"src_mask": torch.zeros(5, 4)}),
    "padding shape": ((5, 3, 16), {"src_key_padding_mask": torch.zeros(3, 4, dtype=torch.bool)}),
    "mask dtype": ((5, 3, 16), {"src_mask": torch.zeros(5, 5, dtype=torch.int64)}),
    "unknown": ((5, 3, 16), {"mask": None}),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_those_of_torch(case):
    shape, call = WRONG[case]
    theirs, ours = make(ENCODER, 16, 4, 24)
    x = torch.randn(shape)
    with torch.no_grad():
        expected, got = (outcome(lambda: layer(x, **call)) for layer in (theirs, ours))
    assert expected.error is not None and type(got.error) is type(expected.error)
    assert str(got.error) == str(expected.error).replace("TransformerEncoderLayer.f", "ReplacedEncoderLayer.f")


def test_errors_of_ours_are_not_hidden(monkeypatch):
    _, ours = make(ENCODER, 16, 4, 24)

    def failing(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr(mha_c._core, "transform", failing)
    with torch.no_grad(), pytest.raises(RuntimeError, match="planted"):
        ours(torch.zeros(5, 3, 16))


# ------------------------------------------------------------------------------------------- left to torch


class Mixed(nn.Linear):
    """As those of quantization or LoRA: another class in the place of a linear map."""

    def forward(self, x):
        return super().forward(x) * 2


class OwnReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 2


def with_(**attributes):
    """A change: attributes are set, with __ for dots; "" stands for the layer itself."""

    def change(layer):
        for path, value in attributes.items():
            *parts, name = path.split("__")
            setattr(layer.get_submodule(".".join(parts)), name, value)

    return change


def hook(*args):
    return None


CHANGES_OF_KIND = {
    "training": lambda layer: layer.train(),
    "training, of dropout alone": lambda layer: layer.dropout1.train(),
    "linear1 is a Mixed": with_(linear1=Mixed(16, 24)),
    "norm1 is a RMSNorm": with_(norm1=nn.RMSNorm(16)),
    "dropout1 is a Linear": with_(dropout1=nn.Linear(16, 16).eval()),
    "no dropout": lambda layer: delattr(layer, "dropout"),
    "activation is a OwnReLU": with_(activation=OwnReLU()),
    "activation tanh": with_(activation=torch.tanh),
    "hooks of linear2": lambda layer: layer.linear2.register_forward_hook(hook),
    "hooks of self_attn": lambda layer: layer.self_attn.register_forward_pre_hook(hook),
    "hooks of self_attn.out_proj": lambda layer: layer.self_attn.out_proj.register_forward_hook(hook),
    "hooks of linear1, of pruning": lambda layer: prune.l1_unstructured(layer.linear1, "weight", 0.5),
    "parametrized weights": lambda layer: nn.utils.parametrizations.weight_norm(layer.linear1),
    "parametrized weights, of attention": lambda layer: nn.utils.parametrizations.weight_norm(
        layer.self_attn, "in_proj_weight"),
    "overrides _ff_block": with_(_ff_block=lambda x: x * 0),
    "overrides _sa_block": with_(_sa_block=lambda x, *args, **kwargs: x * 0),
    "linear1 overrides forward": lambda layer: setattr(layer.linear1, "forward", lambda x: x @ torch.ones(16, 24)),
    "unusual parameters": lambda layer: layer.norm2.double().float() and layer.linear2.double(),
    "unusual parameters, of a norm": with_(norm1=nn.LayerNorm((3, 16)).eval()),
    "unusual parameters, of a norm of another width": with_(norm1=nn.LayerNorm(7, elementwise_affine=False).eval()),
    "unusual parameters, of a norm without them": with_(norm1=nn.LayerNorm((3, 16), elementwise_affine=False).eval()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES_OF_KIND)
@pytest.mark.parametrize("cls", [ENCODER, DECODER])
def test_what_is_not_as_torch_made_it(cls, change):
    """Such a layer is left to torch, with the reason; its attention is computed where it can be."""
    torch.manual_seed(1)
    theirs, ours = make(cls, 16, 4, 24, dropout=0.0)
    for layer in (theirs, ours):
        CHANGES_OF_KIND[change](layer)
    inputs = (torch.randn(5, 3, 16),) * (1 if cls is ENCODER else 2)
    with torch.no_grad():
        expected, got = (outcome(lambda: layer(*inputs)) for layer in (theirs, ours))
    assert str(got.error).replace("Replaced", "") == str(expected.error)
    if expected.error is None:
        torch.testing.assert_close(got.result, expected.result)
    first, *attentions = coverage(ours).rows
    assert (first.here, first.left) == (0, 1)
    assert re.sub(r"is a .*\.", "is a ", first.reason) == change.partition(",")[0]
    if change in ("linear1 is a Mixed", "activation tanh", "hooks of linear2"):
        assert [row.here for row in attentions] == [1] * len(attentions) and attentions


REASONS = {
    "gradients": lambda layer, x: torch.enable_grad()(layer)(x),
    "autocast": lambda layer, x: torch.autocast("cpu")(layer)(x),
    "tracing": lambda layer, x: torch.jit.trace(layer, (x,), check_trace=False),
    "function transform": lambda layer, x: torch.vmap(layer, in_dims=1)(x),
    "is_causal without attn_mask": lambda layer, x: layer(x, is_causal=True),
    "mask in float64": lambda layer, x: layer(x, src_mask=torch.zeros(5, 5).double()),
    "list": lambda layer, x: layer(x.tolist()),
    "tensors on meta": lambda layer, x: layer(x.to("meta")),
    "arguments that do not fit": lambda layer, x: layer(x[..., :3]),
    "parameters made in inference mode": lambda layer, x: torch.inference_mode()(layer.double)()(x.double()),
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_reasons(reason):
    _, ours = make(ENCODER, 16, 4, 24)
    with torch.no_grad():
        outcome(lambda: REASONS[reason](ours, torch.randn(5, 3, 16)))  # torch refuses some of them
    assert coverage(ours).rows[0][2:] == (0, 1, reason)


def test_training_and_gradients():
    theirs, ours = make(ENCODER, 16, 4, 24, dropout=0.5)
    x = torch.randn(5, 3, 16)
    for layer in (theirs, ours):
        torch.manual_seed(1)
        layer.train()(x).sum().backward()
        layer.eval()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    assert ours(x).requires_grad
    assert_agrees(ours, theirs, (x,), {})


def test_hooks_of_the_layer_itself():
    theirs, ours = make(ENCODER, 16, 4, 24)
    for layer in (theirs, ours):
        layer.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
        layer.register_forward_hook(lambda module, args, output: output * 2)
    assert_agrees(ours, theirs, (torch.randn(5, 3, 16),), {})


def test_hooks_of_all_modules():
    _, ours = make(ENCODER, 16, 4, 24)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            ours(torch.zeros(5, 3, 16))
    finally:
        handle.remove()
    assert ours.linear1 in seen and coverage(ours).rows[0].reason == "hooks of all modules"


def test_symbolic_and_scripted():
    """torch.fx calls the layer as one of torch's own, and scripts hold torch's layer."""
    theirs, ours = make(encoder)
    x = torch.randn(3, 5, 16)
    graph = torch.fx.symbolic_trace(nn.Sequential(ours.layers[0], ours.layers[1]))
    with torch.no_grad():
        torch.testing.assert_close(graph(x), theirs(x), rtol=0, atol=5e-6)
        assert coverage(ours).here == 2
        scripted = torch.jit.script(ours.layers[0])
        torch.testing.assert_close(scripted(x), theirs.layers[0](x), rtol=0, atol=5e-6)
        assert coverage(ours).here == 2


# ------------------------------------------------------------------------------------------- changed parameters


def step(layer):
    """A fused step, which torch does not count in versions, that changes one row."""
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    layer.linear1.weight.grad[1] = 1
    torch.optim.AdamW(layer.parameters(), lr=0.5, weight_decay=0, fused=True).step()


CHANGES = {
    "linear1, in place": lambda layer: layer.linear1.weight[3].mul_(3),
    "linear2, in place": lambda layer: layer.linear2.bias.mul_(3),
    "norm1, in place": lambda layer: layer.norm1.weight.mul_(2),
    "norm2, in its data": lambda layer: layer.norm2.bias.data.add_(1),
    "attention, in NumPy": lambda layer: np.multiply(a := layer.self_attn.in_proj_weight.detach().numpy(), 3, out=a),
    "an optimizer": step,
    "load_state_dict": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "load_state_dict of a part": lambda layer: layer.linear1.load_state_dict(
        {k: 2 * v for k, v in layer.linear1.state_dict().items()}),
    "another map": lambda layer: setattr(layer, "linear1", set_random_parameters(nn.Linear(16, 24))),
    "wider maps": lambda layer: setattr(layer, "linear1", set_random_parameters(nn.Linear(16, 30)))
    or setattr(layer, "linear2", set_random_parameters(nn.Linear(30, 16))),
    "without a bias": lambda layer: setattr(layer.linear2, "bias", None),
    "eps": with_(norm1__eps=0.3),
    "activation": with_(activation=nn.functional.gelu),
    "norm_first": with_(norm_first=True),
    "heads": with_(self_attn__num_heads=2, self_attn__head_dim=8),
    "batch_first": with_(self_attn__batch_first=True),
    "float64": lambda layer: layer.double(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    theirs, ours = make(ENCODER, 16, 4, 24)
    x = torch.randn(5, 3, 16)
    with torch.no_grad():
        before = ours(x)
        for layer in (theirs, ours):
            torch.manual_seed(1)
            with torch.enable_grad() if change == "an optimizer" else torch.no_grad():
                CHANGES[change](layer)
        x = x.to(theirs.linear1.weight.dtype)
        assert change == "float64" or (theirs(x) - before).abs().max() > 1e-4
    assert_agrees(ours, theirs, (x,), {})


def test_a_change_that_needs_refresh():
    theirs, ours = make(ENCODER, 64, 4, 256)
    x = torch.randn(5, 3, 64)
    with torch.no_grad():
        before = ours(x)
        for layer in (theirs, ours):
            layer.linear1.weight.data[1].fill_(3)
        assert torch.equal(ours(x), before)  # the documented limit
        ours.refresh()
    assert_agrees(ours, theirs, (x,), {})


# ------------------------------------------------------------------------------------------- whole models


def state(model):
    return {
        name: (type(module), {key: one for key, one in vars(module).items() if key[0] != "_" or "mha_c" in key})
        for name, module in model.named_modules()
    }


def test_restore_gives_back_what_was():
    model = nn.ModuleDict({"encoder": encoder(), "decoder": DECODER(16, 4, 24), "other": nn.MultiheadAttention(8, 2)})
    model.eval()
    before, keys = state(model), list(model.state_dict())
    for replace in (replace_layers, replace_attention, replace_layers):  # in any order
        assert replace(model) is model
    assert [isinstance(one, ReplacedLayer) for one in (*model["encoder"].layers, model["decoder"])] == [True] * 3
    assert sum(isinstance(one, ReplacedAttention) for one in model.modules()) == 5
    assert model["encoder"].use_nested_tensor and list(model.state_dict()) == keys
    assert type(model["decoder"]).__name__ == "ReplacedTransformerDecoderLayer"
    with torch.no_grad():
        model["encoder"](torch.randn(3, 7, 16))
    assert state(restore_attention(model)) == before


def test_replaced_after_its_attention(fused_path):
    """replace_attention keeps torch's encoder from leaving out padding, and replace_layers lets it again."""
    theirs = set_random_parameters(encoder()).eval()
    ours = replace_layers(replace_attention(copy.deepcopy(theirs)))
    padding = torch.arange(5) >= torch.tensor([[5], [2], [3]])
    assert_agrees(ours, theirs, (torch.randn(3, 5, 16),), {"src_key_padding_mask": padding}, here=2)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_copies(how):
    theirs, ours = make(encoder)
    copied = how(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert_agrees(copied, theirs, (torch.randn(3, 5, 16),), {}, here=2)
    assert type(restore_attention(copied).layers[0]) is ENCODER


PRECISIONS = ["bfloat16", "int8", {"default": "int8", "attention": "bfloat16"}, {"out_proj": "bfloat16", "linear2": "int8"}]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_precision(kind, precision):
    """The bits of mha_c's own layer, also of copies and after a change; without the argument those of a wide layer."""
    cls, own = (ENCODER, mha_c.TransformerEncoderLayer) if kind == "encoder" else (DECODER, mha_c.TransformerDecoderLayer)
    theirs, wide = make(cls, 32, 4, 48, batch_first=True)
    x = torch.randn(3, 5, 32)
    given = (x,) if kind == "encoder" else (x, torch.randn(3, 7, 32))

    def assert_bits(model, precision):
        made = own.from_torch(restore_attention(copy.deepcopy(model)), matmul_precision=precision).eval()
        before = coverage(model).here
        with torch.no_grad():
            np.testing.assert_array_equal(model(*given).numpy(), made(*(one.numpy() for one in given)))
        assert coverage(model).here == before + 1

    ours = replace_layers(copy.deepcopy(theirs), matmul_precision=precision)
    with torch.no_grad():
        assert not torch.equal(ours(*given), wide(*given))
    for model in ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)):
        assert_bits(model, precision)
    with torch.no_grad():
        ours.linear2.weight.mul_(-2)
    assert_bits(ours, precision)
    assert_bits(replace_layers(ours), None)


def test_precision_in_graphs(compiled):
    _, ours = make(encoder)
    replace_layers(ours, matmul_precision="int8")
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        assert torch.equal(compiled(ours)(x), ours(x))


def test_precision_of_attention():
    """Of layers of attention alone, and of those in layers that are left to torch."""
    x = torch.randn(5, 3, 16)
    for replace, found in ((replace_attention, nn.MultiheadAttention(16, 4)), (replace_layers, OwnFeedForward(16, 4, 24))):
        model = replace(nn.Sequential(found).eval(), matmul_precision={"default": "int8", "attention": "bfloat16"})
        attention = getattr(model[0], "self_attn", model[0])
        made = mha_c.MultiheadAttention.from_torch(attention, matmul_precision={"default": "int8", "attention": "bfloat16"})
        with torch.no_grad():
            got, expected = attention(x, x, x)[0].numpy(), made.eval()(*[x.numpy()] * 3)[0]
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("replace", [replace_attention, replace_layers])
def test_precision_that_is_not_possible(replace):
    model = nn.Sequential(nn.MultiheadAttention(16, 4)).eval()
    with pytest.raises(ValueError, match="matmul_precision must be None"):
        replace(model, matmul_precision="int4")
    with pytest.raises(ValueError, match="matmul_precision has 'linear3'"):
        replace(model, matmul_precision={"linear3": "int8"})
    assert type(model[0]) is nn.MultiheadAttention
    replace(model.double(), matmul_precision="int8")
    with torch.no_grad():
        model[0](*[torch.zeros(5, 3, 16, dtype=torch.float64)] * 3)
        model.float()[0](*[torch.zeros(5, 3, 16)] * 3)
    assert [row[2:] for row in coverage(model).rows] == [(1, 1, "matmul_precision in float64")]


def test_precision_of_other_parts():
    """That of the feed-forward network does not keep attention in float64 from mha_c."""
    model = replace_layers(nn.Sequential(nn.MultiheadAttention(16, 4)).double().eval(), matmul_precision={"linear1": "int8"})
    with torch.no_grad():
        model[0](*[torch.zeros(5, 3, 16, dtype=torch.float64)] * 3)
    assert coverage(model).here == 1


class Named(ENCODER):
    pass


class OwnFeedForward(ENCODER):
    def _ff_block(self, x):
        return super()._ff_block(x) * 2


def test_subclasses():
    """One with torch's methods is replaced; of another one the attention alone."""
    theirs, ours = make(lambda: nn.Sequential(Named(16, 4, 24), OwnFeedForward(16, 4, 24)))
    assert [type(layer).__name__ for layer in ours] == ["ReplacedNamed", "OwnFeedForward"]
    assert coverage(ours).rows[1].reason == "overrides _ff_block"
    assert_agrees(ours, theirs, (torch.randn(5, 3, 16),), {}, here=2)
    assert [(row.module, row.here) for row in coverage(ours).rows] == [("0", 1), ("1", 0), ("1.self_attn", 1)]
    with pytest.raises(ValueError, match=r"no layer of this Sequential can be replaced: 0 \(Own, overrides forward\)$"):
        replace_layers(nn.Sequential(type("Own", (nn.MultiheadAttention,), {"forward": lambda self, x: x})(8, 2)))


@pytest.mark.parametrize(("cls", "method"), [(ENCODER, "_ff_block"), (nn.Linear, "forward"), (nn.LayerNorm, "forward")])
def test_patched_classes(monkeypatch, cls, method):
    """Layers are left alone if a method was put into their class or that of a part; their attention is replaced."""
    monkeypatch.setattr(cls, method, lambda self, x: x[..., :16])
    model = replace_layers(ENCODER(16, 4, 24))
    assert [type(one) for one in (model, model.self_attn)] == [ENCODER, ReplacedAttention]


def test_what_has_no_layers():
    with pytest.raises(TypeError, match="replace_layers takes a torch.nn.Module, but got"):
        replace_layers(np.zeros(3))
    with pytest.raises(ValueError, match="there is no layer to replace in this Linear: no torch.nn.TransformerEncoder"):
        replace_layers(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------- graphs of torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled(fresh_compiler):
    """Compiles a model to one graph."""
    return lambda model, backend="eager", **options: torch.compile(model, backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "one item"])
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_encoder_layers(name, batched, compiled):
    theirs, ours = make(ENCODER, 16, 4, 24, **OPTIONS[name])
    dtype = theirs.linear1.weight.dtype
    x = torch.randn(*((3,) if batched else ()), 5, 16, dtype=dtype)
    x = x if not batched or OPTIONS[name].get("batch_first") else x.transpose(0, 1)
    graph = compiled(ours)
    for masks in attention_masks(3, 5, 5, dtype, batched=batched):
        call = {name if name == "is_causal" else f"src_{name}": mask for name, mask in masks.items()}
        assert_agrees(graph, theirs, (x,), call)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_decoder_layers(backend, compiled):
    theirs, ours = make(DECODER, 16, 4, 24, activation=nn.GELU("tanh"), norm_first=True)
    inputs = [torch.randn(length, 3, 16) for length in (5, 7)]
    graph = compiled(ours, backend)
    of_target, of_memory = (attention_masks(3, 5, keys, torch.float32) for keys in (5, 7))
    for own, others in zip(of_target, of_memory[::-1], strict=True):
        call = {f"tgt_{name}": mask for name, mask in own.items()}
        assert_agrees(graph, theirs, inputs, call | {f"memory_{name}": mask for name, mask in others.items()})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compiled_halves(dtype, compiled):
    """The bits of a call outside of a graph, which is compared with torch in tests/test_torch_halves.py."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    dtype = getattr(torch, dtype)
    _, ours = make(ENCODER, 16, 4, 24, dtype=dtype)
    x = torch.randn(5, 3, 16).to(dtype)
    with torch.no_grad():
        output = compiled(ours)(x)
        assert output.dtype == dtype
        assert torch.equal(output, ours(x))
    assert coverage(ours).here == 2


def test_compiled_model_with_both_kinds(compiled):
    """One graph without a break for all lengths and batches, in which layers and other attention are operators."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = nn.Transformer(16, 4, 2, 1, 24, batch_first=True)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, source, target, padding):
            x = self.transformer(source, target, src_key_padding_mask=padding, memory_key_padding_mask=padding)
            return self.attention(x, x, x, need_weights=False)[0]

    theirs, ours = make(Model)
    graphs = []
    graph = compiled(ours, lambda graph, inputs: graphs.append(graph.code) or graph, dynamic=True)
    for items, length in ((3, 7), (2, 9), (4, 5)):
        padding = torch.arange(length) >= torch.tensor([[length], [4], [2], [3]])[:items]
        assert_agrees(graph, theirs, (torch.randn(items, length, 16), torch.randn(items, 6, 16), padding), {}, here=4)
    assert len(graphs) == 1
    assert [graphs[0].count(f"torch.ops.mha_c.{name}(") for name in ("layer", "attention")] == [3, 1]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed_by_graphs(change, compiled):
    theirs, ours = make(ENCODER, 16, 4, 24)
    x = torch.randn(5, 3, 16)
    graph = compiled(ours)
    with torch.no_grad():
        graph(x)
        for layer in (theirs, ours):
            torch.manual_seed(1)
            with torch.enable_grad() if change == "an optimizer" else torch.no_grad():
                CHANGES[change](layer)
    assert_agrees(graph, theirs, (x.to(theirs.linear1.weight.dtype),), {})


@pytest.mark.parametrize("change", CHANGES_OF_KIND)
def test_what_is_not_as_torch_made_it_in_graphs(change, compiled):
    """Also if a graph of what torch made is there. Hooks and methods have to be there before the graph."""
    torch.manual_seed(1)
    theirs, ours = make(ENCODER, 16, 4, 24, dropout=0.0)
    x = torch.randn(5, 3, 16)
    graph = compiled(ours)
    is_seen_later = not change.startswith("hooks") and "overrides" not in change
    if is_seen_later:
        assert_agrees(graph, theirs, (x,), {})
    for layer in (theirs, ours):
        CHANGES_OF_KIND[change](layer)
    with torch.no_grad():
        expected, got = (outcome(lambda: layer(x)) for layer in (theirs, graph))
    assert (got.error is None) == (expected.error is None)
    if expected.error is None:
        torch.testing.assert_close(got.result, expected.result)
    first = coverage(ours).rows[0]
    if change == "unusual parameters":  # which only the operator sees
        assert first[2:] == (1, 1, "unusual parameters")
    else:
        assert re.sub(r"is a .*\.", "is a ", first.reason) == f"{change.partition(',')[0]}, in a graph"
        assert first[2:4] == (is_seen_later, 0)


@pytest.mark.parametrize("reason", [reason for reason in REASONS if reason != "tracing"])
def test_reasons_in_graphs(reason, compiled):
    theirs, ours = make(ENCODER, 16, 4, 24)
    x = torch.randn(5, 3, 16)
    with torch.no_grad():
        expected = outcome(lambda: REASONS[reason](theirs, x))
        got = outcome(lambda: REASONS[reason](compiled(ours), x))
    assert (got.error is None) == (expected.error is None)
    if expected.error is None and not expected.result.is_meta:
        torch.testing.assert_close(got.result, expected.result, rtol=1e-5, atol=1e-5)
    in_operator = reason in ("arguments that do not fit", "parameters made in inference mode")
    assert coverage(ours).rows[0][2:] == ((0, 1, reason) if in_operator else (0, 0, f"{reason}, in a graph"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_graphs_of_training(backend, compiled):
    theirs, ours = make(DECODER, 16, 4, 24, dropout=0.0)
    inputs = torch.randn(5, 3, 16), torch.randn(7, 3, 16)
    for training in (True, False):
        theirs.train(training)(*inputs).square().sum().backward()
        compiled(ours.train(training), backend)(*inputs).square().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert coverage(ours).rows[0][2:] == (0, 0, "training, in a graph, gradients, in a graph")


def test_a_graph_packs_what_its_layer_packs(compiled):
    """The parameters that reach the operator are the layer's own."""
    _, ours = make(DECODER, 16, 4, 24)
    x = torch.randn(5, 3, 16)
    with torch.no_grad():
        ours(x, x)
        packed = ours._mha_c.packed._kept
        for backend in ("eager", "aot_eager", "inductor"):
            torch._dynamo.reset()
            compiled(ours, backend)(x, x)
            assert ours._mha_c.packed._kept is packed


def operator_calls(model, *args, **call):
    """The arguments of the operator in each layer of a model."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.mha_c.layer.default:
                calls.append(args)
            return function(*args, **(kwargs or {}))

    def run(graph, inputs):
        def recorded(*inputs):
            with Recorder():
                return graph(*inputs)

        return recorded

    with torch.no_grad():
        torch.compile(model, backend=run, fullgraph=True)(*args, **call)
    return calls


OPERATORS = {
    "encoder": (ENCODER, {"norm_first": True}, {}),
    "hint": (ENCODER, {"batch_first": True}, {"src_mask": causal(5), "is_causal": True}),
    "masks": (ENCODER, {"activation": "gelu", "bias": False}, {"src_mask": torch.ones(5, 5).tril() == 0}),
    "decoder": (DECODER, {"activation": nn.GELU("tanh")}, {"memory_key_padding_mask": torch.zeros(3, 7)}),
    "silu": (DECODER, {"activation": nn.SiLU(), "norm_first": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name, fresh_compiler):
    """torch's own checks of an operator, and what it asks torch for: the same."""
    cls, options, call = OPERATORS[name]
    _, ours = make(cls, 16, 4, 24, **options)
    shapes = [(3, 5, 16), (3, 7, 16)] if options.get("batch_first") else [(5, 3, 16), (7, 3, 16)]
    inputs = [torch.randn(shape) for shape in shapes][: 1 + (cls is DECODER)]
    assert_operator_is_torchs(*operator_calls(ours, *inputs, **call))


def test_operator_with_exchanged_attention(compiled):
    theirs, ours = make(exchanged)
    inputs, call = (torch.randn(5, 3, 16), torch.randn(7, 3, 6)), {"tgt_mask": causal(5)}
    assert_agrees(compiled(ours), theirs, inputs, call)
    torch._dynamo.reset()
    assert_operator_is_torchs(*operator_calls(ours, *inputs, **call))


def assert_operator_is_torchs(arguments):
    number, names, parameters, *rest = arguments
    parameters = [one.detach() for one in parameters]
    with torch.no_grad():
        torch.library.opcheck(torch.ops.mha_c.layer.default, (number, names, parameters, *rest))
        expected = torch.ops.mha_c.layer(number, names, parameters, *rest)
        with torch.inference_mode():
            untracked = [one.clone() for one in parameters]
        calls = LayerState.by_number[number].calls
        before = dict(calls.by_reason)
        by_torch = torch.ops.mha_c.layer(number, names, untracked, *rest)
        torch.testing.assert_close(by_torch, expected, rtol=1e-5, atol=1e-5)
    assert calls.by_reason == before | {"parameters made in inference mode": 1}


def test_a_graph_may_outlive_its_layer(fresh_compiler):
    _, ours = make(ENCODER, 16, 4, 24)
    (number, names, parameters, *rest), = operator_calls(ours, torch.randn(5, 3, 16))
    with torch.no_grad():
        expected = torch.ops.mha_c.layer(number, names, parameters, *rest)
        del ours
        torch._dynamo.reset()
        gc.collect()
        assert number not in LayerState.by_number
        assert torch.equal(torch.ops.mha_c.layer(number, names, parameters, *rest), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    """What is exported runs without mha_c."""
    theirs, ours = make(ENCODER, 16, 4, 24)
    x = torch.randn(5, 3, 16)
    with torch.no_grad():
        exported = torch.export.export(ours, (x,), strict=strict)
        assert "mha_c" not in exported.graph_module.code
        torch.testing.assert_close(exported.module()(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert {row.reason for row in coverage(ours).rows} == {"export, in a graph"}


# ------------------------------------------------------------------------------------------- layers of transformers


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torchvision_operators")
    return pytest.importorskip("transformers", minversion="5.24")


COMMON = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 24}
TEXT = {"vocab_size": 90, "pad_token_id": 0}
IMAGE = {"image_size": 32, "patch_size": 16}
MODELS = {  # the names of transformers, without Config and Model, and the arguments of the configuration
    "Bert": COMMON | TEXT | {"hidden_act": "gelu_new"},
    "BertGenerationEncoder": COMMON | TEXT,
    "Camembert": COMMON | TEXT,
    "Data2VecText": COMMON | TEXT,
    "Electra": COMMON | TEXT | {"hidden_act": "silu"},
    "Ernie": COMMON | TEXT,
    "Roberta": COMMON | TEXT | {"hidden_act": "quick_gelu"},
    "RoCBert": COMMON | TEXT,
    "XLMRoberta": COMMON | TEXT | {"hidden_act": "relu"},
    "DistilBert": TEXT | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 24},
    "AST": COMMON | {"max_length": 48, "num_mel_bins": 32},
    "DeiT": COMMON | IMAGE,
    "IJepa": COMMON | IMAGE,
    "ViT": COMMON | IMAGE | {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"},
    "ViTMAE": COMMON | IMAGE,
    "ViTMSN": COMMON | IMAGE,
    "Vivit": COMMON | {"hidden_act": "gelu", "image_size": 16, "num_frames": 2, "tubelet_size": [2, 8, 8]},
}


def hugging_face(transformers, name, implementation="sdpa"):
    """A model, a replaced copy, and an input with padding where the model has such a thing."""
    config = getattr(transformers, f"{name.removesuffix('Encoder')}Config")(**MODELS[name])
    cls = getattr(transformers, name if name.endswith("Encoder") else f"{name}Model")
    theirs = set_random_parameters(cls._from_config(config, attn_implementation=implementation)).eval()
    if name == "AST":
        call = {"input_values": torch.randn(2, 48, 32)}
    elif name == "Vivit":
        call = {"pixel_values": torch.randn(2, 2, 3, 16, 16)}
    elif "image_size" in MODELS[name]:
        call = {"pixel_values": torch.randn(2, 3, 32, 32)}
        if name == "ViTMAE":
            call["noise"] = torch.rand(2, 4)
    else:
        lengths = torch.tensor([[7], [4], [1]])
        call = {"input_ids": torch.randint(1, 90, (3, 7)), "attention_mask": (torch.arange(7) < lengths).long()}
    return theirs, replace_layers(copy.deepcopy(theirs)), call


@pytest.mark.parametrize(
    ("name", "implementation"), [(name, "sdpa") for name in MODELS] + [("Bert", "eager"), ("DistilBert", "eager")]
)
def test_models_of_transformers(transformers, name, implementation):
    theirs, ours, call = hugging_face(transformers, name, implementation)
    with torch.no_grad():
        expected, got = theirs(**call), ours(**call)
        exact = copy.deepcopy(theirs).double()(**{key: wider(one) for key, one in call.items()})
    assert type(got) is type(expected) and got.keys() == expected.keys()
    comparison = Comparison.measure("output", *(one[0].numpy() for one in (got, expected, exact)))
    assert comparison.agrees, comparison
    assert [row[2:] for row in coverage(ours).rows] == [(1, 0, "")] * 2, coverage(ours)
    assert list(restore_attention(ours).state_dict()) == list(theirs.state_dict())
    assert [type(one) for one in ours.modules()] == [type(one) for one in theirs.modules()]


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "ViT"])
def test_precision_of_models_of_transformers(transformers, name):
    """The bits of the encoder that is loaded from the same parameters."""
    theirs, ours, call = hugging_face(transformers, name)
    replace_layers(ours, matmul_precision="int8")
    inputs = []
    layers = next(one for one in ours.modules() if isinstance(one, nn.ModuleList))
    layers[0].register_forward_pre_hook(lambda module, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        got = ours(output_hidden_states=True, **call).hidden_states[-1].numpy()
    made = mha_c.TransformerEncoder.from_state_dict(
        {name: one.numpy() for name, one in theirs.state_dict().items()}, config=theirs.config.to_dict(),
        matmul_precision="int8", padded="computed",
    ).eval()  # fmt: skip
    padding = call["attention_mask"].numpy() == 0 if "attention_mask" in call else None
    expected = inputs[0].numpy()
    for layer in made.layers:  # without the norm at the end, which is torch's
        expected = layer(expected, src_key_padding_mask=padding)
    np.testing.assert_array_equal(got, expected)


def test_the_known_classes_are_alike(transformers):
    """The code of each class is that of the first of its kind, but for the name of the model."""
    first = {}
    for path, mixin in _KNOWN.items():
        module_name, name = path.rsplit(".", 1)
        module = importlib.import_module(f"transformers.models.{module_name}")
        cls, model = getattr(module, name), name.removesuffix("Layer")
        assert why_unknown(cls.__new__(cls), cls, mixin) == ""
        written = {one.name: one for one in ast.parse(Path(module.__file__).read_text()).body if hasattr(one, "name")}
        names = [name, *(holder.replace("*", model) for holder in mixin._names.holders.values())]
        code = [re.sub(rf"\b{model}", "Model", ast.unparse(written[one])) for one in names]
        assert code == first.setdefault(mixin, code), path


@pytest.mark.parametrize(("name", "method"), [
    ("BertLayer", "feed_forward_chunk"), ("BertLayer", "forward"), ("BertSelfOutput", "forward")])
def test_patched_classes_of_transformers(transformers, monkeypatch, name, method):
    theirs, _, _ = hugging_face(transformers, "Bert")
    module = importlib.import_module(type(theirs).__module__)
    original = getattr(getattr(module, name), method)

    def patched(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    patched.__signature__ = inspect.signature(original)
    monkeypatch.setattr(getattr(module, name), method, patched)
    with pytest.raises(ValueError, match=rf"can be replaced: .*\(BertLayer, {name}\.{method} is patched\)"):
        replace_layers(theirs)


def layer_and_input(transformers, implementation="sdpa"):
    theirs, ours, _ = hugging_face(transformers, "Bert", implementation)
    return theirs.encoder.layer[0], ours.encoder.layer[0], torch.randn(3, 7, 32)


@pytest.mark.parametrize("masks", ["bool", "float"])
def test_masks_of_transformers(transformers, masks):
    """Every mask of padding: the queries have it once or each of them, and the items have one or each its own."""
    theirs, ours, x = layer_and_input(transformers, "sdpa" if masks == "bool" else "eager")
    visible = torch.arange(7) < torch.tensor([[7], [4], [0]])  # nothing is visible in the last item
    smallest = torch.finfo(torch.float32).min
    for mask in (visible[:, None, None], visible[:, None, None].expand(3, 1, 7, 7), visible[:1, None, None]):
        if masks == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, smallest)
        assert_agrees(ours, theirs, (x, mask), {})
    if masks == "float":  # that do not hide, but change scores
        assert_agrees(ours, theirs, (x, torch.randn(3, 1, 1, 7)), {})


def cross_attention(layer, x):
    """As a decoder whose own attention is not causal attends to the states of an encoder."""
    layer.is_decoder = True
    layer.crossattention = type(layer.attention)(layer.attention.self.config, is_cross_attention=True).eval()
    return layer(x, encoder_hidden_states=torch.randn(3, 4, 32))


HF_REASONS = {
    "cross-attention": cross_attention,
    "overrides feed_forward_chunk": lambda layer, x: with_(feed_forward_chunk=lambda x: x * 0)(layer) or layer(x),
    "an item of padding only, in float16": lambda layer, x: layer.half()(
        x.half(), torch.full((3, 1, 1, 7), -65504.0).half()),
    "training": lambda layer, x: layer.train()(x),
    "gradients": lambda layer, x: torch.enable_grad()(layer)(x),
    "mask that is not padding": lambda layer, x: layer(x, torch.ones(7, 7, dtype=torch.bool).tril()[None, None]),
    "mask of another shape": lambda layer, x: layer(x, torch.ones(3, 4, 7, 7, dtype=torch.bool)),
    "mask in int64": lambda layer, x: layer(x, torch.ones(3, 1, 1, 7).long()),
    "mask in bool": lambda layer, x: setattr(layer.attention.self.config, "_attn_implementation", "eager")
    or layer(x, torch.ones(3, 1, 1, 7, dtype=torch.bool)),
    "attention.self.query is a Mixed": lambda layer, x: with_(attention__self__query=Mixed(32, 32))(layer) or layer(x),
    "attention.self is a Linear": lambda layer, x: with_(attention__self=nn.Linear(32, 32).eval())(layer) or layer(x),
    "hooks of intermediate": lambda layer, x: layer.intermediate.register_forward_hook(hook) and layer(x),
    "causal attention": lambda layer, x: with_(attention__self__is_causal=True)(layer) or layer(x),
    "unusual scaling": lambda layer, x: with_(attention__self__scaling=0.1)(layer) or layer(x),
    "chunk_size_feed_forward": lambda layer, x: with_(chunk_size_feed_forward=7)(layer) or layer(x),
    "cache": lambda layer, x: layer(x, None, None, None, object()),
    "head_mask": lambda layer, x: layer(x, head_mask=torch.ones(4)),
    "complex64": lambda layer, x: layer(x.to(torch.complex64)),
    "arguments that do not fit": lambda layer, x: layer(x[0]),
}


@pytest.mark.parametrize("reason", HF_REASONS)
def test_reasons_with_transformers(transformers, reason):
    theirs, ours, x = layer_and_input(transformers)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = outcome(lambda: HF_REASONS[reason](theirs, x))
        torch.manual_seed(1)
        got = outcome(lambda: HF_REASONS[reason](ours, x))
    *calls, given = coverage(ours).rows[0][2:]
    assert (*calls, re.sub(r"is a .*\.", "is a ", given)) == (0, 1, reason)
    assert str(got.error) == str(expected.error)
    if expected.error is None and reason not in ("training", "attention.self.query is a Mixed"):
        torch.testing.assert_close(got.result, expected.result)


def test_models_of_transformers_that_are_not_replaced(transformers):
    theirs, _, _ = hugging_face(transformers, "Bert")
    assert [row[1:] for row in coverage(theirs).rows] == [("BertLayer", 0, 0, "not replaced")] * 2


def test_a_chunk_that_is_overridden(transformers):
    """DistilBERT's is a method of the feed-forward network."""
    theirs, ours, call = hugging_face(transformers, "DistilBert")
    for model in (theirs, ours):
        model.transformer.layer[0].ffn.ff_chunk = lambda x: x * 0
    with torch.no_grad():
        torch.testing.assert_close(ours(**call)[0], theirs(**call)[0], rtol=1e-4, atol=1e-5)
    assert [row[2:] for row in coverage(ours).rows] == [(0, 1, "ffn overrides ff_chunk"), (1, 0, "")]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Bert", "DistilBert", "ViT"])
def test_compiled_models_of_transformers(transformers, compiled, name, implementation):
    theirs, ours, call = hugging_face(transformers, name, implementation)
    graph = compiled(ours)
    with torch.no_grad():
        expected, got = theirs(**call)[0], graph(**call)[0]
        exact = copy.deepcopy(theirs).double()(**{key: wider(one) for key, one in call.items()})[0]
    comparison = Comparison.measure("output", got.numpy(), expected.numpy(), exact.numpy())
    assert comparison.agrees, comparison
    assert [row[2:] for row in coverage(ours).rows] == [(1, 0, "")] * 2, coverage(ours)


@pytest.mark.parametrize("name", ["Bert", "Electra", "Roberta", "DistilBert", "ViT"])
def test_operator_of_transformers(transformers, fresh_compiler, name):
    _, ours, call = hugging_face(transformers, name)
    for arguments in operator_calls(ours, **call):
        assert_operator_is_torchs(arguments)


@pytest.mark.parametrize("reason", HF_REASONS)
def test_reasons_with_transformers_in_graphs(transformers, fresh_compiler, reason):
    """Masks are read when the operator computes; it counts what it leaves to torch."""
    theirs, ours, x = layer_and_input(transformers)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = outcome(lambda: HF_REASONS[reason](theirs, x))
        torch.manual_seed(1)
        ours.compile(backend="eager", fullgraph=True)
        got = outcome(lambda: HF_REASONS[reason](ours, x))
    assert (got.error is None) == (expected.error is None)
    *calls, given = coverage(ours).rows[0][2:]
    in_operator = reason in ("mask that is not padding", "mask of another shape", "an item of padding only, in float16")
    assert (calls, re.sub(r"is a .*\.", "is a ", given)) == (
        ([0, 1], reason) if in_operator else ([0, 0], f"{reason}, in a graph")
    )
    if expected.error is None and reason not in ("training", "attention.self.query is a Mixed"):
        tolerance = 1e-2 if got.result.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(got.result, expected.result, rtol=tolerance, atol=tolerance)


def test_outputs_that_transformers_records(transformers):
    """Its hooks stay in the model after the first call that records; attention weights need its own attention."""
    theirs, ours, call = hugging_face(transformers, "Bert", "eager")
    with torch.no_grad():
        for asked in ({"output_hidden_states": True}, {}, {"output_attentions": True}, {}):
            expected, got = theirs(**call, **asked), ours(**call, **asked)
            for key in expected:
                torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-4)
    assert [row[2:4] for row in coverage(ours).rows] == [(3, 1)] * 2
    assert coverage(ours).rows[0].reason == "hooks of attention.self"


def test_copies_of_transformers(transformers):
    _, ours, call = hugging_face(transformers, "ViT")
    copied = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    with torch.no_grad():
        assert torch.equal(copied(**call)[0], ours(**call)[0])
    assert coverage(copied).here == 2


def test_another_version_of_transformers(transformers, monkeypatch):
    bert = transformers.models.bert.modeling_bert
    monkeypatch.setattr(bert.BertLayer, "forward", lambda self, hidden_states, attention_mask=None: (hidden_states,))
    model = transformers.BertModel(transformers.BertConfig(**MODELS["Bert"]))
    with pytest.raises(ValueError, match=r"encoder.layer.0 \(BertLayer, another BertLayer than that of transformers 5.24"):
        replace_layers(model)
