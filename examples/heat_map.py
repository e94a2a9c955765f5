# SPDX-License-Identifier: Apache-2.0
"""Draw what one head of a real model looks at in a sentence: a heat map, as attention.png in the current folder.

    python examples/heat_map.py "My sister lost her keys on the train, so her neighbour let her in."

In that sentence, head 4 of layer 2 of all-MiniLM-L6-v2 looks from "her" to "sister".
"""

import sys

import mha_c
from minilm import SentenceEncoder

SENTENCE = "My sister lost her keys on the train, so her neighbour let her in."
LAYER, HEAD = 2, 4


def main() -> None:
    """Draw the sentence on the command line, or SENTENCE."""
    encoder = SentenceEncoder()
    tokens, ids, padding = encoder.tokenize([" ".join(sys.argv[1:]) or SENTENCE])
    x = encoder.hidden_states(ids, padding)[LAYER]  # what enters the layer
    stages = mha_c.explain(encoder.layers[LAYER].attention, x, x, x)
    mha_c.plot.weights(stages, HEAD, tokens=tokens[0]).figure.savefig("attention.png", dpi=150)
    print("attention.png:", *tokens[0])


if __name__ == "__main__":
    main()
