# SPDX-License-Identifier: Apache-2.0
"""How many threads a call may use, and what the extension found on this machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mha_c import _core
from mha_c._version import __version__

__all__ = ["get_num_threads", "num_threads", "set_num_threads", "show_config"]


def set_num_threads(n: int) -> None:
    """Set the number of threads that a call may use, for the whole process.

    Unless set, it is that of the environment variable MHA_C_NUM_THREADS, or of OMP_NUM_THREADS, or the number of CPUs
    that this process may use.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    RuntimeError
        In torch's words, if `n` is no integer or less than 1.

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
    """The number of threads that a call made here and now may use.

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
    """Set the number of threads within a block, for the current thread or asynchronous task alone.

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
        In torch's words, if `n` is no integer or less than 1.

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
    """Print the versions, the instruction set and the number of threads in use, for a bug report.

    Examples
    --------
    >>> import mha_c
    >>> mha_c.show_config()  # doctest: +ELLIPSIS
    mha_c ...
    """
    config = _core.config()
    for name, value in (
        ("mha_c", __version__),
        ("instruction set", f"{config['cpu_level']}, of {', '.join(config['cpu_levels'])}"),
        ("threads", f"{config['threads']}, on {config['usable_cpus']} CPUs"),
        ("compiler", config["compiler"]),
        ("Python", platform.python_version()),
        ("NumPy", f"{np.__version__}, built against {config['numpy']}"),
    ):
        print(f"{name:<16} {value}")
