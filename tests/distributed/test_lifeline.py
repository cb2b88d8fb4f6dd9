"""When a rank fails, however it fails, all ranks end by themselves; what each of them exits with is documented."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_dppo.distributed.lifeline import EXIT_ANOTHER_FAILED
from tests.forked_ranks import free_port, start_script

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("lifeline_script.py")


# Arguments of the script and number of ranks.
Case = tuple[tuple[str, ...], int]
ONE_FAILS: list[Case] = [((fault, who), 2) for fault in ("error", "SIGKILL", "exit") for who in ("0", "1")]
CONNECTION_BREAKS: list[Case] = [((fault, "1", "in a collective"), 3) for fault in ("error", "SIGKILL")]
ALL_ARE_DONE: list[Case] = [((ending, "0"), 3) for ending in ("none", "stop")]
CLEAN_UP_HANGS: Case = (("clean-up hangs", "1"), 2)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[int], str]]:
    """``ends(*case)`` -> exit codes and output. All run at the same time: each of them does little but wait."""
    cases = [*ONE_FAILS, *CONNECTION_BREAKS, *ALL_ARE_DONE, CLEAN_UP_HANGS]
    started = {
        case: start_script(SCRIPT, case[0], ranks=case[1], folder=tmp_path_factory.mktemp("ranks"), timeout=60)
        for case in cases
    }
    return lambda *case: started[case].ends()


@pytest.mark.parametrize("case", ONE_FAILS, ids=str)
def test_all_ranks_end_when_one_has_failed(ends: Callable[..., tuple[list[int], str]], case: Case) -> None:
    fault, who = case[0][0], int(case[0][1])
    codes, output = ends(*case)
    assert codes[who] == {"error": 1, "SIGKILL": -9, "exit": 9}[fault], output
    assert codes[1 - who] == EXIT_ANOTHER_FAILED, output
    if fault == "error":
        assert output.count("\nMemoryError: too much") == 1  # one traceback
        # Without torchrun the store is rank 0's own, and may be gone before its note was read.
        reasons = [f"rank {who} failed with MemoryError", *(["the store of the ranks is gone"] if who == 0 else [])]
        assert any(f"rank {1 - who} ends: {reason}" in output for reason in reasons), output


@pytest.mark.parametrize(
    ("case", "code", "reason"),
    [
        (CONNECTION_BREAKS[0], 1, "rank 1 failed with MemoryError: too much"),
        (CONNECTION_BREAKS[1], -9, "rank 1 has given no sign of life for 6 s"),
    ],
    ids=["error", "SIGKILL"],
)
def test_a_rank_whose_connection_breaks_names_the_one_that_failed(
    ends: Callable[..., tuple[list[int], str]], case: Case, code: int, reason: str
) -> None:
    codes, output = ends(*case)
    assert codes == [EXIT_ANOTHER_FAILED, code, EXIT_ANOTHER_FAILED], output
    for rank in (0, 2):
        assert f"rank {rank} ends: {reason}" in output
    assert "gloo" not in output  # which would be a traceback of a rank that did nothing wrong


@pytest.mark.parametrize(("case", "code"), [(ALL_ARE_DONE[0], 0), (ALL_ARE_DONE[1], 1)], ids=["none", "stop"])
def test_ranks_that_are_done_at_different_times_end_well(
    ends: Callable[..., tuple[list[int], str]], case: Case, code: int
) -> None:
    codes, output = ends(*case)
    assert codes == [code] * 3, output
    assert "ends:" not in output
    assert output.count("StopRequested: asked to") == (3 if code else 0)


def test_a_rank_whose_clean_up_hangs_is_ended_too(ends: Callable[..., tuple[list[int], str]]) -> None:
    codes, output = ends(*CLEAN_UP_HANGS)
    assert codes == [EXIT_ANOTHER_FAILED, 1], output
    assert "error: rank 1 failed with MemoryError: too much (its clean-up did not end)" in output
    assert "rank 0 ends: rank 1 failed with MemoryError: too much" in output


@pytest.mark.parametrize(
    ("fault", "failing_rank"),
    [
        ("error", 1),
        # To an agent a fault is an exit code; what each does to ranks is above.
        pytest.param("error", 0, marks=pytest.mark.nightly),
        pytest.param("SIGKILL", 0, marks=pytest.mark.nightly),
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
