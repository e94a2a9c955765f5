# SPDX-License-Identifier: Apache-2.0
"""Layers of torch that are not plain ones: subclasses, and weights that are not parameters."""

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune


class Named(nn.MultiheadAttention):
    """Overrides other things than forward."""

    def __init__(self, *args, name="self", **kwargs):
        super().__init__(*args, **kwargs)
        self.name = name
        self.calls = 0  # a name that others might use, too
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.zeros(2))

    def extra_repr(self):
        return f"name={self.name}"


class Computed(nn.MultiheadAttention):
    """The weight is computed when it is read, from parameters with other names."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.base = nn.Parameter(self.in_proj_weight.detach().clone())
        self.change = nn.Parameter(torch.randn(len(self.base), 1) @ torch.randn(1, self.embed_dim) / 10)
        del self.in_proj_weight

    @property
    def in_proj_weight(self):
        return self.base + self.change

    @in_proj_weight.setter
    def in_proj_weight(self, value):
        self.register_parameter("in_proj_weight", value)

    @in_proj_weight.deleter
    def in_proj_weight(self):
        del self._parameters["in_proj_weight"]


class OwnForward(nn.MultiheadAttention):
    """Adds LoRA weights for the time of the call."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_B = nn.Parameter(torch.ones(3 * self.embed_dim, self.embed_dim))

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            self.in_proj_weight += self.lora_B
            result = super().forward(*args, **kwargs)
            self.in_proj_weight -= self.lora_B
        return result


class LoraLinear(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """Overrides a forward that torch's attention does not call."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora = nn.Parameter(torch.randn(self.out_features, self.in_features))

    def forward(self, x):
        return super().forward(x) + x @ self.lora.T


class MergedLinear(LoraLinear):
    """torch's attention reads this weight, which is computed when it is read."""

    @property
    def weight(self):
        return self.original + self.lora

    @weight.setter
    def weight(self, value):
        self.register_parameter("original", value)


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


def plain(**options):
    return nn.MultiheadAttention(16, 2, **options)


def merged(**options):
    """Merged LoRA weights: plain tensors in place of parameters."""
    module = plain(**options)
    for owner, name in ((module, "in_proj_weight"), (module.out_proj, "weight")):
        weight = getattr(owner, name).detach() + 0.1
        delattr(owner, name)
        setattr(owner, name, weight)
    return module


def buffers(**options):
    module = plain(**options)
    for owner, name in ((module, "in_proj_weight"), (module, "in_proj_bias"), (module.out_proj, "weight")):
        tensor = getattr(owner, name).detach()
        delattr(owner, name)
        owner.register_buffer(name, tensor)
    return module


def changed(change):
    def make(**options):
        module = plain(**options)
        change(module)
        return module
    return make


def with_output(cls):
    return changed(lambda module: setattr(module, "out_proj", cls(16, 16)))


#: How to make each kind: functions that take batch_first and dtype.
STORED = {  # weights that stay what they are from call to call
    "plain": plain,
    "subclass": lambda **options: Named(16, 2, **options),
    "merged": merged,
    "buffers": buffers,
    "weight_norm of the output, by hooks that attention does not run": changed(
        lambda module: nn.utils.weight_norm(module.out_proj)),
    "other output": with_output(nn.Linear),
    "LoRA output": with_output(LoraLinear),
    "wider output": changed(lambda module: setattr(module, "out_proj", nn.Linear(16, 20))),
    "no bias of the output": changed(lambda module: setattr(module.out_proj, "bias", None)),
    "no bias of the inputs": changed(lambda module: setattr(module, "in_proj_bias", None)),
}
MADE_ANEW = {  # weights that are computed in each call
    "subclass with computed weights": lambda **options: Computed(16, 2, **options),
    "merged output": with_output(MergedLinear),
    "pruned": changed(lambda module: prune.l1_unstructured(module, "in_proj_weight", 0.5)),
    "weight_norm by hooks": changed(lambda module: nn.utils.weight_norm(module, "in_proj_weight")),
}
PARAMETRIZED = {
    "weight_norm": changed(lambda module: parametrizations.weight_norm(module, "in_proj_weight")),
    "weight_norm of the output": changed(lambda module: parametrizations.weight_norm(module.out_proj)),
    "orthogonal output": changed(lambda module: parametrizations.orthogonal(module.out_proj)),
    "parametrized bias": changed(lambda module: parametrize.register_parametrization(module, "in_proj_bias", Doubling())),
    "parametrized subclass": lambda **options: parametrize.register_parametrization(
        Named(16, 2, **options), "in_proj_weight", Doubling()),
}
