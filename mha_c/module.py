# SPDX-License-Identifier: Apache-2.0
"""What every layer has, as torch.nn.Module gives it: immutable parameters, casts, modes, state dicts."""

import math
import operator
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from mha_c.parameters.arrays import Array, as_array
from mha_c.parameters.sets import ArraySet
from mha_c.parameters.state_dict import IncompatibleKeys, match_state_dict

if TYPE_CHECKING:
    from typing_extensions import Self
elif sys.version_info >= (3, 11):
    from typing import Self
else:
    Self = Any

__all__ = [
    "Module",
    "Option",
    "Parameter",
    "check_device",
    "check_memory",
    "check_torch_module",
    "flag",
    "float_dtype",
    "lock",
]

_Value = TypeVar("_Value")

_DEVICES = ("cpu", "cuda", "hip", "hpu", "meta", "mps", "mtia", "xla", "xpu")

# Held for an instant, to count a call or to swap a set of parameters, so one lock serves all layers. Forking waits for
# it, or a child could inherit it locked. Reentrant, since a signal handler or a finalizer may call a layer in that
# instant.
lock = threading.RLock()
os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


class Parameter(property):
    """A parameter as an attribute: reading gives the array, or None where the layer has none; assigning replaces it."""

    def __init__(self, name: str, doc: str) -> None:
        def read(layer: "Module") -> Array | None:
            return layer._parameters.arrays.get(name)

        def replace(layer: "Module", value: Any) -> None:
            layer._assign(name, value)

        super().__init__(read, replace)
        self.__doc__ = doc  # before Python 3.12, property's own argument for it does nothing in a subclass

    if TYPE_CHECKING:

        def __get__(self, layer: Any, owner: type | None = None) -> Array | None: ...  # type: ignore[override]


class Option(property, Generic[_Value]):
    """An argument of the constructor as an attribute, which is checked whenever it is assigned."""

    def __init__(self, name: str, check: Callable[[str, Any], _Value], doc: str) -> None:
        def assign(layer: "Module", value: Any) -> None:
            setattr(layer, f"_{name}", check(name, value))

        super().__init__(operator.attrgetter(f"_{name}"), assign)
        self.__doc__ = f"{doc}; a change takes effect at the next call."

    if TYPE_CHECKING:

        def __get__(self, layer: Any, owner: type | None = None) -> _Value: ...  # type: ignore[override]

        def __set__(self, layer: Any, value: _Value) -> None: ...


def flag(name: str, value: Any) -> bool:
    """Any object that Python can test for truth, as in torch, except text: "no" would be true."""
    if isinstance(value, str):
        raise TypeError(f"{name} must be True or False, but got {value!r}")
    return value  # type: ignore[no-any-return]


class Module:
    """The base of all layers; its subclasses set `_parameters`.

    Attributes
    ----------
    training : bool
        Whether the layer is in training mode. A new layer is.

    Examples
    --------
    >>> import mha_c
    >>> isinstance(mha_c.LayerNorm(8), Module)
    True
    """

    training = Option("training", flag, "Whether the layer is in training mode")

    _parameters: ArraySet  # of all parameters; replaced as a whole, so that a call uses one set throughout
    _training: bool  # where it is kept: each call may read it, and a property takes longer

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A call is forward without an indirection, unless a class defines __call__ itself.
        if cls.__call__ in [base.__dict__.get("forward") for base in cls.__mro__]:
            cls.__call__ = cls.forward  # type: ignore[attr-defined, method-assign]

    def _assign(self, name: str, value: Any) -> None:
        """Replace one parameter, cast to the layer's dtype."""
        current = self._parameters.arrays.get(name)
        if current is None:
            raise AttributeError(f"this layer has no {name}: it has {', '.join(self._parameters.arrays)}")
        array = as_array(value)
        if array.shape != current.shape:
            raise ValueError(f"{name} has shape {current.shape}, but got an array of shape {array.shape}")
        self._replace({name: array})

    def _replace(self, arrays: Mapping[str, Array], dtype: np.dtype[Any] | None = None) -> None:
        """Swap in a new set of parameters. If another thread was faster, start again from its set."""
        while True:
            old = self._parameters
            new = old.with_arrays(arrays, dtype)
            with lock:
                if self._parameters is old:
                    self._parameters = new
                    return

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Array]]:
        """Iterate over the names and arrays of the parameters, in the order of the state dict.

        Parameters
        ----------
        prefix : str, default ""
            What to write before each name, followed by a dot.

        Yields
        ------
        tuple of str and numpy.ndarray

        Examples
        --------
        >>> import mha_c
        >>> [(name, array.shape) for name, array in mha_c.MultiheadAttention(4, 2, bias=False).named_parameters()]
        [('in_proj_weight', (12, 4)), ('out_proj.weight', (4, 4))]
        """
        for name, array in self._parameters.arrays.items():
            yield f"{prefix}.{name}" if prefix else name, array

    def parameters(self) -> Iterator[Array]:
        """Iterate over the arrays of the parameters, in the order of the state dict.

        Yields
        ------
        numpy.ndarray

        Examples
        --------
        >>> import mha_c
        >>> sum(array.size for array in mha_c.MultiheadAttention(8, 2).parameters())
        288
        """
        yield from self._parameters.arrays.values()

    def state_dict(self, *, prefix: str = "") -> OrderedDict[str, Array]:
        """Return the parameters by name, with torch's names in torch's order.

        Parameters
        ----------
        prefix : str, default ""
            What to write before each name; no dot is added.

        Returns
        -------
        collections.OrderedDict of str to numpy.ndarray
            The layer's own read-only arrays.

        Examples
        --------
        >>> import mha_c
        >>> list(mha_c.MultiheadAttention(8, 2).state_dict(prefix="attention."))[:2]
        ['attention.in_proj_weight', 'attention.in_proj_bias']
        """
        return OrderedDict((prefix + name, array) for name, array in self._parameters.arrays.items())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Replace the parameters by those of a state dict; if there is an error, nothing changes.

        Parameters
        ----------
        state_dict : mapping of str to array or tensor
            The arrays by torch's names. Any dtype is cast to the layer's.
        strict : bool, default True
            Whether the names must be exactly the layer's.

        Returns
        -------
        IncompatibleKeys
            The named tuple (missing_keys, unexpected_keys).

        Raises
        ------
        RuntimeError
            If names (with `strict`) or shapes differ; the message has torch's words.
        TypeError
            If `state_dict` is not a mapping.

        Examples
        --------
        >>> import mha_c
        >>> attention = mha_c.MultiheadAttention(8, 2)
        >>> attention.load_state_dict(mha_c.MultiheadAttention(8, 2).state_dict())
        <All keys matched successfully>
        """
        shapes = {name: array.shape for name, array in self._parameters.arrays.items()}
        arrays, incompatible = match_state_dict(type(self).__name__, shapes, state_dict, strict)
        self._replace(arrays)
        return incompatible

    def to(self, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> Self:
        """Cast the parameters, in place; the CPU is the only device.

        Parameters
        ----------
        device : str, torch.device, or the dtype
            "cpu" or None. As in torch, the dtype may be the only argument.
        dtype : str, numpy.dtype or torch.dtype, optional
            float32 or float64. None: no change.
        non_blocking : bool, default False
            Ignored. torch has it.

        Returns
        -------
        Module
            The layer itself.

        Raises
        ------
        TypeError
            If the dtype is not float32 or float64.
        RuntimeError
            If the device is not the CPU.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2).to("float64").out_proj.weight.dtype
        dtype('float64')
        >>> mha_c.MultiheadAttention(8, 2).to("cpu", "float64").out_proj.weight.dtype
        dtype('float64')
        """
        if dtype is None and not _is_device(device):
            device, dtype = None, device
        check_device(device)
        if dtype is not None:
            self._replace({}, float_dtype(dtype))
        return self

    def train(self, mode: bool = True) -> Self:
        """Switch training mode on or off. Dropout is active in training mode only.

        Parameters
        ----------
        mode : bool, default True
            True for training mode, False for evaluation mode.

        Returns
        -------
        Module
            The layer itself.

        Raises
        ------
        ValueError
            If `mode` is not a bool.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2).train(False).training
        False
        """
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        self.training = mode
        return self

    def eval(self) -> Self:
        """Switch to evaluation mode, without dropout: ``train(False)``.

        Returns
        -------
        Module
            The layer itself.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2, dropout=0.1).eval().training
        False
        """
        return self.train(False)

    def cpu(self) -> Self:
        """Return the layer itself, which is always on the CPU.

        Returns
        -------
        Module
            The layer itself.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2).cpu().embed_dim
        8
        """
        return self

    def cuda(self, device: Any = None) -> Self:
        """Raise an error: mha_c computes on the CPU only.

        Parameters
        ----------
        device : optional
            Ignored. torch has it.

        Returns
        -------
        Module
            Never.

        Raises
        ------
        RuntimeError
            Always.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2).cuda()
        Traceback (most recent call last):
        RuntimeError: mha_c computes on the CPU: device must be None or "cpu", but got 'cuda'
        """
        return self.to("cuda")

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Accept False, which changes nothing, and refuse True: mha_c has no backward pass.

        Parameters
        ----------
        requires_grad : bool, default True
            Must be False. The default is torch's.

        Returns
        -------
        Module
            The layer itself.

        Raises
        ------
        RuntimeError
            If `requires_grad` is true.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2).requires_grad_(False).embed_dim
        8
        """
        if requires_grad:
            raise RuntimeError("mha_c has no backward pass: requires_grad must be False; torch's layer can be trained")
        return self

    # Below all signatures: in this class, `float` is from here on a method.

    def double(self) -> Self:
        """Cast the parameters to float64, in place: ``to("float64")``.

        Returns
        -------
        Module
            The layer itself.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2).double().out_proj.weight.dtype
        dtype('float64')
        """
        return self.to("float64")

    def float(self) -> Self:
        """Cast the parameters to float32, in place: ``to("float32")``.

        Returns
        -------
        Module
            The layer itself.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2, dtype="float64").float().out_proj.weight.dtype
        dtype('float32')
        """
        return self.to("float32")

    def half(self) -> Self:
        """Raise an error: mha_c computes in float32 and float64 only.

        Returns
        -------
        Module
            Never.

        Raises
        ------
        TypeError
            Always.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2).half()
        Traceback (most recent call last):
        TypeError: dtype must be float32 or float64, in which mha_c computes, but got 'float16'
        """
        return self.to("float16")

    def bfloat16(self) -> Self:
        """Raise an error: mha_c computes in float32 and float64 only.

        Returns
        -------
        Module
            Never.

        Raises
        ------
        TypeError
            Always.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2).bfloat16()
        Traceback (most recent call last):
        TypeError: dtype must be float32 or float64, in which mha_c computes, but got 'bfloat16'
        """
        return self.to("bfloat16")


def _is_device(value: Any) -> bool:
    """Whether torch would take it for a device, rather than for a dtype."""
    return type(value).__name__ in ("device", "int") or str(value).partition(":")[0] in _DEVICES


def check_torch_module(module: Any, kind: str, instead: str) -> Any:
    """What `from_torch` accepts: a layer of torch of this kind, with torch's forward.

    Parameters
    ----------
    module : object
        What was passed.
    kind : str
        The name of the class in ``torch.nn``.
    instead : str
        What to do with a layer that overrides forward, for the error.

    Returns
    -------
    module
        torch itself.

    Raises
    ------
    TypeError
        If `module` is something else.

    Examples
    --------
    >>> check_torch_module(3, "LayerNorm", "")
    Traceback (most recent call last):
    TypeError: from_torch takes a torch.nn.LayerNorm, but got builtins.int
    """
    torch = sys.modules.get("torch")  # where it was not imported, this cannot be a layer of it
    expected = None if torch is None else getattr(torch.nn, kind, None)
    if expected is None or not isinstance(module, expected):
        raise TypeError(f"from_torch takes a torch.nn.{kind}, but got {_describe_module(module, kind)}")
    # A layer that mha_c.torch.replace_attention has changed knows its class in torch.
    module_class = getattr(type(module), "_torch_class", type(module))
    if "forward" in vars(module) or module_class.forward is not expected.forward:
        raise TypeError(
            f"from_torch takes a torch.nn.{kind}, but this {module_class.__name__} overrides forward, which could "
            f"compute anything. {instead}"
        )
    return torch


def _describe_module(module: Any, kind: str) -> str:
    """The class of a module, and the layers of a kind of torch's in it."""
    torch = sys.modules.get("torch")
    described = f"{type(module).__module__}.{type(module).__qualname__}"
    if torch is None or not isinstance(module, torch.nn.Module):
        return described
    names = [name for name, part in module.named_modules() if isinstance(part, getattr(torch.nn, kind, ()))]
    if not names:
        return described
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    which = "one of them" if len(names) > 1 else "that layer"
    return f"{described}. It holds {', '.join(names[:3])}{more}: pass {which}"


def check_device(device: Any) -> None:
    """The CPU is the only device."""
    if device is not None and str(device) not in ("cpu", "cpu:0"):
        raise RuntimeError(f'mha_c computes on the CPU: device must be None or "cpu", but got {device!r}')


def check_memory(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any], words: str) -> None:
    """Refuse parameters beyond the address space, for which NumPy would raise ValueError; `words` say why so many."""
    size = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    if size > sys.maxsize:
        raise MemoryError(f"the parameters would take {size:,} bytes, with {words}")


def float_dtype(dtype: Any) -> np.dtype[Any]:
    """float32 or float64 from a name, a NumPy dtype or, without importing torch, a torch dtype."""
    if dtype is None:
        return np.dtype(np.float32)
    try:
        found = np.dtype(str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype)
    except TypeError:  # bfloat16 among others
        found = None
    if found is not None and found in (np.float32, np.float64):
        return found
    if found is not None and found.kind in "iub":
        raise RuntimeError(
            "Only Tensors of floating point and complex dtype can require gradients: "
            f"dtype must be float32 or float64, but got {dtype!r}"
        )
    raise TypeError(f"dtype must be float32 or float64, in which mha_c computes, but got {dtype!r}")
