# SPDX-License-Identifier: Apache-2.0
"""A layer out of a state dict: its parameters are found by their names, its widths by their shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha_c.parameters.arrays import as_array
from mha_c.parameters.checks import positive
from mha_c.parameters.dtypes import is_real, joined
from mha_c.parameters.options import Config, options_shown_by_names, read_config, refusal, usual
from mha_c.parameters.schemes import SCHEMES, Layout, Scheme, find_layers, schemes_named
from mha_c.parameters.sets import PARAMETERS, SEPARATE_WEIGHTS, Widths
from mha_c.parameters.state_dict import (
    Part,
    advice_on_saved_file,
    check_names,
    loading_error,
    loading_error_for_dot,
    match_state_dict,
    missing_keys,
    quoted,
)
from mha_c.parameters.stored import Opaque, StoredArray

__all__ = ["arrays_in", "first_of", "infer_layer", "read_array"]

_BIASES: Final = ("in_proj_bias", "out_proj.bias")
_EXTRA_KEY: Final = ("bias_k", "bias_v")

# The longest name in nested mappings. In a hostile file, many names could share much longer beginnings.
_MAX_LENGTH: Final = 500

_ADVICE: Final = "(strict=False ignores keys beside the layer's, and takes zeros for a missing bias.)"


class _Place(NamedTuple):
    """Where a layer is: a state dict, how the layer's names begin there, and what kind of names they are."""

    state_dict: Mapping[str, Any]
    start: str
    scheme: Scheme
    will_cast: bool

    @property
    def part(self) -> Part:
        return Part(self.state_dict, self.start)

    def read(self, name: str) -> NDArray[Any]:
        return read_array(self.part, name, self.will_cast)


class _Heads(NamedTuple):
    """What arguments, a config or shapes tell of the heads."""

    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None


def infer_layer(
    layer_name: str,
    state_dict: Mapping[str, Any],
    prefix: str,
    *,
    num_heads: int | None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    config: Any = None,
    names: Sequence[str] | None = None,
    layout: Layout | None = None,
    strict: bool = True,
    will_cast: bool = False,
) -> tuple[Widths, dict[str, NDArray[Any]]]:
    """The widths and the parameters of the layer that a state dict describes, perhaps among others.

    Parameters
    ----------
    layer_name : str
        The name of the layer's class, for the errors.
    state_dict : mapping of str to array or tensor
        The parameters, of which only the layer's are read.
    prefix, num_heads, num_kv_heads, head_dim, config, names, layout, strict
        As for ``MultiheadAttention.from_state_dict``.
    will_cast : bool, default False
        Whether the caller casts the parameters. Without ml_dtypes, those of bfloat16 are then float32.

    Returns
    -------
    Widths
    dict of str to numpy.ndarray
        The parameters by torch's names, not cast yet.

    Raises
    ------
    RuntimeError
        In torch's words, if names or shapes do not fit.
    NotImplementedError
        If the model computes something that a layer does not.
    ValueError
        If no layer with so many heads has such shapes, a required argument is missing, or what is given contradicts
        itself.
    TypeError
        If a name in `state_dict` is not a string, or nothing tells the number of heads.
    ImportError
        If ml_dtypes is needed and not installed.

    Examples
    --------
    >>> state_dict = {f"{name}.weight": np.eye(4) for name in ("query", "key", "value", "output")}
    >>> widths, arrays = infer_layer(
    ...     "Layer", state_dict, "", num_heads=2, names=["query", "key", "value", "output"])
    >>> widths.head_dim, {name: array.shape for name, array in arrays.items()}
    (2, {'in_proj_weight': (12, 4), 'out_proj.weight': (4, 4)})
    """
    check_names(state_dict, prefix)
    if layout not in (None, "stacked", "per_head"):
        raise ValueError(f'layout must be "stacked" or "per_head", but got {layout!r}')
    place = _find(layer_name, state_dict, prefix, SCHEMES if names is None else schemes_named(names), will_cast)
    told = Config() if config is None else read_config(config, place.start)
    is_vouched = names is not None and not strict  # the caller says that the model computes nothing besides
    _refuse_more(place, told, has_config=config is not None, is_vouched=is_vouched)
    heads = _told_heads(told, num_heads, num_kv_heads, head_dim)
    arrays, heads = _read(layer_name, place, layout, heads, strict)
    widths = _infer_widths(place, {name: array.shape for name, array in arrays.items()}, heads)
    _check_widths(place, widths, None if num_heads is not None else told.embed_dim, is_vouched)
    return widths, _complete(layer_name, place, widths, _with_stacked_weight(layer_name, widths, arrays), strict)


# ---------------------------------------------------------------------------------------------- where it is


def _find(
    layer_name: str, state_dict: Mapping[str, Any], prefix: str, schemes: Sequence[Scheme], will_cast: bool
) -> _Place:
    """Where `prefix` says that the layer is, or the only place whose names end like that, also in nested mappings."""
    scheme = find_layers(state_dict, prefix, schemes).get(prefix)
    if scheme is not None:
        return _Place(state_dict, prefix, scheme, will_cast)
    flat = arrays_in(state_dict)
    prefix = _plain(prefix)
    found = find_layers(flat, prefix, schemes)
    start = prefix if prefix in found or len(found) != 1 else next(iter(found))
    if start in found:
        return _Place(flat, start, found[start], will_cast)
    if not found and prefix and (with_dot := find_layers(flat, f"{prefix}.", schemes)):
        if f"{prefix}." in with_dot or len(with_dot) == 1:
            raise loading_error_for_dot(layer_name, prefix)
    raise loading_error(layer_name, [" ".join(_what_there_is(state_dict, flat, prefix, schemes, list(found)))])


def arrays_in(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays in a mapping and in those nested in it, and objects of files that are not read.

    Parameters
    ----------
    mapping : mapping of str to object
        The mapping.

    Returns
    -------
    dict of str to array
        By names with dots. What can be reached by several names has the first of them.

    Raises
    ------
    ValueError
        If two of them have the same name.

    Examples
    --------
    >>> arrays_in({"epoch": 3, "model": {"weight": np.ones(2)}})
    {'model.weight': array([1., 1.])}
    """
    arrays: dict[str, Any] = {}
    for name, array in _walk(mapping, "", {id(mapping): mapping}):
        if name in arrays:
            raise ValueError(f'two arrays in the state dict are called "{name}"')
        arrays[name] = array
    return arrays


def _walk(mapping: Mapping[str, Any], start: str, seen: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    """Names and arrays; `seen` keeps mappings alive, so that no new one has the number of an old one."""
    for key, value in mapping.items():
        name = start + _plain(key) if isinstance(key, str) else ""
        if not 0 < len(name) <= _MAX_LENGTH:
            continue
        if _is_array(value) or isinstance(value, Opaque):
            yield name, value
        elif isinstance(value, Mapping) and id(value) not in seen:
            seen[id(value)] = value
            yield from _walk(value, f"{name}.", seen)


def _plain(name: str) -> str:
    """A name as torch would write it; those of Keras and TensorFlow have slashes, and may end in a number."""
    return name.replace("/", ".").removesuffix(":0")


def _is_array(value: Any) -> bool:
    return isinstance(value, StoredArray) or hasattr(value, "shape") and not isinstance(value, np.generic)


def _what_there_is(
    state_dict: Mapping[str, Any], flat: Mapping[str, Any], prefix: str, schemes: Sequence[Scheme], found: Sequence[str]
) -> Iterator[str]:
    """Sentences for the error if the layer is not where `prefix` says, or in several places."""
    under = set(Part(flat, prefix))
    begun = max(schemes, key=lambda scheme: len(under.intersection(scheme.weights)))
    if len(under.intersection(begun.weights)) > 1 or len(schemes) < len(SCHEMES):
        yield missing_keys(prefix + weight for weight in begun.weights if weight not in under).strip()
    else:
        yield missing_keys([prefix + "in_proj_weight"]).strip()
    elsewhere = found or sorted(find_layers(flat), key=lambda start: not start.startswith(prefix))
    if elsewhere:
        yield f"It has layers with {first_of((f'prefix={quoted([start])}' for start in elsewhere), 3)}."
    if not any(_is_array(value) for value in flat.values()):
        other = (f"{quoted([str(name)])} ({_kind(value)})" for name, value in state_dict.items())
        yield f"It holds no arrays{', but ' if state_dict else ''}{first_of(other, 8)}."
    elif under and not (elsewhere and elsewhere[0].startswith(prefix)):
        beginning = f" that begin with {quoted([prefix])}" if prefix else ""
        yield f"The names{beginning} are {first_of((quoted([name]) for name in Part(flat, prefix)), 8)}."
        yield advice_on_saved_file("MultiheadAttention", under) or (
            "names=(query, key, value, output) says what to take, or two names if one weight holds the first three."
        )


def first_of(words: Iterable[str], most: int) -> str:
    """The first words in a sentence, and how many more there are.

    Examples
    --------
    >>> first_of(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    words = list(words)
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _kind(value: Any) -> str:
    return value.name if isinstance(value, Opaque) else type(value).__name__


def _refuse_more(place: _Place, told: Config, has_config: bool, is_vouched: bool) -> None:
    """Refuse a model that computes more than a layer, as far as its config and its names show it."""
    shown = {**told.shown, **({} if is_vouched else options_shown_by_names(place.state_dict, place.start))}
    if shown:
        raise refusal(shown)
    scheme = place.scheme
    if scheme.options and not has_config and not is_vouched:
        raise NotImplementedError(
            f"the layer with {quoted([place.start + scheme.weights[0]])} looks like those of {scheme.models}, whose "
            f"attention {usual(scheme.options)}, which this version of mha_c does not compute. If this is another "
            f"model, pass its config.json as config=, or names={scheme.names} and strict=False"
        )


def _unexpected(place: _Place) -> list[str]:
    """The names of arrays that stand beside the projections and could change what the layer computes."""
    scheme = place.scheme
    query = scheme.names[0]
    known = {*scheme.weights, *scheme.biases, *_EXTRA_KEY} if scheme.kind else {*PARAMETERS}
    beside = (query[: query.rfind(".") + 1], *(f"{name}." for name in scheme.names))
    names = (name for name in place.part if name not in known and name.startswith(beside))
    return [name for name in names if not name.startswith(scheme.beside) and _is_array(place.part[name])]


# ------------------------------------------------------------------------------------------- what it consists of


def _told_heads(told: Config, *given: int | None) -> _Heads:
    """What arguments, in the order of `_Heads`, and config tell together."""
    checked = (None if number is None else positive(name, number) for name, number in zip(_Heads._fields, given))
    return _agree(_Heads(*checked), "config", _Heads(told.num_heads, told.num_kv_heads, told.head_dim))


def _agree(ours: _Heads, source: str, theirs: _Heads) -> _Heads:
    """What two sources tell together."""
    for name, one, other in zip(_Heads._fields, ours, theirs):
        if None not in (one, other) and one != other:
            raise ValueError(f"{name} is {one}, but {source} says {other}")
    return _Heads(*(other if one is None else one for one, other in zip(ours, theirs)))


def _known(heads: _Heads) -> int:
    """The number of heads."""
    if heads.num_heads is None:
        raise TypeError(
            "from_state_dict() needs num_heads, which the shapes do not show, or config=, the model's config.json"
        )
    return heads.num_heads


def read_array(part: Mapping[str, Any], name: str, will_cast: bool = False) -> NDArray[Any]:
    """An array of real numbers in a state dict.

    Parameters
    ----------
    part : mapping of str to array or tensor
        The state dict.
    name : str
        The name of the array.
    will_cast : bool, default False
        Whether the caller casts the numbers. Without ml_dtypes, those of bfloat16 are then float32.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    TypeError, ValueError
        If it is something else. The message begins with the name.
    ImportError
        If ml_dtypes is needed and not installed.

    Examples
    --------
    >>> read_array({"weight": np.ones(2)}, "weight")
    array([1., 1.])
    """
    try:
        array = as_array(part[name], will_cast)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except ImportError as error:
        if _can_be_cast(part[name]):
            raise ImportError(f'{error}; or pass dtype="float32"') from error
        raise
    if not is_real(array.dtype):
        raise ValueError(f"{name}: expected real numbers, but got {array.dtype}")
    return array


def _can_be_cast(value: Any) -> bool:
    """Whether numbers that cannot be read as they are can be read for a caller who casts them."""
    try:
        as_array(value, will_cast=True)
    except ImportError:
        return False
    return True


def _read(
    layer_name: str, place: _Place, layout: Layout | None, heads: _Heads, strict: bool
) -> tuple[dict[str, NDArray[Any]], _Heads]:
    """The parameters by torch's names, and what shapes tell of the heads."""
    if place.scheme.kind:
        return _read_foreign(layer_name, place, layout or place.scheme.layout, heads, strict)
    return {name: place.read(name) for name in PARAMETERS if name in place.part}, heads


def _read_foreign(
    layer_name: str, place: _Place, layout: Layout | None, heads: _Heads, strict: bool
) -> tuple[dict[str, NDArray[Any]], _Heads]:
    """The parameters of projections with other names, by torch's names, and what shapes tell of the heads."""
    part, scheme = place.part, place.scheme
    weights = [place.read(name) for name in scheme.weights]
    biases = {name: place.read(name) for name in scheme.biases if name in part}
    if scheme.kind == ".kernel" and len(weights) == 4 and weights[0].ndim == 3:
        weights, by_shape = _without_head_axis(scheme.weights, weights)
        biases = {name: bias.reshape(-1) for name, bias in biases.items()}
        heads = _agree(heads, "the shape of the kernels", by_shape)
    for name, weight in zip(scheme.weights, weights):
        _check_rank(name, weight, 2)
    if scheme.kind == ".kernel":
        weights = [weight.T for weight in weights]
    if scheme.shape_tells and _is_transposed(scheme.weights[-2], weights[-2], biases.get(scheme.biases[-2])):
        weights = [weight.T for weight in weights]
    lengths = {name: weight.shape[:1] for name, weight in zip(scheme.biases, weights)}
    biases, _ = match_state_dict(layer_name, lengths, biases, strict=False)
    if strict and (missing := _missing_biases(scheme.biases, biases)):
        raise loading_error(layer_name, [missing_keys(place.start + name for name in missing), _ADVICE])

    order = _order(scheme.weights[-2], weights, layout, heads)
    inputs = _inputs(weights, order)
    arrays = dict(zip(SEPARATE_WEIGHTS if len(inputs) == 3 else ("in_proj_weight",), inputs))
    arrays["out_proj.weight"] = weights[-1]
    if biases:
        zeros: dict[str, NDArray[Any]] = {name: np.zeros(length, np.float32) for name, length in lengths.items()}
        complete = list((zeros | biases).values())
        arrays["in_proj_bias"] = joined(_inputs(complete, order))
        arrays["out_proj.bias"] = complete[-1]
    arrays |= {name: place.read(name) for name in _EXTRA_KEY if name in part}
    return arrays, heads


def _check_rank(name: str, weight: NDArray[Any], rank: int) -> None:
    if weight.ndim != rank:
        kind = "matrix" if rank == 2 else f"{rank}-D array"
        raise ValueError(f"{name} must be a {kind}, but has shape {weight.shape}")


def _without_head_axis(
    names: Sequence[str], kernels: Sequence[NDArray[Any]]
) -> tuple[list[NDArray[Any]], _Heads]:
    """Kernels (in, heads, head_dim), for the output (heads, head_dim, out), as (in, out); and what they tell."""
    for name, kernel in zip(names, kernels):
        _check_rank(name, kernel, 3)
    *inputs, output = kernels
    matrices = [kernel.reshape(kernel.shape[0], kernel.shape[1] * kernel.shape[2]) for kernel in inputs]
    matrices.append(output.reshape(output.shape[0] * output.shape[1], output.shape[2]))
    query, key, _ = inputs
    return matrices, _Heads(query.shape[1], key.shape[1], query.shape[2])


def _is_transposed(name: str, weight: NDArray[Any], bias: NDArray[Any] | None) -> bool:
    """Whether the weight of several projections is (in, out): there are as many biases as outputs, or more outputs."""
    rows, columns = weight.shape
    if rows == columns:
        raise ValueError(f"{name} has shape {weight.shape}, which does not tell whether it is transposed")
    return bool(columns == (max(rows, columns) if bias is None else bias.size))


def _missing_biases(names: Sequence[str], biases: Mapping[str, Any]) -> list[str]:
    """The biases of inputs that are missing although others are there; that of keys alone changes nothing (Whisper)."""
    inputs = names[:-1]
    required = [name for name in inputs if len(inputs) < 3 or name != inputs[1]]
    return [name for name in required if name not in biases and not biases.keys().isdisjoint(inputs)]


def _order(
    name: str, weights: Sequence[NDArray[Any]], layout: Layout | None, heads: _Heads
) -> NDArray[Any] | None:
    """The rows of the weight with several projections, one projection after the other; None if they lie like that."""
    if len(weights) == 4:
        return None
    if layout is None:
        raise ValueError(
            f'{name} holds several projections, and its name does not tell in which order: pass layout="stacked" if '
            'they lie one below the other, layout="per_head" if they lie head by head (GPT-NeoX, BLOOM, Falcon)'
        )
    rows, features = len(weights[-2]), weights[-1].shape[1]
    if layout == "stacked":
        if len(weights) == 3 and rows % 2:
            raise ValueError(f"{name} has {rows} rows, which keys and values cannot share")
        return None
    num_heads = _known(heads)
    queries = num_heads if len(weights) == 2 else 0
    head_dim = features // num_heads
    num_kv_heads = (rows // max(head_dim, 1) - queries) // 2
    fits = rows == (queries + 2 * num_kv_heads) * head_dim and features == num_heads * head_dim
    if not fits or num_kv_heads <= 0 or num_heads % num_kv_heads or heads.num_kv_heads not in (None, num_kv_heads):
        raise ValueError(f"{name} has {rows} rows, which do not fit {num_heads} heads with a width of {head_dim}")
    numbers = np.arange(rows).reshape(num_kv_heads, -1, head_dim)  # of a head: its queries, its key, its value
    return np.concatenate([numbers[:, :-2].ravel(), numbers[:, -2].ravel(), numbers[:, -1].ravel()])


def _inputs(arrays: Sequence[NDArray[Any]], order: NDArray[Any] | None) -> list[NDArray[Any]]:
    """What belongs to query, key and value one by one; or together, if one array holds all three."""
    *first, several, _ = arrays
    if order is not None:
        several = several[order]
    return [*first, *np.split(several, 2)] if len(first) == 1 else [*first, several]


def _shapes(place: _Place) -> str:
    """The weights of a layer, as they are called and stored."""
    names = place.scheme.weights if place.scheme.kind else [name for name in PARAMETERS if name.endswith("weight")]
    return " and ".join(f"{name} {place.read(name).shape}" for name in names if name in place.part)


def _infer_widths(place: _Place, shapes: Mapping[str, tuple[int, ...]], heads: _Heads) -> Widths:
    """The widths of a layer with parameters of these shapes; what they leave open is as in torch."""
    num_heads, num_kv_heads, head_dim = _known(heads), heads.num_kv_heads, heads.head_dim

    def share(total: int, parts: int) -> int:
        if total > 0 and total % parts == 0:
            return total // parts
        name = place.scheme.weights[0]
        if out_dim == rows < embed_dim and "in_proj_weight" in shapes:
            raise ValueError(f"{name} has the shape {(rows, embed_dim)}: it is transposed, so pass its .T")
        given = ", ".join(f"{name}={number}" for name, number in zip(_Heads._fields, heads) if number is not None)
        raise ValueError(
            f"{given} does not fit {_shapes(place)}: take num_heads, and where the model has them num_kv_heads and "
            "head_dim, from its configuration"
        )

    for name in ("in_proj_weight", *SEPARATE_WEIGHTS, "out_proj.weight"):
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
    if heads.num_kv_heads is None:
        share(num_heads, num_kv_heads)
    return Widths.from_arguments(embed_dim, num_heads, kdim, vdim, head_dim, v_head_dim, out_dim, num_kv_heads)


def _check_widths(place: _Place, widths: Widths, told_embed_dim: int | None, is_vouched: bool) -> None:
    """Refuse heads that models with these names share in another way, and a config that is for another layer."""
    if place.scheme.interleaves and not is_vouched and 1 < widths.num_kv_heads < widths.num_heads:
        raise refusal({"kv_heads": f"it has {widths.num_kv_heads} of them for {widths.num_heads} heads"})
    if told_embed_dim not in (None, widths.embed_dim):
        raise ValueError(
            f"config is for layers with {told_embed_dim} features, but this one has {widths.embed_dim}: pass num_heads"
        )


def _with_stacked_weight(
    layer_name: str, widths: Widths, arrays: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """The parameters with separate projections stacked, where a layer of these widths has them so."""
    if not widths.is_stacked or "in_proj_weight" in arrays:
        return arrays
    features = (widths.embed_dim, widths.kdim, widths.vdim)
    separate = dict(zip(SEPARATE_WEIGHTS, zip(widths.rows, features)))
    inputs, _ = match_state_dict(layer_name, separate, arrays, strict=False)
    if len(inputs) < len(SEPARATE_WEIGHTS):
        return arrays
    others = {name: array for name, array in arrays.items() if name not in inputs}
    return {**others, "in_proj_weight": joined(inputs.values())}


def _complete(
    layer_name: str, place: _Place, widths: Widths, arrays: dict[str, NDArray[Any]], strict: bool
) -> dict[str, NDArray[Any]]:
    """All parameters of a layer. Without `strict`, other arrays do not count, and zeros stand for a missing bias."""
    shapes = widths.shapes(any(name in arrays for name in _BIASES), any(name in arrays for name in _EXTRA_KEY))
    if strict:
        entries: dict[str, Any] = arrays | dict.fromkeys(_unexpected(place))
    else:
        zeros = {name: np.zeros(shapes[name], np.float32) for name in _BIASES if name in shapes}
        entries = {name: array for name, array in (zeros | arrays).items() if name in shapes}
    advice = advice_on_saved_file(layer_name, entries) or _ADVICE if strict else ""
    return match_state_dict(layer_name, shapes, entries, strict=True, advice=advice)[0]
