"""bfloat16 and float16: parameters are kept as they are stored; results are rounded once."""

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
from helpers import bits, in_float32, layer, normal, outcome, run_child, to_torch

import mha_c
from mha_c import functional

ml_dtypes = pytest.importorskip("ml_dtypes")
safetensors = pytest.importorskip("safetensors.torch")
torch = pytest.importorskip("torch")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALVES = ("bfloat16", "float16")
DTYPES = (*HALVES, "float32", "float64")

every_half = pytest.mark.parametrize("half", HALVES)

LAYERS = {
    "MultiheadAttention": lambda dtype, **seed: mha_c.MultiheadAttention(8, 2, add_bias_kv=True, dtype=dtype, **seed),
    "grouped": lambda dtype, **seed: mha_c.MultiheadAttention(8, 4, num_kv_heads=2, kdim=8, dtype=dtype, **seed),
    "Linear": lambda dtype, **seed: mha_c.Linear(8, 6, dtype=dtype, **seed),
    "LayerNorm": lambda dtype: mha_c.LayerNorm(8, dtype=dtype),
    "RMSNorm": lambda dtype: mha_c.RMSNorm(8, dtype=dtype),
    "Dropout": lambda dtype: mha_c.Dropout(0.3, dropout_seed=3),
    "encoder layer": lambda dtype, **seed: mha_c.TransformerEncoderLayer(8, 2, 16, dtype=dtype, **seed),
    "gated": lambda dtype, **seed: mha_c.TransformerEncoderLayer(
        8, 2, 16, activation="swiglu", norm="rms", norm_first=True, dtype=dtype, **seed),
    "encoder": lambda dtype, **seed: mha_c.TransformerEncoder(
        mha_c.TransformerEncoderLayer(8, 2, 16, dtype=dtype, **seed), 2, mha_c.LayerNorm(8, dtype=dtype)),
    "decoder layer": lambda dtype, **seed: mha_c.TransformerDecoderLayer(8, 2, 16, dtype=dtype, **seed),
    "Transformer": lambda dtype, **seed: mha_c.Transformer(8, 2, 1, 1, 16, dtype=dtype, **seed),
    "ModuleList": lambda dtype: mha_c.ModuleList([mha_c.Linear(8, 8, dtype=dtype), mha_c.LayerNorm(8, dtype=dtype)]),
}  # fmt: skip
SEEDED = [name for name in LAYERS if "Norm" not in name and name not in ("Dropout", "ModuleList")]
WHOLE = ("MultiheadAttention", "grouped", "Linear", "LayerNorm", "RMSNorm", "encoder layer", "gated")
ENCODERS = ("encoder layer", "gated", "encoder")

X, MEMORY = normal((5, 3, 8)), normal((7, 3, 8), seed=1)


def call(module, dtype="float32", x=X, **options):
    x, memory = x.astype(dtype), MEMORY.astype(dtype)
    if isinstance(module, mha_c.ModuleList):
        return module[1](module[0](x))
    if isinstance(module, mha_c.MultiheadAttention):
        return module(x, x, x, **options)[0]
    if isinstance(module, (mha_c.TransformerDecoderLayer, mha_c.Transformer)):
        return module(x, memory, **options)
    return module(x, **options)


def tensors(state):
    return {name: to_torch(array) for name, array in state.items()}


# ---------------------------------------------------------------------------------------------- layers


@every_half
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_in_both_modes(name, half):
    """Results have the layer's dtype, and nothing warns; copies, pickles and files compute the same."""
    module = LAYERS[name](half)
    assert all(array.dtype == half for array in module.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(module, half).dtype == half
        expected = call(module.eval(), half)
    assert expected.dtype == half
    copies = [copy.copy(module), copy.deepcopy(module)]
    copies += [pickle.loads(pickle.dumps(module, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in copies:
        assert repr(other) == repr(module) and bits(other.state_dict()) == bits(module.state_dict())
        assert call(other, half).tobytes() == expected.tobytes()


@every_half
@pytest.mark.parametrize("name", WHOLE)
def test_has_the_bits_of_float32_rounded_once(name, half):
    """Those of a float32 layer with the same products."""
    module = LAYERS[name](half).eval()
    wide = in_float32(module)
    assert all(array.dtype == np.float32 for array in wide.parameters())
    x = X.astype(half).astype("float32")
    assert call(module, half).tobytes() == call(wide, x=x).astype(half).tobytes()


@every_half
def test_an_encoder_is_its_layers_in_turn(half):
    encoder = LAYERS["encoder"](half).eval()
    step = X.astype(half)
    for one in (*encoder.layers, encoder.norm):
        step = one(step)
    assert call(encoder, half).tobytes() == step.tobytes()


@every_half
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("training", [False, True])
def test_padded_rows(name, half, training):
    """Zeros where they are asked for, also where the steps of a layer run one by one."""
    module = LAYERS[name](half).train(training)
    module.padded = "zero"
    padding = np.zeros((3, 5), bool)
    padding[1, 3:] = True
    for mask in (padding, np.where(padding, -np.inf, 0).astype(half), to_torch(np.where(padding, -np.inf, 0))):
        output = module.layers[1](X.astype(half), None, mask) if name == "encoder" else call(
            module, half, src_key_padding_mask=mask)
        assert output.dtype == half and np.isfinite(output.astype("float32")).all()
        if name != "encoder":
            assert not output[3:, 1].any() and output[:3, 1].any()


@every_half
@pytest.mark.parametrize("name", SEEDED)
def test_seeds(name, half):
    """The cast of float32's parameters."""
    module, wide = LAYERS[name](half, seed=3), LAYERS[name]("float32", seed=3)
    assert bits(module.state_dict()) == bits({name: array.astype(half) for name, array in wide.state_dict().items()})


@every_half
def test_torchs_seeds(half):
    """About one number of a thousand differs from torch's."""
    ours = mha_c.MultiheadAttention(256, 4, dtype=half, seed=1)
    torch.manual_seed(1)
    theirs = torch.nn.MultiheadAttention(256, 4, dtype=getattr(torch, half))
    different = ours.in_proj_weight.astype("float32") != theirs.in_proj_weight.detach().float().numpy()
    assert different.mean() < 0.003


def test_casts():
    module = layer(8, 2)
    before = bits(module.state_dict())
    casts = ((module.half, "float16"), (module.float, "float32"), (module.bfloat16, "bfloat16"),
             (module.double, "float64"), (lambda: module.to(torch.bfloat16), "bfloat16"),
             (lambda: module.to("cpu", BFLOAT16), "bfloat16"))
    for cast, dtype in casts:
        assert cast() is module and all(array.dtype == dtype for array in module.parameters())
        assert f"dtype={dtype}" in repr(module)
    assert bits(module.state_dict()) != before and "in bfloat16: 576 bytes" in module._repr_html_()
    for value in (np.full((8, 8), 1.0039), torch.full((8, 8), 1.0039), to_torch(np.full((8, 8), 1, BFLOAT16))):
        module.out_proj.weight = value
        assert module.out_proj.weight.dtype == BFLOAT16 and (module.out_proj.weight == 1).all()


@every_half
def test_other_methods(half):
    module = LAYERS["Transformer"](half)
    assert {array.dtype.name for _, array in module.named_parameters()} == {half}
    mask = mha_c.Transformer.generate_square_subsequent_mask(3, dtype=half)
    expected = torch.nn.Transformer.generate_square_subsequent_mask(3, dtype=getattr(torch, half))
    assert mask.dtype == half and torch.equal(to_torch(mask), expected)
    x, out = X.astype(half), np.empty(X.shape, half)
    attention = LAYERS["MultiheadAttention"](half)
    output, weights = attention(x, x, x, attn_mask=np.zeros((5, 5), half), out=out)
    assert output is out and weights.dtype == half
    assert out.tobytes() == attention(x, x, x, need_weights=False)[0].tobytes()
    with pytest.raises(TypeError, match=f"out must be of dtype {half}"):
        attention(x, x, x, out=np.empty(X.shape, "float32"))


@every_half
def test_dropout(half):
    """What float32 drops, rounded once."""
    x = normal((1000,)).astype(half)
    ours, wide = (mha_c.Dropout(0.3, dropout_seed=5)(array) for array in (x, x.astype("float32")))
    assert ours.dtype == half and ours.tobytes() == wide.astype(half).tobytes()


# ---------------------------------------------------------------------------------------------- torch


TORCHS = {
    "MultiheadAttention": lambda nn, dtype: nn.MultiheadAttention(8, 2, dtype=dtype),
    "Linear": lambda nn, dtype: nn.Linear(8, 6, dtype=dtype),
    "LayerNorm": lambda nn, dtype: nn.LayerNorm(8, dtype=dtype),
    "plain LayerNorm": lambda nn, dtype: nn.LayerNorm(8, elementwise_affine=False, dtype=dtype),
    "plain RMSNorm": lambda nn, dtype: nn.RMSNorm(8, elementwise_affine=False, dtype=dtype),
    "encoder layer": lambda nn, dtype: nn.TransformerEncoderLayer(8, 2, 16, dtype=dtype),
    "decoder layer": lambda nn, dtype: nn.TransformerDecoderLayer(8, 2, 16, dtype=dtype),
}


@pytest.mark.parametrize("name", TORCHS)
def test_dtypes_of_layers_and_inputs(name):
    """Where torch raises, the same exception and its words; elsewhere torch's dtype."""
    for dtype, given in itertools.product(DTYPES, DTYPES):
        ours = TORCHS[name](mha_c, dtype).eval()
        theirs = TORCHS[name](torch.nn, getattr(torch, dtype)).eval()
        arguments = [X.astype(given)] * (3 if name == "MultiheadAttention" else 2 if name == "decoder layer" else 1)
        got, expected = outcome(lambda: ours(*arguments)), outcome(lambda: theirs(*map(to_torch, arguments)))
        assert type(got.error) is type(expected.error), (dtype, given)
        if got.error is not None:
            assert isinstance(got.error, RuntimeError), (dtype, given)
        else:
            result = got.result[0] if name == "MultiheadAttention" else got.result
            assert result.dtype == given, (dtype, given)


def test_words_for_other_dtypes():
    """torch's, for layers and functions."""

    def words(call):
        with pytest.raises(RuntimeError) as error:
            call()
        return str(error.value)

    for dtype, given in itertools.permutations(DTYPES, 2):
        x, y = X.astype(given), X.astype(dtype)
        tensors = to_torch(x), to_torch(y), to_torch(y)
        theirs = words(lambda: torch.nn.Linear(8, 6, dtype=getattr(torch, dtype))(tensors[0]))
        assert theirs in words(lambda: mha_c.Linear(8, 6, dtype=dtype)(x))
        theirs = words(lambda: torch.nn.functional.scaled_dot_product_attention(*tensors))
        assert theirs in words(lambda: functional.scaled_dot_product_attention(x, y, y))


def functions(x):
    """Calls of every function, the weights of dtype `x.dtype`."""
    square, vector = normal((8, 8), seed=2).astype(x.dtype), normal((8,), seed=3).astype(x.dtype)
    stacked, many = (normal(shape, seed=4).astype(x.dtype) for shape in ((24, 8), (25, 4, 5, 8)))
    return {
        "scaled_dot_product_attention": (many, many, many),
        "layer_norm": (x, (8,), vector, vector),
        "rms_norm": (x, (8,), vector),
        "multi_head_attention_forward": (x, x, x, 8, 2, stacked, None, None, None, False, 0.0, square, vector),
    }


def first(result):
    return result[0] if isinstance(result, tuple) else result


@every_half
@pytest.mark.parametrize("name", functions(X))
def test_functions(name, half):
    """What float32 gives, rounded once, and as close to it as torch. Attention multiplies bfloat16, as layers do."""
    arguments = functions(X.astype(half))[name]
    wide = [one.astype("float32") if isinstance(one, np.ndarray) else one for one in arguments]
    exact = [one.astype("float64") if isinstance(one, np.ndarray) else one for one in arguments]
    ours = first(getattr(functional, name)(*arguments))
    assert ours.dtype == half
    if (name, half) == ("multi_head_attention_forward", "bfloat16"):
        module = mha_c.MultiheadAttention(8, 2, matmul_precision="bfloat16").eval()
        names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        module.load_state_dict(dict(zip(names, (wide[5], np.zeros(24, "f4"), *wide[-2:]), strict=True)))
        expected = module(*wide[:3])[0]
    else:
        expected = first(getattr(functional, name)(*wide))
    if (name, half) != ("scaled_dot_product_attention", "bfloat16"):  # test_bfloat16_products.py has its definition
        assert ours.tobytes() == expected.astype(half).tobytes()
    theirs = first(getattr(torch.nn.functional, name)(*map(to_torch, arguments)))
    assert theirs.dtype == getattr(torch, half)
    truth = first(getattr(torch.nn.functional, name)(*map(to_torch, exact))).numpy()
    own, torchs = (np.sqrt(np.mean((result - truth) ** 2)) for result in (ours.astype("f8"), theirs.double().numpy()))
    assert own <= 1.02 * torchs


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_of_mixed_dtypes(name):
    """Halves with parameters of float32, as in torch; every other mixture that torch refuses is refused."""
    for given, dtype in itertools.product(DTYPES, DTYPES):
        x, weight = X.astype(given), normal((8,), seed=3).astype(dtype)
        ours = outcome(lambda: getattr(functional, name)(x, (8,), weight))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = outcome(lambda: getattr(torch.nn.functional, name)(to_torch(x), (8,), to_torch(weight)))
        if given == dtype or given in HALVES and dtype == "float32":
            assert ours.result.dtype == given and theirs.result.dtype == getattr(torch, given)
            expected = getattr(functional, name)(x.astype("f8"), (8,), weight.astype("f8"))
            np.testing.assert_allclose(ours.result.astype("f8"), expected, rtol=2.0**-8 if given in HALVES else 1e-5)
        else:
            assert type(ours.error) is RuntimeError, (given, dtype)
            assert name == "rms_norm" or type(theirs.error) is RuntimeError, (given, dtype)


@every_half
def test_default_eps_of_rms_norm(half):
    """float32's, as in torch."""
    x = np.full((1, 8), 1e-3, half)
    value = x[0, 0].astype("float64")
    expected = value / np.sqrt(value**2 + np.finfo("float32").eps)
    theirs = torch.nn.functional.rms_norm(to_torch(x), (8,))
    for ours in (functional.rms_norm(x, (8,)), mha_c.RMSNorm(8, dtype=half)(x)):
        assert ours[0, 0] == expected.astype(half) and theirs[0, 0].double() == pytest.approx(expected, rel=2.0**-8)


def test_parameters_of_mixed_dtypes():
    weight, narrow = normal((24, 8)), normal((8, 8)).astype(BFLOAT16)
    with pytest.raises(RuntimeError, match="must have the same dtype, but got Float and BFloat16"):
        functional.multi_head_attention_forward(X, X, X, 8, 2, weight, None, None, None, False, 0.0, narrow, None)


@every_half
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("grouped", "gated")])
def test_from_and_to_torch(name, half):
    module = LAYERS[name](half)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = mha_c.torch.to_torch(module)
        assert {tensor.dtype for tensor in theirs.parameters()} <= {getattr(torch, half)}
        back = type(module).from_torch(theirs)
    assert bits(back.state_dict()) == bits(module.state_dict())


def test_from_torch_of_mixed_dtypes():
    """The weight decides; in attention that of the output."""
    theirs = torch.nn.MultiheadAttention(8, 2)
    theirs.out_proj.bfloat16()
    ours = mha_c.MultiheadAttention.from_torch(theirs)
    assert ours.in_proj_weight.dtype == ours.out_proj.bias.dtype == BFLOAT16
    linear = torch.nn.Linear(8, 2)
    linear.bias = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    assert mha_c.Linear.from_torch(linear).bias.dtype == np.float32


# ---------------------------------------------------------------------------------------------- state dicts and files


def write(path, state):
    """A state dict in the format that the name of the file asks for."""
    if path.suffix == ".safetensors":
        safetensors.save_file(tensors(state), path)
    elif path.suffix == ".npz":
        np.savez(path, **{n: a.view([("bfloat16", "<u2")]) if a.dtype == BFLOAT16 else a for n, a in state.items()})
    else:
        torch.save(tensors(state), path)


@every_half
@pytest.mark.parametrize("suffix", [None, ".safetensors", ".npz", ".pt"])
def test_from_state_dict(tmp_path, half, suffix):
    """The dtype and the bits that are stored, from arrays, tensors and files, or what the caller asks for."""
    x = X.astype(half)
    encoder = LAYERS["encoder"](half).eval()
    state = encoder.state_dict(prefix="model.")
    sources = [state, tensors(state)] if suffix is None else [tmp_path / f"model{suffix}"]
    if suffix is not None:
        write(sources[0], state)
    options = {"num_heads": 2, "activation": "relu", "layer_norm_eps": 1e-5, "norm_first": False}
    for source in sources:
        read = mha_c.TransformerEncoder.from_state_dict(source, "model.", **options).eval()
        assert bits(read.state_dict()) == bits(encoder.state_dict()) and read(x).tobytes() == encoder(x).tobytes()
        one = mha_c.TransformerEncoderLayer.from_state_dict(source, "model.layers.1.", **options)
        assert bits(one.state_dict()) == bits(encoder.layers[1].state_dict())
        attention = mha_c.MultiheadAttention.from_state_dict(source, "model.layers.0.self_attn.", num_heads=2)
        assert bits(attention.state_dict()) == bits(encoder.layers[0].self_attn.state_dict())
        for cls in (mha_c.LayerNorm, mha_c.RMSNorm):
            norm = cls.from_state_dict(source, "model.norm.", strict=False)
            assert norm.weight.dtype == half
        for dtype in DTYPES:
            cast = mha_c.MultiheadAttention.from_state_dict(
                source, "model.layers.0.self_attn.", num_heads=2, dtype=dtype)
            assert bits(cast.state_dict()) == bits(copy.deepcopy(attention).to(dtype).state_dict())


@every_half
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("name", LAYERS)
def test_save_and_load(tmp_path, name, suffix, half):
    module = LAYERS[name](half).eval()
    path = tmp_path / f"layer{suffix}"
    module.save(path)
    other = type(module).load(path)
    assert bits(other.state_dict()) == bits(module.state_dict()) and repr(other) == repr(module)
    assert call(other, half).tobytes() == call(module, half).tobytes()


def test_safetensors_reads_what_is_saved(tmp_path):
    module = LAYERS["Linear"]("bfloat16")
    module.save(tmp_path / "layer.safetensors")
    read = safetensors.load_file(tmp_path / "layer.safetensors")
    assert read["weight"].dtype == torch.bfloat16 and torch.equal(read["weight"], to_torch(module.weight))


def test_bfloat16_in_npz_files(tmp_path):
    """As uint16, in a structured array whose field names the type: NumPy reads it without ml_dtypes."""
    module = mha_c.Linear(8, 6, dtype="bfloat16")
    module.save(tmp_path / "layer.npz")
    with np.load(tmp_path / "layer.npz") as read:
        assert read["weight"].dtype.names == ("bfloat16",)
        assert np.array_equal(read["weight"]["bfloat16"], module.weight.view(np.uint16))
        content = dict(read)
    other = mha_c.Linear(8, 6, dtype="float64")
    other.load_state_dict({name: module.state_dict()[name] for name in ("weight", "bias")})
    assert np.array_equal(other.weight, module.weight.astype("float64"))
    lies = {
        "big-endian": content["weight"].astype([("bfloat16", ">u2")]),
        "another field": content["weight"].view([("float16", "<u2")]),
        "two fields": np.zeros((6, 8), [("bfloat16", "<u2"), ("x", "<u2")]),
        "void": content["weight"].view("V2"),
        "integers": content["weight"].view("u2"),
        "float16": content["weight"].view("f2"),
        "float32": np.ones((6, 8), "f4"),
        "another shape": content["weight"].T,
    }
    for lie, array in lies.items():
        np.savez(tmp_path / "lie.npz", **{**content, "weight": array})
        with pytest.raises(ValueError, match=r"lie.npz holds no layer"):
            mha_c.Linear.load(tmp_path / "lie.npz")
        if lie in ("big-endian", "another field", "two fields", "void"):
            fresh = mha_c.LayerNorm(8)
            np.savez(tmp_path / "norm.npz", weight=array[0])
            for refused in (lambda: mha_c.LayerNorm.from_state_dict(tmp_path / "norm.npz"),
                            lambda: fresh.load_state_dict({"weight": array[0], "bias": np.zeros(8)})):
                with pytest.raises(ValueError, match="expected real numbers"):
                    refused()


def test_mixed_state_dicts():
    """The output weight decides, as it does between float32 and float64; every array is cast by itself."""
    state = layer(8, 2).state_dict()
    separate = {f"{name}_proj.weight": array for name, array in zip("qkv", np.split(state["in_proj_weight"], 3))}
    for q, k, v, out in itertools.product(DTYPES, repeat=4):
        mixed = {name: array.astype(dtype) for (name, array), dtype in zip(separate.items(), (q, k, v))}
        mixed["out_proj.weight"] = state["out_proj.weight"].astype(out)
        read = mha_c.MultiheadAttention.from_state_dict(mixed, num_heads=2)
        assert read.out_proj.weight.dtype == read.in_proj_weight.dtype == out
        expected = [array.astype("float64").astype(out) for array in list(mixed.values())[:3]]
        np.testing.assert_array_equal(read.in_proj_weight, np.concatenate(expected))


def test_load_state_dict_keeps_the_layers_dtype():
    for stored, dtype in itertools.product(DTYPES, DTYPES):
        state = {name: array.astype(stored) for name, array in layer(8, 2).state_dict().items()}
        for source in (state, tensors(state)):
            module = mha_c.MultiheadAttention(8, 2, dtype=dtype)
            module.load_state_dict(source)
            assert bits(module.state_dict()) == bits({name: array.astype(dtype) for name, array in state.items()})


def test_float8_is_widened():
    state = {name: torch.tensor(array).to(torch.float8_e4m3fn) for name, array in layer(8, 2).state_dict().items()}
    module = mha_c.MultiheadAttention.from_state_dict(state, num_heads=2)
    assert np.array_equal(module.in_proj_weight, state["in_proj_weight"].float()) and "float32" in repr(module)


def test_without_ml_dtypes(tmp_path):
    """bfloat16 can be cast to another dtype, and float16 needs nothing; everything else names the extra."""
    module = layer(8, 2, dtype="bfloat16")
    as_saved = {name: array.view([("bfloat16", "<u2")]) for name, array in module.state_dict().items()}
    np.savez(tmp_path / "layer.npz", **as_saved)
    module.save(tmp_path / "saved.npz")
    write(tmp_path / "layer.safetensors", module.state_dict())
    write(tmp_path / "layer.pt", module.state_dict())
    np.savez(tmp_path / "wide.npz", **{name: array.astype("f4") for name, array in module.state_dict().items()})
    code = f"""
        import sys
        sys.modules["ml_dtypes"] = None
        import mha_c, numpy as np, torch
        from mha_c import MultiheadAttention
        folder = {str(tmp_path)!r}
        wide = dict(np.load(f"{{folder}}/wide.npz"))
        tensors = torch.load(f"{{folder}}/layer.pt")
        sources = [f"{{folder}}/layer.{{ending}}" for ending in ("npz", "safetensors", "pt")] + [tensors]

        def refuses(call, cure=""):
            try:
                call()
            except ImportError as error:
                words = 'bfloat16 arrays need `pip install "mha-c[bfloat16]"`, which installs ml_dtypes'
                assert str(error) == words + cure, error
            else:
                raise AssertionError

        cure = '; or pass dtype="float32"'
        vector = {{"weight": tensors["out_proj.weight"][0]}}
        refuses(lambda: mha_c.LayerNorm.from_state_dict(vector), cure)
        assert mha_c.LayerNorm.from_state_dict(vector, dtype="float32").weight.shape == (8,)
        encoder = mha_c.TransformerEncoderLayer(8, 2, 16).state_dict(prefix="layers.0.")
        encoder = {{name: torch.tensor(array).bfloat16() for name, array in encoder.items()}}
        options = dict(num_heads=2, activation="relu", layer_norm_eps=1e-5, norm_first=False)
        refuses(lambda: mha_c.TransformerEncoder.from_state_dict(encoder, **options), cure)
        assert mha_c.TransformerEncoder.from_state_dict(encoder, **options, dtype="float32").num_layers == 1
        eighths = {{name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}}
        torch.save(eighths, f"{{folder}}/float8.pt")
        for dtype in (None, "float32"):
            try:
                MultiheadAttention.from_state_dict(f"{{folder}}/float8.pt", num_heads=2, dtype=dtype)
            except ImportError as error:
                assert str(error) == "numbers in float8_e4m3fn need `pip install ml_dtypes`", error
            else:
                raise AssertionError
        for source in sources:
            refuses(lambda: MultiheadAttention.from_state_dict(source, num_heads=2), cure)
            refuses(lambda: MultiheadAttention.from_state_dict(source, num_heads=2, dtype="bfloat16"))
            for dtype in ("float32", "float64", "float16"):
                read = MultiheadAttention.from_state_dict(source, num_heads=2, dtype=dtype)
                assert all(np.array_equal(read.state_dict()[name], array.astype(dtype)) for name, array in wide.items())
        refuses(lambda: MultiheadAttention.load(f"{{folder}}/saved.npz"))
        refuses(lambda: MultiheadAttention(8, 2, dtype="bfloat16"))
        refuses(lambda: MultiheadAttention(8, 2).bfloat16())
        refuses(lambda: MultiheadAttention.from_torch(torch.nn.MultiheadAttention(8, 2, dtype=torch.bfloat16)))
        refuses(lambda: mha_c.Dropout(0.5)(torch.ones(2, dtype=torch.bfloat16)))
        layer = MultiheadAttention(8, 2)
        layer.load_state_dict(tensors)
        assert all(np.array_equal(layer.state_dict()[name], array) for name, array in wide.items())
        layer.in_proj_bias = torch.ones(24, dtype=torch.bfloat16)
        assert (layer.in_proj_bias == 1).all()
        x = np.ones((5, 3, 8), np.float16)
        assert layer.half()(x, x, x)[0].dtype == np.float16
    """
    run_child(code)
