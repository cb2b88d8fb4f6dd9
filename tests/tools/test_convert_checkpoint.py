"""tools/convert_checkpoint.py, run as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forked_ranks import run_script
from tests.models.tiny_policies import write_tiny_hf_model
from tests.training.checkpoint.checkpoint_runs import save, start, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def convert(folder: Path, *arguments: object) -> tuple[int, str]:
    """Exit code and output of the tool, started in ``folder``."""
    script = ROOT / "tools" / "convert_checkpoint.py"
    return run_script(script, list(map(str, arguments)), ranks=1, folder=folder, timeout=280)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_tied"])
def test_a_hugging_face_folder_comes_back_bit_for_bit(tmp_path, kind):
    source = write_tiny_hf_model(kind, tmp_path / "hf")
    code, output = convert(tmp_path, "from-hf", source, "checkpoints", "--dtype", "fp32", "--verify")
    assert code == 0, output
    assert "largest difference" in output
    code, output = convert(tmp_path, "to-hf", "checkpoints/step_00000000", "back", "--verify")
    assert code == 0, output
    before, after = weights(source), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _save_checkpoint(folder: Path) -> None:
    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "use_distributed_optimizer": True}
    policy, optimizer_state = start("qwen3_moe", layout, torch.bfloat16)
    train(policy, optimizer_state, range(1))
    save(folder, policy, optimizer_state, 1)


def test_a_checkpoint_of_any_layout_becomes_a_hugging_face_folder(ranks, tmp_path):
    ranks(2).run(_save_checkpoint, tmp_path / "checkpoints")
    source = write_tiny_hf_model("qwen3_moe", tmp_path / "hf")
    (source / "tokenizer_config.json").write_text("{}")
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    code, output = convert(tmp_path, "to-hf", checkpoint, "exported", "--tokenizer", source, "--verify")
    assert code == 0, output
    assert "step 1 of" in output
    assert (tmp_path / "exported" / "tokenizer_config.json").is_file()
    assert {tensor.dtype for tensor in weights(tmp_path / "exported").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("to-hf", "nothing", "out"), "nothing has no checkpoint.json: give the folder of a checkpoint"),
        (("from-hf", "nothing", "out"), "no config.json in nothing"),
    ],
    ids=["no checkpoint", "no Hugging Face folder"],
)
def test_what_cannot_be_converted_is_one_clear_line(tmp_path, arguments, message):
    code, output = convert(tmp_path, *arguments)
    assert code == 2
    assert message in output
    assert "Traceback" not in output
