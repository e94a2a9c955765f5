# SPDX-License-Identifier: Apache-2.0
"""mha_c.explain for whole layers and stacks: every stage against the definition in float64 and against the layer's own
parts bit for bit, the output against the call, what is said, what is refused, and how it is shown and drawn."""

import copy
import pickle
import re
from xml.etree import ElementTree

import mha_c
import numpy as np
import pytest
from helpers import in_float32
from mha_c import _core

N, T, S, E = 3, 5, 7, 8
HALVES = ("bfloat16", "float16")

LAYERS = {
    "post-norm": {},
    "pre-norm": dict(norm_first=True),
    "batch first": dict(batch_first=True, norm_first=True),
    "gelu": dict(activation="gelu"),
    "gated": dict(activation="swiglu", norm="rms", norm_first=True, bias=False),
    "callable": dict(activation=np.tanh),
    "float64": dict(dtype="float64"),
    "zero padding": dict(padded="zero"),
}


def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def encoder_layer(name="post-norm", **options):
    return mha_c.TransformerEncoderLayer(E, 2, 16, seed=0, dropout_seed=0, **LAYERS[name], **options)


def decoder_layer(name="post-norm", **options):
    return mha_c.TransformerDecoderLayer(E, 2, 16, seed=0, dropout_seed=0, **LAYERS[name], **options)


def inputs(layer, length=T, seed=0):
    shape = (N, length, E) if layer.self_attn.batch_first else (length, N, E)
    return normal(*shape, seed=seed, dtype=layer.linear1.weight.dtype)


PADDING = np.arange(T) >= np.array([[3], [5], [4]])
MEMORY_PADDING = np.arange(S) >= np.array([[6], [7], [2]])


def encoder_call(layer):
    return (inputs(layer), np.triu(np.ones((T, T), bool), 2), PADDING, True)


def decoder_call(layer):
    return (inputs(layer), inputs(layer, S, seed=1), None, np.zeros((T, S), bool), PADDING, MEMORY_PADDING, True, False)


CALLS = {"encoder": (encoder_layer, encoder_call), "decoder": (decoder_layer, decoder_call)}


def composed(layer, call, explanation):
    """Every stage from the public parts of the layer, in the order of its docstring."""
    x, found = call[0], {"input": call[0]}
    masks = [(call[1], call[2], call[3])]
    if isinstance(layer, mha_c.TransformerDecoderLayer):
        masks = [(call[2], call[4], call[6]), (call[3], call[5], call[7])]
    names = ["self_attn", "multihead_attn"][: len(masks)]

    def add(number, name, update):
        """Add what a step gives, and with the norm after it normalize the sum."""
        nonlocal x
        x = found[f"residual{number}"] = x + update
        found[f"{name}_update"] = update
        if not layer.norm_first:
            x = found[f"norm{number}"] = getattr(layer, f"norm{number}")(x)

    def before(number):
        if layer.norm_first:
            found[f"norm{number}"] = getattr(layer, f"norm{number}")(x)
        return found[f"norm{number}"] if layer.norm_first else x

    for number, (name, (attn_mask, padding, is_causal)) in enumerate(zip(names, masks), 1):
        query = before(number)
        key = call[1] if name == "multihead_attn" else query
        update, _ = getattr(layer, name)(
            query, key, key, key_padding_mask=padding, need_weights=False, attn_mask=attn_mask, is_causal=is_causal
        )
        add(number, name, update)
    hidden = layer.linear1(before(len(names) + 1))
    found["hidden"] = hidden
    if callable(layer.activation):
        found["activated"] = layer.activation(hidden)
    elif layer.activation == "swiglu":
        found["activated"] = _core.activate(hidden, "silu", True)
    else:
        found["activated"] = _core.activate(hidden, layer.activation, False)
    add(len(names) + 1, "feed_forward", layer.linear2(found["activated"]))
    last = f"{'residual' if layer.norm_first else 'norm'}{len(names) + 1}"
    found.pop(last)
    rows = PADDING if layer.self_attn.batch_first else PADDING.T
    found["output"] = np.where(rows[..., None], 0, x) if layer.padded == "zero" else x
    return found


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_stage(name, kind):
    make, call_of = CALLS[kind]
    layer = make(name).eval()
    call = call_of(layer)
    explanation = mha_c.explain(layer, *call)
    expected = composed(layer, call, explanation)
    assert set(explanation.stages) == set(expected)
    for stage, array in expected.items():
        np.testing.assert_array_equal(explanation.stages[stage].array, array, err_msg=stage)
        assert getattr(explanation, stage) is explanation.stages[stage].array
        sizes = explanation.letters | {"2·F": 2 * explanation.letters["F"]}
        assert tuple(sizes[letter] for letter in explanation.stages[stage].axes) == array.shape, stage
    assert list(explanation.stages)[-1] == "output"
    np.testing.assert_array_equal(explanation.output, layer(*call))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["post-norm", "gated", "zero padding"])
def test_stages_of_halves_are_float32(name, dtype):
    """A call of the core rounds only what it multiplies and returns: each other stage is one of a float32 layer."""
    layer = encoder_layer(name, dtype=dtype).eval()
    call = encoder_call(layer)
    explanation = mha_c.explain(layer, *call)
    expected = composed(in_float32(layer), (call[0].astype(np.float32), *call[1:]), explanation)
    expected |= {"input": call[0], "output": layer(*call)}
    for stage, array in expected.items():
        np.testing.assert_array_equal(explanation.stages[stage].array, array, err_msg=stage, strict=True)
    assert layer.linear1.weight.dtype == explanation.output.dtype == dtype
    assert explanation.self_attn.weights.dtype == np.float32


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["post-norm", "gated"])
def test_halves_in_a_decoder(name, dtype):
    """Its layer makes two calls of the core."""
    layer = decoder_layer(name, dtype=dtype).eval()
    call = decoder_call(layer)
    explanation = mha_c.explain(layer, *call)
    np.testing.assert_array_equal(explanation.output, layer(*call), strict=True)
    wide_call = (*(array.astype(np.float32) for array in call[:2]), *call[2:])
    expected = composed(in_float32(layer), wide_call, explanation)
    last = "residual1" if layer.norm_first else "norm1"
    np.testing.assert_array_equal(explanation.self_attn_update, expected["self_attn_update"], strict=True)
    np.testing.assert_array_equal(explanation.stages[last].array, expected[last].astype(dtype), strict=True)
    assert explanation.residual2.dtype == np.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_step_by_step(dtype):
    """With an activation of the caller's, a layer makes several calls, which round their results."""
    layer = encoder_layer("callable", dtype=dtype).eval()
    call = encoder_call(layer)
    explanation = mha_c.explain(layer, *call)
    for stage, array in composed(layer, call, explanation).items():
        np.testing.assert_array_equal(explanation.stages[stage].array, array, err_msg=stage, strict=True)
    np.testing.assert_array_equal(explanation.output, layer(*call), strict=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_stacks_of_halves(dtype):
    encoder = mha_c.TransformerEncoder(encoder_layer(dtype=dtype), 2).eval()
    explanation = mha_c.explain(encoder, inputs(encoder.layers[0]))
    assert {array.dtype.name for array in explanation.residual_stream.values()} == {dtype}
    np.testing.assert_array_equal(explanation[1].output, explanation.output)
    in_float32 = mha_c.explain(encoder.float(), explanation.residual_stream["input"].astype(np.float32))
    change, expected = (float(each.table().rows[1][3]) for each in (explanation, in_float32))
    assert abs(change - expected) <= 0.01
    assert "mean norm" in repr(explanation[0]) and "<table" in explanation[0]._repr_html_()


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_is_that_of_the_next_call(name, kind):
    make, call_of = CALLS[kind]
    layer = make(name, dropout=0.3)
    call = call_of(layer)
    layer(*call)
    first, again = (mha_c.explain(layer, *call) for _ in range(2))
    np.testing.assert_array_equal(first.output, again.output)
    np.testing.assert_array_equal(first.output, layer(*call))
    assert not np.array_equal(first.output, layer(*call))
    assert "dropout1(self_attn(" in first.stages["self_attn_update"].formula
    assert first.stages["activated"].formula.startswith("dropout(")
    assert any(note.startswith("Dropout is active") for note in first.notes)
    assert not any(note.startswith("Dropout is") for note in mha_c.explain(layer.eval(), *call).notes)


def test_formulas_name_earlier_stages():
    """Whoever reads a formula finds its terms above it."""
    for name in ("pre-norm", "post-norm"):
        layer = decoder_layer(name).eval()
        explanation = mha_c.explain(layer, *decoder_call(layer))
        known = {"tgt", "memory", "self_attn", "multihead_attn", "linear1", "linear2", "relu", "norm1", "norm2", "norm3"}
        for stage in explanation.stages.values():
            assert set(re.findall(r"\w+", stage.formula)) <= known, stage
            known.add(stage.name)


def test_the_attention_in_it():
    layer = decoder_layer().eval()
    x, memory, *masks = decoder_call(layer)
    explanation = mha_c.explain(layer, x, memory, *masks)
    assert list(explanation.attentions) == ["self_attn", "multihead_attn"]
    assert explanation.self_attn is explanation.attentions["self_attn"]
    query = explanation.norm1
    alone = mha_c.explain(
        layer.multihead_attn, query, memory, memory, need_weights=False, attn_mask=masks[1], key_padding_mask=masks[3]
    )
    np.testing.assert_array_equal(explanation.multihead_attn.weights, alone.weights)
    np.testing.assert_array_equal(explanation.multihead_attn.output, explanation.multihead_attn_update)
    assert explanation.multihead_attn.weights.shape == (N, 2, T, S)


def test_inputs_are_copied():
    layer = encoder_layer().eval()
    x = inputs(layer)
    explanation = mha_c.explain(layer, x)
    stack = mha_c.explain(mha_c.TransformerEncoder(layer, 2), x)
    before = x.copy()
    x[:] = 0
    np.testing.assert_array_equal(explanation.input, before)
    np.testing.assert_array_equal(stack[0].input, before)


# ------------------------------------------------------------------------------------------------ stacks


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_encoder(name, training):
    encoder = mha_c.TransformerEncoder(encoder_layer(name, dropout=0.3), 3, mha_c.LayerNorm(E, dtype=LAYERS[name].get("dtype")))
    encoder.train(training)
    call = encoder_call(encoder.layers[0])
    explanation = mha_c.explain(encoder, *call)
    assert list(explanation.residual_stream) == ["input", "layer 0", "layer 1", "layer 2", "norm"]
    assert len(explanation) == 3
    for number in range(3):
        one = explanation[number]
        np.testing.assert_array_equal(one.output, explanation.residual_stream[f"layer {number}"])
        np.testing.assert_array_equal(one.input, list(explanation.residual_stream.values())[number])
    np.testing.assert_array_equal(explanation.output, encoder(*call))
    np.testing.assert_array_equal(encoder.norm(explanation.residual_stream["layer 2"]), explanation.output)


@pytest.mark.parametrize("padded", [None, "zero", "computed"])
def test_encoder_that_leaves_out_padding(padded):
    """Padded rows are zeros in the whole stream where the encoder makes them zeros."""
    encoder = mha_c.TransformerEncoder(encoder_layer(batch_first=True), 2, padded=padded).eval()
    x = normal(N, T, E)
    explanation = mha_c.explain(encoder, x, src_key_padding_mask=PADDING)
    np.testing.assert_array_equal(explanation.output, encoder(x, src_key_padding_mask=PADDING))
    for name in ("layer 0", "layer 1"):
        assert (explanation.residual_stream[name][PADDING] == 0).all() == (padded != "computed")
    np.testing.assert_array_equal(explanation[1].output, explanation.output)


@pytest.mark.parametrize("padded", [None, "zero"])
def test_decoder(padded):
    decoder = mha_c.TransformerDecoder(decoder_layer(), 2, padded=padded)
    call = decoder_call(decoder.layers[0])
    explanation = mha_c.explain(decoder, *call)
    assert list(explanation.residual_stream) == ["input", "layer 0", "layer 1"]
    for number in range(2):
        np.testing.assert_array_equal(explanation[number].output, explanation.residual_stream[f"layer {number}"])
    np.testing.assert_array_equal(explanation.output, decoder(*call))
    assert explanation.residual_stream["layer 0"][PADDING.T].all()
    flags = {"tgt_mask": call[2], "tgt_is_causal": 1, "memory_is_causal": 1}  # as torch takes flags
    if padded is None:
        np.testing.assert_array_equal(mha_c.explain(decoder, *call[:2], **flags).output, decoder(*call[:2], **flags))


def test_a_layer_of_a_stack_is_explained_as_it_was():
    """Also if parameters, mode and calls have changed since."""
    encoder = mha_c.TransformerEncoder(encoder_layer(dropout=0.3), 2)
    x = inputs(encoder.layers[0])
    explanation = mha_c.explain(encoder, x)
    encoder(x)
    encoder.eval()
    encoder.layers[1].linear1.weight = np.zeros((16, E), np.float32)
    np.testing.assert_array_equal(explanation[1].output, explanation.output)
    np.testing.assert_array_equal(explanation[-1].output, explanation.output)
    assert [each.output.shape for each in explanation] == [x.shape] * 2
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"there is no layer {index}: there are 2, counted from 0"):
            explanation[index]


def test_one_layer_used_twice():
    """A stack may hold a layer more than once; with dropout, its second call draws other numbers."""
    encoder = mha_c.TransformerEncoder(encoder_layer(dropout=0.3), 2)
    encoder.layers[1] = encoder.layers[0]
    x = inputs(encoder.layers[0])
    explanation = mha_c.explain(encoder, x)
    np.testing.assert_array_equal(explanation[1].output, explanation.output)
    np.testing.assert_array_equal(explanation.output, encoder(x))


def test_stacks_without_layers_and_empty_inputs():
    empty = mha_c.TransformerEncoder(encoder_layer(), 0)
    assert list(mha_c.explain(empty, normal(T, E)).residual_stream) == ["input", "norm"]
    encoder = mha_c.TransformerEncoder(encoder_layer(), 2).eval()
    for shape in ((0, N, E), (T, 0, E)):
        explanation = mha_c.explain(encoder, np.zeros(shape, np.float32))
        assert str(explanation) and str(explanation[0]) and explanation[0]._repr_html_()
    zeros = mha_c.explain(encoder, np.zeros((T, E), np.float32))
    assert str(zeros) and str(zeros[0])


# ------------------------------------------------------------------------------------------------ what is said


def said(explanation, beginning):
    (note,) = [note for note in explanation.notes if note.startswith(beginning)]
    return note


def test_sizes():
    """Means over the tokens that are not padding."""
    layer = encoder_layer("batch first").eval()
    x = inputs(layer)
    x[PADDING] *= 100
    explanation = mha_c.explain(layer, x, None, PADDING)

    def mean(array):
        return np.linalg.norm(array[~PADDING].astype(float), axis=-1).mean()

    large, small = mean(explanation.residual1), mean(explanation.feed_forward_update)
    assert said(explanation, "feed_forward_update is").startswith(
        f"feed_forward_update is {small / large:.2g} times as large as residual1, to which it is added:"
    )
    row = next(line for line in str(explanation).splitlines() if line.startswith("input "))
    assert f" {mean(x):.3g} " in row
    norms = np.where(PADDING, 0, np.linalg.norm(explanation.output, axis=-1))
    item, token = np.unravel_index(norms.argmax(), norms.shape)
    assert f"norms: token {token} of item {item} ({norms.max():.3g}), " in said(explanation, "The rows of output")


@pytest.mark.parametrize("name", ["post-norm", "gelu"])
def test_active_features(name):
    layer = encoder_layer(name).eval()
    layer.linear1.bias = np.array([-100.0] + [1.0] * 15, np.float32)
    explanation = mha_c.explain(layer, inputs(layer))
    active = explanation.activated > 0 if name == "post-norm" else np.abs(explanation.activated) > 0.01
    note = said(explanation, f"{active.mean():.0%} of the hidden features are active")
    never = np.count_nonzero(~active.any(axis=(0, 1)))
    assert never and note.endswith(f" {never} of 16 are not active for any token.")


def test_operations():
    layer = encoder_layer().eval()
    counts = {name: stage.operations for name, stage in mha_c.explain(layer, inputs(layer)).stages.items()}
    assert counts["hidden"] == counts["feed_forward_update"] == 2 * N * T * E * 16
    assert counts["residual1"] == N * T * E and counts["input"] == 0
    attention = mha_c.explain(layer.self_attn, inputs(layer)).stages
    assert counts["self_attn_update"] == sum(
        stage.operations for name, stage in attention.items() if name != "average_weights"
    )


def test_warnings():
    layer = encoder_layer().eval()
    x = inputs(layer)
    assert mha_c.explain(layer, x).warnings == ()
    x[0, 1, 2] = np.nan
    warnings = mha_c.explain(layer, x).warnings
    assert warnings == ("input is the first stage that holds NaN or infinity: in 1 of 15 tokens.",)
    (inverted,) = mha_c.explain(layer, inputs(layer), np.tri(T, dtype=bool)).warnings[:1]
    assert inverted.startswith("self_attn: attn_mask looks inverted")
    stack = mha_c.explain(mha_c.TransformerEncoder(layer, 2).eval(), inputs(layer), np.tri(T, dtype=bool))
    assert stack.warnings[0] == f"layer 0: {inverted}" and "looks inverted" in str(stack)
    layer.linear2.bias = np.full(E, np.inf, np.float32)
    assert mha_c.explain(layer, inputs(layer)).warnings[0].startswith("feed_forward_update is the first stage")
    padded = inputs(layer)
    layer = encoder_layer().eval()
    padded[PADDING.T] = np.nan
    assert mha_c.explain(layer, padded, None, PADDING).warnings == ()

    class Doubled(mha_c.TransformerEncoderLayer):
        def forward(self, *arguments):
            return 2 * super().forward(*arguments)

    doubled = Doubled(E, 2, 16).eval()
    assert mha_c.explain(doubled, inputs(doubled)).warnings[0].startswith("Doubled overrides forward.")


def test_refusals_are_those_of_the_layer():
    layer = encoder_layer().eval()
    x = inputs(layer)
    encoder = mha_c.TransformerEncoder(layer, 2)
    for call in ((x.astype(float),), (x, np.zeros((4, 5), bool)), (x[..., :3],), (x, None, np.zeros((N, 4), bool))):
        for module in (layer, encoder):
            with pytest.raises(Exception) as its:  # noqa: PT011 - the point is to compare
                module(*call)
            with pytest.raises(its.type, match=re.escape(str(its.value))):
                mha_c.explain(module, *call)
    with pytest.raises(TypeError, match=r"^explain\(\) .* argument 'attn_mask'. Write src_mask= instead of attn_mask="):
        mha_c.explain(layer, x, attn_mask=None)
    decoder_layer = mha_c.TransformerDecoderLayer(8, 2)
    for module in (layer, encoder, decoder_layer, mha_c.TransformerDecoder(decoder_layer, 1)):
        with pytest.raises(TypeError, match=r"^explain\(\) missing 1 required positional argument"):
            mha_c.explain(module, *[x] * ("Decoder" in type(module).__name__))
    with pytest.raises(TypeError, match="explain takes .* TransformerEncoder or TransformerDecoder of .*, but got mha_c"):
        mha_c.explain(mha_c.Transformer(8, 2, 1, 1, 16), x, x)
    with pytest.raises(AttributeError, match="multihead_attn"):
        mha_c.explain(layer, x).multihead_attn
    with pytest.raises(IndexError):
        mha_c.explain(encoder, x)[2]


def test_layers_of_another_kind_in_a_stack():
    encoder = mha_c.TransformerEncoder(encoder_layer(), 1).eval()

    class Ignores(type(encoder.layers[0].linear1)):
        def forward(self, x, *masks):
            return super().forward(x)

        __call__ = forward

    encoder.layers.append(Ignores(E, E, seed=0))
    x = inputs(encoder.layers[0])
    explanation = mha_c.explain(encoder, x)
    np.testing.assert_array_equal(explanation.output, encoder(x))
    with pytest.raises(TypeError, match="explain shows layers of .*, but got Ignores"):
        explanation[1]


def test_layers_of_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(E, 2, 16, batch_first=True)
    x = torch.randn(N, T, E)
    expected = layer.eval()(x).detach().numpy()
    for given, keywords in ((layer.train(), {}), (torch.nn.TransformerEncoder(layer, 1), {"mask": torch.zeros(T, T)})):
        output = mha_c.explain(given, x, **keywords).output
        np.testing.assert_allclose(output, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------ how it is shown


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_shown(name, kind, monkeypatch):
    make, call_of = CALLS[kind]
    layer = make(name).eval()
    explanation = mha_c.explain(layer, *call_of(layer))
    monkeypatch.setenv("COLUMNS", "80")
    lines = str(explanation).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"{type(layer).__name__}(d_model=8, nhead=2, dim_feedforward=16,")
    rows = str(explanation).split("\n\n")[1].splitlines()
    assert [row.split()[0] for row in rows if row[0] != " "] == list(explanation.stages)
    html = explanation._repr_html_()
    ElementTree.fromstring(html)
    for part in (*explanation.stages, *(f"{name}, stage by stage" for name in explanation.attentions)):
        assert part in html
    assert html.index("self_attn, stage by stage") < html.index("<b>self_attn_update</b>") < html.rindex("<b>output</b>")


def test_narrow_products():
    layer = mha_c.TransformerDecoderLayer(8, 2, 16, dtype="float16").eval()
    layer.matmul_precision = {"default": "int8", "linear2": None}
    layer.self_attn.matmul_precision = "bfloat16"
    explanation = mha_c.explain(layer, *[np.ones((3, 8), np.float16)] * 2)
    note = (
        "Numbers that are multiplied: bfloat16 in self_attn.in_proj, self_attn.attention, self_attn.out_proj and "
        "multihead_attn.attention; "
        "int8 in multihead_attn.in_proj, multihead_attn.out_proj and linear1; float32 in linear2."
    )
    assert explanation.notes[-1] == note and note in " ".join(str(explanation).split())
    assert note in explanation._repr_html_()


def test_a_stack_is_shown(monkeypatch):
    encoder = mha_c.TransformerEncoder(encoder_layer("pre-norm"), 3, mha_c.LayerNorm(E)).eval()
    x = inputs(encoder.layers[0])
    explanation = mha_c.explain(encoder, x, is_causal=True)
    monkeypatch.setenv("COLUMNS", "80")
    text = str(explanation)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("TransformerEncoder(num_layers=3); src (5, 3, 8), is_causal")
    stream = [np.float64(array) for array in explanation.residual_stream.values()]
    norms = [np.linalg.norm(array, axis=-1) for array in stream]
    change = np.linalg.norm(stream[2] - stream[1], axis=-1).mean() / norms[1].mean()
    assert re.search(rf"^layer 1 +{norms[2].mean():.3g} +{norms[2].max():.3g} +{change:.2f}$", text, re.MULTILINE)
    token, item = np.unravel_index(norms[3].argmax(), norms[3].shape)
    assert f"The rows of layer 2 with the largest norms: token {token} of item {item} (" in " ".join(text.split())
    np.testing.assert_allclose(explanation.norms, np.stack(norms).transpose(2, 0, 1))
    ElementTree.fromstring(explanation._repr_html_())


def test_they_can_be_pickled_and_copied():
    encoder = mha_c.TransformerEncoder(encoder_layer(), 2).eval()
    explanation = mha_c.explain(encoder, inputs(encoder.layers[0]))
    for again in (pickle.loads(pickle.dumps(explanation)), copy.deepcopy(explanation)):
        assert str(again) == str(explanation)
        assert str(again[1]) == str(explanation[1])
    assert str(pickle.loads(pickle.dumps(explanation[1]))) == str(explanation[1])


# ------------------------------------------------------------------------------------------------ how it is drawn


@pytest.fixture
def plot():
    drawing = pytest.importorskip("mha_c.plot", reason="needs matplotlib", exc_type=ImportError)
    yield drawing
    drawing.pyplot.close("all")


def test_residual_stream(plot):
    encoder = mha_c.TransformerEncoder(encoder_layer("batch first"), 3, mha_c.LayerNorm(E)).eval()
    explanation = mha_c.explain(encoder, normal(N, T, E))
    words = ["a", "kitten", "sleeps", "all", "day"]
    ax = plot.residual_stream(explanation, item=1, tokens=words)
    (image,) = ax.get_images()
    np.testing.assert_array_equal(image.get_array(), explanation.norms[1])
    assert [label.get_text() for label in ax.get_xticklabels()] == words
    assert [label.get_text() for label in ax.get_yticklabels()] == list(explanation.residual_stream)
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("Residual stream", "token", "step")
    scale = ax.figure.axes[1]
    assert scale.get_ylabel().startswith("norm of the row")
    row = explanation.norms[1, 2]
    assert f", layer 1: {row.min():.3g} to {row.max():.3g}, " in ax.get_label()
    one = plot.residual_stream(explanation[2], layer=2, colorbar=False, vmax=5)
    assert one.get_title() == "Residual stream, layer 2" and len(one.figure.axes) == 1
    assert [label.get_text() for label in one.get_yticklabels()] == ["input", "residual1", "output"]
    assert one.get_images()[0].norm.vmax == 5
    assert plot.residual_stream(explanation, ax=one) is one
    unbatched = mha_c.explain(encoder, normal(T, E))
    assert plot.residual_stream(unbatched).get_images()[0].get_array().shape == (5, T)


def test_residual_stream_of_many_tokens_and_layers(plot):
    encoder = mha_c.TransformerEncoder(encoder_layer("batch first"), 70).eval()
    ax = plot.residual_stream(mha_c.explain(encoder, normal(1, 300, E)))
    ax.figure.canvas.draw()
    assert ax.get_title() == "Residual stream, bins of 1 × 2"
    assert ax.get_ylabel() == "step (position)"


def test_residual_stream_refuses(plot):
    encoder = mha_c.TransformerEncoder(encoder_layer("batch first"), 2).eval()
    explanation = mha_c.explain(encoder, normal(N, T, E))
    with pytest.raises(TypeError, match="what mha_c.explain returns for an encoder.*but got TransformerEncoder$"):
        plot.residual_stream(encoder)
    with pytest.raises(ValueError, match="there are 5 positions, but 1 tokens"):
        plot.residual_stream(explanation, tokens=["a"])
    with pytest.raises(IndexError, match="there is no item 3: the batch has 3"):
        plot.residual_stream(explanation, item=3)
