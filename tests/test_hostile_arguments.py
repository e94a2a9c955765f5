# SPDX-License-Identifier: Apache-2.0
"""Arguments that raise, lie, change while they are looked at, or call back: an exception or the right numbers, never a
crash, and the layer is what it was."""

import contextlib
import copy
import gc
import inspect
import itertools
import pickle
import random
import sys
import warnings

import numpy as np
import pytest
from helpers import inputs, layer, normal, outcome, run_child

mha_c = pytest.importorskip("mha_c")
functional = pytest.importorskip("mha_c.functional")
_core = mha_c.layer._core


class OnDemand:
    """Makes an array of itself after doing something else."""

    def __init__(self, array, action):
        self.array = array
        self.action = action
        self.shape = array.shape

    def __array__(self, dtype=None, copy=None):
        self.action()
        return self.array


def assert_same_outcome(got, want):
    """Both calls gave the same bits, or both raised the same."""
    if want.error is not None:
        assert type(got.error) is type(want.error) and str(got.error) == str(want.error)
        return
    assert got.error is None, repr(got.error)
    for a, b in zip(got.result, want.result, strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------- arrays that change


def set_strides(array):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated since NumPy 2.4
        array.strides = (0,) * array.ndim


CHANGES = {
    "one axis": lambda a: setattr(a, "shape", (a.size,)),
    "axes swapped": lambda a: setattr(a, "shape", a.shape[::-1]),
    "one more axis": lambda a: setattr(a, "shape", (1, *a.shape)),
    "other type": lambda a: setattr(a, "dtype", np.dtype(f"i{a.itemsize}")),
    "narrower type": lambda a: setattr(a, "dtype", np.dtype("u1")),
    "strides of 0": set_strides,
    "smaller": lambda a: a.resize((1,) * a.ndim, refcheck=False),
    "empty": lambda a: a.resize((0,) * a.ndim, refcheck=False),
    "larger": lambda a: a.resize([3 * n for n in a.shape], refcheck=False),
}
ORDER = ("query", "key", "value", "key_padding_mask", "attn_mask", "out")


def call_arguments():
    query, key, value = (x.copy() for x in inputs(2, 40, 40, 8))
    return {"query": query, "key": key, "value": value, "key_padding_mask": np.zeros((2, 40), "f4"),
            "attn_mask": normal((40, 40)), "out": np.zeros((2, 40, 8), "f4")}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("by, victim", [(by, victim) for by in ("query", "value", "attn_mask") for victim in ORDER
                                        if by != victim])
def test_an_array_changed_by_another(by, victim, change):
    """The protocol method of one argument changes another in place, whether or not it was looked at before: the call is
    that with the changed array."""
    module = layer(8, 2, batch_first=True)
    given = call_arguments()
    changes = iter([CHANGES[change]])  # one alone: to say what is wrong, a refusal asks for the array again
    hostile = {**given, by: OnDemand(given[by], lambda: next(changes, id)(given[victim]))}
    got = outcome(lambda: module(**hostile))
    assert_same_outcome(got, outcome(lambda: module(**given)))


@contextlib.contextmanager
def calling_on_overflow(action):
    """While an array is cast, NumPy reports overflow by calling a function."""
    before = np.seterrcall(lambda *_: action())
    try:
        with np.errstate(over="call"):
            yield
    finally:
        np.seterrcall(before)


OVERFLOWING = np.full((40, 40), np.longdouble("1e4000")) if np.finfo(np.longdouble).maxexp > 1024 else None


@pytest.mark.skipif(OVERFLOWING is None, reason="long double is double here")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("victim", ["query", "key", "value", "key_padding_mask", "out"])
def test_an_array_changed_while_a_mask_is_cast(victim, change):
    """Also by what NumPy calls in the course of the core's own work."""
    module = layer(8, 2, batch_first=True)
    given = call_arguments()
    given["attn_mask"] = OVERFLOWING
    with calling_on_overflow(lambda: CHANGES[change](given[victim])):
        got = outcome(lambda: module(**given))
    with np.errstate(over="ignore"):
        assert_same_outcome(got, outcome(lambda: module(**given)))


@pytest.mark.skipif(OVERFLOWING is None, reason="long double is double here")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("victim", range(3))
def test_an_array_changed_in_scaled_dot_product_attention(victim, change):
    given = [x.copy() for x in inputs(2, 40, 40, 8)]
    with calling_on_overflow(lambda: CHANGES[change](given[victim])):
        got = outcome(lambda: [functional.scaled_dot_product_attention(*given, OVERFLOWING)])
    with np.errstate(over="ignore"):
        assert_same_outcome(got, outcome(lambda: [functional.scaled_dot_product_attention(*given, OVERFLOWING)]))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_an_array_changed_in_a_layer(kind, change):
    """One argument changes another in place, before or after the core has looked at it: the call is that with the changed
    array, whether the core takes it or not."""
    module = getattr(mha_c, f"Transformer{kind}Layer")(8, 2, 16, batch_first=True, seed=1).eval()
    names = {"Encoder": ("src", "src_mask", "src_key_padding_mask"),
             "Decoder": ("tgt", "memory", "tgt_mask", "memory_mask", "memory_key_padding_mask")}[kind]
    for by, victim in itertools.permutations(names, 2):
        if by.startswith("memory") and victim.startswith("tgt"):
            continue  # it was used by the time that anything of the memory is looked at
        x, memory, _ = (x.copy() for x in inputs(2, 40, 40, 8))
        given = {"src": x, "tgt": x, "memory": memory, "src_mask": normal((40, 40)), "tgt_mask": normal((40, 40)),
                 "memory_mask": normal((40, 40)), "src_key_padding_mask": np.zeros((2, 40), "f4"),
                 "memory_key_padding_mask": np.zeros((2, 40), "f4")}
        given = {name: given[name] for name in names}
        changes = iter([CHANGES[change]])
        action = lambda: next(changes, id)(given[victim])  # noqa: B023, E731 - called before the next turn
        with np.errstate(all="ignore"):
            got = outcome(lambda: [module(**{**given, by: OnDemand(given[by], action)})])  # noqa: B023
            want = outcome(lambda: [module(**given)])  # noqa: B023
        assert_same_outcome(got, want)


def test_parameters_of_a_norm_changed_by_another():
    """The core's own function takes numbers from anything; what they do to arrays is seen."""
    width = 1_000_000
    weights = mha_c.MultiheadAttention(width, 1, head_dim=1)._parameters.weights
    x, last = np.ones((1, width), "f4"), np.ones(width, "f4")

    class Eps:
        def __float__(self):
            first.resize((1,), refcheck=False)
            return 1e-5

    for position in range(2):
        first = np.ones(width, "f4")
        norms = [(first, first, 1e-5, False), (last, last, Eps(), False)]
        if position:
            norms = [(last, first, Eps(), False), (last, last, 1e-5, False)]
        named = {"weights": weights, "query": x, "key": x, "value": x, "need_weights": False,
                 "average_attn_weights": True, "is_causal": False, "batch_first": True, "add_zero_attn": False,
                 "masked_rows": "zero", "dropout_p": 0.0, "dropout_seed": 0, "dropout_call": 0, "norm_first": False,
                 "is_self_attention": True, "attention_norm": norms[0], "activation": "relu", "is_gated": False,
                 "feed_forward_norm": norms[1], "zeroes_padding": False}
        with pytest.raises(ValueError, match="parameters of a norm"):
            _core.transform(*[named.get(name) for name in inspect.signature(_core.transform).parameters])


def test_out_that_warns():
    """What np.broadcast_arrays() returns warns when it is written to; the filter may do anything."""
    module = layer(8, 2, batch_first=True)
    for change in CHANGES.values():
        given = call_arguments()
        given["out"] = np.broadcast_arrays(np.zeros((40, 8), "f4"), np.zeros((2, 40, 8)))[0]
        shown = []

        def show(*_, **__):
            shown.append(None)
            if len(shown) == 1:
                change(given["query"])  # noqa: B023 - called before the next turn

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            got = outcome(lambda: module(**given))
            assert shown
            assert_same_outcome(got, outcome(lambda: module(**given)))


CHANGING = """
    import itertools, threading, time
    import numpy as np
    import mha_c
    from mha_c.functional import multi_head_attention_forward, scaled_dot_product_attention
    from helpers import inputs, lasting_inputs, layer, normal

    def churn():
        "Takes what memory was freed, and fills it."
        return [np.full(size, np.nan, "f4") for size in (10, 1000, 100_000) for _ in range(50)]

    module = layer(64, 4, batch_first=True)
    given = [x.copy() for x in inputs(2, 700, 700, 64)]
    want = module(*given)[0].tobytes()
"""


def test_shapes_that_another_thread_changes():
    """Casting a mask and copying an input let other threads run: none of them changes what was checked."""
    run_child(CHANGING + """
    padding, mask = np.zeros((2, 700), "f4"), np.zeros((700, 700), "f2")
    strided = np.zeros((2, 700, 128), "f4")[..., ::2]
    stop = threading.Event()

    def change():
        while not stop.is_set():
            for shape, value_shape in (((1400,), (1400, 64)), ((2, 700), (2, 700, 64))):
                padding.shape = shape
                given[2].shape = value_shape

    def attempt(call, *arguments, **options):
        try:
            call(*arguments, **options)
            return 0
        except (AssertionError, RuntimeError):
            return 1

    small = layer(64, 4, batch_first=True)
    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    begun, outcomes = time.process_time(), []
    while time.process_time() - begun < 2 or not 0 < sum(outcomes) < len(outcomes):
        outcomes.append(attempt(small, given[0][:, :1], *given[1:], key_padding_mask=padding, attn_mask=mask[:1],
                                need_weights=False))
        outcomes.append(attempt(scaled_dot_product_attention, strided[:, :1], strided, given[2], mask[:1]))
    stop.set()
    thread.join()
    """)


# A call of half a second, again until the resizing falls into it.
MEANWHILE = """
    with mha_c.num_threads(1):
        original = lasting_inputs(module)
        want = module(*original, need_weights=False)[0].tobytes()
        for seconds in itertools.cycle([0.03, 0.1, 0.3]):
            given = [x.copy() for x in original]
            start(seconds)
            try:
                got = module(*given, need_weights=False)[0].tobytes()
            except AssertionError:
                pass  # it came before the call
            if len(refused) >= 3:
                break
"""

RESIZERS = {
    "another thread": """
    def start(seconds):
        threading.Timer(seconds, resize).start()
    """ + MEANWHILE,
    "a signal handler": """
    import signal
    signal.signal(signal.SIGALRM, lambda *_: resize())
    def start(seconds):
        signal.setitimer(signal.ITIMER_REAL, seconds)
    """ + MEANWHILE,
    "__index__ of the number of threads": """
    class Number:
        asked = 0
        def __index__(self):
            Number.asked += 1
            if Number.asked > 1:
                resize()
            return 1
    with mha_c.num_threads(Number()):
        got = module(*given)[0].tobytes()
    """,
}


@pytest.mark.parametrize("who", RESIZERS)
def test_memory_that_others_free_during_a_call(who):
    """resize(refcheck=False) asks nobody who uses an array; that of a running call it cannot free."""
    run_child(CHANGING + """
    refused = []

    def resize():
        for array in given:
            try:
                array.resize((1,), refcheck=False)
            except ValueError:
                refused.append(None)
        churn()
    """ + RESIZERS[who] + """
    assert len(refused) >= 3 and got == want
    given[0].resize((1,), refcheck=False)  # nobody's business afterwards
    """)


def test_weights_that_others_free_during_a_call():
    """The key weights of the function are read where they lie, while inputs are still being looked at."""
    run_child(CHANGING + """
    E = 64
    weights = [np.array(normal((E, E), seed=i)) for i in range(3)]
    query, key = normal((1, 1, E)), normal((3000, 1, E))
    refused = []

    class Query:
        shape = query.shape
        def __array__(self, dtype=None, copy=None):
            try:
                weights[1].resize((1,), refcheck=False)
            except ValueError:
                refused.append(None)
            churn()
            return query

    def call(query):
        return multi_head_attention_forward(
            query, key, key, E, 4, None, None, None, None, False, 0.0, normal((E, E)), None, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=weights[0], k_proj_weight=weights[1],
            v_proj_weight=weights[2])[0].tobytes()

    assert call(query) == call(Query()) and refused
    weights[1].resize((1,), refcheck=False)
    """)


# ------------------------------------------------------------------------------------------- objects that raise


class Custom(Exception):
    pass


def raising(error, *names):
    """An object that raises whenever one of these attributes is asked for."""
    def fail(self):
        raise error

    return type("Raising", (), {name: property(fail) for name in names})()


PROTOCOLS = ("__array__", "__array_interface__", "__array_struct__", "__dlpack__")
ERRORS = [Custom(), KeyboardInterrupt(), SystemExit(3), MemoryError(), RecursionError(), GeneratorExit(), StopIteration()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_that_raise(protocol, error):
    """Whatever they raise is what the call raises, from every argument."""
    module = layer(8, 2, batch_first=True)
    given = call_arguments()
    want = module(**{**given, "out": None})
    for name in ORDER[:-1]:
        with pytest.raises(type(error)) as caught:
            module(**{**given, name: raising(error, protocol)})
        assert caught.value is error
    for i in range(4):
        arguments = [*inputs(2, 40, 40, 8), given["attn_mask"]]
        arguments[i] = raising(error, protocol)
        with pytest.raises(type(error)) as caught:
            functional.scaled_dot_product_attention(*arguments)
        assert caught.value is error
    np.testing.assert_array_equal(module(**{**given, "out": None})[0], want[0])


class Untrue:
    """Is neither true nor false, and no number."""

    def fail(self):
        raise Custom

    __bool__ = __index__ = __float__ = __int__ = __len__ = __eq__ = __gt__ = fail
    __hash__ = None


@pytest.mark.parametrize("name", ["need_weights", "average_attn_weights", "is_causal"])
def test_flags_that_raise(name):
    with pytest.raises(Custom):
        layer(8, 2)(*inputs(None, 5, 5, 8), **{name: Untrue()})


@pytest.mark.parametrize("name", ["batch_first", "add_zero_attn", "masked_rows", "dropout", "dropout_seed"])
def test_attributes_that_raise(name):
    """They may be assigned; what cannot be used says so then, or in the next call."""
    module = layer(8, 2, dropout=0.5, training=True)
    x = normal((5, 8))
    for wrong in (Untrue(), object(), -1, 2**64, 1e400, "1", None, [], np.zeros(3)):
        got = outcome(lambda: (setattr(module, name, wrong), module(x, x, x)))
        assert got.error is None or isinstance(got.error, Custom | TypeError | ValueError | OverflowError | RuntimeError)
    assert layer(8, 2)(x, x, x)[0].shape == (5, 8)


def test_numbers_of_threads_that_raise():
    with pytest.raises(Custom):
        mha_c.set_num_threads(Untrue())
    with pytest.raises(Custom), mha_c.num_threads(Untrue()):
        pytest.fail("the block was entered")

    class Later:
        """Is a number the first time."""

        asked = 0

        def __index__(self):
            self.asked += 1
            if self.asked > 1:
                raise Custom
            return 2

    given = inputs(2, 200, 200, 64)
    with mha_c.num_threads(Later()), pytest.raises(Custom):
        layer(64, 4, batch_first=True)(*given)


# ------------------------------------------------------------------------------------------- objects that lie


def interface(x, **changes):
    """x by its array interface, with some entries changed or, if None, left out."""
    entries = {**x.__array_interface__, "strides": None, **changes}
    entries = {name: value for name, value in entries.items() if value is not None}
    return type("Interface", (), {"__array_interface__": entries, "keep": x})()


def method(**methods):
    return type("Methods", (), methods)()


X = normal((5, 8))
LIES = {
    "no shape": lambda: interface(X, shape=None),
    "no type": lambda: interface(X, typestr=None),
    "shape of text": lambda: interface(X, shape=("a", "b")),
    "shape no tuple": lambda: interface(X, shape=5),
    "negative shape": lambda: interface(X, shape=(-5, 8)),
    "shape beyond 64 bits": lambda: interface(X, shape=(2**62, 2**62)),
    "shape beyond Python's sizes": lambda: interface(X, shape=(2**70, 8)),
    "too few strides": lambda: interface(X, strides=(32,)),
    "strides of text": lambda: interface(X, strides=("a", "b")),
    "data of text": lambda: interface(X, data="abc"),
    "data of one number": lambda: interface(X, data=(1,)),
    "unknown type": lambda: interface(X, typestr="<q99"),
    "too many axes": lambda: interface(X, shape=(1,) * 100),
    "interface no dict": lambda: method(__array_interface__=3),
    "struct no capsule": lambda: method(__array_struct__=3),
    "array method no method": lambda: method(__array__=3),
    "array method returns a list": lambda: method(__array__=lambda *_, **__: [1.0]),
    "array method returns None": lambda: method(__array__=lambda *_, **__: None),
    "array method returns itself": lambda: method(__array__=lambda self, *_, **__: self),
    "array method takes nothing": lambda: method(__array__=lambda: X),
    "array method recurses": lambda: method(__array__=lambda self, *_, **__: np.asarray(self)),
    "DLPack no method": lambda: method(__dlpack__=3, __dlpack_device__=lambda self: (1, 0)),
    "DLPack no capsule": lambda: method(__dlpack__=lambda *_, **__: 3, __dlpack_device__=lambda self: (1, 0)),
    "DLPack used twice": lambda: method(__dlpack__=lambda *_, used=used_capsule(), **__: used,
                                        __dlpack_device__=lambda self: (1, 0)),
    "DLPack on a GPU": lambda: method(__dlpack__=lambda *_, **__: X.__dlpack__(dl_device=(2, 0)),
                                      __dlpack_device__=lambda self: (2, 0)),
    "released buffer": lambda: released(memoryview(X.tobytes()).cast("f", X.shape)),
    "buffer of text": lambda: memoryview(np.full((5, 8), "ab")),
    "buffer of pointers": lambda: memoryview(np.full((5, 8), None)),
    "weak reference": lambda: __import__("weakref").proxy(X),
}


def used_capsule():
    source = method(__dlpack__=lambda *_, capsule=X.__dlpack__(), **__: capsule, __dlpack_device__=lambda self: (1, 0))
    np.from_dlpack(source)
    return source.__dlpack__()


def released(view):
    view.release()
    return view


@pytest.mark.parametrize("lie", LIES)
def test_objects_that_lie(lie):
    """What NumPy or the protocol can tell is refused with an exception (they trust addresses, sizes and strides); a
    proxy tells no lie."""
    module = layer(8, 2)
    want = module(X, X, X)
    for i, name in enumerate(ORDER[:3]):
        given = {"query": X, "key": X, "value": X}
        got = outcome(lambda: module(**{**given, name: LIES[lie]()}))  # noqa: B023
        assert (got.error is None) == (lie == "weak reference"), f"{i}: {got}"
    for name in ("attn_mask", "key_padding_mask"):
        assert outcome(lambda: module(X, X, X, **{name: LIES[lie]()})).error is not None  # noqa: B023
    assert outcome(lambda: functional.scaled_dot_product_attention(X, LIES[lie](), X)).error is not None or (
        lie == "weak reference")
    np.testing.assert_array_equal(module(X, X, X)[0], want[0])


def test_arrays_that_differ_each_time():
    """The array of an object is asked for once in each call."""
    module = layer(8, 2)
    asked = []

    class Fickle:
        @property
        def shape(self):
            return (5, 8 + len(asked))

        def __array__(self, dtype=None, copy=None):
            asked.append(None)
            return normal((5, 8)) if len(asked) % 2 else np.zeros(3, "i4")

    fickle = Fickle()
    np.testing.assert_array_equal(module(fickle, fickle, fickle)[0], module(X, X, X)[0])
    assert len(asked) == 1


def test_shapes_that_lie_to_the_function():
    """The function looks at shapes before the core does; the arrays are what counts."""
    weights = [normal((8, 8), seed=i) for i in range(4)]

    def call(query, key):
        return functional.multi_head_attention_forward(
            query, key, key, 8, 2, None, None, None, None, False, 0.0, weights[3], None, use_separate_proj_weight=True,
            q_proj_weight=weights[0], k_proj_weight=weights[1], v_proj_weight=weights[2])

    for shape in ((5, 8), (7, 8), (2**40, 8), (5, 8, 1), (), (5,), (-5, 8)):
        liar = OnDemand(normal((3, 16)), lambda: None)
        liar.shape = shape
        assert outcome(lambda: call(liar, X)).error is not None  # noqa: B023
        assert outcome(lambda: call(X, liar)).error is not None  # noqa: B023


# ------------------------------------------------------------------------------------------- objects that call back


def test_calling_back():
    """A protocol method may call the layer, replace its parameters, or drop every name of it."""
    module = layer(8, 2)
    other = layer(8, 2, seed=5).state_dict()
    want = module(X, X, X)[0].copy()
    inner = []

    def check(action):
        fresh = layer(8, 2)
        got = fresh(X, OnDemand(X, lambda: action(fresh)), X)[0]
        np.testing.assert_array_equal(got, want)  # with the parameters that it began with

    check(lambda m: inner.append(m(X, X, X)[0]))
    check(lambda m: inner.append(m(X, OnDemand(X, lambda: inner.append(m(X, X, X)[0])), X)[0]))
    check(lambda m: m.load_state_dict(other))
    check(lambda m: m.to("float64"))
    check(lambda m: setattr(m, "in_proj_weight", np.zeros((24, 8), "f4")))
    check(lambda m: m.__dict__.clear() or gc.collect())
    check(lambda m: setattr(m, "_parameters", None))
    assert len(inner) == 3
    for result in inner:
        np.testing.assert_array_equal(result, want)


def test_dropping_the_module():
    """The package may leave sys.modules, and be collected as far as possible, in the middle of a call."""
    run_child("""
    import gc, sys
    import numpy as np
    import mha_c
    from helpers import layer, normal
    x = normal((5, 8))
    class Drop:
        def __array__(self, dtype=None, copy=None):
            global mha_c, layer
            for name in [name for name in sys.modules if name.startswith("mha_c")]:
                module = sys.modules.pop(name)
                module.__dict__.clear()
            del mha_c, layer, module
            gc.collect()
            return x
    module = layer(8, 2)
    want = module(x, x, x)[0]
    np.testing.assert_array_equal(module(x, Drop(), x)[0], want)
    del module
    gc.collect()
    import mha_c
    from importlib import reload
    import helpers
    np.testing.assert_array_equal(helpers.layer(8, 2)(x, x, x)[0], want)
    """)


def test_loading_that_calls_back():
    """A state dict whose values load others: the outermost load is the last, and sets everything."""
    module = layer(8, 2)
    state = {name: array.copy() for name, array in layer(8, 2, seed=1).state_dict().items()}
    other = layer(8, 2, seed=2).state_dict()

    class Value(OnDemand):
        pass

    name = "in_proj_bias"
    module.load_state_dict({**state, name: Value(state[name], lambda: module.load_state_dict(other))})
    for key, array in module.state_dict().items():
        np.testing.assert_array_equal(array, state[key])


@pytest.mark.parametrize("hostile", ["getitem raises", "keys raises", "iter raises", "value raises", "value lies",
                                     "keys grow", "no key at all"])
def test_state_dicts_that_fail(hostile):
    """Nothing is loaded in part."""
    class Dict(dict):
        def __getitem__(self, name):
            if hostile == "getitem raises" and name == "out_proj.bias":
                raise Custom
            return super().__getitem__(name)

        def keys(self):
            if hostile == "keys raises":
                raise Custom
            if hostile == "keys grow":
                return [*super().keys(), f"extra{random.random()}"]
            return super().keys()

        def __iter__(self):
            if hostile == "iter raises":
                raise Custom
            return super().__iter__()

        items = None

    module = layer(8, 2)
    before = {name: array.tobytes() for name, array in module.state_dict().items()}
    state = Dict(layer(8, 2, seed=1).state_dict())
    if hostile == "value raises":
        state["out_proj.bias"] = raising(Custom(), "__array__")
    if hostile == "value lies":
        state["out_proj.bias"] = OnDemand(np.zeros(7), lambda: None)
    if hostile == "no key at all":
        state.clear()
    got = outcome(lambda: module.load_state_dict(state))
    after = {name: array.tobytes() for name, array in module.state_dict().items()}
    assert after == ({name: array.tobytes() for name, array in layer(8, 2, seed=1).state_dict().items()}
                     if got.error is None else before)


# ------------------------------------------------------------------------------------------- parameters, copies, pickles


def test_parameters_are_new_arrays():
    """Whoever assigns to the shape, type or strides of a parameter's array has changed that array alone."""
    module = layer(8, 2, add_bias_kv=True)
    before = {name: (array.shape, array.dtype, array.tobytes()) for name, array in module.state_dict().items()}
    want = module(X, X, X)[0]
    for change in ("one axis", "one more axis", "other type", "strides of 0"):
        for array in [*module.parameters(), *module.state_dict().values(), module.in_proj_weight, module.out_proj.bias]:
            CHANGES[change](array)
    assert {name: (array.shape, array.dtype, array.tobytes()) for name, array in module.state_dict().items()} == before
    module.load_state_dict(module.state_dict())
    module.in_proj_bias = module.in_proj_bias
    for same in (module, copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        np.testing.assert_array_equal(same(X, X, X)[0], want)


def test_states_that_were_tampered_with():
    """An unpickled or patched layer whose parts do not belong together raises; it does not read past its weights."""
    small, large = layer(8, 2), layer(64, 4)
    x = normal((5, 64))

    def tampered(**changes):
        module = copy.copy(small)
        module.__dict__.update(changes)
        return module

    for changes in ({"_parameters": large._parameters}, {"_parameters": None}, {"_parameters": large},
                    {"training": None}, {"batch_first": "yes"}, {"masked_rows": b"torch"}):
        module = tampered(**changes)
        for given in (X, x):
            got = outcome(lambda: module(given, given, given))  # noqa: B023
            if got.error is None:
                assert got.result[0].shape == given.shape
    mixed = copy.copy(small._parameters)
    mixed.weights = large._parameters.weights
    module = tampered(_parameters=mixed)
    assert module(x, x, x)[0].shape == (5, 64)
    assert outcome(lambda: module(X, X, X)).error is not None
    state = small.__reduce_ex__(2)
    for broken in ({}, {"_parameters": 3}, {"dropout": Untrue()}):
        rebuilt = state[0](*state[1])
        rebuilt.__dict__.update(broken)
        assert outcome(lambda: rebuilt(X, X, X)).error is not None  # noqa: B023


def test_pickles_of_parameters_that_do_not_fit():
    parameters = layer(8, 2)._parameters
    make, (widths, arrays, dtype, _) = parameters.__reduce__()
    wrong = [(widths._replace(num_heads=3), arrays, dtype), (widths._replace(kdim=5), arrays, dtype),
             (widths._replace(head_dim=2**40), arrays, dtype), (widths._replace(num_heads=-1), arrays, dtype),
             (widths, {**arrays, "in_proj_bias": np.zeros(3, "f4")}, dtype), (widths, {}, dtype),
             (widths, arrays, np.dtype(object)), (widths, arrays, np.dtype("c8")), (None, arrays, dtype)]
    for arguments in wrong:
        with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
            make(*arguments)


# ------------------------------------------------------------------------------------------- the core's own functions


def test_garbage_for_the_core():
    """Every argument of every function of the extension, replaced by everything: an exception each time, or a result."""
    def try_out(call, *arguments):
        error = outcome(lambda: call(*arguments)).error
        assert not isinstance(error, SystemError), (call, arguments)  # a failure without an exception
        return error

    module = layer(8, 2)
    weights = module._parameters.weights
    make, (widths, arrays, *_) = module._parameters.__reduce__()
    q, k, v = np.split(arrays["in_proj_weight"], 3)
    x = X[:, None]
    named = {"weights": weights, "query": x, "key": x, "value": x, "need_weights": False, "average_attn_weights": True,
             "is_causal": False, "batch_first": False, "add_zero_attn": False, "masked_rows": "zero", "dropout_p": 0.0,
             "dropout_seed": 0, "dropout_call": 0, "enable_gqa": False, "paths": np.array([False]), "input": "key"}
    whole = mha_c.TransformerEncoderLayer(8, 2, 4, seed=0)
    norm = (np.ones(8, "f4"), None, 1e-5, False)
    around = {"norm_first": True, "is_self_attention": True, "attention_norm": norm, "feed_forward_norm": norm,
              "linear1": whole.linear1._parameters.packed, "linear2": whole.linear2._parameters.packed,
              "activation": "gelu", "is_gated": False, "zeroes_padding": True}

    def arguments_of(function, **others):
        return [{**named, **others}.get(name) for name in inspect.signature(function).parameters]

    calls = {
        _core.forward: arguments_of(_core.forward, query=X, key=X, value=X, need_weights=True, masked_rows="torch"),
        _core.scaled_dot_product_attention: arguments_of(_core.scaled_dot_product_attention),
        _core.Weights: [2, 2, 4, 4, "float32", q, k, v, arrays["in_proj_bias"], None, None, arrays["out_proj.weight"],
                        arrays["out_proj.bias"]],
        _core.set_num_threads: [2],
        _core.takes_few_queries: arguments_of(_core.takes_few_queries),
        _core.attend: arguments_of(_core.attend),
        _core.scores: arguments_of(_core.scores, need_weights=True, average_attn_weights=False),
        _core.project: arguments_of(_core.project, x=x),
        _core.transform: arguments_of(_core.transform, query=X, key=X, value=X, **around),
        _core.Linear: ["float32", q, None],
        _core.linear: [_core.Linear("float32", q, None), X],
        _core.activate: [X, "silu", True],
    }
    garbage = [None, True, 0, -1, 2**31, 2**63, 2**64, -(2**63), 0.5, float("nan"), float("inf"), "torch", b"ab", [],
               (), {}, object(), Untrue(), X, X.T, X[:0], X[0], X[None, None], X.astype("f8"), X.astype("f2"),
               X.astype(">f4"), X.astype(object), X.astype(bool), np.zeros((), "f4"), np.zeros((0, 8), "f4"),
               np.zeros((5, 5), bool), weights, type, raising(Custom(), *PROTOCOLS), np.float32(1), memoryview(b"abcd"),
               np.broadcast_to(np.float32(1), (5, 8)), norm, (*norm, 1), (np.ones(8), None, 1e-5, False),
               (X[0], np.ones((), "f4"), 1e-5, 0), (None, None, Untrue(), 0), (None, None, 0, Untrue()),
               around["linear1"], _core.Linear("float64", q.astype("f8"), None), _core.Linear("float32", q[:, :0].copy(), None), "geglu"]
    before = mha_c.get_num_threads()
    for call, arguments in calls.items():
        assert try_out(call, *arguments) is None
        for i in range(len(arguments)):
            for wrong in garbage:
                try_out(call, *arguments[:i], wrong, *arguments[i + 1:])
        for count in range(len(arguments)):
            try_out(call, *arguments[:count])
        assert try_out(call, *arguments, *arguments) is not None
    mha_c.set_num_threads(before)
    assert outcome(lambda: _core.Weights.__new__(_core.Weights)).error is not None
    assert outcome(lambda: copy.copy(weights)).error is not None
    assert outcome(lambda: pickle.dumps(weights)).error is not None
    assert outcome(lambda: type("Sub", (_core.Weights,), {})).error is not None


def test_parameters_that_cannot_be():
    """Numbers that overflow, another dtype than the first weight's, names; and what is there counts its bytes."""
    _, (_, arrays, *_) = layer(8, 2)._parameters.__reduce__()
    given = [*np.split(arrays["in_proj_weight"], 3), arrays["in_proj_bias"], None, None, arrays["out_proj.weight"],
             arrays["out_proj.bias"]]
    for widths in ((2**62, 1, 2, 1), (2**62, 1, 1, 2)):
        with pytest.raises(ValueError, match="too large"):
            _core.Weights(*widths, "float32", *given)
    for i in range(len(given)):
        if given[i] is not None:
            with pytest.raises(ValueError, match="must have the shape|elements for the"):
                _core.Weights(2, 2, 4, 4, "float32", *given[:i], given[i][:-1].copy(), *given[i + 1:])
    with pytest.raises(TypeError, match="no keyword"):
        _core.Weights(2, 2, 4, 4, "float32", *given, num_heads=2)
    assert _core.Weights(2, 2, 4, 4, "float32", *given).nbytes == sum(array.nbytes for array in given if array is not None)
    wider = [array if array is None else array.astype("f8") for array in given]
    for mixed, name in (([given[0], wider[1]], "float32"), ([wider[0], given[1]], "float64")):
        with pytest.raises(TypeError, match=f"k_proj_weight must be of dtype {name}"):
            _core.Weights(2, 2, 4, 4, name, *mixed, *given[2:])


def test_linear_maps_and_activations_that_cannot_be():
    """What does not fit is refused with words about it; what fits gives its numbers, and counts its bytes."""
    weight, bias, x = normal((6, 8)), normal((6,), seed=1), normal((5, 8), seed=2)
    for arguments in ((weight[0], None), (weight, weight)):
        with pytest.raises(TypeError, match="weight must be a matrix and bias a vector or None"):
            _core.Linear("float32", *arguments)
    for arguments in ((weight, bias.astype("f8")), (weight.astype("i4"), None), (weight.tolist(), None)):
        with pytest.raises(TypeError, match="(weight|bias) must be (of dtype float32|a NumPy array), not"):
            _core.Linear("float32", *arguments)
    for arguments in ((weight.T, None), (weight, np.repeat(bias, 2)[::2])):
        with pytest.raises(ValueError, match="(weight|bias) must be C-contiguous"):
            _core.Linear("float32", *arguments)
    halves = type("float16", (np.void,), {})  # no more than a name
    for dtype in ("int8", ">f2", ">f4", np.dtype((halves, [("a", "i1")])), "O", "f8,f8"):
        with pytest.raises(TypeError, match="parameters must be of float32, float64, bfloat16 or float16, not "):
            _core.Linear(dtype, weight, bias)
    with pytest.raises(ValueError, match="bias has 5 elements for the 6 rows of weight"):
        _core.Linear("float32", weight, bias[:5])
    with pytest.raises(TypeError, match="Linear.. takes no keyword arguments"):
        _core.Linear("float32", weight, bias, bias=bias)
    linear = _core.Linear("float32", weight, bias)
    assert linear.nbytes == weight.nbytes + bias.nbytes and _core.Linear("float32", weight, None).nbytes == weight.nbytes
    for wrong in ((), (linear,), (linear, x, x), (3, x)):
        with pytest.raises(TypeError, match="linear takes a Linear and an input"):
            _core.linear(*wrong)
    for wrong, words in ((np.zeros((), "f4"), "need to be at least 1D"), (normal((2, 5, 7)), r"\(10x7 and 8x6\)"),
                         (normal((9,)), r"\(1x9 and 8x6\)"),
                         (x.astype("f8"), "but got Double and Float")):
        with pytest.raises(RuntimeError, match=words):
            _core.linear(linear, wrong)
    for arguments, words in (((x, "tanh", False), "activation must be 'relu', .* not 'tanh'"),
                             ((x[:, :7], "silu", True), "of an even length"),
                             ((np.zeros((), "f4"), "silu", False), "a last axis")):
        with pytest.raises(ValueError, match=words):
            _core.activate(*arguments)
    with pytest.raises(TypeError, match="must be of float32, float64, bfloat16 or float16, but is of Int"):
        _core.activate(x.astype("i4"), "relu", False)
    with pytest.raises(TypeError, match="activate expected 3 arguments, got 2"):
        _core.activate(x, "relu")

    strided = np.repeat(np.repeat(x, 2, axis=1)[:, ::2], 2, axis=0)[::2]
    for given in (x, x[0], x[None, :, None], strided, np.asfortranarray(x), x.astype(">f4"), x[:0]):
        want = (given.astype("f8") @ weight.T + bias).astype("f4")
        np.testing.assert_allclose(_core.linear(linear, given), want, rtol=0, atol=1e-5, strict=True)
        relu = _core.activate(given, "relu", False)
        np.testing.assert_array_equal(relu, np.maximum(given, 0).astype("f4"), strict=True)
        np.testing.assert_array_equal(_core.activate(given, "relu", True), relu[..., :4] * given[..., 4:].astype("f4"))


# ------------------------------------------------------------------------------------------- out=, wherever it lies


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("where", ["query", "key", "value", "attn_mask", "key_padding_mask"])
def test_out_at_every_distance_from_an_input(where, dtype):
    """One memory, an argument in it, and the output beginning at every number before, within and behind it."""
    module = layer(8, 2, dtype=dtype)
    shape = {"attn_mask": (6, 6), "key_padding_mask": (6,)}.get(where, (6, 8))
    inside = normal(shape, dtype, 7)
    given = dict(zip(ORDER, (normal((6, 8), dtype, i) for i in range(3))), **{where: inside})
    want = module(**given)
    for begin in range(0, 48 + inside.size + 1):
        memory = np.full(48 + inside.size + 48, np.nan, dtype)
        argument = memory[48:48 + inside.size].reshape(shape)
        argument[...] = inside
        got = module(**{**given, where: argument}, out=memory[begin:begin + 48].reshape(6, 8))
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
        beside = np.ones(memory.size, bool)
        beside[begin:begin + 48] = False
        beside[48:48 + inside.size] = False
        assert np.isnan(memory[beside]).all()


def test_out_between_the_numbers_of_an_input():
    """Interleaved, backwards, transposed over the input itself, and over all inputs at once."""
    module = layer(8, 2)
    want = module(X, X, X)[0]
    memory = np.zeros((5, 16), "f4")
    for input_at, out_at in ((slice(None, None, 2), slice(1, None, 2)), (slice(None, 8), slice(7, None, -1)),
                             (slice(None, 8), slice(4, 12)), (slice(15, 7, -1), slice(8, None))):
        memory[:, input_at] = X
        x = memory[:, input_at]
        np.testing.assert_array_equal(module(x, x, x, out=memory[:, out_at])[0], want)
    square = normal((8, 8))
    want = module(square, square, square)[0]
    module(square, square, square, out=square.T)
    np.testing.assert_array_equal(square.T, want)


def test_out_that_overlaps_itself():
    """Numbers that share memory hold one of those that were written there."""
    module = layer(8, 2)
    want = module(X, X, X)[0]
    row = np.zeros(8, "f4")
    module(X, X, X, out=np.lib.stride_tricks.as_strided(row, (5, 8), (0, 4)))
    assert any((row == want[i]).all() for i in range(5))
    line = np.zeros(12, "f4")
    module(X, X, X, out=np.lib.stride_tricks.as_strided(line, (5, 8), (4, 4)))
    for i, number in enumerate(line):
        assert number in [want[j, i - j] for j in range(5) if 0 <= i - j < 8]


@pytest.mark.skipif(sys.platform != "linux", reason="an empty batch of 2**40 items needs no memory, but some systems ask")
def test_empty_arrays_of_any_length():
    """No result takes no memory, whatever the other sizes; nor does the product of sizes overflow."""
    module = layer(8, 2, batch_first=True)
    for n, length, s in ((2**40, 0, 5), (2**40, 0, 0), (0, 2**40, 5), (0, 5, 2**40), (2**33, 0, 2**20), (0, 2**50, 0)):
        query = np.broadcast_to(np.float32(1), (n, length, 8))
        key = np.broadcast_to(np.float32(1), (n, s, 8))
        output, weights = module(query, key, key)
        assert output.shape == (n, length, 8) and weights.shape == (n, length, s)
        attended = outcome(lambda: functional.scaled_dot_product_attention(query, key, key))  # noqa: B023
        if attended.error is None:
            assert attended.result.shape == (n, length, 8)
        else:  # keys whose features do not lie side by side are copied
            assert isinstance(attended.error, MemoryError) and n * s > 2**32


def test_empty_rows_of_a_layer():
    """Of any number, they take no time either."""
    for shape in ((2**58, 0), (0, 2**58)):
        x = np.zeros((*shape, 4), "f4")
        for norm_first in (False, True):
            module = mha_c.TransformerEncoderLayer(4, 2, 8, padded="zero", batch_first=True, norm_first=norm_first).eval()
            assert module(x, src_key_padding_mask=np.zeros(shape, bool)).shape == x.shape
        decoder = mha_c.TransformerDecoderLayer(4, 2, 8, batch_first=True).eval()
        assert decoder(x, x).shape == x.shape
    rows = np.zeros((2**60, 0), "f4")
    assert mha_c.Linear(0, 0)(rows).shape == rows.shape
    for is_gated in (False, True):
        assert _core.activate(rows, "gelu", is_gated).shape == rows.shape
