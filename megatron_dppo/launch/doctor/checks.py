"""Everything that the doctor looks at, in the order in which it says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_dppo.launch.doctor import host, loss_test, servers, software, trials
from megatron_dppo.launch.doctor.lines import Check, Line, Subject

CHECKS = (
    Check("python", software.python),
    Check("torch", software.torch_version),
    Check("megatron-core", software.megatron_core),
    Check("transformer-engine", software.transformer_engine),
    Check("apex", software.apex),
    Check("gradient fusion", software.weight_gradient_fusion),
    Check("SGLang", servers.sglang, timeout_s=240.0),
    Check("GPUs", software.gpus),
    Check("extension", software.extension),
    Check("ports", host.ports),
    Check("disk", host.disk),
    Check("shared memory", host.shared_memory),
    Check("open files", host.open_files),
    Check("loss", loss_test.loss_backends),
    Check("one-step train", trials.one_step, timeout_s=trials.TRAIN_S, is_long=True),
    Check("sync to a server", trials.one_sync, timeout_s=trials.SYNC_S, is_long=True),
)


def examine(subject: Subject, *, quick: bool, checks: Sequence[Check] = CHECKS) -> Iterator[Line]:
    """The lines of every check, as they are found; ``quick``: without the long ones."""
    for check in checks:
        if quick and check.is_long:
            yield Line(check.what, "note", "left out (--quick)")
        else:
            yield from check.run(subject)
