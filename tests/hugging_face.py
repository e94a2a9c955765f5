# SPDX-License-Identifier: Apache-2.0
"""Models of transformers with random weights, and their attention by its definition, with or without one trait.

Each case is a small model of a real class, an input with everything that its attention has, and the traits of that
attention: the padding of a batch, the causal order, a window, a bias, the scale, grouped heads, a cache.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision_operators  # noqa: F401
import transformers
from random_parameters import set_random_parameters
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

# ---------------------------------------------------------------------------------------------- attention, defined

TRAITS = ("padding", "causal", "window", "bias", "scale", "groups", "cache")


def attend(module, query, key, value, mask, *, scaling=None, is_causal=None, position_bias=None, without="", **_):
    """softmax(scaling * q kᵀ + bias, masked) v in plain operations; without one of TRAITS."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    usual = 1 / math.sqrt(query.shape[-1])
    scaling = usual if scaling is None else scaling
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if without == "cache" and is_causal:
        key, value, mask = key[:, :, -length:], value[:, :, -length:], None if mask is None else mask[..., -length:]
    if without == "scale":
        scaling = 1.0 if math.isclose(scaling, usual) else usual
    if without == "bias":
        position_bias = None
    if without == "causal":
        is_causal = False
    if without == "groups":  # head h reads head h % Hkv
        key, value = key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1)
    else:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = scaling * query @ key.transpose(2, 3)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is None and is_causal and length > 1:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1).nan_to_num()  # 0 for a query that sees no key
    return (weights @ value).transpose(1, 2), weights


def make_mask(*, mask_function=causal_mask_function, attention_mask=None, local_size=None, without="", **kwargs):
    """The mask that transformers makes for torch; without one of TRAITS."""
    looks_back = "allow_is_bidirectional_skip" not in kwargs
    if without == "padding":
        attention_mask = None
    if without == "window" and local_size is not None:
        mask_function, local_size = causal_mask_function if looks_back else bidirectional_mask_function, None
    if without == "causal" and looks_back:
        mask_function, kwargs["allow_is_causal_skip"] = bidirectional_mask_function, False
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, **kwargs)


def register_definition():
    """Attention by its definition as attn_implementation "defined", and without each trait as "without_padding" ..."""
    for trait in ("", *TRAITS):
        name = f"without_{trait}" if trait else "defined"
        AttentionInterface.register(name, partial(attend, without=trait))
        AttentionMaskInterface.register(name, partial(make_mask, without=trait))


# ---------------------------------------------------------------------------------------------- models

TOKENS, VOCABULARY = 12, 90


class Case(NamedTuple):
    """A model, what it is asked, and the traits without which the answer would be another one."""

    model: type
    config: Any
    run: Callable[..., torch.Tensor]  # from the model to the numbers that are compared
    traits: tuple[str, ...]
    calls: int  # of attention


def build(case):
    torch.manual_seed(0)
    return set_random_parameters(case.model(case.config).eval())


def tokens(batch=3, length=TOKENS, seed=0):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side, batch=3, length=TOKENS):
    """1 for tokens and 0 for padding, of which each sequence has another number."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for n in range(batch):
        hidden = slice(length - 2 * n, None) if side == "right" else slice(0, 2 * n)
        mask[n, hidden] = 0
    return mask


def images(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def encode(model):
    """The outputs of the tokens that are not padding: before them where padding after them would be hidden anyway."""
    mask = padding("left" if "CLIP" in type(model).__name__ else "right")
    return model(input_ids=tokens(), attention_mask=mask)[0][mask == 1]


def see(model, size=32):
    return model(pixel_values=images(2, 3, size, size, dtype=model.dtype))[0]


def decode(model):
    """A prompt, then more tokens with what it left in the cache."""
    mask, ids, first = padding("left"), tokens(), TOKENS - 4
    prompt = model(input_ids=ids[:, :first], attention_mask=mask[:, :first], use_cache=True)
    rest = model(input_ids=ids[:, first:], attention_mask=mask, cache=prompt.cache)
    return torch.cat([prompt[0], rest[0]], 1)[mask == 1]


def translate(model):
    """An encoder and a decoder."""
    mask = padding("right")
    return model(input_ids=tokens(), attention_mask=mask, decoder_input_ids=tokens(length=7, seed=1))[0]


def listen(model):
    return model(input_features=images(2, 8, 40, dtype=model.dtype), decoder_input_ids=tokens(2, 7))[0]


def detect(model):
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    mask[1, :, 40:] = 0
    return model(pixel_values=images(2, 3, 64, 64, dtype=model.dtype), pixel_mask=mask)[0]


_sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
_special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_decoder = dict(_sizes, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, **_special)
_sight = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8)
_pair = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=64, decoder_ffn_dim=64)
_t = transformers

CASES = [
    Case(_t.BertModel, _t.BertConfig(**_sizes), encode, ("padding", "scale"), 2),
    Case(_t.RobertaModel, _t.RobertaConfig(**_sizes, pad_token_id=0), encode, ("padding", "scale"), 2),
    Case(_t.DistilBertModel, _t.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
         encode, ("padding", "scale"), 2),
    Case(_t.ModernBertModel, _t.ModernBertConfig(**_sizes, local_attention=4, **_special), encode,
         ("padding", "window", "scale"), 2),
    Case(_t.ViTModel, _t.ViTConfig(**_sight), see, ("scale",), 2),
    Case(_t.CLIPTextModel, _t.CLIPTextConfig(**_sizes, **_special), encode, ("padding", "causal", "scale"), 2),
    Case(_t.CLIPVisionModel, _t.CLIPVisionConfig(**_sight), see, ("scale",), 2),
    Case(_t.WhisperModel, _t.WhisperConfig(
        vocab_size=VOCABULARY, **_pair, num_mel_bins=8, max_source_positions=20, max_target_positions=30,
        decoder_start_token_id=1, **_special), listen, ("causal", "scale"), 6),
    Case(_t.DetrModel, _t.DetrConfig(use_timm_backbone=False, backbone_config=_t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]), num_queries=6, **_pair),
        detect, ("padding", "scale"), 6),
    Case(_t.T5Model, _t.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
         translate, ("padding", "causal", "bias", "scale"), 6),
    Case(_t.BartModel, _t.BartConfig(vocab_size=VOCABULARY, **_pair, max_position_embeddings=64, **_special), translate,
         ("padding", "causal", "scale"), 6),
    Case(_t.GPT2Model, _t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_special),
         decode, ("padding", "causal", "scale", "cache"), 4),
    Case(_t.LlamaForCausalLM, _t.LlamaConfig(**_decoder), decode, ("padding", "causal", "scale", "groups", "cache"), 4),
    Case(_t.MistralForCausalLM, _t.MistralConfig(**_decoder, sliding_window=5), decode,
         ("padding", "causal", "window", "scale", "groups", "cache"), 4),
    Case(_t.Qwen3ForCausalLM, _t.Qwen3Config(**_decoder), decode, ("padding", "causal", "scale", "groups", "cache"), 4),
    Case(_t.Gemma3ForCausalLM, _t.Gemma3TextConfig(
        **_decoder, sliding_window=5, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16),
        decode, ("padding", "causal", "window", "scale", "groups", "cache"), 4),
]
REFUSED = [  # a soft cap, attention sinks, and scores to which masks are added
    (_t.Gemma2ForCausalLM, _t.Gemma2Config(**_decoder)),
    (_t.GptOssForCausalLM, _t.GptOssConfig(**_decoder, num_local_experts=2, num_experts_per_tok=1)),
    (_t.GitModel, _t.GitConfig(**_sizes)),
]


# ---------------------------------------------------------------------------------------------- what is found


class Finding(NamedTuple):
    """Of one case: calls, and how far results are from the definition in float64, relative to its largest number."""

    case: Case
    here: int
    left: int
    ours: float
    theirs: float  # torch, by transformers' function for scaled_dot_product_attention
    eager: float  # plain operations of transformers, in float32
    without: dict[str, float]  # by trait: the definition without it


@torch.no_grad()
def examine(case, coverage, name):
    """Runs a case with `name`, whose calls `coverage` counts, and with all that it is compared with."""
    model = build(case)
    exact = copy.deepcopy(model).double()

    def run(model, implementation):
        model.set_attn_implementation({"": implementation})  # of the model, not of a backbone in it
        return case.run(model)

    wanted = run(exact, "defined")

    def error(result):
        return float((result - wanted).abs().max() / wanted.abs().max())

    here, left = coverage.here, coverage.left
    ours = error(run(model, name))
    return Finding(
        case, coverage.here - here, coverage.left - left, ours, error(run(model, "sdpa")), error(run(model, "eager")),
        {trait: error(run(exact, f"without_{trait}")) for trait in TRAITS})
