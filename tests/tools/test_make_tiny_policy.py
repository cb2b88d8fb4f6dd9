"""tools/setup/make_tiny_policy.py writes a folder that loads like any published model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dppo.tasks.config import TaskConfig
from tools.setup.make_tiny_policy import FAMILIES, TinyPolicySize, make_tiny_policy

TASKS = [TaskConfig(name="chain_sum", size=50)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_loads_and_generates(family: str, tmp_path: Path) -> None:
    parameters = make_tiny_policy(tmp_path, TASKS, family, TinyPolicySize(hidden_size=32, head_dim=8))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == family
    assert model.num_parameters() == parameters
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    inputs = tokenizer("1 + 2 =", return_tensors="pt")
    output = model.generate(input_ids=inputs["input_ids"], max_new_tokens=3, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_the_seed_decides_the_weights_and_leaves_the_callers_generator_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_tiny_policy(tmp_path / name, TASKS, size=TinyPolicySize(hidden_size=32, head_dim=8), seed=seed)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"attention_heads \(4\) must be a multiple of key_value_heads \(3\)"):
        make_tiny_policy(tmp_path, TASKS, size=TinyPolicySize(key_value_heads=3))
    with pytest.raises(ValueError, match="family 'gpt' is unknown; choose one of qwen3_moe"):
        make_tiny_policy(tmp_path, TASKS, family="gpt")
