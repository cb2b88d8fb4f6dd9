"""The environment of a job's processes, with the reason for each variable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dppo.launch.config import Recipe

TRAINER, SERVER = "trainer", "server"


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        name: of the variable.
        value: as the process sees it.
        reason: why it is set, one line.
    """

    name: str
    value: str
    reason: str


def job_environment(recipe: Recipe, role: str, folder: Path) -> tuple[Variable, ...]:
    """What processes of a role (TRAINER, SERVER) get, beyond what the job's submitter has.

    ``folder``: of the launch, where evidence of hanging collectives is left.
    """
    known = [*_everywhere(), *(_of_trainer() if role == TRAINER else ())]
    if recipe.launch.gpus_per_node:
        known += _on_gpus(recipe, role, folder)
    own = recipe.launch.env
    kept = [variable for variable in known if variable.name not in own]
    given = [Variable(name, value, "launch.env") for name, value in own.items() if value is not None]
    return (*kept, *given)


def _everywhere() -> list[Variable]:
    return [Variable("PYTHONUNBUFFERED", "1", "what a process said last is in its log even if it is killed")]


def _of_trainer() -> list[Variable]:
    return [
        Variable("OMP_NUM_THREADS", "1", "ranks share the cores of a host, and scoring workers want some of them"),
        Variable(
            "TOKENIZERS_PARALLELISM", "false", "the tokenizer's threads do not survive the forks of checkpoint writers"
        ),
    ]


def _on_gpus(recipe: Recipe, role: str, folder: Path) -> list[Variable]:
    sglang = recipe.rollout.sglang
    variables = []
    if recipe.rollout.engine == "sglang":
        variables.append(
            Variable(
                "NCCL_CUMEM_ENABLE",
                "0",
                "SGLang sets 0 for its own processes; ranks of one NCCL group, that of weight updates, must agree",
            )
        )
    if role == SERVER:
        return variables
    variables.append(
        Variable(
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "1",
            "one hardware queue keeps the order in which Megatron starts communication before the computation it overlaps",
        )
    )
    # Servers that the trainer starts inherit it. Colocated ones cannot give such memory up; it cannot be shared by handle.
    if not (recipe.rollout.engine == "sglang" and sglang.starts_servers_here and not recipe.launch.server_nodes):
        variables.append(
            Variable(
                "PYTORCH_CUDA_ALLOC_CONF",
                "expandable_segments:True",
                "packed micro-batches differ in size: blocks that grow do not fragment the memory",
            )
        )
    return [
        *variables,
        Variable("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000", "collectives that each rank remembers for the dump below"),
        Variable(
            "TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "when a collective times out, every rank writes what it was waiting for"
        ),
        Variable(
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "nccl_trace_rank_"), "where; the rank's number is appended"
        ),
    ]
