# SPDX-License-Identifier: Apache-2.0
"""Arrays of more than 2**31 numbers, most of which are pages that nobody ever wrote to and that take no memory."""

import mmap
import sys

import numpy as np
import pytest
from helpers import layer

mha_c = pytest.importorskip("mha_c")
functional = pytest.importorskip("mha_c.functional")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not taken before it is written to")

ROWS = 2**27 + 3  # of 16 numbers


@pytest.fixture(scope="module")
def keys():
    """(ROWS, 16) zeros, but for the last row."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, ROWS * 16 * 4, flags=flags)
    array = np.frombuffer(memory, "f4").reshape(ROWS, 16)
    array[-1] = 1
    return array


def test_a_result_beyond_the_address_space():
    """Inputs that repeat one number are small however long they are; what would come out of them is not."""
    module = layer(2, 1, out_dim=64)
    x = np.broadcast_to(np.float32(1), (2**28, 2**28, 2))
    with pytest.raises(MemoryError, match="address space"):
        module(x, x[:5], x[:5])
    query, value = np.broadcast_to(np.ones((3, 2), "f4"), (2**28, 2**28, 3, 2)), np.ones((5, 64), "f4")
    with pytest.raises(MemoryError, match="address space"):
        functional.scaled_dot_product_attention(query, value[:, :2], value)


def test_the_last_of_many_keys_large(keys):
    """It outweighs all others together: score 16 * 3 against their 0."""
    query = np.full((1, 16), 3, "f4")
    got = functional.scaled_dot_product_attention(query, keys, keys, scale=1.0)
    others = (ROWS - 1) * np.exp(-48.0)
    np.testing.assert_allclose(got, 1 / (1 + others), rtol=1e-6)


def test_the_first_and_the_last_of_many_queries(keys):
    """Queries that far apart in one array."""
    ends = np.lib.stride_tricks.as_strided(keys, (2, 16), ((ROWS - 1) * 64, 4))
    key = np.eye(16, dtype="f4") * 8
    got = functional.scaled_dot_product_attention(ends, key, key)
    np.testing.assert_array_equal(got, functional.scaled_dot_product_attention(np.array(ends), key, key))
    module = layer(16, 2)
    np.testing.assert_array_equal(module(ends, key, key)[0], module(np.array(ends), key, key)[0])
    backwards = ends[::-1]
    np.testing.assert_array_equal(module(key, backwards, ends)[0], module(key, np.array(backwards), np.array(ends))[0])


def test_segments_of_keys_beyond_the_address_space():
    """The sums of few queries over very many keys: their number exceeds 64 bits."""
    module = layer(640, 16, kdim=16, vdim=16)
    query = np.broadcast_to(np.zeros((1, 1, 640), np.float32), (8192, 1, 640))
    key = np.broadcast_to(np.zeros((1, 1, 16), np.float32), (2**56, 1, 16))
    with pytest.raises(MemoryError, match="the sizes of these arrays exceed the address space"):
        module(query, key, key, need_weights=False)
