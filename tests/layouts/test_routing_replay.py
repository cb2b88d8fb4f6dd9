"""Replayed experts reach the tokens that they were recorded for, in every layout: loss and gradients are a reference's.

The choices are random, so that a token that chose for itself, or got another token's experts, would change everything. The
reference is a Hugging Face model that is forced to the same experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy
from megatron_dppo.models.hf.config import load_hf_config
from megatron_dppo.models.hf.weights import export_hf_weights, load_hf_weights
from megatron_dppo.models.routing_replay import RoutingReplay
from tests.models.forced_routing import put_forced_gradients_in_place_of_weights, random_choices
from tests.models.policy_runs import GRADIENT_TOLERANCE, TWO_RANK_LAYOUTS, Inputs, packed, rows
from tests.models.tiny_policies import tiny_hf_model, write_tiny_hf_model
from tests.rank_pool import RankPools

SHAPE = {"vocab_size": 256, "num_hidden_layers": 4, "num_experts": 6, "num_experts_per_tok": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{name: TWO_RANK_LAYOUTS[name] for name in ("TP2", "PP2", "PP2 VPP2", "CP2", "EP2", "TP2 EP2")},
    "EP2 allgather": {**TWO_RANK_LAYOUTS["EP2"], "moe_token_dispatcher": "allgather"},
    "TP2 EP2 allgather": {**TWO_RANK_LAYOUTS["TP2 EP2"], "moe_token_dispatcher": "allgather"},
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "no recompute": {},
    "full recompute": FULL,
    "full recompute, outputs freed once sent": {**FULL, "deallocate_pipeline_outputs": True},
    "MoE recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def _sequences(batching: str) -> list[torch.Tensor]:
    """Eight of them. Padded: one length for all, as a pipeline needs. Packed: four packs of two."""
    generator = torch.Generator().manual_seed(3)
    lengths = [16] * 8 if batching == "padded" else [5, 11, 9, 7, 4, 12, 10, 6]
    return [torch.randint(0, 250, (length,), generator=generator) for length in lengths]


def _choices(sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    shape = (SHAPE["num_hidden_layers"], SHAPE["num_experts"], SHAPE["num_experts_per_tok"])
    return [random_choices(len(sequence), *shape, seed=seed) for seed, sequence in enumerate(sequences)]


def _micro_batches(batching: str) -> list[tuple[Inputs, torch.Tensor]]:
    """Each with its [1, S, layers, k] choices, as this context-parallel rank computes it."""
    sequences = _sequences(batching)
    choices = _choices(sequences)
    if batching == "padded":
        inputs, owners = rows(torch.stack(sequences)), [[index] for index in range(len(sequences))]
    else:
        owners = [[index, index + 1] for index in range(0, len(sequences), 2)]
        inputs = [packed([sequences[index] for index in pack]) for pack in owners]
    made = []
    for x, pack in zip(inputs, owners, strict=True):
        whole = choices[0].new_zeros(x.whole_length, *choices[0].shape[1:])
        starts = [0] if x.packed is None else x.packed.cu_seqlens_q.tolist()
        for index, start in zip(pack, starts, strict=False):
            whole[start : start + len(choices[index])] = choices[index]
        made.append((x, whole[x.own][None]))
    return made


def _run(folder: str, layout: dict[str, Any], batching: str, overrides: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Summed loss of this rank's micro-batches (0 but on the last stage) and the gradients of the mean loss, by HF name."""
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=1)
    chunks = build_policy(load_hf_config(folder), parallel, torch.float32, **overrides)
    load_hf_weights(chunks, folder)
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk).train() for chunk in chunks]
    replay = RoutingReplay(wrapped)
    micro_batches = _micro_batches(batching)
    mine = micro_batches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    total = torch.zeros(())

    def forward_step(batches: Iterator, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        x, choices = next(batches)
        with replay.forward_pass(chunk, choices[:, :, list(replay.layers)]):
            losses = chunk(x.tokens, x.positions, None, labels=x.labels, packed_seq_params=x.packed)

        def loss_func(losses_bs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
            loss = losses_bs[x.kept].sum()
            total.add_(loss.detach())
            return loss, x.kept.sum().int(), {}

        return losses, loss_func

    config.variable_seq_lengths = batching == "packed"
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(mine) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(mine),
        seq_length=mine[0][0].whole_length,
        micro_batch_size=1,
        forward_only=False,
    )
    # Random choices: a router agrees with the 2 of 6 experts in one of 15 cases.
    assert 0.8 < replay.replayed_differently() < 1.0
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.copy_(parameter.main_grad)
    return total.item(), {name: tensor.clone() for name, tensor in export_hf_weights(chunks)}


def _reference(batching: str, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    model = tiny_hf_model("qwen3_moe", **SHAPE)
    sequences = _sequences(batching)
    loss = put_forced_gradients_in_place_of_weights(model, sequences, _choices(sequences))
    model.save_pretrained(folder)
    return loss * sum(len(sequence) - 1 for sequence in sequences), load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("layout", "batching", "recompute"),
    [
        ("TP2 EP2", "padded", "no recompute"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("TP2", "packed", "full recompute"),
                ("TP2 EP2 allgather", "packed", "MoE recompute"),
                ("EP2", "packed", "full recompute"),
                ("EP2 allgather", "padded", "full recompute"),
                ("PP2", "padded", "full recompute, outputs freed once sent"),
                ("PP2", "packed", "MoE recompute"),
                ("PP2 VPP2", "padded", "full recompute"),
                ("PP2 VPP2", "packed", "no recompute"),
                ("CP2", "padded", "no recompute"),
                ("CP2", "packed", "full recompute"),
            )
        ),
    ],
)
def test_loss_and_gradients_are_those_of_a_reference_with_the_same_experts(
    layout: str, batching: str, recompute: str, ranks: RankPools, tmp_path: Path
) -> None:
    source = write_tiny_hf_model("qwen3_moe", tmp_path / "weights", **SHAPE)
    results = ranks(2).run(_run, str(source), LAYOUTS[layout], batching, RECOMPUTE[recompute])
    expected_loss, expected = _reference(batching, tmp_path / "gradients")
    losses = {loss for loss, _ in results if loss}
    # The ranks of a pipeline or of tensor parallelism share one loss; data- and context-parallel ranks add theirs up.
    shared = layout.startswith(("TP", "PP"))
    assert (max(losses) if shared else sum(losses)) == pytest.approx(expected_loss, rel=1e-5)
    for _, gradients in results:
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            tolerance = GRADIENT_TOLERANCE * expected[name].abs().max().item()
            torch.testing.assert_close(
                gradient, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
