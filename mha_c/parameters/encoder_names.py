# SPDX-License-Identifier: Apache-2.0
"""What models call the parts of their encoder layers, and what their classes fix beside the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

__all__ = ["LIBRARIES", "MODELS", "Model", "Names", "find_encoder_layers"]


class Names(NamedTuple):
    """How models of one kind name the parts of a layer.

    Attributes
    ----------
    models : str
        Some of the models.
    stack : str
        What precedes the number of a layer, from where the names of the encoder begin.
    attention : tuple of str
        The projections, as in `mha_c.parameters.schemes.Scheme`; or one name, that of an attention layer of torch.
    norms : tuple of str
        The norm of the attention and that of the feed-forward network.
    linears : tuple of str
        The two maps of the feed-forward network.
    gate : str
        The map to the gates, if it has a weight of its own.
    scales : tuple of str
        Vectors by which the outputs of attention and of the feed-forward network are multiplied, if they are there.
    activation : str
        The activation, if all models with these names have the same.
    """

    models: str
    stack: str
    attention: tuple[str, ...]
    norms: tuple[str, ...]
    linears: tuple[str, ...]
    gate: str = ""
    scales: tuple[str, ...] = ()
    activation: str = ""

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights that every such layer has."""
        first, *others = self.attention
        attention = [f"{name}.weight" for name in self.attention] if others else [f"{first}.in_proj_weight"]
        feed_forward = (*self.norms, *self.maps, self.linears[1])
        return (*attention, *(f"{name}.weight" for name in feed_forward))

    @property
    def maps(self) -> tuple[str, ...]:
        """What the first map of the feed-forward network consists of: the gates come first."""
        return tuple(filter(None, (self.gate, self.linears[0])))


class Model(NamedTuple):
    """What the class of a model fixes.

    Attributes
    ----------
    names : tuple of Names
        The names that its layers may have.
    norm_first : bool or None
        Whether norms come before attention and feed-forward network. None: models differ.
    norm : str
        The norm of the encoder's output, from where the names of the encoder begin. Empty: there is none.
    eps : float or None
        The `eps` of the norms, if it is always the same.
    batch_first : bool
        Whether inputs are (N, S, E).
    usual : mapping of str to object
        What most models have, for an error that asks for it.
    """

    names: tuple[Names, ...]
    norm_first: bool | None
    norm: str = ""
    eps: float | None = None
    batch_first: bool = True
    usual: Mapping[str, Any] = {}


def _names(
    models: str, stack: str, attention: str, norms: str, linears: str, scales: str = "", gate: str = "",
    activation: str = "",
) -> Names:  # fmt: skip
    several = (tuple(text.split()) for text in (attention, norms, linears, scales))
    attentions, both_norms, both_linears, both_scales = several
    return Names(models, stack, attentions, both_norms, both_linears, gate, both_scales, activation)


_TORCH: Final = _names("torch", "layers.", "self_attn", "norm1 norm2", "linear1 linear2")
_TIMM: Final = _names("timm", "blocks.", "attn.qkv attn.proj", "norm1 norm2", "mlp.fc1 mlp.fc2", "ls1.gamma ls2.gamma")
_TORCHVISION: Final = _names(
    "torchvision", "layers.encoder_layer_", "self_attention", "ln_1 ln_2", "mlp.0 mlp.3"
)
_TORCHVISION_FIRST: Final = _TORCHVISION._replace(linears=("mlp.linear_1", "mlp.linear_2"))

LIBRARIES: Final = (
    Model(
        (_TORCH,), None, "norm", None, False, {"activation": "relu", "layer_norm_eps": 1e-5, "norm_first": False}
    ),
    Model((_TIMM,), True, "norm", usual={"activation": "gelu", "layer_norm_eps": 1e-6}),
    Model(
        (_TORCHVISION, _TORCHVISION_FIRST), True, "ln", usual={"activation": "gelu", "layer_norm_eps": 1e-6}
    ),
)
"""Models whose names are enough."""

_BERT: Final = _names(
    "BERT, RoBERTa, ELECTRA",
    "layer.",
    "attention.self.query attention.self.key attention.self.value attention.output.dense",
    "attention.output.LayerNorm output.LayerNorm",
    "intermediate.dense output.dense",
)
_DISTILBERT: Final = _names(
    "DistilBERT",
    "layer.",
    "attention.q_lin attention.k_lin attention.v_lin attention.out_lin",
    "sa_layer_norm output_layer_norm",
    "ffn.lin1 ffn.lin2",
)
_PROJECTIONS: Final = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj"
_BART: Final = _names(
    "BART, Whisper", "layers.", _PROJECTIONS, "self_attn_layer_norm final_layer_norm", "fc1 fc2"
)
_CLIP: Final = _names("CLIP, SigLIP", "encoder.layers.", _PROJECTIONS, "layer_norm1 layer_norm2", "mlp.fc1 mlp.fc2")

# Of files, and of the classes of transformers 5.
_IN_FILES: Final = (
    "attention.attention.query attention.attention.key attention.attention.value attention.output.dense"
)
_IN_CLASSES: Final = "attention.q_proj attention.k_proj attention.v_proj attention.o_proj"
_VIT: Final = (
    _names(
        "ViT, DeiT", "encoder.layer.", _IN_FILES, "layernorm_before layernorm_after", "intermediate.dense output.dense"
    ),
    _names("ViT, DeiT", "layers.", _IN_CLASSES, "layernorm_before layernorm_after", "mlp.fc1 mlp.fc2"),
)
_SCALES: Final = "layer_scale1.lambda1 layer_scale2.lambda1"
_DINOV2: Final = tuple(
    _names("DINOv2", "encoder.layer.", attention, "norm1 norm2", linears, _SCALES, **gated)
    for attention in (_IN_FILES, _IN_CLASSES)
    for linears, gated in (
        ("mlp.fc1 mlp.fc2", {}),
        ("mlp.weights_in mlp.weights_out", {"activation": "swiglu"}),
        ("mlp.up_proj mlp.down_proj", {"activation": "swiglu", "gate": "mlp.gate_proj"}),
    )
)

MODELS: Final[dict[str, Model]] = {
    **dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta"), Model((_BERT,), False)),
    "distilbert": Model((_DISTILBERT,), False, eps=1e-12),
    **dict.fromkeys(("vit", "deit"), Model(_VIT, True, "layernorm")),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), Model(_DINOV2, True, "layernorm")),
    "clip_text_model": Model((_CLIP,), True, "final_layer_norm"),
    "clip_vision_model": Model((_CLIP,), True),  # its post_layernorm normalizes the first token only
    "siglip_text_model": Model((_CLIP,), True, "final_layer_norm"),
    "siglip_vision_model": Model((_CLIP,), True, "post_layernorm"),
    "bart": Model((_BART,), False, eps=1e-5),
    "mbart": Model((_BART,), True, "layer_norm", eps=1e-5),
    "whisper": Model((_BART,), True, "layer_norm", eps=1e-5),
}
"""Models of Hugging Face's transformers, by the "model_type" of their config.json."""

_ALL: Final = tuple(dict.fromkeys(names for model in (*LIBRARIES, *MODELS.values()) for names in model.names))


def find_encoder_layers(state_dict: Iterable[str]) -> dict[str, Names]:
    """Where the weights of an encoder layer stand together.

    Parameters
    ----------
    state_dict : iterable of str
        The names of a state dict.

    Returns
    -------
    dict of str to Names
        The names found, by how those of their layers begin.

    Examples
    --------
    >>> parts = "attn.qkv attn.proj norm1 norm2 mlp.fc1 mlp.fc2".split()
    >>> found = find_encoder_layers(f"vit.blocks.{i}.{part}.weight" for i in range(2) for part in parts)
    >>> {start: names.models for start, names in found.items()}
    {'vit.blocks.0.': 'timm', 'vit.blocks.1.': 'timm'}
    """
    there = set(state_dict)
    found: dict[str, Names] = {}
    for names in _ALL:
        last = names.weights[-1]
        for name in there:
            start = name.removesuffix(last)
            if start != name and f".{start}".endswith(".") and all(start + weight in there for weight in names.weights):
                found.setdefault(start, names)
    return dict(sorted(found.items()))
