# SPDX-License-Identifier: Apache-2.0
"""The decoder: torch's TransformerDecoderLayer, and a stack of such layers."""

from __future__ import annotations

from types import NoneType
from typing import Any

from mha_c._typing import Self
from mha_c.advice.arguments import REFUSALS
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.advice.transformers import AttentionCall, advise_on_steps
from mha_c.container import Child, Container, ModuleList
from mha_c.dropout import Dropout
from mha_c.layer import MultiheadAttention, facts_of
from mha_c.module import Module, Option, check_torch_module
from mha_c.norms import LayerNorm, RMSNorm
from mha_c.parameters.arrays import AnyArray, Array, as_array
from mha_c.parameters.checks import integer
from mha_c.parameters.quantization import MatmulPrecision
from mha_c.transformer.layer import Padded, TransformerLayer, check_padded, copies_of, zero_padded_rows

__all__ = ["TransformerDecoder", "TransformerDecoderLayer"]


class _OverMemory(Child[MultiheadAttention]):
    """The attention to the memory, which may be longer than what is decoded: nothing warns of that."""

    def __set__(self, layer: Any, value: Module | None) -> None:
        super().__set__(layer, value)
        if isinstance(value, MultiheadAttention):
            value._warns_of_decoding = False


class TransformerDecoderLayer(TransformerLayer):
    """A layer of a decoder, as ``torch.nn.TransformerDecoderLayer`` computes it.

    Self-attention, attention to the output of an encoder, and a feed-forward network are each added to their input, and
    the sum is normalized ("Attention Is All You Need", Vaswani et al., 2017, section 3.1)::

        x = norm1(x + self_attn(x, x, x))
        x = norm2(x + multihead_attn(x, memory, memory))
        x = norm3(x + linear2(activation(linear1(x))))

    With `norm_first`, norms come before attention and feed-forward, as in `TransformerEncoderLayer`; `memory` is not
    normalized.

    Parameters
    ----------
    d_model : int
        Features of the inputs and the output.
    nhead : int
        Number of heads. A divisor of `d_model` unless `head_dim` is given.
    dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype
        As for `TransformerEncoderLayer`.
    seed, dropout_seed, norm
        As for `TransformerEncoderLayer`.
    padded : {"zero", "computed"}, optional
        What to write into the output rows of padded tokens: those that `tgt_key_padding_mask` marks with True or -inf.
        "zero": zeros. "computed": what the layer computes for them. None: "computed".
    masked_rows, num_kv_heads, head_dim, v_head_dim
        As for `MultiheadAttention`.
    matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
        As for `TransformerEncoderLayer`. "in_proj", "attention" and "out_proj" stand for those of both attentions.

    Attributes
    ----------
    self_attn, multihead_attn : MultiheadAttention
        The attention to the target itself, and to the memory.
    linear1, linear2 : Linear
        The feed-forward network.
    norm1, norm2, norm3 : LayerNorm or RMSNorm
        The norms.
    dropout, dropout1, dropout2, dropout3 : Dropout
        The dropout of activations, of the outputs of both attentions, and of the feed-forward network's output.
    norm_first, activation, padded, matmul_precision
        The options. They may be changed; a change takes effect at the next call.
    training : bool
        The mode, which `train` and `eval` also set in the layers in this one. Calls use theirs.

    Raises
    ------
    ValueError, AssertionError, RuntimeError, TypeError, MemoryError
        As `TransformerEncoderLayer`.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> layer = mha_c.TransformerDecoderLayer(8, 2, 16, batch_first=True, seed=0).eval()
    >>> tgt, memory = np.zeros((3, 5, 8), np.float32), np.zeros((3, 7, 8), np.float32)
    >>> layer(tgt, memory, tgt_is_causal=True).shape
    (3, 5, 8)
    """

    self_attn = Child[MultiheadAttention]("self_attn", "The attention to the target itself.")
    multihead_attn = _OverMemory("multihead_attn", "The attention to the memory.")
    norm1 = Child[LayerNorm | RMSNorm]("norm1", "The norm of the attention to the target.")
    norm2 = Child[LayerNorm | RMSNorm]("norm2", "The norm of the attention to the memory.")
    norm3 = Child[LayerNorm | RMSNorm]("norm3", "The norm of the feed-forward network.")
    dropout1 = Child[Dropout]("dropout1", "The dropout of the output of the attention to the target.")
    dropout2 = Child[Dropout]("dropout2", "The dropout of the output of the attention to the memory.")
    dropout3 = Child[Dropout]("dropout3", "The dropout of the feed-forward network's output.")

    _kind = "TransformerDecoderLayer"
    _child_names = (
        "self_attn", "multihead_attn", "linear1", "dropout", "linear2",
        "norm1", "norm2", "norm3", "dropout1", "dropout2", "dropout3",
    )  # fmt: skip

    @knows_foreign_keywords
    def forward(
        self,
        tgt: AnyArray,
        memory: AnyArray,
        tgt_mask: AnyArray | None = None,
        memory_mask: AnyArray | None = None,
        tgt_key_padding_mask: AnyArray | None = None,
        memory_key_padding_mask: AnyArray | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Array:
        """Compute the output of the layer; calling the layer does the same.

        Inputs are arrays of the layer's dtype, as for `MultiheadAttention`. They are not modified. N is the batch size,
        T the length of the target and S that of the memory.

        Parameters
        ----------
        tgt : array, (T, N, d_model)
            The target; (N, T, d_model) with `batch_first`; (T, d_model) without a batch.
        memory : array, (S, N, d_model)
            The output of an encoder; or (N, S, d_model), or (S, d_model).
        tgt_mask : array, (T, T) or (N * nhead, T, T) or (nhead, T, T), optional
            Booleans: True hides this position of the target from this one. Floats: added to the scores.
        memory_mask : array, (T, S) or (N * nhead, T, S) or (nhead, T, S), optional
            Booleans: True hides this position of the memory from this one of the target. Floats: added to the scores.
        tgt_key_padding_mask : array, (N, T) or (T,), optional
            Booleans: True hides this position of the target. Floats: added to its scores.
        memory_key_padding_mask : array, (N, S) or (S,), optional
            Booleans: True hides this position of the memory. Floats: added to its scores.
        tgt_is_causal : bool, default False
            Whether position i sees only the positions 0..i of the target, in addition to the masks.
        memory_is_causal : bool, default False
            Whether position i of the target sees only the positions 0..i of the memory, in addition to the masks.

        Returns
        -------
        numpy.ndarray
            Of the shape and dtype of `tgt`.

        Raises
        ------
        AssertionError, RuntimeError, TypeError, ValueError
            If ranks, shapes or dtypes do not fit, as in torch. The message has torch's words and says what to write
            instead.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> layer = mha_c.TransformerDecoderLayer(4, 2, 8, seed=0).eval()
        >>> tgt, memory = np.zeros((5, 4), np.float32), np.zeros((7, 4), np.float32)
        >>> layer(tgt, memory).shape
        (5, 4)
        """
        try:
            x = self._run(
                tgt,
                attention=self.self_attn,
                norms=(self.norm1,),
                dropouts=(self.dropout1,),
                attn_mask=tgt_mask,
                key_padding_mask=tgt_key_padding_mask,
                is_causal=tgt_is_causal,
            )
            output: Array = self._run(
                x,
                memory,
                memory,
                attention=self.multihead_attn,
                norms=(self.norm2, self.norm3),
                dropouts=(self.dropout2, self.dropout3),
                attn_mask=memory_mask,
                key_padding_mask=memory_key_padding_mask,
                is_causal=memory_is_causal,
            )
        except REFUSALS as error:
            advise_on_steps(
                error,
                AttentionCall(
                    "tgt", tgt, "tgt", tgt, "tgt_mask", tgt_mask, "tgt_key_padding_mask", tgt_key_padding_mask,
                    "tgt_is_causal", tgt_is_causal, lambda: facts_of(self.self_attn, self),
                ),
                AttentionCall(
                    "tgt", tgt, "memory", memory, "memory_mask", memory_mask, "memory_key_padding_mask",
                    memory_key_padding_mask, "memory_is_causal", memory_is_causal,
                    lambda: facts_of(self.multihead_attn, self),
                ),
            )  # fmt: skip
            raise
        if self._padded == "zero" and tgt_key_padding_mask is not None:
            output = zero_padded_rows(output, tgt_key_padding_mask, self.self_attn.batch_first)
        return output

    __call__ = forward

    @classmethod
    @knows_foreign_keywords
    def from_torch(cls, module: Any, *, matmul_precision: MatmulPrecision | None = None) -> Self:
        """Make a layer from a layer of torch, with its arguments, parameters and training mode.

        Parameters
        ----------
        module : torch.nn.TransformerDecoderLayer
            The layer to copy. A subclass will do if it has torch's methods. Buffers are not copied.
        matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
            As for the constructor.

        Returns
        -------
        TransformerDecoderLayer

        Raises
        ------
        TypeError
            If `module` is something else, if it overrides forward or has forward hooks, or if its activation or a
            layer in it has no counterpart here.
        ValueError
            If `matmul_precision` is unknown, or given for a layer of float64.
        ImportError
            If there are parameters in bfloat16, and ml_dtypes is not installed.

        Examples
        --------
        >>> import mha_c, torch
        >>> mha_c.TransformerDecoderLayer.from_torch(torch.nn.TransformerDecoderLayer(8, 2, 16)).linear1
        Linear(in_features=8, out_features=16, bias=True)
        """
        return cls._layer_from_torch(module, ("forward", "_sa_block", "_mha_block", "_ff_block"), matmul_precision)


class TransformerDecoder(Container):
    """A stack of decoder layers, as ``torch.nn.TransformerDecoder`` computes it.

    Parameters
    ----------
    decoder_layer : TransformerDecoderLayer
        The layer, of which the stack holds deep copies. Their parameters are equal, and their dropout differs.
    num_layers : int
        How many copies.
    norm : Module, optional
        What normalizes the output of the last layer.
    padded : {"zero", "computed"}, optional
        What to write into the rows of padded tokens, after the last layer and before `norm`: those tokens that
        `tgt_key_padding_mask` marks with True or -inf. "zero": zeros. "computed": what the layers compute for them.
        None: "computed", as in torch.

    Attributes
    ----------
    layers : ModuleList of TransformerDecoderLayer
        The layers.
    num_layers : int
        How many there were at construction.
    norm : Module or None
        The norm of the output.
    matmul_precision : str or mapping or None
        Of the layers, as for `TransformerDecoderLayer`. It may be assigned.
    padded : str or None
        It may be changed; a change takes effect at the next call.
    training : bool
        The mode, which `train` and `eval` also set in the layers in this one. Calls use theirs.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If `padded` is unknown.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> layer = mha_c.TransformerDecoderLayer(4, 2, 8, seed=0)
    >>> decoder = mha_c.TransformerDecoder(layer, num_layers=2, norm=mha_c.LayerNorm(4)).eval()
    >>> decoder(np.zeros((5, 3, 4), np.float32), np.zeros((7, 3, 4), np.float32)).shape
    (5, 3, 4)
    """

    layers = Child[ModuleList[TransformerDecoderLayer]]("layers", "The layers.")
    norm = Child[Any]("norm", "The norm of the output, or None.")
    padded = Option("padded", check_padded, "What padded rows hold.")
    num_layers = Option("num_layers", integer, "How many layers there were at construction. Calls use `layers`.")

    _kind = "TransformerDecoder"
    _child_names = ("layers", "norm")
    _option_kinds = {"num_layers": int, "padded": (str, NoneType)}

    _padded: Padded | None

    @knows_foreign_keywords
    def __init__(
        self,
        decoder_layer: TransformerDecoderLayer,
        num_layers: int,
        norm: Module | None = None,
        *,
        padded: Padded | None = None,
    ) -> None:
        layers = copies_of(decoder_layer, TransformerDecoderLayer, "decoder_layer", num_layers)
        self._set_up({"layers": layers, "norm": norm}, {"num_layers": num_layers, "padded": padded})

    @knows_foreign_keywords
    def forward(
        self,
        tgt: AnyArray,
        memory: AnyArray,
        tgt_mask: AnyArray | None = None,
        memory_mask: AnyArray | None = None,
        tgt_key_padding_mask: AnyArray | None = None,
        memory_key_padding_mask: AnyArray | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Array:
        """Compute the output of all layers, one after the other; calling the decoder does the same.

        Parameters
        ----------
        tgt : array, (T, N, d_model)
            The target; (N, T, d_model) with `batch_first`; (T, d_model) without a batch. It is not modified.
        memory : array, (S, N, d_model)
            The output of an encoder; or (N, S, d_model), or (S, d_model). It is not modified.
        tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal
            As for `TransformerDecoderLayer`.

        Returns
        -------
        numpy.ndarray
            Of the shape and dtype of `tgt`.

        Raises
        ------
        AssertionError, RuntimeError, TypeError, ValueError
            If ranks, shapes or dtypes do not fit, as in torch. The message has torch's words and says what to write
            instead.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> layer = mha_c.TransformerDecoderLayer(4, 2, 8, seed=0)
        >>> decoder = mha_c.TransformerDecoder(layer, 2).eval()
        >>> decoder(np.zeros((5, 4), np.float32), np.zeros((7, 4), np.float32), tgt_is_causal=True).shape
        (5, 4)
        """
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        output: Any = tgt
        for layer in self.layers:
            output = layer(output, memory, *masks, False if tgt_is_causal is None else tgt_is_causal, memory_is_causal)
        if self._padded == "zero" and tgt_key_padding_mask is not None and self.layers:
            output = zero_padded_rows(output, tgt_key_padding_mask, self.layers[0].self_attn.batch_first)
        return as_array(output) if self.norm is None else self.norm(output)

    __call__ = forward

    @classmethod
    @knows_foreign_keywords
    def from_torch(cls, module: Any, *, matmul_precision: MatmulPrecision | None = None) -> Self:
        """Make a decoder from a decoder of torch, with its arguments, parameters and training mode.

        Parameters
        ----------
        module : torch.nn.TransformerDecoder
            The decoder to copy. A subclass will do if it has torch's forward. Buffers are not copied.
        matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
            As for `TransformerDecoderLayer`.

        Returns
        -------
        TransformerDecoder

        Raises
        ------
        TypeError
            If `module` is something else, if it or a layer in it overrides forward or has forward hooks, or if a
            layer has no counterpart here.
        ValueError
            If `matmul_precision` is unknown, or given for layers of float64.
        ImportError
            If there are parameters in bfloat16, and ml_dtypes is not installed.

        Examples
        --------
        >>> import mha_c, torch
        >>> layer = torch.nn.TransformerDecoderLayer(8, 2, 16)
        >>> mha_c.TransformerDecoder.from_torch(torch.nn.TransformerDecoder(layer, 3)).num_layers
        3
        """
        check_torch_module(module, cls._kind, "Its layers may be copied one by one")
        return cls._copied(module, {"num_layers": module.num_layers, "padded": None}, matmul_precision)
