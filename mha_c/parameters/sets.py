# SPDX-License-Identifier: Apache-2.0
"""The widths of a layer, the shapes that follow from them, and one immutable set of parameters."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mha_c import _core
from mha_c.parameters.dtypes import is_real

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PARAMETERS", "SEPARATE_WEIGHTS", "ArraySet", "ParameterSet", "Widths", "integer", "number"]

SEPARATE_WEIGHTS: Final = ("q_proj_weight", "k_proj_weight", "v_proj_weight")

# All that a layer can have, in the order of torch's state dict.
PARAMETERS: Final = (
    "in_proj_weight", *SEPARATE_WEIGHTS, "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias"
)

_Three: TypeAlias = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


class Widths(NamedTuple):
    """Every width of a layer; torch ties the last four to the others.

    Examples
    --------
    >>> widths = Widths.from_arguments(embed_dim=10, num_heads=4, head_dim=2, out_dim=8)
    >>> widths.shapes(bias=False, bias_kv=False)
    {'in_proj_weight': (24, 10), 'out_proj.weight': (8, 8)}
    """

    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    out_dim: int

    @classmethod
    def from_arguments(
        cls,
        embed_dim: int,
        num_heads: int,
        kdim: int | None = None,
        vdim: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        out_dim: int | None = None,
        num_kv_heads: int | None = None,
    ) -> Widths:
        """Check the constructor's arguments, in torch's order and with its errors, and fill in what is None."""
        if number("embed_dim", embed_dim, "an int") <= 0 or number("num_heads", num_heads, "an int") <= 0:
            raise ValueError(
                "embed_dim and num_heads must be greater than 0, "
                f"got embed_dim={embed_dim} and num_heads={num_heads} instead"
            )
        if head_dim is None and embed_dim % num_heads:
            raise AssertionError(f"embed_dim must be divisible by num_heads. {_ways_to_divide(embed_dim, num_heads)}")
        if isinstance(embed_dim, bool) or not hasattr(embed_dim, "__index__"):
            raise TypeError(f"embed_dim must be an int, but got {embed_dim!r}")
        embed_dim = operator.index(embed_dim)
        num_heads = positive("num_heads", int(num_heads) if int(num_heads) == num_heads else num_heads)
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None and integer(name, width) < 0:
                raise RuntimeError(f"Trying to create tensor with negative dimension {width}: {name} is negative")
        kv_heads = num_heads if num_kv_heads is None else positive("num_kv_heads", num_kv_heads)
        if num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, but {kv_heads} does not divide {num_heads}")
        head_dim = embed_dim // num_heads if head_dim is None else positive("head_dim", head_dim)
        return cls(
            embed_dim=embed_dim,
            kdim=embed_dim if kdim is None else operator.index(kdim),
            vdim=embed_dim if vdim is None else operator.index(vdim),
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim if v_head_dim is None else positive("v_head_dim", v_head_dim),
            out_dim=embed_dim if out_dim is None else positive("out_dim", out_dim),
        )

    @property
    def packed(self) -> bool:
        """Whether in_proj_weight holds the input projections, stacked; else they are three parameters."""
        return self.kdim == self.vdim == self.embed_dim

    @property
    def rows(self) -> tuple[int, int, int]:
        """Output features of the query, key and value projections."""
        return (
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
            self.num_kv_heads * self.v_head_dim,
        )

    def beyond_torch(self) -> dict[str, int]:
        """The widths that torch would tie to others, by name; none if torch has such a layer."""
        head_dim = self.embed_dim / self.num_heads
        torchs = {
            "num_kv_heads": self.num_heads,
            "head_dim": head_dim,
            "v_head_dim": head_dim,
            "out_dim": self.embed_dim,
        }
        return {name: getattr(self, name) for name, width in torchs.items() if getattr(self, name) != width}

    def shapes(self, bias: bool, bias_kv: bool) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters by name, in the order of torch's state dict."""
        q, k, v = self.rows
        shapes: dict[str, tuple[int, ...]] = {}
        if self.packed:
            shapes["in_proj_weight"] = (q + k + v, self.embed_dim)
        else:
            shapes["q_proj_weight"] = (q, self.embed_dim)
            shapes["k_proj_weight"] = (k, self.kdim)
            shapes["v_proj_weight"] = (v, self.vdim)
        if bias:
            shapes["in_proj_bias"] = (q + k + v,)
        if bias_kv:
            shapes["bias_k"] = (1, 1, k)
            shapes["bias_v"] = (1, 1, v)
        shapes["out_proj.weight"] = (self.out_dim, self.num_heads * self.v_head_dim)
        if bias:
            shapes["out_proj.bias"] = (self.out_dim,)
        return shapes

    def axes(self) -> dict[str, str]:
        """What the axes of each parameter count, in the letters of ARCHITECTURE.md."""
        kv = "H" if self.num_kv_heads == self.num_heads else "Hkv"
        dv = "D" if self.v_head_dim == self.head_dim else "Dv"
        q, k, v = "H·D", f"{kv}·D", f"{kv}·{dv}"
        stacked = " + ".join((q, k, v)) if len({q, k, v}) > 1 else f"3·{q}"
        out = "E" if self.out_dim == self.embed_dim else "Eo"
        return {
            "in_proj_weight": f"({stacked}, E)",
            "q_proj_weight": f"({q}, E)",
            "k_proj_weight": f"({k}, Ek)",
            "v_proj_weight": f"({v}, Ev)",
            "in_proj_bias": f"({stacked},)",
            "bias_k": f"(1, 1, {k})",
            "bias_v": f"(1, 1, {v})",
            "out_proj.weight": f"({out}, H·{dv})",
            "out_proj.bias": f"({out},)",
        }


def number(name: str, value: Any, expected: str = "a number") -> Any:
    """The value of an argument that must be a real number."""
    try:
        math.fabs(value)
    except TypeError:
        raise TypeError(f"{name} must be {expected}, but got {value!r}") from None
    return value


def integer(name: str, value: Any) -> int:
    """The value of an argument that must be an int, or something that stands for one."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, but got {value!r}") from None


def positive(name: str, value: Any) -> int:
    """The value of an argument that must be an int above 0."""
    if integer(name, value) <= 0:
        raise ValueError(f"{name} must be greater than 0, but got {value}")
    return operator.index(value)


def _ways_to_divide(embed_dim: int, num_heads: int) -> str:
    if num_heads != int(num_heads):
        return f"num_heads must be an int, but got {num_heads!r}"
    lower = embed_dim // num_heads * num_heads
    upper = lower + num_heads
    choices = f"{lower} or {upper}" if lower else f"{upper}"
    return f"Choose embed_dim={choices} for {num_heads} heads, or give the heads a width of their own with head_dim=..."


class ArraySet:
    """One immutable set of parameters, as read-only arrays.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray
        The parameters by name, in the order of the state dict.
    dtype : numpy.dtype
        That of the layer, to which the arrays are cast.

    Attributes
    ----------
    arrays : dict of str to numpy.ndarray
        Views of one `bytes` object, which is why NumPy refuses to make them writable; new ones each time, since whoever
        has an array may assign to its shape.

    Examples
    --------
    >>> ArraySet({"weight": np.ones(2)}, np.dtype("float32")).arrays
    {'weight': array([1., 1.], dtype=float32)}
    """

    __slots__ = ("_buffer", "_shapes", "dtype")

    def __init__(self, arrays: Mapping[str, NDArray[Any]], dtype: np.dtype[Any]) -> None:
        for name, array in arrays.items():
            if not is_real(array.dtype):
                raise ValueError(f"{name}: expected real numbers, but got {array.dtype}")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, as in torch
            cast = {name: np.asarray(array, dtype, order="C") for name, array in arrays.items()}
        self.dtype = dtype
        # NumPy's bfloat16 is not in the buffer protocol
        self._buffer = b"".join(array.reshape(-1).view(np.uint8).data for array in cast.values())
        self._shapes = {name: array.shape for name, array in cast.items()}

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The parameters by name, in the order of the state dict."""
        views: dict[str, NDArray[Any]] = {}
        start = 0
        for name, shape in self._shapes.items():
            views[name] = np.ndarray(shape, self.dtype, self._buffer, start)
            start += views[name].nbytes
        return views

    def with_arrays(self, arrays: Mapping[str, NDArray[Any]], dtype: np.dtype[Any] | None) -> Self:
        """A set with some arrays in the place of those of their names, and perhaps of another dtype."""
        return type(self)({**self.arrays, **arrays}, dtype or self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.arrays, self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing in it can change


class ParameterSet(ArraySet):
    """The parameters of an attention layer: as read-only arrays, and packed for the kernels.

    Parameters
    ----------
    widths : Widths
        The widths of the layer.
    arrays : mapping of str to numpy.ndarray
        The parameters by name, of the shapes that `widths` asks for, in the order of the state dict.
    dtype : numpy.dtype
        That of the layer, to which the arrays are cast.

    Attributes
    ----------
    weights : mha_c._core.Weights
        What the forward pass reads.
    """

    __slots__ = ("weights", "widths")

    def __init__(self, widths: Widths, arrays: Mapping[str, NDArray[Any]], dtype: np.dtype[Any]) -> None:
        super().__init__(arrays, dtype)
        self.widths = widths
        views = self.arrays
        self.weights = _core.Weights(
            widths.num_heads,
            widths.num_kv_heads,
            widths.head_dim,
            widths.v_head_dim,
            dtype.name,
            *self.input_weights,
            views.get("in_proj_bias"),
            views.get("bias_k"),
            views.get("bias_v"),
            views["out_proj.weight"],
            views.get("out_proj.bias"),
        )

    def with_arrays(self, arrays: Mapping[str, NDArray[Any]], dtype: np.dtype[Any] | None) -> Self:
        return type(self)(self.widths, {**self.arrays, **arrays}, dtype or self.dtype)

    @property
    def input_weights(self) -> _Three:
        """The weights that project query, key and value, whether they are stored as one parameter or as three."""
        if self.widths.packed:
            return self._split(self.arrays["in_proj_weight"])
        return self.arrays["q_proj_weight"], self.arrays["k_proj_weight"], self.arrays["v_proj_weight"]

    @property
    def input_biases(self) -> _Three | None:
        """The three biases that belong to them, where there are any."""
        return self._split(self.arrays["in_proj_bias"]) if "in_proj_bias" in self.arrays else None

    def _split(self, stacked: NDArray[Any]) -> _Three:
        q_rows, k_rows, _ = self.widths.rows
        q, k, v = np.split(stacked, (q_rows, q_rows + k_rows))
        return q, k, v

    def weights_of_heads(self, heads: Sequence[int]) -> _core.Weights:
        """Packed parameters of some query heads alone, each with a key and value head of its own; without an output."""
        widths = self.widths
        groups = widths.num_heads // widths.num_kv_heads
        kv_heads = [head // groups for head in heads]

        def rows_of(stacked: NDArray[Any], width: int, chosen: Sequence[int]) -> NDArray[Any]:
            by_head = stacked.reshape(len(stacked) // width, width, *stacked.shape[1:])
            return by_head[list(chosen)].reshape(len(chosen) * width, *stacked.shape[1:])

        parts = ((widths.head_dim, heads), (widths.head_dim, kv_heads), (widths.v_head_dim, kv_heads))
        q, k, v = (rows_of(weight, *part) for weight, part in zip(self.input_weights, parts))
        biases = self.input_biases
        learnt = [self.arrays.get(name) for name in ("bias_k", "bias_v")]
        bias_k, bias_v = (
            None if one is None else rows_of(one[0, 0], *part)[None, None] for one, part in zip(learnt, parts[1:])
        )
        return _core.Weights(
            len(heads),
            len(heads),
            widths.head_dim,
            widths.v_head_dim,
            self.dtype.name,
            q,
            k,
            v,
            None if biases is None else np.concatenate([rows_of(bias, *part) for bias, part in zip(biases, parts)]),
            bias_k,
            bias_v,
            np.zeros((1, len(heads) * widths.v_head_dim), self.dtype),
            None,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return ParameterSet, (self.widths, self.arrays, self.dtype)
