"""How long the servers generate: every decoding step reads weights and KV cache, with as many sequences as there then are."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_dppo.launch.plan.hardware import Assumptions, Gpu
from megatron_dppo.launch.plan.servers import ServerPlan, touched_share
from megatron_dppo.models.flops import PolicyFlops
from megatron_dppo.models.hf.config import architecture


@dataclass(frozen=True)
class Decoding:
    """Seconds of a decoding step on one server."""

    server: ServerPlan
    hf_config: PretrainedConfig
    gpu: Gpu
    assume: Assumptions

    def step(self, sequences: float, tokens: float) -> float:
        """Of ``sequences`` sequences with ``tokens`` tokens in the cache altogether."""
        server, assume = self.server, self.assume
        flops = PolicyFlops.of(self.hf_config)
        experts = server.experts * touched_share(self.hf_config, sequences)
        moved = server.dense + experts + tokens * server.kv_bytes
        operations = (flops.per_token * sequences + flops.per_pair * tokens) / server.ranks
        busy = max(moved / self.gpu.hbm, operations / self.gpu.peak) / assume.decode_share
        return busy + self._messages(sequences) + assume.decode_overhead

    def _messages(self, sequences: float) -> float:
        """Two all-reduces a layer."""
        ranks, fields = self.server.ranks, architecture(self.hf_config)
        if ranks == 1:
            return 0.0
        sent = 2 * (ranks - 1) / ranks * sequences * fields["hidden_size"] * 2
        each = self.assume.latency + sent / (self.gpu.nvlink * self.assume.link_share)
        return float(2 * fields["num_hidden_layers"] * each)

    def prefill(self, tokens: float) -> float:
        """Seconds of taking in prompts of so many tokens."""
        flops = PolicyFlops.of(self.hf_config).per_token * tokens / self.server.ranks
        return flops / (self.gpu.peak * self.assume.matmul_share)


@dataclass(frozen=True)
class Generated:
    """Seconds, and the most sequences that were decoded at once, on one server."""

    seconds: float
    most_at_once: int


def generate(
    prompt_tokens: int, responses: Sequence[int], at_once: int, step: Callable[[float, float], float]
) -> Generated:
    """Decode all responses, each as soon as there is room.

    Args:
        prompt_tokens: of every prompt.
        responses: tokens of each.
        at_once: most sequences that are decoded at the same time.
        step: (sequences, tokens in the cache) -> seconds of a decoding step.
    """
    waiting = list(reversed(responses))
    ends: list[int] = []  # of those that are decoded: number of the step after which it is complete
    starts: dict[int, list[int]] = {}  # end -> numbers of the first steps
    now, seconds, most = 0, 0.0, 0
    tokens = 0
    while waiting or ends:
        while waiting and len(ends) < at_once:
            length = waiting.pop()
            heapq.heappush(ends, now + length)
            starts.setdefault(now + length, []).append(now)
            tokens += prompt_tokens
        most = max(most, len(ends))
        steps = ends[0] - now
        # The cache grows by a token a sequence in every step: in the middle of them it is at its mean.
        seconds += steps * step(len(ends), tokens + len(ends) * steps / 2)
        tokens += len(ends) * steps
        now = ends[0]
        while ends and ends[0] == now:
            heapq.heappop(ends)
        tokens -= sum(prompt_tokens + now - start for start in starts.pop(now))
    return Generated(seconds, most)
