# SPDX-License-Identifier: Apache-2.0
"""Every reference taken is given back and every byte allocated is freed, on success and on each kind of error."""

import ctypes
import gc
import os
import sys
import weakref

import numpy as np
import pytest
from helpers import inputs, lasting_inputs, layer, memory_in_use, normal, outcome, run_child

mha_c = pytest.importorskip("mha_c")

CALLS = int(os.environ.get("MHA_C_OWNERSHIP_CALLS", 200))  # of each scenario
IMMORTAL = sys.version_info >= (3, 12)  # None, True and False are no longer counted


@pytest.fixture(autouse=True, scope="module")
def only_what_is_new():
    """Spares the garbage collector everything that was there before: torch, hypothesis, other tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Provider:
    """An input that is no array, so that the core makes one and has to let it go."""

    def __init__(self, array):
        self.array = array

    @property
    def __array_interface__(self):
        # Without strides, which may be left out where they are None: NumPy 2.4 loses a reference to that None.
        return {name: value for name, value in self.array.__array_interface__.items() if value is not None}


class Broken:
    """Fails when it is asked for its array."""

    @property
    def __array_interface__(self):
        raise OSError


def scenarios():
    """Name, layer, arguments by name: what a call may meet, right and wrong, at each stage of taking it apart."""
    x = normal((2, 5, 8))
    given = {"query": x.copy(), "key": x.copy(), "value": x.copy()}
    module = layer(8, 2, batch_first=True)
    mask, padding = np.zeros((5, 5), bool), np.zeros((2, 5), bool)

    def case(name, **changes):
        return pytest.param(changes.pop("module", module), {**given, **changes}, id=name)

    read_only = x.copy()
    read_only.setflags(write=False)
    yield case("plain")
    yield case("no weights", need_weights=False)
    yield case("per head", average_attn_weights=False)
    yield case("masks", attn_mask=mask, key_padding_mask=padding)
    yield case("float masks", attn_mask=mask.astype("f4"), key_padding_mask=padding.astype("f8"))
    yield case("half-precision mask", attn_mask=mask.astype("f2"))
    yield case("byte-swapped", query=x.astype(">f4"), attn_mask=mask.astype(">f4"))
    yield case("misaligned", key=np.zeros(x.nbytes + 1, np.uint8)[1:].view("f4").reshape(x.shape))
    yield case("providers", query=Provider(x), key=Provider(x), attn_mask=Provider(mask))
    yield case("memoryview", query=memoryview(x))
    yield case("out", out=x.copy())
    yield case("out over an input", query=x, out=x)
    yield case("out in other strides", out=np.zeros((8, 5, 2), "f4").T)
    yield case("causal", is_causal=True)
    yield case("unbatched", query=x[0], key=x[0], value=x[0])
    yield case("empty", query=x[:, :0])
    yield case("dropout", module=layer(8, 2, batch_first=True, dropout=0.5, training=True))
    yield case("extra keys", module=layer(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True))
    # wrong calls, from the first argument to the last
    yield case("query a list", query=[1.0])
    yield case("value a list", value=[1.0])
    yield case("attn_mask a list", attn_mask=[1.0])
    yield case("key_padding_mask a list", key_padding_mask=[1.0])
    yield case("query broken", query=Broken())
    yield case("value broken", value=Broken(), query=Provider(x))
    yield case("mask broken", attn_mask=Broken(), query=x.astype(">f4"))
    yield case("query 1-D", query=x[0, 0])
    yield case("key 2-D", key=x[0])
    yield case("query too narrow", query=x[..., :6].copy())
    yield case("key shorter than value", key=x[:, :4].copy())
    yield case("key of another batch", key=x[:1].copy(), value=x[:1].copy())
    yield case("query in float64", query=x.astype("f8"))
    yield case("query of integers", query=x.astype("i4"))
    yield case("query of objects", query=x.astype(object))
    yield case("attn_mask of integers", attn_mask=mask.astype(int))
    yield case("attn_mask of another shape", attn_mask=mask[:4], key_padding_mask=padding.astype("f8"))
    yield case("attn_mask 3-D of another shape", attn_mask=np.zeros((2, 5, 5), ">f4"))
    yield case("key_padding_mask of integers", key_padding_mask=padding.astype(int))
    yield case("key_padding_mask of another shape", key_padding_mask=padding[:1], attn_mask=mask.astype("f2"))
    yield case("out a list", out=[])
    yield case("out of another dtype", out=x.astype("f8"))
    yield case("out of another shape", out=x[:1].copy())
    yield case("out read-only", out=read_only)
    yield case("need_weights raises", need_weights=np.zeros(2))
    yield case("is_causal raises", is_causal=np.zeros(2))
    yield case("unknown argument", mask=None)
    yield case("dropout above 1", module=layer(8, 2, batch_first=True, dropout=2.0, training=True))


def counts(objects):
    return [sys.getrefcount(x) for x in objects]


@pytest.mark.parametrize("module, arguments", list(scenarios()))
def test_references(module, arguments):
    """Thousands of calls later, everything that took part has as many references as before, and may die."""
    own = [module, *(x for x in arguments.values() if not isinstance(x, bool | None)), module._parameters,
           module._parameters.weights, *module.parameters()]
    shared = [x for x in (None, True, False) if not IMMORTAL] + [
        np.dtype("float32"), np.dtype("float64"), np.dtype(bool), np.ndarray, np.float32]
    held = own + shared
    outcome(lambda: module(**arguments))
    gc.collect()
    before = counts(held)
    for _ in range(CALLS):
        outcome(lambda: module(**arguments))
    gc.collect()
    after = counts(held)
    for i, x in enumerate(held):
        # The interpreter's own business moves shared objects by a handful; one lost reference a call is far more.
        assert abs(after[i] - before[i]) <= (0 if i < len(own) else CALLS // 4), (
            f"{x!r}: {before[i]} references became {after[i]}")


def layer_scenarios():
    """The same of whole layers and linear maps."""
    x = normal((2, 5, 8))
    options = {"batch_first": True, "seed": 1, "padded": "zero"}
    encoder = mha_c.TransformerEncoderLayer(8, 2, 4, **options).eval()
    decoder = mha_c.TransformerDecoderLayer(8, 2, 4, batch_first=True, seed=1).eval()
    training = mha_c.TransformerEncoderLayer(8, 2, 4, **options, norm_first=True, activation="swiglu")
    padding = np.zeros((2, 5), bool)
    yield pytest.param(encoder, {"src": x.copy(), "src_key_padding_mask": padding}, id="layer")
    yield pytest.param(encoder, {"src": Provider(x.astype(">f4")), "src_mask": np.zeros((5, 5), "f2")}, id="copies")
    yield pytest.param(encoder, {"src": x.copy()[:, :, ::-1]}, id="strided")
    yield pytest.param(encoder, {"src": x[..., :6].copy()}, id="too narrow")
    yield pytest.param(encoder, {"src": x.astype("f8")}, id="float64")
    yield pytest.param(encoder, {"src": Broken()}, id="broken")
    yield pytest.param(encoder, {"src": x.copy(), "src_key_padding_mask": padding[:1]}, id="padding of another shape")
    yield pytest.param(encoder, {"src": x.copy(), "is_causal": np.zeros(2)}, id="is_causal raises")
    yield pytest.param(training, {"src": x.copy(), "src_key_padding_mask": padding}, id="training")
    yield pytest.param(decoder, {"tgt": x.copy(), "memory": x.copy()}, id="decoder")
    yield pytest.param(decoder, {"tgt": x.copy(), "memory": x[:1].copy()}, id="memory of another batch")
    yield pytest.param(encoder.linear1, {"input": x.copy()[:, ::-1]}, id="linear")
    yield pytest.param(encoder.linear1, {"input": x[0, 0, :3]}, id="linear, too narrow")


@pytest.mark.parametrize("module, arguments", list(layer_scenarios()))
def test_references_of_layers(module, arguments):
    """Everything that took part has as many references as before."""
    own = [module, *(x for x in arguments.values() if not isinstance(x, bool)), *module.parameters()]
    own += [part._parameters for part in (getattr(module, "self_attn", module), getattr(module, "linear1", module))]
    outcome(lambda: module(**arguments))
    gc.collect()
    before = counts(own)
    for _ in range(CALLS):
        outcome(lambda: module(**arguments))
    gc.collect()
    assert counts(own) == before


def test_linear_maps_let_go():
    """Of their type, and of the arrays that they are made from."""
    held = [mha_c._core.Linear, normal((6, 8)), normal((6,))]
    before = counts(held)
    for _ in range(100):
        mha_c._core.Linear("float32", *held[1:])
    assert counts(held) == before
    assert [weakref.getweakrefcount(array) for array in held[1:]] == [0, 0]


def test_results_die():
    """Results are held by nobody else, and neither are the inputs after the call."""
    module = layer(8, 2)
    given = [x.copy() for x in inputs(2, 3, 5, 8, batch_first=False)]
    output, weights = module(*given)
    lone = object()  # counted 2 times by a Python that gives the call a reference of its own, once from 3.14 on
    assert sys.getrefcount(output) == sys.getrefcount(weights) == sys.getrefcount(lone)
    assert output.base is None or sys.getrefcount(output.base) <= 2

    class Array(np.ndarray):
        pass

    probe = given[0].view(Array)
    mask = np.zeros((3, 5), bool).view(Array)
    dead = weakref.ref(probe), weakref.ref(mask)
    module(probe, given[1], given[2], attn_mask=mask)
    outcome(lambda: module(probe, given[1], given[2], attn_mask=mask[:2]))
    del probe, mask
    gc.collect()
    assert dead[0]() is None and dead[1]() is None


def test_parameters_outlive_the_layer():
    """An array of parameters stays valid when its layer, or the set it belonged to, is gone."""
    module = layer(8, 2)
    weight = module.in_proj_weight
    copy = weight.copy()
    module.load_state_dict({name: np.zeros_like(array) for name, array in module.state_dict().items()})
    np.testing.assert_array_equal(weight, copy)
    del module
    gc.collect()
    np.testing.assert_array_equal(weight, copy)
    with pytest.raises(ValueError):
        weight[...] = 0
    with pytest.raises(ValueError):
        weight.setflags(write=True)


def test_key_weights_live_as_long_as_they_are_read():
    """The core reads them where they are, and nobody else may hold them."""
    _, (_, arrays, *_) = layer(8, 2)._parameters.__reduce__()
    q, k, v = np.split(arrays["in_proj_weight"], 3)
    given = k.copy()
    alive = weakref.ref(given)
    weights = mha_c._core.Weights(2, 2, 4, 4, "float32", q, given, v, None, None, None, arrays["out_proj.weight"], None)
    del given
    gc.collect()
    assert alive() is not None
    del weights
    gc.collect()
    assert alive() is None


def test_referrers():
    """The garbage collector's list of who refers to an object has a function for what it holds, and for nothing else."""
    class Held:
        pass

    function, advise, attribute, stranger = (Held() for _ in range(4))
    made = mha_c._core.AdvisedFunction(function, advise)
    made.attribute = attribute
    named = [any(x is made or x is made.__dict__ for x in gc.get_referrers(held))
             for held in (function, advise, attribute, stranger)]
    assert named == [True, True, True, False]


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"),
                                reason="memory in use is read from /proc")


def assert_flat(action, repeat, limit):
    """After one round of calls to fill caches, resident memory grows by less than `limit` bytes in some round of the
    next ten; in the others the system may have moved pages, or a thread of the pool come to its first task."""
    grown = []
    while len(grown) < 11:
        before = memory_in_use("Rss")
        for _ in range(repeat):
            action()
        gc.collect()
        grown.append(memory_in_use("Rss") - before)
        if len(grown) > 1 and grown[-1] < limit:
            return
    pytest.fail(f"{repeat} calls, again and again, took {grown[1:]} bytes")


class MallInfo2(ctypes.Structure):
    """What glibc says of its memory."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def allocated():
    """The bytes that malloc has handed out, and the blocks that Python's own allocator has."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo2
    info = mallinfo2()
    return np.array([info.uordblks + info.hblkhd, sys.getallocatedblocks()])


needs_mallinfo = pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
                                    reason="glibc from 2.33 on says how much memory is allocated")


def assert_nothing_is_kept(action):
    """After one round of calls to fill caches, less than half the calls keep a block or the least that malloc gives, 32
    bytes, in some round of the next five."""
    for number in range(6):
        before = allocated()
        for _ in range(CALLS):
            action()
        gc.collect()
        kept = (allocated() - before) / CALLS
        if number > 0 and (kept < (16, 0.5)).all():
            return
    pytest.fail(f"a call keeps {kept[0]:.1f} bytes, and {kept[1]:.2f} blocks of Python's")


@needs_mallinfo
@pytest.mark.parametrize("module, arguments", list(scenarios()))
def test_memory(module, arguments):
    """Every outcome gives back what it has taken."""
    assert_nothing_is_kept(lambda: outcome(lambda: module(**arguments)))


@needs_mallinfo
@pytest.mark.parametrize("module, arguments", list(layer_scenarios()))
def test_memory_of_calls_of_layers(module, arguments):
    assert_nothing_is_kept(lambda: outcome(lambda: module(**arguments)))


@needs_mallinfo
def test_memory_of_linear_maps():
    """Made, refused and dropped; and used by themselves."""
    weight, bias, x = normal((300, 40)), normal((300,)), normal((7, 40))
    linear = mha_c._core.Linear("float32", weight, bias)
    for action in (lambda: mha_c._core.Linear("float32", weight, bias), lambda: mha_c._core.Linear("float32", weight, bias[:7]),
                   lambda: mha_c._core.linear(linear, x), lambda: mha_c._core.linear(linear, x[:, ::-1]),
                   lambda: mha_c._core.linear(linear, x[:, :7]), lambda: mha_c._core.activate(x, "silu", False),
                   lambda: mha_c._core.activate(x[::-1], "silu", True), lambda: mha_c._core.activate(x[0, :7], "silu", True)):
        assert_nothing_is_kept(lambda: outcome(action))  # noqa: B023


@needs_proc
def test_memory_of_large_calls():
    """The workspace of calls that need much of it, alone, in threads, and with results that are dropped."""
    module = layer(64, 4, batch_first=True)
    given = inputs(4, 120, 150, 64)
    for call in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        for threads in (1, 3):
            with mha_c.num_threads(threads):
                assert_flat(lambda: module(*given, **call), 20, 512 * 1024)  # noqa: B023


@needs_proc
def test_memory_of_a_very_large_call():
    """The next call finds the memory of the last one; but what is beyond 64 MiB the system may take in the meantime."""
    done = run_child("""
        import resource
        import numpy as np, mha_c
        from helpers import memory_in_use
        module = mha_c.MultiheadAttention(64, 8)
        keys = np.zeros((250_000, 1, 64), np.float32)  # projected keys and values take 122 MiB
        query = keys[:16]
        def call(keys):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            module(query, keys, keys, need_weights=False)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        with mha_c.num_threads(1):
            call(keys[:1000])
            before = memory_in_use("Rss")
            call(keys)
            offered = memory_in_use("LazyFree")
            print(memory_in_use("Rss") - offered - before, offered, min(call(keys) for _ in range(5)))
    """)
    kept, offered, faults = map(int, done.stdout.split())
    assert offered > 56 * 2**20
    assert kept < 68 * 2**20
    assert faults < 10


@needs_proc
def test_memory_of_a_module_that_is_let_go():
    """A module that nothing refers to any more takes its names along, and the memory that it keeps for the next call."""
    run_child("""
        import gc, glob, importlib.util, os, sys
        import numpy as np
        from helpers import memory_in_use
        library, = glob.glob(os.path.join(importlib.util.find_spec("mha_c").submodule_search_locations[0], "_core.*.so"))
        x = np.ones((300_000, 1, 1), np.float32)  # tables of its items take more than 10 MiB
        names = [sys.intern(name) for name in ("__array__", "__array_interface__", "__array_struct__", "__dlpack__",
                                               "filled", "ident")]
        def use():
            spec = importlib.util.spec_from_file_location("_core", library)
            core = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(core)
            core.set_num_threads(1)
            core.scaled_dot_product_attention(x, x, x, None, 0.0, False, None, False, 0, None)
            return memory_in_use("Rss")
        use()
        gc.collect()
        before = [sys.getrefcount(name) for name in names]
        used = use()
        gc.collect()
        assert [sys.getrefcount(name) for name in names] == before
        assert used - memory_in_use("Rss") > 8 * 2**20
        """)


@needs_proc
@pytest.mark.parametrize("embed_dim, repeat, limit", [(8, 700, 32), (128, 40, 512)])
def test_memory_of_layers(embed_dim, repeat, limit):
    """Layers made, loaded and dropped; layers whose construction fails. Of small ones every byte shows, of large ones
    every copy of the parameters (260 KB here)."""
    module = layer(embed_dim, 4)
    state = module.state_dict()
    wrong = {**state, "in_proj_bias": np.zeros(3, "float32")}
    actions = {
        "construct": lambda: mha_c.MultiheadAttention(embed_dim, 4),
        "load": lambda: module.load_state_dict(state),
        "fail to load": lambda: outcome(lambda: module.load_state_dict(wrong)),
        "fail to construct": lambda: outcome(lambda: mha_c.MultiheadAttention(embed_dim, 5)),
        "assign": lambda: setattr(module, "in_proj_bias", state["in_proj_bias"]),
    }
    for action in actions.values():
        assert_flat(action, repeat, limit * 1024)


@needs_proc
def test_memory_of_an_interrupted_call():
    """A call that a signal handler ends by an exception leaves nothing behind."""
    import signal

    if not hasattr(signal, "setitimer"):
        pytest.skip("this platform has no interval timer")

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    module = layer(16, 2, batch_first=True)
    given = lasting_inputs(module)
    before = signal.signal(signal.SIGALRM, stop)

    def interrupted():
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            while True:
                module(*given, need_weights=False)
        except Stop:
            pass

    try:
        assert_flat(interrupted, 4, 1024 * 1024)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
