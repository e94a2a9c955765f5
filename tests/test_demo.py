# SPDX-License-Identifier: Apache-2.0
"""The demo: its steps are attention, and it runs with and without torch."""

import re
import shlex
import sys

import numpy as np
import pytest
from helpers import layer, normal
from mha_c import demo
from mha_c.__main__ import main


@pytest.mark.parametrize("options", [{}, {"head_dim": 3}, {"head_dim": 2, "v_head_dim": 5, "out_dim": 4}], ids=str)
def test_steps_are_attention(options):
    """The last step is the layer's output, the weights step its weights."""
    module, x = layer(8, 4, **options), normal((5, 3, 8))
    steps = {step.name: step.array for step in demo.attention_steps(module, x)}
    output, weights = module(x, x, x, average_attn_weights=False)
    np.testing.assert_allclose(steps["output"], output, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(steps["weights"], weights, rtol=1e-5, atol=1e-6)


def test_demo(capsys):
    """It runs to its end, names every step, and the differences that it prints are roundings."""
    pytest.importorskip("torch")
    assert main(["demo"]) == 0
    said = capsys.readouterr().out
    for step in ("queries", "keys", "values", "heads", "scores", "weights", "concatenation", "output"):
        assert len(re.findall(rf"^{step} +\(", said, re.MULTILINE)) == 1, step
    assert "The layer's own output has shape (5, 3, 8)." in said
    differences = [float(number) for number in re.findall(r"difference.*: (\S+), in values", said)]
    assert len(differences) == 2 and max(differences) < 5e-6


def test_demo_without_torch(capsys, monkeypatch):
    """It says how to install torch for the Python that runs, and shows the rest."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"To compare with torch: {shlex.quote(sys.executable)} -m pip install torch --index-url https://" in said
