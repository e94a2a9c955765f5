# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, of any layer: each gives the value as it is kept, or an error that names the argument."""

from __future__ import annotations

import math
import operator
from typing import Any

__all__ = ["flag", "integer", "number", "positive", "size"]


def flag(name: str, value: Any) -> bool:
    """True or False from any object that Python can test for truth, as in torch, except text: "no" would be true."""
    if isinstance(value, str):
        raise TypeError(f"{name} must be True or False, but got {value!r}")
    try:
        return bool(value)
    except ValueError:  # an array of several
        raise TypeError(f"{name} must be True or False, but got {type(value).__name__}") from None


def number(name: str, value: Any, expected: str = "a number") -> Any:
    """The value of an argument that must be a real number."""
    try:
        math.fabs(value)
    except TypeError:
        raise TypeError(f"{name} must be {expected}, but got {value!r}") from None
    return value


def integer(name: str, value: Any) -> int:
    """The value of an argument that must be an int, or something that stands for one."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, but got {value!r}") from None


def positive(name: str, value: Any) -> int:
    """The value of an argument that must be an int above 0."""
    if integer(name, value) <= 0:
        raise ValueError(f"{name} must be greater than 0, but got {value}")
    return operator.index(value)


def size(name: str, value: Any) -> int:
    """The value of an argument that must be an int of at least 0; the error has torch's words."""
    checked = integer(name, value)
    if checked < 0:
        raise RuntimeError(f"Trying to create tensor with negative dimension {checked}: {name} is negative")
    return checked
