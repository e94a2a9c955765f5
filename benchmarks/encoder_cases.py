# SPDX-License-Identifier: Apache-2.0
"""Whole encoders and single layers of encoders: what is measured, and how much arithmetic each case needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cases import multiplied


@dataclass(frozen=True)
class Model:
    """The encoder of a model: `layers` of E features, H heads and F features between the two maps of a layer."""

    layers: int
    E: int
    H: int
    F: int
    norm_first: bool = False
    eps: float = 1e-12


MODELS = {
    "MiniLM": Model(6, 384, 12, 1536),  # all-MiniLM-L6-v2, with its weights; the others have random ones
    "BERT-base layer": Model(1, 768, 12, 3072),
    "ViT-B/16 layer": Model(1, 768, 12, 3072, norm_first=True, eps=1e-6),
}


@dataclass(frozen=True)
class EncoderCase:
    """One call of an encoder, on sequences of these lengths, which are padded to the longest."""

    group: str
    model_name: str
    lengths: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...] = ()  # MiniLM only: the numbers of the tokens; random ones if there are none
    dtype: str = "float32"
    matmul_precision: str | None = None  # "bfloat16", of all products; "int8", of linear maps

    @property
    def model(self) -> Model:
        return MODELS[self.model_name]

    @property
    def N(self) -> int:
        return len(self.lengths)

    @property
    def L(self) -> int:
        return max(self.lengths)

    @property
    def is_padded(self) -> bool:
        return min(self.lengths) < self.L

    @property
    def name(self) -> str:
        words = [f"{self.model_name} {self.N}×{self.L}"]
        words += ["padded"] if self.is_padded else []
        words += [self.dtype] if self.dtype != "float32" else []
        words += [f"products of {self.matmul_precision}"] if self.matmul_precision else []
        return ", ".join(words)

    @property
    def operations(self) -> dict[str, float]:
        """Multiplications and additions of the products, by the numbers that are multiplied. Padding counts as
        nothing, as do norms, softmax and gelu."""
        model = self.model
        linear = sum(self.lengths) * model.E * (4 * model.E + 2 * model.F)
        attention = sum(length**2 for length in self.lengths) * 2 * model.E
        of_maps, of_attention = multiplied(self.dtype, self.matmul_precision)
        counts = {of_attention: 2.0 * model.layers * attention}
        return counts | {of_maps: counts.get(of_maps, 0.0) + 2.0 * model.layers * linear}

    @property
    def needed_flops(self) -> float:
        """All of these operations."""
        return sum(self.operations.values())


def _uneven(count: int, longest: int) -> tuple[int, ...]:
    """Lengths from the longest to a quarter of it, long and short ones in turns."""
    lengths = [round(longest - 0.75 * longest * i / (count - 1)) for i in range(count)]
    return tuple(lengths[::2] + lengths[1::2][::-1])


_FLOAT32 = [
    *(EncoderCase("encoder", "MiniLM", (length,)) for length in (24, 128, 384)),
    EncoderCase("encoder", "MiniLM", _uneven(32, 24)),
    EncoderCase("encoder", "MiniLM", _uneven(8, 128)),
    *(EncoderCase("layer", "BERT-base layer", (length,)) for length in (24, 128, 384)),
    EncoderCase("layer", "BERT-base layer", _uneven(8, 128)),
    EncoderCase("layer", "ViT-B/16 layer", (197,)),
    EncoderCase("layer", "ViT-B/16 layer", (197,) * 8),
]

CASES = [
    *_FLOAT32,
    *(
        replace(case, group=f"products of {precision}", matmul_precision=precision)
        for precision in ("bfloat16", "int8")
        for case in _FLOAT32
    ),
    *(replace(case, group="halves", dtype=dtype) for dtype in ("bfloat16", "float16") for case in _FLOAT32),
]
