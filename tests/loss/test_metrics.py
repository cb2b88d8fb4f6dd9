"""Metrics: reduced over parts they are those of the whole, and they say what their names say."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dppo import DPPOConfig, DPPOLoss
from megatron_dppo.loss.dppo_loss import LossOutput
from megatron_dppo.loss.metrics import divergence_histogram, finalize_metrics
from tests.loss.scenario import VOCAB, make_scenario
from tests.metric_names import LOSS_METRICS


def finalize(outputs: list[LossOutput]) -> dict[str, float]:
    metrics = {
        name: torch.stack([torch.stack(out.metrics[name]) for out in outputs]).sum(0) for name in outputs[0].metrics
    }
    extrema = {name: torch.stack([out.extrema[name] for out in outputs]).max() for name in outputs[0].extrema}
    return finalize_metrics(metrics, extrema, torch.stack([out.divergence_histogram for out in outputs]).sum(0))


def rows(start: int, stop: int) -> LossOutput:
    scenario = make_scenario()
    arguments = {name: x[start:stop] for name, x in scenario.arguments("ref_log_probs").items()}
    return DPPOLoss(DPPOConfig(), vocab_size=VOCAB)(scenario.logits[start:stop], **arguments, backend="torch")


def test_metrics_of_the_parts_add_up_to_those_of_the_whole() -> None:
    together, apart = finalize([rows(0, 3)]), finalize([rows(0, 1), rows(1, 1), rows(1, 3)])
    assert together.keys() == apart.keys()
    assert together.keys() >= set(LOSS_METRICS)
    for name, value in together.items():
        # Each part sums in fp32 terms of order 1 that partly cancel (the loss): absolute as well as relative.
        assert apart[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


def test_they_say_what_their_names_say() -> None:
    """Five tokens over two words, worked out by hand."""
    mu = torch.tensor([0.90, 0.50, 0.50, 0.20, 0.50])
    pi = torch.tensor([0.30, 0.90, 0.55, 0.10, 0.10])
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0, 0.0])
    logits = torch.stack([pi.log(), (1 - pi).log()], dim=1)
    zeros, ones = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.bool)
    out = DPPOLoss(DPPOConfig())(logits, zeros, ones, advantages, mu.log(), backend="torch")
    final = finalize([out])
    # |mu - pi| = .6 (masked), .4 (masked), .05, .1; the ratio test of PPO: r = 1/3 and 1.8 and .5 clip, 1.1 does not
    assert final["dppo/mask_fraction"] == pytest.approx(2 / 4)
    assert final["dppo/mask_fraction_pos"] == pytest.approx(1 / 2)
    assert final["dppo/mask_fraction_neg"] == pytest.approx(1 / 2)
    assert final["dppo/mask_fraction_mu_0.1_0.5"] == pytest.approx(0)
    assert final["dppo/mask_fraction_mu_0.5_0.9"] == pytest.approx(1 / 2)
    assert final["dppo/mask_fraction_mu_0.9_1"] == pytest.approx(1)
    assert "dppo/mask_fraction_mu_0_0.01" not in final  # no such token: no number
    assert final["dppo/divergence_mean"] == pytest.approx((0.6 + 0.4 + 0.05 + 0.1) / 4)
    assert final["dppo/divergence_max"] == pytest.approx(0.6)
    assert final["dppo/bad_update_fraction"] == pytest.approx(1 / 4)
    assert final["dppo/ppo_would_clip_fraction"] == pytest.approx(3 / 4)
    assert final["dppo/ppo_agreement"] == pytest.approx(3 / 4)
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


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 0.5, 30.0])
def test_p99_is_within_its_stated_three_percent(scale: float) -> None:
    divergence = scale * torch.rand(5000).square()
    histogram = divergence_histogram(torch.ones(5000), divergence)
    final = finalize_metrics({}, {"dppo/divergence_max": divergence.max()}, histogram)
    exact = divergence.sort().values[math.ceil(0.99 * 5000) - 1]
    assert final["dppo/divergence_p99"] == pytest.approx(float(exact), rel=0.03)


def test_divergences_outside_the_histogram_still_count() -> None:
    divergence = torch.tensor([0.0, 1e-30, 500.0, 1e4])
    histogram = divergence_histogram(torch.ones(4), divergence)
    assert histogram.tolist()[0] == 2
    assert histogram.tolist()[-1] == 2
    final = finalize_metrics({}, {"dppo/divergence_max": divergence.max()}, histogram)
    assert final["dppo/divergence_p99"] == pytest.approx(1e4)
