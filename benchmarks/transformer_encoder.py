# SPDX-License-Identifier: Apache-2.0
"""Time a torch.nn.TransformerEncoder whose attention is replaced beside torch's own, fused path on and off.

All three run in one process, in turns, so that a change of the machine's speed hits all alike; what is reported are
medians of the ratios within a turn. That is how a replaced model runs: torch's other layers, and the threads that torch
keeps spinning after each of them, are part of it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import mha_c
import torch
from mha_c.torch import replace_attention


def main() -> None:
    arguments = parse()
    layer = torch.nn.TransformerEncoderLayer(
        arguments.embed_dim, arguments.num_heads, 4 * arguments.embed_dim, batch_first=True
    )
    theirs = torch.nn.TransformerEncoder(layer, arguments.layers, enable_nested_tensor=False).eval()
    ours = replace_attention(copy.deepcopy(theirs))
    x = torch.randn(arguments.batch, arguments.length, arguments.embed_dim)
    candidates: dict[str, Callable[[], torch.Tensor]] = {
        "replaced": lambda: ours(x),
        "torch, fused path": lambda: theirs(x),
        "torch, ordinary path": lambda: ordinary(theirs, x),
    }
    print(f"mha_c {mha_c.__version__}, torch {torch.__version__}; {vars(arguments)}")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        with torch.inference_mode(), mha_c.num_threads(threads):
            report(threads, candidates, arguments.turns)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("embed-dim", 512), ("num-heads", 8), ("batch", 8), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=30)
    return parser.parse_args()


def ordinary(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        output: torch.Tensor = model(x)
        return output
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def report(threads: int, candidates: dict[str, Callable[[], torch.Tensor]], turns: int) -> None:
    outputs = [call() for call in candidates.values()]  # the warm-up, too
    difference = max((output - outputs[-1]).abs().max().item() for output in outputs)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    print(f"\n{threads} threads, outputs at most {difference:.1e} apart")
    print(f"{'':<22}{'median ms':>12}{'times replaced':>18}")
    for name, taken in times.items():
        ratio = statistics.median(one / base for one, base in zip(taken, times["replaced"], strict=True))
        print(f"{name:<22}{1000 * statistics.median(taken):>12.2f}{ratio:>18.2f}")


if __name__ == "__main__":
    main()
