# SPDX-License-Identifier: Apache-2.0
"""The layer as an ONNX model, projections included, around one of four ways to say attention in ONNX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from peers import Unsupported
from problem import Array, Problem

CONTRIB = "com.microsoft"
OPSET = 23  # the first with an Attention of its own
IR_VERSION = 11


@dataclass
class OnnxLayer:
    """A model in the making, then the whole of it: `feeds` are its inputs, `outputs` the names of its results."""

    problem: Problem
    feeds: dict[str, Array] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def op(self, kind: str, *inputs: str, results: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Adds a node; the name of its result, or a list of names."""
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(results)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if results == 1 else names

    def constant(self, array: Array) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def input(self, name: str, array: Array) -> str:
        self.feeds[name] = np.ascontiguousarray(array)
        return name

    def shape(self, *sizes: int) -> str:
        return self.constant(np.array(sizes, dtype=np.int64))

    def model(self) -> onnx.ModelProto:
        def value(name: str, array: Array) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

        case = self.problem.case
        sizes = ((case.N, case.L, case.E), (case.N, case.L, case.keys))
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
        graph = helper.make_graph(
            self.nodes,
            "layer",
            [value(name, array) for name, array in self.feeds.items()],
            [helper.make_tensor_value_info(name, kind, size) for name, size in zip(self.outputs, sizes, strict=False)],
            self.constants,
        )
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)

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
