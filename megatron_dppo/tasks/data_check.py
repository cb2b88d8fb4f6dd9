"""Reads everything of every task before a run does, and says all that is wrong with it, not only the first thing.

Training passes over prompts that are too long and questions that are held out; these are counted. What would end a run, or
what no run can use, is bad: a row that cannot be read, a prompt that the chat template refuses, a task without any problem.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.build import build_file_problems, build_task, check_task
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.held_out import question_key
from megatron_dppo.tasks.prompting import PromptEncoder
from megatron_dppo.tasks.rows.open_rows import FILE_KINDS
from megatron_dppo.tasks.task import Problem
from megatron_dppo.tasks.valid_text import check_problem_text

_LONGEST_SAMPLE = 2000


@dataclass
class DataCheck:
    """What is said of the tasks, and how.

    Attributes:
        encoder: counts tokens; None: no tokenizer is at hand.
        max_prompt_tokens: longer prompts are not trained on.
        samples: prompts shown per task.
        most_lines: bad rows that are named, over all tasks; all are counted.
        say: takes a line.
        bad: how many problems were found so far.
    """

    encoder: PromptEncoder | None
    max_prompt_tokens: int
    samples: int
    most_lines: int
    say: Callable[[str], None]
    bad: int = 0
    _evaluated: set[bytes] = field(default_factory=set)

    def check(self, train: Sequence[TaskConfig], evaluation: Sequence[TaskConfig]) -> bool:
        """Whether nothing is bad."""
        for config in evaluation:
            self._check_task("eval", config, self._evaluated)
        seen: set[bytes] = set()
        for config in train:
            self._check_task("train", config, seen)
        if self.bad > self.most_lines:
            self.say(f"... and {self.bad - self.most_lines} more")
        self.say(f"{self.bad} problems found" if self.bad else "nothing bad was found")
        return self.bad == 0

    def _check_task(self, use: str, config: TaskConfig, seen: set[bytes]) -> None:
        good, repeated, held_out = 0, 0, 0
        lengths = array("I")
        samples: list[Problem] = []
        self.say(f"{use} task {config.name} ({config.kind})")
        for problem in _every_problem(config):
            tokens = self._tokens(problem)
            if isinstance(problem, TaskError) or isinstance(tokens, TaskError):
                self._count_bad(str(problem if isinstance(problem, TaskError) else tokens))
                continue
            good += 1
            if tokens is not None:
                lengths.append(tokens)
            key = hashlib.blake2b(question_key(problem.question).encode(), digest_size=12).digest()
            repeated += key in seen
            held_out += use == "train" and key in self._evaluated
            seen.add(key)
            if len(samples) < self.samples:
                samples.append(problem)
        if not good:
            self._count_bad(f"task {config.name} has no problem that can be used")
        self.say(f"  {good} problems; {repeated} questions were there before")
        if held_out:
            self.say(f"  {held_out} questions are evaluated on; training passes over them")
        if lengths:
            self._say_lengths(config, lengths)
        for problem in samples:
            self.say(f"  the prompt of {problem.problem_id}; its answer is {problem.answer!r}:")
            self.say("    " + self._shown(problem, config).replace("\n", "\n    "))

    def _tokens(self, problem: Problem | TaskError) -> int | TaskError | None:
        if self.encoder is None or isinstance(problem, TaskError):
            return None
        try:
            return self.encoder.length(problem)
        except TaskError as error:
            return error

    def _say_lengths(self, config: TaskConfig, lengths: array[int]) -> None:
        ordered = sorted(lengths)
        too_long = sum(length > self.max_prompt_tokens for length in lengths)
        self.say(
            f"  prompts of {ordered[0]} to {ordered[-1]} tokens, half of them up to {ordered[(len(ordered) - 1) // 2]};"
            f" {too_long} have more than rollout.max_prompt_tokens = {self.max_prompt_tokens} and are left out"
        )
        if too_long == len(ordered):
            self._count_bad(f"task {config.name}: every prompt is too long")

    def _shown(self, problem: Problem, config: TaskConfig) -> str:
        if self.encoder is not None:
            text = self.encoder.shown(problem)
        else:
            text = config.prompt_template.replace("{question}", problem.question)
        return text if len(text) <= _LONGEST_SAMPLE else f"{text[:_LONGEST_SAMPLE]} ..."

    def _count_bad(self, what: str) -> None:
        self.bad += 1
        if self.bad <= self.most_lines:
            self.say(f"  bad: {what}")


def _every_problem(config: TaskConfig) -> Iterator[Problem | TaskError]:
    """Every problem of a task, or what is wrong where one should be."""
    try:
        check_task(config)
        if config.kind in FILE_KINDS:
            yield from build_file_problems(config, checked=False).each()
            return
        task = build_task(config)
    except TaskError as error:
        yield error
        return
    for index in range(len(task)):
        try:
            yield check_problem_text(task[index])
        except Exception as error:  # generators are programs of other people
            yield TaskError(f"{config.name}/{index}: {type(error).__name__}: {error}")
