# SPDX-License-Identifier: Apache-2.0
"""benchmarks/compare.py: all libraries compute the same layer in each kind of numbers; the peak that shares are of."""

import pytest
from helpers import REPOSITORY, run_child

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("ml_dtypes")

BENCHMARKS = REPOSITORY / "benchmarks"


def test_every_library_computes_the_same():
    """A wrong output is noticed. Bounds of narrow numbers show that such numbers are used. In int8, a step is 1/127 of the
    largest number: the error of rounding is about 1 % of the numbers' own size, in inputs and in weights of two maps. Other
    libraries have larger errors: sums can saturate, and scales are of whole arrays."""
    run_child(f"""
        import sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import peers, problem
        from cases import Case

        kinds = {{"float32": {{}}, "float16": {{"dtype": "float16"}}, "bfloat16": {{"dtype": "bfloat16"}},
                  "int8": {{"matmul_precision": "int8"}}}}
        bounds = {{"float32": (0, 1e-6), "float16": (1e-5, 4e-3), "bfloat16": (1e-4, 3e-2), "int8": (5e-3, 5e-2)}}
        computed = {{kind: set() for kind in kinds}}
        alive = []  # a peer of torch that goes away takes the mode of the next one with it
        for candidate in peers.LAYERS:
            try:
                alive.append(candidate.create(1))
            except ImportError:
                continue
            for kind, options in kinds.items():
                case = Case("", 2, 40, 64, 4, **options)
                try:
                    prepared = alive[-1].prepare(case)
                except peers.Unsupported:
                    continue
                quality = problem.judge(case)
                output, weights = prepared.result(prepared.call())
                error = quality((output, weights))["error"]
                least, most = bounds["float32" if (candidate.name, kind) == (peers.IN_FLOAT32, "int8") else kind]
                most = 0.3 if kind == "int8" and "mha_c" not in candidate.name else most
                assert least <= error < most, (candidate.name, kind, error)
                assert quality((output * 1.1, weights))["error"] > 0.09
                computed[kind].add(candidate.name)
        four = {{f"ORT {{kind}}" for kind in ("MultiHeadAttention", "Attention", "ai.onnx Attention", "plain operators")}}
        assert computed["float32"] >= {{"mha_c", "torch", "torch fast path", *four}}, computed
        assert computed["int8"] >= {{"mha_c", "mha_c in float32", "torch", *four}}, computed
        assert computed["bfloat16"] >= {{"mha_c", "mha_c in float32", "torch"}}, computed
        assert computed["float16"] >= {{"mha_c", "mha_c in float32", "torch", "ORT plain operators"}}, computed
    """)


def test_peaks(tmp_path):
    """Each kind of numbers has a peak. A mixture takes the time of its parts."""
    run_child(f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(BENCHMARKS)!r})
        from mha_c import _core
        from compiler import NoCompiler
        from peak import Peak

        for level in (_core.config()["cpu_level"], "portable"):
            try:
                peak = Peak(level, Path({str(tmp_path)!r}))
            except NoCompiler:
                break
            rates = {{kind: peak.measure(1, kind, 0.001) for kind in ("float32", "float64", "int8", "bfloat16")}}
            assert all(rate > 1e8 for rate in rates.values()), rates
            peak.measure = lambda threads, kind: {{"int8": 4.0, "float32": 1.0}}[kind]
            assert peak.measure_mixed(1, {{"int8": 2.0, "float32": 1.0}}) == 2.0
    """)
