"""``deterministic="layout"``: the loss has the same bits, gradients too, in every layout of the vocabulary and of the tokens.

TP 1, 2 and 4, over logits, fused in two passes and with the gradient made in forward, with sequence parallelism, packed and
padded: all are compared with the logits of packed tokens on one rank. 600 columns are five tiles, the last of which is not
full; at TP 4 the eight tiles are two a rank, and the last rank holds padding only. 200 tokens are two blocks.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_dppo import DPPOConfig, DPPOLoss, LinearHead, LossInputs, TopK
from megatron_dppo.ops import layout_products, tile_tree
from megatron_dppo.ops.backend import backend_report
from megatron_dppo.ops.layout_linear import layout_linear
from megatron_dppo.ops.tile_tree import TILE_COLUMNS
from tests.csrc import emulated_backend
from tests.rank_pool import RankPools

S, B, H, K, VOCAB = 88, 3, 40, 3, 600
BACKENDS = [name for name in ("torch", "cpu") if backend_report()[name] == "available"]
DTYPES = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "bf16 with fp32 logits": (torch.bfloat16, True),
}
NAMES = ("log_prob", "weight", "divergence", "gradient of the hidden states", "gradient of the weight")


class Way(NamedTuple):
    """One way from hidden states to the loss. ``route``: logits, two passes, in forward."""

    route: str
    packed: bool
    entropy_coef: float = 0.0
    sequence_parallel: bool = False


REFERENCE = Way("logits", packed=True)
WAYS = [
    Way("logits", packed=False),
    Way("two passes", packed=True),
    Way("two passes", packed=False),
    Way("in forward", packed=True),
    Way("in forward", packed=False),
    Way("in forward", packed=False, sequence_parallel=True),
]
REFERENCE_WITH_ENTROPY = Way("logits", packed=True, entropy_coef=0.1)
WAYS_WITH_ENTROPY = [
    Way("two passes", packed=True, entropy_coef=0.1),
    Way("two passes", packed=False, entropy_coef=0.1, sequence_parallel=True),
]


def _problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LossInputs]:
    """[S, B, h] hidden states, [V, h] weight, [S, B] mask, [S, B] inputs."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.rand(S, B, generator=generator) < 0.75
    target = torch.randint(0, VOCAB, (S, B), generator=generator)
    topk_ids = torch.stack([torch.arange(K) * 151 + 7] * (S * B)).view(S, B, K) + torch.arange(S * B).view(S, B, 1) % 90
    topk = TopK(ids=topk_ids, log_probs=-3.0 - normal(S, B, K).abs())
    inputs = LossInputs(
        target=target,
        loss_mask=mask,
        advantages=normal(S, B),
        rollout_log_probs=-4.0 - normal(S, B).abs(),
        rollout_topk=topk,
    )
    return normal(S, B, H).to(dtype), (normal(VOCAB, H) * 3 / H**0.5).to(dtype), mask, inputs


def _packed(inputs: LossInputs, mask: torch.Tensor) -> LossInputs:
    topk = inputs.rollout_topk
    return LossInputs(
        target=inputs.target[mask],
        loss_mask=None,
        advantages=inputs.advantages[mask],
        rollout_log_probs=inputs.rollout_log_probs[mask],
        rollout_topk=TopK(ids=topk.ids[mask], log_probs=topk.log_probs[mask]),
    )


def _results(way: Way, group: dist.ProcessGroup | None, dtype_name: str, backend: str) -> list[torch.Tensor]:
    """``NAMES`` of the tokens in the mask, in their order; gradients put together over the ranks."""
    dtype, fp32_logits = DTYPES[dtype_name]
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    hidden, weight, mask, inputs = _problem(dtype)
    width = -(-VOCAB // (TILE_COLUMNS * size)) * TILE_COLUMNS
    padding = torch.full((size * width - VOCAB, H), 7.0, dtype=dtype)
    local_weight = torch.cat([weight, padding])[rank * width : (rank + 1) * width].clone().requires_grad_()
    if not way.packed:
        hidden = hidden.masked_fill(~mask[..., None], torch.nan)
    tokens = _packed(inputs, mask) if way.packed else inputs
    leaf = hidden[mask] if way.packed or way.route == "logits" else hidden
    if way.sequence_parallel and group is not None:
        leaf = leaf.chunk(size)[rank]
    leaf = leaf.clone().requires_grad_()

    loss_of = DPPOLoss(
        DPPOConfig(divergence="topk_kl", entropy_coef=way.entropy_coef, temperature=0.8),
        vocab_size=VOCAB,
        tp_group=group,
        backend=backend,
        deterministic="layout",
    )
    if way.route == "logits":
        logits = layout_linear(leaf, local_weight, tp_group=group, fp32_logits=fp32_logits)
        if not way.packed:  # what is outside the mask may be anything
            places = mask.flatten().nonzero()[:, 0]
            logits = logits.new_full((S * B, width), torch.nan).index_copy(0, places, logits).view(S, B, width)
        policy: Any = logits
    else:
        policy = LinearHead(
            leaf,
            local_weight,
            sequence_parallel=way.sequence_parallel and group is not None,
            fp32_logits=fp32_logits,
            chunk_bytes=1 if way.route == "two passes" else 2**30,
        )
    out = loss_of(policy, tokens)
    out.loss.backward()
    grad_hidden, grad_weight = leaf.grad, _joined(local_weight.grad, group)[:VOCAB]
    if way.sequence_parallel:
        grad_hidden = _joined(grad_hidden, group)
    if grad_hidden.dim() == 3:
        assert not grad_hidden[~mask].any()
        grad_hidden = grad_hidden[mask]
    of_tokens = [values if way.packed else values[mask] for values in (out.log_prob, out.weight, out.divergence)]
    return [*of_tokens, grad_hidden, grad_weight]


def _joined(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return local
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def _all_ways(dtype_name: str, backend: str) -> dict[Way, list[torch.Tensor]]:
    """Of a rank; both references are among them."""
    if backend == "emulated":
        emulated_backend.load()
    ways = [REFERENCE, *WAYS, REFERENCE_WITH_ENTROPY, *WAYS_WITH_ENTROPY]
    return {way: _results(way, dist.group.WORLD, dtype_name, backend) for way in ways}


def other_bits(
    results: dict[Way, list[torch.Tensor]], expected: dict[Way, list[torch.Tensor]]
) -> list[tuple[Way, str]]:
    """What is not the same as the reference's, bit by bit."""
    return [
        (way, name)
        for way, values in results.items()
        for name, ours, theirs in zip(
            NAMES, values, expected[REFERENCE_WITH_ENTROPY if way.entropy_coef else REFERENCE], strict=True
        )
        if ours.shape != theirs.shape or not torch.equal(_bytes(ours), _bytes(theirs))
    ]


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().flatten().view(torch.uint8)


def _references(dtype_name: str, backend: str) -> dict[Way, list[torch.Tensor]]:
    return {way: _results(way, None, dtype_name, backend) for way in (REFERENCE, REFERENCE_WITH_ENTROPY)}


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("emulated", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_and_way_gives_the_same_bits(ranks: RankPools, world_size: int, dtype: str, backend: str) -> None:
    if backend == "emulated":
        if reason := emulated_backend.why_not():
            pytest.skip(reason)
        emulated_backend.load()
    expected = _references(dtype, backend)
    for values in expected[REFERENCE]:
        assert values.any()
    for results in ranks(world_size).run(_all_ways, dtype, backend):
        assert other_bits(results, expected) == []


def _with_a_mistake(mistake: str) -> dict[Way, list[torch.Tensor]]:
    def in_rank_order(nodes: torch.Tensor, place: Any, temperature: float) -> torch.Tensor:
        state = nodes[0, :, 0]
        for rank, runs in enumerate(place.node_sizes()):
            for index in range(len(runs)):
                if rank or index:
                    state = tile_tree._merge(state, nodes[rank, :, index], temperature)
        return state

    patches = {
        "none": nullcontext(),
        "states merged in the order of ranks": mock.patch("megatron_dppo.ops.torch_backend.tree_root", in_rank_order),
        "gradients added in the order of ranks": mock.patch.object(
            layout_products,
            "root_sum",
            lambda nodes, place: nodes.flatten(0, 1).sum(0),
        ),
    }
    with patches[mistake]:
        return {way: _results(way, dist.group.WORLD, "fp32", "torch") for way in (REFERENCE, REFERENCE_WITH_ENTROPY)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "noticed"),
    [
        ("none", set()),
        ("states merged in the order of ranks", set(NAMES) - {"weight"}),
        ("gradients added in the order of ranks", {"gradient of the hidden states"}),
    ],
)
def test_the_comparison_notices(ranks: RankPools, mistake: str, noticed: set[str]) -> None:
    expected = _references("fp32", "torch")
    # At TP 4 the nodes are in the order of the ranks; at TP 2 the second node of the first rank goes with the other's first.
    for results in ranks(2).run(_with_a_mistake, mistake):
        assert {name for _, name in other_bits(results, expected)} == noticed
