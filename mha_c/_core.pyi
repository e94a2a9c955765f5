"""The C extension: the forward pass, its packed parameters and the thread pool."""

from contextvars import ContextVar
from typing import Any, final

from numpy import ndarray

@final
class Weights:
    """One immutable set of parameters, packed for the kernels of this CPU.

    All arrays are C-contiguous, aligned, in native byte order and of one dtype, float32 or float64. Biases and
    bias_k / bias_v are None where the layer has none; in_proj_bias holds the biases of q, k and v, stacked.
    """

    def __new__(
        cls,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        q_proj_weight: ndarray,
        k_proj_weight: ndarray,
        v_proj_weight: ndarray,
        in_proj_bias: ndarray | None,
        bias_k: ndarray | None,
        bias_v: ndarray | None,
        out_proj_weight: ndarray,
        out_proj_bias: ndarray | None,
        /,
    ) -> Weights: ...
    @property
    def nbytes(self) -> int: ...

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
    out: ndarray | None,
    batch_first: bool,
    add_zero_attn: bool,
    masked_rows: str,
    dropout_p: float,
    dropout_seed: int,
    dropout_call: int,
    /,
) -> tuple[ndarray, ndarray | None]: ...

num_threads: ContextVar[int | None]
"""The number of threads of the current context; None or unset: that of the process."""

def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def config() -> dict[str, Any]: ...
