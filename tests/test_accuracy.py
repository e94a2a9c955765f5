# SPDX-License-Identifier: Apache-2.0
"""Rounding errors: over the whole forward, mha_c's rms error is no larger than torch's own on the same inputs.

Both are measured against the reference, in np.longdouble for float64 and in float64 for the other dtypes. The promise is for
kernels with FMA, and for the median over ten seeds: errors are random, and one seed proves nothing.
Run with `-s` to see the ratios.
"""

import math

import numpy as np
import pytest
import reference
from helpers import call_torch, inputs, normal, to_numpy, to_torch, torch_twin

torch = pytest.importorskip("torch")
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


CALLS = {
    "output": {"need_weights": False},
    "with weights": {},
    "causal": {"need_weights": False, "is_causal": True},
    "padded": {"key_padding_mask": np.arange(70) >= np.array([[70], [40]])},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("length, e, h", [(70, 64, 4), (70, 256, 4), (5, 256, 4)])
@pytest.mark.parametrize("dtype, products", [("bfloat16", None), ("bfloat16", "float32"), ("float16", None)])
def test_rms_error_of_halves(dtype, products, length, e, h, call):
    """With products of float32, they are rounded once: the error is that of rounding the exact result, which torch's is
    well above. With products of bfloat16, it is that of rounding the same factors as torch.
    """
    ratios, roundings = [], []
    for seed in range(5):
        options = {"dtype": dtype, "seed": seed, "matmul_precision": products}
        module = mha_c.MultiheadAttention(e, h, batch_first=True, **options).eval()
        given = inputs(2, length, 70, e, dtype=dtype, seed=seed)
        want, weights = reference.multi_head_attention(module.state_dict(), h, *given, batch_first=True, **CALLS[call])
        ours = module(*given, **CALLS[call])
        theirs = call_torch(torch_twin(module), *given, **CALLS[call])
        pairs = [(want, ours[0], theirs[0])] + ([] if weights is None else [(weights, ours[1], theirs[1])])
        ratios.append([rms(a - exact) / rms(b - exact) for exact, a, b in pairs])
        roundings.append(rms(ours[0] - want) / rms(want.astype(dtype) - want))
    median = np.median(ratios, axis=0)
    print(f"\nrms error / torch's: output and weights {median}, / that of rounding {np.median(roundings):.3f}")
    if dtype == "float16" or products == "float32":
        assert median[0] <= 0.8 and (median <= 1).all()
        assert np.median(roundings) <= 1.01
    else:
        assert (median <= 1.02).all()


@pytest.mark.parametrize("options", [
    {}, {"activation": "gelu"}, {"norm_first": True}, {"activation": "gelu", "norm_first": True}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rms_error_of_layers_of_halves(dtype, options):
    """No larger than 0.8 of torch's: torch rounds after each step, mha_c what it returns, and in bfloat16 what it
    multiplies.
    """
    ratios = []
    for seed in range(4):
        module = mha_c.TransformerEncoderLayer(128, 4, 256, batch_first=True, dtype=dtype, seed=seed, **options).eval()
        state = {name: to_torch(array) for name, array in module.state_dict().items()}
        x = normal((2, 50, 128), dtype, seed)
        found = []
        for kind in (dtype, "float64"):
            kind = getattr(torch, kind)
            theirs = torch.nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dtype=kind, **options).eval()
            theirs.load_state_dict(state)
            with torch.no_grad():
                found.append(to_numpy(theirs(to_torch(x).to(kind))))
        ratios.append(rms(module(x) - found[1]) / rms(found[0] - found[1]))
    print(f"\nrms error / torch's: {np.median(ratios):.3f}")
    assert np.median(ratios) <= 0.8


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.nn.GELU("tanh"), torch.nn.SiLU()], ids=str)
def test_rms_error_of_layers(activation, norm_first):
    """No larger than torch's own, both against torch's in float64; in the median over seeds."""
    options = {"activation": activation, "norm_first": norm_first, "batch_first": True}
    ratios = []
    for seed in range(6):
        module = mha_c.TransformerEncoderLayer(256, 4, 512, seed=seed, **options).eval()
        state = {name: torch.from_numpy(array.copy()) for name, array in module.state_dict().items()}
        x = normal((2, 100, 256), seed=seed)
        found = []
        for dtype in (torch.float32, torch.float64):
            theirs = torch.nn.TransformerEncoderLayer(256, 4, 512, dtype=dtype, **options).eval()
            theirs.load_state_dict(state)
            with torch.no_grad():
                found.append(theirs(torch.from_numpy(x).to(dtype)).numpy())
        ratios.append(rms(module(x) - found[1]) / rms(found[0] - found[1]))
    print(f"\nrms error / torch's: {np.median(ratios):.3f}")
    assert np.median(ratios) <= 1


def define_activation(name, x):
    """In a wider type. NumPy has no error function: that of gelu is for float32 alone."""
    if name == "gelu":
        return x * np.vectorize(math.erfc)(-x.astype(float) / math.sqrt(2)) / 2
    u = np.sqrt(2 / np.arccos(np.longdouble(-1))) * (x + np.longdouble("0.044715") * x**3)
    return np.maximum(x, 0) if name == "relu" else x / (1 + np.exp(-x if name == "silu" else -2 * u))


@pytest.mark.parametrize("size", [0.01, 0.1, 1, 8])
@pytest.mark.parametrize("dtype, name", [
    *(pytest.param("float32", name) for name in ("relu", "gelu", "gelu_tanh", "silu")),
    *(pytest.param("float64", name, marks=FLOAT64) for name in ("relu", "gelu_tanh", "silu")),
])
@pytest.mark.parametrize("spread", ["normal", "uniform"])
def test_rms_error_of_activations(spread, name, dtype, size):
    """The same of an activation alone, for numbers of some size: normal ones, and evenly spread ones between -size and
    size. On CPUs with AVX-512, torch's gelu of small numbers, oneDNN's, is more exact than ours. There, our error may
    be four times that of rounding the exact result, as ours rounds four numbers of the size of the result.
    """
    functional = torch.nn.functional
    theirs = functional.gelu if name.startswith("gelu") else getattr(functional, name)
    options = {"approximate": "tanh"} if name == "gelu_tanh" else {}
    x = normal((100_000,), dtype) if spread == "normal" else np.random.default_rng(0).uniform(-1, 1, 100_000)
    x = (x * size).astype(dtype)
    want = define_activation(name, x.astype(np.longdouble))
    ours = rms(mha_c._core.activate(x, name, False) - want)
    is_exact = name == "gelu" and size < 1 and "avx512" in mha_c._core.config()["cpu_levels"]
    allowed = 4 * rms(want.astype(dtype) - want) if is_exact else 0
    assert ours <= max(allowed, rms(theirs(torch.from_numpy(x), **options).numpy() - want))
