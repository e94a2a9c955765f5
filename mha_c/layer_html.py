# SPDX-License-Identifier: Apache-2.0
"""A layer as HTML: its arguments, its parameters with shapes and bytes, and what computes it here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_c import _core
from mha_c.markup import block, escape, table

if TYPE_CHECKING:
    from mha_c.attention import MultiheadAttention

__all__ = ["render"]


def render(layer: MultiheadAttention) -> str:
    """What a notebook shows of a layer.

    Parameters
    ----------
    layer : MultiheadAttention

    Returns
    -------
    str
        HTML in itself: no script, nothing to load.

    Examples
    --------
    >>> import mha_c
    >>> html = render(mha_c.MultiheadAttention(8, 4))
    >>> "in_proj_weight" in html, "(24, 8)" in html, "1,152 bytes" in html
    (True, True, True)
    """
    arrays = layer._parameters.arrays
    rows = [(name, _axes(layer, name), str(array.shape), f"{array.nbytes:,}") for name, array in arrays.items()]
    count, nbytes = sum(array.size for array in arrays.values()), sum(array.nbytes for array in arrays.values())
    config = _core.config()
    mode = "Training mode" if layer.training else "Evaluation mode"
    drops = f"dropout of {layer.dropout}" if layer.training and layer.dropout > 0 else "no dropout"
    facts = [
        f"{count:,} parameters in {layer._parameters.dtype.name}, {nbytes:,} bytes, and about as many again packed for "
        f"the kernels ({config['cpu_level']}). Up to {config['threads']} threads.",
        f"{mode}: {drops}.",
    ]
    lines = "".join(f'<p class="faint">{escape(fact)}</p>' for fact in facts)
    parameters = table(("parameter", "axes", "shape", "bytes"), rows, text=(0, 1))
    return block(f"<p><b>{escape(type(layer).__name__)}</b>({escape(_arguments(layer))})</p>{parameters}{lines}")


def _arguments(layer: MultiheadAttention) -> str:
    """The constructor's arguments, as far as they are not the default ones."""
    w = layer._parameters.widths
    given = {
        "dropout": (layer.dropout, 0.0),
        "bias": ("out_proj.bias" in layer._parameters.arrays, True),
        "add_bias_kv": (layer.bias_k is not None, False),
        "add_zero_attn": (bool(layer.add_zero_attn), False),
        "kdim": (w.kdim, w.embed_dim),
        "vdim": (w.vdim, w.embed_dim),
        "batch_first": (bool(layer.batch_first), False),
        "dtype": (layer._parameters.dtype.name, "float32"),
        "masked_rows": (layer.masked_rows, "torch"),
        "head_dim": (w.head_dim, w.embed_dim / w.num_heads),
        "v_head_dim": (w.v_head_dim, w.head_dim),
        "out_dim": (w.out_dim, w.embed_dim),
        "num_kv_heads": (w.num_kv_heads, w.num_heads),
    }
    changed = [f"{name}={value!r}" for name, (value, default) in given.items() if value != default]
    return ", ".join([f"embed_dim={w.embed_dim}", f"num_heads={w.num_heads}", *changed])


def _axes(layer: MultiheadAttention, name: str) -> str:
    """What the axes of a parameter count."""
    w = layer._parameters.widths
    kv = "H" if w.num_kv_heads == w.num_heads else "Hkv"
    dv = "D" if w.v_head_dim == w.head_dim else "Dv"
    q, k, v = "H·D", f"{kv}·D", f"{kv}·{dv}"
    stacked = " + ".join((q, k, v)) if len({q, k, v}) > 1 else f"3·{q}"
    names = {"q_proj_weight": f"({q}, E)", "k_proj_weight": f"({k}, Ek)", "v_proj_weight": f"({v}, Ev)"}
    names |= {"in_proj_weight": f"({stacked}, E)", "in_proj_bias": f"({stacked},)"}
    names |= {"bias_k": f"(1, 1, {k})", "bias_v": f"(1, 1, {v})"}
    out = "E" if w.out_dim == w.embed_dim else "Eo"
    return {**names, "out_proj.weight": f"({out}, H·{dv})", "out_proj.bias": f"({out},)"}[name]
