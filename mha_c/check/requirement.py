# SPDX-License-Identifier: Apache-2.0
"""What a comparison needs, or an error: torch, products that are not narrow, and arguments that the layer takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mha_c.display.missing import no_torch
from mha_c.module import Module

__all__ = ["arguments_by_name", "refuse_narrow_products", "require_torch"]


def require_torch(function: str) -> None:
    """Raise the ImportError of a function that compares with torch, if torch is not installed.

    Examples
    --------
    >>> require_torch("check.against_torch")
    """
    try:
        from mha_c.torch.convert import TORCH_VERSION  # noqa: F401
    except ImportError as error:
        if error.name != "torch":
            raise
        raise no_torch(f"{function} compares with") from error


def refuse_narrow_products(function: str, module: Any) -> None:
    """Raise the ValueError of a function that compares a layer or a model whose products are narrow.

    Examples
    --------
    >>> import mha_c
    >>> refuse_narrow_products("check.against_torch", mha_c.MultiheadAttention(8, 2))
    """
    if isinstance(module, Module):
        sets = [one._parameters for one in module.modules()]
        is_narrow = any(not {*one.precisions.values()} <= {"float32", one.dtype.name} for one in sets)
        cure = "check a copy of the layer with matmul_precision=None"
    else:
        replaced = [one._mha_c for one in getattr(module, "modules", list)() if hasattr(one, "_mha_c")]
        is_narrow = any(not {*state.packed.precisions.values()} <= {None, "float32"} for state in replaced)
        cure = "replace the layers anew, without matmul_precision"
    if is_narrow:
        raise ValueError(
            f"{function} finds mistakes that are larger than the rounding of this dtype. matmul_precision rounds more "
            f"coarsely and would hide them: {cure}"
        )


def arguments_by_name(function: Callable[..., Any], layer: Module, *inputs: Any, **call: Any) -> dict[str, Any]:
    """All arguments of a call of `function`, defaults included. A refusal is in the words of the layer.

    Examples
    --------
    >>> import mha_c
    >>> layer = mha_c.Linear(2, 2)
    >>> arguments_by_name(layer.forward, layer, 3)
    {'input': 3}
    """
    try:
        bound = inspect.signature(function).bind(*inputs, **call)
    except TypeError:
        layer(*inputs, **call)  # type: ignore[operator]  # which says what to write instead
        raise
    bound.apply_defaults()
    return dict(bound.arguments)
