# SPDX-License-Identifier: Apache-2.0
"""Layers out of the state dicts of others: every way to name and to store projections, and what is refused."""

import copy
import json
import math
from types import SimpleNamespace

import mha_c
import numpy as np
import pytest
from helpers import REPOSITORY, bits, layer, normal, outcome
from mha_c.parameters import options, schemes

from_state_dict = mha_c.MultiheadAttention.from_state_dict


def error_of(*arguments, **options):
    """What from_state_dict raises: its type and its words."""
    error = outcome(lambda: from_state_dict(*arguments, **options)).error
    assert error is not None
    return type(error), str(error)


PLAIN = ("q_proj", "k_proj", "v_proj", "out_proj")


# --------------------------------------------------------------------------------------------- names and layouts

# Names of the projections, those that models with rotary positions or others use in the second table.
SEPARATE = """
    q_proj k_proj v_proj out_proj
    q_proj k_proj v_proj c_proj
    attention.self.query attention.self.key attention.self.value attention.output.dense
    self.query self.key self.value output.dense
    attention.attention.query attention.attention.key attention.attention.value attention.output.dense
    attention.query attention.key attention.value output.dense
    query key value dense
    query key value out
    query key value attention_output
    query key value out_proj
    q_lin k_lin v_lin out_lin
    linear_q linear_k linear_v linear_out
    to_q to_k to_v to_out
    to_q to_k to_v to_out.0
    to_q to_kv to_out
    to_q to_kv to_out.0
    q kv proj
    q_attn c_attn c_proj
    c_attn c_proj
    qkv proj
    qkv projection
    to_qkv to_out
    to_qkv to_out.0
"""
DOUBTFUL = """
    q_proj k_proj v_proj o_proj
    q_proj k_proj v_proj dense
    wq wk wv wo
    q k v o
    Wqkv out_proj
    Wqkv Wo
    qkv_proj o_proj
    query_key_value dense
"""


def test_every_scheme_is_documented():
    """Its models and its names are a row of the table in docs/loading.md."""
    rows = (REPOSITORY / "docs" / "loading.md").read_text().splitlines()
    for scheme in schemes.FOREIGN:
        if not scheme.where:
            found = [row for row in rows if row.startswith("| ") and all(f"`{name}`" in row for name in scheme.names)]
            assert found, scheme
    for option in options._OPTIONS:
        assert any(row.startswith(f"| `{option}` |") for row in rows), option


def table(text):
    return [tuple(line.split()) for line in text.strip().splitlines()]


def parts(module):
    """The weights and the biases of query, key, value and output."""
    rows = np.cumsum(module._parameters.widths.rows[:2])
    if module.in_proj_weight is None:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    else:
        weights = np.split(module.in_proj_weight, rows)
    biases = [*np.split(module.in_proj_bias, rows), module.out_proj.bias] if module.in_proj_bias is not None else []
    return [*weights, module.out_proj.weight], biases


def grouped(arrays, count, per_head=0):
    """Four arrays as `count`: the last inputs below one another, or head by head for `per_head` key and value heads."""
    *inputs, output = arrays
    inputs, together = inputs[: count - 2], inputs[count - 2 :]
    if per_head and len(together) > 1:
        by_head = [array.reshape(per_head, -1, *array.shape[1:]) for array in together]
        together = [np.concatenate(by_head, axis=1).reshape(-1, *together[0].shape[1:])]
    return [*inputs, np.concatenate(together), output]


def stored(module, names, prefix="", kind="weight", per_head=0, transposed=False):
    """The parameters of a layer under other names."""
    weights, biases = (grouped(arrays, len(names), per_head) if arrays else [] for arrays in parts(module))
    weights = [weight.T if transposed or kind == "kernel" else weight for weight in weights]
    state = {f"{prefix}{name}.{kind}": weight for name, weight in zip(names, weights)}
    return state | {f"{prefix}{name}.bias": bias for name, bias in zip(names, biases)}


def test_every_scheme_is_tested():
    assert {scheme.names for scheme in schemes.FOREIGN} == {*table(SEPARATE), *table(DOUBTFUL)}
    doubtful = {scheme.names for scheme in schemes.FOREIGN if scheme.options and not scheme.where}
    assert doubtful == {*table(DOUBTFUL)}


@pytest.mark.parametrize("kind", ["weight", "kernel"])
@pytest.mark.parametrize("names", [*table(SEPARATE), *table(DOUBTFUL)], ids=" ".join)
@pytest.mark.parametrize("bias", [True, False])
def test_names(names, kind, bias):
    """Every known way to name projections, in a block of a model, among others that are not the layer's."""
    module = layer(8, 4, bias=bias)
    state = {"embeddings.weight": np.ones((2, 8)), "norm.weight": np.ones(8), **stored(module, names, "block.0.", kind)}
    more = {"names": names, "strict": False} if names in table(DOUBTFUL) else {}
    more |= {"layout": "stacked"} if names[0] == "query_key_value" else {}
    loaded = from_state_dict(state, "block.0.", num_heads=4, **more)
    assert bits(loaded.state_dict()) == bits(module.state_dict())
    assert bits(from_state_dict(state, num_heads=4, **more).state_dict()) == bits(module.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"kdim": 5},
        {"vdim": 3, "bias": False},
        {"add_bias_kv": True},
        {"add_bias_kv": True, "kdim": 3, "vdim": 4, "bias": False},
        {"dtype": "float64"},
        {"head_dim": 3, "out_dim": 6},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_dim": 3, "add_bias_kv": True},
        {"num_kv_heads": 2, "head_dim": 3, "v_head_dim": 5, "kdim": 6, "vdim": 7, "out_dim": 9},
    ],
    ids=str,
)
def test_free_widths(options):
    """Separate projections tell every width, without a hint."""
    module = layer(8, 4, **options)
    state = stored(module, PLAIN, "a.")
    if module.bias_k is not None:
        state |= {"a.bias_k": module.bias_k, "a.bias_v": module.bias_v}
    loaded = from_state_dict(state, "a.", num_heads=4)
    assert bits(loaded.state_dict()) == bits(module.state_dict())
    for width in ("embed_dim", "kdim", "vdim", "num_kv_heads", "head_dim", "v_head_dim", "out_dim"):
        assert getattr(loaded, width) == getattr(module, width)


def test_narrow_numbers(torch):
    """Of several dtypes, each widened by itself."""
    state = {name: torch.tensor(array) for name, array in stored(layer(8, 2), PLAIN).items()}
    state = {name: tensor.bfloat16() if "k_proj" in name else tensor.half() for name, tensor in state.items()}
    wide = {name: tensor.float().numpy() for name, tensor in state.items()}
    for dtype in ("float32", "float64"):
        got = from_state_dict(state, num_heads=2, dtype=dtype)
        expected = from_state_dict(wide, num_heads=2, dtype=dtype)
        assert bits(got.state_dict()) == bits(expected.state_dict())


def test_projections_that_do_not_fit():
    """torch's words, with the names in the file where one entry is wrong by itself."""

    def words(**changes):
        changed = {name.replace("__", "."): np.ones(shape) for name, shape in changes.items()}
        return error_of({**stored(layer(8, 2), PLAIN), **changed}, num_heads=2)[1]

    assert "size mismatch for k_proj.bias: copying a param with shape (7,)" in words(q_proj__bias=9, k_proj__bias=7)
    assert "size mismatch for v_proj_weight: copying a param with shape (6, 8)" in words(
        v_proj__weight=(6, 8), v_proj__bias=6)
    assert "out_proj.weight must be a matrix, but has shape (8,)" in words(out_proj__weight=8)


@pytest.mark.parametrize("names", table(DOUBTFUL), ids=" ".join)
def test_names_of_models_that_compute_something_else(names):
    """They are refused, by the option that is missing, until somebody says that this model does not need it."""
    state = stored(layer(8, 4), names)
    for more in ({}, {"strict": False}, {"names": names}, {"names": [f"a.{name}" for name in names], "prefix": ""}):
        prefixed = {f"a.{name}": array for name, array in state.items()}
        kind, words = error_of(prefixed, **{"prefix": "a.", "num_heads": 4, "layout": "stacked", **more})
        assert kind is NotImplementedError and ("(scale)" if names[0] == "q" else "(rope)") in words
    assert f"names={names} and strict=False" in error_of(state, num_heads=4)[1]
    for more in ({"names": names, "strict": False}, {"config": {"num_attention_heads": 4}}):
        assert from_state_dict(state, num_heads=4, layout="stacked", **more).num_heads == 4


@pytest.mark.parametrize(
    "names, prefix, option",
    [
        (PLAIN, "transformer.h.0.attn.", "rope"),
        (PLAIN, "h.11.attn.", "rope"),
        (PLAIN, "transformer.h.0.attn.attention.", "scale"),
        (("qkv", "proj"), "model.visual.blocks.3.attn.", "rope"),
        (("qkv", "proj"), "vision_tower.blocks.3.attn.", "rope"),
        (table(SEPARATE)[2], "roformer.encoder.layer.0.", "rope"),
    ],
    ids=str,
)
def test_where_models_use_the_names_of_others(names, prefix, option):
    """The names of GPT-J, GPT-Neo, Qwen2-VL and RoFormer are plain: only the place of the layer tells."""
    state = stored(layer(8, 4), names, prefix)
    for more in ({}, {"names": names}):
        kind, words = error_of(state, prefix, num_heads=4, **more)
        assert kind is NotImplementedError and f"({option})" in words and f'"{prefix}{names[0]}.weight"' in words
    assert error_of(state, num_heads=4)[0] is NotImplementedError
    assert from_state_dict(state, num_heads=4, names=names, strict=False).num_heads == 4
    assert from_state_dict(state, config={"num_attention_heads": 4}).num_heads == 4
    assert mha_c.MultiheadAttention.from_state_dict(state, "", {"num_attention_heads": 4}).num_heads == 4  # as an encoder's
    plain = {name.removeprefix(prefix): array for name, array in state.items()}
    for other in ("encoder.layers.0.attn.", "transformer.attn.", "blocks.0.attn."):
        moved = {other + name: array for name, array in plain.items()}
        assert from_state_dict(moved, other, num_heads=4).num_heads == 4


@pytest.mark.parametrize("names", [("attn.qkv", "attn.proj"), ("qkv", "proj"), ("x.q", "y.kv", "z.proj"),
                                  ("h.c_attn", "h.c_proj"), ("any", "names", "will", "do")], ids=str)
def test_given_names(names):
    """names= takes two, three or four. Names that are known tell the layout."""
    module = layer(8, 4)
    loaded = from_state_dict(stored(module, names, "a."), "a.", num_heads=4, names=names)
    assert bits(loaded.state_dict()) == bits(module.state_dict())


@pytest.mark.parametrize("names", [("qkv", "proj_out"), ("q", "kv", "o"), ("c_attn", "out")], ids=str)
def test_given_names_that_do_not_tell_the_layout(names):
    """One known name is not enough: of two models with a "qkv", one stacks it, and the other has it head by head."""
    module = layer(8, 4)
    kind, words = error_of(stored(module, names), num_heads=4, names=names)
    assert kind is ValueError and f"{names[-2]}.weight holds several projections" in words
    loaded = from_state_dict(stored(module, names), num_heads=4, names=names, layout="stacked")
    assert bits(loaded.state_dict()) == bits(module.state_dict())


def test_given_names_that_are_wrong():
    state = stored(layer(8, 4), ("qkv", "proj"))
    for names in (["qkv"], ["q"] * 5):
        with pytest.raises(ValueError, match=r"names are \(query, key, value, output\), .* but got \["):
            from_state_dict(state, num_heads=4, names=names)
    for names in ("qkv", [1, 2], 3, {"q": 1, "k": 2}):
        with pytest.raises(TypeError):
            from_state_dict(state, num_heads=4, names=names)
    kind, words = error_of(state, num_heads=4, names=["to_qkv", "proj"])
    assert kind is RuntimeError and 'Missing key(s) in state_dict: "to_qkv.weight".' in words


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head_dim", [2, 6])
def test_projections_head_by_head(num_kv_heads, head_dim):
    """The order of rows is never guessed: without `layout` it is an error, and either layout is read as it is."""
    module = layer(8, 4, num_kv_heads=num_kv_heads, head_dim=head_dim)
    names = ("query_key_value", "dense")
    given = {"num_heads": 4, "names": names, "strict": False}
    for layout, state in {
        "stacked": stored(module, names),
        "per_head": stored(module, names, per_head=num_kv_heads),
    }.items():
        loaded = from_state_dict(state, layout=layout, **given)
        assert bits(loaded.state_dict()) == bits(module.state_dict())
        kind, words = error_of(state, **given)
        assert kind is ValueError and 'layout="per_head"' in words and 'layout="stacked"' in words
    names = ("q", "kv", "o")
    three = stored(module, names, per_head=num_kv_heads)
    loaded = from_state_dict(three, num_heads=4, names=names, layout="per_head")
    assert bits(loaded.state_dict()) == bits(module.state_dict())
    with pytest.raises(ValueError, match='layout must be "stacked" or "per_head"'):
        from_state_dict(state, **given, layout="heads")
    for wrong in ({"num_heads": 5}, {"num_kv_heads": 3}):
        with pytest.raises(ValueError, match="rows, which do not fit"):
            from_state_dict(state, **{**given, **wrong}, layout="per_head")


@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_gpt2(bias):
    """The shape tells whether weights are transposed (Hugging Face) or not (nanoGPT); otherwise it is an error."""
    module = layer(8, 4, bias=bias)
    for names in (("c_attn", "c_proj"), ("q_attn", "c_attn", "c_proj")):
        state = stored(module, names, transposed=True)
        state |= {"bias": np.tril(np.ones((1, 1, 9, 9), bool)), "masked_bias": np.float32(-1e4)}  # of old versions
        assert bits(from_state_dict(state, num_heads=4).state_dict()) == bits(module.state_dict())
    square = stored(layer(24, 4, head_dim=2, bias=bias), ("c_attn", "c_proj"))
    with pytest.raises(ValueError, match="does not tell whether it is transposed"):
        from_state_dict(square, num_heads=4)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("output", ["out", "attention_output"])
def test_kernels_with_an_axis_for_the_heads(output, num_kv_heads):
    """Flax and Keras: the shape shows the heads, and names may have slashes, or be in a mapping of mappings."""
    module = layer(10, 4, head_dim=3, v_head_dim=5, out_dim=6, num_kv_heads=num_kv_heads)
    weights, biases = parts(module)
    shapes = [(10, 4, 3), (10, num_kv_heads, 3), (10, num_kv_heads, 5), (4, 5, 6)]
    names = ("query", "key", "value", output)
    kernels = {name: weight.T.reshape(shape) for name, weight, shape in zip(names, weights, shapes)}
    biases = {name: bias.reshape(shape[1:]) if name != output else bias
              for name, bias, shape in zip(names, biases, shapes)}
    flat = {f"mha/{name}/kernel": kernel for name, kernel in kernels.items()}
    flat |= {f"mha/{name}/bias": bias for name, bias in biases.items()}
    nested = {"params": {"mha": {name: {"kernel": kernels[name], "bias": biases[name]} for name in names}}}
    for state, prefix in (
        (flat, "mha/"),
        (flat, ""),
        (nested, "mha."),
        ({f"{name}:0": array for name, array in flat.items()}, "mha/"),
    ):
        loaded = from_state_dict(state, prefix)
        assert bits(loaded.state_dict()) == bits(module.state_dict())
        assert (loaded.num_heads, loaded.num_kv_heads, loaded.head_dim) == (4, num_kv_heads, 3)
    with pytest.raises(ValueError, match="num_heads is 2, but the shape of the kernels says 4"):
        from_state_dict(flat, num_heads=2)
    with pytest.raises(ValueError, match="value.kernel must be a 3-D array"):
        from_state_dict({**flat, "mha/value/kernel": np.ones((10, 20))})


# ------------------------------------------------------------------------------- the layers of other libraries

E, H = 24, 4


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def random_module(torch, module):
    """A module in float64 with random parameters."""
    module = module.double().eval()
    with torch.no_grad():
        for n, (_, parameter) in enumerate(sorted(module.named_parameters())):
            parameter.copy_(torch.from_numpy(normal(parameter.shape, "float64", n)) / math.sqrt(E))
    return module


def transformers_library():
    pytest.importorskip("torchvision_operators")  # before transformers, which needs them
    return pytest.importorskip("transformers")


def configuration(name, **arguments):
    config = getattr(transformers_library(), name)(**arguments)
    config._attn_implementation = "eager"
    return config


def attention_class(model, name):
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, name)


def bert(torch, model, name):
    config = configuration(f"{name}Config", hidden_size=E, num_attention_heads=H)
    module = attention_class(model, f"{name}Attention")(config)
    return module, config, lambda x: module.output.dense(module.self(x)[0])


def albert(torch):
    config = configuration("AlbertConfig", hidden_size=E, num_attention_heads=H)
    module = attention_class("albert", "AlbertAttention")(config)
    without_norm = copy.copy(module)
    without_norm._modules = {**module._modules, "LayerNorm": torch.nn.Identity()}
    return module, config, lambda x: without_norm(x)[0] - x


def distilbert(torch):
    config = configuration("DistilBertConfig", dim=E, n_heads=H)
    module = attention_class("distilbert", "DistilBertSelfAttention")(config)
    return module, config, lambda x: module(x)[0]


def bart(torch, model, name):
    config = configuration(f"{name}Config", d_model=E, encoder_attention_heads=H, decoder_attention_heads=H)
    module = attention_class(model, f"{name}Attention")(E, H, config=config)
    return module, config, lambda x: module(x)[0]


def vision(torch, model, name, config_name):
    config = configuration(config_name, hidden_size=E, num_attention_heads=H)
    module = attention_class(model, name)(config)
    return module, config, lambda x: module(x)[0]


def wav2vec2(torch):
    config = configuration("Wav2Vec2Config", hidden_size=E, num_attention_heads=H)
    module = attention_class("wav2vec2", "Wav2Vec2Attention")(E, H, config=config)
    return module, config, lambda x: module(x)[0]


def opt(torch):
    config = configuration("OPTConfig", hidden_size=E, num_attention_heads=H)
    module = attention_class("opt", "OPTAttention")(config, layer_idx=0)
    return module, config, lambda x: module(x)[0]


def gpt2(torch):
    config = configuration("GPT2Config", n_embd=E, n_head=H)
    module = attention_class("gpt2", "GPT2Attention")(config, layer_idx=0)
    hidden = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    return module, config, lambda x: module(x, attention_mask=hidden)[0]


def sam(torch):
    config = configuration("SamVisionConfig", hidden_size=E, num_attention_heads=H, use_rel_pos=False)
    module = attention_class("sam", "SamVisionAttention")(config, window_size=0)
    return module, config, lambda x: module(x[:, :, None])[0][:, :, 0]


def xlm(torch):
    config = configuration("XLMConfig", emb_dim=E, n_heads=H)
    module = attention_class("xlm", "MultiHeadAttention")(H, E, config)
    return module, config, lambda x: module(x, torch.ones(2, 5))[0]


def grounding_dino(torch):
    config = configuration("GroundingDinoConfig", d_model=E, encoder_attention_heads=H, decoder_attention_heads=H)
    module = attention_class("grounding_dino", "GroundingDinoMultiheadAttention")(config, num_attention_heads=H)
    return module, config, lambda x: module(x, x, x)[0]


def timm(torch):
    module = pytest.importorskip("timm.layers").Attention(E, H)
    return module, None, module


def pvt(torch):
    module = pytest.importorskip("timm.models.pvt_v2").Attention(E, H)
    return module, None, lambda x: module(x, (1, 5))


def x_transformers(torch):
    module = pytest.importorskip("x_transformers.x_transformers").Attention(E, dim_head=5, heads=H)
    return module, None, module


def vit_pytorch(torch):
    pytest.importorskip("torchvision_operators")
    module = pytest.importorskip("vit_pytorch.vit").Attention(E, H, 5)
    without_norm = copy.copy(module)
    without_norm._modules = {**module._modules, "norm": torch.nn.Identity()}
    return module, None, without_norm


def diffusers(torch):
    pytest.importorskip("torchvision_operators")
    module = pytest.importorskip("diffusers.models.attention_processor").Attention(E, heads=H, dim_head=5)
    return module, None, module


def conformer(torch):
    """Without its relative positions, which are refused."""
    module = pytest.importorskip("conformer.conformer").Attention(E, heads=H, dim_head=5)
    without = torch.nn.Module()
    without.to_q, without.to_kv, without.to_out = module.to_q, module.to_kv, module.to_out

    def forward(x):
        with torch.no_grad():
            module.double().rel_pos_emb.weight.zero_()
        return module(x)

    return without, None, forward


MODELS = {
    "BERT": lambda torch: bert(torch, "bert", "Bert"),
    "RoBERTa": lambda torch: bert(torch, "roberta", "Roberta"),
    "ELECTRA": lambda torch: bert(torch, "electra", "Electra"),
    "ALBERT": albert,
    "DistilBERT": distilbert,
    "BART": lambda torch: bart(torch, "bart", "Bart"),
    "Whisper": lambda torch: bart(torch, "whisper", "Whisper"),
    "Wav2Vec2": wav2vec2,
    "OPT": opt,
    "CLIP": lambda torch: vision(torch, "clip", "CLIPAttention", "CLIPVisionConfig"),
    "SigLIP": lambda torch: vision(torch, "siglip", "SiglipAttention", "SiglipVisionConfig"),
    "BLIP": lambda torch: vision(torch, "blip", "BlipAttention", "BlipVisionConfig"),
    "SAM": sam,
    "GPT-2": gpt2,
    "XLM": xlm,
    "Grounding DINO": grounding_dino,
    "timm": timm,
    "PVT": pvt,
    "x-transformers": x_transformers,
    "vit-pytorch": vit_pytorch,
    "diffusers": diffusers,
    "conformer": conformer,
}


def assert_computes_the_same(torch, loaded, forward, is_causal=False):
    """Some of them compute the softmax in float32, whatever their own type."""
    x = normal((2, 5, E), "float64")
    with torch.no_grad():
        expected = forward(torch.from_numpy(x)).numpy()
    output, _ = loaded.eval()(x, x, x, need_weights=False, is_causal=is_causal)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(output, expected, rtol=0, atol=4 * np.finfo("float32").eps)


@pytest.mark.parametrize("name", MODELS)
def test_the_loaded_layer_computes_what_the_model_does(torch, name):
    """Without a hint but the heads, and with the heads from the model's config, in JSON or as a mapping."""
    module, config, forward = MODELS[name](torch)
    state = random_module(torch, module).state_dict(prefix="model.encoder.layers.1.attn.")
    options = [{"num_heads": H}]
    if config is not None:
        options += [{"config": config.to_dict()}]
    for more in options:
        loaded = from_state_dict(state, "model.encoder.layers.1.attn.", batch_first=True, **more)
        assert loaded.num_heads == H
        assert_computes_the_same(torch, loaded, forward, is_causal=name == "GPT-2")


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2"])
def test_vision_models_of_hugging_face(torch, tmp_path, name):
    """From the file that save_pretrained writes, with its config.json; and from the model, whose names differ."""
    config = configuration(
        f"{name}Config", hidden_size=E, num_attention_heads=H, num_hidden_layers=2, intermediate_size=8, image_size=8,
        patch_size=4,
    )  # fmt: skip
    model = random_module(torch, getattr(transformers_library(), f"{name}Model")(config))
    attention = [module for path, module in model.named_modules() if path.endswith("1.attention")][0]
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    sources = [(path, "encoder.layer.1."), (path, "encoder.layer.1.attention."), (attention.state_dict(), "")]
    for source, prefix in sources:
        loaded = from_state_dict(source, prefix, config=tmp_path / "config.json", batch_first=True)
        assert_computes_the_same(torch, loaded, lambda x: attention(x)[0])


def test_the_attention_pool_of_clip(torch):
    """Its query is the mean of all tokens, and its output has a width of its own."""
    pytest.importorskip("torchvision_operators")
    module = pytest.importorskip("open_clip.modified_resnet").AttentionPool2d(2, E, H, 10)
    loaded = from_state_dict(random_module(torch, module).state_dict(), num_heads=H).eval()
    image = normal((3, E, 2, 2), "float64")
    tokens = image.reshape(3, E, 4).transpose(2, 0, 1)
    tokens = np.concatenate([tokens.mean(0, keepdims=True), tokens])
    tokens = tokens + module.positional_embedding.detach().numpy()[:, None]
    expected = module(torch.from_numpy(image)).detach()
    np.testing.assert_allclose(loaded(tokens[:1], tokens, tokens)[0][0], expected, rtol=1e-6, atol=1e-7)


def test_keras(torch, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    for bias in True, False:
        module = keras.layers.MultiHeadAttention(H, 5, value_dim=7, use_bias=bias, output_shape=10, dtype="float64")
        module.build((2, 5, E), (2, 6, E), (2, 6, E))
        for n, weight in enumerate(module.weights):
            weight.assign(normal(tuple(weight.shape), "float64", n) / math.sqrt(E))
        loaded = from_state_dict({w.path: w.value for w in module.weights}, batch_first=True).eval()
        x, y, z = normal((2, 5, E), "float64"), normal((2, 6, E), "float64", 1), normal((2, 6, E), "float64", 2)
        expected = module(x, value=z, key=y).detach()
        np.testing.assert_allclose(loaded(x, y, z)[0], expected, rtol=0, atol=4 * np.finfo("float32").eps)


def test_conformers_are_refused(torch):
    module = pytest.importorskip("conformer.conformer").Attention(E, heads=H, dim_head=5)
    kind, words = error_of(module.state_dict(), num_heads=H)
    assert kind is NotImplementedError and "(bias: " in words


def test_models_whose_positions_are_left_out(torch):
    """Models that are refused, with the rotations and biases that this version lacks set to none."""
    llama = configuration("LlamaConfig", hidden_size=E, num_attention_heads=H, num_key_value_heads=2)
    neox = configuration("GPTNeoXConfig", hidden_size=E, num_attention_heads=H)
    bloom = configuration("BloomConfig", hidden_size=E, n_head=H)
    falcon = configuration("FalconConfig", hidden_size=E, num_attention_heads=H, num_kv_heads=2, alibi=True, bias=True,
                           new_decoder_architecture=True)
    mpt = configuration("MptConfig", d_model=E, n_heads=H)
    phi = configuration("PhiConfig", hidden_size=E, num_attention_heads=H)
    phi3 = configuration("Phi3Config", hidden_size=E, num_attention_heads=H, num_key_value_heads=2, pad_token_id=0)
    modern = configuration("ModernBertConfig", hidden_size=E, num_attention_heads=H)
    still = {width: (torch.ones(1, 5, width).double(), torch.zeros(1, 5, width).double()) for width in (2, 3, 6)}
    nothing, no_alibi = torch.zeros(2, 5, E).double(), torch.zeros(2 * H, 1, 5).double()
    hidden = torch.zeros(2, 1, 5, 5).double()
    fused = {"names": ("query_key_value", "dense"), "layout": "per_head"}
    for module, more, forward in (
        (attention_class("llama", "LlamaAttention")(llama, layer_idx=0), {"names": table(DOUBTFUL)[0]},
         lambda m, x: m(x, position_embeddings=still[6], attention_mask=None)[0]),
        (attention_class("gpt_neox", "GPTNeoXAttention")(neox, layer_idx=0), fused,
         lambda m, x: m(x, attention_mask=None, position_embeddings=still[2])[0]),
        (attention_class("bloom", "BloomAttention")(bloom, layer_idx=0), fused,
         lambda m, x: m(x, nothing, no_alibi, hidden)[0]),
        (attention_class("falcon", "FalconAttention")(falcon, layer_idx=0), {**fused, "num_kv_heads": 2},
         lambda m, x: m(x, no_alibi, hidden)[0]),
        (attention_class("mpt", "MptAttention")(mpt), {"names": ("Wqkv", "out_proj")},
         lambda m, x: m(x, torch.zeros(H, 5, 5).double())[0]),
        (attention_class("phi", "PhiAttention")(phi, layer_idx=0), {"names": table(DOUBTFUL)[1]},
         lambda m, x: m(x, position_embeddings=still[3], attention_mask=None)[0]),
        (attention_class("phi3", "Phi3Attention")(phi3, layer_idx=0), {"names": ("qkv_proj", "o_proj")},
         lambda m, x: m(x, position_embeddings=still[6], attention_mask=None)[0]),
        (attention_class("modernbert", "ModernBertAttention")(modern, layer_idx=0), {"names": ("Wqkv", "Wo")},
         lambda m, x: m(x, position_embeddings=still[6])[0]),
    ):  # fmt: skip
        module = random_module(torch, module)
        assert error_of(module.state_dict(), num_heads=H, layout="per_head")[0] is NotImplementedError
        loaded = from_state_dict(module.state_dict(), num_heads=H, strict=False, batch_first=True, **more)
        assert_computes_the_same(torch, loaded, lambda x: forward(module, x))


def test_t5_without_its_bias(torch):
    """Given names, a layer scales scores, which T5 does not."""
    config = configuration("T5Config", d_model=E, num_heads=H, d_kv=5)
    module = random_module(torch, attention_class("t5", "T5Attention")(config, has_relative_attention_bias=False))
    state = module.state_dict()
    state["q.weight"] = state["q.weight"] * math.sqrt(5)
    loaded = from_state_dict(state, num_heads=H, names=("q", "k", "v", "o"), strict=False, batch_first=True)
    assert_computes_the_same(torch, loaded, lambda x: module(x)[0])


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "option, name",
    [
        ("rope", "attn.rotary_emb.inv_freq"),
        ("rope", "attn.rope.freqs"),
        ("rope", "rotary_emb.inv_freq"),  # of the model, as in x-transformers
        ("rope", "layers.rotary_pos_emb.inv_freq"),
        ("rope", "rope_embed.periods"),  # DINOv3
        ("rope", "rope.freqs"),  # of Llama by Meta
        ("qk_norm", "attn.q_norm.weight"),
        ("qk_norm", "attn.k_layernorm.weight"),
        ("qk_norm", "attn.norm_q.weight"),
        ("qk_norm", "attn.query_ln.scale"),
        ("qk_norm", "attn.qk_norm_q_scale"),
        ("bias", "attn.relative_attention_bias.weight"),
        ("bias", "attn.relative_position_bias_table"),
        ("bias", "attn.distance_embedding.weight"),
        ("bias", "attn.rel_pos_h"),
        ("bias", "attn.pos_bias_u"),
        ("bias", "layers.relative_attention_bias.weight"),
        ("bias", "rel_pos.mlp.0.weight"),
        ("bias", "embed_positions.pe_k.weight"),  # SpeechT5
        ("alibi", "attn.alibi_slopes"),
        ("sinks", "attn.sinks"),
    ],
)
def test_what_names_show(option, name):
    """A layer that would compute something else is refused by the name of what is missing, whatever `strict` says."""
    state = stored(layer(8, 4), PLAIN, "layers.0.attn.")
    shown = {name.replace("attn.", "layers.0.attn."): np.ones(3)}
    for more in ({}, {"strict": False}):
        kind, words = error_of({**state, **shown}, "layers.0.attn.", num_heads=4, **more)
        assert kind is NotImplementedError and f"({option}: there is " in words
    given = {"num_heads": 4, "names": PLAIN}
    assert error_of({**state, **shown}, "layers.0.attn.", **given)[0] is NotImplementedError
    assert from_state_dict({**state, **shown}, "layers.0.attn.", **given, strict=False).num_heads == 4


@pytest.mark.parametrize("name", ["layers.1.attn.q_norm.weight", "vision.rotary_emb.inv_freq", "layers.0.norm.weight",
                                  "layers.0.attn.out_proj_norm", "prope.weight"])
def test_what_names_do_not_show(name):
    """Other layers, other models in the same file."""
    state = {**stored(layer(8, 4), PLAIN, "layers.0.attn."), name: np.ones(3)}
    strict = "out_proj_norm" not in name
    assert from_state_dict(state, "layers.0.attn.", num_heads=4, strict=strict).num_heads == 4


def test_grouped_heads_of_x_transformers():
    """Its query head h reads key and value head h % num_kv_heads, which is the same for one head alone."""
    names = ("to_q", "to_k", "to_v", "to_out")
    kind, words = error_of(stored(layer(8, 4, num_kv_heads=2), names), num_heads=4)
    assert kind is NotImplementedError and "kv_heads" in words
    module = layer(8, 4, num_kv_heads=1)
    assert bits(from_state_dict(stored(module, names), num_heads=4).state_dict()) == bits(module.state_dict())
    module = layer(8, 4, num_kv_heads=2)
    given = {"num_heads": 4, "names": names}
    assert error_of(stored(module, names), **given)[0] is NotImplementedError
    loaded = from_state_dict(stored(module, names), **given, strict=False)
    assert bits(loaded.state_dict()) == bits(module.state_dict())


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"rope_theta": 10000.0}, {"rope"}),
        ({"rope_parameters": {"rope_type": "default"}}, {"rope"}),
        ({"rope_scaling": None, "rotary_pct": 0}, set()),
        ({"rotary_dim": 64}, {"rope"}),
        ({"model_type": "llama"}, {"rope"}),
        ({"model_type": "bert"}, set()),
        ({"position_embedding_type": "absolute"}, set()),
        ({"position_embedding_type": "rotary"}, {"rope"}),
        ({"position_embedding_type": "relative_key_query"}, {"bias"}),
        ({"relative_attention_num_buckets": 32, "model_type": "t5"}, {"bias", "scale"}),
        ({"use_relative_position_bias": False, "relative_attention": False}, set()),
        ({"use_qk_norm": True}, {"qk_norm"}),
        ({"use_qk_norm": False, "qk_layernorm": False}, set()),
        ({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, {"softcap"}),
        ({"attn_logit_softcapping": None, "final_logit_softcapping": 30.0}, set()),
        ({"query_pre_attn_scalar": 256, "sliding_window": 4096}, {"scale", "window"}),
        ({"attention_multiplier": 0.015625}, {"scale"}),
        ({"scale_attn_weights": False}, {"scale"}),
        ({"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}, set()),
        ({"model_type": "gpt_neo"}, {"scale"}),
        ({"model_type": "bloom"}, {"alibi"}),
        ({"alibi": True}, {"alibi"}),
        ({"attention_type": "block_sparse"}, {"approximation"}),
        ({"learnable_sink_init": 0.5}, {"sinks"}),
        ({"sinkhorn_iterations": 100}, set()),
        ({"sliding_window": None, "scale_embedding": True, "layer_norm_eps": 1e-5, "qkv_bias": True}, set()),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_what_a_config_shows(config, expected):
    """Everything that is missing is named at once, also for names that are plain."""
    config = {"num_attention_heads": 4, "hidden_size": 8, **config}
    assert options.read_config(config, "").shown.keys() == expected
    if expected:
        for names in (None, PLAIN):
            kind, words = error_of(stored(layer(8, 4), PLAIN), config=config, names=names)
            assert kind is NotImplementedError and all(f"({option}: its config has " in words for option in expected)


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Qwen3Config", "Gemma2Config", "GptOssConfig",
                                  "PhiConfig", "GPTNeoXConfig", "GPTJConfig", "GPTNeoConfig", "BloomConfig",
                                  "MptConfig",
                                  "FalconConfig", "T5Config", "MPNetConfig", "RoFormerConfig", "ModernBertConfig",
                                  "LayoutLMv3Config", "NystromformerConfig", "GraniteConfig"])
def test_configs_of_models_that_compute_something_else(name):
    assert options.read_config(configuration(name).to_dict(), "").shown


@pytest.mark.parametrize("name", ["BertConfig", "RobertaConfig", "ElectraConfig", "AlbertConfig", "DistilBertConfig",
                                  "BartConfig", "MBartConfig", "WhisperConfig", "OPTConfig", "GPT2Config", "ViTConfig",
                                  "DeiTConfig", "Dinov2Config", "CLIPVisionConfig", "CLIPTextConfig", "Wav2Vec2Config",
                                  "HubertConfig", "BlipVisionConfig", "SiglipVisionConfig", "DetrConfig",
                                  "XGLMConfig", "MarianConfig", "PegasusConfig", "XLMConfig", "CamembertConfig"])
def test_configs_of_plain_models(name):
    config = options.read_config(configuration(name).to_dict(), "model.encoder.")
    assert not config.shown and config.num_heads and config.embed_dim


# ------------------------------------------------------------------------------------------------------ config


def test_a_config_tells_the_heads(tmp_path):
    """Query heads, key and value heads, their width; as a mapping and as a file. Contradictions are errors."""
    module = layer(10, 4, head_dim=6, num_kv_heads=2)
    state = stored(module, ("qkv", "proj"))
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "hidden_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (config, tmp_path / "config.json", str(tmp_path / "config.json")):
        loaded = from_state_dict(state, config=source)
        assert bits(loaded.state_dict()) == bits(module.state_dict())
        assert (loaded.num_heads, loaded.num_kv_heads, loaded.head_dim) == (4, 2, 6)
    assert from_state_dict(state, config={"num_attention_heads": 4}).num_kv_heads == 2
    # Models of Hugging Face have the batch first, layers of torch the length.
    for given, expected in (({"config": config}, True), ({"config": config, "batch_first": False}, False),
                            ({"num_heads": 4, "num_kv_heads": 2}, False)):
        assert from_state_dict(state, **given).batch_first is expected
    with pytest.raises(ValueError, match="num_heads is 2, but config says 4"):
        from_state_dict(state, config=config, num_heads=2)
    with pytest.raises(ValueError, match="config is for layers with 12 features, but this one has 10: pass num_heads"):
        from_state_dict(state, config={**config, "hidden_size": 12})
    assert from_state_dict(state, config={**config, "hidden_size": 12}, num_heads=4).num_heads == 4


@pytest.mark.parametrize(
    "config, start, expected",
    [
        ({"n_head": 3}, "", (3, None)),
        ({"encoder_attention_heads": 4, "decoder_attention_heads": 2}, "decoder.layers.0.encoder_attn.", (2, None)),
        ({"encoder_attention_heads": 4, "decoder_attention_heads": 2}, "encoder.layers.0.self_attn.", (4, None)),
        ({"encoder_attention_heads": 4, "decoder_attention_heads": 4}, "", (4, None)),
        ({"encoder_attention_heads": 4, "decoder_attention_heads": 2}, "", (None, None)),
        ({"num_attention_heads": 71, "multi_query": True, "num_kv_heads": 71}, "", (71, 1)),
        ({"n_head": 8, "multi_query": True, "num_kv_heads": 2, "new_decoder_architecture": True}, "", (8, 2)),
        ({"num_heads": [3, 6, 12]}, "", (None, None)),
        ({}, "", (None, None)),
    ],
    ids=str,
)  # fmt: skip
def test_where_a_config_has_the_heads(config, start, expected):
    assert options.read_config(config, start)[:2] == expected


def test_configs_that_do_not_tell(tmp_path):
    state = stored(layer(8, 4), PLAIN)
    for more in ({}, {"config": {}}, {"config": {"num_heads": [3, 6]}}):
        with pytest.raises(TypeError, match="needs num_heads, which the shapes do not show, or config="):
            from_state_dict(state, **more)
    clip = {"text_config": {"num_attention_heads": 4}, "vision_config": {"num_attention_heads": 2}, "dim": 3}
    with pytest.raises(ValueError, match=r"pass config\['text_config'\] or config\['vision_config'\]"):
        from_state_dict(state, config=clip)
    for wrong in (3, [], SimpleNamespace(num_attention_heads=4)):
        with pytest.raises(TypeError, match=r"config must be a mapping, such as model\.config\.to_dict\(\), or a path"):
            from_state_dict(state, config=wrong)
    (tmp_path / "config.json").write_text('[{"num_attention_heads": 4}]')
    with pytest.raises(ValueError, match=r"config\.json does not hold a mapping, as a model's config.json does, but \["):
        from_state_dict(state, config=tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4')
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        from_state_dict(state, config=tmp_path / "config.json")
    with pytest.raises(FileNotFoundError):
        from_state_dict(state, config=tmp_path / "nowhere.json")


# ------------------------------------------------------------------------------------------------------ biases


@pytest.mark.parametrize("names", [PLAIN, ("to_q", "to_kv", "to_out"), ("qkv", "proj")], ids=" ".join)
def test_biases_that_models_lack(names):
    """None at all, none for the output, only that of the output, or none for keys (Whisper): they are zeros."""
    module = layer(8, 4)
    state = stored(module, names)
    biases = [f"{name}.bias" for name in names]
    lacks = [[biases[-1]], biases[:-1]] + [biases[1:2]] * (len(names) == 4)
    for missing in lacks:
        partial = {name: array for name, array in state.items() if name not in missing}
        whole = {name: np.zeros_like(array) if name in missing else array for name, array in state.items()}
        expected = from_state_dict(whole, num_heads=4)
        assert bits(from_state_dict(partial, num_heads=4).state_dict()) == bits(expected.state_dict())
    none = {name: array for name, array in state.items() if name not in biases}
    assert from_state_dict(none, num_heads=4).in_proj_bias is None


@pytest.mark.parametrize("missing", [["q_proj.bias"], ["v_proj.bias"], ["q_proj.bias", "v_proj.bias"]], ids=str)
def test_biases_that_no_model_lacks_alone(missing):
    """The same rule as for torch's own names: an error, or zeros with strict=False."""
    state = stored(layer(8, 4), PLAIN)
    partial = {name: array for name, array in state.items() if name not in missing}
    kind, words = error_of(partial, num_heads=4)
    assert kind is RuntimeError and ", ".join(f'"{name}"' for name in missing) in words and "strict=False" in words
    whole = {name: np.zeros_like(array) if name in missing else array for name, array in state.items()}
    loaded = from_state_dict(partial, num_heads=4, strict=False)
    assert bits(loaded.state_dict()) == bits(from_state_dict(whole, num_heads=4).state_dict())


@pytest.mark.parametrize("missing", ["in_proj_bias", "out_proj.bias"])
def test_biases_that_torchs_layer_lacks(missing):
    """torch has both or none."""
    module = layer(8, 4)
    state = {name: array for name, array in module.state_dict().items() if name != missing}
    kind, words = error_of(state, num_heads=4)
    assert kind is RuntimeError and f'Missing key(s) in state_dict: "{missing}". ' in words and "strict=False" in words
    loaded = from_state_dict(state, num_heads=4, strict=False)
    expected = {**module.state_dict(), missing: np.zeros_like(module.state_dict()[missing])}
    assert bits(loaded.state_dict()) == bits(expected)


# ------------------------------------------------------------------------------------------- mappings in mappings


@pytest.mark.parametrize("prefix", ["encoder.", "model.encoder.", ""])
@pytest.mark.parametrize("names", [None, PLAIN], ids=str)
def test_nested_state_dicts(prefix, names):
    """What trainers save around a state dict is passed by, if there is one layer that the prefix can mean."""
    module = layer(8, 4)
    state = module.state_dict() if names is None else stored(module, names)
    state = {f"encoder.{name}": array for name, array in state.items()} | {"norm.weight": np.ones(8)}
    optimizer = {"state": {0: {"exp_avg": np.ones((24, 8)), "step": 3}}, "param_groups": [{"lr": 0.1}]}
    file = {"epoch": 3, "optimizer": optimizer, "best": np.float64(1), "model": state, "again": state, "name": "x"}
    given = {"num_heads": 4, "names": names}
    assert bits(from_state_dict(file, prefix, **given).state_dict()) == bits(module.state_dict())
    file["ema"] = dict(state)
    if prefix != "model.encoder.":
        kind, words = error_of(file, prefix, **given)
        assert kind is RuntimeError and 'prefix="model.encoder.", prefix="ema.encoder."' in words
    assert from_state_dict(file, "ema.encoder.", **given).num_heads == 4


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "model.", "state_dict.module.net."])
def test_wrappers_of_models(before):
    """DataParallel, torch.compile, Lightning."""
    module = layer(8, 4)
    state = {f"{before}layers.{n}.attn.{name}": array for name, array in module.state_dict().items() for n in (1, 11)}
    loaded = from_state_dict(state, "layers.1.attn.", num_heads=4)
    assert bits(loaded.state_dict()) == bits(module.state_dict())
    assert error_of(state, "1.attn.", num_heads=4, names=["x", "y"])[0] is RuntimeError
    kind, words = error_of(state, "attn.", num_heads=4)
    assert f'It has layers with prefix="{before}layers.1.attn.", prefix="{before}layers.11.attn."' in words


def test_numbers_beside_parameters():
    """They are no parameters, wherever they stand."""
    module = layer(8, 4)
    state = {**module.state_dict(), "best": np.float64(1), "step": 3, "loss": 0.5, "name": "x", "nothing": None}
    assert bits(from_state_dict(state, num_heads=4).state_dict()) == bits(module.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "extra"'):
        from_state_dict({**state, "extra": np.ones(2)}, num_heads=4)


def test_mappings_that_hold_themselves():
    """Or each other many times over, or go down without an end."""
    module = layer(8, 4)
    file = {"model": {}, "deep": {}}
    file["self"] = file
    inner = file["deep"]
    for _ in range(100_000):
        inner["a"] = inner = {}
    inner |= module.state_dict()
    bomb = {}
    for _ in range(100):
        bomb = {"a": bomb, "b": bomb, "c": dict(bomb)}
    file["bomb"] = bomb
    assert "It holds no arrays" in error_of(file, num_heads=4)[1]
    file["model"] |= module.state_dict()
    assert bits(from_state_dict(file, num_heads=4).state_dict()) == bits(module.state_dict())


def test_two_names_that_come_to_the_same():
    state = {"a": {"b.in_proj_weight": np.ones((24, 8))}, "a.b": {"in_proj_weight": np.ones((24, 8))}}
    with pytest.raises(ValueError, match=r'two arrays in the state dict are called "a\.b\.in_proj_weight"'):
        from_state_dict(state, "x.", num_heads=4)


# ------------------------------------------------------------------------------------------------------ errors


def test_the_error_says_what_there_is():
    """Under the prefix, elsewhere, or that there are no arrays; and that names= can help."""
    w = np.ones((8, 8))
    odd = {f"attn.{name}.weight": w for name in ("asker", "asked", "answer", "result")} | {"norm.weight": np.ones(8)}
    assert error_of(odd, "attn.", num_heads=4)[1].startswith(
        "Error(s) in loading state_dict for MultiheadAttention:\n\t"
        'Missing key(s) in state_dict: "attn.in_proj_weight". The names that begin with "attn." are "asker.weight", '
        '"asked.weight", "answer.weight", "result.weight". names=(query, key, value, output)'
    )
    many = {f"attn.{n}.weight": w for n in range(20)}
    assert '"7.weight" and 12 more.' in error_of(many, "attn.", num_heads=4)[1]
    assert 'The names are "attn.asker.weight", ' in error_of(odd, num_heads=4)[1]
    known = {**odd, "layers.0.qkv.weight": np.ones((24, 8)), "layers.0.proj.weight": w}
    assert 'prefix="layers.0.". The names that begin with "attn." are' in error_of(known, "attn.", num_heads=4)[1]
    assert error_of(known, "layers.", num_heads=4)[1].endswith('It has layers with prefix="layers.0.".')
    begun = {f"attn.{name}_proj.weight": w for name in "qk"}
    words = error_of(begun, "attn.", num_heads=4)[1]
    assert 'Missing key(s) in state_dict: "attn.v_proj.weight", "attn.out_proj.weight".' in words
    words = error_of({"epoch": 3, "model": {}}, num_heads=4)[1]
    assert 'It holds no arrays, but "epoch" (int), "model" (dict).' in words
    assert "It holds no arrays." in error_of({}, num_heads=4)[1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_heads": 3}, "num_heads=3 does not fit qkv.weight (24, 8) and proj.weight (8, 8): take num_heads, and"),
        ({"num_heads": 2, "num_kv_heads": 1}, "num_heads=2, num_kv_heads=1 does not fit qkv.weight (24, 8) and"),
        ({"num_heads": 2, "head_dim": 3}, "num_heads=2, head_dim=3 does not fit qkv.weight (24, 8) and proj.weight"),
        ({"num_heads": 0}, "num_heads must be greater than 0, but got 0"),
        ({"num_heads": -1}, "num_heads must be greater than 0, but got -1"),
        ({"num_heads": 2, "num_kv_heads": 0}, "num_kv_heads must be greater than 0, but got 0"),
        ({"num_heads": "2"}, "num_heads must be an int, but got '2'"),
        ({"num_heads": 2.0}, "num_heads must be an int, but got 2.0"),
        ({"num_heads": 2, "prefix": None}, "prefix must be a string, but got None"),
        ({"num_heads": 2, "prefix": 3}, "prefix must be a string, but got 3"),
        ({}, "from_state_dict() needs num_heads, which the shapes do not show, or config=, the model's config.json"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_numbers(arguments, words):
    """The error has the names and the shapes of the file."""
    kind, said = error_of(stored(layer(8, 4), ("qkv", "proj")), **arguments)
    assert kind in (ValueError, TypeError) and said.startswith(words)


def test_widths_that_no_layer_has():
    module = layer(8, 2)
    state = {**module.state_dict(), "out_proj.weight": np.ones((8, 6))}
    assert "num_heads=2 does not fit in_proj_weight (24, 8) and out_proj.weight (8, 6)" in error_of(state, num_heads=2)[1]
    state = stored(layer(8, 2, bias=False), PLAIN)
    state |= {"k_proj.weight": np.ones((3, 8)), "v_proj.weight": np.ones((3, 8))}
    assert "k_proj.weight (3, 8) and" in error_of(state, num_heads=2)[1]


def test_modules_instead_of_state_dicts(torch):
    kind, words = error_of(torch.nn.MultiheadAttention(8, 2), num_heads=2)
    assert kind is TypeError and words.endswith("activation.MultiheadAttention'>. Pass its state_dict().")
    kind, words = error_of([1], num_heads=2)
    assert kind is TypeError and words == "Expected state_dict to be dict-like, got <class 'list'>."


def test_a_transposed_weight_is_recognised():
    module = layer(8, 4)
    state = module.state_dict()
    state["in_proj_weight"] = state["in_proj_weight"].T
    with pytest.raises(ValueError, match=r"in_proj_weight has the shape \(8, 24\): it is transposed, so pass its \.T"):
        from_state_dict(state, num_heads=4)


def test_what_stands_beside_projections_is_unexpected():
    """What is not known could change the attention; names and shapes of adapters and scales are no exception."""
    state = stored(layer(8, 4), ("attention.self.query", "attention.self.key", "attention.self.value",
                                 "attention.output.dense"), "b.")
    state |= {"b.attention.output.LayerNorm.weight": np.ones(8), "b.output.dense.bias": np.ones(8)}
    assert from_state_dict(state, "b.", num_heads=4).num_heads == 4
    for name in ("self.gate.weight", "self.query.lora_A.weight", "output.dense.weight_scale"):
        kind, words = error_of({**state, f"b.attention.{name}": np.ones(8)}, "b.", num_heads=4)
        assert kind is RuntimeError and f'Unexpected key(s) in state_dict: "attention.{name}". ' in words
        assert "strict=False" in words


@pytest.mark.parametrize("dtype", ["complex64", "U3", "datetime64[s]", "object"])
def test_parameters_that_are_no_numbers(dtype):
    state = {**layer(8, 4).state_dict(), "out_proj.weight": np.zeros((8, 8)).astype("int64").astype(dtype)}
    with pytest.raises(ValueError, match=f"out_proj.weight: expected real numbers, but got .*{dtype[:5]}"):
        from_state_dict(state, num_heads=4)
