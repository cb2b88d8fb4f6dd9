"""Configuration files: inheritance, overrides, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.load import load_config, save_config
from megatron_dppo.training.config.schema import Config

CONF = Path(__file__).parents[3] / "examples" / "conf"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_config(write(tmp_path / "run.yaml", "")) == Config()


def test_a_file_wins_over_its_defaults_and_overrides_win_over_the_file(tmp_path):
    write(tmp_path / "base.yaml", "train: {steps: 1, micro_batch_size: 3}\nrollout: {samples_per_prompt: 5}")
    run = write(tmp_path / "run.yaml", "defaults: [base.yaml]\ntrain: {steps: 2}")
    config = load_config(run, ["rollout.samples_per_prompt=7", "algorithm.loss.divergence=topk_kl"])
    assert (config.train.steps, config.train.micro_batch_size, config.rollout.samples_per_prompt) == (2, 3, 7)
    assert config.algorithm.loss.thresholds == (0.05, 0.05)  # changing the divergence changes the default threshold


def test_a_list_override_replaces_the_list(tmp_path):
    config = load_config(write(tmp_path / "run.yaml", ""), ["rollout.sglang.urls=[http://a:1,http://b:2]"])
    assert config.rollout.sglang.urls == ["http://a:1", "http://b:2"]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {step: 3}", [], r"unknown key `train.step`; did you mean `train.steps`"),
        (
            "",
            ["rollout.temperature=0.7"],
            r"unknown key `rollout.temperature`; did you mean `algorithm.loss.temperature`",
        ),
        ("", ["rollout.top_p=0.9"], r"unknown key `rollout.top_p`: truncated sampling changes the support"),
        ("rollout: {top_k: 50, min_p: 0.1}", [], r"unknown key `rollout.top_k`: truncated sampling"),
        ("", ["rollout.min_p=0.1"], r"unknown key `rollout.min_p`: truncated sampling"),
        ("", ["train.optimizer.learning_rate=1"], "unknown key `train.optimizer.learning_rate`"),
        ("tran: {steps: 3}", [], r"did you mean `train`"),
        ("train: {steps: many}", [], r"train.steps: .*many"),
        ("train: 3", [], r"`train` is a section"),
        ("algorithm: {loss: {divergence: binary}}", [], r"divergence must be one of binary_tv, binary_kl"),
        ("algorithm: {loss: {delta_low: -1}}", [], "delta_low"),
        ("parallel: {tensor_model_parallel_size: 0}", [], "tensor_model_parallel_size must be at least 1"),
        ("", ["train.steps"], "expected key.sub=value"),
        ("train: [", [], "not valid YAML"),
        ("[1, 2]", [], "a mapping is expected"),
        ("defaults: nowhere.yaml", [], "must be a list"),
        ("defaults: [nowhere.yaml]", [], "nowhere.yaml: no such configuration file"),
        ("defaults: [run.yaml]", [], "leads back to this file"),
    ],
)
def test_a_mistake_gives_one_error_that_names_it(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "run.yaml", text), overrides)


def test_a_missing_file_lists_those_there_are(tmp_path):
    write(tmp_path / "quickstart.yaml", "")
    with pytest.raises(ConfigError, match=r"there are quickstart\.yaml"):
        load_config(tmp_path / "quick_start.yaml")


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_loads_and_survives_saving(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
