# SPDX-License-Identifier: Apache-2.0
"""The number of threads that a call may use, and what the extension found on this machine."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mha_c import _core
from mha_c._version import __version__

__all__ = ["get_num_threads", "num_threads", "set_num_threads", "show_config"]


def set_num_threads(n: int) -> None:
    """Set the number of threads that a call may use, for the whole process.

    The default is the environment variable MHA_C_NUM_THREADS, or else OMP_NUM_THREADS, or else the number of CPUs that
    this process may use.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    RuntimeError
        If `n` is not an integer or is less than 1; the message has torch's words.

    Examples
    --------
    >>> import mha_c
    >>> before = mha_c.get_num_threads()
    >>> mha_c.set_num_threads(1)
    >>> mha_c.get_num_threads()
    1
    >>> mha_c.set_num_threads(before)
    """
    _core.set_num_threads(n)


def get_num_threads() -> int:
    """Return the number of threads that a call may use here.

    It is that of the innermost `num_threads` block, or else that of the process.

    Returns
    -------
    int

    Examples
    --------
    >>> import mha_c
    >>> mha_c.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Set the number of threads within a `with` block, for the current thread or asynchronous task only.

    Parameters
    ----------
    n : int
        At least 1.

    Yields
    ------
    None

    Raises
    ------
    RuntimeError
        If `n` is not an integer or is less than 1; the message has torch's words.

    Examples
    --------
    >>> import mha_c
    >>> with mha_c.num_threads(1):
    ...     mha_c.get_num_threads()
    1
    """
    token = _core.num_threads.set(n)
    try:
        _core.get_num_threads()  # raises unless n is a number of threads
        yield
    finally:
        _core.num_threads.reset(token)


def show_config() -> None:
    """Print the versions, the instruction set and the number of threads, for a bug report.

    Examples
    --------
    >>> import mha_c
    >>> mha_c.show_config()  # doctest: +ELLIPSIS
    mha_c ...
    """
    from mha_c.display.words import count

    config = _core.config()
    others = [level for level in config["cpu_levels"] if level != config["cpu_level"]]
    for name, value in (
        ("mha_c", __version__),
        ("instruction set", config["cpu_level"]),
        ("others available", ", ".join(others) or "none"),
        ("threads", f"{config['threads']}, on {count(config['usable_cpus'], 'CPU')}"),
        ("compiler", config["compiler"]),
        ("Python", platform.python_version()),
        ("NumPy", f"{np.__version__} (mha_c was built with {config['numpy']})"),
    ):
        print(f"{name:<16} {value}")
