# SPDX-License-Identifier: Apache-2.0
"""bfloat16 through DLPack, which NumPy cannot read: torch's tensors, and capsules made by hand, right and wrong ones."""

import contextlib
import ctypes
import gc
import sys

import mha_c
import numpy as np
import pytest
from helpers import normal, run_child
from mha_c.functional import scaled_dot_product_attention as sdpa

ml_dtypes = pytest.importorskip("ml_dtypes")
bfloat16 = ml_dtypes.bfloat16

X = normal((3, 5, 8)).astype(bfloat16)
WANTED = sdpa(X, X, X)
CPU, GPU = 1, 2
BFLOAT, FLOAT8 = 4, 10

# ------------------------------------------------------------------------------------------- capsules made by hand

api = ctypes.pythonapi
api.PyCapsule_New.restype = ctypes.py_object
api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
api.PyCapsule_IsValid.argtypes = [ctypes.py_object, ctypes.c_char_p]
api.PyCapsule_GetPointer.restype = ctypes.c_void_p


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("number", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("byte_offset", ctypes.c_uint64)]


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Unversioned(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]
    name, used = b"dltensor", b"used_dltensor"


class Versioned(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
                ("deleter", Deleter), ("flags", ctypes.c_uint64), ("tensor", Tensor)]
    name, used = b"dltensor_versioned", b"used_dltensor_versioned"


def numbers(values):
    return None if values is None else (ctypes.c_int64 * len(values))(*values)


class Producer:
    """Exposes an array by one capsule of DLPack alone, and counts what is deleted. `changes` make it lie."""

    def __init__(self, array, kind, name=None, deleter=True, **changes):
        self.array, self.deleted, self.keywords = array, 0, []
        strides = [stride // 2 for stride in array.strides]
        self.shape, self.strides = (numbers(changes.pop(key, given)) for key, given in (
            ("shape", array.shape), ("strides", strides)))
        self.deleter = Deleter(self.delete) if deleter else Deleter()
        self.held = kind(deleter=self.deleter, **({"major": changes.pop("major", 1), "flags": changes.pop("flags", 0)}
                                                  if kind is Versioned else {}))
        fields = {"data": array.ctypes.data, "device": CPU, "ndim": array.ndim, "code": BFLOAT, "bits": 16, "lanes": 1}
        for field, value in {**fields, **changes}.items():
            setattr(self.held.tensor, field, value)
        for field in "shape", "strides":
            if getattr(self, field) is not None:
                setattr(self.held.tensor, field, ctypes.cast(getattr(self, field), ctypes.POINTER(ctypes.c_int64)))
        self.name = kind.name if name is None else name  # which lives as long as the capsule
        self.capsule = api.PyCapsule_New(ctypes.addressof(self.held), self.name, None)

    def delete(self, address):
        assert address == ctypes.addressof(self.held)
        self.deleted += 1

    def __dlpack__(self, **keywords):
        self.keywords.append(keywords)
        return self.capsule

    def __dlpack_device__(self):
        return CPU, 0

    def references(self):
        """Of the capsule: one is held here, and one is that of the question."""
        return sys.getrefcount(self.capsule)


KINDS = pytest.mark.parametrize("kind", [Unversioned, Versioned])


@KINDS
def test_a_capsule_is_used_once_and_deleted_when_the_array_dies(kind):
    producer = Producer(X, kind)
    assert np.array_equal(sdpa(producer, X, X), WANTED)
    assert producer.deleted == 1 and api.PyCapsule_IsValid(producer.capsule, kind.used)
    assert producer.keywords[-1] == {"max_version": (1, 0)} and producer.references() == 2
    with pytest.raises(Exception):  # noqa: B017, PT011
        sdpa(producer, X, X)
    assert producer.deleted == 1


@KINDS
def test_the_memory_is_read_in_place(kind):
    """Strides of all signs, none for a C-contiguous array, an offset in bytes, a mask, a deleter that is not there."""
    strided = np.repeat(X, 2, 1)[:, ::-2]
    wanted = sdpa(np.ascontiguousarray(strided), X, X)
    assert np.array_equal(sdpa(Producer(strided, kind), X, X), wanted)
    assert np.array_equal(sdpa(Producer(X, kind, strides=None), X, X), WANTED)
    assert np.array_equal(sdpa(X, Producer(X, kind, data=X.ctypes.data - 6, byte_offset=6), X), WANTED)
    assert np.array_equal(sdpa(X, X, Producer(X, kind, deleter=False)), WANTED)
    mask = normal((5, 5)).astype(bfloat16)
    assert np.array_equal(sdpa(X, X, X, Producer(mask, kind)), sdpa(X, X, X, mask))
    empty = X[:, :0]
    assert sdpa(Producer(empty, kind, data=None), X, X).shape == (3, 0, 8)


def test_producers_of_old():
    """They know no keywords."""
    class Old(Producer):
        def __dlpack__(self):
            return self.capsule

    assert np.array_equal(sdpa(Old(X, Unversioned), X, X), WANTED)


NOT_READ = {
    "on a GPU": {"device": GPU}, "of float8": {"code": FLOAT8, "bits": 8}, "of 32 bits": {"bits": 32}, "of lanes": {"lanes": 2},
    "of another name": {"name": b"tensor"}, "without a name": {"name": b""}, "used": {"name": b"used_dltensor"},
}  # fmt: skip
MALFORMED = {
    "without a shape": {"shape": None}, "of -1 axes": {"ndim": -1}, "of many axes": {"ndim": 2**31 - 1},
    "of 1000 axes": {"ndim": 1000}, "of -3 rows": {"shape": (3, -3, 8)}, "without memory": {"data": None},
    "of wide strides": {"strides": (2**62, 8, 1)},
}  # fmt: skip


@KINDS
@pytest.mark.parametrize("lie", NOT_READ)
def test_what_is_not_read_is_numpys_error(kind, lie):
    """What NumPy says of it, whose capsule is left to its producer."""
    producer = Producer(X, kind, **NOT_READ[lie])
    with pytest.raises(Exception) as expected:  # noqa: B017, PT011
        np.from_dlpack(producer)
    with pytest.raises(type(expected.value)) as raised:
        sdpa(producer, X, X)
    assert str(expected.value) in str(raised.value) and producer.deleted == 0
    assert producer.references() == 2


def test_another_major_version_is_not_read():
    producer = Producer(X, Versioned, major=2)
    with pytest.raises((BufferError, RuntimeError)):
        sdpa(producer, X, X)
    assert producer.deleted == 0


@KINDS
@pytest.mark.parametrize("lie", MALFORMED)
def test_what_describes_no_array(kind, lie):
    producer = Producer(X, kind, **MALFORMED[lie])
    with pytest.raises(BufferError, match="query has a DLPack capsule that does not describe an array"):
        sdpa(producer, X, X)
    assert producer.deleted == 1


@KINDS
def test_more_than_all_memory(kind):
    producer = Producer(X, kind, shape=(2**31, 2**31, 8))
    with pytest.raises(ValueError):  # noqa: PT011
        sdpa(producer, X, X)
    assert producer.deleted == 1


@pytest.mark.parametrize("value", [None, 3, "capsule", X, object()], ids=lambda value: type(value).__name__)
def test_what_is_not_a_capsule(value):
    producer = Producer(X, Versioned)
    producer.capsule = value
    with pytest.raises((BufferError, RuntimeError, TypeError, ValueError)):
        sdpa(producer, X, X)


@pytest.mark.parametrize("error", [ValueError, TypeError, AttributeError, MemoryError, KeyboardInterrupt, SystemExit])
def test_exceptions_of_a_producer(error):
    """What NumPy says of an array stays, unless the producer's exception is not about arrays."""
    class Raising:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("not for NumPy")

        def __dlpack__(self, **_):
            raise error("from the producer")

    about_arrays = issubclass(error, (ValueError, TypeError, AttributeError))
    with pytest.raises(TypeError if about_arrays else error, match="not for NumPy" if about_arrays else "the producer"):
        sdpa(Raising(), X, X)


def test_numpy_has_the_first_word():
    """A tensor whose numbers are not what its memory holds says so to NumPy, and not to DLPack."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(X.view(np.int16)).view(torch.bfloat16)
    with pytest.raises(RuntimeError, match="negative bit"):
        sdpa(x._neg_view(), x, x)


# ------------------------------------------------------------------------------------------- torch


def test_tensors_are_taken_wherever_float32_is():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(X.view(np.int16)).view(torch.bfloat16)
    mask, padding = normal((5, 5)).astype(bfloat16), np.zeros((3, 5), bfloat16)
    theirs = [torch.from_numpy(one.view(np.int16)).view(torch.bfloat16) for one in (mask, padding)]
    layer = mha_c.MultiheadAttention(8, 2, dtype="bfloat16", batch_first=True, seed=1).eval()
    encoder, decoder = (make(8, 2, 16, batch_first=True, dtype="bfloat16", seed=1).eval()
                        for make in (mha_c.TransformerEncoderLayer, mha_c.TransformerDecoderLayer))
    norm = mha_c.RMSNorm(8, dtype="bfloat16")
    for call in (
            lambda x, mask, padding: layer(x, x, x, attn_mask=mask, key_padding_mask=padding)[0],
            lambda x, mask, padding: layer(x[:, ::2], x[:, 1:], x[:, 1:])[0],
            lambda x, mask, padding: encoder(x, mask),
            lambda x, mask, padding: decoder(x, x, memory_key_padding_mask=padding),
            lambda x, mask, padding: encoder.linear1(x),
            lambda x, mask, padding: norm(x),
            lambda x, mask, padding: sdpa(x, x, x, mask)):
        got, wanted = call(x, *theirs), call(X, mask, padding)
        assert got.dtype == bfloat16 and np.array_equal(got, wanted)


def test_tensors_that_are_refused_as_in_float32():
    """With the same exceptions. For bfloat16 there may be advice before torch's words."""
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 5, 8)
    for make in (lambda x: x.requires_grad_(), lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: x[0, 0]):
        errors = []
        for dtype in torch.float32, torch.bfloat16:
            with pytest.raises((RuntimeError, TypeError)) as raised:
                sdpa(*[make(x.detach().to(dtype))] * 3)
            errors.append((type(raised.value), str(raised.value)))
        assert errors[0][0] is errors[1][0] and errors[0][1] in errors[1][1]


def test_references():
    """Of the memory, the tensor, the dtype, on success and on each kind of error."""
    torch = pytest.importorskip("torch")
    memory = X.view(np.int16).copy()
    x = torch.from_numpy(memory).view(torch.bfloat16)
    held = [memory, x, np.dtype(bfloat16), bfloat16, np.ndarray]
    errors = (BufferError, RuntimeError, TypeError)

    def repeat(times):
        for _ in range(times):
            for wrong in (x, x[..., :3], torch.zeros(3, 5, 8), x.to(torch.float8_e5m2), Producer(X, Unversioned, shape=None),
                          Producer(X, Versioned, bits=32)):
                with contextlib.suppress(*errors):
                    sdpa(x, x, wrong)
        return counts()

    def counts():
        gc.collect()
        return [sys.getrefcount(one) for one in held]

    before, after = repeat(3), repeat(100)
    assert all(abs(new - old) < 20 for old, new in zip(before, after, strict=True)), (before, after)
    del x, held[1]
    assert counts()[0] == before[0] - 1  # no tensor and no capsule is left


def test_without_ml_dtypes():
    """The core names the extra; models of torch are left to torch, with the reason."""
    pytest.importorskip("torch")
    run_child("""
        import sys
        sys.modules["ml_dtypes"] = None
        import torch
        from mha_c.functional import scaled_dot_product_attention
        from mha_c.torch import attention, coverage, replace_layers
        x = torch.randn(5, 3, 8).bfloat16()
        try:
            scaled_dot_product_attention(x, x, x)
        except ImportError as error:
            assert 'pip install "mha-c[bfloat16]"' in str(error), error
        else:
            raise AssertionError
        for dtype, reason in (torch.bfloat16, "bfloat16 without ml_dtypes"), (torch.float16, ""):
            model = replace_layers(torch.nn.TransformerEncoderLayer(8, 2, 16).eval().to(dtype))
            x = x.to(dtype)
            with torch.no_grad(), attention() as found:
                assert model(x).dtype == torch.nn.functional.scaled_dot_product_attention(x, x, x).dtype == dtype
            assert {row.reason for row in (*coverage(model).rows, *found.rows)} == {reason}
    """)
