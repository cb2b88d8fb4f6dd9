"""SdpaCoreAttention against attention written out in float64."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_dppo.models.attention as attention_module
from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.attention import SdpaCoreAttention, attend, takes_variable_lengths
from megatron_dppo.models.packed_sequences import PackedSequences, packed_sequences

HEADS, GROUPS, DIM = 4, 2, 8
# fp32 inputs of size ~1: scores and a weighted mean, each a few roundings of 6e-8.
TOLERANCE = {"rtol": 0.0, "atol": 2e-6}


def build_attention(**config) -> SdpaCoreAttention:
    transformer_config = TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": HEADS * DIM,
            "num_attention_heads": HEADS,
            "num_query_groups": GROUPS,
            "attention_dropout": 0.0,
            **config,
        }
    )
    return SdpaCoreAttention(transformer_config, 1, AttnMaskType.causal, "self")


def random_qkv(sq: int, sk: int, batch: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sq * 100 + sk)
    shapes = ((sq, batch, HEADS, DIM), (sk, batch, GROUPS, DIM), (sk, batch, GROUPS, DIM))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masked_out: torch.Tensor) -> torch.Tensor:
    """[sq, b, heads * dim] in float64; ``masked_out`` broadcasts to [b, heads, sq, sk]."""
    key, value = (x.double().repeat_interleave(HEADS // GROUPS, dim=2) for x in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query.double(), key) / DIM**0.5
    weights = scores.masked_fill(masked_out, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def later_keys(sq: int, sk: int) -> torch.Tensor:
    return torch.ones(sq, sk, dtype=torch.bool).triu(sk - sq + 1)


def _check_masks() -> None:
    attention = build_attention()
    for sq, sk in ((6, 6), (1, 9), (3, 9), (1, 1)):  # a prompt, one step over a cache, several steps, a first token
        query, key, value = random_qkv(sq, sk, 2)
        expected = reference(query, key, value, later_keys(sq, sk))
        torch.testing.assert_close(attention(query, key, value).double(), expected, **TOLERANCE)
        # The same said by an explicit mask, and a mask that differs by row: row 0 must not see its first key.
        explicit = later_keys(sq, sk)[None, None].repeat(2, 1, 1, 1)
        torch.testing.assert_close(attention(query, key, value, explicit[:1]).double(), expected, **TOLERANCE)
        if sk > sq:
            explicit[0, :, :, 0] = True
            expected = reference(query, key, value, explicit)
            torch.testing.assert_close(attention(query, key, value, explicit).double(), expected, **TOLERANCE)


def _check_gradients() -> None:
    attention = build_attention()
    query, key, value = random_qkv(6, 6, 2)
    weight = torch.randn(6, 2, HEADS * DIM)
    got = torch.autograd.grad((attention(query, key, value) * weight).sum(), (query, key, value))
    expected = torch.autograd.grad((reference(query, key, value, later_keys(6, 6)) * weight).sum(), (query, key, value))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-5)  # sums over up to 24 terms of size ~3


def _check_bf16() -> None:
    attention = build_attention()
    query, key, value = random_qkv(6, 6, 2, torch.bfloat16)
    output = attention(query, key, value)
    assert output.dtype == torch.bfloat16
    # Scores and weights may be rounded to bf16 (2^-9 relative) before the last rounding; values are below 4.
    expected = reference(query, key, value, later_keys(6, 6))
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=4 * 2**-8)


def packed_params(cu_seqlens: list[int], max_seqlen: int | None = None) -> PackedSeqParams:
    bounds = torch.tensor(cu_seqlens, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=max_seqlen)


def _check_packed() -> None:
    attention = build_attention()
    query, key, value = (x[:, 0] for x in random_qkv(9, 9, 1))
    output = attention(query, key, value, None, packed_seq_params=packed_params([0, 4, 4, 9]))  # lengths 4, 0, 5
    for start, end in ((0, 4), (4, 9)):
        alone = attention(*(x[start:end, None] for x in (query, key, value)))[:, 0]
        torch.testing.assert_close(output[start:end], alone, **TOLERANCE)


def _check_padded_boundaries_count() -> None:
    attention = build_attention()
    qkv = [x[:, 0] for x in random_qkv(9, 9, 1)]
    packed = packed_params([0, 3, 6])  # the true lengths; in the tensor the second sequence begins at 4
    packed.cu_seqlens_q_padded = torch.tensor([0, 4, 9], dtype=torch.int32)
    expected = attention(*qkv, None, packed_seq_params=packed_params([0, 4, 9]))
    torch.testing.assert_close(attention(*qkv, None, packed_seq_params=packed), expected, **TOLERANCE)


def _check_packed_refusals() -> None:
    attention = build_attention()
    query, key, value = (x[:, 0] for x in random_qkv(9, 9, 1))
    for packed, message in (
        (packed_params([0, 4, 8]), "end at token 8, but there are 9 tokens"),
        (packed_params([0, 4, 10]), "end at token 10, but there are 9 tokens"),
        (packed_params([0, 4, 9], max_seqlen=9), "set it to the longest sequence, 5"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(query, key, value, None, packed_seq_params=packed)
    attention(query, key, value, None, packed_seq_params=packed_params([0, 9, 9], max_seqlen=9))  # one sequence
    with pytest.raises(ValueError, match="attention_mask=None"):
        attention(query, key, value, later_keys(9, 9)[None, None], packed_seq_params=packed_params([0, 9]))


def _check_refusals() -> None:
    for name, bad in (("window_size", (4, 0)), ("softmax_type", "learnable"), ("attention_dropout", 0.1)):
        with pytest.raises(ValueError, match=name):
            build_attention(**{name: bad})
    with pytest.raises(ValueError, match="attention_bias"):
        build_attention()(*random_qkv(2, 2, 1), attention_bias=torch.zeros(1))


def _on_one_rank(*checks) -> None:
    initialize_model_parallel(ParallelConfig(), seed=1)
    for check in checks:
        check()


def test_causal_explicit_and_cached_attention(ranks):
    ranks(1).run(_on_one_rank, _check_masks)


def test_gradients(ranks):
    ranks(1).run(_on_one_rank, _check_gradients)


def test_bf16(ranks):
    ranks(1).run(_on_one_rank, _check_bf16)


def test_packed_sequences_do_not_see_each_other(ranks):
    ranks(1).run(_on_one_rank, _check_packed, _check_padded_boundaries_count)


def test_packed_sequences_that_core_would_misread_are_refused(ranks):
    ranks(1).run(_on_one_rank, _check_packed_refusals)


def test_variants_that_are_not_computed_are_refused(ranks):
    ranks(1).run(_on_one_rank, _check_refusals)


def _context_parallel_errors(size: int) -> list[float]:
    """Differences of output and gradients from attention over the whole sequence, for this rank's two chunks."""
    initialize_model_parallel(ParallelConfig(context_parallel_size=size), seed=1)
    attention = build_attention(context_parallel_size=size)
    rank, sequence = attention.cp_group.rank(), 8
    query, key, value = random_qkv(sequence, sequence, 2)
    weight = torch.randn(sequence, 2, HEADS * DIM, generator=torch.Generator().manual_seed(5))
    expected = reference(query, key, value, later_keys(sequence, sequence))
    expected_grads = torch.autograd.grad((expected * weight).sum(), (query, key, value))

    def mine(x: torch.Tensor) -> torch.Tensor:
        chunks = x.detach().chunk(2 * size)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])

    local = [mine(x).requires_grad_() for x in (query, key, value)]
    output = attention(*local)
    grads = torch.autograd.grad((output * mine(weight)).sum(), local)
    pairs = [(output, expected), *zip(grads, expected_grads, strict=True)]
    return [(got - mine(whole)).abs().max().item() for got, whole in pairs]


def test_context_parallel_ranks_compute_their_chunks_of_the_whole(ranks):
    for errors in ranks(2).run(_context_parallel_errors, 2):
        assert max(errors) < 1e-5


def _packed_context_parallel_errors(size: int) -> list[float]:
    """The same for packed sequences: each is cut on its own. Lengths are those of the whole sequences."""
    initialize_model_parallel(ParallelConfig(context_parallel_size=size), seed=1)
    attention = build_attention(context_parallel_size=size)
    rank, bounds = attention.cp_group.rank(), [0, 8, 12, 12, 28]
    query, key, value = random_qkv(bounds[-1], bounds[-1], 1)
    weight = torch.randn(bounds[-1], 1, HEADS * DIM, generator=torch.Generator().manual_seed(5))
    expected = torch.cat(
        [
            reference(query[start:end], key[start:end], value[start:end], later_keys(end - start, end - start))
            for start, end in pairwise(bounds)
        ]
    )
    expected_grads = torch.autograd.grad((expected * weight).sum(), (query, key, value))

    def mine(x: torch.Tensor) -> torch.Tensor:
        chunks = [x[start:end, 0].detach().chunk(2 * size) for start, end in pairwise(bounds) if end > start]
        return torch.cat([part for parts in chunks for part in (parts[rank], parts[2 * size - 1 - rank])])

    local = [mine(x).requires_grad_() for x in (query, key, value)]
    output = attention(*local, None, packed_seq_params=packed_params(bounds, max_seqlen=16))
    grads = torch.autograd.grad((output * mine(weight)).sum(), local)
    pairs = [(output, expected), *zip(grads, expected_grads, strict=True)]
    with pytest.raises(ValueError, match="packed sequence of 6 tokens cannot be cut for context_parallel_size=2"):
        attention(*(x[:8] for x in local), None, packed_seq_params=packed_params([0, 6, 16]))
    return [(got - mine(whole)).abs().max().item() for got, whole in pairs]


def test_context_parallel_ranks_cut_every_packed_sequence(ranks):
    for errors in ranks(2).run(_packed_context_parallel_errors, 2):
        assert max(errors) < 1e-5


def _varlen_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch documents of ``varlen_attn``: a window of (-1, 0) is causal."""
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    lengths = cu_seq_q.diff().tolist()
    assert max(lengths) == max_q == max_k
    contexts = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        attended = attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), None, scale)
        contexts.append(attended[0].transpose(0, 1))
    return torch.cat(contexts)


def _check_one_call_for_all_sequences() -> None:
    attention = build_attention()
    qkv = [x[:, 0] for x in random_qkv(9, 9, 1)]
    for packed in (packed_params([0, 4, 9]), packed_sequences([0, 4, 9], 1)):
        expected = attention(*qkv, None, packed_seq_params=packed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_module, "takes_variable_lengths", lambda *args: True)
            kernel = mock.Mock(side_effect=_varlen_by_hand)
            patch.setattr(attention_module, "varlen_attn", kernel)
            output = attention(*qkv, None, packed_seq_params=packed)
        (call,) = kernel.call_args_list
        assert not isinstance(packed, PackedSequences) or call.args[3] is packed.cu_seqlens, "no copy in a layer"
        torch.testing.assert_close(output, expected, **TOLERANCE)


def test_packed_sequences_take_one_call_where_there_is_a_kernel(ranks):
    ranks(1).run(_on_one_rank, _check_one_call_for_all_sequences)


@pytest.mark.skipif(attention_module.varlen_attn is None, reason="torch has no varlen_attn")
def test_torch_takes_the_arguments_of_that_call() -> None:
    """On the meta device: shapes and names, no kernel."""
    query, key = (torch.empty(9, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (HEADS, GROUPS))
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    output = attention_module.varlen_attn(
        query, key, key, bounds, bounds, 5, 5, scale=0.1, window_size=(-1, 0), enable_gqa=True
    )
    assert output.shape == query.shape


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        ("cuda", torch.bfloat16, 128, True),
        ("cuda", torch.float32, 128, False),  # FlashAttention is a kernel of 16-bit numbers
        ("cuda", torch.bfloat16, 320, False),
        ("cuda", torch.bfloat16, 36, False),
        ("cpu", torch.bfloat16, 128, False),
        ("meta", torch.bfloat16, 128, False),  # planned as one call per sequence
    ],
)
def test_when_there_is_a_kernel_for_variable_lengths(device, dtype, head_dim, expected, monkeypatch) -> None:
    monkeypatch.setattr(attention_module, "_VARLEN_TAKES", frozenset({"scale", "window_size", "enable_gqa"}))
    assert takes_variable_lengths(device, dtype, head_dim) is expected
    monkeypatch.setattr(attention_module, "_VARLEN_TAKES", frozenset({"scale", "is_causal"}))  # torch 2.10
    assert takes_variable_lengths(device, dtype, head_dim) is False
