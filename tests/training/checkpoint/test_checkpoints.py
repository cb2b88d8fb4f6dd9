"""Checkpoints: whole or absent, of the step they say, and clear about what cannot be loaded."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state

from megatron_dppo.errors import CheckpointError
from megatron_dppo.training.checkpoint import info
from megatron_dppo.training.checkpoint.load import TrainerState, last_checkpoint, load_checkpoint
from megatron_dppo.training.checkpoint.pieces import _rectangles
from megatron_dppo.training.checkpoint.save import CheckpointWriter
from tests.training.checkpoint.checkpoint_runs import exported, save, start, train

DISTRIBUTED = {"use_distributed_optimizer": True}
OTHER_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
SAME_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


@given(st.integers(1, 7), st.integers(1, 6), st.data())
def test_any_slice_of_a_flattened_matrix_is_at_most_three_rectangles(rows, columns, data):
    low = data.draw(st.integers(0, rows * columns))
    high = data.draw(st.integers(low, rows * columns))
    matrix = torch.arange(rows * columns).view(rows, columns)
    rectangles = list(_rectangles(low, high, columns))
    found = [matrix[r : r + height, c : c + width].flatten() for r, c, height, width in rectangles]
    assert len(rectangles) <= 3
    assert torch.equal(torch.cat([*found, torch.arange(0)]), torch.arange(low, high))


def test_only_a_complete_checkpoint_is_found(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for name in ("step_00000002", "step_00000010", "step_00000011.incomplete", "step_00000010.replaced.incomplete"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "step_00000010"


def _killed_between_two_renames(folder: Path) -> str:
    policy, optimizer_state = start("qwen3_tied", {})
    checkpoint = save(folder, policy, optimizer_state, 1)
    checkpoint.rename(folder / "step_00000001.replaced.incomplete")
    (folder / "step_00000001.incomplete").mkdir()
    assert last_checkpoint(folder) is None
    with CheckpointWriter(folder, keep=1, asynchronous=False):
        found = last_checkpoint(folder)
        load_checkpoint(found, policy, optimizer_state)
    return found.name


@pytest.mark.slow
def test_a_save_that_is_killed_while_it_replaces_a_checkpoint_loses_none(ranks, tmp_path):
    assert ranks(1).run(_killed_between_two_renames, tmp_path) == ["step_00000001"]


def _reshard(folder: Path) -> bool:
    policy, optimizer_state = start("qwen3_moe", {"expert_model_parallel_size": 2, **DISTRIBUTED})
    train(policy, optimizer_state, range(1))
    checkpoint, saved = save(folder, policy, optimizer_state, 1), exported(policy)
    losses = train(policy, optimizer_state, range(1, 3))
    parallel_state.destroy_model_parallel()
    policy, optimizer_state = start("qwen3_moe", {"tensor_model_parallel_size": 2})
    load_checkpoint(checkpoint, policy, optimizer_state)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in exported(policy).items())
    return train(policy, optimizer_state, range(1, 3)) == pytest.approx(losses, rel=1e-5)


def test_a_checkpoint_goes_on_in_another_layout_with_another_optimizer(ranks, tmp_path):
    """Every pair of layouts: tests/layouts/test_checkpoint_layouts.py."""
    assert ranks(2).run(_reshard, tmp_path) == [True, True]


def _save_in_many_ways(folder: Path) -> list[str]:
    """Sync saves of one rank; returns what load_checkpoint says of checkpoints that it must not load."""
    policy, optimizer_state = start("qwen3_tied", {})
    fresh = CheckpointWriter(folder / "fresh", keep=1, asynchronous=False).save(policy, None, TrainerState())
    assert load_checkpoint(fresh, policy, optimizer_state) == TrainerState()
    train(policy, optimizer_state, range(1))
    (folder / "run" / "step_00000001.incomplete").mkdir(parents=True)  # of a save that was killed
    for step in (1, 2, 2, 3):
        checkpoint = save(folder / "run", policy, optimizer_state, step)
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["step_00000002", "step_00000003"]
    return [
        _refusal(checkpoint, dataclasses.replace(policy, dtype=torch.bfloat16), optimizer_state),
        _refusal(_edited(checkpoint, format=7), policy, optimizer_state),
        _refusal(_edited(checkpoint, format=1, hf_config={"hidden_size": 32}), policy, optimizer_state),
        _refusal(_edited(checkpoint, hf_config={"hidden_size": 64, **OTHER_ROPE}), policy, optimizer_state),
        _refusal(_edited(checkpoint, hf_config={**SAME_ROPE, "rms_norm_eps": 1e-3}), policy, optimizer_state),
        _refusal(
            _edited(checkpoint, hf_config={"rms_norm_eps": 1e-6, "num_hidden_layers": None}), policy, optimizer_state
        ),
        _refusal(
            _edited(checkpoint, hf_config={"num_hidden_layers": 4}, without="__0_0.distcp"), policy, optimizer_state
        ),
        _refusal(folder, policy, optimizer_state),
    ]


def _refusal(checkpoint: Path, policy: Any, optimizer_state: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint, policy, optimizer_state)
    return str(caught.value)


def _edited(checkpoint: Path, without: str | None = None, **changes: Any) -> Path:
    info = json.loads((checkpoint / "checkpoint.json").read_text())
    info["hf_config"].update(changes.pop("hf_config", {}))
    (checkpoint / "checkpoint.json").write_text(json.dumps({**info, **changes}))
    if without is not None:
        (checkpoint / without).unlink()
    return checkpoint


@pytest.mark.slow
def test_what_is_not_this_policys_checkpoint_is_refused_with_the_reason(ranks, tmp_path):
    (refusals,) = ranks(1).run(_save_in_many_ways, tmp_path)
    other_dtype, other_format, other_shape, other_rope, other_norm, no_model, torn, nothing = refusals
    assert "its weights are float32, the policy's are bfloat16 (model.dtype)" in other_dtype
    assert "is of format 7, this version reads format 1" in other_format
    assert "hidden_size is 32, the policy's is 64" in other_shape
    assert "rope_theta is 500000.0, the policy's is 10000.0" in other_rope
    assert "rms_norm_eps is 0.001, the policy's is 1e-06" in other_norm
    assert "cannot be built" in no_model
    assert "num_hidden_layers" in no_model
    assert "does not load" in torn
    assert "__0_0.distcp" in torn
    assert "has no checkpoint.json" in nothing


def _save_while_training_goes_on(folder: Path, layout: dict[str, Any]) -> bool:
    policy, optimizer_state = start("qwen3_moe", layout)
    train(policy, optimizer_state, range(2))
    saved, state = exported(policy), TrainerState(2, weight_version=20, prompts_drawn=200)
    with CheckpointWriter(folder, keep=2, asynchronous=True) as writer:
        may_write = threading.Event()
        writer.executor.submit(may_write.wait)  # the writing begins when we say so
        checkpoint = writer.save(policy, optimizer_state, state)
        uninterrupted = train(policy, optimizer_state, range(2, 5))
        state.step = 5
        assert last_checkpoint(folder) is None
        may_write.set()
        writer.save(policy, optimizer_state, state)  # waits for the first
        assert checkpoint.is_dir()
    assert last_checkpoint(folder).name == "step_00000005"  # leaving the context has waited for the second
    parallel_state.destroy_model_parallel()
    policy, optimizer_state = start("qwen3_moe", layout)
    assert load_checkpoint(checkpoint, policy, optimizer_state) == TrainerState(2, weight_version=20, prompts_drawn=200)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in exported(policy).items())
    return train(policy, optimizer_state, range(2, 5)) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("layout", [DISTRIBUTED, {"tensor_model_parallel_size": 2}], ids=["DP2 distributed", "TP2"])
def test_an_asynchronous_checkpoint_is_of_its_step_although_training_went_on(ranks, tmp_path, layout):
    assert ranks(2).run(_save_while_training_goes_on, tmp_path, layout) == [True, True]


def _fail_in_the_background(folder: Path) -> list[str]:
    policy, optimizer_state = start("qwen3_tied", {"tensor_model_parallel_size": 2})
    messages = []
    with CheckpointWriter(folder, keep=2, asynchronous=True) as writer:
        for wait in (writer.finish, lambda: writer.save(policy, optimizer_state, TrainerState(2))):
            may_write = threading.Event()
            writer.executor.submit(may_write.wait)
            writer.save(policy, optimizer_state, TrainerState(1))
            if torch.distributed.get_rank() == 0:
                (folder / "step_00000001.incomplete").rmdir()
                (folder / "step_00000001.incomplete").write_text("no folder")
            torch.distributed.barrier()
            may_write.set()
            with pytest.raises(CheckpointError) as caught:
                wait()
            messages.append(str(caught.value))
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                (folder / "step_00000001.incomplete").unlink()
            torch.distributed.barrier()
        writer.finish()  # says it once
    assert last_checkpoint(folder) is None
    return messages


@pytest.mark.slow
def test_a_save_that_fails_in_the_background_is_an_error_at_the_next_save_and_at_the_end(ranks, tmp_path):
    for messages in ranks(2).run(_fail_in_the_background, tmp_path):
        assert len(messages) == 2
        assert all("step_00000001.incomplete" in message and "was not written" in message for message in messages)


def _leave_by_an_exception(folder: Path) -> bool:
    policy, optimizer_state = start("qwen3_tied", {})
    try:
        with CheckpointWriter(folder, keep=2, asynchronous=True) as writer:
            writer.save(policy, optimizer_state, TrainerState(1))
            raise KeyError
    except KeyError:
        return last_checkpoint(folder).name == "step_00000001"
    return False


@pytest.mark.slow
def test_a_run_that_fails_still_completes_the_checkpoint_under_way(ranks, tmp_path):
    assert ranks(2).run(_leave_by_an_exception, tmp_path) == [True, True]


def _stored_sizes(folder: Path) -> dict[str, int]:
    policy, optimizer_state = start("qwen3_moe", DISTRIBUTED)
    train(policy, optimizer_state, range(1))
    checkpoint = save(folder, policy, optimizer_state, 1)
    return {path.name: path.stat().st_size for path in checkpoint.iterdir()}


@pytest.mark.slow
def test_ranks_share_the_writing(ranks, tmp_path):
    sizes, _ = ranks(2).run(_stored_sizes, tmp_path)
    assert sizes.keys() == {"checkpoint.json", ".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert math.isclose(sizes["__0_0.distcp"], sizes["__1_0.distcp"], rel_tol=0.1)


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch):
    def no_metadata(name):
        raise PackageNotFoundError(name)

    assert info.own_version() == version("megatron-dppo")
    monkeypatch.setattr(info, "version", no_metadata)
    assert info.own_version() == "not installed"
