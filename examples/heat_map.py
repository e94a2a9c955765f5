# SPDX-License-Identifier: Apache-2.0
"""Draw what one head of a real model attends to in a sentence: a heat map, written to attention.png.

    python examples/heat_map.py "My sister lost her keys on the train, so her neighbour let her in."

In this sentence, "her" attends to "sister" in head 4 of layer 2 of all-MiniLM-L6-v2. The dark column at the left is
[CLS], a token that the model adds before every sentence. Words give it most of their weight when nothing else matches,
so the words that attend elsewhere are the interesting ones.
"""

import argparse

import mha_c
from minilm import SentenceEncoder

SENTENCE = "My sister lost her keys on the train, so her neighbour let her in."
LAYER, HEAD = 2, 4


def main() -> None:
    """Draw the sentence on the command line, or SENTENCE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentence", nargs="*", default=[SENTENCE], help="the sentence; the one above unless given")
    sentence = " ".join(parser.parse_args().sentence)

    encoder = SentenceEncoder()
    tokens, ids, padding = encoder.tokenize([sentence])
    x = encoder.hidden_states(ids, padding)[LAYER]  # what enters the layer
    stages = mha_c.explain(encoder.encoder.layers[LAYER].self_attn, x)
    ax = mha_c.plot.weights(stages, HEAD, layer=LAYER, tokens=tokens[0])
    ax.figure.savefig("attention.png", dpi=150, metadata={"Description": ax.get_label()})  # the picture in words
    print(f"attention.png: {ax.get_title()}")


if __name__ == "__main__":
    main()
