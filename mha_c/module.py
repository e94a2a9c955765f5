# SPDX-License-Identifier: Apache-2.0
"""What every layer has, as torch.nn.Module gives it: immutable parameters, casts, modes, state dicts."""

import itertools
import json
import math
import operator
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

import numpy as np

from mha_c._lock import lock
from mha_c._typing import Self
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.parameters.arrays import Array, as_array
from mha_c.parameters.checks import flag
from mha_c.parameters.dtypes import DTYPES, float_dtype
from mha_c.parameters.files import write_checkpoint
from mha_c.parameters.quantization import (
    MatmulPrecision,
    Precision,
    precision_of_products,
    precision_of_weights,
    shortest,
)
from mha_c.parameters.sets import ArraySet
from mha_c.parameters.state_dict import (
    IncompatibleKeys,
    OtherLayer,
    advice_on_saved_file,
    arrays_for_file,
    check_description,
    check_names,
    match_state_dict,
    open_saved_layer,
)

__all__ = [
    "Module",
    "Option",
    "Parameter",
    "PrecisionOfProducts",
    "check_device",
    "check_memory",
    "check_torch_module",
    "dtypes_for",
    "in_words_of",
    "is_patched",
    "module_from_description",
    "module_from_torch",
    "overridden_method",
    "precisions_of",
]

_Value = TypeVar("_Value")
_Module = TypeVar("_Module", bound="Module")

# The classes whose `from_state_dict` reads the layers of Hugging Face's models.
_OF_TRANSFORMERS: Final = ("MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer")

_DEVICES = ("cpu", "cuda", "hip", "hpu", "meta", "mps", "mtia", "xla", "xpu")


class Parameter(property):
    """A parameter as an attribute: reading gives the array, or None where the layer has none; assigning replaces it."""

    def __init__(self, name: str, doc: str) -> None:
        def read(layer: "Module") -> Array | None:
            return layer._parameters.array(name)

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
        self.__doc__ = doc

    if TYPE_CHECKING:

        def __get__(self, layer: Any, owner: type | None = None) -> _Value: ...  # type: ignore[override]

        def __set__(self, layer: Any, value: _Value) -> None: ...


class PrecisionOfProducts(property):
    """`matmul_precision` as an attribute of a layer that multiplies, or with layers in it that do."""

    def __init__(self) -> None:
        def read(layer: "Module") -> MatmulPrecision | None:
            found: dict[str, Precision | None] = {}
            for at, module in layer._places():
                for name, weights in module._products(at).items():
                    precision = module._parameters.precisions.get(weights[0])
                    if found.setdefault(name, precision) != precision:
                        raise AttributeError(
                            f"layers in this one differ in the matmul_precision of {name}: ask each of them"
                        )
            return shortest(found)

        def assign(layer: "Module", value: Any) -> None:
            precisions = layer._precisions(value)
            _replace([
                (module, {"precisions": one})
                for (_, module), one in zip(layer._places(), precisions)
                if one != module._parameters.precisions
            ])

        super().__init__(read, assign)
        self.__doc__ = (
            'What linear maps and attention multiply: None (bfloat16 in a layer of bfloat16, otherwise float32 or '
            'float64), "float32", "bfloat16", "int8", or a mapping from their names.'
        )

    if TYPE_CHECKING:

        def __get__(  # type: ignore[override]
            self, layer: Any, owner: type | None = None
        ) -> MatmulPrecision | None: ...

        # Checkers do not take a literal of a dict for MatmulPrecision here.
        def __set__(self, layer: Any, value: Precision | Mapping[str, str | None] | None) -> None: ...


_kinds: Final[dict[str, type["Module"]]] = {}
"""The classes of this package that torch has too, by their names in torch.nn, which files use."""


class Module:
    """The base of all layers: it has parameters of its own, and layers in it, or none.

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

    training = Option("training", flag, "Whether the layer is in training mode.")

    _kind: ClassVar[str]  # the name of the class in torch.nn

    # Of the layer itself; replaced as a whole, so that a call uses one set throughout.
    _parameters: ArraySet = ArraySet({}, np.dtype(np.float32))
    _children: Mapping[str, "Module | None"] = MappingProxyType({})
    _training: bool  # where it is kept: each call may read it, and a property takes longer

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_kind" in vars(cls):
            _kinds[cls._kind] = cls
        # A call is forward without an indirection, unless a class defines __call__ itself.
        if cls.__call__ in [base.__dict__.get("forward") for base in cls.__mro__]:
            cls.__call__ = cls.forward  # type: ignore[attr-defined, method-assign]

    def _assign(self, name: str, value: Any) -> None:
        """Replace one parameter, cast to the layer's dtype."""
        shape = self._parameters.shapes.get(name)
        if shape is None:
            raise AttributeError(f"this layer has no {name}: it has {', '.join(self._parameters.shapes)}")
        array = as_array(value, will_cast=True, name=name)
        if array.shape != shape:
            raise ValueError(f"{name} has shape {shape}, but got an array of shape {array.shape}")
        _replace([(self, {"arrays": {name: array}})])

    def _products(self, at: str) -> Mapping[str, Sequence[str]]:
        """The names that the layer itself has in `matmul_precision`: linear maps with the parameters that are their
        weights, and attention; `at` is what precedes the names of the parameters.
        """
        return {}

    def _precisions(self, value: Any) -> list[Mapping[str, Precision]]:
        """What `matmul_precision` says of the weights of this layer and of all in it, in the order of `_places`."""
        products = [module._products(at) for at, module in self._places()]
        chosen = precision_of_products(value, list(dict.fromkeys(name for one in products for name in one)))
        return [precision_of_weights({name: chosen[name] for name in one}, one) for one in products]

    def _places(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        """This layer and all in it, before each what precedes the names of its parameters, in torch's order."""
        yield prefix, self
        for name, child in self._children.items():
            if child is not None:
                yield from child._places(f"{prefix}{name}.")

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        """Iterate over this layer and all layers in it, with their names; each layer once.

        Parameters
        ----------
        prefix : str, default ""
            The name of this layer. A dot is added before those of the others.

        Yields
        ------
        tuple of str and Module

        Examples
        --------
        >>> import mha_c
        >>> [name for name, _ in mha_c.TransformerEncoderLayer(4, 2).named_modules()][:3]
        ['', 'self_attn', 'linear1']
        """
        seen = set()
        for place, module in self._places(f"{prefix}." if prefix else ""):
            if id(module) not in seen:
                seen.add(id(module))
                yield place.removesuffix("."), module

    def modules(self) -> Iterator["Module"]:
        """Iterate over this layer and all layers in it, each once.

        Yields
        ------
        Module

        Examples
        --------
        >>> import mha_c
        >>> [type(module).__name__ for module in mha_c.TransformerEncoderLayer(4, 2).modules()][:3]
        ['TransformerEncoderLayer', 'MultiheadAttention', 'Linear']
        """
        yield from (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, "Module"]]:
        """Iterate over the layers right in this one, with their names; each layer once.

        Yields
        ------
        tuple of str and Module

        Examples
        --------
        >>> import mha_c
        >>> dict(mha_c.TransformerEncoderLayer(4, 2).named_children())["norm1"]
        LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
        """
        seen = set()
        for name, child in self._children.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                yield name, child

    def children(self) -> Iterator["Module"]:
        """Iterate over the layers right in this one, each once.

        Yields
        ------
        Module

        Examples
        --------
        >>> import mha_c
        >>> len(list(mha_c.TransformerEncoderLayer(4, 2).children()))
        8
        """
        yield from (child for _, child in self.named_children())

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
        for place, module in self.named_modules(prefix):
            for name, array in module._parameters.arrays.items():
                yield f"{place}.{name}" if place else name, array

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
        yield from (array for _, array in self.named_parameters())

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
        places = self._places(prefix)
        return OrderedDict((at + name, array) for at, one in places for name, array in one._parameters.arrays.items())

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
            If `state_dict` is not a mapping. A file is read by `load` or, where a class has it, by `from_state_dict`.

        Examples
        --------
        >>> import mha_c
        >>> attention = mha_c.MultiheadAttention(8, 2)
        >>> attention.load_state_dict(mha_c.MultiheadAttention(8, 2).state_dict())
        <All keys matched successfully>
        """
        if isinstance(state_dict, str | os.PathLike):
            raise TypeError(
                f"Expected state_dict to be dict-like, got {type(state_dict)}. This is a path: "
                f"{self._what_reads_paths()}."
            )
        return self._take(state_dict, strict)

    def _take(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        precisions: Iterable[Mapping[str, Precision] | None] = itertools.repeat(None),
    ) -> IncompatibleKeys:
        """Replace the parameters, and also the precisions if `_precisions` gave them. Weights are quantized once."""
        shapes = {at + name: shape for at, one in self._places() for name, shape in one._parameters.shapes.items()}
        check_names(state_dict)
        layer_name = type(self).__name__
        advice = advice_on_saved_file(layer_name, state_dict)
        arrays, incompatible = match_state_dict(layer_name, shapes, state_dict, strict, advice, will_cast=True)

        def found(at: str, module: Module) -> dict[str, Array]:
            return {name: arrays[at + name] for name in module._parameters.shapes if at + name in arrays}

        _replace([
            (module, {"arrays": found(at, module), "precisions": one})
            for (at, module), one in zip(self._places(), precisions)
        ])
        return incompatible

    def to(self, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> Self:
        """Cast the parameters, in place; the CPU is the only device.

        Parameters
        ----------
        device : str, torch.device, or the dtype
            "cpu" or None. As in torch, the dtype may be the only argument.
        dtype : str, numpy.dtype or torch.dtype, optional
            float32, float64, bfloat16 or float16. None: no change.
        non_blocking : bool, default False
            Ignored. torch has it.

        Returns
        -------
        Module
            The layer itself.

        Raises
        ------
        TypeError
            If it is another dtype.
        ValueError
            If it is float64, and the layer has `matmul_precision`.
        ImportError
            If it is bfloat16, and ml_dtypes is not installed.
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
            real = float_dtype(dtype)
            _replace([(module, {"dtype": real}) for module in self.modules()])
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
        for module in self.modules():
            module.training = mode
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

    def _description(self) -> dict[str, Any]:
        """What a file says of the layer beside its parameters and its mode, for `_described`."""
        raise NotImplementedError

    @classmethod
    def _described(cls, description: Mapping[str, Any], content: Mapping[str, Any]) -> Self:
        """The layer that a file describes. What does not fit is an error, not always a clear one."""
        raise NotImplementedError

    @classmethod
    def _how_to_read(cls) -> str:
        """How to read a file of parameters that `save` did not write, for the error of `load`."""
        reader = f"{cls._kind}.from_state_dict"
        if cls._kind in _OF_TRANSFORMERS:
            return (
                f'{reader}(path, config="config.json") reads the file of a Hugging Face model, and '
                f"{reader}(path, num_heads=...) one with torch's names"
            )
        if hasattr(cls, "from_state_dict"):
            return f"{reader} reads it"
        return f"make a {cls._kind} with its arguments, and pass the arrays of the file to load_state_dict"

    @classmethod
    def _what_reads_paths(cls) -> str:
        """What reads the file at a path, for the errors of what takes no path."""
        reads_checkpoints = f", {cls.__name__}.from_state_dict a checkpoint" if hasattr(cls, "from_state_dict") else ""
        return f"{cls.__name__}.load reads a file of save{reads_checkpoints}"

    def _full_description(self) -> dict[str, Any]:
        described = {"layer": self._kind, **self._description(), "training": self.training}
        if self._parameters.precisions:
            described["matmul_precision"] = self.matmul_precision  # type: ignore[attr-defined]
        return described

    def save(self, path: str | os.PathLike[str], *, packed: bool = False) -> None:
        """Write the layer to a file.

        The file holds the parameters, the constructor's arguments and the training mode, also those of the layers in
        this one, but not the number of calls that dropout has counted. An existing file is replaced only when the new
        one is complete. NumPy lacks bfloat16: an .npz file holds it as uint16, in a field called "bfloat16".

        Parameters
        ----------
        path : str or path-like
            A name that ends in .npz, or in .safetensors if the package safetensors is installed.
        packed : bool, default False
            Whether weights with the `matmul_precision` "int8" are written as int8 numbers, in about a quarter of
            float32's bytes: in place of "weight", "weight_int8" and the scales of its rows, "weight_scale". The layer
            that is loaded then holds int8 numbers alone. Its results are the same, and its weights are what the
            numbers stand for. Such a layer is always written in this way.

        Raises
        ------
        ValueError
            If the name has another ending; with `packed`, if no weight has the `matmul_precision` "int8", or one of
            them holds NaN or infinity.
        TypeError
            If the layer computes something that a file cannot describe, such as a function of the caller.
        ImportError
            If safetensors is needed and not installed.
        OSError
            If the file cannot be written; an existing file is then unchanged.

        Examples
        --------
        >>> import mha_c, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mha_c.MultiheadAttention(8, 2, seed=0).eval().save(f"{folder}/layer.npz")
        ...     mha_c.MultiheadAttention.load(f"{folder}/layer.npz").training
        False
        """
        if packed and "int8" not in precisions_of(self):
            raise ValueError('packed=True writes int8 weights, but this layer has none: set matmul_precision="int8"')
        arrays = {
            at + name: array
            for at, module in self._places()
            for name, array in arrays_for_file(module._parameters, at, packed).items()
        }
        write_checkpoint(path, arrays, json.dumps(self._full_description()))

    @classmethod
    @knows_foreign_keywords
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load a layer that `save` wrote: its parameters bit for bit, its arguments and its training mode.

        Nothing in the file is executed.

        Parameters
        ----------
        path : str or path-like
            The file. Its name does not matter.

        Returns
        -------
        Module
            A layer of this class.

        Raises
        ------
        ValueError
            If the file is incomplete or damaged, was not written by `save`, or holds another layer.
        ImportError
            If the layer is in bfloat16, and ml_dtypes is not installed.
        OSError
            If the file cannot be opened.

        Examples
        --------
        >>> import mha_c, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mha_c.MultiheadAttention(8, 2, kdim=5, dtype="float64").save(f"{folder}/layer.npz")
        ...     mha_c.MultiheadAttention.load(f"{folder}/layer.npz").k_proj_weight.shape
        (8, 5)
        """
        with open_saved_layer(cls._kind, path, cls._how_to_read()) as (description, content):
            return _load(cls, description, content)

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
        """Cast the parameters to float16, in place: ``to("float16")``.

        Returns
        -------
        Module
            The layer itself.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2).half().out_proj.weight.dtype
        dtype('float16')
        """
        return self.to("float16")

    def bfloat16(self) -> Self:
        """Cast the parameters to bfloat16, in place: ``to("bfloat16")``.

        Returns
        -------
        Module
            The layer itself.

        Raises
        ------
        ImportError
            If ml_dtypes is not installed.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.MultiheadAttention(8, 2).bfloat16().out_proj.weight.dtype
        dtype(bfloat16)
        """
        return self.to("bfloat16")


def _replace(changes: Sequence[tuple[Module, Mapping[str, Any]]]) -> None:
    """Swap in new sets of parameters, with these changes, all or none. If another thread was faster, start again from
    its sets.
    """
    while True:
        old = [module._parameters for module, _ in changes]
        new = [parameters.with_changes(**change) for parameters, (_, change) in zip(old, changes)]
        with lock:
            if all(module._parameters is parameters for parameters, (module, _) in zip(old, changes)):
                for parameters, (module, _) in zip(new, changes):
                    module._parameters = parameters
                return


def _load(cls: type[_Module], description: Mapping[str, Any], content: Mapping[str, Any]) -> _Module:
    """A layer of a class, from what `_full_description` gave and its parameters."""
    kind = description.get("layer", "MultiheadAttention")  # which older files do not say
    if kind != cls._kind:
        if kind not in _kinds:
            raise ValueError(f"mha_c has no {kind}")
        raise OtherLayer(f"a {kind}, not a {cls._kind}: use mha_c.{kind}.load")
    check_description(description, {"training": bool})
    layer = cls._described(description, content)
    layer.training = description["training"]
    return layer


def module_from_description(description: Mapping[str, Any], content: Mapping[str, Any]) -> Module:
    """A layer of any class, as a part of a file describes it, and its parameters."""
    return _load(_kinds[description["layer"]], description, content)


def module_from_torch(module: Any) -> Module:
    """A layer from a layer of torch, of the same name."""
    cls = _class_for(module)
    if cls is None:
        raise TypeError(f"from_torch takes layers that mha_c has, but got {_name_of_class(module)}")
    made: Module = cls.from_torch(module)  # type: ignore[attr-defined]  # each of them has it
    return made


def _class_for(module: Any) -> type[Module] | None:
    """The class of this package for a layer of torch, by its name."""
    nn: Any = getattr(sys.modules.get("torch"), "nn", None)
    return next((cls for kind, cls in _kinds.items() if isinstance(module, getattr(nn, kind, ()))), None)


def _is_device(value: Any) -> bool:
    """Whether torch would take it for a device, rather than for a dtype."""
    return type(value).__name__ in ("device", "int") or str(value).partition(":")[0] in _DEVICES


def check_torch_module(module: Any, kind: str, instead: str, methods: Sequence[str] = ("forward",)) -> Any:
    """What `from_torch` accepts: a layer of torch of this kind, with torch's methods.

    Parameters
    ----------
    module : object
        What was passed.
    kind : str
        The name of the class in ``torch.nn``.
    instead : str
        What to do with a layer that overrides forward, for the error.
    methods : sequence of str, default ("forward",)
        The names of torch's methods that compute.

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
    torch: Any = sys.modules.get("torch")  # where it was not imported, this cannot be a layer of it
    expected = None if torch is None else getattr(torch.nn, kind, None)
    if expected is None or not isinstance(module, expected):
        raise TypeError(f"from_torch takes a torch.nn.{kind}, but got {_describe_module(module, kind)}")
    # A layer that mha_c.torch.replace_attention has changed knows its class in torch.
    module_class = getattr(type(module), "_torch_class", type(module))
    if name := overridden_method(module, module_class, expected, methods):
        raise TypeError(
            f"from_torch takes a torch.nn.{kind}, but this {module_class.__name__} overrides {name}, which could "
            f"compute anything. {instead}"
        )
    everywhere = torch.nn.modules.module
    hooks = [("every module", everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks)]
    for path, part in module.named_modules():
        if path.rpartition(".")[2] != "out_proj":  # torch's attention does not call it
            hooks.append((path or "this one", part._forward_pre_hooks, part._forward_hooks))
    for where, before, after in hooks:
        if not all(map(_is_known_hook, (*before.values(), *after.values()))):
            raise TypeError(
                f"from_torch takes a torch.nn.{kind}, but {where} has a forward hook, which could compute anything: "
                f"remove it. {instead}"
            )
    return torch


def overridden_method(layer: Any, cls: type[Any], torchs: type[Any], methods: Sequence[str]) -> str:
    """The first of some methods that a layer of this class does not have from torch's class, or "".

    Examples
    --------
    >>> import torch
    >>> overridden_method(torch.nn.Linear(2, 2), torch.nn.Linear, torch.nn.Linear, ("forward",))
    ''
    """
    for name in methods:
        if name in vars(layer) or getattr(cls, name) is not getattr(torchs, name) or is_patched(torchs, name):
            return name
    return ""


def is_patched(cls: type[Any], method: str) -> bool:
    """Whether a method of a class of torch or transformers was replaced by one from elsewhere.

    Examples
    --------
    >>> import torch
    >>> is_patched(torch.nn.Linear, "forward")
    False
    """
    package = cls.__module__.partition(".")[0]
    return str(getattr(getattr(cls, method), "__module__", None)).partition(".")[0] != package


def in_words_of(error: Exception, said: str, instead: str) -> str:
    """Reword a refusal of `from_torch` for another function. The hint at another class's `from_torch` is dropped.

    Examples
    --------
    >>> error = TypeError("from_torch takes a Linear, but got a LayerNorm, which mha_c.LayerNorm.from_torch takes")
    >>> in_words_of(error, "from_torch takes", "explain takes")
    'explain takes a Linear, but got a LayerNorm'
    """
    return str(error).partition(", which mha_c.")[0].replace(said, instead, 1)


def _is_known_hook(hook: Any) -> bool:
    """Whether a hook makes a weight from others, as weight_norm and pruning do, or only listens, as mha_c's do."""
    modules = [getattr(hook, "__module__", None) or "", *(cls.__module__ for cls in type(hook).__mro__)]
    return any(name.startswith(("torch.nn.utils.", "mha_c.")) for name in modules)


def _describe_module(module: Any, kind: str) -> str:
    """The class of a module, and the layers of a kind of torch's in it; or what takes it, if it is something else."""
    torch = sys.modules.get("torch")
    if isinstance(module, type):
        return f"the class {module.__module__}.{module.__qualname__}: pass a layer"
    described = _name_of_class(module)
    if isinstance(module, str | os.PathLike):
        return f"{described}: {_kinds[kind]._what_reads_paths()}"
    if isinstance(module, Mapping):
        reader = f"{kind}.from_state_dict" if hasattr(_kinds[kind], "from_state_dict") else "a layer's load_state_dict"
        return f"{described}: parameters alone are for {reader}"
    if torch is None or not isinstance(module, torch.nn.Module):
        return described
    names = [name for name, part in module.named_modules() if isinstance(part, getattr(torch.nn, kind, ()))]
    if not names:
        if kind in _OF_TRANSFORMERS and described.startswith("transformers."):
            reader = f"{kind}.from_state_dict(module.state_dict(), config=model.config.to_dict())"
            described += f". For a module of transformers, write {reader}"
        cls = _class_for(module)
        return f"{described}, which mha_c.{cls._kind}.from_torch takes" if cls else described
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    which = "one of them" if len(names) > 1 else "that layer"
    return f"{described}. It holds {', '.join(names[:3])}{more}: pass {which}"


def _name_of_class(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def dtypes_for(module: Module) -> list[str]:
    """The dtypes to which a layer may be cast."""
    return [name for name in DTYPES if name != "float64" or not precisions_of(module)]


def precisions_of(module: Module) -> set[Precision]:
    """What `matmul_precision` says in a layer, and in the layers in it."""
    return {precision for one in module.modules() for precision in one._parameters.precisions.values()}


def check_device(device: Any) -> None:
    """The CPU is the only device."""
    if device is not None and str(device) not in ("cpu", "cpu:0"):
        raise RuntimeError(f'mha_c computes on the CPU: device must be None or "cpu", but got {device!r}')


def check_memory(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any], words: str) -> None:
    """Refuse parameters beyond the address space, for which NumPy would raise ValueError; `words` say why so many."""
    size = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    if size > sys.maxsize:
        raise MemoryError(f"the parameters would take {size:,} bytes, with {words}")
