# SPDX-License-Identifier: Apache-2.0
"""The command ``mha-c check``: is mha_c as close to the truth as torch, over a grid of configurations or in one?"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, Final

import numpy as np

from mha_c.advice.arguments import listed
from mha_c.layer import MultiheadAttention, parameters_of
from mha_c.check.compare import CRITERION
from mha_c.check.layers import against_torch
from mha_c.check.requirement import require_torch
from mha_c.check.report import Report
from mha_c.display.progress import progress
from mha_c.display.table import Table, show
from mha_c.parameters.dtypes import DTYPES
from mha_c.parameters.files import open_checkpoint
from mha_c.transformer.decoder import TransformerDecoderLayer
from mha_c.transformer.encoder import TransformerEncoderLayer

__all__ = ["Configuration", "add_options", "grid", "run"]

_ATTENTION, _ENCODER, _DECODER = "attention", "encoder", "decoder"

_REFUSALS = (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError)

_MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"key_padding_mask": "bool"},
    {"key_padding_mask": "float", "attn_mask": "float-3d"},
    {"attn_mask": "bool"},
    {"attn_mask": "float"},
    {"attn_mask": "bool-3d", "key_padding_mask": "bool", "is_causal": True},
)
_LAYOUTS: tuple[dict[str, Any], ...] = ({"batch_first": False}, {"batch_first": True}, {"unbatched": True})


@dataclass(frozen=True)
class _Kind:
    """What the grid of a kind of layer varies, beside masks, layouts and dtypes."""

    name: str
    widths: tuple[dict[str, Any], ...]
    extras: tuple[dict[str, Any], ...]
    varied: str


_WHOLE: dict[str, Any] = {
    "extras": (
        {},
        {"bias": False},
        {"norm_first": True},
        {"activation": "gelu"},
        {"activation": "silu", "norm_first": True},
    ),
    "varied": "with and without a batch and biases, with norms first or last, and with three activations",
}
# Each has one of few numbers, and one with more keys than one block of the kernels holds.
_KINDS: dict[str, _Kind] = {
    _ATTENTION: _Kind(
        "attention",
        widths=(
            {"embed_dim": 8, "num_heads": 4, "length": 5, "source_length": None},
            {"embed_dim": 64, "num_heads": 2, "length": 20, "source_length": 70},
            {"embed_dim": 96, "num_heads": 3, "kdim": 40, "vdim": 24, "length": 2, "source_length": 33},
        ),
        extras=tuple(
            {**extras, "need_weights": need_weights}
            for extras in (
                {},
                {"bias": False},
                {"add_bias_kv": True},
                {"add_zero_attn": True},
                {"add_bias_kv": True, "add_zero_attn": True},
            )
            for need_weights in (True, False)
        ),
        varied="with and without a batch, biases, extra keys and weights",
    ),
    _ENCODER: _Kind(
        "layers of an encoder",
        widths=(
            {"embed_dim": 8, "num_heads": 4, "dim_feedforward": 20, "length": 5},
            {"embed_dim": 64, "num_heads": 2, "dim_feedforward": 100, "length": 70},
        ),
        **_WHOLE,
    ),
    _DECODER: _Kind(
        "layers of a decoder",
        widths=(
            {"embed_dim": 8, "num_heads": 4, "dim_feedforward": 20, "length": 5},
            {"embed_dim": 64, "num_heads": 2, "dim_feedforward": 100, "length": 20, "source_length": 70},
        ),
        **_WHOLE,
    ),
}


def _option(
    default: Any, help: str, flag: str = "", of: tuple[str, ...] = (), in_file: bool = False, **settings: Any
) -> Any:
    """A field of `Configuration`, how argparse reads it, the kinds of layers that have it, if not all have, and whether
    a layer in a file says it itself.
    """
    metadata = {"flag": flag, "of": of, "in_file": in_file, "settings": {"help": help, **settings}}
    return field(default=default, metadata=metadata)


def _size(text: str) -> int:
    """A number of the command line, which counts something."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an int of at least 0, but got {text!r}")
    return int(text)


_SIZE: dict[str, Any] = {"type": _size, "metavar": "N"}


@dataclass(frozen=True)
class Configuration:
    """A layer and a call of it. The fields are the options of the command line.

    Examples
    --------
    >>> Configuration(embed_dim=8, num_heads=4, is_causal=True).check().agrees
    True
    """

    file: str | None = None
    layer: str = _option(
        _ATTENTION, "attention, or a whole layer of an encoder or a decoder", choices=tuple(_KINDS)
    )
    embed_dim: int | None = _option(None, "features of the query, or of a whole layer", in_file=True, **_SIZE)
    num_heads: int | None = _option(None, "heads", **_SIZE)
    kdim: int | None = _option(None, "features of the key", of=(_ATTENTION,), in_file=True, **_SIZE)
    vdim: int | None = _option(None, "features of the value", of=(_ATTENTION,), in_file=True, **_SIZE)
    dim_feedforward: int = _option(
        2048, "features of the feed-forward network", of=(_ENCODER, _DECODER), in_file=True, **_SIZE
    )
    activation: str | None = _option(
        None, "default: relu, or that of CONFIG", of=(_ENCODER, _DECODER), choices=("relu", "gelu", "gelu_tanh", "silu")
    )
    norm_first: bool = _option(False, "norms before attention and feed-forward", of=(_ENCODER, _DECODER))
    bias: bool = _option(True, "maps and norms without biases", "--no-bias", in_file=True)
    add_bias_kv: bool = _option(False, "append a learned key and value", of=(_ATTENTION,), in_file=True)
    add_zero_attn: bool = _option(False, "append a key and value of zeros", of=(_ATTENTION,))
    batch_first: bool = _option(False, "inputs are (N, L, E)")
    dtype: str | None = _option(
        None, "default: float32; when all configurations are checked, float32 and float64", choices=DTYPES
    )
    prefix: str = _option(
        "", "what precedes the layer's names in FILE, such as encoder.layers.0.self_attn.", of=(_ATTENTION, _ENCODER)
    )
    config: str | None = _option(
        None, "config.json of the Hugging Face model in FILE", of=(_ATTENTION, _ENCODER), metavar="CONFIG"
    )
    batch: int = _option(3, "batch size", **_SIZE)
    unbatched: bool = _option(False, "inputs without a batch axis")
    length: int = _option(5, "queries", **_SIZE)
    source_length: int | None = _option(
        None, "keys; self-attention unless given; of a decoder, those of the memory", of=(_ATTENTION, _DECODER), **_SIZE
    )
    key_padding_mask: str | None = _option(
        None, "hide random keys; of a decoder, in target and memory", choices=("bool", "float")
    )
    attn_mask: str | None = _option(
        None, "a random mask; of a decoder, for target and memory", choices=("bool", "float", "bool-3d", "float-3d")
    )
    is_causal: bool = _option(False, "query l sees the keys 0..l; of a decoder, in the target")
    need_weights: bool = _option(True, "do not ask for the weights", "--no-weights", of=(_ATTENTION,))
    seed: int = _option(0, "seed of parameters and inputs", **_SIZE)

    def check(self) -> Report:
        """Compare mha_c with torch."""
        layer = self._layer()
        attention = layer if isinstance(layer, MultiheadAttention) else layer.self_attn
        random = np.random.default_rng(self.seed)
        real = attention.out_proj.weight.dtype
        source_length = self.length if self.source_length is None else self.source_length
        batch = 1 if self.unbatched else self.batch

        def normal(length: int, features: int) -> Any:
            rows = (length,) if self.unbatched else (batch, length) if attention.batch_first else (length, batch)
            return random.standard_normal((*rows, features)).astype(real)

        def mask(kind: str | None, *shape: int) -> Any:
            """A random mask that hides no query's first key: torch answers NaN if all keys are hidden."""
            if kind is None:
                return None
            hidden = random.random(shape) < 0.4
            hidden[..., :1] = False
            return hidden if kind.startswith("bool") else random.standard_normal(shape).astype(real)

        def masks(attn_mask: str, key_padding_mask: str, length: int) -> dict[str, Any]:
            """Both masks for some number of keys, under these names."""
            stacked = (batch * attention.num_heads,) if (self.attn_mask or "").endswith("3d") else ()
            return {
                key_padding_mask: mask(self.key_padding_mask, *([] if self.unbatched else [batch]), length),
                attn_mask: mask(self.attn_mask, *stacked, self.length, length),
            }

        inputs = [normal(self.length, attention.embed_dim)]
        if isinstance(layer, TransformerEncoderLayer):
            call = {**masks("src_mask", "src_key_padding_mask", self.length), "is_causal": self.is_causal}
        elif isinstance(layer, TransformerDecoderLayer):
            inputs.append(normal(source_length, attention.embed_dim))
            call = {
                **masks("tgt_mask", "tgt_key_padding_mask", self.length),
                **masks("memory_mask", "memory_key_padding_mask", source_length),
                "tgt_is_causal": self.is_causal,
            }
        else:
            if self.source_length is not None or not parameters_of(layer).widths.is_stacked:
                inputs += [normal(source_length, layer.kdim), normal(source_length, layer.vdim)]
            call = {
                **masks("attn_mask", "key_padding_mask", source_length),
                "is_causal": self.is_causal,
                "need_weights": self.need_weights,
            }
        return against_torch(layer, *inputs, **call)

    def misplaced(self) -> list[str]:
        """The options that say something of layers of another kind."""
        return [_flag(one) for one in self._given() if one.metadata["of"] and self.layer not in one.metadata["of"]]

    def in_file(self) -> list[str]:
        """The options that repeat or contradict what the layer in the file says."""
        return [_flag(one) for one in self._given() if self.file is not None and one.metadata["in_file"]]

    def _given(self) -> list[Field[Any]]:
        return [one for one in fields(self) if one.metadata and getattr(self, one.name) != one.default]

    def _layer(self) -> Any:
        if self.file is None:
            return self._new_layer()
        with open_checkpoint(self.file) as checkpoint:
            is_described = checkpoint.config is not None
        given = " and ".join(_flag(one) for one in self._given() if one.name in ("num_heads", "config"))
        if not given:
            return self._saved_layer(self.file, is_described)
        if is_described:
            raise ValueError(f"{self.file} records the layer's own arguments: leave out {given}")
        options: dict[str, Any] = {"num_heads": self.num_heads, "config": self.config, "dtype": self.dtype}
        if self.layer == _ATTENTION:
            options |= {"add_zero_attn": self.add_zero_attn, "batch_first": self.batch_first}
            return MultiheadAttention.from_state_dict(self.file, self.prefix, **options)
        if self.layer == _ENCODER:
            has_config = self.config is not None  # which says what the options leave open
            options |= {
                "activation": self.activation or (None if has_config else "relu"),
                "norm_first": self.norm_first or (None if has_config else False),
                "layer_norm_eps": None if has_config else 1e-5,
                "batch_first": self.batch_first or None,
            }
            return TransformerEncoderLayer.from_state_dict(self.file, self.prefix, **options)
        raise ValueError("--layer decoder takes a file that TransformerDecoderLayer.save wrote, without --num-heads")

    @property
    def _class(self) -> Any:
        whole = {_ENCODER: TransformerEncoderLayer, _DECODER: TransformerDecoderLayer}
        return whole.get(self.layer, MultiheadAttention)

    def _new_layer(self) -> Any:
        options = {name: getattr(self, name) for name in ("bias", "batch_first", "dtype", "seed")}
        if self.layer == _ATTENTION:
            options |= {name: getattr(self, name) for name in ("add_bias_kv", "add_zero_attn", "kdim", "vdim")}
        else:
            options |= {name: getattr(self, name) for name in ("dim_feedforward", "norm_first")}
            options["activation"] = self.activation or "relu"
        layer = self._class(self.embed_dim, self.num_heads, **options)
        random = np.random.default_rng(self.seed)
        constant = {name: array for name, array in layer.named_parameters() if name.endswith("bias") or "norm" in name}
        layer.load_state_dict({name: random.standard_normal(a.shape) for name, a in constant.items()}, strict=False)
        return layer

    def _saved_layer(self, file: str, is_described: bool) -> Any:
        if not is_described:
            cure = "only such files are checked" if self.layer == _DECODER else "pass --num-heads or --config"
            raise ValueError(f"{file} was not written by {self._class.__name__}.save: {cure}")
        layer = self._class.load(file)
        for part in layer.modules():
            if isinstance(part, MultiheadAttention):
                part.batch_first = part.batch_first or self.batch_first
                part.add_zero_attn = part.add_zero_attn or self.add_zero_attn
        if self.layer != _ATTENTION:
            layer.norm_first = layer.norm_first or self.norm_first
            layer.activation = self.activation or layer.activation
        return layer if self.dtype is None else layer.to(self.dtype)


def grid(layer: str = _ATTENTION, dtype: str | None = None) -> Iterator[tuple[tuple[str, str], Configuration]]:
    """Every configuration that is checked without further options, each with its group and its row of the table.

    Parameters
    ----------
    layer : {"attention", "encoder", "decoder"}, default "attention"
        The kind of layer.
    dtype : str, optional
        The dtype of the layers; float32 and float64 unless given.

    Yields
    ------
    tuple of tuple of str and Configuration

    Examples
    --------
    >>> next(grid())[0], len(list(grid())), len(list(grid("decoder")))
    (('8 features, 4 heads, float32', 'no mask'), 1260, 420)
    """
    names = {"key_padding_mask": "padding", "attn_mask": "mask"}
    kind = _KINDS[layer]
    dtypes = ("float32", "float64") if dtype is None else (dtype,)
    for width, dtype, masks in itertools.product(kind.widths, dtypes, _MASKS):
        features = "/".join(str(width[name]) for name in ("embed_dim", "kdim", "vdim") if name in width)
        group = f"{features} features, {width['num_heads']} heads, {dtype}"
        row = ", ".join("causal" if mask is True else f"{mask} {names[name]}" for name, mask in masks.items())
        for layout, extras in itertools.product(_LAYOUTS, kind.extras):
            options = {**width, **masks, **layout, **extras}
            yield (group, row or "no mask"), Configuration(layer=layer, dtype=dtype, **options)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="a .safetensors, .npz, .pt, .pth, .bin or .ckpt file")
    for one in fields(Configuration):
        if not one.metadata:
            continue
        settings = dict(one.metadata["settings"])
        notes = [f"{' and '.join(one.metadata['of'])} only"] if one.metadata["of"] else []
        if isinstance(one.default, bool):
            settings["action"] = "store_false" if one.default else "store_true"
        elif one.default not in (None, ""):
            notes.append(f"default: {one.default}")
        settings["help"] += f" ({'; '.join(notes)})" if notes else ""
        parser.add_argument(_flag(one), dest=one.name, default=one.default, **settings)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _flag(option: Field[Any]) -> str:
    """An option as it is written on the command line."""
    return option.metadata["flag"] or f"--{option.name.replace('_', '-')}"


def run(options: dict[str, Any], parser: argparse.ArgumentParser) -> int:
    """Check what the options ask for, and print what is found.

    Parameters
    ----------
    options : dict of str to object
        All options. The whole grid is checked if they say nothing about a configuration but the kind of layer and the
        dtype.
    parser : argparse.ArgumentParser
        Ends the program if they do not fit together.

    Returns
    -------
    int
        0 if everything agrees, 1 if not, 2 if nothing could be checked.

    Raises
    ------
    KeyboardInterrupt
        After Ctrl-C; what was found until then is printed.
    """
    as_json = options.pop("json")
    configuration = Configuration(**options)
    if misplaced := configuration.misplaced():
        parser.error(f"--layer {configuration.layer} does not have {', '.join(misplaced)}")
    if in_file := configuration.in_file():
        parser.error(f"the layer in FILE says it itself: leave out {', '.join(in_file)}")
    if configuration.file is None and (configuration.config or configuration.prefix):
        parser.error("--config and --prefix describe FILE: name a file")
    over_grid = configuration == Configuration(layer=configuration.layer, dtype=configuration.dtype)
    if not over_grid and configuration.file is None and None in (configuration.embed_dim, configuration.num_heads):
        parser.error("say which layer to check: --embed-dim and --num-heads, or FILE")
    found: Report | _Survey
    try:
        require_torch("this command")
        from mha_c.torch.convert import TORCH_VERSION, one_thread

        if over_grid:
            with one_thread():
                found = _Survey.of_grid(configuration.layer, configuration.dtype, TORCH_VERSION)
        else:
            found = configuration.check()
    except _REFUSALS as error:
        print(f"{parser.prog}: {_in_options(str(error))}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"{parser.prog}: there is not enough memory for this check: {error}", file=sys.stderr)
        return 2
    tables: list[Report | Table]
    if isinstance(found, Report):
        tables, data, interrupted = [found], _report_as_json(found), False
    else:
        tables, data, interrupted = found.tables(), found.as_json(), found.interrupted
    if as_json:
        print(json.dumps(data))
    else:
        show(*tables)
    if interrupted:
        raise KeyboardInterrupt
    return 0 if found.agrees else 1


# Arguments of Python that errors name, and the options that stand for them here.
_OPTIONS: Final = {
    rf"\b{name}{'' if '_' in name else '='}": f"{name} is --{name.replace('_', '-')}"
    for name in ("activation", "config", "dtype", "embed_dim", "num_heads", "prefix")
}


def _in_options(words: str) -> str:
    """What an error says, and which options stand for the arguments that it names.

    Examples
    --------
    >>> _in_options('num_heads is 3: pass prefix="layers.0."')
    'num_heads is 3: pass prefix="layers.0." (Here, num_heads is --num-heads and prefix is --prefix.)'
    """
    named = [option for name, option in _OPTIONS.items() if re.search(name, words)]
    return f"{words} (Here, {listed(named)}.)" if named else words


@dataclass(frozen=True)
class _Row:
    """The worst of several reports; errors and `ulps`, the largest difference, are in units in the last place."""

    count: int = 0
    differing: int = 0
    difference: float = 0.0
    ulps: float = 0.0
    error: float = 0.0
    torch_error: float = 0.0

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
            f"{self.difference:.1e}",
            f"{self.ulps:.1f}",
            f"{self.error:.1f}",
            f"{self.torch_error:.1f}",
            f"{self.differing} DIFFER" if self.differing else "agree",
        )


@dataclass
class _Survey:
    """What was found over the grid."""

    title: str
    total: int
    varied: str
    rows: dict[tuple[str, str], _Row] = field(default_factory=dict)
    wrong: list[Report] = field(default_factory=list)
    interrupted: bool = False

    @classmethod
    def of_grid(cls, layer: str, dtype: str | None, torch_version: str) -> _Survey:
        """Check all configurations of a kind of layer, or those until Ctrl-C."""
        configurations = list(grid(layer, dtype))
        kind = _KINDS[layer]
        survey = cls(f"mha_c and torch {torch_version}: {kind.name}", len(configurations), kind.varied)
        try:
            for name, configuration in progress(configurations, "configuration"):
                report = configuration.check()
                survey.rows[name] = survey.rows.get(name, _Row()).plus(report)
                if not report.agrees:
                    survey.wrong.append(report)
        except KeyboardInterrupt:
            survey.interrupted = True
        return survey

    @property
    def checked(self) -> int:
        """The number of configurations that were checked."""
        return sum(row.count for row in self.rows.values())

    @property
    def agrees(self) -> bool:
        """Whether all configurations were checked and agree."""
        return self.checked == self.total and not self.wrong

    def tables(self) -> list[Report | Table]:
        """The first reports of what differs, then a table of all rows, under a heading for each group."""
        cells: list[tuple[str, ...]] = []
        verdicts: list[bool] = []
        for group, members in itertools.groupby(self.rows.items(), key=lambda item: item[0][0]):
            cells.append((group, "", "", "", "", ""))
            verdicts.append(True)
            for (_, masks), row in members:
                cells.append((f"  {masks}", *row.cells()))
                verdicts.append(row.differing == 0)
        header = ("", "max diff", "in ulp", "mha_c error", "torch error", "")
        note = (
            f"Each row is the worst of several configurations: {self.varied}. "
            "Errors are in ulp, units in the last place of the largest number of an output. "
        )
        summary = f"{len(self.wrong)} of {self.checked} differ" if self.wrong else f"all {self.checked} agree"
        if self.checked < self.total:
            left = self.total - self.checked
            summary += f"; {left} {'was' if left == 1 else 'were'} not checked"
        table = Table(self.title, header, cells, [note + CRITERION], verdicts=verdicts, summary=summary)
        return [*self.wrong[:5], table]

    def as_json(self) -> dict[str, Any]:
        """What `json.dumps` writes."""
        return {
            "title": self.title,
            "agrees": self.agrees,
            "configurations": self.total,
            "checked": self.checked,
            "differing": len(self.wrong),
            "rows": [
                {"group": group, "masks": masks, **asdict(row, dict_factory=_finite)}
                for (group, masks), row in self.rows.items()
            ],
            "differences": [_report_as_json(report) for report in self.wrong],
        }


def _report_as_json(report: Report) -> dict[str, Any]:
    return {
        "title": report.title,
        "agrees": report.agrees,
        "comparisons": [
            {**asdict(one, dict_factory=_finite), "agrees": one.agrees, "disagreements": one.disagreements}
            for one in report.comparisons
        ],
        "notes": report.notes,
    }


def _finite(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary in which null takes the place of infinity and NaN, which JSON lacks."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in items}
