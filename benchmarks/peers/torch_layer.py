# SPDX-License-Identifier: Apache-2.0
"""torch.nn.MultiheadAttention with its fast path on or off; torch's functions where it has no such layer, as for grouped
heads and int8: torch.ao.quantization replaces torch.nn.Linear, but not the projections of MultiheadAttention.

Products of bfloat16 are those of a bfloat16 layer, or of a float32 layer in `medium` precision."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from torch.nn import functional as F

from cases import Case
from peers import Prepared, Unsupported
from problem import Array, Problem, make


def tensor(array: Array) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def optional_tensor(array: Array | None) -> torch.Tensor | None:
    return None if array is None else tensor(array)


def in_torch(case: Any, medium: bool) -> Any:
    """The case that torch computes."""
    if case.matmul_precision == "bfloat16":
        return dataclasses.replace(case, dtype="float32" if medium else "bfloat16", matmul_precision=None)
    if medium:
        raise Unsupported("the case has no products of bfloat16")
    return case


def set_precision(medium: bool) -> None:
    """In medium precision, float32 layers multiply bfloat16 where torch has a fast way to do so."""
    torch.set_float32_matmul_precision("medium" if medium else "highest")


class TorchLayer:
    def __init__(self, threads: int, fast_path: bool, medium: bool = False) -> None:
        torch.set_num_threads(threads)
        set_precision(medium)
        self.mode = torch.inference_mode()
        self.mode.__enter__()  # for good: entering it in each call would cost the peer microseconds
        torch.backends.mha.set_fastpath_enabled(fast_path)
        self.fast_path, self.medium = fast_path, medium
        self.version = f"torch {torch.__version__}"

    def prepare(self, case: Case) -> Prepared:
        case = in_torch(case, self.medium)
        problem = make(case)
        by_functions = case.kv_heads or case.matmul_precision
        call = self._call_of_functions(problem) if by_functions else self._layer_call(problem)
        if self.fast_path and not takes_fast_path(call):
            raise Unsupported("torch does not take its fast path here")

        def numpy_result(result: Any) -> tuple[Any, Any]:
            output, weights = result
            return output.double().numpy(), None if weights is None else weights.double().numpy()

        return Prepared(call, numpy_result)

    def _layer_call(self, problem: Problem) -> Callable[[], Any]:
        case = problem.case
        layer = torch.nn.MultiheadAttention(
            case.E, case.H, kdim=case.kdim, vdim=case.vdim, batch_first=True, dtype=getattr(torch, case.dtype)
        ).eval()
        state = {"in_proj_bias": problem.in_bias, "out_proj.weight": problem.out_weight}
        state["out_proj.bias"] = problem.out_bias
        tensors = {name: tensor(array) for name, array in state.items()}
        separate = [tensor(w) for w in (problem.q_weight, problem.k_weight, problem.v_weight)]
        if layer.in_proj_weight is None:
            tensors |= dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), separate, strict=True))
        else:
            tensors["in_proj_weight"] = torch.cat(separate)
        layer.load_state_dict(tensors)
        one_each = {id(x): tensor(x) for x in (problem.query, problem.key, problem.value)}
        query, key, value = (one_each[id(x)] for x in (problem.query, problem.key, problem.value))
        padding, mask = optional_tensor(problem.padding), optional_tensor(problem.attn_mask)
        if case.causal:  # torch wants the mask spelt out, too
            mask = torch.ones(case.L, case.keys, dtype=torch.bool).triu(1)
        wanted, causal = case.need_weights, case.causal
        return lambda: layer(query, key, value, padding, wanted, mask, True, causal)

    def _call_of_functions(self, problem: Problem) -> Callable[[], Any]:
        """Self-attention around torch's function, which has grouped heads, with the projections as linear layers."""
        case = problem.case
        if self.fast_path or problem.padding is not None or case.attn_mask or case.need_weights or not case.is_self:
            raise Unsupported("torch.nn.MultiheadAttention has no grouped heads and no int8")
        in_weight = torch.cat([tensor(w) for w in (problem.q_weight, problem.k_weight, problem.v_weight)])
        pairs = (in_weight, tensor(problem.in_bias)), (tensor(problem.out_weight), tensor(problem.out_bias))
        maps = torch.nn.ModuleList(linear(weight, bias) for weight, bias in pairs).eval()
        if case.matmul_precision:
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor, torch.quantize_per_channel and other")
            kinds = {torch.nn.Linear: per_channel_dynamic_qconfig}
            quantize_dynamic(maps, kinds, inplace=True)  # type: ignore[no-untyped-call]
        project, project_output = maps
        x, kv = tensor(problem.query), case.kv_head_count * case.head_dim

        def call() -> Any:
            q, k, v = (
                y.view(case.N, case.L, -1, case.head_dim).transpose(1, 2)
                for y in torch.split(project(x), [case.E, kv, kv], dim=-1)
            )
            context = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=True)
            return project_output(context.transpose(1, 2).flatten(2)), None

        return call


def linear(weight: torch.Tensor, bias: torch.Tensor) -> torch.nn.Linear:
    """The map with these parameters."""
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return made


def takes_fast_path(call: Callable[[], Any]) -> bool:
    native = torch._native_multi_head_attention
    with mock.patch.object(torch, "_native_multi_head_attention", side_effect=native) as spy:
        call()
    return spy.called
