# SPDX-License-Identifier: Apache-2.0
"""Linear, Dropout and the Transformer's layers as objects: state dicts, copies, files, parts that are assigned,
dropout, and what mha_c can do besides torch. test_transformer_differential.py compares what they compute with torch."""

import copy
import itertools
import json
import pickle
import warnings

import numpy as np
import pytest
from helpers import bits, normal, outcome, randomize, to_torch, torch_words

mha_c = pytest.importorskip("mha_c")

SUFFIXES = (".npz", ".safetensors")
X = normal((3, 5, 8))


def encoder_layer(**options):
    return mha_c.TransformerEncoderLayer(8, 2, 16, **{"batch_first": True, "seed": 0, **options})


def modules():
    """One layer of each class, with random parameters, and its inputs."""
    target, memory = normal((3, 4, 8)), normal((3, 5, 8))
    options = {"batch_first": True, "seed": 0}
    decoder_layer = mha_c.TransformerDecoderLayer(8, 2, 16, activation="swiglu", norm="rms", **options)
    return {
        "Linear": (mha_c.Linear(8, 3), (X,)),
        "Dropout": (mha_c.Dropout(0.25, dropout_seed=3), (X,)),
        "TransformerEncoderLayer": (encoder_layer(activation="gelu", norm_first=True), (X,)),
        "TransformerEncoder": (mha_c.TransformerEncoder(encoder_layer(), 2, mha_c.LayerNorm(8)), (X,)),
        "TransformerDecoderLayer": (decoder_layer, (target, memory)),
        "TransformerDecoder": (mha_c.TransformerDecoder(decoder_layer, 2, padded="zero"), (target, memory)),
        "Transformer": (mha_c.Transformer(8, 2, 1, 2, 16, **options), (memory, target)),
    }


KINDS = list(modules())


@pytest.fixture(params=KINDS)
def module(request):
    made, given = modules()[request.param]
    return randomize(made), given


# ------------------------------------------------------------------------------------------- parameters


def test_names_and_arrays(module):
    """A layer's parameters are those of the layers in it, by their names."""
    module, _ = module
    state = module.state_dict()
    assert list(dict(module.named_parameters())) == list(state)
    assert sum(array.size for array in module.parameters()) == sum(array.size for array in state.values())
    assert list(module.state_dict(prefix="a.")) == [f"a.{name}" for name in state]
    for name, child in module.named_children():
        part = {key.partition(".")[2]: array for key, array in state.items() if key.startswith(f"{name}.")}
        assert bits(child.state_dict()) == bits(part)
    names = [name for name, _ in module.named_modules()]
    assert names[0] == "" and len(names) == len(set(names)) == len(list(module.modules()))
    assert [name for name, _ in module.named_modules("top")][1:] == [f"top.{name}" for name in names[1:]]


def test_a_layer_in_two_places_is_one():
    """Its names are in the state dict twice, and its parameters count once, as in torch."""
    layer = encoder_layer()
    layer.norm2 = layer.norm1
    assert len(list(layer.parameters())) == len(layer.state_dict()) - 2
    assert "norm2.weight" in layer.state_dict() and "norm2" not in dict(layer.named_children())


def test_casts_and_modes(module):
    module, given = module
    module.double().eval()
    assert {array.dtype for array in module.state_dict().values()} <= {np.dtype("float64")}
    assert not any(part.training for part in module.modules())
    assert module(*(x.astype("float64") for x in given)).dtype == np.float64
    assert all(part.training for part in module.float().train().modules())


@pytest.mark.parametrize("state", [
    {}, {"layers.0.linear1.weight": np.zeros(3, "f"), "layers.2.x": np.zeros(3, "f"), "norm.z": np.zeros(1, "f"),
         "layers.0.self_attn.out_proj.z": np.zeros(1, "f"), "layers.0.self_attn.z": np.zeros(1, "f"),
         "y": np.zeros(1, "f")},
], ids=["empty", "mixed"])  # fmt: skip
def test_load_state_dict_in_torchs_words(state):
    torch = pytest.importorskip("torch")
    ours = mha_c.TransformerEncoder(encoder_layer(), 2, mha_c.LayerNorm(8))
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(8))
    before = bits(ours.state_dict())
    error = outcome(lambda: ours.load_state_dict(state)).error
    expected = outcome(lambda: theirs.load_state_dict({name: to_torch(array) for name, array in state.items()})).error
    assert type(error) is type(expected) and str(error) == torch_words(expected)
    assert bits(ours.state_dict()) == before
    if not state:
        assert ours.load_state_dict(state, strict=False).missing_keys == list(before)


def test_loading_is_all_or_nothing():
    """Also where an array that does not fit is found last."""
    ours = mha_c.TransformerEncoder(encoder_layer(), 2)
    before = bits(ours.state_dict())
    state = dict(ours.state_dict(), **{"layers.1.norm2.bias": np.zeros(8, "complex64")})
    state["layers.0.linear1.bias"] = np.ones(16)
    with pytest.raises(ValueError, match="expected real numbers"):
        ours.load_state_dict(state)
    assert bits(ours.state_dict()) == before


# ------------------------------------------------------------------------------------------- copies and files


def test_copies_and_files(module, tmp_path):
    """They hold the parameters bit for bit, the arguments and the mode, and answer alike."""
    module, given = module
    for training in (True, False):
        module.train(training)
        twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        for suffix in SUFFIXES if module.state_dict() else SUFFIXES[:1]:
            if suffix == ".safetensors":
                pytest.importorskip("safetensors")
            module.save(tmp_path / f"layer{suffix}")
            twins.append(type(module).load(tmp_path / f"layer{suffix}"))
        for twin in twins:
            assert type(twin) is type(module) and repr(twin) == repr(module)
            assert bits(twin.state_dict()) == bits(module.state_dict())
            assert [part.training for part in twin.modules()] == [training] * len(list(module.modules()))
            np.testing.assert_array_equal(copy.copy(twin).eval()(*given), copy.copy(module).eval()(*given))
            for part in (twin, module):
                part.train(training)
            assert getattr(twin, "padded", None) == getattr(module, "padded", None)


def test_files_hold_the_seeds_of_dropout(tmp_path):
    layer = encoder_layer(dropout_seed=7)
    layer.save(tmp_path / "layer.npz")
    np.testing.assert_array_equal(mha_c.TransformerEncoderLayer.load(tmp_path / "layer.npz")(X), layer(X))


def test_files_of_single_attentions_without_a_name(tmp_path):
    """Earlier versions did not write the name of the class."""
    from mha_c.parameters.files import write_checkpoint

    module = mha_c.MultiheadAttention(8, 2)
    description = module._full_description()
    del description["layer"]
    write_checkpoint(tmp_path / "old.npz", module.state_dict(), json.dumps(description))
    assert bits(mha_c.MultiheadAttention.load(tmp_path / "old.npz").state_dict()) == bits(module.state_dict())


def change(description, path, value):
    *path, last = path
    for key in path:
        description = description[key]
    if value is KeyError:
        del description[last]
    else:
        description[last] = value


@pytest.mark.parametrize(("path", "value"), [
    (["layer"], "TransformerDecoder"), (["layer"], "Module"), (["options"], KeyError), (["children"], []),
    (["options", "norm_first"], 1), (["options", "activation"], "exec"), (["options", "activation"], None),
    (["options", "padded"], "maybe"), (["children", "linear1"], KeyError), (["children", "linear1"], 3),
    (["children", "linear1", "layer"], "os.system"), (["children", "linear1", "layer"], "LayerNorm"),
    (["children", "linear1", "in_features"], 10**12), (["children", "linear1", "in_features"], -8),
    (["children", "linear1", "dtype"], "float64"), (["children", "dropout", "p"], 2.0),
    (["children", "self_attn", "num_heads"], 3), (["children", "norm1", "parameters"], ["weight", "evil"]),
    (["children", "linear1", "training"], "yes"),
], ids=str)  # fmt: skip
def test_files_that_do_not_fit(tmp_path, path, value):
    from mha_c.parameters.files import write_checkpoint

    layer = encoder_layer()
    description = layer._full_description()
    change(description, path, value)
    write_checkpoint(tmp_path / "layer.npz", layer.state_dict(), json.dumps(description))
    with pytest.raises(ValueError, match=r"layer\.npz holds (no layer: |a TransformerDecoder, not a )"):
        mha_c.TransformerEncoderLayer.load(tmp_path / "layer.npz")


@pytest.mark.parametrize("name", ["linear3.weight", "norm1.extra", "weight"])
def test_files_with_too_much(tmp_path, name):
    from mha_c.parameters.files import write_checkpoint

    layer = encoder_layer()
    arrays = {**layer.state_dict(), name: np.zeros(3, "f")}
    write_checkpoint(tmp_path / "layer.npz", arrays, json.dumps(layer._full_description()))
    with pytest.raises(ValueError, match=r"layer\.npz holds no layer"):
        mha_c.TransformerEncoderLayer.load(tmp_path / "layer.npz")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_from_torch_and_state_dict_of_every_layer():
    """The functions of mha_c.torch take all layers that both have, not only attention and norms."""
    nn = pytest.importorskip("torch").nn
    encoder_layer, decoder_layer = nn.TransformerEncoderLayer(8, 2, 16), nn.TransformerDecoderLayer(8, 2, 16)
    for theirs in (nn.Linear(8, 2), nn.Dropout(0.1), encoder_layer, decoder_layer, nn.TransformerEncoder(encoder_layer, 2),
                   nn.TransformerDecoder(decoder_layer, 2), nn.Transformer(8, 2, 1, 1, 16), nn.ModuleList([encoder_layer])):
        ours = mha_c.torch.from_torch(theirs, getattr(mha_c, type(theirs).__name__))
        assert type(ours) is getattr(mha_c, type(theirs).__name__)
        assert theirs.load_state_dict(mha_c.torch.state_dict(ours)).missing_keys == []


def test_files_without_a_description(tmp_path):
    np.savez(tmp_path / "layer.npz", **mha_c.TransformerDecoderLayer(8, 2, 16).state_dict())
    with pytest.raises(ValueError, match="make a TransformerDecoderLayer .* to load_state_dict"):
        mha_c.TransformerDecoderLayer.load(tmp_path / "layer.npz")


@pytest.mark.parametrize("num_layers", [0, 1])
def test_encoders_without_layers_or_norm(tmp_path, num_layers):
    encoder = mha_c.TransformerEncoder(encoder_layer(), num_layers).eval()
    encoder.save(tmp_path / "encoder.npz")
    loaded = mha_c.TransformerEncoder.load(tmp_path / "encoder.npz")
    assert len(loaded.layers) == num_layers and loaded.norm is None and "norm)" not in repr(loaded)
    np.testing.assert_array_equal(loaded(X), encoder(X))


def test_files_of_other_layers(tmp_path):
    encoder_layer().save(tmp_path / "layer.npz")
    for cls in (mha_c.TransformerDecoderLayer, mha_c.Linear, mha_c.LayerNorm, mha_c.MultiheadAttention):
        with pytest.raises(ValueError, match=f"layer.npz holds a TransformerEncoderLayer, not a {cls.__name__}: "
                                             "use mha_c.TransformerEncoderLayer.load$"):
            cls.load(tmp_path / "layer.npz")


def test_code_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="a file cannot hold activation="):
        encoder_layer(activation=np.tanh).save(tmp_path / "layer.npz")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- parts


def test_parts_can_be_assigned():
    layer = encoder_layer().eval()
    layer.norm1 = mha_c.RMSNorm(8)
    layer.linear1, layer.linear2 = mha_c.Linear(8, 5, seed=1), mha_c.Linear(5, 8, seed=2)
    layer.self_attn = mha_c.MultiheadAttention(8, 4, batch_first=True, seed=3)
    assert layer(X).shape == X.shape and layer.state_dict()["linear1.weight"].shape == (5, 8)
    attention = layer.norm1(X + layer.self_attn(X, X, X, need_weights=False)[0])
    expected = layer.norm2(attention + layer.linear2(np.maximum(layer.linear1(attention), 0)))
    np.testing.assert_array_equal(layer(X), expected)
    layer.linear1.bias = np.ones(5)
    assert not np.array_equal(layer(X), expected)


def test_wrong_parts():
    """torch's TypeError."""
    torch = pytest.importorskip("torch")
    ours, theirs = encoder_layer(), torch.nn.TransformerEncoderLayer(8, 2, 16)
    for value in (3, np.zeros((16, 8)), "Linear"):
        error = outcome(lambda: setattr(ours, "linear1", value)).error
        expected = outcome(lambda: setattr(theirs, "linear1", value)).error
        assert type(error) is type(expected) is TypeError
        assert "as child module 'linear1'" in str(error) and "as child module 'linear1'" in str(expected)
    with pytest.raises(TypeError, match=r"pass mha_c\.Linear\.from_torch\(\.\.\.\)"):
        ours.linear1 = torch.nn.Linear(8, 16)
    with pytest.raises(TypeError, match="as child module 'encoder'"):
        mha_c.Transformer(8, 2, 1, 1, 16, custom_encoder=lambda *_: None)


def test_module_list():
    """A list of layers, as torch's: numbers are names."""
    layers = mha_c.ModuleList([mha_c.Linear(2, 2), mha_c.LayerNorm(2)])
    layers.append(mha_c.Linear(2, 3))
    assert [type(one).__name__ for one in layers] == ["Linear", "LayerNorm", "Linear"]
    assert len(layers) == 3 and layers[-1].out_features == 3 and layers[np.int64(1)] is layers[1]
    assert isinstance(layers[:2], mha_c.ModuleList) and len(layers[:2]) == 2
    layers[1] = mha_c.RMSNorm(2)
    del layers[0]
    assert list(layers.state_dict()) == ["0.weight", "1.weight", "1.bias"]
    for wrong in (3, None, np.zeros(2)):
        with pytest.raises(TypeError, match="is not a Module subclass"):
            layers.append(wrong)
    with pytest.raises(IndexError):
        layers[2]


def test_fewer_layers():
    encoder = mha_c.TransformerEncoder(encoder_layer(), 3).eval()
    want = encoder.layers[1](encoder.layers[0](X))
    encoder.layers = encoder.layers[:2]
    np.testing.assert_array_equal(encoder(X), want)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_repr_is_torchs_tree():
    torch = pytest.importorskip("torch")
    ours = mha_c.Transformer(8, 2, 2, 1, 16)
    theirs = torch.nn.Transformer(8, 2, 2, 1, 16)
    attention = repr(ours.encoder.layers[0].self_attn)
    lines = []
    for line in repr(theirs).splitlines():
        if "MultiheadAttention(" in line:
            lines.append(line.replace("MultiheadAttention(", attention))
        elif "out_proj" not in line and (lines[-1:] and not lines[-1].endswith(attention) or line.strip() != ")"):
            lines.append(line)
    assert [line.split("eps=")[0] for line in repr(ours).splitlines()] == [line.split("eps=")[0] for line in lines]


def test_from_torch():
    """Arguments, parts, modes and parameters; layers with a forward of their own are refused."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = nn.Transformer(8, 2, 2, 1, 16, dropout=0.3, activation=nn.SiLU(), norm_first=True, batch_first=True)
    theirs.encoder.layers[1].norm1 = nn.RMSNorm(8, eps=1e-3)
    theirs.decoder.norm = None
    theirs.encoder.eval()
    ours = mha_c.Transformer.from_torch(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours.encoder.layers[1].norm1, mha_c.RMSNorm) and ours.decoder.norm is None
    assert (ours.encoder.layers[0].activation, ours.decoder.layers[0].dropout2.p) == ("silu", 0.3)
    assert ours.training and ours.decoder.layers[0].training and not ours.encoder.layers[0].linear1.training
    with torch.no_grad():
        want = theirs.eval()(torch.from_numpy(X), torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(ours.eval()(X, X), want, atol=1e-5)

    class Other(nn.TransformerEncoderLayer):
        def _sa_block(self, *args, **kwargs):
            return super()._sa_block(*args, **kwargs)

    with pytest.raises(TypeError, match="overrides _sa_block"):
        mha_c.TransformerEncoderLayer.from_torch(Other(8, 2, 16))
    with pytest.raises(TypeError, match="knows the activations"):
        mha_c.TransformerEncoderLayer.from_torch(nn.TransformerEncoderLayer(8, 2, 16, activation=nn.Tanh()))
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    layer.linear1 = nn.Sequential(layer.linear1)
    with pytest.raises(TypeError, match="torch.nn.modules.container.Sequential"):
        mha_c.TransformerEncoderLayer.from_torch(layer)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_custom_encoder_and_decoder():
    """They are used, and their matrices are drawn anew, as in torch."""
    torch = pytest.importorskip("torch")
    made = []
    for library in (mha_c, torch.nn):
        torch.manual_seed(5)
        layer = library.TransformerEncoderLayer(8, 2, 16, **({"seed": 5} if library is mha_c else {}))
        encoder = library.TransformerEncoder(layer, 1)
        torch.manual_seed(6)
        options = {"seed": 6} if library is mha_c else {}
        model = library.Transformer(8, 2, 1, 1, 16, custom_encoder=encoder, **options)
        assert model.encoder is encoder
        made.append(model)
    ours, theirs = made
    assert bits(ours.state_dict()) == bits({name: tensor.numpy() for name, tensor in theirs.state_dict().items()})


def test_custom_parts_of_another_dtype():
    """Matrices are drawn anew in the dtype of each, whatever the dtype of the Transformer."""
    torch = pytest.importorskip("torch")
    parts = {}
    for lib, dtype in ((mha_c, "float64"), (torch.nn, torch.float64)):
        encoder = lib.TransformerEncoder(lib.TransformerEncoderLayer(4, 2, 8, dtype=dtype, batch_first=True), 1)
        decoder = lib.TransformerDecoder(lib.TransformerDecoderLayer(4, 2, 8, batch_first=True), 1)
        parts[lib] = {"custom_encoder": encoder, "custom_decoder": decoder}
    torch.manual_seed(5)
    theirs = torch.nn.Transformer(4, 2, **parts[torch.nn])
    ours = mha_c.Transformer(4, 2, **parts[mha_c], seed=5)
    for name, tensor in theirs.state_dict().items():
        if tensor.ndim > 1:
            np.testing.assert_array_equal(ours.state_dict()[name], tensor.numpy(), name)


def test_the_precision_of_custom_parts_is_checked():
    encoder = mha_c.TransformerEncoder(encoder_layer(), 1)
    decoder = mha_c.TransformerDecoder(mha_c.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match="matmul_precision must be None, .* but got 'int7'"):
        mha_c.Transformer(8, 2, custom_encoder=encoder, custom_decoder=decoder, matmul_precision="int7")


# ------------------------------------------------------------------------------------------- Linear


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("rows", "columns", "bias"), [(3, 8, True), (64, 100, True), (7, 5, False), (1, 1, True)])
def test_linear_is_torchs(rows, columns, bias, dtype):
    torch = pytest.importorskip("torch")
    torch.manual_seed(9)
    theirs = torch.nn.Linear(columns, rows, bias, dtype=getattr(torch, dtype))
    ours = mha_c.Linear(columns, rows, bias, dtype=dtype, seed=9)
    assert bits(ours.state_dict()) == bits({name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    assert repr(ours) == repr(theirs)
    assert bits(mha_c.Linear.from_torch(theirs).state_dict()) == bits(ours.state_dict())
    for shape in ((columns,), (4, columns), (2, 3, columns), (0, columns)):
        x = normal(shape, dtype)
        with torch.no_grad():
            want = theirs(torch.from_numpy(x)).numpy()
        got = ours(x)
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=50 * np.finfo(dtype).eps)


@pytest.mark.parametrize("given", [np.zeros((5, 6), "f"), np.zeros((5, 8)), np.zeros((), "f"), np.zeros((5, 8), "i8"),
                                   np.zeros((2, 5, 6), "f")], ids=lambda x: f"{x.dtype}{x.shape}")
def test_linear_refuses(given):
    torch = pytest.importorskip("torch")
    error = outcome(lambda: mha_c.Linear(8, 3)(given)).error
    expected = outcome(lambda: torch.nn.Linear(8, 3)(torch.from_numpy(given))).error
    assert type(error) is type(expected) and str(expected) in str(error)
    assert "input " in str(error).replace(str(expected), "")


@pytest.mark.parametrize("arguments", [(-1, 3), (3, -1), (2.0, 3), ("a", 3)], ids=str)
def test_linear_refuses_sizes(arguments):
    torch = pytest.importorskip("torch")
    error = outcome(lambda: mha_c.Linear(*arguments)).error
    assert type(error) is type(outcome(lambda: torch.nn.Linear(*arguments)).error)
    assert "_features" in str(error)


def test_flags_are_no_text():
    """Which is true, whatever it says; nor are they several values."""
    for wrong in ("no", np.zeros(3)):
        for make in (lambda: mha_c.Linear(2, 3, wrong), lambda: mha_c.LayerNorm(4, bias=wrong)):
            with pytest.raises(TypeError, match="^bias must be True or False, but got "):
                make()
        for norm in (mha_c.LayerNorm, mha_c.RMSNorm):
            with pytest.raises(TypeError, match="^elementwise_affine must be True or False, but got "):
                norm(4, elementwise_affine=wrong)


def test_linear_that_does_not_fit():
    """Into memory; and into what a file says of it."""
    with pytest.raises(MemoryError, match="in_features=1,099,511,627,776 and out_features=1,099,511,627,776"):
        mha_c.Linear(2**40, 2**40)
    module = mha_c.Linear(8, 3)
    arrays = module.state_dict()
    del arrays["bias"]
    with pytest.raises((ValueError, RuntimeError), match="bias"):
        mha_c.Linear._described(module._description(), arrays)


# ------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_are_torchs(name, dtype):
    """As the functions and modules of torch, which are recognised."""
    torch = pytest.importorskip("torch")
    from mha_c.activations import activate

    nn, functional = torch.nn, torch.nn.functional
    forms = {
        "relu": (functional.relu, torch.relu, nn.ReLU()), "gelu": (functional.gelu, nn.GELU()),
        "gelu_tanh": (nn.GELU(approximate="tanh"),), "silu": (functional.silu, nn.SiLU()),
    }[name]  # fmt: skip
    x = np.concatenate([normal((1000,), dtype) * 5, np.array([0.0, -0.0, 80, -80, 2e4, -2e4], dtype)])
    want = forms[0](torch.from_numpy(x.astype("float64"))).numpy()
    got = activate(x, name)
    assert got.dtype == x.dtype
    np.testing.assert_allclose(got, want, rtol=4 * np.finfo(dtype).eps, atol=8 * np.finfo(dtype).eps)
    for form in forms:
        assert encoder_layer(activation=form).activation == name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu_of_infinities(dtype):
    """Its limits. torch multiplies -inf by 0; with AVX-512, it makes NaN of inf, too."""
    torch = pytest.importorskip("torch")
    from mha_c.activations import activate

    x = np.array([-np.inf, np.inf], dtype)
    for name in ("gelu", "gelu_tanh"):
        assert activate(x, name).tolist() == [0, np.inf]
    assert torch.nn.functional.gelu(torch.from_numpy(x)).isnan()[0]


def test_other_activations():
    layer = encoder_layer(activation=np.tanh).eval()
    x = layer.norm1(X + layer.self_attn(X, X, X, need_weights=False)[0])
    np.testing.assert_array_equal(layer(X), layer.norm2(x + layer.linear2(np.tanh(layer.linear1(x)))))
    layer.activation = "quick_gelu"
    hidden = layer.linear1(x)
    want = layer.norm2(x + layer.linear2(hidden / (1 + np.exp(-1.702 * hidden))))
    np.testing.assert_allclose(layer(X), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"activation should be relu/gelu, not tanh: mha_c knows 'relu'"):
        encoder_layer(activation="tanh")
    with pytest.raises(TypeError, match="activation must be a name or a callable"):
        encoder_layer(activation=3)
    for name, write in (("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("swish", "silu"),
                        ("GELU", "gelu"), ("SwiGLU", "swiglu")):
        with pytest.raises(RuntimeError, match=f'activation should be relu/gelu, not {name}: write "{write}"$'):
            encoder_layer(activation=name)
        assert encoder_layer(activation=write).activation == write


@pytest.mark.parametrize(("name", "plain"), [("swiglu", "silu"), ("geglu", "gelu")])
def test_gated_activations(name, plain):
    """The gates are the first rows of linear1, and they are activated."""
    from mha_c.activations import activate

    layer = randomize(encoder_layer(activation=name)).eval()
    assert layer.linear1.weight.shape == (32, 8) and layer.linear2.weight.shape == (8, 16)
    x = layer.norm1(X + layer.self_attn(X, X, X, need_weights=False)[0])
    both = layer.linear1(x)
    want = layer.norm2(x + layer.linear2(activate(both[..., :16], plain) * both[..., 16:]))
    np.testing.assert_array_equal(layer(X), want)


# ------------------------------------------------------------------------------------------- dropout


def test_dropout_distribution():
    """Each number is dropped with probability p, whatever its place, and the others are divided by 1 - p."""
    for p, dtype in ((0.1, "float32"), (0.5, "float64"), (0.9, "float32")):
        x = np.ones((50, 40, 30), dtype)
        dropped = mha_c.Dropout(p, dropout_seed=1)(x)
        kept = dropped != 0
        sigma = np.sqrt(p * (1 - p))
        assert abs(kept.mean() - (1 - p)) < 4 * sigma / np.sqrt(kept.size)
        for axis in range(3):
            rates = kept.mean(axis=tuple(i for i in range(3) if i != axis))
            assert np.abs(rates - (1 - p)).max() < 5 * sigma / np.sqrt(kept.size / kept.shape[axis])
        np.testing.assert_allclose(dropped[kept], 1 / (1 - p), rtol=np.finfo(dtype).eps * 2)


def test_calls_in_evaluation_do_not_count():
    evaluated, other = (mha_c.Dropout(0.5, dropout_seed=1) for _ in range(2))
    evaluated.eval()(X)
    np.testing.assert_array_equal(evaluated.train()(X), other(X))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.bool_])
def test_dropout_of_integers(dtype):
    """Refused like torch's, in training mode: the numbers that stay would be rounded."""
    torch = pytest.importorskip("torch")
    x = np.arange(5).astype(dtype)
    with pytest.raises(RuntimeError, match="^result type Float can't be cast to the desired output type"):
        torch.nn.Dropout(0.1)(torch.from_numpy(x))
    with pytest.raises(RuntimeError, match="^result type Float can't be cast to the desired output type"):
        mha_c.Dropout(0.1)(x)
    np.testing.assert_array_equal(mha_c.Dropout(0.1).eval()(x), x)


def test_dropout_at_its_ends():
    """As torch: 0 is the identity, 1 gives zeros, and a dropped infinity is NaN."""
    torch = pytest.importorskip("torch")
    x = np.array([1.0, -2.0, np.inf, np.nan, 0.0], "f")
    for p in (0.0, 1.0):
        want = torch.nn.Dropout(p)(torch.from_numpy(x)).numpy()
        np.testing.assert_array_equal(mha_c.Dropout(p)(x), want)
    assert mha_c.Dropout(0.5)(np.zeros((0, 3), "f")).shape == (0, 3)
    for p in (-0.1, 1.5, float("nan"), "a"):
        error, expected = (outcome(lambda: library.Dropout(p)).error for library in (mha_c, torch.nn))
        assert error is not None and (expected is None or type(error) is type(expected))
    layer = encoder_layer(dropout=1.0)
    np.testing.assert_allclose(layer(X), layer.norm2(layer.norm1(X)), rtol=1e-6, atol=1e-6)


def masks_of(layer):
    """What each place in a layer drops in its next call, by name: the same shape everywhere, so that they compare."""
    ones = np.ones((40, 50), "f")
    found = {}
    for name, part in layer.named_modules():
        if isinstance(part, mha_c.Dropout):
            found[name] = part(ones) != 0
        elif isinstance(part, mha_c.MultiheadAttention):
            zeros = np.zeros((40, part.embed_dim), "f")
            weights = part(zeros, zeros, zeros, average_attn_weights=False)[1]
            found[name] = np.resize(weights != 0, ones.shape)
    return found


@pytest.mark.parametrize("make", [
    lambda: mha_c.TransformerEncoder(encoder_layer(dropout=0.5, dropout_seed=1), 2),
    lambda: mha_c.Transformer(8, 2, 2, 2, 16, dropout=0.5, dropout_seed=1, seed=0),
], ids=["encoder", "transformer"])
def test_every_place_drops_by_itself(make):
    """In every layer, at every site, and in every call; the same again from the same seed."""
    first, second = make(), make()
    found = [(name, mask) for _ in range(2) for name, mask in masks_of(first).items()]
    again = [(name, mask) for _ in range(2) for name, mask in masks_of(second).items()]
    masks = [mask for _, mask in found]
    for i, mask in enumerate(masks):
        np.testing.assert_array_equal(mask, again[i][1])
        for j, other in enumerate(masks[:i]):  # independent: equal in half of the places
            assert abs((mask == other).mean() - 0.5) < 0.12, (found[i][0], found[j][0])
    assert len(masks) in (16, 40)  # two calls of 4 places in each encoder layer, and 6 in each decoder layer


def test_dropout_depends_on_seed_and_call():
    def outputs(seed):
        layer = encoder_layer(dropout_seed=seed)
        return [layer(X) for _ in range(3)]

    first, same, other = outputs(1), outputs(1), outputs(2)
    np.testing.assert_array_equal(first, same)
    different = [*first, *other]
    assert all(not np.array_equal(a, b) for i, a in enumerate(different) for b in different[:i])
    layer = encoder_layer(dropout_seed=1).eval()
    np.testing.assert_array_equal(layer(X), layer(X))
    np.testing.assert_array_equal(layer.train()(X), first[0])


def test_dropout_is_where_torch_has_it():
    """With everything kept but one place, the mean over many calls is the output without dropout of that place."""
    for place in ("dropout", "dropout1", "dropout2"):
        layer = randomize(encoder_layer(norm_first=True, dropout=0.0, dropout_seed=1))
        want = layer(X)
        getattr(layer, place).p = 1.0
        got = layer(X)
        x = X if place == "dropout1" else X + layer.self_attn(y := layer.norm1(X), y, y, need_weights=False)[0]
        feed = layer.linear2(np.maximum(layer.linear1(layer.norm2(x)), 0))
        expected = {"dropout": x + layer.linear2.bias, "dropout1": x + feed, "dropout2": x}[place]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        assert not np.allclose(got, want)


# ------------------------------------------------------------------------------------------- beyond torch


def test_what_attention_can_do_besides():
    """Heads in groups and of other widths, in every class; and RMSNorm."""
    options = {"num_kv_heads": 2, "head_dim": 6, "v_head_dim": 3, "norm": "rms", "masked_rows": "zero", "seed": 0,
               "batch_first": True}
    model = mha_c.Transformer(8, 4, 1, 1, 16, **options).eval()
    for layer in (model.encoder.layers[0], model.decoder.layers[0]):
        attention = layer.self_attn
        widths = attention.num_kv_heads, attention.head_dim, attention.v_head_dim, attention.masked_rows
        assert widths == (2, 6, 3, "zero") and isinstance(layer.norm1, mha_c.RMSNorm)
    assert isinstance(model.encoder.norm, mha_c.RMSNorm) and model(X, X).shape == X.shape
    with pytest.raises(ValueError, match="""norm must be "layer" or "rms", but got 'batch'$"""):
        encoder_layer(norm="batch")
    for norm, write in (("LayerNorm", "layer"), ("layer_norm", "layer"), ("rmsnorm", "rms"), (mha_c.RMSNorm, "rms")):
        with pytest.raises(ValueError, match=f': write "{write}"$'):
            encoder_layer(norm=norm)


@pytest.mark.parametrize("batch_first", [True, False])
def test_padded_rows_of_single_layers(batch_first):
    """Zeros at the end of the layer; computed unless asked for."""
    padding = np.array([[False, False, True, True, False]] * 3)
    x = X if batch_first else X.swapaxes(0, 1)
    rows = padding if batch_first else padding.T
    options = {"batch_first": batch_first, "seed": 0}
    layers = [
        (mha_c.TransformerEncoderLayer(8, 2, 16, **options), (x,), "src_key_padding_mask"),
        (mha_c.TransformerDecoderLayer(8, 2, 16, **options), (x, x), "tgt_key_padding_mask"),
    ]
    for layer, given, name in layers:
        layer.eval()
        computed = layer(*given, **{name: padding})
        assert computed[rows].all()
        layer.padded = "zero"
        for mask in (padding, np.where(padding, -np.inf, 0).astype("f")):
            zeroed = layer(*given, **{name: mask})
            assert not zeroed[rows].any()
            np.testing.assert_array_equal(zeroed[~rows], computed[~rows])
        lowered = np.where(padding, -1e9, 0).astype("f")  # which is no padding
        assert layer(*given, **{name: lowered})[rows].all()
        unbatched = tuple(one[0] if batch_first else one[:, 0] for one in given)
        assert not layer(*unbatched, **{name: padding[0]})[padding[0]].any()
    with pytest.raises(ValueError, match='padded must be None, "zero" or "computed"'):
        layer.padded = "nan"


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("widths", [{"nhead": 2, "head_dim": 40}, {"nhead": 1, "head_dim": 16, "v_head_dim": 2000}])
def test_padded_rows_where_heads_are_wider_than_the_layer(widths, norm_first):
    """Then few operations are needed if queries attend to the inputs of the keys, which is a path of its own."""
    layer = mha_c.TransformerEncoderLayer(16, dim_feedforward=32, batch_first=True, norm_first=norm_first, seed=0, **widths)
    layer.eval()
    x = np.random.default_rng(0).standard_normal((3, 200, 16), np.float32)
    padding = np.arange(200) < np.array([[50], [0], [199]])
    computed = layer(x, src_key_padding_mask=padding)
    layer.padded = "zero"
    zeroed = layer(x, src_key_padding_mask=padding)
    assert not zeroed[padding].any()
    np.testing.assert_array_equal(zeroed[~padding], computed[~padding])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("activation", ["relu", lambda x: np.maximum(x, 0)])
def test_long_doubles_beyond_float64_are_padding(activation):
    """In one call of the core, which reads them as float64 and so as -inf, and step by step."""
    padding = np.arange(5) >= np.array([[5], [3], [2]])
    lowest = np.finfo(np.longdouble).min
    mask = np.where(padding, lowest, np.longdouble(0))
    layer = encoder_layer(activation=activation, padded="zero").eval()
    for model in (layer, mha_c.TransformerEncoder(layer, 2)):
        zeroed = not model(X, src_key_padding_mask=mask)[padding].any()
        assert zeroed == (lowest < np.finfo(np.float64).min)


@pytest.mark.parametrize("place", ["self_attn", "dropout", "dropout1", "dropout2"])
def test_dropout_in_one_place_alone(place):
    """A layer drops numbers if any of its parts does."""
    layer = encoder_layer(dropout=0.5).eval()
    want = layer(X)
    getattr(layer, place).train()
    assert not np.array_equal(layer(X), want)


@pytest.mark.parametrize("place", encoder_layer()._child_names)
def test_parts_of_other_classes_are_called(place):
    """A part whose class is derived from mha_c's may compute something else."""
    layer = encoder_layer(dropout=0.0).eval()
    want = layer(X)
    part = getattr(layer, place)

    class Doubled(type(part)):
        def __call__(self, *arguments, **masks):
            given = super().__call__(*arguments, **masks)
            return (2 * given[0], None) if place == "self_attn" else 2 * given

    part.__class__ = Doubled
    assert not np.allclose(layer(X), want)


def test_options_reach_both_halves_of_a_transformer():
    model = mha_c.Transformer(8, 2, 1, 1, 16, layer_norm_eps=0.5, norm="rms", padded="zero", bias=False)
    for half in (model.encoder, model.decoder):
        assert half.padded == "zero" and isinstance(half.norm, mha_c.RMSNorm)
        assert half.norm.eps == half.layers[0].norm1.eps == 0.5


def test_from_torch_keeps_the_mode_of_every_part():
    torch = pytest.importorskip("torch")
    module = torch.nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    for training in (True, False):
        copied = mha_c.Transformer.from_torch(module.train(training))
        assert {part.training for part in copied.modules()} == {training}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_from_torch_keeps_what_an_encoder_says_of_nested_tensors():
    torch = pytest.importorskip("torch")
    for batch_first, enable, check in itertools.product((True, False), repeat=3):
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        module = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=enable, mask_check=check)
        copied = mha_c.TransformerEncoder.from_torch(module)
        for name in ("enable_nested_tensor", "use_nested_tensor", "mask_check"):
            assert getattr(copied, name) == getattr(module, name), name


def test_parts_in_another_order_are_refused():
    layer = encoder_layer()
    description = layer._description()
    description["children"] = dict(reversed(description["children"].items()))
    with pytest.raises(ValueError, match="does not consist of dropout2"):
        type(layer)._described(description, layer.state_dict())


def test_a_slice_of_a_list_takes_layers_alone():
    layers = mha_c.ModuleList([mha_c.Linear(2, 2), mha_c.Linear(2, 3)])
    with pytest.raises(TypeError, match="int is not a Module subclass"):
        layers[:1] = [3]
    layers[1:] = [mha_c.LayerNorm(2)]
    assert repr(layers[1]).startswith("LayerNorm")


def test_a_padding_mask_without_a_batch_is_refused_by_the_layers():
    encoder = mha_c.TransformerEncoder(encoder_layer(), 2).eval()
    with pytest.raises(AssertionError, match="expected `key_padding_mask` to be `None` or 2-D but found 1-D"):
        encoder(X, src_key_padding_mask=np.zeros(5, bool))


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_a_stack_says_which_layer_it_takes(kind):
    """A layer of torch is to be copied first, as the message says."""
    nn, stack = pytest.importorskip("torch").nn, getattr(mha_c, f"Transformer{kind}")
    argument = f"{kind.lower()}_layer"
    given = getattr(nn, f"Transformer{kind}Layer")(8, 2, 16)
    with pytest.raises(TypeError) as error:
        stack(given, 2)
    ours = f"mha_c.Transformer{kind}Layer"
    cure = f"{ours}.from_torch({argument})"
    assert str(error.value) == (
        f"{argument} is torch's Transformer{kind}Layer, but it must be mha_c's: pass {cure}")
    assert len(stack(eval(cure, {"mha_c": mha_c, argument: given}), 2).layers) == 2  # noqa: S307 - what it says
    for wrong in (3, nn.Linear(8, 8)):
        with pytest.raises(TypeError, match=f"is not a Module subclass: {argument} must be a {ours}$"):
            stack(wrong, 2)


@pytest.mark.parametrize("batch_first", [True, False])
def test_padded_rows_of_stacks(batch_first):
    """Zeros after the last layer, also if it is of a derived class."""
    class Derived(mha_c.TransformerEncoderLayer):
        pass

    padding = np.arange(5) >= np.array([[5], [3], [2]])
    x, rows = (X, padding) if batch_first else (X.swapaxes(0, 1), padding.T)
    encoders = [mha_c.TransformerEncoder(kind(8, 2, 16, batch_first=batch_first), 2, padded="zero")
                for kind in (mha_c.TransformerEncoderLayer, Derived)]
    decoder = mha_c.TransformerDecoder(mha_c.TransformerDecoderLayer(8, 2, 16, batch_first=batch_first), 2, padded="zero")
    outputs = [encoder(x, src_key_padding_mask=padding) for encoder in encoders]
    for output in (*outputs, decoder(x, x, tgt_key_padding_mask=padding)):
        assert not output[rows].any() and output[~rows].all()


def test_an_error_that_is_no_refusal_ends_the_call(monkeypatch):
    """Such as that of a signal handler: the steps would swallow it."""
    def interrupted(*_):
        raise ValueError("of a signal handler")

    monkeypatch.setattr(mha_c._core, "transform", interrupted)
    for model in (encoder_layer().eval(), mha_c.TransformerEncoder(encoder_layer(), 2).eval()):
        with pytest.raises(ValueError, match="^of a signal handler"):
            model(X)


def test_stacks_without_layers_give_their_input():
    """As an array, also where padded rows would be zeros."""
    padding = np.arange(5) >= np.array([[5], [3], [2]])
    encoder = mha_c.TransformerEncoder(encoder_layer(), 0, padded="zero")
    decoder = mha_c.TransformerDecoder(mha_c.TransformerDecoderLayer(8, 2), 0, padded="zero")
    for output in (encoder(memoryview(X), src_key_padding_mask=padding), decoder(memoryview(X), X, None, None, padding)):
        assert type(output) is np.ndarray
        np.testing.assert_array_equal(output, X, strict=True)


def test_padding_is_never_read():
    """NaN in rows of padding stays there."""
    padding = np.arange(5) >= np.array([[5], [3], [0]])
    x = X.copy()
    x[padding] = np.nan
    encoder = mha_c.TransformerEncoder(randomize(encoder_layer()), 2).eval()
    np.testing.assert_array_equal(encoder(x, src_key_padding_mask=padding), encoder(X, src_key_padding_mask=padding))


def test_causal_memory_does_not_warn():
    """Where the keys are a memory, fewer queries than keys are no sign of decoding."""
    decoder = mha_c.TransformerDecoder(mha_c.TransformerDecoderLayer(8, 2, 16), 1).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (decoder, copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
            one(X[:1], X, memory_is_causal=True)


def test_inputs_are_not_modified():
    for module, given in modules().values():
        before = [x.copy() for x in given]
        module.eval()(*given)
        module.train()(*given)
        for x, y in zip(given, before):
            np.testing.assert_array_equal(x, y)


def test_tensors_are_inputs():
    torch = pytest.importorskip("torch")
    for module, given in modules().values():
        want = module.eval()(*given)
        np.testing.assert_array_equal(module(*map(torch.from_numpy, given)), want)


def test_generate_square_subsequent_mask():
    torch = pytest.importorskip("torch")
    for size in (0, 1, 4):
        want = torch.nn.Transformer.generate_square_subsequent_mask(size).numpy()
        np.testing.assert_array_equal(mha_c.Transformer.generate_square_subsequent_mask(size), want)
    assert mha_c.Transformer.generate_square_subsequent_mask(2, dtype="float64").dtype == np.float64
    with pytest.raises(RuntimeError, match="negative dimension"):
        mha_c.Transformer.generate_square_subsequent_mask(-1)


def test_numbers_that_are_not_finite_give_no_warnings():
    x = X.copy()
    x[0, 0, 0], x[1, 1, 1] = np.inf, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module, given in modules().values():
            module(*(x[:, : one.shape[1]] for one in given))
        assert np.isfinite(encoder_layer()(x)[2]).all()
