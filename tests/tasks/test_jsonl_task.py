"""JSONL files with the fields of GSM8K and DAPO-Math; a bad line is named by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.jsonl_task import JsonlTask

GSM8K = {"question": "How many?", "answer": "6 times 7 is <<6*7=42>>42\n#### 42"}
DAPO = {
    "prompt": [{"role": "system", "content": "Box it."}, {"role": "user", "content": "What is 1/2?"}],
    "reward_model": {"ground_truth": "\\frac{1}{2}", "style": "rule"},
    "data_source": "math",
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_both_field_styles_are_read_and_graded_by_value(tmp_path: Path) -> None:
    task = JsonlTask("math", write(tmp_path / "p.jsonl", GSM8K, "", DAPO, {"prompt": "2?", "solution": 2}))
    gsm8k, dapo, plain = task
    assert (gsm8k.problem_id, gsm8k.question, gsm8k.answer) == ("math/0", "How many?", "42")
    assert task.score(gsm8k, "It is 42.") == 1.0
    assert task.score(gsm8k, "It is 43.") == 0.0
    assert (dapo.question, dapo.answer) == ("What is 1/2?", "\\frac{1}{2}")
    assert dapo.metadata["system_prompt"] == "Box it."
    assert dapo.metadata["data_source"] == "math"
    assert task.score(dapo, "\\boxed{0.5}") == 1.0
    assert (plain.problem_id, plain.answer) == ("math/2", "2")


def test_repeated_ids_and_questions_are_fine(tmp_path: Path) -> None:
    row = {**GSM8K, "id": 7}
    task = JsonlTask("math", write(tmp_path / "p.jsonl", row, row))
    assert [problem.problem_id for problem in task] == ["math/0", "math/1"]


def test_size_takes_the_first_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GSM8K, DAPO, "never read")
    assert len(JsonlTask("math", path, size=2)) == 2
    with pytest.raises(TaskError, match="holds 1 problems, fewer than size=2"):
        JsonlTask("math", write(tmp_path / "q.jsonl", GSM8K), size=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a"', "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"text": "a", "answer": "1"}', "no question or prompt; the fields are text, answer"),
        ('{"question": "a", "id": 1}', "no reward_model.ground_truth, answer or solution; the fields are question, id"),
        ('{"question": " ", "answer": "1"}', "the question is empty"),
        ('{"question": "a", "answer": "#### "}', "the answer is empty"),
        ('{"question": "a", "answer": [1]}', "the answer is a list"),
        ('{"prompt": ["a"], "answer": "1"}', "list of objects with role and content"),
        ('{"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}', "has the roles assistant"),
        ('{"prompt": [], "answer": "1"}', "has the roles none"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "p.jsonl", GSM8K, line)
    with pytest.raises(TaskError, match=r"p\.jsonl, line 2: ") as error:
        JsonlTask("math", path)
    assert message in str(error.value)


def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(json.dumps(GSM8K).encode() + b"\n" + b'{"question": "\xff"}\n')
    with pytest.raises(TaskError, match="line 2: not valid JSON"):
        JsonlTask("math", path)


def test_an_empty_or_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"p\.jsonl holds no problems"):
        JsonlTask("math", write(tmp_path / "p.jsonl", "", ""))
    with pytest.raises(TaskError, match=r"cannot read .*missing\.jsonl: No such file"):
        JsonlTask("math", tmp_path / "missing.jsonl")


def test_without_a_reference_a_custom_reward_can_still_use_the_file(tmp_path: Path) -> None:
    task = JsonlTask("free", write(tmp_path / "p.jsonl", {"prompt": "Write a poem."}), require_answer=False)
    assert task[0].answer is None
