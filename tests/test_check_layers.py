# SPDX-License-Identifier: Apache-2.0
"""check.against_torch of whole layers, and to_torch, from which it makes torch's layers."""

import warnings

import numpy as np
import pytest

mha_c = pytest.importorskip("mha_c")
torch = pytest.importorskip("torch")

from mha_c.torch import to_torch  # noqa: E402

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


@pytest.mark.parametrize("kind", layers())
def test_layers_agree(kind):
    for options in ({}, {"norm_first": True, "activation": "gelu"}, {"activation": "gelu_tanh", "bias": False}):
        layer, inputs = layers(**options)[kind]
        assert mha_c.check.against_torch(layer, *inputs).agrees
        module = to_torch(layer)
        assert mha_c.check.against_torch(module, *map(torch.from_numpy, inputs)).agrees


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


@pytest.mark.parametrize("options", [{"norm": "rms"}, {"activation": "swiglu"}, {"activation": np.tanh},
                                     {"num_kv_heads": 1}])  # fmt: skip
def test_layers_that_torch_does_not_have(options):
    for layer, inputs in layers(**options).values():
        with pytest.raises(ValueError, match="torch.nn"):
            to_torch(layer)
        with pytest.raises(ValueError, match="torch.nn"):
            mha_c.check.against_torch(layer, *inputs)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="float32"):
        mha_c.check.against_torch(mha_c.TransformerEncoderLayer(8, 2, dtype="float64"), SRC.astype(np.float64))
    with pytest.raises(TypeError, match="to_torch"):
        to_torch(3)
