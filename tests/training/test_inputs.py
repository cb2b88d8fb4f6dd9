"""What a run reads from disk is checked before anything is built."""

from __future__ import annotations

import json

import pytest

from megatron_dppo.errors import CheckpointError, ConfigError, TaskError
from megatron_dppo.tasks.held_out import question_key
from megatron_dppo.training.checkpoint.info import CheckpointInfo, TrainerState
from megatron_dppo.training.config.load import load_config
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.inputs import read_run_inputs
from megatron_dppo.training.run import check_run_folder
from tests.models.tiny_policies import tiny_hf_config
from tests.training.tiny_runs import QUICKSTART, write_tiny_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_tiny_policy(tmp_path_factory.mktemp("policy"))


def quickstart(policy, *overrides: str) -> Config:
    return load_config(QUICKSTART, [f"model.path={policy}", *overrides])


def test_training_never_sees_a_held_out_question(policy):
    inputs = read_run_inputs(quickstart(policy, "eval.prompts=64"), world_size=2)
    held_out = {question_key(prompt.metadata["problem"].question) for prompt in inputs.eval_prompts}
    trained = {question_key(inputs.train_problems.problem(i).question) for i in range(500)}
    assert len(held_out) == 64
    assert not held_out & trained


def test_replicas_share_out_the_prompts_of_a_step(policy):
    inputs = read_run_inputs(quickstart(policy), world_size=2)
    whole = [prompt.prompt_id for prompt in inputs.train_prompts(8, 8, 0, 1)]
    parts = [[prompt.prompt_id for prompt in inputs.train_prompts(8, 8, share, 2)] for share in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(whole)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(policy, tmp_path):
    config_json = json.loads((policy / "config.json").read_text())
    config_json["vocab_size"] = 100
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    settings = (f"model.path={tmp_path}", f"model.tokenizer={policy}", "model.init=random")
    with pytest.raises(ConfigError, match=r"tokens, the model only 100: they do not belong together"):
        read_run_inputs(quickstart(policy, *settings), world_size=2)


LLAMA_SIZES = {"num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LLAMA_SIZES |= {"max_position_embeddings": 1024}


def end_tokens(policy, folder, config_eos, generation_eos, tokenizer_eos=None):
    """The stop ids of a Llama folder whose files name these end-of-sequence tokens ("absent": no such field)."""
    folder.mkdir()
    for file in policy.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = tokenizer_eos
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "llama", "vocab_size": 300, "num_attention_heads": 4, **LLAMA_SIZES}
    config |= {} if config_eos == "absent" else {"eos_token_id": config_eos}
    (folder / "config.json").write_text(json.dumps(config))
    if generation_eos != "absent":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    one_rank = ["parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=1"]
    settings = (f"model.path={folder}", "model.init=random", *one_rank)
    return read_run_inputs(quickstart(policy, *settings), world_size=1).stop_token_ids


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [
        ("absent", [9, 11], (9, 11)),  # not Llama's 2, which is a default of its class
        (None, 9, (9,)),
        (7, "absent", (7,)),
        ([7, 8], [9, 8], (7, 8, 9)),
        (7, None, (7,)),
    ],
)
def test_a_response_ends_at_the_tokens_that_the_files_name(policy, tmp_path, config_eos, generation_eos, expected):
    assert end_tokens(policy, tmp_path / "model", config_eos, generation_eos) == expected


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "message"),
    [
        ("absent", "absent", "names an end-of-sequence token"),
        (None, [], "names an end-of-sequence token"),
        (300, "absent", r"config\.json: eos_token_id is 300: expected ids of tokens, from 0 to 299"),
        ("absent", "<eos>", r"generation_config\.json: eos_token_id is '<eos>'"),
        (True, "absent", "eos_token_id.*True"),
        (7, [9, -1], r"eos_token_id is \[9, -1\]"),
        (7, 9.0, r"eos_token_id is 9\.0"),
    ],
)
def test_an_end_of_sequence_that_is_no_token_is_refused(policy, tmp_path, config_eos, generation_eos, message):
    with pytest.raises(ConfigError, match=message):
        end_tokens(policy, tmp_path / "model", config_eos, generation_eos)


@pytest.mark.parametrize("text", ["{", "[9]"])
def test_a_generation_config_that_is_no_json_object_is_named(policy, tmp_path, text):
    folder = tmp_path / "model"
    with pytest.raises(ConfigError):
        end_tokens(policy, folder, "absent", "absent")
    (folder / "generation_config.json").write_text(text)
    one_rank = ["parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=1"]
    with pytest.raises(ConfigError, match=r"generation_config\.json (is not valid JSON|holds a list)"):
        read_run_inputs(quickstart(policy, f"model.path={folder}", "model.init=random", *one_rank), world_size=1)


def test_weights_that_do_not_fit_are_found_before_the_run(policy, tmp_path):
    for file in policy.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ConfigError, match=r"model\.safetensors is no whole safetensors file"):
        read_run_inputs(quickstart(policy, f"model.path={tmp_path}"), world_size=2)
    assert read_run_inputs(quickstart(policy, f"model.path={tmp_path}", "model.init=random"), world_size=2)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["model.path=''"], ConfigError, "model.path is not set"),
        (["model.tokenizer=nowhere"], ConfigError, "no tokenizer that loads"),
        (["eval.prompts=100000"], ConfigError, "distinct questions"),
        (["rollout.max_prompt_tokens=3"], ConfigError, "eval.prompts"),
        (["tasks.train=[{name: mine, kind: jsonl, path: empty.jsonl}]"], TaskError, "empty.jsonl"),
        (["tasks.train=[{name: chain_sums}]"], TaskError, "chain_sum"),
        (["tasks.train=[{name: mine, reward: 'no.such:function'}]"], TaskError, "no"),
    ],
)
def test_bad_input_is_named(policy, tmp_path, monkeypatch, overrides, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(error, match=message):
        read_run_inputs(quickstart(policy, *overrides), world_size=2)


def test_a_used_run_folder_is_refused_where_resuming_is_not_wanted(tmp_path):
    config, hf_config = Config(), tiny_hf_config("qwen3")
    config.run.root, config.run.name, config.run.resume = str(tmp_path), "used", "never"
    check_run_folder(config, hf_config)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="holds a run already"):
        check_run_folder(config, hf_config)


def test_a_run_of_another_model_is_refused_before_its_folder_is_touched(tmp_path):
    """Its config.yaml says what the model was, and the error points there."""
    config, hf_config = Config(), tiny_hf_config("qwen3")
    config.run.root, config.run.name = str(tmp_path), "used"
    checkpoint = tmp_path / "used" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    CheckpointInfo(TrainerState(1), 1, "bfloat16", hf_config.to_dict(), {}, {}, fp32_head=True).write(checkpoint)
    check_run_folder(config, hf_config)
    config.model.fp32_head = False
    with pytest.raises(CheckpointError, match=r"model\.fp32_head was true, and is false now\. Resume with the model"):
        check_run_folder(config, hf_config)
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    with pytest.raises(CheckpointError, match=r"rope_theta is 10000\.0, the policy's is 500000\.0"):
        check_run_folder(config, tiny_hf_config("qwen3", rope_parameters=rope))
    config.model.dtype = "fp32"  # whose head is the same in any case
    with pytest.raises(CheckpointError, match="its weights are bfloat16, the policy's are float32"):
        check_run_folder(config, hf_config)
    assert sorted(path.name for path in (tmp_path / "used").rglob("*")) == [
        "checkpoint.json",
        "checkpoints",
        checkpoint.name,
    ]
