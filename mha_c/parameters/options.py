# SPDX-License-Identifier: Apache-2.0
"""What models compute in their attention and a layer does not, as names in a state dict and a config.json show it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from mha_c.parameters.state_dict import quoted
from mha_c.parameters.stored import damage_is_value_error

__all__ = ["Config", "number_in", "open_config", "options_shown_by_names", "read_config", "refusal", "usual"]

_OPTIONS: Final = {
    "rope": "rotates queries and keys by their positions",
    "qk_norm": "normalises queries and keys",
    "scale": "does not divide scores by the square root of head_dim",
    "softcap": "caps scores",
    "window": "lets a query see only the keys near it",
    "alibi": "lowers the scores of distant keys",
    "bias": "adds a bias to scores that depends on relative positions",
    "sinks": "has attention sinks",
    "kv_heads": "lets head h read the key and value head h % num_kv_heads",
    "approximation": "approximates attention",
}

_ROPE: Final = r"rotary|inv_freq|freqs_cis|(^|[._])rope([._]|$)"

# Names beside the projections, and names in a module that contains the layer.
_BESIDE: Final = {
    "rope": _ROPE,
    "qk_norm": r"(^|[._])((qk?|k|query|key)_?(layer_?)?(norm|ln)|(layer_?)?(norm|ln)_?[qk])([._]|$)",
    "alibi": r"alibi",
    "bias": r"relative_|rel_pos|rel_attn|distance_embedding|position_bias|pos_bias|linear_pos",
    "sinks": r"(^|[._])sinks?([._]|$)",
}
_ABOVE: Final = {
    "rope": _ROPE,
    "alibi": r"alibi",
    "bias": r"rel_pos|relative_(attention|position)_bias|embed_positions\.pe_k",
}

# Entries of a Hugging Face config.json, written as name=value. What is null, zero or empty is written as False, and a
# container as True. Models that do not show an option otherwise are listed by their type.
_ENTRIES: Final = {
    "rope": r"(rope|rotary).*=(?!False)|position_embeddings?_type=rotary"
    r"|^model_type=(llama|falcon|gptj|codegen|roformer)$",
    "qk_norm": r"qk_(layer_?)?norm=(?!False)",
    "scale": r"^(query_pre_attn_scalar|attention_multiplier|scale_attn_by_inverse_layer_idx|qk_scale.*)=(?!False)"
    r"|scale_attn_weights=False|^model_type=(gpt_neo|t5|mt5|umt5|longt5|switch_transformers|udop|pop2piano)$",
    "softcap": r"attn.*softcap.*=(?!False)",
    "window": r"^(sliding_window.*|attention_window)=(?!False)",
    "alibi": r"^alibi=True|position_embeddings?_type=alibi|^model_type=(bloom|mpt)$",
    "bias": r"(relative_(attention|position)|rel_pos).*=(?!False)|position_embeddings?_type=relative",
    "sinks": r"(^|_)sinks?(_.*)?=(?!False)",
    "approximation": r"attention_type=block_sparse|^model_type=(nystromformer|yoso|mra)$",
}

# The parts of a model, by what the names of their layers and the entries of a config.json begin with.
_PARTS: Final = ("text", "vision")

_HEADS: Final = ("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads")
_KV_HEADS: Final = ("num_key_value_heads", "num_kv_heads")
_HEAD_DIM: Final = ("head_dim", "d_kv")
_EMBED_DIM: Final = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim")


class Config(NamedTuple):
    """What a model's config tells of its attention layers, None where it does not say; and what shows an option."""

    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    embed_dim: int | None = None
    shown: Mapping[str, str] = {}


def open_config(source: Any, start: str) -> Mapping[str, Any]:
    """The configuration of a Hugging Face model, or of the part of it to which a layer belongs.

    Parameters
    ----------
    source : mapping of str to object, or str or path-like
        The configuration, or its file ``config.json``.
    start : str
        How the layer's names begin. "text_model." or "vision_model." in it tells the part.

    Returns
    -------
    mapping of str to object

    Raises
    ------
    ValueError
        If a file is damaged, or holds something else.
    TypeError
        If `source` is neither a mapping nor a path.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> clip = {"model_type": "clip", "text_config": {"num_attention_heads": 8}, "vision_config": {}}
    >>> open_config(clip, "text_model.encoder.layers.0.")
    {'model_type': 'clip_text_model', 'num_attention_heads': 8}
    """
    if isinstance(source, str | os.PathLike):
        try:
            opened = open(source, "rb")
        except IsADirectoryError as error:
            error.strerror = f"{error.strerror} (pass config={os.path.join(os.fsdecode(source), 'config.json')!r})"
            raise
        with opened as file, damage_is_value_error(os.fspath(source)):
            path, source = source, json.load(file)
        if not isinstance(source, Mapping):
            raise ValueError(
                f"{os.fsdecode(path)} does not hold a mapping, as a model's config.json does, but {source!r:.40}"
            )
    if not isinstance(source, Mapping):
        raise TypeError(f"config must be a mapping, such as model.config.to_dict(), or a path, but got {type(source)}")
    for part in _PARTS:
        config = source.get(f"{part}_config")
        if isinstance(config, Mapping) and f".{part}_model." in f".{start}":
            return {"model_type": f"{source.get('model_type')}_{part}_model", **config}
    return source


def read_config(source: Any, start: str) -> Config:
    """Read the configuration of a Hugging Face model.

    Parameters
    ----------
    source : mapping of str to object, or str or path-like
        The configuration, or its file ``config.json``.
    start : str
        How the layer's names begin, which tells encoders and decoders apart, and the parts of `open_config`.

    Returns
    -------
    Config

    Raises
    ------
    ValueError
        If a file is damaged, or holds several configurations, of parts of the model.
    TypeError
        If `source` is neither a mapping nor a path.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> config = read_config({"num_attention_heads": 12, "hidden_size": 768, "alibi": True}, "")
    >>> config.num_heads, config.embed_dim, config.shown
    (12, 768, {'alibi': 'its config has "alibi=True"'})
    """
    source = open_config(source, start)
    heads = number_in(source, _HEADS) or _heads_of_part(source, start)
    if heads is None:
        parts = [name for name, value in source.items() if isinstance(value, Mapping) and number_in(value, _HEADS)]
        if parts:
            which = " or ".join(f"config[{name!r}]" for name in parts)
            raise ValueError(f"config has the heads of several parts of the model: pass {which}")
    is_multi_query = source.get("multi_query") and not source.get("new_decoder_architecture")
    kv_heads = 1 if is_multi_query else number_in(source, _KV_HEADS)
    shown = _options_shown_by_config(source)
    return Config(heads, kv_heads, number_in(source, _HEAD_DIM), number_in(source, _EMBED_DIM), shown)


def number_in(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The first of these entries of a config that is a positive number.

    Examples
    --------
    >>> number_in({"n_layers": 6, "dim": 768}, ["num_hidden_layers", "n_layers"])
    6
    """
    return next((config[name] for name in names if type(config.get(name)) is int and config[name] > 0), None)


def _heads_of_part(config: Mapping[str, Any], start: str) -> int | None:
    """The heads of the encoder or of the decoder, whichever the layer's names mention first."""
    heads = {part: number_in(config, [f"{part}_attention_heads"]) for part in ("encoder", "decoder")}
    if heads["encoder"] == heads["decoder"]:
        return heads["encoder"]
    mentioned = re.search("encoder|decoder", start)
    return heads[mentioned[0]] if mentioned else None


def _options_shown_by_config(config: Mapping[str, Any]) -> dict[str, str]:
    shown: dict[str, str] = {}
    for name, value in config.items():
        is_container = isinstance(value, Mapping | list)
        entry = f"{name}={bool(value) if is_container else value or False}"
        for option, pattern in _ENTRIES.items():
            if re.search(pattern, entry):
                shown.setdefault(option, f"its config has {quoted([name if is_container else entry])}")
    return shown


def options_shown_by_names(names: Iterable[str], start: str) -> dict[str, str]:
    """What the names in a state dict say about one layer.

    Parameters
    ----------
    names : iterable of str
        The names of the whole state dict.
    start : str
        How the names of the layer begin.

    Returns
    -------
    dict of str to str
        What shows an option, by option.

    Examples
    --------
    >>> options_shown_by_names(["model.rotary_emb.inv_freq", "model.attn.q_proj.weight"], "model.attn.")
    {'rope': 'there is "model.rotary_emb.inv_freq"'}
    """
    shown: dict[str, str] = {}
    for name in names:
        is_beside = name.startswith(start)
        for option, pattern in (_BESIDE if is_beside else _ABOVE).items():
            match = re.search(pattern, name[len(start) :] if is_beside else name)
            if match and (is_beside or start.startswith(name[: name.rfind(".", 0, match.start()) + 1])):
                shown.setdefault(option, f"there is {quoted([name])}")
    return shown


def refusal(shown: Mapping[str, str]) -> NotImplementedError:
    """The error for a model that computes something else.

    Parameters
    ----------
    shown : mapping of str to str
        What shows it, by option.

    Returns
    -------
    NotImplementedError

    Examples
    --------
    >>> print(refusal({"sinks": 'there is "sinks"'}))
    this model has attention sinks (sinks: there is "sinks"), which this version of mha_c does not compute
    """
    reasons = " and ".join(f"{_OPTIONS[option]} ({option}: {evidence})" for option, evidence in shown.items())
    return NotImplementedError(f"this model {reasons}, which this version of mha_c does not compute")


def usual(options: Iterable[str]) -> str:
    """What models of a kind usually do, in words.

    Parameters
    ----------
    options : iterable of str
        The options that it would need.

    Returns
    -------
    str

    Examples
    --------
    >>> usual(["rope"])
    'usually rotates queries and keys by their positions (rope)'
    """
    return "usually " + " and ".join(f"{_OPTIONS[option]} ({option})" for option in options)
