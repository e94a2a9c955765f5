# SPDX-License-Identifier: Apache-2.0
"""The peak of the multiply-add units, measured: what shares of peak are shares of."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

from compiler import HERE, compile_c

_AVX512 = ("-mavx512f", "-mavx512bw", "-mprefer-vector-width=512", "-DVECTOR_BYTES=64")
_FLAGS = {
    "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "avx512_vnni": (*_AVX512, "-mavx512vnni"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-DVECTOR_BYTES=32"),
    "neon_dotprod": ("-march=armv8.2-a+dotprod", "-DVECTOR_BYTES=16"),
}
_KINDS = {"float32": 0, "float64": 1, "int8": 2, "bfloat16": 3}


class Peak:
    """The peak of one instruction set; NoCompiler where it cannot be measured."""

    def __init__(self, level: str, folder: Path) -> None:
        flags = _FLAGS.get(level, ("-DVECTOR_BYTES=16",))
        shared = ("-O2", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
        library = compile_c(folder / f"peak_{level}.so", *shared, *flags, HERE / "peak.c")
        self._rate = ctypes.CDLL(str(library)).peak_rate
        self._rate.restype = ctypes.c_double
        self._rate.argtypes = (ctypes.c_int, ctypes.c_double, ctypes.c_int)

    def measure(self, threads: int, kind: str, seconds: float = 0.01) -> float:
        """Operations per second of that many threads together, on numbers of a kind."""
        return float(self._rate(threads, seconds, _KINDS[kind]))

    def measure_mixed(self, threads: int, operations: Mapping[str, float], seconds: float = 0.01) -> float:
        """The same of so many operations on each kind of numbers, one kind after the other."""
        least = sum(count / self.measure(threads, kind, seconds) for kind, count in operations.items())
        return sum(operations.values()) / least
