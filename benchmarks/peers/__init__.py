# SPDX-License-Identifier: Apache-2.0
"""Every implementation that is measured, ours among them.

A peer is an object with a `version`, the name and number of its library, and a method `prepare(case)` that returns a
`Prepared`, or raises Unsupported where the library does not have the layer. It is created in a process of its own, for
one number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol


class Unsupported(Exception):
    """This peer cannot compute the case; the text says why."""


@dataclass(frozen=True)
class Prepared:
    """A layer with its inputs: `call` computes it once, `result` makes (output, weights or None) of what call left."""

    call: Callable[[], Any]
    result: Callable[[Any], tuple[Any, Any]]


class Peer(Protocol):
    version: str

    def prepare(self, case: Any) -> Prepared: ...


@dataclass(frozen=True)
class Candidate:
    """A way to use a library: a class of a module in this folder, and its arguments after the number of threads."""

    name: str
    module: str
    kind: str
    arguments: tuple[Any, ...] = ()

    def create(self, threads: int) -> Peer:
        """The peer; ImportError where its library is not installed."""
        peer: Peer = getattr(import_module(f"peers.{self.module}"), self.kind)(threads, *self.arguments)
        return peer


OURS = Candidate("mha_c", "ours", "Ours")
IN_FLOAT32 = "mha_c in float32"  # of cases in narrower numbers

# Of single attention layers.
LAYERS = (
    OURS,
    Candidate(IN_FLOAT32, "ours", "OursInFloat32"),
    Candidate("torch", "torch_layer", "TorchLayer", (False,)),
    Candidate("torch fast path", "torch_layer", "TorchLayer", (True,)),
    Candidate("torch medium precision", "torch_layer", "TorchLayer", (False, True)),
    Candidate("torch fast path, medium precision", "torch_layer", "TorchLayer", (True, True)),
    Candidate("ORT MultiHeadAttention", "onnx_runtime", "OnnxRuntime", ("MultiHeadAttention",)),
    Candidate("ORT Attention", "onnx_runtime", "OnnxRuntime", ("Attention",)),
    Candidate("ORT ai.onnx Attention", "onnx_runtime", "OnnxRuntime", ("ai.onnx Attention",)),
    Candidate("ORT plain operators", "onnx_runtime", "OnnxRuntime", ("plain",)),
    Candidate("OpenVINO plain operators", "open_vino", "OpenVino", ("plain",)),
    Candidate("OpenVINO SDPA", "open_vino", "OpenVino", ("static",)),
    Candidate("OpenVINO SDPA, any length", "open_vino", "OpenVino", ("dynamic",)),
)

# Of whole encoders.
ENCODERS = (
    Candidate(OURS.name, "ours", "OurEncoder"),
    Candidate(IN_FLOAT32, "ours", "OurEncoderInFloat32"),
    Candidate("torch", "torch_encoder", "TorchEncoder", ("eager",)),
    Candidate("torch fast path", "torch_encoder", "TorchEncoder", ("fast path",)),
    Candidate("torch compiled", "torch_encoder", "TorchEncoder", ("compiled",)),
    Candidate("torch medium precision", "torch_encoder", "TorchEncoder", ("eager", True)),
    Candidate("torch fast path, medium precision", "torch_encoder", "TorchEncoder", ("fast path", True)),
    Candidate("torch compiled, medium precision", "torch_encoder", "TorchEncoder", ("compiled", True)),
    Candidate("ORT optimizer", "onnx_runtime", "OnnxRuntimeEncoder", (True,)),
    Candidate("ORT plain operators", "onnx_runtime", "OnnxRuntimeEncoder", (False,)),
    Candidate("OpenVINO plain operators", "open_vino", "OpenVinoEncoder", ("plain",)),
    Candidate("OpenVINO SDPA", "open_vino", "OpenVinoEncoder", ("static",)),
    Candidate("OpenVINO SDPA, any length", "open_vino", "OpenVinoEncoder", ("dynamic",)),
    Candidate("CTranslate2", "ctranslate2_encoder", "CTranslate2Encoder"),
)
