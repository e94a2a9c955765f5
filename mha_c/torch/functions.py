# SPDX-License-Identifier: Apache-2.0
"""torch's functions of attention computed by mha_c within a block. Imported through mha_c.torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from mha_c import _core
from mha_c.display.coverage import Coverage
from mha_c.torch.attend import MISFIT, UNREADABLE, Answer, Call, ask_core, attend, resolve_hint
from mha_c.torch.packed import PackedByWeight
from mha_c.torch.reasons import HARMLESS_MODES, why_torch
from mha_c.torch.tensors import array_of, tensor_of

__all__ = ["ONE_QUERY", "AttentionMode", "attention", "is_one_query"]

ONE_QUERY = "one query"
_FLASH = 1  # torch's kernel that lays its result out as the query; other results are C-contiguous
_FUNCTIONS = {multi_head_attention_forward, scaled_dot_product_attention}


@contextmanager
def attention() -> Iterator[Coverage]:
    """Make torch's functions of attention compute with mha_c within a block.

    The functions are ``torch.nn.functional.scaled_dot_product_attention`` and ``multi_head_attention_forward``, which
    ``torch.nn.MultiheadAttention`` calls. mha_c computes calls on the CPU in float32, float64, bfloat16 and float16
    that need no gradient. torch computes the others, which are counted with the reason. Results have torch's meaning,
    dtype and memory layout, and errors are torch's.

    Yields
    ------
    Coverage
        The calls of the block.

    Notes
    -----
    The block is a ``torch.overrides.TorchFunctionMode``: nothing is patched, and it is active in the thread that
    entered it. In nested blocks, the innermost one computes and counts a call; if it leaves the call to torch, the call
    reaches the next block. Layers of `replace_attention` count their own calls.

    Graphs made by ``torch.compile``, ``torch.export`` or ``torch.jit`` hold torch's attention and are not changed.
    Inside the block, torch takes its ordinary path, without nested tensors and fused encoder layers, as in any such
    mode.

    A call with one query and several keys, as in generation, is left to torch, which is still faster at it.

    Parameters are packed for the kernels once in a block, and again after a change; see `ReplacedAttention.refresh`. So
    one block around many calls is faster than one around each call.

    Examples
    --------
    >>> import torch
    >>> x = torch.zeros(2, 4, 5, 8)  # items, heads, length, features of a head
    >>> with attention() as coverage:
    ...     y = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    ...     z = torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    >>> coverage
    Calls of attention: 1 computed by mha_c, 1 left to torch
    <BLANKLINE>
    module  class                         mha_c  torch  reason
    -       scaled_dot_product_attention      1      1  dropout
    """
    coverage = Coverage()
    with AttentionMode(coverage):
        yield coverage


class AttentionMode(TorchFunctionMode):
    """What `attention` enters, with a coverage of the caller's.

    Parameters
    ----------
    coverage : Coverage
        What counts the calls.
    module, class_name : str, default ""
        The module that calls, as in `CoverageRow`, if it is known; else the name of the function is counted.

    Examples
    --------
    >>> coverage = Coverage()
    >>> with AttentionMode(coverage, "encoder.attention", "Attention"):
    ...     _ = scaled_dot_product_attention(*[torch.zeros(2, 4, 5, 8)] * 3)
    >>> coverage.rows[0].module
    'encoder.attention'
    """

    def __init__(self, coverage: Coverage, module: str = "", class_name: str = "") -> None:
        super().__init__()
        self._coverage = coverage
        self._place = module, class_name
        self._packed = PackedByWeight()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _FUNCTIONS or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if any(type(argument) is CausalBias for argument in (*args, *kwargs.values())):
            with self:  # torch calls the function again, with what the bias stands for
                return CausalBias.__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        compute = _attend if func is scaled_dot_product_attention else self._project_and_attend
        answer = compute(*args, **kwargs)
        reason = answer if isinstance(answer, str) else ""
        module, class_name = self._place
        self._coverage.add(module, class_name or func.__name__, reason)
        return func(*args, **kwargs) if reason else answer

    def _project_and_attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: torch.Tensor | None,
        in_proj_bias: torch.Tensor | None,
        bias_k: torch.Tensor | None,
        bias_v: torch.Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: torch.Tensor,
        out_proj_bias: torch.Tensor | None,
        training: bool = True,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        use_separate_proj_weight: bool = False,
        q_proj_weight: torch.Tensor | None = None,
        k_proj_weight: torch.Tensor | None = None,
        v_proj_weight: torch.Tensor | None = None,
        static_k: torch.Tensor | None = None,
        static_v: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Answer | str:
        """What multi_head_attention_forward returns, or why torch is to compute it."""
        parameters = {"in_proj_weight": in_proj_weight}
        if use_separate_proj_weight:
            parameters = {
                "q_proj_weight": q_proj_weight,
                "k_proj_weight": k_proj_weight,
                "v_proj_weight": v_proj_weight,
            }
        parameters |= {"in_proj_bias": in_proj_bias, "bias_k": bias_k, "bias_v": bias_v}
        parameters |= {"out_proj.weight": out_proj_weight, "out_proj.bias": out_proj_bias}
        tensors = {name: tensor for name, tensor in parameters.items() if tensor is not None}
        packed = self._packed.of(out_proj_weight)
        masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
        if training and dropout_p != 0:
            reason = "dropout"
        elif static_k is not None or static_v is not None:
            reason = "static keys or values"
        else:
            reason = why_torch((query, key, value), masks, list(tensors.values()))
        if reason in ("dropout", "gradients"):  # these are for training, which changes the parameters
            packed.drop()
        if reason:
            return reason
        hint = resolve_hint(is_causal, need_weights, key_padding_mask, attn_mask, "bias_k" in tensors or add_zero_attn)
        if isinstance(hint, str):
            return hint
        attn_mask, is_causal = hint
        kdim = vdim = embed_dim_to_check
        if use_separate_proj_weight and key.dim() and value.dim():
            kdim, vdim = key.size(-1), value.size(-1)
        call = Call(
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            embed_dim_to_check,
            num_heads,
            kdim,
            vdim,
            batch_first=False,
            add_zero_attn=add_zero_attn,
        )
        return attend(packed, tensors, call)


HARMLESS_MODES.add(AttentionMode)


def is_one_query(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether a call has one query and several keys of float32 or float64, which torch reads faster so far.

    Examples
    --------
    >>> x = torch.ones(2, 4, 5, 8)
    >>> is_one_query(x[:, :, :1], x), is_one_query(x[:, :, :1].half(), x.half())
    (True, False)
    """
    is_one = query.dim() > 1 and query.size(-2) == 1 and key.dim() > 1 and key.size(-2) > 1
    return is_one and query.dtype.itemsize > 2


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | str:
    """What scaled_dot_product_attention returns, which has checked the types; or why torch is to compute it."""
    reason = why_torch((query, key, value), () if attn_mask is None else (attn_mask,))
    if reason:
        return reason
    if dropout_p != 0:
        return "dropout"
    if attn_mask is not None and is_causal:
        return "attn_mask with is_causal"
    if scale is not None and not 0 < scale < math.inf:
        return "unusual scale"  # with which torch's kernel multiplies -inf
    if is_one_query(query, key):
        return ONE_QUERY
    if not query.numel() or not key.numel():
        return MISFIT  # torch does not broadcast their leading axes
    try:
        arrays = (array_of(query), array_of(key), array_of(value))
        mask = None if attn_mask is None else array_of(attn_mask)
    except (RuntimeError, TypeError, ValueError):
        return UNREADABLE
    out = None
    if mask is None or mask.ndim > 1:  # torch's choice reads two axes of a mask
        choice = torch._fused_sdp_choice(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        out = array_of(torch.empty_like(query)) if choice == _FLASH else None
    answer = ask_core(
        _core.scaled_dot_product_attention, *arrays, mask, 0.0, is_causal, scale, enable_gqa, 0, out
    )
    return answer if isinstance(answer, str) else tensor_of(answer)
