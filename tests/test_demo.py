# SPDX-License-Identifier: Apache-2.0
"""The command line and its demo."""

import platform
import re

import mha_c
import numpy as np
import pytest
from helpers import layer, normal
from mha_c import demo
from mha_c.__main__ import main


def test_info(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for expected in (mha_c.__version__, platform.python_version(), np.__version__, f"{mha_c.get_num_threads()}, on"):
        assert expected in said


def test_usage(capsys):
    for wrong in ([], ["nothing"]):
        with pytest.raises(SystemExit) as exit_:
            main(wrong)
        assert exit_.value.code == 2
    assert "usage: mha-c" in capsys.readouterr().err


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
    assert main(["demo"]) == 0
    said = capsys.readouterr().out
    for step in ("queries", "keys", "values", "heads", "scores", "weights", "concatenation", "output"):
        assert len(re.findall(rf"^   {step} +\(", said, re.MULTILINE)) == 2, step
    assert said.count("The layer's own output has shape (5, 3, 8).") == 2
    differences = [float(number) for number in re.findall(r"difference.*: (\S+), in values", said)]
    assert len(differences) >= 2 and max(differences) < 5e-6


def test_demo_without_torch(capsys, monkeypatch):
    """It says that there is no comparison, and shows the rest."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo"]) == 0
    assert "torch is not installed" in capsys.readouterr().out
