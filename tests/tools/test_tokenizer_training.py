"""The tiny tokenizer: boilerplate in words, answers in characters, and nothing it cannot write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_dppo.tasks.build import build_task
from megatron_dppo.tasks.config import TaskConfig
from tools.setup.tokenizer_training import train_tokenizer

TASKS = [build_task(TaskConfig(name=name, size=200)) for name in ("chain_sum", "spell_backward")]
TOKENIZER = train_tokenizer(TASKS)


def test_boilerplate_words_are_one_token_and_answers_are_characters() -> None:
    tokens = TOKENIZER.tokenize("Spell this word backward (example: sun -> nus): ammonia")
    assert tokens[:4] == ["Spell", "Ġthis", "Ġword", "Ġbackward"]
    assert tokens[-7:] == list("ammonia")
    assert TOKENIZER.tokenize("-4321") == ["-", "4", "3", "2", "1"]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_prompts_are_several_times_shorter_than_their_characters(task) -> None:
    question = task[0].question
    assert len(TOKENIZER(question)["input_ids"]) < len(question) / 2


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text, split_special_tokens=True)["input_ids"]) == text


def test_every_token_sequence_can_be_decoded() -> None:
    assert isinstance(TOKENIZER.decode(list(range(len(TOKENIZER)))), str)


def test_the_same_tasks_give_the_same_tokenizer_and_it_survives_the_disk(tmp_path) -> None:
    again = train_tokenizer(TASKS)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (0, 1, 2)
    again.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = TASKS[0][0].question
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
