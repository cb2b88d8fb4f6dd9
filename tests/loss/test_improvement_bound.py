"""What an update is worth at least: never more than it is, and the same however the batch is divided."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs, Sequences
from megatron_dppo.errors import LossInputError
from megatron_dppo.loss.improvement_bound import CERTIFIED, VACUOUS, VIOLATED, ResponseSums
from tests.device_waits import DeviceWaits
from tests.loss import enumerable_policy as tiny
from tests.loss.scenario import BATCH, LENGTH, VOCAB, make_scenario
from tests.rank_pool import RankPools

ROUNDING = 1e-12  # float64 sums of at most 400 terms of size 1, differences of which are compared


@functools.cache
def tree() -> tiny.Responses:
    return tiny.all_responses(3, 4, stop=False)


@functools.cache
def small_tree() -> tiny.Responses:
    return tiny.all_responses(2, 3, stop=False)  # 7 prefixes, 8 responses


def test_no_bound_is_ever_above_the_true_improvement() -> None:
    """Of 1,000 updates; the error may be anything from 1e-9 (rounding of sums of 1) to twice the range of rewards."""
    for updates in tiny.thousand_updates():
        error = updates.improvement() - updates.surrogate()
        for name, penalty in tiny.penalties(updates.responses, updates.rollout, updates.policy).items():
            assert (error.abs() <= penalty * (1 + ROUNDING) + ROUNDING).all(), name


def test_the_remainder_bound_is_the_smallest_and_some_reward_attains_it() -> None:
    for updates in tiny.thousand_updates():
        penalties = tiny.penalties(updates.responses, updates.rollout, updates.policy)
        for name, penalty in penalties.items():
            assert (penalties["remainder"] <= penalty * (1 + ROUNDING) + ROUNDING).all(), name
        worst = (tiny.remainder(updates.responses, updates.rollout, updates.policy) > 0).double()
        for rewards, sign in ((worst, 1.0), (1.0 - worst, -1.0)):
            adverse = dataclasses.replace(updates, rewards=rewards)
            error = adverse.improvement() - adverse.surrogate()
            # The prod(r) of a response is up to e^100 where mu is next to 0, and so is what its expectation cancels.
            torch.testing.assert_close(error, sign * penalties["remainder"], rtol=1e-9, atol=1e-9)


LOGITS = st.lists(st.floats(-30, 30), min_size=14, max_size=14)


@given(rollout=LOGITS, policy=LOGITS, right=st.lists(st.booleans(), min_size=8, max_size=8))
@settings(max_examples=60)
def test_no_bound_is_above_for_any_two_policies_and_any_reward(
    rollout: list[float], policy: list[float], right: list[bool]
) -> None:
    """Logits up to 30 apart: tokens that the rollout policy draws once in e^60 are certain under the other."""
    of_mu, of_pi = (torch.tensor(x, dtype=torch.float64).view(1, 7, 2) for x in (rollout, policy))
    updates = tiny.Updates(small_tree(), of_mu, of_pi, torch.tensor([right], dtype=torch.float64))
    error = float(updates.improvement() - updates.surrogate())
    for name, penalty in tiny.penalties(small_tree(), of_mu, of_pi).items():
        assert abs(error) <= float(penalty) * (1 + ROUNDING) + ROUNDING, name


def test_the_baseline_of_a_prompt_changes_nothing() -> None:
    updates = tiny.random_updates(7, 50, tree())
    shifted = dataclasses.replace(updates, rewards=updates.rewards - 0.3)
    torch.testing.assert_close(shifted.surrogate(), updates.surrogate(), rtol=0, atol=1e-9)


def test_sampled_ratios_estimate_the_exact_total_variation_and_the_binary_divergence_less() -> None:
    """In expectation over the rollout policy's token: |r - 1| / 2 is TV, |mu - pi| is at most that."""
    updates = tiny.random_updates(8, 200, tree())
    mu, pi = updates.rollout.softmax(-1), updates.policy.softmax(-1)
    exact = tiny.total_variation(updates.rollout, updates.policy)
    torch.testing.assert_close((mu * (pi / mu - 1).abs()).sum(-1) / 2, exact, rtol=1e-9, atol=1e-12)
    assert ((mu * (mu - pi).abs()).sum(-1) <= exact + ROUNDING).all()


def test_a_bound_made_of_binary_divergences_promises_too_much() -> None:
    """Which is why the live bound takes ratios. The same moves between 32 tokens in two steps, and the worst reward."""
    responses = tiny.all_responses(32, 2, stop=False)
    rollout = torch.zeros(1, responses.num_prefixes, 32, dtype=torch.float64)
    policy = rollout.clone()
    policy[..., ::2] = 4.0
    rewards = (tiny.remainder(responses, rollout, policy) > 0).double()
    updates = tiny.Updates(responses, rollout, policy, 1.0 - rewards)
    binary = (rollout.softmax(-1) * (rollout.softmax(-1) - policy.softmax(-1)).abs()).sum(-1)[0, 0]
    tv = tiny.total_variation(rollout, policy)[0, 0]
    improvement, surrogate = float(updates.improvement()), float(updates.surrogate())
    of_tv, of_binary = (float(tiny.REWARD_RANGE * 2 * d * d) for d in (tv, binary))  # T (T - 1) D^2 with T = 2
    assert surrogate - of_tv <= improvement < surrogate - of_binary


def test_the_linear_form_certifies_nothing() -> None:
    for updates in tiny.thousand_updates():
        linear = tiny.penalties(updates.responses, updates.rollout, updates.policy)["linear"]
        # |E[A sum(r - 1)]| <= range / 2 E[sum |r - 1|] = range E[sum TV], half of the linear form
        assert (updates.surrogate().abs() <= linear / 2 + ROUNDING).all()


# A batch that is its own expectation: probabilities are multiples of 1/4, every response stands as often as mu says.
QUARTERS = 4


class ExactBatch:
    """Of a rollout policy over 3 tokens and 3 steps: 64 responses [64, 3], fp64, with advantages of their rewards."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tree = self.responses = tiny.all_responses(3, 3, stop=False)
        choices = torch.tensor([[2, 1, 1], [1, 2, 1], [1, 1, 2]])
        counts = choices[torch.randint(3, (tree.num_prefixes,), generator=generator)]
        self.rollout = (counts.double() / QUARTERS).log()
        self.rewards = torch.rand(len(tree.tokens), generator=generator, dtype=torch.float64).round()
        times = counts[tree.prefixes, tree.tokens].prod(dim=1)
        self.rows = torch.arange(len(times)).repeat_interleave(times)
        self.prefixes = tree.prefixes[self.rows]
        rewards = self.rewards[self.rows]
        self.inputs = LossInputs(
            target=tree.tokens[self.rows],
            loss_mask=None,
            advantages=(rewards - rewards.mean())[:, None].expand(-1, 3),
            rollout_log_probs=tiny.token_log_probs(tree, self.rollout)[self.rows],
        )

    def loss(self, policy: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ResponseSums, torch.Tensor]:
        """Mean over responses of the sum over tokens; what the bound is made of; [64, 3] weights."""
        output = DPPOLoss(DPPOConfig(**options), vocab_size=3, backend="torch")(policy[self.prefixes], self.inputs)
        count = len(self.rows)
        return output.loss / count, ResponseSums.of(self.inputs, output, count), output.weight

    def improvement(self, policy: torch.Tensor) -> torch.Tensor:
        after, before = (tiny.expected_reward(self.responses, x, self.rewards) for x in (policy, self.rollout))
        return after - before


def test_a_batch_that_is_its_own_expectation_gives_the_bound_itself() -> None:
    batch = ExactBatch(0)
    assert len(batch.rows) == QUARTERS**3
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 0.1, 1.0, 5.0):
        policy = batch.rollout + size * torch.randn(batch.rollout.shape, generator=generator, dtype=torch.float64)
        final = batch.loss(policy)[1].finalize(tiny.REWARD_RANGE)
        exact = tiny.penalties(batch.responses, batch.rollout, policy)
        close = {"rel": 1e-9, "abs": 1e-13}
        assert final["bound/penalty"] == pytest.approx(float(exact["remainder"]), **close)
        assert final["bound/penalty_quadratic"] == pytest.approx(float(exact["quadratic"]), **close)
        surrogate = tiny.surrogate(batch.responses, batch.rollout, policy, batch.rewards)
        assert final["bound/surrogate"] == pytest.approx(float(surrogate), **close)
        assert final["bound/improvement"] == pytest.approx(float(surrogate - exact["remainder"]), **close)
        assert final["bound/improvement"] <= float(batch.improvement(policy)) + ROUNDING


def test_the_loss_has_the_gradient_of_the_true_objective_on_policy_and_of_the_surrogate_off_it() -> None:
    batch = ExactBatch(2)
    policy = batch.rollout.clone().requires_grad_()
    (true,) = torch.autograd.grad(batch.improvement(policy), policy)
    (ours,) = torch.autograd.grad(batch.loss(policy)[0], policy)
    torch.testing.assert_close(-ours, true, rtol=1e-10, atol=1e-14)
    moved = (batch.rollout + torch.randn(policy.shape, dtype=torch.float64)).requires_grad_()
    (true,) = torch.autograd.grad(
        tiny.surrogate(batch.responses, batch.rollout, moved, batch.rewards - batch.rewards[batch.rows].mean()), moved
    )
    (ours,) = torch.autograd.grad(batch.loss(moved, trust_region="none")[0], moved)
    torch.testing.assert_close(-ours, true, rtol=1e-10, atol=1e-14)


def test_dppo_steps_improve_the_policy_by_at_least_the_bound() -> None:
    """Several steps on one batch. Where the mask holds nothing back the surrogate rises; the bound certifies it."""
    for seed in range(3):
        batch = ExactBatch(seed)
        policy, last, masked = batch.rollout.clone().requires_grad_(), 0.0, 0
        for step in range(60):
            loss, sums, weight = batch.loss(policy)
            final, true = sums.finalize(tiny.REWARD_RANGE), float(batch.improvement(policy.detach()))
            assert final["bound/improvement"] <= true + ROUNDING
            assert abs(true - final["bound/surrogate"]) <= final["bound/penalty"] + ROUNDING
            if not masked:
                assert true >= last
                assert step == 0 or final["bound/improvement"] > 0
            last, masked = true, int((weight == 0).sum())
            (gradient,) = torch.autograd.grad(loss, policy)
            policy = (policy - 0.5 * gradient).detach().requires_grad_()
        assert masked  # it ran into the trust region
        assert true > 0.05


def test_verdicts_of_sampled_responses_are_rarely_wrong() -> None:
    """64 responses of each of the 1,000 rollout policies: the true improvement has the sign that a verdict says."""
    wrong = given_verdicts = 0
    for updates in tiny.thousand_updates():
        tree, true = updates.responses, updates.improvement()
        log_mu = tiny.token_log_probs(tree, updates.rollout)
        log_ratio = tiny.token_log_probs(tree, updates.policy) - log_mu
        advantages = updates.rewards - tiny.expected_reward(tree, updates.rollout, updates.rewards)[:, None]
        excess = log_ratio.expm1()
        of_tokens = (
            advantages[..., None] * excess,
            excess,
            log_ratio,
            excess.abs(),
            excess**2,
            tree.mask.expand_as(excess),
        )
        sums = torch.stack([values.sum(-1) for values in of_tokens], dim=-1)
        drawn = torch.multinomial(log_mu.sum(-1).exp(), 64, replacement=True)
        for number, responses in enumerate(drawn):
            verdict = ResponseSums(sums[number, responses]).finalize(tiny.REWARD_RANGE)["bound/verdict"]
            given_verdicts += verdict != VACUOUS
            wrong += verdict * float(true[number]) < 0
    assert given_verdicts > 400
    assert wrong <= 0.01 * given_verdicts


def scenario_inputs(**sequences: torch.Tensor) -> tuple[torch.Tensor, LossInputs]:
    scenario = make_scenario()
    inputs = scenario.inputs()
    return scenario.logits, dataclasses.replace(inputs, sequences=Sequences(**sequences)) if sequences else inputs


def sums_of(logits: torch.Tensor, inputs: LossInputs, responses: int = BATCH) -> ResponseSums:
    return ResponseSums.of(inputs, DPPOLoss(DPPOConfig(), vocab_size=VOCAB, backend="torch")(logits, inputs), responses)


def every_token() -> torch.Tensor:
    return torch.arange(BATCH * LENGTH)


def response_of_token() -> torch.Tensor:
    return every_token() // LENGTH


PARTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cut": lambda token: token % LENGTH < 3,
    "split": lambda token: token // LENGTH == 1,
    "interleaved": lambda token: token % 2 == 0,
}


@pytest.mark.parametrize("divided", PARTS)
def test_parts_of_responses_and_of_batches_add_up_to_the_whole(divided: str) -> None:
    """As micro-batches, packing and context parallelism divide them."""
    logits, inputs = scenario_inputs()
    whole, tokens = sums_of(logits, inputs), every_token()
    part = PARTS[divided](tokens)
    packed = dataclasses.replace(inputs, sequences=Sequences(ids=response_of_token().view(BATCH, LENGTH)))
    parts = [sums_of(logits.flatten(0, 1)[rows], packed.take(rows)) for rows in (tokens[part], tokens[~part].flip(0))]
    # The loss computes log-probs in fp32 by rows: the same numbers, summed in fp64 in another order.
    torch.testing.assert_close((parts[0] + parts[1]).sums, whole.sums, rtol=1e-13, atol=1e-13)
    assert whole.sums[:, -1].tolist() == inputs.loss_mask.sum(1).tolist()


def _reduced(rank_rows: list[torch.Tensor]) -> dict[str, float]:
    logits, inputs = scenario_inputs(ids=response_of_token().view(BATCH, LENGTH))
    rows = rank_rows[torch.distributed.get_rank()]
    return sums_of(logits.flatten(0, 1)[rows], inputs.take(rows)).all_reduce().finalize(1.0)


def test_reduced_over_ranks_it_is_that_of_the_whole(ranks: RankPools) -> None:
    whole, tokens = sums_of(*scenario_inputs()).finalize(1.0), every_token()
    for final in ranks(2).run(_reduced, [tokens[::3], torch.cat([tokens[1::3], tokens[2::3]])]):
        assert final == pytest.approx(whole, rel=1e-12)


def test_what_is_outside_the_mask_counts_nowhere_and_nothing_waits() -> None:
    logits, inputs = scenario_inputs()
    output = DPPOLoss(DPPOConfig(), vocab_size=VOCAB, backend="torch")(logits, inputs)
    expected = ResponseSums.of(inputs, output, BATCH).sums
    outside = ~inputs.loss_mask
    spoilt = {
        name: getattr(inputs, name).masked_fill(outside, torch.nan) for name in ("advantages", "rollout_log_probs")
    }
    ids = response_of_token().view(BATCH, LENGTH).masked_fill(outside, -100)
    given_ids = dataclasses.replace(inputs, sequences=Sequences(ids=ids), **spoilt)
    with DeviceWaits() as waits:
        sums = ResponseSums.of(given_ids, output, BATCH) + ResponseSums.of(inputs, output, BATCH)
    assert waits.found == []
    torch.testing.assert_close(sums.sums, 2 * expected, rtol=0, atol=0)


def test_packed_tokens_of_unknown_responses_are_refused() -> None:
    logits, inputs = scenario_inputs()
    with pytest.raises(LossInputError, match=r"improvement bound needs sequences\.ids"):
        sums_of(logits.flatten(0, 1), inputs.take(every_token()))


def of_responses(*log_ratios: float, advantage: float, times: int = 1) -> ResponseSums:
    """Responses of two tokens that moved by the same factor each; ``times`` of each."""
    log_ratio = torch.tensor(log_ratios * times, dtype=torch.float64)
    excess = log_ratio.expm1()
    two = [2 * x for x in (advantage * excess, excess, log_ratio, excess.abs(), excess**2, torch.ones_like(excess))]
    return ResponseSums(torch.stack(two, dim=1))


def test_a_verdict_is_given_where_the_sign_is_beyond_two_standard_errors() -> None:
    up = of_responses(0.1, 0.11, advantage=1.0, times=20).finalize(1.0)
    assert (up["bound/verdict"], up["bound/penalty"]) == (CERTIFIED, 0.0)  # both more likely: prod(r) is above the line
    assert of_responses(0.1, 0.11, advantage=-1.0, times=20).finalize(1.0)["bound/verdict"] == VIOLATED
    assert of_responses(-0.5, 0.5, advantage=1.0, times=2).finalize(1.0)["bound/verdict"] == VACUOUS
    same = of_responses(0.0, 0.0, advantage=1.0).finalize(1.0)
    assert (same["bound/verdict"], same["bound/improvement"]) == (VACUOUS, 0.0)


def test_one_response_decides_nothing_and_none_reports_nothing() -> None:
    one = of_responses(0.5, advantage=1.0).finalize(1.0)
    assert (one["bound/verdict"], one["bound/standard_error"]) == (VACUOUS, math.inf)
    assert ResponseSums(torch.zeros(3, 6, dtype=torch.float64)).finalize(1.0) == {}


def test_ratios_that_are_no_numbers_certify_nothing() -> None:
    broken = of_responses(0.1, torch.nan, advantage=1.0, times=20)
    assert broken.finalize(1.0)["bound/verdict"] == VACUOUS


def test_the_table_of_the_docs_is_what_the_policies_give() -> None:
    page = (Path(__file__).parents[2] / "docs" / "algorithm.md").read_text(encoding="utf-8")
    for row in tiny.looseness_table():
        assert row in page
