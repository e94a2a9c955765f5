# SPDX-License-Identifier: Apache-2.0
"""One layer of a Transformer, or a stack of them, beside torch's: both are measured against their definition."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from mha_c.check.compare import Comparison
from mha_c.check.definition import causal_mask, transform
from mha_c.check.report import Report
from mha_c.check.requirement import arguments_by_name, require_torch
from mha_c.display.words import describe_call
from mha_c.module import Module
from mha_c.parameters.arrays import as_array
from mha_c.parameters.dtypes import DTYPES, DTYPE_NAMES
from mha_c.transformer.decoder import TransformerDecoder, TransformerDecoderLayer
from mha_c.transformer.encoder import TransformerEncoder, TransformerEncoderLayer
from mha_c.transformer.transformer import Transformer

__all__ = ["compare_transformer", "transformer_class"]

_CLASSES: Final = (
    TransformerEncoderLayer,
    TransformerEncoder,
    TransformerDecoderLayer,
    TransformerDecoder,
    Transformer,
)

# The flags of the causal order, with their masks; queries; and keys, which may be the queries.
_ORDERS: Final = (
    ("is_causal", ("src_mask", "mask"), "src", "src"),
    ("src_is_causal", ("src_mask",), "src", "src"),
    ("tgt_is_causal", ("tgt_mask",), "tgt", "tgt"),
    ("memory_is_causal", ("memory_mask",), "tgt", "memory"),
)


def transformer_class(module: Any) -> type[Any] | None:
    """The class of mha_c that a layer of mha_c or of torch is of, if it is one of a Transformer.

    Parameters
    ----------
    module : object
        The layer.

    Returns
    -------
    type or None

    Examples
    --------
    >>> import torch
    >>> transformer_class(torch.nn.TransformerEncoderLayer(8, 2)).__name__
    'TransformerEncoderLayer'
    """
    names = [base.__name__ for base in type(module).__mro__ if base.__module__.startswith(("torch.nn.", "mha_c."))]
    return next((cls for cls in _CLASSES if cls.__name__ in names), None)


def compare_transformer(module: Any, *inputs: Any, **call: Any) -> Report:
    """Compare a layer of a Transformer, or a stack of them, with the same of torch, on the same inputs.

    Parameters
    ----------
    module : Module or torch.nn.Module
        The layer. The other library's layer is made from it.
    *inputs, **call
        The arguments of its call, as for `against_torch`.

    Returns
    -------
    Report
        The output. Padded rows are computed.

    Raises
    ------
    ImportError
        If torch is not installed.
    TypeError
        If the layer has a dtype that layers of mha_c do not have.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> x = np.random.default_rng(0).standard_normal((5, 3, 8), dtype=np.float32)
    >>> compare_transformer(mha_c.TransformerEncoderLayer(8, 2, 16, seed=0), x, is_causal=True).agrees
    True
    """
    require_torch("check.against_torch")
    from mha_c.torch.convert import TORCH_VERSION, layer_in_torch, to_torch

    cls = transformer_class(module)
    assert cls is not None, "the caller asked transformer_class()"
    # From torch and back, a copy has parts of its own and computes padded rows.
    layer = cls.from_torch(to_torch(module) if isinstance(module, Module) else module).eval()
    for part in layer.modules():
        if hasattr(part, "padded"):
            part.padded = "computed"
    dtype = str(next(iter(module.parameters())).dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise TypeError(f"a layer of mha_c is {DTYPE_NAMES}, but this one is {dtype}: check a copy.float()")
    arguments = {
        name: one if one is None or name.endswith("causal") else as_array(one, name=name)
        for name, one in arguments_by_name(layer.forward, layer, *inputs, **call).items()
    }
    ours = layer(**arguments)
    theirs = layer_in_torch(layer, _spelt_out_for_torch(layer, arguments))
    comparison = Comparison.measure("output", ours, theirs, transform(layer, *arguments.values()))
    title = f"mha_c and torch {TORCH_VERSION}: {type(layer).__name__}; {describe_call(arguments)}"
    return Report(title, (comparison,))


def _spelt_out_for_torch(layer: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same question for torch, for which the causal order is a mask."""
    asked = dict(arguments)
    accepted = inspect.signature(layer.forward).parameters
    batch_first = next(part.batch_first for part in layer.modules() if hasattr(part, "batch_first"))

    def length(name: str) -> int:
        array = asked[name] if name in asked else asked["src"]  # a Transformer's memory is as long as its source
        return int(array.shape[1 if batch_first and array.ndim == 3 else 0])

    for flag, masks, queries, keys in _ORDERS:
        if asked.pop(flag, False):
            mask = next(name for name in masks if name in accepted)
            asked[mask] = causal_mask(asked.get(mask), length(queries), length(keys))
    return asked
