"""``megatron-dppo data check`` names every bad row and not only the first, and what training will pass over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_dppo.cli import main


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    def write(name: str, rows: list[Any]) -> str:
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    train = write(
        "train.jsonl",
        [{"problem": f"{n} + 1?", "answer": n + 1} for n in (1, 2, 2, 3)]
        + [{"problem": " ", "answer": 1}, "{", {"problem": "x"}, {"problem": "x" * 600, "answer": 1}],
    )
    evaluation = write("eval.jsonl", [{"problem": "3  + 1?", "answer": 4}])
    path = tmp_path / "run.yaml"
    path.write_text(
        f"tasks:\n  train: [{{name: sums, kind: jsonl, path: {train}, prompt_template: 'Add: {{question}}'}}]\n"
        f"  eval: [{{name: held_out, kind: jsonl, path: {evaluation}}}]\n"
    )
    return path


def check(recipe: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["data", "check", "--recipe", str(recipe), *arguments])
    said = capsys.readouterr()
    assert not said.err
    return code, said.out


def test_every_bad_row_is_named_and_counted(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(recipe, capsys=capsys)
    assert code == 1
    for line, reason in ((5, "the question is empty"), (6, "not valid JSON"), (7, "solution; the fields are problem")):
        assert any(f"train.jsonl, line {line}: " in out and reason in out for out in said.splitlines())
    assert "5 problems; 1 questions were there before" in said
    assert "1 questions are evaluated on; training passes over them" in said
    assert "the prompt of sums/0; its answer is '2':\n    Add: 1 + 1?" in said
    assert "no tokenizer is at hand" in said
    assert said.endswith("3 problems found\n")


def test_so_many_lines_are_printed_and_all_are_counted(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(recipe, "--lines", "1", "--samples", "0", "--no-tokenizer", capsys=capsys)
    assert code == 1
    assert said.count("  bad: ") == 1
    assert "... and 2 more\n3 problems found" in said
    assert "the prompt of" not in said


def test_prompts_are_counted_in_tokens_where_a_tokenizer_is_at_hand(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {word: index for index, word in enumerate(["?", "+", "1", "2", "3", "x", "Add", ":", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # one token per character
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "model")
    bad = recipe.parent / "good.jsonl"
    bad.write_text("".join(json.dumps({"problem": text, "answer": 1}) + "\n" for text in ("1+1?", "x" * 600)))
    settings = [f"model.path={tmp_path / 'model'}", f"tasks.train[0].path={bad}"]
    code, said = check(recipe, *settings, capsys=capsys)
    assert code == 0
    assert "prompts of 9 to 605 tokens, half of them up to 9; 1 have more than rollout.max_prompt_tokens = 512" in said
    assert said.endswith("nothing bad was found\n")
    code, said = check(recipe, *settings, "rollout.max_prompt_tokens=3", capsys=capsys)
    assert code == 1
    assert "bad: task sums: every prompt is too long" in said


def test_tasks_that_cannot_be_built_are_named_with_the_others(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["tasks.eval[0].path=absent.jsonl", "tasks.train[0].dataset=chain_sum"]
    code, said = check(recipe, *settings, capsys=capsys)
    assert code == 1
    assert "bad: task held_out: cannot read absent.jsonl: No such file" in said
    assert "bad: task sums: kind jsonl has no use for dataset" in said


def test_a_configuration_that_cannot_work_is_one_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "--recipe", str(recipe), "tasks.trian=[]"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
