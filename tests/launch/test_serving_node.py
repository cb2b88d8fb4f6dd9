"""A serving node finds its place among those that share a server, and ends with the run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_dppo.launch.attempt import Attempt
from megatron_dppo.launch.serving_node import place_arguments


def test_nodes_that_share_a_server_meet_at_its_first() -> None:
    places = [place_arguments(node, 2, ["a", "b", "c", "d"], 2001) for node in range(4)]
    assert [place[place.index("--node-rank") + 1] for place in places] == ["0", "1", "0", "1"]
    assert [place[place.index("--head") + 1] for place in places] == ["a:2001", "a:2001", "c:2001", "c:2001"]
    assert place_arguments(3, 1, [], 0) == []


@pytest.mark.parametrize(
    ("node", "code", "done"), [(0, 0, True), (0, 3, True), (0, 75, False), (0, 4, False), (1, 0, False)]
)
def test_a_run_is_done_when_its_first_node_does_not_go_on(node: int, code: int, done: bool, tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "attempt")
    attempt.write_exit_code(node, code)
    assert attempt.was_done_after(time.time() - 60) is done


def test_what_an_earlier_run_left_is_not_the_end_of_this_one(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    attempt.write_exit_code(0, 0)
    os.utime(tmp_path / "done", (1.0, 1.0))
    assert not attempt.was_done_after(time.time() - 60)
