# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on a model of the layer. Inputs and outputs are bound beforehand, so that a call copies nothing."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model

import encoder_problem
import onnx_encoder
import onnx_layer
from cases import Case
from encoder_cases import EncoderCase, Model
from onnx_graph import CONTRIB
from peers import Prepared, Unsupported
from problem import Array, make


class OnnxRuntime:
    def __init__(self, threads: int, kind: str) -> None:
        self.kind = kind
        self.version = f"ONNX Runtime {onnxruntime.__version__}"
        self.options = session_options(threads)

    def prepare(self, case: Case) -> Prepared:
        check_numbers(case)
        layer = onnx_layer.build(make(case), self.kind)
        model = quantized(layer.whole()) if case.matmul_precision else layer.whole()
        return bind(model, layer.feeds, self.options)


class OnnxRuntimeEncoder:
    """`optimized` by the optimizer for BERT that comes with ONNX Runtime, or as the runtime optimizes every model."""

    def __init__(self, threads: int, optimized: bool) -> None:
        self.optimized = optimized
        self.version = f"ONNX Runtime {onnxruntime.__version__}"
        self.options = session_options(threads)

    def prepare(self, case: EncoderCase) -> Prepared:
        check_numbers(case)
        model, feeds = onnx_encoder.build(encoder_problem.make(case))
        if self.optimized:
            model = optimized(model, case.model)
        return bind(quantized(model) if case.matmul_precision else model, feeds, self.options)


def check_numbers(case: Case | EncoderCase) -> None:
    if "bfloat16" in (case.dtype, case.matmul_precision):
        raise Unsupported("ONNX Runtime has no bfloat16 on CPUs, except by an option for ARM that is not measured")


def optimized(model: onnx.ModelProto, of: Model) -> onnx.ModelProto:
    """The model of an encoder after ONNX Runtime's optimizer for BERT, which finds whole layers of attention."""
    model = optimize_model(model, "bert", of.H, of.E, opt_level=0).model
    operators = {node.op_type for node in model.graph.node}
    assert {"Attention", "BiasGelu", "SkipLayerNormalization"} <= operators, operators
    return model


def quantized(model: onnx.ModelProto, weight_type: QuantType = QuantType.QInt8) -> onnx.ModelProto:
    """The model with products of int8, by ONNX Runtime's dynamic quantization: weights have a scale for each output
    feature, and an activation has one scale, which is found when the model runs. By default, weights are signed and keep
    8 bits (reduce_range=False): without VNNI, sums of two products can saturate. Unsigned weights do not saturate."""
    logging.getLogger().setLevel(logging.ERROR)  # it advises to prepare models, which only adds operators to these
    microsofts = (node for node in model.graph.node if (node.op_type, node.domain) == ("Attention", CONTRIB))
    operators = ["MatMul", *(node.op_type for node in microsofts)]  # its quantizer takes ONNX's Attention for this one
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        kind = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of results of Microsoft's operators
        quantize_dynamic(model, file, operators, True, weight_type=weight_type, extra_options=kind)
        return onnx.load(file)


def session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def bind(model: onnx.ModelProto, feeds: dict[str, Array], options: onnxruntime.SessionOptions) -> Prepared:
    """A session of the model with its inputs and its outputs, which are a layer's output and its weights, if any."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")

    def result(_: Any) -> tuple[Any, Any]:
        output, *weights = (value.numpy() for value in binding.get_outputs())
        return output, weights[0] if weights else None

    return Prepared(lambda: session.run_with_iobinding(binding), result)
