# SPDX-License-Identifier: Apache-2.0
"""A layer of tensors by mha_c: at once, or as an operator of a compiled graph. Imported through mha_c.torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch._compile import _disable_dynamo
from torch.nn.functional import gelu, layer_norm, linear, relu, scaled_dot_product_attention, silu

from mha_c.torch.attend import LIBRARY, UNREADABLE, Call, ask_core, attend_in_torch, run_counted
from mha_c.torch.packed import AttentionShape, LayerFacts, LayerParts, PackedLayer
from mha_c.torch.tensors import array_of, tensor_of
from mha_c.transformer.layer import transform as transform_in_core

__all__ = [
    "TORCH_ACTIVATIONS",
    "LayerMasks",
    "LayerReading",
    "Masks",
    "transform",
    "transform_apart_from_compiler",
    "transform_in_graph",
]

#: By the names that mha_c has for them.
TORCH_ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "silu": silu,
}


class Masks(NamedTuple):
    """The masks of one attention. `is_causal` is torch's hint, or once it is resolved, a mask.

    Examples
    --------
    >>> Masks().is_causal
    False
    """

    key_padding_mask: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None
    is_causal: bool = False


LayerMasks: TypeAlias = tuple[Masks, ...]


class LayerReading(NamedTuple):
    """What a layer is at the moment.

    Attributes
    ----------
    tensors : dict of str to torch.Tensor
        Its parameters, by the names of `PackedLayer`.
    facts : LayerFacts
        What the parameters do not say.
    activation : str
        The activation of the feed-forward network, as the core calls it.
    norm_first, batch_first : bool
        As in torch.
    adds_zeros : tuple of bool
        `add_zero_attn` of each attention.
    of_transformers : bool, default False
        Whether it is a layer of transformers. Its mask is one of (N or 1, 1, L or 1, L), and True keeps a key.

    Examples
    --------
    >>> LayerReading._fields[:3]
    ('tensors', 'facts', 'activation')
    """

    tensors: dict[str, torch.Tensor]
    facts: LayerFacts
    activation: str
    norm_first: bool
    batch_first: bool
    adds_zeros: tuple[bool, ...]
    of_transformers: bool = False


def transform(
    packed: PackedLayer,
    reading: LayerReading,
    x: torch.Tensor,
    memory: torch.Tensor | None,
    masks: LayerMasks,
    zeroes_padding: bool = False,
) -> torch.Tensor | str:
    """What mha_c computes, or in a few words why torch is to compute it.

    Parameters
    ----------
    packed : PackedLayer
        Where the parameters of the last call are.
    reading : LayerReading
        The layer.
    x, memory : torch.Tensor
        The inputs. An encoder has no memory.
    masks : tuple of Masks
        Those of each attention.
    zeroes_padding : bool, default False
        Whether rows of padding are zeros.

    Returns
    -------
    torch.Tensor or str

    Examples
    --------
    >>> reading = LayerReading({}, LayerFacts((AttentionShape(8, 2),), (1e-5, 1e-5)), "relu", False, False, (False,))
    >>> transform(PackedLayer(), reading, torch.ones(5, 3, 8), None, (Masks(),))
    'unusual parameters'
    """
    resolved = _read_padding(masks[0].attn_mask, x) if reading.of_transformers else masks
    if isinstance(resolved, str):
        return resolved
    parts = packed.get(reading.tensors, reading.facts)
    if parts is None:
        return packed.why_not(reading.tensors)
    try:
        array = array_of(x)
        source = None if memory is None else array_of(memory)
        arrays = [
            (None if one.key_padding_mask is None else array_of(one.key_padding_mask),
             None if one.attn_mask is None else array_of(one.attn_mask), one.is_causal)
            for one in resolved
        ]  # fmt: skip
    except (RuntimeError, TypeError, ValueError):
        return UNREADABLE
    answer = ask_core(_run, parts, reading, array, source, arrays, zeroes_padding)
    return answer if isinstance(answer, str) else tensor_of(answer)


# Where torch.compile gives up a graph, it traces the functions that are called. It must not trace this one.
transform_apart_from_compiler = _disable_dynamo(transform)


def _read_padding(mask: torch.Tensor | None, x: torch.Tensor) -> LayerMasks | str:
    """A mask of transformers as a mask of padding with the same effect, (N, L)."""
    if mask is None:
        return (Masks(),)
    items, length = x.shape[0], x.shape[1]
    if mask.dim() != 4 or not all(
        size in sizes for size, sizes in zip(mask.shape, ((items, 1), (1,), (length, 1), (length,)))
    ):
        return "mask of another shape"
    first = mask[:, :, :1]
    if mask.shape[2] > 1 and not torch.equal(mask, first.expand_as(mask)):
        return "mask that is not padding"
    padding = first[:, 0, 0].expand(items, length)
    if padding.dtype == torch.bool:
        return (Masks(~padding),)
    hidden = padding <= torch.finfo(padding.dtype).min
    # The smallest number hides a key as surely as -inf, unless all keys of an item have it.
    is_all_hidden = bool(hidden.all(1).any())
    if is_all_hidden and padding.dtype == torch.float16:
        return "an item of padding only, in float16"  # where torch rounds the sum of score and mask
    hides_as_inf = bool(((padding == 0) | hidden).all()) and not is_all_hidden
    return (Masks(hidden if hides_as_inf else padding),)


def _run(parts: LayerParts, reading: LayerReading, x: Any, memory: Any, masks: Any, zeroes_padding: bool) -> Any:
    """Every attention in turn, the last one with the feed-forward network."""
    last = len(parts.attentions) - 1
    feed_forward = (parts.linear1, reading.activation, False, parts.linear2, parts.norms[-1])
    for number, (weights, (key_padding_mask, attn_mask, is_causal)) in enumerate(zip(parts.attentions, masks)):
        x = transform_in_core(
            weights, x, (memory, memory) if number else (), key_padding_mask, attn_mask, is_causal, reading.batch_first,
            reading.adds_zeros[number], "torch", reading.norm_first, parts.norms[number],
            feed_forward if number == last else None, zeroes_padding,
        )  # fmt: skip
    return x


# ---- In a compiled graph ----

LIBRARY.define(
    "layer(SymInt layer, str[] names, Tensor[] parameters, Tensor x, Tensor? memory, Tensor?[] key_padding_masks, "
    "Tensor?[] attn_masks, bool[] are_causal, SymInt?[] shapes, float[] eps, str activation, bool norm_first, "
    "bool batch_first, bool[] adds_zeros, bool of_transformers) -> Tensor"
)


def transform_in_graph(
    number: int, reading: LayerReading, x: torch.Tensor, memory: torch.Tensor | None, masks: LayerMasks
) -> torch.Tensor:
    """`transform` as an operator that torch.compile leaves as it is; what mha_c leaves to torch, it asks torch for.

    Parameters
    ----------
    number : int
        Of the layer's `LayerState`.
    reading, x, memory, masks
        As for `transform`.

    Returns
    -------
    torch.Tensor

    Examples
    --------
    >>> tensors = {"attention0.in_proj_weight": torch.ones(24, 8), "attention0.out_proj.weight": torch.ones(8, 8)}
    >>> tensors |= {"linear1.weight": torch.ones(9, 8), "linear2.weight": torch.ones(8, 9)}
    >>> facts = LayerFacts((AttentionShape(8, 2),), (1e-5, 1e-5))
    >>> reading = LayerReading(tensors, facts, "relu", False, False, (False,))
    >>> transform_in_graph(0, reading, torch.ones(5, 3, 8), None, (Masks(),)).shape
    torch.Size([5, 3, 8])
    """
    tensors, facts, *rest = reading
    answer: torch.Tensor = torch.ops.mha_c.layer(
        number,
        list(tensors),
        list(tensors.values()),
        x,
        memory,
        [one.key_padding_mask for one in masks],
        [one.attn_mask for one in masks],
        [one.is_causal for one in masks],
        [size for shape in facts.attentions for size in shape],
        facts.eps,
        *rest,
    )
    return answer


def _run_in_graph(
    number: int,
    names: Sequence[str],
    parameters: Sequence[torch.Tensor],
    x: torch.Tensor,
    memory: torch.Tensor | None,
    key_padding_masks: Sequence[torch.Tensor | None],
    attn_masks: Sequence[torch.Tensor | None],
    are_causal: Sequence[bool],
    shapes: Sequence[int | None],
    eps: Sequence[float],
    *rest: Any,
) -> torch.Tensor:
    """The operator with tensors on the CPU."""
    sizes: Any = zip(*[iter(shapes)] * len(AttentionShape._fields))
    facts = LayerFacts(tuple(AttentionShape(*one) for one in sizes), tuple(eps))
    reading = LayerReading(dict(zip(names, parameters)), facts, *rest)
    masks = tuple(map(Masks, key_padding_masks, attn_masks, are_causal))
    return run_counted(number, PackedLayer, transform, _transform_in_torch, reading, x, memory, masks)


_ACTIVATIONS = TORCH_ACTIVATIONS | {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


def _transform_in_torch(
    reading: LayerReading, x: torch.Tensor, memory: torch.Tensor | None, masks: LayerMasks
) -> torch.Tensor:
    """What torch computes in place of `transform`, contiguous as a graph expects."""

    def part(name: str) -> tuple[Any, Any]:
        return reading.tensors.get(f"{name}.weight"), reading.tensors.get(f"{name}.bias")

    def norm(number: int, x: torch.Tensor) -> torch.Tensor:
        weight, bias = part(f"norm{number}")
        return layer_norm(x, x.shape[-1:] if weight is None else weight.shape, weight, bias, reading.facts.eps[number])

    def update(number: int, x: torch.Tensor) -> torch.Tensor:
        if number == len(masks):
            return linear(_ACTIVATIONS[reading.activation](linear(x, *part("linear1"))), *part("linear2"))
        return _attend_in_torch(reading, number, x, memory if number == 1 else x, masks[number])

    for number in range(len(masks) + 1):
        x = x + update(number, norm(number, x)) if reading.norm_first else norm(number, x + update(number, x))
    return x.contiguous()


def _attend_in_torch(reading: LayerReading, number: int, x: torch.Tensor, source: Any, masks: Masks) -> torch.Tensor:
    """One attention of the layer."""
    prefix = f"attention{number}."
    tensors = {name.removeprefix(prefix): one for name, one in reading.tensors.items() if name.startswith(prefix)}
    embed_dim, num_heads, kdim, vdim, _ = reading.facts.attentions[number]
    if not reading.of_transformers:
        padding, attn_mask, is_causal = masks
        shape: Any = (embed_dim, num_heads, kdim, vdim, reading.batch_first, reading.adds_zeros[number])
        return attend_in_torch(tensors, Call(x, source, source, padding, False, attn_mask, True, is_causal, *shape))[0]
    projected = [linear(x, tensors[f"{one}_proj_weight"], tensors.get(f"{one}_proj_bias")) for one in "qkv"]
    query, key, value = (one.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for one in projected)
    heads = scaled_dot_product_attention(query, key, value, masks.attn_mask)
    return linear(heads.transpose(1, 2).flatten(2), tensors["out_proj.weight"], tensors.get("out_proj.bias"))


LIBRARY.impl("layer", _disable_dynamo(_run_in_graph), "CPU")
torch.library.register_fake("mha_c::layer", lambda number, names, parameters, x, *_: x.new_empty(x.shape))
