# SPDX-License-Identifier: Apache-2.0
"""The dtypes of layers: float32 and float64, and the halves bfloat16 and float16, of 16 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "bfloat16_dtype",
    "bfloat16_from_bits",
    "computed_in",
    "float_dtype",
    "is_half",
    "is_real",
    "joined",
    "trained_dtype",
]

DTYPES = ("float32", "float64", "bfloat16", "float16")
_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
DTYPE_NAMES = f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}"


def bfloat16_dtype() -> np.dtype[Any]:
    """The dtype of bfloat16 arrays.

    Returns
    -------
    numpy.dtype

    Raises
    ------
    ImportError
        If ml_dtypes is not installed.

    Examples
    --------
    >>> bfloat16_dtype()
    dtype(bfloat16)
    """
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise ImportError('bfloat16 arrays need `pip install "mha-c[bfloat16]"`, which installs ml_dtypes') from error
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def bfloat16_from_bits(bits: NDArray[Any], will_cast: bool = False) -> NDArray[Any]:
    """Numbers in bfloat16.

    Parameters
    ----------
    bits : numpy.ndarray of uint16
        Their bits.
    will_cast : bool, default False
        Whether the caller casts the numbers. Without ml_dtypes, they are then float32, with the same values.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    ImportError
        If ml_dtypes is not installed, unless `will_cast`.

    Examples
    --------
    >>> bfloat16_from_bits(np.array([0x3F80, 0xC000], np.uint16))
    array([1, -2], dtype=bfloat16)
    """
    try:
        return bits.view(bfloat16_dtype())
    except ImportError:
        if not will_cast:
            raise
    widened: NDArray[Any] = (bits.astype(np.uint32) << 16).view(np.float32)  # bfloat16 is the upper half of float32
    return widened


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this dtype can be parameters: integers, floats, and those of ml_dtypes.

    Parameters
    ----------
    dtype : numpy.dtype
        The dtype of an array.

    Returns
    -------
    bool

    Examples
    --------
    >>> [is_real(np.dtype(name)) for name in ("int8", "bfloat16", "complex64", "V2")]
    [True, True, False, False]
    """
    return dtype.kind in "biuf" or (dtype.kind == "V" and dtype.isbuiltin == 2)  # 2: of another package


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether numbers have 16 bits.

    Parameters
    ----------
    dtype : numpy.dtype
        The dtype of a layer or of an array.

    Returns
    -------
    bool

    Examples
    --------
    >>> is_half(np.dtype("float16")), is_half(np.dtype("float32"))
    (True, False)
    """
    return dtype.name in ("bfloat16", "float16")


def computed_in(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which a layer computes: float32 for halves.

    Parameters
    ----------
    dtype : numpy.dtype
        The dtype of the layer.

    Returns
    -------
    numpy.dtype

    Examples
    --------
    >>> computed_in(np.dtype("float16"))
    dtype('float32')
    """
    return np.dtype(np.float32) if is_half(dtype) else dtype


def float_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of a layer from a name, a NumPy dtype or, without importing torch, a torch dtype.

    Parameters
    ----------
    dtype : str, numpy.dtype or torch.dtype, or None
        float32, float64, bfloat16 or float16. None: float32.

    Returns
    -------
    numpy.dtype

    Raises
    ------
    TypeError
        If it is another dtype.
    RuntimeError
        If it is a dtype of integers or of bool, as in torch.
    ImportError
        If it is bfloat16, and ml_dtypes is not installed.

    Examples
    --------
    >>> float_dtype("float16")
    dtype('float16')
    """
    if dtype is None:
        return np.dtype(np.float32)
    name = str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype
    if isinstance(name, str) and name == "bfloat16":
        return bfloat16_dtype()
    try:
        found = np.dtype(name)
    except (SyntaxError, TypeError, ValueError):  # the first of a text such as ","
        found = None
    if found is not None and found.name in DTYPES and found.isnative:
        return found
    if found is not None and found.kind in "iub":
        cure = '. For products of int8, use matmul_precision="int8"' if found == np.int8 else ""
        raise RuntimeError(
            "Only Tensors of floating point and complex dtype can require gradients: "
            f"dtype must be {DTYPE_NAMES}, but got {dtype!r}{cure}"
        )
    cure = f': write "{_SHORT_NAMES[name]}"' if isinstance(name, str) and name in _SHORT_NAMES else ""
    raise TypeError(f"dtype must be {DTYPE_NAMES}, in which mha_c computes, but got {dtype!r}{cure}")


def joined(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Arrays one after the other. Beside another dtype, halves become float32: the two have no common dtype in NumPy.

    Parameters
    ----------
    arrays : iterable of numpy.ndarray
        Their shapes differ in the first axis at most.

    Returns
    -------
    numpy.ndarray

    Examples
    --------
    >>> joined([np.ones(1, "bfloat16"), np.ones(1, "float16")])
    array([1., 1.], dtype=float32)
    """
    arrays = list(arrays)
    if len({array.dtype for array in arrays}) > 1:
        arrays = [array.astype(computed_in(array.dtype), copy=False) for array in arrays]
    return np.concatenate(arrays)


def trained_dtype(stored: np.dtype[Any], dtype: Any) -> np.dtype[Any]:
    """The dtype of a layer that is made from trained parameters.

    Parameters
    ----------
    stored : numpy.dtype
        That of the weight that decides.
    dtype : str, numpy.dtype or torch.dtype, or None
        What the caller asks for. None: `stored`, or float32 if no layer has that dtype, such as one of integers.

    Returns
    -------
    numpy.dtype
        In native byte order.

    Raises
    ------
    TypeError, RuntimeError, ImportError
        As `float_dtype`.

    Examples
    --------
    >>> trained_dtype(np.dtype("float16"), None), trained_dtype(np.dtype("int8"), None)
    (dtype('float16'), dtype('float32'))
    """
    if dtype is None and stored.name in DTYPES:
        return float_dtype(stored.name)
    return float_dtype(dtype)
