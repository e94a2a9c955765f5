# SPDX-License-Identifier: Apache-2.0
"""Attention stage by stage: what the layer computes between its inputs and its output, as named arrays and pictures."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha_c import _core
from mha_c.attention import MultiheadAttention
from mha_c.check import describe
from mha_c.masks import MaskEffect, Masks, look_at_masks
from mha_c.parameters import ParameterSet, as_array
from mha_c.table import Table

__all__ = ["STAGES", "Explanation", "Stage", "explain"]

#: The names of all stages, in the order of the computation.
STAGES = (
    "q",
    "k",
    "v",
    "q_heads",
    "k_heads",
    "v_heads",
    "scores",
    "masked_scores",
    "weights_before_dropout",
    "weights",
    "average_weights",
    "head_outputs",
    "concatenated",
    "output",
)


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage of attention.

    Attributes
    ----------
    name : str
        As in `STAGES`.
    array : numpy.ndarray
        The numbers.
    axes : tuple of str
        What each axis counts, in the letters of `Explanation.letters`, such as ``("N", "L", "H·D")``.
    formula : str
        How it follows from the stages before.
    meaning : str
        What it is, in words.
    operations : int
        Additions, multiplications and other steps that its definition takes; 0 for a mere view.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> x = np.ones((5, 3, 8), np.float32)
    >>> stage = mha_c.explain(mha_c.MultiheadAttention(8, 4), x, x, x).stages["scores"]
    >>> stage.axes, stage.shape, stage.nbytes, stage.operations
    (('N', 'H', 'L', 'S'), (3, 4, 5, 5), 1200, 1200)
    """

    name: str
    array: NDArray[Any]
    axes: tuple[str, ...]
    formula: str
    meaning: str
    operations: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.array.shape

    @property
    def nbytes(self) -> int:
        """The bytes of its numbers, be they its own or those of a stage before that it is a view of."""
        return self.array.nbytes


class Explanation:
    """Every stage of one call of a layer; `explain` makes it, printing it or showing it in a notebook gives a summary.

    An axis N is missing everywhere if the inputs have none. S' counts the keys and those that `add_bias_kv` and
    `add_zero_attn` append. If only some heads were asked for, H' counts them; they take the place of H, and the keys
    and values that they read that of Hkv: `k_heads[:, i]` are the keys of head `heads[i]`.

    Attributes
    ----------
    q, k, v : numpy.ndarray, (N, L, H * D), (N, S, Hkv * D), (N, S, Hkv * Dv)
        The projected inputs, always with N before L.
    q_heads, k_heads, v_heads : numpy.ndarray, (N, H, L, D), (N, Hkv, S', D), (N, Hkv, S', Dv)
        The same cut into heads, with the appended keys and values.
    scores : numpy.ndarray, (N, H, L, S')
        Query times key over the square root of D.
    masked_scores : numpy.ndarray, (N, H, L, S')
        The scores after the masks; the same array as `scores` where there is no mask.
    weights : numpy.ndarray, (N, H, L, S')
        Their softmax: what the layer returns with ``average_attn_weights=False``, after dropout if there is any.
    weights_before_dropout : numpy.ndarray, (N, H, L, S')
        The same before dropout; by itself only where dropout is active.
    average_weights : numpy.ndarray, (N, L, S')
        Their mean over all heads, which the layer returns otherwise.
    head_outputs : numpy.ndarray, (N, H, L, Dv)
        For each head, the values averaged with its weights.
    concatenated : numpy.ndarray, (N, L, H * Dv)
        The results of all heads side by side.
    output : numpy.ndarray, (L, N, out_dim)
        What the layer returns, in its own layout, bit for bit.
    stages : mapping of str to Stage
        All of these that were asked for, in this order; another one is an AttributeError.
    letters : mapping of str to int
        The letters of the shapes, and what they stand for in this call.
    heads : tuple of int
        The heads that were asked for.
    paths : tuple of str
        For each batch item, how the layer computes it: "ordinary", or "few queries", which projects no keys.
    masks : tuple of MaskEffect
        What each mask hides.
    warnings : tuple of str
        What looks wrong: rows without any visible key, masks that look inverted.
    notes : tuple of str
        What else there is to know, in sentences: paths, masks, dropout.
    title : str
        The layer and the call, in one line.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> x = np.ones((5, 3, 8), np.float32)
    >>> explanation = mha_c.explain(mha_c.MultiheadAttention(8, 4), x, x, x, is_causal=True, stages=["q", "weights"])
    >>> list(explanation.stages), explanation.weights[0, 0, 1]
    (['q', 'weights'], array([0.5, 0.5, 0. , 0. , 0. ], dtype=float32))
    """

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    q_heads: NDArray[Any]
    k_heads: NDArray[Any]
    v_heads: NDArray[Any]
    scores: NDArray[Any]
    masked_scores: NDArray[Any]
    weights_before_dropout: NDArray[Any]
    weights: NDArray[Any]
    average_weights: NDArray[Any]
    head_outputs: NDArray[Any]
    concatenated: NDArray[Any]
    output: NDArray[Any]

    def __init__(
        self,
        title: str,
        stages: Mapping[str, Stage],
        letters: Mapping[str, int],
        heads: tuple[int, ...],
        paths: tuple[str, ...],
        masks: tuple[MaskEffect, ...],
        warnings: tuple[str, ...],
        notes: tuple[str, ...],
    ) -> None:
        self.title = title
        self.stages = dict(stages)
        self.letters = dict(letters)
        self.heads = heads
        self.paths = paths
        self.masks = masks
        self.warnings = warnings
        self.notes = notes

    def __getattr__(self, name: str) -> NDArray[Any]:
        if name not in STAGES:
            raise AttributeError(f"'Explanation' object has no attribute {name!r}")
        if name not in self.stages:
            raise AttributeError(f"{name} was not asked for: explain(..., stages=[{name!r}, ...]) computes it")
        return self.stages[name].array

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.stages})

    def table(self) -> Table:
        """The stages as a table: shapes, operations, bytes; then what else there is to know.

        Returns
        -------
        Table
            Text for a terminal when printed, HTML in a notebook.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> table = explain(mha_c.MultiheadAttention(8, 4), *[np.ones((5, 3, 8), np.float32)] * 3).table()
        >>> table.header
        ('', 'axes', 'shape', 'operations', 'bytes', '')
        """
        header = ("", "axes", "shape", "operations", "bytes", "")
        rows = [
            (
                stage.name,
                f"({', '.join(stage.axes)})",
                str(stage.shape),
                f"{stage.operations:,}",
                f"{stage.nbytes:,}",
                stage.formula,
            )
            for stage in self.stages.values()
        ]
        where = ", ".join(f"{letter} = {size}" for letter, size in self.letters.items())
        return Table(self.title, header, rows, [where, *self.notes, *(f"Warning: {what}" for what in self.warnings)])

    def __repr__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Table:
        return self.table()


def explain(
    layer: MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    heads: int | Iterable[int] | None = None,
    stages: str | Iterable[str] | None = None,
) -> Explanation:
    """Show what a layer computes between its inputs and its output.

    Every number comes from the C core that the layer itself runs on: `output`, `weights` and `average_weights` are the
    layer's own, bit for bit, and so is `head_outputs`. Nothing is kept that was not asked for.

    Parameters
    ----------
    layer : MultiheadAttention
        The layer.
    query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        As for `MultiheadAttention.forward`, whose call it is. `need_weights` only says what a query gets that may see no key,
        and `average_attn_weights` nothing: all weights are here.
    heads : int or sequence of int, optional
        The heads to look at, by number; all unless given. Stages that belong to a head are computed for these alone,
        while `average_weights`, `concatenated` and `output` are made of all heads.
    stages : str or sequence of str, optional
        The stages to keep, by name; all unless given. The others are not computed, unless on the way to these.

    Returns
    -------
    Explanation
        The stages as attributes and in `stages`; printing it, or showing it in a notebook, gives a summary.

    Raises
    ------
    TypeError
        If `layer` is no layer of mha_c.
    ValueError
        If a stage is unknown or a head named twice, or if `heads` are chosen where dropout is active: it draws for all
        heads together. ``layer.eval()`` switches it off.
    IndexError
        If there is no such head.
    AssertionError, RuntimeError, TypeError, ValueError
        Where the layer itself raises them.

    Notes
    -----
    Looking does not count as a call: with active dropout, what is shown is what the next call of the layer will drop.

    The layer computes no scores as a whole, and no keys that a mask removes or that few queries look at; such keys and
    all scores are computed for the explanation, by the same projections and the same products.

    "Attention Is All You Need" (Vaswani et al., 2017), section 3.2.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> attention = mha_c.MultiheadAttention(8, 4, seed=0)
    >>> x = np.random.default_rng(0).standard_normal((5, 3, 8), dtype=np.float32)
    >>> explanation = mha_c.explain(attention, x, x, x)
    >>> explanation.scores.shape, explanation.weights.shape, explanation.output.shape
    ((3, 4, 5, 5), (3, 4, 5, 5), (5, 3, 8))
    >>> np.array_equal(explanation.output, attention(x, x, x)[0])
    True

    Of one head, without the memory for the others:

    >>> mha_c.explain(attention, x, x, x, heads=2, stages="weights").weights.shape
    (3, 1, 5, 5)
    """
    if not isinstance(layer, MultiheadAttention):
        raise TypeError(
            f"layer must be a mha_c.MultiheadAttention, not {type(layer).__name__}; "
            "MultiheadAttention.from_torch makes one of torch's"
        )
    call = _Call(layer, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal, heads)
    arrays = call.compute(_chosen_stages(stages, call.dropout_p > 0))
    return call.describe(arrays)


def _chosen_stages(stages: str | Iterable[str] | None, drops: bool) -> set[str]:
    if stages is None:
        return {name for name in STAGES if drops or name != "weights_before_dropout"}
    chosen = {stages} if isinstance(stages, str) else set(stages)
    for name in chosen.difference(STAGES):
        raise ValueError(f"there is no stage {name!r}; the stages are {', '.join(STAGES)}")
    return chosen


def _chosen_heads(heads: int | Iterable[int] | None, num_heads: int) -> list[int] | None:
    if heads is None:
        return None
    chosen = [operator.index(head) for head in (heads if isinstance(heads, Iterable) else [heads])]
    for head in chosen:
        if not -num_heads <= head < num_heads:
            raise IndexError(f"there is no head {head}: this layer has heads 0 to {num_heads - 1}")
    chosen = [head % num_heads for head in chosen]
    if len(set(chosen)) < len(chosen) or not chosen:
        raise ValueError(f"heads must name one head or more, each once, but got {heads!r}")
    return chosen


class _Call:
    """One call of a layer, with one set of its parameters: computes stages by asking the core for them."""

    def __init__(
        self,
        layer: MultiheadAttention,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any,
        need_weights: bool,
        attn_mask: Any,
        is_causal: bool,
        heads: int | Iterable[int] | None,
    ) -> None:
        self.layer = layer
        self.dropout_seed = layer.dropout_seed
        self.parameters: ParameterSet = layer._parameters
        self.widths = self.parameters.widths
        self.inputs = (query, key, value)
        self.masks = (key_padding_mask, attn_mask, is_causal)
        self.batch_first = layer.batch_first
        self.add_zero_attn = layer.add_zero_attn
        self.empty = "nan" if need_weights and layer.masked_rows == "torch" else "zero"
        self.dropout_p = layer.dropout if layer.training else 0.0
        self.dropout_call = layer._dropout_calls
        self.heads = _chosen_heads(heads, self.widths.num_heads)
        if self.heads is not None and self.dropout_p > 0:
            raise ValueError(
                f"this layer is in training mode and drops weights (dropout={self.dropout_p}), for all heads together: "
                "call its eval() first, or leave out heads="
            )
        # Makes the checks of a call, so that errors are those of the layer.
        self.paths = _core.takes_few_queries(*self.arguments(self.parameters.weights))
        shapes = [as_array(one).shape for one in (query, key)]
        self.is_batched = len(shapes[0]) == 3
        length_axis = 1 if self.is_batched and self.batch_first else 0
        self.batch = len(self.paths)
        self.length, self.source_length = (shape[length_axis] for shape in shapes)
        self.extra_keys = ("bias_k" in self.parameters.arrays) + bool(self.add_zero_attn)
        self.of_heads = (
            self.parameters.weights if self.heads is None else self.parameters.weights_of_heads(self.heads)
        )

    def arguments(
        self,
        weights: _core.Weights,
        *,
        need_weights: bool = False,
        average: bool = False,
        masks: tuple[Any, Any, bool] | None = None,
        dropout_p: float | None = None,
    ) -> tuple[Any, ...]:
        """The positional arguments of the core's functions."""
        key_padding_mask, attn_mask, is_causal = self.masks if masks is None else masks
        return (
            weights,
            *self.inputs,
            key_padding_mask,
            need_weights,
            attn_mask,
            average,
            is_causal,
            None,
            self.batch_first,
            self.add_zero_attn,
            self.empty,
            self.dropout_p if dropout_p is None else dropout_p,
            self.dropout_seed,
            self.dropout_call,
        )

    @property
    def masks_of_heads(self) -> tuple[Any, Any, bool]:
        """The masks of the chosen heads alone."""
        key_padding_mask, attn_mask, is_causal = self.masks
        if self.heads is not None and attn_mask is not None:
            mask = as_array(attn_mask)
            if mask.ndim == 3:
                by_head = mask.reshape(-1, self.widths.num_heads, *mask.shape[1:])[:, self.heads]
                attn_mask = by_head.reshape(-1, *mask.shape[1:])
        return key_padding_mask, attn_mask, is_causal

    # ---- Numbers

    def compute(self, wanted: set[str]) -> dict[str, NDArray[Any]]:
        """The wanted stages."""
        found: dict[str, NDArray[Any]] = {}
        for letter, name, value in zip("qkv", ("query", "key", "value"), self.inputs):
            if wanted & {letter, f"{letter}_heads"}:
                found[letter] = _core.project(self.of_heads, name, value, self.batch_first)
                found[f"{letter}_heads"] = self._split(letter, found[letter])
        if wanted & {"scores", "masked_scores"}:
            self._compute_scores(wanted, found)
        if "weights_before_dropout" in wanted:
            _, found["weights_before_dropout"] = self._attend(self.of_heads, need_weights=True, dropout_p=0.0)
        if wanted & {"weights", "head_outputs", "concatenated"}:
            self._compute_heads(wanted, found)
        if wanted & {"average_weights", "output"}:
            weights = self.parameters.weights
            need_weights = "average_weights" in wanted
            output, average = _core.forward(*self.arguments(weights, need_weights=need_weights, average=True))
            found["output"] = output
            if average is not None:
                found["average_weights"] = average
        return {name: found[name] for name in STAGES if name in wanted}

    def _split(self, letter: str, projected: NDArray[Any]) -> NDArray[Any]:
        """(N, S, H * D) to (N, H, S', D)."""
        width = self.widths.v_head_dim if letter == "v" else self.widths.head_dim
        heads = projected.shape[-1] // width
        split = projected.reshape(*projected.shape[:-1], heads, width).swapaxes(-3, -2)
        extra = [] if letter == "q" else self._extra_keys(letter, heads, width)
        if not extra:
            return split
        return np.concatenate([split, *(np.broadcast_to(one, (*split.shape[:-2], 1, width)) for one in extra)], axis=-2)

    def _extra_keys(self, letter: str, heads: int, width: int) -> list[NDArray[Any]]:
        """The keys or values, (heads, 1, width), that the layer appends."""
        learnt = self.parameters.arrays.get(f"bias_{letter}")
        extra = []
        if learnt is not None:
            by_head = learnt.reshape(-1, 1, width)
            shared = self.widths.num_heads // self.widths.num_kv_heads
            extra.append(by_head if self.heads is None else by_head[[head // shared for head in self.heads]])
        if self.add_zero_attn:
            extra.append(np.zeros((heads, 1, width), self.parameters.dtype))
        return extra

    def _compute_scores(self, wanted: set[str], found: dict[str, NDArray[Any]]) -> None:
        key_padding_mask, attn_mask, is_causal = self.masks
        is_masked = key_padding_mask is not None or attn_mask is not None or bool(is_causal)
        if "scores" in wanted or not is_masked:
            unmasked = (None, None, False)
            found["scores"] = _core.scores(*self.arguments(self.of_heads, need_weights=True, masks=unmasked))
        if not is_masked:
            found["masked_scores"] = found["scores"]
        elif "masked_scores" in wanted:
            masks = self.masks_of_heads
            found["masked_scores"] = _core.scores(*self.arguments(self.of_heads, need_weights=True, masks=masks))

    def _attend(
        self, weights: _core.Weights, need_weights: bool, dropout_p: float | None = None
    ) -> tuple[NDArray[Any], Any]:
        masks = self.masks if weights is self.parameters.weights else self.masks_of_heads
        arguments = self.arguments(weights, need_weights=need_weights, masks=masks, dropout_p=dropout_p)
        return _core.attend(*(*arguments, self.paths))

    def _compute_heads(self, wanted: set[str], found: dict[str, NDArray[Any]]) -> None:
        if self.heads is None or wanted & {"weights", "head_outputs"}:
            joined, weights = self._attend(self.of_heads, need_weights="weights" in wanted)
            found["weights"] = weights
            found["concatenated"] = joined
            width = self.widths.v_head_dim
            split = joined.reshape(*joined.shape[:-1], joined.shape[-1] // width, width)
            found["head_outputs"] = split.swapaxes(-3, -2)
        if self.heads is not None and "concatenated" in wanted:
            found["concatenated"], _ = self._attend(self.parameters.weights, need_weights=False)

    # ---- Words

    def letters(self) -> dict[str, int]:
        """What the letters of the shapes stand for; two that are equal by default have one letter where they are."""
        w = self.widths
        letters = {"N": self.batch} if self.is_batched else {}
        letters |= {"L": self.length, "S": self.source_length}
        letters |= {"S'": self.source_length + self.extra_keys} if self.extra_keys else {}
        letters |= {"H": w.num_heads}
        letters |= {"Hkv": w.num_kv_heads} if w.num_kv_heads != w.num_heads else {}
        letters |= {"H'": len(self.heads)} if self.heads is not None else {}
        letters |= {"D": w.head_dim}
        letters |= {"Dv": w.v_head_dim} if w.v_head_dim != w.head_dim else {}
        widths = {"E": w.embed_dim, "Ek": w.kdim, "Ev": w.vdim, "Eo": w.out_dim}
        return letters | {name: width for name, width in widths.items() if name == "E" or width != w.embed_dim}

    def describe(self, arrays: Mapping[str, NDArray[Any]]) -> Explanation:
        """The explanation around the stages."""
        letters = self.letters()
        stages = {name: stage for name, stage in self._stages(arrays, letters).items() if name in arrays}
        key_padding_mask, attn_mask, is_causal = self.masks
        masks = look_at_masks(
            key_padding_mask,
            attn_mask,
            bool(is_causal),
            self.batch,
            self.widths.num_heads,
            self.length,
            self.source_length,
            self.parameters.dtype,
        )
        return Explanation(
            title=self._title(),
            stages=stages,
            letters=letters,
            heads=tuple(range(self.widths.num_heads) if self.heads is None else self.heads),
            paths=tuple("few queries" if is_few else "ordinary" for is_few in self.paths),
            masks=masks.effects,
            warnings=self._warnings(masks),
            notes=(*self._path_notes(), *self._mask_notes(masks), *self._dropout_notes(arrays)),
        )

    def _title(self) -> str:
        query, key, value = self.inputs
        named = {"query": query, "key_padding_mask": self.masks[0], "attn_mask": self.masks[1]}
        arrays = {name: None if value is None else as_array(value) for name, value in named.items()}
        return describe(self.layer, {**arrays, "is_causal": self.masks[2]})

    def _stages(self, arrays: Mapping[str, NDArray[Any]], letters: Mapping[str, int]) -> dict[str, Stage]:
        """All stages in words; the sizes of those that were not computed count nothing."""
        shared = {"Hkv": "H", "Dv": "D", "Ek": "E", "Ev": "E", "Eo": "E", "S'": "S"}
        chosen = {"H": "H'", "Hkv": "H'"} if self.heads is not None else {}

        def letter(name: str, of_all_heads: bool = False) -> str:
            name = name if of_all_heads else chosen.get(name, name)
            return name if name in letters else shared[name]

        def size(*names: str) -> int:
            return prod(letters.get(name, 1) for name in names)

        n = ("N",) if self.is_batched else ()
        h, hkv, d, dv = letter("H"), letter("Hkv"), letter("D"), letter("Dv")
        s, every = letter("S'"), letter("H", of_all_heads=True)
        pairs = (*n, h, "L", s)
        inputs = {"q": ("query", "L", "E", h, d), "k": ("key", "S", letter("Ek"), hkv, d)}
        inputs["v"] = ("value", "S", letter("Ev"), hkv, dv)
        bias = "" if self.parameters.input_biases is None else " + b"
        asks = {"q": "what each position looks for", "k": "what each position offers to be found by"}
        asks["v"] = "what each position hands over when found"
        rows: list[tuple[str, tuple[str, ...], str, str, int]] = []
        for name, (x, length, features, heads, width) in inputs.items():
            axes = (*n, length, f"{heads}·{width}")
            operations = 2 * size("N", length, features, heads, width)
            suffix = f"{bias}_{name}" if bias else ""
            rows.append((name, axes, f"{x} W_{name}ᵀ{suffix}", f"{asks[name]}: a linear map of the {x}", operations))
        for name, (_, length, _, heads, width) in inputs.items():
            length = length if name == "q" else s
            added = " and then the appended ones" if name != "q" and self.extra_keys else ""
            meaning = f"the same numbers{added}, cut into heads of {letters[width]} features"
            rows.append((f"{name}_heads", (*n, heads, length, width), f"{name}, head by head", meaning, 0))
        scores = 2 * size("N", h, "L", s, d)
        each = size(*pairs)
        is_masked = any(mask is not None and mask is not False for mask in self.masks)
        masked = ("scores + masks", "-inf where a mask hides a key") if is_masked else ("scores", "no mask: unchanged")
        rows += [
            ("scores", pairs, f"q_heads k_headsᵀ / √{letters[d]}", "how well each query and each key agree", scores),
            ("masked_scores", pairs, masked[0], masked[1], each if is_masked else 0),
            ("weights_before_dropout", pairs, "softmax(masked_scores)", "as without dropout", 5 * each),
            ("weights", pairs, *self._weights_in_words(), 5 * each),
            ("average_weights", (*n, "L", s), "mean of all heads' weights", "what the layer returns", size(*n, every, "L", s)),
            ("head_outputs", (*n, h, "L", dv), "weights v_heads", "the values, averaged by the weights", 2 * each * letters[dv]),
            ("concatenated", (*n, "L", f"{every}·{dv}"), "head_outputs side by side", "all heads, for each query", 0),
        ]
        layout = n if not self.is_batched or self.batch_first else ()
        out = letter("Eo")
        axes = (*layout, "L", *(n if not layout else ()), out)
        bias = " + b_o" if "out_proj.bias" in self.parameters.arrays else ""
        operations = 2 * size("N", "L", every, dv, out)
        rows.append(("output", axes, f"concatenated W_oᵀ{bias}", "one more linear map, which mixes the heads", operations))
        return {
            name: Stage(name, arrays[name], axes, formula, meaning, operations)
            for name, axes, formula, meaning, operations in rows
            if name in arrays
        }

    def _weights_in_words(self) -> tuple[str, str]:
        if self.dropout_p > 0:
            return "dropout(softmax(masked_scores))", "some dropped, the others scaled up: they sum to 1 on average"
        return "softmax(masked_scores)", "positive, and they sum to 1 for each query"

    def _path_notes(self) -> list[str]:
        few = [n for n, is_few in enumerate(self.paths) if is_few]
        ordinary = [n for n, is_few in enumerate(self.paths) if not is_few]
        notes = []
        if ordinary:
            notes.append(
                f"{self._items(ordinary)}the ordinary path: q, k and v are projected, then each panel of queries meets the "
                "keys block by block, and no (L, S) array exists."
            )
        if few:
            notes.append(
                f"{self._items(few)}the path for few queries: (W_kᵀ q)·key and W_v (Σ weight·value) take fewer operations "
                "than projecting every key; k, v and the scores were computed for this explanation alone."
            )
        config = _core.config()
        notes.append(f"Kernels: {config['cpu_level']}; up to {config['threads']} threads, which change no bit.")
        return notes

    def _items(self, numbers: Sequence[int]) -> str:
        """Which batch items, as the beginning of a sentence."""
        if len(numbers) == self.batch:
            return "Path: " if self.batch == 1 else "Path of all items: "
        listed = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return f"Path of item{'s' if len(numbers) > 1 else ''} {listed}: "

    def _mask_notes(self, masks: Masks) -> list[str]:
        if not masks.effects:
            return []
        notes = [f"{sentence}" for effect in masks.effects for sentence in effect.says]
        hidden = masks.pairs - masks.visible
        notes.append(
            f"Together the masks hide {hidden:,} of {masks.pairs:,} pairs of query and key. Keys that key_padding_mask "
            "removes are neither projected nor scored; blocks of keys that no query of a panel sees are skipped."
        )
        if self.extra_keys:
            notes.append(f"No mask hides the {self.extra_keys} appended key{'s' if self.extra_keys > 1 else ''}.")
        return notes

    def _warnings(self, masks: Masks) -> tuple[str, ...]:
        warnings = [warning for effect in masks.effects for warning in effect.warnings]
        if masks.blind_count and self.source_length:
            n, h, query = masks.blind[0]
            where = f"query {query} of head {h}" + (f" in item {n}" if self.is_batched else "")
            gets = {"nan": "weights and output are NaN", "zero": "no attention: its output is the output bias"}[self.empty]
            gets = "only the appended keys are left" if self.extra_keys else gets
            warnings.append(
                f"{masks.blind_count:,} of {masks.pairs // self.source_length:,} rows see no key, the first being {where}; "
                f"{gets}." + (' MultiheadAttention(masked_rows="zero") makes it 0.' if gets.endswith("NaN") else "")
            )
        return tuple(warnings)

    def _dropout_notes(self, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
        if not self.layer.dropout > 0:
            return []
        if self.dropout_p == 0:
            return [f"Dropout is off: the layer is in evaluation mode (dropout={self.layer.dropout})."]
        note = (
            f"Dropout is active: each weight is dropped with probability {self.dropout_p}, the others are multiplied by "
            f"1 / (1 - {self.dropout_p}). These are the numbers that the layer's next call will drop; looking does not count."
        )
        if {"weights", "weights_before_dropout"} <= arrays.keys():
            before, after = arrays["weights_before_dropout"], arrays["weights"]
            dropped = int(np.count_nonzero((before != 0) & (after == 0)))
            note += f" It dropped {dropped:,} of {int(np.count_nonzero(before)):,} weights."
        return [note]
