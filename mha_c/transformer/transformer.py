# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder in one: torch's Transformer."""

from __future__ import annotations

from typing import Any

import numpy as np

from mha_c._typing import Self
from mha_c.activations import Activation
from mha_c.advice.arguments import REFUSALS
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.advice.transformers import advise_on_steps, check_transformer_call
from mha_c.container import Child, Container, ModuleList
from mha_c.dropout import seeds_for
from mha_c.layer import MaskedRows
from mha_c.module import Module, Option, check_device, check_torch_module
from mha_c.parameters.arrays import AnyArray, Array
from mha_c.parameters.checks import flag, integer, size
from mha_c.parameters.dtypes import float_dtype
from mha_c.parameters.initialization import Draws, reset_matrices
from mha_c.parameters.quantization import PRODUCTS, MatmulPrecision, precision_of_products
from mha_c.transformer.layer import Norm, Padded, make_norm
from mha_c.transformer.decoder import TransformerDecoder, TransformerDecoderLayer
from mha_c.transformer.encoder import TransformerEncoder, TransformerEncoderLayer, attention_call

__all__ = ["Transformer"]


class Transformer(Container):
    """An encoder and a decoder, as ``torch.nn.Transformer`` computes them.

    The encoder reads the source, and the decoder reads the target and the output of the encoder ("Attention Is All You
    Need", Vaswani et al., 2017)::

        memory = encoder(src)
        output = decoder(tgt, memory)

    Embeddings and the map to a vocabulary are not part of it.

    Parameters
    ----------
    d_model : int, default 512
        Features of the inputs and the output.
    nhead : int, default 8
        Number of heads. A divisor of `d_model` unless `head_dim` is given.
    num_encoder_layers : int, default 6
        Layers of the encoder.
    num_decoder_layers : int, default 6
        Layers of the decoder.
    dim_feedforward, dropout, activation
        As for `TransformerEncoderLayer`.
    custom_encoder : Module, optional
        The encoder; a `TransformerEncoder` with a norm at its end unless given. Its matrices are drawn anew, as in
        torch.
    custom_decoder : Module, optional
        The decoder, likewise.
    layer_norm_eps, batch_first, norm_first, bias, device, dtype
        As for `TransformerEncoderLayer`.
    seed : int, optional
        Seed of the parameters: they are those of torch's class after ``torch.manual_seed(seed)``, bit for bit. Those
        of bfloat16 and float16 are float32's, rounded, from which torch's differ in about one number of a thousand.
        None: a random seed.
    dropout_seed, norm
        As for `TransformerEncoderLayer`.
    padded : {"zero", "computed"}, optional
        As for `TransformerEncoder` and `TransformerDecoder`.
    masked_rows, num_kv_heads, head_dim, v_head_dim
        As for `MultiheadAttention`.
    matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
        As for `TransformerEncoderLayer` and `TransformerDecoderLayer`.

    Attributes
    ----------
    encoder : TransformerEncoder
        The encoder.
    decoder : TransformerDecoder
        The decoder.
    d_model, nhead : int
        As for the constructor.
    batch_first : bool
        As for the constructor. The layers have their own.
    matmul_precision : str or mapping or None
        Of the layers. It may be assigned.
    training : bool
        The mode.

    Raises
    ------
    ValueError, AssertionError, RuntimeError, TypeError, MemoryError
        As `TransformerEncoderLayer`.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> model = mha_c.Transformer(8, 2, 1, 1, dim_feedforward=16, batch_first=True, seed=0).eval()
    >>> src, tgt = np.zeros((3, 7, 8), np.float32), np.zeros((3, 5, 8), np.float32)
    >>> model(src, tgt, tgt_is_causal=True).shape
    (3, 5, 8)
    """

    encoder = Child[TransformerEncoder]("encoder", "The encoder.")
    decoder = Child[TransformerDecoder]("decoder", "The decoder.")
    d_model = Option("d_model", integer, "Features of the inputs and the output, which calls check.")
    nhead = Option("nhead", integer, "Number of heads at construction. Calls use those of the layers.")
    batch_first = Option("batch_first", flag, "Whether inputs are (N, S, E) rather than (S, N, E).")

    _kind = "Transformer"
    _child_names = ("encoder", "decoder")
    _option_kinds = {"d_model": int, "nhead": int, "batch_first": bool}

    @knows_foreign_keywords
    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        custom_encoder: Module | None = None,
        custom_decoder: Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        seed: int | None = None,
        dropout_seed: int | None = None,
        norm: Norm = "layer",
        padded: Padded | None = None,
        masked_rows: MaskedRows = "torch",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        matmul_precision: MatmulPrecision | None = None,
    ) -> None:
        precision_of_products(matmul_precision, PRODUCTS)  # which is refused also if both parts are given
        draws: Any = Draws.of(seed)  # a seed that continues, for both
        of_encoder, of_decoder = seeds_for(dropout_seed, 2)
        arguments: Any = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
        options: Any = {
            "seed": draws,
            "norm": norm,
            "masked_rows": masked_rows,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
        }
        encoder, decoder = custom_encoder, custom_decoder
        made: list[Module] = []
        if encoder is None:
            encoder_layer = TransformerEncoderLayer(*arguments, dropout_seed=of_encoder, **options)
            last = make_norm(norm, d_model, layer_norm_eps, bias, device, dtype)
            encoder = TransformerEncoder(encoder_layer, num_encoder_layers, last, padded=padded)
            made.append(encoder)
        if decoder is None:
            decoder_layer = TransformerDecoderLayer(*arguments, dropout_seed=of_decoder, **options)
            last = make_norm(norm, d_model, layer_norm_eps, bias, device, dtype)
            decoder = TransformerDecoder(decoder_layer, num_decoder_layers, last, padded=padded)
            made.append(decoder)
        values = {"d_model": d_model, "nhead": nhead, "batch_first": batch_first}
        self._set_up({"encoder": encoder, "decoder": decoder}, values)
        self.load_state_dict(reset_matrices(dict(self.named_parameters()), draws), strict=False)
        if made:
            ModuleList(made).matmul_precision = matmul_precision  # at the end: weights are quantized once

    @knows_foreign_keywords
    def forward(
        self,
        src: AnyArray,
        tgt: AnyArray,
        src_mask: AnyArray | None = None,
        tgt_mask: AnyArray | None = None,
        memory_mask: AnyArray | None = None,
        src_key_padding_mask: AnyArray | None = None,
        tgt_key_padding_mask: AnyArray | None = None,
        memory_key_padding_mask: AnyArray | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Array:
        """Compute the output of the decoder for a source and a target; calling the layer does the same.

        Parameters
        ----------
        src : array, (S, N, d_model)
            The source; (N, S, d_model) with `batch_first`; (S, d_model) without a batch. It is not modified.
        tgt : array, (T, N, d_model)
            The target; or (N, T, d_model), or (T, d_model). It is not modified.
        src_mask : array, (S, S) or (N * nhead, S, S) or (nhead, S, S), optional
            Booleans: True hides this position of the source from this one. Floats: added to the scores.
        tgt_mask, memory_mask
            As for `TransformerDecoderLayer`.
        src_key_padding_mask : array, (N, S) or (S,), optional
            Booleans: True hides this position of the source. Floats: added to its scores. It is not used for the
            memory: pass `memory_key_padding_mask` too.
        tgt_key_padding_mask, memory_key_padding_mask
            As for `TransformerDecoderLayer`.
        src_is_causal : bool, optional
            Whether position i of the source sees only the positions 0..i, in addition to the masks.
        tgt_is_causal, memory_is_causal
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
        >>> model = mha_c.Transformer(4, 2, 1, 1, 8, seed=0).eval()
        >>> src, tgt = np.zeros((7, 4), np.float32), np.zeros((5, 4), np.float32)
        >>> model(src, tgt).shape
        (5, 4)
        """
        check_transformer_call(src, tgt, self.d_model, self.batch_first)
        try:
            memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
        except REFUSALS as error:
            call = (src, src_mask, src_key_padding_mask, src_is_causal, getattr(self.encoder, "layers", ()))
            advise_on_steps(error, attention_call(*call, mask_name="src_mask", flag_name="src_is_causal"))
            raise
        return self.decoder(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )

    __call__ = forward

    @staticmethod
    def generate_square_subsequent_mask(sz: int, device: Any = None, dtype: Any = None) -> Array:
        """Make the float mask that hides later positions: -inf above the diagonal, and 0 elsewhere.

        ``is_causal=True`` has the same effect without a mask.

        Parameters
        ----------
        sz : int
            The length.
        device : optional
            None or "cpu".
        dtype : optional
            float32 (the default), float64, bfloat16 or float16.

        Returns
        -------
        numpy.ndarray
            (sz, sz).

        Raises
        ------
        TypeError, RuntimeError
            If an argument has a wrong type, or `dtype` or `device` is not supported.
        ImportError
            If `dtype` is bfloat16, and ml_dtypes is not installed.

        Examples
        --------
        >>> import mha_c
        >>> mha_c.Transformer.generate_square_subsequent_mask(2)
        array([[  0., -inf],
               [  0.,   0.]], dtype=float32)
        """
        check_device(device)
        length = size("sz", sz)
        return np.triu(np.full((length, length), -np.inf, float_dtype(dtype)), 1)

    @classmethod
    @knows_foreign_keywords
    def from_torch(cls, module: Any, *, matmul_precision: MatmulPrecision | None = None) -> Self:
        """Make a layer from a layer of torch, with its arguments, parameters and training mode.

        Parameters
        ----------
        module : torch.nn.Transformer
            The layer to copy. A subclass will do if it has torch's forward. Buffers are not copied.
        matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
            As for the constructor.

        Returns
        -------
        Transformer

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
        >>> mha_c.Transformer.from_torch(torch.nn.Transformer(8, 2, 1, 1, 16)).nhead
        2
        """
        check_torch_module(module, cls._kind, "Its encoder and decoder may be copied by themselves")
        return cls._copied(module, {name: getattr(module, name) for name in cls._option_kinds}, matmul_precision)
