# SPDX-License-Identifier: Apache-2.0
"""Activations of feed-forward networks, by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from mha_c import _core
from mha_c.parameters.arrays import Array
from mha_c.parameters.encoders import ACTIVATIONS

__all__ = ["CORE_ACTIVATIONS", "Activation", "activate", "activation", "is_gated", "torch_activation"]

Activation: TypeAlias = str | Callable[[Any], Any]

CORE_ACTIVATIONS: Final[dict[str, tuple[str, bool]]] = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "silu": ("silu", False),
    "quick_gelu": ("quick_gelu", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
}
"""All names, with what the core calls them, and whether they are gated.

Gated ones are from "GLU Variants Improve Transformer" (Shazeer, 2020).
"""


def activation(name: str, value: Any) -> Activation:
    """An activation as layers keep it: a name where mha_c has it, else the callable itself.

    Parameters
    ----------
    name : str
        The name of the argument.
    value : str or callable
        One of `CORE_ACTIVATIONS`; a function or a module of torch, such as ``torch.nn.functional.relu``; or any other
        callable, which takes and returns arrays.

    Returns
    -------
    str or callable

    Raises
    ------
    RuntimeError
        If the name is not known, as in torch.
    TypeError
        If the value is something else.

    Examples
    --------
    >>> activation("activation", "relu")
    'relu'
    """
    if isinstance(value, str):
        if value not in CORE_ACTIVATIONS:
            meant = ACTIVATIONS.get(value.lower(), value.lower())
            known = f"mha_c knows {', '.join(map(repr, CORE_ACTIVATIONS))}"
            cure = f'write "{meant}"' if meant in CORE_ACTIVATIONS else known
            raise RuntimeError(f"activation should be relu/gelu, not {value}: {cure}")
        return value
    known_name = torch_activation(value)
    if known_name is not None:
        return known_name
    if not callable(value):
        raise TypeError(f"{name} must be a name or a callable, but got {value!r}")
    return value  # type: ignore[no-any-return]


def torch_activation(value: Any) -> str | None:
    """The name of an activation of torch, if mha_c has it."""
    torch = sys.modules.get("torch")  # where it was not imported, this cannot be a part of it
    if torch is None:
        return None
    nn = torch.nn
    if type(value) is nn.GELU:
        return "gelu_tanh" if value.approximate == "tanh" else "gelu"
    for name, kind, functions in (
        ("relu", nn.ReLU, (nn.functional.relu, torch.relu)),
        ("gelu", None, (nn.functional.gelu,)),
        ("silu", nn.SiLU, (nn.functional.silu,)),
    ):
        if type(value) is kind or any(value is function for function in functions):
            return name
    return None


def is_gated(value: Activation) -> bool:
    """Whether it takes twice as many features as it gives: gates, then what they let through."""
    return isinstance(value, str) and CORE_ACTIVATIONS[value][1]


def activate(input: Array, value: Activation) -> Array:
    """Apply an activation.

    Parameters
    ----------
    input : numpy.ndarray, (..., features)
        (..., 2 * features) for a gated activation: the gates come first, and they are activated.
    value : str or callable
        What `activation` gave.

    Returns
    -------
    numpy.ndarray
        (..., features).

    Examples
    --------
    >>> import numpy as np
    >>> activate(np.array([-1.0, 2.0]), "relu")
    array([0., 2.])
    """
    if not isinstance(value, str):
        return value(input)  # type: ignore[no-any-return]
    return _core.activate(input, *CORE_ACTIVATIONS[value])
