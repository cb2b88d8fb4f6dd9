"""How much the fused trust-region operator saves: divergence, direction, weight and metrics of n tokens.

    python tools/bench/trust_region.py [--tokens 8192] [--topk 20] [--device cpu|cuda] [--turns 20]

For each setting: median time of one call of the plain-torch definition (loss/objective.py) and of the operator
(loss/fused_objective.py), taken in turns; their ratio; and how many tensor operators each dispatches.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dppo import DPPOConfig, PolicyStats
from megatron_dppo.loss.fused_objective import fused_token_objective
from megatron_dppo.loss.inputs import FlatTokens
from megatron_dppo.loss.objective import token_objective
from megatron_dppo.ops.backend import backend_report

VOCAB = 150_000
SETTINGS = (
    {"divergence": "binary_tv"},
    {"divergence": "topk_kl"},
    {"divergence": "topk_kl", "direction": "predictive"},
    {"divergence": "binary_kl", "trust_region": "smooth"},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--topk", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    if backend_report()[options.device] != "available":
        parser.error(f"no kernels for {options.device}: {backend_report()[options.device]}")
    tokens, policy = make_tokens(options.tokens, options.topk, options.device)
    print(f"{options.tokens} tokens, K = {options.topk}, {options.device}, {torch.get_num_threads()} threads")
    for setting in SETTINGS:
        arguments = (DPPOConfig(**setting), tokens, policy, None, VOCAB)
        calls = [functools.partial(decide, *arguments) for decide in (token_objective, fused_token_objective)]
        plain, fused = medians(calls, options.turns, options.device)
        counts = [operators_of(call) for call in calls]
        print(
            f"{' '.join(setting.values()):22} torch {plain * 1e3:8.3f} ms, {counts[0]:3} operators   fused "
            f"{fused * 1e3:8.3f} ms, {counts[1]:3} operators   {plain / fused:6.1f}x"
        )


def make_tokens(n: int, k: int, device: str) -> tuple[FlatTokens, PolicyStats]:
    generator = torch.Generator().manual_seed(0)
    log_mu = (3 * torch.randn(n, k + 50, generator=generator)).log_softmax(-1)
    log_pi = (log_mu + 0.3 * torch.randn(n, k + 50, generator=generator)).log_softmax(-1)
    topk_log_mu, ids = log_mu.topk(k, dim=-1)
    target = torch.randint(0, k + 50, (n, 1), generator=generator)
    sampled_mu, sampled_pi = (x.gather(1, target)[:, 0].to(device) for x in (log_mu, log_pi))
    advantages, entropy = torch.randn(2, n, generator=generator).to(device)
    tokens = FlatTokens(
        mask=None,
        target=target[:, 0].to(device),
        advantages=advantages,
        rollout_log_probs=sampled_mu,
        topk_ids=ids.to(device),
        topk_log_probs=topk_log_mu.to(device),
        ref_log_probs=None,
    )
    collision = log_pi.exp().square().sum(1).to(device)
    return tokens, PolicyStats(sampled_pi, entropy.abs(), collision, log_pi.gather(1, ids).to(device))


def medians(calls: list[Callable[[], Any]], turns: int, device: str) -> list[float]:
    """Of each call, taken in turns so that a busy moment hits them alike; the first turn warms up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(turns + 1):
        for call, taken in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken[1:]) for taken in seconds]


def operators_of(call: Callable[[], Any]) -> int:
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        call()
    return counter.count


if __name__ == "__main__":
    main()
