"""Metrics: reduced over parts they are those of the whole, and they say what their names say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_dppo import DPPOConfig, DPPOLoss, LossInputs, MetricSums
from megatron_dppo.loss.metrics import HISTOGRAM_HIGHEST, HISTOGRAM_LOWEST, divergence_histogram
from tests.loss.scenario import LENGTH, VOCAB, make_scenario
from tests.metric_names import LOSS_METRICS
from tests.rank_pool import RankPools


def metrics_of(start: int, stop: int) -> MetricSums:
    scenario = make_scenario()
    inputs = scenario.inputs("ref_log_probs")
    rows = torch.arange(start * LENGTH, stop * LENGTH)
    logits = scenario.logits.flatten(0, 1)[rows]
    return DPPOLoss(DPPOConfig(), vocab_size=VOCAB, backend="torch")(logits, inputs.take(rows)).metrics


def test_metrics_of_the_parts_add_up_to_those_of_the_whole() -> None:
    parts = [metrics_of(0, 1), metrics_of(1, 1), metrics_of(1, 3)]
    together, apart = metrics_of(0, 3).finalize(), MetricSums.total(parts).finalize()
    assert together.keys() == apart.keys()
    assert together.keys() >= set(LOSS_METRICS)
    for name, value in together.items():
        # Each part sums in fp32 terms of order 1 that partly cancel (the loss): absolute as well as relative.
        assert apart[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


def test_they_say_what_their_names_say(backend: str) -> None:
    """Five tokens over two words, worked out by hand."""
    mu = torch.tensor([0.90, 0.50, 0.50, 0.20, 0.50])
    pi = torch.tensor([0.30, 0.90, 0.55, 0.10, 0.10])
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0, 0.0])
    logits = torch.stack([pi.log(), (1 - pi).log()], dim=1)
    inputs = LossInputs(
        target=torch.zeros(5, dtype=torch.int64), loss_mask=None, advantages=advantages, rollout_log_probs=mu.log()
    )
    final = DPPOLoss(DPPOConfig(), vocab_size=2, backend=backend)(logits, inputs).metrics.finalize()
    # |mu - pi| = .6 (masked), .4 (masked), .05, .1; the ratio test of PPO: r = 1/3 and 1.8 and .5 clip, 1.1 does not
    assert final["dppo/mask_fraction"] == 2 / 4
    assert final["dppo/mask_fraction_pos"] == 1 / 2
    assert final["dppo/mask_fraction_neg"] == 1 / 2
    assert final["dppo/mask_fraction_mu_0.1_0.5"] == 0
    assert final["dppo/mask_fraction_mu_0.5_0.9"] == 1 / 2
    assert final["dppo/mask_fraction_mu_0.9_1"] == 1
    assert "dppo/mask_fraction_mu_0_0.01" not in final  # no such token: no number
    assert final["dppo/divergence_mean"] == pytest.approx((0.6 + 0.4 + 0.05 + 0.1) / 4)
    assert final["dppo/divergence_max"] == pytest.approx(0.6)
    assert final["dppo/bad_update_fraction"] == 1 / 4
    # |w r A| = 0 (masked), 1.8 (masked, .4 > delta), 1.1, 0.5, 0
    assert final["dppo/largest_token_share"] == pytest.approx(1.1 / 1.6)
    assert final["dppo/ppo_would_clip_fraction"] == 3 / 4
    assert final["dppo/ppo_agreement"] == 3 / 4
    r = pi / mu
    assert final["mismatch/ratio_mean"] == pytest.approx(float(r.mean()))
    assert final["mismatch/ratio_min"] == pytest.approx(0.2)
    assert final["mismatch/ratio_max"] == pytest.approx(1.8)
    assert final["mismatch/prob_change_max"] == pytest.approx(0.6)
    assert final["mismatch/abs_log_ratio"] == pytest.approx(float(r.log().abs().mean()))
    assert final["mismatch/kl_k1"] == pytest.approx(float(-r.log().mean()))
    assert final["mismatch/kl_k3"] == pytest.approx(float((r - 1 - r.log()).mean()))
    assert final["mismatch/effective_sample_size"] == pytest.approx(float(r.sum() ** 2 / (5 * (r**2).sum())))
    entropy = -(pi * pi.log() + (1 - pi) * (1 - pi).log())
    assert final["entropy"] == pytest.approx(float(entropy.mean()))


def test_many_tokens_are_added_up_as_the_definition_says(compiled_backend: str) -> None:
    """More than one block of a GPU has, so blocks' totals are added up as well."""
    n, vocab = 600, 5
    logits = 2 * torch.randn(n, vocab)
    target = torch.randint(0, vocab, (n,))
    log_mu = (logits + 0.5 * torch.randn(n, vocab)).log_softmax(-1).gather(1, target[:, None])[:, 0]
    inputs = LossInputs(target=target, loss_mask=None, advantages=torch.randn(n), rollout_log_probs=log_mu)
    ours, defined = (
        DPPOLoss(DPPOConfig(), vocab_size=vocab, backend=backend)(logits, inputs).metrics
        for backend in (compiled_backend, "torch")
    )
    assert torch.equal(ours.histogram, defined.histogram)
    # Totals are float64 sums of values of order 1 that are rounded to fp32, and of logarithms and exponentials of such.
    assert ours.finalize() == pytest.approx(defined.finalize(), rel=1e-5, abs=1e-6)


def test_an_update_is_bad_where_a_likely_token_was_punished_and_has_all_but_gone() -> None:
    """The first was rewarded, if little; the last has not gone."""
    pi, advantages = torch.tensor([0.2, 0.2, 0.5]), torch.tensor([0.5, -0.5, -0.5])
    logits = torch.stack([pi.log(), (1 - pi).log()], dim=1)
    target, log_mu = torch.zeros(3, dtype=torch.int64), torch.full((3,), 0.9).log()
    inputs = LossInputs(target=target, loss_mask=None, advantages=advantages, rollout_log_probs=log_mu)
    final = DPPOLoss(DPPOConfig(), vocab_size=2, backend="torch")(logits, inputs).metrics.finalize()
    assert final["dppo/bad_update_fraction"] == pytest.approx(1 / 3)


def of_divergences(divergence: torch.Tensor) -> MetricSums:
    where = torch.ones_like(divergence, dtype=torch.bool)
    return MetricSums(
        mean_names=(),
        means=torch.zeros(0, 2, dtype=torch.float64),
        maximum_names=("dppo/divergence_max",),
        maxima=divergence.max().double()[None],
        histogram=divergence_histogram(divergence, where),
    )


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 0.5, 30.0])
def test_p99_is_within_its_stated_three_percent(scale: float) -> None:
    divergence = scale * torch.rand(5000).square()
    exact = divergence.sort().values[math.ceil(0.99 * 5000) - 1]
    assert of_divergences(divergence).finalize()["dppo/divergence_p99"] == pytest.approx(float(exact), rel=0.03)


@pytest.mark.parametrize("divergence", [1.01 * 10.0**HISTOGRAM_LOWEST, 0.99 * 10.0**HISTOGRAM_HIGHEST])
def test_the_histograms_first_and_last_bin_are_read_like_all_others(divergence: float) -> None:
    """Behind them are those for what lies outside, of which no value is known."""
    sums = of_divergences(torch.tensor([divergence] * 199 + [1e4]))
    assert sums.finalize()["dppo/divergence_p99"] == pytest.approx(divergence, rel=0.03)


def test_divergences_outside_the_histogram_still_count() -> None:
    sums = of_divergences(torch.tensor([0.0, 1e-30, 500.0, 1e4]))
    assert sums.histogram.tolist()[0] == 2
    assert sums.histogram.tolist()[-1] == 2
    assert sums.finalize()["dppo/divergence_p99"] == pytest.approx(1e4)


def test_metrics_of_different_kinds_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="only one side has reference/kl"):
        (
            metrics_of(0, 1)
            + DPPOLoss(DPPOConfig(), vocab_size=VOCAB, backend="torch")(
                make_scenario().logits, make_scenario().inputs()
            ).metrics
        )


def test_adding_is_associative_and_has_the_pairs_that_megatron_adds() -> None:
    a, b, c = metrics_of(0, 1), metrics_of(1, 2), metrics_of(2, 3)
    left, right = (a + b) + c, a + (b + c)
    torch.testing.assert_close(left.means, right.means, rtol=1e-14, atol=1e-14)
    assert torch.equal(left.maxima, right.maxima)
    assert torch.equal(left.histogram, right.histogram)
    assert torch.equal(left.pairs()["loss"], left.means[left.mean_names.index("loss")])


def _reduced_and_whole() -> tuple[MetricSums, MetricSums]:
    first, second = metrics_of(0, 1), metrics_of(1, 3)
    part = first if dist.get_rank() == 0 else second
    return part.all_reduce(), first + second


def test_reduced_over_ranks_they_are_those_of_the_whole(ranks: RankPools) -> None:
    for reduced, whole in ranks(2).run(_reduced_and_whole):
        assert reduced.finalize() == pytest.approx(whole.finalize(), rel=1e-12)
        assert reduced.histogram.tolist() == whole.histogram.tolist()
