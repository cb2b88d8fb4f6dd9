"""Configuration files: inheritance, overrides, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dppo.errors import ConfigError
from megatron_dppo.tasks.config import CodeRewardConfig, HttpRewardConfig
from megatron_dppo.training.config.load import load_config, save_config
from megatron_dppo.training.config.schema import Config

CONF = Path(__file__).parents[3] / "examples" / "conf"


TWO_TASKS = "tasks: {train: [{name: one, size: 3}, {name: two, parameters: {a: 1}}]}"


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
        (
            "rollout: {embedded: {weight_rounding: fp4}}",
            [],
            "weight_rounding must be one of none, bf16, fp8_e4m3, int8",
        ),
        ("parallel: {tensor_model_parallel_size: 0}", [], "tensor_model_parallel_size must be at least 1"),
        ("", ["train.steps"], "expected key.sub=value"),
        ("train: [", [], "not valid YAML"),
        ("[1, 2]", [], "a mapping is expected"),
        ("defaults: nowhere.yaml", [], "must be a list"),
        ("defaults: [nowhere.yaml]", [], "nowhere.yaml: no such configuration file"),
        ("defaults: [run.yaml]", [], "leads back to this file"),
        ("train: {steps: 1}\ntrain: {steps: 2}", [], "duplicate key train"),
        ("train: {steps: 010}", [], r"`train\.steps`: YAML reads 010 as 8"),
        ("", ["checkpoint.every=1:30"], r"`checkpoint\.every`: YAML reads 1:30 as 90"),
        ("run: {<<: {name: 007}}", [], r"`run\.name` is a text, and YAML reads it as 7: put it in quotes"),
        (TWO_TASKS, ["tasks.train.size=5"], r"`tasks\.train` is a list of 2 entries, none of which is 'size'"),
        (TWO_TASKS, ["tasks.train[2].size=5"], r"`tasks\.train` is a list of 2 entries, none of which is '2'"),
        (TWO_TASKS, ["tasks.train[-1].size=5"], r"'tasks\.train\[-1\]\.size' is no key"),
        (TWO_TASKS, ["tasks.train[0]=5"], r"`tasks\.train\[0\]` is a section"),
        (TWO_TASKS, ["tasks.train[0].siz=5"], r"unknown key `tasks\.train\[0\]\.siz`; did you mean .*size"),
        ("", ["tasks.train[0].size=5"], r"`tasks\.train` is a list of 0 entries"),
        ("", ["train.steps.every=5"], r"`train\.steps` is one value"),
        ("", ["train..steps=5"], r"'train\.\.steps' is no key"),
        ("", ["train.steps=[5"], "while parsing a flow sequence"),
    ],
)
def test_a_mistake_gives_one_error_that_names_it(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "run.yaml", text), overrides)


@pytest.mark.parametrize(
    "name", ["20250102_153000", "007", "1e5", "0x10", "12:30:45", "yes", "2025-01-02", "null-model"]
)
def test_a_text_option_stays_as_it_is_written(tmp_path, name):
    in_file = load_config(write(tmp_path / "run.yaml", f"run: {{name: {name}}}\ntasks: {{train: [{{name: {name}}}]}}"))
    assert (in_file.run.name, in_file.tasks.train[0].name) == (name, name)
    empty = write(tmp_path / "empty.yaml", "")
    typed = load_config(
        empty, [f"run.name={name}", f"tasks.train=[{{name: {name}}}]", f"rollout.sglang.extra_args=[--x,{name}]"]
    )
    assert (typed.run.name, typed.tasks.train[0].name) == (name, name)
    assert typed.rollout.sglang.extra_args == ["--x", name]
    save_config(typed, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == typed


@pytest.mark.parametrize(
    ("typed", "template"),
    [
        ("{question} # now", "{question} # now"),
        ("Q: {question}\nA: ", "Q: {question}\nA: "),
        ("'{question} '", "{question} "),
        ('"{question}\\n"', "{question}\n"),
    ],
)
def test_a_text_on_the_command_line_is_no_yaml_but_for_its_quotes(tmp_path, typed, template):
    config = load_config(write(tmp_path / "run.yaml", TWO_TASKS), [f"tasks.train[1].prompt_template={typed}"])
    assert config.tasks.train[1].prompt_template == template


def test_null_unsets_an_option(tmp_path):
    run = write(tmp_path / "run.yaml", "run: {name: mine}\nalgorithm: {loss: {delta_low: 0.1}}")
    config = load_config(run, ["run.name=null", "algorithm.loss.delta_low=null"])
    assert (config.run.name, config.algorithm.loss.delta_low) == (None, None)


def test_an_entry_of_a_list_can_be_changed(tmp_path):
    run = write(tmp_path / "run.yaml", TWO_TASKS)
    config = load_config(
        run, ["tasks.train[0].size=5", "tasks.train.1.parameters.b=2", "tasks.train[1].parameters={c: 3}"]
    )
    first, second = config.tasks.train
    assert (first.name, first.size, second.name, second.parameters) == ("one", 5, "two", {"a": 1, "b": 2, "c": 3})


def test_the_section_of_the_launcher_is_nothing_to_a_run(tmp_path):
    run = write(tmp_path / "run.yaml", "launch: {trainer_nodes: 2, anything: [1]}\ntrain: {steps: 3}")
    assert load_config(run, ["launch.more=1"]) == load_config(write(tmp_path / "bare.yaml", "train: {steps: 3}"))


def test_a_choice_puts_another_file_of_the_folder_in_its_place(tmp_path):
    (tmp_path / "cluster").mkdir()
    for name, steps in (("local", 1), ("slurm", 2)):
        write(tmp_path / "cluster" / f"{name}.yaml", f"train: {{steps: {steps}}}")
    mine = write(tmp_path / "mine.yaml", "train: {steps: 3}")
    write(tmp_path / "base.yaml", "defaults: [cluster/local.yaml]")
    run = write(tmp_path / "run.yaml", "defaults: [base.yaml]")
    chosen = [load_config(run, choice).train.steps for choice in ([], ["cluster=slurm"], [f"cluster={mine}"])]
    assert chosen == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"slrum.yaml: no such configuration file; there are local.yaml, slurm.yaml"):
        load_config(run, ["cluster=slrum"])
    with pytest.raises(ConfigError, match=r"cluster=slurm replaces nothing"):
        load_config(mine, ["cluster=slurm"])


def test_a_missing_file_lists_those_there_are(tmp_path):
    write(tmp_path / "quickstart.yaml", "")
    with pytest.raises(ConfigError, match=r"there are quickstart\.yaml"):
        load_config(tmp_path / "quick_start.yaml")


@pytest.mark.parametrize(
    "path", sorted([*CONF.glob("*.yaml"), *CONF.glob("recipe/*.yaml")]), ids=lambda path: path.name
)
def test_every_example_loads_and_survives_saving(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_section_that_need_not_be_there_is_set_by_its_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "tasks:\n  train:\n    - {name: a, http_reward: {url: 'http://judge/', request: {text: response}}}\n"
        "    - {name: b, code_reward: {}, http_reward: null}\n"
    )
    config = load_config(path, ["tasks.train[0].http_reward.tries=3"])
    first, second = config.tasks.train
    assert first.http_reward == HttpRewardConfig(url="http://judge/", request={"text": "response"}, tries=3)
    assert (first.code_reward, second.code_reward, second.http_reward) == (None, CodeRewardConfig(), None)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    with pytest.raises(ConfigError, match=r"`tasks.train\[0\].http_reward.urll`; did you mean"):
        load_config(path, ["tasks.train[0].http_reward.urll=x"])
