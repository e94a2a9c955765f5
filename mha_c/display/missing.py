# SPDX-License-Identifier: Apache-2.0
"""What to do where torch is not installed."""

from __future__ import annotations

__all__ = ["no_torch"]


def no_torch(need: str) -> ImportError:
    """The exception that says what needs torch, and how to install it.

    Examples
    --------
    >>> print(str(no_torch("mha_c.torch needs"))[:48])
    mha_c.torch needs torch, which is not installed:
    """
    return ImportError(
        f"{need} torch, which is not installed: `pip install torch`, or for the CPU alone, which is smaller, "
        "`pip install torch --index-url https://download.pytorch.org/whl/cpu`",
        name="torch",
    )
