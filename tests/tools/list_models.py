# SPDX-License-Identifier: Apache-2.0
"""The table of docs/models.md: models of transformers, timm, torchvision and open_clip with their attention here.

    python tests/tools/list_models.py

Each model has random weights. Its errors are the largest difference from the same model in float64, by the largest
number of that one's output: with mha_c, and with torch. The last column says by how much the float64 output changes
where attention is computed without one of its traits. The exit status is 1 if a model has more than three times torch's
error.

It is 77 if a library is missing: `pip install --no-deps torchvision timm open_clip_torch ftfy`. The torchvision that
this gets may have its operators compiled for another build of torch; none of them is needed.
"""

import sys
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

try:
    import torchvision_operators  # noqa: F401
    import open_clip  # noqa: F401
    import timm  # noqa: F401
    import torchvision  # noqa: F401
    import transformers
except ModuleNotFoundError as error:
    print(f"{error.name} is not installed")
    sys.exit(77)
import hugging_face  # noqa: E402
import vision_models  # noqa: E402
from mha_c.torch import register_transformers  # noqa: E402


def show(library, name, found):
    """Prints a row; returns how many times torch's the error is."""
    changes = ", ".join(f"{trait} {change:.2g}" for trait, change in found.without.items() if change > 1e-9)
    calls = f"{found.here} / {found.here + found.left}"
    print(f"| {library} | {name} | {calls} | {found.ours:.1e} | {found.theirs:.1e} | {changes} |", flush=True)
    return found.ours / found.theirs


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    hugging_face.register_definition()
    coverage = register_transformers()
    print("| library | model | calls by mha_c / all | error | torch's error | changed by leaving out |")
    print("| - | - | - | - | - | - |")
    ratios = [show("transformers", case.model.__name__, hugging_face.examine(case, coverage, "mha_c"))
              for case in hugging_face.CASES]
    ratios += [show(case.library, case.name, vision_models.examine(case)) for case in vision_models.CASES]
    return int(max(ratios) > 3)


if __name__ == "__main__":
    sys.exit(main())
