# SPDX-License-Identifier: Apache-2.0
"""Models of torch that compute their attention or whole layers with mha_c, and layers of mha_c as torch's."""

from mha_c.display.missing import no_torch

try:
    import torch as _torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise no_torch("mha_c.torch needs") from error

from mha_c.torch.convert import forward_in_torch, from_torch, read_checkpoint, state_dict, to_torch
from mha_c.torch.functions import attention
from mha_c.torch.layers import ReplacedLayer
from mha_c.torch.replace import coverage, replace_attention, replace_layers, restore_attention
from mha_c.torch.replaced import ReplacedAttention
from mha_c.torch.transformers import register_transformers

__all__ = [
    "ReplacedAttention",
    "ReplacedLayer",
    "attention",
    "coverage",
    "forward_in_torch",
    "from_torch",
    "read_checkpoint",
    "register_transformers",
    "replace_attention",
    "replace_layers",
    "restore_attention",
    "state_dict",
    "to_torch",
]


def __dir__() -> list[str]:
    return sorted(__all__)
