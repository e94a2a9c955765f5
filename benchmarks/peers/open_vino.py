# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: the plain ONNX model converted, or its own ScaledDotProductAttention, with fixed or with any lengths.

The plugin for CPUs runs ScaledDotProductAttention as one operation only where lengths are not fixed, and fuses the
plain operators in its own way, so that each of the three can be the fastest.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import openvino
import openvino.opset13 as ov

import encoder_problem
import onnx_encoder
import onnx_layer
from cases import Case
from encoder_cases import EncoderCase
from encoder_problem import EncoderProblem
from peers import Prepared, Unsupported
from problem import Array, Problem, make

CORE = openvino.Core()
VERSION = f"OpenVINO {openvino.__version__.split('-')[0]}"


class OpenVino:
    def __init__(self, threads: int, kind: str) -> None:
        self.kind = kind
        self.version = VERSION
        self.threads = threads

    def prepare(self, case: Case) -> Prepared:
        options = settings(case, self.threads)
        problem = make(dataclasses.replace(case, dtype="float32"))
        if self.kind == "plain":
            layer = onnx_layer.build(problem, "plain")
            model, feeds = CORE.read_model(layer.whole().SerializeToString()), layer.feeds
        else:
            model, feeds = sdpa_model(problem, dynamic=self.kind == "dynamic")
        return compiled(model, feeds, options)


class OpenVinoEncoder:
    def __init__(self, threads: int, kind: str) -> None:
        self.kind = kind
        self.version = VERSION
        self.threads = threads

    def prepare(self, case: EncoderCase) -> Prepared:
        options = settings(case, self.threads)
        problem = encoder_problem.make(dataclasses.replace(case, dtype="float32"))
        if self.kind == "plain":
            exported, feeds = onnx_encoder.build(problem)
            model = CORE.read_model(exported.SerializeToString())
        else:
            model, feeds = sdpa_encoder(problem, dynamic=self.kind == "dynamic")
        return compiled(model, feeds, options)


# A kind of numbers, as the plugin calls what a CPU can do, and as its precision hint. Without a hint, it takes bfloat16
# where the CPU has it.
PRECISIONS = {"float32": ("FP32", "f32"), "bfloat16": ("BF16", "bf16"), "float16": ("FP16", "f16")}


def settings(case: Case | EncoderCase, threads: int) -> dict[str, Any]:
    """How the model of a case is compiled. Its inputs, weights and outputs are float32."""
    kind = case.matmul_precision or case.dtype
    if kind == "int8":
        raise Unsupported("its int8 needs a model that was calibrated with data")
    capability, hint = PRECISIONS.get(kind, (kind, ""))
    if capability not in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unsupported(f"it does not compute in {kind} on this CPU")
    return {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}


def compiled(model: openvino.Model, feeds: dict[str, Array], options: dict[str, Any]) -> Prepared:
    """The model with its inputs and its outputs, which are a layer's output and its weights, if any."""
    request = CORE.compile_model(model, "CPU", options).create_infer_request()
    tensors = {name: openvino.Tensor(array, shared_memory=True) for name, array in feeds.items()}
    for name, shared in tensors.items():
        request.set_tensor(name, shared)

    def result(_: Any, keep_alive: Any = (tensors, feeds)) -> tuple[Any, Any]:
        output, *weights = (tensor.data for tensor in request.output_tensors)
        return output, weights[0] if weights else None

    def call() -> None:  # infer() would first look for new inputs
        request.start_async()
        request.wait()

    return Prepared(call, result)


def linear(x: Any, weight: Array, bias: Array) -> Any:
    return ov.add(ov.matmul(x, ov.constant(weight), False, True), ov.constant(bias))


def split(x: Any, heads: int, head_dim: int) -> Any:
    """(N, length, features) -> (N, heads, length, head_dim)"""
    return ov.transpose(ov.reshape(x, ov.constant([0, 0, heads, head_dim]), True), ov.constant([0, 2, 1, 3]))


def join(context: Any, features: int) -> Any:
    """(N, heads, length, head_dim) -> (N, length, features)"""
    return ov.reshape(ov.transpose(context, ov.constant([0, 2, 1, 3])), ov.constant([0, 0, features]), True)


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

    weights = (problem.q_weight, problem.k_weight, problem.v_weight)
    each = zip(problem.input_names, weights, problem.biases(), strict=True)
    q, k, v = (split(linear(inputs[name], weight, bias), case.H, case.head_dim) for name, weight, bias in each)
    masks = [inputs["mask"]] if mask is not None else []
    context = ov.scaled_dot_product_attention(q, k, v, *masks, causal=case.causal)
    output = linear(join(context, case.E), problem.out_weight, problem.out_bias)
    return openvino.Model([output], list(inputs.values()), "layer"), feeds


def sdpa_encoder(problem: EncoderProblem, *, dynamic: bool) -> tuple[openvino.Model, dict[str, Array]]:
    model, feeds = problem.case.model, {"x": problem.x}
    if problem.padding is not None:
        feeds["mask"] = np.ascontiguousarray(~problem.padding[:, None, None])
    inputs = {name: parameter(name, array, dynamic=dynamic) for name, array in feeds.items()}
    masks = [inputs["mask"]] if problem.padding is not None else []

    def norm(x: Any, name: str) -> Any:
        centred = ov.mvn(x, ov.constant([-1]), True, model.eps, "inside_sqrt")
        return ov.add(ov.multiply(centred, ov.constant(p[f"{name}.weight"])), ov.constant(p[f"{name}.bias"]))

    def attend(x: Any) -> Any:
        pairs = zip(np.split(p["self_attn.in_proj_weight"], 3), np.split(p["self_attn.in_proj_bias"], 3), strict=True)
        q, k, v = (split(linear(x, weight, bias), model.H, model.E // model.H) for weight, bias in pairs)
        context = join(ov.scaled_dot_product_attention(q, k, v, *masks), model.E)
        return linear(context, p["self_attn.out_proj.weight"], p["self_attn.out_proj.bias"])

    def feed(x: Any) -> Any:
        hidden = ov.gelu(linear(x, p["linear1.weight"], p["linear1.bias"]), "erf")
        return linear(hidden, p["linear2.weight"], p["linear2.bias"])

    x = inputs["x"]
    for number in range(model.layers):
        p = problem.layer(number)
        if model.norm_first:
            x = ov.add(x, attend(norm(x, "norm1")))
            x = ov.add(x, feed(norm(x, "norm2")))
        else:
            x = norm(ov.add(x, attend(x)), "norm1")
            x = norm(ov.add(x, feed(x)), "norm2")
    return openvino.Model([x], list(inputs.values()), "encoder"), feeds


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
