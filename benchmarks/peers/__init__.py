# SPDX-License-Identifier: Apache-2.0
"""Every implementation that is measured, ours among them.

A peer is an object with a `version`, the name and number of its library, and a method `prepare(problem)` that returns a
`Prepared`, or raises Unsupported where the library does not have the layer. It is created in a process of its own, for
one number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from problem import Problem


class Unsupported(Exception):
    """This peer cannot compute the case; the text says why."""


@dataclass(frozen=True)
class Prepared:
    """A layer with its inputs: `call` computes it once, `result` makes (output, weights or None) of what call left."""

    call: Callable[[], Any]
    result: Callable[[Any], tuple[Any, Any]]


class Peer(Protocol):
    version: str

    def prepare(self, problem: Problem) -> Prepared: ...


OURS = "mha_c"

# name: (module, class, further arguments after the number of threads)
_PEERS: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    OURS: ("ours", "Ours", ()),
    "torch": ("torch_layer", "TorchLayer", (False,)),
    "torch fast path": ("torch_layer", "TorchLayer", (True,)),
    "ORT MultiHeadAttention": ("onnx_runtime", "OnnxRuntime", ("MultiHeadAttention",)),
    "ORT Attention": ("onnx_runtime", "OnnxRuntime", ("Attention",)),
    "ORT ai.onnx Attention": ("onnx_runtime", "OnnxRuntime", ("ai.onnx Attention",)),
    "ORT plain operators": ("onnx_runtime", "OnnxRuntime", ("plain",)),
    "OpenVINO plain operators": ("open_vino", "OpenVino", ("plain",)),
    "OpenVINO SDPA": ("open_vino", "OpenVino", ("static",)),
    "OpenVINO SDPA, any length": ("open_vino", "OpenVino", ("dynamic",)),
}

NAMES: tuple[str, ...] = tuple(_PEERS)


def create(name: str, threads: int) -> Peer:
    """The peer of that name; ImportError where its library is not installed."""
    module, kind, arguments = _PEERS[name]
    peer: Peer = getattr(import_module(f"peers.{module}"), kind)(threads, *arguments)
    return peer
