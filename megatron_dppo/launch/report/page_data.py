"""From runs to what the page draws: bounded, however long a run was."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from statistics import fmean, median
from typing import Any

from omegaconf import OmegaConf

from megatron_dppo.launch.report.panels import PANELS
from megatron_dppo.launch.report.run_data import RunData, flat
from megatron_dppo.launch.report.sample_choice import sample_cards
from megatron_dppo.training.config.schema import Config

_MOST_POINTS = 600  # of a curve: more than a chart has pixels for
_MOST_WINDOWS = 80  # of the distributions
_ENDS = 5  # steps whose mean stands for the start, and for the end
_SUMS = ("tokens", "masked", "divergence", "abs_log_ratio")


def page_data(runs: Sequence[RunData], title: str | None = None) -> dict[str, Any]:
    """What assets/page.js reads."""
    return {
        "title": title or " · ".join(run.name for run in runs),
        "written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "panels": [asdict(panel) for panel in PANELS],
        "defaults": {key: _plain(value) for key, value in _defaults().items()},
        "runs": [_run(run) for run in runs],
    }


def _defaults() -> dict[str, Any]:
    return flat(OmegaConf.to_container(OmegaConf.structured(Config()), enum_to_str=True))


def _run(run: RunData) -> dict[str, Any]:
    steps = [record for record in run.metrics if "time/step_s" in record or record["step"] > 0]
    return {
        "name": run.name,
        "folder": str(run.folder),
        "every": _stride(len(run.metrics), _MOST_POINTS),
        **_curves(run.metrics),
        "distributions": _distributions(run.distributions),
        "samples": sample_cards(run.samples),
        "alarms": [{key: alarm.get(key) for key in ("step", "alarm", "message")} for alarm in run.alarms],
        "failures": run.failures,
        "summary": _summary(steps, run.metrics),
        "config": {key: _plain(value) for key, value in run.config.items()},
    }


def _plain(value: Any) -> str:
    """As one would write it in a configuration file."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def _stride(count: int, most: int) -> int:
    return max(math.ceil(count / most), 1)


def _curves(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"x": {step, seconds, tokens}, "metrics": {name: [value or None]}, "texts"}; neighbours of a long run are averaged."""
    seconds = list(accumulate(float(record.get("time/step_s") or 0.0) for record in records))
    tokens = list(
        accumulate(
            float(record.get("throughput/tokens_per_s") or 0.0) * float(record.get("time/step_s") or 0.0)
            for record in records
        )
    )
    stride = _stride(len(records), _MOST_POINTS)
    groups = [slice(at, at + stride) for at in range(0, len(records), stride)]
    names = dict.fromkeys(name for record in records for name in record if name != "step")
    columns = {name: [record.get(name) for record in records] for name in names}
    texts = {name: values for name, values in columns.items() if any(isinstance(value, str) for value in values)}
    return {
        "x": {
            "step": [records[group][-1]["step"] for group in groups],
            "seconds": [_rounded(seconds[group][-1]) for group in groups] if seconds[-1] > 0 else None,
            "tokens": [_rounded(tokens[group][-1]) for group in groups] if tokens[-1] > 0 else None,
        },
        "metrics": {
            name: [_mean(values[group]) for group in groups] for name, values in columns.items() if name not in texts
        },
        "texts": {name: [value for value in values if value][-1] for name, values in texts.items()},
    }


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    return _rounded(fmean(known)) if known else None


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _distributions(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The steps in windows; of each window the sums over its steps. None without any."""
    if not records:
        return None
    stride = _stride(len(records), _MOST_WINDOWS)
    windows = [records[at : at + stride] for at in range(0, len(records), stride)]
    found: dict[str, Any] = {"first": [w[0]["step"] for w in windows], "last": [w[-1]["step"] for w in windows]}
    for name in ("reward", "length"):
        form = {key: records[-1][name][key] for key in ("low", "width")}
        found[name] = {**form, "counts": [_added([record[name]["counts"] for record in w]) for w in windows]}
    for name in ("position", "probability"):
        lowest = max((record[name]["lowest"] for record in records), key=len)
        sums = {key: [_added([record[name][key] for record in w]) for w in windows] for key in _SUMS}
        found[name] = {"lowest": lowest, **sums}
    return found


def _added(rows: Sequence[Sequence[float]]) -> list[float]:
    """Place by place; a row that ends early has nothing more."""
    total = [0.0] * max(len(row) for row in rows)
    for row in rows:
        for at, value in enumerate(row):
            total[at] += value
    return [_rounded(value) for value in total]


def _summary(steps: Sequence[dict[str, Any]], every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the table at the top; None where there is nothing to tell."""

    def values(name: str, records: Sequence[dict[str, Any]] = steps) -> list[float]:
        return [float(r[name]) for r in records if isinstance(r.get(name), (int, float))]

    def ends(name: str) -> list[float] | None:
        known = values(name)
        return [_rounded(fmean(known[:_ENDS])), _rounded(fmean(known[-_ENDS:]))] if known else None

    accuracies = values("eval/accuracy", every)
    speeds, kl, masked = values("throughput/tokens_per_s"), values("mismatch/kl_k3"), values("dppo/mask_fraction")
    return {
        "steps": every[-1]["step"],
        "seconds": _rounded(sum(values("time/step_s"))),
        "reward": ends("reward/mean"),
        "accuracy": [_rounded(accuracies[0]), _rounded(accuracies[-1]), _rounded(max(accuracies))]
        if accuracies
        else None,
        "length": ends("rollout/length_mean"),
        "entropy": ends("entropy"),
        "masked": _rounded(median(masked)) if masked else None,
        "mismatch": _rounded(max(kl)) if kl else None,
        "tokens_per_s": _rounded(median(speeds)) if speeds else None,
        "skipped": sum(values("train/skipped_steps")),
    }
