# SPDX-License-Identifier: Apache-2.0
"""The widths of a layer, the shapes that follow from them, and one immutable set of parameters."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from mha_c import _core
from mha_c._typing import Self
from mha_c.parameters.checks import number, positive, size
from mha_c.parameters.dtypes import is_real
from mha_c.parameters.quantization import (
    ATTENTION,
    Precision,
    Quantized,
    Weight,
    check_quantized,
    dequantize,
    multiplied,
    own_products,
    take_rows,
)

__all__ = ["PARAMETERS", "SEPARATE_WEIGHTS", "ArraySet", "ParameterSet", "Widths"]

SEPARATE_WEIGHTS: Final = ("q_proj_weight", "k_proj_weight", "v_proj_weight")

# All that a layer can have, in the order of torch's state dict.
PARAMETERS: Final = (
    "in_proj_weight", *SEPARATE_WEIGHTS, "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias"
)

_Three: TypeAlias = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]

_NO_PRECISIONS: Final[Mapping[str, Precision]] = MappingProxyType({})
_Stacked = TypeVar("_Stacked", NDArray[Any], Weight)
_ALIGNMENT: Final = 8  # of each array in the buffer of a set, in bytes


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
        num_heads = positive("num_heads", num_heads if num_heads % 1 else int(num_heads))
        kdim = embed_dim if kdim is None else size("kdim", kdim)
        vdim = embed_dim if vdim is None else size("vdim", vdim)
        kv_heads = num_heads if num_kv_heads is None else positive("num_kv_heads", num_kv_heads)
        if num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, but {kv_heads} does not divide {num_heads}")
        head_dim = embed_dim // num_heads if head_dim is None else positive("head_dim", head_dim)
        return cls(
            embed_dim=embed_dim,
            kdim=kdim,
            vdim=vdim,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim if v_head_dim is None else positive("v_head_dim", v_head_dim),
            out_dim=embed_dim if out_dim is None else positive("out_dim", out_dim),
        )

    @property
    def is_stacked(self) -> bool:
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
        if self.is_stacked:
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

    @property
    def products(self) -> dict[str, tuple[str, ...]]:
        """The names in `matmul_precision`: linear maps with the parameters that are their weights, and attention."""
        return {
            "in_proj": ("in_proj_weight",) if self.is_stacked else SEPARATE_WEIGHTS,
            ATTENTION: (ATTENTION,),
            "out_proj": ("out_proj.weight",),
        }

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


def _ways_to_divide(embed_dim: int, num_heads: int) -> str:
    if num_heads % 1:
        return f"num_heads must be an int, but got {num_heads!r}"
    lower = embed_dim // num_heads * num_heads
    upper = lower + num_heads
    choices = f"{lower} or {upper}" if lower else f"{upper}"
    return f"Choose embed_dim={choices} for {num_heads} heads, or give the heads a width of their own with head_dim=..."


class ArraySet:
    """One immutable set of parameters, as read-only arrays.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray or Quantized
        The parameters by name, in the order of the state dict.
    dtype : numpy.dtype
        That of the layer, to which the arrays are cast.
    precisions : mapping of str to {"float32", "bfloat16", "int8"}, default {}
        What products with a weight read, and those of attention. Products of a name that is absent are those of the
        layer's dtype. A quantized weight that is not "int8" becomes an array.

    Attributes
    ----------
    stored : dict of str to numpy.ndarray or Quantized
        Views of one `bytes` object, which is why NumPy refuses to make them writable; new ones each time, since whoever
        has an array may assign to its shape.
    arrays : dict of str to numpy.ndarray
        The same, with the numbers that quantized weights stand for, in the dtype of the layer.
    shapes : mapping of str to tuple of int
        Their shapes.

    Raises
    ------
    ValueError
        If a parameter does not consist of real numbers, a quantized one is not what `quantize` makes of finite numbers,
        or there are precisions in float64.

    Examples
    --------
    >>> ArraySet({"weight": np.ones(2)}, np.dtype("float32")).arrays
    {'weight': array([1., 1.], dtype=float32)}
    """

    __slots__ = ("_buffer", "_quantized", "dtype", "precisions", "shapes")

    def __init__(
        self,
        arrays: Mapping[str, Weight],
        dtype: np.dtype[Any],
        precisions: Mapping[str, Precision] = _NO_PRECISIONS,
    ) -> None:
        if precisions and dtype == np.float64:
            raise ValueError(
                "matmul_precision is for layers of float32, bfloat16 and float16, but this one is float64: products "
                "of narrower numbers are less accurate; set matmul_precision=None first"
            )
        self.dtype = dtype
        self.precisions = MappingProxyType(dict(precisions))
        kept = {name: self._cast(name, one) for name, one in arrays.items()}
        self.shapes = MappingProxyType({name: one.shape for name, one in kept.items()})
        self._quantized = frozenset(name for name, one in kept.items() if isinstance(one, Quantized))
        parts = [part for one in kept.values() for part in (one if isinstance(one, Quantized) else (one,))]
        # As bytes: the buffer protocol has no bfloat16.
        contents = [(part.reshape(-1).view(np.uint8).data, bytes(-part.nbytes % _ALIGNMENT)) for part in parts]
        self._buffer = b"".join(itertools.chain.from_iterable(contents))

    def _cast(self, name: str, one: Weight) -> Weight:
        """A parameter as it is kept."""
        if isinstance(one, Quantized):
            check_quantized(name, one)
            if self.precisions.get(name) == "int8":
                return Quantized(np.ascontiguousarray(one.numbers), np.ascontiguousarray(one.scales))
            one = dequantize(one, self.dtype)
        if not is_real(one.dtype):
            raise ValueError(f"{name}: expected real numbers, but got {one.dtype}")
        with np.errstate(all="ignore"):  # a float64 beyond float32 becomes inf, as in torch
            return np.asarray(one, self.dtype, order="C")

    @property
    def stored(self) -> dict[str, Weight]:
        """The parameters as they are kept, by name, in the order of the state dict."""
        start = 0

        def view(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
            nonlocal start
            array: NDArray[Any] = np.ndarray(shape, dtype, self._buffer, start)
            start += array.nbytes + -array.nbytes % _ALIGNMENT
            return array

        views: dict[str, Weight] = {}
        for name, shape in self.shapes.items():
            if name in self._quantized:
                views[name] = Quantized(view(shape, np.int8), view(shape[:1], np.float32))
            else:
                views[name] = view(shape, self.dtype)
        return views

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The parameters as arrays by name, in the order of the state dict."""
        return {name: self._as_array(one) for name, one in self.stored.items()}

    def array(self, name: str) -> NDArray[Any] | None:
        """One parameter; None if there is none of this name."""
        one = self.stored.get(name)
        return None if one is None else self._as_array(one)

    def _as_array(self, one: Weight) -> NDArray[Any]:
        return dequantize(one, self.dtype) if isinstance(one, Quantized) else one

    def for_core(self, name: str) -> Any:
        """A weight as the core takes it."""
        return multiplied(self.stored[name], self.precisions.get(name))

    def products_of(self, name: str) -> str:
        """The numbers that products with a weight read, or attention's own."""
        return self.precisions.get(name) or own_products(self.dtype)

    def with_changes(
        self,
        arrays: Mapping[str, NDArray[Any]] = MappingProxyType({}),
        dtype: np.dtype[Any] | None = None,
        precisions: Mapping[str, Precision] | None = None,
    ) -> Self:
        """A set with some arrays in the place of those of their names, and perhaps of another dtype or precision."""
        return self._remade(
            {**self.stored, **arrays}, dtype or self.dtype, self.precisions if precisions is None else precisions
        )

    def _remade(self, *arguments: Any) -> Self:
        return type(self)(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.stored, self.dtype, dict(self.precisions))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing in it can change


class ParameterSet(ArraySet):
    """The parameters of an attention layer: as read-only arrays, and packed for the kernels.

    Parameters
    ----------
    widths : Widths
        The widths of the layer.
    arrays : mapping of str to numpy.ndarray or Quantized
        The parameters by name, of the shapes that `widths` asks for, in the order of the state dict.
    dtype, precisions
        As for `ArraySet`.

    Attributes
    ----------
    weights : mha_c._core.Weights
        What the forward pass reads.
    """

    __slots__ = ("weights", "widths")

    def __init__(
        self,
        widths: Widths,
        arrays: Mapping[str, Weight],
        dtype: np.dtype[Any],
        precisions: Mapping[str, Precision] = _NO_PRECISIONS,
    ) -> None:
        super().__init__(arrays, dtype, precisions)
        self.widths = widths
        self.weights = _core.Weights(
            widths.num_heads,
            widths.num_kv_heads,
            widths.head_dim,
            widths.v_head_dim,
            dtype,
            *self._inputs_for_core(),
            self.array("in_proj_bias"),
            self.array("bias_k"),
            self.array("bias_v"),
            self.for_core("out_proj.weight"),
            self.array("out_proj.bias"),
            self.precisions.get(ATTENTION),
        )

    def _remade(self, *arguments: Any) -> Self:
        return type(self)(self.widths, *arguments)

    def _inputs_for_core(self, rows: Sequence[Any] = (slice(None),) * 3) -> tuple[Any, Any, Any]:
        """Some rows of the weights that project query, key and value, as the core takes them."""
        names = ("in_proj_weight",) * 3 if self.widths.is_stacked else SEPARATE_WEIGHTS
        stored = self.stored
        weights = self._split(stored[names[0]]) if self.widths.is_stacked else (stored[name] for name in names)
        q, k, v = (
            multiplied(take_rows(weight, chosen), self.precisions.get(name))
            for weight, chosen, name in zip(weights, rows, names)
        )
        return q, k, v

    @property
    def input_weights(self) -> _Three:
        """The weights that project query, key and value, whether they are stored as one parameter or as three."""
        arrays = self.arrays
        if self.widths.is_stacked:
            q, k, v = self._split(arrays["in_proj_weight"])
        else:
            q, k, v = (arrays[name] for name in SEPARATE_WEIGHTS)
        return q, k, v

    @property
    def input_biases(self) -> _Three | None:
        """The three biases that belong to them, where there are any."""
        stacked = self.array("in_proj_bias")
        if stacked is None:
            return None
        q, k, v = self._split(stacked)
        return q, k, v

    def _split(self, stacked: _Stacked) -> Iterator[_Stacked]:
        """The rows of query, key and value."""
        q_rows, k_rows, _ = self.widths.rows
        parts = slice(0, q_rows), slice(q_rows, q_rows + k_rows), slice(q_rows + k_rows, None)
        return (take_rows(stacked, part) for part in parts)

    def weights_of_heads(self, heads: Sequence[int]) -> _core.Weights:
        """Packed parameters of some query heads alone, each with a key and value head of its own; without an output."""
        widths = self.widths
        groups = widths.num_heads // widths.num_kv_heads
        kv_heads = [head // groups for head in heads]
        parts = ((widths.head_dim, heads), (widths.head_dim, kv_heads), (widths.v_head_dim, kv_heads))
        rows = [(np.array(chosen)[:, None] * width + np.arange(width)).reshape(-1) for width, chosen in parts]
        biases = self.input_biases
        learnt = [self.array(name) for name in ("bias_k", "bias_v")]
        bias_k, bias_v = (None if one is None else one[:, :, chosen] for one, chosen in zip(learnt, rows[1:]))
        return _core.Weights(
            len(heads),
            len(heads),
            widths.head_dim,
            widths.v_head_dim,
            self.dtype,
            *self._inputs_for_core(rows),
            None if biases is None else np.concatenate([bias[chosen] for bias, chosen in zip(biases, rows)]),
            bias_k,
            bias_v,
            np.zeros((1, len(heads) * widths.v_head_dim), self.dtype),
            None,
            self.precisions.get(ATTENTION),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return ParameterSet, (self.widths, self.stored, self.dtype, dict(self.precisions))
