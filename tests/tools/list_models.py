# SPDX-License-Identifier: Apache-2.0
"""The table of docs/models.md: models of transformers, timm, torchvision and open_clip with their attention here.

    python tests/tools/list_models.py

Each model has random weights. Its errors are the largest difference from the same model in float64, by the largest number
of that one's output: with mha_c, and with torch. The last column says by how much the float64 output changes where
attention is computed without one of its traits. The exit status is 1 if a model has more than three times torch's error.

It is 77 if a library is missing: `pip install --no-deps torchvision timm open_clip_torch ftfy`. The torchvision that this
gets may have its operators compiled for another build of torch; none of them is needed.
"""

import copy
import sys
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

try:
    import torch
    import torchvision_operators  # noqa: F401
    import open_clip
    import timm
    import torchvision
    import transformers
except ModuleNotFoundError as error:
    print(f"{error.name} is not installed")
    sys.exit(77)
import torch.nn.functional as F  # noqa: E402
from hugging_face import CASES, examine, register_definition, set_random_parameters  # noqa: E402
from mha_c.torch import attention, register_transformers  # noqa: E402


class Without(torch.overrides.TorchFunctionMode):
    """torch's functions of attention without one of their arguments."""

    def __init__(self, trait):
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


def image(size, batch=2):
    return torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(1))


def of_timm(name, size=32, **options):
    return name, lambda: timm.create_model(name, img_size=size, num_classes=10, **options), image(size)


_small = {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 8}
MODELS = [
    *(("timm", *case) for case in (
        of_timm("vit_tiny_patch16_224", **_small),
        of_timm("deit_tiny_distilled_patch16_224", **_small),
        of_timm("vit_medium_patch16_reg4_gap_256", **_small),
        of_timm("beit_base_patch16_224", **_small),
        of_timm("eva02_tiny_patch14_224", **_small),
        of_timm("swin_tiny_patch4_window7_224", 64, embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4),
    )),
    ("torchvision", "VisionTransformer", lambda: torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128), image(32)),
    ("open_clip", "RN50, image", lambda: open_clip.create_model("RN50").visual, image(224, 1)),
    ("open_clip", "ViT-B-32, image", lambda: open_clip.create_model("ViT-B-32").visual, image(224, 1)),
    ("open_clip", "ViT-B-32, text", lambda: Text(open_clip.create_model("ViT-B-32")), torch.arange(1, 78)[None]),
]


class Text(torch.nn.Module):
    """The text tower of CLIP."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.encode_text(tokens)


@torch.no_grad()
def examine_model(make, x):
    """Errors with mha_c and with torch, what each trait changes, and the coverage."""
    torch.manual_seed(0)
    model = set_random_parameters(make().eval())
    exact, y = copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x
    wanted = exact(y)

    def error(result):
        return float((result - wanted).abs().max() / wanted.abs().max())

    theirs = error(model(x))
    with attention() as coverage:
        ours = error(model(x))
    without = {}
    for trait in "mask", "scale", "biases":
        with Without(trait):
            without[trait] = error(exact(y))
    return coverage, ours, theirs, without


def show(library, name, here, calls, ours, theirs, without):
    """Prints a row; returns how many times torch's the error is."""
    changes = ", ".join(f"{trait} {change:.2g}" for trait, change in without.items() if change > 1e-9)
    print(f"| {library} | {name} | {here} / {calls} | {ours:.1e} | {theirs:.1e} | {changes} |", flush=True)
    return ours / theirs


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    timm.layers.set_fused_attn(True, experimental=True)  # Swin calls torch's function only then
    register_definition()
    coverage = register_transformers()
    print("| library | model | calls here / all | error | torch's error | changed by leaving out |")
    print("| - | - | - | - | - | - |")
    ratios = []
    for case in CASES:
        found = examine(case, coverage, "mha_c")
        ratios.append(show("transformers", case.model.__name__, found.here, found.here + found.left, found.ours,
                           found.theirs, found.without))
    for library, name, make, x in MODELS:
        calls, ours, theirs, without = examine_model(make, x)
        ratios.append(show(library, name, calls.here, calls.here + calls.left, ours, theirs, without))
    return int(max(ratios) > 3)


if __name__ == "__main__":
    sys.exit(main())
