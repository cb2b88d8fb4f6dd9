"""Tasks as they are written in a config file. Building them is ``build.py``'s business."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class FieldsConfig:
    """Where a row of a file has what. Dotted paths lead into structs and lists: ``reward_model.ground_truth``, ``labels.0``.

    Attributes:
        question: a text, or a chat of one user message with or without a system message before it. None: the first that is
            there of question, prompt, problem, messages, input.
        answer: None: the first that is there of reward_model.ground_truth, ground_truth, final_answer, expected_answer,
            answer, label, solution.
        system_prompt: replaces the task's where a row has it.
        metadata: fields that the reward is given besides, each under the last name of its path. None: all that are no
            question. Columns of parquet files and dataset folders that nothing names are not read.
    """

    question: str | None = None
    answer: str | None = None
    system_prompt: str = "system_prompt"
    metadata: list[str] | None = None


@dataclass
class TaskConfig:
    """Prompts and how their responses are graded.

    Attributes:
        name: part of problem ids and metric names.
        kind: reasoning_gym | jsonl | parquet | dataset (a folder that Hugging Face's datasets wrote with save_to_disk) |
            custom.
        dataset: reasoning_gym: the library's name of the dataset. None: the same as name.
        parameters: of the generator, or of the custom factory.
        path: of the file or folder, or a pattern such as ``data/*.parquet``; custom: package.module:factory.
        paths: several of them, one after the other, instead of path.
        fields: where the rows of files have what.
        size: number of problems. None: 1000 generated ones, or every row of the files.
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
    paths: list[str] = field(default_factory=list)
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    size: int | None = None
    seed: int = 0
    weight: float = 1.0
    reward: str | None = None
    graded_part: str = "all"
    answer_extraction: str = "none"
    prompt_template: str = "{question}"
    system_prompt: str | None = None
