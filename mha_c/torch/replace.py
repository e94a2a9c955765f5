# SPDX-License-Identifier: Apache-2.0
"""Models of torch whose attention computes with mha_c. Imported through mha_c.torch, which explains a missing torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch.nn.utils.parametrize import is_parametrized

from mha_c.display.coverage import Calls, Coverage
from mha_c.torch.calls import project_and_attend
from mha_c.torch.packed import PackedParameters

__all__ = [
    "ReplacedAttention",
    "check_model",
    "coverage",
    "replace_attention",
    "restore_attention",
    "set_attention_class",
]

_Model = TypeVar("_Model", bound=torch.nn.Module)
_Answer = tuple[torch.Tensor, torch.Tensor | None]

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
    set_attention_class(model, ReplacedAttention)
    for layer in model.modules():
        if isinstance(layer, ReplacedAttention):
            layer.refresh()
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
    for _, layer in attention_layers(model):
        if isinstance(layer, ReplacedAttention):
            vars(layer).pop("_mha_c", None)
            _set_class(layer, torch_class_of(layer))
    for module, name, _ in _fusing_modules(model):
        if _saved(name) in vars(module):
            setattr(module, name, vars(module).pop(_saved(name)))
    return model


def coverage(model: torch.nn.Module) -> Coverage:
    """Which attention of a model was computed by mha_c since it was replaced, and why the rest was not.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Returns
    -------
    Coverage
        A row for every ``torch.nn.MultiheadAttention`` and every instance of a subclass, with its calls so far.
        Copies and pickles of a layer count from zero. Calls of a compiled graph are not counted.

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
        class_name = torch_class_of(layer).__name__
        calls = layer._mha_c.calls.by_reason if isinstance(layer, ReplacedAttention) else {}
        if not calls:
            calls = {why_left_alone(layer) or ("never called" if isinstance(layer, ReplacedAttention) else "not replaced"): 0}
        for reason, count in calls.items():
            found.add(name, class_name, reason, count)
    return found


def check_model(model: object, function: str) -> None:
    """Raise TypeError unless `model` is a torch module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, but got {type(model)}")


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.MultiheadAttention]]:
    """The attention layers of a model by name, those of subclasses included."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.MultiheadAttention):
            yield name, layer


def torch_class_of(layer: torch.nn.MultiheadAttention) -> type[torch.nn.MultiheadAttention]:
    """The class of a layer without what `set_attention_class` and parametrize have put over it."""
    cls = _class_below_parametrize(layer)
    return getattr(cls, "_torch_class", cls)


def why_left_alone(layer: torch.nn.MultiheadAttention) -> str:
    """Why the layer cannot be replaced, or "": its forward may do anything."""
    is_torchs = "forward" not in vars(layer) and torch_class_of(layer).forward is torch.nn.MultiheadAttention.forward
    return "" if is_torchs else "a forward of its own"


def set_attention_class(model: torch.nn.Module, mixin: type[torch.nn.MultiheadAttention]) -> None:
    """Put a class over those of the attention layers whose forward is torch's, and see to it that they are called."""
    layers = list(attention_layers(model))
    if not layers:
        raise ValueError(f"there is no torch.nn.MultiheadAttention to replace in this {type(model).__name__}")
    replaceable = [layer for _, layer in layers if not why_left_alone(layer)]
    if not replaceable:
        named = ", ".join(f'"{name}" ({torch_class_of(layer).__name__})' for name, layer in layers)
        raise ValueError(
            f"no attention of this {type(model).__name__} can be replaced: {named} has a forward of its own, "
            "which may compute anything"
        )
    for layer in replaceable:
        if not isinstance(layer, mixin):
            _set_class(layer, _class_over(torch_class_of(layer), mixin))
    for module, name, unfused in _fusing_modules(model):
        if name in vars(module) and any(isinstance(layer, mixin) for layer in module.modules()):
            vars(module).setdefault(_saved(name), getattr(module, name))
            setattr(module, name, unfused)


_classes_over: dict[tuple[type, type], type[torch.nn.MultiheadAttention]] = {}


def _class_over(
    cls: type[torch.nn.MultiheadAttention], mixin: type[torch.nn.MultiheadAttention]
) -> type[torch.nn.MultiheadAttention]:
    """`mixin` for torch's own class; for a subclass, one that is a subclass of both."""
    if cls is torch.nn.MultiheadAttention:
        return mixin
    if (cls, mixin) not in _classes_over:
        name = mixin.__name__.removesuffix("Attention") + cls.__name__
        _classes_over[cls, mixin] = type(name, (mixin, cls), {"_torch_class": cls})
    return _classes_over[cls, mixin]


def _class_below_parametrize(layer: torch.nn.MultiheadAttention) -> type[torch.nn.MultiheadAttention]:
    """torch.nn.utils.parametrize makes a class for each module, whose weights are properties."""
    return type(layer).__bases__[0] if is_parametrized(layer) else type(layer)


def _set_class(layer: torch.nn.MultiheadAttention, cls: type[torch.nn.MultiheadAttention]) -> None:
    """Change the class of a layer, below the one that parametrize may have made for it."""
    if is_parametrized(layer):
        members = {name: value for name, value in vars(type(layer)).items() if name not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), members)
    layer.__class__ = cls


def _fusing_modules(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, object]]:
    """Modules that may fuse their layers; the attribute that decides it, and the value with which they do not."""
    for module in model.modules():
        for cls, (name, unfused) in _FUSING.items():
            if isinstance(module, cls):
                yield module, name, unfused


def _saved(name: str) -> str:
    """Where a module keeps the original value, so that copies and pickles of a replaced model can be restored too."""
    return f"_{name}_in_torch"


class _State:
    """The packed parameters and the calls of one layer; copies and pickles of it start anew."""

    def __init__(self) -> None:
        self.packed = PackedParameters()
        self.calls = Calls()

    def __reduce__(self) -> tuple[type[_State], tuple[()]]:
        return _State, ()


class ReplacedAttention(torch.nn.MultiheadAttention):
    """A ``torch.nn.MultiheadAttention`` whose inference is computed by mha_c; `replace_attention` makes them.

    A layer of a subclass, whose forward is torch's, becomes an instance of a subclass of both.

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

    _torch_class: ClassVar[type[torch.nn.MultiheadAttention]] = torch.nn.MultiheadAttention

    @functools.cached_property
    def _mha_c(self) -> _State:
        """What a replaced layer has besides torch's."""
        return _State()

    def refresh(self) -> None:
        """Read the parameters anew at the next call, after a change that was not noticed.

        Every call looks for changes of the parameters. It may miss one of single numbers that torch does not count:
        through ``parameter.data``, NumPy or shared memory.

        Examples
        --------
        >>> import torch
        >>> attention = replace_attention(torch.nn.MultiheadAttention(8, 2))
        >>> attention.in_proj_weight.data[5, 3] = 1.0
        >>> attention.refresh()
        """
        self._mha_c.packed.drop()

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
    ) -> _Answer:
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
            answer = self.forward_in_mha_c(query, key, value, *masks)
            if not isinstance(answer, str):
                self._mha_c.calls.add()
                return answer
            self._mha_c.calls.add(answer)
            if answer in ("training", "gradients"):
                self.refresh()
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
    ) -> _Answer | str:
        """What forward returns, or in a few words why torch is to answer.

        Parameters
        ----------
        query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            As for `forward`.

        Returns
        -------
        tuple of torch.Tensor and torch.Tensor or None, or str

        Examples
        --------
        >>> import torch
        >>> attention = replace_attention(torch.nn.MultiheadAttention(8, 2))
        >>> attention.forward_in_mha_c(*[torch.zeros(5, 3, 8)] * 3, None, True, None, True, False)
        'training'
        """
        if self.training:
            return "training"
        if "parametrizations" in self._modules or "parametrizations" in self.out_proj._modules:
            return "parametrized weights"
        return project_and_attend(
            self._mha_c.packed,
            self._tensors(),
            (self.embed_dim, self.num_heads, self.kdim, self.vdim),
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            add_zero_attn=self.add_zero_attn,
            batch_first=self.batch_first,
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What torch's forward would read, by the names of the state dict, without its hooks."""
        inputs = ("in_proj_weight",) if self._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        own = {name: _attribute(self, name) for name in (*inputs, "in_proj_bias", "bias_k", "bias_v")}
        out = {f"out_proj.{name}": _attribute(self.out_proj, name) for name in ("weight", "bias")}
        return {name: tensor for name, tensor in (own | out).items() if tensor is not None}

    def train(self, mode: bool = True) -> ReplacedAttention:
        """As torch's. What is packed is dropped: training changes it.

        Parameters
        ----------
        mode : bool, default True
            Whether the layer is to be in training mode.

        Returns
        -------
        ReplacedAttention
            The layer itself.

        Examples
        --------
        >>> import torch
        >>> replace_attention(torch.nn.MultiheadAttention(8, 2)).train().training
        True
        """
        if mode:
            self.refresh()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ReplacedAttention:
        """Moves and casts leave the old numbers behind; do not keep their memory."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.refresh()
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles name torch's class, since that of a replaced layer may be made at run time."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return _new_replaced, (torch_class_of(self),), *reduced[2:]

    def __prepare_scriptable__(self) -> torch.nn.MultiheadAttention:
        """What torch.jit.script compiles in place of this layer."""
        plain = self._torch_class.__new__(self._torch_class)
        vars(plain).update({name: value for name, value in vars(self).items() if name != "_mha_c"})
        return plain


def _new_replaced(cls: type[torch.nn.MultiheadAttention]) -> torch.nn.MultiheadAttention:
    """A replaced layer of torch's class or a subclass, still empty."""
    replaced = _class_over(cls, ReplacedAttention)
    return replaced.__new__(replaced)


def _attribute(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """As getattr, but faster where it is a parameter."""
    parameter = module._parameters.get(name)
    return getattr(module, name) if parameter is None else parameter
