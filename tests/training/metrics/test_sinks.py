"""Metrics in every sink: numbers as curves, texts as texts, NaN as JSON can say it."""

from __future__ import annotations

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dppo.training.config.schema import Config, RunConfig
from megatron_dppo.training.metrics.run_folder import RunFolder
from megatron_dppo.training.metrics.sinks import MetricsLog


def test_numbers_and_texts_reach_the_file_and_tensorboard(tmp_path):
    config = Config(run=RunConfig(name="run", root=str(tmp_path)))
    folder = RunFolder(config.run)
    folder.create(config)
    log = MetricsLog(folder, total_steps=3, tensorboard=True, writes=True)
    log.start(0)
    log.record(1, {"loss": 0.5, "backend": "cpu"})
    log.record(2, {"loss": float("nan"), "backend": "cpu"})
    log.record(3, {"loss": 0.25, "backend": "torch"})
    log.close()
    assert [json.loads(line) for line in folder.metrics_path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5, "backend": "cpu"},
        {"step": 2, "loss": None, "backend": "cpu"},
        {"step": 3, "loss": 0.25, "backend": "torch"},
    ]
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (3, 0.25)]
    texts = events.Tensors("backend/text_summary")
    # A text is written when it changes: the same word at every step says nothing.
    assert [(event.step, event.tensor_proto.string_val[0].decode()) for event in texts] == [(1, "cpu"), (3, "torch")]
