"""What ``deterministic="layout"`` costs: the same calls with it and without, in turns, and the bytes that ranks exchange.

    OMP_NUM_THREADS=1 python tools/bench/deterministic_layout.py
    python tools/bench/deterministic_layout.py --device cuda --rows 4096 --hidden 4096 --vocab 151936 --dtype bf16

Times are forward + backward; on a CPU those that the process computes, so that waiting for a core does not count. Ratios are
medians over turns in which the two follow each other. One process: the exchange is counted from the shapes, not timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_dppo import fused_linear_policy_stats, vocab_parallel_policy_stats
from megatron_dppo.ops.layout_linear import layout_linear
from megatron_dppo.ops.tile_tree import NODE_COLUMNS, TILE_COLUMNS, Deterministic, node_runs

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    for name, call in calls(options).items():
        turns = timed(call, options)
        usual = statistics.median(off for off, _ in turns)
        ratio = statistics.median(layout / off for off, layout in turns)
        print(f"{name:30} off {1e3 * usual:8.1f} ms, layout {ratio:.2f} times as long")
    for size in (2, 4, 8):
        print(exchanged(size, options))
    return 0


Call = Callable[[Deterministic], torch.Tensor]


def calls(options: argparse.Namespace) -> dict[str, Call]:
    """What is timed; each returns a scalar to differentiate."""
    like = {"dtype": DTYPES[options.dtype], "device": options.device}
    target = torch.randint(0, options.vocab, (options.rows,), device=options.device)
    logits = (3 * torch.randn(options.rows, options.vocab, device=options.device)).to(like["dtype"]).requires_grad_()
    hidden = torch.randn(options.rows, options.hidden, **like).requires_grad_()
    weight = (torch.randn(options.vocab, options.hidden, device=options.device) * 3 / options.hidden**0.5).to(
        like["dtype"]
    )
    weight.requires_grad_()

    def of_logits(choice: Deterministic) -> torch.Tensor:
        return vocab_parallel_policy_stats(logits, target, deterministic=choice, checks="off").log_prob.sum()

    def of_made_logits(choice: Deterministic) -> torch.Tensor:
        made = hidden @ weight.t() if choice == "off" else layout_linear(hidden, weight)
        stats = vocab_parallel_policy_stats(made, target, inplace_backward=True, deterministic=choice, checks="off")
        return stats.log_prob.sum()

    def fused(choice: Deterministic) -> torch.Tensor:
        return fused_linear_policy_stats(hidden, weight, target, deterministic=choice, checks="off").log_prob.sum()

    return {
        "statistics of given logits": of_logits,
        "output layer and statistics": of_made_logits,
        "fused, two passes": fused,
    }


def timed(call: Call, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds (off, layout) of each turn, after one that is not counted."""

    clock = time.perf_counter if options.device == "cuda" else time.process_time

    def seconds(choice: Deterministic) -> float:
        start = clock()
        call(choice).backward()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    return [(seconds("off"), seconds("layout")) for _ in range(options.turns + 1)][1:]


def exchanged(size: int, options: argparse.Namespace) -> str:
    """Bytes that a rank of so many contributes, for each token."""
    tiles = -(-options.vocab // (TILE_COLUMNS * size))
    nodes = max(len(list(node_runs(r * tiles, (r + 1) * tiles))) for r in range(size))
    forward = 4 * (NODE_COLUMNS * nodes + 1)
    backward = 4 * nodes * options.hidden
    return (
        f"TP {size}: {nodes} nodes; a token's share of the all-gather {forward} bytes (off: 20), and of the hidden states'"
        f" gradient {backward} bytes (off: {DTYPES[options.dtype].itemsize * options.hidden})"
    )


if __name__ == "__main__":
    sys.exit(main())
