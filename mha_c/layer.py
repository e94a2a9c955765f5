# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention as a layer: torch's constructor, call, attributes and state dict over the C core."""

import math
import operator
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np

from mha_c import _core
from mha_c._typing import Self
from mha_c.advice.arguments import REFUSALS, add_advice
from mha_c.advice.calls import advice_on_call, warn_of_decoding
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.dropout import RandomModule
from mha_c.module import (
    Module,
    Option,
    Parameter,
    PrecisionOfProducts,
    check_device,
    check_memory,
    check_torch_module,
    dtypes_for,
)
from mha_c.parameters.files import open_state_dict
from mha_c.parameters.initialization import initial_parameters
from mha_c.parameters.arrays import AnyArray, Array, as_array
from mha_c.parameters.checks import flag, number
from mha_c.parameters.dtypes import float_dtype, trained_dtype
from mha_c.parameters.loading import infer_layer
from mha_c.parameters.quantization import MatmulPrecision, precision_of_weights
from mha_c.parameters.schemes import Layout
from mha_c.parameters.sets import ParameterSet, Widths
from mha_c.parameters.state_dict import ATTENTION, check_description, describe_attention, described_attention

__all__ = ["MultiheadAttention", "OutputProjection", "facts_of", "layer_with", "next_dropout_call", "parameters_of"]

MaskedRows: TypeAlias = Literal["torch", "zero"]


class _Width(property):
    """A width of the layer as an attribute; all widths are fixed at construction."""

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(operator.attrgetter(f"_parameters.widths.{name}"))
        self.__doc__ = f"{doc}, fixed at construction."

    if TYPE_CHECKING:

        def __get__(self, layer: Any, owner: type | None = None) -> int: ...  # type: ignore[override]


def _masked_rows(name: str, value: Any) -> MaskedRows:
    if value not in ("torch", "zero"):
        raise ValueError(f'{name} must be "torch" or "zero", but got {value!r}')
    return value  # type: ignore[no-any-return]


class MultiheadAttention(RandomModule):
    """Multi-head attention on NumPy arrays, as ``torch.nn.MultiheadAttention`` computes it.

    Each head compares every query with every key, turns the scores into weights that sum to 1, and takes the weighted
    sum of the values. The results of all heads, side by side, go through one more linear map::

        head_i = softmax(Q_i K_iᵀ / sqrt(head_dim)) V_i
        output = concatenate(head_1, ..., head_H) W_oᵀ + b_o

    Q_i, K_i and V_i are linear maps of the inputs query, key and value ("Attention Is All You Need", Vaswani et al.,
    2017, section 3.2.2).

    Parameters
    ----------
    embed_dim : int
        Features of the query, and of the output unless `out_dim` is given.
    num_heads : int
        Number of heads, H. A divisor of `embed_dim` unless `head_dim` is given.
    dropout : float, default 0.0
        Probability of dropping an attention weight, in training mode only. A new layer is in training mode.
    bias : bool, default True
        Whether the projections add biases.
    add_bias_kv : bool, default False
        Whether to append one learned key and value, ``bias_k`` and ``bias_v``.
    add_zero_attn : bool, default False
        Whether to append one key and value of zeros.
    kdim, vdim : int, optional
        Features of the key and of the value; `embed_dim` unless given.
    batch_first : bool, default False
        Whether inputs are (N, L, E) rather than (L, N, E).
    device : optional
        None or "cpu".
    dtype : optional
        float32 (the default), float64, bfloat16 or float16, as a name, a NumPy or a torch dtype.
    seed : int, optional
        Seed of the parameters: they are those of torch's layer after ``torch.manual_seed(seed)``, bit for bit. Those
        of bfloat16 and float16 are float32's, rounded, from which torch's differ in about one number of a thousand.
        None: a random seed.
    dropout_seed : int, optional
        Seed of the dropped weights, which also depend on the number of calls made in training mode. None: a random
        seed.
    masked_rows : {"torch", "zero"}, default "torch"
        What a query gets if every key is hidden from it. "torch": NaN with `need_weights`, and the output bias without,
        as in torch. "zero": always the output bias, with weights of 0.
    head_dim : int, optional
        Features of a query head and of a key head; ``embed_dim // num_heads`` unless given.
    v_head_dim : int, optional
        Features of a value head; `head_dim` unless given.
    out_dim : int, optional
        Features of the output; `embed_dim` unless given.
    num_kv_heads : int, optional
        Number of key and value heads, a divisor of `num_heads`; `num_heads` unless given. With fewer of them
        (grouped-query attention), query head h reads key and value head ``h // (num_heads // num_kv_heads)``.
    matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
        What is multiplied. "float32": numbers of float32. "bfloat16": numbers that are rounded to bfloat16, in the
        linear maps and in attention itself. "int8": weights and rows of inputs of the linear maps, rounded to int8
        numbers; attention itself multiplies bfloat16. None: bfloat16 in a layer of bfloat16, float64 in one of float64,
        otherwise float32. A mapping chooses for "in_proj", "attention" and "out_proj", or with "default" for those
        that it does not name, which are None otherwise; "attention" cannot be "int8". See the notes.

    Attributes
    ----------
    in_proj_weight : numpy.ndarray or None
        The query, key and value projections, stacked, if kdim = vdim = embed_dim; else None.
    q_proj_weight, k_proj_weight, v_proj_weight : numpy.ndarray or None
        The three projections, if kdim or vdim is not embed_dim; else None.
    in_proj_bias : numpy.ndarray or None
        The biases of the three projections, stacked; None without `bias`.
    bias_k, bias_v : numpy.ndarray or None
        The learned key and value of `add_bias_kv`, (1, 1, features); else None.
    out_proj : OutputProjection
        The output projection's ``weight`` and ``bias``.
    embed_dim, kdim, vdim, num_heads, num_kv_heads, head_dim, v_head_dim, out_dim : int
        The widths, fixed at construction.
    dropout, batch_first, add_zero_attn, masked_rows, training, dropout_seed, matmul_precision
        The options. They may be changed; a change takes effect at the next call.

    Raises
    ------
    ValueError
        If a width is not positive, `num_kv_heads` does not divide `num_heads`, `masked_rows` or `matmul_precision` is
        unknown, or `matmul_precision` is given in a layer of float64.
    AssertionError
        If `embed_dim` is not divisible by `num_heads` and `head_dim` is not given.
    TypeError, RuntimeError
        If an argument has a wrong type, or `dtype` or `device` is not supported.
    ImportError
        If `dtype` is bfloat16, and ml_dtypes is not installed.
    MemoryError
        If the parameters do not fit into memory.

    Notes
    -----
    Parameters are read-only arrays. Assigning to one, `load_state_dict` and `to` replace all of them at once, so other
    threads may call the layer at the same time: each call uses one set of parameters throughout.

    With the `matmul_precision` "bfloat16", and in layers of bfloat16 without one, both factors of each product are
    rounded to the nearest number of bfloat16, a tie to the even one. Subnormal factors become 0. Products are summed in
    float32. So the context of a query is, with r for rounding::

        s_j = r(Q / sqrt(head_dim)) · r(K_j) + mask_j
        e_j = exp(s_j - m)
        context = sum_j r(e_j) r(V_j) / sum_j e_j

    m is the largest score of the block of 64 keys that j is in, and of the blocks before. If a later block has a larger
    one, both sums are scaled. The e_j that are added up and the weights that are returned are not rounded. (Factors of
    bfloat16 and sums of float32: "A Study of BFLOAT16 for Deep Learning Training", Kalamkar et al., 2019.)

    With the `matmul_precision` "int8", a row w of a weight becomes the int8 numbers rint(w / s) with the scale
    s = max|w| / 127. Each row of an input is quantized in the same way when it comes, so an outlier does not spoil the
    other rows. A map is then::

        y = b + s_x s_w (sum of q_x q_w)

    The sum is exact over up to 8192 features, and those of more features are added in order. A row with NaN or infinity
    gives NaN. Products of bfloat16 and int8 give the same bits on every CPU whose float32 results have the same bits,
    except for sums of bfloat16 below 2^-126. Few queries of many keys are computed without projecting keys and values.
    Then attention itself, and the weight of the keys, multiply float32. Parameters and state dicts stay those of the
    dtype.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> attention = mha_c.MultiheadAttention(embed_dim=8, num_heads=4, seed=0)
    >>> x = np.random.default_rng(0).standard_normal((5, 3, 8), dtype=np.float32)  # (L, N, E)
    >>> output, weights = attention(x, x, x)
    >>> output.shape, weights.shape
    ((5, 3, 8), (3, 5, 5))

    The widths of heads and output can be chosen:

    >>> mha_c.MultiheadAttention(10, 4, head_dim=2, out_dim=8)
    MultiheadAttention(embed_dim=10, num_heads=4, head_dim=2, out_dim=8, dtype=float32, training=True)
    """

    embed_dim = _Width("embed_dim", "Features of the query")
    kdim = _Width("kdim", "Features of the key")
    vdim = _Width("vdim", "Features of the value")
    num_heads = _Width("num_heads", "Number of query heads")
    num_kv_heads = _Width("num_kv_heads", "Number of key and value heads")
    head_dim = _Width("head_dim", "Features of a query head and of a key head")
    v_head_dim = _Width("v_head_dim", "Features of a value head")
    out_dim = _Width("out_dim", "Features of the output")

    in_proj_weight = Parameter(
        "in_proj_weight", "The query, key and value projections, stacked, if kdim = vdim = embed_dim; else None."
    )
    q_proj_weight = Parameter("q_proj_weight", "The query projection, if kdim or vdim is not embed_dim; else None.")
    k_proj_weight = Parameter("k_proj_weight", "The key projection, if kdim or vdim is not embed_dim; else None.")
    v_proj_weight = Parameter("v_proj_weight", "The value projection, if kdim or vdim is not embed_dim; else None.")
    in_proj_bias = Parameter(
        "in_proj_bias", "The biases of the query, key and value projections, stacked; None without `bias`."
    )
    bias_k = Parameter("bias_k", "The learned key of `add_bias_kv`, (1, 1, features); else None.")
    bias_v = Parameter("bias_v", "The learned value of `add_bias_kv`, (1, 1, features); else None.")

    dropout = Option("dropout", number, "Probability of dropping an attention weight, in training mode only.")
    batch_first = Option("batch_first", flag, "Whether inputs are (N, L, E) rather than (L, N, E).")
    add_zero_attn = Option("add_zero_attn", flag, "Whether to append one key and value of zeros.")
    masked_rows = Option("masked_rows", _masked_rows, "What a query gets if every key is hidden from it.")
    matmul_precision = PrecisionOfProducts()

    _kind = "MultiheadAttention"

    _parameters: ParameterSet
    _dropout: float  # where these are kept: each call reads them, and a property takes longer
    _batch_first: bool
    _add_zero_attn: bool
    _masked_rows: MaskedRows
    _warns_of_decoding = True

    @knows_foreign_keywords
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: int | None = None,
        dropout_seed: int | None = None,
        masked_rows: MaskedRows = "torch",
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        out_dim: int | None = None,
        num_kv_heads: int | None = None,
        matmul_precision: MatmulPrecision | None = None,
    ) -> None:
        widths = Widths.from_arguments(embed_dim, num_heads, kdim, vdim, head_dim, v_head_dim, out_dim, num_kv_heads)
        check_device(device)
        real = float_dtype(dtype)
        shapes = widths.shapes(flag("bias", bias), flag("add_bias_kv", add_bias_kv))
        check_memory(shapes, real, f"embed_dim={widths.embed_dim:,}")
        precisions = precision_of_weights(matmul_precision, widths.products)
        arrays = initial_parameters(shapes, real, seed)
        parameters = ParameterSet(widths, arrays, real, precisions)
        self._set_up(parameters, dropout, add_zero_attn, batch_first, dropout_seed, masked_rows)

    def _set_up(
        self,
        parameters: ParameterSet,
        dropout: float,
        add_zero_attn: bool,
        batch_first: bool,
        dropout_seed: int | None = None,
        masked_rows: MaskedRows = "torch",
    ) -> None:
        """Set everything that a new layer has, with parameters made by the caller."""
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.masked_rows = masked_rows
        self.training = True
        self._set_up_dropout(dropout_seed)
        self._parameters = parameters

    @classmethod
    def _from_parameters(cls, parameters: ParameterSet, *arguments: Any, **named: Any) -> Self:
        """A layer with existing parameters; the arguments are those of `_set_up`."""
        layer = cls.__new__(cls)
        layer._set_up(parameters, *arguments, **named)
        return layer

    @overload
    def forward(
        self, query: AnyArray, key: AnyArray, value: AnyArray, key_padding_mask: AnyArray | None = None,
        need_weights: Literal[True] = True, attn_mask: AnyArray | None = None, average_attn_weights: bool = True,
        is_causal: bool = False, *, out: Array | None = None,
    ) -> tuple[Array, Array]: ...
    @overload
    def forward(
        self, query: AnyArray, key: AnyArray, value: AnyArray, key_padding_mask: AnyArray | None,
        need_weights: Literal[False], attn_mask: AnyArray | None = None, average_attn_weights: bool = True,
        is_causal: bool = False, *, out: Array | None = None,
    ) -> tuple[Array, None]: ...
    @overload
    def forward(
        self, query: AnyArray, key: AnyArray, value: AnyArray, key_padding_mask: AnyArray | None = None, *,
        need_weights: Literal[False], attn_mask: AnyArray | None = None, average_attn_weights: bool = True,
        is_causal: bool = False, out: Array | None = None,
    ) -> tuple[Array, None]: ...
    @overload
    def forward(
        self, query: AnyArray, key: AnyArray, value: AnyArray, key_padding_mask: AnyArray | None = None,
        need_weights: bool = True, attn_mask: AnyArray | None = None, average_attn_weights: bool = True,
        is_causal: bool = False, *, out: Array | None = None,
    ) -> tuple[Array, Array | None]: ...

    @knows_foreign_keywords
    def forward(
        self,
        query: AnyArray,
        key: AnyArray,
        value: AnyArray,
        key_padding_mask: AnyArray | None = None,
        need_weights: bool = True,
        attn_mask: AnyArray | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        out: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """Compute the attention of every query to all keys; calling the layer does the same.

        Inputs are arrays of the layer's dtype: NumPy arrays, or other objects on the CPU with the array interface, the
        buffer protocol or DLPack. They are not modified. N is the batch size, L the number of queries, S the number of
        keys.

        Parameters
        ----------
        query : array, (L, N, embed_dim)
            (N, L, embed_dim) with `batch_first`; (L, embed_dim) without a batch.
        key : array, (S, N, kdim)
            Or (N, S, kdim), or (S, kdim).
        value : array, (S, N, vdim)
            Or (N, S, vdim), or (S, vdim).
        key_padding_mask : array, (N, S) or (S,), optional
            Booleans: True hides this key. Floats: added to the scores of this key.
        need_weights : bool, default True
            Whether to return the attention weights too.
        attn_mask : array, (L, S) or (N * num_heads, L, S) or (num_heads, L, S), optional
            Booleans: True hides this key from this query. Floats: added to the scores.
        average_attn_weights : bool, default True
            Whether the returned weights are averaged over the heads.
        is_causal : bool, default False
            Whether query l sees only the keys 0..l, in addition to the masks.
        out : numpy.ndarray, optional
            A writable array of the output's shape and dtype, into which the output is written.

        Returns
        -------
        attn_output : numpy.ndarray
            The query's shape, with `out_dim` features. It is `out` if that is given.
        attn_output_weights : numpy.ndarray or None
            None without `need_weights`; else (N, L, S'), or (N, num_heads, L, S') if not averaged. Without a batch,
            there is no N. S' is S plus the keys that `add_bias_kv` and `add_zero_attn` append.

        Raises
        ------
        AssertionError, RuntimeError, TypeError, ValueError
            If ranks, shapes or dtypes do not fit, as in torch. The message has torch's words and says what to write
            instead. A list or a masked array is a TypeError.

        Warns
        -----
        UserWarning
            With `is_causal`, without `attn_mask` and with fewer queries than keys, as in decoding: the queries then see
            only the first keys.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> attention = mha_c.MultiheadAttention(4, 2, batch_first=True, dtype="float64", seed=0)
        >>> x = np.ones((1, 3, 4))
        >>> attention(x, x, x, is_causal=True)[1]
        array([[[1.        , 0.        , 0.        ],
                [0.5       , 0.5       , 0.        ],
                [0.33333333, 0.33333333, 0.33333333]]])
        """
        try:
            if is_causal and attn_mask is None and self._warns_of_decoding:
                warn_of_decoding(query, key, self._batch_first)
            dropout_p = self._dropout if self._training else 0.0
            return _core.forward(
                self._parameters.weights,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
                out,
                self._batch_first,
                self._add_zero_attn,
                self._masked_rows,
                dropout_p,
                self._dropout_seed,
                self._count_dropout_call() if dropout_p > 0 else 0,
            )
        except REFUSALS as error:
            flags = {"need_weights": need_weights, "average_attn_weights": average_attn_weights, "is_causal": is_causal}
            inputs = (query, key, value, key_padding_mask, attn_mask)
            add_advice(error, advice_on_call(flags, *inputs, **facts_of(self)))
            raise

    __call__ = forward

    @property
    def out_proj(self) -> "OutputProjection":
        """The output projection: its ``weight`` and ``bias``."""
        return OutputProjection(self)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self._parameters.widths.is_stacked

    def _products(self, at: str) -> Mapping[str, tuple[str, ...]]:
        return self._parameters.widths.products

    @classmethod
    @knows_foreign_keywords
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any] | str | os.PathLike[str],
        prefix: str = "",
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        num_heads: int | None = None,
        names: Sequence[str] | None = None,
        strict: bool = True,
        dropout: float = 0.0,
        add_zero_attn: bool = False,
        batch_first: bool | None = None,
        dtype: Any = None,
        dropout_seed: int | None = None,
        masked_rows: MaskedRows = "torch",
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        layout: Layout | None = None,
        matmul_precision: MatmulPrecision | None = None,
    ) -> Self:
        """Make a layer from trained parameters: those of one layer in a state dict or a file.

        The shapes of the parameters determine the widths of the layer.

        Parameters
        ----------
        state_dict : mapping of str to array or tensor, or str or path-like
            The parameters of the layer or of a whole model, or a file of them: of torch (.pt, .pth, .bin, .ckpt),
            safetensors, .npz, or the index of several files (``model.safetensors.index.json``). The kind of a file is
            recognised by its content. Only the layer is read, and nothing in the file is executed. Mappings may be
            nested, such as ``{"model": ..., "epoch": 3}``.
        prefix : str, default ""
            The beginning of the layer's names, including the dot, such as ``"encoder.layers.0.self_attn."``. More may
            precede it, such as ``"model."``, if there is only one such layer.
        config : mapping of str to object, or str or path-like, optional
            The configuration of a Hugging Face model, or its ``config.json``. It gives `num_heads`, `num_kv_heads` and
            `head_dim`, and shows whether the model computes something that this layer does not.
        num_heads : int, optional
            Number of heads. It is needed unless `config`, or the shape of Flax's or Keras's kernels, gives it.
        names : sequence of str, optional
            The names of the query, key, value and output projections, each with a ``.weight`` and perhaps a ``.bias``.
            Two names if one weight holds query, key and value; three if one weight holds key and value. None: the names
            of torch, BERT, GPT-2, timm, x-transformers, Flax, Keras and others are tried.
        strict : bool, default True
            Whether unknown arrays beside the projections, or a missing bias, are an error. If False, a missing bias is
            zero. With `names`, False also states that the model computes nothing else.
        dropout, add_zero_attn
            As for the constructor. A state dict does not record them.
        batch_first : bool, optional
            As for the constructor. None: True with `config`, as in Hugging Face's models, and otherwise False, as in
            torch.
        dtype : optional
            float32, float64, bfloat16 or float16, to which the parameters are cast. None: the dtype of the output
            weight, or float32 if a layer cannot have it.
        dropout_seed, masked_rows
            As for the constructor.
        head_dim, num_kv_heads : int, optional
            Only needed if one weight holds query, key and value, and value heads and key heads differ in width. One of
            the two is then enough.
        layout : {"stacked", "per_head"}, optional
            How one weight holds several projections: "stacked", one below the other, as in timm and GPT-2; "per_head",
            head by head, as in GPT-NeoX, BLOOM and Falcon. It is needed if the name of the weight does not show it.
        matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
            As for the constructor.

        Returns
        -------
        MultiheadAttention
            The layer, in training mode like any new layer.

        Raises
        ------
        RuntimeError
            If names or shapes do not fit. The message has torch's words and says what the state dict holds.
        NotImplementedError
            If the model computes something that this layer does not, such as rotary positions, normalised queries or
            biases by relative position: if `config` or names in the state dict show it, or if models with these names
            usually do so, such as Llama and T5. The message names the difference.
        ValueError
            If no layer of `num_heads` heads has such shapes; if arguments contradict `config` or each other; if
            `layout` is needed; if `matmul_precision` is unknown, or given for a layer of float64; or if a file is
            incomplete, damaged or of another kind.
        TypeError
            If `state_dict` is neither a mapping nor a path, or if the number of heads is not known.
        ImportError
            If there are bfloat16 or float8 numbers to read, and ml_dtypes is not installed. It is not needed to cast
            bfloat16 to another `dtype`.
        OSError
            If the file cannot be opened.

        Notes
        -----
        A state dict does not record `batch_first`, dropout, masks, or what a model does before its attention. A layer
        computes softmax(Q Kᵀ / sqrt(head_dim)) V and nothing else. If a model computes more, without parameters and
        under common names, only `config` shows it.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> model = {f"encoder.{name}_proj.weight": np.ones((8, 8), np.float16) for name in ("q", "k", "v", "out")}
        >>> attention = mha_c.MultiheadAttention.from_state_dict(model, "encoder.", num_heads=2)
        >>> attention.in_proj_weight.shape, attention.in_proj_weight.dtype, attention.in_proj_bias
        ((24, 8), dtype('float16'), None)
        """
        with open_state_dict(state_dict) as tensors:
            widths, arrays = infer_layer(
                cls.__name__,
                tensors,
                prefix,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                config=config,
                names=names,
                layout=layout,
                strict=strict,
                will_cast=dtype is not None,
            )
        real = trained_dtype(arrays["out_proj.weight"].dtype, dtype)
        parameters = ParameterSet(widths, arrays, real, precision_of_weights(matmul_precision, widths.products))
        if batch_first is None:
            batch_first = config is not None
        return cls._from_parameters(parameters, dropout, add_zero_attn, batch_first, dropout_seed, masked_rows)

    def _description(self) -> dict[str, Any]:
        return describe_attention(
            self._parameters,
            dropout=self.dropout,
            add_zero_attn=self.add_zero_attn,
            batch_first=self.batch_first,
            dropout_seed=self.dropout_seed,
            masked_rows=self.masked_rows,
        )

    @classmethod
    def _described(cls, description: Mapping[str, Any], content: Mapping[str, Any]) -> Self:
        check_description(description, ATTENTION)
        parameters, arguments = described_attention(cls.__name__, description, content)
        return cls._from_parameters(parameters, **arguments)

    @classmethod
    @knows_foreign_keywords
    def from_torch(cls, module: Any, *, matmul_precision: MatmulPrecision | None = None) -> Self:
        """Make a layer from a layer of torch, with its arguments, parameters and training mode.

        Parameters
        ----------
        module : torch.nn.MultiheadAttention
            The layer to copy. A subclass will do if it has torch's forward. The weights are those that torch would use
            now, whether they are parameters, parametrized or plain tensors. Buffers are not copied. The dtype is that
            of the output weight.
        matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
            As for the constructor.

        Returns
        -------
        MultiheadAttention

        Raises
        ------
        TypeError
            If `module` is something else, or if it overrides forward or has forward hooks: it could compute anything.
        ValueError
            If `matmul_precision` is unknown, or given for a layer of float64.
        ImportError
            If there are parameters in bfloat16, and ml_dtypes is not installed.

        Examples
        --------
        >>> import mha_c, torch
        >>> mha_c.MultiheadAttention.from_torch(torch.nn.MultiheadAttention(8, 2)).num_heads
        2
        """
        check_torch_module(
            module,
            "MultiheadAttention",
            "If it computes torch's attention, write "
            "MultiheadAttention.from_state_dict(module.state_dict(), num_heads=module.num_heads)",
        )
        out_dim = len(module.out_proj.weight)
        widths = Widths.from_arguments(module.embed_dim, module.num_heads, module.kdim, module.vdim, out_dim=out_dim)
        biases = module.in_proj_bias, module.out_proj.bias
        has_bias = any(bias is not None for bias in biases)
        arrays = {}
        for name, shape in widths.shapes(has_bias, module.bias_k is not None).items():
            tensor = operator.attrgetter(name)(module)
            # Where one of two biases is missing, zeros change nothing.
            arrays[name] = np.zeros(shape) if tensor is None and name.endswith("bias") else as_array(tensor)
        real = trained_dtype(arrays["out_proj.weight"].dtype, None)
        parameters = ParameterSet(widths, arrays, real, precision_of_weights(matmul_precision, widths.products))
        layer = cls._from_parameters(parameters, module.dropout, module.add_zero_attn, module.batch_first)
        return layer.train(module.training)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())}, training={self.training})"

    def _arguments(self) -> list[str]:
        """The constructor's arguments in words: the widths and dtype, and the others where they are not the default."""
        w = self._parameters.widths
        optional = {
            "dropout": (self.dropout, 0.0),
            "bias": ("out_proj.bias" in self._parameters.shapes, True),
            "add_bias_kv": ("bias_k" in self._parameters.shapes, False),
            "add_zero_attn": (self.add_zero_attn, False),
            "kdim": (w.kdim, w.embed_dim),
            "vdim": (w.vdim, w.embed_dim),
            "batch_first": (self.batch_first, False),
            "masked_rows": (self.masked_rows, "torch"),
            "head_dim": (w.head_dim, w.embed_dim / w.num_heads),
            "v_head_dim": (w.v_head_dim, w.head_dim),
            "out_dim": (w.out_dim, w.embed_dim),
            "num_kv_heads": (w.num_kv_heads, w.num_heads),
            "matmul_precision": (self.matmul_precision, None),
        }
        changed = [f"{name}={value!r}" for name, (value, default) in optional.items() if value != default]
        dtype = self._parameters.dtype.name
        return [f"embed_dim={w.embed_dim}", f"num_heads={w.num_heads}", *changed, f"dtype={dtype}"]

    def _repr_html_(self) -> str:
        """What a notebook shows: arguments, parameters, bytes, and what computes here."""
        from mha_c.display.html import block, escape, table
        from mha_c.display.words import count

        stored, shapes = self._parameters.stored, self._parameters.shapes
        axes = self._parameters.widths.axes()
        rows = [(name, axes[name], str(shapes[name]), f"{one.nbytes:,}") for name, one in stored.items()]
        size, nbytes = sum(map(math.prod, shapes.values())), sum(one.nbytes for one in stored.values())
        config = _core.config()
        mode = "Training mode" if self.training else "Evaluation mode"
        drops = f"dropout of {self.dropout}" if self.training and self.dropout > 0 else "no dropout"
        facts = (
            f"{size:,} parameters in {self._parameters.dtype.name}: {nbytes:,} bytes, and about "
            f"{self._parameters.weights.nbytes:,} more, packed for the kernels ({config['cpu_level']}). "
            f"Up to {count(config['threads'], 'thread')}.",
            f"{mode}: {drops}.",
        )
        title = f"<p><b>{escape(type(self).__name__)}</b>({escape(', '.join(self._arguments()))})</p>"
        parameters = table(("parameter", "axes", "shape", "bytes"), rows, text=(0, 1))
        return block(title + parameters + "".join(f'<p class="faint">{escape(fact)}</p>' for fact in facts))


class OutputProjection:
    """The output projection of a layer: a view of its ``weight`` and ``bias``, which may be assigned.

    Parameters
    ----------
    layer : MultiheadAttention
        The layer.

    Examples
    --------
    >>> import mha_c
    >>> mha_c.MultiheadAttention(8, 2).out_proj.weight.shape
    (8, 8)
    """

    def __init__(self, layer: MultiheadAttention) -> None:
        self._layer = layer

    @property
    def weight(self) -> Array:
        """The weight, (out_dim, num_heads * v_head_dim)."""
        return self._layer._parameters.arrays["out_proj.weight"]

    @weight.setter
    def weight(self, value: Any) -> None:
        self._layer._assign("out_proj.weight", value)

    @property
    def bias(self) -> Array | None:
        """The bias, (out_dim,); None in a layer without biases."""
        return self._layer._parameters.array("out_proj.bias")

    @bias.setter
    def bias(self, value: Any) -> None:
        self._layer._assign("out_proj.bias", value)

    @property
    def in_features(self) -> int:
        """The features of all heads together: num_heads * v_head_dim."""
        return self._layer._parameters.shapes["out_proj.weight"][1]

    @property
    def out_features(self) -> int:
        """The features of the output: out_dim."""
        return self._layer._parameters.shapes["out_proj.weight"][0]

    def __repr__(self) -> str:
        return (
            f"OutputProjection(in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None})"
        )


def layer_with(parameters: ParameterSet, *, add_zero_attn: bool, batch_first: bool) -> MultiheadAttention:
    """A layer with existing parameters, in evaluation mode. It does not warn of is_causal in decoding, since its caller
    has resolved torch's hint.
    """
    layer = MultiheadAttention._from_parameters(parameters, 0.0, add_zero_attn, batch_first)
    layer._warns_of_decoding = False
    return layer.eval()


def facts_of(layer: MultiheadAttention, whole: Module | None = None) -> dict[str, Any]:
    """What `advice_on_call` needs to know about a layer, perhaps in a whole layer that was called."""
    widths, arrays = layer._parameters.widths, layer._parameters.arrays
    return {
        "num_heads": widths.num_heads,
        "features": (widths.embed_dim, widths.kdim, widths.vdim),
        "parameters": arrays.values(),
        "extra_keys": ("bias_k" in arrays) + layer.add_zero_attn,
        "batch_first": layer.batch_first,
        "other_dtypes": dtypes_for(layer if whole is None else whole),
    }


def parameters_of(layer: MultiheadAttention) -> ParameterSet:
    """The parameters that a call made now would use."""
    return layer._parameters


def next_dropout_call(layer: MultiheadAttention) -> int:
    """The number of the layer's next call in training mode."""
    return layer._dropout_calls
