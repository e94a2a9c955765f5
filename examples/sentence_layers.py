# SPDX-License-Identifier: Apache-2.0
"""Run three sentences through the attention layers of a real model, all-MiniLM-L6-v2.

    python examples/sentence_layers.py

If torch is installed, each layer is compared with torch's. At the end, the sentences are compared with each other.
"""

import argparse
from importlib.util import find_spec

import numpy as np
from minilm import SentenceEncoder

SENTENCES = (
    "A kitten sleeps on the sofa.",
    "The young cat is napping on the couch, as it does every afternoon.",
    "Share prices fell sharply today.",
)


def main() -> None:
    """Print the layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()

    encoder = SentenceEncoder()
    tokens, ids, padding = encoder.tokenize(SENTENCES)
    for number, words in enumerate(tokens):
        print(f"sentence {number}: {' '.join(words)}")
    print(f"\n{len(ids)} sentences padded to {ids.shape[1]} tokens; the key padding mask hides the padding.")

    states = encoder.hidden_states(ids, padding)
    for number, (layer, x) in enumerate(zip(encoder.encoder.layers, states)):
        attended, weights = layer.self_attn(x, x, x, padding, average_attn_weights=False)
        print(f"layer {number}: input {x.shape}, weights {weights.shape}, output {attended.shape}")
        if find_spec("torch") is not None:
            from mha_c.torch import forward_in_torch

            theirs, _ = forward_in_torch(layer.self_attn, x, x, x, key_padding_mask=padding)
            difference, largest = np.abs(attended - theirs).max(), np.abs(theirs).max()
            print(f"   largest difference from torch: {difference:.1e}, in values up to {largest:.1f}")

    vectors = encoder.pool(states[-1], padding)
    print(f"\nOne vector of {vectors.shape[1]} features for each sentence; their cosines, 1 for the same meaning:")
    for row in vectors @ vectors.T:
        print("".join(f"{cosine:7.3f}" for cosine in row))


if __name__ == "__main__":
    main()
