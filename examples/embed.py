# SPDX-License-Identifier: Apache-2.0
"""Turn the lines of a text file into vectors with all-MiniLM-L6-v2.

    python examples/embed.py sentences.txt > vectors.npy

The result is a NumPy file of float32: a row of 384 features and length 1 for each line. The dot product of two rows is
the cosine of the sentences. The model itself is in minilm.py.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from minilm import SentenceEncoder

LINES = 512  # that are encoded together: similar lengths are found among them, and progress is shown after them


def progress(done: int, total: int) -> None:
    """Show how many lines are done, if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} lines", end="" if done < total else "\n", file=sys.stderr, flush=True)


def main() -> None:
    """Encode the file on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="UTF-8 text, a sentence per line")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the NumPy file; standard output unless given")
    options = parser.parse_args()
    if options.output is None and sys.stdout.isatty():
        parser.error("the result is not text: write it to a file, with > vectors.npy or --output vectors.npy")
    try:
        with options.file.open(encoding="utf-8") as file:
            sentences = [line.rstrip("\n") for line in file]
        output = options.output.open("wb") if options.output else sys.stdout.buffer
    except OSError as error:
        parser.error(str(error))
    except UnicodeDecodeError as error:
        parser.error(f"{options.file} is not UTF-8 text: {error}")

    encoder = SentenceEncoder()
    vectors = [encoder.encode([])]  # of no sentences, for an empty file
    for start in range(0, len(sentences), LINES):
        vectors.append(encoder.encode(sentences[start : start + LINES]))
        progress(min(start + LINES, len(sentences)), len(sentences))
    with io.BytesIO() as whole, output:  # numpy.save needs a file with positions, which a pipe has not
        np.save(whole, np.concatenate(vectors))
        output.write(whole.getbuffer())


if __name__ == "__main__":
    main()
