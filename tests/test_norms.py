# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and RMSNorm, and the functions layer_norm and rms_norm: torch is the judge.

tests/c/test_norm.c holds the kernel to its order of additions.
"""

import copy
import gc
import hashlib
import inspect
import itertools
import math
import pickle
import re
import sys
import threading
import warnings

import numpy as np
import pytest
from helpers import bits, normal, outcome, run_child, to_torch, torch_words
from test_reproducibility import LEVELS, WITH_FMA, assert_agrees, skip_unless_supported

mha_c = pytest.importorskip("mha_c")
torch = pytest.importorskip("torch")
functional = pytest.importorskip("mha_c.functional")

DTYPES = ("float32", "float64")
KINDS = ("LayerNorm", "RMSNorm")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def make(kind, shape, *, seed=0, **options):
    """A layer of ours with random parameters."""
    module = getattr(mha_c, kind)(shape, **options)
    module.load_state_dict({name: normal(array.shape, array.dtype, seed + i + 1)
                            for i, (name, array) in enumerate(module.state_dict().items())})
    return module


def call_torch(module, x):
    """What torch's layer with the same parameters makes of an array."""
    with torch.no_grad():
        return mha_c.torch.to_torch(module)(to_torch(x)).numpy()


def definition(module, x, wide):
    """The formula in a wider type; what one rounding error can do to each number; and how far its mean is from zero."""
    shape = module.normalized_shape
    rows = x.astype(wide).reshape(*x.shape[:x.ndim - len(shape)], math.prod(shape))
    is_rms = isinstance(module, mha_c.RMSNorm)
    first = 0 if is_rms else rows[..., :1]  # from where the mean is taken, since a sum of large numbers is rounded
    mean = 0 if is_rms else (rows - first).mean(-1, keepdims=True)
    root = np.sqrt(np.square(rows - first - mean).mean(-1, keepdims=True) + wide(epsilon_of(module)))
    result = ((rows - first - mean) / root).reshape(x.shape)
    far = np.broadcast_to(np.abs(first + mean) / root, rows.shape).reshape(x.shape)
    weight, bias = (None if is_rms and name == "bias" else getattr(module, name) for name in ("weight", "bias"))
    weight = np.ones((), wide) if weight is None else weight.astype(wide)
    bias = np.zeros((), wide) if bias is None else bias.astype(wide)
    return result * weight + bias, (1 + np.abs(result)) * np.abs(weight) + np.abs(bias), far * np.abs(weight)


def epsilon_of(module):
    return np.finfo(module.weight.dtype).eps if module.eps is None else module.eps


def assert_right(module, x):
    """Ours is within a few roundings of the definition. torch's may be further off where a mean is far from zero."""
    got, theirs = module(x), call_torch(module, x)
    assert isinstance(got, np.ndarray) and got.dtype == x.dtype and got.shape == x.shape and got.flags.c_contiguous
    with np.errstate(all="ignore"):
        want, scale, far = definition(module, x, np.float64 if x.dtype == np.float32 else np.longdouble)
        eps = np.finfo(x.dtype).eps
        assert (np.abs(got - want) <= 5 * eps * scale).all()
        assert (np.abs(theirs - want) <= 8 * eps * (scale + 2 * far)).all()


# ---------------------------------------------------------------------------------------------- numbers


try:
    from hypothesis import given, settings, strategies as st
except ImportError:
    pass
else:
    @settings(max_examples=150)
    @given(data=st.data())
    def test_like_torch(data):
        """Any shapes, options and numbers of a usual size."""
        kind, dtype = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(DTYPES))
        shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
        lead = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3)))
        options = {"elementwise_affine": data.draw(st.booleans()), "dtype": dtype}
        if kind == "LayerNorm":
            options["bias"] = data.draw(st.booleans())
        eps = data.draw(st.sampled_from([1e-5, 1e-12, 0.5] + [None] * (kind == "RMSNorm")))
        module = make(kind, shape, eps=eps, seed=data.draw(st.integers(0, 5)), **options)
        center = data.draw(st.sampled_from([0, 1, -30, 1000]))
        x = (normal(lead + shape, "float64", 9) * data.draw(st.sampled_from([1, 1e-3, 100])) + center).astype(dtype)
        if eps is None and not options["elementwise_affine"]:
            module.eps = float(np.finfo(dtype).eps)  # which is the default, and known to definition()
        assert_right(module, x)


@every_dtype
@every_kind
def test_default_epsilon(kind, dtype):
    """RMSNorm's is the machine's epsilon in the input's dtype, also without a weight."""
    x = np.full((1, 4), 1e-4, dtype)
    eps = 1e-5 if kind == "LayerNorm" else np.finfo(dtype).eps
    for affine in (True, False):
        module = getattr(mha_c, kind)(4, elementwise_affine=affine, dtype=dtype)
        explicit = getattr(mha_c, kind)(4, float(eps), affine, dtype=dtype)
        np.testing.assert_array_equal(module(x), explicit(x))
        np.testing.assert_allclose(module(x), call_torch(module, x), rtol=1e-6)


@pytest.mark.skipif(mha_c._core.config()["cpu_level"] == "portable", reason="the portable kernels have no FMA")
@every_dtype
@every_kind
def test_rms_error(kind, dtype):
    """No larger than torch's own on the same inputs, in the median over ten seeds; `-s` shows the ratios."""
    wide = np.float64 if dtype == "float32" else np.longdouble
    if np.finfo(wide).eps >= np.finfo(dtype).eps:
        pytest.skip("np.longdouble is no wider than float64 on this platform")
    for width, center in itertools.product((8, 64, 384, 768, 1024), (0, 1, 100)):
        ratios = []
        for seed in range(10):
            module = make(kind, width, eps=1e-5, dtype=dtype, seed=10 * seed)
            x = (normal((100_000 // width, width), "float64", seed) + center).astype(dtype)
            want = definition(module, x, wide)[0]
            ours, theirs = (float(np.sqrt(np.mean(np.square(y - want)))) for y in (module(x), call_torch(module, x)))
            ratios.append(ours / theirs)
        print(f"\n{kind} {dtype}, {width} features around {center}: {np.median(ratios):.3f} of torch's", end="")
        assert np.median(ratios) <= 1, (width, center)


@every_kind
def test_numbers_that_are_not_finite(kind):
    """NaN and infinity spread over their row as in torch, and over no other."""
    for dtype, width, bad in itertools.product(DTYPES, (1, 3, 8, 33, 100), (np.nan, np.inf, -np.inf)):
        module = getattr(mha_c, kind)(width, dtype=dtype)
        for at in range(0, width, 5):
            x = normal((3, width), dtype)
            x[1, at] = bad
            got, theirs = module(x), call_torch(module, x)
            np.testing.assert_array_equal(np.isnan(got), np.isnan(theirs))
            np.testing.assert_array_equal(got[1], theirs[1])
            np.testing.assert_array_equal(got[[0, 2]], module(x[[0, 2]]))


def test_squares_that_overflow():
    """Such a row is 0, or NaN if the sum of its numbers overflows, too. torch gives either."""
    x = np.array([[1e30, 1, 2, 3], [3e38, 3e38, 3e38, 3e38]], "f4")
    got = mha_c.LayerNorm(4)(x)
    assert (got[0] == 0).all() and np.isnan(got[1]).all()
    np.testing.assert_array_equal(mha_c.RMSNorm(4)(x), call_torch(mha_c.RMSNorm(4), x))


@every_dtype
def test_equal_numbers(dtype):
    """A row of one number has no variance: nothing of the rounding of its mean is left, however small eps is."""
    for width in (3, 7, 96, 1000):
        module = make("LayerNorm", width, eps=1e-12, dtype=dtype)
        x = np.repeat(np.array([[0.1], [-7e3], [0]], dtype), width, axis=1)
        np.testing.assert_allclose(module(x), np.repeat(module.bias[None], 3, axis=0), rtol=0, atol=1e-5)


def test_signed_zeros_and_strange_eps():
    """-0 stays -0; a negative eps, or 0, gives NaN where torch does."""
    x = np.array([[-0.0, 0.0, 1.0]], "f4")
    assert np.signbit(mha_c.RMSNorm(3)(x)).tolist() == [[True, False, False]]
    for kind, eps in itertools.product(KINDS, (0, 0.0, -1.0, np.nan, np.inf)):
        module = getattr(mha_c, kind)(3, eps)
        for row in (np.zeros((1, 3), "f4"), x):
            np.testing.assert_allclose(module(row), call_torch(module, row), rtol=1e-6)


# ---------------------------------------------------------------------------------------------- equal bits


CASES = list(itertools.product(KINDS, DTYPES, ((1,), (3,), (8,), (33,), (100,), (2, 3, 5), (768,), (2049,), (5000,))))


def numbers_of(dtype, shape, rows=7):
    return (normal((rows, *shape), "float64", 3) + 2).astype(dtype)


@pytest.mark.parametrize("kind, dtype, shape", CASES)
def test_rows_are_alone(kind, dtype, shape):
    """A row's bits are the same alone, in a batch, anywhere in it, and along any axes."""
    module, x = make(kind, shape, dtype=dtype), numbers_of(dtype, shape, 12)
    want = module(x)
    for row in range(len(x)):
        np.testing.assert_array_equal(module(x[row]), want[row])
        np.testing.assert_array_equal(module(x[row:row + 3][::-1]), want[row:row + 3][::-1])
    np.testing.assert_array_equal(module(x.reshape(2, 1, 3, 2, *shape)), want.reshape(2, 1, 3, 2, *shape))


@every_dtype
@every_kind
def test_threads(kind, dtype):
    """1 to 4 threads, in calls that they really share."""
    for shape, rows in (((768,), 1500), ((7,), 60_000), ((300_000,), 3), ((40, 50), 300)):
        module, x = make(kind, shape, dtype=dtype), numbers_of(dtype, shape, rows)
        with mha_c.num_threads(1):
            want = module(x)
        for threads in (2, 3, 4):
            with mha_c.num_threads(threads):
                np.testing.assert_array_equal(module(x), want)
                np.testing.assert_array_equal(module(x[::-2]), want[::-2])


@pytest.mark.parametrize("kind, dtype, shape", CASES)
def test_memory(kind, dtype, shape):
    """Strides, alignment, byte order and writability are no part of the numbers, and the input is left as it is."""
    module, x = make(kind, shape, dtype=dtype), numbers_of(dtype, shape)
    want, before = module(x), x.copy()
    shifted = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    wider = np.full((7, 3, *(2 * size for size in shape)), np.nan, dtype)
    view = wider[(slice(None), 1, *(slice(0, size) for size in shape))]
    view[...] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    forms = [shifted, np.asfortranarray(x), x.astype(x.dtype.newbyteorder()), view, frozen, memoryview(x), to_torch(x),
             np.ascontiguousarray(x[::-1])[::-1], np.flip(np.ascontiguousarray(np.flip(x))),
             x.view(type("Sub", (np.ndarray,), {}))]
    for form in forms:
        kept = np.asarray(form).copy()
        np.testing.assert_array_equal(module(form), want)
        np.testing.assert_array_equal(np.asarray(form), kept)
    np.testing.assert_array_equal(x, before)
    repeated = np.broadcast_to(x[:1], x.shape)
    np.testing.assert_array_equal(module(repeated), np.broadcast_to(want[:1], x.shape))


def test_parameters_in_any_memory():
    """Those of the functions, too."""
    x, weight, bias = normal((4, 6)), normal((12,))[::2], normal((6,)).astype(">f4")
    want = functional.layer_norm(x, [6], weight.copy(), bias.astype("f4"))
    np.testing.assert_array_equal(functional.layer_norm(x, (6,), weight, bias), want)
    np.testing.assert_array_equal(functional.rms_norm(x, (6,), weight), functional.rms_norm(x, (6,), weight.copy()))


def digest():
    """One hash over the results of every case. Called in child processes too."""
    total = hashlib.sha256()
    for kind, dtype, shape in CASES:
        total.update(make(kind, shape, dtype=dtype)(numbers_of(dtype, shape)).tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("level", WITH_FMA)
def test_instruction_sets_with_fma_agree(level):
    assert_agrees(level, digest)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_is_right(level):
    skip_unless_supported(level)
    run_child("""
        import test_norms as t
        for kind, dtype, shape in t.CASES:
            t.assert_right(t.make(kind, shape, dtype=dtype), t.numbers_of(dtype, shape))
        """ + f"assert t.mha_c._core.config()['cpu_level'] == {level!r}", env={"MHA_C_CPU": level})


# ---------------------------------------------------------------------------------------------- layers


@every_kind
def test_signatures(kind):
    """torch's, in its order and with its defaults; and what torch.nn.Module gives a layer."""
    ours, theirs = getattr(mha_c, kind), getattr(torch.nn, kind)
    for method in ("__init__", "forward"):
        own, torchs = (inspect.signature(getattr(one, method)).parameters.values() for one in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in own] == [(p.name, p.default, p.kind) for p in torchs]
    for name in ("layer_norm", "rms_norm"):
        own, torchs = (inspect.signature(getattr(one, name)).parameters.values()
                       for one in (functional, torch.nn.functional))
        assert [(p.name, p.default) for p in own] == [(p.name, p.default) for p in torchs]


CONSTRUCTORS = [
    ("LayerNorm", (8,), {}), ("LayerNorm", ((2, 8),), {}), ("LayerNorm", ([2, 8], 1e-12), {}), ("LayerNorm", (0,), {}),
    ("LayerNorm", (8, 1e-6, True, False), {}), ("LayerNorm", (8,), {"elementwise_affine": False}),
    ("LayerNorm", ((),), {}),
    ("LayerNorm", (3, 0.0), {}), ("LayerNorm", (8,), {"bias": False, "elementwise_affine": False}),
    ("RMSNorm", (8,), {}), ("RMSNorm", ((2, 8), 1e-6), {}), ("RMSNorm", (8, None, False), {}),
    ("RMSNorm", (torch.Size([3]),), {}),
]


@every_dtype
@pytest.mark.parametrize("kind, arguments, options", CONSTRUCTORS)
def test_attributes(kind, arguments, options, dtype):
    """Those of torch, with its initial parameters, state dict and line of text."""
    ours = getattr(mha_c, kind)(*arguments, **options, dtype=dtype)
    theirs = getattr(torch.nn, kind)(*arguments, **options, dtype=getattr(torch, dtype))
    assert repr(ours) == repr(theirs)
    for name in ("normalized_shape", "eps", "elementwise_affine", "training"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert bits(ours.state_dict()) == bits({name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    for name in ("weight", "bias"):
        assert hasattr(ours, name) == hasattr(theirs, name)
        assert (getattr(ours, name, None) is None) == (getattr(theirs, name, None) is None)
    assert list(ours.state_dict(prefix="a.")) == list(theirs.state_dict(prefix="a."))
    assert ours.eval() is ours and not ours.training and ours.train().training
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        ours.train(1)


REFUSED = [
    ("LayerNorm", (2.0,), {}), ("LayerNorm", ("a",), {}), ("LayerNorm", (True,), {}), ("LayerNorm", ((2.0, 3),), {}),
    ("LayerNorm", (-1,), {}), ("RMSNorm", ((3, -2),), {}), ("RMSNorm", (None,), {}), ("RMSNorm", (), {}),
    ("LayerNorm", (8,), {"dtype": "int32"}),
]


@pytest.mark.parametrize("kind, arguments, options", REFUSED)
def test_refused_constructors(kind, arguments, options):
    ours = outcome(lambda: getattr(mha_c, kind)(*arguments, **options)).error
    if "dtype" in options:
        options = {"dtype": getattr(torch, options["dtype"])}
    theirs = outcome(lambda: getattr(torch.nn, kind)(*arguments, **options)).error
    assert type(ours) is type(theirs)
    assert str(theirs).replace(f"{kind}.__init__", "__init__") in str(ours).replace(f"{kind}.__init__", "__init__")


def test_refusals_of_our_own():
    with pytest.raises(TypeError, match=r"^eps must be a number, but got 'a'$"):
        mha_c.LayerNorm(8, "a")
    with pytest.raises(TypeError, match="eps must be a number, but got None"):
        mha_c.LayerNorm(8).eps = None
    for shape in (8.0, None):
        with pytest.raises(TypeError, match="object is not iterable: normalized_shape must be an int or several$"):
            mha_c.LayerNorm(shape)
    with pytest.raises(RuntimeError, match='device must be None or "cpu"'):
        mha_c.LayerNorm(8, device="cuda")
    with pytest.raises(TypeError, match="dtype must be float32, float64, bfloat16 or float16"):
        mha_c.RMSNorm(8, dtype="complex64")
    with pytest.raises(MemoryError, match="the parameters would take"):
        mha_c.LayerNorm((2**40, 2**40))
    words = "Write normalized_shape=8 instead of hidden_size=8, eps=1e-12 instead of epsilon=1e-12"
    with pytest.raises(TypeError, match=words):
        mha_c.LayerNorm(hidden_size=8, epsilon=1e-12)
    assert mha_c.LayerNorm(np.int64(3), 0).normalized_shape == (3,)
    with pytest.raises(AttributeError):
        mha_c.LayerNorm(8).normalized_shape = (3,)
    with pytest.raises(AttributeError, match="this layer has no bias: it has weight"):
        mha_c.LayerNorm(8, bias=False).bias = np.zeros(8)


def test_parameters_are_immutable():
    """What is handed out cannot be written to; assigning replaces all, casts, and keeps a copy."""
    module, x = mha_c.LayerNorm(4), normal((3, 4))
    before = module(x)
    with pytest.raises(ValueError, match="read-only"):
        module.weight[0] = 3
    with pytest.raises(ValueError):
        module.weight.flags.writeable = True
    given = np.arange(4.0)
    module.weight = given
    assert module.weight.dtype == np.float32 and module.weight.tolist() == [0, 1, 2, 3]
    given[:] = 9
    np.testing.assert_array_equal(module(x), functional.layer_norm(x, (4,), np.arange(4, dtype="f4"), module.bias))
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), but got an array of shape \(3,\)"):
        module.weight = np.ones(3)
    module.weight = torch.ones(4)
    np.testing.assert_array_equal(module(x), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module.weight.shape = (2, 2)  # of an array that was handed out, not of the layer's own
    np.testing.assert_array_equal(module(x), before)


def test_casts():
    module, x = make("LayerNorm", 5), normal((2, 5))
    assert module.double() is module and module.weight.dtype == np.float64
    np.testing.assert_allclose(module(x.astype("f8")), module.float()(x), rtol=1e-5, atol=1e-6)
    assert module.to("cpu", "float64").bias.dtype == np.float64
    with pytest.raises(TypeError, match="complex64"):
        module.to("complex64")
    assert [name for name, _ in module.named_parameters("norm")] == ["norm.weight", "norm.bias"]
    assert sum(array.size for array in module.parameters()) == 10
    assert module.requires_grad_(False) is module


STATES = [
    {"weight": 4, "x": 3}, {}, {"weight": 3}, {"weight": 3, "bias": 3}, {"bias": 3}, {"weight": 3, "bias": 4, "out": 1},
]


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("strict", [True, False])
@every_kind
def test_load_state_dict(kind, strict, state):
    """torch's errors, word for word, and its answer; nothing changes if there is an error."""
    ours, theirs = make(kind, 3), getattr(torch.nn, kind)(3)
    before = bits(ours.state_dict())
    arrays = {name: normal((size,)) for name, size in state.items()}
    mine = outcome(lambda: ours.load_state_dict(arrays, strict))
    torchs = outcome(lambda: theirs.load_state_dict({name: to_torch(array) for name, array in arrays.items()}, strict))
    assert type(mine.error) is type(torchs.error)
    if mine.error:
        assert str(mine.error) == torch_words(torchs.error)
        assert bits(ours.state_dict()) == before
    else:
        assert repr(mine.result) == repr(torchs.result)
        for name in set(arrays) & set(ours.state_dict()):
            np.testing.assert_array_equal(getattr(ours, name), arrays[name])


@pytest.mark.parametrize("kind, arguments, options", CONSTRUCTORS)
@every_dtype
def test_both_ways(kind, arguments, options, dtype):
    """from_torch and to_torch, with arguments, parameters and mode; torch's state dict, and ours in torch."""
    ours = make(kind, *arguments, **options, dtype=dtype).eval() if len(arguments) < 2 else getattr(mha_c, kind)(
        *arguments, **options, dtype=dtype).eval()
    theirs = mha_c.torch.to_torch(ours)
    back = getattr(mha_c, kind).from_torch(theirs)
    assert repr(back) == repr(theirs) == repr(ours) and not back.training and not theirs.training
    assert bits(back.state_dict()) == bits(ours.state_dict())
    assert repr(theirs.load_state_dict(mha_c.torch.state_dict(ours))) == "<All keys matched successfully>"
    assert repr(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    assert bits(mha_c.torch.from_torch(theirs, getattr(mha_c, kind)).state_dict()) == bits(ours.state_dict())


def test_from_torch_refuses_others():
    class Shifted(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    for module, words in [(torch.nn.Linear(3, 3), "takes a torch.nn.LayerNorm, but got torch.nn.modules.linear.Linear"),
                          (torch.nn.RMSNorm(3), "but got torch.nn.modules.normalization.RMSNorm"),
                          (Shifted(3), "this Shifted overrides forward"), (3, "but got builtins.int"),
                          (model, "It holds 1: pass that layer")]:
        with pytest.raises(TypeError, match=re.escape(words)):
            mha_c.LayerNorm.from_torch(module)
    half = mha_c.LayerNorm.from_torch(torch.nn.LayerNorm(3).half())
    assert half.weight.dtype == np.float16
    assert mha_c.RMSNorm.from_torch(torch.nn.RMSNorm(3, dtype=torch.float64)).weight.dtype == np.float64


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@every_kind
def test_copies(kind, protocol):
    """Pickles and copies have all that a layer has, and are layers of their own."""
    module, x = make(kind, (2, 3), eps=1e-3, dtype="float64").eval(), normal((4, 2, 3), "float64")
    for other in (pickle.loads(pickle.dumps(module, protocol)), copy.copy(module), copy.deepcopy(module)):
        assert repr(other) == repr(module) and not other.training
        np.testing.assert_array_equal(other(x), module(x))
        other.weight = np.zeros((2, 3))
        assert module.weight.any()


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize("kind, arguments, options", CONSTRUCTORS)
def test_files(kind, arguments, options, ending, tmp_path):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"norm.{ending}"
    module = getattr(mha_c, kind)(*arguments, **options, dtype="float64").eval()
    module.save(path)
    loaded = getattr(mha_c, kind).load(path)
    assert repr(loaded) == repr(module) and not loaded.training
    assert bits(loaded.state_dict()) == bits(module.state_dict())
    other = {"LayerNorm": mha_c.RMSNorm, "RMSNorm": mha_c.LayerNorm}[kind]
    with pytest.raises(ValueError, match=rf"norm\.{ending} holds a {kind}, not a \w+: use mha_c\.{kind}\.load$"):
        other.load(path)


def test_files_that_hold_no_norm(tmp_path):
    mha_c.MultiheadAttention(8, 2).save(tmp_path / "attention.npz")
    np.savez(tmp_path / "plain.npz", weight=np.ones(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "attention.npz").read_bytes()[:50])
    refused = {"attention": "use mha_c.MultiheadAttention.load", "plain": "not written by LayerNorm.save", "cut": "cut"}
    for name, words in refused.items():
        with pytest.raises(ValueError, match=words):
            mha_c.LayerNorm.load(tmp_path / f"{name}.npz")
    mha_c.LayerNorm(3).save(tmp_path / "norm.npz")
    with pytest.raises(ValueError, match="use mha_c.LayerNorm.load"):
        mha_c.MultiheadAttention.load(tmp_path / "norm.npz")
    with pytest.raises(ValueError, match=r"must end in .safetensors or .npz"):
        mha_c.LayerNorm(3).save(tmp_path / "norm.txt")


def test_from_state_dict(tmp_path):
    """One layer of a model, by its prefix; also under the names of TensorFlow, Keras and Flax, nested, and in files."""
    weight, bias = normal((4,)), normal((4,), seed=1)
    model = {"a.weight": weight, "a.bias": bias, "b.weight": weight.astype("f8"), "tf.gamma": weight, "tf.beta": bias,
             "flax.scale": weight, "flax.bias": bias, "odd.weight": weight, "odd.running": bias, "lone.bias": bias}
    for prefix, has_bias in (("a.", True), ("tf.", True), ("flax.", True), ("b.", False)):
        module = mha_c.LayerNorm.from_state_dict(model, prefix, eps=1e-6)
        assert repr(module) == f"LayerNorm((4,), eps=1e-06, elementwise_affine=True, bias={has_bias})"
        np.testing.assert_array_equal(module.weight, weight)
        assert not has_bias or (module.bias == bias).all()
    assert mha_c.RMSNorm.from_state_dict(model, "b.").weight.dtype == np.float64
    assert mha_c.RMSNorm.from_state_dict(model, "b.", dtype="float32").weight.dtype == np.float32
    assert mha_c.LayerNorm.from_state_dict({"model": {"a": {"weight": weight}}, "epoch": 3}, "model.a.").bias is None
    assert mha_c.LayerNorm.from_state_dict({"weight": weight, "bias": bias}).eps == 1e-5
    assert mha_c.LayerNorm.from_state_dict({"weight": weight.astype("f2")}).weight.dtype == np.float16
    torch.save({name: to_torch(array) for name, array in model.items()}, tmp_path / "model.pt")
    np.testing.assert_array_equal(mha_c.LayerNorm.from_state_dict(tmp_path / "model.pt", "a.").bias, bias)
    for prefix, words in (("odd.", 'Unexpected key(s) in state_dict: "running"'),
                          ("lone.", 'Missing key(s) in state_dict: "lone.weight"'),
                          ("c.", 'Missing key(s) in state_dict: "c.weight"')):
        with pytest.raises(RuntimeError, match=re.escape(words)):
            mha_c.LayerNorm.from_state_dict(model, prefix)
    with pytest.raises(RuntimeError, match="Unexpected"):
        mha_c.RMSNorm.from_state_dict(model, "a.")
    assert mha_c.LayerNorm.from_state_dict(model, "odd.", strict=False).bias is None
    for wrong in ({"weight": weight, "bias": bias[:2]}, {"weight": "text"}):
        with pytest.raises((RuntimeError, TypeError)):
            mha_c.LayerNorm.from_state_dict(wrong)
    with pytest.raises(TypeError):
        mha_c.LayerNorm.from_state_dict(3)


def test_subclasses():
    """forward of a subclass is what a call runs."""
    class Doubled(mha_c.LayerNorm):
        def forward(self, input):
            return 2 * super().forward(input)

    x = normal((2, 4))
    np.testing.assert_array_equal(Doubled(4)(x), 2 * mha_c.LayerNorm(4)(x))
    assert repr(Doubled(4)) == "Doubled((4,), eps=1e-05, elementwise_affine=True, bias=True)"


# ---------------------------------------------------------------------------------------------- refused calls


SHAPES = [((2, 7), (8,)), ((2, 7), (3, 8)), ((2, 7), (2, 8)), ((), (7,)), ((7,), (7, 7)), ((8, 2), (8,)), ((2, 7), ()),
          ((0, 7), (8,)), ((2, 0), (8,))]


@pytest.mark.parametrize("given, shape", SHAPES, ids=str)
@every_kind
def test_words_for_shapes(kind, given, shape):
    x = normal(given)
    theirs = outcome(lambda: getattr(torch.nn, kind)(shape)(to_torch(x))).error
    name = "layer_norm" if kind == "LayerNorm" else "rms_norm"
    calls = [("x" if kind == "RMSNorm" else "input", lambda: getattr(mha_c, kind)(shape)(x)),
             ("input", lambda: getattr(functional, name)(x, shape))]
    for argument, call in calls:
        ours = outcome(call).error
        assert type(ours) is type(theirs) and isinstance(ours, (RuntimeError, ValueError))
        assert str(ours).startswith(str(theirs).rstrip("."))
        assert not shape or f"{argument} has the shape {given}, but its last ax" in str(ours)


PARAMETERS = [((7,), (8,), None), ((7,), (7,), (8,)), ((8,), (3,), None), ((8,), (8, 1), None), ((7,), None, (1, 7)),
              ((7,), (), None)]


@pytest.mark.parametrize("shape, weight, bias", PARAMETERS, ids=str)
def test_words_for_parameters(shape, weight, bias):
    x, w, b = normal((2, 7)), None if weight is None else normal(weight), None if bias is None else normal(bias)
    theirs = outcome(lambda: torch.nn.functional.layer_norm(to_torch(x), shape, to_torch(w), to_torch(b))).error
    ours = outcome(lambda: functional.layer_norm(x, shape, w, b)).error
    assert type(ours) is type(theirs) is RuntimeError and str(ours).startswith(str(theirs))
    if bias is None:
        theirs = outcome(lambda: torch.nn.functional.rms_norm(to_torch(x), shape, to_torch(w))).error
        ours = outcome(lambda: functional.rms_norm(x, shape, w)).error
        assert type(ours) is type(theirs) is RuntimeError and str(ours).startswith(str(theirs))


NORMALIZED_SHAPES = [7, "a", ["a"], [7.0], (7.5,), None, {7}, [None], [[7]]]


@pytest.mark.parametrize("shape", NORMALIZED_SHAPES, ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_words_for_normalized_shape(name, shape):
    x = normal((2, 7))
    theirs = outcome(lambda: getattr(torch.nn.functional, name)(to_torch(x), shape)).error
    ours = outcome(lambda: getattr(functional, name)(x, shape)).error
    assert type(ours) is type(theirs) is TypeError
    assert str(ours).startswith(str(theirs))
    with pytest.raises(TypeError, match="'eps'.* must be float, not str"):
        getattr(functional, name)(x, (7,), eps="a")
    with pytest.raises(TypeError, match=r"Pass normalized_shape=\(7,\)"):
        getattr(functional, name)(x, 7)


OTHERS = ("float16", "bfloat16", "int64", "bool", "complex64")


def test_words_for_dtypes():
    """Every triple of dtypes: torch's result, or its exception and words."""
    pytest.importorskip("ml_dtypes")
    for dtypes in itertools.product((*DTYPES, *OTHERS), (None, *DTYPES, *OTHERS), (None, *DTYPES, *OTHERS)):
        arrays = [None if dtype is None else np.ones(3, dtype) for dtype in dtypes]
        theirs = outcome(lambda: torch.nn.functional.layer_norm(to_torch(arrays[0]), [3], *map(to_torch, arrays[1:])))
        ours = outcome(lambda: functional.layer_norm(arrays[0], [3], *arrays[1:]))
        if theirs.error is not None:
            assert type(ours.error) is type(theirs.error) and str(theirs.error).rstrip(".") in str(ours.error), dtypes
        else:
            assert ours.result.dtype == dtypes[0]
            np.testing.assert_array_equal(ours.result.astype("f8"), theirs.result.double().numpy())


@pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")
def test_a_weight_of_another_dtype():
    """torch casts input and weight of rms_norm to a common dtype; they are refused here, with advice."""
    x, weight = normal((2, 3), "float64"), normal((3,))
    assert torch.nn.functional.rms_norm(to_torch(x), (3,), to_torch(weight)).dtype == torch.float64
    words = "input is float64, but the parameters are float32: pass input.astype(np.float32)"
    with pytest.raises(RuntimeError, match=re.escape(words)):
        functional.rms_norm(x, (3,), weight)


def test_advice():
    """What was passed, and what to write instead."""
    module = mha_c.LayerNorm(8)
    expected = [
        (normal((2, 8), "float64"), RuntimeError,
         'pass input.astype(np.float32), or make the layer float64 with layer.to("float64")'),
        (np.ones((2, 8), "i8"), RuntimeError,
         "input is int64, but this layer is float32: pass input.astype(np.float32)."),
        (torch.ones(2, 8, dtype=torch.float64), RuntimeError, "pass input.float(), or"),
        (normal((8, 2)), RuntimeError, "if axis 0 is meant, pass np.moveaxis(input, 0, -1)"),
        ([1.0] * 8, TypeError, "Pass np.asarray(input, np.float32)"),
        (np.ma.ones((2, 8)), TypeError, "input is a masked array"),
    ]
    for x, kind, words in expected:
        with pytest.raises(kind, match=re.escape(words)):
            module(x)
        with pytest.raises(kind, match=re.escape(re.sub(r"\binput\b", "x", words))):  # what this norm calls it
            mha_c.RMSNorm(8)(x)
    plain = mha_c.LayerNorm(8, elementwise_affine=False)
    with pytest.raises(NotImplementedError, match="input is int64, but it must be float32, float64, bfloat16 or float16"):
        plain(np.ones((2, 8), "i8"))
    for dtype in ("float64", "float16"):  # as in torch, where such a layer has no dtype
        assert plain(normal((2, 8), dtype)).dtype == dtype
    with pytest.raises(TypeError):
        module()
    for norm, name in ((module, "input"), (mha_c.RMSNorm(8), "x")):
        with pytest.raises(TypeError, match=f"^{name} must be an array"):
            norm(None)


# ---------------------------------------------------------------------------------------------- hostile arguments


class Provider:
    """An object that becomes an array by running code."""

    def __init__(self, make):
        self.make = make

    def __array__(self, dtype=None, copy=None):
        return self.make()


class Size:
    def __init__(self, make):
        self.make = make

    def __index__(self):
        return self.make()


def test_objects_that_run_code():
    """Their arrays are read, their exceptions arrive, and what they change meanwhile is harmless."""
    x = normal((2, 4))
    module = mha_c.LayerNorm(4)
    np.testing.assert_array_equal(module(Provider(lambda: x)), module(x))
    with pytest.raises(ZeroDivisionError):
        module(Provider(lambda: 1 / 0))
    with pytest.raises((TypeError, ValueError)):
        module(Provider(lambda: 3))
    weight = np.ones(4, "f4")

    def shrink():
        weight.resize((1,), refcheck=False)
        return np.ones(4, "f4")

    with pytest.raises(RuntimeError, match="Expected weight to be of same shape"):
        functional.layer_norm(x, (4,), weight, Provider(shrink))
    shape = [4, 0]

    def clear():
        shape.clear()
        return 4

    shape[:] = [Size(clear)]
    np.testing.assert_array_equal(functional.layer_norm(x, shape), functional.layer_norm(x, (4,)))
    with pytest.raises(ZeroDivisionError):
        functional.layer_norm(x, [Size(lambda: 1 / 0)])


@pytest.mark.parametrize("arguments", [
    (), (1, 2), (None,) * 6, (np.ones(3), (3,), None, None, 1e-5), ("a", "b", "c", "d", "e", "f"),
    (np.ones(3), (3,) * 100, None, None, 1, False), (np.ones(3), (2**80,), None, None, 1, False),
    (np.ones(3), (-3,), None, None, 1, False), (np.ones(3), (3,), None, None, 10**400, False),
], ids=range(9))
def test_strange_arguments_of_the_core(arguments):
    with pytest.raises((TypeError, ValueError, RuntimeError, OverflowError)):
        mha_c._core.normalize(*arguments)


def test_empty_and_huge():
    """No rows, no features, and results that no memory holds."""
    for kind, dtype in itertools.product(KINDS, DTYPES):
        for shape, lead in (((7,), (0,)), ((0,), (3,)), ((0, 7), (3, 2)), ((3, 0), ()), ((0,), (0, 5))):
            module = getattr(mha_c, kind)(shape, dtype=dtype)
            got = module(np.zeros(lead + shape, dtype))
            assert got.shape == lead + shape and got.dtype == dtype
    huge = np.broadcast_to(np.ones(2, "f4"), (2**28, 2**28, 2))
    with pytest.raises(MemoryError):
        mha_c.LayerNorm(2)(huge)
    nothing = np.broadcast_to(np.ones((1, 0), "f4"), (2**40, 2**20, 0))
    assert mha_c.LayerNorm(0)(nothing).shape == nothing.shape
    many = np.ones((1,) * 31 + (2,), "f4")
    assert mha_c.RMSNorm(2)(many).shape == many.shape
    assert mha_c.RMSNorm((1,) * 20 + (2,))(many).shape == many.shape


def test_references():
    """Calls that succeed and calls that are refused keep nothing."""
    x, weight, bias = normal((3, 4)), normal((4,)), normal((4,))
    calls = [lambda: functional.layer_norm(x, (4,), weight, bias), lambda: functional.rms_norm(x, [4], weight),
             lambda: functional.layer_norm(x, (3,), weight, bias),
             lambda: functional.layer_norm(x, (4,), weight, bias[:3]),
             lambda: functional.layer_norm(x, (4,), weight.astype("f8"), bias),
             lambda: functional.layer_norm(x.T, (3,)),
             lambda: functional.layer_norm(x, (4,), weight, bias, "eps"), lambda: functional.layer_norm(x, 4, weight)]
    for call in calls:
        outcome(call)
        gc.collect()
        before = [sys.getrefcount(one) for one in (x, weight, bias)]
        for _ in range(100):
            outcome(call)
        gc.collect()
        assert [sys.getrefcount(one) for one in (x, weight, bias)] == before


def test_threads_that_assign():
    """A call uses one set of parameters throughout, whatever other threads assign meanwhile."""
    module, x = mha_c.LayerNorm(64), normal((2000, 64))
    states = [{"weight": np.full(64, n, "f4"), "bias": np.full(64, -n, "f4")} for n in (1, 1000)]
    wanted = []
    for state in states:
        module.load_state_dict(state)
        wanted.append(module(x))
    done = threading.Event()

    def assign():
        for state in itertools.cycle(states):
            module.load_state_dict(state)
            if done.is_set():
                return

    thread = threading.Thread(target=assign)
    thread.start()
    try:
        for _ in range(50):
            got = module(x)
            assert any(np.array_equal(got, want) for want in wanted)
    finally:
        done.set()
        thread.join()


def test_large_call_without_the_gil():
    """Its input stays where it is: NumPy refuses to resize it meanwhile."""
    x = normal((200, 3000)).repeat(20, axis=0)
    module, results = mha_c.LayerNorm(3000), []
    thread = threading.Thread(target=lambda: results.append(module(x)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(results[0][::20], module(x[::20]))
    assert math.isclose(float(results[0].mean()), 0, abs_tol=1e-4)
