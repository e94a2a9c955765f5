# SPDX-License-Identifier: Apache-2.0
"""The result of `explain`: the stages of a call as arrays, as a table and as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from mha_c.display.table import Table
from mha_c.explanation.html import render
from mha_c.explanation.masks import MaskEffect
from mha_c.explanation.stages import STAGES, Stage

__all__ = ["Explanation"]


class Explanation:
    """The stages of one call of a layer, as `explain` returns them.

    Printing it gives a table; a notebook shows a diagram.

    If the inputs have no batch, the stages have no axis N. S' is S plus the keys that `add_bias_kv` and `add_zero_attn`
    append. If only some heads were asked for, their number H' replaces H and Hkv, and `k_heads[:, i]` are the keys of
    head `heads[i]`.

    Attributes
    ----------
    q, k, v : numpy.ndarray, (N, L, H * D), (N, S, Hkv * D), (N, S, Hkv * Dv)
        The projected inputs, always with N before L.
    q_heads, k_heads, v_heads : numpy.ndarray, (N, H, L, D), (N, Hkv, S', D), (N, Hkv, S', Dv)
        The projected inputs, cut into heads, with the appended keys and values.
    scores : numpy.ndarray, (N, H, L, S')
        The dot products of queries and keys, divided by the square root of D.
    masked_scores : numpy.ndarray, (N, H, L, S')
        The scores after the masks. Without masks, this is the same array as `scores`.
    weights : numpy.ndarray, (N, H, L, S')
        The softmax of the masked scores, after dropout if it is active. The layer returns these weights with
        ``average_attn_weights=False``, rounded to its dtype.
    weights_before_dropout : numpy.ndarray, (N, H, L, S')
        The weights before dropout. Without dropout, this stage exists only if it is asked for.
    average_weights : numpy.ndarray, (N, L, S')
        The mean of the weights over all heads. The layer returns it by default.
    head_outputs : numpy.ndarray, (N, H, L, Dv)
        The values of each head, averaged by its weights.
    concatenated : numpy.ndarray, (N, L, H * Dv)
        The results of all heads, side by side.
    output : numpy.ndarray, (L, N, out_dim)
        The output of the layer, in its own layout, bit for bit.
    stages : mapping of str to Stage
        The stages that were asked for, in this order. The other attributes raise AttributeError.
    letters : mapping of str to int
        The letters of the shapes, with their sizes in this call.
    heads : tuple of int
        The heads that were asked for.
    paths : tuple of str
        How the layer computes each batch item: "ordinary", or "few queries", which does not project keys. A query
        on the latter path is computed again on the ordinary one if its scores or results are not finite.
    masks : tuple of MaskEffect
        What each mask hides.
    warnings : tuple of str
        What looks wrong: queries that see no key, masks that look inverted.
    notes : tuple of str
        Sentences about paths, what is multiplied, masks and dropout.
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
        """Return a table of the stages with their shapes, operations and bytes; notes and warnings are below it.

        Returns
        -------
        Table
            Text for a terminal when printed, HTML in a notebook.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> table = mha_c.explain(mha_c.MultiheadAttention(8, 4), *[np.ones((5, 3, 8), np.float32)] * 3).table()
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
        return Table(self.title, header, rows, notes, text=(0, 5))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        """HTML for a notebook: a diagram of the flow, and the stages, which can be unfolded."""
        return render(self)

    def __rich__(self) -> Table:
        return self.table()
