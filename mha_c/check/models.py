# SPDX-License-Identifier: Apache-2.0
"""A model of torch with its own attention beside the same model with ours, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mha_c.check.compare import Comparison, Error
from mha_c.check.definition import attend
from mha_c.check.report import Report
from mha_c.check.requirement import require_torch
from mha_c.display.progress import progress

if TYPE_CHECKING:
    from mha_c.torch.record import ModelOutput

__all__ = ["model"]


def model(model: Any, *inputs: Any, **call: Any) -> Report:
    """Run a model of torch as it is and with its attention replaced, and measure both, layer by layer.

    Copies of the model are run in evaluation mode, one after another, from the same random numbers. The model itself,
    be its attention replaced already or not, stays as it is.

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
        compared with that one too, except in the padded positions that it sets to zero. `Report.coverage` says which
        calls of attention mha_c computes, and why the others are left to torch.

    Raises
    ------
    ImportError
        If torch is not installed.
    TypeError, ValueError
        If `model` is not a torch module, or has no ``torch.nn.MultiheadAttention`` that can be replaced.

    Notes
    -----
    The outputs of attention are measured against its definition in a wider type, those of the model against the same
    model in float64. Where nothing is wider, or the model does not run in float64, the model's outputs are measured
    against torch's. What torch's error may be is then seen from another run, in which every output of attention is off
    by one unit in the last place: it shows how the model magnifies roundings.

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
    require_torch("check.model")
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
    notes = []
    if runs.why_not_wider:
        notes.append(
            f"{runs.why_not_wider} The errors of the model's outputs are mha_c's difference from torch, beside what one "
            "unit in the last place of every output of attention changes."
        )
    title = f"{type(model).__name__} with mha_c and with torch {TORCH_VERSION}"
    return Report(title, tuple(comparisons), tuple(notes), runs.coverage)


def _compare_model_output(name: str, output: ModelOutput) -> list[Comparison]:
    ours, theirs, fused, wider, disturbed = output
    reference = theirs if wider is None else wider
    torch_error = None if disturbed is None else Error.between(theirs, disturbed)
    comparisons = [Comparison.measure(name, ours, theirs, reference, torch_error)]
    if fused.shape == theirs.shape and not np.array_equal(fused, theirs, equal_nan=True):
        padding = np.all(fused == 0, axis=-1, keepdims=True) & ~np.all(theirs == 0, axis=-1, keepdims=True)
        ours, reference = (np.where(padding, fused, array) for array in (ours, reference))
        comparisons.append(Comparison.measure(f"{name}, torch's fused path", ours, fused, reference, torch_error))
    return comparisons
