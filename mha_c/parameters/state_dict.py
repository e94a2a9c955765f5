# SPDX-License-Identifier: Apache-2.0
"""State dicts by torch's names, and files of layers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha_c.parameters.files import open_checkpoint, write_checkpoint
from mha_c.parameters.arrays import as_array
from mha_c.parameters.sets import ParameterSet, Widths

__all__ = [
    "IncompatibleKeys",
    "Part",
    "check_names",
    "loading_error",
    "match_saved_arrays",
    "match_state_dict",
    "missing_keys",
    "open_saved_layer",
    "quoted",
    "read_layer",
    "write_layer",
]

_Shape = tuple[int, ...]

# What a file says of a layer beside its parameters: the constructor's arguments, and the mode.
_CONFIG: Final[dict[str, Any]] = {
    **dict.fromkeys(Widths._fields, int),
    "bias": bool,
    "add_bias_kv": bool,
    "dtype": str,
    "dropout": float,
    "add_zero_attn": bool,
    "batch_first": bool,
    "dropout_seed": int,
    "masked_rows": str,
    "training": bool,
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
    layer_name: str, shapes: Mapping[str, _Shape], state_dict: Mapping[str, Any], strict: bool, advice: str = ""
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
        In torch's words, if `strict` and the names differ, or if a shape differs, or a value is no array.

    Examples
    --------
    >>> match_state_dict("Layer", {"weight": (2,)}, {"weight": np.ones(2), "bias": np.ones(2)}, strict=False)
    ({'weight': array([1., 1.])}, _IncompatibleKeys(missing_keys=[], unexpected_keys=['bias']))
    """
    check_names(state_dict)
    missing = [name for name in shapes if name not in state_dict]
    unexpected = [name for name in state_dict if name not in shapes]
    unexpected.sort(key=lambda name: name.startswith("out_proj."))  # torch asks the layer first, then its out_proj
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
            found[name] = as_array(state_dict[name])
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


def write_layer(path: str | os.PathLike[str], parameters: ParameterSet, **arguments: Any) -> None:
    """Write a layer to a file.

    Parameters
    ----------
    path : str or path-like
        Ends in .safetensors or .npz.
    parameters : ParameterSet
        The layer's parameters.
    **arguments
        The constructor's arguments that `parameters` do not tell, and ``training``.

    Raises
    ------
    ValueError, ImportError, OSError
        As `write_checkpoint`.

    Examples
    --------
    >>> import mha_c, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     mha_c.MultiheadAttention(8, 2).save(f"{folder}/layer.npz")  # which calls write_layer
    """
    arguments |= parameters.widths._asdict()
    arguments["bias"] = "in_proj_bias" in parameters.arrays
    arguments["add_bias_kv"] = "bias_k" in parameters.arrays
    arguments["dtype"] = parameters.dtype.name
    config = json.dumps({name: kind(arguments[name]) for name, kind in _CONFIG.items()})
    write_checkpoint(path, parameters.arrays, config)


def read_layer(layer_name: str, path: str | os.PathLike[str]) -> tuple[ParameterSet, dict[str, Any]]:
    """Read what `write_layer` wrote.

    Parameters
    ----------
    layer_name : str
        The name of the layer's class, for the errors.
    path : str or path-like
        The file.

    Returns
    -------
    ParameterSet
    dict of str to object
        The other arguments, as they were given to `write_layer`.

    Raises
    ------
    ValueError
        If no layer was saved to this file, or it is damaged.
    ImportError, OSError
        As `open_checkpoint`.

    Examples
    --------
    >>> import mha_c, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     mha_c.MultiheadAttention(8, 2).save(f"{folder}/layer.npz")
    ...     parameters, arguments = read_layer("Layer", f"{folder}/layer.npz")
    >>> parameters.widths.head_dim, arguments["batch_first"]
    (4, False)
    """
    with open_saved_layer(layer_name, path, _CONFIG, ", given num_heads") as (config, content):
        widths = Widths.from_arguments(**{name: config[name] for name in Widths._fields})
        shapes = widths.shapes(config["bias"], config["add_bias_kv"])
        arrays, dtype = match_saved_arrays(layer_name, shapes, content, config["dtype"])
    told = {*Widths._fields, "bias", "add_bias_kv", "dtype"}
    return ParameterSet(widths, arrays, dtype), {name: config[name] for name in _CONFIG if name not in told}


def check_names(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        cure = " Pass its state_dict()." if hasattr(state_dict, "state_dict") else ""
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.{cure}")
    for name in state_dict:
        if not isinstance(name, str):
            raise TypeError(f"the names in a state dict are strings, but one is {name!r}")


def missing_keys(names: Iterable[str]) -> str:
    return f"Missing key(s) in state_dict: {quoted(names)}. "


def quoted(names: Iterable[str]) -> str:
    """Names as torch prints them; those of a file could hold codes that a terminal would obey."""
    return ", ".join(map(json.dumps, names))


def loading_error(layer_name: str, errors: Iterable[str]) -> RuntimeError:
    return RuntimeError("Error(s) in loading state_dict for {}:\n\t{}".format(layer_name, "\n\t".join(errors)))


@contextmanager
def open_saved_layer(
    layer_name: str, path: str | os.PathLike[str], kinds: Mapping[str, type | tuple[type, ...]], given: str = ""
) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Open a file of a layer; what is raised meanwhile, because of what the file says, becomes a ValueError.

    Parameters
    ----------
    layer_name : str
        The name of the layer's class, for the errors.
    path : str or path-like
        The file.
    kinds : mapping of str to type or types
        What the file must say of the layer beside its parameters.
    given : str, default ""
        What `from_state_dict` needs besides, for the error.

    Yields
    ------
    dict of str to object
        What the file says of the layer.
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
    ...     with open_saved_layer("RMSNorm", f"{folder}/norm.npz", {"eps": (float, type(None))}) as (config, arrays):
    ...         config["eps"], list(arrays)
    (None, ['weight'])
    """
    with open_checkpoint(path) as checkpoint:
        if checkpoint.config is None:
            raise ValueError(
                f"{checkpoint.path} was not written by {layer_name}.save, so that the layer's arguments are not known: "
                f"{layer_name}.from_state_dict reads it{given}"
            )
        try:
            config = json.loads(checkpoint.config)
            for name, kind in kinds.items():
                if type(config[name]) not in (kind if isinstance(kind, tuple) else (kind,)):
                    raise TypeError(f"{name} is {config[name]!r}")
            yield config, checkpoint.content
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint.path} holds no layer: {error}") from error


def match_saved_arrays(
    layer_name: str, shapes: Mapping[str, _Shape], content: Mapping[str, Any], dtype_name: str
) -> tuple[dict[str, NDArray[Any]], np.dtype[Any]]:
    """The parameters of a saved layer, and their dtype.

    Parameters
    ----------
    layer_name, shapes
        As for `match_state_dict`.
    content : mapping of str to array
        What the file holds.
    dtype_name : str
        The dtype that the file states.

    Returns
    -------
    dict of str to numpy.ndarray
    numpy.dtype

    Raises
    ------
    TypeError
        If the dtype is not that of all arrays, or not float32 or float64.
    RuntimeError
        As `match_state_dict`.

    Examples
    --------
    >>> match_saved_arrays("Layer", {"weight": (1,)}, {"weight": np.ones(1)}, "float64")
    ({'weight': array([1.])}, dtype('float64'))
    """
    dtype = np.dtype(dtype_name)
    arrays, _ = match_state_dict(layer_name, shapes, content, strict=True)
    if dtype not in (np.float32, np.float64) or any(array.dtype != dtype for array in arrays.values()):
        raise TypeError(f"its parameters should be of {dtype}, and that float32 or float64")
    return arrays, dtype
