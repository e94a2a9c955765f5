# SPDX-License-Identifier: Apache-2.0
"""torch's two functions of attention on tensors: what mha_c answers, or why torch has to. Imported through mha_c.torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
from numpy.typing import NDArray

from mha_c import _core
from mha_c.threads import get_num_threads, num_threads
from mha_c.torch.packed import PackedParameters
from mha_c.torch.reasons import why_torch

__all__ = ["ONE_QUERY", "attend", "project_and_attend"]

_Answer: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
_Result = TypeVar("_Result")

ONE_QUERY = "one query"  # such calls wait for memory, which torch reads faster so far
_MISFIT = "arguments that do not fit"  # for which torch has words, or an answer
_FLASH = 1  # torch's kernel that lays its result out as the query; other results are C-contiguous


def attend(
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
    """What ``torch.nn.functional.scaled_dot_product_attention`` returns, or why torch is to compute it.

    Parameters
    ----------
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        As torch's, which has checked their types.

    Returns
    -------
    torch.Tensor or str
        Laid out in memory as torch's result.

    Examples
    --------
    >>> attend(*[torch.zeros(2, 4, 5, 8)] * 3).shape
    torch.Size([2, 4, 5, 8])
    >>> attend(*[torch.zeros(2, 4, 5, 8)] * 3, dropout_p=0.5)
    'dropout'
    """
    reason = why_torch((query, key, value), () if attn_mask is None else (attn_mask,))
    if reason:
        return reason
    if dropout_p != 0:
        return "dropout"
    if attn_mask is not None and is_causal:
        return "attn_mask with is_causal"
    if scale is not None and not 0 < scale < math.inf:
        return "unusual scale"  # with which torch's kernel multiplies -inf
    if query.dim() > 1 and query.size(-2) == 1 and key.dim() > 1 and key.size(-2) > 1:
        return ONE_QUERY
    arrays = _arrays_of(query, key, value, attn_mask)
    if arrays is None:
        return _where(query)
    options = (dropout_p, is_causal)
    kernel = torch._fused_sdp_choice(query, key, value, attn_mask, *options, scale=scale, enable_gqa=enable_gqa)
    out = torch.empty_like(query).numpy() if kernel == _FLASH else None
    output = _compute(_core.scaled_dot_product_attention, *arrays, *options, scale, enable_gqa, 0, out)
    return output if isinstance(output, str) else torch.from_numpy(output)


def project_and_attend(
    packed: PackedParameters,
    tensors: Mapping[str, torch.Tensor],
    widths: tuple[int, int, int | None, int | None],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    need_weights: bool,
    attn_mask: torch.Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    *,
    add_zero_attn: bool,
    batch_first: bool = False,
    static_k: torch.Tensor | None = None,
    static_v: torch.Tensor | None = None,
) -> _Answer | str:
    """What ``torch.nn.functional.multi_head_attention_forward`` returns, or why torch is to compute it.

    Parameters
    ----------
    packed : PackedParameters
        Where the parameters are kept packed.
    tensors : mapping of str to torch.Tensor
        The parameters, as for ``PackedParameters.get``.
    widths : tuple of int, int, int or None, int or None
        embed_dim, num_heads, kdim and vdim.
    query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        As torch's; in particular `is_causal` is a hint about `attn_mask`, not a mask.
    add_zero_attn, batch_first : bool
        As for ``torch.nn.MultiheadAttention``.
    static_k, static_v : torch.Tensor, optional
        As torch's.

    Returns
    -------
    tuple of torch.Tensor and torch.Tensor or None, or str

    Examples
    --------
    >>> x, tensors = torch.zeros(5, 3, 8), {"in_proj_weight": torch.zeros(24, 8), "out_proj.weight": torch.zeros(8, 8)}
    >>> options = (None, True, None, True, False)
    >>> output, weights = project_and_attend(
    ...     PackedParameters(), tensors, (8, 2, None, None), x, x, x, *options, add_zero_attn=False)
    >>> weights.shape
    torch.Size([3, 5, 5])
    """
    if not isinstance(is_causal, bool):
        return _MISFIT  # sometimes
    if is_causal and attn_mask is None:
        return "is_causal without attn_mask"
    masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
    static = [tensor for tensor in (static_k, static_v) if tensor is not None]
    reason = why_torch((query, key, value, *static), masks, list(tensors.values()))
    if reason:
        return reason
    if is_causal and key_padding_mask is None and not need_weights:
        # Here torch ignores attn_mask and computes what is_causal=True means in mha_c, except that it hides the keys
        # of bias_k and add_zero_attn too.
        if attn_mask is None or attn_mask.dim() != 2 or "bias_k" in tensors or add_zero_attn:
            return "is_causal with added keys"
        attn_mask = None
    else:
        is_causal = False  # torch goes by attn_mask
    parameters = packed.get(tensors, *widths)
    if parameters is None:
        is_inference = any(tensor.is_inference() for tensor in tensors.values())
        return "parameters made in inference mode" if is_inference else "unusual parameters"
    arrays = _arrays_of(query, key, value, key_padding_mask, attn_mask, static_k, static_v)
    if arrays is None:
        return _where(query)
    q, k, v, padding, mask, *static_arrays = arrays
    flags = (None, batch_first, add_zero_attn, "torch", 0.0, 0, 0)
    answer = _compute(
        _core.forward,
        parameters.weights, q, k, v, padding, need_weights, mask, average_attn_weights, is_causal, *flags, *static_arrays
    )
    if isinstance(answer, str):
        return answer
    output, weights = answer
    return torch.from_numpy(output), None if weights is None else torch.from_numpy(weights)


def _compute(function: Callable[..., _Result], *arguments: Any) -> _Result | str:
    """Call the core, on no more threads than torch may use."""
    limit = torch.get_num_threads()
    threads: AbstractContextManager[None] = num_threads(limit) if limit < get_num_threads() else nullcontext()
    try:
        with threads:
            return function(*arguments)
    except Exception as error:
        if getattr(error, "refused", False):
            return _MISFIT
        raise


def _arrays_of(*tensors: torch.Tensor | None) -> list[NDArray[Any] | None] | None:
    """The numbers of tensors in place, or None if NumPy cannot read one of them."""
    try:
        return [None if tensor is None else (tensor.detach() if tensor.requires_grad else tensor).numpy() for tensor in tensors]
    except (RuntimeError, TypeError):
        return None


def _where(query: torch.Tensor) -> str:
    return "tensors that NumPy cannot read" if query.is_cpu else f"tensors on {query.device.type}"
