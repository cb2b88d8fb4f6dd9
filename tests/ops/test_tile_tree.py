"""Statistics with ``deterministic="layout"``: the same bits in any number of shards, and as right as the usual ones."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo import vocab_parallel_policy_stats
from megatron_dppo.ops import layout_reduction, tile_tree
from megatron_dppo.ops.arguments import RowSelection, RowState, TokenIds, VocabShard
from megatron_dppo.ops.backend import choose_backend
from megatron_dppo.ops.tile_tree import TILE_COLUMNS, TileTree, node_runs
from tests.ops.dense_statistics import dense, stats_of
from tests.ops.shards_in_turn import layout_results

VOCAB = (
    5 * TILE_COLUMNS + 37
)  # six tiles, the last of which is not full; with 4 shards of 2 the last holds padding only
# Number of shards, elements by which rows miss their alignment, threads.
LAYOUTS = [(1, 3, 2), (2, 0, 1), (3, 1, 2), (4, 5, 1), (8, 2, 2)]
NAMES = ("log_prob", "entropy", "collision", "topk_log_prob", "max", "log_sum", "gradient")


def rows_of_every_kind(dtype: torch.dtype) -> torch.Tensor:
    """[8, V]: two ordinary rows, and what could go another way in another order."""
    logits = 3 * torch.randn(8, VOCAB)
    logits[2] = -20.0
    logits[2, 130] = 20.0  # near certainty
    logits[3, ::7] = 9.0  # one maximum, many times, in every tile
    logits[4, :300] = -math.inf  # tiles without probability
    logits[5, ::2], logits[5, 1::2] = 0.0, -0.0
    logits[6] = torch.randint(-300, 300, (VOCAB,)) / 64 + (1e4 if dtype is not torch.float16 else 1e3)
    logits[7] = -math.inf
    logits[7, 5 * TILE_COLUMNS] = 1.0  # the only one that can be drawn
    return logits.to(dtype)


def ids_of(n: int) -> TokenIds:
    target = torch.randint(0, VOCAB, (n,))
    return TokenIds(target, torch.stack([target.flip(0), torch.arange(n) * 83 % VOCAB], dim=1))


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_layout_changes_a_bit(dtype: torch.dtype, with_entropy: bool, backend: str) -> None:
    """Number of shards, alignment (vector and scalar loads), gaps between rows, threads, rows as a list and as a mask."""
    if dtype is torch.float64 and backend != "torch":
        pytest.skip("the kernels do not take float64")
    logits, chosen = rows_of_every_kind(dtype), choose_backend(backend, torch.zeros(1, dtype=dtype))
    ids, common = ids_of(8), {"temperature": 0.7, "with_entropy": with_entropy}
    expected = layout_results(chosen, logits, ids, 1, **common)
    for values in expected:
        assert values[:7].isfinite().any()
    try:
        for num_shards, offset, threads in LAYOUTS:
            torch.set_num_threads(threads)
            got = layout_results(chosen, logits, ids, num_shards, offset=offset, **common)
            assert [n for n, a, b in zip(NAMES, got, expected, strict=True) if not same_bits(a, b)] == []
    finally:
        torch.set_num_threads(1)

    rows = torch.tensor([0, 2, 3, 5, 6])
    mask = torch.zeros(8, dtype=torch.bool).index_fill_(0, rows, True)
    listed = TokenIds(ids.target[rows], ids.topk[rows])
    as_list = layout_results(chosen, logits, listed, 2, selection=RowSelection(rows=rows), offset=1, **common)
    as_mask = layout_results(chosen, logits, ids, 4, selection=RowSelection(mask=mask), **common)
    for name, listed_values, masked_values, values in zip(NAMES, as_list, as_mask, expected, strict=True):
        if name != "gradient":
            assert same_bits(listed_values, values[rows]), name
            assert same_bits(masked_values[rows], values[rows]), name
    assert not as_mask[6][~mask].any()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of -0 and 0 too; NaN is like NaN."""
    return torch.equal(torch.signbit(a), torch.signbit(b)) and bool(((a == b) | (a.isnan() & b.isnan())).all())


def test_another_order_changes_bits(backend: str) -> None:
    """Or the comparison above would show nothing: the usual way merges in the order of shards."""
    logits, chosen = rows_of_every_kind(torch.float32)[:2], choose_backend(backend, torch.zeros(1))
    ids = ids_of(2)

    def entropies(num_shards: int) -> torch.Tensor:
        width = -(-VOCAB // num_shards)
        padded = torch.nn.functional.pad(logits, (0, num_shards * width - VOCAB))
        partials = [
            chosen.shard_partials(
                part, ids, RowSelection(), VocabShard(None, VOCAB, r * width, min(width, VOCAB - r * width)), 1.0
            )
            for r, part in enumerate(padded.split(width, dim=1))
        ]
        return chosen.merge_shards(torch.stack(partials), None).entropy

    assert len({tuple(entropies(n).tolist()) for n in (1, 2, 3, 5)}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_place_of_a_logit_changes_no_bit_of_its_gradient(dtype: torch.dtype, compiled_backend: str) -> None:
    """Vectors and what they leave over at both ends of a row."""
    values = 3 * torch.randn(13)
    width = 1300
    one = torch.ones(1)
    state = RowState(-2 * one, 3 * one, 4.5 * one, 1.25 * one)
    backend, gradients = choose_backend(compiled_backend, torch.zeros(1)), []
    for offset in range(16):
        for columns in (width, 1, 37):
            x = torch.zeros(1, width + 32).to(dtype)[:, offset : offset + columns]
            x.copy_(values.repeat(100)[None, :columns])
            gradient = torch.zeros(1, width + 32).to(dtype)[:, (offset * 5) % 16 :][:, :columns]
            target, shard = torch.tensor([width]), VocabShard(None, 2 * width, 0, columns)
            backend.shard_gradient(x, gradient, target, None, state, 0.3 * one, 0.7 * one, shard, 0.9)
            gradients.append(gradient[0])
    for gradient in gradients:
        assert torch.equal(gradient, gradients[0][: len(gradient)])
    assert torch.equal(gradients[0], gradients[0][:13].repeat(100))
    assert gradients[0].any()


@settings(max_examples=25)
@given(
    vocab=st.integers(1, 1500),
    num_shards=st.integers(1, 5),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    temperature=st.sampled_from([1.0, 0.7, 2.5]),
    seed=st.integers(0, 2**20),
)
@pytest.mark.emulated_nightly
def test_statistics_are_those_of_float64(
    vocab: int, num_shards: int, spread: float, temperature: float, seed: int, backend: str
) -> None:
    """Roundings counted, whatever the number of shards.

    In a tile a term passes 12 of them at most, in each of the tree's levels 3 more, and the exponential's 4; and an
    exponent is rounded, by at most half a unit of what the row spans: a term is so much off relative to itself, and so are
    the sums. The logarithm and the two quotients add 4.
    """
    torch.manual_seed(seed)
    logits, target = spread * torch.randn(3, vocab), torch.randint(0, vocab, (3,))
    got = layout_results(
        choose_backend(backend, logits), logits, TokenIds(target, target[:, None]), num_shards, temperature=temperature
    )
    expected = dense(logits, target, target[:, None], temperature)
    z = logits.double() / temperature
    levels = math.ceil(math.log2(math.ceil(vocab / TILE_COLUMNS))) + 1
    spans = float((z.max(dim=1)[0] - z.min(dim=1)[0]).max())
    relative = (12 + 7 * levels + 2 * spans + 4) * 2.0**-24
    log_sum = (z - z.max(dim=1, keepdim=True)[0]).exp().sum(dim=1).log()
    error = relative * (1.0 + 2.0 * (log_sum + expected.entropy)) + 2.0**-22 * z.abs().max()
    for ours, theirs in zip(got[:3], expected[:3], strict=True):
        assert bool(((ours.double() - theirs).abs() <= error).all())
    assert torch.equal(got[3][:, 0], got[0])


def test_wide_rows_are_as_right_as_those_of_the_usual_way(backend: str) -> None:
    """The bound is that of test_policy_stats.py's wide rows."""
    vocab = 40_001
    logits, target = 3 * torch.randn(3, vocab), torch.tensor([0, 20_000, vocab - 1])
    expected = dense(logits, target, target[:, None])
    sums = 4 * (vocab / 16) ** 0.5 * 2.0**-24
    got = stats_of(backend, logits, target, target[:, None], deterministic="layout")
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=sums, atol=sums)


def test_nan_and_infinity_are_not_hidden(backend: str) -> None:
    logits = torch.randn(4, 300)
    logits[0, 3] = math.nan
    logits[1, 200:] = -math.inf
    logits[1, 290] = math.nan  # the only one of its tile that is not -inf
    logits[2, 150] = math.inf
    chosen, ids = choose_backend(backend, logits), TokenIds(torch.zeros(4, dtype=torch.int64), None)
    for num_shards in (1, 3):
        log_prob = layout_results(chosen, logits, ids, num_shards)[0]
        assert log_prob.isnan().tolist() == [True, True, True, False]


def test_the_public_call_takes_part_in_autograd(backend: str) -> None:
    """Values and gradient are those of the shards above, in place and not."""
    logits, ids = rows_of_every_kind(torch.float32), ids_of(8)
    expected = layout_results(choose_backend(backend, logits), logits, ids, 1, with_entropy=False)
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        stats = vocab_parallel_policy_stats(
            leaf * 1,
            ids.target,
            topk_ids=ids.topk,
            inplace_backward=inplace,
            backend=backend,
            deterministic="layout",
        )
        for ours, theirs in zip(stats, expected[:4], strict=True):
            assert same_bits(ours.detach(), theirs)
        from_shards = expected[6]
        generator = torch.Generator().manual_seed(3)
        incoming = torch.randn(2, 8, generator=generator, dtype=torch.float64).to(torch.float32)[0]
        stats.log_prob.backward(incoming)
        assert same_bits(leaf.grad[:7], from_shards[:7])


def test_a_run_of_tiles_is_whole_nodes_of_one_tree() -> None:
    for first in range(40):
        for end in range(first, 70):
            runs = list(node_runs(first, end))
            assert [tile for a, b in runs for tile in range(a, b)] == list(range(first, end))
            assert all(a % (b - a) == 0 and (b - a) & (b - a - 1) == 0 for a, b in runs)
            assert len(runs) <= 2 * max(1, (end - first).bit_length())


def test_shards_that_begin_inside_a_tile_are_refused() -> None:
    shard = VocabShard(object(), 1000, 250, 250)
    with mock.patch.object(tile_tree.dist, "get_world_size", return_value=4):
        message = r"whole tiles of 128 columns, but a shard has 250: pad the vocabulary to a multiple of 128 \* 4"
        with pytest.raises(ValueError, match=message):
            TileTree.of(shard, 250)
        assert TileTree.of(shard, 256).nodes == 1


def test_an_unknown_choice_is_named() -> None:
    with pytest.raises(ValueError, match="deterministic must be one of off, layout, not 'yes'"):
        vocab_parallel_policy_stats(torch.zeros(1, 2), torch.tensor([0]), deterministic="yes", backend="torch")
    assert isinstance(
        layout_reduction.choose_reduction(
            "layout", choose_backend("torch", torch.zeros(1)), VocabShard(None, 2, 0, 2), 2, 1
        ),
        layout_reduction.LayoutReduction,
    )
