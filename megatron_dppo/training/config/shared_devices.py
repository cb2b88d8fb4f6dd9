"""What ``rollout.sglang.colocated`` needs: one rank of the trainer and one of a server on each GPU of one host."""

from __future__ import annotations

import os

import torch

from megatron_dppo.distributed.ranks import local_world_size
from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.schema import Config


def check_shared_devices(config: Config, ranks: int) -> None:
    """Raise ConfigError for the first thing that cannot work, if they are to be shared at all."""
    sglang = config.rollout.sglang
    if not sglang.colocated:
        return
    if config.rollout.engine != "sglang":
        raise ConfigError(
            f"rollout.sglang.colocated=true needs rollout.engine=sglang, not {config.rollout.engine}: the embedded engine is"
            " on the trainer's devices anyway"
        )
    if "LOCAL_WORLD_SIZE" in os.environ and local_world_size() != ranks:  # who only checks may not know of hosts
        raise ConfigError(
            f"rollout.sglang.colocated=true needs all ranks on one host, but {local_world_size()} of {ranks} are on this one:"
            " servers are started on the first host alone. Use one host, or servers on GPUs of their own (colocated=false)"
        )
    if config.run.device != "cuda" and not torch.cuda.is_available():
        return
    servers, size = sglang.num_servers, sglang.tensor_model_parallel_size
    if servers * size != ranks:
        raise ConfigError(
            f"rollout.sglang.colocated=true with {ranks} ranks, each on a GPU, but rollout.sglang.num_servers = {servers}"
            f" servers on rollout.sglang.tensor_model_parallel_size = {size} each: the product must be {ranks}"
        )
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(variable, "").lower():
            raise ConfigError(
                f"rollout.sglang.colocated=true with expandable_segments:True in {variable}: servers cannot give such memory"
                " up, and it cannot be shared by handle. Take it out"
            )
