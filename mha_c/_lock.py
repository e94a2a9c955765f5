# SPDX-License-Identifier: Apache-2.0
"""The lock of the package: held for an instant, to count a call or to swap a set of parameters, so one serves all."""

import os
import threading

__all__ = ["lock"]

# Reentrant, since a signal handler or a finalizer may call a layer in that instant.
lock = threading.RLock()
# Forking waits for it, or a child could inherit it locked.
os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
