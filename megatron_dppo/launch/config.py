"""The section ``launch`` of a recipe: where a run takes place. The run itself never reads it."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.schema import Config


@dataclass
class LaunchConfig:
    """Hosts of a run.

    Attributes:
        trainer_nodes: hosts that train; each runs one trainer process for every one of its GPUs that no server has.
        server_nodes: further hosts, of servers alone. 0: the servers, if there are any, are on the trainer's hosts.
        gpus_per_node: of every host. 0: CPU processes.
        processes_per_node: trainer processes of each trainer node. None: one for every GPU that no server has; on a CPU as
            many as make one model replica.
    """

    trainer_nodes: int = 1
    server_nodes: int = 0
    gpus_per_node: int = 0
    processes_per_node: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("trainer_nodes", 1), ("server_nodes", 0), ("gpus_per_node", 0), ("processes_per_node", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"launch.{name} must be at least {least}, not {value}")


@dataclass
class Recipe(Config):
    """A run, and where it takes place."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)
