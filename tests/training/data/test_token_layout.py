"""Where the tokens of a micro-batch's sequences stand."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo.training.data.token_layout import packed_layout, padded_layout, round_up


def test_a_packed_row_holds_sequences_end_to_end_and_its_rest_is_a_part_of_its_own():
    layout = packed_layout([3, 5, 2], sequence_multiple=1, row_length=12)
    assert layout.places == ((0, 0), (0, 3), (0, 8))
    assert layout.bounds == (0, 3, 8, 10, 12)
    assert packed_layout([3, 5], sequence_multiple=4, row_length=12).bounds == (0, 4, 12)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_context_parallel_ranks_hold_all_positions_once_in_two_chunks_of_each_sequence(size, packed):
    multiple = 2 * size
    lengths = [5, 13, 2, 9]
    if packed:
        layout = packed_layout(lengths, multiple, sum(round_up(n, multiple) for n in lengths) + multiple)
    else:
        layout = padded_layout(lengths, round_up(13, multiple))
    ranks = [layout.positions_on_rank(size, rank) for rank in range(size)]
    assert torch.cat(ranks).sort().values.tolist() == list(range(layout.length))
    assert len({len(positions) for positions in ranks}) == 1
    # The work of causal queries is their distance from the sequence's start: equal on all ranks but for one chunk's steps.
    start, end = layout.bounds[-2:]
    work = [int((p[(p >= start) & (p < end)] - start).sum()) for p in ranks]
    assert len(set(work)) == 1
