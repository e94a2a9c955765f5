# SPDX-License-Identifier: Apache-2.0
"""NaN, infinities, subnormals and scales up to the end of the range: torch's answer, and nothing overflows in exp."""

import numpy as np
import pytest
from helpers import inputs, layer, normal, to_torch

torch = pytest.importorskip("torch")
mha_c = pytest.importorskip("mha_c")

from mha_c import check  # noqa: E402
from mha_c.functional import scaled_dot_product_attention  # noqa: E402

DTYPES = ["float32", "float64"]
SHAPES = [(2, 7, 70, 16, 4), (1, 1, 600, 64, 4)]  # N, L, S, E, H: the ordinary path, and that of few queries
SMALL = [(2, 7, 70, 16, 4), (1, 1, 130, 32, 4)]  # the same again, for many cases


def ask(shape, dtype, *, scales=(1, 1, 1), seed=0):
    """A layer, and its inputs times `scales`."""
    n, length, s, e, h = shape
    given = inputs(n, length, s, e, dtype=dtype, seed=seed)
    return layer(e, h, batch_first=True, dtype=dtype), [x * x.dtype.type(scale) for x, scale in zip(given, scales)]


@pytest.mark.parametrize("shapes", [SHAPES, SMALL], ids=str)
def test_paths(shapes):
    """Each list has a shape for each path."""
    asked = [ask(shape, "float32") for shape in shapes]
    paths = [mha_c.explain(module, *given, stages="output").paths for module, given in asked]
    assert paths == [("ordinary",) * shapes[0][0], ("few queries",)]


def assert_are_weights(weights):
    """Numbers in [0, 1] whose rows sum to 1, apart from rows of NaN."""
    rows = weights.reshape(-1, weights.shape[-1])
    rows = rows[~np.isnan(rows).any(axis=1)]
    assert (rows >= 0).all() and (rows <= 1 + 8 * np.finfo(rows.dtype).eps).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=np.sqrt(rows.shape[1]) * 4 * np.finfo(rows.dtype).eps)


def hold_against_torch(module, given, **call):
    """torch's numbers, NaN and infinities; true weights; the same output whether or not weights are returned."""
    with np.errstate(all="ignore"):
        check.against_torch(module, *given, **call).assert_close()
        check.against_torch(module, *given, need_weights=False, **call).assert_close()
    for average in (True, False):
        assert_are_weights(module(*given, average_attn_weights=average, **call)[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_in_an_input(bad, which, dtype, shape):
    """One number that is none spreads exactly as far as in torch."""
    module, given = ask(shape, dtype)
    given[which][0, -1, 3] = bad
    hold_against_torch(module, given)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("bad", [(np.inf, -np.inf), (np.inf, np.inf), (-np.inf, np.nan)], ids=str)
@pytest.mark.parametrize("at", [((0, 0, 0), (0, 0, 9)), ((0, 1, 5), (0, -1, 5)), ((0, 3, 1), (0, 64, 8))], ids=str)
def test_two_bad_numbers(at, bad, which, dtype, shape):
    """In one position, in one feature, in neither: of one item, which changes nothing for another."""
    module, given = ask(shape, dtype)
    given = [np.concatenate([x, x[:1] + 1]) for x in given]
    untouched = module(*given)
    for place, number in zip(at, bad):
        given[which][place] = number
    hold_against_torch(module, given)
    for got, want in zip(module(*given), untouched):
        np.testing.assert_array_equal(got[-1], want[-1])


PARAMETERS = {"q": ("in_proj_weight", (1, 3)), "k": ("in_proj_weight", ("E", 3)), "v": ("in_proj_weight", ("2E", 3)),
              "q bias": ("in_proj_bias", 1), "k bias": ("in_proj_bias", "E"), "v bias": ("in_proj_bias", "2E"),
              "out": ("out_proj.weight", (1, 3)), "out bias": ("out_proj.bias", 1)}


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which, bad", [
    (which, bad) for which in PARAMETERS for bad in (np.nan, np.inf, -np.inf, "large", "smallest_subnormal")
    # A large constant in all scores makes torch lose the rest of them. One large number in "out" shows the error of one
    # number of the context alone, which no other bounds.
    if bad != "large" or which not in ("k bias", "out")])
def test_parameters_that_are_no_ordinary_numbers(which, bad, dtype, shape):
    """NaN, an infinity, the smallest number there is, or one whose square overflows almost, once in the parameters."""
    module, given = ask(shape, dtype)
    state = {key: np.array(value) for key, value in module.state_dict().items()}
    name, place = PARAMETERS[which]
    rows = {"E": shape[3] + 1, "2E": 2 * shape[3] + 1}
    place = tuple(rows.get(i, i) for i in place) if isinstance(place, tuple) else rows.get(place, place)
    limits = np.finfo(dtype)
    state[name][place] = {"large": np.sqrt(limits.max) / 8, "smallest_subnormal": limits.smallest_subnormal}.get(bad, bad)
    module.load_state_dict(state)
    hold_against_torch(module, given)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["subnormal", "largest"])
@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
def test_parameters_at_the_end_of_the_range(name, scale, dtype, shape):
    """All of a kind: what overflows in torch overflows here."""
    module, given = ask(shape, dtype)
    state = {key: np.array(value) for key, value in module.state_dict().items()}
    state[name] /= np.abs(state[name]).max()
    factor = np.finfo(dtype).tiny if scale == "subnormal" else np.finfo(dtype).max / 2
    state[name] *= state[name].dtype.type(factor)
    module.load_state_dict(state)
    hold_against_torch(module, given)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["subnormal", 1e-30, 1e30, "largest"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_huge_and_tiny_inputs(which, scale, dtype, shape):
    """One input at a time; scores far beyond exp's range leave one key with all the weight."""
    scales = [1, 1, 1]
    scales[which] = {"subnormal": np.finfo(dtype).tiny / 8, "largest": np.finfo(dtype).max / 256}.get(scale, scale)
    hold_against_torch(*ask(shape, dtype, scales=scales))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_overflow(dtype, shape):
    """Scores of both infinities: torch's NaN in the same rows."""
    large = np.sqrt(np.finfo(dtype).max) * 100
    module, given = ask(shape, dtype, scales=(large, large, 1))
    hold_against_torch(module, given)
    assert np.isnan(module(*given)[0]).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
def test_huge_and_tiny_weights(name, scale, dtype, shape):
    """Weights of any size, against inputs of the reciprocal size, so that projections are of the ordinary one."""
    module, given = ask(shape, dtype, scales=[1 / scale] * 3 if name == "in_proj_weight" else (1, 1, 1))
    state = {key: np.array(value) for key, value in module.state_dict().items()}
    state[name] *= state[name].dtype.type(scale)
    module.load_state_dict(state)
    hold_against_torch(module, given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [80, 90, 700, 1e4])
def test_scores_beyond_the_range_of_exp(spread, shape, dtype):
    """exp is never asked for more than exp(0), however large the scores are."""
    n, length, s, e, h = shape
    query, key, value = (x.reshape(n, x.shape[1], h, e // h).swapaxes(1, 2)
                         for x in inputs(n, length, s, e, dtype=dtype))
    scores = np.linspace(-spread, spread, s).astype(dtype)
    mask = np.stack([np.roll(scores, i * 5) for i in range(length)])
    for given in (mask, mask + mask.dtype.type(spread), mask - mask.dtype.type(2 * spread)):
        output = scaled_dot_product_attention(query, key, value, given)
        theirs = torch.nn.functional.scaled_dot_product_attention(*map(to_torch, (query, key, value, given))).numpy()
        wide = [x.astype(np.longdouble) for x in (query, key, value, given)]
        exact_scores = wide[0] @ wide[1].swapaxes(-1, -2) / np.sqrt(np.longdouble(e // h)) + wide[3]
        powers = np.exp(exact_scores - exact_scores.max(axis=-1, keepdims=True))
        exact = powers / powers.sum(axis=-1, keepdims=True) @ wide[2]
        one = check.Comparison.measure("output", output, theirs, exact)
        assert one.agrees, one.disagreements
        ones = scaled_dot_product_attention(query, key, np.ones_like(value), given)
        np.testing.assert_allclose(ones, 1, rtol=np.sqrt(s) * 4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numbers", [("min",), ("min", 0), ("min", -np.inf), ("min", -np.inf, 0), (np.inf, 0),
                                     (np.inf, -np.inf), ("max", 0), ("max", "min", -np.inf), ("tiny", 0)], ids=str)
def test_masks_at_the_end_of_the_range(numbers, dtype, shape):
    """finfo.min and infinities, alone and mixed: row by row what torch makes of them."""
    module, given = ask(shape, dtype)
    limits = np.finfo(dtype)
    values = [getattr(limits, x) if isinstance(x, str) else x for x in numbers]
    mask = np.random.default_rng(1).choice(np.array(values, dtype), size=(shape[1], shape[2]))
    hold_against_torch(module, given, attn_mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["query", "key"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_bad_scores_of_sdpa(bad, which, shape, dtype):
    """Infinite scores and NaN: torch's NaN in the same rows, other heads untouched."""
    n, length, s, e, h = shape
    given = [normal((n, h, rows, e // h), dtype, seed) for seed, rows in enumerate((length, s, s))]
    want = scaled_dot_product_attention(*given)
    given[which][:, 1, -1, 2] = bad
    output = scaled_dot_product_attention(*given)
    theirs = torch.nn.functional.scaled_dot_product_attention(*map(to_torch, given)).numpy()
    np.testing.assert_array_equal(np.isnan(output), np.isnan(theirs))
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(output, theirs, rtol=64 * eps, atol=64 * eps)  # an infinite score may just hide its key
    np.testing.assert_array_equal(output[:, [0, 2, 3]], want[:, [0, 2, 3]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bad", ["max", np.inf, np.nan])
def test_sdpa(bad, shape, dtype):
    """Values at the end of the range stay finite, and those that are none spread as in torch."""
    n, length, s, e, h = shape
    query, key = normal((n, h, length, e // h), dtype, 1), normal((n, h, s, e // h), dtype, 2)
    value = normal((n, h, s, e // h), dtype, 3)
    value[:, 1, s // 2, 2] = getattr(np.finfo(dtype), bad) if isinstance(bad, str) else bad
    output = scaled_dot_product_attention(query, key, value)
    theirs = torch.nn.functional.scaled_dot_product_attention(*map(to_torch, (query, key, value))).numpy()
    np.testing.assert_array_equal(np.isnan(output), np.isnan(theirs))
    np.testing.assert_array_equal(np.isinf(output), np.isinf(theirs))
    finite = np.isfinite(output)
    np.testing.assert_allclose(output[finite], theirs[finite], rtol=64 * np.finfo(dtype).eps,
                               atol=64 * np.finfo(dtype).eps)
    assert finite[:, [0, 2, 3]].all()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16", "float16"])
def test_settings_of_numpy_do_not_matter(dtype, scale):
    """As in torch, which has none: numbers that round to 0 or infinity are neither errors nor warnings."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    makers = [
        lambda: mha_c.MultiheadAttention(64, 2, dtype=dtype, seed=0),
        lambda: mha_c.TransformerEncoderLayer(64, 2, 32, dtype=dtype, seed=0),
        lambda: mha_c.TransformerDecoderLayer(64, 2, 32, dtype=dtype, seed=0),
        lambda: mha_c.Linear(64, 32, dtype=dtype, seed=0),
        lambda: mha_c.Dropout(0.5),
    ]
    mha_c.MultiheadAttention(8, 2, dtype=dtype)
    x = (normal((2, 5, 64)) * np.float32(scale)).astype(dtype)
    with np.errstate(all="raise"):
        for make in makers:
            module = make()
            given = (x,) * {"MultiheadAttention": 3, "TransformerDecoderLayer": 2}.get(type(module).__name__, 1)
            module.train()(*given)
            module.eval()(*given)
            if hasattr(module, "matmul_precision") and dtype != "float64":
                module.matmul_precision = "int8"
                module(*given)
                module.matmul_precision = None
            module.half().float()
