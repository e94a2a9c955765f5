# SPDX-License-Identifier: Apache-2.0
"""Parameters from a seed: the bits that torch's constructor leaves after torch.manual_seed."""

import math

import mha_c
import numpy as np
import pytest

torch = pytest.importorskip("torch")

#: Elsewhere torch takes the normal numbers in bias_k and bias_v from other functions.
VECTOR_FUNCTIONS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

CONFIGURATIONS = [
    {"embed_dim": 8, "num_heads": 2},
    {"embed_dim": 8, "num_heads": 2, "kdim": 5, "vdim": 7},
    {"embed_dim": 5, "num_heads": 1, "add_bias_kv": True},  # an odd number of normal numbers, which come in pairs
    {"embed_dim": 15, "num_heads": 3, "add_bias_kv": True, "bias": False},
    {"embed_dim": 16, "num_heads": 4, "add_bias_kv": True},  # from 16 on torch draws them in blocks
    {"embed_dim": 17, "num_heads": 1, "add_bias_kv": True, "kdim": 0},
    {"embed_dim": 96, "num_heads": 4, "kdim": 48, "vdim": 32, "add_bias_kv": True},
    {"embed_dim": 300, "num_heads": 3, "add_bias_kv": True},  # more draws than are taken at a time
]
SEEDS = [0, 1, 42, 2**32 - 1, 2**32, 2**32 + 7, 2**63, 2**64 - 1, -1, -12345, -(2**63)]


def assert_same_bits(array, tensor, what):
    assert array.shape == tensor.shape and array.tobytes() == tensor.numpy().tobytes(), what


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_same_bits_as_torch(options, dtype):
    """Every seed, whichever way torch folds it, and every initialiser."""
    for seed in SEEDS:
        torch.manual_seed(seed)
        theirs = torch.nn.MultiheadAttention(**options, dtype=getattr(torch, dtype)).state_dict()
        ours = mha_c.MultiheadAttention(**options, dtype=dtype, seed=seed).state_dict()
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            if name in ("bias_k", "bias_v") and not VECTOR_FUNCTIONS:
                np.testing.assert_allclose(ours[name], tensor.numpy(), rtol=1e-6, atol=1e-7)
            else:
                assert_same_bits(ours[name], tensor, f"{name}, seed {seed}")


@pytest.mark.skipif(not VECTOR_FUNCTIONS, reason="torch computes normal numbers in another way here")
def test_same_normal_numbers_as_torch():
    """Enough of them to meet every branch of the vector functions."""
    for seed in range(5):
        torch.manual_seed(seed)
        theirs = torch.nn.MultiheadAttention(1000, 1, kdim=1, vdim=1, add_bias_kv=True)
        ours = mha_c.MultiheadAttention(1000, 1, kdim=1, vdim=1, add_bias_kv=True, seed=seed)
        assert_same_bits(ours.bias_k, theirs.bias_k.detach(), seed)
        assert_same_bits(ours.bias_v, theirs.bias_v.detach(), seed)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, "a", None, 1.7, True])
def test_seeds_that_are_no_integers_in_range(seed):
    """The same seeds are refused as by torch, with the same type; None is no seed here."""
    if seed is None:
        assert mha_c.MultiheadAttention(8, 2, seed=None).in_proj_weight.any()
        return
    try:
        torch.manual_seed(seed)
    except Exception as error:  # noqa: BLE001 - whatever torch raises is right
        with pytest.raises(type(error)) as ours:
            mha_c.MultiheadAttention(8, 2, seed=seed)
        assert str(ours.value).startswith(str(error))
    else:
        theirs = torch.nn.MultiheadAttention(8, 2)
        assert_same_bits(mha_c.MultiheadAttention(8, 2, seed=seed).in_proj_weight, theirs.in_proj_weight.detach(), seed)


def test_without_a_seed():
    """Two layers differ, and NumPy's global random numbers are left alone."""
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (mha_c.MultiheadAttention(8, 2) for _ in range(2))
    assert (first.in_proj_weight != second.in_proj_weight).any()
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_free_widths_use_the_actual_shapes():
    """Bounds follow from fan-in and fan-out; a large layer comes close to them."""
    layer = mha_c.MultiheadAttention(
        64, 8, head_dim=16, v_head_dim=4, out_dim=50, num_kv_heads=2, kdim=30, add_bias_kv=True, seed=3
    )
    bounds = {
        "q_proj_weight": math.sqrt(6 / (128 + 64)),
        "k_proj_weight": math.sqrt(6 / (32 + 30)),
        "v_proj_weight": math.sqrt(6 / (8 + 64)),
        "out_proj.weight": math.sqrt(1 / 32),
    }
    state = layer.state_dict()
    for name, bound in bounds.items():
        assert 0.97 * bound < np.abs(state[name]).max() <= bound, name
        assert abs(state[name].mean()) < 0.1 * bound
    assert not state["in_proj_bias"].any() and not state["out_proj.bias"].any()
    assert state["bias_k"].std() == pytest.approx(math.sqrt(1 / 32), rel=0.4)
