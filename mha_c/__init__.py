# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention as torch.nn.MultiheadAttention computes it, on NumPy arrays, without torch.

>>> import mha_c, numpy as np
>>> attention = mha_c.MultiheadAttention(embed_dim=8, num_heads=4)
>>> x = np.zeros((5, 3, 8), dtype=np.float32)  # (length, batch, features)
>>> output, weights = attention(x, x, x)
>>> output.shape
(5, 3, 8)
"""

from __future__ import annotations

__all__ = [
    "AnyArray",
    "Dropout",
    "LayerNorm",
    "Linear",
    "ModuleList",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "explain",
    "get_num_threads",
    "num_threads",
    "set_num_threads",
    "show_config",
]

from importlib import import_module
from typing import TYPE_CHECKING

try:
    import_module("mha_c._core")  # `import mha_c._core` would make mha_c an attribute of itself
except ModuleNotFoundError as error:
    if error.name != "mha_c._core":
        raise
    raise ImportError(
        f"Python imported mha_c from {__path__[0]}, where its C extension is not built. In a source tree, build it "
        "with `pip install -e .`; to use an installed mha_c instead, start Python in another directory."
    ) from error

from mha_c._version import __version__ as __version__
from mha_c.container import ModuleList
from mha_c.dropout import Dropout
from mha_c.layer import MultiheadAttention
from mha_c.linear import Linear
from mha_c.norms import LayerNorm, RMSNorm
from mha_c.parameters.arrays import AnyArray
from mha_c.threads import get_num_threads, num_threads, set_num_threads, show_config
from mha_c.transformer.decoder import TransformerDecoder, TransformerDecoderLayer
from mha_c.transformer.encoder import TransformerEncoder, TransformerEncoderLayer
from mha_c.transformer.transformer import Transformer

# Imported when first used: `import mha_c` needs NumPy alone.
_SUBMODULES = ("check", "demo", "functional", "heads", "plot", "torch")

if TYPE_CHECKING:
    from mha_c import check as check, demo as demo, functional as functional
    from mha_c import heads as heads, plot as plot, torch as torch
    from mha_c.explanation import explain
else:

    def __getattr__(name: str) -> object:
        if name == "explain":
            from mha_c.explanation import explain

            return explain
        if name in _SUBMODULES:
            return import_module(f"mha_c.{name}")
        raise AttributeError(f"module 'mha_c' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])
