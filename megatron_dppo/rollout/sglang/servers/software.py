"""Which torch and NCCL a server runs on. It does not say so itself; its interpreter does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_ASK = """
import json, torch
nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
print(json.dumps({"torch": torch.__version__, "nccl": nccl}))
"""
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Software:
    """What has to fit for bytes to travel between GPUs.

    Attributes:
        torch: version.
        nccl: version that this torch brings; None: it is one without CUDA.
    """

    torch: str
    nccl: str | None

    def __str__(self) -> str:
        return f"torch {self.torch}" + (f", NCCL {self.nccl}" if self.nccl else "")


def software_here() -> Software:
    """Of this process."""
    return Software(torch.__version__, ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None)


def software_of(python: str, environment: Mapping[str, str]) -> Software | None:
    """Of an interpreter; None if it does not say."""
    try:
        asked = subprocess.run(
            [python, "-c", _ASK],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE_S,
            check=True,
        )
        return Software(**json.loads(asked.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return None
