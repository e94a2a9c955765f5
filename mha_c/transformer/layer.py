# SPDX-License-Identifier: Apache-2.0
"""What the layers of encoders and decoders share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, TypeAlias

import numpy as np

from mha_c import _core
from mha_c._typing import Self
from mha_c.activations import (
    CORE_ACTIVATIONS,
    Activation,
    activate,
    activation as check_activation,
    is_gated,
    torch_activation,
)
from mha_c.advice.arguments import REFUSALS
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.container import Child, Container, ModuleList
from mha_c.dropout import Dropout, seeds_for
from mha_c.layer import MaskedRows, MultiheadAttention
from mha_c.linear import Linear
from mha_c.module import Module, Option, check_torch_module
from mha_c.norms import LayerNorm, RMSNorm
from mha_c.parameters.arrays import AnyArray, Array, as_array
from mha_c.parameters.checks import flag, integer
from mha_c.parameters.dtypes import float_dtype
from mha_c.parameters.initialization import Draws
from mha_c.parameters.quantization import PRODUCTS, PRODUCTS_OF_ATTENTION, MatmulPrecision, precision_of_products

__all__ = [
    "Norm",
    "Padded",
    "TransformerLayer",
    "check_padded",
    "copies_of",
    "is_padding",
    "make_norm",
    "transform",
    "zero_padded_rows",
]

Norm: TypeAlias = Literal["layer", "rms"]
Padded: TypeAlias = Literal["zero", "computed"]


def check_padded(name: str, value: Any) -> Padded | None:
    if value not in (None, "zero", "computed"):
        raise ValueError(f'{name} must be None, "zero" or "computed", but got {value!r}')
    return value  # type: ignore[no-any-return]


def make_norm(norm: Any, d_model: int, eps: float, bias: bool, device: Any, dtype: Any) -> LayerNorm | RMSNorm:
    if norm == "layer":
        return LayerNorm(d_model, eps, bias=bias, device=device, dtype=dtype)
    if norm == "rms":
        return RMSNorm(d_model, eps, device=device, dtype=dtype)
    meant = getattr(norm, "__name__", str(norm)).lower().removesuffix("norm").rstrip("_")
    cure = f': write "{meant}"' if meant in ("layer", "rms") else ""
    raise ValueError(f'norm must be "layer" or "rms", but got {norm!r}{cure}')


def is_padding(key_padding_mask: AnyArray) -> Array:
    """Where a mask hides keys for certain: True, or -inf. Any other float changes their scores."""
    mask = as_array(key_padding_mask)
    if mask.dtype.char == "g":  # long double, which the core reads as float64
        with np.errstate(over="ignore"):
            mask = mask.astype(np.float64)
    return mask if mask.dtype == bool else mask == -np.inf


def zero_padded_rows(output: Array, key_padding_mask: AnyArray, batch_first: bool) -> Array:
    """The output with zeros in the rows that a mask names."""
    rows = is_padding(key_padding_mask)
    if not batch_first:
        rows = rows.T
    return np.where(rows[..., None], output.dtype.type(0), output)


def transform(
    weights: Any,
    x: Any,
    memory: tuple[Any, ...],
    key_padding_mask: Any,
    attn_mask: Any,
    is_causal: Any,
    batch_first: Any,
    add_zero_attn: Any,
    masked_rows: str,
    norm_first: bool,
    norm: Any,
    feed_forward: tuple[Any, ...] | None,
    zeroes_padding: bool,
) -> Any:
    """One attention in the core, without weights and dropout: to x, or to the key and the value in `memory`.

    `feed_forward` follows it: the first map, the activation and whether it is gated, the second map, and the norm.
    """
    key, value = memory or (x, x)
    linear1, activation, is_gated, linear2, last_norm = feed_forward or (None, "relu", False, None, norm)
    return _core.transform(
        weights,
        x,
        key,
        value,
        key_padding_mask,
        False,
        attn_mask,
        True,
        is_causal,
        None,
        batch_first,
        add_zero_attn,
        masked_rows,
        0.0,
        0,
        0,
        norm_first,
        not memory,
        norm,
        linear1,
        activation,
        is_gated,
        linear2,
        last_norm,
        zeroes_padding,
    )


class TransformerLayer(Container):
    """A layer of an encoder or a decoder: attention, then a feed-forward network, each added to its input.

    Examples
    --------
    >>> import mha_c
    >>> isinstance(mha_c.TransformerEncoderLayer(4, 2), TransformerLayer)
    True
    """

    linear1 = Child[Linear]("linear1", "The first map of the feed-forward network.")
    dropout = Child[Dropout]("dropout", "The dropout between the two maps.")
    linear2 = Child[Linear]("linear2", "The second map of the feed-forward network.")
    norm_first = Option("norm_first", flag, "Whether norms come before attention and feed-forward, or after them.")
    activation = Option("activation", check_activation, "The activation between the two maps, a name or a callable.")
    padded = Option("padded", check_padded, "What the padded rows of the output hold.")

    _option_kinds = {"norm_first": bool, "activation": str, "padded": (str, NoneType)}

    _norm_first: bool
    _activation: Activation
    _padded: Padded | None

    @knows_foreign_keywords
    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: int | None = None,
        dropout_seed: int | None = None,
        norm: Norm = "layer",
        padded: Padded | None = None,
        masked_rows: MaskedRows = "torch",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        matmul_precision: MatmulPrecision | None = None,
    ) -> None:
        real = float_dtype(dtype)
        draws: Any = Draws.of(seed)  # a seed that continues, for the layers in this one
        seeds = iter(seeds_for(dropout_seed, len(self._child_names)))
        act = check_activation("activation", activation)
        hidden = integer("dim_feedforward", dim_feedforward)
        precisions = precision_of_products(matmul_precision, PRODUCTS)
        of_attention = {name: precisions[name] for name in PRODUCTS_OF_ATTENTION}

        def make(name: str) -> Module:
            if name.endswith("attn"):
                return MultiheadAttention(
                    d_model, nhead, dropout, bias, batch_first=batch_first, device=device, dtype=real, seed=draws,
                    dropout_seed=next(seeds), masked_rows=masked_rows, num_kv_heads=num_kv_heads, head_dim=head_dim,
                    v_head_dim=v_head_dim, matmul_precision=of_attention,
                )  # fmt: skip
            if name.startswith("dropout"):
                return Dropout(dropout, dropout_seed=next(seeds))
            if name.startswith("norm"):
                return make_norm(norm, d_model, layer_norm_eps, bias, device, real)
            widths = (d_model, hidden * (1 + is_gated(act))) if name == "linear1" else (hidden, d_model)
            return Linear(*widths, bias, device, real, seed=draws, matmul_precision=precisions[name])

        children = {name: make(name) for name in self._child_names}  # in the order in which torch draws parameters
        self._set_up(children, {"norm_first": norm_first, "activation": act, "padded": padded})

    def _run(
        self,
        x: Any,
        *memory: Any,
        attention: Any,
        norms: tuple[Any, ...],
        dropouts: tuple[Any, ...],
        zeroes_padding: bool = False,
        **masks: Any,
    ) -> Any:
        """Attention, and the feed-forward network if there is a second norm; in one call if the core has all parts."""
        if self._is_plain(attention, norms, dropouts):
            try:
                return self._transform(x, memory, attention, norms, zeroes_padding, **masks)
            except REFUSALS as error:
                if not hasattr(error, "refused"):
                    raise  # else the steps refuse it in their words
        with np.errstate(all="ignore"):  # torch does not warn of numbers
            x = self._add_attention(x, norms[0], attention, dropouts[0], *memory, **masks)
            if len(norms) > 1:
                x = self._add_feed_forward(x, norms[1], dropouts[1])
        if zeroes_padding:
            x = zero_padded_rows(x, masks["key_padding_mask"], attention.batch_first)
        return x

    def _is_plain(self, attention: Any, norms: tuple[Any, ...], dropouts: tuple[Any, ...]) -> bool:
        """Whether all parts are of mha_c's classes, none of them drops anything, and the activation has a name."""
        if len(norms) > 1:
            dropouts = (*dropouts, self.dropout)
            if not (type(self.linear1) is type(self.linear2) is Linear and isinstance(self._activation, str)):
                return False
        return (
            type(attention) is MultiheadAttention
            and not (attention._training and attention._dropout > 0)
            and all(type(norm) in (LayerNorm, RMSNorm) for norm in norms)
            and all(type(dropout) is Dropout and not dropout.is_active for dropout in dropouts)
        )

    def _transform(
        self,
        x: Any,
        memory: tuple[Any, ...],
        attention: MultiheadAttention,
        norms: tuple[Any, ...],
        zeroes_padding: bool,
        attn_mask: Any,
        key_padding_mask: Any,
        is_causal: Any,
    ) -> Any:
        parameters = attention._parameters
        first, *last = [norm._for_core(parameters.dtype) for norm in norms]
        feed_forward = None
        if last:
            activation: Any = CORE_ACTIVATIONS[self._activation]  # type: ignore[index]
            feed_forward = (self.linear1._parameters.packed, *activation, self.linear2._parameters.packed, *last)
        return transform(
            parameters.weights, x, memory, key_padding_mask, attn_mask, is_causal, attention._batch_first,
            attention._add_zero_attn, attention._masked_rows, self._norm_first, first, feed_forward, zeroes_padding,
        )  # fmt: skip

    def _add_attention(self, x: Any, norm: Any, attention: Any, dropout: Any, *memory: Any, **masks: Any) -> Any:
        """One step: x + attention(norm(x)), or norm(x + attention(x))."""
        query = norm(x) if self._norm_first else x
        key, value = memory or (query, query)
        added = as_array(x) + dropout(attention(query, key, value, need_weights=False, **masks)[0])
        return added if self._norm_first else norm(added)

    def _add_feed_forward(self, x: Any, norm: Any, dropout: Any) -> Any:
        """The last step: x + feed(norm(x)), or norm(x + feed(x))."""
        hidden = self.dropout(activate(self.linear1(norm(x) if self._norm_first else x), self._activation))
        added = x + dropout(self.linear2(hidden))
        return added if self._norm_first else norm(added)

    @classmethod
    def _layer_from_torch(
        cls, module: Any, methods: tuple[str, ...], matmul_precision: MatmulPrecision | None
    ) -> Self:
        instead = "The layers in it may be copied one by one"
        check_torch_module(module, cls._kind, instead, methods)
        name = torch_activation(module.activation)
        if name is None:
            raise TypeError(f"from_torch knows the activations relu, gelu and silu, but got {module.activation!r}")
        options = {"norm_first": module.norm_first, "activation": name, "padded": None}
        return cls._copied(module, options, matmul_precision)


def copies_of(layer: Any, cls: type[TransformerLayer], name: str, num_layers: Any) -> ModuleList[Any]:
    """The layers of a stack: deep copies of one that was passed as this argument, and ought to be of this class."""
    if not isinstance(layer, Module):
        found = type(layer)
        if found.__module__.startswith("torch.") and found.__name__ == cls._kind:
            words = f"{name} is torch's {cls._kind}, but it must be mha_c's: pass mha_c.{cls._kind}.from_torch({name})"
        else:
            words = f"{found.__name__} is not a Module subclass: {name} must be a mha_c.{cls._kind}"
        raise TypeError(words)
    return ModuleList([copy.deepcopy(layer) for _ in range(integer("num_layers", num_layers))])
