# SPDX-License-Identifier: Apache-2.0
"""The classes of torch's attention layers, which are changed in place. Imported through mha_c.torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["attention_layers", "class_over", "set_class", "torch_class_of", "why_left_alone"]

_classes_over: dict[tuple[type, type], type[torch.nn.MultiheadAttention]] = {}


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.MultiheadAttention]]:
    """The attention layers of a model by name, those of subclasses included."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.MultiheadAttention):
            yield name, layer


def torch_class_of(layer: torch.nn.MultiheadAttention) -> type[torch.nn.MultiheadAttention]:
    """The class of a layer without what `set_class` and parametrize have put over it."""
    cls = type(layer).__bases__[0] if is_parametrized(layer) else type(layer)
    found: type[torch.nn.MultiheadAttention] = getattr(cls, "_torch_class", cls)
    return found


def why_left_alone(layer: torch.nn.MultiheadAttention) -> str:
    """Why another class cannot stand in for that of the layer, or ""."""
    is_torchs = "forward" not in vars(layer) and torch_class_of(layer).forward is torch.nn.MultiheadAttention.forward
    return "" if is_torchs else "a forward of its own"


def class_over(
    cls: type[torch.nn.MultiheadAttention], mixin: type[torch.nn.MultiheadAttention]
) -> type[torch.nn.MultiheadAttention]:
    """`mixin` for torch's own class; for a subclass, a class that inherits from both, the same one each time."""
    if cls is torch.nn.MultiheadAttention:
        return mixin
    if (cls, mixin) not in _classes_over:
        name = mixin.__name__.removesuffix("Attention") + cls.__name__
        _classes_over[cls, mixin] = type(name, (mixin, cls), {"_torch_class": cls})
    return _classes_over[cls, mixin]


def set_class(layer: torch.nn.MultiheadAttention, cls: type[torch.nn.MultiheadAttention]) -> None:
    """Change the class of a layer. torch's parametrize makes a class for each module, which stays above this one."""
    if is_parametrized(layer):
        members = {name: value for name, value in vars(type(layer)).items() if name not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), members)
    layer.__class__ = cls
