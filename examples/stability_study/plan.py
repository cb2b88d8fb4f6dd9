"""The list of runs that study.yaml stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PARTS, SHORT = "parts", "short"
WARM_START = "warm_start"
NO_CURVES = (WARM_START, "tightness_from", "tightness_to")  # parts whose runs are made for the policy that they leave


class StudyError(ValueError):
    """study.yaml, or what was recorded of it, cannot be used as it stands."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of the study.

    Attributes:
        name: of its folder and its record.
        part: of the study.
        method: key of ``methods``.
        mismatch: key of ``mismatches``.
        seed: of prompts and sampling.
        policy: key of ``policies``, whose warm start it begins from.
        overrides: of the configuration that all runs share.
    """

    name: str
    part: str
    method: str
    mismatch: str
    seed: int
    policy: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """What study.yaml says.

    Attributes:
        conf: the configuration that all runs share.
        seconds_per_run: expected, on one core.
        warm_starts: policy -> the run that its warm start is.
        policies: name -> arguments of tools/setup/make_tiny_policy.py.
        runs: in the order in which they are to be made.
    """

    conf: Path
    seconds_per_run: float
    warm_starts: Mapping[str, PlannedRun]
    policies: Mapping[str, tuple[str, ...]]
    runs: tuple[PlannedRun, ...]


def read_study(path: Path, parts: str = PARTS) -> Study:
    """``parts``: the key of the list of parts. Raises StudyError for unknown names and for runs that are planned twice."""
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs = tuple(run for part in _entry(text, parts, path.name) for run in _runs_of(part, text))
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StudyError(f"{path.name}: {twice[0]} is planned twice: give one of its parts other seeds or methods")
    policies = {run.policy for run in runs}
    return Study(
        conf=path.parent / text["conf"],
        seconds_per_run=float(text["seconds_per_run"]),
        warm_starts={policy: _warm_start(policy, text) for policy in sorted(policies)},
        policies={name: tuple(_entry(text["policies"], name, "policies")["made_with"]) for name in sorted(policies)},
        runs=runs,
    )


def _runs_of(part: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[PlannedRun]:
    for seed in part["seeds"]:
        for mismatch in part["mismatches"]:
            setting = _entry(text["mismatches"], mismatch, "mismatches")
            for method in part.get("methods", text["methods"]):
                overrides = [*text["train"], *setting.get("overrides", ()), *_entry(text["methods"], method, "methods")]
                yield PlannedRun(
                    name=f"{part['name']}-{mismatch}-{method}-{seed}",
                    part=part["name"],
                    method=method,
                    mismatch=mismatch,
                    seed=seed,
                    policy=setting["policy"],
                    overrides=(*overrides, *part.get("overrides", ()), f"run.seed={seed}"),
                )


def _warm_start(policy: str, text: Mapping[str, Any]) -> PlannedRun:
    name = f"{WARM_START}-{policy}"
    overrides = (*text["warm_start"], *_entry(text["policies"], policy, "policies").get("warm_start", ()))
    return PlannedRun(name, WARM_START, WARM_START, "none", 0, policy, overrides)


def _entry(table: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in table:
        raise StudyError(f"{where} has no {name!r}; it has {', '.join(map(str, table))}")
    return table[name]
