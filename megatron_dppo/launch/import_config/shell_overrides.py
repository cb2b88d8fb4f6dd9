"""``key.sub=value`` overrides out of a file of lines, or out of a shell script that passes them to a program.

A script is read, never run: assignments of variables, their use with and without a default, sums in ``$((...))`` and ``case``
by the value of a variable are followed. What stands between ``if`` and ``fi``, or in a loop or a function, depends on the
moment and is left out.
"""

from __future__ import annotations

import ast
import fnmatch
import operator
import re
import shlex
from collections.abc import Iterator
from typing import Any

import yaml

_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_OVERRIDE = re.compile(r"\+{0,2}([A-Za-z_][\w.]*\.[\w.]+|model_engine)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^{}]*))?\}|(\w+))")
_SUM = re.compile(r"\$\(\(([^()]*(?:\([^()]*\)[^()]*)*)\)\)")
_CASE = re.compile(r"case\s+(\S+)\s+in")
_BRANCH = re.compile(r"([^\s()]+)\)\s*(.*?)\s*(;;)?\s*")
_OPENS = re.compile(r"(if|for|while|until)\b|(function\s+)?\w+\s*\(\)\s*\{?$")
_CLOSES = re.compile(r"(.*[;\s])?(fi|done|\})")
_LONGEST_LINE = 20_000  # after so much, what looked like an open quote was none
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
}


def read_overrides(text: str) -> dict[str, Any]:
    """{key: value} of all overrides in ``text``, later ones winning, values as YAML reads them.

    A value that depends on what cannot be followed stays as it is written, with its ``$``.
    """
    variables: dict[str, str] = {}
    overrides: dict[str, Any] = {}
    for line in _followed_lines(text, variables):
        for word in _words(line):
            several = _VARIABLE.fullmatch(word)  # overrides that were collected in a variable
            for each in _words(_expanded(word, variables)) if several else [word]:
                if found := _OVERRIDE.fullmatch(each):
                    overrides[found[1]] = _value(_expanded(found[2], variables))
        if (found := _ASSIGNMENT.fullmatch(line)) and "=(" not in line.split('"')[0]:
            values = _words(_expanded(found[2], variables))  # first: a sum has spaces, and no quotes around it
            variables[found[1]] = values[0] if values else ""
    return overrides


def _followed_lines(text: str, variables: dict[str, str]) -> Iterator[str]:
    """Lines, joined where they are continued, without what is conditional."""
    depth, case, taken = 0, "", False
    for line in _whole_lines(text):
        if depth or _OPENS.match(line):
            depth += bool(_OPENS.match(line)) - bool(_CLOSES.fullmatch(line))
        elif found := _CASE.match(line):
            case, taken = _expanded(found[1].strip("\"'"), variables), False
        elif line == "esac":
            case = ""
        elif case:
            branch = _BRANCH.fullmatch(line)
            if branch and not taken and any(fnmatch.fnmatch(case, p) for p in branch[1].split("|")):
                taken = True
                yield branch[2]
        else:
            yield line


def _whole_lines(text: str) -> Iterator[str]:
    """Lines as a shell takes them: joined where they are continued, and where a quote is open."""
    begun = ""
    for line in text.replace("\\\n", " ").splitlines():
        begun = f"{begun} {line}".strip()
        if not _is_open(begun) or len(begun) > _LONGEST_LINE:
            yield begun
            begun = ""


def _is_open(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


def _words(line: str) -> list[str]:
    """As a shell splits them; an open quote has none."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []


def _expanded(text: str, variables: dict[str, str]) -> str:
    for _ in range(10):  # a value may name variables itself
        before = text
        text = _VARIABLE.sub(lambda found: _variable(found, variables), text)
        text = _SUM.sub(lambda found: _sum(found, variables), text)
        if text == before:
            break
    return text


def _variable(found: re.Match[str], variables: dict[str, str]) -> str:
    name, default = found[1] or found[3], found[2]
    return variables.get(name) or (default if default is not None else found[0])


def _sum(found: re.Match[str], variables: dict[str, str]) -> str:
    numbers = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", lambda name: variables.get(name[1], name[1]), found[1])
    try:
        return str(_number(ast.parse(numbers.strip(), mode="eval").body))
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return found[0]


def _number(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp):
        return int(_OPERATORS[type(node.op)](_number(node.left), _number(node.right)))  # type: ignore[index]
    raise ValueError("no sum of numbers")


def _value(text: str) -> Any:
    if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text):
        return float(text)  # YAML 1.1 takes 1e-6 for a text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
