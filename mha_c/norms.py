# SPDX-License-Identifier: Apache-2.0
"""Layers that normalize rows of features: torch's LayerNorm and RMSNorm over the C core."""

from __future__ import annotations

import itertools
import numbers
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np

from mha_c import _core
from mha_c._typing import Self
from mha_c.advice.arguments import REFUSALS
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.advice.norms import advise_on_norm
from mha_c.module import Module, Option, Parameter, check_device, check_memory, check_torch_module
from mha_c.parameters.arrays import AnyArray, Array, as_array
from mha_c.parameters.checks import flag, number
from mha_c.parameters.dtypes import computed_in, float_dtype, trained_dtype
from mha_c.parameters.files import open_state_dict
from mha_c.parameters.loading import arrays_in, read_array
from mha_c.parameters.quantization import Weight
from mha_c.parameters.sets import ArraySet
from mha_c.parameters.state_dict import (
    Part,
    check_description,
    check_names,
    loading_error,
    loading_error_for_dot,
    match_saved_arrays,
    match_state_dict,
    missing_keys,
)

__all__ = ["LayerNorm", "RMSNorm"]

_Shape: TypeAlias = tuple[int, ...]

# What a file says of a layer beside its parameters.
_DESCRIPTION: Final[dict[str, type | tuple[type, ...]]] = {
    "normalized_shape": list,
    "eps": (float, type(None)),
    "parameters": list,
    "dtype": str,
}

# What torch, TensorFlow, Keras and Flax call the weight and the bias.
_NAMES: Final = (("weight", "bias"), ("gamma", "beta"), ("scale", "bias"))


class _Parameters(ArraySet):
    """The weight and the bias, also as arrays that no caller gets, since a caller could assign to their shape."""

    __slots__ = ("bias", "weight")

    def __init__(self, arrays: Mapping[str, Weight], dtype: np.dtype[Any], *precisions: Any) -> None:
        super().__init__(arrays, dtype, *precisions)
        self.weight = self.array("weight")
        self.bias = self.array("bias")


def _shape(normalized_shape: Any) -> _Shape:
    """The sizes of the normalized axes, from an int or several; the errors are those of torch."""
    try:
        sizes = (normalized_shape,) if isinstance(normalized_shape, numbers.Integral) else tuple(normalized_shape)
    except TypeError as error:
        raise TypeError(f"{error}: normalized_shape must be an int or several") from None
    for i, size in enumerate(sizes):
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(
                "normalized_shape must be an int or several: empty(): argument 'size' (position 1) must be tuple of "
                f"ints, but found element of type {type(size).__name__} at pos {i}"
            )
    shape = tuple(operator.index(size) for size in sizes)
    for size in shape:
        if size < 0:
            raise RuntimeError(f"Trying to create tensor with negative dimension {size}: {list(shape)}")
    return shape


def _optional_number(name: str, value: Any) -> Any:
    return None if value is None else number(name, value)


class _Norm(Module):
    """What the two norms have in common.

    Examples
    --------
    >>> import mha_c
    >>> isinstance(mha_c.RMSNorm(8), _Norm)
    True
    """

    _is_rms: ClassVar[bool]
    _default_eps: ClassVar[float | None]
    _parameter_names: ClassVar[tuple[str, ...]]

    weight = Parameter("weight", "The factors of the features, of the shape `normalized_shape`; else None.")

    _parameters: _Parameters
    _normalized_shape: _Shape
    _eps: Any

    def _make(self, normalized_shape: Any, eps: Any, names: Sequence[str], device: Any, dtype: Any) -> None:
        """Set up a new layer, whose parameters are ones and zeros."""
        shape = _shape(normalized_shape)
        check_device(device)
        real = float_dtype(dtype)
        check_memory(dict.fromkeys(names, shape), real, f"normalized_shape={shape}")
        arrays = {name: np.ones(shape, real) if name == "weight" else np.zeros(shape, real) for name in names}
        self._set_up(_Parameters(arrays, real), shape, eps)

    def _set_up(self, parameters: _Parameters, normalized_shape: _Shape, eps: Any) -> None:
        self.eps = eps
        self.training = True
        self._normalized_shape = normalized_shape
        self._parameters = parameters

    @classmethod
    def _from_parameters(cls, parameters: _Parameters, normalized_shape: _Shape, eps: Any) -> Self:
        layer = cls.__new__(cls)
        layer._set_up(parameters, normalized_shape, eps)
        return layer

    @property
    def normalized_shape(self) -> tuple[int, ...]:
        """The sizes of the last axes, over which the layer normalizes, fixed at construction."""
        return self._normalized_shape

    @property
    def elementwise_affine(self) -> bool:
        """Whether the layer has parameters."""
        return self._parameters.weight is not None

    def _for_core(self, dtype: np.dtype[Any]) -> tuple[Array | None, Array | None, float, bool]:
        """The norm as the core takes it; `dtype` is that of the input."""
        parameters = self._parameters
        eps = float(np.finfo(computed_in(dtype)).eps) if self._eps is None else self._eps
        return parameters.weight, parameters.bias, eps, self._is_rms

    def _normalize(self, input: Any, name: str = "input") -> Array:
        parameters = self._parameters
        try:
            return _core.normalize(
                input, self._normalized_shape, parameters.weight, parameters.bias, self._eps, self._is_rms
            )
        except REFUSALS as error:
            of_layer = (self._normalized_shape, parameters.weight, parameters.bias)
            advise_on_norm(error, input, *of_layer, name=name, is_layer=True)
            raise

    @classmethod
    @knows_foreign_keywords
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any] | str | os.PathLike[str],
        prefix: str = "",
        *,
        eps: float | None = None,
        strict: bool = True,
        dtype: Any = None,
    ) -> Self:
        """Make a layer from trained parameters: those of one layer in a state dict or a file.

        The shape of the weight is the layer's `normalized_shape`.

        Parameters
        ----------
        state_dict : mapping of str to array or tensor, or str or path-like
            The parameters of the layer or of a whole model, or a file of them: of torch (.pt, .pth, .bin, .ckpt),
            safetensors, .npz, or the index of several files. Nothing in the file is executed. Mappings may be nested.
        prefix : str, default ""
            The beginning of the layer's names, including the dot, such as ``"encoder.layers.0.norm1."``.
        eps : float, optional
            As for the constructor, whose default it has. A state dict does not record it.
        strict : bool, default True
            Whether other names that begin with `prefix` are an error.
        dtype : optional
            float32, float64, bfloat16 or float16, to which the parameters are cast. None: the dtype of the weight,
            or float32 if a layer cannot have it.

        Returns
        -------
        LayerNorm or RMSNorm
            The layer, in training mode like any new layer.

        Raises
        ------
        RuntimeError
            If there is no weight, or shapes do not fit, or other names begin with `prefix`.
        ValueError
            If a file is incomplete, damaged or of another kind.
        TypeError
            If `state_dict` is neither a mapping nor a path.
        ImportError
            If there are bfloat16 or float8 numbers to read, and ml_dtypes is not installed. It is not needed to cast
            bfloat16 to another `dtype`.
        OSError
            If the file cannot be opened.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> model = {"norm.weight": np.ones(8), "norm.bias": np.zeros(8), "head.weight": np.ones((2, 8))}
        >>> mha_c.LayerNorm.from_state_dict(model, "norm.", eps=1e-12)
        LayerNorm((8,), eps=1e-12, elementwise_affine=True, bias=True)
        """
        with open_state_dict(state_dict) as tensors:
            arrays = cls._find(tensors, prefix, strict, will_cast=dtype is not None)
        weight = arrays["weight"]
        parameters = _Parameters(arrays, trained_dtype(weight.dtype, dtype))
        return cls._from_parameters(parameters, weight.shape, cls._default_eps if eps is None else eps)

    @classmethod
    def _find(cls, tensors: Mapping[str, Any], prefix: str, strict: bool, will_cast: bool) -> dict[str, Array]:
        """The parameters of a layer by torch's names, perhaps among those of other layers."""
        check_names(tensors, prefix)
        for is_flat, names in itertools.product((False, True), _NAMES):
            part = Part(arrays_in(tensors) if is_flat else tensors, prefix)
            if names[0] in part:
                torchs = dict(zip(names, cls._parameter_names))
                state = {torchs.get(name, name): part[name] for name in part if strict or name in torchs}
                shape = read_array(state, "weight", will_cast).shape
                shapes = {name: shape for name in cls._parameter_names if name in state}
                return match_state_dict(cls.__name__, shapes, state, strict, will_cast=will_cast)[0]
        flat = arrays_in(tensors)
        if any(f"{prefix}.{weight}" in flat for weight, *_ in _NAMES):
            raise loading_error_for_dot(cls.__name__, prefix)
        raise loading_error(cls.__name__, [missing_keys([f"{prefix}weight"])])

    def _description(self) -> dict[str, Any]:
        return {
            "normalized_shape": list(self._normalized_shape),
            "eps": None if self._eps is None else float(self._eps),
            "parameters": list(self._parameters.shapes),
            "dtype": self._parameters.dtype.name,
        }

    @classmethod
    def _described(cls, description: Mapping[str, Any], content: Mapping[str, Any]) -> Self:
        check_description(description, _DESCRIPTION)
        shape, names = _shape(description["normalized_shape"]), description["parameters"]
        if not set(names).issubset(cls._parameter_names):
            raise ValueError(f"a {cls._kind} has no parameters {names}")
        shapes = {name: shape for name in cls._parameter_names if name in names}
        arrays, dtype = match_saved_arrays(cls.__name__, shapes, content, description["dtype"])
        return cls._from_parameters(_Parameters(arrays, dtype), shape, description["eps"])

    @classmethod
    @knows_foreign_keywords
    def from_torch(cls, module: Any) -> Self:
        """Make a layer from a layer of torch, with its arguments, parameters and training mode.

        Parameters
        ----------
        module : torch.nn.LayerNorm or torch.nn.RMSNorm
            The layer to copy, of the same name as this class. A subclass will do if it has torch's forward. The dtype
            is that of the weight.

        Returns
        -------
        LayerNorm or RMSNorm

        Raises
        ------
        TypeError
            If `module` is something else, or if it overrides forward or has forward hooks: it could compute anything.
        ImportError
            If there are parameters in bfloat16, and ml_dtypes is not installed.

        Examples
        --------
        >>> import mha_c, torch
        >>> mha_c.LayerNorm.from_torch(torch.nn.LayerNorm(8, eps=1e-6))
        LayerNorm((8,), eps=1e-06, elementwise_affine=True, bias=True)
        """
        instead = f"If it computes the same, write {cls._kind}.from_state_dict(module.state_dict(), eps=module.eps)"
        check_torch_module(module, cls._kind, instead)
        given = {name: getattr(module, name) for name in cls._parameter_names}
        arrays = {name: as_array(tensor) for name, tensor in given.items() if tensor is not None}
        dtype = trained_dtype(arrays["weight"].dtype, None) if "weight" in arrays else float_dtype(None)
        parameters = _Parameters(arrays, dtype)
        return cls._from_parameters(parameters, _shape(module.normalized_shape), module.eps).train(module.training)

    def __repr__(self) -> str:
        bias = f", bias={self._parameters.bias is not None}" if "bias" in self._parameter_names else ""
        affine = self.elementwise_affine
        shape = self._normalized_shape
        return f"{type(self).__name__}({shape}, eps={self.eps}, elementwise_affine={affine}{bias})"


class LayerNorm(_Norm):
    """Layer normalization, as ``torch.nn.LayerNorm`` computes it.

    The numbers of every row get the mean 0 and the variance 1, then a weight and a bias for each feature
    ("Layer Normalization", Ba, Kiros and Hinton, 2016)::

        y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias

    Mean and variance are those of the last axes, which have the shape `normalized_shape`. The variance is the mean of
    the squared differences (torch's page on LayerNorm).

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The sizes of the last axes of the input, over which it is normalized.
    eps : float, default 1e-05
        Added to the variance.
    elementwise_affine : bool, default True
        Whether the layer has a weight, ones at first, and a bias, zeros at first.
    bias : bool, default True
        Whether it has a bias, if it has a weight.
    device : optional
        None or "cpu".
    dtype : optional
        Of the parameters: float32 (the default), float64, bfloat16 or float16, as a name, a NumPy or a torch dtype.

    Attributes
    ----------
    weight : numpy.ndarray or None
        The factors of the features, of the shape `normalized_shape`; None without `elementwise_affine`.
    bias : numpy.ndarray or None
        What is added to the features, of the same shape; None without `elementwise_affine` or `bias`.
    normalized_shape : tuple of int
        Fixed at construction.
    eps : float
        It may be changed; a change takes effect at the next call.
    elementwise_affine : bool
        Whether the layer has a weight.
    training : bool
        The mode, which changes nothing here.

    Raises
    ------
    TypeError, RuntimeError
        If an argument has a wrong type, a size is negative, or `dtype` or `device` is not supported.
    ImportError
        If `dtype` is bfloat16, and ml_dtypes is not installed.
    MemoryError
        If the parameters do not fit into memory.

    Notes
    -----
    The mean of a row is taken in two passes, of which the second corrects the first ("Algorithms for computing the
    sample variance", Chan, Golub and LeVeque, 1983). So the error stays small where the mean is far larger than the
    differences. The bits of a row's result do not depend on other rows, threads or strides. They are equal on AVX2,
    AVX-512 and NEON.

    Parameters are read-only arrays. Assigning to one, `load_state_dict` and `to` replace all of them at once.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> norm = mha_c.LayerNorm(4, dtype="float64")
    >>> norm(np.array([[1.0, 2.0, 3.0, 4.0]])).round(4)
    array([[-1.3416, -0.4472,  0.4472,  1.3416]])
    """

    _kind = "LayerNorm"
    _is_rms = False
    _default_eps = 1e-5
    _parameter_names = ("weight", "bias")

    bias = Parameter("bias", "What is added to the features, of the shape `normalized_shape`; else None.")
    eps = Option("eps", number, "Added to the variance.")

    @knows_foreign_keywords
    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        names: tuple[str, ...] = ("weight", "bias") if flag("bias", bias) else ("weight",)
        if not flag("elementwise_affine", elementwise_affine):
            names = ()
        self._make(normalized_shape, eps, names, device, dtype)

    def forward(self, input: AnyArray) -> Array:
        """Normalize every row of the input; calling the layer does the same.

        Parameters
        ----------
        input : array, (..., normalized_shape)
            Of the layer's dtype. A float32 layer also takes bfloat16 and float16, and a layer without parameters takes
            any of the four dtypes. NumPy arrays, or other objects on the CPU with the array interface, the buffer
            protocol or DLPack. It is not modified. It is copied only if its numbers have 16 bits, if those of a row are
            not adjacent, or if it is misaligned or byte-swapped.

        Returns
        -------
        numpy.ndarray
            C-contiguous, of the input's shape and dtype.

        Raises
        ------
        RuntimeError, TypeError, NotImplementedError
            If the shape, the dtype or the type does not fit, as in torch. The message has torch's words and says what
            to write instead.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> mha_c.LayerNorm(4).forward(np.zeros((2, 3, 4), np.float32)).shape
        (2, 3, 4)
        """
        return self._normalize(input)

    __call__ = forward


class RMSNorm(_Norm):
    """Root mean square layer normalization, as ``torch.nn.RMSNorm`` computes it.

    The numbers of every row get the root mean square 1, then a weight for each feature ("Root Mean Square Layer
    Normalization", Zhang and Sennrich, 2019)::

        y = x / sqrt(mean(x²) + eps) * weight

    The mean is that of the last axes, which have the shape `normalized_shape` (torch's page on RMSNorm).

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The sizes of the last axes of the input, over which it is normalized.
    eps : float, optional
        Added to the mean of the squares. None: the machine's epsilon, ``numpy.finfo(dtype).eps``, in float64 for an
        input of float64, and otherwise in float32, in which bfloat16 and float16 are computed.
    elementwise_affine : bool, default True
        Whether the layer has a weight, ones at first.
    device : optional
        None or "cpu".
    dtype : optional
        Of the weight: float32 (the default), float64, bfloat16 or float16, as a name, a NumPy or a torch dtype.

    Attributes
    ----------
    weight : numpy.ndarray or None
        The factors of the features, of the shape `normalized_shape`; None without `elementwise_affine`.
    normalized_shape : tuple of int
        Fixed at construction.
    eps : float or None
        It may be changed; a change takes effect at the next call.
    elementwise_affine : bool
        Whether the layer has a weight.
    training : bool
        The mode, which changes nothing here.

    Raises
    ------
    TypeError, RuntimeError
        If an argument has a wrong type, a size is negative, or `dtype` or `device` is not supported.
    ImportError
        If `dtype` is bfloat16, and ml_dtypes is not installed.
    MemoryError
        If the weight does not fit into memory.

    Notes
    -----
    The bits of a row's result do not depend on other rows, threads or strides. They are equal on AVX2, AVX-512 and
    NEON. torch casts an input and a weight of different dtypes to a common one; here they are refused, as in LayerNorm.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> norm = mha_c.RMSNorm(4, dtype="float64")
    >>> norm(np.array([[1.0, 2.0, 3.0, 4.0]])).round(4)
    array([[0.3651, 0.7303, 1.0954, 1.4606]])
    """

    _kind = "RMSNorm"
    _is_rms = True
    _default_eps = None
    _parameter_names = ("weight",)

    eps = Option("eps", _optional_number, "Added to the mean of the squares.")

    @knows_foreign_keywords
    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        names = ("weight",) if flag("elementwise_affine", elementwise_affine) else ()
        self._make(normalized_shape, eps, names, device, dtype)

    def forward(self, x: AnyArray) -> Array:
        """Normalize every row of the input; calling the layer does the same.

        Parameters
        ----------
        x : array, (..., normalized_shape)
            Of the layer's dtype. A float32 layer also takes bfloat16 and float16, and a layer without parameters takes
            any of the four dtypes. NumPy arrays, or other objects on the CPU with the array interface, the buffer
            protocol or DLPack. It is not modified. It is copied only if its numbers have 16 bits, if those of a row are
            not adjacent, or if it is misaligned or byte-swapped.

        Returns
        -------
        numpy.ndarray
            C-contiguous, of the input's shape and dtype.

        Raises
        ------
        RuntimeError, ValueError, TypeError, NotImplementedError
            If the shape, the dtype or the type does not fit, as in torch. The message has torch's words and says what
            to write instead.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> mha_c.RMSNorm(4).forward(np.zeros((2, 3, 4), np.float32)).shape
        (2, 3, 4)
        """
        return self._normalize(x, "x")

    __call__ = forward
