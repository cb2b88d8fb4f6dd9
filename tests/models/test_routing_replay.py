"""Routing replay on one rank: the recorded experts and no others, where it was asked for and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from megatron_dppo.distributed.layout import ParallelConfig, initialize_model_parallel
from megatron_dppo.models.build import build_policy, initialize_randomly
from megatron_dppo.models.routing_replay import RoutingRecorder, RoutingReplay
from tests.models.forced_routing import random_choices
from tests.models.tiny_policies import tiny_hf_config

LAYERS, EXPERTS, K = 2, 4, 2
BATCH, LENGTH = 2, 6
TOKENS = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) * 7 % 250
POSITIONS = torch.arange(LENGTH).expand(BATCH, LENGTH)


def _policy(**overrides: Any) -> GPTModel:
    initialize_model_parallel(ParallelConfig(), seed=1)
    chunks = build_policy(tiny_hf_config("qwen3_moe"), ParallelConfig(), torch.float32, **overrides)
    initialize_randomly(chunks, seed=1)
    with torch.no_grad():
        for name, parameter in chunks[0].named_parameters():
            # As initialised, experts add so little to the residual stream that a wrong one would hardly show.
            parameter.mul_(1.0 if "norm" in name else 8.0)
    return chunks[0].train()


def _choices(seed: int) -> torch.Tensor:
    """[B, S, layers, k]; the last token of each row has none."""
    return torch.stack([random_choices(LENGTH, LAYERS, EXPERTS, K, seed=10 * seed + row) for row in range(BATCH)])


def _forward(model: GPTModel) -> torch.Tensor:
    return model(TOKENS, POSITIONS, None)


def _routing_maps(model: GPTModel, maps: list[torch.Tensor]) -> None:
    """Append to ``maps``, layer by layer, the [tokens, experts] map that each forward pass dispatches tokens by."""
    for layer in model.decoder.layers:
        layer.mlp.router.register_forward_hook(lambda _, __, output: maps.append(output[1]))


def _expected_maps(choices_BSLk: torch.Tensor) -> torch.Tensor:
    """[layers, tokens in the router's order, experts] bool."""
    one_hot = torch.nn.functional.one_hot(choices_BSLk.long(), EXPERTS).any(dim=-2)
    return one_hot.permute(2, 1, 0, 3).flatten(1, 2)


def _exactly_the_recorded_experts() -> None:
    model = _policy()
    replay, choices, maps = RoutingReplay([model]), _choices(1), []
    own = RoutingRecorder([model])
    with torch.no_grad(), own.recording():
        _forward(model)
        last_token_of_rows = own.take(BATCH)[:, -1]
    _routing_maps(model, maps)
    with replay.forward_pass(model, choices):
        _forward(model)
    expected = choices.clone()
    # Layer 0's own choice for an unrecorded token does not depend on how the others were routed; layer 1's may.
    expected[:, -1] = last_token_of_rows
    recorded = torch.arange(BATCH * LENGTH) < BATCH * (LENGTH - 1)  # the router's order is sequence-first
    seen, wanted = torch.stack(maps), _expected_maps(expected)
    assert torch.equal(seen[0], wanted[0])
    assert torch.equal(seen[:, recorded], wanted[:, recorded])
    assert (seen.sum(dim=-1) == K).all()


def test_tokens_go_to_exactly_the_recorded_experts(ranks):
    ranks(1).run(_exactly_the_recorded_experts)


def _record_then_replay() -> None:
    model = _policy()
    recorder, replay = RoutingRecorder([model]), RoutingReplay([model])
    with torch.no_grad(), recorder.recording():
        before = _forward(model)
        choices = recorder.take(BATCH)
    assert choices.shape == (BATCH, LENGTH, LAYERS, K)
    with replay.forward_pass(model, choices):
        assert torch.equal(_forward(model), before)
    assert replay.replayed_differently() == 0.0
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.mlp.router.weight.neg_()
    changed = _forward(model)
    with replay.forward_pass(model, choices):
        # The old experts with the new router's weights for them: neither the old output nor what it would give itself.
        replayed = _forward(model)
    assert not torch.allclose(replayed, before)
    assert not torch.allclose(replayed, changed)
    # Most likely experts have become the least likely ones: k = 2 of 4, so no choice is left.
    assert replay.replayed_differently() > 0.9
    assert replay.replayed_differently() == 0.0, "counts start anew with every call"
    assert torch.equal(_forward(model), changed), "without forward_pass the router chooses"


def test_recorded_choices_replay_the_same_forward_and_survive_new_weights(ranks):
    ranks(1).run(_record_then_replay)


def _gradients(overrides: dict[str, Any], order: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of two micro-batches with the same tokens and other choices, and of a forward pass without replay in between."""
    model = _policy(**overrides)
    replay = RoutingReplay([model])
    outputs = []
    for seed in (1, 2):
        with replay.forward_pass(model, _choices(seed)):
            outputs.append(_forward(model))
    free = _forward(model)
    gradients = []
    for index in {"first in, first out": (0, 1), "last in, first out": (1, 0)}[order]:
        model.zero_grad()
        outputs[index].log_softmax(-1)[..., 5].sum().backward()
        gradients.append((index, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert torch.equal(_forward(model), free), "a backward pass must not leave its choices behind"
    return [output.detach() for output in outputs], [gradient for _, gradient in sorted(gradients, key=lambda g: g[0])]


def _recompute_is_replayed() -> None:
    from megatron.core import parallel_state

    outputs, expected = _gradients({}, "first in, first out")
    assert not torch.allclose(expected[0], expected[1], rtol=0.1)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    selective = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    for overrides in (full, {**full, "recompute_num_layers": 2}, selective):
        for order in ("first in, first out", "last in, first out"):
            parallel_state.destroy_model_parallel()
            again, gradients = _gradients(overrides, order)
            # The same operations in the same order on the same numbers.
            assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True)), (overrides, order)


def test_what_the_backward_recomputes_is_routed_as_its_own_micro_batch(ranks):
    ranks(1).run(_recompute_is_replayed)


def _bad_choices() -> None:
    model = _policy()
    replay, good = RoutingReplay([model]), _choices(1)

    def refused(choices: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message), replay.forward_pass(model, choices):
            _forward(model)

    refused(good[:, :, :1], r"shape \(2, 6, 1, 2\), expected \[B, S, 2 layers of this rank, 2 experts per token\]")
    refused(good[0], r"shape \(6, 2, 2\)")
    refused(good[:, :-1], "routes 12 tokens, but experts for 10 were given")
    for bad in ([1, 1], [0, EXPERTS], [-1, 2]):
        choices = good.clone()
        choices[1, 3, 1] = torch.tensor(bad)
        refused(choices, rf"row 1, token 3, layer 1 is \[{bad[0]}, {bad[1]}\]: expected 2 different experts of 4")
    with (
        pytest.raises(RuntimeError, match="layer 0 asked for its replayed experts 0 times"),
        replay.forward_pass(model, good),
    ):
        pass
    with pytest.raises(RuntimeError, match="2 times"), replay.forward_pass(model, good):
        _ = _forward(model), _forward(model)
    with pytest.raises(ValueError, match="not made for"), replay.forward_pass(torch.nn.Linear(1, 1), good):
        pass


def test_choices_that_cannot_be_replayed_are_refused_by_position(ranks):
    ranks(1).run(_bad_choices)


def _unsupported_policies() -> None:
    model = _policy()
    model.config.moe_router_fusion = True
    with pytest.raises(ValueError, match="moe_router_fusion"):
        RoutingReplay([model])
    model.config.moe_router_fusion = False
    (dense,) = build_policy(tiny_hf_config("qwen3"), ParallelConfig(), torch.float32)
    for replays_or_records in (RoutingReplay, RoutingRecorder):
        with pytest.raises(ValueError, match="dense"):
            replays_or_records([dense])


def test_policies_that_cannot_replay_are_refused(ranks):
    ranks(1).run(_unsupported_policies)
