"""Metrics in every sink: numbers as curves, texts as texts, NaN as JSON can say it; and a sink that fails stops nothing."""

from __future__ import annotations

import io
import json
import socket

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dppo.training.config.schema import AlarmsConfig, Config, LoggingConfig, RunConfig, TrainConfig
from megatron_dppo.training.metrics.run_folder import RunFolder
from megatron_dppo.training.metrics.sinks import MetricsLog
from megatron_dppo.training.metrics.token_record import StepTokens
from tests.training.metrics.made_rollouts import made_rollouts, token_texts


@pytest.fixture
def config(tmp_path) -> Config:
    logging = LoggingConfig(tensorboard=False, alarms=AlarmsConfig(window=2))
    return Config(run=RunConfig(name="run", root=str(tmp_path)), train=TrainConfig(steps=3), logging=logging)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200, soft_wrap=True)


def started(config: Config, console: Console, step: int = 0) -> tuple[MetricsLog, RunFolder]:
    folder = RunFolder(config.run)
    folder.create(config)
    log = MetricsLog(folder, config, writes=True, console=console)
    log.start(step)
    return log, folder


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_and_texts_reach_the_file_and_tensorboard(config, console):
    config.logging.tensorboard = True
    log, folder = started(config, console)
    log.record(1, {"loss": 0.5, "backend": "cpu"})
    log.record(2, {"loss": float("nan"), "backend": "cpu"})
    log.record(3, {"loss": 0.25, "backend": "torch"})
    log.close()
    assert lines(folder.metrics_path) == [
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


def test_a_port_in_use_is_said_once_and_the_run_goes_on(config, console):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        config.logging.prometheus_port = taken.getsockname()[1]
        log, folder = started(config, console)
        for step in (1, 2):
            log.record(step, {"loss": 0.5})
        log.close()
    said = console.file.getvalue()
    assert said.count("Prometheus endpoint failed, and the run goes on without") == 1
    assert [record["step"] for record in lines(folder.metrics_path)] == [1, 2]
    assert "step 2/3" in said  # plain lines, as this is no terminal


def test_a_file_that_cannot_be_written_is_said_once_and_the_others_are(config, console):
    log, folder = started(config, console)
    folder.metrics_path.mkdir()  # as root may write into any file
    for step in (1, 2):
        log.record(step, {"loss": 0.5})
        log.rollouts(step, made_rollouts([0.0, 1.0]), StepTokens(), token_texts)
    log.close()
    assert console.file.getvalue().count("metrics.jsonl failed") == 1
    assert [record["step"] for record in lines(folder.distributions_path)] == [1, 2]
    assert len(lines(folder.samples_path)) == 4


def test_a_torn_line_is_lost_alone(config, console):
    log, folder = started(config, console)
    log.record(1, {"loss": 0.5})
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 2, "lo')  # the disk was full
    log.record(3, {"loss": 0.5})
    whole, torn, after = folder.metrics_path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in (whole, after)] == [1, 3]
    assert torn == '{"step": 2, "lo'
    log.start(1)  # a run that is continued
    assert [record["step"] for record in lines(folder.metrics_path)] == [1]


def test_an_alarm_is_said_once_with_its_evidence_also_in_a_run_that_is_continued(config, console):
    broken = {"reward/mean": 0.5, "dppo/mask_fraction": 0.9}
    log, folder = started(config, console)
    for step in (1, 2, 3):
        log.record(step, broken)
        log.rollouts(step, made_rollouts([0.0, 1.0]), StepTokens(), token_texts)
    log.close()
    (alarm,) = lines(folder.alarms_path)
    assert (alarm["step"], alarm["alarm"]) == (2, "mask_fraction")
    evidence = json.loads((folder.evidence / alarm["evidence"]).read_text())
    assert [record["dppo/mask_fraction"] for record in evidence["steps"]] == [0.9, 0.9]
    assert [sample["reward"] for sample in evidence["samples"]] == [0.0, 1.0]
    assert console.file.getvalue().count("alarm after step 2: dppo/mask_fraction was 0.9") == 1
    log, folder = started(config, console, step=3)
    log.record(4, broken)
    log.rollouts(4, made_rollouts([0.0, 1.0]), StepTokens(), token_texts)
    assert len(lines(folder.alarms_path)) == 1
    log, folder = started(config, console, step=1)  # from before the alarm: it is due again
    log.record(2, broken)
    log.rollouts(2, made_rollouts([0.0, 1.0]), StepTokens(), token_texts)
    assert [record["step"] for record in lines(folder.alarms_path)] == [2]
    log.close()


def test_a_terminal_gets_the_live_display_in_place_of_lines(config):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    log, _ = started(config, console)
    log.phase("rollout")
    log.record(1, {"reward/mean": 0.5})
    log.say("a message [brackets stay]")
    log.close()
    shown = console.file.getvalue()
    assert "a message [brackets stay]" in shown
    assert "step 1/3" in shown
    assert "rollout" in shown


def test_a_rank_that_does_not_write_leaves_no_trace(config, console):
    folder = RunFolder(config.run)
    log = MetricsLog(folder, config, writes=False, console=console)
    log.start(0)
    log.phase("rollout")
    log.record(1, {"loss": 0.5})
    log.rollouts(1, made_rollouts([0.0]), StepTokens(), token_texts)
    log.close()
    assert not folder.path.exists()
    assert console.file.getvalue() == ""
