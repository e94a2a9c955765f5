# SPDX-License-Identifier: Apache-2.0
"""Whole encoders and single layers of encoders: what is measured, and how much arithmetic each case needs."""

from __future__ import annotations

from dataclasses import dataclass


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
        return f"{self.model_name} {self.N}×{self.L}{', padded' if self.is_padded else ''}"

    @property
    def needed_flops(self) -> float:
        """Floating-point operations of the products. Padding counts as nothing, as do norms, softmax and gelu."""
        model = self.model
        linear = sum(self.lengths) * model.E * (4 * model.E + 2 * model.F)
        attention = sum(length**2 for length in self.lengths) * 2 * model.E
        return 2.0 * model.layers * (linear + attention)


def _uneven(count: int, longest: int) -> tuple[int, ...]:
    """Lengths from the longest to a quarter of it, long and short ones in turns."""
    lengths = [round(longest - 0.75 * longest * i / (count - 1)) for i in range(count)]
    return tuple(lengths[::2] + lengths[1::2][::-1])


CASES = [
    *(EncoderCase("encoder", "MiniLM", (length,)) for length in (24, 128, 384)),
    EncoderCase("encoder", "MiniLM", _uneven(32, 24)),
    EncoderCase("encoder", "MiniLM", _uneven(8, 128)),
    *(EncoderCase("layer", "BERT-base layer", (length,)) for length in (24, 128, 384)),
    EncoderCase("layer", "BERT-base layer", _uneven(8, 128)),
    EncoderCase("layer", "ViT-B/16 layer", (197,)),
    EncoderCase("layer", "ViT-B/16 layer", (197,) * 8),
]
