"""The embedded engine gives the same samples' distribution for every layout of the policy over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from megatron.core import parallel_state

from megatron_dppo.distributed.layout import ParallelConfig
from megatron_dppo.rollout.embedded.engine import EmbeddedEngine
from megatron_dppo.rollout.sample import Sample, SamplingParams
from tests.rollout.embedded.embedded_subject import build_tiny_policy, embedded_subject
from tests.rollout.engine_contract import CONTRACT, assert_log_probs_match, make_prompts

TWO_RANKS = {
    "tp2": ("qwen3", ParallelConfig(tensor_model_parallel_size=2)),
    "tp2_without_sequence_parallel": ("llama", ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=False)),
    "tp2_ep2": ("qwen3_moe", ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2)),
    "tp2_etp2": ("qwen3_moe", ParallelConfig(tensor_model_parallel_size=2)),
    "dp2_ep2": ("qwen3_moe", ParallelConfig(expert_model_parallel_size=2)),
    "pp2_tied": ("qwen3_tied", ParallelConfig(pipeline_model_parallel_size=2)),
    "cp2": ("qwen3", ParallelConfig(context_parallel_size=2)),
    "pp2_vpp2": (
        "qwen3_moe",
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        {"num_hidden_layers": 4},
    ),
}
FOUR_RANKS = {
    "tp2_pp2": ("qwen3", ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "tp2_ep4": ("qwen3_moe", ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=4)),
    "pp2_ep2": ("qwen3_moe", ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)),
}


def _as_tuple(sample: Sample) -> tuple:
    experts = None if sample.routed_experts is None else sample.routed_experts.tolist()
    return (tuple(sample.response_ids), tuple(sample.rollout_log_probs), sample.finish_reason, sample.group_id, experts)


def _keep_contract(kind: str, parallel: ParallelConfig, overrides: dict[str, Any] | None = None) -> None:
    subject = embedded_subject(kind, parallel, **(overrides or {}))
    for check in CONTRACT:
        check(subject)


# The others give the tokens of one rank, below, on every push; what else the contract says does not depend on the layout.
CONTRACT_ON_EVERY_PUSH = {"tp2_ep2", "dp2_ep2", "cp2", "pp2_vpp2", "pp2_ep2"}


def _cases(layouts: Iterable[str]) -> list[ParameterSet]:
    nightly = [() if name in CONTRACT_ON_EVERY_PUSH else pytest.mark.nightly for name in layouts]
    return [pytest.param(name, marks=marks) for name, marks in zip(layouts, nightly, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", _cases(TWO_RANKS))
def test_contract_on_two_ranks(ranks, layout):
    ranks(2).run(_keep_contract, *TWO_RANKS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", _cases(FOUR_RANKS))
def test_contract_on_four_ranks(ranks, layout):
    ranks(4).run(_keep_contract, *FOUR_RANKS[layout])


def _generate_unevenly(kind: str, parallel: ParallelConfig, stop_early: bool) -> tuple[int, list[tuple]]:
    """Replica 0 has three prompts in batches of two, replica 1 one prompt, further replicas none."""
    subject = embedded_subject(kind, parallel, max_batch_size=2)
    replica = parallel_state.get_data_parallel_rank()
    prompts = make_prompts(subject.vocab_size, {0: [3, 9, 5], 1: [2]}.get(replica, []), seed=replica)
    stop = tuple(range(0, subject.vocab_size, 4)) if stop_early else ()
    samples = subject.engine.generate(prompts, SamplingParams(max_new_tokens=6, stop_token_ids=stop, seed=23))
    assert len(samples) == len(prompts)
    assert_log_probs_match(subject, samples, 1.0)
    if not stop_early:
        assert all(len(sample.response_ids) == 6 for sample in samples)
    return replica, [_as_tuple(sample) for sample in samples]


@pytest.mark.parametrize("stop_early", [False, True])
def test_replicas_that_share_experts_may_have_uneven_work(ranks, stop_early):
    results = ranks(2).run(_generate_unevenly, *TWO_RANKS["dp2_ep2"], stop_early)
    assert [replica for replica, _ in results] == [0, 1]


@pytest.mark.slow
def test_uneven_replicas_of_several_ranks_that_share_experts(ranks):
    results = ranks(4).run(_generate_unevenly, *FOUR_RANKS["tp2_ep4"], False)
    assert results[0] == results[1], "ranks of one replica return the same samples"
    assert results[2] == results[3]


def _generate_with_one_seed(
    kind: str, parallel: ParallelConfig, overrides: dict[str, Any] | None = None
) -> tuple[int, list[tuple]]:
    subject = embedded_subject(kind, parallel, **(overrides or {}))
    params = SamplingParams(max_new_tokens=8, samples_per_prompt=4, seed=29, return_routed_experts="moe" in kind)
    samples = subject.engine.generate(make_prompts(subject.vocab_size, [4, 7]), params)
    return parallel_state.get_data_parallel_rank(), [_as_tuple(sample) for sample in samples]


@pytest.mark.parametrize("layout", ["tp2", "tp2_ep2", "pp2_tied", "cp2", "pp2_vpp2"])
def test_all_ranks_of_a_replica_return_the_same_samples(ranks, layout):
    first, second = ranks(2).run(_generate_with_one_seed, *TWO_RANKS[layout])
    assert first == second


def test_replicas_draw_different_responses_to_the_same_prompts(ranks):
    (_, first), (_, second) = ranks(2).run(_generate_with_one_seed, "qwen3", ParallelConfig())
    assert all(a[0] != b[0] for a, b in zip(first, second, strict=True))


def _tokens_per_layout(kind: str, parallel: ParallelConfig) -> list[tuple]:
    return [sample[0] for sample in _generate_with_one_seed(kind, parallel)[1]]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, "tp2_ep2"),
        *(
            pytest.param(2, name, marks=pytest.mark.slow)
            for name in ("tp2_etp2", "tp2_without_sequence_parallel", "pp2_tied")
        ),
        *(pytest.param(4, name, marks=pytest.mark.slow) for name in ("tp2_pp2", "tp2_ep4")),
    ],
)
def test_a_seed_gives_the_same_responses_for_every_layout(ranks, world_size, layout):
    # The same uniform numbers and distributions within ~1e-6: 64 tokens differ somewhere with a chance below 1e-4.
    kind, parallel = {**TWO_RANKS, **FOUR_RANKS}[layout]
    (alone,) = ranks(1).run(_tokens_per_layout, kind, ParallelConfig())
    assert ranks(world_size).run(_tokens_per_layout, kind, parallel)[0] == alone


def _distance_to_full_forward(kind: str, parallel: ParallelConfig) -> float:
    """Largest difference between rollout log-probs and those of one training-style forward pass of the same model."""
    model_chunks, hf_model = build_tiny_policy(kind, parallel)
    vocab_size = hf_model.config.vocab_size
    engine = EmbeddedEngine(model_chunks, vocab_size)
    # Prompts and responses add up to an even length, as sequence parallelism needs in training.
    samples = engine.generate(make_prompts(vocab_size, [5, 8, 3]), SamplingParams(max_new_tokens=13, seed=31))
    worst = 0.0
    for sample in samples:
        ids = torch.tensor([sample.token_ids + [0] * (len(sample.token_ids) % 2)])
        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            logits_1SV = model_chunks[0](ids, positions, None, runtime_gather_output=True)
        first, length = len(sample.prompt.token_ids) - 1, len(sample.response_ids)
        log_probs_TV = logits_1SV[0, first : first + length, :vocab_size].log_softmax(-1)
        expected = log_probs_TV.gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(sample.rollout_log_probs)).abs().max().item())
    return worst


@pytest.mark.parametrize("layout", ["tp2", "tp2_ep2", "dp2_ep2"])
def test_rollout_log_probs_are_those_of_a_training_forward_pass(ranks, layout):
    # The same weights through other shapes of the same kernels: a few roundings of fp32 logits below 8, i.e. ~2e-6.
    assert max(ranks(2).run(_distance_to_full_forward, *TWO_RANKS[layout])) < 1e-5


def _refuse_allgather_dispatcher() -> str:
    model_chunks, hf_model = build_tiny_policy("qwen3_moe", ParallelConfig(expert_model_parallel_size=2))
    model_chunks[0].config.moe_token_dispatcher_type = "allgather"
    with pytest.raises(ValueError, match="alltoall") as error:
        EmbeddedEngine(model_chunks, hf_model.config.vocab_size)
    return str(error.value)


def test_a_dispatcher_that_needs_equal_token_counts_is_refused_where_replicas_share_experts(ranks):
    assert all("allgather" in message for message in ranks(2).run(_refuse_allgather_dispatcher))
