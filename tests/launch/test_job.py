"""What a job is made of, and what is refused before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.environment import SERVER, TRAINER
from megatron_dppo.launch.job import Job, describe
from tests.launch.jobs import job_on_gpus, on_gpus, quickstart


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        ((), 2),  # TP 2, EP 2
        (("launch.trainer_nodes=2",), 1),
        (("parallel.pipeline_model_parallel_size=2",), 4),
        (("parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=4"), 4),
        (("launch.processes_per_node=6",), 6),
        (("launch.gpus_per_node=8",), 8),
        (("launch.gpus_per_node=8", "rollout.engine=sglang", "rollout.sglang.num_servers=4"), 4),  # beside four servers
        (("launch.gpus_per_node=8", "rollout.engine=sglang", "rollout.sglang.colocated=true"), 8),
    ],
)
def test_trainer_processes_of_a_node(overrides: tuple[str, ...], processes: int) -> None:
    assert describe(quickstart(*overrides)).processes_per_node == processes


@pytest.mark.parametrize(
    ("overrides", "servers_per_node", "nodes_per_server"),
    [
        ((), 2, 1),
        (("rollout.sglang.num_servers=1",), 1, 1),
        (("rollout.sglang.num_servers=4", "launch.server_nodes=2"), 2, 1),
        (("rollout.sglang.tensor_model_parallel_size=16", "launch.server_nodes=4"), 1, 2),
    ],
)
def test_servers_of_a_node(overrides: tuple[str, ...], servers_per_node: int, nodes_per_server: int) -> None:
    serving = job_on_gpus(*overrides).serving
    assert serving is not None
    assert (serving.servers_per_node, serving.nodes_per_server) == (servers_per_node, nodes_per_server)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("launch.trainer_nodes=3", "launch.processes_per_node=1"), "does not divide the 3 ranks"),
        (("launch.executor=ssh",), "launch.executor = 'ssh'"),
        (("launch.processes_per_node=9",), "at most one process each"),
        (("launch.directory=here",), "an absolute path"),
        (("launch.port=80",), "launch.port = 80"),
        (("launch.env={2X: a}",), "launch.env = '2X'"),
        (("run.name=../elsewhere",), "run.name"),
        (
            ("rollout.sglang.num_servers=3",),
            "do not fit launch.server_nodes = 1 nodes of 8 GPUs: set num_servers to up to 2",
        ),
        (("launch.server_nodes=4",), "do not fit launch.server_nodes = 4"),
        (("launch.server_nodes=0",), "servers need nodes of their own"),
        (("launch.server_nodes=0", "launch.trainer_nodes=1"), "leave the trainer none"),
        (("rollout.sglang.tensor_model_parallel_size=12",), "takes whole nodes"),
        (("rollout.sglang.tensor_model_parallel_size=16",), "need launch.server_nodes = 4, not 1"),
        (("rollout.engine=embedded",), "needs no servers"),
        (("rollout.sglang.colocated=true",), "is for one host"),
        (("rollout.sglang.colocated=true", "launch.trainer_nodes=1"), "the servers are on the trainer's GPUs"),
        (("rollout.sglang.registry=/shared/servers",), "Leave rollout.sglang.registry out"),
        (("launch.container.mounts=[/a:/b]",), "no launch.container.image"),
        (("launch.container.image=i", "launch.container.mounts=['/a:/b,/c:/d']"), "launch.container.mounts"),
        (("launch.slurm.server_partition=x", "launch.slurm.heterogeneous=false"), "only a heterogeneous job"),
        (("launch.slurm.submit=ssh",), "launch.slurm.submit"),
        (("launch.slurm.gpu_option=x",), "launch.slurm.gpu_option"),
        (("launch.slurm.time=soon",), "launch.slurm.time"),
        (("launch.kubernetes.claim=My_Claim",), "launch.kubernetes.claim"),
    ],
)
def test_what_cannot_work_is_refused(overrides: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        describe(on_gpus(*overrides))
    assert named in str(error.value)


@pytest.mark.parametrize("name", ["account", "partition", "server_partition"])
@pytest.mark.parametrize("value", ["a b", "a\n#SBATCH --wrap=x", "$(x)", "a;b", "`x`", "a'b"])
def test_a_name_that_a_line_of_sbatch_cannot_hold_is_refused(name: str, value: str) -> None:
    recipe = on_gpus()
    setattr(recipe.launch.slurm, name, value)
    with pytest.raises(ConfigError, match=f"launch.slurm.{name}"):
        describe(recipe)


@pytest.mark.parametrize("option", ["qos=high", "--qos high", "--qos=$(x)", "--x=a\n--y", "--x='a'", "-q"])
def test_an_option_that_a_line_of_sbatch_cannot_hold_is_refused(option: str) -> None:
    recipe = on_gpus()
    recipe.launch.slurm.options = ["--qos=high", option]
    with pytest.raises(ConfigError, match=r"launch\.slurm\.options"):
        describe(recipe)


def names(job: Job, role: str) -> set[str]:
    return {variable.name for variable in job.environment[role]}


def test_variables_follow_from_what_the_run_does() -> None:
    job = job_on_gpus()
    assert {"CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"} <= names(job, TRAINER)
    assert not {"CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"} & names(job, SERVER)  # SGLang has its own
    both = [v.value for role in (TRAINER, SERVER) for v in job.environment[role] if v.name == "NCCL_CUMEM_ENABLE"]
    assert both == ["0", "0"]  # they are in one group
    colocated = ("rollout.sglang.colocated=true", "launch.server_nodes=0", "launch.trainer_nodes=1")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in names(job_on_gpus(*colocated), TRAINER)  # such memory cannot be given up
    layout = ("parallel.expert_model_parallel_size=4", "launch.server_nodes=0", "launch.trainer_nodes=1")
    beside = ("rollout.sglang.num_servers=1", *layout)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in names(job_on_gpus(*beside), TRAINER)  # the trainer's servers inherit it
    assert not any("NCCL" in name or "CUDA" in name for name in names(describe(quickstart()), TRAINER))
    assert all(variable.reason for role in (TRAINER, SERVER) for variable in job.environment[role])


def test_variables_of_the_users_win() -> None:
    job = job_on_gpus("launch.env={NCCL_CUMEM_ENABLE: '1', PYTORCH_CUDA_ALLOC_CONF: null, NCCL_DEBUG: WARN}")
    found = {variable.name: variable.value for variable in job.environment[TRAINER]}
    assert (found["NCCL_CUMEM_ENABLE"], found["NCCL_DEBUG"]) == ("1", "WARN")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in found


def test_a_job_has_everything_in_its_runs_folder() -> None:
    job = job_on_gpus("run.name=group/first run")
    assert job.config_path == Path("/shared/me/runs/group/first run/launch/config.yaml")
    assert job.name == "group-first-run"
