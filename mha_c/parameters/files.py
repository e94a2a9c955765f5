# SPDX-License-Identifier: Apache-2.0
"""Files of parameters: safetensors, NumPy's .npz, and torch's own. Reading executes nothing that a file contains.

The kind of a file is told by its content. Its arrays are read from the disk when NumPy asks for them, so that one layer
of a large model costs what the layer costs. A file that is written replaces the old one only when complete.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from types import ModuleType
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha_c.parameters.stored import (
    Bits,
    Opaque,
    StoredArray,
    damage_is_value_error,
    file_size,
    item_size,
    number_count,
    read_array,
)

__all__ = ["CONFIG", "Checkpoint", "open_checkpoint", "open_state_dict", "write_checkpoint"]

CONFIG: Final = "__config__"
"""The name under which files hold a text beside the arrays."""

# How .npz files hold bfloat16, which NumPy lacks: as structured arrays, whose only field has this name.
_BFLOAT16: Final = np.dtype([("bfloat16", "<u2")])

# The formats of safetensors, by torch's names.
_SAFETENSORS: Final = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}

# How the names of files of parameters usually end.
_SUFFIXES: Final = (".index.json", ".safetensors", ".npz", ".bin", ".pt", ".pth", ".ckpt")

# How files of other kinds begin, and what can be done about them.
_OTHER_KINDS: Final = {
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.": (
        "in the format of torch before version 1.6: torch.load reads it, and torch.save writes the current one"
    ),
    b"\x80": "a pickle, which may execute anything: load it where you trust it, and pass the state dict",
    b"\x89HDF": "an HDF5 file: open it with h5py, and pass a mapping of names to arrays",
    b"GGUF": "a GGUF file: open it with the package gguf, and pass a mapping of names to arrays",
    b"\x93NUMPY": "one array without a name: np.savez writes several, by the names of a state dict",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: `git lfs pull` fetches it",
    b"<": "a web page, perhaps of a download that failed",
}


class Checkpoint(NamedTuple):
    """What an open file holds.

    Attributes
    ----------
    path : str
        The file.
    content : mapping of str to object
        Arrays by name, each read when NumPy asks for it. In a file of torch's, there may be other objects and further
        mappings among them.
    config : str or None
        A text that came with the arrays: what `write_checkpoint` was given.
    """

    path: str
    content: Mapping[str, Any]
    config: str | None


@contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Open a file of parameters: safetensors, .npz, torch's, or the index of several such files (``.index.json``).

    Parameters
    ----------
    path : str or path-like
        The file.

    Yields
    ------
    Checkpoint
        To be used within the ``with`` statement.

    Raises
    ------
    ValueError
        If the file is incomplete, damaged or of another kind. Some damage only shows when an array is read.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/model.npz", bias=np.zeros(2))
    ...     with open_checkpoint(f"{folder}/model.npz") as checkpoint:
    ...         np.asarray(checkpoint.content["bias"])
    array([0., 0.])
    """
    path = os.fspath(path)
    with ExitStack() as files:
        file = files.enter_context(_open(path))
        beginning = file.peek(9)
        is_index = beginning.startswith(b"{") and beginning[8:9] != b"{"  # where the header of a .safetensors begins
        yield _read_index(path, file, files) if is_index else _read(path, file)


@contextmanager
def open_state_dict(source: Any) -> Iterator[Mapping[str, Any]]:
    """A state dict from wherever it is: what a file holds, or anything else as it is.

    Parameters
    ----------
    source : str or path-like, or mapping of str to array or tensor
        A path is one for `open_checkpoint`.

    Yields
    ------
    mapping of str to array or tensor
        To be used within the ``with`` statement.

    Raises
    ------
    ValueError
        As `open_checkpoint`, and if `write_checkpoint` wrote the file: its text would be ignored.
    OSError
        As `open_checkpoint`.

    Examples
    --------
    >>> with open_state_dict({"bias": np.zeros(2)}) as tensors:
    ...     dict(tensors)
    {'bias': array([0., 0.])}
    """
    if isinstance(source, str | os.PathLike):
        with open_checkpoint(source) as checkpoint:
            if checkpoint.config is not None:
                raise ValueError(
                    f"{checkpoint.path} was written by save, and records the arguments of the layer, which would be "
                    "ignored: read it with the load of the layer's class"
                )
            yield checkpoint.content
    else:
        yield source


def _open(path: str) -> BufferedReader:
    try:
        return open(path, "rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        error.strerror = f"{error.strerror} ({_advice_on_path(os.fsdecode(path))})"
        raise


def _advice_on_path(path: str) -> str:
    """What to pass instead of a path that is none of a file: a folder of a model, or its name in a hub."""
    if not os.path.isdir(path):
        return "mha_c does not download models: pass the path of a file, such as 'bert/model.safetensors'"
    try:
        names = sorted(os.listdir(path))
    except OSError:
        names = []
    files = [name for name in names if name.endswith(_SUFFIXES)]
    if not files:
        return "pass a file of parameters"
    file = min(files, key=lambda name: ("model" not in name, not name.endswith(".index.json")))
    advice = f"pass a file in it, such as {os.path.join(path, file)!r}"
    if "config.json" in names:
        advice += f"; for attention or an encoder, also config={os.path.join(path, 'config.json')!r}"
    return advice


def _read(path: str, file: BufferedReader) -> Checkpoint:
    """What a file holds, of a kind that its first bytes tell."""
    beginning = file.read(32)
    if beginning[8:9] == b"{":  # first: any two bytes may be the length of its header
        return _read_safetensors(path, file)
    if beginning.startswith(b"PK"):
        return _read_zip(path, file)
    if len(beginning) < 32:
        raise ValueError(f"cannot read {path}, which is empty or incomplete: it has {len(beginning)} bytes")
    kinds = (kind for start, kind in _OTHER_KINDS.items() if beginning.startswith(start))
    raise ValueError(f"cannot read {path}: it is {next(kinds, 'of an unknown kind')}")


def _read_zip(path: str, file: BufferedReader) -> Checkpoint:
    import zipfile  # takes longer than all of mha_c

    from mha_c.parameters.torch_file import read_torch_file

    with damage_is_value_error(path):
        is_whole = zipfile.is_zipfile(file)
    if not is_whole:
        raise ValueError(f"cannot read {path}, which is incomplete: it is a zip archive whose end is missing")
    with damage_is_value_error(path):
        members = zipfile.ZipFile(file).infolist()
        names = [member.filename for member in members]
        if any(name.endswith("/data.pkl") for name in names):
            content = read_torch_file(path, file)
        elif any(name.endswith(".npy") for name in names):
            # NumPy compresses in no other way; others can make any amount of memory out of a small file.
            if not {member.compress_type for member in members} <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise ValueError("it is compressed in a way that NumPy never uses")
            return _read_npz(path, file)
        else:
            raise ValueError("it is a zip archive without arrays of torch or NumPy")
    if not isinstance(content, dict):
        what = content.name if isinstance(content, Opaque) else type(content).__name__
        raise ValueError(f"cannot read {path}: it holds no state dict, but {what}: save model.state_dict() instead")
    return Checkpoint(path, content, None)


def _read_npz(path: str, file: BufferedReader) -> Checkpoint:
    file.seek(0)
    archive = np.load(file, allow_pickle=False)

    def read(name: str) -> Bits:
        array = np.asarray(archive[name])
        if array.dtype == _BFLOAT16:
            return array.view(np.uint16), "bfloat16"
        return array, array.dtype.name

    names = [name for name in archive.files if name != CONFIG]
    config = str(archive[CONFIG]) if CONFIG in archive.files else None
    return Checkpoint(path, {name: StoredArray(path, functools.partial(read, name)) for name in names}, config)


def _read_safetensors(path: str, file: BufferedReader) -> Checkpoint:
    """A file of eight bytes, which tell the length of a header in JSON, the header, and the numbers."""
    file.seek(0)
    start = end = 8 + int.from_bytes(file.read(8), "little")
    size = file_size(file)
    with damage_is_value_error(path):
        header = json.loads(file.read(start - 8)) if start <= size else {}
        config = header.pop("__metadata__", {}).get(CONFIG)
        content: dict[str, Any] = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            if first < 0:
                raise ValueError(f"{name} begins before the numbers do")
            content[name] = _safetensor(path, file, start + first, start + last, entry["dtype"], entry["shape"])
            end = max(end, start + last)
    if end > size:
        raise ValueError(f"cannot read {path}, which is incomplete: {size:,} of {end:,} bytes are there")
    return Checkpoint(path, content, config)


def _safetensor(
    path: str, file: BufferedReader, start: int, stop: int, kind: str, shape: Sequence[int]
) -> StoredArray | Opaque:
    dtype = _SAFETENSORS.get(kind, kind)
    size = item_size(dtype)
    if size is None:
        return Opaque(path, f"numbers in {kind}")
    if stop - start != number_count(shape) * size:
        raise ValueError(f"an array of {kind} and of the shape {shape} does not take {stop - start} bytes")
    return StoredArray(path, functools.partial(read_array, file, start, stop, dtype, shape))


def _read_index(path: str, file: BufferedReader, files: ExitStack) -> Checkpoint:
    """The arrays of several files beside the index that names them, each opened when it is needed."""
    with damage_is_value_error(path):
        shards = json.load(file).get("weight_map")
        if shards is None:
            raise ValueError("it is JSON, but not an index of files; config= takes a model's config.json")
        if any(os.path.basename(shard) != shard for shard in shards.values()):
            raise ValueError("it names files in other folders")

    @functools.cache
    def content_of(shard: str) -> Mapping[str, Any]:
        shard_path = os.path.join(os.path.dirname(path), shard)
        return _read(shard_path, files.enter_context(open(shard_path, "rb"))).content

    def read(name: str) -> Bits:
        bits: Bits = content_of(shards[name])[name].bits()
        return bits

    return Checkpoint(path, {name: StoredArray(path, functools.partial(read, name)) for name in shards}, None)


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
    ...     with open_checkpoint(f"{folder}/model.npz") as checkpoint:
    ...         checkpoint.config
    'a model'
    """
    if _suffix(path) == ".npz":
        with _replacing(path) as file:
            known = {name: a.view(_BFLOAT16) if a.dtype.name == "bfloat16" else a for name, a in arrays.items()}
            np.savez(file, **{CONFIG: np.array(config)}, **known)  # type: ignore[arg-type]
    else:
        content = _import_safetensors().numpy.save(dict(arrays), {CONFIG: config})
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


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = os.path.splitext(path)[1]
    if suffix not in (".safetensors", ".npz"):
        raise ValueError(f"the name of a saved file must end in .safetensors or .npz, but got {os.fspath(path)!r}")
    return suffix


def _import_safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        words = "safetensors files need `pip install safetensors`; .npz files need no extra package"
        raise ImportError(words) from error
    return safetensors
