"""Runs inside the sandbox, beside a program: calls its functions and reports what they return.

What a test expects never comes here: a program that looks for it finds nothing. The standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Read ``{mark, program, setup, tests}`` from standard input; write a line ``[mark, index, value]`` per test."""
    job = json.loads(sys.stdin.buffer.read())
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # what the program prints is nobody's answer
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    names: dict[str, Any] = {"__name__": "solution"}
    for source in (job["setup"], job["program"]):
        exec(compile(source, "solution.py", "exec"), names)
    for index, test in enumerate(job["tests"]):
        try:
            value = _run(names, test)
        except (Exception, SystemExit) as error:
            print(f"test {index}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        report.write(json.dumps([job["mark"], index, value]) + "\n")
        report.flush()


def _run(names: dict[str, Any], test: dict[str, Any]) -> str:
    """``{call, arguments}``: a function by name, or a method of ``Solution`` | ``{expression}`` | ``{statements}``."""
    if "call" in test:
        return repr(_plain(_function(names, test["call"])(*test["arguments"])))
    if "expression" in test:
        return repr(_plain(eval(test["expression"], names)))
    exec(test["statements"], names)
    return "None"


def _function(names: dict[str, Any], name: str) -> Callable[..., Any]:
    found = names.get(name)
    if found is None and "Solution" in names:
        found = getattr(names["Solution"](), name)
    if found is None:
        raise NameError(f"the program defines no {name}")
    return found  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """Subclasses of Python's own types and NumPy's numbers as what they stand for, so that their text can be read."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(_plain(item) for item in value)
    if type(value).__module__ == "numpy":
        return _plain(value.tolist())
    for simple in (bool, int, float, str):
        if isinstance(value, simple):
            return simple(value)
    return value


if __name__ == "__main__":
    main()
