# SPDX-License-Identifier: Apache-2.0
"""Attention stage by stage: what the layer computes between its inputs and its output, as named arrays and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from mha_c.attention import MultiheadAttention
from mha_c.explanation_text import Words
from mha_c.masks import MaskEffect, look_at_masks
from mha_c.stages import STAGES, StagedCall, chosen_stages
from mha_c.table import Table

__all__ = ["Explanation", "Stage", "explain"]


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage of attention.

    Attributes
    ----------
    name : str
        As in `mha_c.stages.STAGES`.
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
        For each batch item, how the layer computes it: "ordinary", or "few queries", which projects no keys (an
        item whose scores or results turn out not to be finite is then computed once more, on the ordinary path).
    masks : tuple of MaskEffect
        What each mask hides.
    warnings : tuple of str
        What looks wrong: rows without any visible key, masks that look inverted.
    notes : tuple of str
        What else there is to know, in sentences: paths, masks, dropout.
    title : str
        The layer and the call, in one line.
    inputs : mapping of str to (tuple of str, tuple of int)
        The axes and the shapes of query, key and value.

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
        inputs: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]],
        stages: Mapping[str, Stage],
        letters: Mapping[str, int],
        heads: tuple[int, ...],
        paths: tuple[str, ...],
        masks: tuple[MaskEffect, ...],
        warnings: tuple[str, ...],
        notes: tuple[str, ...],
    ) -> None:
        self.title = title
        self.inputs = dict(inputs)
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
        notes = [where, *self.notes, *(f"Warning: {what}" for what in self.warnings)]
        return Table(self.title, header, rows, notes, text=(0, 1, 2, 5))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        """What a notebook shows: a diagram of the flow, and every stage to unfold."""
        from mha_c.explanation_html import render

        return render(self)

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
    call = StagedCall(layer, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal, heads)
    arrays = call.compute(chosen_stages(stages, call.dropout_p > 0))
    sizes = (call.batch, call.widths.num_heads, call.length, call.source_length)
    masks = look_at_masks(key_padding_mask, attn_mask, bool(is_causal), *sizes, call.parameters.dtype)
    words = Words(call)
    texts = words.stages()
    return Explanation(
        title=words.title,
        inputs=words.inputs,
        stages={name: Stage(name, array, *texts[name]) for name, array in arrays.items()},
        letters=words.letters,
        heads=tuple(range(call.widths.num_heads) if call.heads is None else call.heads),
        paths=tuple("few queries" if is_few else "ordinary" for is_few in call.paths),
        masks=masks.effects,
        warnings=words.warnings(masks),
        notes=words.notes(masks, arrays),
    )
