# SPDX-License-Identifier: Apache-2.0
"""Matrices as coloured cells: what the colours mean, and how neighbours share a cell where there are too many.

In everything that mha_c draws, blue is above 0 and orange is below 0: colour-blind readers can tell the two apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["NEGATIVE", "POSITIVE", "bins"]

#: Red, green and blue, 0 to 255. Black and white text have the same contrast on both.
POSITIVE, NEGATIVE = (36, 122, 182), (190, 90, 20)


def bins(matrix: NDArray[Any], size: tuple[int, int], *, add_columns: bool = False) -> NDArray[Any]:
    """The means of bins of `size` rows and columns, over their finite numbers; the last bins may be smaller.

    With `add_columns` the columns of a bin are added, and only its rows averaged: a row of weights still adds up to 1.
    A bin without a finite number is NaN if it has any, and infinite otherwise.

    Examples
    --------
    >>> bins(np.array([[1.0, 3.0, 5.0], [np.nan, -np.inf, -np.inf]]), (1, 2))
    array([[  2.,   5.],
           [ nan, -inf]])
    """
    if size == (1, 1) or not matrix.size:
        return matrix
    rows, columns = (np.arange(0, count, step) for count, step in zip(matrix.shape, size))
    if add_columns:
        matrix = np.add.reduceat(matrix, columns, axis=1, dtype=np.float64)
        columns = np.arange(len(columns))

    def reduce(operation: np.ufunc, array: NDArray[Any]) -> NDArray[Any]:
        reduced: NDArray[Any] = operation.reduceat(operation.reduceat(array, rows, axis=0), columns, axis=1)
        return reduced

    finite = np.isfinite(matrix)
    count = reduce(np.add, finite.astype(np.float64))
    total = reduce(np.add, np.where(finite, matrix, 0).astype(np.float64))
    return np.where(count > 0, total / np.maximum(count, 1), reduce(np.maximum, matrix))
