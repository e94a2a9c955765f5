# SPDX-License-Identifier: Apache-2.0
"""A model of torch run with torch's attention and with ours, every call of attention recorded. Imported through
mha_c.torch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mha_c.layer import MultiheadAttention
from mha_c.parameters.arrays import as_array
from mha_c.torch.replace import ReplacedAttention, check_model, replace_attention, restore_attention, set_attention_class

__all__ = ["AttentionRun", "ModelOutput", "ModelRuns", "run_both_ways"]

_Answer = tuple[NDArray[Any], NDArray[Any] | None]


class AttentionRun(NamedTuple):
    """One call of an attention layer: `arguments` are those that ask `layer` what torch was asked."""

    name: str
    layer: MultiheadAttention
    arguments: dict[str, Any]
    ours: _Answer
    theirs: _Answer


class ModelOutput(NamedTuple):
    """One output of a model: with mha_c, by torch's ordinary path, as torch computes it by itself, and by its ordinary
    path in another dtype. That is float64, or float32 for models in float64.
    """

    ours: NDArray[Any]
    theirs: NDArray[Any]
    as_is: NDArray[Any]
    in_other_dtype: NDArray[Any]


class ModelRuns(NamedTuple):
    """What happened: the calls of attention, the names of the layers that torch had to compute, and the outputs."""

    attention: list[AttentionRun]
    left_to_torch: list[str]
    outputs: dict[str, ModelOutput]


class _PassOn(torch.overrides.TorchFunctionMode):
    """Changes nothing, but where any such mode is active torch takes its ordinary path."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class _OrdinaryAttention(torch.nn.MultiheadAttention):
    """torch's layer without its inference path."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        with _PassOn():
            return super().forward(*args, **kwargs)


def run_both_ways(model: torch.nn.Module, inputs: Sequence[Any], call: Mapping[str, Any]) -> ModelRuns:
    """Run copies of a model with its own attention and with ours.

    Parameters
    ----------
    model : torch.nn.Module
        The model; its attention may be replaced already.
    inputs, call : sequence and mapping
        Its positional and its keyword arguments, tensors or arrays.

    Returns
    -------
    ModelRuns

    Raises
    ------
    TypeError, ValueError
        If `model` is no torch module, or has no ``torch.nn.MultiheadAttention``.

    Examples
    --------
    >>> runs = run_both_ways(torch.nn.MultiheadAttention(8, 2), [torch.zeros(5, 3, 8)] * 3, {})
    >>> list(runs.outputs)
    ['output[0]', 'output[1]']
    """
    check_model(model, "check.model")
    # Parameters made in inference mode would not be tracked, and so be left to torch.
    with torch.inference_mode(False), torch.no_grad():
        theirs = restore_attention(copy.deepcopy(model)).eval()
        ours = replace_attention(copy.deepcopy(theirs))
        args, kwargs = _map(_to_tensor, (tuple(inputs), dict(call)))
        as_is = theirs(*args, **kwargs)
        set_attention_class(theirs, _OrdinaryAttention)
        recorder = _Recorder(theirs, ours)
        ordinary = theirs(*args, **kwargs)
        recorder.remove()
        replaced = ours(*args, **kwargs)
        is_double = any(parameter.dtype == torch.float64 for parameter in theirs.parameters())
        other = torch.float32 if is_double else torch.float64
        args, kwargs = _map(lambda value: _cast(value, other), (args, kwargs))
        in_other_dtype = theirs.to(other)(*args, **kwargs)
    flat = [_flatten("output", result) for result in (replaced, ordinary, as_is, in_other_dtype)]
    outputs = {name: ModelOutput(*(arrays[name] for arrays in flat)) for name in flat[0]}
    return ModelRuns(recorder.runs, list(dict.fromkeys(recorder.left_to_torch)), outputs)


class _Recorder:
    """Hooks on the attention layers of one model, which ask the same layers of another model the same questions."""

    def __init__(self, theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
        self.runs: list[AttentionRun] = []
        self.left_to_torch: list[str] = []
        twins = dict(ours.named_modules())
        self._handles = [
            layer.register_forward_hook(self._hook(name or "attention", twins[name]), with_kwargs=True)
            for name, layer in theirs.named_modules()
            if isinstance(layer, _OrdinaryAttention)
        ]

    def remove(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, twin: torch.nn.Module) -> Callable[..., None]:
        assert isinstance(twin, ReplacedAttention)

        def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            bound = _SIGNATURE.bind(*args, **kwargs)
            bound.apply_defaults()
            ours = twin.forward_in_mha_c(*bound.args)
            if isinstance(ours, str):
                self.left_to_torch.append(name)
                return
            asked = bound.arguments
            # What torch makes of its hint; see ReplacedAttention.
            is_causal = asked["is_causal"] and asked["key_padding_mask"] is None and not asked["need_weights"]
            asked.update(is_causal=is_causal, attn_mask=None if is_causal else asked["attn_mask"])
            arguments = _map(lambda value: as_array(value) if isinstance(value, torch.Tensor) else value, dict(asked))
            layer = MultiheadAttention.from_torch(module).eval()
            self.runs.append(AttentionRun(name, layer, arguments, _to_arrays(ours), _to_arrays(output)))

        return record


_SIGNATURE = inspect.Signature(list(inspect.signature(torch.nn.MultiheadAttention.forward).parameters.values())[1:])


def _to_arrays(answer: tuple[torch.Tensor, torch.Tensor | None]) -> _Answer:
    return as_array(answer[0]), None if answer[1] is None else as_array(answer[1])


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to whatever lies in lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, item) for item in value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)


def _to_tensor(value: Any) -> Any:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _flatten(name: str, value: Any) -> dict[str, NDArray[Any]]:
    """Every tensor in the result of a model, by how to get at it."""
    if isinstance(value, torch.Tensor):
        array = as_array(value)
        return {name: array.astype(np.int64) if array.dtype == bool else array}
    items: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        items = [(f"{name}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"{name}[{number}]", item) for number, item in enumerate(value)]
    return {path: array for key, item in items for path, array in _flatten(key, item).items()}
