# SPDX-License-Identifier: Apache-2.0
"""Rounding errors: over the whole forward, mha_c's rms error is no larger than torch's own on the same inputs.

Both are measured against the reference, in float64 for float32 and in np.longdouble for float64. The promise is for
kernels with FMA, and for the median over ten seeds: errors are random, and one seed proves nothing.
Run with `-s` to see the ratios.
"""

import numpy as np
import pytest
import reference
from helpers import call_torch, inputs, torch_twin

pytest.importorskip("torch")
mha_c = pytest.importorskip("mha_c")

if mha_c._core.config()["cpu_level"] == "portable":
    pytest.skip("the kernels in use, portable, have no FMA", allow_module_level=True)
if np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps:
    FLOAT64 = pytest.mark.skip(reason="np.longdouble is no wider than float64 on this platform")
else:
    FLOAT64 = ()

SEEDS = range(10)


def rms(error):
    return float(np.sqrt(np.mean(np.square(error))))


def case(dtype, n, length, s, e, h, **options):
    name = f"{dtype}-N{n}-L{length}-S{s}-E{e}-H{h}" + "".join(f"-{k}={v}" for k, v in options.items())
    return pytest.param(dtype, n, length, s, e, h, options, id=name, marks=FLOAT64 if dtype == "float64" else ())


@pytest.mark.parametrize("dtype, n, length, s, e, h, options", [
    case("float32", 1, 128, 128, 256, 4),
    case("float32", 4, 32, 32, 384, 12),
    case("float32", 1, 512, 512, 512, 8),
    case("float32", 1, 197, 197, 768, 12),
    case("float32", 1, 100, 100, 1024, 16),
    case("float32", 2, 64, 512, 512, 8, kdim=256, vdim=256),
    case("float32", 1, 256, 256, 256, 1),
    case("float32", 4, 1, 512, 256, 4, kdim=512, vdim=512),
    case("float64", 1, 64, 64, 256, 4),
    case("float64", 2, 20, 130, 384, 6),
    case("float64", 4, 1, 300, 128, 4),
])
def test_rms_error(dtype, n, length, s, e, h, options):
    """The output alone, the output with weights, and the weights averaged over heads: torch has two ways, too."""
    ratios = []
    for seed in SEEDS:
        module = mha_c.MultiheadAttention(e, h, batch_first=True, dtype=dtype, seed=seed, **options).eval()
        given = inputs(n, length, s, e, dtype=dtype, seed=seed, **options)
        output, weights = reference.multi_head_attention(module.state_dict(), h, *given, batch_first=True)
        ours, theirs = [], []
        for call in ({"need_weights": False}, {}):
            ours += module(*given, **call)
            theirs += call_torch(torch_twin(module), *given, **call)
        ratios.append([rms(a - want) / rms(b - want)
                       for a, b, want in zip(ours, theirs, (output, None, output, weights)) if want is not None])
    median = np.median(ratios, axis=0)
    print(f"\nrms error / torch's: output {median[0]:.3f}, with weights {median[1]:.3f}, weights {median[2]:.3f}")
    assert (median <= 1).all()
