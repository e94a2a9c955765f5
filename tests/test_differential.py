# SPDX-License-Identifier: Apache-2.0
"""Random layers and random calls, right and wrong, made to mha_c and to torch: same results, same exceptions.

hypothesis draws the configuration, the sizes (zero included), the masks and the memory layout of every array, and
looks for the smallest call on which the two differ. 400 examples a test, always the same ones; a long search is

    HYPOTHESIS_PROFILE=thorough pytest tests/test_differential.py --hypothesis-show-statistics

of 20,000 examples, or of as many as HYPOTHESIS_EXAMPLES says.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import (
    ROUNDINGS, assert_matches, call_torch, in_float32, is_float, is_half, normal, outcome, randomize, to_torch,
    torch_twin, torch_words,
)

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")
torch = pytest.importorskip("torch")
mha_c = pytest.importorskip("mha_c")

from hypothesis import assume, event, given, note  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

booleans = st.booleans()
dtypes = st.sampled_from(["float32", "float32", "float64", "bfloat16", "float16"])


def rarely(draw, one_in=10):
    """True about once in so many; hypothesis shrinks towards False."""
    return draw(st.integers(0, one_in - 1)) == one_in - 1


# ------------------------------------------------------------------------------------------- memory


def lay_out(draw, array):
    """The same numbers in other memory: order of axes, gaps, direction, alignment, byte order, writability."""
    kind = draw(st.sampled_from(["plain", "permuted", "gaps", "reversed", "misaligned", "swapped", "read-only",
                                 "Fortran", "broadcast"]))
    if kind == "permuted":
        axes = draw(st.permutations(range(array.ndim)))
        return np.ascontiguousarray(array.transpose(axes)).transpose(np.argsort(axes))
    if kind in ("gaps", "reversed"):
        steps = [draw(st.sampled_from([1, 2, 3] if kind == "gaps" else [-1, 1, -2])) for _ in array.shape]
        room = np.full([n * abs(step) for n, step in zip(array.shape, steps)], np.nan if is_float(array) else 1)
        view = room.astype(array.dtype)[tuple(slice(None, None, step) for step in steps)]
        view[...] = array
        return view
    if kind == "misaligned":
        view = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
        view[...] = array
        return view
    if kind == "swapped" and array.dtype != "bfloat16":  # which has no other byte order
        return array.astype(array.dtype.newbyteorder())
    if kind == "read-only":
        array = array.copy()
        array.setflags(write=False)
        return array
    if kind == "Fortran":
        return np.asfortranarray(array)
    if kind == "broadcast" and array.ndim and all(array.shape):
        axis = draw(st.integers(0, array.ndim - 1))
        return np.broadcast_to(array.take([0], axis), array.shape)
    return array.copy()


# ------------------------------------------------------------------------------------------- calls that are right

sizes = st.one_of(st.integers(0, 6), st.sampled_from([1, 1, 2, 3, 4, 5, 17, 63, 64, 65, 97, 130]))


@st.composite
def layers(draw):
    """The arguments of a constructor."""
    heads = draw(st.sampled_from([1, 2, 2, 3, 4, 5]))
    e = heads * draw(st.sampled_from([1, 2, 3, 4, 8, 13, 33]))
    options = {name: True for name in ("add_bias_kv", "add_zero_attn", "batch_first") if draw(booleans)}
    if draw(booleans):
        options["bias"] = False
    for name in ("kdim", "vdim"):
        if draw(booleans):
            options[name] = draw(st.sampled_from([e, 1, 5, 16, 129]))
    return e, heads, dict(options, dtype=draw(dtypes))


def mask_of(draw, shape, dtype, seed):
    """A mask of this shape: bools, or floats of any of three types with some -inf; a share hidden from 0 to 1."""
    rng = np.random.default_rng(seed)
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    hidden = rng.random(shape) < share
    kind = draw(st.sampled_from(["bool", "same", "same", "float32", "float64", "float16"]))
    if kind == "bool":
        return hidden
    kind = dtype if kind == "same" else kind
    # Beside the lowest number a score vanishes; beside, say, -1e9 it would be rounded, by torch in ways of its own.
    has_lowest = kind != "float16" and not is_half(dtype)
    lowest = draw(st.sampled_from([-np.inf, -np.inf, np.finfo(dtype).min])) if has_lowest else -np.inf
    visible = rng.standard_normal(shape) * draw(st.sampled_from([0.0, 1.0, 5.0]))
    with np.errstate(over="ignore"):
        return np.where(hidden, lowest, visible).astype(kind)


@st.composite
def right_calls(draw):
    """A layer and a call that mha_c answers: (constructor's arguments, call's arguments)."""
    e, heads, options = draw(layers())
    dtype = options["dtype"]
    seed = draw(st.integers(0, 9))
    n = draw(st.sampled_from([None, 0, 1, 1, 2, 3, 5]))
    length, s = draw(sizes), draw(sizes)
    kdim, vdim = options.get("kdim", e), options.get("vdim", e)

    def numbers(steps, features, number):
        axes = (steps, features) if n is None else (n, steps, features) if options.get(
            "batch_first") else (steps, n, features)
        return lay_out(draw, normal(axes, dtype, seed * 10 + number))

    shared = draw(st.sampled_from(["none", "none", "kv", "all"]))
    query = numbers(length, e, 1)
    if shared == "all" and kdim == vdim == e:
        key = value = query
        s = length
    else:
        key = numbers(s, kdim, 2)
        value = key if shared == "kv" and kdim == vdim else numbers(s, vdim, 3)
    call = {"query": query, "key": key, "value": value}
    if draw(booleans):
        shape = (length, s) if draw(booleans) else ((n or 1 if n is None else n) * heads, length, s)
        call["attn_mask"] = lay_out(draw, mask_of(draw, shape, dtype, seed))
    if draw(booleans):
        call["key_padding_mask"] = lay_out(draw, mask_of(draw, (s,) if n is None else (n, s), dtype, seed + 1))
    for name, usual in (("need_weights", True), ("average_attn_weights", True), ("is_causal", False)):
        if draw(booleans):
            call[name] = not usual if draw(booleans) else usual
    return (e, heads, options), call


def describe(value):
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)


@given(right_calls())
def test_results(case):
    """Values, shapes and dtypes, in any memory."""
    (e, heads, options), call = case
    note(", ".join(f"{name}={describe(value)}" for name, value in call.items()))
    module = randomize(mha_c.MultiheadAttention(e, heads, **options)).eval()
    result = module(**call)
    native = {name: np.array(value, value.dtype.newbyteorder("=")) if isinstance(value, np.ndarray) else value
              for name, value in call.items()}
    if call["key"] is call["query"]:
        native["key"] = native["query"]
    if call["value"] is call["key"]:
        native["value"] = native["key"]
    event("bool or no masks" if all(native.get(name) is None or native[name].dtype == bool for name in (
        "attn_mask", "key_padding_mask")) else "a float mask")
    event(f"{module.out_proj.weight.dtype}")
    event("batched" if native["query"].ndim == 3 else "unbatched")
    event("something is empty" if 0 in (*native["query"].shape, *native["key"].shape) else "nothing is empty")
    assert_matches(module, result, **native, what="mha_c:")
    if is_half(module.out_proj.weight.dtype):
        inputs = {name: native[name].astype("float32") for name in ("query", "key", "value")}
        wide = in_float32(module)(**{**native, **inputs})
        for one, other in zip(result, wide):  # rounded once
            assert one is other is None or np.array_equal(  # as float32, since NaNs of bfloat16 do not count as equal
                one.astype("float32"), other.astype(one.dtype).astype("float32"), equal_nan=True)
    theirs = outcome(lambda: call_torch(torch_twin(module), **native))
    if theirs.error is None:
        assert_matches(module, theirs.result, **native, what="torch:", roundings=ROUNDINGS)
    else:  # the README's "masks on empty inputs"
        assert "0 elements" in str(theirs.error) and not native.get("need_weights", True), theirs.error


# ------------------------------------------------------------------------------------------- calls that are wrong

DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool", "complex64"]


def any_shape(draw, usual):
    """The right shape, or one of the mistakes people make: an axis too many or too few, swapped, longer or shorter."""
    shape = list(usual)
    mistake = draw(st.sampled_from(["none"] * 12 + ["drop", "add", "swap", "longer", "one", "rank"]))
    if mistake == "drop" and shape:
        shape.pop(draw(st.integers(0, len(shape) - 1)))
    elif mistake == "add":
        shape.insert(draw(st.integers(0, len(shape))), draw(st.sampled_from([1, 2])))
    elif mistake == "swap" and len(shape) > 1:
        shape[0], shape[1] = shape[1], shape[0]
    elif mistake == "longer" and shape:
        shape[draw(st.integers(0, len(shape) - 1))] += draw(st.sampled_from([1, -1]))
    elif mistake == "one" and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = 1
    elif mistake == "rank":
        shape = [2] * draw(st.integers(0, 5))
    return tuple(max(n, 0) for n in shape)


@st.composite
def any_calls(draw):
    """A layer and a call, with any number of mistakes in shapes and dtypes, and some in what is passed."""
    e, heads, options = draw(layers())
    n = draw(st.sampled_from([None, 1, 2, 3]))
    length, s = draw(st.integers(1, 5)), draw(st.integers(1, 5))

    def dtype(usual):
        return draw(st.sampled_from(DTYPES)) if rarely(draw) else usual

    call = {}
    for name, steps, features in (("query", length, e), ("key", s, options.get("kdim", e)),
                                  ("value", s, options.get("vdim", e))):
        axes = (steps, features) if n is None else (n, steps, features) if options.get(
            "batch_first") else (steps, n, features)
        call[name] = normal(any_shape(draw, axes)).astype(dtype(options["dtype"]))
    if draw(booleans):
        usual = (length, s) if draw(booleans) else ((1 if n is None else n) * heads, length, s)
        call["attn_mask"] = np.zeros(any_shape(draw, usual), dtype(draw(st.sampled_from(["bool", options["dtype"]]))))
    if draw(booleans):
        usual = (s,) if n is None else (n, s)
        call["key_padding_mask"] = np.zeros(any_shape(draw, usual), dtype(draw(
            st.sampled_from(["bool", options["dtype"]]))))
    for name in ("need_weights", "average_attn_weights"):
        if draw(booleans):
            call[name] = draw(booleans)
    if rarely(draw, 30):
        call.pop(draw(st.sampled_from(sorted(call))))
    if rarely(draw, 30):
        call[draw(st.sampled_from(["mask", "src_key_padding_mask", "q"]))] = None
    return (e, heads, options), call


def torch_alone_refuses(call, error):
    """The differences of the README's table that make torch raise where mha_c answers."""
    masks = [call.get(name) for name in ("attn_mask", "key_padding_mask")]
    query = call["query"]
    other_float = any(m is not None and is_float(m) and m.dtype != query.dtype for m in masks)
    words = str(error)
    if other_float and ("dtype" in words):
        return "float mask of another dtype"
    if "0 elements" in words and not call.get("need_weights", True):
        return "masks on empty inputs"
    return None


@given(any_calls())
def test_exceptions(case):
    """The same exception, in the same words where torch's Python code chose them; or the same kind of result."""
    (e, heads, options), call = case
    note(", ".join(f"{name}={describe(value)}" for name, value in call.items()))
    module = randomize(mha_c.MultiheadAttention(e, heads, **options)).eval()
    twin = torch_twin(module)
    tensors = {name: to_torch(value) for name, value in call.items()}
    with torch.no_grad():
        theirs = outcome(lambda: twin(**tensors))
    ours = outcome(lambda: module(**call))
    if theirs.error is None:
        event("right")
        assert ours.error is None, f"torch accepts this, but mha_c: {ours.error!r}"
        for a, b in zip(ours.result, theirs.result):
            assert (a is None) == (b is None)
            assert a is None or a.shape == tuple(b.shape) and a.dtype.name == str(b.dtype).split(".")[1]
        return
    event(type(theirs.error).__name__)
    if ours.error is None:
        assert torch_alone_refuses(call, theirs.error), f"mha_c accepts this, but torch: {theirs.error!r}"
        return
    masks = call.get("attn_mask"), call.get("key_padding_mask")
    if "query" in call and not is_float(call["query"]) and any(mask is not None for mask in masks):
        return  # torch casts the mask to the query's integers or complex numbers, and complains of that
    assert type(ours.error) is type(theirs.error), f"{ours.error!r} instead of {theirs.error!r}"
    if isinstance(theirs.error, AssertionError) or "attn_mask is" in str(theirs.error):
        assert str(ours.error).startswith(torch_words(theirs.error))


# ------------------------------------------------------------------------------------------- constructors

widths = st.one_of(st.integers(-2, 12), st.sampled_from([4.0, "4"]))


@given(st.fixed_dictionaries({"embed_dim": widths, "num_heads": widths}, optional={
    "dropout": st.floats(-1, 2), "bias": booleans, "add_bias_kv": booleans, "add_zero_attn": booleans,
    # Not 4.0: torch takes it where it equals embed_dim, by accident.
    "kdim": st.sampled_from([None, -1, 0, 1, 4, 7, 2.5, "4"]),
    "vdim": st.sampled_from([None, -1, 0, 1, 4, 7, 2.5, "4"]),
    "batch_first": booleans,
    "device": st.sampled_from([None, "cpu"]),
    "dtype": st.sampled_from([None, "float32", "float64", "bfloat16", "float16", "int32", "bool", "uint8"])}))
def test_constructors(arguments):
    """The same constructors succeed, with parameters of the same names, order, shapes and dtype, and the same
    attributes and text; the others raise the same."""
    # Of two mistakes torch finds the one that its allocations meet first, which is nobody's concern.
    assume(arguments.get("dtype") not in ("int32", "bool", "uint8") or all(
        isinstance(arguments.get(name), int | None) for name in ("kdim", "vdim")))

    def construct(lib):
        own = dict(arguments)
        if lib is torch.nn and own.get("dtype") is not None:
            own["dtype"] = getattr(torch, own["dtype"])
        return lib.MultiheadAttention(**own)

    theirs, ours = outcome(lambda: construct(torch.nn)), outcome(lambda: construct(mha_c))
    if theirs.error is not None:
        event(type(theirs.error).__name__)
        assert type(ours.error) is type(theirs.error), f"{ours.error!r} instead of {theirs.error!r}"
        if isinstance(theirs.error, (AssertionError, ValueError)):
            assert str(ours.error).startswith(str(theirs.error))
        return
    event("right")
    assert ours.error is None, f"torch accepts this, but mha_c: {ours.error!r}"
    for (name, array), (their_name, tensor) in zip(ours.result.state_dict().items(),
                                                  theirs.result.state_dict().items(), strict=True):
        assert (name, array.shape, array.dtype.name) == (
            their_name, tuple(tensor.shape), str(tensor.dtype).split(".")[1])
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn",
                 "training", "_qkv_same_embed_dim"):
        assert getattr(ours.result, name) == getattr(theirs.result, name), name


def test_the_search_finds_mistakes():
    """The comparison itself is able to fail: a result that is off by a little, or in another dtype, is caught."""
    module = randomize(mha_c.MultiheadAttention(8, 2)).eval()
    x = normal((3, 2, 8))
    output, weights = module(x, x, x)
    wrong = [(output * np.float32(1.0001), weights), (output, weights + np.float32(1e-4)), (output[:2], weights),
             (output.astype("float64"), weights), (output, None), (np.where(output > 0, np.nan, output), weights)]
    for result in wrong:
        with pytest.raises((AssertionError, AttributeError)):
            assert_matches(module, result, x, x, x)
    assert_matches(module, SimpleNamespace(result=(output, weights)).result, x, x, x)
