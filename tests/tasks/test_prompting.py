"""Problems become prompts the way the task's config says; a prompt is never cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_dppo.errors import PromptTooLongError, TaskError
from megatron_dppo.tasks.build import build_mixture, build_task
from megatron_dppo.tasks.config import TaskConfig
from megatron_dppo.tasks.prompting import PromptEncoder
from megatron_dppo.tasks.task import Problem
from tools.setup.tokenizer_training import train_tokenizer

SUMS = TaskConfig(name="chain_sum", size=50)
CHAT_TEMPLATE = (
    "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([build_task(SUMS)])


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer([build_task(SUMS)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_plain_text_without_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    config = TaskConfig(name="chain_sum", prompt_template="Q: {question} {json} A:")
    token_ids = PromptEncoder(tokenizer, [config], max_prompt_tokens=100).encode(Problem("chain_sum/0", "1 + 2 ="))
    assert tokenizer.decode(token_ids) == "Q: 1 + 2 = {json} A:"


def test_the_chat_template_is_applied_once(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    config = TaskConfig(name="chain_sum", system_prompt="Be brief.")
    encoder = PromptEncoder(chat_tokenizer, [config], max_prompt_tokens=100)
    expected = "<bos>system: Be brief.<eos><bos>user: 1 + 2 =<eos><bos>assistant: "
    assert chat_tokenizer.decode(encoder.encode(Problem("chain_sum/0", "1 + 2 ="))) == expected
    plain = PromptEncoder(chat_tokenizer, [SUMS], max_prompt_tokens=100, chat=False)
    assert chat_tokenizer.decode(plain.encode(Problem("chain_sum/0", "1 + 2 ="))) == "1 + 2 ="


def test_a_problems_own_system_prompt_wins(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(chat_tokenizer, [SUMS], max_prompt_tokens=100)
    problem = Problem("chain_sum/0", "1 + 2 =", metadata={"system_prompt": "Box it."})
    assert chat_tokenizer.decode(encoder.encode(problem)).startswith("<bos>system: Box it.<eos>")


def test_null_is_no_system_prompt(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(
        chat_tokenizer, [TaskConfig(name="chain_sum", system_prompt="Be brief.")], max_prompt_tokens=100
    )
    problem = Problem("chain_sum/0", "1 + 2 =", metadata={"system_prompt": None})
    assert chat_tokenizer.decode(encoder.encode(problem)).startswith("<bos>system: Be brief.<eos>")


REFUSALS = {
    "a system message": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    "everything": "{{ raise_exception('not today') }}",
    "texts": "{{ messages[0]['content'] + 1 }}",
    "no syntax": "{% if %}",
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_a_chat_template_that_refuses_is_named_with_the_problem(refused: str) -> None:
    """Templates are programs, with exceptions of their own."""
    tokenizer = train_tokenizer([build_task(SUMS)])
    tokenizer.chat_template = REFUSALS[refused] + CHAT_TEMPLATE
    encoder = PromptEncoder(tokenizer, [TaskConfig(name="chain_sum", system_prompt="Be brief.")], max_prompt_tokens=100)
    with pytest.raises(TaskError, match=r"^chain_sum/0: the tokenizer or its chat template refuses this prompt \("):
        encoder.encode(Problem("chain_sum/0", "1 + 2 ="))


@pytest.mark.parametrize(
    ("template", "message"), [(REFUSALS["a system message"], "refuses"), (None, "needs chat: true")]
)
def test_a_row_with_a_system_message_is_found_before_it_is_drawn(
    tmp_path: Path, template: str | None, message: str
) -> None:
    tokenizer = train_tokenizer([build_task(SUMS)])
    tokenizer.chat_template = template and template + CHAT_TEMPLATE
    chat = [{"role": "system", "content": "Box it."}, {"role": "user", "content": "1 + 2 ="}]
    rows = [{"prompt": "1 + 1 =", "answer": 2}] * 3 + [{"prompt": chat, "answer": 3}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TaskConfig(name="mine", kind="jsonl", path=str(tmp_path / "rows.jsonl"))
    encoder = PromptEncoder(tokenizer, [config], max_prompt_tokens=100)
    with pytest.raises(TaskError, match=f"mine/3: .*{message}"):
        encoder.check_system_prompts([build_task(config)])


def test_a_prompt_that_is_too_long_is_an_error_or_skipped_but_never_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [len(tokenizer(problem.question)["input_ids"]) for problem in build_task(SUMS)]
    limit = sorted(lengths)[len(lengths) // 2]
    encoder = PromptEncoder(tokenizer, [SUMS], max_prompt_tokens=limit)
    longest = build_task(SUMS)[lengths.index(max(lengths))]
    with pytest.raises(
        PromptTooLongError, match=f"{longest.problem_id} has {max(lengths)} tokens, more than .* {limit}"
    ):
        encoder.encode(longest)
    mixture = build_mixture([SUMS], seed=0, fits=encoder.fits)
    assert max(len(encoder.encode(problem)) for problem in mixture.problems(0, 100)) == limit
    assert encoder.too_long == sum(length > limit for length in lengths)


def test_responses_are_decoded_without_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(tokenizer, [SUMS], max_prompt_tokens=10)
    assert encoder.decode([*tokenizer("-12")["input_ids"], tokenizer.eos_token_id]) == "-12"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskConfig(name="a", prompt_template="Answer:"), r"task a: prompt_template must contain \{question\} once"),
        (TaskConfig(name="a", system_prompt="Be brief."), "task a: system_prompt needs chat: true"),
    ],
)
def test_a_prompt_that_cannot_be_built_is_refused(
    tokenizer: PreTrainedTokenizerFast, config: TaskConfig, message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        PromptEncoder(tokenizer, [config], max_prompt_tokens=10)


def test_a_mark_that_decoding_leaves_out_cannot_be_graded_by() -> None:
    config = TaskConfig(name="chain_sum", graded_part="after_thinking")
    tokenizer = train_tokenizer([build_task(SUMS)])
    tokenizer.add_tokens(["</think>"])
    encoder = PromptEncoder(tokenizer, [config], max_prompt_tokens=10)
    assert "</think>" in encoder.decode([tokenizer.convert_tokens_to_ids("</think>")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    with pytest.raises(TaskError, match="counts it as a special token"):
        PromptEncoder(tokenizer, [config], max_prompt_tokens=10)


def test_a_problem_of_an_unknown_task_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TaskError, match=r"other/3 is from no task of this run \(chain_sum\)"):
        PromptEncoder(tokenizer, [SUMS], max_prompt_tokens=10).encode(Problem("other/3", "?"))


def test_the_texts_of_single_tokens_make_up_the_response(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(tokenizer, [SUMS], max_prompt_tokens=100)
    ids = tokenizer("12 = é€ 7", add_special_tokens=False)["input_ids"]  # letters of two and three bytes
    texts = encoder.decode_each(ids)
    assert len(texts) == len(ids) > 6
    assert "".join(texts) == encoder.decode(ids) == "12 = é€ 7"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)
    assert encoder.decode_each([*ids, tokenizer.eos_token_id]) == [*texts, ""]
