"""What is the same for every framework whose loss is PPO's or GRPO's: the anchor, the bound on a ratio, and data."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from megatron_dppo.launch.import_config.translation import Translation

ANCHOR = (
    "anchor: they measure the ratio from log-probs that the trainer recomputes before an update; here it is measured from"
    " the engine's own (algorithm.anchor: rollout), and no weights correct for the difference. Theirs is algorithm.anchor:"
    " recomputed, which 2602.04879 shows to collapse"
)
CLIPPED_SAMPLING = (
    "truncated sampling changes the support of the rollout policy, and the trust region could not be measured;"
    " responses are drawn from the whole softmax"
)


def bound_on_ratio(translation: Translation, key: str, low: float, high: float, dual: float | None) -> None:
    """A clip range of the ratio becomes DPPO's threshold, which is another thing; how to have the same is said."""
    same = f"trust_region: ppo_clip, ppo_clip_low: {low:g}, ppo_clip_high: {high:g}"
    same += f", ppo_dual_clip: {dual:g}" if dual is not None and dual < 1000 else ""
    translation.options.setdefault("algorithm.loss.divergence", "binary_tv")
    translation.differs[key] = (
        f"clip ratios bound pi / mu, this loss the divergence (TV 0.15 unless algorithm.loss.delta_* say otherwise): there is"
        f" no conversion. For their rule as a baseline: algorithm.loss: {{{same}}}"
    )


def kl_penalty(translation: Translation, key: str, coefficient: float, estimator: str) -> None:
    """A KL to the reference policy, in the loss."""
    if not coefficient:
        return
    translation.options["algorithm.loss.kl_coef"] = coefficient
    translation.options["algorithm.loss.kl_estimator"] = estimator
    translation.differs[key] = (
        "the reference policy is the one that the run starts from; estimators are not clamped (docs/algorithm.md has their"
        " gradients)"
    )


def task(name: str) -> dict[str, Any]:
    """A task of problems in a file, for data that the other framework loads by name."""
    plain = _plain(name)
    return {"name": plain, "kind": "jsonl", "path": f"data/{plain}.jsonl"}


def parquet_task(path: str) -> dict[str, Any]:
    """A task that reads the other framework's own file; of a path that a shell completes the end counts, under ``data/``."""
    end = "/".join(path.split("/")[-2:])
    return {
        "name": _plain(str(PurePath(end).with_suffix(""))),
        "kind": "parquet",
        "path": f"data/{end}" if "$" in path else path,
    }


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower() or "task"
