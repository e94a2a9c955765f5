# SPDX-License-Identifier: Apache-2.0
"""Compare a result with torch's: how far apart they are, how far each is from the exact result, whether they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CRITERION", "Comparison", "Error"]

#: When a result agrees with torch's. Both results are rounded sums of the same terms in different orders, so their
#: errors are two samples of the same noise. In thousands of small random outputs, the largest errors differed by a
#: factor of up to 5; a wrong or missing term causes an error of thousands of units. The four units allow for a torch
#: result that happens to be exact.
CRITERION = (
    "A result agrees if its shape, dtype, NaN and infinities are the same as torch's, and if its largest error is at "
    "most 8 times torch's plus 4 units in the last place."
)


@dataclass(frozen=True)
class Error:
    """The size of the differences between two arrays.

    Attributes
    ----------
    largest : float
        The largest absolute difference.
    rms : float
        The root of the mean square of the differences.

    Examples
    --------
    >>> Error.between(np.array([1.0, 2.0, np.nan]), np.array([1.5, 2.5, np.nan]))
    Error(largest=0.5, rms=0.5)
    """

    largest: float
    rms: float

    @classmethod
    def between(cls, a: NDArray[Any], b: NDArray[Any]) -> Error:
        """Measure the differences between two arrays where both are finite.

        Parameters
        ----------
        a, b : numpy.ndarray
            The arrays, of the same shape.

        Returns
        -------
        Error
            Zeros if no number is finite in both.

        Examples
        --------
        >>> Error.between(np.array([1.0, np.inf]), np.array([1.5, 2.0]))
        Error(largest=0.5, rms=0.5)
        """
        both = np.isfinite(a) & np.isfinite(b)
        wide = np.result_type(a, b, np.float64)
        differences = np.abs(a[both].astype(wide) - b[both].astype(wide))
        if differences.size == 0:
            return cls(0.0, 0.0)
        return cls(float(differences.max()), float(np.sqrt(np.mean(differences**2))))


@dataclass(frozen=True)
class Comparison:
    """One output of mha_c compared with torch's.

    Attributes
    ----------
    name : str
        The name of the output.
    shape, torch_shape : tuple of int
        The shapes of mha_c's and torch's output.
    dtype, torch_dtype : str
        Their dtypes.
    difference : Error
        The difference between mha_c and torch.
    error, torch_error : Error
        The differences of mha_c and of torch from the reference.
    ulp : float
        One unit in the last place of the largest number of the output. Attention sums terms of both signs, so small
        numbers have the same absolute error as large ones: units of their own size would not be meaningful.
    misplaced : int
        How many numbers are NaN or infinite in only one of the two.
    other : str
        The library compared with: "torch", or "NumPy" if torch does not have such a layer.

    Examples
    --------
    >>> x = np.ones((2, 2), np.float32)
    >>> Comparison.measure("output", x, x, x.astype(np.float64)).agrees
    True
    """

    name: str
    shape: tuple[int, ...]
    torch_shape: tuple[int, ...]
    dtype: str
    torch_dtype: str
    difference: Error
    error: Error
    torch_error: Error
    ulp: float
    misplaced: int
    other: str = "torch"

    @classmethod
    def measure(
        cls,
        name: str,
        ours: NDArray[Any],
        theirs: NDArray[Any],
        reference: NDArray[Any],
        torch_error: Error | None = None,
        other: str = "torch",
    ) -> Comparison:
        """Compare two arrays.

        Parameters
        ----------
        name : str
            The name of the output.
        ours, theirs : numpy.ndarray
            The results of mha_c and of torch.
        reference : numpy.ndarray
            The exact result.
        torch_error : Error, optional
            The error of torch. It is needed if `reference` is torch's own result.
        other : str, default "torch"
            The library that computed `theirs`.

        Returns
        -------
        Comparison

        Examples
        --------
        >>> x = np.ones((2, 2), np.float32)
        >>> Comparison.measure("output", x, x + 1, x.astype(np.float64)).torch_error
        Error(largest=1.0, rms=1.0)
        """
        difference = error = Error(np.inf, np.inf)
        misplaced = 0
        if ours.shape == theirs.shape:
            difference, error = Error.between(ours, theirs), Error.between(ours, reference)
            torch_error = torch_error or Error.between(theirs, reference)
            finite = np.isfinite(ours) & np.isfinite(theirs)
            misplaced = int(np.sum(~finite & ~((ours == theirs) | np.isnan(ours) & np.isnan(theirs))))
        largest = np.max(np.abs(theirs), where=np.isfinite(theirs), initial=0.0)
        ulp = float(np.spacing(1.0 if theirs.dtype.kind in "biu" else largest))
        return cls(
            name=name,
            shape=ours.shape,
            torch_shape=theirs.shape,
            dtype=ours.dtype.name,
            torch_dtype=theirs.dtype.name,
            difference=difference,
            error=error,
            torch_error=torch_error or Error(np.inf, np.inf),
            ulp=ulp,
            misplaced=misplaced,
            other=other,
        )

    @property
    def disagreements(self) -> list[str]:
        """The disagreements with torch, in words; an empty list if the output agrees."""
        said = []
        if self.shape != self.torch_shape:
            said.append(f"shape {self.shape} instead of {self.torch_shape}")
        if self.dtype != self.torch_dtype:
            said.append(f"dtype {self.dtype} instead of {self.torch_dtype}")
        if self.misplaced:
            said.append(f"{self.misplaced} numbers are NaN or infinite in only one of the two")
        if not self.error.largest <= 8 * self.torch_error.largest + 4 * self.ulp and not said:
            said.append(f"an error of {self.error.largest:.2g}, where {self.other}'s is {self.torch_error.largest:.2g}")
        return said

    def __repr__(self) -> str:
        said = "; ".join(self.disagreements) or "agrees"
        return f"Comparison({self.name.strip()} {self.shape}: max diff {self.difference.largest:.1e}, {said})"

    @property
    def agrees(self) -> bool:
        """Whether the output is about as close to the reference as torch's; see `CRITERION`."""
        return not self.disagreements
