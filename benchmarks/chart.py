# SPDX-License-Identifier: Apache-2.0
"""A chart of ratios as SVG: for each workload a bar for each opponent, from the line 1× on.

The picture has a background of its own, and follows the reader's choice of light or dark where the page lets it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_WIDTH, _MARGIN, _TOP, _ROW, _BAR, _LABEL = 440, 14, 40, 22, 15, 48  # pixels; the label: room for "29.6×" beside a bar

_STYLE = """
  .page { fill: #fff; stroke: #d0d7de }
  text { fill: #1f2328; font: 14px system-ui, sans-serif }
  .title { font-weight: 600 }
  .small { font-size: 13px; fill: #59636e; stroke: #fff; stroke-width: 3px; paint-order: stroke }
  .grid { stroke: #d0d7de } .one { stroke: #1f2328 }
  .bar0 { fill: #1f5fa8 } .bar1 { fill: #8cb8e6 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #15191f; stroke: #3d444d } text { fill: #e6edf3 } .small { fill: #9aa4af; stroke: #15191f }
    .grid { stroke: #3d444d } .one { stroke: #e6edf3 } .bar0 { fill: #58a6ff } .bar1 { fill: #2f5f96 }
  }
"""


def draw(title: str, names: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """The picture: each of the `series` has a ratio for each of the workloads `names`."""
    ratios = [1.0, *itertools.chain(*series.values())]
    left, right = min(ratios), max(ratios)
    scale = (_WIDTH - 2 * _MARGIN - _LABEL) / (math.log(right / left) or 1)

    def x(ratio: float) -> float:
        return _MARGIN + scale * math.log(ratio / left)

    top = _TOP + _ROW * len(series)
    step = _ROW + _BAR * len(series) + 10
    bottom = top + step * len(names)
    height = bottom + 24
    drawn = [f'<text x="{_MARGIN}" y="28" class="title">{escape(title)}</text>']
    for number, what in enumerate(series):
        y = _TOP + _ROW * number
        drawn.append(f'<rect class="bar{number}" x="{_MARGIN}" y="{y}" width="12" height="12"/>')
        drawn.append(f'<text class="small" x="{_MARGIN + 20}" y="{y + 11}">{escape(what)}</text>')
    ticks = [tick for tick in _TICKS if left <= tick <= right]
    for number, (name, *row) in enumerate(zip(names, *series.values(), strict=True)):
        y = top + step * number + _ROW
        drawn.append(f'<text x="{_MARGIN}" y="{y - 6}">{escape(name)}</text>')
        for tick in ticks:
            line = "one" if tick == 1 else "grid"
            drawn.append(f'<path class="{line}" d="M{x(tick):.1f} {y - 2}v{_BAR * len(row) + 2}"/>')
        for bar, ratio in enumerate(row):
            start, end, y_bar = min(x(1), x(ratio)), max(x(1), x(ratio)), y + _BAR * bar
            place = f'x="{start:.1f}" y="{y_bar}" width="{end - start:.1f}" height="{_BAR - 2}"'
            drawn.append(f'<rect class="bar{bar}" {place}/>')
            drawn.append(f'<text class="small" x="{end + 5:.1f}" y="{y_bar + 11}">{times(ratio)}</text>')
    for tick in ticks:
        drawn.append(f'<text class="small" x="{x(tick):.1f}" y="{bottom + 10}" text-anchor="middle">{tick:g}×</text>')
    body = "\n".join(drawn)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}">
<style>{_STYLE}</style>
<rect class="page" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="6"/>
{body}
</svg>
"""


def times(ratio: float) -> str:
    """A ratio as people read it: 1.06×, 29.6×."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"
