# SPDX-License-Identifier: Apache-2.0
"""Random Transformer layers and random calls of them, made to mha_c and to torch: same results, same exceptions.

The reference is torch with its fast path switched off. Where mha_c differs from torch on purpose, torch is asked the
equivalent question: is_causal=True is the causal mask spelt out. The rows of padding, which torch's fast path leaves
out, have a test of their own, with the fast path.

hypothesis draws the configurations, as in tests/test_differential.py.
"""

import itertools

import numpy as np
import pytest
from helpers import causal_mask, eps_of, in_float32, is_float, is_half, normal, outcome, to_numpy, to_torch, torch_words

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")
torch = pytest.importorskip("torch")
mha_c = pytest.importorskip("mha_c")

from hypothesis import given, note, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Support for mismatched")
booleans = st.booleans()

#: How many times torch's own error a result may be off. Both are errors of rounding, so that neither is always smaller.
TIMES_TORCHS_ERROR = 6


@pytest.fixture(scope="module", autouse=True)
def ordinary_torch():
    """torch without its fast path, and without gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        yield
    torch.backends.mha.set_fastpath_enabled(before)


def make(library, kind, *arguments, layers=2, norm=True, seed=0, **options):
    """The same layer of mha_c or of torch.nn, from one seed. Stacks have `layers` layers, and perhaps a norm."""
    namespace = mha_c if library is mha_c else torch.nn
    if library is torch:
        torch.manual_seed(seed)
        options["dtype"] = getattr(torch, options.get("dtype", "float32"))
    else:
        options["seed"] = seed
    if kind == "Transformer":
        d_model, nhead, *rest = arguments
        return getattr(namespace, kind)(d_model, nhead, layers, layers, *rest, **options).eval()
    is_stack = not kind.endswith("Layer")
    made = getattr(namespace, f"{kind}Layer" if is_stack else kind)(*arguments, **options)
    if is_stack:
        last = namespace.LayerNorm(arguments[0], dtype=options["dtype"]) if norm else None
        made = getattr(namespace, kind)(made, layers, last)
    return made.eval()


def randomize_both(ours, theirs):
    """Random parameters for both: new biases are zero, and new norms change nothing, which hides mistakes."""
    state = {}
    for number, (name, array) in enumerate(ours.state_dict().items()):
        drawn = normal(array.shape, array.dtype, number)
        state[name] = drawn / np.sqrt(array.shape[-1]).astype(array.dtype) if array.ndim > 1 else 1 + drawn / 4
    ours.load_state_dict(state)
    theirs.load_state_dict({name: to_torch(array) for name, array in state.items()})


def in_torch(theirs, call):
    """What torch gives for the arguments by name: causal masks spelt out, float masks in the dtype of the inputs."""
    call = dict(call)
    lengths = {name: call[name].shape[-2 if theirs_batch_first(theirs) else 0] for name in INPUTS if name in call}
    lengths.setdefault("memory", lengths.get("src"))
    dtype = next(call[name].dtype for name in INPUTS if name in call)
    for flag, mask, queries, keys in CAUSAL:
        if call.pop(flag, None):
            mask = "mask" if mask == "src_mask" and isinstance(theirs, torch.nn.TransformerEncoder) else mask
            hidden, given_mask = causal_mask(lengths[queries], lengths[keys]), call.get(mask)
            if given_mask is None:
                call[mask] = hidden
            else:
                call[mask] = given_mask | hidden if given_mask.dtype == bool else np.where(hidden, -np.inf, given_mask)
    call = {name: value.astype(dtype) if isinstance(value, np.ndarray) and is_float(value) else value
            for name, value in call.items()}
    return to_numpy(theirs(**{name: to_torch(value) for name, value in call.items()}))


INPUTS = ("src", "tgt", "memory")
CAUSAL = (  # the flag, its mask, whose rows and whose columns
    ("is_causal", "src_mask", "src", "src"),
    ("src_is_causal", "src_mask", "src", "src"),
    ("tgt_is_causal", "tgt_mask", "tgt", "tgt"),
    ("memory_is_causal", "memory_mask", "tgt", "memory"),
)


def theirs_batch_first(theirs):
    return next(part.batch_first for part in theirs.modules() if isinstance(part, torch.nn.MultiheadAttention))


# ------------------------------------------------------------------------------------------- calls that are right


@st.composite
def masks(draw, n, heads, rows, columns, dtype):
    """An attention mask and a padding mask, or None. In each row, one key stays visible."""
    attention = padding = None
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["none", "bool", "float", "hiding float"]))
    shape = draw(st.sampled_from([(rows, columns), ((n or 1) * heads, rows, columns)]))
    if kind != "none":
        attention = generator.random(shape) < 0.3
        attention[..., 0] = False
        if kind != "bool":
            numbers = generator.standard_normal(shape).astype(dtype)
            attention = np.where(attention & (kind == "hiding float"), -np.inf, numbers).astype(dtype)
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind != "none":
        padding = np.arange(columns) >= generator.integers(1, columns + 1, n or 1)[:, None]
        padding = padding if n else padding[0]
        if kind == "float":
            padding = np.where(padding, -np.inf, generator.standard_normal(padding.shape)).astype(dtype)
    return attention, padding


@st.composite
def right_calls(draw):
    """The name of a class, its arguments and options, and a call."""
    kind = draw(st.sampled_from(["TransformerEncoderLayer", "TransformerEncoder", "TransformerDecoderLayer",
                                 "TransformerDecoder", "Transformer"]))
    heads = draw(st.sampled_from([1, 2, 3]))
    e = heads * draw(st.sampled_from([4, 8]))  # in fewer features, a norm may make any error hundreds of times larger
    dtype = draw(st.sampled_from(["float32", "float64", "bfloat16", "float16"]))
    options = {
        "activation": draw(st.sampled_from(["relu", "gelu"])), "batch_first": draw(booleans),
        "norm_first": draw(booleans), "bias": draw(booleans), "dtype": dtype,
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
    }
    n = draw(st.sampled_from([None, 1, 2, 3]))
    lengths = {name: draw(st.integers(1, 6)) for name in INPUTS}
    call = {}

    def add(name):
        length = lengths[name]
        shape = (length, e) if n is None else (n, length, e) if options["batch_first"] else (length, n, e)
        call[name] = normal(shape, dtype, len(call))

    def add_masks(mask, padding, flag, queries, keys, optional=True):
        call[mask], call[padding] = draw(masks(n, heads, lengths[queries], lengths[keys], dtype))
        call[flag] = draw(st.sampled_from([None, False, True] if optional else [False, True]))

    if "Encoder" in kind or kind == "Transformer":
        add("src")
        mask = "mask" if kind == "TransformerEncoder" else "src_mask"
        flag = "src_is_causal" if kind == "Transformer" else "is_causal"
        add_masks(mask, "src_key_padding_mask", flag, "src", "src", kind != "TransformerEncoderLayer")
    if "Encoder" not in kind:
        add("tgt")
        if kind == "Transformer":
            lengths["memory"] = lengths["src"]
        else:
            add("memory")
        add_masks("tgt_mask", "tgt_key_padding_mask", "tgt_is_causal", "tgt", "tgt", not kind.endswith("Layer"))
        add_masks("memory_mask", "memory_key_padding_mask", "memory_is_causal", "tgt", "memory", False)
    return kind, (e, heads, draw(st.sampled_from([1, 5, 16]))), options, call


def describe(value):
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)


@settings(deadline=None, max_examples=200)
@given(right_calls())
def test_results(case):
    """Values, shapes, dtypes and state dicts."""
    kind, arguments, options, call = case
    note(", ".join(f"{name}={describe(value)}" for name, value in call.items()))
    ours, theirs = (make(library, kind, *arguments, **options) for library in (mha_c, torch))
    theirs_state = theirs.state_dict()
    assert list(ours.state_dict()) == list(theirs_state)
    has_torchs_bits = not is_half(options["dtype"])  # from the same seed: halves are the cast of float32's numbers
    for name, array in ours.state_dict().items():
        assert array.dtype == options["dtype"] and array.shape == tuple(theirs_state[name].shape), name
        assert not has_torchs_bits or np.array_equal(array, theirs_state[name].numpy()), name
    randomize_both(ours, theirs)
    if kind in ("TransformerEncoder", "Transformer"):  # torch's fast path is off; test_rows_of_padding is about it
        (ours if kind == "TransformerEncoder" else ours.encoder).padded = "computed"
    got, want = ours(**call), in_torch(theirs, call)
    assert got.shape == want.shape and got.dtype == want.dtype

    def of_dtype(dtype, factor=1.0):
        return {name: (value * factor).astype(dtype) if name in INPUTS else value for name, value in call.items()}

    if kind == "TransformerEncoderLayer" and is_half(options["dtype"]):  # one call of the core, rounded once
        wide = in_float32(ours)(**of_dtype("float32"))
        np.testing.assert_array_equal(got.astype("float32"), wide.astype(got.dtype).astype("float32"))
    exact = in_torch(theirs.double(), of_dtype("float64"))
    narrow_dtype = options["dtype"] if is_half(options["dtype"]) else "float32"
    eps = eps_of(narrow_dtype)
    theirs = theirs.to(getattr(torch, narrow_dtype))
    # torch's own error, also for inputs that are off by a rounding: the sums in one call may be lucky.
    narrow = [in_torch(theirs, of_dtype(narrow_dtype, factor)) for factor in (1.0, 1 + eps, 1 - eps)]
    size = max(1.0, np.abs(exact).max(initial=0.0))
    torchs_error = max(2 * eps * size, *(np.abs(one - exact).max(initial=0.0) for one in narrow))
    allowed = TIMES_TORCHS_ERROR * torchs_error * (eps_of(got.dtype) / eps)
    np.testing.assert_allclose(got.astype(exact.dtype), exact, rtol=0, atol=allowed)


# ------------------------------------------------------------------------------------------- rows of padding


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"batch_first": False}, {"bias": False}, {"activation": "gelu"}, {"activation": "gelu_tanh"},
    {"activation": "silu"}, {"nhead": 1}, {"enable_nested_tensor": False}, {"eps": 1e-3},
], ids=str)
def test_rows_of_padding(norm_first, options):
    """They are zeros before the last norm exactly where torch's fast path leaves them out: for every side of the
    padding, with and without a mask, a batch and a norm at the end."""
    options = {"batch_first": True, "nhead": 2, "activation": "relu", "bias": True, "norm_first": norm_first, **options}
    nested, eps = options.pop("enable_nested_tensor", True), options.pop("eps", 1e-5)
    torchs = {"gelu_tanh": torch.nn.GELU("tanh"), "silu": torch.nn.functional.silu}
    theirs_options = {**options, "activation": torchs.get(options["activation"], options["activation"])}
    paddings = {"none": [5, 5], "right": [5, 3], "all": [5, 0]}
    sides = {name: np.arange(5) >= np.array(lengths)[:, None] for name, lengths in paddings.items()}
    sides["left"] = sides["right"][:, ::-1]
    sides["middle"] = np.array([[False] * 5, [False, True, False, False, True]])
    sides["float"] = np.where(sides["right"], -np.inf, 0).astype("float32")
    x = normal((2, 5, 8) if options["batch_first"] else (5, 2, 8))
    zeros = set()
    for has_norm in (False, True):
        layers = [mha_c.TransformerEncoderLayer(8, dim_feedforward=16, dropout=0.0, **options),
                  torch.nn.TransformerEncoderLayer(8, dim_feedforward=16, dropout=0.0, **theirs_options)]
        for layer in layers:
            layer.norm2.eps = eps
        norms = [mha_c.LayerNorm(8), torch.nn.LayerNorm(8)] if has_norm else [None, None]
        ours, theirs = (namespace(layer, 2, norm, enable_nested_tensor=nested) for namespace, layer, norm
                        in zip((mha_c.TransformerEncoder, torch.nn.TransformerEncoder), layers, norms))
        randomize_both(ours, theirs)
        for (side, padding), mask, training in itertools.product(
                sides.items(), (None, np.zeros((5, 5), bool)), (False, True)):
            case = f"norm={has_norm}, {side}, mask={mask is not None}, training={training}"
            call = {"src": x, "mask": mask, "src_key_padding_mask": padding}
            zeros.add(check_rows_of_padding(ours.train(training), theirs.train(training), call, case))
    is_plain = norm_first is False and nested and eps == 1e-5
    has_fast_path = options["batch_first"] and options["bias"] and options["nhead"] == 2
    assert zeros == ({False, True} if is_plain and has_fast_path and options["activation"] != "silu" else {False})


def with_fast_path(theirs, call):
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        return theirs(**{name: to_torch(value) for name, value in call.items()}).numpy()
    finally:
        torch.backends.mha.set_fastpath_enabled(False)


def check_rows_of_padding(ours, theirs, call, case):
    """Whether torch leaves out the rows of padding, and so do we."""
    padding = call["src_key_padding_mask"]
    rows = padding if padding.dtype == bool else padding == -np.inf
    rows = rows if ours.layers[0].self_attn.batch_first else rows.T
    filler = np.zeros(8, "float32") if ours.norm is None else ours.norm.bias
    plain = in_torch(theirs, call)
    # torch's fast path takes GELU by erf for nn.GELU("tanh") too: which rows it leaves out is taken from there, and the
    # values from the ordinary path.
    left_out = bool(rows.any() and (with_fast_path(theirs, call)[rows] == filler).all())
    ours.padded = None
    got = ours(**call)
    expected = np.where(rows[..., None], filler, plain) if left_out else plain
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5, err_msg=case)
    ours.padded = "zero"
    zeroed = ours(**call)
    np.testing.assert_array_equal(zeroed[rows], np.broadcast_to(filler, zeroed[rows].shape), err_msg=case)
    np.testing.assert_array_equal(zeroed[~rows], got[~rows], err_msg=case)
    ours.padded = "computed"
    np.testing.assert_allclose(ours(**call), plain, rtol=0, atol=2e-5, err_msg=case)
    return left_out


def test_inside_transformer():
    """The encoder in a Transformer gives zeros to the decoder, as torch's does."""
    options = {"batch_first": True, "dtype": "float32"}
    ours, theirs = (make(library, "Transformer", 8, 2, 16, **options) for library in (mha_c, torch))
    randomize_both(ours, theirs)
    given_to_both = {"src": normal((2, 5, 8)), "tgt": normal((2, 4, 8)),
                     "src_key_padding_mask": np.arange(5) >= np.array([[5], [3]])}
    want = with_fast_path(theirs, given_to_both)
    np.testing.assert_allclose(ours(**given_to_both), want, rtol=0, atol=2e-5)
    assert np.abs(want - in_torch(theirs, given_to_both)).max() > 1e-3


# ------------------------------------------------------------------------------------------- calls that are wrong

X, Y = (5, 3, 8), (7, 3, 8)
#: Wrong calls by name: the arguments' shapes, or shape and dtype; None for no array.
WRONG_SRC = {
    "features": {"src": (5, 3, 6)},
    "dtype": {"src": (X, "float64")},
    "rank 1": {"src": (8,)},
    "rank 4": {"src": (1, 5, 3, 8)},
    "mask shape": {"src": X, "src_mask": ((4, 4), "bool")},
    "mask rank": {"src": X, "src_mask": ((5,), "bool")},
    "3-D mask": {"src": X, "src_mask": ((3, 5, 5), "bool")},
    "mask of ints": {"src": X, "src_mask": ((5, 5), "int64")},
    "padding shape": {"src": X, "src_key_padding_mask": ((5, 3), "bool")},
    "padding rank": {"src": X, "src_key_padding_mask": ((5,), "bool")},
    "padding of ints": {"src": X, "src_key_padding_mask": ((3, 5), "int64")},
}
WRONG_TGT = {
    **{name: {key.replace("src", "tgt"): value for key, value in call.items()} | {"memory": Y}
       for name, call in WRONG_SRC.items()},
    "memory features": {"tgt": X, "memory": (7, 3, 6)},
    "memory batch": {"tgt": X, "memory": (7, 2, 8)},
    "memory rank": {"tgt": X, "memory": (7, 8)},
    "memory dtype": {"tgt": X, "memory": (Y, "float64")},
    "memory mask": {"tgt": X, "memory": Y, "memory_mask": ((7, 5), "bool")},
    "memory padding": {"tgt": X, "memory": Y, "memory_key_padding_mask": ((3, 5), "bool")},
}
WRONG_BOTH = {
    "batches": {"src": X, "tgt": (5, 2, 8)},
    "src features": {"src": (5, 3, 6), "tgt": X},
    "tgt features": {"src": X, "tgt": (5, 3, 6)},
    "src mask": {"src": X, "tgt": Y, "src_mask": ((7, 7), "bool")},
    "src padding": {"src": X, "tgt": Y, "src_key_padding_mask": ((3, 7), "bool")},
    "tgt padding": {"src": X, "tgt": Y, "tgt_key_padding_mask": ((3, 5), "bool")},
    "memory padding": {"src": X, "tgt": Y, "memory_key_padding_mask": ((3, 7), "bool")},
}
WRONG = [
    *(("TransformerEncoderLayer", name, call) for name, call in WRONG_SRC.items()),
    *(("TransformerEncoder", name, {key.replace("src_mask", "mask"): value for key, value in call.items()})
      for name, call in WRONG_SRC.items()),
    *((kind, name, call) for kind in ("TransformerDecoderLayer", "TransformerDecoder")
      for name, call in WRONG_TGT.items()),
    *(("Transformer", name, call) for name, call in WRONG_BOTH.items()),
]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("kind", "name", "call"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_exceptions(kind, name, call, norm_first):
    """torch's type and words, and then the name of the argument that does not fit."""
    call = {key: np.zeros(value if isinstance(value[0], int) else value[0],
                          value[1] if isinstance(value[-1], str) else "float32") for key, value in call.items()}
    ours, theirs = (make(library, kind, 8, 2, 16, norm_first=norm_first, dtype="float32") for library in (mha_c, torch))
    if kind == "TransformerDecoder":  # else torch compares tgt_mask with a causal one, and fails at integers
        call["tgt_is_causal"] = False
    expected = outcome(lambda: theirs(**{key: to_torch(value) for key, value in call.items()})).error
    error = outcome(lambda: ours(**call)).error
    assert expected is not None and type(error) is type(expected), f"{error!r} instead of {expected!r}"
    words = torch_words(expected)
    assert words.split(",")[0].rstrip(".") in str(error) or "dtype" in name, (str(error), words)
    call.pop("tgt_is_causal", None)
    wrong = [key for key, value in call.items() if value.shape not in (X, Y) or value.dtype == "float64"]
    named = str(error).replace(words, "")
    assert any(key in named for key in wrong), str(error)
    assert "query" not in named and "attn_mask" not in named.replace("src_attn", "")


@pytest.mark.parametrize("arguments", [
    (8, 3), (0, 2), (8, 0), (8, 2, -1), (8, 2, 16, 1.5), (8, 2, 16, -0.1), (8, 2, 16, 0.1, "tanh"),
], ids=str)
@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_exceptions_of_constructors(kind, arguments):
    expected = outcome(lambda: getattr(torch.nn, kind)(*arguments)).error
    error = outcome(lambda: getattr(mha_c, kind)(*arguments)).error
    assert type(error) is type(expected)
    assert str(error).startswith(str(expected).split(":")[0])
