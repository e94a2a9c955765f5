# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m mha_c demo | check | info``, also installed as ``mha-c``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mha_c.check import command as check_command
from mha_c.threads import show_config

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process unless given.

    Returns
    -------
    int
        The exit status; of `check` 1 if mha_c and torch do not agree, 2 if nothing could be checked.

    Examples
    --------
    >>> main(["info"])  # doctest: +ELLIPSIS
    mha_c ...
    0
    """
    parser = argparse.ArgumentParser(prog="mha-c", description="Multi-head attention on NumPy arrays, without torch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="attention step by step, on a small example and in a real model")
    checker = commands.add_parser("check", help="compare with torch, over many configurations or in a given one")
    commands.add_parser("info", help="versions, instruction set and number of threads")
    check_command.add_options(checker)
    options = vars(parser.parse_args(argv))
    command = options.pop("command")
    if command == "info":
        show_config()
    elif command == "check":
        return check_command.run(options, checker)
    else:
        from mha_c import demo

        demo.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
