# SPDX-License-Identifier: Apache-2.0
"""Layers of torch with their inference computed by mha_c, attention first. Imported through mha_c.torch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from mha_c._typing import Self
from mha_c.parameters.sets import SEPARATE_WEIGHTS
from mha_c.torch.attend import (
    Answer,
    Call,
    LayerState,
    attend,
    attend_apart_from_compiler,
    attend_in_graph,
    note_in_graph,
    resolve_hint,
)
from mha_c.torch.classes import class_over, torch_class_of
from mha_c.torch.packed import PackedParameters
from mha_c.torch.reasons import why_torch

__all__ = ["Replaced", "ReplacedAttention", "part_of"]

_OWN = ("in_proj_bias", "bias_k", "bias_v")
_STACKED = ("in_proj_weight", *_OWN)
_SEPARATE = (*SEPARATE_WEIGHTS, *_OWN)


class Replaced(torch.nn.Module):
    """What layers of torch have in common whose inference mha_c computes. They inherit from torch's class, too.

    Examples
    --------
    >>> from mha_c.torch import ReplacedAttention
    >>> issubclass(ReplacedAttention, Replaced)
    True
    """

    _torch_class: ClassVar[type[torch.nn.Module]]
    _mixin: ClassVar[type[Replaced]]  # what stands above it
    _mha_c: Any  # the LayerState, which is all that a replaced layer has besides torch's

    def refresh(self) -> None:
        """Read the parameters again at the next call, after a change that would not be noticed.

        Every call checks whether the parameters have changed. It can miss one kind of change: some numbers of a
        parameter, but not all, written in a way that torch does not count, which is through ``parameter.data``, NumPy
        or shared memory. After such a change, call this.

        Examples
        --------
        >>> import torch
        >>> from mha_c.torch import replace_attention
        >>> attention = replace_attention(torch.nn.MultiheadAttention(8, 2))
        >>> attention.in_proj_weight.data[5, 3] = 1.0
        >>> attention.refresh()
        """
        self._mha_c.packed.drop()

    def _count(self, answer: Any) -> None:
        """Count a call: one of torch's if the answer is a reason. In a graph, operators count theirs."""
        reason = answer if isinstance(answer, str) else ""
        if torch.compiler.is_compiling():
            if reason:
                note_in_graph(self._mha_c.number, reason)
            return
        self._mha_c.calls.add(reason)
        if reason in ("training", "gradients"):  # which change the parameters
            self.refresh()

    def train(self, mode: bool = True) -> Self:
        """Switch training mode on or off, as in torch. Packed parameters are dropped, since training changes them.

        Parameters
        ----------
        mode : bool, default True
            True for training mode, False for evaluation mode.

        Returns
        -------
        Replaced
            The layer itself.

        Examples
        --------
        >>> import torch
        >>> from mha_c.torch import replace_attention
        >>> replace_attention(torch.nn.MultiheadAttention(8, 2)).train().training
        True
        """
        if mode:
            self.refresh()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves and casts leave the old numbers behind; do not keep their memory."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.refresh()
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles name torch's class, since that of a replaced layer may be made at run time."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return _new_replaced, (torch_class_of(self), self._mixin), *reduced[2:]

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch.jit.script compiles in place of this layer."""
        plain = self._torch_class.__new__(self._torch_class)
        vars(plain).update({name: value for name, value in vars(self).items() if name != "_mha_c"})
        return plain


def _new_replaced(cls: type[torch.nn.Module], mixin: type[torch.nn.Module]) -> torch.nn.Module:
    """A replaced layer of one of torch's classes or a subclass, still empty."""
    replaced = class_over(cls, mixin)
    return replaced.__new__(replaced)


class ReplacedAttention(Replaced, torch.nn.MultiheadAttention):
    """A ``torch.nn.MultiheadAttention`` whose inference mha_c computes. `replace_attention` makes such layers.

    A layer of a subclass, whose forward is torch's, becomes an instance of a subclass of both.

    Examples
    --------
    >>> import torch
    >>> from mha_c.torch import replace_attention
    >>> attention = replace_attention(torch.nn.MultiheadAttention(8, 2)).eval()
    >>> x = torch.zeros(5, 3, 8)
    >>> with torch.no_grad():
    ...     output, weights = attention(x, x, x)
    >>> output.shape, weights.shape
    (torch.Size([5, 3, 8]), torch.Size([3, 5, 5]))
    """

    _torch_class = torch.nn.MultiheadAttention

    @functools.cached_property
    def _mha_c(self) -> LayerState[PackedParameters]:
        return LayerState(PackedParameters())

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Answer:
        """Compute ``torch.nn.MultiheadAttention.forward`` with mha_c if it can, or else with torch.

        Parameters
        ----------
        query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            As torch's; in particular `is_causal` is a hint about `attn_mask`, not a mask.

        Returns
        -------
        attn_output : torch.Tensor
            Contiguous if it is computed by mha_c.
        attn_output_weights : torch.Tensor or None
            Without `need_weights` None.

        Examples
        --------
        >>> import torch
        >>> from mha_c.torch import replace_attention
        >>> attention = replace_attention(torch.nn.MultiheadAttention(8, 2)).eval()
        >>> with torch.no_grad():
        ...     attention(*[torch.zeros(5, 3, 8)] * 3, need_weights=False)[1] is None
        True
        """
        arguments = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if isinstance(query, torch.fx.Proxy):  # torch.fx does not look into torch's own layers either
            path = query.tracer.path_of_module(self)
            return query.tracer.create_proxy("call_module", path, arguments, {})
        answer = "export" if torch.compiler.is_exporting() else self.forward_in_mha_c(*arguments)
        self._count(answer)
        return super().forward(*arguments) if isinstance(answer, str) else answer

    def forward_in_mha_c(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        need_weights: bool,
        attn_mask: torch.Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> Answer | str:
        """Return what `forward` returns, or if torch has to compute it, the reason in a few words.

        Parameters
        ----------
        query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            As for `forward`.

        Returns
        -------
        tuple of torch.Tensor and torch.Tensor or None, or str

        Examples
        --------
        >>> import torch
        >>> from mha_c.torch import replace_attention
        >>> attention = replace_attention(torch.nn.MultiheadAttention(8, 2))
        >>> attention.forward_in_mha_c(*[torch.zeros(5, 3, 8)] * 3, None, True, None, True, False)
        'training'
        """
        prepared = self._prepare(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        return prepared if isinstance(prepared, str) else self._attend(*prepared)

    def _attend(self, tensors: dict[str, torch.Tensor], call: Call) -> Answer | str:
        if torch.compiler.is_compiling():
            return attend_in_graph(self._mha_c.number, tensors, call)
        compute = attend_apart_from_compiler if "torch._dynamo" in sys.modules else attend  # which is faster
        return compute(self._mha_c.packed, tensors, call)

    def _prepare(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        need_weights: bool,
        attn_mask: torch.Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[dict[str, torch.Tensor], Call] | str:
        """What mha_c is to compute, or why torch is to compute it."""
        if self.training:
            return "training"
        out_proj = part_of(self, "out_proj")
        if "parametrizations" in self._modules or "parametrizations" in out_proj._modules:
            return "parametrized weights"
        tensors = self._tensors(out_proj)
        masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
        reason = why_torch((query, key, value), masks, tuple(tensors.values()))
        if reason:
            return reason
        has_added_keys = self.bias_k is not None or self.add_zero_attn
        hint = resolve_hint(is_causal, need_weights, key_padding_mask, attn_mask, has_added_keys)
        if isinstance(hint, str):
            return hint
        attn_mask, is_causal = hint
        call = Call(
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            self.embed_dim,
            self.num_heads,
            self.kdim,
            self.vdim,
            bool(self.batch_first),
            bool(self.add_zero_attn),
        )
        return tensors, call

    def _tensors(self, out_proj: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What torch's forward would read, by the names of the state dict, without its hooks."""
        names = _STACKED if self._qkv_same_embed_dim else _SEPARATE
        found = {name: _attribute(self, name) for name in names}
        found["out_proj.weight"] = _attribute(out_proj, "weight")
        found["out_proj.bias"] = _attribute(out_proj, "bias")
        return {name: tensor for name, tensor in found.items() if tensor is not None}


ReplacedAttention._mixin = ReplacedAttention


def part_of(module: Any, name: str) -> Any:
    """A module in another one, or None, as getattr reads it, which takes longer: an attribute hides it.

    Examples
    --------
    >>> part_of(torch.nn.MultiheadAttention(8, 2), "out_proj").weight.shape
    torch.Size([8, 8])
    """
    part = module._modules.get(name)
    return getattr(module, name, None) if part is None or name in module.__dict__ else part


def _attribute(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """As getattr, but faster where it is a parameter."""
    parameter = module._parameters.get(name)
    return getattr(module, name) if parameter is None else parameter
