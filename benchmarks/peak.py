# SPDX-License-Identifier: Apache-2.0
"""The peak of the fused multiply-add units, measured: what shares of peak are shares of."""

from __future__ import annotations

import ctypes
from pathlib import Path

from compiler import HERE, compile_c

_FLAGS = {
    "avx512": ("-mavx512f", "-mprefer-vector-width=512", "-DVECTOR_BYTES=64"),
    "avx2": ("-mavx2", "-mfma", "-DVECTOR_BYTES=32"),
}


class Peak:
    """The peak of one instruction set; NoCompiler where it cannot be measured."""

    def __init__(self, level: str, folder: Path) -> None:
        flags = _FLAGS.get(level, ("-DVECTOR_BYTES=16",))
        shared = ("-O2", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
        library = compile_c(folder / f"peak_{level}.so", *shared, *flags, HERE / "peak.c")
        self._rate = ctypes.CDLL(str(library)).peak_rate
        self._rate.restype = ctypes.c_double
        self._rate.argtypes = (ctypes.c_int, ctypes.c_double, ctypes.c_int)

    def measure(self, threads: int, dtype: str, seconds: float = 0.01) -> float:
        """Operations per second of that many threads together."""
        return float(self._rate(threads, seconds, dtype == "float64"))
