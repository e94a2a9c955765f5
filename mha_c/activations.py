# SPDX-License-Identifier: Apache-2.0
"""Activations of feed-forward networks, by name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np

from mha_c.parameters.arrays import Array

__all__ = ["ACTIVATIONS", "Activation", "activate", "activation", "is_gated", "torch_activation"]

Activation: TypeAlias = str | Callable[[Any], Any]

_erf: Final = np.vectorize(math.erf, otypes=[np.float64])


def _gelu(x: Array) -> Array:
    """x Phi(x), with the distribution function of the normal distribution (Hendrycks and Gimpel, 2016)."""
    activated: Array = (x * 0.5 * (1 + _erf(x * math.sqrt(0.5)))).astype(x.dtype)
    return activated


def _gelu_tanh(x: Array) -> Array:
    """The approximation of GELU by a hyperbolic tangent (Hendrycks and Gimpel, 2016)."""
    activated: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return activated


def _logistic(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) may be infinite: the result is then 0
        logistic: Array = 1 / (1 + np.exp(-x))
    return logistic


_FUNCTIONS: Final[dict[str, Callable[[Array], Array]]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x: x * _logistic(x),
    "quick_gelu": lambda x: x * _logistic(1.702 * x),
}

# The gated ones ("GLU Variants Improve Transformer", Shazeer, 2020), with what activates the gate.
_GATED: Final = {"swiglu": "silu", "geglu": "gelu"}

ACTIVATIONS: Final = (*_FUNCTIONS, *_GATED)
"""All names."""


def activation(name: str, value: Any) -> Activation:
    """An activation as layers keep it: a name where mha_c has it, else the callable itself.

    Parameters
    ----------
    name : str
        The name of the argument.
    value : str or callable
        One of `ACTIVATIONS`; a function or a module of torch, such as ``torch.nn.functional.relu``; or any other
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
        if value not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise RuntimeError(f"activation should be relu/gelu, not {value}: mha_c knows {known}")
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
    if isinstance(value, nn.GELU):
        return "gelu_tanh" if value.approximate == "tanh" else "gelu"
    for name, kind, functions in (
        ("relu", nn.ReLU, (nn.functional.relu, torch.relu)),
        ("gelu", nn.GELU, (nn.functional.gelu,)),
        ("silu", nn.SiLU, (nn.functional.silu,)),
    ):
        if isinstance(value, kind) or any(value is function for function in functions):
            return name
    return None


def is_gated(value: Activation) -> bool:
    """Whether it takes twice as many features as it gives: gates, then what they let through."""
    return value in _GATED


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
    >>> activate(np.array([-1.0, 2.0]), "relu")
    array([0., 2.])
    """
    if not isinstance(value, str):
        return value(input)  # type: ignore[no-any-return]
    if value in _GATED:
        gates, passed = np.split(input, 2, axis=-1)
        gated: Array = _FUNCTIONS[_GATED[value]](gates) * passed
        return gated
    return _FUNCTIONS[value](input)
