# SPDX-License-Identifier: Apache-2.0
"""The demo: attention step by step, on a small example.

The steps are computed in plain NumPy from a layer's parameters. They are compared with the layer's own output, and with
torch's where it is installed.
"""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha_c.display.table import Table, show
from mha_c.display.words import fill
from mha_c.layer import MultiheadAttention

__all__ = ["Step", "attention_steps", "run"]


class Step(NamedTuple):
    """One step of attention: its name, its result and what it means."""

    name: str
    array: NDArray[Any]
    meaning: str


def attention_steps(layer: MultiheadAttention, x: NDArray[Any]) -> list[Step]:
    """Self-attention without masks, in plain NumPy, step by step.

    Parameters
    ----------
    layer : MultiheadAttention
        A layer in evaluation mode, with biases, one key head for each query head, and inputs of equal width.
    x : numpy.ndarray, (L, N, E)
        The query, key and value.

    Returns
    -------
    list of Step
        The last one is the output, (L, N, out_dim).

    Notes
    -----
    "Attention Is All You Need" (Vaswani et al., 2017), section 3.2.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> steps = attention_steps(mha_c.MultiheadAttention(8, 4), np.ones((5, 3, 8), np.float32))
    >>> steps[-1].name, steps[-1].array.shape
    ('output', (5, 3, 8))
    """
    length, batch, _ = x.shape
    heads, head_dim = layer.num_heads, layer.head_dim
    ends = [heads * head_dim, 2 * heads * head_dim]
    assert layer.in_proj_weight is not None and layer.in_proj_bias is not None
    projected = [
        x @ weight.T + bias
        for weight, bias in zip(np.split(layer.in_proj_weight, ends), np.split(layer.in_proj_bias, ends))
    ]
    q, k, v = (array.reshape(length, batch, heads, -1).transpose(1, 2, 0, 3) for array in projected)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(x.dtype.type(head_dim))
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = powers / powers.sum(axis=-1, keepdims=True)
    attended = weights @ v
    concatenation = attended.transpose(2, 0, 1, 3).reshape(length, batch, -1)
    output = concatenation @ layer.out_proj.weight.T + layer.out_proj.bias
    return [
        Step("queries", projected[0], "what each position looks for: a linear map of x"),
        Step("keys", projected[1], "what it can be found by: a second one"),
        Step("values", projected[2], "what it passes on: a third one"),
        Step("heads", q, f"the queries cut into {heads} heads of {head_dim} features, as are keys and values"),
        Step("scores", scores, f"in each head, query times key / sqrt({head_dim}) for all pairs"),
        Step("weights", weights, "softmax of the scores; those of a query sum to 1"),
        Step("weighted values", attended, "for each query, the values' sum by these weights"),
        Step("concatenation", concatenation, "the results of all heads side by side"),
        Step("output", output, "a last linear map, which mixes the heads"),
    ]


def run() -> None:
    """Print the demo.

    Examples
    --------
    >>> run()  # doctest: +ELLIPSIS
    Attention with 4 heads over 8 features
    ...
    """
    layer = MultiheadAttention(embed_dim=8, num_heads=4, dropout=0.1, seed=0).eval()
    x = np.random.default_rng(0).standard_normal((5, 3, 8), dtype=np.float32)
    output, _ = layer(x, x, x)
    steps = attention_steps(layer, x)

    print("Attention with 4 heads over 8 features\n")
    print("  layer = mha_c.MultiheadAttention(")
    print("      embed_dim=8, num_heads=4, dropout=0.1, seed=0")
    print("  ).eval()")
    print("  output, weights = layer(x, x, x)\n")
    print(
        fill(
            "x has shape (5, 3, 8): 5 positions, 3 sequences in a batch, 8 features. It is query, key and value. "
            "eval() switches dropout off. As in torch, the arguments are called embed_dim and num_heads, not d_model "
            "and nhead."
        ),
        end="\n\n",
    )
    meanings = [(step.name, str(step.array.shape), step.meaning) for step in steps]
    show(Table("The steps, in plain NumPy", ("step", "shape", "meaning"), meanings, [], text=(0, 2)))

    weights = next(step.array for step in steps if step.name == "weights")[0, 0]
    rows = [(str(query), *(f"{weight:.3f}" for weight in row)) for query, row in enumerate(weights)]
    title = "Weights of the first head in the first sequence: how much each query (row) attends to each key (column)"
    results = [
        f"The layer's own output has shape {output.shape}.",
        f"Largest difference from these steps: {_difference(output, steps[-1].array)}",
        _compare_with_torch(layer, x),
    ]
    print()
    show(Table(title, ("", *map(str, range(len(x)))), rows, results))


def _compare_with_torch(layer: MultiheadAttention, x: NDArray[Any]) -> str:
    if find_spec("torch") is None:
        index = "https://download.pytorch.org/whl/cpu"  # builds for CPUs; PyPI's are some gigabytes larger
        return f"To compare with torch: {shlex.quote(sys.executable)} -m pip install torch --index-url {index}"
    from mha_c.torch import forward_in_torch

    ours, _ = layer(x, x, x)
    theirs, _ = forward_in_torch(layer, x, x, x)
    return f"Largest difference from torch with the same parameters: {_difference(ours, theirs)}"


def _difference(result: NDArray[Any], reference: NDArray[Any]) -> str:
    return f"{np.abs(result - reference).max():.1e}, in values up to {np.abs(reference).max():.1f}"
