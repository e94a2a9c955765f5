# SPDX-License-Identifier: Apache-2.0
"""Tensors of torch: which of them mha_c computes, why not the others, and how it reads them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from mha_c.threads import get_num_threads, num_threads

__all__ = ["TransparentMode", "array_of", "name_of", "reason_for_torch", "threads_of_both"]

_DTYPES = (torch.float32, torch.float64)
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


class TransparentMode(TorchFunctionMode):
    """A mode inside which results are the same as outside: replaced layers and functions compute in it."""


def reason_for_torch(query: object, others: Iterable[object]) -> str:
    """Why torch has to compute a call with these tensors, in a word or two; "" where mha_c may."""
    for tensor in (query, *others):
        reason = _reason_of_tensor(tensor)
        if reason:
            return reason
    assert isinstance(query, torch.Tensor)
    if query.dtype not in _DTYPES:
        return name_of(query.dtype)
    return _reason_of_thread()


def _reason_of_tensor(tensor: object) -> str:
    if not isinstance(tensor, torch.Tensor):
        return "not a tensor"
    if type(tensor) not in _PLAIN_TENSORS:
        return "tensor subclass"
    if tensor.is_nested:
        return "nested tensor"
    if tensor.device.type != "cpu":
        return "another device"
    if tensor.requires_grad and torch.is_grad_enabled():
        return "gradients"
    return ""


def _reason_of_thread() -> str:
    """Why torch has to see the single operations of this thread: to cast, trace, transform or intercept them."""
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if torch._C._get_tracing_state() is not None:
        return "tracing"
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode gradients"
    modes = torch.overrides._get_current_function_mode_stack()
    if torch._C._len_torch_dispatch_stack() or not all(isinstance(mode, _TRANSPARENT) for mode in modes):
        return "another mode"
    return ""


_TRANSPARENT = (TransparentMode, DeviceContext)  # torch.set_default_device only concerns tensors without a device


def name_of(dtype: torch.dtype) -> str:
    """Such as "float16"."""
    return str(dtype).removeprefix("torch.")


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The numbers of a tensor, in place."""
    array: NDArray[Any] = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    return array


def threads_of_both() -> AbstractContextManager[None]:
    """Neither more threads than mha_c may use, nor more than torch may."""
    limit = torch.get_num_threads()
    return num_threads(limit) if limit < get_num_threads() else nullcontext()
