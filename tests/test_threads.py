# SPDX-License-Identifier: Apache-2.0
"""Threads: how many there are, callers that come at the same time, forks, and Ctrl-C."""

import asyncio
import os
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import PATIENCE, inputs, layer, randomize, run_child

mha_c = pytest.importorskip("mha_c")

POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


@pytest.fixture(autouse=True)
def unchanged_count():
    """A test may change the process-wide number of threads."""
    before = mha_c.get_num_threads()
    yield
    mha_c.set_num_threads(before)


# ------------------------------------------------------------------------------------------- how many


def test_set_and_get():
    """Process-wide: another thread sees it too."""
    mha_c.set_num_threads(3)
    assert mha_c.get_num_threads() == 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(mha_c.get_num_threads).result() == 3
        pool.submit(mha_c.set_num_threads, 2).result()
    assert mha_c.get_num_threads() == 2
    for count in (1, np.int64(4)):
        mha_c.set_num_threads(count)
        assert mha_c.get_num_threads() == mha_c._core.config()["threads"] == count


@pytest.mark.parametrize("wrong", [0, -1, -(2**70), 2.0, "2", None, [2]])
def test_wrong_counts(wrong):
    """torch's types and words; the number stays what it was."""
    torch = pytest.importorskip("torch")
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        torch.set_num_threads(wrong)
    expected = theirs.type if wrong != -(2**70) else (RuntimeError, OverflowError)  # torch has a C int here
    before = mha_c.get_num_threads()
    with pytest.raises(expected) as ours:
        mha_c.set_num_threads(wrong)
    if wrong in (0, -1):
        assert str(ours.value).startswith(str(theirs.value).splitlines()[0])
    if wrong is not None:
        with pytest.raises(expected):
            with mha_c.num_threads(wrong):
                pytest.fail("the block was entered")
    assert mha_c.get_num_threads() == before


def test_context_manager():
    """Nested blocks, and what an exception leaves behind; set_num_threads() inside shows only afterwards."""
    mha_c.set_num_threads(2)
    with mha_c.num_threads(4):
        assert mha_c.get_num_threads() == 4
        with mha_c.num_threads(1):
            assert mha_c.get_num_threads() == 1
            mha_c.set_num_threads(3)
            assert mha_c.get_num_threads() == 1
        assert mha_c.get_num_threads() == 4
        with pytest.raises(KeyError), mha_c.num_threads(2):
            raise KeyError
        assert mha_c.get_num_threads() == 4
    assert mha_c.get_num_threads() == 3


def test_context_manager_belongs_to_its_thread():
    """A block in one thread does not show in another."""
    mha_c.set_num_threads(2)
    inside, done = threading.Event(), threading.Event()

    def other():
        with mha_c.num_threads(7):
            inside.set()
            assert done.wait(PATIENCE)
            return mha_c.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(other)
        assert inside.wait(PATIENCE)
        assert mha_c.get_num_threads() == 2
        with mha_c.num_threads(5):
            done.set()
            assert future.result() == 7


def test_context_manager_belongs_to_its_task():
    """Nor in another asynchronous task of the same thread."""
    async def task(n):
        with mha_c.num_threads(n):
            for _ in range(3):
                await asyncio.sleep(0)
                assert mha_c.get_num_threads() == n

    async def both():
        await asyncio.gather(task(3), task(4))

    mha_c.set_num_threads(2)
    asyncio.run(both())
    assert mha_c.get_num_threads() == 2


SAY = "import mha_c; print(mha_c.get_num_threads())"


@pytest.mark.parametrize("variables, expected", [
    ({"MHA_C_NUM_THREADS": "3"}, "3"), ({"OMP_NUM_THREADS": "3"}, "3"), ({"OMP_NUM_THREADS": "3,2"}, "3"),
    ({"OMP_NUM_THREADS": "3 , 2"}, "3"), ({"MHA_C_NUM_THREADS": "4 "}, "4"),
    ({"MHA_C_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}, "5"), ({"MHA_C_NUM_THREADS": "", "OMP_NUM_THREADS": "3"}, "3"),
], ids=str)
def test_environment(variables, expected):
    assert run_child(SAY, env=variables).stdout.strip() == expected


def has_quota():
    """Whether a cgroup of this process, or one around it, may limit its share of the CPUs' time."""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        group = Path(line.split(":", 2)[2])
        for file in ("cpu.max", "cpu/cpu.cfs_quota_us"):
            for around in (group, *group.parents):
                quota = Path(f"/sys/fs/cgroup/{Path(file).parent}/{around}/{Path(file).name}")
                if quota.exists() and quota.read_text().split()[0] not in ("max", "-1"):
                    return True
    return False


def test_without_environment():
    """As many as the CPUs that this process may use; fewer if it has a quota of their time."""
    count = int(run_child(SAY).stdout)
    cpus = len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    assert 1 <= count <= cpus
    assert count == cpus or has_quota()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this platform cannot bind a process to a CPU")
def test_affinity():
    """A process that is bound to one CPU uses one thread."""
    child = run_child("""
        import os
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        import mha_c
        print(mha_c.get_num_threads())
    """)
    assert child.stdout.strip() == "1"


@pytest.mark.parametrize("wrong", ["0", "-1", "two", "2.5", "1e3", "9" * 30, "3 2"])
def test_wrong_environment(wrong):
    """Nonsense in our own variable is an error at import that names it; in that of OpenMP it is ignored."""
    child = run_child(SAY, env={"MHA_C_NUM_THREADS": wrong}, check=False)
    assert child.returncode == 1 and "ImportError" in child.stderr and "MHA_C_NUM_THREADS" in child.stderr
    assert int(run_child(SAY, env={"OMP_NUM_THREADS": wrong}).stdout) >= 1


# ------------------------------------------------------------------------------------------- callers at once


def test_concurrent_callers():
    """Many Python threads, with layers of their own and shared ones, get the bits that one caller gets."""
    mha_c.set_num_threads(3)
    modules = [layer(64, 4, batch_first=True, seed=1), layer(64, 4, batch_first=True, seed=2, dtype="float64"),
               layer(16, 2, batch_first=True, seed=3, add_bias_kv=True)]
    shapes = [(4, 70, 130), (1, 200, 200), (3, 5, 5), (2, 1, 300)]
    jobs = []
    for module in modules:
        dtype = module.out_proj.weight.dtype
        for n, length, s in shapes:
            given = inputs(n, length, s, module.embed_dim, dtype=dtype)
            for call in ({}, {"need_weights": False, "is_causal": True}):
                jobs.append((module, given, call, module(*given, **call)))

    def work(number):
        rng = np.random.default_rng(number)
        for _ in range(40):
            module, given, call, want = jobs[rng.integers(len(jobs))]
            got = module(*given, **call)
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_the_interpreter_runs_during_a_call():
    """A long call lets other Python threads go on: the GIL is released."""
    module = layer(64, 4, batch_first=True)
    stop, ticks = threading.Event(), []

    def tick():
        while not stop.is_set():
            ticks.append(None)
            time.sleep(0.001)  # in free-threaded 3.13, stop.wait(0.001) ends only after the call

    ticker = threading.Thread(target=tick)
    ticker.start()
    during = 0
    try:
        for length in (1500, 3000, 6000, 12_000):  # on a fast machine, or a busy one, a call may be over too early
            given = inputs(1, length, length, 64)
            with mha_c.num_threads(1):
                before = len(ticks)
                module(*given, need_weights=False)
                during = max(during, len(ticks) - before)
            if during >= 3:
                break
    finally:
        stop.set()
        ticker.join()
    assert during >= 3


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python always has a GIL")
def test_free_threaded_builds_get_their_gil_back():
    """The extension relies on it, so importing it switches it on, and Python says so."""
    said = run_child("""
    import sys, warnings
    import numpy
    assert not sys._is_gil_enabled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import mha_c
    assert sys._is_gil_enabled()
    print(*(warning.message for warning in caught))
    """, env={"PYTHON_GIL": None}).stdout
    assert "mha_c._core" in said


def test_loading_parameters_during_calls():
    """A call computes with the old or the new parameters, never with some of each."""
    module = layer(48, 4, batch_first=True)
    given = inputs(3, 40, 40, 48)
    states, wanted = [], []
    for seed in range(3):
        randomize(module, seed)
        states.append({name: np.array(array) for name, array in module.state_dict().items()})
        wanted.append(module(*given)[0].tobytes())
    assert len(set(wanted)) == 3
    stop, loads, end = threading.Event(), [], time.monotonic() + PATIENCE

    def load():
        while not stop.is_set():
            module.load_state_dict(states[len(loads) % 3])
            loads.append(None)

    def call(_):
        results = [module(*given)[0].tobytes() for _ in range(150)]
        while (len(loads) < 20 or len(set(results)) < 2) and loader.is_alive() and time.monotonic() < end:
            results.append(module(*given)[0].tobytes())
        return results

    loader = threading.Thread(target=load)
    loader.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            results = [result for many in pool.map(call, range(4)) for result in many]
    finally:
        stop.set()
        loader.join()
    assert len(loads) >= 20 and set(results) <= set(wanted)
    assert len(set(results)) > 1, "no call ever saw new parameters: nothing was tested"


@pytest.mark.parametrize(("queries", "width"), [(70, 48), (1, 256)], ids=["ordinary", "few queries"])
def test_numbers_written_during_calls(queries, width):
    """Whoever writes to inputs and masks meanwhile gets some numbers, but no call goes astray by them."""
    module = layer(width, 4, batch_first=True)
    given = [np.array(x) for x in inputs(3, queries, 400, width)]
    padding, attn = np.zeros((3, 400), bool), np.zeros((queries, 400), "f4")
    masks = {"key_padding_mask": padding, "attn_mask": attn}
    want = module(*given, **masks)[0].tobytes()
    kept, stop, writes = [np.array(x) for x in given], threading.Event(), []

    def write():
        rng = np.random.default_rng(0)
        while not stop.is_set():
            padding[...] = rng.random(padding.shape) < rng.choice([0, 0.5, 0.99, 1])
            attn[...] = np.where(rng.random(attn.shape) < 0.5, -np.inf, rng.choice([0, 1, np.nan]))
            given[1][0] = rng.choice([1, np.inf, np.nan])
            writes.append(None)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(writes) < 100:
            output, weights = module(*given, **masks)
            assert output.shape == (3, queries, width) and weights.shape == (3, queries, 400)
    finally:
        stop.set()
        writer.join()
    padding[...], attn[...], given[1][...] = False, 0, kept[1]
    assert module(*given, **masks)[0].tobytes() == want


def test_a_layer_changed_during_calls():
    """Its parts are replaced, and its inputs and masks written to: each part is the old or the new one, and no call goes
    astray."""
    module = mha_c.TransformerEncoderLayer(48, 4, 64, batch_first=True, seed=0, padded="zero").eval()
    parts = [mha_c.TransformerEncoderLayer(48, 4, 64, seed=seed).linear1 for seed in (1, 2)]
    x, padding = inputs(3, 90, 90, 48)[0].copy(), np.zeros((3, 90), bool)
    kept, wanted = x.copy(), set()
    for part in parts:
        module.linear1 = part
        wanted.add(module(x, src_key_padding_mask=padding).tobytes())
    stop, turns, results = threading.Event(), [], []

    def change(turn):
        while not stop.is_set():
            turn(len(turns))
            turns.append(None)

    def write(number):
        padding[...] = np.random.default_rng(number).random(padding.shape) < (0, 0.5, 0.99, 1)[number % 4]
        x[0] = (1, np.inf, np.nan)[number % 3]

    for turn in (lambda number: setattr(module, "linear1", parts[number % 2]),
                 lambda number: module.linear1.load_state_dict(parts[number % 2].state_dict()), write):
        changer = threading.Thread(target=change, args=(turn,))
        turns.clear()
        changer.start()
        try:
            while len(turns) < 100 or turn is write and len(results) < 200:
                results.append(module(x, src_key_padding_mask=padding).tobytes())
                assert turn is write or results[-1] in wanted
        finally:
            stop.set()
            changer.join()
        stop.clear()
    x[...], padding[...] = kept, False
    module.linear1 = parts[0]
    assert module(x, src_key_padding_mask=padding).tobytes() in wanted


def test_loading_from_many_threads(tmp_path):
    """Loads by state dict, by file and from torch at once, calls and states read meanwhile: each sees one set."""
    torch = pytest.importorskip("torch")
    module = layer(48, 4, batch_first=True)
    given = inputs(2, 30, 30, 48)
    states, wanted, theirs, files = [], [], [], []
    for seed in range(3):
        randomize(module, seed)
        states.append({name: np.array(array) for name, array in module.state_dict().items()})
        wanted.append(module(*given)[0].tobytes())
        theirs.append(torch.nn.MultiheadAttention(48, 4, batch_first=True))
        theirs[-1].load_state_dict({name: torch.from_numpy(array) for name, array in states[-1].items()})
        files.append(tmp_path / f"{seed}.npz")
        module.save(files[-1])
    sets = {b"".join(array.tobytes() for array in state.values()) for state in states}
    shared = tmp_path / "shared.npz"
    module.save(shared)
    stop, done = threading.Event(), dict.fromkeys(("load", "replace", "save", "read", "from_torch"), 0)
    wrong = []

    def whole(one):
        return b"".join(array.tobytes() for array in one.state_dict().values()) in sets

    def replace(i):
        randomized = mha_c.MultiheadAttention.load(files[i])
        module.load_state_dict(randomized.state_dict())

    actions = {
        "load": lambda i: module.load_state_dict(states[i]),
        "replace": replace,
        "save": lambda i: module.save(shared),
        "read": lambda i: whole(module) and whole(mha_c.MultiheadAttention.load(shared)) or wrong.append("read"),
        "from_torch": lambda i: mha_c.MultiheadAttention.from_torch(theirs[i]).eval()(*given)[0].tobytes() == wanted[i]
        or wrong.append("from_torch"),
    }

    def repeat(name):
        try:
            while not stop.is_set():
                actions[name](done[name] % 3)
                done[name] += 1
        finally:
            stop.set()

    def call(_):
        seen = set()
        while not stop.is_set() and (min(done.values()) < 20 or len(seen) < 2):
            seen.add(module(*given)[0].tobytes())
            if not seen <= set(wanted):
                break
        return seen

    with ThreadPoolExecutor(len(actions) + 3) as pool:
        others = [pool.submit(repeat, name) for name in actions]
        try:
            results = set().union(*pool.map(call, range(3), timeout=PATIENCE))
        finally:
            stop.set()
        for other in others:
            other.result()
    assert not wrong and results <= set(wanted) and whole(module)


def test_layer_dies_during_a_call():
    """The last name of a layer may go while it computes."""
    given = inputs(2, 300, 300, 64)
    want = layer(64, 4, batch_first=True)(*given)[0]

    def call(_):
        return layer(64, 4, batch_first=True)(*given)[0]

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(call, range(12)):
            np.testing.assert_array_equal(got, want)


def test_threads_that_come_and_go():
    """Callers in short-lived threads: nothing of them is left over in the pool."""
    module = layer(64, 4, batch_first=True)
    given = inputs(4, 100, 100, 64)
    want = module(*given)[0]
    mha_c.set_num_threads(3)
    for _ in range(30):
        results = []
        threads = [threading.Thread(target=lambda: results.append(module(*given)[0])) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for got in results:
            np.testing.assert_array_equal(got, want)


# ------------------------------------------------------------------------------------------- processes

PREPARE = """
    import os, signal, sys, threading, time
    import numpy as np
    import mha_c
    from helpers import PATIENCE, assert_interruptible, inputs, lasting_inputs, layer
    mha_c.set_num_threads(3)
    module = layer(64, 4, batch_first=True)
    given = inputs(4, 200, 200, 64)
    want = module(*given)[0].tobytes()
"""


@POSIX
def test_fork():
    """A child computes the same with threads of its own, whether or not the parent's were ever started; so does the
    parent afterwards, and the child's child."""
    run_child(PREPARE + """
    def in_child():
        ok = all(module(*given)[0].tobytes() == want for _ in range(5))
        inner = os.fork()
        if inner == 0:
            os._exit(0 if module(*given)[0].tobytes() == want else 1)
        return ok and os.waitpid(inner, 0)[1] == 0

    for _ in range(10):
        child = os.fork()
        if child == 0:
            os._exit(0 if in_child() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert module(*given)[0].tobytes() == want
    """)


@POSIX
def test_fork_during_calls():
    """Forking while other threads are in the middle of calls: the child neither hangs nor errs, and the calls of the
    parent end well."""
    run_child(PREPARE + """
    stop, wrong = threading.Event(), []

    def call():
        while not stop.is_set():
            if module(*given)[0].tobytes() != want:
                wrong.append(None)

    callers = [threading.Thread(target=call, daemon=True) for _ in range(3)]
    for caller in callers:
        caller.start()
    for _ in range(25):
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE)
            os._exit(0 if all(module(*given)[0].tobytes() == want for _ in range(2)) else 1)
        status = os.waitpid(child, 0)[1]
        assert status == 0, f"status {status}"
    stop.set()
    for caller in callers:
        caller.join()
    assert not wrong
    """)


@POSIX
def test_threads_of_a_forked_child():
    """A child has threads of its own: forked from an idle parent or from one whose pool is at work."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    run_child(PREPARE + """
    mha_c.set_num_threads(2)

    def in_child():
        signal.alarm(PATIENCE)
        before = len(os.listdir("/proc/self/task"))
        ok = all(module(*given)[0].tobytes() == want for _ in range(5))
        return ok and before == 1 and len(os.listdir("/proc/self/task")) == 2

    stop = threading.Event()
    def call():
        while not stop.is_set():
            module(*given)

    callers = []
    for attempt in range(20):
        if attempt == 5:
            callers += [threading.Thread(target=call, daemon=True) for _ in range(2)]
            for caller in callers:
                caller.start()
        child = os.fork()
        if child == 0:
            os._exit(0 if in_child() else 1)
        assert os.waitpid(child, 0)[1] == 0, f"attempt {attempt}"
    stop.set()
    for caller in callers:
        caller.join()
    """, env={"OPENBLAS_NUM_THREADS": "1"})


@POSIX
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method):
    """A layer goes to the workers of a pool, by inheritance or by pickle, and comes back with the same bits."""
    run_child(PREPARE + f"""
    import multiprocessing
    if __name__ == "__main__":
        with multiprocessing.get_context({method!r}).Pool(2) as pool:
            results = [pool.apply_async(module, given) for _ in range(6)]
            assert all(result.get(timeout=PATIENCE)[0].tobytes() == want for result in results)
        assert module(*given)[0].tobytes() == want
    """)


@POSIX
def test_exit_during_a_call():
    """A process that ends while a daemon thread computes ends; it does not crash or hang."""
    child = run_child(PREPARE + """
    def call():
        while True:
            module(*given)
    for _ in range(3):
        threading.Thread(target=call, daemon=True).start()
    time.sleep(0.2)
    print("done", flush=True)
    """)
    assert child.stdout == "done\n"


# ------------------------------------------------------------------------------------------- signals

@POSIX
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c(threads):
    """SIGINT ends a long call early; KeyboardInterrupt comes out of it, and everything works afterwards."""
    run_child(PREPARE + f"""
    mha_c.set_num_threads({threads})
    small = layer(16, 2, batch_first=True)
    long = lasting_inputs(small, 0.6)
    for _ in range(2):
        assert_interruptible(lambda: small(*long, average_attn_weights=True, need_weights=False))
        assert module(*given)[0].tobytes() == want
    """)


@POSIX
@pytest.mark.parametrize("what", ["a layer", "a linear map"])
def test_ctrl_c_in_a_layer(what):
    """The layer's longest step is its feed-forward network."""
    run_child(PREPARE + f"""
    whole = mha_c.TransformerEncoderLayer(16, 2, 4096, batch_first=True, seed=0).eval()
    linear = mha_c.Linear(512, 1024, seed=0)
    call, shape = {{"a layer": (whole, (10_000, 1, 16)), "a linear map": (linear, (10_000, 512))}}[{what!r}]
    short = np.ones((1, 50, 16), "f4")
    of_layer, taken = whole(short).tobytes(), 0
    while taken < 0.7:
        shape = tuple(2 * n if n == max(shape) else n for n in shape)
        x = np.ones(shape, "f4")
        begun = time.process_time()
        call(x)
        taken = time.process_time() - begun
    assert_interruptible(lambda: call(x))
    assert whole(short).tobytes() == of_layer and module(*given)[0].tobytes() == want
    """)


@POSIX
def test_main_thread_that_is_not_one(monkeypatch):
    """A library has put something else in its place. A long call asks it whether to look at signals."""
    module, x = layer(64, 4), np.zeros((128, 1, 64), np.float32)
    monkeypatch.setattr(threading, "_main_thread", object())
    with pytest.raises(AttributeError, match="ident"):
        module(x, x, x)


def test_signal_handler_that_returns():
    """A handler that raises nothing runs in the middle of a call, which then goes on to the right result."""
    run_child(PREPARE + """
    seen = []
    signal.signal(signal.SIGALRM, lambda *_: seen.append(None))
    long = lasting_inputs(module)
    expected = module(*long, need_weights=False)[0].tobytes()
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    while len(seen) < 5:
        assert module(*long, need_weights=False)[0].tobytes() == expected
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert module(*given)[0].tobytes() == want
    """)


@POSIX
def test_signal_handler_that_calls():
    """A handler may itself call a layer, in the middle of a call in the same thread."""
    run_child(PREPARE + """
    seen = []

    def handle(*_):
        seen.append(module(*given)[0].tobytes())
        signal.setitimer(signal.ITIMER_REAL, 0.02)  # not before it is done, or handlers would pile up

    signal.signal(signal.SIGALRM, handle)
    long = lasting_inputs(module)
    expected = module(*long, need_weights=False)[0].tobytes()
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    while len(seen) < 5:
        assert module(*long, need_weights=False)[0].tobytes() == expected
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert set(seen) == {want}
    """)


@POSIX
def test_signals_reach_python_not_the_pool():
    """The workers block signals: a process-directed signal is handled by a thread of Python's."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    child = run_child(PREPARE + """
    own = {str(thread.native_id) for thread in threading.enumerate()}
    for task in set(os.listdir("/proc/self/task")) - own:
        status = dict(line.split(":", 1) for line in open(f"/proc/self/task/{task}/status"))
        blocked = int(status["SigBlk"], 16)
        print(task, blocked >> (signal.SIGINT - 1) & 1, blocked >> (signal.SIGTERM - 1) & 1)
    """, env={"OPENBLAS_NUM_THREADS": "1"})
    workers = [line.split()[1:] for line in child.stdout.splitlines()]
    assert len(workers) >= 1 and all(blocked == ["1", "1"] for blocked in workers)
