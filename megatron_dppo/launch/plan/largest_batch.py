"""The largest micro-batch that a configuration allows: what a rank must have memory for."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from megatron_dppo.models.hf.config import is_moe
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.data.batcher import ReplicaBatch
from megatron_dppo.training.data.micro_batch import ExampleFields, TrainingExample
from megatron_dppo.training.data.schedule import PlannedMicroBatch, Scheduler
from megatron_dppo.training.data.token_layout import round_up


def largest_batch(config: Config, hf_config: PretrainedConfig, prompt_tokens: int, micro_batches: int) -> ReplicaBatch:
    """One optimizer step of so many micro-batches, each of the longest sequences that there can be.

    Packed ones fill the token budget, padded ones have ``train.micro_batch_size`` rows. Expert choices are not among them.
    """
    train, rollout = config.train, config.rollout
    scheduler = Scheduler(train, config.parallel, 1, float)
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if train.batching == "packed":
        row = round_up(train.tokens_per_micro_batch, scheduler.row_multiple)
        lengths = _cut(row, round_up(longest, scheduler.sequence_multiple), scheduler.sequence_multiple)
    else:
        row = round_up(longest, scheduler.row_multiple)
        lengths = [longest] * train.micro_batch_size
    fields = ExampleFields(
        rollout_log_probs=True,
        topk=config.algorithm.topk if config.algorithm.loss.needs_topk else 0,
        ref_log_probs=bool(config.algorithm.loss.kl_coef),
    )
    prompt = min(prompt_tokens, rollout.max_prompt_tokens)
    examples = [
        _example(length, prompt, hf_config.vocab_size, fields) for _ in range(micro_batches) for length in lengths
    ]
    size = len(lengths)
    planned = [PlannedMicroBatch(tuple(range(n * size, (n + 1) * size)), row) for n in range(micro_batches)]
    return ReplicaBatch([planned], dict(enumerate(examples)), fields)


def replayed_bytes(config: Config, hf_config: PretrainedConfig, tokens: int, layers: int) -> int:
    """Of the expert choices of so many tokens in so many layers, if they are replayed."""
    if not (config.algorithm.routing_replay and is_moe(hf_config)):
        return 0
    return int(tokens * layers * hf_config.num_experts_per_tok * (1 if hf_config.num_experts <= 256 else 2))


def _cut(row: int, longest: int, multiple: int) -> list[int]:
    """Lengths that fill a row."""
    lengths = [longest] * (row // longest)
    rest = (row - sum(lengths)) // multiple * multiple
    return [*lengths, rest] if rest >= max(2, multiple) else lengths


def _example(length: int, prompt_tokens: int, vocab_size: int, fields: ExampleFields) -> TrainingExample:
    """With tokens of all kinds, so that a router sends them to different experts."""
    prompt = max(1, min(prompt_tokens, length - 1))
    response, topk = length - prompt, fields.topk
    ids = torch.arange(length, dtype=torch.int64) * 7919 % vocab_size
    return TrainingExample(
        token_ids=ids.to(torch.int32),
        prompt_length=prompt,
        advantage=1.0,
        rollout_log_probs=torch.full((response,), -1.0),
        topk_ids=torch.arange(topk, dtype=torch.int32).expand(response, topk).contiguous() if topk else None,
        topk_log_probs=torch.full((response, topk), -10.0) if topk else None,
        ref_log_probs=torch.full((response,), -1.0) if fields.ref_log_probs else None,
    )
