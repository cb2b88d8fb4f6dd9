"""No call of the loss waits for the device, forward or backward, whatever the rule, the entrance, the backend, the mask."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from megatron_dppo import (
    DPPOConfig,
    DPPOLoss,
    LinearHead,
    LossInputs,
    MetricSums,
    Sequences,
    fused_linear_policy_stats,
    vocab_parallel_policy_stats,
)
from megatron_dppo.loss.config import AGGREGATIONS, DIRECTIONS, DIVERGENCES, PREDICTIVE_ESTIMATORS, TRUST_REGIONS
from megatron_dppo.ops import logits_route
from megatron_dppo.ops.exact_divergence import vocab_parallel_divergence
from tests.device_waits import DeviceWaits
from tests.loss.scenario import BATCH, LENGTH, PADDED, VOCAB, make_scenario

RULES = [
    {"divergence": divergence, "direction": direction, "trust_region": trust_region, **estimator}
    for divergence, direction, trust_region in itertools.product(DIVERGENCES, DIRECTIONS, TRUST_REGIONS)
    for estimator in (
        [{"predictive_estimator": e} for e in PREDICTIVE_ESTIMATORS] if direction == "predictive" else [{}]
    )
    if direction == "ratio" or trust_region in ("mask", "smooth")
]


def waits_of(loss: DPPOLoss, policy: torch.Tensor | LinearHead, inputs: LossInputs) -> list[tuple[str, str]]:
    """Of one call, its backward, and adding up its metrics."""
    with DeviceWaits() as waits:
        output = loss(policy, inputs)
        output.loss.backward()
        MetricSums.total([output.metrics, output.metrics])
        if output.checks is not None:
            output.checks.failed()
    return waits.found


def config_of(rule: dict[str, Any], aggregation: str) -> DPPOConfig:
    horizon = 7 if aggregation == "seq_mean_token_sum_norm" else None
    return DPPOConfig(**rule, aggregation=aggregation, horizon=horizon, entropy_coef=0.1, kl_coef=0.1)


def head(vocab_rows: int = PADDED) -> LinearHead:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*s, generator=generator) for s in ((BATCH, LENGTH, 8), (vocab_rows, 8)))
    return LinearHead(hidden.requires_grad_(), weight.requires_grad_(), chunk_bytes=4 * 50)


# With a mask or without; every rule takes turns with a third of these on every push, and has all of them nightly.
CASES = list(itertools.product(AGGREGATIONS, ("deferred", "off"), (True, False)))


@pytest.mark.emulated_nightly
@pytest.mark.parametrize("number", range(len(RULES)), ids=["-".join(rule.values()) for rule in RULES])
@pytest.mark.parametrize("turns", [3, pytest.param(1, marks=pytest.mark.nightly)], ids=["a third", "all"])
def test_no_rule_waits(turns: int, number: int, backend: str) -> None:
    rule = RULES[number]
    scenario = make_scenario()
    names = ["rollout_topk", "ref_log_probs"]
    if rule["divergence"].startswith("exact"):
        names.append("rollout_logits")
    masked = scenario.inputs(*names)
    # Rules that differ in their last choice alone are neighbours: they do not take the same third.
    for aggregation, checks, has_mask in CASES[(number + number // turns) % turns :: turns]:
        loss = DPPOLoss(config_of(rule, aggregation), vocab_size=VOCAB, backend=backend, checks=checks)
        inputs = masked if has_mask else dataclasses.replace(masked, loss_mask=None)
        assert waits_of(loss, scenario.logits.clone().requires_grad_(), inputs) == []
        if "rollout_logits" not in names:
            assert waits_of(loss, head(), inputs) == []


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_and_split_sequences_do_not_wait(aggregation: str, backend: str) -> None:
    scenario = make_scenario()
    ids = torch.arange(BATCH)[:, None].expand(BATCH, LENGTH)
    lengths = scenario.loss_mask.sum(1, keepdim=True).expand(BATCH, LENGTH)
    starts = (scenario.loss_mask.cumsum(1) == 1) & scenario.loss_mask
    loss = DPPOLoss(config_of({}, aggregation), vocab_size=VOCAB, backend=backend, checks="deferred")
    inputs = scenario.inputs("ref_log_probs")
    for sequences in (Sequences(ids=ids), Sequences(ids=ids, lengths=lengths, starts=starts)):
        given = dataclasses.replace(inputs, sequences=sequences)
        assert waits_of(loss, scenario.logits.clone().requires_grad_(), given) == []


@pytest.mark.parametrize("promise", [None, 1.0])
def test_without_top_k_and_with_the_logits_overwritten(
    promise: float | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = make_scenario()
    monkeypatch.setattr(logits_route, "_workers", lambda device: (0, float("inf")))  # with a promise, in forward
    loss = DPPOLoss(
        DPPOConfig(direction="predictive"),
        vocab_size=VOCAB,
        backend=backend,
        checks="off",
        inplace_backward=True,
        backward_scale=promise,
    )
    assert waits_of(loss, scenario.logits.clone().requires_grad_() * 1, scenario.inputs()) == []


@pytest.mark.parametrize("deterministic", ["off", "layout"])
@pytest.mark.parametrize("selection", ["rows", "token_mask", "all"])
def test_the_operators_do_not_wait(selection: str, deterministic: str, backend: str) -> None:
    scenario = make_scenario()
    rows = scenario.loss_mask.flatten().nonzero()[:, 0]
    target, ids = scenario.target, scenario.rollout_topk_ids
    chosen: dict[str, Any] = {"token_mask": scenario.loss_mask} if selection == "token_mask" else {}
    if selection == "rows":
        chosen, target, ids = {"rows": rows}, target.flatten()[rows], ids.flatten(0, 1)[rows]
    common = {"topk_ids": ids, "vocab_size": VOCAB, "backend": backend, "checks": "off", **chosen}
    common["deterministic"] = deterministic
    logits, policy = scenario.logits.clone().requires_grad_(), head()
    with DeviceWaits() as waits:
        for stats in (
            vocab_parallel_policy_stats(logits, target, **common),
            fused_linear_policy_stats(policy.hidden, policy.weight, target, chunk_bytes=200, **common),
        ):
            (stats.log_prob.sum() + stats.entropy.sum()).backward()
        for kind in ("tv", "kl"):
            vocab_parallel_divergence(
                logits, scenario.rollout_logits, kind=kind, vocab_size=VOCAB, backend=backend, checks="off", **chosen
            )
    assert waits.found == []


def test_checking_at_once_is_the_one_thing_that_waits() -> None:
    scenario = make_scenario()
    loss = DPPOLoss(DPPOConfig(), vocab_size=VOCAB, backend="torch", checks="now")
    found = waits_of(loss, scenario.logits.clone().requires_grad_(), scenario.inputs())
    assert {caller.rpartition("/")[2] for _, caller in found} == {"checks.py:raise_errors"}
