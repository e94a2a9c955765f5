# SPDX-License-Identifier: Apache-2.0
"""check.against_torch of whole layers, the definition behind it, and to_torch, from which it makes torch's layers."""

import inspect
import warnings

import numpy as np
import pytest
from helpers import randomize

mha_c = pytest.importorskip("mha_c")
torch = pytest.importorskip("torch")

from mha_c.check import definition  # noqa: E402
from mha_c.torch.convert import layer_in_torch, to_torch  # noqa: E402
from mha_c.torch.tensors import tensor_of  # noqa: E402

RNG = np.random.default_rng(0)
SRC, TGT = (RNG.standard_normal((length, 3, 8), np.float32) for length in (6, 5))
PADDING = np.arange(6) >= np.array([[6], [4], [2]])


def layers(**options):
    """One of each kind, with the inputs of its call."""
    encoder = mha_c.TransformerEncoderLayer(8, 2, 12, seed=0, **options)
    decoder = mha_c.TransformerDecoderLayer(8, 2, 12, seed=0, **options)
    return {
        "encoder layer": (encoder, (SRC,)),
        "encoder": (mha_c.TransformerEncoder(encoder, 2, mha_c.LayerNorm(8)), (SRC,)),
        "decoder layer": (decoder, (TGT, SRC)),
        "decoder": (mha_c.TransformerDecoder(decoder, 2), (TGT, SRC)),
        "transformer": (mha_c.Transformer(8, 2, 2, 1, 12, seed=0, **options), (SRC, TGT)),
    }


OPTIONS = ({}, {"norm_first": True, "activation": "gelu"}, {"activation": "gelu_tanh", "bias": False}, {"activation": "silu"})


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", layers())
def test_layers_agree(kind, dtype):
    for options in OPTIONS:
        layer, inputs = layers(**options, dtype=dtype)[kind]
        inputs = [x.astype(dtype) for x in inputs]
        assert mha_c.check.against_torch(layer.to(dtype), *inputs).agrees
        report = mha_c.check.against_torch(to_torch(layer), *map(tensor_of, inputs))
        assert report.agrees and report.comparisons[0].torch_dtype == dtype
        assert report.comparisons[0].torch_error.largest < 8 * report.comparisons[0].ulp  # the reference is right


@pytest.mark.parametrize("kind", layers())
def test_the_definition(kind):
    """That of a float32 layer has the numbers that torch computes in float64; that of a float64 layer is wider still."""
    for options in OPTIONS:
        layer, inputs = layers(**options)[kind]
        randomize(layer.eval())
        call = dict(zip(inspect.signature(layer.forward).parameters, inputs))
        rest = [False if name.endswith("causal") else None for name in inspect.signature(layer.forward).parameters]
        exact = definition.transform(layer, *inputs, *rest[len(inputs):])
        assert exact.dtype == np.float64
        theirs = layer_in_torch(layer.to("float64"), call)
        np.testing.assert_allclose(exact, theirs, rtol=0, atol=1e-13)
        wide = definition.transform(layer, *inputs, *rest[len(inputs):])
        assert wide.dtype == np.longdouble
        np.testing.assert_allclose(wide, exact, rtol=0, atol=1e-13)


def test_norms_at_the_end():
    """Also those that only a stack has: RMSNorm, whose default eps depends on the dtype, and norms without parameters."""
    for norm in (torch.nn.RMSNorm(8), torch.nn.LayerNorm(8, elementwise_affine=False), torch.nn.Linear(8, 4)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
            module = torch.nn.TransformerEncoder(layer, 1, norm, enable_nested_tensor=False).to(dtype)
            report = mha_c.check.against_torch(module, 1e-4 * torch.from_numpy(SRC).to(dtype))
            assert report.agrees
            assert report.comparisons[0].torch_error.largest < 8 * report.comparisons[0].ulp


def test_the_error_function():
    mpmath = pytest.importorskip("mpmath")
    x = np.linspace(-8, 8, 201).astype(np.longdouble)
    with mpmath.workdps(40):
        exact = np.array([np.longdouble(mpmath.nstr(mpmath.erf(mpmath.mpf(float(one))), 30)) for one in x])
    assert np.abs(definition._erf(x) - exact).max() < 32 * np.finfo(np.longdouble).eps


@pytest.mark.parametrize("kind, call", [
    ("encoder layer", {"is_causal": True, "src_key_padding_mask": PADDING}),
    ("encoder", {"is_causal": True, "mask": RNG.standard_normal((6, 6), np.float32)}),
    ("decoder layer", {"tgt_is_causal": True, "memory_is_causal": True, "memory_key_padding_mask": PADDING}),
    ("decoder", {"tgt_is_causal": True, "tgt_mask": np.eye(5, k=-1, dtype=bool)}),
    ("transformer", {"src_is_causal": True, "tgt_is_causal": True, "memory_is_causal": True}),
])  # fmt: skip
def test_masks_and_the_causal_order(kind, call):
    layer, inputs = layers()[kind]
    report = mha_c.check.against_torch(layer, *inputs, **call)
    assert report.agrees, report
    assert not np.array_equal(layer.eval()(*inputs, **call), layer(*inputs))  # the call is not one without masks


def test_a_difference_is_found(monkeypatch):
    layer, inputs = layers()["encoder layer"]
    right = mha_c._core.transform
    monkeypatch.setattr("mha_c._core.transform", lambda *arguments: right(*arguments) + np.float32(1e-3))
    assert not mha_c.check.against_torch(layer, *inputs).agrees


def test_to_torch_and_back():
    """Arguments, parameters, modes and torch's random numbers stay as they are."""
    for kind, (layer, inputs) in layers(dropout=0.25, batch_first=True).items():
        next(iter(layer.children())).eval()
        state = torch.random.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module = to_torch(layer)
        assert torch.equal(torch.random.get_rng_state(), state)
        again = type(layer).from_torch(module)
        assert repr(again) == repr(layer), kind
        assert [part.training for part in again.modules()] == [part.training for part in layer.modules()]
        assert all(np.array_equal(a, b) for a, b in zip(again.parameters(), layer.parameters(), strict=True))


@pytest.mark.parametrize("options, words", [
    ({"norm": "rms"}, "does not have RMS norms"), ({"activation": "swiglu"}, "does not have the activation 'swiglu'"),
    ({"activation": np.tanh}, "does not have the activation <"), ({"num_kv_heads": 1}, "")])  # fmt: skip
def test_layers_that_torch_does_not_have(options, words):
    for layer, inputs in layers(**options).values():
        with pytest.raises(ValueError, match=f"torch.nn.*{words}"):
            to_torch(layer)
        with pytest.raises(ValueError, match=f"torch.nn.*{words}"):
            mha_c.check.against_torch(layer, *inputs)


def test_what_is_refused():
    with pytest.raises(TypeError, match="this one is float8_e5m2: check a copy.float()"):
        mha_c.check.against_torch(torch.nn.TransformerEncoderLayer(8, 2).to(torch.float8_e5m2), torch.zeros(5, 3, 8))
    with pytest.raises(RuntimeError, match="pass src.astype"):  # in the layer's own words
        mha_c.check.against_torch(mha_c.TransformerEncoderLayer(8, 2), SRC.astype(np.float64))
    for narrow in ("int8", "bfloat16"):
        replaced = mha_c.torch.replace_layers(
            torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval(),
            matmul_precision=narrow)
        for refuse in (mha_c.check.model, mha_c.check.against_torch):
            with pytest.raises(ValueError, match="replace the layers anew, without matmul_precision$"):
                refuse(replaced, torch.zeros(3, 5, 8))
        assert mha_c.check.model(mha_c.torch.replace_layers(replaced), torch.ones(3, 5, 8)).agrees
    with pytest.raises(TypeError, match="^src must be an array"):
        mha_c.check.against_torch(mha_c.TransformerEncoderLayer(8, 2), [[0.0]])
    with pytest.raises(TypeError, match="to_torch"):
        to_torch(3)
