# SPDX-License-Identifier: Apache-2.0
"""Memory or threads that cannot be had: MemoryError or the right numbers, never a crash, and everything works afterwards.

tests/c/test_allocations.c does the same for the core alone.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers import run_child

pytest.importorskip("mha_c")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="this platform cannot preload a library")

ASSERTS_ITSELF = pytest.mark.skipif(sys.version_info >= (3, 13) and hasattr(sys, "gettotalrefcount"), reason=(
    "debug builds of CPython 3.13 and 3.14 abort by assertions of their own where their allocations fail"))


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The library whose allocations fail."""
    compiler = next((name for name in ("gcc", "clang", "cc") if shutil.which(name)), None)
    if compiler is None or "glibc" not in platform.libc_ver():
        pytest.skip("needs a C compiler and glibc")
    library = tmp_path_factory.mktemp("shim") / "failing_malloc.so"
    source = Path(__file__).parent / "c" / "failing_malloc.c"
    subprocess.run([compiler, "-std=gnu11", "-O2", "-shared", "-fPIC", "-fno-builtin", source, "-o", library, "-ldl"],
                   check=True)
    return library


def run_armed(shim, code, **variables):
    """A child whose allocations `shim` lets fail; it comes before what is preloaded already, as by a sanitizer."""
    if "PYTHONMALLOC" in variables and sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("a free-threaded Python allocates by mimalloc alone")
    preload = " ".join([str(shim), *os.environ.get("LD_PRELOAD", "").split()])
    return run_child(ARM.replace("LIBRARY", repr(str(shim))) + code, env={"LD_PRELOAD": preload, **variables})


ARM = """
    import ctypes
    shim = ctypes.CDLL(LIBRARY)

    def disarm():
        while True:
            try:
                return shim.fail_at(0)
            except MemoryError:
                pass
"""

PREPARE = """
    import copy, gc, pickle, sys
    import numpy as np
    import mha_c
    from mha_c.functional import layer_norm, multi_head_attention_forward, rms_norm, scaled_dot_product_attention
    from helpers import inputs, layer, normal
    mha_c.set_num_threads(2)
    small = layer(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    middle = layer(64, 4, batch_first=True)
    tiny, large = inputs(2, 5, 5, 8), inputs(2, 90, 90, 64)
    few = inputs(2, 1, 400, 64)
    state = {name: array.copy() for name, array in middle.state_dict().items()}
    pickled = pickle.dumps(middle)

    class Provider:
        def __init__(self, array):
            self.array = array
        def __array__(self, dtype=None, copy=None):
            return self.array

    def converted():
        out = tiny[1].copy()
        return small(Provider(tiny[0]), out, tiny[2].astype(">f4"), attn_mask=np.zeros((5, 5), "f2"),
                     key_padding_mask=np.zeros((2, 5), bool), out=out, average_attn_weights=False)

    def function():
        return multi_head_attention_forward(
            large[0], large[1], large[2], 64, 4, state["in_proj_weight"], state["in_proj_bias"], None, None, False, 0.0,
            state["out_proj.weight"], state["out_proj.bias"])

    def refused(*arguments, **options):
        try:
            small(*arguments, **options)
        except (AssertionError, RuntimeError, ValueError):
            return [arguments[0]]

    def refused_norm(*arguments):
        try:
            layer_norm(*arguments)
        except RuntimeError:
            return [arguments[0]]

    core, weights, narrow = mha_c._core, middle._parameters.weights, small._parameters.weights
    rest = [None, True, None, False, False, None, True, False, "zero", 0.0, 0, 0]  # weights of heads, batch_first

    whole, decoder = (make(64, 4, 96, batch_first=True, seed=1, activation="gelu").eval()
                      for make in (mha_c.TransformerEncoderLayer, mha_c.TransformerDecoderLayer))
    gated = mha_c.TransformerEncoderLayer(8, 2, 4, batch_first=True, seed=1, activation="swiglu", padded="zero").eval()
    hidden = np.arange(5) > np.array([[9], [2]])

    def refused_layer(x, **masks):
        try:
            gated(x, **masks)
        except (AssertionError, RuntimeError):
            return [x]

    def loaded():
        fresh = copy.copy(middle)
        fresh.load_state_dict(state)
        return fresh(*few)

    CALLS = {
        "small": lambda: small(*tiny),
        "converted": converted,
        "large": lambda: middle(*large),
        "few queries": lambda: middle(*few),
        "function": function,
        "attention alone": lambda: [scaled_dot_product_attention(large[0][..., ::2], large[1][..., ::2], large[2])],
        "refused width": lambda: refused(tiny[0][..., :3], *tiny[1:]),
        "refused length": lambda: refused(tiny[0], tiny[1][:, 1:], tiny[2]),
        "refused mask": lambda: refused(*tiny, attn_mask=np.zeros((4, 5), bool)),
        "refused out": lambda: refused(*tiny, out=np.zeros((2, 5, 7), "f4")),
        "out": lambda: small(*tiny, out=np.zeros((2, 8, 5), "f4").swapaxes(1, 2)),
        "norm": lambda: [rms_norm(tiny[0], [8])],
        "norm of copies": lambda: [layer_norm(Provider(large[0].astype(">f4")[..., ::2]), [32], large[1][0, 0, ::2])],
        "refused norms": lambda: refused_norm(tiny[0], (3,)) + refused_norm(tiny[0], (8,), tiny[1]),
        "layer of norms": lambda: [mha_c.LayerNorm(8)(tiny[0])],
        "layer": lambda: [whole(large[0])],
        "layer of copies": lambda: [gated(Provider(np.repeat(tiny[0], 2, 2)[..., ::2]), src_key_padding_mask=hidden)],
        "step by step": lambda: [mha_c.TransformerEncoderLayer(
            8, 2, 4, batch_first=True, seed=1, dropout=0, activation=lambda x: x)(tiny[0])],
        "decoder": lambda: [decoder(few[0], few[1])],
        "refused layer": lambda: refused_layer(tiny[0][..., :3]),
        "refused padding": lambda: refused_layer(tiny[0], src_key_padding_mask=np.zeros((3, 5), bool)),
        "linear": lambda: [whole.linear1(Provider(large[0].astype(">f4")))],
        "activation": lambda: [core.activate(large[0][..., ::2], "gelu", True)],
        "new layer": lambda: [gated.linear1.__class__(8, 2, seed=1)(tiny[0])],
        "config": lambda: [np.array(core.config()["threads"])],
        "paths": lambda: [core.takes_few_queries(narrow, *tiny, *rest)],
        "scores": lambda: [core.scores(weights, *large, *rest)],
        "context": lambda: core.attend(weights, *large, *rest, np.zeros(2, bool)),
        "projection": lambda: [core.project(weights, "key", large[0], True)],
        "constructor": lambda: list(mha_c.MultiheadAttention(8, 2, seed=1, dropout_seed=1).parameters()),
        "load": loaded,
        "unpickle": lambda: pickle.loads(pickled)(*few),
        "to float64": lambda: list(copy.copy(small).to("float64").parameters()),
    }
"""


@ASSERTS_ITSELF
def test_every_allocation_fails_once(shim):
    """Python's, NumPy's and the core's, one after the other, until a call needs no more of them."""
    child = run_armed(shim, PREPARE + """
    total = 0
    for name, call in CALLS.items():
        want = [None if x is None else x.tobytes() for x in call()]
        for n in range(1, 20_000):
            gc.collect(0) if n % 500 == 0 else None
            mha_c._core.get_num_threads()
            before = disarm()
            got = error = None
            try:
                shim.fail_at(n)
                got = call()
            except MemoryError:
                error = "MemoryError"
            except (SystemError, RuntimeError) as other:  # CPython's own, without memory for a traceback or for a lock
                own = str(other) in ("can't allocate lock", "error return without exception set")
                own = own or str(other).startswith("<function ")
                error = "MemoryError" if own else repr(other)
            except BaseException as other:
                error = repr(other)
            failed = disarm() - before
            assert error in (None, "MemoryError"), f"{name}, allocation {n}: {error}"
            assert got is None or [None if x is None else x.tobytes() for x in got] == want, f"{name}, allocation {n}"
            total += failed
            if not failed:
                break
        else:
            raise AssertionError(f"{name} never had enough memory")
        print(f"{name}: {n - 1}", flush=True)
    print(f"{total} allocations failed")
    """, PYTHONMALLOC="malloc")
    print(child.stdout)
    assert int(child.stdout.split()[-3]) > 300


def test_threads_that_cannot_be_had(shim):
    """A process that may start no thread computes alone, and with threads as soon as it may."""
    run_armed(shim, PREPARE + """
    import os
    def threads():
        return len(os.listdir("/proc/self/task"))
    shim.fail_threads(1)
    mha_c.set_num_threads(1)
    want = middle(*large)[0].tobytes()
    mha_c.set_num_threads(4)
    before = threads()
    assert all(middle(*large)[0].tobytes() == want for _ in range(5)) and threads() == before
    shim.fail_threads(0)
    assert all(middle(*large)[0].tobytes() == want for _ in range(5)) and threads() == before + 3
    """, OPENBLAS_NUM_THREADS="1")


@ASSERTS_ITSELF
def test_import_without_memory(shim):
    """The extension says ImportError or MemoryError, and can be had as soon as there is memory."""
    child = run_armed(shim, """
    import glob, importlib.util, os, threading
    import numpy
    library, = glob.glob(os.path.join(importlib.util.find_spec("mha_c").submodule_search_locations[0], "_core.*.so"))
    def load():
        spec = importlib.util.spec_from_file_location("_core", library)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    for n in range(1, 2000):
        child = os.fork()
        if child == 0:
            loaded = None
            try:
                shim.fail_at(n)
                loaded = load()
            except (ImportError, MemoryError):
                pass
            except SystemError as other:  # CPython's own: a function of its failed and had no memory to say why
                assert "without setting an exception" in str(other)
            failed = disarm()
            os._exit(2 if not failed else 0 if load().get_num_threads() > 0 else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 2:
            break
        assert status == 0, f"allocation {n}: the process ended with status {status}"
    print(n - 1)
    """, PYTHONMALLOC="malloc", OPENBLAS_NUM_THREADS="1")
    assert int(child.stdout) > 20


def test_new_threads_without_memory(shim):
    """What a thread needs when it first takes part in a call is there or done without; the pool starts anew each time."""
    run_armed(shim, PREPARE + """
    import os, time
    mha_c.set_num_threads(1)
    want = middle(*large)[0].tobytes()
    mha_c.set_num_threads(4)
    for n in range(1, 40):
        child = os.fork()
        if child == 0:
            got = None
            try:
                shim.fail_at(n)
                got = middle(*large)[0].tobytes()
            except MemoryError:
                pass
            time.sleep(0.02)  # threads that the call did not wait for
            disarm()
            os._exit(0 if got in (None, want) and middle(*large)[0].tobytes() == want else 1)
        status = os.waitpid(child, 0)[1]
        assert status == 0, f"allocation {n}: the process ended with status {status}"
    """, PYTHONMALLOC="malloc", OPENBLAS_NUM_THREADS="1")


def test_limited_address_space():
    """Where the system grants no more memory, a call that is too large raises MemoryError, and a smaller one works."""
    run_child("""
    import resource
    import numpy as np
    import mha_c
    from mha_c.functional import scaled_dot_product_attention
    from helpers import inputs, layer
    module = layer(64, 4, batch_first=True)
    whole = mha_c.TransformerEncoderLayer(64, 4, 1024, batch_first=True, seed=0).eval()
    given = inputs(2, 90, 90, 64)
    want, of_layer = module(*given)[0].tobytes(), whole(given[0]).tobytes()
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (300 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    one = np.ones((1, 1, 64), "f4")
    for n in (2_000, 20_000, 200_000, 2_000_000, 200_000_000):
        long = np.broadcast_to(one, (1, n, 64))
        for call in (lambda: module(long, long[:, :1], long[:, :1], need_weights=False),
                     lambda: module(long[:, :5], long, long),
                     lambda: module(long, long, long, average_attn_weights=False),
                     lambda: whole(np.broadcast_to(one[0], (n, 9, 64)) if n > 2_000 else long),
                     lambda: whole.linear1(long),
                     lambda: mha_c._core.activate(np.broadcast_to(one, (n, 9, 64)), "silu", False),
                     lambda: scaled_dot_product_attention(long, given[1][:1], given[2][:1]),
                     lambda: mha_c.MultiheadAttention(n, 1)):
            if n == 2_000:
                call()
                continue
            try:
                call()
                assert n < 200_000_000
            except MemoryError:
                pass
        assert module(*given)[0].tobytes() == want and whole(given[0]).tobytes() == of_layer
    """, env={"OPENBLAS_NUM_THREADS": "1", "MHA_C_NUM_THREADS": "2"})
