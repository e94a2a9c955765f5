# SPDX-License-Identifier: Apache-2.0
"""Parameters of torch, packed for the kernels and kept until they change. Imported through mha_c.torch.

Packing takes as long as a small call, so it is not done in each one. torch counts most changes of a tensor in its
`_version`, but not all: fused optimisers and writes through ``.data``, NumPy or shared memory are not counted. So every
call compares the tensors' identities, versions and memory, and some of their numbers; and every step of any optimiser
drops what is packed.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_post_hook

from mha_c import _core
from mha_c.parameters.sets import SEPARATE_WEIGHTS, ParameterSet, Widths
from mha_c.torch.reasons import DTYPES, PLAIN_TENSORS

__all__ = ["PackedByWeight", "PackedParameters"]

_Arguments: TypeAlias = tuple[int, int, int | None, int | None]  # embed_dim, num_heads, kdim, vdim

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

    parameters: ParameterSet
    arguments: _Arguments
    sources: dict[str, _Source]
    arrays: tuple[NDArray[Any], ...]  # the sources' memory
    sample: bytes
    generation: tuple[object, object]

    def is_of(self, tensors: Mapping[str, torch.Tensor], arguments: _Arguments) -> bool:
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
            name.endswith("bias")
            and _is_plain(tensor)
            and tensor.dtype == self.sources[name].memory.dtype
            and tensor.detach().numpy().tobytes() == self.parameters.arrays[name].tobytes()
        )


class PackedParameters:
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

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._last_drop = object()

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
        generation = _last_step, self._last_drop
        arguments = embed_dim, num_heads, kdim, vdim
        kept = self._kept
        if kept is None or kept.generation != generation or not kept.is_of(tensors, arguments):
            # Another thread may be doing the same; whichever ends last is kept, and both are right.
            self._kept = kept = _pack(tensors, arguments, generation)
        return None if kept is None else kept.parameters

    def drop(self) -> None:
        """Forget what is packed; the next call packs anew.

        Examples
        --------
        >>> PackedParameters().drop()
        """
        self._last_drop = object()  # for a thread that is packing at this moment
        self._kept = None

    def is_in_use(self) -> bool:
        """Whether anything else refers to the output projection's weight that was packed.

        Examples
        --------
        >>> PackedParameters().is_in_use()
        False
        """
        kept = self._kept
        return kept is not None and sys.getrefcount(kept.sources["out_proj.weight"].tensor) > 2


def _pack(
    tensors: Mapping[str, torch.Tensor], arguments: _Arguments, generation: tuple[object, object]
) -> _Kept | None:
    """Versions and samples are taken before the numbers, so that the next call notices a change in between."""
    out_weight = tensors.get("out_proj.weight")
    if out_weight is None or not all(_is_plain(one) and one.dtype == out_weight.dtype for one in tensors.values()):
        return None
    try:
        widths = Widths.from_arguments(*arguments, out_dim=out_weight.shape[0] if out_weight.dim() == 2 else None)
    except (AssertionError, RuntimeError, TypeError, ValueError):  # torch has no such layer, either
        return None
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != _expected_shapes(widths, tensors):
        return None
    sources = {name: _Source.of(tensor) for name, tensor in tensors.items()}
    arrays = {name: source.memory.numpy() for name, source in sources.items()}
    memory = tuple(arrays.values())
    sample = _core.sample(memory)
    if widths.packed and "in_proj_weight" not in arrays:
        arrays["in_proj_weight"] = np.concatenate([arrays.pop(name) for name in SEPARATE_WEIGHTS])
    return _Kept(ParameterSet(widths, arrays, memory[0].dtype), arguments, sources, memory, sample, generation)


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
    if widths.packed and "q_proj_weight" in names:  # separate, although the widths are the same
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
