# SPDX-License-Identifier: Apache-2.0
"""Models of torch whose attention computes with mha_c: torch, with the same model, is the judge.

Whether mha_c or torch computed is seen by counting its calls: `computed_by_mha_c`.
"""

import copy
import io
import os
import pickle
import threading
import weakref

import mha_c
import numpy as np
import pytest
from helpers import outcome
from mha_c.display.coverage import Calls

torch = pytest.importorskip("torch")
from mha_c.torch import ReplacedAttention, coverage, replace_attention, restore_attention  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402
from unusual_layers import MADE_ANEW, PARAMETRIZED, STORED, Doubling, Named, OwnForward  # noqa: E402

causal = nn.Transformer.generate_square_subsequent_mask


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def fused_path():
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(False)


@pytest.fixture
def computed_by_mha_c(monkeypatch):
    """Calls a function without gradients, and tells how many calls of attention mha_c computed in it."""
    calls = []
    original = Calls.add

    def counting(self, reason="", count=1):
        original(self, reason, count)
        calls.append(not reason)

    def count(function):
        calls.clear()
        with torch.no_grad():
            function()
        return sum(calls)

    monkeypatch.setattr(Calls, "add", counting)
    return count


def random_parameters(model):
    """New layers have zero biases, which hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def pair(*args, **options):
    """torch's layer, and a replaced copy of it."""
    theirs = random_parameters(nn.MultiheadAttention(*args, **options))
    return theirs, replace_attention(copy.deepcopy(theirs))


def assert_same(ours, theirs, tolerance=None):
    """Shapes, dtypes and numbers; the tolerance, beside the largest number, is far above rounding and far below any
    mistake."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, tolerance)
    elif theirs is not None:
        tolerance = tolerance or (1e-12 if theirs.dtype == torch.float64 else 5e-6)
        assert ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
        largest = theirs.nan_to_num().abs().max().item() if theirs.numel() and not theirs.is_meta else 1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(largest, 1), equal_nan=True)


# ------------------------------------------------------------------------------------------- one layer


BOTH_KEYS = {"add_bias_kv": True, "add_zero_attn": True}
EXTRAS = ({}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, BOTH_KEYS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("layout", ["batch_first", "length_first", "unbatched"])
def test_layers(layout, extras, dtype, computed_by_mha_c):
    """Every mask with every way to ask for weights, in self- and cross-attention."""
    n, length, heads = 3, 5, 2
    for kdim, s in ((None, length), (None, 7), (6, 7)):
        theirs, ours = pair(8, heads, kdim=kdim, vdim=kdim, batch_first=layout == "batch_first", dtype=dtype, **extras)

        def tensor(steps, features):
            shape = {"batch_first": (n, steps), "length_first": (steps, n), "unbatched": (steps,)}[layout]
            return torch.randn(*shape, features, dtype=dtype)

        query = tensor(length, 8)
        inputs = (query, query, query)
        if kdim is not None or s != length:
            inputs = (query, tensor(s, kdim or 8), tensor(s, kdim or 8))
        batch = () if layout == "unbatched" else (n,)
        hidden = torch.zeros(*batch, s, dtype=torch.bool)
        hidden[..., -2:] = True
        stacked = torch.randn(heads * (batch or (1,))[0], length, s, dtype=dtype)
        triangle = torch.triu(torch.full((length, s), -torch.inf, dtype=dtype), 1)
        calls = [
            {}, {"key_padding_mask": hidden}, {"key_padding_mask": torch.randn_like(hidden, dtype=dtype)},
            {"attn_mask": triangle}, {"attn_mask": triangle < 0}, {"attn_mask": stacked}, {"attn_mask": stacked > 1},
            {"attn_mask": triangle, "is_causal": True},  # the hint is right
            {"attn_mask": torch.zeros_like(triangle), "is_causal": True},  # it is wrong, and torch has its rules
            {"attn_mask": triangle, "key_padding_mask": hidden, "is_causal": True},
            {"attn_mask": torch.zeros_like(triangle), "key_padding_mask": hidden, "is_causal": True},
            {"key_padding_mask": torch.ones_like(hidden)},  # nothing is visible
        ]
        for call in calls:
            for weights in ({}, {"need_weights": False}, {"average_attn_weights": False}):
                with torch.no_grad():
                    expected = theirs(*inputs, **call, **weights)
                # Where torch goes by the hint, it hides the added keys too.
                by_hint = call.get("is_causal") and "key_padding_mask" not in call and "need_weights" in weights
                left = by_hint and not extras.keys().isdisjoint(BOTH_KEYS)
                assert computed_by_mha_c(lambda: assert_same(ours(*inputs, **call, **weights), expected)) == (not left)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)], ids=str)
def test_empty_inputs(shape, computed_by_mha_c):
    theirs, ours = pair(8, 2)
    x, other = torch.randn(*shape, 8), torch.randn(4, shape[1], 8)
    for inputs in ((x, x, x), (x, other, other), (other, x, x)):
        with torch.no_grad():
            expected = theirs(*inputs)
        assert computed_by_mha_c(lambda: assert_same(ours(*inputs), expected)) == 1


def test_outputs_are_tensors_like_any_others():
    _, ours = pair(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        output, weights = ours(x, x, x)
    for tensor in (output, weights):
        assert type(tensor) is torch.Tensor and tensor.is_contiguous() and not tensor.requires_grad
        tensor.add_(1)
    with torch.inference_mode():
        assert ours(x, x, x)[0].is_inference()
    output, weights = ours.requires_grad_(False)(x, x, x)  # nothing needs a gradient, whatever the mode
    assert not output.requires_grad


WRONG = {
    "no mask with the hint": ((5, 3, 8), {"is_causal": True}),
    "no mask with the hint, no weights": ((5, 3, 8), {"is_causal": True, "need_weights": False}),
    "width": ((5, 3, 6), {}),
    "rank": ((2, 5, 3, 8), {}),
    "integer mask": ((5, 3, 8), {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}),
    "mask shape": ((5, 3, 8), {"attn_mask": torch.zeros(5, 4)}),
    "mask batch": ((5, 3, 8), {"attn_mask": torch.zeros(3, 5, 5)}),
    "padding shape": ((5, 3, 8), {"key_padding_mask": torch.zeros(3, 4, dtype=torch.bool)}),
    "padding rank": ((5, 8), {"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}),
    "mask dtype": ((5, 3, 8), {"attn_mask": torch.zeros(5, 5, dtype=torch.float64)}),
    "mask dtype, no weights": ((5, 3, 8), {"attn_mask": torch.zeros(5, 5, dtype=torch.float64), "need_weights": False}),
    "unknown": ((5, 3, 8), {"mask": None}),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_errors_are_those_of_torch(case, batch_first):
    shape, call = WRONG[case]
    theirs, ours = pair(8, 2, batch_first=batch_first)
    x = torch.randn(shape)
    with torch.no_grad():
        results = [outcome(lambda: module(x, x, x, **call)) for module in (theirs, ours)]
    assert results[0].error is not None
    assert type(results[1].error) is type(results[0].error)
    assert str(results[1].error) == str(results[0].error).replace("MultiheadAttention.f", "ReplacedAttention.f")
    assert results[1].error.__context__ is None


def test_other_dtypes_and_objects_meet_torchs_errors():
    theirs, ours = pair(8, 2)
    x = torch.randn(5, 3, 8)
    for inputs in ((x.double(),) * 3, (x, x.double(), x), (x, x[:4], x), (x.numpy(),) * 3, (x, None, x),
                   (x.long(),) * 3, (x.tolist(),) * 3):
        with torch.no_grad():
            results = [outcome(lambda: module(*inputs)) for module in (theirs, ours)]
        assert type(results[1].error) is type(results[0].error) and str(results[1].error) == str(results[0].error)


@pytest.mark.parametrize("garbage", [None, 0, 1, "no", 0.5, torch.tensor(False), torch.ones(2), np.ones(2)], ids=repr)
@pytest.mark.parametrize("flag", ["need_weights", "average_attn_weights", "is_causal"])
def test_flags_that_are_no_bools(flag, garbage):
    """torch asks for the truth of some only where it needs it."""
    theirs, ours = pair(8, 2)
    x = torch.randn(5, 3, 8)
    for call in ({}, {"need_weights": False}, {"attn_mask": torch.zeros(5, 5), "need_weights": False}):
        with torch.no_grad():
            expected, got = (outcome(lambda: module(x, x, x, **{**call, flag: garbage})) for module in (theirs, ours))
        assert type(got.error) is type(expected.error) and str(got.error) == str(expected.error)
        if expected.error is None:
            assert_same(got.result, expected.result)


@pytest.mark.parametrize("error", [AssertionError, IndexError, RuntimeError, TypeError, ValueError, MemoryError])
def test_errors_of_ours_are_not_hidden(error, monkeypatch):
    """torch is asked where the checks refuse a call; what fails after them, or before, is for all to see."""
    _, ours = pair(8, 2)
    x, original = torch.randn(5, 3, 8), mha_c._core.forward

    def failing(*args):
        if args:
            original(*args)
        raise error("planted")

    with torch.no_grad():
        with monkeypatch.context() as planted:
            planted.setattr(mha_c._core, "forward", failing)
            with pytest.raises(error, match="planted"):
                ours(x, x, x)
            assert outcome(lambda: ours(x, x, x[:2])).error is not None and coverage(ours).left == 1
        ours(x, x, x)
        ours.refresh()
        monkeypatch.setattr(mha_c._core, "Weights", lambda *args: failing())
        with pytest.raises(error, match="planted"):
            ours(x, x, x)
    assert coverage(ours).here == 1 and coverage(ours).left == 1


def test_too_large_an_output_is_our_error():
    _, ours = pair(8, 2)
    x = torch.zeros(1, 1, 8).expand(2**28, 2**28, 8)
    with torch.no_grad(), pytest.raises(MemoryError):
        ours(x, x, x, need_weights=False)
    assert coverage(ours).rows[0].reason == "never called"


# ------------------------------------------------------------------------------------------- left to torch


def test_training_and_gradients(computed_by_mha_c):
    theirs, ours = pair(8, 2, dropout=0.5)
    x = torch.randn(5, 3, 8)
    for module in (theirs, ours):
        torch.manual_seed(1)
        module.train()(x, x, x)[0].sum().backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    assert computed_by_mha_c(lambda: ours(x, x, x)) == 0  # training
    ours.eval()
    assert computed_by_mha_c(lambda: ours(x, x, x)) == 1
    assert ours(x, x, x)[0].requires_grad
    ours.requires_grad_(False)
    for needs in range(4):
        inputs = [torch.randn(5, 3, 8) for _ in range(3)] + [torch.zeros(5, 5)]
        inputs[needs].requires_grad_()
        assert ours(*inputs[:3], attn_mask=inputs[3])[0].requires_grad
        assert computed_by_mha_c(lambda: ours(*inputs[:3], attn_mask=inputs[3])) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_whatever_watches_single_operations(computed_by_mha_c):
    theirs, ours = pair(8, 2)
    x = torch.randn(5, 3, 8)

    class Tagged(torch.Tensor):
        pass

    class Seeing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Intercepting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def in_mode(mode):
        with mode:
            return ours(x, x, x)

    def forward_mode():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert torch.autograd.forward_ad.unpack_dual(ours(dual, dual, dual)[0]).tangent is not None

    vmapped = torch.vmap(lambda item: ours(item, item, item)[0], in_dims=1, out_dims=1)
    for watched in (
            lambda: in_mode(torch.autocast("cpu", torch.bfloat16)),
            lambda: in_mode(Seeing()),
            lambda: in_mode(Intercepting()),
            lambda: ours(*[x.as_subclass(Tagged)] * 3),
            lambda: assert_same(vmapped(x), theirs(x, x, x)[0]),
            lambda: torch.jit.trace(ours, (x, x, x), check_trace=False),
            forward_mode):
        assert computed_by_mha_c(watched) == 0
    assert computed_by_mha_c(lambda: in_mode(torch.device("cpu"))) == 1  # which is about new tensors alone
    assert computed_by_mha_c(lambda: ours(x, x, x)) == 1


def test_other_memory(computed_by_mha_c):
    theirs, ours = (layer.to("meta") for layer in pair(8, 2, batch_first=True))
    x = torch.randn(3, 5, 8, device="meta")
    with torch.no_grad():
        expected = theirs(x, x, x)
    assert computed_by_mha_c(lambda: assert_same(ours(x, x, x), expected)) == 0


def test_views_and_parameters_as_inputs(computed_by_mha_c):
    theirs, ours = pair(8, 2)
    base = torch.randn(8, 3, 5, 2)
    for x in (base.permute(2, 1, 0, 3)[..., 0], nn.Parameter(torch.randn(5, 3, 8)), torch.randn(10, 3, 8)[::2],
              torch.randn(5, 1, 8).expand(5, 3, 8)):
        with torch.no_grad():
            expected = theirs(x, x, x)
        assert computed_by_mha_c(lambda: assert_same(ours(x, x, x), expected)) == 1


def test_functional_call_and_inference_mode(computed_by_mha_c):
    theirs, ours = pair(8, 2)
    x = torch.randn(5, 3, 8)
    for factor in (1, 2, 3):
        state = {key: factor * value.detach() for key, value in theirs.state_dict().items()}
        with torch.no_grad():
            expected = torch.func.functional_call(theirs, state, (x, x, x))
            assert_same(torch.func.functional_call(ours, state, (x, x, x)), expected)
    with torch.no_grad():
        assert_same(ours(x, x, x), theirs(x, x, x))

    with torch.inference_mode():
        untracked = replace_attention(nn.MultiheadAttention(8, 2)).eval()
    assert computed_by_mha_c(lambda: untracked(x, x, x)) == 0


def test_hooks():
    theirs, ours = pair(8, 2)
    seen = []
    x = torch.randn(5, 3, 8)
    for module in (theirs, ours):
        module.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
        module.register_forward_hook(lambda module, args, output: seen.append(output) or (output[0] * 2, output[1]))
    with torch.no_grad():
        assert_same(ours(x, x, x), theirs(x, x, x))
    assert len(seen) == 2


# ------------------------------------------------------------------------------------------- changed parameters


def step(optimizer, **options):
    """One step that changes nothing but the second row of one weight: a sample of its numbers would not show it."""
    def change(module):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        module.in_proj_weight.grad[1] = 1
        optimizer(module.parameters(), lr=0.5, **options).step()
    return change


def in_a_child(module):
    """Another process writes to shared memory, through NumPy."""
    array = module.share_memory().in_proj_weight.detach().numpy()
    child = os.fork()
    if child == 0:
        array *= 2
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def to_plain_tensors(module):
    """What merging LoRA weights leaves: tensors that are no parameters."""
    for owner, name in ((module, "in_proj_weight"), (module.out_proj, "weight")):
        merged = getattr(owner, name).detach() + 0.5
        delattr(owner, name)
        setattr(owner, name, merged)


def averaged(module):
    mean = torch.optim.swa_utils.AveragedModel(copy.deepcopy(module), avg_fn=lambda old, new, count: old + 1)
    mean.update_parameters(module), mean.update_parameters(module)
    module.load_state_dict(mean.module.state_dict())


def swapped(module):
    torch.utils.swap_tensors(module.in_proj_weight, nn.Parameter(module.in_proj_weight.detach() * 2))


def set_storage(module):
    module.in_proj_weight.set_(module.in_proj_weight.detach().clone() * 2)


def pruned(module):
    prune.l1_unstructured(module, "in_proj_weight", 0.5)


def int8_by_hand(module):
    weight = module.in_proj_weight
    scale = weight.abs().max() / 7
    weight.data.copy_((weight / scale).round().to(torch.int8) * scale)


def with_another(name):
    def change(module):
        setattr(module, name, nn.Parameter(getattr(module, name).detach() * 2))
    return change


def doubled(module):
    return {key: value * 2 for key, value in module.state_dict().items()}


COUNTED = {  # by torch, in a tensor's version, or as another tensor
    "in place": lambda module: module.in_proj_weight.mul_(1.5),
    "in place, one number": lambda module: module.in_proj_weight[1, 0].add_(100),
    "in place, in a view": lambda module: module.in_proj_weight.view(-1)[64].add_(100),
    "in place, detached": lambda module: module.in_proj_weight.detach()[1].zero_(),
    "of the output": lambda module: module.out_proj.bias.add_(1),
    "copy_": lambda module: module.in_proj_weight.copy_(torch.ones(192, 64)),
    "lerp_": lambda module: module.in_proj_weight.lerp_(torch.ones(192, 64), 0.1),
    "clip": lambda module: module.in_proj_weight.clamp_(-0.05, 0.05),
    "_foreach_add_": lambda module: torch._foreach_add_(list(module.parameters()), 0.5),
    "nn.init": lambda module: nn.init.normal_(module.out_proj.weight),
    "reset": lambda module: module._reset_parameters(),
    "vector_to_parameters": lambda module: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(module.parameters()) * 2, module.parameters()),
    "load_state_dict": lambda module: module.load_state_dict(doubled(module)),
    "load_state_dict of the output": lambda module: module.out_proj.load_state_dict(doubled(module.out_proj)),
    "load_state_dict, assign": lambda module: module.load_state_dict(doubled(module), assign=True),
    "averaged": averaged,
    "another parameter": with_another("in_proj_weight"),
    "another bias": with_another("in_proj_bias"),
    "register_parameter": lambda module: module.register_parameter("in_proj_bias", nn.Parameter(torch.ones(192))),
    "without a bias": lambda module: setattr(module, "in_proj_bias", None),
    "another output projection": lambda module: setattr(module, "out_proj", random_parameters(nn.Linear(64, 64))),
    "a wider output": lambda module: setattr(module, "out_proj", random_parameters(nn.Linear(64, 70))),
    "swap_tensors": swapped,
    "set_": set_storage,
    "merged": to_plain_tensors,
    "merged in place": lambda module: module.in_proj_weight.addmm_(torch.ones(192, 4), torch.ones(4, 64)),
    "pruned": pruned,
    "weight_norm": lambda module: nn.utils.weight_norm(module, "in_proj_weight").in_proj_weight_g.mul_(2),
    "rounded": lambda module: module.bfloat16().float(),
    "rounded alone": lambda module: module.out_proj.bfloat16().float(),
    "double": lambda module: module.double() and module.in_proj_weight.add_(1),
    "there and back": lambda module: module.to("meta").to_empty(device="cpu").load_state_dict(
        {key: torch.ones_like(value) for key, value in module.state_dict().items()}),
    "another number of heads": lambda module: setattr(module, "num_heads", 8) or setattr(module, "head_dim", 8),
    "batch_first": lambda module: setattr(module, "batch_first", True),
    "add_zero_attn": lambda module: setattr(module, "add_zero_attn", True),
}
STEPS = {f"{name} {options or ''}": step(optimizer, **options) for name, optimizer, options in (
    ("SGD", torch.optim.SGD, {}), ("SGD", torch.optim.SGD, {"foreach": True}), ("SGD", torch.optim.SGD, {"fused": True}),
    ("Adam", torch.optim.Adam, {}), ("Adam", torch.optim.Adam, {"foreach": True}),
    ("Adam", torch.optim.Adam, {"fused": True}), ("AdamW", torch.optim.AdamW, {"weight_decay": 0}),
    ("AdamW", torch.optim.AdamW, {"weight_decay": 0, "foreach": True}),
    ("AdamW", torch.optim.AdamW, {"weight_decay": 0, "fused": True}), ("Adagrad", torch.optim.Adagrad, {}),
    ("Adagrad", torch.optim.Adagrad, {"foreach": True}), ("Adagrad", torch.optim.Adagrad, {"fused": True}),
    ("RMSprop", torch.optim.RMSprop, {}))}
SEEN = {  # in another memory, or in a sample of the numbers
    "other data": lambda module: setattr(module.in_proj_weight, "data", module.in_proj_weight.data * 3),
    "transposed data": lambda module: setattr(module.out_proj.weight, "data", module.out_proj.weight.data.t()),
    "data filled": lambda module: module.in_proj_weight.data.fill_(0.1),
    "data of the bias": lambda module: module.out_proj.bias.data.add_(1),
    "data initialised": lambda module: nn.init.normal_(module.in_proj_weight.data),
    "NumPy": lambda module: np.multiply(array := module.in_proj_weight.detach().numpy(), 2, out=array),
    "DLPack": lambda module: np.multiply(array := np.from_dlpack(module.out_proj.bias.detach()), 2, out=array),
    "storage": lambda module: module.in_proj_weight.untyped_storage().fill_(61),  # bytes of a small number
    "shared memory": in_a_child,
    "int8 by hand": int8_by_hand,
}
CHANGES = COUNTED | STEPS | SEEN


def assert_noticed(change, mode=torch.no_grad):
    """What the next call computes after a change, and whether mha_c computed it."""
    theirs, ours = pair(64, 4)
    x = torch.randn(5, 3, 64)
    with torch.no_grad():
        before = ours(x, x, x)
    for module in (theirs, ours):
        torch.manual_seed(1)
        with mode():
            change(module)
    x = x.to(theirs.in_proj_weight.dtype)
    with torch.no_grad():
        expected = theirs(x, x, x)
        noticeable = before[0].shape != expected[0].shape or (before[0] - expected[0]).abs().max() > 1e-4
        assert noticeable
        here = coverage(ours).here
        assert_same(ours(x, x, x), expected)
    return ours, coverage(ours).here - here


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_changes_are_noticed(change):
    mode = torch.enable_grad if change in STEPS else torch.no_grad
    assert assert_noticed(CHANGES[change], mode)[1] == 1


@pytest.mark.parametrize("change", sorted(set(COUNTED) - {"weight_norm"}))
def test_changes_in_inference_mode(change):
    ours, computed = assert_noticed(COUNTED[change], torch.inference_mode)
    untracked = any(parameter.is_inference() for parameter in [*ours.parameters(), *ours._tensors(ours.out_proj).values()])
    assert computed == (not untracked)  # torch does not count changes of those


UNSEEN = {  # in a few numbers, which torch does not count and the sample does not include
    "data": lambda module: module.in_proj_weight.data[1].fill_(1),
    "NumPy": lambda module: module.in_proj_weight.detach().numpy()[1].fill(1),
}


CURES = {
    "refresh": lambda module: module.refresh(),
    "replaced again": replace_attention,
    "train": lambda module: module.train().eval(),
    "a call with gradients": lambda module: module(*[torch.zeros(5, 3, 64)] * 3),
    "load_state_dict": lambda module: module.load_state_dict({}, strict=False),
    "_apply": lambda module: module.float(),
}


@pytest.mark.parametrize("cure", CURES)
@pytest.mark.parametrize("change", UNSEEN)
def test_changes_that_need_refresh(change, cure):
    """The documented limit: a few numbers that are written behind torch's back."""
    theirs, ours = pair(64, 4)
    x = torch.randn(5, 3, 64)
    with torch.no_grad():
        before = ours(x, x, x)
        UNSEEN[change](theirs), UNSEEN[change](ours)
        assert torch.equal(ours(x, x, x)[0], before[0])
    CURES[cure](ours)
    with torch.no_grad():
        expected = theirs(x, x, x)
        assert not torch.equal(expected[0], before[0])
        assert_same(ours(x, x, x), expected)


def test_training_between_inferences():
    theirs, ours = pair(8, 2)
    x = torch.randn(5, 3, 8)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1) for module in (theirs, ours)]
    for _ in range(3):
        for module, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            module.train()(x, x, x)[0].square().sum().backward()
            optimizer.step()
            module.eval()
        with torch.no_grad():
            assert_same(ours(x, x, x), theirs(x, x, x), 1e-4)


def test_nothing_is_kept_alive():
    _, ours = pair(64, 2)
    x = torch.randn(5, 3, 64)
    with torch.no_grad():
        ours(x, x, x)
    packed = weakref.ref(ours._mha_c.packed._kept.sources["in_proj_weight"].memory)
    ours.half()
    assert packed() is None
    layer = weakref.ref(ours)
    del ours
    assert layer() is None


def test_two_threads():
    """One changes the parameters, others ask all the while; what comes after the last change is by the last ones."""
    _, ours = pair(16, 2)
    x = torch.randn(5, 3, 16)
    sets = [{k: v * factor for k, v in ours.state_dict().items()} for factor in (1, 2)]
    with torch.no_grad():
        expected = []
        for state in sets:
            ours.load_state_dict(state)
            expected.append(ours(x, x, x)[0])
    wrong, stop = [], threading.Event()

    def ask():
        with torch.no_grad():
            while not stop.is_set():
                if not torch.isfinite(ours(x, x, x)[0]).all():
                    wrong.append("not finite")

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(200):
        ours.load_state_dict(sets[turn % 2])
    stop.set()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert not wrong and torch.equal(ours(x, x, x)[0], expected[1])


def test_threads_of_both(monkeypatch):
    _, ours = pair(8, 2)
    seen = []
    original = mha_c._core.forward

    def seeing(*args):
        seen.append(mha_c.get_num_threads())
        return original(*args)

    monkeypatch.setattr(mha_c._core, "forward", seeing)
    x = torch.randn(5, 3, 8)
    with torch.no_grad():
        for of_torch, of_ours in ((1, 2), (2, 1), (2, 2)):
            torch.set_num_threads(of_torch)
            with mha_c.num_threads(of_ours):
                ours(x, x, x)
        torch.set_num_threads(1)
    assert seen == [1, 1, 2]


# ------------------------------------------------------------------------------------------- unusual layers


KINDS = STORED | MADE_ANEW | PARAMETRIZED
hooks_of_old = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")


@hooks_of_old
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unusual_layers(kind, batch_first):
    """Subclasses, and weights that are no parameters: mha_c computes them, or leaves them to torch and says so."""
    with torch.no_grad():  # torch copies no tensor that was computed with gradients
        theirs = random_parameters(KINDS[kind](batch_first=batch_first))
    class_name, ours = type(theirs).__name__, copy.deepcopy(theirs)
    replace_attention(ours)
    assert isinstance(ours, type(theirs)) or kind in PARAMETRIZED
    x = torch.randn(5, 3, 16)
    with torch.no_grad():
        for factor in (1, 2):
            for module in (theirs, ours):
                for parameter in module.parameters():
                    parameter.mul_(factor)
            assert_same(ours(x, x, x), theirs(x, x, x))
    left = kind in PARAMETRIZED
    assert coverage(ours).rows == (
        ("", class_name.removeprefix("Parametrized"), 2 * (not left), 2 * left, "parametrized weights" * left),)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        assert_same(copied(x, x, x), theirs(x, x, x))
    assert coverage(copied).here == (not left)
    for restored in (restore_attention(ours), restore_attention(copied)):
        assert type(restored).__name__ == class_name and not isinstance(restored, ReplacedAttention)
        assert vars(restored).keys() == vars(theirs).keys()
        with torch.no_grad():
            assert_same(restored(x, x, x), theirs(x, x, x))


def test_parametrized_after_it_was_replaced():
    theirs, ours = pair(16, 2)
    x = torch.randn(5, 3, 16)
    with torch.no_grad():
        ours(x, x, x)
        for module in (theirs, ours):
            nn.utils.parametrize.register_parametrization(module, "in_proj_weight", Doubling())
        assert_same(ours(x, x, x), theirs(x, x, x))
        other = restore_attention(copy.deepcopy(ours))
        assert type(other).__name__ == "ParametrizedMultiheadAttention"
        assert_same(other(x, x, x), theirs(x, x, x))
        for module in (theirs, ours, other):
            nn.utils.parametrize.remove_parametrizations(module, "in_proj_weight")
            assert_same(module(x, x, x), theirs(x, x, x))
    assert [type(module) for module in (ours, other)] == [ReplacedAttention, nn.MultiheadAttention]
    assert coverage(ours).rows[0][2:] == (2, 1, "parametrized weights")


def test_parametrizations_are_removed_from_a_replaced_layer():
    theirs = random_parameters(PARAMETRIZED["parametrized subclass"]())
    ours = replace_attention(copy.deepcopy(theirs))
    x = torch.randn(5, 3, 16)
    with torch.no_grad():
        nn.utils.parametrize.remove_parametrizations(ours, "in_proj_weight")
        assert_same(ours(x, x, x), theirs(x, x, x))
    assert type(ours).__name__ == "ReplacedNamed" and coverage(ours).here == 1
    assert type(restore_attention(ours)) is Named


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_subclasses_keep_what_is_theirs(how):
    theirs = random_parameters(Named(16, 2, name="first"))
    ours = replace_attention(nn.ModuleDict({"attention": copy.deepcopy(theirs)}))["attention"]
    assert isinstance(ours, Named) and isinstance(ours, ReplacedAttention)
    assert repr(ours) == repr(theirs).replace("Named(", "ReplacedNamed(")
    copied = copied_by(how, ours)
    assert type(copied) is type(ours) and copied.name == "first" and list(copied.state_dict()) == list(ours.state_dict())
    assert type(restore_attention(copied)) is Named
    x = torch.randn(5, 3, 16)
    with torch.no_grad():
        assert_same(copied(x, x, x), theirs(x, x, x))


def test_a_forward_of_its_own_is_left_alone():
    own, x = random_parameters(OwnForward(16, 2)), torch.randn(5, 3, 16)
    wrapped = random_parameters(nn.MultiheadAttention(16, 2))
    inner = wrapped.forward
    wrapped.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    model = replace_attention(nn.ModuleList([own, wrapped, nn.MultiheadAttention(16, 2)]))
    assert [type(layer) for layer in model] == [OwnForward, nn.MultiheadAttention, ReplacedAttention]
    assert [row.reason for row in coverage(model).rows] == ["overrides forward"] * 2 + ["never called"]
    with pytest.raises(ValueError, match=r"no attention of this Sequential can be replaced, because all of it overrides "
                                         r"forward, .*: 0 \(OwnForward\), 1 \(MultiheadAttention\)$"):
        replace_attention(nn.Sequential(own, wrapped))
    with pytest.raises(ValueError, match=r"no attention of this OwnForward can be replaced.*: \(OwnForward\)$"):
        replace_attention(own)
    wrapped.forward(x, x, x)


# ------------------------------------------------------------------------------------------- coverage


def test_coverage():
    """Every attention layer of a model, its calls and the reasons."""
    class Own(nn.MultiheadAttention):
        def forward(self, query):
            return super().forward(query, query, query)

    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": Own(8, 2), "c": nn.MultiheadAttention(8, 2)})
    assert coverage(model).rows == (
        ("a", "MultiheadAttention", 0, 0, "not replaced"), ("b", "Own", 0, 0, "overrides forward"),
        ("c", "MultiheadAttention", 0, 0, "not replaced"))
    replace_attention(model).eval()
    x = torch.zeros(5, 3, 8)
    with torch.no_grad():
        model["a"](x, x, x), model["a"](x, x, x), model["b"](x)
        with torch.autocast("cpu"):
            model["a"](x, x, x)
    model["a"](x, x, x), model["a"](x, x, x)
    assert coverage(model).rows == (
        ("a", "MultiheadAttention", 2, 3, "gradients (2), autocast (1)"), ("b", "Own", 0, 0, "overrides forward"),
        ("c", "MultiheadAttention", 0, 0, "never called"))
    assert (coverage(model).here, coverage(model).left) == (2, 3)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model["a"]))):
        assert coverage(copied).here == 0
    assert coverage(restore_attention(model)).rows[0].reason == "not replaced"
    assert coverage(nn.Linear(2, 2)).rows == ()


REASONS = {
    "training": lambda module, x: module.train()(x, x, x),
    "gradients": lambda module, x: torch.enable_grad()(module)(x, x, x),
    "complex64": lambda module, x: module(*[x.to(torch.complex64)] * 3),
    "mask in int64": lambda module, x: module(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.int64)),
    "mask in float64": lambda module, x: module(x, x, x, attn_mask=torch.zeros(5, 5).double()),
    "list": lambda module, x: module(x, x.tolist(), x),
    "autocast": lambda module, x: torch.autocast("cpu")(module)(x, x, x),
    "tracing": lambda module, x: torch.jit.trace(module, (x, x, x), check_trace=False),
    "function transform": lambda module, x: torch.vmap(lambda item: module(item, item, item)[0], in_dims=1)(x),
    "is_causal without attn_mask": lambda module, x: module(x, x, x, is_causal=True),
    "parametrized weights": lambda module, x: nn.utils.parametrizations.weight_norm(module, "in_proj_weight")(x, x, x),
    "parameters made in inference mode": lambda module, x: torch.inference_mode()(module.double)()(*[x.double()] * 3),
    "unusual parameters": lambda module, x: module.out_proj.double() and module(x, x, x),
    "tensors on meta": lambda module, x: module(*[x.to("meta")] * 3),
    "tensors that NumPy cannot read": lambda module, x: module(*[x.to_sparse()] * 3),
    "arguments that do not fit": lambda module, x: module(*[x.bfloat16()] * 3),
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_reasons(reason):
    _, ours = pair(8, 2)
    with torch.no_grad():
        outcome(lambda: REASONS[reason](ours, torch.randn(5, 3, 8)))  # torch refuses some of them
    assert {row.reason for row in coverage(ours).rows} == {reason} and coverage(ours).here == 0


def test_counting_in_many_threads_and_in_a_child():
    _, ours = pair(8, 2)
    x = torch.randn(5, 3, 8)

    def ask():
        with torch.no_grad():
            for _ in range(300):
                ours(x, x, x)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(20):  # while others hold the lock, perhaps
        child = os.fork()
        if child == 0:
            os._exit(coverage(ours).left)
        assert os.waitpid(child, 0)[1] == 0
    for thread in threads:
        thread.join()
    assert coverage(ours).here == 8 * 300


# ------------------------------------------------------------------------------------------- whole models


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 4, 32, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=layer.self_attn.batch_first and not layer.norm_first)


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"norm_first": True}, {"activation": "gelu"},
                                     {"bias": False}, {"dtype": torch.float64}], ids=str)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
def test_encoder(options, fused_path, computed_by_mha_c):
    """Beside the path that fuses layers, which never asks the replaced attention unless told to."""
    theirs = random_parameters(encoder(**options))
    ours = replace_attention(copy.deepcopy(theirs))
    x = torch.randn(3, 7, 16, dtype=options.get("dtype"))
    n = 3 if theirs.layers[0].self_attn.batch_first else 7
    padding = torch.arange(21 // n) >= torch.randint(1, 21 // n + 1, (n, 1))
    visible = ~(padding if n == 3 else padding.T)
    mask = causal(21 // n, dtype=options.get("dtype"))
    for call in ({}, {"src_key_padding_mask": padding}, {"mask": mask}, {"mask": mask, "is_causal": True},
                 {"mask": mask < 0}, {"mask": mask, "src_key_padding_mask": torch.zeros_like(padding, dtype=x.dtype)}):
        with torch.no_grad():
            expected = theirs(x, **call)
        visible_now = visible if "src_key_padding_mask" in call else torch.ones_like(visible)
        assert computed_by_mha_c(lambda: assert_same(ours(x, **call)[visible_now], expected[visible_now])) == 2


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
def test_transformer_and_decoder(batch_first, fused_path, computed_by_mha_c):
    theirs = random_parameters(nn.Transformer(16, 4, 2, 2, 32, batch_first=batch_first))
    ours = replace_attention(copy.deepcopy(theirs))
    source, target = (torch.randn(3, steps, 16) for steps in (7, 5))
    source, target = (x if batch_first else x.transpose(0, 1) for x in (source, target))
    padding = torch.arange(7) >= torch.tensor([[7], [4], [2]])
    ends = torch.arange(5) >= torch.tensor([[5], [3], [5]])
    for call in ({}, {"tgt_mask": causal(5)}, {"tgt_mask": causal(5), "tgt_is_causal": True},
                 {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": causal(5) < 0,
                  "tgt_key_padding_mask": ends}):
        with torch.no_grad():
            expected = theirs(source, target, **call)
        assert computed_by_mha_c(lambda: assert_same(ours(source, target, **call), expected)) == 2 + 2 * 2
    memory = torch.randn_like(source)
    with torch.no_grad():
        expected = theirs.decoder(target, memory, causal(5), memory_key_padding_mask=padding)
    assert computed_by_mha_c(lambda: assert_same(
        ours.decoder(target, memory, causal(5), memory_key_padding_mask=padding), expected)) == 4


def state(model):
    """Everything that replacing may touch: classes, and attributes that are no modules or parameters."""
    return {name: (type(module), {key: value for key, value in vars(module).items() if not key.startswith("_")
                                  or key == "_mha_c" or key.endswith("_in_torch")})
            for name, module in model.named_modules()}


def test_restore_gives_back_what_was():
    encoders = [encoder(), encoder(activation="gelu"), encoder(norm_first=True)]
    model = nn.Sequential(*encoders, nn.MultiheadAttention(8, 2)).eval()
    before, parameters = state(model), list(model.parameters())
    assert replace_attention(replace_attention(model)) is model
    assert sum(type(module) is ReplacedAttention for module in model.modules()) == 7
    with torch.no_grad():
        model[0](torch.randn(3, 7, 16))
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert restore_attention(model) is model
    assert state(model) == before
    assert restore_attention(model) is model and state(model) == before


def test_state_dicts_and_printing():
    model = encoder()
    keys, shown = list(model.state_dict()), repr(model)
    replace_attention(model)
    assert list(model.state_dict()) == keys
    assert repr(model) == shown.replace(" MultiheadAttention(", " ReplacedAttention(")
    restore_attention(model).load_state_dict(replace_attention(encoder()).state_dict())


def copied_by(how, model):
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, computed_by_mha_c):
    """A copy of a replaced model is replaced, has parameters of its own, and can be restored."""
    model = replace_attention(random_parameters(encoder()))
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        expected = model(x)
    copied = copied_by(how, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert computed_by_mha_c(lambda: assert_same(copied(x), expected)) == 2
    assert state(restore_attention(copied)) == state(encoder().eval())


def test_shared_layers():
    shared = nn.MultiheadAttention(8, 2)
    model = replace_attention(nn.ModuleList([shared, shared]))
    assert [type(module) for module in model] == [ReplacedAttention, ReplacedAttention]


def test_what_is_no_model():
    for function in (replace_attention, restore_attention):
        with pytest.raises(TypeError, match=f"{function.__name__} takes a torch.nn.Module, but got"):
            function(np.zeros(3))
    with pytest.raises(ValueError, match=r"to replace in this Linear\. If it calls torch's functions of attention, run it "
                                         r"in `with mha_c\.torch\.attention\(\):`$"):
        replace_attention(nn.Linear(2, 2))
