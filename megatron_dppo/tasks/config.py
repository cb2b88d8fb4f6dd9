"""One task as it is written in a config file. Building it is ``build.py``'s business."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class TaskConfig:
    """Prompts and how their responses are graded."""

    name: str = MISSING  # part of problem ids and metric names
    kind: str = "reasoning_gym"  # reasoning_gym | jsonl | custom
    dataset: str | None = None  # reasoning_gym: the library's name of the dataset; None: the same as name
    parameters: dict[str, Any] = field(default_factory=dict)  # of the generator, or of the custom factory
    path: str | None = None  # jsonl: the file; custom: package.module:factory
    size: int | None = None  # number of problems; None: 1000 generated ones, or every line of the file
    seed: int = 0  # of the generator
    weight: float = 1.0  # share of the training prompts, relative to the other tasks' weights
    reward: str | None = None  # package.module:function that grades instead of the task's verifier
    answer_extraction: str = "none"  # none | last_line | last_number | boxed | tag
    prompt_template: str = "{question}"
    system_prompt: str | None = None  # needs a tokenizer with a chat template
