"""What makes a recipe fit that does not: other settings, each planned like the recipe itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.plan.memory import Memo
from megatron_dppo.launch.plan.plan import Plan, changed, make_plan
from megatron_dppo.models.hf.config import is_moe

_AT_ONCE = 4  # changes that are tried together, if none is enough


@dataclass(frozen=True)
class Remedy:
    """Settings to change, and what comes of it.

    Attributes:
        settings: ``key=value``; ``launch.trainer_nodes`` among them means more GPUs.
        plan: with them.
    """

    settings: tuple[str, ...]
    plan: Plan

    @property
    def fits(self) -> bool:
        """Whether this is enough."""
        return not self.plan.problems

    @property
    def excess(self) -> float:
        """Bytes that are still too many, on any GPU."""
        return sum(problem.excess for problem in self.plan.problems)


def find_remedies(plan: Plan, memo: Memo) -> list[Remedy]:
    """All single settings that are enough; else the fewest that are, one after the other the one that helps most; else what
    helps most. Empty if nothing helps.
    """
    tried = list(_tried(Remedy((), plan), memo))
    if enough := [remedy for remedy in tried if remedy.fits]:
        return enough
    best = Remedy((), plan)
    for _ in range(_AT_ONCE):
        better = min(tried, key=lambda remedy: remedy.excess, default=best)
        if better.excess >= best.excess:
            break
        best = better
        if best.fits:
            break
        tried = list(_tried(best, memo))
    return [best] if best.settings else []


def _tried(start: Remedy, memo: Memo) -> Iterator[Remedy]:
    """With one setting more, where a run would accept it."""
    for key, value in _candidates(start.plan):
        setting = start.plan.setting
        config, world_size = start.plan.config, setting.world_size
        if key == "launch.trainer_nodes":
            world_size = int(value) * setting.gpus_per_node
        else:
            config = changed(config, key, value)
        try:
            made = make_plan(
                config,
                start.plan.hf_config,
                world_size=world_size,
                gpus_per_node=setting.gpus_per_node,
                gpu=start.plan.gpu,
                assume=start.plan.assume,
                memo=memo,
            )
        except ConfigError:
            continue
        others = [other for other in start.settings if not other.startswith(f"{key}=")]
        yield Remedy((*others, f"{key}={_written(value)}"), made)


def _candidates(plan: Plan) -> Iterator[tuple[str, float | bool | str]]:
    """What may help against what is too large, the cheapest first."""
    config, where = plan.config, {problem.where for problem in plan.problems}
    if "servers" in where:
        yield "rollout.sglang.tensor_model_parallel_size", 2 * config.rollout.sglang.tensor_model_parallel_size
    if "trainer" not in where:
        return
    parallel = config.parallel
    if not parallel.use_distributed_optimizer:
        yield "parallel.use_distributed_optimizer", True
    if not config.train.fused_linear and not config.algorithm.loss.needs_rollout_logits:
        yield "train.fused_linear", True
    if config.model.recompute.granularity != "full":
        yield "model.recompute.granularity", "full"
    elif config.model.recompute.method != "uniform":
        yield "model.recompute.method", "uniform"
    elif config.model.recompute.num_layers > 1:
        yield "model.recompute.num_layers", 1
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.train.batching == "packed":
        if config.train.tokens_per_micro_batch > longest:
            yield "train.tokens_per_micro_batch", longest
    elif config.train.micro_batch_size > 1:
        yield "train.micro_batch_size", config.train.micro_batch_size // 2
    sizes = ["tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"]
    for name in (["expert_model_parallel_size"] if is_moe(plan.hf_config) else []) + sizes:
        yield f"parallel.{name}", 2 * getattr(parallel, name)
    if parallel.use_distributed_optimizer and config.model.dtype == "bf16":
        memory = config.train.optimizer_memory
        if memory.is_default:
            yield "train.optimizer_memory.first_moment", "bf16"
        if memory.first_moment == memory.second_moment == "fp32" and memory.offload_fraction < 1:
            yield "train.optimizer_memory.offload_fraction", 1.0
    yield "launch.trainer_nodes", 2 * -(-plan.setting.world_size // plan.setting.gpus_per_node)


def _written(value: float | bool | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
