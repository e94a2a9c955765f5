# SPDX-License-Identifier: Apache-2.0
"""The encoder: torch's TransformerEncoderLayer, and a stack of such layers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import NoneType
from typing import Any

import numpy as np

from mha_c._typing import Self
from mha_c.activations import Activation
from mha_c.advice.arguments import REFUSALS
from mha_c.advice.keywords import knows_foreign_keywords
from mha_c.advice.transformers import AttentionCall, advise_on_steps
from mha_c.container import Child, Container, ModuleList
from mha_c.dropout import Dropout
from mha_c.layer import MaskedRows, MultiheadAttention, facts_of
from mha_c.module import Module, Option, check_torch_module
from mha_c.norms import LayerNorm, RMSNorm
from mha_c.parameters.arrays import AnyArray, Array, as_array
from mha_c.parameters.checks import flag, integer
from mha_c.parameters.dtypes import trained_dtype
from mha_c.parameters.encoders import infer_encoder, infer_encoder_layer
from mha_c.parameters.files import open_state_dict
from mha_c.parameters.quantization import MatmulPrecision
from mha_c.transformer.layer import (
    Padded,
    TransformerLayer,
    check_padded,
    copies_of,
    is_padding,
    zero_padded_rows,
)

__all__ = ["TransformerEncoder", "TransformerEncoderLayer", "attention_call"]


class TransformerEncoderLayer(TransformerLayer):
    """A layer of an encoder, as ``torch.nn.TransformerEncoderLayer`` computes it.

    Self-attention and a feed-forward network are each added to their input, and the sum is normalized ("Attention Is
    All You Need", Vaswani et al., 2017, section 3.1)::

        x = norm1(x + self_attn(x, x, x))
        x = norm2(x + linear2(activation(linear1(x))))

    With `norm_first` ("On Layer Normalization in the Transformer Architecture", Xiong et al., 2020)::

        y = norm1(x)
        x = x + self_attn(y, y, y)
        x = x + linear2(activation(linear1(norm2(x))))

    Parameters
    ----------
    d_model : int
        Features of the input and the output.
    nhead : int
        Number of heads. A divisor of `d_model` unless `head_dim` is given.
    dim_feedforward : int, default 2048
        Features between the two maps of the feed-forward network.
    dropout : float, default 0.1
        Probability of dropping an attention weight, an activation, or a number that is added to an input, in training
        mode only. A new layer is in training mode.
    activation : str or callable, default "relu"
        "relu", "gelu", "gelu_tanh", "silu" or "quick_gelu"; the gated "swiglu" or "geglu", with which linear1 has
        2 * `dim_feedforward` outputs, the gates first; torch's functions and modules for these; or any other callable,
        which takes an array and returns one.
    layer_norm_eps : float, default 1e-05
        The `eps` of the norms.
    batch_first : bool, default False
        Whether inputs are (N, S, E) rather than (S, N, E).
    norm_first : bool, default False
        Whether norms come before attention and feed-forward, or after them.
    bias : bool, default True
        Whether maps and norms have biases.
    device : optional
        None or "cpu".
    dtype : optional
        float32 (the default), float64, bfloat16 or float16, as a name, a NumPy or a torch dtype.
    seed : int, optional
        Seed of the parameters: they are those of torch's layer after ``torch.manual_seed(seed)``, bit for bit. Those
        of bfloat16 and float16 are float32's, rounded, from which torch's differ in about one number of a thousand.
        None: a random seed.
    dropout_seed : int, optional
        Seed of what is dropped, which differs for each place in the layer, and in each copy of the layer. None: a
        random seed.
    norm : {"layer", "rms"}, default "layer"
        The norms: LayerNorm or RMSNorm.
    padded : {"zero", "computed"}, optional
        What to write into the output rows of padded tokens: those that `src_key_padding_mask` marks with True or -inf.
        "zero": zeros. "computed": what the layer computes for them. None: "computed".
    masked_rows, num_kv_heads, head_dim, v_head_dim
        As for `MultiheadAttention`.
    matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
        As for `MultiheadAttention`. A mapping chooses for "in_proj", "attention", "out_proj", "linear1" and "linear2",
        or with "default" for those that it does not name.

    Attributes
    ----------
    self_attn : MultiheadAttention
        The attention.
    linear1, linear2 : Linear
        The feed-forward network.
    norm1, norm2 : LayerNorm or RMSNorm
        The norms.
    dropout, dropout1, dropout2 : Dropout
        The dropout of activations, of the attention's output and of the feed-forward network's output.
    norm_first, activation, padded, matmul_precision
        The options. They may be changed; a change takes effect at the next call.
    training : bool
        The mode, which `train` and `eval` also set in the layers in this one. Calls use theirs.

    Raises
    ------
    ValueError
        If a width is not positive, `dropout` is not between 0 and 1, `norm`, `padded` or
        `matmul_precision` is unknown, or `matmul_precision` is given in a layer of float64.
    AssertionError
        If `d_model` is not divisible by `nhead` and `head_dim` is not given.
    RuntimeError, TypeError
        If the name of an activation is unknown, an argument has a wrong type, or `dtype` or `device` is not supported.
    ImportError
        If `dtype` is bfloat16, and ml_dtypes is not installed.
    MemoryError
        If the parameters do not fit into memory.

    Notes
    -----
    The layers in this one may be assigned. Parameters are replaced as in `MultiheadAttention`: each layer in this one
    uses one set of parameters throughout a call.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> layer = mha_c.TransformerEncoderLayer(8, 2, 16, batch_first=True, seed=0).eval()
    >>> layer(np.zeros((3, 5, 8), np.float32)).shape
    (3, 5, 8)
    >>> layer
    TransformerEncoderLayer(
      (self_attn): MultiheadAttention(embed_dim=8, num_heads=2, dropout=0.1, batch_first=True, dtype=float32, \
training=False)
      (linear1): Linear(in_features=8, out_features=16, bias=True)
      (dropout): Dropout(p=0.1, inplace=False)
      (linear2): Linear(in_features=16, out_features=8, bias=True)
      (norm1): LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)
      (norm2): LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)
      (dropout1): Dropout(p=0.1, inplace=False)
      (dropout2): Dropout(p=0.1, inplace=False)
    )
    """

    self_attn = Child[MultiheadAttention]("self_attn", "The attention.")
    norm1 = Child[LayerNorm | RMSNorm]("norm1", "The norm of the attention.")
    norm2 = Child[LayerNorm | RMSNorm]("norm2", "The norm of the feed-forward network.")
    dropout1 = Child[Dropout]("dropout1", "The dropout of the attention's output.")
    dropout2 = Child[Dropout]("dropout2", "The dropout of the feed-forward network's output.")

    _kind = "TransformerEncoderLayer"
    _child_names = ("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")

    @knows_foreign_keywords
    def forward(
        self,
        src: AnyArray,
        src_mask: AnyArray | None = None,
        src_key_padding_mask: AnyArray | None = None,
        is_causal: bool = False,
    ) -> Array:
        """Compute the output of the layer; calling the layer does the same.

        Inputs are arrays of the layer's dtype, as for `MultiheadAttention`. They are not modified. N is the batch size
        and S the length.

        Parameters
        ----------
        src : array, (S, N, d_model)
            (N, S, d_model) with `batch_first`; (S, d_model) without a batch.
        src_mask : array, (S, S) or (N * nhead, S, S) or (nhead, S, S), optional
            Booleans: True hides this key from this query. Floats: added to the scores.
        src_key_padding_mask : array, (N, S) or (S,), optional
            Booleans: True hides this key. Floats: added to the scores of this key.
        is_causal : bool, default False
            Whether position i sees only the positions 0..i, in addition to the masks.

        Returns
        -------
        numpy.ndarray
            Of the shape and dtype of `src`.

        Raises
        ------
        AssertionError, RuntimeError, TypeError, ValueError
            If ranks, shapes or dtypes do not fit, as in torch. The message has torch's words and says what to write
            instead.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> layer = mha_c.TransformerEncoderLayer(4, 2, 8, padded="zero", seed=0).eval()
        >>> layer(np.ones((3, 4), np.float32), src_key_padding_mask=np.array([False, False, True]))[2]
        array([0., 0., 0., 0.], dtype=float32)
        """
        try:
            return self._compute(src, src_mask, src_key_padding_mask, is_causal, self._padded == "zero")
        except REFUSALS as error:
            call = (src, src_mask, src_key_padding_mask, is_causal, [self])
            advise_on_steps(error, attention_call(*call, mask_name="src_mask"))
            raise

    __call__ = forward

    def _compute(
        self, src: Any, src_mask: Any, src_key_padding_mask: Any, is_causal: Any, zeroes_padding: bool
    ) -> Array:
        output: Array = self._run(
            src,
            attention=self.self_attn,
            norms=(self.norm1, self.norm2),
            dropouts=(self.dropout1, self.dropout2),
            zeroes_padding=zeroes_padding and src_key_padding_mask is not None,
            attn_mask=src_mask,
            key_padding_mask=src_key_padding_mask,
            is_causal=is_causal,
        )
        return output

    @classmethod
    @knows_foreign_keywords
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any] | str | os.PathLike[str],
        prefix: str = "",
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        num_heads: int | None = None,
        activation: Activation | None = None,
        layer_norm_eps: float | None = None,
        norm_first: bool | None = None,
        strict: bool = True,
        dropout: float = 0.0,
        batch_first: bool | None = None,
        dtype: Any = None,
        dropout_seed: int | None = None,
        masked_rows: MaskedRows = "torch",
        padded: Padded | None = None,
        matmul_precision: MatmulPrecision | None = None,
    ) -> Self:
        """Make a layer from trained parameters: those of one layer of an encoder in a state dict or a file.

        Parameters
        ----------
        state_dict : mapping of str to array or tensor, or str or path-like
            As for `TransformerEncoder.from_state_dict`. Only the layer is read.
        prefix : str, default ""
            The beginning of the layer's names, including the dot, such as ``"encoder.layer.0."``. More may precede it.
        config, num_heads, activation, layer_norm_eps, norm_first, strict, dropout, batch_first, dtype
            As for `TransformerEncoder.from_state_dict`.
        dropout_seed, masked_rows
            As for `TransformerEncoder.from_state_dict`.
        padded : {"zero", "computed"}, optional
            As for the constructor.
        matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
            As for the constructor.

        Returns
        -------
        TransformerEncoderLayer
            In training mode like any new layer.

        Raises
        ------
        RuntimeError, NotImplementedError, ValueError, TypeError, ImportError, OSError
            As from `TransformerEncoder.from_state_dict`.

        Examples
        --------
        >>> import mha_c
        >>> trained = mha_c.TransformerEncoderLayer(8, 2, 16).state_dict(prefix="layers.0.")
        >>> mha_c.TransformerEncoderLayer.from_state_dict(
        ...     trained, "layers.0.", num_heads=2, activation="relu", layer_norm_eps=1e-5, norm_first=False).linear1
        Linear(in_features=8, out_features=16, bias=True)
        """
        with open_state_dict(state_dict) as tensors:
            options, arrays = infer_encoder_layer(
                cls.__name__, tensors, prefix, config, num_heads=num_heads, activation=activation,
                layer_norm_eps=layer_norm_eps, norm_first=norm_first, strict=strict,
                will_cast=dtype is not None,
            )  # fmt: skip
        if batch_first is not None:
            options["batch_first"] = batch_first
        layer = cls(
            **options, dropout=dropout, dtype=trained_dtype(arrays["linear1.weight"].dtype, dtype),
            dropout_seed=dropout_seed, padded=padded, masked_rows=masked_rows,
        )  # fmt: skip
        layer._take(arrays, precisions=layer._precisions(matmul_precision))
        return layer

    @classmethod
    @knows_foreign_keywords
    def from_torch(cls, module: Any, *, matmul_precision: MatmulPrecision | None = None) -> Self:
        """Make a layer from a layer of torch, with its arguments, parameters and training mode.

        Parameters
        ----------
        module : torch.nn.TransformerEncoderLayer
            The layer to copy. A subclass will do if it has torch's forward. Buffers are not copied.
        matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
            As for the constructor.

        Returns
        -------
        TransformerEncoderLayer

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
        >>> mha_c.TransformerEncoderLayer.from_torch(torch.nn.TransformerEncoderLayer(8, 2, 16)).linear1
        Linear(in_features=8, out_features=16, bias=True)
        """
        return cls._layer_from_torch(module, ("forward", "_sa_block", "_ff_block"), matmul_precision)


class TransformerEncoder(Container):
    """A stack of encoder layers, as ``torch.nn.TransformerEncoder`` computes it.

    Parameters
    ----------
    encoder_layer : TransformerEncoderLayer
        The layer, of which the stack holds deep copies. Their parameters are equal, and their dropout differs.
    num_layers : int
        How many copies.
    norm : Module, optional
        What normalizes the output of the last layer.
    enable_nested_tensor : bool, default True
        False: padded rows are computed, unless `padded` is given. torch has this argument for speed.
    mask_check : bool, default True
        Ignored. torch has it.
    padded : {"zero", "computed"}, optional
        What to write into the rows of padded tokens, after the last layer and before `norm`: those tokens that
        `src_key_padding_mask` marks with True or -inf. "zero": zeros. "computed": what the layers compute for them.
        None: what torch gives without gradients. See the notes.

    Attributes
    ----------
    layers : ModuleList of TransformerEncoderLayer
        The layers.
    num_layers : int
        How many there were at construction.
    norm : Module or None
        The norm of the output.
    enable_nested_tensor, mask_check, use_nested_tensor : bool
        As in torch.
    matmul_precision : str or mapping or None
        Of the layers, as for `TransformerEncoderLayer`. It may be assigned.
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

    Notes
    -----
    With ``padded=None``, padded rows are zeros exactly where torch leaves out padding: in evaluation mode, for a batch,
    without `mask`, and with a padding mask in which the tokens of every item come first. It needs
    `enable_nested_tensor` and layers with `batch_first`, `bias`, an even number of heads, relu or gelu, equal `eps` in
    both norms, and without `norm_first`. Otherwise padded rows are computed. Other rows do not depend on this.

    Examples
    --------
    >>> import mha_c, numpy as np
    >>> layer = mha_c.TransformerEncoderLayer(4, 2, 8, batch_first=True, seed=0)
    >>> encoder = mha_c.TransformerEncoder(layer, num_layers=2).eval()
    >>> padding = np.array([[False, False, True]])
    >>> encoder(np.ones((1, 3, 4), np.float32), src_key_padding_mask=padding)[0, 2]
    array([0., 0., 0., 0.], dtype=float32)
    """

    layers = Child[ModuleList[TransformerEncoderLayer]]("layers", "The layers.")
    norm = Child[Any]("norm", "The norm of the output, or None.")
    padded = Option("padded", check_padded, "What padded rows hold.")
    enable_nested_tensor = Option("enable_nested_tensor", flag, "torch's argument. Calls use `use_nested_tensor`.")
    use_nested_tensor = Option("use_nested_tensor", flag, "Whether padded rows may be zeros if `padded` is None.")
    mask_check = Option("mask_check", flag, "torch's argument. Calls do not use it.")
    num_layers = Option("num_layers", integer, "How many layers there were at construction. Calls use `layers`.")

    _kind = "TransformerEncoder"
    _child_names = ("layers", "norm")
    _option_kinds = {
        "num_layers": int,
        "enable_nested_tensor": bool,
        "use_nested_tensor": bool,
        "mask_check": bool,
        "padded": (str, NoneType),
    }

    _padded: Padded | None

    @knows_foreign_keywords
    def __init__(
        self,
        encoder_layer: TransformerEncoderLayer,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        padded: Padded | None = None,
    ) -> None:
        layers = copies_of(encoder_layer, TransformerEncoderLayer, "encoder_layer", num_layers)
        options = {
            "num_layers": num_layers,
            "enable_nested_tensor": enable_nested_tensor,
            "use_nested_tensor": enable_nested_tensor and _torch_leaves_out_padding(encoder_layer),
            "mask_check": mask_check,
            "padded": padded,
        }
        self._set_up({"layers": layers, "norm": norm}, options)

    @knows_foreign_keywords
    def forward(
        self,
        src: AnyArray,
        mask: AnyArray | None = None,
        src_key_padding_mask: AnyArray | None = None,
        is_causal: bool | None = None,
    ) -> Array:
        """Compute the output of all layers, one after the other; calling the encoder does the same.

        Parameters
        ----------
        src : array, (S, N, d_model)
            (N, S, d_model) with `batch_first`; (S, d_model) without a batch. It is not modified.
        mask : array, (S, S) or (N * nhead, S, S) or (nhead, S, S), optional
            Booleans: True hides this key from this query. Floats: added to the scores.
        src_key_padding_mask : array, (N, S) or (S,), optional
            Booleans: True hides this key. Floats: added to the scores of this key.
        is_causal : bool, optional
            Whether position i sees only the positions 0..i, in addition to the masks.

        Returns
        -------
        numpy.ndarray
            Of the shape and dtype of `src`.

        Raises
        ------
        AssertionError, RuntimeError, TypeError, ValueError
            If ranks, shapes or dtypes do not fit, as in torch. The message has torch's words and says what to write
            instead.

        Examples
        --------
        >>> import mha_c, numpy as np
        >>> layer = mha_c.TransformerEncoderLayer(4, 2, 8, seed=0)
        >>> mha_c.TransformerEncoder(layer, 2).eval()(np.zeros((5, 3, 4), np.float32), is_causal=True).shape
        (5, 3, 4)
        """
        output: Any = src
        masks = (mask, src_key_padding_mask, False if is_causal is None else is_causal)
        try:
            zeroes = src_key_padding_mask is not None and self._gives_zeros(src, mask, src_key_padding_mask)
            for layer in self.layers:
                if type(layer) is TransformerEncoderLayer:
                    output = layer._compute(output, *masks, zeroes or layer.padded == "zero")
                else:
                    output = layer(output, *masks)
        except REFUSALS as error:
            call = (src, mask, src_key_padding_mask, is_causal, self.layers)
            advise_on_steps(error, attention_call(*call, mask_name="mask"))
            raise
        if zeroes and src_key_padding_mask is not None and type(self.layers[-1]) is not TransformerEncoderLayer:
            output = zero_padded_rows(output, src_key_padding_mask, self.layers[0].self_attn.batch_first)
        return as_array(output) if self.norm is None else self.norm(output)

    __call__ = forward

    def _gives_zeros(self, src: Any, mask: Any, src_key_padding_mask: Any) -> bool:
        """Whether padded rows are zeros."""
        if not self.layers:
            return False
        if self._padded is not None:
            return self._padded == "zero"
        if not self.use_nested_tensor or self.layers[0].training or mask is not None or as_array(src).ndim != 3:
            return False
        rows = is_padding(src_key_padding_mask)
        if rows.ndim != 2:
            return False  # the layers refuse it
        return not (rows[:, :-1] & ~rows[:, 1:]).any()  # no token after padding

    @classmethod
    @knows_foreign_keywords
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any] | str | os.PathLike[str],
        prefix: str = "",
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        num_heads: int | None = None,
        activation: Activation | None = None,
        layer_norm_eps: float | None = None,
        norm_first: bool | None = None,
        strict: bool = True,
        dropout: float = 0.0,
        batch_first: bool | None = None,
        dtype: Any = None,
        dropout_seed: int | None = None,
        masked_rows: MaskedRows = "torch",
        padded: Padded | None = None,
        matmul_precision: MatmulPrecision | None = None,
    ) -> Self:
        """Make an encoder from trained parameters: the layers, and the norm of their output if the model has it.

        The state dict and `config` determine the arguments that are not given here. Models are those
        of torch, timm, torchvision, and Hugging Face's BERT, RoBERTa, ELECTRA, DistilBERT, ViT, DeiT, DINOv2, CLIP,
        SigLIP, BART, mBART and Whisper.

        Parameters
        ----------
        state_dict : mapping of str to array or tensor, or str or path-like
            The parameters of the encoder or of a whole model, or a file of them, as for
            `MultiheadAttention.from_state_dict`. Only the encoder is read, and nothing in a file is executed.
        prefix : str, default ""
            The beginning of the encoder's names, including the dot, such as ``"vision_model."``. It is needed if
            there are several encoders. More may precede it.
        config : mapping of str to object, or str or path-like, optional
            The configuration of a Hugging Face model, or its ``config.json``. It is needed for the names of these
            models, and gives the four arguments that follow.
        num_heads : int, optional
            Number of heads.
        activation : str or callable, optional
            As for the constructor of the layers.
        layer_norm_eps : float, optional
            The `eps` of the norms.
        norm_first : bool, optional
            Whether norms come before attention and feed-forward. Only torch's names leave it open.
        strict : bool, default True
            Whether unknown arrays in a layer, or a missing bias that other layers have, are an error. If False, missing
            biases are zeros.
        dropout : float, default 0.0
            As for the constructor of the layers. A state dict does not record it.
        batch_first : bool, optional
            Whether inputs are (N, S, E). None: as in the model; False, torch's default, for torch's names.
        dtype : optional
            float32, float64, bfloat16 or float16, to which the parameters are cast. None: the dtype of the weight of
            `linear1`, or float32 if a layer cannot have it.
        dropout_seed, masked_rows
            As for the constructor of the layers.
        padded : {"zero", "computed"}, optional
            As for the constructor.
        matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
            As for the constructor of the layers.

        Returns
        -------
        TransformerEncoder
            In training mode like any new layer.

        Raises
        ------
        RuntimeError
            If names or shapes do not fit. The message has torch's words.
        NotImplementedError
            If the model is not known, or computes something that an encoder does not. The message names it.
        ValueError
            If no layer with `num_heads` heads has such shapes; if arguments, `config` and names contradict each other;
            if `matmul_precision` is unknown, or given for a layer of float64; or if a file is damaged.
        TypeError
            If `state_dict` is neither a mapping nor a path, or if a required argument is missing.
        ImportError
            If there are bfloat16 or float8 numbers to read, and ml_dtypes is not installed. It is not needed to cast
            bfloat16 to another `dtype`.
        OSError
            If a file cannot be opened.

        Notes
        -----
        The output is what the model calls its last hidden state. Embeddings, poolers, heads and masks are not part of
        an encoder. CLIP's text encoder is causal: call it with ``is_causal=True``. The layer scale of DINOv2 and timm
        becomes part of the maps before it, which is the same up to rounding.

        Examples
        --------
        >>> import mha_c
        >>> model = mha_c.TransformerEncoder(mha_c.TransformerEncoderLayer(8, 2, 16, activation="gelu"), 3)
        >>> encoder = mha_c.TransformerEncoder.from_state_dict(
        ...     model.state_dict(prefix="encoder."), "encoder.", num_heads=2, activation="gelu", layer_norm_eps=1e-5,
        ...     norm_first=False)
        >>> encoder.num_layers, encoder.layers[0].activation
        (3, 'gelu')
        """
        with open_state_dict(state_dict) as tensors:
            options, num_layers, has_norm, arrays = infer_encoder(
                cls.__name__, tensors, prefix, config, num_heads=num_heads, activation=activation,
                layer_norm_eps=layer_norm_eps, norm_first=norm_first, strict=strict,
                will_cast=dtype is not None,
            )  # fmt: skip
        if batch_first is not None:
            options["batch_first"] = batch_first
        real = trained_dtype(arrays["layers.0.linear1.weight"].dtype, dtype)
        layer = TransformerEncoderLayer(
            **options, dropout=dropout, dtype=real, dropout_seed=dropout_seed, masked_rows=masked_rows
        )  # fmt: skip
        norm = None
        if has_norm:
            norm = LayerNorm(options["d_model"], options["layer_norm_eps"], bias="norm.bias" in arrays, dtype=real)
        encoder = cls(layer, num_layers, norm, padded=padded)
        encoder._take(arrays, precisions=encoder._precisions(matmul_precision))
        return encoder

    @classmethod
    @knows_foreign_keywords
    def from_torch(cls, module: Any, *, matmul_precision: MatmulPrecision | None = None) -> Self:
        """Make an encoder from an encoder of torch, with its arguments, parameters and training mode.

        Parameters
        ----------
        module : torch.nn.TransformerEncoder
            The encoder to copy. A subclass will do if it has torch's forward. Buffers are not copied.
        matmul_precision : {"float32", "bfloat16", "int8"} or mapping of str to str or None, optional
            As for `TransformerEncoderLayer`.

        Returns
        -------
        TransformerEncoder

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
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mha_c.TransformerEncoder.from_torch(torch.nn.TransformerEncoder(layer, 3)).num_layers
        3
        """
        check_torch_module(module, cls._kind, "Its layers may be copied one by one")
        options = {name: getattr(module, name) for name in cls._option_kinds if name != "padded"}
        return cls._copied(module, {**options, "padded": None}, matmul_precision)


def attention_call(
    src: Any, mask: Any, padding: Any, is_causal: Any, layers: Any, *, mask_name: str, flag_name: str = "is_causal"
) -> AttentionCall:
    """The attention of the first of some layers, for advice."""
    return AttentionCall(
        "src", src, "src", src, mask_name, mask, "src_key_padding_mask", padding, flag_name, is_causal,
        lambda: facts_of(layers[0].self_attn, layers[0]),
    )  # fmt: skip


def _torch_leaves_out_padding(layer: Any) -> bool:
    """Whether torch, without gradients, would compute a stack of such layers without the padding."""
    return (
        isinstance(layer, TransformerEncoderLayer)
        and not layer.norm_first
        and layer.self_attn.batch_first
        and layer.self_attn.in_proj_bias is not None
        and layer.activation in ("relu", "gelu", "gelu_tanh")
        and layer.norm1.eps == layer.norm2.eps
        and layer.self_attn.num_heads % 2 == 0
    )
