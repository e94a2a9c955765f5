# SPDX-License-Identifier: Apache-2.0
"""Parameters of torch, packed for the kernels and kept until they change. Imported through mha_c.torch.

Packing takes as long as a small call, so it is not done in each one. torch counts most changes of a tensor in its
`_version`, but not all: fused optimisers and writes through ``.data``, NumPy or shared memory are not counted. So every
call compares the tensors' identities, versions and memory, and some of their numbers; and every step of any optimiser
drops what is packed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_post_hook

from mha_c import _core
from mha_c.parameters.quantization import (
    PRODUCTS,
    PRODUCTS_OF_ATTENTION,
    Precision,
    multiplied,
    precision_of_products,
    precision_of_weights,
)
from mha_c.parameters.sets import SEPARATE_WEIGHTS, ParameterSet, Widths
from mha_c.torch.reasons import DTYPES, PLAIN_TENSORS
from mha_c.torch.tensors import array_of

__all__ = ["AttentionShape", "LayerFacts", "LayerParts", "PackedByWeight", "PackedLayer", "PackedParameters"]

_Arrays: TypeAlias = Mapping[str, NDArray[Any]]
_Precisions: TypeAlias = Mapping[str, Precision | None]  # of each product by its name in `matmul_precision`
_Pack: TypeAlias = Callable[[dict[str, NDArray[Any]], Any, _Precisions], Any]

_OWN: Final = precision_of_products(None, PRODUCTS)

_SEPARATE_BIASES = ("q_proj_bias", "k_proj_bias", "v_proj_bias")

_last_step = object()  # another one after each step of any optimiser


def _note_step(*_: object) -> None:
    global _last_step
    _last_step = object()


register_optimizer_step_post_hook(_note_step)


class _Source(NamedTuple):
    """One tensor as it was when it was packed."""

    tensor: torch.Tensor  # torch.utils.swap_tensors refuses tensors with weak references
    memory: torch.Tensor  # keeps the storage from being freed and reused: the same address is the same memory
    address: int
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Source:
        return cls(tensor, tensor.detach(), tensor.data_ptr(), tensor._version)

    def is_now(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is the same object, in the same memory, and torch has counted no change."""
        return (
            tensor is self.tensor
            and tensor.is_set_to(self.memory)
            and tensor.dtype == self.memory.dtype
            and tensor._version == self.version
        )

    def has_moved(self) -> bool:
        """Whether the storage has another memory now, as after share_memory_(): what it had is freed."""
        return self.memory.data_ptr() != self.address


class _Kept(NamedTuple):
    """Packed parameters, and all that shows whether they are still right."""

    parameters: Any
    arguments: object
    sources: dict[str, _Source]
    arrays: tuple[NDArray[Any], ...]  # the sources' memory
    sample: bytes
    biases: dict[str, bytes]  # their numbers
    generation: tuple[object, object]

    def is_of(self, tensors: Mapping[str, torch.Tensor], arguments: object) -> bool:
        """Whether these would be packed to the same numbers again, as far as can be seen in some microseconds."""
        if arguments != self.arguments or tensors.keys() != self.sources.keys():
            return False
        for name, source in self.sources.items():
            tensor = tensors[name]
            if source.has_moved() or not (source.is_now(tensor) or self.has_equal_bias(name, tensor)):
                return False
        return _core.sample(self.arrays) == self.sample

    def has_equal_bias(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a bias that was made for this call has the same numbers, of which there are few."""
        return (
            name in self.biases
            and _is_plain(tensor)
            and tensor.dtype == self.sources[name].memory.dtype
            and array_of(tensor).tobytes() == self.biases[name]
        )


class _Packed:
    """Parameters that are packed when they are needed, and kept until they change."""

    def __init__(self, precisions: _Precisions = _OWN) -> None:
        self.precisions = precisions
        self._kept: _Kept | None = None
        self._last_drop = object()

    def _get(self, tensors: Mapping[str, torch.Tensor], arguments: Any, pack: _Pack) -> Any:
        """What `pack` makes of the tensors, as arrays, and the arguments; the last result if nothing has changed."""
        generation = _last_step, self._last_drop
        kept = self._kept
        if kept is None or kept.generation != generation or not kept.is_of(tensors, arguments):
            # Another thread may be doing the same; whichever ends last is kept, and both are right.
            is_too_wide = self._is_too_wide(tensors)
            self._kept = kept = None if is_too_wide else _keep(tensors, arguments, generation, pack, self.precisions)
        return None if kept is None else kept.parameters

    def drop(self) -> None:
        """Forget what is packed; the next call packs anew.

        Examples
        --------
        >>> PackedParameters().drop()
        """
        self._last_drop = object()  # for a thread that is packing at this moment
        self._kept = None

    def multiply_in(self, precisions: Mapping[str, Precision | None]) -> None:
        """Have products in these precisions from the next call on, by their names in `matmul_precision`.

        Examples
        --------
        >>> PackedParameters().multiply_in({"in_proj": "int8", "attention": None, "out_proj": "int8"})
        """
        self.precisions = precisions
        self.drop()

    def why_not(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """The reason why parameters cannot be packed, in a few words.

        Examples
        --------
        >>> PackedParameters().why_not({"in_proj_weight": torch.zeros(24)})
        'unusual parameters'
        """
        if any(tensor.is_inference() for tensor in tensors.values()):
            return "parameters made in inference mode"
        return "matmul_precision in float64" if self._is_too_wide(tensors) else "unusual parameters"

    def _is_too_wide(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        return any(self.precisions.values()) and any(one.dtype == torch.float64 for one in tensors.values())

    def is_in_use(self) -> bool:
        """Whether anything else refers to the output projection's weight that was packed.

        Examples
        --------
        >>> PackedParameters().is_in_use()
        False
        """
        kept = self._kept
        return kept is not None and sys.getrefcount(kept.sources["out_proj.weight"].tensor) > 2


class PackedParameters(_Packed):
    """The parameters of one attention layer, or of one call of a function, packed when they are needed.

    Examples
    --------
    >>> packed = PackedParameters()
    >>> module = torch.nn.MultiheadAttention(8, 2, bias=False)
    >>> tensors = {"in_proj_weight": module.in_proj_weight, "out_proj.weight": module.out_proj.weight}
    >>> parameters = packed.get(tensors, 8, 2)
    >>> packed.get(tensors, 8, 2) is parameters
    True
    >>> module.in_proj_weight.data.fill_(1.0).sum()
    tensor(192.)
    >>> packed.get(tensors, 8, 2) is parameters
    False
    """

    def get(
        self,
        tensors: Mapping[str, torch.Tensor],
        embed_dim: int,
        num_heads: int,
        kdim: int | None = None,
        vdim: int | None = None,
    ) -> ParameterSet | None:
        """The packed parameters; those of the last call if nothing has changed.

        Parameters
        ----------
        tensors : mapping of str to torch.Tensor
            The parameters by the names of torch's state dict, without those that are None.
        embed_dim, num_heads, kdim, vdim
            As for ``torch.nn.MultiheadAttention``. The width of the output is that of ``out_proj.weight``.

        Returns
        -------
        ParameterSet or None
            None if mha_c has no layer with such parameters: other dtypes, devices, shapes or kinds of tensors, or
            tensors made in inference mode, whose changes torch does not count.

        Examples
        --------
        >>> tensors = {"in_proj_weight": torch.zeros(24, 8), "out_proj.weight": torch.zeros(6, 8)}
        >>> PackedParameters().get(tensors, 8, 2).widths.out_dim
        6
        """
        shape = AttentionShape(embed_dim, num_heads, kdim, vdim)
        found: ParameterSet | None = self._get(tensors, shape, _pack_attention)
        return found


class AttentionShape(NamedTuple):
    """What the parameters of attention do not say; as for ``torch.nn.MultiheadAttention``, and the width of a head.

    Examples
    --------
    >>> AttentionShape(8, 2).num_heads
    2
    """

    embed_dim: int
    num_heads: int
    kdim: int | None = None
    vdim: int | None = None
    head_dim: int | None = None


class LayerFacts(NamedTuple):
    """What the parameters of a layer of an encoder or a decoder do not say.

    Attributes
    ----------
    attentions : tuple of AttentionShape
        One for an encoder, two for a decoder.
    eps : tuple of float
        Of each norm.

    Examples
    --------
    >>> LayerFacts((AttentionShape(8, 2),), (1e-5, 1e-5)).eps
    (1e-05, 1e-05)
    """

    attentions: tuple[AttentionShape, ...]
    eps: tuple[float, ...]


class LayerParts(NamedTuple):
    """The parts of a layer as the core takes them.

    Attributes
    ----------
    attentions : tuple of mha_c._core.Weights
        The attentions, in their order.
    norms : tuple of tuple
        The norms, in their order.
    linear1, linear2 : mha_c._core.Linear
        The feed-forward network.

    Examples
    --------
    >>> LayerParts._fields
    ('attentions', 'norms', 'linear1', 'linear2')
    """

    attentions: tuple[_core.Weights, ...]
    norms: tuple[tuple[NDArray[Any] | None, NDArray[Any] | None, float, bool], ...]
    linear1: _core.Linear
    linear2: _core.Linear


class PackedLayer(_Packed):
    """The parameters of a layer of an encoder or a decoder, packed when they are needed.

    Examples
    --------
    >>> facts = LayerFacts((AttentionShape(8, 2),), (1e-5, 1e-5))
    >>> PackedLayer().get({"attention0.in_proj_weight": torch.zeros(24, 8)}, facts) is None
    True
    """

    def get(self, tensors: Mapping[str, torch.Tensor], facts: LayerFacts) -> LayerParts | None:
        """The packed parameters; those of the last call if nothing has changed.

        Parameters
        ----------
        tensors : mapping of str to torch.Tensor
            The parameters, without those that are None. The names of a part begin with "attention0.", "attention1.",
            "norm0.", "norm1.", "norm2.", "linear1." or "linear2.". Those of attention go on as in torch's state dict.
            Three biases, "q_proj_bias", "k_proj_bias" and "v_proj_bias", may stand for "in_proj_bias".
        facts : LayerFacts
            The rest.

        Returns
        -------
        LayerParts or None
            None for the same reasons as in `PackedParameters.get`.

        Examples
        --------
        >>> tensors = {"attention0.in_proj_weight": torch.zeros(24, 8), "attention0.out_proj.weight": torch.zeros(8, 8)}
        >>> tensors |= {"linear1.weight": torch.zeros(9, 8), "linear2.weight": torch.zeros(8, 9)}
        >>> len(PackedLayer().get(tensors, LayerFacts((AttentionShape(8, 2),), (1e-5, 1e-5))).norms)
        2
        """
        found: LayerParts | None = self._get(tensors, facts, _pack_layer)
        return found


def _keep(
    tensors: Mapping[str, torch.Tensor],
    arguments: Any,
    generation: tuple[object, object],
    pack: _Pack,
    precisions: _Precisions,
) -> _Kept | None:
    """Versions and samples are taken before the numbers, so that the next call notices a change in between."""
    if not all(_is_plain(one) for one in tensors.values()) or len({one.dtype for one in tensors.values()}) != 1:
        return None
    sources = {name: _Source.of(tensor) for name, tensor in tensors.items()}
    arrays = {name: array_of(source.memory) for name, source in sources.items()}
    memory = tuple(arrays.values())
    sample = _core.sample(memory)
    biases = {name: array.tobytes() for name, array in arrays.items() if name.endswith("bias")}
    parameters = pack(arrays, arguments, precisions)
    return None if parameters is None else _Kept(parameters, arguments, sources, memory, sample, biases, generation)


def _pack_attention(
    arrays: dict[str, NDArray[Any]], shape: AttentionShape, precisions: _Precisions
) -> ParameterSet | None:
    out_weight = arrays.get("out_proj.weight")
    if out_weight is None:
        return None
    out_dim = out_weight.shape[0] if out_weight.ndim == 2 else None
    embed_dim, num_heads, kdim, vdim, head_dim = shape
    try:
        widths = Widths.from_arguments(embed_dim, num_heads, kdim, vdim, head_dim, out_dim=out_dim)
    except (AssertionError, RuntimeError, TypeError, ValueError):  # torch has no such layer, either
        return None
    if not _has_shapes(arrays, _expected_shapes(widths, arrays)):
        return None
    if widths.is_stacked and "in_proj_weight" not in arrays:
        arrays["in_proj_weight"] = np.concatenate([arrays.pop(name) for name in SEPARATE_WEIGHTS])
    own = {name: precisions[name] for name in PRODUCTS_OF_ATTENTION}
    return ParameterSet(widths, arrays, out_weight.dtype, precision_of_weights(own, widths.products))


def _pack_layer(arrays: dict[str, NDArray[Any]], facts: LayerFacts, precisions: _Precisions) -> LayerParts | None:
    linear1, linear2 = _part(arrays, "linear1."), _part(arrays, "linear2.")
    norms = [_part(arrays, f"norm{number}.") for number in range(len(facts.eps))]
    sets = [
        _pack_attention(_attention(arrays, number), shape, precisions)
        for number, shape in enumerate(facts.attentions)
    ]
    attentions = [one for one in sets if one is not None and one.widths.out_dim == one.widths.embed_dim]
    if len(attentions) < len(sets) or not linear1.keys() & linear2.keys() >= {"weight"}:
        return None
    features, hidden = attentions[-1].widths.embed_dim, linear1["weight"].shape[:1]
    maps = [(linear1, (*hidden, features)), (linear2, (features, *hidden))]
    for part, shape in [*maps, *((norm, (features,)) for norm in norms)]:
        if not _has_shapes(part, {name: shape if name == "weight" else shape[:1] for name in part}):
            return None
    return LayerParts(
        tuple(one.weights for one in attentions),
        tuple((_copy(norm, "weight"), _copy(norm, "bias"), eps, False) for norm, eps in zip(norms, facts.eps)),
        *(
            _core.Linear(
                linear["weight"].dtype, multiplied(_copy(linear, "weight"), precisions[name]), _copy(linear, "bias")
            )
            for name, linear in (("linear1", linear1), ("linear2", linear2))
        ),
    )


def _part(arrays: _Arrays, prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _attention(arrays: _Arrays, number: int) -> dict[str, NDArray[Any]]:
    part = _part(arrays, f"attention{number}.")
    biases = [part.pop(name) for name in _SEPARATE_BIASES if name in part]
    return {**part, "in_proj_bias": np.concatenate(biases)} if biases else part


def _copy(part: _Arrays, name: str) -> Any:
    return part[name].copy() if name in part else None


def _has_shapes(arrays: _Arrays, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return {name: array.shape for name, array in arrays.items()} == shapes


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether NumPy can read the tensor where it lies, and torch counts its changes."""
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.dtype in DTYPES
        and tensor.is_cpu
        and tensor.layout == torch.strided
        and not tensor.is_inference()
        and not tensor.is_neg()
    )


def _expected_shapes(widths: Widths, names: Container[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's parameters, of the optional ones among `names` alone."""
    shapes = widths.shapes(bias=True, bias_kv="bias_k" in names or "bias_v" in names)
    if widths.is_stacked and "q_proj_weight" in names:  # separate, although the widths are the same
        del shapes["in_proj_weight"]
        shapes |= {name: (rows, widths.embed_dim) for name, rows in zip(SEPARATE_WEIGHTS, widths.rows)}
    return {name: shape for name, shape in shapes.items() if name in names or not name.endswith("bias")}


class PackedByWeight:
    """Packed parameters for calls of functions, found again by one of the tensors that are passed.

    Examples
    --------
    >>> packed = PackedByWeight()
    >>> weight = torch.zeros(8, 8)
    >>> packed.of(weight) is packed.of(weight)
    True
    """

    def __init__(self) -> None:
        self._by_id: dict[int, PackedParameters] = {}

    def of(self, weight: torch.Tensor) -> PackedParameters:
        """The packed parameters that belong to a tensor.

        Parameters
        ----------
        weight : torch.Tensor
            The tensor, such as the output projection's weight.

        Returns
        -------
        PackedParameters
            They are dropped some time after the tensor is.

        Examples
        --------
        >>> one, other = torch.zeros(8, 8), torch.zeros(8, 8)
        >>> packed = PackedByWeight()
        >>> packed.of(one) is packed.of(other)
        False
        """
        packed = self._by_id.get(id(weight))
        if packed is None:
            self._by_id = {key: packed for key, packed in self._by_id.items() if packed.is_in_use()}
            self._by_id[id(weight)] = packed = PackedParameters()
        return packed
