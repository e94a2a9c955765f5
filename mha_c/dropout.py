# SPDX-License-Identifier: Apache-2.0
"""Dropout as a layer, and what all layers share that draw random numbers in training mode."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mha_c._lock import lock
from mha_c._typing import Self
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.module import Module, Option, check_torch_module
from mha_c.parameters.arrays import AnyArray, Array, as_array
from mha_c.parameters.checks import flag, integer, number
from mha_c.parameters.dtypes import DTYPES, computed_in
from mha_c.parameters.state_dict import check_description

__all__ = ["Dropout", "RandomModule", "as_seed", "seeds_for"]


def as_seed(name: str, value: Any) -> int:
    """A seed of 64 bits; a random one if `value` is None.

    Examples
    --------
    >>> as_seed("dropout_seed", 2**64 + 7)
    7
    """
    return int.from_bytes(os.urandom(8), "little") if value is None else integer(name, value) % 2**64


def seeds_for(dropout_seed: int | None, count: int) -> list[int]:
    """Seeds for several places in a layer, from the seed of the layer; random ones if it is None.

    Parameters
    ----------
    dropout_seed : int or None
        The seed of the layer.
    count : int
        How many places there are.

    Returns
    -------
    list of int

    Examples
    --------
    >>> first, second = seeds_for(0, 2)
    >>> first != second and seeds_for(0, 2) == [first, second]
    True
    """
    sequence = np.random.SeedSequence(as_seed("dropout_seed", dropout_seed))
    return [int(seed) for seed in sequence.generate_state(count, np.uint64)]


class RandomModule(Module):
    """A layer that draws random numbers in training mode: by its seed, and by the number of its calls.

    A deep copy draws other numbers than its original. They depend on the original's seed, and on how many copies were
    made before.

    Examples
    --------
    >>> import copy, mha_c
    >>> layers = [mha_c.Dropout(dropout_seed=0) for _ in range(2)]
    >>> first, second = (copy.deepcopy(layer).dropout_seed for layer in layers)
    >>> first == second, first == layers[0].dropout_seed
    (True, False)
    """

    dropout_seed = Option("dropout_seed", as_seed, "Seed of the dropped numbers.")

    _dropout_seed: int
    _dropout_calls: int
    _dropout_copies: int = 0

    def _set_up_dropout(self, dropout_seed: int | None) -> None:
        self.dropout_seed = as_seed("dropout_seed", dropout_seed)
        self._dropout_calls = 0
        self._dropout_copies = 0

    def _count_dropout_call(self) -> int:
        with lock:
            call = self._dropout_calls
            self._dropout_calls = call + 1
        return call

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with lock:
            copies = self._dropout_copies
            self._dropout_copies = copies + 1
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        sequence = np.random.SeedSequence(self._dropout_seed, spawn_key=(copies,))
        copied._set_up_dropout(int(sequence.generate_state(1, np.uint64)[0]))
        return copied


def _probability(name: str, value: Any) -> Any:
    if not 0.0 <= number(name, value) <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {value}")
    return value


class Dropout(RandomModule):
    """Dropout, as ``torch.nn.Dropout`` computes it.

    In training mode, each number becomes 0 with the probability `p`, and the others are divided by 1 - p ("Improving
    neural networks by preventing co-adaptation of feature detectors", Hinton et al., 2012). In evaluation mode, the
    output is the input.

    Parameters
    ----------
    p : float, default 0.5
        The probability.
    inplace : bool, default False
        Must be False, since inputs are not modified. torch has it.
    dropout_seed : int, optional
        Seed of the dropped numbers, which also depend on the number of calls made in training mode. None: a random
        seed.

    Attributes
    ----------
    p, dropout_seed, training
        They may be changed; a change takes effect at the next call.
    inplace : bool
        False.

    Raises
    ------
    ValueError
        If `p` is not between 0 and 1, or if `inplace` is true.
    TypeError
        If an argument has a wrong type.

    Notes
    -----
    The random numbers are those of Philox4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011),
    keyed by the seed and the number of the call.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> dropout = mha_c.Dropout(0.5, dropout_seed=0)
    >>> set(dropout(np.ones(100, np.float32)).tolist()) == {0.0, 2.0}
    True
    >>> dropout.eval()(np.ones(3, np.float32))
    array([1., 1., 1.], dtype=float32)
    """

    p = Option("p", _probability, "Probability of dropping a number, in training mode only.")
    inplace = False

    _kind = "Dropout"
    _p: Any

    @knows_foreign_keywords
    def __init__(self, p: float = 0.5, inplace: bool = False, *, dropout_seed: int | None = None) -> None:
        if flag("inplace", inplace):
            raise ValueError("inplace must be False: mha_c does not modify its inputs")
        self.p = p
        self.training = True
        self._set_up_dropout(dropout_seed)

    @property
    def is_active(self) -> bool:
        """Whether a call drops anything: in training mode, unless `p` is 0."""
        return bool(self._training and self._p > 0)

    def forward(self, input: AnyArray) -> Array:
        """Drop numbers in training mode; calling the layer does the same.

        Parameters
        ----------
        input : array
            Of float32, float64, bfloat16 or float16. It is not modified.

        Returns
        -------
        numpy.ndarray
            Of the input's shape and dtype. It may be the input itself.

        Raises
        ------
        TypeError
            If the input is not an array.
        RuntimeError
            If there is something to drop and the input has another dtype.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> mha_c.Dropout(1.0)(np.ones(3, np.float32))
        array([0., 0., 0.], dtype=float32)
        """
        array = as_array(input, name="input")
        if not self._training or self._p == 0:
            return array
        if array.dtype.name not in DTYPES:
            raise RuntimeError(
                f"result type Float can't be cast to the desired output type: input is {array.dtype}, and its numbers "
                "would be rounded; pass input.astype(np.float32)"
            )
        generator = np.random.Philox(key=np.array([self._dropout_seed, self._count_dropout_call()], np.uint64))
        words = generator.random_raw((array.size + 1) // 2).astype("<u8").view("<u4")[: array.size]
        kept = (words >= self._p * 2.0**32).reshape(array.shape)
        factors = np.zeros(array.shape, computed_in(array.dtype))
        np.copyto(factors, factors.dtype.type(1 / (1 - self._p) if self._p < 1 else 0), where=kept)
        with np.errstate(all="ignore"):
            return (array * factors).astype(array.dtype, copy=False)  # infinity, dropped, is NaN in torch, too

    __call__ = forward

    @classmethod
    @knows_foreign_keywords
    def from_torch(cls, module: Any) -> Self:
        """Make a layer from a layer of torch, with its probability and training mode.

        Parameters
        ----------
        module : torch.nn.Dropout
            The layer.

        Returns
        -------
        Dropout

        Raises
        ------
        TypeError
            If `module` is something else, or if it overrides forward or has forward hooks.

        Examples
        --------
        >>> import mha_c, torch
        >>> mha_c.Dropout.from_torch(torch.nn.Dropout(0.1))
        Dropout(p=0.1, inplace=False)
        """
        check_torch_module(module, "Dropout", "Make the layer with Dropout(module.p)")
        return cls(module.p).train(module.training)

    def _description(self) -> dict[str, Any]:
        return {"p": float(self.p), "dropout_seed": self.dropout_seed}

    @classmethod
    def _described(cls, description: Mapping[str, Any], content: Mapping[str, Any]) -> Self:
        check_description(description, {"p": float, "dropout_seed": int})
        return cls(description["p"], dropout_seed=description["dropout_seed"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(p={self.p}, inplace=False)"
