"""Tensor parallelism: however many ranks share the vocabulary, the loss, its gradient and every statistic are the same.

Also what it may cost (one collective forward, none backward), and that these tests would notice the mistakes that are
easily made with a sharded vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs, vocab_parallel_policy_stats
from megatron_dppo.loss.config import DIVERGENCES
from megatron_dppo.ops import policy_stats, shard_merge, torch_backend
from megatron_dppo.ops.backend import backend_report
from tests.counted_collectives import ALL_GATHER, counted_collectives
from tests.loss.scenario import VOCAB, Scenario, make_scenario

ENGINE = ("rollout_topk", "ref_log_probs")
BACKENDS = [name for name in ("torch", "cpu") if backend_report()[name] == "available"]


def shard(logits: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return logits.clone()
    return logits.chunk(dist.get_world_size(group), dim=-1)[dist.get_rank(group)].clone()


def join(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def inputs_of(scenario: Scenario, divergence: str, group: dist.ProcessGroup | None) -> LossInputs:
    inputs = scenario.inputs(*ENGINE)
    if divergence.startswith("exact"):
        return dataclasses.replace(inputs, rollout_logits=shard(scenario.rollout_logits, group))
    return inputs


def run_losses(group: dist.ProcessGroup | None, backend: str = "torch") -> dict[str, list[Any]]:
    """Loss, full gradient and statistics for every divergence and direction, from this rank's shard."""
    results: dict[str, list[Any]] = {}
    for divergence, direction in itertools.product(DIVERGENCES, ("ratio", "predictive")):
        scenario = make_scenario(seed=5)
        logits = shard(scenario.logits, group).requires_grad_()
        inputs = inputs_of(scenario, divergence, group)
        config = DPPOConfig(divergence=divergence, direction=direction, entropy_coef=0.1, kl_coef=0.1)
        out = DPPOLoss(config, tp_group=group, vocab_size=VOCAB, backend=backend)(logits, inputs)
        out.loss.backward()
        metrics = out.metrics.finalize()
        grad = join(logits.grad, group)
        results[f"{divergence}/{direction}"] = [out.loss.item(), grad, out.divergence, out.weight, metrics]
    return results


def _sharded_losses(backend: str) -> dict[str, list[Any]]:
    return run_losses(dist.group.WORLD, backend)


# 22 columns of vocabulary in 24: at TP=4 the last shard of 6 holds 4 true and 2 padded columns.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_shards_gives_the_same(ranks: Any, world_size: int, backend: str) -> None:
    whole = run_losses(None, backend)
    for sharded in ranks(world_size).run(_sharded_losses, backend):
        for name, (loss, grad, divergence, weight, metrics) in whole.items():
            # Only the order of fp32 sums of 22 terms differs.
            assert sharded[name][0] == pytest.approx(loss, rel=1e-5, abs=1e-6), name
            torch.testing.assert_close(sharded[name][1], grad, rtol=1e-5, atol=1e-7)
            padding = sharded[name][1][..., VOCAB:]
            assert padding.numel() > 0
            assert not padding.any()
            torch.testing.assert_close(sharded[name][2], divergence, rtol=1e-5, atol=1e-6)
            assert torch.equal(sharded[name][3], weight)
            assert sharded[name][4] == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def _edge_shards() -> list[Any]:
    """A shard of -inf only, one of padding only, the maximum on either shard, equal maxima, -inf targets, no token, one."""
    group = dist.group.WORLD
    rank = dist.get_rank(group)
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    logits[0, :4], logits[1, 4:] = -math.inf, -math.inf
    logits[2, 1], logits[3, 6] = 1e4, 1e4
    logits[4, 2], logits[4, 7] = 9.0, 9.0
    target = torch.tensor([5, 0, 1, 0, 7, 3])
    ids = torch.arange(8).expand(6, 8).contiguous()
    problems = []
    for vocab_size in (8, 4):
        whole, local = logits.clone().requires_grad_(), shard(logits, group).requires_grad_()
        mask = (
            torch.ones(6, dtype=torch.bool)
            if vocab_size == 8
            else torch.tensor([False, True, True, False, False, True])
        )
        kept, kept_ids = (target, ids) if vocab_size == 8 else (target.clamp(max=3), ids.clamp(max=3))
        kw = {"vocab_size": vocab_size, "token_mask": mask, "backend": "torch"}
        expected = vocab_parallel_policy_stats(whole, kept, topk_ids=kept_ids, **kw)
        got = vocab_parallel_policy_stats(local, kept, topk_ids=kept_ids, tp_group=group, **kw)
        for stats in (expected, got):
            torch.where(stats.log_prob.isfinite(), stats.log_prob + stats.entropy, 0).sum().backward()
        expected_grad = whole.grad[:, rank * 4 : rank * 4 + 4]
        for a, b in (*zip(got, expected, strict=True), (local.grad, expected_grad)):
            if not torch.allclose(a, b, rtol=1e-5, atol=1e-6) or bool(b.isnan().any()):
                problems.append((vocab_size, a.detach(), b.detach()))
    empty = vocab_parallel_policy_stats(
        shard(logits, group), target, tp_group=group, token_mask=torch.zeros(6, dtype=torch.bool), backend="torch"
    )
    assert not empty.entropy.any()
    kw = {"token_mask": torch.arange(6) == 5, "backend": "torch"}
    alone = vocab_parallel_policy_stats(shard(logits, group), target, tp_group=group, **kw)
    torch.testing.assert_close(alone.entropy, vocab_parallel_policy_stats(logits, target, **kw).entropy)
    return problems


def test_shards_without_probability_without_vocabulary_and_without_tokens(ranks: Any) -> None:
    for problems in ranks(2).run(_edge_shards):
        assert problems == []


def _collectives_of(divergence: str) -> tuple[list[str], list[str]]:
    scenario, group = make_scenario(), dist.group.WORLD
    logits = shard(scenario.logits, group).requires_grad_()
    config = DPPOConfig(divergence=divergence, direction="predictive", entropy_coef=0.1)
    loss = DPPOLoss(config, tp_group=group, vocab_size=VOCAB)
    with counted_collectives() as forward:
        out = loss(logits, inputs_of(scenario, divergence, group))
    with counted_collectives() as backward:
        out.loss.backward()
    return forward, backward


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("binary_tv", [ALL_GATHER]),
        ("topk_kl", [ALL_GATHER]),
        ("exact_kl", [ALL_GATHER, ALL_GATHER, ALL_GATHER, "all_reduce"]),
    ],
)
def test_one_collective_forward_and_none_backward(ranks: Any, divergence: str, expected: list[str]) -> None:
    for forward, backward in ranks(2).run(_collectives_of, divergence):
        assert forward == expected
        assert backward == []


def _rows_sent() -> list[int]:
    scenario, sent = make_scenario(), []
    rows = scenario.loss_mask.flatten().nonzero()[:, 0]
    original = getattr(dist, ALL_GATHER)

    def measure(output: torch.Tensor, partials: torch.Tensor, **kwargs: Any) -> Any:
        sent.extend(partials.shape)
        return original(output, partials, **kwargs)

    with mock.patch.object(dist, ALL_GATHER, measure):
        vocab_parallel_policy_stats(
            shard(scenario.logits, dist.group.WORLD),
            scenario.target.flatten()[rows],
            topk_ids=scenario.rollout_topk_ids.flatten(0, 1)[rows],
            vocab_size=VOCAB,
            tp_group=dist.group.WORLD,
            rows=rows,
        )
    return [*sent, len(rows)]


def test_only_selected_rows_are_exchanged_five_numbers_and_k_each(ranks: Any) -> None:
    for rows, columns, tokens in ranks(2).run(_rows_sent):
        assert rows == tokens
        assert columns == 5 + 4


def _with_bug(bug: str) -> dict[str, list[Any]]:
    """The losses with one classical mistake put in."""
    partials, gather = torch_backend.shard_partials, policy_stats.gather_shards

    def local_ids(logits, ids, selection, shard, temperature):  # type: ignore[no-untyped-def]
        return partials(logits, ids, selection, dataclasses.replace(shard, first_column=0), temperature)

    def padding_counts(logits, ids, selection, shard, temperature):  # type: ignore[no-untyped-def]
        return partials(logits, ids, selection, dataclasses.replace(shard, num_columns=logits.shape[1]), temperature)

    def no_exchange(shard_partials: torch.Tensor, group: Any) -> torch.Tensor:
        gather(shard_partials, group)
        return shard_partials[None]  # a softmax over the local shard

    def all_maxima_count(gathered: torch.Tensor, mask: torch.Tensor | None) -> Any:
        gathered = gathered.clone()
        gathered[..., shard_merge.REST] += 1.0
        return shard_merge.merge_shards(gathered, mask)

    patches = {
        "global ids used as local ones": mock.patch.object(torch_backend, "shard_partials", local_ids),
        "padded columns counted": mock.patch.object(torch_backend, "shard_partials", padding_counts),
        "softmax over the local shard": mock.patch.object(policy_stats, "gather_shards", no_exchange),
        "maxima counted twice": mock.patch.object(torch_backend, "merge_shards", all_maxima_count),
    }
    with patches[bug]:
        return run_losses(dist.group.WORLD)


@pytest.mark.parametrize(
    "bug",
    [
        "global ids used as local ones",
        "padded columns counted",
        "softmax over the local shard",
        "maxima counted twice",
    ],
)
def test_the_comparison_notices(ranks: Any, bug: str) -> None:
    """With the mistake in, the top-K divergence is off by far more than the tolerance of the comparison above."""
    truth = run_losses(None)["topk_tv/ratio"][2]
    errors = [float((got["topk_tv/ratio"][2] - truth).abs().max()) for got in ranks(2).run(_with_bug, bug)]
    assert max(errors) > 1e-2
