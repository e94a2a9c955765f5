# SPDX-License-Identifier: Apache-2.0
"""How close mha_c is to torch: both are measured against the definition of attention in a wider type."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mha_c.attention import MultiheadAttention
from mha_c.definition import attend, hidden_by_causality, to_float_mask
from mha_c.parameters import as_array
from mha_c.progress import progress
from mha_c.table import Table

if TYPE_CHECKING:
    from mha_c.model_runs import ModelOutput

__all__ = ["CRITERION", "Comparison", "Error", "Report", "against_torch", "describe", "model"]

#: When a result counts as torch's. Both results are rounded sums of the same terms in different orders, so their errors
#: are two samples of the same noise. Largest errors of small outputs were seen up to 5 times apart in thousands of
#: random ones, while a wrong or missing term is off by thousands of units. The four units are there because torch may
#: happen to be exact.
CRITERION = (
    "It agrees if shape, dtype, NaN and infinities are torch's, and if its largest error is at most "
    "8 times torch's plus 4 units in the last place."
)


@dataclass(frozen=True)
class Error:
    """How far numbers are from what they should be.

    Attributes
    ----------
    largest : float
        The largest absolute difference.
    rms : float
        The root of the mean square of the differences.

    Examples
    --------
    >>> Error.between(np.array([1.0, 2.0, np.nan]), np.array([1.5, 2.5, np.nan]))
    Error(largest=0.5, rms=0.5)
    """

    largest: float
    rms: float

    @classmethod
    def between(cls, a: NDArray[Any], b: NDArray[Any]) -> Error:
        """The differences of two arrays, where both are finite.

        Parameters
        ----------
        a, b : numpy.ndarray
            The arrays, of one shape.

        Returns
        -------
        Error
            Zeros if no number is finite in both.

        Examples
        --------
        >>> Error.between(np.array([1.0, np.inf]), np.array([1.5, 2.0]))
        Error(largest=0.5, rms=0.5)
        """
        both = np.isfinite(a) & np.isfinite(b)
        differences = np.abs(np.subtract(a[both], b[both], dtype=np.result_type(a, b, np.float64)))
        if differences.size == 0:
            return cls(0.0, 0.0)
        return cls(float(differences.max()), float(np.sqrt(np.mean(differences**2))))


@dataclass(frozen=True)
class Comparison:
    """One output of mha_c beside torch's.

    Attributes
    ----------
    name : str
        The output.
    shape, torch_shape : tuple of int
        The two shapes.
    dtype, torch_dtype : str
        The two dtypes.
    difference : Error
        mha_c from torch.
    error, torch_error : Error
        mha_c from the reference, and torch from it.
    ulp : float
        One unit in the last place of the largest number of the output. Attention adds up terms of both signs, so
        numbers that happen to be small are no more exact than the others, and their own units would say nothing.
    misplaced : int
        How many numbers are NaN or infinite in one of the two alone.

    Examples
    --------
    >>> x = np.ones((2, 2), np.float32)
    >>> Comparison.measure("output", x, x, x.astype(np.float64)).agrees
    True
    """

    name: str
    shape: tuple[int, ...]
    torch_shape: tuple[int, ...]
    dtype: str
    torch_dtype: str
    difference: Error
    error: Error
    torch_error: Error
    ulp: float
    misplaced: int

    @classmethod
    def measure(
        cls,
        name: str,
        ours: NDArray[Any],
        theirs: NDArray[Any],
        reference: NDArray[Any],
        torch_error: Error | None = None,
    ) -> Comparison:
        """Compare two arrays.

        Parameters
        ----------
        name : str
            The output.
        ours, theirs : numpy.ndarray
            What mha_c and torch computed.
        reference : numpy.ndarray
            What both should be.
        torch_error : Error, optional
            Needed where `reference` is torch's own result, and so cannot tell how far off it is.

        Returns
        -------
        Comparison

        Examples
        --------
        >>> x = np.ones((2, 2), np.float32)
        >>> Comparison.measure("output", x, x + 1, x.astype(np.float64)).torch_error
        Error(largest=1.0, rms=1.0)
        """
        difference = error = Error(np.inf, np.inf)
        misplaced = 0
        if ours.shape == theirs.shape:
            difference, error = Error.between(ours, theirs), Error.between(ours, reference)
            torch_error = torch_error or Error.between(theirs, reference)
            finite = np.isfinite(ours) & np.isfinite(theirs)
            misplaced = int(np.sum(~finite & ~((ours == theirs) | np.isnan(ours) & np.isnan(theirs))))
        largest = np.max(np.abs(theirs), where=np.isfinite(theirs), initial=0.0)
        ulp = float(np.spacing(largest if theirs.dtype.kind == "f" else 1.0))
        return cls(
            name=name,
            shape=ours.shape,
            torch_shape=theirs.shape,
            dtype=ours.dtype.name,
            torch_dtype=theirs.dtype.name,
            difference=difference,
            error=error,
            torch_error=torch_error or Error(np.inf, np.inf),
            ulp=ulp,
            misplaced=misplaced,
        )

    @property
    def disagreements(self) -> list[str]:
        """What is not torch's, in words; nothing if it agrees."""
        said = []
        if self.shape != self.torch_shape:
            said.append(f"shape {self.shape} instead of {self.torch_shape}")
        if self.dtype != self.torch_dtype:
            said.append(f"dtype {self.dtype} instead of {self.torch_dtype}")
        if self.misplaced:
            said.append(f"{self.misplaced} numbers are NaN or infinite in one of the two alone")
        if not self.error.largest <= 8 * self.torch_error.largest + 4 * self.ulp and not said:
            said.append(f"an error of {self.error.largest:.2g}, where torch's is {self.torch_error.largest:.2g}")
        return said

    @property
    def agrees(self) -> bool:
        """Whether it is as close to the reference as torch's own result; see `CRITERION`."""
        return not self.disagreements


@dataclass(frozen=True)
class Report:
    """What a check found; printing it, or showing it in a notebook, gives a table.

    Attributes
    ----------
    title : str
        What was compared.
    comparisons : tuple of Comparison
        One for every output.
    notes : tuple of str
        What else there is to know.

    Examples
    --------
    >>> x = np.ones((2, 2), np.float32)
    >>> report = Report("ones and twos", (Comparison.measure("output", x + 1, x, x.astype(np.float64)),))
    >>> report.agrees
    False
    >>> report.assert_close()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: ones and twos
    ...
    """

    title: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether every output does."""
        return all(comparison.agrees for comparison in self.comparisons)

    def assert_close(self) -> None:
        """Raise unless everything agrees.

        Raises
        ------
        AssertionError
            With the report as its message.

        Examples
        --------
        >>> x = np.ones((2, 2), np.float32)
        >>> Report("ones", (Comparison.measure("output", x, x, x.astype(np.float64)),)).assert_close()
        """
        if not self.agrees:
            raise AssertionError(str(self))

    def table(self) -> Table:
        """The report as a table: differences from torch, then errors in units in the last place.

        Returns
        -------
        Table
            Text for a terminal when printed, HTML in a notebook.

        Examples
        --------
        >>> Report("nothing", ()).table().title
        'nothing'
        """
        header = ("", "shape", "difference", "rms", "in ulp", "mha_c's error", "torch's error", "")
        rows = [
            (
                one.name,
                str(one.shape),
                f"{one.difference.largest:.1e}",
                f"{one.difference.rms:.1e}",
                f"{one.difference.largest / one.ulp:.1f}",
                f"{one.error.largest / one.ulp:.1f} ulp",
                f"{one.torch_error.largest / one.ulp:.1f} ulp",
                "agrees" if one.agrees else "DIFFERS",
            )
            for one in self.comparisons
        ]
        wrong = [f"{one.name}: {what}" for one in self.comparisons for what in one.disagreements]
        units = "1 ulp: a unit in the last place of the largest number of an output. " + CRITERION
        verdicts = [one.agrees for one in self.comparisons]
        return Table(self.title, header, rows, [*wrong, *self.notes, units], verdicts=verdicts)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def __rich__(self) -> Table:
        return self.table()


def against_torch(module: Any, *inputs: Any, **call: Any) -> Report:
    """Ask a layer of mha_c and the same layer of torch the same question, and measure both answers.

    Dropout is off in both. torch takes its ordinary path, not the one for inference.

    Parameters
    ----------
    module : MultiheadAttention or torch.nn.MultiheadAttention
        The layer; the other one is made from it.
    *inputs : array or tensor
        query, key and value; query and key, which then is the value too; or one for all three.
    **call
        The other arguments of ``MultiheadAttention.forward``, except `out`. `is_causal` means here what it means in
        mha_c: torch is given the causal mask that it is to apply, in `attn_mask`.

    Returns
    -------
    Report
        attn_output, and if `need_weights` attn_output_weights and the weights of each head.

    Raises
    ------
    ImportError
        If torch is not installed.
    TypeError
        If `module` is neither, or in another dtype than float32 and float64; or if there are not 1, 2 or 3 inputs.
    ValueError
        If torch has no layer of such widths.

    Notes
    -----
    The reference is the definition of attention in float64 for float32, and in np.longdouble for float64, which is slow
    and on some platforms no wider than float64.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> x = np.random.default_rng(0).standard_normal((5, 3, 8), dtype=np.float32)
    >>> report = against_torch(mha_c.MultiheadAttention(8, 4, seed=0), x)
    >>> report.agrees, [comparison.name for comparison in report.comparisons][:3]
    (True, ['attn_output', 'attn_output_weights', '  head 0'])
    """
    from mha_c.torch import TORCH_VERSION, forward_in_torch

    layer = _evaluating_layer(module)
    arguments = _arguments(inputs, call)
    torch_layer = layer if isinstance(module, MultiheadAttention) else copy.deepcopy(module).eval()

    def ask(**changes: Any) -> list[tuple[Any, Any, Any]]:
        """Ours, torch's and the exact output; then, if asked for, the same of the weights."""
        asked = {**arguments, **changes}
        theirs: Any = forward_in_torch(torch_layer, **_spelt_out_for_torch(layer, asked))
        exact = attend(layer, **asked)
        if layer.masked_rows == "zero":  # where torch answers NaN, this layer follows the definition on purpose
            theirs = tuple(None if one is None else _filled(one, wanted) for one, wanted in zip(theirs, exact))
        return [results for results in zip(layer(**asked), theirs, exact) if results[0] is not None]

    names = ("attn_output", "attn_output_weights")
    comparisons = [Comparison.measure(name, *results) for name, results in zip(names, ask())]
    if arguments["need_weights"]:
        by_head = (np.moveaxis(weights, -3, 0) for weights in ask(average_attn_weights=False)[1])
        comparisons += [Comparison.measure(f"  head {head}", *results) for head, results in enumerate(zip(*by_head))]
    return Report(f"mha_c and torch {TORCH_VERSION}: {describe(layer, arguments)}", tuple(comparisons))


def model(model: Any, *inputs: Any, **call: Any) -> Report:
    """Run a model of torch as it is and with its attention replaced, and measure both, layer by layer.

    Copies of the model are run in evaluation mode: two, and one of them in float64 afterwards. The model itself, be its
    attention replaced already or not, stays as it is.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    *inputs, **call
        What it is called with; arrays become tensors.

    Returns
    -------
    Report
        For every call of an attention layer, the outputs of mha_c and torch on the inputs that torch's model gave it;
        then the outputs of the model. Where torch takes its inference path, which fuses layers, the outputs are
        compared with that one too, except in the padded positions that it sets to zero.

    Raises
    ------
    ImportError
        If torch is not installed.
    TypeError, ValueError
        If `model` is no torch module, or has no ``torch.nn.MultiheadAttention``.

    Examples
    --------
    >>> import torch
    >>> from mha_c import check
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> report = check.model(torch.nn.TransformerEncoder(layer, num_layers=2), torch.ones(3, 5, 8))
    >>> [comparison.name for comparison in report.comparisons][:2]
    ['layers.0.self_attn', 'layers.1.self_attn']
    >>> report.agrees
    True
    """
    from mha_c.torch import TORCH_VERSION, run_both_ways

    runs = run_both_ways(model, inputs, call)
    comparisons = []
    for run in progress(runs.attention, "call", "comparing"):
        exact = attend(run.layer, **run.arguments)
        names = (run.name, f"{run.name}, weights")
        comparisons += [
            Comparison.measure(name, ours, theirs, wanted)
            for name, ours, theirs, wanted in zip(names, run.ours, run.theirs, exact, strict=True)
            if ours is not None and theirs is not None
        ]
    for name, output in runs.outputs.items():
        comparisons += _compare_model_output(name, output)
    notes = [f"{name} is left to torch." for name in runs.left_to_torch]
    if any(output.theirs.dtype == np.float64 for output in runs.outputs.values()):
        notes.append(
            "Nothing is wider than float64: the errors of the model's outputs are mha_c's difference from torch, and "
            "torch's error in float32 scaled down to float64."
        )
    title = f"{type(model).__name__} with mha_c and with torch {TORCH_VERSION}"
    return Report(title, tuple(comparisons), tuple(notes))


def _compare_model_output(name: str, output: ModelOutput) -> list[Comparison]:
    ours, theirs, fused, other = output
    torch_error = None
    reference = other
    if theirs.dtype == np.float64:
        # A run in float32 shows how this model magnifies roundings.
        reference, rounded = theirs, Error.between(theirs, other)
        ratio = float(np.finfo(np.float64).eps / np.finfo(np.float32).eps)
        torch_error = Error(rounded.largest * ratio, rounded.rms * ratio)
    comparisons = [Comparison.measure(name, ours, theirs, reference, torch_error)]
    if fused.shape == theirs.shape and not np.array_equal(fused, theirs, equal_nan=True):
        padding = np.all(fused == 0, axis=-1, keepdims=True) & ~np.all(theirs == 0, axis=-1, keepdims=True)
        ours, reference = (np.where(padding, fused, array) for array in (ours, reference))
        comparisons.append(Comparison.measure(f"{name}, torch's fused path", ours, fused, reference, torch_error))
    return comparisons


def _filled(array: NDArray[Any], reference: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.isnan(array), reference, array).astype(array.dtype)


def _evaluating_layer(module: Any) -> MultiheadAttention:
    """A layer of mha_c like `module`, not in training mode."""
    if isinstance(module, MultiheadAttention):
        return copy.copy(module).eval()
    layer = MultiheadAttention.from_torch(module)
    dtype = str(module.out_proj.weight.dtype).removeprefix("torch.")
    if dtype != layer.out_proj.weight.dtype.name:
        raise TypeError(f"mha_c computes in float32 and float64, but the layer is in {dtype}: check a copy.float()")
    return layer.eval()


def _arguments(inputs: Sequence[Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a call by its name, arrays where tensors may have been given."""
    if not 1 <= len(inputs) <= 3:
        raise TypeError(f"give a query, perhaps a key, and perhaps a value; there are {len(inputs)} inputs")
    query, key, value = (inputs[min(number, len(inputs) - 1)] for number in range(3))
    bound = inspect.signature(attend).bind(None, query, key, value, **call)
    bound.apply_defaults()
    arguments = {name: argument for name, argument in bound.arguments.items() if name != "layer"}
    for name in ("query", "key", "value", "key_padding_mask", "attn_mask"):
        if arguments[name] is not None:
            arguments[name] = as_array(arguments[name])
    return arguments


def _spelt_out_for_torch(layer: MultiheadAttention, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same question for torch, which wants float masks in the dtype of the query, and causality as a mask."""
    asked = {**arguments, "is_causal": False}
    query, key = arguments["query"], arguments["key"]
    for name in ("key_padding_mask", "attn_mask"):
        if asked[name] is not None and asked[name].dtype.kind == "f":
            asked[name] = asked[name].astype(query.dtype)
    if arguments["is_causal"]:
        axis = 1 if query.ndim == 3 and layer.batch_first else 0
        hidden = hidden_by_causality(query.shape[axis], key.shape[axis])
        mask = asked["attn_mask"]
        if mask is None or mask.dtype == bool:
            asked["attn_mask"] = hidden if mask is None else mask | hidden
        else:
            asked["attn_mask"] = mask + to_float_mask(hidden, mask.dtype)
    return asked


def describe(layer: MultiheadAttention, arguments: Mapping[str, Any]) -> str:
    """A layer and a call of it, in one line.

    Parameters
    ----------
    layer : MultiheadAttention
        The layer.
    arguments : mapping of str to object
        The call: `query` and masks as arrays, the rest as the layer takes it.

    Returns
    -------
    str

    Examples
    --------
    >>> import mha_c
    >>> describe(mha_c.MultiheadAttention(8, 4), {"query": np.ones((5, 3, 8)), "is_causal": True, "attn_mask": None})
    'embed_dim=8, num_heads=4, float32; query (5, 3, 8), is_causal'
    """
    widths = layer._parameters.widths
    parts = [f"embed_dim={widths.embed_dim}", f"num_heads={widths.num_heads}"]
    others = {"kdim": widths.kdim, "vdim": widths.vdim}
    parts += [f"{name}={width}" for name, width in others.items() if width != widths.embed_dim]
    parts += [name for name in ("batch_first", "add_zero_attn") if getattr(layer, name)]
    parts += ["add_bias_kv"] if layer.bias_k is not None else []
    parts += ["bias=False"] if layer.in_proj_bias is None else []
    parts.append(layer.out_proj.weight.dtype.name)
    said = [f"query {arguments['query'].shape}"]
    for name, argument in arguments.items():
        if name in ("key_padding_mask", "attn_mask") and argument is not None:
            said.append(f"{name} {argument.dtype.name} {argument.shape}")
    said += ["is_causal"] if arguments.get("is_causal") else []
    said += [] if arguments.get("need_weights", True) else ["need_weights=False"]
    return f"{', '.join(parts)}; {', '.join(said)}"
