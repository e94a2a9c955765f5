# SPDX-License-Identifier: Apache-2.0
"""Arguments as they were passed, in NumPy's words, and errors to which advice is added."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Final, NamedTuple

from mha_c.parameters.arrays import as_array
from mha_c.parameters.dtypes import DTYPES

__all__ = [
    "REFUSALS",
    "Advice",
    "Argument",
    "add_advice",
    "advice_on_integers",
    "advice_on_objects",
    "advice_on_tokens",
    "distinct",
    "dtypes_of",
    "listed",
    "rename_mask",
    "shape_of",
]

REFUSALS: Final = (AssertionError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""The exceptions with which a call is refused, as torch refuses it."""

_TENSOR_CASTS: Final = {"float32": "float", "float64": "double", "float16": "half"}
"""torch's methods that are not called as the dtype."""

_NO_NUMBERS: Final = ("bytes", "datetime64", "str", "timedelta64", "void")


class Advice(NamedTuple):
    """A sentence without its full stop, to join torch's words; it leads where those speak of torch's own machinery."""

    sentence: str
    leads: bool = False


class Argument(NamedTuple):
    """An argument as it was passed; its dtype by NumPy's name for it.

    Examples
    --------
    >>> import numpy as np
    >>> Argument.of("query", np.zeros((5, 8))).cast("float32")
    'query.astype(np.float32)'
    """

    name: str
    value: Any
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, value: Any) -> Argument:
        """Look at anything that the core takes for an array; TypeError for something else."""
        array = value if hasattr(value, "shape") and hasattr(value, "dtype") else as_array(value)
        dtype = getattr(array.dtype, "name", str(array.dtype)).removeprefix("torch.")
        return cls(name, value, tuple(array.shape), dtype)

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype

    @property
    def has_numbers(self) -> bool:
        return not self.dtype.startswith(_NO_NUMBERS)

    def cast(self, dtype: str) -> str:
        """The code that casts it to a dtype of layers or "bool"; complex numbers lose their imaginary part."""
        name = f"{self.name}.real" if self.dtype.startswith("complex") else self.name
        if hasattr(self.value, "detach"):  # a tensor of torch
            return f"{name}.{_TENSOR_CASTS.get(dtype, dtype)}()"
        if hasattr(self.value, "astype"):
            return f"{name}.astype({in_numpy(dtype)})"
        return f"np.asarray({name}, {in_numpy(dtype)})"


def in_numpy(dtype: str) -> str:
    """The code for a dtype. NumPy knows bfloat16 by its name, once a layer of bfloat16 has imported ml_dtypes."""
    return {"bool": "bool", "bfloat16": '"bfloat16"'}.get(dtype, f"np.{dtype}")


def shape_of(value: Any, name: str = "") -> tuple[int, ...]:
    """The shape of an array, a tensor, or whatever else is one to the core. Errors call it `name`."""
    return tuple(value.shape) if hasattr(value, "shape") else as_array(value, name=name).shape


def add_advice(error: Exception, advice: Iterator[Advice]) -> None:
    """Add the first piece of advice, if there is any, to the words of a refusal, in place of earlier advice.

    A layer advises in the names of its arguments. The layer around it, which knows them by other names, advises anew.

    Parameters
    ----------
    error : Exception
        One of `REFUSALS`; its type stays.
    advice : iterator of Advice
        Computed here and now. It may stumble over objects as strange as those that were refused: then there is none.

    Examples
    --------
    >>> error = RuntimeError("mat1 and mat2 must have the same dtype, but got Double and Float")
    >>> add_advice(error, iter([Advice("query is float64", leads=True)]))
    >>> str(error)
    'query is float64. torch says: mat1 and mat2 must have the same dtype, but got Double and Float'
    """
    if type(error) not in REFUSALS:  # one of the caller's own
        return
    words = vars(error).setdefault("_words", str(error))
    with suppress(Exception):
        for sentence, leads in advice:
            error.args = (f"{sentence}. torch says: {words}" if leads else f"{words.rstrip('.')}. {sentence}.",)
            return


def rename_mask(error: Exception, *, attn_mask: str, key_padding_mask: str) -> None:
    """Put other names of the masks into torch's words about their dtypes, as torch's encoder does."""
    words = vars(error).get("_words", str(error))
    found = re.fullmatch(r"(only bool and floating types of )(\w+)( are supported)", words)
    if found:
        name = key_padding_mask if found[2].endswith("padding_mask") else attn_mask
        vars(error)["_words"] = f"{found[1]}{name}{found[3]}"


def advice_on_objects(dtype: str, **arguments: Any) -> Iterator[Advice]:
    """What is no array that NumPy can read. Lists and tuples would take long, and NumPy would choose the dtype."""
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            yield Advice(f"Pass np.asarray({name}, {in_numpy('bool' if name.endswith('mask') else dtype)})")
    tensors = distinct(Argument.of(name, value) for name, value in arguments.items() if hasattr(value, "detach"))
    needing = [one.name for one in tensors if one.value.requires_grad]
    if needing:
        found = f"{listed(needing)} {'require gradients' if needing[1:] else 'requires a gradient'}"
        cure = listed(f"{name}.detach()" for name in needing)
        yield Advice(f"{found}, which mha_c does not compute: pass {cure}", leads=True)
    for one in tensors:
        device = one.value.device
        if device.type == "meta":
            yield Advice(f"{one.name} is on the device meta, where tensors have no numbers", leads=True)
        elif device.type != "cpu":
            found = f"{one.name} is on the device {device}, but mha_c computes on the CPU"
            yield Advice(f"{found}: pass {one.name}.cpu()", leads=True)


def advice_on_tokens(argument: Argument, expected: str) -> Iterator[Advice]:
    """Integers where vectors are expected, in an array of another shape: they may be token ids."""
    if "int" in argument.dtype:
        found = f"{argument.name} is {argument.dtype}, but it must hold vectors, {expected}"
        yield Advice(f"{found}: if it holds token ids, pass their embeddings", leads=True)


def advice_on_integers(mask: Argument | None, shows: bool) -> Iterator[Advice]:
    """A mask that is neither of booleans nor of floats. `shows`: True shows a key, rather than hides it."""
    if mask is None or mask.dtype == "bool" or mask.is_float:
        return
    effect = "shows" if shows else "hides"
    if not mask.has_numbers or mask.dtype.startswith("complex"):
        expected = f"bool, where True {effect} a key, or floats to add to the scores"
        yield Advice(f"{mask.name} is {mask.dtype}: it must be {expected}")
        return
    cast, inverted = mask.cast("bool"), f"{mask.name} == 0"
    hiding, showing = (inverted, cast) if shows else (cast, inverted)
    yield Advice(
        f"{mask.name} is {mask.dtype}, and True {effect} a key here: if 1 marks the keys to hide, pass {hiding}; "
        f"if 1 marks the keys to attend to, as in Hugging Face's attention_mask, pass {showing}"
    )


def distinct(arguments: Iterable[Argument]) -> list[Argument]:
    """Those that are not the same object as one before them."""
    found: list[Argument] = []
    for argument in arguments:
        if all(argument.value is not other.value for other in found):
            found.append(argument)
    return found


def listed(words: Iterable[str]) -> str:
    """Words with commas and an "and" between.

    Examples
    --------
    >>> listed(["query", "key", "value"])
    'query, key and value'
    """
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def dtypes_of(arguments: Iterable[Argument]) -> str:
    """Such as "query and key are float64 and value is float32"."""
    by_dtype: dict[str, list[str]] = {}
    for argument in arguments:
        by_dtype.setdefault(argument.dtype, []).append(argument.name)
    return listed(f"{listed(names)} {'are' if names[1:] else 'is'} {dtype}" for dtype, names in by_dtype.items())
