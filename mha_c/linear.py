# SPDX-License-Identifier: Apache-2.0
"""A linear map of rows of features: torch's Linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from mha_c import _core
from mha_c._typing import Self
from mha_c.advice.arguments import REFUSALS
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.advice.linear import advise_on_linear
from mha_c.module import (
    Module,
    Parameter,
    PrecisionOfProducts,
    check_device,
    check_memory,
    check_torch_module,
    dtypes_for,
)
from mha_c.parameters.arrays import AnyArray, Array, as_array
from mha_c.parameters.checks import flag, size
from mha_c.parameters.dtypes import float_dtype, trained_dtype
from mha_c.parameters.initialization import initial_linear
from mha_c.parameters.quantization import MAPS, Precision, Weight, precision_of_weights
from mha_c.parameters.sets import ArraySet
from mha_c.parameters.state_dict import check_description, match_saved_arrays

__all__ = ["Linear"]

# What a file says of a layer beside its parameters.
_DESCRIPTION: Final[dict[str, type | tuple[type, ...]]] = {
    "in_features": int,
    "out_features": int,
    "bias": bool,
    "dtype": str,
}


class _Parameters(ArraySet):
    """The weight and the bias, also packed for the kernels."""

    __slots__ = ("packed",)

    def __init__(self, arrays: Mapping[str, Weight], dtype: np.dtype[Any], *precisions: Any) -> None:
        super().__init__(arrays, dtype, *precisions)
        self.packed = _core.Linear(dtype, self.for_core("weight"), self.array("bias"))


def _products(name: str = "") -> dict[str, tuple[str, ...]]:
    """The one map, by its name in the layer around it if `matmul_precision` knows that name, or else as any other."""
    return {name if name in MAPS else "default": ("weight",)}


class Linear(Module):
    """A linear map of features, as ``torch.nn.Linear`` computes it.

    Every row x of the input becomes::

        y = x Wᵀ + b

    Parameters
    ----------
    in_features : int
        Features of the input.
    out_features : int
        Features of the output.
    bias : bool, default True
        Whether the layer adds a bias.
    device : optional
        None or "cpu".
    dtype : optional
        float32 (the default), float64, bfloat16 or float16, as a name, a NumPy or a torch dtype.
    seed : int, optional
        Seed of the parameters: they are those of torch's layer after ``torch.manual_seed(seed)``, bit for bit. Those
        of bfloat16 and float16 are float32's, rounded, from which torch's differ in about one number of a thousand.
        None: a random seed.
    matmul_precision : {"float32", "bfloat16", "int8"}, optional
        What is multiplied, as in the linear maps of `MultiheadAttention`: float32, or numbers that are rounded to
        bfloat16 or int8. None: bfloat16 in a layer of bfloat16, float64 in one of float64, otherwise float32.

    Attributes
    ----------
    weight : numpy.ndarray
        W, (out_features, in_features).
    bias : numpy.ndarray or None
        b, (out_features,); None without `bias`.
    in_features, out_features : int
        Fixed at construction.
    matmul_precision : str or None
        As for the constructor. It may be assigned.
    training : bool
        The mode, which changes nothing here.

    Raises
    ------
    TypeError, RuntimeError
        If an argument has a wrong type, a size is negative, or `dtype` or `device` is not supported.
    ValueError
        If `matmul_precision` is unknown, or given in a layer of float64.
    ImportError
        If `dtype` is bfloat16, and ml_dtypes is not installed.
    MemoryError
        If the parameters do not fit into memory.

    Notes
    -----
    Parameters are read-only arrays. Assigning to one, `load_state_dict` and `to` replace all of them at once.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> linear = mha_c.Linear(2, 3, seed=0)
    >>> linear
    Linear(in_features=2, out_features=3, bias=True)
    >>> linear(np.zeros((5, 2), np.float32)).shape
    (5, 3)
    """

    weight = Parameter("weight", "The weight, (out_features, in_features).")
    bias = Parameter("bias", "The bias, (out_features,); None without `bias`.")
    matmul_precision = PrecisionOfProducts()

    _kind = "Linear"
    _parameters: _Parameters

    @knows_foreign_keywords
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: int | None = None,
        matmul_precision: Precision | None = None,
    ) -> None:
        rows, columns = size("out_features", out_features), size("in_features", in_features)
        check_device(device)
        real = float_dtype(dtype)
        check_memory({"weight": (rows, columns)}, real, f"in_features={columns:,} and out_features={rows:,}")
        precisions = precision_of_weights(matmul_precision, _products())
        self._set_up(_Parameters(initial_linear(rows, columns, flag("bias", bias), real, seed), real, precisions))

    def _set_up(self, parameters: _Parameters) -> None:
        self.training = True
        self._parameters = parameters

    @classmethod
    def _from_parameters(cls, parameters: _Parameters) -> Self:
        layer = cls.__new__(cls)
        layer._set_up(parameters)
        return layer

    @property
    def in_features(self) -> int:
        """The features of the input."""
        return self._parameters.shapes["weight"][1]

    @property
    def out_features(self) -> int:
        """The features of the output."""
        return self._parameters.shapes["weight"][0]

    def _products(self, at: str) -> Mapping[str, tuple[str, ...]]:
        return _products(at.removesuffix(".").rpartition(".")[2])

    def forward(self, input: AnyArray) -> Array:
        """Map every row of the input; calling the layer does the same.

        Parameters
        ----------
        input : array, (..., in_features)
            Of the layer's dtype. NumPy arrays, or other objects on the CPU with the array interface, the buffer
            protocol or DLPack. It is not modified.

        Returns
        -------
        numpy.ndarray
            (..., out_features), of the input's dtype.

        Raises
        ------
        RuntimeError, TypeError
            If the shape, the dtype or the type does not fit, as in torch. The message has torch's words and says what
            to write instead.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> mha_c.Linear(4, 2).forward(np.zeros((3, 5, 4), np.float32)).shape
        (3, 5, 2)
        """
        parameters = self._parameters
        try:
            return _core.linear(parameters.packed, input)
        except REFUSALS as error:
            advise_on_linear(error, input, parameters.arrays["weight"], dtypes_for(self))
            raise

    __call__ = forward

    @classmethod
    @knows_foreign_keywords
    def from_torch(cls, module: Any, *, matmul_precision: Precision | None = None) -> Self:
        """Make a layer from a layer of torch, with its parameters and training mode.

        Parameters
        ----------
        module : torch.nn.Linear
            The layer to copy. A subclass will do if it has torch's forward. The dtype is that of
            the weight.
        matmul_precision : {"float32", "bfloat16", "int8"}, optional
            As for the constructor.

        Returns
        -------
        Linear

        Raises
        ------
        TypeError
            If `module` is something else, or if it overrides forward or has forward hooks: it could compute anything.
        ValueError
            If `matmul_precision` is unknown, or given for a layer of float64.
        ImportError
            If there are parameters in bfloat16, and ml_dtypes is not installed.

        Examples
        --------
        >>> import mha_c, torch
        >>> mha_c.Linear.from_torch(torch.nn.Linear(8, 2, bias=False))
        Linear(in_features=8, out_features=2, bias=False)
        """
        instead = "If it computes the same, make a Linear and pass module.state_dict() to its load_state_dict"
        check_torch_module(module, "Linear", instead)
        given = {"weight": module.weight, "bias": module.bias}
        arrays = {name: as_array(tensor) for name, tensor in given.items() if tensor is not None}
        precisions = precision_of_weights(matmul_precision, _products())
        parameters = _Parameters(arrays, trained_dtype(arrays["weight"].dtype, None), precisions)
        return cls._from_parameters(parameters).train(module.training)

    def _description(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "dtype": self._parameters.dtype.name,
        }

    @classmethod
    def _described(cls, description: Mapping[str, Any], content: Mapping[str, Any]) -> Self:
        check_description(description, _DESCRIPTION)
        rows, columns = (size(name, description[name]) for name in ("out_features", "in_features"))
        shapes: dict[str, tuple[int, ...]] = {"weight": (rows, columns)}
        if description["bias"]:
            shapes["bias"] = (rows,)
        precisions = precision_of_weights(description.get("matmul_precision"), _products())
        arrays, dtype = match_saved_arrays(cls.__name__, shapes, content, description["dtype"], precisions)
        return cls._from_parameters(_Parameters(arrays, dtype, precisions))

    def __repr__(self) -> str:
        precision = self.matmul_precision
        return (
            f"{type(self).__name__}(in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}{'' if precision is None else f', matmul_precision={precision!r}'})"
        )
