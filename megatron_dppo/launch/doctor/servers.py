"""SGLang: in an interpreter of its own, with a torch and an NCCL that fit the trainer's."""

from __future__ import annotations

import subprocess

import torch

from megatron_dppo.launch.doctor.lines import Line, State, Subject
from megatron_dppo.rollout.sglang.server_settings import TESTED_VERSION, examine_software
from megatron_dppo.rollout.sglang.servers.server import server_environment
from megatron_dppo.rollout.sglang.servers.software import software_here, software_of

_ASK = "import importlib.metadata as m; print(m.version('sglang'))"
_PATIENCE_S = 60.0


def sglang(subject: Subject) -> list[Line]:
    """Its version, and whether weights can travel to it."""
    where = subject.server_python
    if where is None:
        return [_absent(subject, "no interpreter is named")]
    environment = server_environment(subject.recipe.rollout.sglang)
    try:
        asked = subprocess.run(
            [where, "-c", _ASK],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return [_absent(subject, f"{where} does not run ({error})")]
    if asked.returncode:
        return [_absent(subject, f"{where} has no SGLang")]
    version = asked.stdout.strip()
    there = software_of(where, environment)
    state: State = "ok"
    remedy = ""
    if version != TESTED_VERSION:
        state, remedy = "note", f"nothing was tried with it: pip install sglang=={TESTED_VERSION} there"
    lines = [Line("SGLang", state, f"{version}, {there or 'whose torch does not import'} ({where})", remedy)]
    if there is None:
        lines.append(
            Line("SGLang's torch", "error", f"{where} cannot import torch", f"{where} -c 'import torch' says why")
        )
    by_nccl = torch.cuda.is_available() and not subject.recipe.rollout.sglang.colocated
    lines += [
        Line("NCCL pair", "error", f.fault, f.remedy) for f in examine_software(there, software_here(), by_nccl=by_nccl)
    ]
    return lines


def _absent(subject: Subject, why: str) -> Line:
    state: State = "error" if subject.wants_servers and subject.recipe.rollout.sglang.starts_servers_here else "note"
    return Line(
        "SGLang",
        state,
        why,
        "rollout.sglang.python=PYTHON or --server-python; tools/setup/install_sglang_cpu.sh makes one for CPUs",
    )
