"""The plan of one recipe: what each kind of rank holds, whether it fits, how long a step takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig

from megatron_dppo.launch.plan.hardware import Assumptions, Gpu
from megatron_dppo.launch.plan.memory import Memo, StageMemory, memory_of_stages
from megatron_dppo.launch.plan.rank_plan import Setting, with_plain_messages, without_transformer_engine
from megatron_dppo.launch.plan.servers import ServerPlan, kv_bytes_per_token, planned_servers
from megatron_dppo.launch.plan.step_time import StepTime, Timing
from megatron_dppo.training.config.check import check_config
from megatron_dppo.training.config.optimizer_memory import OptimizerMemoryConfig
from megatron_dppo.training.config.schema import MODEL_DTYPES, Config


@dataclass(frozen=True)
class Problem:
    """Something that is too large.

    Attributes:
        what: it is.
        where: trainer | servers.
        excess: bytes on a GPU that there are not.
    """

    what: str
    where: str
    excess: float


@dataclass(frozen=True)
class Plan:
    """Of a configuration that has passed the trainer's own checks."""

    config: Config
    hf_config: PretrainedConfig
    setting: Setting
    gpu: Gpu
    assume: Assumptions
    stages: Sequence[StageMemory]

    def on_device(self, stage: StageMemory) -> float:
        """Bytes of a GPU of that stage: tensors, what the allocator and NCCL hold, what is set aside."""
        groups = len(stage.kept.groups.tensors) * self.assume.group_bytes
        tensors = stage.total + self.embedded_cache
        return tensors * (1 + self.assume.fragmentation) + groups + self.assume.memory_reserve

    @property
    def embedded_cache(self) -> float:
        """Bytes of the embedded engine's KV cache on each rank of a replica; it may be there when updates begin."""
        rollout, parallel = self.config.rollout, self.config.parallel
        if rollout.engine != "embedded":
            return 0.0
        itemsize = MODEL_DTYPES[self.config.model.dtype].itemsize
        per_token = kv_bytes_per_token(self.hf_config, parallel.tensor_model_parallel_size, itemsize)
        longest = rollout.max_prompt_tokens + rollout.max_response_tokens
        return rollout.max_batch_size * longest * per_token / parallel.pipeline_model_parallel_size

    @cached_property
    def servers(self) -> ServerPlan | None:
        """None with the embedded engine."""
        beside = 0.0
        if self.config.rollout.sglang.colocated:
            beside = max(stage.kept.weights for stage in self.stages) + self.assume.memory_reserve
        return planned_servers(self.config, self.hf_config, self.gpu, self.assume, beside)

    @cached_property
    def problems(self) -> list[Problem]:
        """None: it fits."""
        found = []
        worst = max(self.stages, key=self.on_device)
        if (excess := self.on_device(worst) - self.gpu.memory) > 0:
            what = (
                f"stage {worst.index} of the trainer needs {self.on_device(worst) / 1e9:.1f} GB of a GPU's"
                f" {self.gpu.memory / 1e9:.0f} GB ({worst.kept.total / 1e9:.1f} GB weights, gradients and optimizer state,"
                f" {worst.working / 1e9:.1f} GB micro-batches)"
            )
            found.append(Problem(what, "trainer", excess))
        longest = self.config.rollout.max_prompt_tokens + self.config.rollout.max_response_tokens
        if self.servers is not None and self.servers.tokens < longest:
            what = (
                f"a server's GPU holds {self.servers.weights / 1e9:.1f} GB of weights and has"
                f" {max(0.0, self.servers.room) / 1e9:.1f} GB left for its KV cache: {self.servers.tokens} tokens, less than"
                f" one sequence of {longest}"
            )
            found.append(Problem(what, "servers", longest * self.servers.kv_bytes - self.servers.room))
        return found

    @cached_property
    def step(self) -> StepTime:
        """How long a step takes. Only of a plan that fits."""
        return Timing(
            self.config, self.hf_config, self.setting, self.gpu, self.assume, self.stages, self.servers
        ).step()


def make_plan(
    config: Config,
    hf_config: PretrainedConfig,
    *,
    world_size: int,
    gpus_per_node: int,
    gpu: Gpu,
    assume: Assumptions,
    memo: Memo | None = None,
) -> Plan:
    """Raises ConfigError where a run would refuse to start, but for what only the run's own machine can tell."""
    anywhere = changed(changed(config, "train.kernel_backend", "auto"), "rollout.sglang.python", None)
    anywhere = changed(anywhere, "parallel", with_plain_messages(config.parallel))
    anywhere = changed(anywhere, "model", without_transformer_engine(config.model))
    memory = config.train.optimizer_memory
    memory.check(  # of GPUs, whatever is here
        dtype=config.model.dtype,
        distributed=config.parallel.use_distributed_optimizer,
        device="cuda",
        beta2=config.train.optimizer.adam_beta2,
        transformer_engine=None,
    )
    anywhere = changed(anywhere, "train.optimizer_memory", OptimizerMemoryConfig())
    check_config(anywhere, hf_config, world_size)
    setting = Setting(world_size, gpus_per_node, assume.prompt_tokens, assume.expert_load)
    return Plan(config, hf_config, setting, gpu, assume, memory_of_stages(config, hf_config, setting, memo))


def changed(config: Config, key: str, value: Any) -> Config:
    """A copy in which ``key`` (``section.name``) has another value."""

    def of(section: Any, names: list[str]) -> Any:
        inner = of(getattr(section, names[0]), names[1:]) if len(names) > 1 else value
        return replace(section, **{names[0]: inner})

    assert dataclasses.is_dataclass(config)
    result: Config = of(config, key.split("."))
    return result
