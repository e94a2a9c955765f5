# SPDX-License-Identifier: Apache-2.0
"""Calls of layer_norm and rms_norm that are refused: what does not fit, and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mha_c.advice.arguments import Advice, Argument, add_advice, advice_on_objects
from mha_c.parameters.dtypes import DTYPES, DTYPE_NAMES

__all__ = ["advise_on_norm"]


def advise_on_norm(
    error: Exception,
    input: Any,
    normalized_shape: Any,
    weight: Any,
    bias: Any,
    *,
    name: str = "input",
    is_layer: bool = False,
) -> None:
    """Add to the words with which a call was refused what does not fit, in NumPy's words, and what to write.

    Parameters
    ----------
    error : Exception
        What the call raised.
    input, normalized_shape, weight, bias
        As they were passed, or those of the layer.
    name : str, default "input"
        What the caller calls `input`.
    is_layer : bool, default False
        Whether it was a layer that was called, rather than a function.

    Examples
    --------
    >>> import numpy as np
    >>> error = RuntimeError("expected input with shape [*, 8], but got input of size[8, 2]")
    >>> advise_on_norm(error, np.zeros((8, 2), np.float32), (8,), None, None)
    >>> str(error).partition("size[8, 2]. ")[2]
    'input has the shape (8, 2), but its last axis must be 8: if axis 0 is meant, pass np.moveaxis(input, 0, -1).'
    """

    if type(error) is TypeError and str(error).startswith("input "):  # in the core's own words, not torch's
        error.args = (re.sub(r"\binput\b", name, str(error)),)

    def advice() -> Iterator[Advice]:
        parameters = [Argument.of(*item) for item in (("weight", weight), ("bias", bias)) if item[1] is not None]
        dtypes = {one.dtype for one in parameters}
        if isinstance(normalized_shape, int):
            yield Advice(f"Pass normalized_shape=({normalized_shape},)")
        if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
            return
        dtype = dtypes.pop() if dtypes else DTYPES[0]
        yield from advice_on_objects(dtype, **{name: input})
        shape = tuple(normalized_shape)
        if any(one.shape != shape for one in parameters):  # torch's words tell enough
            return
        given = Argument.of(name, input)
        yield from _advice_on_shape(given, shape)
        yield from _advice_on_dtype(given, dtype, is_layer, bool(parameters))

    add_advice(error, advice())


def _advice_on_shape(given: Argument, shape: tuple[int, ...]) -> Iterator[Advice]:
    if not shape or given.shape[-len(shape) :] == shape:
        return
    advice = f"{given.name} has the shape {given.shape}, but its last axes must be {shape}"
    if len(shape) == 1:
        advice = f"{given.name} has the shape {given.shape}, but its last axis must be {shape[0]}"
        if given.shape.count(shape[0]) == 1:
            axis = given.shape.index(shape[0])
            advice += f": if axis {axis} is meant, pass np.moveaxis({given.name}, {axis}, -1)"
    yield Advice(advice)


def _advice_on_dtype(given: Argument, dtype: str, is_layer: bool, has_parameters: bool) -> Iterator[Advice]:
    if given.dtype == dtype or not has_parameters and given.dtype in DTYPES:
        return
    found = f"{given.name} is {given.dtype}, but it must be {DTYPE_NAMES}"
    if has_parameters:
        found = f"{given.name} is {given.dtype}, but {'this layer is' if is_layer else 'the parameters are'} {dtype}"
    if not given.has_numbers:
        yield Advice(found, leads=True)
        return
    cure = f"pass {given.cast(dtype)}"
    if is_layer and given.dtype in DTYPES:
        cure += f', or make the layer {given.dtype} with layer.to("{given.dtype}")'
    yield Advice(f"{found}: {cure}", leads=True)
