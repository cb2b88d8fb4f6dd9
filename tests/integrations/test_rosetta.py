"""What other implementations of DPPO do otherwise, token by token, in what they computed themselves (records/rosetta_*)."""

from __future__ import annotations

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs, TopK
from tests.integrations.recording import load
from tests.integrations.rosetta import DELTAS, READINGS, Reading, ours
from tests.integrations.rosetta_tokens import TOPK_VOCAB, rosetta_tokens, topk_tokens

# Both exponentiate a difference of two fp32 log-probs, whose rounding (|log p| < 10: 5e-7) is r's relative error.
RELATIVE = 2e-6


@pytest.mark.parametrize("reading", READINGS, ids=lambda reading: reading.where)
def test_it_differs_from_ours_where_it_is_said_to_and_nowhere_else(reading: Reading) -> None:
    names = load(reading.record)["names"]
    assert names == rosetta_tokens().names
    coefficient, _ = ours(reading.kind)
    different = ~torch.isclose(reading.theirs(), coefficient, rtol=RELATIVE, atol=1e-7)
    assert {name for name, differs in zip(names, different.tolist(), strict=True) if differs} == reading.expected()


@pytest.mark.parametrize("kind", DELTAS)
@pytest.mark.parametrize("record", ["rosetta_verl", "rosetta_stable_rl"])
def test_verls_cap_is_the_actors_3_and_ours_with_that_cap_is_verls(record: str, kind: str) -> None:
    found = load(record)
    result = {"rosetta_verl": f"dppo_{kind}, cap 3, bypass", "rosetta_stable_rl": f"dppo_binary_{kind}, cap default"}
    assert found.get("default_cap", found.get("settings", {}).get("cap by default")) == 3.0
    capped, _ = ours(kind, ratio_cap=3.0)
    same = torch.isclose(found["results"][result[record]]["coefficient"], capped, rtol=RELATIVE, atol=1e-7)
    floor = {"tv": set(), "kl": {"pi exactly 1, mu 0.999, A > 0"}}[kind]
    assert {name for name, equal in zip(found["names"], same.tolist(), strict=True) if not equal} == floor


@pytest.mark.parametrize("kind", DELTAS)
def test_verl_counts_a_token_without_an_update_as_clipped(kind: str) -> None:
    _, losses = ours(kind)
    tokens = rosetta_tokens()
    moved = tokens.advantages != 0
    stopped = losses.weight == 0
    verl = load("rosetta_verl")["results"][f"dppo_{kind}, cap 10000, bypass"]["clip_fraction"] * len(moved)
    stable_rl = load("rosetta_stable_rl")["results"][f"dppo_binary_{kind}, cap 10000"]["clip_fraction"] * int(
        moved.sum()
    )
    skyrl = load("rosetta_skyrl")["results"][f"binary_{kind}, rollout log-probs"]["clip_fraction"] * len(moved)
    floor = 1 if kind == "kl" else 0  # the certain token that only ours masks
    assert round(stable_rl) == int((stopped & moved).sum()) - floor
    assert round(verl) == round(stable_rl) + 1  # "A 0, far out"
    assert round(skyrl) == round(stable_rl)
    # verl and SkyRL divide by all tokens, Stable-RL as we do by those with an update.
    fraction = losses.metrics.finalize()["dppo/mask_fraction"]
    assert fraction == pytest.approx(int((stopped & moved).sum()) / int(moved.sum()))


def test_tmaxs_kl_is_nan_for_certain_tokens_and_ours_is_finite() -> None:
    nan = load("rosetta_tmax")["results"]["binary_kl"]["not_finite"]
    assert "mu exactly 1, pi 0.5, A < 0" in nan
    assert load("rosetta_open_instruct")["results"]["binary_kl"]["not_finite"] == []
    _, losses = ours("kl")
    assert bool(losses.divergence.isfinite().all())
    assert losses.weight[rosetta_tokens().names.index("mu exactly 1, pi 0.5, A < 0")] == 0


@pytest.mark.parametrize("kind", DELTAS)
def test_stable_rls_top_k_has_no_slot_for_a_sampled_token_outside_of_it(kind: str) -> None:
    tokens = topk_tokens()
    inputs = LossInputs(
        target=tokens.target,
        loss_mask=None,
        advantages=torch.ones(len(tokens.target)),
        rollout_log_probs=tokens.log_mu,
        rollout_topk=TopK(ids=tokens.topk_ids, log_probs=tokens.topk_log_mu),
    )
    loss = DPPOLoss(DPPOConfig(divergence=f"topk_{kind}"), vocab_size=TOPK_VOCAB, backend="torch")
    ours, theirs = loss(tokens.logits, inputs).divergence, load("rosetta_stable_rl_topk")[f"topk_{kind}"]
    torch.testing.assert_close(ours[~tokens.outside], theirs[~tokens.outside], rtol=1e-4, atol=1e-6)
    assert int(tokens.outside.sum()) == 8
    # One part of the vocabulary less: never more (the partition inequality), and on these tokens less.
    assert bool((theirs <= ours + 1e-6)[tokens.outside].all())
    assert float((ours - theirs)[tokens.outside].max()) > 0.01


def test_the_defaults_of_the_others_are_the_ones_in_the_table() -> None:
    assert load("rosetta_skyrl")["settings"] == {"delta by default": 0.2, "divergence by default": "binary_tv"}
    assert load("rosetta_stable_rl")["settings"]["delta by default"] == 0.2
    for name in ("rosetta_tmax", "rosetta_open_instruct"):
        assert load(name)["settings"] == {"delta by default": 0.1}
