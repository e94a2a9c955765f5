# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m mha_c demo | check | info``, also installed as ``mha-c``."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from mha_c._version import __version__
from mha_c.check import command as check_command
from mha_c.display.words import fill
from mha_c.threads import show_config

__all__ = ["main"]

_OUTPUT_FAILS = (errno.EPIPE, errno.EFBIG, errno.EIO, errno.ENOSPC)

_CHECK_EPILOG = """\
examples:
  mha-c check
  mha-c check --embed-dim 64 --num-heads 4 --is-causal
  mha-c check --layer encoder
  mha-c check model.pt --num-heads 8 \\
      --prefix encoder.layers.0.self_attn.
  mha-c check bert/model.safetensors --layer encoder \\
      --config bert/config.json --prefix encoder.layer.0.

exit status:
  0    everything agrees
  1    something differs
  2    nothing could be checked
  130  interrupted by Ctrl-C
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process unless given.

    Returns
    -------
    int
        The exit status: of `check` 1 if mha_c and torch do not agree and 2 if nothing could be checked; 130 after
        Ctrl-C; 1 if the output was closed, as by ``mha-c demo | head -1``, or could not be written.

    Examples
    --------
    >>> main(["info"])  # doctest: +ELLIPSIS
    mha_c ...
    0
    """
    if sys.stdout is None:  # as it is where the file descriptor was closed
        sys.stdout = open(os.devnull, "w")
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _OUTPUT_FAILS:
            raise
        if error.errno != errno.EPIPE:
            print(f"mha-c: cannot write the output: {error.strerror}", file=sys.stderr)
        # Python flushes once more when it ends, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="mha-c",
        description="Multi-head attention on NumPy arrays, without torch.",
        epilog="mha-c COMMAND --help says more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"mha-c {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    commands.add_parser(
        "demo",
        help="show attention step by step",
        description="Show attention step by step on a small example, and compare it with torch if that is installed.",
    )
    check = commands.add_parser(
        "check",
        usage="mha-c check [options] [FILE]",
        help="compare with torch",
        description=fill(
            "Compare mha_c with torch: the errors of both are measured against the definition of the layer in a wider "
            "type. Without options, 1260 configurations of attention are checked; with --layer encoder or --layer "
            "decoder alone, 420 configurations of such a layer. Either takes about 20 seconds. With --embed-dim and "
            "--num-heads, or with FILE, one layer is checked on random inputs."
        ),
        epilog=_CHECK_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check_command.add_options(check)
    commands.add_parser(
        "info",
        help="print versions, instruction set and threads",
        description="Print what a bug report needs: versions, the instruction set and the number of threads.",
    )
    options = vars(parser.parse_args(argv))
    command = options.pop("command")
    if command is None:
        parser.print_help()
    elif command == "check":
        return check_command.run(options, check)
    elif command == "info":
        show_config()
    else:
        from mha_c import demo

        demo.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
