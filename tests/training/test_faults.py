"""Whatever happens to one rank of a run, all end as the table in docs/troubleshooting.md says, and what is promised is saved.

Real runs on four ranks. Every push lets each fault happen once, in one layout and on one of its replicas; the nightly tier in
both layouts and on every replica.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from megatron_dppo.training.checkpoint.load import last_checkpoint
from tests.training.faults import BY_NAME, FAULTS, STEP, STEPS, Fault
from tests.training.faulty_runs import LAYOUTS, RANKS, Ending, ranks_of, run, write_policy
from tests.training.tiny_runs import deterministic_part, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Of every push: where each fault happens. The others are of the nightly tier only.
ON_EVERY_PUSH = {
    "servers lost, above the share": ("DP2 TP2", 1),
    "bad sample, below the share": ("DP4", 3),
    "bad samples, above the share": ("DP4", 0),
    "scorer lost, above the share": ("DP2 TP2", 0),
    "nan, below the limit": ("DP2 TP2", 0),
    "nan, above the limit": ("DP2 TP2", 1),
    "batching": ("DP4", 3),
    "generating": ("DP2 TP2", 1),
    "rollout metrics": ("DP2 TP2", 0),
    "checkpoint": ("DP4", 3),
    "SIGKILL": ("DP2 TP2", 1),
    "SIGTERM to one rank": ("DP4", 3),
    "SIGTERM to all": ("DP2 TP2", 0),
}
# One of those that are saved in the same way is resumed.
RESUMED_ON_EVERY_PUSH = {"servers lost, above the share", "nan, above the limit", "checkpoint", "SIGTERM to one rank"}
SILENCE_S = 8.0  # on every push; nightly it is that of every run

Records = list[dict]


def cases() -> list[ParameterSet]:
    """(fault, layout, replica, nightly); what happens to all ranks happens once in a layout."""
    nightly = [
        (fault, layout, replica)
        for fault in FAULTS
        for layout in fault.layouts
        for replica in range(1 if fault.where == "all" else RANKS // LAYOUTS[layout])
    ]
    pushed = [(BY_NAME[name], layout, replica) for name, (layout, replica) in ON_EVERY_PUSH.items()]
    return [
        *(pytest.param(*case, False, id="-".join(map(str, (case[0].name, *case[1:])))) for case in pushed),
        *(
            pytest.param(
                *case, True, id="-".join(map(str, (case[0].name, *case[1:], "whole"))), marks=pytest.mark.nightly
            )
            for case in nightly
        ),
    ]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def expected(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str | None], Records]:
    """The records of a layout's run that nothing happened to, or of the one to which this happened and that went on."""
    known: dict[tuple[str, str | None], Records] = {}

    def records(layout: str, name: str | None) -> Records:
        if (layout, name) not in known:
            folder = tmp_path_factory.mktemp("expected")
            fault = None if name is None else BY_NAME[name]
            ranks = [] if fault is None else ranks_of(fault, layout, 0)
            ending = run(policy, folder, layout, fault=fault, ranks=ranks)
            assert ending.codes == [0] * RANKS, ending.output[-4000:]
            known[layout, name] = deterministic(folder)
        return known[layout, name]

    return records


def deterministic(folder: Path) -> Records:
    return [deterministic_part(record) for record in read_metrics(folder / "run")]


@pytest.mark.parametrize(("fault", "layout", "replica", "nightly"), cases())
def test_all_ranks_end_as_the_table_says_and_a_run_that_is_resumed_goes_on_bit_for_bit(
    policy: Path,
    expected: Callable[[str, str | None], Records],
    tmp_path: Path,
    fault: Fault,
    layout: str,
    replica: int,
    nightly: bool,
) -> None:
    ranks = ranks_of(fault, layout, replica)
    silence_s = None if nightly else SILENCE_S
    ending = run(policy, tmp_path, layout, *fault.settings, fault=fault, ranks=ranks, silence_s=silence_s)
    keep_figures(fault, layout, replica, ending)
    assert not ending.left, f"{ending.left} are there {fault.seconds:g} s after the fault\n{ending.output[-4000:]}"
    codes = [fault.code if rank in ranks else fault.code_of_others for rank in range(RANKS)]
    assert ending.codes == codes, ending.output[-4000:]
    assert fault.message in ending.output
    saved = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert (saved and int(saved.name.removeprefix("step_"))) == fault.checkpoint
    undisturbed, records = expected(layout, None), deterministic(tmp_path)
    assert records[:STEP] == undisturbed[:STEP]
    if fault.goes_on:
        assert [record["step"] for record in records] == list(range(STEPS + 1))
        assert records[STEP] != undisturbed[STEP]  # it did happen, and is told
    if not fault.goes_on and fault.checkpoint is not None and (nightly or fault.name in RESUMED_ON_EVERY_PUSH):
        (tmp_path / "fault").unlink()
        ending = run(policy, tmp_path, layout, *fault.settings)
        assert ending.codes == [0] * RANKS, ending.output[-4000:]
        assert f"resuming from {saved}" in ending.output
        assert deterministic(tmp_path) == expected(layout, fault.like)


def keep_figures(fault: Fault, layout: str, replica: int, ending: Ending) -> None:
    """For a person who wants them: one line a case, in the file that MEGATRON_DPPO_FAULT_FIGURES names."""
    if (name := os.environ.get("MEGATRON_DPPO_FAULT_FIGURES")) is not None:
        with Path(name).open("a") as file:
            print(
                fault.name, layout, f"replica {replica}", f"{ending.seconds:.1f} s", ending.codes, sep=" | ", file=file
            )
