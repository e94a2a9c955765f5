# SPDX-License-Identifier: Apache-2.0
"""A model of torch with its own layers beside the same model with ours, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mha_c.check.compare import Comparison, Error
from mha_c.check.definition import attend
from mha_c.check.report import Report
from mha_c.check.requirement import refuse_narrow_products, require_torch
from mha_c.display.progress import progress

if TYPE_CHECKING:
    from mha_c.torch.record import ModelOutput

__all__ = ["model"]


def model(model: Any, *inputs: Any, **call: Any) -> Report:
    """Compare a model of torch with the same model computing its attention, or whole layers, in mha_c, layer by layer.

    Copies of the model are run in evaluation mode, one after another, with the same random numbers. The model itself is
    not changed. Its attention may be replaced already.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    *inputs, **call
        The arguments of its call. Arrays become tensors.

    Returns
    -------
    Report
        For every call of an attention layer, and of a whole layer that `mha_c.torch.replace_layers` would replace, the
        outputs of mha_c and torch on the inputs of torch's model; then the outputs of the model, with attention and
        with whole layers by mha_c. If torch takes its inference path, which fuses layers, they are compared with that
        path too, except in the padded positions that it sets to zero. `Report.coverage` says which calls of attention
        mha_c computes, and why the others are left to torch.

    Raises
    ------
    ImportError
        If torch is not installed.
    TypeError, ValueError
        If `model` is not a torch module, or has no layer and no ``torch.nn.MultiheadAttention`` that can be replaced;
        or if it was replaced with a `matmul_precision` of narrower numbers.

    Notes
    -----
    The outputs of attention are compared with its definition in a wider type, those of narrower layers and of the model
    with the same in float64. If the model is in float64, or does not run in it, its outputs are compared with torch's.
    torch's error is then estimated by another run, in which every output of attention, or of layers in a model without
    ``torch.nn.MultiheadAttention``, is changed by one unit in the last place: this shows how much the model magnifies
    rounding errors.

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
    from mha_c.torch.convert import TORCH_VERSION
    from mha_c.torch.record import run_both_ways

    refuse_narrow_products("check.model", model)
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
    comparisons += [Comparison.measure(*run) for run in runs.layers]
    for name, output in runs.outputs.items():
        comparisons += _compare_model_output(name, output)
    notes = []
    if runs.layers_left:
        named = ", ".join(f"{name} ({reason})".lstrip() for name, reason in runs.layers_left.items())
        notes.append(f"Whole layers that are left to torch: {named}.")
    if runs.why_not_wider:
        notes.append(
            f"{runs.why_not_wider} Therefore, the error of mha_c is its difference from torch. The error of torch is "
            "the effect of changing every output of attention, or of layers without such a module, by one unit in the "
            "last place."
        )
    title = f"{type(model).__name__} with mha_c and with torch {TORCH_VERSION}"
    return Report(title, tuple(comparisons), tuple(notes), runs.coverage)


def _compare_model_output(name: str, output: ModelOutput) -> list[Comparison]:
    ours, by_layers, theirs, as_is, wider, disturbed = output
    reference = theirs if wider is None else wider
    torch_error = None if disturbed is None else Error.between(theirs, disturbed)
    comparisons = []
    if ours is not None:
        comparisons.append(Comparison.measure(name, ours, theirs, reference, torch_error))
    if as_is.shape == theirs.shape and not np.array_equal(as_is, theirs, equal_nan=True):
        padding = np.all(as_is == 0, axis=-1, keepdims=True) & ~np.all(theirs == 0, axis=-1, keepdims=True)
        reference = np.where(padding, as_is, reference)
        if ours is not None:
            ours = np.where(padding, as_is, ours)
            comparisons.append(Comparison.measure(f"{name}, torch's fused path", ours, as_is, reference, torch_error))
    if by_layers is not None:
        comparisons.append(Comparison.measure(f"{name}, whole layers", by_layers, as_is, reference, torch_error))
    return comparisons
