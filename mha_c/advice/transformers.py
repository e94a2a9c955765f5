# SPDX-License-Identifier: Apache-2.0
"""Calls of a Transformer that are refused: torch's words, what does not fit, and what to write instead."""

from __future__ import annotations

from typing import Any

from mha_c.advice.arguments import shape_of

__all__ = ["check_transformer_call"]


def check_transformer_call(src: Any, tgt: Any, d_model: int, batch_first: bool) -> None:
    """Refuse what torch's Transformer refuses before its encoder is called.

    Parameters
    ----------
    src, tgt : array
        As they were passed.
    d_model : int
        The features of both.
    batch_first : bool
        Whether the first axis of a batch is the batch.

    Raises
    ------
    RuntimeError
        In torch's words, with the shapes.

    Examples
    --------
    >>> import numpy as np
    >>> check_transformer_call(np.zeros((5, 2, 8)), np.zeros((5, 3, 8)), 8, False)
    Traceback (most recent call last):
    RuntimeError: the batch number of src and tgt must be equal. src has a batch of 2, and tgt of 3: both have the batch \
on axis 1, or pass batch_first=True to the constructor.
    """
    shapes = {"src": shape_of(src), "tgt": shape_of(tgt)}
    axis = 0 if batch_first else 1
    if len(shapes["src"]) == 3 and len(shapes["tgt"]) > axis:
        of_src, of_tgt = (shape[axis] for shape in shapes.values())
        if of_src != of_tgt:
            raise RuntimeError(
                f"the batch number of src and tgt must be equal. src has a batch of {of_src}, and tgt of {of_tgt}: both "
                f"have the batch on axis {axis}, or pass batch_first={not batch_first} to the constructor."
            )
    for name, shape in shapes.items():
        if shape[-1:] != (d_model,):
            found = f"{shape[-1]} features" if shape else "no axes"
            raise RuntimeError(
                f"the feature number of src and tgt must be equal to d_model. {name} has {found}, but d_model is {d_model}."
            )
