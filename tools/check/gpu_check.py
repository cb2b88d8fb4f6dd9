"""Tests and benchmarks of the CUDA kernels, gathered in one table. tools/gpu_check.sh prepares the environment and runs it.

    python tools/check/gpu_check.py [--skip-tests]

Every kernel is compared with a device-to-device copy that moves the same bytes, which is the speed that memory allows; the
operators with what else computes the same (tools/bench/). ``--device cpu`` takes the same
path through this file on a machine without GPU, at tiny sizes, to test it; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import megatron_dppo
from megatron_dppo.ops.arguments import RowSelection, TokenIds, VocabShard
from megatron_dppo.ops.backend import backend_report, choose_backend
from megatron_dppo.rollout.sglang.tile_hash import TILE_WORDS, Piece, tile_sums
from tools.bench import fused_linear as bench_fused_linear
from tools.bench import policy_stats as bench_policy_stats

NO_GPU = 3  # exit code
TESTS = [
    *("tests/ops", "tests/loss", "tests/csrc/test_operator_registration.py"),
    "tests/rollout/sglang/test_tile_hash.py",
]
# A few, for a sanitizer makes them a hundred times slower: values, gradients, masks and padding cover every kernel.
SANITIZED = "definition or masked_rows or padded_columns"


@dataclass
class Row:
    """One line of the table; ``passed`` is None for what could not be checked here."""

    check: str
    passed: bool | None
    figures: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-tests", action="store_true", help="benchmarks only")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: only to test this script")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees no CUDA device. Nothing was checked.", file=sys.stderr)
        return NO_GPU
    rows: list[Row] = []
    checks: list[Callable[[Namespace], list[Row]]] = [environment, kernels, policy_stats, fused_linear, two_gpus]
    if not options.skip_tests:
        checks[1:1] = [run_tests, sanitizers]
    for check in checks:
        print(f"... {check.__name__}", file=sys.stderr, flush=True)
        try:
            rows += check(options)
        except Exception as error:  # one check that fails must not hide the others
            traceback.print_exc()
            rows.append(Row(check.__name__, False, f"{type(error).__name__}: {error}".splitlines()[0]))
    print_table(rows)
    return int(any(row.passed is False for row in rows))


def environment(options: Namespace) -> list[Row]:
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    state = backend_report()[options.device]
    return [
        Row("machine", None, f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"),
        Row(f"backend {options.device}", state == "available", state),
    ]


def run_tests(options: Namespace) -> list[Row]:
    return [pytest_row(" ".join(TESTS), [sys.executable, "-m", "pytest", "--device", options.device, *TESTS])]


def sanitizers(options: Namespace) -> list[Row]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return [Row("compute-sanitizer", None, "not installed")]
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "--device",
        options.device,
        "tests/ops/test_policy_stats.py",
        "-k",
        SANITIZED,
    ]
    return [
        pytest_row(f"compute-sanitizer {tool}", [program, "--error-exitcode", "9", "--tool", tool, *tests])
        for tool in ("memcheck", "racecheck", "synccheck")
    ]


def pytest_row(name: str, command: list[str]) -> Row:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, check=False)
    if result.returncode:
        print(result.stdout[-20_000:], result.stderr[-5_000:], file=sys.stderr)
    summary = [
        line for line in result.stdout.splitlines() if " passed" in line or " failed" in line or " error" in line
    ]
    return Row(name, result.returncode == 0, summary[-1].strip("= ") if summary else f"exit code {result.returncode}")


def kernels(options: Namespace) -> list[Row]:
    """Bytes per second of each kernel, beside those of a copy of as many bytes."""
    tokens, vocab = (8192, 151_936) if options.device == "cuda" else (64, 4000)
    device = torch.device(options.device)
    logits = torch.randn(tokens, vocab, device=device).bfloat16()
    rollout = (logits + 0.1 * torch.randn_like(logits)).bfloat16()
    target = torch.randint(0, vocab, (tokens,), device=device)
    backend = choose_backend(options.device, logits)
    ids, every, shard = TokenIds(target, None), RowSelection(), VocabShard.locate(vocab, None, None)
    ones = torch.ones(tokens, device=device)
    merged, other = (
        backend.merge_shards(backend.shard_partials(x, ids, every, shard, 1.0)[None], None) for x in (logits, rollout)
    )
    whole = Piece(logits, tokens, vocab, 0)
    grad, half = torch.empty_like(logits), torch.empty_like(logits[: tokens // 2])
    copies: dict[int, Callable[[], Any]] = {  # a copy reads and writes
        1: lambda: half.copy_(logits[: tokens // 2]),
        2: lambda: grad.copy_(logits),
    }
    candidates: list[tuple[str, int, Callable[[], Any]]] = [
        ("forward (row partials)", 1, lambda: backend.shard_partials(logits, ids, every, shard, 1.0)),
        (
            "backward (gradient)",
            2,
            lambda: backend.shard_gradient(logits, grad, target, None, merged.state, ones, ones, shard, 1.0),
        ),
        (
            "exact divergence",
            2,
            lambda: backend.shard_divergence(
                "kl", logits, merged.normaliser, rollout, other.normaliser, every, None, shard, 1.0
            ),
        ),
        ("hash of weights", 1, lambda: tile_sums([whole], [0], -(-whole.num_words // TILE_WORDS))),
    ]
    rows = []
    for name, passes, run in candidates:
        ours, copy = median_seconds(run, device), median_seconds(copies[passes], device)
        moved = passes * logits.nbytes
        figures = (
            f"{1e3 * ours:.3f} ms, {moved / ours / 1e9:.0f} GB/s; a copy of as many bytes {moved / copy / 1e9:.0f} GB/s"
        )
        rows.append(Row(f"{name}, {tokens}x{vocab} bf16", None, figures))
    return rows


def median_seconds(run: Callable[[], Any], device: torch.device, turns: int = 20) -> float:
    times = []
    for _ in range(turns + 3):
        start = bench_policy_stats.clock(device)
        run()
        times.append(bench_policy_stats.clock(device) - start)
    return statistics.median(times[3:])


def policy_stats(options: Namespace, ranks: int = 1) -> list[Row]:
    """The operator, forward and backward, beside eager torch and the cross entropies that are installed."""
    shapes = "4096x151936" if options.device == "cuda" else "64x4000"
    settings = Namespace(shapes=shapes, dtypes="bf16", device=options.device, threads=2, turns=9)
    rows = []
    for (shape, dtype), results in bench_policy_stats.run_ranks(ranks, settings).items():
        for name, result in results.items():
            times, ratio = 1e3 * statistics.median(result.both), bench_policy_stats.ratios(results, name, "both")
            figures = f"{times:.3f} ms forward + backward, {ratio:.2f}x ours, memory {result.memory:.2f} of the logits"
            rows.append(Row(f"{name}, {shape} {dtype} TP={ranks}", None, figures))
    return rows


def fused_linear(options: Namespace) -> list[Row]:
    shape = "8192x4096x151936" if options.device == "cuda" else "64x64x4000"
    inputs = bench_fused_linear.make_inputs(shape, 0.5, torch.bfloat16, options.device)
    results = bench_fused_linear.measure(bench_fused_linear.methods(bench_fused_linear.CHUNK_BYTES), inputs, turns=5)
    rows = []
    for name, result in results.items():
        error = bench_fused_linear.gradient_error(result, results["logits + ours"])
        times, ratio = 1e3 * statistics.median(result.both), bench_policy_stats.ratios(results, name, "both")
        figures = f"{times:.1f} ms, {ratio:.2f}x ours, {result.memory / 2**20:.0f} MiB, gradient error {error:.1e}"
        # The gradients of two bf16 routes differ by a few of its roundings, 2^-8 each, and those are of either sign.
        rows.append(Row(f"{name}, {shape} half masked", error < 2**-6, figures))
    return rows


def two_gpus(options: Namespace) -> list[Row]:
    """Two shards of a vocabulary over NCCL (gloo on CPU): the numbers of one, and what they cost."""
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        return [Row("two GPUs over NCCL", None, "only one GPU here")]
    with tempfile.TemporaryDirectory() as folder:
        bench_policy_stats.start_ranks(compare_shards, (options.device, folder), 2, options.device)
    return [Row("two shards give what one gives", True, ""), *policy_stats(options, ranks=2)]


def compare_shards(rank: int, device: str, folder: str) -> None:
    """Raise AssertionError unless this rank's half gives the statistics and gradient of the whole."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole, target = (3 * torch.randn(64, 1024)).to(device), torch.randint(0, 1000, (64,)).to(device)
    whole.requires_grad_()
    half = whole.detach().chunk(2, dim=1)[rank].clone().requires_grad_()
    for logits, group in ((whole, None), (half, dist.group.WORLD)):
        stats = megatron_dppo.vocab_parallel_policy_stats(
            logits, target, vocab_size=1000, tp_group=group, backend=device
        )
        (stats.log_prob + stats.entropy).sum().backward()
    assert whole.grad is not None
    # fp32: sums of 1000 terms in another order.
    torch.testing.assert_close(half.grad, whole.grad.chunk(2, dim=1)[rank], rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


def print_table(rows: list[Row]) -> None:
    width = max(len(row.check) for row in rows)
    for row in rows:
        outcome = {True: "passed", False: "FAILED", None: ""}[row.passed]
        print(f"{row.check:{width}}  {outcome:6}  {row.figures}")


if __name__ == "__main__":
    sys.exit(main())
