# SPDX-License-Identifier: Apache-2.0
"""Models of torch whose attention computes with mha_c: torch, with the same model, is the judge.

Whether mha_c or torch computed is seen by counting its calls: `computed_by_mha_c`.
"""

import copy
import io
import pickle
import threading
import weakref

import mha_c
import numpy as np
import pytest
from helpers import outcome

torch = pytest.importorskip("torch")
from mha_c.torch import ReplacedAttention, replace_attention, restore_attention  # noqa: E402
from torch import nn  # noqa: E402

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
    original = ReplacedAttention.forward_in_mha_c

    def counting(self, *args):
        result = original(self, *args)
        calls.append(result is not None)
        return result

    def count(function):
        calls.clear()
        with torch.no_grad():
            function()
        return sum(calls)

    monkeypatch.setattr(ReplacedAttention, "forward_in_mha_c", counting)
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
            lambda: in_mode(torch.device("cpu")),
            lambda: ours(*[x.as_subclass(Tagged)] * 3),
            lambda: assert_same(vmapped(x), theirs(x, x, x)[0]),
            lambda: torch.jit.trace(ours, (x, x, x), check_trace=False),
            forward_mode):
        assert computed_by_mha_c(watched) == 0
    assert computed_by_mha_c(lambda: ours(x, x, x)) == 1


def test_other_memory(computed_by_mha_c):
    for move in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to("meta")):
        theirs, ours = pair(8, 2, batch_first=True)
        move(theirs), move(ours)
        x = torch.randn(3, 5, 8).to(theirs.out_proj.weight)
        with torch.no_grad():
            expected = theirs(x, x, x)
        assert computed_by_mha_c(lambda: assert_same(ours(x, x, x), expected, 1e-2)) == 0


def test_views_and_parameters_as_inputs(computed_by_mha_c):
    theirs, ours = pair(8, 2)
    base = torch.randn(8, 3, 5, 2)
    for x in (base.permute(2, 1, 0, 3)[..., 0], nn.Parameter(torch.randn(5, 3, 8)), torch.randn(10, 3, 8)[::2],
              torch.randn(5, 1, 8).expand(5, 3, 8)):
        with torch.no_grad():
            expected = theirs(x, x, x)
        assert computed_by_mha_c(lambda: assert_same(ours(x, x, x), expected)) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_export_script_and_fx(computed_by_mha_c):
    model = random_parameters(encoder()).requires_grad_(False)
    x = torch.randn(3, 7, 16)
    expected = model(x)
    replaced = replace_attention(copy.deepcopy(model))
    compiled = torch.compile(replaced, backend="eager", fullgraph=True)
    assert computed_by_mha_c(lambda: assert_same(compiled(x), expected)) == 0
    exported = torch.export.export(replaced, (x,))
    assert_same(exported.module()(x), expected)

    class Around(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0] + 1

    around = Around(replaced.layers[0].self_attn)
    traced = torch.fx.symbolic_trace(around)
    assert computed_by_mha_c(lambda: assert_same(traced(x), around(x))) == 2
    assert_same(torch.jit.script(around)(x), traced(x))


def test_parameters_that_are_not_the_usual_ones(computed_by_mha_c):
    """Parametrized, functional, or of another class: torch computes them, or mha_c with the right numbers."""
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    x = torch.randn(5, 3, 8)
    for name in ("in_proj_weight", "out_proj.weight"):
        theirs, ours = pair(8, 2)
        for module in (theirs, ours):
            owner = module.out_proj if "." in name else module
            nn.utils.parametrize.register_parametrization(owner, name.split(".")[-1], Double())
        with torch.no_grad():
            expected = theirs(x, x, x)
        assert computed_by_mha_c(lambda: assert_same(ours(x, x, x), expected)) == 0

    theirs, ours = pair(8, 2)
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


CHANGES = {
    "in place": lambda module: module.in_proj_weight.mul_(1.5),
    "of the output": lambda module: module.out_proj.bias.add_(1),
    "load_state_dict": lambda module: module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}),
    "assign": lambda module: module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}, assign=True),
    "another parameter": lambda module: setattr(module, "in_proj_bias", nn.Parameter(torch.arange(24.0))),
    "other data": lambda module: setattr(module.in_proj_weight, "data", module.in_proj_weight.data * 3),
    "transposed data": lambda module: setattr(module.out_proj.weight, "data", module.out_proj.weight.data.t()),
    "rounded": lambda module: module.half().float(),
    "rounded alone": lambda module: module.out_proj.half().float(),
    "double": lambda module: module.double(),
    "there and back": lambda module: module.to("meta").to_empty(device="cpu").load_state_dict(
        {k: torch.ones_like(v) for k, v in module.state_dict().items()}),
    "another number of heads": lambda module: setattr(module, "num_heads", 4) or setattr(module, "head_dim", 2),
    "batch_first": lambda module: setattr(module, "batch_first", True),
    "add_zero_attn": lambda module: setattr(module, "add_zero_attn", True),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_take_effect(change, mode, computed_by_mha_c):
    if mode is torch.inference_mode and change in ("assign", "another parameter", "other data", "there and back"):
        pytest.skip("makes parameters that torch does not track")
    theirs, ours = pair(8, 2)
    x = torch.randn(5, 3, 8)
    with torch.no_grad():
        before = ours(x, x, x)
    with mode():
        CHANGES[change](theirs), CHANGES[change](ours)
    x = x.to(theirs.in_proj_weight.dtype)
    with torch.no_grad():
        expected = theirs(x, x, x)
    assert not torch.equal(before[0].to(expected[0].dtype), expected[0])
    assert computed_by_mha_c(lambda: assert_same(ours(x, x, x), expected)) == 1


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


def test_refresh():
    """Edits through `.data` are not counted by torch; refresh, or replacing again, reads the parameters anew."""
    theirs, ours = pair(8, 2)
    x = torch.randn(5, 3, 8)
    for again in (ours.refresh, lambda: replace_attention(ours)):
        with torch.no_grad():
            ours(x, x, x)
            for module in (theirs, ours):
                module.out_proj.bias.data.add_(1)
            again()
            assert_same(ours(x, x, x), theirs(x, x, x))


def test_nothing_is_kept_alive():
    _, ours = pair(64, 2)
    x = torch.randn(5, 3, 64)
    with torch.no_grad():
        ours(x, x, x)
    packed = weakref.ref(ours._packed.layer)
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


def test_threads_of_both():
    _, ours = pair(8, 2)
    seen = []
    original = mha_c.MultiheadAttention.__call__

    class Seeing(mha_c.MultiheadAttention):
        def forward(self, *args):
            seen.append(mha_c.get_num_threads())
            return original(self, *args)

    x = torch.randn(5, 3, 8)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("mha_c.layer.MultiheadAttention", Seeing)
        for of_torch, of_ours in ((1, 2), (2, 1), (2, 2)):
            torch.set_num_threads(of_torch)
            with mha_c.num_threads(of_ours):
                ours(x, x, x)
        torch.set_num_threads(1)
    assert seen == [1, 1, 2]


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
                                  or key == "_packed" or key.endswith("_in_torch")})
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


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, computed_by_mha_c):
    """A copy of a replaced model is replaced, has parameters of its own, and can be restored."""
    model = replace_attention(random_parameters(encoder()))
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        expected = model(x)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert computed_by_mha_c(lambda: assert_same(copied(x), expected)) == 2
    assert state(restore_attention(copied)) == state(encoder().eval())


def test_shared_layers_and_subclasses():
    class Own(nn.MultiheadAttention):
        pass

    shared = nn.MultiheadAttention(8, 2)
    model = replace_attention(nn.ModuleList([shared, shared, Own(8, 2)]))
    assert [type(module) for module in model] == [ReplacedAttention, ReplacedAttention, Own]
    with pytest.raises(ValueError, match="no torch.nn.MultiheadAttention to replace in this Own"):
        replace_attention(Own(8, 2))


def test_what_is_no_model():
    for function in (replace_attention, restore_attention):
        with pytest.raises(TypeError, match=f"{function.__name__} takes a torch.nn.Module, but got"):
            function(np.zeros(3))
    with pytest.raises(ValueError, match="no torch.nn.MultiheadAttention to replace in this Linear"):
        replace_attention(nn.Linear(2, 2))
