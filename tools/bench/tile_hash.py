"""How long it takes to hash weights for the servers' checksums, beside the definition in torch and a bare read.

    python tools/bench/tile_hash.py [--mib 64] [--device cpu|cuda] [--turns 9]

Of each way the median time, taken in turns in one process. ``whole`` is a tensor as it lies in memory; ``columns`` a shard of
half its columns, padded with zeros to a multiple of 32 elements. ``read`` is each row's largest of the same bytes as int32,
what memory allows (torch's sum of int32 takes several times as long); ``SHA-256`` is what SGLang computes on a CPU by itself.
The table is that of docs/kernels.md.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dppo.ops.backend import backend_report, cpu_kernel_level
from megatron_dppo.rollout.sglang import tile_hash
from megatron_dppo.rollout.sglang.tile_hash import Piece
from tools.bench.trust_region import medians

COLUMNS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=64, help="of weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    if backend_report()[options.device] != "available":
        parser.error(f"no kernels for {options.device}: {backend_report()[options.device]}")
    where = f"{torch.get_num_threads()} threads, {cpu_kernel_level()}" if options.device == "cpu" else "GPU"
    print(f"{options.mib} MiB, {where}")
    print(
        "| weights | ours | in torch | read | SHA-256 | ours / read | in torch / ours |\n|---|---|---|---|---|---|---|"
    )
    for dtype in (torch.bfloat16, torch.float32):
        weights = torch.randn(options.mib * 2**20 // dtype.itemsize // COLUMNS, COLUMNS, device=options.device).to(
            dtype
        )
        half = COLUMNS // 2
        for name, source, columns in (("whole", weights, COLUMNS), ("columns", weights[:, half:], -(-half // 32) * 32)):
            print(row(f"{name} {str(dtype).removeprefix('torch.')}", Piece(source, len(source), columns, 0), options))


def row(name: str, piece: Piece, options: argparse.Namespace) -> str:
    def ours() -> None:
        tile_hash.hash_pieces({"weights": (piece.num_words, [piece])})

    def in_torch() -> None:
        with mock.patch.object(tile_hash, "native_operators", return_value=None):
            ours()

    words = piece.source.view(torch.int32)
    calls: list[Callable[[], Any]] = [ours, in_torch, lambda: words.amax(1)]
    if options.device == "cpu":
        parameter = memoryview(words.contiguous().numpy())
        calls.append(lambda: hashlib.sha256(parameter))
    seconds = medians(calls, options.turns, options.device)
    times = [f"{1e3 * value:.1f} ms" for value in seconds] + ["-"] * (4 - len(seconds))
    return f"| {name} | {' | '.join(times)} | {seconds[0] / seconds[2]:.2f} | {seconds[1] / seconds[0]:.1f} |"


if __name__ == "__main__":
    main()
