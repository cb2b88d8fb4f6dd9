"""Building: sizes that are right without allocating them, nothing left unset, one clear error first."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy, initialize_randomly, padded_vocab_size
from megatron_dppo.models.hf.config import load_hf_config
from tests.models.published_configs import QWEN3_30B_A3B
from tests.models.tiny_policies import tiny_hf_config
from tests.rank_pool import RankPools


def test_the_vocabulary_is_padded_to_whole_tiles_per_rank() -> None:
    assert padded_vocab_size(256, 2) == 256
    assert padded_vocab_size(250, 1) == 256
    assert padded_vocab_size(151936, 1) == 151936
    assert padded_vocab_size(151936, 2) == 152064


def _meta_policy() -> tuple[int, set[str]]:
    initialize_model_parallel(ParallelConfig(), seed=1)
    chunks = build_policy(load_hf_config(QWEN3_30B_A3B), ParallelConfig(), torch.bfloat16, device="meta")
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    return sum(p.numel() for p in parameters), {f"{p.device.type} {p.dtype}" for p in parameters}


@pytest.mark.slow  # the modules of 48 x 128 experts
def test_a_30b_mixture_of_experts_is_built_without_allocating_it(ranks: RankPools) -> None:
    hidden, layers, experts, expert_ffn, vocabulary, head = 2048, 48, 128, 768, 151936, 128
    attention = hidden * (32 + 4 + 4) * head + 32 * head * hidden + 2 * head  # q k v, o, query and key norms
    layer = attention + hidden * experts + experts * 3 * hidden * expert_ffn + 2 * hidden  # router, experts, norms
    expected = 2 * vocabulary * hidden + layers * layer + hidden
    assert expected == 30_532_122_624, "as published: 30.5 B"
    assert ranks(1).run(_meta_policy) == [(expected, {"meta torch.bfloat16"})]


def _tiny_sizes() -> list[int]:
    initialize_model_parallel(ParallelConfig(), seed=1)
    sizes = []
    for device in ("meta", "cpu"):
        (model,) = build_policy(tiny_hf_config("qwen3_moe"), ParallelConfig(), torch.float32, device=device)
        assert all(parameter.device.type == device for parameter in model.parameters())
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    return sizes


def test_a_meta_policy_has_the_parameters_of_a_real_one(ranks: RankPools) -> None:
    ((meta, real),) = ranks(1).run(_tiny_sizes)
    assert meta == real > 0


def _set_and_unset() -> tuple[bool, bool, bool]:
    initialize_model_parallel(ParallelConfig(), seed=1)
    chunks = build_policy(tiny_hf_config("qwen3_moe"), ParallelConfig(), torch.float32)
    unset = all(parameter.isnan().all() for parameter in chunks[0].parameters())
    initialize_randomly(chunks, seed=1)
    finite = all(parameter.isfinite().all() for parameter in chunks[0].parameters())
    padding = [chunks[0].embedding.word_embeddings.weight[250:], chunks[0].output_layer.weight[250:]]
    return unset, finite, all(bool((rows == 0).all()) and rows.shape[0] == 6 for rows in padding)


def test_weights_are_nan_until_set_and_padded_rows_zero_after(ranks: RankPools) -> None:
    assert ranks(1).run(_set_and_unset) == [(True, True, True)]


def _build_error() -> str:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    initialize_model_parallel(parallel, seed=1)
    try:
        build_policy(
            tiny_hf_config("llama", hidden_size=144, num_attention_heads=9, num_key_value_heads=3),
            parallel,
            torch.float32,
        )
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_model_that_does_not_fit_is_refused_before_building(ranks: RankPools) -> None:
    assert all("num_attention_heads=9" in message for message in ranks(2).run(_build_error))
