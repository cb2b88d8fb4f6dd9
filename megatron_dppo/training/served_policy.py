"""What a run's configuration says of the policy that servers serve, and the command that serves it."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_dppo.models.hf.dtype_names import dtype_name
from megatron_dppo.rollout.sglang.servers.served_policy import ServedPolicy
from megatron_dppo.training.config.schema import MODEL_DTYPES, Config


def served_policy(config: Config) -> ServedPolicy:
    """The policy of a run, as servers are to serve it."""
    dtype = config.rollout.sglang.dtype or dtype_name(MODEL_DTYPES[config.model.dtype])
    return ServedPolicy(Path(config.model.path), dtype, config.algorithm.routing_replay)


def serve_command(config_path: Path) -> list[str]:
    """Serves a run's policy on another host, until its standard input ends; the host sees the same files."""
    config = ["--config", str(config_path.absolute())]
    return [sys.executable, "-m", "megatron_dppo.serve", "--directory", str(Path.cwd()), *config, "--until-eof"]
