# SPDX-License-Identifier: Apache-2.0
"""The demo: attention step by step on small examples.

The steps are computed in plain NumPy from a layer's parameters and compared with the layer's own output, and with torch
where it is installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
        A layer with biases and as many key as query heads, whose inputs have the same features, not in training mode.
    x : numpy.ndarray, (L, N, E)
        Its query, key and value.

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
        Step("keys", projected[1], "what each position offers to be found by: another linear map"),
        Step("values", projected[2], "what each position hands over when found: a third one"),
        Step("heads", q, f"the queries' features cut into {heads} heads of {head_dim}; likewise keys and values"),
        Step("scores", scores, f"in each head, every query times every key, divided by sqrt({head_dim})"),
        Step("weights", weights, "softmax of the scores: positive, and the weights of a query sum to 1"),
        Step("weighted values", attended, "in each head, for every query, the sum of the values by these weights"),
        Step("concatenation", concatenation, "the heads' results side by side again"),
        Step("output", output, "one more linear map, which mixes the heads"),
    ]


def run() -> None:
    """Print the demo.

    Examples
    --------
    >>> run()  # doctest: +ELLIPSIS
    1. Four heads over 8 features
    ...
    """
    x = np.random.default_rng(0).standard_normal((5, 3, 10), dtype=np.float32)

    print("1. Four heads over 8 features\n")
    print("   layer = mha_c.MultiheadAttention(embed_dim=8, num_heads=4, dropout=0.1, seed=0).eval()")
    print("   A sequence of 5 positions, 3 of them in a batch, 8 features each: x has shape (5, 3, 8), (L, N, E).")
    print("   Query, key and value are all x: self-attention. eval() switches dropout off.")
    print("   (As in torch, it is embed_dim and num_heads; d_model and nhead belong to torch.nn.Transformer.)\n")
    _show_steps(MultiheadAttention(embed_dim=8, num_heads=4, dropout=0.1, seed=0).eval(), x[:, :, :8])

    print("\n2. 10 features in, four heads of width 2, 8 features out\n")
    print("   layer = mha_c.MultiheadAttention(10, 4, head_dim=2, out_dim=8, seed=0)")
    print("   10 is no multiple of 4, so torch rejects it. Here heads and output may have widths of their own.")
    print("   x has shape (5, 3, 10).\n")
    _show_steps(MultiheadAttention(10, 4, head_dim=2, out_dim=8, seed=0), x)


def _show_steps(layer: MultiheadAttention, x: NDArray[Any]) -> None:
    steps = attention_steps(layer, x)
    for step in steps:
        print(f"   {step.name:<16}{step.array.shape!s:<14}{step.meaning}")

    print("\n   The weights of the first head in the first sequence; row: query, column: key.")
    weights = next(step.array for step in steps if step.name == "weights")
    print(f"        {''.join(f'{key:7}' for key in range(len(x)))}")
    for query, row in enumerate(weights[0, 0]):
        print(f"   {query:5}{''.join(f'{weight:7.3f}' for weight in row)}")

    output, _ = layer(x, x, x)
    print(f"\n   The layer's own output has shape {output.shape}.")
    print(f"   Largest difference from these steps: {_difference(output, steps[-1].array)}")
    if layer.out_dim == layer.embed_dim:
        print(f"   {_compare_with_torch(layer, x)}")


def _compare_with_torch(layer: MultiheadAttention, x: NDArray[Any]) -> str:
    if find_spec("torch") is None:
        return "torch is not installed, so there is no comparison with it."
    from mha_c.torch import forward_in_torch

    ours, _ = layer(x, x, x)
    theirs, _ = forward_in_torch(layer, x, x, x)
    return f"Largest difference from torch with the same parameters: {_difference(ours, theirs)}"


def _difference(result: NDArray[Any], reference: NDArray[Any]) -> str:
    return f"{np.abs(result - reference).max():.1e}, in values up to {np.abs(reference).max():.1f}"
