# SPDX-License-Identifier: Apache-2.0
"""CTranslate2's encoder. Its models start from numbers of tokens, so that here each vector of the input is the
embedding of a token of its own: what is measured besides the encoder is a copy of the input. In int8, CTranslate2 rounds
embeddings to int8, too, and so the input."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec

import encoder_problem
from encoder_cases import EncoderCase
from encoder_problem import Array, EncoderProblem
from peers import Prepared, Unsupported


class CTranslate2Encoder:
    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.version = f"CTranslate2 {ctranslate2.__version__}"

    def prepare(self, case: EncoderCase) -> Prepared:
        kind = case.matmul_precision or case.dtype
        if kind not in ctranslate2.get_supported_compute_types("cpu"):
            raise Unsupported(f"it does not compute in {kind} on this CPU")
        problem = encoder_problem.make(dataclasses.replace(case, dtype="float32"))
        with tempfile.TemporaryDirectory() as folder:
            spec = specification(problem)
            spec.validate()
            spec.optimize(kind)
            spec.save(folder)
            encoder = ctranslate2.Encoder(folder, compute_type=kind, intra_threads=self.threads)
        ids = ctranslate2.StorageView.from_array(np.arange(case.N * case.L, dtype=np.int32).reshape(case.N, case.L))
        lengths = ctranslate2.StorageView.from_array(np.array(case.lengths, dtype=np.int32))

        def result(output: Any) -> tuple[Any, Any]:
            return np.array(output.last_hidden_state.to(ctranslate2.DataType.float32)), None

        return Prepared(lambda: encoder.forward_batch(ids, lengths), result)


def specification(problem: EncoderProblem) -> Any:
    """The model, as CTranslate2's converters describe it."""
    model, E = problem.case.model, problem.case.model.E
    encoder = transformer_spec.TransformerEncoderSpec(
        model.layers,
        model.H,
        pre_norm=model.norm_first,
        no_final_norm=True,
        activation=common_spec.Activation.GELU,
    )
    encoder.scale_embeddings = False
    encoder.embeddings[0].weight = problem.x.reshape(-1, E)
    encoder.position_encodings.encodings = np.zeros((problem.case.L, E), dtype=problem.x.dtype)
    for number, layer in enumerate(encoder.layer):
        p = problem.layer(number)
        attention, feed_forward = layer.self_attention, layer.ffn
        _set(attention.linear[0], p["self_attn.in_proj_weight"], p["self_attn.in_proj_bias"])
        _set(attention.linear[1], p["self_attn.out_proj.weight"], p["self_attn.out_proj.bias"])
        _set(feed_forward.linear_0, p["linear1.weight"], p["linear1.bias"])
        _set(feed_forward.linear_1, p["linear2.weight"], p["linear2.bias"])
        for norm, name in ((attention.layer_norm, "norm1"), (feed_forward.layer_norm, "norm2")):
            norm.gamma, norm.beta = p[f"{name}.weight"], p[f"{name}.bias"]
    spec = transformer_spec.TransformerEncoderModelSpec(encoder)
    spec.config.layer_norm_epsilon = model.eps
    spec.register_vocabulary([str(number) for number in range(problem.x[..., 0].size)])
    return spec


def _set(linear: Any, weight: Array, bias: Array) -> None:
    linear.weight, linear.bias = weight, bias
