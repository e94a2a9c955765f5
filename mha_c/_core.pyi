"""The C extension: the forward pass, its packed parameters and the thread pool; help() describes its parts."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
# An array of the layer's dtype; or int8 numbers and the scales of their rows; or an array and "bfloat16" or "float32".
_Weight: TypeAlias = NDArray[Any] | tuple[NDArray[np.int8], NDArray[np.float32]] | tuple[NDArray[Any], str]

@final
class Weights:
    def __new__(
        cls,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        dtype: DTypeLike,
        q_proj_weight: _Weight,
        k_proj_weight: _Weight,
        v_proj_weight: _Weight,
        in_proj_bias: NDArray[Any] | None,
        bias_k: NDArray[Any] | None,
        bias_v: NDArray[Any] | None,
        out_proj_weight: _Weight,
        out_proj_bias: NDArray[Any] | None,
        attention: str | None = None,
        /,
    ) -> Weights: ...
    @property
    def nbytes(self) -> int: ...

@final
class Linear:
    def __new__(cls, dtype: DTypeLike, weight: _Weight, bias: NDArray[Any] | None, /) -> Linear: ...
    @property
    def nbytes(self) -> int: ...

@final
class AdvisedFunction(Generic[_Arguments, _Result]):
    def __new__(
        cls, function: Callable[_Arguments, _Result], advise: Callable[[TypeError, dict[str, Any]], None], /
    ) -> AdvisedFunction[_Arguments, _Result]: ...
    def __call__(self, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result: ...

def forward(
    weights: Weights,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any,
    need_weights: bool,
    attn_mask: Any,
    average_attn_weights: bool,
    is_causal: bool,
    out: NDArray[Any] | None,
    batch_first: bool,
    add_zero_attn: bool,
    masked_rows: str,
    dropout_p: float,
    dropout_seed: int,
    dropout_call: int,
    static_k: Any = None,
    static_v: Any = None,
    /,
) -> tuple[NDArray[Any], NDArray[Any] | None]: ...

def transform(
    weights: Weights,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any,
    need_weights: bool,
    attn_mask: Any,
    average_attn_weights: bool,
    is_causal: bool,
    out: NDArray[Any] | None,
    batch_first: bool,
    add_zero_attn: bool,
    masked_rows: str,
    dropout_p: float,
    dropout_seed: int,
    dropout_call: int,
    norm_first: bool,
    is_self_attention: bool,
    attention_norm: tuple[NDArray[Any] | None, NDArray[Any] | None, float, bool],
    linear1: Linear | None,
    activation: str,
    is_gated: bool,
    linear2: Linear | None,
    feed_forward_norm: tuple[NDArray[Any] | None, NDArray[Any] | None, float, bool],
    zeroes_padding: bool,
    /,
) -> NDArray[Any]: ...

def linear(weights: Linear, input: Any, /) -> NDArray[Any]: ...

def activate(input: Any, activation: str, is_gated: bool, /) -> NDArray[Any]: ...

def project(weights: Weights, input: str, x: Any, batch_first: bool, /) -> NDArray[Any]: ...

def scores(
    weights: Weights,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any,
    need_weights: bool,
    attn_mask: Any,
    average_attn_weights: bool,
    is_causal: bool,
    out: None,
    batch_first: bool,
    add_zero_attn: bool,
    masked_rows: str,
    dropout_p: float,
    dropout_seed: int,
    dropout_call: int,
    /,
) -> NDArray[Any]: ...

def attend(
    weights: Weights,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any,
    need_weights: bool,
    attn_mask: Any,
    average_attn_weights: bool,
    is_causal: bool,
    out: None,
    batch_first: bool,
    add_zero_attn: bool,
    masked_rows: str,
    dropout_p: float,
    dropout_seed: int,
    dropout_call: int,
    paths: NDArray[Any],
    /,
) -> tuple[NDArray[Any], NDArray[Any] | None]: ...

def takes_few_queries(
    weights: Weights,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any,
    need_weights: bool,
    attn_mask: Any,
    average_attn_weights: bool,
    is_causal: bool,
    out: None,
    batch_first: bool,
    add_zero_attn: bool,
    masked_rows: str,
    dropout_p: float,
    dropout_seed: int,
    dropout_call: int,
    /,
) -> NDArray[Any]: ...

def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    dropout_seed: int,
    out: NDArray[Any] | None,
    /,
) -> NDArray[Any]: ...

def normalize(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any,
    bias: Any,
    eps: float | None,
    is_rms: bool,
    /,
) -> NDArray[Any]: ...

def sample(arrays: tuple[NDArray[Any], ...], /) -> bytes: ...

num_threads: ContextVar[int | None]
"""The number of threads of the current context; None or unset: that of the process."""

def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def config() -> dict[str, Any]: ...
