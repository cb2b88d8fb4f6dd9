"""What csrc/module.cpp and csrc/operators compile to. Importing it registers torch.ops.megatron_dppo.

Attributes:
    cuda_archs: such as ``"80;90a;100+PTX"``; empty where only the CPU kernels are in.
    compiler, flags: what compiled it, and how.
    cpu_level: the level of x86-64 whose vectors the CPU kernels use on this processor, such as ``"x86-64-v3"``; empty
        where the compiler's own target is the only one.
    cpu_level_is_supported: whether this processor can run that level; a build for one level may ask too much.
    fp32_product_dtypes: names of the 16-bit dtypes whose products this processor sums in fp32 by itself.
    torch_version: the torch that it was compiled against.
    cpu_l2_bytes: second-level cache of a core of this processor; 0 where the system does not tell.
    cache_share: of the L2 cache, how much the rows may take that policy_gradient_ has under way.
    limit_names: what the values of token_objective's ``limits`` are, in order. They are DPPOConfig's thresholds of the
        same names; infinity as ``ratio_cap`` or ``ppo_dual_clip`` means never.
    mean_names: what the rows of token_objective's ``means`` [M, 2] are, numerators and denominators. All are over the tokens
        of the mask. A token has *moved* if its advantage is not 0, and is *masked* if it has moved and its weight is 0::

            mask_fraction, ..._pos, ..._neg    masked of moved tokens; of those with A > 0, A < 0
            mask_fraction_of_bin_0 ... _4      the same by mu (metric_constants["probability_bins"])
            weight_mean, divergence_mean       w and D over the tokens that have moved
            ppo_would_clip_fraction            moved tokens whose gradient PPO with the reference clip would have dropped
            ppo_agreement                      moved tokens that PPO would have dropped if and only if they are masked
            bad_update_fraction                moved tokens with A < 0 and mu - pi >= bad_update_drop
            abs_log_ratio                      over all tokens: |log r|,
            kl_k1, kl_k3                         -log r, r - 1 - log r,
            ratio_mean, ratio_squared_mean       r, r^2 (r clamped to e^-20 ... e^20),
            entropy                              the policy's entropy,
            update_mean                          |w r A|,
            loss                                 -w r A

    maximum_names: what its ``maxima`` are, -inf over no token: D over the tokens that have moved; r, -r, |pi - mu| and
        |w r A| over all tokens.
    check_names: what the rows of check_tokens' ``record`` [C, 3] are about: position of the first bad token or -1, its
        value, its target.
    metric_constants: what the metrics are measured against, as compiled in: ``reference_clip``, ``bad_update_drop``,
        ``probability_bins`` (edges), ``histogram_lowest`` and ``histogram_highest`` (powers of ten) and
        ``histogram_bins_per_decade``. The histogram has one bin more at either end for what lies outside.
"""

cuda_archs: str
compiler: str
flags: str
cpu_level: str
cpu_level_is_supported: bool
fp32_product_dtypes: tuple[str, ...]
torch_version: str
cpu_l2_bytes: int
cache_share: float
limit_names: tuple[str, ...]
mean_names: tuple[str, ...]
maximum_names: tuple[str, ...]
check_names: tuple[str, ...]
metric_constants: dict[str, object]
