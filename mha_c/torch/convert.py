# SPDX-License-Identifier: Apache-2.0
"""Convert layers between mha_c and torch, read checkpoints as tensors, and make the calls of a layer in torch."""

from __future__ import annotations

import copy
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray

from mha_c.container import Container, ModuleList
from mha_c.dropout import Dropout
from mha_c.layer import MultiheadAttention, parameters_of
from mha_c.linear import Linear
from mha_c.module import Module
from mha_c.norms import LayerNorm, RMSNorm
from mha_c.parameters.files import open_checkpoint
from mha_c.parameters.loading import arrays_in
from mha_c.parameters.stored import StoredArray
from mha_c.torch.replace import restore_attention
from mha_c.torch.tensors import array_of, tensor_of
from mha_c.torch.transform import TORCH_ACTIVATIONS
from mha_c.transformer.decoder import TransformerDecoder
from mha_c.transformer.encoder import TransformerEncoder
from mha_c.transformer.layer import TransformerLayer
from mha_c.transformer.transformer import Transformer

__all__ = [
    "TORCH_VERSION",
    "forward_in_torch",
    "from_torch",
    "layer_in_torch",
    "one_thread",
    "read_checkpoint",
    "state_dict",
    "to_torch",
]

TORCH_VERSION = str(torch.__version__)

_Layer = TypeVar("_Layer", bound=Module)


def from_torch(module: torch.nn.Module, cls: type[_Layer]) -> _Layer:
    """Make a layer of mha_c from a layer of torch, as ``cls.from_torch(module)`` does.

    Parameters
    ----------
    module : torch.nn.Module
        The layer to copy: attention, a norm, a linear map, dropout, a layer, an encoder or a decoder of a Transformer,
        a whole Transformer, or a ``torch.nn.ModuleList`` of such layers.
    cls : type
        The class of the same name in mha_c, such as `mha_c.TransformerEncoder`, or a subclass.

    Returns
    -------
    Module
        Of the class `cls`.

    Examples
    --------
    >>> import mha_c, torch
    >>> from_torch(torch.nn.MultiheadAttention(8, 2), mha_c.MultiheadAttention).num_heads
    2
    >>> encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    >>> from_torch(encoder, mha_c.TransformerEncoder).num_layers
    3
    """
    made: _Layer = cls.from_torch(module)  # type: ignore[attr-defined]  # each class that torch has, too, has it
    return made


@overload
def to_torch(layer: MultiheadAttention) -> torch.nn.MultiheadAttention: ...
@overload
def to_torch(layer: LayerNorm) -> torch.nn.LayerNorm: ...
@overload
def to_torch(layer: RMSNorm) -> torch.nn.RMSNorm: ...
@overload
def to_torch(layer: Module) -> torch.nn.Module: ...
def to_torch(layer: Module) -> torch.nn.Module:
    """Make a layer of torch from a layer of mha_c, with its arguments, parameters and training mode.

    Parameters
    ----------
    layer : Module
        The layer to copy, with all that is in it: any that mha_c has.

    Returns
    -------
    torch.nn.Module
        Of the class of the same name. It computes as torch does, whatever `matmul_precision`, `masked_rows` and
        `padded` say.

    Raises
    ------
    TypeError
        If `layer` is not a layer of mha_c.
    ValueError
        If torch does not have such a layer: it ties the widths of heads and output to `embed_dim`, and its Transformers
        have neither RMS norms nor gated activations.

    Examples
    --------
    >>> import mha_c
    >>> to_torch(mha_c.MultiheadAttention(8, 2)).num_heads
    2
    >>> to_torch(mha_c.RMSNorm(8))
    RMSNorm((8,), eps=None, elementwise_affine=True)
    >>> to_torch(mha_c.TransformerEncoderLayer(8, 2, 16)).linear1
    Linear(in_features=8, out_features=16, bias=True)
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # torch's constructors draw numbers, and warn
        warnings.filterwarnings("ignore", "enable_nested_tensor")
        module = _in_torch(layer)
    module.load_state_dict(state_dict(layer))
    return module


def _in_torch(layer: Module) -> torch.nn.Module:
    """A layer with the arguments and the mode of another one; its parameters are any."""
    module: torch.nn.Module
    if isinstance(layer, MultiheadAttention):
        module = _attention_in_torch(layer).train(layer.training)
    elif isinstance(layer, (LayerNorm, RMSNorm)):
        module = _norm_in_torch(layer)
    elif isinstance(layer, Linear):
        dtype = getattr(torch, next(layer.parameters()).dtype.name)
        module = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
    elif isinstance(layer, Dropout):
        module = torch.nn.Dropout(layer.p)
    elif isinstance(layer, Container):
        module = _container_in_torch(layer, {name: _in_torch(child) for name, child in layer.named_children()})
    else:
        raise TypeError(f"to_torch takes a layer of mha_c, but got {type(layer).__module__}.{type(layer).__qualname__}")
    module.training = layer.training
    return module


def _container_in_torch(layer: Container, children: dict[str, torch.nn.Module]) -> torch.nn.Module:
    """A layer of torch made of these layers."""
    module: torch.nn.Module
    if isinstance(layer, ModuleList):
        return torch.nn.ModuleList(children.values())
    if isinstance(layer, TransformerLayer):
        kind = getattr(torch.nn, layer._kind)
        activation = TORCH_ACTIVATIONS.get(layer.activation) if isinstance(layer.activation, str) else None
        if activation is None:
            raise ValueError(f"torch.nn.{layer._kind} does not have the activation {layer.activation!r}")
        if any(isinstance(child, torch.nn.RMSNorm) for child in children.values()):
            raise ValueError(f"torch.nn.{layer._kind} does not have RMS norms")
        batch_first = layer.self_attn.batch_first  # type: ignore[attr-defined]
        module = kind(1, 1, 1, 0.0, activation, batch_first=batch_first, norm_first=layer.norm_first)
    elif isinstance(layer, (TransformerEncoder, TransformerDecoder)):
        if not layer.layers:
            raise ValueError(f"torch.nn.{layer._kind} has at least one layer")
        options = {"enable_nested_tensor": layer.enable_nested_tensor} if isinstance(layer, TransformerEncoder) else {}
        first = children["layers"][0]  # type: ignore[index]
        module = getattr(torch.nn, layer._kind)(first, 0, children.get("norm"), **options)
        setattr(module, "num_layers", layer.num_layers)
    elif isinstance(layer, Transformer):
        custom: Any = {f"custom_{name}": child for name, child in children.items()}
        module = torch.nn.Transformer(layer.d_model, layer.nhead, batch_first=layer.batch_first, **custom)
    else:
        raise TypeError(f"to_torch does not know {type(layer).__qualname__}")
    for name, child in children.items():
        setattr(module, name, child)
    return module


def _norm_in_torch(layer: LayerNorm | RMSNorm) -> torch.nn.Module:
    """A norm with the arguments of a layer, and new parameters."""
    options = {"eps": layer.eps, "elementwise_affine": layer.elementwise_affine}
    dtype = None if layer.weight is None else getattr(torch, layer.weight.dtype.name)
    if isinstance(layer, RMSNorm):
        return torch.nn.RMSNorm(layer.normalized_shape, **options, dtype=dtype)
    return torch.nn.LayerNorm(layer.normalized_shape, **options, bias=layer.bias is not None, dtype=dtype)


def _attention_in_torch(layer: MultiheadAttention) -> torch.nn.MultiheadAttention:
    """A layer of attention with the arguments of another one; its parameters are not initialised."""
    widths = parameters_of(layer).widths
    if free := widths.beyond_torch():
        named = ", ".join(f"{name}={width}" for name, width in free.items())
        raise ValueError(
            f"torch.nn.MultiheadAttention has no such layer ({named}): it ties the widths of heads and output to "
            f"embed_dim={widths.embed_dim} and num_heads={widths.num_heads}"
        )
    parameters = layer.state_dict()
    # skip_init leaves torch's random numbers alone.
    module: torch.nn.MultiheadAttention = torch.nn.utils.skip_init(  # type: ignore[no-untyped-call]
        torch.nn.MultiheadAttention,
        widths.embed_dim,
        widths.num_heads,
        dropout=layer.dropout,
        bias="in_proj_bias" in parameters,
        add_bias_kv="bias_k" in parameters,
        add_zero_attn=layer.add_zero_attn,
        kdim=widths.kdim,
        vdim=widths.vdim,
        batch_first=layer.batch_first,
        dtype=getattr(torch, parameters["out_proj.weight"].dtype.name),
    )
    return module


def state_dict(layer: Module, *, prefix: str = "") -> OrderedDict[str, torch.Tensor]:
    """Return the parameters of a layer as tensors, for ``load_state_dict`` of torch's layer.

    Parameters
    ----------
    layer : Module
        The layer to copy: any layer of mha_c, with all layers in it.
    prefix : str, default ""
        What to write before each name; no dot is added.

    Returns
    -------
    collections.OrderedDict of str to torch.Tensor
        Writable copies.

    Examples
    --------
    >>> import mha_c
    >>> torch.nn.MultiheadAttention(8, 2).load_state_dict(state_dict(mha_c.MultiheadAttention(8, 2)))
    <All keys matched successfully>
    """
    arrays = layer.state_dict(prefix=prefix)
    return OrderedDict((name, tensor_of(array.copy())) for name, array in arrays.items())


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read the dense tensors in a file of parameters, without executing anything in the file.

    Parameters
    ----------
    path : str or path-like
        A file of ``torch.save``, a .safetensors or .npz file, or the index of several files.

    Returns
    -------
    dict of str to torch.Tensor
        Copies on the CPU, in the dtypes of the file. In a nested mapping, the names are joined by dots. Tensors that
        are sparse, quantized or of a subclass are left out, and so is all that is no tensor.

    Raises
    ------
    ValueError
        If the file is incomplete, damaged or of another kind.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"model": {"bias": torch.zeros(2)}, "epoch": 3}, f"{folder}/model.pt")
    ...     read_checkpoint(f"{folder}/model.pt")
    {'model.bias': tensor([0., 0.])}
    """
    with open_checkpoint(path) as checkpoint:
        arrays = arrays_in(checkpoint.content)
        return {name: _tensor(*array.bits()) for name, array in arrays.items() if isinstance(array, StoredArray)}


def _tensor(bits: NDArray[Any], dtype: str) -> torch.Tensor:
    """A tensor of a dtype; where NumPy lacks it, `bits` are unsigned integers."""
    return torch.from_numpy(bits).view(getattr(torch, dtype))


def forward_in_torch(
    layer: MultiheadAttention | torch.nn.MultiheadAttention, query: Any, key: Any, value: Any, **call: Any
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Make a call with torch's layer of the same parameters.

    Parameters
    ----------
    layer : MultiheadAttention or torch.nn.MultiheadAttention
        The layer. A layer of torch is copied first.
    query, key, value : array
        As for the layer itself.
    **call
        The other arguments of ``MultiheadAttention.forward``, except `out`.

    Returns
    -------
    tuple of numpy.ndarray and numpy.ndarray or None
        The output and the attention weights.

    Raises
    ------
    ValueError
        If torch does not have such a layer.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> x = np.zeros((5, 3, 8), dtype=np.float32)
    >>> forward_in_torch(mha_c.MultiheadAttention(8, 2), x, x, x)[0].shape
    (5, 3, 8)
    """
    # With gradients, torch takes its ordinary path; the one for inference answers differently in corner cases.
    with torch.inference_mode(False), torch.enable_grad():
        module = to_torch(layer) if isinstance(layer, MultiheadAttention) else _copy_with_gradients(layer)
        tensors = [tensor_of(np.array(array)) for array in (query, key, value)]
        for name in ("key_padding_mask", "attn_mask"):
            if call.get(name) is not None:
                call[name] = tensor_of(np.array(call[name]))
        output, weights = module(*tensors, **call)
        return array_of(output), None if weights is None else array_of(weights)


def layer_in_torch(layer: Module, arguments: dict[str, Any]) -> NDArray[Any]:
    """Make a call of a Transformer's layer with torch's layer of the same parameters, on its ordinary path.

    Parameters
    ----------
    layer : Module
        The layer.
    arguments : dict of str to object
        Those of torch's call. Arrays become tensors; those of floats are cast to the dtype of the layer.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    ValueError
        If torch does not have such a layer.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> layer = mha_c.TransformerEncoderLayer(8, 2, 16).eval()
    >>> layer_in_torch(layer, {"src": np.zeros((5, 3, 8), np.float32)}).shape
    (5, 3, 8)
    """
    kind = getattr(torch, next(layer.parameters()).dtype.name)

    def tensor(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        array = tensor_of(np.array(value))
        return array.to(kind) if array.is_floating_point() else array

    # With gradients, torch takes its ordinary path.
    with torch.inference_mode(False), torch.enable_grad():
        tensors = {name: tensor(one) for name, one in arguments.items()}
        return array_of(to_torch(layer)(**tensors))


def _copy_with_gradients(module: torch.nn.MultiheadAttention) -> torch.nn.MultiheadAttention:
    copied: torch.nn.MultiheadAttention = restore_attention(copy.deepcopy(module)).cpu()
    return copied.requires_grad_()


@contextmanager
def one_thread() -> Iterator[None]:
    """Make torch compute on one thread within a block. This is faster for many small calls.

    Yields
    ------
    None

    Examples
    --------
    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
