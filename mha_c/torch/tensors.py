# SPDX-License-Identifier: Apache-2.0
"""Tensors as arrays and arrays as tensors, over the same memory. Imported through mha_c.torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mha_c.parameters.dtypes import bfloat16_dtype

__all__ = ["array_of", "tensor_of"]


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The numbers of a tensor, in place.

    Parameters
    ----------
    tensor : torch.Tensor
        The tensor. Its gradient is left aside.

    Returns
    -------
    numpy.ndarray
        Of the same dtype.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        If NumPy cannot read the tensor.
    ImportError
        If it is of bfloat16, and ml_dtypes is not installed.

    Examples
    --------
    >>> array_of(torch.ones(2, dtype=torch.bfloat16))
    array([1, 1], dtype=bfloat16)
    """
    array: NDArray[Any]
    tensor = tensor.detach() if tensor.requires_grad else tensor
    if tensor.dtype != torch.bfloat16:
        array = tensor.numpy()
    else:  # NumPy itself has no bfloat16, and torch does not know that of ml_dtypes
        array = tensor.view(torch.int16).numpy().view(bfloat16_dtype())
    return array


def tensor_of(array: NDArray[Any]) -> torch.Tensor:
    """A tensor over the memory of an array.

    Parameters
    ----------
    array : numpy.ndarray
        The array, of a dtype that torch has.

    Returns
    -------
    torch.Tensor
        Of the same dtype.

    Examples
    --------
    >>> tensor_of(array_of(torch.ones(2, dtype=torch.bfloat16)))
    tensor([1., 1.], dtype=torch.bfloat16)
    """
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
