# SPDX-License-Identifier: Apache-2.0
"""Models of torch whose layers compute with mha_c. Imported through mha_c.torch, which explains a missing torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from mha_c.display.coverage import Coverage
from mha_c.parameters.quantization import (
    PRODUCTS,
    PRODUCTS_OF_ATTENTION,
    MatmulPrecision,
    Precision,
    precision_of_products,
)
from mha_c.torch.attend import LayerState
from mha_c.torch.classes import class_over, set_class, torch_class_of, why_left_alone
from mha_c.torch.huggingface import mixin_of_transformers, why_unknown
from mha_c.torch.layers import ReplacedDecoderLayer, ReplacedEncoderLayer, ReplacedLayer, why_patched
from mha_c.torch.replaced import Replaced, ReplacedAttention
from mha_c.torch.transformers import registered_name

__all__ = ["check_model", "coverage", "replace_attention", "replace_layers", "restore_attention", "whole_layers"]

_Model = TypeVar("_Model", bound=torch.nn.Module)

# torch fuses a whole encoder layer, attention included, where these attributes allow it. It reads them for nothing
# else, and with these values it takes its ordinary path, which calls the attention layer.
_FUSING: dict[type[torch.nn.Module], tuple[str, object]] = {
    torch.nn.TransformerEncoder: ("use_nested_tensor", False),
    torch.nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
}


# What stands above torch's classes, and the methods whose results it computes.
_OF_TORCH: dict[type[torch.nn.Module], tuple[type[Replaced], tuple[str, ...]]] = {
    torch.nn.MultiheadAttention: (ReplacedAttention, ("forward",)),
    torch.nn.TransformerEncoderLayer: (ReplacedEncoderLayer, ("forward", "_sa_block", "_ff_block")),
    torch.nn.TransformerDecoderLayer: (ReplacedDecoderLayer, ("forward", "_sa_block", "_mha_block", "_ff_block")),
}


class _Replaceable(NamedTuple):
    """A layer in a model, what may stand above its class, and why that is not possible, or ""."""

    name: str
    layer: torch.nn.Module
    mixin: type[Replaced]
    why_left: str

    @property
    def class_name(self) -> str:
        return torch_class_of(self.layer).__name__


def replace_attention(model: _Model, *, matmul_precision: MatmulPrecision | None = None) -> _Model:
    """Make every ``torch.nn.MultiheadAttention`` of a model compute its inference with mha_c, in place.

    Each layer becomes a `ReplacedAttention`, which computes with mha_c in evaluation mode, on the CPU, in float32,
    float64, bfloat16 and float16, where nothing needs a gradient. torch computes every other call, as before.
    Parameters, buffers, hooks and names stay, and with them state dicts, optimisers and device moves. Calling this
    again on the same model refreshes it.

    Parameters
    ----------
    model : torch.nn.Module
        The whole model. An encoder layer that is fused does not call its attention: to change that, the
        ``torch.nn.TransformerEncoder`` has to be part of the model.
    matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
        What the layers multiply, as in `mha_c.MultiheadAttention`. The parameters stay as they are. Calls in float64
        are left to torch. Attention inside a layer that `replace_layers` replaced is computed with that layer, as it
        says.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        If `model` is not a torch module.
    ValueError
        If the model has no ``torch.nn.MultiheadAttention``, or only layers that override forward. These may
        compute anything, and are left alone. If `matmul_precision` is unknown.

    Notes
    -----
    The results are those of torch's ordinary path. ``torch.nn.TransformerEncoder`` has another path for inference,
    which fuses whole layers, does not call their attention, and leaves zeros in padded positions. It is switched off in
    this model alone, by ``use_nested_tensor = False`` on the encoder and ``activation_relu_or_gelu = 0`` on its layers.

    As everywhere in mha_c, NaN in a position that `key_padding_mask` hides does not spread. A call uses as many threads
    as both torch and mha_c allow.

    Changed parameters take effect at the next call. `ReplacedAttention.refresh` names the exception.

    ``torch.compile`` makes graphs in which mha_c computes. Those of ``torch.export``, ``torch.onnx.export``,
    ``torch.jit.trace`` and ``torch.jit.script`` hold torch's attention and run without mha_c.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> model = replace_attention(torch.nn.TransformerEncoder(layer, num_layers=2)).eval()
    >>> with torch.inference_mode():
    ...     model(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    >>> type(restore_attention(model).layers[0].self_attn)
    <class 'torch.nn.modules.activation.MultiheadAttention'>
    """
    check_model(model, "replace_attention")
    precisions = precision_of_products(matmul_precision, PRODUCTS_OF_ATTENTION)
    layers = [one for one in _replaceable(model) if one.mixin is ReplacedAttention]
    if not layers:
        raise ValueError(
            f"there is no torch.nn.MultiheadAttention to replace in this {type(model).__name__}. {_instead(model)}"
        )
    if all(one.why_left for one in layers):
        named = ", ".join(f"{one.name} ({one.class_name})".lstrip() for one in layers)
        raise ValueError(
            f"no attention of this {type(model).__name__} can be replaced, because all of it overrides forward, which "
            f"may compute anything: {named}"
        )
    _replace(layers, precisions)
    for module, name, unfused in _fusing_modules(model):
        replaced = [layer for layer in module.modules() if isinstance(layer, Replaced)]
        if name in vars(module) and replaced and not any(isinstance(layer, ReplacedLayer) for layer in replaced):
            vars(module).setdefault(_saved(name), getattr(module, name))
            setattr(module, name, unfused)
    return model


def replace_layers(model: _Model, *, matmul_precision: MatmulPrecision | None = None) -> _Model:
    """Make the layers of encoders and decoders of a model compute their inference with mha_c, in place.

    Every ``torch.nn.TransformerEncoderLayer`` and ``torch.nn.TransformerDecoderLayer`` is computed as a whole, and so
    are layers of the encoders of Hugging Face's transformers. Every ``torch.nn.MultiheadAttention`` is replaced as by
    `replace_attention`: it computes where it is not part of such a layer, and where its layer is left to torch.

    mha_c computes in evaluation mode, on the CPU, in float32, float64, bfloat16 and float16, where nothing needs a
    gradient. torch computes every other call, as before. Parameters, buffers, hooks and names stay, and with them state
    dicts, optimisers and device moves. Calling this again on the same model refreshes it.

    Parameters
    ----------
    model : torch.nn.Module
        The model, or one layer.
    matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
        What the layers multiply, as in `mha_c.TransformerEncoderLayer`. The parameters stay as they are. Calls in
        float64 are left to torch.

    Returns
    -------
    torch.nn.Module
        The model itself. `restore_attention` undoes the change.

    Raises
    ------
    TypeError
        If `model` is not a torch module.
    ValueError
        If the model has no such layer or attention, or if all of them override their methods, or a method of a class
        was patched. These may compute anything, and are left alone. If `matmul_precision` is unknown.

    Notes
    -----
    The classes of transformers are those of transformers 5.24: BertLayer, BertGenerationLayer, CamembertLayer,
    Data2VecTextLayer, ElectraLayer, ErnieLayer, RobertaLayer, RoCBertLayer and XLMRobertaLayer; TransformerBlock of
    DistilBERT; ASTLayer, DeiTLayer, IJepaLayer, ViTLayer, ViTMAELayer, ViTMSNLayer and VivitLayer. Subclasses are left
    alone. A mask has to be one of padding.

    Padded rows are what the model gives without mha_c. ``torch.nn.TransformerEncoder`` leaves out padding in some
    calls, and its rows are zeros. All other rows of padding are computed. Apart from that, the results are those of
    torch's ordinary path, not those of the path that fuses layers. As everywhere in mha_c, NaN in a position that a
    mask hides does not spread.

    A layer is left to torch while a module in it has another class, as after quantization or with LoRA, a forward of
    its own, hooks, or is in training mode. The coverage names the module. A method of a class that is patched after the
    replacement is not noticed.

    Changed parameters take effect at the next call. `ReplacedAttention.refresh` names the exception.

    ``torch.compile`` makes graphs in which mha_c computes. It does not notice hooks of modules in a layer, or a forward
    of their own, if they come after the graph. Graphs of ``torch.export``, ``torch.onnx.export``, ``torch.jit.trace``
    and ``torch.jit.script`` hold torch's layers and run without mha_c.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> model = replace_layers(torch.nn.TransformerEncoder(layer, num_layers=2)).eval()
    >>> with torch.inference_mode():
    ...     model(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    >>> coverage(model)
    Calls of layers: 2 computed by mha_c, 0 left to torch
    <BLANKLINE>
    module    class                    mha_c  torch  reason
    layers.0  TransformerEncoderLayer      1      0
    layers.1  TransformerEncoderLayer      1      0
    """
    check_model(model, "replace_layers")
    precisions = precision_of_products(matmul_precision, PRODUCTS)
    layers = list(_replaceable(model))
    if not layers:
        raise ValueError(
            f"there is no layer to replace in this {type(model).__name__}: no torch.nn.TransformerEncoderLayer, "
            "TransformerDecoderLayer or MultiheadAttention, nor any of the layers of transformers that are known. "
            f"{_instead(model)}"
        )
    if all(one.why_left for one in layers):
        named = ", ".join(f"{one.name} ({one.class_name}, {one.why_left})".lstrip() for one in layers)
        raise ValueError(f"no layer of this {type(model).__name__} can be replaced: {named}")
    _allow_fusing(model)  # torch's encoder leaves out padding with it
    _replace(layers, precisions)
    return model


def _instead(model: torch.nn.Module) -> str:
    """What to do with a model in which there is nothing to replace."""
    if not any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        return "If it calls torch's functions of attention, run it in `with mha_c.torch.attention():`"
    register = 'mha_c.torch.register_transformers(), and load the model with attn_implementation="mha_c"'
    if whole_layers(model):
        return f"Call mha_c.torch.replace_layers(model) for its whole layers; for its attention alone, call {register}"
    return f"Call {register}"


def _replace(layers: list[_Replaceable], precisions: Mapping[str, Precision | None]) -> None:
    for _, layer, mixin, why_left in layers:
        if not why_left:
            set_class(layer, class_over(torch_class_of(layer), mixin))
            state: LayerState[Any] = layer._mha_c  # type: ignore[assignment]
            names = PRODUCTS_OF_ATTENTION if mixin is ReplacedAttention else PRODUCTS
            state.packed.multiply_in({name: precisions[name] for name in names})


def restore_attention(model: _Model) -> _Model:
    """Undo `replace_attention` and `replace_layers`, in place.

    Parameters
    ----------
    model : torch.nn.Module
        The model; one without replaced layers stays as it is.

    Returns
    -------
    torch.nn.Module
        The model itself, every class and flag as it was.

    Raises
    ------
    TypeError
        If `model` is not a torch module.

    Examples
    --------
    >>> import torch
    >>> type(restore_attention(replace_attention(torch.nn.MultiheadAttention(8, 2))))
    <class 'torch.nn.modules.activation.MultiheadAttention'>
    """
    check_model(model, "restore_attention")
    for layer in model.modules():
        if isinstance(layer, Replaced):
            vars(layer).pop("_mha_c", None)
            set_class(layer, torch_class_of(layer))
    _allow_fusing(model)
    return model


def coverage(model: torch.nn.Module) -> Coverage:
    """Return which calls of a model's layers mha_c computed, which it left to torch, and why.

    The calls are counted from `replace_attention` or `replace_layers` on.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Returns
    -------
    Coverage
        A row for every ``torch.nn.MultiheadAttention`` and every instance of a subclass, with its calls so far. After
        `replace_layers`, and in models of transformers, a row for every layer, and one for the attention in it only if
        that was called by itself.
        Copies and pickles of a layer count from zero. Calls that a compiled graph leaves to torch are not counted, but
        the reason is there.

    Raises
    ------
    TypeError
        If `model` is not a torch module.

    Examples
    --------
    >>> import torch
    >>> model = replace_attention(torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2)))
    >>> for training in True, False:
    ...     with torch.no_grad():
    ...         _ = model.train(training)[0](*[torch.zeros(5, 3, 8)] * 3)
    >>> coverage(model).rows
    (CoverageRow(module='0', class_name='MultiheadAttention', here=1, left=1, reason='training'),)
    """
    check_model(model, "coverage")
    layers = list(_replaceable(model))
    whole = [one for one in layers if isinstance(one.layer, ReplacedLayer)]
    within = {module for one in whole for module in one.layer.modules() if module is not one.layer}
    note = ""
    if registered := registered_name(model):
        note = (
            f'Calls through attn_implementation="{registered}" are counted in the coverage that '
            "register_transformers() returned."
        )
    has_attention = not layers or any(one.mixin is ReplacedAttention for one in layers)
    lists_layers = bool(whole) or not has_attention
    found = Coverage("layers" if lists_layers else "attention", note)
    for name, layer, mixin, why_left in layers:
        if mixin is not ReplacedAttention and not lists_layers:
            continue
        calls = layer._mha_c.calls.by_reason if isinstance(layer, Replaced) else {}
        if not calls and layer in within:
            continue
        why_none = why_left or ("never called" if isinstance(layer, Replaced) else "not replaced")
        for reason, count in (calls or {why_none: 0}).items():
            found.add(name, torch_class_of(layer).__name__, reason, count)
    return found


def _replaceable(model: torch.nn.Module) -> Iterator[_Replaceable]:
    """The layers of a model that are known, those of subclasses included."""
    for name, layer in list(model.named_modules()):
        for cls, (mixin, methods) in _OF_TORCH.items():
            if isinstance(layer, cls):
                why_patched_part = why_patched(mixin._parts) if issubclass(mixin, ReplacedLayer) else ""
                yield _Replaceable(name, layer, mixin, why_left_alone(layer, cls, methods) or why_patched_part)
        cls = torch_class_of(layer)
        known = mixin_of_transformers(cls)
        if known is not None:
            yield _Replaceable(name, layer, known, why_unknown(layer, cls, known))


def check_model(model: object, function: str) -> None:
    """Raise TypeError unless `model` is a torch module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, but got {type(model)}")


def whole_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What `replace_layers` would replace beside attention.

    Examples
    --------
    >>> len(whole_layers(torch.nn.TransformerEncoderLayer(8, 2))), len(whole_layers(torch.nn.MultiheadAttention(8, 2)))
    (1, 0)
    """
    return [one.layer for one in _replaceable(model) if one.mixin is not ReplacedAttention and not one.why_left]


def _fusing_modules(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, object]]:
    """Modules that may fuse their layers; the attribute that decides it, and the value with which they do not."""
    for module in model.modules():
        for cls, (name, unfused) in _FUSING.items():
            if isinstance(module, cls):
                yield module, name, unfused


def _allow_fusing(model: torch.nn.Module) -> None:
    for module, name, _ in _fusing_modules(model):
        if _saved(name) in vars(module):
            setattr(module, name, vars(module).pop(_saved(name)))


def _saved(name: str) -> str:
    """Where a module keeps the original value, so that copies and pickles of a replaced model can be restored too."""
    return f"_{name}_in_torch"
