# SPDX-License-Identifier: Apache-2.0
"""Between a layer and what was saved of one: state dicts by the names that torch and others give, and our own files."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha_c.parameters.files import open_checkpoint, write_checkpoint
from mha_c.parameters.arrays import as_array
from mha_c.parameters.sets import ParameterSet, Widths

__all__ = ["IncompatibleKeys", "Part", "infer_layer", "match_state_dict", "read_layer", "write_layer"]

_Shape = tuple[int, ...]

# What models call the query, key, value and output projections where each has a weight, and perhaps a bias, of its own.
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
)
_INPUTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_EXTRA_KEY = ("bias_k", "bias_v")
_TORCH = ("in_proj_weight", *_INPUTS, "in_proj_bias", *_EXTRA_KEY, "out_proj.weight", "out_proj.bias")

# What a file says of a layer beside its parameters: the constructor's arguments, and the mode.
_CONFIG: Final[dict[str, type]] = {
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
    layer_name: str, shapes: Mapping[str, _Shape], state_dict: Mapping[str, Any], strict: bool
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
    _check_state_dict(state_dict)
    missing = [name for name in shapes if name not in state_dict]
    unexpected = [name for name in state_dict if name not in shapes]
    unexpected.sort(key=lambda name: name.startswith("out_proj."))  # torch asks the layer first, then its out_proj
    errors = []
    if strict and missing:
        errors.append(_missing(missing))
    if strict and unexpected:
        errors.append(f"Unexpected key(s) in state_dict: {_quoted(unexpected)}. ")

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
        raise _loading_error(layer_name, errors)
    return found, IncompatibleKeys(missing, unexpected)


def infer_layer(
    layer_name: str,
    state_dict: Mapping[str, Any],
    prefix: str,
    names: Sequence[str] | None,
    num_heads: int,
    num_kv_heads: int | None,
    head_dim: int | None,
    strict: bool,
) -> tuple[Widths, dict[str, NDArray[Any]]]:
    """The widths and the parameters of the layer that a state dict describes, perhaps among others.

    Parameters
    ----------
    layer_name : str
        The name of the layer's class, for the errors.
    state_dict : mapping of str to array or tensor
        The parameters, of which only the layer's are read.
    prefix, names, num_heads, num_kv_heads, head_dim, strict
        As for ``MultiheadAttention.from_state_dict``.

    Returns
    -------
    Widths
    dict of str to numpy.ndarray
        The parameters by torch's names, not cast yet.

    Raises
    ------
    TypeError
        If a name in `state_dict` is not a string.
    RuntimeError
        In torch's words, if names or shapes do not fit.
    ValueError
        If no layer of `num_heads` heads has such shapes.

    Examples
    --------
    >>> state_dict = {f"{name}.weight": np.eye(4) for name in ("query", "key", "value", "output")}
    >>> widths, arrays = infer_layer("Layer", state_dict, "", ["query", "key", "value", "output"], 2, None, None, True)
    >>> widths.head_dim, {name: array.shape for name, array in arrays.items()}
    (2, {'in_proj_weight': (12, 4), 'out_proj.weight': (4, 4)})
    """
    _check_state_dict(state_dict)
    part = Part(state_dict, prefix)
    if names is None and ("in_proj_weight" in part or "q_proj_weight" in part):
        arrays = {name: as_array(part[name]) if name in _TORCH else None for name in part}
    else:
        arrays = _read_separate(layer_name, part, names or _choose_names(layer_name, part, state_dict, prefix))

    shapes = {name: array.shape for name, array in arrays.items() if array is not None}
    widths = _infer_widths(shapes, num_heads, num_kv_heads, head_dim)
    if widths.packed and "in_proj_weight" not in arrays:
        features = (widths.embed_dim, widths.kdim, widths.vdim)
        inputs, _ = match_state_dict(layer_name, dict(zip(_INPUTS, zip(widths.rows, features))), arrays, strict=False)
        if len(inputs) == len(_INPUTS):
            arrays = {name: array for name, array in arrays.items() if name not in inputs}
            arrays["in_proj_weight"] = np.concatenate(list(inputs.values()))

    has_bias = "in_proj_bias" in arrays or "out_proj.bias" in arrays
    shapes = widths.shapes(has_bias, any(name in arrays for name in _EXTRA_KEY))
    if not strict:
        arrays = {name: array for name, array in arrays.items() if name in shapes}
    found, _ = match_state_dict(layer_name, shapes, arrays, strict=True)
    return widths, found


def _choose_names(
    layer_name: str, part: Mapping[str, Any], state_dict: Mapping[str, Any], prefix: str
) -> tuple[str, str, str, str]:
    """The names in _SEPARATE of which `part` has most."""
    chosen = max(_SEPARATE, key=lambda names: sum(f"{name}.weight" in part for name in names))
    if any(f"{name}.weight" in part for name in chosen):
        return chosen
    queries = sorted((f"{names[0]}.weight" for names in _SEPARATE), key=len, reverse=True)
    prefixes = []
    for name in state_dict:
        for query in ("in_proj_weight", "q_proj_weight", *queries):
            before = name.removesuffix(query)
            if before != name and (not before or before.endswith(".")):
                prefixes.append(f'prefix="{before}"')
                break
    error = _missing([f"{prefix}in_proj_weight"])
    if prefixes:
        more = f" and {len(prefixes) - 3} more" if len(prefixes) > 3 else ""
        error += f"It has layers with {', '.join(prefixes[:3])}{more}."
    raise _loading_error(layer_name, [error])


def _read_separate(
    layer_name: str, part: Mapping[str, Any], names: Sequence[str]
) -> dict[str, NDArray[Any] | None]:
    """The parameters by torch's names, and None for names beside them that are no parameter of the layer.

    Where one projection has a bias, those that have none get zeros, which change nothing.
    """
    query, _, _, output = names
    weight_names, bias_names = ([f"{name}.{kind}" for name in names] for kind in ("weight", "bias"))
    if missing := [name for name in weight_names if name not in part]:
        raise _loading_error(layer_name, [_missing(missing)])
    weights = [as_array(part[name]) for name in weight_names]
    arrays: dict[str, NDArray[Any] | None] = dict(zip((*_INPUTS, "out_proj.weight"), weights))
    lengths = {name: weight.shape[:1] for name, weight in zip(bias_names, weights)}
    found, _ = match_state_dict(layer_name, lengths, part, strict=False)
    if found:
        *inputs, arrays["out_proj.bias"] = (
            found[name] if name in found else np.zeros(weight.shape[:1], weight.dtype)
            for name, weight in zip(bias_names, weights)
        )
        arrays["in_proj_bias"] = np.concatenate(inputs)
    arrays |= {name: as_array(part[name]) for name in _EXTRA_KEY if name in part}

    # What stands beside the query or belongs to the output could change the attention: positions, normalised queries.
    known = {*weight_names, *bias_names, *_EXTRA_KEY}
    beside = query[: query.rfind(".") + 1], f"{output}."
    return arrays | {name: None for name in part if name not in known and name.startswith(beside)}


def _infer_widths(
    shapes: Mapping[str, _Shape], num_heads: int, num_kv_heads: int | None, head_dim: int | None
) -> Widths:
    """The widths of a layer with parameters of these shapes; what they leave open is as in torch."""
    num_heads = operator.index(num_heads)

    def share(total: int, parts: int) -> int:
        if total <= 0 or parts <= 0 or total % parts:
            raise ValueError(
                f"{num_heads} heads do not fit parameters of the shapes {dict(shapes)}; if heads have a width of their "
                "own, or keys and values have fewer heads, head_dim or num_kv_heads may say so"
            )
        return total // parts

    for name in ("in_proj_weight", *_INPUTS, "out_proj.weight"):
        if len(shapes.get(name, (0, 0))) != 2:
            raise ValueError(f"{name} must be a matrix, but has shape {shapes[name]}")
    rows, embed_dim = shapes.get("in_proj_weight") or shapes["q_proj_weight"]
    out_dim, features = shapes.get("out_proj.weight", (embed_dim, embed_dim))
    v_head_dim = share(features, num_heads)
    kdim = vdim = embed_dim
    if "in_proj_weight" in shapes:
        if num_kv_heads is None and "bias_v" in shapes:
            num_kv_heads = share(math.prod(shapes["bias_v"]), v_head_dim)
        if num_kv_heads is None:
            head_dim = v_head_dim if head_dim is None else head_dim
            num_kv_heads = share(rows - num_heads * head_dim, head_dim + v_head_dim)
        elif head_dim is None:
            head_dim = share(rows - num_kv_heads * v_head_dim, num_heads + num_kv_heads)
    else:
        head_dim = share(rows, num_heads) if head_dim is None else head_dim
        key_rows, kdim = shapes.get("k_proj_weight", (rows, embed_dim))
        _, vdim = shapes.get("v_proj_weight", (rows, embed_dim))
        num_kv_heads = share(key_rows, head_dim) if num_kv_heads is None else num_kv_heads
    return Widths.from_arguments(embed_dim, num_heads, kdim, vdim, head_dim, v_head_dim, out_dim, num_kv_heads)


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
    with open_checkpoint(path) as checkpoint:
        if checkpoint.config is None:
            raise ValueError(f"{checkpoint.path} was not written by save(); from_state_dict() reads such files")
        try:
            config = json.loads(checkpoint.config)
            for name, kind in _CONFIG.items():
                if type(config[name]) is not kind:
                    raise TypeError(f"{name} is {config[name]!r}")
            dtype = np.dtype(config["dtype"])
            widths = Widths.from_arguments(**{name: config[name] for name in Widths._fields})
            shapes = widths.shapes(config["bias"], config["add_bias_kv"])
            arrays, _ = match_state_dict(layer_name, shapes, checkpoint, strict=True)
            if dtype not in (np.float32, np.float64) or any(array.dtype != dtype for array in arrays.values()):
                raise TypeError(f"its parameters should be of {dtype}, and that float32 or float64")
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint.path} holds no layer: {error}") from error
    told = {*Widths._fields, "bias", "add_bias_kv", "dtype"}
    return ParameterSet(widths, arrays, dtype), {name: config[name] for name in _CONFIG if name not in told}


def _check_state_dict(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.")
    for name in state_dict:
        if not isinstance(name, str):
            raise TypeError(f"the names in a state dict are strings, but one is {name!r}")


def _missing(names: Iterable[str]) -> str:
    return f"Missing key(s) in state_dict: {_quoted(names)}. "


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _loading_error(layer_name: str, errors: Iterable[str]) -> RuntimeError:
    return RuntimeError("Error(s) in loading state_dict for {}:\n\t{}".format(layer_name, "\n\t".join(errors)))
