"""What can happen to one rank of a run, and what is promised then: of the run, of every rank, of what was trained.

Data alone. test_faults.py makes each of them happen in real runs (their ranks execute faulty_run_script.py) and asserts what
stands here; tools/check/fault_table.py writes it into docs/troubleshooting.md.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_dppo.errors import RolloutError, ScoringError
from megatron_dppo.rollout.sample import FailedSample

STEPS = 3
STEP = 2  # in which it happens
ANOTHER_FAILED = 4

Original = Callable[[], Any]  # the call that the fault happens in


@dataclass(frozen=True)
class Fault:
    """One row.

    Attributes:
        name: of the test.
        what: happens, on which rank, for a reader.
        function: that it happens in: ``module:Class.method``, its first call in step ``STEP``.
        happens: is called with the original call, in its place.
        then: what the run does, for a reader.
        code: exit code of the rank that it happened to; minus the signal if one ended it.
        code_of_others: of all other ranks.
        checkpoint: the step whose checkpoint is the last one then; None: there is none.
        message: part of what the run says.
        where: the rank of a replica that it happens to, or all ranks of the run.
        settings: of the run, beside those that all runs have.
        like: the name of the fault that a run which resumes continues as; None: as if nothing had happened.
        layouts: in which the row is true.
        scorer_in_processes: real scoring workers, which a rank that is killed cannot end; else grading is a function call.
        seconds: until no process is left.
    """

    name: str
    what: str
    function: str
    happens: Callable[[Original], Any]
    then: str
    code: int
    code_of_others: int
    checkpoint: int | None
    message: str = ""
    where: Literal["first of a replica", "last of a replica", "all"] = "first of a replica"
    settings: tuple[str, ...] = ()
    like: str | None = None
    layouts: tuple[str, ...] = ("DP2 TP2", "DP4")
    scorer_in_processes: bool = False
    seconds: float = 15.0

    @property
    def goes_on(self) -> bool:
        """Whether the run reaches its last step all the same."""
        return self.code == self.code_of_others == 0

    @property
    def saves_every_step(self) -> bool:
        """Whether checkpoints are written before the fault as well."""
        return "checkpoint.every=1" in self.settings


def raises(error: BaseException) -> Callable[[Original], Any]:
    """Instead of the call, which the other ranks may be waiting for."""

    def happens(original: Original) -> Any:
        raise error

    return happens


def raises_after(error: BaseException) -> Callable[[Original], Any]:
    """When the call, which may be collective, is done."""

    def happens(original: Original) -> Any:
        original()
        raise error

    return happens


def sends(number: signal.Signals) -> Callable[[Original], Any]:
    """A signal to this process."""

    def happens(original: Original) -> Any:
        os.kill(os.getpid(), number)
        return original()

    return happens


def spoils(count: int | None) -> Callable[[Original], Any]:
    """So many of the samples, or all, cannot be used."""

    def happens(original: Original) -> Any:
        samples = original()
        spoiled = [FailedSample(sample.prompt, "its log-prob is null", sample.group_id) for sample in samples[:count]]
        return [*spoiled, *samples[len(spoiled) :]]

    return happens


def hidden_states_are_nan(original: Original) -> Any:
    """Of ``DPPOStep._loss_of``, and so are the loss and its gradient."""
    assert isinstance(original, functools.partial)
    step, parts, batch, hidden, *others = original.args
    return original.func(step, parts, batch, hidden * float("nan"), *others)


GENERATE = "megatron_dppo.rollout.embedded.engine:EmbeddedEngine.generate"
GENERATE_BATCH = "megatron_dppo.rollout.embedded.engine:EmbeddedEngine._generate_batch"
SCORE = "megatron_dppo.training.rollouts:RolloutPhase._score"
ENOUGH, TOO_LITTLE = ("rollout.max_failed_share=0.6",), ("rollout.max_failed_share=0.01",)

_ROLLOUT_ERROR = Fault(
    name="servers lost, above the share",
    what="`RolloutError` while generating: a replica has lost its servers. Above `rollout.max_failed_share`",
    function=GENERATE,
    happens=raises_after(RolloutError("no server is left")),
    then="all ranks stop with the same message",
    code=3,
    code_of_others=3,
    checkpoint=STEP - 1,
    message="samples cannot be used, more than rollout.max_failed_share = 0.01 allows; the first: no server is left",
    settings=TOO_LITTLE,
)
_SAMPLES = replace(
    _ROLLOUT_ERROR,
    name="bad samples, above the share",
    what="samples that break the contract (`InvalidSampleError`), more than `rollout.max_failed_share`",
    happens=spoils(None),
    message="samples cannot be used, more than rollout.max_failed_share = 0.01 allows; the first: its log-prob is null",
)
_SCORER = replace(
    _ROLLOUT_ERROR,
    name="scorer lost, above the share",
    what="`ScoringError`: no scoring worker of a replica can be started. Above `rollout.max_failed_share`",
    function=SCORE,
    happens=raises(ScoringError("no scoring worker can be started")),
    message="rollout.max_failed_share = 0.01 allows; the first: no scoring worker can be started",
)
_NAN = Fault(
    name="nan, above the limit",
    what="NaN gradient, more often in a row than `train.max_skipped_steps`",
    function="megatron_dppo.training.policy.dppo_step:DPPOStep._loss_of",
    happens=hidden_states_are_nan,
    then="all ranks end the step, without an update, and stop",
    code=3,
    code_of_others=3,
    checkpoint=STEP,
    message="the gradients of 1 optimizer steps in a row were NaN or infinite",
    where="last of a replica",
    settings=("train.max_skipped_steps=0",),
    like="nan, below the limit",
)
_UNEXPECTED = Fault(
    name="batching",
    what="an error that nobody expects, on one rank, between two collectives: `MemoryError` while batching",
    function="megatron_dppo.training.data.batcher:MicroBatcher.micro_batches",
    happens=raises(MemoryError("too much")),
    then="it ends with a traceback; all others end and name it and its error",
    code=1,
    code_of_others=ANOTHER_FAILED,
    checkpoint=None,
    message="failed with MemoryError: too much",
    where="last of a replica",
)
_STOP = Fault(
    name="SIGTERM to one rank",
    what="SIGTERM (or SIGUSR1, Ctrl-C) to one rank",
    function=GENERATE,
    happens=sends(signal.SIGTERM),
    then="all ranks end the step whose responses are generated now or next, and stop",
    code=75,
    code_of_others=75,
    checkpoint=STEP,
    message="(SIGTERM); it is saved",
)

FAULTS = (
    replace(
        _ROLLOUT_ERROR,
        name="servers lost, below the share",
        what="`RolloutError` while generating: a replica has lost its servers. Not above `rollout.max_failed_share`",
        then="its samples are lost, the step is done with the others",
        code=0,
        code_of_others=0,
        checkpoint=STEPS,
        message="",
        settings=ENOUGH,
    ),
    _ROLLOUT_ERROR,
    replace(
        _SAMPLES,
        name="bad sample, below the share",
        what="a sample that breaks the contract (`InvalidSampleError`)",
        happens=spoils(1),
        then="the sample is lost, the step is done with the others",
        code=0,
        code_of_others=0,
        checkpoint=STEPS,
        message="",
        settings=ENOUGH,
    ),
    _SAMPLES,
    replace(
        _SCORER,
        name="scorer lost, below the share",
        what="`ScoringError`: no scoring worker of a replica can be started. Not above `rollout.max_failed_share`",
        then="its samples are lost, the step is done with the others",
        code=0,
        code_of_others=0,
        checkpoint=STEPS,
        message="",
        settings=ENOUGH,
    ),
    _SCORER,
    replace(
        _SCORER,
        name="scoring",
        what="an error that nobody expects, on one rank, while scoring, or while generating where nobody takes part in it",
        happens=raises(MemoryError("too much")),
        message="cannot go on: MemoryError: too much",
    ),
    replace(
        _NAN,
        name="nan, below the limit",
        what="NaN gradient, not more often in a row than `train.max_skipped_steps`",
        then="the optimizer step is skipped on all ranks",
        code=0,
        code_of_others=0,
        checkpoint=STEPS,
        message="",
        settings=(),
        like=None,
    ),
    _NAN,
    _UNEXPECTED,
    replace(
        _UNEXPECTED,
        name="generating",
        what="the same while the embedded engine generates, with other ranks that take part in it (TP, PP, CP, experts)",
        function=GENERATE_BATCH,
        layouts=("DP2 TP2",),  # with one rank to a replica nobody waits for it within: that is the row of scoring
    ),
    replace(
        _UNEXPECTED,
        name="batch metrics",
        what="the same where metrics are summed over ranks",
        function="megatron_dppo.training.metrics.step:BatchMetrics.reduce",
        happens=raises(KeyError("no such metric")),
        message="failed with KeyError: 'no such metric'",
    ),
    replace(
        _UNEXPECTED,
        name="rollout metrics",
        what="the same where a metric is computed",
        function="megatron_dppo.training.trainer:rollout_metrics",
        happens=raises(ZeroDivisionError("division by zero")),
        message="failed with ZeroDivisionError: division by zero",
    ),
    Fault(
        name="checkpoint",
        what="`OSError` on one rank while a checkpoint is written",
        function="torch.distributed.checkpoint.filesystem:FileSystemWriter.write_data",
        happens=raises(OSError(28, "No space left on device")),
        then="all ranks stop with the same message",
        code=3,
        code_of_others=3,
        checkpoint=STEP - 1,
        message="OSError: [Errno 28] No space left on device",
        settings=("checkpoint.every=1",),
    ),
    Fault(
        name="SIGKILL",
        what="SIGKILL of one rank",
        function="megatron_dppo.training.policy.dppo_step:DPPOStep.run",
        happens=sends(signal.SIGKILL),
        then="all others end and name it",
        code=-signal.SIGKILL,
        code_of_others=ANOTHER_FAILED,
        checkpoint=None,
        message="has given no sign of life",
        scorer_in_processes=True,
        seconds=30.0,
    ),
    _STOP,
    replace(_STOP, name="SIGTERM to all", what="SIGTERM to all ranks, as torchrun and Slurm send it", where="all"),
)
BY_NAME = {fault.name: fault for fault in FAULTS}
