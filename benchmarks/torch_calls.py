# SPDX-License-Identifier: Apache-2.0
"""Times calls of torch's attention with mha_c and without, in one process: minimum and median, in microseconds.

Both take turns, so that they meet the same machine. The calls are small ones, or with --dtypes functions of ordinary
sizes in several dtypes. Calls that are left to torch show what looking at them costs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from mha_c.torch import attention, replace_attention
from mha_c.torch.packed import PackedParameters

CALLS = 10  # a sample; the clock is read before and after it

Block = Callable[[], AbstractContextManager[Any]]
Case = tuple[Callable[[], Any], Block, Callable[[], Any], Block]  # what is called, without mha_c and with it


def sample(call: Callable[[], Any], block: Block) -> float:
    """Microseconds a call, within a block."""
    with block():
        call()
        start = time.perf_counter_ns()
        for _ in itertools.repeat(None, CALLS):
            call()
        return (time.perf_counter_ns() - start) / CALLS / 1000


def small_calls() -> dict[str, Case]:
    """Layers and functions, computed here and left to torch."""
    found: dict[str, Case] = {}
    for length, features, heads in ((5, 8, 2), (16, 64, 4), (128, 512, 8)):
        shape = f"{length} tokens, {features} features, {heads} heads"
        theirs = torch.nn.MultiheadAttention(features, heads, batch_first=True).eval()
        ours = replace_attention(copy.deepcopy(theirs))
        x = torch.randn(1, length, features)
        q = torch.randn(1, heads, length, features // heads)

        def layer(module: torch.nn.Module = theirs, x: torch.Tensor = x) -> Any:
            return module(x, x, x, need_weights=False)

        def replaced(module: torch.nn.Module = ours, x: torch.Tensor = x) -> Any:
            return module(x, x, x, need_weights=False)

        def function(q: torch.Tensor = q) -> Any:
            return scaled_dot_product_attention(q, q, q)

        found[f"replaced layer, {shape}"] = layer, nullcontext, replaced, nullcontext
        found[f"layer in a block, {shape}"] = layer, nullcontext, layer, attention
        found[f"function, {shape}"] = function, nullcontext, function, attention
    one, keys, x = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8), torch.randn(5)

    def one_query() -> Any:
        return scaled_dot_product_attention(one, keys, keys)

    def other() -> Any:
        return torch.softmax(x, 0)

    found["left to torch: one query"] = one_query, nullcontext, one_query, attention
    found["another function: softmax"] = other, nullcontext, other, attention
    return found


def calls_of_dtypes() -> dict[str, Case]:
    """scaled_dot_product_attention in all dtypes but float64."""
    found: dict[str, Case] = {}
    shapes = ((1, 12, 128, 128, 64), (8, 12, 128, 128, 64), (1, 8, 512, 512, 64), (32, 12, 24, 24, 32),
              (1, 12, 1, 512, 64), (8, 12, 1, 512, 64))  # fmt: skip
    for items, heads, queries, keys, width in shapes:
        for dtype in torch.float32, torch.bfloat16, torch.float16:
            q, k, v = (torch.randn(items, heads, length, width).to(dtype) for length in (queries, keys, keys))

            def function(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> Any:
                return scaled_dot_product_attention(q, k, v)

            tokens = f"{keys} tokens" if queries == keys else f"1 query, {keys} keys"
            name = f"{items} x {tokens}, {heads} heads of {width}, {str(dtype).removeprefix('torch.')}"
            found[name] = function, nullcontext, function, attention
    return found


def check_of_parameters() -> Callable[[], Any]:
    """What each call of a layer does to see whether its parameters have changed."""
    layer, packed = torch.nn.MultiheadAttention(512, 8), PackedParameters()
    tensors = {"in_proj_weight": layer.in_proj_weight, "in_proj_bias": layer.in_proj_bias}
    tensors |= {"out_proj.weight": layer.out_proj.weight, "out_proj.bias": layer.out_proj.bias}
    return lambda: packed.get(tensors, 512, 8)


def show(times: Sequence[float]) -> str:
    return f"{min(times):9.1f}{statistics.median(times):9.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200, help="of each (200)")
    parser.add_argument("--threads", type=int, default=1, help="of both (1)")
    parser.add_argument("--dtypes", action="store_true", help="functions in several dtypes, not small calls")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        print(f"{'':51}{'torch':>18}{'mha_c':>18}")
        if not options.dtypes:
            check = check_of_parameters()
            times = [sample(check, nullcontext) for _ in range(options.samples)]
            print(f"{'looking whether parameters have changed':69}{show(times)}")
        cases = calls_of_dtypes() if options.dtypes else small_calls()
        for name, (without, outside, with_mha_c, inside) in cases.items():
            pairs = [(sample(without, outside), sample(with_mha_c, inside)) for _ in range(options.samples)]
            theirs, ours = zip(*pairs)
            print(f"{name:51}{show(theirs)}{show(ours)}", flush=True)


if __name__ == "__main__":
    main()
