"""No assertion of the tests that Python reads as another one than was meant: such a test cannot fail."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def _misread(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assert):
            continue
        test, reason = node.test, ""
        if isinstance(test, ast.IfExp) and isinstance(test.body, ast.Compare) != isinstance(test.orelse, ast.Compare):
            reason = "`a if c else b == x` compares b only: put the choice in parentheses"
        elif isinstance(test, ast.Tuple | ast.JoinedStr | ast.Lambda | ast.GeneratorExp | ast.Constant):
            reason = "has always the same truth"
        elif isinstance(test, ast.Call) and ast.unparse(test.func).endswith("approx"):
            reason = "compares with nothing"
        elif isinstance(test, ast.Compare) and ast.dump(test.left) in map(ast.dump, test.comparators):
            reason = "compares with itself"
        if reason:
            found.append(f"line {node.lineno}: {reason}")
    return found


def test_no_assertion_is_read_as_another() -> None:
    found = {path.relative_to(TESTS): _misread(path.read_text(encoding="utf-8")) for path in TESTS.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "assertion",
    [
        "assert max(x) if shared else sum(x) == approx(1.0)",
        "assert (x == 1, 'message')",
        "assert (y == 1 for y in x)",
        "assert 'x is 1'",
        "assert pytest.approx(x, 1.0)",
        "assert x.loss == x.loss",
    ],
)
def test_such_an_assertion_is_found(assertion: str) -> None:
    assert _misread(f"def test():\n    {assertion}\n")
    assert not _misread("def test():\n    assert (max(x) if shared else sum(x)) == approx(1.0), f'{x}'\n")
    assert not _misread("def test():\n    assert x == 0 if first else x < 3\n")
