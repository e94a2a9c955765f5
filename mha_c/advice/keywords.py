# SPDX-License-Identifier: Apache-2.0
"""Keywords that a function does not have: misspelt ones, and those by which other libraries know its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, ParamSpec, TypeVar

from mha_c import _core

__all__ = ["knows_foreign_keywords"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# What other classes of torch, Hugging Face, Keras and flash-attention call the arguments of our functions.
_FOREIGN_NAMES: Final = {
    "embed_dim": "d_model dim hidden_size embedding_dim",
    "d_model": "dim embed_dim embedding_dim hidden_size n_embd",
    "num_heads": "heads n_head n_heads nhead nheads num_attention_heads",
    "nhead": "heads n_head n_heads nheads num_attention_heads num_heads",
    "dim_feedforward": "d_ff dim_ff ffn_dim hidden_dim intermediate_size mlp_dim",
    "layer_norm_eps": "eps epsilon layer_norm_epsilon norm_eps rms_norm_eps",
    "num_layers": "depth n_layer n_layers num_hidden_layers",
    "in_features": "d_in in_dim input_dim",
    "out_features": "d_out out_dim output_dim units",
    "num_kv_heads": "kv_heads n_kv_heads num_key_value_heads",
    "head_dim": "dim_head key_dim",
    "v_head_dim": "value_dim",
    "activation": "act activation_fn activation_function hidden_act hidden_activation",
    "dropout": "attention_dropout attention_probs_dropout_prob dropout_p dropout_rate hidden_dropout_prob",
    "dropout_p": "attention_dropout attention_probs_dropout_prob dropout dropout_rate",
    "bias": "beta qkv_bias use_bias",
    "query": "q queries",
    "key": "k keys",
    "value": "v values",
    "attn_mask": "mask src_mask tgt_mask memory_mask",
    "src_mask": "attn_mask mask",
    "tgt_mask": "attn_mask mask",
    "mask": "attn_mask src_mask",
    "key_padding_mask": "mask key_mask padding_mask src_key_padding_mask tgt_key_padding_mask memory_key_padding_mask",
    "src_key_padding_mask": "key_mask key_padding_mask padding_mask",
    "tgt_key_padding_mask": "key_mask key_padding_mask padding_mask",
    "tgt_is_causal": "causal is_causal",
    "need_weights": "output_attentions return_attention return_attention_scores return_weights",
    "average_attn_weights": "average_weights",
    "is_causal": "causal use_causal_mask",
    "enable_gqa": "gqa",
    "scale": "sm_scale softmax_scale",
    "normalized_shape": "d_model dim embed_dim hidden_size normalized_dim num_features",
    "eps": "epsilon layer_norm_eps layer_norm_epsilon norm_eps rms_norm_eps variance_epsilon",
    "elementwise_affine": "affine",
    "weight": "gamma",
    "dtype": "torch_dtype",
    "matmul_precision": "compute_dtype precision quantization quantize",
}

# Hugging Face's masks of tokens, and the padding masks here that mean the same; those count that a function has all of.
_PADDING: Final = {
    "attention_mask": (
        ("key_padding_mask",),
        ("src_key_padding_mask", "memory_key_padding_mask"),
        ("src_key_padding_mask",),
        ("tgt_key_padding_mask",),
    ),
    "decoder_attention_mask": (("tgt_key_padding_mask",),),
    "encoder_attention_mask": (("memory_key_padding_mask",),),
}
_SHOWING: Final = {
    "attention_mask": "attn_mask=attention_mask[:, None, None] != 0 instead of attention_mask=attention_mask "
    "(if it is (N, S) and 1 marks the tokens, as in Hugging Face's models: True shows a key here)",
    "key_padding_mask": "attn_mask=~key_padding_mask[:, None, None] instead of key_padding_mask=key_padding_mask "
    "(if it is (N, S) and True marks padding, as in layers: True shows a key here)",
}

# What Hugging Face's models call keys and values of earlier calls, and whether to keep them.
_CACHE: Final = ("layer_past", "past_key_value", "past_key_values", "use_cache")

# Functions that make a layer in the dtype in which it was stored.
_KEEPING: Final = ("from_torch", "load")

_INPUTS: Final = ("query", "src", "tgt")  # which calls have, and constructors do not


def knows_foreign_keywords(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let a function's TypeError about an unknown keyword say which one to write instead; right calls cost the same.

    Parameters
    ----------
    function : callable
        A function, or one that is to be a method.

    Returns
    -------
    callable
        The same, with its name, its signature and its docstring.

    Examples
    --------
    >>> @knows_foreign_keywords
    ... def attend(embed_dim, batch_first=False): ...
    >>> attend(d_model=8, batchfirst=True)
    Traceback (most recent call last):
    TypeError: attend() got an unexpected keyword argument 'd_model'. Write embed_dim=8 instead of d_model=8, \
batch_first=True instead of batchfirst=True.
    """

    def advise(error: TypeError, keywords: Mapping[str, Any]) -> None:
        known = inspect.signature(function).parameters
        unknown = {name: value for name, value in keywords.items() if name not in known}
        of_cache = [name for name in unknown if name in _CACHE and not known.keys().isdisjoint(_INPUTS)]
        written: dict[str, str] = {}  # by the keyword that is to be written, each once
        for name, value in unknown.items():
            if name not in of_cache and (one := _advice(name, value, known)):
                written.setdefault(one.partition("=")[0], one)
        advice = [f"Write {', '.join(written.values())}."] if written else []
        if of_cache:
            cure = f"leave out {' and '.join(of_cache)}, and pass all tokens each time"
            advice.append(f"mha_c has no cache of keys and values: {cure}.")
        dtype = unknown.get("dtype", unknown.get("torch_dtype"))
        if dtype is not None and function.__name__ in _KEEPING:
            shown = repr(dtype) if isinstance(dtype, str) else "dtype"
            advice.append(f"The dtype is kept: write {function.__name__}(...).to({shown}).")
        recorded = [name for name in unknown if name in ("matmul_precision", "padded")]
        if recorded and function.__name__ == "load":
            advice.append(f"The file records {' and '.join(recorded)}: assign it to the layer that is loaded.")
        if advice:
            words = str(error).partition(". Did you mean")[0]  # newer versions of Python make a guess, too
            error.args = (" ".join([f"{words}.", *advice]),)

    return functools.update_wrapper(_core.AdvisedFunction(function, advise), function)


def _advice(name: str, value: Any, known: Collection[str]) -> str | None:
    """What to write instead of an unknown keyword, if it can be told."""
    hides = any(own.endswith("key_padding_mask") for own in known)
    for masks in _PADDING.get(name, ()):
        if all(mask in known for mask in masks):
            passed = " and ".join(f"{mask}={name} == 0" for mask in masks)
            why = "if 1 marks the tokens, as in Hugging Face's models: True hides a key here"
            return f"{passed} instead of {name}={name} ({why})"
    if name in _SHOWING and "attn_mask" in known:
        return _SHOWING[name]
    meant = [own for own in known if name in _FOREIGN_NAMES.get(own, "").split()] or _most_alike(name, known)
    if not meant:
        return None
    shown = repr(value) if isinstance(value, (bool, int, float, str)) else ""
    effect = f" (True {'hides' if hides else 'shows'} a key here)" if meant[0].endswith("mask") else ""
    return f"{' or '.join(f'{own}={shown}' for own in meant)} instead of {name}={shown}{effect}"


def _most_alike(name: str, known: Collection[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, known, n=1, cutoff=0.8)
