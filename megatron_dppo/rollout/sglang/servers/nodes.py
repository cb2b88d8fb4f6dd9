"""A server that is larger than a host."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dppo.errors import ConfigError


@dataclass(frozen=True)
class Nodes:
    """The hosts that share one server, if it needs more GPUs than one has.

    Attributes:
        count: how many.
        rank: of this one; rank 0 is the one that is asked and registers.
        head: HOST:PORT on rank 0, where they meet.
    """

    count: int = 1
    rank: int = 0
    head: str | None = None

    def check(self, tensor_model_parallel_size: int) -> None:
        """Raise ConfigError for what cannot work with a server of so many ranks."""
        if self.count < 1 or not 0 <= self.rank < self.count:
            raise ConfigError(f"--node-rank {self.rank} of --nnodes {self.count}: ranks are 0 to nnodes - 1")
        if (self.count > 1) != (self.head is not None):
            raise ConfigError("--nnodes and --head HOST:PORT go together: hosts that share a server meet there")
        if tensor_model_parallel_size % self.count:
            raise ConfigError(
                f"rollout.sglang.tensor_model_parallel_size = {tensor_model_parallel_size} is no multiple of --nnodes"
                f" {self.count}, the hosts that share it"
            )

    def arguments(self) -> list[str]:
        """For SGLang."""
        if self.head is None:
            return []
        return ["--nnodes", str(self.count), "--node-rank", str(self.rank), "--dist-init-addr", self.head]
