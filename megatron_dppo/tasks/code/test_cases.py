"""Tests of programs in the forms that code data sets have them.

| form | data sets |
|---|---|
| ``{"inputs": [...], "outputs": [...]}``, with ``fn_name`` for a function | APPS, TACO, verl, PRIME |
| ``[{"input": ..., "output": ...}, ...]``, with ``testtype: functional`` for a function | LiveCodeBench, open-r1 |
| ``["assert f(1) == 2", ...]`` | MBPP, AceCode, open-instruct |
| Python, with ``check(candidate)`` and an ``entry_point`` in the row | HumanEval |
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Fields of a row, or of its ``metadata``, that name the function to call.
_FUNCTION_FIELDS = ("fn_name", "func_name", "entry_point")


@dataclass(frozen=True)
class TestCase:
    """One test: what is done, and what has to come out.

    Attributes:
        what: ``{stdin}`` for a program; ``{call, arguments}``, ``{expression}`` or ``{statements}`` for ``caller.py``.
        expected: a text (stdin), or a value; of ``statements`` None, which is what they give when nothing is raised.
    """

    __test__ = False  # no test of pytest's

    what: dict[str, Any]
    expected: Any


@dataclass(frozen=True)
class TestSuite:
    """The tests of one problem.

    Attributes:
        cases: at least one; either all with stdin or none.
        setup: Python that runs before the program, for tests of functions.
    """

    __test__ = False

    cases: tuple[TestCase, ...]
    setup: str = ""

    @property
    def reads_stdin(self) -> bool:
        """Whether the program is run as a whole, once per case."""
        return "stdin" in self.cases[0].what


def read_tests(text: str, row: Mapping[str, Any]) -> TestSuite:
    """The tests in ``text``; ``row`` is the problem's metadata. Raises ValueError, with what is wrong."""
    try:
        tests = json.loads(text)
    except ValueError:
        tests = None
    if tests is None:
        cases = [_statements(text, row)]
    elif isinstance(tests, dict):
        cases = _pairs(tests, row)
    elif isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        cases = [_assertion(test) for test in tests]
    elif isinstance(tests, list):
        cases = [_described(test, row) for test in tests]
    else:
        raise ValueError(f"the tests are a {type(tests).__name__}; expected an object, a list or Python")
    if not cases:
        raise ValueError("there are no tests")
    if len({"stdin" in case.what for case in cases}) > 1:
        raise ValueError("some tests give standard input and others call a function")
    setup = row.get("test_setup_code")
    return TestSuite(tuple(cases), setup if isinstance(setup, str) else "")


def _pairs(tests: Mapping[str, Any], row: Mapping[str, Any]) -> list[TestCase]:
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("inputs and outputs have to be two lists of one length")
    name = tests.get("fn_name")
    if name is None:
        return [_stdin(given, expected) for given, expected in zip(inputs, outputs, strict=True)]
    if not isinstance(name, str) or not all(isinstance(arguments, list) for arguments in inputs):
        raise ValueError("with fn_name, which is a text, every input is a list of arguments")
    return [
        TestCase({"call": name, "arguments": arguments}, expected)
        for arguments, expected in zip(inputs, outputs, strict=True)
    ]


def _described(test: Any, row: Mapping[str, Any]) -> TestCase:
    if not isinstance(test, dict) or "input" not in test or "output" not in test:
        raise ValueError("a test is an object with input and output, or an assert in a text")
    if test.get("testtype") != "functional":
        return _stdin(test["input"], test["output"])
    name = _function_name(row)
    if name is None:
        raise ValueError(f"functional tests need the function's name in one of the row's {', '.join(_FUNCTION_FIELDS)}")
    try:
        arguments = [json.loads(line) for line in test["input"].splitlines() if line.strip()]
        return TestCase({"call": name, "arguments": arguments}, json.loads(test["output"]))
    except (AttributeError, TypeError, ValueError):
        raise ValueError("a functional test has one JSON value per line of its input, and one as its output") from None


def _function_name(row: Mapping[str, Any]) -> str | None:
    metadata = row.get("metadata")
    if isinstance(metadata, str):  # LiveCodeBench
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    for source in (row, metadata if isinstance(metadata, dict) else {}):
        for field in _FUNCTION_FIELDS:
            if isinstance(source.get(field), str):
                return str(source[field])
    return None


def _stdin(given: Any, expected: Any) -> TestCase:
    stdin, output = _joined(given), _joined(expected)
    if not isinstance(stdin, str) or not isinstance(output, str):
        raise ValueError("without fn_name inputs and outputs are texts")
    return TestCase({"stdin": stdin}, output)


def _joined(value: Any) -> Any:
    """A list of lines as a text."""
    is_lines = isinstance(value, list) and all(isinstance(line, str) for line in value)
    return "\n".join(value) if is_lines else value


def _assertion(source: str) -> TestCase:
    """``assert f(x) == literal`` as the expression ``f(x)``, whose value is compared outside; other code as it is."""
    tree = _parsed(source)
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.Assert):
        return TestCase({"statements": source}, None)
    condition = tree.body[0].test
    if isinstance(condition, ast.Compare) and len(condition.ops) == 1 and isinstance(condition.ops[0], ast.Eq):
        try:
            expected = ast.literal_eval(condition.comparators[0])
        except ValueError:
            pass
        else:
            return TestCase({"expression": ast.unparse(condition.left)}, expected)
    return TestCase({"expression": f"bool({ast.unparse(condition)})"}, True)


def _statements(source: str, row: Mapping[str, Any]) -> TestCase:
    tree = _parsed(source)
    checks = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)
    name = _function_name(row)
    if checks and name is None:
        raise ValueError("check(candidate) needs the function's name in the row's entry_point")
    return TestCase({"statements": f"{source}\ncheck({name})\n" if checks else source}, None)


def _parsed(source: str) -> ast.Module:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"the tests are neither JSON nor Python: {error}") from None
    if not tree.body:
        raise ValueError("there are no tests")
    return tree
