# SPDX-License-Identifier: Apache-2.0
"""The dtypes of layers: float32 and float64, and the halves bfloat16 and float16, which are computed as float32."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["DTYPES", "DTYPE_NAMES", "bfloat16_dtype", "computed_in", "float_dtype", "is_half"]

DTYPES = ("float32", "float64", "bfloat16", "float16")
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
    return np.dtype(ml_dtypes.bfloat16)


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
    except TypeError:
        found = None
    if found is not None and found.name in DTYPES and found.isnative:
        return found
    if found is not None and found.kind in "iub":
        raise RuntimeError(
            "Only Tensors of floating point and complex dtype can require gradients: "
            f"dtype must be {DTYPE_NAMES}, but got {dtype!r}"
        )
    raise TypeError(f"dtype must be {DTYPE_NAMES}, in which mha_c computes, but got {dtype!r}")
