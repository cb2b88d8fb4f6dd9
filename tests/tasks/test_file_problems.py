"""Files with the fields of common data sets; a bad row is named by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.build import build_file_problems, build_task
from megatron_dppo.tasks.config import FieldsConfig, TaskConfig
from megatron_dppo.tasks.file_problems import FileProblems
from megatron_dppo.tasks.task import Task

GSM8K = {"question": "How many?", "answer": "6 times 7 is <<6*7=42>>42\n#### 42"}
DAPO = {
    "prompt": [{"role": "system", "content": "Box it."}, {"role": "user", "content": "What is 1/2?"}],
    "reward_model": {"ground_truth": "\\frac{1}{2}", "style": "rule"},
    "data_source": "math",
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def math_task(path: Path, **settings: Any) -> Task:
    return build_task(TaskConfig(name="math", kind="jsonl", path=str(path), **settings))


def problems_of(path: Path, **settings: Any) -> FileProblems:
    return build_file_problems(TaskConfig(name="math", kind="jsonl", path=str(path), **settings))


def test_both_field_styles_are_read_and_graded_by_value(tmp_path: Path) -> None:
    task = math_task(write(tmp_path / "p.jsonl", GSM8K, "", DAPO, {"prompt": "2?", "solution": 2}))
    gsm8k, dapo, plain = task
    assert (gsm8k.problem_id, gsm8k.question, gsm8k.answer) == ("math/0", "How many?", "42")
    assert task.score(gsm8k, "It is 42.") == 1.0
    assert task.score(gsm8k, "It is 43.") == 0.0
    assert (dapo.question, dapo.answer) == ("What is 1/2?", "\\frac{1}{2}")
    assert dapo.metadata["system_prompt"] == "Box it."
    assert dapo.metadata["data_source"] == "math"
    assert task.score(dapo, "\\boxed{0.5}") == 1.0
    assert (plain.problem_id, plain.answer) == ("math/2", "2")


@pytest.mark.parametrize(
    ("spelling", "answer"),
    [
        ("0.00001", "0.00001"),
        ("1e-05", "0.00001"),
        ("1e22", "10000000000000000000000"),
        ("1E+3", "1000"),
        ("-0.0", "0.0"),
        ("2.50", "2.50"),
        ("0.12345678901234567890", "0.12345678901234567890"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ('"1e-05"', "1e-05"),
    ],
)
def test_a_numbers_value_is_kept_and_graded(tmp_path: Path, spelling: str, answer: str) -> None:
    task = math_task(write(tmp_path / "p.jsonl", f'{{"question": "?", "answer": {spelling}, "weight": 0.5}}'))
    assert task[0].answer == answer
    assert task[0].metadata["weight"] == 0.5
    assert isinstance(task[0].metadata["weight"], float)  # only the answer is read digit by digit
    assert task.score(task[0], f"\\boxed{{{answer}}}") == 1.0
    assert task.score(task[0], "\\boxed{e-5}") == 0.0


@pytest.mark.parametrize("extraction", ["boxed", "tag", "last_line"])
def test_an_extracted_answer_is_read_as_a_whole(tmp_path: Path, extraction: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "?", "answer": "3\\sqrt{2}"}, {"prompt": "?", "answer": "east"})
    roots, east = math_task(path, answer_extraction=extraction)
    wrap = {"boxed": "\\boxed{%s}", "tag": "<answer>%s</answer>", "last_line": "Hm.\n%s"}[extraction]
    task = math_task(path, answer_extraction=extraction)
    assert task.score(roots, wrap % "3\\sqrt2") == 1.0
    assert task.score(roots, wrap % "3") == 0.0
    assert task.score(east, wrap % "East") == 1.0
    assert task.score(east, wrap % "seat") == 0.0


@pytest.mark.parametrize(
    ("row", "question", "answer", "system_prompt"),
    [
        ({"question": None, "prompt": "2?", "answer": 2}, "2?", "2", None),
        ({"question": "2?", "prompt": None, "answer": 2}, "2?", "2", None),
        ({"question": "2?", "answer": None, "solution": 2}, "2?", "2", None),
        ({"question": "2?", "reward_model": None, "answer": 2}, "2?", "2", None),
        ({"question": "2?", "reward_model": {"ground_truth": None}, "answer": 2}, "2?", "2", None),
        ({"question": "2?", "answer": 2, "system_prompt": None}, "2?", "2", None),
        ({"question": "2?", "answer": 2, "system_prompt": "Box it."}, "2?", "2", "Box it."),
        ({**DAPO, "system_prompt": None}, "What is 1/2?", "\\frac{1}{2}", "Box it."),
        (
            {"prompt": [{"role": "system", "content": None}, {"role": "user", "content": "2?"}], "answer": 2},
            "2?",
            "2",
            None,
        ),
    ],
)
def test_null_is_absent(
    tmp_path: Path, row: dict[str, Any], question: str, answer: str, system_prompt: str | None
) -> None:
    (problem,) = math_task(write(tmp_path / "p.jsonl", row))
    assert (problem.question, problem.answer) == (question, answer)
    assert problem.metadata.get("system_prompt", "the task's") == (system_prompt or "the task's")


def test_repeated_ids_and_questions_are_fine(tmp_path: Path) -> None:
    row = {**GSM8K, "id": 7}
    task = math_task(write(tmp_path / "p.jsonl", row, row))
    assert [problem.problem_id for problem in task] == ["math/0", "math/1"]


def test_size_takes_the_first_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GSM8K, DAPO, "never read")
    assert len(math_task(path, size=2)) == 2
    with pytest.raises(TaskError, match="holds 1 problems, fewer than size=2"):
        math_task(write(tmp_path / "q.jsonl", GSM8K), size=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a"', "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        (
            '{"text": "a", "answer": "1"}',
            "no question, prompt, problem, messages or input; the fields are text, answer",
        ),
        ('{"question": "a", "id": 1}', "answer, label or solution; the fields are question, id"),
        ('{"question": " ", "answer": "1"}', "the question is empty"),
        ('{"question": "a", "answer": "#### "}', "the answer is empty"),
        ('{"question": "a", "answer": [1]}', "the answer is a list"),
        ('{"prompt": ["a"], "answer": "1"}', "list of objects with role and content"),
        ('{"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}', "has the roles assistant"),
        ('{"prompt": [], "answer": "1"}', "has the roles none"),
        ('{"prompt": [{"role": "user", "content": null}], "answer": "1"}', "the question is empty or not a text"),
        ('{"question": null, "prompt": null, "answer": "1"}', "no question, prompt, problem, messages or input"),
        ('{"question": "a", "answer": null, "solution": null}', "answer, label or solution"),
        ('{"question": "a", "answer": "1", "system_prompt": 5}', "the system prompt is a int; expected a text"),
        (
            '{"prompt": [{"role": "system", "content": []}, {"role": "user", "content": "a"}], "answer": "1"}',
            "the system prompt is a list; expected a text",
        ),
        ('{"question": "a", "answer": "2 \\ud835"}', "answer holds half a character (the lone surrogate '\\ud835')"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "p.jsonl", GSM8K, line)
    with pytest.raises(TaskError, match=r"p\.jsonl, line 2: ") as error:
        math_task(path)
    assert message in str(error.value)


def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(json.dumps(GSM8K).encode() + b"\n" + b'{"question": "\xff"}\n')
    with pytest.raises(TaskError, match="line 2: not valid JSON"):
        math_task(path)


def test_an_empty_or_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"p\.jsonl holds no problems"):
        math_task(write(tmp_path / "p.jsonl", "", ""))
    with pytest.raises(TaskError, match=r"cannot read .*missing\.jsonl: No such file"):
        math_task(tmp_path / "missing.jsonl")


def test_without_a_reference_a_custom_reward_can_still_use_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "Write a poem."})
    assert problems_of(path, reward="any.module:function")[0].answer is None


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        (
            {"problem": "2?", "solution": "It is 2.", "answer": "2", "subject": "Algebra", "level": 5},
            "2?",
            "2",
        ),  # MATH-500
        ({"question": "2?", "final_answer": "2", "r1_solution_1": "..."}, "2?", "2"),  # DeepMath
        ({"problem": "2?", "expected_answer": "2", "generated_solution": "..."}, "2?", "2"),  # OpenMathInstruct-2
        ({"problem": "2?", "answer": "2", "source": "math", "llama8b_solve_rate": 0.5}, "2?", "2"),  # Big-Math
        (
            {"messages": [{"role": "user", "content": "2?"}], "ground_truth": ["2"], "dataset": ["math"]},
            "2?",
            "2",
        ),  # RLVR
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "2?"}]}], "label": "2"}, "2?", "2"),  # slime
        ({"input": "2?", "label": 2, "metadata": {"source": "x"}}, "2?", "2"),
    ],
)
def test_common_data_sets_need_no_mapping(tmp_path: Path, row: dict[str, Any], question: str, answer: str) -> None:
    (problem,) = problems_of(write(tmp_path / "p.jsonl", row))
    assert (problem.question, problem.answer) == (question, answer)


def test_fields_are_named_by_dotted_paths(tmp_path: Path) -> None:
    row = {
        "q": {"text": "2?"},
        "labels": ["no", 2.50],
        "extra": {"id": 7, "none": None},
        "sys.prompt": "Box it.",
        "big": 1,
    }
    fields = FieldsConfig("q.text", "labels.1", "sys.prompt", ["extra.id", "extra.none", "absent"])
    (problem,) = problems_of(write(tmp_path / "p.jsonl", row), fields=fields)
    assert (problem.question, problem.answer) == ("2?", "2.5")
    assert problem.metadata == {"id": 7, "system_prompt": "Box it."}
    with pytest.raises(TaskError, match=r"line 1: no labels\.2; the fields are q, labels"):
        problems_of(tmp_path / "p.jsonl", fields=FieldsConfig("q.text", "labels.2"))
    with pytest.raises(TaskError, match=r"no question\.text; the fields"):
        problems_of(tmp_path / "p.jsonl", fields=FieldsConfig("question.text"))
    with pytest.raises(TaskError, match="two fields that end in id"):
        problems_of(
            tmp_path / "p.jsonl", fields=FieldsConfig("q.text", "labels.1", metadata=["extra.id", "big.id", "extra.id"])
        )


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GSM8K, DAPO)
    task = problems_of(path)
    write(path, DAPO, GSM8K, GSM8K)
    with pytest.raises(TaskError, match=r"p\.jsonl has changed since this run began to read it"):
        task[0]
