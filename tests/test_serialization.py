# SPDX-License-Identifier: Apache-2.0
"""Files of layers, damaged ones, too, and layers from state dicts of torch."""

import io
import json
import os
import pickle
import stat
import struct
import sys
import zipfile
from collections.abc import Mapping

import mha_c
import numpy as np
import pytest
from helpers import bits, layer, normal, outcome, run_child, torch_words
from mha_c.parameters import files, stored

torch = pytest.importorskip("torch")
st = pytest.importorskip("hypothesis.strategies")
from hypothesis import given, settings  # noqa: E402

safetensors = pytest.importorskip("safetensors")
import safetensors.numpy  # noqa: E402
import safetensors.torch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")

SUFFIXES = [".safetensors", ".npz"]
TORCH_OPTIONS = [
    {},
    {"bias": False},
    {"kdim": 5},
    {"vdim": 3, "bias": False},
    {"add_bias_kv": True},
    {"add_bias_kv": True, "kdim": 3, "vdim": 4, "bias": False},
    {"dtype": "float64"},
]
FREE_OPTIONS = [
    {"head_dim": 3, "out_dim": 6},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "head_dim": 3, "add_bias_kv": True},
    {"num_kv_heads": 2, "head_dim": 3, "v_head_dim": 5, "add_bias_kv": True},
    {"num_kv_heads": 2, "head_dim": 3, "v_head_dim": 5, "kdim": 6, "vdim": 7, "out_dim": 9},
]
WIDTHS = "embed_dim kdim vdim num_heads num_kv_heads head_dim v_head_dim out_dim".split()
ARGUMENTS = [*WIDTHS, *"dropout batch_first add_zero_attn masked_rows training dropout_seed".split()]


@st.composite
def layers(draw):
    """A layer with any arguments and any bits as its parameters, NaNs among them."""
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "kdim": st.integers(0, 9),
                "vdim": st.integers(0, 9),
                "v_head_dim": st.integers(1, 5),
                "out_dim": st.integers(1, 9),
                "num_kv_heads": st.sampled_from([n for n in (1, 2, 3) if heads % n == 0]),
                "bias": st.booleans(),
                "add_bias_kv": st.booleans(),
                "add_zero_attn": st.booleans(),
                "batch_first": st.booleans(),
                "dropout": st.floats(0, 1),
                "dtype": st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
                "dropout_seed": st.integers(0, 2**64 - 1),
                "masked_rows": st.sampled_from(["torch", "zero"]),
            },
        )
    )
    module = mha_c.MultiheadAttention(draw(st.integers(1, 9)), heads, head_dim=draw(st.integers(1, 5)), **options)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    module.load_state_dict(
        {name: np.frombuffer(random.bytes(a.nbytes), a.dtype).reshape(a.shape) for name, a in module.named_parameters()}
    )
    return module.train(draw(st.booleans()))


# -------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60)
@given(module=layers())
def test_round_trip(tmp_path_factory, suffix, module):
    """Parameters come back bit for bit, with every argument and the mode."""
    path = tmp_path_factory.mktemp("files") / f"layer{suffix}"
    module.save(path)
    loaded = mha_c.MultiheadAttention.load(str(path))
    assert list(loaded.state_dict()) == list(module.state_dict())
    assert bits(loaded.state_dict()) == bits(module.state_dict())
    assert [getattr(loaded, name) for name in ARGUMENTS] == [getattr(module, name) for name in ARGUMENTS]
    assert [path.name for path in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="WRITEABLE"):
        loaded.out_proj.weight.setflags(write=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_loaded_layer_answers_alike(tmp_path, suffix):
    """Dropout included, whose calls are counted from 0 again. A subclass loads as itself."""
    class Own(mha_c.MultiheadAttention):
        pass

    module = layer(8, 2, dropout=0.5, add_bias_kv=True, kdim=5, vdim=6, training=True)
    module.save(tmp_path / f"layer{suffix}")
    loaded = Own.load(tmp_path / f"layer{suffix}")
    assert type(loaded) is Own
    given = [normal((5, 3, width)) for width in (8, 5, 6)]
    for ours, theirs in zip(module(*given), loaded(*given)):
        assert ours.tobytes() == theirs.tobytes()


def test_arguments_of_numpy_can_be_saved(tmp_path):
    module = mha_c.MultiheadAttention(8, 2, dropout=np.float32(0.5), batch_first=np.bool_(True))
    module.save(tmp_path / "layer.npz")
    loaded = mha_c.MultiheadAttention.load(tmp_path / "layer.npz")
    assert (loaded.dropout, loaded.batch_first) == (0.5, True)
    for flags in ({"batch_first": 1, "add_zero_attn": 0}, {"batch_first": np.bool_(False), "add_zero_attn": [3]}):
        module = mha_c.MultiheadAttention(8, 2, **flags)
        module.save(tmp_path / "layer.npz")
        loaded = mha_c.MultiheadAttention.load(tmp_path / "layer.npz")
        for name, value in flags.items():
            assert getattr(module, name) is getattr(loaded, name) is bool(value)


def test_files_are_no_state_dicts(tmp_path):
    """load_state_dict says what reads them."""
    module = mha_c.MultiheadAttention(8, 2)
    module.save(tmp_path / "layer.npz")
    with np.load(tmp_path / "layer.npz") as arrays, pytest.raises(RuntimeError) as caught:
        module.load_state_dict(arrays)
    assert str(caught.value).endswith(
        '"__config__". \n\tThis is what save wrote: read it with MultiheadAttention.load.')
    for path in (tmp_path / "layer.npz", str(tmp_path / "layer.npz")):
        with pytest.raises(TypeError) as caught:
            module.load_state_dict(path)
        assert str(caught.value) == (
            f"Expected state_dict to be dict-like, got {type(path)}. This is a path: MultiheadAttention.load reads a "
            "file of save, MultiheadAttention.from_state_dict a checkpoint.")
    with pytest.raises(TypeError, match=r"This is a path: Linear\.load reads a file of save\.$"):
        mha_c.Linear(2, 2).load_state_dict("layer.npz")


@pytest.mark.parametrize("options", TORCH_OPTIONS, ids=str)
def test_others_can_read_the_files(tmp_path, options):
    """torch through safetensors, and NumPy: the parameters by torch's names, and a description in JSON."""
    module = mha_c.MultiheadAttention(8, 2, **options)
    for suffix in SUFFIXES:
        module.save(tmp_path / f"layer{suffix}")
    theirs = torch.nn.MultiheadAttention(8, 2, **{**options, "dtype": getattr(torch, options.get("dtype", "float32"))})
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"), strict=True)
    assert bits({name: tensor.numpy() for name, tensor in theirs.state_dict().items()}) == bits(module.state_dict())

    with np.load(tmp_path / "layer.npz", allow_pickle=False) as archive:
        described = json.loads(str(archive["__config__"]))
        arrays = {name: archive[name] for name in archive.files if name != "__config__"}
    assert bits(arrays) == bits(module.state_dict())
    with safetensors.safe_open(tmp_path / "layer.safetensors", "np") as file:
        assert json.loads(file.metadata()["__config__"]) == described
    described = {name: value for name, value in described.items() if name not in ("layer", "training")}
    assert bits(mha_c.MultiheadAttention(**described, seed=0).state_dict()).keys() == bits(module.state_dict()).keys()


def test_file_names(tmp_path):
    """They tell how to write; how to read is told by the content."""
    module = mha_c.MultiheadAttention(8, 2)
    for name in ("layer", "layer.pt", "layer.json", ".npz"):
        with pytest.raises(ValueError, match=r"end in \.safetensors or \.npz, but got"):
            module.save(name)
    for suffix in SUFFIXES:
        module.save(tmp_path / f"layer{suffix}")
        for name in ("layer", "layer.pth.tar", "layer.ckpt"):
            path = (tmp_path / f"layer{suffix}").rename(tmp_path / name)
            assert bits(mha_c.MultiheadAttention.load(path).state_dict()) == bits(module.state_dict())
            path.rename(tmp_path / f"layer{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_from_state_dict_refuses_what_save_wrote(tmp_path, suffix):
    """It would not see the layer's arguments, of which a wrong one gives wrong numbers."""
    path = tmp_path / f"layer{suffix}"
    attention = mha_c.MultiheadAttention(8, 2, batch_first=True)
    for module, options in ((attention, {"num_heads": 2}), (mha_c.LayerNorm(8), {})):
        module.save(path)
        with pytest.raises(ValueError, match=r"layer\.\w+ was written by save, .* read it with the load of"):
            module.from_state_dict(path, **options)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".pt", ".index.json"])
def test_files_that_are_not_there(tmp_path, suffix):
    read = [lambda path: mha_c.MultiheadAttention.from_state_dict(path, num_heads=2), mha_c.MultiheadAttention.load]
    if suffix in SUFFIXES:
        read += [lambda path: mha_c.MultiheadAttention(8, 2).save(path)]
    for call in read:
        with pytest.raises(FileNotFoundError):
            call(tmp_path / f"nowhere/layer{suffix}")


def test_without_safetensors(tmp_path):
    """It is needed to write such files, and not to read them."""
    module = layer(8, 2)
    module.save(tmp_path / "layer.safetensors")
    code = f"""
        import sys
        sys.modules["safetensors"] = None
        import mha_c
        module = mha_c.MultiheadAttention.load({str(tmp_path / "layer.safetensors")!r})
        module.save({str(tmp_path / "layer.npz")!r})
        try:
            module.save({str(tmp_path / "other.safetensors")!r})
        except ImportError as error:
            assert str(error) == "safetensors files need `pip install safetensors`; .npz files need no extra package"
        else:
            raise AssertionError
    """
    run_child(code)
    assert bits(mha_c.MultiheadAttention.load(tmp_path / "layer.npz").state_dict()) == bits(module.state_dict())
    assert not (tmp_path / "other.safetensors").exists()


# ------------------------------------------------------------------------------------------ atomicity


@pytest.fixture(params=SUFFIXES)
def old_file(request, tmp_path):
    """A file that holds a layer with seed 1, alone in its folder."""
    path = tmp_path / f"layer{request.param}"
    mha_c.MultiheadAttention(64, 2, seed=1).save(path)
    return path


def assert_old(path):
    expected = mha_c.MultiheadAttention(64, 2, seed=1).state_dict()
    assert bits(mha_c.MultiheadAttention.load(path).state_dict()) == bits(expected)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(old_file, monkeypatch, function):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="no space"):
        mha_c.MultiheadAttention(64, 2, seed=2).save(old_file)
    assert [path.name for path in old_file.parent.iterdir()] == [old_file.name]
    assert_old(old_file)


def test_a_write_that_stops_half_way_leaves_the_old_file(old_file):
    """The operating system refuses the second half, as on a full disk."""
    code = f"""
        import mha_c, resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({old_file.stat().st_size // 2},) * 2)
        try:
            mha_c.MultiheadAttention(64, 2, seed=2).save({str(old_file)!r})
        except OSError as error:
            assert "too large" in str(error), error
        else:
            raise AssertionError
    """
    run_child(code)
    assert [path.name for path in old_file.parent.iterdir()] == [old_file.name]
    assert_old(old_file)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_crash_leaves_the_old_file(old_file, function):
    """A process that dies while it saves; what it wrote so far stays beside the file, under another suffix."""
    code = f"""
        import mha_c, os
        os.{function} = lambda *_: os.kill(os.getpid(), 9)
        mha_c.MultiheadAttention(64, 2, seed=2).save({str(old_file)!r})
    """
    assert run_child(code, check=False).returncode == -9
    assert_old(old_file)
    assert {path.suffix for path in old_file.parent.iterdir()} == {old_file.suffix, ".tmp"}


def test_saving_respects_links_and_permissions(tmp_path):
    """A link stays one, and a new file has the permissions that files have here."""
    module = mha_c.MultiheadAttention(8, 2)
    (tmp_path / "there").mkdir()
    link = tmp_path / "layer.npz"
    link.symlink_to(tmp_path / "there" / "layer.npz")
    module.save(link)
    (tmp_path / "plain").touch()
    assert link.is_symlink() and not (tmp_path / "there" / "layer.npz").is_symlink()
    assert stat.S_IMODE(link.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


# --------------------------------------------------------------------------------------------- damage


def saved(path):
    """The bytes of the file of a small layer."""
    mha_c.MultiheadAttention(4, 2, seed=0).save(path)
    return path.read_bytes()


def read_both_ways(path):
    """A layer or a ValueError, from each of the two methods that read files."""
    for read in (mha_c.MultiheadAttention.load, lambda p: mha_c.MultiheadAttention.from_state_dict(p, num_heads=2)):
        try:
            assert read(path).embed_dim == 4
        except ValueError as error:
            assert path.name in str(error)
        except RuntimeError as error:  # a name was damaged
            assert "Error(s) in loading state_dict for MultiheadAttention" in str(error)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files(tmp_path, suffix):
    """Wherever the file ends: never a layer, never another exception."""
    path = tmp_path / f"cut{suffix}"
    content = saved(path)
    for length in range(0, len(content), 1 + len(content) // 150):
        path.write_bytes(content[:length])
        for read in (mha_c.MultiheadAttention.load, lambda p: mha_c.MultiheadAttention.from_state_dict(p, num_heads=2)):
            with pytest.raises(ValueError, match=f"cannot read .*cut{suffix}, which is (empty or )?incomplete"):
                read(path)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"GGUF" + bytes(40), "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "h5py"),
        (pickle.dumps({"in_proj_weight": 1}) + bytes(40), "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><head><title>404</title>", "a web page"),
        (b"\x1f\x8b" + bytes(40), "gzip"),
        (b"The quick brown fox jumps over the lazy dog.", "of an unknown kind"),
        (b'{"num_attention_heads": 4, "model_type": "bert"}', "config= takes"),
        (b'{"weight_map": {"a": "../secret"}}', "in other folders"),
        (b'{"weight_map": 3}', "damaged"),
    ],
    ids=lambda value: value[:8],
)
def test_files_of_other_kinds(tmp_path, content, words):
    """The error says what the file is, and what can be done."""
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    for read in (mha_c.MultiheadAttention.load, lambda p: mha_c.MultiheadAttention.from_state_dict(p, num_heads=2)):
        with pytest.raises(ValueError, match=rf"cannot read .*model\.pt.*{words}"):
            read(path)


def test_zip_archives_of_other_kinds(tmp_path):
    npz_file(tmp_path / "model.pt2", {"model/readme.txt": b"text"})
    with pytest.raises(ValueError, match="a zip archive without arrays of torch or NumPy"):
        mha_c.MultiheadAttention.load(tmp_path / "model.pt2")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files(tmp_path, suffix):
    """Bytes changed anywhere, above all in headers: a ValueError, or a layer of the right shapes."""
    path = tmp_path / f"damaged{suffix}"
    content = np.frombuffer(saved(path), np.uint8)
    random = np.random.default_rng(0)
    for trial in range(400):
        damaged = content.copy()
        places = random.integers(0, 300 if trial % 2 else len(content), size=1 + trial % 3)
        damaged[places] = random.integers(0, 256, size=len(places))
        path.write_bytes(damaged.tobytes())
        read_both_ways(path)
    path.write_bytes(random.bytes(2000))
    read_both_ways(path)


def safetensors_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("length", [0x4B50, 0x17B])
def test_safetensors_headers_of_any_length(tmp_path, length):
    """The length comes first in the file: as that of a zip archive, "PK", or as that of an index in JSON, "{"."""
    header, data = {}, b""
    for name, array in mha_c.MultiheadAttention(4, 2, seed=0).state_dict().items():
        entry = {"dtype": "F32", "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        header, data = {**header, name: entry}, data + array.tobytes()
    path = tmp_path / "layer.safetensors"
    safetensors_file(path, json.dumps(header).encode().ljust(length), data)
    assert path.read_bytes().startswith((b"PK", b"{"))
    layer = mha_c.MultiheadAttention.from_state_dict(path, num_heads=2)
    np.testing.assert_array_equal(layer.out_proj.weight, mha_c.MultiheadAttention(4, 2, seed=0).out_proj.weight)


@pytest.mark.parametrize(
    "header",
    [
        {"in_proj_weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}},
        {"in_proj_weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}},
        {"in_proj_weight": {"dtype": "BF16", "shape": [12, 4], "data_offsets": [0, 16]}},
        {"in_proj_weight": {"dtype": "F4", "shape": [4, 8], "data_offsets": [0, 16]}},
        {"in_proj_weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 16]}},
        {"in_proj_weight": {"dtype": "F32", "shape": [2, -2], "data_offsets": [16, 0]}},
        {"in_proj_weight": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}},
        {"in_proj_weight": {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]}},
        {"in_proj_weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [-8, 8]}},
        {"in_proj_weight": {"dtype": "F32", "shape": "22", "data_offsets": [0, 16]}},
        {"in_proj_weight": {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]}},
        {"in_proj_weight": 3},
        {"__metadata__": 3},
        {"in_proj_weight": {"dtype": "C64", "shape": [1, 2], "data_offsets": [0, 16]}},
        b"[" * 100_000,
        b"{" * 100_000,
    ],
    ids=lambda header: str(header)[:60],
)
def test_safetensors_headers_that_lie(tmp_path, header):
    path = tmp_path / "layer.safetensors"
    safetensors_file(path, header, bytes(16))
    with pytest.raises(ValueError, match=r"cannot read|expected .*layer\.safetensors holds (numbers in F4|complex64)"):
        mha_c.MultiheadAttention.from_state_dict(path, num_heads=2)


def npz_file(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


#: 64 bytes that claim to be an array of a terabyte.
TERABYTE = npy(np.zeros((4, 4), "f4")).replace(b"(4, 4), }" + b" " * 12, b"(68719476736, 4), }" + b" " * 2)
assert b"68719476736" in TERABYTE


def test_npz_entries_that_lie(tmp_path):
    """Pickles, text, what is no array of numbers, sizes that are not there, foreign compression."""
    path = tmp_path / "layer.npz"
    for entry in (
        npy(np.array([print], dtype=object), allow_pickle=True),
        npy(np.array("text")),
        npy(np.zeros(3, "datetime64[s]")),
        npy(np.zeros((2, 2), complex)),
        b"no array",
        b"",
        TERABYTE,
    ):
        npz_file(path, {"in_proj_weight.npy": entry})
        with pytest.raises(ValueError, match=r"cannot read|expected real numbers, but .*layer\.npz holds"):
            mha_c.MultiheadAttention.from_state_dict(path, num_heads=2)
    npz_file(path, {"in_proj_weight.npy": npy(np.zeros((2**10, 2**10)))}, zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="a way that NumPy never uses"):
        mha_c.MultiheadAttention.from_state_dict(path, num_heads=2)


def test_sizes_that_lie_cost_no_memory(tmp_path):
    """An entry that claims a terabyte is refused before it is made."""
    npz_file(tmp_path / "layer.npz", {"in_proj_weight.npy": TERABYTE})
    code = f"""
        import mha_c
        from helpers import most_memory
        before = most_memory()
        try:
            mha_c.MultiheadAttention.from_state_dict({str(tmp_path / "layer.npz")!r}, num_heads=2)
        except ValueError:
            assert most_memory() < before + 50 * 2**20
        else:
            raise AssertionError
    """
    run_child(code)


@pytest.mark.parametrize(
    "change",
    [
        None, "no JSON", "[]", "3", "{}", "[" * 10_000,
        {"num_heads": 3}, {"num_heads": 0}, {"embed_dim": "4"}, {"embed_dim": 2**70}, {"kdim": -1}, {"head_dim": 2.0},
        {"num_heads": True}, {"bias": False}, {"add_bias_kv": True}, {"dtype": "float64"}, {"dtype": "int32"},
        {"dtype": "bfloat16"}, {"dtype": "nonsense"}, {"dropout": "0"}, {"dropout_seed": None}, {"masked_rows": "nan"}, {"training": 1},
    ],
    ids=lambda change: str(change)[:30],
)  # fmt: skip
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_descriptions_that_do_not_fit(tmp_path, suffix, change):
    path = tmp_path / f"layer{suffix}"
    mha_c.MultiheadAttention(4, 2, seed=0).save(path)
    with files.open_checkpoint(path) as checkpoint:
        arrays = {name: np.asarray(array) for name, array in checkpoint.content.items()}
        config = checkpoint.config
    if change is None:
        {".npz": np.savez, ".safetensors": lambda p, **a: safetensors.numpy.save_file(a, p)}[suffix](path, **arrays)
        with pytest.raises(ValueError, match=r"not written by MultiheadAttention\.save, .*, num_heads=\.\.\.\) one with"):
            mha_c.MultiheadAttention.load(path)
        assert bits(mha_c.MultiheadAttention.from_state_dict(path, num_heads=2).state_dict()) == bits(arrays)
        return
    changed = change if isinstance(change, str) else json.dumps({**json.loads(config), **change})
    files.write_checkpoint(path, arrays, changed)
    with pytest.raises(ValueError, match=f"layer{suffix} holds no layer"):
        mha_c.MultiheadAttention.load(path)


# ------------------------------------------------------------------------- layers from torch's names


@pytest.mark.parametrize("options", TORCH_OPTIONS, ids=str)
@pytest.mark.parametrize("cast", ["float16", "bfloat16", "float32", "float64", "int8"])
def test_from_state_dict_is_what_torch_loads(options, cast):
    """Shapes tell everything but the heads, and numbers are cast as torch casts them."""
    dtype = options.get("dtype", "float32")
    theirs = torch.nn.MultiheadAttention(8, 2, **{**options, "dtype": getattr(torch, dtype)})
    state = {name: (3 * torch.randn(p.shape)).to(getattr(torch, cast)) for name, p in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours = mha_c.MultiheadAttention.from_state_dict(state, num_heads=2, dtype=dtype)
    expected = mha_c.MultiheadAttention.from_torch(theirs)
    assert bits(ours.state_dict()) == bits(expected.state_dict())
    assert [getattr(ours, name) for name in WIDTHS] == [getattr(expected, name) for name in WIDTHS]
    assert ours.training and repr(ours) == repr(expected)


def test_from_state_dict_keeps_float64():
    state = mha_c.MultiheadAttention(8, 2, dtype="float64", seed=0).state_dict()
    assert mha_c.MultiheadAttention.from_state_dict(state, num_heads=2).in_proj_weight.dtype == np.float64
    single = mha_c.MultiheadAttention.from_state_dict(state, num_heads=2, dtype="float32")
    assert np.array_equal(single.in_proj_weight, state["in_proj_weight"].astype("float32"))


def test_from_state_dict_takes_the_constructors_other_arguments():
    options = {"dropout": 0.25, "add_zero_attn": True, "batch_first": True, "dropout_seed": 7, "masked_rows": "zero"}
    module = mha_c.MultiheadAttention(8, 2, seed=0, **options)
    twin = mha_c.MultiheadAttention.from_state_dict(module.state_dict(), num_heads=2, **options)
    assert [getattr(twin, name) for name in ARGUMENTS] == [getattr(module, name) for name in ARGUMENTS]
    x = normal((3, 5, 8))
    assert twin(x, x, x)[1].tobytes() == module(x, x, x)[1].tobytes()


@settings(max_examples=200)
@given(module=layers(), hint=st.sampled_from(["head_dim", "num_kv_heads"]))
def test_widths_from_shapes(module, hint):
    """All widths are found, with one hint where the input projections are stacked; without it where they are not."""
    stacked = module.in_proj_weight is not None
    hints = {hint: getattr(module, hint)} if stacked else {}
    twin = mha_c.MultiheadAttention.from_state_dict(module.state_dict(), num_heads=module.num_heads, **hints)
    if module.head_dim == module.v_head_dim or module.bias_v is not None:
        plain = mha_c.MultiheadAttention.from_state_dict(module.state_dict(), num_heads=module.num_heads)
        assert [getattr(plain, name) for name in WIDTHS] == [getattr(module, name) for name in WIDTHS]
    assert [getattr(twin, name) for name in WIDTHS] == [getattr(module, name) for name in WIDTHS]
    dtype = module.out_proj.weight.dtype
    if dtype == np.float32:
        assert bits(twin.state_dict()) == bits(module.state_dict())
    assert all(array.dtype == dtype for array in twin.parameters())


@pytest.mark.parametrize("options", FREE_OPTIONS, ids=str)
def test_free_widths_from_shapes(options):
    module = layer(8, 4, **options)
    twin = mha_c.MultiheadAttention.from_state_dict(module.state_dict(prefix="layer."), "layer.", num_heads=4)
    x = [normal((5, 3, width)) for width in (8, module.kdim, module.vdim)]
    assert twin.eval()(*x)[0].tobytes() == module(*x)[0].tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"in_proj_bias": None},
        {"out_proj.bias": None},
        {"out_proj.weight": None},
        {"out_proj.weight": None, "out_proj.bias": None},
        {"in_proj_bias": (5,), "out_proj.bias": (8, 1)},
        {"out_proj.scale": (1,), "k_proj_weight": (8, 8), "norm.weight": (8,), "q_proj.bias": (8,)},
    ],
    ids=str,
)
def test_from_state_dict_errors_are_torchs(changes):
    """The words are those that torch has for the same entries of a model."""
    theirs = torch.nn.MultiheadAttention(8, 2)
    state = {name: torch.ones_like(tensor) for name, tensor in theirs.state_dict().items()}
    for name, shape in changes.items():
        if shape is None:
            del state[name]
        else:
            state[name] = torch.ones(shape)
    expected = outcome(lambda: theirs.load_state_dict(state)).error
    model = {f"block.attention.{name}": tensor for name, tensor in state.items()}
    got = outcome(lambda: mha_c.MultiheadAttention.from_state_dict(model, "block.attention.", num_heads=2)).error
    assert type(got) is type(expected) is RuntimeError
    words, _, advice = str(got).partition("\n\t(")
    assert "strict=False" in advice or "size mismatch" in words
    assert words.rstrip("\n") == torch_words(expected).rstrip("\n")
    if "norm.weight" in changes:
        lenient = mha_c.MultiheadAttention.from_state_dict(state, num_heads=2, strict=False)
        assert np.array_equal(lenient.in_proj_weight, np.ones((24, 8)))


@pytest.mark.parametrize("strict", [True, False])
def test_names_that_are_no_strings(strict):
    """A clear refusal, where torch trips over the number's missing methods."""
    module = layer(8, 2)
    state = {**module.state_dict(), 3: np.zeros(2)}
    for load in (lambda: module.load_state_dict(state, strict=strict),
                 lambda: mha_c.MultiheadAttention.from_state_dict(state, num_heads=2, strict=strict)):
        with pytest.raises(TypeError, match="names in a state dict are strings, but one is 3"):
            load()


def test_from_state_dict_of_something_else():
    for wrong in ([], None, 3):
        expected = outcome(lambda: torch.nn.MultiheadAttention(8, 2).load_state_dict(wrong)).error
        with pytest.raises(type(expected)) as error:
            mha_c.MultiheadAttention.from_state_dict(wrong, num_heads=2)
        assert str(error.value) == str(expected)
    state = mha_c.MultiheadAttention(8, 2).state_dict()
    with pytest.raises(TypeError, match="expected an array or a tensor"):
        mha_c.MultiheadAttention.from_state_dict({**state, "in_proj_weight": [[1.0]]}, num_heads=2)


@pytest.mark.parametrize("options", [{"num_heads": 3}, {"num_heads": 2, "head_dim": 5}], ids=str)
def test_heads_that_do_not_fit(options):
    with pytest.raises(ValueError, match=r"does not fit in_proj_weight \(24, 8\) and out_proj"):
        mha_c.MultiheadAttention.from_state_dict(mha_c.MultiheadAttention(8, 2).state_dict(), **options)
    with pytest.raises(ValueError, match=r"in_proj_weight must be a matrix, but has shape \(3,\)"):
        mha_c.MultiheadAttention.from_state_dict({"in_proj_weight": np.ones(3)}, **options)


def test_a_prefix_that_is_not_there():
    """The error says where layers are."""
    model = torch.nn.Transformer(8, 2, 2, 1, 16).state_dict()
    with pytest.raises(RuntimeError) as error:
        mha_c.MultiheadAttention.from_state_dict(model, "encoder.layers.7.self_attn.", num_heads=2)
    assert str(error.value) == (
        "Error(s) in loading state_dict for MultiheadAttention:\n\t"
        'Missing key(s) in state_dict: "encoder.layers.7.self_attn.in_proj_weight". '
        'It has layers with prefix="encoder.layers.0.self_attn.", prefix="encoder.layers.1.self_attn.", '
        'prefix="decoder.layers.0.self_attn." and 1 more.'
    )


# ---------------------------------------------------------------------------- layers out of whole models


def as_npz(tensor):
    """The array that .npz files hold of a tensor."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view([("bfloat16", "<u2")])
    return tensor.numpy()


def model_file(path, tensors):
    """`tensors` in the format that the name of the file asks for."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **{name: as_npz(tensor) for name, tensor in tensors.items()})
    else:
        torch.save(tensors, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_layers_of_a_model(tmp_path, suffix, dtype):
    """Each attention layer of a decoder, from its state dict and from files, as it is stored."""
    decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(8, 2, 16), 2).to(dtype)
    path = tmp_path / f"model{suffix}"
    model_file(path, dict(decoder.state_dict()))
    for source in (path, str(path), decoder.state_dict()):
        for n, part in enumerate(decoder.layers):
            for name in ("self_attn", "multihead_attn"):
                ours = mha_c.MultiheadAttention.from_state_dict(source, f"layers.{n}.{name}.", num_heads=2)
                expected = mha_c.MultiheadAttention.from_torch(getattr(part, name))
                assert bits(ours.state_dict()) == bits(expected.state_dict())


class Recording(Mapping):
    """A state dict that remembers what was read of it."""

    def __init__(self, content):
        self.content, self.read = content, []

    def __getitem__(self, name):
        self.read.append(name)
        return self.content[name]

    def __contains__(self, name):
        return name in self.content

    def __iter__(self):
        return iter(self.content)

    def __len__(self):
        return len(self.content)


def test_only_the_layer_is_read(tmp_path, monkeypatch):
    """From a mapping and from files: the layer's tensors, once each."""
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16), 3).state_dict()
    prefix = "layers.1.self_attn."
    expected = [name for name in model if name.startswith(prefix)]
    recording = Recording(model)
    mha_c.MultiheadAttention.from_state_dict(recording, prefix, num_heads=2)
    assert sorted(recording.read) == sorted(expected)

    read = []
    monkeypatch.setattr(stored.StoredArray, "bits", lambda array: read.append(array) or array._read())
    for suffix in (".safetensors", ".npz", ".pt"):
        model_file(tmp_path / f"model{suffix}", model)
        with files.open_checkpoint(tmp_path / f"model{suffix}") as checkpoint:
            mha_c.MultiheadAttention.from_state_dict(checkpoint.content, prefix, num_heads=2)
            names = {id(array): name for name, array in checkpoint.content.items()}
        assert sorted(names[id(array)] for array in read) == sorted(expected)
        read.clear()


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_models_in_several_files(tmp_path, kind):
    """The index names them; those that hold nothing of the layer need not be there."""
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16), 2)
    model = encoder.state_dict()
    name, suffix = kind.split(".")
    shards = [f"{name}-0000{n}-of-00003.{suffix}" for n in (1, 2, 3)]
    weight_map = {key: shards[n % 2] if "layers.1.self_attn" in key else shards[2] for n, key in enumerate(model)}
    for shard in shards[:2]:
        part = {key: model[key] for key in model if weight_map[key] == shard}
        model_file(tmp_path / shard.replace(".bin", ".pt"), part)
        (tmp_path / shard.replace(".bin", ".pt")).rename(tmp_path / shard)
    index = tmp_path / f"{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": weight_map}))
    loaded = mha_c.MultiheadAttention.from_state_dict(index, "layers.1.self_attn.", num_heads=2)
    expected = mha_c.MultiheadAttention.from_torch(encoder.layers[1].self_attn)
    assert bits(loaded.state_dict()) == bits(expected.state_dict())
    with pytest.raises(FileNotFoundError, match=shards[2]):
        mha_c.MultiheadAttention.from_state_dict(index, "layers.0.self_attn.", num_heads=2)
    whole = (tmp_path / shards[1]).read_bytes()
    for damaged in (whole[:100], b"no shard"):
        (tmp_path / shards[1]).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"cannot read .*{shards[1]}"):
            mha_c.MultiheadAttention.from_state_dict(index, "layers.1.self_attn.", num_heads=2)
    index.write_text(json.dumps({"weight_map": {**weight_map, "layers.1.self_attn.in_proj_weight": index.name}}))
    with pytest.raises(ValueError, match="cannot read"):
        mha_c.MultiheadAttention.from_state_dict(index, "layers.1.self_attn.", num_heads=2)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_numbers_of_eight_bits(tmp_path, dtype, suffix):
    """All 256 are widened exactly, NaN included, from files and from tensors; in files with the help of ml_dtypes."""
    numbers = torch.arange(256).to(torch.uint8).view(getattr(torch, dtype))
    state = {"in_proj_weight": numbers[:192].reshape(24, 8), "out_proj.weight": numbers[192:].reshape(8, 8)}
    path = tmp_path / f"layer{suffix}"
    model_file(path, state)
    for source in (state, path):
        loaded = mha_c.MultiheadAttention.from_state_dict(source, num_heads=2)
        assert np.array_equal(loaded.in_proj_weight, state["in_proj_weight"].float().numpy(), equal_nan=True)
        assert np.array_equal(loaded.out_proj.weight, state["out_proj.weight"].float().numpy(), equal_nan=True)
    code = f"""
        import sys
        sys.modules["ml_dtypes"] = None
        import mha_c
        try:
            mha_c.MultiheadAttention.from_state_dict({str(path)!r}, num_heads=2)
        except ImportError as error:
            assert str(error) == "numbers in {dtype} need `pip install ml_dtypes`"
        else:
            raise AssertionError
    """
    run_child(code)


def test_one_layer_costs_what_it_costs(tmp_path):
    """Out of a file of 4 GiB, sparse on the disk, a layer is read with little memory; bfloat16 without ml_dtypes."""
    weight = {name: {"dtype": "BF16", "shape": [64, 64]} for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    header, end = {"embedding": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}}, 2**32
    for name, entry in weight.items():
        header[f"layer.{name}.weight"] = {**entry, "data_offsets": [end, end := end + 64 * 64 * 2]}
    path = tmp_path / "model.safetensors"
    safetensors_file(path, header)
    values = torch.randn(4, 64, 64).bfloat16()
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size + 2**32)
        file.write(values.view(torch.int16).numpy().tobytes())
    np.save(tmp_path / "expected.npy", values.float().numpy())
    code = f"""
        import sys
        sys.modules["torch"] = sys.modules["ml_dtypes"] = sys.modules["safetensors"] = None
        import mha_c
        import numpy as np
        from helpers import most_memory
        before = most_memory()
        layer = mha_c.MultiheadAttention.from_state_dict({str(path)!r}, "layer.", num_heads=4, dtype="float32")
        assert most_memory() < before + 50 * 2**20
        expected = np.load({str(tmp_path / "expected.npy")!r})
        assert np.array_equal(layer.in_proj_weight, expected[:3].reshape(192, 64))
        assert np.array_equal(layer.out_proj.weight, expected[3])
    """
    run_child(code)


def test_every_bfloat16_is_widened_exactly(tmp_path, monkeypatch):
    """All 65536 of them, NaNs included, as torch widens them; without a cast they stay what they are."""
    values = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16).reshape(256, 256)
    safetensors.torch.save_file({"weight": values}, tmp_path / "all.safetensors")
    with files.open_checkpoint(tmp_path / "all.safetensors") as checkpoint:
        array = checkpoint.content["weight"]
        assert np.asarray(array).tobytes() == values.view(torch.int16).numpy().tobytes()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "ml_dtypes", None)
            assert np.asarray(array, "float32").tobytes() == values.float().numpy().tobytes()


# ---------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("options", TORCH_OPTIONS, ids=str)
def test_state_dict_for_torch(options):
    """torch's layer accepts it to the letter; the tensors are copies."""
    module = layer(8, 2, **options)
    theirs = torch.nn.MultiheadAttention(8, 2, **{**options, "dtype": getattr(torch, options.get("dtype", "float32"))})
    state = mha_c.torch.state_dict(module)
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict(state, strict=True)
    assert bits({name: tensor.numpy() for name, tensor in theirs.state_dict().items()}) == bits(module.state_dict())
    before = bits(module.state_dict())
    for tensor in state.values():
        tensor.zero_()
    assert bits(module.state_dict()) == before
    assert list(mha_c.torch.state_dict(module, prefix="a."))[0].startswith("a.")
