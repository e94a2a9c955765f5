# SPDX-License-Identifier: Apache-2.0
"""Pictures and numbers of heads: what the artists show, whether it can be read, and what is refused."""

import sys

import mha_c
import numpy as np
import pytest
from helpers import layer, normal, run_child
from mha_c import heads

plot = pytest.importorskip("mha_c.plot", reason="needs matplotlib", exc_type=ImportError)
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.text import Text

STYLES = ["default", "dark_background"]
WORDS = "the old lighthouse keeper climbed the narrow stairs every evening , lit the lamp and watched".split()
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
    np.testing.assert_array_equal(drawn(plot.weights(w[2], 1)), w[2, 1])
    ax = plot.weights(w[2, 1])
    np.testing.assert_array_equal(drawn(ax), w[2, 1])
    assert ax.get_title() == "Attention weights"
    np.testing.assert_allclose(drawn(plot.average(w, item=1)), w[1].mean(axis=0))
    assert plot.weights(w.tolist(), 0).get_title() == "Attention weights, head 0"


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
    plot.average(np.full((2, 300, 300), np.nan))


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
    w = np.stack([eye, np.roll(eye, 1, axis=1), everywhere])
    np.testing.assert_allclose(heads.entropy(w).mean(axis=1), [0, 0, 3])
    np.testing.assert_allclose(heads.distance(w).mean(axis=1), [0, (7 + 7) / 8, 2.625])
    np.testing.assert_allclose(plot.entropy(w).lines[0].get_ydata(), [0, 0, 3])
    np.testing.assert_allclose(plot.distance(w).lines[0].get_ydata(), [0, 1.75, 2.625])
    table = plot.distance([w, w[::-1]])
    np.testing.assert_allclose(drawn(table), [[0, 1.75, 2.625], [2.625, 1.75, 0]])
    assert (table.get_xlabel(), table.get_ylabel()) == ("head", "layer")
    with pytest.raises(ValueError, match="as many keys as queries"):
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
    assert [text.get_text() for text in ax.texts] == words(6) * 2
    assert ax.texts[6 + order[-1]].get_fontweight() == "bold"
    assert ax.get_title() == 'Where "lighthouse" (2) looks, head 1'
    assert plot.token(w, -1).get_title() == "Where query 5 looks, average of 4 heads"


def test_token_among_many():
    """The strongest keys have their words and positions; the title says how many."""
    w = random_weights(500)
    ax = plot.token(w, 250, 0, tokens=words(500))
    row = w[0, 0, 250]
    query, *keys = [text.get_text() for text in ax.texts]
    assert query == f"{words(500)[250]} (250)"
    assert f"{words(500)[row.argmax()]} ({row.argmax()})" in keys
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
        (lambda w: plot.weights(w, item=1), "out of bounds"),
        (lambda w: plot.token(w, 5), "out of range"),
        (lambda w: plot.weights(np.zeros(3)), "these have shape"),
        (lambda w: plot.heads(w, axes=[pyplot.gca()]), "4 heads need as many axes"),
        (lambda w: plot.masking(w, w, axes=[pyplot.gca()]), "two axes"),
        (lambda w: plot.masking(w), "before and after"),
    ],
)
def test_refused(call, error):
    with pytest.raises((ValueError, IndexError, TypeError), match=error):
        call(random_weights(5))


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
        if not on_a_cell and (text.get_alpha() or 1) == 1:
            assert contrast(text.get_color(), background) >= 4.5, text
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
        steps = np.diff(lightness(scores.get_images()[0].cmap))
        middle = len(steps) // 2
        assert (np.sign(steps[:middle]) == -np.sign(steps[middle:])).mean() > 0.95


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
