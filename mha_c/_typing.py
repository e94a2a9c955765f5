# SPDX-License-Identifier: Apache-2.0
"""Self, which typing has from Python 3.11 on."""

import sys
from typing import TYPE_CHECKING, Any

__all__ = ["Self"]

if TYPE_CHECKING:
    from typing_extensions import Self
elif sys.version_info >= (3, 11):
    from typing import Self
else:
    Self = Any
