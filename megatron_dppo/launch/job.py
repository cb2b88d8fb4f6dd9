"""One description of a job, from which every executor makes what it starts: who runs where, with what commands.

``describe`` finds everything that cannot work before anything is written or started.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dppo.errors import ConfigError
from megatron_dppo.launch.config import LaunchConfig, Recipe
from megatron_dppo.launch.environment import SERVER, TRAINER, Variable, job_environment
from megatron_dppo.training.metrics.run_folder import RunFolder


class Shell(str):
    """A word of a command that a shell is to expand: it goes into scripts unquoted."""


@dataclass(frozen=True)
class Serving:
    """The nodes that hold servers alone.

    Attributes:
        nodes: how many.
        servers_per_node: how many start on each; 1 where a server is as large as a node or larger.
        nodes_per_server: that share one server.
    """

    nodes: int
    servers_per_node: int
    nodes_per_server: int


@dataclass(frozen=True)
class Job:
    """What is to run.

    Attributes:
        name: for schedulers: the run's, with what they do not take replaced.
        run_folder: of the run; absolute, on a file system that all nodes share.
        directory: what relative paths are relative to, absolute.
        python: interpreter on the nodes.
        processes_per_node: trainer processes of each trainer node.
        serving: None: no node holds servers alone.
        environment: {TRAINER, SERVER: variables}.
        launch: the section that all this was read from.
    """

    name: str
    run_folder: Path
    directory: Path
    python: str
    processes_per_node: int
    serving: Serving | None
    environment: dict[str, tuple[Variable, ...]]
    launch: LaunchConfig

    @property
    def folder(self) -> Path:
        """Everything about how the run was started: configuration, scripts, and a folder for every start."""
        return self.run_folder / "launch"

    @property
    def config_path(self) -> Path:
        """The recipe with its overrides, resolved, as all starts of the job read it, whatever becomes of its file."""
        return self.folder / "config.yaml"

    def trainer_command(self, *, head: str, port: str, attempt: str, node_rank: list[str]) -> list[str]:
        """What a trainer node runs.

        Args:
            head: address of the first trainer node.
            port: free there.
            attempt: folder of this start.
            node_rank: options of the agent that say which node it is.
        """
        agent = [self.python, "-m", "megatron_dppo.launch.agent"]
        size = ["--nodes", str(self.launch.trainer_nodes), "--processes", str(self.processes_per_node)]
        meeting = ["--head", head, "--port", port, "--attempt", attempt]
        overrides = [_joined("rollout.sglang.registry=", attempt, "/servers")] if self.serving else []
        return [*agent, *size, *node_rank, *meeting, "--", "--config", str(self.config_path), *overrides]

    def server_command(self, *, attempt: str, arguments: list[str], sharing: list[str]) -> list[str]:
        """What a serving node runs.

        Args:
            attempt: folder of this start.
            arguments: further ones of ``megatron-dppo serve``.
            sharing: of ``megatron_dppo.launch.serving_node``, where servers are larger than a node.
        """
        assert self.serving is not None
        command = ["megatron_dppo", "serve"]
        if sharing:
            command = ["megatron_dppo.launch.serving_node", *sharing, "--"]
        registry = ["--registry", _joined("", attempt, "/servers")]
        servers = ["--servers", str(self.serving.servers_per_node)]
        return [self.python, "-m", *command, "--config", str(self.config_path), *registry, *servers, *arguments]

    def all_servers_command(self, *, attempt: str, address: str) -> list[str]:
        """What runs the servers of all serving nodes on one host, which listen on ``address``."""
        assert self.serving is not None
        one_host = replace(self.serving, nodes=1, servers_per_node=self.serving.nodes * self.serving.servers_per_node)
        job = replace(self, serving=one_host)
        return job.server_command(attempt=attempt, arguments=["--host", address], sharing=[])


def _joined(before: str, word: str, after: str) -> str:
    """In one word; a shell's quotes stay around what it expands."""
    return Shell(f"{before}{word}{after}") if isinstance(word, Shell) else f"{before}{word}{after}"


def describe(recipe: Recipe) -> Job:
    """The job of a recipe whose ``run.name`` is set. Raises ConfigError for what cannot work; reads and writes nothing."""
    launch = recipe.launch
    launch.check()
    directory = Path(launch.directory or Path.cwd())
    if not directory.is_absolute():
        raise ConfigError(f"launch.directory = {launch.directory!r}: an absolute path, the same on all nodes")
    run_folder = directory / RunFolder(recipe.run).path
    serving = _serving(recipe)
    processes = _processes_per_node(recipe)
    recipe.parallel.check_world_size(launch.trainer_nodes * processes)
    return Job(
        name=re.sub(r"[^A-Za-z0-9._-]", "-", str(recipe.run.name)),
        run_folder=run_folder,
        directory=directory,
        python=launch.python or sys.executable,
        processes_per_node=processes,
        serving=serving,
        environment={role: job_environment(recipe, role, run_folder / "launch") for role in (TRAINER, SERVER)},
        launch=launch,
    )


def _processes_per_node(recipe: Recipe) -> int:
    launch, gpus = recipe.launch, recipe.launch.gpus_per_node
    if launch.processes_per_node is not None:
        if gpus and launch.processes_per_node > gpus - _gpus_of_servers_beside(recipe):
            raise ConfigError(
                f"launch.processes_per_node = {launch.processes_per_node}, but of the {gpus} GPUs of a node only"
                f" {gpus - _gpus_of_servers_beside(recipe)} are the trainer's: at most one process each"
            )
        return launch.processes_per_node
    if gpus:
        return gpus - _gpus_of_servers_beside(recipe)
    parallel = recipe.parallel
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_size * parallel.pipeline_model_parallel_size
    ranks = math.lcm(parallel.replica_size, experts)
    if ranks % launch.trainer_nodes and launch.trainer_nodes % ranks:
        raise ConfigError(
            f"the layout needs {ranks} processes, which launch.trainer_nodes = {launch.trainer_nodes} nodes cannot share"
            " evenly: set launch.processes_per_node"
        )
    return max(1, ranks // launch.trainer_nodes)


def _gpus_of_servers_beside(recipe: Recipe) -> int:
    """GPUs of a trainer node that servers have for themselves."""
    launch, sglang = recipe.launch, recipe.rollout.sglang
    beside = recipe.rollout.engine == "sglang" and sglang.starts_servers_here and not sglang.colocated
    if not beside or launch.server_nodes:
        return 0
    if launch.trainer_nodes > 1:
        raise ConfigError(
            f"launch.server_nodes = 0, but with launch.trainer_nodes = {launch.trainer_nodes} servers need nodes of their"
            " own: the trainer starts its servers on its first node only"
        )
    taken = sglang.num_servers * sglang.tensor_model_parallel_size
    if taken >= launch.gpus_per_node:
        raise ConfigError(
            f"rollout.sglang.num_servers = {sglang.num_servers} servers of {sglang.tensor_model_parallel_size} GPUs leave the"
            f" trainer none of launch.gpus_per_node = {launch.gpus_per_node}: fewer servers, launch.server_nodes for them, or"
            " rollout.sglang.colocated=true"
        )
    return taken


def _serving(recipe: Recipe) -> Serving | None:
    launch, sglang = recipe.launch, recipe.rollout.sglang
    nodes, servers, size, gpus = (
        launch.server_nodes,
        sglang.num_servers,
        sglang.tensor_model_parallel_size,
        launch.gpus_per_node,
    )
    if recipe.rollout.engine == "sglang" and sglang.colocated and launch.trainer_nodes > 1:
        raise ConfigError(
            f"rollout.sglang.colocated=true is for one host, but launch.trainer_nodes = {launch.trainer_nodes}: give the"
            " servers nodes of their own (launch.server_nodes, colocated=false)"
        )
    if nodes == 0:
        return None
    _check_that_servers_are_ours(recipe)
    if gpus and size > gpus:
        if size % gpus:
            raise ConfigError(
                f"rollout.sglang.tensor_model_parallel_size = {size} is no multiple of launch.gpus_per_node = {gpus}: a"
                " server that is larger than a node takes whole nodes"
            )
        sharing = size // gpus
        if servers * sharing != nodes:
            raise ConfigError(
                f"rollout.sglang.num_servers = {servers} servers of {sharing} nodes each need launch.server_nodes ="
                f" {servers * sharing}, not {nodes}"
            )
        return Serving(nodes, 1, sharing)
    room = gpus // size if gpus else servers
    if servers % nodes or servers // nodes > room:
        advice = f"up to {nodes * room}, a multiple of {nodes}" if gpus else f"a multiple of {nodes}"
        raise ConfigError(
            f"rollout.sglang.num_servers = {servers} servers of {size} GPUs do not fit launch.server_nodes = {nodes} nodes of"
            f" {gpus} GPUs: set num_servers to {advice}"
        )
    return Serving(nodes, servers // nodes, 1)


def _check_that_servers_are_ours(recipe: Recipe) -> None:
    sglang, nodes = recipe.rollout.sglang, recipe.launch.server_nodes
    if recipe.rollout.engine != "sglang":
        raise ConfigError(
            f"launch.server_nodes = {nodes} with rollout.engine={recipe.rollout.engine}, which needs no servers: set it to 0"
        )
    if sglang.colocated:
        raise ConfigError(
            f"launch.server_nodes = {nodes} with rollout.sglang.colocated=true: the servers are on the trainer's GPUs. Set it"
            " to 0, or colocated=false"
        )
    for name in ("urls", "registry", "launch"):
        if getattr(sglang, name):
            raise ConfigError(
                f"launch.server_nodes = {nodes}: their servers are started and registered with the job. Leave"
                f" rollout.sglang.{name} out, or set launch.server_nodes=0"
            )
