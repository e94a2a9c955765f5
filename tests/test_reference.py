# SPDX-License-Identifier: Apache-2.0
"""The reference against torch, so that it may judge: with every option, in both dtypes, and twice as strictly as
mha_c is held to it."""

import itertools

import numpy as np
import pytest
from helpers import ROUNDINGS, assert_matches, call_torch, causal_mask, inputs, normal, randomize
from reference import attention_output, multi_head_attention

torch = pytest.importorskip("torch")

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def torch_layer(embed_dim, num_heads, *, dtype="float32", **options):
    """A torch layer with random parameters, evaluating."""
    module = torch.nn.MultiheadAttention(embed_dim, num_heads, dtype=DTYPES[dtype], **options)
    state = {name: torch.from_numpy(np.array(array)) for name, array in
             randomize(ArrayState(module)).state.items()}
    module.load_state_dict(state)
    return module.eval()


class ArrayState:
    """A torch layer's state dict as arrays, for helpers.randomize()."""

    def __init__(self, module):
        self.state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 5, "vdim": 9}, {"batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "vdim": 3, "batch_first": True},
    {"add_bias_kv": True, "bias": False, "kdim": 1},
], ids=str)
def test_reference_is_torch(options, dtype):
    """Both are the same function: every option of the constructor, with every kind of mask and of weights."""
    module = torch_layer(12, 3, dtype=dtype, **options)
    n, length, s = 2, 5, 7
    given = inputs(n, length, s, 12, kdim=options.get("kdim"), vdim=options.get("vdim"),
                   batch_first=module.batch_first, dtype=dtype)
    rng = np.random.default_rng(5)
    padding = np.arange(s) >= np.array([[s], [s - 3]])
    attn_masks = [None, causal_mask(length, s), normal((length, s), dtype),
                  rng.random((n * 3, length, s)) < 0.3, normal((n * 3, length, s), dtype)]
    paddings = [None, padding, np.where(padding, -np.inf, normal((n, s))).astype(dtype)]
    for attn_mask, key_padding_mask in itertools.product(attn_masks, paddings):
        for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            call = dict(weights, attn_mask=attn_mask, key_padding_mask=key_padding_mask)
            assert_matches(module, call_torch(module, *given, **call), *given, **call, roundings=ROUNDINGS / 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n, length, s, e, h", [(None, 4, 6, 8, 2), (1, 1, 1, 1, 1), (2, 130, 129, 64, 2),
                                                (0, 3, 4, 8, 2), (2, 0, 4, 8, 2), (2, 3, 0, 8, 2)])
def test_reference_is_torch_at_other_sizes(n, length, s, e, h, dtype):
    module = torch_layer(e, h, dtype=dtype)
    given = inputs(n, length, s, e, batch_first=False, dtype=dtype)
    for call in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        assert_matches(module, call_torch(module, *given, **call), *given, **call, roundings=ROUNDINGS / 2)


def test_rows_without_keys():
    """NaN with weights and attention 0 without, as torch; 0 in both where masked_rows says so."""
    module = torch_layer(8, 2)
    given = inputs(1, 3, 4, 8, batch_first=False)
    mask = np.zeros((3, 4), bool)
    mask[1] = True
    for need_weights in (True, False):
        call = {"attn_mask": mask, "need_weights": need_weights}
        assert_matches(module, call_torch(module, *given, **call), *given, **call)
        output, weights = multi_head_attention(module.state_dict(), 2, *given, **call, masked_rows="zero")
        np.testing.assert_array_equal(output[1, 0], module.out_proj.bias.detach().numpy())
        assert weights is None or (weights[0, 1] == 0).all()


def test_grouped_heads_are_repeated_heads():
    """What torch's module cannot express, free widths and shared key/value heads, agrees with writing each head out."""
    h, hkv, d, dv, e, eo = 4, 2, 3, 5, 6, 7
    rng = np.random.default_rng(1)
    grouped = {"q_proj_weight": rng.normal(size=(h * d, e)), "k_proj_weight": rng.normal(size=(hkv * d, e)),
               "v_proj_weight": rng.normal(size=(hkv * dv, e)),
               "in_proj_bias": rng.normal(size=(h + hkv) * d + hkv * dv),
               "out_proj.weight": rng.normal(size=(eo, h * dv)), "out_proj.bias": rng.normal(size=eo)}
    x = rng.normal(size=(2, 5, e))
    output, weights = multi_head_attention(grouped, h, x, x, x, num_kv_heads=hkv, batch_first=True,
                                           average_attn_weights=False)
    bq, bk, bv = np.split(grouped["in_proj_bias"], [h * d, (h + hkv) * d])
    by_head = np.zeros((2, 5, eo))
    for head in range(h):
        kv = head // (h // hkv)
        q = x @ grouped["q_proj_weight"][head * d:][:d].T + bq[head * d:][:d]
        k = x @ grouped["k_proj_weight"][kv * d:][:d].T + bk[kv * d:][:d]
        v = x @ grouped["v_proj_weight"][kv * dv:][:dv].T + bv[kv * dv:][:dv]
        p = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(d))
        p /= p.sum(-1, keepdims=True)
        np.testing.assert_allclose(weights[:, head].astype(float), p, rtol=1e-12)
        by_head += p @ v @ grouped["out_proj.weight"][:, head * dv:][:, :dv].T
    np.testing.assert_allclose(output.astype(float), by_head + grouped["out_proj.bias"], rtol=1e-11)
    packed = dict(grouped, in_proj_weight=np.concatenate([grouped.pop(f"{n}_proj_weight") for n in "qkv"]))
    packed = {name: array for name, array in packed.items() if not name.startswith(("q_", "k_", "v_"))}
    again, _ = multi_head_attention(packed, h, x, x, x, num_kv_heads=hkv, batch_first=True)
    np.testing.assert_array_equal(again, output)
    given = attention_output(packed, h, weights, x, hkv)
    np.testing.assert_array_equal(given, output)
