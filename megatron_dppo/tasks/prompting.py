"""From a problem to the tokens that the model reads, and from sampled tokens back to text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatron_dppo.errors import PromptTooLongError, TaskError
from megatron_dppo.tasks.build import tasks_by_name
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.graded_part import END_OF_THINKING
from megatron_dppo.tasks.rows.open_rows import FILE_KINDS
from megatron_dppo.tasks.task import Problem, Task


class PromptEncoder:
    """Applies a task's prompt template, then the tokenizer's chat template if there is one.

    A problem's own system message (``metadata["system_prompt"]``, unless it is None) goes before its task's.

    A prompt is never cut: a question without its end has another answer. ``encode`` raises on one that is too long;
    ``fits`` lets the training mixture pass over it (``build_mixture(..., fits=encoder.fits)``), which counts in
    ``too_long``.

    Args:
        tokenizer: a Hugging Face tokenizer.
        configs: of all tasks whose problems are to be encoded.
        max_prompt_tokens: the longest prompt, chat template included.
        chat: use the chat template; False, or a tokenizer without one, gives plain text.

    Raises:
        TaskError: a template without ``{question}``, a system prompt without a chat template, or responses to be graded after
            a mark that decoding leaves out.
    """

    def __init__(
        self, tokenizer: Any, configs: Sequence[TaskConfig], max_prompt_tokens: int, chat: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._configs = tasks_by_name(configs)
        self._max_prompt_tokens = max_prompt_tokens
        self._chat = chat and bool(tokenizer.chat_template)
        self._too_long: set[str] = set()
        for config in self._configs.values():
            _check_template(config)
            if config.graded_part == "after_thinking" and END_OF_THINKING in tokenizer.all_special_tokens:
                raise TaskError(
                    f"task {config.name}: graded_part=after_thinking looks for {END_OF_THINKING} in decoded responses, and"
                    " this tokenizer counts it as a special token, which decoding leaves out: take the mark off that list"
                )
            if config.system_prompt is not None and not self._chat:
                raise TaskError(
                    f"task {config.name}: system_prompt needs chat: true and a tokenizer with a chat template"
                )

    @property
    def too_long(self) -> int:
        """How many different problems ``fits`` has refused so far."""
        return len(self._too_long)

    def encode(self, problem: Problem) -> tuple[int, ...]:
        """Token ids of the prompt. Raises PromptTooLongError, or TaskError for a problem of an unknown task."""
        token_ids = self._tokens(problem)
        if len(token_ids) > self._max_prompt_tokens:
            raise PromptTooLongError(
                f"the prompt of {problem.problem_id} has {len(token_ids)} tokens, more than max_prompt_tokens = "
                f"{self._max_prompt_tokens}; raise it or leave the problem out"
            )
        return token_ids

    def fits(self, problem: Problem) -> bool:
        """Whether the prompt is not too long."""
        if len(self._tokens(problem)) <= self._max_prompt_tokens:
            return True
        self._too_long.add(problem.problem_id)
        return False

    def length(self, problem: Problem) -> int:
        """How many tokens the prompt has, too long or not. Raises TaskError if the chat template refuses it."""
        return len(self._tokens(problem))

    def shown(self, problem: Problem) -> str:
        """The prompt as the model reads it, special tokens and all."""
        return str(self._tokenizer.decode(list(self._tokens(problem))))

    def decode(self, response_ids: Sequence[int]) -> str:
        """The response as text, special tokens (the stop token among them) left out."""
        return str(self._tokenizer.decode(list(response_ids), skip_special_tokens=True))

    def decode_each(self, response_ids: Sequence[int]) -> list[str]:
        """What each token adds to the text: nothing, if it is special or not the last of a character's. The pieces make up
        ``decode``.

        Decoded are the tokens since the piece before the last, as some tokenizers write a token otherwise at the start.
        """
        texts: list[str] = []
        start = done = 0  # the last piece is made of the tokens in between
        for end in range(1, len(response_ids) + 1):
            before, now = self.decode(response_ids[start:done]), self.decode(response_ids[start:end])
            is_whole = len(now) > len(before) and not now.endswith("\N{REPLACEMENT CHARACTER}")
            if is_whole or end == len(response_ids):
                texts.append(now[len(before) :])
                start, done = done, end
            else:
                texts.append("")
        return texts

    def check_system_prompts(self, tasks: Iterable[Task]) -> None:
        """Raise TaskError if the rows of a file have system messages of their own, and the chat template takes none.

        One such row in a hundred thousand would end the run when it is drawn, so the first one is encoded before. (Problems
        that are made on the spot have none, and to make all of them would take its time.)
        """
        for task in tasks:
            if self._configs[task.name].kind in FILE_KINDS:
                own = (task[index] for index in range(len(task)))
                first = next((problem for problem in own if problem.metadata.get("system_prompt") is not None), None)
                if first is not None:
                    self._tokens(first)

    def _tokens(self, problem: Problem) -> tuple[int, ...]:
        config = self._configs.get(problem.task_name)
        if config is None:
            raise TaskError(f"{problem.problem_id} is from no task of this run ({', '.join(self._configs)})")
        text = config.prompt_template.replace("{question}", problem.question)
        try:
            if not self._chat:
                return tuple(self._tokenizer(_without_chat(problem, text))["input_ids"])
            prompt = self._tokenizer.apply_chat_template(
                _messages(problem, text, config.system_prompt), add_generation_prompt=True, tokenize=False
            )
            # The template writes every special token itself; the tokenizer must not add a second BOS.
            return tuple(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])
        except TaskError:
            raise
        except Exception as error:  # templates are programs of other people, and raise what they like
            raise TaskError(
                f"{problem.problem_id}: the tokenizer or its chat template refuses this prompt"
                f" ({type(error).__name__}: {' '.join(str(error).split())})"
            ) from error


def _without_chat(problem: Problem, text: str) -> str:
    if problem.metadata.get("system_prompt") is not None:
        raise TaskError(
            f"{problem.problem_id}: its system message needs chat: true and a tokenizer with a chat template; without, take"
            " it out of the row"
        )
    return text


def _messages(problem: Problem, text: str, system_prompt: str | None) -> list[dict[str, str]]:
    """The chat of a problem; its own system message, if it has one, goes before its task's."""
    own = problem.metadata.get("system_prompt")
    system = system_prompt if own is None else own
    user = [{"role": "user", "content": text}]
    return user if system is None else [{"role": "system", "content": system}, *user]


def _check_template(config: TaskConfig) -> None:
    """The question is put in by replacement, not by formatting, so other braces (LaTeX, JSON) are fine."""
    if config.prompt_template.count("{question}") != 1:
        raise TaskError(
            f"task {config.name}: prompt_template must contain {{question}} once, not {config.prompt_template!r}"
        )
