# SPDX-License-Identifier: Apache-2.0
"""torch's layers of encoders and decoders with their inference computed by mha_c. Imported through mha_c.torch."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch.nn.modules import module as _torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mha_c.activations import torch_activation
from mha_c.module import is_patched
from mha_c.torch.attend import LayerState, resolve_hint
from mha_c.torch.packed import AttentionShape, LayerFacts, PackedLayer
from mha_c.torch.reasons import why_torch
from mha_c.torch.replaced import Replaced, ReplacedAttention, part_of
from mha_c.torch.transform import (
    LayerMasks,
    LayerReading,
    Masks,
    transform,
    transform_apart_from_compiler,
    transform_in_graph,
)

__all__ = [
    "ACTIVATION",
    "DROPOUT",
    "LINEAR",
    "NORM",
    "Classes",
    "ReplacedDecoderLayer",
    "ReplacedEncoderLayer",
    "ReplacedLayer",
    "activation_name",
    "are_norms_of",
    "tensors_of",
    "why_patched",
]

Classes: TypeAlias = tuple[type[torch.nn.Module], ...]

# The classes of the parts of a layer, to be compared by ==: torch.compile has copies of tuples.
LINEAR: Classes = (torch.nn.Linear, NonDynamicallyQuantizableLinear)
ATTENTION: Classes = (ReplacedAttention,)  # and subclasses
NORM: Classes = (torch.nn.LayerNorm,)
DROPOUT: Classes = (torch.nn.Dropout, torch.nn.Identity)
ACTIVATION: Classes = ()  # a function, or a module of many classes


class ReplacedLayer(Replaced):
    """A layer of an encoder or a decoder whose inference mha_c computes. `replace_layers` makes such layers.

    Examples
    --------
    >>> import torch
    >>> from mha_c.torch import ReplacedLayer, replace_layers
    >>> layer = replace_layers(torch.nn.TransformerEncoderLayer(8, 2))
    >>> isinstance(layer, ReplacedLayer), isinstance(layer, torch.nn.TransformerEncoderLayer)
    (True, True)
    """

    # The modules that the forward of torch's class uses, by path, and the classes for which it is known.
    _parts: ClassVar[Mapping[str, Classes]]

    @functools.cached_property
    def _mha_c(self) -> LayerState[PackedLayer]:
        return LayerState(PackedLayer())

    def refresh(self) -> None:
        """Read the parameters again at the next call, after a change that would not be noticed.

        See `ReplacedAttention.refresh`.

        Examples
        --------
        >>> import torch
        >>> from mha_c.torch import replace_layers
        >>> replace_layers(torch.nn.TransformerEncoderLayer(8, 2)).refresh()
        """
        super().refresh()
        for module in self.modules():
            if isinstance(module, ReplacedAttention):
                module.refresh()

    def _read(self, parts: Mapping[str, Any]) -> LayerReading | str:
        """What the layer is, or why torch is to compute it."""
        raise NotImplementedError

    def _resolve(self, masks: LayerMasks, x: torch.Tensor, reading: LayerReading) -> LayerMasks | str:
        """Masks as mha_c has them, or why torch is to compute them."""
        raise NotImplementedError

    def _answer(self, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What mha_c computes, or if it cannot, what torch's forward returns."""
        proxy: Any = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.fx.Proxy)), None)
        if proxy is not None:  # torch.fx does not look into torch's own layers either
            return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(self), args, kwargs)
        answer = "export" if torch.compiler.is_exporting() else self._compute(*args, **kwargs)
        self._count(answer)
        return theirs(*args, **kwargs) if isinstance(answer, str) else answer

    def forward_in_mha_c(self, *args: Any, **kwargs: Any) -> torch.Tensor | str:
        """Return what the layer returns, or if torch has to compute it, the reason in a few words.

        Parameters
        ----------
        *args, **kwargs
            As for the layer.

        Returns
        -------
        torch.Tensor or str

        Examples
        --------
        >>> import torch
        >>> from mha_c.torch import replace_layers
        >>> replace_layers(torch.nn.TransformerEncoderLayer(8, 2)).forward_in_mha_c(torch.zeros(5, 8))
        'training'
        """
        bound = inspect.signature(self.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        compute: Callable[..., torch.Tensor | str] = self._compute
        return compute(*bound.args, **bound.kwargs)

    def _compute(self, *args: Any, **kwargs: Any) -> torch.Tensor | str:
        """What `forward` returns, with all arguments that have a name, or why torch is to compute it."""
        raise NotImplementedError

    def _transform(
        self, x: torch.Tensor, memory: torch.Tensor | None, masks: LayerMasks, *, zeroes_padding: bool = False
    ) -> torch.Tensor | str:
        """The output of the layer, or why torch is to compute it."""
        if self.training:
            return "training"
        parts = _find_parts(self, self._parts)
        reading = parts if isinstance(parts, str) else self._read(parts)
        if isinstance(reading, str):
            return reading
        inputs = (x,) if memory is None else (x, memory)
        given = [one for mask in masks for one in (mask.key_padding_mask, mask.attn_mask) if one is not None]
        reason = why_torch(inputs, given, tuple(reading.tensors.values()))
        if reason:
            return reason
        resolved = self._resolve(masks, x, reading)
        if isinstance(resolved, str):
            return resolved
        if torch.compiler.is_compiling():
            return transform_in_graph(self._mha_c.number, reading, x, memory, resolved)
        compute = transform_apart_from_compiler if "torch._dynamo" in sys.modules else transform  # which is faster
        return compute(self._mha_c.packed, reading, x, memory, resolved, zeroes_padding)


# Of layers of torch and transformers, by which their forward computes.
_METHODS = ("_sa_block", "_mha_block", "_ff_block", "feed_forward_chunk")


def why_patched(parts: Mapping[str, Classes], *layers: type[torch.nn.Module]) -> str:
    """Why a class of a layer or of its parts may compute something else than was written in its file, or "".

    Examples
    --------
    >>> why_patched({"linear1": LINEAR})
    ''
    """
    for kind in (*layers, *itertools.chain.from_iterable(parts.values())):
        for method in ("forward", "ff_chunk", *_METHODS):
            if hasattr(kind, method) and is_patched(kind, method):
                return f"{kind.__name__}.{method} is patched"
    return ""


def _find_parts(layer: torch.nn.Module, classes: Mapping[str, Classes]) -> dict[str, Any] | str:
    """The parts of a layer by path, or why one of them may compute something else than its class says."""
    if _torch_module._global_forward_hooks or _torch_module._global_forward_pre_hooks:
        return "hooks of all modules"
    found: dict[str, Any] = {"": layer}
    for name in _METHODS:
        if name in layer.__dict__:
            return f"overrides {name}"
    for path, known in classes.items():
        within, _, name = path.rpartition(".")
        module = found[path] = part_of(found[within], name)
        kind = type(module)
        if module is None:
            return f"no {path}"
        if not issubclass(kind, torch.nn.Module):
            if known == ACTIVATION and activation_name(module) is not None:
                continue
            return f"{path} {getattr(module, '__name__', kind.__name__)}"
        if "parametrizations" in module._modules:
            return "parametrized weights"
        if not _is_known(module, known):
            return f"{path} is a {kind.__module__}.{kind.__qualname__}"
        if module.training:
            return "training"
        for name in ("forward", "ff_chunk"):
            if name in module.__dict__:
                return f"{path} overrides {name}"
        if module._forward_pre_hooks or any(map(_may_matter, module._forward_hooks.values())):
            return f"hooks of {path}"
    return found


def _is_known(module: torch.nn.Module, known: Classes) -> bool:
    if known == ACTIVATION:
        return activation_name(module) is not None
    return isinstance(module, ATTENTION) if known == ATTENTION else type(module) in known


def _may_matter(hook: Any) -> bool:
    """Whether a hook may have to be called. Those of transformers record outputs, if a model is asked for them."""
    if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
        return True
    asked = hook.__globals__["_active_collector"].get()
    return asked is not None and not asked.keys() <= {"hidden_states"}


# Modules of transformers.activations, and the names that mha_c has for what they compute.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}


def activation_name(value: Any) -> str | None:
    """The name of an activation, a function or a module of torch or transformers, if the core has it.

    Examples
    --------
    >>> activation_name(torch.nn.GELU("tanh"))
    'gelu_tanh'
    """
    kind = type(value)
    if kind.__module__ == "transformers.activations":
        return _ACTIVATIONS.get(kind.__name__)
    return torch_activation(value)


def are_norms_of(norms: Sequence[Any], width: int) -> bool:
    """Whether norms take rows of this width; one without parameters would not show it otherwise.

    Examples
    --------
    >>> are_norms_of([torch.nn.LayerNorm(8)], 8), are_norms_of([torch.nn.LayerNorm((5, 8))], 8)
    (True, False)
    """
    return all(norm.normalized_shape == (width,) for norm in norms)


def tensors_of(part: str, module: Any) -> dict[str, torch.Tensor]:
    """The weight and the bias of a linear map or a norm, by the names of `PackedLayer`.

    Parameters
    ----------
    part : str
        What the names begin with, without a dot.
    module : torch.nn.Linear or torch.nn.LayerNorm
        The module.

    Returns
    -------
    dict of str to torch.Tensor

    Examples
    --------
    >>> list(tensors_of("norm0", torch.nn.LayerNorm(8, bias=False)))
    ['norm0.weight']
    """
    parameters: Mapping[str, torch.Tensor | None] = module._parameters
    return {
        f"{part}.{name}": tensor
        for name in ("weight", "bias")
        if (tensor := parameters[name] if name in parameters else getattr(module, name)) is not None
    }


class _LayerOfTorch(ReplacedLayer):
    """What torch's two kinds of layers share."""

    _attentions: ClassVar[tuple[str, ...]]
    _norms: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        parts = dict.fromkeys(cls._attentions, ATTENTION) | {f"{name}.out_proj": LINEAR for name in cls._attentions}
        parts |= {"linear1": LINEAR, "activation": ACTIVATION, "linear2": LINEAR, "dropout": DROPOUT}
        parts |= dict.fromkeys(cls._norms, NORM)
        cls._parts = parts | {name.replace("norm", "dropout"): DROPOUT for name in cls._norms}

    def _read(self, parts: Mapping[str, Any]) -> LayerReading | str:
        attentions = [parts[name] for name in self._attentions]
        norms = [parts[name] for name in self._norms]
        if not are_norms_of(norms, attentions[0].embed_dim):
            return "unusual parameters"
        if len({bool(one.batch_first) for one in attentions}) > 1:
            return "attentions that differ in batch_first"
        tensors = {
            f"attention{number}.{name}": tensor
            for number, one in enumerate(attentions)
            for name, tensor in one._tensors(parts[f"{self._attentions[number]}.out_proj"]).items()
        }
        for number, norm in enumerate(norms):
            tensors |= tensors_of(f"norm{number}", norm)
        for name in ("linear1", "linear2"):
            tensors |= tensors_of(name, parts[name])
        shapes = tuple(AttentionShape(one.embed_dim, one.num_heads, one.kdim, one.vdim) for one in attentions)
        return LayerReading(
            tensors,
            LayerFacts(shapes, tuple(norm.eps for norm in norms)),
            activation_name(parts["activation"]) or "",
            bool(self.norm_first),
            bool(attentions[0].batch_first),
            tuple(bool(one.add_zero_attn) for one in attentions),
        )

    def _resolve(self, masks: LayerMasks, x: torch.Tensor, reading: LayerReading) -> LayerMasks | str:
        resolved = []
        for number, (key_padding_mask, attn_mask, is_causal) in enumerate(masks):
            has_added_keys = reading.adds_zeros[number] or f"attention{number}.bias_k" in reading.tensors
            hint = resolve_hint(is_causal, False, key_padding_mask, attn_mask, has_added_keys)
            if isinstance(hint, str):
                return hint
            resolved.append(Masks(key_padding_mask, *hint))
        return tuple(resolved)


class ReplacedEncoderLayer(_LayerOfTorch):
    """What stands above ``torch.nn.TransformerEncoderLayer`` where mha_c computes it.

    Examples
    --------
    >>> import torch
    >>> from mha_c.torch import replace_layers
    >>> layer = replace_layers(torch.nn.TransformerEncoderLayer(8, 2)).eval()
    >>> with torch.no_grad():
    ...     layer(torch.zeros(5, 3, 8)).shape
    torch.Size([5, 3, 8])
    """

    _attentions = ("self_attn",)
    _norms = ("norm1", "norm2")

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Compute ``torch.nn.TransformerEncoderLayer.forward`` with mha_c if it can, or else with torch.

        Parameters
        ----------
        src, src_mask, src_key_padding_mask, is_causal
            As torch's; in particular `is_causal` is a hint about `src_mask`, not a mask.

        Returns
        -------
        torch.Tensor
            Nested if `src` is.

        Examples
        --------
        >>> import torch
        >>> from mha_c.torch import replace_layers
        >>> layer = replace_layers(torch.nn.TransformerEncoderLayer(8, 2)).eval()
        >>> with torch.no_grad():
        ...     layer(torch.zeros(5, 8)).shape
        torch.Size([5, 8])
        """
        answer: torch.Tensor = self._answer(super().forward, src, src_mask, src_key_padding_mask, is_causal)
        return answer

    def _compute(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None,
        src_key_padding_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor | str:
        attention: Any = self._modules["self_attn"]
        no_masks = src_mask is None and src_key_padding_mask is None
        # torch's encoder makes such tensors to leave out padding.
        if type(src) is torch.Tensor and src.is_nested and no_masks and attention.batch_first:
            return self._compute_nested(src)
        return self._transform(src, None, (Masks(src_key_padding_mask, src_mask, is_causal),))

    def _compute_nested(self, src: torch.Tensor) -> torch.Tensor | str:
        """The same for sequences of different lengths, which torch computes without masks whatever the hint."""
        lengths = torch.tensor([len(one) for one in src.unbind()])
        padded = src.to_padded_tensor(0.0)
        padding = torch.arange(padded.shape[1]) >= lengths[:, None]
        answer = self._transform(padded, None, (Masks(padding),), zeroes_padding=True)
        return answer if isinstance(answer, str) else torch._nested_tensor_from_mask(answer, ~padding, mask_check=False)


class ReplacedDecoderLayer(_LayerOfTorch):
    """What stands above ``torch.nn.TransformerDecoderLayer`` where mha_c computes it.

    Examples
    --------
    >>> import torch
    >>> from mha_c.torch import replace_layers
    >>> layer = replace_layers(torch.nn.TransformerDecoderLayer(8, 2)).eval()
    >>> with torch.no_grad():
    ...     layer(torch.zeros(5, 3, 8), torch.zeros(7, 3, 8)).shape
    torch.Size([5, 3, 8])
    """

    _attentions = ("self_attn", "multihead_attn")
    _norms = ("norm1", "norm2", "norm3")

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """Compute ``torch.nn.TransformerDecoderLayer.forward`` with mha_c if it can, or else with torch.

        Parameters
        ----------
        tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
            As torch's.
        tgt_is_causal, memory_is_causal
            As torch's: hints about `tgt_mask` and `memory_mask`, not masks.

        Returns
        -------
        torch.Tensor

        Examples
        --------
        >>> import torch
        >>> from mha_c.torch import replace_layers
        >>> layer = replace_layers(torch.nn.TransformerDecoderLayer(8, 2)).eval()
        >>> with torch.no_grad():
        ...     layer(torch.zeros(5, 8), torch.zeros(7, 8)).shape
        torch.Size([5, 8])
        """
        answer: torch.Tensor = self._answer(
            super().forward,
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )
        return answer

    def _compute(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None,
        memory_mask: torch.Tensor | None,
        tgt_key_padding_mask: torch.Tensor | None,
        memory_key_padding_mask: torch.Tensor | None,
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> torch.Tensor | str:
        masks = (
            Masks(tgt_key_padding_mask, tgt_mask, tgt_is_causal),
            Masks(memory_key_padding_mask, memory_mask, memory_is_causal),
        )
        return self._transform(tgt, memory, masks)
