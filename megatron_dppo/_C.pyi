"""What csrc/module.cpp and csrc/operators compile to. Importing it registers torch.ops.megatron_dppo.

Attributes:
    cuda_archs: such as ``"80;90a;100+PTX"``; empty where only the CPU kernels are in.
    compiler, flags: what compiled it, and how.
    cpu_level: the level of x86-64 whose vectors the CPU kernels use on this processor, such as ``"x86-64-v3"``; empty
        where the compiler's own target is the only one.
    cpu_level_is_supported: whether this processor can run that level; a build for one level may ask too much.
    torch_version: the torch that it was compiled against.
    limit_names: what the values of token_objective's ``limits`` are, in order. They are DPPOConfig's thresholds of the
        same names; infinity as ``ratio_cap`` or ``ppo_dual_clip`` means never.
    total_names: what the numbers of token_objective's ``totals`` are, in order. All are over the tokens of the mask. A
        token has *moved* if its advantage is not 0, and is *masked* if it has moved and its weight is 0::

            tokens                       number of tokens
            moved, positive, negative    of those with A != 0, A > 0, A < 0
            moved_in_bin_0 ... _4        of those that have moved, by mu (metric_constants["probability_bins"])
            masked, masked_positive, masked_negative, masked_in_bin_0 ... _4
                                         of those among them that are masked
            ppo_clipped                  moved tokens whose gradient PPO with the reference clip would have dropped
            ppo_agreeing                 moved tokens that PPO would have dropped if and only if they are masked
            bad_updates                  A < 0 and mu - pi >= bad_update_drop
            weight_sum, divergence_sum   sums of w and D over the tokens that have moved
            abs_log_ratio_sum            sums over all tokens: |log r|,
            kl_k1_sum, kl_k3_sum           -log r, r - 1 - log r,
            ratio_sum, ratio_squared_sum   r, r^2 (r clamped to e^-20 ... e^20),
            entropy_sum                    the policy's entropy
            divergence_max               maxima, -inf over no token: D over the tokens that have moved,
            ratio_max, negated_ratio_max   r and -r over all tokens,
            prob_change_max                |pi - mu| over all tokens

    metric_constants: what the metrics are measured against, as compiled in: ``reference_clip``, ``bad_update_drop``,
        ``probability_bins`` (edges), ``histogram_lowest`` and ``histogram_highest`` (powers of ten) and
        ``histogram_bins_per_decade``. The histogram has one bin more at either end for what lies outside.
"""

cuda_archs: str
compiler: str
flags: str
cpu_level: str
cpu_level_is_supported: bool
torch_version: str
limit_names: tuple[str, ...]
total_names: tuple[str, ...]
metric_constants: dict[str, object]
