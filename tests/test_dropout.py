# SPDX-License-Identifier: Apache-2.0
"""Dropout: torch's distribution and scaling, from a counted stream that nothing but its seed and the calls moves."""

import copy
import pickle

import numpy as np
import pytest
import reference
from helpers import assert_matches, call_torch, inputs, layer, normal, torch_twin

mha_c = pytest.importorskip("mha_c")

SHAPE = (4, 60, 90, 16)  # N, L, S, E: 86,400 weights with 4 heads


def training(p, *, dropout_seed=5, h=4, **options):
    """A layer in training mode, always with the same parameters."""
    return layer(16, h, batch_first=True, dropout=p, dropout_seed=dropout_seed, training=True, **options)


def without_dropout(module, *given, **call):
    """What the same layer gives when it evaluates."""
    quiet = copy.deepcopy(module).eval()
    return quiet(*given, **call)


def kept(module, given, **call):
    """The weights with dropout, and where they are not dropped, (N, H, L, S')."""
    weights = module(*given, average_attn_weights=False, **call)[1]
    return weights, weights != 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_distribution(p, dtype):
    """Each weight is dropped with probability p, independently of all others and of its size; torch's random numbers
    are its own (they differ between machines), but not their distribution."""
    module = training(p, dtype=dtype)
    given = inputs(*SHAPE, dtype=dtype)
    _, mask = kept(module, given)
    sigma = np.sqrt(p * (1 - p))
    assert abs(mask.mean() - (1 - p)) < 4 * sigma / np.sqrt(mask.size)
    for axis in range(4):  # along every axis: no item, head, row or column differs, and neighbours are independent
        others = tuple(a for a in range(4) if a != axis)
        z = (mask.mean(axis=others) - (1 - p)) / (sigma / np.sqrt(mask.size / mask.shape[axis]))
        assert np.abs(z).max() < 4.8
        x = np.moveaxis(mask - (1 - p), axis, 0) / sigma
        for lag in range(1, min(9, len(x))):  # numbers are drawn four at a time
            assert abs((x[lag:] * x[:-lag]).mean()) < 4.8 / np.sqrt(x[lag:].size)
    plain = without_dropout(module, *given, average_attn_weights=False)[1]
    large = plain > np.median(plain)
    assert abs(mask[large].mean() - mask[~large].mean()) < 4.8 * sigma / np.sqrt(mask.size / 4)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_distribution_is_torchs(p):
    """The share of dropped weights in rows, in torch and here: the same mean and the same spread."""
    pytest.importorskip("torch")
    module = training(p)
    given = inputs(*SHAPE)
    ours = kept(module, given)[1].sum(-1).ravel()
    theirs = (call_torch(torch_twin(module), *given, average_attn_weights=False)[1] != 0).sum(-1).ravel()
    spread = np.sqrt(SHAPE[2] * p * (1 - p))
    assert abs(ours.mean() - theirs.mean()) < 5 * spread * np.sqrt(2 / ours.size)
    assert 0.9 < ours.std() / theirs.std() < 1.1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_scaling(p, dtype):
    """What is not dropped is divided by 1 - p."""
    module = training(p, dtype=dtype)
    given = inputs(*SHAPE, dtype=dtype)
    weights, mask = kept(module, given)
    plain = without_dropout(module, *given, average_attn_weights=False)[1]
    np.testing.assert_allclose(weights[mask], plain[mask] / (1 - p), rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"num_kv_heads": 2}], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7, 16), (2, 40, 150, 16), (3, 1, 700, 16)], ids=str)
def test_output_belongs_to_the_weights(shape, options):
    """The weights returned are those that made the output, dropped and scaled, in torch's way; also of the keys that
    the layer adds, and after masks."""
    module = training(0.3, **options)
    given = inputs(*shape)
    n, length, s, _ = shape
    grouped = options.get("num_kv_heads")
    for call in ({}, {"is_causal": True}, {"key_padding_mask": np.arange(s) >= np.array([[s - i] for i in range(n)])}):
        output, weights = module(*given, average_attn_weights=False, **call)
        want = reference.attention_output(module.state_dict(), 4, weights.astype("float64"), given[2], grouped,
                                          module.add_zero_attn)
        np.testing.assert_allclose(output, want, rtol=1e-5, atol=1e-5)


def test_averaged_weights():
    """Averaged after dropout, as in torch."""
    first, second = training(0.5), training(0.5)
    given = inputs(*SHAPE)
    per_head = first(*given, average_attn_weights=False)
    averaged = second(*given)
    np.testing.assert_array_equal(averaged[0], per_head[0])
    np.testing.assert_allclose(averaged[1], per_head[1].mean(axis=1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_but_the_seed_and_the_calls_counts(dtype):
    """The k-th call drops the same weights whatever is asked for, with any number of threads and in any memory."""
    given = inputs(*SHAPE, dtype=dtype)
    modules = [training(0.4, dtype=dtype) for _ in range(6)]
    for _ in range(3):
        output = modules[0](*given, average_attn_weights=False)[0]
        np.testing.assert_array_equal(modules[1](*given)[0], output)
        np.testing.assert_array_equal(modules[2](*given, need_weights=False)[0], output)
        for module, threads in ((modules[3], 1), (modules[4], 4)):
            with mha_c.num_threads(threads):
                np.testing.assert_array_equal(module(*given, need_weights=False)[0], output)
        np.testing.assert_array_equal(modules[5](*[np.asfortranarray(x) for x in given])[0], output)


def test_one_query_and_its_chunks():
    """The same for few queries, where keys are computed in another order."""
    given = inputs(2, 1, 1200, 16)
    modules = [training(0.4) for _ in range(3)]
    output, weights = modules[0](*given, average_attn_weights=False)
    np.testing.assert_array_equal(modules[1](*given, need_weights=False)[0], output)
    with mha_c.num_threads(4):
        np.testing.assert_array_equal(modules[2](*given, need_weights=False)[0], output)
    assert abs((weights != 0).mean() - 0.6) < 4 * np.sqrt(0.24 / weights.size)


def test_seeds():
    """The same seed starts the same stream; another seed, another call and a random seed another one."""
    given = inputs(2, 20, 30, 16)
    first, again, other = training(0.5), training(0.5), training(0.5, dropout_seed=6)
    stream = [kept(first, given)[1] for _ in range(4)]
    for mask in stream:
        np.testing.assert_array_equal(kept(again, given)[1], mask)
    masks = [*stream, kept(other, given)[1], kept(training(0.5, dropout_seed=None), given)[1],
             kept(training(0.5, dropout_seed=None), given)[1]]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).mean() - 0.5) < 5 * 0.5 / np.sqrt(a.size), "two streams are related"


def test_items_and_heads_differ():
    """Equal items and heads do not drop the same weights."""
    x = np.repeat(normal((1, 40, 16)), 3, axis=0)
    _, mask = kept(training(0.5), (x, x, x))
    flat = mask.reshape(12, -1)
    for i in range(12):
        for j in range(i):
            assert abs((flat[i] == flat[j]).mean() - 0.5) < 5 * 0.5 / np.sqrt(flat[i].size)


@pytest.mark.parametrize("p", [0.0, -0.0, -0.5, -7.0])
def test_no_dropout(p):
    """0 drops nothing, and so, silently, does anything below 0 (as in torch)."""
    module = training(p)
    given = inputs(2, 5, 70, 16)
    for call in ({}, {"need_weights": False}):
        got = module(*given, **call)
        want = without_dropout(module, *given, **call)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_zero_attn": True}], ids=str)
def test_everything_dropped(options):
    """p = 1: every weight is 0 and the output is its bias."""
    pytest.importorskip("torch")
    module = training(1.0, **options)
    given = inputs(2, 5, 70, 16)
    output, weights = module(*given)
    assert (weights == 0).all()
    theirs = call_torch(torch_twin(module), *given)
    np.testing.assert_array_equal(output, theirs[0])
    np.testing.assert_array_equal(module(*given, need_weights=False)[0], theirs[0])


@pytest.mark.parametrize("p", [1.5, 2.0, np.nextafter(1, 2), np.inf])
def test_more_than_everything(p):
    """Above 1: torch's types, when called (the constructor takes anything), and only in training mode."""
    torch = pytest.importorskip("torch")
    module = training(p)
    given = inputs(2, 5, 7, 16)
    twin = torch_twin(module)
    for call in ({}, {"need_weights": False}):
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            twin(*map(torch.from_numpy, given), **call)
        with pytest.raises(theirs.type, match="dropout probability has to be between 0 and 1, but got"):
            module(*given, **call)
    module.eval()
    assert_matches(module, module(*given), *given)


def test_evaluation_is_untouched():
    """eval() computes as if there were no dropout, and does not move the stream."""
    module, other = training(0.5), training(0.5)
    given = inputs(2, 20, 30, 16)
    first = module(*given)[0]
    module.eval()
    for _ in range(3):
        assert_matches(module, module(*given), *given)
    module.train()
    np.testing.assert_array_equal(other(*given)[0], first)
    np.testing.assert_array_equal(module(*given)[0], other(*given)[0])


def test_pickled_layers_continue_the_stream():
    """The state of the stream is part of the layer."""
    module = training(0.5)
    given = inputs(2, 20, 30, 16)
    module(*given)
    module(*given)
    twin = pickle.loads(pickle.dumps(module))
    for _ in range(3):
        np.testing.assert_array_equal(twin(*given)[0], module(*given)[0])


def test_deep_copies_have_streams_of_their_own():
    """As the layers of a stack need them. They are the same ones whenever the original's seed and history are."""
    given = inputs(2, 20, 30, 16)
    masks = []
    for _ in range(2):
        module = training(0.5)
        copies = [copy.deepcopy(module) for _ in range(3)]
        copies.append(copy.deepcopy(copies[0]))
        masks.append([kept(one, given)[1] for one in (module, *copies)])
    np.testing.assert_array_equal(masks[0], masks[1])
    for i, mask in enumerate(masks[0]):
        for other in masks[0][:i]:  # independent: equal in half of the places
            assert abs((mask == other).mean() - 0.5) < 0.05


def test_masked_rows_under_dropout():
    """A row without keys stays what masked_rows says; hidden keys stay hidden."""
    hidden = np.random.default_rng(0).random((20, 30)) < 0.5
    hidden[3] = True
    given = inputs(2, 20, 30, 16)
    output, weights = training(0.5, masked_rows="zero")(*given, attn_mask=hidden, average_attn_weights=False)
    assert (weights[:, :, hidden] == 0).all() and np.isfinite(output).all()
    output, weights = training(0.5)(*given, attn_mask=hidden, average_attn_weights=False)
    assert np.isnan(output[:, 3]).all() and np.isnan(output).sum() == output[:, 3].size
    assert np.isnan(weights[:, :, 3]).any()


def test_padding_does_not_move_the_stream():
    """Which weights are dropped depends on a key's own place in the item, not on how many were removed before it."""
    given = inputs(2, 20, 90, 16)
    first, second = training(0.5), training(0.5)
    _, plain = kept(first, given)
    mask = np.zeros((2, 90), bool)
    mask[:, 3:40:2] = True
    _, padded = kept(second, given, key_padding_mask=mask)
    np.testing.assert_array_equal(padded[..., ~mask[0]], plain[..., ~mask[0]])
