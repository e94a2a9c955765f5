# SPDX-License-Identifier: Apache-2.0
"""What attention weights say about each head, in numbers, and the same weights for bertviz. `mha_c.plot` draws them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha_c.explanation import Explanation

__all__ = ["distance", "entropy", "heads_of", "to_bertviz"]


def __dir__() -> list[str]:
    return sorted(__all__)


def heads_of(weights: Any, item: int = 0) -> NDArray[Any]:
    """The weights, or scores, of every head for one batch item.

    Parameters
    ----------
    weights : array_like or Explanation
        (N, H, L, S); (H, L, S), of an unbatched call; or (L, S), a single head or an average. Or what
        `mha_c.explain` returns, whose ``weights`` are taken, of the heads that were asked for.
    item : int, default 0
        Which of the N, if there are any.

    Returns
    -------
    numpy.ndarray, (H, L, S)

    Raises
    ------
    ValueError
        If there are not 2 to 4 dimensions.
    IndexError
        If there is no such item.

    Examples
    --------
    >>> heads_of(np.zeros((3, 4, 5, 5))).shape, heads_of(np.zeros((5, 5))).shape
    ((4, 5, 5), (1, 5, 5))
    """
    array: NDArray[Any] = np.asarray(weights.weights if isinstance(weights, Explanation) else weights)
    if not 2 <= array.ndim <= 4:
        raise ValueError(f"weights are (N, H, L, S), (H, L, S) or (L, S), but these have shape {array.shape}")
    by_head: NDArray[Any] = array[item] if array.ndim == 4 else array
    return by_head if by_head.ndim == 3 else by_head[None]


def entropy(weights: Any, *, item: int = 0) -> NDArray[Any]:
    """How widely each query of each head looks: the entropy of its weights, in bits.

    0 means that a single key has all the weight; log2(S), that all S keys have the same.

    Parameters
    ----------
    weights, item
        As for `heads_of`.

    Returns
    -------
    numpy.ndarray of float64, (H, L)
        NaN for a query without weights.

    Notes
    -----
    -Σ w log2 w over the keys ("A Mathematical Theory of Communication", Shannon, 1948, section 6); of attention heads:
    "What Does BERT Look At?" (Clark et al., 2019), section 3.3.

    Examples
    --------
    >>> entropy([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    array([[0., 2.]])
    """
    w = heads_of(weights, item).astype(np.float64)
    return np.where(w.sum(axis=-1) == 0, np.nan, -(w * np.log2(np.where(w == 0, 1, w))).sum(axis=-1) + 0.0)


def distance(weights: Any, *, item: int = 0) -> NDArray[Any]:
    """How far each query of each head looks: the mean distance, by its weights, from the query to the keys, in tokens.

    Parameters
    ----------
    weights, item
        As for `heads_of`, of a self-attention: L = S.

    Returns
    -------
    numpy.ndarray of float64, (H, L)
        NaN for a query without weights.

    Raises
    ------
    ValueError
        Unless L = S.

    Notes
    -----
    ``Σ w |query - key|`` over the keys ("Analyzing the Structure of Attention in a Transformer Language Model", Vig and
    Belinkov, 2019, section 4).

    Examples
    --------
    >>> distance([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    array([[0. , 0.5, 2. ]])
    """
    w = heads_of(weights, item).astype(np.float64)
    _, length, source_length = w.shape
    if length != source_length:
        raise ValueError(f"distances need as many keys as queries, not {length} queries and {source_length} keys")
    positions = np.arange(length)
    return np.where(w.sum(axis=-1) == 0, np.nan, (w * np.abs(positions[:, None] - positions)).sum(axis=-1))


def to_bertviz(*layers: Any, item: int = 0) -> tuple[Any, ...]:
    """Weights in the form that the package bertviz takes, which it shows as interactive drawings.

    Parameters
    ----------
    *layers
        The weights of each layer, as for `heads_of`, all with the same H, L and S.
    item : int, default 0
        The batch item to show.

    Returns
    -------
    tuple of torch.Tensor, each (1, H, L, S)
        The argument `attention` of ``bertviz.head_view`` and ``bertviz.model_view``.

    Raises
    ------
    ImportError
        If torch, which bertviz needs, is not installed.

    Examples
    --------
    >>> [tuple(layer.shape) for layer in to_bertviz(np.zeros((3, 4, 5, 5)), np.zeros((3, 4, 5, 5)))]
    [(1, 4, 5, 5), (1, 4, 5, 5)]
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("bertviz takes tensors, and torch is not installed: `pip install torch`") from error
    return tuple(torch.tensor(heads_of(layer, item)[None]) for layer in layers)
