"""Tasks as they are written in a config file. Building them is ``build.py``'s business."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

# Between two tries of a request.
LONGEST_WAIT_S = 1.0


@dataclass
class FieldsConfig:
    """Where a row of a file has what. Dotted paths lead into structs and lists: ``reward_model.ground_truth``, ``labels.0``.

    Attributes:
        question: a text, or a chat of one user message with or without a system message before it. None: the first that is
            there of question, prompt, problem, messages, input.
        answer: None: the first that is there of reward_model.ground_truth, ground_truth, final_answer, expected_answer,
            answer, label, solution. For ``code_reward`` the tests: reward_model.ground_truth, ground_truth, input_output,
            test_cases, public_test_cases, test_list, tests, test, label.
        system_prompt: replaces the task's where a row has it.
        metadata: fields that the reward is given besides, each under the last name of its path. None: all that are no
            question. Columns of parquet files and dataset folders that nothing names are not read.
    """

    question: str | None = None
    answer: str | None = None
    system_prompt: str = "system_prompt"
    metadata: list[str] | None = None


@dataclass
class HttpRewardConfig:
    """A service that grades: what it is sent and where the reward stands in its answer.

    Attributes:
        url: asked with POST and JSON.
        api_key_env: the environment variable that holds a key, which is sent as ``Authorization: Bearer``. None: no key.
        request: per response, what is sent under which name: question | response | answer | system_prompt | metadata |
            metadata.<field>. Empty: question, response and answer, under these names.
        constants: sent with every request, e.g. the name of a model.
        batch: none: one object per request | items: a list of objects | columns: one list per name of ``request``.
        batch_size: responses per request, at most 32; 1 with none.
        items: items: the name under which the list is sent. None: the list is all that is sent.
        rewards: items, columns: dotted path of the list of rewards in the answer; empty: the answer itself.
        reward: dotted path of the number in the answer, or in each element of ``rewards``; empty: the number itself.
        scale: linear: from ``lowest`` to ``highest`` becomes 0 to 1, anything outside is a failure | sigmoid.
        lowest: of linear: becomes 0.
        highest: of linear: becomes 1.
        timeout_s: of one try.
        tries: of a request that is not answered, or with 408, 425, 429 or 5xx.
        concurrency: requests at a time, per scoring worker.
    """

    url: str = MISSING
    api_key_env: str | None = None
    request: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    batch: str = "none"
    batch_size: int = 1
    items: str | None = None
    rewards: str = "rewards"
    reward: str = "reward"
    scale: str = "linear"
    lowest: float = 0.0
    highest: float = 1.0
    timeout_s: float = 4.0
    tries: int = 2
    concurrency: int = 8

    @property
    def sent(self) -> dict[str, str]:
        """``request``, or what stands for an empty one. (A default of a mapping would stay beside what a file maps.)"""
        return self.request or {name: name for name in ("question", "response", "answer")}

    @property
    def longest_s(self) -> float:
        """How long one request may take, with all its tries and the waits between them."""
        return self.tries * self.timeout_s + (self.tries - 1) * LONGEST_WAIT_S


@dataclass
class CodeRewardConfig:
    """Programs are run against tests (docs/grading.md), which are the problem's answer.

    Attributes:
        isolation: namespaces: no network, no files, no processes but the program's own; refused where the system does not
            allow it | process: limits only.
        timeout_s: for all tests of a response.
        test_timeout_s: for each.
        memory_mb: of each process of a program, in MiB.
        folder_mb: of the files that a program writes, in MiB.
        max_tests: only the first so many; 0: all.
        partial_credit: the reward is the share of tests that pass. False: 1 if all do, else 0.
    """

    isolation: str = "namespaces"
    timeout_s: float = 8.0
    test_timeout_s: float = 4.0
    memory_mb: int = 1024
    folder_mb: int = 64
    max_tests: int = 0
    partial_credit: bool = False


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
        http_reward: a service that grades instead.
        code_reward: tests that the program in a response has to pass, instead.
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
    http_reward: HttpRewardConfig | None = None
    code_reward: CodeRewardConfig | None = None
    graded_part: str = "all"
    answer_extraction: str = "none"
    prompt_template: str = "{question}"
    system_prompt: str | None = None
