# SPDX-License-Identifier: Apache-2.0
"""Models of timm, torchvision and open_clip inside ``with mha_c.torch.attention()``, where these are installed.

The judge is the same model in float64. Before that, each case is shown to notice: without a trait of its attention the
answer is another one.
"""

import importlib.util

import pytest

pytest.importorskip("torch")
from vision_models import CASES, examine  # noqa: E402

TIMES_TORCHS_ERROR = 3
TIMES_THE_TOLERANCE = 1000


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.library}, {case.name}")
def test_a_model_computes_the_same_here(case):
    if importlib.util.find_spec(case.library) is None:
        pytest.skip(f"{case.library} is not installed")
    found = examine(case)
    tolerance = TIMES_TORCHS_ERROR * found.theirs
    assert {trait for trait, change in found.without.items() if change >= TIMES_THE_TOLERANCE * tolerance} == set(case.traits)
    assert found.ours <= tolerance
    assert (found.here, found.left) == (case.calls, 0)
