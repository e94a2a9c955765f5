# SPDX-License-Identifier: Apache-2.0
"""The layer as an ONNX model, projections included, around one of four ways to say attention in ONNX."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_graph import CONTRIB, Graph
from peers import Unsupported
from problem import Problem


class OnnxLayer(Graph):
    """A model in the making, then the whole of it: `feeds` are its inputs, `outputs` the names of its results."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.outputs: list[str] = []

    def whole(self) -> onnx.ModelProto:
        case = self.problem.case
        shapes = ((case.N, case.L, case.E), (case.N, case.L, case.keys))
        return self.model(dict(zip(self.outputs, shapes, strict=False)), case.dtype)

    # ---- What all four share

    def inputs(self) -> list[str]:
        problem = self.problem
        arrays = (problem.query, problem.key, problem.value)
        return [self.input(name, array) for name, array in zip(problem.input_names, arrays, strict=True)]

    def project_inputs(self, *, biased: bool) -> list[str]:
        problem = self.problem
        weights = (problem.q_weight, problem.k_weight, problem.v_weight)
        projected = [self.op("MatMul", x, self.constant(w.T)) for x, w in zip(self.inputs(), weights, strict=True)]
        if biased:
            pairs = zip(projected, problem.biases(), strict=True)
            projected = [self.op("Add", x, self.constant(b)) for x, b in pairs]
        return projected

    def project_output(self, context: str) -> None:
        projected = self.op("MatMul", context, self.constant(self.problem.out_weight.T))
        self.outputs.insert(0, self.op("Add", projected, self.constant(self.problem.out_bias)))

    def average_heads(self, weights: str) -> None:
        axes = self.constant(np.array([1], dtype=np.int64))
        self.outputs.append(self.op("ReduceMean", weights, axes, keepdims=0))

    def attended_keys(self) -> str:
        """key_padding_mask as Microsoft's operators want it: (N, S), 1 = attend."""
        padding = self.problem.padding
        return "" if padding is None else self.input("attended", (~padding).astype(np.int32))

    def score_bias(self) -> str:
        added = self.problem.bias_4d()
        return "" if added is None else self.input("score_bias", added)


def build(problem: Problem, kind: str) -> OnnxLayer:
    """The layer around com.microsoft's "MultiHeadAttention" or "Attention", "ai.onnx Attention", or "plain" MatMul
    and Softmax. Scale and mask conventions differ; what is computed does not."""
    layer = OnnxLayer(problem)
    builders = {
        "MultiHeadAttention": microsoft_multi_head_attention,
        "Attention": microsoft_attention,
        "ai.onnx Attention": onnx_attention,
        "plain": plain,
    }
    layer.project_output(builders[kind](layer))
    return layer


def microsoft_multi_head_attention(layer: OnnxLayer) -> str:
    case = layer.problem.case
    if case.kv_heads:
        raise Unsupported("the operator has no grouped heads")
    if case.dtype != "float32":
        raise Unsupported("the operator exists for float32 only")
    if case.need_weights:
        raise Unsupported("the operator returns scores, but not the attention weights")
    return str(
        layer.op(
            "MultiHeadAttention",
            *layer.project_inputs(biased=False),
            layer.constant(layer.problem.in_bias),
            layer.attended_keys(),
            layer.score_bias(),
            domain=CONTRIB,
            num_heads=case.H,
            unidirectional=int(case.causal),
        )
    )


def microsoft_attention(layer: OnnxLayer) -> str:
    problem, case = layer.problem, layer.problem.case
    if not case.is_self:
        raise Unsupported("the operator is for self-attention only")
    if case.kv_heads:
        raise Unsupported("the operator has no grouped heads")
    if case.dtype != "float32":
        raise Unsupported("the operator exists for float32 only")
    if case.need_weights:
        raise Unsupported("the operator does not return attention weights")
    return str(
        layer.op(
            "Attention",
            layer.inputs()[0],
            layer.constant(np.concatenate([problem.q_weight, problem.k_weight, problem.v_weight]).T),
            layer.constant(problem.in_bias),
            layer.attended_keys(),
            "",
            layer.score_bias(),
            domain=CONTRIB,
            num_heads=case.H,
            unidirectional=int(case.causal),
        )
    )


def onnx_attention(layer: OnnxLayer) -> str:
    problem, case = layer.problem, layer.problem.case
    if case.dtype != "float32":
        raise Unsupported("ONNX Runtime has the operator for float32 only")
    mask = layer.score_bias()
    if problem.padding is not None:
        attended = np.broadcast_to(~problem.padding[:, None, None], (case.N, 1, case.L, case.keys))
        mask = layer.input("attended", attended)
    results = layer.op(
        "Attention",
        *layer.project_inputs(biased=True),
        mask,
        results=4 if case.need_weights else 1,
        q_num_heads=case.H,
        kv_num_heads=case.kv_head_count,
        is_causal=int(case.causal),
        qk_matmul_output_mode=3,  # after the softmax
    )
    if not case.need_weights:
        return str(results)
    layer.average_heads(results[3])
    return str(results[0])


def plain(layer: OnnxLayer) -> str:
    """Queries of grouped heads are stacked, L of one head after L of the next, so that one product serves a group."""
    problem, case = layer.problem, layer.problem.case
    heads, D = case.kv_head_count, case.head_dim
    if case.kv_heads and (case.causal or case.attn_mask or case.need_weights or problem.padding is not None):
        raise Unsupported("grouped heads are built without masks and weights here")

    def split(x: str, length: int, count: int, order: list[int]) -> str:
        return str(layer.op("Transpose", layer.op("Reshape", x, layer.shape(case.N, length, count, D)), perm=order))

    q, k, v = layer.project_inputs(biased=True)
    q = split(q, case.L, case.H, [0, 2, 1, 3])
    if case.kv_heads:
        q = layer.op("Reshape", q, layer.shape(case.N, heads, case.H // heads * case.L, D))
    scores = layer.op("MatMul", q, split(k, case.keys, heads, [0, 2, 3, 1]))
    scores = layer.op("Mul", scores, layer.constant(np.array(D**-0.5, dtype=case.dtype)))
    bias = layer.score_bias()
    if problem.padding is not None:
        bias = layer.input("score_bias", np.where(problem.padding[:, None, None], -np.inf, 0).astype(case.dtype))
    if case.causal:
        hidden = np.arange(case.keys) > np.arange(case.L)[:, None]
        bias = layer.constant(np.where(hidden, -np.inf, 0).astype(case.dtype))
    weights = layer.op("Softmax", layer.op("Add", scores, bias) if bias else scores, axis=-1)
    if case.need_weights:
        layer.average_heads(weights)
    context = layer.op("MatMul", weights, split(v, case.keys, heads, [0, 2, 1, 3]))
    if case.kv_heads:
        context = layer.op("Reshape", context, layer.shape(case.N, case.H, case.L, D))
    context = layer.op("Transpose", context, perm=[0, 2, 1, 3])
    return str(layer.op("Reshape", context, layer.shape(case.N, case.L, case.E)))
