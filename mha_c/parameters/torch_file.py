# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save and torch.jit.save, read without torch.

Such a file is a zip archive. ``data.pkl`` is a pickle of the containers, and of where each tensor lies; ``data/KEY``
holds the numbers of a storage. The pickle is interpreted here, opcode by opcode. Nothing that it names is imported or
called, so it executes nothing. What is made of it takes memory in proportion to its length.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Sequence
from io import BufferedReader
from typing import Any, Final, Literal, NamedTuple

from mha_c.parameters.stored import Bits, Opaque, StoredArray, item_size, read_array

__all__ = ["read_torch_file"]

_STORAGES: Final = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
}

# Opcodes of pickles that push a constant, an empty container, or their argument.
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Final = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_LITERALS: Final = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
    + ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
)

_MAX_NAME: Final = 500  # characters of a class or a function
_MAX_ARGUMENTS: Final = 16  # of a call


def read_torch_file(path: str, file: BufferedReader) -> Any:
    """What a file of ``torch.save`` or ``torch.jit.save`` holds.

    Parameters
    ----------
    path : str
        Its name, for the errors.
    file : binary file
        The file, which stays open for as long as arrays are read.

    Returns
    -------
    object
        Dictionaries (without entries whose keys are not strings), lists, tuples, numbers and strings as they were
        saved. A tensor is a `StoredArray`, an object of TorchScript is a dictionary of its attributes, and anything
        else is an `Opaque`.

    Raises
    ------
    Exception
        Of any kind, if the file is damaged.

    Examples
    --------
    >>> import tempfile, torch
    >>> with tempfile.TemporaryFile() as file:
    ...     torch.save({"bias": torch.zeros(2), "epoch": 3}, file)
    ...     content = read_torch_file("model.pt", file)
    ...     content["epoch"], content["bias"].bits()
    (3, (array([0., 0.], dtype=float32), 'float32'))
    """
    archive = _Archive(path, file)
    return _Pickle(archive).load(archive.pickle)


class _Storage(NamedTuple):
    """The numbers that tensors share: the name of their member, and their format."""

    key: str
    dtype: str


class _Module(dict[str, Any]):
    """The attributes of an object of TorchScript."""


class _Archive:
    """The zip archive."""

    def __init__(self, path: str, file: BufferedReader) -> None:
        self.path = path
        self._file = file
        self._members = {member.filename: member for member in zipfile.ZipFile(file).infolist()}
        self._folder = next(name for name in self._members if name.endswith("/data.pkl")).removesuffix("data.pkl")
        self.pickle = self._read("data.pkl")
        is_big = f"{self._folder}byteorder" in self._members and self._read("byteorder") == b"big"
        self._byteorder: Literal["<", ">"] = ">" if is_big else "<"

    def tensor(
        self, storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int]
    ) -> StoredArray | Opaque:
        """A tensor, whose numbers are not read yet."""
        if item_size(storage.dtype) is None:
            return Opaque(self.path, f"a tensor of {storage.dtype}")

        def read() -> Bits:
            place = self._place(f"data/{storage.key}")
            return read_array(self._file, *place, storage.dtype, shape, strides, offset, self._byteorder)

        return StoredArray(self.path, read)

    def _read(self, name: str) -> bytes:
        start, stop = self._place(name)
        return read_array(self._file, start, stop, "uint8", (stop - start,))[0].tobytes()

    def _place(self, name: str) -> tuple[int, int]:
        """Where the content of a member begins and ends in the file."""
        member = self._members[self._folder + name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(f"{name} is compressed or encrypted, which torch never does")
        self._file.seek(member.header_offset + 26)  # in a header of 30 bytes, a name and more
        start = member.header_offset + 30 + sum(struct.unpack("<HH", self._file.read(4)))
        return start, start + member.file_size


class _Pickle:
    """A machine that makes the containers, numbers, strings and tensors of a pickle, and an `Opaque` of anything else.

    It knows the opcodes of protocols 2 to 5. It leaves out entries of dictionaries whose keys are not strings: no name
    leads to them, and keys can be made whose hashes take forever. For the same reason nothing is compared or printed
    before its type is checked. An opcode of a few bytes may use again what is long: nothing long is copied for it.
    """

    def __init__(self, archive: _Archive) -> None:
        self.archive = archive
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._opaque: dict[str, Opaque] = {}

    def load(self, content: bytes) -> Any:
        """The object that a pickle describes."""
        import pickletools

        for opcode, argument, _ in pickletools.genops(content):
            self._execute(opcode.name, argument)
        return self._stack.pop()

    def _execute(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if opcode in _LITERALS:
                stack.append(argument)
            case _ if opcode in _CONSTANTS:
                stack.append(_CONSTANTS[opcode])
            case _ if opcode in _EMPTY:
                stack.append(_EMPTY[opcode]())
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._pop(self._marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(len(stack) - int(opcode[-1]))))
            case "APPEND":
                self._extend(self._pop(len(stack) - 1))
            case "APPENDS":
                self._extend(self._pop(self._marks.pop()))
            case "EMPTY_SET":
                stack.append(self.opaque("a set"))
            case "ADDITEMS":
                self._pop(self._marks.pop())
            case "FROZENSET":
                self._pop(self._marks.pop())
                stack.append(self.opaque("a set"))
            case "SETITEM":
                self._update(self._pop(len(stack) - 2))
            case "SETITEMS":
                self._update(self._pop(self._marks.pop()))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(self.opaque(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(self.opaque(".".join(self._pop(len(stack) - 2))))
            case "BINPERSID":
                stack.append(_storage(*stack.pop()))
            case "REDUCE" | "NEWOBJ":
                stack.append(self.call(*self._pop(len(stack) - 2)))
            case "NEWOBJ_EX":
                function, arguments, _ = self._pop(len(stack) - 3)
                stack.append(self.call(function, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Module) and isinstance(state, dict):
                    stack[-1].update(state)
                    state.clear()  # moved, not copied
            case _:
                raise ValueError(f"its pickle has the opcode {opcode}, which torch never writes")

    def _pop(self, start: int) -> list[Any]:
        """Take what lies on the stack from a place on."""
        if not 0 <= start <= len(self._stack):
            raise ValueError("its pickle takes more from the stack than there is")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], dict):
            self._stack[-1].update((key, value) for key, value in zip(items[::2], items[1::2]) if type(key) is str)

    def call(self, function: Opaque, arguments: Sequence[Any]) -> Any:
        """What a function or a class would make of arguments."""
        if function.name in _MAKERS:
            if len(arguments) > _MAX_ARGUMENTS:
                raise ValueError(f"its pickle calls a function with {len(arguments)} arguments")
            return _MAKERS[function.name](self, *arguments)
        is_module = function.name.startswith("__torch__.")
        return _Module() if is_module else self.opaque(f"an object of {function.name}")

    def opaque(self, name: str) -> Opaque:
        """Something of this file that is not read, the same for all that have this name."""
        if len(name) > _MAX_NAME or not name.isprintable():
            raise ValueError("its pickle names a class or a function in an impossible way")
        return self._opaque.setdefault(name, Opaque(self.archive.path, name))


def _storage(kind: str, storage_type: Opaque, key: str, location: str, numbers: int) -> _Storage:
    """What the persistent ID of a storage stands for."""
    if type(key) is not str:
        raise ValueError("its pickle names a storage by something else than a string")
    return _Storage(key, _STORAGES.get(storage_type.name, storage_type.name))


def _ordered_dict(pickle: _Pickle, *pairs: Any) -> Any:
    return pickle.opaque("an OrderedDict made from pairs") if pairs else {}


def _tensor_v2(
    pickle: _Pickle,
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    metadata: Any = None,
) -> StoredArray | Opaque:
    if metadata:
        return pickle.opaque("a tensor that is conjugated or negated")
    return pickle.archive.tensor(storage, offset, shape, strides)


def _tensor_v3(
    pickle: _Pickle,
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: Opaque,
    metadata: Any = None,
) -> StoredArray | Opaque:
    typed = storage._replace(dtype=dtype.name.removeprefix("torch."))
    return _tensor_v2(pickle, typed, offset, shape, strides, requires_grad, hooks, metadata)


def _parameter(pickle: _Pickle, tensor: Any, *_: Any) -> Any:
    return tensor


def _tensor_with_attributes(pickle: _Pickle, function: Opaque, kind: Opaque, arguments: Any, attributes: Any) -> Any:
    if kind.name in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        return pickle.call(function, arguments)
    return pickle.opaque(f"an object of {kind.name}")


# What the functions and classes that a pickle may name would make of their arguments.
_MAKERS: Final[dict[str, Callable[..., Any]]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
}
