"""Parquet files and dataset folders give what the same rows give as JSON lines, and name their bad rows as strictly."""

from __future__ import annotations

import datetime
import json
import math
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.build import build_file_problems, build_grader, build_mixture
from megatron_dppo.tasks.config import FieldsConfig, TaskConfig
from megatron_dppo.tasks.file_problems import FileProblems
from megatron_dppo.tasks.rows.arrow_rows import read_arrow, read_parquet

VERL = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"What is {n} + {n}?"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(2 * n), "style": "rule"},
        "extra_info": {"index": f"id-{n}", "split": None},
    }
    for n in range(7)
]


def saved(folder: Path, *tables: pa.Table) -> Path:
    """What ``datasets`` writes with ``save_to_disk``: Arrow streams of 3 rows a batch, and a list of them."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def problems(kind: str, *paths: Path, **settings: Any) -> FileProblems:
    return build_file_problems(TaskConfig(name="math", kind=kind, paths=[str(path) for path in paths], **settings))


def row_of(column: pa.Array, exact: bool = False) -> dict[str, Any]:
    table = pa.table({"x": column})
    return next(iter(_parquet(table))).read(exact=exact)


def _parquet(table: pa.Table) -> Any:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        pq.write_table(table, file.name)
        return read_parquet(Path(file.name))


def test_the_formats_agree(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(VERL)
    pq.write_table(table, tmp_path / "p.parquet")
    saved(tmp_path / "saved", table.slice(0, 4), table.slice(4))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in VERL))
    lines = list(problems("jsonl", tmp_path / "p.jsonl"))
    for problem in lines:
        problem.metadata["extra_info"].pop("split")  # null is the same as absent
    assert (lines[6].question, lines[6].answer) == ("What is 6 + 6?", "12")
    assert list(problems("parquet", tmp_path / "p.parquet")) == lines
    assert list(problems("dataset", tmp_path / "saved")) == lines
    backwards = problems("dataset", tmp_path / "saved")
    assert [backwards[index] for index in reversed(range(7))] == lines[::-1]
    assert list(problems("dataset", tmp_path / "saved", size=5)) == lines[:5]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (pa.array([3], pa.int8()), 3),
        (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
        (pa.array([True]), True),
        (pa.array([0.1], pa.float64()), 0.1),
        (pa.array([0.1], pa.float32()), 0.1),
        (pa.array([1 / 3], pa.float32()), 0.33333334),
        (pa.array([Decimal("1.50")], pa.decimal128(9, 2)), 1.5),
        (pa.array([datetime.date(2026, 11, 29)]), "2026-11-29"),
        (pa.array([datetime.datetime(2026, 11, 29, 12)], pa.timestamp("us", "UTC")), "2026-11-29T12:00:00+00:00"),
        (pa.array(["a", "b"]).dictionary_encode()[:1], "a"),
        (pa.array(["a"], pa.large_string()), "a"),
        (pa.array([[[0.5], None]]), [[0.5], None]),
        (pa.array([{"a": None, "b": [{"c": 1, "d": None}]}]), {"b": [{"c": 1}]}),
        (pa.array([[("k", 1), ("l", None)]], pa.map_(pa.string(), pa.int64())), {"k": 1}),
    ],
)
def test_arrows_types_become_what_json_has(column: pa.Array, value: Any) -> None:
    row = row_of(column)
    assert row == {"x": value}
    assert type(row["x"]) is type(value)
    assert json.loads(json.dumps(row)) == row


def test_null_is_absent_and_decimals_keep_their_digits(tmp_path: Path) -> None:
    assert row_of(pa.array([None], pa.string())) == {}
    assert row_of(pa.array([None], pa.binary())) == {}
    assert row_of(pa.array([Decimal("1.50")], pa.decimal128(9, 2)), exact=True) == {"x": Decimal("1.50")}
    answers = pa.array([Decimal("12345678901234567.890")], pa.decimal128(20, 3))
    pq.write_table(pa.table({"question": ["?"], "answer": answers}), tmp_path / "p.parquet")
    assert problems("parquet", tmp_path / "p.parquet")[0].answer == "12345678901234567.890"


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1.0, math.nan]), "x: nan is no JSON number; write null"),
        (pa.array([1.0, -math.inf], pa.float32()), "x: -inf is no JSON number"),
        (
            pa.array([None, b"png"]),
            "x: a binary is nothing that JSON has (a column that nothing needs can be left out with",
        ),
        (pa.array([None, datetime.timedelta(1)]), "x: a duration[us] is nothing that JSON has"),
        (pa.array(["fine", "half \0"]), "x holds a NUL character"),
        (pa.array([[], [("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64())), "the key 'k' is there twice"),
        (pa.array([b"fine", b"\xff"]).view(pa.string()), "row 2: 'utf-8' codec can't decode"),
    ],
)
def test_what_json_has_not_is_refused_by_row(column: pa.Array, message: str, tmp_path: Path) -> None:
    table = pa.table({"question": ["?", "?"], "answer": ["1", "2"], "x": column})
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(TaskError, match=r"p\.parquet, row 2: ") as error:
        problems("parquet", tmp_path / "p.parquet")
    assert message in str(error.value)
    assert len(problems("parquet", tmp_path / "p.parquet", fields=FieldsConfig(metadata=[]))) == 2  # x is not read


def test_rows_of_several_files_are_numbered_within_their_file(tmp_path: Path) -> None:
    good = pa.table({"question": ["1?", "2?"], "answer": [1, 2]})
    pq.write_table(good, tmp_path / "b.parquet")
    pq.write_table(good, tmp_path / "a.parquet")
    assert [p.problem_id for p in problems("parquet", tmp_path / "*.parquet")] == [f"math/{n}" for n in range(4)]
    pq.write_table(pa.table({"question": ["3?", " "], "answer": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(TaskError, match=r"b\.parquet, row 2: the question is empty"):
        problems("parquet", tmp_path / "*.parquet")


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_text("{}")
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for kind, path, message in (
        ("parquet", "p.parquet", "cannot read .*p.parquet as parquet"),
        ("parquet", "none.parquet", "none.parquet as parquet: No such file"),
        ("parquet", "*.pq", "no file matches"),
        ("parquet", "split", r"is a folder; name its files, e.g. .*split/\*.parquet"),
        ("dataset", "split", "has several splits; name one of them: .*split/train, .*split/test"),
        ("dataset", "p.parquet", "is no folder that datasets wrote"),
    ):
        with pytest.raises(TaskError, match=f"task math: .*{message}"):
            problems(kind, tmp_path / path)
    with pytest.raises(TaskError, match="is named twice"):
        problems("parquet", tmp_path / "p.parquet", tmp_path / "p.*")
    with pytest.raises(TaskError, match="the column a is there twice"):
        _parquet(pa.Table.from_arrays([pa.array([1]), pa.array([1])], ["a", "a"]))


def test_a_damaged_dataset_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", pa.Table.from_pylist(VERL))
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(TaskError, match=r"cannot read .*data-00000-of-00001\.arrow as Arrow"):
        problems("dataset", folder)
    file.write_bytes(b"")
    with pytest.raises(TaskError, match="as Arrow"):
        problems("dataset", folder)


def test_a_mixture_of_files_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(VERL), tmp_path / "p.parquet")
    saved(tmp_path / "saved", pa.Table.from_pylist(VERL))
    configs = [
        TaskConfig(name="a", kind="parquet", path=str(tmp_path / "p.parquet"), weight=3),
        TaskConfig(name="b", kind="dataset", path=str(tmp_path / "saved")),
    ]
    whole = build_mixture(configs, seed=1).problems(0, 1200)
    assert build_mixture(configs, seed=1).problems(400, 800) == whole[400:]
    assert sum(problem.task_name == "a" for problem in whole[:1000]) == 750


def test_graders_read_no_file(tmp_path: Path) -> None:
    """A scoring worker is given each problem with its response."""
    grader = build_grader(TaskConfig(name="math", kind="parquet", path=str(tmp_path / "absent.parquet")))
    pq.write_table(pa.table({"question": ["?"], "answer": [42]}), tmp_path / "p.parquet")
    assert grader.score(problems("parquet", tmp_path / "p.parquet")[0], "It is 42.") == 1.0


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A list of these problems would take 10 MB and more."""
    count, text = 10_000, "x" * 1000
    table = pa.table({"question": [f"{n} {text}" for n in range(count)], "answer": list(range(count))})
    pq.write_table(table, tmp_path / "p.parquet")
    saved_folder = saved(tmp_path / "saved", table)
    del table
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for rows in (read_parquet(tmp_path / "p.parquet"), read_arrow(next(saved_folder.glob("*.arrow")))):
            assert rows[count - 1].read()["answer"] == count - 1
            assert tracemalloc.get_traced_memory()[0] < 2e6
            assert pa.total_allocated_bytes() - before < 2e6
    finally:
        tracemalloc.stop()
