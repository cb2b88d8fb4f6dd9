"""Weights & Biases, offline: the numbers are in its files, and a run that is continued goes on in the same W&B run."""

from __future__ import annotations

import importlib.util

import pytest

from megatron_dppo.training.config.schema import WandbConfig
from megatron_dppo.training.metrics.wandb_sink import WandbSink
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the extra: megatron-dppo[wandb]"),
]


def test_an_offline_run_is_in_the_run_folder_and_is_continued(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = WandbConfig(project="project", mode="offline")
    for step in (1, 2):
        sink = WandbSink(config, tmp_path, "name", {"run": {"name": "name"}})
        sink.record(step, {"reward/mean": 0.5, "loss": float("nan"), "backend": "cpu"})
        sink.close()
    identity = (tmp_path / "wandb_run_id.txt").read_text().strip()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == 2
    # Its own process writes them, and is not always done when it has been told to finish.
    for file in files:
        wait_until(lambda file=file: b"reward/mean" in file.read_bytes(), within_s=60, what=f"the numbers in {file}")
