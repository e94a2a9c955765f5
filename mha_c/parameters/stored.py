# SPDX-License-Identifier: Apache-2.0
"""Arrays that stay in their file until NumPy asks for them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mha_c.parameters.dtypes import bfloat16_from_bits

__all__ = [
    "Bits",
    "Opaque",
    "StoredArray",
    "damage_is_value_error",
    "file_size",
    "item_size",
    "number_count",
    "read_array",
]

Bits: TypeAlias = tuple[NDArray[Any], str]

# Formats that NumPy lacks, by their names in torch and ml_dtypes, with the integers that hold their bits.
_BITS: Final = {"bfloat16": np.uint16} | dict.fromkeys(
    ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), np.uint8
)
_NUMPY: Final = frozenset(
    ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    + ("float16", "float32", "float64", "complex64", "complex128")
)

_MAX_AXES: Final = 64  # NumPy's own limit


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
    array([1], dtype=bfloat16)
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

    def read(self, will_cast: bool = False) -> NDArray[Any]:
        """The array, of the dtype in the file; float32 for float8.

        Parameters
        ----------
        will_cast : bool, default False
            Whether the caller casts the numbers. Without ml_dtypes, those of bfloat16 are then float32.

        Returns
        -------
        numpy.ndarray

        Raises
        ------
        ValueError
            If the file is damaged, or there are no real numbers.
        ImportError
            If ml_dtypes is needed and not installed.
        """
        array, name = self.bits()
        if name == "bfloat16":
            return bfloat16_from_bits(array, will_cast)
        if name in _BITS:
            return _widened(array, name)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"expected real numbers, but {self._path} holds {name}")
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.read() if dtype is None else self.read(will_cast=True).astype(dtype)


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

    def bits(self) -> Bits:
        """Refuse.

        Returns
        -------
        tuple of numpy.ndarray and str
            Never.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(f"expected an array, but {self._path} holds {self.name}, which mha_c does not read")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.bits()[0]


def _widened(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """float32 numbers from the bits of float8."""
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


def number_count(shape: Sequence[int]) -> int:
    """The numbers in an array of a shape that a file claims.

    Parameters
    ----------
    shape : sequence of int
        The shape.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If no array has such a shape.

    Examples
    --------
    >>> number_count([2, 3])
    6
    """
    _check_sizes(shape)
    return math.prod(shape)


def _check_sizes(sizes: Sequence[int]) -> None:
    """Refuse what nobody should compute with, nor print: too many, too large, negative, or something else."""
    if len(sizes) > _MAX_AXES or any(type(size) is not int or not 0 <= size < 2**63 for size in sizes):
        raise ValueError("an array has an impossible shape")


def file_size(file: BufferedReader) -> int:
    """The bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read_array(
    file: BufferedReader,
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
    count = number_count(shape)
    if strides is None:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    _check_sizes([offset, *strides])
    if len(strides) != len(shape):
        raise ValueError("an array has not as many strides as axes")
    stored = np.dtype(_BITS.get(dtype, dtype)).newbyteorder(byteorder)
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides)) if count else 0
    begin = start + offset * stored.itemsize
    if begin + span * stored.itemsize > min(stop, file_size(file)):
        raise ValueError(f"an array of {dtype} and of the shape {tuple(shape)} goes beyond what is stored for it")
    if count > file_size(file):
        raise ValueError(f"an array of the shape {tuple(shape)} repeats the few numbers stored for it")
    content = np.empty(span * stored.itemsize, np.uint8)
    file.seek(begin)
    if file.readinto(content.data) != content.nbytes:
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
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot read {path}, which is damaged or of another kind: {reason}") from error
