# SPDX-License-Identifier: Apache-2.0
"""Encoders out of state dicts: their layers are found by names, and config.json gives what arrays do not show."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha_c.parameters.dtypes import joined
from mha_c.parameters.encoder_names import LIBRARIES, MODELS, Model, Names, find_encoder_layers
from mha_c.parameters.loading import arrays_in, first_of, infer_layer, read_array
from mha_c.parameters.options import Config, number_in, open_config, options_shown_by_names, read_config, refusal
from mha_c.parameters.schemes import find_layers
from mha_c.parameters.sets import Widths
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

__all__ = ["ACTIVATIONS", "infer_encoder", "infer_encoder_layer"]

_LAYERS: Final = ("encoder_layers", "num_hidden_layers", "n_layers")
_ACTIVATION: Final = ("hidden_act", "activation_function", "activation")
_EPS: Final = "layer_norm_eps"
# What Hugging Face calls the activations of mha_c.
ACTIVATIONS: Final = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}

# Names beside the self-attention, and entries of a config, of what is not an encoder.
_CROSS_ATTENTION: Final = r"^(encoder_attn|cross_?attn|cross_?attention|multihead_attn)[._]"
_DECODER: Final = ("is_decoder", "add_cross_attention")

_BESIDE_ATTENTION: Final = ("norm1", "norm2", "linear1", "linear2")

_ADVICE: Final = "(strict=False ignores other keys, and takes zeros for missing biases.)"


class _Settings(NamedTuple):
    """The settings that arguments, config and names give.

    `num_heads` is the argument alone: `infer_layer` also reads config.
    """

    config: Mapping[str, Any] | None
    model: Model
    num_heads: int | None
    activation: Any
    layer_norm_eps: float
    norm_first: bool
    will_cast: bool


class _Layer(NamedTuple):
    """The parameters of a layer by torch's names, and their widths."""

    widths: Widths
    dim_feedforward: int
    arrays: dict[str, NDArray[Any]]


def infer_encoder(
    layer_name: str,
    state_dict: Mapping[str, Any],
    prefix: str,
    config: Any = None,
    *,
    num_heads: int | None = None,
    activation: Any = None,
    layer_norm_eps: float | None = None,
    norm_first: bool | None = None,
    strict: bool = True,
    will_cast: bool = False,
) -> tuple[dict[str, Any], int, bool, dict[str, NDArray[Any]]]:
    """The arguments and the parameters of the encoder that a state dict describes, perhaps among other layers.

    Parameters
    ----------
    layer_name : str
        The name of the encoder's class, for the errors.
    state_dict : mapping of str to array or tensor
        The parameters, of which only the encoder's are read.
    prefix, config, num_heads, activation, layer_norm_eps, norm_first, strict
        As for ``TransformerEncoder.from_state_dict``.
    will_cast : bool, default False
        Whether the caller casts the parameters. Without ml_dtypes, those of bfloat16 are then float32.

    Returns
    -------
    options : dict of str to object
        Arguments of ``TransformerEncoderLayer``.
    num_layers : int
    has_final_norm : bool
    arrays : dict of str to numpy.ndarray
        The parameters by the names of ``torch.nn.TransformerEncoder``, not cast yet.

    Raises
    ------
    RuntimeError
        In torch's words, if names or shapes do not fit.
    NotImplementedError
        If the model is not known, or computes something that an encoder does not.
    ValueError
        If no layer with so many heads has such shapes, or arguments and config contradict each other.
    TypeError
        If a name in `state_dict` is not a string, or a required argument is missing.
    ImportError
        If ml_dtypes is needed and not installed.

    Examples
    --------
    >>> shapes = {"attn.qkv": (12, 4), "attn.proj": (4, 4), "norm1": 4, "norm2": 4}
    >>> shapes |= {"mlp.fc1": (6, 4), "mlp.fc2": (4, 6)}
    >>> vit = {f"blocks.0.{name}.weight": np.ones(shape) for name, shape in shapes.items()}
    >>> options, num_layers, has_final_norm, arrays = infer_encoder(
    ...     "TransformerEncoder", vit, "", num_heads=2, activation="gelu", layer_norm_eps=1e-6)
    >>> options["dim_feedforward"], options["norm_first"], num_layers, has_final_norm
    (6, True, 1, False)
    >>> arrays["layers.0.linear1.weight"].shape
    (6, 4)
    """
    flat = _arrays(state_dict, prefix)
    found = find_encoder_layers(flat)
    stack = _find_stack(layer_name, flat, found, prefix, config)
    names = found[f"{stack}0."]
    settings = _read_settings(f"{stack}0.", names, config, num_heads, activation, layer_norm_eps, norm_first, will_cast)
    starts = _find_layers(layer_name, flat, stack, names)
    declared = number_in(settings.config or {}, _LAYERS)
    if declared not in (None, len(starts)):
        raise ValueError(f"config is for {declared} layers, but the state dict has {len(starts)} of them")
    layers = _read_layers(layer_name, flat, starts, names, settings, strict)
    root = stack.removesuffix(names.stack)
    norm = f"{root}{settings.model.norm}."
    options = _options(layers, settings)
    arrays = {f"layers.{i}.{name}": array for i, layer in enumerate(layers) for name, array in layer.arrays.items()}
    has_norm = bool(settings.model.norm) and (f"{norm}weight" in flat or settings.model not in LIBRARIES)
    if has_norm:
        kinds = ("weight", "bias") if options["bias"] or f"{norm}bias" in flat else ("weight",)
        shapes = {norm + kind: (options["d_model"],) for kind in kinds}
        there = [name for name in flat if name.startswith(norm)]
        matched = _match(layer_name, flat, shapes, there, strict, will_cast)
        arrays |= {f"norm.{name.removeprefix(norm)}": array for name, array in matched.items()}
    return options, len(layers), has_norm, arrays


def infer_encoder_layer(
    layer_name: str,
    state_dict: Mapping[str, Any],
    prefix: str,
    config: Any = None,
    *,
    num_heads: int | None = None,
    activation: Any = None,
    layer_norm_eps: float | None = None,
    norm_first: bool | None = None,
    strict: bool = True,
    will_cast: bool = False,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The arguments and the parameters of one layer of an encoder.

    Parameters
    ----------
    layer_name, state_dict, config, num_heads, activation, layer_norm_eps, norm_first, strict, will_cast
        As for `infer_encoder`.
    prefix : str
        How the layer's names begin, except that more may precede, up to a dot.

    Returns
    -------
    options : dict of str to object
        Arguments of ``TransformerEncoderLayer``.
    arrays : dict of str to numpy.ndarray
        The parameters by torch's names, not cast yet.

    Raises
    ------
    RuntimeError, NotImplementedError, ValueError, TypeError, ImportError
        As `infer_encoder`.

    Examples
    --------
    >>> import mha_c
    >>> state_dict = mha_c.TransformerEncoderLayer(4, 2, 6).state_dict(prefix="layers.3.")
    >>> options, arrays = infer_encoder_layer("TransformerEncoderLayer", state_dict, "layers.3.", num_heads=2,
    ...     activation="relu", layer_norm_eps=1e-5, norm_first=False)
    >>> options["d_model"], options["dim_feedforward"]
    (4, 6)
    """
    flat = _arrays(state_dict, prefix)
    found = find_encoder_layers(flat)
    start = _only(layer_name, flat, found, prefix, config, lambda start: f".{start}".endswith(f".{prefix}"))
    settings = _read_settings(start, found[start], config, num_heads, activation, layer_norm_eps, norm_first, will_cast)
    layers = _read_layers(layer_name, flat, [start], found[start], settings, strict)
    return _options(layers, settings), layers[0].arrays


# ---------------------------------------------------------------------------------------------- where it is


def _arrays(state_dict: Mapping[str, Any], prefix: Any) -> dict[str, Any]:
    """The arrays by names with dots; BERT's norms may have TensorFlow's names."""
    check_names(state_dict, prefix)
    torchs = {"gamma": "weight", "beta": "bias"}
    return {
        re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda match: torchs[match[0]], name): array
        for name, array in arrays_in(state_dict).items()
    }


def _find_stack(
    layer_name: str, flat: Mapping[str, Any], found: Mapping[str, Names], prefix: str, config: Any
) -> str:
    """How the names of an encoder's layers begin, up to their numbers."""
    stacks = [start.removesuffix("0.") for start in found if re.search(r"(?<!\d)0\.$", start)]
    return _only(layer_name, flat, stacks, prefix, config, lambda stack: f".{prefix}" in f".{stack}", number="0.")


def _only(
    layer_name: str, flat: Mapping[str, Any], places: Iterable[str], prefix: str, config: Any,
    is_meant: Callable[[str], bool], number: str = "",
) -> str:  # fmt: skip
    """The only place that `prefix` can mean; `number` is that of a stack's first layer. Decoders do not count."""
    places = list(places)
    meant = [place for place in places if place.startswith(prefix)] if number else [p for p in places if p == prefix]
    meant = meant or [place for place in places if is_meant(place)]
    encoders = [place for place in meant if not _cross_attention(flat, place + number)]
    if len(encoders) == 1:
        return encoders[0]
    if meant and not encoders:
        evidence = quoted([_cross_attention(flat, meant[0] + number)])
        raise NotImplementedError(
            f'the layers with prefix="{meant[0]}" belong to a decoder, which attends to another sequence, too (there '
            f"is {evidence}): {layer_name} reads encoders"
        )
    if not meant and any(f".{place}".endswith(f".{prefix}.") for place in places):
        raise loading_error_for_dot(layer_name, prefix)
    if not meant:
        _refuse_unknown(flat, prefix, config)
    choice = first_of((f"prefix={quoted([place])}" for place in encoders or places), 3)
    names = first_of((quoted([name]) for name in Part(flat, prefix)), 8)
    if meant:
        several = f"several {'stacks of layers' if number else 'layers'}: choose one of {choice}."
        raise loading_error(layer_name, [f"prefix={quoted([prefix])} matches {several}"])
    words = f"no encoder layers that mha_c knows fit prefix={quoted([prefix])}."
    found = f"It has {choice}." if choice else f"The names are {names or 'others'}."
    raise loading_error(layer_name, [" ".join([words, advice_on_saved_file(layer_name, Part(flat, prefix)) or found])])


def _cross_attention(flat: Mapping[str, Any], start: str) -> str:
    """The first name in a layer that shows that it attends to another sequence."""
    return next((start + name for name in Part(flat, start) if re.search(_CROSS_ATTENTION, name)), "")


def _refuse_unknown(flat: Mapping[str, Any], prefix: str, config: Any) -> None:
    """Refuse a model whose layers have other names, as far as config or its attention tells what it is."""
    if config is not None:
        config = open_config(config, prefix)
        _check_config(config, read_config(config, prefix))
    attention = find_layers(flat, prefix) or {
        start: scheme for start, scheme in find_layers(flat).items() if f".{prefix}" in f".{start}"
    }
    for start, scheme in attention.items():
        if shown := options_shown_by_names(flat, start):
            raise refusal(shown)
        raise NotImplementedError(
            f"the layer with {quoted([start + scheme.weights[0]])} looks like those of {scheme.models}, but the other "
            f"names in it are not those of an encoder that this version of mha_c knows: {_known_models()}. "
            f"MultiheadAttention.from_state_dict reads its attention alone"
        )


def _known_models() -> str:
    return f"torch, timm, torchvision; {', '.join(sorted(MODELS))}"


def _find_layers(layer_name: str, flat: Mapping[str, Any], stack: str, names: Names) -> list[str]:
    """How the names of the layers begin, all of which must be complete."""
    numbers = {int(match[1]) for name in flat if (match := re.match(rf"{re.escape(stack)}(\d{{1,9}})\.", name))}
    starts = [f"{stack}{i}." for i in range(len(numbers))]
    scales = [scale for scale in names.scales if any(start + scale in flat for start in starts)]
    weights = [start + weight for start in starts for weight in (*names.weights, *scales)]
    missing = [weight for weight in weights if weight not in flat]
    if missing:
        raise loading_error(layer_name, [missing_keys(missing)])
    return starts


# ---------------------------------------------------------------------------------------------- what it computes


def _check_config(config: Mapping[str, Any], of_attention: Config) -> None:
    """Refuse a model that computes something else, as its config shows."""
    if of_attention.shown:
        raise refusal(of_attention.shown)
    for entry in _DECODER:
        if config.get(entry):
            raise NotImplementedError(f'config has "{entry}={config[entry]}": the model is a decoder, not an encoder')
    kind = config.get("model_type")
    if kind is not None and not (isinstance(kind, str) and kind in MODELS):
        raise NotImplementedError(
            f'config has "model_type={kind}", whose encoder this version of mha_c does not know: it knows '
            f"{_known_models()}"
        )


def _find_model(names: Names, config: Mapping[str, Any] | None) -> Model:
    """The model with these names."""
    kind = None if config is None else config.get("model_type")
    if kind is not None:
        if names not in MODELS[kind].names:
            raise ValueError(f'config has "model_type={kind}", but the names are those of {names.models}')
        return MODELS[kind]
    for model in LIBRARIES:
        if names in model.names:
            return model
    if config is None:
        raise TypeError(f"from_state_dict() needs config=, the model's config.json, for {names.models} and the like")
    raise ValueError(
        f'config has no "model_type", which tells {names.models} and models with the same names apart: '
        "pass the config.json of the model, not that of its tokenizer"
    )


def _read_settings(
    start: str, names: Names, config: Any, num_heads: int | None, activation: Any, layer_norm_eps: float | None,
    norm_first: bool | None, will_cast: bool,
) -> _Settings:  # fmt: skip
    """The settings of the encoder with a layer whose names begin with `start`."""
    if config is not None:
        config = open_config(config, start)
    entries = config or {}
    of_attention = read_config(entries, start)
    _check_config(entries, of_attention)
    model = _find_model(names, config)
    from_model: dict[str, Any] = {
        "num_heads": of_attention.num_heads,
        "activation": names.activation or _activation(entries, activation),
        "layer_norm_eps": _eps(entries) if model.eps is None else model.eps,
        "norm_first": model.norm_first,
    }
    given = {
        "num_heads": num_heads,
        "activation": activation,
        "layer_norm_eps": layer_norm_eps,
        "norm_first": norm_first,
    }
    for name, value in given.items():
        if value is not None and not callable(value) and from_model[name] not in (None, value):
            raise ValueError(f"{name} is {value!r}, but the model has {from_model[name]!r}")
    known = {name: from_model[name] if value is None else value for name, value in given.items()}
    if missing := [name for name, value in known.items() if value is None]:
        usual = ", ".join(f"{name}={model.usual[name]!r}" for name in missing if name in model.usual)
        hint = f". Most models of {names.models} have {usual}" if usual else ""
        source = "the state dict does not show" if config is None else "neither the state dict nor config shows"
        raise TypeError(f"from_state_dict() needs {', '.join(missing)}, which {source}{hint}")
    return _Settings(config, model, **known | {"num_heads": num_heads}, will_cast=will_cast)


def _eps(config: Mapping[str, Any]) -> float | None:
    """What norms add to variances, as a config says."""
    eps = config.get(_EPS)
    if eps is not None and not (isinstance(eps, int | float) and 0 <= eps < math.inf):
        raise ValueError(f"config has {_EPS}={eps!r}, but norms need a number of at least 0")
    return eps


def _activation(config: Mapping[str, Any], given: Any) -> str | None:
    """The activation that a config names."""
    name = next((config[entry] for entry in _ACTIVATION if entry in config), None)
    if name is None or isinstance(name, str) and name in ACTIVATIONS:
        return ACTIVATIONS[name] if name else None
    if given is None:
        raise NotImplementedError(f"config has the activation {name!r}, which mha_c does not know: pass activation=")
    return None


def _options(layers: Sequence[_Layer], settings: _Settings) -> dict[str, Any]:
    """The arguments of the layers."""
    widths, dim_feedforward, _ = layers[0]
    if any(layer[:2] != (widths, dim_feedforward) for layer in layers):
        raise ValueError("the layers of the encoder have different widths")
    return {
        "d_model": widths.embed_dim,
        "nhead": widths.num_heads,
        "dim_feedforward": dim_feedforward,
        "activation": settings.activation,
        "layer_norm_eps": settings.layer_norm_eps,
        "batch_first": settings.model.batch_first,
        "norm_first": settings.norm_first,
        "bias": _has_bias(layers),
        "num_kv_heads": widths.num_kv_heads,
        "head_dim": widths.head_dim,
        "v_head_dim": widths.v_head_dim,
    }


# ---------------------------------------------------------------------------------------------- what it consists of


def _read_layers(
    layer_name: str, flat: Mapping[str, Any], starts: Collection[str], names: Names, settings: _Settings, strict: bool
) -> list[_Layer]:
    """The layers, all with biases or all without: where others have a bias, zeros change nothing."""
    besides = [f"{name}.bias" for name in (*names.norms, *names.maps, names.linears[1])] + [*names.scales]
    there = [name for name in besides if any(start + name in flat for start in starts)]
    layers = [_read_layer(layer_name, flat, start, names, there, settings, strict) for start in starts]
    if _has_bias(layers):
        layers = [layer._replace(arrays=_with_all_biases(layer)) for layer in layers]
    return layers


def _read_layer(
    layer_name: str, flat: Mapping[str, Any], start: str, names: Names, besides: Collection[str], settings: _Settings,
    strict: bool,
) -> _Layer:  # fmt: skip
    """One layer, with those of its optional parameters that any layer has."""
    is_torchs = len(names.attention) == 1
    widths, attention = infer_layer(
        layer_name,
        flat,
        f"{start}{names.attention[0]}." if is_torchs else start,
        num_heads=settings.num_heads,
        config=settings.config,
        names=None if is_torchs else names.attention,
        strict=strict,
        will_cast=settings.will_cast,
    )
    norm1, norm2 = names.norms
    second = names.linears[1]
    features, hidden = widths.embed_dim, read_array(flat, f"{start}{second}.weight", settings.will_cast).shape[-1:]
    rows = {name: read_array(flat, f"{start}{name}.weight", settings.will_cast).shape[:1] for name in names.maps}
    if not names.gate and rows[names.linears[0]] != (2 * sum(hidden),):  # gates and what they let through
        rows = dict.fromkeys(rows, hidden)
    shapes: dict[str, tuple[int, ...]] = {f"{second}.weight": (features, *hidden), f"{second}.bias": (features,)}
    for name, count in rows.items():
        shapes |= {f"{name}.weight": (*count, features), f"{name}.bias": count}
    shapes |= {f"{norm}.{kind}": (features,) for norm in names.norms for kind in ("weight", "bias")}
    shapes |= dict.fromkeys(names.scales, (features,))
    wanted = {start + name: shape for name, shape in shapes.items() if name in besides or name.endswith(".weight")}
    in_attention = tuple(f"{name}." for name in names.attention)
    beside = [start + name for name in Part(flat, start) if not name.startswith(in_attention)]
    found = _match(layer_name, flat, wanted, beside, strict, settings.will_cast)
    found = {name.removeprefix(start): array for name, array in found.items()}

    arrays = {f"self_attn.{name}": array for name, array in attention.items()}
    parts = dict(zip(_BESIDE_ATTENTION, ([norm1], [norm2], names.maps, [second])))
    for (name, theirs), kind in itertools.product(parts.items(), ("weight", "bias")):
        if any(f"{one}.{kind}" in found for one in theirs):
            zeros = {one: np.zeros(shapes[f"{one}.{kind}"], np.float32) for one in theirs}
            arrays[f"{name}.{kind}"] = joined(found.get(f"{one}.{kind}", zeros[one]) for one in theirs)
    for name, scale in zip(("self_attn.out_proj", "linear2"), names.scales):
        if scale in found:
            arrays |= _scaled(arrays, name, found[scale])
    return _Layer(widths, sum(hidden), arrays)


def _match(
    layer_name: str, flat: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], beside: Iterable[str],
    strict: bool, will_cast: bool,
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """The arrays with these names; `beside` are all names that may be there."""
    entries: dict[str, Any] = dict.fromkeys(beside)
    entries |= {name: read_array(flat, name, will_cast) for name in shapes if name in flat}
    return match_state_dict(layer_name, shapes, entries, strict, advice=_ADVICE)[0]


def _scaled(arrays: Mapping[str, NDArray[Any]], name: str, scale: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """A map whose outputs are multiplied by numbers: (s W) x + s b is s (W x + b). Products are rounded once."""
    scale = scale.astype(np.float64)
    scaled = {f"{name}.weight": arrays[f"{name}.weight"] * scale[:, None]}
    if f"{name}.bias" in arrays:
        scaled[f"{name}.bias"] = arrays[f"{name}.bias"] * scale
    return scaled


def _has_bias(layers: Iterable[_Layer]) -> bool:
    return any(name.endswith("bias") for layer in layers for name in layer.arrays)


def _with_all_biases(layer: _Layer) -> dict[str, NDArray[Any]]:
    """The arrays of a layer, with zeros for the biases that it lacks."""
    shapes = {f"self_attn.{name}": shape for name, shape in layer.widths.shapes(True, False).items()}
    shapes |= {f"{name}.bias": layer.arrays[f"{name}.weight"].shape[:1] for name in _BESIDE_ATTENTION}
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name.endswith("bias")}
    return {**zeros, **layer.arrays}
