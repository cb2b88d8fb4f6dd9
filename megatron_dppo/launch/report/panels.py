"""Which curves the page draws, in which sections: the metrics of docs/metrics.md that answer a question together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One chart of curves over training.

    Attributes:
        section: learning | trust | mismatch | speed.
        title: what it shows.
        quantity: of the y-axis.
        unit: share | tokens | nats | s | tokens/s | bytes | "" (a plain number), in which it is measured.
        metrics: {name: label}.
        note: what to look for.
        log: whether the y-axis is logarithmic at first.
        points: whether each value is a measurement of its own, which no smoothing may touch.
        absent: what to say where no run has any of the metrics.
    """

    section: str
    title: str
    quantity: str
    unit: str
    metrics: dict[str, str]
    note: str
    log: bool = False
    points: bool = False
    absent: str = "No run has these metrics."


_MU = {
    "0_0.01": "μ < 0.01",
    "0.01_0.1": "0.01 – 0.1",
    "0.1_0.5": "0.1 – 0.5",
    "0.5_0.9": "0.5 – 0.9",
    "0.9_1": "0.9 – 1",
}

PANELS = (
    Panel(
        "learning",
        "Training reward",
        "mean reward",
        "",
        {"reward/mean": "mean reward"},
        "Rises, with the noise of one batch.",
    ),
    Panel(
        "learning",
        "Held-out accuracy",
        "share of right answers",
        "share",
        {"eval/accuracy": "accuracy"},
        "Rises with the reward; if it falls while the reward rises, the reward is being gamed.",
        points=True,
        absent="No evaluation yet: eval.every sets how often there is one.",
    ),
    Panel(
        "learning",
        "Response length",
        "mean length",
        "tokens",
        {"rollout/length_mean": "mean length"},
        "A sudden fall or rise is worth a look at the samples.",
    ),
    Panel(
        "learning",
        "Entropy",
        "mean entropy",
        "nats",
        {"entropy": "entropy"},
        "Falls slowly; a fall to 0 is a collapse of diversity.",
    ),
    Panel(
        "learning",
        "Prompts without a signal",
        "share",
        "share",
        {"reward/equal_groups": "all rewards equal", "rollout/cut_fraction": "cut responses"},
        "Groups whose responses all have the same reward teach nothing. Responses cut at the length limit should be few.",
    ),
    Panel(
        "learning",
        "Gradient norm",
        "L2 norm",
        "",
        {"grad_norm": "before clipping"},
        "Stable; spikes go with extreme ratios.",
    ),
    Panel(
        "trust",
        "Tokens that the trust region holds back",
        "share of tokens",
        "share",
        {"dppo/mask_fraction_pos": "A > 0", "dppo/mask_fraction_neg": "A < 0"},
        "Near 0 for long, it has nothing to do; high for long, most of the batch is not learned from.",
    ),
    Panel(
        "trust",
        "Held back, by rollout probability",
        "share of the bin's tokens",
        "share",
        {f"dppo/mask_fraction_mu_{name}": label for name, label in _MU.items()},
        "With total variation, rare tokens are hardly ever held back.",
    ),
    Panel(
        "trust",
        "Divergence from the rollout policy",
        "divergence D",
        "",
        {"dppo/divergence_mean": "mean", "dppo/divergence_p99": "99th percentile"},
        "The mean stays well below delta, the 99th percentile of its order.",
        log=True,
    ),
    Panel(
        "trust",
        "Largest token's share of the update",
        "share of the update",
        "share",
        {"dppo/largest_token_share": "largest |w r A| over all"},
        "Above 10 %, one token owns the step.",
        log=True,
    ),
    Panel(
        "trust",
        "Bad updates",
        "share of tokens",
        "share",
        {"dppo/bad_update_fraction": "A < 0 and μ − π ≥ 0.5"},
        "The updates that the paper finds at the root of collapse.",
    ),
    Panel(
        "trust",
        "Against PPO's clip of 0.2",
        "share of tokens",
        "share",
        {"dppo/ppo_would_clip_fraction": "PPO would clip", "dppo/mask_fraction": "held back"},
        "Where the two differ is what DPPO changes.",
    ),
    Panel(
        "mismatch",
        "KL of rollout policy and trained policy",
        "KL",
        "nats",
        {"mismatch/kl_k3": "KL (k3)"},
        "Before the first update: what engine and trainer disagree about. It should not grow.",
        log=True,
    ),
    Panel(
        "mismatch",
        "Mean |log π − log μ|",
        "mean |log ratio|",
        "nats",
        {"mismatch/abs_log_ratio": "mean |log ratio|"},
        "Below 1e-6 in fp32, some 3e-2 for bf16 policies against a server.",
        log=True,
    ),
    Panel(
        "mismatch",
        "Largest ratio and change of probability",
        "largest of the batch",
        "",
        {"mismatch/ratio_max": "largest π / μ", "mismatch/prob_change_max": "largest |π − μ|"},
        "A single token with an extreme ratio shows here.",
        log=True,
    ),
    Panel(
        "mismatch",
        "Effective sample size",
        "share of the batch",
        "share",
        {"mismatch/effective_sample_size": "of the batch"},
        "Near 100 %; well below, a few tokens carry the batch.",
    ),
    Panel(
        "speed",
        "Throughput",
        "throughput",
        "tokens/s",
        {
            "throughput/tokens_per_s": "whole step",
            "throughput/rollout_tokens_per_s": "rollout",
            "throughput/update_tokens_per_s": "update",
        },
        "Prompt and response tokens of all replicas; in the rollout, response tokens.",
    ),
    Panel(
        "speed",
        "Peak memory",
        "memory",
        "bytes",
        {"memory/peak_bytes": "of the rank with the most"},
        "Flat after the first steps.",
    ),
)
