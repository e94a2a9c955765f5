# SPDX-License-Identifier: Apache-2.0
"""Pictures of attention, by matplotlib: axes in, axes out.

Every function takes plain arrays, (N, H, L, S), (H, L, S) or (L, S), or what `mha_c.explain` returns; draws into the
axes that it is given, or into a new figure; and returns the axes. Colours are those that colour-blind readers can tell
apart, and follow the background: ``with matplotlib.pyplot.style.context("dark_background")`` gives dark pictures. Those
of weights follow the square root of the weight, because one key often has most of it. Where there are more queries or
keys than can be seen, neighbours share a cell: their keys' weights are added and their queries averaged, so that a row
still adds up to 1, and the title says how many share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha_c import heads as _heads
from mha_c.explanation import Explanation

try:
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize, PowerNorm, to_rgb, to_rgba
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError("mha_c.plot needs matplotlib, which is not installed: `pip install 'mha-c[plot]'`") from error

__all__ = ["average", "distance", "entropy", "heads", "masking", "token", "weights"]


def __dir__() -> list[str]:
    return sorted(__all__)


_SMALLEST_CELL: Final = 2.0  # points: about 3 pixels on a common screen
_SMALLEST_FONT, _LARGEST_FONT = 6.0, 10.0  # points
_LONGEST_WORD: Final = 16  # characters of a token that are shown
_MOST_WORDS: Final = 15  # where there is no room for all of them
_FAINTEST: Final = 0.01  # of the strongest weight: less is not drawn as a line
_UNDERFLOW: Final = -104.0  # exp of less is 0 in float32

_Words = Sequence[str] | None


def weights(
    weights: Any,
    head: int = 0,
    *,
    item: int = 0,
    tokens: _Words = None,
    key_tokens: _Words = None,
    vmax: float | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """The attention weights of one head: a row per query, a column per key.

    Parameters
    ----------
    weights : array_like or Explanation
        (N, H, L, S), (H, L, S) or (L, S).
    head, item : int, default 0
        Which of the H and N, if there are any.
    tokens : sequence of str, optional
        The L queries' labels, and the keys' too where L = S.
    key_tokens : sequence of str, optional
        The S keys' labels, where they are others.
    vmax : float, optional
        The weight of the strongest colour; the largest weight unless given.
    colorbar : bool, default True
        Whether to draw the scale of colours beside the axes.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If there is no such head, or if there are not as many tokens as queries, or keys.
    IndexError
        If there is no such item.

    Examples
    --------
    >>> import mha_c
    >>> layer, x = mha_c.MultiheadAttention(8, 4, seed=0), np.ones((3, 1, 8), np.float32)
    >>> _, w = layer(x, x, x, average_attn_weights=False)
    >>> mha_c.plot.weights(w, head=2, tokens=["one", "two", "three"]).get_title()
    'Attention weights, head 2'
    """
    by_head = _heads.heads_of(weights, item)
    name = "Attention weights"
    if isinstance(weights, Explanation) or np.ndim(weights) > 2:
        name += f", head {head}"
    matrix = _one_head(weights, by_head, head)
    return _draw_weights(matrix, name, tokens, key_tokens, vmax, colorbar, ax)


def average(
    weights: Any,
    *,
    item: int = 0,
    tokens: _Words = None,
    key_tokens: _Words = None,
    vmax: float | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """The attention weights averaged over the heads, as the layer itself returns them.

    Parameters
    ----------
    weights, item, tokens, key_tokens, vmax, colorbar, ax
        As for `weights`.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError, IndexError
        As for `weights`.

    Examples
    --------
    >>> average(np.full((4, 2, 2), 0.5)).get_title()
    'Attention weights, average of 4 heads'
    """
    by_head = _heads.heads_of(weights, item)
    name = f"Attention weights, average of {len(by_head)} heads"
    return _draw_weights(by_head.mean(axis=0), name, tokens, key_tokens, vmax, colorbar, ax)


def heads(
    weights: Any,
    *,
    item: int = 0,
    tokens: _Words = None,
    key_tokens: _Words = None,
    vmax: float | None = None,
    colorbar: bool = True,
    axes: Sequence[Axes] | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """The attention weights of every head, side by side on one scale.

    Parameters
    ----------
    weights, item, tokens, key_tokens, vmax, colorbar
        As for `weights`.
    axes : array_like of matplotlib.axes.Axes, optional
        At least H of them, in any shape; a new figure unless given.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes, (H,)

    Raises
    ------
    ValueError
        As for `weights`, and if there are fewer axes than heads.

    Examples
    --------
    >>> [ax.get_title() for ax in heads(np.full((2, 5, 5), 0.2))]
    ['head 0', 'head 1']
    """
    by_head = _heads.heads_of(weights, item)
    count = len(by_head)
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
    chosen: NDArray[Any] = np.array(axes, dtype=object).ravel()[:count]
    if len(chosen) < count:
        raise ValueError(f"{count} heads need as many axes, but there are {len(chosen)}")
    vmax = _largest(by_head) if vmax is None else vmax
    for number, ax, matrix in zip(_numbers(weights, by_head), chosen, by_head):
        cells = _bin(ax, matrix, weights=True)
        image = _heat_map(ax, cells, _sequential(ax), PowerNorm(0.5, 0, vmax))
        _label(ax, matrix.shape, tokens, key_tokens)
        ax.set_title(f"head {number}{cells.note}", fontsize="small")
    if all(ax.get_subplotspec() is not None for ax in chosen):
        for ax in chosen:
            ax.label_outer()
    if colorbar:
        _colorbar(image, chosen, cells.meaning("weight, on a square-root scale"))
    return chosen


def entropy(weights: Any, *, item: int = 0, ax: Axes | None = None) -> Axes:
    """How widely each head looks: the mean entropy of its queries' weights, in bits.

    Parameters
    ----------
    weights : array_like, Explanation, or list of these
        As for `weights`; a list has one entry per layer, and gives a table of layers and heads.
    item : int, default 0
        Which of the N, if there are any.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.axes.Axes

    See Also
    --------
    mha_c.heads.entropy : the numbers.

    Examples
    --------
    >>> entropy(np.full((2, 4, 4), 0.25)).get_ylabel()
    'entropy in bits'
    """
    layers = [_heads.entropy(layer, item=item) for layer in _layers(weights)]
    ax = _draw_statistic(layers, "entropy in bits", "How widely each head looks", ax)
    if len(layers) == 1:
        most = math.log2(_heads.heads_of(weights, item).shape[-1])
        ax.axhline(most, color=_ink(ax), linewidth=0.8, linestyle="--")
        ax.annotate(
            "all keys alike",
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


def distance(weights: Any, *, item: int = 0, ax: Axes | None = None) -> Axes:
    """How far each head looks: the mean distance, by its weights, from its queries to the keys, in tokens.

    Parameters
    ----------
    weights, item, ax
        As for `entropy`, of a self-attention: L = S.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        Unless L = S.

    See Also
    --------
    mha_c.heads.distance : the numbers.

    Examples
    --------
    >>> distance(np.full((2, 4, 4), 0.25)).get_ylabel()
    'distance in tokens'
    """
    layers = [_heads.distance(layer, item=item) for layer in _layers(weights)]
    ax = _draw_statistic(layers, "distance in tokens", "How far each head looks", ax)
    if len(layers) == 1:
        ax.set_ylim(0, None)
    return ax


def token(
    weights: Any,
    token: int,
    head: int | None = None,
    *,
    item: int = 0,
    tokens: _Words = None,
    key_tokens: _Words = None,
    ax: Axes | None = None,
) -> Axes:
    """Where one token looks: lines from its word among the queries to the words of the keys, the stronger the heavier.

    Parameters
    ----------
    weights
        As for `weights`.
    token : int
        The query.
    head : int, optional
        One head; the average of all unless given.
    item, tokens, key_tokens, ax
        As for `weights`. Where there is no room for every word, the strongest keys have theirs.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError, IndexError
        As for `weights`, and if there is no such token.

    Examples
    --------
    >>> ax = token(np.full((2, 3, 3), 1 / 3), 1, tokens=["a", "kitten", "sleeps"])
    >>> ax.get_title()
    'Where "kitten" (1) looks, average of 2 heads'
    """
    by_head = _heads.heads_of(weights, item)
    matrix = by_head.mean(axis=0) if head is None else _one_head(weights, by_head, head)
    whose = f"average of {len(by_head)} heads" if head is None else f"head {head}"
    length, source_length = matrix.shape
    query_words, key_words = _words_of(matrix.shape, tokens, key_tokens)
    token = range(length)[token]
    if ax is None:
        _, ax = pyplot.subplots(figsize=(min(9.0, 4.0 + 0.25 * max(length, source_length)), 4.0), layout="constrained")
    assert ax is not None
    ax.set(xlim=(-0.8, max(length, source_length) - 0.2), ylim=(0, 1))
    ax.axis("off")

    strengths = np.nan_to_num(matrix[token]) / _largest(matrix[token])
    top, shown_queries = _row_of_words(ax, query_words, (np.arange(length) == token).astype(float), above=True)
    bottom, shown_keys = _row_of_words(ax, key_words, strengths, above=False)
    line_color = _accent(ax)
    for key in np.argsort(strengths):
        if strengths[key] > _FAINTEST:
            width, alpha = 0.6 + 4 * strengths[key], 0.35 + 0.65 * np.sqrt(strengths[key])
            ax.plot([token, key], [top, bottom], color=line_color, linewidth=width, alpha=alpha)
    left_out = ""
    if shown_queries < length or shown_keys < source_length:
        left_out = f"\n(words: {shown_queries} of {length} queries, the {shown_keys} strongest of {source_length} keys)"
    name = f'"{_shorten(query_words[token])}" ({token})' if tokens is not None else f"query {token}"
    ax.set_title(f"Where {name} looks, {whose}{left_out}", pad=12, color=_ink(ax))
    return ax


def masking(
    scores: Any,
    masked_scores: Any = None,
    head: int = 0,
    *,
    item: int = 0,
    tokens: _Words = None,
    key_tokens: _Words = None,
    colorbar: bool = True,
    axes: Sequence[Axes] | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """The scores of one head before and after the masks; what the masks hide is hatched.

    Parameters
    ----------
    scores : array_like or Explanation
        Of the shapes of `weights`; an explanation brings its own `masked_scores`.
    masked_scores : array_like, optional
        The same with the masks applied: -inf, or so low that the weight rounds to 0, where a key is hidden.
    head, item, tokens, key_tokens, colorbar
        As for `weights`.
    axes : array_like of matplotlib.axes.Axes, optional
        Two of them; a new figure unless given.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes, (2,)

    Raises
    ------
    TypeError
        If there are no `masked_scores`.
    ValueError, IndexError
        As for `weights`, and unless there are two axes.

    Examples
    --------
    >>> scores = np.zeros((3, 3))
    >>> before, after = masking(scores, np.where(np.tri(3) == 0, -np.inf, scores))
    >>> after.get_title()
    'Scores after masks, head 0\\n(hatched: hidden)'
    """
    stages = (scores.scores, scores.masked_scores) if isinstance(scores, Explanation) else (scores, masked_scores)
    if any(stage is None for stage in stages):
        raise TypeError("masking() needs the scores before and after the masks, or an Explanation")
    by_head = [_heads.heads_of(stage, item) for stage in stages]
    before, after = (_one_head(scores, each, head) for each in by_head)
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
    for ax, each, name in zip(chosen, cells, ("before masks", "after masks")):
        image = _heat_map(ax, each, _diverging(ax), Normalize(-largest, largest))
        _label(ax, before.shape, tokens, key_tokens)
        ax.set_title(f"Scores {name}, head {head}{each.note}", fontsize="medium")
    chosen[1].set_title(f"{chosen[1].get_title()}\n(hatched: hidden)", fontsize="medium")
    if colorbar:
        _colorbar(image, chosen, cells[0].meaning("score"))
    return chosen


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
        return number if self.size == (1, 1) else f"{number}, {self.how}"


def _bin(ax: Axes, matrix: NDArray[Any], *, weights: bool) -> _Cells:
    """As many neighbours in a cell as it takes to see the cells. NaN, which stands for nothing, is left out."""
    size = tuple(_bin_size(pitch) for pitch in reversed(_pitch(ax, matrix.shape)))
    how = "keys added, queries averaged" if weights else "averaged"
    if size == (1, 1):
        return _Cells(matrix, (1, 1), how)
    known = ~np.isnan(matrix)
    # A row of weights still adds up to 1: the weights on neighbouring keys are added, not averaged.
    counted = np.broadcast_to(known.any(axis=1, keepdims=True) / size[1], known.shape) if weights else known
    total, count = np.where(known, matrix, 0), counted.astype(np.float64)
    for axis, step in enumerate(size):
        starts = np.arange(0, matrix.shape[axis], step)
        total, count = (np.add.reduceat(array, starts, axis=axis) for array in (total, count))
    if weights:
        count[:, -1] *= size[1] / (
            matrix.shape[1] - size[1] * (count.shape[1] - 1)
        )  # the last cell may have fewer keys
    with np.errstate(invalid="ignore"):
        return _Cells(np.where(count > 0, total / np.where(count > 0, count, 1), np.nan), (size[0], size[1]), how)


def _bin_size(pitch: float) -> int:
    """How many cells of `pitch` points make one that can be seen: 1, 2, 5, 10, 20, 50 ..."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power * pitch >= _SMALLEST_CELL:
                return step * power
        power *= 10


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
    matrix: NDArray[Any],
    name: str,
    tokens: _Words,
    key_tokens: _Words,
    vmax: float | None,
    colorbar: bool,
    ax: Axes | None,
) -> Axes:
    if ax is None:
        _, ax = pyplot.subplots(figsize=_figure_size(matrix.shape), layout="compressed")
    assert ax is not None
    cells = _bin(ax, matrix, weights=True)
    image = _heat_map(ax, cells, _sequential(ax), PowerNorm(0.5, 0, _largest(cells.array) if vmax is None else vmax))
    _label(ax, matrix.shape, tokens, key_tokens)
    ax.set_title(f"{name}{cells.note}", fontsize="medium")
    if colorbar:
        _colorbar(image, [ax], cells.meaning("weight, on a square-root scale"))
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


def _draw_statistic(layers: list[NDArray[Any]], name: str, title: str, ax: Axes | None) -> Axes:
    """Numbers (H, L) of each layer: of one layer, each head's mean and spread; of several, a table of means."""
    count = max(map(len, layers))
    if ax is None:
        height = 3.0 if len(layers) == 1 else 1.4 + 0.34 * len(layers)
        _, ax = pyplot.subplots(figsize=(min(9.0, 2.4 + 0.42 * count), height), layout="constrained")
    assert ax is not None
    ax.set_title(title, fontsize="medium", color=_ink(ax))
    ax.set_xlabel("head")
    ax.xaxis.set_major_locator(MaxNLocator(min(count, 16), integer=True, steps=(1, 2, 5, 10)))
    if len(layers) > 1:
        means = np.full((len(layers), count), np.nan)
        for number, layer in enumerate(layers):
            means[number, : len(layer)] = _summary(layer)[1]
        image = _heat_map(ax, _Cells(means, (1, 1), ""), _sequential(ax), Normalize(0, _largest(means)))
        ax.set_aspect("auto")
        ax.set_ylabel("layer")
        ax.yaxis.set_major_locator(MaxNLocator(min(len(layers), 16), integer=True, steps=(1, 2, 5, 10)))
        _colorbar(image, [ax], f"mean {name}")
        return ax
    lower, mean, upper = _summary(layers[0])
    ax.vlines(range(count), lower, upper, color=_accent(ax), linewidth=5, alpha=0.4, label="middle half of the queries")
    ax.plot(range(count), mean, "o", color=_accent(ax), label="mean")
    ax.set_ylabel(name)
    ax.set_xlim(-0.6, count - 0.4)
    return ax


def _summary(by_query: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """First quartile, mean and third quartile of each head's queries, of those that see anything."""
    known = [row[~np.isnan(row)] for row in by_query]
    numbers = [(*np.quantile(row, (0.25, 0.75)), row.mean()) if row.size else (np.nan,) * 3 for row in known]
    lower, upper, mean = np.array(numbers).reshape(-1, 3).T
    return lower, mean, upper


def _numbers(weights: Any, by_head: NDArray[Any]) -> list[int]:
    """The numbers that the heads have in their layer; an explanation need not have all of them."""
    return list(weights.heads) if isinstance(weights, Explanation) else list(range(len(by_head)))


def _one_head(weights: Any, by_head: NDArray[Any], head: int) -> NDArray[Any]:
    numbers = _numbers(weights, by_head)
    if head not in numbers:
        raise ValueError(f"there is no head {head}; the heads are {numbers}")
    matrix: NDArray[Any] = by_head[numbers.index(head)]
    return matrix


def _layers(weights: Any) -> list[Any]:
    return list(weights) if isinstance(weights, (list, tuple)) else [weights]


def _largest(array: NDArray[Any]) -> float:
    """The largest finite number, or 1 where there is nothing above 0: the end of a scale of colours."""
    return float(np.max(array, where=np.isfinite(array), initial=0.0)) or 1.0


def _words_of(shape: tuple[int, ...], tokens: _Words, key_tokens: _Words) -> tuple[list[str], list[str]]:
    """A word for every query and every key; where none are given, its position."""
    if key_tokens is None and shape[0] == shape[1]:
        key_tokens = tokens
    words = []
    for count, given, name in zip(shape, (tokens, key_tokens), ("queries", "keys")):
        if given is not None and len(given) != count:
            raise ValueError(f"there are {count} {name}, but {len(given)} tokens")
        words.append([str(position) for position in range(count)] if given is None else list(given))
    return words[0], words[1]


def _label(ax: Axes, shape: tuple[int, ...], tokens: _Words, key_tokens: _Words) -> None:
    """Words along both axes where they can be read, positions where they cannot."""
    query_words, key_words = _words_of(shape, tokens, key_tokens)
    given = (key_tokens is not None or (tokens is not None and shape[0] == shape[1]), tokens is not None)
    ax.set_xlim(-0.5, shape[1] - 0.5)
    ax.set_ylim(shape[0] - 0.5, -0.5)
    for axis, name, words, has_words, pitch in zip(
        (ax.xaxis, ax.yaxis), ("key", "query"), (key_words, query_words), given, _pitch(ax, shape)
    ):
        font = min(_LARGEST_FONT, 0.8 * pitch)
        if has_words and font >= _SMALLEST_FONT:
            shown = [_shorten(word) for word in words]
            turned = axis is ax.xaxis and font * 0.6 * max(map(len, shown), default=0) > pitch
            axis.set_ticks(range(len(shown)), shown, fontsize=font, rotation=90 if turned else 0, parse_math=False)
            axis.set_label_text(name)
        else:
            axis.set_major_locator(
                MaxNLocator(int(max(1, min(10, pitch * len(words) / 20))), integer=True, steps=(1, 2, 5, 10))
            )
            axis.set_label_text(f"{name} (position)")


def _row_of_words(ax: Axes, words: list[str], strengths: NDArray[Any], *, above: bool) -> tuple[float, int]:
    """Words along the upper or the lower edge, all of them or the strongest: where lines end, and how many."""
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
    longest = 0.65 * font * max((len(shown[number]) for number in chosen), default=0)
    turned = longest > room
    edge = min(0.4, ((longest if turned else font) + 6) / (points * box.height))
    end, gap = (1 - edge, 0.01) if above else (edge, -0.01)
    for number in chosen:
        ax.text(
            number,
            end + gap,
            shown[number],
            rotation=90 if turned else 0,
            ha="center",
            va="bottom" if above else "top",
            fontsize=font,
            fontweight="bold" if strengths[number] > 0.5 else "normal",
            alpha=0.5 + 0.5 * min(1.0, 4 * float(strengths[number])) if everything else 1,
            color=_ink(ax),
            parse_math=False,
        )
    if not everything:
        ax.plot([0, len(words) - 1], [end, end], color=_ink(ax), linewidth=0.8, alpha=0.5)
    return end, len(chosen)


def _shorten(word: str) -> str:
    return word if len(word) <= _LONGEST_WORD else f"{word[: _LONGEST_WORD - 1]}…"


def _colorbar(image: Any, axes: Sequence[Axes] | NDArray[Any], meaning: str) -> None:
    """A scale beside the axes, in their ink: the style in force need not be the one that they were made in."""
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
    """Whether the background is dark; where nothing is painted behind the axes, the text's colour tells."""
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
    """From the background's lightness away from it, in one hue: read by lightness alone."""
    return matplotlib.colormaps["Blues_r" if _on_dark(ax) else "Blues"]


def _diverging(ax: Axes) -> Colormap:
    """Blue below 0, red above, and the background's lightness at 0."""
    return matplotlib.colormaps["berlin" if _on_dark(ax) else "RdBu_r"]
