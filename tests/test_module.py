# SPDX-License-Identifier: Apache-2.0
"""The layer around the forward pass: constructor, attributes, parameters, state dict, copies, training mode."""

import array
import copy
import gc
import inspect
import pickle
import re
import shutil
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mha_c
import numpy as np
import pytest
from helpers import layer, normal, outcome, run_child, torch_words

torch = pytest.importorskip("torch")

CONFIGURATIONS = [
    {},
    {"bias": False},
    {"kdim": 5},
    {"vdim": 3, "bias": False},
    {"kdim": 8, "vdim": 8},
    {"add_bias_kv": True, "kdim": 3, "vdim": 4},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True, "dropout": 0.25},
    {"kdim": 0},
    {"dtype": "float64", "device": "cpu"},
]
ATTRIBUTES = (
    "embed_dim kdim vdim num_heads head_dim dropout batch_first add_zero_attn training _qkv_same_embed_dim".split()
)


def both(*arguments, **options):
    """Our layer and torch's, made by the same call."""
    in_torch = {**options, "dtype": getattr(torch, options["dtype"])} if "dtype" in options else options
    return mha_c.MultiheadAttention(*arguments, **options), torch.nn.MultiheadAttention(*arguments, **in_torch)


pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")

# -------------------------------------------------------------------------------------- constructor


def test_signatures():
    """torch's arguments in torch's order, by position or by name; ours by name only, after them."""
    for method, own in (
        ("__init__", "seed dropout_seed masked_rows head_dim v_head_dim out_dim num_kv_heads matmul_precision"),
        ("forward", "out"),
        ("__call__", "out"),
    ):
        ours = list(inspect.signature(getattr(mha_c.MultiheadAttention, method)).parameters.values())
        torch_method = "forward" if method == "__call__" else method
        theirs = list(inspect.signature(getattr(torch.nn.MultiheadAttention, torch_method)).parameters.values())
        assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
            (p.name, p.default, p.kind) for p in theirs
        ]
        assert [p.name for p in ours[len(theirs) :]] == own.split()
        assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_attributes_and_parameters(options):
    """What torch's layer has, ours has: attributes, names and shapes in order."""
    ours, theirs = both(8, 2, **options)
    for name in ATTRIBUTES:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.out_proj.in_features == theirs.out_proj.in_features
    assert ours.out_proj.out_features == theirs.out_proj.out_features
    for prefix in ("", "encoder."):
        expected = [(name, tuple(tensor.shape)) for name, tensor in theirs.state_dict(prefix=prefix).items()]
        assert [(name, array.shape) for name, array in ours.state_dict(prefix=prefix).items()] == expected
    assert type(ours.state_dict()) is OrderedDict
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_parameters("a")] == [name for name, _ in theirs.named_parameters("a")]
    assert [a.shape for a in ours.parameters()] == [p.shape for p in theirs.parameters()]
    for name in "in_proj_weight q_proj_weight k_proj_weight v_proj_weight in_proj_bias bias_k bias_v".split():
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None) and (a is None or a.shape == b.shape), name
    assert (ours.out_proj.bias is None) == (theirs.out_proj.bias is None)
    assert all(array.dtype == options.get("dtype", "float32") for array in ours.parameters())


def test_free_widths():
    """Shapes where heads and output have widths of their own; the projections are stacked if the inputs are alike."""
    def shapes(**options):
        return {name: a.shape for name, a in mha_c.MultiheadAttention(10, 4, head_dim=2, **options).named_parameters()}

    assert shapes(out_dim=8) == {
        "in_proj_weight": (24, 10), "in_proj_bias": (24,), "out_proj.weight": (8, 8), "out_proj.bias": (8,),
    }  # fmt: skip
    assert shapes(v_head_dim=3, num_kv_heads=2, add_bias_kv=True) == {
        "in_proj_weight": (18, 10), "in_proj_bias": (18,), "bias_k": (1, 1, 4), "bias_v": (1, 1, 6),
        "out_proj.weight": (10, 12), "out_proj.bias": (10,),
    }  # fmt: skip
    assert shapes(kdim=5, vdim=6, v_head_dim=3, num_kv_heads=1, bias=False) == {
        "q_proj_weight": (8, 10), "k_proj_weight": (2, 5), "v_proj_weight": (3, 6), "out_proj.weight": (10, 12),
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((0, 1), {}), ((8, 0), {}), ((-4, 2), {}), ((10, 4), {}), ((3, 4), {}), ((8, 2.5), {}), ((8, "2"), {}),
        (("8", 2), {}), ((None, 2), {}), ((8.0, 2), {}), ((True, 1), {}), ((8,), {}), ((), {}),
        ((8, 2), {"heads": 3}), ((8, 2), {"kdim": -1}), ((8, 2), {"vdim": 5.0}), ((8, 2), {"kdim": "5"}),
        ((8, 2), {"dtype": torch.int32}), ((8, 2), {"dtype": torch.bool}), ((8, 2), {"dtype": "foo"}),
        ((8, 2), {"device": "foo"}), ((8, 2), {"device": 3}), ((8, 2, *range(10)), {}),
    ],
    ids=str,
)  # fmt: skip
def test_constructor_errors_are_torchs(arguments, options):
    """The same type; and the same first words where torch speaks of the argument rather than of its own insides."""
    ours = outcome(lambda: mha_c.MultiheadAttention(*arguments, **options)).error
    theirs = outcome(lambda: torch.nn.MultiheadAttention(*arguments, **options)).error
    assert type(ours) is type(theirs)
    insides = ("kdim", "vdim", "device")
    if isinstance(ours, TypeError) and len(arguments) == 2 and not options:
        assert re.match(r"(embed_dim|num_heads) must be an int, but got", str(ours))
    elif not options.keys() & set(insides) and options != {"dtype": "foo"}:
        assert str(ours).split(" positional arguments but")[0].startswith(
            str(theirs).split(" positional arguments but")[0]
        )


def test_constructor_takes_what_torch_takes():
    """Heads as a whole float, truthy switches, a dropout that only a call in training mode will look at."""
    assert mha_c.MultiheadAttention(8, 2.0).head_dim == 4
    assert mha_c.MultiheadAttention(8, 2, bias=None).in_proj_bias is None
    assert mha_c.MultiheadAttention(8, 2, dropout=-1).dropout == -1
    for device in (None, "cpu", "cpu:0", torch.device("cpu")):
        mha_c.MultiheadAttention(8, 2, device=device)
    for dtype in ("float64", np.float64, np.dtype("f8"), float, torch.float64):
        assert mha_c.MultiheadAttention(8, 2, dtype=dtype).out_proj.weight.dtype == np.float64
    for dtype in (None, "float32", np.float32, torch.float32):
        assert mha_c.MultiheadAttention(8, 2, dtype=dtype).out_proj.weight.dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2, "longdouble", ">f4", "V2", torch.zeros(1)], ids=str)
def test_dtypes_that_no_layer_has(dtype):
    with pytest.raises(TypeError, match="dtype must be float32, float64, bfloat16 or float16"):
        mha_c.MultiheadAttention(8, 2, dtype=dtype)


def test_advice_in_errors():
    """Where torch leaves the reader alone, a second sentence says what to write."""
    with pytest.raises(TypeError, match=r"'d_model'\. Write embed_dim=10 instead of d_model=10, num_heads=4 instead"):
        mha_c.MultiheadAttention(d_model=10, nhead=4, dropout=0.1)
    with pytest.raises(AssertionError, match=r"divisible by num_heads\. Choose embed_dim=8 or 12 .* head_dim="):
        mha_c.MultiheadAttention(10, 4)
    with pytest.raises(ValueError, match='masked_rows must be "torch" or "zero"'):
        mha_c.MultiheadAttention(8, 2, masked_rows="nan")
    with pytest.raises(ValueError, match="3 does not divide 4"):
        mha_c.MultiheadAttention(8, 4, num_kv_heads=3)
    for name in ("head_dim", "v_head_dim", "out_dim", "num_kv_heads"):
        with pytest.raises(ValueError, match=f"{name} must be greater than 0"):
            mha_c.MultiheadAttention(8, 4, **{name: 0})
        with pytest.raises(TypeError, match=f"{name} must be an int"):
            mha_c.MultiheadAttention(8, 4, **{name: 2.5})


def test_calls_with_missing_or_unknown_arguments():
    ours, theirs = both(8, 2)
    for arguments, options in ((), {}), ((1,), {}), ((1, 2), {}), ((1, 2, 3), {"foo": 3}):
        for call in (lambda m: m(*arguments, **options), lambda m: m.forward(*arguments, **options)):
            expected = outcome(lambda: call(theirs)).error
            with pytest.raises(TypeError) as error:
                call(ours)
            assert str(error.value) == str(expected)


# --------------------------------------------------------------------------------------- parameters


def test_parameters_are_read_only():
    """No array, view or base of one can be written to."""
    module = mha_c.MultiheadAttention(8, 2, add_bias_kv=True)
    for name, view in module.named_parameters():
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.setflags(write=True)
        while view is not None:
            assert memoryview(view).readonly, name
            view = getattr(view, "base", None)
    for width in ("embed_dim", "num_heads", "head_dim", "num_kv_heads"):
        with pytest.raises(AttributeError):
            setattr(module, width, 4)


def test_assignment_replaces_a_parameter():
    """Each one, from any array or tensor, of any dtype and strides; arrays handed out before stay as they were."""
    module = mha_c.MultiheadAttention(8, 2, kdim=5, add_bias_kv=True, seed=0)
    for name, before in module.named_parameters():
        holder, attribute = (module.out_proj, name[9:]) if name.startswith("out_proj.") else (module, name)
        bits = before.tobytes()
        new = normal(before.shape[::-1], "float64").T
        tensor = torch.tensor(new)
        for value in (new, tensor, tensor.to(torch.bfloat16), torch.nn.Parameter(tensor)):
            expected = np.asarray(value.detach().float() if isinstance(value, torch.Tensor) else value, "float32")
            setattr(holder, attribute, value)
            assert np.array_equal(getattr(holder, attribute), expected), name
            assert getattr(holder, attribute).dtype == np.float32
        assert before.tobytes() == bits


def test_assignment_takes_every_protocol():
    """The buffer protocol and DLPack too, which load_state_dict reads in the same way."""
    class OnlyDLPack:
        def __init__(self, array):
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    module, values = mha_c.MultiheadAttention(8, 2), normal((8,))
    for value in (array.array("f", values), memoryview(values), OnlyDLPack(torch.tensor(values))):
        module.out_proj.bias = np.zeros(8)
        module.out_proj.bias = value
        assert np.array_equal(module.out_proj.bias, values), type(value)


def test_assignment_counts_from_the_next_call_on():
    module, x = layer(8, 2), normal((5, 3, 8))
    before = module(x, x, x)[0]
    module.out_proj.bias = module.out_proj.bias + np.float32(1)
    np.testing.assert_allclose(module(x, x, x)[0], before + 1, rtol=1e-5, atol=1e-6)


def test_assignments_that_do_not_fit():
    module = mha_c.MultiheadAttention(8, 2, seed=0)
    with pytest.raises(ValueError, match=r"in_proj_weight has shape \(24, 8\), but got an array of shape \(3, 8\)"):
        module.in_proj_weight = np.zeros((3, 8))
    with pytest.raises(AttributeError, match="this layer has no bias_k: it has in_proj_weight, in_proj_bias"):
        module.bias_k = np.zeros((1, 1, 8))
    for value in (None, [[0.0] * 8] * 24, 3.0):
        with pytest.raises(TypeError, match="in_proj_weight must be an array"):
            module.in_proj_weight = value
    assert pickle.dumps(module.state_dict()) == pickle.dumps(mha_c.MultiheadAttention(8, 2, seed=0).state_dict())


def test_replaced_sets_are_freed():
    """Weights are large: dropping the last reference to a set frees it at once, without the garbage collector."""
    gc.disable()
    try:
        module = mha_c.MultiheadAttention(256, 2)
        buffer = module.in_proj_weight.base
        while isinstance(buffer, np.ndarray):
            buffer = buffer.base
        references = sys.getrefcount(buffer)
        module.to("float64")
        assert sys.getrefcount(buffer) < references
        assert module.out_proj.weight.size  # out_proj refers to the layer, not the other way round
        packed = module._parameters.weights
        references = sys.getrefcount(packed)
        del module
        assert sys.getrefcount(packed) == references - 1
    finally:
        gc.enable()


def test_concurrent_callers_never_see_a_mix():
    """While one thread switches between two state dicts, every other gets the output of one or of the other."""
    states = [mha_c.MultiheadAttention(16, 4, seed=seed).state_dict() for seed in (1, 2)]
    module, x = mha_c.MultiheadAttention(16, 4, seed=1).eval(), normal((7, 2, 16))
    expected = set()
    for state in states:
        module.load_state_dict(state)
        expected.add(module(x, x, x)[0].tobytes())
    assert len(expected) == 2
    done = threading.Event()

    def switch():
        for n in range(200):
            module.load_state_dict(states[n % 2])
        done.set()

    def call():
        seen = set()
        while not done.is_set():
            seen.add(module(x, x, x)[0].tobytes())
        return seen

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(call) for _ in range(3)]
        pool.submit(switch).result()
        for caller in callers:
            assert caller.result() <= expected


def test_concurrent_assignments_all_count():
    """Two threads that assign different parameters do not undo each other's."""
    module = mha_c.MultiheadAttention(8, 2)

    def assign(name):
        for n in range(200):
            setattr(module, name, np.full(getattr(module, name).shape, n, "float32"))
            assert (getattr(module, name) == n).all()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(assign, ["in_proj_weight", "in_proj_bias"]))


# --------------------------------------------------------------------------------------- state dict


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8"])
def test_load_state_dict_casts_as_torch_does(options, dtype):
    """Tensors of any dtype give the numbers that torch's own loading gives."""
    ours, theirs = both(8, 2, **options)
    state = {name: (3 * torch.randn(p.shape)).to(getattr(torch, dtype)) for name, p in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    assert repr(ours.load_state_dict(state)) == "<All keys matched successfully>"
    for name, tensor in theirs.state_dict().items():
        assert ours.state_dict()[name].tobytes() == tensor.numpy().tobytes(), name


def test_load_state_dict_takes_arrays():
    """NumPy arrays, bfloat16 of ml_dtypes, big-endian ones, float64 beyond float32, and our own state dict."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    module = mha_c.MultiheadAttention(8, 2)
    state = {name: normal(array.shape, "float64") for name, array in module.state_dict().items()}
    state["in_proj_bias"][0] = 1e300
    for cast in ("float64", ">f8", "float32", ml_dtypes.bfloat16, "float16"):
        with np.errstate(over="ignore"):
            arrays = {name: array.astype(cast) for name, array in state.items()}
            expected = {name: array.astype("float32") for name, array in arrays.items()}
        module.load_state_dict(arrays)
        assert all(np.array_equal(module.state_dict()[name], array) for name, array in expected.items()), cast
    other = mha_c.MultiheadAttention(8, 2)
    other.load_state_dict(module.state_dict())
    assert all(map(np.array_equal, other.parameters(), module.parameters()))


@pytest.mark.parametrize(
    "changes",
    [
        {"in_proj_weight": None},
        {"in_proj_weight": None, "q_proj_weight": (8, 8), "out_proj.scale": (1,), "k_proj_weight": (8, 8)},
        {"in_proj_weight": (48, 16)},
        {"in_proj_bias": (), "out_proj.bias": (8, 1), "out_proj.weight": None},
        {"out_proj": (8,), "out_proj.weight.scale": (1,), "other.weight": (1,)},
        {"in_proj_bias": "text"},
    ],
    ids=str,
)
@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_errors_are_torchs(changes, strict):
    """The same exception to the letter, a shape printed as a tuple, or the same keys; on an error nothing changes."""
    ours, theirs = both(8, 2)
    before = pickle.dumps(ours.state_dict())
    state = {name: torch.ones_like(tensor) for name, tensor in theirs.state_dict().items()}
    for name, change in changes.items():
        if change is None:
            del state[name]
        else:
            state[name] = torch.ones(change) if isinstance(change, tuple) else change
    expected = outcome(lambda: theirs.load_state_dict(state, strict=strict))
    got = outcome(lambda: ours.load_state_dict(state, strict))
    assert type(got.error) is type(expected.error)
    if expected.error is None:
        assert repr(got.result) == str(got.result) == repr(expected.result)
        assert tuple(got.result) == tuple(expected.result)
        for name, tensor in state.items():
            if name in ours.state_dict():
                assert np.array_equal(ours.state_dict()[name], tensor), name
    else:
        assert str(got.error).rstrip("\n") == torch_words(expected.error).rstrip("\n")
        assert pickle.dumps(ours.state_dict()) == before


def test_load_state_dict_of_something_else():
    ours, theirs = both(8, 2)
    for wrong in ([], None, 3):
        expected = outcome(lambda: theirs.load_state_dict(wrong)).error
        with pytest.raises(type(expected)) as error:
            ours.load_state_dict(wrong)
        assert str(error.value) == str(expected)


def test_to():
    module = mha_c.MultiheadAttention(8, 2, add_bias_kv=True, seed=1)
    single = module.state_dict()
    assert module.to("float64") is module
    x = normal((5, 3, 8), "float64")
    assert module(x, x, x)[0].dtype == np.float64
    assert all(np.array_equal(array, single[name]) for name, array in module.named_parameters())
    module.to(torch.float32)
    assert pickle.dumps(module.state_dict()) == pickle.dumps(single)
    with pytest.raises(TypeError, match="float32, float64, bfloat16 or float16"):
        module.to("complex64")


# ------------------------------------------------------------------------------- copies and modes


def test_train_and_eval():
    ours, theirs = both(8, 2)
    assert ours.train(False) is ours and not ours.training
    assert ours.train() is ours and ours.training
    assert ours.eval() is ours and not ours.training
    for wrong in (1, "yes", None):
        expected = outcome(lambda: theirs.train(wrong)).error
        with pytest.raises(type(expected)) as error:
            ours.train(wrong)
        assert str(error.value) == str(expected)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(2, 6))],
    ids=["copy", "deepcopy", *(f"pickle{p}" for p in range(2, 6))],
)
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "bias": False, "dtype": "float64"}, {"add_bias_kv": True}])
def test_copies(duplicate, options):
    """A copy answers alike, goes on counting by itself, and has read-only parameters too. A deep copy alone drops other
    weights."""
    original = mha_c.MultiheadAttention(8, 2, dropout=0.5, masked_rows="zero", batch_first=True, **options)
    dtype = options.get("dtype", "float32")
    given = [normal((3, 5, width), dtype) for width in (8, options.get("kdim", 8), 8)]
    original(*given)
    twin = duplicate(original)
    assert pickle.dumps(twin.state_dict()) == pickle.dumps(original.state_dict())
    assert (twin.masked_rows, twin.batch_first, twin.training) == ("zero", True, True)
    drops_alike = duplicate is not copy.deepcopy
    for _ in range(2):
        assert (original(*given)[1].tobytes() == twin(*given)[1].tobytes()) == drops_alike
    assert original.eval()(*given)[1].tobytes() == twin.eval()(*given)[1].tobytes()
    with pytest.raises(ValueError, match="WRITEABLE"):
        twin.out_proj.weight.setflags(write=True)
    twin.out_proj.weight = np.zeros((8, 8))
    assert original.out_proj.weight.any()


def dropped(module, x):
    return module(x, x, x)[1].tobytes()


def test_dropout_depends_on_seed_and_call():
    x = normal((6, 2, 8))

    def sequence(**options):
        module = mha_c.MultiheadAttention(8, 2, dropout=0.5, seed=0, **options)
        return [dropped(module, x) for _ in range(4)]

    assert sequence(dropout_seed=3) == sequence(dropout_seed=3)
    assert len(set(sequence(dropout_seed=3) + sequence(dropout_seed=4) + sequence() + sequence())) == 16


def test_only_calls_with_dropout_are_counted():
    """Evaluation, or a dropout of 0, leaves the sequence where it was."""
    x = normal((6, 2, 8))
    plain, interrupted = (mha_c.MultiheadAttention(8, 2, dropout=0.5, seed=0, dropout_seed=1) for _ in range(2))
    for _ in range(3):
        assert dropped(plain, x) == dropped(interrupted, x)
        interrupted.eval()
        dropped(interrupted, x)
        interrupted.train()
        interrupted.dropout = 0.0
        dropped(interrupted, x)
        interrupted.dropout = 0.5


def test_dropout_calls_are_counted_across_threads():
    """Threads together see each number once: the same results as one thread, in some order."""
    x = normal((6, 2, 8))
    alone, shared = (mha_c.MultiheadAttention(8, 2, dropout=0.5, seed=0, dropout_seed=1) for _ in range(2))
    expected = sorted(dropped(alone, x) for _ in range(400))
    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(lambda _: dropped(shared, x), range(400))) == expected
    assert len(set(expected)) == 400


def test_repr():
    """One line: widths, heads, dtype, mode, and what is not the default."""
    assert repr(mha_c.MultiheadAttention(8, 2)) == "MultiheadAttention(embed_dim=8, num_heads=2, dtype=float32, training=True)"
    layer = mha_c.MultiheadAttention(8, 4, 0.1, num_kv_heads=2, batch_first=True, dtype="float64").eval()
    assert repr(layer) == ("MultiheadAttention(embed_dim=8, num_heads=4, dropout=0.1, batch_first=True, num_kv_heads=2, "
                           "dtype=float64, training=False)")


def test_subclasses():
    """A forward of one's own is what a call runs; it can be pickled and converted to."""
    class Doubled(mha_c.MultiheadAttention):
        def forward(self, query, key, value):
            output, _ = super().forward(query, key, value, need_weights=False)
            return 2 * output

    x = normal((5, 3, 8))
    module = Doubled(8, 2, seed=0)
    assert repr(module).startswith("Doubled(embed_dim=")
    np.testing.assert_array_equal(module(x, x, x), 2 * mha_c.MultiheadAttention(8, 2, seed=0)(x, x, x)[0])
    assert type(Doubled.from_torch(torch.nn.MultiheadAttention(8, 2))) is Doubled
    assert mha_c.explain(module, x).warnings[0].startswith("Doubled overrides forward.")


# -------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_from_torch(options, training):
    """Arguments, parameters and mode come over; torch's layer is not shared with."""
    _, theirs = both(8, 2, **options)
    ours = mha_c.MultiheadAttention.from_torch(theirs.train(training))
    for name in ATTRIBUTES:
        assert getattr(ours, name) == getattr(theirs, name), name
    state = {name: tensor.numpy().tobytes() for name, tensor in theirs.state_dict().items()}
    assert {name: array.tobytes() for name, array in ours.state_dict().items()} == state
    with torch.no_grad():
        theirs.out_proj.weight.zero_()
    assert ours.out_proj.weight.any()


def test_from_torch_in_half_precision():
    for dtype in (torch.float16, torch.bfloat16):
        theirs = torch.nn.MultiheadAttention(8, 2, dtype=dtype)
        ours = mha_c.MultiheadAttention.from_torch(theirs)
        assert ours.in_proj_weight.dtype == str(dtype).removeprefix("torch.")
        assert np.array_equal(ours.in_proj_weight.astype("float32"), theirs.in_proj_weight.detach().float())


def test_from_torch_of_something_else():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.MultiheadAttention, but got torch.nn.modules.linear.Linear"):
        mha_c.MultiheadAttention.from_torch(torch.nn.Linear(8, 8))


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_to_torch_and_back(options):
    """Nothing is lost, and torch's random numbers are left alone."""
    ours = mha_c.MultiheadAttention(8, 2, **options).eval()
    state = torch.get_rng_state()
    theirs = mha_c.torch.to_torch(ours)
    assert torch.equal(torch.get_rng_state(), state)
    back = mha_c.MultiheadAttention.from_torch(theirs)
    assert pickle.dumps(back.state_dict()) == pickle.dumps(ours.state_dict())
    assert all(getattr(back, name) == getattr(ours, name) for name in ATTRIBUTES)
    with pytest.raises(ValueError, match="no such layer"):
        mha_c.torch.to_torch(mha_c.MultiheadAttention(8, 2, out_dim=4))


# ------------------------------------------------------------------------------------------- import


def test_import_needs_numpy_alone():
    """torch and whatever else is slow to import waits until it is used."""
    code = """
        import sys
        before = set(sys.modules)
        import mha_c
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        heavy = {"torch", "safetensors", "tokenizers", "argparse", "secrets", "hashlib"}
        assert not new & heavy, new & heavy
        assert "numpy.random" not in sys.modules and "importlib.metadata" not in sys.modules
        mha_c.MultiheadAttention(8, 2)
        assert "torch" not in sys.modules
        assert "torch" in dir(mha_c) and mha_c.torch.from_torch and "torch" in sys.modules
        try:
            mha_c.nothing
        except AttributeError as error:
            assert str(error) == "module 'mha_c' has no attribute 'nothing'"
    """
    run_child(code)


def test_without_torch():
    """Everything but mha_c.torch works, and that says what is missing."""
    code = """
        import sys
        sys.modules["torch"] = None
        import mha_c
        try:
            mha_c.torch
        except ImportError as error:
            assert "pip install torch" in str(error)
        else:
            raise AssertionError
    """
    run_child(code)


def test_source_tree_without_the_extension(tmp_path):
    """Who starts Python in a source tree is told what to do about it."""
    package = tmp_path / "mha_c"
    package.mkdir()
    for source in Path(mha_c.__file__).parent.glob("*.py"):
        shutil.copy(source, package)
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        try:
            import mha_c
        except ImportError as error:
            assert {str(package)!r} in str(error) and "pip install -e ." in str(error), error
            assert "start Python in another directory" in str(error)
        else:
            raise AssertionError
    """
    run_child(code)


def test_calls_of_subclasses():
    """A call is the forward of the class, wherever it is defined, unless a class defines __call__."""
    class Mixin:
        def forward(self, *given):
            return "mixin"

    class First(Mixin, mha_c.MultiheadAttention):
        pass

    class Second(First):
        def forward(self, *given):
            return "second"

    class Third(Second):
        pass

    class Called(mha_c.MultiheadAttention):
        def __call__(self, *given):
            return "called"

    class Fourth(Called):
        def forward(self, *given):
            return "fourth"

    assert [cls(8, 2)(None) for cls in (First, Second, Third, Fourth)] == ["mixin", "second", "second", "called"]


@pytest.mark.parametrize("value", [1j, "3", None, np.datetime64("2026-01-01")], ids=str)
def test_parameters_are_real_numbers(value):
    """Nothing else is cast in silence."""
    module = mha_c.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="in_proj_weight: expected real numbers, but got"):
        module.in_proj_weight = np.full((24, 8), value)
