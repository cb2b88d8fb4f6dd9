"""Tests of programs in the forms of common data sets; what cannot be read is an error when the data are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.build import build_file_problems
from megatron_dppo.tasks.code.test_cases import TestCase, read_tests
from megatron_dppo.tasks.config import CodeRewardConfig, TaskConfig

STDIN = [TestCase({"stdin": "1"}, "2")]
CALL = [TestCase({"call": "f", "arguments": [1, [2]]}, 3)]


@pytest.mark.parametrize(
    ("tests", "row", "cases"),
    [
        ({"inputs": ["1"], "outputs": ["2"]}, {}, STDIN),
        ({"inputs": [["1", "2"]], "outputs": ["3"]}, {}, [TestCase({"stdin": "1\n2"}, "3")]),
        ({"inputs": [[1, [2]]], "outputs": [3], "fn_name": "f"}, {}, CALL),
        ([{"input": "1", "output": "2", "testtype": "stdin"}], {}, STDIN),
        ([{"input": "1\n[2]", "output": "3", "testtype": "functional"}], {"metadata": '{"func_name": "f"}'}, CALL),
        (["assert f(1) == 2"], {}, [TestCase({"expression": "f(1)"}, 2)]),
        (["assert f(1) == [(1, {2})]"], {}, [TestCase({"expression": "f(1)"}, [(1, {2})])]),
        (["assert f(1) > g(2), 'message'"], {}, [TestCase({"expression": "bool(f(1) > g(2))"}, True)]),
        (["x = f(1)\nassert x == 2"], {}, [TestCase({"statements": "x = f(1)\nassert x == 2"}, None)]),
        (
            "def check(candidate):\n    assert candidate(1) == 2\n",
            {"entry_point": "f"},
            [TestCase({"statements": "def check(candidate):\n    assert candidate(1) == 2\n\ncheck(f)\n"}, None)],
        ),
    ],
)
def test_the_forms_of_common_data_sets(tests: Any, row: dict[str, Any], cases: list[TestCase]) -> None:
    suite = read_tests(tests if isinstance(tests, str) else json.dumps(tests), row)
    assert list(suite.cases) == cases
    assert suite.reads_stdin == ("stdin" in cases[0].what)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ({"inputs": ["1"], "outputs": []}, "two lists of one length"),
        ({"inputs": [], "outputs": []}, "there are no tests"),
        ([], "there are no tests"),
        ({"inputs": [1], "outputs": ["2"]}, "without fn_name inputs and outputs are texts"),
        ({"inputs": [1], "outputs": ["2"], "fn_name": "f"}, "every input is a list of arguments"),
        ([{"in": 1}], "a test is an object with input and output"),
        ([{"input": "1", "output": "2", "testtype": "functional"}], "need the function's name"),
        (7, "the tests are a int"),
        ("def f(", "neither JSON nor Python"),
        ("def check(candidate): pass", "needs the function's name in the row's entry_point"),
        (["assert ("], "neither JSON nor Python"),
    ],
)
def test_bad_tests_are_named_when_the_rows_are_read(tests: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    good = {"problem": "Add one.", "input_output": {"inputs": ["1"], "outputs": ["2"]}}
    path.write_text(json.dumps(good) + "\n" + json.dumps({"problem": "?", "input_output": tests}))
    with pytest.raises(TaskError, match=r"p\.jsonl, line 2: input_output: ") as error:
        build_file_problems(TaskConfig(name="code", kind="jsonl", path=str(path), code_reward=CodeRewardConfig()))
    assert message in str(error.value)
