"""Grade mathematical answers by value, not by spelling: 1/2, 0.5 and \\frac{1}{2} are the same answer (math-verify)."""

from __future__ import annotations

import functools
import logging
from typing import Any

from megatron_dppo.compat.extras import from_extra

with from_extra("tasks"):
    from math_verify import parse, verify

# With its time limits off (see below) the library warns once per call that limits are now our duty. They are: Scorer's.
for _module in ("parser", "grader"):
    logging.getLogger(f"math_verify.{_module}").setLevel(logging.ERROR)


def score_math(answer: str, response: str) -> float:
    """1.0 if the response's final answer equals the reference, else 0.0.

    The response may be a whole chain of thought; math-verify prefers its boxed answer, then its last expression. An
    answer in words is only recognised inside ``\\boxed{}`` or dollars.

    The library's time limits are switched off because they are signals, which only the main thread may set and which do
    not interrupt C code; a hanging comparison is ended by ``scoring.Scorer``, from outside.

    Raises ValueError if the reference itself is not a mathematical expression: no response could ever be right.
    """
    gold = _parse_reference(answer)
    if not gold:
        raise ValueError(f"the reference answer {answer!r} is no mathematical expression that math-verify can read")
    prediction = parse(response, parsing_timeout=None)
    return float(verify(list(gold), prediction, timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def _parse_reference(answer: str) -> tuple[Any, ...]:
    """Parsed reference; references are bare LaTeX such as ``3\\sqrt{2}``, which is only recognised inside dollars."""
    bare = "$" not in answer and "\\boxed" not in answer
    return tuple(parse(f"${answer}$" if bare else answer, parsing_timeout=None))
