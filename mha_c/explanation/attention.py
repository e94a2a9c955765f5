# SPDX-License-Identifier: Apache-2.0
"""One call of an attention layer: its stages with their text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.explanation.masks import look_at_masks
from mha_c.explanation.result import Explanation
from mha_c.explanation.stages import Stage, StagedCall, chosen_stages
from mha_c.explanation.words import Words, of_another_forward
from mha_c.layer import MultiheadAttention
from mha_c.parameters.dtypes import computed_in

__all__ = ["explain"]


@knows_foreign_keywords
def explain(
    layer: MultiheadAttention,
    query: Any,
    key: Any = None,
    value: Any = None,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    heads: int | Iterable[int] | None = None,
    stages: str | Iterable[str] | None = None,
) -> Explanation:
    """Show what an attention layer computes: see `mha_c.explain`."""
    key = query if key is None else key
    value = key if value is None else value
    call = StagedCall(layer, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal, heads)
    found = call.compute(chosen_stages(stages, call.dropout_p > 0))
    sizes = (call.batch, call.widths.num_heads, call.length, call.source_length)
    masks = look_at_masks(key_padding_mask, attn_mask, bool(is_causal), *sizes, computed_in(call.parameters.dtype))
    words = Words(call)
    texts = words.stages()
    return Explanation(
        title=words.title,
        inputs=words.inputs,
        stages={name: Stage(name, array, *texts[name]) for name, array in found.items()},
        letters=words.letters,
        heads=tuple(range(call.widths.num_heads) if call.heads is None else call.heads),
        paths=tuple("few queries" if is_few else "ordinary" for is_few in call.paths),
        masks=masks.effects,
        warnings=(*of_another_forward(layer, MultiheadAttention), *words.warnings(masks)),
        notes=words.notes(masks, found),
    )
