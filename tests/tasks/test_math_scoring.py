"""Answers are compared by value."""

from __future__ import annotations

import threading

import pytest

from megatron_dppo.tasks.math_scoring import score_math


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("42", "The answer is 42.", 1.0),
        ("42", "42 or rather 43", 0.0),
        ("42", "", 0.0),
        ("1/2", "0.5", 1.0),
        ("\\frac{1}{2}", "so $\\boxed{0.5}$", 1.0),
        ("3\\sqrt{2}", "thus $3\\sqrt2$", 1.0),
        ("1,234", "1234", 1.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("7", "I first had 7, but it is \\boxed{8}", 0.0),
    ],
)
def test_equal_values_are_equal_answers(answer: str, response: str, reward: float) -> None:
    assert score_math(answer, response) == reward


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("0.00001", r"\boxed{0.00001}", 1.0),
        ("0.00001", r"\boxed{1e-5}", 1.0),
        ("0.00001", "It is 1e-05.", 1.0),
        ("0.00001", r"\boxed{10^{-5}}", 1.0),
        ("0.00001", r"\boxed{e-5}", 0.0),
        ("1e-05", r"\boxed{0.00001}", 1.0),
        ("1e-05", r"\boxed{e-5}", 0.0),
        ("0.000015", r"thus $1.5 \times 10^{-5}$", 1.0),
        ("1E+3", r"\boxed{1000}", 1.0),
        ("1" + "0" * 22, r"\boxed{1e22}", 1.0),
        ("1_000", r"\boxed{1000}", 1.0),
        ("12345678901234567890123", r"\boxed{12345678901234567890123}", 1.0),
        ("12345678901234567890123", r"\boxed{12345678901234567890124}", 0.0),
        ("-0.0", r"\boxed{0}", 1.0),
        # Euler's number
        ("e-5", r"\boxed{-5+e}", 1.0),
        ("2e-5", r"\boxed{2e - 5}", 1.0),
        ("2e-5", r"\boxed{0.00002}", 1.0),
        ("2e", r"\boxed{2e}", 1.0),
        # small numbers are not 0
        ("0.0000001", r"\boxed{0}", 0.0),
        ("0.0000001", r"\boxed{0.0000004}", 0.0),
        ("0", r"\boxed{0.0000001}", 0.0),
        ("0", r"\boxed{0.00}", 1.0),
        ("\\frac{1}{3}", r"\boxed{0.333333}", 1.0),
        ("\\frac{1}{3}", r"\boxed{0.33}", 0.0),
        # signs and separators
        ("-3", "The answer is \u22123", 1.0),
        ("3", "The answer is \u22123", 0.0),
        ("-3", "The answer is -$3$", 1.0),
        ("34", "\uff13\uff14", 1.0),
        ("1000", r"\boxed{1 000}", 1.0),
        ("1000", r"\boxed{1\,000}", 1.0),
        ("0.5", r"\boxed{.5}", 1.0),
        ("50\\%", r"\boxed{50\%}", 1.0),
        ("50%", r"\boxed{0.5}", 1.0),
        ("50", "The answer is 50%", 1.0),
    ],
)
def test_a_number_is_its_value_however_it_is_written(answer: str, response: str, reward: float) -> None:
    assert score_math(answer, response) == reward


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        (r"\$12.50", r"\boxed{12.50}", 1.0),
        (r"\$12.50", r"\boxed{\$12.50}", 1.0),
        (r"\$12.50", "It costs $12.50.", 1.0),
        (r"\$12.50", "It costs $12.", 0.0),
        ("$12.50", r"\boxed{12.5}", 1.0),
        ("12.50$", r"\boxed{12.5}", 1.0),
        ("US$ 5", r"\boxed{5}", 1.0),
        ("5", "It costs US$ 5", 1.0),
        ("6", "between $5 and $6", 1.0),
        ("5", "between $5 and $6", 0.0),
        ("12.5", "We pay $5 + $7.50 = $12.50", 1.0),
        ("$5 and $6", r"\boxed{5, 6}", 1.0),
        ("-5", "We lose: -$5", 1.0),
        ("\u20ac5", r"\boxed{5}", 1.0),
        ("5", "\\boxed{5 \u20ac}", 1.0),
        (r"\$1,234.50", r"\boxed{1234.5}", 1.0),
        ("$5$", r"\boxed{5}", 1.0),
        (r"$\$5$", r"\boxed{5}", 1.0),
        ("$x$ and $y$", r"\boxed{x, y}", 1.0),
    ],
)
def test_dollars_are_money_or_delimiters(answer: str, response: str, reward: float) -> None:
    assert score_math(answer, response) == reward


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("There are 12 cases.\nAnswer:34", "34"),
        ("12 cases. The answer is34", "34"),
        ("12 cases. Answer: **34**", "34"),
        ("12 cases. **Answer:** 34", "34"),
        ("12 cases. Answer:**34**.", "34"),
        ("12 cases. Answer:$34$", "34"),
        ("12 cases. Answer\uff1a34", "34"),
        ("12 \u4e2a\u3002\u7b54\u6848\u662f34", "34"),
        ("12 cases\n#### 34", "34"),
        ("12 cases = 34.", "34"),
        ("12 cases.\nFinal answer:\n\n34", "34"),
        ("12 cases.\nThe final answer is\n$$\n34\n$$", "34"),
        ("Answer: 12. No.\nAnswer:34", "34"),
        ("The answer is 34. This answer is correct.", "34"),
        ("The answer is 34 because 40 - 6 = 34, not 12", "34"),
        ("The answer is 34 (not 12).", "34"),
        ("The answer is 12.\n\nNo: this answer is wrong.\n\nIt has to be 12 + 22 = 34.", "34"),
        ("12 cases.\n\n#### 1. Conclusion\n\nTherefore x = 34", "34"),
        ("12 cases. " + "Think. " * 500 + "So x = 34", "34"),
        ("The answer is 34. " + "Check. " * 500, "34"),
        (r"\boxed{34}. This answer is 22 more than 12.", "34"),
        (r"\boxed{12}, no: \boxed{34}", "34"),
        (r"\boxed{\boxed{34}}", "34"),
        (r"$\boxed{3}$ and $\boxed{4}$", "3, 4"),
        (r"It goes into \boxed{}. There are 12 cases. The answer is 34", "34"),
    ],
)
def test_the_last_answer_that_is_given_counts(response: str, answer: str) -> None:
    assert score_math(answer, response) == 1.0
    assert score_math("12", response) == 0.0


@pytest.mark.parametrize("box", [r"\boxed{???}", r"\boxed{12", r"\boxed{\frac{12}{"])
def test_a_box_that_cannot_be_read_is_the_answer_all_the_same(box: str) -> None:
    """Nor is an earlier number the answer, or the part of a number that fitted into the response."""
    assert score_math("12", f"There are 12 cases. {box}") == 0.0


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("east", r"\boxed{seat}", 0.0),
        ("east", r"\boxed{east}", 1.0),
        ("east", r"\boxed{\text{East}}", 1.0),
        ("east", "We go north first.\nEast.", 1.0),
        ("no", r"\boxed{on}", 0.0),
        ("True", r"\boxed{\text{true}}", 1.0),
        ("True", r"\boxed{False}", 0.0),
        ("no solution", r"\boxed{\text{No solution.}}", 1.0),
        ("AB", r"\boxed{BA}", 0.0),
        ("AB", r"\boxed{AB}", 1.0),
        ("A", r"\boxed{A}", 1.0),
        ("A", r"\boxed{\textbf{(A)}\ 12}", 1.0),
        ("A", r"\boxed{B}", 0.0),
        ("A", "A: no. The answer is B.", 0.0),
        ("A", "The answer is (A).", 1.0),
        ("A", "The answer is not A.", 0.0),
        ("A", "The answer is A. \\boxed{B", 0.0),
        ("yes", "The answer is yes.\nNo", 1.0),
        ("no", "The answer is yes.\nNo", 0.0),  # one answer, not both
        ("E", r"\boxed{2.718281828459045}", 0.0),
        (r"\text{east}", r"\boxed{seat}", 0.0),
        # products
        ("xy", r"\boxed{yx}", 1.0),
        ("$ab$", r"\boxed{ba}", 1.0),
        ("2xy", r"\boxed{2yx}", 1.0),
        ("pi", r"\boxed{\pi}", 1.0),
        ("pi", r"\boxed{ip}", 0.0),
        ("sin x", r"\boxed{\sin x}", 1.0),
        ("A, C", r"\boxed{C, A}", 1.0),
    ],
)
def test_words_are_compared_as_text_and_formulas_by_value(answer: str, response: str, reward: float) -> None:
    assert score_math(answer, response) == reward


@pytest.mark.parametrize(
    "response",
    [
        *(
            piece * (1_000_000 // len(piece))
            for piece in ("\\boxed{", "1", "1,", "$", "$x $", "answer is ", "(", "\n", "*")
        ),
        *("\\boxed{" + text + "}" for text in ("1" * 1_000_000, "(" * 40 + "1" + ")" * 40, "{" * 40 + "1" + "}" * 40)),
        "\\boxed{" + "\\frac{1}{1+" * 40 + "1" + "}" * 40 + "}",
        "The answer is $" + "(" * 40 + "1" + ")" * 40 + "$",
    ],
    ids=lambda response: response[:12],
)
def test_what_is_too_long_or_too_deep_is_no_answer(response: str) -> None:
    """math-verify's grammar takes exponential time in the depth, its patterns quadratic time in the length: years."""
    assert score_math("42", response) == 0.0


def test_a_number_that_the_limit_cuts_in_two_is_not_graded_in_part() -> None:
    assert score_math("1" * 1000, "1" * 1001) == 0.0
    assert score_math("34", "1234" + "." * 998) == 0.0


@pytest.mark.parametrize("answer", ["1" + "0" * 400, r"10^{400}", r"\frac{1}{0}"])
def test_a_reference_beyond_floats_is_readable(answer: str) -> None:
    assert score_math(answer, r"\boxed{1}") == 0.0


def test_it_works_off_the_main_thread() -> None:
    """The library's own time limits are signals, which raise there."""
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.append(score_math("42", "it is 42")))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def test_an_unreadable_reference_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(ValueError, match=r"reference answer 'a \$ b' is no mathematical expression"):
        score_math("a $ b", "42")
