"""Bytes on each distinct rank of the trainer. Ranks of one pipeline stage hold the same, so there is one for each stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from megatron_dppo.launch.plan.largest_batch import replayed_bytes
from megatron_dppo.launch.plan.rank_plan import TRACED_LAYERS, Kept, Pass, Setting, Stage, kept, traced_pass
from megatron_dppo.training.config.recompute import RecomputeConfig
from megatron_dppo.training.config.schema import Config

_BUCKETS_OF_SENDER = 6.5  # the most that was measured (docs/weight_sync.md)
_BUCKETS_ON_SHARED_GPU = 3  # two of its own, and the messages of one more (docs/colocation.md)


@dataclass(frozen=True)
class TracedChunk:
    """A micro-batch through two numbers of layers (or through all, if they are few), and what is to be made of that.

    Attributes:
        passes: through each of ``depths`` layers.
        plain: likewise with nothing recomputed, if some layers are not (``model.recompute.method=block``); else empty.
        depths: numbers of layers, one or two.
        layers: that the chunk has.
        plain_layers: of them, that are not recomputed although others are.
    """

    passes: list[Pass]
    plain: list[Pass]
    depths: tuple[int, ...]
    layers: int
    plain_layers: int

    @property
    def tokens(self) -> int:
        """Of the micro-batch."""
        return self.passes[0].tokens

    def whole(self, values: Sequence[float], plain: Sequence[float] = ()) -> float:
        """What a figure is for the whole chunk: a straight line through what it is of ``passes``, and of ``plain``. Without
        the latter: for the chunk without its plain layers.
        """
        if len(values) == 1:
            return values[0]
        step = self.depths[1] - self.depths[0]
        result = values[0] + (values[1] - values[0]) / step * (self.layers - self.plain_layers - self.depths[0])
        return result + ((plain[1] - plain[0]) / step * self.plain_layers if plain else 0.0)


@dataclass(frozen=True)
class StageMemory:
    """Of the ranks of a pipeline stage; bytes but for what says otherwise.

    Attributes:
        index: of the stage.
        layers: of all its chunks.
        kept: weights, gradients, optimizer state.
        in_flight: micro-batches, or parts of them in a chunk of layers, between forward and backward at the same time.
        held: of each of these, but for the one that runs.
        running: of the micro-batch that runs, at most.
        head: most that output layer and loss take beside what is held; the layers' backward pass may take more.
        sync: weight-sync buffers; not at the same time as micro-batches.
        traced: a micro-batch through a few layers, for whoever wants to know how long it takes.
    """

    index: int
    layers: int
    kept: Kept
    in_flight: int
    held: float
    running: float
    head: float
    sync: float
    traced: TracedChunk

    @property
    def working(self) -> float:
        """Most bytes beside what is kept."""
        return max(self.held * (self.in_flight - 1) + self.running, self.sync)

    @property
    def total(self) -> float:
        """Most bytes in tensors."""
        return self.kept.total + self.working


@dataclass
class Memo:
    """What was worked out, for other configurations that have it in common."""

    known: dict[Hashable, Any] = field(default_factory=dict)

    def of(self, key: Hashable, make: Any) -> Any:
        """``make()``, once for each key."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]


def memory_of_stages(
    config: Config, hf_config: PretrainedConfig, setting: Setting, memo: Memo | None = None
) -> list[StageMemory]:
    """Of every pipeline stage, in order. The configuration has been checked (training/config/check.py)."""
    memo = memo or Memo()
    stages = config.parallel.pipeline_model_parallel_size
    layers = config.parallel.layers_of_stages(hf_config.num_hidden_layers)
    return [_of_stage(config, hf_config, setting, memo, index, layers[index]) for index in range(stages)]


def _of_stage(
    config: Config, hf_config: PretrainedConfig, setting: Setting, memo: Memo, index: int, layers: int
) -> StageMemory:
    parallel = config.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.chunks_per_stage
    stage = Stage(index == 0, index == stages - 1)
    holds = memo.of(
        (parallel, setting.world_size, stage, layers, _model(config), repr(config.train.optimizer_memory)),
        lambda: kept(config, hf_config, setting.world_size, index * setting.world_size // stages, setting.as_on_cuda),
    )
    traced = traced_chunk(config, hf_config, setting, memo, stage, layers // chunks)
    held, running, head = (
        traced.whole([getattr(one, name) for one in traced.passes], [getattr(one, name) for one in traced.plain])
        for name in ("held", "peak", "head")
    )
    if traced.plain:
        # Backward begins with the layers that are not recomputed, and has freed them when it comes to the others.
        others = held + max(one.peak - one.held for one in traced.plain)
        running = max(others, traced.whole([one.peak for one in traced.passes]))
    replayed = replayed_bytes(config, hf_config, traced.tokens, layers)
    return StageMemory(
        index=index,
        layers=layers,
        kept=holds,
        in_flight=micro_batches_in_flight(stages, chunks, index),
        held=held + replayed / chunks,
        running=running + replayed / chunks,
        head=head,
        sync=_sync_bytes(config),
        traced=traced,
    )


def traced_chunk(
    config: Config, hf_config: PretrainedConfig, setting: Setting, memo: Memo, stage: Stage, layers: int
) -> TracedChunk:
    """The largest micro-batch through a chunk of ``layers`` layers, by way of fewer."""
    recompute = config.model.recompute
    runs = recompute.num_layers if recompute.granularity == "full" and recompute.method == "uniform" else 1
    depths = tuple(depth * runs for depth in TRACED_LAYERS)  # of whole runs of layers that are recomputed together
    if layers <= depths[-1]:
        return TracedChunk(_passes(config, hf_config, setting, memo, stage, (layers,)), [], (layers,), layers, 0)
    plain_layers = 0
    if recompute.granularity == "full" and recompute.method == "block":
        plain_layers = layers - min(recompute.num_layers, layers)
    if not plain_layers:
        return TracedChunk(_passes(config, hf_config, setting, memo, stage, depths), [], depths, layers, 0)
    of_block, of_others = (
        _passes(changed_recompute(config, granularity), hf_config, setting, memo, stage, depths)
        for granularity in ("full", "none")
    )
    return TracedChunk(of_block, of_others, depths, layers, plain_layers)


def changed_recompute(config: Config, granularity: str) -> Config:
    """With every layer recomputed by itself, or none."""
    return dataclasses.replace(config, model=replace(config.model, recompute=RecomputeConfig(granularity)))


def _passes(
    config: Config,
    hf_config: PretrainedConfig,
    setting: Setting,
    memo: Memo,
    stage: Stage,
    depths: tuple[int, ...],
) -> list[Pass]:
    parallel = replace(
        config.parallel,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
    )
    rollout = (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens)
    train = (config.train.batching, config.train.tokens_per_micro_batch, config.train.micro_batch_size)
    where = dataclasses.replace(setting, world_size=0)
    key = (parallel, where, rollout, train, config.train.fused_linear, _model(config), stage)
    return [
        memo.of((key, depth), lambda depth=depth: traced_pass(config, hf_config, setting, stage, depth))
        for depth in depths
    ]


def _model(config: Config) -> Hashable:
    """What of the configuration decides about a rank's model beside its layout."""
    model, loss = config.model, config.algorithm.loss
    return model.dtype, model.fp32_head, repr(model.recompute), repr(model.overrides), loss, config.algorithm.topk


def micro_batches_in_flight(stages: int, chunks: int, index: int) -> int:
    """How many forward passes of a stage (through one of its chunks) wait for their backward, the one that runs included.

    Of Megatron's schedules with more micro-batches than stages: one forward, one backward; interleaved with several chunks.
    """
    if stages == 1:
        return 1
    if chunks == 1:
        return stages - index
    return 2 * (stages - index - 1) + (chunks - 1) * stages + 1


def _sync_bytes(config: Config) -> float:
    sglang = config.rollout.sglang
    if config.rollout.engine != "sglang":
        return 0.0
    return (_BUCKETS_ON_SHARED_GPU if sglang.colocated else _BUCKETS_OF_SENDER) * sglang.bucket_bytes
