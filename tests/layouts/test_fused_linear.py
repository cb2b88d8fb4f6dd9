"""The fused linear on a sharded vocabulary: same results and gradients, with and without sequence parallelism."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_dppo import vocab_parallel_policy_stats
from megatron_dppo.ops import fused_linear, linear_tiles
from megatron_dppo.ops.fused_linear import fused_linear_policy_stats
from megatron_dppo.ops.gradient_in_forward import zero_with_policy_gradient
from tests.counted_collectives import ALL_GATHER, counted_collectives
from tests.rank_pool import RankPools

S, B, H, WIDTH, VOCAB = 8, 3, 16, 40, 33  # at TP=4 the last shard of 10 holds 3 true columns


def _problem() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(WIDTH, H, generator=generator, dtype=torch.float64)
    weight[VOCAB:] = 9.0
    return {
        "hidden": torch.randn(S, B, H, generator=generator, dtype=torch.float64),
        "weight": weight,
        "target": torch.randint(0, VOCAB, (S, B), generator=generator),
        "topk_ids": torch.randint(0, VOCAB, (S, B, 2), generator=generator),
        "token_mask": torch.rand(S, B, generator=generator) < 0.6,
    }


def _total(stats: Any) -> torch.Tensor:
    g1, g2 = torch.randn(2, S, B, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return (g1 * stats.log_prob + g2 * stats.entropy).sum()


_FACTORS = torch.randn(S, B, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def _whole() -> list[torch.Tensor]:
    arguments = _problem()
    hidden, weight = (arguments.pop(name).requires_grad_() for name in ("hidden", "weight"))
    stats = vocab_parallel_policy_stats(hidden @ weight.t(), **arguments, vocab_size=VOCAB, backend="torch")
    _total(stats).backward()
    return [*(values.detach() for values in stats), hidden.grad, weight.grad]


def _sharded(sequence_parallel: bool, reduce_hidden_grad: bool) -> tuple[list[torch.Tensor], list[str], list[str]]:
    """Results, with the gradients put together as those of the whole; collectives of forward and backward."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    arguments = _problem()
    hidden, weight = arguments.pop("hidden"), arguments.pop("weight").chunk(size)[rank].clone().requires_grad_()
    hidden = (hidden.chunk(size)[rank] if sequence_parallel else hidden).clone().requires_grad_()
    with counted_collectives() as forward:
        stats = fused_linear_policy_stats(
            hidden,
            weight,
            **arguments,
            vocab_size=VOCAB,
            tp_group=group,
            sequence_parallel=sequence_parallel,
            reduce_hidden_grad=reduce_hidden_grad,
            chunk_bytes=8 * 7,
            backend="torch",
        )
    with counted_collectives() as backward:
        _total(stats).backward()
    grad_hidden = hidden.grad.clone()
    if not reduce_hidden_grad:
        dist.all_reduce(grad_hidden)
    elif sequence_parallel:
        grad_hidden = _joined(grad_hidden)
    return [*(values.detach() for values in stats), grad_hidden, _joined(weight.grad)], forward, backward


def _joined(local: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("sequence_parallel", "reduce_hidden_grad", "collectives"),
    [
        (False, True, ([ALL_GATHER], ["all_reduce"])),
        (False, False, ([ALL_GATHER], [])),
        # Hidden states first, then the statistics.
        (True, True, (2 * [ALL_GATHER], ["reduce_scatter_tensor"])),
    ],
)
def test_any_number_of_shards_gives_the_same(
    ranks: RankPools,
    world_size: int,
    sequence_parallel: bool,
    reduce_hidden_grad: bool,
    collectives: tuple[list[str], list[str]],
) -> None:
    whole = _whole()
    for results, forward, backward in ranks(world_size).run(_sharded, sequence_parallel, reduce_hidden_grad):
        for ours, expected in zip(results, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
        assert (forward, backward) == collectives


def _policy_gradient_of_shards(
    sequence_parallel: bool, reduce_hidden_grad: bool
) -> tuple[list[torch.Tensor], list[str], list[str]]:
    """As ``_sharded``, of a policy gradient alone, made in forward in three blocks of tokens; nothing but the gradients."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    arguments = _problem()
    hidden, weight = arguments.pop("hidden"), arguments.pop("weight").chunk(size)[rank].clone().requires_grad_()
    hidden = (hidden.chunk(size)[rank] if sequence_parallel else hidden).clone().requires_grad_()
    with counted_collectives() as forward:
        zero = zero_with_policy_gradient(
            hidden,
            weight,
            token_gradient=lambda stats, block: _FACTORS.flatten()[block] * stats.log_prob,
            block_rows=8,
            **arguments,
            vocab_size=VOCAB,
            temperature=1.0,
            tp_group=group,
            rows=None,
            sequence_parallel=sequence_parallel,
            reduce_hidden_grad=reduce_hidden_grad,
            accumulate_into_main_grad=False,
            fp32_logits=False,
            chunk_bytes=1,
            backend="torch",
            deterministic="off",
            checks="now",
        )
    with counted_collectives() as backward:
        zero.backward()
    grad_hidden = hidden.grad.clone()
    if not reduce_hidden_grad:
        dist.all_reduce(grad_hidden)
    elif sequence_parallel:
        grad_hidden = _joined(grad_hidden)
    return [grad_hidden, _joined(weight.grad)], forward, backward


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("sequence_parallel", "reduce_hidden_grad", "collectives"),
    [
        (False, True, (3 * [ALL_GATHER], ["all_reduce"])),
        (False, False, (3 * [ALL_GATHER], [])),
        # Hidden states first, then each block's statistics.
        (True, True, (4 * [ALL_GATHER], ["reduce_scatter_tensor"])),
    ],
)
def test_a_gradient_made_in_forward_is_that_of_any_number_of_shards(
    ranks: RankPools,
    world_size: int,
    sequence_parallel: bool,
    reduce_hidden_grad: bool,
    collectives: tuple[list[str], list[str]],
) -> None:
    arguments = _problem()
    hidden, weight = (arguments.pop(name).requires_grad_() for name in ("hidden", "weight"))
    log_prob = vocab_parallel_policy_stats(hidden @ weight.t(), **arguments, vocab_size=VOCAB, backend="torch").log_prob
    # The gradient's factor is made of the statistics, as the loss' is.
    (0.5 * _FACTORS * log_prob.square()).sum().backward()
    for results, forward, backward in ranks(world_size).run(
        _policy_gradient_of_shards, sequence_parallel, reduce_hidden_grad
    ):
        for ours, expected in zip(results, (hidden.grad, weight.grad), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
        assert (forward, backward) == collectives


def _gathered_shape() -> tuple[int, ...]:
    """Of what this rank sends when its shard is read in several chunks."""
    arguments = _problem()
    weight = arguments.pop("weight").chunk(dist.get_world_size())[dist.get_rank()]
    with (
        mock.patch.object(linear_tiles, "_MIN_COLUMNS", 5),
        mock.patch.object(fused_linear, "gather_shards", wraps=fused_linear.gather_shards) as gather,
    ):
        fused_linear_policy_stats(
            weight=weight, **arguments, vocab_size=VOCAB, tp_group=dist.group.WORLD, chunk_bytes=8 * S * B * 5
        )
    return tuple(gather.call_args.args[0].shape)


def test_ranks_exchange_one_row_per_token_however_many_chunks(ranks: RankPools) -> None:
    with mock.patch.object(linear_tiles, "_MIN_COLUMNS", 5):
        assert len(linear_tiles.Tiling.within(8 * S * B * 5, S * B, WIDTH // 2, torch.float64).column_chunks()) > 1
    assert ranks(2).run(_gathered_shape) == 2 * [(S * B, 5 + 2)]


_OVERLAPPED = ("fused into main_grad", "policy gradient in forward")


def _main_gradients(folder: str, layout: dict[str, Any], route: str) -> dict[str, torch.Tensor]:
    """Main gradients of two micro-batches' statistics, computed over logits or fused."""
    # Imported here: the ranks of the tests above start much faster without Megatron.
    from megatron.core.distributed import finalize_model_grads

    from megatron_dppo.models.policy_head import PolicyHead, hidden_states_only
    from tests.models.policy_runs import LOSS_MASK, TOKENS, wrapped_policy

    # Overlapping insists on a gradient for every parameter, also for one that is in main_grad already.
    (chunk,) = wrapped_policy(folder, layout, torch.float32, overlap_grad_reduce=route in _OVERLAPPED)
    chunk.zero_grad_buffer()
    head = PolicyHead(chunk)
    entropy_coef = 0.0 if route.startswith("policy gradient") else 0.3
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    target, common = TOKENS.roll(-1, dims=1), {"vocab_size": 250, "tp_group": head.tp_group}
    for mask, last in ((LOSS_MASK, False), (LOSS_MASK.flip(0), True)):
        with hidden_states_only(chunk):
            output = chunk(TOKENS, positions, None)
        rows = mask.flatten().nonzero()[:, 0]
        if route == "policy gradient in forward":
            loss = zero_with_policy_gradient(
                head.response_hidden(output, rows, mask.shape),
                head.weight,
                target[mask],
                token_gradient=lambda stats, block: torch.ones_like(stats.log_prob),
                block_rows=5,
                backward_scale=1.0,
                rows=None,
                topk_ids=None,
                token_mask=None,
                temperature=1.0,
                sequence_parallel=False,
                reduce_hidden_grad=False,
                accumulate_into_main_grad=True,
                fp32_logits=False,
                chunk_bytes=1,
                backend="auto",
                deterministic="off",
                checks="off",
                **common,
            )
            with nullcontext() if last else chunk.no_sync():
                loss.backward()
            continue
        if route.endswith("logits"):
            logits_nV = head.logits(head.response_hidden(output, rows, mask.shape))
            stats = vocab_parallel_policy_stats(logits_nV, target[mask], **common)
        elif route == "fused behind the head":
            hidden_nh = head.response_hidden(output, rows, mask.shape)
            stats = fused_linear_policy_stats(
                hidden_nh,
                head.weight,
                target[mask],
                **common,
                reduce_hidden_grad=False,
                accumulate_into_main_grad=True,
            )
        else:
            stats = fused_linear_policy_stats(
                output.transpose(0, 1),
                head.weight,
                target.t(),
                **common,
                token_mask=mask.t(),
                sequence_parallel=head.sequence_parallel,
                accumulate_into_main_grad=route == "fused into main_grad",
            )
        with nullcontext() if last else chunk.no_sync():
            (stats.log_prob.sum() + entropy_coef * stats.entropy.sum()).backward()
    finalize_model_grads([chunk])
    return {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("route", "reference"),
    [
        ("fused", "logits"),
        ("fused into main_grad", "logits"),
        ("fused behind the head", "logits"),
        ("policy gradient in forward", "policy gradient over logits"),
    ],
)
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_tied"])
@pytest.mark.parametrize("layout", ["TP2", "TP2 without sequence parallelism"])
def test_a_model_gets_the_gradients_of_the_route_over_logits(
    ranks: RankPools, tmp_path: Path, layout: str, kind: str, route: str, reference: str
) -> None:
    """Through Megatron's DistributedDataParallel, for every parameter; two micro-batches, so gradients accumulate."""
    from tests.models.policy_runs import TWO_RANK_LAYOUTS
    from tests.models.tiny_policies import write_tiny_hf_model

    arguments = (str(write_tiny_hf_model(kind, tmp_path)), TWO_RANK_LAYOUTS[layout])
    expected = ranks(2).run(_main_gradients, *arguments, reference)
    for ours, theirs in zip(ranks(2).run(_main_gradients, *arguments, route), expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            # fp32 sums in another order; a reduction done twice or left out is an error of 50 % and more.
            assert (ours[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
            assert gradient.any()
