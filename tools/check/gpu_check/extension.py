"""``megatron_dppo._C`` for this interpreter, this torch and the GPU at hand, built in place unless it is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

# In a process of its own: torch and the extension may fail to load, and neither belongs into the one that keeps the table.
_ASK = """
import json, sys, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": 0, "arch": None, "built": None}
if sys.argv[1] == "cuda" and torch.cuda.is_available():
    found["gpus"] = torch.cuda.device_count()
    major, minor = torch.cuda.get_device_capability()
    found["arch"] = f"{major}{minor}" + ("a" if major == 9 else "")
try:
    import megatron_dppo._C as built
    found["built"] = [built.torch_version, built.cuda_archs]
except ImportError:
    pass
print(json.dumps(found))
"""


class ExtensionError(Exception):
    """One line: what went wrong."""


def ask_torch(device: str) -> dict:
    """What this interpreter's torch is, how many GPUs it sees, of which architecture, and what was built for it.

    Raises ExtensionError if torch does not import.
    """
    done = subprocess.run([sys.executable, "-c", _ASK, device], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ExtensionError(f"{sys.executable} cannot import torch ({said})")
    return json.loads(done.stdout.splitlines()[-1])


def build_what_is_missing(found: dict, device: str, log: Path, limit_s: float) -> bool:
    """Build it unless what is there is for this torch and GPU; returns whether it was built. The output goes to ``log``.

    Raises ExtensionError if it cannot be built.
    """
    if is_up_to_date(found, device):
        return False
    environment = {**os.environ, "MEGATRON_DPPO_BUILD_EXT": "1", "MEGATRON_DPPO_CUDA": "0"}
    if device == "cuda":
        environment |= {"MEGATRON_DPPO_CUDA": "1", "MEGATRON_DPPO_CUDA_ARCHS": found["arch"]}
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    with log.open("a") as output:
        print(f"--- {' '.join(command)}", file=output, flush=True)
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ExtensionError(f"the extension was not built within {limit_s:.0f} s (see {log})") from None
    if done.returncode:
        raise ExtensionError(f"the extension cannot be built: {last_error(log)} (see {log})")
    if not is_up_to_date(ask_torch(device), device):
        raise ExtensionError(f"the extension was built but does not load (see {log}, python -m megatron_dppo.ops)")
    return True


def is_up_to_date(found: dict, device: str) -> bool:
    """Whether the extension that loads was built for this torch, and for this GPU if one is to be used."""
    if found["built"] is None:
        return False
    torch_version, archs = found["built"]
    return torch_version == found["torch"] and (
        device == "cpu" or found["arch"] in archs.replace("+PTX", "").split(";")
    )


def last_error(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["nothing"]
    return next((line for line in reversed(lines) if "rror" in line), lines[-1])[:300]
