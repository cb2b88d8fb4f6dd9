"""Which isolations this machine allows, the strictest first."""

from __future__ import annotations

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.code.sandbox import check_isolation


def _isolations() -> list[str]:
    try:
        check_isolation("namespaces")
    except TaskError:
        return ["process"]
    return ["namespaces", "process"]


ISOLATIONS = _isolations()
