# SPDX-License-Identifier: Apache-2.0
"""Import this before torchvision, or transformers, where torchvision's operators were compiled for another torch.

Without them torchvision cannot even be imported: it describes two of them. Its models use none. Where torchvision is
not installed, or its operators can be loaded, nothing happens.
"""

import importlib.util
from pathlib import Path

import torch

_found = importlib.util.find_spec("torchvision")
if _found is not None and _found.origin is not None:
    try:
        torch.ops.load_library(Path(_found.origin).with_name("_C.so"))
    except OSError:
        _library = torch.library.Library("torchvision", "DEF")
        for _name in "nms", "qnms":
            _library.define(f"{_name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
