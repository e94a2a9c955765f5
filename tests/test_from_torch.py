# SPDX-License-Identifier: Apache-2.0
"""Layers of torch that are not plain ones, made into layers of mha_c: what torch computes with them is computed here."""

import re

import mha_c
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import unusual_layers  # noqa: E402
from mha_c import MultiheadAttention  # noqa: E402
from unusual_layers import MADE_ANEW, PARAMETRIZED, STORED  # noqa: E402

KINDS = STORED | MADE_ANEW | PARAMETRIZED

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")


@pytest.mark.parametrize("kind", KINDS)
def test_unusual_layers(kind, tmp_path):
    torch.manual_seed(0)
    module = KINDS[kind](batch_first=True).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(3, 5, 16)
        expected = module(x, x, x)
    layer = MultiheadAttention.from_torch(module)
    for ours, theirs in zip(layer(x, x, x), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=5e-6)
    state = layer.state_dict()
    assert state.keys() <= mha_c.MultiheadAttention(16, 2).state_dict().keys()  # and nothing else that the layer held
    layer.save(tmp_path / "layer.npz")
    again = MultiheadAttention.load(tmp_path / "layer.npz")
    assert all(np.array_equal(again.state_dict()[name], array) for name, array in state.items())


def test_a_forward_of_its_own_is_refused():
    for module in (unusual_layers.OwnForward(8, 2), torch.nn.MultiheadAttention(8, 2)):
        module.forward = module.forward  # as wrappers are put around it
        with pytest.raises(TypeError, match=r"this (OwnForward|MultiheadAttention) overrides forward.*"
                                            r"from_state_dict\(module.state_dict\(\), num_heads=module.num_heads\)"):
            MultiheadAttention.from_torch(module)
    with pytest.raises(TypeError, match="this OwnForward overrides forward"):
        MultiheadAttention.from_torch(unusual_layers.OwnForward(8, 2))


def test_hooks_are_refused():
    """Those that compute a weight are torch's own, in KINDS."""
    attention, encoder = torch.nn.MultiheadAttention(8, 2), torch.nn.TransformerEncoderLayer(8, 2, 16)
    attention.register_forward_hook(lambda module, args, output: (output[0] * 2, output[1]))
    encoder.linear1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    norm = torch.nn.LayerNorm(8)
    handle = norm.register_forward_hook(lambda module, args, output: output * 2)
    for cls, module, name in ((MultiheadAttention, attention, "this one"), (mha_c.LayerNorm, norm, "this one"),
                              (mha_c.TransformerEncoderLayer, encoder, "linear1")):
        with pytest.raises(TypeError, match=f"but {name} has a forward hook, which could compute anything: remove it"):
            cls.from_torch(module)
    handle.remove()
    assert mha_c.LayerNorm.from_torch(norm).normalized_shape == (8,)
    norm.register_forward_hook([].append)  # which has no module
    with pytest.raises(TypeError, match="has a forward hook"):
        mha_c.LayerNorm.from_torch(norm)
    attention = torch.nn.MultiheadAttention(8, 2)
    attention.out_proj.register_forward_hook(lambda *args: 1 / 0)  # which torch does not call
    assert MultiheadAttention.from_torch(attention).num_heads == 2


def test_what_takes_something_else():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for module, cls, words in (
        (layer, mha_c.TransformerEncoder, ", which mha_c.TransformerEncoderLayer.from_torch takes"),
        (torch.nn.RMSNorm(3), mha_c.LayerNorm, ", which mha_c.RMSNorm.from_torch takes"),
        (layer.state_dict(), mha_c.TransformerEncoder, ": parameters alone are for TransformerEncoder.from_state_dict"),
        ("model.pt", mha_c.Linear, "got builtins.str: Linear.load reads a file of save"),
        ("model.pt", MultiheadAttention,
         ": MultiheadAttention.load reads a file of save, MultiheadAttention.from_state_dict a checkpoint"),
        (torch.nn.MultiheadAttention, mha_c.MultiheadAttention, "activation.MultiheadAttention: pass a layer"),
        (torch.nn.Tanh(), mha_c.Linear, "got torch.nn.modules.activation.Tanh"),
        ([torch.nn.Linear(2, 2)], mha_c.ModuleList, "got builtins.list"),
        (torch.nn.Sequential(torch.nn.Linear(2, 2)), mha_c.ModuleList, "got torch.nn.modules.container.Sequential"),
    ):
        with pytest.raises(TypeError, match=f"^from_torch takes a .*{re.escape(words)}$"):
            cls.from_torch(module)


def test_what_every_layer_of_torch_does_is_refused(monkeypatch):
    """Hooks of all modules, and methods that were put into torch's classes."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
    everywhere = torch.nn.modules.module
    for register in (everywhere.register_module_forward_hook, everywhere.register_module_forward_pre_hook):
        handle = register(lambda *_: None)
        with pytest.raises(TypeError, match="but every module has a forward hook, which could compute anything"):
            mha_c.TransformerEncoderLayer.from_torch(layer)
        handle.remove()
        mha_c.TransformerEncoderLayer.from_torch(layer)
    for cls, method in ((torch.nn.TransformerEncoderLayer, "_ff_block"), (torch.nn.Linear, "forward")):
        with monkeypatch.context() as patch, pytest.raises(TypeError, match=f"this {cls.__name__} overrides {method}"):
            patch.setattr(cls, method, lambda self, x: x)
            mha_c.TransformerEncoderLayer.from_torch(layer)


def test_replaced_layers():
    module = mha_c.torch.replace_attention(unusual_layers.Named(8, 2))
    assert MultiheadAttention.from_torch(module).num_heads == 2


def test_models_name_their_attention():
    layer = torch.nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(TypeError, match=r"torch.nn.MultiheadAttention, but got torch.nn.*TransformerEncoderLayer. "
                                        r"It holds self_attn: pass that layer$"):
        MultiheadAttention.from_torch(layer)
    with pytest.raises(TypeError, match=r"layers.0.self_attn, layers.1.self_attn, layers.2.self_attn and 3 more: pass"):
        MultiheadAttention.from_torch(torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False))
    with pytest.raises(TypeError, match=r"but got builtins.int$"):
        MultiheadAttention.from_torch(3)
