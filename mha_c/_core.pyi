"""The C extension: the forward pass, its packed parameters and the thread pool."""

from contextvars import ContextVar
from typing import Any, final

from numpy import ndarray

@final
class Weights:
    """One immutable set of parameters, packed for the kernels of this CPU.

    All arrays are C-contiguous, aligned, in native byte order and of one dtype, float32 or float64. Biases and
    bias_k / bias_v are None where the layer has none; in_proj_bias holds the biases of q, k and v, stacked. Anything
    else raises TypeError or ValueError.
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
    def nbytes(self) -> int:
        """Bytes of the parameters that this was made from; packed, they take about as many again."""

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
    static_k: Any = None,
    static_v: Any = None,
    /,
) -> tuple[ndarray, ndarray | None]:
    """The forward pass: torch's checks, in torch's order and words, then the result.

    masked_rows is "torch", "zero" or "nan". dropout_p is that of this call: 0 outside training. Inputs and masks are whatever
    exposes an array; None is no mask. out is returned as the first result; as with NumPy's ufuncs a wrong type or
    dtype of it is a TypeError, a wrong shape or a read-only array a ValueError. static_k and static_v, given together,
    take the place of the projected keys and values where they are not None.
    """

def project(weights: Weights, input: str, x: Any, batch_first: bool, /) -> ndarray:
    """The projection of one input, "query", "key" or "value": (N, length, features), or (length, features)."""

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
) -> ndarray:
    """The arguments of `forward` that ask for the weights of each head; the scores after the masks in their place."""

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
    paths: ndarray,
    /,
) -> tuple[ndarray, ndarray | None]:
    """The heads' results side by side, (N, L, H * Dv) or (L, H * Dv), and the weights where `forward` returns them.

    paths is what `takes_few_queries` says, if need be of another layer.
    """

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
) -> ndarray:
    """(N,) booleans: whether `forward` treats a batch item without projecting its keys. Makes the checks of `forward`."""

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
    /,
) -> ndarray:
    """Attention without projections: torch's checks, in torch's order and words, then the result, C-contiguous."""

num_threads: ContextVar[int | None]
"""The number of threads of the current context; None or unset: that of the process."""

def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def config() -> dict[str, Any]:
    """cpu_level: str, cpu_levels: list[str] (best first), threads: int, usable_cpus: int, compiler: str,
    numpy: str (the version that the extension was built against)."""
