# SPDX-License-Identifier: Apache-2.0
"""What is measured: shapes of attention in classes, and how much arithmetic each of them needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

AnyCase = TypeVar("AnyCase", bound="Named")


class Named(Protocol):
    """What a case is chosen by."""

    @property
    def group(self) -> str: ...

    @property
    def name(self) -> str: ...


def multiplied(dtype: str, matmul_precision: str | None) -> tuple[str, str]:
    """The numbers that linear maps multiply, and those that attention itself multiplies. Layers of float16 multiply
    float32."""
    of_maps = matmul_precision or ("float32" if dtype == "float16" else dtype)
    return of_maps, "bfloat16" if of_maps == "int8" else of_maps


@dataclass(frozen=True)
class Case:
    """One call of one layer, in torch's letters. Inputs are (N, length, features); self-attention unless S, kdim or
    vdim is given."""

    group: str
    N: int
    L: int
    E: int
    H: int
    S: int | None = None
    kdim: int | None = None
    vdim: int | None = None
    kv_heads: int | None = None
    dtype: str = "float32"
    matmul_precision: str | None = None  # "bfloat16", of all products; "int8", of linear maps
    causal: bool = False
    attn_mask: str = ""  # "float": (L, S), added to the scores; "bool": (N * H, L, S), True = hidden
    live: tuple[int, ...] = ()  # how many keys of each item are real; a key_padding_mask hides the rest
    need_weights: bool = False

    @property
    def keys(self) -> int:
        return self.L if self.S is None else self.S

    @property
    def is_self(self) -> bool:
        """Whether query, key and value are one array."""
        return self.S is None and self.kdim is None and self.vdim is None

    @property
    def kv_head_count(self) -> int:
        return self.kv_heads or self.H

    @property
    def head_dim(self) -> int:
        return self.E // self.H

    @cached_property
    def name(self) -> str:
        """The shape as "N,L,E,H", then whatever is special about the case."""
        special = {
            "S": self.S,
            "kdim": self.kdim,
            "vdim": self.vdim,
            "kv_heads": self.kv_heads,
            "live": "/".join(map(str, self.live)),
        }
        words = [f"{self.N},{self.L},{self.E},{self.H}"]
        words += [f"{name}={value}" for name, value in special.items() if value]
        words += [self.dtype] if self.dtype != "float32" else []
        words += [f"products of {self.matmul_precision}"] if self.matmul_precision else []
        words += ["causal"] if self.causal else []
        words += [f"{self.attn_mask} mask"] if self.attn_mask else []
        words += ["weights"] if self.need_weights else []
        return " ".join(words)

    @property
    def operations(self) -> dict[str, float]:
        """Multiplications and additions that the result needs, by the numbers that are multiplied, in the cheaper
        order of the products. Keys that a mask hides from every query, and keys above the causal diagonal, count as
        nothing; scores count once, even where weights are returned; softmax and masks do not count."""
        keys = sum(self.live) if self.live else self.N * self.keys
        scores = self.L * keys
        if self.causal:
            scores = self.N * sum(min(row + 1, self.keys) for row in range(self.L))
        queries, features = self.N * self.L, (self.kdim or self.E) + (self.vdim or self.E)
        projected, attended = keys * self.kv_head_count * self.head_dim * features, 2 * scores * self.E
        always = 2 * queries * self.E * self.E  # the projection of the queries, and that of the output
        of_maps, of_attention = multiplied(self.dtype, self.matmul_precision)
        if of_maps != of_attention:  # keys are always projected
            return {of_maps: 2.0 * (always + projected), of_attention: 2.0 * attended}
        queries_first = queries * self.E * features + scores * self.H * features  # q (W_k x), and (weights x) W_v
        return {of_maps: 2.0 * (always + min(projected + attended, queries_first))}

    @property
    def needed_flops(self) -> float:
        """All of these operations."""
        return sum(self.operations.values())


def _cases(group: str, *shapes: tuple[int, int, int, int], **options: object) -> list[Case]:
    return [Case(group, *shape, **options) for shape in shapes]  # type: ignore[arg-type]


_MULTIPLIED_NARROW = ((1, 1, 768, 12), (1, 128, 768, 12), (1, 512, 512, 8), (8, 128, 768, 12), (32, 24, 384, 12))

CASES: list[Case] = [
    *_cases("overhead", (3, 5, 8, 4), (1, 16, 64, 4)),
    *_cases("short", (1, 32, 384, 12), (1, 128, 384, 12), (3, 77, 360, 5), (64, 32, 128, 4)),
    *_cases("encoder", (1, 128, 768, 12), (8, 128, 768, 12), (1, 197, 768, 12)),
    *_cases("encoder", (1, 384, 1024, 16), (1, 512, 768, 12)),
    *_cases("long", (1, 2048, 512, 8), (1, 4096, 1024, 16)),
    *_cases("causal", (1, 2048, 512, 8), causal=True),
    *_cases("padded", (4, 512, 768, 12), live=(512, 390, 211, 97)),
    *_cases("masks", (2, 512, 512, 8), attn_mask="float"),
    *_cases("masks", (2, 512, 512, 8), attn_mask="bool"),
    *_cases("cross", (2, 64, 512, 8), S=512, kdim=256),
    *_cases("few queries", (1, 1, 1024, 16), S=2048),
    *_cases("weights", (8, 128, 512, 8), need_weights=True),
    *_cases("float64", (4, 128, 512, 8), dtype="float64"),
    *_cases("widths", (1, 512, 1280, 16), (1, 256, 256, 1)),
    *_cases("widths", (1, 512, 1024, 16), kv_heads=4),
    *_cases("halves", (1, 1, 768, 12), (1, 128, 768, 12), (1, 512, 512, 8), dtype="bfloat16"),
    *_cases("halves", (1, 1, 768, 12), (1, 128, 768, 12), (1, 512, 512, 8), dtype="float16"),
    *_cases("products of bfloat16", *_MULTIPLIED_NARROW, matmul_precision="bfloat16"),
    *_cases("products of int8", *_MULTIPLIED_NARROW, matmul_precision="int8"),
    # Shapes where a library that is tuned for the ones above could fall behind unnoticed.
    *_cases("others", (1, 1, 768, 12), (1, 24, 768, 12), (16, 24, 384, 12), (1, 197, 1024, 16)),
    *_cases("others", (2, 300, 100, 5), (1, 1024, 128, 2), (1, 1000, 512, 8)),
    *_cases("others", (32, 64, 256, 8), (128, 64, 256, 8)),
    *_cases("others", (3, 5, 8, 4), (1, 16, 64, 4), (1, 512, 512, 8), need_weights=True),
    *_cases("others", (1, 256, 768, 12), causal=True),
    *_cases("others", (8, 128, 384, 12), live=(128, 101, 90, 77, 50, 31, 16, 9)),
    *_cases("others", (2, 64, 512, 8), S=512, kdim=256, vdim=256),
    *_cases("others", (8, 1, 768, 12), S=197),
    *_cases("others", (1, 16, 512, 8), S=4096),
    *_cases("others", (1, 512, 512, 8), S=16),
    *_cases("others", (1, 1024, 512, 8), dtype="float64"),
    # With two of the class "encoder": one sequence of every length.
    *(Case("lengths", 1, length, 768, 12) for length in (8, 16, 32, 64, 256, 1024, 2048)),
]

# Workloads that have a name, by those of their cases: the chart and the README show them.
WORKLOADS: dict[str, str] = {
    "1,1,1024,16 S=2048": "one query, 2048 keys",
    "1,2048,512,8 causal": "2048 tokens, causal mask",
    "4,512,768,12 live=512/390/211/97": "4 texts of 97–512 tokens, padded, BERT-base",
    "1,32,384,12": "sentence of 32 tokens, MiniLM",
    "1,128,768,12": "sentence of 128 tokens, BERT-base",
    "8,128,768,12": "8 sentences of 128 tokens, BERT-base",
    "1,197,768,12": "image, ViT-B/16",
    "1,512,512,8 S=16": "512 queries, 16 keys",
}


def select(parser: argparse.ArgumentParser, cases: Sequence[AnyCase]) -> Callable[[argparse.Namespace], list[AnyCase]]:
    """Adds the options that choose from the cases; returns what chooses, all where no option was given."""
    groups = list(dict.fromkeys(case.group for case in cases))
    parser.add_argument("--classes", nargs="+", choices=groups, metavar="CLASS", help=f"of {', '.join(groups)}")
    example = cases[1].name
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help=f'only cases whose name has TEXT, as "{example}"')

    def choose(options: argparse.Namespace) -> list[AnyCase]:
        chosen = [case for case in cases if case.group in (options.classes or groups)]
        return [case for case in chosen if any(text in case.name for text in options.shapes or [""])]

    return choose
