"""Everything a run reads from disk, read and checked before any model is built or any process group is joined."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from megatron_dppo.errors import ConfigError
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.models.hf.config_json import read_json_object
from megatron_dppo.models.hf.weights import check_hf_weights
from megatron_dppo.rollout.sample import Prompt
from megatron_dppo.tasks.build import build_evaluation_set, build_mixture
from megatron_dppo.tasks.mixture import TaskMixture
from megatron_dppo.tasks.prompting import PromptEncoder
from megatron_dppo.tasks.task import Problem
from megatron_dppo.training.config.check import check_config
from megatron_dppo.training.config.schema import Config


@dataclass(frozen=True)
class RunInputs:
    """What a run works on.

    Attributes:
        hf_config: of the policy; its vocab_size is the true one.
        tokenizer: of the policy.
        tokenizer_folder: where its files are.
        stop_token_ids: tokens that end a response; never empty.
        encoder: problems -> prompts, responses -> text.
        train_problems: the endless stream of training problems; none of them is held out.
        eval_prompts: the held-out prompts.
    """

    hf_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    tokenizer_folder: Path
    stop_token_ids: tuple[int, ...]
    encoder: PromptEncoder
    train_problems: TaskMixture
    eval_prompts: list[Prompt]

    def prompt(self, problem: Problem) -> Prompt:
        """The problem as the model reads it."""
        return _prompt(self.encoder, problem)

    def train_prompts(self, first: int, count: int, share: int, shares: int) -> list[Prompt]:
        """Every ``shares``-th of the ``count`` training prompts from position ``first`` on, beginning at ``share``."""
        return [self.prompt(self.train_problems.problem(i)) for i in range(first + share, first + count, shares)]


def read_run_inputs(config: Config, world_size: int) -> RunInputs:
    """Read and check model folder, tokenizer and tasks. Raises ConfigError or another ValueError that names the place."""
    hf_config = load_hf_config(_existing_folder(config.model.path))
    check_config(config, hf_config, world_size)
    if config.model.init == "pretrained":
        check_hf_weights(config.model.path, hf_config)
    tokenizer_folder = Path(config.model.tokenizer or config.model.path)
    tokenizer = _load_tokenizer(tokenizer_folder, hf_config)
    tasks = [*config.tasks.train, *config.tasks.eval]
    encoder = PromptEncoder(tokenizer, tasks, config.rollout.max_prompt_tokens, chat=config.model.chat)
    held_out = build_evaluation_set(config.tasks.eval)
    eval_problems = [problem for problem in held_out.problems if encoder.fits(problem)][: config.eval.prompts]
    if len(eval_problems) < config.eval.prompts:
        raise ConfigError(
            f"eval.prompts={config.eval.prompts}, but the evaluation tasks have {len(eval_problems)} distinct questions of at"
            f" most {config.rollout.max_prompt_tokens} tokens: make their `size` larger or eval.prompts smaller"
        )
    train_problems = build_mixture(config.tasks.train, config.run.seed, held_out, encoder.fits)
    encoder.check_system_prompts(train_problems.tasks)
    return RunInputs(
        hf_config=hf_config,
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        stop_token_ids=_stop_token_ids(Path(config.model.path), hf_config, tokenizer),
        encoder=encoder,
        train_problems=train_problems,
        eval_prompts=[_prompt(encoder, problem) for problem in eval_problems],
    )


def _prompt(encoder: PromptEncoder, problem: Problem) -> Prompt:
    return Prompt(problem.problem_id, encoder.encode(problem), {"problem": problem})


def _existing_folder(path: str) -> Path:
    if not path:
        raise ConfigError(
            "model.path is not set: give a local Hugging Face folder (config.json, safetensors, tokenizer)"
        )
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path: there is no {folder / 'config.json'}; models are read from local folders"
            " (tools/setup/make_tiny_policy.py and tools/setup/prepare_smollm2.py write two)"
        )
    return folder


def _load_tokenizer(folder: Path, hf_config: PretrainedConfig) -> PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(folder)
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model only {hf_config.vocab_size}: they do not"
            " belong together"
        )
    return tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises ConfigError if nothing loads from it."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise ConfigError(f"model.tokenizer: {folder} holds no tokenizer that loads ({error})") from error


def _stop_token_ids(folder: Path, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """End-of-sequence tokens of generation_config.json, config.json and the tokenizer.

    Of what the files say: a configuration class has defaults (Llama's is 2), which are no facts about this model.
    """
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json_object(folder / name).get("eos_token_id")
            ids.update(_token_ids(value, hf_config.vocab_size, f"{folder / name}: eos_token_id"))
    ids.update(_token_ids(tokenizer.eos_token_id, hf_config.vocab_size, "the tokenizer's eos_token_id"))
    if not ids:
        raise ConfigError(
            f"{folder}: neither generation_config.json nor config.json nor the tokenizer names an end-of-sequence token;"
            " set eos_token_id in one of them"
        )
    return tuple(sorted(ids))


def _token_ids(value: Any, vocab_size: int, name: str) -> list[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in values:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ConfigError(f"{name} is {value!r}: expected ids of tokens, from 0 to {vocab_size - 1}")
    return values
