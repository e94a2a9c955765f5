# SPDX-License-Identifier: Apache-2.0
"""State dicts by torch's names, and files of layers."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha_c.parameters.files import CONFIG, open_checkpoint
from mha_c.parameters.arrays import as_array
from mha_c.parameters.dtypes import float_dtype
from mha_c.parameters.quantization import Quantized, Weight, precision_of_weights, quantized
from mha_c.parameters.sets import ArraySet, ParameterSet, Widths

__all__ = [
    "ATTENTION",
    "IncompatibleKeys",
    "OtherLayer",
    "Part",
    "advice_on_saved_file",
    "arrays_for_file",
    "check_description",
    "check_names",
    "describe_attention",
    "described_attention",
    "loading_error",
    "loading_error_for_dot",
    "match_saved_arrays",
    "match_state_dict",
    "missing_keys",
    "open_saved_layer",
    "quoted",
]

_Shape = tuple[int, ...]

# What a file says of an attention layer beside its parameters: the constructor's arguments.
ATTENTION: Final[dict[str, Any]] = {
    **dict.fromkeys(Widths._fields, int),
    "bias": bool,
    "add_bias_kv": bool,
    "dtype": str,
    "dropout": float,
    "add_zero_attn": bool,
    "batch_first": bool,
    "dropout_seed": int,
    "masked_rows": str,
}


class _Keys(NamedTuple):
    missing_keys: list[str]
    unexpected_keys: list[str]


class IncompatibleKeys(_Keys):
    """The names that ``load_state_dict(..., strict=False)`` did not find, and those that it did not use."""

    __slots__ = ()

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return f"_IncompatibleKeys(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"


class OtherLayer(ValueError):
    """A file holds another layer than the one that was asked for; `open_saved_layer` says which file."""


class Part(Mapping[str, Any]):
    """The entries of a mapping whose names begin with a prefix, by the rest of their names; nothing is copied.

    Parameters
    ----------
    whole : mapping of str to object
        The mapping.
    prefix : str
        The prefix, a final dot included.

    Examples
    --------
    >>> dict(Part({"layer.weight": 1, "layer.bias": 2, "scale": 3}, "layer."))
    {'weight': 1, 'bias': 2}
    """

    def __init__(self, whole: Mapping[str, Any], prefix: str) -> None:
        self._whole = whole
        self._prefix = prefix

    def __getitem__(self, name: str) -> Any:
        return self._whole[self._prefix + name]

    def __contains__(self, name: object) -> bool:  # without reading, which Mapping's would do
        return f"{self._prefix}{name}" in self._whole

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._whole if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def match_state_dict(
    layer_name: str,
    shapes: Mapping[str, _Shape],
    state_dict: Mapping[str, Any],
    strict: bool,
    advice: str = "",
    will_cast: bool = False,
) -> tuple[dict[str, NDArray[Any]], IncompatibleKeys]:
    """Find the parameters of a layer in a state dict.

    Parameters
    ----------
    layer_name : str
        The name of the layer's class, for the error.
    shapes : mapping of str to tuple of int
        The names and shapes of the layer's parameters.
    state_dict : mapping of str to array or tensor
        The parameters to come, of any dtype.
    strict : bool
        Whether missing and unexpected names are errors.
    advice : str, default ""
        What the error for such names says at its end.
    will_cast : bool, default False
        Whether the caller casts the numbers. Without ml_dtypes, those of bfloat16 are then float32.

    Returns
    -------
    dict of str to numpy.ndarray
        The arrays found, not cast yet, in the order of `shapes`.
    IncompatibleKeys
        The names missing and the names unexpected.

    Raises
    ------
    TypeError
        If `state_dict` is not a mapping, or a name is not a string.
    RuntimeError
        In torch's words, if `strict` and the names differ, or if a shape differs, or a value is not an array.
    ImportError
        If ml_dtypes is needed and not installed.

    Examples
    --------
    >>> match_state_dict("Layer", {"weight": (2,)}, {"weight": np.ones(2), "bias": np.ones(2)}, strict=False)
    ({'weight': array([1., 1.])}, _IncompatibleKeys(missing_keys=[], unexpected_keys=['bias']))
    """
    check_names(state_dict)
    missing = [name for name in shapes if name not in state_dict]
    unexpected = [name for name in state_dict if name not in shapes]
    # torch asks each layer before the layers in it.
    places = list(dict.fromkeys(["", *(place for name in shapes for place in _places(name))]))
    unexpected.sort(key=lambda name: max(places.index(place) for place in _places(name) if place in places))
    errors = []
    if strict and missing:
        errors.append(missing_keys(missing))
    if strict and unexpected:
        errors.append(f"Unexpected key(s) in state_dict: {quoted(unexpected)}. ")
    if errors and advice:
        errors.append(advice)

    found = {}
    for name, shape in shapes.items():
        if name not in state_dict:
            continue
        try:
            found[name] = as_array(state_dict[name], will_cast)
        except TypeError:
            errors.append(
                f'While copying the parameter named "{name}", expected torch.Tensor or Tensor-like object '
                f"from checkpoint but received {type(state_dict[name])}"
            )
            continue
        if found[name].shape != shape:
            errors.append(
                f"size mismatch for {name}: copying a param with shape {found[name].shape} from checkpoint, "
                f"the shape in current model is {shape}."
            )
    if errors:
        raise loading_error(layer_name, errors)
    return found, IncompatibleKeys(missing, unexpected)


def _places(name: str) -> list[str]:
    """The layers around a parameter, from the outermost: "", "norm1." for "norm1.weight"."""
    parts = name.split(".")
    return ["", *(".".join(parts[:i]) + "." for i in range(1, len(parts)))]


def describe_attention(parameters: ParameterSet, **arguments: Any) -> dict[str, Any]:
    """What a file says of an attention layer beside its parameters.

    Parameters
    ----------
    parameters : ParameterSet
        The layer's parameters.
    **arguments
        The constructor's arguments that `parameters` do not tell.

    Returns
    -------
    dict of str to object
        Numbers, strings and booleans.

    Examples
    --------
    >>> import mha_c
    >>> mha_c.MultiheadAttention(8, 2)._description()["head_dim"]
    4
    """
    arguments |= parameters.widths._asdict()
    arguments["bias"] = "in_proj_bias" in parameters.shapes
    arguments["add_bias_kv"] = "bias_k" in parameters.shapes
    arguments["dtype"] = parameters.dtype.name
    return {name: kind(arguments[name]) for name, kind in ATTENTION.items()}


def described_attention(
    layer_name: str, description: Mapping[str, Any], content: Mapping[str, Any]
) -> tuple[ParameterSet, dict[str, Any]]:
    """The parameters and arguments of an attention layer that a file describes.

    Parameters
    ----------
    layer_name : str
        The name of the layer's class, for the errors.
    description : mapping of str to object
        What `describe_attention` gave, and "matmul_precision" unless it is None.
    content : mapping of str to array
        The parameters in the file.

    Returns
    -------
    ParameterSet
    dict of str to object
        The other arguments, as they were given to `describe_attention`.

    Raises
    ------
    AssertionError, RuntimeError, TypeError, ValueError
        If there is no such layer, or the parameters do not fit.

    Examples
    --------
    >>> import mha_c
    >>> layer = mha_c.MultiheadAttention(8, 2)
    >>> parameters, arguments = described_attention("Layer", layer._description(), layer.state_dict())
    >>> parameters.widths.head_dim, arguments["batch_first"]
    (4, False)
    """
    widths = Widths.from_arguments(**{name: description[name] for name in Widths._fields})
    shapes = widths.shapes(description["bias"], description["add_bias_kv"])
    precisions = precision_of_weights(description.get("matmul_precision"), widths.products)
    arrays, dtype = match_saved_arrays(layer_name, shapes, content, description["dtype"], precisions)
    told = {*Widths._fields, "bias", "add_bias_kv", "dtype"}
    parameters = ParameterSet(widths, arrays, dtype, precisions)
    return parameters, {name: description[name] for name in ATTENTION if name not in told}


def check_names(state_dict: Any, prefix: Any = "") -> None:
    if not isinstance(state_dict, Mapping):
        cure = " Pass its state_dict()." if hasattr(state_dict, "state_dict") else ""
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.{cure}")
    for name in state_dict:
        if not isinstance(name, str):
            raise TypeError(f"the names in a state dict are strings, but one is {name!r}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, but got {prefix!r}")


def missing_keys(names: Iterable[str]) -> str:
    return f"Missing key(s) in state_dict: {quoted(names)}. "


def quoted(names: Iterable[str]) -> str:
    """Names as torch prints them; those of a file could hold codes that a terminal would obey."""
    return ", ".join(map(json.dumps, names))


def loading_error(layer_name: str, errors: Iterable[str]) -> RuntimeError:
    return RuntimeError("Error(s) in loading state_dict for {}:\n\t{}".format(layer_name, "\n\t".join(errors)))


def loading_error_for_dot(layer_name: str, prefix: str) -> RuntimeError:
    """The error for a prefix that would fit with a dot at its end."""
    whole = f"{prefix}."
    return loading_error(layer_name, [f"prefix={quoted([prefix])} lacks its final dot: pass prefix={quoted([whole])}"])


@contextmanager
def open_saved_layer(
    layer_name: str, path: str | os.PathLike[str], reader: str
) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Open a file of a layer; what is raised meanwhile, because of what the file says, becomes a ValueError.

    Parameters
    ----------
    layer_name : str
        The name of the layer's class, for the errors.
    path : str or path-like
        The file.
    reader : str
        How to read a file without a description of the layer, for the error.

    Yields
    ------
    dict of str to object
        What the file says of the layer beside its parameters.
    mapping of str to array
        Its parameters, to be read within the ``with`` statement.

    Raises
    ------
    ValueError
        If no such layer was saved to this file, or it is damaged.
    ImportError, OSError
        As `open_checkpoint`.

    Examples
    --------
    >>> import mha_c, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     mha_c.RMSNorm(8).save(f"{folder}/norm.npz")
    ...     with open_saved_layer("RMSNorm", f"{folder}/norm.npz", "load_state_dict reads it") as (description, arrays):
    ...         description["eps"], list(arrays)
    (None, ['weight'])
    """
    with open_checkpoint(path) as checkpoint:
        if checkpoint.config is None:
            raise ValueError(
                f"{checkpoint.path} was not written by {layer_name}.save, so that the layer's arguments are not known: "
                f"{reader}"
            )
        try:
            yield json.loads(checkpoint.config), checkpoint.content
        except OtherLayer as error:
            raise ValueError(f"{checkpoint.path} holds {error}") from error
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint.path} holds no layer: {error}") from error


def check_description(description: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Refuse what a file says of a layer, with LookupError or TypeError, if something is missing or of a wrong type."""
    for name, kind in kinds.items():
        if type(description[name]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise TypeError(f"{name} is {description[name]!r}")


def arrays_for_file(parameters: ArraySet, at: str, packed: bool) -> dict[str, NDArray[Any]]:
    """The parameters of a layer as a file holds them, for `match_saved_arrays`.

    Parameters
    ----------
    parameters : ArraySet
        The parameters.
    at : str
        What precedes their names, for the error.
    packed : bool
        Whether all weights that are multiplied as int8 numbers become such numbers. Otherwise, only those do that the
        layer does not hold in another form.

    Returns
    -------
    dict of str to numpy.ndarray
        Of a quantized "weight": "weight_int8" and "weight_scale".

    Raises
    ------
    ValueError
        If a weight that is to be quantized holds NaN or infinity.

    Examples
    --------
    >>> import mha_c
    >>> layer = mha_c.Linear(8, 2, matmul_precision="int8")
    >>> {name: array.dtype.name for name, array in arrays_for_file(layer._parameters, "", packed=True).items()}
    {'weight_int8': 'int8', 'weight_scale': 'float32', 'bias': 'float32'}
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name, one in parameters.stored.items():
        if packed and parameters.precisions.get(name) == "int8":
            one = quantized(one)
        if not isinstance(one, Quantized):
            arrays[name] = one
            continue
        if not np.isfinite(one.scales).all():
            raise ValueError(f"{at}{name} holds NaN or infinity, which int8 numbers cannot hold: leave out packed=True")
        arrays |= dict(zip(_quantized_names(name), one))
    return arrays


def advice_on_saved_file(layer_name: str, names: Collection[str]) -> str:
    """What to write where what `save` wrote is taken for a state dict; nothing for other names."""
    numbers, _ = _quantized_names("")
    if any(name.endswith(numbers) for name in names):
        return f"It holds int8 weights, which save(path, packed=True) wrote: read it with {layer_name}.load."
    return f"This is what save wrote: read it with {layer_name}.load." if CONFIG in names else ""


def _quantized_names(name: str) -> tuple[str, str]:
    """The names that a quantized weight has in a file: none that a reader would take for the weight itself."""
    return f"{name}_int8", f"{name}_scale"


def match_saved_arrays(
    layer_name: str,
    shapes: Mapping[str, _Shape],
    content: Mapping[str, Any],
    dtype_name: str,
    precisions: Collection[str] = (),
) -> tuple[dict[str, Weight], np.dtype[Any]]:
    """The parameters of a saved layer, and their dtype.

    Parameters
    ----------
    layer_name, shapes
        As for `match_state_dict`.
    content : mapping of str to array
        What the file holds.
    dtype_name : str
        The dtype that the file states.
    precisions : collection of str, default ()
        The weights that may be there as int8 numbers.

    Returns
    -------
    dict of str to numpy.ndarray or Quantized
    numpy.dtype

    Raises
    ------
    TypeError
        If the dtype is not that of all arrays that are not quantized, or no layer has it.
    RuntimeError
        As `match_state_dict`, or if it is a dtype of integers.
    ImportError
        If it is bfloat16, and ml_dtypes is not installed.

    Examples
    --------
    >>> match_saved_arrays("Layer", {"weight": (1,)}, {"weight": np.ones(1)}, "float64")
    ({'weight': array([1.])}, dtype('float64'))
    """
    dtype = float_dtype(dtype_name)
    expected: dict[str, _Shape] = {}
    for name, shape in shapes.items():
        numbers, scales = _quantized_names(name)
        is_quantized = name in precisions and numbers in content
        expected |= {numbers: shape, scales: shape[:1]} if is_quantized else {name: shape}
    arrays, _ = match_state_dict(layer_name, expected, content, strict=True)
    found: dict[str, Weight] = {}
    for name in shapes:
        if name in arrays:
            found[name] = arrays[name]
            if arrays[name].dtype != dtype:
                raise TypeError(f"its parameters should be of {dtype}")
        else:
            found[name] = Quantized(*(arrays[one] for one in _quantized_names(name)))
    return found, dtype
