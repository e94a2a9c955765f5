# SPDX-License-Identifier: Apache-2.0
"""Arrays and tensors of any kind as NumPy arrays."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mha_c.parameters.dtypes import bfloat16_from_bits
from mha_c.parameters.stored import StoredArray

__all__ = ["AnyArray", "Array", "as_array"]

# Names for annotations. At run time they are classes that `help` and `inspect.signature` show in one word.
if TYPE_CHECKING:
    from typing_extensions import Buffer

    class _HasArray(Protocol):
        def __array__(self) -> Any: ...

    class _HasArrayInterface(Protocol):
        @property
        def __array_interface__(self) -> Any: ...

    class _HasDLPack(Protocol):
        def __dlpack__(self) -> Any: ...

    AnyArray: TypeAlias = Buffer | _HasArray | _HasArrayInterface | _HasDLPack
    Array: TypeAlias = NDArray[Any]
else:
    Array = np.ndarray

    class AnyArray(Protocol):
        """An array or tensor: it has the array interface, the buffer protocol or DLPack. A name for annotations."""

    AnyArray.__module__ = "mha_c"


def as_array(value: Any, will_cast: bool = False, name: str = "") -> NDArray[Any]:
    """A NumPy array over `value`, copied only where NumPy cannot read it in place.

    Parameters
    ----------
    value : object
        An array, a tensor of torch, or whatever exposes the array interface, the buffer protocol or DLPack.
    will_cast : bool, default False
        Whether the caller casts the numbers. Without ml_dtypes, those of bfloat16 are then float32.
    name : str, default ""
        What the caller's caller knows it by, for errors.

    Returns
    -------
    numpy.ndarray
        Of the dtype of `value`; float32 for a tensor of float8.

    Raises
    ------
    TypeError
        If `value` is none of these, such as a list, or a masked array of numpy.ma.
    ImportError
        If `value` is a tensor of bfloat16 and ml_dtypes is not installed, unless `will_cast`.

    Examples
    --------
    >>> as_array(memoryview(b"ab"))
    array([97, 98], dtype=uint8)
    """
    if hasattr(value, "filled"):
        found, cure = "expected an array, but got a masked array", "its filled(0)"
        if name:
            found, cure = f"{name} is a masked array", f"{name}.filled(0)"
        raise TypeError(f"{found}, whose mask would be ignored: pass {cure}")
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which NumPy lacks
            return bfloat16_from_bits(value.view(sys.modules["torch"].int16).numpy().view(np.uint16), will_cast)
        if str(value.dtype).startswith("torch.float8"):
            value = value.float()
    if isinstance(value, StoredArray):
        return value.read(will_cast)
    if any(hasattr(value, name) for name in ("__array__", "__array_interface__", "__array_struct__")):
        return np.asarray(value)
    if hasattr(value, "__dlpack__"):
        return np.from_dlpack(value)
    try:
        return np.asarray(memoryview(value))
    except TypeError:
        expected = "expected an array or a tensor, but got"
        if name:
            expected = f"{name} must be an array (NumPy, buffer protocol or DLPack), not"
        raise TypeError(f"{expected} {type(value).__name__}") from None
