# SPDX-License-Identifier: Apache-2.0
"""Long work: a bar shows how far it is, and Ctrl-C ends it cleanly, in processes that get a real SIGINT."""

import os
import re
import select
import signal
import struct
import subprocess
import sys
import textwrap
import time

import pytest
from helpers import PATIENCE, REPOSITORY, run_child

mha_c = pytest.importorskip("mha_c")
pytest.importorskip("tqdm")
fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))


class Terminal:
    """A process whose standard error is a terminal, which is where bars show."""

    def __init__(self, *command, cwd):
        self.read_end, write_end = pty.openpty()
        fcntl.ioctl(write_end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))  # one without width shows no bar
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=write_end, text=True, cwd=cwd,
                                        env=environment, start_new_session=True)
        os.close(write_end)
        self.seen = ""

    def read(self, seconds):
        """What it shows within some time; "" at its end."""
        if not select.select([self.read_end], [], [], seconds)[0]:
            return None
        try:
            shown = os.read(self.read_end, 65536).decode(errors="replace")
        except OSError:  # Linux says so when the other end is closed
            return ""
        self.seen += shown
        return shown

    def wait_for(self, pattern, timeout=PATIENCE):
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline and self.read(1) != "", f"no {pattern!r} in {self.seen!r}"

    def interrupt(self, timeout=PATIENCE):
        """Ctrl-C goes to every process of the terminal; then what was printed, until all of them are gone."""
        os.killpg(self.process.pid, signal.SIGINT)
        said, _ = self.process.communicate(timeout=timeout)
        while self.read(0):
            pass
        os.close(self.read_end)
        return said


def group_is_empty(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_check(tmp_path):
    pytest.importorskip("torch")
    terminal = Terminal(sys.executable, "-m", "mha_c", "check", cwd=tmp_path)
    terminal.wait_for(r"\d+/\d+ \[.*configuration")
    said = terminal.interrupt()
    assert terminal.process.returncode == 130
    assert terminal.seen.rstrip().endswith("interrupted") and "Traceback" not in terminal.seen
    assert re.search(r"^all \d+ agree; \d+ were not checked$", said, re.MULTILINE)


def test_benchmark(tmp_path):
    """What was measured is kept, and no process of a peer stays behind, stopped as all but one of them are."""
    pytest.importorskip("torch")
    terminal = Terminal(sys.executable, str(REPOSITORY / "benchmarks" / "compare.py"), "--quick", "--seconds", "0.1",
                        "--peers", "torch", "--threads", "1", "--output", str(tmp_path), cwd=tmp_path)
    terminal.wait_for(r"1 thread: .* [1-9]\d*/\d+ \[.*case")
    said = terminal.interrupt()
    assert terminal.process.returncode == 130
    assert terminal.seen.rstrip().endswith("interrupted") and "Traceback" not in terminal.seen
    assert "performance.md has it all." in said and (tmp_path / "results.json").exists()
    deadline = time.monotonic() + PATIENCE
    while not group_is_empty(terminal.process.pid):
        assert time.monotonic() < deadline, "some process was left behind"
        time.sleep(0.1)


def test_explain():
    """It asks the core for one stage after the other; each of them listens."""
    run_child("""
        import mha_c
        from helpers import assert_interruptible, inputs, lasting_inputs, layer
        module = layer(16, 2, batch_first=True)
        long = lasting_inputs(module)
        for wanted in ("output", "concatenated"):
            assert_interruptible(lambda: mha_c.explain(module, *long, stages=wanted))
        x = inputs(1, 5, 5, 16)
        assert (mha_c.explain(module, *x).output == module(*x)[0]).all()
    """)


def test_no_bar_in_a_file():
    done = run_child("""
        from mha_c.display.progress import progress, say
        for number in progress([1, 2], "number", "counting"):
            say(f"number {number}")
    """, env={"PYTHONWARNINGS": "ignore::RuntimeWarning"})  # a free-threaded Python's, about its GIL
    assert done.stdout == "number 1\nnumber 2\n" and done.stderr == ""


@pytest.mark.parametrize("hidden", ["", "tqdm"])
def test_in_a_terminal(hidden, tmp_path):
    """A bar without an estimate, and lines above it; without tqdm there are only the lines."""
    code = textwrap.dedent(f"""
        import sys
        sys.modules.update(dict.fromkeys({hidden.split()}))
        from mha_c.display.progress import progress, say
        for number in progress([1, 2], "number", "counting"):
            say(f"number {{number}}")
    """)
    terminal = Terminal(sys.executable, "-c", code, cwd=tmp_path)
    said, _ = terminal.process.communicate(timeout=PATIENCE)
    while terminal.read(0):
        pass
    os.close(terminal.read_end)
    assert said == "number 1\nnumber 2\n" and terminal.process.returncode == 0
    if hidden:
        assert terminal.seen == ""
    else:
        assert re.search(r"counting: +0%\|.*\| 0/2 \[00:00, +\?number/s\]", terminal.seen)


def test_in_a_notebook():
    """There is a bar with ipywidgets alone, and no warning without them."""
    done = run_child("""
        import importlib.util, sys
        sys.modules["ipykernel"] = sys
        from mha_c.display import progress
        items = [1, 2]
        progress.find_spec = lambda name: None if name == "ipywidgets" else importlib.util.find_spec(name)
        assert progress.progress(items, "number") is items and "tqdm" not in sys.modules
        progress.find_spec = lambda name: True
        assert list(progress.progress(items, "number")) == items
    """)
    assert "0/2" in done.stderr and "IProgress" not in done.stderr
