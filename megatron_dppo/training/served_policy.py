"""What a run's configuration says of the policy that servers serve, and the command that serves it."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_dppo.models.hf.dtype_names import dtype_name
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy
from megatron_dppo.training.config.schema import MODEL_DTYPES, Config


def served_policy(config: Config) -> ServedPolicy:
    """The policy of a run, as servers are to serve it. Raises ConfigError if they would not fit the trainer."""
    return ServedPolicy.of_trainer(
        config.model.path,
        dtype_name(MODEL_DTYPES[config.model.dtype]),
        served_in=config.rollout.sglang.dtype,
        return_routed_experts=config.algorithm.routing_replay,
        fp32_head=config.model.fp32_head,
    )


def serve_command(config_path: Path) -> list[str]:
    """Serves a run's policy on another host, until its standard input ends; the host sees the same files."""
    config = ["--config", str(config_path.absolute())]
    return [sys.executable, "-m", "megatron_dppo.serve", "--directory", str(Path.cwd()), *config, "--until-eof"]
