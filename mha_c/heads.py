# SPDX-License-Identifier: Apache-2.0
"""Attention heads in numbers: entropy and distance. `mha_c.plot` draws them.

Weights are arrays (N, H, L, S) or (L, S), or the result of `mha_c.explain`. An array of three dimensions can be two
things, so `averaged` must say which: ``averaged=True`` for (N, L, S), averaged over the heads, as the layer returns it
by default; ``averaged=False`` for (H, L, S), from a call without a batch. Arrays are checked: weights are not negative,
and the weights of a query sum to 1, or to 0 if every key is hidden from it.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha_c.explanation import Explanation, LayerExplanation, StackExplanation
from mha_c.parameters.arrays import as_array
from mha_c.parameters.dtypes import computed_in

__all__ = ["distance", "entropy", "heads_of", "to_bertviz"]

_TOLERANCE = 0.02  # of the sum of a query's weights: bfloat16, or a table rounded to two places, comes that close to 1


def __dir__() -> list[str]:
    return sorted(__all__)


class Matrices(NamedTuple):
    """The matrices (L, S) of one batch item: weights, or scores."""

    array: NDArray[Any]  # (H, L, S); H is 1 for a matrix that does not belong to one head
    heads: tuple[int, ...]  # the numbers of the H heads in their layer; empty for a matrix without a head
    average_name: str  # what the average over H is called

    @classmethod
    def of(cls, source: Any, item: int, averaged: bool | None, stage: str = "weights") -> Matrices:
        """The matrices of an explanation or of an array. Arrays of weights are checked."""
        _check_source(source, stage)
        is_explanation = isinstance(source, Explanation)
        given = getattr(source, stage) if is_explanation else source
        array: NDArray[Any] = as_array(given, will_cast=True) if hasattr(given, "detach") else np.asarray(given)
        array = array.astype(computed_in(array.dtype), copy=False)
        if is_explanation:
            if averaged:
                raise ValueError("an Explanation has the weights of each head: averaged= is about arrays")
            averaged = False
        if not 2 <= array.ndim <= 4 or (array.ndim == 4 and averaged):
            shapes = "(N, L, S) or (L, S) if averaged" if averaged else "(N, H, L, S), (H, L, S) or (L, S)"
            raise ValueError(f"{stage} are {shapes}, but these have shape {array.shape}")
        if array.ndim == 3 and averaged is None:
            raise ValueError(
                f"{stage} of shape {array.shape} can be two things: pass averaged=True if they are (N, L, S), averaged "
                "over the heads, as the layer returns them by default; pass averaged=False if they are (H, L, S), one "
                "matrix for each head, from a call without a batch"
            )
        has_heads = array.ndim == 4 or (array.ndim == 3 and not averaged)
        array = item_of(array, item, has_batch=array.ndim - has_heads == 3)
        array = array if has_heads else array[None]
        if stage == "weights" and not is_explanation:
            _check_weights(array)
        heads = source.heads if is_explanation else tuple(range(len(array))) if has_heads else ()
        name = f"average of {len(heads)} head{'s' * (len(heads) != 1)}"
        if is_explanation and len(heads) < source.letters["H"]:
            name = f"average of heads {', '.join(map(str, heads))}"
        elif not has_heads:
            name = "average of the heads" if averaged else ""
        return cls(array, heads, name)

    def of_each_head(self) -> Matrices:
        """These matrices, if there is one for each head."""
        if not self.heads:
            raise ValueError(
                "this needs the weights of each head, but there is one matrix for all heads: the layer returns the "
                "weights of each head with average_attn_weights=False"
            )
        return self


def item_of(array: NDArray[Any], item: int, has_batch: bool) -> NDArray[Any]:
    """One item of an array whose first axis is the batch, or an array without a batch."""
    item = operator.index(item)
    count = len(array) if has_batch else 1
    if not -count <= item < count:
        batch = f"the batch has {count}" if has_batch else f"an array of shape {array.shape} has no batch"
        raise IndexError(f"there is no item {item}: {batch}")
    chosen: NDArray[Any] = array[item] if has_batch else array
    return chosen


def _check_source(source: Any, stage: str) -> None:
    """Refuse what holds matrices, or should have been one, and say where they are."""
    if isinstance(source, LayerExplanation):
        inside = " or ".join(f"explanation.{name}" for name in source.attentions)
        raise TypeError(f"this explains a whole layer: pass the attention in it, {inside}")
    if isinstance(source, StackExplanation):
        raise TypeError("this explains a stack of layers: pass the attention of one of them, explanation[0].self_attn")
    if source is None and stage == "weights":
        raise TypeError("weights is None: call the layer with need_weights=True")
    if isinstance(source, tuple) and len({getattr(each, "shape", None) for each in source}) > 1:
        raise TypeError(f"{stage} is a tuple of {len(source)}: pass one of them, such as the weights, layer(...)[1]")


def _check_weights(array: NDArray[Any]) -> None:
    """Refuse numbers that cannot be weights. A query that sees no key has NaN or 0 for every key."""
    smallest = array.min(initial=0.0, where=~np.isnan(array))
    if smallest < 0:
        raise ValueError(f"weights are not negative, but one of these is {smallest:.4g}; are they scores?")
    sums = array.sum(axis=-1, dtype=np.float64)
    wrong = np.argwhere((np.abs(sums - 1) > _TOLERANCE) & (sums != 0))
    if len(wrong):
        head, query = wrong[0]
        raise ValueError(
            f"the weights of a query sum to 1, but those of query {query} in matrix {head} sum to "
            f"{sums[head, query]:.4g}. Dropout can be the cause: call the layer's eval() first, or pass what "
            "mha_c.explain returns. Missing keys can be the cause, too."
        )


def heads_of(weights: Any, item: int = 0, *, averaged: bool | None = None) -> NDArray[Any]:
    """Return the weights of every head for one batch item.

    Parameters
    ----------
    weights : array_like or Explanation
        (N, H, L, S), (H, L, S), (N, L, S) or (L, S); or the result of `mha_c.explain`, with the ``weights`` of the
        heads that it was asked for.
    item : int, default 0
        The batch item.
    averaged : bool, optional
        Whether an array is averaged over the heads. It must be given for an array of three dimensions: True means that
        it is (N, L, S), as the layer returns it by default; False means that it is (H, L, S).

    Returns
    -------
    numpy.ndarray, (H, L, S)
        H is 1 for (N, L, S) and (L, S), which have one matrix for each item. Weights in bfloat16 and float16 are
        returned in float32.

    Raises
    ------
    TypeError
        If `weights` is None, a tuple of arrays, as a layer returns it, or the explanation of a whole layer or stack.
    ValueError
        If there are not 2 to 4 dimensions; if there are 3 and `averaged` is not given; or if the numbers cannot be
        weights: if one is negative, or if those of a query sum to neither 1 nor 0.
    IndexError
        If the batch does not have this item.

    Examples
    --------
    >>> import mha_c
    >>> layer, x = mha_c.MultiheadAttention(8, 4, seed=0).eval(), np.ones((5, 3, 8), np.float32)
    >>> _, averages = layer(x, x, x)
    >>> _, weights = layer(x, x, x, average_attn_weights=False)
    >>> heads_of(weights, item=2).shape, heads_of(averages, item=2, averaged=True).shape
    ((4, 5, 5), (1, 5, 5))
    """
    return Matrices.of(weights, item, averaged).array


def entropy(weights: Any, *, item: int = 0, averaged: bool | None = None) -> NDArray[Any]:
    """Return how widely each query of each head attends: the entropy of its weights, in bits.

    The entropy is 0 if one key has all the weight, and log2(S) if all S keys have the same weight.

    Parameters
    ----------
    weights, item, averaged
        As for `heads_of`.

    Returns
    -------
    numpy.ndarray of float64, (H, L)
        NaN for a query that sees no key.

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `heads_of`.

    Notes
    -----
    The entropy is ``-Σ w log2 w`` over the keys ("A Mathematical Theory of Communication", Shannon, 1948, section 6).
    For attention heads, see "What Does BERT Look At?" (Clark et al., 2019), section 3.3.

    Examples
    --------
    >>> entropy([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    array([[0., 2.]])
    """
    return entropy_by_query(heads_of(weights, item, averaged=averaged))


def entropy_by_query(by_head: NDArray[Any]) -> NDArray[Any]:
    """Weights (H, L, S) to entropies (H, L)."""
    w = by_head.astype(np.float64)
    return np.where(w.sum(axis=-1) == 0, np.nan, -(w * np.log2(np.where(w == 0, 1, w))).sum(axis=-1) + 0.0)


def distance(weights: Any, *, item: int = 0, averaged: bool | None = None) -> NDArray[Any]:
    """Return how far each query of each head attends: the mean distance to the keys, by weight, in tokens.

    Parameters
    ----------
    weights, item, averaged
        As for `heads_of`. It must be self-attention: L = S.

    Returns
    -------
    numpy.ndarray of float64, (H, L)
        NaN for a query that sees no key.

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `heads_of`, and if L is not S.

    Notes
    -----
    The distance is ``Σ w |query - key|`` over the keys ("Analyzing the Structure of Attention in a Transformer Language
    Model", Vig and Belinkov, 2019, section 4).

    Examples
    --------
    >>> distance([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    array([[0. , 0.5, 2. ]])
    """
    return distance_by_query(heads_of(weights, item, averaged=averaged))


def distance_by_query(by_head: NDArray[Any]) -> NDArray[Any]:
    """Weights (H, L, L) to mean distances (H, L)."""
    w = by_head.astype(np.float64)
    _, length, source_length = w.shape
    if length != source_length:
        raise ValueError(f"distances need one key for each query, but got {length} queries and {source_length} keys")
    positions = np.arange(length)
    return np.where(w.sum(axis=-1) == 0, np.nan, (w * np.abs(positions[:, None] - positions)).sum(axis=-1))


def to_bertviz(*layers: Any, item: int = 0, averaged: bool | None = None) -> tuple[Any, ...]:
    """Convert weights for the package bertviz, which draws them interactively.

    Parameters
    ----------
    *layers
        The weights of each layer, as for `heads_of`, with the same H, L and S in all layers.
    item : int, default 0
        The batch item to show.
    averaged : bool, optional
        False for arrays (H, L, S).

    Returns
    -------
    tuple of torch.Tensor, each (1, H, L, S)
        The argument `attention` of ``bertviz.head_view`` and ``bertviz.model_view``.

    Raises
    ------
    ImportError
        If torch, which bertviz needs, is not installed.
    TypeError, ValueError, IndexError
        As for `heads_of`, and if the weights of a layer are averaged over the heads.

    Examples
    --------
    >>> weights = np.full((3, 4, 5, 5), 0.2)
    >>> [tuple(layer.shape) for layer in to_bertviz(weights, weights)]
    [(1, 4, 5, 5), (1, 4, 5, 5)]
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("bertviz takes tensors, and torch is not installed: `pip install torch`") from error
    return tuple(torch.tensor(Matrices.of(layer, item, averaged).of_each_head().array[None]) for layer in layers)
