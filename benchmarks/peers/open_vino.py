# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: the plain ONNX model converted, or its own ScaledDotProductAttention, with fixed or with any lengths.

The plugin for CPUs runs ScaledDotProductAttention as one operation only where lengths are not fixed, and fuses the
plain operators in its own way, so that each of the three can be the fastest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino.opset13 as ov

import onnx_layer
from peers import Prepared, Unsupported
from problem import Array, Problem


class OpenVino:
    def __init__(self, threads: int, kind: str) -> None:
        self.kind = kind
        self.version = f"OpenVINO {openvino.__version__.split('-')[0]}"
        self.core = openvino.Core()
        self.settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 where the CPU has it
        }

    def prepare(self, problem: Problem) -> Prepared:
        if problem.case.dtype != "float32":
            raise Unsupported("the plugin for CPUs computes in float32")
        if self.kind == "plain":
            layer = onnx_layer.build(problem, "plain")
            model, feeds = self.core.read_model(layer.model().SerializeToString()), layer.feeds
        else:
            model, feeds = sdpa_model(problem, dynamic=self.kind == "dynamic")
        request = self.core.compile_model(model, "CPU", self.settings).create_infer_request()
        tensors = {name: openvino.Tensor(array, shared_memory=True) for name, array in feeds.items()}
        for name, shared in tensors.items():
            request.set_tensor(name, shared)

        def result(_: Any, keep_alive: Any = (tensors, feeds)) -> tuple[Any, Any]:
            wanted = request.get_output_tensor(1).data if problem.case.need_weights else None
            return request.get_output_tensor(0).data, wanted

        def call() -> None:  # infer() would first look for new inputs
            request.start_async()
            request.wait()

        return Prepared(call, result)


def sdpa_model(problem: Problem, *, dynamic: bool) -> tuple[openvino.Model, dict[str, Array]]:
    case = problem.case
    if case.need_weights:
        raise Unsupported("the operator does not return attention weights")
    if case.kv_heads:
        raise Unsupported("the operator has no grouped heads")
    feeds = dict(zip(problem.input_names, (problem.query, problem.key, problem.value), strict=True))
    mask = attended(problem)
    if mask is not None:
        feeds["mask"] = mask
    inputs = {name: parameter(name, array, dynamic=dynamic) for name, array in feeds.items()}

    def project(x: Any, weight: Array, bias: Array) -> Any:
        return ov.add(ov.matmul(x, ov.constant(weight), False, True), ov.constant(bias))

    def split(x: Any) -> Any:
        return ov.transpose(ov.reshape(x, ov.constant([0, 0, case.H, case.head_dim]), True), ov.constant([0, 2, 1, 3]))

    weights = (problem.q_weight, problem.k_weight, problem.v_weight)
    each = zip(problem.input_names, weights, problem.biases(), strict=True)
    q, k, v = (split(project(inputs[name], weight, bias)) for name, weight, bias in each)
    masks = [inputs["mask"]] if mask is not None else []
    context = ov.scaled_dot_product_attention(q, k, v, *masks, causal=case.causal)
    context = ov.reshape(ov.transpose(context, ov.constant([0, 2, 1, 3])), ov.constant([0, 0, case.E]), True)
    output = project(context, problem.out_weight, problem.out_bias)
    return openvino.Model([output], list(inputs.values()), "layer"), feeds


def parameter(name: str, array: Array, *, dynamic: bool) -> Any:
    """An input of the model; every size but the features of query, key and value may be left open."""
    features = 1 if array.ndim == 3 else 0
    kept = array.ndim - features
    sizes = [-1] * kept + list(array.shape[kept:]) if dynamic else list(array.shape)
    node = ov.parameter(sizes, array.dtype, name)
    node.output(0).set_names({name})
    return node


def attended(problem: Problem) -> Array | None:
    """The mask in the operator's convention: floats to add, or True = attend."""
    if problem.padding is not None:
        return np.ascontiguousarray(~problem.padding[:, None, None])
    if problem.case.attn_mask == "bool":
        assert problem.attn_mask is not None
        case = problem.case
        return np.ascontiguousarray(~problem.attn_mask.reshape(case.N, case.H, case.L, case.keys))
    return problem.bias_4d()
