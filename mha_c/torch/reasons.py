# SPDX-License-Identifier: Apache-2.0
"""Why a call is left to torch, in a few words for a coverage. Imported through mha_c.torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch.overrides import _get_current_function_mode_stack, has_torch_function
from torch.utils._device import DeviceContext

__all__ = ["DTYPES", "HARMLESS_MODES", "PLAIN_TENSORS", "why_torch"]

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.float16)
if find_spec("ml_dtypes") is not None:  # which has the bfloat16 of NumPy
    DTYPES += (torch.bfloat16,)
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

#: Function modes that need not see attention: it makes no tensor whose device they could choose.
HARMLESS_MODES: set[type] = {DeviceContext}


def why_torch(
    inputs: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor] = ()
) -> str:
    """Why torch is to compute attention of these tensors, or "" if mha_c can.

    Shapes are not looked at, nor whether NumPy can read the tensors.

    Parameters
    ----------
    inputs : sequence of torch.Tensor
        The query, the key and the value.
    masks : sequence of torch.Tensor
        The masks that there are: booleans, or of the query's dtype.
    parameters : sequence of torch.Tensor, optional
        The parameters of the layer, if it is one.

    Returns
    -------
    str

    Examples
    --------
    >>> why_torch([torch.zeros(5, 3, 8)] * 3, [])
    ''
    >>> why_torch([torch.zeros(5, 3, 8, dtype=torch.complex64)] * 3, [])
    'complex64'
    >>> why_torch([torch.zeros(5, 3, 8, requires_grad=True)] * 3, [])
    'gradients'
    """
    for tensor in (*inputs, *masks, *parameters):
        if type(tensor) not in PLAIN_TENSORS:
            return type(tensor).__name__
        if tensor.is_nested:
            return "nested tensors"
    dtype = inputs[0].dtype
    if dtype not in DTYPES:
        return f"{_name(dtype)} without ml_dtypes" if dtype == torch.bfloat16 else _name(dtype)
    for mask in masks:
        if mask.dtype not in (dtype, torch.bool):
            return f"mask in {_name(mask.dtype)}"
    device = "" if inputs[0].is_cpu else f"tensors on {inputs[0].device.type}"
    return _what_watches([*inputs, *masks, *parameters]) or device


def _what_watches(tensors: list[torch.Tensor]) -> str:
    """What has to see the single operations of torch: to differentiate, trace, transform, intercept or cast them."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients"
    if has_torch_function(tensors):
        modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if any(type(mode) not in HARMLESS_MODES for mode in modes):
            return "function mode"
    if torch._C._get_tracing_state() is not None:
        return "tracing"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0:  # the compiler has its own
        return "dispatch mode"
    if torch._C._are_functorch_transforms_active():
        return "function transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode gradients"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
