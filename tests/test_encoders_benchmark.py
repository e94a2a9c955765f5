# SPDX-License-Identifier: Apache-2.0
"""benchmarks/encoders.py: all libraries compute the same encoder, and the page that is made of the measurements."""

import subprocess
import sys

import pytest
from helpers import PATIENCE, REPOSITORY, run_child

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

BENCHMARKS = REPOSITORY / "benchmarks"


def test_every_library_computes_the_same():
    """Two small layers, norms first and last, with and without padding. A wrong output is noticed."""
    code = f"""
        import sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import encoder_cases, encoder_problem, peers
        from encoder_cases import EncoderCase, Model

        encoder_cases.MODELS["last"] = Model(2, 32, 4, 64)
        encoder_cases.MODELS["first"] = Model(2, 32, 4, 64, norm_first=True)
        cases = [EncoderCase("", name, lengths) for name in ("first", "last") for lengths in ((7,), (9, 3, 5))]
        computed, alive = set(), []  # a peer of torch that goes away takes the mode of the next one with it
        for candidate in peers.ENCODERS:
            if candidate.name == "torch compiled":
                continue  # it takes long
            try:
                alive.append(candidate.create(1))
            except ImportError:
                continue
            for case in cases:
                try:
                    prepared = alive[-1].prepare(case)
                except peers.Unsupported:
                    continue
                error = encoder_problem.judge(case)
                output, weights = prepared.result(prepared.call())
                assert weights is None and output.shape == (case.N, case.L, 32), candidate.name
                assert error((output, None)) < 1e-6, (candidate.name, case, error((output, None)))
                assert error((output * 1.001, None)) > 5e-4
                computed.add(candidate.name)
        assert computed >= {{"mha_c", "torch", "torch fast path", "ORT optimizer", "ORT plain operators"}}, computed
    """
    run_child(code)


def test_the_command(tmp_path):
    """It measures, and makes a page with a column for each library."""
    command = [sys.executable, str(BENCHMARKS / "encoders.py"), "--quick", "--seconds", "0.01", "--threads", "1"]
    command += ["--shapes", "BERT-base layer 1×24", "--output", str(tmp_path)]
    command += ["--peers", "torch", "ORT plain operators"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "GFLOP/s" in done.stdout and "encoders.md has it all." in done.stdout
    page = (tmp_path / "encoders.md").read_text(encoding="utf-8")
    assert "| encoder, sequences × tokens | mha_c takes | of the peak | torch takes | ONNX Runtime takes |" in page
    assert "With one thread:" in page and "| BERT-base layer 1×24 | " in page
    assert (tmp_path / "encoders.json").exists()
