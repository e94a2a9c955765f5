# SPDX-License-Identifier: Apache-2.0
"""Pictures and numbers of heads: what the artists show, whether it can be read, and what is refused."""

import pickle
import sys

import mha_c
import numpy as np
import pytest
from helpers import layer, normal, run_child
from mha_c import heads
from mha_c.display.cells import NEGATIVE, POSITIVE

plot = pytest.importorskip("mha_c.plot", reason="needs matplotlib", exc_type=ImportError)
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.text import Text

STYLES = ["default", "dark_background"]
WORDS = "the old lighthouse keeper climbed the narrow stairs every evening , lit the lamp and watched".split()
DRAW_ARRAYS = {
    "weights": plot.weights,
    "average": plot.average,
    "heads": plot.heads,
    "entropy": plot.entropy,
    "distance": plot.distance,
    "token": lambda w, **options: plot.token(w, 0, **options),
    "heads_of": heads.heads_of,
    "numbers": heads.entropy,
    "distances": heads.distance,
    "bertviz": heads.to_bertviz,
}
DRAW = {
    "weights": lambda w, words: plot.weights(w, 1, tokens=words),
    "average": lambda w, words: plot.average(w, tokens=words),
    "heads": lambda w, words: plot.heads(w, tokens=words)[0],
    "entropy": lambda w, words: plot.entropy(w),
    "distance": lambda w, words: plot.distance(w),
    "layers": lambda w, words: plot.entropy([w, w, w]),
    "token": lambda w, words: plot.token(w, 3, tokens=words),
    "masking": lambda w, words: plot.masking(np.log(w), np.where(np.tri(len(words)), np.log(w), -np.inf), tokens=words)[
        0
    ],
}


@pytest.fixture(autouse=True)
def close_figures():
    """Each test has its own figures."""
    yield
    pyplot.close("all")


def random_weights(length, num_heads=4, source_length=None, seed=0):
    """(1, H, L, S), with a few keys that matter much and many that matter little, as real heads have them."""
    logits = 3 * np.random.default_rng(seed).standard_normal((1, num_heads, length, source_length or length))
    powers = np.exp(logits)
    return powers / powers.sum(axis=-1, keepdims=True)


def words(count):
    return [WORDS[number % len(WORDS)] for number in range(count)]


def drawn(ax):
    """The numbers of the heat map in the axes."""
    (image,) = ax.get_images()
    return image.get_array()


def contrast(one, other):
    """WCAG 2: 21 for black on white; small text needs 4.5."""

    def luminance(color):
        encoded = np.array(to_rgb(color))
        linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def texts(figure):
    """The texts of a figure that can be seen, with their boxes, in pixels."""
    figure.canvas.draw()
    window = figure.canvas.get_renderer()
    visible = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    shown = []
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):  # locators make labels beyond the axes' ends, which are not drawn
            ends = sorted(axis.get_view_interval())
            outside = [
                label for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)
                if not (ax.axison and ends[0] <= tick.get_loc() <= ends[1])
            ]  # fmt: skip
            visible = [text for text in visible if not any(text is label for label in outside)]
    for text in visible:
        if text.axes is None or text.axes.get_visible():
            shown.append((text, text.get_window_extent(window)))
    return shown


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", DRAW)
def test_halves(name, dtype):
    """They are drawn as the same numbers in float32 are."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    halves = random_weights(12).astype(dtype)
    ours, expected = (DRAW[name](array, words(12)) for array in (halves, halves.astype(np.float32)))
    for image, other in zip(ours.get_images(), expected.get_images(), strict=True):
        np.testing.assert_allclose(image.get_array(), other.get_array(), rtol=0.01 if name == "masking" else 1e-6)
    assert len(ours.lines) == len(expected.lines) and ours.get_title() == expected.get_title()
    for statistic in (heads.entropy, heads.distance, heads.heads_of):
        np.testing.assert_array_equal(statistic(halves), statistic(halves.astype(np.float32)), strict=True)


def test_tensors():
    """Of bfloat16, and with a gradient, which NumPy does not read."""
    torch = pytest.importorskip("torch")
    weights = torch.from_numpy(random_weights(12)).float()
    for given in (weights.bfloat16(), weights.requires_grad_()):
        for statistic in (heads.entropy, heads.distance):
            np.testing.assert_array_equal(statistic(given), statistic(given.detach().float().numpy()))


def test_import_leaves_matplotlib_alone():
    run_child(
        "import sys, mha_c; assert 'matplotlib' not in sys.modules; mha_c.heads; assert 'matplotlib' not in sys.modules"
    )


def test_missing_matplotlib():
    code = """
        import sys
        sys.modules["matplotlib"] = None
        import mha_c
        try:
            mha_c.plot
        except ImportError as error:
            assert "mha_c.plot needs matplotlib" in str(error) and "pip install 'mha-c[plot]'" in str(error)
        else:
            raise AssertionError
    """
    run_child(code)


def test_weights_are_drawn_as_they_are():
    w = random_weights(5)
    ax = plot.weights(w, 2, tokens=words(5))
    np.testing.assert_array_equal(drawn(ax), w[0, 2])
    assert ax.get_title() == "Attention weights, head 2"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    for axis in (ax.xaxis, ax.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == words(5)
    assert [text.get_text() for text in ax.texts] == [f"{number:.2f}" for number in w[0, 2].ravel()]
    norm = ax.get_images()[0].norm
    assert (norm.vmin, norm.vmax) == (0, w[0, 2].max())


def test_shapes_and_items():
    w = np.concatenate([random_weights(4, seed=seed) for seed in range(3)])
    np.testing.assert_array_equal(drawn(plot.weights(w, 1, item=2)), w[2, 1])
    np.testing.assert_array_equal(drawn(plot.weights(w[2], 1, averaged=False)), w[2, 1])
    ax = plot.weights(w[2, 1])
    np.testing.assert_array_equal(drawn(ax), w[2, 1])
    assert ax.get_title() == "Attention weights"
    np.testing.assert_allclose(drawn(plot.average(w, item=1)), w[1].mean(axis=0))
    assert plot.weights(w.tolist()).get_title() == "Attention weights, head 0"
    np.testing.assert_array_equal(drawn(plot.weights(w, item=-1)), w[2, 0])


def test_what_the_layer_returns():
    """By default (N, L, S), which is not (H, L, S): no picture of it names a head."""
    module, x = layer(8, 4, training=False), normal((6, 2, 8))
    averages = module(x, x, x)[1]
    for draw in DRAW_ARRAYS.values():
        with pytest.raises(ValueError, match=r"averaged=True if they are \(N, L, S\).*averaged=False if they are \(H, L, S\)"):
            draw(averages)
    for draw in (plot.weights, plot.average):
        ax = draw(averages, item=1, averaged=True)
        np.testing.assert_array_equal(drawn(ax), averages[1])
        assert ax.get_title() == "Attention weights, average of the heads"
    assert plot.token(averages, 2, averaged=True).get_title() == "Where query 2 looks, average of the heads"
    np.testing.assert_array_equal(heads.heads_of(averages, 1, averaged=True), averages[1:])
    for draw in (plot.heads, plot.entropy, plot.distance, heads.to_bertviz):
        for matrices, averaged in ((averages, True), (averages[0], None), (averages[0], True)):
            with pytest.raises(ValueError, match="average_attn_weights=False"):
                draw(matrices, averaged=averaged)
    with pytest.raises(ValueError, match="no head 1: this is one matrix"):
        plot.weights(averages, 1, averaged=True)
    with pytest.raises(ValueError, match=r"\(N, L, S\) or \(L, S\) if averaged"):
        plot.weights(random_weights(5), averaged=True)
    alone = module(x[:, 0], x[:, 0], x[:, 0])[1]
    assert plot.weights(alone, averaged=True).get_title() == "Attention weights, average of the heads"
    by_head = module(x[:, 0], x[:, 0], x[:, 0], average_attn_weights=False)[1]
    assert plot.weights(by_head, 1, averaged=False).get_title() == "Attention weights, head 1"
    assert len(plot.heads(by_head, averaged=False)) == 4


@pytest.mark.parametrize("item", [3, -4])
def test_items_that_are_not_there(item):
    module, x = layer(8, 4), normal((6, 3, 8))
    explanation = mha_c.explain(module, x, x, x)
    for draw in DRAW_ARRAYS.values():
        for source in (np.asarray(explanation.weights), explanation):
            with pytest.raises(IndexError, match=f"there is no item {item}: the batch has 3"):
                draw(source, item=item)
        with pytest.raises(IndexError, match="has no batch"):
            draw(mha_c.explain(module, x[:, 0], x[:, 0], x[:, 0]), item=item)


def test_what_cannot_be_weights():
    w = random_weights(5)
    dropped = np.where(w == w.max(axis=-1, keepdims=True), 0, w)
    wrong = {"are they scores": np.log(w), "sum to 1": 1.05 * w, "eval": dropped, "sum to 3": np.ones((1, 4, 3, 3))}
    for match, matrices in wrong.items():
        for draw in DRAW_ARRAYS.values():
            with pytest.raises(ValueError, match=match):
                draw(matrices)
    unseen = w.copy()
    unseen[0, :, 1], unseen[0, :, 2] = np.nan, 0
    for right in (w.astype(np.float16), np.round(w, 2), unseen, np.eye(5)[None, None], w[:, :, :0], np.zeros((1, 4, 5, 0))):
        heads.heads_of(right)
    with pytest.raises(ValueError, match="query 3 in matrix 2"):
        heads.heads_of(np.where(np.arange(20).reshape(1, 4, 5, 1) == 13, 0.5, w))
    module, x = layer(8, 4, dropout=0.5, training=True), normal((6, 3, 8))
    plot.heads(mha_c.explain(module, x, x, x))  # which says itself that these are weights


def test_the_layer_is_in_the_title():
    w = random_weights(5)
    assert plot.weights(w, 3, layer=2).get_title() == "Attention weights, layer 2, head 3"
    assert plot.average(w, layer="decoder.0").get_title() == "Attention weights, layer decoder.0, average of 4 heads"
    assert [ax.get_title() for ax in plot.heads(w, layer=0)][:2] == ["layer 0, head 0", "layer 0, head 1"]
    assert plot.token(w, 1, 2, layer=5).get_title() == "Where query 1 looks, layer 5, head 2"
    assert plot.entropy(w, layer=1).get_title() == "How widely each head looks, layer 1"
    assert plot.distance(w, layer=1).get_title() == "How far each head looks, layer 1"
    before, _ = plot.masking(w, w, head=1, layer=2)
    assert before.get_title() == "Scores before masks, layer 2, head 1"


def test_axes_in_axes_out():
    """Nothing but the axes given is drawn into, and no figure opened."""
    w = random_weights(5)
    figure, grid = pyplot.subplots(2, 4)
    assert plot.weights(w, ax=grid[0, 0]) is grid[0, 0]
    assert plot.average(w, ax=grid[0, 1]) is grid[0, 1]
    assert plot.entropy(w, ax=grid[0, 2]) is grid[0, 2]
    assert plot.distance(w, ax=grid[0, 3]) is grid[0, 3]
    assert plot.token(w, 0, ax=grid[1, 0]) is grid[1, 0]
    assert list(plot.masking(w, w, axes=grid[1, 1:3], colorbar=False)) == list(grid[1, 1:3])
    assert pyplot.get_fignums() == [figure.number]
    _, grid = pyplot.subplots(2, 2)
    assert list(plot.heads(w, axes=grid)) == list(grid.flat)
    assert len(plot.heads(w)) == 4


def test_no_colorbar():
    w = random_weights(5)
    for ax in (plot.weights(w, colorbar=False), plot.average(w, colorbar=False), plot.heads(w, colorbar=False)[0]):
        assert not [other for other in ax.figure.axes if other.get_label() == "<colorbar>"]
    assert plot.weights(w).figure.axes[1].get_label() == "<colorbar>"


def test_explanation():
    module, x = layer(8, 4), normal((5, 3, 8))
    explanation = mha_c.explain(module, x, x, x, is_causal=True)
    np.testing.assert_array_equal(drawn(plot.weights(explanation, 3, item=2)), explanation.weights[2, 3])
    assert len(plot.heads(explanation)) == 4
    before, after = plot.masking(explanation, head=1, item=1)
    np.testing.assert_array_equal(drawn(before), explanation.scores[1, 1])
    np.testing.assert_array_equal(drawn(after).mask, np.tri(5) == 0)
    np.testing.assert_array_equal(drawn(after).compressed(), explanation.scores[1, 1][np.tri(5) == 1])
    some = mha_c.explain(module, x, x, x, heads=[3, 1], stages=["weights"])
    assert [ax.get_title() for ax in plot.heads(some)] == ["head 3", "head 1"]
    assert plot.average(some).get_title() == "Attention weights, average of heads 3, 1"
    assert plot.weights(some).get_title() == "Attention weights, head 3"
    np.testing.assert_array_equal(plot.entropy(some).lines[0].get_xdata(), [3, 1])
    np.testing.assert_array_equal(drawn(plot.entropy([some, explanation])).mask[0], [True, False, True, False])
    with pytest.raises(ValueError, match="weights of each head"):
        plot.weights(explanation, averaged=True)
    np.testing.assert_array_equal(drawn(plot.weights(some, 1)), explanation_weights(module, x, 1))
    with pytest.raises(ValueError):
        plot.weights(some, 2)
    with pytest.raises(AttributeError):
        plot.weights(mha_c.explain(module, x, x, x, stages=["scores"]))


def explanation_weights(module, x, head):
    return module(x, x, x, average_attn_weights=False)[1][0, head]


@pytest.mark.parametrize("length", [500, 503, 1201])
def test_bins(length):
    """Many tokens share cells; a row still adds up to 1, and the title says how many share."""
    w = random_weights(length)
    ax = plot.weights(w, tokens=words(length))
    cells = np.asarray(drawn(ax))
    size = {500: 5, 503: 5, 1201: 10}[length]
    assert cells.shape == (-(-length // size),) * 2
    assert ax.get_title() == f"Attention weights, head 0, bins of {size} × {size}"
    np.testing.assert_allclose(cells.sum(axis=1), 1)
    np.testing.assert_allclose(cells[1, 2], w[0, 0, size : 2 * size, 2 * size : 3 * size].sum(axis=1).mean())
    np.testing.assert_allclose(
        cells[-1, -1], w[0, 0, size * (len(cells) - 1) :, size * (len(cells) - 1) :].sum(axis=1).mean()
    )
    assert ax.get_xlabel() == "key (position)"
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, length - 0.5), (length - 0.5, -0.5))
    ax.figure.canvas.draw()
    assert ax.get_window_extent().width / ax.figure.dpi * 72 / len(cells) >= 1.9  # points


def test_bins_of_scores_are_means_of_what_is_visible():
    scores = normal((400, 400))
    before, after = plot.masking(scores, np.where(np.tri(400), scores, -np.inf))
    rows = 400 // len(drawn(before))
    np.testing.assert_allclose(drawn(before)[1, 0], scores[rows : 2 * rows, :rows].mean(), rtol=1e-5)
    visible = scores[:rows, :rows][np.tri(rows) == 1]
    np.testing.assert_allclose(drawn(after)[0, 0], visible.mean(), rtol=1e-5)
    np.testing.assert_array_equal(drawn(after).mask, np.tri(400 // rows) == 0)
    assert f"bins of {rows} × {rows}" in before.get_title()


def test_more_keys_than_queries():
    w = random_weights(3, source_length=40)
    ax = plot.weights(w, tokens=words(3), key_tokens=words(40))
    assert drawn(ax).shape == (3, 40)
    assert [label.get_text() for label in ax.get_yticklabels()] == words(3)
    assert plot.weights(random_weights(3, source_length=900)).get_title().endswith("bins of 1 × 5")
    assert plot.token(w, 0, tokens=words(3), key_tokens=words(40)).get_title().startswith('Where "the" (0) looks')


def test_queries_without_weights_are_hatched():
    w = random_weights(6)
    w[0, :, 2] = np.nan
    ax = plot.weights(w)
    np.testing.assert_array_equal(drawn(ax).mask.all(axis=1), np.arange(6) == 2)
    assert ax.patch.get_hatch()
    assert np.isnan(heads.entropy(w)[:, 2]).all() and not np.isnan(heads.entropy(w)[:, 1]).any()
    np.testing.assert_allclose(plot.entropy(w).lines[0].get_ydata(), np.nanmean(heads.entropy(w), axis=1))
    plot.token(w, 2)
    assert plot.token(w, 2, 0).get_title() == "Where query 2 looks, head 0\n(it sees no key)"
    plot.average(np.full((1, 2, 300, 300), np.nan))


def test_heads_share_a_scale():
    w = random_weights(7, num_heads=5)
    axes = plot.heads(w)
    assert {(ax.get_images()[0].norm.vmin, ax.get_images()[0].norm.vmax) for ax in axes} == {(0, w.max())}
    for head, ax in enumerate(axes):
        np.testing.assert_array_equal(drawn(ax), w[0, head])
    assert plot.heads(w, vmax=0.5)[0].get_images()[0].norm.vmax == 0.5


def test_heads_of_known_shapes():
    """A head that looks at itself, at its neighbour, everywhere: what the two numbers say, and the pictures."""
    eye, everywhere = np.eye(8), np.full((8, 8), 1 / 8)
    w = np.stack([eye, np.roll(eye, 1, axis=1), everywhere])[None]
    np.testing.assert_allclose(heads.entropy(w).mean(axis=1), [0, 0, 3])
    np.testing.assert_allclose(heads.distance(w).mean(axis=1), [0, (7 + 7) / 8, 2.625])
    np.testing.assert_allclose(plot.entropy(w).lines[0].get_ydata(), [0, 0, 3])
    np.testing.assert_allclose(plot.distance(w).lines[0].get_ydata(), [0, 1.75, 2.625])
    table = plot.distance([w, w[:, ::-1]])
    np.testing.assert_allclose(drawn(table), [[0, 1.75, 2.625], [2.625, 1.75, 0]])
    assert (table.get_xlabel(), table.get_ylabel()) == ("head", "layer")
    with pytest.raises(ValueError, match="one key for each query"):
        plot.distance(random_weights(3, source_length=5))


def test_token_lines():
    w = random_weights(6)
    ax = plot.token(w, 2, 1, tokens=words(6))
    ends = {int(line.get_xdata()[1]): line for line in ax.lines}
    row = w[0, 1, 2]
    assert set(ends) == set(np.flatnonzero(row > 0.01 * row.max()))
    assert all(line.get_xdata()[0] == 2 for line in ends.values())
    order = sorted(ends, key=lambda key: row[key])
    widths = [ends[key].get_linewidth() for key in order]
    assert widths == sorted(widths) and len(set(widths)) == len(widths)
    strong = [f"{word}  {weight:.2f}" if weight > 0.5 * row.max() else word for word, weight in zip(words(6), row)]
    assert [text.get_text() for text in ax.texts] == words(6) + strong
    assert ax.texts[6 + order[-1]].get_fontweight() == "bold"
    assert ax.get_title() == 'Where "lighthouse" (2) looks, head 1'
    assert plot.token(w, -1).get_title() == "Where query 5 looks, average of 4 heads"


def test_token_without_a_favourite():
    """Weights that are nearly uniform have their numbers under the words."""
    ax = plot.token(np.full((1, 4, 5, 5), 0.2), "cat", tokens="the cat sat on mats".split())
    assert [text.get_text() for text in ax.texts[5:]] == [f"{word}\n0.20" for word in "the cat sat on mats".split()]


def test_token_by_its_word():
    w = random_weights(12)
    sentence = words(12)  # "the" is in it three times
    assert plot.token(w, "keeper", tokens=sentence).get_title().startswith('Where "keeper" (3) looks')
    for wrong, error, match in (
        ("the", ValueError, "'the' is the word at positions 0, 5: pass one of these"),
        ("cat", ValueError, "'cat' is not one of the words: the old lighthouse"),
        (12, IndexError, "there is no query 12: there are 12"),
        (-13, IndexError, "there is no query -13"),
        (1.5, TypeError, "integer"),
    ):
        with pytest.raises(error, match=match):
            plot.token(w, wrong, tokens=sentence)
    with pytest.raises(TypeError, match="'keeper' is a word, but tokens= is missing: pass tokens="):
        plot.token(w, "keeper")
    cross = random_weights(3, source_length=5)
    assert plot.token(cross, "b", tokens=list("abc"), key_tokens=words(5)).get_title().startswith('Where "b" (1)')
    with pytest.raises(TypeError, match="pass tokens="):
        plot.token(cross, "old", key_tokens=words(5))


def test_token_among_many():
    """The strongest keys have their words and positions; the title says how many."""
    w = random_weights(500)
    ax = plot.token(w, 250, 0, tokens=words(500))
    row = w[0, 0, 250]
    query, *keys = [text.get_text() for text in ax.texts]
    assert query == f"{words(500)[250]} (250)"
    assert f"{words(500)[row.argmax()]} ({row.argmax()})  {row.max():.2f}" in keys
    assert 3 <= len(keys) <= 15
    assert f"the {len(keys)} strongest of 500 keys" in ax.get_title()


def test_masks_that_hide_by_large_numbers():
    """-1e9 hides as -inf does, and leaves the scale of the others alone."""
    scores = normal((5, 5))
    before, after = plot.masking(scores, np.where(np.tri(5), scores, scores - 1e9))
    np.testing.assert_array_equal(drawn(after).mask, np.tri(5) == 0)
    norms = [ax.get_images()[0].norm for ax in (before, after)]
    assert {(norm.vmin, norm.vmax) for norm in norms} == {(-np.abs(scores).max(), np.abs(scores).max())}


def test_words_are_shown_as_they_are():
    """No mathematics between dollar signs, no markup; long ones are cut."""
    odd = ["$5", "5$", "_x^2", "<b>", "Donaudampfschifffahrtsgesellschaft"]
    ax = plot.weights(random_weights(5), tokens=odd)
    shown = [label.get_text() for label in ax.get_xticklabels()]
    assert shown[:4] == odd[:4] and shown[4] == "Donaudampfschif…"
    plot.token(random_weights(5), 0, tokens=odd)
    for number in pyplot.get_fignums():
        pyplot.figure(number).canvas.draw()


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda w: plot.weights(w, tokens=["a"]), "there are 5 queries, but 1 tokens"),
        (lambda w: plot.weights(w, tokens=words(5), key_tokens=["a"]), "there are 5 keys, but 1 tokens"),
        (lambda w: plot.heads(w, tokens=["a"]), "there are 5 queries"),
        (lambda w: plot.token(w, 0, tokens=["a"]), "there are 5 queries"),
        (lambda w: plot.weights(w, 4), "there is no head 4"),
        (lambda w: plot.masking(w, w, item=1), "there is no item 1: the batch has 1"),
        (lambda w: plot.masking(w, w, 4), "there is no head 4"),
        (lambda w: plot.weights(np.zeros(3)), "these have shape"),
        (lambda w: plot.weights(None), "^weights is None: call the layer with need_weights=True$"),
        (lambda w: heads.entropy((w[0], w[0, 0])), r"tuple of 2: pass one of them, such as the weights, layer\(\.\.\.\)\[1\]$"),
        (lambda w: plot.heads(w, axes=[pyplot.gca()]), "4 heads need 4 axes"),
        (lambda w: plot.masking(w, w, axes=[pyplot.gca()]), "two axes"),
        (lambda w: plot.masking(w), "before and after"),
    ],
)
def test_refused(call, error):
    with pytest.raises((ValueError, IndexError, TypeError), match=error):
        call(random_weights(5))


def test_explanations_of_layers_and_stacks_say_where_their_attention_is():
    x = normal((5, 3, 8))
    encoder = mha_c.TransformerEncoder(mha_c.TransformerEncoderLayer(8, 4, 16), 2).eval()
    decoder_layer = mha_c.TransformerDecoderLayer(8, 4, 16).eval()
    of_stack, of_decoder = mha_c.explain(encoder, x), mha_c.explain(decoder_layer, x, x)
    for draw in (*DRAW_ARRAYS.values(), heads.entropy, heads.to_bertviz):
        with pytest.raises(TypeError, match=r"pass the attention of one of them, explanation\[0\]\.self_attn$"):
            draw(of_stack)
        with pytest.raises(TypeError, match=r"pass the attention in it, explanation\.self_attn$"):
            draw(of_stack[0])
        with pytest.raises(TypeError, match=r"in it, explanation\.self_attn or explanation\.multihead_attn$"):
            draw(of_decoder)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("length", [5, 30, 500])
@pytest.mark.parametrize("name", DRAW)
def test_legible(name, length, style):
    """Every text lies within the figure, stands out against what is behind it, is large enough, and covers no other."""
    with pyplot.style.context(style):
        figure = DRAW[name](random_weights(length), words(length)).figure
    found = texts(figure)
    assert len(found) > 4
    background = figure.get_facecolor()
    for text, box in found:
        assert text.get_fontsize() >= 5, text
        assert box.x0 >= -1 and box.y0 >= -1, (text, box)
        assert box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1, (text, box)
        on_a_cell = text.axes is not None and text.axes.get_images() and text in text.axes.texts
        if not on_a_cell:
            alpha = 1 if text.get_alpha() is None else text.get_alpha()
            seen = alpha * np.array(to_rgb(text.get_color())) + (1 - alpha) * np.array(to_rgb(background))
            assert contrast(seen, background) >= 4.5, text
    boxes = [box.padded(-1) for _, box in found]
    for number, box in enumerate(boxes):
        for other, other_box in enumerate(boxes[:number]):
            assert not box.overlaps(other_box), (found[number][0], found[other][0])


@pytest.mark.parametrize("style", STYLES)
def test_the_background_decides(style):
    """Axes made in one style are drawn into while another one is in force."""
    with pyplot.style.context(style):
        figure, (left, right) = pyplot.subplots(1, 2)
    other = STYLES[1 - STYLES.index(style)]
    with pyplot.style.context(other):
        plot.weights(random_weights(5), ax=left)
        plot.token(random_weights(5), 0, tokens=words(5), ax=right)
    for text, _ in texts(figure):
        if text not in left.texts:
            assert contrast(text.get_color(), figure.get_facecolor()) >= 4.5, text
    dark = style == "dark_background"
    zero, one = (to_rgb(left.get_images()[0].cmap(end)) for end in (0.0, 1.0))
    assert (sum(zero) < sum(one)) == dark


def test_colours_without_hue():
    """Weights can be read from lightness alone, and scores from their distance to the middle: for any colour vision."""

    def lightness(colors):
        r, g, b = np.array([to_rgb(colors(number)) for number in np.linspace(0, 1, 65)]).T
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for style in STYLES:
        with pyplot.style.context(style):
            ax = plot.weights(random_weights(5))
            scores = plot.masking(normal((5, 5)), normal((5, 5)))[0]
        steps = np.diff(lightness(ax.get_images()[0].cmap))
        assert (steps > 0).all() or (steps < 0).all()
        below, above = scores.get_images()[0].cmap([0.25, 0.75])[:, :3]
        np.testing.assert_allclose([below, above], np.divide([NEGATIVE, POSITIVE], 255), atol=0.02)  # as in notebooks
        steps = np.diff(lightness(scores.get_images()[0].cmap))
        middle = len(steps) // 2
        assert (np.sign(steps[:middle]) == -np.sign(steps[middle:])).mean() > 0.95


def test_in_words():
    """What axes show is in their label, and in the alternative text that IPython puts beside a figure's picture."""
    formatters = pytest.importorskip("IPython.core.formatters")
    w = np.zeros((1, 2, 3, 3))
    w[0, 0], w[0, 1] = [[0.1, 0.7, 0.2], [0, 0, 0], [0.3, 0.1, 0.6]], np.eye(3)
    sentence = ["a", "kitten", "sleeps"]
    said = plot.weights(w, 0, layer=1, tokens=sentence).get_label()
    assert said == (
        "Attention weights, layer 1, head 0, 3 queries by 3 keys. The largest weights of its queries: "
        'from "a" (0) to "kitten" (1) 0.70, from "sleeps" (2) to "sleeps" (2) 0.60.'
    )
    assert plot.token(w, 2, 0, tokens=sentence).get_label() == (
        'Where "sleeps" (2) looks, head 0: "sleeps" (2) 0.60, "a" (0) 0.30, "kitten" (1) 0.10.'
    )
    assert plot.token(w, 1, 0).get_label() == "Where query 1 looks, head 0: it sees no key."
    assert plot.entropy(w).get_label().endswith("in bits, head 0: 1.23, head 1: 0.00.")
    assert "layer 0: 0.00 to 1.23" in plot.entropy([w, w]).get_label()
    figure, axes = pyplot.subplots(1, 2)
    plot.masking(np.zeros((3, 3)), np.where(np.tri(3), 0, -np.inf), axes=axes)
    assert axes[1].get_label() == "Scores after masks, 3 queries by 3 keys; 3 of 9 pairs are hidden."
    formatter = formatters.DisplayFormatter()
    formatter.formatters["image/png"].for_type(pyplot.Figure, lambda shown: b"png")
    data, metadata = formatter.format(figure)
    assert data["image/png"] == b"png"
    assert metadata == {"image/png": {"alt": f"{axes[0].get_label()} {axes[1].get_label()}"}}
    copied = pickle.loads(pickle.dumps(figure))
    assert formatter.format(copied)[1] == metadata
    before = plot.heads(np.full((1, 2, 3, 3), 1 / 3), layer=4)[1]
    assert before.get_label() == "layer 4, head 1: the largest weight is from query 0 to key 0 0.33."


def test_bertviz():
    """The form that bertviz documents: per layer a tensor (1, H, L, S); and bertviz itself takes it where installed."""
    torch = pytest.importorskip("torch")
    layers = [np.concatenate([random_weights(5, seed=seed)] * 2).astype(np.float32) for seed in range(3)]
    form = heads.to_bertviz(*layers, item=1)
    assert [tuple(tensor.shape) for tensor in form] == [(1, 4, 5, 5)] * 3
    for tensor, w in zip(form, layers):
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor[0].numpy(), w[1])
    bertviz = pytest.importorskip("bertviz")
    shown = bertviz.head_view(form, words(5), html_action="return")
    assert "lighthouse" in shown.data


def test_bertviz_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        heads.to_bertviz(random_weights(5))
