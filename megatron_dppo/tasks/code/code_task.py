"""The reward of a program: the tests that it passes, run in a sandbox.

Outputs and returned values are compared here, outside the sandbox. A program that ends itself, prints what it likes or looks
through its own process learns nothing about what is expected.
"""

from __future__ import annotations

import ast
import json
import math
import secrets
import time
from pathlib import Path
from typing import Any

from megatron_dppo.tasks.answer_extraction import last_code_block
from megatron_dppo.tasks.code.sandbox import Limits, RunResult, check_isolation, run_sandboxed
from megatron_dppo.tasks.code.test_cases import TestCase, TestSuite, read_tests
from megatron_dppo.tasks.config import CodeRewardConfig
from megatron_dppo.tasks.task import Problem, Problems

_CALLER = Path(__file__).with_name("caller.py")
_RELATIVE = 1e-6  # of numbers with a point: they are computed in another order than the reference's


class CodeTask:
    """Problems whose answer is a set of tests, graded by running the last code block of a response.

    Args:
        problems: with tests as answers (``test_cases.read_tests``).
        config: limits and isolation.

    Raises:
        TaskError: programs cannot be run with that isolation on this machine.
    """

    def __init__(self, problems: Problems, config: CodeRewardConfig) -> None:
        check_isolation(config.isolation)
        self.name = problems.name
        self._problems = problems
        self._config = config

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]

    def score(self, problem: Problem, response: str) -> float:
        """The share of the tests that pass with ``partial_credit``, else 1.0 if all do and 0.0 if not.

        Without a code block 0.0. Raises ValueError on tests that cannot be read, SandboxError if nothing could be run.
        """
        if problem.answer is None:
            raise ValueError("the problem has no tests")
        suite = read_tests(problem.answer, problem.metadata)
        cases = suite.cases if self._config.max_tests == 0 else suite.cases[: self._config.max_tests]
        program = last_code_block(response)
        if not program:
            return 0.0
        run = self._run_programs if suite.reads_stdin else self._call_functions
        passed = run(TestSuite(cases, suite.setup), program)
        return passed / len(cases) if self._config.partial_credit else float(passed == len(cases))

    def _run_programs(self, suite: TestSuite, program: str) -> int:
        deadline = time.monotonic() + self._config.timeout_s
        passed = 0
        for case in suite.cases:
            left = min(deadline - time.monotonic(), self._config.test_timeout_s)
            if left <= 0:
                break
            result = self._run("solution.py", {"solution.py": program}, case.what["stdin"], left)
            right = result.ended == "exit" and result.code == 0 and same_output(result.stdout, case.expected)
            passed += right
            if not right and not self._config.partial_credit:
                break
        return passed

    def _call_functions(self, suite: TestSuite, program: str) -> int:
        mark = secrets.token_hex(8)
        tests = [case.what for case in suite.cases]
        job = {"mark": mark, "program": program, "setup": suite.setup, "tests": tests}
        seconds = min(self._config.timeout_s, self._config.test_timeout_s * len(tests))
        result = self._run("caller.py", {"caller.py": _CALLER.read_text(encoding="utf-8")}, json.dumps(job), seconds)
        values: dict[int, str] = {}
        for line in result.stdout.decode(errors="replace").splitlines():
            try:
                claimed, index, value = json.loads(line)
            except (ValueError, TypeError):
                continue
            if claimed == mark and isinstance(index, int) and isinstance(value, str):
                values.setdefault(index, value)
        return sum(index in values and _same_value(values[index], case) for index, case in enumerate(suite.cases))

    def _run(self, name: str, files: dict[str, str], stdin: str, seconds: float) -> RunResult:
        limits = Limits(
            seconds=seconds, memory_bytes=self._config.memory_mb << 20, folder_bytes=self._config.folder_mb << 20
        )
        return run_sandboxed(["-s", "-B", name], files, stdin, limits, self._config.isolation)


def same_output(written: bytes, expected: str) -> bool:
    """Whether two outputs agree word by word, however they are spaced; numbers with a point to a millionth."""
    words, references = written.decode(errors="replace").split(), expected.split()
    return len(words) == len(references) and all(map(_same_word, words, references))


def _same_word(word: str, reference: str) -> bool:
    if word == reference:
        return True
    if "." not in word + reference:
        return False
    try:
        return math.isclose(float(word), float(reference), rel_tol=_RELATIVE, abs_tol=_RELATIVE)
    except ValueError:
        return False


def _same_value(text: str, case: TestCase) -> bool:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    if "call" not in case.what:
        return bool(value == case.expected)
    # What JSON holds: lists for tuples. APPS puts some expected values into a list.
    return _same_json(value, case.expected) or (
        isinstance(case.expected, list) and len(case.expected) == 1 and _same_json(value, case.expected[0])
    )


def _same_json(value: Any, expected: Any) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same_json, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        spelt = {str(key): item for key, item in value.items()}
        return spelt.keys() == expected.keys() and all(_same_json(spelt[key], expected[key]) for key in expected)
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, float) and isinstance(expected, (int, float)):
        return math.isclose(value, expected, rel_tol=_RELATIVE, abs_tol=_RELATIVE)
    return bool(value == expected)
