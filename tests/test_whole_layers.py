# SPDX-License-Identifier: Apache-2.0
"""Whole layers in one call of the core: the bits of their steps, whatever the call is like, and bounded memory.

The steps are what a layer does that has a part of another class: attention, norms, linear maps, one call after the other.
"""

import hashlib
import itertools
import sys

import numpy as np
import pytest
from helpers import normal, randomize, run_child
from test_reproducibility import LEVELS, WITH_FMA, assert_agrees, padding, skip_unless_supported

mha_c = pytest.importorskip("mha_c")
from mha_c.transformer.layer import TransformerLayer  # noqa: E402

DTYPES = ("float32", "float64")
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)

# N, L, S of the memory, E, heads, dim_feedforward, options
SHAPES = {
    "one of each": (1, 1, 1, 1, 1, 1, {}),
    "norms last": (3, 17, 33, 24, 3, 40, {"activation": "gelu"}),
    "norms first": (3, 17, 33, 24, 3, 40, {"norm_first": True, "activation": "gelu"}),
    "gated": (3, 65, 70, 48, 4, 37, {"norm_first": True, "norm": "rms", "activation": "swiglu", "bias": False}),
    "grouped": (2, 40, 130, 130, 4, 260, {"num_kv_heads": 2, "head_dim": 12, "activation": "geglu"}),
    "a batch in chunks": (50, 30, 20, 32, 2, 64, {"activation": "silu"}),
    "few queries": (3, 2, 700, 64, 4, 16, {"norm_first": True, "masked_rows": "zero", "activation": "gelu_tanh"}),
    "no hidden features": (2, 5, 7, 8, 2, 0, {"activation": "quick_gelu"}),
}
every_case = pytest.mark.parametrize("name, dtype", list(itertools.product(SHAPES, DTYPES)))


def build(kind, name, dtype="float32", **options):
    """A layer of a case, and its inputs."""
    n, length, s, e, h, hidden, of_case = SHAPES[name]
    made = getattr(mha_c, f"Transformer{kind}Layer")(e, h, hidden, **{"batch_first": True, "dtype": dtype, **of_case,
                                                                   **options})
    given = [normal((n, length, e), dtype), normal((n, s, e), dtype, 1)]
    return randomize(made).eval(), given[:1] if kind == "Encoder" else given


def calls(kind, given, h):
    """Calls with masks of every kind."""
    n, length = given[0].shape[:2]
    s, prefix = given[-1].shape[1], "src" if kind == "Encoder" else "memory"
    yield {}
    yield {"is_causal" if kind == "Encoder" else "tgt_is_causal": True}
    hidden = padding(n, s)
    mask = normal((n * h, length, s), given[0].dtype)
    mask[:, :, 1:][mask[:, :, 1:] > 1] = -np.inf
    for keys in (hidden, hidden[:, ::-1]):
        yield {f"{prefix}_key_padding_mask": keys}
    yield {f"{prefix}_key_padding_mask": np.where(hidden, -np.inf, normal((n, s))), f"{prefix}_mask": mask}


def every_call(name, dtype="float32"):
    """Layer, inputs, call: of both kinds, with padded rows that are computed and zero."""
    for kind, padded in (("Encoder", "computed"), ("Encoder", "zero"), ("Decoder", None)):
        module, given = build(kind, name, dtype, padded=padded)
        for call in calls(kind, given, SHAPES[name][4]):
            yield module, given, call


def digest():
    """One hash over the results of every case. Called in child processes, too."""
    total = hashlib.sha256()
    for name, dtype in itertools.product(SHAPES, DTYPES):
        for module, given, call in every_call(name, dtype):
            total.update(module(*given, **call).tobytes())
    return total.hexdigest()


# ------------------------------------------------------------------------------------------- equal bits


@every_case
def test_steps(monkeypatch, name, dtype):
    """One call of the core, and what it does step by step."""
    for module, given, call in every_call(name, dtype):
        output = module(*given, **call)
        with monkeypatch.context() as patch:
            patch.setattr(TransformerLayer, "_is_plain", lambda *_: False)
            np.testing.assert_array_equal(output, module(*given, **call), strict=True)
            assert np.isfinite(output).all()


@every_case
def test_threads(name, dtype):
    for module, given, call in every_call(name, dtype):
        with mha_c.num_threads(1):
            want = module(*given, **call)
        for threads in (2, 3):
            with mha_c.num_threads(threads):
                np.testing.assert_array_equal(module(*given, **call), want)


@every_case
def test_batch(name, dtype):
    """An item alone and in its batch."""
    n, h = SHAPES[name][0], SHAPES[name][4]
    for module, given, call in every_call(name, dtype):
        whole = module(*given, **call)
        for item in range(0, n, 1 + n // 4):
            one = {key: value[item * h:(item + 1) * h] if key.endswith("c_mask") or key == "memory_mask" else
                   value[item:item + 1] if "padding" in key else value for key, value in call.items()}
            np.testing.assert_array_equal(module(*(x[item:item + 1] for x in given), **one), whole[item:item + 1])


@both_dtypes
@pytest.mark.parametrize("name", ["norms first", "norms last", "few queries"])
def test_memory_layouts(name, dtype):
    """Strides, alignment, byte order and the order of axes are no part of the numbers."""
    def misaligned(x):
        raw = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        raw[...] = x
        return raw

    ways = [np.asfortranarray, misaligned, lambda x: x.astype(x.dtype.newbyteorder()),
            lambda x: np.repeat(x, 2, axis=2)[:, :, ::2], lambda x: x[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
            lambda x: np.insert(x, 0, 7, axis=1)[:, 1:]]
    for module, given, call in every_call(name, dtype):
        before = [x.copy() for x in given]
        want = module(*given, **call)
        for way in ways:
            changed = [way(x) for x in given]
            np.testing.assert_array_equal(module(*changed, **call), want)
            for x, kept in zip(changed, before):
                np.testing.assert_array_equal(x, kept)
    for kind in ("Encoder", "Decoder"):
        module, given = build(kind, name, dtype)
        seq_first, _ = build(kind, name, dtype, batch_first=False)
        np.testing.assert_array_equal(seq_first(*(x.swapaxes(0, 1) for x in given)).swapaxes(0, 1), module(*given))
        np.testing.assert_array_equal(module(*(x[0] for x in given)), module(*given)[0])
        repeated = [np.broadcast_to(x[:1, :1], x.shape) for x in given]
        np.testing.assert_array_equal(module(*repeated), module(*(x.copy() for x in repeated)))


def test_refused_before_a_copy():
    """The core copies a query whose features are not adjacent. This one would not fit into any memory."""
    module, _ = build("Encoder", "norms last")
    with pytest.raises(AssertionError, match="src has 800 features, but d_model is 24"):
        module(np.broadcast_to(np.float32(1), (2, 2**40, 800)))


@both_dtypes
@pytest.mark.parametrize("padded", ["zero", "computed"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_hidden_rows(bad, norm_first, padded, dtype):
    """What padded rows hold reaches no other row, on either side and in between; rows of 0 stay 0."""
    options = {"norm_first": norm_first, "padded": padded}
    for name in ("norms last", "a batch in chunks"):
        module, (x,) = build("Encoder", name, dtype, **options)
        for hidden, extra in itertools.product((padding(*x.shape[:2]), padding(*x.shape[:2])[:, ::-1]),
                                               ({}, {"is_causal": True})):
            call = {"src_key_padding_mask": hidden, **extra}
            want = module(x, **call)
            got = module(np.where(hidden[..., None], np.array(bad, dtype), x), **call)
            np.testing.assert_array_equal(got[~hidden], want[~hidden])
            if padded == "zero":
                np.testing.assert_array_equal(got[hidden], 0)


@both_dtypes
def test_hidden_memory(dtype):
    """The same of the keys that a decoder's memory hides, also for few queries."""
    for name in ("norms last", "few queries"):
        module, (x, memory) = build("Decoder", name, dtype)
        hidden = padding(*memory.shape[:2])
        want = module(x, memory, memory_key_padding_mask=hidden)
        memory = np.where(hidden[..., None], np.array(np.nan, dtype), memory)
        np.testing.assert_array_equal(module(x, memory, memory_key_padding_mask=hidden), want)


@pytest.mark.parametrize("level", WITH_FMA)
def test_instruction_sets_with_fma_agree(level):
    assert_agrees(level, digest)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_gives_its_steps(level):
    skip_unless_supported(level)
    if level == mha_c._core.config()["cpu_level"]:
        pytest.skip("which is the one in use")
    run_child("""
        import test_whole_layers as t
        digest = t.digest()
        t.TransformerLayer._is_plain = lambda *_: False
        assert digest == t.digest()
    """, env={"MHA_C_CPU": level})


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("more, hidden, most", [("items", 512, 8), ("rows", 2048, 16)])
def test_workspace(more, hidden, most):
    """Eight times as many items take no more memory: they go through a layer in chunks. Eight times as many rows of one
    item take 8 MiB more for attention and normalizations, but no more for hidden features, which would be 62 MiB: these
    are computed in parts. The system's count of memory may be wrong by about 1 MiB."""
    child = run_child(f"""
        import numpy as np
        import mha_c
        from helpers import most_memory
        mha_c.set_num_threads(2)
        module = mha_c.TransformerEncoderLayer(32, 1, {hidden}, batch_first=True, seed=0).eval()
        shape = (64, 100, 32) if {more!r} == "items" else (1, 1000, 32)
        def grown(times):
            x = np.zeros((times * shape[0], *shape[1:]) if {more!r} == "items" else (1, times * shape[1], 32), "f4")
            before = most_memory()
            module(x)
            return most_memory() - before - x.nbytes
        grown(1)
        print(grown(8))
    """)
    assert int(child.stdout) < most * 2**20
