# SPDX-License-Identifier: Apache-2.0
"""A model of torch run with torch's layers and with ours, every call of attention and of whole layers recorded.
Imported through mha_c.torch."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from mha_c.display.coverage import Coverage
from mha_c.layer import MultiheadAttention
from mha_c.parameters.arrays import as_array
from mha_c.torch.attend import resolve_hint
from mha_c.torch.classes import attention_layers, torch_class_of, why_left_alone
from mha_c.torch.layers import ReplacedLayer
from mha_c.torch.reasons import HARMLESS_MODES
from mha_c.torch.replace import check_model, replace_attention, replace_layers, restore_attention, whole_layers
from mha_c.torch.replaced import ReplacedAttention
from mha_c.torch.tensors import tensor_of

__all__ = ["AttentionRun", "LayerRun", "ModelOutput", "ModelRuns", "run_both_ways"]

_Answer: TypeAlias = tuple[NDArray[Any], NDArray[Any] | None]
_Outputs: TypeAlias = dict[str, NDArray[Any]]


class AttentionRun(NamedTuple):
    """One call of an attention layer: `arguments` are those that ask `layer` what torch was asked."""

    name: str
    layer: MultiheadAttention
    arguments: dict[str, Any]
    ours: _Answer
    theirs: _Answer


class LayerRun(NamedTuple):
    """One call of a whole layer, and the same in float64 by torch's ordinary path."""

    name: str
    ours: NDArray[Any]
    theirs: NDArray[Any]
    wider: NDArray[Any]


class ModelOutput(NamedTuple):
    """One output of a model.

    Attributes
    ----------
    ours : numpy.ndarray or None
        With attention by mha_c, if the model has any ``torch.nn.MultiheadAttention``.
    by_layers : numpy.ndarray or None
        With whole layers by mha_c, if the model has any.
    theirs : numpy.ndarray
        By torch's ordinary path.
    as_is : numpy.ndarray
        As torch computes it by itself, which may be by its path for inference.
    wider : numpy.ndarray or None
        By torch's ordinary path in float64, if that is wider than the attention's dtype and the model runs in it.
    disturbed : numpy.ndarray or None
        Else, by torch's ordinary path with every output of attention, or of whole layers if there is no attention,
        changed by one unit in the last place.
    """

    ours: NDArray[Any] | None
    by_layers: NDArray[Any] | None
    theirs: NDArray[Any]
    as_is: NDArray[Any]
    wider: NDArray[Any] | None
    disturbed: NDArray[Any] | None


class ModelRuns(NamedTuple):
    """What happened.

    Attributes
    ----------
    attention : list of AttentionRun
        The calls that mha_c computed, too.
    layers : list of LayerRun
        The calls of whole layers that mha_c computed, too, unless they were in float64.
    layers_left : dict of str to str
        The layers with calls that are left to torch, and why.
    coverage : Coverage
        All calls of attention in torch's run, and which of them mha_c would compute.
    outputs : dict of str to ModelOutput
        The model's outputs, by how to get at them.
    why_not_wider : str
        Why the model was not run in float64, or "".
    """

    attention: list[AttentionRun]
    layers: list[LayerRun]
    layers_left: dict[str, str]
    coverage: Coverage
    outputs: dict[str, ModelOutput]
    why_not_wider: str


def run_both_ways(model: torch.nn.Module, inputs: Sequence[Any], call: Mapping[str, Any]) -> ModelRuns:
    """Run copies of a model with torch's layers and with mha_c's, with the same random numbers.

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
        If `model` is not a torch module, or has no ``torch.nn.MultiheadAttention`` that can be replaced.

    Examples
    --------
    >>> runs = run_both_ways(torch.nn.MultiheadAttention(8, 2), [torch.zeros(5, 3, 8)] * 3, {})
    >>> list(runs.outputs)
    ['output[0]', 'output[1]']
    """
    check_model(model, "check.model")
    # Parameters made in inference mode would not be tracked, and so be left to torch.
    with torch.inference_mode(False), torch.no_grad(), _random_numbers_as_before():
        theirs = restore_attention(copy.deepcopy(model)).eval()
        by_layers = replace_layers(copy.deepcopy(theirs)) if whole_layers(theirs) else None
        has_attention = by_layers is None or any(True for _ in attention_layers(theirs))
        ours = replace_attention(copy.deepcopy(theirs)) if has_attention else None
        arguments = _map(_to_tensor, (tuple(inputs), dict(call)))

        as_is = _run(copy.deepcopy(theirs), arguments)
        recorder = _Recorder(ours, by_layers)
        with recorder.recording(ordinary := copy.deepcopy(theirs)):
            ordinary_outputs = _run(ordinary, arguments)
        outputs = None if ours is None else _run(ours, arguments)
        outputs_by_layers = None if by_layers is None else _run(by_layers, arguments)
        wider, why_not_wider = _run_in_float64(theirs, arguments)
        if wider is not None and any(array.shape != ordinary_outputs[name].shape for name, array in wider.items()):
            wider, why_not_wider = None, "In float64 the model's outputs have other shapes."
        disturbed = _run_disturbed(theirs, arguments) if wider is None else None
    return ModelRuns(
        recorder.runs,
        recorder.layer_runs,
        recorder.layers_left,
        recorder.coverage,
        {
            name: ModelOutput(
                None if outputs is None else outputs[name],
                None if outputs_by_layers is None else outputs_by_layers[name],
                output,
                as_is[name],
                None if wider is None else wider[name],
                None if disturbed is None else disturbed[name],
            )
            for name, output in ordinary_outputs.items()
        },
        why_not_wider,
    )


@contextmanager
def _random_numbers_as_before() -> Iterator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _run(model: torch.nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> _Outputs:
    """The outputs of a model, which may write to its arguments and draw random numbers."""
    args, kwargs = _map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, arguments)
    with _random_numbers_as_before():
        return _flatten("output", model(*args, **kwargs))


def _run_in_float64(
    theirs: torch.nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[_Outputs | None, str]:
    """The outputs by torch's ordinary path in float64; or None and why there are none."""
    attention = [layer.out_proj.weight for _, layer in attention_layers(theirs) if not why_left_alone(layer)]
    if all(tensor.dtype == torch.float64 for tensor in attention or theirs.parameters()):
        return None, "Nothing is wider than float64."
    try:
        with _PassOn():
            return _run(copy.deepcopy(theirs).to(torch.float64), _map(_to_float64, arguments)), ""
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return None, f"The model does not run in float64 ({reason[0]})."


def _run_disturbed(theirs: torch.nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> _Outputs:
    """The outputs by torch's ordinary path, where attention, or else layers, are off by what roundings may change."""
    generator = torch.Generator().manual_seed(0)

    def disturb(module: torch.nn.Module, args: Any, answer: Any) -> Any:
        output, *others = answer if isinstance(answer, tuple) else (answer,)
        largest = output.nan_to_num(posinf=0.0, neginf=0.0).abs().max() if output.numel() else output.new_ones(())
        ulp = torch.finfo(output.dtype).eps * largest
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        changed = output + signs * ulp
        return (changed, *others) if others else changed

    model = copy.deepcopy(theirs)
    attention: list[torch.nn.Module] = [layer for _, layer in attention_layers(model) if not why_left_alone(layer)]
    for layer in attention or whole_layers(model):
        layer.register_forward_hook(disturb, prepend=True)  # before hooks that change the answer
    with _PassOn():
        return _run(model, arguments)


class _PassOn(torch.overrides.TorchFunctionMode):
    """Changes nothing, but where any such mode is active torch takes its ordinary path."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class _Recorder(_PassOn):
    """Listens to the attention layers of one model, and asks the same layers of a replaced model the same questions."""

    functions = (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.multi_head_attention_forward)

    def __init__(self, replaced: torch.nn.Module | None, by_layers: torch.nn.Module | None) -> None:
        super().__init__()
        self.runs: list[AttentionRun] = []
        self.layer_runs: list[LayerRun] = []
        self.layers_left: dict[str, str] = {}
        self._layers = {} if by_layers is None else dict(by_layers.named_modules())
        self.coverage = Coverage()
        self._replaced = {} if replaced is None else dict(attention_layers(replaced))
        self._layers_at_work = 0

    @contextmanager
    def recording(self, model: torch.nn.Module) -> Iterator[None]:
        """Record what happens in `model` within a block."""
        layers = list(attention_layers(model))
        for name, layer in layers:
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._hook(name, layer), with_kwargs=True, prepend=True)
            self.coverage.add(name, torch_class_of(layer).__name__, why_left_alone(layer), calls=0)
        for name, twin in self._layers.items():
            if isinstance(twin, ReplacedLayer):
                whole = model.get_submodule(name)
                whole.register_forward_pre_hook(self._begin)
                whole.register_forward_hook(self._layer_hook(name, twin), with_kwargs=True, prepend=True)
        with self:
            yield
        for row in self.coverage.rows:
            if row.here == row.left == 0 and not row.reason:
                self.coverage.add(row.module, row.class_name, "never called", calls=0)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.functions and self._layers_at_work == 0:
            self.coverage.add("", func.__name__, "called as a function")
        return super().__torch_function__(func, types, args, kwargs)

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self._layers_at_work += 1

    def _hook(self, name: str, layer: torch.nn.MultiheadAttention) -> Callable[..., None]:
        twin, class_name = self._replaced[name], torch_class_of(layer).__name__

        def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._layers_at_work -= 1
            if not isinstance(twin, ReplacedAttention):
                self.coverage.add(name, class_name, why_left_alone(twin))
                return
            bound = _SIGNATURE.bind(*args, **kwargs)
            bound.apply_defaults()
            ours = twin.forward_in_mha_c(*bound.args)
            self.coverage.add(name, class_name, ours if isinstance(ours, str) else "")
            if isinstance(ours, str):
                return
            asked = bound.arguments
            hint = resolve_hint(
                asked["is_causal"], asked["need_weights"], asked["key_padding_mask"], asked["attn_mask"], False
            )
            assert not isinstance(hint, str)  # mha_c has computed the call
            asked["attn_mask"], asked["is_causal"] = hint
            arguments = _map(lambda value: as_array(value).copy() if isinstance(value, torch.Tensor) else value, asked)
            bare: Any = copy.copy(module)
            bare._forward_pre_hooks, bare._forward_hooks = OrderedDict(), OrderedDict()  # which run around this call
            in_mha_c = MultiheadAttention.from_torch(bare).eval()
            results = _to_arrays(ours), _to_arrays(output)
            self.runs.append(AttentionRun(name or "attention", in_mha_c, arguments, *results))

        return record


    def _layer_hook(self, name: str, twin: ReplacedLayer) -> Callable[..., None]:
        in_float64 = restore_attention(copy.deepcopy(twin)).double()

        def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ours = twin.forward_in_mha_c(*args, **kwargs)
            if isinstance(ours, str):
                self.layers_left[name] = ours
            elif output.dtype != torch.float64:
                exact = in_float64(*_map(_to_float64, args), **_map(_to_float64, kwargs))
                arrays = (as_array(one).copy() for one in (ours, output, exact))
                self.layer_runs.append(LayerRun(name or "layer", *arrays))
            self._layers_at_work -= 1

        return record


HARMLESS_MODES.add(_Recorder)

_SIGNATURE = inspect.Signature(list(inspect.signature(torch.nn.MultiheadAttention.forward).parameters.values())[1:])


def _to_arrays(answer: tuple[torch.Tensor, torch.Tensor | None]) -> _Answer:
    """Copies, since a model may write to what its layers return."""
    return as_array(answer[0]).copy(), None if answer[1] is None else as_array(answer[1]).copy()


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to whatever lies in lists, tuples and dicts."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, item) for item in value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)


def _to_tensor(value: Any) -> Any:
    return tensor_of(value.copy()) if isinstance(value, np.ndarray) else value


def _to_float64(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _flatten(name: str, value: Any) -> _Outputs:
    """Every tensor in the result of a model, by how to get at it."""
    if isinstance(value, torch.Tensor):
        array = as_array(value).copy()
        return {name: array.astype(np.int64) if array.dtype == bool else array}
    items: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        items = [(f"{name}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"{name}[{number}]", item) for number, item in enumerate(value)]
    return {path: array for key, item in items for path, array in _flatten(key, item).items()}
