# SPDX-License-Identifier: Apache-2.0
"""What models call the projections of an attention layer, how they store them, and where in a state dict they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

__all__ = ["FOREIGN", "SCHEMES", "TORCH", "Layout", "Scheme", "find_layers", "schemes_named"]

Layout: TypeAlias = Literal["stacked", "per_head"]


class Scheme(NamedTuple):
    """How models of one kind name and store the projections.

    Attributes
    ----------
    names : tuple of str
        Of four projections: query, key, value, output. Of three: query; key and value; output. Of two: query, key and
        value; output. In torch's layer only the first weight, by which it is known.
    models : str
        Some of the models.
    kind : {".weight", ".kernel", ""}
        What follows a name: ".weight", a matrix (out, in); ".kernel", (in, out), perhaps with an axis for the heads;
        or nothing, in torch's layer.
    layout : {"stacked", "per_head"}, optional
        How one weight holds several projections: one below the other, or head by head. None: models differ.
    shape_tells : bool
        Whether weights may also be (in, out), which the shape of the one with several projections tells.
    interleaves : bool
        Whether query head h reads the key and value head h % num_kv_heads.
    beside : tuple of str
        How names begin that stand beside the projections and are not part of the attention.
    options : tuple of str
        What such models usually compute besides, in the words of `mha_c.parameters.options`.
    where : str
        A pattern for the whole name of the first weight, for models that use the names of others.
    """

    names: tuple[str, ...]
    models: str = "other models"
    kind: str = ".weight"
    layout: Layout | None = "stacked"
    shape_tells: bool = False
    interleaves: bool = False
    beside: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    where: str = ""

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights."""
        return tuple(f"{name}{self.kind}" for name in self.names)

    @property
    def biases(self) -> tuple[str, ...]:
        """The names of the biases, some or all of which a model may lack."""
        return tuple(f"{name}.bias" for name in self.names)


def _scheme(names: str, models: str, **options: Any) -> Scheme:
    return Scheme(tuple(names.split()), models, **options)


TORCH: Final = (_scheme("in_proj_weight", "torch", kind=""), _scheme("q_proj_weight", "torch", kind=""))

_BART: Final = "q_proj k_proj v_proj out_proj"
_BERT: Final = "attention.self.query attention.self.key attention.self.value attention.output.dense"
_VIT: Final = "attention.attention.query attention.attention.key attention.attention.value attention.output.dense"

# Where several fit the same weights, the first counts.
FOREIGN: Final = (
    _scheme(_BART, "GPT-J", where=r"\bh\.\d+\.attn\.q_proj", options=("rope",)),
    _scheme(_BART, "GPT-Neo", where=r"\bh\.\d+\.attn\.attention\.q_proj", options=("scale", "window")),
    _scheme(_BART, "BART, CLIP, OPT, Wav2Vec2, Whisper"),
    _scheme("q_proj k_proj v_proj o_proj", "Llama and its descendants", options=("rope",)),
    _scheme("q_proj k_proj v_proj dense", "Phi", options=("rope",)),
    _scheme("q_proj k_proj v_proj c_proj", "CLIP's attention pool", beside=("positional_embedding",)),
    _scheme("wq wk wv wo", "Llama by Meta", options=("rope",)),
    _scheme(_BERT, "RoFormer", where=r"\broformer\.", options=("rope",)),
    _scheme(_BERT, "BERT, RoBERTa, ELECTRA"),
    _scheme("self.query self.key self.value output.dense", "BERT, RoBERTa, ELECTRA"),
    _scheme(_VIT, "ViT, DeiT, DINOv2 of Hugging Face"),
    _scheme("attention.query attention.key attention.value output.dense", "ViT, DeiT, DINOv2 of Hugging Face"),
    _scheme("query key value dense", "ALBERT", beside=("LayerNorm.",)),
    _scheme("query key value out", "Flax"),
    _scheme("query key value attention_output", "Keras"),
    _scheme("query key value out_proj", "Grounding DINO"),
    _scheme("q_lin k_lin v_lin out_lin", "DistilBERT, XLM"),
    _scheme("linear_q linear_k linear_v linear_out", "ESPnet"),
    _scheme("q k v o", "T5", options=("scale", "bias")),
    _scheme("to_q to_k to_v to_out", "x-transformers", interleaves=True),
    _scheme("to_q to_k to_v to_out.0", "diffusers", interleaves=True),
    _scheme("to_q to_kv to_out", "perceiver-pytorch, conformer", interleaves=True),
    _scheme("to_q to_kv to_out.0", "perceiver-pytorch, conformer", interleaves=True),
    _scheme("q kv proj", "PVT of timm"),
    _scheme("q_attn c_attn c_proj", "GPT-2", shape_tells=True, beside=("bias", "masked_bias")),  # its causal masks
    _scheme("c_attn c_proj", "GPT-2", shape_tells=True, beside=("bias", "masked_bias")),
    _scheme("qkv proj", "Qwen2-VL, GLM-4V", where=r"\bvis\w+\.blocks\.\d+\.attn\.qkv", options=("rope",)),
    _scheme("qkv proj", "timm, DINOv2"),
    _scheme("qkv projection", "BLIP"),
    _scheme("to_qkv to_out", "vit-pytorch", beside=("norm.",)),
    _scheme("to_qkv to_out.0", "vit-pytorch", beside=("norm.",)),
    _scheme("Wqkv out_proj", "MPT, DBRX", options=("rope",)),
    _scheme("Wqkv Wo", "ModernBERT", options=("rope",)),
    _scheme("qkv_proj o_proj", "Phi-3", options=("rope",)),
    _scheme("query_key_value dense", "GPT-NeoX, BLOOM, Falcon, ChatGLM", layout=None, options=("rope",)),
)

SCHEMES: Final = (*TORCH, *FOREIGN, *(scheme._replace(kind=".kernel") for scheme in FOREIGN))


def schemes_named(names: Sequence[str]) -> tuple[Scheme, ...]:
    """The schemes whose projections have given names.

    Parameters
    ----------
    names : sequence of str
        Two, three or four names, as in `Scheme`.

    Returns
    -------
    tuple of Scheme
        With weights and with kernels. All but the names is that of the known schemes whose names end alike; if there
        are none, the layout is None.

    Raises
    ------
    ValueError
        If there are fewer names or more.
    TypeError
        If a name is not a string.

    Examples
    --------
    >>> schemes_named(["attn.qkv", "attn.proj"])[0].layout
    'stacked'
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a sequence of strings, but got {names!r}")
    if len(names) not in (2, 3, 4):
        raise ValueError(
            "names are (query, key, value, output), (query, key_and_value, output) or (query_key_and_value, output), "
            f"but got {names!r}"
        )
    known = [scheme for scheme in FOREIGN if _last_words(scheme.names) == _last_words(names)]
    named = [scheme._replace(names=tuple(names)) for scheme in known or [Scheme((), layout=None)]]
    return tuple(scheme._replace(kind=kind) for kind in (".weight", ".kernel") for scheme in named)


def _last_words(names: Iterable[str]) -> list[str]:
    return [name.rpartition(".")[2] for name in names]


def find_layers(names: Collection[str], prefix: str = "", schemes: Iterable[Scheme] = SCHEMES) -> dict[str, Scheme]:
    """Where the weights of a scheme stand together.

    Parameters
    ----------
    names : collection of str
        The names of a state dict.
    prefix : str, default ""
        How a layer's names begin, except that more may precede, up to a dot.
    schemes : iterable of Scheme
        The schemes to look for.

    Returns
    -------
    dict of str to Scheme
        The schemes found, by how the names of their layers begin.

    Examples
    --------
    >>> names = [f"model.block.{name}.weight" for name in ("qkv", "proj", "norm")]
    >>> {start: scheme.names for start, scheme in find_layers(names, "block.").items()}
    {'model.block.': ('qkv', 'proj')}
    """
    by_ending: dict[str, list[str]] = {}
    for name in names:
        by_ending.setdefault(_ending(name), []).append(name)
    found: dict[str, Scheme] = {}
    taken: set[str] = set()
    for scheme in schemes:
        first = scheme.weights[0]
        for name in by_ending.get(_ending(first), ()):
            start = name.removesuffix(first)
            weights = {start + weight for weight in scheme.weights}
            is_place = start != name and f".{start}".endswith(f".{prefix}") and re.search(scheme.where, name)
            if is_place and taken.isdisjoint(weights) and all(weight in names for weight in weights):
                found[start] = scheme
                taken |= weights
    return found


def _ending(name: str) -> str:
    """The end of the name of a weight that is the same in all layers."""
    return ".".join(name.split(".")[-2 if name.endswith((".weight", ".kernel")) else -1 :])
