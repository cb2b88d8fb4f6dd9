"""Every supported layout, way of batching and way of computing the loss makes the same update as a single rank.

All figures are of fp32 on gloo ranks. Every push compares a few columns of each row, the nightly tier all of them: with
MEGATRON_DPPO_PARITY_RESULTS=FILE each of its comparisons adds a line of JSON to FILE, from which tools/check/parity_table.py
writes docs/parity.md.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import __version__ as core_version

from tests.layouts import parity_runs
from tests.layouts.parity_runs import COLUMNS, QWEN3, QWEN3_MOE, ROWS, UNEQUAL_STAGES, Column, Difference, Row, Update
from tests.layouts.parity_tolerances import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from tests.rank_pool import RankPools

PARITY_TABLE = Path(__file__).parents[2] / "docs" / "parity.md"

ReferenceFile = Callable[[str, int], str]


@pytest.fixture(scope="module")
def reference_file(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> ReferenceFile:
    """Policy kind and number of layers -> a file with ``one_rank_updates``, made when first asked for."""
    folder = tmp_path_factory.mktemp("one_rank")

    def make(policy_kind: str, num_layers: int) -> str:
        file = folder / f"{policy_kind}_{num_layers}.pt"
        if not file.exists():
            (reference,) = ranks(1).run(parity_runs.one_rank_updates, policy_kind, num_layers)
            for update in reference.updates.values():
                assert 0.1 < update.mask_fraction < 0.9  # the trust region has something to do
                assert update.grad_norm > 1.0  # and so has clipping
            torch.save(reference, file)
        return str(file)

    return make


def _assert_same_update(of_column: dict[Column, Difference]) -> None:
    for column, difference in of_column.items():
        fine = (
            difference.loss <= LOSS_TOLERANCE
            and difference.gradient <= GRADIENT_TOLERANCE
            and difference.grad_norm <= GRADIENT_TOLERANCE
            and difference.movement <= GRADIENT_TOLERANCE
            and difference.mask_fraction == 0.0
        )
        assert fine, f"{column.name}: {difference}"


def _worst_over_ranks(results: list[dict[Column, Difference]]) -> dict[Column, Difference]:
    return {column: parity_runs.worst([result[column] for result in results]) for column in results[0]}


def _record(row: Row, policy_kind: str, of_column: dict[Column, Difference]) -> None:
    """Add a line to the results, if they are asked for."""
    if file := os.environ.get("MEGATRON_DPPO_PARITY_RESULTS"):
        entry = {
            "date": datetime.date.today().isoformat(),
            "megatron_core": core_version,
            "torch": torch.__version__,
            "layout": row.name,
            "ranks": row.ranks,
            "policy": policy_kind,
            "columns": [{**vars(column), **vars(of_column[column])} for column in of_column],
        }
        with open(file, "a", encoding="utf-8") as results:
            results.write(json.dumps(entry) + "\n")


def _compare(
    row: Row, policy_kind: str, columns: list[Column], ranks: RankPools, reference_file: ReferenceFile
) -> dict[Column, Difference]:
    results = ranks(row.ranks).run(
        parity_runs.compare_with_one_rank,
        policy_kind,
        row.num_layers,
        row.layout,
        columns,
        reference_file(policy_kind, row.num_layers),
    )
    return _worst_over_ranks(results)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_layout_makes_the_update_of_a_single_rank(
    row: Row, ranks: RankPools, reference_file: ReferenceFile
) -> None:
    for policy_kind, columns in parity_runs.on_every_push()[row.name].items():
        _assert_same_update(_compare(row, policy_kind, columns, ranks, reference_file))


@pytest.mark.slow
def test_stages_of_unequal_length_make_the_update_of_a_single_rank(
    ranks: RankPools, reference_file: ReferenceFile
) -> None:
    (policy_kind,) = UNEQUAL_STAGES.policies
    columns = [
        Column("padded", "token_mean", False),
        Column("packed", "seq_mean_token_mean", True),
        Column("packed", "token_mean", True, routing_replay=True),
    ]
    _assert_same_update(_compare(UNEQUAL_STAGES, policy_kind, columns, ranks, reference_file))


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_in_every_layout_all_columns_make_the_update_of_a_single_rank(
    row: Row, ranks: RankPools, reference_file: ReferenceFile
) -> None:
    """The whole matrix, of which docs/parity.md is made."""
    for policy_kind in row.policies:
        of_column = _compare(row, policy_kind, list(COLUMNS[policy_kind]), ranks, reference_file)
        _record(row, policy_kind, of_column)
        _assert_same_update(of_column)


def test_the_columns_for_every_push_bring_any_two_choices_together() -> None:
    few = parity_runs.on_every_push()
    every = {row.name: {policy: COLUMNS[policy] for policy in row.policies} for row in ROWS}

    def together(of_row: Mapping[str, Mapping[str, Sequence[Column]]]) -> set[Any]:
        whole = [(row, policy, column) for row in of_row for policy in of_row[row] for column in of_row[row][policy]]
        values = [(row, policy, *vars(column).values()) for row, policy, column in whole]
        pairs = {pair for choices in values for pair in itertools.combinations(enumerate(choices), 2)}
        return pairs | {(row, column.batching, column.fused_linear) for row, _, column in whole}

    assert together(few) == together(every)
    assert _comparisons(few) * 4 <= _comparisons(every)


def _comparisons(of_row: Mapping[str, Mapping[str, Sequence[Column]]]) -> int:
    return sum(len(columns) for of_policy in of_row.values() for columns in of_policy.values())


def test_tensor_and_expert_parallel_ranks_make_the_update_of_a_single_rank(
    ranks: RankPools, reference_file: ReferenceFile
) -> None:
    (row,) = (row for row in ROWS if row.name == "TP2 EP2")
    columns = [
        Column("padded", "token_mean", False),
        Column("packed", "seq_mean_token_mean", True),
        Column("packed", "token_mean", True, routing_replay=True),
    ]
    _assert_same_update(_compare(row, QWEN3_MOE, columns, ranks, reference_file))


def _update_without_reduction_of_norms(*args: object) -> dict[Column, Difference]:
    # The package exports a function by the module's name, which hides the module.
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    reduction = module._allreduce_non_tensor_model_parallel_grads
    module._allreduce_non_tensor_model_parallel_grads = lambda *args, **kwargs: None
    try:
        return parity_runs.compare_with_one_rank(*args)  # type: ignore[arg-type]
    finally:
        module._allreduce_non_tensor_model_parallel_grads = reduction


@pytest.mark.slow
def test_a_reduction_left_out_is_seen(ranks: RankPools, reference_file: ReferenceFile) -> None:
    """The matrix can fail: sequence-parallel ranks must add up the gradients of norms."""
    columns = COLUMNS[QWEN3][:1]
    results = ranks(2).run(
        _update_without_reduction_of_norms,
        QWEN3,
        4,
        {"tensor_model_parallel_size": 2},
        columns,
        reference_file(QWEN3, 4),
    )
    difference = _worst_over_ranks(results)[columns[0]]
    assert "norm" in difference.worst_parameter
    assert difference.gradient > 1e3 * GRADIENT_TOLERANCE
    assert difference.loss <= LOSS_TOLERANCE  # the forward pass has nothing to do with it


@pytest.mark.parametrize("factor", [1.0001, math.nan])
@pytest.mark.parametrize("what", ["loss", "grad_norm", "mask_fraction", "gradients", "weights"])
def test_a_wrong_scale_of_one_quantity_is_seen(what: str, factor: float) -> None:
    tensors = {"a": torch.linspace(-1, 1, 9), "b": torch.linspace(-1e-4, 2e-4, 9)}
    start = {name: torch.zeros(9) for name in tensors}
    column = COLUMNS[QWEN3][0]
    good = Update(loss=0.5, grad_norm=2.0, mask_fraction=0.4, gradients=tensors, weights=tensors)
    same = parity_runs.difference(good, good, start)
    _assert_same_update({column: same})
    value = getattr(good, what)
    wrong = {**value, "b": factor * value["b"]} if isinstance(value, dict) else factor * value
    difference = parity_runs.difference(dataclasses.replace(good, **{what: wrong}), good, start)
    with pytest.raises(AssertionError):
        _assert_same_update({column: difference})


def test_the_documented_table_has_exactly_the_rows_of_the_matrix() -> None:
    """Another layout, or one less, and the table has to be made anew."""
    tables = re.split(r"^## ", PARITY_TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert tables
    for table in tables:
        names = re.findall(r"^\| ([^|]+?) \| \d+ \|", table, flags=re.MULTILINE)
        assert names == [row.name for row in ROWS]
