# SPDX-License-Identifier: Apache-2.0
"""Models of torch whose attention computes with mha_c. Imported through mha_c.torch, which explains a missing torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from numpy.typing import NDArray

from mha_c.layer import MultiheadAttention, layer_with
from mha_c.parameters.sets import ParameterSet, Widths
from mha_c.threads import get_num_threads, num_threads

__all__ = ["ReplacedAttention", "check_model", "replace_attention", "restore_attention", "set_attention_class"]

_Model = TypeVar("_Model", bound=torch.nn.Module)

# What NumPy and mha_c may raise about tensors: on another device, sparse, nested, of shapes that do not fit. torch is
# then asked instead, and raises in its own words, or knows an answer.
_REFUSALS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)

_DTYPES = (torch.float32, torch.float64)
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_PLAIN_LINEARS = (torch.nn.modules.linear.NonDynamicallyQuantizableLinear, torch.nn.Linear)

# torch fuses a whole encoder layer, attention included, where these attributes allow it. It reads them for nothing
# else, and with these values it takes its ordinary path, which calls the attention layer.
_FUSING: dict[type[torch.nn.Module], tuple[str, object]] = {
    torch.nn.TransformerEncoder: ("use_nested_tensor", False),
    torch.nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
}


def replace_attention(model: _Model) -> _Model:
    """Make every ``torch.nn.MultiheadAttention`` of a model compute its inference with mha_c, in place.

    Parameters, buffers, hooks and names stay what they are, and with them state dicts, optimisers and device moves: a
    layer merely becomes a `ReplacedAttention`. That one computes with mha_c in evaluation mode, on the CPU, in float32
    and float64, where nothing needs a gradient, and everything else as before, with torch. Calling this again on the
    same model refreshes it.

    Parameters
    ----------
    model : torch.nn.Module
        The whole model: a layer inside a ``torch.nn.TransformerEncoder`` is reached only if that one is told as well.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        If `model` is no torch module.
    ValueError
        If the model has no ``torch.nn.MultiheadAttention``. Subclasses of it are left alone.

    Notes
    -----
    The results are those of torch's ordinary path. ``torch.nn.TransformerEncoder`` has another one for inference, which
    fuses whole layers, never calls their attention, and leaves zeros in padded positions. It is switched off in this
    model alone, by ``use_nested_tensor = False`` on the encoder and ``activation_relu_or_gelu = 0`` on its layers.

    As everywhere in mha_c, NaN in a position that `key_padding_mask` hides does not spread. A call uses as many threads
    as both torch and mha_c allow.

    Changes that torch counts (optimisers, ``load_state_dict``, ``model.to``) take effect at the next call. Changes made
    behind its back, through ``parameter.data``, NumPy or shared memory, need `ReplacedAttention.refresh`.
    ``torch.jit.script`` puts torch's own layers back into the model that it compiles.

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
    for layer in model.modules():
        if isinstance(layer, ReplacedAttention):
            layer.refresh()
    set_attention_class(model, ReplacedAttention)
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
        If `model` is no torch module.

    Examples
    --------
    >>> import torch
    >>> type(restore_attention(replace_attention(torch.nn.MultiheadAttention(8, 2))))
    <class 'torch.nn.modules.activation.MultiheadAttention'>
    """
    check_model(model, "restore_attention")
    for layer in list(model.modules()):
        if type(layer) is ReplacedAttention:
            layer.refresh()
            layer.__class__ = torch.nn.MultiheadAttention  # type: ignore[assignment]
    for module, name, _ in _fusing_modules(model):
        if _saved(name) in vars(module):
            setattr(module, name, vars(module).pop(_saved(name)))
    return model


def check_model(model: object, function: str) -> None:
    """Raise TypeError unless `model` is a torch module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, but got {type(model)}")


def set_attention_class(model: torch.nn.Module, cls: type[torch.nn.MultiheadAttention]) -> None:
    """Make torch's own attention layers instances of a subclass, and see to it that they are called."""
    for layer in list(model.modules()):
        if type(layer) is torch.nn.MultiheadAttention:
            layer.__class__ = cls
    if not any(isinstance(layer, cls) for layer in model.modules()):
        raise ValueError(f"there is no torch.nn.MultiheadAttention to replace in this {type(model).__name__}")
    for module, name, unfused in _fusing_modules(model):
        if name in vars(module) and any(isinstance(layer, cls) for layer in module.modules()):
            vars(module).setdefault(_saved(name), getattr(module, name))
            setattr(module, name, unfused)


def _fusing_modules(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, object]]:
    """Modules that may fuse their layers; the attribute that decides it, and the value with which they do not."""
    for module in model.modules():
        for cls, (name, unfused) in _FUSING.items():
            if isinstance(module, cls):
                yield module, name, unfused


def _saved(name: str) -> str:
    """Where a module keeps the original value, so that copies and pickles of a replaced model can be restored too."""
    return f"_{name}_in_torch"


class _Source(NamedTuple):
    """One parameter as it was when it was packed."""

    parameter: torch.Tensor
    memory: torch.Tensor  # keeps that memory from being freed and reused: the same address is the same memory
    version: int

    def is_now(self, parameter: torch.Tensor) -> bool:
        """Whether `parameter` is the same object, in the same memory, with the same numbers."""
        return (
            parameter is self.parameter
            and parameter._version == self.version
            and parameter.dtype == self.memory.dtype
            and parameter.is_set_to(self.memory)
        )


class _Packed(NamedTuple):
    """A layer of mha_c, and what it was made from."""

    layer: MultiheadAttention
    attributes: tuple[Any, ...]
    sources: dict[str, _Source]


class ReplacedAttention(torch.nn.MultiheadAttention):
    """A ``torch.nn.MultiheadAttention`` whose inference is computed by mha_c; `replace_attention` makes them.

    Examples
    --------
    >>> import torch
    >>> attention = replace_attention(torch.nn.MultiheadAttention(8, 2)).eval()
    >>> x = torch.zeros(5, 3, 8)
    >>> with torch.no_grad():
    ...     output, weights = attention(x, x, x)
    >>> output.shape, weights.shape
    (torch.Size([5, 3, 8]), torch.Size([3, 5, 5]))
    """

    _packed: _Packed | None = None

    def refresh(self) -> None:
        """Read the parameters anew at the next call, after a change that torch did not count.

        Examples
        --------
        >>> import torch
        >>> attention = replace_attention(torch.nn.MultiheadAttention(8, 2))
        >>> attention.out_proj.bias.data.fill_(1.0)
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])
        >>> attention.refresh()
        """
        vars(self).pop("_packed", None)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``torch.nn.MultiheadAttention.forward``: with mha_c where it can, else with torch.

        Parameters
        ----------
        query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            As torch's; in particular `is_causal` is a hint about `attn_mask`, not a mask.

        Returns
        -------
        attn_output : torch.Tensor
            Contiguous if it is computed by mha_c.
        attn_output_weights : torch.Tensor or None
            Without `need_weights` None.

        Examples
        --------
        >>> import torch
        >>> attention = replace_attention(torch.nn.MultiheadAttention(8, 2)).eval()
        >>> with torch.no_grad():
        ...     attention(*[torch.zeros(5, 3, 8)] * 3, need_weights=False)[1] is None
        True
        """
        masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        # First of all, because a compiler must not meet what comes after it.
        if not torch.compiler.is_compiling():
            if isinstance(query, torch.fx.Proxy):  # torch.fx does not look into torch's own layers either
                path = query.tracer.path_of_module(self)
                return query.tracer.create_proxy("call_module", path, (query, key, value, *masks), {})
            result = self.forward_in_mha_c(query, key, value, *masks)
            if result is not None:
                return result
        return super().forward(query, key, value, *masks)

    def forward_in_mha_c(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        need_weights: bool,
        attn_mask: torch.Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """What forward returns, or None where torch is to answer.

        Parameters
        ----------
        query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            As for `forward`.

        Returns
        -------
        tuple of torch.Tensor and torch.Tensor or None, or None

        Examples
        --------
        >>> import torch
        >>> attention = replace_attention(torch.nn.MultiheadAttention(8, 2))  # in training: torch's
        >>> attention.forward_in_mha_c(*[torch.zeros(5, 3, 8)] * 3, None, True, None, True, False) is None
        True
        """
        if self.training or is_causal and attn_mask is None:
            return None
        masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
        parameters = self._named_parameters()
        if not all(type(tensor) in _PLAIN_TENSORS for tensor in (query, key, value, *masks)):
            return None
        if query.dtype not in _DTYPES or any(mask.dtype not in (query.dtype, torch.bool) for mask in masks):
            return None
        if _torch_is_watching([query, key, value, *masks, *parameters.values()]):
            return None
        if is_causal and key_padding_mask is None and not need_weights:
            # Here torch ignores attn_mask and computes what is_causal=True means in mha_c, except that it hides the
            # keys of add_bias_kv and add_zero_attn too.
            if attn_mask is None or attn_mask.dim() != 2 or self.bias_k is not None or self.add_zero_attn:
                return None
            attn_mask = None
        else:
            is_causal = False  # torch goes by attn_mask
        try:
            layer = self._layer(parameters)
            if layer is None:
                return None
            with _threads_of_both():
                output, weights = layer(
                    _array(query),
                    _array(key),
                    _array(value),
                    None if key_padding_mask is None else _array(key_padding_mask),
                    bool(need_weights),
                    None if attn_mask is None else _array(attn_mask),
                    bool(average_attn_weights),
                    is_causal,
                )
        except _REFUSALS:
            return None
        return torch.from_numpy(output), None if weights is None else torch.from_numpy(weights)

    def _named_parameters(self) -> dict[str, torch.Tensor]:
        """The parameters by the names of the state dict, without its hooks."""
        own = {name: tensor for name, tensor in self._parameters.items() if tensor is not None}
        out = {f"out_proj.{name}": tensor for name, tensor in self.out_proj._parameters.items() if tensor is not None}
        return {**own, **out}

    def _layer(self, parameters: Mapping[str, torch.Tensor]) -> MultiheadAttention | None:
        """The layer of mha_c with these parameters; None if they are not the usual ones, such as parametrized ones."""
        attributes = (self.embed_dim, self.num_heads, self.kdim, self.vdim, self.add_zero_attn, self.batch_first)
        packed = self._packed
        if (
            packed is not None
            and packed.attributes == attributes
            and packed.sources.keys() == parameters.keys()
            and all(source.is_now(parameters[name]) for name, source in packed.sources.items())
        ):
            return packed.layer
        widths = Widths.from_arguments(self.embed_dim, self.num_heads, self.kdim, self.vdim)
        shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        if (
            shapes != widths.shapes("in_proj_bias" in parameters, "bias_k" in parameters)
            or type(self.out_proj) not in _PLAIN_LINEARS
            or not all(type(tensor) in _PLAIN_TENSORS for tensor in parameters.values())
        ):
            return None
        # Another thread may be doing the same; whichever ends last is kept, and both are right. Versions are read
        # before the numbers, so that the next call notices a change in between.
        sources = {name: _Source(tensor, tensor.detach(), tensor._version) for name, tensor in parameters.items()}
        arrays = {name: source.memory.numpy() for name, source in sources.items()}
        parameter_set = ParameterSet(widths, arrays, arrays["out_proj.weight"].dtype)
        layer = layer_with(parameter_set, add_zero_attn=self.add_zero_attn, batch_first=self.batch_first)
        vars(self)["_packed"] = _Packed(layer, attributes, sources)
        return layer

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ReplacedAttention:
        """Moves and casts leave the old numbers behind; do not keep their memory."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.refresh()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles pack their parameters themselves."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_packed", None)
        return state

    def __prepare_scriptable__(self) -> torch.nn.MultiheadAttention:
        """What torch.jit.script compiles in place of this layer."""
        plain = torch.nn.MultiheadAttention.__new__(torch.nn.MultiheadAttention)
        vars(plain).update(self.__getstate__())
        return plain


def _torch_is_watching(tensors: list[torch.Tensor]) -> bool:
    """Whether torch has to see the single operations: to differentiate, trace, transform, intercept or cast them."""
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        or torch.overrides.has_torch_function(tensors)
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    return array


def _threads_of_both() -> AbstractContextManager[None]:
    """Neither more threads than mha_c may use, nor more than torch may."""
    limit = torch.get_num_threads()
    return num_threads(limit) if limit < get_num_threads() else nullcontext()
