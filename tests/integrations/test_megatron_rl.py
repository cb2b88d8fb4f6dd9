"""The adapter for Megatron-LM's train_rl.py, called with what its ``forward_step`` passes (records/megatron_rl.json)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_dppo import DPPOConfig
from megatron_dppo.errors import ConfigError, LossInputError
from megatron_dppo.integrations.megatron_rl import RECORDED_VERSIONS, make_grpo_loss, make_selective_log_softmax
from tests.integrations.recording import load
from tests.integrations.rollouts import CONFIG, PADDED, TEMPERATURE, VOCAB, own_step, packed_logits
from tests.integrations.stand_ins import install

RECORD = load("megatron_rl")
LAYOUTS = ("unpacked", "packed")


@pytest.fixture(autouse=True)
def _megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"megatron.core.package_info": {"__version__": f"{RECORD['version']}+d98e8a64d"}})


def call_of(layout: str, logits: torch.Tensor, **changed: Any) -> dict[str, Any]:
    """The recorded call, with log-probs [b, s - 1] that have a gradient."""
    rows = RECORD[layout]["rows"]
    placed = torch.where(rows[..., None] >= 0, logits[rows.clamp(min=0)] / TEMPERATURE, 0.0)[..., :VOCAB]
    log_probs = make_selective_log_softmax(VOCAB)(placed[:, :-1], RECORD[layout]["tokens"][:, 1:])
    return {**RECORD[layout]["call"], "current_logprobs": log_probs, **changed}


def drawn(layout: str) -> torch.Tensor:
    """[b, s - 1] tokens of the mask that the engine drew: not the end that the trainer appends to every sample."""
    has_row = RECORD[layout]["rows"][:, 1:] >= 0
    return RECORD[layout]["loss_mask"].bool() & has_row


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_that_of_our_own_step(layout: str) -> None:
    logits = packed_logits().requires_grad_()
    call = call_of(layout, logits)
    mask = drawn(layout)
    torch.testing.assert_close(
        call["current_logprobs"][mask], RECORD[layout]["call"]["current_logprobs"][mask], rtol=0, atol=2e-6
    )
    losses, *_ = make_grpo_loss(CONFIG, backend="torch")(**call)
    # loss_func of train_rl.py: the sum over its mask, and the mask's size, by which Megatron divides. Unpacked, the mask also
    # holds the ends; their anchor is a recomputation that the record's call shows, and they are left out here.
    (losses * mask).sum().backward()
    mean, gradient = own_step(dataclasses.replace(CONFIG, temperature=TEMPERATURE), VOCAB)
    tokens = int(mask.sum())
    assert abs((losses * mask).sum().item() / tokens - mean.item()) < 1e-6
    assert float((logits.grad / tokens - gradient).abs().max()) < 1e-6
    assert float(gradient.abs().max()) > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_train_rl_sums_over_its_mask_and_counts_it(layout: str) -> None:
    mask, known = RECORD[layout]["loss_mask"], RECORD[layout]["known"]
    assert (torch.arange(float(mask.numel())).view_as(mask) * mask).sum() == known["sum"]
    assert mask.sum() == known["num_tokens"] == 20  # 16 drawn by the engine and four ends
    assert int(drawn(layout).sum()) == 16


def test_a_token_that_the_engine_did_not_draw_gets_no_update_where_it_can_be_told() -> None:
    ends = RECORD["packed"]["loss_mask"].bool() & ~drawn("packed")
    assert bool(
        (RECORD["packed"]["call"]["inference_logprobs"][ends] == 0).all()
    )  # certainty, in train_rl.py's packed rows
    losses, _, _, _, above, below = make_grpo_loss(CONFIG)(**call_of("packed", packed_logits()))
    assert not losses[ends].any()
    assert not (above | below)[ends].any()
    # Unpacked rows hold the recomputation there, and nothing tells them apart.
    unpacked = RECORD["unpacked"]["call"]
    ends = RECORD["unpacked"]["loss_mask"].bool() & ~drawn("unpacked")
    torch.testing.assert_close(unpacked["inference_logprobs"][ends], unpacked["old_logprobs"][ends], rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_results_are_what_train_rl_logs(layout: str) -> None:
    call = call_of(layout, packed_logits(), kl_beta=0.5)
    losses, kl, ratios, entropy, above, below = make_grpo_loss(CONFIG)(**call)
    assert {x.shape for x in (losses, kl, ratios, entropy, above, below)} == {call["current_logprobs"].shape}
    mask = drawn(layout)
    without_kl, *_ = make_grpo_loss(CONFIG)(**{**call, "kl_beta": 0.0})
    torch.testing.assert_close((losses - without_kl)[mask], 0.5 * kl[mask], rtol=1e-5, atol=1e-6)
    difference = call["ref_logprobs"] - call["current_logprobs"]
    torch.testing.assert_close(kl, difference.exp() - difference - 1, rtol=1e-5, atol=1e-6)
    assert bool(above[mask].any())
    assert bool(below[mask].any())
    assert not (above & below).any()


def test_bf16_logits_give_fp32_log_probs() -> None:
    assert RECORD["bf16"]["dtype"] == "torch.bfloat16"
    rows = RECORD["unpacked"]["rows"]
    logits = torch.where(rows[..., None] >= 0, packed_logits()[rows.clamp(min=0)] / TEMPERATURE, 0.0).bfloat16()
    tokens, mask = RECORD["unpacked"]["tokens"][:, 1:], drawn("unpacked")
    ours = make_selective_log_softmax(VOCAB)(logits[:, :-1], tokens)
    truth = logits[:, :-1, :VOCAB].double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert logits.shape[-1] == PADDED
    assert float((ours - truth)[mask].abs().max()) < 2e-6
    assert float((RECORD["bf16"]["log_probs"] - truth)[mask].abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inference_logprobs": None}, "--rl-inference-logprobs-is-correction"),
        ({"inference_logprobs": torch.zeros(4, 9)}, "with an engine that returns log-probs"),
        ({"entropy_weight": 0.1}, "--grpo-entropy-term-weight"),
        ({"is_truncation_coef": 2.0}, "--rl-importance-sampling-truncation-coef"),
        ({"current_logprobs": torch.zeros(4, 9).bfloat16()}, "log_probs must be float32"),
    ],
)
def test_what_it_cannot_do_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, LossInputError), match=message):
        make_grpo_loss(CONFIG)(**call_of("unpacked", packed_logits(), **changed))


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RECORD["version"] in RECORDED_VERSIONS
    with pytest.raises(ConfigError, match=r"temperature=0\.5 is not read here"):
        make_grpo_loss(DPPOConfig(temperature=0.5))
    install(monkeypatch, {"megatron.core.package_info": {"__version__": "0.16.1"}})
    with pytest.raises(ConfigError, match=r"train_rl\.py, megatron-core 0\.16\.1: .* known of 0\.20\.0 only"):
        make_grpo_loss(CONFIG)
