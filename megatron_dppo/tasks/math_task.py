"""The reward of problems from files that have no reward of their own: math-verify, by value."""

from __future__ import annotations

from megatron_dppo.tasks.answer_extraction import check_answer_extraction, extract_answer
from megatron_dppo.tasks.math_scoring import score_math
from megatron_dppo.tasks.task import Problem, Problems


class MathTask:
    """Problems with a reference answer, graded by value with math-verify.

    Args:
        problems: with answers.
        answer_extraction: see ``answer_extraction.extract_answer``; with ``none`` math-verify finds the answer itself.
    """

    def __init__(self, problems: Problems, answer_extraction: str = "none") -> None:
        check_answer_extraction(answer_extraction)
        self.name = problems.name
        self._problems = problems
        self._answer_extraction = answer_extraction

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]

    def score(self, problem: Problem, response: str) -> float:
        """1.0 if the answer equals the reference, else 0.0. Raises ValueError on an unreadable reference."""
        if problem.answer is None:
            raise ValueError("the problem has no reference answer")
        answer = extract_answer(response, self._answer_extraction)
        if not answer:
            return 0.0
        # A box says that its content is the answer as a whole; without it that would be guessed.
        return score_math(problem.answer, f"\\boxed{{{answer}}}" if self._answer_extraction == "boxed" else answer)
