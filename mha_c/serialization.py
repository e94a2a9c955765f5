# SPDX-License-Identifier: Apache-2.0
"""State dicts: parameters by the names that torch gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray

from mha_c.parameters import as_array

__all__ = ["IncompatibleKeys", "match_state_dict"]


class _Keys(NamedTuple):
    missing_keys: list[str]
    unexpected_keys: list[str]


class IncompatibleKeys(_Keys):
    """The names that ``load_state_dict(..., strict=False)`` did not find, and those that it did not use."""

    __slots__ = ()

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return f"_IncompatibleKeys(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"


def match_state_dict(
    layer_name: str, parameters: Mapping[str, NDArray[Any]], state_dict: Mapping[str, Any], strict: bool
) -> tuple[dict[str, NDArray[Any]], IncompatibleKeys]:
    """Find the parameters of a layer in a state dict.

    Parameters
    ----------
    layer_name : str
        The name of the layer's class, for the error.
    parameters : mapping of str to numpy.ndarray
        The layer's parameters as they are.
    state_dict : mapping of str to array or tensor
        The parameters to come, of any dtype.
    strict : bool
        Whether missing and unexpected names are errors.

    Returns
    -------
    dict of str to numpy.ndarray
        The arrays found, not cast yet.
    IncompatibleKeys
        The names missing and the names unexpected.

    Raises
    ------
    TypeError
        If `state_dict` is not a mapping.
    RuntimeError
        In torch's words, if `strict` and the names differ, or if a shape differs, or a value is no array.

    Examples
    --------
    >>> import numpy as np
    >>> match_state_dict("Layer", {"weight": np.zeros(2)}, {"weight": np.ones(2), "bias": np.ones(2)}, strict=False)
    ({'weight': array([1., 1.])}, _IncompatibleKeys(missing_keys=[], unexpected_keys=['bias']))
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.")
    missing = [name for name in parameters if name not in state_dict]
    unexpected = [name for name in state_dict if name not in parameters]
    unexpected.sort(key=lambda name: name.startswith("out_proj."))  # torch asks the layer first, then its out_proj
    errors = []
    if strict and missing:
        errors.append("Missing key(s) in state_dict: {}. ".format(", ".join(f'"{name}"' for name in missing)))
    if strict and unexpected:
        errors.append("Unexpected key(s) in state_dict: {}. ".format(", ".join(f'"{name}"' for name in unexpected)))

    found = {}
    for name in parameters:
        if name not in state_dict:
            continue
        try:
            found[name] = as_array(state_dict[name])
        except TypeError:
            errors.append(
                f'While copying the parameter named "{name}", expected torch.Tensor or Tensor-like object '
                f"from checkpoint but received {type(state_dict[name])}"
            )
            continue
        if found[name].shape != parameters[name].shape:
            errors.append(
                f"size mismatch for {name}: copying a param with shape {found[name].shape} from checkpoint, "
                f"the shape in current model is {parameters[name].shape}."
            )
    if errors:
        raise RuntimeError("Error(s) in loading state_dict for {}:\n\t{}".format(layer_name, "\n\t".join(errors)))
    return found, IncompatibleKeys(missing, unexpected)
