# SPDX-License-Identifier: Apache-2.0
"""The classes of layers of torch, which are changed in place. Imported through mha_c.torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.utils.parametrize import is_parametrized

from mha_c.module import overridden_method

__all__ = ["attention_layers", "class_over", "set_class", "torch_class_of", "why_left_alone"]

_classes_over: dict[tuple[type, type], type[torch.nn.Module]] = {}


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.MultiheadAttention]]:
    """The attention layers of a model by name, those of subclasses included."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.MultiheadAttention):
            yield name, layer


def torch_class_of(layer: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of a layer without what `set_class` and parametrize have put over it."""
    cls = type(layer).__bases__[0] if is_parametrized(layer) else type(layer)
    found: type[torch.nn.Module] = getattr(cls, "_torch_class", cls)
    return found


def why_left_alone(
    layer: torch.nn.Module,
    torchs: type[torch.nn.Module] = torch.nn.MultiheadAttention,
    methods: tuple[str, ...] = ("forward",),
) -> str:
    """Which method of a layer is not torch's, so that its class cannot be replaced; "" if there is none."""
    method = overridden_method(layer, torch_class_of(layer), torchs, methods)
    return f"overrides {method}" if method else ""


def class_over(cls: type[torch.nn.Module], mixin: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """`mixin` if it stands for this very class; else a class that inherits from both, the same one each time."""
    if getattr(mixin, "_torch_class", None) is cls:
        return mixin
    if (cls, mixin) not in _classes_over:
        members = {"_torch_class": cls, "_mixin": mixin}
        _classes_over[cls, mixin] = type(f"Replaced{cls.__name__}", (mixin, cls), members)
    return _classes_over[cls, mixin]


def set_class(layer: torch.nn.Module, cls: type[torch.nn.Module]) -> None:
    """Change the class of a layer. torch's parametrize makes a class for each module, which stays above this one."""
    if is_parametrized(layer):
        members = {name: value for name, value in vars(type(layer)).items() if name not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), members)
    layer.__class__ = cls
