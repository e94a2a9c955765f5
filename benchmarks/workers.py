# SPDX-License-Identifier: Apache-2.0
"""Processes that each hold one peer, one of which runs at a time.

Peers keep their own threads, and those of ONNX Runtime, OpenVINO and torch go on spinning for milliseconds after a
call, which is good for their next call and so stays switched on. While one peer is measured all others are stopped
with SIGSTOP, threads and all; nothing that spins takes a core from the one whose turn it is. What a stop costs (cold
caches, sleeping threads) is made up for by the warm-up at the start of each turn.
"""

from __future__ import annotations

import gc
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from peers import Candidate, Prepared, Unsupported

Array = NDArray[Any]

WARM_UP = 0.003  # seconds at the start of a turn
TRIAL = 0.02  # seconds that the first estimate of a call's time may take

_spawn = multiprocessing.get_context("spawn")


class PeerError(Exception):
    """A peer cannot do what was asked; the text says why. It may be asked for something else."""


@contextmanager
def one_cpu() -> Iterator[None]:
    """Keeps this process and those that it starts on one CPU: neighbours can slow down one CPU and not the next."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cpus)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


def serve(connection: Connection, candidate: Candidate, threads: int, packages: Path | None) -> None:
    """The other process: answers ("prepare", case) and ("measure", calls, calls beforehand) until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks, which then kills this one
    if packages is not None:
        sys.path.insert(0, str(packages))
    try:
        peer = candidate.create(threads)
        connection.send(("ok", peer.version))
    except Exception as error:
        connection.send(("gone", f"{type(error).__name__}: {error}"))
        return
    prepared: Prepared | None = None
    while True:
        request, *arguments = connection.recv()
        try:
            if request == "prepare":
                prepared = None  # frees the layer before
                prepared = peer.prepare(*arguments)
                output, weights = prepared.result(prepared.call())
                connection.send(("ok", (output, weights, _trial(prepared.call))))
                del output, weights
                gc.collect()
                gc.freeze()  # nothing to look at for collections while calls are timed
            else:
                assert prepared is not None
                calls, beforehand = arguments
                _repeat(prepared.call, beforehand)
                connection.send(("ok", _repeat(prepared.call, calls) / calls))
        except Unsupported as error:
            connection.send(("error", str(error)))
        except Exception as error:
            connection.send(("error", f"{type(error).__name__}: {error}"))


def _repeat(call: Any, calls: int) -> float:
    start = time.perf_counter()
    for _ in itertools.repeat(None, calls):
        call()
    return time.perf_counter() - start


def _trial(call: Any) -> float:
    """The time of a warm call, roughly."""
    calls, elapsed = 1, _repeat(call, 1)
    while elapsed < TRIAL:
        calls *= 2
        elapsed = _repeat(call, calls)
    return elapsed / calls


class Worker:
    """One peer in its process, stopped unless it is asked something. Use as a context manager.

    Its library is imported from the folder `packages`, if one is given, and else from where Python finds it.
    """

    def __init__(self, candidate: Candidate, threads: int, packages: Path | None = None) -> None:
        self.candidate, self.threads, self.packages = candidate, threads, packages
        self.name = candidate.name
        self.version = ""

    def __enter__(self) -> Worker:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def _start(self) -> None:
        self._connection, theirs = _spawn.Pipe()
        self._process = _spawn.Process(
            target=serve, args=(theirs, self.candidate, self.threads, self.packages), daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self.version = self._answer()
        except PeerError:
            self._kill()
            raise

    def _kill(self) -> None:
        self._process.kill()  # SIGKILL is the one that reaches a stopped process
        self._process.join()
        self._connection.close()

    def _answer(self) -> Any:
        try:
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            raise PeerError("its process died") from None
        if kind == "gone":
            raise PeerError(answer)
        self._stop()
        if kind == "error":
            raise PeerError(answer)
        return answer

    def _stop(self) -> None:
        pid = self._process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)  # until every thread stands still

    def _ask(self, *request: Any) -> Any:
        if not self._process.is_alive():
            self._kill()
            self._start()
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)
        self._connection.send(request)
        return self._answer()

    def prepare(self, case: Any) -> tuple[Array, Array | None, float]:
        """Sets up a case: its output, its weights, and about how many seconds a call takes."""
        output, weights, seconds = self._ask("prepare", case)
        return output, weights, seconds

    def measure(self, calls: int, call_seconds: float) -> float:
        """Seconds a call, over so many calls. Those of a tenth of a second and more need no warm-up."""
        beforehand = math.ceil(WARM_UP / call_seconds) if call_seconds < 0.1 else 0
        return float(self._ask("measure", calls, beforehand))
