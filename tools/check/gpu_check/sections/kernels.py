"""Bytes per second of each kernel, beside a device-to-device copy that moves as many: the speed that memory allows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dppo import DPPOConfig
from megatron_dppo.loss.fused_objective import rule_of
from megatron_dppo.ops.arguments import RowSelection, TokenIds, VocabShard
from megatron_dppo.ops.backend import choose_backend
from megatron_dppo.rollout.sglang.tile_hash import TILE_WORDS, Piece, tile_sums
from tools.bench.policy_stats import clock
from tools.check.gpu_check.findings import Check, Finding, Options

LIMIT_S = 60.0
# Half of what memory allows: below that something is wrong, not slow. What is expected is in docs/gpu.md.
LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Problem:
    """Logits of a policy and of another, what the kernels ask for, and room for their results."""

    logits: torch.Tensor
    run: dict[str, tuple[int, Callable[[], Any]]]  # kernel -> passes over the logits, call
    copies: dict[int, Callable[[], Any]]


def checks(options: Options) -> list[Check]:
    """TP 1 and TP 4 of a vocabulary of 151,936."""
    shapes = ((8192, 151_936), (8192, 37_984)) if options.on_gpu else ((64, 4000),)
    kept: dict[tuple[int, int], Problem] = {}

    def problem(shape: tuple[int, int]) -> Problem:
        if shape not in kept:
            kept.clear()  # one at a time: 10 GB at TP 1
            kept[shape] = make_problem(*shape, options.device)
        return kept[shape]

    def bind(shape: tuple[int, int], kernel: str) -> Callable[[], Finding]:
        return lambda: measure(problem(shape), kernel, options)

    return [
        Check(f"{kernel} {rows}x{vocab} bf16", bind((rows, vocab), kernel), LIMIT_S)
        for rows, vocab in shapes
        for kernel in ("forward", "backward", "one pass", "exact divergence", "hash of weights")
    ]


def make_problem(tokens: int, vocab: int, device: str) -> Problem:
    logits = torch.randn(tokens, vocab, device=device, dtype=torch.bfloat16)
    rollout = logits + 0.1 * torch.randn_like(logits)
    target = torch.randint(0, vocab, (tokens,), device=device)
    backend = choose_backend(device, logits)
    ids, every, shard = TokenIds(target, None), RowSelection(), VocabShard.locate(vocab, None, None)
    ones = torch.ones(tokens, device=device)
    merged, other = (
        backend.merge_shards(backend.shard_partials(x, ids, every, shard, 1.0)[None], None) for x in (logits, rollout)
    )
    whole = Piece(logits, tokens, vocab, 0)
    grad, half = torch.empty_like(logits), torch.empty_like(logits[: tokens // 2])
    tiles = -(-whole.num_words // TILE_WORDS)

    def forward() -> Any:
        return backend.shard_partials(logits, ids, every, shard, 1.0)

    def backward() -> None:
        backend.shard_gradient(logits, grad, target, None, merged.state, ones, ones, shard, 1.0)

    rule = rule_of(DPPOConfig(trust_region="none"))

    def one_pass() -> Any:
        fields = (None, target, -ones, ones, None, None, None)
        return backend.operators.policy_gradient_(grad, *fields, 1.0, vocab, 1.0, **rule)

    def divergence() -> Any:
        normalisers = merged.normaliser, other.normaliser
        return backend.shard_divergence("kl", logits, normalisers[0], rollout, normalisers[1], every, None, shard, 1.0)

    run: dict[str, tuple[int, Callable[[], Any]]] = {
        "forward": (1, forward),
        "backward": (2, backward),
        "one pass": (2, one_pass),
        "exact divergence": (2, divergence),
        "hash of weights": (1, lambda: tile_sums([whole], [0], tiles)),
    }
    # A copy reads and writes, so that half of the logits is one pass over as many bytes.
    return Problem(logits, run, {1: lambda: half.copy_(logits[: tokens // 2]), 2: lambda: grad.copy_(logits)})


def measure(problem: Problem, kernel: str, options: Options) -> Finding:
    passes, run = problem.run[kernel]
    device, turns = problem.logits.device, 5 if options.quick else 20
    ours, copy = medians([run, problem.copies[passes]], device, turns)
    moved = passes * problem.logits.nbytes
    share = copy / ours
    figures = (
        f"{1e3 * ours:.3f} ms, {moved / ours / 1e9:.0f} GB/s; a copy {moved / copy / 1e9:.0f} GB/s: {share:.2f} of it"
    )
    values = {"seconds": ours, "bytes_per_s": moved / ours, "copy_bytes_per_s": moved / copy, "share_of_copy": share}
    return Finding(figures, share >= LEAST_SHARE if options.on_gpu else None, values)


def medians(calls: list[Callable[[], Any]], device: torch.device, turns: int) -> list[float]:
    """Seconds of each call; they take turns, after two for warming up."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(turns + 2):
        for call, taken in zip(calls, times, strict=True):
            start = clock(device)
            call()
            taken.append(clock(device) - start)
    return [statistics.median(taken[2:]) for taken in times]
