# SPDX-License-Identifier: Apache-2.0
"""The attention of Hugging Face's models by name. Imported through mha_c.torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mha_c.display.coverage import Coverage
from mha_c.torch.functions import ONE_QUERY, AttentionMode, is_one_query

__all__ = ["changes_nothing", "register_transformers", "registered_name", "uses_torchs_masks"]

# Keyword arguments that change nothing, since the mask says the same. Those whose names begin with "output_" ask a
# model for more outputs, and change nothing either.
_WITHOUT_EFFECT = frozenset(
    {"cache_position", "deterministic", "logits_to_keep", "position_ids", "sliding_window", "use_cache"}
)

_names: set[str] = set()  # registered here


def register_transformers(name: str = "mha_c") -> Coverage:
    """Let the models of Hugging Face's transformers use ``attn_implementation="mha_c"``.

    mha_c then computes the calls on the CPU in float32, float64, bfloat16 and float16 that need no gradient. Other
    calls are left to transformers' own function for torch's attention, ``"sdpa"``, and are counted with the reason.
    All results have the meaning that they have with this function, in the installed version.

    Parameters
    ----------
    name : str, default "mha_c"
        The name of the attention, for `attn_implementation`.

    Returns
    -------
    Coverage
        The calls of all models that use this name: a row for each class, and for each ``layer_idx`` of a layer that has
        one. Registering the name again starts another coverage.

    Raises
    ------
    ImportError
        If transformers is not installed, or is older than 4.57.
    TypeError, ValueError
        If `name` is not an identifier, or already has a meaning in transformers.

    Notes
    -----
    A call raises NotImplementedError, and says what to do, if mha_c would have to ignore something that the model asks
    for: soft caps, attention sinks, any unknown keyword, and models for which transformers does not allow ``"sdpa"``.

    ``output_attentions=True`` is computed as well: attention to the rows of an identity matrix gives the weights, as
    they are before dropout. A query that sees no key has weights of 0.

    A call with one query and several keys, as in generation, is left to torch in float32 and float64, in which torch is
    still faster at it.

    Examples
    --------
    >>> import torch, transformers
    >>> coverage = register_transformers()
    >>> config = transformers.BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    >>> model = transformers.BertModel._from_config(config, attn_implementation="mha_c").eval()
    >>> with torch.no_grad():
    ...     output = model(torch.tensor([[5, 6, 7, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0]]))
    >>> coverage
    Calls of attention: 2 computed by mha_c, 0 left to torch
    <BLANKLINE>
    module   class              mha_c  torch  reason
    layer 0  BertSelfAttention      1      0
    layer 1  BertSelfAttention      1      0
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "register_transformers needs transformers, which is not installed: `pip install transformers`"
        ) from error
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            f"the attention interface of transformers {transformers.__version__} cannot be imported: {error}. "
            "register_transformers needs transformers 4.57 or later"
        ) from error
    attentions: Any = AttentionInterface
    _check_name(name, attentions())
    coverage = Coverage()
    attentions.register(name, _make_attention(sdpa_attention_forward, coverage))
    AttentionMaskInterface.register(name, _make_mask(sdpa_mask, PreTrainedModel))
    _names.add(name)
    return coverage


def changes_nothing(keyword: str, argument: object) -> bool:
    """Whether a keyword argument that models pass on to their layers leaves the results of attention as they are.

    Examples
    --------
    >>> changes_nothing("use_cache", False), changes_nothing("softcap", 30.0), changes_nothing("softcap", None)
    (True, False, True)
    """
    return argument is None or keyword in _WITHOUT_EFFECT or keyword.startswith("output_")


def uses_torchs_masks(config: Any) -> bool:
    """Whether a model makes masks of numbers to add or booleans to keep, for each query and key.

    Examples
    --------
    >>> import transformers
    >>> uses_torchs_masks(transformers.BertConfig(attn_implementation="eager"))
    True
    >>> uses_torchs_masks(transformers.BertConfig(attn_implementation="flex_attention"))
    False
    """
    name = config._attn_implementation
    return name in (None, "eager", "sdpa") or name in _names


def registered_name(model: torch.nn.Module) -> str:
    """The name of `register_transformers` by which a model, or one in it, computes its attention; "" if there is none.

    Examples
    --------
    >>> registered_name(torch.nn.Linear(2, 2))
    ''
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    names = (getattr(config, "_attn_implementation", None) for config in configs)
    return next((name for name in names if isinstance(name, str) and name in _names), "")


def _check_name(name: object, taken: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, but got {type(name)}")
    if not name.isidentifier() or name == "eager" or "flash" in name or name in taken and name not in _names:
        raise ValueError(f"name must be an identifier without a meaning in transformers, but got {name!r}")


def _make_attention(sdpa_attention: Callable[..., Any], coverage: Coverage) -> Callable[..., Any]:
    """What transformers calls for each layer: its own function for torch, in which ours computes."""
    understood = inspect.signature(sdpa_attention).parameters

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        for keyword, argument in kwargs.items():
            if keyword not in understood and not changes_nothing(keyword, argument):
                raise _not_computed(module, keyword)
        if attention_mask is None:
            _check_without_mask(module, query.shape[2], key.shape[2], **kwargs)
        wants_weights = kwargs.pop("output_attentions", False)

        def attend(value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            output: torch.Tensor = sdpa_attention(module, query, key, value, attention_mask, **kwargs)[0]
            return output  # (N, L, H, features of a value)

        if torch.compiler.is_compiling():  # what follows is not for a compiler
            return attend(value, **kwargs), None
        place = _place_of(module), type(module).__name__
        if is_one_query(query, key):  # transformers may make several calls of it, for groups of heads
            coverage.add(*place, ONE_QUERY)
            output = attend(value, **kwargs)
        else:
            with AttentionMode(coverage, *place):
                output = attend(value, **kwargs)
        if not wants_weights:
            return output, None
        with AttentionMode(Coverage()):  # the same call, not counted again
            identity = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(*value.shape[:2], -1, -1)
            weights = attend(identity, **{**kwargs, "dropout": 0.0})
        return output, weights.transpose(1, 2)

    return attention


def _check_without_mask(
    module: torch.nn.Module,
    queries: int,
    keys: int,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> None:
    """Refuse what only a mask could say: without one, torch's function would compute something else."""
    if sliding_window is not None and keys > sliding_window:
        raise _not_computed(module, "sliding_window without a mask")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if is_causal and queries > 1 and queries != keys:
        raise _not_computed(module, "is_causal without a mask and with more keys than queries")


def _not_computed(module: torch.nn.Module, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{type(module).__name__} asks for {what}, which mha_c does not compute: load this model with "
        'attn_implementation="eager"'
    )


def _place_of(module: torch.nn.Module) -> str:
    layer = getattr(module, "layer_idx", None)
    return "" if layer is None else f"layer {layer}"


def _make_mask(sdpa_mask: Callable[..., Any], models: type) -> Callable[..., Any]:
    """What transformers calls for the mask of all layers."""
    known: Callable[[type], bool] = functools.cache(functools.partial(_supports_sdpa, models))

    def supports_sdpa(config_class: type) -> bool:
        return known(config_class)

    # torch.compile calls it once, when it makes the graph.
    supports_sdpa._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def mask(*, kv_length: int, config: Any = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
        if not supports_sdpa(type(config)):  # some parts of such a model read masks of another kind
            raise NotImplementedError(
                f"the model of a {type(config).__name__} does not support torch's scaled_dot_product_attention, nor "
                'therefore mha_c: load it with attn_implementation="eager"'
            )
        # Without a mask, is_causal alone says which keys a query sees. That is enough where there are as many queries
        # as keys, or one. Gemma 4 leaves out queries after it has asked for the mask, which only a mask can follow.
        queries = kwargs["q_length"] if "q_length" in kwargs else len(kwargs["cache_position"])
        skip = allow_is_causal_skip and queries in (1, kv_length)
        return sdpa_mask(kv_length=kv_length, config=config, allow_is_causal_skip=skip, **kwargs)

    return mask


def _supports_sdpa(models: type, config_class: type) -> bool:
    """Whether transformers lets models with such a configuration use "sdpa", which it checks for that name alone."""
    found = [model for model in _subclasses(models) if getattr(model, "config_class", None) is config_class]
    return not found or any(model._supports_sdpa for model in found)


def _subclasses(cls: Any) -> Iterator[Any]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
