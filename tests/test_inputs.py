# SPDX-License-Identifier: Apache-2.0
"""What may be passed as an input, in which memory, and that nothing passed is ever modified; out=."""

import array
import ctypes
import mmap
import pickle

import mha_c
import numpy as np
import pytest
from helpers import assert_matches, inputs, layer, normal


class Interface:
    """An array behind one protocol alone."""

    def __init__(self, source, *protocols):
        self.source = source
        for protocol in protocols:
            setattr(self, protocol, getattr(source, protocol))


class DLPack:
    """An array that can be had by DLPack alone."""

    def __init__(self, source):
        self.source = source

    def __dlpack__(self, **options):
        return self.source.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.source.__dlpack_device__()


class ArrayMethod:
    """An object that makes an array of itself on demand, as a pandas frame does."""

    def __init__(self, source):
        self.source = source

    def __array__(self, dtype=None, copy=None):
        return self.source


def as_memoryview(x):
    """The bytes of x as a buffer that knows its shape, made by the standard library alone."""
    if x.dtype == bool:
        return memoryview(x.tobytes()).cast("?", x.shape)
    numbers = array.array("f" if x.dtype == np.float32 else "d", x.ravel().tolist())
    return memoryview(numbers).cast("B").cast(numbers.typecode, x.shape)


def as_ctypes(x):
    return np.ctypeslib.as_ctypes(x.copy())


def as_torch(x):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(x.copy())


class Subclass(np.ndarray):
    """Changes what indexing and arithmetic mean, as np.matrix does; the numbers in memory are what counts."""

    def __getitem__(self, index):
        raise NotImplementedError

    def __mul__(self, other):
        raise NotImplementedError


PROVIDERS = {
    "array interface": lambda x: Interface(x, "__array_interface__"),
    "array struct": lambda x: Interface(x, "__array_struct__"),
    "array method": ArrayMethod,
    "DLPack": DLPack,
    "memoryview": as_memoryview,
    "memoryview of an array": memoryview,
    "ctypes": as_ctypes,
    "torch tensor": as_torch,
    "subclass": lambda x: x.view(Subclass),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_protocol(provider, dtype):
    """One and the same result from whatever exposes the numbers; a plain array comes back."""
    module = layer(8, 2, dtype=dtype)
    given = inputs(2, 3, 5, 8, batch_first=False, dtype=dtype)
    want = module(*given)
    got = module(*[PROVIDERS[provider](x) for x in given])
    for a, b in zip(got, want):
        assert type(a) is np.ndarray
        np.testing.assert_array_equal(a, b)
    shared = PROVIDERS[provider](given[0])
    np.testing.assert_array_equal(module(shared, shared, shared)[0], module(given[0], given[0], given[0])[0])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", ["bool", "float32"])
def test_every_protocol_for_masks(provider, dtype):
    module = layer(8, 2)
    given = inputs(2, 3, 5, 8, batch_first=False)
    masks = {"attn_mask": normal((3, 5)) > 1, "key_padding_mask": normal((2, 5)) > 1}
    if dtype == "float32":
        masks = {name: np.where(mask, -np.inf, 0).astype(dtype) for name, mask in masks.items()}
    got = module(*given, **{name: PROVIDERS[provider](mask) for name, mask in masks.items()})
    np.testing.assert_array_equal(got[0], module(*given, **masks)[0])


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_matrix_and_memmap(tmp_path):
    """np.matrix is always 2-D, hence unbatched; a memmap is read where it lies."""
    module = layer(8, 2)
    x = normal((5, 8))
    matrix = np.asmatrix(x)
    np.testing.assert_array_equal(module(matrix, matrix, matrix)[0], module(x, x, x)[0])
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(5, 3, 8))
    mapped[:] = normal((5, 3, 8))
    mapped.flush()
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=(5, 3, 8))
    got = module(mapped, mapped, mapped)
    assert type(got[0]) is np.ndarray
    np.testing.assert_array_equal(got[0], module(*[np.array(mapped)] * 3)[0])


def test_torch_tensors():
    """A tensor goes in as it is, transposed or not; one that requires grad is torch's own RuntimeError."""
    torch = pytest.importorskip("torch")
    module = layer(8, 2)
    x = torch.from_numpy(normal((8, 2, 5))).permute(2, 1, 0)
    assert not x.is_contiguous()
    np.testing.assert_array_equal(module(x, x, x)[0], module(x.numpy(), x.numpy(), x.numpy())[0])
    mask = torch.zeros(5, 5, dtype=torch.bool)
    module(x, x, x, attn_mask=mask, key_padding_mask=torch.zeros(2, 5))
    learning = torch.zeros(5, 2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="requires grad"):
        module(learning, learning, learning)
    with pytest.raises(RuntimeError, match="requires grad"):
        module(x, x, x, attn_mask=torch.zeros(5, 5, requires_grad=True))


released = pickle.PickleBuffer(b"abcd" * 8)  # NumPy makes an array of one object of it
released.release()

WRONG = {
    "a list": [[1.0] * 8] * 5, "a tuple": ((1.0,) * 8,) * 5, "a float": 1.0, "text": "abc", "bytes": b"abcd" * 8,
    "an object": object(), "a dict": {}, "a generator": (x for x in ()), "a scalar": np.float32(1),
    "a class": np.ndarray, "a buffer that was released": released,
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("where", range(3))
def test_what_is_no_array(name, where):
    """Lists would have to be converted number by number: a TypeError that names the argument and the type."""
    module = layer(8, 2)
    given = list(inputs(None, 5, 5, 8))
    given[where] = WRONG[name]
    with pytest.raises(TypeError, match=("query", "key", "value")[where]):
        module(*given)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_masks_that_are_no_array(name):
    given = inputs(None, 5, 5, 8)
    for wrong in (*WRONG.values(), [[False] * 5] * 5):
        with pytest.raises(TypeError, match=name):
            layer(8, 2)(*given, **{name: wrong})


def test_none_is_no_input():
    """A forgotten input."""
    with pytest.raises((TypeError, AttributeError)):
        layer(8, 2)(*inputs(None, 5, 5, 8)[:2], None)


@pytest.mark.parametrize("bad", ["text", "object", "record", "date"])
def test_arrays_of_no_numbers(bad):
    given = list(inputs(None, 5, 5, 8))
    arrays = {"text": np.full((5, 8), "a"), "object": np.full((5, 8), None), "record": np.zeros((5, 8), "f4,f4"),
              "date": np.zeros((5, 8), "M8[s]")}
    for where in range(3):
        wrong = list(given)
        wrong[where] = arrays[bad]
        with pytest.raises((TypeError, RuntimeError)):
            layer(8, 2)(*wrong)
    for name in ("attn_mask", "key_padding_mask"):
        mask = arrays[bad][:, :5] if name == "attn_mask" else arrays[bad][0, :5]
        with pytest.raises((TypeError, AssertionError)):
            layer(8, 2)(*given, **{name: mask})


def test_an_exception_of_a_protocol_comes_through():
    """What an object raises while it is asked for its array is not swallowed."""
    class Angry:
        @property
        def __array_interface__(self):
            raise ZeroDivisionError

        def __array__(self, dtype=None, copy=None):
            raise ZeroDivisionError

    x = normal((5, 8))
    for given in ((Angry(), x, x), (x, Angry(), x), (x, x, Angry())):
        with pytest.raises(ZeroDivisionError):
            layer(8, 2)(*given)


# ------------------------------------------------------------------------------------------- memory layouts


def spread(x, *steps):
    """x as every step-th element of a larger array, whose other elements are NaN; negative steps run backwards."""
    large = np.full([n * abs(step) + 1 for n, step in zip(x.shape, steps)], np.nan, x.dtype)
    view = large[tuple(slice(1, None, abs(step)) if abs(step) > 1 else slice(0, n)
                       for n, step in zip(x.shape, steps))][tuple(slice(0, n) for n in x.shape)]
    view = view[tuple(slice(None, None, -1 if step < 0 else 1) for step in steps)]
    view[...] = x
    return view


def misaligned(x, offset=1):
    raw = np.zeros(x.nbytes + offset, np.uint8)[offset:]
    view = raw.view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


LAYOUTS = {
    "Fortran order": np.asfortranarray,
    "transposed": lambda x: np.ascontiguousarray(x.transpose(1, 2, 0)).transpose(2, 0, 1),
    "every other": lambda x: spread(x, 2, 3, 2),
    "reversed": lambda x: spread(x, -1, -1, -1),
    "reversed features": lambda x: spread(x, 1, 1, -2),
    "reversed rows": lambda x: spread(x, -2, 1, 1),
    "misaligned by 1": misaligned,
    "misaligned by 2": lambda x: misaligned(x, 2),
    "odd strides": lambda x: np.ndarray(x.shape, x.dtype, bytearray(x.shape[0] * x.shape[1] * (x.shape[2] * 8 + 3)),
                                        0, (x.shape[1] * (x.shape[2] * 8 + 3), x.shape[2] * 8 + 3, x.itemsize)),
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "little-endian": lambda x: x.astype(x.dtype.newbyteorder("<")),
    "byte-swapped, reversed": lambda x: spread(x.astype(x.dtype.newbyteorder()), -1, 2, -2),
    "record field": lambda x: _field(x),
}


def _field(x):
    records = np.zeros(x.shape, [("flag", "u1"), ("x", x.dtype)])
    records["x"] = x
    return records["x"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name, batch_first, dtype):
    """The same bits from the same numbers, wherever they stand; separately in each input, in all, and shared."""
    module = layer(16, 2, batch_first=batch_first, dtype=dtype)
    plain = inputs(3, 5, 5, 16, batch_first=batch_first, dtype=dtype)
    want = module(*plain)
    others = []
    for x in plain:
        other = LAYOUTS[name](x)
        if name == "odd strides":
            other[...] = x
        np.testing.assert_array_equal(other, x)
        others.append(other)
    for pick in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        got = module(*[others[i] if other else plain[i] for i, other in enumerate(pick)])
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(module(*[others[0]] * 3)[0], module(*[plain[0]] * 3)[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_broadcast_inputs(dtype):
    """Inputs whose strides are zero: one item for a whole batch, one row for a whole sequence, one number for all."""
    module = layer(16, 2, batch_first=True, dtype=dtype)
    query = normal((3, 5, 16), dtype)
    for small in (normal((1, 70, 16), dtype), normal((3, 1, 16), dtype), normal((1, 1, 16), dtype),
                  normal((1, 1, 1), dtype)):
        wide = np.broadcast_to(small, (3, 70, 16))
        np.testing.assert_array_equal(module(query, wide, wide)[0], module(query, *[np.array(wide)] * 2)[0])


def test_inputs_at_the_edge_of_memory():
    """Inputs that end where readable memory ends, in memory that cannot be written: no byte beyond is touched."""
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    page = mmap.PAGESIZE

    def at_the_edge(x):
        size = -(-max(x.nbytes, 1) // page) * page
        pages = mmap.mmap(-1, size + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        view = np.frombuffer(pages, x.dtype, x.size, size - x.nbytes).reshape(x.shape)
        view.setflags(write=True)
        view[...] = x
        assert mprotect(ctypes.c_void_p(address), size, mmap.PROT_READ) == 0
        assert mprotect(ctypes.c_void_p(address + size), page, 0) == 0
        mapped.append((pages, address, size + page))
        return view

    mapped = []
    try:
        for dtype, e, h in (("float32", 16, 2), ("float32", 33, 3), ("float64", 13, 1)):
            module = layer(e, h, batch_first=True, dtype=dtype)
            for length, s in ((1, 1), (5, 7), (67, 131)):
                plain = inputs(2, length, s, e, dtype=dtype)
                masks = {"attn_mask": normal((length, s), dtype), "key_padding_mask": normal((2, s)) > 1}
                masks["key_padding_mask"][:, 0] = False
                want = module(*plain, **masks)
                got = module(*map(at_the_edge, plain), **{name: at_the_edge(m) for name, m in masks.items()})
                np.testing.assert_array_equal(got[0], want[0])
                np.testing.assert_array_equal(got[1], want[1])
    finally:
        for _, address, size in mapped:  # the garbage collector may look at these pages again
            mprotect(ctypes.c_void_p(address), size, mmap.PROT_READ | mmap.PROT_WRITE)


def test_nothing_passed_is_modified():
    """Every byte of inputs and masks is the same afterwards, also between their elements."""
    for options in ({}, {"dropout": 0.5, "training": True}, {"add_zero_attn": True}):
        module = layer(16, 2, batch_first=True, **options)
        bases = [normal((3, 90, 40), seed=i) for i in range(3)]
        given = [b[:, 3:73, 5:37:2] for b in bases]
        masks = {"attn_mask": normal((70, 70)), "key_padding_mask": normal((3, 70)) > 1}
        held = [*bases, *masks.values()]
        before = [x.tobytes() for x in held]
        flags = [x.flags.num for x in held]
        parameters = {name: p.tobytes() for name, p in module.state_dict().items()}
        for weights in ({}, {"need_weights": False}, {"average_attn_weights": False}):
            module(*given, **masks, **weights)
            module(given[0], given[0], given[0], is_causal=True, **weights)
        assert [x.tobytes() for x in held] == before
        assert [x.flags.num for x in held] == flags
        assert {name: p.tobytes() for name, p in module.state_dict().items()} == parameters


# ------------------------------------------------------------------------------------------- out=


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["plain", *LAYOUTS])
def test_out_in_every_layout(name, batch_first, dtype):
    """The result lands in the array given, which is what the call returns; nothing beside it changes."""
    module = layer(16, 2, batch_first=batch_first, dtype=dtype)
    given = inputs(3, 5, 7, 16, batch_first=batch_first, dtype=dtype)
    want = module(*given)
    shape = want[0].shape
    out = np.zeros(shape, dtype) if name == "plain" else LAYOUTS[name](np.zeros(shape, dtype))
    base = out
    while isinstance(base.base, np.ndarray):
        base = base.base
    around = np.ones(base.shape, bool) if base.dtype == out.dtype else None
    got = module(*given, out=out)
    assert got[0] is out
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(got[1], want[1])
    if around is not None and name in ("every other", "reversed features", "reversed rows"):
        inside = np.isin(np.arange(base.size), _elements(out, base)).reshape(base.shape)
        assert np.isnan(base[~inside]).all(), "something beside out was written"


def _elements(view, base):
    """Which elements of the contiguous `base` the view shows."""
    start = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    offsets = sum(np.arange(n).reshape([-1 if i == axis else 1 for i in range(view.ndim)]) * stride
                  for axis, (n, stride) in enumerate(zip(view.shape, view.strides)))
    return ((start + offsets) // view.itemsize).ravel()


def test_out_unbatched_and_empty():
    module = layer(8, 2)
    for n, length, s in ((None, 4, 5), (2, 0, 5), (0, 4, 5), (2, 4, 0)):
        given = inputs(n, length, s, 8, batch_first=False)
        out = np.full(given[0].shape, 7, "float32")
        got = module(*given, out=out)
        assert got[0] is out
        assert_matches(module, got, *given)


@pytest.mark.parametrize("same", [False, True])
def test_out_overlapping_an_input(same):
    """An output that lies over an input, wholly or in part, is what it would be elsewhere."""
    module = layer(16, 2, batch_first=True)
    for need_weights in (False, True):
        want = module(*inputs(3, 9, 9, 16, same=same), need_weights=need_weights)
        for where in range(3):
            given = inputs(3, 9, 9, 16, same=same)
            got = module(*given, out=given[where], need_weights=need_weights)
            assert got[0] is given[where]
            np.testing.assert_array_equal(got[0], want[0])
            given = [x.copy() for x in inputs(3, 9, 9, 16, same=same)]
            room = np.zeros((4, 9, 16), "float32")
            room[:3] = given[where]
            given[where] = room[:3]
            np.testing.assert_array_equal(module(*given, out=room[1:], need_weights=need_weights)[0], want[0])
            room[:3] = inputs(3, 9, 9, 16, same=same)[where]
            np.testing.assert_array_equal(module(*given, out=room[2::-1], need_weights=need_weights)[0], want[0])


def test_out_that_begins_where_an_input_ends():
    """One number in common is enough: the last items of a large batch are read after the first ones are written."""
    module = layer(16, 2, batch_first=True)
    x = normal((100, 9, 16))
    want = module(x, x, x, need_weights=False)[0]
    room = np.zeros(2 * x.size - 1, "float32")
    given, out = room[:x.size].reshape(x.shape), room[x.size - 1:].reshape(x.shape)
    given[...] = x
    np.testing.assert_array_equal(module(given, given, given, need_weights=False, out=out)[0], want)


def test_out_overlapping_a_mask():
    module = layer(16, 2, batch_first=True)
    given = inputs(1, 16, 16, 16)
    mask = normal((16, 16))
    want = module(*given, attn_mask=mask)
    got = module(*given, attn_mask=mask, out=mask[None])
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(mask, want[0][0])


def test_wrong_out():
    """Not an array or not of the output's dtype: TypeError; another shape, or read-only: ValueError."""
    module = layer(8, 2, batch_first=True)
    given = inputs(2, 3, 5, 8)
    read_only = np.zeros((2, 3, 8), "float32")
    read_only.setflags(write=False)
    cases = [([[0.0]], TypeError), ("out", TypeError), (memoryview(bytearray(192)), TypeError), (3, TypeError),
             (np.zeros((2, 3, 8), "float64"), TypeError), (np.zeros((2, 3, 8), "int32"), TypeError),
             (np.zeros((3, 2, 8), "float32"), ValueError), (np.zeros((2, 3, 7), "float32"), ValueError),
             (np.zeros((1, 2, 3, 8), "float32"), ValueError), (np.zeros(48, "float32"), ValueError),
             (np.zeros((), "float32"), ValueError), (read_only, ValueError)]
    for out, exception in cases:
        with pytest.raises(exception, match="out"):
            module(*given, out=out)
    np.testing.assert_array_equal(read_only, 0)
    with pytest.raises(TypeError, match="out must be of dtype float64, not float32"):
        layer(8, 2, batch_first=True, dtype="float64")(*inputs(2, 3, 5, 8, dtype="float64"), out=given[0].copy())


@pytest.mark.parametrize("moved", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_inputs_that_differ_in_one_stride(moved):
    """Views that begin at one address, and whose shapes are alike, are one input only if all strides are."""
    module = layer(32, 4, batch_first=True)
    x = normal((32, 32, 32))
    plain = x[:3, :20]
    for other in (np.broadcast_to(x[:1, :20], plain.shape), np.broadcast_to(x[:3, :1], plain.shape),
                  x.swapaxes(1, 2)[:3, :20], np.broadcast_to(x[:3, :20, :1], plain.shape)):
        assert other.ctypes.data == plain.ctypes.data and other.shape == plain.shape
        given = [other if i in moved else plain for i in range(3)]
        want = module(*[one.copy() for one in given])
        for got, expected in zip(module(*given), want):
            np.testing.assert_array_equal(got, expected)


def test_a_query_that_is_the_beginning_of_its_keys():
    """One address and the same strides, and by its padding as many live keys as queries, but other rows."""
    module = layer(32, 4, batch_first=True)
    x = normal((1, 10, 32))
    query, padding = x[:, :5], np.arange(10)[None] < 5
    got = module(query, x, x, key_padding_mask=padding)
    for a, b in zip(got, module(query.copy(), x.copy(), x.copy(), key_padding_mask=padding)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("batch_first", [False, True])
def test_items_that_take_different_paths(batch_first):
    """Items with far more keys than queries go first, the others after them. Each gets what it gets by itself."""
    module = layer(64, 4, batch_first=batch_first)
    query, key = normal((5, 2, 64)), normal((5, 900, 64), seed=1)
    hidden = np.zeros((5, 900), bool)
    hidden[1::2, 3:] = True  # so that these items have few keys, too
    given = (query, key, key) if batch_first else (query.swapaxes(0, 1), *[key.swapaxes(0, 1)] * 2)
    paths = mha_c.explain(module, *given, key_padding_mask=hidden, stages=[]).paths
    assert paths == ("few queries", "ordinary") * 2 + ("few queries",)
    output, weights = module(*given, key_padding_mask=hidden)
    for n in range(5):
        one = [x[n] for x in (query, key, key)]
        alone = module(*one, key_padding_mask=hidden[n])
        np.testing.assert_array_equal(output[n] if batch_first else output[:, n], alone[0])
        np.testing.assert_array_equal(weights[n], alone[1])
