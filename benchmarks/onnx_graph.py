# SPDX-License-Identifier: Apache-2.0
"""An ONNX model in the making."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]

CONTRIB = "com.microsoft"
OPSET = 23  # the first with an Attention of its own
IR_VERSION = 11


class Graph:
    """Nodes, constants and inputs, which are added one after the other; `feeds` are the arrays of the inputs."""

    def __init__(self) -> None:
        self.feeds: dict[str, Array] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, results: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Adds a node; the name of its result, or a list of names."""
        names = [f"{kind}_{len(self._nodes)}_{i}" for i in range(results)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if results == 1 else names

    def constant(self, array: Array) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def input(self, name: str, array: Array) -> str:
        self.feeds[name] = np.ascontiguousarray(array)
        return name

    def shape(self, *sizes: int) -> str:
        return self.constant(np.array(sizes, dtype=np.int64))

    def model(self, outputs: dict[str, tuple[int, ...]], dtype: str, opset: int = OPSET) -> onnx.ModelProto:
        """The whole model, with the shapes of its outputs by their names."""
        kind = helper.np_dtype_to_tensor_dtype
        graph = helper.make_graph(
            self._nodes,
            "layer",
            [helper.make_tensor_value_info(name, kind(a.dtype), a.shape) for name, a in self.feeds.items()],
            [helper.make_tensor_value_info(name, kind(np.dtype(dtype)), shape) for name, shape in outputs.items()],
            self._constants,
        )
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)
