# SPDX-License-Identifier: Apache-2.0
"""The arrays of a case, the same in every process, and what the layer must answer, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # gives NumPy the name bfloat16
import numpy as np
from numpy.typing import NDArray

from cases import Case

Array = NDArray[Any]

MOST_ROWS = 128  # queries per item whose answer is checked: a float64 answer for all of them would take minutes


@dataclass(frozen=True)
class Problem:
    """Weights (output features, input features), biases, inputs (N, length, features) and masks, True = hidden."""

    case: Case
    q_weight: Array
    k_weight: Array
    v_weight: Array
    in_bias: Array
    out_weight: Array
    out_bias: Array
    query: Array
    key: Array
    value: Array
    attn_mask: Array | None  # (L, S) of floats or (N * H, L, S) of booleans
    padding: Array | None  # (N, S) of booleans

    @property
    def input_names(self) -> tuple[str, str, str]:
        """A name for each of query, key and value: equal names are one array."""
        if self.key is self.query:
            return "query", "query", "query"
        return ("query", "key", "key") if self.value is self.key else ("query", "key", "value")

    def biases(self) -> tuple[Array, Array, Array]:
        q, k = self.q_weight.shape[0], self.k_weight.shape[0]
        return self.in_bias[:q], self.in_bias[q : q + k], self.in_bias[q + k :]

    def bias_4d(self) -> Array | None:
        """What attn_mask adds to the scores, as floats that broadcast to (N, H, L, S)."""
        if self.attn_mask is None:
            return None
        if self.attn_mask.dtype != bool:
            return self.attn_mask[None, None]
        case = self.case
        added = np.where(self.attn_mask, -np.inf, 0.0).astype(case.dtype)
        return added.reshape(case.N, case.H, case.L, case.keys)


def make(case: Case, seed: int = 0) -> Problem:
    """The problem of a case: random numbers of useful sizes, always the same ones for a seed."""
    rng = np.random.default_rng([seed, case.N, case.L, case.E, case.H, case.keys])

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return (rng.standard_normal(shape) * scale).astype(case.dtype)

    kv = case.kv_head_count * case.head_dim
    kdim, vdim = case.kdim or case.E, case.vdim or case.E
    query = normal(case.N, case.L, case.E)
    key = query if case.is_self else normal(case.N, case.keys, kdim)
    value = key if kdim == vdim else normal(case.N, case.keys, vdim)
    attn_mask = None
    if case.attn_mask == "float":
        attn_mask = normal(case.L, case.keys)
    elif case.attn_mask == "bool":
        attn_mask = rng.random((case.N * case.H, case.L, case.keys)) < 0.25
        attn_mask[..., 0] = False
    padding = np.arange(case.keys) >= np.array(case.live)[:, None] if case.live else None
    return Problem(
        case,
        normal(case.E, case.E, scale=case.E**-0.5),
        normal(kv, kdim, scale=kdim**-0.5),
        normal(kv, vdim, scale=vdim**-0.5),
        normal(case.E + 2 * kv, scale=0.1),
        normal(case.E, case.E, scale=case.E**-0.5),
        normal(case.E, scale=0.1),
        query,
        key,
        value,
        attn_mask,
        padding,
    )


def checked_rows(case: Case) -> NDArray[np.intp]:
    """The queries of each item whose answer is checked."""
    return np.unique(np.linspace(0, case.L - 1, min(case.L, MOST_ROWS)).astype(np.intp))


def reference(problem: Problem) -> tuple[Array, Array | None]:
    """Output (N, rows, E) and, where wanted, averaged weights (N, rows, S) of the checked rows, in float64."""
    case, rows = problem.case, checked_rows(problem.case)
    group, D = case.H // case.kv_head_count, case.head_dim
    weights = [w.astype(np.float64) for w in (problem.q_weight, problem.k_weight, problem.v_weight)]
    inputs = [x.astype(np.float64) for x in (problem.query[:, rows], problem.key, problem.value)]
    q, k, v = (x @ w.T + b for x, w, b in zip(inputs, weights, problem.biases(), strict=True))
    added = problem.bias_4d()
    hidden = np.zeros((case.N, len(rows), case.keys), dtype=bool)
    if problem.padding is not None:
        hidden |= problem.padding[:, None]
    if case.causal:
        hidden |= np.arange(case.keys) > rows[:, None]
    context = np.empty((case.N, len(rows), case.E))
    average = np.zeros((case.N, len(rows), case.keys))
    for h in range(case.H):
        own, shared = slice(h * D, (h + 1) * D), slice(h // group * D, (h // group + 1) * D)
        scores = q[:, :, own] @ k[:, :, shared].swapaxes(1, 2) / np.sqrt(D)
        if added is not None:
            scores += added[:, h % added.shape[1], rows]
        scores[hidden] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        average += scores / case.H
        context[:, :, own] = scores @ v[:, :, shared]
    output = context @ problem.out_weight.T.astype(np.float64) + problem.out_bias
    return output, average if case.need_weights else None


def judge(case: Case) -> Callable[[tuple[Array, Array | None]], dict[str, float]]:
    """A function of a peer's output and weights: the larger of their rms errors, in units of the rms of what they
    should be."""
    rows, expected = checked_rows(case), reference(make(case))

    def relative_error(result: tuple[Array, Array | None]) -> dict[str, float]:
        errors = []
        for ours, theirs in zip(result, expected, strict=True):
            if theirs is None:
                continue
            if ours is None:
                return {"error": float("inf")}
            difference = ours[:, rows].astype(np.float64) - theirs
            errors.append(float(np.sqrt(np.mean(difference**2) / np.mean(theirs**2))))
        return {"error": max(errors)}

    return relative_error
