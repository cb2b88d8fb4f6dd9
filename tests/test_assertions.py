"""No test that cannot fail: assertions that Python reads as other ones than were meant, that are never reached, or absent.

Read from the sources. Of loops and ``all(...)`` only those are found that say themselves that they may be over nothing: over
what a filter leaves, or what a pattern matches.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# What fails if something is not so; and everything that is called assert_... or check_...
FAILING = {"assert", "raises", "warns", "fail", "gradcheck", "opcheck"}
# Predicates whose answer is all that they are for.
PREDICATES = {"all", "any", "isinstance", "torch.equal", "torch.allclose", "np.array_equal", "np.allclose"}
MAY_FIND_NOTHING = {"filter", "glob", "rglob", "nonzero", "findall", "finditer"}


def findings(source: str, asserting: frozenset[str] = frozenset()) -> list[str]:
    """``asserting``: names of the functions elsewhere that assert."""
    tree = ast.parse(source)
    asserting |= asserting_functions([tree])
    found = []
    for node in ast.walk(tree):
        reason = ""
        if isinstance(node, ast.Assert):
            reason = _misread(node.test)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name = ast.unparse(node.value.func)
            reason = f"the answer of {name} is thrown away" if name in PREDICATES else ""
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            reason = _never_asserts(node, asserting)
        if reason:
            found.append(f"line {node.lineno}: {reason}")
    return found


def _misread(test: ast.expr) -> str:
    if isinstance(test, ast.IfExp) and isinstance(test.body, ast.Compare) != isinstance(test.orelse, ast.Compare):
        return "`a if c else b == x` compares b only: put the choice in parentheses"
    if isinstance(test, ast.Tuple | ast.JoinedStr | ast.Lambda | ast.GeneratorExp | ast.Constant):
        return "has always the same truth"
    if isinstance(test, ast.BoolOp) and any(isinstance(part, ast.Constant) for part in test.values):
        return "has always the same truth, or a part that has"
    if isinstance(test, ast.Call) and ast.unparse(test.func).endswith("approx"):
        return "compares with nothing"
    if isinstance(test, ast.Compare) and ast.dump(test.left) in map(ast.dump, test.comparators):
        return "compares with itself"
    if (
        isinstance(test, ast.Compare)
        and ast.unparse(test).startswith(("len(", "abs("))
        and ast.unparse(test).endswith(">= 0")
    ):
        return "is true of every length and size"
    if _is_all_over_nothing(test) or (
        isinstance(test, ast.Call)
        and ast.unparse(test.func) == "bool"
        and test.args
        and _is_all_over_nothing(test.args[0])
    ):
        return "all() of what a filter leaves is true of nothing: compare the list of those that fail with []"
    return ""


def _is_all_over_nothing(test: ast.expr) -> bool:
    return (
        isinstance(test, ast.Call)
        and ast.unparse(test.func) == "all"
        and bool(test.args)
        and isinstance(test.args[0], ast.GeneratorExp | ast.ListComp)
        and any(part.ifs or _may_be_nothing(part.iter) for part in test.args[0].generators)
    )


def _may_be_nothing(iterable: ast.expr) -> bool:
    if isinstance(iterable, ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp):
        return any(part.ifs or _may_be_nothing(part.iter) for part in iterable.generators)
    if isinstance(iterable, ast.List | ast.Tuple | ast.Set) and not iterable.elts:
        return True
    return any(
        isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in MAY_FIND_NOTHING
        for node in ast.walk(iterable)
    )


def _never_asserts(test: ast.FunctionDef, asserting: frozenset[str]) -> str:
    """Why a test may pass without a single assertion; "" if it has one that is reached."""
    places = [in_loop for name, in_loop in _names_used(test) if _fails_by_itself(name) or name in asserting]
    if not places:
        return "asserts nothing"
    return "asserts only in loops that may be over nothing" if all(places) else ""


def _names_used(node: ast.AST, in_loop: bool = False) -> Iterator[tuple[str, bool]]:
    """Every name below, ``assert`` among them, and whether it is in a loop that may be over nothing."""
    for child in ast.iter_child_nodes(node):
        loop = in_loop or (isinstance(child, ast.For) and _may_be_nothing(child.iter))
        if isinstance(child, ast.Assert):
            yield "assert", loop
        elif isinstance(child, ast.Name):
            yield child.id, loop
        elif isinstance(child, ast.Attribute):
            yield child.attr, loop
        yield from _names_used(child, loop)


def _fails_by_itself(name: str) -> bool:
    return name in FAILING or name.startswith(("assert_", "check_"))


def asserting_functions(trees: Iterable[ast.Module]) -> frozenset[str]:
    """Functions, and classes by their methods, that assert or use one that does; by their bare names."""
    used: dict[str, set[str]] = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                used.setdefault(node.name, set()).update(name for name, _ in _names_used(node))
    found = {name for name, names in used.items() if any(map(_fails_by_itself, names))}
    while new := {name for name, names in used.items() if name not in found and names & found}:
        found |= new
    return frozenset(found)


@cache
def _trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in TESTS.rglob("*.py")}


def test_no_test_passes_whatever_happens() -> None:
    asserting = asserting_functions(_trees().values())
    assert len(_trees()) > 100
    found = {str(path.relative_to(TESTS)): findings(path.read_text(encoding="utf-8"), asserting) for path in _trees()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "statement",
    [
        "assert max(x) if shared else sum(x) == approx(1.0)",
        "assert (x == 1, 'message')",
        "assert (y == 1 for y in x)",
        "assert 'x is 1'",
        "assert x == 1 or True",
        "assert pytest.approx(x, 1.0)",
        "assert x.loss == x.loss",
        "assert len(x) >= 0",
        "assert all(y == 1 for y in x if y)",
        "assert all(y.exists() for y in folder.glob('*.pt'))",
        "assert x\n    torch.equal(x, y)",
        "x = 1",
        "helper(x)",
        "for y in [z for z in x if z]:\n        assert y == 1",
        "for y in x.nonzero().tolist():\n        for z in y:\n            assert z == 1",
    ],
)
def test_such_a_test_is_found(statement: str) -> None:
    assert len(findings(f"def test():\n    pass\ndef test_x():\n    {statement}\n")) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "assert (max(x) if shared else sum(x)) == approx(1.0), f'{x}'",
        "assert x == 0 if first else x < 3",
        "assert all(y == 1 for y in x)",
        "assert [y for y in x if y] == []",
        "for y in x:\n        assert y == 1",
        "for y in x.nonzero():\n        assert y == 1\n    assert x.any()",
        "with pytest.raises(ValueError, match='x'):\n        f()",
        "torch.testing.assert_close(x, y)",
        "compare(x)",
        "ranks(2).run(_body)",
    ],
)
def test_a_test_that_can_fail_is_not_found(statement: str) -> None:
    helpers = "def _body():\n    compare(1)\ndef compare(x):\n    assert x == 1\n"
    assert findings(f"{helpers}def test_x():\n    {statement}\n") == []
