# SPDX-License-Identifier: Apache-2.0
"""Files of parameters: safetensors, NumPy's .npz, and torch's own. Reading executes nothing that a file contains.

A file that is read becomes a mapping of names to arrays, each fetched from the disk when it is asked for, so that one
layer of a large model costs what the layer costs. A file that is written replaces the old one only when complete.
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, BinaryIO
from zipfile import is_zipfile

import numpy as np
from numpy.typing import NDArray

__all__ = ["Checkpoint", "open_checkpoint", "open_state_dict", "read_checkpoint", "write_checkpoint"]

_CONFIG = "__config__"


class Checkpoint(Mapping[str, NDArray[Any]]):
    """The arrays of an open file by name, each read when it is asked for.

    Attributes
    ----------
    path : str
        The file.
    config : str or None
        A text that came with the arrays: what `write_checkpoint` was given.
    """

    def __init__(self, path: str, names: list[str], config: str | None) -> None:
        self.path = path
        self._names = dict.fromkeys(names)
        self.config = config

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        with _damage_is_value_error(self.path):
            array = self._read(name)
            if array.dtype.kind not in "biuf":
                raise ValueError(f"{name} holds {array.dtype}, which are no real numbers")
        return array

    def __contains__(self, name: object) -> bool:  # without reading, which Mapping's would do
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @abstractmethod
    def _read(self, name: str) -> NDArray[Any]: ...


class _Safetensors(Checkpoint):
    def __init__(self, path: str, file: BinaryIO) -> None:
        self._file = file
        self._tensors = _import_safetensors().safe_open(path, "np")  # checks that each tensor lies within the file
        super().__init__(path, self._tensors.keys(), (self._tensors.metadata() or {}).get(_CONFIG))

    def _read(self, name: str) -> NDArray[Any]:
        tensor = self._tensors.get_slice(name)
        if tensor.get_dtype() != "BF16":
            return np.asarray(self._tensors.get_tensor(name))
        # NumPy has no bfloat16, but it is the upper half of a float32.
        halves = np.frombuffer(self._bytes(name), "<u2").reshape(tensor.get_shape())
        return (halves.astype(np.uint32) << 16).view(np.float32)

    def _bytes(self, name: str) -> bytes:
        """The bytes of a tensor: a file is the length of its header in eight bytes, the header, and the tensors."""
        self._file.seek(0)
        length = int.from_bytes(self._file.read(8), "little")
        start, stop = json.loads(self._file.read(length))[name]["data_offsets"]
        self._file.seek(8 + length + start)
        return self._file.read(stop - start)


class _Npz(Checkpoint):
    def __init__(self, path: str, file: BinaryIO) -> None:
        import zipfile

        # NumPy compresses in no other way; others can make any amount of memory out of a small file.
        methods = {entry.compress_type for entry in zipfile.ZipFile(file).infolist()}
        if not methods <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise ValueError("it is compressed in a way that NumPy never uses")
        file.seek(0)
        archive = np.load(file, allow_pickle=False)
        self._archive = archive
        config = str(archive[_CONFIG]) if _CONFIG in archive.files else None
        super().__init__(path, [name for name in archive.files if name != _CONFIG], config)

    def _read(self, name: str) -> NDArray[Any]:
        return np.asarray(self._archive[name])


_FORMATS: dict[str, type[_Safetensors] | type[_Npz]] = {".safetensors": _Safetensors, ".npz": _Npz}
_TORCH = (".pt", ".pth", ".bin")


@contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Open a safetensors or an .npz file, as its name ends.

    Parameters
    ----------
    path : str or path-like
        The file. bfloat16 in a safetensors file becomes float32.

    Yields
    ------
    Checkpoint
        To be used within the ``with`` statement.

    Raises
    ------
    ValueError
        If the file is damaged, now or when an array is read, or if its name ends otherwise.
    ImportError
        If it is a safetensors file and safetensors is not installed.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/model.npz", bias=np.zeros(2))
    ...     with open_checkpoint(f"{folder}/model.npz") as tensors:
    ...         dict(tensors)
    {'bias': array([0., 0.])}
    """
    path = os.fspath(path)
    checkpoint_type = _FORMATS[_suffix(path, *_FORMATS)]
    if checkpoint_type is _Safetensors:
        _import_safetensors()
    with open(path, "rb") as file:
        with _damage_is_value_error(path):
            checkpoint = checkpoint_type(path, file)
        yield checkpoint


@contextmanager
def open_state_dict(source: Any) -> Iterator[Mapping[str, Any]]:
    """A state dict from wherever it is: a mapping as it is, or what a file holds.

    Parameters
    ----------
    source : mapping of str to array or tensor, or str or path-like
        A path is one for `open_checkpoint`, or ends in .pt, .pth or .bin: a file of ``torch.save``, which torch reads.

    Yields
    ------
    mapping of str to array or tensor
        To be used within the ``with`` statement.

    Raises
    ------
    TypeError
        If `source` is neither.
    ValueError, ImportError, OSError
        As `open_checkpoint`.

    Examples
    --------
    >>> with open_state_dict({"bias": np.zeros(2)}) as tensors:
    ...     dict(tensors)
    {'bias': array([0., 0.])}
    """
    if isinstance(source, Mapping):
        yield source
        return
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(source)}.")
    if _suffix(os.fspath(source), *_FORMATS, *_TORCH) in _TORCH:
        yield read_checkpoint(source)
    else:
        with open_checkpoint(source) as checkpoint:
            yield checkpoint


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The state dict in a file that ``torch.save`` wrote, without executing what the file may contain.

    Parameters
    ----------
    path : str or path-like
        The file; tensors of torch's zip format are read from the disk when they are used.

    Returns
    -------
    mapping of str to torch.Tensor

    Raises
    ------
    ValueError
        If the file is damaged, holds objects that only code could restore, such as a whole module, or no state dict.
    OSError
        If there is no such file.
    ImportError
        If torch is not installed.

    Examples
    --------
    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"bias": torch.zeros(2)}, f"{folder}/model.pt")
    ...     read_checkpoint(f"{folder}/model.pt")
    {'bias': tensor([0., 0.])}
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("files of torch.save need torch, which is not installed: `pip install torch`") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # torch has no one exception for damaged files
        raise ValueError(f"{os.fspath(path)} is damaged, or holds more than tensors: save a state_dict") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{os.fspath(path)} holds {type(content)}, but no state dict")
    return content


def write_checkpoint(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], config: str) -> None:
    """Write a safetensors or an .npz file, as its name ends; on an error, or a crash, what was there stays.

    Parameters
    ----------
    path : str or path-like
        The file.
    arrays : mapping of str to numpy.ndarray
        What to write.
    config : str
        A text to go with it.

    Raises
    ------
    ValueError
        If the name ends otherwise.
    ImportError
        If it is a safetensors file and safetensors is not installed.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_checkpoint(f"{folder}/model.npz", {"bias": np.zeros(2)}, "a model")
    ...     with open_checkpoint(f"{folder}/model.npz") as tensors:
    ...         tensors.config
    'a model'
    """
    if _suffix(os.fspath(path), *_FORMATS) == ".npz":
        with _replacing(path) as file:
            np.savez(file, **{_CONFIG: np.array(config)}, **arrays)  # type: ignore[arg-type]
    else:
        content = _import_safetensors().numpy.save(dict(arrays), {_CONFIG: config})
        with _replacing(path) as file:
            file.write(content)


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file beside that at `path`, which takes its place when it is complete and on the disk."""
    target = os.path.realpath(path)  # a link stays a link
    temporary = f"{target}.{os.urandom(4).hex()}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == temporary:
            error.filename = os.fspath(path)  # the file that was asked for
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextmanager
def _damage_is_value_error(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each parser has exceptions of its own
        raise ValueError(f"cannot read {path}, which is damaged or of another kind: {error}") from error


def _suffix(path: str, *known: str) -> str:
    suffix = os.path.splitext(path)[1]
    if suffix not in known:
        raise ValueError(f"the name of a file of parameters ends in {', '.join(known)}, but got {path!r}")
    return suffix


def _import_safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ImportError("safetensors files need `pip install safetensors`; .npz files need nothing") from error
    return safetensors
