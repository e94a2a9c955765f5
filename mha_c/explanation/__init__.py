# SPDX-License-Identifier: Apache-2.0
"""Attention stage by stage: what the layer computes between its inputs and its output, as named arrays and pictures."""

from collections.abc import Iterable
from typing import Any

from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.explanation.masks import MaskEffect, look_at_masks
from mha_c.explanation.result import Explanation
from mha_c.explanation.stages import Stage, StagedCall, chosen_stages
from mha_c.explanation.words import Words
from mha_c.layer import MultiheadAttention
from mha_c.parameters.arrays import as_array

__all__ = ["Explanation", "MaskEffect", "Stage", "explain"]


@knows_foreign_keywords
def explain(
    layer: Any,
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
    """Show what a layer computes between its inputs and its output.

    Every number comes from the C core that the layer itself uses: `output`, `weights`, `average_weights` and
    `head_outputs` have the bits of the layer's own call.

    Parameters
    ----------
    layer : MultiheadAttention or torch.nn.MultiheadAttention
        The layer. A layer of torch is copied into mha_c first, in evaluation mode; half precision becomes float32.
    query, key, value : array or tensor
        As for `MultiheadAttention.forward`. `key` is `query` unless given, and `value` is `key` unless given.
    key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        As for `MultiheadAttention.forward`, whose call is explained. `average_attn_weights` is ignored: both kinds of
        weights are included. `need_weights` matters only for queries that see no key.
    heads : int or sequence of int, optional
        The numbers of the heads to look at; all heads unless given. Stages with one part for each head are computed for
        these heads only. `average_weights`, `concatenated` and `output` always come from all heads.
    stages : str or sequence of str, optional
        The names of the stages to keep; all stages unless given. Other stages are computed only if these need them.

    Returns
    -------
    Explanation
        The stages, as attributes and in `stages`. Printing it gives a table; a notebook shows a diagram.

    Raises
    ------
    TypeError
        If `layer` is not a layer of mha_c or torch.
    ValueError
        If a stage is unknown; if a head is named twice; or if `heads` are chosen while dropout is active, because
        dropout draws for all heads together. ``layer.eval()`` switches dropout off.
    IndexError
        If a head does not exist.
    AssertionError, RuntimeError, TypeError, ValueError
        As for the layer itself.

    Notes
    -----
    An explanation does not count as a call: if dropout is active, it shows what the next call of the layer will drop.

    The layer itself never computes all scores at once, and does not project every key: not those that a mask removes,
    and none if there are few queries. `explain` computes these keys and the scores in addition, in the same way.

    "Attention Is All You Need" (Vaswani et al., 2017), section 3.2.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> attention = mha_c.MultiheadAttention(8, 4, seed=0)
    >>> x = np.random.default_rng(0).standard_normal((5, 3, 8), dtype=np.float32)
    >>> explanation = mha_c.explain(attention, x)
    >>> explanation.scores.shape, explanation.weights.shape, explanation.output.shape
    ((3, 4, 5, 5), (3, 4, 5, 5), (5, 3, 8))
    >>> np.array_equal(explanation.output, attention(x, x, x)[0])
    True

    One head only, which saves the memory for the others:

    >>> mha_c.explain(attention, x, heads=2, stages="weights").weights.shape
    (3, 1, 5, 5)
    """
    key = query if key is None else key
    value = key if value is None else value
    if not isinstance(layer, MultiheadAttention):
        layer = _copy_of_torchs(layer)
        arrays = (query, key, value, key_padding_mask, attn_mask)
        query, key, value, key_padding_mask, attn_mask = (None if one is None else as_array(one) for one in arrays)
    call = StagedCall(layer, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal, heads)
    found = call.compute(chosen_stages(stages, call.dropout_p > 0))
    sizes = (call.batch, call.widths.num_heads, call.length, call.source_length)
    masks = look_at_masks(key_padding_mask, attn_mask, bool(is_causal), *sizes, call.parameters.dtype)
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
        warnings=(*_of_another_forward(layer), *words.warnings(masks)),
        notes=words.notes(masks, found),
    )


def _of_another_forward(layer: MultiheadAttention) -> tuple[str, ...]:
    if type(layer).forward is MultiheadAttention.forward:
        return ()
    name = type(layer).__name__
    return (f"{name} overrides forward. This is what forward of mha_c.MultiheadAttention computes, not {name}.",)


def _copy_of_torchs(layer: Any) -> MultiheadAttention:
    try:
        return MultiheadAttention.from_torch(layer).eval()
    except TypeError as error:
        said = str(error).replace("from_torch takes a", "layer must be a mha_c.MultiheadAttention or a", 1)
        raise TypeError(said) from None
