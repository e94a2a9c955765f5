# SPDX-License-Identifier: Apache-2.0
"""mha_c itself, called as its users call it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import encoder_problem
import mha_c
from cases import Case
from encoder_cases import EncoderCase
from peers import IN_FLOAT32, Prepared, Unsupported
from problem import Problem, make


def layer(problem: Problem) -> mha_c.MultiheadAttention:
    """The layer with the parameters of the problem."""
    case = problem.case
    module = mha_c.MultiheadAttention(
        case.E,
        case.H,
        kdim=case.kdim,
        vdim=case.vdim,
        num_kv_heads=case.kv_heads,
        batch_first=True,
        dtype=case.dtype,
        **precision_of(case),
        seed=0,
    ).eval()
    state = {"in_proj_bias": problem.in_bias, "out_proj.weight": problem.out_weight, "out_proj.bias": problem.out_bias}
    separate = problem.q_weight, problem.k_weight, problem.v_weight
    if module.in_proj_weight is None:
        state |= dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), separate, strict=True))
    else:
        state["in_proj_weight"] = np.concatenate(separate)
    module.load_state_dict(state)
    return module


class Ours:
    def __init__(self, threads: int) -> None:
        mha_c.set_num_threads(threads)
        self.version = f"mha_c {mha_c.__version__}"

    def prepare(self, case: Case) -> Prepared:
        problem = make(case)
        attend = layer(problem)
        query, key, value = problem.query, problem.key, problem.value
        padding, mask = problem.padding, problem.attn_mask
        wanted, causal = case.need_weights, case.causal

        def call() -> Any:
            return attend(query, key, value, padding, wanted, mask, True, causal)

        return Prepared(call, lambda result: result)


class OursInFloat32(Ours):
    """The float32 layer of a case in narrower numbers."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.version = f"{IN_FLOAT32} {mha_c.__version__}"

    def prepare(self, case: Case) -> Prepared:
        return super().prepare(in_float32(case))


class OurEncoder:
    def __init__(self, threads: int) -> None:
        mha_c.set_num_threads(threads)
        self.version = f"mha_c {mha_c.__version__}"

    def prepare(self, case: EncoderCase) -> Prepared:
        problem, model = encoder_problem.make(case), case.model
        layer = mha_c.TransformerEncoderLayer(
            model.E,
            model.H,
            model.F,
            activation="gelu",
            layer_norm_eps=model.eps,
            batch_first=True,
            norm_first=model.norm_first,
            dtype=case.dtype,
            **precision_of(case),
            seed=0,
        )
        encoder = mha_c.TransformerEncoder(layer, model.layers, padded="zero").eval()
        encoder.load_state_dict(problem.parameters)
        x, padding = problem.x, problem.padding
        return Prepared(lambda: encoder(x, None, padding), lambda output: (output, None))


class OurEncoderInFloat32(OurEncoder):
    """The float32 encoder of a case in narrower numbers."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.version = f"{IN_FLOAT32} {mha_c.__version__}"

    def prepare(self, case: EncoderCase) -> Prepared:
        return super().prepare(in_float32(case))


def precision_of(case: Any) -> dict[str, Any]:
    """The argument that asks for narrow products. tests/tools/gates.py measures versions that lack it, too."""
    return {"matmul_precision": case.matmul_precision} if case.matmul_precision else {}


def in_float32(case: Any) -> Any:
    """The case in float32."""
    if case.matmul_precision is None and case.dtype in ("float32", "float64"):
        raise Unsupported("the numbers of the case are not narrower")
    return dataclasses.replace(case, dtype="float32", matmul_precision=None)
