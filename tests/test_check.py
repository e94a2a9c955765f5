# SPDX-License-Identifier: Apache-2.0
"""The numerical check: what it measures, what it says, and that it notices when something is wrong."""

import copy
import dataclasses
import sys

import mha_c
import numpy as np
import pytest
import reference
from helpers import layer, normal, run_child
from mha_c import check
from mha_c.check import command, definition
from mha_c.__main__ import main

torch = pytest.importorskip("torch")


class Wrong(mha_c.MultiheadAttention):
    """Off by one part in ten thousand: far beyond rounding, and easy to overlook."""

    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return output * np.float32(1.0001), weights


# ------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("masked_rows", ["torch", "zero"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", range(0, 1260, 53))
def test_the_definition_is_that_of_the_tests(number, dtype, masked_rows):
    """mha_c.check.definition and reference.py were written independently of each other."""
    _, one = list(command.grid())[number]
    module = layer(one.embed_dim, one.num_heads, kdim=one.kdim, vdim=one.vdim, bias=one.bias, dtype=dtype,
                   add_bias_kv=one.add_bias_kv, add_zero_attn=one.add_zero_attn, masked_rows=masked_rows)
    n, length, s = 2, 4, 6
    inputs = (normal((length, n, module.embed_dim), dtype), normal((s, n, module.kdim), dtype),
              normal((s, n, module.vdim), dtype))
    masks = {}
    if one.key_padding_mask:
        masks["key_padding_mask"] = np.arange(s) >= np.array([[s], [0]])  # of the second item nothing is visible
    if one.attn_mask:
        masks["attn_mask"] = normal((n * module.num_heads, length, s), dtype) if one.attn_mask.endswith(
            "3d") else normal((length, s)) > 0
    call = dict(masks, is_causal=one.is_causal, need_weights=one.need_weights)
    output, weights = definition.attend(module, *inputs, **call)
    expected = reference.multi_head_attention(
        module.state_dict(), module.num_heads, *inputs, **call, add_zero_attn=module.add_zero_attn,
        masked_rows=masked_rows)
    # reference.py rounds masked scores to the layer's dtype; here nothing is rounded.
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(output, expected[0], rtol=0, atol=tolerance)
    if one.need_weights:
        np.testing.assert_allclose(weights, expected[1], rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_definition_of_halves(dtype):
    """It is that of a float32 layer with the same parameters: masks are added up in float32."""
    module, x = layer(8, 2, dtype=dtype, add_bias_kv=True), normal((5, 3, 8), dtype)
    mask = np.full((5, 5), -40_000, "float32")  # twice that is -inf in float16, but not in float32
    mask[:, 0] = 0
    call = {"attn_mask": mask, "key_padding_mask": np.full((3, 5), -40_000, "float32")}
    found = definition.attend(module, x, x, x, **call)
    wide = x.astype("float32")
    expected = definition.attend(copy.deepcopy(module).float(), wide, wide, wide, **call)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float64
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("number", range(0, 630, 21))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_layers_of_halves_agree(dtype, number):
    """Their error is no larger than torch's but for luck. That of float16 is less than a unit."""
    _, configuration = list(command.grid(dtype=dtype))[number]
    report = configuration.check()
    report.assert_close()
    for one in report.comparisons:
        assert one.dtype == one.torch_dtype == dtype
        assert dtype == "bfloat16" or one.error.largest < 0.6 * one.ulp  # rounded once


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_units_of_halves(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.array([1.5, 0.25, np.inf, np.nan], dtype)
    one = check.Comparison.measure("output", x, x, x.astype(float))
    assert one.agrees and one.ulp == float(ml_dtypes.finfo(dtype).eps)
    off = x.copy()
    off[0] += np.array(8 * one.ulp, dtype)
    other = check.Comparison.measure("output", off, x, x.astype(float))
    assert not other.agrees and other.error.largest == 8 * one.ulp
    assert not check.Comparison.measure("output", x.astype("float32"), x, x.astype(float)).agrees


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_mistake_in_halves_is_noticed(dtype, monkeypatch):
    """One number of a result is a quarter too large."""
    module, x = layer(8, 2, dtype=dtype), normal((5, 3, 8), dtype)
    right = mha_c._core.forward

    def wrong(*arguments):
        output, weights = right(*arguments)
        output[0, 0, np.abs(output[0, 0].astype(float)).argmax()] *= np.array(1.25, dtype)
        return output, weights

    check.against_torch(module, x).assert_close()
    monkeypatch.setattr("mha_c._core.forward", wrong)
    assert not check.against_torch(module, x).agrees


@pytest.mark.parametrize("number", range(0, 1260, 7))
def test_layers_agree(number):
    _, configuration = list(command.grid())[number]
    report = configuration.check()
    report.assert_close()
    names = [comparison.name for comparison in report.comparisons]
    heads = [f"  head {head}" for head in range(configuration.num_heads)]
    assert names == ["attn_output", *(["attn_output_weights", *heads] if configuration.need_weights else [])]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_of_torch_in_any_mode(dtype, batch_first):
    """torch's layer may be training, frozen or replaced; inputs may be tensors or arrays, one, two or three."""
    module = torch.nn.MultiheadAttention(12, 3, dropout=0.5, kdim=6, vdim=6, batch_first=batch_first, dtype=dtype)
    query, key = torch.randn(2, 5, 12, dtype=dtype), torch.randn(2, 5, 6, dtype=dtype)
    check.against_torch(module, query, key).assert_close()
    check.against_torch(module.requires_grad_(False), query.numpy(), key, key.numpy()).assert_close()
    assert module.training and not module.out_proj.weight.requires_grad
    replaced = mha_c.torch.replace_attention(torch.nn.MultiheadAttention(12, 3))
    check.against_torch(replaced, torch.randn(4, 2, 12), is_causal=True, average_attn_weights=False).assert_close()
    assert type(replaced) is mha_c.torch.ReplacedAttention


def test_in_inference_mode():
    with torch.inference_mode():
        check.against_torch(torch.nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)).assert_close()
        report = check.model(encoder(), torch.randn(3, 7, 16))
    report.assert_close()
    assert [one.name for one in report.comparisons] == [
        "layers.0.self_attn", "layers.1.self_attn", "layers.0", "layers.1", "output", "output, whole layers"]


def test_what_is_measured():
    """Differences and errors, recomputed here by hand."""
    module, x = layer(8, 4), normal((5, 3, 8))
    one = check.against_torch(module, x, need_weights=False).comparisons[0]
    ours = module(x, x, x, need_weights=False)[0].astype(float)
    theirs = mha_c.torch.forward_in_torch(module, x, x, x, need_weights=False)[0].astype(float)
    exact = reference.multi_head_attention(module.state_dict(), 4, x, x, x, need_weights=False)[0]
    assert one.difference.largest == np.abs(ours - theirs).max()
    assert one.difference.rms == pytest.approx(np.sqrt(np.mean((ours - theirs)**2)))
    assert one.error.largest == pytest.approx(np.abs(ours - exact).max(), rel=1e-6)
    assert one.torch_error.rms == pytest.approx(np.sqrt(np.mean((theirs - exact)**2)), rel=1e-6)
    assert one.ulp == np.spacing(np.float32(np.abs(theirs).max()))
    assert (one.shape, one.torch_shape, one.dtype, one.torch_dtype) == ((5, 3, 8), (5, 3, 8), "float32", "float32")


def test_a_mistake_is_noticed():
    wrong = Wrong(8, 4, seed=0).eval()
    report = check.against_torch(wrong, normal((5, 3, 8)))
    assert [one.agrees for one in report.comparisons] == [False] + [True] * 5
    with pytest.raises(AssertionError, match=r"attn_output +\(5, 3, 8\).*DIFFERS(.|\n)*an error of .*, where torch's"):
        report.assert_close()


@pytest.mark.parametrize("ours, words", [
    (np.zeros((2, 3), np.float32), "shape (2, 3) instead of (2, 2)"),
    (np.zeros((2, 2), np.float64), "dtype float64 instead of float32"),
    (np.full((2, 2), np.nan, np.float32), "3 numbers are NaN or infinite in only one of the two"),
    (np.array([[-np.inf, np.nan], [0, 0]], np.float32), "2 numbers are NaN or infinite in only one of the two"),
], ids=["shape", "dtype", "nan", "infinity"])
def test_shapes_dtypes_and_infinities(ours, words):
    theirs = np.array([[0, 0], [np.nan, 0]], np.float32) if np.isnan(ours).all() else np.zeros((2, 2), np.float32)
    one = check.Comparison.measure("output", ours, theirs, np.zeros((2, 2)))
    assert words in one.disagreements and not one.agrees


def test_rows_that_see_nothing():
    """torch answers NaN; masked_rows="zero" does not, on purpose."""
    x, hidden = normal((5, 3, 8)), np.array([[True] * 5, [False] * 5, [False] * 5])
    for masked_rows in ("torch", "zero"):
        check.against_torch(layer(8, 4, masked_rows=masked_rows), x, key_padding_mask=hidden).assert_close()


def test_empty():
    x = normal((0, 3, 8))
    report = check.against_torch(layer(8, 4), x)
    report.assert_close()
    assert report.comparisons[0].difference == check.Error(0.0, 0.0)


def test_what_cannot_be_checked():
    x = normal((5, 3, 8))
    for module, inputs, error, words in (
            (layer(8, 4), (), TypeError, "got 0 inputs"),
            (layer(8, 4), (x,) * 4, TypeError, "got 4 inputs"),
            (torch.nn.Linear(8, 8), (x,), TypeError, "takes a layer of mha_c or a torch.nn.MultiheadAttention, but got"),
            (torch.nn.Sequential(encoder()), (x,), TypeError, r"It holds 0.layers.0.self_attn, .* pass one of them. check.model compares whole"),
            (torch.nn.MultiheadAttention(8, 4).to(torch.float8_e5m2), (x,), TypeError, "this one is float8_e5m2")):
        with pytest.raises(error, match=words):
            check.against_torch(module, *inputs)
    for module, keyword, written in (
            (layer(8, 4), "is_casual", "is_causal"), (layer(8, 4), "mask", "key_padding_mask=True or attn_mask"),
            (mha_c.TransformerEncoderLayer(8, 4), "is_casual", "is_causal"),
            (mha_c.TransformerEncoderLayer(8, 4), "mask", "src_mask")):
        with pytest.raises(TypeError, match=rf"forward\(\) got an .* Write {written}=True instead of {keyword}="):
            check.against_torch(module, x, **{keyword: True})


WIDTHS = [{"num_kv_heads": 2}, {"head_dim": 3, "v_head_dim": 5, "out_dim": 6}, {"out_dim": 6, "add_bias_kv": True},
          {"head_dim": 3, "add_zero_attn": True, "masked_rows": "zero"}]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_layers_that_torch_lacks(widths, dtype, monkeypatch):
    """The definition alone measures them, beside what NumPy makes of it; a mistake is noticed."""
    monkeypatch.setenv("COLUMNS", "200")
    x, hidden = normal((5, 3, 8), dtype), np.array([[True] * 5, [False] * 5, [False] * 5])
    for call in ({}, {"is_causal": True, "need_weights": False}, {"attn_mask": normal((5, 5), dtype)},
                 {"key_padding_mask": hidden}):
        report = check.against_torch(layer(8, 4, dtype=dtype, **widths), x, **call)
        report.assert_close()
        assert report.title.startswith(f"mha_c and NumPy {np.__version__}: ")
        assert "torch does not have such a layer (" in report.notes[0] and "NumPy error" in str(report)
        assert report.comparisons[0].torch_error.largest > 0
    wrong = Wrong(8, 4, dtype=dtype, **widths).eval()
    report = check.against_torch(wrong, x)
    assert [one.agrees for one in report.comparisons] == [False] + [True] * 5
    assert "where NumPy's is" in str(report)


def test_layers_that_torch_lacks_do_without_torch():
    run_child("""
        import sys
        sys.modules["torch"] = None
        import mha_c, numpy as np
        x = np.ones((5, 3, 8), np.float32)
        mha_c.check.against_torch(mha_c.MultiheadAttention(8, 4, num_kv_heads=2), x).assert_close()
    """)


# ------------------------------------------------------------------------------------------- models


def encoder(**options):
    return torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options), 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_models():
    """Layer by layer; then the output beside torch's ordinary path and its fused one, padding apart."""
    model, x = encoder(), torch.randn(3, 7, 16)
    padding = torch.arange(7) >= torch.tensor([[7], [4], [2]])
    before = {name: type(module) for name, module in model.named_modules()}
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        report = check.model(model, x, src_key_padding_mask=padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
    report.assert_close()
    assert [one.name for one in report.comparisons] == [
        "layers.0.self_attn", "layers.1.self_attn", "layers.0", "layers.1",
        "output", "output, torch's fused path", "output, whole layers"]
    assert {name: type(module) for name, module in model.named_modules()} == before and model.training
    check.model(mha_c.torch.replace_attention(model).double(), x.double().numpy()).assert_close()
    assert model.layers[0].activation_relu_or_gelu == 0  # still replaced


@pytest.fixture
def mistake(monkeypatch):
    """Replaced attention is off by a factor, until another one is set."""
    original, factor = mha_c._core.forward, [1.0001]

    def wrong(*args):
        output, weights = original(*args)
        return output * output.dtype.type(factor[0]), weights

    monkeypatch.setattr(mha_c._core, "forward", wrong)
    return factor


def test_a_mistake_in_a_model_is_noticed(mistake):
    report = check.model(encoder(), torch.randn(3, 7, 16))
    whole_layers = {"layers.0", "layers.1", "output, whole layers"}  # which another function computes
    assert {one.name for one in report.comparisons if one.agrees} == whole_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mistake_in_whole_layers_is_noticed(monkeypatch, dtype):
    """In float64, only the output is compared."""
    model, x = encoder(), torch.randn(3, 7, 16, dtype=dtype)
    check.model(model.to(dtype), x).assert_close()
    original = mha_c._core.transform
    monkeypatch.setattr(mha_c._core, "transform", lambda *args: original(*args) * args[1].dtype.type(1.0001))
    report = check.model(model, x)
    wrong = {"layers.0", "layers.1"} if dtype == torch.float32 else set()
    assert {one.name for one in report.comparisons if not one.agrees} == {*wrong, "output, whole layers"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_models_of_transformers(monkeypatch, dtype):
    """Their whole layers are compared, and those that are left to torch are named."""
    pytest.importorskip("torchvision_operators")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24}
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=2, **sizes)).to(dtype)
    model.encoder.layer[1].output.register_forward_hook(lambda *_: None)
    call = {"input_ids": torch.randint(1, 90, (3, 7)), "attention_mask": torch.ones(3, 7).tril().long()}
    report = check.model(model, **call)
    report.assert_close()
    names = [one.name for one in report.comparisons]
    outputs = [f"output[{name!r}], whole layers" for name in ("last_hidden_state", "pooler_output")]
    assert names == ["encoder.layer.0"] * (dtype == torch.float32) + outputs
    assert "Whole layers that are left to torch: encoder.layer.1 (hooks of output)." in report.notes
    original = mha_c._core.transform

    def wrong(*args):
        output = original(*args)
        output[..., 0] += 0.01
        return output

    monkeypatch.setattr(mha_c._core, "transform", wrong)
    assert not any(one.agrees for one in check.model(model, **call).comparisons)


class Model(torch.nn.Module):
    """What happens around the attention is for the tests to say."""

    def __init__(self, after=lambda module, x: x, attention=torch.nn.MultiheadAttention, **options):
        super().__init__()
        self.attention = attention(16, 2, **options)
        self.after = after

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.after(self, x)


def test_unused_parameters_do_not_matter():
    """The reference is float64, whatever else is in the model."""
    model = Model()
    model.unused = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    report = check.model(model, torch.randn(5, 3, 16))
    report.assert_close()
    assert all(one.torch_error.largest > 0 for one in report.comparisons) and not report.notes


CONSTANT = torch.randn(16, 16)


@pytest.mark.parametrize("magnification", [1, 300])
def test_models_that_do_not_run_in_float64(magnification, mistake):
    """The note says why; layers are measured as ever, and outputs beside what roundings change in this model."""
    model = Model(lambda module, x: torch.sin(magnification * (x @ CONSTANT)))
    x = torch.randn(5, 3, 16)
    for mistake[0], agrees in ((1.0001, False), (1, True)):
        report = check.model(model, x)
        assert [one.agrees for one in report.comparisons] == [agrees, agrees]
        assert len(report.notes) == 1
        assert report.notes[0].startswith("The model does not run in float64 (expected m1 and m2 to have the same dtype")
    assert report.comparisons[0].torch_error.largest > 0  # by the definition


@pytest.mark.parametrize("magnification", [1, 300])
def test_models_in_float64(magnification, mistake):
    model = Model(lambda module, x: torch.sin(magnification * x)).double()
    for mistake[0], agrees in ((1 + 1e-10, False), (1, True)):
        report = check.model(model, torch.randn(5, 3, 16, dtype=torch.float64))
        assert [one.agrees for one in report.comparisons] == [agrees, agrees]
        assert report.notes[0].startswith("Nothing is wider than float64.")


def test_models_of_several_dtypes():
    """Attention in both, and a half layer between them."""
    def after(module, x):
        x = module.linear(x.bfloat16()).double()
        return x + module.other(x, x, x)[0]

    model = Model(after)
    model.linear = torch.nn.Linear(16, 16).bfloat16()
    model.other = torch.nn.MultiheadAttention(16, 2).double()
    report = check.model(model, torch.randn(5, 3, 16))
    report.assert_close()
    assert [one.name for one in report.comparisons] == ["attention", "other", "other, weights", "output"]
    assert report.coverage.here == 2 and report.coverage.left == 0


def test_models_that_write_to_their_inputs_and_draw_random_numbers():
    def after(module, x):
        module.steps += 1
        return x.add_(torch.rand(16)) * module.steps

    model = Model(after)
    model.register_buffer("steps", torch.zeros(()))
    given = torch.randn(5, 3, 16)
    x, state = given.clone(), torch.get_rng_state()
    check.model(model, x).assert_close()
    assert torch.equal(x, given) and model.steps == 0 and torch.equal(torch.get_rng_state(), state)


def test_coverage():
    """What is never called, overrides forward, or is called as a function, does not go unmentioned."""
    class Own(torch.nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)

    def after(module, x):
        return module.own(x)[0] + torch.nn.functional.scaled_dot_product_attention(x, x, x)

    model = Model(after)
    model.own, model.never = Own(16, 2), torch.nn.MultiheadAttention(16, 2)
    report = check.model(model, torch.randn(5, 3, 16))
    report.assert_close()
    assert report.coverage.rows == (
        ("attention", "MultiheadAttention", 1, 0, ""), ("own", "Own", 0, 1, "overrides forward"),
        ("never", "MultiheadAttention", 0, 0, "never called"),
        ("", "scaled_dot_product_attention", 0, 1, "called as a function"))
    for shown in (str(report), report._repr_html_()):
        assert "1 computed by mha_c, 2 left to torch" in shown and "overrides forward" in shown


def test_coverage_is_not_shown_if_all_is_computed_here():
    report = check.model(Model(), torch.randn(5, 3, 16))
    assert report.coverage.rows == (("attention", "MultiheadAttention", 1, 0, ""),)
    assert "left to torch" not in str(report) + report._repr_html_()
    assert check.against_torch(layer(8, 4), normal((5, 3, 8))).coverage is None


def test_models_that_stay_with_torch_say_so():
    model = encoder()
    for each in model.layers:
        torch.nn.utils.parametrizations.weight_norm(each.self_attn, "in_proj_weight")
    report = check.model(model, torch.randn(3, 7, 16))
    report.assert_close()
    assert [row[2:] for row in report.coverage.rows] == [(0, 1, "parametrized weights")] * 2
    assert "0 computed by mha_c, 2 left to torch" in str(report)
    with pytest.raises(ValueError, match="no torch.nn.MultiheadAttention to replace in this Linear"):
        check.model(torch.nn.Linear(2, 2), torch.ones(2))
    with pytest.raises(TypeError, match="check.model takes a torch.nn.Module"):
        check.model(layer(8, 4), normal((5, 3, 8)))


def test_outputs_of_any_structure():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)

        def forward(self, x):
            output, weights = self.attention(x, x, x)
            return {"output": output, "all": [weights, {"hidden": weights > 0.1}], "none": None}

    report = check.model(Model(), torch.randn(5, 3, 8))
    report.assert_close()
    assert [one.name for one in report.comparisons] == [
        "attention", "attention, weights", "output['output']", "output['all'][0]", "output['all'][1]['hidden']"]


# ------------------------------------------------------------------------------------------- how it is shown


def test_html_and_rich():
    report = check.against_torch(layer(8, 4), normal((5, 3, 8)))
    html = report._repr_html_()
    assert html.count("<tr>") == 1 + 6 and html.count("agrees") == 6 + 1 and "mha_c error" in html
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=200, record=True, file=sys.stderr)
    console.print(report)
    assert "attn_output_weights" in console.export_text()


# ------------------------------------------------------------------------------------------- the command


def in_one_line(text):
    return " ".join(text.split())


def test_command_of_one_configuration(capsys):
    assert main("check --embed-dim 8 --num-heads 4 --batch-first --is-causal --attn-mask bool-3d".split()) == 0
    described = "batch_first=True, dtype=float32, training=False); query (3, 5, 8), attn_mask bool (12, 5, 5), is_causal"
    assert described in in_one_line(capsys.readouterr().out)
    assert main("check --embed-dim 6 --num-heads 3 --kdim 4 --unbatched --length 2 --source-length 9 --no-bias "
                "--dtype float64 --no-weights --key-padding-mask float".split()) == 0
    said = in_one_line(capsys.readouterr().out)
    assert "bias=False, kdim=4, dtype=float64, training=False); query (2, 6), key_padding_mask float64 (9,)" in said


def test_command_of_a_state_dict(capsys, tmp_path):
    model = torch.nn.TransformerDecoderLayer(16, 2, 32)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    layer(8, 4, batch_first=True).save(tmp_path / "layer.npz")
    whole = f"check {tmp_path / 'model.pt'} --prefix multihead_attn. --num-heads 2"
    assert main(whole.split()) == 0
    assert "embed_dim=16, num_heads=2, dtype=float32" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "layer.npz")]) == 0
    assert "embed_dim=8, num_heads=4, batch_first=True, dtype=float32" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "layer.npz"), "--dtype", "float64", "--add-zero-attn"]) == 0
    assert "add_zero_attn=True, batch_first=True, dtype=float64" in in_one_line(capsys.readouterr().out)
    for wrong, words in (("none.npz", "none.npz"), ("model.pt", "MultiheadAttention.save: pass --num-heads or --config")):
        assert main(["check", str(tmp_path / wrong)]) == 2
        assert words in capsys.readouterr().err
    assert main(["check", str(tmp_path / "layer.npz"), "--num-heads", "2"]) == 2
    assert "layer.npz records the layer's own arguments: leave out --num-heads\n" in capsys.readouterr().err


def test_command_without_memory(capsys, tmp_path):
    assert main("check --embed-dim 1000000000 --num-heads 1".split()) == 2
    assert "there is not enough memory for this check" in capsys.readouterr().err


def test_command_of_whole_layers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main("check --layer encoder --embed-dim 8 --num-heads 4 --is-causal --key-padding-mask float --dtype float64 "
                "--norm-first --batch-first --length 6 --activation gelu --dim-feedforward 12".split()) == 0
    said = in_one_line(capsys.readouterr().out)
    assert "TransformerEncoderLayer; src (3, 6, 8), src_key_padding_mask float64 (3, 6), is_causal" in said
    assert main("check --layer decoder --embed-dim 8 --num-heads 2 --is-causal --attn-mask bool-3d --source-length 9 "
                "--key-padding-mask bool --dim-feedforward 12 --no-bias".split()) == 0
    said = capsys.readouterr().out
    assert ("TransformerDecoderLayer; tgt (5, 3, 8), memory (9, 3, 8), tgt_mask bool (6, 5, 5), memory_mask bool "
            "(6, 5, 9), tgt_key_padding_mask bool (3, 5), memory_key_padding_mask bool (3, 9), tgt_is_causal"
            ) in in_one_line(said)
    assert max(map(len, said.splitlines())) <= 80


def test_what_the_options_of_whole_layers_make():
    """Every parameter is random, so that none can be left out unnoticed, and the options are those of the layer."""
    options = {"embed_dim": 8, "num_heads": 2, "dim_feedforward": 12, "activation": "silu", "norm_first": True}
    for kind in ("encoder", "decoder"):
        made = command.Configuration(layer=kind, dtype="float64", batch_first=True, **options)._layer()
        assert (made.activation, made.norm_first, made.linear1.weight.shape) == ("silu", True, (12, 8))
        assert made.self_attn.batch_first and made.self_attn.num_heads == 2
        assert all(len(np.unique(array)) > 1 and array.dtype == np.float64 for array in made.parameters())
        assert command.Configuration(layer=kind, embed_dim=8, num_heads=2, bias=False)._layer().linear1.bias is None


def test_command_of_whole_layers_in_files(capsys, tmp_path):
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    names = f"check --layer encoder {tmp_path / 'model.pt'} --num-heads 2 --prefix layers."
    assert main(f"{names}1. --activation gelu --norm-first --batch-first".split()) == 0
    assert "TransformerEncoderLayer; src (3, 5, 16)" in capsys.readouterr().out
    read = command.Configuration(file=str(tmp_path / "model.pt"), layer="encoder", num_heads=2, prefix="layers.1.",
                                 activation="gelu", norm_first=True)._layer()
    assert np.array_equal(read.linear1.weight, model.layers[1].linear1.weight.detach())
    assert (read.activation, read.norm_first, read.self_attn.batch_first) == ("gelu", True, False)

    mha_c.TransformerDecoderLayer(8, 2, 12).save(tmp_path / "decoder.npz")
    saved = ["check", "--layer", "decoder", str(tmp_path / "decoder.npz")]
    assert main([*saved, "--dtype", "float64", "--source-length", "7"]) == 0
    assert "memory (7, 3, 8)" in capsys.readouterr().out
    changed = command.Configuration(file=saved[-1], layer="decoder", batch_first=True, norm_first=True, activation="silu")
    read = changed._layer()
    assert read.multihead_attn.batch_first and read.self_attn.batch_first
    assert read.norm_first and read.activation == "silu"

    for arguments, words in (([*saved, "--num-heads", "2"], "records the layer's own arguments: leave out --num-heads"),
                             (f"check --layer decoder {tmp_path / 'model.pt'} --num-heads 2".split(),
                              "TransformerDecoderLayer.save wrote, without --num-heads"),
                             (["check", "--layer", "encoder", saved[-1]], "decoder.npz holds a TransformerDecoderLayer, "
                              "not a TransformerEncoderLayer: use mha_c.TransformerDecoderLayer.load\n"),
                             (f"check --layer encoder {tmp_path / 'model.pt'}".split(),
                              "was not written by TransformerEncoderLayer.save: pass --num-heads or --config\n"),
                             (f"check --layer decoder {tmp_path / 'model.pt'}".split(),
                              "was not written by TransformerDecoderLayer.save: only such files are checked\n")):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


@pytest.fixture
def bert(tmp_path, monkeypatch):
    """The files of a model of transformers in the folder "bert"."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=48)
    transformers.BertModel(config).save_pretrained("bert")


def test_command_of_a_hugging_face_model(bert, capsys):
    """Its config says what the options say of other files; options that it contradicts are refused."""
    check = "check bert/model.safetensors --config bert/config.json --prefix encoder.layer.1."
    assert main(f"{check} --layer encoder".split()) == 0
    assert "TransformerEncoderLayer; src (3, 5, 32)" in capsys.readouterr().out
    assert main(f"{check} --no-weights --batch-first".split()) == 0
    assert "embed_dim=32, num_heads=4, batch_first=True" in capsys.readouterr().out
    options = {"file": "bert/model.safetensors", "config": "bert/config.json", "prefix": "encoder.layer.1."}
    layer = command.Configuration(layer="encoder", **options)._layer()
    assert (layer.activation, layer.norm_first, layer.norm1.eps) == ("gelu", False, 1e-12)
    assert layer.self_attn.batch_first
    for wrong in ("--norm-first", "--activation relu", "--num-heads 8"):
        assert main(f"{check} --layer encoder {wrong}".split()) == 2
    for wrong in ("--layer decoder --config bert/config.json", "--config bert/config.json", "--prefix layers.0."):
        with pytest.raises(SystemExit):
            main(["check", *wrong.split()])


@pytest.mark.parametrize("option", ["--length", "--batch", "--seed", "--embed-dim"])
@pytest.mark.parametrize("value", ["-1", "two"])
def test_command_names_the_option_with_a_wrong_number(capsys, option, value):
    with pytest.raises(SystemExit):
        main(["check", "--embed-dim", "8", "--num-heads", "2", option, value])
    assert capsys.readouterr().err.endswith(f"argument {option}: must be an int of at least 0, but got '{value}'\n")


@pytest.mark.parametrize("options, words", [
    ("bert", "Is a directory (pass a file in it, such as 'bert/model.safetensors'; for attention or an encoder, also "
             "config='bert/config.json'): 'bert' (Here, config is --config.)"),
    ("bert/model.safetensors --layer encoder --num-heads 4", 'prefix="" matches several layers: choose one of prefix='
                                                             '"encoder.layer.0.", prefix="encoder.layer.1.". (Here, '
                                                             'prefix is --prefix.)'),
    ("bert/model.safetensors --layer encoder --num-heads 4 --prefix encoder.layer.0.",
     "needs config=, the model's config.json, for BERT, RoBERTa, ELECTRA and the like (Here, config is --config.)"),
    ("bert/model.safetensors --config bert/config.json --prefix encoder.layer.0",
     'lacks its final dot: pass prefix="encoder.layer.0." (Here, prefix is --prefix.)'),
    ("bert/model.safetensors --config bert --prefix encoder.layer.0.",
     "(pass config='bert/config.json'): 'bert' (Here, config is --config.)"),
    ("bert/model.safetensors --num-heads 3 --prefix encoder.layer.0.", " from its configuration (Here, num_heads is --num-heads.)"),
])
def test_command_says_which_options_to_write(bert, capsys, options, words):
    assert main(["check", *options.split()]) == 2
    assert capsys.readouterr().err.endswith(f"{words}\n")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_command_over_the_grid_of_whole_layers(capsys, monkeypatch, kind):
    monkeypatch.setenv("COLUMNS", "80")
    everything = list(command.grid(kind))
    assert len({configuration for _, configuration in everything}) == 420
    few = everything[::41]
    monkeypatch.setattr(command, "grid", {kind: few}.get)
    assert main(["check", "--layer", kind]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert f"torch {torch.__version__}: layers of" in said and said.endswith(f"\nall {len(few)} agree\n")
    right = mha_c._core.transform
    monkeypatch.setattr("mha_c._core.transform", lambda *arguments: right(*arguments) + np.float32(1e-3))
    assert main(["check", "--layer", kind]) == 1
    assert f"\n{len(few)} of {len(few)} differ\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind, options, refused", [
    ("encoder", "--kdim 3 --no-weights --add-bias-kv --source-length 3", "--kdim, --add-bias-kv, --source-length, --no-weights"),
    ("decoder", "--vdim 3 --add-zero-attn --prefix x.", "--vdim, --add-zero-attn, --prefix"),
    ("attention", "--dim-feedforward 8 --norm-first --activation gelu", "--dim-feedforward, --activation, --norm-first"),
])  # fmt: skip
def test_options_of_other_layers_are_refused(capsys, kind, options, refused):
    with pytest.raises(SystemExit) as exit_:
        main(f"check --layer {kind} --embed-dim 8 --num-heads 2 {options}".split())
    assert exit_.value.code == 2
    assert f"--layer {kind} does not have {refused}\n" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["--embed-dim", "--no-bias", "--add-bias-kv", "--embed-dim, --kdim, --vdim"])
def test_command_refuses_what_a_file_says(options, capsys):
    """Widths and parameters are those of the file, so they cannot be chosen."""
    words = [word for name in options.split(", ") for word in ([name, "8"] if name.endswith("dim") else [name])]
    with pytest.raises(SystemExit):
        main(["check", "layer.npz", *words])
    assert f"the layer in FILE says it itself: leave out {options}\n" in capsys.readouterr().err


def test_command_over_the_grid(capsys, monkeypatch):
    assert {each.dtype for _, each in command.grid(dtype="float16")} == {"float16"}
    few = list(command.grid())[::105]
    monkeypatch.setattr(command, "grid", lambda layer, dtype: iter(few))
    threads = torch.get_num_threads()
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"\nall {len(few)} agree\n")
    assert "96/40/24 features, 3 heads, float64" in said
    assert torch.get_num_threads() == threads

    one = few[0][1]
    monkeypatch.setattr(command, "grid", lambda layer, dtype: [(("all", dtype), dataclasses.replace(one, dtype=dtype))])
    assert main(["check", "--dtype", "bfloat16"]) == 0
    assert "  bfloat16 " in capsys.readouterr().out

    monkeypatch.setattr(command, "grid", lambda layer, dtype: iter(few))
    monkeypatch.setattr(command, "MultiheadAttention", Wrong)
    assert main(["check"]) == 1
    said = capsys.readouterr().out
    assert "1 DIFFER" in said and "attn_output: an error of" in said and f"\n{len(few)} of {len(few)} differ\n" in said


def test_ctrl_c(capsys, monkeypatch):
    few = list(command.grid())[:3]

    @dataclasses.dataclass(frozen=True)
    class Interrupted(command.Configuration):
        def check(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "grid", lambda layer, dtype: iter([*few, ("more", Interrupted())]))
    assert main(["check"]) == 130
    said = capsys.readouterr()
    assert said.out.endswith("\nall 3 agree; 1 was not checked\n") and said.err == "interrupted\n"


def test_usage(capsys):
    for wrong in ("--embed-dim 8", "--batch-first", "--num-heads 2", "--embed-dim x --num-heads 2", "--attn-mask int"):
        with pytest.raises(SystemExit) as exit_:
            main(["check", *wrong.split()])
        assert exit_.value.code == 2
    assert main("check --embed-dim 8 --num-heads 3".split()) == 2
    said = capsys.readouterr().err
    assert "mha-c check: embed_dim must be divisible by num_heads. Choose embed_dim=6 or 9" in said
    assert said.endswith("(Here, embed_dim is --embed-dim and num_heads is --num-heads.)\n")


def test_without_torch():
    """The exception names the function that was called."""
    done = run_child("""
        import sys
        sys.modules["torch"] = None
        import mha_c, numpy as np
        from mha_c.__main__ import main
        assert main(["check"]) == main(["check", "--embed-dim", "8", "--num-heads", "4"]) == 2
        x = np.zeros((5, 3, 8), np.float32)
        for call in (lambda: mha_c.check.against_torch(mha_c.MultiheadAttention(8, 4), x),
                     lambda: mha_c.check.model(None, x), lambda: mha_c.torch):
            try:
                call()
            except ImportError as error:
                print(error)
    """)
    rest = ("torch, which is not installed: `pip install torch`, or for the CPU alone, which is smaller, "
            "`pip install torch --index-url https://download.pytorch.org/whl/cpu`")
    assert done.stdout.splitlines() == [f"check.against_torch compares with {rest}", f"check.model compares with {rest}",
                                        f"mha_c.torch needs {rest}"]
    assert done.stderr.count(f"mha-c check: this command compares with {rest}\n") == 2


def test_a_broken_torch_is_not_said_to_be_missing(tmp_path):
    """Whatever else goes wrong while torch is imported keeps its own words."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import a_module_that_torch_needs")
    done = run_child(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import mha_c, numpy as np
        for call in (lambda: mha_c.torch, lambda: mha_c.check.model(None)):
            try:
                call()
            except ImportError as error:
                print(error)
    """)
    assert done.stdout.splitlines() == ["No module named 'a_module_that_torch_needs'"] * 2


@pytest.mark.parametrize("change", [lambda answer: (2 * answer[0], answer[1]), lambda answer: answer[0]])
def test_hooks_that_change_the_answer_of_attention(change):
    """What is compared is the attention's own answer; the model goes on with the changed one."""
    class Hooked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(16, 2)
            self.attention.register_forward_hook(lambda module, args, answer: change(answer))

        def forward(self, x):
            answer = self.attention(x, x, x)
            return answer[0] if isinstance(answer, tuple) else answer

    report = check.model(Hooked().eval(), torch.randn(5, 3, 16))
    report.assert_close()
    assert all(one.error.largest < 1e-5 for one in report.comparisons)
