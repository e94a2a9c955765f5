# SPDX-License-Identifier: Apache-2.0
"""Models of torch in bfloat16 and float16 that compute with mha_c.

The result of a half is rounded once. It has the bits of the same call in float32, rounded to the half. For bfloat16, that
call multiplies bfloat16. Where torch is asked as well, the judge is torch in float64, and what an error may be, torch's
own in the same dtype says.
"""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")
import torch.nn.functional as F  # noqa: E402
from mha_c import check  # noqa: E402
from mha_c.functional import scaled_dot_product_attention  # noqa: E402
from mha_c.torch import attention, coverage, replace_attention, replace_layers  # noqa: E402

HALVES = [torch.bfloat16, torch.float16]
SAME_NOISE = 1.5  # two samples of it: models whose attention alone is ours, so that all other roundings are torch's
sdpa = F.scaled_dot_product_attention
pytestmark = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def normal(*shape, dtype):
    return torch.randn(shape).to(dtype)


def rms(x, exact):
    return float((x.double() - exact).square().mean().sqrt())


def masks(dtype):
    attn = torch.rand(5, 5) < 0.3
    attn.fill_diagonal_(False)
    padding = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    added = torch.zeros(5, 5).masked_fill(attn, -torch.inf) + torch.randn(5, 5)
    yield {}
    yield {"attn_mask": attn, "key_padding_mask": padding & False}
    yield {"attn_mask": added.to(dtype)}
    yield {"key_padding_mask": torch.zeros(3, 5).masked_fill(padding, -torch.inf).to(dtype)}


def products(dtype):
    """What makes float32 layers multiply as layers of this dtype."""
    return {"matmul_precision": "bfloat16" if dtype == torch.bfloat16 else None}


def widened(call):
    """The same arguments in float32."""
    return {name: one.float() if one.is_floating_point() else one for name, one in call.items()}


# ------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"kdim": 6, "vdim": 7}, {"bias": False},
                                     {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_attention_has_the_bits_of_float32(dtype, options):
    layer = torch.nn.MultiheadAttention(8, 2, **options).eval().to(dtype)
    ours = replace_attention(copy.deepcopy(layer))
    wide = replace_attention(copy.deepcopy(layer).float(), **products(dtype))
    shape = (3, 5) if options.get("batch_first") else (5, 3)
    inputs = [normal(*shape, width, dtype=dtype) for width in (8, layer.kdim, layer.vdim)]
    for mask in masks(dtype):
        for call in ({}, {"average_attn_weights": False}, {"need_weights": False}):
            output, weights = ours(*inputs, **mask, **call)
            wanted, wanted_weights = wide(*[x.float() for x in inputs], **widened(mask), **call)
            assert output.dtype == dtype and torch.equal(output, wanted.to(dtype))
            assert weights is None if wanted_weights is None else torch.equal(weights, wanted_weights.to(dtype))
    assert coverage(ours).left == 0
    theirs = layer.requires_grad_(True)(*inputs)  # torch's ordinary path
    assert [one.dtype for one in theirs] == [dtype, dtype] and output.shape == theirs[0].shape


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("cls", [torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer])
def test_whole_layers(dtype, cls, options):
    layer = cls(16, 4, 24, **options).eval().to(dtype)
    ours, wide = replace_layers(copy.deepcopy(layer)), replace_layers(copy.deepcopy(layer).float(), **products(dtype))
    inputs = [normal(3, 5, 16, dtype=dtype) for _ in range(1 if cls is torch.nn.TransformerEncoderLayer else 2)]
    output = ours(*inputs)
    assert output.dtype == dtype and (coverage(ours).here, coverage(ours).left) == (1, 0)
    exact = copy.deepcopy(layer).double()(*[x.double() for x in inputs])
    assert rms(output, exact) <= rms(layer(*inputs), exact)
    if cls is torch.nn.TransformerEncoderLayer:  # a decoder's is rounded between its two attentions, too
        assert torch.equal(output, wide(*[x.float() for x in inputs]).to(dtype))


@pytest.fixture
def torchs_fast_path():
    """With nested tensors that leave out padding."""
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(False)


@pytest.mark.parametrize("replace", [replace_attention, replace_layers])
def test_an_encoder_with_padding(dtype, replace, torchs_fast_path):
    layer = torch.nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).eval().to(dtype)
    padding = torch.arange(7) >= torch.tensor([7, 3, 5])[:, None]
    x = normal(3, 7, 16, dtype=dtype)
    ours = replace(copy.deepcopy(model))
    exact = copy.deepcopy(model).double()(x.double(), src_key_padding_mask=padding)[~padding]
    output, theirs = ours(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding)[~padding]
    assert output.dtype == dtype and coverage(ours).left == 0 and coverage(ours).here == 2
    assert rms(output[~padding], exact) <= (1 if replace is replace_layers else SAME_NOISE) * rms(theirs, exact)


def test_changes_in_place_are_noticed(dtype):
    layer = torch.nn.MultiheadAttention(8, 2).eval().to(dtype)
    ours = replace_attention(copy.deepcopy(layer))
    whole = replace_layers(torch.nn.TransformerEncoderLayer(8, 2, 16).eval().to(dtype))
    x = normal(5, 3, 8, dtype=dtype)
    changes = (
        lambda module: module.in_proj_weight.mul_(2),
        lambda module: module.out_proj.weight.data.mul_(2),
        lambda module: module.in_proj_bias.data.fill_(0.5),
        lambda module: setattr(module, "in_proj_weight", torch.nn.Parameter(normal(24, 8, dtype=dtype))),
        lambda module: module.load_state_dict(layer.state_dict()),
    )
    for change in changes:
        before = ours(x, x, x)[0], whole(x)
        change(ours), change(whole.self_attn)
        after = ours(x, x, x)[0], whole(x)
        fresh = replace_attention(copy.deepcopy(ours))(x, x, x)[0], replace_layers(copy.deepcopy(whole))(x)
        for old, new, wanted in zip(before, after, fresh, strict=True):
            assert torch.equal(new, wanted) and not torch.equal(new, old)
    packed = ours._mha_c.packed._kept
    ours(x, x, x)
    assert ours._mha_c.packed._kept is packed


def test_a_model_is_cast_after_it_was_replaced(dtype):
    model = replace_layers(torch.nn.TransformerEncoderLayer(8, 2, 16).eval())
    x = torch.randn(5, 3, 8)
    model(x)
    output = model.to(dtype)(x.to(dtype))
    wide = replace_layers(copy.deepcopy(model).float(), **products(dtype))
    assert output.dtype == dtype and torch.equal(output, wide(x.to(dtype).float()).to(dtype))
    assert model.double()(x.double()).dtype == torch.float64 and coverage(model).left == 0


def test_other_dtypes_beside_it_are_torchs_errors(dtype):
    layer = torch.nn.MultiheadAttention(8, 2).eval().to(dtype)
    ours = replace_attention(copy.deepcopy(layer))
    x = torch.randn(5, 3, 8)
    for inputs in ([x] * 3, [x.to(dtype), x, x], [x.double()] * 3):
        errors = []
        for module in layer, ours:
            with pytest.raises(RuntimeError) as caught:
                module(*inputs)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


# ------------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize("call", [
    {}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": "bool"}, {"attn_mask": "half"}], ids=str)
@pytest.mark.parametrize("queries", [5, 1])
def test_functions_have_the_bits_of_ours(dtype, queries, call):
    q, k, v = (normal(2, length, 4, 8, dtype=dtype).transpose(1, 2) for length in (queries, 7, 7))
    if "attn_mask" in call:
        mask = normal(5, 7, dtype=dtype) if call["attn_mask"] == "half" else torch.ones(5, 7, dtype=torch.bool).tril()
        call = {"attn_mask": mask[:queries]}
    with attention() as found:
        output = sdpa(q, k, v, **call)
    theirs = sdpa(q, k, v, **call)
    assert (found.here, found.left) == (1, 0) and (output.dtype, output.stride()) == (dtype, theirs.stride())
    wanted = scaled_dot_product_attention(q, k, v, **call)
    np.testing.assert_array_equal(output.float().numpy(), wanted.astype("f4"))


def test_the_function_of_a_whole_layer(dtype):
    layer = torch.nn.MultiheadAttention(8, 2).eval().to(dtype)
    x = normal(5, 3, 8, dtype=dtype)
    with attention() as found:
        output, weights = layer(x, x, x)
    wanted = replace_attention(layer)(x, x, x)
    assert found.here == 1 and torch.equal(output, wanted[0]) and torch.equal(weights, wanted[1])


def test_results_are_ordinary_tensors(dtype):
    """They own what they show, may be changed in place, and may take part in what is differentiated."""
    x = normal(2, 4, 5, 8, dtype=dtype)
    with attention():
        output = sdpa(x, x, x)
    assert output.is_leaf and not output._is_view() and output._version == 0
    weight = torch.ones(8, dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        (output * weight).sum().backward()
        assert output.add_(weight).requires_grad
    assert weight.grad.dtype == dtype


@pytest.mark.parametrize("given", [torch.float32, *HALVES])
@pytest.mark.parametrize("cast", HALVES)
def test_autocast_has_torchs_dtypes(dtype, given, cast):
    """In which torch's operations do not agree on a dtype: all is left to torch."""
    if given == dtype:
        pytest.skip("the other half, and float32")
    layer = torch.nn.MultiheadAttention(8, 2).eval().to(given)
    x, q = normal(5, 3, 8, dtype=given), normal(2, 4, 5, 8, dtype=given)
    ours = replace_attention(copy.deepcopy(layer))
    with torch.autocast("cpu", cast):
        wanted, got = (*layer(x, x, x), sdpa(q, q, q)), ours(x, x, x)
        with attention() as found:
            got = *got, sdpa(q, q, q)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert [row.reason for row in (*coverage(ours).rows, *found.rows)] == ["autocast"] * 2


def test_compiled(dtype):
    ours = replace_attention(torch.nn.MultiheadAttention(8, 2).eval().to(dtype))
    x = normal(5, 3, 8, dtype=dtype)
    compiled = torch.compile(lambda x, **call: ours(x, x, x, **call), backend="aot_eager", fullgraph=True)
    for call in ({}, {"need_weights": False}):
        for got, wanted in zip(compiled(x, **call), ours(x, x, x, **call), strict=True):
            assert got is wanted if wanted is None else got.dtype == dtype and torch.equal(got, wanted)
    assert coverage(ours).rows == (("", "MultiheadAttention", 4, 0, ""),)


# ------------------------------------------------------------------------------------------- checks, transformers


def test_check_model(dtype):
    layer = torch.nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).to(dtype)
    inputs = normal(3, 7, 16, dtype=dtype)
    report = check.model(model, inputs)
    report.assert_close()
    assert (report.coverage.here, report.coverage.left) == (2, 0)
    names = [comparison.name for comparison in report.comparisons]
    assert names[:3] == ["layers.0.self_attn", "layers.1.self_attn", "layers.0"]
    if dtype == torch.float16:
        assert [one.dtype for one in check.model(model, inputs.numpy()).comparisons] == [
            one.dtype for one in report.comparisons]


@pytest.mark.parametrize("name", ["BertModel", "ViTModel", "WhisperModel", "T5Model", "LlamaForCausalLM"])
def test_models_of_transformers(dtype, name):
    """The calls of attention in a model err as torch's do, and with them the model."""
    pytest.importorskip("torchvision_operators")
    pytest.importorskip("transformers")
    from hugging_face import CASES, build
    from mha_c.torch import register_transformers
    from transformers import AttentionInterface, AttentionMaskInterface

    found = register_transformers("mha_c")
    ours, theirs = (AttentionInterface()[name] for name in ("mha_c", "sdpa"))
    squares = []

    def both(module, query, key, value, mask, **options):
        wide = {name: one.double() if isinstance(one, torch.Tensor) and one.is_floating_point() else one
                for name, one in {"attention_mask": mask, **options}.items()}
        exact = theirs(module, query.double(), key.double(), value.double(), **wide)[0]
        result = ours(module, query, key, value, mask, **options)
        others = theirs(module, query, key, value, mask, **options)[0]
        assert result[0].dtype == others.dtype == dtype
        squares.append([float((one.double() - exact).square().sum()) for one in (result[0], others)])
        return result

    AttentionInterface.register("both", both)
    AttentionMaskInterface.register("both", AttentionMaskInterface()["mha_c"])
    case = next(case for case in CASES if case.model.__name__ == name)
    model = build(case).to(dtype)
    exact = copy.deepcopy(model).double()

    def run(model, implementation):
        model.set_attn_implementation({"": implementation})
        return case.run(model)

    wanted, output, others = run(exact, "sdpa"), run(model, "both"), run(model, "sdpa")
    assert (found.here, found.left) == (len(squares), 0) == (case.calls, 0) and output.dtype == dtype
    own, torchs = np.sqrt(np.sum(squares, axis=0))
    assert own <= (1.02 if dtype == torch.bfloat16 else 1) * torchs  # bfloat16 rounds what torch rounds
    assert rms(output, wanted) <= SAME_NOISE * rms(others, wanted)


def test_generation(dtype):
    """All calls are computed here, those of one query, too."""
    pytest.importorskip("torchvision_operators")
    pytest.importorskip("transformers")
    from hugging_face import CASES, build, tokens
    from mha_c.torch import register_transformers

    found = register_transformers("mha_c")
    model = build(next(case for case in CASES if case.model.__name__ == "LlamaForCausalLM")).to(dtype)
    model.set_attn_implementation("mha_c")
    model.generate(input_ids=tokens(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert {(row.here, row.left) for row in found.rows} == {(3, 0)}


def test_whole_layers_of_transformers(dtype):
    pytest.importorskip("torchvision_operators")
    pytest.importorskip("transformers")
    from hugging_face import CASES, build

    for name in "BertModel", "ViTModel":
        case = next(case for case in CASES if case.model.__name__ == name)
        model = build(case).to(dtype)
        ours, exact = replace_layers(copy.deepcopy(model)), copy.deepcopy(model).double()
        output, wanted = case.run(ours), case.run(exact)
        assert output.dtype == dtype and rms(output, wanted) <= rms(case.run(model), wanted)
        assert (coverage(ours).here, coverage(ours).left) == (2, 0)
