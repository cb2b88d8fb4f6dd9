"""The loss under the contract of slime and its fork miles: packed logits, lists of responses, a reducer of the framework's.

``loss_function(args, batch, logits, sum_of_sample_mean) -> (loss, {name: scalar})``. The logits [1, T, V/TP] are of whole
samples, one after the other. With context parallelism of size C a sample is cut into 2 C chunks, the last of them padded,
and rank r holds chunks r and 2 C - 1 - r. The lists in the batch hold, for each sample, those of its response tokens that
this rank has the logits of; only ``loss_masks`` are whole.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_dppo.errors import ConfigError, LossInputError
from megatron_dppo.loss.config import DPPOConfig
from megatron_dppo.loss.token_losses import TokenLosses, check_reads, token_losses
from megatron_dppo.ops.policy_stats import vocab_parallel_policy_stats

LossFunction = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]

# Options of both frameworks that their own policy loss reads and this one does not -> the value that asks for nothing.
_NOT_READ = {"use_tis": False, "use_opsm": False, "use_kl_loss": False, "recompute_loss_function": False}


@dataclass(frozen=True)
class Rank:
    """Where this rank stands.

    Attributes:
        cp_rank, cp_size: among the ranks that share a sample's tokens.
        tp_group: over which the vocabulary is sharded.
    """

    cp_rank: int
    cp_size: int
    tp_group: dist.ProcessGroup | None


def make_loss_function(
    framework: str,
    config: DPPOConfig,
    find_rank: Callable[[], Rank],
    backend: str,
    checks: Literal["now", "off"],
    collect: Callable[[TokenLosses], None] | None,
) -> LossFunction:
    """What the framework's ``--custom-loss-function-path`` has to name."""
    check_reads(config)

    def loss_function(
        args: Namespace,
        batch: Mapping[str, Any],
        logits: torch.Tensor,
        sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rank = find_rank()
        _check(framework, args, batch, rank)
        rows, token_at = response_rows(batch["total_lengths"], batch["response_lengths"], rank.cp_rank, rank.cp_size)
        stats = vocab_parallel_policy_stats(
            logits,
            _taken(batch["unconcat_tokens"], token_at),
            rows=torch.cat(rows).to(logits.device),
            temperature=args.rollout_temperature,
            vocab_size=args.vocab_size,
            tp_group=rank.tp_group,
            backend=backend,
            checks=checks,
        )
        prompts = [
            total - response for total, response in zip(batch["total_lengths"], batch["response_lengths"], strict=True)
        ]
        losses = token_losses(
            config,
            stats.log_prob,
            rollout_log_probs=torch.cat(list(batch["rollout_log_probs"])),
            advantages=torch.cat(list(batch["advantages"])),
            loss_mask=_taken(batch["loss_masks"], [at - prompt for at, prompt in zip(token_at, prompts, strict=True)]),
            backend=backend,
            checks=checks,
        )
        if collect is not None:
            collect(losses)
        loss = sum_of_sample_mean(losses.per_token)
        if args.entropy_coef != 0.0:
            loss = loss - args.entropy_coef * sum_of_sample_mean(stats.entropy)
        reported = {
            "dppo/mask_fraction": (losses.weight == 0).float(),
            "dppo/divergence_mean": losses.divergence,
            "mismatch/abs_log_ratio": (stats.log_prob - torch.cat(list(batch["rollout_log_probs"]))).abs(),
            "entropy": stats.entropy,
        }
        means = {name: sum_of_sample_mean(values.detach()) for name, values in reported.items()}
        return loss, {"loss": loss.detach(), **means}

    return loss_function


def response_rows(
    total_lengths: list[int], response_lengths: list[int], cp_rank: int, cp_size: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Where this rank has the logits of response tokens.

    Returns:
        For each sample its rows in the packed logits, and the position in the sample of the token that each predicts.
    """
    rows, token_at, start = [], [], 0
    for total, response in zip(total_lengths, response_lengths, strict=True):
        chunk = total if cp_size == 1 else -(-total // (2 * cp_size))
        mine = [0] if cp_size == 1 else [cp_rank, 2 * cp_size - 1 - cp_rank]
        predicting = range(total - response - 1, total - 1)
        sample_rows, sample_tokens = [], []
        for i in mine:
            first, last = max(i * chunk, predicting.start), min((i + 1) * chunk, predicting.stop)
            at = torch.arange(first, max(first, last))
            sample_rows.append(at - i * chunk + start)
            sample_tokens.append(at + 1)
            start += chunk
        rows.append(torch.cat(sample_rows))
        token_at.append(torch.cat(sample_tokens))
    return rows, token_at


def _taken(values: list[torch.Tensor], places: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.index_select(0, at.to(x.device)) for x, at in zip(values, places, strict=True)])


def _check(framework: str, args: Namespace, batch: Mapping[str, Any], rank: Rank) -> None:
    if not batch.get("rollout_log_probs"):
        raise LossInputError(
            f"{framework}: the batch has no rollout_log_probs, and what the trainer recomputes is no substitute: a generate "
            "function of your own must set sample.rollout_log_probs to what the engine returned with the tokens"
        )
    for name, nothing in _NOT_READ.items():
        if getattr(args, name, nothing) != nothing:
            raise ConfigError(f"{framework}: --{name.replace('_', '-')} is not read by this loss: leave it out")
    if args.rollout_top_p != 1.0 or args.rollout_top_k not in (-1, 0):
        raise ConfigError(
            f"{framework}: truncated sampling changes what the divergence is about: --rollout-top-p must be 1, "
            f"not {args.rollout_top_p:g}, and --rollout-top-k -1, not {args.rollout_top_k}"
        )
    if rank.cp_size > 1 and args.allgather_cp:
        raise ConfigError(f"{framework}: --allgather-cp lays samples out otherwise than was recorded: leave it out")
    if getattr(args, "qkv_format", "thd") != "thd":
        raise ConfigError(f"{framework}: --qkv-format {args.qkv_format} was not recorded: use thd")
