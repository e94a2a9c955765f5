# SPDX-License-Identifier: Apache-2.0
"""torch.nn.TransformerEncoder: operator by operator ("eager"), on its "fast path", or "compiled" by torch.compile."""

from __future__ import annotations

import os
import warnings
from typing import Any
from unittest import mock

import torch

import encoder_problem
from encoder_cases import EncoderCase
from peers import Prepared, Unsupported
from peers.torch_layer import in_torch, set_precision, tensor


class TorchEncoder:
    def __init__(self, threads: int, kind: str, medium: bool = False) -> None:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes that stay
        torch.set_num_threads(threads)
        set_precision(medium)
        self.mode = torch.inference_mode()
        self.mode.__enter__()  # for good: entering it in each call would cost the peer microseconds
        self.kind, self.medium = kind, medium
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
        torch.backends.mha.set_fastpath_enabled(kind == "fast path")
        self.version = f"torch {torch.__version__}"

    def prepare(self, case: EncoderCase) -> Prepared:
        case = in_torch(case, self.medium)
        if case.matmul_precision:
            raise Unsupported("torch's quantization does not replace the projections of its attention layer")
        problem, model = encoder_problem.make(case), case.model
        layer = torch.nn.TransformerEncoderLayer(
            model.E,
            model.H,
            model.F,
            activation="gelu",
            layer_norm_eps=model.eps,
            batch_first=True,
            norm_first=model.norm_first,
            dtype=getattr(torch, case.dtype),
        )
        fast = self.kind == "fast path"
        nested = fast and not model.norm_first  # leaves out the padding
        encoder: Any = torch.nn.TransformerEncoder(layer, model.layers, enable_nested_tensor=nested).eval()
        encoder.load_state_dict({name: tensor(array) for name, array in problem.parameters.items()})
        x = tensor(problem.x)
        padding = None if problem.padding is None else torch.from_numpy(problem.padding)
        if fast and not takes_fast_path(encoder, x, padding):
            raise Unsupported("torch does not take its fast path here")
        if self.kind == "compiled":
            torch.compiler.reset()
            encoder = torch.compile(encoder, dynamic=False, fullgraph=True)
        return Prepared(lambda: encoder(x, None, padding), lambda output: (output.double().numpy(), None))


def takes_fast_path(encoder: Any, x: torch.Tensor, padding: torch.Tensor | None) -> bool:
    native = torch._transformer_encoder_layer_fwd
    with mock.patch.object(torch, "_transformer_encoder_layer_fwd", side_effect=native) as spy:
        encoder(x, None, padding)
    return spy.called
