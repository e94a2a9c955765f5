# SPDX-License-Identifier: Apache-2.0
"""The arrays of a case of encoder_cases.py, the same in every process, and the exact result in float64.

An encoder starts from vectors of its tokens: the embeddings before it and whatever follows it are not measured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # gives NumPy the name bfloat16
import numpy as np
from numpy.typing import NDArray

from encoder_cases import EncoderCase

sys.path.append(str(Path(__file__).parents[1] / "examples"))

Array = NDArray[Any]


@dataclass(frozen=True)
class EncoderProblem:
    """Parameters by the names of torch.nn.TransformerEncoder, the input (N, L, E), and the padding (N, L), True =
    hidden, where there is any."""

    case: EncoderCase
    parameters: dict[str, Array]
    x: Array
    padding: Array | None

    def layer(self, number: int) -> dict[str, Array]:
        """The parameters of a layer."""
        prefix = f"layers.{number}."
        return {name.removeprefix(prefix): a for name, a in self.parameters.items() if name.startswith(prefix)}


def make(case: EncoderCase) -> EncoderProblem:
    """The problem of a case: always the same numbers."""
    rng = np.random.default_rng(case.lengths)
    padding = np.arange(case.L) >= np.array(case.lengths)[:, None]
    parameters, x = (_minilm if case.model_name == "MiniLM" else _random)(case, padding, rng)
    parameters = {name: array.astype(case.dtype) for name, array in parameters.items()}
    return EncoderProblem(case, parameters, x.astype(case.dtype), padding if case.is_padded else None)


def _minilm(case: EncoderCase, padding: Array, rng: np.random.Generator) -> tuple[dict[str, Array], Array]:
    """The real encoder, and its embeddings of tokens."""
    from minilm import SentenceEncoder

    model = SentenceEncoder()
    ids = rng.integers(1000, 30000, size=padding.shape)  # of words
    for row, tokens in zip(ids, case.tokens):
        row[: len(tokens)] = tokens
    ids[padding] = 0
    return dict(model.encoder.state_dict()), model.embed_tokens(ids)


def _random(case: EncoderCase, padding: Array, rng: np.random.Generator) -> tuple[dict[str, Array], Array]:
    """Random numbers of useful sizes."""
    model = case.model

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Array:
        return (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    parameters: dict[str, Array] = {}
    for number in range(model.layers):
        for name, outputs, inputs in (
            ("self_attn.in_proj_", 3 * model.E, model.E),
            ("self_attn.out_proj.", model.E, model.E),
            ("linear1.", model.F, model.E),
            ("linear2.", model.E, model.F),
        ):
            parameters[f"layers.{number}.{name}weight"] = normal(outputs, inputs, scale=inputs**-0.5)
            parameters[f"layers.{number}.{name}bias"] = normal(outputs, scale=0.1)
        for name in ("norm1.", "norm2."):
            parameters[f"layers.{number}.{name}weight"] = normal(model.E, scale=0.1, mean=1.0)
            parameters[f"layers.{number}.{name}bias"] = normal(model.E, scale=0.1)
    return parameters, normal(*padding.shape, model.E)


def reference(problem: EncoderProblem) -> Array:
    """The output in float64, (N, L, E). Padded rows mean nothing."""
    model, hidden = problem.case.model, problem.padding
    erf = np.vectorize(math.erf, otypes=[float])  # NumPy has none
    x = problem.x.astype(np.float64)
    N, L, E = x.shape

    def norm(x: Array, p: dict[str, Array], name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + model.eps)
        y: Array = centred / scale * p[f"{name}.weight"] + p[f"{name}.bias"]
        return y

    def attend(x: Array, p: dict[str, Array]) -> Array:
        projected = x @ p["self_attn.in_proj_weight"].T + p["self_attn.in_proj_bias"]
        q, k, v = projected.reshape(N, L, 3, model.H, -1).transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        if hidden is not None:
            scores[np.broadcast_to(hidden[:, None, None], scores.shape)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        context = weights / weights.sum(axis=-1, keepdims=True) @ v
        context = context.swapaxes(1, 2).reshape(N, L, E)
        y: Array = context @ p["self_attn.out_proj.weight"].T + p["self_attn.out_proj.bias"]
        return y

    def feed(x: Array, p: dict[str, Array]) -> Array:
        y = x @ p["linear1.weight"].T + p["linear1.bias"]
        gelu: Array = y * (1 + erf(y / math.sqrt(2))) / 2
        return gelu @ p["linear2.weight"].T + p["linear2.bias"]

    for number in range(model.layers):
        p = {name: array.astype(np.float64) for name, array in problem.layer(number).items()}
        if model.norm_first:
            x = x + attend(norm(x, p, "norm1"), p)
            x = x + feed(norm(x, p, "norm2"), p)
        else:
            x = norm(x + attend(x, p), p, "norm1")
            x = norm(x + feed(x, p), p, "norm2")
    return x


def judge(case: EncoderCase) -> Callable[[tuple[Array, Array | None]], dict[str, float]]:
    """A function of a peer's output: its rms error, in units of the rms of what it should be, and 1 − the least cosine
    of a vector of a sequence, the mean over its tokens. Both are without padded rows. What should be is the encoder
    before its parameters and inputs are rounded to a narrower type."""
    problem = make(replace(case, dtype="float32"))
    real = np.ones((case.N, case.L), bool) if problem.padding is None else ~problem.padding
    expected = reference(problem)
    direction = _directions(expected, real)

    def quality(result: tuple[Array, Array | None]) -> dict[str, float]:
        output = result[0].astype(np.float64)
        difference = (output - expected)[real]
        cosines = np.sum(_directions(output, real) * direction, axis=1)
        error = np.sqrt(np.mean(difference**2) / np.mean(expected[real] ** 2))
        return {"error": float(error), "1 − cosine": float(1 - cosines.min())}

    return quality


def _directions(output: Array, real: Array) -> Array:
    """The mean of the real rows of each sequence, (N, E), scaled to length 1."""
    mean = np.mean(output, axis=1, where=real[:, :, None])
    unit: Array = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return unit
