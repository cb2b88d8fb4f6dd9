"""A number's value survives its spelling: signs, digits of other scripts, separators, exponents."""

from __future__ import annotations

from decimal import Decimal

import pytest

from megatron_dppo.tasks.number_spelling import expand_scientific, last_number, plain_decimal, respell_numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # signs
        ("The answer is \u22123", "-3"),
        ("The answer is \u20133", "-3"),  # an en dash
        ("The answer is \u2011\u200b3", "-3"),  # a hyphen, and something invisible before the digit
        ("The answer is \u2212\u200b3", "-3"),
        ("The answer is - 3", "-3"),
        ("x = - 3", "-3"),
        ("- 3", "-3"),
        ("Cases:\n- 2\n- 3", "3"),  # a list, not a sign
        ("x=-3", "-3"),
        ("(\u22123)", "-3"),
        ("$-3$", "-3"),
        ("-$3", "-3"),
        ("-$3$", "-3"),
        ("-\\$3", "-3"),
        ("-\u20ac3", "-3"),
        ("(1, -3)", "-3"),
        # subtractions, ranges and hyphens
        ("5-3", "3"),
        ("5\u22123", "3"),
        ("5 - 3", "3"),
        ("5\u20133", "3"),
        ("x-3", "3"),
        ("\\frac{1}{2}-3", "3"),
        ("(2)-3", "3"),
        ("COVID-19", "19"),
        # digits and punctuation of other scripts
        ("\uff13\uff14", "34"),
        ("\uff0d\uff13\uff0e\uff15", "-3.5"),
        ("\u0663\u0664", "34"),
        ("-\u0663\u066b\u0665", "-3.5"),
        ("Answer\uff1a34", "34"),
        ("\u7b54\u6848\u662f34", "34"),  # Chinese: "the answer is34"
        # separators
        ("1,234,567", "1234567"),
        ("1,234.50", "1234.50"),
        ("1.234,56", "1234.56"),
        ("1.234.567", "1234567"),
        ("1.234", "1.234"),
        ("1,23", "1.23"),
        ("0,500", "0.500"),
        ("(1,23)", "23"),
        ("1,2,3", "3"),
        ("1, 2,3", "3"),
        ("1 000", "1000"),
        ("1\u2009000", "1000"),
        ("1\u00a0000", "1000"),
        ("1\u202f234\u202f567", "1234567"),
        ("1'000", "1000"),
        ("1\\,000", "1000"),
        ("10,\\!000", "10000"),
        ("1{,}234", "1234"),
        ("1_000", "1000"),
        ("the numbers 12 5 100", "100"),
        ("in 2024 100 people", "100"),
        # points
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("x = .5", "0.5"),
        ("No.5", "5"),
        ("...5", "5"),
        ("3.", "3"),
        ("version 1.2.3", "3"),
        # exponents
        ("1e-5", "0.00001"),
        ("-2e-5", "-0.00002"),
        ("1E+3", "1000"),
        ("1.5 \\times 10^{-5}.", "0.000015"),
        ("1.5\u00d710\u207b\u2075", "0.000015"),
        ("3 \\cdot 10^4", "30000"),
        ("1/2 \\times 10", "10"),
        # letters
        ("12 cases. The answer is34", "34"),
        ("x2", None),
        ("x_1", None),
        ("7, or x2", "7"),
        ("_34_", "34"),
        ("**34**", "34"),
        ("#### 34", "34"),
        ("= 34.", "34"),
        ("the 3rd", "3"),
        ("50%", "50"),
        ("1/2", "2"),
        ("no idea", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "respelt"),
    [
        ("5 \u2212 3", "5 - 3"),
        ("pages 5\u20133", "pages 5\u20133"),
        ("x = - 3", "x = -3"),
        ("-\\$5", "\\$-5"),
        ("a\u00a0b", "a b"),
        ("1\\,234 and 1{,}234", "1234 and 1234"),
        ("x_1, 5 - 3", "x_1, 5 - 3"),
        ("(1,234)", "(1,234)"),
    ],
)
def test_only_numbers_are_respelt(text: str, respelt: str) -> None:
    assert respell_numbers(text) == respelt


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("1e-05", "0.00001"),
        ("1.50e3", "1500"),
        (".5e1", "5"),
        ("1E22", "10000000000000000000000"),
        ("e-5", "e-5"),
        ("2e", "2e"),
        ("2e - 5", "2e - 5"),
        ("1e5x", "1e5x"),
        ("a1e5", "a1e5"),
        ("1e999999999", "1e999999999"),  # nobody's answer, and a gigabyte of zeros
    ],
)
def test_exponents_are_written_out(text: str, plain: str) -> None:
    assert expand_scientific(text) == plain


@pytest.mark.parametrize(
    ("number", "plain"),
    [
        (1e-05, "0.00001"),
        (1e22, "10000000000000000000000"),
        (-0.0, "0.0"),
        (0.1, "0.1"),
        (Decimal("0.12345678901234567890"), "0.12345678901234567890"),
        (Decimal("1E+3"), "1000"),
    ],
)
def test_a_number_has_no_exponent_and_all_its_digits(number: Decimal | float, plain: str) -> None:
    assert plain_decimal(number) == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece", ["1", ",", "1,", ",111", " 111", "1e", "1.", "-", "- ", "\\,", "1 x 10", "(", "\u22121"]
)
def test_a_megabyte_takes_one_pass(piece: str) -> None:
    """In quadratic time each of these would take hours, far beyond the suite's time limit."""
    assert last_number(piece * (1_000_000 // len(piece)) + " and 7") == "7"
