"""The metrics that every run reports; the one list that tests hold code to."""

# What the loss itself reports.
LOSS_METRICS = (
    "loss",
    "entropy",
    "dppo/mask_fraction",
    "dppo/mask_fraction_pos",
    "dppo/mask_fraction_neg",
    "dppo/divergence_mean",
    "dppo/divergence_p99",
    "dppo/divergence_max",
    "dppo/bad_update_fraction",
    "dppo/largest_token_share",
    "dppo/ppo_would_clip_fraction",
    "mismatch/abs_log_ratio",
    "mismatch/kl_k3",
)
# What a training step reports.
STEP_METRICS = (
    *LOSS_METRICS,
    "backend",
    "batch/computed_tokens",
    "batch/micro_batches",
    "batch/padding_share",
    "grad_norm",
    "lr",
    "memory/peak_bytes",
    "reward/mean",
    "reward/std",
    "rollout/length_mean",
    "rollout/staleness_max",
    "throughput/tokens_per_s",
    "throughput/update_computed_tokens_per_s",
    "time/rollout_s",
    "time/sync_s",
    "time/update_s",
    "train/skipped_steps",
)
