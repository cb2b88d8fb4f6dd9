"""A program earns what its tests say, whatever else it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dppo.tasks.answer_extraction import last_code_block
from megatron_dppo.tasks.build import build_grader
from megatron_dppo.tasks.code.code_task import CodeTask, same_output
from megatron_dppo.tasks.config import CodeRewardConfig, TaskConfig
from megatron_dppo.tasks.scoring import Scorer
from megatron_dppo.tasks.task import Problem
from tests.tasks.code.isolations import ISOLATIONS

DOUBLE = {"inputs": ["1", "2", "3"], "outputs": ["2", "4", "6"]}
CALLS = {"inputs": [[1], [2], [3]], "outputs": [[2], [[4]], 6], "fn_name": "double"}
ASSERTS = ["assert double(1) == 2", "assert double(2) == 4", "assert double(3) > 5"]


def config(**settings: Any) -> TaskConfig:
    reward = CodeRewardConfig(isolation=ISOLATIONS[0], **{"test_timeout_s": 2.0, **settings})
    return TaskConfig(name="code", kind="jsonl", path="unread.jsonl", code_reward=reward)


def reward(program: str, tests: Any, metadata: dict[str, Any] | None = None, **settings: Any) -> float:
    text = tests if isinstance(tests, str) else json.dumps(tests)
    problem = Problem("code/0", "?", text, metadata or {})
    return build_grader(config(**settings)).score(problem, f"So:\n```python\n{program}\n```\nDone.")


@pytest.mark.parametrize(
    ("program", "tests", "earned"),
    [
        ("print(2 * int(input()))", DOUBLE, 1.0),
        ("if __name__ == '__main__':\n    print(2 * int(input()))", DOUBLE, 1.0),
        ("print(2 + int(input()) % 2)", DOUBLE, 0.0),
        ("print(2 * int(input())); raise SystemExit(1)", DOUBLE, 0.0),
        ("while True: pass", DOUBLE, 0.0),
        ("def double(x): return 2 * x", ASSERTS, 1.0),
        ("def double(x): return x * 2.0", ASSERTS, 1.0),
        ("def double(x): return 2", ASSERTS, 0.0),
        ("def halve(x): return 2", ASSERTS, 0.0),
        ("def double(x): print('noise'); return 2 * x", ASSERTS, 1.0),
        ("def double(x: ", ASSERTS, 0.0),
        ("from collections import Counter\ndef f(): return Counter('aab')", ["assert f() == {'a': 2, 'b': 1}"], 1.0),
        ("def f(): return (1, 2)", ["assert f() == [1, 2]"], 0.0),
    ],
)
def test_a_program_earns_1_if_every_test_passes(program: str, tests: Any, earned: float) -> None:
    assert reward(program, tests) == earned


def test_functions_and_methods_are_called_as_json_data_sets_expect() -> None:
    assert reward("class Solution:\n    def double(self, x): return 2 * x", {**CALLS, "outputs": [2, [4], 6]}) == 1.0
    pairs = {"inputs": [[1]], "outputs": [[1, 2.0]], "fn_name": "f"}
    assert reward("def f(x): return (1, 1.9999999999)", pairs) == 1.0
    assert reward("def f(x): return (1, 2.1)", pairs) == 0.0
    assert reward("def f(x): return True", {"inputs": [[1]], "outputs": [1], "fn_name": "f"}) == 0.0
    check = "def check(candidate):\n    assert candidate(1) == 2\n"
    assert reward("def f(x): return 2", check, {"entry_point": "f"}) == 1.0
    assert reward("def f(x): return 3", check, {"entry_point": "f"}) == 0.0
    assert reward("def f(x): return g(x)", ["assert f(1) == 2"], {"test_setup_code": "def g(x): return x + 1"}) == 1.0


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "def double(x): raise SystemExit(0)",
        'import os\nos.write(1, b\'["", 0, "2"]\\n\' * 9); os._exit(0)',  # without the mark
        "class Yes:\n    def __eq__(self, other): return True\ndef double(x): return Yes()",
        "import builtins, json\njson.dumps = lambda *a: ''\ndef double(x): return 0",
        "import sys\nsys.stdin.read()\ndef double(x): return 7",
    ],
)
def test_tricks_earn_nothing(program: str) -> None:
    assert reward(program, ASSERTS[:2]) == 0.0


def test_partial_credit_is_the_share_and_a_slow_test_costs_its_own() -> None:
    slow = "n = int(input())\nwhile n == 2: pass\nprint(2 * n)"
    assert reward(slow, DOUBLE, partial_credit=True) == pytest.approx(2 / 3)
    assert reward(slow, DOUBLE, partial_credit=True, max_tests=1) == 1.0
    assert reward("def double(x): return {1: 2}[x]", ASSERTS, partial_credit=True) == pytest.approx(1 / 3)
    late = "import time\ndef double(x):\n    if x == 3: time.sleep(60)\n    return 2 * x"
    assert reward(late, ASSERTS, partial_credit=True, timeout_s=2.0) == pytest.approx(2 / 3)


def test_outputs_agree_word_by_word() -> None:
    assert same_output(b"1  2\n3 \n\n", "1 2\n3")
    assert same_output(b"0.3333333", "0.33333333333")
    for written, expected in (
        (b"1", "1 2"),
        (b"1", "2"),
        (b"1000001", "1000000"),
        (b"0.334", "0.333"),
        (b"yes", "YES"),
    ):
        assert not same_output(written, expected)


@pytest.mark.parametrize(
    ("response", "block"),
    [
        ("```python\na\n```\n```\nb\n```", "b\n"),
        ("```python\na\n```\nRun it:\n```bash\nb\n```", "a\n"),
        ("```py\na\n```\n```python\ncut off", "a\n"),
        ("````python\n```\nb\n```\n````", "```\nb\n```\n"),
        ("no code", None),
        ("```python\ncut off", None),
        ("```python\n```", ""),
    ],
)
def test_the_last_python_block_counts(response: str, block: str | None) -> None:
    assert last_code_block(response) == block


def test_a_scoring_worker_runs_programs(tmp_path: Path) -> None:
    problem = Problem("code/0", "?", json.dumps(DOUBLE))
    answers = ["```\nprint(2 * int(input()))\n```", "no code", "```\nwhile True: pass\n```"]
    with Scorer([config()], timeout_s=20.0) as scorer:
        results = scorer.score([(problem, answer) for answer in answers])
    assert [(result.reward, result.failure) for result in results] == [(1.0, None), (0.0, None), (0.0, None)]


def test_tests_that_cannot_be_read_are_the_datas_fault_and_not_the_responses() -> None:
    task = CodeTask(build_grader(config()), CodeRewardConfig(isolation=ISOLATIONS[0]))
    with pytest.raises(ValueError, match="neither JSON nor Python"):
        task.score(Problem("code/0", "?", "def f("), "```\n1\n```")
