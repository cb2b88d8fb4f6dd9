"""When a rank fails, however it fails, all ranks end by themselves; what each of them exits with is documented."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dppo.distributed.lifeline import EXIT_ANOTHER_FAILED
from tests.forked_ranks import exit_codes

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("lifeline_script.py")


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(("fault", "code"), [("error", 1), ("SIGKILL", -9), ("exit", 9)])
def test_all_ranks_end_when_one_has_failed(tmp_path: Path, fault: str, code: int, who: int) -> None:
    codes, output = exit_codes(SCRIPT, [fault, str(who)], ranks=2, folder=tmp_path, timeout=30)
    assert codes[who] == code, output
    assert codes[1 - who] == EXIT_ANOTHER_FAILED, output
    if fault == "error":
        assert output.count("MemoryError: too much") == 1
        # Without torchrun the store is rank 0's own, and may be gone before its note was read.
        reasons = [f"rank {who} failed with MemoryError", *(["the store of the ranks is gone"] if who == 0 else [])]
        assert any(f"rank {1 - who} ends: {reason}" in output for reason in reasons), output


@pytest.mark.parametrize(("ending", "code"), [("none", 0), ("stop", 1)])
def test_ranks_that_are_done_at_different_times_end_well(tmp_path: Path, ending: str, code: int) -> None:
    codes, output = exit_codes(SCRIPT, [ending, "0"], ranks=3, folder=tmp_path, timeout=60)
    assert codes == [code] * 3, output
    assert "ends:" not in output
    assert output.count("StopRequested: asked to") == (3 if ending == "stop" else 0)


def test_a_rank_whose_clean_up_hangs_is_ended_too(tmp_path: Path) -> None:
    codes, output = exit_codes(SCRIPT, ["clean-up hangs", "1"], ranks=2, folder=tmp_path, timeout=30)
    assert codes == [EXIT_ANOTHER_FAILED, 1], output
