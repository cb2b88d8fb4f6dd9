"""Logits of response tokens, and every gradient, are those of the whole model's forward: on any layout, tied or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dppo.models.policy_head import PolicyHead, hidden_states_only
from megatron_dppo.models.sharding import unwrapped
from tests.models.policy_runs import LOSS_MASK, TOKENS, TWO_RANK_LAYOUTS, wrapped_policy
from tests.models.tiny_policies import write_tiny_hf_model
from tests.rank_pool import RankPools


def rows_of(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero()[:, 0]


def forward_backward(
    chunks: list[Any], through_head: bool, mask: torch.Tensor
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """The mask's logits (on the last stage) and all main gradients of a random linear function of those logits."""
    kept: list[torch.Tensor] = []
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)

    def forward_step(_: Iterator, model: Any) -> tuple[torch.Tensor, Any]:
        if not through_head:
            return model(TOKENS, positions, None), lambda output: loss(output[mask])
        with hidden_states_only(model):
            output = model(TOKENS, positions, None)

        def loss_of_hidden(output: torch.Tensor) -> Any:
            head = PolicyHead(model)
            return loss(head.logits(head.response_hidden(output, rows_of(mask), mask.shape)))

        return output, loss_of_hidden

    def loss(logits_nV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        kept.append(logits_nV.detach().clone())
        generator = torch.Generator().manual_seed(parallel_state.get_tensor_model_parallel_rank())
        probe = torch.randn(logits_nV.shape, generator=generator)
        return (probe * logits_nV).sum(), torch.tensor(1, dtype=torch.int), {}

    for chunk in chunks:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=chunks,
        num_microbatches=1,
        seq_length=TOKENS.shape[1],
        micro_batch_size=TOKENS.shape[0],
        forward_only=False,
    )
    gradients = {
        f"{i}.{name}": parameter.main_grad.clone()
        for i, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    return (kept[0] if kept else None), gradients


def _both_ways(folder: str, layout: dict[str, Any], overrides: dict[str, Any]) -> list[str]:
    """Names of what differs; also checks that there was something to differ."""
    chunks = wrapped_policy(folder, layout, torch.float32, **overrides)
    logits, gradients = forward_backward(chunks, False, LOSS_MASK)
    head_logits, head_gradients = forward_backward(chunks, True, LOSS_MASK)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    if logits is not None:
        assert logits.shape[0] == int(LOSS_MASK.sum())
        gradients["logits"], head_gradients["logits"] = logits, head_logits
    # The products are the same in fp32; sums over other shapes may add up in another order. A sum over ranks left out or
    # done twice is an error of 50 % and more.
    return [
        name
        for name, expected in gradients.items()
        if (head_gradients[name] - expected).abs().max() > 1e-5 * expected.abs().max()
    ]


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_tied"])
def test_one_rank(ranks: RankPools, tmp_path: Path, kind: str) -> None:
    assert ranks(1).run(_both_ways, str(write_tiny_hf_model(kind, tmp_path)), {}, {}) == [[]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout", "overrides"),
    [
        ("qwen3", "TP2", {}),
        ("qwen3_tied", "TP2", {}),
        ("qwen3", "TP2 without sequence parallelism", {}),
        ("qwen3_tied", "TP2 without sequence parallelism", {}),
        ("qwen3_tied", "PP2", {}),  # two copies of the tied weight, whose gradients Megatron adds up
        ("llama", "PP2", {}),
        (
            "qwen3_tied",
            "TP2",
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        ),
    ],
)
def test_two_ranks(ranks: RankPools, tmp_path: Path, kind: str, layout: str, overrides: dict[str, Any]) -> None:
    folder = str(write_tiny_hf_model(kind, tmp_path))
    assert ranks(2).run(_both_ways, folder, TWO_RANK_LAYOUTS[layout], overrides) == [[], []]


def _no_tokens(folder: str, layout: dict[str, Any]) -> list[str]:
    chunks = wrapped_policy(folder, layout, torch.float32)
    logits, gradients = forward_backward(chunks, True, torch.zeros_like(LOSS_MASK))
    assert logits is not None
    assert logits.shape == (0, PolicyHead(chunks[0]).weight.shape[0])
    return [name for name, gradient in gradients.items() if gradient.any()]


@pytest.mark.parametrize("layout", [pytest.param("TP2", marks=pytest.mark.slow), "one rank"])
def test_a_micro_batch_without_tokens_has_zero_gradients(ranks: RankPools, tmp_path: Path, layout: str) -> None:
    folder = str(write_tiny_hf_model("qwen3_tied", tmp_path))
    size = 1 if layout == "one rank" else 2
    assert ranks(size).run(_no_tokens, folder, TWO_RANK_LAYOUTS.get(layout, {})) == size * [[]]


def _bf16_policy(folder: str) -> None:
    (chunk,) = wrapped_policy(folder, {}, torch.bfloat16)
    arguments = (TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None)
    with hidden_states_only(chunk):
        hidden = chunk(*arguments)
    assert hidden.dtype is torch.bfloat16
    logits = chunk(*arguments)  # as it was before, upcast included
    assert logits.dtype is torch.float32
    head = PolicyHead(chunk)
    assert torch.equal(
        head.logits(head.response_hidden(hidden, rows_of(LOSS_MASK), LOSS_MASK.shape)).float(), logits[LOSS_MASK]
    )


def _misuse(folder: str) -> list[str]:
    (chunk,) = wrapped_policy(folder, {}, torch.float32)
    messages = []
    head = PolicyHead(chunk)
    logits = chunk(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None)
    for output, mask in ((logits, LOSS_MASK), (logits[..., :64], LOSS_MASK[:, :-1])):
        with pytest.raises(ValueError, match="hidden_states_only") as error:
            head.response_hidden(output, rows_of(mask), mask.shape)
        messages.append(str(error.value))
    with pytest.raises(RuntimeError, match="interrupted"), hidden_states_only(chunk):
        raise RuntimeError("interrupted")
    assert "forward" not in vars(unwrapped([chunk])[0].output_layer)
    unwrapped([chunk])[0].post_process = False
    with pytest.raises(ValueError, match="last pipeline stage"):
        PolicyHead(chunk)
    return messages


def test_hidden_states_stay_in_the_models_dtype(ranks: RankPools, tmp_path: Path) -> None:
    ranks(1).run(_bf16_policy, str(write_tiny_hf_model("qwen3_tied", tmp_path)))


def test_misuse_is_named(ranks: RankPools, tmp_path: Path) -> None:
    (messages,) = ranks(1).run(_misuse, str(write_tiny_hf_model("qwen3", tmp_path)))
    assert "has shape (2, 16, 256)" in messages[0]
    assert "tokens of (2, 15) ask for hidden states (2, 15, 64)" in messages[1]
