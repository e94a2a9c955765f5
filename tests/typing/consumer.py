# SPDX-License-Identifier: Apache-2.0
"""Code as a user of mha_c writes it, for type checkers alone: test_typing.py runs them, nobody runs this file.

Every `type: ignore` marks a mistake that a checker has to see: a strict checker complains about one that is not needed.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from typing_extensions import assert_type

import mha_c
from mha_c.functional import multi_head_attention_forward, scaled_dot_product_attention

Array = NDArray[Any]

x = np.zeros((5, 3, 8), np.float32)


class Encoder:
    def __init__(self, width: int) -> None:
        layer = mha_c.MultiheadAttention(width, 4, batch_first=True, dtype=np.float64, masked_rows="zero")
        self.attention = layer.eval()

    def __call__(self, x: Array) -> Array:
        return self.attention(x, x, x, need_weights=False, is_causal=True)[0]


def keys(source: mha_c.AnyArray, mask: mha_c.AnyArray | None = None) -> Array:
    return layer(source, source, source, mask)[1]


class Scaled(mha_c.MultiheadAttention):
    factor = 2.0


assert_type(Encoder(8).attention, mha_c.MultiheadAttention)
assert_type(Encoder(8)(x), Array)

layer = mha_c.MultiheadAttention(embed_dim=8, num_heads=4, kdim=6, num_kv_heads=2, seed=0)
assert_type(layer, mha_c.MultiheadAttention)
assert_type(layer(x, x, x), tuple[Array, Array])
assert_type(layer(x, torch.zeros(5, 3, 8), memoryview(b""), None, True), tuple[Array, Array])
assert_type(layer(x, x, x, None, False), tuple[Array, None])
assert_type(layer(x, x, x, need_weights=False, is_causal=True), tuple[Array, None])
assert_type(layer(x, x, x, need_weights=layer.training), tuple[Array, Array | None])
assert_type(layer.forward(x, x, x, None, attn_mask=np.ones((5, 5), bool), out=x), tuple[Array, Array])
output, weights = layer(x, x, x)
assert_type(weights.shape, tuple[Any, ...])
assert_type(layer.embed_dim, int)
assert_type(layer.num_kv_heads, int)
assert_type(layer.in_proj_weight, Array | None)
assert_type(layer.out_proj.weight, Array)
assert_type(layer.out_proj.bias, Array | None)
assert_type(layer.out_proj.in_features, int)
layer.matmul_precision = {"default": "int8", "out_proj": None}
layer.matmul_precision = {"default": "int8", "attention": "bfloat16"}
assert_type(mha_c.TransformerEncoderLayer(8, 2, matmul_precision={"linear1": "int8"}), mha_c.TransformerEncoderLayer)
mha_c.Linear(8, 2, matmul_precision="int8").save("linear.npz", packed=True)
assert_type(layer.training, bool)
assert_type(layer.dropout_seed, int)
assert_type(layer.state_dict(prefix="attention."), OrderedDict[str, Array])
assert_type(layer.load_state_dict(layer.state_dict()).missing_keys, list[str])
assert_type([array.nbytes for array in layer.parameters()], list[int])
assert_type(dict(layer.named_parameters()), dict[str, Array])
assert_type(layer.to(np.float64).train().eval(), mha_c.MultiheadAttention)
assert_type(layer.save(Path("layer.npz")), None)
layer.q_proj_weight = torch.zeros(8, 8)  # whatever as_array() reads
layer.out_proj.bias = np.zeros(8)
layer.dropout, layer.batch_first, layer.masked_rows = 0.1, True, "zero"

assert_type(Scaled.load("layer.npz"), Scaled)
assert_type(Scaled.from_state_dict("model.safetensors", "encoder.", num_heads=4), Scaled)
assert_type(Scaled.from_state_dict("model.pt", config="config.json", names=("qkv", "proj"), layout="per_head"), Scaled)
assert_type(Scaled.from_state_dict({"in_proj_weight": x}, num_heads=4).factor, float)
assert_type(Scaled.from_torch(torch.nn.MultiheadAttention(8, 4)).train(), Scaled)

assert_type(scaled_dot_product_attention(x, x, x, is_causal=True, scale=1.0, dropout_seed=0), Array)
assert_type(mha_c.functional.scaled_dot_product_attention(x, x, x, enable_gqa=True), Array)
assert_type(
    multi_head_attention_forward(x, x, x, 8, 4, x, x, None, None, False, 0.0, x, x, static_k=x, static_v=x),
    tuple[Array, Array],
)
assert_type(
    multi_head_attention_forward(x, x, x, 8, 4, x, x, None, None, False, 0.0, x, x, need_weights=False),
    tuple[Array, None],
)
assert_type(
    multi_head_attention_forward(x, x, x, 8, 4, x, x, None, None, False, 0.0, x, x, True, None, False),
    tuple[Array, None],
)
assert_type(
    multi_head_attention_forward(x, x, x, 8, 4, x, x, None, None, False, 0.0, x, x, need_weights=layer.training),
    tuple[Array, Array | None],
)

mha_c.set_num_threads(2)
assert_type(mha_c.get_num_threads(), int)
with mha_c.num_threads(1) as nothing:
    assert_type(nothing, None)
assert_type(mha_c.show_config(), None)
assert_type(mha_c.__version__, str)

explanation = mha_c.explain(layer, x, x, x, heads=[0, 2], stages=("weights", "output"))
assert_type(explanation.weights, Array)
assert_type(explanation.heads, tuple[int, ...])
assert_type([stage.array.nbytes for stage in explanation.stages.values()], list[int])
assert_type(mha_c.heads.heads_of(explanation), Array)
encoder_layer = mha_c.TransformerEncoderLayer(8, 2)
assert_type(mha_c.explain(encoder_layer, x, is_causal=True).activated, Array)
assert_type(mha_c.explain(mha_c.TransformerDecoderLayer(8, 2), x, memory=x).multihead_attn.weights, Array)
stack_explanation = mha_c.explain(mha_c.TransformerEncoder(encoder_layer, 2), x)
assert_type(stack_explanation[0].self_attn.heads, tuple[int, ...])
assert_type(mha_c.plot.residual_stream(stack_explanation, tokens=["a"]), Axes)
assert_type(mha_c.heads.entropy(explanation.weights, item=1), Array)
assert_type(mha_c.heads.distance(x), Array)
assert_type(mha_c.heads.to_bertviz(explanation, item=1), tuple[Any, ...])
assert_type(mha_c.plot.weights(explanation, 1, layer=2, tokens=["a", "b"], vmax=0.5), Axes)
assert_type(mha_c.plot.average(x, averaged=True, colorbar=False), Axes)
assert_type(mha_c.plot.heads(x), Array)
assert_type(mha_c.plot.entropy([x, x]), Axes)
assert_type(mha_c.plot.distance(x, ax=mha_c.plot.token(x, "a", layer="decoder.0")), Axes)
assert_type(mha_c.plot.masking(x, x), Array)

norm = mha_c.LayerNorm((2, 8), bias=False)
assert_type(norm(x), Array)
assert_type(norm.bias, Array | None)
assert_type(norm.normalized_shape, tuple[int, ...])
assert_type(mha_c.RMSNorm(8).eval(), mha_c.RMSNorm)
assert_type(mha_c.LayerNorm.from_torch(torch.nn.LayerNorm(8)), mha_c.LayerNorm)
assert_type(mha_c.functional.layer_norm(x, (8,)), Array)

report = mha_c.check.against_torch(layer, x, x, x, need_weights=False)
assert_type(report, mha_c.check.Report)
assert_type(report.agrees, bool)
assert_type([comparison.error.rms for comparison in report.comparisons], list[float])

model = torch.nn.TransformerEncoderLayer(8, 2)
assert_type(mha_c.torch.replace_attention(model), torch.nn.TransformerEncoderLayer)
assert_type(mha_c.torch.restore_attention(model), torch.nn.TransformerEncoderLayer)
assert_type(mha_c.torch.state_dict(layer), OrderedDict[str, torch.Tensor])
assert_type(mha_c.check.model(model, x), mha_c.check.Report)

mha_c.MultiheadAttention(8)  # type: ignore[call-arg]
mha_c.MultiheadAttention(8, 4, masked_rows="none")  # type: ignore[arg-type]
mha_c.MultiheadAttention(8, "4")  # type: ignore[arg-type]
mha_c.MultiheadAttention(64.0, 8)  # type: ignore[arg-type]
mha_c.MultiheadAttention(8, 4, dropout="0.1")  # type: ignore[arg-type]
mha_c.MultiheadAttention(8, 4, matmul_precision="int4")  # type: ignore[arg-type]
layer.matmul_precision = 8  # type: ignore[assignment]
mha_c.MultiheadAttention(8, 4, seed="a")  # type: ignore[arg-type]
mha_c.MultiheadAttention(d_model=8, nhead=4)  # type: ignore[call-arg]
mha_c.MultiHeadAttention(8, 4)  # type: ignore[attr-defined]
mha_c.LayerNorm("8")  # type: ignore[arg-type]
mha_c.RMSNorm(8, bias=True)  # type: ignore[call-arg]
layer(x, x, x, causal=True)  # type: ignore[call-overload]
layer(x, x, x, is_causal="yes")  # type: ignore[call-overload]
layer([[0.0] * 8], x, x)  # type: ignore[call-overload]
layer(x, x, x, need_weights=False)[1].shape  # type: ignore[attr-defined]
layer.training = "no"  # type: ignore[assignment]
layer.in_proj_weight.shape  # type: ignore[union-attr]
layer.embed_dim.shape  # type: ignore[attr-defined]
layer.save(1)  # type: ignore[arg-type]
mha_c.explain(layer)  # type: ignore[call-overload]
mha_c.explain(layer, x, x, x, heads="0,1")  # type: ignore[arg-type]
mha_c.explain(encoder_layer, x, attn_mask=x)  # type: ignore[call-overload]
mha_c.plot.residual_stream(x)  # type: ignore[arg-type]
mha_c.plot.weights(x, "0")  # type: ignore[arg-type]
mha_c.heads.entropy(x, 1)  # type: ignore[call-arg]
scaled_dot_product_attention(x, x)  # type: ignore[call-arg]
scaled_dot_product_attention(x, x, x, scale="1")  # type: ignore[arg-type]
mha_c.set_num_threads("2")  # type: ignore[arg-type]
