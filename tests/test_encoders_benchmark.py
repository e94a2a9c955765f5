# SPDX-License-Identifier: Apache-2.0
"""benchmarks/encoders.py: all libraries compute the same encoder, and the page that is made of the measurements."""

import re
import subprocess
import sys

import pytest
from helpers import PATIENCE, REPOSITORY, run_child

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

BENCHMARKS = REPOSITORY / "benchmarks"


def test_every_library_computes_the_same():
    """Two small layers, norms first and last, with and without padding, in each kind of numbers. A wrong output is noticed."""
    code = f"""
        import sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import encoder_cases, encoder_problem, peers
        from encoder_cases import EncoderCase, Model

        encoder_cases.MODELS["last"] = Model(2, 32, 4, 64)
        encoder_cases.MODELS["first"] = Model(2, 32, 4, 64, norm_first=True)
        bounds = {{"float32": 1e-6, "float16": 4e-3, "bfloat16": 3e-2, "int8": 5e-2, "products of bfloat16": 3e-2}}
        kinds = {{kind: {{"dtype": kind}} for kind in ("float32", "float16", "bfloat16")}} | {{"int8": {{"matmul_precision": "int8"}}}}
        kinds["products of bfloat16"] = {{"matmul_precision": "bfloat16"}}
        cases = [(kind, EncoderCase("", name, lengths, **options)) for name in ("first", "last")
                 for lengths in ((7,), (9, 3, 5)) for kind, options in kinds.items()]
        computed = {{kind: set() for kind in kinds}}
        alive = []  # a peer of torch that goes away takes the mode of the next one with it
        for candidate in peers.ENCODERS:
            if "torch compiled" in candidate.name:
                continue  # it takes long
            try:
                alive.append(candidate.create(1))
            except ImportError:
                continue
            for kind, case in cases:
                try:
                    prepared = alive[-1].prepare(case)
                except peers.Unsupported:
                    continue
                judge = encoder_problem.judge(case)
                output, weights = prepared.result(prepared.call())
                assert weights is None and output.shape == (case.N, case.L, 32), candidate.name
                quality = judge((output, None))
                error = quality["error"]
                bound = 0.3 if kind == "int8" and "mha_c" not in candidate.name else bounds[kind]  # sums can saturate
                assert error < bound, (candidate.name, kind, case, error)
                assert -1e-15 < quality["1 − cosine"] < 5 * error**2, (candidate.name, kind, case, quality)
                is_rounded = kind != "float32" and candidate.name != peers.IN_FLOAT32 and "medium" not in candidate.name
                assert error > 1e-6 or not is_rounded, (candidate.name, kind, error)
                wrong = judge((output.astype(float) * (1 + 2 * bound), None))
                assert wrong["error"] > bound and abs(wrong["1 − cosine"] - quality["1 − cosine"]) < 1e-9
                assert judge((output[..., ::-1], None))["1 − cosine"] > 0.1
                computed[kind].add(candidate.name)
        assert computed["float32"] >= {{"mha_c", "torch", "torch fast path", "ORT optimizer", "ORT plain operators"}}, computed
        assert computed["float16"] >= {{"mha_c", "mha_c in float32", "torch", "ORT plain operators"}}, computed
        assert computed["bfloat16"] >= {{"mha_c", "mha_c in float32", "torch"}}, computed
        medium = {{"torch medium precision", "torch fast path, medium precision"}}
        assert computed["products of bfloat16"] >= computed["bfloat16"] | medium, computed
        assert computed["int8"] >= {{"mha_c", "mha_c in float32", "ORT optimizer", "ORT plain operators"}}, computed
    """
    run_child(code)


def test_the_command(tmp_path):
    """It measures, and makes a page with a column for each library."""
    command = [sys.executable, str(BENCHMARKS / "encoders.py"), "--quick", "--seconds", "0.01", "--threads", "1"]
    command += ["--classes", "layer", "products of int8", "--shapes", "BERT-base layer 1×24", "--output", str(tmp_path)]
    command += ["--peers", "torch", "ORT plain operators"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "GFLOP/s" in done.stdout and "encoders.md has it all." in done.stdout
    page = (tmp_path / "encoders.md").read_text(encoding="utf-8")
    assert "| encoder, sequences × tokens | mha_c takes | of the peak | torch takes | ONNX Runtime takes |" in page
    assert "With one thread:" in page
    times, distances = re.findall(r"^\| BERT-base layer 1×24 \| (.*) \|$", page, flags=re.M)
    int8_times, int8_distances = re.findall(r"^\| BERT-base layer 1×24, products of int8 \| (.*) \|$", page, flags=re.M)
    assert times.count("×") == 2 and int8_times.count("×") == 1  # torch's encoder is not measured in int8
    assert max(float(cell) for cell in distances.split(" | ")) < 1e-10
    assert 1e-6 < float(int8_distances.split(" | ")[-1]) < 1e-2
    assert (tmp_path / "encoder_results.json").exists() and (tmp_path / "encoders.json").exists()
