# SPDX-License-Identifier: Apache-2.0
"""torch is there, or the function that was called says that it needs it."""

from __future__ import annotations

from mha_c.display.missing import no_torch

__all__ = ["require_torch"]


def require_torch(function: str) -> None:
    """Raise the ImportError of a function that compares with torch, if torch is not installed.

    Examples
    --------
    >>> require_torch("check.against_torch")
    """
    try:
        from mha_c.torch.convert import TORCH_VERSION  # noqa: F401
    except ImportError as error:
        if error.name != "torch":
            raise
        raise no_torch(f"{function} compares with") from error
