# SPDX-License-Identifier: Apache-2.0
"""Small models of timm, torchvision and open_clip with random weights, which call torch's functions of attention."""

import copy
import importlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision_operators  # noqa: F401
from mha_c.torch import attention
from random_parameters import set_random_parameters

TRAITS = ("mask", "scale", "biases")


class Without(torch.overrides.TorchFunctionMode):
    """torch's functions of attention without one of TRAITS."""

    def __init__(self, trait):
        super().__init__()
        self.trait = trait

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self.trait in ("mask", "scale"):
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            kwargs.update(zip(names, args, strict=False))
            kwargs.update({"attn_mask": None, "is_causal": False} if self.trait == "mask" else {"scale": 1.0})
            args = ()
        if func is F.multi_head_attention_forward and self.trait == "mask":
            kwargs["attn_mask"] = None
        if func is F.multi_head_attention_forward and self.trait == "biases":
            args = (*args[:6], None, *args[7:])
        return func(*args, **kwargs)


class Case(NamedTuple):
    """A model, its input, and the traits without which the output would be another one."""

    library: str
    name: str
    make: Callable[[Any], torch.nn.Module]  # from the library
    x: torch.Tensor
    traits: tuple[str, ...]
    calls: int  # of attention


def images(size):
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(1))


_small = {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 8}


def of_timm(name, *traits, size=32, calls=2, **options):
    def make(timm):
        timm.layers.set_fused_attn(True, experimental=True)  # Swin calls torch's function only then
        return timm.create_model(name, img_size=size, num_classes=10, **(options or _small))
    return Case("timm", name, make, images(size), traits, calls)


class Text(torch.nn.Module):
    """The text tower of CLIP."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.encode_text(tokens)


def of_clip(name, part, x, *traits, calls=2, layers=2):
    def make(open_clip):
        vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": layers}
        text = {"context_length": 16, "vocab_size": 90, "width": 64, "heads": 4, "layers": 2}
        return part(open_clip.CLIP(32, vision, text))
    return Case("open_clip", name, make, x, traits, calls)


CASES = [
    of_timm("vit_tiny_patch16_224", "scale"),
    of_timm("deit_tiny_distilled_patch16_224", "scale"),
    of_timm("vit_medium_patch16_reg4_gap_256", "scale"),
    of_timm("beit_base_patch16_224", "mask", "scale"),
    of_timm("eva02_tiny_patch14_224", "scale"),
    of_timm("swin_tiny_patch4_window7_224", "mask", "scale", size=64, calls=4, embed_dim=32, depths=(2, 2),
            num_heads=(2, 4), window_size=4),
    Case("torchvision", "VisionTransformer", lambda torchvision: torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128), images(32), ("biases",), 2),
    of_clip("CLIP, images by a residual network", attrgetter("visual"), images(32), "biases", calls=1, layers=[1, 1, 1, 1]),
    of_clip("CLIP, images", attrgetter("visual"), images(32), "biases"),
    of_clip("CLIP, text", Text, torch.arange(1, 17)[None], "mask", "biases"),
]


class Finding(NamedTuple):
    """Of one case: calls, and how far results are from the same model in float64, relative to its largest number."""

    here: int
    left: int
    ours: float
    theirs: float  # torch in float32
    without: dict[str, float]  # by trait: the model in float64 without it


@torch.no_grad()
def examine(case):
    torch.manual_seed(0)
    model = set_random_parameters(case.make(importlib.import_module(case.library)).eval())
    exact, x = copy.deepcopy(model).double(), case.x.double() if case.x.is_floating_point() else case.x
    wanted = exact(x)

    def error(result):
        return float((result - wanted).abs().max() / wanted.abs().max())

    theirs = error(model(case.x))
    with attention() as coverage:
        ours = error(model(case.x))
    without = {}
    for trait in TRAITS:
        with Without(trait):
            without[trait] = error(exact(x))
    return Finding(coverage.here, coverage.left, ours, theirs, without)
