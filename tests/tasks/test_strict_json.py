"""What JSON readers let pass in silence is refused with file and line."""

from __future__ import annotations

import codecs
from decimal import Decimal

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.strict_json import read_object


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "2 \\ud835"}', "a holds half a character"),
        (b'{"a": "\\udc00 2"}', "a holds half a character"),
        (b'{"a": {"b": [1, "\\ud835"]}}', "a.b holds half a character"),
        (b'{"a": {"\\ud835": 1}}', "a key of p.jsonl, line 2: a holds half a character"),
        (b'{"\\ud835": 1}', "a key holds half a character"),
        (b'{"a": "\xed\xa0\xb5"}', "not valid JSON: 'utf-8"),  # the same, in bytes
        (b'{"a": "x\\u0000"}', "a holds a NUL character at position 1"),
        (b'{"a": 1, "b": 2, "a": 1}', "not valid JSON: the key 'a' is there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "not valid JSON: the key 'b' is there twice"),
        (b'{"a": NaN}', "not valid JSON: NaN is no JSON number"),
        (b'{"a": [-Infinity]}', "not valid JSON: -Infinity is no JSON number"),
        (b'{"a": 1e400}', "not valid JSON: the number 1e400 is out of range"),
        (b'{"a": 1e-999999999}', "not valid JSON: the number 1e-999999999 is out of range"),
        (b'{"a": 1_000}', "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b'{"a": ' + b"[" * 100_000 + b"}", "not valid JSON: maximum recursion depth"),
        (b"[1]", "expected a JSON object, found list"),
        ('{"a": 1}'.encode("utf-16"), "save the file as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "save the file as UTF-8"),
        (b'{"a": "\xff"}', "not valid JSON: 'utf-8"),
    ],
)
def test_what_is_not_strictly_json_is_one_error(line: bytes, message: str) -> None:
    with pytest.raises(TaskError) as error:
        read_object(line, "p.jsonl, line 2")
    assert str(error.value).startswith(("p.jsonl, line 2: ", "a key of p.jsonl, line 2: "))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_whole_characters_are_fine() -> None:
    line = codecs.BOM_UTF8 + b'{"a": "\\ud835\\udc00", "b": 0.0, "c": -0.0e-400}'
    assert read_object(line, "p.jsonl, line 1") == {"a": "\U0001d400", "b": 0.0, "c": 0.0}


def test_exact_numbers_keep_their_digits() -> None:
    line = b'{"a": 0.10000000000000000001, "b": 7}'
    assert read_object(line, "here") == {"a": 0.1, "b": 7}
    assert read_object(line, "here", exact=True) == {"a": Decimal("0.10000000000000000001"), "b": 7}
