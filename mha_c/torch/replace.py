# SPDX-License-Identifier: Apache-2.0
"""Models of torch whose attention computes with mha_c. Imported through mha_c.torch, which explains a missing torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch

from mha_c.display.coverage import Coverage
from mha_c.torch.classes import attention_layers, class_over, set_class, torch_class_of, why_left_alone
from mha_c.torch.replaced import ReplacedAttention

__all__ = ["check_model", "coverage", "replace_attention", "restore_attention"]

_Model = TypeVar("_Model", bound=torch.nn.Module)

# torch fuses a whole encoder layer, attention included, where these attributes allow it. It reads them for nothing
# else, and with these values it takes its ordinary path, which calls the attention layer.
_FUSING: dict[type[torch.nn.Module], tuple[str, object]] = {
    torch.nn.TransformerEncoder: ("use_nested_tensor", False),
    torch.nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
}


def replace_attention(model: _Model) -> _Model:
    """Make every ``torch.nn.MultiheadAttention`` of a model compute its inference with mha_c, in place.

    Each layer becomes a `ReplacedAttention`, which computes with mha_c in evaluation mode, on the CPU, in float32 and
    float64, where nothing needs a gradient. torch computes every other call, as before. Parameters, buffers, hooks and
    names stay, and with them state dicts, optimisers and device moves. Calling this again on the same model refreshes
    it.

    Parameters
    ----------
    model : torch.nn.Module
        The whole model. An encoder layer that is fused does not call its attention: to change that, the
        ``torch.nn.TransformerEncoder`` has to be part of the model.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        If `model` is not a torch module.
    ValueError
        If the model has no ``torch.nn.MultiheadAttention``, or only layers with a forward of their own. These may
        compute anything, and are left alone.

    Notes
    -----
    The results are those of torch's ordinary path. ``torch.nn.TransformerEncoder`` has another path for inference, which
    fuses whole layers, does not call their attention, and leaves zeros in padded positions. It is switched off in this
    model alone, by ``use_nested_tensor = False`` on the encoder and ``activation_relu_or_gelu = 0`` on its layers.

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
    layers = list(attention_layers(model))
    if not layers:
        raise ValueError(f"there is no torch.nn.MultiheadAttention to replace in this {type(model).__name__}")
    replaceable = [layer for _, layer in layers if not why_left_alone(layer)]
    if not replaceable:
        named = ", ".join(f"{name} ({torch_class_of(layer).__name__})".lstrip() for name, layer in layers)
        raise ValueError(
            f"no attention of this {type(model).__name__} can be replaced, because all of it has a forward of its own, "
            f"which may compute anything: {named}"
        )
    for layer in replaceable:
        set_class(layer, class_over(torch_class_of(layer), ReplacedAttention))
        layer.refresh()  # type: ignore[operator]
    for module, name, unfused in _fusing_modules(model):
        if name in vars(module) and any(isinstance(layer, ReplacedAttention) for layer in module.modules()):
            vars(module).setdefault(_saved(name), getattr(module, name))
            setattr(module, name, unfused)
    return model


def restore_attention(model: _Model) -> _Model:
    """Undo `replace_attention`, in place.

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
    for _, layer in attention_layers(model):
        if isinstance(layer, ReplacedAttention):
            vars(layer).pop("_mha_c", None)
            set_class(layer, torch_class_of(layer))
    for module, name, _ in _fusing_modules(model):
        if _saved(name) in vars(module):
            setattr(module, name, vars(module).pop(_saved(name)))
    return model


def coverage(model: torch.nn.Module) -> Coverage:
    """Return which calls of a model's attention mha_c computed, which it left to torch, and why.

    The calls are counted from `replace_attention` on.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Returns
    -------
    Coverage
        A row for every ``torch.nn.MultiheadAttention`` and every instance of a subclass, with its calls so far.
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
    found = Coverage()
    for name, layer in attention_layers(model):
        is_replaced = isinstance(layer, ReplacedAttention)
        calls = layer._mha_c.calls.by_reason if isinstance(layer, ReplacedAttention) else {}
        reason = why_left_alone(layer) or ("never called" if is_replaced else "not replaced")
        for reason, count in (calls or {reason: 0}).items():
            found.add(name, torch_class_of(layer).__name__, reason, count)
    return found


def check_model(model: object, function: str) -> None:
    """Raise TypeError unless `model` is a torch module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, but got {type(model)}")


def _fusing_modules(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, object]]:
    """Modules that may fuse their layers; the attribute that decides it, and the value with which they do not."""
    for module in model.modules():
        for cls, (name, unfused) in _FUSING.items():
            if isinstance(module, cls):
                yield module, name, unfused


def _saved(name: str) -> str:
    """Where a module keeps the original value, so that copies and pickles of a replaced model can be restored too."""
    return f"_{name}_in_torch"
