"""Where a run's numbers go: the run folder, TensorBoard, W&B, Prometheus and the terminal, under the same names in each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.metrics.alarms import Alarm, Alarms
from megatron_dppo.training.metrics.live_display import HEADLINE, LiveDisplay
from megatron_dppo.training.metrics.prometheus_sink import PrometheusSink
from megatron_dppo.training.metrics.run_folder import RunFolder, json_records
from megatron_dppo.training.metrics.sample_log import chosen_samples, distribution_record, sample_records
from megatron_dppo.training.metrics.sink import Guarded, GuardedSinks, Metrics, Sink
from megatron_dppo.training.metrics.token_record import StepTokens
from megatron_dppo.training.rollouts import Rollouts


class MetricsLog:
    """Writes one record per step and shows progress: a live display on a terminal, one line per step in a log file.

    Exists on every rank; only the one that ``writes`` does anything. Nothing that fails in here ends the run: it is said
    once, and whatever still works goes on.
    """

    def __init__(self, folder: RunFolder, config: Config, writes: bool, console: Console | None = None) -> None:
        self._folder = folder
        self._config = config
        self._writes = writes
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._guard = Guarded(self.say)
        self._sinks = GuardedSinks(self._guard, {})
        self._live: LiveDisplay | None = None
        self._alarms = Alarms(config.logging.alarms)
        self._due: list[Alarm] = []

    def start(self, step: int) -> None:
        """Begin after ``step`` completed steps; what was logged of later ones is dropped, a resumed run repeats it."""
        if not self._writes:
            return
        self._folder.forget_after(step)
        self._guard.attempt("alarms", self._remember)
        self._sinks = GuardedSinks(self._guard, self._factories(step))
        if self._console.is_terminal:
            self._live = LiveDisplay(self._console, self._config.train.steps)
            self._guard.attempt("live display", partial(self._live.start, step))

    def say(self, message: str) -> None:
        """One line for the person who watches."""
        if self._writes:
            self._console.print(message, markup=False)

    def phase(self, name: str) -> None:
        """What the run does from now on, for the person who watches."""
        if self._live is not None:
            self._guard.attempt("live display", partial(self._live.phase, name))

    def record(self, step: int, metrics: Metrics) -> None:
        """Write a step's metrics, numbers and texts, to every sink; step 0 is the state before training."""
        if not self._writes:
            return
        self._append("metrics.jsonl", {"step": step, **_json_safe(metrics)})
        self._sinks.record(step, metrics)
        self._due += self._alarms.look(step, metrics)
        if self._live is not None:
            self._guard.attempt("live display", partial(self._live.record, step, metrics))
            return
        headline = "  ".join(
            f"{label} {form.format(metrics[name])}" for label, name, form in HEADLINE if name in metrics
        )
        self.say(f"step {step}/{self._config.train.steps}  {headline}")

    def rollouts(
        self,
        step: int,
        rollouts: Rollouts,
        tokens: StepTokens,
        token_texts: Callable[[Sequence[int]], list[str]],
    ) -> None:
        """Write what the run folder keeps of the step's responses, why others cannot be used, and the alarms that are due."""
        if not self._writes:
            return
        for reason in rollouts.reasons:
            self._append("failures.jsonl", {"step": step, "reason": reason})
        samples: list[dict[str, Any]] = []

        def keep_samples() -> None:
            chosen = chosen_samples(rollouts, self._config.logging.samples_per_step)
            samples.extend(sample_records(step, rollouts.own, chosen, tokens, token_texts))
            for sample in samples:
                self._folder.append(self._folder.samples_path, sample)

        self._guard.attempt("samples.jsonl", keep_samples)
        longest = self._config.rollout.max_response_tokens
        self._append("distributions.jsonl", distribution_record(step, rollouts, tokens, longest))
        due, self._due = self._due, []
        for alarm in due:
            self._guard.attempt("alarms", partial(self._raise_alarm, alarm, samples))

    def close(self) -> None:
        """Flush and close every sink."""
        if self._live is not None:
            self._guard.attempt("live display", self._live.stop)
            self._live = None
        self._sinks.close()

    def _append(self, file: str, record: dict[str, Any]) -> None:
        self._guard.attempt(file, lambda: self._folder.append(self._folder.path / file, record))

    def _factories(self, step: int) -> dict[str, Callable[[], Sink]]:
        logging, run = self._config.logging, self._config.run.name or self._folder.path.name
        factories: dict[str, Callable[[], Sink]] = {}
        if logging.tensorboard:
            from megatron_dppo.training.metrics.tensorboard_sink import TensorBoardSink

            factories["TensorBoard"] = lambda: TensorBoardSink(self._folder.tensorboard, step)
        if logging.wandb.project:
            from megatron_dppo.training.metrics.wandb_sink import WandbSink

            settings: Any = OmegaConf.to_container(OmegaConf.structured(self._config), enum_to_str=True)
            factories["Weights & Biases"] = lambda: WandbSink(logging.wandb, self._folder.path, run, settings)
        if logging.prometheus_port:
            factories["Prometheus endpoint"] = lambda: PrometheusSink(logging.prometheus_port, run)
        return factories

    def _remember(self) -> None:
        """What the alarms have seen of a run that is continued."""
        lines = self._folder.alarms_path
        self._alarms = Alarms(self._config.logging.alarms, [record["alarm"] for record in json_records(lines)])
        for record in json_records(self._folder.metrics_path):
            known = {name: value for name, value in record.items() if value is not None and name != "step"}
            self._due += self._alarms.look(record["step"], known)

    def _raise_alarm(self, alarm: Alarm, samples: list[dict[str, Any]]) -> None:
        self._folder.evidence.mkdir(exist_ok=True)
        file = self._folder.evidence / f"alarm_{alarm.name}_step_{alarm.step}.json"
        self.say(f"alarm after step {alarm.step}: {alarm.message} (evidence: {file})")
        found = {"step": alarm.step, "alarm": alarm.name, "message": alarm.message}
        evidence = {**found, "steps": [_json_safe(of_step) for of_step in alarm.window], "samples": samples}
        file.write_text(json.dumps(evidence, indent=1, ensure_ascii=False), encoding="utf-8", errors="backslashreplace")
        self._folder.append(self._folder.alarms_path, {**found, "evidence": file.name})


def _json_safe(metrics: Mapping[str, float | str]) -> dict[str, Any]:
    """NaN and infinity are not JSON: write null, so that any reader can parse the file."""
    return {n: value if isinstance(value, str) or math.isfinite(value) else None for n, value in metrics.items()}
