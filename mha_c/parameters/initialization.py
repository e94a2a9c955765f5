# SPDX-License-Identifier: Apache-2.0
"""torch's initial parameters from a seed, bit for bit.

torch draws from a Mersenne Twister seeded with the 32 low bits of the seed. NumPy's RandomState is the same generator
with the same seeding, and its stream is frozen (NEP 19), so the raw 32-bit draws are taken from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mha_c.parameters.dtypes import computed_in
from mha_c.parameters.sets import SEPARATE_WEIGHTS

__all__ = ["Draws", "initial_linear", "initial_parameters", "reset_matrices"]

_CHUNK: Final = 1 << 16
"""Draws taken at a time: their temporaries stay in the cache."""


def initial_parameters(
    shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any], seed: int | Draws | None
) -> dict[str, NDArray[Any]]:
    """The parameters that torch's constructor gives after ``torch.manual_seed(seed)``.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        The parameters' names, in the order of torch's state dict, and their shapes.
    dtype : numpy.dtype
        The layer's. Parameters of halves are drawn in float32.
    seed : int, Draws or None
        From -2**63 to 2**64 - 1, of which torch uses the 32 low bits. None: fresh entropy. `Draws`: the draws continue.

    Returns
    -------
    dict of str to numpy.ndarray
        In the order of `shapes`, equal to torch's in every bit, as torch computes on x86-64 CPUs with AVX2. On others
        torch itself rounds the logarithms, sines and cosines in ``bias_k`` and ``bias_v`` differently.

    Raises
    ------
    ValueError
        If the seed is out of range.

    Notes
    -----
    ``out_proj.weight`` is uniform within 1 / sqrt(fan_in) (He et al. 2015, as ``torch.nn.Linear`` applies it), the
    input projections are uniform and ``bias_k`` and ``bias_v`` normal as in Glorot and Bengio (2010); the other biases
    are zero.

    Examples
    --------
    >>> initial_parameters({"out_proj.weight": (2, 2)}, np.dtype("float32"), seed=0)["out_proj.weight"]
    array([[-0.00529398,  0.3793229 ],
           [-0.58198076, -0.5203875 ]], dtype=float32)
    """
    draws = Draws.of(seed)
    parameters = {name: np.zeros(shape, computed_in(dtype)) for name, shape in shapes.items()}

    # The order is that of the draws in torch's constructor, not that of the state dict.
    draws.fill_kaiming(parameters["out_proj.weight"])
    if "out_proj.bias" in parameters:
        draws.fill_uniform(parameters["out_proj.bias"].copy(), 1)  # torch draws these, then zeroes them

    for name in ("in_proj_weight", *SEPARATE_WEIGHTS):
        if name in parameters:
            draws.fill_xavier(parameters[name])
    for name in ("bias_k", "bias_v"):
        if name in parameters:
            fan = parameters[name].size
            draws.fill_normal(parameters[name], math.sqrt(2.0 / (fan + fan)))
    return parameters


def initial_linear(
    out_features: int, in_features: int, bias: bool, dtype: np.dtype[Any], seed: int | Draws | None
) -> dict[str, NDArray[Any]]:
    """The parameters of torch's Linear after ``torch.manual_seed(seed)``.

    Parameters
    ----------
    out_features, in_features : int
        The shape of the weight.
    bias : bool
        Whether there is a bias.
    dtype, seed
        As for `initial_parameters`.

    Returns
    -------
    dict of str to numpy.ndarray
        Equal to torch's in every bit.

    Notes
    -----
    Weight and bias are uniform within 1 / sqrt(in_features) (He et al. 2015, as ``torch.nn.Linear`` applies it).

    Examples
    --------
    >>> initial_linear(1, 2, True, np.dtype("float32"), seed=0)
    {'weight': array([[-0.00529398,  0.3793229 ]], dtype=float32), 'bias': array([-0.58198076], dtype=float32)}
    """
    draws = Draws.of(seed)
    parameters = {"weight": np.zeros((out_features, in_features), computed_in(dtype))}
    if in_features:  # else torch draws nothing
        draws.fill_kaiming(parameters["weight"])
    if bias:
        parameters["bias"] = np.zeros(out_features, computed_in(dtype))
        if in_features:
            draws.fill_uniform(parameters["bias"], 1 / math.sqrt(in_features))
    return parameters


def reset_matrices(arrays: Mapping[str, NDArray[Any]], draws: Draws) -> dict[str, NDArray[Any]]:
    """New matrices for those among some parameters, in their order, as torch's Transformer draws them at its end.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray
        The parameters by name, in the order of the state dict.
    draws : Draws
        The generator, which continues.

    Returns
    -------
    dict of str to numpy.ndarray
        The matrices, uniform as in Glorot and Bengio (2010).

    Examples
    --------
    >>> list(reset_matrices({"weight": np.zeros((2, 2)), "bias": np.zeros(2)}, Draws(0)))
    ['weight']
    """
    matrices = {
        name: np.empty(array.shape, computed_in(array.dtype)) for name, array in arrays.items() if array.ndim > 1
    }
    for matrix in matrices.values():
        draws.fill_xavier(matrix)
    return matrices


def _bits_of(dtype: np.dtype[Any]) -> int:
    """The bits of a significand, and so of a uniform number."""
    return 24 if dtype == np.float32 else 53


class Draws:
    """torch's CPU generator: what follows ``torch.manual_seed(seed)``.

    The arrays that it fills are of float32 or float64.

    Parameters
    ----------
    seed : int or None
        As for `initial_parameters`.

    Examples
    --------
    >>> draws = Draws(0)
    >>> first, second = (initial_linear(1, 1, False, np.dtype("float32"), draws) for _ in range(2))
    >>> bool(first["weight"] == second["weight"])
    False
    """

    @classmethod
    def of(cls, seed: int | Draws | None) -> Draws:
        """The generator of a seed, or the one given as a seed, which continues."""
        return seed if isinstance(seed, Draws) else cls(seed)

    def __init__(self, seed: int | None) -> None:
        if seed is not None:
            try:
                seed = int(seed)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{error}: seed must be an int") from None
            if not -(2**63) <= seed < 2**64:
                raise ValueError(f"Overflow when unpacking long long: seed must be in [-2**63, 2**64), but is {seed}")
            seed &= 0xFFFFFFFF
        self.random = np.random.RandomState(seed)
        self.spare_normal: float | None = None

    def integers(self, count: int, bits: int) -> NDArray[Any]:
        """Uniform integers below 2**bits: the low 24 bits of one 32-bit draw each, or the low 53 of two."""
        if bits == 24:
            draws: NDArray[Any] = self.random.randint(0, 1 << 32, count, np.uint32)
        else:
            high, low = self.random.randint(0, 1 << 32, (count, 2), np.uint32).astype(np.uint64).T
            draws = high << 32 | low
        draws &= (1 << bits) - 1
        return draws

    def fill_uniform(self, out: NDArray[Any], bound: float) -> None:
        """Fill `out` with uniform numbers in [-bound, bound).

        torch computes fma(k / 2**bits, b - -b, -b), which is b (k - 2**(bits - 1)) / 2**(bits - 1), rounded once. The
        difference is an integer of at most `bits` bits, so it converts exactly, and its plain product with
        b / 2**(bits - 1) rounds the same number once: no fused multiply-add is needed.
        """
        bits = _bits_of(out.dtype)
        half = 1 << (bits - 1)
        scale = out.dtype.type(bound) / out.dtype.type(half)
        flat = out.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            k = self.integers(chunk.size, bits)
            chunk[:] = k.view(np.dtype(f"i{k.itemsize}")) - half
            chunk *= scale

    def fill_kaiming(self, out: NDArray[Any]) -> None:
        """Fill a weight with uniform numbers within 1 / sqrt(fan_in), computed as torch does."""
        gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
        self.fill_uniform(out, math.sqrt(3.0) * (gain / math.sqrt(out.shape[1])))

    def fill_xavier(self, out: NDArray[Any]) -> None:
        """Fill a matrix with uniform numbers whose bound depends on both sizes."""
        fan_out, fan_in = out.shape
        self.fill_uniform(out, math.sqrt(3.0) * math.sqrt(2.0 / (fan_in + fan_out)))

    def fill_normal(self, out: NDArray[Any], std: float) -> None:
        """Fill `out` with normal numbers of mean 0 (Box and Muller, 1958)."""
        flat = out.reshape(-1)
        if flat.size < 16:
            flat[:] = [self.normal() * std for _ in range(flat.size)]
            return
        flat[: flat.size - flat.size % 16] = self.normal_blocks(flat.size, flat.dtype)
        if flat.size % 16:
            flat[-16:] = self.normal_blocks(16, flat.dtype)  # torch draws the last 16 anew, overlapping those before
        flat *= flat.dtype.type(std)

    def normal(self) -> float:
        """One standard normal number, in float64 whatever the dtype. They come in pairs; one waits its turn."""
        if self.spare_normal is not None:
            spare, self.spare_normal = self.spare_normal, None
            return spare
        u1, u2 = (self.integers(2, 53) / 2.0**53).tolist()
        radius = math.sqrt(-2.0 * math.log1p(-u2))
        angle = 2.0 * math.pi * u1
        self.spare_normal = radius * math.sin(angle)
        return radius * math.cos(angle)

    def normal_blocks(self, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Standard normal numbers from `count` draws, in whole blocks of 16: 8 draws for radii, then 8 for angles."""
        bits, real = _bits_of(dtype), dtype.type
        uniform = self.integers(count, bits).astype(dtype) / real(1 << bits)
        blocks = uniform[: count - count % 16].reshape(-1, 2, 8)
        u1 = real(1) - blocks[:, 0]  # in (0, 1], for the logarithm
        angle = real(2 * math.pi) * blocks[:, 1]
        if dtype == np.float32:
            logarithm, cosine, sine = _log(u1), *_cos_sin(angle)
        else:  # torch calls the C library here, as Python does and NumPy does not
            logarithm, cosine, sine = (
                np.vectorize(function, otypes="d")(x)
                for function, x in ((math.log, u1), (math.cos, angle), (math.sin, angle))
            )
        radius = np.sqrt(real(-2) * logarithm)
        return np.stack((radius * cosine, radius * sine), axis=1).reshape(-1)


# torch takes float32 logarithms, sines and cosines from polynomials of the Cephes library (S. L. Moshier) in vector
# code whose products and sums the compiler fuses. The functions below repeat it operation by operation.


def _fma(a: Any, b: Any, c: Any) -> NDArray[Any]:
    """a b + c in float32, through float64, where the product is exact; that the sum rounds twice almost never shows."""
    in_float64: NDArray[np.float64] = np.multiply(a, b, dtype=np.float64) + c
    return in_float64.astype(np.float32)


def _log(x: NDArray[Any]) -> NDArray[Any]:
    m, exponent = np.frexp(x)
    below = m < np.float32(math.sqrt(0.5))
    e = (exponent - below).astype(np.float32)
    m = np.where(below, m + m, m) - np.float32(1)  # x = (1 + m) 2**e
    square = m * m
    y: Any = np.float32(_LOG[0])
    for coefficient in _LOG[1:]:
        y = _fma(y, m, np.float32(coefficient))
    y = _fma(y * m, square, e * np.float32(_LN2_LOW)) - np.float32(0.5) * square
    return _fma(e, np.float32(_LN2_HIGH), m + y)


def _cos_sin(angle: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    octant = ((angle * np.float32(4 / math.pi)).astype(np.int32) + 1) & ~1
    x = angle
    for part in _QUARTER_PI:  # x = angle - octant pi / 4, in [-pi / 4, pi / 4]
        x = _fma(octant, -np.float32(part), x)
    square = x * x
    cosine: Any = np.float32(_COS[0])
    sine: Any = np.float32(_SIN[0])
    for of_cosine, of_sine in zip(_COS[1:], _SIN[1:]):
        cosine = _fma(cosine, square, np.float32(of_cosine))
        sine = _fma(sine, square, np.float32(of_sine))
    cosine = _fma(cosine * square, square, np.float32(-0.5) * square) + np.float32(1)
    sine = _fma(sine * square, x, x)
    swapped = octant & 2 != 0
    cosine, sine = np.where(swapped, sine, cosine), np.where(swapped, cosine, sine)
    return np.where((octant + 2) & 4, -cosine, cosine), np.where(octant & 4, -sine, sine)


_LOG: Final = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_LN2_HIGH: Final = 0.693359375
_LN2_LOW: Final = -2.12194440e-4
_COS: Final = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_SIN: Final = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_QUARTER_PI: Final = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)
