# SPDX-License-Identifier: Apache-2.0
"""Layers made of layers: torch's tree of modules, with its names."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, MutableSequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, overload

from mha_c._typing import Self
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.module import (
    Module,
    PrecisionOfProducts,
    check_torch_module,
    module_from_description,
    module_from_torch,
)
from mha_c.parameters.quantization import MatmulPrecision
from mha_c.parameters.state_dict import Part, check_description

__all__ = ["Child", "Container", "ModuleList"]

_Kind = TypeVar("_Kind")
_Layer = TypeVar("_Layer", bound=Module)


class Child(property, Generic[_Kind]):
    """A layer in a layer as an attribute. Any layer, or None, may be assigned, as in torch."""

    def __init__(self, name: str, doc: str) -> None:
        def read(layer: Container) -> Module | None:
            return layer._children[name]

        def replace(layer: Container, value: Any) -> None:
            layer._children[name] = _checked(name, value)

        super().__init__(read, replace)
        self.__doc__ = doc

    if TYPE_CHECKING:

        def __get__(self, layer: Any, owner: type | None = None) -> _Kind: ...  # type: ignore[override]

        def __set__(self, layer: Any, value: Module | None) -> None: ...


def _checked(name: str, value: Any) -> Module | None:
    if value is None or isinstance(value, Module):
        return value
    words = f"cannot assign '{type(value).__name__}' as child module '{name}' (mha_c's layers or None expected)"
    if type(value).__module__.startswith("torch."):
        words += f": pass mha_c.{type(value).__name__}.from_torch(...), if mha_c has this layer"
    raise TypeError(words)


class Container(Module):
    """A layer made of layers, which are attributes under torch's names.

    Examples
    --------
    >>> import mha_c
    >>> isinstance(mha_c.TransformerEncoderLayer(4, 2), Container)
    True
    """

    matmul_precision = PrecisionOfProducts()

    _child_names: ClassVar[tuple[str, ...]]  # in torch's order
    # The attributes that a file and a copy from torch hold, beside the layers.
    _option_kinds: ClassVar[Mapping[str, type | tuple[type, ...]]]

    _children: dict[str, Module | None]

    def _set_up(self, children: Mapping[str, Module | None], options: Mapping[str, Any]) -> None:
        self.training = True
        self._children = {}
        for name, value in [*children.items(), *options.items()]:
            setattr(self, name, value)

    @classmethod
    def _assemble(cls, children: Mapping[str, Module | None], options: Mapping[str, Any]) -> Self:
        """A layer of existing layers."""
        layer = cls.__new__(cls)
        layer._set_up(children, options)
        return layer

    def _description(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in self._option_kinds}
        for name, value in options.items():
            if callable(value):
                raise TypeError(f"a file cannot hold {name}={value!r}: it is code")
        described = {
            name: None if child is None else child._full_description() for name, child in self._children.items()
        }
        return {"options": options, "children": described}

    @classmethod
    def _described(cls, description: Mapping[str, Any], content: Mapping[str, Any]) -> Self:
        check_description(description, {"options": dict, "children": dict})
        options = description["options"]
        check_description(options, cls._option_kinds)
        described = description["children"]
        if list(described) != list(cls._child_names):
            raise ValueError(f"a {cls._kind} does not consist of {', '.join(described)}")
        children = _children_described(described, content)
        return cls._assemble(children, {name: options[name] for name in cls._option_kinds})

    @classmethod
    def _copied(cls, module: Any, options: Mapping[str, Any], matmul_precision: MatmulPrecision | None) -> Self:
        """A layer with the options given, of copies of the layers in a layer of torch, in its mode."""
        children = {name: getattr(module, name) for name in cls._child_names}
        made = cls._assemble(
            {name: None if child is None else module_from_torch(child) for name, child in children.items()}, options
        )
        made.training = module.training
        made.matmul_precision = matmul_precision
        return made

    def __repr__(self) -> str:
        return _tree(self, [(name, repr(child)) for name, child in self._children.items() if child is not None])


def _children_described(described: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Module | None]:
    unexpected = [name for name in content if name.partition(".")[0] not in described]
    if unexpected:
        raise ValueError(f"{unexpected[0]} belongs to no layer")
    return {
        name: None if one is None else module_from_description(one, Part(content, f"{name}."))
        for name, one in described.items()
    }


def _tree(layer: Module, children: Iterable[tuple[str, str]]) -> str:
    """Layers below each other, as torch prints them."""
    lines = [f"({name}): {text}".replace("\n", "\n  ") for name, text in children]
    return "\n  ".join([f"{type(layer).__name__}(", *lines]) + "\n)" if lines else f"{type(layer).__name__}()"


class ModuleList(Container, MutableSequence[_Layer]):
    """Layers in a list, as ``torch.nn.ModuleList``: the names of their parameters begin with their numbers.

    Parameters
    ----------
    modules : iterable of Module, default ()
        The layers.

    Raises
    ------
    TypeError
        If one of them is not a layer.

    Examples
    --------
    >>> import mha_c
    >>> layers = mha_c.ModuleList([mha_c.Linear(2, 2), mha_c.Linear(2, 2), mha_c.LayerNorm(2)])
    >>> layers
    ModuleList(
      (0-1): 2 x Linear(in_features=2, out_features=2, bias=True)
      (2): LayerNorm((2,), eps=1e-05, elementwise_affine=True, bias=True)
    )
    >>> len(layers), list(layers.state_dict())[-1]
    (3, '2.bias')
    """

    _kind = "ModuleList"

    def __init__(self, modules: Iterable[_Layer] = ()) -> None:
        self.training = True
        self._layers: list[_Layer] = []
        self.extend(modules)

    @property
    def _children(self) -> dict[str, Module | None]:  # type: ignore[override]
        return {str(i): layer for i, layer in enumerate(self._layers)}

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[_Layer]:
        return iter(self._layers)

    @overload
    def __getitem__(self, index: int) -> _Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> _Layer | Self:
        if isinstance(index, slice):
            return type(self)(self._layers[index])
        return self._layers[operator.index(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            self._layers[index] = [_layer(one) for one in value]
        else:
            self._layers[operator.index(index)] = _layer(value)

    def __delitem__(self, index: int | slice) -> None:
        del self._layers[index]

    def insert(self, index: int, value: _Layer) -> None:
        """Insert a layer before another one.

        Parameters
        ----------
        index : int
            The number of the other layer.
        value : Module
            The layer.

        Raises
        ------
        TypeError
            If it is not a layer.

        Examples
        --------
        >>> import mha_c
        >>> layers = mha_c.ModuleList([mha_c.Linear(2, 2)])
        >>> layers.insert(0, mha_c.LayerNorm(2))
        >>> len(layers)
        2
        """
        self._layers.insert(index, _layer(value))

    @classmethod
    @knows_foreign_keywords
    def from_torch(cls, module: Any, *, matmul_precision: MatmulPrecision | None = None) -> Self:
        """Make a list from a list of torch.

        Parameters
        ----------
        module : torch.nn.ModuleList
            The list.
        matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
            Of the layers in it, as for their constructors.

        Returns
        -------
        ModuleList

        Raises
        ------
        TypeError
            If `module` is something else, or one of its layers cannot be copied.
        ValueError
            If `matmul_precision` is unknown, or given for a layer of float64.

        Examples
        --------
        >>> import mha_c, torch
        >>> mha_c.ModuleList.from_torch(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))
        ModuleList(
          (0): Linear(in_features=2, out_features=2, bias=True)
        )
        """
        check_torch_module(module, cls._kind, "Its layers may be copied one by one")
        made = cls(module_from_torch(one) for one in module)  # type: ignore[misc]
        made.training = module.training
        made.matmul_precision = matmul_precision
        return made

    def _description(self) -> dict[str, Any]:
        return {"children": [layer._full_description() for layer in self._layers]}

    @classmethod
    def _described(cls, description: Mapping[str, Any], content: Mapping[str, Any]) -> Self:
        check_description(description, {"children": list})
        described = {str(i): one for i, one in enumerate(description["children"])}
        return cls(_children_described(described, content).values())  # type: ignore[arg-type]

    def __repr__(self) -> str:
        runs: list[list[Any]] = []  # of equal layers: the first number, the last, and what they look like
        for i, text in enumerate(map(repr, self._layers)):
            if runs and runs[-1][2] == text:
                runs[-1][1] = i
            else:
                runs.append([i, i, text])
        return _tree(
            self,
            [
                (str(first), text) if first == last else (f"{first}-{last}", f"{last - first + 1} x {text}")
                for first, last, text in runs
            ],
        )


def _layer(value: Any) -> Any:
    if not isinstance(value, Module):
        raise TypeError(f"{type(value).__name__} is not a Module subclass: a ModuleList holds layers of mha_c")
    return value
