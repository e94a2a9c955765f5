# SPDX-License-Identifier: Apache-2.0
"""Times small calls of torch's attention with mha_c and without, in one process: medians of a call, in microseconds.

Calls take turns, so that both meet the same machine. What is left to torch shows what counting and looking cost.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from mha_c.torch import attention, replace_attention
from mha_c.torch.packed import PackedParameters

CALLS = 50  # a sample; the clock is read before and after it

Block = Callable[[], AbstractContextManager[Any]]


def sample(call: Callable[[], Any], block: Block) -> float:
    """Microseconds a call, within a block."""
    with block():
        call()
        start = time.perf_counter_ns()
        for _ in itertools.repeat(None, CALLS):
            call()
        return (time.perf_counter_ns() - start) / CALLS / 1000


def cases() -> dict[str, tuple[Callable[[], Any], Block, Callable[[], Any], Block]]:
    """What is called without mha_c, and what with it, each within a block."""
    found: dict[str, tuple[Callable[[], Any], Block, Callable[[], Any], Block]] = {}
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
    one, half = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8).half()
    keys, x = torch.randn(1, 2, 5, 8), torch.randn(5)

    def one_query() -> Any:
        return scaled_dot_product_attention(one, keys, keys)

    def float16() -> Any:
        return scaled_dot_product_attention(half, half, half)

    def other() -> Any:
        return torch.softmax(x, 0)

    found["left to torch: one query"] = one_query, nullcontext, one_query, attention
    found["left to torch: float16"] = float16, nullcontext, float16, attention
    found["another function: softmax"] = other, nullcontext, other, attention
    return found


def check_of_parameters() -> Callable[[], Any]:
    """What each call of a layer does to see whether its parameters have changed."""
    layer, packed = torch.nn.MultiheadAttention(512, 8), PackedParameters()
    tensors = {"in_proj_weight": layer.in_proj_weight, "in_proj_bias": layer.in_proj_bias}
    tensors |= {"out_proj.weight": layer.out_proj.weight, "out_proj.bias": layer.out_proj.bias}
    return lambda: packed.get(tensors, 512, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200, help="of each (200)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        check = check_of_parameters()
        times = [sample(check, nullcontext) for _ in range(options.samples)]
        print(f"looking whether parameters have changed: {statistics.median(times):.2f} us")
        print(f"{'':55}{'torch':>8}{'mha_c':>8}{'ratio':>8}")
        for name, (without, outside, with_mha_c, inside) in cases().items():
            pairs = [(sample(without, outside), sample(with_mha_c, inside)) for _ in range(options.samples)]
            theirs, ours = (statistics.median(one) for one in zip(*pairs))
            ratio = statistics.median(their / our for their, our in pairs)
            print(f"{name:55}{theirs:8.2f}{ours:8.2f}{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main()
