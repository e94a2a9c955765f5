# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on a model of the layer. Inputs and outputs are bound beforehand, so that a call copies nothing."""

from __future__ import annotations

from typing import Any

import onnxruntime

import onnx_layer
from peers import Prepared
from problem import Problem


class OnnxRuntime:
    def __init__(self, threads: int, kind: str) -> None:
        self.kind = kind
        self.version = f"ONNX Runtime {onnxruntime.__version__}"
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 3

    def prepare(self, problem: Problem) -> Prepared:
        layer = onnx_layer.build(problem, self.kind)
        model = layer.model().SerializeToString()
        session = onnxruntime.InferenceSession(model, self.options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name, array in layer.feeds.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name in layer.outputs:
            binding.bind_output(name, "cpu")

        def result(_: Any) -> tuple[Any, Any]:
            outputs = [value.numpy() for value in binding.get_outputs()]
            return outputs[0], outputs[1] if problem.case.need_weights else None

        return Prepared(lambda: session.run_with_iobinding(binding), result)
