# SPDX-License-Identifier: Apache-2.0
"""Arrays that stay in their file until NumPy asks for them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bits", "Opaque", "StoredArray", "damage_is_value_error", "file_size", "item_size", "read_array"]

Bits: TypeAlias = tuple[NDArray[Any], str]

# Formats that NumPy lacks, by their names in torch and ml_dtypes, with the integers that hold their bits.
_BITS: Final = {"bfloat16": np.uint16} | dict.fromkeys(
    ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), np.uint8
)
_NUMPY: Final = frozenset(
    ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    + ("float16", "float32", "float64", "complex64", "complex128")
)


class StoredArray:
    """An array in a file, read each time NumPy asks for it.

    Parameters
    ----------
    path : str
        The file, for the errors.
    read : callable
        Gives the array and the name of its number format; unsigned integers with its bits where NumPy lacks the format.

    Examples
    --------
    >>> np.asarray(StoredArray("model.pt", lambda: (np.array([0x3F80], np.uint16), "bfloat16")))
    array([1.], dtype=float32)
    """

    __slots__ = ("_path", "_read")

    def __init__(self, path: str, read: Callable[[], Bits]) -> None:
        self._path = path
        self._read = read

    def bits(self) -> Bits:
        """What `read` gives.

        Returns
        -------
        tuple of numpy.ndarray and str

        Raises
        ------
        ValueError
            If the file is damaged.
        """
        with damage_is_value_error(self._path):
            return self._read()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array, name = self.bits()
        if name in _BITS:
            array = _widened(array, name)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"expected real numbers, but {self._path} holds {name}")
        return array if dtype is None else array.astype(dtype)


class Opaque:
    """Something in a file that is not read: it is no array, or only code could restore it.

    Parameters
    ----------
    path : str
        The file, for the errors.
    name : str
        What it is: "an object of " a class or a function; for the class or the function itself, its name.
    """

    __slots__ = ("_path", "name")

    def __init__(self, path: str, name: str) -> None:
        self._path = path
        self.name = name

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        raise ValueError(f"expected an array, but {self._path} holds {self.name}, which is not read")


def _widened(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """float32 numbers from the bits of narrower ones."""
    if dtype == "bfloat16":  # the upper half of a float32
        return (bits.astype(np.uint32) << 16).view(np.float32)
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise ImportError(f"numbers in {dtype} need `pip install ml_dtypes`") from error
    widened: NDArray[Any] = bits.view(getattr(ml_dtypes, dtype)).astype(np.float32)
    return widened


def item_size(dtype: str) -> int | None:
    """The bytes of a number, or None for a format that is not known.

    Parameters
    ----------
    dtype : str
        The name of the format.

    Returns
    -------
    int or None

    Examples
    --------
    >>> item_size("bfloat16"), item_size("float64"), item_size("qint8")
    (2, 8, None)
    """
    known = dtype in _NUMPY or dtype in _BITS
    return np.dtype(_BITS.get(dtype, dtype)).itemsize if known else None


def file_size(file: BinaryIO) -> int:
    """The bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read_array(
    file: BinaryIO,
    start: int,
    stop: int,
    dtype: str,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
    offset: int = 0,
    byteorder: Literal["<", ">"] = "<",
) -> Bits:
    """Read an array that lies in a part of a file. What it claims of itself costs no memory before it is checked.

    Parameters
    ----------
    file : binary file
        The file.
    start, stop : int
        Where the part begins and ends, in bytes.
    dtype : str
        A format that `item_size` knows.
    shape : sequence of int
        The array's shape.
    strides : sequence of int, optional
        From one index to the next along each axis, in numbers. None: the last axis varies fastest.
    offset : int, default 0
        The first number's place in the part, in numbers.
    byteorder : {"<", ">"}
        Of the numbers in the file.

    Returns
    -------
    numpy.ndarray
        The array, in native byte order; unsigned integers with its bits where NumPy lacks the format.
    str
        `dtype`.

    Raises
    ------
    ValueError
        If the array does not lie within the part and the file, or is larger than the file: it repeats numbers.
    """
    if strides is None:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if len(shape) != len(strides) or min(offset, *shape, *strides, 0) < 0:
        raise ValueError(f"no array has the shape {shape}, the strides {strides} and the offset {offset}")
    stored = np.dtype(_BITS.get(dtype, dtype)).newbyteorder(byteorder)
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides)) if math.prod(shape) else 0
    begin = start + offset * stored.itemsize
    if begin + span * stored.itemsize > min(stop, file_size(file)):
        raise ValueError(f"an array of {dtype} and of the shape {tuple(shape)} goes beyond what is stored for it")
    if math.prod(shape) > file_size(file):
        raise ValueError(f"an array of the shape {tuple(shape)} repeats the few numbers stored for it")
    content = np.empty(span * stored.itemsize, np.uint8)
    file.seek(begin)
    if file.readinto(content.data) != content.nbytes:  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        raise ValueError("the file has become shorter")
    numbers = content.view(stored).astype(stored.newbyteorder("="), copy=False)
    return np.ndarray(shape, numbers.dtype, numbers, 0, [stride * stored.itemsize for stride in strides]), dtype


@contextmanager
def damage_is_value_error(path: str) -> Iterator[None]:
    """Make whatever a reader raises a ValueError that names the file; each parser has exceptions of its own.

    Parameters
    ----------
    path : str
        The file.

    Yields
    ------
    None

    Raises
    ------
    ValueError
        In place of any other exception.
    FileNotFoundError
        As it was raised.

    Examples
    --------
    >>> with damage_is_value_error("model.npz"):
    ...     raise KeyError("weight")
    Traceback (most recent call last):
    ValueError: cannot read model.npz, which is damaged or of another kind: 'weight'
    """
    try:
        yield
    except FileNotFoundError:  # that an index names
        raise
    except Exception as error:
        raise ValueError(f"cannot read {path}, which is damaged or of another kind: {error}") from error
