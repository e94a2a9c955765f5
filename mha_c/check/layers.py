# SPDX-License-Identifier: Apache-2.0
"""One layer of attention beside torch's: both are measured against the definition of attention in a wider type."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha_c.check.compare import Comparison
from mha_c.check.definition import attend, attend_in_own_dtype, causal_mask
from mha_c.check.report import Report
from mha_c.check.requirement import arguments_by_name, refuse_narrow_products, require_torch
from mha_c.check.transformers import compare_transformer, transformer_class
from mha_c.display.words import describe_call
from mha_c.layer import MultiheadAttention, parameters_of
from mha_c.module import Module, in_words_of
from mha_c.parameters.arrays import as_array
from mha_c.parameters.dtypes import DTYPE_NAMES

__all__ = ["against_torch"]


def against_torch(module: Any, *inputs: Any, **call: Any) -> Report:
    """Compare a layer of mha_c with the same layer of torch, on the same inputs.

    Both layers are in evaluation mode. torch takes its ordinary path, not the one for inference.

    Parameters
    ----------
    module : MultiheadAttention or torch.nn.MultiheadAttention
        The layer. The other library's layer is made from it. Also a layer of a Transformer, an encoder, a decoder or a
        Transformer of either library.
    *inputs : array or tensor
        query, key and value; or query and key, which is also the value; or one array for all three. Of a Transformer:
        the arguments of its call.
    **call
        The other arguments of ``MultiheadAttention.forward``, except `out`. `is_causal` has its meaning in mha_c: torch
        gets the causal mask in `attn_mask`.

    Returns
    -------
    Report
        attn_output, and with `need_weights`, attn_output_weights and the weights of each head.

    Raises
    ------
    ImportError
        If torch is not installed.
    TypeError
        If `module` is not such a layer, or has a dtype that layers of mha_c do not have; or if there are not 1, 2 or 3
        inputs.
    ValueError
        If `module` or a layer in it multiplies numbers that `matmul_precision` rounds more coarsely than its dtype.

    Notes
    -----
    torch does not have attention of some widths, such as grouped heads. It is compared with the definition of attention
    in NumPy, in the dtype of the layer.

    The reference is the definition of the layer, in np.longdouble for a float64 layer, and in float64 for the other
    dtypes. np.longdouble is slow, and on some platforms it is not wider than float64.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> x = np.random.default_rng(0).standard_normal((5, 3, 8), dtype=np.float32)
    >>> report = against_torch(mha_c.MultiheadAttention(8, 4, seed=0), x)
    >>> report.agrees, [comparison.name for comparison in report.comparisons][:3]
    (True, ['attn_output', 'attn_output_weights', '  head 0'])
    """
    refuse_narrow_products("check.against_torch", module)
    if transformer_class(module) is not None:
        return compare_transformer(module, *inputs, **call)
    layer = _evaluating_layer(module)
    arguments = _arguments(layer, inputs, call)
    free = parameters_of(layer).widths.beyond_torch()
    other, version, ask_other = ("NumPy", np.__version__, attend_in_own_dtype) if free else _torch_like(module, layer)
    measure = functools.partial(Comparison.measure, other=other)

    def ask(**changes: Any) -> list[tuple[Any, Any, Any]]:
        """Ours, the other's and the exact output; then, if asked for, the same of the weights."""
        asked = {**arguments, **changes}
        ours = layer(**asked)  # first: if it refuses the call, it says why
        theirs: Any = ask_other(layer, **asked)
        exact = attend(layer, **asked)
        if leaks or layer.masked_rows == "zero":  # where torch answers NaN, the layer follows the definition on purpose
            theirs = tuple(None if one is None else _filled(one, wanted) for one, wanted in zip(theirs, exact))
        return [results for results in zip(ours, theirs, exact) if results[0] is not None]

    leaks = not all(np.isfinite(arguments[name]).all() for name in ("key", "value"))
    names = ("attn_output", "attn_output_weights")
    comparisons = [measure(name, *results) for name, results in zip(names, ask())]
    if arguments["need_weights"]:
        by_head = (np.moveaxis(weights, -3, 0) for weights in ask(average_attn_weights=False)[1])
        comparisons += [measure(f"  head {head}", *results) for head, results in enumerate(zip(*by_head))]
    notes = []
    if leaks:
        notes.append(
            "The key or the value holds NaN or infinity. In torch, these also reach queries from which they are "
            "hidden. The results of such queries are compared with the definition of attention instead."
        )
    if free:
        named = ", ".join(f"{name}={width}" for name, width in free.items())
        notes.append(
            f"torch does not have such a layer ({named}). It is compared with the definition of attention in NumPy, in "
            "the dtype of the layer."
        )
    title = f"mha_c and {other} {version}: {layer}; {describe_call(arguments)}"
    return Report(title, tuple(comparisons), tuple(notes))


def _torch_like(module: Any, layer: MultiheadAttention) -> tuple[str, str, Callable[..., Any]]:
    """torch, its version, and a function with the arguments of `attend` that it answers."""
    require_torch("check.against_torch")
    from mha_c.torch.convert import TORCH_VERSION, forward_in_torch

    torch_layer = layer if isinstance(module, MultiheadAttention) else copy.deepcopy(module).eval()

    def ask(layer: MultiheadAttention, **asked: Any) -> Any:
        return forward_in_torch(torch_layer, **_spelt_out_for_torch(layer, asked))

    return "torch", TORCH_VERSION, ask


def _filled(array: NDArray[Any], reference: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.isnan(array), reference, array).astype(array.dtype)


def _evaluating_layer(module: Any) -> MultiheadAttention:
    """A layer of mha_c like `module`, not in training mode."""
    if isinstance(module, MultiheadAttention):
        return _ready(copy.copy(module))
    try:
        layer = MultiheadAttention.from_torch(module)
    except TypeError as error:
        said = in_words_of(error, "from_torch takes", "check.against_torch takes a layer of mha_c or")
        raise TypeError(f"{said}. check.model compares whole models") from None
    dtype = str(module.out_proj.weight.dtype).removeprefix("torch.")
    if dtype != layer.out_proj.weight.dtype.name:
        raise TypeError(f"a layer of mha_c is {DTYPE_NAMES}, but this one is {dtype}: check a copy.float()")
    return _ready(layer)


def _ready(layer: MultiheadAttention) -> MultiheadAttention:
    layer._warns_of_decoding = False  # is_causal is compared as it was asked for
    return layer.eval()


def _arguments(layer: MultiheadAttention, inputs: Sequence[Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a call by its name, arrays where tensors may have been given."""
    if not 1 <= len(inputs) <= 3:
        raise TypeError(f"pass query, key and value, or query and key, or one array for all; got {len(inputs)} inputs")
    query, key, value = (inputs[min(number, len(inputs) - 1)] for number in range(3))
    arguments = arguments_by_name(functools.partial(attend, layer), layer, query, key, value, **call)
    for name in ("query", "key", "value", "key_padding_mask", "attn_mask"):
        if arguments[name] is not None:
            arguments[name] = as_array(arguments[name], name=name)
    return arguments


def _spelt_out_for_torch(layer: MultiheadAttention, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same question for torch, which wants float masks in the dtype of the query, and causality as a mask."""
    asked = {**arguments, "is_causal": False}
    query, key = arguments["query"], arguments["key"]
    for name in ("key_padding_mask", "attn_mask"):
        if asked[name] is not None and asked[name].dtype != bool:
            asked[name] = asked[name].astype(query.dtype)
    if arguments["is_causal"]:
        axis = 1 if query.ndim == 3 and layer.batch_first else 0
        asked["attn_mask"] = causal_mask(asked["attn_mask"], query.shape[axis], key.shape[axis])
    return asked
