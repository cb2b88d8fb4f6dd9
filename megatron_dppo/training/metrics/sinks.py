"""Where metrics go: ``metrics.jsonl``, TensorBoard and the terminal, under the same names in each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_dppo.compat.extras import from_extra
from megatron_dppo.training.metrics.run_folder import RunFolder
from megatron_dppo.training.rollouts import Rollouts

with from_extra("train"):
    from torch.utils.tensorboard import SummaryWriter

# What a person watches while a run goes on: label, metric, format.
_HEADLINE = (
    ("reward", "reward/mean", "{:.3f}"),
    ("held-out", "eval/accuracy", "{:.3f}"),
    ("masked", "dppo/mask_fraction", "{:.2%}"),
    ("mismatch KL", "mismatch/kl_k3", "{:.1e}"),
    ("grad norm", "grad_norm", "{:.2f}"),
    ("tok/s", "throughput/tokens_per_s", "{:.0f}"),
)


class MetricsLog:
    """Writes one record per step and shows progress: a live bar on a terminal, one line per step in a log file.

    Exists on every rank; only the one that ``writes`` does anything.
    """

    def __init__(self, folder: RunFolder, total_steps: int, tensorboard: bool, writes: bool) -> None:
        self._folder = folder
        self._writes = writes
        self._total_steps = total_steps
        self._tensorboard = tensorboard and writes
        self._writer: SummaryWriter | None = None
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._texts: dict[str, str] = {}

    def start(self, step: int) -> None:
        """Begin after ``step`` completed steps; what was logged of later ones is dropped, a resumed run repeats it."""
        if not self._writes:
            return
        self._folder.forget_after(step)
        if self._tensorboard:
            self._writer = SummaryWriter(str(self._folder.tensorboard), purge_step=step + 1)
        if self._console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[headline]}"),
            )
            self._progress = Progress(*columns, console=self._console)
            self._bar = self._progress.add_task("training", total=self._total_steps, completed=step, headline="")
            self._progress.start()

    def say(self, message: str) -> None:
        """One line for the person who watches."""
        if self._writes:
            self._console.print(message)

    def record(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Write a step's metrics, numbers and texts, to every sink; step 0 is the state before training."""
        if not self._writes:
            return
        self._folder.append(self._folder.metrics_path, {"step": step, **_json_safe(metrics)})
        if self._writer is not None:
            self._write_to_tensorboard(self._writer, step, metrics)
        headline = "  ".join(
            f"{label} {form.format(metrics[name])}" for label, name, form in _HEADLINE if name in metrics
        )
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, headline=headline)
        else:
            self.say(f"step {step}/{self._total_steps}  {headline}")

    def _write_to_tensorboard(self, writer: SummaryWriter, step: int, metrics: Mapping[str, float | str]) -> None:
        for name, value in metrics.items():
            if isinstance(value, str):
                if self._texts.get(name) != value:  # a text has no curve: only its changes are worth an entry
                    writer.add_text(name, value, step)
                self._texts[name] = value
            elif math.isfinite(value):
                writer.add_scalar(name, value, step)

    def rollouts(self, step: int, rollouts: Rollouts, count: int) -> None:
        """Write some of the responses that this rank has, spread over the batch, to ``samples.jsonl``, and why others cannot
        be used to ``failures.jsonl``.
        """
        if not self._writes:
            return
        for reason in rollouts.reasons:
            self._folder.append(self._folder.failures_path, {"step": step, "reason": reason})
        stride = max(len(rollouts.own) // max(count, 1), 1)
        for scored in list(rollouts.own.values())[::stride][:count]:
            sample = scored.sample
            self._folder.append(
                self._folder.samples_path,
                {
                    "step": step,
                    "prompt_id": sample.prompt.prompt_id,
                    "question": sample.prompt.metadata["problem"].question,
                    "answer": sample.prompt.metadata["problem"].answer,
                    "response": scored.response,
                    "reward": sample.reward,
                    "finish_reason": sample.finish_reason,
                    "tokens": len(sample.response_ids),
                    "weight_versions": sample.weight_versions,
                },
            )

    def close(self) -> None:
        """Flush and close every sink."""
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()


def _json_safe(metrics: Mapping[str, float | str]) -> dict[str, Any]:
    """NaN and infinity are not JSON: write null, so that any reader can parse the file."""
    return {n: value if isinstance(value, str) or math.isfinite(value) else None for n, value in metrics.items()}
