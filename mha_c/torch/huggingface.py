# SPDX-License-Identifier: Apache-2.0
"""Layers of Hugging Face's encoders with their inference computed by mha_c. Imported through mha_c.torch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from mha_c.torch.attend import MISFIT
from mha_c.torch.classes import class_over
from mha_c.torch.layers import (
    ACTIVATION,
    DROPOUT,
    LINEAR,
    NORM,
    Classes,
    ReplacedLayer,
    activation_name,
    are_norms_of,
    tensors_of,
    why_patched,
)
from mha_c.torch.packed import AttentionShape, LayerFacts
from mha_c.torch.transform import LayerMasks, LayerReading, Masks
from mha_c.torch.transformers import changes_nothing, uses_torchs_masks

__all__ = ["mixin_of_transformers", "why_unknown"]


class _Names(NamedTuple):
    """Where a layer has its parts, as paths of modules, and two attributes of its attention."""

    holders: dict[str, str]  # modules of modules, and their classes; * is the name of the model
    attention: str
    num_heads: str
    head_dim: str
    projections: tuple[str, str, str, str]  # of query, key, value and output
    norms: tuple[str, str]
    linear1: str
    activation: str
    linear2: str
    dropouts: tuple[str, ...]
    chunked: str | None  # what has chunk_size_feed_forward


class _LayerOfTransformers(ReplacedLayer):
    """What these layers share: self-attention to (N, L, E), whose padded rows are computed."""

    _names: ClassVar[_Names]
    _norm_first: ClassVar[bool] = False
    _arguments: ClassVar[tuple[str, ...]]  # of the forward that is known

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "_torch_class"):  # which only the classes of layers have
            return
        torchs, names = cls._torch_class, cls._names
        module, model = sys.modules[torchs.__module__], torchs.__name__.removesuffix("Layer")
        parts: dict[str, Classes] = {
            path: (getattr(module, holder.replace("*", model)),) for path, holder in names.holders.items()
        }
        parts |= dict.fromkeys((*names.projections, names.linear1, names.linear2), LINEAR)
        parts |= dict.fromkeys(names.norms, NORM) | dict.fromkeys(names.dropouts, DROPOUT)
        cls._parts = parts | {names.activation: ACTIVATION}

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute the forward of transformers' class with mha_c if it can, or else with torch."""
        answer: torch.Tensor = self._answer(super().forward, hidden_states, attention_mask, *args, **kwargs)
        return answer

    def _compute(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor | str:
        # Those by position are encoder_hidden_states and their mask, of which only decoders make use, and a cache.
        states = args[0] if args else kwargs.get("encoder_hidden_states")
        if states is not None and getattr(self, "is_decoder", False):
            return "cross-attention"
        if any(one is not None for one in args[2:]):
            return "cache"
        for name, argument in kwargs.items():
            if not (changes_nothing(name, argument) or name.startswith("encoder_")):
                return name
        return self._transform(hidden_states, None, (Masks(attn_mask=attention_mask),))

    def _resolve(self, masks: LayerMasks, x: torch.Tensor, reading: LayerReading) -> LayerMasks | str:
        if x.dim() != 3:
            return MISFIT
        mask = masks[0].attn_mask
        attention: Any = self.get_submodule(self._names.attention)
        if mask is not None and mask.dtype == torch.bool and attention.config._attn_implementation in (None, "eager"):
            return "mask in bool"  # which would be added to the scores
        return masks

    def _read(self, parts: Mapping[str, Any]) -> LayerReading | str:
        names = self._names
        attention = parts[names.attention]
        head_dim = getattr(attention, names.head_dim)
        if attention.is_causal:
            return "causal attention"
        if attention.scaling != head_dim**-0.5:
            return "unusual scaling"
        if not uses_torchs_masks(attention.config):
            return f"attn_implementation={attention.config._attn_implementation!r}"
        if names.chunked is not None and parts[names.chunked].chunk_size_feed_forward:
            return "chunk_size_feed_forward"
        tensors: dict[str, torch.Tensor] = {}
        for letter, path in zip("qkv", names.projections):
            for name, tensor in tensors_of(f"attention0.{letter}_proj", parts[path]).items():
                tensors[name.replace("_proj.", "_proj_")] = tensor
        tensors |= tensors_of("attention0.out_proj", parts[names.projections[3]])
        norms = [parts[path] for path in names.norms]
        for number, norm in enumerate(norms):
            tensors |= tensors_of(f"norm{number}", norm)
        tensors |= tensors_of("linear1", parts[names.linear1]) | tensors_of("linear2", parts[names.linear2])
        embed_dim = tensors["attention0.q_proj_weight"].shape[-1]
        if not are_norms_of(norms, embed_dim):
            return "unusual parameters"
        shape = AttentionShape(embed_dim, getattr(attention, names.num_heads), head_dim=head_dim)
        facts = LayerFacts((shape,), tuple(norm.eps for norm in norms))
        activation = activation_name(parts[names.activation]) or ""
        return LayerReading(tensors, facts, activation, self._norm_first, True, (False,), of_transformers=True)


class _BertLayer(_LayerOfTransformers):
    _names = _Names(
        {
            "attention": "*Attention",
            "attention.self": "*SelfAttention",
            "attention.output": "*SelfOutput",
            "intermediate": "*Intermediate",
            "output": "*Output",
        },
        "attention.self",
        "num_attention_heads",
        "attention_head_size",
        ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        ("attention.output.LayerNorm", "output.LayerNorm"),
        "intermediate.dense",
        "intermediate.intermediate_act_fn",
        "output.dense",
        ("attention.self.dropout", "attention.output.dropout", "output.dropout"),
        "",
    )
    _arguments = ("self", "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "cache",
                  "kwargs")  # fmt: skip


class _DistilBertLayer(_LayerOfTransformers):
    _names = _Names(
        {"attention": "DistilBertSelfAttention", "ffn": "FFN"},
        "attention",
        "n_heads",
        "attention_head_size",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        ("sa_layer_norm", "output_layer_norm"),
        "ffn.lin1",
        "ffn.activation",
        "ffn.lin2",
        ("attention.dropout", "ffn.dropout"),
        "ffn",
    )
    _arguments = ("self", "hidden_states", "attention_mask", "kwargs")


class _ViTLayer(_LayerOfTransformers):
    _names = _Names(
        {"attention": "*Attention", "mlp": "*MLP"},
        "attention",
        "num_attention_heads",
        "head_dim",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
        ("layernorm_before", "layernorm_after"),
        "mlp.fc1",
        "mlp.activation_fn",
        "mlp.fc2",
        ("dropout",),
        None,
    )
    _norm_first = True
    _arguments = ("self", "hidden_states", "attention_mask", "kwargs")


# The classes of transformers 5.24 whose code is the same but for the name of the model.
_KNOWN: dict[str, type[_LayerOfTransformers]] = {
    "bert.modeling_bert.BertLayer": _BertLayer,
    "bert_generation.modeling_bert_generation.BertGenerationLayer": _BertLayer,
    "camembert.modeling_camembert.CamembertLayer": _BertLayer,
    "data2vec.modeling_data2vec_text.Data2VecTextLayer": _BertLayer,
    "electra.modeling_electra.ElectraLayer": _BertLayer,
    "ernie.modeling_ernie.ErnieLayer": _BertLayer,
    "roberta.modeling_roberta.RobertaLayer": _BertLayer,
    "roc_bert.modeling_roc_bert.RoCBertLayer": _BertLayer,
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer": _BertLayer,
    "distilbert.modeling_distilbert.TransformerBlock": _DistilBertLayer,
    "audio_spectrogram_transformer.modeling_audio_spectrogram_transformer.ASTLayer": _ViTLayer,
    "deit.modeling_deit.DeiTLayer": _ViTLayer,
    "ijepa.modeling_ijepa.IJepaLayer": _ViTLayer,
    "vit.modeling_vit.ViTLayer": _ViTLayer,
    "vit_mae.modeling_vit_mae.ViTMAELayer": _ViTLayer,
    "vit_msn.modeling_vit_msn.ViTMSNLayer": _ViTLayer,
    "vivit.modeling_vivit.VivitLayer": _ViTLayer,
}


def mixin_of_transformers(cls: type[torch.nn.Module]) -> type[ReplacedLayer] | None:
    """What stands above a class of transformers where mha_c computes it; None for other classes.

    Examples
    --------
    >>> mixin_of_transformers(torch.nn.Linear) is None
    True
    """
    return _KNOWN.get(f"{cls.__module__}.{cls.__qualname__}".removeprefix("transformers.models."))


def why_unknown(layer: torch.nn.Module, cls: type[torch.nn.Module], mixin: type[Any]) -> str:
    """Why a layer of transformers may compute something else than is known of its class, or ""."""
    signature = inspect.signature(cls.forward)
    if tuple(signature.parameters) != mixin._arguments or signature.return_annotation is not torch.Tensor:
        return f"another {cls.__name__} than that of transformers 5.24"
    if "forward" in vars(layer):
        return "overrides forward"
    replaced: Any = class_over(cls, mixin)
    return why_patched(replaced._parts, cls)
