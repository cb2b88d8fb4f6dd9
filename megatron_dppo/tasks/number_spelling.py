"""Numbers as models and people write them, in the one spelling that verifiers read: ``-1234.5``.

The characters of a number vary (minus signs, digits of other scripts, separators of thousands, powers of ten), its value
does not. Everything here takes one pass over the text, whose length a model chooses.
"""

from __future__ import annotations

import re
from decimal import Decimal

# The separators of thousands that look like a space and are none.
_THIN = "\u202f"
_CHARACTERS = {
    **{0xFF01 + code: 0x21 + code for code in range(94)},  # the full-width forms of ASCII: digits, colon, minus, ...
    **dict.fromkeys(map(ord, "\u2212\ufe63"), "-"),  # minus signs that are never a dash
    **dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u200a"), _THIN),
    **dict.fromkeys(map(ord, "\u200b\u200e\u200f\u2060\ufeff")),  # invisible
    0x066B: ".",  # the Arabic decimal separator
    0x066C: ",",
}
_CURRENCY = r"(?:\\?\$|[€£¥])"
_LATEX_THOUSANDS = re.compile(r"(?<=\d)(?:,?\\[,;:! ]|\{,\})+(?=\d{3}(?!\d))")
_UNDERSCORED = re.compile(r"(?<![\w.])\d{1,3}(?:_\d{3})+(?!\w)")
# A sign may stand apart from its number where no operand precedes it; elsewhere it subtracts, or is a dash.
_SIGN_APART = re.compile(
    rf"(^\s*|[=:(\[{{<>]|\b(?:is|are|be|equals|answer)) ?[-\u2013] {{1,2}}(?={_CURRENCY}?\.?\d)", re.I
)
_DASH_AS_SIGN = re.compile(rf"(?<![\w)\]}}%])[\u2010-\u2013](?={_CURRENCY}?\.?\d)")
_SIGN_BEFORE_CURRENCY = re.compile(rf"(?<![\w)\]}}%$])-({_CURRENCY}) ?(?=[^\s$])")

_SCIENTIFIC = re.compile(r"(?<![\w.,])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d{1,3})(?!\w|\.\d)")
_POWER_OF_TEN = re.compile(
    r"(?<![\w.,^/])(\d+(?:\.\d+)?|\.\d+) ?(?:\\times|\\cdot|[\u00d7\u00b7*xX]) ?10 ?"
    r"(?:(?:\^|\*\*) ?(?:\{ ?([+-]?\d{1,3}) ?\}|([+-]?\d{1,3}))|([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3}))(?!\d)"
)
_SUPERSCRIPTS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")

# Digits with what may separate them; a plain space only where exactly three digits follow.
_RUN = re.compile(r"\d+(?:[.,'\u2019]\d+| \d{3}(?!\d))*")
_GROUPED = re.compile(r"([1-9]\d{0,2})(([.,'\u2019 ])\d{3}(?:\3\d{3})*)(?:(?!\3)([.,])(\d+))?")
_DECIMAL = re.compile(r"(\d+)[.,](\d+)")
_NAME_BEFORE = re.compile(r"(?:^|[^A-Za-zÀ-ɏͰ-ӿ])(?:is|are|answer|equals)$", re.I)


def respell_numbers(text: str) -> str:
    """The text with its numbers in ASCII digits and signs; what is no number is left alone.

    Digits of any script become ASCII, every minus sign becomes ``-`` and stands at its digits (``- 3`` after ``=`` or
    ``is``, ``-$3``), and separators of thousands that no comma is (``1\\,000``, ``1{,}000``, ``1_000``, thin spaces)
    vanish.
    """
    if not text.isascii():
        text = text.translate(_CHARACTERS)
        text = "".join(str(int(c)) if c.isdecimal() else c for c in text) if not text.isascii() else text
        text = re.sub(rf"(?<=\d){_THIN}(?=\d{{3}}(?!\d))", "", text).replace(_THIN, " ")
    text = _LATEX_THOUSANDS.sub("", text)
    text = _UNDERSCORED.sub(lambda match: match[0].replace("_", ""), text)
    text = _SIGN_APART.sub(r"\1 -", text)
    text = _DASH_AS_SIGN.sub("-", text)
    return _SIGN_BEFORE_CURRENCY.sub(r"\1-", text)


def plain_decimal(number: Decimal | float) -> str:
    """The number without an exponent: ``0.00001`` for ``1e-05``; zero has no sign."""
    exact = Decimal(repr(number)) if isinstance(number, float) else number
    return format(abs(exact) if exact.is_zero() else exact, "f")


def expand_scientific(text: str) -> str:
    """The text with ``1e-5`` (no gap before the ``e``) written ``0.00001``; exponents of up to three digits."""
    return _SCIENTIFIC.sub(lambda match: plain_decimal(Decimal(f"{match[1]}e{match[2]}")), text)


def last_number(text: str) -> str | None:
    """The last number in a text, in plain ASCII, or None.

    Thousands are separated by commas, points, apostrophes or (thin) spaces, in groups of three; the decimal separator
    is a point, or a comma where it cannot separate thousands: ``1,234`` is 1234, ``1,23`` is 1.23, ``1.234,56`` is
    1234.56. In brackets and after another comma a comma separates numbers: ``(1,23)`` ends with 23. A minus sign after
    an operand subtracts: ``5-3`` ends with 3. ``1.5e-3`` and ``1.5 \\times 10^{-3}`` are one number, ``1/2`` is two.
    Digits that belong to a name (``x2``) are no number.
    """
    text = _POWER_OF_TEN.sub(_expand_power, expand_scientific(respell_numbers(text)))
    last = None
    for run in _RUN.finditer(text):
        if not _is_in_a_name(text, run.start()):
            last = run
    return None if last is None else _value(text, last)


def _expand_power(match: re.Match[str]) -> str:
    exponent = match[2] or match[3] or match[4].translate(_SUPERSCRIPTS)
    return plain_decimal(Decimal(f"{match[1]}e{exponent}"))


def _is_in_a_name(text: str, start: int) -> bool:
    """Whether a letter stands right before the digits; scripts without spaces (``答案是34``) do not count."""
    before = text[start - 1] if start else ""
    if before == "_":
        return start > 1 and (text[start - 2].isalnum() or text[start - 2] in "})")  # a subscript, not emphasis
    if not (before.isalpha() and before < "\u0530"):
        return False
    return _NAME_BEFORE.search(text[max(start - 8, 0) : start]) is None


def _value(text: str, run: re.Match[str]) -> str:
    """The number that a run of digits and separators ends with, with its sign."""
    digits, start = run[0], run.start()
    if re.search(r"(?:^|[^\w.)\]}])\.$", text[max(start - 2, 0) : start]):  # .5
        digits, start = f"0.{digits}", start - 1
    sign = "-" if re.search(r"(?:^|[^\w)\]}%])-$", text[max(start - 2, 0) : start]) else ""
    first = start - len(sign)
    in_a_list = re.search(r"(?:[(\[{]|\d[,;]?) ?$", text[max(first - 3, 0) : first]) is not None
    if (grouped := _GROUPED.fullmatch(digits)) and _separates_thousands(grouped, in_a_list):
        whole = re.sub(r"\D", "", grouped[1] + grouped[2])
        return sign + (f"{whole}.{grouped[5]}" if grouped[5] else whole)
    if (decimal := _DECIMAL.fullmatch(digits)) and not (in_a_list and "," in digits):
        return f"{sign}{decimal[1]}.{decimal[2]}"
    groups = re.findall(r"\d+", digits)
    return sign + digits if len(groups) == 1 else groups[-1]


def _separates_thousands(grouped: re.Match[str], in_a_list: bool) -> bool:
    one_point = grouped[3] == "." and len(grouped[2]) == 4 and not grouped[5]  # 1.234 is a decimal
    return not one_point and not (in_a_list and grouped[3] == " ")
