# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save and torch.jit.save: read without torch to the same bits, and executing nothing."""

import collections
import io
import os
import pickle
import struct
import sys
import time
import types
import zipfile

import mha_c
import numpy as np
import pytest
from helpers import bits, run_child
from mha_c.parameters import files, stored, torch_file

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")
    for words in ("enable_nested_tensor is True", "ComplexHalf support", "`torch.jit.script. is deprecated")
]

from_state_dict = mha_c.MultiheadAttention.from_state_dict


def read(path):
    """Everything in a file: the arrays as pairs of bits and dtype."""

    def resolved(value):
        if isinstance(value, stored.StoredArray):
            return value.bits()
        if isinstance(value, dict):
            return {key: resolved(item) for key, item in value.items()}
        return type(value)(map(resolved, value)) if isinstance(value, list | tuple) else value

    with open(path, "rb") as file:
        return resolved(torch_file.read_torch_file(str(path), file))


def torch_archive(path, content, members=(), compression=zipfile.ZIP_STORED):
    """A file with this pickle and these further members."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in dict(members).items():
            archive.writestr(f"archive/{name}", data)
    return path


# ---------------------------------------------------------------------------------------- the same as torch

DTYPES = [
    getattr(torch, name)
    for name in "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 "
    "complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split()
]


OTHERS = [torch.float32, torch.Size([2]), torch.device("cpu"), 1j, {1, 2}, np.float64(1), torch.ones(2).to_sparse(),
          torch.zeros(2, device="meta"), np.ones(2)]  # fmt: skip


def assert_same(ours, theirs):
    """To the bit; what is neither a plain tensor nor a container, number or text need not be read."""
    if isinstance(theirs, torch.Tensor) and theirs.layout is torch.strided and theirs.device.type == "cpu":
        array, dtype = ours
        assert f"torch.{dtype}" == str(theirs.dtype) and array.shape == theirs.shape
        expected = torch.empty(theirs.shape, dtype=theirs.dtype).copy_(theirs.detach()).reshape(-1).view(torch.uint8)
        assert np.ascontiguousarray(array).tobytes() == expected.numpy().tobytes()
    elif isinstance(theirs, dict):
        names = [name for name in theirs if isinstance(name, str)]
        assert list(ours) == names
        for name in names:
            assert_same(ours[name], theirs[name])
    elif type(theirs) in (list, tuple):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert_same(one, other)
    elif theirs is None or type(theirs) in (bool, int, float, str):
        assert type(ours) is type(theirs) and (ours == theirs or ours != ours and theirs != theirs)
    else:
        assert isinstance(ours, stored.Opaque | bytes)


def random_tensor(random, storages):
    """Of any dtype, bits and strides, perhaps on a storage that another tensor has, too."""
    if storages and random.random() < 0.4:
        whole = storages[random.integers(len(storages))]
    else:
        dtype = DTYPES[random.integers(len(DTYPES))]
        numbers = random.integers(0, 2 if dtype is torch.bool else 256, 40 * dtype.itemsize, np.uint8)
        whole = torch.from_numpy(numbers).view(dtype)
        storages.append(whole)
    tensor = whole[random.integers(4) :]
    shape = [(), (0,), (4,), (2, 3), (3, 0, 2), (2, 2, 2)][random.integers(6)]
    step = int(random.integers(1, 4))
    tensor = tensor[: step * int(np.prod(shape, dtype=int)) : step].reshape(shape)
    for change in random.choice(["transpose", "expand", "select", "parameter", "attribute"], 2):
        if change == "transpose" and tensor.ndim:
            tensor = tensor.transpose(0, -1)
        elif change == "expand":
            tensor = tensor.expand(2, *tensor.shape)
        elif change == "select" and tensor.numel():
            tensor = tensor[..., -1:] if tensor.ndim else tensor
        elif change == "parameter":
            tensor = torch.nn.Parameter(tensor, requires_grad=tensor.dtype is torch.float32)
        elif change == "attribute":
            tensor = tensor.view(tensor.shape)
            tensor.note = "mine"
    return tensor


def random_content(random, storages, depth=0):
    """Containers of tensors, numbers, texts and other things."""
    kind = random.integers(10) if depth < 4 else random.integers(5)
    if kind < 4:
        return random_tensor(random, storages)
    if kind == 4:
        number = int(random.integers(-(2**62), 2**62)) >> int(random.integers(62))
        plain = [None, True, number, number << 70, float(random.standard_normal()), float("nan"), "Ωμέγα\n" * 90]
        everything = [*plain, b"bytes", *OTHERS]
        return everything[random.integers(len(everything))]
    items = [random_content(random, storages, depth + 1) for _ in range(random.integers(5))]
    if kind == 5:
        return items
    if kind == 6:
        return tuple(items)
    names = [f"name {n}" if random.random() < 0.9 else n for n in range(len(items))]
    return (dict if kind < 9 else collections.OrderedDict)(zip(names, items))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_what_torch_reads(tmp_path):
    """Containers, numbers and texts alike, and tensors to the bit, whatever their strides and whoever shares them."""
    seen = collections.Counter()
    for seed in range(400):
        random = np.random.default_rng(seed)
        storages = []
        content = {f"{n}": random_content(random, storages) for n in range(6)}
        torch.save(content, tmp_path / "a.pt", pickle_protocol=int(random.choice([2, 2, 3, 4, 5])))
        assert_same(read(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=False))
        seen.update(storage.dtype for storage in storages)
    assert set(seen) == set(DTYPES)


def test_objects_of_all_kinds(tmp_path):
    """Those that only code could restore are no error before they are needed; then they are named."""
    weight = torch.nn.MultiheadAttention(8, 2).state_dict()
    imaginary = torch.complex(torch.ones(8, 8), torch.ones(8, 8)).conj().imag  # negated when it is read
    objects = {
        "torch._utils._rebuild_sparse_tensor": weight["out_proj.weight"].to_sparse(),
        "torch._utils._rebuild_meta_tensor_no_storage": weight["out_proj.weight"].to("meta"),
        "conjugated or negated": imaginary,
        "torch.nn.modules.linear.Linear": torch.nn.Linear(2, 2),
        "numpy": np.float64(1),
        "array": np.ones((8, 8)),
        "a tensor of complex32": torch.zeros(8, 8, dtype=torch.complex32),
    }
    for words, value in objects.items():
        torch.save({**weight, "beside": value}, tmp_path / "model.pt")
        assert from_state_dict(tmp_path / "model.pt", num_heads=2).num_heads == 2
        torch.save({**weight, "out_proj.weight": value}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=rf"out_proj\.weight: expected an array, but .*model\.pt holds .*{words}"):
            from_state_dict(tmp_path / "model.pt", num_heads=2)


class Scaled(torch.Tensor):
    """A tensor that might mean something else."""


def test_tensors_of_a_subclass(tmp_path, monkeypatch):
    """They could mean anything: opaque, while parameters with attributes are plain."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.ModuleType(__name__))
    monkeypatch.setattr(sys.modules[__name__], "Scaled", Scaled, raising=False)
    state = torch.nn.MultiheadAttention(8, 2).state_dict()
    torch.save({**state, "out_proj.weight": state["out_proj.weight"].as_subclass(Scaled)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds an object of .*Scaled, which mha_c does not read"):
        from_state_dict(tmp_path / "model.pt", num_heads=2)
    parameter = torch.nn.Parameter(state["out_proj.weight"])
    parameter.note = "mine"
    torch.save({**state, "out_proj.weight": parameter}, tmp_path / "model.pt")
    assert np.array_equal(from_state_dict(tmp_path / "model.pt", num_heads=2).out_proj.weight, parameter.detach())


def test_big_endian_files(tmp_path):
    """As a machine of that kind would write them."""
    state = torch.nn.MultiheadAttention(8, 2).state_dict()
    torch.save(state, tmp_path / "little.pt")
    with zipfile.ZipFile(tmp_path / "little.pt") as little, zipfile.ZipFile(tmp_path / "big.pt", "w") as big:
        for name in little.namelist():
            content = little.read(name)
            if "/data/" in name:
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            big.writestr(name, b"big" if name.endswith("/byteorder") else content)
    assert_same(read(tmp_path / "big.pt"), torch.load(tmp_path / "big.pt"))
    loaded = from_state_dict(tmp_path / "big.pt", num_heads=2)
    assert bits(loaded.state_dict()) == bits(from_state_dict(state, num_heads=2).state_dict())
    assert loaded.in_proj_weight.dtype == np.float32


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "last.ckpt", "model.pth.tar", "model"])
def test_a_layer_of_a_checkpoint(tmp_path, name):
    """Whatever the file is called, and whatever a trainer saved beside."""
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16), 2)
    optimizer = torch.optim.AdamW(encoder.parameters())
    encoder(torch.ones(3, 1, 8)).sum().backward()
    optimizer.step()
    checkpoint = {"state_dict": encoder.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3,
                  "best": np.float64(0.5), "arguments": collections.defaultdict(list, lr=[0.1])}
    torch.save(checkpoint, tmp_path / name)
    expected = mha_c.MultiheadAttention.from_torch(encoder.layers[1].self_attn)
    for prefix in ("layers.1.self_attn.", "state_dict.layers.1.self_attn."):
        loaded = from_state_dict(tmp_path / name, prefix, num_heads=2)
        assert bits(loaded.state_dict()) == bits(expected.state_dict())


@pytest.mark.parametrize("half", [False, True])
def test_torchscript(tmp_path, half):
    """The parameters of a scripted model, under the names of its attributes."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.MultiheadAttention(8, 2), torch.nn.Linear(8, 8)])
            self.scale = 0.5
            self.register_buffer("mean", torch.ones(3))

        def forward(self, x):
            x, _ = self.blocks[0](x, x, x)
            return self.blocks[1](x) * self.scale

    model = Model().bfloat16() if half else Model()
    torch.jit.script(model).save(tmp_path / "model.pt")
    expected = mha_c.MultiheadAttention.from_torch(model.blocks[0])
    for prefix in ("blocks.0.", ""):
        loaded = from_state_dict(tmp_path / "model.pt", prefix, num_heads=2)
        assert bits(loaded.state_dict()) == bits(expected.state_dict())
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "linear.pt")
    with pytest.raises(RuntimeError, match=r'The names are "weight", "bias"\.'):
        from_state_dict(tmp_path / "linear.pt", num_heads=2)


def test_without_torch(tmp_path):
    """torch is not needed; and not imported where it is installed."""
    torch.save({"model": torch.nn.MultiheadAttention(8, 2).state_dict()}, tmp_path / "layer.pt")
    for blocked in (True, False):
        run_child(f"""
            import sys
            if {blocked}:
                sys.modules["torch"] = sys.modules["ml_dtypes"] = sys.modules["safetensors"] = None
            import mha_c
            mha_c.MultiheadAttention.from_state_dict({str(tmp_path / "layer.pt")!r}, num_heads=2)
            assert sys.modules.get("torch") is None
        """)


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    """The pickle, the byte order, and the layer's tensors: of a large storage the part that they are."""
    embedding = torch.zeros(1000, 1000)
    parts = embedding.view(-1)[500_000:].split([192, 64, 499_744])
    state = {"embedding": embedding, "in_proj_weight": parts[0].view(24, 8), "out_proj.weight": parts[1].view(8, 8)}
    torch.save(state, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size > 4_000_000
    spans = []
    original = stored.np.empty
    monkeypatch.setattr(stored.np, "empty", lambda size, dtype: spans.append(size) or original(size, dtype))
    from_state_dict(tmp_path / "model.pt", num_heads=2, strict=False)
    assert {4 * 192, 4 * 64} < set(spans) and max(spans) < 2000


# ------------------------------------------------------------------------------------------------- read_checkpoint


def test_read_checkpoint(tmp_path):
    """All dense tensors of a file, of any dtype, nested or not, from every kind of file."""
    state = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3).T for dtype in DTYPES}
    sparse = torch.ones(2).to_sparse()
    torch.save({"model": state, "epoch": 3, "best": np.float64(1), "sparse": sparse}, tmp_path / "model.pt")
    got = mha_c.torch.read_checkpoint(tmp_path / "model.pt")
    assert list(got) == [f"model.{name}" for name in state]
    for name, tensor in state.items():
        assert got[f"model.{name}"].dtype == tensor.dtype
        assert torch.equal(got[f"model.{name}"].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    module = mha_c.MultiheadAttention(8, 2)
    for suffix in (".npz", ".safetensors"):
        module.save(tmp_path / f"layer{suffix}")
        got = mha_c.torch.read_checkpoint(tmp_path / f"layer{suffix}")
        assert torch.nn.MultiheadAttention(8, 2).load_state_dict(got)
        got["in_proj_weight"].zero_()


# ------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of the file of a small layer."""
    path = tmp_path_factory.mktemp("whole") / "whole.pt"
    torch.manual_seed(0)
    torch.save({"model": torch.nn.MultiheadAttention(4, 2).state_dict(), "epoch": 3}, path)
    return path.read_bytes()


def test_truncated_files(tmp_path, content):
    path = tmp_path / "cut.pth"
    for length in range(0, len(content), 1 + len(content) // 300):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cannot read .*cut\.pth, which is (empty or )?incomplete"):
            from_state_dict(path, num_heads=2)


def test_damaged_files(tmp_path, content):
    """Bytes changed anywhere, above all in the pickle: an error that names the file, or a layer of the right shapes."""
    path = tmp_path / "damaged.pt"
    random = np.random.default_rng(0)
    start = content.index(b"\x80\x02}")
    failed = 0
    for trial in range(1500):
        damaged = np.frombuffer(content, np.uint8).copy()
        span = (start, start + 600) if trial % 3 else (0, len(content))
        places = random.integers(*span, size=1 + trial % 3)
        damaged[places] = random.integers(0, 256, size=len(places))
        path.write_bytes(damaged.tobytes())
        try:
            assert from_state_dict(path, num_heads=2).embed_dim == 4
        except ValueError as error:
            failed += 1
            assert "damaged.pt" in str(error) or "does not fit" in str(error) or "matrix" in str(error)
        except RuntimeError as error:  # a name was damaged
            assert "Error(s) in loading state_dict for MultiheadAttention" in str(error)
    assert failed > 300


def test_the_format_of_old(tmp_path):
    for value in (torch.nn.MultiheadAttention(8, 2).state_dict(), {"a": 1}):
        torch.save(value, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match=r"old\.bin: it is in the format of torch before version 1\.6"):
            from_state_dict(tmp_path / "old.bin", num_heads=2)


@pytest.mark.parametrize("value, words", [(torch.nn.Linear(2, 2), "an object of torch.nn.modules.linear.Linear"),
                                          ([torch.ones(2)], "list"), (torch.ones(2), "StoredArray"), (3, "int")],
                         ids=lambda value: type(value).__name__)  # fmt: skip
def test_files_without_a_state_dict(tmp_path, value, words):
    torch.save(value, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"model\.pt: it holds no state dict, but {words}: save model\.state_dict"):
        from_state_dict(tmp_path / "model.pt", num_heads=2)


def test_compressed_files(tmp_path, content):
    """Which torch never writes, and which could hold far more than their size."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    pickled = members.pop("data.pkl")
    path = torch_archive(tmp_path / "model.pt", pickled, members)
    assert from_state_dict(path, num_heads=2).num_heads == 2
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        torch_archive(path, pickled, members, method)
        with pytest.raises(ValueError, match="compressed or encrypted, which torch never does"):
            from_state_dict(path, num_heads=2)


# ----------------------------------------------------------------------------------------------------- hostility

MARK, TUPLE, REDUCE, BUILD, STOP, EMPTY_TUPLE, EMPTY_DICT, NEWOBJ = b"(", b"t", b"R", b"b", b".", b")", b"}", b"\x81"
TUPLE1, TUPLE2, DUP, BINPERSID, SETITEM = b"\x85", b"\x86", b"2", b"Q", b"s"


def text(value):
    if isinstance(value, bytes):  # a pickle of its own
        return value
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value):
    if isinstance(value, bytes):
        return value
    return b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else pickle.dumps(value, 2)[2:-1]


def in_global(module, name):
    return f"c{module}\n{name}\n".encode()


def called(module, name, *arguments):
    return in_global(module, name) + MARK + b"".join(arguments) + TUPLE + REDUCE


def tensor(shape, strides, offset=0, key="0", kind="FloatStorage", count=4):
    numbers = [MARK + b"".join(map(number, values)) + TUPLE for values in (shape, strides)]
    storage = MARK + text("storage") + in_global("torch", kind) + text(key) + text("cpu") + number(count) + TUPLE
    return called("torch._utils", "_rebuild_tensor_v2", storage + BINPERSID, number(offset), *numbers, b"\x89", b"N")


def pickled(*entries):
    """A pickle of a dictionary with these names and values, which are pickles without ends."""
    return b"\x80\x02}" + b"".join(text(name) + value + SETITEM for name, value in entries) + STOP


EVIL = {
    "os.system": called("os", "system", text("touch executed")),
    "posix.system": called("posix", "system", text("touch executed")),
    "eval": called("builtins", "eval", text("open('executed', 'w')")),
    "Python 2's eval": called("__builtin__", "eval", text("open('executed', 'w')")),
    "exec": called("builtins", "exec", text("open('executed', 'w')")),
    "a module that is imported": called("evil", "anything"),
    "a class": in_global("subprocess", "Popen") + MARK + text("touch executed") + TUPLE + NEWOBJ,
    "a call of a call": called("builtins", "getattr", in_global("os", "path"), text("join")) + EMPTY_TUPLE + REDUCE,
    "a state": called("evil", "Thing") + EMPTY_DICT + text("__class__") + text("x") + SETITEM + BUILD,
    "a state of a dictionary": EMPTY_DICT + EMPTY_DICT + text("items") + number(3) + SETITEM + BUILD,
    "a state of a class": in_global("collections", "OrderedDict") + b"N" + EMPTY_DICT + TUPLE2 + BUILD,
    "a name with dots": called("torch", "storage.os.system", text("touch executed")),
    "a tensor from a function": called("torch._tensor", "_rebuild_from_type_v2", in_global("os", "system"),
                                       in_global("torch", "Tensor"), MARK + text("touch executed") + TUPLE, b"N"),
}  # fmt: skip


class Evil:
    """The usual way."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_is_executed(tmp_path):
    """A hostile value is opaque beside the layer, and an error in its place; no module that it names is imported."""
    torch.save(torch.nn.MultiheadAttention(4, 2).state_dict(), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as archive:
        members = {key.split("/", 1)[1]: archive.read(key) for key in archive.namelist()}
    original = members.pop("data.pkl")
    for n, value in enumerate([*EVIL.values(), pickle.dumps(Evil(), 2)[2:-1]]):
        torch_archive(tmp_path / f"beside{n}.pt", original[:-1] + text("beside") + value + SETITEM + STOP, members)
        torch_archive(tmp_path / f"instead{n}.pt", pickled(("in_proj_weight", value), ("out_proj.weight", value)))
        torch_archive(tmp_path / f"whole{n}.pt", b"\x80\x02" + value + STOP)
    (tmp_path / "evil.py").write_text("open('executed', 'w')\nanything = Thing = dict")
    run_child(f"""
        import encodings.cp437, os, pathlib, sys
        os.chdir({str(tmp_path)!r})
        sys.path.insert(0, {str(tmp_path)!r})
        import mha_c
        mha_c.MultiheadAttention.from_state_dict("plain.pt", num_heads=2)  # which imports what it needs
        events = []
        def audit(event, arguments):
            if event in ("exec", "compile", "import", "os.system", "os.exec", "subprocess.Popen", "pickle.find_class"):
                events.append((event, arguments))
        sys.addaudithook(audit)
        for path in pathlib.Path().glob("*.pt"):
            try:
                mha_c.MultiheadAttention.from_state_dict(path, num_heads=2)
                assert path.name.startswith(("beside", "plain")), path
            except (RuntimeError, ValueError, TypeError) as error:
                assert str(error) and path.name.startswith(("instead", "whole")), (path, error)
            assert not events, (path, events)
        assert "evil" not in sys.modules and not os.path.exists("executed")
    """)


#: Tuples of tuples of tuples ..., each twice in the next.
DOUBLED = EMPTY_TUPLE + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + TUPLE2 for n in range(200))


def nested(count, opening, closing):
    return pickled(("a", opening * count + number(1) + closing * count))


BOMBS = {
    "a memo of gigabytes": pickled(("a", number(1) + b"r\xff\xff\xff\x7f")),
    "a text of gigabytes": pickled(("a", b"X\xff\xff\xff\x7f")),
    "a text of exabytes": pickled(("a", b"\x8d" + b"\xff" * 7 + b"\x7f")),
    "bytes of exabytes": pickled(("a", b"\x8e" + b"\xff" * 7 + b"\x7f")),
    "a number of gigabytes": pickled(("a", b"\x8b\xff\xff\xff\x7f")),
    "a frame of exabytes": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + EMPTY_DICT + STOP,
    "a tuple of nothing": pickled(("a", TUPLE)),
    "more than the stack has": pickled(("a", TUPLE1 * 30 + REDUCE * 3)),
    "no end": pickled(("a", number(1)))[:-1],
    "no beginning": STOP,
    "no pickle": b"hello",
    "an opcode of Python 2": pickled(("a", b"I1\n")),
    "an object of Python 2": pickled(("a", MARK + b"ios\nsystem\n")),
    "an extension": pickled(("a", b"\x82\x01")),
    "a buffer from elsewhere": pickled(("a", b"\x97")),
    "another persistent thing": pickled(("a", text("module") + BINPERSID)),
    "deep tuples": nested(300_000, b"", TUPLE1),
    "deep lists": pickled(("a", b"]" * 300_000 + b"a" * 299_999)),
    "deep dictionaries": pickled(("a", (EMPTY_DICT + text("a")) * 200_000 + number(1) + SETITEM * 200_000)),
    "deep calls": nested(100_000, in_global("a", "b"), TUPLE1 + REDUCE),
    "deep tensors": nested(50_000, in_global("torch._tensor", "_rebuild_from_type_v2"), TUPLE1 + REDUCE),
    "a list in itself": pickled(("a", b"]q\x00h\x00a")),
    "a dictionary in itself": b"\x80\x02}q\x00" + text("a") + b"h\x00" + SETITEM + STOP,
    "a key that is hard to hash": b"\x80\x02}" + b"N" + b"".join(
        b"q" + bytes([n]) + b"h" + bytes([n]) + TUPLE2 for n in range(200)) + number(1) + SETITEM + STOP,
    "a storage that is hard to print": pickled(("in_proj_weight", tensor([4], [1], key=DOUBLED))),
    "a shape that is hard to print": pickled(("in_proj_weight", tensor([DOUBLED], [1, 1]))),
    "a stride that is hard to print": pickled(("in_proj_weight", tensor([4], [DOUBLED, 1]))),
    "a shape that is hard to multiply": pickled(("in_proj_weight", tensor(
        [b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b"q\x00", *[b"h\x00"] * 63], [1] * 64))),
    "a shape with many axes": pickled(("in_proj_weight", tensor([1] * 200_000, [1] * 200_000))),
    "an attribute that is hard to hash": pickled((
        "a", in_global("__torch__", "M") + EMPTY_TUPLE + NEWOBJ + b"]" + DOUBLED + number(1) + TUPLE2 + b"a" + BUILD)),
    "a long name of many objects": pickled((
        "a", MARK + EMPTY_TUPLE + b"q\x01" + in_global("a" * 2**20, "b") + b"q\x00" + b"h\x00h\x01R" * 10**5 + TUPLE)),
    "a long name made many times": pickled((
        "a", MARK + text("a" * 2**20) + b"q\x00" + b"h\x00h\x00\x93" * 100_000 + TUPLE)),
    "a state of many objects": pickled((
        "a", MARK + EMPTY_DICT + b"q\x01(" + b"".join(text(f"{n}") + b"N" for n in range(100_000)) + b"u"
        + in_global("__torch__", "M") + b"q\x00" + b"h\x00)\x81h\x01b" * 100_000 + TUPLE)),
    "many arguments of many calls": pickled((
        "a", MARK + b"]q\x01(" + b"N" * 10**6 + b"e" + in_global("collections", "OrderedDict") + b"q\x00"
        + b"h\x00h\x01R" * 200_000 + TUPLE)),
    "many arguments in a tuple": pickled((
        "a", MARK + MARK + b"N" * 10**6 + b"tq\x01" + in_global("torch._utils", "_rebuild_parameter") + b"q\x00"
        + b"h\x00h\x01R" * 200_000 + TUPLE)),
    "many tensors in the shapes of tensors": pickled(("in_proj_weight", MARK + b"N" + b"".join(
        b"q\x00" + called("torch._utils", "_rebuild_tensor_v2", MARK + text("storage")
        + in_global("torch", "FloatStorage") + text("0") + text("cpu") + number(4) + TUPLE + BINPERSID, number(0),
        b"h\x00" + TUPLE1, number(1) + TUPLE1, b"\x89", b"N") for n in range(50_000)) + TUPLE)),
    "dictionaries many times over": b"\x80\x02" + EMPTY_DICT + b"q\x00" + b"".join(
        EMPTY_DICT + b"q" + bytes([n]) + b"".join(text(f"{k}") + b"h" + bytes([n - 1]) + SETITEM for k in range(3))
        for n in range(1, 200)) + STOP,
    "names that grow": b"\x80\x02" + EMPTY_DICT + b"q\x00" + b"".join(
        text("x" * 10_000) + EMPTY_DICT + b"q" + bytes([n]) for n in range(1, 30)) + b"".join(
            text(f"{n}") + tensor([1], [1]) + SETITEM for n in range(100)) + SETITEM * 29 + STOP,
}  # fmt: skip


def test_pickles_that_want_too_much(tmp_path):
    """Little time, little memory, and an error that can be read."""
    for n, (name, bomb) in enumerate(BOMBS.items()):
        torch_archive(tmp_path / f"{n} {name}.pt", bomb, {"data/0": bytes(16)})
    run_child(f"""
        import mha_c, pathlib, time
        from helpers import most_memory
        before = most_memory()
        for path in sorted(pathlib.Path({str(tmp_path)!r}).glob("*.pt")):
            begun = time.process_time()
            try:
                mha_c.MultiheadAttention.from_state_dict(path, num_heads=2)
            except (RuntimeError, TypeError, ValueError) as error:
                assert 0 < len(str(error)) < 20_000, path
            else:
                raise AssertionError(path)
            assert most_memory() < before + 300 * 2**20, path
            assert time.process_time() < begun + 60, path
    """)


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [2**40], "strides": [1]},
        {"shape": [2**40, 2**40], "strides": [0, 0]},
        {"shape": [2**20, 2**20], "strides": [0, 0]},
        {"shape": [4], "strides": [2**62]},
        {"shape": [5], "strides": [1]},
        {"shape": [4], "strides": [1], "offset": 1},
        {"shape": [4], "strides": [1], "offset": -1},
        {"shape": [4], "strides": [1], "offset": 2**70},
        {"shape": [4], "strides": [-1], "offset": 3},
        {"shape": [-4], "strides": [1]},
        {"shape": [-4, -4], "strides": [1, 1]},
        {"shape": [4], "strides": []},
        {"shape": [1] * 100, "strides": [1] * 100},
        {"shape": [4], "strides": [1], "key": "1"},
        {"shape": [4], "strides": [1], "key": "../data.pkl"},
        {"shape": [4], "strides": [1], "kind": "DoubleStorage"},
        {"shape": [4], "strides": [1], "kind": "QInt8Storage"},
        {"shape": [4], "strides": [1], "kind": "NoStorage"},
        {"shape": [0, 2**62], "strides": [1, 1], "offset": 9},
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_lie(tmp_path, lie):
    """About their shape, strides, place or storage: an error before any memory is spent on them."""
    path = torch_archive(tmp_path / "lie.pt", pickled(("in_proj_weight", tensor(**lie))), {"data/0": bytes(16)})
    before = time.process_time()
    with pytest.raises(ValueError, match=r"in_proj_weight: .*lie\.pt"):
        from_state_dict(path, num_heads=2)
    assert time.process_time() - before < 5


def test_repeated_numbers(tmp_path):
    """A tensor may repeat what is stored as long as it is not larger than the file."""
    torch.save({"in_proj_weight": torch.ones(1).expand(24, 8), "out_proj.weight": torch.ones(8, 8)}, tmp_path / "a.pt")
    assert np.array_equal(from_state_dict(tmp_path / "a.pt", num_heads=2).in_proj_weight, np.ones((24, 8)))
    torch.save({"in_proj_weight": torch.ones(1).expand(3000, 1000)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"the shape \(3000, 1000\) repeats the few numbers stored for it"):
        from_state_dict(tmp_path / "a.pt", num_heads=2)


def test_members_that_lie(tmp_path, content):
    """About their size, in the directory at the end of the file: never more is read than there is."""
    path = tmp_path / "lie.pt"
    first = content.index(b"PK\x01\x02")
    fields = {"sizes": (20, 8), "sizes alone": (24, 4), "place": (42, 4), "lengths": (28, 4), "method": (10, 2)}
    for start, length in fields.values():
        for value in (b"\xff" * length, b"\xfe" + b"\xff" * (length - 2) + b"\x7f", b"\x01" + bytes(length - 1)):
            position = first
            while (position := content.find(b"PK\x01\x02", position)) >= 0:
                damaged = content[: position + start] + value + content[position + start + length :]
                path.write_bytes(damaged)
                try:
                    assert from_state_dict(path, num_heads=2).embed_dim == 4
                except ValueError as error:
                    assert "lie.pt" in str(error)
                position += 4


def test_members_that_overlap(tmp_path):
    """Many members with the same content cost what the file costs."""
    entries = [(f"w{n}", tensor([2**18], [1], key=str(n), count=2**18)) for n in range(200)]
    path = torch_archive(tmp_path / "model.pt", pickled(*entries), {"data/0": bytes(2**20)})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        entry = next(data[n:] for n in range(directory, len(data)) if data[n : n + 4] == b"PK\x01\x02"
                     and b"archive/data/0" in data[n : n + 70])[: 46 + len("archive/data/0")]
    copies = b"".join(entry.replace(b"archive/data/0", f"archive/data/{n}".encode()).replace(
        struct.pack("<H", 14), struct.pack("<H", 13 + len(str(n))), 1) for n in range(200))
    original = data[directory : data.index(b"PK\x01\x02", directory + 4)]
    ending = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 201, 201, len(original) + len(copies), directory, 0)
    path.write_bytes(bytes(data[:directory]) + original + copies + ending)
    with files.open_checkpoint(path) as checkpoint:
        assert all(np.asarray(array).sum() == 0 for array in checkpoint.content.values())
