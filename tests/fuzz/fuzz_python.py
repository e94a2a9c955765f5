# SPDX-License-Identifier: Apache-2.0
"""Atheris: arguments of calls, state dicts and files that nobody meant.

    python tests/fuzz/fuzz_python.py arguments|state_dicts|files [libFuzzer's options]

Whatever comes, the answer is a result that makes sense or one of the exceptions that are promised; what was there
before a refused call is still there, unchanged. tests/tools/fuzz.py runs this with limits of memory and time.
"""

import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mha_c"]):
    import mha_c
    import mha_c.functional
    import mha_c.parameters.files
    import mha_c.parameters.schemes
import ml_dtypes
import numpy as np

warnings.simplefilter("ignore")
mha_c.set_num_threads(1)

REFUSALS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)
DTYPES = ["float32", "float64", "float16", "bool", "int64", "uint8", "complex64", ">f4", ">f8", "object", "U1",
          ml_dtypes.bfloat16]


class Choices(atheris.FuzzedDataProvider):
    """What the bytes that were invented say."""

    def one_of(self, *options):
        """One of these."""
        return options[self.ConsumeIntInRange(0, len(options) - 1)]

    def rarely(self):
        """Once in sixteen."""
        return self.ConsumeIntInRange(0, 15) == 7

    def number(self):
        """Any number that may stand for a probability, a scale or a count."""
        return self.one_of(0, 0.0, 0.5, 1, 1.5, -1, float("nan"), float("inf"), 2**31, 2**63, 2**64, -(2**70), "1",
                           None, True, np.float32(0.25), self.ConsumeRegularFloat())

    def array(self, shape, dtype=None):
        """An array of about this shape and dtype, with any strides; or something that is none."""
        shape = list(shape)
        if self.rarely() and shape:
            shape[self.ConsumeIntInRange(0, len(shape) - 1)] = self.ConsumeIntInRange(0, 9)
        if self.rarely():
            shape = shape[1:] if self.ConsumeBool() else [self.ConsumeIntInRange(0, 3), *shape]
        if dtype is None or self.rarely():
            dtype = self.one_of(*DTYPES)
        dtype = np.dtype(dtype)
        steps = [self.one_of(1, 1, 1, 2, -1, 3) for _ in shape]
        base = np.asarray(np.random.default_rng(3).standard_normal([n * abs(step) for n, step in zip(shape, steps)]))
        base = np.asarray(base > 0.5 if dtype.kind == "b" else base, dtype)
        array = base[(..., *(slice(None, None, step) for step in steps))]
        if self.rarely():
            array = np.lib.stride_tricks.as_strided(array, strides=[0] * array.ndim)
        if self.rarely() and array.ndim > 1:
            array = array.swapaxes(0, 1)
        if self.rarely() and array.size:
            bytes_ = np.zeros(array.nbytes + 1, "u1")
            array = np.ndarray(array.shape, dtype, bytes_.data, 1) if dtype.kind != "O" else array
        if self.rarely():
            return self.one_of(None, 1, "text", b"bytes", [[1.0]], array.tolist(), memoryview(b"abcd"), np.float32(1),
                               object(), np.ma.masked_array(array), np.array(None), array.ctypes if array.ndim else 0)
        return array

    def mask(self, *shapes):
        """A mask, or none."""
        if self.ConsumeBool():
            return None
        return self.array(self.one_of(*shapes), self.one_of("bool", "float32", "float64", None))


def check(result, read_only):
    """Results are new arrays, and nothing that was passed has changed."""
    for array in result if isinstance(result, tuple) else (result,):
        assert array is None or isinstance(array, np.ndarray) and array.dtype.kind == "f"
    for array, before in read_only:
        assert array.tobytes() == before, "an argument was changed"


def remember(*arguments):
    """Arrays with their bytes."""
    return [(a, a.tobytes()) for a in arguments if isinstance(a, np.ndarray) and a.dtype.kind != "O"]


def fuzz_layer(c, e, h, n, length, s):
    """A call of a layer."""
    options = {name: value for name, value in (
        ("bias", c.ConsumeBool()), ("add_bias_kv", c.rarely()), ("add_zero_attn", c.rarely()),
        ("batch_first", c.ConsumeBool()), ("kdim", c.one_of(None, None, 3, 0)), ("vdim", c.one_of(None, None, 5)),
        ("dropout", c.number() if c.rarely() else 0.0), ("num_kv_heads", c.one_of(None, 1, h, 3)),
        ("head_dim", c.one_of(None, 4, 7, 0, -1)), ("out_dim", c.one_of(None, 6)),
        ("dtype", c.one_of("float32", "float64", "float16", None, "x")),
        ("masked_rows", c.one_of("torch", "zero", "", None)), ("dropout_seed", c.number()),
    ) if c.ConsumeIntInRange(0, 3) == 0}
    layer = mha_c.MultiheadAttention(e, h, **options)
    dtype = layer.out_proj.weight.dtype
    batch = (n,) if c.ConsumeBool() else ()

    def shape(steps, features):
        return (*batch, steps, features) if layer.batch_first else (steps, *batch, features)
    query = c.array(shape(length, e), dtype)
    key = query if c.ConsumeBool() else c.array(shape(s, layer.kdim), dtype)
    value = key if c.ConsumeBool() else c.array(shape(s, layer.vdim), dtype)
    call = {"key_padding_mask": c.mask((*batch, s)), "attn_mask": c.mask((length, s), (n * h, length, s)),
            "need_weights": c.one_of(True, False, 1, None), "average_attn_weights": c.ConsumeBool(),
            "is_causal": c.rarely()}
    if c.rarely():
        call["out"] = c.one_of(query, c.array(shape(length, e), dtype))
    kept = remember(*(a for a in (query, key, value, *call.values()) if not any(a is o for o in (call.get("out"),))))
    if any(np.may_share_memory(call["out"], a) for a, _ in kept if isinstance(call.get("out"), np.ndarray)):
        kept = []
    check(layer.train(c.ConsumeBool())(query, key, value, **call), kept)


def fuzz_sdpa(c, e, h, n, length, s):
    """A call of scaled_dot_product_attention."""
    lead = c.one_of((), (h,), (n, h), (2, n, h))
    dtype = c.one_of("float32", "float64")
    query, key, value = c.array((*lead, length, e), dtype), c.array((*lead, s, e), dtype), c.array((*lead, s, 5), dtype)
    mask = c.mask((length, s), (*lead, length, s), (1, s))
    call = {"is_causal": c.rarely(), "enable_gqa": c.rarely(), "dropout_p": c.number() if c.rarely() else 0.0,
            "scale": c.number() if c.rarely() else None}
    kept = remember(query, key, value, mask)
    check(mha_c.functional.scaled_dot_product_attention(query, key, value, mask, **call), kept)


def fuzz_function(c, e, h, n, length, s):
    """A call of multi_head_attention_forward."""
    dtype = c.one_of("float32", "float64")
    batch = (n,) if c.ConsumeBool() else ()
    query = c.array((length, *batch, e), dtype)
    key = query if c.ConsumeBool() else c.array((s, *batch, e), dtype)
    separate = c.rarely()
    call = {"training": c.ConsumeBool(), "key_padding_mask": c.mask((*batch, s)), "need_weights": c.ConsumeBool(),
            "attn_mask": c.mask((length, s), (n * h, length, s)), "use_separate_proj_weight": separate,
            "average_attn_weights": c.ConsumeBool(), "is_causal": c.rarely()}
    if separate:
        call |= {f"{name}_proj_weight": c.array((e, e), dtype) for name in "qkv"}
    if c.rarely():
        call |= {name: c.array((n * h, s, e // h), dtype) for name in ("static_k", "static_v") if c.ConsumeBool()}
    extra = [c.array((1, 1, e), dtype) if c.rarely() else None for _ in range(2)]
    arguments = (query, key, key, e, h, c.array((3 * e, e), dtype), c.array((3 * e,), dtype), *extra, c.rarely(),
                 c.number() if c.rarely() else 0.0, c.array((e, e), dtype), c.array((e,), dtype))
    kept = remember(*arguments, *call.values())
    check(mha_c.functional.multi_head_attention_forward(*arguments, **call), kept)


def fuzz_whole_layer(c, e, h, n, length, s):
    """A call of a layer of an encoder or a decoder."""
    is_decoder = c.ConsumeBool()
    options = {name: value for name, value in (
        ("activation", c.one_of("relu", "gelu", "swiglu", "gelu_tanh", "", abs)), ("norm_first", c.ConsumeBool()),
        ("batch_first", c.ConsumeBool()), ("bias", c.ConsumeBool()), ("norm", c.one_of("layer", "rms", 1)),
        ("padded", c.one_of(None, "zero", "computed", "x")), ("layer_norm_eps", c.number() if c.rarely() else 1e-5),
        ("dtype", c.one_of("float32", "float64", "float16", None)), ("masked_rows", c.one_of("torch", "zero", "")),
        ("num_kv_heads", c.one_of(None, 1, h, 3)), ("dropout", c.number() if c.rarely() else 0.0),
    ) if c.ConsumeBool()}
    kind = mha_c.TransformerDecoderLayer if is_decoder else mha_c.TransformerEncoderLayer
    layer = kind(e, h, c.one_of(1, 0, 5, 33, -1), **options).train(c.rarely())
    dtype = layer.linear1.weight.dtype
    batch = (n,) if c.ConsumeBool() else ()

    def shape(steps):
        return (*batch, steps, e) if layer.self_attn.batch_first else (steps, *batch, e)
    given = [c.array(shape(length), dtype), *([c.array(shape(s), dtype)] if is_decoder else [])]
    square, own = ((length, length), (n * h, length, length)), (*batch, length)
    if is_decoder:
        call = {"tgt_mask": c.mask(*square), "tgt_key_padding_mask": c.mask(own), "memory_mask": c.mask((length, s)),
                "memory_key_padding_mask": c.mask((*batch, s)), "tgt_is_causal": c.one_of(False, True, "no")}
    else:
        call = {"src_mask": c.mask(*square), "src_key_padding_mask": c.mask(own), "is_causal": c.rarely()}
    kept = remember(*given, *call.values())
    check(layer(*given, **call), kept)


def fuzz_linear(c, e, h, n, length, s):
    """A call of a linear map, and of an activation alone."""
    layer = mha_c.Linear(e, c.one_of(h, 0, 65), c.ConsumeBool(), dtype=c.one_of("float32", "float64"))
    x = c.array((n, length, e)[c.ConsumeIntInRange(0, 2):], layer.weight.dtype)
    kept = remember(x)
    check(layer(x), kept)
    activation = c.one_of("relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "swiglu", None)
    check(mha_c._core.activate(x, activation, c.ConsumeBool()), kept)


def fuzz_arguments(data):
    """A call of one of the functions, or of a layer."""
    c = Choices(data)
    h = c.one_of(1, 2, 3)
    sizes = (h * c.one_of(1, 2, 4, 8), h, c.ConsumeIntInRange(0, 3), c.one_of(1, 0, 2, 5, 33, 70),
             c.one_of(1, 0, 3, 7, 65, 130))
    try:
        c.one_of(fuzz_layer, fuzz_sdpa, fuzz_function, fuzz_whole_layer, fuzz_linear)(c, *sizes)
    except REFUSALS as error:
        assert str(error), f"{type(error)} without a word"


LAYER = mha_c.MultiheadAttention(4, 2, dropout_seed=1)
NAMES = [*LAYER.state_dict(), "bias_k", "bias_v", "q_proj_weight", "k_proj_weight", "v_proj_weight", "rotary.inv_freq",
         "q_norm.weight", "", 3, "x" * 600, "a/b:0"]
FOREIGN = mha_c.parameters.schemes.FOREIGN
CONFIG = ["num_attention_heads", "n_head", "num_key_value_heads", "multi_query", "head_dim", "hidden_size",
          "rope_theta", "encoder_attention_heads", "decoder_attention_heads", "text_config", "model_type", "alibi"]


def state_bytes(layer):
    """All parameters as bytes."""
    return {name: np.asarray(array).tobytes() for name, array in layer.state_dict().items()}


BEFORE = state_bytes(LAYER)


def load_or_refuse(load, *refusals):
    """Loads into the one layer; a refusal leaves it as it was, a success leaves something that works."""
    try:
        load()
    except refusals as error:
        assert str(error), f"{type(error)} without a word"
        assert state_bytes(LAYER) == BEFORE, "half loaded"
    else:
        x = np.ones((2, 1, 4), "float32")
        assert LAYER(x, x, x)[0].shape == (2, 1, 4)
        LAYER.load_state_dict({name: np.frombuffer(bytes_, "float32").reshape(LAYER.state_dict()[name].shape)
                               for name, bytes_ in BEFORE.items()})


def foreign_state(c):
    """Projections under names of others, of about the shapes that they should have."""
    scheme = c.one_of(*FOREIGN)
    rows = {4: (4, 4, 4), 3: (4, 8), 2: (12,)}[len(scheme.names)]
    kind = c.one_of("weight", "weight", "kernel")
    state = {}
    for name, out in zip(scheme.names, (*rows, 4)):
        shape = c.one_of((out, 4), (4, out), (4, 2, 2), (2, 2, 4), (out, 4))
        if not c.rarely():
            state[f"{name}.{kind}"] = c.array(shape, "float32")
        if c.ConsumeBool():
            state[f"{name}.bias"] = c.array(c.one_of((out,), (2, 2), (out,)), "float32")
    return state, scheme.names


def fuzz_state_dicts(data):
    """load_state_dict() and from_state_dict() of any mapping."""
    c = Choices(data)
    state, names = {}, None
    shapes = [(12, 4), (4, 4), (12,), (4,), (1, 1, 4), (2, 4), (), (0, 4), (8, 4)]
    if c.ConsumeBool():
        state, names = foreign_state(c)
    else:
        for name, array in LAYER.state_dict().items():
            if not c.rarely():
                state[name] = c.array(array.shape, "float32")
    for _ in range(c.ConsumeIntInRange(0, 3)):
        state[c.one_of(*NAMES)] = c.array(c.one_of(*shapes))
    source = state if not c.rarely() else c.one_of(None, 3, [], list(state.items()), "x.npz", b"x.pt", "no suffix")
    if c.ConsumeBool():
        load_or_refuse(lambda: LAYER.load_state_dict(source, strict=c.ConsumeBool()), *REFUSALS)
        return
    if c.ConsumeBool() and source is state:
        source = c.one_of({"model": state, "epoch": 3}, {"a": state, "b": dict(state)}, {"a": {"a": state}, "b": state},
                          {f"layers.0.{name}": array for name, array in state.items()})
    config = {c.one_of(*CONFIG): c.one_of(1, 2, 3, 0, True, None, "llama", {"n_head": 2}, [2], 0.5, -1)
              for _ in range(c.ConsumeIntInRange(0, 3))}
    names = c.one_of(None, None, names, ("q_proj", "k_proj", "v_proj", "o_proj"), ("a",), ("a", "b"), 3)
    try:
        layer = mha_c.MultiheadAttention.from_state_dict(
            source, num_heads=c.one_of(None, 1, 2, 3, 0, -1, 2**62, 1.5), prefix=c.one_of("", "", "self.", "x", "0."),
            names=names, num_kv_heads=c.one_of(None, None, 1, 2, 0), strict=c.ConsumeBool(),
            config=config if c.ConsumeBool() else c.one_of(None, None, 3, "x.json"),
            layout=c.one_of(None, "stacked", "per_head", "x"))
    except (*REFUSALS, OSError) as error:
        assert str(error), f"{type(error)} without a word"
    else:
        dtypes = {np.asarray(array).dtype.name for array in layer.state_dict().values()}
        assert dtypes <= {"float32", "float64", "float16", "bfloat16"}, dtypes


FOLDER = tempfile.TemporaryDirectory(prefix="fuzz")


def load_file(path):
    """load_state_dict() of what is in a file."""
    with mha_c.parameters.files.open_state_dict(path) as state:
        LAYER.load_state_dict(state)


def fuzz_files(data):
    """A file, whose kind its content tells; or after a zero, the pickle of a file of torch. Every reader reads it."""
    path = str(Path(FOLDER.name) / "layer")
    if data[:1] == b"\0":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data[1:])
            archive.writestr("archive/data/0", bytes(192))
    else:
        Path(path).write_bytes(data)
    try:
        layer = mha_c.MultiheadAttention.load(path)
        assert all(np.asarray(array).dtype.kind == "f" for array in layer.state_dict().values())
    except ValueError as error:
        assert path in str(error), error
    except FileNotFoundError as error:  # that an index names
        assert data[:1] == b"{", error
    load_or_refuse(lambda: load_file(path), ValueError, RuntimeError, TypeError, FileNotFoundError)
    try:
        mha_c.MultiheadAttention.from_state_dict(path, num_heads=2)
    except (ValueError, RuntimeError, TypeError, FileNotFoundError) as error:
        assert str(error), f"{type(error)} without a word"


if __name__ == "__main__":
    target = {"arguments": fuzz_arguments, "state_dicts": fuzz_state_dicts, "files": fuzz_files}[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
