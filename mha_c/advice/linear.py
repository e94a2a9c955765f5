# SPDX-License-Identifier: Apache-2.0
"""Calls of a linear map that are refused: torch's words, what does not fit, and what to write instead."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from mha_c.advice.arguments import Advice, Argument, add_advice, advice_on_objects

__all__ = ["advise_on_linear"]


def advise_on_linear(error: Exception, input: Any, weight: Any, other_dtypes: Collection[str] = ()) -> None:
    """Add to the words with which a call was refused what does not fit, and what to write.

    Parameters
    ----------
    error : Exception
        What the call raised.
    input : array
        As it was passed.
    weight : numpy.ndarray
        The layer's.
    other_dtypes : collection of str, default ()
        The dtypes to which the layer may be cast.

    Examples
    --------
    >>> import numpy as np
    >>> error = RuntimeError("mat1 and mat2 shapes cannot be multiplied (5x6 and 8x2)")
    >>> advise_on_linear(error, np.zeros((5, 6), np.float32), np.zeros((2, 8), np.float32))
    >>> str(error)
    'mat1 and mat2 shapes cannot be multiplied (5x6 and 8x2). input has 6 features, but in_features is 8.'
    """

    def advice() -> Iterator[Advice]:
        yield from advice_on_objects(weight.dtype.name, input=input)
        given = Argument.of("input", input)
        in_features = weight.shape[1]
        if not given.shape or given.shape[-1] != in_features:
            found = f"input has {given.shape[-1]} features" if given.shape else "input has no axes"
            yield Advice(f"{found}, but in_features is {in_features}")
            return
        dtype = weight.dtype.name
        if given.dtype == dtype:
            return
        found = f"input is {given.dtype}, but this layer is {dtype}"
        if given.has_numbers:
            found += f": pass {given.cast(dtype)}"
        if given.dtype in other_dtypes:
            found += f', or make the layer {given.dtype} with layer.to("{given.dtype}")'
        yield Advice(found, leads=True)

    add_advice(error, advice())
