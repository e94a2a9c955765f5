# SPDX-License-Identifier: Apache-2.0
"""An encoder as an ONNX model of plain operators, in the form in which BERT is exported, which optimizers look for."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from encoder_problem import Array, EncoderProblem
from onnx_graph import Graph

OPSET = 20


def build(problem: EncoderProblem) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model and the arrays of its inputs: "x", and where there is padding, "attended", 1 = a token."""
    case, model = problem.case, problem.case.model
    graph = Graph()
    x = graph.input("x", problem.x)
    mask = None if problem.padding is None else _mask(graph, problem.padding, np.dtype(case.dtype))

    def number(value: float) -> str:
        return graph.constant(np.array(value, dtype=case.dtype))

    def linear(x: str, weight: Array, bias: Array) -> str:
        return str(graph.op("Add", graph.op("MatMul", x, graph.constant(weight.T)), graph.constant(bias)))

    def norm(x: str, name: str) -> str:
        parameters = [graph.constant(p[f"{name}.{kind}"]) for kind in ("weight", "bias")]
        return str(graph.op("LayerNormalization", x, *parameters, epsilon=model.eps))

    def split(x: str, order: list[int]) -> str:
        return str(graph.op("Transpose", graph.op("Reshape", x, graph.shape(0, 0, model.H, -1)), perm=order))

    def attend(x: str) -> str:
        pairs = zip(np.split(p["self_attn.in_proj_weight"], 3), np.split(p["self_attn.in_proj_bias"], 3), strict=True)
        q, k, v = (linear(x, weight, bias) for weight, bias in pairs)
        scores = graph.op("MatMul", split(q, [0, 2, 1, 3]), split(k, [0, 2, 3, 1]))
        scores = graph.op("Div", scores, number(math.sqrt(model.E // model.H)))
        weights = graph.op("Softmax", graph.op("Add", scores, mask) if mask else scores, axis=-1)
        context = graph.op("Transpose", graph.op("MatMul", weights, split(v, [0, 2, 1, 3])), perm=[0, 2, 1, 3])
        context = graph.op("Reshape", context, graph.shape(0, 0, model.E))
        return linear(context, p["self_attn.out_proj.weight"], p["self_attn.out_proj.bias"])

    def feed(x: str) -> str:
        y = linear(x, p["linear1.weight"], p["linear1.bias"])
        erf = graph.op("Erf", graph.op("Div", y, number(math.sqrt(2))))
        gelu = graph.op("Mul", graph.op("Mul", y, graph.op("Add", erf, number(1))), number(0.5))
        return linear(gelu, p["linear2.weight"], p["linear2.bias"])

    for layer in range(model.layers):
        p = problem.layer(layer)
        if model.norm_first:
            x = graph.op("Add", attend(norm(x, "norm1")), x)
            x = graph.op("Add", feed(norm(x, "norm2")), x)
        else:
            x = norm(graph.op("Add", attend(x), x), "norm1")
            x = norm(graph.op("Add", feed(x), x), "norm2")
    return graph.model({x: problem.x.shape}, case.dtype, OPSET), graph.feeds


def _mask(graph: Graph, padding: Array, dtype: Any) -> str:
    """What is added to the scores, (N, 1, 1, L): 0, or for padding the least of all numbers."""
    attended = graph.input("attended", (~padding).astype(np.int32))
    for axis in (1, 2):
        attended = graph.op("Unsqueeze", attended, graph.constant(np.array([axis], dtype=np.int64)))
    smallest = ml_dtypes.finfo(dtype).min  # type: ignore[no-untyped-call]
    one, least = (graph.constant(np.array(value, dtype=dtype)) for value in (1, smallest))
    hidden = graph.op("Sub", one, graph.op("Cast", attended, to=onnx.helper.np_dtype_to_tensor_dtype(dtype)))
    return str(graph.op("Mul", hidden, least))
