# SPDX-License-Identifier: Apache-2.0
"""Servers that fork their workers, forks out of signal handlers, and interpreters within the interpreter."""

import os

import pytest
from helpers import PATIENCE, run_child

pytest.importorskip("mha_c")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")

PREPARE = """
    import os, signal, time
    import numpy as np
    import mha_c
    from helpers import assert_interruptible, inputs, lasting_inputs, layer
    mha_c.set_num_threads(2)
    module = layer(64, 4, batch_first=True)
    given = inputs(4, 120, 120, 64)
    want = module(*given)[0].tobytes()
"""


def test_workers_of_a_server():
    """The master computes, forks workers that share its socket, and replaces one that is killed."""
    run_child(PREPARE + f"""
    import socket
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)

    def serve():
        signal.alarm({PATIENCE})
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1)
                connection.sendall(b"1" if module(*given)[0].tobytes() == want else b"0")

    def start():
        child = os.fork()
        if child == 0:
            try:
                serve()
            finally:
                os._exit(1)
        return child

    def request():
        with socket.create_connection(listener.getsockname()) as connection:
            connection.sendall(b"?")
            return connection.recv(1)

    workers = [start() for _ in range(3)]
    for turn in range(4):
        assert {{request() for _ in range(10)}} == {{b"1"}}
        assert module(*given)[0].tobytes() == want
        os.kill(workers[0], signal.SIGKILL)
        os.waitpid(workers.pop(0), 0)
        workers.append(start())
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    """)


def test_fork_in_a_signal_handler():
    """The parent's call goes on; the child, whose helping threads stayed behind, is told to call again, and can."""
    run_child(PREPARE + """
    forked = []
    signal.signal(signal.SIGALRM, lambda *_: forked.append(os.fork()))
    long = lasting_inputs(module)
    expected = module(*long, need_weights=False)[0].tobytes()
    between_calls = 3
    status = between_calls
    while status == between_calls:
        forked.clear()
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        try:
            while not forked:
                assert module(*long, need_weights=False)[0].tobytes() == expected
        except RuntimeError as error:
            assert forked == [0] and "fork" in str(error)
            os._exit(0 if module(*given)[0].tobytes() == want else 1)
        if forked == [0]:
            os._exit(between_calls)
        status = os.waitstatus_to_exitcode(os.waitpid(forked[0], 0)[1])
    assert status == 0
    """)


def test_forks_of_a_process_with_layers():
    """A whole layer before a fork, in the child, in its child, and of a child that is forked while others compute."""
    run_child(PREPARE + f"""
    import threading
    mha_c.set_num_threads(3)
    whole = mha_c.TransformerEncoderLayer(64, 4, 512, batch_first=True, seed=0, padded="zero").eval()
    padding = np.arange(120) > np.array([[99], [30], [119], [64]])
    call = lambda: whole(given[0], src_key_padding_mask=padding).tobytes()
    expected = call()

    def fork_and_check(action):
        child = os.fork()
        if child == 0:
            signal.alarm({PATIENCE})
            try:
                action()
                os._exit(0 if call() == expected else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    fork_and_check(lambda: fork_and_check(call))
    stop, wrong = threading.Event(), []

    def compute():
        while not stop.is_set():
            wrong.extend([None] * (call() != expected))

    callers = [threading.Thread(target=compute, daemon=True) for _ in range(2)]
    for caller in callers:
        caller.start()
    for _ in range(8):
        fork_and_check(call)
    stop.set()
    for caller in callers:
        caller.join()
    assert call() == expected and not wrong
    """)


def test_interpreters_within_the_interpreter():
    """Importing the package in one is an ImportError, NumPy's or ours; the main interpreter goes on."""
    done = run_child(PREPARE + """
    try:
        import _interpreters as interpreters
        def run(code):
            failure = interpreters.exec(interpreters.create(), code)
            return "" if failure is None else str(failure.type.__name__) + str(failure.msg)
    except ImportError:
        try:
            import _xxsubinterpreters as interpreters
        except ImportError:
            raise SystemExit(77)
        def run(code):
            try:
                interpreters.run_string(interpreters.create(), code)
                return ""
            except interpreters.RunFailedError as error:
                return str(error)
    import sys
    said = run(f"import sys; sys.path[:] = {sys.path!r}; import mha_c")
    assert "ImportError" in said, said
    assert module(*given)[0].tobytes() == want
    """, check=False)
    if done.returncode == 77:
        pytest.skip("this Python has no module for subinterpreters")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["keys", "features", "wide heads"])
def test_ctrl_c_within_one_task(what):
    """The queries of a head are one task however many keys there are and however wide they are, and 96 rows however wide
    the output."""
    run_child(PREPARE + f"""
    from mha_c.functional import scaled_dot_product_attention
    mha_c.set_num_threads(1)
    if {what!r} == "keys":
        key = np.broadcast_to(np.ones((1, 64), "f4"), (4_000_000, 64))
        call = lambda: scaled_dot_product_attention(np.ones((90, 64), "f4"), key, key)
    elif {what!r} == "wide heads":
        query, key = (np.broadcast_to(np.ones((1, 1_000_000), "f4"), (rows, 1_000_000)) for rows in (24, 800))
        call = lambda: scaled_dot_product_attention(query, key, key)
    else:
        wide, x = layer(1024, 8, batch_first=True, out_dim=16_000), np.ones((1, 90, 1024), "f4")
        call = lambda: [wide(x, x, x) for _ in range(25)]
    assert_interruptible(call)
    assert module(*given)[0].tobytes() == want
    """)


def test_joblib():
    """Loky's workers get the layer by pickle; large inputs as read-only maps of files."""
    pytest.importorskip("joblib")
    run_child(PREPARE + """
    from joblib import Parallel, delayed
    for max_nbytes in (None, 1000):
        with Parallel(n_jobs=2, max_nbytes=max_nbytes) as parallel:
            for _ in range(2):
                results = parallel(delayed(module)(*given) for _ in range(6))
                assert [output.tobytes() for output, _ in results] == [want] * 6
                assert module(*given)[0].tobytes() == want
    """)


SHUTDOWNS = int(os.environ.get("MHA_C_SHUTDOWNS", 10))  # of each kind

ENDINGS = {
    "end of the program": ("pass", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an exception": ("sys.stderr = open(os.devnull, 'w'); raise OSError", 1),
    "a call at exit": ("atexit.register(lambda: module(*given))", 0),
    "a call of a finalizer": ("last = Last()", 0),
    "a thread that is waited for": ("threading.Thread(target=lambda: [module(*given) for _ in range(3)]).start()", 0),
    "the layer dropped": ("del module, given", 0),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_shutdown_with_calls_in_flight(ending):
    """The interpreter ends while daemon threads compute: in time, with the program's own exit status."""
    action, status = ENDINGS[ending]
    done = run_child(PREPARE + f"""
    import atexit, random, sys, threading

    class Last:
        call, given = module, given
        def __del__(self):
            try:
                self.call(*self.given)
            except Exception:  # what it needs may be gone
                pass

    def call(module, given):
        while True:
            module(*given)

    def begin():
        for _ in range(2):
            threading.Thread(target=call, args=(module, given), daemon=True).start()
        time.sleep(random.random() * 0.02)

    ended = 0
    for number in range({SHUTDOWNS}):
        child = os.fork()
        if child == 0:  # it ends as any program does, at the end of this one
            break
        waited = os.waitpid(child, 0)[1]
        assert waited == {status} << 8, f"after {{ended}} that were right, one ended with {{waited}}"
        ended += 1
    if child == 0:
        signal.alarm({PATIENCE})
        random.seed(number)
        begin()
        {action}
    else:
        print(ended)
    """, timeout=PATIENCE + SHUTDOWNS)
    assert done.stdout.split() == [str(SHUTDOWNS)]
