"""What is kept of a run: one line of docs/records/stability_study/metrics.jsonl, small enough to be committed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.stability_study.plan import PlannedRun, StudyError

DIGITS = 4
AT_THE_END = "at the end"
BINS = tuple(f"dppo/mask_fraction_mu_{name}" for name in ("0_0.01", "0.01_0.1", "0.1_0.5", "0.5_0.9", "0.9_1"))
SERIES = (
    "reward/mean",
    "mismatch/abs_log_ratio",
    "mismatch/kl_k3",
    "entropy",
    "dppo/mask_fraction",
    "dppo/bad_update_fraction",
    "dppo/divergence_p99",
    "grad_norm",
    "train/skipped_steps",
    "time/rollout_s",
    "time/update_s",
    *BINS,
)


def line_of(run: PlannedRun, folder: Path, *, commit: str, ended: str, seconds: float) -> dict[str, Any]:
    """The record of a run whose folder is ``folder``.

    Args:
        run: as planned.
        folder: with its metrics.jsonl.
        commit: whose code ran.
        ended: ``AT_THE_END``, or the message that it stopped with.
        seconds: its wall clock, start included.
    """
    path = folder / "metrics.jsonl"
    metrics = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    steps = [entry for entry in metrics if "reward/mean" in entry]
    return {
        **asdict(run),
        "commit": commit,
        "ended": ended,
        "seconds": round(seconds, 1),
        "eval_accuracy": [shortened(entry["eval/accuracy"]) for entry in metrics if "eval/accuracy" in entry],
        "series": {name: [shortened(entry.get(name)) for entry in steps] for name in SERIES},
    }


def shortened(value: float | None) -> float | None:
    """``DIGITS`` significant digits; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All that was recorded; nothing, if nothing was yet. A line torn by a kill is left out: its run is made again."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one record, on a line of its own even if the last one was torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(line, ensure_ascii=False) + "\n")


def missing(runs: tuple[PlannedRun, ...], lines: list[dict[str, Any]]) -> list[PlannedRun]:
    """The planned runs that are not recorded. StudyError if one was recorded with other settings than those planned now."""
    recorded = {line["name"]: tuple(line["overrides"]) for line in lines}
    for run in runs:
        if recorded.get(run.name, run.overrides) != run.overrides:
            changed = sorted(set(recorded[run.name]) ^ set(run.overrides))
            raise StudyError(
                f"{run.name} is recorded with other settings than study.yaml has now ({', '.join(changed)}): rename the"
                " method, or remove the records that no longer hold"
            )
    return [run for run in runs if run.name not in recorded]
