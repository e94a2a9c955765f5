# SPDX-License-Identifier: Apache-2.0
"""Calls of a linear map that are refused: torch's words, what does not fit, and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from mha_c.advice.arguments import DTYPES, Advice, Argument, add_advice

__all__ = ["advise_on_linear"]

# What torch calls the dtypes.
_TORCH_NAMES: Final = {"float32": "Float", "float64": "Double", "float16": "Half", "int64": "Long", "int32": "Int"}


def advise_on_linear(input: Any, weight: Any) -> Exception:
    """The error for an input that does not fit, in torch's words, with what to write.

    Parameters
    ----------
    input : array
        As it was passed.
    weight : numpy.ndarray
        The layer's.

    Returns
    -------
    Exception
        To be raised.

    Examples
    --------
    >>> import numpy as np
    >>> advise_on_linear(np.zeros((5, 6), np.float32), np.zeros((2, 8), np.float32))
    RuntimeError('mat1 and mat2 shapes cannot be multiplied (5x6 and 8x2). input has 6 features, but in_features is 8.')
    """
    given = Argument.of("input", input)
    out_features, in_features = weight.shape
    if not given.shape:
        error = RuntimeError("both arguments to linear need to be at least 1D, but they are 0D and 2D")
    elif given.shape[-1] == in_features:
        names = (_TORCH_NAMES.get(dtype, dtype.capitalize()) for dtype in (given.dtype, weight.dtype.name))
        error = RuntimeError("mat1 and mat2 must have the same dtype, but got {} and {}".format(*names))
    else:
        rows = math.prod(given.shape[:-1])
        error = RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({rows}x{given.shape[-1]} and {in_features}x{out_features})"
        )

    def advice() -> Iterator[Advice]:
        if not given.shape or given.shape[-1] != in_features:
            found = f"input has {given.shape[-1]} features" if given.shape else "input has no axes"
            yield Advice(f"{found}, but in_features is {in_features}")
            return
        dtype = weight.dtype.name
        found = f"input is {given.dtype}, but this layer is {dtype}"
        if given.has_numbers:
            found += f": pass {given.cast(dtype)}"
        if given.dtype in DTYPES:
            found += f', or make the layer {given.dtype} with layer.to("{given.dtype}")'
        yield Advice(found, leads=True)

    add_advice(error, advice())
    return error
