"""One exit code for a run whose processes ended with many."""

from __future__ import annotations

import pytest

from megatron_dppo.launch.exit_codes import exit_code_of


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], 0),
        ([0, 0], 0),
        ([75, 75], 75),
        ([-15, 75], 75),  # torchrun ends the others of a node when the first has ended
        ([4, 3], 3),  # 4: only that another has failed
        ([4, 2, 4], 2),
        ([4, 1], 1),
        ([4, -9], 4),
        ([-11, 4, -15], 139),  # a rank that crashed is the cause
        ([0, -9], 137),
    ],
)
def test_the_most_telling_code_is_the_runs(codes: list[int], expected: int) -> None:
    assert exit_code_of(codes) == expected
