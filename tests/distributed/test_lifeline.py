"""When a rank fails, however it fails, all ranks end by themselves; what each of them exits with is documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_dppo.distributed.lifeline import EXIT_ANOTHER_FAILED
from tests.forked_ranks import exit_codes, free_port

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("lifeline_script.py")


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(("fault", "code"), [("error", 1), ("SIGKILL", -9), ("exit", 9)])
def test_all_ranks_end_when_one_has_failed(tmp_path: Path, fault: str, code: int, who: int) -> None:
    codes, output = exit_codes(SCRIPT, [fault, str(who)], ranks=2, folder=tmp_path, timeout=30)
    assert codes[who] == code, output
    assert codes[1 - who] == EXIT_ANOTHER_FAILED, output
    if fault == "error":
        assert output.count("\nMemoryError: too much") == 1  # one traceback
        # Without torchrun the store is rank 0's own, and may be gone before its note was read.
        reasons = [f"rank {who} failed with MemoryError", *(["the store of the ranks is gone"] if who == 0 else [])]
        assert any(f"rank {1 - who} ends: {reason}" in output for reason in reasons), output


@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [
        ("error", 1, "rank 1 failed with MemoryError: too much"),
        ("SIGKILL", -9, "rank 1 has given no sign of life for 6 s"),
    ],
)
def test_a_rank_whose_connection_breaks_names_the_one_that_failed(
    tmp_path: Path, fault: str, code: int, reason: str
) -> None:
    codes, output = exit_codes(SCRIPT, [fault, "1", "in a collective"], ranks=3, folder=tmp_path, timeout=40)
    assert codes == [EXIT_ANOTHER_FAILED, code, EXIT_ANOTHER_FAILED], output
    for rank in (0, 2):
        assert f"rank {rank} ends: {reason}" in output
    assert "gloo" not in output  # which would be a traceback of a rank that did nothing wrong


@pytest.mark.parametrize(("ending", "code"), [("none", 0), ("stop", 1)])
def test_ranks_that_are_done_at_different_times_end_well(tmp_path: Path, ending: str, code: int) -> None:
    codes, output = exit_codes(SCRIPT, [ending, "0"], ranks=3, folder=tmp_path, timeout=60)
    assert codes == [code] * 3, output
    assert "ends:" not in output
    assert output.count("StopRequested: asked to") == (3 if ending == "stop" else 0)


def test_a_rank_whose_clean_up_hangs_is_ended_too(tmp_path: Path) -> None:
    codes, output = exit_codes(SCRIPT, ["clean-up hangs", "1"], ranks=2, folder=tmp_path, timeout=30)
    assert codes == [EXIT_ANOTHER_FAILED, 1], output
    assert "error: rank 1 failed with MemoryError: too much (its clean-up did not end)" in output
    assert "rank 0 ends: rank 1 failed with MemoryError: too much" in output


@pytest.mark.parametrize(
    ("fault", "failing_rank"),
    [
        ("error", 1),
        ("SIGKILL", 0),
        pytest.param("error", 0, marks=pytest.mark.nightly),
        pytest.param("SIGKILL", 1, marks=pytest.mark.nightly),
    ],
)
def test_a_failure_on_one_node_ends_the_agents_of_all(tmp_path: Path, fault: str, failing_rank: int) -> None:
    """Two torchrun agents that meet by c10d. Alone, the other one would wait for its rank, which waits for ever."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "job"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"),
        *(str(SCRIPT), fault, str(failing_rank)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen(command, env=environment, cwd=tmp_path) for _ in range(2)]
    try:
        codes = [agent.wait(timeout=120) for agent in agents]
    finally:
        for agent in agents:
            for process in [*psutil.Process(agent.pid).children(recursive=True)] if agent.poll() is None else []:
                process.kill()
            agent.kill()
            agent.wait()
    assert codes == [1, 1]
