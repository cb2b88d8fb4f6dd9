"""A policy made for one step: a random two-layer Qwen3, a tokenizer of single characters, and files of problems."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from megatron_dppo.models.hf.config import rewrite_for_every_reader

_SPECIAL = ("<pad>", "<eos>", "<unk>")
_HEAD_SIZE = 64  # the smallest that attention kernels of GPUs have


def write_trial_policy(folder: Path) -> None:
    """Model (fp32), tokenizer and ``sums.jsonl`` and ``held_out.jsonl`` in ``folder``; a few hundred kB."""
    tokens = [*_SPECIAL, *string.digits, *string.ascii_lowercase, *" +=?"]
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokens),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=_HEAD_SIZE,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    rewrite_for_every_reader(folder)
    for name, first in (("sums", 0), ("held_out", 8)):
        rows = [{"question": f"{a} + {a + 1} = ?", "answer": str(2 * a + 1)} for a in range(first, first + 8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
