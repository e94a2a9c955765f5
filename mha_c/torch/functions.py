# SPDX-License-Identifier: Apache-2.0
"""torch's functions of attention computed by mha_c within a block. Imported through mha_c.torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention

from mha_c import _core
from mha_c.display.coverage import Coverage
from mha_c.torch.tensors import TransparentMode, array_of, reason_for_torch, threads_of_both

__all__ = ["ONE_QUERY", "AttentionMode", "attention"]

ONE_QUERY = "one query"  # such calls wait for memory, which torch reads faster so far
_FLASH = 1  # torch's kernel that lays its result out as the query; other results are C-contiguous


@contextmanager
def attention() -> Iterator[Coverage]:
    """docstring"""
    coverage = Coverage()
    with AttentionMode(coverage):
        yield coverage


class AttentionMode(TransparentMode):
    """Inside it torch's functions of attention compute with mha_c where they can; each call is counted."""

    def __init__(self, coverage: Coverage, module: str = "", class_name: str = "") -> None:
        super().__init__()
        self._coverage = coverage
        self._module = module
        self._class_name = class_name

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        call = _Attention(*args, **kwargs)
        if type(call.attn_mask) is CausalBias:
            with self:  # torch calls the function again, with what the bias stands for
                return CausalBias.__torch_function__(func, types, args, kwargs)
        result = call.compute()
        reason = result if isinstance(result, str) else ""
        self._coverage.add(self._module, self._class_name or func.__name__, reason)
        return func(*args, **kwargs) if reason else result


@dataclass
class _Attention:
    """A call of scaled_dot_product_attention."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    _: KW_ONLY
    scale: Any = None
    enable_gqa: Any = False

    def compute(self) -> torch.Tensor | str:
        """The result, or why torch is to compute it."""
        query, key, value, mask = self.query, self.key, self.value, self.attn_mask
        reason = reason_for_torch(query, (key, value) if mask is None else (key, value, mask))
        if reason:
            return reason
        if self.dropout_p != 0:
            return "dropout"
        if mask is not None and self.is_causal:
            return "attn_mask with is_causal"
        if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
            return f"attn_mask of {name_of(mask.dtype)}"
        if query.dim() > 1 and query.size(-2) == 1 and key.dim() > 1 and key.size(-2) > 1:
            return ONE_QUERY
        options = (self.dropout_p, self.is_causal)
        try:
            arrays = [array_of(tensor) for tensor in (query, key, value)]
            mask_array = None if mask is None else array_of(mask)
        except RuntimeError as error:  # such as a view that only negates
            return str(error)
        kernel = torch._fused_sdp_choice(query, key, value, mask, *options, scale=self.scale, enable_gqa=self.enable_gqa)
        out = array_of(torch.empty_like(query)) if kernel == _FLASH else None
        try:
            with threads_of_both():
                output = _core.scaled_dot_product_attention(
                    *arrays, mask_array, *options, self.scale, self.enable_gqa, 0, out
                )
        except Exception as error:
            if getattr(error, "refused", False):
                return str(error)
            raise
        return torch.from_numpy(output)
