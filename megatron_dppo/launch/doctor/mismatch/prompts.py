"""What the model is asked: lines of a file, a few built-in questions, or random tokens where there is no tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PretrainedConfig

from megatron_dppo.errors import ConfigError

QUESTIONS = (
    "What is 17 + 25? Explain each step.",
    "Why is the sky blue?",
    "Write a function in Python that reverses a list.",
    "Name the planets of the solar system in order, and say one thing about each.",
)


def prompt_tokens(folder: Path, config: PretrainedConfig, file: Path | None) -> list[list[int]]:
    """Token ids of every prompt. Raises ConfigError for a file that cannot be used."""
    if not (folder / "tokenizer_config.json").is_file():
        if file is not None:
            raise ConfigError(f"--prompts {file}: {folder} has no tokenizer that could read it")
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randint(0, config.vocab_size, (length,), generator=generator).tolist() for length in (8, 13, 21, 34)
        ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = QUESTIONS if file is None else _lines(file)
    return [tokenizer(text)["input_ids"] for text in texts]


def _lines(file: Path) -> list[str]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {file}: {error}") from error
    if not lines:
        raise ConfigError(f"--prompts {file} has no line with a prompt")
    return lines
