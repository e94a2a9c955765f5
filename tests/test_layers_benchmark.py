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
    libraries have larger errors: sums can saturate, and scales are of whole arrays. In medium precision, torch multiplies float32
    if it has no fast way to multiply bfloat16."""
    run_child(f"""
        import sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import peers, problem
        from cases import Case

        kinds = {{"float32": {{}}, "float16": {{"dtype": "float16"}}, "bfloat16": {{"dtype": "bfloat16"}},
                  "int8": {{"matmul_precision": "int8"}}, "products of bfloat16": {{"matmul_precision": "bfloat16"}}}}
        bounds = {{"float32": (0, 1e-6), "float16": (1e-5, 4e-3), "bfloat16": (1e-4, 3e-2), "int8": (5e-3, 5e-2),
                   "products of bfloat16": (1e-4, 3e-2)}}
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
                is_float32 = candidate.name == peers.IN_FLOAT32 and case.matmul_precision
                least, most = bounds["float32" if is_float32 else kind]
                least = 0 if "medium" in candidate.name else least
                most = 0.3 if kind == "int8" and "mha_c" not in candidate.name else most
                assert least <= error < most, (candidate.name, kind, error)
                assert quality((output * 1.1, weights))["error"] > 0.09
                computed[kind].add(candidate.name)
        four = {{f"ORT {{kind}}" for kind in ("MultiHeadAttention", "Attention", "ai.onnx Attention", "plain operators")}}
        assert computed["float32"] >= {{"mha_c", "torch", "torch fast path", *four}}, computed
        assert computed["int8"] >= {{"mha_c", "mha_c in float32", "torch", *four}}, computed
        assert computed["bfloat16"] >= {{"mha_c", "mha_c in float32", "torch"}}, computed
        medium = {{"torch medium precision", "torch fast path, medium precision"}}
        assert computed["products of bfloat16"] >= computed["bfloat16"] | medium, computed
        assert not medium & (computed["float32"] | computed["bfloat16"] | computed["int8"]), computed
        assert computed["float16"] >= {{"mha_c", "mha_c in float32", "torch", "ORT plain operators"}}, computed
    """)


def test_operations():
    """They are counted by the numbers that are multiplied: float16 is multiplied as float32, int8 by linear maps alone."""
    run_child(f"""
        import sys
        from dataclasses import replace
        sys.path.insert(0, {str(BENCHMARKS)!r})
        from cases import Case
        from encoder_cases import EncoderCase

        N, L, E, F = 2, 5, 384, 1536
        attention = 2.0 * N * 2 * L * L * E
        layer, encoder = (attention + 2.0 * N * L * (4 * E * E)), 6 * (attention + 2.0 * N * L * (4 * E * E + 2 * E * F))
        for case, all_of_them, attention in ((Case("", N, L, E, 12), layer, attention),
                                             (EncoderCase("", "MiniLM", (L, L)), encoder, 6 * attention)):
            def operations(**options):
                return replace(case, **options).operations
            assert case.operations == operations(dtype="float16") == {{"float32": all_of_them}}
            assert operations(dtype="bfloat16") == {{"bfloat16": all_of_them}}
            assert operations(dtype="float64") == {{"float64": all_of_them}}
            assert operations(matmul_precision="bfloat16") == {{"bfloat16": all_of_them}}
            assert operations(matmul_precision="int8") == {{"int8": all_of_them - attention, "bfloat16": attention}}
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
            peak.measure = lambda threads, kind, seconds: {{"int8": 4.0, "float32": 1.0}}[kind]
            assert peak.measure_mixed(1, {{"int8": 2.0, "float32": 1.0}}) == 2.0
    """)
