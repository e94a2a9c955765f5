# SPDX-License-Identifier: Apache-2.0
"""Replaced layers in graphs that torch makes: compiled ones compute with mha_c, exported and scripted ones with torch."""

import copy
import gc

import mha_c
import pytest

torch = pytest.importorskip("torch")
from mha_c.torch import coverage, replace_attention  # noqa: E402
from torch import nn  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Layers one after the other, each with its own keyword arguments."""

    def __init__(self, *layers, **call):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.call = call

    def forward(self, x, **masks):
        weights = None
        for layer in self.layers:
            output, weights = layer(x, x, x, **masks, **self.call)
            x = x + output
        return x, weights


def model(layers=2, call={}, **options):
    """A model with random parameters, and a replaced copy."""
    theirs = Model(*[nn.MultiheadAttention(8, 2, **options) for _ in range(layers)], **call).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return theirs, replace_attention(copy.deepcopy(theirs))


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            tolerance = (1e-12 if other.dtype == torch.float64 else 5e-6) * max(other.nan_to_num().abs().max().item(), 1)
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance, equal_nan=True)


OPTIONS = [
    {}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"dtype": torch.float64},
]
CALLS = [{}, {"need_weights": False}, {"average_attn_weights": False}]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("unbatched", [False, True])
def test_compiled(options, call, unbatched):
    """One graph without a break, with the numbers of torch, and every call counted."""
    theirs, ours = model(call=call, **options)
    x = torch.randn(*(5, 3, 8)[unbatched:], dtype=options.get("dtype"))
    length = x.shape[1 if options.get("batch_first") and not unbatched else 0]
    batch = () if unbatched else (15 // length,)
    mask = torch.triu(torch.full((length, length), -torch.inf, dtype=x.dtype), 1)
    padding = torch.zeros(*batch, length, dtype=torch.bool)
    padding[..., -1] = True
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for masks in ({}, {"attn_mask": mask}, {"attn_mask": mask, "is_causal": True}, {"key_padding_mask": padding}):
        by_hint = masks.get("is_causal") and call == {"need_weights": False} and options.get("add_bias_kv")
        with torch.no_grad():
            here = coverage(ours).here
            assert_same(compiled(x, **masks), theirs(x, **masks))
            assert coverage(ours).here - here == 2 * (not by_hint), masks


def test_inductor():
    theirs, ours = model(call={"need_weights": False}, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True)
    with torch.inference_mode():
        for _ in range(2):
            x = torch.randn(3, 5, 8)
            assert_same(compiled(x), theirs(x))
    assert (coverage(ours).here, coverage(ours).left) == (4, 0)


def test_any_length_and_batch():
    theirs, ours = model()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(ours, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length, batch in ((5, 3), (7, 2), (11, 4)):
            x = torch.randn(length, batch, 8)
            assert_same(compiled(x), theirs(x))
    assert len(graphs) == 1 and "mha_c.attention" in graphs[0].code
    assert coverage(ours).here == 2 * 3


def test_layers_compiled_one_by_one():
    theirs, ours = model(layers=4)
    for layer in ours.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 3, 8)
    with torch.no_grad():
        assert_same(ours(x), theirs(x))
    assert [row.here for row in coverage(ours).rows] == [1] * 4


def test_operator():
    """torch's own checks of an operator: its schema, its shapes without numbers, aliases."""
    _, ours = model(1)
    layer = ours.layers[0]
    x, mask = torch.randn(5, 3, 8), torch.zeros(5, 5)
    parameters = [layer.in_proj_weight, None, None, None, layer.in_proj_bias, None, None, layer.out_proj.weight,
                  layer.out_proj.bias]
    parameters = [None if one is None else one.detach() for one in parameters]
    for masks in ((None, True, None, True), (None, True, mask, False), (torch.zeros(3, 5), False, None, True)):
        call = (x, x.clone(), x.clone(), *masks, False, 8, 2, 8, 8, False, False)
        torch.library.opcheck(torch.ops.mha_c.attention.default, (layer._mha_c.number, parameters, *call))


def test_changed_parameters():
    theirs, ours = model()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 3, 8)

    def fused_step(module):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(module.parameters(), 0.1, fused=True).step()

    for change in (
            fused_step, lambda module: module.layers[0].in_proj_weight.data.mul_(2),
            lambda module: module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()}),
            lambda module: setattr(module.layers[1], "in_proj_bias", nn.Parameter(torch.ones(24))),
            lambda module: module.double()):
        with torch.no_grad():
            before = compiled(x)
            for module in (theirs, ours):
                change(module)
            x = x.to(theirs.layers[0].in_proj_bias.dtype)
            assert_same(compiled(x), theirs(x))
            assert not torch.allclose(before[0].to(x), theirs(x)[0], atol=1e-3) or x.dtype == torch.float64
    ours.layers[0].in_proj_weight.data[1, 0] += 10
    theirs.layers[0].in_proj_weight.data[1, 0] += 10
    ours.layers[0].refresh()
    with torch.no_grad():
        assert_same(compiled(x), theirs(x))
    assert coverage(ours).left == 0


def test_packed_once():
    """The parameters that reach the operator are the layer's own, and are packed for both ways at once."""
    _, ours = model(1)
    x = torch.randn(5, 3, 8)
    with torch.no_grad():
        ours(x)
        packed = ours.layers[0]._mha_c.packed._kept
        for backend in ("eager", "aot_eager", "inductor"):
            torch._dynamo.reset()
            torch.compile(ours, backend=backend)(x)
            assert ours.layers[0]._mha_c.packed._kept is packed


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training(backend):
    theirs, ours = model()
    x = torch.randn(5, 3, 8)
    torch.compile(ours, backend=backend, fullgraph=True)(x)[0].square().sum().backward()
    theirs(x)[0].square().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert {row.reason for row in coverage(ours).rows} == {"gradients, in a graph"}
    assert (coverage(ours).here, coverage(ours).left) == (0, 0)


def in_autocast(module, x):
    with torch.autocast("cpu"):
        return module(x)[0]


def in_vmap(module, x):
    return torch.vmap(lambda item: module(item)[0], in_dims=1, out_dims=1)(x)


@pytest.mark.parametrize("run, reason", [(in_autocast, "autocast"), (in_vmap, "function transform")])
def test_left_to_torch_in_a_graph(run, reason):
    theirs, ours = model(1)
    x = torch.randn(5, 3, 8)
    with torch.no_grad():
        result = torch.compile(lambda x: run(ours, x), backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(result, run(theirs, x))
    assert coverage(ours).rows[0][2:] == (0, 0, f"{reason}, in a graph")


def test_other_devices_are_left_to_torch_in_a_graph():
    """Where the operator has no function."""
    _, ours = model(1)
    compiled = torch.compile(ours.to("meta"), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        output, _ = compiled(torch.zeros(5, 3, 8, device="meta"))
    assert output.shape == (5, 3, 8)
    assert coverage(ours).rows[0][2:] == (0, 0, "tensors on meta, in a graph")


def test_parameters_whose_changes_are_not_counted():
    """Those made in inference mode, which a graph cannot see."""
    theirs, ours = model(1)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        theirs.double(), ours.double()
        for factor in (1, 2):
            for module in (theirs, ours):
                module.layers[0].in_proj_weight[1, 0].mul_(factor)
            assert_same(compiled(x), theirs(x))
    assert coverage(ours).rows[0][2:] == (0, 2, "parameters made in inference mode")


def test_wrong_calls_have_torchs_exceptions():
    theirs, ours = model(1)
    compiled = torch.compile(ours, backend="aot_eager")
    x = torch.randn(5, 3, 8)
    for masks in ({"attn_mask": torch.zeros(4, 4)}, {"key_padding_mask": torch.zeros(2, 5)}):
        with torch.no_grad(), pytest.raises((RuntimeError, AssertionError)) as expected:
            theirs(x, **masks)
        with torch.no_grad(), pytest.raises(expected.type) as raised:
            compiled(x, **masks)
        assert str(raised.value).splitlines()[0] == str(expected.value)
        torch._dynamo.reset()


def test_a_graph_may_outlive_its_layer():
    theirs, ours = model(1)
    graphs = []

    def backend(graph, inputs):
        graphs.append((graph, [one.clone() if isinstance(one, torch.Tensor) else one for one in inputs]))
        return graph

    x = torch.randn(5, 3, 8)
    with torch.no_grad():
        expected = torch.compile(ours, backend=backend)(x)
        number = ours.layers[0]._mha_c.number
        del ours
        torch._dynamo.reset()
        gc.collect()
        assert number not in mha_c.torch.attend.LayerState.by_number
        graph, inputs = graphs[0]
        assert torch.equal(graph(*inputs)[0], expected[0])


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    """What is exported runs without mha_c."""
    theirs, ours = model(batch_first=True)
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        exported = torch.export.export(ours, (x,), strict=strict)
        assert "mha_c" not in exported.graph_module.code
        assert_same(exported.module()(x), theirs(x))
    assert {row.reason for row in coverage(ours).rows} == {"export, in a graph"}


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    theirs, ours = model(batch_first=True, call={"need_weights": False})
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        torch.onnx.export(ours, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        expected = theirs(x)[0]
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    result, = session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=0, atol=5e-6)


def test_scripted_traced_and_symbolic():
    """Scripts and traces hold torch's attention; torch.fx calls the layer as a whole."""
    class Plain(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x, x, x, need_weights=False)[0]
            return x

    theirs, ours = model(batch_first=True)
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        expected = theirs(x)[0]
        traced = torch.jit.trace(Plain(ours.layers), (x,), check_trace=False)
        here = coverage(ours).here
        torch.testing.assert_close(traced(x), expected, rtol=0, atol=5e-6)
        layer = replace_attention(copy.deepcopy(theirs.layers[0]))
        assert_same(torch.jit.script(layer)(x, x, x), theirs.layers[0](x, x, x))
        assert coverage(ours).here == here == 0 and coverage(layer).here == 0
        torch.testing.assert_close(torch.fx.symbolic_trace(Plain(ours.layers))(x), expected, rtol=0, atol=5e-6)
        assert coverage(ours).here == 2
