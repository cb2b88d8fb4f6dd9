"""Seconds of a training step, phase by phase. Phases follow each other, as in a run, and nothing in one of them overlaps but
what a weight update does (sync_cost.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from megatron_dppo.launch.plan.generation import Decoding, generate
from megatron_dppo.launch.plan.hardware import Assumptions, Gpu
from megatron_dppo.launch.plan.lengths import Lengths
from megatron_dppo.launch.plan.memory import StageMemory
from megatron_dppo.launch.plan.rank_plan import Pass, Setting
from megatron_dppo.launch.plan.servers import ServerPlan, kv_bytes_per_token, parameters_of
from megatron_dppo.launch.plan.sync_cost import Rates, planned_sync
from megatron_dppo.launch.plan.trace import Times, message, message_time
from megatron_dppo.models.flops import PolicyFlops
from megatron_dppo.models.hf.config import architecture, is_moe
from megatron_dppo.rollout.sglang.dispatch import samples_together
from megatron_dppo.training.config.schema import MODEL_DTYPES, Config
from megatron_dppo.training.data.schedule import PADDING, PlannedMicroBatch, Scheduler

_SEED = 0
# Bytes of a parameter that an optimizer step reads and writes: the gradient zeroed, and read to see whether it is finite;
# of those that the rank updates itself: norm, Adam's gradient, bf16 weight; beside these its state, read and written.
_GRADIENT_TRAFFIC, _UPDATE_TRAFFIC = 8, 4 + 4 + 2
_OVER_PCIE = 4 + 4  # of those that the CPU updates: the gradient, and the new weight back, in fp32


@dataclass(frozen=True)
class StepTime:
    """Seconds of each phase, and what they come to.

    Attributes:
        phases: generate, score, hand-over, update, optimizer, sync; make room and put away, if the GPUs are shared.
        within_update: of the slowest stage: products, attention, everything else, messages, waiting for others.
        tokens: of the step, prompts included.
        gpus: trainer's and servers', each counted once.
        operations: forward and backward of all sequences, nothing twice.
        peak: of a GPU.
        trainer_gpus: of ``gpus``.
        at_once: most sequences that a server decodes at the same time.
        idle_servers: that get nothing: there are more of them than samples.
    """

    phases: dict[str, float]
    within_update: dict[str, float]
    tokens: int
    gpus: int
    operations: float
    peak: float
    trainer_gpus: int
    at_once: int
    idle_servers: int

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.phases.values())

    @property
    def tokens_per_s(self) -> float:
        """Prompts and responses, over the whole step."""
        return self.tokens / self.total

    @property
    def update_mfu(self) -> float:
        """Share of the trainer's GPUs' peak in updates and optimizer steps."""
        seconds = self.phases["update"] + self.phases["optimizer"]
        return self.operations / (seconds * self.trainer_gpus * self.peak)


@dataclass(frozen=True)
class Timing:
    """What all phases are worked out from."""

    config: Config
    hf_config: PretrainedConfig
    setting: Setting
    gpu: Gpu
    assume: Assumptions
    stages: Sequence[StageMemory]
    servers: ServerPlan | None

    @property
    def replicas(self) -> int:
        """Copies of the dense weights."""
        return self.setting.world_size // self.config.parallel.replica_size

    def step(self, sync_rates: Rates | None = None) -> StepTime:
        """Of a rollout batch, its responses as long as is assumed."""
        rollout, colocated = self.config.rollout, self.config.rollout.sglang.colocated
        prompt = min(self.assume.prompt_tokens, rollout.max_prompt_tokens)
        assume = self.assume
        drawn = Lengths(assume.response_median, assume.response_sigma, assume.prompt_sigma, assume.prompt_tokens)
        lengths = drawn.draw(rollout, torch.Generator().manual_seed(_SEED))
        generating, at_once = self._generating(prompt, [length - prompt for length in lengths.values()])
        update, within = self._updating(lengths)
        phases = {
            "generate": generating,
            "score": len(lengths) / self.replicas * assume.score_s / self.config.tasks.score_workers,
            "hand-over": self._handing_over(lengths),
            **({"make room": self._moving()} if colocated else {}),
            "update": update,
            "optimizer": self._optimizing(),
            **({"put away": self._moving()} if colocated else {}),
            "sync": self._syncing(sync_rates),
        }
        flops = PolicyFlops.of(self.hf_config)
        serving = 0 if self.servers is None or colocated else self.servers.count * self.servers.ranks
        return StepTime(
            phases=phases,
            within_update=within,
            tokens=sum(lengths.values()),
            gpus=self.setting.world_size + serving,
            operations=sum(map(flops.training, lengths.values())),
            peak=self.gpu.peak,
            trainer_gpus=self.setting.world_size,
            at_once=at_once,
            idle_servers=0 if self.servers is None else self.servers.count - self._busy(self.servers),
        )

    def _generating(self, prompt: int, responses: list[int]) -> tuple[float, int]:
        """(seconds of the slowest server, sequences at once). With the embedded engine every replica is a server."""
        rollout = self.config.rollout
        server = self.servers
        if server is None:
            ranks = self.config.parallel.replica_size
            dense, experts = parameters_of(self.hf_config)
            itemsize = MODEL_DTYPES[self.config.model.dtype].itemsize
            kv_bytes = kv_bytes_per_token(self.hf_config, ranks, itemsize)
            parts = dense * itemsize / ranks, experts * itemsize / ranks
            server = ServerPlan(self.replicas, ranks, *parts, kv_bytes, room=math.inf, fraction=1.0, from_recipe=True)
            room: float = rollout.max_batch_size
        else:
            asked = rollout.sglang.max_concurrent_requests * self.replicas / self._busy(server)
            room = min(asked, server.tokens / (prompt + statistics.fmean(responses)))
        decoding = Decoding(server, self.hf_config, self.gpu, self.assume)
        together = self._together(server)
        groups = [responses[first : first + together] for first in range(0, len(responses), together)]
        slowest, most = 0.0, 0
        for index in range(self._busy(server)):
            own = groups[index :: server.count]  # one after the other, to whoever has the least to do
            lengths = [length for group in own for length in group]
            made = generate(prompt, lengths, max(1, int(room)), decoding.step)
            seconds = made.seconds + decoding.prefill(len(own) * prompt)
            slowest, most = max(slowest, seconds), max(most, made.most_at_once)
        return slowest, most

    def _together(self, server: ServerPlan) -> int:
        rollout = self.config.rollout
        return samples_together(server.count, rollout.prompts_per_step, rollout.samples_per_prompt)

    def _busy(self, server: ServerPlan) -> int:
        """Servers that get something to do."""
        rollout = self.config.rollout
        groups = rollout.prompts_per_step * -(-rollout.samples_per_prompt // self._together(server))
        return min(server.count, groups)

    def _handing_over(self, lengths: Mapping[int, int]) -> float:
        """Samples go from the replica that made them to the one that learns from them, to each of its ranks."""
        algorithm, hf_config = self.config.algorithm, self.hf_config
        per_token = 8.0 + (8 * algorithm.topk if algorithm.loss.needs_topk else 0)  # id, log-prob
        if algorithm.routing_replay and is_moe(hf_config):
            per_token += hf_config.num_hidden_layers * hf_config.num_experts_per_tok
        share = sum(lengths.values()) / self.replicas * (1 - 1 / self.replicas)
        return share * per_token * self.config.parallel.replica_size / self.assume.host_network

    def _updating(self, lengths: Mapping[int, int]) -> tuple[float, dict[str, float]]:
        """All forward and backward passes of a rollout batch, and what the time goes into."""
        config = self.config
        scheduler = Scheduler(config.train, config.parallel, self.replicas, PolicyFlops.of(self.hf_config).training)
        coupled = config.parallel.expert_model_parallel_size > 1
        slowest = max((self._largest(stage) for stage in self.stages), key=sum)
        total, parts = 0.0, Times(0.0, 0.0, 0.0, 0.0)
        for schedule in scheduler.schedules(lengths, config.train.updates_per_rollout):
            costs = [
                [self._scaled(slowest, planned, lengths) for planned in micro_batches]
                for micro_batches in schedule.replicas
            ]
            seconds = [[sum(cost) for cost in of_replica] for of_replica in costs]
            together = sum(map(max, zip(*seconds, strict=True))) if coupled else max(map(sum, seconds))
            mean = together / len(seconds[0])
            fill = (config.parallel.pipeline_model_parallel_size - 1) / config.parallel.chunks_per_stage
            total += together + fill * mean
            for cost in (cost for of_replica in costs for cost in of_replica):
                parts = Times(*(so_far + part / self.replicas for so_far, part in zip(parts, cost, strict=True)))
        names = ("products", "attention", "other", "messages")
        within = dict(zip(names, parts, strict=True))
        return total, {**within, "waiting": max(0.0, total - sum(parts))}

    def _largest(self, stage: StageMemory) -> Times:
        """The largest micro-batch through a stage, forward and backward."""
        traced, chunks = stage.traced, self.config.parallel.chunks_per_stage
        passes, plain = ([self._times(one) for one in found] for found in (traced.passes, traced.plain))
        of_plain = zip(*plain, strict=True) if plain else [()] * len(Times._fields)
        times = Times(*(chunks * traced.whole(p, q) for p, q in zip(zip(*passes, strict=True), of_plain, strict=True)))
        return times._replace(messages=times.messages + chunks * self._between_stages(traced.tokens))

    def _times(self, one: Pass) -> Times:
        """Forward and backward."""
        forward, backward = (work.times(self.gpu, self.assume) for work in (one.forward, one.backward))
        return Times(*(a + b for a, b in zip(forward, backward, strict=True)))

    def _between_stages(self, tokens: int) -> float:
        """Hidden states forward and their gradients backward, to the rank at the same place on the next stage."""
        parallel = self.config.parallel
        if parallel.pipeline_model_parallel_size == 1:
            return 0.0
        split = parallel.tensor_model_parallel_size if parallel.uses_sequence_parallel else 1
        sent = (
            tokens
            / split
            * architecture(self.hf_config)["hidden_size"]
            * MODEL_DTYPES[self.config.model.dtype].itemsize
        )
        distance = self.setting.world_size // parallel.pipeline_model_parallel_size
        neighbour = message(sent, [0, distance], self.setting.gpus_per_node, 0)
        return 2 * message_time(neighbour, self.gpu, self.assume)

    def _scaled(self, largest: Times, planned: PlannedMicroBatch, lengths: Mapping[int, int]) -> Times:
        """A micro-batch beside the largest there can be: by its tokens, and attention by its pairs of tokens."""
        config = self.config
        own = [lengths[number] for number in planned.sequences if number != PADDING]
        longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        if config.train.batching == "packed":
            budget = config.train.tokens_per_micro_batch
            whole, tokens = float(budget), float(planned.row_length)
            most = budget // longest * longest**2 + (budget % longest) ** 2
            pairs = sum(length**2 for length in own)
        else:
            whole = float(config.train.micro_batch_size * longest)
            tokens = float(len(planned.sequences) * planned.row_length)
            most = config.train.micro_batch_size * longest**2
            pairs = len(planned.sequences) * planned.row_length**2
        scaled = Times(*(part * tokens / whole for part in largest))
        return scaled._replace(attention=largest.attention * pairs / most)

    def _optimizing(self) -> float:
        """Gradients are summed over replicas, weights updated and gathered: in each optimizer step, on the slowest stage."""
        return self.config.train.updates_per_rollout * max(self._optimizer_step(stage) for stage in self.stages)

    def _optimizer_step(self, stage: StageMemory) -> float:
        parallel = self.config.parallel
        sharded = parallel.use_distributed_optimizer
        dense, experts = stage.kept.dense, stage.kept.experts
        per_stage = self.setting.world_size // parallel.pipeline_model_parallel_size
        expert_size = parallel.expert_model_parallel_size * parallel.expert_tensor_size
        seconds = 0.0
        for share, stride in ((dense, parallel.tensor_model_parallel_size), (experts, expert_size)):
            ranks = range(0, per_stage, stride)
            reduced = (1 if sharded else 2) * share.gradients + (share.weights if sharded else 0)
            if share.parameters and len(ranks) > 1:
                sent = reduced * (1 - 1 / len(ranks))
                seconds += message_time(message(sent, ranks, self.setting.gpus_per_node, 0), self.gpu, self.assume)
            memory = self.config.train.optimizer_memory
            of_state = 2 * memory.bytes_per_parameter(self.config.model.dtype)
            by_cpu = share.updated * memory.offload_fraction
            by_gpu = share.updated - by_cpu
            traffic = share.parameters * _GRADIENT_TRAFFIC + by_gpu * (_UPDATE_TRAFFIC + of_state)
            seconds += traffic / (self.gpu.hbm * self.assume.hbm_share)
            seconds += by_cpu * max(
                _OVER_PCIE / self.assume.pcie, (_UPDATE_TRAFFIC + of_state) / self.assume.host_memory
            )
        return seconds

    def _moving(self) -> float:
        """Optimizer state to host memory, or back."""
        moved = [s.kept.dense.optimizer + s.kept.experts.optimizer + s.kept.frozen for s in self.stages]
        return max(moved) / self.assume.pcie

    def _syncing(self, rates: Rates | None) -> float:
        if self.servers is None:
            return 0.0
        rates = rates or Rates(network=self.assume.network)
        return planned_sync(self.config, self.hf_config).forecast(self.servers.ranks, rates).total
