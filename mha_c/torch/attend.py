# SPDX-License-Identifier: Apache-2.0
"""Attention of tensors by mha_c: at once, or as an operator of a compiled graph. Imported through mha_c.torch."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch._compile import _disable_dynamo

from mha_c import _core
from mha_c.display.coverage import Calls
from mha_c.parameters.sets import PARAMETERS
from mha_c.threads import get_num_threads, num_threads
from mha_c.torch.packed import PackedLayer, PackedParameters
from mha_c.torch.tensors import array_of, tensor_of

__all__ = [
    "LIBRARY",
    "MISFIT",
    "UNREADABLE",
    "Answer",
    "Call",
    "LayerState",
    "ask_core",
    "attend",
    "attend_apart_from_compiler",
    "attend_in_graph",
    "attend_in_torch",
    "note_in_graph",
    "resolve_hint",
    "run_counted",
]

Answer: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]

_Packed = TypeVar("_Packed", PackedParameters, PackedLayer)
_Result = TypeVar("_Result")

MISFIT = "arguments that do not fit"  # torch has words for them, or knows an answer
UNREADABLE = "tensors that NumPy cannot read"


class LayerState(Generic[_Packed]):
    """What mha_c keeps of one layer of torch. Copies and pickles of it start anew.

    Parameters
    ----------
    packed : PackedParameters or PackedLayer
        What holds the layer's parameters, still empty.

    Attributes
    ----------
    packed : PackedParameters or PackedLayer
        The layer's parameters.
    calls : Calls
        Its calls.
    number : int
        By which a compiled graph finds it.
    """

    _numbers = itertools.count()
    by_number: weakref.WeakValueDictionary[int, LayerState[Any]] = weakref.WeakValueDictionary()

    def __init__(self, packed: _Packed) -> None:
        self.packed: _Packed = packed
        self.calls = Calls()
        self.number = next(self._numbers)
        self.by_number[self.number] = self

    def __reduce__(self) -> tuple[type[LayerState[_Packed]], tuple[_Packed]]:
        return LayerState, (type(self.packed)(self.packed.precisions),)


class Call(NamedTuple):
    """The arguments of a call that mha_c is to compute, where `is_causal` is a mask, and those of the layer."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_padding_mask: torch.Tensor | None
    need_weights: bool
    attn_mask: torch.Tensor | None
    average_attn_weights: bool
    is_causal: bool
    embed_dim: int
    num_heads: int
    kdim: int
    vdim: int
    batch_first: bool
    add_zero_attn: bool


def attend(packed: PackedParameters, tensors: Mapping[str, torch.Tensor], call: Call) -> Answer | str:
    """What mha_c computes, or in a few words why torch is to compute it.

    Parameters
    ----------
    packed : PackedParameters
        Where the parameters of the last call are.
    tensors : mapping of str to torch.Tensor
        The parameters by the names of the state dict.
    call : Call
        The arguments.

    Returns
    -------
    tuple of torch.Tensor and torch.Tensor or None, or str

    Examples
    --------
    >>> tensors = {"in_proj_weight": torch.ones(24, 8), "out_proj.weight": torch.ones(8, 8)}
    >>> x = torch.ones(5, 3, 8)
    >>> call = Call(x, x, x, None, True, None, True, False, 8, 2, 8, 8, False, False)
    >>> attend(PackedParameters(), tensors, call)[1].shape
    torch.Size([3, 5, 5])
    >>> attend(PackedParameters(), tensors, call._replace(num_heads=3))
    'unusual parameters'
    """
    query, key, value = call.query, call.key, call.value
    key_padding_mask, attn_mask = call.key_padding_mask, call.attn_mask
    parameters = packed.get(tensors, call.embed_dim, call.num_heads, call.kdim, call.vdim)
    if parameters is None:
        return packed.why_not(tensors)
    try:
        query_array = array_of(query)
        key_array = query_array if key is query else array_of(key)
        value_array = key_array if value is key else array_of(value)
        padding_array = None if key_padding_mask is None else array_of(key_padding_mask)
        mask_array = None if attn_mask is None else array_of(attn_mask)
    except (RuntimeError, TypeError, ValueError):
        return UNREADABLE
    answer = ask_core(
        _core.forward,
        parameters.weights,
        query_array,
        key_array,
        value_array,
        padding_array,
        call.need_weights,
        mask_array,
        call.average_attn_weights,
        call.is_causal,
        None,
        call.batch_first,
        call.add_zero_attn,
        "torch",
        0.0,
        0,
        0,
    )
    if isinstance(answer, str):
        return answer
    output, weights = answer
    return tensor_of(output), None if weights is None else tensor_of(weights)


# Where torch.compile gives up a graph, it traces the functions that are called. It must not trace this one.
attend_apart_from_compiler = _disable_dynamo(attend)


def resolve_hint(
    is_causal: bool, need_weights: bool, key_padding_mask: object, attn_mask: torch.Tensor | None, has_added_keys: bool
) -> tuple[torch.Tensor | None, bool] | str:
    """What torch makes of its hint, as a mask and mha_c's `is_causal`; or why torch is to compute the call."""
    if not isinstance(is_causal, bool):
        return MISFIT
    if not is_causal:
        return attn_mask, False
    if attn_mask is None:
        return "is_causal without attn_mask"
    if key_padding_mask is not None or need_weights:
        return attn_mask, False  # torch goes by attn_mask
    # Here torch ignores attn_mask and computes what is_causal=True means in mha_c, except that it hides added keys too.
    return "is_causal with added keys" if has_added_keys or attn_mask.dim() != 2 else (None, True)


def ask_core(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the core returns, or MISFIT if its checks refuse the arguments. What fails later is raised."""
    try:
        with _threads_of_both():
            return function(*arguments)
    except Exception as error:
        if getattr(error, "refused", False):
            return MISFIT
        raise


def _threads_of_both() -> AbstractContextManager[None]:
    """Neither more threads than mha_c may use, nor more than torch may."""
    limit = torch.get_num_threads()
    return num_threads(limit) if limit < get_num_threads() else nullcontext()


# ---- In a compiled graph ----

LIBRARY: Any = torch.library.Library("mha_c", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "attention(SymInt layer, Tensor?[] parameters, Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, "
    "bool need_weights, Tensor? attn_mask, bool average_attn_weights, bool is_causal, SymInt embed_dim, "
    "SymInt num_heads, SymInt kdim, SymInt vdim, bool batch_first, bool add_zero_attn) -> (Tensor, Tensor)"
)


def attend_in_graph(number: int, tensors: Mapping[str, torch.Tensor], call: Call) -> Answer:
    """`attend` as an operator that torch.compile leaves as it is; what mha_c leaves to torch, it asks torch for.

    Parameters
    ----------
    number : int
        Of the layer's `LayerState`.
    tensors, call
        As for `attend`.

    Returns
    -------
    tuple of torch.Tensor and torch.Tensor or None

    Examples
    --------
    >>> tensors = {"in_proj_weight": torch.ones(24, 8), "out_proj.weight": torch.ones(8, 8)}
    >>> x = torch.ones(5, 3, 8)
    >>> call = Call(x, x, x, None, True, None, True, False, 8, 2, 8, 8, False, False)
    >>> attend_in_graph(0, tensors, call)[1].shape
    torch.Size([3, 5, 5])
    """
    output, weights = torch.ops.mha_c.attention(number, [tensors.get(name) for name in PARAMETERS], *call)
    return output, weights if call.need_weights else None


def note_in_graph(number: int, reason: str) -> None:
    """List a layer that a graph leaves to torch, when the graph is made: its calls cannot be counted.

    Examples
    --------
    >>> state = LayerState(PackedParameters())
    >>> note_in_graph(state.number, "gradients")
    >>> state.calls.by_reason
    {'gradients, in a graph': 0}
    """
    LayerState.by_number[number].calls.add(f"{reason}, in a graph", 0)


# Has it called once, when the graph is made. torch.compiler.assume_constant_result would import the compiler for it.
note_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run_counted(
    number: int,
    kind: type[_Packed],
    compute: Callable[..., _Result | str],
    compute_in_torch: Callable[..., _Result],
    *arguments: Any,
) -> _Result:
    """What one function computes, or where it has a reason for torch, the other one. The layer counts the call.

    Examples
    --------
    >>> state = LayerState(PackedParameters())
    >>> run_counted(state.number, PackedParameters, lambda packed, x: "gradients", torch.neg, torch.ones(1))
    tensor([-1.])
    >>> state.calls.by_reason
    {'gradients': 1}
    """
    layer = LayerState.by_number.get(number) or LayerState(kind())  # a graph may outlive the layer
    answer = compute(layer.packed, *arguments)
    if not isinstance(answer, str):
        layer.calls.add()
        return answer
    layer.calls.add(answer)
    return compute_in_torch(*arguments)


def _run(number: int, parameters: Sequence[torch.Tensor | None], *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator with tensors on the CPU."""
    call = Call(*arguments)
    tensors = {name: tensor for name, tensor in zip(PARAMETERS, parameters) if tensor is not None}
    output, weights = run_counted(number, PackedParameters, attend, attend_in_torch, tensors, call)
    return output, output.new_empty(0) if weights is None else weights


def _shapes_of_run(
    number: int, parameters: Sequence[torch.Tensor | None], *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator's results without their numbers, from tensors that have none."""
    call = Call(*arguments)
    query, key = call.query, call.key
    out_weight = parameters[PARAMETERS.index("out_proj.weight")]
    assert out_weight is not None
    output = query.new_empty((*query.shape[:-1], out_weight.shape[0]))
    if not call.need_weights:
        return output, query.new_empty(0)
    length_axis = 1 if query.dim() == 3 and call.batch_first else 0
    batch = (query.shape[1 - length_axis],) if query.dim() == 3 else ()
    heads = () if call.average_attn_weights else (call.num_heads,)
    keys = key.shape[length_axis] + call.add_zero_attn + (parameters[PARAMETERS.index("bias_k")] is not None)
    return output, query.new_empty((*batch, *heads, query.shape[length_axis], keys))


def attend_in_torch(tensors: Mapping[str, torch.Tensor], call: Call) -> Answer:
    """What torch computes in place of `attend`, contiguous as a graph expects."""
    swapped = call.batch_first and call.query.dim() == 3
    query, key, value = (one.transpose(0, 1) if swapped else one for one in (call.query, call.key, call.value))
    attn_mask = call.attn_mask
    if call.is_causal:
        attn_mask = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool).triu(1)
    output, weights = torch.nn.functional.multi_head_attention_forward(
        query,
        key,
        value,
        call.embed_dim,
        call.num_heads,
        tensors.get("in_proj_weight"),
        tensors.get("in_proj_bias"),
        tensors.get("bias_k"),
        tensors.get("bias_v"),
        call.add_zero_attn,
        0.0,
        tensors["out_proj.weight"],
        tensors.get("out_proj.bias"),
        training=False,
        key_padding_mask=call.key_padding_mask,
        need_weights=call.need_weights,
        attn_mask=attn_mask,
        use_separate_proj_weight="in_proj_weight" not in tensors,
        q_proj_weight=tensors.get("q_proj_weight"),
        k_proj_weight=tensors.get("k_proj_weight"),
        v_proj_weight=tensors.get("v_proj_weight"),
        average_attn_weights=call.average_attn_weights,
    )
    return (output.transpose(0, 1) if swapped else output).contiguous(), weights


LIBRARY.impl("attention", _disable_dynamo(_run), "CPU")
torch.library.register_fake("mha_c::attention", _shapes_of_run)
