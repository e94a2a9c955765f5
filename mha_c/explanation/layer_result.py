# SPDX-License-Identifier: Apache-2.0
"""The results of `explain` for a layer of an encoder or a decoder, and for a stack of such layers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha_c.display.table import Table
from mha_c.explanation.html import render_layer
from mha_c.explanation.result import Explanation
from mha_c.explanation.stages import Stage

__all__ = ["LayerExplanation", "StackExplanation", "rows_of", "size_of_rows", "tokens_with_largest_norm"]


def rows_of(array: NDArray[Any], batch_first: bool) -> NDArray[Any]:
    """An array in the layout of a layer with its axes in the order (N, T, features); (T, features) without a batch."""
    return array.swapaxes(0, 1) if array.ndim == 3 and not batch_first else array


def size_of_rows(rows: NDArray[Any]) -> NDArray[np.float64]:
    """The Euclidean norms of rows of features, in float64."""
    norms: NDArray[np.float64] = np.linalg.norm(rows.astype(np.float64), axis=-1)
    return norms


def tokens_with_largest_norm(name: str, norms: NDArray[np.float64], seen: NDArray[np.bool_]) -> str:
    """A sentence about the rows of an array, of the tokens that are not padding."""
    order = np.argsort(-np.where(seen, norms, -np.inf), axis=None, kind="stable")[: min(3, np.count_nonzero(seen))]
    said = []
    for place in zip(*np.unravel_index(order, norms.shape)):
        *item, token = map(int, place)
        of_item = f" of item {item[0]}" if item and len(norms) > 1 else ""
        said.append(f"token {token}{of_item} ({norms[place]:.3g})")
    return f"The rows of {name} with the largest norms: {', '.join(said)}. The median is {np.median(norms[seen]):.3g}."


def _mean(norms: NDArray[np.float64]) -> str:
    return f"{norms.mean():.3g}" if norms.size else ""


def _ratio(norms: NDArray[np.float64], others: NDArray[np.float64]) -> str:
    return f"{norms.sum() / others.sum():.2f}" if others.any() else ""


class _WithStream:
    """What the explanations of layers and stacks share."""

    title: str
    residual_stream: dict[str, NDArray[Any]]
    batch_first: bool
    seen: NDArray[np.bool_]  # (N, T) or (T,): the tokens that are not padding

    def _seen_rows(self, array: NDArray[Any]) -> NDArray[Any]:
        rows: NDArray[Any] = rows_of(array, self.batch_first)[self.seen]
        return rows

    @property
    def norms(self) -> NDArray[np.float64]:
        """The Euclidean norm of the row of each token in the residual stream: (N, R, T), or (R, T) without a batch.

        R is the length of `residual_stream`.
        """
        norms = [size_of_rows(rows_of(array, self.batch_first)) for array in self.residual_stream.values()]
        return np.stack(norms, axis=-2)

    def table(self) -> Table:
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Table:
        return self.table()


class LayerExplanation(_WithStream):
    """The stages of one call of a layer of an encoder or a decoder, as `explain` returns them.

    Printing it gives a table; a notebook shows the stages, which can be unfolded. The stages are attributes. A name
    with a number belongs to the norm of this number: `residual1` is the sum, and `norm1` the result of the norm. In a
    layer with `norm_first`, a norm comes before the attention or the feed-forward network; otherwise, it comes after
    the sum. The last of the norms or sums is `output`.

    Shapes are in the layout of the layer: (T, N, E); (N, T, E) with `batch_first`; (T, E) without a batch. T is the
    number of tokens, E of features, and F of hidden features.

    The stages of a layer of bfloat16 or float16 are in float32, as it keeps them between its steps. `input` and
    `output` are in the dtype of the layer; in a decoder, so is the residual stream between self-attention and
    cross-attention. A layer with parts of other classes, or in which dropout is active, rounds every step: all its
    stages are in its dtype.

    Attributes
    ----------
    input : numpy.ndarray, (T, N, E)
        A copy of the input.
    norm1, norm2, norm3 : numpy.ndarray, (T, N, E)
        The results of the norms.
    self_attn, multihead_attn : Explanation
        The attention, stage by stage: its weights, for example.
    self_attn_update, multihead_attn_update : numpy.ndarray, (T, N, E)
        What the attention adds to the residual stream.
    residual1, residual2, residual3 : numpy.ndarray, (T, N, E)
        The sums.
    hidden : numpy.ndarray, (T, N, F)
        The hidden features before the activation; with a gated activation (T, N, 2 * F), the gates first.
    activated : numpy.ndarray, (T, N, F)
        The hidden features after the activation.
    feed_forward_update : numpy.ndarray, (T, N, E)
        What the feed-forward network adds to the residual stream.
    output : numpy.ndarray, (T, N, E)
        The output of the layer, bit for bit.
    stages : mapping of str to Stage
        All stages, in the order of the computation.
    attentions : mapping of str to Explanation
        "self_attn" and, in a decoder, "multihead_attn".
    residual_stream : mapping of str to numpy.ndarray
        The stages that the next step adds to: the input, what each step makes of it, and the output.
    letters : mapping of str to int
        The letters of the shapes, with their sizes in this call.
    batch_first : bool
        Whether the batch is the first axis.
    seen : numpy.ndarray of bool, (N, T)
        The tokens that are not padding; (T,) without a batch.
    warnings : tuple of str
        What looks wrong: NaN and infinity, and the warnings of the attention.
    notes : tuple of str
        Sentences about sizes, active features, tokens with a large norm, and what is multiplied. Padded tokens do
        not count.
    title : str
        The layer and the call, in one line.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> layer = mha_c.TransformerEncoderLayer(8, 2, 16, norm_first=True, seed=0).eval()
    >>> explanation = mha_c.explain(layer, np.ones((5, 8), np.float32))
    >>> list(explanation.stages)
    ['input', 'norm1', 'self_attn_update', 'residual1', 'norm2', 'hidden', 'activated', 'feed_forward_update', 'output']
    >>> explanation.self_attn.weights.shape, explanation.activated.shape
    ((2, 5, 5), (5, 16))
    """

    self_attn: Explanation
    multihead_attn: Explanation
    input: NDArray[Any]
    norm1: NDArray[Any]
    norm2: NDArray[Any]
    norm3: NDArray[Any]
    self_attn_update: NDArray[Any]
    multihead_attn_update: NDArray[Any]
    residual1: NDArray[Any]
    residual2: NDArray[Any]
    residual3: NDArray[Any]
    hidden: NDArray[Any]
    activated: NDArray[Any]
    feed_forward_update: NDArray[Any]
    output: NDArray[Any]

    def __init__(
        self,
        title: str,
        stages: Mapping[str, Stage],
        attentions: Mapping[str, Explanation],
        residual_stream: Mapping[str, NDArray[Any]],
        letters: Mapping[str, int],
        batch_first: bool,
        seen: NDArray[np.bool_],
        warnings: tuple[str, ...],
        notes: tuple[str, ...],
    ) -> None:
        self.title = title
        self.stages = dict(stages)
        self.attentions = dict(attentions)
        self.residual_stream = dict(residual_stream)
        self.letters = dict(letters)
        self.batch_first = batch_first
        self.seen = seen
        self.warnings = warnings
        self.notes = notes
        vars(self).update(self.attentions)
        vars(self).update({name: stage.array for name, stage in self.stages.items()})

    def table(self) -> Table:
        """Return a table of the stages with their axes and formulas; notes and warnings are below it.

        "mean norm" is the mean of the Euclidean norms of the rows of the tokens. Padded tokens do not count.

        Returns
        -------
        Table
            Text for a terminal when printed, HTML in a notebook.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> mha_c.explain(mha_c.TransformerEncoderLayer(8, 2, 16), np.ones((5, 8), np.float32)).table().header
        ('', 'axes', 'mean norm', '')
        """
        rows = [
            (
                stage.name,
                f"({', '.join(stage.axes)})",
                _mean(size_of_rows(self._seen_rows(stage.array))),
                stage.formula,
            )
            for stage in self.stages.values()
        ]
        where = ", ".join(f"{letter} = {size}" for letter, size in self.letters.items())
        notes = [where, *self.notes, *(f"Warning: {what}" for what in self.warnings)]
        return Table(self.title, ("", "axes", "mean norm", ""), rows, notes, text=(0, 1, 3))

    def _repr_html_(self) -> str:
        """HTML for a notebook: the stages, which can be unfolded, and the attention in them."""
        return render_layer(self)


class StackExplanation(_WithStream):
    """The residual stream of one call of an encoder or a decoder, as `explain` returns it.

    ``explanation[3]`` explains layer 3, with the input that it had in this call; ``len(explanation)`` is the number of
    layers. Printing it gives a table of the layers.

    Attributes
    ----------
    residual_stream : mapping of str to numpy.ndarray
        The input ("input"); the output of each layer ("layer 0", "layer 1", ...); and that of the norm at the end
        ("norm"), if there is one. Each has the shape of the input.
    output : numpy.ndarray
        The output of the stack, bit for bit.
    batch_first : bool
        Whether the batch is the first axis.
    seen : numpy.ndarray of bool, (N, T)
        The tokens that are not padding; (T,) without a batch.
    warnings : tuple of str
        What looks wrong: a class that computes something else, and the warnings of layer 0, whose masks are those of
        all layers.
    explain_layers : tuple of callable
        ``explanation[3]`` is ``explain_layers[3]()``.
    notes : tuple of str
        Sentences about tokens with a large norm. Padded tokens do not count.
    title : str
        The stack and the call, in one line.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> layer = mha_c.TransformerEncoderLayer(8, 2, 16, seed=0)
    >>> explanation = mha_c.explain(mha_c.TransformerEncoder(layer, 3).eval(), np.ones((5, 8), np.float32))
    >>> list(explanation.residual_stream), explanation.norms.shape
    (['input', 'layer 0', 'layer 1', 'layer 2'], (4, 5))
    >>> np.array_equal(explanation[1].output, explanation.residual_stream["layer 1"])
    True
    """

    def __init__(
        self,
        title: str,
        residual_stream: Mapping[str, NDArray[Any]],
        explain_layers: Sequence[Callable[[], LayerExplanation]],
        batch_first: bool,
        seen: NDArray[np.bool_],
        warnings: tuple[str, ...],
    ) -> None:
        self.title = title
        self.warnings = warnings
        self.residual_stream = dict(residual_stream)
        self.batch_first = batch_first
        self.explain_layers = tuple(explain_layers)
        self.seen = seen

    @property
    def output(self) -> NDArray[Any]:
        """The output of the stack."""
        return list(self.residual_stream.values())[-1]

    def __len__(self) -> int:
        return len(self.explain_layers)

    def __getitem__(self, index: int) -> LayerExplanation:
        count = len(self)
        if not -count <= operator.index(index) < count:
            raise IndexError(f"there is no layer {index}: there are {count}, counted from 0")
        return self.explain_layers[index]()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the stream."""
        if not self.seen.any():
            return ()
        row = len(self)  # the last layer; the norm at the end would make the norms of all rows equal
        return (tokens_with_largest_norm(list(self.residual_stream)[row], self.norms[..., row, :], self.seen),)

    def table(self) -> Table:
        """Return a table of the layers, with the norms of the rows that they return.

        The last column compares what a layer changes with its input: the mean norm of the differences, divided by the
        mean norm of the rows of the input. Padded tokens do not count.

        Returns
        -------
        Table
            Text for a terminal when printed, HTML in a notebook.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> encoder = mha_c.TransformerEncoder(mha_c.TransformerEncoderLayer(8, 2, 16), 3)
        >>> mha_c.explain(encoder, np.ones((5, 8), np.float32)).table().header
        ('', 'mean norm', 'largest norm', 'change')
        """
        rows = []
        before: NDArray[Any] | None = None
        for name, array in self.residual_stream.items():
            seen = self._seen_rows(array).astype(np.float64)
            norms = size_of_rows(seen)
            change = "" if before is None else _ratio(size_of_rows(seen - before), size_of_rows(before))
            rows.append((name, _mean(norms), f"{norms.max(initial=0):.3g}", change))
            before = seen
        notes = [*self.notes, *(f"Warning: {what}" for what in self.warnings)]
        return Table(self.title, ("", "mean norm", "largest norm", "change"), rows, notes)

    def _repr_html_(self) -> str:
        """HTML for a notebook: the table."""
        return self.table()._repr_html_()
