# SPDX-License-Identifier: Apache-2.0
"""Weights as int8 numbers with a scale for each row, and what a layer multiplies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ATTENTION",
    "MAPS",
    "PRODUCTS",
    "PRODUCTS_OF_ATTENTION",
    "MatmulPrecision",
    "Precision",
    "Quantized",
    "Weight",
    "check_quantized",
    "dequantize",
    "multiplied",
    "own_products",
    "precision_of_products",
    "precision_of_weights",
    "quantize",
    "quantized",
    "shortest",
    "take_rows",
]

Precision: TypeAlias = Literal["float32", "bfloat16", "int8"]
MatmulPrecision: TypeAlias = Precision | Mapping[str, Precision | None]

#: Advice for values that `matmul_precision` does not take.
_INSTEAD: Final = {
    **dict.fromkeys(("bf16", "bfloat16"), 'write "bfloat16"'),  # the second as a dtype, rather than as its name
    **dict.fromkeys(("float16", "fp16", "half"), 'dtype="float16" makes a layer of float16'),
    **dict.fromkeys(("float32", "fp32"), 'write "float32"'),
}

#: The name of attention's own two products in `matmul_precision`. They read no weights, so they cannot be int8.
ATTENTION: Final = "attention"

#: All names there that a layer of attention knows, in the order in which it computes the products.
PRODUCTS_OF_ATTENTION: Final = ("in_proj", ATTENTION, "out_proj")

#: Those of a layer of a Transformer.
PRODUCTS: Final = (*PRODUCTS_OF_ATTENTION, "linear1", "linear2")

#: Those of linear maps.
MAPS: Final = tuple(name for name in PRODUCTS if name != ATTENTION)

_LARGEST: Final = 127
_MIN_LARGEST: Final = np.float32(2.0**-120)  # so that 127 / it is a normal number of float32


class Quantized(NamedTuple):
    """A weight as int8 numbers: row i of it is ``numbers[i] * scales[i]``.

    Attributes
    ----------
    numbers : numpy.ndarray of int8
        (features, depth), from -127 to 127.
    scales : numpy.ndarray of float32
        (features,).

    Examples
    --------
    >>> Quantized(np.array([[127, -64]], np.int8), np.array([0.5], np.float32)).shape
    (1, 2)
    """

    numbers: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.numbers.shape

    @property
    def nbytes(self) -> int:
        """The size of numbers and scales in bytes."""
        return self.numbers.nbytes + self.scales.nbytes


Weight: TypeAlias = NDArray[Any] | Quantized


def quantize(weight: NDArray[Any]) -> Quantized:
    """The nearest multiples of each row's scale, which is the 127th part of the row's largest number.

    Parameters
    ----------
    weight : numpy.ndarray
        (features, depth), of float32, bfloat16 or float16.

    Returns
    -------
    Quantized
        All steps are in float32. A tie is rounded to the even number. A row whose numbers are all below 2^-120 becomes
        zeros with a scale of 0. A row with NaN or infinity becomes zeros with a scale of NaN, so that its products are
        NaN.

    Notes
    -----
    Symmetric quantization by rows: "Integer Quantization for Deep Learning Inference" (Wu et al., 2020), sections 3.1
    and 3.2.

    Examples
    --------
    >>> quantize(np.array([[1.0, -0.25], [0.0, 0.0]], np.float32))
    Quantized(numbers=array([[127, -32],
           [  0,   0]], dtype=int8), scales=array([0.00787402, 0.        ], dtype=float32))
    """
    rows = weight.astype(np.float32, copy=False)
    largest = np.abs(rows).max(axis=1, initial=0)
    is_finite = np.isfinite(largest)
    is_scaled = is_finite & (largest >= _MIN_LARGEST)
    safe = np.where(is_scaled, largest, np.float32(1))
    with np.errstate(all="ignore"):
        numbers = rows * (_LARGEST / safe)[:, None]
    numbers[~is_scaled] = 0
    np.rint(numbers, out=numbers)
    scales = np.where(is_scaled, safe / _LARGEST, np.where(is_finite, np.float32(0), np.float32(np.nan)))
    return Quantized(numbers.astype(np.int8), scales)


def quantized(weight: Weight) -> Quantized:
    """The same weight as int8 numbers, if it is not held as such."""
    return weight if isinstance(weight, Quantized) else quantize(weight)


def multiplied(weight: Weight, precision: Precision | None) -> Any:
    """A weight as the core takes it, to be multiplied in this precision.

    Parameters
    ----------
    weight : numpy.ndarray or Quantized
        The weight, quantized only for "int8".
    precision : {"float32", "bfloat16", "int8"} or None
        As for `matmul_precision`.

    Returns
    -------
    numpy.ndarray, or tuple of two
        The array; or int8 numbers and scales; or the array and "bfloat16" or "float32".

    Examples
    --------
    >>> multiplied(np.eye(1, dtype=np.float32), "bfloat16")
    (array([[1.]], dtype=float32), 'bfloat16')
    """
    if precision == "int8":
        return quantized(weight)
    return weight if precision is None else (weight, precision)


def dequantize(weight: Quantized, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The numbers that a quantized weight stands for.

    Parameters
    ----------
    weight : Quantized
        The weight.
    dtype : numpy.dtype
        What they are rounded to from float32.

    Returns
    -------
    numpy.ndarray
        (features, depth), read-only.

    Examples
    --------
    >>> dequantize(Quantized(np.array([[127, -64]], np.int8), np.array([0.5], np.float32)), np.dtype("float32"))
    array([[ 63.5, -32. ]], dtype=float32)
    """
    with np.errstate(all="ignore"):
        array = (weight.numbers * weight.scales[:, None]).astype(dtype, copy=False)
    array.flags.writeable = False
    return array


def check_quantized(name: str, weight: Quantized) -> None:
    """Refuse what `quantize` does not make of finite numbers.

    Parameters
    ----------
    name : str
        The name of the weight, for the error.
    weight : Quantized
        The weight.

    Raises
    ------
    TypeError
        If the dtypes are others.
    ValueError
        If there is not one scale for each row, a number is -128, or a scale is negative, infinite or NaN.

    Examples
    --------
    >>> check_quantized("weight", Quantized(np.zeros((1, 2), np.int8), np.array([-1], np.float32)))
    Traceback (most recent call last):
    ValueError: a scale of weight is negative, infinite or NaN
    """
    if weight.numbers.dtype != np.int8 or weight.scales.dtype != np.float32:
        raise TypeError(f"{name} should be int8 numbers with scales of float32")
    if weight.scales.shape != weight.shape[:1]:
        raise ValueError(f"{name} has {weight.scales.shape} scales for numbers of the shape {weight.shape}")
    if not (np.isfinite(weight.scales) & (weight.scales >= 0)).all():
        raise ValueError(f"a scale of {name} is negative, infinite or NaN")
    if weight.numbers.min(initial=0) < -_LARGEST:
        raise ValueError(f"{name} holds -128, but int8 numbers of a weight lie between -127 and 127")


def take_rows(weight: Any, rows: Any) -> Any:
    """Some rows of a weight or of a bias.

    Parameters
    ----------
    weight : numpy.ndarray or Quantized
        The weight.
    rows : slice or numpy.ndarray of int
        Which rows.

    Returns
    -------
    numpy.ndarray or Quantized
        As `weight`.

    Examples
    --------
    >>> take_rows(quantize(np.eye(3, dtype=np.float32)), slice(1, 3)).shape
    (2, 3)
    """
    return Quantized(weight.numbers[rows], weight.scales[rows]) if isinstance(weight, Quantized) else weight[rows]


# ---------------------------------------------------------------------------------------------- matmul_precision


def own_products(dtype: np.dtype[Any]) -> str:
    """What a layer of this dtype multiplies unless `matmul_precision` says otherwise.

    Examples
    --------
    >>> own_products(np.dtype("float16"))
    'float32'
    """
    return "float32" if dtype == np.float16 else dtype.name


def precision_of_products(value: Any, products: Sequence[str]) -> dict[str, Precision | None]:
    """What `matmul_precision` says of each linear map, and of attention itself.

    Parameters
    ----------
    value : str or mapping of str to str, or None
        The argument.
    products : sequence of str
        The names that the layer has.

    Returns
    -------
    dict of str to str or None
        In the order of `products`.

    Raises
    ------
    ValueError
        If `value` has another form, or a name or a value in it is unknown.

    Examples
    --------
    >>> precision_of_products({"default": "int8", "out_proj": None}, ("in_proj", "attention", "out_proj"))
    {'in_proj': 'int8', 'attention': 'bfloat16', 'out_proj': None}
    """
    chosen = value if isinstance(value, Mapping) else {"default": value}
    known = [*(name for name in products if name != "default"), "default"]
    for name, precision in chosen.items():
        if name not in known:
            raise ValueError(f"matmul_precision has {name!r}, but this layer knows the names {', '.join(known)}")
        if _checked(precision, f'["{name}"]' if chosen is value else "") == "int8" and name == ATTENTION:
            raise ValueError(
                'matmul_precision has "int8" for attention, which has no weights: its products of queries and keys, '
                'and of probabilities and values, can be None, "float32" or "bfloat16"'
            )
    default = chosen.get("default")
    of_attention = "bfloat16" if default == "int8" else default
    return {name: chosen.get(name, of_attention if name == ATTENTION else default) for name in products}


def _checked(value: Any, place: str) -> Precision | None:
    """What `matmul_precision`, or an entry of it, can be."""
    if value is None or isinstance(value, str) and value in get_args(Precision):
        return value  # type: ignore[return-value]
    name = str(value).removeprefix("torch.")
    cure = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
    known = '"bfloat16" or "int8"' if place else '"bfloat16", "int8", or a mapping of names to these'
    raise ValueError(f'matmul_precision{place} must be None, "float32", {known}, but got {value!r}{cure}')


def precision_of_weights(value: Any, products: Mapping[str, Sequence[str]]) -> dict[str, Precision]:
    """What `matmul_precision` says of the weights, and of attention, except where that is None.

    Parameters
    ----------
    value : str or mapping of str to str, or None
        The argument.
    products : mapping of str to sequence of str
        The linear maps of the layer, and the parameters that are their weights; "attention" stands for itself.

    Returns
    -------
    dict of str to str
        By the names of parameters, and "attention".

    Raises
    ------
    ValueError
        As `precision_of_products`.

    Examples
    --------
    >>> precision_of_weights({"out_proj": "int8"}, {"in_proj": ["in_proj_weight"], "out_proj": ["out_proj.weight"]})
    {'out_proj.weight': 'int8'}
    """
    chosen = precision_of_products(value, list(products))
    return {weight: found for name, weights in products.items() if (found := chosen[name]) for weight in weights}


def shortest(chosen: Mapping[str, Precision | None]) -> MatmulPrecision | None:
    """The shortest `matmul_precision` that says this of each name.

    Examples
    --------
    >>> shortest({"in_proj": "int8", "attention": "bfloat16"}), shortest({"in_proj": "int8", "attention": None})
    ('int8', {'in_proj': 'int8', 'attention': None})
    """
    for value in (None, *get_args(Precision)):
        if precision_of_products(value, list(chosen)) == chosen:
            return value  # type: ignore[no-any-return]
    return dict(chosen)
