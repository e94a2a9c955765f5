# SPDX-License-Identifier: Apache-2.0
"""The command ``mha-c check``: is mha_c as close to the truth as torch, over a grid of configurations or in one?"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mha_c.layer import MultiheadAttention, parameters_of
from mha_c.check.compare import CRITERION
from mha_c.check.layers import against_torch
from mha_c.check.requirement import require_torch
from mha_c.check.report import Report
from mha_c.display.progress import progress
from mha_c.display.table import Table, show

__all__ = ["Configuration", "add_options", "grid", "run"]

_REFUSALS = (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError)

# With few numbers, with more keys than one block of the kernels holds, and with fewer queries than features.
_WIDTHS: tuple[dict[str, Any], ...] = (
    {"embed_dim": 8, "num_heads": 4, "length": 5, "source_length": None},
    {"embed_dim": 64, "num_heads": 2, "length": 20, "source_length": 70},
    {"embed_dim": 96, "num_heads": 3, "kdim": 40, "vdim": 24, "length": 2, "source_length": 33},
)
_MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"key_padding_mask": "bool"},
    {"key_padding_mask": "float", "attn_mask": "float-3d"},
    {"attn_mask": "bool"},
    {"attn_mask": "float"},
    {"attn_mask": "bool-3d", "key_padding_mask": "bool", "is_causal": True},
)
_LAYOUTS: tuple[dict[str, Any], ...] = ({"batch_first": False}, {"batch_first": True}, {"batch": None})
_EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
)


@dataclass(frozen=True)
class Configuration:
    """A layer and a question to it, by the options of the command line.

    Examples
    --------
    >>> Configuration(embed_dim=8, num_heads=4, is_causal=True).check().agrees
    True
    """

    embed_dim: int | None = None
    num_heads: int | None = None
    kdim: int | None = None
    vdim: int | None = None
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    batch_first: bool = False
    dtype: str | None = None
    state_dict: str | None = None
    prefix: str = ""
    batch: int | None = 3
    length: int = 5
    source_length: int | None = None
    key_padding_mask: str | None = None
    attn_mask: str | None = None
    is_causal: bool = False
    need_weights: bool = True
    seed: int = 0

    def check(self) -> Report:
        """Compare mha_c with torch."""
        layer = self._layer()
        random = np.random.default_rng(self.seed)
        real = layer.out_proj.weight.dtype
        source_length = self.length if self.source_length is None else self.source_length
        batch = 1 if self.batch is None else self.batch

        def normal(length: int, features: int) -> Any:
            shape = (batch, length) if layer.batch_first else (length, batch)
            return random.standard_normal((*(shape if self.batch is not None else (length,)), features)).astype(real)

        def mask(kind: str | None, *shape: int) -> Any:
            """Random, but for the first key, which everybody sees: torch answers NaN where there is none."""
            if kind is None:
                return None
            hidden = random.random(shape) < 0.4
            hidden[..., :1] = False
            return hidden if kind.startswith("bool") else random.standard_normal(shape).astype(real)

        query = normal(self.length, layer.embed_dim)
        inputs = [query]
        if self.source_length is not None or not parameters_of(layer).widths.packed:
            inputs += [normal(source_length, layer.kdim), normal(source_length, layer.vdim)]
        stacked = (batch * layer.num_heads,) if (self.attn_mask or "").endswith("3d") else ()
        return against_torch(
            layer,
            *inputs,
            key_padding_mask=mask(self.key_padding_mask, *([] if self.batch is None else [batch]), source_length),
            attn_mask=mask(self.attn_mask, *stacked, self.length, source_length),
            is_causal=self.is_causal,
            need_weights=self.need_weights,
        )

    def _layer(self) -> MultiheadAttention:
        if self.state_dict is None:
            assert self.embed_dim is not None and self.num_heads is not None
            layer = MultiheadAttention(
                self.embed_dim,
                self.num_heads,
                bias=self.bias,
                add_bias_kv=self.add_bias_kv,
                add_zero_attn=self.add_zero_attn,
                kdim=self.kdim,
                vdim=self.vdim,
                batch_first=self.batch_first,
                dtype=self.dtype,
                seed=self.seed,
            )
            random = np.random.default_rng(self.seed)
            biases = {name: array for name, array in layer.named_parameters() if name.endswith("bias")}  # which are 0
            layer.load_state_dict({name: random.standard_normal(a.shape) for name, a in biases.items()}, strict=False)
            return layer
        if self.num_heads is None:  # a file of ours, which says it all
            layer = MultiheadAttention.load(self.state_dict)
            layer.batch_first = layer.batch_first or self.batch_first
            return layer
        return MultiheadAttention.from_state_dict(
            self.state_dict,
            self.prefix,
            num_heads=self.num_heads,
            add_zero_attn=self.add_zero_attn,
            batch_first=self.batch_first,
            dtype=self.dtype,
        )


def grid() -> Iterator[tuple[str, Configuration]]:
    """Every configuration that is checked without options, each with the row of the table that it belongs to.

    Examples
    --------
    >>> len(list(grid()))
    1260
    """
    for width, dtype, masks in itertools.product(_WIDTHS, ("float32", "float64"), _MASKS):
        features = "/".join(str(width[name]) for name in ("embed_dim", "kdim", "vdim") if name in width)
        row = [f"{features} features", f"{width['num_heads']} heads", dtype]
        row += [name if kind is True else f"{kind} {name}" for name, kind in masks.items()]
        for layout, extras, need_weights in itertools.product(_LAYOUTS, _EXTRAS, (True, False)):
            options = {**width, **masks, **layout, **extras}
            yield ", ".join(row), Configuration(dtype=dtype, need_weights=need_weights, **options)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    kinds = ("bool", "float")
    options: dict[str, dict[str, Any]] = {
        "--embed-dim": {"type": int, "help": "check one layer: its features"},
        "--num-heads": {"type": int, "help": "its heads"},
        "--kdim": {"type": int, "help": "features of the key"},
        "--vdim": {"type": int, "help": "features of the value"},
        "--no-bias": {"dest": "bias", "action": "store_false", "help": "projections without biases"},
        "--add-bias-kv": {"action": "store_true", "help": "a learnt key and value"},
        "--add-zero-attn": {"action": "store_true", "help": "a key and value of zeros"},
        "--batch-first": {"action": "store_true", "help": "inputs are (N, L, E)"},
        "--dtype": {"choices": ("float32", "float64"), "help": "default: float32"},
        "--state-dict": {"metavar": "FILE", "help": "check the layer in this file: .safetensors, .npz or torch's .pt"},
        "--prefix": {"help": "what precedes the layer's names there, such as encoder.layers.0.self_attn."},
        "--batch": {"type": int, "help": "batch size (default: 3)"},
        "--unbatched": {"dest": "batch", "action": "store_const", "const": None, "help": "inputs without a batch axis"},
        "--length": {"type": int, "help": "queries (default: 5)"},
        "--source-length": {"type": int, "help": "keys (default: self-attention)"},
        "--key-padding-mask": {"choices": kinds, "help": "hide random keys"},
        "--attn-mask": {"choices": (*kinds, *(f"{kind}-3d" for kind in kinds)), "help": "a random mask"},
        "--is-causal": {"action": "store_true", "help": "query l sees the keys 0..l"},
        "--no-weights": {"dest": "need_weights", "action": "store_false", "help": "do not ask for the weights"},
        "--seed": {"type": int, "help": "seed of parameters and inputs (default: 0)"},
    }
    for name, settings in options.items():
        parser.add_argument(name, default=argparse.SUPPRESS, **settings)


def run(options: dict[str, Any], parser: argparse.ArgumentParser) -> int:
    """Check what the options ask for, and print what is found.

    Parameters
    ----------
    options : dict of str to object
        The options that were given; none: the whole grid.
    parser : argparse.ArgumentParser
        Ends the program if they do not fit together.

    Returns
    -------
    int
        0 if everything agrees, 1 if not, 2 if nothing could be checked, 130 after Ctrl-C.
    """
    if options and "state_dict" not in options and not {"embed_dim", "num_heads"} <= options.keys():
        parser.error("say which layer to check: --embed-dim and --num-heads, or --state-dict")
    try:
        require_torch("this command")
        from mha_c.torch import TORCH_VERSION, one_thread

        if not options:
            with one_thread():
                return _check_grid(TORCH_VERSION)
        report = Configuration(**options).check()
    except _REFUSALS as error:
        unknown = "state_dict" in options and "num_heads" not in options
        hint = " (a file that MultiheadAttention.save did not write also needs --num-heads)" if unknown else ""
        print(f"{parser.prog}: {error}{hint}", file=sys.stderr)
        return 2
    show(report)
    return 0 if report.agrees else 1


def _check_grid(torch_version: str) -> int:
    configurations = list(grid())
    rows: dict[str, _Row] = {}
    wrong: list[Report] = []
    interrupted = False
    try:
        for name, configuration in progress(configurations, "configuration"):
            report = configuration.check()
            rows[name] = rows.get(name, _Row()).plus(report)
            if not report.agrees:
                wrong.append(report)
    except KeyboardInterrupt:
        interrupted = True
    checked = sum(row.count for row in rows.values())
    header = ("", "configurations", "difference", "in ulp", "mha_c's error", "torch's error", "")
    notes = [f"{checked} of {len(configurations)} configurations, {len(wrong)} of them differ. {CRITERION}"]
    title = f"mha_c and torch {torch_version}: largest difference, and largest errors in units in the last place"
    verdicts = [row.differing == 0 for row in rows.values()]
    cells = [(name, *row.cells()) for name, row in rows.items()]
    show(Table(title, header, cells, notes, verdicts=verdicts), *wrong[:5])
    if interrupted:
        print("interrupted", file=sys.stderr)
        return 130
    return 1 if wrong else 0


@dataclass(frozen=True)
class _Row:
    """The worst of several reports."""

    count: int = 0
    difference: float = 0.0
    ulps: float = 0.0
    error: float = 0.0
    torch_error: float = 0.0
    differing: int = 0

    def plus(self, report: Report) -> _Row:
        """With another report."""
        row = replace(self, count=self.count + 1, differing=self.differing + (not report.agrees))
        for one in report.comparisons:
            row = replace(
                row,
                difference=max(row.difference, one.difference.largest),
                ulps=max(row.ulps, one.difference.largest / one.ulp),
                error=max(row.error, one.error.largest / one.ulp),
                torch_error=max(row.torch_error, one.torch_error.largest / one.ulp),
            )
        return row

    def cells(self) -> tuple[str, ...]:
        """As text."""
        return (
            str(self.count),
            f"{self.difference:.1e}",
            f"{self.ulps:.1f}",
            f"{self.error:.1f}",
            f"{self.torch_error:.1f}",
            f"{self.differing} DIFFER" if self.differing else "agree",
        )
