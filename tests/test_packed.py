# SPDX-License-Identifier: Apache-2.0
"""Parameters of torch that are packed once for many calls: how long they are kept, and for what.

Changes of parameters are in test_replace_attention.py.
"""

import weakref

import mha_c
import numpy as np
import pytest
from helpers import normal

torch = pytest.importorskip("torch")
from mha_c.torch.packed import PackedByWeight, PackedParameters  # noqa: E402

SHAPES = [(), (1,), (5,), (63,), (64,), (1000,), (24, 8), (8, 24), (2304, 768), (1, 1, 64), (7, 3, 5), (3, 0)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "longdouble"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sample(shape, dtype):
    """Up to 64 numbers, the first and the last among them, the same ones whatever the strides."""
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    numbers = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    wide = np.repeat(np.repeat(numbers[..., None], 2, -1), 3, 0)[::3, ..., 0] if shape else numbers
    found = np.frombuffer(mha_c._core.sample((numbers,)), dtype)
    assert found.size == min(2 * max(shape, default=1), 64) * (numbers.size > 0)
    assert set(found) <= set(numbers.ravel())
    if numbers.size:
        assert {numbers.flat[0], numbers.flat[-1]} <= set(found)
    for strided in (np.asfortranarray(numbers), numbers[::-1][::-1] if shape else numbers, wide):
        assert mha_c._core.sample((strided,)) == mha_c._core.sample((numbers,))
    assert mha_c._core.sample((numbers, numbers)) == 2 * mha_c._core.sample((numbers,))


def test_sample_of_a_matrix_is_spread_over_rows_and_columns():
    rows, columns = np.indices((2304, 768))
    for index in (rows, columns):
        assert np.unique(np.frombuffer(mha_c._core.sample((index,)), index.dtype)).size > 60


def test_sample_of_a_vector_is_spread_over_it():
    """Its second half is made of other numbers than its first."""
    assert np.unique(np.frombuffer(mha_c._core.sample((np.arange(2304),)), np.arange(1).dtype)).size > 60


def test_sample_of_something_else():
    for wrong in ([], None, np.zeros(3), ("a",), (None,), (np.array(["a"]),), (np.array([None]),)):
        with pytest.raises(TypeError, match="sample expected"):
            mha_c._core.sample(wrong)
    assert mha_c._core.sample(()) == b""


def parameters(separate=False):
    """The parameters of an attention function by the names of the state dict."""
    shapes = {"in_proj_weight": (24, 8), "in_proj_bias": (24,), "out_proj.weight": (8, 8), "out_proj.bias": (8,)}
    tensors = {name: torch.from_numpy(normal(shape)) for name, shape in shapes.items()}
    if separate:
        whole = tensors.pop("in_proj_weight")
        tensors |= zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), whole.clone().chunk(3))
    return tensors


def test_what_is_packed():
    tensors = parameters()
    found = PackedParameters().get(tensors, 8, 2)
    for name, tensor in tensors.items():
        assert np.array_equal(found.arrays[name], tensor), name
    separate = PackedParameters().get(parameters(separate=True), 8, 2)  # although the widths are the same
    for name, array in found.arrays.items():
        assert np.array_equal(separate.arrays[name], array), name


def test_a_bias_made_for_each_call():
    """As CLIP's attention pooling and fairseq put them together from three; the weights are packed once."""
    tensors, packed = parameters(), PackedParameters()
    found = packed.get(tensors, 8, 2)
    for _ in range(3):
        assert packed.get({**tensors, "in_proj_bias": tensors["in_proj_bias"].clone()}, 8, 2) is found
    for other in (tensors["in_proj_bias"] + 1, tensors["in_proj_bias"].double(), tensors["in_proj_bias"][:8]):
        assert packed.get({**tensors, "in_proj_bias": other}, 8, 2) is not found
    changed = tensors["in_proj_bias"].clone()
    changed[5] += 1
    assert packed.get({**tensors, "in_proj_bias": changed}, 8, 2).arrays["in_proj_bias"][5] == changed[5]


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias"])
def test_memory_that_is_freed_is_not_read(name, monkeypatch):
    """share_memory_() gives a tensor another memory, and frees what it had."""
    tensors, packed = parameters(), PackedParameters()
    packed.get(tensors, 8, 2)
    kept, given = packed._kept, dict(tensors)
    given["in_proj_bias"] = tensors["in_proj_bias"].clone()
    assert kept.is_of(given, kept.arguments)
    tensors[name].share_memory_()
    monkeypatch.setattr(mha_c._core, "sample", lambda arrays: pytest.fail("memory was read"))
    assert not kept.is_of(given, kept.arguments)


def test_dropped_while_they_are_packed(monkeypatch):
    """By another thread: what is packed at that moment may have the numbers from before."""
    tensors, packed = parameters(), PackedParameters()
    original = mha_c._core.sample
    with monkeypatch.context() as patched:
        patched.setattr(mha_c._core, "sample", lambda arrays: packed.drop() or original(arrays))
        first = packed.get(tensors, 8, 2)
    assert packed.get(tensors, 8, 2) is not first


def test_another_tensor_in_the_same_memory():
    """It counts its changes by itself, and may have come to the same number."""
    tensors, packed = parameters(), PackedParameters()
    weight = tensors["in_proj_weight"].add_(0)
    packed.get(tensors, 8, 2)
    other = weight.data.add_(1)
    assert other._version == weight._version == 1 and other.data_ptr() == weight.data_ptr()
    source = packed._kept.sources["in_proj_weight"]
    assert source.is_now(weight) and not source.is_now(other)
    weight.data = weight.data.view(torch.int32)
    assert not source.is_now(weight)


def test_what_cannot_be_packed():
    tensors = parameters()
    tracked = dict(tensors)
    for change in ({"in_proj_weight": tensors["in_proj_weight"].half()}, {"out_proj.bias": torch.zeros(9)},
                   {"out_proj.bias": torch.zeros(8).double()}, {"in_proj_weight": torch.zeros(24, 8, device="meta")},
                   {"in_proj_weight": tensors["in_proj_weight"].to_sparse()}, {"bias_k": torch.zeros(1, 1, 8)},
                   {"in_proj_weight": None}, {"out_proj.weight": torch.zeros(8)}):
        assert PackedParameters().get({**tensors, **change}, 8, 2) is None, change
    for arguments in ((8, 3), (0, 1), (9, 3), (8, 2, 5), (8, "2")):
        assert PackedParameters().get(tensors, *arguments) is None, arguments
    with torch.inference_mode():
        assert PackedParameters().get({name: tensor.clone() for name, tensor in tracked.items()}, 8, 2) is None


def test_functions_find_their_parameters_again():
    store = PackedByWeight()
    sets = [parameters() for _ in range(3)]
    found = [store.of(tensors["out_proj.weight"]).get(tensors, 8, 2) for tensors in sets]
    assert len(set(map(id, found))) == 3
    for tensors, one in zip(sets, found, strict=True):
        assert store.of(tensors["out_proj.weight"]).get(tensors, 8, 2) is one


def test_nothing_is_kept_of_tensors_that_are_gone():
    store, gone = PackedByWeight(), []
    for _ in range(5):
        tensors = parameters()
        store.of(tensors["out_proj.weight"]).get(tensors, 8, 2)
        gone.append(weakref.ref(tensors["in_proj_weight"]))
    assert [one() is None for one in gone] == [True] * 4 + [False]  # the last one until another comes
