# SPDX-License-Identifier: Apache-2.0
"""A model of torch with its own attention beside the same model with ours, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mha_c.check.compare import Comparison, Error
from mha_c.check.definition import attend
from mha_c.check.report import Report
from mha_c.display.progress import progress

if TYPE_CHECKING:
    from mha_c.torch.record import ModelOutput

__all__ = ["model"]


def model(model: Any, *inputs: Any, **call: Any) -> Report:
    """Run a model of torch as it is and with its attention replaced, and measure both, layer by layer.

    Copies of the model are run in evaluation mode: two, and one of them in float64 afterwards. The model itself, be its
    attention replaced already or not, stays as it is.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    *inputs, **call
        What it is called with; arrays become tensors.

    Returns
    -------
    Report
        For every call of an attention layer, the outputs of mha_c and torch on the inputs that torch's model gave it;
        then the outputs of the model. Where torch takes its inference path, which fuses layers, the outputs are
        compared with that one too, except in the padded positions that it sets to zero.

    Raises
    ------
    ImportError
        If torch is not installed.
    TypeError, ValueError
        If `model` is no torch module, or has no ``torch.nn.MultiheadAttention``.

    Examples
    --------
    >>> import torch
    >>> from mha_c import check
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> report = check.model(torch.nn.TransformerEncoder(layer, num_layers=2), torch.ones(3, 5, 8))
    >>> [comparison.name for comparison in report.comparisons][:2]
    ['layers.0.self_attn', 'layers.1.self_attn']
    >>> report.agrees
    True
    """
    from mha_c.torch import TORCH_VERSION, run_both_ways

    runs = run_both_ways(model, inputs, call)
    comparisons = []
    for run in progress(runs.attention, "call", "comparing"):
        exact = attend(run.layer, **run.arguments)
        names = (run.name, f"{run.name}, weights")
        comparisons += [
            Comparison.measure(name, ours, theirs, wanted)
            for name, ours, theirs, wanted in zip(names, run.ours, run.theirs, exact, strict=True)
            if ours is not None and theirs is not None
        ]
    for name, output in runs.outputs.items():
        comparisons += _compare_model_output(name, output)
    notes = [f"{name} is left to torch." for name in runs.left_to_torch]
    if any(output.theirs.dtype == np.float64 for output in runs.outputs.values()):
        notes.append(
            "Nothing is wider than float64: the errors of the model's outputs are mha_c's difference from torch, and "
            "torch's error in float32 scaled down to float64."
        )
    title = f"{type(model).__name__} with mha_c and with torch {TORCH_VERSION}"
    return Report(title, tuple(comparisons), tuple(notes))


def _compare_model_output(name: str, output: ModelOutput) -> list[Comparison]:
    ours, theirs, fused, other = output
    torch_error = None
    reference = other
    if theirs.dtype == np.float64:
        # A run in float32 shows how this model magnifies roundings.
        reference, rounded = theirs, Error.between(theirs, other)
        ratio = float(np.finfo(np.float64).eps / np.finfo(np.float32).eps)
        torch_error = Error(rounded.largest * ratio, rounded.rms * ratio)
    comparisons = [Comparison.measure(name, ours, theirs, reference, torch_error)]
    if fused.shape == theirs.shape and not np.array_equal(fused, theirs, equal_nan=True):
        padding = np.all(fused == 0, axis=-1, keepdims=True) & ~np.all(theirs == 0, axis=-1, keepdims=True)
        ours, reference = (np.where(padding, fused, array) for array in (ours, reference))
        comparisons.append(Comparison.measure(f"{name}, torch's fused path", ours, fused, reference, torch_error))
    return comparisons
