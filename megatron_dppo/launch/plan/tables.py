"""A plan for people (tables) and for programs (one JSON object)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dppo.distributed.parallel_config import ParallelConfig
from megatron_dppo.launch.plan.memory import StageMemory
from megatron_dppo.launch.plan.plan import Plan
from megatron_dppo.launch.plan.remedies import Remedy
from megatron_dppo.launch.plan.search import Found


def as_json(plan: Plan, remedies: Sequence[Remedy], found: Found | None) -> dict[str, Any]:
    """All numbers: bytes and seconds."""
    servers = plan.servers
    return {
        "fits": not plan.problems,
        "problems": [problem.what for problem in plan.problems],
        "remedies": [{"settings": remedy.settings, "fits": remedy.fits} for remedy in remedies],
        "layout": layout_name(plan.config.parallel),
        "trainer_gpus": plan.setting.world_size,
        "gpu_bytes": plan.gpu.memory,
        "stages": [_stage_json(plan, stage) for stage in plan.stages],
        "servers": None
        if servers is None
        else {**dataclasses.asdict(servers), "weights": servers.weights, "tokens": servers.tokens},
        "step": None if plan.problems else _step_json(plan),
        "assumptions": dataclasses.asdict(plan.assume),
        "search": None if found is None else [_found_json(other) for other in found.plans],
    }


def _stage_json(plan: Plan, stage: StageMemory) -> dict[str, Any]:
    kept = stage.kept
    return {
        "stage": stage.index,
        "layers": stage.layers,
        "dense": kept.dense._asdict(),
        "experts": kept.experts._asdict(),
        "frozen": kept.frozen,
        "in_flight": stage.in_flight,
        "held_of_each": stage.held,
        "running": stage.running,
        "head": stage.head,
        "sync_buffers": stage.sync,
        "embedded_cache": plan.embedded_cache,
        "groups": dataclasses.asdict(kept.groups),
        "on_device": plan.on_device(stage),
    }


def _step_json(plan: Plan) -> dict[str, Any]:
    step = plan.step
    return {
        "phases": step.phases,
        "within_update": step.within_update,
        "total": step.total,
        "tokens": step.tokens,
        "tokens_per_s": step.tokens_per_s,
        "tokens_per_s_per_gpu": step.tokens_per_s / step.gpus,
        "update_mfu": step.update_mfu,
        "at_once": step.at_once,
        "idle_servers": step.idle_servers,
    }


def _found_json(plan: Plan) -> dict[str, Any]:
    return {
        "layout": layout_name(plan.config.parallel),
        "parallel": dataclasses.asdict(plan.config.parallel),
        "total": plan.step.total,
        "update": plan.step.phases["update"],
        "on_device": max(map(plan.on_device, plan.stages)),
    }


def print_plan(plan: Plan, remedies: Sequence[Remedy], found: Found | None, console: Console) -> None:
    """All of it."""
    console.print(
        f"{plan.setting.world_size} trainer GPUs of {plan.gpu.memory / 1e9:.0f} GB, {plan.setting.gpus_per_node} a node:"
        f" {layout_name(plan.config.parallel)}, {plan.setting.world_size // plan.config.parallel.replica_size} replicas"
    )
    console.print(_memory_table(plan))
    _print_groups(plan, console)
    _print_servers(plan, console)
    if plan.problems:
        for problem in plan.problems:
            console.print(f"[bold]does not fit:[/bold] {problem.what}")
        for remedy in remedies:
            console.print(f"  {_advice(remedy)}")
        if not remedies:
            console.print("  no setting that was tried helps: a larger GPU, or shorter sequences")
    else:
        _print_step(plan, console)
    if found is not None:
        _print_found(plan, found, console)
    _print_assumptions(plan, console)


def layout_name(parallel: ParallelConfig) -> str:
    """In short: ``TP 4, PP 2 (23 + 2 x 24 + 23 layers), EP 8``; sizes of 1 are left out."""
    names = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": parallel.chunks_per_stage,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_size if parallel.expert_model_parallel_size > 1 else 1,
    }
    return ", ".join(f"{name} {size}" for name, size in names.items() if size > 1) or "data parallel"


def _memory_table(plan: Plan) -> Table:
    rows: dict[str, list[float]] = {}
    for stage in plan.stages:
        kept = stage.kept
        parts = {
            "weights, dense": kept.dense.weights,
            "weights, experts": kept.experts.weights,
            "gradients, dense": kept.dense.gradients,
            "gradients, experts": kept.experts.gradients,
            "optimizer state, dense": kept.dense.optimizer,
            "optimizer state, experts": kept.experts.optimizer,
            "frozen copies of weights": kept.frozen,
            "micro-batches that wait": stage.held * (stage.in_flight - 1),
            "micro-batch that runs, held": stage.held,
            "  beside it, at most": stage.running - stage.held,
            "  (output layer, logits or tiles, loss: at most)": stage.head,
            "(weight-sync buffers: not with micro-batches)": stage.sync,
            "KV cache of the embedded engine": plan.embedded_cache,
            "NCCL's buffers": len(kept.groups.tensors) * plan.assume.group_bytes,
            "reserve and fragmentation": plan.assume.memory_reserve
            + plan.assume.fragmentation * (stage.total + plan.embedded_cache),
        }
        for name, value in parts.items():
            rows.setdefault(name, []).append(float(value))
        rows.setdefault("all", []).append(plan.on_device(stage))
        rows.setdefault("(host memory: optimizer state)", []).append(kept.dense.on_host + kept.experts.on_host)
    titles = [f"stage {stage.index} ({stage.layers} layers)" for stage in plan.stages]
    table = Table("GB on a GPU of", *(titles if len(titles) > 1 else ["every rank"]))
    for name, values in rows.items():
        if any(values):
            table.add_row(name, *(f"{value / 1e9:.2f}" for value in values), end_section=name.startswith("reserve"))
    return table


def _print_groups(plan: Plan, console: Console) -> None:
    for stage in plan.stages[:1]:
        groups = stage.kept.groups
        sizes = ", ".join(map(str, sorted(groups.tensors, reverse=True)))
        sockets = sum(size - 1 for size in groups.values)
        console.print(
            f"process groups of a rank: {len(groups.tensors)} over NCCL (of {sizes} ranks), {len(groups.values)} over gloo"
            f" with {sockets} sockets"
        )


def _print_servers(plan: Plan, console: Console) -> None:
    servers = plan.servers
    if servers is None:
        return
    rollout = plan.config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    source = "the recipe's" if servers.from_recipe else "assumed"
    console.print(
        f"{servers.count} servers of {servers.ranks} GPUs: {servers.weights / 1e9:.1f} GB of weights on each GPU,"
        f" {max(0.0, servers.room) / 1e9:.1f} GB for the KV cache ({source} share {servers.fraction:g}):"
        f" {servers.tokens} tokens, {servers.sequences(longest)} sequences of {longest},"
        f" {servers.sequences(longest / 4)} of {longest // 4}"
    )


def _print_step(plan: Plan, console: Console) -> None:
    step = plan.step
    table = Table("phase", "seconds", "of the step")
    for name, seconds in step.phases.items():
        table.add_row(name, f"{seconds:.1f}", f"{seconds / step.total:.0%}")
        if name == "update":
            for part, share in step.within_update.items():
                table.add_row(f"  {part}", f"{share:.1f}", "")
    table.add_row("all", f"{step.total:.1f}", "")
    console.print(table)
    console.print(
        f"{step.tokens} tokens a step, {step.tokens_per_s:.0f} a second, {step.tokens_per_s / step.gpus:.0f} on each of"
        f" {step.gpus} GPUs; MFU of the update {step.update_mfu:.1%}; a server decodes up to {step.at_once} sequences at once"
    )
    if step.idle_servers:
        console.print(
            f"{step.idle_servers} servers have nothing to do: a step has {plan.config.rollout.prompts_per_step} prompts"
            f" (rollout.prompts_per_step) of {plan.config.rollout.samples_per_prompt} samples"
        )


def _advice(remedy: Remedy) -> str:
    settings, worst = " ".join(remedy.settings), max(map(remedy.plan.on_device, remedy.plan.stages))
    if remedy.fits:
        return f"{settings}: fits, {worst / 1e9:.1f} GB on the fullest GPU of the trainer"
    return f"{settings}: helps most, and is not enough: {worst / 1e9:.1f} GB on the fullest GPU of the trainer"


def _print_found(plan: Plan, found: Found, console: Console) -> None:
    table = Table("layout", "step s", "update s", "GB on the fullest GPU", "MFU of the update")
    for other in found.plans[:10]:
        worst = max(map(other.on_device, other.stages))
        mark = " (the recipe's)" if other.config.parallel == plan.config.parallel else ""
        table.add_row(
            layout_name(other.config.parallel) + mark,
            f"{other.step.total:.1f}",
            f"{other.step.phases['update']:.1f}",
            f"{worst / 1e9:.1f}",
            f"{other.step.update_mfu:.1%}",
        )
    console.print(table)
    console.print(
        f"{len(found.plans)} layouts fit; {found.too_large} do not, {found.refused} the trainer refuses. Not searched:"
        " VPP, ETP"
    )


def _print_assumptions(plan: Plan, console: Console) -> None:
    console.print(
        f"GPU: {plan.gpu.source}; peak {plan.gpu.peak / 1e12:.0f} TFLOP/s in bf16. Assumed (--assume name=value):"
    )
    values = [f"{name}={value:g}" for name, value in dataclasses.asdict(plan.assume).items()]
    console.print("  " + " ".join(values))
