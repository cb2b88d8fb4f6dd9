"""One task as it is written in a config file. Building it is ``build.py``'s business."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class TaskConfig:
    """Prompts and how their responses are graded.

    Attributes:
        name: part of problem ids and metric names.
        kind: reasoning_gym | jsonl | custom.
        dataset: reasoning_gym: the library's name of the dataset. None: the same as name.
        parameters: of the generator, or of the custom factory.
        path: jsonl: the file; custom: package.module:factory.
        size: number of problems. None: 1000 generated ones, or every line of the file.
        seed: of the generator.
        weight: share of the training prompts, relative to the other tasks' weights.
        reward: package.module:function that grades instead of the task's verifier.
        graded_part: all | after_thinking: only what follows the last ``</think>`` of a response is graded, whatever the
            kind and the reward; a response without it has not ended its thoughts and earns 0.
        answer_extraction: none | last_line | last_number | boxed | tag.
        prompt_template: ``{question}`` is replaced by the question.
        system_prompt: needs a tokenizer with a chat template.
    """

    name: str = MISSING
    kind: str = "reasoning_gym"
    dataset: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    size: int | None = None
    seed: int = 0
    weight: float = 1.0
    reward: str | None = None
    graded_part: str = "all"
    answer_extraction: str = "none"
    prompt_template: str = "{question}"
    system_prompt: str | None = None
