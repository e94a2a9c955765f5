# SPDX-License-Identifier: Apache-2.0
"""Pictures of attention and of the residual stream with matplotlib: axes in, axes out.

Every function of attention takes the result of `mha_c.explain`, or arrays of the shapes that `mha_c.heads.heads_of`
takes. It draws into the axes that it is given, or into a new figure, and returns the axes. An array of three dimensions
needs `averaged`.

Blue is above 0 and orange is below 0, as in what `mha_c.explain` shows in a notebook; colour-blind readers can tell the
two apart. The colours follow the background: ``with matplotlib.pyplot.style.context("dark_background")`` gives dark
pictures. The colour of a weight follows its square root: one key often has most of the weight, and on a linear scale
the others would all look like 0. If there are more queries or keys than can be seen, neighbours share a cell: the
weights of its keys are added and those of its queries averaged, so that a row still sums to 1. The title gives the size
of a cell.

The label of the axes, ``ax.get_label()``, describes in words what they show. In a notebook, the description is the
alternative text of the picture, for screen readers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha_c import heads as _heads
from mha_c.display.cells import NEGATIVE, POSITIVE, bins
from mha_c.explanation import Explanation, LayerExplanation, StackExplanation
from mha_c.heads import Matrices, item_of

try:
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, PowerNorm, to_rgb, to_rgba
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError("mha_c.plot needs matplotlib, which is not installed: `pip install 'mha-c[plot]'`") from error

__all__ = ["average", "distance", "entropy", "heads", "masking", "residual_stream", "token", "weights"]


def __dir__() -> list[str]:
    return sorted(__all__)


_SMALLEST_CELL: Final = 2.0  # points: about 3 pixels on a common screen
_SMALLEST_FONT, _LARGEST_FONT = 7.0, 10.0  # points
_LONGEST_WORD: Final = 16  # characters of a token that are shown
_MOST_WORDS: Final = 15  # where there is no room for all of them
_FAINTEST: Final = 0.01  # of the strongest weight: less is not drawn as a line
_UNDERFLOW: Final = -104.0  # exp of less is 0 in float32
_WEIGHT: Final = "weight, on a square-root scale\nthat shows small weights, too"
_NORM: Final = "norm of the row, on a square-root scale\nthat shows small norms, too"

_Words = Sequence[str] | None


def weights(
    weights: Any,
    head: int | None = None,
    *,
    item: int = 0,
    averaged: bool | None = None,
    layer: int | str | None = None,
    tokens: _Words = None,
    key_tokens: _Words = None,
    vmax: float | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the attention weights of one head, or of an average: a row for each query, a column for each key.

    Parameters
    ----------
    weights : array_like or Explanation
        (N, H, L, S), (H, L, S), (N, L, S) or (L, S).
    head : int, optional
        The number of the head; the first one unless given. Averaged weights and (L, S) have no heads.
    item : int, default 0
        The batch item.
    averaged : bool, optional
        Must be given for an array of three dimensions: True for (N, L, S), averaged over the heads, as the layer
        returns it by default; False for (H, L, S). For (L, S), True says that it is an average.
    layer : int or str, optional
        The number or the name of the layer, for the title.
    tokens : sequence of str, optional
        The labels of the L queries, and of the keys too if L = S.
    key_tokens : sequence of str, optional
        The labels of the S keys, if they differ.
    vmax : float, optional
        The weight with the strongest colour; the largest weight unless given.
    colorbar : bool, default True
        Whether to draw the colour scale beside the axes.
    ax : matplotlib.axes.Axes, optional
        The axes to draw into; a new figure unless given.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    TypeError
        As for `mha_c.heads.heads_of`.
    ValueError
        If the head does not exist; if the number of tokens is not that of the queries or keys; or as for
        `mha_c.heads.heads_of`.
    IndexError
        If the batch does not have this item.

    Examples
    --------
    >>> import mha_c
    >>> layer, x = mha_c.MultiheadAttention(8, 4, seed=0).eval(), np.ones((3, 1, 8), np.float32)
    >>> _, w = layer(x, x, x, average_attn_weights=False)
    >>> mha_c.plot.weights(w, head=2, layer=5, tokens=["one", "two", "three"]).get_title()
    'Attention weights, layer 5, head 2'
    >>> _, w = layer(x, x, x)
    >>> mha_c.plot.weights(w, averaged=True).get_title()
    'Attention weights, average of the heads'
    """
    matrix, whose = _one_head(Matrices.of(weights, item, averaged), head)
    title = _title("Attention weights", layer, whose)
    return _draw_weights(matrix, title, _Labels.of(matrix.shape, tokens, key_tokens), vmax, colorbar, ax)


def average(
    weights: Any,
    *,
    item: int = 0,
    averaged: bool | None = None,
    layer: int | str | None = None,
    tokens: _Words = None,
    key_tokens: _Words = None,
    vmax: float | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the attention weights averaged over the heads, as the layer returns them by default.

    Parameters
    ----------
    weights, item, averaged, layer, tokens, key_tokens, vmax, colorbar, ax
        As for `weights`.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `weights`.

    Examples
    --------
    >>> average(np.full((1, 4, 2, 2), 0.5)).get_title()
    'Attention weights, average of 4 heads'
    """
    matrix, whose = _average(Matrices.of(weights, item, averaged))
    title = _title("Attention weights", layer, whose)
    return _draw_weights(matrix, title, _Labels.of(matrix.shape, tokens, key_tokens), vmax, colorbar, ax)


def heads(
    weights: Any,
    *,
    item: int = 0,
    averaged: bool | None = None,
    layer: int | str | None = None,
    tokens: _Words = None,
    key_tokens: _Words = None,
    vmax: float | None = None,
    colorbar: bool = True,
    axes: Sequence[Axes] | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Draw the attention weights of every head, side by side with one colour scale.

    Parameters
    ----------
    weights, item, averaged, layer, tokens, key_tokens, vmax, colorbar
        As for `weights`. The weights must be those of each head.
    axes : array_like of matplotlib.axes.Axes, optional
        At least H axes, in any shape; a new figure unless given.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes, (H,)

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `weights`; if the weights are averaged, or (L, S); and if there are fewer axes than heads.

    Examples
    --------
    >>> [ax.get_title() for ax in heads(np.full((1, 2, 5, 5), 0.2))]
    ['head 0', 'head 1']
    """
    chosen = Matrices.of(weights, item, averaged).of_each_head()
    count = len(chosen.heads)
    labels = _Labels.of(chosen.array.shape[1:], tokens, key_tokens)
    if axes is None:
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        panel = min(2.6, max(1.3, 9.5 / columns))
        _, grid = pyplot.subplots(
            rows,
            columns,
            figsize=(columns * panel + 0.8, rows * panel + 0.3),
            squeeze=False,
            sharex=True,
            sharey=True,
            layout="compressed",
        )
        for spare in grid.flat[count:]:
            spare.set_visible(False)
        axes = grid
    panels: NDArray[Any] = np.array(axes, dtype=object).ravel()[:count]
    if len(panels) < count:
        raise ValueError(f"{count} heads need {count} axes, but got {len(panels)}")
    vmax = _largest(chosen.array) if vmax is None else vmax
    for head, ax, matrix in zip(chosen.heads, panels, chosen.array):
        cells = _bin(ax, matrix, weights=True)
        image = _heat_map(ax, cells, _sequential(ax), PowerNorm(0.5, 0, vmax))
        _label(ax, labels)
        title = _title("", layer, f"head {head}")
        ax.set_title(f"{title}{cells.note}", fontsize="small")
        _describe(ax, f"{title}: the largest weight is {_largest_weights(matrix, labels, 1)}.")
    _label_outer(panels)
    if colorbar:
        _colorbar(image, panels, cells.meaning(_WEIGHT))
    return panels


def entropy(
    weights: Any,
    *,
    item: int = 0,
    averaged: bool | None = None,
    layer: int | str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how widely each head attends: the mean entropy of its queries' weights, in bits.

    Parameters
    ----------
    weights : array_like, Explanation, or list of these
        The weights of each head, as for `weights`. A list has one entry for each layer, and gives a table of layers and
        heads.
    item : int, default 0
        The batch item.
    averaged : bool, optional
        False for arrays (H, L, S).
    layer : int or str, optional
        The number or the name of the layer, for the title.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `heads`.

    See Also
    --------
    mha_c.heads.entropy : the numbers.

    Examples
    --------
    >>> entropy(np.full((1, 2, 4, 4), 0.25)).get_ylabel()
    'entropy in bits'
    """
    chosen = [Matrices.of(each, item, averaged).of_each_head() for each in _layers(weights)]
    title = _title("How widely each head looks", layer)
    ax = _draw_statistic(chosen, _heads.entropy_by_query, "entropy in bits", title, ax)
    if len(chosen) == 1:
        most = math.log2(chosen[0].array.shape[-1])
        ax.axhline(most, color=_ink(ax), linewidth=0.8, linestyle="--")
        ax.annotate(
            "equal weights",
            (1, most),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=_ink(ax),
            fontsize="small",
        )
        ax.set_ylim(0, 1.2 * most if most else None)
    return ax


def distance(
    weights: Any,
    *,
    item: int = 0,
    averaged: bool | None = None,
    layer: int | str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how far each head attends: the mean distance from its queries to the keys, by weight, in tokens.

    Parameters
    ----------
    weights, item, averaged, layer, ax
        As for `entropy`. It must be self-attention: L = S.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `heads`, and if L is not S.

    See Also
    --------
    mha_c.heads.distance : the numbers.

    Examples
    --------
    >>> distance(np.full((1, 2, 4, 4), 0.25)).get_ylabel()
    'distance in tokens'
    """
    chosen = [Matrices.of(each, item, averaged).of_each_head() for each in _layers(weights)]
    title = _title("How far each head looks", layer)
    ax = _draw_statistic(chosen, _heads.distance_by_query, "distance in tokens", title, ax)
    if len(chosen) == 1:
        ax.set_ylim(0, None)
    return ax


def token(
    weights: Any,
    token: int | str,
    head: int | None = None,
    *,
    item: int = 0,
    averaged: bool | None = None,
    layer: int | str | None = None,
    tokens: _Words = None,
    key_tokens: _Words = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what one token attends to: lines from its word to the words of the keys, thicker for larger weights.

    Keys with more than half of the largest weight are bold and labelled with their weights.

    Parameters
    ----------
    weights
        As for `weights`.
    token : int or str
        The query: its position, or its word if that occurs once in `tokens`.
    head : int, optional
        The number of the head; the average of all heads unless given.
    item, averaged, layer, tokens, key_tokens, ax
        As for `weights`. If there is no room for every word, only the strongest keys are labelled.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError, IndexError
        As for `weights`; and if the token does not exist, or if its word occurs more than once.
    TypeError
        As for `weights`; and if `token` is a word and `tokens` are not given.

    Examples
    --------
    >>> ax = token(np.full((1, 2, 3, 3), 1 / 3), "kitten", tokens=["a", "kitten", "sleeps"])
    >>> ax.get_title()
    'Where "kitten" (1) looks, average of 2 heads'
    """
    chosen = Matrices.of(weights, item, averaged)
    matrix, whose = _average(chosen) if head is None else _one_head(chosen, head)
    length, source_length = matrix.shape
    labels = _Labels.of(matrix.shape, tokens, key_tokens)
    query = labels.queries.find(token)
    if ax is None:
        _, ax = pyplot.subplots(figsize=(min(9.0, 4.0 + 0.25 * max(length, source_length)), 4.0), layout="constrained")
    assert ax is not None
    ax.set(xlim=(-0.8, max(length, source_length) - 0.2), ylim=(0, 1))
    ax.axis("off")

    row = np.nan_to_num(matrix[query])
    strengths = row / _largest(row)
    top, shown_queries = _row_of_words(ax, labels.queries.words, (np.arange(length) == query).astype(float))
    bottom, shown_keys = _row_of_words(ax, labels.keys.words, strengths, row)
    line_color = _accent(ax)
    for key in np.argsort(strengths):
        if strengths[key] > _FAINTEST:
            width, alpha = 0.6 + 4 * strengths[key], 0.35 + 0.65 * np.sqrt(strengths[key])
            ax.plot([query, key], [top, bottom], color=line_color, linewidth=width, alpha=alpha)
    note = "" if row.any() else "\n(it sees no key)"
    if shown_queries < length or shown_keys < source_length:
        note += f"\n(words: {shown_queries} of {length} queries, the {shown_keys} strongest of {source_length} keys)"
    title = _title(f"Where {labels.queries.name(query)} looks", layer, whose)
    ax.set_title(f"{title}{note}", pad=12, color=_ink(ax))
    strongest = (f"{labels.keys.name(key)} {row[key]:.2f}" for key in np.argsort(-row, kind="stable")[:5] if row[key])
    _describe(ax, f"{title}: {', '.join(strongest) or 'it sees no key'}.")
    return ax


def masking(
    scores: Any,
    masked_scores: Any = None,
    head: int | None = None,
    *,
    item: int = 0,
    layer: int | str | None = None,
    tokens: _Words = None,
    key_tokens: _Words = None,
    colorbar: bool = True,
    axes: Sequence[Axes] | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Draw the scores of one head before and after the masks: blue above 0, orange below 0, hatched if hidden.

    Parameters
    ----------
    scores : array_like or Explanation
        (N, H, L, S), (H, L, S) or (L, S). An explanation already holds `masked_scores`.
    masked_scores : array_like, optional
        The scores with the masks applied: -inf if a key is hidden, or so low that its weight rounds to 0.
    head, item, layer, tokens, key_tokens, colorbar
        As for `weights`.
    axes : array_like of matplotlib.axes.Axes, optional
        Two axes; a new figure unless given.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes, (2,)

    Raises
    ------
    TypeError
        As for `weights`, and if `masked_scores` are missing.
    ValueError, IndexError
        As for `weights`, and if `axes` are not two.

    Examples
    --------
    >>> scores = np.zeros((3, 3))
    >>> before, after = masking(scores, np.where(np.tri(3) == 0, -np.inf, scores))
    >>> after.get_title()
    'Scores after masks\\n(hatched: hidden)'
    """
    if masked_scores is None:
        if not isinstance(scores, Explanation):
            raise TypeError("masking() needs the scores before and after the masks, or an Explanation")
        masked_scores = scores
    stages = (("scores", scores), ("masked_scores", masked_scores))
    (before, whose), (after, _) = (_one_head(Matrices.of(given, item, False, name), head) for name, given in stages)
    labels = _Labels.of(before.shape, tokens, key_tokens)
    if axes is None:
        width, height = _figure_size(before.shape, largest=4.6)
        _, axes = pyplot.subplots(1, 2, figsize=(2 * width - 1.8, height + 0.6), layout="compressed", sharey=True)
    chosen: NDArray[Any] = np.array(axes, dtype=object).ravel()
    if len(chosen) != 2:
        raise ValueError(f"masking() draws into two axes, but got {len(chosen)}")
    top = after.max(axis=-1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        visible = np.where(after - top > _UNDERFLOW, after, np.nan)
    cells = [_bin(ax, matrix, weights=False) for ax, matrix in zip(chosen, (before, visible))]
    largest = max(_largest(np.abs(each.array)) for each in cells)
    for ax, each, name, note in zip(chosen, cells, ("before masks", "after masks"), ("", "\n(hatched: hidden)")):
        image = _heat_map(ax, each, _diverging(ax), Normalize(-largest, largest))
        _label(ax, labels)
        title = _title(f"Scores {name}", layer, whose)
        ax.set_title(f"{title}{each.note}{note}", fontsize="medium")
        hidden = f"; {np.isnan(visible).sum():,} of {visible.size:,} pairs are hidden" if note else ""
        _describe(ax, f"{title}, {labels.sizes}{hidden}.")
    _label_outer(chosen)
    if colorbar:
        _colorbar(image, chosen, cells[0].meaning("score"))
    return chosen


def residual_stream(
    explanation: StackExplanation | LayerExplanation,
    *,
    item: int = 0,
    layer: int | str | None = None,
    tokens: _Words = None,
    vmax: float | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the norm of each token's row in the residual stream: a row for each layer or step, a column for each token.

    Parameters
    ----------
    explanation : StackExplanation or LayerExplanation
        What `mha_c.explain` returns for an encoder or a decoder, or for one of their layers.
    item : int, default 0
        The batch item.
    layer : int or str, optional
        The number or the name of the layer, for the title.
    tokens : sequence of str, optional
        The labels of the tokens.
    vmax : float, optional
        The norm with the strongest colour; the largest norm unless given.
    colorbar : bool, default True
        Whether to draw the colour scale beside the axes.
    ax : matplotlib.axes.Axes, optional
        The axes to draw into; a new figure unless given.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    TypeError
        If `explanation` is something else.
    ValueError
        If the number of labels is not that of the tokens.
    IndexError
        If the batch does not have this item.

    Examples
    --------
    >>> import mha_c
    >>> encoder = mha_c.TransformerEncoder(mha_c.TransformerEncoderLayer(8, 2, 16, seed=0), 3).eval()
    >>> explanation = mha_c.explain(encoder, np.eye(5, 8, dtype=np.float32))
    >>> ax = mha_c.plot.residual_stream(explanation)
    >>> ax.get_title(), ax.get_xlabel()
    ('Residual stream', 'token (position)')
    """
    if not isinstance(explanation, (StackExplanation, LayerExplanation)):
        raise TypeError(
            "residual_stream() draws what mha_c.explain returns for an encoder, a decoder or a layer of these, but got "
            f"{type(explanation).__name__}"
        )
    norms = explanation.norms
    matrix = item_of(norms, item, has_batch=norms.ndim == 3)
    title = _title("Residual stream", layer)
    rows = _Names("step", list(explanation.residual_stream), True)
    labels = _Labels(rows, _Names.of("token", "positions", matrix.shape[1], tokens))
    ax = _draw_matrix(matrix, title, labels, vmax, colorbar, ax, weights=False)
    ax.set_aspect("auto")
    by_row = ", ".join(
        f"{name}: {row.min(initial=np.inf):.3g} to {row.max(initial=0):.3g}" for name, row in zip(rows.words, matrix)
    )
    _describe(ax, f"{title}. Norms of the rows of {matrix.shape[1]} tokens, {by_row}.")
    return ax


class _Cells(NamedTuple):
    """A matrix as it is drawn: `size` queries and keys to a cell."""

    array: NDArray[Any]
    size: tuple[int, int]
    how: str

    @property
    def note(self) -> str:
        """What a title has to say about the cells."""
        return "" if self.size == (1, 1) else ", bins of {} × {}".format(*self.size)

    def meaning(self, number: str) -> str:
        """What a cell's colour means."""
        return number if self.size == (1, 1) else f"{number} ({self.how})"


def _bin(ax: Axes, matrix: NDArray[Any], *, weights: bool) -> _Cells:
    """The cells to draw: enough neighbours share a cell for it to be visible."""
    width, height = _pitch(ax, matrix.shape)
    size = (_bin_size(height), _bin_size(width))
    how = "keys added, queries averaged" if weights else "averaged"
    return _Cells(bins(matrix, size, add_columns=weights), size, how)


def _bin_size(pitch: float) -> int:
    """How many queries or keys of `pitch` points make a visible cell: 1, 2, 5, 10, 20, 50 ..."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power * pitch >= _SMALLEST_CELL:
                return step * power
        power *= 10


class _Names(NamedTuple):
    """What queries, keys, tokens or layers are called: their words if these are given, else their positions."""

    kind: str
    words: list[str]
    are_given: bool

    @classmethod
    def of(cls, kind: str, kinds: str, count: int, given: _Words) -> _Names:
        """The names of `count` of a kind."""
        if given is not None and len(given) != count:
            raise ValueError(f"there are {count} {kinds}, but {len(given)} tokens")
        words = [str(position) for position in range(count)] if given is None else list(given)
        return cls(kind, words, given is not None)

    def name(self, position: int) -> str:
        """How a sentence calls one of them."""
        return f'"{_shorten(self.words[position])}" ({position})' if self.are_given else f"{self.kind} {position}"

    def find(self, token: int | str) -> int:
        """The position of a token, given as a position or as a word."""
        count = len(self.words)
        if not isinstance(token, str):
            if not -count <= operator.index(token) < count:
                raise IndexError(f"there is no {self.kind} {token}: there are {count}, counted from 0")
            return range(count)[token]
        if not self.are_given:
            raise TypeError(f"token={token!r} is a word, but tokens= is missing: pass tokens=, or a position")
        positions = [position for position, word in enumerate(self.words) if word == token]
        if not positions:
            raise ValueError(f"{token!r} is not one of the words: {' '.join(self.words)}")
        if len(positions) > 1:
            raise ValueError(f"{token!r} is the word at positions {', '.join(map(str, positions))}: pass one of these")
        return positions[0]


class _Labels(NamedTuple):
    """What the rows and the columns of a matrix are called."""

    queries: _Names
    keys: _Names

    @classmethod
    def of(cls, shape: tuple[int, ...], tokens: _Words, key_tokens: _Words) -> _Labels:
        """Those for a matrix (L, S); the keys have the queries' words if L = S and no others are given."""
        length, source_length = shape
        key_tokens = tokens if key_tokens is None and length == source_length else key_tokens
        return cls(_Names.of("query", "queries", length, tokens), _Names.of("key", "keys", source_length, key_tokens))

    @property
    def sizes(self) -> str:
        """How many there are."""
        return f"{len(self.queries.words)} queries by {len(self.keys.words)} keys"


def _pitch(ax: Axes, shape: tuple[int, ...]) -> tuple[float, float]:
    """Width and height of a key's and a query's share of the axes, in points."""
    box = ax.get_window_extent()
    points = 72 / ax.figure.dpi
    width, height = points * box.width / max(shape[1], 1), points * box.height / max(shape[0], 1)
    return (min(width, height),) * 2 if shape[0] == shape[1] else (width, height)


def _figure_size(shape: tuple[int, ...], largest: float = 6.5) -> tuple[float, float]:
    """Inches for one heat map: room for every word of up to some 30."""
    height, width = (min(largest, max(2.6, 0.22 * count)) for count in shape)
    return width + 1.8, height + 1.0


def _draw_weights(
    matrix: NDArray[Any], title: str, labels: _Labels, vmax: float | None, colorbar: bool, ax: Axes | None
) -> Axes:
    ax = _draw_matrix(matrix, title, labels, vmax, colorbar, ax, weights=True)
    largest = _largest_weights(matrix, labels, 20)
    _describe(ax, f"{title}, {labels.sizes}. The largest weights of its queries: {largest}.")
    return ax


def _draw_matrix(
    matrix: NDArray[Any],
    title: str,
    labels: _Labels,
    vmax: float | None,
    colorbar: bool,
    ax: Axes | None,
    weights: bool,
) -> Axes:
    """Draw weights or norms, which are not negative, on a square-root scale."""
    if ax is None:
        _, ax = pyplot.subplots(figsize=_figure_size(matrix.shape), layout="compressed")
    assert ax is not None
    cells = _bin(ax, matrix, weights=weights)
    image = _heat_map(ax, cells, _sequential(ax), PowerNorm(0.5, 0, _largest(cells.array) if vmax is None else vmax))
    _label(ax, labels)
    ax.set_title(f"{title}{cells.note}", fontsize="medium")
    if colorbar:
        _colorbar(image, [ax], cells.meaning(_WEIGHT if weights else _NORM))
    return ax


def _heat_map(ax: Axes, cells: _Cells, colors: Colormap, norm: Normalize) -> Any:
    """The cells in the coordinates of tokens; NaN shows the axes' own background, hatched."""
    rows, columns = cells.array.shape
    bottom, right = rows * cells.size[0] - 0.5, columns * cells.size[1] - 0.5
    image = ax.imshow(
        np.ma.masked_invalid(cells.array),
        cmap=colors.with_extremes(bad=(0, 0, 0, 0)),
        norm=norm,
        extent=(-0.5, right, bottom, -0.5),
        interpolation="nearest",
        aspect="equal" if rows == columns else "auto",
    )
    ax.patch.set(hatch="////", edgecolor=(0.5, 0.5, 0.5, 0.6), linewidth=0)
    width, height = _pitch(ax, cells.array.shape)
    if cells.size == (1, 1) and width >= 24 and height >= 12:
        for (row, column), number in np.ndenumerate(cells.array):
            if np.isfinite(number):
                ink = "white" if _is_dark(image.cmap(norm(number))) else "black"
                said = f"{number:.{2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0}f}"
                font = min(9.0, width / (0.7 * len(said)))
                ax.text(column, row, said, ha="center", va="center", color=ink, fontsize=font)
    return image


def _draw_statistic(
    layers: Sequence[Matrices],
    measure: Callable[[NDArray[Any]], NDArray[Any]],
    name: str,
    title: str,
    ax: Axes | None,
) -> Axes:
    """Of one layer, the mean and the spread of each head's numbers (H, L); of several, a table of means."""
    summaries = [_summary(measure(layer.array)) for layer in layers]
    count = 1 + max(head for layer in layers for head in layer.heads)
    if ax is None:
        height = 3.0 if len(layers) == 1 else 1.4 + 0.34 * len(layers)
        _, ax = pyplot.subplots(figsize=(min(9.0, 2.4 + 0.42 * count), height), layout="constrained")
    assert ax is not None
    ax.set_title(title, fontsize="medium", color=_ink(ax))
    ax.set_xlabel("head")
    ax.xaxis.set_major_locator(MaxNLocator(min(count, 16), integer=True, steps=(1, 2, 5, 10)))
    if len(layers) > 1:
        means = np.full((len(layers), count), np.nan)
        for number, (layer, (_, mean, _)) in enumerate(zip(layers, summaries)):
            means[number, list(layer.heads)] = mean
        image = _heat_map(ax, _Cells(means, (1, 1), ""), _sequential(ax), Normalize(0, _largest(means)))
        ax.set_aspect("auto")
        ax.set_ylabel("layer")
        ax.yaxis.set_major_locator(MaxNLocator(min(len(layers), 16), integer=True, steps=(1, 2, 5, 10)))
        _colorbar(image, [ax], f"mean {name}")
        ranges = (f"{mean.min():.2f} to {mean.max():.2f}" for _, mean, _ in summaries)
        by_layer = (f"layer {number}: {values}" for number, values in enumerate(ranges))
        _describe(ax, f"{title}. Mean {name} of its heads, {', '.join(by_layer)}.")
        return ax
    (heads,) = (layer.heads for layer in layers)
    lower, mean, upper = summaries[0]
    ax.vlines(heads, lower, upper, color=_accent(ax), linewidth=5, alpha=0.4, label="middle half of the queries")
    ax.plot(heads, mean, "o", color=_accent(ax), label="mean")
    ax.set_ylabel(name)
    ax.set_xlim(-0.6, count - 0.4)
    by_head = (f"head {head}: {number:.2f}" for head, number in zip(heads, mean))
    _describe(ax, f"{title}. Mean {name}, {', '.join(by_head)}.")
    return ax


def _summary(by_query: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """First quartile, mean and third quartile of each head's queries, of those that see a key."""
    known = [row[~np.isnan(row)] for row in by_query]
    numbers = [(*np.quantile(row, (0.25, 0.75)), row.mean()) if row.size else (np.nan,) * 3 for row in known]
    lower, upper, mean = np.array(numbers).reshape(-1, 3).T
    return lower, mean, upper


def _one_head(chosen: Matrices, head: int | None) -> tuple[NDArray[Any], str]:
    """The matrix of a head, the first unless given, and whose it is; or the only matrix."""
    if not chosen.heads and head is None:
        return _average(chosen)
    if head is None:
        head = chosen.heads[0]
    if head not in chosen.heads:
        heads = f"the heads are {list(chosen.heads)}" if chosen.heads else "this is one matrix, without heads"
        raise ValueError(f"there is no head {head}: {heads}")
    matrix: NDArray[Any] = chosen.array[chosen.heads.index(head)]
    return matrix, f"head {head}"


def _average(chosen: Matrices) -> tuple[NDArray[Any], str]:
    average: NDArray[Any] = chosen.array.mean(axis=0)
    return average, chosen.average_name


def _title(what: str, layer: int | str | None, whose: str = "") -> str:
    """The parts of a title that are not empty."""
    return ", ".join(filter(None, (what, "" if layer is None else f"layer {layer}", whose)))


def _layers(weights: Any) -> list[Any]:
    return list(weights) if isinstance(weights, (list, tuple)) else [weights]


def _largest(array: NDArray[Any]) -> float:
    """The largest finite number, or 1 where there is nothing above 0: the end of a scale of colours."""
    return float(np.max(array, where=np.isfinite(array), initial=0.0)) or 1.0


def _largest_weights(matrix: NDArray[Any], labels: _Labels, count: int) -> str:
    """The largest weight of each query in words; of the `count` queries that have the largest, if there are more."""
    matrix = np.nan_to_num(matrix)
    largest = matrix.max(axis=1, initial=0)
    said = []
    for query in sorted(np.argsort(-largest, kind="stable")[:count]):
        if largest[query] > 0:
            key = int(matrix[query].argmax())
            said.append(f"from {labels.queries.name(query)} to {labels.keys.name(key)} {largest[query]:.2f}")
    return ", ".join(said) or "none"


def _describe(ax: Axes, words: str) -> None:
    """Make words the label of the axes, and in a notebook a part of the figure's alternative text."""
    ax.set_label(words)
    figure = ax.get_figure(root=True)
    assert figure is not None
    setattr(figure, "_repr_mimebundle_", partial(_alternative_text, figure))


def _alternative_text(figure: Figure, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The data and metadata that IPython adds to a displayed object: here, the alternative text of its picture."""
    words = [str(ax.get_label()) for ax in figure.axes if ax.get_label() not in ("", "<colorbar>")]
    return {}, {"image/png": {"alt": " ".join(words)}}


def _label(ax: Axes, labels: _Labels) -> None:
    """Words along both axes if they are readable there, else positions."""
    shape = (len(labels.queries.words), len(labels.keys.words))
    ax.set_xlim(-0.5, shape[1] - 0.5)
    ax.set_ylim(shape[0] - 0.5, -0.5)
    for axis, names, pitch in zip((ax.xaxis, ax.yaxis), (labels.keys, labels.queries), _pitch(ax, shape)):
        font = min(_LARGEST_FONT, 0.8 * pitch)
        if names.are_given and font >= _SMALLEST_FONT:
            shown = [_shorten(word) for word in names.words]
            turned = axis is ax.xaxis and font * 0.6 * max(map(len, shown), default=0) > pitch
            axis.set_ticks(range(len(shown)), shown, fontsize=font, rotation=90 if turned else 0, parse_math=False)
            axis.set_label_text(names.kind)
        else:
            axis.set_major_locator(
                MaxNLocator(int(max(1, min(10, pitch * len(names.words) / 20))), integer=True, steps=(1, 2, 5, 10))
            )
            axis.set_label_text(f"{names.kind} (position)")


def _label_outer(axes: NDArray[Any]) -> None:
    """Remove the labels between the axes of one grid."""
    if all(ax.get_subplotspec() is not None for ax in axes):
        for ax in axes:
            ax.label_outer()


def _row_of_words(
    ax: Axes, words: list[str], strengths: NDArray[Any], numbers: NDArray[Any] | None = None
) -> tuple[float, int]:
    """Words along the lower edge with their `numbers`, or along the upper one without.

    If there is no room for all words, the strongest are shown. Returns where lines end, and how many words are shown.
    """
    box = ax.get_window_extent()
    points = 72 / ax.figure.dpi
    room = points * box.width / float(np.diff(ax.get_xlim())[0])  # for a word
    font = min(_LARGEST_FONT, 0.8 * room)
    shown = [_shorten(word) for word in words]
    chosen = list(range(len(words)))
    everything = font >= _SMALLEST_FONT
    if not everything:
        font, chosen = 8.0, []
        for number in np.argsort(-strengths):
            apart = all(abs(number - other) * room > 1.4 * font for other in chosen)
            if strengths[number] > _FAINTEST and apart and len(chosen) < _MOST_WORDS:
                chosen.append(int(number))
        shown = [word if word == str(number) else f"{word} ({number})" for number, word in enumerate(shown)]
    turned = 0.65 * font * max((len(shown[number]) for number in chosen), default=0) > room
    if numbers is not None:
        for number in np.flatnonzero(strengths > 0.5):
            shown[number] += f"{'  ' if turned else chr(10)}{numbers[number]:.2f}"
    longest = 0.65 * font * max((len(shown[number]) for number in chosen), default=0)
    lines = 1 if numbers is None else 2.4
    edge = min(0.4, ((longest if turned else font * lines) + 6) / (points * box.height))
    end, gap = (1 - edge, 0.01) if numbers is None else (edge, -0.01)
    for number in chosen:
        ax.text(
            number,
            end + gap,
            shown[number],
            rotation=90 if turned else 0,
            ha="center",
            va="bottom" if numbers is None else "top",
            fontsize=font,
            fontweight="bold" if strengths[number] > 0.5 else "normal",
            alpha=0.7 + 0.3 * min(1.0, 4 * float(strengths[number])) if everything else 1,
            color=_ink(ax),
            parse_math=False,
        )
    if not everything:
        ax.plot([0, len(words) - 1], [end, end], color=_ink(ax), linewidth=0.8, alpha=0.5)
    return end, len(chosen)


def _shorten(word: str) -> str:
    return word if len(word) <= _LONGEST_WORD else f"{word[: _LONGEST_WORD - 1]}…"


def _colorbar(image: Any, axes: Sequence[Axes] | NDArray[Any], meaning: str) -> None:
    """A colour scale beside the axes, in the colour of their text: the current style may differ from theirs."""
    ink = _ink(axes[0])
    figure = axes[0].figure
    assert isinstance(figure, Figure)
    scale = figure.colorbar(image, ax=list(axes), fraction=0.05, pad=0.02)
    scale.set_label(meaning, color=ink)
    scale.ax.tick_params(colors=ink)
    scale.outline.set_visible(False)


def _is_dark(color: Any) -> bool:
    """Whether white stands out against a colour more than black does (WCAG 2, contrast ratio)."""
    encoded = np.array(to_rgb(color))
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722)) < 0.179


def _on_dark(ax: Axes) -> bool:
    """Whether the background is dark. If it is transparent, the colour of text decides."""
    for color in (ax.get_facecolor(), ax.figure.get_facecolor()):
        if to_rgba(color)[3] > 0:
            return _is_dark(color)
    return not _is_dark(matplotlib.rcParams["text.color"])


def _ink(ax: Axes) -> str:
    return "#f0f0f0" if _on_dark(ax) else "#1a1a1a"


def _accent(ax: Axes) -> str:
    """Blues of Okabe and Ito's palette."""
    return "#56b4e9" if _on_dark(ax) else "#0072b2"


def _sequential(ax: Axes) -> Colormap:
    """One hue, from the lightness of the background away from it, so that lightness alone carries the value."""
    return matplotlib.colormaps["Blues_r" if _on_dark(ax) else "Blues"]


def _diverging(ax: Axes) -> Colormap:
    """Orange below 0, blue above, and the background's lightness at 0."""
    ink, paper = (np.ones(3), np.full(3, 0.08)) if _on_dark(ax) else (np.zeros(3), np.ones(3))
    negative, positive = np.divide(NEGATIVE, 255), np.divide(POSITIVE, 255)
    ends = [0.5 * (color + ink) for color in (negative, positive)]
    return LinearSegmentedColormap.from_list("scores", [ends[0], negative, paper, positive, ends[1]])
