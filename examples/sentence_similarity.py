# SPDX-License-Identifier: Apache-2.0
"""Rank sentences by meaning: all-MiniLM-L6-v2 in NumPy and mha_c, without torch.

    python examples/sentence_similarity.py "How do I get a stain out of a shirt?"

The model turns a sentence into a vector of length 1. The cosine of two vectors says how similar the sentences are in
meaning, even if they share no words. The model itself is in minilm.py.
"""

import argparse
from collections.abc import Sequence

from minilm import SentenceEncoder

QUERY = "Which animals can survive without drinking?"
SENTENCES = (
    "Koalas get nearly all of their water from the leaves they eat.",
    "The kangaroo rat of North American deserts may live its whole life without a sip of water.",
    "Elephants need more than a hundred litres of water a day.",
    "Drinking water in most cities is treated with chlorine.",
    "Rub salt on fresh red wine spots before washing the cloth in cold water.",
    "The central bank raised interest rates by a quarter of a point.",
    "Shares in carmakers fell after the new tariffs were announced.",
    "A violin has four strings, tuned in fifths.",
    "The orchestra rehearsed the symphony until late at night.",
    "Sourdough rises more slowly than dough made with baker's yeast.",
)


def rank(encoder: SentenceEncoder, query: str, sentences: Sequence[str]) -> list[tuple[float, str]]:
    """The sentences and their cosines with the query, most similar first."""
    query_vector, *vectors = encoder.encode([query, *sentences])
    cosines = [float(query_vector @ vector) for vector in vectors]
    return sorted(zip(cosines, sentences), reverse=True)


def main() -> None:
    """Rank SENTENCES by the query on the command line, or by QUERY."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", nargs="*", default=[QUERY], help=f"a question or a topic; unless given: {QUERY}")
    query = " ".join(parser.parse_args().query)
    print(query)
    for cosine, sentence in rank(SentenceEncoder(), query, SENTENCES):
        print(f"{cosine:7.3f}  {sentence}")


if __name__ == "__main__":
    main()
