# SPDX-License-Identifier: Apache-2.0
"""Equal bits: what a result may not depend on, compared with np.array_equal.

The number of threads, the size of the batch, the place of an item in it, how far an item was padded, strides, whether
weights are asked for, and which instruction set with FMA computed it. Promised for finite inputs.
"""

import copy
import hashlib
import itertools

import numpy as np
import pytest
from helpers import causal_mask, inputs, layer, normal, run_child

mha_c = pytest.importorskip("mha_c")

# N, L, S, E, H, options. Sizes below and beyond a panel, a block of keys, a chunk of 512 keys and chains of 64
# features; one and few queries; more items than threads; every kind of layer.
SHAPES = {
    "one of each": (1, 1, 1, 1, 1, {}),
    "article": (3, 5, 5, 8, 4, {}),
    "short": (7, 17, 17, 24, 3, {}),
    "blocks": (3, 65, 129, 48, 4, {}),
    "panels": (2, 200, 200, 32, 2, {}),
    "wide": (2, 40, 70, 300, 2, {}),
    "odd": (3, 33, 67, 39, 3, {"kdim": 21, "vdim": 131}),
    "a batch in chunks": (50, 30, 33, 40, 2, {"add_zero_attn": True}),
    "few queries": (3, 2, 1100, 32, 2, {"kdim": 64, "vdim": 64}),
    "one query": (4, 1, 600, 64, 2, {}),
    "one query, one head": (5, 1, 70, 16, 1, {}),
    "few keys": (3, 300, 2, 32, 2, {}),
    "extra keys": (3, 20, 70, 32, 4, {"add_bias_kv": True, "add_zero_attn": True}),
    "few queries, extra keys": (3, 1, 700, 32, 2, {"add_bias_kv": True, "kdim": 48, "vdim": 48}),
    "no bias": (3, 20, 70, 32, 4, {"bias": False}),
    "grouped": (3, 40, 70, 32, 4, {"num_kv_heads": 2, "head_dim": 12, "v_head_dim": 20, "out_dim": 130}),
}
CASES = [pytest.param(*shape, dtype, id=f"{name}, {dtype}") for name, shape in SHAPES.items()
         for dtype in ("float32", "float64")]
every_case = pytest.mark.parametrize("n, length, s, e, h, options, dtype", CASES)


def build(e, h, options, dtype):
    return layer(e, h, batch_first=True, dtype=dtype, **options)


def given_to(n, length, s, e, options, dtype, seed=0):
    widths = {name: options[name] for name in ("kdim", "vdim") if name in options}
    return inputs(n, length, s, e, dtype=dtype, seed=seed, **widths)


def padding(n, s):
    """Each item loses other keys: none, some at the end, some here and there; never the first."""
    hidden = np.zeros((n, s), bool)
    for item in range(1, n):
        hidden[item, s - s * item // (2 * n):] = True
        hidden[item, item + 1::3 + item] = True
    hidden[:, 0] = False
    return hidden


def calls(n, length, s, h, dtype):
    """The calls that each case makes: masks of every kind, so that every path through the core is taken."""
    yield {}
    yield {"is_causal": True}
    yield {"key_padding_mask": padding(n, s)}
    bias = normal((n * h, length, s), dtype)
    bias[:, :, 1:][bias[:, :, 1:] > 1] = -np.inf
    yield {"attn_mask": bias, "key_padding_mask": np.where(padding(n, s), -np.inf, normal((n, s))).astype(dtype)}
    yield {"attn_mask": causal_mask(length, s), "key_padding_mask": padding(n, s)}


def item_of(call, item, h):
    """The same call for one item of the batch alone."""
    one = dict(call)
    if call.get("key_padding_mask") is not None:
        one["key_padding_mask"] = call["key_padding_mask"][item:item + 1]
    if call.get("attn_mask") is not None and call["attn_mask"].ndim == 3:
        one["attn_mask"] = call["attn_mask"][item * h:(item + 1) * h]
    return one


def assert_same(got, want, what=""):
    for a, b in zip(got, want):
        assert (a is None) == (b is None)
        if a is not None:
            assert np.isfinite(b).all(), "nothing is promised for these"
            np.testing.assert_array_equal(a, b, err_msg=what)


@every_case
def test_threads(n, length, s, e, h, options, dtype):
    """1 to 4 threads, also more than there are CPUs, and the same call again."""
    module, given = build(e, h, options, dtype), given_to(n, length, s, e, options, dtype)
    for call in calls(n, length, s, h, dtype):
        for weights in ({"need_weights": False}, {"average_attn_weights": True}, {"average_attn_weights": False}):
            with mha_c.num_threads(1):
                want = module(*given, **call, **weights)
            for threads in (2, 3, 4, 4):
                with mha_c.num_threads(threads):
                    assert_same(module(*given, **call, **weights), want, f"{threads} threads")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_on_a_large_call(dtype):
    """A call that is worth several threads by any measure, so that they really share it."""
    module = layer(128, 4, batch_first=True, dtype=dtype)
    given = inputs(4, 200, 260, 128, dtype=dtype)
    call = {"key_padding_mask": padding(4, 260), "average_attn_weights": True}
    with mha_c.num_threads(1):
        want = module(*given, **call)
    for threads in (2, 3, 4, 2):
        with mha_c.num_threads(threads):
            for _ in range(3):
                assert_same(module(*given, **call), want)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_at_once_and_in_a_second_pass(dtype, dropout):
    """Few threads keep the scores until they are weights; many, to whom one task for all heads would be too few, compute
    them again."""
    module = layer(96, 3, batch_first=True, dtype=dtype, dropout=dropout, dropout_seed=5)
    for length, s in [(100, 500), (7, 900)]:
        given = inputs(2, length, s, 96, dtype=dtype)
        for call in calls(2, length, s, 3, dtype):
            for average in (True, False):
                state = copy.copy(module)
                with mha_c.num_threads(1):
                    want = state(*given, **call, average_attn_weights=average)
                for threads in (2, 16):
                    state = copy.copy(module)
                    with mha_c.num_threads(threads):
                        assert_same(state(*given, **call, average_attn_weights=average), want, f"{threads} threads")


@every_case
def test_batch(n, length, s, e, h, options, dtype):
    """An item's result is the same alone, in the batch, and elsewhere in a batch of another size."""
    module, given = build(e, h, options, dtype), given_to(n, length, s, e, options, dtype)
    for call in calls(n, length, s, h, dtype):
        whole = module(*given, **call)
        for item in range(n):
            alone = module(*[x[item:item + 1] for x in given], **item_of(call, item, h))
            assert_same([x[item:item + 1] for x in whole], alone, f"item {item}")
    for repeat in (2, 5):
        many = module(*[np.concatenate([x[::-1]] * repeat) for x in given])
        once = module(*given)
        for got, want in zip(many, once):
            np.testing.assert_array_equal(got, np.concatenate([want[::-1]] * repeat))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1, "out_dim": 53}, {"dropout": 0.3, "add_bias_kv": True}],
                         ids=["plain", "grouped", "dropout"])
def test_chunks(options, batch_first, dtype):
    """The items of a large batch go through all steps some after others, unless out= lies over an input."""
    n, length, e, h = 130, 24, 32, 4
    module = layer(e, h, batch_first=batch_first, dtype=dtype, training="dropout" in options, dropout_seed=3, **options)
    x = normal((n, length, e) if batch_first else (length, n, e), dtype)
    shape = (*x.shape[:2], module.out_dim)

    def over_its_input(call):
        """The input is written backwards and begins after the output, which it meets all the same."""
        memory = np.empty(2 * e + max(x.size, np.prod(shape)), dtype)
        copied = memory[2 * e:2 * e + x.size].reshape(x.shape)[::-1, ::-1]
        copied[...] = x
        return copy.copy(module)(copied, copied, copied, **call, out=memory[:np.prod(shape)].reshape(shape))

    for call in calls(n, length, length, h, dtype):
        for average in (True, False):
            call["average_attn_weights"] = average
            with mha_c.num_threads(1):
                want = over_its_input(call)
            for threads in (1, 2, 3):
                with mha_c.num_threads(threads):
                    assert_same(copy.copy(module)(x, x, x, **call), want, f"{threads} threads")
                    apart = np.empty(shape, dtype)[:, ::-1][:, ::-1]
                    assert_same(copy.copy(module)(x, x, x, **call, out=apart), want, f"{threads} threads, out=")


@every_case
def test_padding(n, length, s, e, h, options, dtype):
    """Keys that were added to an item and then masked change nothing, wherever they stand and whatever is in them."""
    module = build(e, h, options, dtype)
    query, key, value = given_to(n, length, s, e, options, dtype)
    for need_weights in (False, True):
        want = module(query, key, value, need_weights=need_weights)
        for more in (1, 3, 64, 600):
            room = np.full((n, s + more, 1), np.nan, dtype)
            for kept in (np.arange(s), np.arange(s) + more, np.sort(np.random.default_rng(more).permutation(
                    s + more)[:s])):
                padded = [np.repeat(room, x.shape[2], axis=2) for x in (key, value)]
                for target, source in zip(padded, (key, value)):
                    target[:, kept] = source
                mask = np.ones((n, s + more), bool)
                mask[:, kept] = False
                for kind in (mask, np.where(mask, -np.inf, 0).astype(dtype)):
                    got = module(query, *padded, key_padding_mask=kind, need_weights=need_weights)
                    np.testing.assert_array_equal(got[0], want[0], err_msg=f"{more} more keys")
                    if need_weights:
                        extra = got[1].shape[2] - (s + more)
                        columns = [*kept, *range(s + more, s + more + extra)]
                        np.testing.assert_array_equal(got[1][:, :, columns], want[1])
                        hidden = np.delete(got[1], columns, axis=2)
                        assert (hidden == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_padding_under_other_masks(dtype):
    """The same with a causal mask, an attn_mask and both: what counts is the keys' own place in the item."""
    n, length, s, e, h = 2, 40, 100, 16, 2
    module = layer(e, h, batch_first=True, dtype=dtype)
    query, key, value = inputs(n, length, s, e, dtype=dtype)
    bias = normal((n * h, length, s), dtype)
    bias[bias > 1] = -np.inf
    bias[:, :, 0] = 0
    for call in ({"is_causal": True}, {"attn_mask": bias}, {"attn_mask": np.isinf(bias), "is_causal": True}):
        want = module(query, key, value, **call)
        for more in (1, 100):
            padded = [np.concatenate([x, np.full((n, more, e), np.nan, dtype)], axis=1) for x in (key, value)]
            longer = dict(call)
            if "attn_mask" in call:
                longer["attn_mask"] = np.concatenate(
                    [call["attn_mask"], np.zeros((n * h, length, more), call["attn_mask"].dtype)], axis=2)
            got = module(query, *padded, key_padding_mask=np.tile(np.arange(s + more) >= s, (n, 1)), **longer)
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1][:, :, :s], want[1])


@every_case
def test_need_weights(n, length, s, e, h, options, dtype):
    """The output does not depend on whether weights are asked for, nor in which form; nor on where it is put. The
    average is that of the heads, in their order."""
    module, given = build(e, h, options, dtype), given_to(n, length, s, e, options, dtype)
    for call in calls(n, length, s, h, dtype):
        output, none = module(*given, **call, need_weights=False)
        averaged = module(*given, **call)
        per_head = module(*given, **call, average_attn_weights=False)
        assert none is None
        assert_same(averaged[:1], [output])
        assert_same(per_head[:1], [output])
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(averaged[1], per_head[1].mean(axis=1), rtol=h * eps, atol=np.finfo(dtype).tiny)
        out = np.empty_like(output)
        assert_same(module(*given, **call, need_weights=False, out=out)[:1], [output])


@every_case
def test_memory(n, length, s, e, h, options, dtype):
    """Strides, alignment and byte order are no part of the numbers; nor whether inputs are one array or three."""
    module, given = build(e, h, options, dtype), given_to(n, length, s, e, options, dtype)
    want = module(*given)
    shifted = []
    for x in given:
        raw = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        raw[...] = x
        shifted.append(raw)
    assert_same(module(*shifted), want)
    assert_same(module(*[np.asfortranarray(x) for x in given]), want)
    assert_same(module(*[x.astype(x.dtype.newbyteorder()) for x in given]), want)
    seq_first = layer(e, h, dtype=dtype, **options)
    got = seq_first(*[x.swapaxes(0, 1) for x in given])
    assert_same([got[0].swapaxes(0, 1), got[1]], want)
    if n == 1:
        got = module(*[x[0] for x in given])
        assert_same([x[None] for x in got], want)
    if given[1].shape == given[2].shape:
        assert_same(module(given[0], given[1], given[1]), module(given[0], given[1], given[1].copy()))
        if length == s and given[0].shape == given[1].shape:
            x = given[0]
            assert_same(module(x, x, x), module(x, x.copy(), x.copy()))


def test_broadcast_mask_is_the_written_mask():
    """A 2-D mask, its 3-D repetition and a zero-stride one are the same mask."""
    module = layer(32, 4, batch_first=True)
    given = inputs(3, 50, 130, 32)
    mask = normal((50, 130))
    want = module(*given, attn_mask=mask)
    assert_same(module(*given, attn_mask=np.broadcast_to(mask, (12, 50, 130))), want)
    assert_same(module(*given, attn_mask=np.tile(mask, (12, 1, 1))), want)
    hidden = mask > 1
    assert_same(module(*given, attn_mask=hidden), module(*given, attn_mask=np.where(hidden, -np.inf, 0.0)))


# ------------------------------------------------------------------------------------------- instruction sets

LEVELS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon", "neon_dotprod")
WITH_FMA = LEVELS[1:]


def skip_unless_supported(*levels):
    supported = mha_c._core.config()["cpu_levels"]
    for level in levels:
        if level not in supported:
            pytest.skip(f"this CPU or this build lacks {level}: it has {', '.join(supported)}")


def digest():
    """One hash over the results of every case. Called in child processes too."""
    total = hashlib.sha256()
    for (n, length, s, e, h, options), dtype in itertools.product(SHAPES.values(), ("float32", "float64")):
        module, given = build(e, h, options, dtype), given_to(n, length, s, e, options, dtype)
        for call in calls(n, length, s, h, dtype):
            for result in module(*given, **call):
                total.update(np.ascontiguousarray(result).tobytes())
    return total.hexdigest()


def assert_agrees(level, digest):
    """A file's digest() is the same in a child process that uses another instruction set, if it has FMA as this one."""
    skip_unless_supported(level)
    if mha_c._core.config()["cpu_level"] == "portable":
        pytest.skip("the kernels in use, portable, have no FMA")
    file = digest.__module__.rpartition(".")[2]
    child = run_child(f"import {file}; print({file}.digest())", env={"MHA_C_CPU": level})
    assert child.stdout.strip() == digest()


@pytest.mark.parametrize("level", WITH_FMA)
def test_instruction_sets_with_fma_agree(level):
    """Not a bit differs between instruction sets that have FMA: a machine with another CPU gives the same answer."""
    assert_agrees(level, digest)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_is_right(level):
    """Each level that this CPU has computes every case correctly."""
    skip_unless_supported(level)
    run_child("""
        import itertools, mha_c, test_reproducibility as t
        from helpers import assert_matches
        for (n, length, s, e, h, options), dtype in itertools.product(t.SHAPES.values(), ("float32", "float64")):
            if length * s * e > (2_000_000 if dtype == "float32" else 20_000):
                continue  # the reference is slow
            module, given = t.build(e, h, options, dtype), t.given_to(n, length, s, e, options, dtype)
            for call in t.calls(n, length, s, h, dtype):
                call["average_attn_weights"] = False
                assert_matches(module, module(*given, **call), *given, **call)
        """ + f"assert mha_c._core.config()['cpu_level'] == {level!r}", env={"MHA_C_CPU": level})


def test_unknown_instruction_set():
    """A name that is no instruction set is an error at import that says which there are."""
    for name in ("sse9", "AVX2 ", "avx2,portable"):
        child = run_child("import mha_c", env={"MHA_C_CPU": name}, check=False)
        assert child.returncode == 1
        assert "ImportError" in child.stderr and "MHA_C_CPU" in child.stderr and "Traceback" in child.stderr


@pytest.mark.parametrize("level", LEVELS)
def test_missing_instruction_set(level):
    """Asking for an instruction set that this CPU lacks is refused, not tried."""
    if level in mha_c._core.config()["cpu_levels"]:
        pytest.skip(f"this CPU has {level}")
    child = run_child("import mha_c", env={"MHA_C_CPU": level}, check=False)
    assert child.returncode == 1 and "MHA_C_CPU" in child.stderr
