"""The trainer and its servers in turns on the same devices: the order of a step, the same numbers, nothing left behind."""

from __future__ import annotations

import itertools
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
import torch

from megatron_dppo.rollout.sample import SamplingParams
from megatron_dppo.rollout.sglang import SGLangEngine
from megatron_dppo.rollout.whole_weights import WholeWeights
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rollout.engine_contract import LOG_PROB_TOLERANCE, EngineUnderTest, assert_log_probs_match, make_prompts
from tests.rollout.sglang.conftest import server_config, tiny_weights
from tests.training.tiny_runs import kill, read_metrics, start_training, train, wait_for_step, write_tiny_policy
from tests.waiting import wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(900)]

SERVED = (
    "rollout.engine=sglang",
    "rollout.sglang.deterministic=true",
    "rollout.prompts_per_step=4",
    "eval.prompts=8",
    "eval.every=0",
    "checkpoint.every=0",
)
COLOCATED = (*SERVED, "rollout.sglang.colocated=true")
RELEASE, RESUME = "release_memory_occupation", "resume_memory_occupation"
# What a server is asked when it has given its memory up, and gets weights.
SYNC = [
    *(RESUME, "begin_weight_update", "update_weights_from_tensor", "end_weight_update"),
    *("weights_checker", "update_weight_version", RESUME, "continue_generation"),
]
MAKE_ROOM = ["pause_generation", "flush_cache", RELEASE]


def _log(run: Path) -> Path:
    return run / "logs" / "sglang_server_0.log"


def _asked(run: Path) -> list[str]:
    """What the server was asked to do, by its own log; the same several times in a row once."""
    paths = re.findall(r'"POST /(\w+) HTTP', _log(run).read_text(errors="replace"))
    return [path for path, _ in itertools.groupby(paths) if path != "freeze_gc"]  # which it asks of itself


def _assert_nothing_is_left(folder: Path) -> None:
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    assert left == []


def _assert_no_shared_memory_is_left(ranks: list[int]) -> None:
    def files() -> list[str]:
        return [file.name for pid in ranks for file in Path("/dev/shm").glob(f"torch_{pid}_*")]

    # What a server that was killed had open goes with torch_shm_manager, which outlives the ranks by two seconds.
    wait_until(lambda: not files(), within_s=20, what=f"{files()} go")


def test_a_run_goes_through_its_steps_in_order(tmp_path):
    """Warm start, which is an update too, two steps and a checkpoint that is saved while optimizer state is away."""
    policy = write_tiny_policy(tmp_path / "policy")
    records = train(policy, tmp_path, "run", *COLOCATED, "warm_start.steps=5", "train.steps=2", timeout=500)
    assert [record["step"] for record in records] == [0, 1, 2]
    # Who needs room before the first sync, as the warm start does, finds it. After the last step the evaluation generates.
    step = [*MAKE_ROOM, *SYNC, "generate"]
    assert _asked(tmp_path / "run") == [*step, *step, *step]
    trained = records[1:]
    assert max(record["mismatch/abs_log_ratio"] for record in trained) < LOG_PROB_TOLERANCE
    assert all(record["rollout/staleness_max"] == 0 for record in trained)
    # An fp32 policy on TP 2: two moments of what a rank has, its gradients once, its weights stay.
    weights = trained[0]["memory/stays_bytes"]
    assert all(record["memory/moved_bytes"] == 2 * weights == 2 * record["memory/stays_bytes"] for record in trained)
    assert all(weights <= record["memory/dropped_bytes"] < 1.1 * weights for record in trained)
    for record in trained:
        phases = [record[f"time/{phase}_s"] for phase in ("rollout", "make_room", "update", "put_away", "sync")]
        assert min(phases) > 0
        assert record["time/step_s"] == pytest.approx(sum(phases), rel=1e-9)
    _assert_nothing_is_left(tmp_path)


@pytest.mark.nightly  # on every push the steps of the run above are those of a run whose weights are right
def test_rewards_are_those_of_servers_on_other_devices(tmp_path):
    policy = write_tiny_policy(tmp_path / "policy")
    both = [
        train(policy, tmp_path, name, *options, "warm_start.steps=20", "train.steps=4", timeout=500)
        for name, options in (("colocated", COLOCATED), ("apart", SERVED))
    ]
    rewards = [[record["reward/mean"] for record in records[1:]] for records in both]
    assert rewards[0] == rewards[1]
    assert [records[-1]["eval/reward_mean"] for records in both] == [both[0][-1]["eval/reward_mean"]] * 2
    assert len(set(rewards[0])) > 1


@pytest.mark.nightly
def test_a_server_that_dies_or_hangs_when_it_has_no_part_in_a_step_is_back_for_the_next(tmp_path):
    model_folder = write_tiny_hf_model("llama", tmp_path / "model", seed=0)
    config = server_config(colocated=True, control_timeout_s=20.0)
    engine = SGLangEngine(config, model_folder, vocab_size=250, dtype=torch.float32, log_folder=tmp_path)
    try:
        hf_model, tensors = tiny_weights("llama", seed=1)
        subject = EngineUnderTest(engine, hf_model, lambda *_: None)
        engine.update_weights(WholeWeights(tensors), 1)
        (server,) = engine._pool._source.servers

        engine.release_memory()
        os.killpg(server.pid, signal.SIGKILL)
        engine.update_weights(WholeWeights(tensors), 2)
        assert_log_probs_match(
            subject, engine.generate(make_prompts(250, [5, 9]), SamplingParams(max_new_tokens=6)), 1.0
        )

        os.killpg(server.pid, signal.SIGSTOP)
        engine.release_memory()
        assert not server.is_running()
        engine.update_weights(WholeWeights(tensors), 3)
        assert_log_probs_match(
            subject, engine.generate(make_prompts(250, [5, 9]), SamplingParams(max_new_tokens=6)), 1.0
        )
    finally:
        engine.close()
    _assert_nothing_is_left(tmp_path)


@pytest.mark.nightly
def test_a_run_that_is_stopped_in_any_phase_is_saved_and_leaves_nothing(tmp_path):
    """While servers generate, while they have no memory, while they get weights; every time it goes on from there."""
    policy = write_tiny_policy(tmp_path / "policy")
    run, reached = tmp_path / "run", 0
    log = _log(run)
    for moment in ("generate", RELEASE, "update_weights_from_tensor"):
        before = len(log.read_bytes()) if log.exists() else 0
        started = start_training(policy, tmp_path, "run", *COLOCATED, "train.steps=1000")

        def is_there(moment: str = moment, before: int = before, last: int = reached) -> bool:
            """A step after the first of this start, so that all phases have been gone through once."""
            steps = [record["step"] for record in read_metrics(run)] if (run / "metrics.jsonl").exists() else []
            if max(steps, default=0) <= last or not log.exists():
                return False
            return _asked_last(log, before) == moment

        wait_until(is_there, within_s=400, what=f"{moment} in {log}", every_s=0.005)
        ranks = [process.pid for process in started.processes]
        os.kill(ranks[0], signal.SIGTERM)
        codes, output = started.ends()
        assert codes == [75, 75], output[-4000:]
        saved = int(sorted((run / "checkpoints").iterdir())[-1].name.removeprefix("step_"))
        assert saved > reached
        reached = saved
        _assert_nothing_is_left(tmp_path)
        _assert_no_shared_memory_is_left(ranks)
    steps = [record["step"] for record in read_metrics(run)]
    assert steps == list(range(reached + 1))


def _asked_last(log: Path, before: int) -> str | None:
    with log.open("rb") as file:
        file.seek(before)
        paths = re.findall(rb'"POST /(\w+) HTTP', file.read())
    return paths[-1].decode() if paths else None


@pytest.mark.nightly
def test_a_server_that_dies_amid_an_update_is_started_again_and_one_that_cannot_come_back_ends_the_run(tmp_path):
    policy = write_tiny_policy(tmp_path / "policy")
    run = tmp_path / "run"
    log = _log(run)
    started = start_training(
        policy, tmp_path, "run", *COLOCATED, "rollout.sglang.bucket_bytes=20000", "train.steps=1000"
    )
    try:
        wait_for_step(run, 2, within_s=400.0)
        for moment in ("update_weights_from_tensor", RELEASE):
            wait_until(
                lambda moment=moment: _asked_last(log, 0) == moment,
                within_s=200,
                what=f"{moment} in {log}",
                every_s=0.005,
            )
            (guard,) = (
                p for p in psutil.Process(started.processes[0].pid).children() if "guard.py" in str(p.cmdline())
            )
            if moment == RELEASE:
                (run / "logs" / "served_model" / "config.json").unlink()
            os.killpg(guard.pid, signal.SIGKILL)
            if moment != RELEASE:
                wait_for_step(run, max(record["step"] for record in read_metrics(run)) + 3, within_s=400.0)
    except BaseException:
        kill(started)
        raise
    codes, output = started.ends()
    assert codes == [3, 3], output[-4000:]
    assert "was lost amid a weight update" in output
    assert re.search(r"step \d+ is saved in", output)  # while what the updates need was in host memory
    _assert_nothing_is_left(tmp_path)
    _assert_no_shared_memory_is_left([process.pid for process in started.processes])
