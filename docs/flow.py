# SPDX-License-Identifier: Apache-2.0
"""Draw the README's picture, flow.svg: the diagram that `mha_c.explain` shows in a notebook, as a file of its own.

    python docs/flow.py docs/flow.svg
"""

import re
import sys
from pathlib import Path

import numpy as np

import mha_c

MARGIN = 16

# The colours of mha_c/explanation/style.css; a background of its own makes the picture readable on any page.
STYLE = """
  .page { fill: #fff; stroke: #d0d7de } svg { color: #1f2328; font: 11px system-ui, sans-serif }
  text { fill: currentColor; text-anchor: middle } .name { font-weight: 600; font-size: 12px }
  .step { opacity: .75; text-anchor: start }
  g rect { fill: rgba(36, 122, 182, .13); stroke: #247ab6 } .input rect { fill: rgba(128, 128, 128, .1); stroke: #888 }
  path { stroke: currentColor; stroke-opacity: .6; fill: none } .head { fill: currentColor; fill-opacity: .6; stroke: none }
  @media (prefers-color-scheme: dark) { .page { fill: #15191f; stroke: #3d444d } svg { color: #e6edf3 } }
"""


def draw() -> str:
    """The flow of the README's example: 4 heads, a sequence of 5, a batch of 3, 8 features."""
    attention = mha_c.MultiheadAttention(embed_dim=8, num_heads=4, seed=0).eval()
    x = np.random.default_rng(0).standard_normal((5, 3, 8), dtype=np.float32)
    html = mha_c.explain(attention, x, x, x)._repr_html_()
    found = re.search(r'<svg viewBox="0 0 (\d+) (\d+)".*?</svg>', html, re.S)
    assert found
    width, height = map(int, found.groups())
    size = f'width="{width + 2 * MARGIN}" height="{height + 2 * MARGIN}"'
    inner = found[0].replace("<svg ", f'<svg x="{MARGIN}" y="{MARGIN}" width="{width}" height="{height}" ')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width + 2 * MARGIN} {height + 2 * MARGIN}">
<style>{STYLE}</style>
<rect class="page" x="0.5" y="0.5" width="{width + 2 * MARGIN - 1}" height="{height + 2 * MARGIN - 1}" rx="6"/>
{inner}
</svg>
"""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), "utf-8")
