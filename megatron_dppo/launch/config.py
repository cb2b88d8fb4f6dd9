"""The section ``launch`` of a recipe: where and how a run takes place. The run itself never reads it.

What stands in lines of #SBATCH, which have no quoting, is checked here by its characters. What a shell reads (paths,
environment) is free, and quoted where it is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.schema import Config

EXECUTORS = ("local", "slurm", "kubernetes")
SUBMITTERS = ("sbatch", "nemo_run")
GPU_OPTIONS = ("gpus-per-node", "gres")

# Lines of #SBATCH have no quoting that all versions of Slurm agree on.
_SLURM_TEXT = re.compile(r"[A-Za-z0-9._/:,=@+\[\]-]+")
_SLURM_OPTION = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9._/:,=@+\[\]*|&()-]+)?")
_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KUBERNETES_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


def _refuse(name: str, value: object, wanted: str) -> None:
    raise ConfigError(f"launch.{name} = {value!r}: {wanted}")


@dataclass
class ContainerConfig:
    """The container that processes run in on Slurm (pyxis's options of srun) and Kubernetes.

    Attributes:
        image: None: none, processes run on the host.
        mounts: of Slurm, ``/host/path:/container/path``. The working directory and ``run.root`` have to be seen under the
            same path inside as outside.
    """

    image: str | None = None
    mounts: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise ConfigError naming the first field that cannot work."""
        for mount in self.mounts:
            if mount.count(":") not in (1, 2) or "," in mount or not mount.startswith("/"):
                _refuse("container.mounts", mount, "write /host/path:/container/path, one entry each")
        if self.mounts and self.image is None:
            _refuse("container.mounts", self.mounts, "there is no launch.container.image to mount them in")


@dataclass
class SlurmConfig:
    """What is asked of Slurm.

    Attributes:
        account: that pays. None: the user's own.
        partition: of all nodes. None: the cluster's.
        server_partition: of serving nodes, in a heterogeneous job; None: the same.
        time: limit, as Slurm writes it: ``minutes``, ``hours:minutes:seconds``, ``days-hours``. A run that takes longer goes
            on in the next start of the same job (launch.max_restarts).
        heterogeneous: trainer and serving nodes are two components of one job, each with its own options. false: one
            allocation of equal nodes, split; for clusters where heterogeneous jobs are off.
        exclusive: whole nodes.
        gpu_option: how GPUs are asked for: gpus-per-node | gres.
        options: further ones for all components, e.g. ``["--qos=high", "--constraint=h100"]``.
        submit: who hands the script in: sbatch | nemo_run (extra ``launch``).
    """

    account: str | None = None
    partition: str | None = None
    server_partition: str | None = None
    time: str = "04:00:00"
    heterogeneous: bool = True
    exclusive: bool = True
    gpu_option: str = "gpus-per-node"
    options: list[str] = field(default_factory=list)
    submit: str = "sbatch"

    def check(self) -> None:
        """Raise ConfigError naming the first field that cannot work."""
        for name in ("account", "partition", "server_partition"):
            value = getattr(self, name)
            if value is not None and not _SLURM_TEXT.fullmatch(value):
                _refuse(f"slurm.{name}", value, "a name of Slurm's is letters, digits and ._-")
        if not _TIME.fullmatch(self.time):
            _refuse("slurm.time", self.time, "write minutes, hours:minutes:seconds or days-hours:minutes:seconds")
        if self.gpu_option not in GPU_OPTIONS:
            _refuse("slurm.gpu_option", self.gpu_option, f"one of {', '.join(GPU_OPTIONS)}")
        if self.submit not in SUBMITTERS:
            _refuse("slurm.submit", self.submit, f"one of {', '.join(SUBMITTERS)}")
        for option in self.options:
            if not _SLURM_OPTION.fullmatch(option):
                _refuse("slurm.options", option, "each is --name or --name=value, without spaces and quotes")
        if self.server_partition is not None and not self.heterogeneous:
            _refuse("slurm.server_partition", self.server_partition, "only a heterogeneous job has a second partition")


@dataclass
class KubernetesConfig:
    """What the manifest names.

    Attributes:
        namespace: None: that of whoever applies it.
        claim: PersistentVolumeClaim that all pods mount at ``mount``: the working directory, models, data and ``run.root``
            are in it.
        mount: where.
        gpu_resource: what a GPU is called.
        shared_memory: size of /dev/shm, which NCCL uses between the GPUs of a host.
        secret: whose entries become environment variables (the keys of servers). None: none.
    """

    namespace: str | None = None
    claim: str = "megatron-dppo"
    mount: str = "/workspace"
    gpu_resource: str = "nvidia.com/gpu"
    shared_memory: str = "64Gi"
    secret: str | None = None

    def check(self) -> None:
        """Raise ConfigError naming the first field that cannot work."""
        for name in ("namespace", "claim", "secret"):
            value = getattr(self, name)
            if value is not None and not _KUBERNETES_NAME.fullmatch(value):
                _refuse(f"kubernetes.{name}", value, "a name in Kubernetes is lower-case letters, digits, - and .")
        if not self.mount.startswith("/"):
            _refuse("kubernetes.mount", self.mount, "an absolute path inside of the pods")


@dataclass
class LaunchConfig:
    """Hosts of a run, and what starts it there.

    Attributes:
        executor: local | slurm | kubernetes.
        trainer_nodes: hosts that train; each runs one trainer process for every one of its GPUs that no server has.
        server_nodes: further hosts, of servers alone. 0: the servers, if there are any, are on the trainer's hosts.
        gpus_per_node: of every host. 0: CPU processes, as many on the trainer's hosts as the layout asks for.
        processes_per_node: trainer processes of each trainer node. None: one for every GPU that no server has; on a CPU as
            many as make one model replica.
        python: interpreter on the nodes. None: the one that launches.
        directory: what relative paths are relative to on the nodes. None: where the command was given.
        env: environment variables, which win over those that launching sets; null: leave one of them out.
        port: where the trainer's processes meet, on the first node; servers that are larger than a node take the one after.
            None: derived from the job's number on Slurm, a free one on this machine, 29500 on Kubernetes.
        warning_s: before its time is over, a job is asked to save. Leave room for one update, weight sync and checkpoint; for
            one step with the embedded engine. After as long whoever was asked to stop is ended.
        max_restarts: times that a run which was asked to stop, and has saved, is started again by itself.
        container: that processes run in.
        slurm: what is asked of Slurm.
        kubernetes: what the manifest names.
    """

    executor: str = "local"
    trainer_nodes: int = 1
    server_nodes: int = 0
    gpus_per_node: int = 0
    processes_per_node: int | None = None
    python: str | None = None
    directory: str | None = None
    env: dict[str, str | None] = field(default_factory=dict)
    port: int | None = None
    warning_s: int = 600
    max_restarts: int = 100
    container: ContainerConfig = field(default_factory=ContainerConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)

    def __post_init__(self) -> None:
        least = {"trainer_nodes": 1, "server_nodes": 0, "gpus_per_node": 0, "processes_per_node": 1, "warning_s": 1}
        for name, lowest in (least | {"max_restarts": 0}).items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"launch.{name} must be at least {lowest}, not {value}")

    def check(self) -> None:
        """Raise ConfigError naming the first field that cannot work."""
        if self.executor not in EXECUTORS:
            _refuse("executor", self.executor, f"one of {', '.join(EXECUTORS)}")
        if self.port is not None and not 1024 <= self.port < 65535:
            _refuse("port", self.port, "between 1024 and 65534")
        for name in self.env:
            if not _VARIABLE.fullmatch(name):
                _refuse("env", name, "no name of an environment variable: letters, digits and _, no digit first")
        for name, value in self.env.items():
            if value is not None and "\0" in value:
                _refuse("env", name, "its value has a null character")
        self.container.check()
        self.slurm.check()
        self.kubernetes.check()


@dataclass
class Recipe(Config):
    """A run, and where it takes place."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)
